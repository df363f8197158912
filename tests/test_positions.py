"""The position schemes and the bigram, against formulas written out, slow loops and Hugging Face's rotary code."""

import copy
import math
import os
from dataclasses import replace

import pytest
import torch
from helpers import TINY_RUN, all_logits, assert_same_training, cached_logits, load, random_ids, run, write_corpus
from torch.nn import functional as F

import train
from dongpt.checkpoint import build_model
from dongpt.checkpoint.run import set_dropout
from dongpt.decode.decoder import KVCache
from dongpt.kernels.autograd import rotate
from model import GPT, GPTConfig, alibi_slopes, attend, rope_cos_sin

SCHEMES = ["default", "rope", "relative", "alibi", "default+relative"]
ENDLESS = ["rope", "relative", "alibi"]  # those that take sequences longer than block_size
WITH_TABLE = ["relative", "default+relative"]
TABLE = "transformer.relative.relative_embeddings.weight"
TINY = GPTConfig(block_size=8, vocab_size=23, n_layer=2, n_head=2, n_embd=16, tie_weights=False)

smoke = pytest.mark.smoke
each_scheme = pytest.mark.parametrize("pos_embd", SCHEMES)


def make(pos_embd: str = "default", seed: int = 0, std: float = 0.3, **changes) -> GPT:
    """A model in eval mode whose parameters are all random: gains about 1, the rest about 0."""
    model = build_model(replace(TINY, pos_embd=pos_embd, **changes)).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight"))
            parameter.copy_(torch.randn(parameter.shape) * std + (1.0 if gain else 0.0))
    return model


def table_of(model: GPT) -> torch.Tensor:
    return model.get_parameter(TABLE)


def gradients(model: GPT, idx, targets, call=None) -> dict[str, torch.Tensor]:
    """The loss, and its gradient by parameter; call stands for the model where it is given."""
    model.zero_grad()
    loss = (model if call is None else call)(idx, targets)[1]
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def assert_near(got, expected, tolerance: float, what: str = ""):
    """Check that no entry is off by more than tolerance times the largest entry."""
    assert got.shape == expected.shape, what
    error = (got.double() - expected.double()).abs().max().item()
    assert error <= tolerance * expected.abs().max().item() + 1e-9, f"{what}: off by {error}"


def assert_all_near(got: dict, expected: dict, tolerance: float):
    assert got.keys() == expected.keys()
    for name in got:
        assert_near(got[name], expected[name], tolerance, name)


def scores_by_hand(model: GPT, q, k) -> torch.Tensor:
    """Attention scores (B, nh, T, T) for q, k (B, nh, T, hs), before the causal mask."""
    T, hs, pos_embd, n_head = q.shape[2], q.shape[3], model.config.pos_embd, model.config.n_head
    if pos_embd == "rope":  # channels i and i + hs/2 are the parts of a complex number
        frequencies = 10000.0 ** (-torch.arange(0, hs, 2, dtype=torch.float64) / hs)
        turns = torch.exp(1j * torch.arange(T)[:, None] * frequencies)  # (T, hs/2)
        q, k = (torch.complex(x[..., : hs // 2], x[..., hs // 2 :]) * turns for x in (q, k))
        return (q @ k.mH).real / math.sqrt(hs)
    scores = q @ k.mT / math.sqrt(hs)
    if pos_embd == "alibi":
        slopes = [2 ** (-8 * i / n_head) for i in range(1, n_head + 1)]
        return scores - torch.tensor([[[slope * (i - j) for j in range(T)] for i in range(T)] for slope in slopes])
    if pos_embd in WITH_TABLE:
        table = table_of(model)
        bias = [torch.stack([table[min(max(i - j, 0), len(table) - 1)] for j in range(T)]) for i in range(T)]
        return scores + torch.stack(bias).permute(2, 0, 1)
    return scores


def attention_by_hand(model: GPT, q, k, v) -> torch.Tensor:
    """Causal attention (B, nh, T, hs)."""
    T = q.shape[2]
    future = torch.ones(T, T).tril() == 0
    return scores_by_hand(model, q, k).masked_fill(future, -math.inf).softmax(-1) @ v


def model_by_hand(model: GPT, idx, targets):
    """Logits (B, T, V) and loss, from the parameters of model."""
    T, config, parts = idx.shape[1], model.config, model.transformer
    x = parts.wte.weight[idx]
    if config.pos_embd in ("default", "default+relative"):
        x = x + parts.wpe.weight[:T]
    for block in parts.h:
        q, k, v = (
            t.unflatten(2, (config.n_head, -1)).transpose(1, 2)
            for t in block.attn.c_attn(block.ln_1(x)).split(config.n_embd, dim=2)
        )
        x = x + block.attn.c_proj(attention_by_hand(model, q, k, v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.ln_2(x))
    logits = model.lm_head(parts.ln_f(x))
    return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# ----------------------------------------------------------------------------------------------------------------------
# configuration and parameters


@smoke
@each_scheme
def test_each_scheme_has_its_parameters_and_no_others(pos_embd):
    shapes = {
        name: tuple(p.shape)
        for name, p in GPT(replace(TINY, pos_embd=pos_embd, n_head=4)).named_parameters()
        if not name.startswith(("transformer.h.", "transformer.ln_f", "lm_head"))
    }
    expected = {"transformer.wte.weight": (23, 16)}
    if pos_embd in ("default", "default+relative"):
        expected["transformer.wpe.weight"] = (8, 16)
    if pos_embd in WITH_TABLE:
        expected[TABLE] = (8, 4)
    assert shapes == expected


@smoke
@each_scheme
def test_the_state_dict_holds_parameters_alone(pos_embd):
    model = GPT(replace(TINY, pos_embd=pos_embd))
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


@smoke
@pytest.mark.parametrize("pos_embd", WITH_TABLE)
def test_the_table_is_zero_at_the_start_and_nothing_else_is(pos_embd):
    model = GPT(replace(TINY, pos_embd=pos_embd))
    assert {name for name, p in model.named_parameters() if p.dim() >= 2 and not p.any()} == {TABLE}


@smoke
def test_default_plus_relative_with_a_zero_table_equals_default():
    plain, extended, idx = make(), make("default+relative", seed=1), random_ids(3, 8)
    missing = extended.load_state_dict(plain.state_dict(), strict=False)
    assert missing.missing_keys == [TABLE] and not missing.unexpected_keys
    assert not torch.allclose(all_logits(extended, idx), all_logits(plain, idx), atol=1e-2)
    torch.nn.init.zeros_(table_of(extended))
    torch.testing.assert_close(all_logits(extended, idx), all_logits(plain, idx), atol=1e-5, rtol=1e-5)


@smoke
def test_an_unknown_scheme_is_refused_and_the_known_ones_are_named():
    with pytest.raises(ValueError) as caught:
        GPTConfig(pos_embd="ropee")
    assert all(name in str(caught.value) for name in ["pos_embd", "ropee", "absolute", *SCHEMES])


@smoke
@pytest.mark.parametrize("n_embd, n_head", [(6, 2), (15, 3), (7, 7), (132, 12)])
def test_rope_refuses_odd_head_sizes_and_says_what_to_do(n_embd, n_head):
    with pytest.raises(ValueError) as caught:
        GPTConfig(pos_embd="rope", n_embd=n_embd, n_head=n_head)
    assert all(part in str(caught.value) for part in ("rope", f"n_embd={n_embd}", f"n_head={n_head}", "even"))
    for pos_embd in ("default", "relative", "alibi", "default+relative"):
        GPTConfig(pos_embd=pos_embd, n_embd=n_embd, n_head=n_head)


@smoke
@pytest.mark.parametrize("n_head", [1, 2, 6, 8, 12, 16])
def test_alibi_slopes_are_the_geometric_sequence_of_the_paper(n_head):
    assert alibi_slopes(n_head).tolist() == pytest.approx([2 ** (-8 * i / n_head) for i in range(1, n_head + 1)])


@smoke
@each_scheme
def test_parameter_count_leaves_out_wpe_alone(pos_embd):
    model = make(pos_embd)
    count = sum(p.numel() for p in model.parameters())
    assert model.get_num_params(non_embedding=False) == count
    assert model.get_num_params() == count - (8 * 16 if "default" in pos_embd else 0)


@smoke
@each_scheme
def test_every_parameter_is_in_exactly_one_optimizer_group(pos_embd):
    model = make(pos_embd)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# against references


@smoke
@pytest.mark.parametrize("T", [1, 8])
@each_scheme
def test_logits_loss_and_gradients_equal_the_formula(pos_embd, T):
    model, idx, targets = make(pos_embd), random_ids(3, T), random_ids(3, T, seed=1)
    exact = copy.deepcopy(model).double()
    assert_near(all_logits(model, idx), model_by_hand(exact, idx, targets)[0].detach(), 1e-5)
    by_hand = gradients(exact, idx, targets, lambda *batch: model_by_hand(exact, *batch))
    assert_all_near(gradients(model, idx, targets), by_hand, 1e-4)


@pytest.mark.parametrize("n_head", [2, 3])
@pytest.mark.parametrize("pos_embd", ENDLESS)
def test_logits_and_gradients_equal_the_formula_beyond_block_size(pos_embd, n_head):
    model, idx, targets = (
        make(pos_embd, n_head=n_head, n_embd=12, block_size=20),
        random_ids(2, 70),
        random_ids(2, 70, seed=1),
    )
    exact = copy.deepcopy(model).double()
    assert_near(all_logits(model, idx), model_by_hand(exact, idx, targets)[0].detach(), 1e-4)
    by_hand = gradients(exact, idx, targets, lambda *batch: model_by_hand(exact, *batch))
    assert_all_near(gradients(model, idx, targets), by_hand, 1e-3)


@smoke
@each_scheme
def test_every_parameter_gets_a_gradient(pos_embd):
    model = make(pos_embd, vocab_size=8)
    idx = torch.arange(8).expand(2, 8)  # each id and each position
    for name, gradient in gradients(model, idx, random_ids(2, 8, vocab_size=8)).items():
        if name == TABLE or name.endswith(("wte.weight", "wpe.weight")):  # no row is left out
            assert gradient.abs().amax(dim=1).min() > 0, name
        assert torch.isfinite(gradient).all() and gradient.any(), name


def hugging_faces_rotation(q, k, positions):
    """q, k (B, nh, T, hs) turned by Llama's code at positions (B, T)."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    _, n_head, T, hs = q.shape
    config = LlamaConfig(hidden_size=n_head * hs, num_attention_heads=n_head, max_position_embeddings=T)
    return apply_rotary_pos_emb(q, k, *LlamaRotaryEmbedding(config)(q, positions))


@pytest.mark.parametrize("head_size", [2, 6, 8, 64])
@pytest.mark.parametrize("first, tolerance", [(0, 1e-5), (1000, 1e-3)])  # an angle is known to a share of its size
def test_rope_equals_hugging_faces_rotary_code(head_size, first, tolerance):
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 3, 40, head_size)  # (B, nh, T, hs)
    positions = torch.stack([torch.arange(40) + first, torch.randperm(40) + first])  # (B, T)
    theirs = hugging_faces_rotation(q, k, positions)
    rotation = rope_cos_sin(positions, head_size)
    ours = rotate(q.transpose(1, 2), k.transpose(1, 2), *rotation)
    for got, expected in zip(ours, theirs):
        got = got.transpose(1, 2)
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)


def test_rotation_has_the_gradient_of_finite_differences():
    torch.manual_seed(0)
    rotation = [t.double() for t in rope_cos_sin(torch.tensor([0, 3, 11]), 6)]
    x = torch.randn(2, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    y = torch.randn_like(x, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *qk: rotate(*qk, *rotation), (x, y))
    assert torch.autograd.gradgradcheck(lambda *qk: rotate(*qk, *rotation), (x, y))


@smoke
def test_rotation_of_bfloat16_is_that_of_float32_rounded_once():
    x, rotation = torch.randn(2, 30, 3, 8).bfloat16(), rope_cos_sin(torch.arange(30), 8)
    rounded, exact = rotate(x, x, *rotation)[0], rotate(x.float(), x.float(), *rotation)[0]
    assert torch.equal(rounded, exact.bfloat16())


@smoke
def test_rotation_leaves_its_input_and_the_lengths_of_pairs():
    x, rotation = torch.randn(2, 30, 3, 8), rope_cos_sin(torch.arange(30), 8)
    before = x.clone()
    turned = rotate(x, -x, *rotation)[0]
    assert torch.equal(x, before) and torch.equal(turned[:, 0], x[:, 0])
    pairs = [t[..., :4].square() + t[..., 4:].square() for t in (x, turned)]
    torch.testing.assert_close(*pairs, atol=1e-5, rtol=1e-5)


def qkv(B, n_head, T, head_size, dtype) -> list[torch.Tensor]:
    """q, k, v and a gradient of the output, (B, nh, T, hs) each, laid out in memory as the model's."""
    torch.manual_seed(0)
    return list(torch.randn(4, B, T, n_head, head_size).to(dtype).transpose(2, 3))


def attention_of(model: GPT, q, k, v) -> torch.Tensor:
    """Attention of q, k, v under the model's bias; float64 q take a float64 bias."""
    bias = model.attention_inputs(torch.arange(q.shape[2])).bias
    return attend(q, k, v, bias.double() if q.dtype == torch.float64 else bias, 0.0)


SHAPES = [
    (1, 1, 1, 2, 4),
    (2, 2, 8, 8, 8),
    (3, 2, 64, 4, 64),
    (3, 2, 65, 4, 65),
    (2, 3, 100, 16, 40),
    (2, 1, 128, 64, 200),
    (1, 12, 150, 5, 1),
    (23, 4, 200, 8, 64),
]  # the last is more than one piece of the batch


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-5), (torch.float32, 1e-4), (torch.bfloat16, 0.02)], ids=str
)
@pytest.mark.parametrize("B, n_head, T, head_size, block_size", SHAPES)
def test_attention_with_a_table_and_its_gradients_equal_autograd(B, n_head, T, head_size, block_size, dtype, tolerance):
    model = make("relative", n_head=n_head, n_embd=n_head, block_size=block_size, std=1.0)
    *inputs, weights = qkv(B, n_head, T, head_size, dtype)
    inputs = [t.detach().requires_grad_() for t in inputs]
    got = attention_of(model, *inputs)
    assert got.dtype == dtype
    got = [got, *torch.autograd.grad(got, [*inputs, table_of(model)], weights)]

    exact = copy.deepcopy(model).double()
    inputs = [t.detach().double().requires_grad_() for t in inputs]
    distance = (torch.arange(T)[:, None] - torch.arange(T)).clamp(0, block_size - 1)
    scores = inputs[0] @ inputs[1].mT / math.sqrt(head_size) + table_of(exact)[distance].permute(2, 0, 1)
    expected = scores.masked_fill(torch.ones(T, T).tril() == 0, -math.inf).softmax(-1) @ inputs[2]
    expected = [expected, *torch.autograd.grad(expected, [*inputs, table_of(exact)], weights.double())]
    # T = 1 and a table of one entry add the same to all that is looked at: the gradient is 0 but for rounding
    scale = max(t.abs().max().item() for t in expected[1:])
    for name, one, other in zip(("output", "q", "k", "v", "table"), got, expected):
        largest = max(other.abs().max().item(), 0.1 * scale)
        assert (one.double() - other).abs().max() <= tolerance * largest, name


@pytest.mark.parametrize("B, n_head, T, head_size", [(2, 2, 5, 3), (1, 1, 67, 2)])
def test_attention_with_a_table_has_the_gradient_of_finite_differences(B, n_head, T, head_size):
    model = make("relative", n_head=n_head, n_embd=n_head)
    fixed = model.attention_inputs(torch.arange(T)).bias.detach().double()
    distance = (torch.arange(T)[:, None] - torch.arange(T)).clamp(0, 3)
    table = torch.randn(n_head, 4, dtype=torch.float64)
    inputs = [t.detach().requires_grad_() for t in [*qkv(B, n_head, T, head_size, torch.float64)[:3], table]]
    assert torch.autograd.gradcheck(
        lambda q, k, v, table: attend(q, k, v, fixed + table[:, distance], 0.0), inputs, eps=1e-4, atol=1e-4, rtol=1e-4
    )


@smoke
@pytest.mark.parametrize("pos_embd", WITH_TABLE)
def test_a_frozen_table_changes_no_other_gradient(pos_embd):
    model, batch = make(pos_embd), (random_ids(2, 8), random_ids(2, 8, seed=1))
    expected = gradients(model, *batch)
    model.zero_grad()
    table_of(model).requires_grad_(False)
    model(*batch)[1].backward()
    assert table_of(model).grad is None
    got = {name: p.grad for name, p in model.named_parameters() if name != TABLE}
    assert_all_near(got, {name: expected[name] for name in got}, 1e-5)


@smoke
@each_scheme
def test_attention_takes_a_flash_kernel(pos_embd):
    """In training, evaluation and cached decoding. sdpa_kernel raises if a flash kernel is not possible.

    Other kernels store all scores.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model, idx = make(pos_embd), random_ids(2, 8)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        model.generate(idx[:, :3], 12, temperature=0)
        all_logits(model, idx)
        model.train()
        model(idx, idx)[1].backward()


# ----------------------------------------------------------------------------------------------------------------------
# what positions may and may not do


def lengths_to_try(pos_embd: str) -> list[int]:
    return [8, 30, 70] if pos_embd in ENDLESS else [8]


@smoke
@each_scheme
def test_changing_a_token_leaves_the_logits_before_it(pos_embd):
    model = make(pos_embd)
    for T in lengths_to_try(pos_embd):
        idx = random_ids(2, T)
        before = all_logits(model, idx)
        for t in {*range(0, T, 7), T - 1}:
            changed = idx.clone()
            changed[:, t:] = (changed[:, t:] + 1) % 23
            after = all_logits(model, changed)
            assert torch.equal(after[:, :t], before[:, :t])
            assert not torch.allclose(after[:, t], before[:, t])


@smoke
@each_scheme
def test_logits_of_a_prefix_do_not_depend_on_how_long_the_text_gets(pos_embd):
    model = make(pos_embd)
    for T in lengths_to_try(pos_embd):
        idx = random_ids(2, T)
        whole = all_logits(model, idx)
        for t in {1, 2, 5, 8, T // 2, T - 1, T}:
            torch.testing.assert_close(all_logits(model, idx[:, :t]), whole[:, :t], atol=1e-4, rtol=1e-4)


@smoke
@each_scheme
def test_order_matters(pos_embd):
    """In one layer the last token sees the others as a set, but for positions."""
    model, idx = make(pos_embd, n_layer=1), torch.arange(8)[None]
    last = all_logits(model, idx)[:, -1]
    for a, b in ((0, 1), (2, 6), (0, 6)):
        swapped = idx.clone()
        swapped[:, [a, b]] = swapped[:, [b, a]]
        assert (all_logits(model, swapped)[:, -1] - last).abs().max() > 1e-3, (a, b)


@smoke
def test_without_positions_order_does_not_matter():
    """What test_order_matters relies on."""
    model, idx = make("relative", n_layer=1), torch.arange(8)[None]
    torch.nn.init.zeros_(table_of(model))
    swapped = torch.tensor([[6, 1, 2, 3, 4, 5, 0, 7]])
    torch.testing.assert_close(all_logits(model, swapped)[:, -1], all_logits(model, idx)[:, -1], atol=1e-5, rtol=1e-5)


@smoke
@pytest.mark.parametrize("pos_embd", ENDLESS)
def test_scores_depend_on_the_distance_alone(pos_embd):
    """One query and one key at all positions: equal scores along each diagonal, other scores on other diagonals."""
    model, T = make(pos_embd), 30
    where = model.attention_inputs(torch.arange(T))
    q, k = torch.randn(2, 1, 1, 2, 8, generator=torch.Generator().manual_seed(0)).expand(2, 1, T, 2, 8)
    if where.rotation:
        q, k = rotate(q, k, *where.rotation)
    scores = q.transpose(1, 2) @ k.transpose(1, 2).mT / math.sqrt(8)  # (1, nh, T, T)
    scores = scores + (0.0 if where.bias is None else where.bias)
    by_distance = []
    for distance in range(T):
        diagonal = scores.diagonal(-distance, -2, -1)
        torch.testing.assert_close(diagonal, diagonal[..., :1].expand_as(diagonal), atol=1e-5, rtol=1e-5)
        by_distance.append(diagonal[..., 0].flatten())
    distinct = 8 if pos_embd == "relative" else T  # beyond its table, relative has one score
    by_distance = torch.stack(by_distance)
    assert torch.pdist(by_distance[:distinct]).min() > 1e-4
    assert distinct == T or torch.pdist(by_distance[distinct - 1 :]).max() < 1e-5


@smoke
@pytest.mark.parametrize("shift", [1, 100])
@each_scheme
def test_logits_stay_when_all_positions_shift_unless_they_are_absolute(pos_embd, shift):
    model, idx, T = make(pos_embd, block_size=200), random_ids(2, 20), 20
    with torch.no_grad():
        here, there = (model.hidden_states(idx, torch.arange(T) + first) for first in (0, shift))
    if pos_embd in ENDLESS:
        torch.testing.assert_close(there, here, atol=1e-3, rtol=1e-3)
    else:
        assert (there - here).abs().max() > 0.1


# ----------------------------------------------------------------------------------------------------------------------
# lengths


@smoke
@pytest.mark.parametrize("pos_embd", ENDLESS)
def test_schemes_without_wpe_take_sequences_longer_than_block_size(pos_embd):
    model, idx = make(pos_embd), random_ids(2, 40)
    logits, loss = model(idx, idx)
    assert logits.shape == (2, 40, 23) and torch.isfinite(logits).all() and torch.isfinite(loss)
    torch.testing.assert_close(model(idx)[0], logits[:, -1:], atol=1e-4, rtol=1e-4)
    wide = make(pos_embd, block_size=64)  # the same weights, but for the table
    if pos_embd == "relative":
        with torch.no_grad():
            narrow = table_of(model)
            table_of(wide).copy_(torch.cat([narrow, narrow[-1:].expand(56, -1)]))
            wide.load_state_dict({**model.state_dict(), TABLE: table_of(wide).clone()})
    torch.testing.assert_close(all_logits(wide, idx), logits.detach(), atol=1e-4, rtol=1e-4)


@smoke
@pytest.mark.parametrize("pos_embd", ["default", "default+relative"])
def test_schemes_with_wpe_refuse_them_with_both_lengths(pos_embd):
    model = make(pos_embd)
    for batch in ((random_ids(1, 9),), (random_ids(1, 9), random_ids(1, 9))):
        with pytest.raises(ValueError, match=r"9 tokens.*block_size=8"):
            model(*batch)
    assert torch.isfinite(model(random_ids(1, 8))[0]).all()


@smoke
@each_scheme
def test_cropping_keeps_the_logits_of_short_sequences(pos_embd):
    model, idx = make(pos_embd), random_ids(2, 5)
    before, table = all_logits(model, idx), table_of(model).detach().clone() if pos_embd in WITH_TABLE else None
    model.crop_block_size(5)
    assert model.config == replace(TINY, pos_embd=pos_embd, block_size=5)
    assert torch.equal(all_logits(model, idx), before)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes == {name: tuple(p.shape) for name, p in make(pos_embd, block_size=5).named_parameters()}
    if table is not None:
        assert torch.equal(table_of(model), table[:5])
    if pos_embd in ENDLESS:
        long = random_ids(2, 12)
        exact = copy.deepcopy(model).double()
        assert_near(all_logits(model, long), model_by_hand(exact, long, long)[0].detach(), 1e-4)
    else:
        with pytest.raises(ValueError, match="6 tokens.*block_size=5"):
            model(random_ids(1, 6))
    assert model.generate(idx, 12, seed=0).shape == (2, 17)
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model, idx, idx).values())


# ----------------------------------------------------------------------------------------------------------------------
# decoding

LENGTHS = (1, 3, 8, 9, 12, 30)


def writer(pos_embd: str, **changes) -> GPT:
    """A model whose texts are varied: what biases add is the same everywhere, so they are small."""
    model = make(pos_embd, vocab_size=97, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(0.1 if name.endswith("bias") else 3.0 if name.endswith("attn.c_proj.weight") else 1.0)
    return model


def greedy(model: GPT, rows, n: int, **settings) -> list[list[int]]:
    """The new ids of each row."""
    return torch.stack(list(model.stream(rows, n, temperature=0, **settings))).T.tolist()


def greedy_by_hand(model: GPT, row: list[int], n: int) -> list[int]:
    """New ids by a forward pass for each; when the block is full, the newest half stays."""
    block_size, held = model.config.block_size, 0
    for _ in row:
        held = held + 1 if held < block_size else max(1, block_size // 2)
    row = list(row)
    for _ in range(n):
        row.append(all_logits(model, torch.tensor([row[-held:]]))[0, -1].argmax().item())
        held = held + 1 if held < block_size else max(1, block_size // 2)
    return row[-n:]


@pytest.mark.parametrize(
    "pos_embd, block_size",
    [
        *((pos_embd, 7) for pos_embd in SCHEMES),
        ("default", 1),
        ("relative", 1),
        ("rope", 2),
        ("alibi", 2),
        ("rope", 16),
        ("default+relative", 16),
    ],
)
def test_greedy_text_is_the_same_with_and_without_cache_and_by_hand(pos_embd, block_size):
    model = writer(pos_embd, block_size=block_size)
    rows = [random_ids(n, seed=n, vocab_size=97).tolist() for n in LENGTHS]
    expected = [greedy_by_hand(model, row, 25) for row in rows]
    assert greedy(model, rows, 25) == expected
    assert greedy(model, rows, 25, use_kv_cache=False) == expected
    assert block_size < 7 or len({i for row in expected for i in row}) > 12  # dull texts would say little


@pytest.mark.parametrize(
    "pos_embd, block_size", [*((pos_embd, 7) for pos_embd in SCHEMES), ("alibi", 2), ("default", 16)]
)
def test_drawn_text_is_the_same_with_and_without_cache_and_in_any_batch(pos_embd, block_size):
    model = writer(pos_embd, block_size=block_size)
    rows = [random_ids(n, seed=n, vocab_size=97).tolist() for n in LENGTHS]
    text = [torch.stack(list(model.stream(rows, 40, seed=3, use_kv_cache=use))).T.tolist() for use in (True, False)]
    assert text[0] == text[1]
    assert torch.stack(list(model.stream(rows[:1], 40, seed=3))).T.tolist() == text[0][:1]
    assert all(len(set(row)) > 12 for row in text[0])


@smoke
@each_scheme
def test_cached_logits_equal_those_of_a_full_forward_pass(pos_embd):
    model = make(pos_embd, block_size=16)
    windows, cache = [random_ids(n, seed=n).tolist() for n in (5, 1, 9)], KVCache(model, 3)
    fresh = [len(window) for window in windows]
    with torch.no_grad():
        for step in range(7):
            expected = torch.cat([all_logits(model, torch.tensor([window]))[:, -1] for window in windows])
            got = cached_logits(model, cache, windows, fresh)
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
            windows, fresh = [[*window, step] for window in windows], [1, 1, 1]


# ----------------------------------------------------------------------------------------------------------------------
# dropout, other dtypes, torch.compile


@smoke
@each_scheme
def test_dropout_on_attention_weights_trains(pos_embd):
    model, batch = make(pos_embd, attn_dropout=0.3), (random_ids(4, 8), random_ids(4, 8, seed=1))
    still = gradients(make(pos_embd), *batch)
    assert_all_near(gradients(model, *batch), still, 1e-5)  # it acts in training only
    model.train()
    torch.manual_seed(0)
    first, second = gradients(model, *batch), gradients(model, *batch)
    assert first["loss"] != second["loss"] and first["loss"] != still["loss"]
    assert all(torch.isfinite(gradient).all() and gradient.any() for gradient in first.values())
    set_dropout(model, 0.0, 1e-9)  # the other kernel, and nothing is dropped
    assert_all_near(gradients(model, *batch), still, 1e-4)


@each_scheme
def test_bfloat16_models_train_and_generate(pos_embd):
    model, batch = make(pos_embd), (random_ids(4, 8), random_ids(4, 8, seed=1))
    exact = gradients(model, *batch)
    model = model.to(torch.bfloat16).train()
    got = gradients(model, *batch)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert_all_near(got, exact, 0.2)
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(model(*batch)[1])
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    model.eval()
    rows = [random_ids(n, seed=n).tolist() for n in LENGTHS]
    for use_kv_cache in (True, False):
        text = torch.stack(list(model.stream(rows, 30, seed=0, use_kv_cache=use_kv_cache)))
        assert text.shape == (30, len(rows)) and 0 <= text.min() and text.max() < 23


@smoke
@each_scheme
def test_bfloat16_logits_with_cache_are_near_those_without(pos_embd):
    model = make(pos_embd).to(torch.bfloat16)
    windows, cache = [random_ids(n, seed=n).tolist() for n in (2, 5)], KVCache(model, 2)
    with torch.no_grad():
        for fresh in ([2, 5], [1, 1], [1, 1]):
            expected = torch.cat([all_logits(model, torch.tensor([window]))[:, -1] for window in windows])
            assert_near(cached_logits(model, cache, windows, fresh), expected, 0.05)
            windows = [[*window, 3] for window in windows]


@smoke
@each_scheme
def test_autocast_trains(pos_embd):
    model, batch = make(pos_embd).train(), (random_ids(4, 8), random_ids(4, 8, seed=1))
    exact = gradients(model, *batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*batch)[1]
    model.zero_grad()
    loss.backward()
    got = {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}
    assert {t.dtype for t in got.values()} == {torch.float32}
    assert_all_near(got, exact, 0.2)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.eval().generate(batch[0], 12, seed=0, use_kv_cache=False).shape == (4, 20)


def compiled(model: GPT, backend: str):
    """model under torch.compile; skips where that does not work at all."""
    torch._dynamo.reset()
    try:
        torch.compile(lambda x: x * 2 + 1, backend=backend)(torch.ones(3))
    except Exception as error:  # no C++ compiler, no inductor for this platform, ...
        pytest.skip(f"torch.compile with {backend} does not work here: {type(error).__name__}")
    return torch.compile(model, backend=backend)


def check_compiled(pos_embd: str, backend: str):
    model = make(pos_embd, n_layer=1).train()
    batch = (random_ids(2, 8), random_ids(2, 8, seed=1))
    assert_all_near(gradients(model, *batch, compiled(model, backend)), gradients(model, *batch), 1e-4)


@pytest.mark.parametrize("pos_embd", ["rope", "relative"])
def test_traced_loss_and_gradients_equal_eager_ones(pos_embd):
    """All of torch.compile but the code that it writes; the compiled test has the other schemes."""
    check_compiled(pos_embd, "aot_eager")


@pytest.mark.compile
@each_scheme
def test_compiled_loss_and_gradients_equal_eager_ones(pos_embd):
    check_compiled(pos_embd, "inductor")


@pytest.mark.long
@pytest.mark.parametrize("to_compile", [False, True])
@each_scheme
def test_500_iterations_on_don_quixote_and_250_twice_end_the_same(pos_embd, to_compile, don_quixote, tmp_path):
    with open(don_quixote, encoding="utf-8", newline="") as file:
        data = write_corpus(tmp_path / "data", file.read())
    settings = [
        f"--data_dir={data}",
        f"--pos_embd={pos_embd}",
        f"--compile={to_compile}",
        "--device=cpu",
        "--n_layer=4",
        "--n_head=4",
        "--n_embd=128",
        "--block_size=64",
        "--batch_size=12",
        "--gradient_accumulation_steps=1",
        "--dropout=0.1",
        "--learning_rate=1e-3",
        "--min_lr=1e-4",
        "--warmup_iters=100",
        "--lr_decay_iters=500",
        "--eval_interval=250",
        "--eval_iters=5",
        "--log_interval=100",
    ]
    for out, max_iters, more in (("straight", 500, settings), ("halves", 250, settings), ("halves", 500, [])):
        run(
            "train.py",
            *(more or ["--init_from=resume"]),
            f"--max_iters={max_iters}",
            f"--out_dir={out}",
            cwd=tmp_path,
            timeout=900,
        )
    assert_same_training(tmp_path / "straight", tmp_path / "halves")
    assert load(tmp_path / "straight")["best_val_loss"] < 2.5  # nats; it was 4.4 at the start


# ----------------------------------------------------------------------------------------------------------------------
# the bigram


def bigram(**changes) -> GPT:
    return make(model_type="bigram", std=2.0, **changes)


def table_of_bigram(model: GPT) -> torch.Tensor:
    return model.get_parameter("transformer.wte.weight")


@smoke
def test_the_bigram_is_one_table():
    model = bigram()
    assert {name: tuple(p.shape) for name, p in model.state_dict().items()} == {"transformer.wte.weight": (23, 23)}
    assert model.config == replace(TINY, model_type="bigram")
    assert model.get_num_params() == model.get_num_params(non_embedding=False) == 23 * 23
    assert model.flops_per_token() == 0
    assert model.device == torch.device("cpu")


@smoke
def test_model_type_decides_what_is_made():
    assert type(build_model(TINY)) is GPT
    assert type(build_model(replace(TINY, model_type="bigram"))) is not GPT


@smoke
def test_a_new_bigram_guesses():
    torch.manual_seed(0)
    loss = build_model(replace(TINY, model_type="bigram"))(random_ids(8, 50), random_ids(8, 50, seed=1))[1]
    assert loss.item() == pytest.approx(math.log(23), abs=0.01) and loss.item() != math.log(23)


@smoke
@pytest.mark.parametrize("T", [1, 8, 9, 100])  # any length will do
def test_logits_of_the_bigram_are_rows_of_its_table(T):
    model, idx, targets = bigram(), random_ids(3, T), random_ids(3, T, seed=1)
    rows = table_of_bigram(model)[idx]
    logits, loss = model(idx, targets)
    assert torch.equal(logits, rows)
    assert torch.equal(model(idx)[0], rows[:, -1:])
    torch.testing.assert_close(loss, F.cross_entropy(rows.flatten(0, 1), targets.flatten()))


@smoke
def test_the_best_bigram_holds_the_logarithms_of_counts():
    model, text = bigram(), random_ids(1, 3000, vocab_size=5) ** 2 // 3
    counts = torch.zeros(23, 23, dtype=torch.float64).index_put_(
        (text[0, :-1], text[0, 1:]), torch.ones(2999).double(), accumulate=True
    )
    with torch.no_grad():
        table_of_bigram(model).copy_((counts + 1e-9).log())
    got = gradients(model, text[:, :-1], text[:, 1:])
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    entropy = -(counts * shares.clamp(min=1e-30).log()).sum() / 2999
    assert got["loss"].item() == pytest.approx(entropy.item(), rel=1e-5)
    assert got["transformer.wte.weight"].abs().max() < 1e-6


@smoke
@pytest.mark.parametrize("use_kv_cache", [True, False])
@pytest.mark.parametrize("block_size", [1, 8])
def test_greedy_text_of_the_bigram_follows_the_likeliest_pairs(use_kv_cache, block_size):
    model = bigram(block_size=block_size)
    following = table_of_bigram(model).argmax(1).tolist()
    rows = [random_ids(n, seed=n).tolist() for n in LENGTHS]
    for row, text in zip(rows, greedy(model, rows, 30, use_kv_cache=use_kv_cache)):
        for before, i in zip([row[-1], *text], text):
            assert i == following[before]


@smoke
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drawn_text_of_the_bigram_is_the_same_with_and_without_cache(dtype):
    model, idx = bigram().to(dtype), random_ids(3, 5)
    text = model.generate(idx, 40, seed=0)
    assert torch.equal(text, model.generate(idx, 40, seed=0, use_kv_cache=False))
    assert text.shape == (3, 45) and len({tuple(row) for row in text[:, 5:].tolist()}) == 3


@smoke
def test_the_bigram_learns():
    model, text = bigram(), torch.arange(24)[None] % 4  # 0 1 2 3 0 1 2 3 ...
    optimizer = model.configure_optimizers(0.0, 0.5, (0.9, 0.95), "cpu")
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(table_of_bigram(model))]
    untouched = table_of_bigram(model)[4:].clone()
    for _ in range(40):
        optimizer.zero_grad()
        model(text[:, :-1], text[:, 1:])[1].backward()
        optimizer.step()
    assert model(text[:, :-1], text[:, 1:])[1] < 0.05
    assert torch.equal(table_of_bigram(model)[4:], untouched)  # rows of ids that never came
    assert model.generate(text[:, :3], 6, temperature=0)[0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0]


@smoke
def test_the_bigram_takes_a_new_block_size_and_dropout():
    model, idx = bigram(), random_ids(2, 8)
    before = all_logits(model, idx)
    model.crop_block_size(4)
    set_dropout(model, 0.5, 0.5)
    assert (model.config.block_size, model.config.dropout, model.config.attn_dropout) == (4, 0.5, 0.5)
    assert torch.equal(all_logits(model.train(), idx), before)


def test_traced_bigram_equals_the_eager_one():
    model, batch = bigram(), (random_ids(2, 8), random_ids(2, 8, seed=1))
    assert_all_near(gradients(model, *batch, compiled(model, "aot_eager")), gradients(model, *batch), 1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# end to end


@pytest.mark.parametrize("setting", [*(f"--pos_embd={name}" for name in SCHEMES), "--model_type=bigram"])
@pytest.mark.usefixtures("in_a_folder_of_its_own")
def test_a_run_that_stops_and_goes_on_equals_a_straight_run(setting, tiny_data, capsys):
    args = [f"--data_dir={tiny_data}", *TINY_RUN, setting, "--attn_dropout=0.1"]
    assert train.main([*args, "--out_dir=straight", "--sample_tokens=20"]) == 0  # more than block_size
    assert train.main([*args, "--max_iters=2"]) == 0
    assert train.main(["--init_from=resume", "--out_dir=out", "--max_iters=6"]) == 0
    assert_same_training("out", "straight")
    weights, key = load("out")["model"], setting[2:].split("=")[0]
    assert load("out")["config"][key] == load("out")["model_args"].get(key, "default") == setting.split("=")[1]
    assert ("transformer.wpe.weight" in weights) == ("default" in setting)
    assert (TABLE in weights) == ("relative" in setting) and (TABLE not in weights or weights[TABLE].any())
    assert (set(weights) == {"transformer.wte.weight"}) == ("bigram" in setting)
    other = "--model_type=gpt" if "bigram" in setting else f"--pos_embd={'rope' if 'alibi' in setting else 'alibi'}"
    with pytest.raises(ValueError, match=key):
        train.main(["--init_from=resume", "--out_dir=out", "--max_iters=8", other])
    assert os.path.exists("out/log.jsonl") and "not bitwise" not in capsys.readouterr().out
