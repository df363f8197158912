"""Read conversations from files: JSON, JSON lines, CSV, Parquet and tagged text, in the forms of records.py.

    dialogues = Dialogues(Files(["chats.json"]))
    for conversation in dialogues.read(): ...      # [("user", "Hello", True), ("assistant", "Hello!", True)]

A file is JSON if its first character is { or [. chat.py saves one message per line, with a blank line between
conversations. Other text must have the tags of the Empathetic-Dialogue-System.
"""

import contextlib
import os
import re
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any, Iterable, Iterator, Sequence

from configurator import UserError
from dongpt.chat.records import (
    FORM_KEYS,
    INPUT_KEYS,
    INPUT_QUESTIONS,
    LIST_KEYS,
    SPECIAL_KEYS,
    SYSTEM_KEYS,
    Form,
    Messages,
    RecordError,
    check_turns,
    find_pair,
    is_message,
    read_message,
    to_conversation,
)
from dongpt.chat.survey import Survey
from dongpt.text.documents import (
    CSV_DELIMITERS,
    Files,
    Progress,
    file_suffixes,
    open_parquet,
    read_csv_rows,
    read_parquet_rows,
)
from dongpt.text.json_values import JsonText

LINE_SUFFIXES = (".jsonl", ".ndjson")
ROW_SUFFIXES = (".csv", ".tsv", ".parquet")
TAGGED_FORM = Form("tagged text (<bot>, <human>)")
# {"version": "1.0", "data": followed by a list
LIST_IN_OBJECT = re.compile(
    r'\{\s*(?:"[^"\\]{0,99}"\s*:\s*(?:"[^"\\]{0,999}"|[-+.\w]+)\s*,\s*){0,20}"([^"\\]{0,99})"\s*:\s*(?=\[)'
)
UNDECIDED_CHARS = 2**16  # at the start of a file, in which such a list must begin
Record = tuple[str, Any]  # location; a record, or the RecordError that says why it cannot be read


# ----------------------------------------------------------------------------------------------------------------------
# JSON: an array, one value per line, or values one after another


def read_json(chunks: Iterable[str], path: str, has_lines: bool) -> Iterator[Record]:
    """Yield the records of JSON text: of an array, of an object that holds one, or one value after another.

    Messages one after another, without a blank line, become one list. With has_lines, or after a value that is alone on
    its line, a line that isn't JSON is a RecordError, which includes the messages around it. Elsewhere it is not clear
    where the next record begins: a UserError.
    """
    text, end_line = JsonText(chunks, path), 1
    if _starts_with_array(text, has_lines):
        yield from text.elements()
        return text.expect_end()
    if array_offset := _array_in_object(text):
        text.position += array_offset
        yield from text.elements()
        _read_rest_of_object(text)
        return text.expect_end()
    messages: list[Any] = []  # of the current conversation, with one message per value
    first_location, has_error = "", False
    while text.peek():
        line = text.line()
        location = f"{path} line {line:,}"
        value: Any = None
        try:
            value = text.read_value(location)
            has_lines = text.line() == line
            if is_message(value):
                read_message(value)
        except UserError as error:
            if not has_lines:
                raise
            value = _line_error(error, location)
            text.skip_line()
        except RecordError as error:
            value = error
        if messages and (line > end_line + 1 or not is_message(value)):
            if not isinstance(value, RecordError) or line > end_line + 1:
                yield first_location, messages
            messages = []
        has_error = isinstance(value, RecordError) or has_error and line <= end_line + 1 and is_message(value)
        if not is_message(value):
            yield location, value
        elif not has_error:
            first_location = first_location if messages else location
            messages.append(value)
        end_line = text.line()
    if messages:
        yield first_location, messages


def _starts_with_array(text: JsonText, has_lines: bool) -> bool:
    """Return True if the text is an array of records. In lines, an empty array is a conversation."""
    if text.peek() != "[":
        return False
    with contextlib.suppress(UserError):  # it is reported when it is read
        element = text.peek_element(text.path)
        return _is_record(element) or element is None and not has_lines
    return False


def _array_in_object(text: JsonText) -> int:
    """Return the offset of the array of records in an object such as {"version": 1, "data": [...]}, or 0."""
    while len(text.buffer) < UNDECIDED_CHARS and not text.is_end:
        text.read_more()
    text.peek()
    if match := LIST_IN_OBJECT.match(text.buffer, text.position):
        offset, key = match.end() - match.start(), match[1]
        with contextlib.suppress(UserError):
            element = text.peek_element(text.path, offset)
            has_messages = isinstance(element, dict) and any(name in element for name in LIST_KEYS)
            return offset if has_messages or _is_record(element) and key not in LIST_KEYS else 0
    return 0


def _line_error(error: UserError, location: str) -> RecordError:
    problem = str(error).removeprefix(location).strip(": ").removeprefix("is ")
    return RecordError("lines that are not JSON", problem.removesuffix(": correct or delete the record"))


def _is_record(element: Any) -> bool:
    """Return True if the first element of an array is a record. Otherwise, the array is a conversation."""
    if isinstance(element, list):
        return bool(element) and isinstance(element[0], dict)
    return isinstance(element, dict) and not is_message(element)


def _read_rest_of_object(text: JsonText):
    """Read what follows the list of records in {"data": [...], "n": 2}. Raises UserError if that has more lists."""
    while (separator := text.peek()) == ",":
        text.position += 1
        text.peek()
        location = f"{text.path} line {text.line():,}"
        key = text.read_value(location)
        if not isinstance(key, str) or text.peek() != ":":
            text.fail(location, "expected a key and a value")
        text.position += 1
        text.peek()
        if isinstance(text.read_value(location), (list, dict)):
            raise UserError(f"{location}: {key!r} is more than the one list of an object: save each list as a file")
    if separator != "}":
        text.fail(f"{text.path} line {text.line():,}", "the object does not end" if separator else "")
    text.position += 1


# ----------------------------------------------------------------------------------------------------------------------
# tagged text

TAG_PATTERN = re.compile(r"<(bot|human|emotion|context)> ?")
ROLE_OF_TAG = {"bot": "user", "human": "assistant"}
END_TAG_PATTERN = re.compile(r" *<endOfText>\s*$")


def read_tagged(lines: Iterable[str], path: str) -> Iterator[Record]:
    """Yield the records in tagged text. <bot> marks the user, <human> the answer, and <endOfText> the end of a record.

    The text after <emotion> or <context> becomes a system message.
    """
    conversation: Messages = []
    first_location = ""  # of its first line
    is_broken = False  # whether the current conversation is left out
    for line_number, line in enumerate(chain(lines, ["<context>"]), 1):  # an extra tag ends the last conversation
        location, tag, problem = f"{path} line {line_number:,}", TAG_PATTERN.match(line), ""
        text, has_end = END_TAG_PATTERN.subn("", line[tag.end() :] if tag else line)
        text = text.strip()
        if tag and tag[1] not in ROLE_OF_TAG:
            if conversation:
                yield first_location, _checked(conversation)
            conversation = [("system", f"emotion: {text}" if text and tag[1] == "emotion" else text, True)]
            first_location, is_broken = location, False
        elif is_broken:
            is_broken = not has_end
        elif tag:
            first_location = first_location if conversation else location
            awaits_answer = bool(conversation) and conversation[-1][0] == "user"
            if awaits_answer == (tag[1] == "bot"):
                problem = "a second <bot> before <human>" if awaits_answer else "<human> without a <bot> before it"
                problem += ": the tags must alternate, <bot> first"
            conversation.append((ROLE_OF_TAG[tag[1]], text, True))
        elif text and not conversation:
            problem = "it does not start with <bot>, <human>, <emotion> or <context>: "
            problem += "use a text with these tags, or JSON, JSON lines, CSV or Parquet"
        elif text:  # a message with several lines
            role, content, _ = conversation[-1]
            conversation[-1] = role, f"{content}\n{text}".strip(), True
        if problem:
            yield location, RecordError("tags out of order" if tag else "lines without a tag", problem)
            conversation, is_broken = [], not has_end and bool(tag)
        elif has_end and conversation and conversation[-1][0] == "assistant":
            yield first_location, _checked(conversation)
            conversation = []


def _checked(conversation: Messages) -> Messages | RecordError:
    try:
        return check_turns(conversation)
    except RecordError as error:
        return error


def join_pairs(records: list[Messages]) -> list[Messages]:
    """Reconstruct the dialogues that records were taken from.

    The Empathetic-Dialogue-System splits dialogues into pairs and also adds each pair with swapped roles. Therefore, if
    an answer and the next question also form a pair, both belong to the same dialogue.
    """
    pairs = {(a[1], b[1]) for record in records for a, b in zip(record, record[1:]) if b[0] == "assistant"}
    dialogues: list[Messages] = []
    for record in records:
        if dialogues and record[0][0] == "user" and (dialogues[-1][-1][1], record[0][1]) in pairs:
            dialogues[-1] += record
        else:
            dialogues.append([*record])
    return dialogues


# ----------------------------------------------------------------------------------------------------------------------
# files


@dataclass(frozen=True)
class Dialogues:
    """The conversations in a set of files."""

    files: Files
    user: str = "user"  # the key or column with the questions
    assistant: str = "assistant"  # the key or column with the answers
    conversation: str = ""  # adjacent questions and answers with the same value here form a conversation
    skip_broken: bool = False  # leave broken records out

    def read(
        self, on_progress: Progress = lambda n: None, digest=None, survey: Survey | None = None
    ) -> Iterator[Messages]:
        """Yield the conversations in order, and count them in survey.

        Broken records are only counted. Without a survey they raise UserError, with the location, unless skip_broken.
        """
        is_strict, survey = survey is None and not self.skip_broken, survey or Survey()
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
        suffix = file_suffixes(path)[0]
        records: Iterable[Record]
        if suffix in ROW_SUFFIXES:
            records = self._read_rows(path, suffix, survey, *progress)
        elif suffix in (".json", *LINE_SUFFIXES) or self._starts_as_json(path):
            records = read_json(self.files.read_chunks(path, *progress), path, suffix in LINE_SUFFIXES)
        else:
            conversations = []
            for location, conversation in read_tagged(self.files.lines(path, *progress), path):
                if isinstance(conversation, RecordError):
                    yield location, conversation
                else:
                    conversations.append(conversation)
            for conversation in join_pairs(conversations):
                survey.add_form(path, TAGGED_FORM, None)
                yield path, conversation
            return
        groups: Iterable[Iterable[Record]] = ([record] for record in records)
        if self.conversation:
            groups = ([record for _, record in group] for _, group in groupby(enumerate(records), self._group_key))
        for group in groups:
            yield self._join(path, group, survey)

    def _starts_as_json(self, path: str) -> bool:
        """Return True if the first character of a file that isn't whitespace is a bracket."""
        first = next((text.lstrip() for text in self.files.read_chunks(path) if not text.isspace()), "")
        return first.startswith(("[", "{"))

    def _group_key(self, item: tuple[int, Record]) -> str | int:
        """Return the value of the field self.conversation, or the record's number if it is blank."""
        number, (_, record) = item
        value = record.get(self.conversation) if isinstance(record, dict) else None
        return number if value is None or not str(value).strip() else str(value)

    def _join(self, path: str, group: Iterable[Record], survey: Survey) -> tuple[str, Messages | RecordError]:
        """Return the conversation of records with the location of the first record, or of the broken one."""
        conversation: Messages = []
        first_location = ""
        for location, record in group:
            first_location = first_location or location
            try:
                if isinstance(record, RecordError):
                    raise record
                form, messages = to_conversation(record, self.user, self.assistant)
                if self.conversation and not form.is_pair:
                    option = f"--conversation={self.conversation}"
                    raise UserError(f"{location}: {form.name} cannot be joined with others: drop {option}")
                if self.conversation and self.conversation not in record:
                    raise RecordError("missing fields", f"there is no field {self.conversation!r} (--conversation)")
                if self.conversation:
                    form = form._replace(used=(*form.used, self.conversation))
                if conversation and messages[0][0] == "system":
                    if messages.pop(0) != conversation[0]:
                        problem = f"another system message than in the first record with this {self.conversation}"
                        raise RecordError("two system messages", problem)
            except RecordError as error:
                return location, error
            survey.add_form(path, form, record)
            conversation += messages
        return first_location, conversation

    def _read_rows(self, path: str, suffix: str, survey: Survey, on_progress: Progress, digest) -> Iterator[Record]:
        """Yield the rows of CSV or Parquet as dicts."""
        if suffix == ".parquet":
            yield from self._read_parquet(path, survey, digest)
            return on_progress(os.path.getsize(path))
        lines = self.files.lines(path, on_progress, digest)
        names, rows = read_csv_rows(path, lines, CSV_DELIMITERS[suffix], self._has_form)
        self._check_columns(path, names)
        for location, row in rows:
            if len(row) == len(names):
                yield location, dict(zip(names, row))
            else:
                problem = f"it has {len(row)} columns, but line 1 has {len(names)}"
                yield location, RecordError("rows of another length", problem)

    def _read_parquet(self, path: str, survey: Survey, digest) -> Iterator[Record]:
        with open_parquet(path) as file:
            all_names = file.schema_arrow.names
            self._check_columns(path, all_names)
            found = None if self._has_names else find_pair(tuple(all_names))
            pair = found if isinstance(found, tuple) else (self.user, self.assistant)
            is_named = self._has_names or pair == ("user", "assistant")
            others = () if is_named else (name for name in all_names if name.lower() in FORM_KEYS)
            inputs = INPUT_KEYS if pair[0].lower() in INPUT_QUESTIONS else ()
            wanted = [*pair, self.conversation, *LIST_KEYS, *others, *inputs, "history", *SYSTEM_KEYS]
            wanted += sorted(SPECIAL_KEYS)
            names = list(dict.fromkeys(name for name in wanted if name in all_names))
            survey.add_unused(path, (name for name in all_names if name not in names))
            for location, values in read_parquet_rows(path, file, names, digest):
                yield location, dict(zip(names, values))

    @property
    def _has_names(self) -> bool:
        """Return True if the user named the columns of questions and answers."""
        return (self.user, self.assistant) != ("user", "assistant")

    def _has_form(self, names: Sequence[str]) -> bool:
        """Return True if a table with these columns has conversations."""
        if self._has_names:
            return self.user in names and self.assistant in names
        return find_pair(tuple(names)) is not None or any(key in names for key in LIST_KEYS)

    def _check_columns(self, path: str, names: Sequence[str]):
        """Raise UserError if a table has no columns with conversations."""
        pair = find_pair(tuple(names))
        if isinstance(pair, str) and not self._has_names and not set(LIST_KEYS) & set(names):
            raise UserError(f"{path}: {pair}: pass --user=NAME and --assistant=NAME")
        needed = [] if self._has_form(names) else [self.user, self.assistant]
        needed += [self.conversation] if self.conversation else []
        if missing := [name for name in needed if name not in names]:
            choices = ", ".join(map(repr, names[:20])) or "(there are none)"
            options = "--user, --assistant or --conversation=NAME"
            raise UserError(f"{path} has no field {missing[0]!r}: pass {options}, one of {choices}")
