"""Packed weights on a CPU against exact arithmetic and the model's own forward pass."""

import copy
import math
import os
import shutil

import pytest
import torch
import torch.nn as nn
from helpers import all_logits, generated_ids, randn
from test_decoder import SCHEMES, ids, legacy, make, prompts
from torch.nn import functional as F

from dongpt import runtime
from dongpt.checkpoint.files import load_model, model_args, save
from dongpt.checkpoint.foreign import FORMAT_VERSION
from dongpt.checkpoint.legacy import MODEL_CLASSES
from dongpt.decode.decoder import KVCache
from dongpt.decode.quantize import Int8Linear, pack_model, quantize_linears
from dongpt.decode.ready import prepare_for_decoding
from dongpt.kernels import cpu
from dongpt.kernels.cpu import PackedBlocks, PackedLinear, pack_weight
from model import GPT, AttentionInputs

pytestmark = pytest.mark.usefixtures("one_thread")
smoke = pytest.mark.smoke
SLOW_INT8 = ", weights: int8 (requested), which saves memory but is slower"
each_scheme = pytest.mark.parametrize("pos_embd", SCHEMES)
each_kind = pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
needs_compiler = pytest.mark.skipif(not shutil.which(os.environ.get("CC", "gcc")), reason="no C compiler for cpu.c")
SHAPES = [
    (1, 1),
    (1, 300),
    (2, 7),
    (7, 2),
    (8, 8),
    (9, 3),
    (15, 33),
    (16, 16),
    (17, 5),
    (31, 65),
    (32, 64),
    (33, 100),
    (63, 1),
    (65, 383),
    (130, 384),
    (100, 385),
    (5, 769),
    (257, 31),
]
BATCHES = [*range(1, 10), 17, 64, 67, 130]


def random_linear(kind: str, N: int, K: int, bias: bool = True) -> nn.Linear | Int8Linear:
    torch.manual_seed(N * 1000 + K)
    linear = nn.Linear(K, N, bias=bias)
    for parameter in linear.parameters():
        nn.init.normal_(parameter)
    return Int8Linear(linear) if kind == "int8" else linear


def packed_linear(linear, kind: str) -> PackedLinear:
    return PackedLinear(linear, torch.bfloat16 if kind == "bfloat16" else torch.float32)


def exact_weight(linear, kind: str) -> torch.Tensor:
    """What the weights stand for, in float64."""
    if kind == "int8":
        return linear.weight.double() * linear.scale.double()[:, None]
    return linear.weight.detach().to(torch.bfloat16 if kind == "bfloat16" else torch.float32).double()


def assert_product(got, linear, kind: str, x, tolerance: float = 2e-6):
    """Check got = x times linear, to a share of the sum of what is added."""
    weight, bias = exact_weight(linear, kind), None if linear.bias is None else linear.bias.detach().double()
    expected, size = F.linear(x.double(), weight, bias), F.linear(x.double().abs(), weight.abs())
    size = size if bias is None else size + bias.abs()
    assert got.shape == expected.shape and ((got.double() - expected).abs() <= tolerance * size).all()


def unpacked(model: GPT, kind: str) -> GPT:
    """A copy in float32 whose Linears have the weights that packing in this kind keeps; embeddings are not rounded."""
    model = copy.deepcopy(model)
    if kind == "int8":
        quantize_linears(model)
    for linear in [module for module in model.modules() if isinstance(module, nn.Linear)] * (kind == "bfloat16"):
        linear.weight = nn.Parameter(linear.weight.detach().bfloat16().float())
    return model


def packed(model: GPT, kind: str) -> GPT:
    """A copy as prepare packs it."""
    model = copy.deepcopy(model)
    if kind == "int8":
        quantize_linears(model)
    pack_model(model, torch.bfloat16 if kind == "bfloat16" else torch.float32)
    return model


# ----------------------------------------------------------------------------------------------------------------------
# one layer


@needs_compiler
@pytest.mark.parametrize("bias", [True, False])
@each_kind
def test_a_packed_linear_gives_the_exact_product_for_all_shapes(kind, bias):
    for N, K in SHAPES:
        linear, x = random_linear(kind, N, K, bias), randn(max(BATCHES), K)
        fast = packed_linear(linear, kind)
        for M in BATCHES:
            assert_product(fast(x[:M]), linear, kind, x[:M])


@needs_compiler
@smoke
@each_kind
def test_a_packed_linear_takes_any_layout_and_dtype_of_x(kind):
    linear = random_linear(kind, 37, 21)
    fast, x = packed_linear(linear, kind), randn(6, 5, 21)
    assert_product(fast(x), linear, kind, x)
    assert fast(x[:0]).shape == (0, 5, 37) and fast(x[0, 0]).shape == (37,)
    for other in (x.transpose(0, 1), x[::2, 1:4], randn(6, 42)[:, ::2], randn(21, 9).T):
        assert not other.is_contiguous()
        assert_product(fast(other), linear, kind, other)
    half, before = x.bfloat16(), x.clone()
    assert fast(half).dtype == torch.bfloat16 and not fast(x).requires_grad
    assert_product(fast(half).float(), linear, kind, half, 0.01)
    assert fast(x.double()).dtype == torch.float64 and torch.equal(x, before)


@needs_compiler
@smoke
@each_kind
def test_a_row_does_not_depend_on_the_rows_beside_it(kind):
    for N, K in ((1, 5), (17, 33), (70, 400), (257, 31)):
        fast, x = packed_linear(random_linear(kind, N, K), kind), randn(130, K)
        whole = fast(x)
        for first, last in [*((i, i + 1) for i in range(0, 130, 3)), (3, 6), (60, 67), (1, 130), (0, 65), (5, 129)]:
            assert torch.equal(fast(x[first:last]), whole[first:last]), (first, last)


@needs_compiler
@each_kind
def test_numbers_of_threads_change_no_bit(kind):
    fast, x = packed_linear(random_linear(kind, 333, 200), kind), randn(67, 200)
    model = make(n_embd=64, n_head=4, block_size=16)
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        texts, logits = ids(40, 6), []
        decode(packed(model, kind), texts, logits)
        results.append((fast(x), torch.stack(logits)))
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0]) and torch.equal(result[1], results[0][1])


@smoke
def test_weights_are_packed_as_cpu_c_reads_them():
    weight = torch.arange(1.0, 11).view(5, 2)  # channels 0 to 4, two k each, in panels of 2 words times 2 lanes
    assert pack_weight(weight, 2).tolist() == [
        [[[[1], [3]], [[5], [7]]], [[[2], [4]], [[6], [8]]]],
        [[[[9], [0]], [[0], [0]]], [[[10], [0]], [[0], [0]]]],
    ]
    # panels of 2 lanes times 2 parts: channels 0 and 2 share a word
    expected = [[[[[1, 5], [3, 7]]], [[[2, 6], [4, 8]]]], [[[[9, 0], [0, 0]]], [[[10, 0], [0, 0]]]]]
    assert pack_weight(weight.bfloat16(), 2).tolist() == expected
    weight = torch.arange(1, 9, dtype=torch.int8).view(8, 1)  # four weights in a word
    assert pack_weight(weight, 2).tolist() == [[[[[1, 3, 5, 7], [2, 4, 6, 8]]]]]
    assert pack_weight(weight, 2).is_contiguous() and pack_weight(weight, 2).dtype == torch.int8
    assert pack_weight(weight.T.contiguous(), 2).tolist() == [[[[[i, 0, 0, 0], [0] * 4]] for i in range(1, 9)]]


@needs_compiler
@smoke
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@each_kind
def test_what_is_not_finite_stays_so_and_where_it_is(kind, value):
    x = randn(7, 20)
    linear = random_linear(kind, 37, 20)
    good = packed_linear(linear, kind)(x)
    spoilt = x.clone()
    spoilt[2, 5] = value
    got = packed_linear(linear, kind)(spoilt)
    assert not got[2].isfinite().any() and torch.equal(got[[0, 1, 3, 4, 5, 6]], good[[0, 1, 3, 4, 5, 6]])
    if kind != "int8":
        torch.testing.assert_close(
            got, F.linear(spoilt, exact_weight(linear, kind).float(), linear.bias), equal_nan=True
        )
    plain = random_linear("float32", 37, 20)
    with torch.no_grad():
        plain.weight[11, 3] = value
    got = packed_linear(Int8Linear(plain) if kind == "int8" else plain, kind)(x)
    others = [i for i in range(37) if i != 11]
    assert not got[:, 11].isfinite().any() and torch.equal(got[:, others], good[:, others])


# ----------------------------------------------------------------------------------------------------------------------
# all layers


@torch.no_grad()
def step(model: GPT, packed: PackedBlocks, cache: KVCache, newest, positions, n_held: int, start: int | None):
    """Logits (B, V) behind the newest tokens (B,), by packed."""
    held = cache.layer_caches(positions, n_held, start)
    x = packed.blocks(model.embed(newest[:, None], positions), model.attention_inputs(positions, held[0]), held)
    return packed.head(model.transformer.ln_f(x)[:, 0])


def decode(model: GPT, idx, logits: list):
    """Append the logits (B, V) at every position of idx (B, T), by packed blocks."""
    packed, cache = PackedBlocks(model), KVCache(model, len(idx))
    for t in range(idx.shape[1]):
        logits.append(step(model, packed, cache, idx[:, t], torch.tensor([t]), t + 1, t))


def assert_same_logits(got, expected, tolerance: float = 1e-5):
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(got, expected, atol=tolerance * scale, rtol=0)


ARCHITECTURES = [
    dict(),
    dict(bias=False, activation="gelu_tanh"),
    dict(n_embd=15, n_head=3),
    dict(n_embd=130, tie_weights=True, bias=False),
    dict(n_embd=65, n_head=1, activation="gelu_tanh"),
    dict(n_embd=16, n_head=1, tie_weights=True),
    dict(n_embd=3, n_head=3, n_layer=3),
]


def architectures(pos_embd: str) -> list[dict]:
    """Return the architectures that pos_embd supports: rope needs an even head size."""
    return [
        {**a, "n_embd": a.get("n_embd", 16) // a.get("n_head", 2) // 2 * 2 * a.get("n_head", 2) or 6}
        if pos_embd == "rope"
        else a
        for a in ARCHITECTURES
    ]


@needs_compiler
@smoke
@each_scheme
def test_packed_blocks_give_the_logits_of_a_full_pass_at_every_position(pos_embd):
    for changes in architectures(pos_embd):
        model, idx, got = make(pos_embd, block_size=20, **changes), ids(3, 20), []
        decode(model, idx, got)
        assert_same_logits(torch.stack(got, 1), all_logits(model, idx))


@needs_compiler
@each_scheme
def test_packed_blocks_give_the_logits_of_full_passes_where_rows_stand_at_different_positions(pos_embd):
    for changes in architectures(pos_embd):
        model, idx = make(pos_embd, block_size=20, **changes), ids(4, 20)
        packed, cache, expected = PackedBlocks(model), KVCache(model, 4), all_logits(model, idx)
        starts = torch.tensor([3, 0, 11, 7])
        with torch.no_grad():
            for row, n in enumerate(starts.tolist()):
                if n:
                    positions = torch.arange(n)
                    model.hidden_states(
                        idx[row : row + 1, :n], positions, cache.layer_caches(positions, n, 0, torch.tensor([row]))
                    )
        every = torch.arange(4)
        for t in range(9):
            at = starts + t
            got = step(model, packed, cache, idx[every, at], at[:, None], int(at.max()) + 1, None)
            assert_same_logits(got, expected[every, at])


@needs_compiler
@pytest.mark.parametrize(
    "pos_embd, kind",
    [
        *((pos_embd, "float32") for pos_embd in SCHEMES),
        ("default", "bfloat16"),
        ("rope", "bfloat16"),
        ("relative", "int8"),
        ("alibi", "int8"),
    ],
)
def test_packed_text_is_that_of_the_model_past_restarts(pos_embd, kind):
    for changes in architectures(pos_embd)[1:3]:
        model = make(pos_embd, **changes)
        slow, fast = unpacked(model, kind), packed(model, kind)
        for texts, settings in (
            (prompts(), dict(temperature=0)),
            ([[5, 6, 7]] * 3, dict(seed=2)),
            (prompts((2, 9)), dict(seed=3, temperature=0.7, top_k=9, min_p=0.01)),
        ):
            assert generated_ids(fast, texts, 14, **settings) == generated_ids(slow, texts, 14, **settings)
    assert generated_ids(fast, texts, 14, seed=1, use_kv_cache=False) == generated_ids(fast, texts, 14, seed=1)


@needs_compiler
@each_kind
def test_a_tied_embedding_keeps_its_precision_when_the_head_is_packed(kind):
    model = make(tie_weights=True)
    wte, fast = model.transformer.wte.weight.detach().clone(), packed(model, kind)
    assert torch.equal(fast.transformer.wte.weight, wte) and isinstance(fast.lm_head, PackedLinear)
    assert generated_ids(fast, prompts(), 20, seed=1) == generated_ids(unpacked(model, kind), prompts(), 20, seed=1)


@needs_compiler
@smoke
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("pos_embd", ["default", "rope"])
def test_saturated_attention_and_wide_activations_lose_no_precision(pos_embd, activation):
    model, idx, got = make(pos_embd, activation=activation, block_size=20, n_embd=32), ids(3, 20), []
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight[:64] *= 8  # queries and keys
            block.mlp.c_fc.weight *= 30
    inputs = []
    model.transformer.h[0].mlp.gelu.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    own = all_logits(model, idx)
    assert inputs[0].max() > 50 and inputs[0].min() < -50
    exact = all_logits(copy.deepcopy(model).double(), idx)
    decode(model, idx, got)
    error, own_error = ((t - exact).abs().max() / exact.abs().max() for t in (torch.stack(got, 1), own))
    assert error < max(1e-5, 3 * own_error) and own_error < 1e-3


def one_layer(C: int, activation: str = "gelu") -> GPT:
    """A model of one layer and head, whose matrices and biases are zero."""
    model = make(n_layer=1, n_head=1, n_embd=C, block_size=C, activation=activation)
    for name, parameter in model.transformer.h[0].named_parameters():
        parameter.data.fill_(1.0 if name in ("ln_1.weight", "ln_2.weight") else 0.0)
    return model


def layer_of_nothing(model: GPT, cache: KVCache, position: int, bias=None) -> torch.Tensor:
    """What the layer makes of zeros at this position, (C,)."""
    held = cache.layer_caches(torch.tensor([position]), position + 1, position)
    x = torch.zeros(1, 1, model.config.n_embd)
    return PackedBlocks(model).blocks(x, AttentionInputs(None, bias, False), held)[0, 0]


@needs_compiler
@smoke
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("width", [0.1, 1.0, 6.0, 50.0, 1e4, 1e15])
def test_gelu_is_exact_to_float32_over_all_its_range(activation, width):
    C = 37
    model = one_layer(C, activation)
    mlp, x = model.transformer.h[0].mlp, torch.linspace(-width, width, 4 * C)
    mlp.c_fc.bias.data.copy_(x)
    got = torch.zeros(4 * C)
    for part in range(4):  # of the inner channels, a quarter at a time comes out
        mlp.c_proj.weight.data.zero_()
        mlp.c_proj.weight.data[range(C), range(part * C, part * C + C)] = 1.0
        got[part * C : part * C + C] = layer_of_nothing(model, KVCache(model, 1), 0)
    expected = F.gelu(x.double(), approximate="tanh" if activation == "gelu_tanh" else "none")
    assert ((got - expected).abs() <= 5e-7 * x.abs().clamp(min=0.1)).all()


@needs_compiler
@smoke
@pytest.mark.parametrize("lowest", [-1e-3, -1.0, -20.0, -85.0, -1e4, -1e30])
def test_the_softmax_of_attention_is_exact_to_float32(lowest):
    C = 53
    model = one_layer(C)
    attn, cache = model.transformer.h[0].attn, KVCache(model, 1)
    cache.layers[0][1][0, 0] = torch.eye(C)  # so that what comes out are the shares
    attn.c_attn.bias.data[3 * C - 1] = 1.0
    attn.c_proj.weight.data.copy_(torch.eye(C))
    for offset in (0.0, 5.0):
        for scores in (torch.linspace(lowest, 0, C), torch.linspace(0, lowest, C)):
            got = layer_of_nothing(model, cache, C - 1, scores.view(1, 1, 1, C) + offset)
            expected = (scores + offset).double().softmax(0)
            assert ((got - expected).abs() <= 2e-6 * expected + 1e-35).all()


@needs_compiler
@pytest.mark.parametrize(
    "where, index, activation",
    [
        ("attn.c_attn.weight", (0, 3), "gelu"),
        ("attn.c_attn.weight", (20, 3), "gelu"),
        ("attn.c_attn.weight", (40, 3), "gelu"),
        ("attn.c_attn.bias", 1, "gelu"),
        ("attn.c_proj.weight", (2, 2), "gelu"),
        ("mlp.c_fc.weight", (63, 15), "gelu"),
        ("mlp.c_fc.weight", (63, 15), "gelu_tanh"),
        ("mlp.c_proj.bias", 0, "gelu"),
        ("ln_1.weight", 0, "gelu"),
        ("ln_2.bias", 15, "gelu_tanh"),
    ],
)
def test_a_weight_that_is_not_a_number_is_noticed(where, index, activation):
    model = make(activation=activation)
    model.transformer.h[1].get_parameter(where).data[index] = math.nan
    for kind in ("float32", "bfloat16"):
        for texts in ([[5]], prompts((2, 5))):
            with pytest.raises(ValueError, match="not finite"):
                list(packed(model, kind).stream(texts, 3))


# ----------------------------------------------------------------------------------------------------------------------
# models of load_model


def saved(folder, model: GPT) -> str:
    save(
        {"model": model.state_dict(), "model_args": model_args(model.config), "format_version": FORMAT_VERSION},
        str(folder / "ckpt.pt"),
    )
    return str(folder)


@needs_compiler
def test_a_loaded_model_is_packed_from_a_size_on_and_up_to_one(tmp_path, packed_models, monkeypatch):
    model, _ = load_model(saved(tmp_path, make()))
    size = model.get_num_matmul_params()
    for name, limit, used in (
        ("PACKING_MIN_PARAMS", size, 1),
        ("PACKING_MIN_PARAMS", size + 1, 0),
        ("PACKING_MIN_PARAMS", size, 1),
        ("WEIGHT_COPY_MAX_PARAMS", size, 1),
        ("WEIGHT_COPY_MAX_PARAMS", size - 1, 0),
    ):
        monkeypatch.setattr(cpu, name, limit)
        packed_models.clear()
        generated_ids(model, prompts((3,)), cpu.WEIGHT_COPY_MIN_TOKENS - 1)
        assert not packed_models
        generated_ids(model, prompts((3,)), cpu.WEIGHT_COPY_MIN_TOKENS)
        assert len(packed_models) == used, (name, limit)
        generated_ids(model, prompts((3,)), cpu.WEIGHT_COPY_MIN_TOKENS, use_kv_cache=False)
        assert len(packed_models) == used


@needs_compiler
@each_scheme
def test_a_loaded_model_writes_the_same_packed_stays_as_it_is_and_trains(tmp_path, packed_models, pos_embd):
    plain = make(pos_embd, tie_weights=True)
    plain.use_packed_weights = False
    model, _ = load_model(saved(tmp_path, plain))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for settings in (dict(temperature=0), dict(seed=3)):
        assert generated_ids(model, prompts(), 25, **settings) == generated_ids(plain, prompts(), 25, **settings)
    assert packed_models == [model, model]
    assert list(before) == list(model.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in before.items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    idx = ids(2, 8)
    losses = [m(idx, idx)[1] for m in (model.train(), plain.train())]
    losses[0].backward()
    assert losses[0] == losses[1] and all(p.grad is not None for p in model.parameters())


@needs_compiler
@smoke
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.lm_head.weight.mul_(-1),
        lambda model: model.transformer.h[1].mlp.c_fc.weight.data.mul_(-1),
        lambda model: model.transformer.h[0].ln_1.bias.data.fill_(2),
        lambda model: setattr(model.transformer.h[0].attn.c_attn, "weight", nn.Parameter(randn(48, 16))),
    ],
)
def test_a_changed_weight_is_seen_by_the_next_text(tmp_path, packed_models, change):
    model, _ = load_model(saved(tmp_path, make()))
    idx = ids(2, 3)
    first = model.generate(idx, 16, temperature=0)
    with torch.no_grad():
        change(model)
    second, plain = model.generate(idx, 16, temperature=0), copy.deepcopy(model)
    plain.use_packed_weights = False
    assert len(packed_models) == 2 and not torch.equal(first, second)
    assert torch.equal(second, plain.generate(idx, 16, temperature=0))


@needs_compiler
@smoke
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "autocast", "float64"])
def test_a_loaded_model_of_another_dtype_is_not_packed(tmp_path, packed_models, dtype):
    plain = make()
    model, _ = load_model(saved(tmp_path, plain), dtype=dtype if dtype.endswith("16") else "float32")
    if dtype != "autocast":
        plain.to(getattr(torch, dtype)), model.to(getattr(torch, dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "autocast"):
        assert generated_ids(model, prompts(), 15, seed=1) == generated_ids(plain, prompts(), 15, seed=1)
    assert not packed_models


@needs_compiler
@smoke
def test_a_copy_of_a_loaded_model_works_and_is_one_of_its_own(tmp_path, packed_models):
    model, _ = load_model(saved(tmp_path, make()))
    text, other = generated_ids(model, prompts(), 16, seed=1), copy.deepcopy(model)
    assert generated_ids(other, prompts(), 16, seed=1) == text and packed_models == [model, other]
    other.lm_head.weight.data.mul_(-1)
    assert generated_ids(other, prompts(), 16, seed=1) != text == generated_ids(model, prompts(), 16, seed=1)


@needs_compiler
@pytest.mark.parametrize("kind", [*MODEL_CLASSES, "bigram"])
def test_models_without_a_cache_are_never_packed_and_write_what_they_wrote(kind, packed_models):
    def fresh() -> GPT:
        return make(model_type="bigram") if kind == "bigram" else legacy(kind)

    plain, model = fresh(), fresh()
    assert generated_ids(model, prompts(), 15, seed=1) == generated_ids(plain, prompts(), 15, seed=1)
    rt, model = runtime.start("cpu"), fresh()
    assert prepare_for_decoding(model, rt) == rt.description
    assert generated_ids(model, prompts(), 15, seed=1) == generated_ids(plain, prompts(), 15, seed=1)
    if kind == "bigram":
        with pytest.raises(ValueError, match="no weights to quantize"):
            prepare_for_decoding(fresh(), rt, quantize="int8")
        return
    quantize_linears(plain)
    model = fresh()
    assert "packed" not in prepare_for_decoding(model, rt, quantize="int8")
    assert generated_ids(model, prompts(), 15, seed=1) == generated_ids(plain, prompts(), 15, seed=1)
    half = fresh()
    prepare_for_decoding(half, runtime.start("cpu", "bfloat16"), "bfloat16")
    assert half.transformer.wte.weight.dtype == torch.bfloat16 and generated_ids(half, prompts(), 5)
    assert not packed_models
