"""Optimizers: AdamW as GPT-2 has it, or Muon for the blocks' matrices with AdamW for all else; rows of large tables.

    optimizer = make_optimizer(model, cfg, "cpu")      # cfg has the fields of OptimConfig
    set_learning_rate(optimizer, lr)                   # before each optimizer.step()

Muon: Keller Jordan et al. 2024, kellerjordan.github.io/posts/muon. A matrix moves along the orthogonal matrix that is
nearest to its averaged gradient, so that all of its directions learn equally fast.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch.optim.adamw import adamw

from model import GPT, NGRAMS, RELATIVE

# Each X -> a X + b X X' X + c X X' X X' X brings the singular values of X nearer to 1; with these numbers, of Jordan's
# page, fast rather than exactly: most end between 0.7 and 1.2, the smallest ones of square matrices lower, near 0.06.
QUINTIC = (3.4445, -4.7750, 2.0315)
ROUNDS = 5  # of it
MOMENTUM = 0.9  # Jordan has 0.95; short runs end lower with this: docs/speed.md
RELATIVE_LR = 100.0  # lr multiplier of the relative table: biases grow to about -5 while weights stay near 0.02
NGRAMS_LR = 3.0  # lr multiplier of the n-gram table: each entry is rarely used
BEYOND = 8.0  # scores beyond the relative table get its lowest bias minus this many nats


@dataclass(frozen=True)
class OptimConfig:
    """How gradients become updates."""

    optimizer: Literal["adamw", "muon"] = "adamw"  # muon for the blocks' matrices takes 0.05 nats off a short run
    learning_rate: float = 6e-4  # the peak
    muon_lr: float = 0.03  # the peak of the matrices that Muon moves
    weight_decay: float = 0.1  # of matrices and embeddings
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW; 0.99 suits few tokens per iteration
    grad_clip: float = 1.0  # clip the norm of the gradient; 0 is off

    def wrong_values(self) -> list[str]:
        """What is out of range, a phrase each."""
        wrong = [
            f"{name}={getattr(self, name)} must be at least 0"
            for name in ("learning_rate", "muon_lr", "weight_decay", "grad_clip")
            if not getattr(self, name) >= 0
        ]
        if self.optimizer == "muon" and self.learning_rate == 0:
            wrong.append(
                "optimizer=muon needs a learning_rate above 0, since muon_lr rises and falls with it: give a small one"
            )
        return wrong + [
            f"{name}={getattr(self, name)} must be at least 0 and below 1"
            for name in ("beta1", "beta2")
            if not 0 <= getattr(self, name) < 1
        ]


def make_optimizer(model: GPT, cfg: OptimConfig, device_type: str) -> "Optimizer":
    """The optimizer that cfg asks for, over the groups of model.configure_optimizers; see parameter_groups there."""
    _leave_the_compiler_alone()
    betas = (cfg.beta1, cfg.beta2)
    adamw = model.configure_optimizers(cfg.weight_decay, cfg.learning_rate, betas, device_type)
    parameters = dict(model.named_parameters())
    groups = [dict(params=group["params"], weight_decay=group["weight_decay"]) for group in adamw.param_groups]
    if cfg.optimizer == "muon":
        matrices, _, in_blocks, *_ = model.parameter_groups(muon=True)
        groups[0]["params"] = [parameters[name] for name in matrices]
        muon_scale = cfg.muon_lr / max(cfg.learning_rate, 1e-30)
        muon_group = dict(params=[parameters[name] for name in in_blocks], weight_decay=cfg.weight_decay)
        groups.insert(2, muon_group | dict(lr_scale=muon_scale, rule="muon"))
    for names, group in zip(model.parameter_groups(muon=cfg.optimizer == "muon"), groups):
        if names == [RELATIVE]:
            group["lr_scale"] = RELATIVE_LR
        elif names == [NGRAMS]:
            group |= dict(lr_scale=NGRAMS_LR, rule="rows")
    defaults = dict(lr=cfg.learning_rate, betas=betas, eps=1e-8, weight_decay=0.0, fused=device_type in ("cuda", "cpu"))
    optimizer = Optimizer(groups, defaults)
    set_learning_rate(optimizer, cfg.learning_rate)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float):
    """Set every group's learning rate, times its lr_scale, for the next update."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1)


@torch.no_grad()
def lower_last_distance(model: GPT):
    """Put the last entry of pos_embd=relative's table BEYOND below all others; call this after each update.

    Distances beyond the table use this entry too. Training sees it once per window and nothing beyond: left alone it
    stays high, and on a longer text the many far tokens drown out the near ones.
    """
    table = model.transformer.relative.relative_embeddings.weight if model.config.pos_embd == "relative" else None
    if table is not None and table.requires_grad and len(table) > 1:
        table[-1] = table[:-1].amin(0) - BEYOND


def _leave_the_compiler_alone():
    """Spare the start of a program the import of torch's compiler, which takes as long as that of torch.

    Methods of every optimizer import it only to have themselves left out of what is compiled, unless this mark says
    that it is done; nothing here compiles an optimizer. Where a torch does otherwise, the import comes back.
    """
    for method in ("add_param_group", "state_dict", "load_state_dict", "zero_grad"):
        inner = getattr(getattr(torch.optim.Optimizer, method), "__wrapped__", None)
        if inner is not None and not hasattr(inner, "__dynamo_disable"):
            setattr(inner, "__dynamo_disable", inner)


class Optimizer(torch.optim.Optimizer):
    """AdamW, its state as torch.optim.AdamW has it; Muon for groups with rule="muon"; each row for itself with "rows".

    torch's AdamW is used through its function: its step() would import the compiler too.
    """

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        rules = {"muon": self._move_matrices, "rows": self._move_rows}
        for group in self.param_groups:
            if with_gradient := [p for p in group["params"] if p.grad is not None]:
                rules.get(group.get("rule"), self._move_by_adamw)(with_gradient, group)

    def _move_by_adamw(self, parameters: list, group: dict):
        for p in parameters:
            if not self.state[p]:
                device = p.device if group["fused"] else "cpu"  # where it is read; from a GPU that would wait
                self.state[p] = dict(
                    step=torch.zeros((), device=device), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p)
                )
        states = [self.state[p] for p in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _move_rows(self, parameters: list, group: dict):
        """One update of tables of which a batch uses few rows, their gradients dense or sparse.

        Adam without momentum, its second moment one number per row. A row without a gradient stays as it is, with its
        moment: decaying that meanwhile, as AdamW does, gave rare rows steps that are too long.
        """
        beta = group["betas"][1]
        for p in parameters:
            if not (state := self.state[p]):
                state["square"], state["count"] = (torch.zeros(len(p), device=p.device) for _ in range(2))
            if p.grad.is_sparse:
                p.grad = p.grad.coalesce()
                at, grad = p.grad.indices()[0], p.grad.values()
            else:
                at, grad = slice(None), p.grad
            square = grad.square().mean(1)
            used = square > 0
            state["count"][at] += used
            state["square"][at] = torch.where(used, state["square"][at].lerp(square, 1 - beta), state["square"][at])
            correction = 1 - beta ** state["count"][at]
            scale = torch.where(used, (state["square"][at] / correction).rsqrt(), 0.0)
            p[at] -= group["lr"] * scale[:, None] * grad

    def _move_matrices(self, parameters: list, group: dict):
        """One update by Muon; matrices of the same shape are made orthogonal together."""
        shapes: dict[tuple[int, int], list] = {}
        for p in parameters:
            if not (state := self.state[p]):
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(p.grad, 1 - MOMENTUM)
            direction = p.grad.lerp(state["momentum"], MOMENTUM)  # Nesterov's
            for matrix, move in zip(matrices_in(p), matrices_in(direction)):
                rows, columns = matrix.shape
                if rows > columns:  # lying matrices cost less
                    matrix, move = matrix.mT, move.mT
                # Jordan's scale: outputs change as much by a tall matrix as by a square one
                shapes.setdefault(tuple(matrix.shape), []).append((matrix, move, max(1, rows / columns) ** 0.5))
        for found in shapes.values():
            moves = orthogonal(torch.stack([move for _, move, _ in found]))
            for (matrix, _, scale), move in zip(found, moves):
                matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(move, alpha=-group["lr"] * scale)


def matrices_in(weight) -> tuple[torch.Tensor, ...]:
    """The matrices that a weight holds, as views: c_attn's (3 C, C) is those of queries, keys and values."""
    rows, columns = weight.shape
    return weight.split(columns) if rows == 3 * columns else (weight,)


def orthogonal(matrices):
    """matrices (n, rows, columns), rows <= columns, with their singular values brought near to 1.

    Newton and Schulz's iteration, which multiplies matrices alone; on a GPU in bfloat16, whose rounding is less than
    what five rounds leave.
    """
    a, b, c = QUINTIC
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # no singular value is above 1 then
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype)
