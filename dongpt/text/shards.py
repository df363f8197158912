"""The numbers of one split, in one file or in several that follow each other: train.bin, or train_000.bin, ...

    numbers = Numbers([("data/train_000.bin", 1000), ("data/train_001.bin", 800)], "<u2", 1800)
    numbers.windows(starts, 65)        # (len(starts), 65), wherever they lie
    numbers[900:1100]                  # across the files

meta.json describes each shard, so that one that is missing, cut short, swapped or of another corpus is found: by the
hash of its ends at the start of a training, which reads two megabytes of it, and by that of the whole in data/check.py.
"""

import bisect
import hashlib
import os
import re
from collections import OrderedDict
from itertools import accumulate

import numpy as np

from configurator import UserError

IN_MEMORY = 64 * 2**20  # bytes; what is larger stays on disk and is read where it is needed
END = 2**20  # bytes at each end of a shard that a quick check hashes
MOST_OPEN = 128  # files; systems allow a program some hundreds


def shard_name(split: str, number: int) -> str:
    """train_000.bin and so on."""
    return f"{split}_{number:03d}.bin"


def find_shards(folder: str, split: str) -> list[str]:
    """The names of a split's shards in folder, in order; [] without any. Raises UserError where a number is missing."""
    names = (
        {
            int(found[1]): name
            for name in os.listdir(folder)
            if (found := re.fullmatch(rf"{split}_(\d{{3,}})\.bin", name))
        }
        if os.path.isdir(folder)
        else {}
    )
    for number in range(len(names)):
        if number not in names:
            raise UserError(
                f"{folder} has {len(names)} shards of {split} and no {shard_name(split, number)}: copy it "
                f"there, or prepare the data anew"
            )
    return [names[number] for number in range(len(names))]


def describe(path: str, sha256: str) -> dict:
    """What meta.json holds of a shard whose whole hash is known."""
    return {
        "file": os.path.basename(path).removesuffix(".part"),
        "tokens": os.path.getsize(path) // 2,
        "ends_sha256": ends_sha256(path),
        "sha256": sha256,
    }


def ends_sha256(path: str) -> str:
    """SHA-256 of the first megabyte of a file followed by its last one."""
    with _opened(path) as file:
        first = file.read(END)
        file.seek(max(0, os.path.getsize(path) - END))
        return hashlib.sha256(first + file.read(END)).hexdigest()


def _opened(path: str, buffering: int = -1):
    """The file at path, to be read. Raises UserError where that is not allowed."""
    try:
        return open(path, "rb", buffering)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): change its rights, or copy it anew") from error


def whole_sha256(path: str) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with _opened(path) as file:
        while piece := file.read(END):
            digest.update(piece)
    return digest.hexdigest()


def check_ends(folder: str, shards: list[dict]):
    """Raise UserError unless the ends of every shard in folder are what its description says."""
    known = {shard["ends_sha256"]: shard["file"] for shard in shards}
    for shard in shards:
        path = os.path.join(folder, shard["file"])
        if (found := ends_sha256(path)) != shard["ends_sha256"]:
            other = known.get(found)
            raise UserError(
                f"{path} is not what meta.json describes: "
                + (
                    f"it holds what belongs into {other}, give the shards their right names"
                    if other
                    else "its first or its last megabyte differs, copy it anew, or prepare the data anew"
                )
            )


class Numbers:
    """`length` numbers of a kind (of numpy) in files one behind the other, each given with how many it holds.

    len(numbers) and numbers[start:stop] work as with an array. What is small is read at once and kept.
    """

    def __init__(self, files: list[tuple[str, int]], kind: str, length: int):
        self.paths, self.kind, self.length = [path for path, _ in files], np.dtype(kind), length
        self.firsts = [0, *accumulate(count for _, count in files)]  # the number with which each file begins
        self._memory: np.ndarray | None = None
        self._open: OrderedDict[int, object] = OrderedDict()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key) -> np.ndarray:
        assert isinstance(key, slice) and key.step in (None, 1)
        start, stop, _ = key.indices(self.length)
        if self._memory is not None:
            return self._memory[start:stop]
        numbers = np.empty(max(0, stop - start), dtype=self.kind)
        self._read(numbers, start)
        return numbers

    @property
    def in_memory(self) -> bool:
        """Whether all of it is kept in memory."""
        return self.length * self.kind.itemsize <= IN_MEMORY

    @property
    def is_array(self) -> bool:
        """Whether all of it can be had as one array: it is small, or lies in one file."""
        return self.in_memory or len(self.paths) == 1

    def array(self) -> np.ndarray:
        """All of it, in memory if it is small, else mapped anew at each call."""
        assert self.is_array
        if not self.in_memory:  # a map that is kept for long fills the memory: nanoGPT PR 428
            return np.memmap(self.paths[0], dtype=self.kind, mode="r", shape=(self.length,))
        if self._memory is None:
            self._memory = self[:]
        return self._memory

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The windows that begin at starts, (len(starts), length)."""
        if self.in_memory:
            return self.array()[starts[:, None] + np.arange(length)]
        windows = np.empty((len(starts), length), dtype=self.kind)
        for window, start in zip(windows, starts.tolist()):  # reading costs less than mapping, and no memory
            self._read(window, start)
        return windows

    def prefetch(self, starts: np.ndarray, length: int):
        """Have the system read the windows that begin at starts, where it can, without waiting for it."""
        if not hasattr(os, "posix_fadvise"):
            return
        for start in starts.tolist():
            i = bisect.bisect_right(self.firsts, start) - 1  # the rest of a window that goes on in the next file waits
            os.posix_fadvise(
                self._file(i).fileno(),
                (start - self.firsts[i]) * self.kind.itemsize,
                length * self.kind.itemsize,
                os.POSIX_FADV_WILLNEED,
            )

    def pieces(self, size: int = 2**22):
        """Yield all of it, size numbers at a time."""
        for start in range(0, self.length, size):
            yield self[start : start + size]

    def spread(self, most: int):
        """Yield pieces evenly spaced over all of it, its end among them, together about `most` numbers at most."""
        size = max(1, min(most // 128, self.length))
        n = -(-min(most, self.length) // size)
        for i in range(n):
            start = i * (self.length - size) // max(1, n - 1)
            yield self[start : start + size]

    def _read(self, numbers: np.ndarray, start: int):
        """Fill numbers with those from start on."""
        while len(numbers):
            i = bisect.bisect_right(self.firsts, start) - 1
            file, n = self._file(i), min(len(numbers), self.firsts[i + 1] - start)
            file.seek((start - self.firsts[i]) * self.kind.itemsize)
            n = file.readinto(numbers[:n]) // self.kind.itemsize
            if not n:
                raise UserError(f"{self.paths[i]} has become shorter while it was read: prepare the data anew")
            numbers, start = numbers[n:], start + n

    def _file(self, i: int):
        if i not in self._open:
            if len(self._open) >= MOST_OPEN:
                self._open.popitem(last=False)[1].close()
            self._open[i] = _opened(self.paths[i], buffering=0)
        return self._open[i]
