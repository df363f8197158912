"""Training logs (log.jsonl in an out_dir, loss curves in memory, wandb), progress bars and tables.

The first line of log.jsonl is a header (config, versions, data, command). Each of the other lines is a record:
{"kind": "iter", "iter": 7, "loss": ...} for an update, {"kind": "eval", "iter": 8, "val_loss": ...} after 8 updates,
{"kind": "sample", "iter": 8, "text": ...} for a sample (--sample_tokens), and {"kind": "final", ...} at the end.
"""

import contextlib
import json
import math
import os
import sys
import time
from dataclasses import dataclass, field
from itertools import chain
from typing import IO, Any, Callable, Iterable, Iterator

from configurator import UserError
from dongpt.program import atomic_write, first_line

LOG_FILE, LOSS_PLOT_FILE = "log.jsonl", "loss.png"
MAX_CURVE_POINTS = 2000  # per curve in memory and in loss.png, which is 960 pixels wide
DEFAULT_COLUMNS = 80  # for a terminal whose width is not known
PROGRESS_SECONDS = 10  # interval between progress lines where no bar can be drawn

# Peak TFLOP/s of dense matmuls in bf16, or fp16 on Volta and Turing, with fp32 accumulation. The sources are NVIDIA's
# datasheets (half of the numbers "with sparsity") and, for GeForce and RTX A, the architecture whitepapers (GA102, Ada,
# RTX Blackwell): SMs x 512 (RTX A: 1024) FMAs per clock x 2 x boost clock. The longest matching name wins.
# fmt: off
PEAK_TFLOPS = {
    "V100": 125, "T4": 65, "A10": 125, "A30": 165, "A40": 150, "A100": 312, "RTX A6000": 155,
    "L4": 121, "L40": 181, "L40S": 362, "H100": 989, "H100 PCIe": 756, "H100 NVL": 835, "H200": 989, "H200 NVL": 835,
    "GH200": 989, "B200": 2250, "GB200": 2500, "GeForce RTX 3070": 40.6, "GeForce RTX 3080": 59.5,
    "GeForce RTX 3090": 71.2, "GeForce RTX 4080": 97.5, "GeForce RTX 4090": 165.2, "GeForce RTX 5080": 112.6,
    "GeForce RTX 5090": 209.5,
}
# fmt: on


def peak_flops(gpu_name: str) -> float | None:
    """Return the peak FLOP/s of a GPU, given its CUDA device name, or None if it is not in the table."""
    words = f" {gpu_name.replace('-', ' ')} "
    matches = [name for name in PEAK_TFLOPS if f" {name} " in words]
    if not matches or "RTX" in words and not gpu_name.endswith(tuple(matches)):  # RTX 3070 Ti, RTX 4090 Laptop GPU
        return None
    return PEAK_TFLOPS[max(matches, key=len)] * 1e12


def iter_log(out_dir: str) -> Iterator[dict]:
    """Yield the records of log.jsonl, if it exists. A last line that was cut off by a crash is skipped."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        with open(os.path.join(out_dir, LOG_FILE), encoding="utf-8", errors="replace") as file:
            for line in file:
                yield json.loads(line)


def read_log(out_dir: str) -> list[dict]:
    """Return all records in log.jsonl, or [] if the file does not exist."""
    return list(iter_log(out_dir))


def records_before(records: Iterable[dict], iter_num: int, evaluated_at: int) -> Iterator[dict]:
    """Yield the records of the first iter_num updates and of evaluations up to the one after evaluated_at updates."""
    last_iters = {"iter": iter_num - 1, "eval": evaluated_at, "sample": evaluated_at, "final": -1}
    for record in records:
        if record.get("iter", 0) <= last_iters.get(record.get("kind", ""), iter_num):
            yield record


@dataclass
class Curve:
    """A curve of at most MAX_CURVE_POINTS points, no matter how many are added.

    A point is a tuple of numbers. When the curve is full, its points are averaged in pairs, and from then on each point
    averages twice as many added points as before:

        curve = Curve()
        for i in range(600_000):
            curve.add(i, loss)
        curve.points()              # [(149.5, 3.1), (449.5, 2.9), ...]
    """

    group_size: int = 1  # number of added points per kept point
    kept: list[tuple[float, ...]] = field(default_factory=list)
    group: list[tuple[float, ...]] = field(default_factory=list)  # added points for the next kept point

    def add(self, *point: float):
        self.group.append(point)
        if len(self.group) == self.group_size:
            self.kept.append(_mean_point(self.group))
            self.group = []
        if len(self.kept) == MAX_CURVE_POINTS:
            self.kept = [_mean_point(self.kept[i : i + 2]) for i in range(0, MAX_CURVE_POINTS, 2)]
            self.group_size *= 2

    def points(self) -> list[tuple[float, ...]]:
        """Return the points in order. The last point may be the average of fewer added points than the others."""
        return self.kept + ([_mean_point(self.group)] if self.group else [])


def _mean_point(points: list[tuple[float, ...]]) -> tuple[float, ...]:
    return points[0] if len(points) == 1 else tuple(sum(values) / len(points) for values in zip(*points))


@dataclass
class LossCurves:
    """Loss curves of a run in bounded memory, collected while its records are written or read.

    Each point in updates is (iteration, batch loss, training time in seconds). Each point in evals is (iteration,
    training loss, validation loss). first_eval and best_eval (the lowest after iteration 0) are never averaged.
    """

    updates: Curve = field(default_factory=Curve)
    evals: Curve = field(default_factory=Curve)
    data: str = ""  # name of the data folder
    first_eval: tuple[int, float, float] | None = None
    best_eval: tuple[int, float, float] | None = None
    seconds: float = 0.0  # training time
    last_iter: int = -1
    drawn_at: float = field(default_factory=time.monotonic)  # time of the last drawing or of the start

    def collect(self, record: dict):
        """Add a log record to the curves."""
        kind, it = record.get("kind"), record.get("iter", 0)
        if kind == "header":
            self.data, self.last_iter = record.get("data", self.data), it - 1
        elif kind == "iter":
            self.seconds += (it - self.last_iter) * (record.get("ms") or 0) / 1000  # ms: mean since the last record
            self.last_iter = it
            if is_finite(record.get("loss")):
                self.updates.add(it, record["loss"], self.seconds)
        elif kind == "eval" and is_finite(record.get("train_loss")) and is_finite(record.get("val_loss")):
            point = it, record["train_loss"], record["val_loss"]
            self.evals.add(*point)
            self.first_eval = self.first_eval or point
            if it > 0 and (self.best_eval is None or point[2] < self.best_eval[2]):
                self.best_eval = point


def read_curves(out_dir: str) -> LossCurves:
    """Return the loss curves in log.jsonl."""
    curves = LossCurves()
    for record in iter_log(out_dir):
        curves.collect(record)
    return curves


def is_finite(value: Any) -> bool:
    """Return True if value is a number that is neither infinite nor NaN."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def replace_nonfinite(value):
    """Replace non-finite floats, including those inside dicts, with None, because strict JSON does not allow them."""
    if isinstance(value, dict):
        return {key: replace_nonfinite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json_line(record: dict) -> str:
    return json.dumps(replace_nonfinite(record), ensure_ascii=False) + "\n"


def check_finite_loss(loss: float, iter_num: int):
    """Raise UserError if the loss is not finite, so that such a state is never saved."""
    if not math.isfinite(loss):
        problem = f"the loss is {loss} at iteration {iter_num}: the run diverged (the last checkpoint is unchanged)"
        raise UserError(f"{problem}; lower learning_rate, or use dtype=float32")


class RunLog:
    """The log of a run. It prints lines above a progress bar and appends records to log.jsonl and wandb.

    Every rank has a RunLog, but only rank 0 prints and writes. Before the first record, rank 0 calls first_records(),
    which returns the records that a resumed run keeps and the header. peak_speed, in tokens/s, is the speed at which
    MFU would be 100%. The bar starts at update `initial` of `total`. Without a terminal, update lines show the progress
    instead. deadline, a value of time.monotonic(), limits the estimate of the remaining time.
    """

    def __init__(
        self,
        out_dir: str,
        first_records: Callable[[], tuple[Iterable[dict], dict]],
        is_main=True,
        peak_speed=None,
        total=0,
        initial=0,
        deadline=math.inf,
        wandb_run=None,
    ):
        self.out_dir, self.first_records, self.is_main, self.peak_speed = out_dir, first_records, is_main, peak_speed
        self.total, self.deadline, self.wandb_run = total, deadline, wandb_run
        self.file: IO | None = None
        self.curves = LossCurves()
        self.deferred_record: tuple | None = None
        self.first_flush: tuple[int, float] | None = None  # iteration and time of the first update line
        shows_bar = bool(is_main and total and sys.stderr.isatty())
        self.bar = progress_bar(total, initial, quiet=not shows_bar)

    def print(self, line: str):
        """Print a line on rank 0, above the progress bar if there is one."""
        if self.is_main:
            self.bar.write(line)
            sys.stdout.flush()

    def open(self) -> IO:
        """Create the file with the kept records and the header, and return it open for appending."""
        kept_records, header = self.first_records()
        path = os.path.join(self.out_dir, LOG_FILE)
        with atomic_write(path, "w", encoding="utf-8", newline="\n") as file:
            for record in chain(kept_records, [{"kind": "header", **header}]):
                file.write(to_json_line(record))
                self.curves.collect(record)
        return open(path, "a", encoding="utf-8", newline="\n")

    def write(self, kind: str, **record):
        """Append one record and flush the file, so that the record is not lost if the process is killed."""
        if not self.is_main:
            return
        self.file = self.file or self.open()
        self.file.write(to_json_line({"kind": kind, **record}))
        self.file.flush()
        self.curves.collect({"kind": kind, **record})
        if self.wandb_run is not None:
            wandb_keys = {key: f"train/{key}" if kind == "iter" else key for key in record if key != "iter"}
            wandb_keys.update(train_loss="train/loss_eval", val_loss="val/final" if kind == "final" else "val/loss")
            self.wandb_run.log({"iter": record["iter"], **{wandb_keys[k]: v for k, v in record.items() if k != "iter"}})

    def defer(self, iter_num: int, lr: float, tokens: int, seconds: float, get_loss: Callable[[], float]):
        """Store the record of an update, with its token count and duration, until flush() reads its loss."""
        self.deferred_record = iter_num, lr, tokens / seconds, seconds, get_loss

    def flush(self):
        """Print and log the deferred record, if any. Raises UserError if its loss is not finite."""
        if self.deferred_record is None:
            return
        (iter_num, lr, speed, seconds, get_loss), self.deferred_record = self.deferred_record, None
        loss, ms = get_loss(), seconds * 1000
        check_finite_loss(loss, iter_num)
        mfu = speed / self.peak_speed if self.peak_speed else None
        mfu_text = f"mfu {mfu * 100:.2f}%, " if mfu else ""
        line = f"iter {iter_num}: loss {loss:.4f}, time {ms:.2f}ms, {mfu_text}{speed:,.0f} tokens/s"
        self.print(line + self._progress_text(iter_num))
        mfu_entry = {"mfu": round(mfu, 4)} if mfu else {}
        self.write("iter", iter=iter_num, loss=loss, lr=lr, ms=round(ms, 3), tokens_per_s=round(speed), **mfu_entry)
        self.bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)

    def _progress_text(self, iter_num: int) -> str:
        """Return text such as ', 25% of 400, 1:05 left' after update number iter_num, or '' if the bar shows it."""
        if not (self.total and self.bar.disable):
            return ""
        now, n_done = time.monotonic(), iter_num + 1
        self.first_flush = self.first_flush or (iter_num, now)
        text, n_timed = f", {100 * n_done // self.total}% of {self.total:,}", iter_num - self.first_flush[0]
        if not n_timed:
            return text
        seconds = (now - self.first_flush[1]) / n_timed * (self.total - n_done)
        return f"{text}, {self.bar.format_interval(max(0, min(seconds, self.deadline - now)))} left"

    def write_losses(self, iter_num: int, train_loss: float, val_loss: float):
        """Print and log the losses of an evaluation. Raises UserError if the validation loss is not finite."""
        self.flush()
        check_finite_loss(val_loss, iter_num)
        self.print(f"step {iter_num}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
        self.write("eval", iter=iter_num, train_loss=train_loss, val_loss=val_loss)
        self.bar.set_postfix_str(f"val loss {val_loss:.3f}", refresh=False)  # the last batch may be long ago

    def close(self):
        """Close the file and end the wandb run."""
        if self.file is not None:
            self.file.close()
        if self.wandb_run is not None:
            self.wandb_run.finish()


def start_wandb(project: str, name: str, config: dict, run_id: str | None):
    """Start a wandb run, or resume the one with run_id. Raises UserError if wandb is missing or cannot start."""
    try:
        import wandb

        return wandb.init(project=project, name=name, config=config, id=run_id, resume="allow")
    except Exception as error:  # not installed, not logged in, no network
        if isinstance(error, ImportError):
            raise UserError("wandb is not installed: run pip install wandb, or set wandb_log=False") from error
        problem = f"wandb could not be started ({type(error).__name__}: {first_line(error)})"
        remedy = "run wandb login, set WANDB_MODE=offline, or set wandb_log=False"
        raise UserError(f"{problem}: {remedy}") from error


def import_matplotlib_figure():
    """Return matplotlib's Figure class, which can draw to files without pyplot or a GUI backend."""
    backend = os.environ.pop("MPLBACKEND", None)  # a notebook sets it to a backend that other processes do not have
    try:
        from matplotlib.figure import Figure
    finally:
        os.environ.update({"MPLBACKEND": backend} if backend is not None else {})
    return Figure


def progress_bar(total: int | None, initial: int = 0, unit: str = "it", quiet: bool = False, **options):
    """Return a tqdm bar on stderr for `total` steps, of which `initial` are already done.

    In a pipe, a file or a notebook, it prints the percentage and the remaining time every PROGRESS_SECONDS seconds,
    or nothing if it finishes sooner. In these lines, unit follows the total, unless it is tqdm's
    default. With unit="B", the bar counts bytes, as in 1.5MB/2.0MB.
    """
    from tqdm import tqdm

    options |= dict(total=total, initial=initial, unit=unit, unit_scale=unit == "B", disable=quiet)
    if not sys.stderr.isatty():
        options |= dict(file=_LineStream(), mininterval=PROGRESS_SECONDS, delay=PROGRESS_SECONDS, leave=False)
        done = f"{{percentage:.0f}}% of {{total_fmt}}{unit * (unit != 'it')}, {{remaining}} left"
        options |= dict(bar_format=f"{{desc}}{done if total else '{n_fmt}{unit} so far'}{{postfix}}")
        return tqdm(**options)
    try:
        has_width = os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):
        has_width = False
    return tqdm(**options, **(dict(dynamic_ncols=True) if has_width else dict(ncols=DEFAULT_COLUMNS)))


class _LineStream:
    """A stream for tqdm bars outside a terminal that prints each update of the bar as a line on stderr."""

    def write(self, text: str):
        if text := text.strip():
            print(text, file=sys.stderr)

    def flush(self):
        sys.stderr.flush()


def format_table(rows: list[list[str]]) -> str:
    """Format rows of cells as a text table. The first column is left-aligned, and the others are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    aligned = [[row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:]))] for row in rows]
    return "\n".join("  ".join(cells).rstrip() for cells in aligned)
