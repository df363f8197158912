"""Find the records in JSON text: in an array, in an object that holds one, on lines, or one after another.

for location, record in read_json(chunks, "chats.json", has_lines=False): ...  # of any form, not checked
"""

import contextlib
import re
from typing import Any, Iterable, Iterator

from configurator import UserError
from dongpt.chat.records import LIST_KEYS, Record, RecordError, is_message, read_message
from dongpt.text.json_values import JsonError, JsonText

# {"version": "1.0", "data": followed by a list
LIST_IN_OBJECT = re.compile(
    r'\{\s*(?:"[^"\\]{0,99}"\s*:\s*(?:"[^"\\]{0,999}"|[-+.\w]+)\s*,\s*){0,20}"([^"\\]{0,99})"\s*:\s*(?=\[)'
)
UNDECIDED_CHARS = 2**16  # at the start of a file, in which such a list must begin
FIRST_LINE_START = re.compile(r"\[\s*?(\n[ \t]*\{)")  # of an array whose elements are on lines of their own


def read_json(chunks: Iterable[str], path: str, has_lines: bool) -> Iterator[Record]:
    """Yield the records of JSON text: of an array, of an object that holds one, or one value after another.

    Messages one after another, without a blank line, become one list. has_lines says that there is one value per line.
    Text that isn't JSON is a RecordError if it is clear where the next record begins. Otherwise, it is a UserError.
    """
    text = JsonText(chunks, path)
    if _starts_with_array(text, has_lines):
        yield from _read_array(text)
    elif array_offset := _array_in_object(text):
        text.position += array_offset
        yield from _read_array(text)
        _read_rest_of_object(text)
    else:
        yield from _join_messages(_read_values(text, has_lines))
    text.expect_end()


def _read_array(text: JsonText) -> Iterator[Record]:
    """Yield the elements of the array at the position. If they start on lines of their own, each may be broken."""
    line_start = FIRST_LINE_START.match(text.buffer, text.position)
    number = 1
    while True:
        try:
            for location, record in text.elements(number):
                yield location, record
                number += 1
            return
        except JsonError as error:
            if not line_start or not text.skip_to(line_start[1]):
                raise
            yield error.location, RecordError("elements that are not JSON", error.problem)
            number += 1


def _read_values(text: JsonText, has_lines: bool) -> Iterator[tuple[str, bool, Any]]:
    """Yield (location, whether a blank line precedes it, value) of values one after another.

    With has_lines, or after a value that is alone on its line, a line that isn't JSON is a RecordError.
    """
    end_line = 1
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
            value = RecordError("lines that are not JSON", error.problem)
            text.skip_line()
        except RecordError as error:
            value = error
        yield location, line > end_line + 1, value
        end_line = text.line()


def _join_messages(values: Iterable[tuple[str, bool, Any]]) -> Iterator[Record]:
    """Yield the values, with the messages between blank lines or other records as one list.

    A list with an error among its messages is left out.
    """
    messages: list[Any] = []  # of the current conversation
    first_location, is_broken = "", False
    for location, is_new, value in values:
        is_error = isinstance(value, RecordError)
        if is_new or not (is_error or is_message(value)):
            if messages:
                yield first_location, messages
            messages, is_broken = [], False
        if is_error:
            messages, is_broken = [], True
        if is_error or not is_message(value):
            yield location, value
        elif not is_broken:
            first_location = first_location if messages else location
            messages.append(value)
    if messages:
        yield first_location, messages


def _starts_with_array(text: JsonText, has_lines: bool) -> bool:
    """Return True if the text is an array of records. In lines, an empty array is a conversation."""
    if text.peek() != "[":
        return False
    try:
        element = text.peek_element(text.path)
        return _is_record(element) or element is None and not has_lines
    except JsonError:  # it is reported when it is read
        return FIRST_LINE_START.match(text.buffer, text.position) is not None


def _array_in_object(text: JsonText) -> int:
    """Return the offset of the array of records in an object such as {"version": 1, "data": [...]}, or 0."""
    while len(text.buffer) < UNDECIDED_CHARS and not text.is_end:
        text.read_more()
    text.peek()
    if match := LIST_IN_OBJECT.match(text.buffer, text.position):
        offset, key = match.end() - match.start(), match[1]
        with contextlib.suppress(JsonError):
            element = text.peek_element(text.path, offset)
            keys = {name.strip().lower() for name in element} if isinstance(element, dict) else set()
            is_list_key = key.strip().lower() in LIST_KEYS
            return offset if not keys.isdisjoint(LIST_KEYS) or _is_record(element) and not is_list_key else 0
    return 0


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
