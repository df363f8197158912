"""A tokenised corpus, read from train.bin, val.bin and meta.json in a data folder; preparing.py writes them.

train.bin and val.bin are raw little-endian uint16 ids, as nanoGPT reads them. meta.json beside them holds the
tokenizer, counts, bytes of source text and where the text came from. nanoGPT's meta.pkl is read too. Where a corpus
trains on part of its tokens only, train.mask.bin and val.mask.bin hold a byte per token: 1 where it is to be predicted.

    corpus = Corpus(folder)
    x, y = corpus.train_batch(first_window, batch_size, block_size, seed)      # (B, T) int64 each
    for x, y, n_tokens in corpus.eval_batches("val", batch_size, block_size): ...
"""
import json
import os
import pickle
import subprocess
import sys
from typing import BinaryIO, Iterator

import numpy as np
import torch

from dongpt.bins import SPLITS, settle
from dongpt.runtime import ROOT, Runtime
from dongpt.tokenizers import Tokenizer, from_dict

PREPARED_BY_TRAIN = ("chat_demo", "python_docs")  # data sets whose prepare.py needs no network
IN_MEMORY = 64 * 2 ** 20  # bytes; a larger file stays on disk and is mapped
SCANNED = 2 ** 26  # bytes of a file that are checked for ids beyond the vocabulary before training


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
            return meta
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise ValueError(f"{path} is damaged ({error}): prepare the data anew") from error
    path = os.path.join(folder, "meta.pkl")
    if not os.path.exists(path):
        return {}
    try:
        with open(path, "rb") as file:
            meta = _PlainUnpickler(file).load()
        characters = "".join(meta["itos"][i] for i in range(meta["vocab_size"]))
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(f"{path} is not a plain meta.pkl of nanoGPT ({error}): it was not run; "
                         f"prepare the data anew") from error
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
    corpus gets. Raises ValueError for missing, empty or damaged files.
    """

    def __init__(self, folder: str, train_fraction: float = 1.0):
        self.folder, self.meta = folder, read_meta(folder)
        self.name = os.path.relpath(folder, ROOT) if folder.startswith(ROOT + os.sep) else folder
        self.paths = {split: os.path.join(folder, f"{split}.bin") for split in SPLITS}
        self.lengths = {split: self._count(split) for split in SPLITS}
        if not 0 < train_fraction <= 1:
            raise ValueError(f"dataset_fraction={train_fraction} must be above 0 and at most 1")
        self.lengths["train"] = int(self.lengths["train"] * train_fraction)
        self.tokenizer_dict = self.meta.get("tokenizer", {"kind": "gpt2"})  # as nanoGPT assumes
        self.vocab_size = self.meta.get("vocab_size", 50257)
        self.sha256 = self.meta.get("ids_sha256")  # None where the bins are nanoGPT's
        padded = 50304 if self.tokenizer_dict["kind"] == "gpt2" else 0
        self.model_vocab_size = max(padded, self.vocab_size)
        self.masks = {split: path for split in SPLITS
                      if os.path.exists(path := os.path.join(folder, f"{split}.mask.bin"))}
        self._check_masks()
        self._in_memory: dict[str, np.ndarray] = {}
        self._files: dict[str, BinaryIO] = {}
        self._on_device: dict[str, torch.Tensor] = {}  # see keep_on
        self._epoch: tuple | None = None
        self._epoch_windows: dict[int, int] = {}

    def _count(self, split: str) -> int:
        """How many tokens the split has, by the size of its file, checked against meta.json."""
        path = self.paths[split]
        remedy = _how_to_prepare(self.folder)
        if not os.path.exists(path):
            raise ValueError(f"{self.name} has no {split}.bin: {remedy}")
        size = os.path.getsize(path)
        if size == 0 or size % 2:
            raise ValueError(f"{path} is {'empty' if size == 0 else 'damaged'}: {remedy}")
        if size // 2 != self.meta.get("tokens", {}).get(split, size // 2):
            raise ValueError(f"{path} holds {size // 2:,} tokens where meta.json says "
                             f"{self.meta['tokens'][split]:,}: {remedy}")
        return size // 2

    def _check_masks(self):
        if missing := sorted(set(self.meta.get("predicted_bytes", {})) - set(self.masks)):
            raise ValueError(f"{self.name} has no {missing[0]}.mask.bin, and meta.json says that it was prepared with "
                             f"one: {_how_to_prepare(self.folder)}")
        for split, path in self.masks.items():
            size, count = os.path.getsize(path), os.path.getsize(self.paths[split]) // 2
            if size != count:
                raise ValueError(f"{path} holds {size:,} bytes where {split}.bin has {count:,} tokens: "
                                 f"{_how_to_prepare(self.folder)}")

    def tokenizer(self) -> Tokenizer:
        return from_dict(self.tokenizer_dict)

    def tokens(self, split: str) -> np.ndarray:
        """The ids of a split, (lengths[split],) uint16."""
        return self._read(split, self.paths[split], "<u2", self.lengths[split])

    def mask(self, split: str) -> np.ndarray | None:
        """Which tokens of a split are to be predicted, (lengths[split],) uint8; None if all are."""
        if split not in self.masks:
            return None
        return self._read(f"{split} mask", self.masks[split], "u1", self.lengths[split])

    def _read(self, name: str, path: str, kind: str, count: int) -> np.ndarray:
        """The first count numbers of a file: in memory if small, else mapped anew at each call."""
        if name in self._in_memory:
            return self._in_memory[name]
        if count * np.dtype(kind).itemsize > IN_MEMORY:  # a map kept for long fills the memory: nanoGPT PR 428
            return np.memmap(path, dtype=kind, mode="r", shape=(count,))
        self._in_memory[name] = np.fromfile(path, dtype=kind, count=count)
        return self._in_memory[name]

    def _windows(self, of: str, starts: np.ndarray, length: int) -> np.ndarray:
        """Windows of train's tokens or mask, (len(starts), length)."""
        path, kind = (self.paths["train"], "<u2") if of == "tokens" else (self.masks["train"], "u1")
        if self.lengths["train"] * np.dtype(kind).itemsize <= IN_MEMORY:
            numbers = self.tokens("train") if of == "tokens" else self.mask("train")
            return numbers[starts[:, None] + np.arange(length)]
        if of not in self._files:  # reading costs less than mapping, and no memory
            self._files[of] = open(path, "rb", buffering=0)
        windows = np.empty((len(starts), length), dtype=kind)
        for window, start in zip(windows, starts):
            self._files[of].seek(int(start) * windows.itemsize)
            self._files[of].readinto(window)
        return windows

    def check(self, block_size: int, vocab_size: int):
        """Raise ValueError if the corpus is too short to train on or holds ids that a model has no embedding for."""
        if self.lengths["train"] < 2:
            self.check_split("train", vocab_size)
        if self.lengths["train"] < block_size + 1:
            raise ValueError(f"{self.paths['train']} gives {self.lengths['train']:,} tokens, too few for "
                             f"block_size={block_size}: use more text, or a block_size below {self.lengths['train']}")
        for split in SPLITS:
            self.check_split(split, vocab_size)

    def check_split(self, split: str, vocab_size: int):
        """Raise ValueError if a split is too short for a loss or holds ids that a model has no embedding for."""
        if self.lengths[split] < 2:
            raise ValueError(f"{self.paths[split]} has {self.lengths[split]} token: a loss needs at least 2, "
                             f"use more text")
        if (mask := self.mask(split)) is not None and not mask[1:].any():
            raise ValueError(f"{self.masks[split]} masks everything: nothing is left to predict, "
                             f"{_how_to_prepare(self.folder)}")
        tokens = self.tokens(split)
        step = -(-tokens.nbytes // SCANNED)  # whole up to SCANNED bytes, beyond that evenly spaced
        self._check_ids(tokens[::step], vocab_size, split)

    def _check_ids(self, ids: np.ndarray, vocab_size: int, split: str):
        if ids.max() >= vocab_size:
            raise ValueError(f"{self.paths[split]} holds the id {ids.max()}, and the vocabulary has {vocab_size} "
                             f"entries: the bins were made with another tokenizer; {_how_to_prepare(self.folder)}")

    # ------------------------------------------------------------------------------------------------------------------
    # training: shuffled windows without replacement

    def _fit(self, block_size: int) -> int:
        return max(1, (self.lengths["train"] - block_size) // block_size)

    def epoch_windows(self, block_size: int) -> int:
        """Windows of block_size tokens in one epoch; one fewer than fit where it takes that to vary the offset.

        Of a masked corpus those count in which something is to be predicted, as they lie without an offset.
        """
        if block_size not in self._epoch_windows:
            self._epoch_windows[block_size] = len(self._windows_from(0, block_size))
        return self._epoch_windows[block_size]

    def _windows_from(self, offset: int, block_size: int) -> np.ndarray:
        """Where the disjoint windows from offset on begin, without those in which the mask leaves nothing to predict
        (unless that is all of them)."""
        starts = offset + block_size * np.arange(self._fit(block_size))
        if (mask := self.mask("train")) is None:
            return starts
        wanted = np.maximum.reduceat(mask[:starts[-1] + block_size + 1], starts + 1) > 0
        return starts[wanted] if wanted.any() else starts

    def window_starts(self, first: int, count: int, block_size: int, seed: int) -> np.ndarray:
        """Where windows first ... first + count - 1 of the run begin in train, (count,) int64.

        Each epoch visits its disjoint windows once, in an order and from an offset that depend on (seed, epoch) alone.
        How many of a masked corpus's windows have something to predict depends on the offset: an epoch with fewer than
        epoch_windows begins anew, one with more leaves some out.
        """
        per_epoch = self.epoch_windows(block_size)
        number = np.arange(first, first + count)
        starts = np.empty(count, dtype=np.int64)
        for epoch in np.unique(number // per_epoch):
            if self._epoch is None or self._epoch[0] != (int(epoch), block_size, seed):
                random = np.random.Generator(np.random.Philox(key=seed % 2 ** 64 + (int(epoch) << 64)))
                offset = random.integers(0, self.lengths["train"] - self._fit(block_size) * block_size)
                windows = self._windows_from(offset, block_size)
                self._epoch = (int(epoch), block_size, seed), windows[random.permutation(len(windows))]
            _, order = self._epoch
            here = number // per_epoch == epoch
            starts[here] = order[number[here] % per_epoch % len(order)]
        return starts

    def train_batch(self, first: int, batch_size: int, block_size: int, seed: int, vocab_size: int):
        """(x, y): windows first ... of the run and the same one token later, (B, T) int64 each; -1 in y is masked."""
        starts = self.window_starts(first, batch_size, block_size, seed)
        if self._on_device:
            return self._batch_there(starts, block_size)
        windows = self._windows("tokens", starts, block_size + 1)  # (B, T + 1)
        self._check_ids(windows, vocab_size, "train")  # on a GPU a wrong id ends in an error that says nothing
        windows = windows.astype(np.int64)
        x, y = windows[:, :-1].copy(), windows[:, 1:].copy()
        if "train" in self.masks:
            y[self._windows("mask", starts + 1, block_size) == 0] = -1
            if (y < 0).all():  # a mean over nothing is no number; this batch's share is 0
                y[0, 0] = x[0, 0]
        return torch.from_numpy(x), torch.from_numpy(y)

    def keep_on(self, runtime: Runtime, vocab_size: int):
        """Keep train on the device from now on, and cut batches there: a GPU then waits for no copy but that of where
        windows begin. Raises ValueError for ids of vocab_size and above."""
        self._check_ids(self.tokens("train"), vocab_size, "train")
        arrays = {"tokens": self.tokens("train").view("<i2")}  # torch has few operations for uint16
        if "train" in self.masks:
            arrays["mask"] = self.mask("train")
        self._move = runtime.move
        self._on_device = {name: torch.from_numpy(np.array(array)).to(runtime.device)
                           for name, array in arrays.items()}

    def _batch_there(self, starts: np.ndarray, block_size: int):
        """train_batch on the device, of windows that begin at starts."""
        starts, = self._move(torch.from_numpy(starts))
        at = starts[:, None] + torch.arange(block_size + 1, device=starts.device)
        windows = self._on_device["tokens"][at].long() & 0xffff
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
        counts = (self._windows("mask", starts + 1, block_size) != 0).reshape(n_batches, -1).sum(1)
        return counts * n_batches / max(counts.sum(), 1)

    # ------------------------------------------------------------------------------------------------------------------
    # evaluation: disjoint windows, each token but the first predicted once

    def eval_batches(self, split: str, batch_size: int, block_size: int, n_windows: int | None = None,
                     rank: int = 0, world_size: int = 1) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        """Yield (x, y, number of predicted tokens) over a split, x and y (B, T) int64; padding and what is masked are
        -1 in y.

        n_windows of the disjoint windows, evenly spaced and the same each time; all of them by default. Every batch
        has the same shape. Of several processes each takes every world_size-th batch.
        """
        tokens, mask = self.tokens(split), self.mask(split)
        chosen = np.arange(-(-(self.lengths[split] - 1) // block_size))
        if mask is not None:  # those in which something is to be predicted
            chosen = np.flatnonzero(np.add.reduceat(mask[1:] != 0, chosen * block_size, dtype=np.int64))
        if n_windows is not None and n_windows < len(chosen):
            chosen = chosen[np.arange(n_windows) * len(chosen) // n_windows]
        for first in range(rank * batch_size, len(chosen), world_size * batch_size):
            x = np.zeros((batch_size, block_size), dtype=np.int64)
            y = np.full((batch_size, block_size), -1, dtype=np.int64)
            for row, window in enumerate(chosen[first:first + batch_size]):
                ids = tokens[window * block_size:(window + 1) * block_size + 1]
                x[row, :len(ids) - 1], y[row, :len(ids) - 1] = ids[:-1], ids[1:]
                if mask is not None:
                    wanted = mask[window * block_size + 1:window * block_size + len(ids)]
                    y[row, :len(wanted)][wanted == 0] = -1
            yield torch.from_numpy(x), torch.from_numpy(y), int((y >= 0).sum())

    def predicted_bytes(self, split: str) -> int:
        """UTF-8 bytes of source text of all tokens of a split that are predicted: all but the first, or the masked."""
        lengths = self.tokenizer().byte_lengths()
        if (mask := self.mask(split)) is not None:
            known = self.meta.get("predicted_bytes", {}).get(split)
            if known is not None and self.lengths[split] == self.meta["tokens"][split] and not mask[0]:
                return known
            ids = self.tokens(split)[1:][mask[1:] != 0]
            return int((np.bincount(ids, minlength=len(lengths))[:len(lengths)] * lengths).sum())
        if split in self.meta.get("bytes", {}) and self.lengths[split] == self.meta["tokens"][split]:
            return self.meta["bytes"][split] - int(lengths[self.tokens(split)[0]])
        counts = np.bincount(self.tokens(split)[1:], minlength=len(lengths))
        return int((counts[:len(lengths)] * lengths).sum())  # ids of a padded vocabulary stand for no text


def _how_to_prepare(folder: str) -> str:
    """What to type so that folder holds a corpus."""
    script = os.path.join(folder, "prepare.py")
    if os.path.exists(script):
        return f"run python {os.path.relpath(script)} first"
    shelf = os.path.join(ROOT, "data")
    known = sorted(name for name in os.listdir(shelf) if os.path.exists(os.path.join(shelf, name, "prepare.py")))
    return (f"write it with python data/prepare.py --input=YOUR_TEXT --name=NAME, or with one of the prepare.py under "
            f"data/ (there are {', '.join(known)})")
