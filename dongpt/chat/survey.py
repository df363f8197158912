"""Count the conversations in files, and report their forms, two examples and the broken records."""

import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Iterable

from configurator import UserError
from dongpt.chat.records import (
    LOSS_KEYS,
    MESSAGE_KEYS,
    RECORD_KEYS,
    SYSTEM_KEYS,
    Form,
    Messages,
    RecordError,
    is_empty,
    normalize_names,
)

MAX_LISTED = 10  # broken records, forms and files that are named; more are counted
MAX_KEYS = 20  # names of unused keys that are kept per file
MAX_KEY_SETS = 1000  # distinct sets of keys that are looked at per file
OBEYED_KEYS = {*SYSTEM_KEYS, *LOSS_KEYS}  # in every form
NUM_EXAMPLES = 2
EXAMPLE_MESSAGES, EXAMPLE_CHARS = 6, 100  # of a conversation, of a message


@dataclass
class Survey:
    """Counts of what was read."""

    conversations: int = 0
    answers: int = 0
    answers_without_loss: int = 0
    examples: list[Messages] = field(default_factory=list)  # the first NUM_EXAMPLES conversations
    forms: dict[str, Counter[str]] = field(default_factory=dict)  # by path
    unused: dict[str, dict[str, None]] = field(default_factory=dict)  # keys, by path
    broken: list[str] = field(default_factory=list)  # location and reason of the first MAX_LISTED
    first_broken: str = ""  # the first of them, with the remedy
    kinds: Counter[str] = field(default_factory=Counter)  # of broken records
    key_sets: dict[str, set[tuple[str | None, ...]]] = field(default_factory=dict)  # that were examined, by path

    @property
    def num_broken(self) -> int:
        """The number of broken records."""
        return sum(self.kinds.values())

    def add_form(self, path: str, form: Form, record: Any):
        """Count a record of this form, and note the keys that are not used."""
        if path not in self.forms:
            self.forms[path], self.key_sets[path] = Counter(), set()
        forms, key_sets = self.forms[path], self.key_sets[path]
        forms[form.name if form.name in forms or len(forms) < MAX_LISTED else "other forms"] += 1
        if isinstance(record, dict) and len(key_sets) < MAX_KEY_SETS and (keys := tuple(record)) not in key_sets:
            key_sets.add(keys)
            unused = (key for key in keys if key not in form.used and key not in OBEYED_KEYS)
            self.add_unused(path, (key for key in unused if key not in RECORD_KEYS or not is_empty(record[key])))
        messages = record if isinstance(record, list) else record.get(form.used[0]) if form.used else None
        if not isinstance(messages, list) or max(map(len, messages)) < 3:
            return
        for message in messages:
            if len(message) > 2 and len(key_sets) < MAX_KEY_SETS and (keys := (*message, None)) not in key_sets:
                key_sets.add(keys)
                names = normalize_names(tuple(message), MESSAGE_KEYS, form.used)
                self.add_unused(path, (name for name in names if name not in MESSAGE_KEYS and name not in form.used))

    def add_unused(self, path: str, keys: Iterable[str]):
        """Note keys that are not read."""
        unused = self.unused.setdefault(path, {})
        for key in keys:
            if len(unused) < MAX_KEYS:
                unused[key] = None

    def add_conversation(self, conversation: Messages):
        """Count a conversation."""
        self.conversations += 1
        if len(self.examples) < NUM_EXAMPLES:
            self.examples.append(conversation)
        for role, _, in_loss in conversation:
            if role == "assistant":
                self.answers += 1
                self.answers_without_loss += not in_loss

    def add_broken(self, location: str, error: RecordError):
        """Count a broken record."""
        self.kinds[error.kind] += 1
        if len(self.broken) < MAX_LISTED:
            self.broken.append(f"{location}: {error.problem}")
        self.first_broken = self.first_broken or f"{location}: {error}"

    def check(self, paths: list[str], skip_broken: bool):
        """Raise UserError if there are broken records, unless they are skipped, or if nothing is left to train on."""
        source = paths[0] if len(paths) == 1 else f"{len(paths):,} files"
        n_records = self.num_broken + self.conversations
        if self.num_broken and not (skip_broken and self.conversations):
            remedy = "correct or delete {}, or pass --skip_broken to leave {} out"
            if not self.conversations:
                remedy = "correct {}"
            if self.num_broken == 1:
                raise UserError(f"{self.first_broken}; {remedy.format('it', 'it')}")
            print("\n".join(self.broken_lines()))
            count = f"{self.num_broken:,} of {n_records:,} records of {source} are broken"
            raise UserError(f"{count}, first {self.first_broken}; {remedy.format('them', 'them')}")
        if not self.conversations:
            raise UserError(f"{source} has no conversations: pass --input=PATH of another file")
        if self.answers_without_loss == self.answers:
            raise UserError(f"no answer in {source} counts toward the loss: set weight to 1 in the answers to train on")

    def broken_lines(self) -> list[str]:
        """The first broken records, and the number of broken records by kind."""
        kinds = [f"{n:,} with {kind}" for kind, n in self.kinds.most_common(MAX_LISTED)]
        kinds += [f"{len(self.kinds) - MAX_LISTED:,} more kinds"] if len(self.kinds) > MAX_LISTED else []
        n_more = self.num_broken - len(self.broken)
        more = [f"  and {n_more:,} more"] if n_more else []
        return [f"broken records: {self.num_broken:,} ({', '.join(kinds)})", *(f"  {b}" for b in self.broken), *more]

    def lines(self) -> list[str]:
        """The report: forms of the files, first conversations, answers excluded from the loss, and broken records."""
        described: dict[str, list[str]] = {}  # paths by what is said about them
        counts: Counter[str] = Counter()
        for path, forms in self.forms.items():
            unused = ", ".join(self.unused.get(path, ()))
            text = " and ".join(form if len(forms) == 1 else f"{form} {n:,} times" for form, n in forms.most_common())
            text += f"; keys without effect: {display(unused, 200)}" if unused else ""
            described.setdefault(text, []).append(path)
            counts[text] += forms.total()
        lines = []
        for text, paths in [*described.items()][:MAX_LISTED]:
            files = os.path.basename(paths[0]) if len(paths) == 1 else f"{len(paths):,} files"
            lines.append(f"form of {files}: {text}")
        lines += [f"and {len(described) - MAX_LISTED:,} more forms"] if len(described) > MAX_LISTED else []
        for number, conversation in enumerate(self.examples, 1):
            lines.append(f"conversation {number:,}:")
            for role, content, in_loss in conversation[:EXAMPLE_MESSAGES]:
                no_loss = " (not in the loss)" if role == "assistant" and not in_loss else ""
                lines.append(f"  {role}{no_loss}: {display(content, EXAMPLE_CHARS)}")
            n_more = len(conversation) - EXAMPLE_MESSAGES
            lines += [f"  and {n_more:,} more messages"] if n_more > 0 else []
        if self.answers_without_loss:
            counted = f"{self.answers_without_loss:,} of {self.answers:,} answers do not count toward the loss"
            lines.append(f"{counted}, as the file specifies: the model reads them but does not learn them")
        if self.num_broken:
            lines += [f"--skip_broken left out {self.num_broken:,} records:", *self.broken_lines()]
        return lines


def display(text: str, n: int) -> str:
    """Return the first n characters of a text on one line, without control characters."""
    start = " ".join(text[: 4 * n].split())
    shown = "".join(char if char.isprintable() else "\ufffd" for char in start[:n])
    return shown + (f"... ({len(text):,} characters)" if len(text) > 4 * n or len(start) > n else "")
