"""int8 weights against their formula."""

import pytest
import torch
import torch.nn as nn
from helpers import randn
from test_cpu import random_linear
from test_decoder import make

from dongpt.decode.quantize import Int8Linear, quantize_linears, quantize_weight

smoke = pytest.mark.smoke


@smoke
def test_int8_weights_are_off_by_half_a_step_at_most():
    weight = randn(50, 70) * torch.logspace(-20, 20, 50)[:, None]
    q, scale = quantize_weight(weight)
    assert q.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (50,)
    torch.testing.assert_close(scale, weight.abs().amax(1) / 127)
    assert (q.abs().amax(1) == 127).all() and q.min() >= -127
    error = (weight.double() - q.double() * scale.double()[:, None]).abs()
    assert (error <= 0.5001 * scale.double()[:, None]).all() and error.max() > 0
    assert (error / scale.double()[:, None]).mean() == pytest.approx(0.25, abs=0.02)


@smoke
@pytest.mark.parametrize("value", [0.0, 1e-42])
def test_rows_of_zeros_and_of_the_tiniest_numbers_are_quantized_to_finite_ones(value):
    weight = randn(3, 6)
    weight[1] = value
    q, scale = quantize_weight(weight)
    assert scale.isfinite().all() and (scale > 0).all()
    assert torch.allclose(q[1] * scale[1], weight[1], atol=1e-39) and (value or not q[1].any())
    linear = nn.Linear(6, 3)
    linear.weight.data.copy_(weight)
    got = Int8Linear(linear)(torch.ones(1, 6))
    assert got.isfinite().all() and got[0, 1] == pytest.approx(linear.bias[1].item())


@smoke
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_int8_linear_is_its_formula(dtype, bias):
    linear, x = random_linear("float32", 9, 30, bias), randn(4, 2, 30).to(dtype)
    q, scale = quantize_weight(linear.weight)
    got = Int8Linear(linear)(x)
    expected = (x.double() @ q.double().T) * scale.double() + (linear.bias.detach().double() if bias else 0)
    assert got.dtype == dtype
    torch.testing.assert_close(
        got.double(),
        expected,
        rtol=1e-4 if dtype == torch.float32 else 0.03,
        atol=1e-4 if dtype == torch.float32 else 0.1,
    )


@smoke
@pytest.mark.parametrize("tie_weights", [True, False])
def test_quantize_linears_replaces_every_linear_and_leaves_the_embeddings(tie_weights):
    model = make(tie_weights=tie_weights)
    wte, n = model.transformer.wte.weight.clone(), sum(isinstance(m, nn.Linear) for m in model.modules())
    quantize_linears(model)
    assert not any(isinstance(m, nn.Linear) for m in model.modules())
    assert sum(isinstance(m, Int8Linear) for m in model.modules()) == n == 9
    assert isinstance(model.lm_head, Int8Linear) and torch.equal(model.transformer.wte.weight, wte)
