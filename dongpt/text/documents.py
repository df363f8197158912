"""Documents from files of many kinds, read in pieces, so that a file may be larger than memory.

A text file is one document, or one per line, or one per paragraph; a record of JSON lines, CSV or Parquet is one.
Line ends become \\n and a byte-order mark goes. What is no text is refused with its place.

    files = Files(find_files("poems/")[0])
    for texts, whole in files.batches(): ...    # texts of documents in order; whole is False where the last one goes on
    for question, answer in Files(["qa.csv"]).records("question", "answer"): ...
"""

import bz2
import codecs
import contextlib
import csv
import glob
import gzip
import io
import json
import lzma
import os
import re
import zlib
from dataclasses import dataclass, replace
from typing import Callable, Iterator, Literal

from configurator import UserError

READ_BYTES = 2**20  # bytes read at a time
UNPACK = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
RECORDS = (".jsonl", ".ndjson", ".csv", ".parquet")
KNOWN = (".txt", ".md", *RECORDS)  # what is taken from a folder
# what a preparation leaves
OURS = re.compile(
    r"((train|val)(_\d{3,})?(\.mask)?\.bin|val\.ids|(meta|preparing)\.json)(\.part|\.new)?"
    r"|preparing\.lock|explore\.png|word2vec\.(npy|png)"
)
BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")
LINE_ENDS = re.compile(r"\n(?:[ \t]*\n)*")
Batch = tuple[list[str], bool]
Document = Literal["file", "line", "blank", "none"]


def find_files(given: str, option: str = "--input") -> tuple[list[str], int]:
    """(paths, how many others were left aside) of a file, a folder with all below it, or a pattern; sorted.

    From a folder only files of KNOWN kinds are taken. Raises UserError, naming the option, where there are none.
    """
    if os.path.isfile(given):
        return [given], 0
    if os.path.isdir(given):
        below = [os.path.join(folder, name) for folder, _, names in os.walk(given) for name in names]
        below = [
            path
            for path in below
            if os.path.isfile(path)  # a link may lead nowhere
            and not re.search(r"(^|[/\\])\.", os.path.relpath(path, given))
        ]  # hidden ones
        paths = [path for path in below if kind_of(path)[0] in KNOWN]
        remedy = f"it has no file that ends in {' '.join(KNOWN)} (or those with .gz .bz2 .xz)"
    else:
        below = [path for path in glob.glob(given, recursive=True) if os.path.isfile(path)]
        paths = [path for path in below if not OURS.fullmatch(os.path.basename(path))]
        remedy = "there is no such file or folder, and as a pattern it fits nothing"
    if not paths:
        raise UserError(f"{given} gives no text: {remedy}; pass {option}=PATH of a text")
    return sorted(paths), len(below) - len(paths)


def kind_of(path: str) -> tuple[str, str]:
    """The two endings of a path that say what it holds and how it is packed: (".txt", ".gz"), (".csv", "")."""
    stem, ending = os.path.splitext(path.lower())
    return (os.path.splitext(stem)[1], ending) if ending in UNPACK else (ending, "")


@dataclass(frozen=True)
class Files:
    """Files, and how their documents are found in them."""

    paths: list[str]
    document: Document = "file"  # file: a file or a record is one; line, blank: cut further; none: all is one
    field: str = "text"  # of the records of JSON lines, CSV and Parquet
    encoding: str = "utf-8"
    option: str = "--field"  # what names the fields on the command line
    as_is: bool = False  # records as they are, with NULs and any line ends, instead of refused or with \n

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return sum(os.path.getsize(path) for path in self.paths)

    @property
    def parted(self) -> bool:
        """Whether the text itself parts its documents: lines or paragraphs of one file, or all for one."""
        one_text = len(self.paths) == 1 and kind_of(self.paths[0])[0] not in RECORDS
        return self.document == "none" or self.document != "file" and one_text

    def stamp(self) -> list[tuple[int, int]]:
        """What changes when a file does: size and time of each."""
        return [(status.st_size, status.st_mtime_ns) for status in map(os.stat, self.paths)]

    def batches(self, on_bytes: Callable[[int], None] = lambda n: None, digest=None) -> Iterator[Batch]:
        """Yield (texts, whole): documents in order, at most about READ_BYTES characters together unless one is longer.

        on_bytes is told how many bytes of the files were used up; digest (of hashlib) takes in what was read.
        Raises UserError naming file and place for what is no text.
        """
        batches = self._files(on_bytes, digest or _NoDigest())
        if self.document == "none":
            return _join(batches)
        if self.document == "file":
            return batches
        return _cut(batches, LINE_ENDS if self.document == "line" else BLANK_LINES)

    def records(
        self, *fields: str, on_bytes: Callable[[int], None] = lambda n: None, digest=None
    ) -> Iterator[tuple[str, ...]]:
        """Yield the texts of these fields of every record of JSON lines, CSV and Parquet."""
        return (texts for _, texts in self.placed_records(*fields, on_bytes=on_bytes, digest=digest))

    def placed_records(
        self, *fields: str, on_bytes: Callable[[int], None] = lambda n: None, digest=None, labels: tuple[str, ...] = ()
    ) -> Iterator[tuple[str, tuple[str, ...]]]:
        """As records, each with its place, "FILE line 2"; of fields in labels anything is taken, as text."""
        digest, check = digest or _NoDigest(), _as_it_is if self.as_is else _checked
        for path in self.paths:
            kind = kind_of(path)[0]
            if kind == ".parquet":
                yield from _parquet(path, fields, labels, self.option, digest, check)
            elif kind == ".csv":
                yield from _csv(path, fields, self.option, self.lines(path, digest=digest), check)
            elif kind in RECORDS:
                yield from _json_lines(path, fields, self.option, self.lines(path, digest=digest), check)
            else:
                raise UserError(f"{path} has no records: give a file that ends in {' '.join(RECORDS)}")
            on_bytes(os.path.getsize(path))

    def lines(self, path: str, on_bytes: Callable[[int], None] = lambda n: None, digest=None) -> Iterator[str]:
        """The lines of one file, with their ends."""
        return _lines(self._pieces(path, digest or _NoDigest(), on_bytes))

    def count(self, path: str) -> int:
        """How many documents texts gives of one file."""
        kind = kind_of(path)[0]
        if kind == ".parquet":
            return _parquet_rows(path)
        if kind == ".csv":
            return sum(1 for _ in replace(self, paths=[path]).records(self.field))
        return sum(1 for line in self.lines(path) if line.strip()) if kind in RECORDS else 1

    def texts(self, path: str, on_bytes: Callable[[int], None] = lambda n: None) -> Iterator[tuple[str, bool]]:
        """Yield (text, whether its document ends with it) of one file, of which a record or the whole is a document,
        blank ones too."""
        if kind_of(path)[0] in RECORDS:
            one = replace(self, paths=[path])
            yield from ((text, True) for (text,) in one.records(self.field, on_bytes=on_bytes))
        else:
            yield from ((piece, False) for piece in self._pieces(path, _NoDigest(), on_bytes))
            yield "", True

    def _files(self, on_bytes, digest) -> Iterator[Batch]:
        for path in self.paths:
            if kind_of(path)[0] in RECORDS:
                one = Files([path], encoding=self.encoding)
                yield from _gather(text for (text,) in one.records(self.field, digest=digest))
            else:
                yield from _one_document(self._pieces(path, digest, on_bytes))
            if kind_of(path)[0] in RECORDS or kind_of(path)[1]:
                on_bytes(os.path.getsize(path))

    def _pieces(self, path: str, digest, on_bytes=lambda n: None) -> Iterator[str]:
        """The text of a file in pieces, checked, with line ends \\n."""
        codec, encoding, place, line_ends = None, "", 0, io.IncrementalNewlineDecoder(None, translate=True)
        for piece in _read(path):
            digest.update(piece)
            if not kind_of(path)[1]:
                on_bytes(len(piece))
            if codec is None:
                encoding, mark = _by_mark(piece, self.encoding)
                codec, piece, place = codecs.getincrementaldecoder(encoding)(), piece[mark:], mark
            waiting = len(codec.getstate()[0])
            try:
                text = codec.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                raise UserError(_not_text(path, error, place - waiting + error.start)) from error
            except UnicodeError as error:  # UTF-16 and UTF-32 say so themselves
                raise UserError(
                    f"{path} has no byte-order mark ({error}): pass --encoding={encoding}-le or "
                    f"--encoding={encoding}-be"
                ) from error
            if "\0" in text:
                at = f" at byte {place + piece.index(0):,}" if encoding == "utf-8" else ""
                raise UserError(
                    f"{path} has a NUL{at}: it is no text in {encoding.upper()}, leave it out, or pass "
                    f"--encoding=NAME of the encoding it has, such as utf-16-le"
                )
            place += len(piece)
            if text := line_ends.decode(text, final=not piece):
                yield text


def _read(path: str) -> Iterator[bytes]:
    """The unpacked bytes of a file in pieces; b"" comes last."""
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(UNPACK.get(kind_of(path)[1], open)(path, "rb"))
            while piece := file.read(READ_BYTES):
                yield piece
            yield b""
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} cannot be unpacked ({error}): it is damaged or not what its name says") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): give the path of a text file") from error


def _by_mark(start: bytes, encoding: str) -> tuple[str, int]:
    """(encoding, length of the byte-order mark) of a file that begins like this."""
    try:
        "".encode(encoding)
        codecs.getincrementaldecoder(encoding)
    except LookupError as error:
        raise UserError(f"encoding={encoding} is not known: try utf-8, cp1252 or utf-16") from error
    if start.startswith(codecs.BOM_UTF8):
        return "utf-8", 3
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):  # the former begins like UTF-16's
        return "utf-32-le" if start.startswith(codecs.BOM_UTF32_LE) else "utf-32-be", 4
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16-le" if start.startswith(codecs.BOM_UTF16_LE) else "utf-16-be", 2
    return encoding, 0


def _not_text(path: str, error: UnicodeDecodeError, place: int) -> str:
    byte = f"0x{error.object[error.start]:02x}" if error.start < len(error.object) else "its end"
    guess = "cp1252" if error.encoding == "utf-8" and error.object[error.start] not in b"\x81\x8d\x8f\x90\x9d" else ""
    guess = f", such as --encoding={guess} for Western Windows" if guess else ""
    return (
        f"{path} is not {error.encoding.upper()} at byte {place:,} ({byte}): convert it to UTF-8, or pass "
        f"--encoding=NAME of the encoding that it has{guess}"
    )


def _checked(text, place: str, field: str) -> str:
    """A record's text; ValueError where it is none."""
    if not isinstance(text, str):
        raise UserError(f"{place}: {field!r} of this record is no text but {str(text)[:40]!r}: mend or drop it")
    if "\0" in text or _has_surrogate(text):
        raise UserError(
            f"{place}: {field!r} of this record has a NUL or half a surrogate pair ({text[:40]!r}...): mend or drop it"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _as_it_is(text, place: str, field: str) -> str:
    """A record's text without a change but for halves of surrogate pairs, which no UTF-8 has; none for null."""
    if text is None:
        return ""
    if not isinstance(text, str):
        return _checked(text, place, field)  # which says what it is
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if _has_surrogate(text) else text


def _has_surrogate(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text)


Placed = tuple[str, tuple[str, ...]]  # where a record is, its texts


def _parquet(path: str, fields, labels, option: str, digest, check) -> Iterator[Placed]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for field in fields:
                if field not in file.schema_arrow.names:
                    raise UserError(_no_field(path, field, option, file.schema_arrow.names))
            batches = file.iter_batches(batch_size=256, columns=list(fields))
            rows = (row for batch in batches for row in zip(*(batch.column(field).to_pylist() for field in fields)))
            for number, texts in enumerate(rows, 1):
                digest.update(repr(texts).encode("utf-8"))
                place = f"{path} row {number:,}"
                yield (
                    place,
                    tuple(
                        str(text) if field in labels else check(text, place, field)
                        for text, field in zip(texts, fields)
                    ),
                )
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet ({str(error).splitlines()[0]}): make it anew") from error


def _parquet_rows(path: str) -> int:
    """How many records a file has."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            return file.metadata.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet ({str(error).splitlines()[0]}): make it anew") from error


def _no_field(path: str, field: str, option: str, there) -> str:
    return (
        f"{path} has no field {field!r}: pass {option}=NAME, one of "
        f"{', '.join(map(repr, list(there)[:20])) or 'none there'}"
    )


def _lines(pieces: Iterator[str]) -> Iterator[str]:
    """The lines of a text, with their ends."""
    rest: list[str] = []
    for piece in pieces:
        first, *others = piece.split("\n")
        rest.append(first)
        if others:
            yield "".join(rest) + "\n"
            yield from (line + "\n" for line in others[:-1])
            rest = [others[-1]]
    if last := "".join(rest):
        yield last


def _json_lines(path: str, fields, option: str, lines: Iterator[str], check) -> Iterator[Placed]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} line {number:,} is no JSON ({error}): mend or drop the line") from error
        if not isinstance(record, dict):
            raise UserError(f'{path} line {number:,} is no object: lines must be like {{"{fields[0]}": "..."}}')
        for field in fields:
            if field not in record:
                raise UserError(f"line {number:,} of " + _no_field(path, field, option, record))
        place = f"{path} line {number:,}"
        yield place, tuple(check(record[field], place, field) for field in fields)


def _csv(path: str, fields, option: str, lines: Iterator[str], check) -> Iterator[Placed]:
    csv.field_size_limit(2**31 - 1)
    rows = csv.reader(lines, strict=True)
    try:
        names = next(rows, [])
        for field in fields:
            if field not in names:
                raise UserError(_no_field(path, field, option, names))
        for row in filter(None, rows):
            if len(row) != len(names):
                raise UserError(
                    f"{path} line {rows.line_num:,} has {len(row)} columns where the first line has "
                    f"{len(names)}: mend or drop it"
                )
            place = f"{path} line {rows.line_num:,}"
            yield place, tuple(check(row[names.index(field)], place, field) for field in fields)
    except csv.Error as error:
        raise UserError(f"{path} line {rows.line_num:,} is no CSV ({error}): mend or drop it") from error


def _one_document(pieces: Iterator[str]) -> Iterator[Batch]:
    """A file as one document; none if there is nothing but blanks in it."""
    blank, last = "", None
    for piece in pieces:
        if last is None and not piece.strip():
            blank += piece
            continue
        if last is not None:
            yield [last], False
        last, blank = blank + piece, ""
    if last is not None:
        yield [last], True


def _gather(texts: Iterator[str]) -> Iterator[Batch]:
    """Records as batches; those with nothing but blanks are left away."""
    batch, size = [], 0
    for text in texts:
        if not text.strip():
            continue
        batch.append(text)
        size += len(text)
        if size > READ_BYTES:
            yield batch, True
            batch, size = [], 0
    if batch:
        yield batch, True


def _join(batches: Iterator[Batch]) -> Iterator[Batch]:
    """All documents as one; each begins on a new line."""
    found = False
    for texts, whole in batches:
        for i, text in enumerate(texts):
            ends, found = whole or i < len(texts) - 1, True
            yield [text + "\n" if ends and not text.endswith("\n") else text], False
    if found:
        yield [""], True


def _cut(batches: Iterator[Batch], ends: re.Pattern) -> Iterator[Batch]:
    """Documents cut where ends fits, which stays with what is before it; their joined text stays the same."""
    rest, is_open = "", False  # is_open: a part of the document that rest belongs to is already gone
    for texts, whole in batches:
        cut = []
        for i, text in enumerate(texts):
            text, rest = rest + text, ""
            places = [0, *(match.end() for match in ends.finditer(text))]
            if len(places) > 1 and not is_open and not cut and not text[: places[1]].strip():
                del places[1]  # blank lines at the beginning are no document
            while len(places) > 1 and not text[places[-1] :].strip():
                places.pop()  # blanks at the end belong to the last document, and may go on
            if whole or i < len(texts) - 1:
                places.append(len(text))
            else:
                rest = text[places[-1] :]
            cut += [text[a:b] for a, b in zip(places, places[1:])]
        if cut:
            yield cut, True
            is_open = False
        if len(rest) > READ_BYTES:  # a document longer than a piece
            keep = len(rest) - len(rest.rstrip())
            yield [rest[: len(rest) - keep]], False
            rest, is_open = rest[len(rest) - keep :], True


class _NoDigest:
    """Takes in nothing."""

    def update(self, content: bytes):
        pass


@dataclass(frozen=True)
class Texts:
    """Documents that are in memory, with the interface of Files."""

    texts: list[str]
    parted = False

    @property
    def size(self) -> int:
        return sum(map(len, self.texts))

    def stamp(self) -> list[str]:
        return self.texts

    def batches(self, on_bytes: Callable[[int], None] = lambda n: None, digest=None) -> Iterator[Batch]:
        for text in self.texts:
            if digest is not None:
                digest.update(text.encode("utf-8"))
            on_bytes(len(text))
            yield [text], True
