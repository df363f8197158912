"""LoRA: training only an adapter, its small checkpoint, its base, merging, and PEFT's directories."""

import json
import os
import shutil

import pytest
import torch
from helpers import (
    TINY_RUN,
    all_logits,
    assert_same,
    assert_same_training,
    load,
    printed,
    random_ids,
    randomise,
    refusal,
    run_ranks,
    snapshot,
    visible,
    write_splits,
)

import ckpt_update
import dongpt
import evaluate
import sample
import train
from dongpt.checkpoint import adapters, load_model, lora
from dongpt.checkpoint import files as checkpoints
from dongpt.checkpoint.legacy import build_meta_model, build_model
from dongpt.text.bins import read_meta
from dongpt.text.tokenizers import from_dict
from dongpt.train.optim import OptimConfig, make_optimizer
from model import GPT, GPTConfig

smoke = pytest.mark.smoke
pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")
INFO = {"alpha": 6.0, "base": "base", "sha256": "0" * 64}
LAYERS = {"attn": ["attn.c_attn", "attn.c_proj"], "all": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]}
ARCHITECTURE = ("--n_layer", "--n_head", "--n_embd", "--block_size")
RUN = [arg for arg in TINY_RUN if not arg.startswith(ARCHITECTURE)]
LORA = ["--lora_rank=4", "--lora_targets=all", "--lora_dropout=0.2"]


def random_model(seed: int = 0, **settings) -> GPT:
    return randomise(
        build_model(GPTConfig(**{**dict(block_size=8, vocab_size=23, n_layer=2, n_head=2, n_embd=16), **settings})),
        seed,
    )


def add_random_adapter(model: GPT, targets: str = "all", rank: int = 3, n_new_ids: int = 0) -> GPT:
    info = {**INFO, **({"first_new_id": model.config.vocab_size - n_new_ids} if n_new_ids else {})}
    lora.add_adapter(model, lora.target_ranks(model, targets, rank), info, n_new_ids)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3, generator=generator)
    return model


def fine_tune(base: str, out_dir: str, data: str, *args: str) -> str:
    assert train.main([f"--data_dir={data}", f"--init_from={base}", f"--out_dir={out_dir}", *RUN, *LORA, *args]) == 0
    return out_dir


@pytest.fixture(scope="module")
def adapter_run(tmp_path_factory, tiny_run, tiny_data) -> str:
    """The out_dir of a finished run that trained an adapter for tiny_run. Tests must not write to it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out_dir = fine_tune(tiny_run, str(tmp_path_factory.mktemp("adapter_run") / "out"), tiny_data)
    torch.set_num_threads(threads)
    return out_dir


# ----------------------------------------------------------------------------------------------------------------------
# the layers


@smoke
@pytest.mark.parametrize("targets", LAYERS)
@pytest.mark.parametrize("settings", [{}, {"bias": False, "pos_embd": "rope"}, {"tie_weights": False, "ngrams": 3}])
def test_the_logits_are_those_of_weights_merged_by_hand(targets, settings):
    model, by_hand, idx = (
        add_random_adapter(random_model(**settings), targets),
        random_model(**settings),
        random_ids(2, 8),
    )
    adapted = [f"transformer.h.{i}.{layer}" for i in range(2) for layer in LAYERS[targets]]
    assert lora.trained_weights(model).keys() == {f"{name}.lora_{ab}" for name in adapted for ab in "AB"}
    for name in adapted:
        a, b = (getattr(model.get_submodule(name), f"lora_{ab}") for ab in "AB")
        by_hand.get_submodule(name).weight.data += 6.0 / 3 * torch.einsum("or,ri->oi", b, a)
    expected, unmerged = all_logits(by_hand, idx), all_logits(model, idx)
    assert (all_logits(random_model(**settings), idx) - expected).abs().max() > 0.1  # else the test sees nothing
    torch.testing.assert_close(unmerged, expected, rtol=0, atol=1e-5)
    lora.merge_adapter(model)
    torch.testing.assert_close(all_logits(model, idx), unmerged, rtol=0, atol=1e-5)
    assert {name: type(m) for name, m in model.named_modules()} == {
        name: type(m) for name, m in by_hand.named_modules()
    }
    assert model.state_dict().keys() == by_hand.state_dict().keys() and model.use_packed_weights


@smoke
def test_a_new_adapter_changes_nothing_and_is_all_that_the_optimizer_holds():
    model, idx = random_model(), random_ids(2, 8)
    before, frozen = all_logits(model, idx), {name: w.clone() for name, w in model.state_dict().items()}
    lora.add_adapter(model, lora.target_ranks(model, "attn", 4), INFO)
    assert torch.equal(all_logits(model, idx), before)
    optimizer = make_optimizer(model, OptimConfig(learning_rate=0.1), "cpu")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for name, p in model.named_parameters() if ".lora_" in name}
    for _ in range(2):
        model(idx, idx)[1].backward()
        assert all((p.grad is not None) == (".lora_" in name) for name, p in model.named_parameters())
        optimizer.step()
    assert not torch.equal(all_logits(model, idx), before)
    assert_same({name: w for name, w in model.state_dict().items() if name in frozen}, frozen)


@smoke
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_rows_of_new_tokens_are_trained_and_all_others_are_not(tie):
    model, by_hand, idx = (
        add_random_adapter(random_model(tie_weights=tie), n_new_ids=2),
        random_model(tie_weights=tie),
        random_ids(2, 8),
    )
    idx[0, :2] = torch.tensor([21, 22])
    rows = [
        lora.trained_weights(model)[name] for name in ["transformer.wte.new_rows"] + ["lm_head.new_rows"] * (not tie)
    ]
    for module, new in zip((by_hand.transformer.wte, by_hand.lm_head), rows):
        module.weight.data[21:] = new
    for name, layer in lora.linear_layers(by_hand).items():
        other = model.get_submodule(name)
        layer.weight.data += 2.0 * other.lora_B @ other.lora_A
    torch.testing.assert_close(all_logits(model, idx), all_logits(by_hand, idx), rtol=0, atol=1e-5)
    by_hand.requires_grad_(True)
    model(idx, idx)[1].backward()
    by_hand(idx, idx)[1].backward()
    torch.testing.assert_close(
        model.transformer.wte.new_rows.grad, by_hand.transformer.wte.weight.grad[21:], rtol=0, atol=1e-5
    )
    assert model.transformer.wte.weight.grad is None and model.lm_head.weight.grad is None
    lora.merge_adapter(model)
    torch.testing.assert_close(all_logits(model, idx), all_logits(by_hand, idx), rtol=0, atol=1e-5)
    assert (model.transformer.wte.weight is model.lm_head.weight) == tie


@smoke
def test_the_hash_of_weights_does_not_depend_on_their_file_but_on_every_value():
    model = random_model()
    model.adapter = None
    before = checkpoints.source_sha256(model, {})
    assert checkpoints.source_sha256(random_model(), {}) == before != checkpoints.source_sha256(random_model(1), {})
    model.transformer.h[1].ln_1.bias.data[3] += 1e-6
    assert checkpoints.source_sha256(model, {}) != before


# ----------------------------------------------------------------------------------------------------------------------
# runs


@smoke
def test_a_checkpoint_holds_the_adapter_and_the_place_of_its_base(adapter_run, tiny_run):
    checkpoint, base = load(adapter_run), load(tiny_run)
    names = [f"transformer.h.{i}.{layer}.lora_{ab}" for i in range(2) for layer in LAYERS["all"] for ab in "AB"]
    assert sorted(checkpoint["model"]) == sorted(names) and len(checkpoint["optimizer"]["state"]) == len(names)
    assert checkpoint["lora"].keys() == {"alpha", "base", "sha256"} and checkpoint["lora"]["base"] == tiny_run
    assert checkpoint["lora"]["alpha"] == 8.0 and checkpoint["model_args"] == base["model_args"]
    assert all(w.abs().max() > 0 for w in checkpoint["model"].values())  # all were trained


def test_a_run_that_is_resumed_ends_like_one_that_was_not(adapter_run, tiny_run, tiny_data):
    fine_tune(tiny_run, "halves", tiny_data, "--max_iters=3")
    before = snapshot(tiny_run)
    assert train.main(["--init_from=resume", "--out_dir=halves", "--max_iters=6"]) == 0
    assert_same_training("halves", adapter_run)
    assert snapshot(tiny_run) == before


def test_two_processes_train_the_same_adapter(adapter_run, tiny_run, tiny_data, tmp_path):
    args = [f"--data_dir={tiny_data}", f"--init_from={tiny_run}", "--out_dir=ranks", *RUN, *LORA]
    run_ranks("train.py", *args, cwd=tmp_path)
    one, two = load(adapter_run)["model"], load("ranks")["model"]
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5)


@smoke
def test_every_program_takes_an_adapter_like_a_model(adapter_run, tiny_run, tiny_data, capsys):
    model, tokenizer = load_model(adapter_run)
    base, _ = load_model(tiny_run)
    tensors, idx = load(adapter_run, "ckpt.pt")["model"], random_ids(2, 16)
    for name, layer in lora.linear_layers(base).items():
        layer.weight.data += 2.0 * tensors[f"{name}.lora_B"] @ tensors[f"{name}.lora_A"]
    torch.testing.assert_close(all_logits(model, idx), all_logits(base, idx), rtol=0, atol=1e-5)
    (result,) = json.loads(printed(evaluate.main, adapter_run, "--json"))
    assert train.main([f"--data_dir={tiny_data}", f"--init_from={adapter_run}", *RUN, "--eval_only"]) == 0
    assert printed(sample.main, f"--out_dir={adapter_run}", "--prompt=the", "--num_samples=1", "--max_new_tokens=9")
    assert dongpt.load(adapter_run).generate("the", 9, seed=1337) and tokenizer
    printed(ckpt_update.main, adapter_run, "merged.pt", "--to=merged")
    (merged,) = json.loads(printed(evaluate.main, "merged.pt", "--json"))
    assert abs(merged["loss"] - result["loss"]) < 1e-6
    assert "lora" not in load(".", "merged.pt") and "lora_rank" not in load(".", "merged.pt")["config"]


def test_samples_during_training_come_from_the_adapted_model(packed_models, tiny_data):
    model = add_random_adapter(random_model(vocab_size=61, block_size=32))
    model.adapter = None
    other = random_model(vocab_size=61, block_size=32)
    tensors = dict(model.named_parameters())
    for name, layer in lora.linear_layers(other).items():
        layer.weight.data += 2.0 * tensors[f"{name}.lora_B"].detach() @ tensors[f"{name}.lora_A"].detach()
    idx = random_ids(1, 4)
    assert torch.equal(model.generate(idx, 20, temperature=0), other.generate(idx, 20, temperature=0))
    assert model not in packed_models and other in packed_models


def test_an_adapter_of_an_adapter(adapter_run, tiny_data):
    fine_tune(adapter_run, "second", tiny_data)
    assert load("second")["lora"]["base"] == adapter_run
    losses = json.loads(printed(evaluate.main, adapter_run, "second", "--json"))
    assert losses[0]["loss"] != losses[1]["loss"]


def test_an_adapter_with_new_special_tokens_and_shorter_windows(tiny_run, tiny_data):
    meta = read_meta(tiny_data)
    tokenizer = from_dict({**meta["tokenizer"], "special": ["<|user|>", "<|end|>"]})
    text = "the knight rode to La Mancha\n" * 60
    write_splits("data", tokenizer, {"train": text, "val": text})
    ids = torch.frombuffer(bytearray(open("data/train.bin", "rb").read()), dtype=torch.int16)
    ids[::7] = tokenizer.vocab_size - 1
    with open("data/train.bin", "wb") as file:
        file.write(ids.numpy().tobytes())
    for out_dir, iters in (("whole", 6), ("halves", 3)):
        fine_tune(tiny_run, out_dir, "data", f"--max_iters={iters}", "--block_size=8")
    assert train.main(["--init_from=resume", "--out_dir=halves", "--max_iters=6"]) == 0
    assert_same_training("whole", "halves")
    n_old = meta["vocab_size"]
    checkpoint, (model, _) = load("whole", "ckpt.pt"), load_model("whole")
    assert checkpoint["lora"]["first_new_id"] == n_old and checkpoint["model_args"]["vocab_size"] == n_old + 2
    rows, base = checkpoint["model"]["transformer.wte.new_rows"], load_model(tiny_run)[0]
    assert torch.equal(model.transformer.wte.weight[n_old:], rows) and model.config.block_size == 8
    assert torch.equal(model.transformer.wte.weight[:n_old], base.transformer.wte.weight)
    assert model.lm_head.weight is model.transformer.wte.weight
    printed(ckpt_update.main, "whole", "peft", "--to=peft")
    torch.testing.assert_close(load_model("peft")[0].lm_head.weight, model.lm_head.weight, rtol=0, atol=0)


@pytest.mark.compile
def test_a_compiled_run_trains_the_same_adapter(adapter_run, tiny_run, tiny_data):
    fine_tune(tiny_run, "compiled", tiny_data, "--compile=True", "--lora_dropout=0", "--dropout=0")
    fine_tune(tiny_run, "plain", tiny_data, "--lora_dropout=0", "--dropout=0")
    for name, weight in load("plain")["model"].items():
        torch.testing.assert_close(load("compiled")["model"][name], weight, rtol=0, atol=1e-4)


def test_checkpoint_and_optimizer_state_are_below_two_percent_for_gpt2():
    model = build_meta_model(GPTConfig(vocab_size=50257))
    n_all = sum(p.numel() for p in model.parameters())
    lora.add_adapter(model, lora.target_ranks(model, "all", 8), INFO)
    assert sum(w.numel() for w in lora.trained_weights(model).values()) < 0.02 * n_all


# ----------------------------------------------------------------------------------------------------------------------
# the base


@smoke
def test_a_base_that_has_moved_or_changed(adapter_run, tiny_run, tiny_data):
    shutil.copytree(tiny_run, "base")
    fine_tune("base", "out", tiny_data)
    os.rename("base", "moved")
    sentence = refusal(lambda: load_model("out"), "out/ckpt.pt is a LoRA adapter for", "does not exist", "--base=PATH")
    assert os.path.abspath("base") in sentence
    shutil.copytree("out", "base")
    refusal(lambda: load_model("base"), "base/ckpt.pt is a LoRA adapter for", "has replaced it there", "--base=PATH")
    shutil.rmtree("base")
    expected = all_logits(load_model(adapter_run)[0], random_ids(2, 16))
    assert torch.equal(all_logits(load_model("out", base="moved")[0], random_ids(2, 16)), expected)
    assert json.loads(printed(evaluate.main, "out", "--base=moved/ckpt.pt", "--json"))
    assert (
        train.main(["--init_from=resume", "--out_dir=out", "--base=moved", "--max_iters=7", "--lr_decay_iters=7"]) == 0
    )
    assert load("out")["lora"]["base"] == os.path.abspath("moved") and load_model("out")
    checkpoint = load("moved", "ckpt.pt")
    checkpoint["model"]["transformer.ln_f.weight"][0] += 1e-3
    torch.save(checkpoint, "moved/ckpt.pt")
    refusal(lambda: load_model("out"), "for other weights than those of", os.path.abspath("moved"), "--base=PATH")
    refusal(lambda: load_model(tiny_run, base="moved"), "--base=moved is for LoRA adapters", "remove --base")
    refusal(lambda: load_model("out", base="out/ckpt.pt"), "has replaced it there")


@smoke
@pytest.mark.parametrize(
    "n_layer, n_embd, problem", [(1, 16, "unexpected"), (3, 16, "missing"), (2, 32, "of another size")]
)
def test_every_layer_of_an_adapter_must_fit_the_base(n_layer, n_embd, problem):
    tensors = lora.trained_weights(add_random_adapter(random_model()))
    checkpoint = {"model": tensors, "lora": dict(INFO)}
    base = random_model(n_layer=n_layer, n_embd=n_embd)
    refusal(
        lambda: adapters.load_adapter(base, checkpoint, "a.pt"),
        "a.pt is not a LoRA adapter for base",
        problem,
        "--base=PATH",
    )


@smoke
@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("transformer.h.1.mlp.c_fc.lora_B"),
        lambda tensors: tensors.update({"lm_head.lora_A": torch.zeros(3, 16), "lm_head.lora_B": torch.zeros(23, 3)}),
        lambda tensors: tensors.update({"transformer.wte.lora_A": torch.zeros(3, 23)}),
        lambda tensors: tensors.update({"transformer.wte.new_rows": torch.zeros(99, 16)}),
        lambda tensors: tensors.update({"transformer.h.0.mlp.c_fc.lora_A": torch.zeros(3, 16, dtype=torch.int32)}),
        lambda tensors: tensors.update({"transformer.h.0.mlp.c_fc.lora_A": torch.zeros(())}),
        lambda tensors: tensors.clear(),
    ],
)
def test_a_damaged_or_surplus_layer_is_refused(change):
    tensors = lora.trained_weights(add_random_adapter(random_model()))
    change(tensors)
    checkpoint = {"model": tensors, "lora": dict(INFO)}
    refusal(lambda: adapters.load_adapter(random_model(), checkpoint, "a.pt"), "a.pt is not a LoRA adapter for base")


@smoke
@pytest.mark.parametrize(
    "info",
    [
        {"alpha": "8"}, {"alpha": 0.0}, {"alpha": float("nan")}, {"base": 3}, {"first_new_id": -1}, {"blocks": ["0"]},
        {"sha256": None}, {"first_new_id": 2**40},
    ],
)  # fmt: skip
def test_a_damaged_description_is_refused(adapter_run, info):
    checkpoint = load(adapter_run, "ckpt.pt")
    checkpoint["lora"] |= info
    torch.save(checkpoint, "bad.pt")
    refusal(lambda: load_model("bad.pt"), "bad.pt is damaged", "use another file")


# ----------------------------------------------------------------------------------------------------------------------
# settings


@smoke
@pytest.mark.parametrize(
    "args, parts",
    [
        (["--lora_alpha=8"], ["lora_alpha=8.0 has no effect without LoRA: set lora_rank"]),
        (["--lora_targets=all", "--lora_dropout=0.1"], ["lora_dropout=0.1, lora_targets=all has no effect"]),
        (["--lora_rank=8", "--init_from=scratch"], ["lora_rank=8 needs the weights of a model: set init_from"]),
        (["--lora_rank=8", "--optimizer=muon"], ["lora_rank=8 works with optimizer=adamw, not with muon"]),
        (["--lora_rank=-1"], ["lora_rank=-1 must be at least 0"]),
        (["--lora_rank=8", "--lora_alpha=0"], ["lora_alpha=0.0 must be above 0"]),
        (["--lora_rank=8", "--freeze_wte=3"], ["not with freeze_wte=3"]),
        (["--base=x"], ["--base=x is for LoRA adapters"]),
        (["--base=x", "--init_from=scratch"], ["base=x needs the weights of a model"]),
    ],
)
def test_settings_that_do_not_fit_are_refused(args, parts, tiny_run, tiny_data):
    command = [f"--data_dir={tiny_data}", f"--init_from={tiny_run}", *RUN, *args]
    refusal(lambda: train.main(command), *parts)
    assert visible(".") == []


@smoke
@pytest.mark.parametrize("base", ["out", "out/ckpt.pt", "out/ckpt_last.pt"])
def test_an_adapter_does_not_replace_its_base(base, tiny_run, tiny_data):
    shutil.copytree(tiny_run, "out")
    before = snapshot("out")
    refusal(lambda: fine_tune(base, "out", tiny_data), f"out holds {base}, which the adapter needs: choose another")
    assert snapshot("out") == before


@smoke
def test_a_bigram_has_no_layers_to_adapt():
    refusal(lambda: lora.target_ranks(build_model(GPTConfig(model_type="bigram", vocab_size=5)), "all", 8), "bigram")


@smoke
def test_a_resumed_run_keeps_its_adapter(adapter_run, tiny_run):
    for out_dir, setting, stored in (
        (adapter_run, "lora_rank=8", 4),
        (adapter_run, "lora_targets=attn", "all"),
        (tiny_run, "lora_rank=4", 0),
    ):
        shutil.copytree(out_dir, "out")
        command = ["--init_from=resume", "--out_dir=out", f"--{setting}", "--max_iters=9"]
        refusal(lambda: train.main(command), f"{setting} contradicts out/ckpt", f"has {stored}", "in another out_dir")
        shutil.rmtree("out")


# ----------------------------------------------------------------------------------------------------------------------
# ckpt_update.py and PEFT


@smoke
def test_a_whole_model_is_neither_merged_nor_an_adapter(tiny_run):
    for to in ("merged", "peft"):
        refusal(lambda: ckpt_update.main([tiny_run, "new", f"--to={to}"]), f"--to={to} is for LoRA adapters", "remove")
    assert visible(".") == []


def test_an_adapter_survives_peft_format_bitwise(adapter_run, tmp_path):
    assert "LoRA adapter for" in printed(ckpt_update.main, adapter_run, "peft", "--to=peft")
    printed(ckpt_update.main, "peft", "again.pt")
    one, other = load(adapter_run, "ckpt.pt"), load(".", "again.pt")
    assert_same(other["model"], one["model"])
    assert_same(other["lora"], one["lora"])
    assert one["tokenizer"] == other["tokenizer"]
    expected = all_logits(load_model(adapter_run)[0], random_ids(2, 16))
    for path in ("peft", "again.pt"):
        assert torch.equal(all_logits(load_model(path)[0], random_ids(2, 16)), expected)
    printed(ckpt_update.main, adapter_run, "peft", "--to=peft")  # the same command may write it again
    with open("peft/notes.txt", "w", encoding="utf-8") as file:
        file.write("mine")
    refusal(
        lambda: ckpt_update.main([adapter_run, "peft", "--to=peft"]), "peft exists and was not written by this command"
    )
    assert visible(".") == ["again.pt", "peft"]


@smoke
@pytest.mark.parametrize("to", ["dongpt", "merged", "peft"])
def test_a_full_disk_leaves_nothing(adapter_run, monkeypatch, to):
    import safetensors.torch

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def fail_in_safetensors(*args, **kwargs):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(torch, "save", fail)
    monkeypatch.setattr(safetensors.torch, "save_file", fail_in_safetensors)
    command = [adapter_run, "new", f"--to={to}"]
    refusal(lambda: ckpt_update.main(command), "new could not be written", "No space left", "free some disk space")
    assert visible(".") == []


def test_a_run_that_is_killed_while_it_saves_keeps_the_older_adapter(tiny_run, tiny_data, monkeypatch):
    fine_tune(tiny_run, "out", tiny_data, "--max_iters=3")
    before, write = load("out"), torch.save

    def stop_halfway(content, file):
        file.write(b"PK half of a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", stop_halfway)
    with pytest.raises(KeyboardInterrupt):
        train.main(["--init_from=resume", "--out_dir=out", "--max_iters=6"])
    monkeypatch.setattr(torch, "save", write)
    assert_same(load("out"), before)
    assert load_model("out")


@smoke
@pytest.mark.parametrize("setting", [{"pos_embd": "rope"}, {"ngrams": 2}])
def test_peft_has_only_gpt2s_architecture(setting):
    checkpoint = {"model": lora.trained_weights(add_random_adapter(random_model(**setting))), "lora": INFO}
    refusal(lambda: adapters.save(random_model(**setting), checkpoint, "new"), "use --to=merged instead of --to=peft")


def write_peft(directory: str, tensors: dict, **config) -> str:
    """Write a PEFT directory by hand."""
    from safetensors.torch import save_file

    os.makedirs(directory)
    save_file(
        {f"base_model.model.{k}": w.contiguous() for k, w in tensors.items()}, f"{directory}/adapter_model.safetensors"
    )
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "base.pt",
        "r": 3,
        "lora_alpha": 6,
        "bias": "none",
        **config,
    }
    with open(f"{directory}/adapter_config.json", "w", encoding="utf-8") as file:
        json.dump(config, file)
    return directory


def save_base(model: GPT, path: str = "base.pt"):
    checkpoint = {"model": model.state_dict(), "model_args": checkpoints.model_args(model.config), "format_version": 1}
    checkpoints.save({**checkpoint, "tokenizer": {"kind": "char", "characters": "abcdefghijklmnopqrstuvw"}}, path)


def hand_written(layers, rank: int = 3) -> dict:
    """Tensors of an adapter of random_model, in PEFT's names."""
    sizes = {"attn.c_attn": (48, 16), "attn.c_proj": (16, 16), "mlp.c_fc": (64, 16), "mlp.c_proj": (16, 64)}
    generator, tensors = torch.Generator().manual_seed(2), {}
    for name in layers:
        out, in_ = sizes[name.split(".", 3)[3]]
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, in_, generator=generator) * 0.3
        tensors[f"{name}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.3
    return tensors


@smoke
@pytest.mark.parametrize(
    "layers, config, scale",
    [
        (["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"], {}, 2.0),
        (["transformer.h.1.mlp.c_fc"], {"layers_to_transform": 1}, 2.0),
        (["transformer.h.0.mlp.c_fc"], {"layers_to_transform": 0}, 2.0),
        (["transformer.h.0.attn.c_proj"], {"layers_to_transform": [0], "use_rslora": True}, 6 / 3**0.5),
    ],
)
def test_a_directory_written_by_hand_is_merged_by_hand(layers, config, scale):
    model, tensors = random_model(), hand_written(layers)
    save_base(model)
    write_peft("adapter", tensors, **config)
    for name in layers:
        update = scale * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        model.get_submodule(name).weight.data += update
    loaded, tokenizer = load_model("adapter")
    torch.testing.assert_close(
        all_logits(loaded, random_ids(2, 8)), all_logits(model, random_ids(2, 8)), rtol=0, atol=1e-5
    )
    assert tokenizer.decode([0, 1]) == "ab"
    printed(ckpt_update.main, "adapter", "new.pt")
    assert_same(dict(load_model("new.pt")[0].state_dict()), dict(loaded.state_dict()))


@smoke
@pytest.mark.parametrize(
    "config, part",
    [
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"alpha_pattern": {"c_attn": 3}}, "alpha_pattern="),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"modules_to_save": ["wte"]}, "modules_to_save="),
        ({"lora_alpha": "x"}, "damaged (lora: invalid alpha)"),
        ({"r": None}, "r=None"),
        ({"base_model_name_or_path": None}, "does not name its base: pass the model"),
        ({"base_model_name_or_path": "adapter"}, "has replaced it there"),
        ({"layers_to_transform": [0]}, "transformer.h.1.attn.c_attn.lora_A"),
    ],
)
def test_what_is_not_plain_lora_is_refused(config, part):
    save_base(random_model())
    write_peft("adapter", hand_written([f"transformer.h.{i}.attn.c_attn" for i in range(2)]), **config)
    refusal(lambda: load_model("adapter"), part)


@smoke
def test_a_directory_that_lacks_something_or_holds_too_much():
    name = "transformer.h.0.attn.c_attn"
    write_peft("adapter", hand_written([name]), base_model_name_or_path="my/base")
    refusal(lambda: load_model("adapter"), "adapter is a LoRA adapter for my/base, which does not exist", "--base=PATH")
    refusal(lambda: ckpt_update.main(["adapter", "new.pt"]), "my/base, which does not exist")
    shutil.copy("adapter/adapter_model.safetensors", "adapter/model.safetensors")
    refusal(lambda: load_model("adapter"), "contains a model and a PEFT adapter", "move adapter_* out of the directory")
    os.remove("adapter/model.safetensors")
    os.remove("adapter/adapter_model.safetensors")
    refusal(lambda: load_model("adapter"), "no adapter weights: put adapter_model.safetensors next to")
    assert visible(".") == ["adapter"]


# ----------------------------------------------------------------------------------------------------------------------
# next to PEFT


@pytest.fixture(scope="module")
def peft():
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    pytest.importorskip("transformers")
    return pytest.importorskip("peft")


def their_base(directory: str = "hf"):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=16, vocab_size=23, initializer_range=0.2)
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(directory)
    return GPT2LMHeadModel.from_pretrained(directory).eval()


def their_logits(model, idx):
    with torch.no_grad():
        return model.eval()(idx).logits


@pytest.mark.parametrize("modules", [["c_attn"], ["c_attn", "c_proj", "c_fc"]])
@pytest.mark.parametrize(
    "settings", [{}, {"rank_pattern": {"c_attn": 2}}, {"use_rslora": True}, {"layers_to_transform": [1]}]
)
def test_pefts_logits_are_ours(peft, modules, settings):
    config = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=modules, fan_in_fan_out=True, task_type="CAUSAL_LM", **settings
    )
    theirs, idx = peft.get_peft_model(their_base(), config), random_ids(2, 16)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.3)
    theirs.save_pretrained("adapter")
    ours = load_model("adapter", base="hf")[0]
    torch.testing.assert_close(all_logits(ours, idx), their_logits(theirs, idx), rtol=0, atol=1e-5)
    printed(ckpt_update.main, "adapter", "again", "--to=peft", "--base=hf") if "use_rslora" not in settings else None
    if os.path.exists("again"):
        again = peft.PeftModel.from_pretrained(their_base(), "again")
        torch.testing.assert_close(their_logits(again, idx), their_logits(theirs, idx), rtol=0, atol=1e-5)


def test_peft_loads_an_adapter_with_new_tokens(peft, tiny_data):
    from transformers import GPT2LMHeadModel

    tokenizer = from_dict({"kind": "char", "characters": "abcdefghijklmnopqrstuvw", "special": ["<|user|>", "<|end|>"]})
    their_base()
    printed(ckpt_update.main, "hf", "base.pt")
    checkpoint = {**load(".", "base.pt"), "tokenizer": {"kind": "char", "characters": "abcdefghijklmnopqrstuvw"}}
    torch.save(checkpoint, "base.pt")
    text = "the quick fast brunch of a lama\n".replace("\n", "").replace(" ", "") * 40
    write_splits("data", tokenizer, {"train": text, "val": text})
    fine_tune("base.pt", "out", "data")
    printed(ckpt_update.main, "out", "adapter", "--to=peft")
    theirs, (ours, _), idx = their_base(), load_model("out"), random_ids(2, 16, vocab_size=25)
    theirs.resize_token_embeddings(25, mean_resizing=False)
    theirs = peft.PeftModel.from_pretrained(theirs, "adapter")
    torch.testing.assert_close(their_logits(theirs, idx), all_logits(ours, idx), rtol=0, atol=1e-5)
    resized = GPT2LMHeadModel.from_pretrained("hf")
    resized.resize_token_embeddings(25)
    config = peft.LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(resized, config)
    theirs.save_pretrained("resized")
    ours = load_model("resized", base="hf")[0]
    torch.testing.assert_close(all_logits(ours, idx), their_logits(theirs, idx), rtol=0, atol=1e-5)


def test_an_adapter_of_tied_embeddings_is_refused(peft):
    config = peft.LoraConfig(r=3, target_modules=["wte", "c_attn"], task_type="CAUSAL_LM")
    peft.get_peft_model(their_base(), config).save_pretrained("adapter")
    refusal(lambda: load_model("adapter", base="hf"), "not a LoRA adapter", "wte")
