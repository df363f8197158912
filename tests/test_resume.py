"""A run that stops, in good order or by force, and goes on: bit for bit what it would have been without the stop."""

import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time

import fork_server
import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    TINY_RUN,
    assert_same,
    assert_same_training,
    expect_sentence,
    generated_text,
    load,
    read_log,
    run,
    visible,
    write_splits,
)

import train
from configurator import UserError
from dongpt.text.tokenizers import CharTokenizer

TWELVE = [*TINY_RUN, "--lr_decay_iters=12", "--eval_interval=4"]  # dropout is on
ENDLESS = [*TINY_RUN, "--max_iters=1000000000", "--lr_decay_iters=100", "--eval_interval=5"]  # until a signal comes
pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tiny_data) -> str:
    """The out_dir of twelve updates without a stop, on one thread."""
    out_dir = str(tmp_path_factory.mktemp("straight") / "out")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert train.main([f"--out_dir={out_dir}", f"--data_dir={tiny_data}", *TWELVE, "--max_iters=12"]) == 0
    torch.set_num_threads(threads)
    return out_dir


@pytest.fixture
def start(tiny_data):
    """A function that trains from the beginning to an iteration, in out."""

    def begin(max_iters: int, *args: str) -> int:
        return train.main([f"--data_dir={tiny_data}", *TWELVE, f"--max_iters={max_iters}", *args])

    return begin


def resume(max_iters: int = 12, *args: str) -> int:
    """Go on in out; everything else comes from the checkpoint."""
    return train.main(["--init_from=resume", "--out_dir=out", f"--max_iters={max_iters}", *args])


def truncate(path, share: float = 0.6):
    with open(path, "r+b") as file:
        file.truncate(int(os.path.getsize(path) * share))


# ----------------------------------------------------------------------------------------------------------------------
# a stop in good order


@pytest.mark.parametrize("stops", [pytest.param((6,), marks=pytest.mark.smoke), (4,), (1, 2, 7, 11)])
def test_stopped_and_resumed_steps_equal_straight_steps_bit_for_bit(stops, start, straight):
    """At an evaluation (4), between two (6), often, and with a learning rate that decays and dropout."""
    start(stops[0])
    for stop in [*stops[1:], 12]:
        assert resume(stop) == 0
    assert_same_training("out", straight)
    assert len(read_log("out", "header")) == 1 + len(stops)


def test_other_evaluation_settings_on_the_way_change_nothing(start, straight):
    start(5, "--eval_interval=2", "--eval_iters=9", "--sample_tokens=5")
    resume(12, "--eval_interval=100", "--sample_tokens=0")
    assert_same_training("out", straight)


def test_settings_that_are_not_given_come_from_the_checkpoint(start, straight):
    start(6, "--seed=7", "--weight_decay=0.3")
    before = load("out")["config"]
    resume(8)
    changed = {key for key, value in load("out")["config"].items() if before[key] != value}
    assert changed == {"init_from", "max_iters"}


def test_a_given_setting_wins_from_the_command_line_and_from_a_file(start, tmp_path):
    start(6)
    (tmp_path / "more.py").write_text("learning_rate = 0.5\ngrad_clip = 0.25\n", encoding="utf-8")
    resume(7, "more.py", "--decay_lr=False")
    assert read_log("out", "iter")[-1]["lr"] == 0.5
    assert load("out")["config"]["grad_clip"] == 0.25
    resume(8, "--learning_rate=0.125")
    assert [record["lr"] for record in read_log("out", "iter")[-2:]] == [0.5, 0.125]


def test_a_given_dataset_wins_over_the_checkpoints_data_dir(start):
    """data_dir takes precedence over dataset, so the stored data_dir silently replaced the dataset that was given."""
    start(2)
    with pytest.raises(ValueError, match="no_such_corpus"):
        resume(4, "--dataset=no_such_corpus")


def test_a_renamed_out_dir_is_resumed_where_it_lies_now(tiny_data):
    """Without --out_dir the checkpoint was read in the default folder, and the run went on in the stored one."""
    train.main([f"--data_dir={tiny_data}", *TWELVE, "--max_iters=2", "--out_dir=before"])
    os.rename("before", "out")
    assert train.main(["--init_from=resume", "--max_iters=4"]) == 0
    assert not os.path.exists("before")
    assert load("out")["iter_num"] == 4


def test_resume_of_a_finished_run_ends_at_once_and_changes_no_weight(start, straight, capsys):
    """It ended with an AttributeError, since no log had been opened."""
    shutil.copytree(straight, "out")
    capsys.readouterr()
    assert resume(12) == 0
    assert not re.search("^iter ", capsys.readouterr().out, re.MULTILINE)
    assert_same_training("out", straight)
    assert_same(load("out", "ckpt.pt")["model"], load(straight, "ckpt.pt")["model"])
    assert len(read_log("out", "final")) == 1


def test_the_best_state_and_the_patience_survive_a_stop(tiny_data):
    """A learning rate that ruins the model after the stop: ckpt.pt stays the state from before."""
    shared = [f"--data_dir={tiny_data}", *TWELVE, "--eval_interval=1", "--decay_lr=False"]
    train.main([*shared, "--max_iters=3"])
    kept = load("out", "ckpt.pt")
    assert kept["iter_num"] == 3
    resume(100, "--learning_rate=3.0", "--patience=2")
    assert load("out")["iter_num"] == 5
    assert_same(load("out", "ckpt.pt"), kept)
    resume(100, "--learning_rate=3.0", "--patience=4")
    assert load("out")["iter_num"] == 7
    assert read_log("out", "final")[0]["iter"] == 3


def test_log_behind_the_checkpoint_is_cut_and_each_update_is_there_once(start, straight):
    """As after a kill: the log is ahead of the checkpoint, and a last line is half written."""
    start(4)
    shutil.copytree("out", "kept")
    resume(9)
    for name in ("ckpt.pt", "ckpt_last.pt"):
        shutil.copy(os.path.join("kept", name), "out")
    with open("out/log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"kind": "iter", "iter": 9, "lo')
    resume(12)
    assert_same_training("out", straight)
    assert [record["iter"] for record in read_log("out", "eval")] == [0, 4, 8, 12]
    assert len(read_log("out", "final")) == 1
    assert read_log("out")[0]["kind"] == "header"


def test_log_is_cut_too_when_it_is_written_more_rarely_after_the_resume(start):
    start(4)
    shutil.copytree("out", "kept")
    resume(9)
    for name in ("ckpt.pt", "ckpt_last.pt"):
        shutil.copy(os.path.join("kept", name), "out")
    resume(12, "--log_interval=5")
    assert [record["iter"] for record in read_log("out", "iter")] == [0, 1, 2, 3, 5, 10]
    assert read_log("out", "header")[-1]["iter"] == 4


# ----------------------------------------------------------------------------------------------------------------------
# damaged files


def test_a_truncated_ckpt_last_gives_way_to_the_older_ckpt_and_that_is_said(start, straight, capsys):
    start(4)
    shutil.copy("out/ckpt.pt", "older.pt")
    resume(8)
    shutil.copy("older.pt", "out/ckpt.pt")
    truncate("out/ckpt_last.pt")
    capsys.readouterr()
    assert resume(12) == 0
    said = capsys.readouterr()
    assert os.path.join("out", "ckpt_last.pt") in said.err and os.path.join("out", "ckpt.pt") in said.err
    assert len(said.err.strip().splitlines()) == 1
    assert_same_training("out", straight)


def test_a_newer_ckpt_is_resumed_when_ckpt_last_is_older(start, straight):
    start(4)
    shutil.copy("out/ckpt_last.pt", "older.pt")
    resume(8, "--always_save_checkpoint=True")
    shutil.copy("older.pt", "out/ckpt_last.pt")
    resume(12)
    assert_same_training("out", straight)


def test_a_truncated_ckpt_is_replaced_even_if_the_loss_never_gets_lower_again(start):
    """The damaged file once stayed for good, and each run ended on it."""
    start(6)
    truncate(os.path.join("out", "ckpt.pt"))
    assert resume(9, "--learning_rate=0", "--min_lr=0") == 0
    assert load("out", "ckpt.pt")["iter_num"] > 6


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_two_truncated_checkpoints_end_in_a_sentence(share, start):
    start(1)
    before = {}
    for name in ("ckpt.pt", "ckpt_last.pt"):
        truncate(os.path.join("out", name), share)
        before[name] = open(os.path.join("out", name), "rb").read()
    with pytest.raises(ValueError, match="ckpt_last.pt.*damaged.*ckpt.pt.*damaged"):
        resume(3)
    assert before == {name: open(os.path.join("out", name), "rb").read() for name in before}


# ----------------------------------------------------------------------------------------------------------------------
# other machines and other programs


def edit(change, names=("ckpt.pt", "ckpt_last.pt")):
    """Apply change to the checkpoints in out."""
    for name in names:
        checkpoint = load("out", name)
        change(checkpoint)
        torch.save(checkpoint, os.path.join("out", name))


def test_the_thread_count_of_the_run_before_is_taken(start, straight, capsys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # which would win
    start(6)
    torch.set_num_threads(2)  # as on another machine
    resume(12)
    assert torch.get_num_threads() == 1
    assert "not bitwise" not in capsys.readouterr().out
    assert_same_training("out", straight)


def test_more_threads_than_there_are_cores_are_not_taken_and_that_is_said(start, capsys):
    start(6)
    edit(lambda checkpoint: checkpoint["runtime"].update(threads=100_000))
    assert resume(8) == 0
    assert torch.get_num_threads() == 1
    assert "not bitwise" in capsys.readouterr().out


def test_the_dtype_of_the_run_before_is_taken_unless_another_is_given(start, capsys):
    start(2, "--dtype=bfloat16")
    capsys.readouterr()
    resume(4)
    said = capsys.readouterr().out
    assert "dtype: bfloat16" in said and "not bitwise" not in said
    resume(6, "--dtype=float32")
    said = capsys.readouterr().out
    assert "dtype: float32" in said and "not bitwise" in said


def test_a_checkpoint_of_nanogpt_is_resumed_on_a_cpu(start, straight, tiny_data, tmp_path):
    """It holds nanoGPT's six keys alone, names as torch.compile leaves them, and settings of a machine with a GPU."""
    start(6)
    ours = load("out")
    shutil.rmtree("out")
    theirs = {key: ours[key] for key in ("model", "optimizer", "model_args", "iter_num", "config")}
    theirs["model"] = {f"_orig_mod.{name}": tensor for name, tensor in ours["model"].items()}
    theirs["best_val_loss"] = torch.tensor(ours["best_val_loss"])
    for key in (
        "data_dir",
        "pos_embd",
        "attn_dropout",
        "activation",
        "tie_weights",
        "dataset_fraction",
        "patience",
        "max_minutes",
        "sample_tokens",
        "vocab_size",
    ):
        del theirs["config"][key]
    theirs["config"].update(
        device="cuda",
        dtype="float16",
        compile=True,
        backend="nccl",
        dataset="shakespeare_char",
        wandb_run_name="mini-gpt",
        out_dir="out-shakespeare-char",
    )
    os.makedirs("out")
    torch.save(theirs, "out/ckpt.pt")
    assert resume(12, f"--data_dir={tiny_data}", "--device=cpu") == 0
    assert_same(
        {key: load("out")[key] for key in ("iter_num", "model", "optimizer", "windows")},
        {key: load(straight)[key] for key in ("iter_num", "model", "optimizer", "windows")},
    )
    assert os.listdir(tmp_path) == ["out"]
    assert [record["iter"] for record in read_log("out", "iter")] == list(range(6, 12))


@pytest.mark.parametrize(
    "key, value",
    [
        ("n_layer", 3),
        ("n_head", 1),
        ("n_embd", 32),
        ("block_size", 8),
        ("bias", True),
        ("vocab_size", 64),
        ("activation", "gelu_tanh"),
        ("tie_weights", False),
    ],
)
def test_an_architecture_that_contradicts_the_checkpoint_is_refused_with_both_values(key, value, start, straight):
    shutil.copytree(straight, "out")
    stored = {**load("out")["config"], **load("out")["model_args"]}[key]
    before = {name: open(os.path.join("out", name), "rb").read() for name in os.listdir("out")}
    with pytest.raises(ValueError) as error:
        resume(20, f"--{key}={value}")
    assert key in str(error.value) and repr(stored) in str(error.value) and repr(value) in str(error.value)
    assert before == {name: open(os.path.join("out", name), "rb").read() for name in os.listdir("out")}


def test_an_architecture_that_agrees_with_the_checkpoint_may_be_given_again(start, straight):
    start(6)
    train.main([*TWELVE, "--init_from=resume", "--max_iters=12"])  # the whole command line once more
    assert_same_training("out", straight)


# ----------------------------------------------------------------------------------------------------------------------
# a stop by force


class Died(BaseException):
    """Stands for the end of the process."""


def test_a_death_at_any_write_loses_nothing_that_a_resume_does_not_bring_back(start, straight, tiny_data, monkeypatch):
    """Each file gets its name by os.replace: die before the first one, the second one, ... and go on."""
    replace, left = os.replace, [10**9]

    def mortal(*args):
        if left[0] == 0:
            raise Died
        left[0] -= 1
        replace(*args)

    monkeypatch.setattr(os, "replace", mortal)
    for n_writes in range(20):
        shutil.rmtree("out", ignore_errors=True)
        left[0] = n_writes
        try:
            start(12, "--eval_interval=6")
            break  # there were no more writes
        except Died:
            left[0] = 10**9
            if os.path.exists("out/ckpt_last.pt") or os.path.exists("out/ckpt.pt"):
                resume(12)
            else:
                start(12, "--eval_interval=6")
        where = f"died before write {n_writes + 1}"
        newest = max(("ckpt_last.pt", "ckpt.pt"), key=lambda name: load("out", name)["iter_num"])  # what a resume takes
        for key in ("iter_num", "windows", "model", "optimizer"):
            assert_same(load("out", newest)[key], load(straight)[key], f"{where}: {newest}, {key}")
        assert [r["iter"] for r in read_log("out", "iter")] == list(range(12)), where
        for key in ("iter_num", "best_val_loss", "model"):
            assert_same(load("out", "ckpt.pt")[key], load(straight, "ckpt.pt")[key], f"{where}: ckpt.pt, {key}")
        assert read_log("out", "final")[0]["iter"] == read_log(straight, "final")[0]["iter"], where
    assert n_writes > 4


class Program:
    """train.py in a process of its own, whose lines can be waited for."""

    def __init__(self, *args: str, cwd=".", command=None, seconds: float = 150):
        self.process = fork_server.Popen(
            command or [sys.executable, os.path.join(ROOT, "train.py"), *args],
            cwd=cwd,
            text=True,
            encoding="utf-8",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.watchdog = threading.Timer(seconds, self.process.kill)
        self.watchdog.start()
        self.lines = []

    def wait_for(self, pattern: str) -> bool:
        """Read lines until one matches; False if the program ended before."""
        for line in self.process.stdout:
            self.lines.append(line)
            if re.match(pattern, line):
                return True
        return False

    def end(self, number: int | None = None) -> tuple[int, str, str]:
        """Send the signal if there is one; returns the exit code and what was printed once the program has ended."""
        if number is not None:
            self.process.send_signal(number)
        out, err = self.process.communicate()
        self.watchdog.cancel()
        return self.process.returncode, "".join(self.lines) + out, err


@pytest.fixture(scope="module")
def long_data(tmp_path_factory) -> str:
    """A corpus whose train split takes seconds to evaluate."""
    text = generated_text(60_000)
    texts = {"train": text, "val": text[:2000]}
    return write_splits(tmp_path_factory.mktemp("long_data"), CharTokenizer.from_text(text), texts)


needs_signals = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")


@needs_signals
def test_kills_at_random_moments_and_resumes_equal_the_straight_run(tiny_data):
    moments = random.Random(0)
    args = [f"--data_dir={tiny_data}", *ENDLESS]
    for _ in range(4):
        program = Program(*args)
        assert program.wait_for("iter ")
        time.sleep(moments.uniform(0, 0.2))
        program.process.kill()
        assert program.end()[0] != 0
        saved = max((load("out", name)["iter_num"] for name in visible("out") if name.endswith(".pt")), default=0)
        args = ["--init_from=resume", "--out_dir=out"] if saved else args
    end = f"--max_iters={saved + 7}"
    assert train.main([*args, end]) == 0
    assert train.main([f"--data_dir={tiny_data}", *ENDLESS, "--out_dir=straight", end]) == 0
    assert_same_training("out", "straight")
    for name in ("ckpt.pt", "ckpt_last.pt"):
        assert load("out", name)["iter_num"] == load("straight", name)["iter_num"]
    assert [r["iter"] for r in read_log("out", "eval")] == [r["iter"] for r in read_log("straight", "eval")]


@needs_signals
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_saves_its_state_and_prints_the_command_that_goes_on(number, code, tiny_data):
    program = Program(f"--data_dir={tiny_data}", *ENDLESS, "--out_dir=my out")
    assert program.wait_for("iter 7:")
    exit_code, printed, errors = program.end(number)
    assert exit_code == code and "Traceback" not in errors
    stopped = load("my out")["iter_num"]
    assert stopped > 7
    assert printed.splitlines()[-2].count(str(stopped))
    words, end = shlex.split(printed.splitlines()[-1]), f"--max_iters={stopped + 3}"
    assert words[0] == "python"
    code, printed, errors = Program(command=[sys.executable, *words[1:], end]).end()
    assert code == 0, errors
    assert train.main([f"--data_dir={tiny_data}", *ENDLESS, "--out_dir=straight", end]) == 0
    assert_same_training("my out", "straight")


@needs_signals
def test_an_interrupt_before_the_first_step_saves_nothing_and_says_so(long_data, tmp_path):
    program = Program(f"--data_dir={long_data}", *TINY_RUN, "--eval_iters=1000000")
    assert program.wait_for("device: ")
    time.sleep(0.2)
    code, printed, errors = program.end(signal.SIGINT)
    assert code == 130 and "Traceback" not in errors
    assert "nothing was saved" in printed and "step 0" not in printed  # the evaluation was abandoned
    assert visible("out") == []


@needs_signals
def test_an_interrupt_in_an_evaluation_abandons_it_and_saves_the_state(start, long_data):
    start(2, f"--data_dir={long_data}", "--eval_interval=3")
    program = Program("--init_from=resume", "--out_dir=out", "--max_iters=12", "--eval_iters=1000000")
    assert program.wait_for("iter 2:")
    time.sleep(0.2)
    code, printed, _ = program.end(signal.SIGTERM)
    assert code == 143 and "step 3" not in printed and "--init_from=resume" in printed.splitlines()[-1]
    assert load("out")["iter_num"] == 3
    resume(12, "--eval_iters=2")
    assert [record["iter"] for record in read_log("out", "eval")] == [0, 2, 3, 6, 9, 12]
    assert [record["iter"] for record in read_log("out", "iter")] == list(range(12))


@needs_signals
def test_a_second_interrupt_leaves_at_once(start):
    """In the middle of a step that would take half a minute; the checkpoints stay as they were."""
    start(4)
    before = {name: open(os.path.join("out", name), "rb").read() for name in ("ckpt.pt", "ckpt_last.pt")}
    program = Program("--init_from=resume", "--out_dir=out", "--max_iters=12", "--gradient_accumulation_steps=5000")
    assert program.wait_for("device: ")
    time.sleep(0.2)
    program.process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert program.process.poll() is None
    code, printed, errors = program.end(signal.SIGINT)
    assert code == 130 and "Traceback" not in errors
    assert not re.search("^iter |interrupted", printed, re.MULTILINE)  # no step was completed
    assert before == {name: open(os.path.join("out", name), "rb").read() for name in before}


# ----------------------------------------------------------------------------------------------------------------------
# two runs with one out_dir


@needs_signals
def test_a_second_run_in_an_out_dir_is_refused_and_touches_nothing(tiny_data, tmp_path):
    """While the first one evaluates before its first save, and while it trains; it is halted meanwhile. The second one
    moved the files of the first one to old-1; either of them could then fail, or the files of both got mixed."""
    first = Program(f"--data_dir={tiny_data}", *ENDLESS, "--eval_interval=1000000000", "--eval_iters=100")
    second = [f"--data_dir={tiny_data}", *TINY_RUN, "--out_dir=out"]
    for line in ("device: ", "iter "):
        assert first.wait_for(line)
        first.process.send_signal(signal.SIGSTOP)
        before = {name: os.stat(os.path.join("out", name)).st_ino for name in os.listdir("out")}
        expect_sentence(run("train.py", *second, cwd=tmp_path, check=None), "out", "another process")
        assert before == {name: os.stat(os.path.join("out", name)).st_ino for name in os.listdir("out")}
        assert not [name for name in os.listdir("out") if name.startswith("old-")]
        first.process.send_signal(signal.SIGCONT)
    assert train.main([*second, "--eval_only=True", "--eval_iters=1"]) == 0  # which writes nothing
    with pytest.raises(UserError, match="another process|no checkpoint"):
        resume(12)
    assert first.process.poll() is None  # it held the lock all the time
    first.process.kill()
    first.end()
    assert train.main([*second, "--max_iters=1", "--eval_iters=1"]) == 0  # a killed run locks nobody out
    assert load("out")["iter_num"] == 1


def test_the_lock_is_released_whatever_ends_a_run(tiny_data, monkeypatch):
    args = [f"--data_dir={tiny_data}", *TINY_RUN, "--max_iters=1"]
    for error in (KeyboardInterrupt, RuntimeError, Died):

        def fail(*_):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(train.TrainStep, "__call__", fail)
            with pytest.raises(error):
                train.main(args)
        assert "log.jsonl" in visible("out") and not [name for name in visible("out") if name.endswith(".pt")]
    assert train.main(args) == 0


def test_a_resume_of_a_file_that_another_run_has_just_written_is_refused(start, monkeypatch):
    """The other run ended between reading the checkpoint and locking the directory."""
    start(2)
    make_optimizer = train.optim.make_optimizer

    def make_late(*args):
        os.utime("out/ckpt_last.pt", ns=(0, 1))
        return make_optimizer(*args)

    monkeypatch.setattr(train.optim, "make_optimizer", make_late)
    with pytest.raises(UserError, match="ckpt_last.pt has just been written by another process"):
        resume(4)


# ----------------------------------------------------------------------------------------------------------------------
# what stands in a checkpoint is checked


@pytest.fixture(scope="module")
def two_updates(tmp_path_factory, tiny_data) -> str:
    """The out_dir of two updates."""
    out_dir = str(tmp_path_factory.mktemp("two_updates") / "out")
    train.main([f"--data_dir={tiny_data}", f"--out_dir={out_dir}", *TWELVE, "--max_iters=2"])
    return out_dir


@pytest.mark.parametrize(
    "change, part",
    [
        (lambda c: c["config"].update(batch_size="2"), "batch_size"),
        (lambda c: c["config"].update(batch_size=0), "batch_size=0"),
        (lambda c: c["config"].update(learning_rate="fast"), "learning_rate"),
        (lambda c: c["config"].update(dataset_fraction=2.0), "dataset_fraction=2.0"),
        (lambda c: c["config"].update(decay="sudden"), "decay"),
        (lambda c: c["config"].update(seed=None), "seed"),
        (lambda c: c.update(config=[1]), "config"),
        (lambda c: c.update(iter_num="9"), "iter_num"),
        (lambda c: c.update(iter_num=-1), "iter_num"),
        (lambda c: c.update(windows=1.5), "windows"),
        (lambda c: c.update(best_val_loss="low"), "best_val_loss"),
        (lambda c: c.update(evaluated_at=[]), "evaluated_at"),
        (lambda c: c.update(evals_since_best="1"), "evals_since_best"),
        (lambda c: c.update(wandb_run_id=5), "wandb_run_id"),
        (lambda c: c.update(runtime="cpu"), "runtime"),
        (lambda c: c["runtime"].update(dtype="int3"), "dtype"),
        (lambda c: c["runtime"].update(threads="4"), "threads"),
        (lambda c: c["runtime"].pop("compile"), "compile"),
        (lambda c: c["runtime"].pop("device"), "device"),
        (lambda c: (c["config"].update(document_mask=True), c.update(tokenizer=None)), "document_mask"),
    ],
)
def test_a_value_in_a_checkpoint_that_cannot_be_is_a_sentence_that_names_the_file(change, part, two_updates):
    """{"batch_size": "2"} ended in a TypeError somewhere, a missing key in a KeyError."""
    shutil.copytree(two_updates, "out")
    edit(change)
    before = {name: open(os.path.join("out", name), "rb").read() for name in visible("out")}
    with pytest.raises(UserError) as error:
        resume(4)
    assert part in str(error.value) and "ckpt" in str(error.value) and "\n" not in str(error.value)
    assert before == {name: open(os.path.join("out", name), "rb").read() for name in visible("out")}


def test_keys_in_a_checkpoints_config_that_are_no_settings_are_ignored(two_updates):
    """{"check": 1} and {"positions": "x"} replaced methods of the settings."""
    shutil.copytree(two_updates, "out")
    edit(lambda c: c["config"].update(check=1, positions="x", __post_init__=None, hasattr=[1]))
    assert resume(3) == 0
    assert load("out")["iter_num"] == 3 and "check" not in load("out")["config"]


def test_the_order_of_windows_is_noted(two_updates):
    assert load(two_updates)["window_order"] == "numpy.random.Generator.permutation"


def test_an_older_checkpoint_of_a_very_large_corpus_is_not_bitwise_and_says_so(two_updates, monkeypatch, capsys):
    """Epochs of more than 2**20 windows were visited in the order of a Feistel network."""
    shutil.copytree(two_updates, "out")
    edit(lambda c: c.pop("window_order"))
    shutil.copytree("out", "small")
    with monkeypatch.context() as patch:
        patch.setattr(train.Corpus, "windows_per_epoch", lambda self, block_size: 2**20 + 1)
        patch.setattr(train.Corpus, "window_starts", lambda self, first, count, *_: np.arange(count))
        assert resume(3) == 0
    assert "not bitwise reproducible: corpora of this size" in capsys.readouterr().out
    assert train.main(["--init_from=resume", "--out_dir=small", "--max_iters=3"]) == 0
    assert "not bitwise" not in capsys.readouterr().out
