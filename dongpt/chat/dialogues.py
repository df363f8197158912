"""Read conversations from files and find near duplicates, which must go to the same split.

    dialogues = Dialogues(Files(["chats.jsonl"]))
    for conversation in dialogues.read(): ...      # [("user", "Hello"), ("assistant", "Hello! How are you?")]

A line in a JSON lines file is a conversation, {"messages": [{"role": ..., "content": ...}, ...]} or just the list, or a
single message. In the latter format, used by chat.py, blank lines separate conversations. Each row of a CSV or Parquet
file contains a question and an answer. Other files must be text with the tags of the Empathetic-Dialogue-System.
"""

import hashlib
import re
import zlib
from dataclasses import dataclass, replace
from itertools import chain, groupby
from typing import Any, Iterable, Iterator

import numpy as np

from configurator import UserError
from dongpt.text.documents import RECORD_SUFFIXES, Files, Progress, check_text, file_suffixes, parse_json
from dongpt.text.prepare import NUM_BUCKETS, CorpusStats, choose_val_buckets
from dongpt.text.template import Segment, Template
from dongpt.text.tokenizers import END

Messages = list[tuple[str, str]]  # (role, content)
ROLES = ("system", "user", "assistant")
LINE_FORMAT = (
    'a line must look like {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
    ", with alternating user and assistant messages after an optional system message"
)


def check_turns(conversation: Messages, place: str) -> Messages:
    """Return conversation if user and assistant take turns. Otherwise, raise UserError with place in the message."""
    turns = conversation[1:] if conversation and conversation[0][0] == "system" else conversation
    index = next((i for i, (role, _) in enumerate(turns) if role != ROLES[1 + i % 2]), None)
    if index is not None:
        raise UserError(
            f"{place}: expected a message from {ROLES[1 + index % 2]}, got {turns[index][0]}: {LINE_FORMAT}"
        )
    if not turns or len(turns) % 2:
        raise UserError(f"{place}: the conversation must end with an answer: {LINE_FORMAT}")
    if blank_role := next((role for role, content in conversation if not content.strip()), None):
        raise UserError(f"{place}: the message from {blank_role} is blank: correct or delete it")
    return conversation


def read_message(message: Any, place: str) -> tuple[str, str]:
    """Return (role, content) of a JSON message. Raises UserError, with place in the message, if it is not valid."""
    if not isinstance(message, dict) or not {"role", "content"} <= set(message):
        raise UserError(f"{place}: {str(message)[:60]!r} is not a message with role and content: {LINE_FORMAT}")
    if message["role"] not in ROLES:
        raise UserError(f"{place}: the role must be one of {', '.join(ROLES)}, not {str(message['role'])[:40]!r}")
    return message["role"], check_text(message["content"], place, "content")


def read_json_lines(lines: Iterable[str], path: str) -> Iterator[Messages]:
    """Yield the conversations in JSON lines with one message or one conversation per line."""
    turns: Messages = []  # current conversation, if there is one message per line
    first_location = ""  # location of its first message
    for line_number, line in enumerate(chain(lines, [""]), 1):
        place = f"{path} line {line_number:,}"
        record = parse_json(line, place) if line.strip() else None
        if isinstance(record, dict) and "messages" not in record:
            first_location = first_location if turns else place
            turns.append(read_message(record, place))
            continue
        if turns:
            yield check_turns(turns, first_location)
            turns = []
        if line.strip():
            messages = record["messages"] if isinstance(record, dict) else record
            if not isinstance(messages, list):
                raise UserError(f"{place} has no list of messages: {LINE_FORMAT}")
            yield check_turns([read_message(message, place) for message in messages], place)


TAG_PATTERN = re.compile(r"<(bot|human|emotion|context)> ?")
ROLE_OF_TAG = {"bot": "user", "human": "assistant"}
END_TAG_PATTERN = re.compile(r" *<endOfText>\s*$")


def read_tagged(lines: Iterable[str], path: str) -> Iterator[Messages]:
    """Yield the records in tagged text. <bot> marks the user, <human> the answer, and <endOfText> the end of a record.

    The text after <emotion> or <context> becomes a system message.
    """
    record: Messages = []
    first_location = ""  # location of its first line
    for line_number, line in enumerate(chain(lines, ["<context>"]), 1):  # an extra tag ends the last record
        place, tag = f"{path} line {line_number:,}", TAG_PATTERN.match(line)
        text, has_end = END_TAG_PATTERN.subn("", line[tag.end() :] if tag else line)
        text = text.strip()
        if tag and tag[1] in ROLE_OF_TAG:
            first_location = first_location if record else place
            awaits_answer = bool(record) and record[-1][0] == "user"
            if awaits_answer == (tag[1] == "bot"):
                problem = "a second <bot> before <human>" if awaits_answer else "<human> without a <bot> before it"
                raise UserError(f"{place}: {problem}: the tags must alternate, <bot> first")
            record.append((ROLE_OF_TAG[tag[1]], text))
        elif tag:
            if record:
                yield check_turns(record, first_location)
            record, first_location = [("system", f"emotion: {text}" if text and tag[1] == "emotion" else text)], place
        elif text and not record:
            remedy = "use a text file with these tags, or a file whose name ends in .jsonl, .csv or .parquet"
            raise UserError(f"{place} does not start with <bot>, <human>, <emotion> or <context>: {remedy}")
        elif text:  # a message with several lines
            record[-1] = (record[-1][0], f"{record[-1][1]}\n{text}".strip())
        if has_end and record and record[-1][0] == "assistant":
            yield check_turns(record, first_location)
            record = []


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


@dataclass(frozen=True)
class Dialogues:
    """The conversations in a set of files."""

    files: Files
    user: str = "user"  # CSV, Parquet: column with the questions
    assistant: str = "assistant"  # CSV, Parquet: column with the answers
    conversation: str = ""  # CSV, Parquet: adjacent rows with the same value in this column form a conversation

    def read(self, on_progress: Progress = lambda n: None, digest=None) -> Iterator[Messages]:
        """Yield all conversations in order. If one is not valid, raises UserError with its file and line."""
        for path in self.files.paths:
            kind = file_suffixes(path)[0]
            if kind in (".csv", ".parquet"):
                yield from self._read_rows(path, on_progress, digest)
            elif kind in RECORD_SUFFIXES or kind == ".json":
                yield from read_json_lines(self.files.lines(path, on_progress, digest), path)
            else:
                yield from join_pairs([*read_tagged(self.files.lines(path, on_progress, digest), path)])

    def _read_rows(self, path: str, on_progress: Progress, digest) -> Iterator[Messages]:
        names = (self.conversation,) if self.conversation else ()
        file = replace(self.files, paths=[path])
        records = file.records(self.user, self.assistant, *names, on_progress=on_progress, digest=digest, labels=names)

        def conversation_of(item) -> str | int:  # the row number if the column is blank
            number, (_, (_, _, *name)) = item
            return name[0] if name and name[0].strip() else number

        for _, rows in groupby(enumerate(records), conversation_of):
            pairs = (check_turns([("user", texts[0]), ("assistant", texts[1])], place) for _, (place, texts) in rows)
            yield [*chain.from_iterable(pairs)]


# ----------------------------------------------------------------------------------------------------------------------
# Near-duplicate conversations must go to the same split. Depending on the level, two are linked if they share

# 0  all messages, ignoring order, case and whitespace: "Hi" "Hello!" and "hello!" "HI"
# 1  or a rare long message, or two adjacent messages that are rare: "I saw a wolf near our house."
# 2  or two adjacent messages that together are longer than any polite phrase, even if they are frequent
LONG_MESSAGE_CHARS = 20  # minimum length of a long message
MAX_DUPLICATES = 4  # rare messages occur in at most this many conversations, unlike "Thank you." "You are welcome."
LONG_PAIR_CHARS = 80  # minimum total length of two adjacent messages
IndexPairs = list[tuple[int, int]]


def find_near_duplicates(conversations: Iterable[Messages]) -> tuple[list[int], list[int], list[IndexPairs]]:
    """Return (hashes of the conversations, their lengths, pairs of linked indices added by levels 0, 1 and 2)."""
    hashes: list[int] = []
    lengths: list[int] = []
    duplicate_pairs: list[IndexPairs] = [[], [], []]
    first_index: dict[bytes, int] = {}  # by all messages: the first conversation that has them
    indices_of: dict[bytes, list[int]] = {}  # by long or adjacent messages: up to MAX_DUPLICATES + 1
    for index, conversation in enumerate(conversations):
        lengths.append(sum(len(content) for _, content in conversation))
        texts = [content for role, content in conversation if role != "system"]
        digest = _hash_messages(texts)
        hashes.append(zlib.crc32(digest))
        if first_index.setdefault(digest, index) != index:
            duplicate_pairs[0].append((first_index[digest], index))
            continue
        for messages in [*((text,) for text in texts if len(text) >= LONG_MESSAGE_CHARS), *zip(texts, texts[1:])]:
            numbers = indices_of.setdefault(_hash_messages(messages), [])
            if len(messages) == 2 and sum(map(len, messages)) >= LONG_PAIR_CHARS and numbers and numbers[0] != index:
                duplicate_pairs[2].append((numbers[0], index))
            if len(numbers) <= MAX_DUPLICATES and index not in numbers:
                numbers.append(index)
    duplicate_pairs[1] = [
        (first, other) for first, *others in indices_of.values() if len(others) < MAX_DUPLICATES for other in others
    ]
    return hashes, lengths, duplicate_pairs


def _hash_messages(texts: Iterable[str]) -> bytes:
    """Return a hash of messages, ignoring order, case and whitespace."""
    normalized = sorted(" ".join(text.lower().split()) for text in texts)
    return hashlib.blake2b("\n".join(normalized).encode("utf-8"), digest_size=12).digest()


def group(hashes: list[int], duplicate_pairs: Iterable[tuple[int, int]]) -> list[int]:
    """Return a group number for each conversation, equal for linked ones and independent of their order."""
    parent = [*range(len(hashes))]

    def find_root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for a, b in duplicate_pairs:
        parent[find_root(b)] = find_root(a)
    return [hashes[find_root(i)] for i in range(len(hashes))]


@dataclass(frozen=True)
class ChatDataset:
    """Conversations with group numbers: a SegmentSource for prepare()."""

    dialogues: Dialogues
    template: Template
    groups: list[int]
    level: int  # highest level of the links that define the groups

    @classmethod
    def from_dialogues(cls, dialogues: Dialogues, template: Template, val_fraction: float) -> "ChatDataset":
        """Read all conversations and group them at the highest level at which they can be split."""
        hashes, lengths, duplicate_pairs = find_near_duplicates(dialogues.read())
        for level in (2, 1, 0):
            groups, stats = group(hashes, chain(*duplicate_pairs[: level + 1])), CorpusStats(len(lengths), sum(lengths))
            np.add.at(stats.bucket_chars, np.array(groups, dtype=np.int64) % NUM_BUCKETS, lengths)
            if lengths and isinstance(choose_val_buckets(stats, val_fraction, min_documents=2), np.ndarray):
                break
        return cls(dialogues, template, groups, level)

    @property
    def files(self) -> Files:
        """The files that contain the conversations."""
        return self.dialogues.files

    def read_segments(self, on_progress: Progress, digest=None) -> Iterator[tuple[int, list[Segment]]]:
        """Yield (group number, segments) for each conversation."""
        for number, conversation in zip(self.groups, self.dialogues.read(on_progress, digest)):
            yield number, to_segments(conversation, self.template)


def to_segments(conversation: Messages, template: Template) -> list[Segment]:
    """Convert a conversation to segments for training, ending with <|endoftext|>."""
    by_role: dict[str, Any] = {"system": template.opening, "user": template.question, "assistant": template.answer}
    return [*(segment for role, text in conversation for segment in by_role[role](text)), Segment(END, is_special=True)]
