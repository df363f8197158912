"""Losses that can be compared: over fixed, disjoint windows, in nats per token and bits per byte of text."""

import math
from dataclasses import dataclass
from typing import Callable

import torch

from dongpt.runtime import Runtime
from dongpt.train.data import Corpus


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
    """The loss of model over a split (see Corpus.eval_batches), shared by all ranks, with dropout off.

    None if should_stop(), which every rank calls equally often, returned True. on_batch() is called after each batch.
    """
    was_training = model.training
    model.eval()
    total, count, stopped = 0.0, 0, False
    rank, world_size = runtime.rank, runtime.world_size
    for x, y, n_tokens in corpus.eval_batches(split, batch_size, block_size, n_windows, rank, world_size):
        if stopped := should_stop():
            break
        if n_tokens:  # else all of it is masked or padding
            with runtime.autocast():
                loss = model(*runtime.move(x, y))[1]
            total, count = total + loss.item() * n_tokens, count + n_tokens
            on_batch()
    model.train(was_training)
    if stopped:
        return None
    total, count = runtime.sum(total, count)
    return Loss(total / count if count else math.nan, int(count))
