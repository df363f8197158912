"""Streaming detokenizer that returns only complete UTF-8 characters and removes stop strings.

texts = Detokenizer(tokenizer, 2, stop=["###"])
for ids in model.stream(prompts, 100):
    print(texts.add(ids.tolist())[0], end="")
    if texts.done:
        break
print(texts.finish()[0])
"""

import json
import os
from typing import Sequence

from configurator import ROOT, UserError
from dongpt.text.tokenizers import Tokenizer


class Detokenizer:
    """Output of a batch: texts[i] is the text of sequence i, and end_reasons[i] is why it ended ("" if it has not)."""

    def __init__(self, tokenizer: Tokenizer, batch_size: int, stop: Sequence[str] = (), stop_ids: Sequence[int] = ()):
        self.stop, self.stop_ids = tuple(stop), frozenset(stop_ids)
        self.texts, self.end_reasons, self.n_tokens = [""] * batch_size, [""] * batch_size, [0] * batch_size
        self._decoders = [tokenizer.decoder() for _ in range(batch_size)]
        self._withheld_text = [""] * batch_size  # possibly the start of a stop string

    @property
    def done(self) -> bool:
        """Return True if all sequences have ended."""
        return all(self.end_reasons)

    def add(self, ids: Sequence[int]) -> list[str]:
        """Append the next id of each sequence; return its new text, withholding possible starts of stop strings."""
        return [self._append(i, new_id, "stop" if new_id in self.stop_ids else "") for i, new_id in enumerate(ids)]

    def finish(self, reason: str = "length") -> list[str]:
        """End the sequences that have not ended yet; return the withheld text of each."""
        return [self._append(i, -1, reason) for i in range(len(self.texts))]

    def _append(self, i: int, new_id: int, end_reason: str) -> str:
        """Append new_id to sequence i, or end it without new_id if there is an end_reason; return its new text."""
        if self.end_reasons[i]:
            return ""
        self.n_tokens[i] += not end_reason
        piece = self._decoders[i](None if end_reason else new_id)  # None flushes an incomplete character
        text = self._withheld_text[i] + piece
        n_withheld = 0
        if stop_positions := [text.index(stop) for stop in self.stop if stop in text]:
            text, end_reason = text[: min(stop_positions)], "stop"
        elif not end_reason:
            prefixes = (stop[:n] for stop in self.stop for n in range(1, len(stop)))
            n_withheld = max((len(prefix) for prefix in prefixes if text.endswith(prefix)), default=0)
        new_text, self._withheld_text[i] = text[: len(text) - n_withheld], text[len(text) - n_withheld :]
        self.texts[i], self.end_reasons[i] = self.texts[i] + new_text, end_reason
        return new_text


def parse_stop_strings(stop: str) -> list[str]:
    """Parse the `stop` setting: empty, one string, or a JSON list of strings. \\n means newline. Raises UserError."""
    single_string = stop.replace("\\n", "\n").replace("\\t", "\t")  # shells pass \n as two characters
    if not stop.startswith("["):
        return [single_string] if stop else []
    try:
        stop_strings = json.loads(stop, strict=False)  # newlines are allowed inside the strings
    except ValueError:
        return [single_string]
    if not stop_strings or not all(isinstance(stop_string, str) and stop_string for stop_string in stop_strings):
        raise UserError(f'--stop={stop}: pass one string, or a JSON list of strings, as in --stop=\'["a", "b"]\'')
    return stop_strings


def parse_stop_ids(stop_ids: str, vocab_size: int) -> list[int]:
    """Parse a comma-separated list of ids. Raises UserError if an id is not in the vocabulary."""
    id_texts = [id_text.strip() for id_text in stop_ids.split(",")] if stop_ids.strip() else []
    if invalid_ids := [id_text for id_text in id_texts if not id_text.isdecimal() or int(id_text) >= vocab_size]:
        invalid_text = ", ".join(map(repr, invalid_ids))
        remedy = "separate ids with commas, as in --stop_ids=0,1"
        raise UserError(f"--stop_ids: expected ids from 0 to {vocab_size - 1}, got {invalid_text}: {remedy}")
    return [int(id_text) for id_text in id_texts]


def read_prompt(prompt: str) -> str:
    """Return the contents of the file if the prompt setting is FILE:path, or the setting itself otherwise.

    The path is relative to the working directory or the repository. Raises UserError if the file cannot be read.
    """
    if not prompt.startswith("FILE:"):
        return prompt
    name = prompt.removeprefix("FILE:")
    for path in (name, os.path.join(ROOT, name)):
        if os.path.isfile(path):
            try:
                with open(path, encoding="utf-8-sig") as file:
                    return file.read()
            except UnicodeDecodeError as error:
                raise UserError(f"prompt file {name} is not UTF-8 at byte {error.start}: save it as UTF-8") from error
    raise UserError(f"prompt file {name!r} not found: pass the path of a text file after FILE:, or the prompt itself")
