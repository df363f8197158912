"""Find near duplicates among conversations, which must go to the same split, and prepare them for training.

chats = ChatDataset.from_dialogues(Dialogues(Files(["chats.json"])), DONGPT_TEMPLATE, val_fraction=0.1)
prepare("data/chat", chats, Vocabulary("bpe"), 0.1, specials=[...], template=DONGPT_TEMPLATE)
"""

import hashlib
import zlib
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Iterable, Iterator

import numpy as np

from dongpt.chat.reading import Dialogues
from dongpt.chat.records import Messages
from dongpt.chat.survey import Survey
from dongpt.text.documents import Files, Progress
from dongpt.text.prepare import NUM_BUCKETS, CorpusStats, choose_val_buckets
from dongpt.text.template import Segment, Template
from dongpt.text.tokenizers import END

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
        lengths.append(sum(len(content) for _, content, _ in conversation))
        texts = [content for role, content, _ in conversation if role != "system"]
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
    survey: Survey = field(repr=False)

    @classmethod
    def from_dialogues(cls, dialogues: Dialogues, template: Template, val_fraction: float) -> "ChatDataset":
        """Read all conversations and group them at the highest level at which they can be split."""
        survey = Survey()
        hashes, lengths, duplicate_pairs = find_near_duplicates(dialogues.read(survey=survey))
        survey.check(dialogues.files.paths, dialogues.skip_broken)
        for level in (2, 1, 0):
            groups, stats = group(hashes, chain(*duplicate_pairs[: level + 1])), CorpusStats(len(lengths), sum(lengths))
            np.add.at(stats.bucket_chars, np.array(groups, dtype=np.int64) % NUM_BUCKETS, lengths)
            if lengths and isinstance(choose_val_buckets(stats, val_fraction, min_documents=2), np.ndarray):
                break
        return cls(dialogues, template, groups, level, survey)

    @property
    def files(self) -> Files:
        """The files that contain the conversations."""
        return self.dialogues.files

    def read_segments(self, on_progress: Progress, digest=None) -> Iterator[tuple[int, list[Segment]]]:
        """Yield (group number, segments) for each conversation."""
        for number, conversation in zip(self.groups, self.dialogues.read(on_progress, digest)):
            yield number, to_segments(conversation, self.template)
        yield from ((0, []) for _ in range(self.survey.num_broken))  # records that are left out


def to_segments(conversation: Messages, template: Template) -> list[Segment]:
    """Convert a conversation to segments for training, ending with <|endoftext|>."""
    by_role: dict[str, Any] = {"system": template.opening, "user": template.question, "assistant": template.answer}
    segments: list[Segment] = []
    for role, text, in_loss in conversation:
        new = by_role[role](text)
        segments += new if in_loss else [replace(segment, in_loss=False) for segment in new]
    return [*segments, Segment(END, is_special=True)]
