"""Optimizers: AdamW as GPT-2 has it, or Muon for the blocks' matrices with AdamW for all else.

    optimizer = make_optimizer(model, cfg, "cpu")      # cfg has the fields of OptimConfig
    set_learning_rate(optimizer, lr)                   # model.py; before each optimizer.step()

Muon: Keller Jordan et al. 2024, kellerjordan.github.io/posts/muon. A matrix moves along the orthogonal matrix that is
nearest to its averaged gradient, so that all of its directions learn equally fast.
"""
from dataclasses import dataclass
from typing import Literal

import torch

from model import GPT

# Each X -> a X + b X X' X + c X X' X X' X brings the singular values of X nearer to 1; with these numbers, of Jordan's
# page, fast rather than exactly: they end between 0.7 and 1.2.
QUINTIC = (3.4445, -4.7750, 2.0315)
ROUNDS = 5  # of it
MOMENTUM = 0.95


@dataclass(frozen=True)
class OptimConfig:
    """How gradients become updates."""
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the blocks' matrices, AdamW for all else
    learning_rate: float = 6e-4  # the peak
    muon_lr: float = 0.03  # the peak of the matrices that Muon moves
    weight_decay: float = 0.1  # of matrices and embeddings
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW; 0.99 suits few tokens per iteration
    grad_clip: float = 1.0  # clip the norm of the gradient; 0 is off

    def wrong_values(self) -> list[str]:
        """What is out of range, a phrase each."""
        wrong = [f"{name}={getattr(self, name)} must be at least 0"
                 for name in ("learning_rate", "muon_lr", "weight_decay", "grad_clip") if not getattr(self, name) >= 0]
        return wrong + [f"{name}={getattr(self, name)} must be at least 0 and below 1"
                        for name in ("beta1", "beta2") if not 0 <= getattr(self, name) < 1]


def make_optimizer(model: GPT, cfg: OptimConfig, device_type: str) -> torch.optim.Optimizer:
    """The optimizer that cfg asks for, its groups those of model.parameter_groups(muon)."""
    if cfg.optimizer == "adamw":
        return model.configure_optimizers(cfg.weight_decay, cfg.learning_rate, (cfg.beta1, cfg.beta2), device_type)
    return Muon(model.optimizer_groups(cfg.weight_decay, cfg.learning_rate, cfg.muon_lr), lr=cfg.learning_rate,
                betas=(cfg.beta1, cfg.beta2), fused=device_type in ("cuda", "cpu"))


class Muon(torch.optim.AdamW):
    """AdamW, and for the groups with muon=True Muon: matrices of the same shape are orthogonalised together."""

    def __init__(self, groups: list[dict], **settings):
        super().__init__(groups, **settings)
        self._step_supports_amp_scaling = False  # of AdamW's fused kernel, which would not see Muon's part

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        for group in self.param_groups:
            if group.get("muon"):
                self._move(group)
        return super().step()  # passes over what has no gradient

    def _move(self, group: dict):
        """One update of a group's matrices, whose gradients are used up."""
        shapes: dict[tuple[int, int], list] = {}
        for p in group["params"]:
            if p.grad is None:
                continue
            if not (state := self.state[p]):
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(p.grad, 1 - MOMENTUM)
            direction = p.grad.lerp(state["momentum"], MOMENTUM)  # Nesterov's
            p.grad = None
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
