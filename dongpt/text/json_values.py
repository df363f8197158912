"""Read a .json file value by value, so that an array may be larger than memory.

A file that starts with "[" is one array, whose elements are the values. Any other file holds values one after another,
usually one per line.

    for location, value in read_json_values(Files(["chats.json"]).read_chunks("chats.json"), "chats.json"): ...
"""

import itertools
import json
import re
from typing import Any, Iterable, Iterator

from configurator import UserError

MAX_VALUE_CHARS = 2**26  # a longer value is a sign of a missing bracket or quotation mark
MAX_WASTED_CHARS = 2**28  # decoded in vain; a damaged element may include all that follows, so skipping has a limit
UNDECIDED_CHARS = 16  # at the end of the text read so far: more than any part of a literal, number or escape
find_content = re.compile(r"[^ \t\r\n]").search
# the rest of a text that ends within a literal, a number or an escape
is_partial_token = re.compile(r"\s*(t?r?u?|f?a?l?s?|n?u?l?|-?[0-9.]*[eE]?[-+]?|\\?u[0-9a-fA-F]{0,4})").fullmatch


class JsonError(UserError):
    """Raised for text that is not JSON, or that ends early."""


def read_json_values(chunks: Iterable[str], path: str = "the text") -> Iterator[tuple[str, Any]]:
    """Yield (location, value) for each value in chunks of text, such as ("FILE record 2 (line 7)", {"text": "..."}).

    Keeps only one value and about one chunk in memory. Raises a UserError that gives the location if the text isn't
    JSON, if it ends early, or if anything follows its array.
    """
    text = JsonText(chunks, path)
    if text.peek() == "[":
        yield from text.elements()
        return text.expect_end()
    while text.peek():
        location = f"{path} line {text.line():,}"
        yield location, text.read_value(location)


class JsonText:
    """The part of a JSON text that has been read but not yet consumed."""

    def __init__(self, chunks: Iterable[str], path: str):
        self.chunks, self.path = iter(chunks), path
        self.buffer, self.position, self.n_wasted = "", 0, 0
        self.is_end = False  # whether buffer holds the rest of the text
        self.counted_lines, self.counted_until = 1, 0  # line number of the position counted_until in buffer
        self.decode = json.JSONDecoder().raw_decode

    def line(self) -> int:
        """Return the line number of the current position."""
        self.counted_lines += self.buffer.count("\n", self.counted_until, self.position)
        self.counted_until = self.position
        return self.counted_lines

    def read_more(self):
        """Read until the buffer is at least twice as long, so that reading a long value takes linear time."""
        self.line()
        parts, size = [self.buffer[self.position :]], 0
        n_old = len(parts[0])
        while size <= n_old and not self.is_end:
            chunk = next(self.chunks, None)
            self.is_end = chunk is None
            parts.append(chunk or "")
            size += len(parts[-1])
        self.buffer, self.position, self.counted_until = "".join(parts), 0, 0

    def peek(self) -> str:
        """Return the next character that isn't whitespace, or "" at the end of the text."""
        while True:
            if match := find_content(self.buffer, self.position):
                self.position = match.start()
                return match.group()
            self.position = len(self.buffer)
            if self.is_end:
                return ""
            self.read_more()

    def skip_line(self):
        """Move to the end of the current line."""
        while (end := self.buffer.find("\n", self.position)) < 0 and not self.is_end:
            self.position = len(self.buffer)
            self.read_more()
        self.position = end if end >= 0 else len(self.buffer)

    def elements(self, line_start: str = "") -> Iterator[tuple[str, Any]]:
        """Yield (location, value) for each element of the array at the current position, and move past the array.

        If line_start, such as "\\n  {", is given, a JsonError is yielded in place of an element that is not JSON, and
        reading continues at the next line that begins with line_start. If there is none, the JsonError is raised.
        """
        self.position += 1
        separator = self.peek()
        for number in itertools.count(1):
            if separator == "]" and number == 1:
                break
            location = f"{self.path} record {number:,} (line {self.line():,})"
            try:
                yield location, self.read_value(location)
                separator = self.peek()
                if separator not in ("]", ","):
                    self.fail(location, f"a comma or bracket is missing before {separator!r}" if separator else "")
            except JsonError as error:
                is_comma_missing = line_start and separator in ("{", "[")  # and the next element is intact
                if is_comma_missing:
                    self.position -= 1
                elif not line_start or self.n_wasted > MAX_WASTED_CHARS or not self._skip_to(line_start):
                    raise
                yield location, error
                separator = ","
            if separator == "]":
                break
            self.position += 1
            if self.peek() == "]" and not line_start:
                self.fail(location, "no other record follows the comma")
        self.position += 1

    def _skip_to(self, line_start: str) -> bool:
        """Move to the last character of the next line_start, and return True if there is one."""
        while (found := self.buffer.find(line_start, self.position)) < 0 and not self.is_end:
            self.position = max(self.position, len(self.buffer) - len(line_start))
            self.read_more()
        self.position = found + len(line_start) - 2
        return found >= 0

    def read_value(self, location: str) -> Any:
        """Return the value at the current position, to which peek() has moved, and move past the value."""
        value, self.position = self._decode(location, 0)
        return value

    def peek_element(self, location: str, offset: int = 0) -> Any:
        """Return the first element of the array that starts `offset` characters ahead, or None if it is empty."""
        while not (match := find_content(self.buffer, self.position + offset + 1)) and not self.is_end:
            self.read_more()
        offset = (match.start() if match else len(self.buffer)) - self.position
        return None if match and match.group() == "]" else self._decode(location, offset)[0]

    def _decode(self, location: str, offset: int) -> tuple[Any, int]:
        """Return (value, its end in the buffer) for the JSON value `offset` characters after the current position."""
        while True:
            try:
                value, end = self.decode(self.buffer, self.position + offset)
                # a number may continue in the next chunk: 1 and 1.5, 1 and 1e5
                if self.is_end or not isinstance(value, (int, float)) or end + UNDECIDED_CHARS < len(self.buffer):
                    return value, end
            except json.JSONDecodeError as error:
                self.n_wasted += error.pos - self.position
                is_open_string = error.msg.startswith("Unterminated")
                if self.is_end or not (is_open_string or error.pos + UNDECIDED_CHARS > len(self.buffer)):
                    ends_early = is_open_string or is_partial_token(self.buffer[error.pos :])
                    line = self.line() + self.buffer.count("\n", self.position, error.pos)
                    self.fail(location, "" if ends_early else f"{error.msg} at line {line:,}")
            except (ValueError, RecursionError) as error:  # a number with too many digits, brackets nested too deeply
                self.fail(location, str(error))
            if len(self.buffer) - self.position > MAX_VALUE_CHARS:
                self.fail(location, f"no closing bracket or quote within {MAX_VALUE_CHARS:,} characters")
            self.read_more()

    def expect_end(self):
        """Raise UserError if anything follows the array."""
        if character := self.peek():
            problem = f"{self.path} line {self.line():,}: {character!r} follows the end of the array"
            raise UserError(f"{problem}: put all records into one array, or save one record per line as .jsonl")

    def fail(self, location: str, problem: str):
        """Raise JsonError for the value at location; an empty problem means that the text ends early."""
        if not problem:
            raise JsonError(f"{location}: the file was cut off before the end of its JSON: get the complete file")
        raise JsonError(f"{location} is not JSON ({problem}): correct or delete the record")
