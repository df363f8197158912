"""GPT-2 in Hugging Face's format, special tokens that data declare, baselines and the sizes of other projects."""

import ast
import json
import math
import os
import re
import shutil
import sys

import fork_server
import numpy as np
import pytest
import tiktoken
import torch
from helpers import (
    ROOT,
    RunsACommand,
    assert_same,
    environment,
    expect_sentence,
    generated_text,
    load,
    printed,
    run,
    write_corpus,
)

import ckpt_update
import configurator
import dongpt
import evaluate
import sample
import train
from configurator import UserError
from dongpt.checkpoint import architectures, export, hugging_face
from dongpt.checkpoint import files as checkpoints
from dongpt.checkpoint.files import load_model
from dongpt.checkpoint.legacy import build_model
from dongpt.checkpoint.run import grow_vocabulary
from dongpt.text import tokenizers
from dongpt.text.template import DONGPT_TEMPLATE, Segment, encode
from dongpt.text.tokenizers import (
    END,
    BPETokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    WordTokenizer,
    added_special_tokens,
    from_dict,
    split_words,
)
from dongpt.train.data import Corpus
from model import GPT, GPTConfig
from train import TrainConfig

smoke = pytest.mark.smoke
NOWHERE = "http://127.0.0.1:9"  # a proxy that is not there stands for a network that is not there
OFFLINE = ["--device=cpu", "--compile=False"]
CHARACTERS = "\n .<>abcxy|"  # by code point
SPECIALS = ["<|x|>", "<|y|>"]
pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


def theirs(transformers, folder=None, vocab_size: int = 23, std: float = 0.1, seed: int = 0, **more):
    """A random GPT2LMHeadModel whose weights are large enough that each matters; saved in folder if there is one."""
    torch.manual_seed(seed)
    settings = dict(n_positions=16, n_embd=24, n_layer=3, n_head=4, bos_token_id=None, eos_token_id=None)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=vocab_size, **{**settings, **more})).eval()
    for parameter in model.parameters():
        parameter.data += std * torch.randn_like(parameter)
    if folder:
        model.save_pretrained(folder)
    return model


@torch.no_grad()
def model_logits(model, idx) -> torch.Tensor:
    """Logits (B, T, V) of ours, at every position."""
    return model.eval()(idx, idx)[0]


@torch.no_grad()
def gap(model, other, idx) -> float:
    """The largest difference of logits between ours and one of transformers'."""
    return (model_logits(model, idx) - other(idx).logits).abs().max().item()


def bins(folder, train_ids, val_ids, meta: dict | None = None) -> str:
    """A data folder with these ids, and with meta as its meta.json if there is one; returns its path."""
    os.makedirs(folder, exist_ok=True)
    for split, ids in (("train", train_ids), ("val", val_ids)):
        np.asarray(ids, dtype="<u2").tofile(os.path.join(folder, f"{split}.bin"))
    if meta:
        with open(os.path.join(folder, "meta.json"), "w", encoding="utf-8") as file:
            json.dump(meta, file)
    return str(folder)


def refusal(main, *args: str) -> str:
    """The sentence with which a program's main refuses args; nothing may have been printed as a result."""
    with pytest.raises(ValueError) as caught:
        main(list(args))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def measured(*args: str) -> list[dict]:
    """What evaluate.py --json prints for args."""
    return json.loads(printed(evaluate.main, *args, "--json", "--device=cpu"))


# ----------------------------------------------------------------------------------------------------------------------
# the weights of a folder


@pytest.mark.parametrize(
    "more",
    [
        {},
        dict(activation_function="gelu"),
        dict(tie_word_embeddings=False),
        dict(n_head=1, n_layer=1),
        dict(n_head=24, n_inner=96),
        dict(n_positions=5),
    ],
    ids=str,
)
def test_logits_and_loss_equal_hugging_faces_at_every_length(tmp_path, transformers, more):
    model = theirs(transformers, tmp_path / "hf", **more)
    ours, _ = load_model(str(tmp_path / "hf"))
    assert next(ours.parameters()).dtype == torch.float32 and not ours.training
    for T in {1, 2, ours.config.block_size}:
        assert gap(ours, model, torch.randint(23, (3, T))) < 1e-4
    idx = torch.randint(23, (3, 5))
    with torch.no_grad():
        loss = model(idx, labels=idx).loss  # it shifts the labels itself
        torch.testing.assert_close(ours(idx[:, :-1], idx[:, 1:])[1], loss, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", architectures.TRANSPOSED_WEIGHTS)
def test_a_forgotten_transpose_cannot_go_unseen(tmp_path, transformers, monkeypatch, layer):
    model = theirs(transformers, tmp_path / "hf")
    monkeypatch.setattr(
        architectures, "TRANSPOSED_WEIGHTS", tuple(name for name in architectures.TRANSPOSED_WEIGHTS if name != layer)
    )
    if layer == "attn.c_proj.weight":  # square: no shape tells
        assert gap(load_model(str(tmp_path / "hf"))[0], model, torch.randint(23, (2, 16))) > 0.1
    else:
        with pytest.raises(UserError, match=re.escape(layer)):
            load_model(str(tmp_path / "hf"))


def test_the_four_transposed_matrices_are_those_of_conv1d(transformers):
    names = {
        name for name, module in theirs(transformers, n_layer=1).named_modules() if type(module).__name__ == "Conv1D"
    }
    assert {f"transformer.h.0.{name.removesuffix('.weight')}" for name in architectures.TRANSPOSED_WEIGHTS} == names


def test_an_initial_model_of_transformers_gives_its_logits_too(tmp_path, transformers):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=97, n_positions=32, n_embd=48, n_layer=3, n_head=4)
    model = transformers.GPT2LMHeadModel(config).eval()  # as the issue says it: randomly initialised
    model.save_pretrained(tmp_path / "hf")
    ours, idx = load_model(str(tmp_path / "hf"))[0], torch.randint(97, (2, 32))
    assert gap(ours, model, idx) < 1e-4 < model_logits(ours, idx).abs().max()


def test_safetensors_go_before_a_pickle_beside_them(tmp_path, transformers):
    model = theirs(transformers, tmp_path / "hf")
    torch.save(theirs(transformers, seed=1).state_dict(), tmp_path / "hf" / "pytorch_model.bin")
    assert gap(load_model(str(tmp_path / "hf"))[0], model, torch.randint(23, (2, 16))) < 1e-4


def test_the_layout_of_openais_own_file_is_read(tmp_path, transformers):
    from safetensors.torch import save_file

    model = theirs(transformers, tmp_path / "hf")
    weights = {
        name.removeprefix("transformer."): weight.contiguous()
        for name, weight in model.state_dict().items()
        if name != "lm_head.weight"
    }  # no prefix, no head, and a mask in each layer
    weights |= {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(3)}
    save_file(weights, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    assert gap(load_model(str(tmp_path / "hf"))[0], model, torch.randint(23, (2, 16))) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_weights_in_several_files_and_in_half_precision_become_float32(tmp_path, transformers, dtype, ending):
    model = theirs(transformers).to(dtype)
    model.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    if ending == ".bin":
        as_pickles(tmp_path / "hf")
    assert len([name for name in os.listdir(tmp_path / "hf") if name.endswith(ending)]) > 1
    ours, _ = load_model(str(tmp_path / "hf"))
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert gap(ours, model.float(), torch.randint(23, (2, 16))) < 1e-4


def as_pickles(directory):
    """Replace the safetensors files of a directory by pytorch_model.bin, or by shards of it with their index."""
    from safetensors.torch import load_file

    for name in [name for name in os.listdir(directory) if name.endswith(".safetensors")]:
        new = name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        torch.save(load_file(directory / name), directory / new)
        (directory / name).unlink()
    index = directory / "model.safetensors.index.json"
    if index.exists():
        text = index.read_text().replace('"model-', '"pytorch_model-').replace(".safetensors", ".bin")
        (directory / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()


@pytest.mark.parametrize("change", ["embedding only as the head", "another head", "no head of its own"])
def test_heads_are_tied_as_transformers_ties_them(tmp_path, transformers, change):
    from safetensors.torch import load_file, save_file

    theirs(transformers, tmp_path / "hf", tie_word_embeddings=change != "no head of its own")
    path = tmp_path / "hf" / "model.safetensors"
    weights = load_file(path)
    if change == "embedding only as the head":
        weights["lm_head.weight"] = weights.pop("transformer.wte.weight")
    elif change == "another head":  # config.json says that they are the same
        weights["lm_head.weight"] = torch.randn(23, 24)
    else:
        del weights["lm_head.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    if change == "no head of its own":
        with pytest.raises(UserError, match="missing: lm_head.weight"):
            load_model(str(tmp_path / "hf"))
        return
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    ours = load_model(str(tmp_path / "hf"))[0]
    assert gap(ours, model, torch.randint(23, (2, 16))) < 1e-4
    assert ours.config.tie_weights == (change != "another head")


def edited(path, edit):
    """Rewrite a JSON file with its content after edit."""
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    "change, part",
    [
        ({"n_layer": 4}, "missing: transformer.h.3.attn.c_attn.bias"),
        ({"n_layer": 2}, "unexpected: transformer.h.2."),
        ({"n_layer": 10**12}, "n_layer=1000000000000"),
        ({"n_embd": 48}, "transformer.wte.weight: copying a param with shape torch.Size([23, 24]) from checkpoint"),
        ({"n_head": "4"}, "n_head"),
        ({"n_head": 5}, "n_head=5"),
        ({"vocab_size": True}, "vocab_size"),
        ({"n_positions": -1}, "block_size=-1"),
        ({"tie_word_embeddings": "yes"}, "tie_weights"),
        ({"activation_function": ["gelu"]}, "activation"),
        ({"n_inner": "96"}, "n_inner"),
        ({"model_type": "llama"}, "'llama'"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_the_weights_is_refused_by_name(tmp_path, transformers, change, part):
    theirs(transformers, tmp_path / "hf")
    edited(tmp_path / "hf" / "config.json", lambda config: config.update(change))
    with pytest.raises(UserError) as caught:
        load_model(str(tmp_path / "hf"))
    assert part in str(caught.value) and "hf" in str(caught.value) and "\n" not in str(caught.value)


@smoke
@pytest.mark.parametrize(
    "files",
    [
        {"config.json": "[1]"},
        {"config.json": "{"},
        {"config.json": "[" * 100_000},
        {"config.json": "{}"},
        {"config.json": "{}", "model.safetensors": "no weights"},
        {"config.json": "{}", "pytorch_model.bin": "no weights"},
        {"config.json": "{}", "model.safetensors.index.json": '{"weight_map": {"a": "../weights.safetensors"}}'},
        {"config.json": "{}", "model.safetensors.index.json": '{"weight_map": {"a": "missing.safetensors"}}'},
        {"config.json": "{}", "model.safetensors.index.json": '{"weight_map": [1]}'},
        {"config.json": "{}", "model.safetensors.index.json": '{"weight_map": {"a": 5}}'},
    ],
    ids=lambda files: " ".join(files)[:60],
)
def test_a_damaged_directory_gives_a_sentence(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_model(str(tmp_path))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["n_positions", "n_layer", "n_embd", "vocab_size"])
def test_a_size_missing_in_config_json_is_that_of_the_weights(tmp_path, transformers, missing):
    model = theirs(transformers, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    del config[missing]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    assert gap(load_model(str(tmp_path / "hf"))[0], model, torch.randint(23, (2, 16))) < 1e-4


@pytest.mark.parametrize(
    "name, unexpected",
    [
        ("GPT2ForSequenceClassification", "score.weight"),
        ("GPT2ForTokenClassification", "classifier.weight"),
        ("GPT2ForQuestionAnswering", "qa_outputs.bias"),
        ("GPT2DoubleHeadsModel", "multiple_choice_head.summary.weight"),
    ],
)
def test_a_model_with_another_head_is_rejected_and_its_weights_are_listed(tmp_path, transformers, name, unexpected):
    config = theirs(transformers).config
    config.pad_token_id = 0
    getattr(transformers, name)(config).save_pretrained(tmp_path / "hf")
    with pytest.raises(UserError, match=rf"{name}.*unexpected: .*{re.escape(unexpected)}"):
        load_model(str(tmp_path / "hf"))


def test_missing_weights_are_listed_by_their_names_in_the_file(tmp_path, transformers):
    from safetensors.torch import save_file

    model = theirs(transformers, tmp_path / "hf", tie_word_embeddings=False)
    weights = {k: w.contiguous() for k, w in model.state_dict().items() if k not in ("lm_head.weight", "ln_f.bias")}
    del weights["transformer.h.1.ln_2.weight"]
    save_file(weights, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="missing: lm_head.weight, transformer.h.1.ln_2.weight"):
        load_model(str(tmp_path / "hf"))


@pytest.mark.parametrize("place", ["none", "added_tokens.json", "tokenizer.json", "vocab.json"])
def test_added_tokens_make_another_tokenizer_than_gpt2s(tmp_path, place):
    names = {i: name for name, i in hugging_face.GPT2_TOKEN_IDS.items()}
    vocabulary = {names.get(i, f"token {i}"): i for i in range(50257)}
    added = {"<|im_start|>": 50257}
    contents = {"vocab.json": vocabulary, "added_tokens.json": {"<|endoftext|>": 50256}}
    contents["tokenizer.json"] = {"added_tokens": [{"id": 50256, "content": "<|endoftext|>"}]}
    if place == "tokenizer.json":
        contents[place]["added_tokens"].append({"id": 50257, "content": "<|im_start|>"})
    elif place != "none":
        contents[place] |= added
    for name, content in contents.items():
        (tmp_path / name).write_text(json.dumps(content))
    contents["vocab.json"] |= {"of another type": [1]}
    (tmp_path / "vocab.json").write_text(json.dumps(contents["vocab.json"]))
    tokenizer = hugging_face._read_tokenizer(str(tmp_path), 50257 + (place != "none"))
    assert tokenizer == ({"kind": "gpt2"} if place == "none" else hugging_face.UNSUPPORTED_TOKENIZER)


def test_an_export_is_compared_with_the_source_too(tmp_path, transformers):
    """The config has two keys for the number of heads: transformers reads one, and donGPT the other."""
    theirs(transformers, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "n_head": 2, "num_attention_heads": 4}))
    for out, *options in (("new.pt",), ("new", "--to=hf")):
        assert "from those of transformers" in refusal(ckpt_update.main, str(tmp_path / "hf"), out, *options)
        assert not os.path.exists(out)


def test_weights_that_are_not_finite_are_refused(tmp_path, transformers):
    model = theirs(transformers)
    model.transformer.wte.weight.data[3] = float("nan")
    model.save_pretrained(tmp_path / "hf")
    checkpoint = hugging_face.load(str(tmp_path / "hf"))
    torch.save({key: checkpoint[key] for key in ("model", "model_args")}, "ckpt.pt")
    for source, *options in ((str(tmp_path / "hf"),), ("ckpt.pt",), ("ckpt.pt", "--to=hf")):
        message = refusal(ckpt_update.main, source, "new.pt", *options)
        assert f"{source} computes logits that are not finite: check its weights" in message
        assert not os.path.exists("new.pt")


# ----------------------------------------------------------------------------------------------------------------------
# ckpt_update.py compares with transformers' own logits


def test_a_head_trained_separately_is_kept_although_the_config_says_tied(tmp_path, transformers):
    from safetensors.torch import save_file

    model = theirs(transformers, tmp_path / "hf")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + torch.randn_like(model.lm_head.weight))
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["tie_word_embeddings"]
    out = printed(ckpt_update.main, str(tmp_path / "hf"), "new.pt")
    assert "same logits as in transformers" in out
    assert gap(load_model("new.pt")[0], model, torch.randint(23, (2, 16))) < 1e-4


@pytest.mark.parametrize("direction", ["from", "to"])
def test_other_logits_than_those_of_transformers_stop_the_conversion(tmp_path, transformers, monkeypatch, direction):
    theirs(transformers, tmp_path / "hf")
    if direction == "to":
        ckpt_update.main([str(tmp_path / "hf"), "new.pt"])
    names = [
        name for name in architectures.TRANSPOSED_WEIGHTS if name != "attn.c_proj.weight"
    ]  # square: no shape tells
    monkeypatch.setattr(architectures, "TRANSPOSED_WEIGHTS", tuple(names))
    source, target = (str(tmp_path / "hf"), "wrong.pt") if direction == "from" else ("new.pt", "wrong")
    args = [] if direction == "from" else ["--to=hf"]
    assert "from those of transformers" in refusal(ckpt_update.main, source, target, *args)
    assert not os.path.exists(target)


def test_without_transformers_the_conversion_says_that_it_did_not_compare(tmp_path, transformers, monkeypatch):
    theirs(transformers, tmp_path / "hf")
    monkeypatch.setitem(sys.modules, "transformers", None)
    note = "not compared with transformers, which is not installed"
    assert note in printed(ckpt_update.main, str(tmp_path / "hf"), "new.pt")
    assert note in printed(ckpt_update.main, "new.pt", "back", "--to=hf")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", ""])
def test_a_model_of_which_transformers_does_not_find_all_weights_is_not_compared(tmp_path, transformers, prefix):
    from safetensors.torch import save_file

    model = theirs(transformers, tmp_path / "hf")
    weights = {prefix + name: weight.clone() for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    if not prefix:
        del config["n_layer"]  # transformers creates 12
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    out = printed(ckpt_update.main, str(tmp_path / "hf"), "new.pt")
    count = len(model.state_dict()) if prefix else 9 * sum(".h.0." in name for name in weights)
    assert f"not compared with transformers, which did not find {count} weights in {tmp_path / 'hf'}" in out
    assert gap(load_model("new.pt")[0], model, torch.randint(23, (2, 16))) < 1e-4


def test_a_directory_is_read_and_written_without_transformers(tmp_path, transformers):
    theirs(transformers, tmp_path / "hf")
    code = f"""import sys; sys.path.insert(0, {ROOT!r}); sys.modules["transformers"] = None
from dongpt.checkpoint import export, load_model
from dongpt.text.tokenizers import CharTokenizer
model, _ = load_model("hf")
export.save(model, CharTokenizer("abcdefghijklmnopqrstuvw").to_dict(), "again")
assert load_model("again")[1].decode([0, 1]) == "ab"
"""
    fork_server.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_a_hugging_face_folder_is_what_load_model_takes_too(tmp_path, transformers, gpt2_vocabulary):
    theirs(transformers, vocab_size=50257).save_pretrained(tmp_path / "gpt2")
    model, tokenizer = load_model(str(tmp_path / "gpt2"))
    assert not model.training and tokenizer.to_dict()["kind"] == "gpt2"
    theirs(transformers).save_pretrained(tmp_path / "other")
    assert load_model(str(tmp_path / "other"))[1] is None  # its vocabulary is not GPT-2's


def test_an_untrained_activation_is_refused_by_name(tmp_path, transformers):
    theirs(transformers, activation_function="relu").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="relu"):
        hugging_face.load(str(tmp_path))


@pytest.mark.parametrize(
    "more",
    [
        dict(n_inner=50),
        dict(scale_attn_weights=False),
        dict(scale_attn_by_inverse_layer_idx=True),
        dict(layer_norm_epsilon=1e-2),
    ],
)
def test_a_hugging_face_model_of_other_mathematics_is_refused(tmp_path, transformers, more):
    theirs(transformers, **more).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=next(iter(more))):
        hugging_face.load(str(tmp_path))


def test_a_hugging_face_folder_without_weights_gives_a_sentence(tmp_path, transformers):
    theirs(transformers).config.save_pretrained(tmp_path)
    with pytest.raises(ValueError) as caught:
        load_model(str(tmp_path))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_malicious_hugging_face_folder_is_refused_and_not_run(tmp_path, transformers):
    theirs(transformers).config.save_pretrained(tmp_path)
    torch.save({"lm_head.weight": RunsACommand(tmp_path / "marker")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError):
        load_model(str(tmp_path))
    assert not (tmp_path / "marker").exists()


def test_code_in_a_hugging_face_folder_is_not_run(tmp_path, transformers):
    theirs(transformers).save_pretrained(tmp_path)
    (tmp_path / "modeling.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    config = (tmp_path / "config.json").read_text(encoding="utf-8")
    config = config.replace("{", '{"auto_map": {"AutoModelForCausalLM": "modeling.Model"},', 1)
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    hugging_face.load(str(tmp_path))
    assert not (tmp_path / "marker").exists()


# ----------------------------------------------------------------------------------------------------------------------
# fine-tuning: what is taken over, what is refused


def nanogpt_bins(folder, vocab_size: int = 50257, n: int = 400) -> str:
    """Bins without a meta file, which are taken for GPT-2's ids."""
    rng = np.random.default_rng(0)
    return bins(folder, rng.integers(0, vocab_size, n), rng.integers(0, vocab_size, n // 4))


TUNE = [*OFFLINE, "--batch_size=2", "--gradient_accumulation_steps=2", "--eval_iters=2", "--decay_lr=False"]


def test_finetune_don_trains_a_local_folder(tmp_path, transformers):
    before = theirs(transformers, tmp_path / "hf", vocab_size=50257, n_embd=8, n_layer=1, n_head=2)
    ids = np.tile([464, 22844, 13], 300)  # two words and a full stop, over and over
    data = bins(tmp_path / "data", ids, ids[:100])
    out = printed(
        train.main,
        "finetune_don",
        "--init_from=hf",
        f"--data_dir={data}",
        "--out_dir=out",
        *TUNE,
        "--learning_rate=3e-2",
    )
    assert "Initializing from the weights of hf" in out and "cropping" not in out
    steps = re.findall(r"step (\d+): train loss [\d.]+, val loss ([\d.]+)", out)
    assert [int(step) for step, _ in steps] == [0, 5, 10, 15, 20]  # max_iters and eval_interval are the file's
    with torch.no_grad():
        x = torch.tensor(ids[:97].astype(np.int64))
        untrained = before(x[None, :16], labels=x[None, :16]).loss.item()
    assert float(steps[0][1]) == pytest.approx(untrained, abs=0.5) and float(steps[-1][1]) < untrained - 3
    checkpoint = load("out")
    assert checkpoint["iter_num"] == 20 and checkpoint["config"]["learning_rate"] == 3e-2
    args = checkpoint["model_args"]
    assert (args["block_size"], args["vocab_size"], args["bias"], args["activation"]) == (16, 50257, True, "gelu_tanh")
    assert set(checkpoint["model"]) == {name for name in before.state_dict()}
    assert not torch.equal(
        checkpoint["model"]["transformer.h.0.attn.c_proj.weight"],
        before.state_dict()["transformer.h.0.attn.c_proj.weight"].t(),
    )


def test_a_finetuned_folder_has_its_own_logits_at_the_start(tmp_path, transformers):
    model = theirs(transformers, tmp_path / "hf", vocab_size=50257, n_embd=8, n_layer=2, n_head=2, n_positions=8)
    data = nanogpt_bins(tmp_path / "data")
    out = printed(train.main, "--init_from=hf", f"--data_dir={data}", "--eval_only", "--eval_iters=100", *OFFLINE)
    val = torch.from_numpy(np.fromfile(os.path.join(data, "val.bin"), "<u2").astype(np.int64))
    total = 0.0
    for i in range(0, len(val) - 1, 8):
        x, y = val[i : i + 8][: len(val) - 1 - i], val[i + 1 : i + 9]
        with torch.no_grad():
            total += torch.nn.functional.cross_entropy(model(x[None]).logits[0], y, reduction="sum").item()
    loss = total / (len(val) - 1)
    assert f"val loss {loss:.4f}" in out
    assert sorted(os.listdir(tmp_path)) == ["data", "hf"]  # eval_only writes nothing


def test_block_size_is_cropped_aloud(tmp_path, transformers, gpt2_vocabulary):
    model = theirs(transformers, tmp_path / "hf", vocab_size=50257, n_embd=8, n_layer=1, n_head=2)
    (tmp_path / "short.py").write_text("block_size = 6\n", encoding="utf-8")
    for given in ("--block_size=6", "short.py"):  # a file's setting is as good as one typed
        out = printed(
            train.main,
            "--init_from=hf",
            f"--data_dir={nanogpt_bins(tmp_path / 'data')}",
            "--out_dir=out",
            *TUNE,
            "--max_iters=1",
            "--learning_rate=0",
            given,
        )
        assert re.search(r"cropp\w+ block_size from 16 to 6\b", out)
        ours, idx = load_model("out")[0], torch.randint(50257, (2, 6))
        assert ours.config.block_size == 6 and ours.transformer.wpe.weight.shape == (6, 8)
        assert gap(ours, model, idx) < 1e-4
        with pytest.raises(ValueError, match="block_size"):
            ours(torch.zeros(1, 7, dtype=torch.int64))


@pytest.mark.parametrize(
    "given",
    [
        "--block_size=17",
        "--bias=False",
        "--activation=gelu",
        "--n_layer=2",
        "--tie_weights=False",
        "--pos_embd=rope",
        "--vocab_size=50304",
        "--model_type=bigram",
    ],
)
def test_another_architecture_than_the_folders_is_refused(tmp_path, transformers, given):
    theirs(transformers, tmp_path / "hf", vocab_size=50257, n_embd=8, n_layer=1, n_head=2)
    sentence = refusal(train.main, "--init_from=hf", f"--data_dir={nanogpt_bins(tmp_path / 'data')}", *TUNE, given)
    key, value = given[2:].split("=")
    assert key in sentence and value in sentence and "hf" in sentence and "out" not in os.listdir(tmp_path)


def test_out_dir_may_be_the_folder_that_a_run_came_from(tmp_path, transformers, gpt2_vocabulary):
    theirs(transformers, tmp_path / "hf", vocab_size=50257, n_embd=8, n_layer=1, n_head=2)
    printed(
        train.main,
        "--init_from=hf",
        f"--data_dir={nanogpt_bins(tmp_path / 'data')}",
        "--out_dir=hf",
        *TUNE,
        "--max_iters=2",
        "--learning_rate=1e-2",
        "--always_save_checkpoint",
    )
    trained = load("hf", "ckpt.pt")["model"]["lm_head.weight"]
    assert torch.equal(load_model("hf")[0].lm_head.weight, trained)  # an out_dir means its ckpt.pt


def char_folder(folder, characters: str = CHARACTERS, **more) -> GPT:
    """A folder in Hugging Face's format that knows its character tokenizer; returns the model in it."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = dict(block_size=16, n_layer=1, n_head=2, n_embd=16, activation="gelu_tanh")
    model = GPT(GPTConfig(vocab_size=len(characters), **{**settings, **more})).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    export.save(model, CharTokenizer(characters).to_dict(), str(folder))
    return model


@pytest.mark.parametrize("case", ["gpt2 on characters", "characters on gpt2", "other characters", "another order"])
def test_data_of_another_tokenizer_are_refused(tmp_path, transformers, case):
    if case == "gpt2 on characters":
        theirs(transformers, tmp_path / "hf", vocab_size=50257, n_embd=8, n_layer=1, n_head=2)
    else:
        char_folder("hf")
    data = (
        nanogpt_bins("data", vocab_size=9)
        if case == "characters on gpt2"
        else write_corpus("data", (CHARACTERS[::-1][:-1] if case == "other characters" else CHARACTERS) * 40)
    )
    if case == "another order":
        ids = np.arange(200) % len(CHARACTERS)
        description = CharTokenizer(CHARACTERS[::-1]).to_dict()
        data = bins("data", ids, ids, {"tokenizer": description, "vocab_size": len(CHARACTERS)})
    for main, settings in ((train.main, [*TUNE, "--max_iters=1"]), (evaluate.main, ["--device=cpu"])):
        sentence = refusal(main, "--init_from=hf", f"--data_dir={data}", *settings)
        assert "vocabulary" in sentence and "hf" in sentence and "data" in sentence
    assert sorted(os.listdir()) == ["data", "hf"]


def test_data_in_gpt2s_vocabulary_are_refused_where_the_folder_shows_another(tmp_path, transformers):
    theirs(transformers, "hf", vocab_size=50257, n_embd=8, n_layer=1, n_head=2)
    words = {"vocab.json": {f"word{i}": i for i in range(50257)}}  # of the same size, but with other words
    (tmp_path / "hf" / "vocab.json").write_text(json.dumps(words["vocab.json"]), encoding="utf-8")
    sentence = refusal(train.main, "--init_from=hf", f"--data_dir={nanogpt_bins('data')}", "--eval_only", *OFFLINE)
    assert "vocabulary" in sentence


def test_gpt2s_vocabulary_is_known_by_its_file(tmp_path, transformers):
    theirs(transformers, "hf", vocab_size=50300, n_embd=8, n_layer=1, n_head=2)  # padded, or with tokens added
    assert hugging_face.load("hf").get("tokenizer") is None
    words = {"!": 0, "\u0120the": 262, "\u0120gazed": 50255, "<|endoftext|>": 50256}  # some of GPT-2's
    (tmp_path / "hf" / "vocab.json").write_text(json.dumps(words), encoding="utf-8")
    assert hugging_face.load("hf")["tokenizer"]["kind"] == "gpt2"


# ----------------------------------------------------------------------------------------------------------------------
# OpenAI's names


NAMES = {"gpt2": 1, "gpt2-medium": 2, "gpt2-large": 3, "gpt2-xl": 4}  # and how many layers the stand-ins get
PUBLISHED = {
    "": ("3.11", "3.12", 12, 12, 768, 124),
    "_medium": ("2.85", "2.84", 24, 16, 1024, 350),
    "_large": ("2.66", "2.67", 36, 20, 1280, 774),
    "_xl": ("2.56", "2.54", 48, 25, 1600, 1558),
}


def stand_in(transformers, folder, name: str):
    return theirs(transformers, folder, vocab_size=50257, n_embd=4, n_head=2, n_layer=NAMES[name], seed=NAMES[name])


@smoke
@pytest.mark.parametrize("suffix", PUBLISHED)
def test_eval_configs_hold_di725s_settings_and_say_the_published_losses(suffix):
    for name in (f"eval_gpt2{suffix}", f"config/eval_gpt2{suffix}.py"):
        cfg, given = configurator.load(TrainConfig, [name])
        assert given == dict(
            batch_size=8, eval_iters=500, eval_only=True, wandb_log=False, init_from="gpt2" + suffix.replace("_", "-")
        )
        assert cfg.dataset == "openwebtext" and cfg.gradient_accumulation_steps == 40 and cfg.dropout == 0.0
    with open(os.path.join(ROOT, "config", f"eval_gpt2{suffix}.py"), encoding="utf-8") as file:
        text = ast.get_docstring(ast.parse(file.read()))
    train_loss, val_loss, n_layer, n_head, n_embd, millions = PUBLISHED[suffix]
    assert re.search(rf"training loss of {train_loss} and a validation loss of {val_loss}\b", text)
    assert f"{n_layer} layers, {n_head} heads, n_embd {n_embd}, {millions}M" in text
    assert f"python train.py config/eval_gpt2{suffix}.py" in text


@pytest.mark.parametrize("suffix", PUBLISHED)
def test_eval_configs_run_on_the_model_that_they_name(tmp_path, transformers, suffix, gpt2_vocabulary):
    name = "gpt2" + suffix.replace("_", "-")
    stand_in(transformers, tmp_path / name, name)  # a folder of that name in the working directory
    out = printed(train.main, f"eval_gpt2{suffix}", f"--data_dir={nanogpt_bins('data')}", *OFFLINE)
    ours = load_model(name)[0]
    assert f"{ours.get_num_params() / 1e6:.2f}M" in out and ours.config.n_layer == NAMES[name]
    assert re.search(r"step 0: train loss 1\d\.\d{4}, val loss 1\d\.\d{4}", out)  # ln 50257 and a bit
    assert sorted(os.listdir()) == ["data", name]


@smoke
def test_finetune_don_holds_di725s_settings():
    cfg, given = configurator.load(TrainConfig, ["config/finetune_don.py"])
    assert given.pop("wandb_run_name").startswith("ft-")
    assert given == dict(
        out_dir="out-don",
        eval_interval=5,
        eval_iters=40,
        wandb_log=False,
        wandb_project="don",
        dataset="don",
        init_from="gpt2",
        always_save_checkpoint=False,
        batch_size=1,
        gradient_accumulation_steps=32,
        max_iters=20,
        learning_rate=3e-5,
        decay_lr=False,
    )
    assert cfg.dropout == 0.0 and cfg.beta2 == 0.95 and cfg.log_interval == 1 and cfg.block_size == 1024


def test_the_names_are_taken_from_the_hubs_cache_by_every_program(tmp_path, transformers, gpt2_vocabulary):
    for name in NAMES:
        place = tmp_path / "hub" / f"models--{name}"
        stand_in(transformers, place / "snapshots" / "0123abcd", name)
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("0123abcd", encoding="utf-8")
    data = nanogpt_bins(tmp_path / "data")
    code = f"""import sys; sys.path.insert(0, {ROOT!r})
import evaluate, sample, train
sample.main(["--init_from=gpt2", "--start=Sancho<|endoftext|>", "--num_samples=1", "--max_new_tokens=5", *{OFFLINE!r}])
for name in ["gpt2", "gpt2-xl"]:
    train.main(["--init_from=" + name, "--eval_only", "--eval_iters=1000", "--data_dir={data}", *{OFFLINE!r}])
evaluate.main([*{list(NAMES)!r}, "--json", "--data_dir={data}", "--device=cpu"])"""
    done = fork_server.run(
        [sys.executable, "-c", code],
        env=environment(HF_HUB_CACHE=str(tmp_path / "hub")),
        capture_output=True,
        encoding="utf-8",
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("Sancho<|endoftext|>")
    results = json.loads(done.stdout[done.stdout.index("\n[") + 1 :])
    losses = [f"{result['loss']:.4f}" for result in results]
    assert [result["checkpoint"] for result in results] == list(NAMES) and len(set(losses)) == 4
    assert re.findall(r"step 0: train loss [\d.]+, val loss ([\d.]+)", done.stdout) == [losses[0], losses[3]]


def test_without_weights_and_offline_evaluate_says_one_sentence(tmp_path):
    pytest.importorskip("transformers")
    done = run(
        "evaluate.py",
        "--init_from=gpt2-large",
        f"--data_dir={nanogpt_bins('data')}",
        "--device=cpu",
        cwd=tmp_path,
        check=None,
        env={"HF_HOME": str(tmp_path / "hub"), "HF_HUB_CACHE": str(tmp_path / "hub")},
    )
    expect_sentence(done, "gpt2-large", "config.json")
    assert done.stdout == ""


def test_without_weights_and_without_a_network_train_says_one_sentence(tmp_path):
    pytest.importorskip("transformers")
    data = nanogpt_bins("data")
    proxies = {name: NOWHERE for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")}
    code = f"""import runpy, sys, time
time.sleep = lambda seconds: None  # the hub's client tries again and again: nobody has to wait for that here
sys.path[0], sys.argv = {ROOT!r}, ["train.py", "eval_gpt2_medium", "--data_dir={data}", "--device=cpu"]
runpy.run_path({os.path.join(ROOT, "train.py")!r}, run_name="__main__")"""
    done = fork_server.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(
            **proxies,
            no_proxy="",
            NO_PROXY="",
            HF_HOME=str(tmp_path / "hub"),
            HF_HUB_OFFLINE="0",
            HF_HUB_CACHE=str(tmp_path / "hub"),
        ),
        capture_output=True,
        encoding="utf-8",
    )
    expect_sentence(done, "train.py: ", "gpt2-medium", "network", "config.json")


# ----------------------------------------------------------------------------------------------------------------------
# special tokens that data declare: the tokenizers


@pytest.fixture
def tiny_gpt2(monkeypatch):
    """GPT2Tokenizer on 256 bytes, a few merges and <|endoftext|> as 261, so that every clone runs its code."""
    ranks = {bytes([i]): i for i in range(256)}
    for pair in (b"th", b"the", b" a", b"\xf0\x9f", b"\xc3\xb1"):
        ranks[pair] = len(ranks)
    encoding = tiktoken.Encoding(
        "gpt2", pat_str=r" ?\w+|\s+|[^\s\w]+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)}
    )
    tokenizers._load_gpt2.cache_clear()
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": encoding}.__getitem__)
    yield
    tokenizers._load_gpt2.cache_clear()


@pytest.fixture(params=["char", "gpt2"])
def make(request):
    """A function that makes a tokenizer of each kind with declared special tokens."""
    if request.param == "char":
        return lambda special=(): CharTokenizer("".join(sorted(set(string_of_all()))), special)
    request.getfixturevalue("tiny_gpt2")
    return GPT2Tokenizer


def string_of_all() -> str:
    return generated_text(200) + "<|>xyabth.*+?()[]end\U0001f40eñ"


@smoke
def test_special_tokens_get_the_ids_behind_the_others(make):
    plain, tokenizer = make(), make(["<|x|>", "(y)*"])
    first = plain.vocab_size
    assert tokenizer.vocab_size == first + 2 and tokenizer.start_id == plain.start_id
    assert {name: i for name, i in tokenizer.specials.items() if name not in plain.specials} == {
        "<|x|>": first,
        "(y)*": first + 1,
    }
    assert make(["(y)*", "<|x|>"]).specials["<|x|>"] == first + 1  # in the order of the declaration
    assert plain.specials == make().specials  # no instance leaves its tokens behind


@smoke
def test_plain_text_never_gives_a_special_id_and_special_true_does(make):
    plain, tokenizer = make(), make(["<|x|>", "(y)*", "the knight"])
    x, y, phrase = (plain.vocab_size + i for i in range(3))
    for text in ("<|x|>", "a<|x|>(y)*the the", "<|x|><|x|>", "<|x|", "|x|>", "(y)", "<|y|>", "", "ñ<|x|>\U0001f40e"):
        assert tokenizer.encode(text) == tokenizer.encode(text, special=False) == plain.encode(text)
        assert max(tokenizer.encode(text), default=0) < plain.vocab_size
        assert tokenizer.decode(tokenizer.encode(text, special=True)) == text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    encode = plain.encode
    assert tokenizer.encode("<|x|>", special=True) == [x]
    assert tokenizer.encode("a<|x|>(y)* b<|x|>", special=True) == [*encode("a"), x, y, *encode(" b"), x]
    assert tokenizer.encode("<|x||x|>", special=True) == encode("<|x||x|>")
    assert tokenizer.encode("the knight", special=True) == [phrase]  # even if it is plain text without special=True
    assert tokenizer.encode("", special=True) == [] and tokenizer.encode("(y)(y)", special=True) == encode("(y)(y)")


@smoke
def test_longer_names_go_before_shorter_ones_that_they_begin_with(make):
    names = ["<a", "<a><b", "<a>", "<b>", "b>", "<a><b><"]
    for order in (names, names[::-1]):
        tokenizer = make(order)
        ids = tokenizer.specials
        for text, pieces in (
            ("<a>", ["<a>"]),
            ("<a><b>", ["<a><b", ">"]),
            ("<a", ["<a"]),
            ("<b>", ["<b>"]),
            ("<a><b><", ["<a><b><"]),
            ("<a b>", ["<a", " ", "b>"]),
            ("<a><", ["<a>", "<"]),
        ):
            wanted = [i for piece in pieces for i in ([ids[piece]] if piece in ids else tokenizer.encode(piece))]
            assert tokenizer.encode(text, special=True) == wanted, text


@smoke
def test_special_tokens_are_decoded_by_name_whole_and_in_pieces(make):
    tokenizer = make(["<|x|>", "日本"])
    x, nihon = tokenizer.specials["<|x|>"], tokenizer.specials["日本"]
    ids = [x, *tokenizer.encode("a\U0001f40e"), nihon, x, tokenizer.vocab_size]
    assert tokenizer.decode(ids) == "<|x|>a\U0001f40e日本<|x|>\ufffd" == "".join(tokenizer.stream(iter(ids)))
    pieces = list(tokenizer.stream(ids))
    assert pieces.count("<|x|>") == 2 and pieces.count("日本") == 1 and "\U0001f40e" in pieces


@smoke
def test_special_tokens_stand_for_no_bytes_of_text(make):
    plain, tokenizer = make(), make(["<|x|>", "<|yy|>"])
    lengths = tokenizer.byte_lengths()
    assert lengths.shape == (plain.vocab_size + 2,) and lengths.dtype == np.int64 and lengths[-2:].tolist() == [0, 0]
    assert lengths[:-2].tolist() == plain.byte_lengths().tolist()
    ids = tokenizer.encode("<|x|>añ\U0001f40e<|yy|>", special=True)
    assert lengths[ids].sum() == len("añ\U0001f40e".encode())


@smoke
def test_special_tokens_go_through_json(make):
    plain, tokenizer = make(), make(["<|x|>", "é", "<|a|>"])
    description = json.loads(json.dumps(tokenizer.to_dict()))
    assert description["special"] == ["<|x|>", "é", "<|a|>"] and "special" not in plain.to_dict()
    assert {**plain.to_dict(), "special": description["special"]} == description
    again = from_dict(description)
    assert type(again) is type(tokenizer) and again.to_dict() == tokenizer.to_dict()
    assert again.specials == tokenizer.specials and again.vocab_size == tokenizer.vocab_size
    assert again.encode("<|a|>a<|x|>", special=True) == tokenizer.encode("<|a|>a<|x|>", special=True)
    assert added_special_tokens(plain.to_dict(), description) == description["special"]


@smoke
@pytest.mark.parametrize("special", [["<|x|>", "<|y|>", "<|x|>"], [""], ["<|x|>", ""]])
def test_names_that_cannot_be_told_apart_are_refused(make, special):
    with pytest.raises(ValueError, match=re.escape(repr("<|x|>" if len(special) == 3 else ""))):
        make(special)
    with pytest.raises(ValueError):
        from_dict({**make().to_dict(), "special": special})


@smoke
def test_names_that_the_vocabulary_has_already_are_refused(tiny_gpt2):
    with pytest.raises(ValueError, match="'a'"):
        CharTokenizer("abc", ["<|x|>", "a"])
    with pytest.raises(ValueError, match="endoftext"):
        GPT2Tokenizer(["<|endoftext|>"])


@smoke
def test_a_name_that_is_an_ordinary_token_is_kept_apart(tiny_gpt2):
    tokenizer = GPT2Tokenizer(["<|x|>", "the"])
    assert tokenizer.encode("the") == [257] and tokenizer.encode("the", special=True) == [263]
    assert tokenizer.specials == {"<|endoftext|>": 261, "<|x|>": 262, "the": 263}
    assert tokenizer.byte_lengths()[[257, 263]].tolist() == [3, 0]
    assert tokenizer.to_dict()["special"] == ["<|x|>", "the"]  # else ids would change their meaning


def test_special_tokens_behind_gpt2s_own(gpt2_vocabulary):
    tokenizer = GPT2Tokenizer(["<|x|>", "<|y|>"])
    assert tokenizer.specials == {"<|endoftext|>": 50256, "<|x|>": 50257, "<|y|>": 50258}
    assert tokenizer.vocab_size == 50259 and tokenizer.start_id == 50256
    assert tokenizer.encode("Hello<|y|><|endoftext|> world", special=True) == [15496, 50258, 50256, 995]
    assert max(tokenizer.encode("Hello<|y|><|endoftext|> world")) < 50256
    assert tokenizer.decode([15496, 50258, 50257, 50259]) == "Hello<|y|><|x|>\ufffd"
    description = tokenizer.to_dict()
    assert description == {**GPT2Tokenizer().to_dict(), "special": ["<|x|>", "<|y|>"]}
    assert added_special_tokens({"kind": "gpt2"}, description) == ["<|x|>", "<|y|>"]
    assert added_special_tokens(description, GPT2Tokenizer(["<|x|>", "<|y|>", "<|z|>"]).to_dict()) == ["<|z|>"]
    assert added_special_tokens(description, GPT2Tokenizer().to_dict()) is None


# ----------------------------------------------------------------------------------------------------------------------
# special tokens that data declare: the model grows


def declared(kind: str, special=SPECIALS):
    return CharTokenizer(CHARACTERS, special) if kind == "char" else GPT2Tokenizer(special)


def talk(folder, kind: str = "char", special=SPECIALS) -> str:
    """A corpus in which <|x|> is followed by abc and <|y|> by cba, and nothing tells which of them comes next."""
    tokenizer, rng = declared(kind, special), np.random.default_rng(0)
    texts = ["".join(["<|x|>abc.\n", "<|y|>cba.\n"][i] for i in rng.integers(0, 2, n)) for n in (400, 60)]
    return bins(
        folder,
        *[tokenizer.encode(text, special=True) for text in texts],
        {"tokenizer": tokenizer.to_dict(), "vocab_size": tokenizer.vocab_size},
    )


GROWING = [
    *OFFLINE,
    "--init_from=hf",
    "--data_dir=data",
    "--batch_size=8",
    "--gradient_accumulation_steps=1",
    "--eval_interval=1000",
    "--eval_iters=2",
    "--warmup_iters=5",
]
KINDS = ["char", "char untied", "gpt2"]


def grow_folder(kind: str) -> GPT:
    """Write hf, whose tokenizer knows no declared special token, and data, which declare two; returns hf's model."""
    if kind == "gpt2":
        import transformers

        theirs(transformers, "hf", vocab_size=50257, n_embd=16, n_layer=1, n_head=2)
    else:
        char_folder("hf", tie_weights=kind == "char")
    talk("data", kind.split()[0])
    return load_model("hf")[0]


@pytest.fixture(scope="module", params=KINDS)
def grown(request, tmp_path_factory):
    """(kind, folder with hf, data and a finished run in out, the model of hf, what the training printed)."""
    pytest.importorskip("transformers")
    if request.param == "gpt2" and not os.path.exists(os.environ.get("TIKTOKEN_CACHE_DIR", "")):
        pytest.skip("TIKTOKEN_CACHE_DIR is not set: this test needs a file that is not part of the repository")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    folder, before, threads = tmp_path_factory.mktemp("grown"), os.getcwd(), torch.get_num_threads()
    os.chdir(folder)
    torch.set_num_threads(1)
    try:
        old = grow_folder(request.param)
        out = printed(
            train.main,
            *GROWING,
            f"--batch_size={4 if request.param == 'gpt2' else 8}",
            "--out_dir=out",
            f"--max_iters={60 if request.param == 'gpt2' else 100}",
            "--lr_decay_iters=100",
            "--learning_rate=2e-2",
            "--min_lr=1e-3",
        )
    finally:
        os.chdir(before)
        torch.set_num_threads(threads)
    return request.param, folder, old, out


def sampled(folder, *args: str) -> list[str]:
    """The texts that sample.py prints for the run in folder."""
    out = printed(sample.main, f"--out_dir={folder / 'out'}", "--device=cpu", *args)
    return out.split(f"\n{sample.SAMPLE_SEPARATOR}\n")[:-1]


def test_growth_is_said_with_names_and_counts(grown):
    kind, folder, old, out = grown
    V = old.config.vocab_size
    (line,) = [line for line in out.splitlines() if "<|x|>" in line]
    assert "<|y|>" in line and f"from {V} to {V + 2}" in line and "embedding" in line
    checkpoint = load(folder / "out")
    assert checkpoint["model_args"]["vocab_size"] == V + 2 == len(checkpoint["model"]["lm_head.weight"])
    assert checkpoint["tokenizer"]["special"] == SPECIALS
    assert checkpoint["model_args"].get("tie_weights", True) == (kind != "char untied")
    model, tokenizer = load_model(str(folder / "out"))
    assert tokenizer.specials["<|y|>"] == V + 1
    assert (model.lm_head.weight is model.transformer.wte.weight) == (kind != "char untied")


def test_new_rows_are_trained_on_both_sides(grown):
    kind, folder, old, _ = grown
    for start, text in (("<|x|>", "<|x|>abc.\n"), ("<|y|>", "<|y|>cba.\n")):  # the row by which a name is read
        (written,) = sampled(folder, f"--start={start}", "--num_samples=1", "--max_new_tokens=5", "--temperature=0")
        assert written.startswith(text)
    texts = sampled(folder, "--start=abc.\n", "--num_samples=20", "--max_new_tokens=1", "--temperature=1")
    assert {text.removeprefix("abc.\n") for text in texts} == set(SPECIALS)  # the row by which it is predicted


def test_a_prompt_gives_special_ids_only_by_their_names(grown):
    kind, folder, old, _ = grown
    V, generator = old.config.vocab_size, dongpt.load(str(folder / "out"), device="cpu")
    tokenizer = generator.require_tokenizer()
    assert generator.encode("<|x|>abc") == [V, *tokenizer.encode("abc")]
    for text in ("<|x|>abc", "abc.\n", "<|x", "x|>"):
        assert max(tokenizer.encode(text)) < V
    assert max(generator.encode("<|x abc.\n|>")) < V
    (written,) = sampled(folder, "--start=<|x|>abc.\n<|y|>", "--num_samples=1", "--max_new_tokens=4", "--temperature=0")
    assert written.startswith("<|x|>abc.\n<|y|>cba.")


def test_a_grown_model_is_measured_and_special_tokens_count_no_bytes(grown):
    kind, folder, old, _ = grown
    (result,) = measured(str(folder / "out"), f"--data_dir={folder / 'data'}")
    ids = np.fromfile(folder / "data" / "val.bin", "<u2")
    n_bytes = 5 * (ids >= old.config.vocab_size).sum()  # abc.\n behind each; the first token is a special one
    assert result["tokens"] == len(ids) - 1
    nats = result["loss"] * result["tokens"]
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-6)
    choice = math.log(2) * (ids >= old.config.vocab_size).mean()  # which of two comes is all that is not known
    assert 0.8 * choice < result["loss"] < choice + 0.25
    with pytest.raises(ValueError, match="vocabulary"):  # data that declare more than the model knows
        talk("data", kind.split()[0], [*SPECIALS, "<|z|>"])
        measured(str(folder / "out"), "--data_dir=data")


def test_a_grown_model_goes_to_transformers_and_back(grown, transformers):
    kind, folder, old, _ = grown
    checkpoint = load(folder / "out", "ckpt.pt")
    ours, tokenizer = load_model(str(folder / "out"))
    export.save(ours, checkpoint["tokenizer"], "back")
    idx = torch.randint(old.config.vocab_size + 2, (2, 16))
    assert gap(ours, transformers.GPT2LMHeadModel.from_pretrained("back").eval(), idx) < 1e-4
    assert load_model("back")[1].to_dict() == checkpoint["tokenizer"]
    text = "abc.\n<|x|>cba<|y|>"
    their_tokenizer = transformers.AutoTokenizer.from_pretrained("back")
    assert their_tokenizer(text)["input_ids"] == tokenizer.encode(text, special=True)
    out = printed(train.main, *GROWING, f"--data_dir={folder / 'data'}", "--init_from=back", "--eval_only")
    assert "grows" not in out  # these are now the model's own


@pytest.mark.parametrize("kind", KINDS)
def test_old_logits_are_unchanged_by_new_rows(kind, transformers, request):
    if kind == "gpt2":
        request.getfixturevalue("gpt2_vocabulary")
    old = grow_folder(kind)
    V = old.config.vocab_size
    printed(train.main, *GROWING, "--out_dir=out", "--max_iters=1", "--learning_rate=0", "--min_lr=0")
    new, idx = load_model("out")[0], torch.randint(V, (3, 16))
    assert model_logits(new, idx).shape == (3, 16, V + 2)
    torch.testing.assert_close(model_logits(new, idx)[..., :V], model_logits(old, idx), rtol=0, atol=1e-5)
    for name, weight in old.state_dict().items():
        grown = new.state_dict()[name]
        assert torch.equal(grown[: len(weight)], weight), name
        if name in ("transformer.wte.weight", "lm_head.weight"):
            rows = grown[V:]
            assert rows.shape == (2, 16) and 0.01 < rows.std() < 0.04 and not torch.equal(*rows)  # as all are: 0.02


@smoke
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("pos_embd", ["default", "rope", "relative", "alibi"])
def test_a_vocabulary_grows(tie, pos_embd):
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=16, tie_weights=tie, pos_embd=pos_embd)
    ).eval()
    idx = torch.randint(11, (2, 8))
    before, count = model_logits(model, idx), model.get_num_params()
    grow_vocabulary(model, 14)
    torch.testing.assert_close(model_logits(model, idx)[..., :11], before, rtol=0, atol=1e-6)
    assert model.config.vocab_size == 14 == model.transformer.wte.num_embeddings == model.lm_head.out_features
    assert model.get_num_params() == count + (1 if tie else 2) * 3 * 16
    assert (model.lm_head.weight is model.transformer.wte.weight) == tie == model.config.tie_weights
    idx = torch.tensor([[11, 12, 13, 0]])
    loss = model(idx, idx)[1]
    loss.backward()
    assert all(module.weight.grad[11:].abs().sum(1).min() > 0 for module in (model.transformer.wte, model.lm_head))
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
    assert len([p for group in optimizer.param_groups for p in group["params"]]) == len(list(model.parameters()))


@smoke
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_the_same_seed_gives_the_same_new_rows(tie):
    models = []  # all are kept, so that each lies elsewhere in memory
    for _ in range(20):
        torch.manual_seed(0)
        models.append(GPT(GPTConfig(block_size=4, vocab_size=5, n_layer=1, n_head=1, n_embd=4, tie_weights=tie)))
        torch.manual_seed(1)
        grow_vocabulary(models[-1], 7)
    for model in models:
        assert_same(dict(model.state_dict()), dict(models[0].state_dict()))


@smoke
def test_a_bigrams_vocabulary_grows_too():
    torch.manual_seed(0)
    model = build_model(GPTConfig(model_type="bigram", vocab_size=5, block_size=4)).eval()
    idx = torch.randint(5, (2, 4))
    before = model_logits(model, idx)
    grow_vocabulary(model, 7)
    assert torch.equal(model_logits(model, idx)[..., :5], before)
    assert model_logits(model, torch.tensor([[5, 6]])).shape == (1, 2, 7)


def test_a_bigram_grows_with_new_special_tokens():
    settings = [
        *OFFLINE,
        "--max_iters=1",
        "--batch_size=2",
        "--gradient_accumulation_steps=1",
        "--eval_iters=1",
        "--block_size=8",
    ]
    write_corpus("plain", CHARACTERS * 40)
    description = CharTokenizer.from_text(CHARACTERS).to_dict()
    ids = np.arange(300) % (len(CHARACTERS) + 1)
    bins("more", ids, ids, {"tokenizer": {**description, "special": ["<|x|>"]}, "vocab_size": len(CHARACTERS) + 1})
    assert train.main(["--model_type=bigram", "--data_dir=plain", "--out_dir=first", *settings]) == 0
    assert train.main(["--init_from=first", "--data_dir=more", "--out_dir=second", *settings]) == 0
    assert load("second")["model_args"]["vocab_size"] == len(CHARACTERS) + 1


@pytest.mark.parametrize("kind", ["char", "char untied"])
def test_a_grown_run_resumes_exactly(kind, transformers, monkeypatch):
    grow_folder(kind)
    args = ["--dropout=0.1", "--learning_rate=1e-2", "--lr_decay_iters=12"]
    kept, save = [], checkpoints.save

    def keep(checkpoint, path, *more):  # a copy of the sixth state, from which the second half is run anew
        save(checkpoint, path, *more)
        if checkpoint["iter_num"] == 6:
            os.makedirs("halfway", exist_ok=True)
            kept.append(shutil.copy(path, "halfway"))

    monkeypatch.setattr(checkpoints, "save", keep)
    printed(train.main, *GROWING, *args, "--out_dir=out", "--max_iters=12", "--eval_interval=6")
    assert kept
    out = printed(train.main, "--init_from=resume", "--out_dir=halfway", "--max_iters=12")
    assert "grows" not in out
    one, other = load("out"), load("halfway")
    assert one["iter_num"] == other["iter_num"] == 12
    assert one["model_args"]["dropout"] == other["model_args"]["dropout"] == 0.1  # this run's, not the folder's
    for key in ("model", "optimizer", "model_args", "tokenizer", "windows"):
        assert_same(one[key], other[key], key)
    assert_same(load("out", "ckpt.pt")["model"], load("halfway", "ckpt.pt")["model"])


def test_special_tokens_may_be_added_once_more_but_not_on_a_resume(transformers):
    old = grow_folder("char")
    printed(train.main, *GROWING, "--out_dir=out", "--max_iters=1")
    talk("data", special=[*SPECIALS, "<|z|>"])
    sentence = refusal(train.main, "--init_from=resume", "--out_dir=out", "--max_iters=2")
    assert "vocabulary" in sentence
    out = printed(train.main, *GROWING, "--init_from=out", "--out_dir=again", "--max_iters=1")
    V = old.config.vocab_size
    assert f"from {V + 2} to {V + 3}" in out and "<|z|>" in out and "<|x|>" not in out
    for special in (["<|x|>"], [], SPECIALS[::-1], ["<|z|>", *SPECIALS]):  # whose ids would mean something else
        talk("data", special=special) if len(special) > 1 else bins(
            "data",
            np.arange(99) % 9,
            np.arange(99) % 9,
            {"tokenizer": declared("char", special).to_dict(), "vocab_size": len(CHARACTERS) + len(special)},
        )
        assert "vocabulary" in refusal(train.main, *GROWING, "--init_from=out", "--out_dir=third", "--max_iters=1")
    assert not os.path.exists("third")


def test_rows_of_a_padded_vocabulary_are_used_and_that_is_said(transformers):
    ids = np.arange(200) % len(CHARACTERS)
    bins("plain", ids, ids, {"tokenizer": declared("char", []).to_dict(), "vocab_size": len(CHARACTERS)})
    settings = ["--max_iters=1", "--n_layer=1", "--n_head=1", "--n_embd=8", "--block_size=8"]
    printed(
        train.main,
        *GROWING,
        *settings,
        "--init_from=scratch",
        "--data_dir=plain",
        "--vocab_size=32",
        "--out_dir=padded",
    )
    talk("data")
    out = printed(train.main, *GROWING, "--init_from=padded", "--out_dir=out", "--max_iters=1")
    (line,) = [line for line in out.splitlines() if "<|x|>" in line]
    assert "<|y|>" in line and "32" in line and "grows" not in line
    assert load("out")["model_args"]["vocab_size"] == 32 and load("out")["tokenizer"]["special"] == SPECIALS


def test_a_run_from_scratch_takes_declared_special_tokens_too():
    talk("data")
    printed(
        train.main,
        *GROWING,
        "--init_from=scratch",
        "--out_dir=out",
        "--max_iters=150",
        "--lr_decay_iters=150",
        "--learning_rate=2e-2",
        "--n_layer=1",
        "--n_head=2",
        "--n_embd=16",
        "--block_size=16",
    )
    assert load("out")["model_args"]["vocab_size"] == len(CHARACTERS) + 2
    out = printed(
        sample.main,
        "--out_dir=out",
        "--start=<|y|>",
        "--temperature=0",
        "--num_samples=1",
        "--max_new_tokens=5",
        "--device=cpu",
    )
    assert out.startswith("<|y|>cba.\n")


# ----------------------------------------------------------------------------------------------------------------------
# evaluate.py and sample.py on folders, and longer windows


def test_a_folder_is_measured_as_a_path_and_by_init_from(transformers):
    model = char_folder("hf")
    data = write_corpus("data", generated_by(CHARACTERS))
    (one,) = measured("hf", f"--data_dir={data}")
    (other,) = measured("--init_from=hf", f"--data_dir={data}")
    assert one == other and one["checkpoint"] == "hf"
    assert one["loss"] == pytest.approx(loss_by_hand(model, data, 16), abs=1e-5)
    (short,) = measured("hf", f"--data_dir={data}", "--block_size=4")
    assert short["loss"] == pytest.approx(loss_by_hand(model, data, 4), abs=1e-5) != one["loss"]
    assert "--data_dir" in refusal(evaluate.main, "hf", "--device=cpu")  # a folder does not name its data
    text = printed(
        sample.main, "--init_from=hf", "--start=ab", "--num_samples=2", "--max_new_tokens=20", "--device=cpu"
    )
    assert text.count(sample.SAMPLE_SEPARATOR) == 2 and set(text.replace(sample.SAMPLE_SEPARATOR, "")) <= set(
        CHARACTERS
    )


def generated_by(characters: str, n: int = 900) -> str:
    return characters + "".join(np.random.default_rng(0).choice(list(characters), n))


@torch.no_grad()
def loss_by_hand(model, data: str, block_size: int) -> float:
    """The mean loss over val in disjoint windows of block_size tokens, one at a time."""
    ids = torch.from_numpy(np.fromfile(os.path.join(data, "val.bin"), "<u2").astype(np.int64))
    total = 0.0
    for i in range(0, len(ids) - 1, block_size):
        x, y = ids[i : i + block_size][: len(ids) - 1 - i], ids[i + 1 : i + block_size + 1]
        total += model(x[None], y[None])[1].item() * len(y)
    return total / (len(ids) - 1)


def checkpoint_of(path, data: str, **more) -> GPT:
    """Save a model with large weights, trained on data by its own account, at path; returns it."""
    torch.manual_seed(0)
    settings = dict(block_size=8, vocab_size=len(CHARACTERS), n_layer=2, n_head=2, n_embd=16)
    model = build_model(GPTConfig(**{**settings, **more})).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    checkpoints.save(
        {
            "model": model.state_dict(),
            "model_args": checkpoints.model_args(model.config),
            "tokenizer": Corpus(os.path.abspath(data)).tokenizer_dict,
            "config": {"data_dir": data},
            "format_version": checkpoints.FORMAT_VERSION,
        },
        str(path),
    )
    return model


@pytest.mark.parametrize(
    "more",
    [dict(pos_embd="rope"), dict(pos_embd="relative"), dict(pos_embd="alibi"), dict(model_type="bigram")],
    ids=str,
)
def test_longer_windows_are_measured_where_positions_allow_it(more):
    data = write_corpus("data", generated_by(CHARACTERS))
    model = checkpoint_of("ckpt.pt", data, **more)
    results = {n: measured("ckpt.pt", f"--block_size={n}")[0] for n in (3, 8, 24, 500)}
    assert measured("ckpt.pt")[0] == results[8]  # what it was trained on is the default
    for n, result in results.items():
        assert result["loss"] == pytest.approx(loss_by_hand(model, data, n), abs=1e-5)
        assert result["tokens"] == Corpus(os.path.abspath(data)).lengths["val"] - 1
    different = len({round(result["loss"], 6) for result in results.values()})
    assert different == (1 if "model_type" in more else 4)


@pytest.mark.parametrize("pos_embd", ["default", "default+relative"])
def test_longer_windows_are_refused_where_there_are_no_positions(pos_embd):
    data = write_corpus("data", generated_by(CHARACTERS))
    model = checkpoint_of("ckpt.pt", data, pos_embd=pos_embd)
    sentence = refusal(evaluate.main, "ckpt.pt", "--block_size=9", "--device=cpu")
    assert all(part in sentence for part in ("ckpt.pt", "9", "8", f"pos_embd={pos_embd}"))
    assert measured("ckpt.pt", "--block_size=8") == measured("ckpt.pt")
    assert measured("ckpt.pt", "--block_size=5")[0]["loss"] == pytest.approx(loss_by_hand(model, data, 5), abs=1e-5)
    assert "block_size" in refusal(evaluate.main, "ckpt.pt", "--block_size=0", "--device=cpu")


# ----------------------------------------------------------------------------------------------------------------------
# the bigram


def test_the_bigram_comes_near_the_conditional_entropy_of_its_data():
    rng, V = np.random.default_rng(0), 6
    table = rng.dirichlet(np.full(V, 0.4), size=V)
    cumulative, ids = table.cumsum(1), [0]
    for u in rng.random(40_000):
        ids.append(min(int(np.searchsorted(cumulative[ids[-1]], u)), V - 1))
    text = "".join("abcdef"[i] for i in ids)
    write_corpus("data", text)
    args = [
        "config/bigram.py",
        "--data_dir=data",
        *OFFLINE,
        "--max_iters=400",
        "--lr_decay_iters=400",
        "--learning_rate=5e-2",
        "--weight_decay=0",
        "--eval_interval=1000",
        "--eval_iters=2",
        "--batch_size=128",
    ]
    out = printed(train.main, *args, "--out_dir=out")
    assert "number of parameters: 0.00M" in out and set(load("out")["model"]) == {"transformer.wte.weight"}

    for split in ("train", "val"):
        tokens = np.fromfile(f"data/{split}.bin", "<u2").astype(np.int64)
        counts = np.zeros((V, V))
        np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
        conditional = counts / counts.sum(1, keepdims=True)
        entropy = -(counts[counts > 0] * np.log(conditional[counts > 0])).sum() / counts.sum()  # no table has less
        unigram = counts.sum(0) / counts.sum()
        (result,) = measured("out", f"--split={split}", "--batch_size=500")
        assert entropy - 1e-5 <= result["loss"] < entropy + 0.01 < -(unigram * np.log(unigram)).sum() - 0.1
        assert measured("out", f"--split={split}", "--block_size=100")[0]["loss"] == pytest.approx(result["loss"])
    learned = load("out", "ckpt.pt")["model"]["transformer.wte.weight"].softmax(-1).numpy()
    assert np.abs(learned - table).max() < 0.05

    written = printed(
        sample.main,
        "--out_dir=out",
        "--num_samples=1",
        "--start=a",
        "--max_new_tokens=2000",
        "--temperature=1",
        "--top_k=0",
        "--device=cpu",
    ).split("\n")[0]
    counts = np.zeros((V, V))
    for one, two in zip(written, written[1:]):
        counts["abcdef".index(one), "abcdef".index(two)] += 1
    drawn = counts / counts.sum(1, keepdims=True)
    assert len(written) == 2001 and np.abs(drawn - table)[counts.sum(1) > 200].max() < 0.15


def test_the_bigram_trained_in_two_halves_equals_one_run(tiny_data):
    settings = [
        f"--data_dir={tiny_data}",
        "config/bigram.py",
        *OFFLINE,
        "--eval_iters=2",
        "--eval_interval=4",
        "--lr_decay_iters=8",
    ]
    printed(train.main, *settings, "--out_dir=straight", "--max_iters=8")
    printed(train.main, *settings, "--out_dir=out", "--max_iters=4")
    printed(train.main, "--init_from=resume", "--out_dir=out", "--max_iters=8")
    for name in ("ckpt.pt", "ckpt_last.pt"):
        one, other = load("straight", name), load("out", name)
        for key in ("model", "optimizer", "model_args", "iter_num", "windows", "best_val_loss"):
            assert_same(one[key], other[key], key)


# ----------------------------------------------------------------------------------------------------------------------
# the sizes and settings of others, as files


def settings_of(*files: str) -> TrainConfig:
    return configurator.load(TrainConfig, list(files))[0]


NANOGPT_PLUS = {  # ANCESTORS.md, table D3
    "small": dict(
        n_embd=128,
        block_size=64,
        n_head=4,
        n_layer=4,
        batch_size=64,
        learning_rate=3e-4,
        beta1=0.9,
        beta2=0.95,
        gradient_accumulation_steps=1,
        dropout=0.2,
    ),
    "medium": dict(
        n_embd=384,
        block_size=256,
        n_head=6,
        n_layer=6,
        batch_size=64,
        learning_rate=1e-3,
        beta1=0.9,
        beta2=0.99,
        gradient_accumulation_steps=1,
        dropout=0.2,
    ),
    "large": dict(
        n_embd=516,
        block_size=384,
        n_head=12,
        n_layer=12,
        batch_size=8,
        learning_rate=3e-4,
        beta1=0.9,
        beta2=0.99,
        gradient_accumulation_steps=5,
        dropout=0.2,
    ),
}
DATASETS = ["train_don_char", "quickstart"]
DATASET_KEYS = [
    "dataset",
    "data_dir",
    "out_dir",
    "max_iters",
    "lr_decay_iters",
    "warmup_iters",
    "eval_interval",
    "eval_iters",
    "log_interval",
    "init_from",
    "always_save_checkpoint",
    "sample_tokens",
]


def assert_settings(cfg: TrainConfig, wanted: dict):
    assert {key: getattr(cfg, key) for key in wanted} == {
        key: pytest.approx(value) if type(value) is float else value for key, value in wanted.items()
    }


@smoke
@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("size", NANOGPT_PLUS)
def test_nanogpt_plus_sizes_go_behind_any_datasets_config(size, dataset):
    cfg = settings_of(f"config/{dataset}.py", f"config/nanogpt_plus_{size}.py")
    wanted = NANOGPT_PLUS[size]
    assert_settings(
        cfg,
        {
            **wanted,
            "min_lr": wanted["learning_rate"] / 10,
            "weight_decay": 0.1,
            "bias": False,
            "tie_weights": True,
            "activation": "gelu_tanh",
            "model_type": "gpt",
            "pos_embd": "default",
        },
    )
    data = settings_of(f"config/{dataset}.py")
    assert_settings(cfg, {key: getattr(data, key) for key in DATASET_KEYS})
    assert settings_of(f"nanogpt_plus_{size}").n_embd == wanted["n_embd"]
    with torch.device("meta"):
        count = (
            build_model(
                GPTConfig(
                    **{
                        key: getattr(cfg, key)
                        for key in ("n_layer", "n_head", "n_embd", "block_size", "bias", "activation")
                    },
                    vocab_size=85,
                )
            ).get_num_params()
            / 1e6
        )
    assert f"{count:.2f}" == "0.80" if size == "small" else f"{count:.1f}" == dict(medium="10.7", large="38.4")[size]
    with open(os.path.join(ROOT, "config", f"nanogpt_plus_{size}.py"), encoding="utf-8") as file:
        assert dict(small="0.80 M", medium="10.7 M", large="38.4 M")[size] in ast.get_docstring(ast.parse(file.read()))


@smoke
@pytest.mark.parametrize("dataset", DATASETS)
def test_the_bigram_goes_behind_any_datasets_config(dataset):
    cfg = settings_of(f"config/{dataset}.py", "config/bigram.py")
    assert_settings(
        cfg,
        dict(
            model_type="bigram",
            block_size=8,
            batch_size=32,
            learning_rate=1e-2,
            min_lr=1e-3,
            beta1=0.9,
            beta2=0.99,
            gradient_accumulation_steps=1,
            warmup_iters=0,
            weight_decay=0.1,
        ),
    )
    data = settings_of(f"config/{dataset}.py")
    assert_settings(cfg, {key: getattr(data, key) for key in DATASET_KEYS if key != "warmup_iters"})


@pytest.mark.parametrize("name", ["nanogpt_plus_small", "bigram", "train_eds"])
def test_the_files_train(name, tiny_data):
    printed(
        train.main,
        f"config/{name}.py",
        f"--data_dir={tiny_data}",
        *OFFLINE,
        "--max_iters=2",
        "--eval_iters=1",
        "--batch_size=2",
        "--gradient_accumulation_steps=1",
        "--out_dir=out",
    )
    args, wanted = load("out")["model_args"], settings_of(name)
    assert args["block_size"] == wanted.block_size and args.get("model_type", "gpt") == wanted.model_type
    assert args["n_embd"] == wanted.n_embd and args.get("activation", "gelu") == wanted.activation


@smoke
def test_train_eds_holds_eds_settings():
    cfg = settings_of("train_eds")  # ANCESTORS.md, table D1; what it saves and where is donGPT's
    assert_settings(
        cfg,
        dict(
            init_from="scratch",
            block_size=64,
            batch_size=8,
            gradient_accumulation_steps=40,
            n_layer=4,
            n_head=4,
            n_embd=64,
            dropout=0.0,
            learning_rate=6e-4,
            min_lr=6e-5,
            warmup_iters=2000,
            lr_decay_iters=600000,
            beta1=0.9,
            beta2=0.95,
            max_iters=30100,
            eval_interval=200,
            eval_iters=200,
            log_interval=20,
            weight_decay=0.1,
            grad_clip=1.0,
            bias=False,
            decay_lr=True,
            pos_embd="default",
            activation="gelu",
            tie_weights=True,
        ),
    )
    for pos_embd in ("rope", "relative"):
        assert configurator.load(TrainConfig, ["train_eds", f"--pos_embd={pos_embd}"])[0].pos_embd == pos_embd


@pytest.mark.parametrize("kind", ["bpe", "bpe, old", "word", "word, old", "word, lower, spaces alone"])
def test_an_exported_vocabulary_of_ones_own_encodes_as_ours(tmp_path, transformers, kind):
    text = generated_text(900) + "It's a_b, señor: x² 12\t日本\n\n"
    text += (
        "हिन्दी में लिखा है। สวัสดีครับ مَرْحَبًا שָׁלוֹם cafe\u0301, ශ්\u200dරී می\u200cخواهم 1\ufe0f\u20e3 5\u0332 !\u0301a \u0301b\n"
    )
    text += "\u0301c \u200d d\u200d ❤\ufe0fx \U0001f468\u200d\U0001f469 ½ \u09f4 \x1c \x1f\x85\u00a0 \u2028\u203f\n"
    if "bpe" in kind:
        tokenizer = BPETokenizer.train([text], 400, ["<|x|>"])
        tokenizer = BPETokenizer(tokenizer.tokens, ["<|x|>"], keep_marks="old" not in kind)
    else:
        flags = (*("lower" in kind,) * 2, "old" not in kind)
        tokenizer = WordTokenizer(sorted(set(split_words(text, *flags))), ["<|x|>", "<|endoftext|>"], *flags)
    model = GPT(GPTConfig(block_size=4096, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=8))
    export.save(model, tokenizer.to_dict(), str(tmp_path / "hf"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = tokenizer.encode(text[-4000:] + "unheard", unknown="replace")
    assert theirs.encode(text[-4000:] + "unheard") == ids and theirs.decode(ids) == tokenizer.decode(ids)
    assert theirs.encode("<|x|>") == [tokenizer.specials["<|x|>"]] and theirs.eos_token_id == tokenizer.end_id
    assert hugging_face.load(str(tmp_path / "hf"))["tokenizer"] == tokenizer.to_dict()


@smoke
def test_an_exported_template_asks_as_ours_does(tmp_path, transformers):
    tokenizer = BPETokenizer.train([generated_text(900)], 400, DONGPT_TEMPLATE.special_tokens())
    tokenizer.template = DONGPT_TEMPLATE
    model = GPT(GPTConfig(block_size=64, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=8))
    export.save(model, tokenizer.to_dict(), str(tmp_path / "hf"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    said = [("system", "be brief"), ("user", "It's 'me'?"), ("assistant", 'Yes, "you".'), ("user", "so?\nwhat")]
    text = theirs.apply_chat_template([dict(role=role, content=content) for role, content in said], tokenize=False)
    parts = [
        Segment(END, is_special=True),
        *DONGPT_TEMPLATE.opening("be brief"),
        *DONGPT_TEMPLATE.question("It's 'me'?"),
        *DONGPT_TEMPLATE.answer('Yes, "you".'),
        *DONGPT_TEMPLATE.question("so?\nwhat"),
    ]
    assert theirs.encode(text) == encode(tokenizer, parts) and theirs.eos_token == "<|end|>"
    assert hugging_face.load(str(tmp_path / "hf"))["tokenizer"] == tokenizer.to_dict()
