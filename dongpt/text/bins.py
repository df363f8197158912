"""Data folders: train.bin or its shards, val.bin, masks and meta.json, how they are written, described and read.

train.bin and val.bin are raw little-endian uint16 ids, as nanoGPT reads them. A large corpus has train_000.bin,
train_001.bin, ... instead, which are one text. Where a loss is taken of some tokens only, train.mask.bin and
val.mask.bin hold one uint8 per token. meta.json describes them: tokenizer, counts, bytes of text, source and hashes.

    with Writer(folder, tokenizer) as writer:
        writer.add("train", Encoded(ids, n_characters, n_bytes))
        prepared = writer.finish(meta)
    meta = read_meta(folder)

New files are written to a staging folder inside the data folder and moved into place at the end, so that the earlier
data stay until the new ones are complete. Readers change nothing and need no lock.
"""

import bisect
import contextlib
import errno
import hashlib
import io
import json
import math
import os
import pickle
import re
import shutil
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Iterator

import numpy as np

from configurator import UserError
from dongpt.program import ROOT, locked_directory, replaced_file
from dongpt.text.template import Template
from dongpt.text.tokenizers import END, MAX_VOCAB, Tokenizer, check_dict, from_dict

SPLITS = ("train", "val")
STAGING = ".dongpt-new"  # folder inside the data folder that holds files until all are complete
SHARD = re.compile(r"train_(\d{3,})\.bin")
DATA_FILES = re.compile(r"train_\d{3,}\.bin|(train|val)(\.mask)?\.bin|meta\.json")  # all names that are ever written
IN_MEMORY_BYTES = 64 * 2**20  # larger files stay on the disk and are read where they are needed
END_BYTES = 2**20  # at each end of a shard, hashed when training starts
CHUNK_TOKENS = 2**22  # read at a time where a whole file is read


# ----------------------------------------------------------------------------------------------------------------------
# where data folders are


def find_folder(dataset: str, data_dir: str) -> str:
    """The data folder that the settings name: data_dir, relative to the working directory, else data/<dataset>."""
    if not (dataset or data_dir):
        raise UserError("which data? pass --dataset=NAME of a folder under data/, or --data_dir=DIR")
    return os.path.abspath(data_dir) if data_dir else os.path.join(ROOT, "data", dataset)


def named_folder(name: str) -> str:
    """data/<name>. Raises UserError unless name is a plain folder name."""
    if not name or name in (".", "..") or name != os.path.basename(name):
        raise UserError(f"name={name} must be the name of a folder under data/, without slashes")
    return os.path.join(ROOT, "data", name)


def how_to_prepare(folder: str) -> str:
    """The command that writes data to folder, for error messages."""
    script = os.path.join(folder, "prepare.py")
    if os.path.exists(script):
        return f"run python {os.path.relpath(script)} first"
    shelf = os.path.join(ROOT, "data")
    known = sorted(name for name in os.listdir(shelf) if os.path.exists(os.path.join(shelf, name, "prepare.py")))
    return (
        f"write it with python data/prepare.py --input=YOUR_TEXT --name=NAME, or with one of the prepare.py under "
        f"data/ (there are {', '.join(known)})"
    )


# ----------------------------------------------------------------------------------------------------------------------
# meta.json


def read_meta(folder: str) -> dict:
    """The validated description of a data folder: meta.json, else that of nanoGPT's meta.pkl, else {}.

    Raises UserError if it is damaged, or if a preparation was interrupted while it moved its files into place.
    """
    staged = _staged_meta(folder)
    if staged and _waiting(folder, staged) != file_names(staged):
        raise UserError(
            f"the preparation of {folder} was interrupted while its files were moved into place: give the command "
            f"that prepared it again"
        )
    if os.path.lexists(path := os.path.join(folder, "meta.json")):
        return _read_json(path)
    if os.path.lexists(path := os.path.join(folder, "meta.pkl")):
        return _read_pickle(path)
    return {}


def _read_json(path: str) -> dict:
    """A meta.json, validated."""
    try:
        if not os.path.isfile(path):
            raise ValueError("it is no file")
        with open(path, encoding="utf-8") as file:
            return _validated(json.load(file))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged or was not written by a preparation ({error}): move it and the .bin files beside it "
            f"elsewhere, and prepare the data again"
        ) from error


class _PlainUnpickler(pickle.Unpickler):
    """Reads pickles of dict, list, str, int and the like; refuses everything that would run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _read_pickle(path: str) -> dict:
    """nanoGPT's meta.pkl as a description."""
    try:
        if not os.path.isfile(path):
            raise ValueError("it is no file")
        with open(path, "rb") as file:
            meta = _PlainUnpickler(file).load()
        characters = "".join(meta["itos"][i] for i in range(meta["vocab_size"]))
        return _validated({"tokenizer": {"kind": "char", "characters": characters}, "vocab_size": meta["vocab_size"]})
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(
            f"{path} is not a plain meta.pkl of nanoGPT ({error}): it was not run; prepare the data again"
        ) from error


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62  # True is no number of tokens


def _is_counts(value: Any) -> bool:
    """Whether value is a count per split."""
    return isinstance(value, dict) and set(value) <= set(SPLITS) and all(map(_is_count, value.values()))


def _is_shards(value: Any) -> bool:
    """Whether value describes the shards of train, all of them in the data folder."""
    shards = value.get("train") if isinstance(value, dict) else None
    return (
        isinstance(shards, list)
        and all(isinstance(shard, dict) for shard in shards)
        and all(_is_text(shard.get(key)) for shard in shards for key in ("file", "sha256", "ends_sha256"))
        and all(
            SHARD.fullmatch(shard["file"]) and _is_count(shard.get("tokens")) and shard["tokens"] for shard in shards
        )
        and 0 < len(shards) == len({shard["file"] for shard in shards})
    )


VALID = {  # what meta.json may hold
    **dict.fromkeys(("source", "sha256", "ids_sha256", "split", "plan_sha256"), _is_text),
    **dict.fromkeys(("documents", "seed", "left_out", "vocab_size"), _is_count),
    **dict.fromkeys(("tokens", "characters", "bytes", "predicted_bytes"), _is_counts),
    "shards": _is_shards,
}


def _validated(meta: Any) -> dict:
    """meta, if every key that a program reads holds what a Writer stores there. Raises ValueError naming the key."""
    if not isinstance(meta, dict):
        raise ValueError("it is no object")
    if wrong := [key for key, is_valid in VALID.items() if key in meta and not is_valid(meta[key])]:
        raise ValueError(f"{wrong[0]} is not valid")
    tokens, characters, n_bytes, predicted = (
        meta.get(key, {}) for key in ("tokens", "characters", "bytes", "predicted_bytes")
    )
    n_sharded = sum(shard["tokens"] for shard in meta.get("shards", {"train": []})["train"])
    consistent = {
        "vocab_size": 0 < meta.get("vocab_size", 0) <= MAX_VOCAB,
        "tokens": not tokens or len(tokens) == len(SPLITS) and min(tokens.values()) > 0,
        "bytes": all(  # a character takes one to four bytes
            split in tokens and characters.get(split, 1) <= n <= 4 * characters.get(split, n)
            for split, n in n_bytes.items()
        ),
        "predicted_bytes": all(split in tokens and n <= n_bytes.get(split, n) for split, n in predicted.items()),
        "the sum of the shards' tokens": "shards" not in meta or n_sharded == tokens.get("train"),
        "the size of the tokenizer's vocabulary": _vocab_size(meta.get("tokenizer")) == meta.get("vocab_size"),
    }
    if wrong := [what for what, holds in consistent.items() if not holds]:
        raise ValueError(f"{wrong[0]} is not valid")
    return meta


def _vocab_size(tokenizer: Any) -> int:
    """The vocabulary size of a tokenizer's description. Raises UserError for one that no tokenizer can be made of.

    Does not load GPT-2's vocabulary, which may have to be downloaded.
    """
    size = check_dict(tokenizer)
    if tokenizer["kind"] != "gpt2":
        return from_dict(tokenizer).vocab_size
    special = tokenizer.get("special", [])
    if len({END, "", *special}) != 2 + len(special):
        raise UserError("the tokenizer's special tokens are not valid")
    if "template" in tokenizer:
        Template.from_dict(tokenizer["template"])
    return size


def file_names(meta: dict) -> set[str]:
    """The names of the data files that meta describes."""
    train = [shard["file"] for shard in meta["shards"]["train"]] if "shards" in meta else ["train.bin"]
    return {*train, "val.bin", *(f"{split}.mask.bin" for split in meta.get("predicted_bytes", {}))}


# ----------------------------------------------------------------------------------------------------------------------
# whose files they are, and how new ones take their place


def _staged_meta(folder: str) -> dict | None:
    """The description of new files that are complete but perhaps not all in place yet; None if there are none."""
    path = os.path.join(folder, STAGING, "meta.json")
    with contextlib.suppress(UserError):  # not one of ours
        return _read_json(path) if os.path.lexists(path) else None
    return None


def _waiting(folder: str, staged: dict) -> set[str]:
    """The names of the files that have still to be moved from the staging folder to folder."""
    return {name for name in file_names(staged) if os.path.isfile(os.path.join(folder, STAGING, name))}


def _own_files(folder: str) -> set[str]:
    """The names of the data files in folder that an earlier preparation wrote, as meta.json says."""
    own: set[str] = set()
    with contextlib.suppress(UserError):
        path = os.path.join(folder, "meta.json")
        if os.path.lexists(path) and "tokens" in (meta := _read_json(path)):  # without counts it is somebody else's
            own |= {"meta.json", *file_names(meta)}
    if staged := _staged_meta(folder):
        own |= file_names(staged) - _waiting(folder, staged)
    return own


def refuse_foreign_files(folder: str):
    """Raise UserError if folder holds files with the names of data files that no preparation wrote."""
    names = set(filter(DATA_FILES.fullmatch, os.listdir(folder))) if os.path.isdir(folder) else set()
    if foreign := sorted(names - _own_files(folder)):
        raise UserError(
            f"{os.path.join(folder, foreign[0])} was not written by a preparation, or meta.json beside it does not "
            f"say so, and would be replaced: move it elsewhere, or write to another folder"
        )


def _commit(folder: str):
    """Move complete new files into place and remove earlier ones. Once started it must be finished, here or by the
    next preparation."""
    refuse_foreign_files(folder)
    staging = os.path.join(folder, STAGING)
    staged = _read_json(os.path.join(staging, "meta.json"))
    for name in sorted(_waiting(folder, staged)):
        os.replace(os.path.join(staging, name), os.path.join(folder, name))
    for name in _own_files(folder) - file_names(staged) - {"meta.json"}:
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(folder, name))
    os.replace(os.path.join(staging, "meta.json"), os.path.join(folder, "meta.json"))
    shutil.rmtree(staging)


# ----------------------------------------------------------------------------------------------------------------------
# writing


@dataclass(frozen=True)
class Encoded:
    """Ids (n,) and how many characters and bytes of text they stand for.

    mask (n,) is nonzero for ids that are in the loss, None if all are; these stand for n_predicted bytes.
    """

    ids: np.ndarray
    n_characters: int
    n_bytes: int
    mask: np.ndarray | None = None
    n_predicted: int = 0
    is_lossy: bool = False  # the ids cannot give the text back


@dataclass(frozen=True)
class Prepared:
    """A data folder that was written: meta.json, counts (vocab_size,) of the ids per split, and a piece of its text."""

    folder: str
    meta: dict
    counts: dict[str, np.ndarray]
    tokenizer: Tokenizer
    is_lossy: bool  # something of the text is not in the ids, apart from unknown words
    sample: str = ""


class Writer:
    """Writes a data folder, which it locks until the end of the with statement.

    With shard_tokens train is written to files of so many tokens each. plan: anything that JSON can hold and that is
    the same whenever the same data are to be written; after save() the new files survive a crash, and a Writer with the
    same plan continues after the first `documents` documents. spool_val: finish() is told the order of val's documents.
    Raises UserError for a folder that is locked, cannot be written, or holds data files of somebody else.
    """

    def __init__(
        self,
        folder: str,
        tokenizer: Tokenizer | None = None,
        shard_tokens: int = 0,
        plan: Any = None,
        spool_val: bool = False,
    ):
        self.folder, self.tokenizer, self.shard_tokens, self.plan = folder, tokenizer, shard_tokens, plan
        self.staging = os.path.join(folder, STAGING)
        self.val_file = "val.ids" if spool_val else "val.bin"
        self.lock = contextlib.ExitStack()
        self.documents = 0  # that are done
        self.saved = False  # whether a later process can continue with the new files
        self.sizes: dict[str, int] = {}  # bytes of the new files
        self.unsynced: set[str] = set()  # names of those that have perhaps not reached the disk
        self.counts = {split: np.zeros(MAX_VOCAB, np.int64) for split in SPLITS}
        self.totals: dict[str, dict[str, int]] = {
            "characters": dict.fromkeys(SPLITS, 0),
            "bytes": dict.fromkeys(SPLITS, 0),
            "predicted_bytes": {},
        }
        self.is_lossy = False

    def __enter__(self) -> "Writer":
        refuse_foreign_files(self.folder)  # before the lock creates a file there
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked_directory(self.folder))
            with self._disk_errors():
                if _staged_meta(self.folder):
                    _commit(self.folder)
                refuse_foreign_files(self.folder)
                self._resume()
            self.lock = stack.pop_all()
        return self

    def __exit__(self, *error):
        with self.lock:
            if not self.saved and not _staged_meta(self.folder):
                shutil.rmtree(self.staging, ignore_errors=True)

    @contextlib.contextmanager
    def _disk_errors(self):
        """Turn errors in writing into sentences with a remedy."""
        try:
            yield
        except OSError as error:
            remedy = "free space there or change its rights"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                new = _megabytes(self.staging, os.listdir(self.staging))
                earlier = _megabytes(self.folder, _own_files(self.folder))
                remedy = f"free space on that disk, where the new files have {new} by now" + (
                    f" and the earlier data, which stay as they are, {earlier}" if earlier else ""
                )
            continues = "; the same command then continues where it stopped" if self.saved else ""
            raise UserError(f"{self.folder} cannot be written ({error.strerror}): {remedy}{continues}") from error

    def _path(self, name: str) -> str:
        """The path of a new file."""
        return os.path.join(self.staging, name)

    def _resume(self):
        """Continue the files that an earlier process saved with the same plan, or start with none."""
        state_path = self._path("state.json")
        try:
            with open(state_path, encoding="utf-8") as file:
                state = json.load(file)
            if self.plan is not None and state["plan"] == self.plan:
                return self._restore(state)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # there is none, or it is damaged
        if os.path.exists(state_path):
            print("what was started there before had other files or settings, or is damaged: starting again")
        if os.path.exists(self.staging):
            shutil.rmtree(self.staging)
        os.makedirs(self.staging)

    def _restore(self, state: dict):
        """Take over a saved state, without what was written to the files after it was saved."""
        counts = {split: np.array(state["counts"][split], np.int64) for split in SPLITS}
        for name, size in state["sizes"].items():
            if os.path.basename(name) != name or os.path.getsize(self._path(name)) < size:
                raise ValueError(f"{name} is too short")
        for name in set(os.listdir(self.staging)) - {*state["sizes"], "state.json"}:
            os.remove(self._path(name))
        for name, size in state["sizes"].items():
            os.truncate(self._path(name), size)
        self.documents, self.sizes, self.totals = state["documents"], state["sizes"], state["totals"]
        self.is_lossy, self.saved = state["is_lossy"], True
        self.counts = {split: np.pad(found, (0, MAX_VOCAB - len(found))) for split, found in counts.items()}

    def save(self, documents: int):
        """Make the new files, which hold this many documents, survive a crash."""
        state = {
            "plan": self.plan,
            "documents": documents,
            "sizes": self.sizes,
            "counts": {split: np.trim_zeros(counts, "b").tolist() for split, counts in self.counts.items()},
            "totals": self.totals,
            "is_lossy": self.is_lossy,
        }
        with self._disk_errors():
            self._sync()
            with replaced_file(self._path("state.json"), "w", encoding="utf-8") as file:
                json.dump(state, file)
        self.documents, self.saved = documents, True

    def _append(self, name: str, content: np.ndarray):
        with open(self._path(name), "ab") as file:
            file.write(np.ascontiguousarray(content).data)
        self.sizes[name] = self.sizes.get(name, 0) + content.nbytes
        self.unsynced.add(name)

    def _sync(self):
        """Wait until all new files have reached the disk."""
        for name in sorted(self.unsynced):
            with open(self._path(name), "ab") as file:
                os.fsync(file.fileno())
        self.unsynced.clear()

    def add(self, split: str, encoded: Encoded):
        """Append to a split."""
        ids = np.ascontiguousarray(encoded.ids, dtype="<u2")
        parts = {self.val_file if split == "val" else "train.bin": ids}
        if split == "train" and self.shard_tokens:
            number, used = divmod(int(self.counts["train"].sum()), self.shard_tokens)
            places = range(self.shard_tokens - used, len(ids), self.shard_tokens)
            parts = {shard_name("train", i): part for i, part in enumerate(np.split(ids, places), number)}
        with self._disk_errors():
            for name, part in parts.items():
                if len(part):
                    self._append(name, part)
            if encoded.mask is not None:
                self._append(f"{split}.mask.bin", encoded.mask.astype(np.uint8))
                predicted = self.totals["predicted_bytes"]
                predicted[split] = predicted.get(split, 0) + encoded.n_predicted
        counts = np.bincount(ids)
        self.counts[split][: len(counts)] += counts
        self.totals["characters"][split] += encoded.n_characters
        self.totals["bytes"][split] += encoded.n_bytes
        self.is_lossy |= encoded.is_lossy

    def finish(self, meta: dict, val_order: np.ndarray | None = None) -> Prepared:
        """Move the files into place; meta.json gets the entries of meta too. Raises UserError for an empty split.

        val_order: the numbers of val's documents, each of which ends with <|endoftext|>, in their final order.
        """
        tokenizer = self.tokenizer
        assert tokenizer is not None, "a Writer needs a tokenizer"
        tokens = {split: int(self.counts[split].sum()) for split in SPLITS}
        if min(tokens.values()) < 2:
            self.saved = False  # to continue would end here again
            raise UserError(
                f"the text gives {tokens['train']:,} tokens to train on and {tokens['val']:,} for "
                f"validation, and a loss needs two: give a longer one, another --val_fraction, or another "
                f"--tokenizer"
            )
        with self._disk_errors():
            if val_order is not None:
                self._write_in_order(val_order, tokenizer.end_id)
            self._sync()
            n_shards = -(-tokens["train"] // self.shard_tokens) if self.shard_tokens else 0
            paths = [self._path(shard_name("train", i)) for i in range(n_shards)]
            shards = [describe(path, file_sha256(path)) for path in paths]
            whole = map(self._path, ["val.bin"] if shards else ["train.bin", "val.bin"])
            meta = {
                "tokenizer": tokenizer.to_dict(),
                "vocab_size": tokenizer.vocab_size,
                "characters": self.totals["characters"],
                "bytes": self.totals["bytes"],
                "tokens": tokens,
                **({"predicted_bytes": predicted} if (predicted := self.totals["predicted_bytes"]) else {}),
                **({"shards": {"train": shards}} if shards else {}),
                "ids_sha256": file_sha256(*whole, prefix="".join(shard["sha256"] for shard in shards)),
                **meta,
            }
            with replaced_file(self._path("meta.json")) as file:
                file.write(json.dumps(meta, indent=1).encode("utf-8"))
            _commit(self.folder)
        self.saved = False
        counts = {split: self.counts[split][: tokenizer.vocab_size] for split in SPLITS}
        return Prepared(self.folder, meta, counts, tokenizer, self.is_lossy)

    def _write_in_order(self, order: np.ndarray, end_id: int | None):
        """Write val.bin from the spooled documents."""
        ids = np.memmap(self._path(self.val_file), dtype="<u2", mode="r")
        ends = np.flatnonzero(ids == end_id) + 1
        assert len(ends) == len(order), "every document ends with end_id"
        starts = np.append(0, ends[:-1])
        with open(self._path("val.bin"), "wb") as file:
            for i in order.tolist():
                file.write(ids[starts[i] : ends[i]].data)
        self.unsynced.add("val.bin")


def _megabytes(folder: str, names) -> str:
    """The size of these files of folder in words, '' if there are none."""
    size = sum(os.path.getsize(path) for name in names if os.path.isfile(path := os.path.join(folder, name)))
    return f"{math.ceil(size / 1e6):,} MB" if size else ""


# ----------------------------------------------------------------------------------------------------------------------
# shards and hashes


def shard_name(split: str, number: int) -> str:
    """train_000.bin and so on."""
    return f"{split}_{number:03d}.bin"


def find_shards(folder: str) -> list[str]:
    """The names of train's shards in a folder without meta.json, in order. Raises UserError if a number is missing."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    shards = {int(match[1]): name for name in names if (match := SHARD.fullmatch(name))}
    for number in range(len(shards)):
        if number not in shards:
            raise UserError(
                f"{folder} has {len(shards)} shards of train and no {shard_name('train', number)}: copy it there, or "
                f"prepare the data again"
            )
    return [shards[number] for number in range(len(shards))]


def split_files(folder: str, meta: dict, split: str) -> list[tuple[str, int]]:
    """(path, number of tokens) of a split's files, checked against meta. Raises UserError for missing or wrong ones."""
    shards = meta.get("shards", {}).get("train", []) if split == "train" else []
    described: dict[str, int | None] = {shard["file"]: shard["tokens"] for shard in shards}
    if not described:
        whole = f"{split}.bin"
        missing = split == "train" and not os.path.exists(os.path.join(folder, whole))
        described = dict.fromkeys((find_shards(folder) if missing else []) or [whole])
    files = [(os.path.join(folder, name), _count(folder, name, n_tokens)) for name, n_tokens in described.items()]
    found = sum(count for _, count in files)
    if found != meta.get("tokens", {}).get(split, found):
        raise UserError(
            f"{files[0][0] if len(files) == 1 else folder} holds {found:,} tokens where "
            f"meta.json says {meta['tokens'][split]:,}: {how_to_prepare(folder)}"
        )
    return files


def _count(folder: str, name: str, expected: int | None) -> int:
    """The number of tokens in a file. Raises UserError if it is missing or does not have the expected number."""
    path = os.path.join(folder, name)
    remedy = "copy it there again, or prepare the data again" if expected else how_to_prepare(folder)
    if not os.path.isfile(path):
        raise UserError(f"{short_name(folder)} has no {name}: {remedy}")
    size = os.path.getsize(path)
    if expected and size != 2 * expected:
        raise UserError(f"{path} has {size:,} bytes where meta.json says {2 * expected:,}: {remedy}")
    if size == 0 or size % 2:
        raise UserError(f"{path} is {'empty' if size == 0 else 'damaged'}: {remedy}")
    return size // 2


def short_name(folder: str) -> str:
    """A data folder's name in messages: relative to the repository if it is inside."""
    return os.path.relpath(folder, ROOT) if folder.startswith(ROOT + os.sep) else folder


def describe(path: str, sha256: str) -> dict:
    """meta.json's description of a shard."""
    return {
        "file": os.path.basename(path),
        "tokens": os.path.getsize(path) // 2,
        "ends_sha256": ends_sha256(path),
        "sha256": sha256,
    }


@contextlib.contextmanager
def _readable(path: str) -> Iterator[io.FileIO]:
    """The file at path, open for unbuffered reading. Raises UserError if it cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): change its rights, or copy it again") from error


def ends_sha256(path: str) -> str:
    """SHA-256 of the first megabyte of a file followed by its last one."""
    with _readable(path) as file:
        first = file.read(END_BYTES)
        file.seek(max(0, os.path.getsize(path) - END_BYTES))
        return hashlib.sha256(first + file.read(END_BYTES)).hexdigest()


def file_sha256(*paths: str, prefix: str = "") -> str:
    """SHA-256 of prefix and the contents of files, one after the other."""
    digest = hashlib.sha256(prefix.encode("ascii"))
    for path in paths:
        with _readable(path) as file:
            while piece := file.read(2**20):
                digest.update(piece)
    return digest.hexdigest()


def check_ends(folder: str, shards: list[dict]):
    """Raise UserError unless the ends of every shard in folder are what its description says."""
    known = {shard["ends_sha256"]: shard["file"] for shard in shards}
    for shard in shards:
        path = os.path.join(folder, shard["file"])
        if (found := ends_sha256(path)) != shard["ends_sha256"]:
            problem = "its first or its last megabyte differs, copy it again, or prepare the data again"
            if found in known:
                problem = f"it holds what belongs in {known[found]}, give the shards their right names"
            raise UserError(f"{path} is not what meta.json describes: {problem}")


# ----------------------------------------------------------------------------------------------------------------------
# reading


class TokenArray:
    """The first `length` entries of a 1-D array that is stored in consecutive files, [(path, number of entries), ...].

    len(tokens) and tokens[start:stop] work as with an array. Small files are read once and kept in memory; large ones
    are read again for each call, which takes no memory: a map that is kept fills it, see nanoGPT PR 428.
    """

    def __init__(self, files: list[tuple[str, int]], dtype: str, length: int):
        self.paths, self.dtype, self.length = [path for path, _ in files], np.dtype(dtype), length
        self.starts = [0, *accumulate(count for _, count in files)]  # index of each file's first entry
        self._cached: np.ndarray | None = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key) -> np.ndarray:
        assert isinstance(key, slice) and key.step in (None, 1)
        start, stop, _ = key.indices(self.length)
        if self._cached is not None:
            return self._cached[start:stop]
        values = np.empty(max(0, stop - start), dtype=self.dtype)
        self._read(values, start)
        return values

    @property
    def in_memory(self) -> bool:
        """Whether all of it is kept in memory."""
        return self.length * self.dtype.itemsize <= IN_MEMORY_BYTES

    def array(self) -> "np.ndarray | TokenArray":
        """All of it as a numpy array, which is memory-mapped if it is a large file; shards stay a TokenArray."""
        if self.in_memory:
            if self._cached is None:
                self._cached = self[:]
            return self._cached
        if len(self.paths) > 1:
            return self
        return np.memmap(self.paths[0], dtype=self.dtype, mode="r", shape=(self.length,))

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The windows that begin at starts, (len(starts), length)."""
        if self.in_memory:
            return self.array()[starts[:, None] + np.arange(length)]
        windows = np.empty((len(starts), length), dtype=self.dtype)
        for window, start in zip(windows, starts.tolist()):
            self._read(window, start)
        return windows

    def chunks(self, size: int = CHUNK_TOKENS) -> Iterator[np.ndarray]:
        """All of it, `size` entries at a time."""
        for start in range(0, self.length, size):
            yield self[start : start + size]

    def spread(self, most: int) -> Iterator[np.ndarray]:
        """Chunks evenly spaced over all of it, its end among them, together about `most` entries at most."""
        size = max(1, min(most // 128, self.length))
        n = -(-min(most, self.length) // size)
        for i in range(n):
            start = i * (self.length - size) // max(1, n - 1)
            yield self[start : start + size]

    def _read(self, values: np.ndarray, start: int):
        """Fill values with the entries from start on."""
        while len(values):
            i = bisect.bisect_right(self.starts, start) - 1
            wanted = values[: self.starts[i + 1] - start]
            with _readable(self.paths[i]) as file:
                file.seek((start - self.starts[i]) * self.dtype.itemsize)
                if file.readinto(wanted.data) < wanted.nbytes:
                    raise UserError(f"{self.paths[i]} has become shorter while it was read: prepare the data again")
            values, start = values[len(wanted) :], start + len(wanted)
