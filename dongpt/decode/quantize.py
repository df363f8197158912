"""Weight formats for inference: int8 needs half the memory of bfloat16; a CPU reads packed layers fast."""

from typing import Any, Callable

import torch
import torch.nn as nn
from torch.nn import functional as F

from configurator import UserError
from dongpt.kernels.cpu import PackedLinear


def quantize_weight(weight):
    """(int8 (N, K), float32 scale (N,)) such that weight (N, K) is close to int8 * scale[:, None].

    The largest absolute value in each row becomes 127.
    """
    weight = weight.detach().float()
    scale = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


class Int8Linear(nn.Module):
    """A Linear for inference with int8 weights and one scale per output channel; activations keep their dtype."""

    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight, scale = quantize_weight(linear.weight)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone(), persistent=False)

    def forward(self, x):
        y = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)


def quantize_linears(model: nn.Module):
    """Replace every Linear of model, including the head, with an Int8Linear. Raises UserError if there is none."""
    if not any(isinstance(module, nn.Linear) for module in model.modules()):
        raise UserError("quantize=int8: this model has no weights to quantize, drop the setting")
    _replace_modules(model, nn.Linear, Int8Linear)


def pack_model(model: Any, dtype: torch.dtype):
    """Prepare a GPT on a CPU for inference only: Linears packed in dtype (int8 stays int8), the rest in float32."""
    model.float()
    _replace_modules(model, (nn.Linear, Int8Linear), lambda linear: PackedLinear(linear, dtype))


def _replace_modules(model: nn.Module, module_types: type | tuple[type, ...], make_module: Callable[[Any], nn.Module]):
    """Replace each submodule of one of module_types with make_module(submodule)."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, module_types):
                setattr(module, name, make_module(child))
