"""Read documents from text, JSON, CSV and Parquet files of any size, including compressed files and archives.

By default, each text file or record is one document. It can also be split into one document per line or paragraph.
Line endings become \\n, and a byte-order mark is removed. Content that isn't text is reported with its location.

    files = Files(find_files("poems/")[0])
    for text, is_end in files.read_documents(): ...  # in order; long documents come in several parts
    for location, (question, answer) in Files(["qa.csv"]).records("question", "answer"): ...
"""

import codecs
import contextlib
import csv
import dataclasses
import glob
import io
import itertools
import json
import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Callable, Iterable, Iterator, Literal, Sequence

from configurator import UserError
from dongpt.text.archives import Member, is_archive, read_members
from dongpt.text.compressed import CHUNK_BYTES, COMPRESSION_SUFFIXES, file_suffixes
from dongpt.text.file_kinds import looks_like_json
from dongpt.text.json_values import read_json_values
from dongpt.text.template import is_valid_unicode

TEXT_SUFFIXES = (".txt", ".md", ".jsonl", ".ndjson", ".csv", ".parquet")  # read from a folder or an archive
FOLDER_SUFFIXES = (*TEXT_SUFFIXES, ".epub")
RECORD_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".parquet", ".json", ".tsv")  # the last two only if named explicitly
CSV_DELIMITERS = {".csv": ",;\t|", ".tsv": "\t,;|"}  # in the order in which they are tried
UNQUOTE_TSV = (  # command that writes TSV without quoting as CSV
    'python -c "import csv, sys; csv.writer(sys.stdout).writerows(csv.reader(sys.stdin,'
    " 'excel-tab', quoting=3))\" <FILE.tsv >FILE.csv"
)
BLANK = "blank documents"  # a key of Files.n_left_out
MAX_CSV_HEADER_CHARS = 2**20
MAX_CSV_FIELD_CHARS = 2**27  # a longer field is a sign of a missing quotation mark
PARQUET_BATCH_BYTES = 2**24  # of text read at a time, at least one row
# files that donGPT's programs write to a data folder
DATA_FILE_PATTERN = re.compile(
    r"((train|val)(_\d{3,})?(\.mask)?\.bin|val\.ids|(meta|preparing)\.json)(\.part|\.new)?"
    r"|preparing\.lock|explore\.png|word2vec\.(npy|png)"
)
VALIDATION_NAME = re.compile(r"(?<![a-z])(dev|val|valid|validation|test)(?![a-z])")
BLANK_LINES_PATTERN = re.compile(r"\n(?:[ \t]*\n)+")
LINE_END_PATTERN = re.compile(r"\n(?:[ \t]*\n)*")
TextPart = tuple[str, bool]  # (text, whether it ends its document)
Document = Literal["file", "line", "blank", "none"]
Progress = Callable[[int], None]


def find_files(
    input_path: str, option: str = "--input", suffixes: tuple[str, ...] = FOLDER_SUFFIXES
) -> tuple[list[str], int]:
    """Return (sorted paths, number of skipped files) for a file, a folder or a glob pattern.

    Folders are searched recursively for files with one of the suffixes. If no file is found, raises a UserError that
    mentions option.
    """
    if os.path.isfile(input_path):
        return [input_path], 0
    if os.path.isdir(input_path):
        all_paths = [os.path.join(folder, name) for folder, _, names in os.walk(input_path) for name in names]
        is_hidden = re.compile(r"(^|[/\\])\.").search
        all_paths = [p for p in all_paths if os.path.isfile(p) and not is_hidden(os.path.relpath(p, input_path))]
        paths = [path for path in all_paths if file_suffixes(path)[0] in suffixes]
        packed_suffixes = " ".join(COMPRESSION_SUFFIXES)
        problem = f"no file name in it ends in {' '.join(suffixes)} (optionally followed by {packed_suffixes})"
        if any(path.endswith(".arrow") for path in all_paths):
            name = f"hf:{os.path.abspath(input_path)}"
            problem += f"; if save_to_disk() wrote it, data/prepare.py reads it as --input={name}"
        elif named := [path for path in all_paths if file_suffixes(path)[0] in RECORD_SUFFIXES]:
            problem += f"; to read {min(named)}, pass its path"
    else:
        all_paths = [path for path in glob.glob(input_path, recursive=True) if os.path.isfile(path)]
        paths = all_paths
        problem = "no such file or folder exists, and no file matches this pattern"
    paths = [path for path in paths if not DATA_FILE_PATTERN.fullmatch(os.path.basename(path))]
    if not paths:
        remedy = f"pass {option}=PATH, where PATH is a text file or a folder"
        raise UserError(f"no text was found at {input_path} ({problem}): {remedy}")
    return sorted(paths), len(all_paths) - len(paths)


@dataclass(frozen=True)
class Files:
    """Input files and how to split them into documents.

    Methods call on_progress with the number of bytes read since the last call and update digest, a hashlib object, with
    the content. For content that isn't text, they raise a UserError that gives the location.
    """

    paths: list[str]
    document: Document = "file"  # document unit: a file or record, a line, a paragraph (blank), or everything (none)
    field: str = "text"  # name of the field that contains the text in JSON, CSV and Parquet files
    encoding: str = "utf-8"
    errors: str = "strict"  # how to handle bytes that are not valid in this encoding, as in bytes.decode()
    option: str = "--field"  # command-line option for the field names, used in error messages
    raw: bool = False  # keep NULs and line endings in records, instead of rejecting NULs and converting line endings
    separator: str = ""  # text of the lines that end documents, which are left out; "" if there are no such lines
    needs_separator: bool = True  # whether it is an error if no line consists of the separator
    # counts of what the last pass left out: blank documents (key BLANK), and skipped members (key: path of the archive)
    n_left_out: Counter[str] = dataclasses.field(default_factory=Counter, repr=False, compare=False)
    # members of archives read so far whose names suggest a validation or test text
    validation_names: set[str] = dataclasses.field(default_factory=set, repr=False, compare=False)

    @property
    def size(self) -> int:
        """The total size of the files in bytes."""
        return sum(os.path.getsize(path) for path in self.paths)

    @property
    def has_separators(self) -> bool:
        """True if no end token is needed because there is only one document or line ends separate the documents."""
        is_one_text = len(self.paths) == 1 and not self._has_members(self.paths[0])
        return self.document == "none" or self.document != "file" and is_one_text

    def fingerprint(self) -> list[tuple[int, int]]:
        """Return the size and modification time of each file, to detect changes."""
        return [(status.st_size, status.st_mtime_ns) for status in map(os.stat, self.paths)]

    def read_documents(self, on_progress: Progress = lambda n: None, digest=None) -> Iterator[TextPart]:
        """Yield all documents in order, except blank ones, in parts of at most about CHUNK_BYTES characters.

        A part is longer only if it is a single record or line.
        """
        self.n_left_out.clear()
        parts: Iterator[TextPart]
        parts = (part for path in self.paths for part in self.read_file(path, on_progress, digest))
        if self.separator:
            parts = _split_at_lines(parts, self.separator, self.paths[0] if self.needs_separator else "")
        parts = _skip_blanks(parts, self.n_left_out)
        if self.document == "none":
            return _join_documents(parts)
        if self.document == "file":
            return parts
        return _split_at_separator(parts, LINE_END_PATTERN if self.document == "line" else BLANK_LINES_PATTERN)

    def read_file(self, path: str, on_progress: Progress = lambda n: None, digest=None) -> Iterator[TextPart]:
        """Yield the documents in one file, which are its records or the whole file. Includes blank documents."""
        if file_suffixes(path)[0] == ".parquet":
            records = replace(self, paths=[path]).records(self.field, on_progress=on_progress, digest=digest)
            yield from ((text, True) for _, (text,) in records)
            return
        for member in self._members(path, on_progress):
            if member.suffix in RECORD_SUFFIXES:
                yield from ((text, True) for _, (text,) in self._read_records(member, (self.field,), digest))
                continue
            text = ""
            for chunk in self._decode(member, digest):
                if text:
                    yield text, False
                text = chunk
            yield text, True

    def count(self, path: str) -> int:
        """Return the number of documents in one file, including blank ones."""
        if file_suffixes(path)[0] == ".parquet":
            with open_parquet(path) as file:
                return file.metadata.num_rows
        return sum(is_end for _, is_end in self.read_file(path)) if self._has_members(path) else 1

    def records(
        self, *fields: str, on_progress: Progress = lambda n: None, digest=None, labels: tuple[str, ...] = ()
    ) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yield (location, values of the fields) for each record, such as ("FILE line 2", ("question", "answer")).

        Fields listed in labels may have any type and are converted to strings.
        """
        for path in self.paths:
            if file_suffixes(path)[0] == ".parquet":
                yield from self._check_records(_read_parquet(path, fields, self.option, digest), fields, labels)
                on_progress(os.path.getsize(path))
                continue
            for member in self._members(path, on_progress):
                yield from self._read_records(member, fields, digest, labels)

    def members(
        self, path: str, suffixes: tuple[str, ...], on_progress: Progress = lambda n: None, digest=None
    ) -> Iterator[tuple[str, str, Iterator[str]]]:
        """Yield (location, suffix, chunks of text) for a file, or for the files in an archive with these suffixes."""
        for member in self._members(path, on_progress, suffixes):
            yield member.location, member.suffix, self._decode(member, digest)

    def read_chunks(self, path: str, on_progress: Progress = lambda n: None, digest=None) -> Iterator[str]:
        """Yield the text of one file in chunks, after checking it and converting line endings to \\n."""
        for member in self._members(path, on_progress):
            if member.location != path:
                raise UserError(f"{path} is an archive: unpack it, and pass the path of one of its files")
            yield from self._decode(member, digest)

    def _has_members(self, path: str) -> bool:
        """Return True if a file may hold several documents: records, or the members of an archive."""
        return file_suffixes(path)[0] in RECORD_SUFFIXES or is_archive(path)

    def _members(self, path: str, on_progress: Progress, suffixes: tuple[str, ...] = TEXT_SUFFIXES) -> Iterator[Member]:
        """Yield the texts in an archive, or the file itself."""

        def is_wanted(name: str) -> bool:
            is_text = file_suffixes(name)[0] in suffixes and file_suffixes(name)[0] != ".parquet"
            if is_text and VALIDATION_NAME.search(name.lower()):
                self.validation_names.add(f"{path}/{name}")
            return is_text

        def count_skipped():
            self.n_left_out[path] += 1

        return read_members(path, is_wanted, on_progress, count_skipped)

    def _read_records(
        self, member: Member, fields: tuple[str, ...], digest, labels: tuple[str, ...] = ()
    ) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yield the records of a file or member, as records() does."""
        location, suffix, chunks = member.location, member.suffix, self._decode(member, digest)
        if suffix not in RECORD_SUFFIXES:
            raise UserError(f"{location} has no records: use a file whose name ends in {' '.join(RECORD_SUFFIXES)}")
        if suffix in CSV_DELIMITERS:
            records = _read_csv(location, fields, self.option, split_lines(chunks), CSV_DELIMITERS[suffix])
        elif suffix == ".json":
            records = _read_json(read_json_values(chunks, location), fields, self.option)
        else:
            records = _read_json_lines(location, fields, self.option, split_lines(chunks))
        return self._check_records(records, fields, labels)

    def _check_records(
        self, records: Iterable["Record"], fields: tuple[str, ...], labels: tuple[str, ...]
    ) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yield the records with all values converted to text, and null to ""."""
        for location, values in records:
            texts = [
                str(v) if n in labels else "" if v is None else check_text(v, location, n, self.raw)
                for n, v in zip(fields, values)
            ]
            yield location, tuple(texts)

    def _decode(self, member: Member, digest) -> Iterator[str]:
        """Yield the text of a file or member, as read_chunks() does."""
        path, is_ascii, utf8_decoder, n_continuation_bytes = member.location, True, None, 0
        decoder, encoding, offset, line_ends = None, "", 0, io.IncrementalNewlineDecoder(None, translate=True)
        for chunk in itertools.chain(member.chunks, [b""]):
            if digest is not None:
                digest.update(chunk)
            if decoder is None:
                encoding, offset = _detect_encoding(chunk, self.encoding)
                if not offset and not codecs.lookup(encoding).name.startswith("utf-8"):
                    utf8_decoder = codecs.getincrementaldecoder("utf-8")()
                decoder, chunk = codecs.getincrementaldecoder(encoding)(self.errors), chunk[offset:]
            n_pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                is_cut = not chunk and not (is_ascii and encoding == "utf-8")  # else it may be in another encoding
                raise _decode_error(path, error, offset - n_pending + error.start, is_cut) from error
            except UnicodeError as error:  # UTF-16 or UTF-32 without a byte-order mark
                remedy = f"pass --encoding={encoding}-le or --encoding={encoding}-be"
                raise UserError(f"{path} has no byte-order mark ({error}): {remedy}") from error
            if "\0" in text:
                at = f" at byte {offset + chunk.index(0):,}" if encoding == "utf-8" else ""
                remedy = "remove the file, or pass its encoding, for example --encoding=utf-16-le"
                raise UserError(f"{path} contains a NUL{at} and is not {encoding.upper()} text: {remedy}")
            if encoding != "utf-8" and not is_valid_unicode(text):  # possible in utf-7 and unicode_escape
                raise UserError(f"{path} contains an unpaired surrogate: convert it to UTF-8")
            if utf8_decoder:
                try:
                    n_continuation_bytes += len(chunk) - len(utf8_decoder.decode(chunk, final=not chunk))
                except UnicodeDecodeError:
                    utf8_decoder = None
            offset, is_ascii = offset + len(chunk), is_ascii and text.isascii()
            if text := line_ends.decode(text, final=not chunk):
                yield text
        if utf8_decoder and n_continuation_bytes:
            remedy = "omit --encoding, or if other files need it, save this one as UTF-8 with a byte-order mark"
            raise UserError(f"{path} is UTF-8, not {encoding}: {remedy}")


def split_lines(chunks: Iterable[str]) -> Iterator[str]:
    """Yield the lines, including line endings, of a text that comes in chunks."""
    line_parts: list[str] = []  # of the line that the next chunk continues
    for chunk in chunks:
        *full_lines, last = chunk.split("\n")
        if full_lines and line_parts:
            full_lines[0] = "".join([*line_parts, full_lines[0]])
            line_parts = []
        yield from (line + "\n" for line in full_lines)
        if last:
            line_parts.append(last)
    if line_parts:
        yield "".join(line_parts)


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


def _decode_error(path: str, error: UnicodeDecodeError, offset: int, is_cut: bool) -> UserError:
    byte_name = f"0x{error.object[error.start]:02x}" if error.start < len(error.object) else "the end"
    other_characters = [c for c in error.object.decode("utf-8", "replace") if not c.isascii()]
    is_utf8 = error.encoding == "utf-8" and 2 * other_characters.count("\ufffd") <= len(other_characters)
    maybe_cp1252 = error.encoding == "utf-8" and error.object[error.start] not in b"\x81\x8d\x8f\x90\x9d"
    remedy = "pass --encoding=NAME" + ", such as cp1252 for Western European files from Windows" * maybe_cp1252
    problem = f"{path} is not {error.encoding.upper()} at byte {offset:,} ({byte_name})"
    if b"\0" in error.object and error.encoding == "utf-8":
        return UserError(f"{problem} and contains NULs: pass a text file, or --encoding=NAME, for example utf-16-le")
    if is_cut:
        return UserError(f"{problem}, where it ends inside a character: get the whole file, or delete the rest")
    if is_utf8:
        return UserError(f"{problem}, although other characters in it are valid UTF-8: correct this one, or {remedy}")
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
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


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
        raise UserError(f"{source} has no field {missing[0]!r}: pass {option}=NAME, where NAME is one of {choices}")
    if repeated := [field for field in fields if names.count(field) > 1]:
        raise UserError(f"{source} has several columns named {repeated[0]!r}: rename all but one of them")


def _read_json_lines(path: str, fields: tuple[str, ...], option: str, lines: Iterable[str]) -> Iterator[Record]:
    is_first = True
    for line_number, line in enumerate(lines, 1):
        if not line.isspace():
            if is_first and _continues(line):
                raise UserError(f"{path} is not one JSON object per line: rename it so that it ends in .json")
            is_first = False
            location = f"{path} line {line_number:,}"
            record = parse_json(line, location)
            yield location, _select_fields(record, location, fields, option)


def _continues(line: str) -> bool:
    """Return True if a line is an array of objects, or the start of JSON that continues on the next line."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(line.rstrip()) and line.rstrip().endswith(("{", "[", ","))
    except (ValueError, RecursionError):  # reported when it is read
        return False
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _read_json(values: Iterable[tuple[str, Any]], fields: tuple[str, ...], option: str) -> Iterator[Record]:
    for location, record in values:
        if isinstance(record, dict) and fields[0] not in record:
            lists = (key for key, value in record.items() if _is_list_of_records(value, fields, record))
            if key := next(lists, ""):
                problem = f"{location} has no field {fields[0]!r}, but a list of objects, {key!r}"
                raise UserError(f"{problem}: save only this list in the file")
        yield location, _select_fields(record, location, fields, option)


def _is_list_of_records(value: Any, fields: tuple[str, ...], record: dict[str, Any]) -> bool:
    """Return True for a list of objects with these fields, or of any objects if record contains no other text."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return False
    return set(fields).issubset(value[0]) or not any(isinstance(other, str) for other in record.values())


def _select_fields(record: Any, location: str, fields: tuple[str, ...], option: str) -> list[Any]:
    """Return the values of the fields of a JSON object. Raises UserError if record isn't one or lacks a field."""
    if not isinstance(record, dict):
        raise UserError(f'{location} is not a JSON object: each record must look like {{"{fields[0]}": "..."}}')
    try:
        return [record[field] for field in fields]
    except KeyError:
        _check_fields(location, fields, record, option)
        raise


def _csv_names(header: str, delimiter: str) -> list[str]:
    """Return the names in the header of a CSV file, or [] if the header is not valid with this delimiter."""
    try:
        return next(csv.reader(io.StringIO(header, newline=""), delimiter=delimiter, strict=True), [])
    except csv.Error:
        return []


def read_csv_rows(
    path: str, lines: Iterable[str], delimiters: str, is_fitting: Callable[[list[str]], bool]
) -> tuple[list[str], Iterator[tuple[str, list[str]]]]:
    """Return (names, iterator over (location, row)) for a CSV file. Rows may be empty, or have any number of fields.

    The delimiter is the first one that splits the header line into the expected names.
    """
    csv.field_size_limit(MAX_CSV_FIELD_CHARS)  # Python's default is too small for long documents
    lines, n_header_lines = iter(lines), 1
    header = next(lines, "")
    if declared := re.fullmatch(r'"?sep=(.)"?\s*', header):  # a line that Excel understands
        delimiters, n_header_lines, header = declared.group(1), 2, next(lines, "")
    while header.count('"') % 2 and (line := next(lines, "")):  # a quoted name with a line ending
        header, n_header_lines = header + line, n_header_lines + 1
        if len(header) > MAX_CSV_HEADER_CHARS:
            raise UserError(f"{path} line 1 is not valid CSV (a quotation mark is not closed): correct it")
    if (start := header.strip()) in ("[", "{") or looks_like_json(start.encode("utf-8", "replace")):
        suffix = ".jsonl" if start.endswith("}") else ".json"
        raise UserError(f"{path} contains JSON, not CSV: rename it so that it ends in {suffix}")
    named = {delimiter: _csv_names(header, delimiter) for delimiter in delimiters}
    fitting = [delimiter for delimiter, names in named.items() if is_fitting(names)]
    delimiter = fitting[0] if fitting else max(named, key=lambda delimiter: len(named[delimiter]))

    n_tabs = len(named[delimiter]) - 1 if delimiter == "\t" else 0  # in commas, text has lines that look like rows
    convert = "if quotation marks are text, convert the file with " + UNQUOTE_TSV

    def read_rows() -> Iterator[tuple[str, list[str]]]:
        rows, last_line, has_quoted_lines = csv.reader(lines, delimiter=delimiter, strict=True), 0, False
        try:
            for row in rows:
                location = f"{path} line {rows.line_num + n_header_lines:,}"
                if n_tabs and rows.line_num > last_line + 1 and not has_quoted_lines:
                    # without quoting, every line is a row; with quoting, rarely every line has that many tabs
                    has_quoted_lines = any(line.count("\t") != n_tabs for line in "\t".join(row).split("\n"))
                    if not has_quoted_lines:
                        problem = "quotation marks make one row of lines that are complete rows without them"
                        raise UserError(f"{location}: {problem}: {convert}, and otherwise without quoting=3")
                last_line = rows.line_num
                yield location, row
        except csv.Error as error:
            location = f"{path} line {rows.line_num + n_header_lines:,}"
            remedy = "correct or delete it" + (f", or {convert}" if n_tabs else "")
            raise UserError(f"{location} is not valid CSV ({error}): {remedy}") from error

    return named[delimiter], read_rows()


def _read_csv(
    path: str, fields: tuple[str, ...], option: str, lines: Iterable[str], delimiters: str
) -> Iterator[Record]:
    names, rows = read_csv_rows(path, lines, delimiters, set(fields).issubset)
    _check_fields(path, fields, names, option)
    columns, n_names = [names.index(field) for field in fields], len(names)
    for location, row in rows:
        if not row:
            continue
        if len(row) != n_names:
            raise UserError(f"{location} has {len(row)} columns, but line 1 has {n_names}: correct or delete it")
        yield location, [row[column] for column in columns]


def _read_parquet(path: str, fields: tuple[str, ...], option: str, digest) -> Iterator[Record]:
    with open_parquet(path) as file:
        _check_fields(path, fields, file.schema_arrow.names, option)
        for location, values in read_parquet_rows(path, file, fields, digest):
            yield location, [_decode_value(value, location, field) for value, field in zip(values, fields)]


def _read_row_group(file, number: int, fields: Sequence[str]) -> Iterator[Any]:
    """Yield batches of at most 256 rows and about PARQUET_BATCH_BYTES."""
    group = file.metadata.row_group(number)
    row_bytes = max(1, group.total_byte_size // max(1, group.num_rows))
    batch_size = max(1, min(256, PARQUET_BATCH_BYTES // row_bytes))
    return file.iter_batches(batch_size=batch_size, row_groups=[number], columns=list(fields))


def read_parquet_rows(path: str, file, fields: Sequence[str], digest) -> Iterator[tuple[str, tuple]]:
    """Yield (location, values of the fields) for each row of a Parquet file that open_parquet opened."""
    batches = (batch for number in range(file.num_row_groups) for batch in _read_row_group(file, number, fields))
    rows = (row for batch in batches for row in zip(*(batch.column(field).to_pylist() for field in fields)))
    for row_number, values in enumerate(rows, 1):
        if digest is not None:
            digest.update(repr(values).encode("utf-8"))
        yield f"{path} row {row_number:,}", values


def _decode_value(value: Any, location: str, field: str) -> Any:
    """Return a value from a Parquet file. UTF-8 text in a binary column is decoded."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"the field {field!r} is binary and not UTF-8 ({value[:20]!r}...)"
        raise UserError(f"{location}: {problem}: pass another field, or store the values as text") from error


@contextlib.contextmanager
def open_parquet(path: str) -> Iterator[Any]:
    """Open a Parquet file. Errors while reading it are converted to UserErrors."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _check_fields(path, [name for name in names if names.count(name) > 1], names, "")
            yield file
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read as Parquet ({str(error).splitlines()[0]}): create the file again"
        ) from error


# ----------------------------------------------------------------------------------------------------------------------
# splitting files and records into documents


def _skip_blanks(parts: Iterable[TextPart], n_left_out: Counter) -> Iterator[TextPart]:
    """Yield the parts of all documents that are not blank. The blank ones are counted in n_left_out."""
    leading_blanks, has_output = "", False  # for the current document: blank text not yet yielded; whether text was
    for text, is_end in parts:
        text, leading_blanks = leading_blanks + text, ""
        if has_output or text.strip():
            yield text, is_end
            has_output = not is_end
        elif is_end:
            n_left_out[BLANK] += 1
        else:
            leading_blanks = text


def _split_at_lines(parts: Iterable[TextPart], separator: str, path: str) -> Iterator[TextPart]:
    """End documents at lines that hold only the separator, and leave these lines out.

    path is the file in which the text starts. Unless it is empty, raises UserError if there is no such line.
    """
    separator_line = re.compile(rf"^[ \t]*{re.escape(separator.strip())}[ \t]*(?:\n|\Z)", re.MULTILINE)
    n_found, remainder = 0, ""  # the start of a line that the next part continues
    has_output, is_new_line = False, True  # whether a part of the document was yielded; whether remainder starts a line
    for text, is_end in parts:
        text, start = remainder + text, 0
        end = len(text) if is_end else text.rfind("\n") + 1  # of the complete lines
        for match in separator_line.finditer(text, 0, end):
            if match.start() > 0 or is_new_line:
                yield text[start : match.start()], True
                start, n_found, has_output = match.end(), n_found + 1, False
        remainder, is_new_line = text[max(start, end) :], is_new_line or end > 0
        if is_end:
            if has_output or start == 0 or text[start:].strip():
                yield text[start:], True
            has_output, is_new_line = False, True
            continue
        if start < end:
            yield text[start:end], False
            has_output = True
        if len(remainder) > CHUNK_BYTES:  # longer than any separator
            yield remainder, False
            remainder, has_output, is_new_line = "", True, False
    if path and not n_found:
        problem = f"no line of the text that starts in {path} consists of {separator!r}"
        raise UserError(f"{problem}: correct --separator, or omit it")


def _join_documents(parts: Iterable[TextPart]) -> Iterator[TextPart]:
    """Join all documents into one, starting each on a new line."""
    has_documents = False
    for text, is_end in parts:
        yield text + "\n" if is_end and not text.endswith("\n") else text, False
        has_documents = True
    if has_documents:
        yield "", True


def _split_at_separator(parts: Iterable[TextPart], separator: re.Pattern) -> Iterator[TextPart]:
    """Split documents after each separator, keeping all text. No resulting document consists only of whitespace."""
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
