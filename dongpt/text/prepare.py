"""Prepare documents for training: build a vocabulary, split the documents, encode them, and write a data folder.

The documents are read twice, first for statistics and then for encoding on all cores. Training a BPE tokenizer takes a
third pass. Memory use does not depend on the size of the corpus. Long documents are cut only at token boundaries
(see Tokenizer.find_cut), so the ids are the same as for whole documents. An interrupted preparation can be resumed with
the same documents and settings. Progress is saved about every CHARS_PER_SAVE characters.

    prepared = prepare("data/mytext", Files(["mytext.txt"]), Vocabulary("bpe", vocab_size=1024))
    prepared = prepare("data/openwebtext", Files(paths, raw=True), Vocabulary("gpt2"), 0.0005, seed=2357)
"""

import contextlib
import functools
import hashlib
import json
import math
import multiprocessing
import os
import sys
import threading
import zlib
from collections import Counter, deque
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Annotated, Any, Callable, Iterable, Iterator, Literal, Protocol, Sequence

import numpy as np

from configurator import UserError
from dongpt.log import progress_bar
from dongpt.text.bins import SPLITS, BinWriter, EncodedText, PreparedData, open_data
from dongpt.text.documents import BLANK, Files, Progress, Texts
from dongpt.text.hub import HubText
from dongpt.text.survey import Survey
from dongpt.text.template import Segment, Template, merge_segments
from dongpt.text.tokenizers import (
    END,
    MAX_VOCAB_SIZE,
    UNKNOWN,
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

CHARS_PER_JOB = 2**19  # encoded by one core at a time
CHARS_PER_SAVE = 2**26  # between two saves; a killed process loses about this much work
MAX_PENDING_CHARS = 2**24  # held in memory while searching for a position to cut
HASHED_PREFIX_CHARS = 2**16  # at the start of a document; they determine its bucket
SAMPLE_CHARS = 1000  # used to check that decoding restores the text
MIN_DOCUMENTS = 20  # with fewer documents, the validation set is the end of the text
NUM_BUCKETS = 2**16  # documents are hashed into buckets; some buckets form the validation set
BPE_TRAIN_CHARS = 2**25  # maximum for training a BPE tokenizer; sampled evenly from a longer text
MIN_THREADED_BYTES = 2**14  # hashing fewer takes less time than handing them to another thread
MAX_WORDS = 2**20  # maximum number of distinct words
WORD_RULES = 2  # changes whenever new vocabularies split text differently, so that no preparation resumes across it

TokenizerKind = Literal["char", "word", "bpe", "gpt2"]
DocumentContent = Any  # text, or a list of segments with loss masks
SplitPiece = tuple[str, DocumentContent, bool]  # (train or val, content, whether it ends its document)
Pieces = Iterator[SplitPiece]
EncodeJob = list[SplitPiece]  # pieces that are encoded together


@dataclass(frozen=True)
class Vocabulary:
    """The type of tokenizer and the settings for building its vocabulary."""

    tokenizer: TokenizerKind = "char"  # characters, words, BPE trained on your text, or GPT-2's BPE
    vocab_size: int = 4096  # bpe: number of tokens, including special tokens
    min_count: Annotated[int, ">=", 1] = 1  # word: replace words that occur less often than this with <unk>
    lower: bool = False  # word: convert the text to lowercase
    spaces_alone: bool = False  # word: make each whitespace character a separate token
    special: str = ""  # special tokens, separated by commas, such as "<|summarize|>,<|sentiment|>"

    def names(self) -> list[str]:
        """Return the names of the special tokens."""
        return [name.strip() for name in self.special.split(",") if name.strip()]


TOKENIZER_OF_OPTION = {"vocab_size": "bpe", "min_count": "word", "lower": "word", "spaces_alone": "word"}


def warn_unused_options(vocabulary: Vocabulary, given_keys: Iterable[str]):
    """Print a warning for each given option that has no effect with the chosen tokenizer."""
    for key in given_keys:
        if TOKENIZER_OF_OPTION.get(key, vocabulary.tokenizer) != vocabulary.tokenizer:
            owner = TOKENIZER_OF_OPTION[key]
            print(f"--{key} has no effect with --tokenizer={vocabulary.tokenizer}, only with --tokenizer={owner}")


@dataclass
class CorpusStats:
    """Document statistics collected in the first pass."""

    documents: int = 0
    characters: int = 0
    num_skipped: int = 0  # number of records without content
    bucket_chars: list[int] = field(default_factory=lambda: [0] * NUM_BUCKETS)  # characters per bucket


TextSource = Files | Texts | HubText


class SegmentSource(Protocol):
    """Documents that consist of segments, only some of which count toward the loss."""

    @property
    def files(self) -> TextSource:
        """The files that contain the documents."""

    def read_segments(self, on_progress: Progress, digest=None) -> Iterator[tuple[int, list[Segment]]]:
        """Yield (a number that selects the split, segments) for each document. Skipped documents have no segments."""


Documents = TextSource | SegmentSource


def prepare(
    folder: str,
    documents: Documents,
    vocabulary: Vocabulary,
    val_fraction: float = 0.1,
    source: str = "",
    sha256: str = "",
    quiet: bool = False,
    shard_tokens: int = 0,
    val_buckets: np.ndarray | None = None,
    seed: int | None = None,
    specials: Sequence[str] = (),
    template: Template | None = None,
    val_documents: TextSource | None = None,
) -> PreparedData | None:
    """Write train.bin (or train_000.bin, ... with shard_tokens), val.bin and meta.json to folder.

    No existing file is replaced until all new files are complete. Returns None if folder already contains the result.
    val_buckets (NUM_BUCKETS,) bool selects the validation documents by bucket. By default, whole documents are selected
    by hash, or the end of the text is used if there are few documents (see choose_val_buckets). With a seed, documents
    are drawn at random as in nanoGPT's OpenWebText script, and val.bin equals nanoGPT's byte for byte. This requires
    Files or HubText, and GPT-2's vocabulary. If val_documents are given, they form the validation set, and all other
    documents are used for training. With val_fraction=0, val.bin is empty.

    Documents that consist of segments are never split. They also get loss masks, which are 1 for the segments that
    count toward the loss. specials become special tokens, and template is stored with the tokenizer. source and sha256
    describe the origin of the text. By default, sha256 is the hash of the text. Raises UserError if the text is too
    short to split, if the vocabulary is too large for uint16, or if reading, encoding or writing fails.
    """
    files = documents if isinstance(documents, TextSource) else documents.files
    texts = [files, val_documents] if val_documents else [files]
    fingerprint = [text.fingerprint() for text in texts]
    settings = (vocabulary, val_fraction, shard_tokens, specials, template)
    plan = (documents, val_documents, fingerprint, *settings, WORD_RULES)
    plan_sha256 = _sha256(repr(plan))
    if seed is not None:
        assert isinstance(documents, (Files, HubText)) and vocabulary.tokenizer == "gpt2"
        plan_sha256 = _random_split_hash(documents, val_fraction, seed, shard_tokens)
    num_passes = 1 if seed is not None else 3 if vocabulary.tokenizer == "bpe" else 2
    with (
        BinWriter(folder, shard_tokens=shard_tokens, fingerprint=plan_sha256, reorder_val=seed is not None) as writer,
        contextlib.ExitStack() as stack,
    ):
        if seed is not None:
            with contextlib.suppress(UserError):
                if open_data(folder)[0].get("plan_sha256") == plan_sha256:
                    return None
        n_bytes = num_passes * sum(text.size for text in texts)
        bar = stack.enter_context(progress_bar(n_bytes, unit="B", desc="preparing: ", quiet=quiet, leave=False))
        tokenizer: Tokenizer
        if isinstance(documents, (Files, HubText)) and seed is not None:
            tokenizer, num_skipped = GPT2Tokenizer(), 0
            pieces, val_order, meta = _draw_split(documents, val_fraction, seed, writer.state["documents"], bar.update)
            meta["plan_sha256"] = plan_sha256
        else:
            survey = Survey(_special_names(vocabulary, specials), isinstance(documents, (Files, HubText)))
            tokenizer, pieces, meta = _scan_text(
                documents, val_documents, vocabulary, val_fraction, val_buckets, specials, survey, bar.update
            )
            for line in () if quiet else survey.lines():
                print(line)
            val_order, num_skipped = None, writer.state["documents"]
        tokenizer.template, writer.tokenizer = template, tokenizer
        end_id = tokenizer.end_id if meta["documents"] > len(texts) else None
        sample_splits = ("val",) if seed is None and documents is files and val_fraction else SPLITS
        sample, has_starts = _encode_and_write(writer, tokenizer, pieces, end_id, sample_splits, num_skipped)
        if [text.fingerprint() for text in texts] != fingerprint:
            problem = "the text changed while it was being read"
            raise UserError(f"{problem}: run this command again when no program is writing to it")
        ids = writer.first_ids()
        if documents is not files or seed is not None:
            has_starts = tokenizer.end_id in ids
        if tokenizer.start_id == tokenizer.end_id and not has_starts and len(ids):
            tokenizer.set_start(choose_start_id(tokenizer, ids, documents is not files))
        prepared = writer.finish({"source": source, **meta, "sha256": sha256 or meta["sha256"]}, val_order)
        return replace(prepared, sample=sample)


class _ThreadedSHA256:
    """The SHA-256 of data that another thread hashes while the next data are read."""

    def __init__(self):
        self.sha256, self.pool = hashlib.sha256(), ThreadPoolExecutor(1)
        self.last_update: Future | None = None

    def update(self, data: bytes):
        if self.last_update:
            self.last_update.result()
        if len(data) < MIN_THREADED_BYTES:
            self.sha256.update(data)
        else:
            self.last_update = self.pool.submit(self.sha256.update, data)

    def hexdigest(self) -> str:
        self.pool.shutdown()
        return self.sha256.hexdigest()


def _special_names(vocabulary: Vocabulary, specials: Sequence[str]) -> list[str]:
    """Return all names that a text may use for special tokens, even if the vocabulary has no such token."""
    unknown = [UNKNOWN] if vocabulary.tokenizer == "word" else []
    return list(dict.fromkeys([END, *unknown, *specials, *vocabulary.names()]))


def _scan_text(
    documents: Documents,
    val_documents: TextSource | None,
    vocabulary: Vocabulary,
    val_fraction: float,
    val_buckets: np.ndarray | None,
    specials: Sequence[str],
    survey: Survey,
    on_progress: Progress,
) -> tuple[Tokenizer, Pieces, dict]:
    """Make a first pass over the documents and return (tokenizer, pieces, entries for meta.json)."""
    stats, val_stats, digest = CorpusStats(), CorpusStats(), _ThreadedSHA256()
    has_segments = not isinstance(documents, TextSource)
    no_val, min_documents = np.zeros(NUM_BUCKETS, dtype=bool), 2 if has_segments else MIN_DOCUMENTS

    def read(is_val: np.ndarray, stats: CorpusStats, val_stats: CorpusStats, *progress) -> Pieces:
        yield from _read_pieces(documents, is_val, stats, *progress)
        if val_documents:
            yield from _read_pieces(val_documents, ~no_val, val_stats, *progress)

    def survey_pieces() -> Pieces:
        for split, text, is_end in _text_pieces(read(no_val, stats, val_stats, on_progress, digest)):
            survey.add(text, is_end)
            yield split, text, is_end

    counts = _count_symbols(survey_pieces(), vocabulary)
    n_blank = sum(text.n_left_out[BLANK] for text in (documents, val_documents) if isinstance(text, (Files, HubText)))
    if not stats.characters or val_documents and not val_stats.characters:
        name = "validation text" if stats.characters else "text"
        raise UserError(f"the {name} is blank: use an input file that contains text")
    special = [*specials, *(name for name in vocabulary.names() if name not in specials)]
    is_many = isinstance(documents, TextSource) and stats.documents > 1 and not documents.has_separators
    if is_many or val_documents and val_stats.documents > 1 and not val_documents.has_separators:
        special += [END] * (END not in special)
    train_pieces = _text_pieces(_read_pieces(documents, no_val, CorpusStats(), on_progress))
    tokenizer = _build_tokenizer(vocabulary, special, counts, stats.characters, train_pieces)
    split: np.ndarray | int = no_val
    split_method = "documents"
    if val_documents or val_fraction == 0:
        split_method = "given" if val_documents else "none"
    elif val_buckets is not None:
        split = val_buckets
    else:
        split = choose_val_buckets(stats, val_fraction, min_documents)
    pieces = read(no_val if isinstance(split, int) else split, CorpusStats(), CorpusStats(), on_progress)
    if isinstance(split, int) and not has_segments:
        split_method = "position"
        pieces = _split_by_position(pieces, split, vocabulary.tokenizer == "word")
    elif isinstance(split, int):
        problem = f"{stats.documents:,} records cannot be split so as to validate on about {val_fraction} of the text"
        raise UserError(f"{problem}: use more records, or change --val_fraction")
    n_skipped = stats.num_skipped + n_blank
    meta = {"sha256": digest.hexdigest(), "documents": stats.documents + val_stats.documents, "split": split_method}
    return tokenizer, pieces, meta | ({"left_out": n_skipped} if has_segments or n_skipped else {})


def _read_pieces(documents: Documents, is_val: np.ndarray, stats: CorpusStats, *progress) -> Pieces:
    """Yield all documents and add them to stats. is_val (NUM_BUCKETS,) selects the validation buckets."""
    contents: Iterable[tuple[int | None, DocumentContent, bool]]
    if isinstance(documents, TextSource):
        contents = ((None, text, is_end) for text, is_end in documents.read_documents(*progress))
    else:
        contents = ((number, segments, True) for number, segments in documents.read_segments(*progress))
    bucket, splits = None, [SPLITS[i] for i in is_val.tolist()]  # bucket of the current document; split by bucket
    for number, content, is_end in contents:
        if content == []:
            stats.num_skipped += 1
            continue
        if bucket is None:
            bucket = document_bucket(content) if number is None else number % NUM_BUCKETS
        n_characters = _n_characters(content)
        stats.documents += is_end
        stats.characters += n_characters
        stats.bucket_chars[bucket] += n_characters
        yield splits[bucket], content, is_end
        bucket = None if is_end else bucket


def _random_split_hash(files: Files | HubText, val_fraction: float, seed: int, shard_tokens: int) -> str:
    """Return a hash of everything that determines a seeded split. It is stored in meta.json and must stay stable."""
    stats = [[os.path.basename(path), *stat] for path, stat in zip(files.paths, files.fingerprint())]
    keys = {"files": stats, "field": files.field, "encoding": files.encoding, "tokenizer": GPT2Tokenizer().to_dict()}
    return _sha256(json.dumps({**keys, "val_fraction": val_fraction, "seed": seed, "shard_tokens": shard_tokens}))


def _draw_split(
    files: Files | HubText, val_fraction: float, seed: int, num_done: int, on_progress: Progress
) -> tuple[Pieces, np.ndarray, dict]:
    """Return (pieces after the first `num_done` documents, order of validation documents, entries for meta.json)."""
    counts = [files.count(path) for path in files.paths]
    n_documents, val_indices = sum(counts), draw(sum(counts), val_fraction, seed)
    if not 0 < len(val_indices) < n_documents:
        problem = f"{n_documents:,} documents cannot be split into training and validation sets"
        raise UserError(f"{problem}: use more files or records, or data/prepare.py, which can split a single document")
    if num_done:
        print(f"continuing an interrupted preparation after document {num_done:,} of {n_documents:,}")
    is_val = np.zeros(n_documents, dtype=bool)
    is_val[val_indices] = True
    meta = {"sha256": "", "documents": n_documents, "split": "drawn", "seed": seed}
    return _documents_after(num_done, files, counts, is_val, on_progress), np.argsort(np.argsort(val_indices)), meta


def draw(n_documents: int, val_fraction: float, seed: int) -> np.ndarray:
    """Draw the indices of the validation documents, in the same order as Hugging Face's train_test_split."""
    return np.random.default_rng(seed).permutation(n_documents)[: math.ceil(val_fraction * n_documents)]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# counts and vocabulary


def document_bucket(text: str) -> int:
    """Return the bucket of a document that starts with text, ignoring leading and trailing whitespace."""
    return zlib.crc32(text[:HASHED_PREFIX_CHARS].strip().encode("utf-8")) % NUM_BUCKETS


def _plain_texts(content: DocumentContent) -> list[str]:
    """Return the texts in a document, without special tokens."""
    return [content] if isinstance(content, str) else [part.text for part in content if not part.is_special]


def _n_characters(content: DocumentContent) -> int:
    return len(content) if isinstance(content, str) else sum(map(len, _plain_texts(content)))


def _text_pieces(pieces: Iterable[SplitPiece]) -> Pieces:
    """Yield the text of each piece, without special tokens."""
    return ((split, text, is_end) for split, content, is_end in pieces for text in _plain_texts(content))


def _count_symbols(pieces: Pieces, vocabulary: Vocabulary) -> Counter[str]:
    """Count the words in all pieces, or collect their distinct characters. The result is empty for BPE."""
    counts: Counter[str] = Counter()
    if vocabulary.tokenizer == "word":
        count_words = functools.partial(_count_words, vocabulary.lower, vocabulary.spaces_alone)
        for _, words in _map_in_order(count_words, _make_jobs(pieces, last_word_break), use_threads=False):
            counts.update(words)
            if len(counts) > MAX_WORDS:
                raise UserError(f"the text has more than {MAX_WORDS:,} different words: use --tokenizer=bpe")
    texts = (text for _, text, _ in pieces)
    if vocabulary.tokenizer == "char":
        counts.update(distinct_characters(texts))
    for _ in texts:  # for BPE, this only reads all pieces, which updates their statistics
        pass
    return counts


def distinct_characters(texts: Iterable[str]) -> set[str]:
    """Return the characters that occur in texts. This is several times as fast as set(text)."""
    is_present, known_ascii = np.zeros(sys.maxunicode + 1, dtype=bool), b""
    for text in texts:
        if others := text.encode("utf-8").translate(None, known_ascii).decode("utf-8"):
            is_present[np.frombuffer(others.encode("utf-32-le"), np.uint32)] = True
            known_ascii = bytes(np.flatnonzero(is_present[:128]).tolist())
    return {*map(chr, np.flatnonzero(is_present))}


def _count_words(lower: bool, spaces_alone: bool, job: EncodeJob) -> Counter[str]:
    """Count the words in a job."""
    return Counter(chain.from_iterable(split_words(text, lower, spaces_alone) for _, text, _ in job))


def _build_tokenizer(
    vocabulary: Vocabulary, special: list[str], counts: Counter[str], n_characters: int, pieces: Pieces
) -> Tokenizer:
    """Build the tokenizer from the counts that _count_symbols returned. A BPE tokenizer is trained on pieces."""
    kind, limit_note = vocabulary.tokenizer, f"but uint16 files allow at most {MAX_VOCAB_SIZE:,}: use --tokenizer=bpe"
    tokenizer: Tokenizer
    if kind == "char":
        tokenizer = CharTokenizer("".join(sorted(counts)), special)
    elif kind == "word":
        limit_note += ", or increase --min_count"
        words = sorted(word for word, count in counts.items() if count >= vocabulary.min_count)
        if not words:
            raise UserError(f"no word occurs at least {vocabulary.min_count:,} times: use a smaller --min_count")
        if len(words) >= MAX_VOCAB_SIZE:
            raise UserError(f"the text has {len(words):,} different words, {limit_note}")
        tokenizer = WordTokenizer(words, special, vocabulary.lower, vocabulary.spaces_alone)
    else:
        special = [name for name in special if name != END]  # already part of every BPE tokenizer
        if kind == "gpt2":
            tokenizer = GPT2Tokenizer(special)
        else:
            stride = -(-n_characters // BPE_TRAIN_CHARS)
            jobs = islice(_make_jobs(pieces, last_break), 0, None, stride)
            texts = (text for job in jobs for _, text, _ in job)
            tokenizer = BPETokenizer.train(texts, vocabulary.vocab_size, special)
    if tokenizer.vocab_size > MAX_VOCAB_SIZE:
        raise UserError(f"the vocabulary has {tokenizer.vocab_size:,} entries, {limit_note}")
    return tokenizer


# ----------------------------------------------------------------------------------------------------------------------
# splitting into training and validation sets


def choose_val_buckets(stats: CorpusStats, val_fraction: float, min_documents: int = MIN_DOCUMENTS) -> np.ndarray | int:
    """Return the validation buckets (NUM_BUCKETS,) bool, or the number of training characters for a split by position.

    The split is by document if there are at least min_documents documents and the result is within a factor of 2 of
    val_fraction. Documents are selected in order of their hashes, which is unrelated to their order in the text.
    """
    target, sizes = val_fraction * stats.characters, np.array(stats.bucket_chars)
    in_val, total = np.zeros(NUM_BUCKETS, dtype=bool), 0
    for bucket in np.flatnonzero(sizes):
        if total + sizes[bucket] <= target:
            in_val[bucket] = True
            total += sizes[bucket]
    if total < target / 2:  # every remaining bucket is larger than half the target
        sizes[in_val | (sizes == 0)] = np.iinfo(np.int64).max
        in_val[:], total = False, sizes.min()
        in_val[sizes.argmin()] = True
    if stats.documents >= min_documents and target / 2 <= total <= 2 * target and total < stats.characters:
        return in_val
    val_start = int(stats.characters * (1 - val_fraction))  # the same position as in nanoGPT's scripts
    if not 2 <= val_start <= stats.characters - 2:  # a loss needs an input token and a target
        problem = f"the text of {stats.characters:,} characters is too short to split with val_fraction={val_fraction}"
        raise UserError(f"{problem}: use a longer text, or another --val_fraction")
    return val_start


def _nearest_word_break(text: str, position: int) -> int:
    """Return position if it is a word break, or else the last break before it, the first one after it, or len(text)."""
    if is_word_break(text[position - 1], text[position]):
        return position
    previous_break = last_word_break(text[:position])  # go back one more break, so that more than this word follows
    return (
        last_word_break(text[:previous_break])
        or previous_break
        or next((i for i in range(position + 1, len(text)) if is_word_break(text[i - 1], text[i])), len(text))
    )


def _split_by_position(pieces: Iterable[SplitPiece], val_start: int, at_word_break: bool) -> Pieces:
    """Split pieces into training and validation text at character val_start, or at a nearby word break."""
    position, previous_char = 0, "\n"
    for _, text, is_end in pieces:
        n = min(max(val_start - position, 0), len(text))
        if at_word_break and position + n == val_start and n < len(text):
            n = _nearest_word_break(previous_char + text, n + len(previous_char)) - len(previous_char)
            val_start = position + n
        position += len(text)
        previous_char = text[-1:] or previous_char
        if n:
            yield "train", text[:n], is_end and n == len(text)
        if n < len(text) or not text:
            yield "val" if position > val_start else "train", text[n:], is_end


def _documents_after(
    num_done: int, files: Files | HubText, counts: list[int], is_val: np.ndarray, on_progress: Progress
) -> Pieces:
    """Yield all documents after the first `num_done`. is_val[index] determines the split of each document."""
    end_index = 0
    for path, count in zip(files.paths, counts):
        index, end_index = end_index, end_index + count
        if end_index <= num_done:
            continue
        for text, is_end in files.read_file(path, on_progress):
            if num_done <= index < end_index:
                yield SPLITS[int(is_val[index])], text, is_end
            index += is_end
        if index != end_index:
            raise UserError(f"{path} changed while it was being read: run this again when no program is writing to it")


def choose_start_id(tokenizer: Tokenizer, ids: np.ndarray, has_segments: bool) -> int:
    """Return the id to start samples with if no text follows <|endoftext|> in ids, the start of the training set.

    For segments, it is the id that conversations begin with. For text, it is a newline, as for character tokenizers,
    or the most frequent id if there are no newlines.
    """
    if has_segments:
        return int(ids[0])
    (newline_id, *_) = tokenizer.encode("\n", unknown="skip") or [tokenizer.start_id]
    return newline_id if newline_id in ids else int(np.bincount(ids).argmax())


# ----------------------------------------------------------------------------------------------------------------------
# encoding


def _encode_and_write(
    writer: BinWriter, tokenizer: Tokenizer, pieces: Pieces, end_id: int | None, sample_splits: tuple, num_skipped: int
) -> tuple[str, bool]:
    """Encode and write all pieces after the first `num_skipped` documents. end_id, if any, follows each document.

    The state is saved after every CHARS_PER_SAVE characters. Returns the start of the first text in sample_splits, and
    whether any text follows end_id in the training set.
    """
    documents, sample, size = writer.state["documents"], "", 0
    has_end = has_starts = False

    def remaining() -> Pieces:
        nonlocal sample, num_skipped, has_end, has_starts
        for split, content, is_end in pieces:
            if split == "train" and end_id is not None:
                has_starts, has_end = has_starts or has_end, has_end or is_end
            if split in sample_splits and not sample.strip():
                sample = next(iter(_plain_texts(content)), "")[:SAMPLE_CHARS]
            if num_skipped == 0:
                yield split, content, is_end
            else:
                num_skipped -= is_end

    for job, encoded in encode_pieces(remaining(), tokenizer, end_id):
        for split, encoded_split in encoded:
            writer.add(split, encoded_split)
            size += encoded_split.n_characters
        documents += sum(is_end for _, _, is_end in job)
        if size >= CHARS_PER_SAVE and job[-1][2]:
            writer.save(documents)
            size = 0
    return sample, has_starts


def encode_pieces(pieces: Pieces, tokenizer: Tokenizer, end_id: int | None) -> Iterator[tuple[EncodeJob, list]]:
    """Yield (job, [(split, encoded text), ...]) for all pieces, in order."""
    encode = functools.partial(_encode, tokenizer, end_id)
    return _map_in_order(encode, _make_jobs(pieces, tokenizer.find_cut), tokenizer.use_threads)


def _map_in_order(function: Callable, jobs: Iterable[EncodeJob], use_threads: bool) -> Iterator[tuple[EncodeJob, Any]]:
    """Yield (job, function(job)) for all jobs in order, using threads or processes on all cores."""
    jobs, cores = iter(jobs), _n_cores()
    first_jobs = list(islice(jobs, 2))
    if len(first_jobs) == 1:  # starting a pool takes longer than one job
        yield first_jobs[0], function(first_jobs[0])
        return
    pool: Executor = ThreadPoolExecutor(cores)
    if not use_threads:  # send the function once rather than with every job, as it may hold a large vocabulary
        from concurrent.futures import ProcessPoolExecutor  # imported here because train.py rarely needs it

        pool = ProcessPoolExecutor(min(cores, 8), initializer=_init_worker, initargs=(function,))
        function = _call_worker_function
    pending: deque = deque()
    with pool:
        try:
            for job in chain(first_jobs, jobs):
                pending.append((job, pool.submit(function, job)))
                if len(pending) > 2 * cores:
                    job, future = pending.popleft()
                    yield job, future.result()
            yield from ((job, future.result()) for job, future in pending)
        finally:
            pool.shutdown(cancel_futures=True)


def _n_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_worker_function: Callable | None = None  # set in each worker process


def _init_worker(function: Callable):
    """Store the function, and make this process exit when its parent exits or is killed."""
    global _worker_function
    _worker_function = function
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait_and_exit():
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_and_exit, daemon=True).start()


def _call_worker_function(job: EncodeJob) -> Any:
    assert _worker_function is not None
    return _worker_function(job)


def _make_jobs(pieces: Iterable[SplitPiece], find_cut: Callable[[str], int]) -> Iterator[EncodeJob]:
    """Group pieces into jobs of about CHARS_PER_JOB characters.

    After every CHARS_PER_SAVE characters, a job ends at the end of a document, so that the state can be saved.
    """
    job: EncodeJob = []
    size = unsaved_chars = 0
    for split, content, is_end in _cut_long_texts(pieces, find_cut):
        job.append((split, content, is_end))
        n = _n_characters(content)
        size, unsaved_chars = size + n, unsaved_chars + n
        if size >= CHARS_PER_JOB or (is_end and unsaved_chars >= CHARS_PER_SAVE):
            unsaved_chars = 0 if is_end and unsaved_chars >= CHARS_PER_SAVE else unsaved_chars
            yield job
            job, size = [], 0
    if job:
        yield job


def _cut_long_texts(pieces: Iterable[SplitPiece], find_cut: Callable[[str], int]) -> Pieces:
    """Yield all pieces, with long texts cut at positions that find_cut allows."""
    previous_split, pending_text = "train", ""  # of the current document
    for split, content, is_end in chain(pieces, [("", "", False)]):
        if pending_text and split != previous_split:
            yield previous_split, pending_text, False
            pending_text = ""
        if not isinstance(content, str):
            yield split, merge_segments(content), is_end
            continue
        text, start, previous_split = pending_text + content, 0, split
        while not is_end or len(text) - start > CHARS_PER_JOB:
            n = find_cut(text[start : start + CHARS_PER_JOB]) or find_cut(text[start:])
            if not n:
                break
            yield split, text[start : start + n], False
            start += n
        pending_text = "" if is_end else text[start:]
        if len(pending_text) > MAX_PENDING_CHARS:
            problem = f"the text has a run of {len(pending_text):,} characters without a word break"
            raise UserError(f"{problem}, too many for this tokenizer: use --tokenizer=char, or insert line breaks")
        if is_end:
            yield split, text[start:], True


def _encode(tokenizer: Tokenizer, end_id: int | None, job: EncodeJob) -> list[tuple[str, EncodedText]]:
    """Encode a job and return the result for each split. end_id follows each document of plain text."""
    results = []
    for split in {split: None for split, _, _ in job}:
        parts = [(content, is_end) for piece_split, content, is_end in job if piece_split == split]
        texts = [text for content, _ in parts for text in _plain_texts(content)]
        characters, n_bytes = sum(map(len, texts)), sum(len(text.encode("utf-8")) for text in texts)
        mask, n_predicted_bytes, is_lossy = None, 0, any(map(tokenizer.is_lossy, texts))
        if isinstance(parts[0][0], str):
            ids = tokenizer.encode_parts(parts, end_id)
        else:
            segments, encoded = [part for content, _ in parts for part in content], iter(tokenizer.encode_texts(texts))
            special_ids = {name: np.array([i], np.uint16) for name, i in tokenizer.specials.items()}
            arrays = [special_ids[part.text] if part.is_special else next(encoded) for part in segments]
            ids, mask = np.concatenate(arrays), np.repeat([part.in_loss for part in segments], [*map(len, arrays)])
            n_predicted_bytes = sum(len(s.text.encode("utf-8")) for s in segments if s.in_loss and not s.is_special)
        results.append((split, EncodedText(ids, characters, n_bytes, mask, n_predicted_bytes, is_lossy)))
    return results
