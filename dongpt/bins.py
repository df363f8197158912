"""Writes what corpus.py reads: train.bin, val.bin, their masks and meta.json, all or none of them."""
import errno
import hashlib
import json
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from dongpt.tokenizers import MOST, Tokenizer

SPLITS = ("train", "val")
SETTLING = "meta.json.new"  # meta.json while the files that it describes get their names


def settle(folder: str):
    """Give new files their names, where a process was killed before it had done so to all of them.

    From the moment on that SETTLING is there, what it describes is complete, and lies under the names or beside them.
    """
    path = os.path.join(folder, SETTLING)
    if not os.path.exists(path):
        return
    with open(path, encoding="utf-8") as file:
        masked = "predicted_bytes" in json.load(file)
    for name in [f"{split}{kind}.bin" for kind in ("", ".mask") for split in SPLITS]:
        target = os.path.join(folder, name)
        if os.path.exists(target + ".part"):
            os.replace(target + ".part", target)
        elif ".mask" in name and not masked and os.path.exists(target):  # of the data that was there before
            os.remove(target)
    os.replace(path, os.path.join(folder, "meta.json"))


class Digest:
    """SHA-256 in a thread of its own: what is given to it is hashed while the next piece is read or written."""

    def __init__(self):
        self.sha256, self.pool = hashlib.sha256(), ThreadPoolExecutor(1)
        self.last = self.pool.submit(bool)

    def update(self, content: bytes | np.ndarray):
        """Take in content, which must stay as it is."""
        self.last.result()
        self.last = self.pool.submit(self.sha256.update, content)

    def hexdigest(self) -> str:
        """The hash of everything, after which nothing can be added."""
        self.pool.shutdown()
        return self.sha256.hexdigest()


class Encoded:
    """Ids (n,) uint16, how often each occurs, and how many characters and bytes of text they stand for.

    mask (n,) tells which of them a loss is taken of, None for all; n_predicted is how many bytes those stand for.
    """

    def __init__(self, ids: np.ndarray, n_characters: int, n_bytes: int, mask: np.ndarray | None = None,
                 n_predicted: int = 0, loses: bool = False):
        self.loses = loses  # whether the ids cannot give the text back
        self.ids, self.mask, self.n_predicted = np.ascontiguousarray(ids, dtype="<u2"), mask, n_predicted
        self.counts, self.n_characters, self.n_bytes = np.bincount(ids), n_characters, n_bytes


@dataclass(frozen=True)
class Prepared:
    """What was written: meta.json, how often each id occurs, (vocab_size,) a split, the tokenizer, and some text."""
    folder: str
    meta: dict
    counts: dict[str, np.ndarray]
    tokenizer: Tokenizer
    loses: bool  # whether something of the text is not in the ids, apart from words that are unknown
    sample: str = ""


class Writer:
    """Writes the bins of a data folder under other names, and gives them theirs at the end.

        with Writer(folder, tokenizer) as writer:
            writer.add("train", encoded)
            prepared = writer.finish(meta)
    """

    def __init__(self, folder: str, tokenizer: Tokenizer):
        self.folder, self.tokenizer = folder, tokenizer
        self.files, self.sha256 = {}, Digest()
        self.writing, self.waiting = ThreadPoolExecutor(1), deque()  # beside reading and hashing
        self.counts = {split: np.zeros(MOST, np.int64) for split in SPLITS}
        self.characters, self.bytes = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
        self.predicted_bytes: dict[str, int] = {}
        self.loses = False

    def __enter__(self) -> "Writer":
        try:
            os.makedirs(self.folder, exist_ok=True)
            settle(self.folder)
            for split in SPLITS:
                if os.path.isdir(path := os.path.join(self.folder, f"{split}.bin")):
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
                self._open(f"{split}.bin")
        except OSError as error:
            self.__exit__()
            raise self._cannot(error) from error
        return self

    def __exit__(self, *error):
        self.writing.shutdown(cancel_futures=True)
        for file in self.files.values():
            file.close()
        if os.path.exists(os.path.join(self.folder, SETTLING)):  # interrupted where all was done but the names: they
            return  # are given when the folder is opened, and nothing may go
        for file in self.files.values():
            if os.path.exists(file.name):
                os.remove(file.name)

    def _open(self, name: str):
        self.files[name] = open(os.path.join(self.folder, name + ".part"), "wb")

    def _cannot(self, error: OSError) -> ValueError:
        return ValueError(f"{self.folder} cannot be written ({error.strerror}): free space there or change its rights")

    def add(self, split: str, encoded: Encoded):
        """Append to a split."""
        self.waiting.append(self.writing.submit(self._write, split, encoded.ids, encoded.mask))
        self._wait(4)
        self.counts[split][:len(encoded.counts)] += encoded.counts
        self.characters[split] += encoded.n_characters
        self.bytes[split] += encoded.n_bytes
        self.loses |= encoded.loses
        if encoded.mask is not None:
            self.predicted_bytes[split] = self.predicted_bytes.get(split, 0) + encoded.n_predicted

    def _write(self, split: str, ids: np.ndarray, mask: np.ndarray | None):
        self.files[f"{split}.bin"].write(ids)
        if split == "train":
            self.sha256.update(ids)
        if mask is not None:
            if f"{split}.mask.bin" not in self.files:
                self._open(f"{split}.mask.bin")
            self.files[f"{split}.mask.bin"].write(np.ascontiguousarray(mask, dtype=np.uint8))

    def _wait(self, most: int = 0):
        """Wait until no more than so many writes are under way."""
        try:
            while len(self.waiting) > most:
                self.waiting.popleft().result()
        except OSError as error:
            raise self._cannot(error) from error

    def finish(self, meta: dict) -> Prepared:
        """Give the files their names; what is in meta goes into meta.json. Raises ValueError for an empty split."""
        self._wait()
        tokens = {split: int(self.counts[split].sum()) for split in SPLITS}
        if min(tokens.values()) < 2:
            raise ValueError(f"the text gives {tokens['train']:,} tokens to train on and {tokens['val']:,} for "
                             f"validation, and a loss needs two: give a longer one, another --val_fraction, or another "
                             f"--tokenizer")
        meta = {
            "tokenizer": self.tokenizer.to_dict(),
            "vocab_size": self.tokenizer.vocab_size,
            "characters": self.characters,
            "bytes": self.bytes,
            "tokens": tokens,
            **({"predicted_bytes": self.predicted_bytes} if self.predicted_bytes else {}),
            "ids_sha256": self._ids_sha256(),
            **meta,
        }
        try:
            self._open("meta.json")
            self.files["meta.json"].write(json.dumps(meta, indent=1).encode("utf-8"))
            for file in self.files.values():
                file.flush()
                os.fsync(file.fileno())
                file.close()
            os.replace(self.files["meta.json"].name, os.path.join(self.folder, SETTLING))  # from here on it is done
            settle(self.folder)
        except OSError as error:
            raise self._cannot(error) from error
        counts = {split: self.counts[split][:self.tokenizer.vocab_size] for split in SPLITS}
        return Prepared(self.folder, meta, counts, self.tokenizer, self.loses)

    def _ids_sha256(self) -> str:
        """The hash of train.bin followed by val.bin."""
        self.files["val.bin"].flush()
        with open(self.files["val.bin"].name, "rb") as file:
            while piece := file.read(2 ** 20):
                self.sha256.update(piece)
        return self.sha256.hexdigest()
