"""Decoding: the cache in chunks and past the context, filters against transformers, streams side by side, memory."""

import copy
import functools
import gc
import os
import sys
import time
from dataclasses import replace

import pytest
import torch
from helpers import all_logits, generated_ids, random_ids, windows

from dongpt.checkpoint import build_model
from dongpt.checkpoint.legacy import MODEL_CLASSES, LegacyConfig
from dongpt.decode import decoder as decoding
from dongpt.decode.decoder import Decoder, KVCache
from dongpt.decode.sampling import Sampling
from dongpt.kernels import cpu
from model import GPT, GPTConfig

SCHEMES = ["default", "rope", "relative", "alibi", "default+relative"]
TINY = GPTConfig(block_size=8, vocab_size=61, n_layer=2, n_head=2, n_embd=16, tie_weights=False)
LENGTHS = (1, 3, 8, 9, 12, 30)
EVERYTHING = dict(temperature=0.8, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.3)

smoke = pytest.mark.smoke
each_scheme = pytest.mark.parametrize("pos_embd", SCHEMES)
with_and_without_cache = pytest.mark.parametrize("use_kv_cache", [True, False])


def randomise(model: GPT, seed: int = 0) -> GPT:
    """model in eval mode with random parameters by which its texts are varied: small biases, gains about 1."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight"))
            std = 0.03 if name.endswith("bias") else 0.9 if name.endswith("attn.c_proj.weight") else 0.3
            parameter.copy_(torch.randn(parameter.shape) * std + (1.0 if gain else 0.0))
    return model.eval()


def make(pos_embd: str = "default", seed: int = 0, **changes) -> GPT:
    return randomise(build_model(replace(TINY, pos_embd=pos_embd, **changes)), seed)


def legacy(name: str) -> GPT:
    torch.manual_seed(0)
    model = MODEL_CLASSES[name](
        LegacyConfig(block_size=8, vocab_size=61, n_layer=2, n_head=2, n_embd=16, legacy=name)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0 if parameter.dim() > 1 else 1.0)
    return model


ids = functools.partial(random_ids, vocab_size=61)


def prompts(lengths=LENGTHS, vocab_size: int = 61) -> list[list[int]]:
    return [ids(n, seed=n, vocab_size=vocab_size).tolist() for n in lengths]


def decoder_of(model: GPT, n_rows: int, use_kv_cache: bool = True, **sampling) -> Decoder:
    decoder = Decoder(model, n_rows, use_kv_cache)
    decoder.set_sampling(Sampling(**sampling), model.config.vocab_size)
    return decoder


@torch.no_grad()
def draws(decoder: Decoder, rows, seed: int, n: int) -> list[list[int]]:
    """The new ids of each row, from a Decoder itself."""
    return torch.tensor(list(decoder.generate_ids(rows, seed, n))).T.tolist()


def by_hand(model: GPT, row: list[int], n: int, penalty: float = 1.0, counted=lambda text, window: text) -> list[int]:
    """Greedy new ids by a forward pass for each; penalty for the ids of counted(text, window)."""
    text, held, block_size = [], 0, model.config.block_size
    for i in range(len(row) + n):
        if i >= len(row):
            logits = all_logits(model, [text[-held:]])[0, -1].tolist()
            for token in set(counted(text, text[-held:])):
                logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        text.append(row[i] if i < len(row) else max(range(len(logits)), key=logits.__getitem__))
        held = held + 1 if held < block_size else max(1, block_size // 2)
    return text[len(row) :]


def encoded_shapes(model: GPT) -> list[tuple[int, int]]:
    """A list that gets (rows, tokens) of everything that enters the first layer from now on."""
    shapes = []
    model.transformer.h[0].register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape[:2])))
    return shapes


def recorded_logits(model: GPT) -> list[torch.Tensor]:
    """A list that gets the logits (B, V) of every step from now on."""
    logits = []
    model.lm_head.register_forward_hook(lambda *args: logits.append(args[2].detach()))
    return logits


def assert_close(got, expected, atol: float = 1e-4):
    torch.testing.assert_close(got.float(), expected.float(), atol=atol, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# the cache


@torch.no_grad()
def encode(model: GPT, cache: KVCache, idx, first: int, chunks, rows=slice(None)) -> torch.Tensor:
    """Logits (R, T, V) of idx (R, T), put into these rows of the cache from position first on, in chunks."""
    parts, done = [], 0
    for n in chunks:
        positions = torch.arange(first + done, first + done + n)
        held = cache.layer_caches(positions, first + done + n, first + done, rows)
        parts.append(model.lm_head(model.hidden_states(idx[:, done : done + n], positions, held)))
        done += n
    assert done == idx.shape[1]
    return torch.cat(parts, dim=1)


@smoke
@pytest.mark.parametrize("chunks", [(16,), (5, 11), (1, 3, 1, 7, 4)], ids=str)
@each_scheme
def test_prefill_in_uneven_chunks_gives_the_logits_of_one_full_pass_at_every_position(pos_embd, chunks):
    model, idx = make(pos_embd, block_size=16), ids(3, 16)
    cache = KVCache(model, 3)
    assert_close(encode(model, cache, idx, 0, chunks), all_logits(model, idx))
    other = ids(3, 16, seed=1)  # over what the cache is full of
    assert_close(encode(model, cache, other, 0, chunks), all_logits(model, other))


@smoke
@each_scheme
def test_chunks_of_different_sizes_by_row_give_the_logits_of_full_passes(pos_embd):
    model, idx, cache = make(pos_embd, block_size=24), ids(3, 16), KVCache(make(pos_embd, block_size=24), 3)
    sizes = ((4, 1, 6, 2), (1, 5, 1, 6), (2, 2, 3, 5))
    starts, got = torch.zeros(3, dtype=torch.int64), [[], [], []]
    for fresh in zip(*sizes):
        T = max(fresh)
        positions = starts[:, None] + torch.arange(T)
        tokens = torch.zeros(3, T, dtype=torch.int64)  # padded with token 0, which is garbage there
        for row, n in enumerate(fresh):
            tokens[row, :n] = idx[row, starts[row] : starts[row] + n]
        with torch.no_grad():
            caches = cache.layer_caches(positions, int(positions.max()) + 1)
            logits = model.lm_head(model.hidden_states(tokens, positions, caches))
        for row, n in enumerate(fresh):
            got[row].append(logits[row, :n])
            starts[row] += n
    for row, parts in enumerate(got):
        assert_close(torch.cat(parts), all_logits(model, idx[row : row + 1, : sum(sizes[row])])[0])


@smoke
@each_scheme
def test_some_rows_are_encoded_anew_and_the_others_keep_what_they_hold(pos_embd):
    model, idx, fresh = make(pos_embd, block_size=16), ids(4, 12), ids(2, 12, seed=1)
    cache = KVCache(model, 4)
    encode(model, cache, idx[:, :8], 0, (8,))
    some = torch.tensor([3, 1])
    assert_close(encode(model, cache, fresh[:, :8], 0, (3, 5), some), all_logits(model, fresh[:, :8]))
    now = idx.clone()
    now[some] = fresh
    assert_close(encode(model, cache, now[:, 8:], 8, (1, 3)), all_logits(model, now)[:, 8:])


@smoke
@each_scheme
def test_what_lies_beyond_the_newest_token_makes_no_difference(pos_embd):
    """A recorded step on a GPU looks at more keys than there are."""
    model = make(pos_embd, block_size=16)
    for rows in (prompts((2, 7, 5)), prompts((5, 5, 5))):
        decoder = decoder_of(model, 3)
        draws(decoder, prompts((16, 16, 16)), 0, 1)  # leaves garbage everywhere
        draws(decoder, rows, 0, 4)
        longest = max(decoder.lengths)
        with torch.no_grad():
            expected = decoder._logits(longest, longest - 1 if min(decoder.lengths) == longest else None)
            assert longest < 16
            assert_close(decoder._logits(16, None), expected, 1e-5)


@pytest.mark.parametrize(
    "pos_embd, kind, tolerance",
    [
        *((name, "float32", 1e-4) for name in SCHEMES),
        ("default", "bfloat16", 0.15),
        ("relative", "bfloat16", 0.15),
        ("rope", "autocast", 0.15),
        ("alibi", "autocast", 0.15),
    ],
)
def test_the_logits_of_every_step_equal_those_of_a_full_pass_over_the_window(pos_embd, kind, tolerance):
    model, rows = make(pos_embd), prompts((1, 3, 8, 9, 30))  # their windows are full at different steps
    if kind == "bfloat16":
        model = model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        logits = recorded_logits(model)
        new = generated_ids(model, rows, 16, seed=2)
        logits = torch.stack(logits)  # (16, B, V)
        assert logits.shape == (16, 5, 61) and logits.dtype == (torch.bfloat16 if kind != "float32" else torch.float32)
        for i, row in enumerate(rows):
            for step, window in enumerate(windows(row, new[i], 8)):
                expected = all_logits(model, [window])[0, -1]
                assert_close(logits[step, i], expected, tolerance)
    assert logits.std() > 0.5 and len({i for row in new for i in row}) > 30


@smoke
def test_the_cache_has_the_dtype_that_attention_has():
    model = make()
    assert {t.dtype for layer in KVCache(model, 1).layers for t in layer} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert {t.dtype for layer in KVCache(model, 1).layers for t in layer} == {torch.bfloat16}
    cache = KVCache(model.to(torch.bfloat16), 3)
    assert {t.dtype for layer in cache.layers for t in layer} == {torch.bfloat16}
    assert {t.shape for layer in cache.layers for t in layer} == {(3, 2, 8, 8)} and len(cache.layers) == 2


@each_scheme
def test_text_under_autocast_is_drawn_with_a_seed_again(pos_embd):
    model, rows = make(pos_embd), prompts()
    with torch.autocast("cpu", torch.bfloat16):
        text = generated_ids(model, rows, 10, seed=0, **EVERYTHING)
        assert text == generated_ids(model, rows, 10, seed=0, **EVERYTHING)
    assert all(0 <= i < 61 for row in text for i in row) and [len(row) for row in text] == [10] * len(rows)


@pytest.mark.parametrize("pos_embd, prefill", [*((name, 7) for name in SCHEMES), ("rope", 1), ("relative", 30)])
def test_text_does_not_depend_on_how_much_is_encoded_at_a_time(pos_embd, prefill, monkeypatch):
    model, rows = make(pos_embd, block_size=32), prompts((30, 2, 21))
    logits = recorded_logits(model)
    text = generated_ids(model, rows, 10, seed=1)
    expected, shapes = torch.stack(logits), encoded_shapes(model)
    logits.clear()
    monkeypatch.setattr(decoding, "PREFILL_CHUNK_TOKENS", prefill)
    assert generated_ids(model, rows, 10, seed=1) == text
    assert_close(torch.stack(logits), expected)
    size = max(1, prefill // 3)  # of 29 tokens; later the first row, which is full, has 15 to encode anew
    assert [n for B, n in shapes if B == 3 and n > 1 or size == 1] and max(B * n for B, n in shapes) <= max(prefill, 3)
    assert shapes[: -(-29 // size)] == [(3, min(size, 29 - start)) for start in range(0, 29, size)]
    assert (1, min(prefill, 15)) in shapes


def test_only_rows_that_are_full_are_encoded_anew():
    model, rows = make(), prompts((3, 6))
    shapes = encoded_shapes(model)
    text = generated_ids(model, rows, 10, temperature=0)
    step, anew = (2, 1), (1, 3)
    assert shapes == [(2, 5), *3 * [step], anew, *3 * [step], anew, *2 * [step], anew, *2 * [step]]
    assert text == [by_hand(model, row, 10) for row in rows]


@pytest.mark.parametrize(
    "rows, first",
    [
        ([[3, 1, 4, 1, 5]] * 4, (1, 4)),
        ([[3, 1, 4, 1, 5]] * 3 + [[3, 1, 4, 1, 6]], (4, 4)),
        ([[3, 1, 4, 1, 5]] * 3 + [[1, 5]], (4, 4)),
        ([[3, 1, 4, 1, 5]], (1, 4)),
        ([[i] * 10 + [1, 2, 3, 4] for i in range(4)], (1, 3)),  # of 14 tokens the newest 4 are seen
        ([[i] * 10 + [1, 2, 3] for i in range(4)], (4, 7)),
    ],
    ids=str,
)  # of 13 the newest 8
def test_rows_that_begin_the_same_are_encoded_once(rows, first):
    model = make()
    expected = generated_ids(model, rows, 20, seed=3, use_kv_cache=False)
    shapes = encoded_shapes(model)
    assert generated_ids(model, rows, 20, seed=3) == expected
    assert shapes[0] == first and shapes[1] == (len(rows), 1)
    assert len({tuple(row) for row in expected}) == len(rows)
    assert generated_ids(model, rows, 12, temperature=0) == [by_hand(model, row, 12) for row in rows]


# ----------------------------------------------------------------------------------------------------------------------
# a Decoder that is used again, and streams side by side


@pytest.mark.parametrize(
    "pos_embd, use_kv_cache, settings",
    [
        *((name, True, EVERYTHING) for name in SCHEMES),
        ("default", False, EVERYTHING),
        ("rope", True, {}),
        ("default", True, dict(temperature=0, repetition_penalty=1.4)),
    ],
    ids=str,
)
def test_a_decoder_that_is_used_again_gives_what_a_fresh_one_gives(pos_embd, use_kv_cache, settings):
    model = make(pos_embd)
    used = decoder_of(model, 3, use_kv_cache, **settings)
    for seed, lengths, n in ((0, (9, 30, 8), 20), (1, (1, 2, 3), 1), (2, (3, 3, 3), 3), (2, (1, 8, 5), 12)):
        rows = prompts(lengths)
        assert draws(used, rows, seed, n) == generated_ids(
            model, rows, n, seed=seed, use_kv_cache=use_kv_cache, **settings
        )


@smoke
def test_a_decoder_left_half_way_begins_anew():
    model = make()
    used, rows = decoder_of(model, 3, **EVERYTHING), prompts((3, 9, 6))
    expected = draws(used, rows, 4, 30)
    with torch.no_grad():
        left = used.generate_ids(prompts((8, 1, 5)), 9, 50)
        next(left), next(left)
        assert used.in_use
        left.close()
    assert not used.in_use and draws(used, rows, 4, 30) == expected and not used.in_use


def add_noise(model: GPT):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.2)


def add_noise_through_data(model: GPT):
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.2)


def assign_data(model: GPT):
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5


def step_of_an_optimizer(model: GPT):
    optimizer = model.configure_optimizers(0.1, 0.05, (0.9, 0.95), "cpu")
    model(ids(2, 8), ids(2, 8, seed=1))[1].backward()
    optimizer.step()


def one_weight(model: GPT):
    model.transformer.wte.weight.data[9, 3] += 1.0


CHANGES = [
    add_noise,
    add_noise_through_data,
    assign_data,
    step_of_an_optimizer,
    one_weight,
    lambda model: model.load_state_dict(make("rope", seed=5).state_dict()),
    lambda model: model.load_state_dict(make("rope", seed=5).state_dict(), assign=True),
    lambda model: setattr(model.transformer.h[0], "mlp", copy.deepcopy(model.transformer.h[1].mlp)),
    lambda model: setattr(model, "document_end_id", 9),
    lambda model: model.to(torch.bfloat16),
    lambda model: model.double(),
]


@pytest.mark.parametrize("change", CHANGES, ids=range(len(CHANGES)))
def test_a_decoder_that_reuses_a_prefix_notices_that_the_weights_changed(change):
    model, text = make("rope"), [9, 4, 7, 1, 9, 2]
    kept = Decoder(model, 1, reuse_prefix=True)

    def next_ids(decoder=None) -> list[int]:
        return torch.cat(list(model.stream([text], 12, temperature=0, decoder=decoder))).tolist()

    assert next_ids(kept) == next_ids()
    change(model)
    assert next_ids(kept) == next_ids(), "the first text after the change"
    assert next_ids(kept) == next_ids()


@smoke
@pytest.mark.parametrize("harmless", [lambda m: None, lambda m: m.requires_grad_(False), lambda m: m.to("cpu").float()])
def test_a_decoder_reuses_a_prefix_as_long_as_the_weights_are_the_same(harmless):
    model, text = make("rope"), [9, 4, 7, 1, 9, 2]
    kept = Decoder(model, 1, reuse_prefix=True)
    list(model.stream([text], 1, decoder=kept))
    harmless(model)
    shapes = encoded_shapes(model)
    list(model.stream([[*text, 5]], 1, decoder=kept))
    assert sum(n for _, n in shapes) == 1  # only the new token


def test_packed_weights_of_before_are_not_used_under_other_conditions(monkeypatch):
    """A decoder that once decoded with packed weights: the next stream is too short for them, or runs in bfloat16."""
    if cpu.load_library()[0] is None:
        pytest.skip("no C compiler for cpu.c")
    monkeypatch.setattr(cpu, "PACKING_MIN_PARAMS", 1)
    model, text = make("rope"), [9, 4, 7, 1]
    kept = Decoder(model, 1, reuse_prefix=True)
    list(model.stream([text], 20, decoder=kept))
    assert kept.packed_blocks is not None
    add_noise(model)
    few = torch.cat(list(model.stream([text], 3, temperature=0, decoder=kept))).tolist()
    assert kept.packed_blocks is None and few == generated_ids(model, [text], 3, temperature=0)[0]
    list(model.stream([text], 20, decoder=kept))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        halves = torch.cat(list(model.stream([text], 20, temperature=0, decoder=kept))).tolist()
        assert kept.packed_blocks is None and halves == generated_ids(model, [text], 20, temperature=0)[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only there a Decoder is kept")
def test_a_remembered_decoder_is_used_again_only_where_it_fits_and_is_free():
    model = make().to("cuda").eval().requires_grad_(False)
    remembered = Decoder.for_model(model, 3, True, 8)
    assert Decoder.for_model(model, 3, True, 20) is remembered
    for other in ((2, True, 8), (3, False, 8)):
        assert Decoder.for_model(model, *other) is not remembered
    rows, settings = prompts((1, 9, 6)), dict(seed=4, **EVERYTHING)
    expected = generated_ids(model, rows, 15, **settings)
    first, second = model.stream(rows, 15, **settings), model.stream(rows, 15, **settings)
    both = [torch.stack(one).T.tolist() for one in zip(*zip(first, second))]
    assert both == [expected, expected]
    assert generated_ids(model, rows, 15, **settings) == expected


@pytest.mark.parametrize("uniforms", [7, 1000])
def test_text_does_not_depend_on_how_many_random_numbers_come_at_a_time(uniforms, monkeypatch):
    model, rows = make(n_layer=1), prompts((1, 9))
    assert decoding.N_BUFFERED_UNIFORMS < 140
    expected = generated_ids(model, rows, 140, seed=8, min_p=0.02)
    monkeypatch.setattr(decoding, "N_BUFFERED_UNIFORMS", uniforms)
    assert generated_ids(model, rows, 140, seed=8, min_p=0.02) == expected


@each_scheme
def test_text_does_not_depend_on_how_much_more_is_asked_for(pos_embd):
    """Room is taken for no more tokens than there will be."""
    model, rows = make(pos_embd, block_size=16), prompts((3, 9))
    whole = generated_ids(model, rows, 25, seed=6)
    for n in (1, 2, 6, 7, 8, 13, 14, 24):  # up to block_size of either row, and beyond
        assert generated_ids(model, rows, n, seed=6) == [row[:n] for row in whole], n


@pytest.mark.parametrize("kinds", [("default", "default"), ("rope", "alibi")], ids=str)
def test_two_streams_side_by_side_give_what_each_gives_alone(kinds):
    models = [make(kind) for kind in kinds]
    models[1] = models[0] if kinds[0] == kinds[1] else models[1]
    calls = [
        lambda: models[0].stream(prompts((3, 9, 1)), 20, seed=1, **EVERYTHING),
        lambda: models[1].stream(prompts((3, 9, 1)), 20, seed=2, **EVERYTHING),
        lambda: models[0].stream(prompts((8, 30)), 20, temperature=0),
        lambda: models[1].stream(prompts((8, 30)), 20, seed=3, use_kv_cache=False),
    ]
    alone = [torch.stack(list(call())).tolist() for call in calls]
    together = [torch.stack(one).tolist() for one in zip(*zip(*(call() for call in calls)))]
    assert together == alone


def test_a_stream_that_is_left_half_way_disturbs_no_other():
    model, rows = make(), prompts((3, 9, 1))
    expected = generated_ids(model, rows, 18, seed=1, **EVERYTHING)
    left = model.stream(rows, 18, seed=1, **EVERYTHING)
    begun = [next(left) for _ in range(11)]
    assert generated_ids(model, prompts((5, 5, 5)), 18, seed=2, **EVERYTHING)
    assert generated_ids(model, rows, 18, seed=1, **EVERYTHING) == expected
    assert torch.stack([*begun, *left]).T.tolist() == expected  # and it can be taken up again
    left = model.stream(rows, 18, seed=1)
    next(left)
    left.close()
    assert generated_ids(model, rows, 18, seed=1, **EVERYTHING) == expected
    assert torch.is_grad_enabled()


@smoke
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "bigram", *MODEL_CLASSES])
@with_and_without_cache
def test_ids_come_as_int64_on_the_cpu(kind, use_kv_cache):
    model = legacy(kind) if kind in MODEL_CLASSES else make(model_type="bigram") if kind == "bigram" else make()
    model = model.to(torch.bfloat16) if kind == "bfloat16" else model
    for settings in (dict(temperature=0), dict(seed=1, **EVERYTHING)):
        new = list(model.stream(prompts((3, 9)), 12, use_kv_cache=use_kv_cache, **settings))
        assert len(new) == 12 and {(t.shape, t.dtype, t.device.type, t.requires_grad) for t in new} == {
            ((2,), torch.int64, "cpu", False)
        }


@pytest.mark.parametrize("kind", [*MODEL_CLASSES, "bigram"])
@pytest.mark.parametrize("settings", [dict(temperature=0), EVERYTHING], ids=str)
def test_legacy_models_and_the_bigram_write_the_same_in_any_batch(kind, settings):
    model, rows = legacy(kind) if kind in MODEL_CLASSES else make(model_type="bigram"), prompts((1, 8, 30))
    text = generated_ids(model, rows, 16, seed=3, **settings)
    assert text == generated_ids(model, rows, 16, seed=3, use_kv_cache=False, **settings)
    for i in range(len(rows)):
        others = [*prompts((9, 2))[:i], rows[i], *prompts((5,))]  # row i has the random numbers of row i
        assert generated_ids(model, others, 16, seed=3, **settings)[i] == text[i]
    if settings.get("temperature") == 0:
        assert text == [by_hand(model, row, 16) for row in rows]


# ----------------------------------------------------------------------------------------------------------------------
# without a limit


def live_tensors() -> int:
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def tensors_of(decoder: Decoder) -> list[torch.Tensor]:
    found = [decoder.tokens, decoder.last_positions, decoder.uniforms, decoder.next_uniform, decoder.next_ids]
    found += [] if decoder.seen_mask is None else [decoder.seen_mask]
    return found + ([t for layer in decoder.cache.layers for t in layer] if decoder.cache else [])


@pytest.mark.parametrize("settings", [dict(), EVERYTHING], ids=str)
def test_a_decoder_keeps_its_tensors_where_they_are(settings):
    model = make(block_size=16, n_layer=1)
    decoder = decoder_of(model, 2, **settings)
    before = [(t.data_ptr(), t.shape, t.untyped_storage().nbytes()) for t in tensors_of(decoder)]
    for lengths in ((3, 9), (30, 30)):
        draws(decoder, prompts(lengths), 1, 60)
        assert [(t.data_ptr(), t.shape, t.untyped_storage().nbytes()) for t in tensors_of(decoder)] == before


def test_a_long_text_takes_no_more_memory_than_a_short_one():
    model = make(block_size=16, n_layer=1)
    stream = model.stream(prompts((300,)), 1500, seed=1, repetition_penalty=1.1)
    for _ in range(300):
        next(stream)
    n, blocks = live_tensors(), sys.getallocatedblocks()
    for _ in range(1200):
        next(stream)
    assert sys.getallocatedblocks() - blocks < 600  # of Python's memory: a number kept for each token would be one
    assert live_tensors() == n
    assert next(stream, None) is None


def resident_bytes() -> int:
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("resident memory is read from /proc")
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.long
@each_scheme
def test_100000_tokens_take_the_same_time_each_and_no_more_memory(pos_embd):
    model, tenth = make(pos_embd, block_size=16, n_layer=1), 10_000
    stream = model.stream(prompts((3,)), 10 * tenth, seed=1, **EVERYTHING)
    seconds, resident, seen = [], [], set()
    for _ in range(10):
        start = time.process_time()
        for _ in range(tenth):
            seen.add(next(stream).item())
        seconds.append(time.process_time() - start)
        gc.collect()
        resident.append(resident_bytes())
    assert next(stream, None) is None and len(seen) > 30
    assert seconds[-1] < 1.5 * seconds[1], seconds
    assert resident[-1] - resident[0] < 20e6, resident
