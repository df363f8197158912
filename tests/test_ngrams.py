"""Embeddings of the last tokens together: their rows by a hash in whole numbers, what logits and texts may depend on,
decoding with and without cache, packed and in chunks, and checkpoints."""

import copy
import functools
import json
import math
import os
import shutil
from dataclasses import replace

import pytest
import torch
from helpers import (
    TINY_RUN,
    all_logits,
    assert_same,
    generated_ids,
    generated_text,
    load,
    random_ids,
    read_log,
    windows,
    write_corpus,
)

import ckpt_update
import evaluate
import sample
import train
from dongpt.checkpoint.files import NANOGPT_ARG_NAMES, load_model, model_args, save
from dongpt.checkpoint.foreign import FORMAT_VERSION
from dongpt.checkpoint.run import grow_vocabulary
from dongpt.decode import decoder as decoding
from dongpt.decode.decoder import Decoder, previous_ids
from dongpt.kernels import cpu
from dongpt.train import step as updates
from model import GPT, NGRAM_TABLE, RELATIVE_TABLE, GPTConfig, ngram_ids

SCHEMES = ["default", "rope", "relative", "alibi", "default+relative"]
TINY = GPTConfig(block_size=8, vocab_size=61, n_layer=2, n_head=2, n_embd=16, tie_weights=False)
LENGTHS = (1, 2, 3, 8, 9, 12, 30)  # shorter than an n-gram, as long as a block, and longer
WITH_NGRAMS = [*TINY_RUN, "--ngrams=3", "--ngram_rows=500", "--optimizer=muon"]
CLOSE = dict(atol=1e-4, rtol=1e-4)  # float32, sums in another order

smoke = pytest.mark.smoke
each_scheme = pytest.mark.parametrize("pos_embd", SCHEMES)
each_scheme_and_length = pytest.mark.parametrize(
    "ngrams, pos_embd", [*((3, pos_embd) for pos_embd in SCHEMES), (2, "default"), (5, "relative")]
)
each_length = pytest.mark.parametrize("ngrams", [2, 3, 5])
needs_compiler = pytest.mark.skipif(not shutil.which(os.environ.get("CC", "gcc")), reason="no C compiler for cpu.c")
pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


def make(ngrams: int = 3, seed: int = 0, **changes) -> GPT:
    """A model in eval mode with random parameters, by which its texts are varied and n-grams matter."""
    model = GPT(replace(TINY, ngrams=ngrams, **{"ngram_rows": 97, **changes})).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight"))
            std = 0.03 if name.endswith("bias") else 0.9 if name.endswith("attn.c_proj.weight") else 0.3
            parameter.copy_(torch.randn(parameter.shape) * std + (1.0 if gain else 0.0))
    return model


ids = functools.partial(random_ids, vocab_size=61)


def prompts(lengths=LENGTHS) -> list[list[int]]:
    return [ids(n, seed=n).tolist() for n in lengths]


# ----------------------------------------------------------------------------------------------------------------------
# rows


def wrapped(number: int) -> int:
    """A whole number as 64 bits with a sign hold it."""
    number %= 2**64
    return number - 2**64 if number >= 2**63 else number


def row_of(tokens: list[int], n_rows: int) -> int:
    """The row of these tokens together, the newest last, -1 where there is none; in Python's own whole numbers."""
    number = 0
    for token in reversed(tokens):
        number = wrapped(number * 65537 + token + 1)
    mixed = wrapped(number * -7046029254386353131) // 2**32  # floor division is the shift that keeps the sign
    return mixed % n_rows + (len(tokens) - 2) * n_rows


def rows_of(text: list[int], t: int, ngrams: int, n_rows: int, before: list[int] | None = None) -> list[int]:
    """The rows of all n-grams that end with token t of text."""
    padded = [-1] * ngrams + (before or []) + text
    end = len(padded) - len(text) + t + 1
    return [row_of(padded[end - n : end], n_rows) for n in range(2, ngrams + 1)]


@smoke
@pytest.mark.parametrize("ngrams", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("n_rows", [1, 7, 97, 2**15, 2**31 + 11])
def test_rows_equal_those_of_the_hash_in_whole_numbers(ngrams, n_rows):
    for vocab_size in (3, 61, 50257, 65536):
        idx = ids(3, 9, seed=n_rows % 5, vocab_size=vocab_size)
        before = ids(3, ngrams - 1, seed=8, vocab_size=vocab_size)
        idx[0, 2:5], before[1, :-1] = vocab_size - 1, -1  # the largest id; a text that began a token ago
        got = ngram_ids(idx, before, ngrams, n_rows)
        assert got.shape == (3, 9, ngrams - 1) and got.dtype == torch.int64
        expected = [
            [rows_of(idx[b].tolist(), t, ngrams, n_rows, before[b].tolist()) for t in range(9)] for b in range(3)
        ]
        assert got.tolist() == expected
        assert ngram_ids(idx, None, ngrams, n_rows).tolist() == [
            [rows_of(text, t, ngrams, n_rows) for t in range(9)] for text in idx.tolist()
        ]


@smoke
def test_hash_of_five_large_ids_wraps_around():
    """Otherwise the numbers of the test above would fit into 64 bits and show little."""
    number = 0
    for _ in range(5):
        number = number * 65537 + 65536
    assert number > 2**64
    assert ngram_ids(torch.full((1, 5), 65535), None, 5, 1000)[0, -1, -1] == row_of([65535] * 5, 1000)


@smoke
def test_no_token_before_is_not_the_token_0():
    nothing, zeros = (ngram_ids(torch.tensor([[5]]), torch.full((1, 3), token), 4, 2**15) for token in (-1, 0))
    assert (nothing != zeros).all()
    assert torch.equal(nothing, ngram_ids(torch.tensor([[5]]), None, 4, 2**15))


@smoke
def test_tables_of_different_lengths_do_not_overlap():
    got = ngram_ids(ids(40, 60), None, 6, 50)
    for n in range(5):
        assert got[..., n].unique().tolist() == list(range(50 * n, 50 * n + 50))  # 2,400 n-grams reach all of 50 rows


@smoke
def test_same_ngram_has_the_same_row_wherever_it_stands():
    gram = [7, 0, 60, 7]
    text = [*gram, 3, *gram, *gram, 9, 9, 9, *gram]
    rows_at = ngram_ids(torch.tensor([text]), None, 4, 2**15)[0]
    ends = [3, 8, 12, 19]
    assert [text[end - 3 : end + 1] for end in ends] == [gram] * 4
    assert all(torch.equal(rows_at[end], rows_at[3]) for end in ends)
    assert len({tuple(row) for row in rows_at.tolist()}) == len({tuple(text[max(0, t - 3) : t + 1]) for t in range(20)})


@smoke
def test_rows_of_a_text_do_not_depend_on_the_other_texts_of_a_batch():
    idx, before = ids(5, 12), ids(5, 3, seed=1)
    whole = ngram_ids(idx, before, 4, 1000)
    for i in range(5):
        assert torch.equal(ngram_ids(idx[i : i + 1], before[i : i + 1], 4, 1000)[0], whole[i])
    assert not torch.equal(whole, ngram_ids(idx, before.flip(0), 4, 1000))


@smoke
@pytest.mark.parametrize("n_rows", [2**15, 4096, 4001])
def test_ngrams_spread_over_the_rows_nearly_as_by_chance(n_rows):
    """All pairs of 61 ids: n balls thrown into m boxes fill m (1 - e^(-n/m)) of them; so regular a set a bit fewer."""
    pairs = torch.cartesian_prod(torch.arange(61), torch.arange(61))
    texts = torch.cat([torch.full((len(pairs), 1), 5), pairs], dim=1)  # 3-grams that begin the same
    for n in (0, 1):
        used = ngram_ids(texts, None, 3, n_rows)[:, 2, n].unique().numel()
        assert used > 0.65 * n_rows * (1 - math.exp(-len(pairs) / n_rows))


@smoke
def test_tokens_before_equal_those_of_a_loop():
    text, at = ids(4, 9), torch.tensor([0, 1, 3, 8])
    for n in (1, 2, 5):
        expected = [
            [text[i, p - k].item() if p >= k else -1 for k in range(n, 0, -1)] for i, p in enumerate(at.tolist())
        ]
        assert previous_ids(text, at, n).tolist() == expected
    assert previous_ids(text, at, 0) is None


# ----------------------------------------------------------------------------------------------------------------------
# the model


def test_embedding_is_that_of_the_token_plus_one_of_each_ngram_that_it_ends():
    model, idx = make(4, pos_embd="rope"), ids(3, 8)
    table, wte = model.transformer.ngrams.weight, model.transformer.wte.weight
    with torch.no_grad():
        got = model.embed(idx, torch.arange(8))
        for b, text in enumerate(idx.tolist()):
            for t in range(8):
                expected = wte[text[t]] + sum(table[row] for row in rows_of(text, t, 4, 97))
                torch.testing.assert_close(got[b, t], expected, atol=1e-6, rtol=1e-5)


@smoke
@each_scheme
def test_logits_of_a_prefix_do_not_depend_on_what_follows_nor_on_other_texts(pos_embd):
    model, idx = make(4, pos_embd=pos_embd), ids(3, 8)
    whole = all_logits(model, idx)
    for t in range(1, 9):
        torch.testing.assert_close(all_logits(model, idx[:, :t]), whole[:, :t], **CLOSE)
        torch.testing.assert_close(all_logits(model, idx[1:2, :t])[0], whole[1, :t], **CLOSE)


@smoke
def test_changing_a_token_changes_nothing_before_it_and_all_after_it():
    model, idx = make(3), ids(2, 8)
    before = all_logits(model, idx)
    for t in range(8):
        changed = idx.clone()
        changed[0, t] = (changed[0, t] + 1) % 61
        after = all_logits(model, changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], atol=0, rtol=0)
        torch.testing.assert_close(after[1], before[1], atol=0, rtol=0)
        assert ((after - before)[0, t:].abs().amax(-1) > 1e-3).all()


def test_a_token_acts_through_ngrams_on_those_that_follow_it_and_no_farther():
    """In what enters the first layer: of 3-grams the token itself and the next two."""
    model, idx = make(3), ids(1, 8)
    changed = idx.clone()
    changed[0, 2] = (changed[0, 2] + 1) % 61
    with torch.no_grad():
        one, other = (model.embed(text, torch.arange(8)) for text in (idx, changed))
    assert (one != other).any(-1)[0].tolist() == [False, False, True, True, True, False, False, False]


@smoke
@each_scheme
def test_a_new_model_with_ngrams_computes_what_the_one_without_does(pos_embd):
    idx = ids(2, 8)
    models = []
    for ngrams in (1, 4):
        torch.manual_seed(3)
        models.append(GPT(replace(TINY, pos_embd=pos_embd, ngrams=ngrams, ngram_rows=50)))
    plain, new = models
    assert not new.transformer.ngrams.weight.any()
    weights = {name: tensor for name, tensor in new.state_dict().items() if name != NGRAM_TABLE}
    plain.load_state_dict(weights)  # strict: the names are those of the plain model
    torch.testing.assert_close(all_logits(new.eval(), idx), all_logits(plain.eval(), idx), atol=0, rtol=0)
    new(idx, idx)[1].backward()
    assert new.transformer.ngrams.weight.grad.any()  # though it starts at zero, it learns


@smoke
def test_names_shapes_and_cost_by_hand():
    plain, model = GPT(TINY), GPT(replace(TINY, ngrams=4, ngram_rows=50))
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    assert NGRAM_TABLE == "transformer.ngrams.weight" and shapes.pop(NGRAM_TABLE) == (150, 16)
    assert shapes == {name: tuple(p.shape) for name, p in plain.state_dict().items()}
    assert model.get_num_params() == plain.get_num_params() + 150 * 16
    assert model.flops_per_token() == plain.flops_per_token()  # what is looked up multiplies nothing
    for one in (GPT(replace(TINY, tie_weights=True)), GPT(replace(TINY, tie_weights=True, ngrams=2, ngram_rows=9))):
        block = (16 * 48 + 48) + (16 * 16 + 16) + (16 * 64 + 64) + (64 * 16 + 16) + 4 * 16
        assert one.flops_per_token() == 6 * (2 * block + 61 * 16 + 2 * 16) + 12 * 2 * 16 * 8


@smoke
def test_every_parameter_is_in_one_group_and_the_table_in_one_of_its_own():
    for muon in (False, True):
        model = make(3, pos_embd="default+relative", tie_weights=True)
        groups = [*model.parameter_groups(muon).values()]
        names = [name for name, _ in model.named_parameters()]
        assert sorted(sum(groups, [])) == sorted(names)
        assert groups[-2:] == [[NGRAM_TABLE], [RELATIVE_TABLE]]
        in_blocks = [
            name
            for name in names
            if name.startswith("transformer.h.") and name.endswith("weight") and ".ln_" not in name
        ]
        assert len(in_blocks) == 8 and (groups[2] == in_blocks if muon else set(in_blocks) <= set(groups[0]))


@pytest.mark.parametrize("sparse", [False, True])
def test_configure_optimizers_moves_an_ngram_table_whatever_its_gradients(sparse):
    model, idx = make(3), ids(2, 6)
    expected = copy.deepcopy(model)
    model.transformer.ngrams.sparse = sparse
    for one in (model, expected):
        optimizer = one.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
        for _ in range(3):
            optimizer.zero_grad()
            one(idx, idx)[1].backward()
            optimizer.step()
    assert torch.equal(model.transformer.ngrams.weight, expected.transformer.ngrams.weight)


def test_cropping_keeps_the_logits_of_short_texts():
    model, idx = make(4), ids(2, 5)
    before = all_logits(model, idx)
    model.crop_block_size(5)
    torch.testing.assert_close(all_logits(model, idx), before, atol=0, rtol=0)
    assert model.transformer.ngrams.weight.shape == (3 * 97, 16)
    assert generated_ids(model, [[1, 2]], 20, seed=0) == generated_ids(model, [[1, 2]], 20, seed=0, use_kv_cache=False)


@pytest.mark.parametrize("tie_weights", [True, False])
def test_a_grown_vocabulary_keeps_the_logits_of_old_ids(tie_weights):
    """The rows of n-grams depend on ids alone, not on how many there are."""
    model, idx = make(4, tie_weights=tie_weights), ids(2, 8)
    before = all_logits(model, idx)
    grow_vocabulary(model, 70)
    after = all_logits(model, idx)
    assert after.shape == (2, 8, 70)
    torch.testing.assert_close(after[..., :61], before, atol=1e-5, rtol=1e-5)  # a wider product may be summed otherwise
    assert torch.isfinite(all_logits(model, ids(2, 8, vocab_size=70))).all()


@pytest.mark.parametrize("pos_embd", ["rope", "relative", "alibi"])
def test_texts_longer_than_block_size_have_ngrams_too(pos_embd):
    model, idx = make(3, pos_embd=pos_embd), ids(2, 20)
    changed = idx.clone()
    changed[:, 17] = (changed[:, 17] + 1) % 61
    before, after = all_logits(model, idx), all_logits(model, changed)
    torch.testing.assert_close(after[:, :17], before[:, :17], **CLOSE)
    assert not torch.allclose(after[:, 17:], before[:, 17:])


@smoke
@pytest.mark.parametrize(
    "changes, parts",
    [
        (dict(ngrams=0), ("ngrams=0", "at least 1")),
        (dict(ngrams=-2), ("ngrams=-2",)),
        (dict(ngram_rows=0), ("ngram_rows=0", "at least 1")),
        (dict(ngrams=3, ngram_rows=-5), ("ngram_rows=-5",)),
        (dict(model_type="bigram", ngrams=3), ("bigram", "ngrams=3")),
    ],
)
def test_architecture_that_cannot_be_is_refused(changes, parts, tiny_data):
    with pytest.raises(ValueError) as caught:
        GPTConfig(**changes)
    assert all(part in str(caught.value) for part in parts)
    with pytest.raises(ValueError) as caught:  # and so it is from the command line
        train.main([f"--data_dir={tiny_data}", *TINY_RUN, *(f"--{key}={value}" for key, value in changes.items())])
    assert all(part in str(caught.value) for part in parts) and not os.path.exists("out")


# ----------------------------------------------------------------------------------------------------------------------
# decoding


@each_scheme_and_length
def test_cache_gives_the_same_ids_for_prompts_of_different_lengths(ngrams, pos_embd):
    model = make(ngrams, pos_embd=pos_embd)
    for settings in (dict(temperature=0), dict(seed=5, temperature=0.8, top_k=20, top_p=0.9)):
        with_cache = generated_ids(model, prompts(), 20, **settings)  # several windows of 8
        assert with_cache == generated_ids(model, prompts(), 20, use_kv_cache=False, **settings)
        assert len({tuple(row) for row in with_cache}) == len(LENGTHS)


@each_length
def test_rows_of_equal_and_of_the_same_prompts_too(ngrams):
    """Both are encoded in ways of their own: from one position on, and once for all rows."""
    model = make(ngrams, pos_embd="rope")
    for texts in (prompts((5, 5, 5)), [ids(5, seed=n).tolist() for n in range(3)], prompts((9, 9)), [[3]] * 2):
        got = generated_ids(model, texts, 20, seed=2)
        assert got == generated_ids(model, texts, 20, seed=2, use_kv_cache=False)
        assert len({tuple(row) for row in got}) == len(texts)


@pytest.mark.parametrize("ngrams, use_kv_cache", [(2, True), (3, False), (5, True)])
def test_greedy_ids_are_those_of_forward_passes_over_what_is_seen(ngrams, use_kv_cache):
    """Beyond block_size too: what was seen before the newest half is in no n-gram either."""
    for block_size in (4, 7):
        model = make(ngrams, block_size=block_size)
        for row in prompts((1, 2, 5, 30)):
            new = generated_ids(model, [row], 20, temperature=0, use_kv_cache=use_kv_cache)[0]
            expected = [all_logits(model, [window])[0, -1].argmax().item() for window in windows(row, new, block_size)]
            assert new == expected


@each_length
def test_a_row_of_a_batch_is_what_it_is_alone(ngrams):
    model, texts = make(ngrams), prompts()
    together = generated_ids(model, texts, 20, temperature=0)
    for row, new in zip(texts, together):
        assert generated_ids(model, [row], 20, temperature=0) == [new]
    for first in (1, 9, 30):  # of drawn ids the first row alone has the random numbers that it would have alone
        texts = prompts((first, 2, 12))
        assert generated_ids(model, texts, 20, seed=5)[0] == generated_ids(model, texts[:1], 20, seed=5)[0]


def test_the_texts_of_these_tests_are_varied_and_ngrams_decide_them():
    model = make(3)
    text = generated_ids(model, prompts((2,)), 60, temperature=0)[0]
    assert len(set(text)) > 6
    with torch.no_grad():
        model.transformer.ngrams.weight.zero_()
    assert generated_ids(model, prompts((2,)), 60, temperature=0)[0][:10] != text[:10]


@pytest.mark.parametrize("ngrams, size", [(2, 1), (3, 2), (5, 5), (5, 1)])
def test_long_prompts_are_encoded_in_pieces_that_know_the_tokens_before_them(ngrams, size, monkeypatch):
    model = make(ngrams, block_size=32, pos_embd="rope")
    texts = prompts((1, 11, 30))
    expected = [generated_ids(model, rows, 12, seed=3, use_kv_cache=False) for rows in (texts, texts[2:] * 2)]
    encoded = []
    model.transformer.h[0].register_forward_pre_hook(lambda _, args: encoded.append(tuple(args[0].shape[:2])))
    monkeypatch.setattr(decoding, "PREFILL_CHUNK_TOKENS", 3 * size)
    assert generated_ids(model, texts, 12, seed=3) == expected[0]
    assert encoded[:5] == [(3, size)] * 5  # they did come in pieces
    monkeypatch.setattr(decoding, "PREFILL_CHUNK_TOKENS", size)
    assert generated_ids(model, texts[2:] * 2, 12, seed=3) == expected[1]


@pytest.mark.parametrize("ngrams, pos_embd", [(2, "default"), (3, "rope"), (5, "default")])
def test_a_decoder_that_keeps_its_texts_writes_what_a_new_one_would(ngrams, pos_embd):
    """As chat.py asks: each prompt goes on from the text before it, from a part of it, or is another one."""
    model = make(ngrams, pos_embd=pos_embd, block_size=16)
    kept, text = Decoder(model, 1, reuse_prefix=True), [4, 7, 1]
    encoded = []
    model.transformer.h[0].register_forward_pre_hook(lambda _, args: encoded.append(args[0].shape[1]))
    for turn in range(14):
        before = len(encoded)
        got = generated_ids(model, [text], 5, temperature=0.9, seed=turn, decoder=kept)[0]
        if turn == 1:
            assert sum(encoded[before:]) < 3 + 5 + 4 + 5  # not all of the prompt was encoded once more
        assert got == generated_ids(model, [text], 5, temperature=0.9, seed=turn, use_kv_cache=False)[0], turn
        text = text + got + ids(turn % 5 + 1, seed=turn).tolist()
        text = [*text[:4], *ids(2, seed=turn).tolist()] if turn % 4 == 2 else text[3:] if turn % 4 == 3 else text


@needs_compiler
@each_scheme_and_length
def test_packed_weights_write_the_same_texts(ngrams, pos_embd, monkeypatch):
    """rows.c runs the blocks of new tokens; what enters them is looked up as ever."""
    model = make(ngrams, pos_embd=pos_embd)
    expected = generated_ids(model, prompts(), 20, seed=4)
    made, init = [], cpu.PackedBlocks.__init__
    monkeypatch.setattr(cpu, "PACKING_MIN_PARAMS", 1)
    monkeypatch.setattr(cpu.PackedBlocks, "__init__", lambda self, *args: (made.append(1), init(self, *args))[1])
    assert generated_ids(model, prompts(), 20, seed=4) == expected
    assert made


@needs_compiler
def test_packed_weights_give_the_same_logits(monkeypatch):
    model, texts, seen = make(3, pos_embd="rope", block_size=16), prompts((1, 2, 9, 14)), {}
    draw = Decoder._sample
    for name in ("plain", "packed"):
        logits = seen[name] = []
        monkeypatch.setattr(Decoder, "_sample", lambda self, new, logits=logits: (logits.append(new), draw(self, new)))
        generated_ids(model, texts, 40, temperature=0)
        monkeypatch.setattr(cpu, "PACKING_MIN_PARAMS", 1)
    assert len(seen["plain"]) == len(seen["packed"]) == 40
    for plain, packed in zip(seen["plain"], seen["packed"]):
        assert packed is not plain
        torch.testing.assert_close(packed, plain, **CLOSE)


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints and programs


@pytest.fixture(scope="module")
def ngram_data(tmp_path_factory) -> str:
    """A folder with a small character corpus."""
    return write_corpus(tmp_path_factory.mktemp("ngram_data"), generated_text(3000, seed=4))


@pytest.fixture(scope="module")
def ngram_run(tmp_path_factory, ngram_data) -> str:
    """The out_dir of a small finished run with n-grams, Muon, no dropout and learned positions. Read it only."""
    out_dir = str(tmp_path_factory.mktemp("ngram_run") / "out")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    args = [f"--data_dir={ngram_data}", f"--out_dir={out_dir}", *WITH_NGRAMS, "--dropout=0"]
    assert train.main(args) == 0
    torch.set_num_threads(threads)
    return out_dir


@smoke
def test_model_args_name_what_nanogpts_model_cannot_have_and_no_more():
    config = replace(TINY, tie_weights=True)
    plain = model_args(config)
    assert set(plain) == {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}
    for changes in (dict(ngrams=3), dict(ngrams=3, ngram_rows=50), dict(ngrams=2, tie_weights=False)):
        args = model_args(replace(config, **changes))
        assert args == {**plain, **changes}
        assert GPTConfig(**args) == replace(config, **changes)


@pytest.mark.parametrize("ngrams, n_rows", [(2, 97), (4, 32768)])
def test_a_saved_model_gives_the_same_logits_and_texts(ngrams, n_rows, tmp_path):
    model, idx, path = make(ngrams, ngram_rows=n_rows), ids(2, 8), str(tmp_path / "ckpt.pt")
    save(
        {
            "model": model.state_dict(),
            "model_args": model_args(model.config),
            "tokenizer": None,
            "format_version": FORMAT_VERSION,
        },
        path,
    )
    loaded, _ = load_model(path)
    assert loaded.config == model.config
    torch.testing.assert_close(all_logits(loaded, idx), all_logits(model, idx), atol=0, rtol=0)
    assert generated_ids(loaded, prompts(), 20, seed=1) == generated_ids(model, prompts(), 20, seed=1)


def test_a_checkpoint_that_lacks_its_table_is_refused(tmp_path):
    model, path = make(3), str(tmp_path / "ckpt.pt")
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != NGRAM_TABLE}
    save({"model": weights, "model_args": model_args(model.config), "format_version": FORMAT_VERSION}, path)
    with pytest.raises(ValueError, match=f'Missing key.*"{NGRAM_TABLE}"'):
        load_model(path)
    save(
        {
            "model": model.state_dict(),
            "model_args": {**model_args(model.config), "ngram_rows": 98},
            "format_version": FORMAT_VERSION,
        },
        path,
    )
    with pytest.raises(ValueError, match=NGRAM_TABLE):
        load_model(path)


def test_a_run_stores_its_architecture_and_its_final_loss_is_that_of_evaluate(ngram_run, capsys):
    args = load(ngram_run, "ckpt.pt")["model_args"]
    assert (args["ngrams"], args["ngram_rows"]) == (3, 500)
    assert set(args) == {*NANOGPT_ARG_NAMES, "ngrams", "ngram_rows"}
    (final,) = read_log(ngram_run, "final")
    capsys.readouterr()
    evaluate.main([ngram_run, "--json"])
    (measured,) = json.loads(capsys.readouterr().out)
    assert measured["loss"] == pytest.approx(final["val_loss"], abs=1e-5)
    assert measured["bits_per_byte"] == pytest.approx(final["bits_per_byte"], abs=1e-5)
    assert measured["tokens"] == final["tokens"]


@pytest.mark.parametrize("more", [[], ["--dtype=bfloat16"], ["--quantize=int8"], ["--use_kv_cache=False"]], ids=str)
def test_sample_prints_texts_of_a_run_with_ngrams(more, ngram_run, capsys):
    sample.main(
        [
            f"--out_dir={ngram_run}",
            "--device=cpu",
            "--start=the knight",
            "--num_samples=2",
            "--max_new_tokens=40",
            *more,
        ]
    )
    said = capsys.readouterr().out
    assert said.count("the knight") >= 2 and said.count("-" * 15) >= 2
    assert all(len(text) > 40 for text in said.split("-" * 15)[:2])


@pytest.mark.parametrize("given, stored", [("--ngrams=4", "3"), ("--ngrams=1", "3"), ("--ngram_rows=100", "500")])
def test_an_architecture_that_contradicts_the_checkpoint_is_refused(given, stored, ngram_run):
    shutil.copytree(ngram_run, "out")
    for init_from in ("--init_from=resume", "--init_from=out/ckpt.pt"):
        with pytest.raises(ValueError) as caught:
            train.main([init_from, "--out_dir=out", f"--data_dir={load('out')['config']['data_dir']}", given])
        assert given[2:].partition("=")[0] in str(caught.value) and stored in str(caught.value)
    assert_same(load("out"), load(ngram_run))


def test_a_run_from_the_weights_of_another_has_its_ngrams(ngram_run, ngram_data):
    best = load(ngram_run, "ckpt.pt")
    train.main(
        [
            f"--data_dir={ngram_data}",
            f"--init_from={ngram_run}",
            "--out_dir=tuned",
            *TINY_RUN,
            "--dropout=0",
            "--learning_rate=0",
            "--min_lr=0",
        ]
    )
    tuned = load("tuned", "ckpt.pt")
    assert tuned["model_args"] == best["model_args"]
    assert_same(tuned["model"], best["model"])  # at a learning rate of 0


def test_hugging_face_gets_the_code_of_a_model_with_ngrams(ngram_run, tmp_path, capsys, transformers):
    ckpt_update.main([os.path.join(ngram_run, "ckpt.pt"), "folder", "--to=hf"])
    assert "same logits as in transformers" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["folder"] and "modeling_dongpt.py" in os.listdir("folder")


def test_hugging_face_takes_a_model_that_muon_trained(ngram_data, transformers):
    train.main([f"--data_dir={ngram_data}", *TINY_RUN, "--optimizer=muon", "--bias=True"])
    assert set(load("out")["model_args"]) == set(NANOGPT_ARG_NAMES)
    ckpt_update.main(["out", "folder", "--to=hf"])
    theirs, (model, _) = transformers.GPT2LMHeadModel.from_pretrained("folder").eval(), load_model("out")
    idx = ids(2, 16, vocab_size=model.config.vocab_size)
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, all_logits(model, idx), **CLOSE)
    torch.testing.assert_close(all_logits(load_model("folder")[0], idx), all_logits(model, idx), **CLOSE)


def states_by_name(checkpoint: dict, relative: bool) -> dict[str, dict]:
    """The optimizer states of a checkpoint with n-grams and Muon by the names of their parameters, as its own model
    numbers them: matrices that Muon does not move, vectors, the blocks' matrices, the tables."""
    weights = checkpoint["model"]
    in_blocks = [name for name in weights if name.startswith("transformer.h.") and weights[name].dim() == 2]
    vectors = [name for name in weights if weights[name].dim() == 1]
    tables = [NGRAM_TABLE] + [RELATIVE_TABLE] * relative
    others = [name for name in weights if name not in {*in_blocks, *vectors, *tables, "lm_head.weight"}]
    names = [*others, *vectors, *in_blocks, *tables]
    groups = checkpoint["optimizer"]["param_groups"]
    assert [len(group["params"]) for group in groups] == [len(others), len(vectors), len(in_blocks)] + [1] * len(tables)
    numbers = sum((group["params"] for group in groups), [])
    state = checkpoint["optimizer"]["state"]
    assert set(state) <= set(numbers)
    return {name: state[number] for name, number in zip(names, numbers) if number in state}


def test_ckpt_update_of_a_run_with_ngrams_and_muon_keeps_each_state_with_its_parameter(ngram_run, ngram_data):
    old = load(ngram_run)
    os.makedirs("out")
    ckpt_update.main([os.path.join(ngram_run, "ckpt_last.pt"), "out/ckpt.pt", "--pos_embd=default+relative"])
    new = load("out", "ckpt.pt")
    assert new["model_args"] == {**old["model_args"], "pos_embd": "default+relative"}
    assert set(new["model"]) - set(old["model"]) == {RELATIVE_TABLE} and not new["model"][RELATIVE_TABLE].any()
    before, after = states_by_name(old, False), states_by_name(new, True)
    assert_same(after, before)
    adamw = {"step", "exp_avg", "exp_avg_sq"}
    kinds = {
        "transformer.wte.weight": adamw,
        "transformer.ln_f.weight": adamw,
        NGRAM_TABLE: {"square", "count"},
        "transformer.h.1.mlp.c_fc.weight": {"momentum"},
    }
    assert {name: set(before[name]) for name in kinds} == kinds
    assert len(before) == len(old["model"]) - 1  # all but the head, which is tied

    assert train.main(["--init_from=resume", "--out_dir=out", f"--data_dir={ngram_data}", "--max_iters=9"]) == 0
    resumed = load("out")
    assert resumed["iter_num"] == 9 and resumed["model"][RELATIVE_TABLE].any()
    states = states_by_name(resumed, True)
    assert states["transformer.wte.weight"]["step"] == before["transformer.wte.weight"]["step"] + 3
    assert states[RELATIVE_TABLE]["step"] == 3
    assert (states[NGRAM_TABLE]["count"] >= before[NGRAM_TABLE]["count"]).all()
    assert [group.get("rule") for group in resumed["optimizer"]["param_groups"]] == [None, None, "muon", "rows", None]


def test_a_converted_run_goes_on_as_the_old_one_while_its_new_table_stays_at_zero(ngram_run, ngram_data, monkeypatch):
    """Its gradient is taken away. The states count: a run that goes on without them has other losses."""
    clip = updates.clip_gradients

    def without_relative(model, largest):
        if model.config.has_relative:
            model.transformer.relative.relative_embeddings.weight.grad = None
        clip(model, largest)

    monkeypatch.setattr(updates, "clip_gradients", without_relative)
    os.makedirs("converted")
    ckpt_update.main([os.path.join(ngram_run, "ckpt_last.pt"), "converted/ckpt.pt", "--pos_embd=default+relative"])
    shutil.copytree(ngram_run, "old")
    os.makedirs("fresh")
    save({key: value for key, value in load("old").items() if key != "optimizer"}, "fresh/ckpt.pt")
    losses = {}
    for name in ("old", "converted", "fresh"):
        train.main(
            [
                f"--data_dir={ngram_data}",
                "--init_from=resume",
                f"--out_dir={name}",
                "--max_iters=9",
                "--lr_decay_iters=12",
            ]
        )
        losses[name] = [record["loss"] for record in read_log(name, "iter")][-3:]
    assert losses["converted"] == pytest.approx(losses["old"], abs=1e-4)
    assert losses["fresh"] != pytest.approx(losses["old"], abs=1e-3)
    assert not load("converted")["model"][RELATIVE_TABLE].any()
