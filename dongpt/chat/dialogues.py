"""Find near-duplicate conversations, which must go to the same split, and prepare conversations for training.

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
IndexPairs = np.ndarray  # (n, 2) int32; each row holds the indices of two linked conversations


def find_near_duplicates(conversations: Iterable[Messages]) -> tuple[np.ndarray, np.ndarray, list[IndexPairs]]:
    """Return the hashes of n conversations, (n,) uint32, their lengths, (n,) int64, and the links of each level."""
    digests, lengths, keys, owners, are_long = _hash_conversations(conversations)
    is_first, same_pairs = _link_equal(digests[:, 0])
    is_used = is_first[owners]  # repeated conversations need no further links
    keys, owners, are_long = keys[is_used], owners[is_used], are_long[is_used]
    return digests[:, 1].astype(np.uint32), lengths, [same_pairs, *_link(keys, owners, are_long)]


def _hash_conversations(conversations: Iterable[Messages]) -> tuple[np.ndarray, ...]:
    """Return (digests, lengths) per conversation, and (keys, owners, are_long) for the keys that may link them.

    digests is (n, 2) uint64: two hashes of all messages. Each long message and each pair of adjacent messages has a
    hash in keys, the index of its conversation in owners, and True in are_long if it is a long pair. Memory use
    is about 60 bytes per question and answer, regardless of their length.
    """
    digests, lengths, keys, owners, are_long = array("Q"), array("q"), bytearray(), array("i"), bytearray()
    for index, conversation in enumerate(conversations):
        lengths.append(sum(len(content) for _, content, _ in conversation))
        texts = [content for role, content, _ in conversation if role != "system"]
        normalized = [" ".join(text.lower().split()).encode("utf-8") for text in texts]
        digest = _hash_messages(normalized)
        digests.extend((int.from_bytes(digest[:8], "little"), zlib.crc32(digest)))
        found = [(n,) for n, text in zip(normalized, texts) if len(text) >= LONG_MESSAGE_CHARS]
        keys += b"".join(_hash_messages(messages)[:8] for messages in chain(found, zip(normalized, normalized[1:])))
        are_long += bytes(len(found)) + bytes(len(a) + len(b) >= LONG_PAIR_CHARS for a, b in zip(texts, texts[1:]))
        owners.extend([index] * (len(found) + len(texts) - 1))
    buffers = (digests, "<u8"), (lengths, "i8"), (keys, "<u8"), (owners, "i4"), (are_long, "?")
    arrays = [np.frombuffer(buffer, kind) for buffer, kind in buffers]
    return arrays[0].reshape(-1, 2), *arrays[1:]


def _link_equal(digests: np.ndarray) -> tuple[np.ndarray, IndexPairs]:
    """Return a mask of the first conversation with each digest, and links from these to the other conversations."""
    if not len(digests):
        return np.zeros(0, bool), np.zeros((0, 2), np.int32)
    order = np.argsort(digests, kind="stable").astype(np.int32)
    starts = np.flatnonzero(np.append(True, np.diff(digests[order]) != 0))
    first = np.empty_like(order)
    first[order] = np.repeat(order[starts], np.diff(np.append(starts, len(order))))
    others = np.flatnonzero(first != np.arange(len(first))).astype(np.int32)
    is_first = np.ones(len(first), bool)
    is_first[others] = False
    return is_first, np.stack([first[others], others], axis=1)


def _link(keys: np.ndarray, owners: np.ndarray, are_long: np.ndarray) -> tuple[IndexPairs, IndexPairs]:
    """Return the links of levels 1 and 2 between conversations that share keys, in the order of the keys.

    keys, owners and are_long (n,) are in the order of the conversations.
    """
    if not len(keys):
        return np.zeros((0, 2), np.int32), np.zeros((0, 2), np.int32)
    order = np.argsort(keys, kind="stable").astype(np.int32)  # int32 halves the memory
    keys, owners = keys[order], owners[order]
    is_start = np.append(True, keys[1:] != keys[:-1])  # of the entries with the same key
    starts = np.flatnonzero(is_start).astype(np.int32)
    sizes = np.diff(np.append(starts, np.int32(len(keys))))
    first_owners, first_entries = np.repeat(owners[starts], sizes), np.repeat(order[starts], sizes)
    is_new = is_start | np.append(True, owners[1:] != owners[:-1])  # the first entry of a conversation with this key
    is_rare = np.repeat(np.add.reduceat(is_new, starts, dtype=np.int64) <= MAX_DUPLICATES, sizes)
    linked = first_owners != owners

    def pairs(selected: np.ndarray, rank: np.ndarray) -> IndexPairs:
        by_rank = np.flatnonzero(selected)[np.argsort(rank[selected], kind="stable")]
        return np.stack([first_owners[by_rank], owners[by_rank]], axis=1)

    return pairs(linked & is_new & is_rare, first_entries), pairs(linked & are_long[order], order)


def _hash_messages(normalized: Iterable[bytes]) -> bytes:
    """Return a hash of messages that does not depend on their order."""
    return hashlib.blake2b(b"\n".join(sorted(normalized)), digest_size=12).digest()


def group(hashes: np.ndarray, links: Iterable[IndexPairs]) -> np.ndarray:
    """Return a group number for each conversation, equal for linked conversations and independent of their order."""
    parent = array("i", range(len(hashes)))

    def find_root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for pairs in links:
        for a, b in zip(memoryview(pairs[:, 0].copy()), memoryview(pairs[:, 1].copy())):  # not a list, to save memory
            parent[find_root(b)] = find_root(a)
    return hashes[np.fromiter(map(find_root, range(len(hashes))), np.int32, len(hashes))]


@dataclass(frozen=True)
class ChatDataset:
    """Conversations with group numbers: a SegmentSource for prepare()."""

    dialogues: Dialogues
    template: Template
    groups: np.ndarray  # (n,) uint32
    level: int  # highest level of the links that define the groups
    survey: Survey = field(repr=False)

    @classmethod
    def from_dialogues(cls, dialogues: Dialogues, template: Template, val_fraction: float) -> "ChatDataset":
        """Read all conversations and group them at the highest level at which they can be split."""
        survey = Survey()
        hashes, lengths, links = find_near_duplicates(dialogues.read(survey=survey))
        survey.check(dialogues.files.paths, dialogues.skip_broken)
        for level in (2, 1, 0):
            groups, stats = group(hashes, links[: level + 1]), CorpusStats(len(lengths), int(lengths.sum()))
            stats.bucket_chars = np.bincount(groups % NUM_BUCKETS, lengths, NUM_BUCKETS).astype(np.int64).tolist()
            if len(lengths) and isinstance(choose_val_buckets(stats, val_fraction, min_documents=2), np.ndarray):
                break
        return cls(dialogues, template, groups, level, survey)

    @property
    def files(self) -> Files:
        """The files that contain the conversations."""
        return self.dialogues.files

    def read_segments(self, on_progress: Progress, digest=None) -> Iterator[tuple[int, list[Segment]]]:
        """Yield (group number, segments) for each conversation."""
        for number, conversation in zip(map(int, self.groups), self.dialogues.read(on_progress, digest)):
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
