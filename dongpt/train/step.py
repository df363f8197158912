"""One update of a GPT's weights: batches, mixed precision, gradients of several micro-batches and processes, clipping.

    updates = Updates(cfg, rt, corpus, model, optimizer)      # cfg has the fields of UpdateConfig, GPTConfig and seed
    compiled, why = updates.compile("auto", n_updates=1000)
    loss = updates.make(lr, number, windows)                  # on the device; reading it waits for the update

The loop around it, with evaluations, logs and checkpoints, is train.py's.
"""

from dataclasses import dataclass

import torch
from torch.nn.parallel import DistributedDataParallel

from dongpt import runtime
from dongpt.runtime import Runtime, seed_everything
from dongpt.train.data import Corpus
from dongpt.train.optim import OptimConfig, lower_last_distance, set_learning_rate
from model import GPT


@dataclass(frozen=True)
class UpdateConfig(OptimConfig):
    """What goes into an update."""

    gradient_accumulation_steps: int = 5 * 8  # micro-batches per iteration, over all processes together
    batch_size: int = 12  # windows per micro-batch
    freeze_wte: int = 0  # iterations at the start in which the token embedding stays; the head with it if they are tied

    def wrong_values(self) -> list[str]:
        return [
            f"{name}={getattr(self, name)} must be at least {bound}"
            for name, bound in (("gradient_accumulation_steps", 1), ("batch_size", 1), ("freeze_wte", 0))
            if not getattr(self, name) >= bound
        ] + super().wrong_values()


def coalesce_gradients(model: GPT):
    """Sum what sparse gradients hold of the same row, which would pile up with every micro-batch."""
    for p in model.parameters():
        if p.grad is not None and p.grad.is_sparse:
            p.grad = p.grad.coalesce()


def clip_gradients(model: GPT, largest: float):
    """Scale the gradients, dense and sparse ones, so that the norm of all together is at most `largest`."""
    coalesce_gradients(model)
    gradients = [p.grad.values() if p.grad.is_sparse else p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    torch._foreach_mul_(gradients, (largest / (norm + 1e-6)).clamp(max=1.0))


class Updates:
    """What the updates of a run share. model is the plain one, eval_model what evaluations call."""

    def __init__(self, cfg, rt: Runtime, corpus: Corpus, model: GPT, optimizer: torch.optim.Optimizer):
        self.cfg, self.rt, self.corpus, self.model, self.optimizer = cfg, rt, corpus, model, optimizer
        if rt.has_room_for(3 * corpus.lengths["train"]):  # ids of two bytes, perhaps a mask
            corpus.keep_on(rt, model.config.vocab_size)
        self.scaler = torch.amp.GradScaler(rt.device_type, enabled=rt.dtype == "float16")
        self.windows = cfg.gradient_accumulation_steps * cfg.batch_size  # per update
        self.tokens = self.windows * cfg.block_size
        self.eval_model = self.train_model = model

    def compile(self, asked, n_updates: float) -> tuple[bool, str]:
        """Decide on torch.compile for a run of n_updates, wrap the model for several processes; (compiled?, why)."""
        cfg, rt = self.cfg, self.rt

        def trial(model):
            x = torch.zeros((cfg.batch_size, cfg.block_size), dtype=torch.int64, device=rt.device)
            with rt.autocast():
                loss = model(x, x.clone())[1]  # two tensors, as in training, or it would be compiled again
            loss.backward()
            self.model.zero_grad(set_to_none=True)

        flops = self.model.flops_per_token() * self.tokens * n_updates / rt.world_size
        self.eval_model, compiled, why = runtime.compile_model(self.model, asked, rt, flops, trial)
        if self.model.config.ngrams > 1:  # what only this knows how to average and to compile is a gradient of all rows
            self.model.transformer.ngrams.sparse = rt.device_type == "cpu" and rt.world_size == 1 and not compiled
        self.train_model = self.eval_model  # evaluation goes past DDP, whose forward would wait for the others
        if rt.world_size > 1:
            self.train_model = DistributedDataParallel(
                self.eval_model, device_ids=[rt.local_rank] if rt.device_type == "cuda" else None
            )
        return compiled, why

    def make(self, lr: float, number: int, first_window: int) -> torch.Tensor:
        """Update number `number`, with windows first_window ...; returns this process's mean loss, on the device."""
        cfg, rt = self.cfg, self.rt
        set_learning_rate(self.optimizer, lr)
        accumulate = cfg.gradient_accumulation_steps // rt.world_size
        shares = self.corpus.shares(
            first_window, cfg.gradient_accumulation_steps, cfg.batch_size, cfg.block_size, cfg.seed
        )
        total = torch.zeros((), device=rt.device)
        for micro_step in range(accumulate):
            index = micro_step * rt.world_size + rt.rank  # of the micro-batch, over all processes
            x, y = self.corpus.train_batch(
                first_window + index * cfg.batch_size,
                cfg.batch_size,
                cfg.block_size,
                cfg.seed,
                self.model.config.vocab_size,
            )
            x, y = rt.move(x, y)
            if rt.world_size > 1:  # gradients are averaged over the processes after the last micro-batch alone
                self.train_model.require_backward_grad_sync = micro_step == accumulate - 1
            seed_everything(cfg.seed, number, index)  # for dropout
            with rt.autocast():
                loss = self.train_model(x, y)[1] * shares[index] / accumulate
            self.scaler.scale(loss).backward()
            if micro_step:
                coalesce_gradients(self.model)
            total += loss.detach()
        if number < cfg.freeze_wte:  # without a gradient it has no decay either, no moments, no part in the norm
            self.model.transformer.wte.weight.grad = None
        if cfg.grad_clip:
            self.scaler.unscale_(self.optimizer)
            clip_gradients(self.model, cfg.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        lower_last_distance(self.model)
        self.optimizer.zero_grad(set_to_none=True)
        return total
