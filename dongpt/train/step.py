"""One update of a GPT's weights: batches, mixed precision, gradients of several micro-batches and processes, clipping.

    step = TrainStep(cfg, rt, corpus, model, optimizer)       # cfg has the fields of StepConfig, GPTConfig and seed
    compiled, why = step.compile("auto", n_updates=1000)
    loss = step(lr, iter_num, samples_seen)                   # on the device; reading it waits for the update

A sample is a window of block_size tokens.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch.nn.parallel import DistributedDataParallel

from configurator import UserError
from dongpt import runtime
from dongpt.runtime import Runtime, seed_everything
from dongpt.train.data import Corpus
from dongpt.train.optim import OptimConfig, lower_last_distance, set_learning_rate
from model import GPT


@dataclass(frozen=True)
class StepConfig(OptimConfig):
    """Settings of one update."""

    gradient_accumulation_steps: Annotated[int, ">=", 1] = 5 * 8  # micro-batches per iteration, over all processes
    batch_size: Annotated[int, ">=", 1] = 12  # windows per micro-batch
    freeze_wte: Annotated[int, ">=", 0] = 0  # iterations at the start that freeze the token embedding (a tied head too)


def clip_gradients(model: GPT, max_norm: float):
    """Scale all gradients, dense and sparse, so that their joint norm is at most max_norm."""
    coalesce_gradients(model)
    gradients = [p.grad.values() if p.grad.is_sparse else p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))


def coalesce_gradients(model: GPT):
    """Sum the entries of sparse gradients that belong to the same row; they would pile up with every micro-batch."""
    for p in model.parameters():
        if p.grad is not None and p.grad.is_sparse:
            p.grad = p.grad.coalesce()


class TrainStep:
    """Makes updates. model is the plain one, whose names go into checkpoints; eval_model is called in evaluations."""

    def __init__(self, cfg, rt: Runtime, corpus: Corpus, model: GPT, optimizer: torch.optim.Optimizer):
        self.cfg, self.rt, self.corpus, self.model, self.optimizer = cfg, rt, corpus, model, optimizer
        self.vocab_size: int = model.transformer.wte.num_embeddings
        if cfg.gradient_accumulation_steps % rt.world_size:
            n_batches, n = f"gradient_accumulation_steps={cfg.gradient_accumulation_steps}", rt.world_size
            raise UserError(
                f"{n_batches} micro-batches cannot be shared evenly by {n} processes: use a multiple of {n}"
            )
        if rt.has_room_for(3 * corpus.lengths["train"]):  # ids of two bytes, and perhaps a mask
            corpus.to_device(rt, self.vocab_size)
        self.scaler = torch.amp.GradScaler(rt.device_type, enabled=rt.dtype == "float16")
        self.samples = cfg.gradient_accumulation_steps * cfg.batch_size  # per update
        self.tokens = self.samples * cfg.block_size
        self.eval_model: Any = model
        self.train_model: Any = model

    def compile(self, asked, n_updates: float) -> tuple[bool, str]:
        """Decide on torch.compile for a run of n_updates; wrap the model for several processes; (is compiled?, why)."""
        cfg, rt = self.cfg, self.rt

        def trial(model):
            x = torch.zeros((cfg.batch_size, cfg.block_size), dtype=torch.int64, device=rt.device)
            with rt.autocast():
                loss = model(x, x.clone())[1]  # two tensors, as in training, or it would be compiled again
            loss.backward()
            self.model.zero_grad(set_to_none=True)

        flops = self.model.flops_per_token() * self.tokens * n_updates / rt.world_size
        self.eval_model, compiled, why = runtime.compile_model(self.model, asked, rt, flops, trial)
        if self.model.config.ngrams > 1:  # DDP and torch.compile support dense gradients only
            self.model.transformer.ngrams.sparse = rt.device_type == "cpu" and rt.world_size == 1 and not compiled
        self.train_model = self.eval_model  # evaluation bypasses DDP, whose forward would wait for the other ranks
        if rt.world_size > 1:
            device_ids = [rt.local_rank] if rt.device_type == "cuda" else None
            self.train_model = DistributedDataParallel(self.eval_model, device_ids=device_ids)
        return compiled, why

    def __call__(self, lr: float, iter_num: int, samples_seen: int) -> torch.Tensor:
        """Update number iter_num, with the samples from number samples_seen on; returns this rank's mean loss."""
        cfg, rt = self.cfg, self.rt
        set_learning_rate(self.optimizer, lr)
        accumulate = cfg.gradient_accumulation_steps // rt.world_size
        n_batches, shape = cfg.gradient_accumulation_steps, (cfg.batch_size, cfg.block_size)
        loss_weights = self.corpus.loss_weights(samples_seen, n_batches, *shape, cfg.seed)
        total = torch.zeros((), device=rt.device)
        for micro_step in range(accumulate):
            index = micro_step * rt.world_size + rt.rank  # of the micro-batch, counted over all ranks
            first = samples_seen + index * cfg.batch_size
            x, y = rt.move(*self.corpus.train_batch(first, *shape, cfg.seed, self.vocab_size))  # (B, T) each
            if rt.world_size > 1:  # average the gradients over the ranks only after the last micro-batch
                self.train_model.require_backward_grad_sync = micro_step == accumulate - 1
            seed_everything(cfg.seed, iter_num, index)  # for dropout
            with rt.autocast():
                loss = self.train_model(x, y)[1] * loss_weights[index] / accumulate
            self.scaler.scale(loss).backward()
            if micro_step:
                coalesce_gradients(self.model)
            total += loss.detach()
        if iter_num < cfg.freeze_wte:  # without a gradient there is no weight decay, no moment, no share of the norm
            self.model.transformer.wte.weight.grad = None
        if cfg.grad_clip:
            self.scaler.unscale_(self.optimizer)
            clip_gradients(self.model, cfg.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        lower_last_distance(self.model)
        self.optimizer.zero_grad(set_to_none=True)
        return total
