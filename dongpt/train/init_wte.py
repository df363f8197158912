"""Vectors of words: read from files, given to the tokens of a vocabulary, fitted to a model's token embedding.

    found = read_vectors("GoogleNews-vectors-negative300.bin.gz", wanted_spellings(tokenizer))   # {"food": (300,), ...}
    rows = rows_of(tokenizer, found)                    # (vocab_size, 300), zeros for tokens without a vector
    save_rows("data/don_word/word2vec.npy", rows)
    line = start_from(model.transformer.wte.weight, "data/don_word/word2vec.npy", tokenizer.vocab_size)

A word is looked up without the space before it, and in other capitals where its own are not there, so that all
spellings of a word share a vector.

Formats: word2vec's text and binary (code.google.com/archive/p/word2vec, distance.c), GloVe's text, which has no header.
"""

import bz2
import gzip
import io
import lzma
import zlib
from typing import BinaryIO, Iterator

import numpy as np
import torch

from configurator import UserError
from dongpt.text.sources import store
from dongpt.text.tokenizers import WordTokenizer

STD = 0.02  # of the numbers in a new model's token embedding, as GPT-2 has it
WIDEST = 2**14  # numbers in a vector; a header that says more is none
LONGEST_LINE = 64 * WIDEST  # bytes
LONGEST_WORD = 2**12  # bytes
READ_BYTES = 2**20  # bytes that are read at a time
PACKED = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\x00", lzma.open))  # by what a file begins with
BROKEN = (EOFError, zlib.error, lzma.LZMAError, OSError)  # what reading a damaged one raises


# ----------------------------------------------------------------------------------------------------------------------
# words


def spellings(word: str) -> list[str]:
    """What a token may be called in a list of words, the best name first; [] for blanks."""
    word = word.strip()
    return list(dict.fromkeys([word, word.lower(), word.capitalize(), word.upper()])) if word else []


def wanted_spellings(tokenizer: WordTokenizer) -> set[str]:
    """The names under which a vector is of use to tokenizer's words."""
    return {name for word in tokenizer.words for name in spellings(word)}


def rows_of(tokenizer: WordTokenizer, vectors: dict[str, np.ndarray]) -> np.ndarray:
    """The vector of each id, (vocab_size, width) float32, zeros where there is none. vectors must not be empty."""
    rows = np.zeros((tokenizer.vocab_size, len(next(iter(vectors.values())))), dtype=np.float32)
    for word, i in tokenizer.ids.items():
        name = next((name for name in spellings(word) if name in vectors), None)
        if name is not None:
            rows[i] = vectors[name]
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# files of vectors


class _Reader:
    """A file, unpacked, that is read by lines, by words or by bytes. What cannot be unpacked is a ValueError."""

    def __init__(self, file: BinaryIO, path: str):
        self.file, self.path = file, path
        self.held, self.at, self.at_end = b"", 0, False  # bytes read, of which those from `at` on are to be given out

    def _more(self) -> bool:
        """Read a piece; whether there was one."""
        if not self.at_end:
            try:
                piece = self.file.read(READ_BYTES)
            except BROKEN as error:
                raise UserError(f"{self.path} is cut off or damaged ({error}): fetch it anew") from error
            self.at_end, self.held, self.at = not piece, self.held[self.at :] + piece, 0
        return not self.at_end

    def peek(self, n: int) -> bytes:
        """The next n bytes, fewer at the end, which stay to be read."""
        while len(self.held) - self.at < n and self._more():
            pass
        return self.held[self.at : self.at + n]

    def take(self, n: int) -> bytes:
        """The next n bytes, fewer at the end."""
        found = self.peek(n)
        self.at += len(found)
        return found

    def until(self, mark: bytes, most: int) -> bytes | None:
        """The bytes up to a mark, which goes too; at the end what is left; None if no mark comes in `most` bytes."""
        while (end := self.held.find(mark, self.at, self.at + most)) < 0:
            if len(self.held) - self.at >= most:
                return None
            if not self._more():
                return self.take(len(self.held))
        found, self.at = self.held[self.at : end], end + 1
        return found


def read_vectors(path: str, wanted: set[str]) -> dict[str, np.ndarray]:
    """The vectors of those words of a file that are wanted, {word: (width,) float32}; the first of several counts.

    The file is read as it comes: memory grows with what is wanted alone. Raises UserError for a file that cannot be
    read, is none of vectors, is cut off, does not hold what its header promises, has vectors of several widths or
    numbers that are not finite, or no word that is wanted.
    """
    if path.endswith(".npy"):
        raise UserError(f"{path} has no words, and is what this program writes: pass a file of word2vec or GloVe")
    try:
        with open(path, "rb") as file:
            beginning = file.read(6)
        opened = next((unpack for magic, unpack in PACKED if beginning.startswith(magic)), open)(path, "rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give the path of a file of word vectors") from error
    with opened as file:
        found = dict(_rows(_Reader(file, path), wanted))
    if not found:
        raise UserError(f"{path} has no vector for any word of the vocabulary: are its words of the same language?")
    for word, vector in found.items():
        if not np.isfinite(vector).all():
            raise UserError(
                f"{path}: the vector of {word!r} has numbers that are not finite: fetch the file anew, or "
                f"take that row out"
            )
    return found


def _rows(reader: _Reader, wanted: set[str]) -> Iterator[tuple[str, np.ndarray]]:
    """(word, vector) for the words that are wanted, each once."""
    first = reader.until(b"\n", LONGEST_LINE)
    fields = (first or b"").split()
    if len(fields) == 2 and all(field.isdigit() for field in fields):
        n_rows, width = map(int, fields)
        if not (n_rows and 0 < width <= WIDEST):
            raise UserError(
                f"{reader.path} begins with {first[:60].decode()!r}, and that is no number of words and "
                f"width of their vectors: give a file of word2vec or GloVe"
            )
        rows = _text_rows if _is_text(reader, width) else _binary_rows
    else:  # GloVe's: no header
        n_rows, width = None, len(fields) - 1
        if not (0 < width <= WIDEST and _numbers(fields[1:]) is not None):
            raise UserError(
                f"{reader.path} begins with neither a header nor a word and its numbers: give a file of "
                f"word2vec (text or binary) or GloVe"
            )
        reader.at = 0
        rows = _text_rows
    seen = set()
    for word, numbers in rows(reader, n_rows, width):
        word = word.decode("utf-8", errors="replace")
        if word in wanted and word not in seen:
            seen.add(word)
            yield word, numbers()


def _numbers(fields: list[bytes]) -> np.ndarray | None:
    """fields as (n,) float32, None where one is no number."""
    try:
        return np.array(fields).astype(np.float32)
    except ValueError:
        return None


def _is_text(reader: _Reader, width: int) -> bool:
    """Whether what follows a header is text: a word and its numbers.

    In a binary file the first number's bytes would have to be digits.
    """
    line = reader.peek(LONGEST_WORD + 64 * width).partition(b"\n")[0].split()
    return len(line) > 1 and _numbers(line[1:2]) is not None and b"\0" not in b"".join(line)


def _text_rows(reader: _Reader, n_rows: int | None, width: int):
    """(word, what makes its numbers) for each line; every line's count of numbers is checked."""
    number, path = 0, reader.path
    while line := reader.until(b"\n", LONGEST_LINE):
        fields, number = line.split(), number + 1
        if len(fields) > width + 1 and _numbers(fields[1:2]) is None:  # GloVe has a few words with spaces in them
            fields[:-width] = [b" ".join(fields[:-width])]
        if len(fields) != width + 1:
            raise UserError(
                f"{path}: the vector number {number:,} has {max(len(fields) - 1, 0):,} numbers where the "
                f"file's have {width:,}: it is cut off or damaged, fetch it anew"
            )

        def numbers(fields=fields, number=number):
            if (vector := _numbers(fields[1:])) is None:
                raise UserError(
                    f"{path}: the vector number {number:,} holds something that is no number: it is "
                    f"damaged, fetch it anew"
                )
            return vector

        yield fields[0], numbers
    if line is None:
        raise UserError(
            f"{path}: behind vector number {number:,} no line ends: it is no file of word vectors, or damaged"
        )
    _check_count(reader, number, n_rows if n_rows is not None else number)


def _binary_rows(reader: _Reader, n_rows: int, width: int):
    """(word, what makes its numbers) for each vector: the word, a space, its float32 numbers, perhaps a line end."""
    for number in range(n_rows):
        word = reader.until(b" ", LONGEST_WORD)
        content = reader.take(4 * width)
        if word is None or len(content) < 4 * width and content:
            raise UserError(
                f"{reader.path}: vector number {number + 1:,} of {n_rows:,} is cut off or damaged: fetch the file anew"
            )
        if not content:
            _check_count(reader, number, n_rows)
        yield word.lstrip(b"\n"), lambda content=content: np.frombuffer(content, "<f4").astype(np.float32)
    _check_count(reader, n_rows, n_rows)


def _check_count(reader: _Reader, n_found: int, n_promised: int):
    """Raise UserError unless the file ends here and had as many vectors as its header says."""
    more = bool(reader.peek(LONGEST_WORD).strip())
    if n_found != n_promised or more:
        raise UserError(
            f"{reader.path} promises {n_promised:,} vectors and holds "
            f"{'more' if more else f'{n_found:,}'}: it is cut off or damaged, fetch it anew"
        )


# ----------------------------------------------------------------------------------------------------------------------
# rows for a vocabulary


def save_rows(path: str, rows: np.ndarray):
    """Write rows to path, whole or not at all. Raises UserError when it cannot be written."""
    content = io.BytesIO()
    np.save(content, rows, allow_pickle=False)
    store(path, content.getvalue())


def load_rows(path: str, n_rows: int) -> np.ndarray:
    """What save_rows wrote for a vocabulary of n_rows, (n_rows, width) float32. Raises UserError if it is not that."""
    remedy = "write it with python data/word2vec.py --dataset=NAME"
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: a header may promise any size
    except FileNotFoundError as error:
        raise UserError(f"init_wte={path} is not there: {remedy}") from error
    except (OSError, ValueError, EOFError) as error:  # a pickle, a text, one cut off
        raise UserError(f"init_wte={path} is no .npy file of numbers, or damaged: {remedy}") from error
    if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.dtype.kind != "f" or 0 in rows.shape:
        raise UserError(f"init_wte={path} does not hold a row of numbers for each word: {remedy}")
    if len(rows) != n_rows:
        raise UserError(
            f"init_wte={path} has {len(rows):,} rows and the vocabulary of the data {n_rows:,} entries: "
            f"it was made for other data, {remedy}"
        )
    rows = np.array(rows, dtype=np.float32)
    if not np.isfinite(rows).all():
        raise UserError(f"init_wte={path} has numbers that are not finite: {remedy}")
    return rows


def fitted(rows: np.ndarray, width: int) -> np.ndarray:
    """The rows that are not zero, (n, at least width), as a token embedding begins: (n, width) float32.

    Their mean goes: it is common to all words and large, and says nothing of any. Wider ones are turned onto their
    principal components, the first `width` of which stay. One factor then makes the numbers' deviation STD, so that
    positions, other words and the layers above meet the sizes that they are made for.
    """
    rows = rows.astype(np.float64)
    rows = rows - rows.mean(0)
    if rows.shape[1] > width:
        _, directions = np.linalg.eigh(rows.T @ rows)  # by rising variance
        rows = rows @ directions[:, ::-1][:, :width]
    deviation = np.sqrt(np.mean(rows**2))
    return (rows * (STD / deviation if deviation > 0 else 0.0)).astype(np.float32)


@torch.no_grad()
def start_from(weight: torch.Tensor, path: str, n_words: int) -> str:
    """Put the vectors at path into a token embedding (at least n_words, n_embd), and say in a line what was done.

    Rows of words without a vector stay as they are. Raises UserError as load_rows does, and for vectors that are
    narrower than the embedding or all zero.
    """
    rows, width = load_rows(path, n_words), weight.shape[1]
    has = rows.any(1)
    if not has.any():
        raise UserError(f"init_wte={path} has no vector for any word: write it with python data/word2vec.py")
    if rows.shape[1] < width:
        raise UserError(
            f"init_wte={path} has vectors of {rows.shape[1]} numbers, and n_embd={width} is more: train "
            f"vectors with python data/word2vec.py --size={width}, or pass --n_embd={rows.shape[1]}"
        )
    weight[:n_words][torch.from_numpy(has)] = torch.from_numpy(fitted(rows[has], width))
    projected = f" (of {rows.shape[1]} numbers, projected on their first {width} principal components)"
    without = int((~has).sum())
    return (
        f"token embedding from {path}: {has.sum():,} words begin with their vectors"
        f"{projected if rows.shape[1] > width else ''}, {without:,} without one as usual"
    )
