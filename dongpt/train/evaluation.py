"""Evaluation: mean loss over fixed, disjoint windows, in nats per token and bits per byte."""

import math
from dataclasses import dataclass
from typing import Callable, Iterable, Iterator

import numpy as np
import torch

from configurator import UserError
from dongpt.log import RunLog, progress_bar
from dongpt.runtime import Runtime, StopCheck
from dongpt.train import report
from dongpt.train.data import Corpus
from dongpt.train.step import TrainStep


@dataclass(frozen=True)
class MeanLoss:
    """Mean loss in nats per token over `tokens` predicted tokens."""

    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats) if self.nats < 700 else math.inf

    def bits_per_byte(self, n_bytes: int) -> float:
        """Return bits per byte, which can be compared across tokenizers. n_bytes: bytes of the predicted text."""
        return self.nats * self.tokens / math.log(2) / n_bytes if n_bytes else math.nan


def eval_batches(
    corpus: Corpus, split: str, batch_size: int, block_size: int, n_windows: int | None = None, rank=0, world_size=1
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Yield (x, y, number of predicted tokens); x and y are (B, T) int64, with -1 in y for padding and masked tokens.

    The batches always cover the same n_windows evenly spaced, disjoint windows of a split (default: all). Each process
    takes every world_size-th batch. All processes get equally many batches, so the last may contain only padding.
    """
    tokens, mask = corpus.tokens[split], corpus.masks.get(split)
    window_ids: range | np.ndarray = range(-(-(corpus.lengths[split] - 1) // block_size))
    if mask is not None:  # keep only windows with tokens in the loss
        starts = block_size * np.arange(len(window_ids))
        window_ids = np.flatnonzero(np.add.reduceat(mask[1:] != 0, starts, dtype=np.int64))
    n = min(len(window_ids), len(window_ids) if n_windows is None else n_windows)
    for first in range(rank * batch_size, n + rank * batch_size, world_size * batch_size):
        x = np.zeros((batch_size, block_size), dtype=np.int64)
        y = np.full((batch_size, block_size), -1, dtype=np.int64)
        for row, i in enumerate(range(first, min(first + batch_size, n))):
            start = int(window_ids[i * len(window_ids) // n]) * block_size
            ids = tokens[start : start + block_size + 1]
            x[row, : len(ids) - 1], y[row, : len(ids) - 1] = ids[:-1], ids[1:]
            if mask is not None:
                in_loss = mask[start + 1 : start + len(ids)]
                y[row, : len(in_loss)][in_loss == 0] = -1
        yield torch.from_numpy(x), torch.from_numpy(y), int((y >= 0).sum())


def predicted_bytes(corpus: Corpus, split: str) -> int:
    """Return the number of UTF-8 bytes in a split's predicted tokens: all but the first, or only the unmasked ones."""
    is_whole_split = corpus.lengths[split] == corpus.meta.get("tokens", {}).get(split)
    mask, stored_bytes = corpus.masks.get(split), corpus.meta.get("predicted_bytes", {}).get(split)
    if mask is not None and stored_bytes is not None and is_whole_split and not mask[0]:
        return stored_bytes
    lengths = corpus.tokenizer().byte_lengths()

    def count_bytes(ids) -> int:
        counts = np.bincount(ids, minlength=len(lengths))[: len(lengths)]  # padding ids have no text
        return int((counts * lengths).sum())

    if mask is not None:
        return count_bytes(corpus.tokens[split][1:][mask[1:] != 0])
    first, n_bytes = count_bytes(corpus.tokens[split][:1]), corpus.meta.get("bytes", {}).get(split)
    if not is_whole_split or n_bytes is None:
        return sum(map(count_bytes, corpus.tokens[split].chunks())) - first
    if n_bytes < first:
        message = f"the {split} split of {corpus.name} has {n_bytes:,} bytes, fewer than its first token"
        raise UserError(f"according to meta.json, {message}: prepare the data again")
    return n_bytes - first


@torch.no_grad()
def evaluate(model, batches: Iterable, rt: Runtime, should_stop: Callable[[], bool] = lambda: False) -> MeanLoss | None:
    """Return the model's mean loss over the batches of all ranks, without dropout.

    Return None if should_stop(), which every rank calls before each batch, returns True.
    """
    was_training, total, count, is_stopped = model.training, 0.0, 0, False
    model.eval()
    for x, y, n_tokens in batches:
        if is_stopped := should_stop():
            break
        if n_tokens:  # otherwise everything is masked or padding
            with rt.autocast:
                loss = model(*rt.move(x, y))[1]
            total, count = total + loss.item() * n_tokens, count + n_tokens
    model.train(was_training)
    if is_stopped:
        return None
    total, n_predicted = rt.all_reduce_sum(total, count)
    return MeanLoss(total / n_predicted if n_predicted else math.nan, int(n_predicted))


def _evaluate_split(step: TrainStep, stop: StopCheck, split: str, n_windows: int) -> MeanLoss | None:
    """Return the model's loss over n_windows of a split, or None if all ranks have to stop."""
    cfg, rt = step.cfg, step.rt
    batches = eval_batches(step.corpus, split, cfg.batch_size, cfg.block_size, n_windows, rt.rank, rt.world_size)
    return evaluate(step.eval_model, batches, rt, lambda: stop("eval"))


def estimate_loss(step: TrainStep, stop: StopCheck) -> tuple[float, float] | None:
    """Return (training loss, validation loss) over fixed windows of each split, or None if all ranks have to stop."""
    n_windows = step.cfg.eval_iters * step.cfg.batch_size
    train = _evaluate_split(step, stop, "train", n_windows)
    val = _evaluate_split(step, stop, "val", n_windows) if train else None
    return (train.nats, val.nats) if train and val else None


def print_sample(step: TrainStep, log: RunLog, stop: StopCheck, iter_num: int):
    """Print and log a sample of sample_tokens tokens, using the same random numbers each time.

    Generation stops early if the process receives a signal.
    """
    tokenizer, model, ids = step.corpus.tokenizer(), step.model.eval(), []
    settings = dict(temperature=0.8, top_k=200, seed=step.cfg.seed, n_ids=tokenizer.vocab_size)
    for next_ids in model.stream([[tokenizer.start_id]], step.cfg.sample_tokens, **settings):
        ids.append(int(next_ids[0]))
        if stop.interrupts.exit_code:
            break
    model.train()
    text = tokenizer.decode(ids)
    log.print(f"--- sample ---\n{text}\n--------------")
    log.write("sample", iter=iter_num, text=text)


def unigram_loss(corpus: Corpus, split: str) -> float:
    """Return the loss, in nats per token, of guessing by token frequency: the entropy of the predicted tokens."""
    counts = np.zeros(corpus.vocab_size, dtype=np.int64)
    if (mask := corpus.masks.get(split)) is not None:
        counts += np.bincount(corpus.tokens[split][1:][mask[1:] != 0], minlength=len(counts))
    else:
        counts += corpus.tokens[split].counts(len(counts))
    shares = counts[counts > 0] / counts.sum()
    return float((shares * np.log(1 / shares)).sum())


def log_final_loss(step: TrainStep, log: RunLog, stop: StopCheck, best_iter: int):
    """Evaluate the weights of iteration best_iter on the whole validation split; log and explain the loss.

    If a signal interrupts the evaluation, nothing is printed or logged.
    """
    cfg, rt, corpus = step.cfg, step.rt, step.corpus
    n_batches = -(-(corpus.lengths["val"] - 1) // (cfg.block_size * cfg.batch_size * rt.world_size))
    batches = eval_batches(corpus, "val", cfg.batch_size, cfg.block_size, None, rt.rank, rt.world_size)
    bar = progress_bar(
        n_batches, unit=" batches", quiet=not rt.is_main, iterable=batches, desc="whole validation split: ", leave=False
    )
    loss = evaluate(step.eval_model, bar, rt, lambda: stop("eval"))
    bar.close()
    if loss is None or not rt.is_main:
        return
    bits_per_byte = bits_per_character = None
    try:
        bits_per_byte = loss.bits_per_byte(predicted_bytes(corpus, "val"))
    except UserError:  # counting bytes requires a tokenizer, and GPT-2's may not be available offline
        pass
    n_bytes, n_characters = (corpus.meta.get(key, {}).get("val") for key in ("bytes", "characters"))
    if bits_per_byte and n_bytes and n_characters:
        bits_per_character = bits_per_byte * n_bytes / n_characters
    results = dict(val_loss=loss.nats, perplexity=loss.perplexity, bits_per_byte=bits_per_byte, tokens=loss.tokens)
    log.write("final", iter=best_iter, **results)
    meaning = report.loss_meaning(loss.nats, bits_per_character, unigram_loss(corpus, "val"), corpus)
    print(report.last_screen(cfg, loss, meaning, log.curves, best_iter, corpus))
