"""Draw the loss curves of a run (loss.png) from a few thousand points in memory.

draw_loss(log.out_dir, log.curves)
draw_loss("out", read_curves("out"))  # from log.jsonl
"""

import os
import time

import numpy as np

from dongpt.log import LOSS_PLOT_FILE, LossCurves, import_matplotlib_figure
from dongpt.program import atomic_write

# Okabe and Ito's color-blind-safe palette (jfly.uni-koeln.de/color)
BLUE, ORANGE, LIGHT_BLUE = "#0072B2", "#D55E00", "#9CCBE8"
START_SHARE = 0.05  # the steep loss in this first part of a run is ignored when choosing the y range
TIME_UNITS = (("s", 1), ("min", 60), ("h", 3600), ("days", 86400))
MAX_TIME_TICKS = 6


def draw_loss(out_dir: str, curves: LossCurves, min_seconds: float = 0):
    """Redraw loss.png, unless it was drawn less than min_seconds ago.

    Errors are printed on one line and never stop a training run.
    """
    if time.monotonic() - curves.drawn_at < min_seconds:
        return
    curves.drawn_at = time.monotonic()
    try:
        figure = loss_figure(os.path.basename(os.path.abspath(out_dir)), curves)
        with atomic_write(os.path.join(out_dir, LOSS_PLOT_FILE)) as file:
            figure.savefig(file, format="png", dpi=120)
    except Exception as error:  # matplotlib is missing or broken
        print(f"{LOSS_PLOT_FILE} could not be drawn: {type(error).__name__}: {error}")


def loss_figure(run_name: str, curves: LossCurves):
    """Return a figure of losses over iterations, with training time along the top and the best evaluation marked."""
    figure = import_matplotlib_figure()(figsize=(8, 5))
    axes = figure.add_axes((0.09, 0.11, 0.88, 0.72))  # left, bottom, width, height; tight_layout takes 0.1 s
    evals, updates = np.array(curves.evals.points()), np.array(curves.updates.points())
    if len(updates):
        label = "training, single batches" if curves.updates.group_size == 1 else "training, mean of batches"
        axes.plot(updates[:, 0], updates[:, 1], color=LIGHT_BLUE, linewidth=1, label=label)
    if len(evals):
        style = dict(markersize=4 if len(evals) < 60 else 0)
        axes.plot(evals[:, 0], evals[:, 1], color=BLUE, marker="o", label="training, evaluated", **style)
        axes.plot(evals[:, 0], evals[:, 2], color=ORANGE, marker="s", linestyle="--", label="validation", **style)
    title = ": ".join(filter(None, [run_name, curves.data]))
    if curves.best_eval:
        it, _, loss = curves.best_eval
        title += f"\nbest validation loss {loss:.4f} at iteration {it:,}"
        axes.plot([it], [loss], "*", color=ORANGE, markersize=14, markeredgecolor="black", label="best", zorder=3)
    figure.suptitle(title, fontsize=11, y=0.985)
    axes.set_xlabel("iteration (update of the weights)")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if bounds := loss_range(evals, updates):
        axes.set_ylim(*bounds)
        if curves.first_eval and curves.first_eval[2] > bounds[1]:
            it, _, loss = curves.first_eval
            figure.text(0.97, 0.02, f"not shown: {loss:.2f} at iteration {it:,}", fontsize=8, ha="right")
    if len({it for it, *_ in (*evals, *updates)}) == 1:  # otherwise matplotlib shows fractional iterations
        axes.set_xlim(axes.get_lines()[0].get_xdata()[0] - 1, axes.get_lines()[0].get_xdata()[0] + 1)
    if len(updates) and curves.seconds > 0:
        _add_time_axis(axes, updates, curves.seconds)
    if axes.get_lines():
        axes.legend(fontsize=9, loc="best")
    return figure


def loss_range(evals: np.ndarray, updates: np.ndarray) -> tuple[float, float] | None:
    """Return the (lowest, highest) loss to show. The steep start is ignored because it would flatten the rest.

    If a run diverges, the range ends slightly above the first loss. evals (n, 3) and updates (n, 3) are the
    points of LossCurves. Returns None if there are none.
    """
    points = [curve[:, [0, column]] for curve, columns in ((evals, (1, 2)), (updates, (1,))) for column in columns
              if len(curve)]  # fmt: skip
    if not points:
        return None
    its, losses = np.concatenate(points).T
    is_late = its > its.min() + START_SHARE * (its.max() - its.min())
    shown = losses[is_late] if is_late.any() else losses
    first_loss = float(np.concatenate([curve[:1, 1] for curve in (evals, updates) if len(curve)]).max())
    low, high = float(shown.min()), min(float(shown.max()), 1.1 * max(first_loss, float(losses.min())))
    margin = 0.05 * (high - low) or 0.05 * max(abs(high), 1e-3)
    return low - margin, high + margin


def _add_time_axis(axes, updates: np.ndarray, seconds: float):
    """Add an axis along the top that shows the training time of each iteration, excluding evaluations."""
    unit, unit_seconds = next((u for u in reversed(TIME_UNITS) if seconds >= 2 * u[1]), TIME_UNITS[0])
    steps = [digit * 10.0**exponent for exponent in range(-3, 6) for digit in (1, 2, 5)]
    step = next((s for s in steps if seconds / unit_seconds / s <= MAX_TIME_TICKS), steps[-1])
    times = np.arange(0, seconds / unit_seconds, step)
    its = np.interp(times * unit_seconds, np.append(0.0, updates[:, 2]), np.append(updates[0, 0], updates[:, 0]))
    top = axes.twiny()
    top.set_xlim(axes.get_xlim())
    top.set_xticks(its, [f"{time:g}" for time in times])
    top.set_xlabel(f"training time ({unit})", fontsize=9)
    top.tick_params(labelsize=8)
