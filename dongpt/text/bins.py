"""Write, describe and read data folders: train.bin or its shards, val.bin, loss masks and meta.json.

train.bin and val.bin contain raw little-endian uint16 token ids, the format that nanoGPT reads. The training set of a
large corpus is split into consecutive shards, train_000.bin, train_001.bin, ... If only some tokens count toward the
loss, train.mask.bin and val.mask.bin hold one uint8 per token. meta.json has the tokenizer, sizes, source and hashes.

    with BinWriter(folder, tokenizer) as writer:
        writer.add("train", EncodedText(ids, n_characters, n_bytes))
        prepared = writer.finish(meta)
    meta = read_meta(folder)

New files are written to a staging folder inside the data folder and moved into place at the end, so the existing data
stay intact until the new data are complete. Readers do not modify the folder and need no lock.
"""

import contextlib
import difflib
import errno
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any, Iterator

import numpy as np

from configurator import UserError
from dongpt.program import ROOT, atomic_write, locked_directory, shortest_path
from dongpt.text.tokenizers import TiktokenTokenizer, Tokenizer, from_dict

SPLITS = ("train", "val")
AUTO_PREPARED_DATASETS = ("chat_demo", "python_docs")  # datasets whose prepare.py needs no network
STAGING_DIR = ".dongpt-new"  # in the data folder, holds new files until all are complete
SHARD_PATTERN = re.compile(r"train_(\d{3,})\.bin")
# all files that prepare.py writes
DATA_FILE_PATTERN = re.compile(r"train_\d{3,}\.bin|(train|val)(\.mask)?\.bin|meta\.json")
MAX_IN_MEMORY_BYTES = 64 * 2**20  # larger files are read from disk on each access
HEAD_TAIL_HASH_BYTES = 2**20  # hashed at both ends of each shard when training starts
MAX_OPEN_FILES = 16  # new files kept open; small shards could exceed the system's limit
CHUNK_TOKENS = 2**22  # chunk size for reading a whole file


# ----------------------------------------------------------------------------------------------------------------------
# locating data folders


def find_data_folder(dataset: str, data_dir: str, rt=None, out=None, quiet: bool = False, paths=()) -> str:
    """Return the absolute path of data_dir if it is given, or else of data/<dataset>.

    paths contains at most one command-line argument. It replaces dataset if it is a name, and data_dir if it is a path.
    If rt, a Runtime, is given, a missing dataset whose prepare.py needs no network is prepared first, while the other
    processes wait. The output of prepare.py goes to out (default: stdout), or is discarded if quiet is True.
    """
    if paths and (dataset or data_dir):
        problem = (
            f"{paths[0]} and {'--data_dir=' if data_dir else '--dataset='}{data_dir or dataset} both name a dataset"
        )
        raise UserError(f"{problem}: remove one of them")
    for path in paths:
        is_name = os.path.isdir(os.path.join(ROOT, "data", path)) or not os.path.isdir(path)
        dataset, data_dir = (path, "") if is_name else ("", path)
    if not (dataset or data_dir):
        raise UserError("no dataset was given: pass --dataset=NAME (a folder under data/) or --data_dir=DIR")
    folder = os.path.abspath(data_dir) if data_dir else os.path.join(ROOT, "data", dataset)
    name = os.path.basename(folder)
    if rt and name in AUTO_PREPARED_DATASETS and folder == os.path.join(ROOT, "data", name):
        if rt.is_main and not all(os.path.exists(os.path.join(folder, f"{split}.bin")) for split in SPLITS):
            print(f"data/{name} is not prepared yet: running python data/{name}/prepare.py", file=out, flush=True)
            command = [sys.executable, os.path.join(folder, "prepare.py")]
            result = subprocess.run(command, stdout=subprocess.DEVNULL if quiet else out)
            if result.returncode in (130, -2):  # Ctrl-C; other failures are reported when the corpus is opened
                raise KeyboardInterrupt
        rt.barrier()
    return folder


def dataset_folder(name: str) -> str:
    """Return the path of data/<name>. Raises UserError unless name is a plain folder name."""
    if not name or name in (".", "..") or name != os.path.basename(name):
        raise UserError(f"name={name} must be the name of a folder under data/, without slashes")
    return os.path.join(ROOT, "data", name)


def how_to_prepare(folder: str) -> str:
    """Return instructions for preparing the data in folder, for use in error messages."""
    script_path = os.path.join(folder, "prepare.py")
    if os.path.exists(script_path):
        small_text = ", or train on a small text: python train.py config/quickstart.py"
        is_default = os.path.basename(folder) == "openwebtext"  # the default dataset, as in nanoGPT
        return f"run python {shortest_path(script_path)} first{small_text if is_default else ''}"
    root = os.path.join(ROOT, "data")
    folders = [name for name in os.listdir(root) if os.path.isdir(os.path.join(root, name))]
    datasets = sorted(name for name in folders if os.path.exists(os.path.join(root, name, "prepare.py")))
    command = "python data/prepare.py --input=YOUR_TEXT --name=NAME"
    similar = difflib.get_close_matches(os.path.basename(folder), folders, 1)
    meant = f"did you mean {similar[0]}? Otherwise, " if similar else ""
    return f"{meant}prepare it with {command}, or with data/NAME/prepare.py, where NAME is one of {', '.join(datasets)}"


# ----------------------------------------------------------------------------------------------------------------------
# meta.json

COUNT_TYPES_BY_SPLIT = {"train": int, "val": int}
META_TYPES: dict[str, Any] = {  # types of the entries in meta.json; every int is a count
    **dict.fromkeys(("source", "sha256", "ids_sha256", "split", "plan_sha256"), str),
    **dict.fromkeys(("documents", "seed", "left_out", "vocab_size"), int),
    **dict.fromkeys(("tokens", "characters", "bytes", "predicted_bytes"), COUNT_TYPES_BY_SPLIT),
    "shards": {"train": [{"file": str, "tokens": int, "sha256": str, "ends_sha256": str}]},
}


def read_meta(folder: str) -> dict:
    """Read and validate meta.json, or nanoGPT's meta.pkl. Returns {} if folder has neither.

    Raises UserError if the file is damaged, or if prepare.py was interrupted while moving its files into place.
    """
    if os.path.isdir(os.path.join(folder, STAGING_DIR)) and _staged_names(folder)[1]:
        problem = f"the preparation of {folder} was interrupted while moving files into place"
        raise UserError(f"{problem}: run the same command again to complete it")
    paths = [os.path.join(folder, name) for name in ("meta.json", "meta.pkl")]
    return next((_read_meta_file(path) for path in paths if os.path.lexists(path)), {})


class _PlainUnpickler(pickle.Unpickler):
    """Unpickler for built-in types such as dict, list, str and int. Rejects pickles that could run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def _load_pickle(file: IO[bytes]) -> dict:
    """Load nanoGPT's meta.pkl and convert it to the format of meta.json."""
    try:
        meta = _PlainUnpickler(file).load()
        characters = "".join(meta["itos"][i] for i in range(meta["vocab_size"]))
        return {"tokenizer": {"kind": "char", "characters": characters}, "vocab_size": meta["vocab_size"]}
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(f"it is not a plain meta.pkl from nanoGPT, and no code in it was run: {error}") from error


def _has_type(value: Any, expected: Any) -> bool:
    """Return True if value has the expected type (see META_TYPES). Missing keys are allowed."""
    if isinstance(expected, dict):
        return isinstance(value, dict) and all(_has_type(value[key], expected[key]) for key in expected if key in value)
    if isinstance(expected, list):
        return isinstance(value, list) and all(_has_type(item, expected[0]) for item in value)
    return type(value) is expected and (expected is str or 0 <= value < 2**62)  # excludes True, which is an int


def _read_meta_file(path: str) -> dict:
    """Read a meta.json or meta.pkl file. Raises UserError if an entry is not valid."""
    try:
        if not os.path.isfile(path):
            raise ValueError("it is not a file")
        with open(path, "rb") as file:
            meta = _load_pickle(file) if path.endswith(".pkl") else json.loads(str(file.read(), "utf-8"))
        if not isinstance(meta, dict):
            raise ValueError("it is not a JSON object")
        if invalid_keys := [key for key, kind in META_TYPES.items() if key in meta and not _has_type(meta[key], kind)]:
            raise ValueError(f"{invalid_keys[0]} is not valid")
        tokens, characters, n_bytes, predicted_bytes = (
            meta.get(key, {}) for key in ("tokens", "characters", "bytes", "predicted_bytes")
        )
        shards, no_val = meta["shards"]["train"] if "shards" in meta else [], not has_validation(meta)
        tokenizer = from_dict(meta["tokenizer"], load_gpt2=False)
        checks = {
            "vocab_size": meta["vocab_size"] == tokenizer.vocab_size,
            "tokens": not tokens or set(tokens) == set(SPLITS) and min(tokens["train"], tokens["val"] + no_val) > 0,
            "bytes": all(  # a character takes one to four bytes
                split in tokens and characters.get(split, 1) <= n <= 4 * characters.get(split, n)
                for split, n in n_bytes.items()
            ),
            "predicted_bytes": all(
                split in tokens and n <= n_bytes.get(split, n) for split, n in predicted_bytes.items()
            ),
            "shards": len({shard["file"] for shard in shards}) == len(shards) > 0 or "shards" not in meta,
            "a shard": all(  # a file in the data folder, with all entries that describe() returns
                len(shard) >= 4 and SHARD_PATTERN.fullmatch(shard["file"]) and shard["tokens"] > 0 for shard in shards
            ),
            "the number of tokens": not shards or sum(shard["tokens"] for shard in shards) == tokens.get("train"),
        }
        if invalid_keys := [name for name, is_valid in checks.items() if not is_valid]:
            raise ValueError(f"{invalid_keys[0]} is not valid")
        if meta.get("documents") == 1 and isinstance(tokenizer, TiktokenTokenizer):  # <|endoftext|> never occurs
            meta["tokenizer"].setdefault("start_id", tokenizer.newline_id)
        return meta
    except (OSError, ValueError, KeyError, RecursionError) as error:
        problem = f"{path} is damaged or was not written by prepare.py ({error})"
        raise UserError(f"{problem}: move it and its .bin files elsewhere, and prepare the data again") from error


def has_validation(meta: dict) -> bool:
    """Return True if the data has a validation set. Data prepared with --val_fraction=0 has none."""
    return meta.get("split") != "none"


def data_file_names(meta: dict) -> set[str]:
    """Return the names of the data files that meta describes."""
    train = [shard["file"] for shard in meta["shards"]["train"]] if "shards" in meta else ["train.bin"]
    return {*train, "val.bin", *(f"{split}.mask.bin" for split in meta.get("predicted_bytes", {}))}


# ----------------------------------------------------------------------------------------------------------------------
# ownership of files, and how new files replace old ones


def _staged_names(folder: str) -> tuple[set[str], set[str]]:
    """Return (names of all new files, names of those already moved). Both are empty until the files are complete."""
    names: set[str] = set()
    with contextlib.suppress(UserError):  # there are none, or their meta.json is not valid
        names = data_file_names(_read_meta_file(os.path.join(folder, STAGING_DIR, "meta.json")))
    return names, {name for name in names if not os.path.isfile(os.path.join(folder, STAGING_DIR, name))}


def _prepared_file_names(folder: str) -> set[str]:
    """Return the names of the files in folder that prepare.py wrote, according to meta.json."""
    names = _staged_names(folder)[1]
    with contextlib.suppress(UserError):
        meta = _read_meta_file(os.path.join(folder, "meta.json"))
        if "tokens" in meta:  # a meta.json without counts is from another program
            names |= {"meta.json", *data_file_names(meta)}
    return names


def check_only_own_files(folder: str):
    """Raise UserError if folder contains files that are named like data files but were not written by prepare.py."""
    names = set(filter(DATA_FILE_PATTERN.fullmatch, os.listdir(folder))) if os.path.isdir(folder) else set()
    if unrelated := sorted(names - _prepared_file_names(folder)):
        problem = f"{os.path.join(folder, unrelated[0])} was not written by prepare.py, or is not listed in meta.json"
        raise UserError(f"{problem}, and would be overwritten: move it elsewhere, or write to a different folder")


def _commit_staged_files(folder: str):
    """Move the new files into place and remove the old ones. The next preparation completes an interrupted move."""
    check_only_own_files(folder)
    names, moved_before = _staged_names(folder)
    for name in sorted(names - moved_before):
        os.replace(os.path.join(folder, STAGING_DIR, name), os.path.join(folder, name))
    for name in _prepared_file_names(folder) - names - {"meta.json"}:
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(folder, name))
    os.replace(os.path.join(folder, STAGING_DIR, "meta.json"), os.path.join(folder, "meta.json"))
    shutil.rmtree(os.path.join(folder, STAGING_DIR))


# ----------------------------------------------------------------------------------------------------------------------
# writing


@dataclass(frozen=True)
class EncodedText:
    """Token ids (n,), with the number of characters and bytes in their text.

    mask (n,) is nonzero for tokens that count toward the loss (n_predicted_bytes bytes). None means that all count.
    """

    ids: np.ndarray
    n_characters: int
    n_bytes: int
    mask: np.ndarray | None = None
    n_predicted_bytes: int = 0
    is_lossy: bool = False  # True if decoding the ids does not restore the text


@dataclass(frozen=True)
class PreparedData:
    """A prepared data folder, the contents of its meta.json, and a sample of its text."""

    folder: str
    meta: dict
    tokenizer: Tokenizer
    is_lossy: bool  # True if decoding loses anything other than unknown words
    sample: str = ""


class BinWriter:
    """Context manager that locks and writes a data folder.

    shard_tokens > 0 splits the training set into files of shard_tokens tokens. After save(), the new files survive a
    crash, and a BinWriter with the same fingerprint (a hash of everything that determines the data) resumes after the
    first state["documents"] documents. With reorder_val=True, pass the order of the validation documents to finish().
    Raises UserError if the folder is locked, cannot be written, or contains unrelated data files.
    """

    def __init__(
        self, folder: str, tokenizer: Tokenizer | None = None, shard_tokens=0, fingerprint="", reorder_val=False
    ):
        self.folder, self.tokenizer, self.shard_tokens = folder, tokenizer, shard_tokens
        self.val_file = "val.ids" if reorder_val else "val.bin"
        self.can_resume = False  # whether a later process can resume from the new files
        self.open_files: dict[str, IO[bytes]] = {}  # new files that are being written
        self.state: dict[str, Any] = {key: dict.fromkeys(SPLITS, 0) for key in ("characters", "bytes", "tokens")}
        self.state |= {"predicted_bytes": {}, "is_lossy": False}
        # number of documents written, sizes of the new files in bytes
        self.state |= {"plan": fingerprint, "documents": 0, "sizes": {}}

    def __enter__(self) -> "BinWriter":
        check_only_own_files(self.folder)  # before creating the lock file there
        with contextlib.ExitStack() as exit_stack:
            exit_stack.enter_context(locked_directory(self.folder))
            with self._explain_disk_errors():
                if _staged_names(self.folder)[0]:
                    _commit_staged_files(self.folder)
                self._resume_staging()
            self.lock = exit_stack.pop_all()
        return self

    def __exit__(self, *error):
        try:
            with contextlib.suppress(OSError):  # of a write that failed before
                self._close_files()
            if self.can_resume and KeyboardInterrupt in error:
                print(f"interrupted: run the same command again to continue after document {self.state['documents']:,}")
            if not self.can_resume and not _staged_names(self.folder)[0]:
                shutil.rmtree(self._staging_path(), ignore_errors=True)
        finally:
            self.lock.__exit__(*error)

    @contextlib.contextmanager
    def _explain_disk_errors(self):
        """Convert write errors to UserErrors that suggest a remedy."""
        try:
            yield
        except OSError as error:
            remedy = "free some disk space, or change its permissions"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                new_mb = _size_in_mb(self._staging_path(), self.state["sizes"])
                remedy = f"free some space on that disk, where the new files take up {new_mb} MB"
                if not _staged_names(self.folder)[1]:
                    old_mb = _size_in_mb(self.folder, _prepared_file_names(self.folder))
                    remedy += f" and the existing data, which are unchanged, take up {old_mb} MB"
            if self.can_resume or _staged_names(self.folder)[0]:
                remedy += ", then run the same command again to continue where it stopped"
            raise UserError(f"{self.folder} cannot be written ({error.strerror}): {remedy}") from error

    def _staging_path(self, *name: str) -> str:
        """Return the path of a file in the staging folder, or of the folder itself."""
        return os.path.join(self.folder, STAGING_DIR, *name)

    def _resume_staging(self):
        """Resume from the files that a process with the same fingerprint saved, or start with an empty folder."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # missing or damaged
            with open(self._staging_path("state.json"), encoding="utf-8") as file:
                state = json.load(file)
            sizes, file_names = state["sizes"], set(os.listdir(self._staging_path())) - {"state.json"}
            has_same_settings = state.keys() == self.state.keys() and state["plan"] == self.state["plan"] != ""
            if has_same_settings and all(os.path.getsize(self._staging_path(name)) >= sizes[name] for name in sizes):
                for name in file_names:  # discard data written after the last save
                    os.truncate(self._staging_path(name), state["sizes"].get(name, 0))
                self.state, self.can_resume = state, True
                return
        if os.path.exists(self._staging_path("state.json")):
            print("the unfinished preparation used different files or settings, or is damaged: starting over")
        if os.path.exists(self._staging_path()):
            shutil.rmtree(self._staging_path())
        os.makedirs(self._staging_path())

    def save(self, documents: int):
        """Save the new files to disk, so that preparation can resume after the first `documents` documents."""
        self.state["documents"] = documents
        with self._explain_disk_errors():
            self._sync_to_disk()
            with atomic_write(self._staging_path("state.json"), "w", encoding="utf-8") as file:
                json.dump(self.state, file)
        self.can_resume = True

    def _sync_to_disk(self):
        """Flush all new files to disk."""
        self._close_files()
        for name in os.listdir(self._staging_path()):
            with open(self._staging_path(name), "ab") as file:
                os.fsync(file.fileno())

    def _append(self, name: str, array: np.ndarray):
        """Append an array to a new file."""
        if name not in self.open_files:
            if len(self.open_files) >= MAX_OPEN_FILES:
                self._close_files()
            self.open_files[name] = open(self._staging_path(name), "ab")
        self.open_files[name].write(array.data)
        self.open_files[name].flush()

    def _close_files(self):
        while self.open_files:
            self.open_files.popitem()[1].close()

    def add(self, split: str, encoded: EncodedText):
        """Append tokens to a split."""
        ids, state = np.ascontiguousarray(encoded.ids, dtype="<u2"), self.state
        arrays = {self.val_file if split == "val" else "train.bin": ids}
        if split == "train" and self.shard_tokens:
            number, offset = divmod(state["tokens"]["train"], self.shard_tokens)
            split_points = range(self.shard_tokens - offset, len(ids), self.shard_tokens)
            arrays = {shard_name("train", i): array for i, array in enumerate(np.split(ids, split_points), number)}
        if encoded.mask is not None:
            arrays[f"{split}.mask.bin"] = encoded.mask.astype(np.uint8)
            state["predicted_bytes"][split] = state["predicted_bytes"].get(split, 0) + encoded.n_predicted_bytes
        with self._explain_disk_errors():
            for name, array in arrays.items():
                if len(array):
                    self._append(name, array)
                    state["sizes"][name] = state["sizes"].get(name, 0) + array.nbytes
        state["characters"][split] += encoded.n_characters
        state["bytes"][split] += encoded.n_bytes
        state["tokens"][split] += len(ids)
        state["is_lossy"] |= encoded.is_lossy

    def first_ids(self) -> np.ndarray:
        """Return the first CHUNK_TOKENS ids of the training set."""
        name = shard_name("train", 0) if self.shard_tokens else "train.bin"
        path = self._staging_path(name)
        return np.fromfile(path, "<u2", CHUNK_TOKENS) if os.path.exists(path) else np.empty(0, "<u2")

    def finish(self, meta: dict, val_order: np.ndarray | None = None) -> PreparedData:
        """Write meta.json, which includes all entries of meta, and move the new files into place.

        val_order is the final order of the validation documents, which must end with <|endoftext|>.
        Raises UserError if a split is too small.
        """
        tokenizer = self.tokenizer
        assert tokenizer is not None, "a BinWriter needs a tokenizer"
        n_train, n_val = (self.state["tokens"][split] for split in SPLITS)
        if min(n_train, n_val if has_validation(meta) else n_train) < 2:
            self.can_resume = False  # resuming would fail again
            problem = f"the training set has {n_train:,} tokens and the validation set {n_val:,}; each needs at least 2"
            raise UserError(f"{problem}: use a longer text, or change --val_fraction or --tokenizer")
        with self._explain_disk_errors():
            if val_order is not None:
                self._write_val_in_order(val_order, tokenizer.end_id)
            if n_val == 0:
                open(self._staging_path("val.bin"), "wb").close()
            n_shards = -(-n_train // self.shard_tokens) if self.shard_tokens else 0
            paths = [self._staging_path(shard_name("train", i)) for i in range(n_shards)]
            with ThreadPoolExecutor(1) as pool:  # flush the files while they are hashed
                flushing = pool.submit(self._sync_to_disk)
                shards = [describe(path, file_sha256(path)) for path in paths]
                sha256 = ids_sha256(self._staging_path(), shards)
                flushing.result()
            counts = {key: self.state[key] for key in ("characters", "bytes", "tokens", "predicted_bytes")}
            meta = {
                "tokenizer": tokenizer.to_dict(),
                "vocab_size": tokenizer.vocab_size,
                **{key: count for key, count in counts.items() if count},
                **({"shards": {"train": shards}} if shards else {}),
                "ids_sha256": sha256,
                **meta,
            }
            with atomic_write(self._staging_path("meta.json")) as file:
                file.write(json.dumps(meta, indent=1).encode("utf-8"))
            _commit_staged_files(self.folder)
        self.can_resume = False
        return PreparedData(self.folder, meta, tokenizer, self.state["is_lossy"])

    def _write_val_in_order(self, order: np.ndarray, end_id: int | None):
        """Write the collected validation documents to val.bin in the given order."""
        ids = np.memmap(self._staging_path(self.val_file), dtype="<u2", mode="r")
        ends = np.flatnonzero(ids == end_id) + 1
        assert len(ends) == len(order), "every document must end with end_id"
        starts = np.append(0, ends[:-1])
        with open(self._staging_path("val.bin"), "wb") as file:
            for i in order.tolist():
                file.write(ids[starts[i] : ends[i]].data)


def _size_in_mb(folder: str, names) -> str:
    """Return the total size of the named files in folder in MB, rounded up."""
    paths = (os.path.join(folder, name) for name in names)
    return f"{math.ceil(sum(os.path.getsize(path) for path in paths if os.path.isfile(path)) / 1e6):,}"


# ----------------------------------------------------------------------------------------------------------------------
# shards and hashes


def shard_name(split: str, number: int) -> str:
    """Return the file name of a shard, such as train_000.bin."""
    return f"{split}_{number:03d}.bin"


def describe(path: str, sha256: str) -> dict:
    """Return a shard's entry for meta.json."""
    name, tokens = os.path.basename(path), os.path.getsize(path) // 2
    return {"file": name, "tokens": tokens, "ends_sha256": head_tail_sha256(path), "sha256": sha256}


def _file_bytes(path: str) -> "TokenArray":
    """Return the bytes of a file."""
    size = os.path.getsize(path)
    return TokenArray([(path, size)], "u1", size)


def head_tail_sha256(path: str) -> str:
    """Return the SHA-256 of the first megabyte of a file followed by its last megabyte."""
    content = _file_bytes(path)
    first, last = content[:HEAD_TAIL_HASH_BYTES], content[max(0, len(content) - HEAD_TAIL_HASH_BYTES) :]
    return hashlib.sha256(first.tobytes() + last.tobytes()).hexdigest()


def file_sha256(*paths: str, prefix: str = "") -> str:
    """Return the SHA-256 of prefix followed by the contents of all files."""
    digest = hashlib.sha256(prefix.encode("ascii"))
    for path in paths:
        for chunk in _file_bytes(path).chunks():
            digest.update(chunk.data)
    return digest.hexdigest()


def ids_sha256(folder: str, shards: list[dict]) -> str:
    """Return the SHA-256 of train.bin followed by val.bin. If there are shards, their hashes replace train.bin."""
    names = ["val.bin"] if shards else ["train.bin", "val.bin"]
    prefix = "".join(shard["sha256"] for shard in shards)
    return file_sha256(*(os.path.join(folder, name) for name in names), prefix=prefix)


def check_shard_ends(folder: str, shards: list[dict]):
    """Raise UserError unless both ends of every shard in folder match their hash in meta.json."""
    file_of_hash = {shard["ends_sha256"]: shard["file"] for shard in shards}
    for shard in shards:
        path = os.path.join(folder, shard["file"])
        if (ends_hash := head_tail_sha256(path)) != shard["ends_sha256"]:
            problem = "its first or last megabyte differs, so copy it again, or prepare the data again"
            if ends_hash in file_of_hash:
                problem = f"it is {file_of_hash[ends_hash]} under a different name, so swap the names back"
            raise UserError(f"{path} does not match meta.json: {problem}")


# ----------------------------------------------------------------------------------------------------------------------
# reading


def open_data(folder: str, train_fraction: float = 1.0) -> tuple[dict, dict[str, "TokenArray"], dict[str, np.ndarray]]:
    """Return (meta, ids by split, masks by split) for a data folder. Splits without a mask have all tokens in the loss.

    The validation set is empty only if the data was prepared without one.
    train_fraction < 1 keeps only the first part of the training set. Raises UserError if read_meta does, or if a file
    is missing or its size does not match meta.json.
    """
    from dongpt.text.foreign_bins import find_problem  # here, since loading a model reads no data

    meta = read_meta(folder)
    tokens: dict[str, TokenArray] = {}
    masks: dict[str, np.ndarray] = {}
    for key in ("train", "val", "train.mask", "val.mask"):
        split, _, mask = key.partition(".")
        name, remedy, itemsize = f"{key}.bin", "", 1 if mask else 2
        has_file = os.path.exists(os.path.join(folder, name))
        if mask and not (has_file or split in meta.get("predicted_bytes", {})):
            continue
        if key == "val" and not has_validation(meta):
            tokens[split] = TokenArray([], "<u2", 0)
            continue
        n_tokens = sum(count for _, count in tokens[split].files) if mask else meta.get("tokens", {}).get(split)
        expected: dict[str, int | None] = {name: n_tokens}
        if key == "train" and "shards" in meta:
            expected = {shard["file"]: shard["tokens"] for shard in meta["shards"]["train"]}
            remedy = "copy it again, or prepare the data again"
        elif key == "train" and not meta.get("tokens") and not has_file:
            names = os.listdir(folder) if os.path.isdir(folder) else []
            n_shards = sum(bool(SHARD_PATTERN.fullmatch(name)) for name in names)
            expected = dict.fromkeys(shard_name("train", i) for i in range(n_shards)) or expected
            remedy = "copy it, or prepare the data again" if n_shards else ""
        files = []
        for name, count in expected.items():
            path, problem = os.path.join(folder, name), ""
            size = os.path.getsize(path) if os.path.isfile(path) else -1
            if size > 0 and not (count or mask) and (foreign := find_problem(path)):
                raise UserError(foreign)
            if size < 0:
                problem = f"{folder} has no {name}"
            elif count and size != itemsize * count:
                source = "the mask needs" if mask else "meta.json says"
                problem = f"{path} has {size:,} bytes, but {source} {itemsize * count:,}"
            elif size == 0 or size % itemsize:
                problem = f"{path} is {'damaged' if size else 'empty'}"
            if problem:
                raise UserError(f"{problem}: {remedy or how_to_prepare(folder)}")
            files.append((path, size // itemsize))
        length = sum(count for _, count in files)
        length = int(length * train_fraction) if split == "train" else length
        array = TokenArray(files, "u1" if mask else "<u2", length)
        if not mask:
            tokens[split] = array
        else:
            masks[split] = array[:] if array.in_memory else np.memmap(files[0][0], np.uint8, "r", shape=(length,))
    return meta, tokens, masks


def open_for_training(folder: str, train_fraction: float) -> tuple[dict, dict, dict]:
    """Return the result of open_data(), with the training set in place of a missing validation set."""
    meta, tokens, masks = open_data(folder, train_fraction)
    if not has_validation(meta):
        tokens["val"] = tokens["train"]
    return meta, tokens, masks


class TokenArray:
    """The first `length` entries of a 1-D array stored in consecutive files, [(path, number of entries), ...].

    len(tokens) and tokens[start:stop] work as for an array. Small files are read once and kept in memory. Large files
    are read on every access and use no memory, whereas the pages of a memory map accumulate (nanoGPT PR 428).
    """

    def __init__(self, files: list[tuple[str, int]], dtype: str, length: int):
        self.files, self.dtype, self.length = files, np.dtype(dtype), length
        self.in_memory = False
        if length * self.dtype.itemsize <= MAX_IN_MEMORY_BYTES:
            self._values, self.in_memory = self[:], True

    def __len__(self) -> int:
        return self.length

    def how_to_lengthen(self) -> str:
        """Return the remedy for too few entries: more text, or a larger share of the files."""
        is_share = self.length < sum(count for _, count in self.files)
        return "increase dataset_fraction, which limits the length of the text" if is_share else "use more text"

    def __getitem__(self, key: slice) -> np.ndarray:
        assert key.step in (None, 1)
        start, stop, _ = key.indices(self.length)
        if self.in_memory:
            return self._values[start:stop]
        values, n_read = np.empty(max(0, stop - start), self.dtype), 0
        for path, count in self.files:  # start is relative to this file
            if n := max(0, min(len(values) - n_read, count - start)):
                part = values[n_read : n_read + n]
                try:
                    with open(path, "rb", buffering=0) as file:
                        file.seek(start * self.dtype.itemsize)
                        n_bytes = file.readinto(part.data)
                except OSError as error:
                    remedy = "change its permissions, or copy it again"
                    raise UserError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
                if n_bytes < part.nbytes:
                    raise UserError(f"{path} was truncated while it was being read: prepare the data again")
                n_read += n
            start = max(0, start - count)
        return values

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Return the windows of the given length that begin at starts, as an array (len(starts), length)."""
        windows, values = np.empty((len(starts), length), dtype=self.dtype), self._values if self.in_memory else self
        for window, start in zip(windows, starts.tolist()):
            window[:] = values[start : start + length]
        return windows

    def chunks(self, size: int = CHUNK_TOKENS) -> Iterator[np.ndarray]:
        """Yield all entries in arrays of at most `size` entries."""
        for start in range(0, self.length, size):
            yield self[start : start + size]

    def counts(self, vocab_size: int) -> np.ndarray:
        """Return how often each id below vocab_size occurs, as an array (vocab_size,)."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for ids in self.chunks():
            counts = counts + np.bincount(ids, minlength=vocab_size)
        return counts
