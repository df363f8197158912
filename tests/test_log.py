"""What a run writes down: log.jsonl, loss.png, and the peak speeds behind MFU."""

import json
import math
import os
import subprocess
import sys

import fork_server
import pytest
from helpers import ROOT

from configurator import UserError
from dongpt.log import RunLog, draw_loss, peak_flops, read_log, records_before, warn_if_long_run

pytestmark = pytest.mark.smoke


def write_log(folder, *records: dict, header: dict | None = None, kept=()) -> str:
    """A log.jsonl of a header and records {"kind": ..., ...} in folder; returns folder."""
    log = started_log(folder, header or {"config": {"out_dir": "out"}, "iter": 0}, kept)
    for record in records:
        log.write(**record)
    log.file.close()
    return str(folder)


def started_log(folder, header: dict, kept=()) -> RunLog:
    """A log whose file is there already, with its header."""
    log = RunLog(str(folder), lambda: (list(kept), header, None))
    log.file = log.open()
    return log


def strict(line: str) -> dict:
    """line read as strict JSON: NaN and Infinity, which Python's own reader takes, are errors."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(line, parse_constant=refuse)


ITERS = [{"kind": "iter", "iter": i, "loss": 3.0 - i / 10} for i in range(10)]


def test_a_log_is_a_header_and_records_in_order(tmp_path):
    write_log(tmp_path, *ITERS, header={"config": {"out_dir": "señor"}, "iter": 0})
    lines = (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert strict(lines[0]) == {"kind": "header", "config": {"out_dir": "señor"}, "iter": 0}
    assert [strict(line) for line in lines[1:]] == ITERS == read_log(str(tmp_path))[1:]
    assert os.listdir(tmp_path) == ["log.jsonl"]


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    write_log(tmp_path, {"kind": "iter", "iter": 0, "loss": math.nan, "lr": math.inf, "ms": -math.inf, "x": 1e300})
    line = (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    assert strict(line) == {"kind": "iter", "iter": 0, "loss": None, "lr": None, "ms": None, "x": 1e300}


def test_a_header_is_strict_json_too(tmp_path):
    write_log(tmp_path, header={"config": {"grad_clip": math.inf, "min_lr": math.nan}, "iter": 0})
    header = strict((tmp_path / "log.jsonl").read_text(encoding="utf-8"))
    assert header == {"kind": "header", "config": {"grad_clip": None, "min_lr": None}, "iter": 0}


def test_records_are_on_disk_at_once(tmp_path):
    log = started_log(tmp_path, {"iter": 0})
    log.write("iter", iter=0, loss=1.5)
    assert read_log(str(tmp_path))[-1] == {"kind": "iter", "iter": 0, "loss": 1.5}
    log.file.close()


def test_no_log_has_no_records(tmp_path):
    assert read_log(str(tmp_path)) == read_log(str(tmp_path / "nothing")) == []


def test_a_last_line_that_a_crash_cut_off_is_left_out(tmp_path):
    write_log(tmp_path, *ITERS)
    content = (tmp_path / "log.jsonl").read_bytes()
    last = content.rstrip(b"\n").rfind(b"\n") + 1
    for cut in range(last, len(content) - 1):
        (tmp_path / "log.jsonl").write_bytes(content[:cut])
        assert read_log(str(tmp_path))[1:] == ITERS[:-1]


def test_a_cut_in_the_middle_of_a_character_is_a_cut_like_any_other(tmp_path):
    write_log(tmp_path, {"kind": "eval", "iter": 0, "note": "señor"})
    content = (tmp_path / "log.jsonl").read_bytes()
    (tmp_path / "log.jsonl").write_bytes(content[: content.index("ñ".encode()) + 1])
    assert [record["kind"] for record in read_log(str(tmp_path))] == ["header"]


def test_a_resume_cuts_what_lies_behind_its_iteration_and_adds_a_header(tmp_path):
    evals = [{"kind": "eval", "iter": i, "val_loss": 3.0} for i in (0, 4, 8)]
    records = [evals[0], *ITERS[:4], evals[1], *ITERS[4:8], evals[2], *ITERS[8:], {"kind": "final", "iter": 8}]
    write_log(tmp_path, *records)
    kept = records_before(read_log(str(tmp_path)), iter_num=6, evaluated_at=4)
    write_log(tmp_path, *ITERS[6:8], header={"iter": 6}, kept=kept)
    log = read_log(str(tmp_path))
    assert [r["iter"] for r in log if r["kind"] == "iter"] == list(range(8))
    assert [r["iter"] for r in log if r["kind"] == "eval"] == [0, 4]
    assert [r["iter"] for r in log if r["kind"] == "header"] == [0, 6]
    assert not [r for r in log if r["kind"] == "final"] and log[0]["kind"] == "header"


@pytest.mark.parametrize("evaluated_at, evals", [(8, [0, 4, 8]), (4, [0, 4])])
def test_an_evaluation_belongs_to_a_state_only_if_it_was_before_it(evaluated_at, evals):
    records = [{"kind": "eval", "iter": i, "val_loss": 3.0} for i in (0, 4, 8)]
    assert [r["iter"] for r in records_before(records, 8, evaluated_at)] == evals


def test_a_trained_run_logs_every_update_and_evaluation(tiny_run):
    with open(os.path.join(tiny_run, "log.jsonl"), encoding="utf-8") as file:
        records = [strict(line) for line in file]
    kinds = {kind: [r["iter"] for r in records if r["kind"] == kind] for kind in ("header", "iter", "eval", "final")}
    assert kinds == {"header": [0], "iter": [0, 1, 2, 3, 4, 5], "eval": [0, 3, 6], "final": [kinds["final"][0]]}
    assert records[0]["kind"] == "header" and {"config", "versions", "data_sha256", "command"} <= records[0].keys()
    assert all(isinstance(r["loss"], float) and r["loss"] > 0 for r in records if r["kind"] == "iter")


def deferred(tmp_path, loss: float) -> RunLog:
    """A log in which update 7 waits to be written."""
    log = RunLog(str(tmp_path), lambda: ([], {}, None))
    log.defer(7, 0.25, tokens=100, seconds=0.5, get_loss=lambda: loss)
    return log


def test_an_update_that_is_deferred_is_logged_once(tmp_path, capsys):
    log = deferred(tmp_path, 2.5)
    for _ in range(2):
        log.flush()
    assert read_log(str(tmp_path))[1:] == [dict(kind="iter", iter=7, loss=2.5, lr=0.25, ms=500.0, tokens_per_s=200)]
    assert capsys.readouterr().out == "iter 7: loss 2.5000, time 500.00ms, 200 tokens/s\n"


def test_a_deferred_loss_that_is_no_number_ends_in_a_sentence_that_names_its_update(tmp_path, capsys):
    with pytest.raises(UserError, match="loss is nan at iteration 7: the run diverged"):
        deferred(tmp_path, math.nan).flush()
    assert os.listdir(tmp_path) == [] and capsys.readouterr().out == ""


def test_mfu_is_the_share_of_the_peak_speed(tmp_path, capsys):
    log = deferred(tmp_path, 2.5)
    log.peak_speed = 800.0
    log.flush()
    assert read_log(str(tmp_path))[-1]["mfu"] == 0.25 and "mfu 25.00%" in capsys.readouterr().out


def test_other_ranks_print_and_write_nothing(tmp_path, capsys):
    log = RunLog(str(tmp_path), lambda: ([], {}, None), is_main=False)
    log.defer(7, 0.25, tokens=100, seconds=0.5, get_loss=lambda: 2.5)
    log.flush()
    log.close()
    assert os.listdir(tmp_path) == [] and capsys.readouterr().out == ""


def test_a_run_of_more_than_six_hours_is_announced_with_what_to_lower():
    said = []
    warn_if_long_run(10 * 3600, 3.6, said.append)
    assert len(said) == 1 and "10 hours" in said[0]
    assert all(key in said[0] for key in ("max_iters", "n_layer", "n_embd", "block_size", "batch_size"))
    warn_if_long_run(3600, 3.6, said.append)
    assert len(said) == 1


# ----------------------------------------------------------------------------------------------------------------------
# loss.png


def is_png(path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def draw_in_a_process_of_its_own(folder, code: str = "", **env) -> subprocess.CompletedProcess:
    """Run draw_loss(folder) as a program does, where matplotlib is not imported yet; code runs before it."""
    program = f"{code}\nfrom dongpt.log import draw_loss\ndraw_loss({str(folder)!r})\nprint('went on')"
    return fork_server.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_a_drawing_shows_what_the_log_holds(tmp_path, capsys):
    evals = [{"kind": "eval", "iter": i, "train_loss": 3.0, "val_loss": 3.1} for i in (0, 4, 8)]
    draw_loss(write_log(tmp_path, *ITERS, *evals, {"kind": "iter", "iter": 10, "loss": math.nan}))
    first = (tmp_path / "loss.png").read_bytes()
    assert is_png(tmp_path / "loss.png") and sorted(os.listdir(tmp_path)) == ["log.jsonl", "loss.png"]
    write_log(tmp_path, *ITERS)
    draw_loss(str(tmp_path))
    assert is_png(tmp_path / "loss.png") and (tmp_path / "loss.png").read_bytes() != first
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_log_without_any_loss_can_be_drawn(tmp_path, capsys):
    draw_loss(write_log(tmp_path))
    assert is_png(tmp_path / "loss.png") and capsys.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["nonsense", "module://matplotlib_inline.backend_inline", "tkagg"])
def test_a_backend_of_a_notebook_or_a_desktop_does_no_harm(tmp_path, backend):
    done = draw_in_a_process_of_its_own(write_log(tmp_path, *ITERS), MPLBACKEND=backend, DISPLAY="")
    assert done.stdout == "went on\n" and done.stderr == "" and is_png(tmp_path / "loss.png")


def test_drawing_leaves_the_environment_as_it_was(tmp_path, monkeypatch):
    """MPLBACKEND was set to Agg for good, for this process and all that it starts."""
    monkeypatch.setenv("MPLBACKEND", "module://of_a_notebook")
    draw_loss(write_log(tmp_path, *ITERS))
    assert os.environ["MPLBACKEND"] == "module://of_a_notebook" and is_png(tmp_path / "loss.png")


def test_a_failed_drawing_prints_one_line_and_no_more(tmp_path, capsys):
    (tmp_path / "loss.png").mkdir()  # so that the picture cannot get its name
    draw_loss(write_log(tmp_path, *ITERS))
    said = capsys.readouterr()
    assert "loss.png" in said.out + said.err and (said.out + said.err).count("\n") == 1
    assert "Traceback" not in said.out + said.err


@pytest.mark.slow
def test_a_missing_matplotlib_is_said_in_one_line(tmp_path):
    hide = "import sys\nsys.modules.update(dict.fromkeys(('matplotlib', 'matplotlib.figure')))"
    done = draw_in_a_process_of_its_own(write_log(tmp_path, *ITERS), hide)
    lines = (done.stdout + done.stderr).splitlines()
    assert done.returncode == 0 and len(lines) == 2 and "loss.png" in lines[0] and lines[1] == "went on"


# ----------------------------------------------------------------------------------------------------------------------
# GPUs


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("Tesla T4", 65e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA GeForce RTX 3090", 71.2e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 5090", 209.5e12),
        ("NVIDIA RTX A6000", 155e12),
    ],
)
def test_the_peak_of_a_gpu_goes_by_its_name(name, peak):
    assert peak_flops(name) == pytest.approx(peak, rel=0.01)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A10G",
        "NVIDIA GeForce RTX 3070 Ti",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA T400",
        "NVIDIA A1000",
        "Quadro T1000",
        "NVIDIA H20",
        "NVIDIA RTX A4000",
        "AMD Instinct MI300X",
        "",
    ],
)
def test_a_gpu_that_is_not_in_the_table_has_no_peak(name):
    assert peak_flops(name) is None
