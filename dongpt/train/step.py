"""Training step of a GPT: batches, mixed precision, gradient accumulation, distributed training, gradient clipping.

    step = TrainStep(cfg, rt, corpus, model, optimizer)       # cfg has the fields of StepConfig, GPTConfig and seed
    is_compiled, reason = step.compile("auto", n_updates=1000)
    loss = step(lr, iter_num, samples_seen)                   # on the device; reading it waits for the update

A sample is one window of block_size tokens.
"""

import warnings
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch.nn.parallel import DistributedDataParallel

from configurator import UserError
from dongpt.program import first_line
from dongpt.runtime import Runtime, seed_everything
from dongpt.train.data import Corpus
from dongpt.train.optim import OptimConfig, lower_farthest_bias, set_learning_rate
from model import GPT

MAX_CORPUS_MEMORY_SHARE = 0.1  # store the training set on the GPU if it takes less than this share of free memory
# Minimum FLOPs of a run for which compiling, which takes about a minute, is expected to pay off. This is an estimate (a
# few minutes on a recent GPU at the speed of small models) and has not been measured on a GPU.
COMPILE_MIN_FLOPS = 2e15


@dataclass(frozen=True)
class StepConfig(OptimConfig):
    """Settings of a training step."""

    gradient_accumulation_steps: Annotated[int, ">=", 1] = 5 * 8  # micro-batches per iteration, across all processes
    batch_size: Annotated[int, ">=", 1] = 12  # sequences per micro-batch
    freeze_wte: Annotated[int, ">=", 0] = 0  # freeze the token embedding (and a tied head) for this many iterations


def clip_gradients(model: GPT, max_norm: float):
    """Scale all gradients, dense and sparse, so that their total norm is at most max_norm."""
    coalesce_gradients(model)
    grads = [p.grad.values() if p.grad.is_sparse else p.grad for p in model.parameters() if p.grad is not None]
    grad_norm = torch.nn.utils.get_total_norm(grads)
    torch._foreach_mul_(grads, (max_norm / (grad_norm + 1e-6)).clamp(max=1.0))


def coalesce_gradients(model: GPT):
    """Merge duplicate entries of sparse gradients, which would otherwise pile up with every micro-batch."""
    for p in model.parameters():
        if p.grad is not None and p.grad.is_sparse:
            p.grad = p.grad.coalesce()


class TrainStep:
    """Training step. `model` is the uncompiled model, which is saved in checkpoints; eval_model may be compiled."""

    def __init__(self, cfg, rt: Runtime, corpus: Corpus, model: GPT, optimizer: torch.optim.Optimizer):
        self.cfg, self.rt, self.corpus, self.model, self.optimizer = cfg, rt, corpus, model, optimizer
        self.vocab_size: int = model.transformer.wte.num_embeddings
        if cfg.gradient_accumulation_steps % rt.world_size:
            setting, n = f"gradient_accumulation_steps={cfg.gradient_accumulation_steps}", rt.world_size
            raise UserError(f"{setting} is not divisible by the number of processes ({n}): use a multiple of {n}")
        n_bytes = 3 * corpus.lengths["train"]  # two bytes per id, and one for a mask
        if rt.device_type == "cuda" and n_bytes < MAX_CORPUS_MEMORY_SHARE * torch.cuda.mem_get_info(rt.device)[0]:
            corpus.to_device(rt, self.vocab_size)
        self.scaler = torch.amp.GradScaler(rt.device_type, enabled=rt.dtype == "float16")
        self.samples_per_iter = cfg.gradient_accumulation_steps * cfg.batch_size
        self.tokens_per_iter = self.samples_per_iter * cfg.block_size
        self.eval_model: Any = model
        self.train_model: Any = model

    def compile(
        self, mode, n_updates: float, was_compiled: bool | None = None, mode_reason: str = "requested"
    ) -> tuple[bool, str]:
        """Compile the model if appropriate and wrap it for DDP; return (is_compiled, reason).

        A resumed run keeps its previous choice, was_compiled. Otherwise, mode="auto" compiles on CUDA if the run of
        n_updates is long enough. If a trial forward and backward pass fails, mode=True raises UserError,
        and the other modes fall back to the uncompiled model. mode_reason is the reason for an explicit mode.
        """
        rt, model, tokens = self.rt, self.model, self.tokens_per_iter
        is_compiled, reason = bool(mode), mode_reason if isinstance(mode, bool) else mode
        if was_compiled is not None:
            is_compiled, reason = was_compiled, "from the checkpoint"
        elif mode == "auto" and rt.device_type != "cuda":
            is_compiled, reason = False, f"auto: off on {rt.device_type}"
        elif mode == "auto" and model.flops_per_token() * tokens * n_updates / rt.world_size < COMPILE_MIN_FLOPS:
            is_compiled, reason = False, "auto: the run is too short to benefit"
        if is_compiled and (problem := self._try_to_compile()):
            if mode is True and was_compiled is None:
                raise UserError(f"compile=True does not work here ({problem}): use compile=False or compile=auto")
            is_compiled, reason = False, f"torch.compile is not available: {problem}"
        if model.config.ngrams > 1:  # DDP and torch.compile support only dense gradients
            model.transformer.ngrams.sparse = rt.device_type == "cpu" and rt.world_size == 1 and not is_compiled
        self.train_model = self.eval_model  # evaluation bypasses DDP, whose forward would wait for the other ranks
        if rt.world_size > 1:
            device_ids = [rt.local_rank] if rt.device_type == "cuda" else None
            self.train_model = DistributedDataParallel(self.eval_model, device_ids=device_ids)
        return is_compiled, reason

    def _try_to_compile(self) -> str:
        """Compile the model and run one forward and backward pass. Return the error if that fails, or ''."""
        x = torch.zeros((self.cfg.batch_size, self.cfg.block_size), dtype=torch.int64, device=self.rt.device)
        model = torch.compile(self.model)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with self.rt.autocast:
                    loss = model(x, x.clone())[1]  # two tensors, as in training, to avoid another compilation
                loss.backward()
        except torch.OutOfMemoryError:
            raise  # run_program prints the remedy
        except Exception as error:  # missing compiler, unsupported Python or GPU, ...: types depend on the backend
            return first_line(error)
        finally:
            self.model.zero_grad(set_to_none=True)
        self.eval_model = model
        return ""

    def __call__(self, lr: float, iter_num: int, samples_seen: int) -> torch.Tensor:
        """Run update iter_num on the samples starting at index samples_seen; return this rank's mean loss."""
        cfg, rt = self.cfg, self.rt
        set_learning_rate(self.optimizer, lr)
        n_micro_steps = cfg.gradient_accumulation_steps // rt.world_size
        n_batches, shape = cfg.gradient_accumulation_steps, (cfg.batch_size, cfg.block_size)
        loss_weights = self.corpus.loss_weights(samples_seen, n_batches, *shape, cfg.seed)
        mean_loss = torch.zeros((), device=rt.device)
        for micro_step in range(n_micro_steps):
            batch_index = micro_step * rt.world_size + rt.rank  # index of the micro-batch over all ranks
            first_sample = samples_seen + batch_index * cfg.batch_size
            x, y = rt.move(*self.corpus.train_batch(first_sample, *shape, cfg.seed, self.vocab_size))  # (B, T) each
            if rt.world_size > 1:  # average the gradients over the ranks only after the last micro-batch
                self.train_model.require_backward_grad_sync = micro_step == n_micro_steps - 1
            if cfg.dropout or cfg.attn_dropout or getattr(cfg, "lora_dropout", 0):  # a resumed run drops the same units
                seed_everything(cfg.seed, iter_num, batch_index)
            with rt.autocast:
                loss = self.train_model(x, y)[1] * loss_weights[batch_index] / n_micro_steps
            self.scaler.scale(loss).backward()
            if micro_step:
                coalesce_gradients(self.model)
            mean_loss += loss.detach()
        if iter_num < cfg.freeze_wte:  # None also skips weight decay, moment updates and clipping
            self.model.transformer.wte.weight.grad = None
        if cfg.grad_clip:
            self.scaler.unscale_(self.optimizer)
            clip_gradients(self.model, cfg.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.model.config.pos_embd == "relative":
            lower_farthest_bias(self.model)
        self.optimizer.zero_grad(set_to_none=True)
        return mean_loss
