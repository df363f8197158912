"""train.py under torchrun: two processes on one CPU do what one does, and end as one does."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import fork_server
import pytest
import torch
from helpers import (
    ROOT,
    TINY_RUN,
    assert_same,
    end_ranks,
    environment,
    generated_text,
    load,
    read_log,
    run,
    run_ranks,
    start_ranks,
    torchrun,
    visible,
    write_corpus,
)

import train
from dongpt import runtime
from dongpt.program import locked_directory

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="this torch has no gloo"
)
SETTINGS = [
    *TINY_RUN,
    "--gradient_accumulation_steps=4",
    "--max_iters=8",
    "--lr_decay_iters=8",
    "--eval_interval=4",
    "--eval_iters=7",
]  # dropout is on; the last batches of an evaluation are not full
CLOSE = dict(abs=1e-5, rel=0)  # DESIGN: gradients are added in another order, and nothing else differs


def numbers(out_dir, kind: str, *keys: str) -> list[float]:
    """The values of keys in all records of a kind, in their order."""
    return [record[key] for record in read_log(out_dir, kind) for key in ("iter", *keys)]


def assert_same_losses(one_dir, other_dir):
    for kind, keys in (("iter", ("loss", "lr")), ("eval", ("train_loss", "val_loss")), ("final", ("val_loss",))):
        assert numbers(one_dir, kind, *keys) == pytest.approx(numbers(other_dir, kind, *keys), **CLOSE), kind


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, tiny_data) -> str:
    """The out_dir of a run in a single process."""
    out_dir = str(tmp_path_factory.mktemp("one_process") / "out")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train.main([f"--data_dir={tiny_data}", f"--out_dir={out_dir}", *SETTINGS])
    torch.set_num_threads(threads)
    return out_dir


def test_two_processes_give_the_losses_of_one(tiny_data, tmp_path, one_process):
    done = run_ranks("train.py", f"--data_dir={tiny_data}", *SETTINGS, cwd=tmp_path)
    assert_same_losses(tmp_path / "out", one_process)
    for name in ("ckpt.pt", "ckpt_last.pt"):
        one, two = load(one_process, name), load(tmp_path / "out", name)
        assert two["iter_num"] == one["iter_num"] and two["windows"] == one["windows"]
        assert two["model"].keys() == one["model"].keys()  # no 'module.' in front
        for key in one["model"]:
            torch.testing.assert_close(two["model"][key], one["model"][key], rtol=0, atol=1e-4)

    # one process writes and speaks
    (header,) = read_log(tmp_path / "out", "header")
    assert header["world_size"] == 2
    assert [record["iter"] for record in read_log(tmp_path / "out", "iter")] == list(range(8))
    lines = done.stdout.splitlines()
    for pattern in (
        "tokens per iteration will be: 256 ",
        "settings: ",
        "text: ",
        "number of parameters",
        "device: cpu",
        "step 4:",
        "iter 5:",
        "final",
    ):
        assert len([line for line in lines if line.startswith(pattern)]) == 1, f"{pattern!r} in\n{done.stdout}"


def test_resume_of_two_processes_gives_the_losses_of_one_straight_run(tiny_data, tmp_path, one_process):
    """Stopped between two evaluations; the stop evaluates once more, which the straight run does not."""
    run_ranks("train.py", f"--data_dir={tiny_data}", *SETTINGS, "--max_iters=5", cwd=tmp_path)
    run_ranks("train.py", "--init_from=resume", "--out_dir=out", "--max_iters=8", cwd=tmp_path)
    assert numbers(tmp_path / "out", "iter", "loss") == pytest.approx(numbers(one_process, "iter", "loss"), **CLOSE)
    assert numbers(tmp_path / "out", "eval", "val_loss")[-2:] == pytest.approx(
        numbers(one_process, "eval", "val_loss")[-2:], **CLOSE
    )
    assert [record["iter"] for record in read_log(tmp_path / "out", "eval")] == [0, 4, 5, 8]
    assert len(read_log(tmp_path / "out", "header")) == 2


@pytest.mark.parametrize("with_torchrun", [True, False])
def test_bad_input_is_one_sentence_said_once(with_torchrun, tiny_data, tmp_path):
    """With torchrun, which reports the end of its processes too, and without."""
    settings = [*SETTINGS, "--gradient_accumulation_steps=3" if with_torchrun else "--backend=nccl"]
    args = ["train.py", f"--data_dir={tiny_data}", *settings]
    if with_torchrun:
        done, parts = run(*args, cwd=tmp_path, launcher=torchrun(2), check=None), ("gradient_accumulation_steps=3", "2")
    else:
        done, parts = run_ranks(*args, cwd=tmp_path, check=2), ("nccl", "gloo")
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert len(said) == 1, done.stderr
    for part in parts:
        assert part in said[0]
    assert 'train.py", line' not in done.stderr  # no traceback of ours; torchrun's own report has one
    assert os.listdir(tmp_path) == []


# ----------------------------------------------------------------------------------------------------------------------
# a stop of all ranks together


class Job:
    """train.py on two ranks whose lines can be waited for; with torchrun they are in a process group of their own."""

    def __init__(self, cwd, *args: str, with_torchrun: bool = False):
        if with_torchrun:
            launched = fork_server.Popen(
                [*torchrun(2), os.path.join(ROOT, "train.py"), *SETTINGS, *args],
                cwd=cwd,
                encoding="utf-8",
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            self.processes, kill = [launched], lambda: os.killpg(launched.pid, signal.SIGKILL)
        else:
            self.processes = start_ranks("train.py", *SETTINGS, *args, cwd=cwd)
            kill = self.processes[0].kill
        self.watchdog = threading.Timer(240, kill)
        self.watchdog.start()
        self.printed = ""

    def wait_for(self, start: str):
        for line in self.processes[0].stdout:
            self.printed += line
            if line.startswith(start):
                return
        raise AssertionError(self.printed + self.processes[0].stderr.read())

    def end(self) -> str:
        """Wait for the end; returns all that was printed."""
        done = end_ranks(self.processes)
        self.watchdog.cancel()
        assert done.returncode != 0
        self.printed, self.errors = self.printed + done.stdout, done.stderr
        return self.printed


needs_signals = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
ENDLESS = ["--max_iters=100000000", "--eval_interval=100000000"]


@needs_signals
@pytest.mark.parametrize("number, to", [(signal.SIGTERM, "torchrun"), (signal.SIGINT, "ranks")])
def test_a_signal_saves_the_state_of_a_step_boundary_whatever_log_interval_is(
    number, to, tiny_data, tmp_path, one_process
):
    """A scheduler signals torchrun, and Ctrl-C in a terminal signals every rank. The next test signals only rank 1.

    The signal used to be noticed only at the next logged update, which is 100,000 updates away here.
    """
    job = Job(tmp_path, f"--data_dir={tiny_data}", *ENDLESS, "--log_interval=100000", with_torchrun=to == "torchrun")
    job.wait_for("iter 0:")
    time.sleep(1)
    for process in job.processes if to == "ranks" else job.processes[-1:]:
        process.send_signal(number)
    printed = job.end()
    state = load(tmp_path / "out")
    assert 0 < state["iter_num"] < 100_000, printed + job.errors
    assert f"interrupted after {state['iter_num']} iterations" in printed
    (command,) = set(
        re.findall(r"torchrun .*--nproc_per_node=2 .*train\.py --init_from=resume --out_dir=out", printed)
    )  # said at the start, too
    assert sys.executable not in command
    assert numbers(tmp_path / "out", "iter", "loss") == pytest.approx(numbers(one_process, "iter", "loss")[:2], **CLOSE)


@needs_signals
def test_a_stop_and_a_resume_of_two_ranks_equal_a_straight_run_bit_for_bit(tiny_data, tmp_path):
    """Whichever update the signal meets."""
    job = Job(tmp_path, f"--data_dir={tiny_data}", *ENDLESS, "--decay_lr=False", "--log_interval=1000000")
    job.wait_for("iter 0:")
    job.processes[1].send_signal(signal.SIGTERM)
    job.end()
    stopped = load(tmp_path / "out")["iter_num"]
    shared = ["--eval_interval=100000000", f"--max_iters={stopped + 3}", "--decay_lr=False"]
    run_ranks("train.py", "--init_from=resume", "--out_dir=out", *shared, cwd=tmp_path)
    straight = ["--out_dir=straight", *SETTINGS, *shared]
    run_ranks("train.py", f"--data_dir={tiny_data}", *straight, cwd=tmp_path)
    for key in ("iter_num", "windows", "model", "optimizer"):
        assert_same(load(tmp_path / "out")[key], load(tmp_path / "straight")[key], key)


@needs_signals
def test_a_signal_to_one_rank_in_an_evaluation_abandons_it_on_all(tiny_data, tmp_path):
    """The first rank has a batch more than the other one; nothing was trained, so nothing is saved."""
    write_corpus(tmp_path / "long", generated_text(400_000))
    job = Job(tmp_path, "--data_dir=long", "--eval_iters=100000000")
    job.wait_for("device: ")
    time.sleep(1)
    job.processes[1].send_signal(signal.SIGTERM)
    printed = job.end()
    assert "interrupted before the first step: nothing was saved" in printed and "step 0" not in printed
    assert visible(tmp_path / "out") == []


@needs_signals
def test_max_minutes_end_several_ranks_together(tiny_data, tmp_path):
    more = ["--max_iters=100000000", "--eval_interval=100000000", "--log_interval=1000000", "--max_minutes=0.02"]
    done = run_ranks("train.py", f"--data_dir={tiny_data}", *SETTINGS, *more, cwd=tmp_path)
    assert "reached max_minutes=0.02" in done.stdout
    assert 0 < load(tmp_path / "out")["iter_num"] < 100_000_000 and len(read_log(tmp_path / "out", "final")) == 1


def test_ranks_ask_each_other_less_often_the_faster_their_steps_are(monkeypatch):
    """Steps of 1 ms: one all-reduce for many. Steps of 10 s: one for each, soon after they have become so slow."""
    clock, asked = [0.0], []
    monkeypatch.setattr(runtime.time, "monotonic", lambda: clock[0])

    class TwoRanks:
        world_size = 2

        def all_reduce_sum(self, *values):
            asked.append(clock[0])
            return [2 * value for value in values]

    stop = runtime.StopCheck(TwoRanks(), runtime.Interrupts())
    for _ in range(10_000):
        clock[0] += 0.001
        assert not stop("updates")
    assert len(asked) < 10 + 10_000 / runtime.STOP_CHECK_CALLS
    assert max(b - a for a, b in zip(asked, asked[1:])) < 1
    asked.clear()
    for _ in range(300):
        clock[0] += 10
        stop("updates")
    assert len(asked) >= 300 - runtime.STOP_CHECK_CALLS


def test_a_refusal_on_rank_0_ends_every_rank(tmp_path, tiny_data):
    """An out_dir that is locked: rank 0 says so, and rank 1 does not wait for it until torchrun kills it."""
    with locked_directory(str(tmp_path / "out")):
        done = run_ranks("train.py", f"--data_dir={tiny_data}", *SETTINGS, cwd=tmp_path, check=None)
    said = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert done.returncode != 0 and len(said) == 1 and "another process" in said[0], done.stderr
    assert 'train.py", line' not in done.stderr and visible(tmp_path / "out") == []
