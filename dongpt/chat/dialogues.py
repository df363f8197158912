"""Interpret files as conversations, and find those that must be on the same side of a split.

    dialogues = Dialogues(Files(["chats.jsonl"]))
    for conversation in dialogues.read(): ...      # [("user", "Hello"), ("assistant", "Hello! How are you?")]

JSON lines hold one conversation per line, {"messages": [{"role": ..., "content": ...}, ...]} or only the list, or one
message per line with a blank line between conversations, as chat.py saves them. CSV and Parquet hold a question and its
answer per row. Every other file is text with the tags of the Empathetic-Dialogue-System.
"""

import hashlib
import re
import zlib
from dataclasses import dataclass, replace
from itertools import chain, groupby
from typing import Any, Iterable, Iterator

import numpy as np

from configurator import UserError
from dongpt.text.documents import RECORDS, Files, OnBytes, check_text, kind_of, parse_json
from dongpt.text.prepare import NUM_BUCKETS, CorpusStats, check_val_fraction, choose_val_buckets
from dongpt.text.template import Segment, Template
from dongpt.text.tokenizers import END

Messages = list[tuple[str, str]]  # (role, content)
ROLES = ("system", "user", "assistant")
FORM = (
    'a line must be {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}, '
    "where user and assistant take turns, after at most one system message"
)


def check_turns(conversation: Messages, place: str) -> Messages:
    """conversation, if user and assistant take turns in it. Raises UserError that starts with place."""
    turns = conversation[1:] if conversation and conversation[0][0] == "system" else conversation
    wrong = next((i for i, (role, _) in enumerate(turns) if role != ROLES[1 + i % 2]), None)
    if wrong is not None:
        raise UserError(f"{place}: {ROLES[1 + wrong % 2]} should speak where {turns[wrong][0]} does: {FORM}")
    if not turns or len(turns) % 2:
        raise UserError(f"{place}: the conversation does not end with an answer: {FORM}")
    if blank := next((role for role, content in conversation if not content.strip()), None):
        raise UserError(f"{place}: there is nothing in what {blank} says: mend or drop it")
    return conversation


def read_message(message: Any, place: str) -> tuple[str, str]:
    """(role, content) of a message from JSON. Raises UserError that starts with place."""
    if not isinstance(message, dict) or not {"role", "content"} <= set(message):
        raise UserError(f"{place}: {str(message)[:60]!r} is no message with role and content: {FORM}")
    if message["role"] not in ROLES:
        raise UserError(f"{place}: the role {str(message['role'])[:40]!r} is none of {', '.join(ROLES)}")
    return message["role"], check_text(message["content"], place, "content")


def read_json_lines(lines: Iterable[str], path: str) -> Iterator[Messages]:
    """The conversations of JSON lines, checked; one message per line, or one conversation per line."""
    single: Messages = []  # messages of a conversation that has one per line
    first = ""  # place of the first of them
    for number, line in enumerate(chain(lines, [""]), 1):
        place = f"{path} line {number:,}"
        record = parse_json(line, place) if line.strip() else None
        if isinstance(record, dict) and "messages" not in record:
            first = first if single else place
            single.append(read_message(record, place))
            continue
        if single:
            yield check_turns(single, first)
            single = []
        if line.strip():
            messages = record["messages"] if isinstance(record, dict) else record
            if not isinstance(messages, list):
                raise UserError(f"{place} holds no list of messages: {FORM}")
            yield check_turns([read_message(message, place) for message in messages], place)


TAG = re.compile(r"<(bot|human|emotion|context)> ?")
ROLE_OF = {"bot": "user", "human": "assistant"}
END_TAG = re.compile(r" *<endOfText>\s*$")


def read_tagged(lines: Iterable[str], path: str) -> Iterator[Messages]:
    """The records of tagged text, checked: <bot> is the user, <human> answers, <endOfText> ends a record.

    The text after <emotion> or <context> becomes a system message.
    """
    record: Messages = []
    first = ""  # place of its first line
    for number, line in enumerate(chain(lines, ["<context>"]), 1):  # the last one ends the record before it
        place, tag = f"{path} line {number:,}", TAG.match(line)
        text, ends = END_TAG.subn("", line[tag.end() :] if tag else line)
        text = text.strip()
        if tag and tag[1] in ROLE_OF:
            first = first if record else place
            asked = bool(record) and record[-1][0] == "user"
            if asked == (tag[1] == "bot"):
                problem = "<bot> speaks twice in a row" if asked else "<human> answers nothing"
                raise UserError(f"{place}: {problem}: the tags must be <bot>, then <human>")
            record.append((ROLE_OF[tag[1]], text))
        elif tag:
            if record:
                yield check_turns(record, first)
            record, first = [("system", f"emotion: {text}" if text and tag[1] == "emotion" else text)], place
        elif text and not record:
            remedy = "give a text with these tags, or JSON lines, CSV or Parquet by the name of the file"
            raise UserError(f"{place} begins with none of <bot>, <human>, <emotion>, <context>: {remedy}")
        elif text:  # a turn of several lines
            record[-1] = (record[-1][0], f"{record[-1][1]}\n{text}".strip())
        if ends and record and record[-1][0] == "assistant":
            yield check_turns(record, first)
            record = []


def join_pairs(records: list[Messages]) -> list[Messages]:
    """The dialogues that records were cut from.

    The Empathetic-Dialogue-System cut dialogues into pairs, and added the pairs with the roles swapped: if an answer
    and the question after it are a pair of their own, both belong to the same dialogue.
    """
    pairs = {(a[1], b[1]) for record in records for a, b in zip(record, record[1:]) if b[0] == "assistant"}
    dialogues: list[Messages] = []
    for record in records:
        if dialogues and record[0][0] == "user" and (dialogues[-1][-1][1], record[0][1]) in pairs:
            dialogues[-1] += record
        else:
            dialogues.append([*record])
    return dialogues


@dataclass(frozen=True)
class Dialogues:
    """The conversations of files."""

    files: Files
    user: str = "user"  # CSV, Parquet: the column of the questions
    assistant: str = "assistant"  # CSV, Parquet: the column of the answers
    conversation: str = ""  # CSV, Parquet: adjacent rows with the same value in this column are one conversation

    def read(self, on_bytes: OnBytes = lambda n: None, digest=None) -> Iterator[Messages]:
        """The conversations in order. Raises UserError, naming file and line, for what is none."""
        for path in self.files.paths:
            kind = kind_of(path)[0]
            if kind in (".csv", ".parquet"):
                yield from self._rows(path, on_bytes, digest)
            elif kind in RECORDS or kind == ".json":
                yield from read_json_lines(self.files.lines(path, on_bytes, digest), path)
            else:
                yield from join_pairs([*read_tagged(self.files.lines(path, on_bytes, digest), path)])

    def _rows(self, path: str, on_bytes: OnBytes, digest) -> Iterator[Messages]:
        names = (self.conversation,) if self.conversation else ()
        file = replace(self.files, paths=[path])
        records = file.records(self.user, self.assistant, *names, on_bytes=on_bytes, digest=digest, labels=names)

        def conversation_of(numbered) -> str | int:  # the row's own number where the column is blank
            number, (_, (_, _, *name)) = numbered
            return name[0] if name and name[0].strip() else number

        for _, rows in groupby(enumerate(records), conversation_of):
            pairs = (check_turns([("user", texts[0]), ("assistant", texts[1])], place) for _, (place, texts) in rows)
            yield [*chain.from_iterable(pairs)]


# ----------------------------------------------------------------------------------------------------------------------
# near-duplicate conversations, which must be on the same side of a split. Two are, by level, if they have in common

# 0  all messages, whatever their order, case and blanks: "Hi" "Hello!" and "hello!" "HI"
# 1  also: a long message, or two adjacent ones, which few conversations have: "I saw a wolf near our house."
# 2  also: two adjacent messages of many characters, however many conversations have them; no polite phrase is so long
LONG = 20  # characters of a long message
FEW = 4  # conversations: what more of them have is a phrase, such as "Thank you." "You are welcome."
MANY = 80  # characters of two adjacent messages together
Links = list[tuple[int, int]]


def find_links(conversations: Iterable[Messages]) -> tuple[list[int], list[int], list[Links]]:
    """(a hash of each conversation, its characters, the links that levels 0, 1 and 2 add: pairs of their numbers)."""
    hashes: list[int] = []
    lengths: list[int] = []
    links: list[Links] = [[], [], []]
    first: dict[bytes, int] = {}  # number of the first conversation with these messages
    having: dict[bytes, list[int]] = {}  # of each long message and adjacent two: the first FEW + 1 that have them
    for number, conversation in enumerate(conversations):
        lengths.append(sum(len(content) for _, content in conversation))
        texts = [content for role, content in conversation if role != "system"]
        digest = _hash(texts)
        hashes.append(zlib.crc32(digest))
        if first.setdefault(digest, number) != number:
            links[0].append((first[digest], number))
            continue
        for shared in [*((text,) for text in texts if len(text) >= LONG), *zip(texts, texts[1:])]:
            numbers = having.setdefault(_hash(shared), [])
            if len(shared) == 2 and sum(map(len, shared)) >= MANY and numbers and numbers[0] != number:
                links[2].append((numbers[0], number))
            if len(numbers) <= FEW and number not in numbers:
                numbers.append(number)
    links[1] = [(one, other) for one, *others in having.values() if len(others) < FEW for other in others]
    return hashes, lengths, links


def _hash(texts: Iterable[str]) -> bytes:
    """A hash of messages that ignores their order, case and blanks."""
    normal = sorted(" ".join(text.lower().split()) for text in texts)
    return hashlib.blake2b("\n".join(normal).encode("utf-8"), digest_size=12).digest()


def group(hashes: list[int], links: Iterable[tuple[int, int]]) -> list[int]:
    """A number for each conversation, equal within a group of linked ones, and independent of their order in a file."""
    parent = [*range(len(hashes))]

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for one, other in links:
        parent[root(other)] = root(one)
    return [hashes[root(i)] for i in range(len(hashes))]


@dataclass(frozen=True)
class Chats:
    """Conversations with the numbers of their groups, as prepare takes them."""

    dialogues: Dialogues
    template: Template
    groups: list[int]
    level: int  # of the groups

    @classmethod
    def of(cls, dialogues: Dialogues, template: Template, val_fraction: float) -> "Chats":
        """Read all conversations once to find their groups, by the highest level at which they can be split."""
        check_val_fraction(val_fraction)
        hashes, lengths, links = find_links(dialogues.read())
        for level in (2, 1, 0):
            groups, survey = group(hashes, chain(*links[: level + 1])), CorpusStats(len(lengths), sum(lengths))
            np.add.at(survey.bucket_chars, np.array(groups, dtype=np.int64) % NUM_BUCKETS, lengths)
            if lengths and isinstance(choose_val_buckets(survey, val_fraction, min_documents=2), np.ndarray):
                break
        return cls(dialogues, template, groups, level)

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return self.dialogues.files.size

    def fingerprint(self) -> list[tuple[int, int]]:
        """As Files.fingerprint."""
        return self.dialogues.files.fingerprint()

    def read_segments(self, on_bytes: OnBytes, digest=None) -> Iterator[tuple[int, list[Segment]]]:
        """(the number of its group, segments) of each conversation."""
        for number, conversation in zip(self.groups, self.dialogues.read(on_bytes, digest)):
            yield number, to_segments(conversation, self.template)


def to_segments(conversation: Messages, template: Template) -> list[Segment]:
    """The conversation as a model is trained on it, followed by END."""
    write: dict[str, Any] = {"system": template.opening, "user": template.question, "assistant": template.answer}
    turns = (write[role](content) for role, content in conversation)
    return [*chain.from_iterable(turns), Segment(END, is_special=True)]
