"""Optimizers: AdamW as in GPT-2, Muon for the matrices in the blocks, and row-wise Adam for large tables.

    optimizer = make_optimizer(model, cfg, "cpu")      # cfg has the fields of OptimConfig
    set_learning_rate(optimizer, lr)                   # before each optimizer.step()

Muon (Keller Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces the averaged gradient of a matrix with the
nearest orthogonal matrix, so that all directions learn equally fast.
"""

import inspect
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch.optim.adamw import adamw

from configurator import UserError
from model import GPT

# X -> a X + b X X' X + c X X' X X' X drives the singular values of X toward 1. Jordan's coefficients trade accuracy
# for speed: most values end between 0.7 and 1.2, the smallest ones of square matrices as low as 0.06.
NEWTON_SCHULZ_COEFFS = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
MUON_MOMENTUM = 0.9  # Jordan uses 0.95; short runs reach a lower loss with 0.9 (docs/speed.md)
RELATIVE_LR_SCALE = 100.0  # lr multiplier for the relative table: biases grow to about -5 while weights stay near 0.02
NGRAM_LR_SCALE = 3.0  # lr multiplier for the n-gram table: each entry is rarely used
FARTHEST_BIAS_DROP = 8.0  # scores beyond the relative table get its lowest bias minus this many nats


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer settings."""

    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: use Muon for matrices (lowers the loss of short runs by 0.05)
    learning_rate: Annotated[float, ">=", 0] = 6e-4  # peak learning rate
    muon_lr: Annotated[float, ">=", 0] = 0.03  # peak learning rate for matrices updated by Muon
    weight_decay: Annotated[float, ">=", 0] = 0.1  # weight decay for matrices and embeddings
    beta1: Annotated[float, ">=", 0, "<", 1] = 0.9  # decay rate of AdamW's running average of gradients
    beta2: Annotated[float, ">=", 0, "<", 1] = 0.95  # decay rate for squared gradients; 0.99 suits small batches
    grad_clip: Annotated[float, ">=", 0] = 1.0  # maximum gradient norm; 0 disables clipping

    def __post_init__(self):
        if self.optimizer == "muon" and self.learning_rate == 0:
            reason = "because muon_lr is scaled with it"
            raise UserError(f"optimizer=muon requires learning_rate > 0, {reason}: set a small learning_rate")


def make_optimizer(model: GPT, cfg: OptimConfig, device_type: str) -> "Optimizer":
    """Create the optimizer that cfg selects, with the parameter groups of GPT.configure_optimizers()."""
    betas, lr = (cfg.beta1, cfg.beta2), cfg.learning_rate
    settings: dict[str, dict] = {"relative": dict(lr_scale=RELATIVE_LR_SCALE)}
    settings["ngrams"] = dict(rule="rows", lr_scale=NGRAM_LR_SCALE)
    if cfg.optimizer == "muon":
        settings["blocks"] = dict(rule="muon", lr_scale=cfg.muon_lr / lr)
    optimizer = model.configure_optimizers(cfg.weight_decay, lr, betas, device_type, Optimizer, settings)
    set_learning_rate(optimizer, lr)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float):
    """Set the learning rate of each parameter group to learning_rate times the group's lr_scale."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1)


def describe_groups(optimizer: torch.optim.Optimizer) -> str:
    """Return nanoGPT's summary of the parameters with and without weight decay."""
    sizes: dict[str, list[int]] = {"decayed": [], "non-decayed": []}
    lines = [f"using fused AdamW: {optimizer.defaults['fused']}"]
    for group in optimizer.param_groups:
        for p in group["params"]:
            sizes["decayed" if p.dim() >= 2 and group.get("rule") != "rows" else "non-decayed"].append(p.numel())
        if group.get("rule") == "muon":
            lines.append(f"Muon updates {len(group['params'])} matrices, and AdamW updates the rest")
    counts = [f"num {kind} parameter tensors: {len(n)}, with {sum(n):,} parameters" for kind, n in sizes.items()]
    return "\n".join(counts + lines)


class Optimizer(torch.optim.Optimizer):
    """AdamW (same state as torch.optim.AdamW), Muon for groups with rule="muon", row-wise Adam with rule="rows"."""

    # PyTorch wraps these methods to exclude them from torch.compile. On its first call, the wrapper imports the
    # compiler, which is as slow as importing torch. Optimizers are not compiled here, so the wrapper is removed.
    add_param_group: Any = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    state_dict: Any = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict: Any = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    zero_grad: Any = inspect.unwrap(torch.optim.Optimizer.zero_grad)

    def __init__(self, groups, lr: float, betas=(0.9, 0.95), weight_decay: float = 0.0, fused: bool = False):
        super().__init__(groups, dict(lr=lr, betas=betas, eps=1e-8, weight_decay=weight_decay, fused=fused))

    @torch.no_grad()
    def step(self, closure=None):
        """Update all parameters that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params and group.get("rule") == "muon":
                self._muon_step(params, group)
            elif params and group.get("rule") == "rows":
                self._row_adam_step(params, group)
            elif params:
                self._adamw_step(params, group)

    def _adamw_step(self, params: list, group: dict):
        for p in params:
            if not (state := self.state[p]):
                device = p.device if group["fused"] else "cpu"  # unfused AdamW reads it, which would block on a GPU
                state["step"], state["exp_avg"] = torch.zeros((), device=device), torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
        grads = [p.grad for p in params]
        state_keys = "exp_avg", "exp_avg_sq", "step"
        exp_avgs, exp_avg_sqs, state_steps = ([self.state[p][key] for p in params] for key in state_keys)
        options = {key: group[key] for key in ("lr", "weight_decay", "eps", "fused")}
        options |= dict(beta1=group["betas"][0], beta2=group["betas"][1], amsgrad=False, maximize=False)
        # torch.optim.AdamW.step() calls this function too, but imports the compiler
        adamw(params, grads, exp_avgs, exp_avg_sqs, [], state_steps, **options)

    def _row_adam_step(self, params: list, group: dict):
        """Update tables in which each batch uses only a few rows. Gradients may be dense or sparse.

        This is Adam without momentum and with one second moment per row. A row without a gradient keeps its value and
        moment. If the moment decayed in the meantime, as in AdamW, the steps for rare rows would be too large.
        """
        beta2 = group["betas"][1]
        for p in params:
            if not (state := self.state[p]):
                state["square"], state["count"] = (torch.zeros(len(p), device=p.device) for _ in range(2))
            if p.grad.is_sparse:
                p.grad = p.grad.coalesce()
                rows, grad = p.grad.indices()[0], p.grad.values()
            else:
                rows, grad = slice(None), p.grad
            grad_sq = grad.square().mean(1)
            has_grad = grad_sq > 0
            state["count"][rows] += has_grad
            old_second_moment = state["square"][rows]
            state["square"][rows] = torch.where(has_grad, old_second_moment.lerp(grad_sq, 1 - beta2), old_second_moment)
            bias_correction = 1 - beta2 ** state["count"][rows]
            scale = torch.where(has_grad, (state["square"][rows] / bias_correction).rsqrt(), 0.0)
            p[rows] -= group["lr"] * scale[:, None] * grad

    def _muon_step(self, params: list, group: dict):
        """Update matrices with Muon; matrices of the same shape are orthogonalized together."""
        matrices_by_shape: dict[tuple[int, ...], list] = {}
        for p in params:
            if not (state := self.state[p]):
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(p.grad, 1 - MUON_MOMENTUM)
            update = p.grad.lerp(state["momentum"], MUON_MOMENTUM)  # Nesterov momentum
            for matrix, matrix_update in zip(split_qkv(p), split_qkv(update)):
                rows, columns = matrix.shape
                if rows > columns:  # wide matrices are cheaper
                    matrix, matrix_update = matrix.mT, matrix_update.mT
                scale = max(1, rows / columns) ** 0.5  # Jordan's; outputs of tall and square matrices change equally
                matrices_by_shape.setdefault(tuple(matrix.shape), []).append((matrix, matrix_update, scale))
        for same_shape_matrices in matrices_by_shape.values():
            updates = orthogonalize(torch.stack([update for _, update, _ in same_shape_matrices]))
            for (matrix, _, scale), update in zip(same_shape_matrices, updates):
                matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def split_qkv(weight) -> tuple[torch.Tensor, ...]:
    """Split a weight into its matrices (views): c_attn, (3 C, C), contains those of queries, keys and values."""
    rows, columns = weight.shape
    return weight.split(columns) if rows == 3 * columns else (weight,)


def orthogonalize(matrices):
    """Move the singular values of matrices (n, rows, columns), rows <= columns, close to 1 by Newton-Schulz steps.

    On a GPU this runs in bfloat16, whose rounding error is smaller than the error that remains after five steps.
    """
    a, b, c = NEWTON_SCHULZ_COEFFS
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # now all singular values are at most 1
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype)


@torch.no_grad()
def lower_farthest_bias(model: GPT):
    """After each update, set the last entry of the "relative" table to its lowest other entry minus FARTHEST_BIAS_DROP.

    Distances beyond the table also use this entry, but training uses it only once per window. Without this function,
    the entry would stay high, and in longer contexts the many distant tokens would drown out the near ones.
    """
    bias_table = model.transformer.relative.relative_embeddings.weight
    if bias_table.requires_grad and len(bias_table) > 1:
        bias_table[-1] = bias_table[:-1].amin(0) - FARTHEST_BIAS_DROP
