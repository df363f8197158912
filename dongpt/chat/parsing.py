"""Find the records in JSON, and in text with the tags of the Empathetic-Dialogue-System."""

import contextlib
import re
from itertools import chain
from typing import Any, Iterable, Iterator

from configurator import UserError
from dongpt.chat import records
from dongpt.chat.records import LIST_KEYS, Messages, Record, RecordError, is_message
from dongpt.text.json_values import JsonError, JsonText

# keys of the list of records in an object such as {"version": "1.0", "data": [...]}
CONTAINER_KEYS = "data rows records examples samples entries train items conversations dialogues dialogs chats".split()
KEY = re.compile(r'\s*[{,]\s*"([^"\\]{0,99})"\s*:\s*')
UNDECIDED_CHARS = 2**16  # at the start of a file, in which such a list must begin
FIRST_LINE_START = re.compile(r"\[\s*?(\n[ \t]*\{)")  # of an array whose elements are on lines of their own
TAG_PATTERN = re.compile(r"<(bot|human|emotion|context)> ?")
ROLE_OF_TAG = {"bot": "user", "human": "assistant"}
END_TAG_PATTERN = re.compile(r" *<endOfText>\s*$")


# ----------------------------------------------------------------------------------------------------------------------
# JSON: an array, one value per line, or values one after another


def read_json(
    chunks: Iterable[str], path: str, has_lines: bool, named: tuple[str, ...] = (), conversation: str = ""
) -> Iterator[Record]:
    """Yield the records in JSON text: an array, an object that contains an array, or a sequence of values.

    Text that isn't JSON is a RecordError if it is clear where the next record begins, and otherwise a UserError.
    has_lines says that each line is a value. Objects with the keys in named are no messages. Messages one after another
    form a list, up to a blank line or another value of the key conversation.
    """
    text = JsonText(chunks, path)
    offset, first = _find_array(text, has_lines, named, conversation)
    if offset is None:
        yield from _join_messages(_read_values(text, has_lines), named, conversation)
    else:
        text.position += offset
        line_start = FIRST_LINE_START.match(text.buffer, text.position)
        elements: Iterator[Record] = (
            (location, _record_error(value, location) if isinstance(value, JsonError) else value)
            for location, value in text.elements(line_start[1] if line_start else "")
        )
        if is_message(first, named):
            elements = _join_messages(((*element, False) for element in elements), named, conversation)
        yield from elements
        if offset:
            _read_rest_of_object(text)
    text.expect_end()


def _record_error(error: JsonError, location: str) -> RecordError:
    problem = str(error).removeprefix(location).strip(": ").removeprefix("is ")
    return RecordError("text that is not JSON", problem.removesuffix(": correct or delete the record"))


def _read_values(text: JsonText, has_lines: bool) -> Iterator[tuple[str, Any, bool]]:
    """Yield (location, value, whether a blank line precedes it) of the values of the text.

    With has_lines, or after a value that is alone on its line, a line that isn't JSON is a RecordError.
    """
    end_line = 1
    while text.peek():
        line = text.line()
        location = f"{text.path} line {line:,}"
        try:
            value: Any = text.read_value(location)
            has_lines = text.line() == line
        except JsonError as error:
            if not has_lines:
                raise
            value = _record_error(error, location)
            text.skip_line()
        yield location, value, line > end_line + 1
        end_line = text.line()


def _join_messages(
    values: Iterable[tuple[str, Any, bool]], named: tuple[str, ...], conversation: str
) -> Iterator[Record]:
    """Yield the values, with messages one after another as a list. A list with an error in it is left out."""
    messages: list[Any] = []
    first_location, has_error, name = "", False, None
    for location, value, is_start in values:
        if is_one := is_message(value, named):
            new_name = records.find_name(value, conversation)
            if not conversation and not is_start and messages and name and new_name and name != new_name:
                raise UserError(f"{location}: each record is one message: pass --conversation={new_name[0]}")
            is_start |= bool(conversation and new_name) and name != new_name
            name = new_name or name
            try:
                records.read_message(value)
                if conversation and not new_name:
                    raise RecordError("missing fields", f"there is no field {conversation!r} (--conversation)")
            except RecordError as error:
                value = error
        is_broken = isinstance(value, RecordError)
        if messages and (is_start or not is_one and not is_broken):
            yield first_location, messages
        if is_start or not is_one or is_broken:
            messages, has_error = [], is_broken
        if is_broken:
            value.conversation = name[1] if conversation and name else ""
        if is_broken or not is_one:
            yield location, value
        elif not has_error:
            first_location = first_location if messages else location
            messages.append(value)
    if messages:
        yield first_location, messages


def _find_array(text: JsonText, has_lines: bool, named: tuple[str, ...], conversation: str) -> tuple[int | None, Any]:
    """Return (offset, first element) of an array of records, at the start or in an object such as {"data": [...]}."""
    offset, key, neighbors = 0, "", dict[str, Any]()
    if text.peek() != "[":
        while len(text.buffer) < UNDECIDED_CHARS and not text.is_end:
            text.read_more()
        text.peek()
        buffer, start = text.buffer, text.position
        with contextlib.suppress(ValueError, RecursionError):
            if has_lines or buffer[text.decode(buffer, start)[1] :].lstrip().startswith(("{", "[")):
                return None, None
        with contextlib.suppress(ValueError, RecursionError):  # the object has an error, or is longer than the buffer
            end = start
            while not offset and (match := KEY.match(buffer, end)):
                if (key := match[1].strip().lower()) in CONTAINER_KEYS and buffer.startswith("[", match.end()):
                    offset = match.end() - start
                else:
                    neighbors[match[1]], end = text.decode(buffer, match.end())
        if not offset:
            return None, None
    try:
        element = text.peek_element(text.path, offset)
    except JsonError:  # it is reported when it is read
        if not FIRST_LINE_START.match(text.buffer, text.position + offset):
            return None, None
        element = {LIST_KEYS[0]: None}
    if offset:
        is_array = _is_record(element, key, named)
    elif is_message(element, named):
        is_array = not has_lines and records.find_name(element, conversation) is not None
    elif isinstance(element, list) and element:
        is_array = isinstance(element[0], dict)
    else:  # in lines, an empty array is a conversation
        is_array = isinstance(element, dict) or element in (None, []) and not has_lines
    for name, value in neighbors.items() if is_array else ():
        _check_neighbor(name, value, f"{text.path} line {text.line():,}")
    return offset if is_array else None, element


def _is_record(element: Any, key: str = "", named: tuple[str, ...] = ()) -> bool:
    """Return True if the first element of the list with this key is a record."""
    if isinstance(element, list):
        return bool(element) and is_message(element[0])
    names = [name.strip().lower() for name in element] if isinstance(element, dict) else []
    has_pair = records.has_form(names) or bool(named) and {*named}.issubset(names)
    return has_pair and not (key in LIST_KEYS and {*names}.isdisjoint(LIST_KEYS)) and not is_message(element)


def _check_neighbor(key: str, value: Any, location: str):
    """Raise UserError for what an object has next to its list of records, if it matters to the records."""
    name = key.strip().lower()
    if name in records.RECORD_KEYS and (not records.is_empty(value) or name in records.LOSS_KEYS and value is False):
        raise UserError(f"{location}: {key!r} is outside the list of records: move it into each record, or delete it")
    if isinstance(value, list) and value and (is_message(value[0]) or _is_record(value[0])):
        raise UserError(f"{location}: the object also has the list {key!r}: save each list in a file of its own")


def _read_rest_of_object(text: JsonText):
    """Read what follows the list of records in {"data": [...], "n": 2}."""
    while (separator := text.peek()) == ",":
        text.position += 1
        text.peek()
        location = f"{text.path} line {text.line():,}"
        key = text.read_value(location)
        if not isinstance(key, str) or text.peek() != ":":
            text.fail(location, "expected a key and a value")
        text.position += 1
        text.peek()
        _check_neighbor(key, text.read_value(location), location)
    if separator != "}":
        text.fail(f"{text.path} line {text.line():,}", "the object is not closed" if separator else "")
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
