"""From documents to a data folder: vocabulary, split, encoding on all cores, writing.

The documents are read twice, or three times where byte pairs are trained: once to count them, then to encode them.
Memory does not grow with them. Text is cut, to save memory or time, only where the tokenizer would cut too
(Tokenizer.cut), so the ids are those of encoding every document whole. A preparation that was interrupted continues
after the last CHAPTER_CHARS characters that were written when it is given the same documents and settings again.

    prepared = prepare("data/mytext", Files(["mytext.txt"]), Vocabulary("bpe", vocab_size=1024))
    prepared = prepare("data/openwebtext", Files(paths, as_is=True), Vocabulary("gpt2"), 0.0005, seed=2357)
"""

import contextlib
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
from typing import Any, Callable, Iterable, Iterator, Literal, Protocol, Sequence

import numpy as np

from configurator import UserError
from dongpt.log import progress_bar
from dongpt.program import ROOT
from dongpt.text.bins import SPLITS, Encoded, Prepared, Writer, data_files, read_meta
from dongpt.text.documents import Files, OnBytes, Texts
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
Content = Any  # of a document: text, or a list of segments of which some are in the loss
Piece = tuple[str, Content, bool]  # (train or val, content, whether its document ends with it)
Job = list[Piece]  # what is encoded at a time


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


class Marked(Protocol):
    """Documents in segments, some of which are in the loss."""

    size: int  # bytes on the disk

    def stamp(self):
        """A value that changes when the text does."""

    def marked(self, on_bytes: OnBytes, digest=None) -> Iterator[tuple[int, list[Segment]]]:
        """(a number that decides on the split, segments) of each document; no segments if it is left out."""


def prepare(
    folder: str,
    documents: Files | Texts | Marked,
    vocabulary: Vocabulary,
    val_fraction: float = 0.1,
    source: str = "",
    sha256: str = "",
    quiet: bool = False,
    shard_tokens: int = 0,
    val_buckets: np.ndarray | None = None,
    seed: int | None = None,
    marks: Sequence[str] = (),
    template: Template | None = None,
) -> Prepared | None:
    """Write train.bin, val.bin and meta.json to folder, all or none of them; with shard_tokens train_000.bin, ... .

    val gets the documents whose bucket is in val_buckets (BUCKETS,) bool; by default whole documents chosen by their
    hash, or the end of the text if there are few (see choose). With a seed the split is that of nanoGPT's OpenWebText:
    seed draws val_fraction of the documents, and val.bin, with them in the order of the draw, is nanoGPT's file, byte
    for byte; that needs Files and GPT-2's vocabulary. Returns None if folder holds all of it already.

    Documents in segments also get masks, which are 1 where a segment is in the loss; they are always split whole.
    marks become special tokens, template goes with the tokenizer. source and sha256 say where the text comes from; by
    default what was read is hashed. Raises UserError for a text that is too short to split, a vocabulary that does not
    fit into uint16, and for what documents, tokenizers and Writer raise.
    """
    check_fraction(val_fraction)
    stamp, marked = documents.stamp(), not isinstance(documents, (Files, Texts))
    plan = _sha256(repr((documents, stamp, vocabulary, val_fraction, shard_tokens, marks, template)))
    if seed is not None:
        assert isinstance(documents, Files) and vocabulary.tokenizer == "gpt2"
        plan = _plan_of_draw(documents, val_fraction, seed, shard_tokens)
    passes = 1 if seed is not None else 3 if vocabulary.tokenizer == "bpe" else 2
    with (
        Writer(folder, shard_tokens=shard_tokens, plan=plan, reorder=seed is not None) as writer,
        progress_bar(passes * documents.size, unit="B", quiet=quiet, leave=False) as bar,
    ):
        tokenizer: Tokenizer
        if isinstance(documents, Files) and seed is not None:
            with contextlib.suppress(UserError):
                if (meta := read_meta(folder)).get("plan_sha256") == plan and data_files(folder, meta):
                    return None
            tokenizer, skip = GPT2Tokenizer(), 0
            pieces, val_order, meta = _drawn(documents, val_fraction, seed, writer.state["documents"], bar.update)
            meta["plan_sha256"] = plan
        else:
            tokenizer, pieces, meta = _surveyed(documents, vocabulary, val_fraction, val_buckets, marks, bar.update)
            val_order, skip = None, writer.state["documents"]
        tokenizer.template, writer.tokenizer = template, tokenizer
        end_id = tokenizer.end_id if meta["documents"] > 1 else None
        sampled = ("val",) if seed is None and not marked else SPLITS
        sample = _write(writer, tokenizer, pieces, end_id, sampled, skip)
        if documents.stamp() != stamp:
            raise UserError("the text changed while it was read: run this again when nothing writes to it")
        prepared = writer.finish({"source": source, **meta, "sha256": sha256 or meta["sha256"]}, val_order)
        if not sample.strip():  # there is no other than the start of val.bin
            ids, end_id = np.fromfile(os.path.join(folder, "val.bin"), "<u2", count=200).tolist(), tokenizer.end_id
            sample = tokenizer.decode(ids[: ids.index(end_id)] if end_id in ids else ids).rstrip("\ufffd")
        return replace(prepared, sample=sample)


def _surveyed(
    documents: Files | Texts | Marked,
    vocabulary: Vocabulary,
    val_fraction: float,
    val_buckets: np.ndarray | None,
    marks: Sequence[str],
    on_bytes: OnBytes,
) -> tuple[Tokenizer, Iterator[Piece], dict]:
    """(tokenizer, pieces, entries of meta.json), for which the documents are read once."""
    survey, digest, marked = Survey(), hashlib.sha256(), not isinstance(documents, (Files, Texts))
    none_for_val = np.zeros(BUCKETS, dtype=bool)
    found = _survey(_texts(_pieces(documents, none_for_val, survey, on_bytes, digest)), vocabulary)
    if not survey.characters:
        raise UserError("there is nothing but blanks in the text: give one with words in it")
    special = [*marks, *(name for name in vocabulary.names() if name not in marks)]
    if isinstance(documents, (Files, Texts)) and survey.documents > 1 and not documents.parted:
        special += [END] * (END not in special)
    again = _texts(_pieces(documents, none_for_val, Survey(), on_bytes))
    tokenizer = _build_tokenizer(vocabulary, special, found, survey.characters, again)
    split = choose(survey, val_fraction, 2 if marked else MIN_DOCUMENTS) if val_buckets is None else val_buckets
    pieces = _pieces(documents, none_for_val if isinstance(split, int) else split, Survey(), on_bytes)
    if isinstance(split, int) and not marked:
        pieces = _by_position(pieces, split, vocabulary.tokenizer == "word")
    elif isinstance(split, int):
        raise UserError(
            f"{survey.documents:,} records cannot be split so that about {100 * val_fraction:.0f} % of the text are "
            f"for validation: give more records, or another --val_fraction"
        )
    by = "position" if isinstance(split, int) else "documents"
    meta = {"sha256": digest.hexdigest(), "documents": survey.documents, "split": by}
    return tokenizer, pieces, meta | ({"left_out": survey.left_out} if marked else {})


def _pieces(documents: Files | Texts | Marked, for_val: np.ndarray, survey: Survey, *progress) -> Iterator[Piece]:
    """All of the documents, counted in survey; for_val (BUCKETS,) tells their split."""
    if isinstance(documents, (Files, Texts)):
        parts = _with_buckets(documents.parts(*progress))
    else:
        parts = ((number % BUCKETS, parts, True) for number, parts in documents.marked(*progress))
    for bucket, content, ends in parts:
        if content == []:
            survey.left_out += 1
            continue
        n = _n_characters(content)
        survey.documents += ends
        survey.characters += n
        survey.buckets[bucket] += n
        yield SPLITS[int(for_val[bucket])], content, ends


def _with_buckets(parts: Iterable[tuple[str, bool]]) -> Iterator[tuple[int, Content, bool]]:
    """(bucket of its document, text, whether the document ends with it) of all texts."""
    bucket = None
    for text, ends in parts:
        bucket = bucket_of(text) if bucket is None else bucket
        yield bucket, text, ends
        bucket = None if ends else bucket


def _plan_of_draw(files: Files, val_fraction: float, seed: int, shard_tokens: int) -> str:
    """A hash of all that decides on the bins of a split with a seed. meta.json holds it, so it must not change."""
    stamps = [[os.path.basename(path), *stamp] for path, stamp in zip(files.paths, files.stamp())]
    plan = {"files": stamps, "field": files.field, "encoding": files.encoding, "tokenizer": GPT2Tokenizer().to_dict()}
    return _sha256(json.dumps({**plan, "val_fraction": val_fraction, "seed": seed, "shard_tokens": shard_tokens}))


def _drawn(
    files: Files, val_fraction: float, seed: int, done: int, on_bytes: OnBytes
) -> tuple[Iterator[Piece], np.ndarray, dict]:
    """(pieces after the first `done` documents, the order of val's documents, entries of meta.json)."""
    counts = [files.count(path) for path in files.paths]
    n_documents, drawn = sum(counts), draw(sum(counts), val_fraction, seed)
    if not 0 < len(drawn) < n_documents:
        raise UserError(
            f"{n_documents:,} documents cannot be split into some to train on and some for validation: "
            f"give more files or records, or take data/prepare.py, which cuts a text"
        )
    if done:
        print(f"continuing after document {done:,} of {n_documents:,}, where this stopped before")
    for_val = np.zeros(n_documents, dtype=bool)
    for_val[drawn] = True
    meta = {"sha256": "", "documents": n_documents, "split": "drawn", "seed": seed}
    return _after(done, files, counts, for_val, on_bytes), np.argsort(np.argsort(drawn)), meta


def draw(n_documents: int, val_fraction: float, seed: int) -> np.ndarray:
    """The numbers of the documents for validation, in the order in which Hugging Face's train_test_split draws them."""
    return np.random.default_rng(seed).permutation(n_documents)[: math.ceil(val_fraction * n_documents)]


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
    return len(content) if isinstance(content, str) else sum(map(len, _texts_of(content)))


def _texts(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The texts of pieces, without special tokens."""
    return ((split, text, ends) for split, content, ends in pieces for text in _texts_of(content))


def _survey(pieces: Iterator[Piece], vocabulary: Vocabulary) -> Counter[str]:
    """The words of all pieces with their counts, or the characters; nothing for byte pairs."""
    found: Counter[str] = Counter()
    if vocabulary.tokenizer == "char":
        for _, characters in _in_order(_characters, _jobs(pieces, len), in_threads=True):
            found.update(characters)
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


def _characters(job: Job) -> str:
    """The different characters of texts."""
    codes = np.zeros(0x110000, dtype=bool)
    codes[np.frombuffer("".join(text for _, text, _ in job).encode("utf-32-le"), np.uint32)] = True
    return "".join(map(chr, np.flatnonzero(codes)))


def _count_words(lower: bool, spaces_alone: bool, job: Job) -> Counter[str]:
    """How often each word occurs in texts."""
    return Counter(chain.from_iterable(split_words(text, lower, spaces_alone) for _, text, _ in job))


def _build_tokenizer(
    vocabulary: Vocabulary, special: list[str], found: Counter[str], n_characters: int, again: Iterator[Piece]
) -> Tokenizer:
    """The tokenizer of a text in which _survey found characters or words; again: its pieces, to train byte pairs on."""
    kind, too_many = vocabulary.tokenizer, f"uint16 files hold {MAX_VOCAB:,}: take --tokenizer=bpe"
    tokenizer: Tokenizer
    if kind == "char":
        tokenizer = CharTokenizer("".join(sorted(found)), special)
    elif kind == "word":
        too_many += ", or a larger --min_count"
        words = sorted(word for word, count in found.items() if count >= vocabulary.min_count)
        if not words:
            raise UserError(f"no word occurs {vocabulary.min_count:,} times: lower --min_count")
        if len(words) >= MAX_VOCAB:
            raise UserError(f"the text has {len(words):,} different words, {too_many}")
        tokenizer = WordTokenizer(words, special, vocabulary.lower, vocabulary.spaces_alone)
    else:
        special = [name for name in special if name != END]  # byte pairs have it anyway
        if kind == "gpt2":
            tokenizer = GPT2Tokenizer(special)
        else:
            every = -(-n_characters // BPE_TRAIN_CHARS)
            texts = (text for i, job in enumerate(_jobs(again, last_break)) if i % every == 0 for _, text, _ in job)
            tokenizer = BPETokenizer.train(_with_few_words(texts), vocabulary.vocab_size, special)
    if tokenizer.vocab_size > MAX_VOCAB:
        raise UserError(f"the vocabulary has {tokenizer.vocab_size:,} entries, {too_many}")
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


def choose(survey: Survey, val_fraction: float, least: int = MIN_DOCUMENTS) -> np.ndarray | int:
    """The buckets for validation (BUCKETS,) bool if there are at least `least` documents and their characters meet
    val_fraction within a factor of 2; else how many characters are for training.

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
        return taken
    cut = int(survey.characters * (1 - val_fraction))  # as nanoGPT's scripts cut
    if not 2 <= cut <= survey.characters - 2:  # a loss needs a token to begin with and one to predict
        raise UserError(f"a text of {survey.characters} characters is too short to split: give a longer one")
    return cut


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


def _by_position(pieces: Iterable[Piece], cut: int, between_words: bool) -> Iterator[Piece]:
    """Pieces of which the one with the character number cut is cut there, or between words nearby, and val begins."""
    place, before = 0, "\n"
    for _, text, ends in pieces:
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


def _after(done: int, files: Files, counts: list[int], for_val: np.ndarray, on_bytes: OnBytes) -> Iterator[Piece]:
    """All documents after the first `done`; for_val tells their split by their numbers."""
    first = 0
    for path, count in zip(files.paths, counts):
        number, first = first, first + count
        if first <= done:
            continue
        for text, ends in files.parts_of(path, on_bytes):
            if done <= number < first:
                yield SPLITS[int(for_val[number])], text, ends
            number += ends
        if number != first:
            raise UserError(f"{path} changed while it was read: run this again when nothing writes to it")


# ----------------------------------------------------------------------------------------------------------------------
# encoding


def _write(
    writer: Writer, tokenizer: Tokenizer, pieces: Iterator[Piece], end_id: int | None, sampled: Sequence[str], skip: int
) -> str:
    """Encode pieces, without the first `skip` documents, and write them, end_id after each document; save the state
    after every CHAPTER_CHARS. Returns the start of the first text of a split that is sampled."""
    documents, sample, size = writer.state["documents"], "", 0

    def rest() -> Iterator[Piece]:
        nonlocal sample, skip
        for split, content, ends in pieces:
            if split in sampled and not sample.strip():
                sample = next(iter(_texts_of(content)), "")[:SAMPLE_CHARS]
            if skip == 0:
                yield split, content, ends
            else:
                skip -= ends

    for job, encoded in encode_all(rest(), tokenizer, end_id):
        for split, of_split in encoded:
            writer.add(split, of_split)
            size += of_split.n_characters
        documents += sum(ends for _, _, ends in job)
        if size >= CHAPTER_CHARS and job[-1][2]:
            writer.save(documents)
            size = 0
    return sample


def encode_all(
    pieces: Iterator[Piece], tokenizer: Tokenizer, end_id: int | None
) -> Iterator[tuple[Job, list[tuple[str, Encoded]]]]:
    """(job, [(split, ids), ...]) of all pieces, in order."""
    encode = functools.partial(_encode, tokenizer, end_id)
    return _in_order(encode, _jobs(pieces, tokenizer.cut), tokenizer.in_threads)


def _in_order(function: Callable, jobs: Iterable[Job], in_threads: bool) -> Iterator[tuple[Job, Any]]:
    """(job, function(job)) of all jobs, computed on all cores by threads or by processes."""
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
            for job in jobs:
                waiting.append((job, pool.submit(function, job)))
                if len(waiting) > 2 * cores:
                    job, future = waiting.popleft()
                    yield job, future.result()
            yield from ((job, future.result()) for job, future in waiting)
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


def _jobs(pieces: Iterable[Piece], cut: Callable[[str], int]) -> Iterator[Job]:
    """Pieces in lists of about JOB_CHARS characters each; one ends where a chapter does, after CHAPTER_CHARS."""
    job: Job = []
    size = of_chapter = 0
    for split, content, ends in _short(pieces, cut):
        job.append((split, content, ends))
        n = _n_characters(content)
        size, of_chapter = size + n, of_chapter + n
        if size >= JOB_CHARS or (ends and of_chapter >= CHAPTER_CHARS):
            of_chapter = 0 if ends and of_chapter >= CHAPTER_CHARS else of_chapter
            yield job
            job, size = [], 0
    if job:
        yield job


def _short(pieces: Iterable[Piece], cut: Callable[[str], int]) -> Iterator[Piece]:
    """The same pieces, of which texts are cut, where cut says that they may be, so that they are short."""
    before, rest = "train", ""  # the split and the text of a document that goes on
    for split, content, ends in chain(pieces, [("", "", False)]):
        if rest and split != before:
            yield before, rest, False
            rest = ""
        if not isinstance(content, str):
            yield split, joined(content), ends
            continue
        text, start, before = rest + content, 0, split
        while not ends or len(text) - start > JOB_CHARS:
            n = cut(text[start : start + JOB_CHARS]) or cut(text[start:])
            if not n:
                break
            yield split, text[start : start + n], False
            start += n
        rest = "" if ends else text[start:]
        if len(rest) > UNBROKEN_CHARS:
            raise UserError(
                f"the text has {len(rest):,} characters without a space or a mark between words, too many for this "
                f"tokenizer: take --tokenizer=char, or break the text up"
            )
        if ends:
            yield split, text[start:], True


def _encode(tokenizer: Tokenizer, end_id: int | None, job: Job) -> list[tuple[str, Encoded]]:
    """The ids of each split of a job: of texts with end_id after each document, or of segments with their mask."""
    found = []
    for split in {split: None for split, _, _ in job}:
        parts = [(content, ends) for of_split, content, ends in job if of_split == split]
        texts = [text for content, _ in parts for text in _texts_of(content)]
        characters, n_bytes = sum(map(len, texts)), sum(map(_n_bytes, texts))
        mask, n_predicted, is_lossy = None, 0, any(map(tokenizer.is_lossy, texts))
        if isinstance(parts[0][0], str):
            ids = tokenizer.encode_parts(parts, end_id)
        else:
            segments, encoded = [part for content, _ in parts for part in content], iter(tokenizer.encode_texts(texts))
            one = {name: np.array([i], np.uint16) for name, i in tokenizer.specials.items()}
            arrays = [one[part.text] if part.is_special else next(encoded) for part in segments]
            ids, mask = np.concatenate(arrays), np.repeat([part.in_loss for part in segments], [*map(len, arrays)])
            n_predicted = sum(_n_bytes(part.text) for part in segments if part.in_loss and not part.is_special)
        found.append((split, Encoded(ids, characters, n_bytes, mask, n_predicted, is_lossy)))
    return found


def _n_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8"))
