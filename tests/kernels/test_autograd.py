"""Kernels with a hand-written backward against the plain references next to them, values and gradients."""

import math

import pytest
import torch

from dongpt.kernels import autograd
from model import rope_cos_sin

smoke = pytest.mark.smoke


def values_and_gradients(function, *inputs, **fixed):
    """The output of function, and the gradients of its inputs for a random gradient of the output."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    output = function(*inputs, **fixed)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype))
    return [output.detach(), *(x.grad for x in inputs)]


@smoke
@pytest.mark.parametrize("shape", [(2, 7, 3, 8), (1, 1, 1, 2), (3, 70, 2, 6)])
def test_rotate_agrees_with_its_reference(shape):
    q, k = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    rotation = rope_cos_sin(torch.arange(shape[1]), shape[-1])
    ours = values_and_gradients(lambda *qk: torch.stack(autograd.rotate(*qk, *rotation)), q, k)
    both = values_and_gradients(lambda *qk: torch.stack([autograd.rotate_reference(x, rotation) for x in qk]), q, k)
    torch.testing.assert_close(ours, both)


@smoke
@pytest.mark.parametrize("shape", [(2, 2, 9, 4), (1, 1, 1, 2), (5, 3, 70, 8)])
def test_biased_attention_agrees_with_its_reference(shape, monkeypatch):
    monkeypatch.setattr(autograd, "TILE_SCORES", 2**14)  # several tiles of sequences
    B, n_head, T, _ = shape
    q, k, v = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bias = torch.randn(1, n_head, T, T, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    bias = bias.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
    ours = values_and_gradients(autograd.biased_attention, q, k, v, bias)
    reference = values_and_gradients(autograd.biased_attention_reference, q, k, v, bias)
    reference[-1] = reference[-1].nan_to_num()
    torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-4)  # both compute the softmax in float32
