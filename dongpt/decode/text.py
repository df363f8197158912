"""Streaming detokenizer: complete UTF-8 characters only, stop strings removed.

texts = Detokenizer(tokenizer, 2, stop=["###"])
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


class Detokenizer:
    """The texts of a batch as they grow. texts[i] is the text of sequence i so far, ends[i] why it ended, or ""."""

    def __init__(self, tokenizer: Tokenizer, batch_size: int, stop: Sequence[str] = (), stop_ids: Sequence[int] = ()):
        self.stop, self.stop_ids = tuple(stop), frozenset(stop_ids)
        self.texts, self.ends, self.n_tokens = [""] * batch_size, [""] * batch_size, [0] * batch_size
        self._decode = [tokenizer.decoder() for _ in range(batch_size)]
        self._withheld = [""] * batch_size  # possibly the beginning of a stop string

    @property
    def done(self) -> bool:
        """Whether all texts have ended."""
        return all(self.ends)

    def add(self, ids: Sequence[int]) -> list[str]:
        """Append the next id of each sequence; return the new text of each that no stop string can still remove."""
        return [self._add(i, new_id) for i, new_id in enumerate(ids)]

    def _add(self, i: int, new_id: int) -> str:
        if self.ends[i]:
            return ""
        if new_id in self.stop_ids:  # not part of the text
            return self._end(i, "stop")
        self.n_tokens[i] += 1
        return self._append(i, self._decode[i](new_id))

    def _append(self, i: int, piece: str) -> str:
        text = self._withheld[i] + piece
        found = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        if found:
            self.ends[i] = "stop"
            new, self._withheld[i] = text[: min(found)], ""
        else:
            size = max((n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
            new, self._withheld[i] = text[: len(text) - size], text[len(text) - size :]
        self.texts[i] += new
        return new

    def _end(self, i: int, why: str) -> str:
        new = self._append(i, self._decode[i](None))  # the bytes of an incomplete character
        if not self.ends[i]:
            rest, self._withheld[i] = self._withheld[i], ""
            self.ends[i], self.texts[i], new = why, self.texts[i] + rest, new + rest
        return new

    def finish(self, why: str = "length") -> list[str]:
        """End the texts that have not ended yet; return what was withheld of each."""
        return [self._end(i, why) if not self.ends[i] else "" for i in range(len(self.ends))]


def read_stop(stop: str) -> list[str]:
    """The strings that the setting `stop` names: none, one, or a JSON list; \\n is a newline. Raises UserError."""
    one = stop.replace("\\n", "\n").replace("\\t", "\t")  # what a shell passes on when somebody types "\n"
    if not stop.startswith("["):
        return [one] if stop else []
    try:
        strings = json.loads(stop, strict=False)  # newlines are allowed inside the strings
    except ValueError:
        return [one]
    if not strings or not all(isinstance(string, str) and string for string in strings):
        raise UserError(f'--stop={stop}: pass one string, or a JSON list of strings, as in --stop=\'["a", "b"]\'')
    return strings


def read_stop_ids(stop_ids: str, vocab_size: int) -> list[int]:
    """The ids in a comma-separated setting. Raises UserError for anything that is not an id of the vocabulary."""
    pieces = [piece.strip() for piece in stop_ids.split(",")] if stop_ids.strip() else []
    if wrong := [piece for piece in pieces if not piece.isdecimal() or int(piece) >= vocab_size]:
        ids = ", ".join(map(repr, wrong))
        remedy = "list ids with commas, as in --stop_ids=0,1"
        raise UserError(f"--stop_ids: {ids} is no id from 0 to {vocab_size - 1}: {remedy}")
    return [int(piece) for piece in pieces]
