"""From documents to a data folder: vocabulary, split, encoding on all cores, writing.

The documents are read twice, or three times where byte pairs are trained: once to count them, then to encode them.
Memory does not grow with them. Text is cut, to save memory or time, only where the tokenizer would cut too
(Tokenizer.cut), so the ids are those of encoding every document whole. A preparation that was interrupted continues
after the last CHAPTER_CHARS characters that were written when it is given the same documents and settings again.

    prepared = prepare("data/mytext", Files(["mytext.txt"]), Vocabulary("bpe", vocab_size=1024))
    prepared = prepare("data/openwebtext", Files(paths, as_is=True), Vocabulary("gpt2"), 0.0005, split="drawn")
"""

import functools
import hashlib
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import zlib
from collections import Counter, deque
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Callable, Collection, Iterable, Iterator, Literal, Protocol, Sequence

import numpy as np

from configurator import UserError
from dongpt.log import progress_bar
from dongpt.program import ROOT
from dongpt.text.bins import SPLITS, Encoded, Prepared, Writer, read_meta, split_files
from dongpt.text.documents import Files, Texts
from dongpt.text.template import Segment, Template, joined
from dongpt.text.tokenizers import (
    END,
    MAX_VOCAB,
    BPETokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    WordTokenizer,
    is_word_break,
    last_break,
    last_word_break,
    split_words,
)

JOB_CHARS = 2**19  # encoded by a core at a time
CHAPTER_CHARS = 2**26  # after which the state is saved: a kill costs at most this much work
UNBROKEN_CHARS = 2**24  # kept in memory while waiting for a place to cut
HASHED_CHARS = 2**16  # of a document that decide its bucket
SAMPLE_CHARS = 1000  # kept to show that they can be read back
MIN_DOCUMENTS = 20  # fewer are not split as whole documents
BUCKETS = 2**16  # of documents by their hash; a split by documents chooses among them
BPE_TRAIN_CHARS = 2**25  # that byte pairs are trained on at most, evenly spaced over a longer text
BPE_TRAIN_WORDS = 2**18  # different words in them at most: each takes nearly a kilobyte during training
MAX_WORDS = 2**20  # different words that are counted
PREPARED_BY_TRAIN = ("chat_demo", "python_docs")  # data sets whose prepare.py needs no network

Kind = Literal["char", "word", "bpe", "gpt2"]
OnBytes = Callable[[int], Any]  # is told how many bytes were read
Content = Any  # of a document: text, or a list of segments of which some are in the loss
Part = tuple[int, Content, bool]  # (a number of its document, content, whether the document ends with it)
Piece = tuple[str, Content, bool]  # (train or val, content, whether its document ends with it)
Job = list[tuple[Content, bool]]  # what is encoded at a time, without its split


@dataclass(frozen=True)
class Vocabulary:
    """Which tokenizer, and how it is made from the text."""

    tokenizer: Kind = "char"  # characters, words, trained byte pairs, GPT-2's
    vocab_size: int = 4096  # bpe: entries, special tokens included
    min_count: int = 1  # word: rarer words become <unk>
    lower: bool = False  # word: in small letters
    spaces_alone: bool = False  # word: blanks are tokens of their own, as in the word notebook
    special: str = ""  # special tokens, with commas between: "<|summarize|>,<|sentiment|>"

    def names(self) -> list[str]:
        """The special tokens."""
        return [name.strip() for name in self.special.split(",") if name.strip()]


OPTION_OF = {"vocab_size": "bpe", "min_count": "word", "lower": "word", "spaces_alone": "word"}


def note_options(vocabulary: Vocabulary, given: Iterable[str]):
    """Say which of the settings given mean nothing to the tokenizer chosen."""
    for key in given:
        if OPTION_OF.get(key, vocabulary.tokenizer) != vocabulary.tokenizer:
            owner = OPTION_OF[key]
            print(f"--{key} changes nothing: it belongs to --tokenizer={owner}, and this one is {vocabulary.tokenizer}")


@dataclass
class Survey:
    """Corpus statistics from the first reading."""

    documents: int = 0
    characters: int = 0
    left_out: int = 0  # records without content
    buckets: np.ndarray = field(default_factory=lambda: np.zeros(BUCKETS, np.int64))  # characters by hash of documents


@dataclass(frozen=True)
class Split:
    """Which part of the text is for validation."""

    by: str  # "documents" or "position"
    cut: int = 0  # position: characters of train
    val_buckets: np.ndarray = field(default_factory=lambda: np.zeros(BUCKETS, bool))  # documents: those for val


class Marked(Protocol):
    """Documents in segments, some of which are in the loss."""

    size: int  # bytes on the disk

    def stamp(self):
        """A value that changes when the text does."""

    def marked(self, survey: Survey, on_bytes: OnBytes, digest=None) -> Iterator[tuple[int, list[Segment]]]:
        """(a number that decides on the split, segments) of each document; counts in survey those that are left out."""


def prepare(
    folder: str,
    documents: Files | Texts | Marked,
    vocabulary: Vocabulary,
    val_fraction: float = 0.1,
    source: str = "",
    sha256: str = "",
    quiet: bool = False,
    shard_tokens: int = 0,
    split: Literal["auto", "drawn"] | Split = "auto",
    seed: int = 2357,
    marks: Sequence[str] = (),
    template: Template | None = None,
) -> Prepared | None:
    """Write train.bin, val.bin and meta.json to folder, all or none of them; with shard_tokens train_000.bin, ... .

    split auto: val gets whole documents chosen by their hash, or the end of the text if there are few (see choose).
    drawn: as nanoGPT prepares OpenWebText: seed draws val_fraction of the documents, and val.bin holds them in the
    order of the draw, so that it is nanoGPT's file, byte for byte; needs GPT-2's vocabulary. Returns None if folder
    holds all of it already.

    Documents in segments also get masks, which are 1 where a segment is in the loss; they are always split whole.
    marks become special tokens, template goes with the tokenizer.

    source and sha256 say where the text comes from; by default what was read is hashed. Raises UserError for a text
    that is too short to split, a vocabulary that does not fit into uint16, and for what documents, tokenizers and
    Writer raise.
    """
    check_fraction(val_fraction)
    if split == "drawn":
        assert isinstance(documents, Files) and vocabulary.tokenizer == "gpt2"
        return _prepare_drawn(folder, documents, val_fraction, source, quiet, shard_tokens, seed)
    stamp, marked = documents.stamp(), not isinstance(documents, (Files, Texts))
    plan = _sha256(repr((documents, stamp, vocabulary, val_fraction, shard_tokens, marks, template)))
    passes = 3 if vocabulary.tokenizer == "bpe" else 2
    with (
        Writer(folder, shard_tokens=shard_tokens, plan=plan) as writer,
        progress_bar(passes * documents.size, unit="B", quiet=quiet, leave=False) as bar,
    ):
        survey, digest = Survey(), hashlib.sha256()
        found = _survey(_texts(_parts(documents, survey, bar.update, digest), survey), vocabulary)
        if not survey.characters:
            raise UserError("there is nothing but blanks in the text: give one with words in it")
        special = [*marks, *(name for name in vocabulary.names() if name not in marks)]
        if isinstance(documents, (Files, Texts)) and survey.documents > 1 and not documents.parted:
            special += [END] * (END not in special)
        again = _texts(_parts(documents, Survey(), bar.update), Survey())
        tokenizer = writer.tokenizer = _build_tokenizer(vocabulary, special, found, survey.characters, again)
        tokenizer.template = template
        if not isinstance(split, Split):
            split = choose(survey, val_fraction, 2 if marked else MIN_DOCUMENTS)
        parts = _parts(documents, Survey(), bar.update)
        if split.by == "documents":
            pieces = _by_document(parts, split.val_buckets)
        elif marked:
            raise UserError(
                f"{survey.documents:,} records cannot be split so that about {100 * val_fraction:.0f} % "
                f"of the text are for validation: give more records, or another --val_fraction"
            )
        else:
            pieces = _by_position(parts, split.cut, vocabulary.tokenizer == "word")
        end_id = tokenizer.end_id if survey.documents > 1 else None
        sample = _write(writer, pieces, end_id, SPLITS if marked else ("val",), skip=writer.documents)
        meta = {
            "source": source,
            "sha256": sha256 or digest.hexdigest(),
            "documents": survey.documents,
            "split": split.by,
            **({"left_out": survey.left_out} if marked else {}),
        }
        return _finish(writer, documents, stamp, meta, sample)


def _parts(documents: Files | Texts | Marked, survey: Survey, *progress) -> Iterator[Part]:
    """All of the documents; their numbers are below BUCKETS. survey counts those that are left out."""
    if not isinstance(documents, (Files, Texts)):
        yield from ((number % BUCKETS, parts, True) for number, parts in documents.marked(survey, *progress))
        return
    bucket = None
    for text, ends in documents.parts(*progress):
        bucket = bucket_of(text) if bucket is None else bucket
        yield bucket, text, ends
        bucket = None if ends else bucket


def _prepare_drawn(
    folder: str, files: Files, val_fraction: float, source: str, quiet: bool, shard_tokens: int, seed: int
) -> Prepared | None:
    """prepare with split="drawn"."""
    if shard_tokens < 1:
        raise UserError(f"shard_tokens={shard_tokens} must be at least 1")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed} must be at least 0 and below 2 ** 32")
    tokenizer, stamp = GPT2Tokenizer(), files.stamp()
    plan = {
        "files": [[os.path.basename(path), *of_file] for path, of_file in zip(files.paths, stamp)],
        "field": files.field,
        "encoding": files.encoding,
        "tokenizer": tokenizer.to_dict(),
        "val_fraction": val_fraction,
        "seed": seed,
        "shard_tokens": shard_tokens,
    }
    plan_sha256 = _sha256(json.dumps(plan))
    with (
        Writer(folder, tokenizer, shard_tokens, plan_sha256, spool_val=True) as writer,
        progress_bar(files.size, unit="B", quiet=quiet, leave=False) as bar,
    ):
        if _holds(folder, plan_sha256):
            return None
        counts = [files.count(path) for path in files.paths]
        order = draw(sum(counts), val_fraction, seed)
        if not 0 < len(order) < sum(counts):
            raise UserError(
                f"{sum(counts):,} documents cannot be split into some to train on and some for validation: "
                f"give more files or records, or take data/prepare.py, which cuts a text"
            )
        if writer.documents:
            print(f"continuing after document {writer.documents:,} of {sum(counts):,}, where this stopped before")
        for_val = np.zeros(sum(counts), dtype=bool)
        for_val[order] = True
        parts = _numbered(files, counts, writer.documents, bar.update)
        sample = _write(writer, _by_document(parts, for_val), tokenizer.end_id, SPLITS)
        meta = {
            "source": source,
            "sha256": "",
            "documents": sum(counts),
            "split": "drawn",
            "seed": seed,
            "plan_sha256": plan_sha256,
        }
        return _finish(writer, files, stamp, meta, sample, np.argsort(np.argsort(order)))


def _finish(writer: Writer, documents, stamp, meta: dict, sample: str, val_order: np.ndarray | None = None) -> Prepared:
    """Writer.finish, with a sample of the text, which is the start of val.bin if there is no other."""
    if documents.stamp() != stamp:
        raise UserError("the text changed while it was read: run this again when nothing writes to it")
    prepared = writer.finish(meta, val_order)
    if not sample.strip():
        ids = np.fromfile(os.path.join(writer.folder, "val.bin"), dtype="<u2", count=200).tolist()
        end_id = prepared.tokenizer.end_id
        sample = prepared.tokenizer.decode(ids[: ids.index(end_id)] if end_id in ids else ids).rstrip("\ufffd")
    return replace(prepared, sample=sample)


def draw(n_documents: int, val_fraction: float, seed: int) -> np.ndarray:
    """The numbers of the documents for validation, in the order in which Hugging Face's train_test_split draws them."""
    return np.random.default_rng(seed).permutation(n_documents)[: math.ceil(val_fraction * n_documents)]


def _holds(folder: str, plan_sha256: str) -> bool:
    """Whether folder holds the complete data of this plan."""
    try:
        meta = read_meta(folder)
        return meta.get("plan_sha256") == plan_sha256 and all(split_files(folder, meta, split) for split in SPLITS)
    except UserError:
        return False


def prepare_if_missing(folder: str, rt, out=None):
    """Run the folder's prepare.py if its data files are missing and it needs no network; the other processes wait.

    rt is a Runtime. The script's output goes to out, stdout by default.
    """
    name = os.path.basename(folder)
    if name in PREPARED_BY_TRAIN and folder == os.path.join(ROOT, "data", name):
        if rt.is_main and not all(os.path.exists(os.path.join(folder, f"{split}.bin")) for split in SPLITS):
            script = os.path.join(folder, "prepare.py")
            print(f"data/{name} is not prepared yet: running python data/{name}/prepare.py", file=out, flush=True)
            done = subprocess.run([sys.executable, script], stdout=out)
            if done.returncode in (130, -2):  # Ctrl-C reached both; of other failures opening the corpus says more
                raise KeyboardInterrupt
        rt.barrier()


def check_fraction(val_fraction: float):
    """Raise UserError unless val_fraction is one."""
    if not 0 < val_fraction < 1:
        raise UserError(f"val_fraction={val_fraction} must be above 0 and below 1")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# survey and vocabulary


def bucket_of(text: str) -> int:
    """The bucket of a document that starts with text; documents that differ only in blanks around them share one."""
    return zlib.crc32(text[:HASHED_CHARS].strip().encode("utf-8")) % BUCKETS


def _texts_of(content: Content) -> list[str]:
    """The texts in a document's content, without special tokens."""
    return [content] if isinstance(content, str) else [part.text for part in content if not part.is_special]


def _n_characters(content: Content) -> int:
    return sum(map(len, _texts_of(content)))


def _texts(parts: Iterable[Part], survey: Survey) -> Iterator[Piece]:
    """The texts of parts, all as train, counted in survey."""
    for bucket, content, ends in parts:
        n = _n_characters(content)
        survey.documents += ends
        survey.characters += n
        survey.buckets[bucket] += n
        yield from (("train", text, ends) for text in _texts_of(content))


def _survey(pieces: Iterator[Piece], vocabulary: Vocabulary) -> Counter[str]:
    """The characters or the words of all pieces with their counts (1 for a character); none for byte pairs."""
    found: Counter[str] = Counter()
    if vocabulary.tokenizer == "char":
        for _, characters in _in_order(_characters, _jobs(pieces, len), in_threads=True):
            found.update(dict.fromkeys(characters, 1))
    elif vocabulary.tokenizer == "word":
        if vocabulary.min_count < 1:
            raise UserError(f"min_count={vocabulary.min_count} must be at least 1")
        count = functools.partial(_count_words, vocabulary.lower, vocabulary.spaces_alone)
        for _, words in _in_order(count, _jobs(pieces, last_word_break), in_threads=False):
            found.update(words)
            if len(found) > MAX_WORDS:
                raise UserError(f"the text has more than {MAX_WORDS:,} different words: take --tokenizer=bpe")
    deque(pieces, maxlen=0)  # byte pairs need no survey
    return found


def _characters(job: Job) -> list[str]:
    """The different characters of texts."""
    codes = np.zeros(0x110000, dtype=bool)
    codes[np.frombuffer("".join(text for text, _ in job).encode("utf-32-le"), np.uint32)] = True
    return [*map(chr, np.flatnonzero(codes))]


def _count_words(lower: bool, spaces_alone: bool, job: Job) -> Counter[str]:
    """How often each word occurs in texts."""
    return Counter(chain.from_iterable(split_words(text, lower, spaces_alone) for text, _ in job))


TOO_MANY = "take --tokenizer=bpe, or for words a larger --min_count"


def _build_tokenizer(
    vocabulary: Vocabulary, special: list[str], found: Counter[str], n_characters: int, again: Iterator[Piece]
) -> Tokenizer:
    """The tokenizer of a text in which _survey found characters or words; again: its pieces, to train byte pairs on."""
    kind = vocabulary.tokenizer
    tokenizer: Tokenizer
    if kind == "char":
        tokenizer = CharTokenizer("".join(sorted(found)), special)
    elif kind == "word":
        words = sorted(word for word, count in found.items() if count >= vocabulary.min_count)
        if not words:
            raise UserError(f"no word occurs {vocabulary.min_count:,} times: lower --min_count")
        if len(words) >= MAX_VOCAB:
            raise UserError(f"the text has {len(words):,} different words, uint16 files hold {MAX_VOCAB:,}: {TOO_MANY}")
        tokenizer = WordTokenizer(words, special, vocabulary.lower, vocabulary.spaces_alone)
    else:
        special = [name for name in special if name != END]  # byte pairs have it anyway
        if kind == "gpt2":
            tokenizer = GPT2Tokenizer(special)
        else:
            every = -(-n_characters // BPE_TRAIN_CHARS)
            texts = (text for i, (_, job) in enumerate(_jobs(again, last_break)) if i % every == 0 for text, _ in job)
            tokenizer = BPETokenizer.train(_with_few_words(texts), vocabulary.vocab_size, special)
    if tokenizer.vocab_size > MAX_VOCAB:
        raise UserError(
            f"a vocabulary of {tokenizer.vocab_size:,} does not fit into uint16 files, which hold "
            f"{MAX_VOCAB:,}: {TOO_MANY}"
        )
    return tokenizer


def _with_few_words(texts: Iterable[str]) -> Iterator[str]:
    """The first of texts, as far as they have at most about BPE_TRAIN_WORDS different words together."""
    words: set[str] = set()
    for text in texts:
        yield text
        words.update(re.findall(r"\w+", text))
        if len(words) > BPE_TRAIN_WORDS:
            return


# ----------------------------------------------------------------------------------------------------------------------
# split


def choose(survey: Survey, val_fraction: float, least: int = MIN_DOCUMENTS) -> Split:
    """Whole documents where there are at least `least` and val_fraction can be met within a factor of 2, else a place.

    Documents are taken in the order of their hash, which has nothing to do with their order in the text.
    """
    target = val_fraction * survey.characters
    taken, total = np.zeros(BUCKETS, dtype=bool), 0
    for bucket in np.flatnonzero(survey.buckets):
        if total + survey.buckets[bucket] <= target:
            taken[bucket] = True
            total += survey.buckets[bucket]
    if total < target / 2:  # then every bucket left is larger than half of it
        sizes = np.where(taken | (survey.buckets == 0), np.iinfo(np.int64).max, survey.buckets)
        taken[:], total = False, sizes.min()
        taken[sizes.argmin()] = True
    if survey.documents >= least and target / 2 <= total <= 2 * target and total < survey.characters:
        return Split("documents", val_buckets=taken)
    cut = int(survey.characters * (1 - val_fraction))  # as nanoGPT's scripts cut
    if not 2 <= cut <= survey.characters - 2:  # a loss needs a token to begin with and one to predict
        raise UserError(f"a text of {survey.characters} characters is too short to split: give a longer one")
    return Split("position", cut)


def _nearest_break(text: str, place: int) -> int:
    """place, or where a word ends before it, or else the first such place after it, or the end."""
    if is_word_break(text[place - 1], text[place]):
        return place
    found = last_word_break(text[:place])  # one more, lest the word that place is in is all that follows
    return (
        last_word_break(text[:found])
        or found
        or next((i for i in range(place + 1, len(text)) if is_word_break(text[i - 1], text[i])), len(text))
    )


def _by_document(parts: Iterable[Part], for_val: np.ndarray) -> Iterator[Piece]:
    """Parts with their split, which for_val tells by the number of the document."""
    return ((SPLITS[int(for_val[number])], content, ends) for number, content, ends in parts)


def _by_position(parts: Iterable[Part], cut: int, between_words: bool) -> Iterator[Piece]:
    """Parts with their split; the one that has the character number cut is cut there, or between words nearby."""
    place, before = 0, "\n"
    for _, text, ends in parts:
        n = min(max(cut - place, 0), len(text))
        if between_words and place + n == cut and n < len(text):
            n = _nearest_break(before + text, n + len(before)) - len(before)
            cut = place + n
        place += len(text)
        before = text[-1:] or before
        if n:
            yield "train", text[:n], ends and n == len(text)
        if n < len(text) or not text:
            yield "val" if place > cut else "train", text[n:], ends


def _numbered(files: Files, counts: list[int], done: int, on_bytes: OnBytes) -> Iterator[Part]:
    """The parts of all documents after the first `done`, with the numbers of the documents."""
    first = 0
    for path, count in zip(files.paths, counts):
        number, first = first, first + count
        if first <= done:
            continue
        for text, ends in files.parts_of(path, on_bytes):
            if number >= first:
                break
            if number >= done:
                yield number, text, ends
            number += ends
        else:
            if number == first:
                continue
        raise UserError(f"{path} changed while it was read: run this again when nothing writes to it")


# ----------------------------------------------------------------------------------------------------------------------
# encoding


def _write(writer: Writer, pieces: Iterator[Piece], end_id: int | None, sampled: Collection[str], skip: int = 0) -> str:
    """Encode pieces, without the first `skip` documents, and write them, end_id after each document; save the state
    after every CHAPTER_CHARS. Returns the start of the first text of a split that is sampled."""
    documents, sample, over = writer.documents, "", False

    def chapter() -> Iterator[Piece]:
        nonlocal documents, sample, over, skip
        size = 0
        for split, content, ends in pieces:
            if split in sampled and not sample.strip():
                sample = next(iter(_texts_of(content)), "")[:SAMPLE_CHARS]
            if skip > 0:
                skip -= ends
                continue
            yield split, content, ends
            size, documents = size + _n_characters(content), documents + ends
            if ends and size >= CHAPTER_CHARS:
                return
        over = True

    tokenizer = writer.tokenizer
    assert tokenizer is not None
    try:
        while not over:
            for split, encoded in encode_all(chapter(), tokenizer, end_id):
                writer.add(split, encoded)
            if not over:
                writer.save(documents)
    except KeyboardInterrupt:
        if writer.saved:
            print(f"interrupted: the same command continues after document {writer.documents:,}")
        raise
    return sample


def encode_all(pieces: Iterator[Piece], tokenizer: Tokenizer, end_id: int | None) -> Iterator[tuple[str, Encoded]]:
    """(split, ids) of all pieces, in order."""
    return _in_order(
        functools.partial(_encode, tokenizer, end_id), _jobs(pieces, tokenizer.cut), in_threads=tokenizer.in_threads
    )


def _in_order(function: Callable, jobs: Iterable[tuple[str, Job]], in_threads: bool) -> Iterator[tuple[str, Any]]:
    """(split, function(job)) for all (split, job), computed on all cores by threads or by processes."""
    cores = _n_cores()
    pool: Executor
    if in_threads:
        pool = ThreadPoolExecutor(cores)
    else:  # the function, which may hold a large vocabulary, is sent once and not with every job
        pool = ProcessPoolExecutor(min(cores, 8), initializer=_start_process, initargs=(function,))
        function = _call
    waiting: deque = deque()
    with pool:
        try:
            for split, job in jobs:
                waiting.append((split, pool.submit(function, job)))
                if len(waiting) > 2 * cores:
                    split, future = waiting.popleft()
                    yield split, future.result()
            for split, future in waiting:
                yield split, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_function: Callable | None = None  # of a process of the pool


def _start_process(function: Callable):
    """Keep the function, and end this process with its parent."""
    global _function
    _function = function
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent):
    parent.join()
    os._exit(1)


def _call(job: Job) -> Any:
    assert _function is not None
    return _function(job)


def _jobs(pieces: Iterable[Piece], cut: Callable[[str], int]) -> Iterator[tuple[str, Job]]:
    """(split, pieces that follow each other there) of about JOB_CHARS characters each."""
    jobs: dict[str, Job] = {split: [] for split in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    for split, content, ends in _short(pieces, cut):
        jobs[split].append((content, ends))
        sizes[split] += _n_characters(content)
        if sizes[split] >= JOB_CHARS:
            yield split, jobs[split]
            jobs[split], sizes[split] = [], 0
    yield from ((split, job) for split, job in jobs.items() if job)


def _short(pieces: Iterable[Piece], cut: Callable[[str], int]) -> Iterator[Piece]:
    """The same pieces, of which texts are cut, where cut says that they may be, so that they are short."""
    rest = dict.fromkeys(SPLITS, "")
    for split, content, ends in pieces:
        if not isinstance(content, str):
            yield split, joined(content), ends
            continue
        text, start = rest[split] + content, 0
        while not ends or len(text) - start > JOB_CHARS:
            n = cut(text[start : start + JOB_CHARS]) or cut(text[start:])
            if not n:
                break
            yield split, text[start : start + n], False
            start += n
        rest[split] = "" if ends else text[start:]
        if len(rest[split]) > UNBROKEN_CHARS:
            raise UserError(
                f"the text has {len(rest[split]):,} characters without a space or a mark between words, too many for "
                f"this tokenizer: take --tokenizer=char, or break the text up"
            )
        if ends:
            yield split, text[start:], True
    yield from ((split, text, False) for split, text in rest.items() if text)


def _encode(tokenizer: Tokenizer, end_id: int | None, job: Job) -> Encoded:
    """The ids of a job: of texts with end_id after each document, or of segments with their mask."""
    texts = [text for content, _ in job for text in _texts_of(content)]
    characters, n_bytes = sum(map(len, texts)), sum(map(_n_bytes, texts))
    is_lossy = any(map(tokenizer.is_lossy, texts))
    if isinstance(job[0][0], str):
        return Encoded(tokenizer.encode_parts(job, end_id), characters, n_bytes, is_lossy=is_lossy)
    segments = [segment for content, _ in job for segment in content]
    encoded = iter(tokenizer.encode_texts(texts))
    ids = [
        np.array([tokenizer.specials[part.text]], np.uint16) if part.is_special else next(encoded) for part in segments
    ]
    mask = np.repeat([part.in_loss for part in segments], [len(array) for array in ids])
    n_predicted = sum(_n_bytes(part.text) for part in segments if part.in_loss and not part.is_special)
    return Encoded(np.concatenate(ids), characters, n_bytes, mask, n_predicted, is_lossy)


def _n_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8"))
