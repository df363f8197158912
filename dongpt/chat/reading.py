"""Read conversations from files and archives: JSON, JSON lines, CSV, Parquet and tagged text.

    dialogues = Dialogues(Files(["chats.json"]))
    for conversation in dialogues.read(): ...      # [("user", "Hello", True), ("assistant", "Hello!", True)]

A file is JSON if it starts with { or [, CSV or Parquet if its extension says so, and tagged text otherwise.
records.py describes the forms of their records.
"""

import csv
import json
import os
import re
from dataclasses import dataclass, replace
from itertools import chain, groupby
from typing import Any, Iterable, Iterator, Sequence

from configurator import UserError
from dongpt.chat import records
from dongpt.chat.parsing import join_messages, join_pairs, read_json, read_tagged
from dongpt.chat.records import Form, Messages, Record, RecordError
from dongpt.chat.survey import Survey, display
from dongpt.text import documents
from dongpt.text.documents import Files, Progress
from dongpt.text.template import is_valid_unicode

LINE_SUFFIXES = (".jsonl", ".ndjson")
JSON_SUFFIXES = (".json", *LINE_SUFFIXES)
CHAT_SUFFIXES = (".txt", *documents.RECORD_SUFFIXES)  # read from a folder or an archive
is_about_files = re.compile(r"(.*[/\\])?(readme|licen[cs]e|copying|notice|changelog)\b[^/\\]*", re.IGNORECASE).fullmatch
TAGGED_FORM = Form("tagged text (<bot>, <human>)")


@dataclass(frozen=True)
class Dialogues:
    """The conversations in a set of files."""

    files: Files
    user: str = "user"  # the key or column with the questions
    assistant: str = "assistant"  # the key or column with the answers
    conversation: str = ""  # adjacent questions and answers with the same value here form a conversation
    skip_broken: bool = False  # skip broken records instead of rejecting the file

    def read(
        self, on_progress: Progress = lambda n: None, digest=None, survey: Survey | None = None
    ) -> Iterator[Messages]:
        """Yield the conversations in order, and count them in survey.

        Broken records are only counted. Without a survey, they raise UserError with the location, unless skip_broken.
        """
        is_strict, survey = survey is None and not self.skip_broken, survey or Survey()
        self.files.n_left_out.clear()
        for path in self.files.paths:
            for location, conversation in self._read_file(path, survey, on_progress, digest):
                if not isinstance(conversation, RecordError):
                    survey.add_conversation(conversation)
                    yield conversation
                elif is_strict:
                    raise UserError(f"{location}: {conversation}")
                else:
                    survey.add_broken(location, conversation)

    def _read_file(self, path: str, survey: Survey, *progress) -> Iterator[tuple[str, Messages | RecordError]]:
        """Yield (location, conversation) of a file, or of the files in an archive."""
        if documents.file_suffixes(path)[0] == ".parquet":
            yield from self._join_records(path, self._read_parquet(path, survey, *progress), survey)
            return
        # a byte that is not in the encoding breaks only its record
        files = replace(self.files, errors="surrogateescape") if self.skip_broken else self.files
        for location, suffix, chunks in files.members(path, CHAT_SUFFIXES, *progress):
            damage = list[bool]()  # not empty if bytes could not be decoded
            chunks = _watch(chunks, damage) if self.skip_broken else chunks
            head = next(chunks, "")
            chunks = chain([head], chunks)
            if suffix in documents.CSV_DELIMITERS:
                values = self._read_csv(location, suffix, chunks)
                yield from self._join_records(location, _check_bytes(values, damage), survey)
            elif suffix in JSON_SUFFIXES or head.lstrip().startswith(("[", "{")):
                values = read_json(chunks, location, suffix in LINE_SUFFIXES, self._named, self.conversation)
                yield from self._join_records(location, _check_bytes(values, damage), survey)
            elif is_about_files(location) and (location != path or len(self.files.paths) > 1):
                self.files.n_left_out[path if location != path else os.path.dirname(path)] += 1
            else:
                yield from _read_dialogues(location, chunks, survey)

    def _join_records(
        self, path: str, values: Iterable[Record], survey: Survey
    ) -> Iterator[tuple[str, Messages | RecordError]]:
        """Yield (location, conversation) for each record, or for each run with the same self.conversation."""
        if not self.conversation:
            names = self._names
            named_values = ((location, _normalize_keys(record, names)) for location, record in values)
            yield from (self._join(path, [item], survey) for item in named_values)
            return
        for _, group in groupby(self._with_names(values), lambda item: item[0]):
            yield self._join(path, (record for _, record in group), survey)

    def _with_names(self, values: Iterable[Record]) -> Iterator[tuple[str | int, Record]]:
        """Yield (name of the conversation, record). If it is blank, the name is the record's number.

        A record that cannot be read, or that lacks the field self.conversation, may belong to the conversation before
        or after it. Therefore, both get an error.
        """
        name: str | int = -1
        is_lost = False  # whether the conversation of the record before is not known
        for number, (location, record) in enumerate(values):
            record = _normalize_keys(record, self._names)
            holder = record[0] if isinstance(record, list) and record else record
            found = isinstance(holder, dict) and records.find_name(holder, self.conversation)
            is_blank = isinstance(record, dict) and self.conversation in record
            own_name = record.conversation if isinstance(record, RecordError) else found[1] if found else ""
            old_name, name = name, own_name or (name if isinstance(name, str) and not is_blank else number)
            if is_lost and name != old_name:
                problem = "the record before it, which cannot be read, may be part of the same conversation"
                yield name, (location, RecordError("an unreadable record before them", problem))
            is_lost = not (record.has_name if isinstance(record, RecordError) else own_name or is_blank)
            yield name, (location, record)

    def _join(self, path: str, group: Iterable[Record], survey: Survey) -> tuple[str, Messages | RecordError]:
        """Return the conversation of records with the location of the first record, or of the broken one."""
        conversation: Messages = []
        first_location = ""
        for location, record in group:
            first_location = first_location or location
            try:
                if isinstance(record, RecordError):
                    raise record
                form, messages = records.to_conversation(record, self.user, self.assistant)
                is_named = (
                    self.conversation and isinstance(record, list) and records.find_name(record[0], self.conversation)
                )
                if self.conversation and not form.is_pair and not is_named:
                    option = f"--conversation={self.conversation}"
                    raise UserError(f"{location}: {form.name} cannot be combined with other records: omit {option}")
                if self.conversation and not is_named and self.conversation not in record:
                    raise RecordError("missing fields", f"there is no field {self.conversation!r} (--conversation)")
                if self.conversation:
                    form = form._replace(used=(*form.used, self.conversation))
                if conversation and messages[0][0] == "system" and messages.pop(0) != conversation[0]:
                    problem = f"a different system message from the first record with this {self.conversation}"
                    raise RecordError("two system messages", problem)
            except RecordError as error:
                return location, error
            survey.add_form(path, form, record)
            conversation += messages
        return first_location, conversation

    def _read_csv(self, path: str, suffix: str, chunks: Iterable[str]) -> Iterator[Record]:
        """Yield the rows of a CSV file as dicts, or as lists of dicts if each row is one message."""

        def is_fitting(columns: list[str]) -> bool:
            return not records.find_missing(columns, *self._names)

        lines, delimiters = documents.split_lines(chunks), documents.CSV_DELIMITERS[suffix]
        columns, rows = documents.read_csv_rows(path, lines, delimiters, is_fitting)
        values = _read_rows(rows, self._check_columns(path, columns))
        try:
            yield from join_messages(values, self._named, self.conversation)
        except UserError as error:
            if isinstance(error.__cause__, csv.Error) and self.skip_broken:
                problem = "--skip_broken does not help, because it is not clear where the next row begins"
                raise UserError(f"{error}; {problem}") from error
            raise

    def _read_parquet(self, path: str, survey: Survey, on_progress: Progress, digest) -> Iterator[Record]:
        """Yield the rows of a Parquet file as dicts of the relevant columns, or as lists if each row is one message."""
        with documents.open_parquet(path) as file:
            columns = file.schema_arrow.names
            names = self._check_columns(path, columns)
            is_messages = records.has_message_keys(names, self._named)  # in which any column may name the conversation
            wanted = [*names] if is_messages else records.find_wanted(names, *self._names)
            survey.add_unused(path, (column for column, name in zip(columns, names) if name not in wanted))
            read_columns = [columns[names.index(name)] for name in wanted]
            types = str([file.schema_arrow.field(column).type for column in read_columns])
            has_plain_types = "binary" not in types and "map<" not in types
            rows = documents.read_parquet_rows(path, file, read_columns, digest)
            rows = rows if has_plain_types else ((location, tuple(map(_to_plain, row))) for location, row in rows)
            yield from join_messages(_read_rows(rows, wanted), self._named, self.conversation)
        on_progress(os.path.getsize(path))

    @property
    def _named(self) -> tuple[str, ...]:
        """The names of the fields for questions and answers, or () if they are the defaults."""
        return () if (self.user, self.assistant) == ("user", "assistant") else (self.user, self.assistant)

    @property
    def _names(self) -> tuple[str, ...]:
        """The names of the fields with the questions, the answers and the conversation."""
        return (self.user, self.assistant, *((self.conversation,) if self.conversation else ()))

    def _check_columns(self, path: str, columns: Sequence[str]) -> tuple[str, ...]:
        """Return the column names normalized by normalize_names(). Raises UserError if one is missing or repeated."""
        if missing := records.find_missing(columns, *self._names):
            choices = ", ".join(map(repr, columns[:20])) or "(there are none)"
            options = "--user, --assistant or --conversation=NAME"
            raise UserError(f"{path} has no field {missing[0]!r}: pass {options}, one of {choices}")
        try:
            return records.normalize_names(tuple(columns), records.RECORD_KEYS, self._names)
        except RecordError as error:
            raise UserError(f"{path}: {error}") from error


def _normalize_keys(record: Any, names: tuple[str, ...]) -> Any:
    """Return a record with normalized keys, or the error that prevents it."""
    try:
        return records.normalize_keys(record, records.RECORD_KEYS, names) if isinstance(record, dict) else record
    except RecordError as error:
        return error


def _watch(chunks: Iterable[str], damage: list[bool]) -> Iterator[str]:
    """Yield chunks, and append to damage if one has bytes that could not be decoded."""
    for chunk in chunks:
        if not chunk.isascii() and not is_valid_unicode(chunk):
            damage.append(True)
        yield chunk


def _check_bytes(values: Iterable[Record], damage: list[bool]) -> Iterator[Record]:
    """Yield records, with a RecordError for each one that has bytes that could not be decoded."""
    for location, record in values:
        text = json.dumps(record, ensure_ascii=False, default=str) if damage else ""
        if not (isinstance(record, RecordError) or is_valid_unicode(text)):
            problem = f"it has bytes in another encoding ({display(ascii(record), 80)})"
            remedy = "if many records have such bytes, pass --encoding=NAME"
            record = RecordError("content that is not text", problem, remedy)
        yield location, record


def _read_rows(rows: Iterable[tuple[str, Sequence]], names: Sequence[str]) -> Iterator[tuple[str, Any, bool]]:
    """Yield (location, row as a dict, whether an empty row precedes it). Excel writes an empty row as commas."""
    is_start = False
    for location, row in rows:
        if not any(value not in (None, "") for value in row):
            is_start = True
            continue
        if len(row) == len(names):
            yield location, dict(zip(names, row)), is_start
        else:
            problem = f"it has {len(row)} columns, but line 1 has {len(names)}"
            yield location, RecordError("rows of a different length", problem), is_start
        is_start = False


def _to_plain(value: Any) -> Any:
    """Convert a value from Parquet: bytes become text, and maps, which are lists of pairs, become dicts."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, dict):
        return {key: _to_plain(item) for key, item in value.items()}
    if isinstance(value, list) and value and all(isinstance(item, tuple) for item in value):
        return {_to_plain(key): _to_plain(item) for key, item in value}
    return [*map(_to_plain, value)] if isinstance(value, list) else value


def _read_dialogues(path: str, chunks: Iterable[str], survey: Survey) -> Iterator[tuple[str, Messages | RecordError]]:
    """Yield (location, conversation) of tagged text."""
    conversations = []
    for location, conversation in read_tagged(documents.split_lines(chunks), path):
        try:
            if isinstance(conversation, RecordError):
                raise conversation
            texts = ((role, records.read_text(text, role), in_loss) for role, text, in_loss in conversation)
            conversations.append(records.check_turns([*texts]))
        except RecordError as error:
            yield location, error
    for conversation in join_pairs(conversations):
        survey.add_form(path, TAGGED_FORM, None)
        yield path, conversation
