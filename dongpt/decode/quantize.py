"""Weight formats for inference: int8, which halves the memory of bfloat16, and packed layers for fast CPU decoding."""

from typing import Any, Callable

import torch
import torch.nn as nn
from torch.nn import functional as F

from configurator import UserError
from dongpt.kernels.cpu import PackedLinear


def quantize_weight(weight):
    """Return int8 values (N, K) and a float32 scale (N,) such that weight (N, K) is close to values * scale[:, None].

    The largest absolute value in each row is mapped to 127.
    """
    weight = weight.detach().float()
    scale = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


class Int8Linear(nn.Module):
    """Linear layer for inference with int8 weights and one scale per output channel. Activations keep their dtype."""

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
    """Replace every Linear in model, including the head, with an Int8Linear. Raises UserError if there is no Linear."""
    if not any(isinstance(module, nn.Linear) for module in model.modules()):
        raise UserError("quantize=int8: this model has no weights to quantize; remove the setting")
    _replace_modules(model, nn.Linear, Int8Linear)


def pack_model(model: Any, dtype: torch.dtype):
    """Prepare a GPT for CPU inference: pack Linears in dtype (int8 stays int8) and convert the rest to float32."""
    model.float()
    _replace_modules(model, (nn.Linear, Int8Linear), lambda linear: PackedLinear(linear, dtype))


def _replace_modules(model: nn.Module, module_types: type | tuple[type, ...], make_module: Callable[[Any], nn.Module]):
    """Replace each submodule that is an instance of module_types with make_module(submodule)."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, module_types):
                setattr(module, name, make_module(child))
