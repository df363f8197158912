"""Read documents from text files, JSON lines, CSV and Parquet. Files may be larger than memory.

By default, each text file or record is one document. It can also be split into one document per line or paragraph.
Line endings become \\n, and a byte-order mark is removed. Content that isn't text is reported with its location.

    files = Files(find_files("poems/")[0])
    for text, is_end in files.read_documents(): ...  # in order; long documents come in several parts
    for location, (question, answer) in Files(["qa.csv"]).records("question", "answer"): ...
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

CHUNK_BYTES = 2**20  # chunk size for reading files
DECOMPRESSORS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
RECORD_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".parquet")
TEXT_SUFFIXES = (".txt", ".md", *RECORD_SUFFIXES)  # read if the input is a folder
# files that donGPT's programs write to a data folder
DATA_FILE_PATTERN = re.compile(
    r"((train|val)(_\d{3,})?(\.mask)?\.bin|val\.ids|(meta|preparing)\.json)(\.part|\.new)?"
    r"|preparing\.lock|explore\.png|word2vec\.(npy|png)"
)
BLANK_LINES_PATTERN = re.compile(r"\n(?:[ \t]*\n)+")
LINE_END_PATTERN = re.compile(r"\n(?:[ \t]*\n)*")
TextPart = tuple[str, bool]  # (text, whether it ends its document)
Document = Literal["file", "line", "blank", "none"]
Progress = Callable[[int], None]


def find_files(input_path: str, option: str = "--input") -> tuple[list[str], int]:
    """Return (sorted paths, number of skipped files) for a file, a folder or a glob pattern.

    Folders are searched recursively for files with TEXT_SUFFIXES. Raises UserError, which names option, if no file is
    found.
    """
    if os.path.isfile(input_path):
        return [input_path], 0
    if os.path.isdir(input_path):
        all_paths = [os.path.join(folder, name) for folder, _, names in os.walk(input_path) for name in names]
        is_hidden = re.compile(r"(^|[/\\])\.").search
        all_paths = [p for p in all_paths if os.path.isfile(p) and not is_hidden(os.path.relpath(p, input_path))]
        paths = [path for path in all_paths if file_suffixes(path)[0] in TEXT_SUFFIXES]
        problem = f"no file in it ends in {' '.join(TEXT_SUFFIXES)} (optionally followed by .gz .bz2 .xz)"
    else:
        all_paths = [path for path in glob.glob(input_path, recursive=True) if os.path.isfile(path)]
        paths = [path for path in all_paths if not DATA_FILE_PATTERN.fullmatch(os.path.basename(path))]
        problem = "it does not exist, and no file matches it as a pattern"
    if not paths:
        raise UserError(f"no text was found at {input_path} ({problem}): pass {option}=PATH of a text file or folder")
    return sorted(paths), len(all_paths) - len(paths)


def file_suffixes(path: str) -> tuple[str, str]:
    """Return the suffixes for a file's format and compression, such as (".txt", ".gz") or (".csv", "")."""
    stem, suffix = os.path.splitext(path.lower())
    return (os.path.splitext(stem)[1], suffix) if suffix in DECOMPRESSORS else (suffix, "")


@dataclass(frozen=True)
class Files:
    """Input files and how to split them into documents.

    Methods call on_progress with the number of bytes read since the last call and update digest, a hashlib object, with
    the content. They raise UserError, with the location, for content that isn't text.
    """

    paths: list[str]
    document: Document = "file"  # a document is a file or record, a line, a paragraph (blank), or everything (none)
    field: str = "text"  # name of the field with the text in JSON lines, CSV and Parquet
    encoding: str = "utf-8"
    option: str = "--field"  # command-line option for the field names, used in error messages
    raw: bool = False  # keep NULs and line endings in records, instead of rejecting NULs and converting line endings

    @property
    def size(self) -> int:
        """The total size of the files in bytes."""
        return sum(os.path.getsize(path) for path in self.paths)

    @property
    def has_separators(self) -> bool:
        """True if no end token is needed: there is only one document, or line ends separate the documents."""
        is_one_text = len(self.paths) == 1 and file_suffixes(self.paths[0])[0] not in RECORD_SUFFIXES
        return self.document == "none" or self.document != "file" and is_one_text

    def fingerprint(self) -> list[tuple[int, int]]:
        """Return the size and modification time of each file, to detect changes."""
        return [(status.st_size, status.st_mtime_ns) for status in map(os.stat, self.paths)]

    def read_documents(self, on_progress: Progress = lambda n: None, digest=None) -> Iterator[TextPart]:
        """Yield all documents in order, except blank ones, in parts of at most about CHUNK_BYTES characters.

        A part is longer only if it is a single record or line.
        """
        parts = _skip_blanks(part for path in self.paths for part in self.read_file(path, on_progress, digest))
        if self.document == "none":
            return _join_documents(parts)
        if self.document == "file":
            return parts
        return _split_at_separator(parts, LINE_END_PATTERN if self.document == "line" else BLANK_LINES_PATTERN)

    def read_file(self, path: str, on_progress: Progress = lambda n: None, digest=None) -> Iterator[TextPart]:
        """Yield the documents in one file, including blank ones: each record, or the whole file."""
        if file_suffixes(path)[0] in RECORD_SUFFIXES:
            records = replace(self, paths=[path]).records(self.field, on_progress=on_progress, digest=digest)
            yield from ((text, True) for _, (text,) in records)
            return
        text = ""
        for chunk in self.read_chunks(path, on_progress, digest):
            if text:
                yield text, False
            text = chunk
        yield text, True

    def count(self, path: str) -> int:
        """Return the number of documents in one file, including blank ones."""
        if file_suffixes(path)[0] == ".parquet":
            with _open_parquet(path) as file:
                return file.metadata.num_rows
        return sum(is_end for _, is_end in self.read_file(path)) if file_suffixes(path)[0] in RECORD_SUFFIXES else 1

    def records(
        self, *fields: str, on_progress: Progress = lambda n: None, digest=None, labels: tuple[str, ...] = ()
    ) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yield (location, values of the fields) for each record, such as ("FILE line 2", ("question", "answer")).

        Fields listed in labels may have any type and are converted to strings.
        """
        for path in self.paths:
            kind, lines = file_suffixes(path)[0], self.lines(path, digest=digest)
            if kind == ".parquet":
                records = _read_parquet(path, fields, self.option, digest)
            elif kind in RECORD_SUFFIXES:
                records = (_read_csv if kind == ".csv" else _read_json_lines)(path, fields, self.option, lines)
            else:
                raise UserError(f"{path} has no records: use a file whose name ends in {' '.join(RECORD_SUFFIXES)}")
            for location, values in records:
                texts = (
                    str(v) if n in labels else check_text(v, location, n, self.raw) for n, v in zip(fields, values)
                )
                yield location, tuple(texts)
            on_progress(os.path.getsize(path))

    def lines(self, path: str, on_progress: Progress = lambda n: None, digest=None) -> Iterator[str]:
        """Yield the lines of one file, including line endings."""
        partial_line = ""
        for chunk in self.read_chunks(path, on_progress, digest):
            *full_lines, partial_line = (partial_line + chunk).split("\n")
            yield from (line + "\n" for line in full_lines)
        if partial_line:
            yield partial_line

    def read_chunks(self, path: str, on_progress: Progress = lambda n: None, digest=None) -> Iterator[str]:
        """Yield the text of one file in chunks, after checking it and converting line endings to \\n."""
        decoder, encoding, offset, line_ends = None, "", 0, io.IncrementalNewlineDecoder(None, translate=True)
        is_compressed = bool(file_suffixes(path)[1])
        for chunk in _read_decompressed(path):
            if digest is not None:
                digest.update(chunk)
            if not is_compressed:
                on_progress(len(chunk))
            if decoder is None:
                encoding, offset = _detect_encoding(chunk, self.encoding)
                decoder, chunk = codecs.getincrementaldecoder(encoding)(), chunk[offset:]
            n_pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise _decode_error(path, error, offset - n_pending + error.start) from error
            except UnicodeError as error:  # UTF-16 or UTF-32 without a byte-order mark
                remedy = f"pass --encoding={encoding}-le or --encoding={encoding}-be"
                raise UserError(f"{path} has no byte-order mark ({error}): {remedy}") from error
            if "\0" in text:
                at = f" at byte {offset + chunk.index(0):,}" if encoding == "utf-8" else ""
                remedy = "remove the file, or pass its encoding, for example --encoding=utf-16-le"
                raise UserError(f"{path} contains a NUL{at} and is not {encoding.upper()} text: {remedy}")
            if not is_valid_unicode(text):  # possible in utf-7 and unicode_escape
                raise UserError(f"{path} contains an unpaired surrogate: convert it to UTF-8")
            offset += len(chunk)
            if text := line_ends.decode(text, final=not chunk):
                yield text
        if is_compressed:  # progress is counted in compressed bytes
            on_progress(os.path.getsize(path))


def _read_decompressed(path: str) -> Iterator[bytes]:
    """Yield the bytes of a file in chunks, followed by b""."""
    opener: Any = DECOMPRESSORS.get(file_suffixes(path)[1], open)
    try:
        with opener(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
            yield b""
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path} cannot be decompressed ({error}): it is damaged, or its name has the wrong suffix"
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): pass the path of a text file") from error


def _detect_encoding(first_bytes: bytes, encoding: str) -> tuple[str, int]:
    """Return (encoding, length of the byte-order mark) for a file that begins with first_bytes."""
    try:
        "".encode(encoding)
        codecs.getincrementaldecoder(encoding)
    except (LookupError, UnicodeError) as error:  # the codec "undefined" raises UnicodeError
        raise UserError(f"encoding={encoding} is unknown: try utf-8, cp1252 or utf-16") from error
    boms = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be"}
    # checked after UTF-32, because the UTF-32-LE mark starts with the UTF-16-LE mark
    boms |= {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
    return next(((name, len(bom)) for bom, name in boms.items() if first_bytes.startswith(bom)), (encoding, 0))


def _decode_error(path: str, error: UnicodeDecodeError, offset: int) -> UserError:
    byte_name = f"0x{error.object[error.start]:02x}" if error.start < len(error.object) else "the end"
    maybe_cp1252 = error.encoding == "utf-8" and error.object[error.start] not in b"\x81\x8d\x8f\x90\x9d"
    remedy = "pass --encoding=NAME" + ", such as cp1252 for Western European files from Windows" * maybe_cp1252
    problem = f"{path} is not {error.encoding.upper()} at byte {offset:,} ({byte_name})"
    return UserError(f"{problem}: convert it to UTF-8, or {remedy}")


# ----------------------------------------------------------------------------------------------------------------------
# records: each format yields (location, values of the fields)

Record = tuple[str, list[Any]]


def check_text(text, location: str, field: str, raw: bool = False) -> str:
    """Return the text of a record's field, with line endings converted to \\n. Raises UserError if it isn't text.

    raw=True leaves text unchanged, except that unpaired surrogates, which UTF-8 cannot encode, are replaced and null
    becomes "".
    """
    if raw and text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(
            f"{location}: the field {field!r} must be text, not {str(text)[:40]!r}: correct or delete the record"
        )
    if raw:
        return text if is_valid_unicode(text) else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if "\0" in text or not is_valid_unicode(text):
        problem = f"contains a NUL or an unpaired surrogate ({text[:40]!r}...)"
        raise UserError(f"{location}: the field {field!r} {problem}: correct or delete the record")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_json(line: str, location: str) -> Any:
    """Parse a line of JSON. Raises UserError if it is not valid."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{location} is not valid JSON ({getattr(error, 'msg', error)}): correct or delete the line"
        ) from error


def _check_fields(source: str, fields: Iterable[str], names: Iterable[str], option: str):
    """Raise UserError unless names contains all fields."""
    names = list(names)
    if missing := [field for field in fields if field not in names]:
        choices = ", ".join(map(repr, names[:20])) or "(there are none)"
        raise UserError(f"{source} has no field {missing[0]!r}: pass {option}=NAME, one of {choices}")


def _read_json_lines(path: str, fields: tuple[str, ...], option: str, lines: Iterable[str]) -> Iterator[Record]:
    for line_number, line in enumerate(lines, 1):
        if line.strip():
            location = f"{path} line {line_number:,}"
            record = parse_json(line, location)
            if not isinstance(record, dict):
                raise UserError(f'{location} is not a JSON object: each line must look like {{"{fields[0]}": "..."}}')
            _check_fields(location, fields, record, option)
            yield location, [record[field] for field in fields]


def _read_csv(path: str, fields: tuple[str, ...], option: str, lines: Iterable[str]) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)  # in characters; Python's default is too small for long documents
    rows = csv.reader(lines, strict=True)
    try:
        names = next(rows, [])
        _check_fields(path, fields, names, option)
        for row in filter(None, rows):
            location = f"{path} line {rows.line_num:,}"
            if len(row) != len(names):
                raise UserError(f"{location} has {len(row)} columns, but line 1 has {len(names)}: correct or delete it")
            yield location, [row[names.index(field)] for field in fields]
    except csv.Error as error:
        raise UserError(f"{path} line {rows.line_num:,} is not valid CSV ({error}): correct or delete it") from error


def _read_parquet(path: str, fields: tuple[str, ...], option: str, digest) -> Iterator[Record]:
    with _open_parquet(path) as file:
        _check_fields(path, fields, file.schema_arrow.names, option)
        batches = file.iter_batches(batch_size=256, columns=list(fields))
        rows = (row for batch in batches for row in zip(*(batch.column(field).to_pylist() for field in fields)))
        for row_number, values in enumerate(rows, 1):
            if digest is not None:
                digest.update(repr(values).encode("utf-8"))
            yield f"{path} row {row_number:,}", list(values)


@contextlib.contextmanager
def _open_parquet(path: str) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path} cannot be read as Parquet ({str(error).splitlines()[0]}): create the file again"
        ) from error


# ----------------------------------------------------------------------------------------------------------------------
# splitting files and records into documents


def _skip_blanks(parts: Iterable[TextPart]) -> Iterator[TextPart]:
    """Yield all parts except those of blank documents."""
    leading_blanks, has_output = "", False  # of the current document: initial whitespace; whether a part was yielded
    for text, is_end in parts:
        text, leading_blanks = leading_blanks + text, ""
        if has_output or text.strip():
            yield text, is_end
            has_output = not is_end
        elif not is_end:
            leading_blanks = text


def _join_documents(parts: Iterable[TextPart]) -> Iterator[TextPart]:
    """Join all documents into one, starting each on a new line."""
    has_documents = False
    for text, is_end in parts:
        yield text + "\n" if is_end and not text.endswith("\n") else text, False
        has_documents = True
    if has_documents:
        yield "", True


def _split_at_separator(parts: Iterable[TextPart], separator: re.Pattern) -> Iterator[TextPart]:
    """Split documents after each separator, keeping all text. No document consists of whitespace alone."""
    remainder, has_output = "", False  # has_output: whether a part of the current document was yielded
    for text, is_end in parts:
        text = remainder + text
        start, stop = 0 if has_output else len(text) - len(text.lstrip()), len(text.rstrip())
        cut_points = [0, *(match.end() for match in separator.finditer(text) if start < match.end() < stop)]
        yield from ((text[a:b], True) for a, b in zip(cut_points, cut_points[1:]))
        remainder, has_output = text[cut_points[-1] :], has_output and len(cut_points) == 1
        if is_end:
            yield remainder, True
            remainder, has_output = "", False
        elif len(remainder) > CHUNK_BYTES:  # a long document; trailing whitespace goes to the next part
            end = len(remainder.rstrip())
            yield remainder[:end], False
            remainder, has_output = remainder[end:], True


@dataclass(frozen=True)
class Texts:
    """Documents in memory, with the same interface as Files."""

    texts: list[str]
    has_separators = False

    @property
    def size(self) -> int:
        """The total number of characters."""
        return sum(map(len, self.texts))

    def fingerprint(self) -> list[str]:
        """Return the documents themselves."""
        return self.texts

    def read_documents(self, on_progress: Progress = lambda n: None, digest=None) -> Iterator[TextPart]:
        """See Files.read_documents."""
        for text in self.texts:
            if digest is not None:
                digest.update(text.encode("utf-8"))
            on_progress(len(text))
            yield text, True
