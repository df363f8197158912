"""model.py against independent references: Hugging Face's GPT-2, formulas written out, and slow loops."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import all_logits, cached_logits, generated_ids, random_ids

from dongpt.decode.decoder import KVCache
from dongpt.decode.sampling import context_len
from model import GPT, CausalSelfAttention, GPTConfig

pytestmark = pytest.mark.smoke

TINY = GPTConfig(block_size=8, vocab_size=23, n_layer=2, n_head=2, n_embd=16)


def make(config: GPTConfig = TINY, seed: int = 0, sharpen: float = 20.0, **changes) -> GPT:
    """A model in eval mode; weights times sharpen, so that its distributions are far from uniform."""
    torch.manual_seed(seed)
    model = GPT(replace(config, **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.mul_(sharpen if "wpe" in name or "wte" in name else sharpen / 4)
    return model


def writer(**changes) -> GPT:
    """A model whose texts are varied: a tied head would repeat the newest id."""
    return make(**{"tie_weights": False, "sharpen": 14.0, **changes})


# ----------------------------------------------------------------------------------------------------------------------
# the forward pass


def test_parameters_have_the_names_and_shapes_of_nanogpt():
    shapes = {name: tuple(weight.shape) for name, weight in GPT(replace(TINY, n_layer=1)).state_dict().items()}
    block = {
        "ln_1.weight": (16,),
        "ln_1.bias": (16,),
        "ln_2.weight": (16,),
        "ln_2.bias": (16,),
        "attn.c_attn.weight": (48, 16),
        "attn.c_attn.bias": (48,),
        "attn.c_proj.weight": (16, 16),
        "attn.c_proj.bias": (16,),
        "mlp.c_fc.weight": (64, 16),
        "mlp.c_fc.bias": (64,),
        "mlp.c_proj.weight": (16, 64),
        "mlp.c_proj.bias": (16,),
    }
    assert shapes == {
        "transformer.wte.weight": (23, 16),
        "transformer.wpe.weight": (8, 16),
        "lm_head.weight": (23, 16),
        "transformer.ln_f.weight": (16,),
        "transformer.ln_f.bias": (16,),
        **{f"transformer.h.0.{name}": shape for name, shape in block.items()},
    }


def test_bias_false_leaves_no_bias_anywhere():
    model = GPT(replace(TINY, bias=False))
    assert not [name for name, _ in model.named_parameters() if "bias" in name]
    assert torch.isfinite(model(random_ids(1, 8), random_ids(1, 8))[1])


@pytest.mark.parametrize("bias", [True, False])
def test_first_loss_is_that_of_guessing(bias):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=500, n_layer=4, n_head=4, n_embd=64, bias=bias))
    loss = model(random_ids(8, 32, vocab_size=500), random_ids(8, 32, seed=1, vocab_size=500))[1].item()
    assert abs(loss - math.log(500)) < 0.1  # small random logits, about 0.02 * sqrt(64) wide


def test_changing_a_token_leaves_the_logits_before_it():
    model, idx = make(), random_ids(2, 8)
    before = all_logits(model, idx)
    for t in range(8):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % 23
        after = all_logits(model, changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], atol=0, rtol=0)
        assert not torch.allclose(after[:, t], before[:, t])


def test_logits_of_a_prefix_do_not_depend_on_what_follows():
    model, idx = make(), random_ids(2, 8)
    whole = all_logits(model, idx)
    for t in range(1, 9):
        torch.testing.assert_close(all_logits(model, idx[:, :t]), whole[:, :t], atol=1e-4, rtol=1e-4)


def test_attention_equals_softmax_of_q_k_times_v():
    torch.manual_seed(0)
    attention = CausalSelfAttention(TINY).eval()
    x = torch.randn(3, 8, 16)
    q, k, v = (attention.c_attn(x)[:, :, i * 16 : (i + 1) * 16] for i in range(3))
    heads = []
    for h in range(2):
        at = slice(h * 8, (h + 1) * 8)
        scores = q[:, :, at] @ k[:, :, at].transpose(1, 2) / math.sqrt(8)  # (B, T, T)
        scores = scores.masked_fill(torch.ones(8, 8).tril() == 0, -math.inf)
        heads.append(scores.softmax(-1) @ v[:, :, at])
    by_hand = attention.c_proj(torch.cat(heads, dim=2))
    torch.testing.assert_close(attention(x), by_hand, atol=1e-6, rtol=1e-5)  # the order of sums differs


def test_without_targets_only_the_last_logits_come():
    model, idx = make(), random_ids(3, 5)
    logits, loss = model(idx)
    assert logits.shape == (3, 1, 23) and loss is None
    torch.testing.assert_close(logits[:, 0], all_logits(model, idx)[:, -1], atol=1e-4, rtol=1e-4)


def test_loss_is_the_mean_of_minus_log_probability():
    model, idx, targets = make(), random_ids(2, 8), random_ids(2, 8, seed=1)
    logits, loss = model(idx, targets)
    by_hand = [-logits[b, t].softmax(-1)[targets[b, t]].log() for b in range(2) for t in range(8)]
    torch.testing.assert_close(loss, torch.stack(by_hand).mean(), atol=1e-4, rtol=1e-5)


def test_target_of_minus_one_is_ignored():
    model, idx, targets = make(), random_ids(2, 8), random_ids(2, 8, seed=1)
    targets[:, 3:] = -1
    loss = model(idx, targets)[1]
    torch.testing.assert_close(loss, model(idx[:, :3], targets[:, :3])[1], atol=1e-4, rtol=1e-5)


def test_too_long_sequence_is_refused_with_both_lengths():
    with pytest.raises(ValueError, match=r"9 tokens.*block_size=8"):
        make()(random_ids(1, 9))


def test_dropout_acts_in_training_only():
    model, idx = make(dropout=0.5), random_ids(2, 8)
    torch.testing.assert_close(all_logits(model, idx), all_logits(make(), idx), atol=0, rtol=0)
    model.train()
    torch.manual_seed(1)
    assert not torch.allclose(all_logits(model, idx), all_logits(model, idx))


def test_dropout_on_attention_weights_acts_in_training_only():
    model, idx = make(attn_dropout=0.5), random_ids(2, 8)
    torch.testing.assert_close(all_logits(model, idx), all_logits(make(), idx), atol=0, rtol=0)
    model.train()
    torch.manual_seed(1)
    assert not torch.allclose(all_logits(model, idx), all_logits(model, idx))


def test_activations_are_the_exact_gelu_and_its_tanh_approximation():
    x = torch.linspace(-3, 3, 50)
    exact = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    tanh = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    torch.testing.assert_close(make().transformer.h[0].mlp.gelu(x), exact, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(make(activation="gelu_tanh").transformer.h[0].mlp.gelu(x), tanh, atol=1e-6, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# configuration, initialisation, optimizer, cost


@pytest.mark.parametrize(
    "changes, parts",
    [
        (dict(n_embd=770, n_head=12), ("n_embd=770", "n_head=12", "multiple")),
        (dict(n_embd=4, n_head=8), ("n_embd=4", "n_head=8")),
        (dict(n_head=0), ("n_head=0",)),
        (dict(n_layer=0), ("n_layer=0",)),
        (dict(block_size=0), ("block_size=0",)),
        (dict(vocab_size=0), ("vocab_size=0",)),
        (dict(dropout=1.0), ("dropout=1.0",)),
        (dict(dropout=-0.1), ("dropout=-0.1",)),
        (dict(attn_dropout=1.5), ("attn_dropout=1.5",)),
    ],
)
def test_architecture_that_cannot_be_is_refused(changes, parts):
    with pytest.raises(ValueError) as caught:
        GPTConfig(**changes)
    assert all(part in str(caught.value) for part in parts)


def test_suggested_n_embd_is_accepted():
    with pytest.raises(ValueError) as caught:
        GPTConfig(n_embd=130, n_head=12)
    suggested = int(str(caught.value).rsplit("n_embd=", 1)[1])
    assert GPTConfig(n_embd=suggested, n_head=12).n_embd == suggested and abs(suggested - 130) <= 6


def test_absolute_is_another_name_for_default_positions():
    assert GPTConfig(pos_embd="absolute") == GPTConfig(pos_embd="default") == GPTConfig()


def test_initial_weights_have_the_standard_deviations_of_gpt2():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=256, vocab_size=512, n_layer=3, n_head=4, n_embd=256))
    for name, weight in model.named_parameters():
        if weight.dim() >= 2:  # 65,536 draws or more each: the deviation is known to 1 %, 4 sigma
            expected = 0.02 / math.sqrt(2 * 3) if name.endswith("c_proj.weight") else 0.02
            assert weight.std().item() == pytest.approx(expected, rel=0.012), name
            assert abs(weight.mean().item()) < 5 * expected / math.sqrt(weight.numel()), name
        else:
            assert torch.equal(weight, torch.full_like(weight, 1.0 if name.endswith("weight") else 0.0)), name


def test_same_seed_gives_the_same_weights():
    first, second = make(seed=3), make(seed=3)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


def test_tied_weights_are_one_tensor_also_after_conversion_and_loading():
    model = make()
    for _ in range(2):
        assert model.lm_head.weight is model.transformer.wte.weight
        assert sum(p.numel() == 23 * 16 for p in model.parameters()) == 1
        model.load_state_dict(make(seed=1).state_dict())
        model = model.to(torch.bfloat16)
    assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()


def test_untied_weights_are_two_tensors_that_learn_apart():
    model = make(tie_weights=False)
    assert model.lm_head.weight.data_ptr() != model.transformer.wte.weight.data_ptr()
    assert not torch.equal(model.lm_head.weight, model.transformer.wte.weight)
    unused = 22  # in neither row of the batch: only the head, whose softmax sees every id, gets a gradient for it
    model(torch.zeros(1, 8, dtype=torch.int64), torch.ones(1, 8, dtype=torch.int64))[1].backward()
    assert model.transformer.wte.weight.grad[unused].abs().max() == 0 < model.lm_head.weight.grad[unused].abs().max()


@pytest.mark.parametrize("tie_weights", [True, False])
def test_every_parameter_is_in_exactly_one_optimizer_group(tie_weights):
    model = make(tie_weights=tie_weights)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.8, 0.9), "cpu")
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) and set(grouped) == {id(p) for p in model.parameters()}
    for group in optimizer.param_groups:
        assert group["lr"] == 1e-3 and tuple(group["betas"]) == (0.8, 0.9)
        assert {p.dim() >= 2 for p in group["params"]} == {group["weight_decay"] == 0.1}
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.1]


def test_optimizer_step_equals_adamw_by_hand():
    model = make()
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(random_ids(2, 8), random_ids(2, 8, seed=1))[1].backward()
    optimizer.step()
    for name, p in model.named_parameters():
        decay = 0.1 if p.dim() >= 2 else 0.0
        # after the first step the corrected moments are the gradient and its square: arxiv.org/abs/1711.05101
        expected = before[name] * (1 - 1e-2 * decay) - 1e-2 * p.grad / (p.grad.abs() + 1e-8)
        # rounding: g / (|g| + eps) is known less exactly where the gradient itself is about eps
        torch.testing.assert_close(p.detach(), expected, atol=1e-4, rtol=1e-4)


def test_parameter_count_by_hand():
    model = make()  # n_layer 2, n_embd 16, vocab_size 23, block_size 8, with biases
    block = (16 * 48 + 48) + (16 * 16 + 16) + (16 * 64 + 64) + (64 * 16 + 16) + 4 * 16
    assert model.get_num_params() == 2 * block + 23 * 16 + 2 * 16
    assert model.get_num_params(non_embedding=False) == 2 * block + 23 * 16 + 2 * 16 + 8 * 16


def test_flops_per_token_by_the_formula_of_palm():
    n_params = make().get_num_params(non_embedding=False) - 8 * 16  # without wpe
    assert make().flops_per_token() == 6 * n_params + 12 * 2 * 16 * 8


def test_untied_head_costs_no_more_flops_than_a_tied_one():
    assert make(tie_weights=False).flops_per_token() == make().flops_per_token()  # a look-up in wte multiplies nothing


def test_cropping_keeps_the_logits_of_short_sequences():
    model, idx = make(), random_ids(2, 5)
    before = all_logits(model, idx)
    model.crop_block_size(5)
    assert model.config.block_size == 5 and model.transformer.wpe.weight.shape == (5, 16)
    torch.testing.assert_close(all_logits(model, idx), before, atol=0, rtol=0)
    with pytest.raises(ValueError, match="block_size=5"):
        model(random_ids(1, 6))
    assert model.generate(idx, 12, seed=0).shape == (2, 17)
    wpe = model.transformer.wpe.weight
    assert any(p is wpe for p in model.parameters()) and wpe.requires_grad


# ----------------------------------------------------------------------------------------------------------------------
# generate and stream


def test_generate_returns_the_prompt_and_the_new_ids():
    model, idx = writer(), random_ids(3, 4)
    out = model.generate(idx, 20, seed=0)
    assert out.shape == (3, 24) and out.dtype == torch.int64
    assert torch.equal(out[:, :4], idx) and out.min() >= 0 and out.max() < 23
    assert torch.equal(model.generate(idx, 0), idx)


@pytest.mark.parametrize("use_kv_cache", [True, False])
def test_greedy_equals_the_argmax_of_full_forward_passes(use_kv_cache):
    model, idx = writer(), random_ids(3, 2)
    expected = idx
    while expected.shape[1] < 9:  # the ninth token is the last that sees all before it
        expected = torch.cat([expected, all_logits(model, expected)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(idx, 7, temperature=0, use_kv_cache=use_kv_cache), expected)


def reference_windows(n_tokens: int, block_size: int) -> int:
    """The rule of DESIGN as a loop: one token more than block_size, and the newest half is kept."""
    held = 0
    for _ in range(n_tokens):
        held += 1
        if held > block_size:
            held = max(1, block_size // 2)
    return held


def test_window_size_by_hand():
    assert [context_len(n, 4) for n in range(1, 12)] == [1, 2, 3, 4, 2, 3, 4, 2, 3, 4, 2]
    assert [context_len(n, 5) for n in range(1, 12)] == [1, 2, 3, 4, 5, 2, 3, 4, 5, 2, 3]
    assert [context_len(n, 1) for n in range(1, 5)] == [1, 1, 1, 1]


def test_window_size_equals_counting():
    for block_size in range(1, 12):
        for n in range(1, 60):
            assert context_len(n, block_size) == reference_windows(n, block_size), (n, block_size)


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [1, 2, 7, 8])
@pytest.mark.parametrize("use_kv_cache", [True, False])
def test_past_block_size_decoding_equals_a_slow_loop_that_encodes_each_window_anew(block_size, use_kv_cache):
    model = writer(block_size=block_size)
    for length in (1, 5, 30):  # short, and longer than block_size
        row = random_ids(length, seed=length).tolist()
        expected = list(row)
        for _ in range(25):
            window = expected[-reference_windows(len(expected), block_size) :]
            expected.append(all_logits(model, torch.tensor([window]))[0, -1].argmax().item())
        out = model.generate(torch.tensor([row]), 25, temperature=0, use_kv_cache=use_kv_cache)
        assert out[0].tolist() == expected


def test_the_texts_of_these_tests_are_varied():
    for settings in (dict(seed=5), dict(seed=5, temperature=0.7)):  # else equal texts would show little
        for row in generated_ids(writer(), [[1], [2, 3]], 60, **settings):
            assert len(set(row)) > 10


LENGTHS = (1, 3, 8, 9, 12, 30)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        dict(temperature=0),
        dict(seed=5),
        dict(seed=5, temperature=0.7, top_k=5),
        dict(seed=5, top_p=0.8),
        dict(seed=5, n_ids=20),
    ],
    ids=str,
)
def test_cache_gives_the_same_ids_for_prompts_of_different_lengths(settings):
    model = writer()
    rows = [random_ids(n, seed=n, vocab_size=20).tolist() for n in LENGTHS]
    with_cache = generated_ids(model, rows, 60, **settings)  # many windows of 8
    assert with_cache == generated_ids(model, rows, 60, use_kv_cache=False, **settings)
    assert len({tuple(row) for row in with_cache}) == len(rows)


def test_cache_gives_the_same_logits_within_rounding():
    model = writer()
    windows, fresh = [random_ids(5).tolist(), random_ids(3).tolist()], [5, 3]
    cache = KVCache(model, 2)
    with torch.no_grad():
        for i in range(3):
            expected = torch.cat([all_logits(model, torch.tensor([window]))[:, -1] for window in windows])
            torch.testing.assert_close(cached_logits(model, cache, windows, fresh), expected, atol=1e-4, rtol=1e-4)
            windows, fresh = [row + [i] for row in windows], [1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [dict(temperature=0), dict(seed=5, top_k=9, top_p=0.9)], ids=str)
def test_first_row_of_a_batch_is_what_it_would_be_alone(settings):
    model = writer()
    for first in (1, 9, 30):
        rows = [random_ids(n, seed=n).tolist() for n in (first, 2, 11)]
        assert generated_ids(model, rows, 40, **settings)[0] == generated_ids(model, rows[:1], 40, **settings)[0]


def test_row_does_not_depend_on_the_other_rows():
    model = writer()
    row = random_ids(4, seed=9).tolist()
    others = [
        [random_ids(n, seed=n).tolist(), row, random_ids(m, seed=m).tolist()] for n, m in ((1, 30), (7, 8), (20, 2))
    ]
    assert len({tuple(generated_ids(model, rows, 40, seed=5)[1]) for rows in others}) == 1


def test_rows_with_the_same_prompt_differ_and_a_seed_repeats_them():
    model, idx = writer(), random_ids(1, 3).repeat(4, 1)
    first = model.generate(idx, 30, seed=7)
    assert torch.equal(first, model.generate(idx, 30, seed=7))
    assert len({tuple(row) for row in first.tolist()}) == 4
    assert not torch.equal(first, model.generate(idx, 30, seed=8))


def test_draws_with_a_seed_neither_use_nor_change_torchs_generator():
    model, idx = writer(), random_ids(1, 3)
    torch.manual_seed(0)
    first, state = model.generate(idx, 20, seed=7), torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(model.generate(idx, 20, seed=7), first)


def test_without_a_seed_draws_follow_torchs_generator():
    model, idx = writer(), random_ids(1, 3)
    torch.manual_seed(0)
    first, second = model.generate(idx, 30), model.generate(idx, 30)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(model.generate(idx, 30), first)


def test_the_first_ids_do_not_depend_on_how_many_are_asked_for():
    model, idx = writer(), random_ids(2, 3)
    assert torch.equal(model.generate(idx, 50, seed=1)[:, :20], model.generate(idx, 17, seed=1))


@pytest.mark.parametrize("seed", [0, -1, 2**62, 2**64 + 3])
def test_any_whole_number_is_a_seed(seed):
    model, idx = writer(), random_ids(2, 3)
    assert torch.equal(model.generate(idx, 10, seed=seed), model.generate(idx, 10, seed=seed))


def test_finished_row_gives_minus_one_and_the_stream_ends_with_the_last_row():
    model, rows = writer(), [random_ids(n, seed=n).tolist() for n in (2, 5, 9)]
    free = generated_ids(model, rows, 60, seed=3)
    stops = (free[0][4], free[1][20])
    ends = [min([row.index(stop) for stop in stops if stop in row], default=59) for row in free]
    stopped = generated_ids(model, rows, 60, seed=3, stop_ids=stops)
    assert len(set(ends)) > 1 and len(stopped[0]) == max(ends) + 1
    for row, end, got in zip(free, ends, stopped):
        assert got == row[: end + 1] + [-1] * (max(ends) - end)  # the stop id itself still comes


def test_stream_and_generate_draw_the_same_ids():
    model, idx = writer(), random_ids(2, 3)
    streamed = list(model.stream(idx, 20, seed=4))
    assert all(new.shape == (2,) and new.dtype == torch.int64 for new in streamed)
    assert torch.equal(torch.stack(streamed, dim=1), model.generate(idx, 20, seed=4)[:, 3:])
    assert generated_ids(model, idx.tolist(), 20, seed=4) == torch.stack(streamed, dim=1).tolist()


def test_stream_comes_one_token_at_a_time():
    model, calls = writer(), []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    stream = model.stream(random_ids(1, 3), 1000, seed=0)
    next(stream), next(stream)
    assert len(calls) == 2


def test_cache_encodes_each_token_once():
    model, counts = writer(block_size=8), []
    model.transformer.h[0].register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[1]))
    list(model.stream(random_ids(1, 3), 14, seed=0))
    # the newest token goes alone; when the block is full, the others of its newest half come anew
    assert counts == [2] + 6 * [1] + [3] + 5 * [1] + [3] + 3 * [1]


def test_prompts_of_the_caller_stay_as_they_are():
    model, rows, idx = writer(), [[1, 2], [3]], random_ids(2, 3)
    before = idx.clone()
    list(model.stream(rows, 20, seed=0))
    model.generate(idx, 20, seed=0)
    assert rows == [[1, 2], [3]] and torch.equal(idx, before)


@pytest.mark.slow
def test_top_k_of_1_is_greedy_and_0_and_None_are_off():
    model, idx = writer(), random_ids(3, 3)
    greedy = model.generate(idx, 30, temperature=0)
    assert torch.equal(model.generate(idx, 30, top_k=1, seed=3), greedy)
    assert torch.equal(model.generate(idx, 30, top_p=1e-9, seed=3), greedy)
    free = model.generate(idx, 30, seed=3)
    for off in (dict(top_k=0), dict(top_k=None), dict(top_k=23), dict(top_k=500), dict(top_p=None), dict(top_p=1.0)):
        assert torch.equal(model.generate(idx, 30, seed=3, **off), free), off


@pytest.mark.slow
def test_ids_beyond_n_ids_are_never_drawn():
    model = writer()
    with torch.no_grad():
        model.lm_head.weight[20:] *= 100  # the padding looks likely
    assert model.generate(random_ids(4, 3), 40, seed=0).max() >= 20
    for settings in (dict(), dict(temperature=0), dict(top_k=3), dict(top_p=0.5), dict(use_kv_cache=False)):
        assert model.generate(random_ids(4, 3, vocab_size=20), 40, seed=0, n_ids=20, **settings).max() < 20


@pytest.mark.parametrize(
    "settings, part",
    [
        (dict(temperature=-1.0), "temperature=-1.0"),
        (dict(temperature=math.nan), "temperature=nan"),
        (dict(temperature=math.inf), "temperature=inf"),
        (dict(top_k=-1), "top_k=-1"),
        (dict(top_p=1.5), "top_p=1.5"),
        (dict(top_p=0.0), "top_p=0.0"),
        (dict(top_p=-0.1), "top_p=-0.1"),
        (dict(top_p=math.nan), "top_p=nan"),
        (dict(max_new_tokens=-1), "max_new_tokens=-1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, part):
    with pytest.raises(ValueError, match=part):
        writer().generate(random_ids(1, 3), **{"max_new_tokens": 5, **settings})


def test_every_wrong_setting_is_named_at_once():
    with pytest.raises(ValueError) as caught:
        writer().generate(random_ids(1, 3), 5, temperature=-1.0, top_k=-2, top_p=3.0)
    assert all(part in str(caught.value) for part in ("temperature=-1.0", "top_k=-2", "top_p=3.0"))


def test_empty_prompt_is_refused():
    model = writer()
    for prompts in (torch.zeros(1, 0, dtype=torch.int64), [[]], [[1], []], []):
        with pytest.raises(ValueError, match="empty"):
            list(model.stream(prompts, 5))
    with pytest.raises(ValueError, match="empty"):
        model.generate(torch.zeros(2, 0, dtype=torch.int64), 5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_end_in_a_sentence(value):
    model = writer()
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = value
    for temperature in (1.0, 0.0):
        with pytest.raises(ValueError, match="finite.*float32"):
            model.generate(random_ids(2, 3), 5, temperature=temperature)


def test_bfloat16_model_generates_with_and_without_cache():
    model = writer().to(torch.bfloat16)
    rows = [random_ids(n, seed=n).tolist() for n in LENGTHS]
    for use_kv_cache in (True, False):
        out = generated_ids(model, rows, 30, seed=0, use_kv_cache=use_kv_cache)
        assert all(0 <= i < 23 for row in out for i in row)


def test_generating_leaves_no_trace_for_training():
    model = writer()
    out = model.generate(random_ids(2, 3), 12, seed=0)
    assert not out.requires_grad and all(p.grad is None for p in model.parameters()) and torch.is_grad_enabled()
    model(random_ids(2, 8), random_ids(2, 8))[1].backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
def test_frequencies_of_generated_rows_fit_the_probabilities():
    model = writer(sharpen=8.0)
    n = 4000
    first = torch.stack(list(model.stream([[5, 7]] * n, 1, seed=11)))[0]
    expected = n * model(torch.tensor([[5, 7]]))[0][0, 0].detach().double().softmax(-1)
    often = expected > 5  # chi-squared wants five of each: the rest count as one
    cells = [(torch.bincount(first, minlength=23)[often] - expected[often]) ** 2 / expected[often]]
    assert often.sum() > 5 and torch.cat(cells).sum().item() < 50  # 22 degrees of freedom: 48.3 in a thousand


def test_successive_random_numbers_of_a_row_are_independent():
    model = writer(n_layer=1)
    torch.nn.init.zeros_(model.lm_head.weight)  # every id is as likely
    text = torch.tensor(generated_ids(model, [[0]] * 40, 100, seed=1))  # (40, 100)
    for a, b in ((text[:, :-1].flatten(), text[:, 1:].flatten()), (text[:-1].flatten(), text[1:].flatten())):
        pairs = torch.bincount(a // 6 * 4 + b // 6, minlength=16)  # 23 ids in 4 classes of 6, 6, 6, 5
        share = torch.tensor([6, 6, 6, 5]) / 23
        expected = len(a) * torch.outer(share, share).flatten()
        assert ((pairs - expected) ** 2 / expected).sum().item() < 37.7  # 15 degrees of freedom, once in a thousand
