"""int8 weights: half the memory of bfloat16, and for one row on a CPU most of its time."""

import torch
import torch.nn as nn
from torch.nn import functional as F


def quantize(weight):
    """(int8 (N, K), float32 scale (N,)) with weight (N, K) close to int8 * scale[:, None]: the largest is 127."""
    weight = weight.detach().float()
    scale = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


class Int8Linear(nn.Module):
    """A Linear for inference whose weight is int8, with one scale for each output channel; x stays as it is."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight, scale = quantize(linear.weight)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone(), persistent=False)

    def forward(self, x):
        y = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)


def quantize_linears(model: nn.Module):
    """Replace each Linear of model, the head included, by an Int8Linear; embeddings keep their values.

    Raises ValueError for a model that has none.
    """
    if not any(isinstance(module, nn.Linear) for module in model.modules()):
        raise ValueError("quantize=int8: this model has no weights to quantize, leave it away")
    replace_modules(model, nn.Linear, Int8Linear)


def replace_modules(model: nn.Module, kinds, make):
    """Put make(child) in the place of each child in model that is one of these kinds."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, kinds):
                setattr(module, name, make(child))
