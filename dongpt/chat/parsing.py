"""Find the records in JSON and in the tagged text of the Empathetic-Dialogue-System."""

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
MAX_MESSAGES = 2**17  # of one conversation, in records of one message each
TAG_PATTERN = re.compile(r"<(bot|human|emotion|context)> ?")
ROLE_OF_TAG = {"bot": "user", "human": "assistant"}
END_TAG_PATTERN = re.compile(r" *<endOfText>\s*$")


# ----------------------------------------------------------------------------------------------------------------------
# JSON: an array, one value per line, or values one after another


def read_json(
    chunks: Iterable[str], path: str, has_lines: bool, named: tuple[str, ...] = (), conversation: str = ""
) -> Iterator[Record]:
    """Yield the records in JSON text: an array, an object that contains an array, or a sequence of values.

    Invalid JSON becomes a RecordError if it is clear where the next record begins, and raises UserError otherwise.
    has_lines means that each line is a value. Objects with the keys in named are records, not messages. Consecutive
    messages form a list, which ends at a blank line or where the value of the key conversation changes.
    """
    text = JsonText(chunks, path)
    offset, is_conversation = _find_array(text, has_lines, named)
    text.position += offset or 0
    if is_conversation or offset is None:
        elements = _read_elements(text) if is_conversation else ()
        yield from join_messages(chain(elements, _read_values(text, has_lines)), named, conversation)
    else:
        yield from ((location, value) for location, value, _ in _read_elements(text))
        if offset:
            _read_rest_of_object(text)
    text.expect_end()


def _read_elements(text: JsonText) -> Iterator[tuple[str, Any, bool]]:
    """Yield (location, value, False) of the elements of the array at the position.

    An invalid element becomes a RecordError if the first element begins on its own line.
    """
    line_start = FIRST_LINE_START.match(text.buffer, text.position)
    for location, value in text.elements(line_start[1] if line_start else ""):
        yield location, _record_error(value, location) if isinstance(value, JsonError) else value, False


def _record_error(error: JsonError, location: str) -> RecordError:
    problem = str(error).removeprefix(location).strip(": ").removeprefix("is ")
    return RecordError("text that is not JSON", problem.removesuffix(": correct or delete the record"))


def _read_values(text: JsonText, has_lines: bool) -> Iterator[tuple[str, Any, bool]]:
    """Yield (location, value, whether a blank line precedes it) of the values of the text.

    With has_lines, or after a value that has a line to itself, an invalid line becomes a RecordError.
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


def join_messages(
    values: Iterable[tuple[str, Any, bool]], named: tuple[str, ...], conversation: str
) -> Iterator[Record]:
    """Yield the values, with consecutive messages joined into a list. A list that contains an error is left out.

    Each item of values is (location, value, whether a conversation ends before it). Raises UserError if the messages
    seem to come from several conversations and conversation does not name the key that identifies them.
    """
    messages, labels = list[Any](), dict[str, tuple[Any, int]]()
    first_location, n_messages, has_error, is_run, name = "", 0, False, False, None
    for location, value, is_start in _unpack_lists(values, named):
        error = value if isinstance(value, RecordError) else None
        is_one = not error and (is_message(value, named) or is_run and not _is_alone(value, named))
        new_name = records.find_name(value, conversation) if is_one and isinstance(value, dict) else None
        role = ""
        if is_one:
            role, error = _read_role(value, conversation if not new_name else "")
            is_start |= name != new_name if conversation and new_name else not conversation and role == "system"
        if is_start or not is_one and not error:
            if messages:
                yield first_location, messages
            messages, n_messages, has_error, labels = [], 0, False, {}
        if is_one and not error and not conversation:
            changed = _update_labels(labels, records.find_labels(value), role)
            if n_messages and new_name and new_name != name or changed:
                _fail_at_change(location, new_name[0] if new_name else changed, is_known=bool(new_name))
        name = new_name or (name if n_messages or error or conversation else None)
        if error:
            messages, has_error = [], True
            error.conversation, error.has_name = name[1] if conversation and name else "", new_name is not None
            yield location, error
        elif not is_one:
            yield location, value
        elif not has_error:
            first_location = first_location if messages else location
            messages.append(value)
            if len(messages) > MAX_MESSAGES:
                problem = f"more than {MAX_MESSAGES:,} messages without an empty line seem to be one conversation"
                raise UserError(f"{location}: {problem}: put an empty line between conversations")
        n_messages += is_one
        is_run = is_one or is_run and error is not None
    if messages:
        yield first_location, messages


def _unpack_lists(values: Iterable[tuple[str, Any, bool]], named: tuple[str, ...]) -> Iterator[tuple[str, Any, bool]]:
    """Yield the values, replacing each list of messages by its messages."""
    was_list = False
    for location, value, is_start in values:
        is_list = isinstance(value, list) and bool(value) and is_message(value[0], named)
        is_start |= was_list
        for message in value if is_list else (value,):
            yield location, message, is_start or is_list
            is_start = is_list = False
        was_list = isinstance(value, list)


def _read_role(message: Any, missing: str) -> tuple[str, RecordError | None]:
    """Return (role, error or None) for a message. missing is the name of a required key that it lacks, or ""."""
    try:
        role, _, _ = records.read_message(message)
    except RecordError as error:
        return "", error
    if not missing:
        return role, None
    state = "blank" if missing in message else "missing"
    return role, RecordError("missing fields", f"the field {missing!r} (--conversation) is {state}")


def _update_labels(labels: dict[str, tuple[Any, int]], new_labels: dict[str, Any], role: str) -> str:
    """Update labels and return the key that seems to name a conversation and has changed, or "".

    labels has the value of each field that the question and the answer share or that only the question has, and for
    how many messages, or (None, 0) for other fields. new_labels are the fields of the next message, with this role.
    """
    for key in {**labels, **new_labels}:
        value, (old_value, n) = new_labels.get(key), labels.get(key, (new_labels.get(key), 0))
        if old_value is not None and value not in (None, old_value):
            if n >= (3 if role == "assistant" else 2):
                return key
            old_value, n = None, 0  # it differs within an exchange
        labels[key] = old_value, n + 1
    return ""


def _fail_at_change(location: str, key: str, is_known: bool):
    """Raise UserError for a message of another conversation than the message before it."""
    remedy = "" if is_known else f", or delete {key!r} if it does not name a conversation"
    problem = f"each record is one message, and the value of {key!r} changes here"
    raise UserError(f"{location}: {problem}: pass --conversation={key}{remedy}")


def _find_array(text: JsonText, has_lines: bool, named: tuple[str, ...]) -> tuple[int | None, bool]:
    """Return (offset, whether the first element is a message) of an array of records or messages.

    The array is at the start or in an object such as {"data": [...]}. The offset is None if no array is found.
    """
    offset, key, neighbors = 0, "", dict[str, Any]()
    if text.peek() != "[":
        while len(text.buffer) < UNDECIDED_CHARS and not text.is_end:
            text.read_more()
        text.peek()
        buffer, start = text.buffer, text.position
        with contextlib.suppress(ValueError, RecursionError):
            if has_lines or buffer[text.decode(buffer, start)[1] :].lstrip().startswith(("{", "[")):
                return None, False
        with contextlib.suppress(ValueError, RecursionError):  # the object has an error, or is longer than the buffer
            end = start
            while not offset and (match := KEY.match(buffer, end)):
                if (key := match[1].strip().lower()) in CONTAINER_KEYS and buffer.startswith("[", match.end()):
                    offset = match.end() - start
                else:
                    neighbors[match[1]], end = text.decode(buffer, match.end())
        if not offset:
            return None, False
    begins_line = FIRST_LINE_START.match(text.buffer, text.position + offset) is not None
    try:
        element = text.peek_element(text.path, offset)
    except JsonError:  # it is reported when it is read
        if not begins_line:
            return None, False
        element = {LIST_KEYS[0]: None}
    is_one = is_message(element, named)
    if offset:
        is_array = _is_record(element, key, named) or key not in LIST_KEYS and _is_part_of_record(element)
    elif is_one:  # in lines, an array is a conversation
        is_array = not has_lines or begins_line
    elif isinstance(element, list) and element:
        is_array = isinstance(element[0], dict)
    else:  # in lines, an empty array is a conversation
        is_array = isinstance(element, dict) or element in (None, []) and not has_lines
    for name, value in neighbors.items() if is_array else ():
        _check_neighbor(name, value, f"{text.path} line {text.line():,}")
    return offset if is_array else None, is_array and is_one


def _is_part_of_record(element: Any) -> bool:
    """Return True if the first element of a list is a record without its question or its answer."""
    names = {*map(records.squash, element)} if isinstance(element, dict) else {"not a record"}
    return not names or not names.isdisjoint((*records.QUESTION_KEYS, *records.ANSWER_KEYS))


def _is_alone(value: Any, named: tuple[str, ...]) -> bool:
    """Return True for a list and for a complete record, which end a sequence of messages instead of joining it."""
    return isinstance(value, list) or _is_record(value, "", named)


def _is_record(element: Any, key: str = "", named: tuple[str, ...] = ()) -> bool:
    """Return True if the first element of the list with this key is a record."""
    if isinstance(element, list):
        return bool(element) and is_message(element[0])
    names = [*map(records.squash, element)] if isinstance(element, dict) else []
    has_pair = records.has_form(names) or bool(named) and {*map(records.squash, named)}.issubset(names)
    return has_pair and not (key in LIST_KEYS and {*names}.isdisjoint(LIST_KEYS)) and not is_message(element)


def _check_neighbor(key: str, value: Any, location: str):
    """Raise UserError if a field next to the list of records in an object would change what the records mean."""
    (name,) = records.normalize_names((key,), records.RECORD_KEYS)
    is_flag = (name in records.LOSS_KEYS or records.find_loss_words((key,))) and records.is_loss_flag(value)
    if is_flag or name in records.RECORD_KEYS and not records.is_empty(value):
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
    """Reconstruct the dialogues from which the records were taken.

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
