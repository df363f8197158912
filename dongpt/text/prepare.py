"""From documents to a data folder: survey, vocabulary, split, encode on all cores, write.

The documents are read twice, or three times where byte pairs are trained: once to count them, then to encode them.
Memory does not grow with them. Whatever is cut for the sake of memory or speed is cut where the tokenizer would cut too
(Tokenizer.cut), so the ids are those of encoding every document whole.

    prepared = prepare("data/mytext", Files(["mytext.txt"]), Vocabulary("bpe", vocab_size=1024))
"""

import ctypes
import os
import re
import signal
import sys
import zlib
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Callable, Iterable, Iterator, Literal, Protocol

import numpy as np

from configurator import UserError
from dongpt.program import ROOT
from dongpt.text.bins import SPLITS, Digest, Encoded, Prepared, Writer
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

JOB = 2**19  # characters that a core encodes at a time
LONGEST = 2**24  # characters without a place to cut that are kept in memory
LEAST_DOCUMENTS = 20  # fewer are not split whole
BUCKETS = 2**16  # of documents by their hash: what a split by documents chooses from
HASHED = 2**16  # characters of a document that decide its bucket
TRAINED_ON = 2**25  # characters that byte pairs are trained on at most, evenly spaced over a longer text
TRAINED_WORDS = 2**18  # different words in them at most: each takes nearly a kilobyte while they are trained
SAMPLE = 1000  # characters that are kept to show that they read back
MOST_WORDS = 2**20  # different words that are counted at most


Kind = Literal["char", "word", "bpe", "gpt2"]


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


@dataclass
class Survey:
    """What the first reading finds."""

    documents: int = 0
    characters: int = 0
    left_out: int = 0  # records that say nothing
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
) -> Prepared:
    """Write train.bin, val.bin and meta.json to folder, all or none of them; with shard_tokens train_000.bin, ... .

    source and sha256 say where the text comes from; by default what was read is hashed. Raises UserError for a text
    that is too short to split, a vocabulary that does not fit into uint16, a folder that cannot be written, and for
    what documents.batches and the tokenizers raise.
    """
    check_fraction(val_fraction)
    builder, survey, stamp = _builder(vocabulary), Survey(), documents.stamp()
    with progress_bar(documents.size * (3 if vocabulary.tokenizer == "bpe" else 2), quiet) as progress:
        look(_counted(documents, survey, progress), builder)
        special = vocabulary.names()
        if survey.documents > 1 and not documents.parted and END not in special:
            special.append(END)
        again = (
            (text, whole or i < len(texts) - 1)
            for texts, whole in documents.batches(progress)
            for i, text in enumerate(texts)
        )
        tokenizer = builder.finish(special, again, survey)
        if tokenizer.vocab_size > MAX_VOCAB:
            raise UserError(
                f"a vocabulary of {tokenizer.vocab_size:,} does not fit into uint16 files, which hold "
                f"{MAX_VOCAB:,}: {TOO_MANY}"
            )
        split = choose(survey, val_fraction)
        with Writer(folder, tokenizer, shard_tokens) as writer:
            routed = _Sampled(_route(documents.batches(progress), split, vocabulary.tokenizer == "word"))
            for name, done in encode_all(routed, tokenizer, survey.documents > 1):
                writer.add(name, done)
            _check_rest(documents, stamp)
            meta = {
                "source": source,
                "sha256": sha256 or survey.sha256,
                "documents": survey.documents,
                "split": split.by,
            }
            return replace(writer.finish(meta), sample=routed.sample)


class Marked(Protocol):
    """Documents with marks, of which a loss is taken in parts."""

    size: int  # bytes on the disk

    def stamp(self):
        """What changes when the text does."""

    def marked(
        self, survey: Survey, on_bytes: Callable[[int], None], digest=None
    ) -> Iterator[tuple[int, list[Segment]]]:
        """(a number that decides on the split, parts) of each document; what is left out is counted in survey."""


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
    """Write bins and masks of documents in parts: the mask is 1 where a part is to be predicted.

    marks become special tokens, template goes with the tokenizer. Documents stay whole; by their numbers, modulo
    BUCKETS, they are split as split says, else so that val_fraction of the characters are for validation. Raises
    ValueError as prepare does, and for documents that cannot be split whole.
    """
    check_fraction(val_fraction)
    builder, survey, stamp = _builder(vocabulary), Survey(), documents.stamp()
    with progress_bar(documents.size * (3 if vocabulary.tokenizer == "bpe" else 2), False) as progress:
        look(_counted_parts(documents, survey, progress), builder)
        special = [*marks, *(name for name in vocabulary.names() if name not in marks)]
        again = (
            (part.text, True)
            for _, parts in documents.marked(Survey(), progress)
            for part in parts
            if not part.is_special
        )
        tokenizer = builder.finish(special, again, survey)
        tokenizer.template = template
        split = split or choose(survey, val_fraction, least=2)
        if split.by != "documents":
            raise UserError(
                f"{survey.documents:,} records cannot be split so that about {100 * val_fraction:.0f} % "
                f"of the text are for validation: give more records, or another --val_fraction"
            )
        with Writer(folder, tokenizer) as writer:
            sample = ""
            for name, parts in _gathered(documents.marked(Survey(), progress), split):
                sample = sample or next((part.text for part in parts if not part.is_special), "")[:SAMPLE]
                writer.add(name, _encode_parts(tokenizer, parts))
            _check_rest(documents, stamp)
            return replace(
                writer.finish(
                    {
                        "source": source,
                        "sha256": survey.sha256,
                        "documents": survey.documents,
                        "split": split.by,
                        "left_out": survey.left_out,
                    }
                ),
                sample=sample,
            )


@dataclass(frozen=True)
class Tasks:
    """Records of which one field is a question and the other the answer: question, mark, answer, END.

    The answer and END alone are to be predicted. What is asked decides on the split.
    """

    files: Files
    fields: tuple[str, str]
    mark: str

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return self.files.size

    def stamp(self):
        """What changes when a file does."""
        return self.files.stamp()

    def marked(
        self, survey: Survey, on_bytes: Callable[[int], None], digest=None
    ) -> Iterator[tuple[int, list[Segment]]]:
        """(a number of the question, parts) of the records of which both fields hold more than blanks."""
        for question, answer in self.files.records(*self.fields, on_bytes=on_bytes, digest=digest):
            if question.strip() and answer.strip():
                yield (
                    bucket_of(question),
                    [
                        Segment(question),
                        Segment(self.mark, is_special=True),
                        Segment(answer, in_loss=True),
                        Segment(END, is_special=True, in_loss=True),
                    ],
                )
            else:
                survey.left_out += 1


def check_fraction(val_fraction: float):
    """Raise UserError unless val_fraction is one."""
    if not 0 < val_fraction < 1:
        raise UserError(f"val_fraction={val_fraction} must be above 0 and below 1")


def note_options(vocabulary: Vocabulary, given: Iterable[str]):
    """Say which of the settings given mean nothing to the tokenizer chosen."""
    for key in given:
        if OPTION_OF.get(key, vocabulary.tokenizer) != vocabulary.tokenizer:
            print(
                f"--{key} changes nothing: it belongs to --tokenizer={OPTION_OF[key]}, and this one is "
                f"{vocabulary.tokenizer}"
            )


def named_folder(name: str) -> str:
    """data/<name>. Raises UserError for a name that is none of a folder."""
    if not name or name in (".", "..") or name != os.path.basename(name):
        raise UserError(f"name={name} must be the name of a folder under data/, without slashes")
    return os.path.join(ROOT, "data", name)


def _check_rest(documents: Files | Texts, stamp):
    if documents.stamp() != stamp:
        raise UserError("the text changed while it was read: run this again when it rests")


def _gathered(documents: Iterable[tuple[int, list[Segment]]], split: Split) -> Iterator[tuple[str, list[Segment]]]:
    """(train or val, the parts of documents that follow each other there), about JOB characters at a time."""
    waiting: dict[str, list[Segment]] = {name: [] for name in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    for number, parts in documents:
        name = SPLITS[int(split.val_buckets[number % BUCKETS])]
        waiting[name] += joined(parts)
        sizes[name] += sum(len(part.text) for part in parts)
        if sizes[name] >= JOB:
            yield name, waiting[name]
            waiting[name], sizes[name] = [], 0
    for name in SPLITS:
        if waiting[name]:
            yield name, waiting[name]


def _encode_parts(tokenizer: Tokenizer, parts: list[Segment]) -> Encoded:
    """The ids of parts, and their mask."""
    texts = [part.text for part in parts if not part.is_special]
    encoded = iter(tokenizer.encode_texts(texts))
    ids = [np.array([tokenizer.specials[part.text]], np.uint16) if part.is_special else next(encoded) for part in parts]
    mask = np.repeat([part.in_loss for part in parts], [len(array) for array in ids])
    n_predicted = sum(len(part.text.encode("utf-8")) for part in parts if part.in_loss and not part.is_special)
    return Encoded(
        np.concatenate(ids),
        sum(map(len, texts)),
        sum(len(text.encode("utf-8")) for text in texts),
        mask,
        n_predicted,
        any(map(tokenizer.is_lossy, texts)),
    )


TOO_MANY = "take --tokenizer=bpe, or for words a larger --min_count"


# ----------------------------------------------------------------------------------------------------------------------
# survey and vocabulary


def look(parts: Iterable[tuple[str, bool]], builder):
    """Show the text of parts, each with whether its document ends with it, to builder."""
    if builder.observe is None:
        for _ in parts:
            pass
        return
    observed = deque()
    with _pool(builder.in_threads) as pool:
        for _, chunk in _jobs((("train", *part) for part in parts), builder.cut):
            observed.append(pool.submit(builder.observe, [text for text, _ in chunk]))
            if len(observed) > 2 * _n_cores():
                builder.add(observed.popleft().result())
        for done in observed:
            builder.add(done.result())


def bucket_of(text: str) -> int:
    """The bucket of a document that begins with text; documents that are equal but for blanks around share one."""
    return zlib.crc32(text[:HASHED].strip().encode("utf-8")) % BUCKETS


def _counted(documents: Files | Texts, survey: Survey, progress) -> Iterator[tuple[str, bool]]:
    """The texts of documents one by one, each with whether its document ends with it, counted in survey."""
    bucket, digest = None, Digest()
    for texts, whole in documents.batches(progress, digest):
        for i, text in enumerate(texts):
            bucket = bucket_of(text) if bucket is None else bucket
            survey.characters += len(text)
            survey.buckets[bucket] += len(text)
            ends = whole or i < len(texts) - 1
            if ends:
                bucket, survey.documents = None, survey.documents + 1
            yield text, ends
    _finish(survey, digest)


def _counted_parts(documents: Marked, survey: Survey, progress) -> Iterator[tuple[str, bool]]:
    """The texts of documents in parts, counted in survey."""
    digest = Digest()
    for number, parts in documents.marked(survey, progress, digest):
        survey.documents += 1
        for part in parts:
            if not part.is_special:
                survey.characters += len(part.text)
                survey.buckets[number % BUCKETS] += len(part.text)
                yield part.text, True
    _finish(survey, digest)


def _finish(survey: Survey, digest):
    survey.sha256 = digest.hexdigest()
    if not survey.characters:
        raise UserError("there is nothing but blanks in the text: give one with words in it")


def _check_length(n: int):
    if n > LONGEST:
        raise UserError(
            f"the text has {n:,} characters without a space or a mark between words, too many for this "
            f"tokenizer: take --tokenizer=char, or break the text up"
        )


class _Characters:
    """Collects the characters of a text."""

    in_threads = True

    def __init__(self):
        self.known, self.ascii = set(), b""

    @staticmethod
    def cut(text: str) -> int:
        return len(text)

    def observe(self, texts: list[str]) -> set[str]:
        """The characters of texts, or those of them that are new."""
        text = "".join(texts)
        if text.isascii():
            return set(text.encode("ascii").translate(None, self.ascii).decode("ascii"))
        codes = np.zeros(0x110000, dtype=bool)
        codes[np.frombuffer(text.encode("utf-32-le"), np.uint32)] = True
        return set(map(chr, np.flatnonzero(codes)))

    def add(self, new: set[str]):
        if new - self.known:
            self.known |= new
            self.ascii = "".join(c for c in self.known if c.isascii()).encode("ascii")

    def finish(self, special: list[str], parts, survey: Survey) -> Tokenizer:
        return CharTokenizer("".join(sorted(self.known)), special)


class _Words:
    """Counts the words of a text."""

    in_threads = False
    cut = staticmethod(last_word_break)

    def __init__(self, vocabulary: Vocabulary):
        if vocabulary.min_count < 1:
            raise UserError(f"min_count={vocabulary.min_count} must be at least 1")
        self.vocabulary, self.counts = vocabulary, Counter()
        self.observe = _WordCounter(vocabulary.lower, vocabulary.spaces_alone)

    def add(self, counts: Counter):
        self.counts.update(counts)
        if len(self.counts) > MOST_WORDS:
            raise UserError(f"the text has more than {MOST_WORDS:,} different words: take --tokenizer=bpe")

    def finish(self, special: list[str], parts, survey: Survey) -> Tokenizer:
        words = sorted(word for word, count in self.counts.items() if count >= self.vocabulary.min_count)
        if not words:
            raise UserError(f"no word occurs {self.vocabulary.min_count:,} times: lower --min_count")
        if len(words) >= MAX_VOCAB:
            raise UserError(f"the text has {len(words):,} different words, uint16 files hold {MAX_VOCAB:,}: {TOO_MANY}")
        return WordTokenizer(words, special, self.vocabulary.lower, self.vocabulary.spaces_alone)


@dataclass(frozen=True)
class _WordCounter:
    """Counts the words of texts; other processes can be given it."""

    lower: bool
    spaces_alone: bool

    def __call__(self, texts: list[str]) -> Counter:
        return Counter(chain.from_iterable(split_words(text, self.lower, self.spaces_alone) for text in texts))


class _BytePairs:
    """Byte pairs need no survey."""

    in_threads = True
    observe = None

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary

    @staticmethod
    def cut(text: str) -> int:
        return len(text)

    def finish(self, special: list[str], parts, survey: Survey) -> Tokenizer:
        special = [name for name in special if name != END]  # byte pairs have it anyway
        if self.vocabulary.tokenizer == "gpt2":
            return GPT2Tokenizer(special)
        every = -(-survey.characters // TRAINED_ON)
        jobs = _jobs((("train", *part) for part in parts), last_break)
        texts = (text for i, (_, job) in enumerate(jobs) if i % every == 0 for text, _ in job)
        return BPETokenizer.train(_with_few_words(texts), self.vocabulary.vocab_size, special)


def _with_few_words(texts: Iterable[str]) -> Iterator[str]:
    """The first of texts, as far as they have no more than about TRAINED_WORDS different words together."""
    words = set()
    for text in texts:
        yield text
        words.update(re.findall(r"\w+", text))
        if len(words) > TRAINED_WORDS:
            return


def _builder(vocabulary: Vocabulary):
    if vocabulary.tokenizer == "char":
        return _Characters()
    return _Words(vocabulary) if vocabulary.tokenizer == "word" else _BytePairs(vocabulary)


# ----------------------------------------------------------------------------------------------------------------------
# split


def choose(survey: Survey, val_fraction: float, least: int = LEAST_DOCUMENTS) -> Split:
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


def _route(batches, split: Split, between_words: bool = False) -> Iterator[tuple[str, str, bool]]:
    """(train or val, text, whether its document ends with it) for all of batches; between_words: no word is cut."""
    place, bucket, before = 0, None, "\n"
    cut = split.cut
    for texts, whole in batches:
        for i, text in enumerate(texts):
            ends = whole or i < len(texts) - 1
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


class _Sampled:
    """Hands on what is routed, and keeps the beginning of val."""

    def __init__(self, routed):
        self.routed, self.sample = routed, ""

    def __iter__(self):
        for name, text, ends in self.routed:
            if name == "val" and not self.sample.strip():
                self.sample = text[:SAMPLE]
            yield name, text, ends


# ----------------------------------------------------------------------------------------------------------------------
# encoding


def _n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pool(in_threads: bool, tokenizer: Tokenizer | None = None):
    """Threads, or processes that know tokenizer."""
    if in_threads:
        return ThreadPoolExecutor(_n_cores())
    return ProcessPoolExecutor(min(_n_cores(), 8), initializer=_receive, initargs=(tokenizer,))


def _end_with_parent():
    """On Linux, have the system end this process when the one that started it is killed."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG of sys/prctl.h


def _jobs(routed, cut: Callable[[str], int]) -> Iterator[tuple[str, list[tuple[str, bool]]]]:
    """(split, [(text, whether its document ends with it)]): about JOB characters that are encoded one by one."""
    jobs, sizes, rest = {name: [] for name in SPLITS}, dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, "")
    for name, text, ends in routed:
        text, start = rest[name] + text, 0
        while not ends or len(text) - start > JOB:
            n = cut(text[start : start + JOB]) or cut(text[start:])
            if not n:
                break
            jobs[name].append((text[start : start + n], False))
            start, sizes[name] = start + n, sizes[name] + n
            if sizes[name] >= JOB:
                yield name, jobs[name]
                jobs[name], sizes[name] = [], 0
        rest[name] = "" if ends else text[start:]
        _check_length(len(rest[name]))
        if ends:
            jobs[name].append((text[start:], True))
            sizes[name] += len(text) - start
        if sizes[name] >= JOB:
            yield name, jobs[name]
            jobs[name], sizes[name] = [], 0
    for name in SPLITS:
        yield name, [*jobs[name], (rest[name], False)]


def _encode(tokenizer: Tokenizer, end_id: int | None, parts: list[tuple[str, bool]]) -> Encoded:
    """The ids of parts; end_id stands behind each document."""
    n_bytes = sum(len(text) if text.isascii() else len(text.encode("utf-8")) for text, _ in parts)
    return Encoded(
        tokenizer.encode_parts(parts, end_id),
        sum(len(text) for text, _ in parts),
        n_bytes,
        loses=any(tokenizer.is_lossy(text) for text, _ in parts),
    )


_tokenizer: Tokenizer | None = None  # of a process that encodes


def _receive(tokenizer: Tokenizer | None):
    global _tokenizer
    _tokenizer = tokenizer
    _end_with_parent()


def _encode_here(end_id: int | None, parts):
    return _encode(_tokenizer, end_id, parts)


def encode_all(routed, tokenizer: Tokenizer, several: bool):
    """(split, Encoded) for everything routed, in order."""
    end_id = tokenizer.end_id if several else None
    waiting = deque()
    with _pool(tokenizer.in_threads, tokenizer) as pool:
        try:
            for name, parts in _jobs(routed, tokenizer.cut):
                waiting.append(
                    (
                        name,
                        pool.submit(_encode, tokenizer, end_id, parts)
                        if tokenizer.in_threads
                        else pool.submit(_encode_here, end_id, parts),
                    )
                )
                if len(waiting) > 2 * _n_cores():
                    name, done = waiting.popleft()
                    yield name, done.result()
            for name, done in waiting:
                yield name, done.result()
        finally:
            pool.shutdown(cancel_futures=True)


class progress_bar:
    """Called with bytes that were read; a bar on a terminal."""

    def __init__(self, total: int, quiet: bool):
        self.total, self.quiet, self.bar = total, quiet or not sys.stderr.isatty(), None

    def __enter__(self):
        if not self.quiet:
            from tqdm import tqdm

            self.bar = tqdm(total=self.total, unit="B", unit_scale=True, leave=False)
        return self

    def __exit__(self, *error):
        if self.bar:
            self.bar.close()

    def __call__(self, n: int):
        if self.bar:
            self.bar.update(n)
