"""What a user can get wrong: each ends in one sentence and exit code 2, with nothing written and nothing lost."""

import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from helpers import TINY_RUN, expect_sentence, generated_text, run, snapshot, write_corpus

import train
from configurator import UserError


@pytest.fixture
def refuse(tmp_path, tiny_data, tiny_run, monkeypatch):
    """A function that calls train.main in a folder with data and a finished run in out, and checks how it refuses.

    as_program starts a process instead, as a user does, for its exit code and for what it prints.
    """
    shutil.copytree(tiny_data, tmp_path / "data")
    shutil.copytree(tiny_run, tmp_path / "out")
    monkeypatch.chdir(tmp_path)

    def check(*args: str, parts=(), settings=("--data_dir=data", *TINY_RUN), as_program: bool = False):
        settings = ("--out_dir=out", *settings)
        before = snapshot(tmp_path)
        if as_program:
            expect_sentence(run("train.py", *settings, *args, cwd=tmp_path, check=None), "train.py: ", *parts)
        else:
            with pytest.raises(UserError) as error:
                train.main([*settings, *args])
            assert "\n" not in str(error.value)
            for part in parts:
                assert part in str(error.value)
        assert snapshot(tmp_path) == before

    return check


# ----------------------------------------------------------------------------------------------------------------------
# settings


def test_a_misspelt_key_on_the_command_line(refuse):
    refuse("--bach_size=3", parts=("command line", "'bach_size'", "did you mean 'batch_size'"), as_program=True)


def test_a_misspelt_key_in_a_file(refuse, tmp_path):
    (tmp_path / "mine.py").write_text("n_layer = 2\nlerning_rate = 1e-3\n", encoding="utf-8")
    refuse("mine.py", parts=("mine.py", "'lerning_rate'", "did you mean 'learning_rate'"))


def test_an_error_inside_a_config_file(refuse, tmp_path):
    (tmp_path / "mine.py").write_text("batch_size = 4\nlearning_rate = lr\n", encoding="utf-8")
    refuse("mine.py", parts=("mine.py", "line 2", "'lr'"))


def test_a_wrong_type_in_a_file(refuse, tmp_path):
    (tmp_path / "mine.py").write_text("batch_size = '64'\n", encoding="utf-8")
    refuse("mine.py", parts=("mine.py", "batch_size", "int", "'64'"))


def test_a_wrong_type_on_the_command_line(refuse):
    refuse("--max_iters=1e-3", parts=("command line", "max_iters", "int", "0.001"))


def test_a_last_key_without_its_value(refuse):
    refuse(
        "--max_iters", parts=("command line", "--max_iters needs a value (int)", "--max_iters=VALUE"), as_program=True
    )


def test_a_config_file_that_is_not_there(refuse):
    refuse("config/train_don_chr.py", parts=("config/train_don_chr.py", "config/train_don_char.py"))


def test_n_embd_that_is_not_a_multiple_of_n_head(refuse):
    refuse("--n_embd=17", "--n_head=2", parts=("n_embd=17", "n_head=2"))


def test_several_numbers_out_of_range_are_all_named(refuse):
    refuse(
        "--batch_size=0",
        "--eval_interval=0",
        "--dataset_fraction=1.5",
        parts=("batch_size=0", "eval_interval=0", "dataset_fraction=1.5"),
    )


def test_a_device_that_is_none(refuse):
    refuse("--device=nonsense", parts=("device='nonsense'", "cpu", "cuda", "mps"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none(refuse):
    refuse("--device=cuda", parts=("device='cuda'", "device=cpu"))


def test_an_out_dir_that_cannot_be_written(refuse, tmp_path):
    (tmp_path / "a_file").write_text("in the way", encoding="utf-8")
    refuse(f"--out_dir={os.path.join('a_file', 'out')}", parts=("a_file", "cannot be written"))
    refuse("--out_dir=a_file", parts=("a_file", "cannot be written"))


# ----------------------------------------------------------------------------------------------------------------------
# data


def test_a_dataset_that_is_not_there(refuse):
    refuse("--dataset=nowhere", settings=TINY_RUN, parts=("nowhere", "prepare.py", "python_docs"), as_program=True)


def test_a_train_split_of_block_size_tokens(refuse, tmp_path):
    text = generated_text(100)
    write_corpus(str(tmp_path / "short"), text)
    n_tokens = os.path.getsize(tmp_path / "short" / "train.bin") // 2
    refuse(
        "--data_dir=short",
        f"--block_size={n_tokens}",
        parts=("train.bin", f"{n_tokens} tokens", f"block_size={n_tokens}"),
    )


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_an_empty_bin(name, refuse, tmp_path):
    os.truncate(tmp_path / "data" / name, 0)
    refuse(parts=(name, "empty"))


def test_a_bin_that_was_cut_off(refuse, tmp_path):
    path = tmp_path / "data" / "train.bin"
    os.truncate(path, os.path.getsize(path) // 4 * 2)
    refuse(parts=("train.bin", "meta.json", "bytes"))


def test_bins_with_ids_beyond_the_vocabulary(refuse, tmp_path):
    path = tmp_path / "data" / "train.bin"
    ids = np.fromfile(path, dtype="<u2")
    ids[1000] = 4321
    ids.tofile(path)
    refuse(parts=("train.bin", "4321", "vocabulary"))


@pytest.mark.parametrize("start", ["resume", "out"])
def test_bins_of_another_vocabulary_than_the_checkpoints(start, refuse, tmp_path):
    """As many characters, but others: every id fits, and every one means something else."""
    write_corpus(str(tmp_path / "other"), generated_text().replace("k", "q"))
    refuse("--data_dir=other", f"--init_from={start}", parts=("vocabulary", "out"))


def test_a_vocab_size_below_that_of_the_data(refuse):
    refuse("--vocab_size=7", parts=("vocab_size=7",))


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints


def test_a_resume_whose_architecture_contradicts_the_checkpoint(refuse):
    refuse("--init_from=resume", "--n_layer=3", settings=["--max_iters=9"], parts=("n_layer", "3", "2"))


def test_a_warm_start_whose_architecture_contradicts_the_checkpoint(refuse):
    refuse("--init_from=out", "--n_layer=3", "--out_dir=new", parts=("n_layer", "3", "2"))


@pytest.mark.parametrize("key, value", [("n_embd", 16), ("n_head", 2), ("vocab_size", 25)])
def test_an_architecture_that_agrees_with_the_checkpoint_is_no_mistake(key, value, refuse, tmp_path, monkeypatch):
    """--n_embd=16 alone was refused as no multiple of 12, the default of n_head, though the checkpoint has n_head=2."""
    monkeypatch.chdir(tmp_path)
    assert train.main(["--init_from=resume", "--out_dir=out", f"--{key}={value}", "--max_iters=7"]) == 0
    args = ["--data_dir=data", "--device=cpu", "--eval_iters=1", "--batch_size=2", "--gradient_accumulation_steps=1"]
    assert train.main(["--init_from=out", "--out_dir=new", f"--{key}={value}", "--max_iters=1", *args]) == 0


def test_a_resume_where_there_is_no_run(refuse):
    refuse("--init_from=resume", "--out_dir=nowhere", settings=(), parts=("nowhere", "checkpoint"))


@pytest.mark.parametrize("path", ["nowhere.pt", "data"])
def test_a_warm_start_from_what_is_no_checkpoint(path, refuse):
    refuse(f"--init_from={path}", parts=(path, "checkpoint"))


def test_a_truncated_checkpoint(refuse, tmp_path):
    path = tmp_path / "out" / "ckpt.pt"
    os.truncate(path, os.path.getsize(path) // 2)
    refuse("--init_from=out/ckpt.pt", parts=("ckpt.pt", "damaged"))


def test_a_checkpoint_cut_off_at_any_place_is_a_sentence_too(tiny_run, tiny_data, tmp_path, monkeypatch):
    """In this process, for many lengths. The first bytes alone can look like a pickle, which is refused as such."""
    monkeypatch.chdir(tmp_path)
    content = open(os.path.join(tiny_run, "ckpt.pt"), "rb").read()
    for length in [1, 2, 3, 10, 64, 100, 1000, *range(5000, len(content), len(content) // 20), len(content) - 1]:
        with open("cut.pt", "wb") as file:
            file.write(content[:length])
        with pytest.raises(ValueError, match="cut.pt.*(damaged|rejected)"):
            train.main([f"--data_dir={tiny_data}", *TINY_RUN, "--init_from=cut.pt"])
    assert os.listdir(tmp_path) == ["cut.pt"]


class Malicious:
    """Makes a file when it is unpickled."""

    def __reduce__(self):
        return open, ("was_run.txt", "w")


def write_malicious(path, how: str):
    checkpoint = {"model": {}, "model_args": {}, "iter_num": 10**6, "evil": Malicious()}
    if how == "zip":
        torch.save(checkpoint, path)
    else:
        with open(path, "wb") as file:
            pickle.dump(checkpoint, file)


def test_a_malicious_pickle_is_refused_and_not_run(refuse, tmp_path):
    write_malicious(tmp_path / "evil.pt", "zip")
    refuse("--init_from=evil.pt", parts=("evil.pt", "rejected", "not run"), as_program=True)  # and no file appeared


def test_a_malicious_bare_pickle_is_refused_and_not_run_by_a_resume(refuse, tmp_path):
    for name in ("ckpt.pt", "ckpt_last.pt"):
        write_malicious(tmp_path / "out" / name, "bare")
    refuse("--init_from=resume", settings=(), parts=("ckpt.pt", "ckpt_last.pt"))


def test_a_malicious_ckpt_last_is_passed_over_for_the_valid_ckpt(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "out")
    write_malicious(tmp_path / "out" / "ckpt_last.pt", "zip")
    done = run("train.py", "--init_from=resume", "--out_dir=out", "--max_iters=7", cwd=tmp_path)
    assert "ckpt_last.pt was rejected" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert os.listdir(tmp_path) == ["out"]
    assert torch.load(tmp_path / "out" / "ckpt_last.pt", weights_only=True)["iter_num"] == 7


def test_a_meta_pkl_that_asks_to_run_code_is_refused_and_not_run(refuse, tmp_path):
    os.remove(tmp_path / "data" / "meta.json")
    with open(tmp_path / "data" / "meta.pkl", "wb") as file:
        pickle.dump({"vocab_size": 1, "itos": {0: "a"}, "stoi": Malicious()}, file)
    refuse(parts=("meta.pkl", "no code in it was run"))
