"""Ids become text: whole characters at a time, and nothing of a string at which a text is to stop.

texts = Texts(tokenizer, n_rows=2, stop=["\n\n"])
for ids in model.stream(prompts, 100):
    print(texts.add(ids.tolist())[0], end="")
    if texts.done:
        break
print(texts.finish()[0])
"""

import json
from typing import Sequence

from configurator import UserError
from dongpt.text.tokenizers import Tokenizer


class Texts:
    """The texts of a batch as they grow. texts[i] is what row i says so far, ends[i] why it is over, or ""."""

    def __init__(self, tokenizer: Tokenizer, n_rows: int, stop: Sequence[str] = (), stop_ids: Sequence[int] = ()):
        self.stop, self.stop_ids = tuple(stop), frozenset(stop_ids)
        self.texts, self.ends, self.n_tokens = [""] * n_rows, [""] * n_rows, [0] * n_rows
        self._decode = [tokenizer.decoder() for _ in range(n_rows)]
        self._held = [""] * n_rows  # may turn out to be the beginning of a stop string

    @property
    def done(self) -> bool:
        """Whether all rows are over."""
        return all(self.ends)

    def add(self, ids: Sequence[int]) -> list[str]:
        """Take the next id of each row; return what is certain to be said by now and was not returned before."""
        return [self._add(row, i) for row, i in enumerate(ids)]

    def _add(self, row: int, i: int) -> str:
        if self.ends[row]:
            return ""
        if i in self.stop_ids:  # its own text is not said
            return self._end(row, "stop")
        self.n_tokens[row] += 1
        return self._say(row, self._decode[row](i))

    def _say(self, row: int, piece: str) -> str:
        text = self._held[row] + piece
        found = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        if found:
            self.ends[row] = "stop"
            said, self._held[row] = text[: min(found)], ""
        else:
            size = max((n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
            said, self._held[row] = text[: len(text) - size], text[len(text) - size :]
        self.texts[row] += said
        return said

    def _end(self, row: int, why: str) -> str:
        said = self._say(row, self._decode[row](None))  # what is left of a broken character
        if not self.ends[row]:
            rest, self._held[row] = self._held[row], ""
            self.ends[row], self.texts[row], said = why, self.texts[row] + rest, said + rest
        return said

    def finish(self, why: str = "length") -> list[str]:
        """End the rows that are not over; return what they still have to say."""
        return [self._end(row, why) if not self.ends[row] else "" for row in range(len(self.ends))]


def read_stop(stop: str) -> list[str]:
    """The strings that the setting stop means: none, one, or a JSON list; \\n is a line end. Raises UserError."""
    one = stop.replace("\\n", "\n").replace("\\t", "\t")  # what a shell hands on when somebody types "\n"
    if not stop.startswith("["):
        return [one] if stop else []
    try:
        strings = json.loads(stop, strict=False)  # a line end may stand in it as it is
    except ValueError:
        return [one]
    if not strings or not all(isinstance(string, str) and string for string in strings):
        raise UserError(f'--stop={stop}: pass one string, or a JSON list of strings, as in --stop=\'["a", "b"]\'')
    return strings


def read_stop_ids(stop_ids: str, vocab_size: int) -> list[int]:
    """The ids that a setting lists, divided by commas. Raises UserError for what is no id of the vocabulary."""
    pieces = [piece.strip() for piece in stop_ids.split(",")] if stop_ids.strip() else []
    if wrong := [piece for piece in pieces if not piece.isdecimal() or int(piece) >= vocab_size]:
        raise UserError(
            f"--stop_ids: {', '.join(map(repr, wrong))} is no id from 0 to {vocab_size - 1}: "
            f"list ids with commas, as in --stop_ids=0,1"
        )
    return [int(piece) for piece in pieces]
