"""Read documents from files of many kinds, in pieces, so that a file may be larger than memory.

A text file is one document, or one per line, or one per paragraph; so is a record of JSON lines, CSV or Parquet.
Line ends become \\n and a byte-order mark is dropped. What isn't text is refused with its place.

    files = Files(find_files("poems/")[0])
    for text, ends in files.parts(): ...  # documents in order; one that is long comes in several parts
    for place, (question, answer) in Files(["qa.csv"]).records("question", "answer"): ...
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
from typing import Any, Callable, Iterable, Iterator, Literal

from configurator import UserError
from dongpt.text.template import is_valid_unicode

READ_BYTES = 2**20  # bytes read at a time
DECOMPRESS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
RECORDS = (".jsonl", ".ndjson", ".csv", ".parquet")
KNOWN = (".txt", ".md", *RECORDS)  # the endings of files that are taken from a folder
# files that a preparation or another of our programs leaves in a data folder
OURS = re.compile(
    r"((train|val)(_\d{3,})?(\.mask)?\.bin|val\.ids|(meta|preparing)\.json)(\.part|\.new)?"
    r"|preparing\.lock|explore\.png|word2vec\.(npy|png)"
)
BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")
LINE_ENDS = re.compile(r"\n(?:[ \t]*\n)*")
Part = tuple[str, bool]  # text, whether its document ends with it
Document = Literal["file", "line", "blank", "none"]
OnBytes = Callable[[int], None]


def find_files(given: str, option: str = "--input") -> tuple[list[str], int]:
    """(sorted paths, number of files left out) of a file, a folder with everything below it, or a pattern.

    From a folder only files of KNOWN kinds are taken. Raises UserError, naming the option, if there are none.
    """
    if os.path.isfile(given):
        return [given], 0
    if os.path.isdir(given):
        below = [os.path.join(folder, name) for folder, _, names in os.walk(given) for name in names]
        hidden = re.compile(r"(^|[/\\])\.")
        below = [path for path in below if os.path.isfile(path) and not hidden.search(os.path.relpath(path, given))]
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
    """The endings that tell a file's format and compression: (".txt", ".gz"), (".csv", "")."""
    stem, ending = os.path.splitext(path.lower())
    return (os.path.splitext(stem)[1], ending) if ending in DECOMPRESS else (ending, "")


@dataclass(frozen=True)
class Files:
    """Files, and how documents are found in them.

    on_bytes, where a method takes it, is told how many bytes of the files were used up; digest (of hashlib) is updated
    with what was read. Reading raises UserError, naming file and place, for what isn't text.
    """

    paths: list[str]
    document: Document = "file"  # file: a file or a record is one; line, blank: cut further; none: all is one
    field: str = "text"  # of the records of JSON lines, CSV and Parquet
    encoding: str = "utf-8"
    option: str = "--field"  # the command-line option that names the fields
    as_is: bool = False  # keep NULs and line ends of records, instead of refusing the former and changing the latter

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return sum(os.path.getsize(path) for path in self.paths)

    @property
    def parted(self) -> bool:
        """Whether the text itself separates its documents: lines or paragraphs of one file, or all is one."""
        one_text = len(self.paths) == 1 and kind_of(self.paths[0])[0] not in RECORDS
        return self.document == "none" or self.document != "file" and one_text

    def fingerprint(self) -> list[tuple[int, int]]:
        """Size and time of each file, to see whether one changes."""
        return [(status.st_size, status.st_mtime_ns) for status in map(os.stat, self.paths)]

    def parts(self, on_bytes: OnBytes = lambda n: None, digest=None) -> Iterator[Part]:
        """Yield the documents in order, without blank ones, in parts of about READ_BYTES characters at most unless a
        record or a line is longer."""
        parts = _without_blanks(part for path in self.paths for part in self.parts_of(path, on_bytes, digest))
        if self.document == "none":
            return _join(parts)
        if self.document == "file":
            return parts
        return _cut(parts, LINE_ENDS if self.document == "line" else BLANK_LINES)

    def parts_of(self, path: str, on_bytes: OnBytes = lambda n: None, digest=None) -> Iterator[Part]:
        """Yield the documents of one file, which are its records, or else the whole file; blank ones too."""
        if kind_of(path)[0] in RECORDS:
            records = replace(self, paths=[path]).records(self.field, on_bytes=on_bytes, digest=digest)
            yield from ((text, True) for _, (text,) in records)
            return
        text = ""
        for piece in self.pieces(path, on_bytes, digest):
            if text:
                yield text, False
            text = piece
        yield text, True

    def count(self, path: str) -> int:
        """Number of documents of one file, blank ones too."""
        if kind_of(path)[0] == ".parquet":
            with _open_parquet(path) as file:
                return file.metadata.num_rows
        return sum(ends for _, ends in self.parts_of(path)) if kind_of(path)[0] in RECORDS else 1

    def records(
        self, *fields: str, on_bytes: OnBytes = lambda n: None, digest=None, labels: tuple[str, ...] = ()
    ) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yield (place, texts of these fields) of every record, as in ("FILE line 2", ("question", "answer")).

        Of fields in labels any value is taken, as text.
        """
        for path in self.paths:
            kind, lines = kind_of(path)[0], self.lines(path, digest=digest)
            if kind == ".parquet":
                records = _parquet(path, fields, self.option, digest)
            elif kind in RECORDS:
                records = (_csv if kind == ".csv" else _json_lines)(path, fields, self.option, lines)
            else:
                raise UserError(f"{path} has no records: give a file that ends in {' '.join(RECORDS)}")
            for place, values in records:
                texts = (str(v) if n in labels else check_text(v, place, n, self.as_is) for n, v in zip(fields, values))
                yield place, tuple(texts)
            on_bytes(os.path.getsize(path))

    def lines(self, path: str, on_bytes: OnBytes = lambda n: None, digest=None) -> Iterator[str]:
        """Yield the lines of one file, with their ends."""
        rest = ""
        for piece in self.pieces(path, on_bytes, digest):
            *complete, rest = (rest + piece).split("\n")
            yield from (line + "\n" for line in complete)
        if rest:
            yield rest

    def pieces(self, path: str, on_bytes: OnBytes = lambda n: None, digest=None) -> Iterator[str]:
        """Yield the text of one file in pieces, checked, with line ends \\n."""
        decoder, encoding, place, line_ends = None, "", 0, io.IncrementalNewlineDecoder(None, translate=True)
        is_packed = bool(kind_of(path)[1])
        for piece in _decompressed(path):
            if digest is not None:
                digest.update(piece)
            if not is_packed:
                on_bytes(len(piece))
            if decoder is None:
                encoding, place = _detect_encoding(piece, self.encoding)
                decoder, piece = codecs.getincrementaldecoder(encoding)(), piece[place:]
            n_pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                raise _not_text(path, error, place - n_pending + error.start) from error
            except UnicodeError as error:  # UTF-16 and UTF-32 without a mark
                remedy = f"pass --encoding={encoding}-le or --encoding={encoding}-be"
                raise UserError(f"{path} has no byte-order mark ({error}): {remedy}") from error
            if "\0" in text:
                at = f" at byte {place + piece.index(0):,}" if encoding == "utf-8" else ""
                remedy = "leave it out, or pass --encoding=NAME of the encoding it has, such as utf-16-le"
                raise UserError(f"{path} has a NUL{at}: it is no text in {encoding.upper()}, {remedy}")
            if not is_valid_unicode(text):  # as utf-7 and unicode_escape can spell it
                raise UserError(f"{path} has half a surrogate pair: convert it to UTF-8")
            place += len(piece)
            if text := line_ends.decode(text, final=not piece):
                yield text
        if is_packed:  # only its size on the disk is known
            on_bytes(os.path.getsize(path))


def _decompressed(path: str) -> Iterator[bytes]:
    """Yield the bytes of a file in pieces; b"" comes last."""
    opener: Any = DECOMPRESS.get(kind_of(path)[1], open)
    try:
        with opener(path, "rb") as file:
            while piece := file.read(READ_BYTES):
                yield piece
            yield b""
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} cannot be unpacked ({error}): it is damaged or not what its name says") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): give the path of a text file") from error


def _detect_encoding(start: bytes, encoding: str) -> tuple[str, int]:
    """(encoding, length of the byte-order mark) of a file that starts with these bytes."""
    try:
        "".encode(encoding)
        codecs.getincrementaldecoder(encoding)
    except (LookupError, UnicodeError) as error:  # the latter from the codec "undefined"
        raise UserError(f"encoding={encoding} is not known: try utf-8, cp1252 or utf-16") from error
    marks = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be"}
    marks |= {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}  # after UTF-32: the marks overlap
    return next(((found, len(mark)) for mark, found in marks.items() if start.startswith(mark)), (encoding, 0))


def _not_text(path: str, error: UnicodeDecodeError, place: int) -> UserError:
    byte = f"0x{error.object[error.start]:02x}" if error.start < len(error.object) else "its end"
    is_windows = error.encoding == "utf-8" and error.object[error.start] not in b"\x81\x8d\x8f\x90\x9d"
    remedy = "pass --encoding=NAME of the encoding that it has" + ", such as cp1252 for Western Windows" * is_windows
    return UserError(
        f"{path} is not {error.encoding.upper()} at byte {place:,} ({byte}): convert it to UTF-8, or {remedy}"
    )


# ----------------------------------------------------------------------------------------------------------------------
# records: each format yields (place, values of the fields)

Record = tuple[str, list[Any]]


def check_text(text, place: str, field: str, as_is: bool = False) -> str:
    """The text of a record's field, with line ends \\n; as it is, but for halves of surrogate pairs, which UTF-8 cannot
    have, and null, which is empty. Raises UserError if it isn't text."""
    if as_is and text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{place}: {field!r} of this record is no text but {str(text)[:40]!r}: mend or drop it")
    if as_is:
        return text if is_valid_unicode(text) else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if "\0" in text or not is_valid_unicode(text):
        problem = f"has a NUL or half a surrogate pair ({text[:40]!r}...)"
        raise UserError(f"{place}: {field!r} of this record {problem}: mend or drop it")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_json(line: str, place: str) -> Any:
    """The value of a line of JSON. Raises UserError if it isn't JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is no JSON ({getattr(error, 'msg', error)}): mend or drop the line") from error


def _check_fields(where: str, fields: Iterable[str], found: Iterable[str], option: str):
    """Raise UserError unless all fields are among those found."""
    found = list(found)
    if lacking := [field for field in fields if field not in found]:
        names = ", ".join(map(repr, found[:20])) or "none there"
        raise UserError(f"{where} has no field {lacking[0]!r}: pass {option}=NAME, one of {names}")


def _json_lines(path: str, fields: tuple[str, ...], option: str, lines: Iterable[str]) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            place = f"{path} line {number:,}"
            record = parse_json(line, place)
            if not isinstance(record, dict):
                raise UserError(f'{place} is no object: lines must be like {{"{fields[0]}": "..."}}')
            _check_fields(place, fields, record, option)
            yield place, [record[field] for field in fields]


def _csv(path: str, fields: tuple[str, ...], option: str, lines: Iterable[str]) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)  # characters; Python's default refuses long documents
    rows = csv.reader(lines, strict=True)
    try:
        names = next(rows, [])
        _check_fields(path, fields, names, option)
        for row in filter(None, rows):
            place = f"{path} line {rows.line_num:,}"
            if len(row) != len(names):
                raise UserError(f"{place} has {len(row)} columns, the first line has {len(names)}: mend or drop it")
            yield place, [row[names.index(field)] for field in fields]
    except csv.Error as error:
        raise UserError(f"{path} line {rows.line_num:,} is no CSV ({error}): mend or drop it") from error


def _parquet(path: str, fields: tuple[str, ...], option: str, digest) -> Iterator[Record]:
    with _open_parquet(path) as file:
        _check_fields(path, fields, file.schema_arrow.names, option)
        batches = file.iter_batches(batch_size=256, columns=list(fields))
        rows = (row for batch in batches for row in zip(*(batch.column(field).to_pylist() for field in fields)))
        for number, values in enumerate(rows, 1):
            if digest is not None:
                digest.update(repr(values).encode("utf-8"))
            yield f"{path} row {number:,}", list(values)


@contextlib.contextmanager
def _open_parquet(path: str) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet ({str(error).splitlines()[0]}): make it again") from error


# ----------------------------------------------------------------------------------------------------------------------
# documents from parts of files and records


def _without_blanks(parts: Iterable[Part]) -> Iterator[Part]:
    """The parts without documents that are blank."""
    start, is_open = "", False  # start: of a document, blank so far; is_open: part of the document was yielded already
    for text, ends in parts:
        text, start = start + text, ""
        if is_open or text.strip():
            yield text, ends
            is_open = not ends
        elif not ends:
            start = text


def _join(parts: Iterable[Part]) -> Iterator[Part]:
    """All documents as one; each starts on a new line."""
    found = False
    for text, ends in parts:
        yield text + "\n" if ends and not text.endswith("\n") else text, False
        found = True
    if found:
        yield "", True


def _cut(parts: Iterable[Part], separator: re.Pattern) -> Iterator[Part]:
    """Documents cut after each separator; joined they are the same text. Blanks around them start no document."""
    rest, is_open = "", False  # is_open: part of the document that rest belongs to was yielded already
    for text, ends in parts:
        text = rest + text
        first, last = 0 if is_open else len(text) - len(text.lstrip()), len(text.rstrip())
        places = [0, *(match.end() for match in separator.finditer(text) if first < match.end() < last)]
        yield from ((text[a:b], True) for a, b in zip(places, places[1:]))
        rest, is_open = text[places[-1] :], is_open and len(places) == 1
        if ends:
            yield rest, True
            rest, is_open = "", False
        elif len(rest) > READ_BYTES:  # a document longer than a piece; the blanks at its end may be followed by text
            end = len(rest.rstrip())
            yield rest[:end], False
            rest, is_open = rest[end:], True


@dataclass(frozen=True)
class Texts:
    """Documents in memory, with the interface of Files."""

    texts: list[str]
    parted = False

    @property
    def size(self) -> int:
        """Characters."""
        return sum(map(len, self.texts))

    def fingerprint(self) -> list[str]:
        """The texts themselves."""
        return self.texts

    def parts(self, on_bytes: OnBytes = lambda n: None, digest=None) -> Iterator[Part]:
        """As Files.parts."""
        for text in self.texts:
            if digest is not None:
                digest.update(text.encode("utf-8"))
            on_bytes(len(text))
            yield text, True
