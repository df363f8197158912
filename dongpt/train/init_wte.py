"""Initialize a model's token embedding with pretrained word vectors.

    vectors = read_vectors("GoogleNews-vectors-negative300.bin", all_spellings(tokenizer))  # {"food": (300,), ...}
    table = vector_table(tokenizer, vectors)            # (vocab_size, 300), zeros for tokens without a vector
    save_table("data/don_word/word2vec.npy", table)
    line = init_embedding(model.transformer.wte.weight, "data/don_word/word2vec.npy", tokenizer.vocab_size)

Words are looked up without their leading space. If a word has no vector, other capitalizations are tried, so that all
spellings of a word can share one vector.

Supported formats: word2vec's text and binary formats (code.google.com/archive/p/word2vec, distance.c), and GloVe's text
format, which has no header.
"""

import bz2
import gzip
import io
import lzma
import zlib
from typing import Any, BinaryIO, Iterator

import numpy as np
import torch

from configurator import UserError
from dongpt.text.sources import write_atomically
from dongpt.text.tokenizers import WordTokenizer

INIT_STD = 0.02  # standard deviation of a new token embedding, as in GPT-2
MAX_VECTOR_WIDTH = 2**14  # maximum length of a vector; a header with a greater length is rejected
MAX_LINE_BYTES = 64 * MAX_VECTOR_WIDTH
MAX_WORD_BYTES = 2**12
CHUNK_BYTES = 2**20  # bytes read at a time
OPEN_BY_MAGIC = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}  # keys: first bytes of a file


# ----------------------------------------------------------------------------------------------------------------------
# vector files


def read_vectors(path: str, words: set[str]) -> dict[str, np.ndarray]:
    """Return a file's vectors for the given words, {word: (width,) float32}. The first one for a word is used.

    The file is streamed, so that memory use depends only on the number of words. Raises UserError if the file cannot be
    read, is damaged, contains non-finite numbers, or has none of the words.
    """
    if path.endswith(".npy"):
        raise UserError(f"{path} is an output of data/word2vec.py: pass a word2vec or GloVe file")
    vectors: dict[str, np.ndarray] = {}
    try:
        with open(path, "rb") as file:
            first_bytes = file.read(6)
        opener: Any = next((opener for magic, opener in OPEN_BY_MAGIC.items() if first_bytes.startswith(magic)), open)
        with io.BufferedReader(opener(path, "rb"), CHUNK_BYTES) as file:
            header_count, records = _open_records(file, path)
            count = 0
            for count, (word, content) in enumerate(records, 1):
                if (name := word.decode("utf-8", errors="replace")) in words and name not in vectors:
                    vector = _parse_floats(content) if isinstance(content, list) else np.frombuffer(content, "<f4")
                    if vector is None:
                        raise _file_error(path, f"vector {count:,} contains a value that is not a number")
                    vectors[name] = vector.astype(np.float32)
            has_more = bool(file.read(MAX_WORD_BYTES).strip())
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if reason := getattr(error, "strerror", None):  # from the operating system
            raise UserError(f"{path} cannot be read ({reason}): pass the path of a word vector file") from error
        raise _file_error(path, f"decompression failed ({error})") from error
    if has_more or header_count not in (None, count):
        actual = "more" if has_more else f"{count:,}"
        raise _file_error(path, f"its header specifies {header_count or count:,} vectors, but the file has {actual}")
    if not vectors:
        raise UserError(f"{path} has no vectors for words in the vocabulary: check that the languages match")
    if bad_words := [word for word, vector in vectors.items() if not np.isfinite(vector).all()]:
        raise _file_error(path, f"the vector of {bad_words[0]!r} contains non-finite numbers")
    return vectors


def _file_error(path: str, problem: str) -> UserError:
    return UserError(f"{path}: {problem}; the file is truncated or damaged: download it again")


VectorRecords = Iterator[tuple[bytes, Any]]  # (word, its values: a list of decimal strings, or float32 bytes)


def _open_records(file: BinaryIO, path: str) -> tuple[int | None, VectorRecords]:
    """Return (the number of vectors in the header, or None if there is no header; an iterator over the records)."""
    first_line = file.readline(MAX_LINE_BYTES)
    fields = first_line.split()
    if len(fields) == 2 and all(field.isdigit() for field in fields):
        n_vectors, width = map(int, fields)
        if not (n_vectors and 0 < width <= MAX_VECTOR_WIDTH):
            header = first_line[:60].strip().decode()
            raise UserError(f"{path} has an invalid first line, {header!r}: pass a word2vec or GloVe file")
        position, line = file.tell(), file.readline(MAX_LINE_BYTES)
        file.seek(position)
        # a binary file is mistaken for text only if the bytes of its first number are digits
        is_text = len(line.split()) > 1 and _parse_floats(line.split()[1:2]) is not None and b"\0" not in line
        return n_vectors, _read_text(file, path, width) if is_text else _read_binary(file, path, n_vectors, width)
    if 1 < len(fields) <= MAX_VECTOR_WIDTH + 1 and _parse_floats(fields[1:]) is not None:  # GloVe, no header
        file.seek(0)
        return None, _read_text(file, path, len(fields) - 1)
    raise UserError(f"{path} starts with neither a header nor a word and numbers: pass a word2vec or GloVe file")


def _parse_floats(fields: list[bytes]) -> np.ndarray | None:
    """Convert fields to (n,) float32, or return None if any is not a number."""
    try:
        return np.array(fields).astype(np.float32)
    except ValueError:
        return None


def _read_text(file: BinaryIO, path: str, width: int) -> VectorRecords:
    """Yield the records of a text file. All vectors must have `width` values."""
    lines = iter(lambda: file.readline(MAX_LINE_BYTES).rstrip(b"\r\n"), b"")
    for number, line in enumerate(lines, 1):
        fields = line.split()
        if len(fields) > width + 1 and _parse_floats(fields[1:2]) is None:  # a few GloVe words contain spaces
            fields[:-width] = [b" ".join(fields[:-width])]
        if len(fields) != width + 1:
            count = max(len(fields) - 1, 0)
            raise _file_error(path, f"vector {number:,} has {count:,} values instead of {width:,}")
        yield fields[0], fields[1:]


def _read_binary(file: BinaryIO, path: str, n_vectors: int, width: int) -> VectorRecords:
    """Yield the records of a binary file: a word, a space, its float32 values, and an optional newline."""
    for number in range(1, n_vectors + 1):
        word = b""
        while (byte := file.read(1)) not in (b" ", b"") and len(word) < MAX_WORD_BYTES:
            word += byte
        if not byte and not word.strip():
            return
        content = file.read(4 * width)
        if byte != b" " or len(content) < 4 * width:
            raise _file_error(path, f"vector {number:,} of {n_vectors:,} is truncated")
        yield word.lstrip(b"\n"), content


# ----------------------------------------------------------------------------------------------------------------------
# vector tables for a vocabulary


def spellings(word: str) -> list[str]:
    """Return the words to look up for a token, best first, or [] for whitespace."""
    word = word.strip()
    return list(dict.fromkeys([word, word.lower(), word.capitalize(), word.upper()])) if word else []


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
    """Write table to path atomically. Raises UserError if it cannot be written."""
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

    Their mean is subtracted, since it is large and the same for all words. Wider vectors are projected onto their first
    `width` principal components. The result is scaled to the standard deviation of newly initialized embeddings,
    INIT_STD.
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

    Rows of words without a vector keep their values. Raises UserError if load_table() does, or if the vectors are all
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
    projection = f" (of {table.shape[1]} numbers, projected onto their first {width} principal components)"
    summary = f"{has_vector.sum():,} words start from their vectors{projection if table.shape[1] > width else ''}"
    return f"token embedding from {path}: {summary}, {(~has_vector).sum():,} from random values"
