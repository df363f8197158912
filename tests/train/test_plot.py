"""loss.png: the picture of a run's losses."""

import math
import os
import re
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


def curves_of(losses, eval_interval: int = 10, ms: float = 100.0, log_interval: int = 1, val_losses=()) -> LossCurves:
    """Curves of a run with these losses of batches; evaluations are 0.1 lower in training, 0.1 higher in validation."""
    curves = LossCurves()
    curves.collect({"kind": "header", "iter": 0, "data": "data/some_text"})
    for it, loss in enumerate(losses):
        if it % eval_interval == 0:
            val_loss = val_losses[it // eval_interval] if val_losses else loss + 0.1
            curves.collect({"kind": "eval", "iter": it, "train_loss": loss - 0.1, "val_loss": val_loss})
        if it % log_interval == 0:
            curves.collect({"kind": "iter", "iter": it, "loss": loss, "ms": ms})
    return curves


def curve(figure, label: str) -> list[tuple[float, float]]:
    """The points of a line of the picture."""
    (line,) = [line for line in figure.axes[0].get_lines() if line.get_label() == label]
    return list(zip(line.get_xdata(), line.get_ydata()))


def notes(figure) -> list[str]:
    return [text.get_text() for text in figure.texts if text.get_text().startswith("not shown")]


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
    figure = loss_figure("out", curves_of(falling(401), eval_interval=100))
    low, high = figure.axes[0].get_ylim()
    assert low < 1.0 and high < 3.8  # the first loss is 5
    assert notes(figure) == ["not shown: iteration 0 with loss 5.1"]
    assert [it for it, _ in curve(figure, "validation")] == [100, 200, 300, 400]  # no line from above the picture


def test_the_validation_losses_of_a_run_that_overfits_are_all_shown():
    """They left the top of the picture, without a note."""
    losses = [0.3 + 3.3 * math.exp(-i / 20) for i in range(101)]
    figure = loss_figure("out", curves_of(losses, 20, val_losses=[3.6162, 3.9418, 4.4, 4.9, 5.3, 5.6512]))
    assert figure.axes[0].get_ylim()[1] > 5.6512 and notes(figure) == []
    assert figure.get_suptitle().endswith(
        "best validation loss 3.9418 at iteration 20"
    )  # untrained weights are not saved


@pytest.mark.parametrize("n, eval_interval, log_interval", [(61, 60, 100), (301, 300, 100), (301, 150, 100), (2, 1, 1)])
def test_a_run_with_few_points_is_shown_from_its_start(n, eval_interval, log_interval):
    """A line fell from outside the picture, which was empty otherwise."""
    figure = loss_figure("out", curves_of(falling(n), eval_interval, log_interval=log_interval))
    low, high = figure.axes[0].get_ylim()
    assert low < falling(n)[-1] - 0.1 and high > 5.1 and notes(figure) == []
    assert len(curve(figure, "validation")) == (n - 1) // eval_interval + 1
    assert all(len(axes.get_xticks()) >= 2 for axes in figure.axes)


def test_a_few_evaluations_are_in_view_with_the_fall_of_the_training_curve():
    figure = loss_figure("out", curves_of(falling(301), 100, log_interval=5))
    assert figure.axes[0].get_ylim()[1] > falling(301)[20] and len(curve(figure, "validation")) == 3
    assert sum(loss < 3.5 for _, loss in curve(figure, "training, single batches")) > 50


def test_a_single_evaluation_is_shown():
    figure = loss_figure("out", curves_of(falling(100), 1000))
    assert len(curve(figure, "validation")) == 1 and figure.axes[0].get_ylim()[1] > 5.1 and notes(figure) == []


def test_a_run_that_diverges_is_shown_up_to_its_first_loss_and_not_to_infinity():
    losses = [*falling(200), *(1.0 * 1.5**i for i in range(100))]
    figure = loss_figure("out", curves_of(losses))
    low, high = figure.axes[0].get_ylim()
    assert low < 1.0 and 5.0 < high < 6.0
    hidden = [loss for loss in losses[::10] if loss + 0.1 > high]
    assert notes(figure) == [f"not shown: {len(hidden)} evaluations with losses up to {hidden[-1] + 0.1:.4g}"]
    (note,) = notes(loss_figure("out", curves_of(falling(8000), 1)))  # the points are means of several evaluations
    assert 300 < int(re.match(r"not shown: (\d+) evaluations ", note)[1]) <= 400


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
