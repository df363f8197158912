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
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Callable, Iterable, Iterator, Literal, Protocol

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
Piece = tuple[str, str, bool]  # (train or val, text, whether its document ends with it)
OnBytes = Callable[[int], Any]  # is told how many bytes were read


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
            print(
                f"--{key} changes nothing: it belongs to --tokenizer={OPTION_OF[key]}, and this one is "
                f"{vocabulary.tokenizer}"
            )


@dataclass
class Survey:
    """Corpus statistics from the first reading."""

    documents: int = 0
    characters: int = 0
    left_out: int = 0  # records without content
    sha256: str = ""
    buckets: np.ndarray = field(default_factory=lambda: np.zeros(BUCKETS, np.int64))  # characters by hash of documents


@dataclass(frozen=True)
class Split:
    """Which part of the text is for validation."""

    by: str  # "documents" or "position"
    cut: int = 0  # position: characters of train
    val_buckets: np.ndarray | None = None  # documents: (BUCKETS,) bool


def prepare(
    folder: str,
    documents: Files | Texts,
    vocabulary: Vocabulary,
    val_fraction: float = 0.1,
    source: str = "",
    sha256: str = "",
    quiet: bool = False,
    shard_tokens: int = 0,
    split: Literal["auto", "drawn"] = "auto",
    seed: int = 2357,
) -> Prepared | None:
    """Write train.bin, val.bin and meta.json to folder, all or none of them; with shard_tokens train_000.bin, ... .

    split auto: val gets whole documents chosen by their hash, or the end of the text if there are few (see choose).
    drawn: as nanoGPT prepares OpenWebText: seed draws val_fraction of the documents, and val.bin holds them in the
    order of the draw, so that it is nanoGPT's file, byte for byte; needs GPT-2's vocabulary. Returns None if folder
    holds all of it already.

    source and sha256 say where the text comes from; by default what was read is hashed. Raises UserError for a text
    that is too short to split, a vocabulary that does not fit into uint16, and for what documents, tokenizers and
    Writer raise.
    """
    check_fraction(val_fraction)
    if split == "drawn":
        assert isinstance(documents, Files) and vocabulary.tokenizer == "gpt2"
        return _prepare_drawn(folder, documents, val_fraction, source, quiet, shard_tokens, seed)
    stamp = documents.stamp()
    plan = _sha256(repr((documents, stamp, vocabulary, val_fraction, shard_tokens)))
    passes = 3 if vocabulary.tokenizer == "bpe" else 2
    with (
        Writer(folder, shard_tokens=shard_tokens, plan=plan) as writer,
        progress_bar(passes * documents.size, unit="B", quiet=quiet, leave=False) as bar,
    ):
        survey, digest = Survey(), hashlib.sha256()
        found = _survey(_counted(documents.batches(bar.update, digest), survey), vocabulary)
        _check_content(survey)
        special = vocabulary.names()
        if survey.documents > 1 and not documents.parted and END not in special:
            special.append(END)
        again = _whole(documents.batches(bar.update)) if vocabulary.tokenizer == "bpe" else iter(())
        tokenizer = writer.tokenizer = _build_tokenizer(vocabulary, special, found, survey.characters, again)
        chosen = choose(survey, val_fraction)
        pieces = _Sampled(
            _route(_whole(documents.batches(bar.update)), chosen, vocabulary.tokenizer == "word"), ("val",)
        )
        end_id = tokenizer.end_id if survey.documents > 1 else None
        _write(writer, _after(writer.documents, pieces), tokenizer, end_id)
        _check_unchanged(documents, stamp)
        meta = {
            "source": source,
            "sha256": sha256 or digest.hexdigest(),
            "documents": survey.documents,
            "split": chosen.by,
        }
        return replace(writer.finish(meta), sample=pieces.sample)


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
        pieces = _Sampled(_drawn_pieces(files, counts, order, writer.documents, bar.update), SPLITS)
        _write(writer, iter(pieces), tokenizer, tokenizer.end_id)
        meta = {
            "source": source,
            "sha256": "",
            "documents": sum(counts),
            "split": "drawn",
            "seed": seed,
            "plan_sha256": plan_sha256,
        }
        prepared = writer.finish(meta, val_order=np.argsort(np.argsort(order)))
        return replace(prepared, sample=pieces.sample.strip() or _start_of_val(folder, tokenizer))


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


def _start_of_val(folder: str, tokenizer: Tokenizer) -> str:
    """The start of the first document in val.bin."""
    ids = np.fromfile(os.path.join(folder, "val.bin"), dtype="<u2", count=200).tolist()
    return tokenizer.decode(ids[: ids.index(tokenizer.end_id)] if tokenizer.end_id in ids else ids).rstrip("\ufffd")


class Marked(Protocol):
    """Documents in segments, some of which are in the loss."""

    size: int  # bytes on the disk

    def stamp(self):
        """A value that changes when the text does."""

    def marked(self, survey: Survey, on_bytes: OnBytes, digest=None) -> Iterator[tuple[int, list[Segment]]]:
        """(a number that decides on the split, segments) of each document; counts in survey those that are left out."""


def prepare_marked(
    folder: str,
    documents: Marked,
    marks: list[str],
    vocabulary: Vocabulary,
    val_fraction: float = 0.1,
    source: str = "",
    template: Template | None = None,
    split: Split | None = None,
) -> Prepared:
    """Write a data folder with masks for documents in segments: the mask is 1 where a segment is in the loss.

    marks become special tokens, template goes with the tokenizer. Documents stay whole; by their numbers, modulo
    BUCKETS, they are split as split says, else so that val_fraction of the characters are for validation. Raises
    UserError as prepare does, and for documents that cannot be split whole.
    """
    check_fraction(val_fraction)
    stamp = documents.stamp()
    passes = 3 if vocabulary.tokenizer == "bpe" else 2
    with Writer(folder) as writer, progress_bar(passes * documents.size, unit="B", leave=False) as bar:
        survey, digest = Survey(), hashlib.sha256()
        found = _survey(_counted_segments(documents.marked(survey, bar.update, digest), survey), vocabulary)
        _check_content(survey)
        special = [*marks, *(name for name in vocabulary.names() if name not in marks)]
        again = (
            ("train", segment.text, True)
            for _, segments in (documents.marked(Survey(), bar.update) if vocabulary.tokenizer == "bpe" else ())
            for segment in segments
            if not segment.is_special
        )
        tokenizer = writer.tokenizer = _build_tokenizer(vocabulary, special, found, survey.characters, again)
        tokenizer.template = template
        split = split or choose(survey, val_fraction, least=2)
        if split.by != "documents":
            raise UserError(
                f"{survey.documents:,} records cannot be split so that about {100 * val_fraction:.0f} % "
                f"of the text are for validation: give more records, or another --val_fraction"
            )
        sample = ""
        for name, segments in _gathered(documents.marked(Survey(), bar.update), split):
            sample = sample or next((part.text for part in segments if not part.is_special), "")[:SAMPLE_CHARS]
            writer.add(name, _encode_segments(tokenizer, segments))
        _check_unchanged(documents, stamp)
        meta = {
            "source": source,
            "sha256": digest.hexdigest(),
            "documents": survey.documents,
            "split": split.by,
            "left_out": survey.left_out,
        }
        return replace(writer.finish(meta), sample=sample)


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


def _check_content(survey: Survey):
    if not survey.characters:
        raise UserError("there is nothing but blanks in the text: give one with words in it")


def _check_unchanged(documents, stamp):
    if documents.stamp() != stamp:
        raise UserError("the text changed while it was read: run this again when nothing writes to it")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# survey and vocabulary


def bucket_of(text: str) -> int:
    """The bucket of a document that starts with text; documents that differ only in blanks around them share one."""
    return zlib.crc32(text[:HASHED_CHARS].strip().encode("utf-8")) % BUCKETS


def _whole(batches) -> Iterator[Piece]:
    """The texts of batches one by one, all as train."""
    for texts, whole in batches:
        for i, text in enumerate(texts):
            yield "train", text, whole or i < len(texts) - 1


def _counted(batches, survey: Survey) -> Iterator[Piece]:
    """The texts of batches one by one, counted in survey."""
    bucket = None
    for split, text, ends in _whole(batches):
        bucket = bucket_of(text) if bucket is None else bucket
        survey.characters += len(text)
        survey.buckets[bucket] += len(text)
        if ends:
            bucket, survey.documents = None, survey.documents + 1
        yield split, text, ends


def _counted_segments(documents: Iterable[tuple[int, list[Segment]]], survey: Survey) -> Iterator[Piece]:
    """The texts of documents in segments, counted in survey."""
    for number, segments in documents:
        survey.documents += 1
        for segment in segments:
            if not segment.is_special:
                survey.characters += len(segment.text)
                survey.buckets[number % BUCKETS] += len(segment.text)
                yield "train", segment.text, True


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
    for _ in pieces:  # byte pairs need no survey
        pass
    return found


def _characters(job: list[tuple[str, bool]]) -> list[str]:
    """The different characters of texts."""
    codes = np.zeros(0x110000, dtype=bool)
    codes[np.frombuffer("".join(text for text, _ in job).encode("utf-32-le"), np.uint32)] = True
    return [*map(chr, np.flatnonzero(codes))]


def _count_words(lower: bool, spaces_alone: bool, job: list[tuple[str, bool]]) -> Counter[str]:
    """How often each word occurs in texts."""
    return Counter(chain.from_iterable(split_words(text, lower, spaces_alone) for text, _ in job))


TOO_MANY = "take --tokenizer=bpe, or for words a larger --min_count"


def _build_tokenizer(
    vocabulary: Vocabulary, special: list[str], found: Counter[str], n_characters: int, again: Iterator[Piece]
) -> Tokenizer:
    """The tokenizer of a text in which _survey found characters or words; again: its pieces, to train byte pairs on."""
    kind, tokenizer = vocabulary.tokenizer, None
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
    """place, or where a word ends before it, or else the first such place behind it, or the end."""
    if is_word_break(text[place - 1], text[place]):
        return place
    found = last_word_break(text[:place])  # one more, lest the word that place is in is all that follows
    return (
        last_word_break(text[:found])
        or found
        or next((i for i in range(place + 1, len(text)) if is_word_break(text[i - 1], text[i])), len(text))
    )


def _route(pieces: Iterator[Piece], split: Split, between_words: bool) -> Iterator[Piece]:
    """Pieces with their split, cut in two where a split by position says so; between_words: no word is cut."""
    place, bucket, before, cut = 0, None, "\n", split.cut
    for _, text, ends in pieces:
        if split.by == "documents":
            bucket = bucket_of(text) if bucket is None else bucket
            yield SPLITS[int(split.val_buckets[bucket])], text, ends
            bucket = None if ends else bucket
            continue
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


def _drawn_pieces(files: Files, counts: list[int], order: np.ndarray, done: int, on_bytes: OnBytes) -> Iterator[Piece]:
    """The pieces of all documents after the first `done`; those numbered in order are for val."""
    for_val = np.zeros(sum(counts), dtype=bool)
    for_val[order] = True
    first = 0
    for path, count in zip(files.paths, counts):
        number, first = first, first + count
        if first <= done:
            continue
        for text, ends in files.texts(path, on_bytes):
            if number >= first:
                break
            if number >= done:
                yield SPLITS[int(for_val[number])], text, ends
            number += ends
        else:
            if number == first:
                continue
        raise UserError(f"{path} changed while it was read: run this again when nothing writes to it")


class _Sampled:
    """Passes pieces on and keeps the first text of some splits as a sample."""

    def __init__(self, pieces: Iterator[Piece], splits: Iterable[str]):
        self.pieces, self.splits, self.sample = pieces, splits, ""

    def __iter__(self) -> Iterator[Piece]:
        for split, text, ends in self.pieces:
            if split in self.splits and not self.sample.strip():
                self.sample = text[:SAMPLE_CHARS]
            yield split, text, ends


def _after(done: int, pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The pieces of all documents after the first `done`."""
    for piece in pieces:
        if done <= 0:
            yield piece
        done -= piece[2]


def _gathered(documents: Iterable[tuple[int, list[Segment]]], split: Split) -> Iterator[tuple[str, list[Segment]]]:
    """(train or val, the segments of documents that follow each other there), about JOB_CHARS characters at a time."""
    waiting: dict[str, list[Segment]] = {name: [] for name in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    for number, segments in documents:
        name = SPLITS[int(split.val_buckets[number % BUCKETS])]
        waiting[name] += joined(segments)
        sizes[name] += sum(len(segment.text) for segment in segments)
        if sizes[name] >= JOB_CHARS:
            yield name, waiting[name]
            waiting[name], sizes[name] = [], 0
    for name in SPLITS:
        if waiting[name]:
            yield name, waiting[name]


def _encode_segments(tokenizer: Tokenizer, segments: list[Segment]) -> Encoded:
    """The ids of segments, and their mask."""
    texts = [segment.text for segment in segments if not segment.is_special]
    encoded = iter(tokenizer.encode_texts(texts))
    ids = [
        np.array([tokenizer.specials[segment.text]], np.uint16) if segment.is_special else next(encoded)
        for segment in segments
    ]
    mask = np.repeat([segment.in_loss for segment in segments], [len(array) for array in ids])
    n_predicted = sum(
        len(segment.text.encode("utf-8")) for segment in segments if segment.in_loss and not segment.is_special
    )
    return Encoded(
        np.concatenate(ids),
        sum(map(len, texts)),
        sum(len(text.encode("utf-8")) for text in texts),
        mask,
        n_predicted,
        any(map(tokenizer.is_lossy, texts)),
    )


# ----------------------------------------------------------------------------------------------------------------------
# encoding


def _write(writer: Writer, pieces: Iterator[Piece], tokenizer: Tokenizer, end_id: int | None):
    """Encode pieces and write them, end_id after each document; save the state after every CHAPTER_CHARS."""
    documents, over = writer.documents, False

    def chapter() -> Iterator[Piece]:
        nonlocal documents, over
        size = 0
        for piece in pieces:
            yield piece
            size, documents = size + len(piece[1]), documents + piece[2]
            if piece[2] and size >= CHAPTER_CHARS:
                return
        over = True

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


def encode_all(pieces: Iterator[Piece], tokenizer: Tokenizer, end_id: int | None) -> Iterator[tuple[str, Encoded]]:
    """(split, ids) of all pieces, in order."""
    jobs = _jobs(pieces, tokenizer.cut)
    if tokenizer.in_threads:
        yield from _in_order(functools.partial(_encode, tokenizer, end_id), jobs, in_threads=True)
    else:
        yield from _in_order(functools.partial(_encode_in_process, end_id), jobs, in_threads=False, tokenizer=tokenizer)


def _in_order(function: Callable, jobs: Iterable, in_threads: bool, tokenizer: Tokenizer | None = None) -> Iterator:
    """(name, function(job)) for all (name, job), computed on all cores by threads, or by processes with tokenizer."""
    cores = _n_cores()
    pool = (
        ThreadPoolExecutor(cores)
        if in_threads
        else ProcessPoolExecutor(min(cores, 8), initializer=_start_process, initargs=(tokenizer,))
    )
    waiting: deque = deque()
    with pool:
        try:
            for name, job in jobs:
                waiting.append((name, pool.submit(function, job)))
                if len(waiting) > 2 * cores:
                    name, future = waiting.popleft()
                    yield name, future.result()
            for name, future in waiting:
                yield name, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_tokenizer: Tokenizer | None = None  # of a process that encodes


def _start_process(tokenizer: Tokenizer | None):
    """Keep the tokenizer, which would take long to send with every job, and end this process with its parent."""
    global _tokenizer
    _tokenizer = tokenizer
    if parent := multiprocessing.parent_process():
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _encode_in_process(end_id: int | None, job: list[tuple[str, bool]]) -> Encoded:
    assert _tokenizer is not None
    return _encode(_tokenizer, end_id, job)


def _jobs(pieces: Iterable[Piece], cut: Callable[[str], int]) -> Iterator[tuple[str, list[tuple[str, bool]]]]:
    """(split, [(text, whether its document ends with it)]) of about JOB_CHARS characters each."""
    jobs: dict[str, list[tuple[str, bool]]] = {name: [] for name in SPLITS}
    sizes, rest = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, "")
    for name, text, ends in pieces:
        text, start = rest[name] + text, 0
        while not ends or len(text) - start > JOB_CHARS:
            n = cut(text[start : start + JOB_CHARS]) or cut(text[start:])
            if not n:
                break
            jobs[name].append((text[start : start + n], False))
            start, sizes[name] = start + n, sizes[name] + n
            if sizes[name] >= JOB_CHARS:
                yield name, jobs[name]
                jobs[name], sizes[name] = [], 0
        rest[name] = "" if ends else text[start:]
        if len(rest[name]) > UNBROKEN_CHARS:
            raise UserError(
                f"the text has {len(rest[name]):,} characters without a space or a mark between words, too many for "
                f"this tokenizer: take --tokenizer=char, or break the text up"
            )
        if ends:
            jobs[name].append((text[start:], True))
            sizes[name] += len(text) - start
        if sizes[name] >= JOB_CHARS:
            yield name, jobs[name]
            jobs[name], sizes[name] = [], 0
    for name in SPLITS:
        yield name, [*jobs[name], (rest[name], False)]


def _encode(tokenizer: Tokenizer, end_id: int | None, job: list[tuple[str, bool]]) -> Encoded:
    """The ids of a job's texts, end_id after each document."""
    return Encoded(
        tokenizer.encode_parts(job, end_id),
        sum(len(text) for text, _ in job),
        sum(len(text) if text.isascii() else len(text.encode("utf-8")) for text, _ in job),
        is_lossy=any(tokenizer.is_lossy(text) for text, _ in job),
    )
