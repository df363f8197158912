"""loss.png: the picture of a run's losses."""

import math
import os
import subprocess
import sys

import fork_server
import numpy as np
import pytest
from helpers import ROOT

from dongpt.log import MAX_CURVE_POINTS, LossCurves
from dongpt.train.plot import draw_loss, loss_figure, loss_range

pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module", autouse=True)
def matplotlib():
    return pytest.importorskip("matplotlib")


def curves_of(losses, eval_interval: int = 10, ms: float = 100.0) -> LossCurves:
    """Curves of a run with these losses of batches; evaluations are 0.1 lower in training, 0.1 higher in validation."""
    curves = LossCurves()
    curves.collect({"kind": "header", "iter": 0, "data": "data/some_text"})
    for it, loss in enumerate(losses):
        if it % eval_interval == 0:
            curves.collect({"kind": "eval", "iter": it, "train_loss": loss - 0.1, "val_loss": loss + 0.1})
        curves.collect({"kind": "iter", "iter": it, "loss": loss, "ms": ms})
    return curves


def falling(n: int) -> list[float]:
    return [1.0 + 4.0 * math.exp(-10 * i / n) for i in range(n)]


def is_png(path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_picture_names_the_run_the_text_and_the_best_loss():
    figure = loss_figure("out-mine", curves_of(falling(101)))
    title = figure.get_suptitle()
    assert title == f"out-mine: data/some_text\nbest validation loss {falling(101)[100] + 0.1:.4f} at iteration 100"
    axes, time_axis = figure.axes
    assert {"training, single batches", "training, evaluated", "validation", "best"} == {
        text.get_text() for text in axes.get_legend().get_texts()
    }
    (best,) = [line for line in axes.get_lines() if line.get_label() == "best"]
    assert list(best.get_xdata()) == [100]
    assert "training time (s)" in time_axis.get_xlabel()
    assert [tick.get_text() for tick in time_axis.get_xticklabels()] == ["0", "2", "4", "6", "8", "10"]
    assert time_axis.get_xticks()[1:-1] == pytest.approx([19, 39, 59, 79])  # 100 ms each, 0 is the first update


def test_the_curves_have_different_colours_and_dashes():
    lines = {line.get_label(): line for line in loss_figure("out", curves_of(falling(101))).axes[0].get_lines()}
    train, val = lines["training, evaluated"], lines["validation"]
    assert train.get_color() != val.get_color() and train.get_linestyle() != val.get_linestyle()


def test_the_untrained_model_does_not_flatten_the_picture():
    low, high = loss_figure("out", curves_of(falling(401), eval_interval=100)).axes[0].get_ylim()
    assert low < 1.0 and high < 3.8  # the first loss is 5


def test_a_run_that_diverges_is_shown_up_to_its_first_loss_and_not_to_infinity():
    losses = [*falling(200), *(1.0 * 1.5**i for i in range(100))]
    low, high = loss_figure("out", curves_of(losses)).axes[0].get_ylim()
    assert low < 1.0 and 5.0 < high < 6.0


@pytest.mark.slow
@pytest.mark.parametrize("losses", [[], [3.0], [3.0, 3.0], falling(3)])
def test_runs_of_any_length_can_be_drawn(losses, tmp_path, capsys):
    draw_loss(str(tmp_path), curves_of(losses))
    assert is_png(tmp_path / "loss.png") and os.listdir(tmp_path) == ["loss.png"] and capsys.readouterr().out == ""


def test_the_range_of_no_points_is_none_and_of_one_point_is_around_it():
    assert loss_range(np.array([]), np.array([])) is None
    low, high = loss_range(np.array([(0, 3.0, 3.0)]), np.array([]))
    assert low < 3.0 < high


@pytest.mark.slow
def test_the_picture_of_100_000_records_has_as_many_points_as_the_curves_keep():
    figure = loss_figure("out", curves_of([3.0] * 100_000, eval_interval=5))
    assert all(len(line.get_xdata()) <= MAX_CURVE_POINTS for line in figure.axes[0].get_lines())
    assert "training, mean of batches" in {line.get_label() for line in figure.axes[0].get_lines()}


@pytest.mark.slow
def test_a_picture_is_not_redrawn_too_soon(tmp_path):
    curves = curves_of(falling(20))
    draw_loss(str(tmp_path), curves, min_seconds=60)
    assert os.listdir(tmp_path) == []
    curves.drawn_at -= 61
    draw_loss(str(tmp_path), curves, min_seconds=60)
    assert is_png(tmp_path / "loss.png")


def draw_in_a_process_of_its_own(folder, code: str = "", **env) -> subprocess.CompletedProcess:
    """Draw as a program does, where matplotlib is not imported yet; code runs before it."""
    program = f"{code}\nfrom dongpt.log import LossCurves\nfrom dongpt.train.plot import draw_loss\n"
    program += f"draw_loss({str(folder)!r}, LossCurves())\nprint('went on')"
    return fork_server.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["nonsense", "module://matplotlib_inline.backend_inline", "tkagg"])
def test_a_backend_of_a_notebook_or_a_desktop_does_no_harm(tmp_path, backend):
    done = draw_in_a_process_of_its_own(tmp_path, MPLBACKEND=backend, DISPLAY="")
    assert done.stdout == "went on\n" and done.stderr == "" and is_png(tmp_path / "loss.png")


@pytest.mark.slow
def test_drawing_leaves_the_environment_as_it_was(tmp_path, monkeypatch):
    """MPLBACKEND was set to Agg for good, for this process and all that it starts."""
    monkeypatch.setenv("MPLBACKEND", "module://of_a_notebook")
    draw_loss(str(tmp_path), curves_of(falling(20)))
    assert os.environ["MPLBACKEND"] == "module://of_a_notebook" and is_png(tmp_path / "loss.png")


def test_a_failed_drawing_prints_one_line_and_no_more(tmp_path, capsys):
    (tmp_path / "loss.png").mkdir()  # so that the picture cannot get its name
    draw_loss(str(tmp_path), curves_of(falling(20)))
    said = capsys.readouterr()
    assert "loss.png" in said.out + said.err and (said.out + said.err).count("\n") == 1
    assert "Traceback" not in said.out + said.err


@pytest.mark.slow
def test_a_missing_matplotlib_is_said_in_one_line(tmp_path):
    hide = "import sys\nsys.modules.update(dict.fromkeys(('matplotlib', 'matplotlib.figure')))"
    done = draw_in_a_process_of_its_own(tmp_path, hide)
    lines = (done.stdout + done.stderr).splitlines()
    assert done.returncode == 0 and len(lines) == 2 and "loss.png" in lines[0] and lines[1] == "went on"
