"""Logs of training runs: log.jsonl, progress, curves in memory, and the peak speeds that MFU is relative to."""

import json
import math
import os
import re
import struct
import sys
import time

import pytest

from configurator import UserError
from dongpt.log import (
    MAX_CURVE_POINTS,
    Curve,
    LossCurves,
    RunLog,
    peak_flops,
    progress_bar,
    read_curves,
    read_log,
    records_before,
)

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
    log = RunLog(str(folder), lambda: (list(kept), header))
    log.file = log.open()
    return log


def strict(line: str) -> dict:
    """Parse line as strict JSON. NaN and Infinity, which Python's own parser accepts, are errors."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

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
    kept = list(records_before(read_log(str(tmp_path)), iter_num=6, evaluated_at=4))
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
    log = RunLog(str(tmp_path), lambda: ([], {}))
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
    log = RunLog(str(tmp_path), lambda: ([], {}), is_main=False)
    log.defer(7, 0.25, tokens=100, seconds=0.5, get_loss=lambda: 2.5)
    log.flush()
    log.close()
    assert os.listdir(tmp_path) == [] and capsys.readouterr().out == ""


# ----------------------------------------------------------------------------------------------------------------------
# progress


def test_without_a_terminal_the_lines_of_updates_show_total_percentage_and_time_remaining(
    tmp_path, monkeypatch, capsys
):
    clock = [1000.0]
    monkeypatch.setattr("dongpt.log.time.monotonic", lambda: clock[0])
    log = RunLog(str(tmp_path), lambda: ([], {}), total=400)
    for it, now in ((0, 1010.0), (20, 1030.0), (399, 1500.0)):
        clock[0] = now
        log.defer(it, 0.1, tokens=100, seconds=0.5, get_loss=lambda: 2.5)
        log.flush()
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.endswith("200 tokens/s, 0% of 400")  # nothing to extrapolate from yet
    assert second.endswith("200 tokens/s, 5% of 400, 06:19 left")  # 20 s for 20 updates, and 379 to go
    assert last.endswith("200 tokens/s, 100% of 400, 00:00 left")


def test_the_time_remaining_respects_max_minutes(tmp_path, monkeypatch, capsys):
    clock = [1000.0]
    monkeypatch.setattr("dongpt.log.time.monotonic", lambda: clock[0])
    log = RunLog(str(tmp_path), lambda: ([], {}), total=600_000, deadline=1120.0)
    for it in (0, 1):
        clock[0] += 10
        log.defer(it, 0.1, tokens=100, seconds=0.5, get_loss=lambda: 2.5)
        log.flush()
    assert capsys.readouterr().out.endswith(", 0% of 600,000, 01:40 left\n")


def test_a_bar_without_a_terminal_prints_lines_once_it_takes_long(monkeypatch, capsys):
    monkeypatch.setattr("dongpt.log.PROGRESS_SECONDS", 0.02)
    with progress_bar(4, desc="validation split: ") as bar:
        for _ in range(4):
            time.sleep(0.03)
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 4 and "\r" not in "".join(lines)
    assert all(re.fullmatch(r"validation split: +\d+% of 4, \d\d:\d\d left", line) for line in lines), lines


def test_a_short_bar_without_a_terminal_prints_nothing(capsys):
    with progress_bar(2) as bar:
        bar.update(2)
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("columns", [0, 20, 100])
def test_the_bar_appears_on_a_terminal_of_any_width(columns, monkeypatch):
    """A new pseudo-terminal has 0 columns, and tqdm then drew nothing but the counts."""
    import fcntl
    import termios

    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(theirs, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with progress_bar(4) as bar:
            bar.update(4)
        terminal.write("END")
        terminal.flush()
        shown = ""
        while not shown.endswith("END"):
            shown += os.read(ours, 4096).decode()
    os.close(ours)
    assert "100%" in shown and (columns == 20 or "4/4" in shown)
    assert all(len(line) <= (columns or 80) for line in re.split("[\r\n]+", shown))


# ----------------------------------------------------------------------------------------------------------------------
# curves in bounded memory


def test_a_short_curve_keeps_every_point():
    curve = Curve()
    for i in range(10):
        curve.add(i, 2.0 * i)
    assert curve.points() == [(i, 2.0 * i) for i in range(10)]


@pytest.mark.parametrize("n", [MAX_CURVE_POINTS - 1, MAX_CURVE_POINTS, MAX_CURVE_POINTS + 1, 50_001])
def test_a_long_curve_has_a_bounded_number_of_points_whose_mean_is_that_of_all(n):
    curve = Curve()
    for i in range(n):
        curve.add(i, i % 7)
        assert len(curve.kept) < MAX_CURVE_POINTS and len(curve.group) < curve.group_size
    its, losses = zip(*curve.points())
    assert MAX_CURVE_POINTS / 2 <= len(its) <= MAX_CURVE_POINTS and list(its) == sorted(its)
    whole = len(curve.kept) * curve.group_size  # points in full groups
    assert sum(losses[: len(curve.kept)]) * curve.group_size == pytest.approx(sum(i % 7 for i in range(whole)))


@pytest.mark.slow
def test_curves_of_600_000_records_stay_small_and_keep_the_best_evaluation():
    curves = LossCurves()
    for i in range(600_000):
        curves.collect({"kind": "iter", "iter": i, "loss": 3.0, "ms": 10.0})
        if i % 20 == 0:
            curves.collect({"kind": "eval", "iter": i, "train_loss": 3.0, "val_loss": 2.5 if i == 345_660 else 3.1})
    for curve in (curves.updates, curves.evals):
        assert len(curve.kept) < MAX_CURVE_POINTS and len(curve.group) <= 1024
    assert curves.best_eval == (345_660, 3.0, 2.5) and curves.first_eval == (0, 3.0, 3.1)
    assert curves.seconds == pytest.approx(6000)


def test_training_time_counts_the_updates_between_two_records_and_survives_a_resume():
    curves = LossCurves()
    for record in (
        dict(kind="header", iter=0, data="data/x"),
        dict(kind="iter", iter=0, loss=3.0, ms=500.0),
        dict(kind="iter", iter=20, loss=3.0, ms=100.0),  # the mean of 20 updates
        dict(kind="header", iter=30, data="data/x"),
        dict(kind="iter", iter=40, loss=3.0, ms=100.0),  # of the 11 since the resume
    ):
        curves.collect(record)
    assert curves.seconds == pytest.approx(0.5 + 2.0 + 1.1) and curves.data == "data/x"


def test_losses_that_are_no_numbers_are_left_out_of_the_curves():
    curves = LossCurves()
    for loss in (None, math.nan, math.inf, "x"):
        curves.collect({"kind": "iter", "iter": 1, "loss": loss, "ms": 1.0})
        curves.collect({"kind": "eval", "iter": 1, "train_loss": 1.0, "val_loss": loss})
    assert curves.updates.points() == curves.evals.points() == [] and curves.best_eval is None


def test_curves_that_are_written_are_those_that_are_read(tmp_path):
    log = started_log(tmp_path, {"iter": 0, "data": "data/x"})
    for record in [*ITERS, {"kind": "eval", "iter": 10, "train_loss": 2.0, "val_loss": 2.1}]:
        log.write(**record)
    log.file.close()
    read = read_curves(str(tmp_path))
    assert read.updates == log.curves.updates and read.evals == log.curves.evals and read.data == "data/x"
    resumed = started_log(tmp_path, {"iter": 5}, kept=records_before(read_log(str(tmp_path)), 5, 0))
    assert [it for it, *_ in resumed.curves.updates.points()] == [0, 1, 2, 3, 4]
    resumed.file.close()


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
