"""Checkpoints: what is saved comes back bit for bit, old files load, and nothing in a file is ever run."""

import contextlib
import copy
import json
import math
import os
import pickle
from dataclasses import replace

import pytest
import torch
from helpers import RunsACommand

from configurator import UserError
from dongpt.checkpoint import files as checkpoints
from dongpt.checkpoint.files import (
    BEST_NAME,
    LAST_NAME,
    is_valid,
    load,
    load_from_out_dir,
    load_model,
    model_args,
    restore_model,
    save,
)
from dongpt.text.tokenizers import CharTokenizer
from model import GPT, GPTConfig

smoke = pytest.mark.smoke  # the tests without it import transformers, which takes seconds

BAD_SIZES = [True, "2", 0, -1, 2.5, math.nan, 10**12, 10**5000, [2], None]
CONFIG = GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=16, bias=False)


def small_model(seed: int = 0, config: GPTConfig = CONFIG) -> GPT:
    torch.manual_seed(seed)
    model = GPT(config).eval()
    for parameter in model.parameters():  # biases and gains that differ from their start, so that a swap shows
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def small_checkpoint(seed: int = 0, **more) -> dict:
    """A checkpoint as train.py writes it, after an update that filled the optimizer."""
    model = small_model(seed)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    model(torch.arange(8)[None], torch.arange(1, 9)[None])[1].backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "model_args": model_args(CONFIG),
        "iter_num": 1,
        "best_val_loss": 2.5,
        "config": {"out_dir": "señor", "compile": False, "max_minutes": None},
        "format_version": 1,
        "tokenizer": CharTokenizer("\n abcdefghi").to_dict(),
        **more,
    }


def same(one, other) -> bool:
    """Whether two nested values are equal bit for bit, types included."""
    if type(one) is not type(other):
        return isinstance(one, dict) and isinstance(other, dict) and same(dict(one), dict(other))
    if torch.is_tensor(one):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def refused(path, *parts: str):
    """Check that load refuses path with one sentence that names it and holds parts."""
    with pytest.raises(ValueError) as caught:
        load(str(path))
    sentence = str(caught.value)
    assert str(path) in sentence and "\n" not in sentence
    for part in parts:
        assert part in sentence, sentence


# ----------------------------------------------------------------------------------------------------------------------
# saving


@smoke
def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    checkpoint = small_checkpoint()
    save(checkpoint, str(tmp_path / BEST_NAME))
    assert same(load(str(tmp_path / BEST_NAME)), checkpoint)
    assert same(load(str(tmp_path / BEST_NAME), mmap=True), checkpoint)
    assert os.listdir(tmp_path) == [BEST_NAME]


@smoke
def test_a_checkpoint_is_readable_by_torch_without_trust(tmp_path):
    checkpoint = small_checkpoint()
    save(checkpoint, str(tmp_path / BEST_NAME))
    assert same(torch.load(tmp_path / BEST_NAME, weights_only=True), checkpoint)


@smoke
def test_a_trained_run_writes_checkpoints_of_plain_values(tiny_run):
    for name in (BEST_NAME, LAST_NAME):
        checkpoint = torch.load(os.path.join(tiny_run, name), weights_only=True)
        assert {
            "model",
            "optimizer",
            "model_args",
            "iter_num",
            "best_val_loss",
            "config",
            "format_version",
            "tokenizer",
        } <= checkpoint.keys()
        assert set(checkpoint["model_args"]) == set(checkpoints.NANOGPT_ARG_NAMES) and checkpoint["iter_num"] == 6
    assert not [name for name in os.listdir(tiny_run) if name.endswith(".part")]


@smoke
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_a_write_that_fails_half_way_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, error):
    path = tmp_path / LAST_NAME
    save(small_checkpoint(0), str(path))
    before = path.read_bytes()

    def fails(checkpoint, file):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(ValueError) as caught:
        save(small_checkpoint(1), str(path))
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [LAST_NAME]


@smoke
def test_saving_where_no_folder_is_gives_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="ckpt.pt"):
        save(small_checkpoint(), str(tmp_path / "no" / BEST_NAME))


@smoke
def test_model_args_are_nanogpts_seven_keys():
    args = model_args(CONFIG)
    assert args == dict(n_layer=2, n_head=2, n_embd=16, block_size=8, bias=False, vocab_size=11, dropout=0.0)
    assert model_args(replace(CONFIG, attn_dropout=0.5)) == args
    assert model_args(replace(CONFIG, pos_embd="absolute")) == args


@smoke
def test_model_args_name_what_nanogpts_model_cannot_have(tmp_path):
    config = GPTConfig(**model_args(CONFIG), activation="gelu_tanh", tie_weights=False)
    args = model_args(config)
    assert set(args) - set(checkpoints.NANOGPT_ARG_NAMES) == {"activation", "tie_weights"}
    model = small_model(config=config)
    save({"model": model.state_dict(), "model_args": args}, str(tmp_path / BEST_NAME))
    again, _ = load_model(str(tmp_path / BEST_NAME))
    idx = torch.arange(8)[None]
    assert again.config == config and torch.equal(again(idx)[0], model(idx)[0])


# ----------------------------------------------------------------------------------------------------------------------
# what is refused


@smoke
def test_a_missing_checkpoint_is_refused(tmp_path):
    refused(tmp_path / "nothing.pt", "no checkpoint")
    refused(tmp_path, "no checkpoint")


@smoke
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0",
        b"garbage",
        b"garbage " * 1000,
        b"PK\x03\x04",
        b"\x80\x02",
        b"\x80\x04.",
        b"\0" * 4096,
        b"<!DOCTYPE html><html>",
        bytes(range(256)) * 8,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / BEST_NAME).write_bytes(content)
    refused(tmp_path / BEST_NAME)


@pytest.mark.parametrize("old_format", [False, True])
def test_a_checkpoint_cut_off_anywhere_is_refused(tmp_path, old_format):
    torch.save(small_checkpoint(), tmp_path / BEST_NAME, _use_new_zipfile_serialization=not old_format)
    whole = (tmp_path / BEST_NAME).read_bytes()
    for cut in [0, 1, 2, 3, 10, 63, 64, 100, 1000, *range(2000, len(whole), len(whole) // 20), len(whole) - 1]:
        (tmp_path / BEST_NAME).write_bytes(whole[:cut])
        refused(tmp_path / BEST_NAME)
    (tmp_path / BEST_NAME).write_bytes(whole)
    load(str(tmp_path / BEST_NAME))


@smoke
@pytest.mark.parametrize(
    "write",
    [
        lambda bad, path: path.write_bytes(pickle.dumps(bad)),
        lambda bad, path: path.write_bytes(pickle.dumps({"model": bad, "model_args": {}}, protocol=0)),
        lambda bad, path: torch.save(bad, path),
        lambda bad, path: torch.save({**small_checkpoint(), "config": bad}, path),
        lambda bad, path: torch.save({**small_checkpoint(), "config": bad}, path, _use_new_zipfile_serialization=False),
    ],
    ids=["pickle", "old pickle", "zip", "zip of a checkpoint", "torch before 1.6"],
)
def test_a_malicious_checkpoint_is_refused_and_not_run(tmp_path, write):
    marker, path = tmp_path / "marker", tmp_path / BEST_NAME
    write(RunsACommand(marker), path)
    refused(path, "not run")
    for action in (
        lambda: load_model(str(path)),
        lambda: load_model(str(tmp_path)),
        lambda: load_from_out_dir(str(tmp_path)),
    ):
        with pytest.raises(ValueError, match="not run"):
            action()
    assert not marker.exists()


@smoke
def test_the_attack_of_these_tests_is_a_real_one(tmp_path):
    torch.save(RunsACommand(tmp_path / "marker"), tmp_path / BEST_NAME)
    torch.load(tmp_path / BEST_NAME, weights_only=False)
    assert (tmp_path / "marker").exists()


@smoke
def test_a_whole_pickled_model_is_refused(tmp_path):
    torch.save(small_model(), tmp_path / BEST_NAME)
    refused(tmp_path / BEST_NAME, "model.GPT", "state_dict()", "arbitrary code")
    torch.save({"model": small_model(), "model_args": {}}, tmp_path / BEST_NAME)
    refused(tmp_path / BEST_NAME, "state_dict()")


@smoke
@pytest.mark.parametrize(
    "content, found",
    [
        ([1, 2], "list"),
        (torch.zeros(3), "Tensor"),
        ("text", "str"),
        (None, "NoneType"),
        ({}, "nothing"),
        ({"model": {}}, "model"),
        ({"epoch": 3, "weights": {}}, "epoch, weights"),
        ({f"blocks.{i}.sa.proj.weight": torch.zeros(2) for i in range(12)}, "contains blocks.N.sa.proj.weight;"),
    ],
)
def test_a_file_of_other_things_says_what_was_found_and_what_is_known(tmp_path, content, found):
    torch.save(content, tmp_path / BEST_NAME)
    refused(tmp_path / BEST_NAME, found, "supported layouts are", "nanoGPT+", "EDS")


@smoke
def test_a_checkpoint_of_a_newer_program_is_refused(tmp_path):
    torch.save(small_checkpoint(format_version=checkpoints.FORMAT_VERSION + 1), tmp_path / BEST_NAME)
    refused(tmp_path / BEST_NAME, "newer", "update")


@smoke
@pytest.mark.parametrize(
    "change, part",
    [
        (dict(n_embd=32), "transformer.wte.weight: copying a param with shape torch.Size([11, 16]) from checkpoint"),
        (dict(vocab_size=12), "torch.Size([12, 16])"),
        (
            dict(n_layer=3),
            'Missing key(s) in state_dict: "transformer.h.2.ln_1.weight", "transformer.h.2.attn.c_attn.weight", "',
        ),
        (
            dict(n_layer=1),
            'Unexpected key(s) in state_dict: "transformer.h.1.ln_1.weight", "transformer.h.1.attn.c_attn',
        ),
        (dict(bias=True), 'Missing key(s) in state_dict: "transformer.h.0.ln_1.bias", '),
        (dict(n_head=7), "n_head=7"),
        (dict(pos_embd="rope"), 'Unexpected key(s) in state_dict: "transformer.wpe.weight"'),
        (dict(flux=3), "flux"),
    ],
)
def test_weights_that_do_not_fit_model_args_give_a_sentence(tmp_path, change, part):
    checkpoint = small_checkpoint()
    checkpoint["model_args"].update(change)
    save(checkpoint, str(tmp_path / BEST_NAME))
    with pytest.raises(ValueError) as caught:
        load_model(str(tmp_path / BEST_NAME))
    assert part in str(caught.value) and "\n" not in str(caught.value)


@smoke
def test_a_weight_that_is_missing_gives_a_sentence(tmp_path):
    checkpoint = small_checkpoint()
    del checkpoint["model"]["transformer.h.1.mlp.c_fc.weight"]
    with pytest.raises(ValueError, match="h.1.mlp.c_fc"):
        restore_model(checkpoint, "ckpt.pt")


# ----------------------------------------------------------------------------------------------------------------------
# content that is not trusted


@smoke
@pytest.mark.parametrize(
    "change",
    [
        *(dict(model_args={"n_layer": value}) for value in BAD_SIZES),
        *(dict(model_args={name: value}) for name in ("n_embd", "block_size") for value in (True, 0, 10**12)),
        dict(model_args={"n_head": True}),
        dict(model_args={"vocab_size": None}),
        dict(model_args={"dropout": math.nan}),
        dict(model_args={"dropout": "0.1"}),
        dict(model_args={"bias": 1}),
        dict(model_args={"pos_embd": ["rope"]}),
        dict(model_args={"legacy": "eds-alibi"}),
        dict(model_args={"ngrams": 2**30}),
        dict(model_args={1: 2}),
        dict(format_version="1"),
        dict(format_version=[1]),
        dict(format_version=True),
        dict(format_version=-1),
        dict(format_version=torch.zeros(2)),
        dict(iter_num="9"),
        dict(iter_num=-1),
        dict(iter_num=2.5),
        dict(iter_num=10**5000),
        dict(config=["out_dir"]),
        dict(config={1: 2}),
        dict(config={"data_dir": 5}),
        dict(config={"document_mask": "yes"}),
        dict(tokenizer="gpt2"),
        dict(tokenizer={}),
        dict(tokenizer={"kind": ["char"]}),
        dict(tokenizer={"kind": "char", "characters": 5}),
        dict(tokenizer={"kind": "char", "characters": "abcdefghijklmnop"}),  # more than the model has
        dict(tokenizer={"kind": "word", "words": [1, 2]}),
        dict(tokenizer={"kind": "char", "characters": "abc", "special": "x"}),
        dict(optimizer=[1]),
    ],
)
def test_a_value_of_a_wrong_type_or_size_gives_a_sentence(tmp_path, change):
    checkpoint = small_checkpoint()
    for key, value in change.items():
        checkpoint[key] = {**checkpoint[key], **value} if key == "model_args" else value
    torch.save(checkpoint, tmp_path / BEST_NAME)
    refused(tmp_path / BEST_NAME)
    with pytest.raises(UserError):
        load_model(str(tmp_path / BEST_NAME))
    assert not is_valid(str(tmp_path / BEST_NAME))


@smoke
@pytest.mark.parametrize("tokenizer", [None, CharTokenizer("\n abcdefghi").to_dict()], ids=["none", "no end"])
def test_a_document_mask_needs_a_tokenizer_with_an_end_of_documents(tmp_path, tokenizer):
    save(small_checkpoint(config={"document_mask": True}, tokenizer=tokenizer), str(tmp_path / BEST_NAME))
    with pytest.raises(UserError, match="document_mask"):
        load_model(str(tmp_path / BEST_NAME))


@smoke
@pytest.mark.parametrize(
    "weight", [torch.ones(16, dtype=torch.int64), torch.ones(16).to_sparse(), torch.ones(16, dtype=torch.complex64)]
)
def test_weights_that_are_not_dense_floating_point_numbers_are_refused(tmp_path, weight):
    checkpoint = small_checkpoint()
    checkpoint["model"]["transformer.ln_f.weight"] = weight
    torch.save(checkpoint, tmp_path / BEST_NAME)
    with pytest.raises(UserError):
        load_model(str(tmp_path / BEST_NAME))


def damaged_optimizers():
    """(what is wrong, optimizer state): each damaged in one place."""
    good = small_checkpoint()["optimizer"]

    def changed(edit):
        optimizer = copy.deepcopy(good)
        edit(optimizer)
        return optimizer

    return {
        "no groups": {"state": good["state"]},
        "no states": {"param_groups": good["param_groups"]},
        "groups as a dict": {**good, "param_groups": {}},
        "a group without params": changed(lambda o: o["param_groups"][0].pop("params")),
        "params as text": changed(lambda o: o["param_groups"][0].update(params="012345")),
        "a list among params": changed(lambda o: o["param_groups"][0]["params"].__setitem__(0, [1])),
        "one parameter less": changed(lambda o: o["param_groups"][0]["params"].pop()),
        "a state that is a list": changed(lambda o: o["state"].update({0: [1]})),
        "a state without a moment": changed(lambda o: o["state"][0].pop("exp_avg_sq")),
        "a moment as a number": changed(lambda o: o["state"][0].update(exp_avg=1.0)),
        "a moment of another shape": changed(lambda o: o["state"][0].update(exp_avg=torch.zeros(3, 3))),
        "a moment of a prefix's shape": changed(lambda o: o["state"][0].update(exp_avg=torch.zeros(11))),
        "a rule that is a list": changed(lambda o: o["param_groups"][0].update(rule=["muon"])),
    }


@smoke
@pytest.mark.parametrize("case", damaged_optimizers())
def test_a_damaged_optimizer_state_gives_a_sentence(case):
    checkpoint = {**small_checkpoint(), "optimizer": damaged_optimizers()[case]}
    model = restore_model(checkpoint, BEST_NAME)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    if case == "a rule that is a list":  # settings are this run's
        checkpoints.restore_optimizer(optimizer, checkpoint, model, BEST_NAME)
        assert "rule" not in optimizer.param_groups[0]
        return
    with pytest.raises(UserError, match="optimizer state does not match"):
        checkpoints.restore_optimizer(optimizer, checkpoint, model, BEST_NAME)


@smoke
def test_loading_writes_nothing_to_a_data_directory(tmp_path):
    """A meta.json.new beside the checkpoint used to be obeyed: bins were renamed and deleted."""
    checkpoint = small_checkpoint()
    del checkpoint["format_version"], checkpoint["tokenizer"]
    torch.save(checkpoint, tmp_path / BEST_NAME)
    meta = {"tokenizer": CharTokenizer("\n abcdefghi").to_dict(), "vocab_size": 11, "tokens": {"train": 2, "val": 2}}
    for name in ("meta.json", "meta.json.new"):
        (tmp_path / name).write_text(json.dumps(meta), encoding="utf-8")
    for name in ("train.bin", "val.bin", "train.bin.part", "val.bin.part", "train_000.bin"):
        (tmp_path / name).write_bytes(b"\0\0\0\0")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with contextlib.suppress(UserError):  # of an interrupted preparation; loading may refuse, but not repair it
        load_model(str(tmp_path / BEST_NAME))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# ----------------------------------------------------------------------------------------------------------------------
# which file of an out_dir


def out_dir_with(folder, **iters) -> str:
    """An out_dir with best and last checkpoints of these iterations."""
    for name, iter_num in iters.items():
        save(small_checkpoint(iter_num, iter_num=iter_num), str(folder / {"best": BEST_NAME, "last": LAST_NAME}[name]))
    return str(folder)


@smoke
@pytest.mark.parametrize("best, last, name", [(5, 9, LAST_NAME), (9, 5, BEST_NAME), (5, 5, LAST_NAME)])
def test_the_newest_valid_file_is_picked(tmp_path, capsys, best, last, name):
    checkpoint, path = load_from_out_dir(out_dir_with(tmp_path, best=best, last=last))
    assert os.path.basename(path) == name and checkpoint["iter_num"] == max(best, last)
    assert capsys.readouterr().err == ""


@smoke
@pytest.mark.parametrize("broken, left", [(LAST_NAME, BEST_NAME), (BEST_NAME, LAST_NAME)])
def test_a_damaged_file_is_passed_over_and_that_is_said(tmp_path, capsys, broken, left):
    out_dir = out_dir_with(tmp_path, best=5, last=9)
    content = (tmp_path / broken).read_bytes()
    (tmp_path / broken).write_bytes(content[: len(content) // 2])
    checkpoint, path = load_from_out_dir(out_dir)
    assert os.path.basename(path) == left and checkpoint["iter_num"] == {BEST_NAME: 5, LAST_NAME: 9}[left]
    said = capsys.readouterr().err
    assert broken in said and left in said and said.count("\n") == 1


@smoke
def test_an_out_dir_without_a_valid_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint"):
        load_from_out_dir(str(tmp_path))
    with pytest.raises(ValueError, match="no checkpoint"):
        load_from_out_dir(str(tmp_path / "nothing"))
    (tmp_path / BEST_NAME).write_bytes(b"")
    (tmp_path / LAST_NAME).write_bytes(b"garbage")
    with pytest.raises(ValueError) as caught:
        load_from_out_dir(str(tmp_path))
    assert BEST_NAME in str(caught.value) and LAST_NAME in str(caught.value)


@smoke
def test_an_out_dir_means_its_best_checkpoint(tmp_path):
    out_dir = out_dir_with(tmp_path, best=5, last=9)
    best = load(os.path.join(out_dir, BEST_NAME))["model"]["lm_head.weight"]
    assert torch.equal(load_model(out_dir)[0].lm_head.weight, best)


# ----------------------------------------------------------------------------------------------------------------------
# load_model


@smoke
def test_load_model_gives_a_float32_model_in_eval_mode_and_its_tokenizer(tmp_path):
    checkpoint = small_checkpoint()
    save(checkpoint, str(tmp_path / BEST_NAME))
    model, tokenizer = load_model(str(tmp_path / BEST_NAME))
    assert not any(module.training for module in model.modules())
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.float32, "cpu")}
    assert tokenizer.decode(tokenizer.encode("a bad cab")) == "a bad cab" and tokenizer.vocab_size == 11
    assert all(torch.equal(tensor, checkpoint["model"][name]) for name, tensor in model.state_dict().items())


@smoke
def test_load_model_takes_device_and_dtype(tmp_path):
    save(small_checkpoint(), str(tmp_path / BEST_NAME))
    model, _ = load_model(str(tmp_path / BEST_NAME), device="cpu", dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@smoke
def test_a_file_without_a_tokenizer_gives_none(tmp_path):
    checkpoint = small_checkpoint()
    del checkpoint["tokenizer"]
    save(checkpoint, str(tmp_path / BEST_NAME))
    assert load_model(str(tmp_path / BEST_NAME))[1] is None


@smoke
def test_model_args_are_added_where_the_file_lacks_them_and_never_contradict_it(tmp_path):
    checkpoint = small_checkpoint()
    save(checkpoint, str(tmp_path / "ours.pt"))  # what ours does not name is as GPTConfig has it
    with pytest.raises(ValueError, match="activation='gelu_tanh' contradicts .*'gelu'"):
        load_model(str(tmp_path / "ours.pt"), activation="gelu_tanh")
    assert load_model(str(tmp_path / "ours.pt"), activation="gelu")[0].config.activation == "gelu"
    del checkpoint["format_version"]
    save(checkpoint, str(tmp_path / "foreign.pt"))
    assert load_model(str(tmp_path / "foreign.pt"), activation="gelu_tanh")[0].config.activation == "gelu_tanh"
    with pytest.raises(ValueError, match="n_head=1 contradicts"):
        load_model(str(tmp_path / "foreign.pt"), n_head=1)


@smoke
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_compile_and_ddp_and_old_mask_buffers_do_no_harm(tmp_path, prefix):
    checkpoint = small_checkpoint()
    expected = {name: tensor.clone() for name, tensor in checkpoint["model"].items()}
    checkpoint["model"] = {prefix + name: tensor for name, tensor in checkpoint["model"].items()}
    for layer in range(2):
        checkpoint["model"][f"{prefix}transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
    save(checkpoint, str(tmp_path / BEST_NAME))
    model, _ = load_model(str(tmp_path / BEST_NAME))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@smoke
def test_biases_of_attention_are_not_taken_for_mask_buffers(tmp_path):
    config = GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=16, bias=True)
    model = small_model(config=config)
    save({"model": model.state_dict(), "model_args": model_args(config)}, str(tmp_path / BEST_NAME))
    again, _ = load_model(str(tmp_path / BEST_NAME))
    assert torch.equal(again.transformer.h[1].attn.c_attn.bias, model.transformer.h[1].attn.c_attn.bias)


@smoke
@pytest.mark.parametrize("name", ["nanogpt_bias", "nanogpt_nobias", "nanogpt_compiled_prefix"])
def test_checkpoints_of_the_ancestors_give_the_logits_they_gave(fixtures_folder, name):
    expected = torch.load(os.path.join(fixtures_folder, f"{name}.expected.pt"), weights_only=True)
    model, tokenizer = load_model(os.path.join(fixtures_folder, f"{name}.pt"))
    idx = expected["idx"]
    with torch.no_grad():
        logits = model(idx, idx)[0]
        first_half = model(idx[:, :8], idx[:, :8])[0]
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=1e-5)  # float32, another order of sums
    torch.testing.assert_close(first_half, expected["logits_first_half"], rtol=1e-4, atol=1e-5)
    with open(os.path.join(fixtures_folder, "meta.pkl"), "rb") as file:  # beside it; plain, as nanoGPT writes it
        assert tokenizer.ids == pickle.load(file)["stoi"]


@smoke
def test_a_checkpoint_of_nanogpt_may_lack_its_config(tmp_path, fixtures_folder):
    checkpoint = load(os.path.join(fixtures_folder, "nanogpt_bias.pt"))
    save({key: checkpoint[key] for key in ("model", "model_args")}, str(tmp_path / BEST_NAME))
    assert load_model(str(tmp_path))[0].config.bias


@smoke
def test_a_missing_folder_gives_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="no-such-model"):
        load_model(str(tmp_path / "no-such-model"))
