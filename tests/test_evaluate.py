"""evaluate.py: losses that can be computed by hand, the JSON that scripts read, and what is refused."""

import json
import math
import os
import shutil
import sys

import fork_server
import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    expect_sentence,
    generated_text,
    run,
    run_ranks,
    shorten_python_docs,
    split_text,
    write_corpus,
    write_splits,
)

import evaluate as program
from configurator import UserError
from dongpt import runtime
from dongpt.checkpoint.files import load_model, model_args, save
from dongpt.text.bins import read_meta
from dongpt.text.tokenizers import BPETokenizer, CharTokenizer, byte_alphabet
from dongpt.train.data import Corpus
from dongpt.train.evaluation import MeanLoss, eval_batches, evaluate
from model import GPT, GPTConfig

smoke = pytest.mark.smoke
KEYS = ["checkpoint", "split", "loss", "perplexity", "bits_per_byte", "tokens"]


def results(capsys, *args: str) -> list[dict]:
    """The list that evaluate.py --json prints for args."""
    program.main([*args, "--json", "--device=cpu"])
    return json.loads(capsys.readouterr().out)


def uniform_checkpoint(path, data_dir: str) -> int:
    """Write a checkpoint whose model finds every token equally likely; returns its vocabulary's size."""
    meta = read_meta(data_dir)
    model = GPT(GPTConfig(block_size=16, vocab_size=meta["vocab_size"], n_layer=1, n_head=1, n_embd=8))
    for parameter in model.parameters():
        parameter.data.zero_()
    save(
        {
            "model": model.state_dict(),
            "model_args": model_args(model.config),
            "tokenizer": meta["tokenizer"],
            "config": {"data_dir": data_dir},
        },
        str(path),
    )
    return meta["vocab_size"]


@smoke
def test_bits_per_byte_and_perplexity_by_hand():
    loss = MeanLoss(nats=math.log(8), tokens=3)  # three tokens of three bits each, on four bytes of text
    assert loss.perplexity == pytest.approx(8) and loss.bits_per_byte(4) == pytest.approx(9 / 4)
    assert MeanLoss(nats=1e6, tokens=3).perplexity == math.inf


@smoke
@pytest.mark.parametrize("split", ["val", "train"])
def test_a_uniform_model_has_the_loss_of_its_vocabulary(tmp_path, tiny_data, capsys, split):
    vocab_size = uniform_checkpoint(tmp_path / "ckpt.pt", tiny_data)
    (result,) = results(capsys, str(tmp_path / "ckpt.pt"), f"--split={split}")
    meta, ids = read_meta(tiny_data), np.fromfile(os.path.join(tiny_data, f"{split}.bin"), "<u2")
    assert result["loss"] == pytest.approx(math.log(vocab_size), rel=1e-6)
    assert result["perplexity"] == pytest.approx(vocab_size, rel=1e-5) and result["tokens"] == len(ids) - 1
    n_bytes = meta["bytes"][split] - len(meta["tokenizer"]["characters"][ids[0]].encode())
    assert result["bits_per_byte"] == pytest.approx(math.log2(vocab_size) * (len(ids) - 1) / n_bytes, rel=1e-6)


@smoke
@pytest.mark.parametrize("split", ["val", pytest.param("train", marks=pytest.mark.slow)])
def test_the_loss_is_that_of_a_plain_loop_over_disjoint_windows(tiny_run, tiny_data, capsys, split):
    model, _ = load_model(tiny_run)
    ids = torch.from_numpy(np.fromfile(os.path.join(tiny_data, f"{split}.bin"), "<u2").astype(np.int64))
    total = 0.0
    for i in range(0, len(ids) - 1, 16):
        x, y = ids[i : i + 16][: len(ids) - 1 - i], ids[i + 1 : i + 17]
        with torch.no_grad():
            total += model(x[None], y[None])[1].item() * len(y)
    (result,) = results(capsys, f"--out_dir={tiny_run}", f"--split={split}")
    assert result["loss"] == pytest.approx(total / (len(ids) - 1), abs=1e-6) and result["tokens"] == len(ids) - 1
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"])) and result["split"] == split


@smoke
def test_the_final_loss_that_training_prints_is_that_of_evaluate(tiny_run, capsys):
    with open(os.path.join(tiny_run, "log.jsonl"), encoding="utf-8") as file:
        final = [json.loads(line) for line in file][-1]
    (result,) = results(capsys, tiny_run)
    assert final["kind"] == "final" and final["tokens"] == result["tokens"]
    assert final["val_loss"] == pytest.approx(result["loss"], abs=1e-6)
    assert final["bits_per_byte"] == pytest.approx(result["bits_per_byte"], abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_batch_size_changes_nothing(tiny_run, capsys, batch_size):
    (usual,) = results(capsys, tiny_run)
    (other,) = results(capsys, tiny_run, f"--batch_size={batch_size}")
    assert other == {**usual, **{key: pytest.approx(usual[key], abs=1e-5) for key in KEYS[2:5]}}


@smoke
def test_evaluation_has_no_dropout_and_leaves_the_model_as_it_was(tiny_data):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=40, n_layer=1, n_head=2, n_embd=16, dropout=0.5, attn_dropout=0.5))
    before, random = {n: p.clone() for n, p in model.state_dict().items()}, torch.get_rng_state()
    corpus, rt = Corpus(tiny_data), runtime.start("cpu", "float32")
    losses = [evaluate(model, eval_batches(corpus, "val", 12, 16), rt).nats for _ in range(2)]
    assert losses[0] == losses[1] and model.training and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


@smoke
def test_a_stopped_evaluation_gives_none(tiny_run, tiny_data):
    model, _ = load_model(tiny_run)
    seen, rt = [], runtime.start("cpu", "float32")
    batches = (seen.append(1) or batch for batch in eval_batches(Corpus(tiny_data), "val", 12, 16))
    assert evaluate(model, batches, rt, should_stop=lambda: len(seen) == 3) is None and len(seen) == 3


@smoke
def test_several_paths_give_one_result_each_in_order(tmp_path, tiny_run, tiny_data, capsys):
    uniform_checkpoint(tmp_path / "uniform.pt", tiny_data)
    paths = [
        tiny_run,
        str(tmp_path / "uniform.pt"),
        os.path.join(tiny_run, "ckpt_last.pt"),
        os.path.join(tiny_run, "ckpt.pt"),
    ]
    found = results(capsys, *paths)
    assert [result["checkpoint"] for result in found] == paths and all(list(result) == KEYS for result in found)
    assert found[0]["loss"] == found[3]["loss"] != found[1]["loss"]


@smoke
def test_the_table_has_a_line_per_checkpoint(tmp_path, tiny_run, tiny_data, capsys):
    vocab_size = uniform_checkpoint(tmp_path / "uniform.pt", tiny_data)
    program.main([tiny_run, str(tmp_path / "uniform.pt"), "--device=cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split()[:2] == [tiny_run, "val"] and lines[-1].split()[0] == str(tmp_path / "uniform.pt")
    assert f"{math.log(vocab_size):.4f}" in lines[-1].split()
    assert all(word in lines[-3] for word in ("checkpoint", "split", "loss", "perplexity", "tokens"))


def test_json_is_all_that_goes_to_stdout(tmp_path, tiny_run):
    done = run("evaluate.py", os.path.join(tiny_run, "ckpt.pt"), "--json", cwd=tmp_path)
    (result,) = json.loads(done.stdout)
    assert list(result) == KEYS and result["split"] == "val" and not list(tmp_path.iterdir())


def test_json_is_all_that_goes_to_stdout_when_the_data_must_be_prepared_first(tmp_path):
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns("*.bin", "meta.*", "input.txt", "*.part", "__pycache__")
    for name in ("dongpt", "data"):
        shutil.copytree(os.path.join(ROOT, name), tree / name, ignore=ignored)
    for name in os.listdir(ROOT):
        if name.endswith(".py"):
            shutil.copy(os.path.join(ROOT, name), tree)
    folder = tree / "data" / "python_docs"
    shorten_python_docs(tree)
    fork_server.run([sys.executable, str(folder / "prepare.py")], check=True, capture_output=True)
    uniform_checkpoint(tmp_path / "ckpt.pt", str(folder))
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    torch.save({**checkpoint, "config": {"dataset": "python_docs"}}, tmp_path / "ckpt.pt")
    for name in ("train.bin", "val.bin", "meta.json"):
        (folder / name).unlink()
    done = fork_server.run(
        [sys.executable, str(tree / "evaluate.py"), str(tmp_path / "ckpt.pt"), "--json", "--batch_size=200"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and list(json.loads(done.stdout)[0]) == KEYS, done.stdout[:500] + done.stderr


def test_several_processes_print_one_list_with_the_figures_of_one_process(tmp_path, tiny_run, capsys):
    (alone,) = results(capsys, tiny_run)
    done = run_ranks("evaluate.py", tiny_run, "--json", "--device=cpu", cwd=tmp_path)
    (shared,) = json.loads(done.stdout)
    assert shared == {**alone, **{key: pytest.approx(alone[key], rel=1e-6) for key in KEYS[2:5]}}
    done = run_ranks("evaluate.py", tiny_run, "--device=cpu", cwd=tmp_path)
    assert len(done.stdout.splitlines()) == 2 and done.stderr.count("device: cpu") == 1


@pytest.mark.parametrize("name", ["quickstart", "bigram", "block_size=16"])
def test_a_run_directory_may_be_named_like_a_config_or_a_setting(tmp_path, tiny_run, capsys, monkeypatch, name):
    shutil.copytree(tiny_run, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    path = name if "=" not in name else f"{name}/ckpt.pt"
    (result,) = results(capsys, path)
    assert result["checkpoint"] == path and result["loss"] == results(capsys, tiny_run)[0]["loss"]


@smoke
@pytest.mark.parametrize("setting", ["--out_dir=out", "--init_from=gpt2"])
def test_a_path_and_another_name_of_a_model_are_refused_together(tiny_run, capsys, setting):
    with pytest.raises(UserError, match=f"both name a model: remove {setting.partition('=')[0]}"):
        program.main([tiny_run, setting, "--device=cpu"])
    assert capsys.readouterr().out == ""


@smoke
@pytest.mark.parametrize("size, is_finite", [(1e6, True), (math.nan, False)], ids=["huge weights", "nan"])
def test_json_stays_json_for_a_model_that_diverged(tmp_path, tiny_data, capsys, size, is_finite):
    vocab_size = uniform_checkpoint(tmp_path / "ckpt.pt", tiny_data)
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    weight = torch.full((vocab_size, 8), size)
    checkpoint["model"]["lm_head.weight"] = checkpoint["model"]["transformer.wte.weight"] = weight
    weight[::2] *= -1
    checkpoint["model"]["transformer.ln_f.weight"] += 1
    checkpoint["model"]["transformer.ln_f.bias"] += 1
    save(checkpoint, str(tmp_path / "ckpt.pt"))
    program.main([str(tmp_path / "ckpt.pt"), "--json", "--device=cpu"])
    (result,) = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert result["perplexity"] is None and (result["loss"] > 1000 if is_finite else result["loss"] is None)


@smoke
def test_another_dtype_is_taken_when_asked_for(tiny_run, capsys):
    (exact,) = results(capsys, tiny_run)
    (rounded,) = results(capsys, tiny_run, "--dtype=bfloat16")
    assert rounded["loss"] != exact["loss"] and rounded["loss"] == pytest.approx(exact["loss"], abs=0.02)


@smoke
def test_other_data_of_the_same_vocabulary_can_be_named(tmp_path, tiny_run, capsys):
    folder = write_corpus(tmp_path, generated_text(3000, seed=1))
    (result,) = results(capsys, tiny_run, f"--data_dir={folder}")
    assert result["tokens"] == Corpus(folder).lengths["val"] - 1


@smoke
def test_data_of_another_vocabulary_is_refused(tmp_path, tiny_run, capsys):
    folder = write_corpus(tmp_path, "abcdefgh" * 200)
    with pytest.raises(ValueError, match="vocabulary"):
        program.main([tiny_run, f"--data_dir={folder}", "--device=cpu"])
    assert capsys.readouterr().out == ""


@smoke
def test_results_on_different_texts_are_named_as_such(tmp_path, tiny_run, tiny_data, capsys):
    other = write_corpus(tmp_path / "other", generated_text(5000, seed=1))
    uniform_checkpoint(tmp_path / "same.pt", tiny_data)
    uniform_checkpoint(tmp_path / "other.pt", other)
    for args, differ in (
        ([tiny_run, str(tmp_path / "same.pt")], False),
        ([tiny_run, str(tmp_path / "other.pt")], True),
        ([tiny_run, str(tmp_path / "other.pt"), "--json"], True),
        ([tiny_run, str(tmp_path / "other.pt"), f"--data_dir={other}"], False),
        ([tiny_run], False),
    ):
        program.main([*args, "--device=cpu"])
        captured = capsys.readouterr()
        notes = [line for line in captured.err.splitlines() if "different data" in line]
        assert len(notes) == differ and "different data" not in captured.out, args
        assert not differ or f"{tmp_path / 'other.pt'} on {other}" in notes[0] and tiny_run in notes[0]


@smoke
def test_different_tokens_of_the_same_text_leave_the_bits_per_byte_comparable(tmp_path, capsys):
    text, paths = generated_text(3000), []
    for name, tokenizer in (("chars", CharTokenizer.from_text(text)), ("bytes", BPETokenizer(list(byte_alphabet())))):
        folder = write_splits(tmp_path / name, tokenizer, split_text(text))
        with open(os.path.join(folder, "meta.json"), "r+", encoding="utf-8") as file:
            meta = {**json.load(file), "sha256": "that of the text"}
            file.seek(0)
            json.dump(meta, file)
            file.truncate()
        paths.append(str(tmp_path / f"{name}.pt"))
        uniform_checkpoint(paths[-1], folder)
    program.main([*paths, "--device=cpu"])
    err = capsys.readouterr().err
    assert "different tokenizers: compare only bits/byte" in err and "different data" not in err


@smoke
def test_a_checkpoint_that_does_not_name_its_data_needs_it_named(tmp_path, tiny_run, tiny_data, capsys):
    checkpoint = torch.load(os.path.join(tiny_run, "ckpt.pt"), weights_only=True)
    path = str(tmp_path / "old.pt")
    save({key: checkpoint[key] for key in ("model", "model_args")}, path)
    with pytest.raises(ValueError, match="--data_dir"):
        program.main([path, "--device=cpu"])
    assert results(capsys, path, f"--data_dir={tiny_data}")[0]["loss"] == results(capsys, tiny_run)[0]["loss"]


@smoke
@pytest.mark.parametrize(
    "args, parts",
    [
        (["nothing.pt"], ["nothing.pt"]),
        (["--out_dir=nothing"], ["nothing"]),
        ([], ["out"]),
        (["--split=test"], ["split", "'val'"]),
        (["--batch_size=0"], ["batch_size"]),
        (["--jsn"], ["json"]),
    ],
)
def test_what_a_user_typed_wrong_is_refused(tmp_path, monkeypatch, args, parts):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as caught:
        program.main([*args, "--device=cpu"])
    assert all(part in str(caught.value) for part in parts) and "\n" not in str(caught.value)


def test_a_missing_checkpoint_beside_a_good_one_ends_in_one_sentence(tmp_path, tiny_run):
    done = run("evaluate.py", tiny_run, "nothing.pt", "--json", cwd=tmp_path, check=None)
    expect_sentence(done, "nothing.pt")
    assert done.stdout == ""


@smoke
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_the_keys(tmp_path, flag):
    assert "--split" in run("evaluate.py", flag, cwd=tmp_path).stdout


def test_a_hugging_face_folder_is_a_path(tmp_path, gpt2_vocabulary, capsys):
    from dongpt.text.tokenizers import GPT2Tokenizer

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_positions=32, n_embd=16, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "hf")
    write_splits(tmp_path / "data", GPT2Tokenizer(), split_text(generated_text(600)))
    (result,) = results(capsys, str(tmp_path / "hf"), f"--data_dir={tmp_path / 'data'}")
    assert result["loss"] == pytest.approx(math.log(50257), abs=0.5)
