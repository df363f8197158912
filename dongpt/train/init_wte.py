"""Initialize a model's token embedding with pretrained word vectors.

    vectors = read_vectors("GoogleNews-vectors-negative300.bin", all_spellings(tokenizer))  # {"food": (300,), ...}
    table = vector_table(tokenizer, vectors)            # (vocab_size, 300), zeros for tokens without a vector
    save_table("data/don_word/word2vec.npy", table)
    line = init_embedding(model.transformer.wte.weight, "data/don_word/word2vec.npy", tokenizer.vocab_size)

Words are looked up without their leading space. If a word has no vector, other capitalizations and Unicode normal forms
are tried, so that all spellings of a word can share one vector.

Supported formats: word2vec's text format, which fastText also uses for its .vec files, word2vec's binary format (see
distance.c in code.google.com/archive/p/word2vec), and GloVe's text format, which has no header. A file of vectors may
be compressed, and an archive may contain one such file.
"""

import codecs
import io
import re
import unicodedata
from collections import Counter
from functools import partial
from typing import Any, BinaryIO, Iterator

import numpy as np
import torch

from configurator import UserError
from dongpt.text.archives import open_file
from dongpt.text.compressed import CHUNK_BYTES, file_suffixes
from dongpt.text.sources import write_atomically
from dongpt.text.tokenizers import WordTokenizer

INIT_STD = 0.02  # standard deviation of a new token embedding, as in GPT-2
MAX_VECTOR_WIDTH = 2**14  # maximum length of a vector; a header with a greater length is rejected
MAX_NUMBER = 1e4  # greater values are not from a word vector but from a file that is read incorrectly
MAX_LINE_BYTES = 64 * MAX_VECTOR_WIDTH
MAX_WORD_BYTES = 2**12
CUT_WORD_BYTES = 90  # word2vec cuts off longer words, sometimes within a character
VECTOR_SUFFIXES = (".txt", ".vec", ".bin")  # of members of an archive
NUM_CHECKED_ROWS = 256  # rows of a binary file that are checked together, or words of a text file beyond ASCII
SAMPLE_BYTES, SAMPLE_ROWS = 2**18, 100  # maximum used to recognize the format
WORD_AND_VALUE = re.compile(r"\S+\s+[-+]?\d*(\.\d|e[-+]\d)")  # such as "horse 0.5", but not "No. 1"
CONTROL_CHARACTERS = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


# ----------------------------------------------------------------------------------------------------------------------
# vector files


def read_vectors(path: str, words: set[str]) -> dict[str, np.ndarray]:
    """Return a file's vectors for the given words, {word: (width,) float32}. A repeated word keeps its first vector.

    The file is streamed, so that memory use depends only on the number of words. In a text file, rows of other words
    may have any content. Unusable rows are skipped there, and their number is printed. Raises UserError if the file
    cannot be read, is damaged, has none of the words, or is unusable in most of these rows, or any in a binary file.
    """
    if path.endswith(".npy"):
        raise UserError(f"{path} is an output of data/word2vec.py: pass a word2vec or GloVe file")
    vectors: dict[str, np.ndarray] = {}
    problems, num_repeated = [], 0
    with open_file(path, lambda name: file_suffixes(name)[0] in VECTOR_SUFFIXES) as file:
        width, rows = _open_rows(file, path, words)
        for number, word, values in rows:
            if word in vectors:
                num_repeated += 1
                continue
            vector = np.frombuffer(values, "<f4") if isinstance(values, bytes) else _parse_floats(values or [])
            problem = "" if isinstance(values, bytes) else _vector_problem(vector, width)
            if values is None:
                problem = "has no line end, so it may be cut off"
            if vector is not None and not problem:
                vectors[word] = vector.astype(np.float32)
                continue
            problems.append(f"row {number:,} for {word!r} {problem}")
    if len(problems) > len(vectors):
        n_rows = (
            f"{len(problems):,} of {len(problems) + len(vectors):,} rows for words in the vocabulary cannot be used"
        )
        raise UserError(f"{path}: {n_rows}; {problems[0]}: pass a complete word2vec or GloVe file")
    if not vectors:
        raise UserError(f"{path} has no vectors for words in the vocabulary: check that the languages match")
    if problems:
        examples = "; ".join(problems[:3] + ["..."] * (len(problems) > 3))
        print(f"{path}: skipped {len(problems):,} unusable rows: {examples}")
    if num_repeated:
        print(f"{path}: skipped {num_repeated:,} rows that repeat a word; the first vector of each word is used")
    return vectors


def _file_error(path: str, problem: str, remedy: str = "download it again") -> UserError:
    return UserError(f"{path}: {problem}; the file is truncated or damaged: {remedy}")


def _count_error(path: str, header_count: int, actual: str) -> UserError:
    """Return the error for a file whose number of vectors differs from the number in its header."""
    remedy = "download it again, or correct its first line if you shortened or extended it yourself"
    problem = f"its header specifies {header_count:,} vectors, but the file has {actual}"
    return _file_error(path, problem, remedy)


VectorRows = Iterator[tuple[int, str, Any]]  # (number, word, its values: decimals, float32 bytes, or None)


def _open_rows(file: io.BufferedReader, path: str, words: set[str]) -> tuple[int, VectorRows]:
    """Recognize the format of a file, and return (the length of its vectors, its rows for the given words)."""
    head, n_vectors, width = file.peek(), None, None
    start = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
    first_line = head[start:].partition(b"\n")[0]
    fields = first_line.split()
    if len(fields) == 2 and all(field.isdigit() for field in fields):
        n_vectors, width = map(int, fields)
        if not (n_vectors and 0 < width <= MAX_VECTOR_WIDTH):
            header = str(first_line[:60].strip(), "utf-8")
            raise UserError(f"{path} has an invalid first line, {header!r}: pass a word2vec or GloVe file")
        start += len(first_line) + 1
    sample = head[start : start + SAMPLE_BYTES]
    file.read(start)
    lines = [line for line in sample.split(b"\n")[: SAMPLE_ROWS + 1] if line.strip()][:SAMPLE_ROWS]
    for separator in (b" ", None):  # None stands for any whitespace
        counts = Counter(len(line.rstrip().split(separator)) - 1 for line in lines)
        row_width = width or max(counts, key=counts.__getitem__, default=0)
        rows = [line.rstrip().rsplit(separator, row_width) for line in lines if 0 < row_width <= MAX_VECTOR_WIDTH]
        is_row = [len(row) > row_width and _parse_floats(row[1:]) is not None for row in rows]
        has_tab = [separator is not None and b"\t" in row[0].strip() for row in rows]  # between the word and its values
        if sum(is_row) * 2 > len(lines) and sum(has_tab) * 2 <= len(lines):
            wider_rows = [line.rstrip().rsplit(separator, row_width + 1)[1:] for line in lines]
            if sum(len(row) > row_width and _parse_floats(row) is not None for row in wider_rows) * 2 > len(lines):
                raise _file_error(path, f"its rows have more values than its first line specifies ({row_width:,})")
            return row_width, _read_text(file, path, n_vectors, row_width, separator, words)
    if n_vectors is None or width is None:
        raise UserError(f"{path} starts with neither a header nor a word and numbers: pass a word2vec or GloVe file")
    if lines and _decode_word(b" ".join(sample[:MAX_WORD_BYTES].split())) is not None:  # no binary numbers
        example = lines[0][:60].decode("utf-8", "replace")
        problem = f"its first line specifies vectors of {width:,} numbers, but most of its rows do not have as many"
        remedy = "pass a complete word2vec or GloVe file"
        raise UserError(f"{path}: {problem}, such as {example!r}: {remedy}")
    return width, _read_binary(file, path, n_vectors, width, words)


def _parse_floats(fields: list[bytes]) -> np.ndarray | None:
    """Convert fields to (n,) float32, or return None if any is not a number."""
    try:
        return np.array(fields).astype(np.float32)
    except ValueError:
        return None


def _vector_problem(vector: np.ndarray | None, width: int) -> str:
    """Return the problem with a vector, or "" if it can be used."""
    if vector is None:
        return "contains a value that is not a number"
    if len(vector) != width:
        return f"has length {len(vector):,} instead of {width:,}"
    if not np.isfinite(vector).all():
        return "contains non-finite numbers"
    return f"contains numbers beyond {MAX_NUMBER:,.0f}" if np.abs(vector).max() > MAX_NUMBER else ""


def _read_text(
    file: BinaryIO, path: str, n_vectors: int | None, width: int, separator: bytes | None, words: set[str]
) -> VectorRows:
    """Yield the rows of a text file for the given words, which may contain spaces. The last `width` fields are values.

    Raises UserError if the file ends within a row, or if it does not have n_vectors rows.
    """
    first_fields = {word.encode("utf-8").partition(b" ")[0] for word in words}
    number, line, num_other, num_invalid = 0, b"", 0, 0
    for line in iter(partial(file.readline, MAX_LINE_BYTES), b""):
        number += 1
        first_field = line.partition(b" ")[0] if separator else b"".join(line.split(None, 1)[:1])
        if first_field in first_fields:
            fields = line.rstrip().rsplit(separator, width)
            word = (fields[0].strip() if len(fields) > width else first_field).decode("utf-8", "replace")
            if word not in words and WORD_AND_VALUE.match(word):  # more than width values
                fields = line.split()
                word = fields[0].decode("utf-8", "replace")
            if word in words:
                num_other += not word.isascii()
                yield number, word, fields[1:] if n_vectors is not None or line.endswith(b"\n") else None
        elif line.isspace():
            number -= 1
        elif len(line) == MAX_LINE_BYTES:
            raise _file_error(path, f"vector {number:,} takes more than {MAX_LINE_BYTES:,} bytes")
        elif num_other < NUM_CHECKED_ROWS and not first_field.isascii():
            num_other += 1
            num_invalid += _decode_word(first_field) is None
    if num_invalid * 2 > num_other:  # in UTF-8, a few words may be cut off within a character
        problem = f"{num_invalid:,} of the first {num_other:,} words with characters beyond ASCII are not UTF-8"
        raise UserError(f"{path}: {problem}: convert the file, such as with iconv -f cp1252 -t utf-8")
    if not line.endswith(b"\n") and (n_values := len(line.split()) - 1) < width:
        raise _file_error(path, f"vector {number:,} has length {n_values:,} instead of {width:,} and no newline")
    if n_vectors is not None and n_vectors != number:
        raise _count_error(path, n_vectors, f"{number:,}")


def _read_binary(file: BinaryIO, path: str, n_vectors: int, width: int, words: set[str]) -> VectorRows:
    """Yield the rows of a binary file for the given words: a word, a space, float32 values, and an optional newline.

    Words may contain spaces if a newline follows every vector. Otherwise they shift later rows, so all rows are checked
    for large numbers, and those of the given words also for non-finite ones.
    """
    unchecked_rows: list[tuple[int, str, bytes]] = []
    remedy = "download it again, or use the text format if words contain spaces"
    row_bytes, buffer, start, has_newlines = MAX_WORD_BYTES + 4 * width + 2, b"", 0, False
    for number in range(1, n_vectors + 1):
        if len(buffer) - start < row_bytes:
            buffer, start = buffer[start:] + file.read(max(CHUNK_BYTES, row_bytes)), 0
            if not buffer.strip():
                raise _count_error(path, n_vectors, f"{number - 1:,}")
        space = buffer.find(b" ", start, start + MAX_WORD_BYTES)
        end = space + 1 + 4 * width
        if number == 1:
            spaces = [i for i in range(MAX_WORD_BYTES) if buffer[i : i + 1] == b" "]
            line_ends = [i for i in spaces if buffer[i + 1 + 4 * width : i + 2 + 4 * width] == b"\n"]
            has_newlines = any(_decode_word(buffer[:i]) is not None for i in line_ends)
        while has_newlines and space >= 0 and buffer[end : end + 1] not in (b"\n", b""):
            space = buffer.find(b" ", space + 1, start + MAX_WORD_BYTES)
            end = space + 1 + 4 * width
        if space < 0 or end > len(buffer):
            raise _file_error(path, f"vector {number:,} of {n_vectors:,} is truncated")
        if (word := _decode_word(buffer[start:space])) is None:
            problem = f"the word for vector {number:,} has control characters or is not UTF-8"
            raise _file_error(path, problem, remedy)
        row = (number, word, buffer[space + 1 : end])
        if word in words:
            yield row
        if word in words or not has_newlines:
            unchecked_rows.append(row)
        if unchecked_rows and (len(unchecked_rows) == NUM_CHECKED_ROWS or number == n_vectors):
            values = np.frombuffer(b"".join(row[2] for row in unchecked_rows), "<f4").reshape(-1, width)
            if not -MAX_NUMBER <= values.min() <= values.max() <= MAX_NUMBER:  # or NaN
                for (row_number, word, _), vector in zip(unchecked_rows, values):
                    vector = vector if word in words else np.where(np.isfinite(vector), vector, 0)
                    if problem := _vector_problem(vector, width):
                        raise _file_error(path, f"row {row_number:,} for {word[:60]!r} {problem}", remedy)
            unchecked_rows = []
        is_newline = buffer[end : end + 1] == b"\n"
        start = end + is_newline
    if buffer[start:].strip() or file.read(MAX_WORD_BYTES).strip():
        raise _count_error(path, n_vectors, "more")


def _decode_word(word: bytes) -> str | None:
    """Return the text of a word, or None if it has control characters other than tabs, or is not UTF-8."""
    try:
        text = codecs.utf_8_decode(word, "strict", len(word) < CUT_WORD_BYTES)[0]
    except UnicodeDecodeError:
        return None
    return None if CONTROL_CHARACTERS.search(word) else text


# ----------------------------------------------------------------------------------------------------------------------
# vector tables for a vocabulary


def spellings(word: str) -> list[str]:
    """Return the words to look up for a token, best first, or [] for whitespace."""
    word = word.strip()
    spellings = [word, word.lower(), word.capitalize(), word.upper()] if word else []
    other_forms = [unicodedata.normalize(form, name) for form in ("NFC", "NFD") for name in spellings]
    return list(dict.fromkeys([*spellings, *other_forms]))


def all_spellings(tokenizer: WordTokenizer) -> set[str]:
    """Return all words whose vectors could be used for the tokenizer's vocabulary."""
    return {name for word in tokenizer.words for name in spellings(word)}


def vector_table(tokenizer: WordTokenizer, vectors: dict[str, np.ndarray]) -> np.ndarray:
    """Return each id's vector, or zeros if it has none: (vocab_size, width) float32. `vectors` must not be empty."""
    table = np.zeros((tokenizer.vocab_size, len(next(iter(vectors.values())))), dtype=np.float32)
    for word, i in tokenizer.ids.items():
        if name := next((name for name in spellings(word) if name in vectors), ""):
            table[i] = vectors[name]
    return table


def save_table(path: str, table: np.ndarray):
    """Write table to path atomically. Raises UserError if the file cannot be written."""
    content = io.BytesIO()
    np.save(content, table, allow_pickle=False)
    write_atomically(path, content.getvalue())


def load_table(path: str, n_words: int) -> np.ndarray:
    """Load the table that save_table() wrote for a vocabulary of n_words: (n_words, width) float32.

    Raises UserError if the file contains anything else.
    """
    problem = ""
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)  # memory-mapped, since a header can claim any size
        if table.ndim != 2 or table.dtype.kind != "f" or 0 in table.shape:
            problem = "does not contain one row of numbers per word"
        elif len(table) != n_words:
            problem = f"was made for other data: it has {len(table):,} rows, but the vocabulary has {n_words:,} entries"
        elif not np.isfinite(table).all():
            problem = "contains non-finite numbers"
    except FileNotFoundError:
        problem = "was not found"
    except (OSError, ValueError, EOFError, AttributeError):  # a pickle, a text file, a .npz, or a truncated file
        problem = "is damaged or is not a .npy file of numbers"
    if problem:
        raise UserError(f"init_wte={path} {problem}: create it with python data/word2vec.py --dataset=NAME")
    return np.array(table, dtype=np.float32)


def fit_width(vectors: np.ndarray, width: int) -> np.ndarray:
    """Convert vectors of at least `width` values to rows of a token embedding: (n, width) float32.

    The mean vector is subtracted, since it is large and shared by all words. Vectors of more than `width` values are
    projected onto their first `width` principal components. The result is scaled to INIT_STD, the standard deviation of
    newly initialized embeddings.
    """
    centered = vectors - vectors.mean(0, dtype=np.float64)
    if centered.shape[1] > width:
        _, directions = np.linalg.eigh(centered.T @ centered)  # in order of increasing variance
        centered = centered @ directions[:, ::-1][:, :width]
    std = np.sqrt(np.mean(centered**2))
    return (centered * (INIT_STD / std if std > 0 else 0.0)).astype(np.float32)


@torch.no_grad()
def init_embedding(weight: torch.Tensor, path: str, n_words: int) -> str:
    """Copy the vectors at path into a token embedding (at least n_words, n_embd) and return a line that reports it.

    Rows for words without a vector keep their values. Raises UserError if load_table() does, or if the vectors are all
    zero or narrower than the embedding.
    """
    table, width = load_table(path, n_words), weight.shape[1]
    has_vector = table.any(1)
    if not has_vector.any():
        raise UserError(f"init_wte={path} has no vectors for any words: create it again with python data/word2vec.py")
    if table.shape[1] < width:
        remedy = f"train vectors with python data/word2vec.py --size={width}, or pass --n_embd={table.shape[1]}"
        problem = f"init_wte={path} has vectors of {table.shape[1]} numbers, fewer than n_embd={width}"
        raise UserError(f"{problem}: {remedy}")
    weight[:n_words][torch.from_numpy(has_vector)] = torch.from_numpy(fit_width(table[has_vector], width))
    projection = f" (projected from {table.shape[1]} numbers onto their first {width} principal components)"
    summary = f"{has_vector.sum():,} words start from their vectors{projection if table.shape[1] > width else ''}"
    return f"token embedding from {path}: {summary}, and {(~has_vector).sum():,} from random values"
