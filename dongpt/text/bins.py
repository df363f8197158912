"""Writes what corpus.py reads: train.bin or its shards, val.bin, their masks and meta.json, all or none of them."""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from configurator import UserError
from dongpt.text.shards import describe, shard_name
from dongpt.text.tokenizers import MAX_VOCAB, Tokenizer

SPLITS = ("train", "val")
SETTLING = "meta.json.new"  # meta.json while the files that it describes get their names
JOURNAL = "preparing.json"  # how far a preparation is that may go on after a kill
BINS = re.compile(r"train_\d{3,}\.bin|(train|val)(\.mask)?\.bin")


def settle(folder: str):
    """Give new files their names, where a process was killed before it had done so to all of them.

    From the moment on that SETTLING is there, what it describes is complete, and lies under the names or beside them.
    Several processes may do this at once: what is not there any more another one has just done. Raises UserError
    where it cannot be done.
    """
    path = os.path.join(folder, SETTLING)
    if not os.path.exists(path):
        return
    try:
        with contextlib.suppress(FileNotFoundError):
            with open(path, encoding="utf-8") as file:
                _give_names(folder, json.load(file))
            os.replace(path, os.path.join(folder, "meta.json"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is of a preparation that was killed, and cannot be made use of ({error}): prepare "
            f"the data anew, or delete it"
        ) from error


def _give_names(folder: str, meta: dict):
    """Give what meta describes its names, and remove the files of the data that was there before."""
    names = [shard["file"] for shard in meta.get("shards", {}).get("train", [{"file": "train.bin"}])] + ["val.bin"]
    names += [f"{split}.mask.bin" for split in meta.get("predicted_bytes", {})]
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            os.replace(os.path.join(folder, name + ".part"), os.path.join(folder, name))
    for name in os.listdir(folder):
        if BINS.fullmatch(name) and name not in names:
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(folder, name))


def _megabytes(folder: str, ending: str) -> str:
    """The size of the bins in folder whose names have this ending more, '' if there is nothing."""
    paths = [
        os.path.join(folder, name)
        for name in os.listdir(folder)
        if name.endswith(ending) and BINS.fullmatch(name[: len(name) - len(ending)])
    ]
    size = sum(map(os.path.getsize, paths))
    return f"{math.ceil(size / 1e6):,} MB" if size else ""


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

    def __init__(
        self,
        ids: np.ndarray,
        n_characters: int,
        n_bytes: int,
        mask: np.ndarray | None = None,
        n_predicted: int = 0,
        loses: bool = False,
    ):
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

    With shard_tokens train is written to files of so many tokens. What was written by then lasts where state() was
    called: a Writer that is given what it returned goes on from there.
    """

    def __init__(self, folder: str, tokenizer: Tokenizer, shard_tokens: int = 0, state: dict | None = None):
        self.folder, self.tokenizer, self.shard_tokens = folder, tokenizer, shard_tokens
        self.files, self.sha256 = {}, Digest()
        self.shards: list[dict] = []  # descriptions of those that are full
        self.current, self.in_current = shard_name("train", 0) if shard_tokens else "train.bin", 0
        self.state_before, self.lasting = state, state is not None  # whether a part of it outlives this process
        self.writing, self.waiting = ThreadPoolExecutor(1), deque()  # beside reading and hashing
        self.counts = {split: np.zeros(MAX_VOCAB, np.int64) for split in SPLITS}
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
            if self.state_before:
                self._go_on(self.state_before)
            else:
                self._remove_parts()  # of an earlier process that was killed
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(self.folder, JOURNAL))  # which tells of them
                self._open(self.current)
            self._open("val.bin")
        except OSError as error:
            self.__exit__()
            raise self.cannot(error) from error
        return self

    def __exit__(self, *error):
        self.writing.shutdown(cancel_futures=True)
        for file in self.files.values():
            with contextlib.suppress(OSError):  # a full disk has been told of
                file.close()
        if self.lasting or os.path.exists(os.path.join(self.folder, SETTLING)):
            return  # in the latter case all is done but the names: they are given when the folder is opened
        for file in self.files.values():
            if os.path.exists(file.name):
                os.remove(file.name)
        self._remove_parts()

    def _remove_parts(self):
        """Remove what has not got its name; shards that are full are among it."""
        for name in os.listdir(self.folder) if os.path.isdir(self.folder) else ():
            if BINS.fullmatch(name.removesuffix(".part")) and name.endswith(".part"):
                os.remove(os.path.join(self.folder, name))

    def _open(self, name: str):
        self.files[name] = open(os.path.join(self.folder, name + ".part"), "wb")

    def cannot(self, error: OSError) -> UserError:
        """What is said to the user of an error in writing."""
        remedy = "free space there or change its rights"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            new, old = (_megabytes(self.folder, ending) for ending in (".part", ""))
            remedy = f"free space on that disk, where the new files have {new} by now" + (
                f" and the earlier data, which stay as they are, {old}" if old else ""
            )
        return UserError(
            f"{self.folder} cannot be written ({error.strerror}): {remedy}"
            + ("; the same command then goes on from where it was" if self.lasting else "")
        )

    def state(self) -> dict:
        """What a Writer needs to go on from here, after all that was added to train has reached the disk."""
        self._wait()
        try:
            file = self.files[self.current]
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise self.cannot(error) from error
        self.lasting = True
        return {
            "shards": list(self.shards),
            "in_current": self.in_current,
            "characters": self.characters["train"],
            "bytes": self.bytes["train"],
            "loses": self.loses,
            "counts": self.counts["train"][: self.tokenizer.vocab_size].tolist(),
        }

    def _go_on(self, state: dict):
        """Continue the files that state tells of, without what was written after it was asked for."""
        self.shards, self.in_current, self.loses = state["shards"], state["in_current"], state["loses"]
        self.characters["train"], self.bytes["train"] = state["characters"], state["bytes"]
        self.counts["train"][: len(state["counts"])] = state["counts"]
        self.current = shard_name("train", len(self.shards))
        if not self.in_current:  # a shard ended there
            self._open(self.current)
            return
        self.files[self.current] = file = open(os.path.join(self.folder, self.current + ".part"), "r+b")
        file.truncate(2 * self.in_current)
        while piece := file.read(2**20):
            self.sha256.update(piece)

    def add(self, split: str, encoded: Encoded):
        """Append to a split."""
        self.waiting.append(self.writing.submit(self._write, split, encoded.ids, encoded.mask))
        self._wait(4)
        self.counts[split][: len(encoded.counts)] += encoded.counts
        self.characters[split] += encoded.n_characters
        self.bytes[split] += encoded.n_bytes
        self.loses |= encoded.loses
        if encoded.mask is not None:
            self.predicted_bytes[split] = self.predicted_bytes.get(split, 0) + encoded.n_predicted

    def _write(self, split: str, ids: np.ndarray, mask: np.ndarray | None):
        if split == "train":
            self._write_train(ids)
        else:
            self.files["val.bin"].write(ids)
        if mask is not None:
            if f"{split}.mask.bin" not in self.files:
                self._open(f"{split}.mask.bin")
            self.files[f"{split}.mask.bin"].write(np.ascontiguousarray(mask, dtype=np.uint8))

    def _write_train(self, ids: np.ndarray):
        while len(ids):
            room = self.shard_tokens - self.in_current if self.shard_tokens else len(ids)
            self.files[self.current].write(ids[:room])
            self.sha256.update(ids[:room])
            self.in_current, ids = self.in_current + len(ids[:room]), ids[room:]
            if self.in_current == self.shard_tokens:
                self._end_shard()
                self.current, self.in_current, self.sha256 = shard_name("train", len(self.shards)), 0, Digest()
                self._open(self.current)

    def _end_shard(self):
        """Close the current shard and describe it."""
        file = self.files[self.current]
        file.flush()
        os.fsync(file.fileno())
        file.close()
        del self.files[self.current]
        self.shards.append(describe(file.name, self.sha256.hexdigest()))

    def _wait(self, most: int = 0):
        """Wait until no more than so many writes are under way."""
        try:
            while len(self.waiting) > most:
                self.waiting.popleft().result()
        except OSError as error:
            raise self.cannot(error) from error

    def finish(self, meta: dict) -> Prepared:
        """Give the files their names; what is in meta goes into meta.json. Raises UserError for an empty split."""
        try:
            return self._finish(meta)
        except OSError as error:
            raise self.cannot(error) from error

    def _finish(self, meta: dict) -> Prepared:
        self._wait()
        self._end_train()
        tokens = {split: int(self.counts[split].sum()) for split in SPLITS}
        if min(tokens.values()) < 2:
            self.lasting = False  # to go on would end here again
            raise UserError(
                f"the text gives {tokens['train']:,} tokens to train on and {tokens['val']:,} for "
                f"validation, and a loss needs two: give a longer one, another --val_fraction, or another "
                f"--tokenizer"
            )
        meta = {
            "tokenizer": self.tokenizer.to_dict(),
            "vocab_size": self.tokenizer.vocab_size,
            "characters": self.characters,
            "bytes": self.bytes,
            "tokens": tokens,
            **({"predicted_bytes": self.predicted_bytes} if self.predicted_bytes else {}),
            **({"shards": {"train": self.shards}} if self.shards else {}),
            "ids_sha256": self._ids_sha256(),
            **meta,
        }
        self._open("meta.json")
        self.files["meta.json"].write(json.dumps(meta, indent=1).encode("utf-8"))
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        os.replace(self.files["meta.json"].name, os.path.join(self.folder, SETTLING))  # from here on it is done
        settle(self.folder)
        counts = {split: self.counts[split][: self.tokenizer.vocab_size] for split in SPLITS}
        return Prepared(self.folder, meta, counts, self.tokenizer, self.loses)

    def _end_train(self):
        """End the last shard."""
        if not self.shard_tokens:
            return
        if self.in_current or not self.shards:
            self._end_shard()
        else:
            file = self.files.pop(self.current)
            file.close()
            os.remove(file.name)
        self.sha256 = Digest()
        for shard in self.shards:
            self.sha256.update(shard["sha256"].encode("ascii"))

    def _ids_sha256(self) -> str:
        """The hash of train.bin, or of the hashes of its shards in hexadecimal, followed by val.bin."""
        self.files["val.bin"].flush()
        with open(self.files["val.bin"].name, "rb") as file:
            while piece := file.read(2**20):
                self.sha256.update(piece)
        return self.sha256.hexdigest()
