"""train.py under torchrun: two processes on one CPU do what one does, and end as one does."""

import os
import re
import signal
import subprocess
import sys
import threading

import pytest
import torch
from helpers import ROOT, TINY_RUN, load, read_log, run, torchrun

import train

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
    done = run("train.py", f"--data_dir={tiny_data}", *SETTINGS, cwd=tmp_path, launcher=torchrun(2))
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
        "Initializing a new model",
        "found vocab_size",
        "number of parameters",
        "Overriding: n_embd",
        "device: cpu",
        "step 4:",
        "iter 5:",
        "final",
    ):
        assert len([line for line in lines if line.startswith(pattern)]) == 1, f"{pattern!r} in\n{done.stdout}"


def test_resume_of_two_processes_gives_the_losses_of_one_straight_run(tiny_data, tmp_path, one_process):
    """Stopped between two evaluations; the stop evaluates once more, which the straight run does not."""
    run("train.py", f"--data_dir={tiny_data}", *SETTINGS, "--max_iters=5", cwd=tmp_path, launcher=torchrun(2))
    run("train.py", "--init_from=resume", "--out_dir=out", "--max_iters=8", cwd=tmp_path, launcher=torchrun(2))
    assert numbers(tmp_path / "out", "iter", "loss") == pytest.approx(numbers(one_process, "iter", "loss"), **CLOSE)
    assert numbers(tmp_path / "out", "eval", "val_loss")[-2:] == pytest.approx(
        numbers(one_process, "eval", "val_loss")[-2:], **CLOSE
    )
    assert [record["iter"] for record in read_log(tmp_path / "out", "eval")] == [0, 4, 5, 8]
    assert len(read_log(tmp_path / "out", "header")) == 2


@pytest.mark.parametrize(
    "settings, parts",
    [
        (("--gradient_accumulation_steps=3",), ("gradient_accumulation_steps=3", "2")),
        (("--backend=nccl",), ("nccl", "gloo")),
    ],
)
def test_bad_input_under_torchrun_is_one_sentence_said_once(settings, parts, tiny_data, tmp_path):
    done = run(
        "train.py", f"--data_dir={tiny_data}", *SETTINGS, *settings, cwd=tmp_path, launcher=torchrun(2), check=None
    )
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]  # torchrun reports too
    assert len(said) == 1, done.stderr
    for part in parts:
        assert part in said[0]
    assert "Traceback" not in done.stderr.split("torch/distributed")[0] or 'train.py", line' not in done.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
@pytest.mark.parametrize("number, whole_group", [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_signal_to_torchrun_saves_the_state_of_a_step_boundary(number, whole_group, tiny_data, tmp_path, one_process):
    """From a scheduler, and as Ctrl-C in a terminal, which every process of the group gets."""
    process = subprocess.Popen(
        [
            *torchrun(2),
            os.path.join(ROOT, "train.py"),
            f"--data_dir={tiny_data}",
            *SETTINGS,
            "--log_interval=1",
            "--max_iters=1000000",
            "--eval_interval=1000000",
        ],
        cwd=tmp_path,
        text=True,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    watchdog = threading.Timer(120, os.killpg, (process.pid, signal.SIGKILL))
    watchdog.start()
    printed = ""
    for line in process.stdout:
        printed += line
        if line.startswith("iter 20:"):
            break
    if whole_group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    rest, errors = process.communicate()
    watchdog.cancel()
    assert process.returncode != 0
    state = load(tmp_path / "out")
    assert state["iter_num"] > 20, printed + rest + errors
    assert [record["iter"] for record in read_log(tmp_path / "out", "iter")] == list(range(state["iter_num"]))
    assert numbers(tmp_path / "out", "iter", "loss")[:4] == pytest.approx(
        numbers(one_process, "iter", "loss")[:4], **CLOSE
    )
    (command,) = re.findall(r"torchrun .*--nproc_per_node=2 .*train\.py --init_from=resume --out_dir=out", rest)
    assert sys.executable not in command
