"""Training batches: shuffled windows of tokens from a data folder. For evaluation batches, see evaluation.py.

For an illustration, see docs/data.md. For the file format, see dongpt/text/bins.py.

    corpus = Corpus(folder)
    x, y = corpus.train_batch(first_window, batch_size, block_size, seed, vocab_size)      # (B, T) int64 each
"""

import os
from typing import Iterable

import numpy as np
import torch

from configurator import UserError
from dongpt.program import ROOT
from dongpt.runtime import Runtime
from dongpt.text.bins import SPLITS, check_shard_ends, how_to_prepare, open_for_training
from dongpt.text.tokenizers import Tokenizer, from_dict

MAX_CHECKED_TOKENS = 2**25  # maximum number of tokens to check before training, spread evenly over the data


class Corpus:
    """The training and validation sets of one data folder.

    `tokenizer_dict` describes the tokenizer, and `vocab_size` is its vocabulary size. New models for this corpus have
    vocabularies of size `model_vocab_size`. Raises UserError if files are missing, empty or damaged.
    """

    def __init__(self, folder: str, train_fraction: float = 1.0):
        # Each split has uint16 tokens of shape (lengths[split],). If the loss leaves out some of them, there is also a
        # uint8 mask of the same shape, which is nonzero for tokens in the loss.
        self.meta, self.tokens, self.masks = open_for_training(folder, train_fraction)
        self.folder = folder
        self.name = os.path.relpath(folder, ROOT) if folder.startswith(ROOT + os.sep) else folder
        self.shards = self.meta.get("shards", {}).get("train", [])  # metadata of the training shards
        self.tokenizer_dict = self.meta.get("tokenizer", {"kind": "gpt2"})  # nanoGPT's default
        self.vocab_size = self.meta.get("vocab_size", 50257)
        self.model_vocab_size = max(50304 if self.tokenizer_dict["kind"] == "gpt2" else 0, self.vocab_size)
        self.sha256 = self.meta.get("ids_sha256")  # None for files made by nanoGPT
        self.lengths = {split: self.tokens[split].length for split in SPLITS}
        self._device_tensors: dict[str, torch.Tensor] = {}  # see to_device
        self._epoch_starts: tuple[tuple[int, int, int], np.ndarray] | None = None  # (epoch, block_size, seed), starts
        self._window_counts: dict[int, int] = {}

    def tokenizer(self) -> Tokenizer:
        return from_dict(self.tokenizer_dict)

    def check(self, block_size: int, vocab_size: int, splits: Iterable[str] = SPLITS):
        """Raise UserError if a split is too short, has ids outside the model's vocabulary or has no unmasked tokens,
        or if the ends of its shards do not match meta.json."""
        for split in splits:
            length = self.lengths[split]
            if length < 2:
                message = f"{os.path.join(self.folder, split)}.bin has {length} token, but at least 2 are required"
                raise UserError(f"{message}: {self.tokens[split].how_to_lengthen()}")
            if split == "train" and length <= block_size:
                message = f"{self.tokens[split].files[0][0]} provides {length:,} tokens, too few for {block_size=}"
                raise UserError(f"{message}: {self.tokens[split].how_to_lengthen()}, or set block_size below {length}")
            if split == "train" and self.shards:
                check_shard_ends(self.folder, self.shards)
            if split in self.masks and not self.masks[split][1:].any():
                message = f"{os.path.join(self.folder, split)}.mask.bin masks all tokens, so nothing can be predicted"
                raise UserError(f"{message}: {how_to_prepare(self.folder)}")
            n_checked = min(MAX_CHECKED_TOKENS, length)
            span_len = -(-n_checked // 128)
            starts = np.linspace(0, length - span_len, -(-n_checked // span_len), dtype=np.int64)
            self._check_ids(self.tokens[split].windows(starts, span_len), vocab_size, split)

    def check_every_id(self, split: str, vocab_size: int):
        """Raise UserError if any id in a split is outside the model's vocabulary."""
        for ids in self.tokens[split].chunks():
            self._check_ids(ids, vocab_size, split)

    def _check_ids(self, ids: np.ndarray, vocab_size: int, split: str):
        if ids.max() >= vocab_size:
            files = self.tokens[split].files
            location = files[0][0] if len(files) == 1 else f"the {split} split of {self.name}"
            message = f"{location} contains the id {ids.max()}, but the vocabulary has {vocab_size} entries"
            raise UserError(f"{message}: the data was prepared with another tokenizer; {how_to_prepare(self.folder)}")

    # ------------------------------------------------------------------------------------------------------------------
    # training: shuffled windows without replacement

    def _num_windows(self, block_size: int) -> int:
        """Return the number of windows per epoch: one fewer than would fit, so that the offset can vary."""
        return max(1, self.lengths["train"] // block_size - 1)

    def windows_per_epoch(self, block_size: int) -> int:
        """Return the number of windows per epoch. In a masked corpus, fully masked windows are not counted."""
        if "train" not in self.masks:
            return self._num_windows(block_size)
        if block_size not in self._window_counts:
            self._window_counts[block_size] = len(self._unmasked_starts(0, block_size))  # at offset 0
        return self._window_counts[block_size]

    def _unmasked_starts(self, offset: int, block_size: int) -> np.ndarray:
        """Return the starts of windows that contain unmasked tokens, or of all windows if every token is masked."""
        starts = offset + block_size * np.arange(self._num_windows(block_size))
        in_loss = np.maximum.reduceat(self.masks["train"][: starts[-1] + block_size + 1], starts + 1) > 0
        return starts[in_loss] if in_loss.any() else starts

    def window_starts(self, first_window: int, count: int, block_size: int, seed: int) -> np.ndarray:
        """Return the start positions of `count` windows of a run, beginning with window first_window: (count,) int64.

        Each epoch visits each of its disjoint windows once. Their order and offset depend only on (seed, epoch), so any
        process can find the windows of any step without computing the earlier ones. In a masked corpus, the number of
        windows with unmasked tokens depends on the offset. An epoch with fewer windows than windows_per_epoch()
        repeats some of them, and an epoch with more skips some.
        """
        epochs, indices = np.divmod(np.arange(first_window, first_window + count), self.windows_per_epoch(block_size))
        starts = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            epoch_starts = self._shuffled_starts(epoch, block_size, seed)
            in_epoch = epochs == epoch
            starts[in_epoch] = epoch_starts[indices[in_epoch] % len(epoch_starts)]
        return starts

    def _shuffled_starts(self, epoch: int, block_size: int, seed: int) -> np.ndarray:
        """Return the window starts of an epoch in shuffled order."""
        if self._epoch_starts is None or self._epoch_starts[0] != (epoch, block_size, seed):
            rng = np.random.Generator(np.random.Philox(key=seed % 2**64 + (epoch << 64)))
            n_windows = self._num_windows(block_size)
            offset = int(rng.integers(0, self.lengths["train"] - n_windows * block_size))
            if "train" in self.masks:
                starts = self._unmasked_starts(offset, block_size)
            else:
                fits_uint32 = self.lengths["train"] < 2**32
                starts = np.arange(n_windows, dtype=np.uint32 if fits_uint32 else np.int64)
                starts *= block_size
                starts += offset
            rng.shuffle(starts)
            self._epoch_starts = (epoch, block_size, seed), starts
        return self._epoch_starts[1]

    def train_batch(self, first_window: int, batch_size: int, block_size: int, seed: int, vocab_size: int):
        """Return inputs and targets, (B, T) int64 each, starting at window first_window. Targets of -1 are ignored."""
        starts = self.window_starts(first_window, batch_size, block_size, seed)
        if self._device_tensors:
            return self._device_batch(starts, block_size)
        windows = self.tokens["train"].windows(starts, block_size + 1)  # (B, T + 1)
        self._check_ids(windows, vocab_size, "train")  # on a GPU, the error would not show the cause
        windows = windows.astype(np.int64)
        x, y = windows[:, :-1].copy(), windows[:, 1:].copy()
        if "train" in self.masks:
            y[self.masks["train"][starts[:, None] + np.arange(1, block_size + 1)] == 0] = -1
            if (y < 0).all():  # a mean over no tokens would be NaN; this batch has loss weight 0
                y[0, 0] = x[0, 0]
        return torch.from_numpy(x), torch.from_numpy(y)

    def to_device(self, runtime: Runtime, vocab_size: int):
        """Move the training ids to the device, so that a batch transfers only window offsets.

        Raises UserError if any id is vocab_size or greater.
        """
        self._to_device = runtime.move
        ids, start = torch.empty(self.lengths["train"], dtype=torch.int16, device=runtime.device), 0
        for chunk in self.tokens["train"].chunks():
            self._check_ids(chunk, vocab_size, "train")
            ids[start : start + len(chunk)] = torch.from_numpy(chunk.view("<i2"))  # torch has few uint16 operations
            start += len(chunk)
        self._device_tensors["tokens"] = ids
        if "train" in self.masks:
            self._device_tensors["mask"] = torch.from_numpy(np.array(self.masks["train"])).to(runtime.device)

    def _device_batch(self, starts: np.ndarray, block_size: int):
        """Return (x, y) as train_batch() does, computed on the device for the windows at `starts`."""
        (offsets,) = self._to_device(torch.from_numpy(starts))
        token_index = offsets[:, None] + torch.arange(block_size + 1, device=offsets.device)
        windows = self._device_tensors["tokens"][token_index].long() & 0xFFFF
        # clone: with batch size 1, the slices are contiguous and would share memory, but y is modified below
        x, y = (t.clone(memory_format=torch.contiguous_format) for t in (windows[:, :-1], windows[:, 1:]))
        if "mask" in self._device_tensors:
            y.masked_fill_(self._device_tensors["mask"][token_index[:, 1:]] == 0, -1)
            y[0, 0] = torch.where((y < 0).all(), x[0, 0], y[0, 0])
        return x, y

    def loss_weights(self, first: int, n_batches: int, batch_size: int, block_size: int, seed: int) -> np.ndarray:
        """Return weights (n_batches,) that turn the mean of batch means into the mean over all unmasked tokens."""
        if "train" not in self.masks:
            return np.ones(n_batches)
        starts = self.window_starts(first, n_batches * batch_size, block_size, seed)
        in_loss = self.masks["train"][starts[:, None] + np.arange(1, block_size + 1)] != 0
        counts = in_loss.reshape(n_batches, -1).sum(1)
        return counts * n_batches / max(counts.sum(), 1)
