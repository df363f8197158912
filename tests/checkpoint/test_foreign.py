"""Checkpoints of other systems: load_model gives their logits, ckpt_update.py converts them, a resumed run goes on.

The references in ancestors.py are independent of model.py. Each file here is generated; fixtures come on top.
"""

import contextlib
import itertools
import os
import pickle
import re
import shutil

import ancestors
import pytest
import torch
from ancestors import NanoGPT, Plus, PlusBigram
from helpers import expect_sentence, generated_text, run, split_text, write_splits

from dongpt.checkpoint import files as checkpoints
from dongpt.checkpoint.files import load_model
from dongpt.checkpoint.legacy import build_model
from dongpt.program import locked_directory, locked_output
from dongpt.text.tokenizers import CharTokenizer
from dongpt.train.data import Corpus
from model import GPT, GPTConfig

smoke = pytest.mark.smoke  # the tests without it start programs, train, import transformers, or are many

RELATIVE = "transformer.relative.relative_embeddings.weight"
CHARACTERS = CharTokenizer.from_text(generated_text()).characters  # of the corpus tiny_data
SIZES = {
    "1 head, odd sizes": dict(n_layer=1, n_head=1, n_embd=10, block_size=5, vocab_size=7, bias=True),
    "3 heads": dict(n_layer=2, n_head=3, n_embd=24, block_size=9, vocab_size=31, bias=False),
    "odd heads": dict(n_layer=2, n_head=2, n_embd=6, block_size=4, vocab_size=5, bias=False),  # of 3 channels each
    "11 layers": dict(n_layer=11, n_head=4, n_embd=8, block_size=8, vocab_size=11, bias=True),  # h.10 before h.2
}
SMALL_SIZES = [size for size in SIZES if size != "11 layers"]
EDS = [("A", None), ("B", "default"), ("B", "rope"), ("C", "default"), ("C", "rope"), ("C", "relative")]
FIXTURES = [
    "nanogpt_bias.pt",
    "nanogpt_nobias.pt",
    "nanogpt_compiled_prefix.pt",
    "eds_default.pt",
    "eds_rope.pt",
    "eds_relative.pt",
    "nanogptplus.pth.tar",
]
pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


def put(content, path) -> str:
    """Save content, a checkpoint of whatever layout, at path, whose folder is made; returns path as text."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    torch.save(content, path)
    return str(path)


def convert(old, new, *args) -> str:
    """Run ckpt_update.py's main, which must end well; returns new as text."""
    import ckpt_update

    assert not ckpt_update.main([str(old), str(new), *args])
    return str(new)


def refuses(action, *parts: str) -> str:
    """Check that action raises ValueError with one line that holds parts; returns it."""
    with pytest.raises(ValueError) as caught:
        action()
    sentence = str(caught.value)
    assert "\n" not in sentence, sentence
    for part in parts:
        assert part in sentence, f"{part!r} is not in {sentence!r}"
    return sentence


def refuses_to_convert(old, new, *args_and_parts: str) -> str:
    """Check that ckpt_update.py refuses with one sentence, and that no file came, went or changed."""
    args = [arg for arg in args_and_parts if arg.startswith("--")]
    before = tree_here()
    sentence = refuses(lambda: convert(old, new, *args), *[part for part in args_and_parts if part not in args])
    assert tree_here() == before
    return sentence


def tree_here() -> dict:
    """Every file below the working directory with its content; folders and links too."""
    content = {}
    for folder, folders, names in os.walk("."):
        for name in folders + names:
            path = os.path.join(folder, name)
            content[path] = open(path, "rb").read() if os.path.isfile(path) else None
    return content


def ids_for(old, length: int | None = None):
    return torch.randint(old.vocab_size, (3, length or old.block_size), generator=torch.Generator().manual_seed(1))


def model_logits(model, idx):
    with torch.no_grad():
        return model(idx, idx)[0]


def assert_same_logits(model, old, lengths=None):
    """Check a model against an ancestor at several lengths, some of EDS's depend on that."""
    for length in lengths or sorted({1, old.block_size // 2, old.block_size - 1, old.block_size}):
        idx = ids_for(old, length)
        with torch.no_grad():
            expected = old.logits(idx)
            last = model(idx)[0]
        torch.testing.assert_close(model_logits(model, idx), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(last, expected[:, -1:], rtol=0, atol=1e-5)


def legacy_of(path) -> str | None:
    """Which of EDS's own mathematics a converted file asks for."""
    return torch.load(path, weights_only=True)["model_args"].get("legacy")


def stored_states(path) -> dict[str, dict]:
    """The optimizer states of one of our files, by the name of the parameter to which a resume gives them."""
    checkpoint, (model, _) = torch.load(path, weights_only=True), load_model(path)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu").param_groups
    stored = checkpoint["optimizer"]["param_groups"]
    assert [len(group["params"]) for group in stored] == [len(group["params"]) for group in groups]
    states = {}
    for group, stored_group in zip(groups, stored):
        for parameter, index in zip(group["params"], stored_group["params"]):
            if state := checkpoint["optimizer"]["state"].get(index):
                states[names[id(parameter)]] = state
                assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape, names[id(parameter)]
    assert len(states) == len(checkpoint["optimizer"]["state"])  # none is left over
    return states


def assert_same_states(path, old):
    """Check that each parameter has the optimizer state that it had, bit for bit, and no other has one."""
    states, expected = stored_states(path), old.states()
    assert states.keys() == expected.keys()
    for name, state in expected.items():
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(states[name][key], state[key]), (name, key)
        assert float(states[name]["step"]) == float(state["step"]), name


def describe(case) -> str:
    return " ".join(map(str, case)) if isinstance(case, tuple) else str(case)


# ----------------------------------------------------------------------------------------------------------------------
# load_model


@pytest.mark.parametrize(
    "case, size", [*itertools.product(EDS, SMALL_SIZES), (EDS[0], "11 layers"), (EDS[5], "11 layers")], ids=describe
)
def test_files_of_nanogpt_and_eds_give_their_logits(tmp_path, case, size):
    generation, pos_embd = case
    old = NanoGPT(pos_embd, generation, **SIZES[size]).train(1)
    model, tokenizer = load_model(put(old.checkpoint(), tmp_path / "ckpt.pt"))
    assert isinstance(model, GPT) and not model.training and tokenizer is None
    assert_same_logits(model, old)


@pytest.mark.parametrize(
    "case, bias, more",
    [
        (("A", None), True, dict(prefix="_orig_mod.")),
        (("A", None), True, dict(prefix="module.")),
        (("A", None), True, dict(masks=True)),
        (("A", None), False, dict(masks=True)),
        (("A", None), False, dict(prefix="module._orig_mod.", masks=True)),
        (("A", None), True, dict(config=None)),
        (("A", None), True, dict(data_dir="data/emotion/with_gpt_data")),
        (("C", "relative"), False, dict(prefix="_orig_mod.", masks=True)),
        (("C", "relative"), True, dict(config=None)),
    ],
    ids=describe,
)
def test_prefixes_masks_and_a_missing_config_change_nothing(tmp_path, case, bias, more):
    generation, pos_embd = case
    old = NanoGPT(pos_embd, generation, bias=bias).train(1)
    path = put(old.checkpoint(**more), tmp_path / "ckpt.pt")
    assert_same_logits(load_model(path)[0], old)


@pytest.mark.parametrize("case", [("A", None), ("B", "default"), ("B", "rope")], ids=describe)
def test_files_that_edss_notebook_updated_give_their_logits(tmp_path, case):
    generation, pos_embd = case
    old = NanoGPT(pos_embd, generation, n_head=4).train(1)
    model, _ = load_model(put(old.checkpoint(updated=True), tmp_path / "ckpt.pt"))
    assert_same_logits(model, old)


@smoke
def test_a_file_of_nanogpt_from_before_the_bias_switch_has_biases(tmp_path):
    old = NanoGPT(bias=True, gelu="tanh").train(1, old_groups=True)
    checkpoint = old.checkpoint(masks=True, config=None)
    del checkpoint["model_args"]["bias"]  # nanoGPT wrote it from 27 January 2023 on
    path = put(checkpoint, tmp_path / "old.pt")
    assert_same_logits(load_model(path)[0], old)
    new = convert(path, tmp_path / "ckpt.pt")
    assert torch.load(new, weights_only=True)["model_args"]["bias"] is True
    assert_same_logits(load_model(new)[0], old)


@smoke
def test_a_head_that_is_not_tied_stays_so(tmp_path):
    old = NanoGPT(bias=True).train(1)
    checkpoint = old.checkpoint()
    head = checkpoint["model"]["lm_head.weight"] = torch.randn(13, 16)  # nanoGPT before 14 January 2023
    model, _ = load_model(put(checkpoint, tmp_path / "old.pt"))
    wte = model.transformer.wte.weight
    assert torch.equal(model.lm_head.weight, head) and torch.equal(wte, old.weights["transformer.wte.weight"])


@smoke
def test_the_gelu_of_an_old_file_is_what_the_caller_says(tmp_path):
    old = NanoGPT(gelu="tanh", bias=True).train(1)
    path = put(old.checkpoint(), tmp_path / "old.pt")
    assert_same_logits(load_model(path, activation="gelu_tanh")[0], old)
    assert not torch.allclose(model_logits(load_model(path)[0], ids_for(old)), old.logits(ids_for(old)), atol=1e-5)


@pytest.mark.parametrize(
    "size, bias, tied", [*((size, False, True) for size in SIZES), ("3 heads", True, True), ("3 heads", False, False)]
)
def test_files_of_nanogptplus_give_their_logits(tmp_path, size, bias, tied):
    old = Plus(**{**SIZES[size], "bias": bias}, tied=tied)
    path = put(old.checkpoint(), tmp_path / "gpt_model_small.pth.tar")
    model, _ = load_model(path, n_head=old.n_head)
    assert_same_logits(model, old)
    assert model.config.tie_weights == tied == (model.lm_head.weight is model.transformer.wte.weight)


@smoke
@pytest.mark.parametrize("n_head", [1, 2, 4])
def test_the_heads_of_nanogptplus_are_what_the_caller_says(tmp_path, n_head):
    path = put(Plus(n_head=n_head).checkpoint(), tmp_path / "gpt_model_small.pth.tar")
    assert_same_logits(load_model(path, n_head=n_head)[0], Plus(n_head=n_head))


@smoke
@pytest.mark.parametrize("vocab_size", [1, 2, 7, 64])
def test_the_bigram_of_nanogptplus_gives_its_logits_and_needs_no_flag(tmp_path, vocab_size):
    old = PlusBigram(vocab_size)
    model, _ = load_model(put(old.checkpoint(), tmp_path / "bigram_model.pth.tar"))
    assert_same_logits(model, old)
    assert model.config.model_type == "bigram"
    assert model.generate(torch.zeros(2, 3, dtype=torch.int64), 20, seed=1).shape == (2, 23)


@smoke
def test_lora_of_nanogptplus_is_merged_once(tmp_path, capsys):
    old = Plus()
    content = old.checkpoint()
    for name in [name for name in content if name.endswith("causal_self_attention.weight")]:
        stem = name.removesuffix("weight")  # the file holds the merged weight, and these on top: ANCESTORS C2.9
        content[stem + "lora_A"], content[stem + "lora_B"] = torch.ones(4, 16), torch.ones(32, 2)
    path = put(content, tmp_path / "gpt_model_small.pth.tar")
    assert_same_logits(load_model(path, n_head=2)[0], old)
    assert "LoRA" in capsys.readouterr().err


@smoke
@pytest.mark.parametrize("name", FIXTURES)
def test_fixtures_give_their_logits(fixtures_folder, name):
    expected = torch.load(os.path.join(fixtures_folder, name.split(".")[0] + ".expected.pt"), weights_only=True)
    more = {"n_head": expected["hyper_parameters"]["num_heads"]} if "hyper_parameters" in expected else {}
    model, tokenizer = load_model(os.path.join(fixtures_folder, name), **more)
    idx = expected["idx"]
    torch.testing.assert_close(model_logits(model, idx), expected["logits"], rtol=0, atol=1e-5)
    if "logits_first_half" in expected:
        half = model_logits(model, idx[:, : expected["logits_first_half"].shape[1]])
        torch.testing.assert_close(half, expected["logits_first_half"], rtol=0, atol=1e-5)
    assert tokenizer.vocab_size == 64  # of the meta.pkl beside it


@smoke
@pytest.mark.parametrize("pos_embd", ["rope", "relative"])
def test_our_own_rope_and_relative_are_not_mistaken_for_edss(tmp_path, pos_embd):
    config = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=13, bias=False, pos_embd=pos_embd)
    torch.manual_seed(0)
    ours = build_model(config).eval()
    for parameter in ours.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    checkpoint = {
        "model": ours.state_dict(),
        "model_args": checkpoints.model_args(config),
        "iter_num": 1,
        "best_val_loss": 2.0,
        "config": {},
        "format_version": checkpoints.FORMAT_VERSION,
    }
    model, _ = load_model(put(checkpoint, tmp_path / "ckpt.pt"))
    assert model.config.pos_embd == pos_embd and "legacy" not in checkpoint["model_args"]
    idx = torch.randint(13, (2, 8))
    assert torch.equal(model_logits(model, idx), model_logits(ours, idx))


# ----------------------------------------------------------------------------------------------------------------------
# EDS's own mathematics


def greedy_in_windows(old, ids: list[int], n: int) -> list[int]:
    """Greedy decoding by the rule of DESIGN.md: one token more than block_size, and the newest half is kept."""
    window, text = ids[-old.block_size :], list(ids)
    for _ in range(n):
        if len(window) > old.block_size:
            window = window[-max(1, old.block_size // 2) :]
        new = old.greedy(window, 1)[-1]
        window, text = window + [new], text + [new]
    return text


@pytest.mark.parametrize("case", [("B", "rope"), ("C", "rope"), ("C", "relative"), ("C", "default")], ids=describe)
@pytest.mark.parametrize("use_kv_cache", [True, False])
def test_a_legacy_model_writes_what_eds_would_have_written(tmp_path, case, use_kv_cache):
    generation, pos_embd = case
    old = NanoGPT(pos_embd, generation, vocab_size=29, seed=3).train(4)
    model, _ = load_model(put(old.checkpoint(), tmp_path / "ckpt.pt"))
    texts = model.generate(torch.tensor([[3], [5]]), 14, temperature=0, use_kv_cache=use_kv_cache).tolist()
    assert texts == [greedy_in_windows(old, [3], 14), greedy_in_windows(old, [5], 14)]


@pytest.mark.parametrize("pos_embd", ["rope", "relative"])
@pytest.mark.parametrize("use_kv_cache", [True, False])
def test_rows_of_a_legacy_model_do_not_depend_on_longer_rows(tmp_path, pos_embd, use_kv_cache):
    old = NanoGPT(pos_embd, "C", vocab_size=29, seed=3).train(4)
    model, _ = load_model(put(old.checkpoint(), tmp_path / "ckpt.pt"))
    prompts = [[3], [5, 6, 7, 8, 9, 10], [1, 2, 3]]  # relative depends on the length: padding would show
    new = torch.stack(list(model.stream(prompts, 12, temperature=0, use_kv_cache=use_kv_cache))).T.tolist()
    assert [prompt + row for prompt, row in zip(prompts, new)] == [greedy_in_windows(old, p, 12) for p in prompts]


@pytest.mark.parametrize("case", [("B", "rope"), ("C", "rope"), ("C", "relative")], ids=describe)
def test_a_converted_file_says_which_legacy_it_needs(tmp_path, case):
    generation, pos_embd = case
    old = NanoGPT(pos_embd, generation).train(2)
    new = convert(put(old.checkpoint(), tmp_path / "ckpt_original.pt"), tmp_path / "ckpt.pt")
    assert legacy_of(new) == f"eds-{pos_embd}"
    assert_same_logits(load_model(new)[0], old)
    assert convert(new, tmp_path / "again.pt") and legacy_of(tmp_path / "again.pt") == f"eds-{pos_embd}"
    assert_same_logits(load_model(str(tmp_path / "again.pt"))[0], old)


@smoke
@pytest.mark.parametrize("pos_embd", ["rope", "relative"])
def test_a_legacy_model_can_be_cropped_to_a_smaller_block_size(tmp_path, pos_embd):
    old = NanoGPT(pos_embd, "C", block_size=9).train(2)
    model, _ = load_model(put(old.checkpoint(), tmp_path / "ckpt.pt"))
    model.crop_block_size(4)
    assert_same_logits(model, old, [1, 2, 3, 4])  # EDS's table is cut on both sides
    put(
        {
            "model": model.state_dict(),
            "model_args": checkpoints.model_args(model.config),
            "iter_num": 1,
            "best_val_loss": 1.0,
            "config": {},
            "format_version": checkpoints.FORMAT_VERSION,
        },
        "cropped.pt",
    )
    assert_same_logits(load_model("cropped.pt")[0], old, [1, 2, 3, 4])


@pytest.mark.parametrize("pos_embd", ["rope", "relative"])
def test_a_new_run_from_edss_weights_stays_what_it_is(tmp_path, tiny_data, pos_embd):
    import train

    old = NanoGPT(pos_embd, "C", vocab_size=len(CHARACTERS)).train(2)
    put(old.checkpoint(), tmp_path / "old.pt")
    assert (
        train.main(
            [
                "--init_from=old.pt",
                "--out_dir=out",
                f"--data_dir={tiny_data}",
                "--max_iters=1",
                "--learning_rate=0",
                "--min_lr=0",
                "--weight_decay=0",
                "--batch_size=2",
                "--device=cpu",
                "--gradient_accumulation_steps=1",
                "--eval_iters=1",
                "--compile=False",
            ]
        )
        == 0
    )
    assert legacy_of("out/ckpt.pt") == f"eds-{pos_embd}"
    assert_same_logits(load_model("out/ckpt.pt")[0], old)


# ----------------------------------------------------------------------------------------------------------------------
# tokenizers of others


@pytest.mark.parametrize("where", [".", "data/tiny"])
def test_meta_pkl_is_found_beside_the_checkpoint_or_with_its_data(tmp_path, where):
    old = NanoGPT("default", "C", vocab_size=len(CHARACTERS)).train(1)
    path = put(old.checkpoint(data_dir="data/tiny"), tmp_path / "ckpt.pt")
    os.makedirs(where, exist_ok=True)
    ancestors.write_meta_pkl(os.path.join(where, "meta.pkl"), CHARACTERS)
    assert load_model(path)[1].characters == CHARACTERS
    os.makedirs("new")
    new = convert(path, "new/ckpt.pt")
    os.remove(os.path.join(where, "meta.pkl"))
    assert load_model(new)[1].characters == CHARACTERS  # it travels inside now


@smoke
def test_meta_pkl_is_found_in_the_folder_of_the_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr("dongpt.checkpoint.foreign.ROOT", str(tmp_path))
    path = put(NanoGPT(vocab_size=len(CHARACTERS)).train(1).checkpoint(), tmp_path / "out" / "ckpt.pt")
    os.makedirs("data/tiny_char")
    ancestors.write_meta_pkl("data/tiny_char/meta.pkl", CHARACTERS)
    assert load_model(path)[1].characters == CHARACTERS


@pytest.mark.parametrize(
    "model, folder, protocol",
    [
        ("gpt_small", ".", 2),
        ("gpt_small", "tokenizers", 5),
        ("gpt_medium", "tokenizers", 4),
        ("gpt_large", ".", 5),
        ("bigram", "tokenizers", 2),
        ("bigram", ".", 4),
    ],
)
def test_the_pickled_tokenizer_of_nanogptplus_is_found_and_read(tmp_path, folder, protocol, model):
    characters = "\n aeéñ字\U0001f600"
    os.makedirs("models/" + folder, exist_ok=True)
    other = "bigram" if model != "bigram" else "gpt_small"
    for name, vocabulary in ((model, characters), (other, characters[::-1])):  # each model has its own
        with open(f"models/{folder}/tokenizer_{name}.pkl", "wb") as file:
            file.write(ancestors.pickled_tokenizer(vocabulary, protocol))
    old = PlusBigram(8) if model == "bigram" else Plus(vocab_size=8)
    name = "bigram_model" if model == "bigram" else model.replace("gpt_", "gpt_model_")
    path = put(old.checkpoint(), tmp_path / "models" / f"{name}.pth.tar")
    loaded, tokenizer = load_model(path, **({} if model == "bigram" else {"n_head": 2}))
    assert tokenizer.characters == characters
    assert_same_logits(loaded, old)


@smoke
def test_a_tokenizer_of_another_size_is_not_taken(tmp_path):
    (tmp_path / "tokenizer_gpt_small.pkl").write_bytes(ancestors.pickled_tokenizer("abc"))
    path = put(Plus().checkpoint(), tmp_path / "gpt_model_small.pth.tar")
    assert load_model(path, n_head=2)[1] is None


class Touches:
    """An object whose pickle makes a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


class TouchesAsState(Touches):
    def __reduce__(self):
        return str, ("harmless",), None, None, iter([("key", Touches(self.path))])


def calls_a_method_of_the_class(marker) -> bytes:
    """A pickle that gets at open through an attribute of the one class that is admitted, as protocol 4 can."""
    name = b"CharTokenizer.__init__.__globals__"
    return b"\x80\x04\x8c\x12src.data.tokenizer\x8c" + bytes([len(name)]) + name + b"\x93."


MALICIOUS = {
    "at the top": lambda marker: pickle.dumps(Touches(marker)),
    "at the top, protocol 0": lambda marker: pickle.dumps(Touches(marker), 0),
    "in stoi": lambda marker: ancestors.pickled_tokenizer("abcdefghijklm", stoi={"a": Touches(marker)}),
    "in more": lambda marker: ancestors.pickled_tokenizer("abcdefghijklm", more=Touches(marker)),
    "as state": lambda marker: pickle.dumps({"vocab": TouchesAsState(marker)}),
    "globals of the class": calls_a_method_of_the_class,
    "os.system": lambda marker: b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.",
    "eval": lambda marker: b"cbuiltins\neval\n(S'open(\"" + str(marker).encode() + b'", "w")\'\ntR.',
}


@pytest.mark.parametrize("attack, folder", [*((attack, ".") for attack in MALICIOUS), ("at the top", "tokenizers")])
def test_a_malicious_tokenizer_is_refused_and_not_run(tmp_path, attack, folder):
    os.makedirs(folder, exist_ok=True)
    marker, at = tmp_path / "marker", tmp_path / folder / "tokenizer_gpt_small.pkl"
    at.write_bytes(MALICIOUS[attack](marker))
    path = put(Plus().checkpoint(), tmp_path / "gpt_model_small.pth.tar")
    refuses(lambda: load_model(path, n_head=2), "tokenizer_gpt_small.pkl")
    refuses_to_convert(path, tmp_path / "ckpt.pt", "--n_head=2", "tokenizer_gpt_small.pkl")
    assert not marker.exists()


@smoke
def test_the_attacks_of_these_tests_are_real_ones(tmp_path):
    for attack in ("at the top", "as state", "os.system", "eval"):
        marker = tmp_path / attack.replace(" ", "-")
        with contextlib.suppress(TypeError):  # str takes no items; the harm is done by then
            pickle.loads(MALICIOUS[attack](marker))
        assert marker.exists(), attack


# ----------------------------------------------------------------------------------------------------------------------
# conversion


@pytest.mark.parametrize(
    "case, size",
    [*((case, "3 heads") for case in EDS), (EDS[0], "11 layers"), (EDS[1], "odd heads"), (EDS[4], "odd heads")],
    ids=describe,
)
def test_a_converted_file_has_the_logits_and_the_optimizer_states(tmp_path, case, size):
    generation, pos_embd = case
    old = NanoGPT(pos_embd, generation, **SIZES[size]).train(2)
    before = put(old.checkpoint(), tmp_path / "ckpt_original.pt")
    content = open(before, "rb").read()
    new = convert(before, tmp_path / "ckpt.pt")
    assert open(before, "rb").read() == content and sorted(os.listdir(tmp_path)) == ["ckpt.pt", "ckpt_original.pt"]
    checkpoint = torch.load(new, weights_only=True)
    if pos_embd in (None, "default"):  # nanoGPT's own sample.py takes no other keys
        assert (
            set(checkpoint["model_args"]) == set(checkpoints.NANOGPT_ARG_NAMES) and RELATIVE not in checkpoint["model"]
        )
    assert checkpoint["format_version"] == checkpoints.FORMAT_VERSION and checkpoint["iter_num"] == 2
    assert float(checkpoint["best_val_loss"]) == 3.25
    assert_same_logits(load_model(new)[0], old)
    assert_same_states(new, old)


@pytest.mark.parametrize(
    "bias, more",
    [
        (True, dict(prefix="_orig_mod.")),
        (True, dict(prefix="module.", masks=True)),
        (False, dict(prefix="module.", masks=True)),
        (False, dict(config=None)),
    ],
    ids=str,
)
def test_conversion_of_prefixed_and_old_files(tmp_path, bias, more):
    old = NanoGPT(bias=bias, n_layer=2).train(2)
    new = convert(put(old.checkpoint(**more), tmp_path / "old.pt"), tmp_path / "ckpt.pt")
    assert not [name for name in torch.load(new, weights_only=True)["model"] if name.startswith(("_orig", "module"))]
    assert_same_logits(load_model(new)[0], old)
    assert_same_states(new, old)


@pytest.mark.parametrize("n_layer, bias", [(2, True), (2, False), (11, True)])
def test_the_optimizer_groups_of_nanogpt_before_may_2023_are_matched(tmp_path, n_layer, bias):
    old = NanoGPT(n_layer=n_layer, n_embd=8, bias=bias, gelu="tanh").train(1, old_groups=True)  # the GELU of that age
    checkpoint = old.checkpoint(masks=True, prefix="_orig_mod.")
    lengths = [len(group["params"]) for group in checkpoint["optimizer"]["param_groups"]]
    assert lengths[0] == 4 * n_layer  # matrices alone: not the present groups
    new = convert(put(checkpoint, tmp_path / "old.pt"), tmp_path / "ckpt.pt")
    assert_same_states(new, old)
    assert_same_logits(load_model(new)[0], old)


@smoke
@pytest.mark.parametrize("change", [dict(optimizer=None), dict(config=None), dict(best_val_loss=None)], ids=str)
def test_a_key_may_hold_none(tmp_path, change):
    old = NanoGPT().train(1)  # as people write who strip a file for publication
    path = put({**old.checkpoint(), **change}, tmp_path / "old.pt")
    assert_same_logits(load_model(path)[0], old)
    assert_same_logits(load_model(convert(path, tmp_path / "ckpt.pt"))[0], old)


@pytest.mark.parametrize(
    "lacking",
    [["optimizer"], ["iter_num"], ["best_val_loss"], ["optimizer", "iter_num", "best_val_loss", "config"]],
    ids="+".join,
)
def test_what_a_file_lacks_starts_fresh_which_is_said(tmp_path, tiny_data, capsys, lacking):
    old = NanoGPT(vocab_size=len(CHARACTERS)).train(2)
    checkpoint = {key: value for key, value in old.checkpoint().items() if key not in lacking}
    os.makedirs("out")
    convert(put(checkpoint, tmp_path / "old.pt"), "out/ckpt.pt")
    said = capsys.readouterr().out
    assert ("optimizer" in lacking) == ("optimizer" in said) and ("iter_num" in lacking) == ("iteration" in said)
    assert_same_logits(load_model("out/ckpt.pt")[0], old)
    first = 0 if "iter_num" in lacking else 2
    last = resume("out", tiny_data, first + 1, "--device=cpu", "--batch_size=2", "--gradient_accumulation_steps=1")
    assert last["iter_num"] == first + 1


@smoke
def test_an_optimizer_of_other_parameters_is_left_away_and_that_is_said(tmp_path, capsys):
    checkpoint = NanoGPT().train(1).checkpoint()
    checkpoint["optimizer"] = NanoGPT(n_layer=3).train(1).checkpoint()["optimizer"]
    new = convert(put(checkpoint, tmp_path / "old.pt"), tmp_path / "ckpt.pt")
    assert "optimizer" in "".join(capsys.readouterr()) and "optimizer" not in torch.load(new, weights_only=True)


@smoke
def test_an_out_dir_is_converted_as_its_ckpt(tmp_path):
    old = NanoGPT().train(1)
    put(old.checkpoint(), tmp_path / "out" / "ckpt.pt")
    assert_same_logits(load_model(convert("out", "new.pt"))[0], old)
    refuses_to_convert("out", "out/ckpt.pt", "out/ckpt.pt")


@pytest.mark.parametrize("case", [("A", None), ("B", "default"), ("B", "rope")], ids=describe)
def test_conversion_of_what_edss_notebook_updated(tmp_path, case):
    generation, pos_embd = case
    old = NanoGPT(pos_embd, generation, n_layer=3).train(3)
    checkpoint = old.checkpoint(updated=True)
    assert RELATIVE in checkpoint["model"]
    new = convert(put(checkpoint, tmp_path / "old.pt"), tmp_path / "ckpt.pt")
    assert_same_logits(load_model(new)[0], old)
    assert_same_states(new, old)


@pytest.mark.parametrize(
    "size, bias, tied", [*((size, False, True) for size in SIZES), ("3 heads", True, True), ("3 heads", False, False)]
)
def test_nanogptplus_is_converted_with_its_tokenizer(tmp_path, capsys, size, bias, tied):
    old = Plus(**{**SIZES[size], "bias": bias}, tied=tied)
    characters = "\nabcdefghijklmnopqrstuvwxyzABCDEFG"[: old.vocab_size]
    (tmp_path / "tokenizer_gpt_small.pkl").write_bytes(ancestors.pickled_tokenizer(characters))
    before = put(old.checkpoint(), tmp_path / "gpt_model_small.pth.tar")
    new = convert(before, tmp_path / "ckpt.pt", f"--n_head={old.n_head}")
    os.remove("tokenizer_gpt_small.pkl")
    model, tokenizer = load_model(new)
    assert_same_logits(model, old)
    assert tokenizer.characters == characters
    checkpoint = torch.load(new, weights_only=True)
    assert checkpoint["model_args"]["n_head"] == old.n_head and checkpoint.get("iter_num", 0) == 0
    assert not checkpoint.get("optimizer", {}).get("state")
    said = "".join(capsys.readouterr())
    assert "optimizer" in said  # what the file lacks starts fresh, which is said


@pytest.mark.parametrize(
    "size, n_embd, block_size, n_head, n_layer", [("small", 128, 64, 4, 4), ("medium", 384, 256, 6, 6)]
)
def test_a_size_of_nanogptplus_stands_for_its_heads(tmp_path, size, n_embd, block_size, n_head, n_layer):
    old = Plus(n_layer=n_layer, n_embd=n_embd, block_size=block_size, n_head=n_head, vocab_size=9)
    for weight in old.weights.values():
        weight.data *= 0.2 if weight.dim() > 1 else 1  # such a wide model's logits would be large, and coarse
    before = put(old.checkpoint(), tmp_path / f"gpt_model_{size}.pth.tar")
    new = convert(before, tmp_path / "ckpt.pt", f"--size={size}")
    model, _ = load_model(new)
    assert (model.config.n_head, model.config.block_size) == (n_head, block_size)
    assert_same_logits(model, old, [7])


@smoke
def test_the_bigram_of_nanogptplus_is_converted(tmp_path):
    old = PlusBigram(len(CHARACTERS))
    os.makedirs("models/tokenizers")
    with open("models/tokenizers/tokenizer_bigram.pkl", "wb") as file:
        file.write(ancestors.pickled_tokenizer(CHARACTERS))
    new = convert(put(old.checkpoint(), tmp_path / "models" / "bigram_model.pth.tar"), tmp_path / "ckpt.pt")
    model, tokenizer = load_model(new)
    assert model.config.model_type == "bigram" and tokenizer.characters == CHARACTERS
    assert_same_logits(model, old)


@smoke
@pytest.mark.parametrize("name", FIXTURES)
def test_converted_fixtures_give_their_logits(tmp_path, fixtures_folder, name):
    expected = torch.load(os.path.join(fixtures_folder, name.split(".")[0] + ".expected.pt"), weights_only=True)
    args = ["--n_head=2"] if "plus" in name else []
    new = convert(os.path.join(fixtures_folder, name), tmp_path / "ckpt.pt", *args)
    model, tokenizer = load_model(new)
    torch.testing.assert_close(model_logits(model, expected["idx"]), expected["logits"], rtol=0, atol=1e-5)
    if "plus" not in name:
        assert tokenizer.vocab_size == 64  # of the meta.pkl beside it
        stored = torch.load(os.path.join(fixtures_folder, name), weights_only=True)
        assert len(stored_states(new)) == len(stored["optimizer"]["state"])
        assert torch.load(new, weights_only=True)["iter_num"] == stored["iter_num"]


@smoke
def test_a_converted_file_holds_plain_values_alone(tmp_path):
    new = convert(put(NanoGPT("relative", "C").train(1).checkpoint(), tmp_path / "old.pt"), tmp_path / "ckpt.pt")

    def plain(value) -> bool:
        if isinstance(value, dict):
            return all(map(plain, value.keys())) and all(map(plain, value.values()))
        if isinstance(value, (list, tuple)):
            return all(map(plain, value))
        return value is None or torch.is_tensor(value) or type(value) in (int, float, str, bool)

    assert plain(torch.load(new, weights_only=True))


# ----------------------------------------------------------------------------------------------------------------------
# the relative table


@pytest.mark.parametrize(
    "case, more, pos_embd",
    [
        (("A", None), {}, "relative"),
        (("A", None), dict(prefix="_orig_mod."), "default+relative"),
        (("B", "default"), {}, "default+relative"),
        (("B", "default"), dict(updated=True), "relative"),
        (("C", "default"), {}, "default+relative"),
    ],
    ids=describe,
)
def test_the_relative_table_is_added_to_a_default_model(tmp_path, capsys, case, more, pos_embd):
    generation, was = case
    old = NanoGPT(was, generation, n_head=4, n_layer=3, n_embd=8).train(1)
    before = put(old.checkpoint(**more), tmp_path / "ckpt_original.pt")
    new = convert(before, tmp_path / "ckpt.pt", f"--pos_embd={pos_embd}")
    said = capsys.readouterr().out.splitlines()
    assert said.count("Adding transformer.relative.relative_embeddings.weight to checkpoint.") == 1
    checkpoint = torch.load(new, weights_only=True)
    assert checkpoint["model_args"]["pos_embd"] == "default+relative"
    assert torch.equal(checkpoint["model"][RELATIVE], torch.zeros(8, 4))  # (block_size, n_head), not EDS's shape
    model, _ = load_model(new)
    assert_same_logits(model, old)
    states = stored_states(new)
    assert not states.get(RELATIVE, {}).get("exp_avg", torch.zeros(1)).any()
    states.pop(RELATIVE, None)
    expected = old.states()
    assert states.keys() == expected.keys()
    assert all(torch.equal(states[name]["exp_avg"], expected[name]["exp_avg"]) for name in expected)
    model.transformer.relative.relative_embeddings.weight.data += torch.randn(8, 4)
    assert not torch.allclose(model_logits(model, ids_for(old)), old.logits(ids_for(old)))  # the table is in use


@smoke
@pytest.mark.parametrize("case", [("B", "rope"), ("C", "rope"), ("C", "relative")], ids=describe)
def test_the_relative_table_is_not_added_to_another_model(tmp_path, case):
    generation, was = case
    path = put(NanoGPT(was, generation).train(1).checkpoint(), tmp_path / "old.pt")
    refuses_to_convert(path, tmp_path / "ckpt.pt", "--pos_embd=default+relative", "default")


@pytest.mark.parametrize("pos_embd", ["default", "default+relative"])
@pytest.mark.parametrize(
    "case, more",
    [
        (("A", None), {}),
        (("A", None), dict(prefix="_orig_mod.", masks=True)),
        (("B", "default"), dict(updated=True)),
        (("C", "default"), {}),
    ],
    ids=describe,
)
def test_update_checkpoint_as_a_function(case, more, pos_embd):
    from ckpt_update import update_checkpoint

    generation, was = case
    old = NanoGPT(was, generation, n_layer=3, n_embd=8, n_head=4).train(2)
    model = GPT(GPTConfig(**old.args, pos_embd=pos_embd)).eval()
    checkpoint = old.checkpoint(**more)
    names, args = list(checkpoint["model"]), dict(checkpoint["model_args"])
    new = update_checkpoint(checkpoint, model)
    assert (list(checkpoint["model"]), checkpoint["model_args"]) == (names, args)  # the caller's is left alone
    model.load_state_dict(new["model"], strict=True)
    assert_same_logits(model, old)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    optimizer.load_state_dict(new["optimizer"])
    for name, parameter in model.named_parameters():
        if name != RELATIVE:
            assert torch.equal(optimizer.state[parameter]["exp_avg"], old.states()[name]["exp_avg"]), name


@smoke
@pytest.mark.parametrize(
    "change, part",
    [
        (dict(n_head=4), "n_head=4, not 2"),
        (dict(activation="gelu_tanh"), "activation='gelu_tanh', not 'gelu'"),
        (dict(n_embd=32), "torch.Size([13, 16])"),
        (dict(n_layer=3), 'Missing key(s) in state_dict: "transformer.h.2.ln_1.weight"'),
        (dict(pos_embd="rope"), 'Unexpected key(s) in state_dict: "transformer.wpe.weight"'),
    ],
    ids=str,
)
def test_update_checkpoint_refuses_a_model_of_other_mathematics(change, part):
    from ckpt_update import update_checkpoint

    old = NanoGPT().train(1)
    model = GPT(GPTConfig(**{**old.args, **change}))
    refuses(lambda: update_checkpoint(old.checkpoint(), model), part)


@smoke
def test_update_checkpoint_takes_nanogptplus_too():
    from ckpt_update import update_checkpoint

    old = Plus(n_head=4, bias=True)
    model = GPT(
        GPTConfig(n_layer=2, n_head=4, n_embd=16, block_size=8, vocab_size=13, bias=True, activation="gelu_tanh")
    ).eval()
    model.load_state_dict(update_checkpoint(old.checkpoint(), model)["model"], strict=True)
    assert_same_logits(model, old)


# ----------------------------------------------------------------------------------------------------------------------
# resuming


def resume(out_dir, data, max_iters: int, *args) -> dict:
    """Go on with the ckpt.pt of out_dir up to max_iters; returns the checkpoint that it ended with."""
    import train

    assert (
        train.main(
            [
                "--init_from=resume",
                f"--out_dir={out_dir}",
                f"--data_dir={data}",
                f"--max_iters={max_iters}",
                "--eval_interval=1000",
                "--eval_iters=1",
                *args,
            ]
        )
        == 0
    )
    return torch.load(os.path.join(out_dir, "ckpt_last.pt"), weights_only=True)


CONTINUED = {
    "nanogpt": (NanoGPT, dict(), dict()),
    "nanogpt before May 2023": (NanoGPT, dict(n_layer=11, n_embd=8, gelu="tanh"), dict(masks=True)),
    "A updated": (NanoGPT, dict(), dict(updated=True)),
    "C default": (NanoGPT, dict(pos_embd="default", generation="C"), dict()),
    "B rope": (NanoGPT, dict(pos_embd="rope", generation="B"), dict()),
    "C rope": (NanoGPT, dict(pos_embd="rope", generation="C"), dict(prefix="_orig_mod.")),
    "C relative": (NanoGPT, dict(pos_embd="relative", generation="C"), dict()),
}


@pytest.mark.parametrize(
    "case, converted", [*((case, True) for case in CONTINUED if case != "B rope"), ("C relative", False)], ids=describe
)
def test_a_resumed_run_continues_as_a_straight_one(tmp_path, tiny_data, case, converted):
    kind, args, file = CONTINUED[case]
    old = kind(**args, vocab_size=len(CHARACTERS)).train(4, old_groups="May" in case)
    before = put(old.checkpoint(**file), tmp_path / "ckpt_original.pt")
    os.makedirs("out")
    if converted:
        convert(before, "out/ckpt.pt")
    else:  # as it is
        shutil.copyfile(before, "out/ckpt.pt")
    start = torch.load("out/ckpt.pt", weights_only=True)
    assert start["iter_num"] == 4
    # nanoGPT's config says mps, float16 and compile=True: what another machine had must not stop this one
    last = resume("out", tiny_data, 7, "--seed=1337")
    assert last["iter_num"] == 7
    corpus, first = Corpus(tiny_data), start.get("windows", 4 * 2)
    batches = [corpus.train_batch(first + 2 * i, 2, 8, 1337, len(CHARACTERS)) for i in range(3)]
    straight, forgetful = old.continued(batches), old.continued(batches, forget=True)
    states, unused = old.states(), 0
    for name, weight in straight.items():
        if name not in states:
            unused += 1
            continue  # takes no part in the logits
        torch.testing.assert_close(last["model"][name], weight, rtol=0, atol=2e-5, msg=name)
    assert unused == {"C rope": 2, "B rope": 1, "C default": 1, "C relative": 1}.get(case, 0)  # wpe, EDS's table
    difference = max((straight[name] - forgetful[name]).abs().max() for name in states)
    assert difference > 1e-3  # a resume that forgot the states would have been seen
    assert_same_logits(load_model("out/ckpt_last.pt")[0], old_with(old, last["model"]))


def old_with(old, weights: dict):
    """The ancestor with other weights."""
    for name in old.states():
        old.weights[name].data.copy_(weights[name])
    return old


def test_a_resumed_run_trains_the_added_relative_table(tmp_path, tiny_data):
    old = NanoGPT(vocab_size=len(CHARACTERS)).train(4)
    os.makedirs("out")
    convert(put(old.checkpoint(), tmp_path / "old.pt"), "out/ckpt.pt", "--pos_embd=relative")
    last = resume("out", tiny_data, 6)
    assert last["iter_num"] == 6 and last["model"][RELATIVE].any() and last["model"][RELATIVE].shape == (8, 2)


def test_a_converted_nanogptplus_starts_its_optimizer_and_iterations_afresh(tmp_path, tiny_data, capfd):
    old = Plus(vocab_size=len(CHARACTERS))
    (tmp_path / "tokenizer_gpt_small.pkl").write_bytes(ancestors.pickled_tokenizer(CHARACTERS))
    os.makedirs("out")
    convert(put(old.checkpoint(), tmp_path / "gpt_model_small.pth.tar"), "out/ckpt.pt", "--n_head=2")
    capfd.readouterr()
    args = [
        "--decay_lr=False",
        "--learning_rate=1e-3",
        "--batch_size=2",
        "--gradient_accumulation_steps=1",
        "--beta2=0.95",
        "--dropout=0",
        "--device=cpu",
        "--compile=False",
        "--seed=1",
    ]
    last = resume("out", tiny_data, 3, *args)
    assert last["iter_num"] == 3 and "optimizer" in "".join(capfd.readouterr())
    old.optimizer = old.adamw(old.weights)  # without states
    corpus = Corpus(tiny_data)
    batches = [corpus.train_batch(2 * i, 2, 8, 1, len(CHARACTERS)) for i in range(3)]
    straight = old.continued(batches)
    torch.testing.assert_close(
        last["model"]["transformer.h.1.mlp.c_proj.weight"],
        straight["transformer_blocks.1.feed_forward.projection.weight"],
        rtol=0,
        atol=2e-5,
    )
    torch.testing.assert_close(
        last["model"]["lm_head.weight"], straight["token_embedding_table.weight"], rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("pos_embd", ["rope", "relative", "default"])
def test_a_resume_with_other_positions_than_the_files_is_refused(tmp_path, tiny_data, pos_embd):
    import train

    old = NanoGPT("rope", "C", vocab_size=len(CHARACTERS)).train(2)
    os.makedirs("out")
    convert(put(old.checkpoint(), tmp_path / "old.pt"), "out/ckpt.pt")
    refuses(
        lambda: train.main(
            [
                "--init_from=resume",
                "--out_dir=out",
                f"--data_dir={tiny_data}",
                "--device=cpu",
                "--max_iters=3",
                f"--pos_embd={pos_embd}",
            ]
        ),
        "pos_embd",
    )


def test_a_bigram_goes_on_training(tmp_path, tiny_data):
    old = PlusBigram(len(CHARACTERS))
    os.makedirs("out")
    convert(put(old.checkpoint(), tmp_path / "bigram_model.pth.tar"), "out/ckpt.pt")
    last = resume(
        "out",
        tiny_data,
        2,
        "--device=cpu",
        "--compile=False",
        "--batch_size=2",
        "--gradient_accumulation_steps=1",
        "--warmup_iters=0",
    )
    assert last["iter_num"] == 2 and last["model_args"]["model_type"] == "bigram"


# ----------------------------------------------------------------------------------------------------------------------
# as a user would do it: the programs, one after the other


@pytest.fixture(scope="module")
def fixture_data(tmp_path_factory):
    """A corpus of the vocabulary that the fixtures have."""
    tokenizer = CharTokenizer("\n" + "".join(map(chr, range(32, 95))))
    text = "".join(c for c in generated_text().upper() if c in tokenizer.ids)
    folder = tmp_path_factory.mktemp("fixture_data")
    return write_splits(folder, tokenizer, split_text(text))


def use_as_a_user(old, new_args, data):
    """Convert, sample and resume by the programs, in the working directory."""
    os.makedirs("out")
    done = run("ckpt_update.py", str(old), "out/ckpt.pt", *new_args, cwd=".")
    assert os.listdir("out") == ["ckpt.pt"], done.stdout
    iters = torch.load("out/ckpt.pt", weights_only=True).get("iter_num", 0)
    before = run(
        "sample.py", "--out_dir=out", "--start=THE ", "--num_samples=1", "--max_new_tokens=30", "--device=cpu", cwd="."
    )
    assert before.stdout.startswith("THE ") and len(before.stdout) > 30
    done = run(
        "train.py",
        "--init_from=resume",
        "--out_dir=out",
        f"--data_dir={data}",
        f"--max_iters={iters + 2}",
        "--eval_iters=1",
        "--device=cpu",
        "--compile=False",
        "--batch_size=2",
        "--gradient_accumulation_steps=1",
        cwd=".",
    )
    assert f"iter {iters}: loss" in done.stdout and f"iter {iters + 1}: loss" in done.stdout
    last = torch.load("out/ckpt_last.pt", weights_only=True)
    assert last["iter_num"] == iters + 2
    return done


@pytest.mark.parametrize("name", ["eds_relative.pt", "nanogptplus.pth.tar"])
def test_fixtures_by_the_programs(tmp_path, fixtures_folder, fixture_data, name):
    for file in (name, "meta.pkl"):
        shutil.copyfile(os.path.join(fixtures_folder, file), tmp_path / file)
    if "plus" in name:  # as that project names and places them
        os.makedirs("models/tokenizers")
        os.rename(name, "models/gpt_model_small.pth.tar")
        os.remove("meta.pkl")
        with open("models/tokenizers/tokenizer_gpt_small.pkl", "wb") as file:
            file.write(ancestors.pickled_tokenizer("\n" + "".join(map(chr, range(32, 95)))))
        done = use_as_a_user("models/gpt_model_small.pth.tar", ["--n_head=2"], fixture_data)
        assert "optimizer" in done.stdout + done.stderr
    else:
        use_as_a_user(name, [], fixture_data)


@pytest.mark.parametrize("name", ["nanogpt_bias.pt", "nanogpt_compiled_prefix.pt", "eds_default.pt", "eds_rope.pt"])
def test_other_fixtures_by_the_same_steps_in_one_process(tmp_path, fixtures_folder, fixture_data, capsys, name):
    import sample

    for file in (name, "meta.pkl"):
        shutil.copyfile(os.path.join(fixtures_folder, file), tmp_path / file)
    os.makedirs("out")
    convert(name, "out/ckpt.pt")
    capsys.readouterr()
    sample.main(["--out_dir=out", "--start=THE ", "--num_samples=1", "--max_new_tokens=30", "--device=cpu"])
    assert capsys.readouterr().out.startswith("THE ")
    last = resume("out", fixture_data, 7, "--device=cpu", "--gradient_accumulation_steps=1")
    assert last["iter_num"] == 7


@pytest.mark.parametrize("case", [("A", None), ("C", "rope")], ids=describe)
def test_sampling_from_an_unconverted_file(tmp_path, capsys, case):
    import sample

    generation, pos_embd = case
    put(NanoGPT(pos_embd, generation, vocab_size=len(CHARACTERS)).train(1).checkpoint(), tmp_path / "out" / "ckpt.pt")
    ancestors.write_meta_pkl("out/meta.pkl", CHARACTERS)
    sample.main(["--out_dir=out", "--start=the ", "--num_samples=2", "--max_new_tokens=20", "--device=cpu"])
    assert capsys.readouterr().out.count("the ") >= 2


# ----------------------------------------------------------------------------------------------------------------------
# what is refused


@pytest.mark.parametrize("old_format", [False, True])
def test_a_whole_pickled_model_is_refused_with_why_and_what_to_do(tmp_path, old_format):
    ancestors.save_whole_notebook_model(tmp_path / "model.pth")
    if old_format:
        with ancestors.modules_of_others(
            "__main__", BigramModel=type("BigramModel", (torch.nn.Module,), {"__module__": "__main__"})
        ):
            model = torch.load("model.pth", weights_only=False)
            torch.save(model, "model.pth", _use_new_zipfile_serialization=False)
    for action in (lambda: load_model("model.pth"), lambda: convert("model.pth", "ckpt.pt")):
        sentence = refuses(action, "model.pth")
        assert re.search("state.dict", sentence) and re.search("code", sentence), sentence
    if not old_format:
        expect_sentence(run("ckpt_update.py", "model.pth", "ckpt.pt", cwd=tmp_path, check=None), "model.pth")
    assert os.listdir(tmp_path) == ["model.pth"]


NOTEBOOK = {
    name: torch.zeros(4, 4)
    for name in [  # the word notebook's, as a state dict
        "token_embedding_table.weight",
        "position_embedding_table.weight",
        "blocks.0.sa.heads.0.key.weight",
        "blocks.0.sa.heads.0.query.weight",
        "blocks.0.sa.heads.0.value.weight",
        "blocks.0.sa.heads.0.tril",
        "blocks.0.sa.proj.weight",
        "blocks.0.ffwd.net.0.weight",
        "blocks.0.ffwd.net.2.weight",
        "lm_head.weight",
    ]
}


@smoke
@pytest.mark.parametrize(
    "content, found",
    [
        ({"net": {"layer.weight": torch.zeros(2, 2)}, "epoch": 3}, ["net", "epoch"]),
        (
            {"encoder.weight": torch.zeros(2, 2), "decoder.weight": torch.zeros(2, 2)},
            ["encoder.weight", "decoder.weight"],
        ),
        ({"state_dict": {"layer.weight": torch.zeros(2)}, "hparams": {}}, ["state_dict", "hparams"]),
        ([1, 2, 3], ["list"]),
        (torch.zeros(3), ["Tensor"]),
        ({}, []),
        ({"model": {}, "model_args": {}}, []),
        ({"model": {"a": 1}, "model_args": {"n_layer": 2}}, []),
        ({"model": NanoGPT().weights, "model_args": {"n_head": 2, "n_layer": "two"}}, ["n_layer"]),
        ({1: 2}, ["1"]),
        ({"token_embedding_table.weight": torch.zeros(5, 3)}, ["5, 3"]),  # no bigram: not square
        (NOTEBOOK, ["sa.proj.weight", "position_embedding_table.weight"]),
    ],
    ids=lambda value: "" if isinstance(value, list) else type(value).__name__,
)
def test_an_unknown_layout_lists_what_was_found_and_what_is_known(tmp_path, content, found):
    path = put(content, tmp_path / "strange.pt")
    for action in (lambda: load_model(path), lambda: convert(path, tmp_path / "ckpt.pt")):
        refuses(action, "strange.pt", *found)
    if isinstance(content, dict) and found and found[0] in content and content is not NOTEBOOK:
        refuses(lambda: load_model(path), "nanoGPT", "EDS")


@pytest.mark.parametrize(
    "missing",
    [
        ["transformer.h.1.ln_2.weight"],
        ["transformer.ln_f.weight"],
        ["transformer.h.0.attn.c_attn.weight", "transformer.h.1.mlp.c_fc.weight", "transformer.wpe.weight"],
        [
            f"transformer.h.1.{part}.weight"
            for part in ("ln_1", "attn.c_attn", "ln_2", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        ],
    ],
    ids=len,
)
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_missing_parameters_are_listed_by_name(tmp_path, missing, prefix):
    checkpoint = NanoGPT().train(1).checkpoint(prefix)
    for name in missing:
        del checkpoint["model"][prefix + name]
    path = put(checkpoint, tmp_path / "old.pt")
    refuses(lambda: load_model(path), "old.pt", *missing)
    refuses_to_convert(path, tmp_path / "ckpt.pt", *missing)


@smoke
@pytest.mark.parametrize(
    "more",
    [
        ["transformer.extra.weight"],
        [f"transformer.h.2.{part}.weight" for part in ("ln_1", "attn.c_attn", "mlp.c_fc")],
        ["transformer.h.0.attn.lora_A", "value_head.weight", "transformer.h.1.attn.lora_A"],
    ],
    ids=len,
)
def test_unexpected_parameters_are_listed_by_name(tmp_path, more):
    checkpoint = NanoGPT().train(1).checkpoint()
    checkpoint["model"].update({name: torch.zeros(3, 3) for name in more})
    path = put(checkpoint, tmp_path / "old.pt")
    refuses(lambda: load_model(path), "old.pt", *more)
    refuses_to_convert(path, tmp_path / "ckpt.pt", *more)


@smoke
def test_missing_and_unexpected_parameters_of_nanogptplus_are_listed(tmp_path):
    content = Plus().checkpoint()
    del content["transformer_blocks.1.layer_norm_2.weight"]
    content["value_head.weight"] = torch.zeros(2)
    path = put(content, tmp_path / "gpt_model_small.pth.tar")
    sentence = refuses(lambda: load_model(path, n_head=2), "value_head.weight")
    assert "transformer_blocks.1.layer_norm_2.weight" in sentence or "transformer.h.1.ln_2.weight" in sentence


def names_both_shapes(sentence: str, one: tuple, other: tuple):
    for shape in (one, other):
        assert re.search(r"\D{1,3}".join(map(str, shape)), sentence), f"{shape} is not in {sentence!r}"


@smoke
@pytest.mark.parametrize(
    "change, one, other",
    [
        (dict(n_embd=32), (13, 16), (13, 32)),
        (dict(vocab_size=14), (13, 16), (14, 16)),
        (dict(block_size=16), (8, 16), (16, 16)),
    ],
)
def test_weights_that_do_not_fit_model_args_name_both_shapes(tmp_path, change, one, other):
    checkpoint = NanoGPT().train(1).checkpoint()
    checkpoint["model_args"].update(change)
    path = put(checkpoint, tmp_path / "old.pt")
    names_both_shapes(refuses(lambda: load_model(path), "old.pt"), one, other)
    names_both_shapes(refuses_to_convert(path, tmp_path / "ckpt.pt"), one, other)


@smoke
@pytest.mark.parametrize(
    "given, one, other",
    [
        (dict(n_embd=32), (13, 16), (13, 32)),
        (dict(block_size=16), (8, 16), (16, 16)),
        (dict(vocab_size=14), (13, 16), (14, 16)),
    ],
)
def test_hyper_parameters_that_do_not_fit_nanogptplus_name_both_shapes(tmp_path, given, one, other):
    path = put(Plus().checkpoint(), tmp_path / "gpt_model_small.pth.tar")
    names_both_shapes(refuses(lambda: load_model(path, n_head=2, **given)), one, other)


@smoke
def test_a_size_that_does_not_fit_nanogptplus_names_both_shapes(tmp_path):
    path = put(Plus(n_head=4).checkpoint(), tmp_path / "gpt_model_medium.pth.tar")
    names_both_shapes(refuses_to_convert(path, tmp_path / "ckpt.pt", "--size=medium"), (13, 16), (13, 384))


@smoke
def test_what_nanogptplus_lacks_is_asked_for_by_the_name_of_the_flag(tmp_path):
    path = put(Plus().checkpoint(), tmp_path / "gpt_model_small.pth.tar")
    refuses(lambda: load_model(path), "n_head")
    refuses_to_convert(path, tmp_path / "ckpt.pt", "n_head")
    refuses_to_convert(path, tmp_path / "ckpt.pt", "--n_head=3", "n_head")  # 16 channels have no 3 heads
    refuses_to_convert(path, tmp_path / "ckpt.pt", "--size=tiny", "small", "medium", "large")


@smoke
@pytest.mark.parametrize("same", ["same path", "relative", "dots", "symlink", "symlinked folder", "hard link"])
def test_a_file_is_never_converted_in_place(tmp_path, same):
    os.makedirs("a")
    old = put(NanoGPT().train(1).checkpoint(), tmp_path / "a" / "ckpt.pt")
    new = {"same path": old, "relative": "a/ckpt.pt", "dots": "a/../a/ckpt.pt"}.get(same, "link")
    if same == "symlink":
        os.symlink(old, new)
    elif same == "symlinked folder":
        os.symlink("a", "link")
        new = "link/ckpt.pt"
    elif same == "hard link":
        os.link(old, new)
    refuses_to_convert(old, new, os.path.basename(new))


@smoke
@pytest.mark.parametrize("content", [b"", b"precious", "checkpoint", "another conversion", "folder", "dangling link"])
def test_an_existing_file_is_not_overwritten(tmp_path, content):
    old = put(NanoGPT().train(1).checkpoint(), tmp_path / "old.pt")
    if content == "checkpoint":
        put(NanoGPT(seed=1).train(1).checkpoint(), "new.pt")
    elif content == "another conversion":  # written by this program, but not by this command
        convert(put(NanoGPT(seed=1).train(1).checkpoint(), tmp_path / "other.pt"), "new.pt")
    elif content == "folder":
        os.makedirs("new.pt")
        open("new.pt/file", "wb").close()
    elif content == "dangling link":
        os.symlink("nowhere", "new.pt")
    else:
        (tmp_path / "new.pt").write_bytes(content)
    refuses_to_convert(old, "new.pt", "new.pt")


def test_the_same_conversion_twice_leaves_the_same_file(tmp_path):
    old = put(NanoGPT("rope", "C").train(1).checkpoint(), tmp_path / "old.pt")
    before = torch.load(convert(old, "new.pt"), weights_only=True)
    convert(old, "new.pt")
    after = torch.load("new.pt", weights_only=True)
    assert before.keys() == after.keys() and sorted(os.listdir()) == ["new.pt", "old.pt"]
    assert all(torch.equal(before["model"][name], after["model"][name]) for name in before["model"])
    refuses_to_convert(put(NanoGPT("rope", "C", seed=1).train(1).checkpoint(), tmp_path / "else.pt"), "new.pt")


@smoke
def test_another_conversion_of_the_same_file_does_not_replace_the_first(tmp_path):
    old = put(NanoGPT().train(1).checkpoint(), tmp_path / "old.pt")
    convert(old, "new.pt")
    refuses_to_convert(old, "new.pt", "--pos_embd=relative", "new.pt")


def test_a_conversion_does_not_overwrite_what_was_trained_since(tmp_path, tiny_data):
    old = put(NanoGPT(vocab_size=len(CHARACTERS)).train(4).checkpoint(), tmp_path / "old.pt")
    os.makedirs("out")
    convert(old, "out/ckpt.pt")
    resume("out", tiny_data, 6, "--always_save_checkpoint")
    assert torch.load("out/ckpt.pt", weights_only=True)["iter_num"] == 6
    refuses_to_convert(old, "out/ckpt.pt", "out/ckpt.pt")


@smoke
def test_paths_that_lead_nowhere_give_a_sentence(tmp_path):
    old = put(NanoGPT().train(1).checkpoint(), tmp_path / "old.pt")
    refuses_to_convert("nothing.pt", "ckpt.pt", "nothing.pt")
    refuses_to_convert(old, "ckpt.pt", "--pos_embd=alibi", "alibi")
    refuses_to_convert(old, "ckpt.pt", "--pos_embd=sideways", "sideways")
    refuses_to_convert(old, "ckpt.pt", "--to=onnx", "onnx")
    import ckpt_update

    for args in ([], [old], [old, "one.pt", "two.pt"]):
        refuses(lambda: ckpt_update.main(args))
    assert os.listdir() == ["old.pt"]


def test_errors_of_the_program_are_sentences(tmp_path):
    put(NanoGPT().train(1).checkpoint(), tmp_path / "ckpt.pt")
    expect_sentence(run("ckpt_update.py", "ckpt.pt", "./ckpt.pt", cwd=tmp_path, check=None), "ckpt.pt")
    put({"net": 1, "epoch": 2}, tmp_path / "strange.pt")
    expect_sentence(run("ckpt_update.py", "strange.pt", "new.pt", cwd=tmp_path, check=None), "net", "epoch", "nanoGPT")
    put(Plus().checkpoint(), tmp_path / "gpt_model_small.pth.tar")
    expect_sentence(run("ckpt_update.py", "gpt_model_small.pth.tar", "new.pt", cwd=tmp_path, check=None), "--n_head")
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "gpt_model_small.pth.tar", "strange.pt"]


# ----------------------------------------------------------------------------------------------------------------------
# Hugging Face


def our_checkpoint(path, characters: str | None = "\n abcdefghi!,", **more) -> GPT:
    """Save one of our files at path, with weights and biases that differ from their start; returns its model."""
    args = dict(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=13, bias=False)
    config = GPTConfig(**{**args, **more})
    torch.manual_seed(0)
    model = build_model(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    checkpoint = {
        "model": model.state_dict(),
        "model_args": checkpoints.model_args(config),
        "iter_num": 1,
        "best_val_loss": 2.0,
        "config": {},
        "format_version": checkpoints.FORMAT_VERSION,
    }
    if characters:
        checkpoint["tokenizer"] = CharTokenizer(characters).to_dict()
    put(checkpoint, path)
    return model


def assert_safe_folder(folder):
    names = [name for _, _, names in os.walk(folder) for name in names]
    assert "config.json" in names and [name for name in names if name.endswith(".safetensors")]
    assert not [name for name in names if name.endswith((".bin", ".pkl", ".pt", ".pth", ".pickle", ".part"))], names


@pytest.mark.parametrize(
    "more",
    [
        dict(bias=True, activation="gelu"),
        dict(bias=False, activation="gelu_tanh"),
        dict(bias=True, tie_weights=False, dropout=0.3),
        dict(n_head=4, n_layer=11, n_embd=8, bias=True),
        dict(n_head=1, n_embd=10, block_size=5),
    ],
    ids=str,
)
def test_transformers_opens_an_exported_folder_and_it_comes_back(tmp_path, transformers, more):
    ours = our_checkpoint(tmp_path / "ckpt.pt", **more)
    convert("ckpt.pt", "folder", "--to=hf")
    assert_safe_folder("folder")
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained("folder", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    idx = torch.randint(13, (3, ours.config.block_size))
    with torch.no_grad():
        logits = theirs.eval()(idx).logits
    torch.testing.assert_close(logits, model_logits(ours, idx), rtol=0, atol=1e-4)
    assert theirs.dtype == torch.float32 and theirs.config.n_positions == ours.config.block_size
    assert type(transformers.AutoModelForCausalLM.from_pretrained("folder")) is transformers.GPT2LMHeadModel

    model, tokenizer = load_model("folder")
    torch.testing.assert_close(model_logits(model, idx), model_logits(ours, idx), rtol=0, atol=1e-5)
    convert("folder", "back.pt")
    model, tokenizer = load_model("back.pt")
    torch.testing.assert_close(model_logits(model, idx), model_logits(ours, idx), rtol=0, atol=1e-5)
    assert model.config.activation == ours.config.activation and model.config.tie_weights == ours.config.tie_weights
    assert tokenizer.characters == "\n abcdefghi!,"


@pytest.mark.parametrize("kind", ["nanogpt", "eds default", "plus"])
def test_files_of_others_are_exported_too(tmp_path, transformers, kind):
    old = Plus(bias=True) if kind == "plus" else NanoGPT(bias=True) if kind == "nanogpt" else NanoGPT("default", "C")
    old = old if kind == "plus" else old.train(1)
    put(old.checkpoint(), tmp_path / "old.pt")
    convert("old.pt", "folder", "--to=hf", *(["--n_head=2"] if kind == "plus" else []))
    assert_safe_folder("folder")
    with torch.no_grad():
        logits = transformers.GPT2LMHeadModel.from_pretrained("folder").eval()(ids_for(old)).logits
        torch.testing.assert_close(logits, old.logits(ids_for(old)), rtol=0, atol=1e-4)


def test_a_character_tokenizer_goes_along(tmp_path, transformers):
    characters = "\n\t !',.?abcdefghijklmnéñ字\U0001f600Ġ▁<>|"
    our_checkpoint(tmp_path / "ckpt.pt", characters, vocab_size=len(characters))
    convert("ckpt.pt", "folder", "--to=hf")
    ours = CharTokenizer(characters)
    texts = [
        "a bad cab",
        "  two spaces ,  and . stops !\n\n\tend ",
        " ",
        "\n",
        "n't 's ' m",
        "éñ字\U0001f600Ġ▁",
        "<|a|>",
        "don't , ? !",
    ]
    texts = ["".join(c for c in text if c in characters) for text in texts]
    for kind in (transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast):
        theirs = kind.from_pretrained("folder")
        for text in texts:
            ids = ours.encode(text)
            assert theirs(text)["input_ids"] == ids and theirs.encode(text) == ids, (kind, text)
            assert theirs.decode(ids) == text, (kind, text)
        assert len(theirs) == len(characters)
    assert load_model("folder")[1].characters == characters
    convert("folder", "back.pt")
    assert load_model("back.pt")[1].characters == characters


def test_gpt2s_tokenizer_goes_along(tmp_path, transformers, gpt2_vocabulary):
    import tiktoken

    ours = our_checkpoint(tmp_path / "plain.pt", None, vocab_size=50257, n_embd=4, bias=True)
    checkpoint = torch.load("plain.pt", weights_only=True)
    put({**checkpoint, "tokenizer": {"kind": "gpt2"}}, tmp_path / "ckpt.pt")
    convert("ckpt.pt", "folder", "--to=hf")
    assert_safe_folder("folder")
    theirs = transformers.AutoTokenizer.from_pretrained("folder")
    for text in [
        'Sancho said: "señor, don\'t!"',
        " two  spaces\n\n tabs\t",
        "字\U0001f600 12345",
        "<bot> hi\n<human> ho",
    ]:
        ids = tiktoken.get_encoding("gpt2").encode_ordinary(text)
        assert theirs.encode(text) == ids and theirs.decode(ids) == text
    convert("folder", "back.pt")
    model, tokenizer = load_model("back.pt")
    assert tokenizer.kind == "gpt2"
    idx = torch.randint(50257, (1, 8))
    torch.testing.assert_close(model_logits(model, idx), model_logits(ours, idx), rtol=0, atol=1e-5)


def test_a_model_without_a_tokenizer_is_exported_without_one(tmp_path, transformers):
    our_checkpoint(tmp_path / "ckpt.pt", None)
    convert("ckpt.pt", "folder", "--to=hf")
    assert not [name for name in os.listdir("folder") if "token" in name or "vocab" in name]
    assert load_model("folder")[1] is None


def test_a_bigram_is_not_exported(tmp_path):
    our_checkpoint(tmp_path / "ckpt.pt", model_type="bigram")
    refuses_to_convert("ckpt.pt", "folder", "--to=hf", "model_type=bigram")


@pytest.mark.parametrize("pos_embd", ["rope", "relative"])
@pytest.mark.parametrize("converted", [False, True])
def test_legacy_models_are_not_exported(tmp_path, pos_embd, converted):
    old = put(NanoGPT(pos_embd, "C").train(1).checkpoint(), tmp_path / "old.pt")
    if converted:
        old = convert(old, "new.pt")
    refuses_to_convert(old, "folder", "--to=hf", f"eds-{pos_embd}")


def test_an_existing_folder_is_not_written_into(tmp_path, transformers):
    our_checkpoint(tmp_path / "ckpt.pt")
    os.makedirs("folder")
    (tmp_path / "folder" / "config.json").write_text("precious", encoding="utf-8")
    refuses_to_convert("ckpt.pt", "folder", "--to=hf", "folder")
    (tmp_path / "file").write_text("precious", encoding="utf-8")
    refuses_to_convert("ckpt.pt", "file", "--to=hf", "file")
    convert("ckpt.pt", "new", "--to=hf")
    (tmp_path / "new" / "notes.txt").write_text("precious", encoding="utf-8")  # not there when it was written
    refuses_to_convert("ckpt.pt", "new", "--to=hf", "new")


@pytest.mark.parametrize("more", [{}, dict(activation_function="gelu"), dict(tie_word_embeddings=False)], ids=str)
def test_a_folder_of_transformers_becomes_a_checkpoint(tmp_path, transformers, tiny_data, more):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=len(CHARACTERS), n_positions=8, n_embd=24, n_layer=2, n_head=3, **more)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained("folder")
    model, _ = load_model(convert("folder", "ckpt.pt"))
    idx = torch.randint(len(CHARACTERS), (2, 8))
    with torch.no_grad():
        torch.testing.assert_close(model_logits(model, idx), theirs(idx).logits, rtol=0, atol=1e-4)
    assert torch.load("ckpt.pt", weights_only=True)["format_version"] == checkpoints.FORMAT_VERSION
    os.makedirs("out")
    os.rename("ckpt.pt", "out/ckpt.pt")
    settings = ["--device=cpu", "--compile=False", "--batch_size=2", "--gradient_accumulation_steps=1"]
    assert resume("out", tiny_data, 1, *settings)["iter_num"] == 1


# ----------------------------------------------------------------------------------------------------------------------
# what real files of nanoGPT lack or have otherwise


@smoke
def test_a_head_that_is_not_tied_keeps_its_optimizer_state_and_the_gelu_of_its_age(tmp_path):
    torch.manual_seed(0)
    old = GPT(
        GPTConfig(
            n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=11, tie_weights=False, activation="gelu_tanh"
        )
    )  # nanoGPT before 14 January 2023
    named = dict(old.named_parameters())
    linear = sorted(name for name, p in named.items() if p.dim() == 2 and ".wte" not in name and ".wpe" not in name)
    groups = [linear, sorted(named.keys() - set(linear))]
    optimizer = torch.optim.AdamW([dict(params=[named[name] for name in names]) for names in groups])
    for i in range(2):
        idx = torch.randint(11, (2, 8))
        old(idx, idx)[1].backward()
        optimizer.step()
    args = dict(n_layer=2, n_head=2, n_embd=16, block_size=8, dropout=0.0)  # without vocab_size, as it was then
    path = put(dict(model=old.state_dict(), optimizer=optimizer.state_dict(), model_args=args), tmp_path / "old.pt")
    with torch.no_grad():
        torch.testing.assert_close(load_model(path)[0](idx)[0], old(idx)[0], rtol=0, atol=1e-6)
    new = checkpoints.load(convert(path, tmp_path / "ckpt.pt"))
    order = sum(load_model(path)[0].parameter_groups().values(), [])
    for number, name in enumerate(order):
        assert torch.equal(new["optimizer"]["state"][number]["exp_avg"], optimizer.state[named[name]]["exp_avg"]), name


def test_what_model_args_lack_is_read_off_the_shapes_and_n_head_is_asked_for(tmp_path):
    old = NanoGPT(bias=False).train(1)
    checkpoint = old.checkpoint()
    n_head = checkpoint["model_args"].pop("n_head")
    for key in ("vocab_size", "n_layer", "bias"):
        del checkpoint["model_args"][key]
    path = put(checkpoint, tmp_path / "old.pt")
    with pytest.raises(ValueError, match="--n_head=N"):
        load_model(path)
    assert_same_logits(load_model(path, n_head=n_head)[0], old)
    assert_same_logits(load_model(convert(path, tmp_path / "ckpt.pt", f"--n_head={n_head}"))[0], old)


@smoke
def test_the_tokenizer_is_found_in_the_tree_that_the_checkpoint_comes_from(tmp_path, monkeypatch):
    data = tmp_path / "nano" / "data" / "tiny"
    out = tmp_path / "nano" / "out"
    data.mkdir(parents=True)
    out.mkdir()
    characters = "abcdefghijk"
    with open(data / "meta.pkl", "wb") as file:
        pickle.dump(dict(vocab_size=11, itos=dict(enumerate(characters)), stoi=dict(zip(characters, range(11)))), file)
    old = NanoGPT(vocab_size=11).train(1)
    path = put({**old.checkpoint(), "config": {"dataset": "tiny"}}, out / "ckpt.pt")
    monkeypatch.chdir(tmp_path)
    assert load_model(path)[1].characters == characters
    moved = put({**old.checkpoint(), "config": {"dataset": "tiny"}}, tmp_path / "moved.pt")
    monkeypatch.chdir(tmp_path / "nano")  # nanoGPT looks below the working directory
    assert load_model(moved)[1].characters == characters


@smoke
def test_a_file_with_a_name_like_that_of_an_unfinished_one_is_left_alone(tmp_path):
    path = put(NanoGPT().train(1).checkpoint(), tmp_path / "old.pt")
    (tmp_path / "new.pt.part").write_text("mine", encoding="utf-8")
    convert(path, "new.pt")
    assert (tmp_path / "new.pt.part").read_text(encoding="utf-8") == "mine"
    assert sorted(os.listdir()) == ["new.pt", "new.pt.part", "old.pt"]


@pytest.mark.parametrize("what", ["the output", "its out_dir"])
def test_an_output_that_another_process_writes_is_refused(tmp_path, what):
    path = put(NanoGPT().train(1).checkpoint(), tmp_path / "old.pt")
    lock = locked_output("out/new.pt") if what == "the output" else locked_directory("out")
    os.makedirs("out", exist_ok=True)
    with lock:
        expect_sentence(run("ckpt_update.py", path, "out/new.pt", cwd=tmp_path, check=None), "another process")
    assert not os.path.exists("out/new.pt")


def test_a_hyper_parameter_that_contradicts_a_folder_is_refused(tiny_run):
    with pytest.raises(ValueError, match="n_head=7 contradicts"):
        load_model(tiny_run, n_head=7)
    assert load_model(tiny_run, n_head=2)[0].config.n_head == 2
