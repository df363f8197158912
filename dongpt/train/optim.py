"""Optimizers: AdamW as in GPT-2, or Muon for the blocks' matrices and AdamW for the rest; sparse Adam for large tables.

    optimizer = make_optimizer(model, cfg, "cpu")      # cfg has the fields of OptimConfig
    set_learning_rate(optimizer, lr)                   # before each optimizer.step()

Muon: Keller Jordan et al. 2024, kellerjordan.github.io/posts/muon. It replaces the averaged gradient of a matrix by the
nearest orthogonal matrix, so that all directions learn equally fast.
"""

import inspect
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch.optim.adamw import adamw

from configurator import UserError
from model import GPT

# X -> a X + b X X' X + c X X' X X' X drives the singular values of X towards 1. Jordan's coefficients trade accuracy
# for speed: most values end between 0.7 and 1.2, the smallest ones of square matrices as low as 0.06.
NEWTON_SCHULZ_COEFFS = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
MUON_MOMENTUM = 0.9  # Jordan uses 0.95; short runs reach a lower loss with 0.9: docs/speed.md
RELATIVE_LR_SCALE = 100.0  # lr multiplier of the relative table: biases grow to about -5 while weights stay near 0.02
NGRAM_LR_SCALE = 3.0  # lr multiplier of the n-gram table: each entry is rarely used
FARTHEST_BIAS_DROP = 8.0  # scores beyond the relative table get its lowest bias minus this many nats


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer settings."""

    optimizer: Literal["adamw", "muon"] = "adamw"  # muon (for matrices) lowers the loss of short runs by 0.05
    learning_rate: Annotated[float, ">=", 0] = 6e-4  # peak learning rate
    muon_lr: Annotated[float, ">=", 0] = 0.03  # peak learning rate of the matrices that Muon updates
    weight_decay: Annotated[float, ">=", 0] = 0.1  # weight decay of matrices and embeddings
    beta1: Annotated[float, ">=", 0, "<", 1] = 0.9  # AdamW's decay of the gradient average
    beta2: Annotated[float, ">=", 0, "<", 1] = 0.95  # AdamW's decay of the squared average; 0.99 for small batches
    grad_clip: Annotated[float, ">=", 0] = 1.0  # maximum norm of the gradient; 0: no clipping

    def __post_init__(self):
        if self.optimizer == "muon" and self.learning_rate == 0:
            reason = "since muon_lr is scaled with it"
            raise UserError(f"optimizer=muon needs a learning_rate above 0, {reason}: set a small one")


def make_optimizer(model: GPT, cfg: OptimConfig, device_type: str) -> "Optimizer":
    """The optimizer that cfg names, for the parameter groups of GPT.configure_optimizers."""
    betas, lr = (cfg.beta1, cfg.beta2), cfg.learning_rate
    settings: dict[str, dict] = {"relative": dict(lr_scale=RELATIVE_LR_SCALE)}
    settings["ngrams"] = dict(rule="rows", lr_scale=NGRAM_LR_SCALE)
    if cfg.optimizer == "muon":
        settings["blocks"] = dict(rule="muon", lr_scale=cfg.muon_lr / lr)
    optimizer = model.configure_optimizers(cfg.weight_decay, lr, betas, device_type, Optimizer, settings)
    set_learning_rate(optimizer, lr)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float):
    """Set every group's learning rate, multiplied by its lr_scale, for the next update."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1)


def describe_groups(optimizer: torch.optim.Optimizer) -> str:
    """nanoGPT's lines about the parameters with weight decay (matrices and embeddings) and those without."""
    sizes: dict[str, list[int]] = {"decayed": [], "non-decayed": []}
    lines = [f"using fused AdamW: {optimizer.defaults['fused']}"]
    for group in optimizer.param_groups:
        for p in group["params"]:
            sizes["decayed" if p.dim() >= 2 and group.get("rule") != "rows" else "non-decayed"].append(p.numel())
        if group.get("rule") == "muon":
            lines.append(f"Muon updates {len(group['params'])} matrices, AdamW the rest")
    counts = [f"num {kind} parameter tensors: {len(n)}, with {sum(n):,} parameters" for kind, n in sizes.items()]
    return "\n".join(counts + lines)


class Optimizer(torch.optim.Optimizer):
    """AdamW with torch.optim.AdamW's state; Muon for groups with rule="muon", Adam by rows for rule="rows"."""

    # PyTorch wraps these methods to keep torch.compile out of them; the wrapper imports torch's compiler at the first
    # call, which is as slow as importing torch. Nothing here compiles an optimizer, so the wrapper is removed.
    add_param_group: Any = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    state_dict: Any = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict: Any = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    zero_grad: Any = inspect.unwrap(torch.optim.Optimizer.zero_grad)

    def __init__(self, groups, lr: float, betas=(0.9, 0.95), weight_decay: float = 0.0, fused: bool = False):
        super().__init__(groups, dict(lr=lr, betas=betas, eps=1e-8, weight_decay=weight_decay, fused=fused))

    @torch.no_grad()
    def step(self, closure=None):
        """One update of all parameters that have a gradient."""
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
                device = p.device if group["fused"] else "cpu"  # unfused AdamW reads it, which would stall a GPU
                state["step"], state["exp_avg"] = torch.zeros((), device=device), torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
        grads = [p.grad for p in params]
        state_keys = "exp_avg", "exp_avg_sq", "step"
        exp_avgs, exp_avg_sqs, state_steps = ([self.state[p][key] for p in params] for key in state_keys)
        options = {key: group[key] for key in ("lr", "weight_decay", "eps", "fused")}
        options |= dict(beta1=group["betas"][0], beta2=group["betas"][1], amsgrad=False, maximize=False)
        # the function that torch.optim.AdamW calls; AdamW's own step() would import the compiler
        adamw(params, grads, exp_avgs, exp_avg_sqs, [], state_steps, **options)

    def _row_adam_step(self, params: list, group: dict):
        """One update of tables of which a batch uses only a few rows, with dense or sparse gradients.

        Adam without momentum and with one second moment per row. A row without a gradient keeps its value and moment:
        if the moment decayed in the meantime, as in AdamW, the steps of rare rows would be too long.
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
        """One update by Muon; matrices of the same shape are orthogonalized together."""
        matrices_by_shape: dict[tuple[int, ...], list] = {}
        for p in params:
            if not (state := self.state[p]):
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(p.grad, 1 - MUON_MOMENTUM)
            update = p.grad.lerp(state["momentum"], MUON_MOMENTUM)  # Nesterov momentum
            for matrix, matrix_update in zip(split_qkv(p), split_qkv(update)):
                rows, columns = matrix.shape
                if rows > columns:  # wide matrices cost less
                    matrix, matrix_update = matrix.mT, matrix_update.mT
                scale = max(1, rows / columns) ** 0.5  # Jordan's: outputs change equally in tall and square matrices
                matrices_by_shape.setdefault(tuple(matrix.shape), []).append((matrix, matrix_update, scale))
        for same_shape_matrices in matrices_by_shape.values():
            updates = orthogonalize(torch.stack([update for _, update, _ in same_shape_matrices]))
            for (matrix, _, scale), update in zip(same_shape_matrices, updates):
                matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def split_qkv(weight) -> tuple[torch.Tensor, ...]:
    """The matrices in a weight, as views: c_attn's (3 C, C) has one each for queries, keys and values."""
    rows, columns = weight.shape
    return weight.split(columns) if rows == 3 * columns else (weight,)


def orthogonalize(matrices):
    """matrices (n, rows, columns), rows <= columns, with their singular values moved close to 1 by Newton-Schulz steps.

    On a GPU this runs in bfloat16, whose rounding error is smaller than the error remaining after five steps.
    """
    a, b, c = NEWTON_SCHULZ_COEFFS
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # now no singular value is above 1
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype)


@torch.no_grad()
def lower_farthest_bias(model: GPT):
    """Set the last entry of pos_embd=relative's table FARTHEST_BIAS_DROP below all others, after each update.

    Distances beyond the table use this entry too. Training uses it once per window and nothing beyond it. Without this
    it would stay high, and in a longer text the many distant tokens would drown out the near ones.
    """
    bias_table = model.transformer.relative.relative_embeddings.weight
    if bias_table.requires_grad and len(bias_table) > 1:
        bias_table[-1] = bias_table[:-1].amin(0) - FARTHEST_BIAS_DROP
