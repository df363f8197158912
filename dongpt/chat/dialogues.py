"""Conversations from files, checked, and put together with those that they must share a split with.

    dialogues = Dialogues(Files(["chats.jsonl"]))
    for conversation in dialogues.read(): ...      # [("user", "Hello"), ("assistant", "Hello! How are you?")]

JSON lines hold a conversation a line, {"messages": [{"role": ..., "content": ...}, ...]} or the list alone, or a
message a line with an empty line between conversations, as chat.py saves them. CSV and Parquet hold a question and its
answer a row. Everything else is text with the tags of the Empathetic-Dialogue-System.
"""

import hashlib
import json
import re
import zlib
from dataclasses import dataclass
from typing import Callable, Iterable, Iterator

import numpy as np

from configurator import UserError
from dongpt.text.documents import RECORDS, Files, kind_of
from dongpt.text.prepare import BUCKETS, Survey, check_fraction, choose
from dongpt.text.template import Segment, Template
from dongpt.text.tokenizers import END

Messages = list[tuple[str, str]]  # (role, content)
ROLES = ("system", "user", "assistant")
PHRASE = 4  # what more conversations say is a phrase, and joins none of them, unless
HISTORY = 80  # characters of two utterances that follow each other are too many for a phrase
LONG = 20  # characters of an utterance that joins two conversations by itself
FORM = (
    'a line must be {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}, '
    "where user and assistant take turns, behind at most one system message"
)


def check(conversation: Messages, place: str) -> Messages:
    """conversation, if user and assistant take turns in it. Raises UserError that begins with place."""
    turns = conversation[1:] if conversation and conversation[0][0] == "system" else conversation
    wrong = next((i for i, (role, _) in enumerate(turns) if role != ROLES[1 + i % 2]), None)
    if wrong is not None:
        raise UserError(f"{place}: {ROLES[1 + wrong % 2]} should speak where {turns[wrong][0]} does: {FORM}")
    if not turns or len(turns) % 2:
        raise UserError(f"{place}: the conversation does not end with an answer: {FORM}")
    if blank := next((role for role, content in conversation if not content.strip()), None):
        raise UserError(f"{place}: there is nothing in what {blank} says: mend or drop it")
    return conversation


def read_message(message, place: str) -> tuple[str, str]:
    """(role, content) of a message out of JSON. Raises UserError that begins with place."""
    if not isinstance(message, dict) or not {"role", "content"} <= set(message):
        raise UserError(f"{place}: {str(message)[:60]!r} is no message with role and content: {FORM}")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise UserError(f"{place}: the role {str(role)[:40]!r} is none of {', '.join(ROLES)}")
    if not isinstance(content, str) or "\0" in content or any("\ud800" <= c <= "\udfff" for c in content):
        raise UserError(f"{place}: the content {str(content)[:40]!r} is no text: mend or drop it")
    return role, content.replace("\r\n", "\n").replace("\r", "\n")


def read_json_lines(lines: Iterable[str], path: str) -> Iterator[Messages]:
    """The conversations of JSON lines, checked; a message a line, or a conversation a line."""
    gathered, number, began = [], 0, 1
    for number, line in enumerate(lines, 1):
        place = f"{path} line {number:,}"
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                what = getattr(error, "msg", error)
                raise UserError(
                    f"{place} is no JSON ({what}): mend or drop it, a line is a message or a conversation"
                ) from error
            if isinstance(record, dict) and "messages" not in record:
                began = began if gathered else number
                gathered.append(read_message(record, place))
                continue
        if gathered:
            yield check(gathered, f"{path} line {began:,}")
            gathered = []
        if line.strip():
            messages = record["messages"] if isinstance(record, dict) else record
            if not isinstance(messages, list):
                raise UserError(f"{place} holds no list of messages: {FORM}")
            yield check([read_message(message, place) for message in messages], place)
    if gathered:
        yield check(gathered, f"{path} line {began:,}")


TAG = re.compile(r"<(bot|human|emotion|context)> ?")
TURN_OF = {"bot": "user", "human": "assistant"}
END_TAG = re.compile(r" *<endOfText>\s*$")


def read_tagged(lines: Iterable[str], path: str) -> Iterator[Messages]:
    """The records of a text with tags, checked: <bot> is the user, <human> answers, <endOfText> ends a record.

    What <emotion> and <context> say becomes a system message.
    """
    record: Messages = []
    began, number = 1, 0
    for number, line in enumerate(lines, 1):
        place, tag = f"{path} line {number:,}", TAG.match(line)
        text, ends = END_TAG.subn("", line[tag.end() :] if tag else line)
        text = text.strip()
        if tag and tag[1] in TURN_OF:
            began = began if record else number
            if tag[1] == "bot" and record and record[-1][0] == "user":
                raise UserError(f"{place}: <bot> speaks twice in a row: the tags must be <bot>, then <human>")
            if tag[1] == "human" and (not record or record[-1][0] != "user"):
                raise UserError(f"{place}: <human> answers nothing: the tags must be <bot>, then <human>")
            record.append((TURN_OF[tag[1]], text))
        elif tag:
            if record:
                yield check(record, f"{path} line {began:,}")
            record, began = [("system", f"emotion: {text}" if text and tag[1] == "emotion" else text)], number
        elif text and not record:
            raise UserError(
                f"{place} begins with none of <bot>, <human>, <emotion>, <context>: a dialogue is a text "
                f"with these tags, or JSON lines, CSV or Parquet by the name of the file"
            )
        elif text:  # a turn of several lines
            record[-1] = (record[-1][0], f"{record[-1][1]}\n{text}".strip())
        if ends and record and record[-1][0] == "assistant":
            yield check(record, f"{path} line {began:,}")
            record = []
    if record:
        yield check(record, f"{path} line {began:,}")


def put_together(records: list[Messages]) -> Iterator[Messages]:
    """Records that follow each other in one dialogue, joined.

    The Empathetic-Dialogue-System cut a dialogue into pairs, and added the pairs with the roles swapped: that an answer
    and the question behind it are a pair of their own shows that both belong together.
    """
    pairs = {(a[1], b[1]) for record in records for a, b in zip(record, record[1:]) if b[0] == "assistant"}
    dialogue: Messages = []
    for record in records:
        if dialogue and record[0][0] == "user" and (dialogue[-1][1], record[0][1]) in pairs:
            dialogue = dialogue + record
            continue
        if dialogue:
            yield dialogue
        dialogue = record
    if dialogue:
        yield dialogue


@dataclass(frozen=True)
class Dialogues:
    """The conversations of files."""

    files: Files
    user: str = "user"  # CSV, Parquet: the column that holds the question
    assistant: str = "assistant"  # CSV, Parquet: the column that holds the answer
    conversation: str = ""  # CSV, Parquet: rows that follow each other with the same value here are one conversation

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return self.files.size

    def stamp(self):
        """What changes when a file does."""
        return self.files.stamp()

    def read(self, on_bytes: Callable[[int], None] = lambda n: None, digest=None) -> Iterator[Messages]:
        """The conversations in order. Raises UserError naming file and line for what is none."""
        for path in self.files.paths:
            kind = kind_of(path)[0]
            if kind in (".csv", ".parquet"):
                yield from self._rows(path, digest)
                on_bytes(Files([path]).size)
            elif kind in RECORDS or kind == ".json":
                yield from read_json_lines(self.files.lines(path, on_bytes, digest), path)
            else:
                yield from put_together([*read_tagged(self.files.lines(path, on_bytes, digest), path)])

    def _rows(self, path: str, digest) -> Iterator[Messages]:
        one = Files([path], encoding=self.files.encoding, option=self.files.option)
        name = (self.conversation,) if self.conversation else ()
        records = one.placed_records(self.user, self.assistant, *name, digest=digest, labels=name)
        before, dialogue = None, []
        for place, (question, answer, *name) in records:
            pair = check([("user", question), ("assistant", answer)], place)
            if dialogue and not (name and name[0].strip() and name == before):
                yield dialogue
                dialogue = []
            dialogue, before = dialogue + pair, name
        if dialogue:
            yield dialogue


# ----------------------------------------------------------------------------------------------------------------------
# which conversations belong on the same side of a split


def _hash(texts: Iterable[str]) -> bytes:
    """What two collections of utterances have in common if they are the same but for order, case and blanks."""
    return hashlib.blake2b(
        "\n".join(sorted(" ".join(text.lower().split()) for text in texts)).encode("utf-8"), digest_size=12
    ).digest()


class Kinship:
    """Groups of conversations: the same one again, the same with the roles swapped, a part of another.

    Two belong together if their utterances are the same; if strict is 1, also if they share a long utterance, or two
    that follow each other, which at most PHRASE conversations have: more have a phrase in common, no history. If it is
    2, two that are long enough always join.
    """

    def __init__(self):
        self.first: list[int] = []  # the number of the first conversation with the same utterances
        self.names: list[int] = []  # a hash of each conversation
        self._known: dict[bytes, int] = {}
        self._sharing: dict[bytes, list[int]] = {}  # by one or two utterances: the first PHRASE + 1 that have them
        self._links: list[tuple[int, int]] = []  # by two long ones, however many have them

    def add(self, conversation: Messages):
        """The next conversation."""
        texts, number = [content for role, content in conversation if role != "system"], len(self.first)
        name = _hash(texts)
        self.first.append(self._known.setdefault(name, number))
        self.names.append(zlib.crc32(name))
        if self.first[-1] == number:
            alone = [(text,) for text in texts if len(text) >= LONG]
            for some in [*alone, *zip(texts, texts[1:])]:
                sharing = self._sharing.setdefault(_hash(some), [])
                if len(some) == 2 and sum(map(len, some)) >= HISTORY and sharing and sharing[0] != number:
                    self._links.append((sharing[0], number))
                if len(sharing) <= PHRASE and number not in sharing:
                    sharing.append(number)

    def groups(self, strict: int) -> list[int]:
        """A number for each conversation, the same within a group, that has nothing to do with their order."""
        parent = self.first.copy()

        def root(i: int) -> int:
            while parent[i] != i:
                parent[i] = parent[parent[i]]
                i = parent[i]
            return i

        if strict:
            for one, *others in self._sharing.values():
                if len(others) < PHRASE:
                    for other in others:
                        parent[root(other)] = root(one)
        for one, other in self._links if strict == 2 else ():
            parent[root(other)] = root(one)
        return [self.names[root(i)] for i in range(len(parent))]


@dataclass(frozen=True)
class Chats:
    """Conversations as preparing.py wants them, with the numbers of their groups."""

    dialogues: Dialogues
    template: Template
    groups: list[int]
    strict: int = 2  # of Kinship.groups

    @classmethod
    def of(cls, dialogues: Dialogues, template: Template, val_fraction: float) -> "Chats":
        """Read all conversations once to find their groups: as strict ones as can be split."""
        check_fraction(val_fraction)
        kinship, lengths = Kinship(), []
        for conversation in dialogues.read():
            kinship.add(conversation)
            lengths.append(sum(len(content) for _, content in conversation))
        for strict in (2, 1, 0):
            groups, survey = kinship.groups(strict), Survey(len(lengths), sum(lengths))
            np.add.at(survey.buckets, np.array(groups, dtype=np.int64) % BUCKETS, lengths)
            if lengths and choose(survey, val_fraction, least=2).by == "documents":
                break
        return cls(dialogues, template, groups, strict)

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return self.dialogues.size

    def stamp(self):
        """What changes when a file does."""
        return self.dialogues.stamp()

    def marked(
        self, survey: Survey, on_bytes: Callable[[int], None], digest=None
    ) -> Iterator[tuple[int, list[Segment]]]:
        """(the number of its group, parts) of each conversation."""
        for group, conversation in zip(self.groups, self.dialogues.read(on_bytes, digest)):
            yield group, to_parts(conversation, self.template)


def to_parts(conversation: Messages, template: Template) -> list[Segment]:
    """The conversation as a model is trained on it, END behind it."""
    parts = []
    for role, content in conversation:
        if role == "system":
            parts += template.opening(content)
        else:
            parts += template.question(content) if role == "user" else template.answer(content)
    return [*parts, Segment(END, is_special=True)]
