"""Find the records in JSON, and in text with the tags of the Empathetic-Dialogue-System."""

import re
from itertools import chain
from typing import Any, Iterable, Iterator

from configurator import UserError
from dongpt.chat.records import LIST_KEYS, Messages, Record, RecordError, is_message, read_message
from dongpt.text.json_values import JsonError, JsonText

# {"version": "1.0", "data": followed by a list
LIST_IN_OBJECT = re.compile(
    r'\{\s*(?:"[^"\\]{0,99}"\s*:\s*(?:"[^"\\]{0,999}"|[-+.\w]+)\s*,\s*){0,20}"([^"\\]{0,99})"\s*:\s*(?=\[)'
)
UNDECIDED_CHARS = 2**16  # at the start of a file, in which such a list must begin
FIRST_LINE_START = re.compile(r"\[\s*?(\n[ \t]*\{)")  # of an array whose elements are on lines of their own
TAG_PATTERN = re.compile(r"<(bot|human|emotion|context)> ?")
ROLE_OF_TAG = {"bot": "user", "human": "assistant"}
END_TAG_PATTERN = re.compile(r" *<endOfText>\s*$")


# ----------------------------------------------------------------------------------------------------------------------
# JSON: an array, one value per line, or values one after another


def read_json(chunks: Iterable[str], path: str, has_lines: bool) -> Iterator[Record]:
    """Yield the records of JSON text: of an array, of an object that holds one, or one value after another.

    Text that isn't JSON is a RecordError if it is clear where the next record begins, and otherwise a UserError.
    has_lines says that each line is a value.
    """
    text = JsonText(chunks, path)
    offset = _find_array(text, has_lines)
    if offset is None:
        yield from _read_values(text, has_lines)
    else:
        text.position += offset
        line_start = FIRST_LINE_START.match(text.buffer, text.position)
        for location, value in text.elements(line_start[1] if line_start else ""):
            yield location, _record_error(value, location) if isinstance(value, JsonError) else value
        if offset:
            _read_rest_of_object(text)
    text.expect_end()


def _record_error(error: JsonError, location: str) -> RecordError:
    problem = str(error).removeprefix(location).strip(": ").removeprefix("is ")
    return RecordError("text that is not JSON", problem.removesuffix(": correct or delete the record"))


def _read_values(text: JsonText, has_lines: bool) -> Iterator[Record]:
    """Yield the values of the text. Messages one after another, without a blank line, become one list.

    With has_lines, or after a value that is alone on its line, a line that isn't JSON is a RecordError. A list with an
    error among its messages is left out.
    """
    messages: list[Any] = []  # of the current conversation, with one message per value
    first_location, has_error, end_line = "", False, 1
    while text.peek():
        line = text.line()
        location = f"{text.path} line {line:,}"
        value: Any = None
        try:
            value = text.read_value(location)
            has_lines = text.line() == line
            if is_message(value):
                read_message(value)
        except JsonError as error:
            if not has_lines:
                raise
            value = _record_error(error, location)
            text.skip_line()
        except RecordError as error:
            value = error
        is_record = not isinstance(value, RecordError) and not is_message(value)
        if is_record or line > end_line + 1:
            if messages:
                yield first_location, messages
            messages, has_error = [], False
        if isinstance(value, RecordError):
            messages, has_error = [], True
        if is_record or isinstance(value, RecordError):
            yield location, value
        elif not has_error:
            first_location = first_location if messages else location
            messages.append(value)
        end_line = text.line()
    if messages:
        yield first_location, messages


def _find_array(text: JsonText, has_lines: bool) -> int | None:
    """Return the offset of an array of records, at the start of the text or in an object such as {"data": [...]}."""
    offset, key = 0, ""
    if text.peek() != "[":
        while len(text.buffer) < UNDECIDED_CHARS and not text.is_end:
            text.read_more()
        text.peek()
        if not (match := LIST_IN_OBJECT.match(text.buffer, text.position)):
            return None
        offset, key = match.end() - match.start(), match[1].strip().lower()
    try:
        element = text.peek_element(text.path, offset)
    except JsonError:  # it is reported when it is read
        return offset if FIRST_LINE_START.match(text.buffer, text.position + offset) else None
    keys = {name.strip().lower() for name in element} if isinstance(element, dict) else set()
    is_empty = element is None and not offset and not has_lines  # in lines, an empty array is a conversation
    is_array = is_empty or not keys.isdisjoint(LIST_KEYS) or _is_record(element) and key not in LIST_KEYS
    return offset if is_array else None


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
# text with the tags of the Empathetic-Dialogue-System


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
                yield first_location, conversation
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
            yield first_location, conversation
            conversation = []


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
