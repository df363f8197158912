"""A tokenised corpus, read from train.bin, val.bin and meta.json in a data folder; preparing.py writes them.

train.bin and val.bin are raw little-endian uint16 ids, as nanoGPT reads them; a large corpus has train_000.bin,
train_001.bin, ... instead, which are one text. meta.json beside them holds the tokenizer, counts, bytes of source text
and where the text came from. nanoGPT's meta.pkl is read too. Where a corpus trains on part of its tokens only,
train.mask.bin and val.mask.bin hold a byte per token: 1 where it is to be predicted. docs/data.md has a picture.

    corpus = Corpus(folder)
    x, y = corpus.train_batch(first_window, batch_size, block_size, seed)      # (B, T) int64 each
    for x, y, n_tokens in corpus.eval_batches("val", batch_size, block_size): ...
"""

import json
import os
import pickle
import subprocess
import sys
from typing import Callable, Iterator

import numpy as np
import torch

from configurator import UserError
from dongpt.runtime import ROOT, Runtime
from dongpt.text.bins import SPLITS, settle
from dongpt.text.shards import Numbers, check_ends, find_shards
from dongpt.text.tokenizers import Tokenizer, from_dict
from dongpt.train.order import Scattered

PREPARED_BY_TRAIN = ("chat_demo", "python_docs")  # data sets whose prepare.py needs no network
SCANNED = 2**25  # ids that are compared with the vocabulary before training, evenly spaced over a longer text
AHEAD = 1024  # windows that the system is asked to read at a time
LISTED = 2**20  # windows of an epoch whose order is a list in memory; that of more is computed


class _PlainUnpickler(pickle.Unpickler):
    """Reads pickles of dict, list, str, int and the like; whatever would run code is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_meta(folder: str) -> dict:
    """What is known of the corpus in folder: meta.json, else nanoGPT's meta.pkl, else {}."""
    settle(folder)
    path = os.path.join(folder, "meta.json")
    if os.path.exists(path):
        try:
            with open(path, encoding="utf-8") as file:
                meta = json.load(file)
            assert isinstance(meta["tokenizer"]["kind"], str) and isinstance(meta["vocab_size"], int)
            assert all(isinstance(meta[key][split], int) for key in ("tokens", "bytes") for split in meta.get(key, ()))
            for shard in meta.get("shards", {}).get("train", ()):
                assert shard["file"] == os.path.basename(shard["file"]) and isinstance(shard["tokens"], int)
                assert isinstance(shard["ends_sha256"], str) and isinstance(shard["sha256"], str)
            return meta
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            raise UserError(f"{path} is damaged ({error}): prepare the data anew") from error
    path = os.path.join(folder, "meta.pkl")
    if not os.path.exists(path):
        return {}
    try:
        with open(path, "rb") as file:
            meta = _PlainUnpickler(file).load()
        characters = "".join(meta["itos"][i] for i in range(meta["vocab_size"]))
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(
            f"{path} is not a plain meta.pkl of nanoGPT ({error}): it was not run; prepare the data anew"
        ) from error
    return {"tokenizer": {"kind": "char", "characters": characters}, "vocab_size": meta["vocab_size"]}


def find_folder(dataset: str, data_dir: str) -> str:
    """The data folder that the settings mean: data_dir, relative to the working directory, else data/<dataset>."""
    return os.path.abspath(data_dir) if data_dir else os.path.join(ROOT, "data", dataset)


def prepare_if_missing(folder: str, runtime: Runtime, out=None):
    """Run the folder's prepare.py when its bins are missing and it needs no network; the other processes wait.

    What it prints goes to out, stdout by default.
    """
    name = os.path.basename(folder)
    if name in PREPARED_BY_TRAIN and folder == os.path.join(ROOT, "data", name):
        if runtime.is_main and not all(os.path.exists(os.path.join(folder, f"{split}.bin")) for split in SPLITS):
            script = os.path.join(folder, "prepare.py")
            print(f"data/{name} is not prepared yet: running python data/{name}/prepare.py", file=out, flush=True)
            done = subprocess.run([sys.executable, script], stdout=out)
            if done.returncode in (130, -2):  # Ctrl-C reached both; of other failures opening the corpus says more
                raise KeyboardInterrupt
        runtime.barrier()


class Corpus:
    """Train and val of one data folder.

    tokenizer_dict describes the tokenizer, vocab_size counts its ids, model_vocab_size is what a model made for this
    corpus gets. Raises UserError for missing, empty or damaged files.
    """

    def __init__(self, folder: str, train_fraction: float = 1.0):
        self.folder, self.meta = folder, read_meta(folder)
        self.name = os.path.relpath(folder, ROOT) if folder.startswith(ROOT + os.sep) else folder
        self.paths = {split: os.path.join(folder, f"{split}.bin") for split in SPLITS}
        self.shards = self.meta.get("shards", {}).get("train", [])  # what meta.json says of each
        files = {split: self._files(split) for split in SPLITS}
        counts = {split: sum(count for _, count in files[split]) for split in SPLITS}
        if not 0 < train_fraction <= 1:
            raise UserError(f"dataset_fraction={train_fraction} must be above 0 and at most 1")
        self.lengths = {**counts, "train": int(counts["train"] * train_fraction)}
        self._tokens = {split: Numbers(files[split], "<u2", self.lengths[split]) for split in SPLITS}
        self.tokenizer_dict = self.meta.get("tokenizer", {"kind": "gpt2"})  # as nanoGPT assumes
        self.vocab_size = self.meta.get("vocab_size", 50257)
        self.sha256 = self.meta.get("ids_sha256")  # None where the bins are nanoGPT's
        padded = 50304 if self.tokenizer_dict["kind"] == "gpt2" else 0
        self.model_vocab_size = max(padded, self.vocab_size)
        self.masks = {
            split: path for split in SPLITS if os.path.exists(path := os.path.join(folder, f"{split}.mask.bin"))
        }
        self._check_masks(counts)
        self._mask_numbers = {
            split: Numbers([(path, counts[split])], "u1", self.lengths[split]) for split, path in self.masks.items()
        }
        self._on_device: dict[str, torch.Tensor] = {}  # see keep_on
        self._epoch: tuple | None = None
        self._epoch_windows: dict[int, int] = {}
        self._ahead = 0, 0  # the numbers of the windows that the system was asked to read

    def _files(self, split: str) -> list[tuple[str, int]]:
        """The paths of a split's files and how many tokens each has, by its size, checked against meta.json."""
        described = {shard["file"]: shard["tokens"] for shard in self.shards} if split == "train" else {}
        names = [*described]
        if not described and not os.path.exists(self.paths[split]) and split == "train":
            names = find_shards(self.folder, split)  # of somebody who wrote no meta.json
        files = [
            (path, self._count(path, described.get(os.path.basename(path))))
            for path in ([os.path.join(self.folder, name) for name in names] or [self.paths[split]])
        ]
        counted, told = sum(count for _, count in files), self.meta.get("tokens", {}).get(split)
        if counted != (told or counted):
            raise UserError(
                f"{files[0][0] if len(files) == 1 else self.name} holds {counted:,} tokens where "
                f"meta.json says {told:,}: {_how_to_prepare(self.folder)}"
            )
        return files

    def _count(self, path: str, told: int | None) -> int:
        """How many tokens a file holds. Raises UserError if it is missing or not as long as told."""
        name = os.path.basename(path)
        remedy = "copy it there again, or prepare the data anew" if told else _how_to_prepare(self.folder)
        if not os.path.isfile(path):
            raise UserError(f"{self.name} has no {name}: {remedy}")
        size = os.path.getsize(path)
        if told and size != 2 * told:
            raise UserError(f"{path} has {size:,} bytes where meta.json says {2 * told:,}: {remedy}")
        if size == 0 or size % 2:
            raise UserError(f"{path} is {'empty' if size == 0 else 'damaged'}: {remedy}")
        return size // 2

    def _check_masks(self, counts: dict[str, int]):
        if missing := sorted(set(self.meta.get("predicted_bytes", {})) - set(self.masks)):
            raise UserError(
                f"{self.name} has no {missing[0]}.mask.bin, and meta.json says that it was prepared with "
                f"one: {_how_to_prepare(self.folder)}"
            )
        for split, path in self.masks.items():
            size, count = os.path.getsize(path), counts[split]
            if size != count:
                raise UserError(
                    f"{path} holds {size:,} bytes where {split}.bin has {count:,} tokens: "
                    f"{_how_to_prepare(self.folder)}"
                )

    def tokenizer(self) -> Tokenizer:
        return from_dict(self.tokenizer_dict)

    def tokens(self, split: str) -> np.ndarray | Numbers:
        """The ids of a split, (lengths[split],) uint16; of a large corpus in shards what can be cut like them."""
        return self._tokens[split].array() if self._tokens[split].is_array else self._tokens[split]

    def mask(self, split: str) -> np.ndarray | None:
        """Which tokens of a split are to be predicted, (lengths[split],) uint8; None if all are."""
        return self._mask_numbers[split].array() if split in self.masks else None

    def check(self, block_size: int, vocab_size: int):
        """Raise UserError if the corpus is too short to train on, holds ids that a model has no embedding for, or
        has shards whose ends are not what meta.json says."""
        if self.lengths["train"] < 2:
            self.check_split("train", vocab_size)
        if self.lengths["train"] < block_size + 1:
            raise UserError(
                f"{self._tokens['train'].paths[0]} gives {self.lengths['train']:,} tokens, too few for "
                f"block_size={block_size}: use more text, or a block_size below {self.lengths['train']}"
            )
        for split in SPLITS:
            self.check_split(split, vocab_size)

    def check_split(self, split: str, vocab_size: int):
        """Raise UserError if a split is too short for a loss or holds ids that a model has no embedding for."""
        if self.lengths[split] < 2:
            raise UserError(
                f"{self.paths[split]} has {self.lengths[split]} token: a loss needs at least 2, use more text"
            )
        if split == "train":
            check_ends(self.folder, self.shards)
        if (mask := self.mask(split)) is not None and not mask[1:].any():
            raise UserError(
                f"{self.masks[split]} masks everything: nothing is left to predict, {_how_to_prepare(self.folder)}"
            )
        for ids in self._tokens[split].spread(SCANNED):
            self._check_ids(ids, vocab_size, split)

    def check_every_id(self, split: str, vocab_size: int):
        """Raise UserError if a split holds an id that a model has no embedding for."""
        for ids in self.pieces(split):
            self._check_ids(ids, vocab_size, split)

    def pieces(self, split: str) -> Iterator[np.ndarray]:
        """The ids of a split, some megabytes at a time."""
        return self._tokens[split].pieces()

    def _check_ids(self, ids: np.ndarray, vocab_size: int, split: str):
        if ids.max() >= vocab_size:
            where = self.paths[split] if len(self._tokens[split].paths) == 1 else f"the {split} split of {self.name}"
            raise UserError(
                f"{where} holds the id {ids.max()}, and the vocabulary has {vocab_size} "
                f"entries: the bins were made with another tokenizer; {_how_to_prepare(self.folder)}"
            )

    # ------------------------------------------------------------------------------------------------------------------
    # training: shuffled windows without replacement

    def _fit(self, block_size: int) -> int:
        return max(1, (self.lengths["train"] - block_size) // block_size)

    def epoch_windows(self, block_size: int) -> int:
        """Windows of block_size tokens in one epoch; one fewer than fit where it takes that to vary the offset.

        Of a masked corpus those count in which something is to be predicted, as they lie without an offset.
        """
        if "train" not in self.masks:
            return self._fit(block_size)
        if block_size not in self._epoch_windows:
            self._epoch_windows[block_size] = len(self._windows_from(0, block_size))
        return self._epoch_windows[block_size]

    def _windows_from(self, offset: int, block_size: int) -> np.ndarray:
        """Where a masked corpus's disjoint windows from offset on begin, without those in which nothing is to be
        predicted (unless that is all of them)."""
        starts, mask = offset + block_size * np.arange(self._fit(block_size)), self.mask("train")
        wanted = np.maximum.reduceat(mask[: starts[-1] + block_size + 1], starts + 1) > 0
        return starts[wanted] if wanted.any() else starts

    def window_starts(self, first: int, count: int, block_size: int, seed: int) -> np.ndarray:
        """Where windows first ... first + count - 1 of the run begin in train, (count,) int64.

        Each epoch visits its disjoint windows once, in an order and from an offset that depend on (seed, epoch) alone,
        so that any step of any process finds its windows without those before them.
        How many of a masked corpus's windows have something to predict depends on the offset: an epoch with fewer than
        epoch_windows begins anew, one with more leaves some out.
        """
        per_epoch = self.epoch_windows(block_size)
        number = np.arange(first, first + count)
        starts = np.empty(count, dtype=np.int64)
        for epoch in np.unique(number // per_epoch):
            if self._epoch is None or self._epoch[0] != (int(epoch), block_size, seed):
                random = np.random.Generator(np.random.Philox(key=seed % 2**64 + (int(epoch) << 64)))
                self._epoch = (int(epoch), block_size, seed), self._order(random, block_size)
            here = number // per_epoch == epoch
            starts[here] = self._epoch[1](number[here] % per_epoch)
        return starts

    def _order(self, random: np.random.Generator, block_size: int) -> Callable[[np.ndarray], np.ndarray]:
        """A function that gives to each number in an epoch where its window begins."""
        fit = self._fit(block_size)
        offset = random.integers(0, self.lengths["train"] - fit * block_size)
        if "train" in self.masks:
            windows = self._windows_from(offset, block_size)
            order = windows[random.permutation(len(windows))]
            return lambda number: order[number % len(order)]
        order = random.permutation(fit) if fit <= LISTED else Scattered(fit, random)
        return lambda number: offset + block_size * order[number]

    def train_batch(self, first: int, batch_size: int, block_size: int, seed: int, vocab_size: int):
        """(x, y): windows first ... of the run and the same one token later, (B, T) int64 each; -1 in y is masked."""
        if not self._on_device and not self._tokens["train"].in_memory:
            self._read_ahead(first, batch_size, block_size, seed)
        starts = self.window_starts(first, batch_size, block_size, seed)
        if self._on_device:
            return self._batch_there(starts, block_size)
        windows = self._tokens["train"].windows(starts, block_size + 1)  # (B, T + 1)
        self._check_ids(windows, vocab_size, "train")  # on a GPU a wrong id ends in an error that says nothing
        windows = windows.astype(np.int64)
        x, y = windows[:, :-1].copy(), windows[:, 1:].copy()
        if "train" in self.masks:
            y[self._mask_numbers["train"].windows(starts + 1, block_size) == 0] = -1
            if (y < 0).all():  # a mean over nothing is no number; this batch's share is 0
                y[0, 0] = x[0, 0]
        return torch.from_numpy(x), torch.from_numpy(y)

    def _read_ahead(self, first: int, batch_size: int, block_size: int, seed: int):
        """Have the system read windows from number first on, many at once, unless it was asked to already: one after
        the other each would wait for the disk."""
        if self._ahead[0] <= first and first + batch_size <= self._ahead[1]:
            return
        n = max(AHEAD, batch_size)
        self._tokens["train"].prefetch(self.window_starts(first, n, block_size, seed), block_size + 1)
        self._ahead = first, first + n

    def keep_on(self, runtime: Runtime, vocab_size: int):
        """Keep train on the device from now on, and cut batches there: a GPU then waits for no copy but that of where
        windows begin. Raises UserError for ids of vocab_size and above."""
        numbers = {"tokens": self._tokens["train"]}
        if "train" in self.masks:
            numbers["mask"] = self._mask_numbers["train"]
        self._move = runtime.move
        for name, source in numbers.items():
            # torch has few operations for uint16
            there = torch.empty(
                len(source), dtype=torch.int16 if name == "tokens" else torch.uint8, device=runtime.device
            )
            place = 0
            for piece in source.pieces():
                if name == "tokens":
                    self._check_ids(piece, vocab_size, "train")
                piece = np.array(piece).view("<i2" if name == "tokens" else "u1")
                there[place : place + len(piece)] = torch.from_numpy(piece)
                place += len(piece)
            self._on_device[name] = there

    def _batch_there(self, starts: np.ndarray, block_size: int):
        """train_batch on the device, of windows that begin at starts."""
        (starts,) = self._move(torch.from_numpy(starts))
        at = starts[:, None] + torch.arange(block_size + 1, device=starts.device)
        windows = self._on_device["tokens"][at].long() & 0xFFFF
        x, y = (part.clone(memory_format=torch.contiguous_format) for part in (windows[:, :-1], windows[:, 1:]))
        if "mask" in self._on_device:
            y.masked_fill_(self._on_device["mask"][at[:, 1:]] == 0, -1)
            y[0, 0] = torch.where((y < 0).all(), x[0, 0], y[0, 0])
        return x, y

    def shares(self, first: int, n_batches: int, batch_size: int, block_size: int, seed: int) -> np.ndarray:
        """The weights of n_batches batches' mean losses, (n_batches,), 1 on average: every predicted token counts the
        same, however the mask spreads them."""
        if "train" not in self.masks:
            return np.ones(n_batches)
        starts = self.window_starts(first, n_batches * batch_size, block_size, seed)
        counts = (self._mask_numbers["train"].windows(starts + 1, block_size) != 0).reshape(n_batches, -1).sum(1)
        return counts * n_batches / max(counts.sum(), 1)

    # ------------------------------------------------------------------------------------------------------------------
    # evaluation: disjoint windows, each token but the first predicted once

    def eval_batches(
        self,
        split: str,
        batch_size: int,
        block_size: int,
        n_windows: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        """Yield (x, y, number of predicted tokens) over a split, x and y (B, T) int64; padding and what is masked are
        -1 in y.

        n_windows of the disjoint windows, evenly spaced and the same each time; all of them by default. Every batch
        has the same shape. Of several processes each takes every world_size-th batch; all get the same number, so the
        last ones may be all padding.
        """
        tokens, mask = self.tokens(split), self.mask(split)
        all_windows = range(-(-(self.lengths[split] - 1) // block_size))
        if mask is not None:  # those in which something is to be predicted
            begins = block_size * np.arange(len(all_windows))
            all_windows = np.flatnonzero(np.add.reduceat(mask[1:] != 0, begins, dtype=np.int64)).tolist()
        n = min(len(all_windows), len(all_windows) if n_windows is None else n_windows)
        for first in range(rank * batch_size, n + rank * batch_size, world_size * batch_size):  # as many on every rank
            x = np.zeros((batch_size, block_size), dtype=np.int64)
            y = np.full((batch_size, block_size), -1, dtype=np.int64)
            for row, i in enumerate(range(first, min(first + batch_size, n))):
                window = all_windows[i * len(all_windows) // n]
                ids = tokens[window * block_size : (window + 1) * block_size + 1]
                x[row, : len(ids) - 1], y[row, : len(ids) - 1] = ids[:-1], ids[1:]
                if mask is not None:
                    wanted = mask[window * block_size + 1 : window * block_size + len(ids)]
                    y[row, : len(wanted)][wanted == 0] = -1
            yield torch.from_numpy(x), torch.from_numpy(y), int((y >= 0).sum())

    def predicted_bytes(self, split: str) -> int:
        """UTF-8 bytes of source text of all tokens of a split that are predicted: all but the first, or the masked."""
        lengths = self.tokenizer().byte_lengths()
        if (mask := self.mask(split)) is not None:
            known = self.meta.get("predicted_bytes", {}).get(split)
            if known is not None and self.lengths[split] == self.meta["tokens"][split] and not mask[0]:
                return known
            ids = self.tokens(split)[1:][mask[1:] != 0]
            return int((np.bincount(ids, minlength=len(lengths))[: len(lengths)] * lengths).sum())
        if split in self.meta.get("bytes", {}) and self.lengths[split] == self.meta["tokens"][split]:
            return self.meta["bytes"][split] - int(lengths[self.tokens(split)[:1]].sum())
        counts = sum(np.bincount(ids, minlength=2**16) for ids in self.pieces(split))
        counts[self.tokens(split)[:1]] -= 1
        return int((counts[: len(lengths)] * lengths).sum())  # ids of a padded vocabulary stand for no text


def _how_to_prepare(folder: str) -> str:
    """What to type so that folder holds a corpus."""
    script = os.path.join(folder, "prepare.py")
    if os.path.exists(script):
        return f"run python {os.path.relpath(script)} first"
    shelf = os.path.join(ROOT, "data")
    known = sorted(name for name in os.listdir(shelf) if os.path.exists(os.path.join(shelf, name, "prepare.py")))
    return (
        f"write it with python data/prepare.py --input=YOUR_TEXT --name=NAME, or with one of the prepare.py under "
        f"data/ (there are {', '.join(known)})"
    )
