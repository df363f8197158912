"""Losses that can be compared: over fixed, disjoint windows, in nats per token and bits per byte of text.

evaluate() is for any model; the functions after it evaluate a training run.
"""

import math
from dataclasses import dataclass
from typing import Callable, Iterator

import numpy as np
import torch

from configurator import UserError
from dongpt.log import RunLog
from dongpt.runtime import Runtime, Stop
from dongpt.train.data import Corpus
from dongpt.train.step import TrainStep


@dataclass(frozen=True)
class Loss:
    """A mean loss in nats per token over `tokens` predicted tokens."""

    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats) if self.nats < 700 else math.inf

    def bits_per_byte(self, n_bytes: int) -> float:
        """Bits per byte if the predicted tokens represent n_bytes of text; unlike nats it compares tokenizers."""
        return self.nats * self.tokens / math.log(2) / n_bytes if n_bytes else math.nan


def eval_batches(
    corpus: Corpus, split: str, batch_size: int, block_size: int, n_windows: int | None = None, rank=0, world_size=1
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Yield (x, y, number of predicted tokens) over a split, x and y (B, T) int64; padding and masked tokens are
    -1 in y.

    n_windows of the disjoint windows, evenly spaced and the same each time; all of them by default. Every batch
    has the same shape. Each of several processes takes every world_size-th batch; all get the same number, so the
    last ones may be all padding.
    """
    tokens, mask = corpus.tokens(split), corpus.mask(split)
    windows: range | np.ndarray = range(-(-(corpus.lengths[split] - 1) // block_size))
    if mask is not None:  # those with a token in the loss
        starts = block_size * np.arange(len(windows))
        windows = np.flatnonzero(np.add.reduceat(mask[1:] != 0, starts, dtype=np.int64))
    n = min(len(windows), len(windows) if n_windows is None else n_windows)
    for first in range(rank * batch_size, n + rank * batch_size, world_size * batch_size):
        x = np.zeros((batch_size, block_size), dtype=np.int64)
        y = np.full((batch_size, block_size), -1, dtype=np.int64)
        for row, i in enumerate(range(first, min(first + batch_size, n))):
            start = int(windows[i * len(windows) // n]) * block_size
            ids = tokens[start : start + block_size + 1]
            x[row, : len(ids) - 1], y[row, : len(ids) - 1] = ids[:-1], ids[1:]
            if mask is not None:
                in_loss = mask[start + 1 : start + len(ids)]
                y[row, : len(in_loss)][in_loss == 0] = -1
        yield torch.from_numpy(x), torch.from_numpy(y), int((y >= 0).sum())


def predicted_bytes(corpus: Corpus, split: str) -> int:
    """UTF-8 bytes of source text of the predicted tokens of a split: all but the first, or those in the mask."""
    whole = corpus.lengths[split] == corpus.meta.get("tokens", {}).get(split)
    mask, known = corpus.mask(split), corpus.meta.get("predicted_bytes", {}).get(split)
    if mask is not None and known is not None and whole and not mask[0]:
        return known
    lengths = corpus.tokenizer().byte_lengths()
    if mask is not None:
        ids = corpus.tokens(split)[1:][mask[1:] != 0]
        return int((np.bincount(ids, minlength=len(lengths))[: len(lengths)] * lengths).sum())
    first = int(lengths[corpus.tokens(split)[:1]].sum())
    if whole and split in corpus.meta.get("bytes", {}):
        if (n_bytes := corpus.meta["bytes"][split]) < first:
            raise UserError(
                f"meta.json of {corpus.name} says that {split} has {n_bytes:,} bytes of text, fewer than its first "
                f"token: prepare the data again"
            )
        return n_bytes - first
    counts = np.sum([np.bincount(ids, minlength=2**16) for ids in corpus.chunks(split)], axis=0)
    return int((counts[: len(lengths)] * lengths).sum()) - first  # padded vocabularies have ids without text


@torch.no_grad()
def evaluate(
    model,
    corpus: Corpus,
    split: str,
    batch_size: int,
    block_size: int,
    runtime: Runtime,
    n_windows: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_batch: Callable[[], object] = lambda: None,
) -> Loss | None:
    """The loss of model over a split (see eval_batches), shared by all ranks, with dropout off.

    None if should_stop(), which every rank calls equally often, returned True. on_batch() is called after each batch.
    """
    was_training = model.training
    model.eval()
    total, count, stopped = 0.0, 0, False
    rank, world_size = runtime.rank, runtime.world_size
    for x, y, n_tokens in eval_batches(corpus, split, batch_size, block_size, n_windows, rank, world_size):
        if stopped := should_stop():
            break
        if n_tokens:  # else all of it is masked or padding
            with runtime.autocast:
                loss = model(*runtime.move(x, y))[1]
            total, count = total + loss.item() * n_tokens, count + n_tokens
            on_batch()
    model.train(was_training)
    if stopped:
        return None
    total, n_predicted = runtime.sum(total, count)
    return Loss(total / n_predicted if n_predicted else math.nan, int(n_predicted))


def estimate_loss(step: TrainStep, stop: Stop) -> tuple[float, float] | None:
    """(train, val) loss on fixed windows spread over each split; None if all ranks have to stop."""
    cfg, losses = step.cfg, []
    for split in ("train", "val"):
        shape = cfg.batch_size, cfg.block_size
        n_windows = cfg.eval_iters * cfg.batch_size
        loss = evaluate(step.eval_model, step.corpus, split, *shape, step.rt, n_windows, lambda: stop("eval"))
        if loss is None:
            return None
        losses.append(loss.nats)
    return losses[0], losses[1]


def print_sample(step: TrainStep, log: RunLog, stop: Stop):
    """Print a text of sample_tokens tokens, with the same random numbers each time; a signal cuts it short."""
    tokenizer, model, ids = step.corpus.tokenizer(), step.model.eval(), []
    settings = dict(temperature=0.8, top_k=200, seed=step.cfg.seed, n_ids=tokenizer.vocab_size)
    for next_ids in model.stream([[tokenizer.start_id]], step.cfg.sample_tokens, **settings):
        ids.append(int(next_ids[0]))
        if stop.interrupts.code:
            break
    model.train()
    log.print(f"--- sample ---\n{tokenizer.decode(ids)}\n--------------")


def finish(step: TrainStep, log: RunLog, stop: Stop, best_iter: int):
    """Print and log the loss over the whole validation split, with the weights of iteration best_iter, unless a signal
    comes."""
    cfg, rt = step.cfg, step.rt
    loss = evaluate(
        step.eval_model, step.corpus, "val", cfg.batch_size, cfg.block_size, rt, should_stop=lambda: stop("eval")
    )
    if loss is None or not rt.is_main:
        return
    try:
        bits = loss.bits_per_byte(predicted_bytes(step.corpus, "val"))
    except ValueError:  # counting bytes takes a tokenizer, and GPT-2's may be out of reach
        bits = None
    print(
        f"final: ckpt.pt of iteration {best_iter} has whole-validation loss {loss.nats:.4f}, perplexity "
        f"{loss.perplexity:.2f}" + (f", {bits:.4f} bits per byte" if bits else "") + f" ({loss.tokens:,} tokens)"
    )
    measured = dict(val_loss=loss.nats, perplexity=loss.perplexity, bits_per_byte=bits, tokens=loss.tokens)
    log.write("final", iter=best_iter, **measured)
