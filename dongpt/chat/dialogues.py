"""Find near duplicates among conversations, which must go to the same split, and prepare them for training.

chats = ChatDataset.from_dialogues(Dialogues(Files(["chats.json"])), DONGPT_TEMPLATE, val_fraction=0.1)
prepare("data/chat", chats, Vocabulary("bpe"), 0.1, specials=[...], template=DONGPT_TEMPLATE)
"""

import hashlib
import zlib
from array import array
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
    same_pairs: IndexPairs = []
    first_index: dict[bytes, int] = {}  # by all messages: the first conversation that has them
    # one entry per long message and per two adjacent messages: their hash, conversation, and whether the pair is long
    keys, owners, are_long = bytearray(), array("i"), bytearray()
    for index, conversation in enumerate(conversations):
        lengths.append(sum(len(content) for _, content, _ in conversation))
        texts = [content for role, content, _ in conversation if role != "system"]
        normalized = [" ".join(text.lower().split()).encode("utf-8") for text in texts]
        digest = _hash_messages(normalized)
        hashes.append(zlib.crc32(digest))
        if first_index.setdefault(digest, index) != index:
            same_pairs.append((first_index[digest], index))
            continue
        found = [(n,) for n, text in zip(normalized, texts) if len(text) >= LONG_MESSAGE_CHARS]
        keys += b"".join(_hash_messages(messages)[:8] for messages in chain(found, zip(normalized, normalized[1:])))
        are_long += bytes(len(found)) + bytes(len(a) + len(b) >= LONG_PAIR_CHARS for a, b in zip(texts, texts[1:]))
        owners.extend([index] * (len(found) + len(texts) - 1))
    links = _link(np.frombuffer(keys, "<u8"), np.frombuffer(owners, np.int32), np.frombuffer(are_long, bool))
    return hashes, lengths, [same_pairs, *links]


def _link(keys: np.ndarray, owners: np.ndarray, are_long: np.ndarray) -> tuple[IndexPairs, IndexPairs]:
    """Return the links of levels 1 and 2 between conversations that share keys, in the order of the keys.

    keys, owners and are_long (n,) are in the order of the conversations.
    """
    if not len(keys):
        return [], []
    order = np.argsort(keys, kind="stable")
    keys, owners = keys[order], owners[order]
    is_start = np.append(True, keys[1:] != keys[:-1])  # of the entries with the same key
    starts = np.flatnonzero(is_start)
    sizes = np.diff(np.append(starts, len(keys)))
    first_owners, first_entries = np.repeat(owners[starts], sizes), np.repeat(order[starts], sizes)
    is_new = is_start | np.append(True, owners[1:] != owners[:-1])  # the first entry of a conversation with this key
    is_rare = np.repeat(np.add.reduceat(is_new, starts, dtype=np.int64) <= MAX_DUPLICATES, sizes)
    linked = first_owners != owners

    def pairs(selected: np.ndarray, rank: np.ndarray) -> IndexPairs:
        by_rank = np.flatnonzero(selected)[np.argsort(rank[selected], kind="stable")]
        return [*zip(first_owners[by_rank].tolist(), owners[by_rank].tolist())]

    return pairs(linked & is_new & is_rare, first_entries), pairs(linked & are_long[order], order)


def _hash_messages(normalized: Iterable[bytes]) -> bytes:
    """Return a hash of messages, ignoring their order."""
    return hashlib.blake2b(b"\n".join(sorted(normalized)), digest_size=12).digest()


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
