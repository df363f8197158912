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
MAX_GAP = 0.15  # of the run without points at its start: if it is longer, the start is shown, too
FEW_POINTS = 6  # fewer evaluations are all shown, except for iteration 0
MAX_RISE = 4  # evaluations above this multiple of the first loss are cut off, as in a run that diverges


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
    bounds = loss_range(evals, updates)
    if len(updates):
        label = "training, single batches" if curves.updates.group_size == 1 else "training, mean of batches"
        axes.plot(*updates[:, :2].T, ".-", color=LIGHT_BLUE, lw=1, ms=6 * (len(updates) < FEW_POINTS), label=label)
    if bounds and len(evals):
        is_cut = (evals[:, 1:] > bounds[1]).any(axis=1)
        shown = evals[np.argmin(is_cut) :]  # a straight line from an early point above the picture would mislead
        if n_cut := int(is_cut.sum()) * curves.evals.group_size:
            it, _, loss = max(evals[is_cut], key=lambda point: point[2])
            which = f"{n_cut:,} evaluations with losses up to" if n_cut > 1 else f"iteration {it:,.0f} with loss"
            figure.text(0.97, 0.02, f"not shown: {which} {loss:.4g}", fontsize=8, ha="right")
        style = dict(markersize=4 if len(evals) < 60 else 0)
        axes.plot(shown[:, 0], shown[:, 1], color=BLUE, marker="o", label="training, evaluated", **style)
        axes.plot(shown[:, 0], shown[:, 2], color=ORANGE, marker="s", linestyle="--", label="validation", **style)
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
    axes.set_ylim(*(bounds or (0, 1)))
    if len({it for it, *_ in (*evals, *updates)}) == 1:  # otherwise matplotlib shows fractional iterations
        axes.set_xlim(axes.get_lines()[0].get_xdata()[0] - 1, axes.get_lines()[0].get_xdata()[0] + 1)
    if len(updates) > 1 and curves.seconds > 0:
        _add_time_axis(axes, updates, curves.seconds)
    if axes.get_lines():
        axes.legend(fontsize=9, loc="best")
    return figure


def loss_range(evals: np.ndarray, updates: np.ndarray) -> tuple[float, float] | None:
    """Return the (lowest, highest) loss to show. The steep start is ignored if it would flatten the rest.

    The range contains all evaluations after the start, unless the run diverges: then it ends slightly above the first
    loss. evals (n, 3) and updates (n, 3) are the points of LossCurves. Returns None if there are no points.
    """
    evals, updates = evals.reshape(-1, 3), updates.reshape(-1, 3)
    its, losses = np.concatenate([evals[:, :2], evals[:, [0, 2]], updates[:, :2]]).T
    if not len(its):
        return None
    first, length = its.min(), np.ptp(its)
    is_late = its > first + START_SHARE * length
    if len(evals) == 1 or not is_late.any() or its[is_late].min() > first + MAX_GAP * length:
        is_late[:] = True  # without the start, the picture or its left would be empty
    low, first_loss = float(losses.min()), float(losses[its == first].max())
    high = min(float(losses[is_late].max()), 1.1 * first_loss)
    start_share = START_SHARE if len(evals) >= FEW_POINTS else 0
    highest_eval = float(evals[evals[:, 0] > first + start_share * length, 1:].max(initial=0))
    high = max(high, highest_eval) if highest_eval <= MAX_RISE * first_loss else high
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
