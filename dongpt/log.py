"""Logs of training runs: log.jsonl in an out_dir, its picture loss.png and its mirror on wandb; bars and tables.

The first line of log.jsonl is a header (config, versions, data, command); each further line is a record:
{"kind": "iter", "iter": 7, "loss": ...} for an update, {"kind": "eval", "iter": 8, "val_loss": ...} after 8 updates.
"""

import contextlib
import json
import math
import os
import sys
import time
from typing import IO, Any, Callable

from configurator import UserError
from dongpt.program import atomic_write

LOG_FILE, LOSS_PLOT_FILE = "log.jsonl", "loss.png"
LONG_RUN_SECONDS = 6 * 3600  # a run that will take longer says so

# Peak of dense matrix products in TFLOP/s: bf16, or fp16 on Volta and Turing, both with sums in fp32. From NVIDIA's
# datasheets, whose numbers "with sparsity" are halved, and for GeForce and RTX A from the architecture whitepapers
# (GA102, Ada, RTX Blackwell): SMs x 512 (RTX A: 1024) FMAs per clock x 2 x boost clock. The longest name found wins.
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
    """Peak FLOP/s of a GPU by the name that CUDA gives it; None for one that is not in the table."""
    words = f" {gpu_name.replace('-', ' ')} "
    matches = [name for name in PEAK_TFLOPS if f" {name} " in words]
    if not matches or "RTX" in words and not gpu_name.endswith(tuple(matches)):  # RTX 3070 Ti, RTX 4090 Laptop GPU
        return None
    return PEAK_TFLOPS[max(matches, key=len)] * 1e12


def read_log(out_dir: str) -> list[dict]:
    """The records of log.jsonl, [] without one; a last line cut off by a crash is skipped."""
    records: list[dict] = []
    with contextlib.suppress(FileNotFoundError, ValueError):
        with open(os.path.join(out_dir, LOG_FILE), encoding="utf-8", errors="replace") as file:
            for line in file:
                records.append(json.loads(line))
    return records


def records_before(records: list[dict], iter_num: int, evaluated_at: int) -> list[dict]:
    """The records of a log up to a state of iter_num updates whose last evaluation was after evaluated_at."""
    last_iters = {"iter": iter_num - 1, "eval": evaluated_at, "final": -1}
    return [record for record in records if record.get("iter", 0) <= last_iters.get(record.get("kind", ""), iter_num)]


def replace_nonfinite(value):
    """value for strict JSON: floats that are not finite, also inside dicts, become None."""
    if isinstance(value, dict):
        return {key: replace_nonfinite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json_line(record: dict) -> str:
    return json.dumps(replace_nonfinite(record), ensure_ascii=False) + "\n"


def check_finite_loss(loss: float, iter_num: int):
    """Raise UserError for a loss that is not a number, so that such a state is never saved."""
    if not math.isfinite(loss):
        problem = f"the loss is {loss} at iteration {iter_num}: the run diverged, and its last checkpoint is as it was"
        raise UserError(f"{problem}; lower learning_rate, or use dtype=float32")


def warn_if_long_run(seconds_left: float, seconds_per_iter: float, print_line: Callable[[str], None]):
    """Say so if the rest of a run, at so many seconds per update, will take long."""
    if seconds_left > LONG_RUN_SECONDS:
        settings = (
            "max_iters (and lr_decay_iters), n_layer, n_embd, block_size, batch_size or gradient_accumulation_steps"
        )
        message = f"at {seconds_per_iter:.1f} s per iteration this run will take about {seconds_left / 3600:,.0f} hours"
        print_line(f"{message}: to shorten it lower {settings}, or set max_minutes")


class RunLog:
    """The log of a run: prints lines above a progress bar, appends records to log.jsonl and mirrors them on wandb.

    Every rank has one; rank 0 prints and writes. first_records() is called there before the first record: it returns
    the records to keep from before a resume, the header, and a wandb run or None. peak_speed is the tokens/s at which
    the hardware would be at its peak, for MFU. The bar shows `initial` of `total` updates at first.
    """

    def __init__(
        self, out_dir: str, first_records: Callable[[], tuple], is_main=True, peak_speed=None, total=0, initial=0
    ):
        self.out_dir, self.first_records, self.is_main, self.peak_speed = out_dir, first_records, is_main, peak_speed
        self.file: IO | None = None
        self.wandb_run: Any = None
        self.deferred_record: tuple | None = None
        self.last_draw_time = time.monotonic()
        self.bar = progress_bar(total, initial, quiet=not (is_main and total))

    def print(self, line: str):
        """Print a line on rank 0, above the progress bar if one shows."""
        if self.is_main:
            self.bar.write(line)
            sys.stdout.flush()

    def open(self) -> IO:
        """Start the file with the records to keep and the header, and return it."""
        kept_records, header, self.wandb_run = self.first_records()
        path = os.path.join(self.out_dir, LOG_FILE)
        with atomic_write(path, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(to_json_line(record) for record in [*kept_records, {"kind": "header", **header}])
        return open(path, "a", encoding="utf-8", newline="\n")

    def write(self, kind: str, **record):
        """Append one record; a killed process loses none."""
        if not self.is_main:
            return
        self.file = self.file or self.open()
        self.file.write(to_json_line({"kind": kind, **record}))
        self.file.flush()
        if self.wandb_run is not None:
            wandb_keys = {key: f"train/{key}" if kind == "iter" else key for key in record if key != "iter"}
            wandb_keys.update(train_loss="train/loss_eval", val_loss="val/final" if kind == "final" else "val/loss")
            self.wandb_run.log({"iter": record["iter"], **{wandb_keys[k]: v for k, v in record.items() if k != "iter"}})

    def defer(self, iter_num: int, lr: float, tokens: int, seconds: float, get_loss: Callable[[], float]):
        """Keep the record of an update, of so many tokens in so many seconds, until flush() reads its loss."""
        self.deferred_record = iter_num, lr, tokens / seconds, seconds, get_loss

    def flush(self):
        """Print and append the deferred record, if any. Raises UserError for a loss that is not a number."""
        if self.deferred_record is None:
            return
        (iter_num, lr, speed, seconds, get_loss), self.deferred_record = self.deferred_record, None
        loss, ms = get_loss(), seconds * 1000
        check_finite_loss(loss, iter_num)
        mfu = speed / self.peak_speed if self.peak_speed else None
        mfu_text = f"mfu {mfu * 100:.2f}%, " if mfu else ""
        self.print(f"iter {iter_num}: loss {loss:.4f}, time {ms:.2f}ms, {mfu_text}{speed:,.0f} tokens/s")
        mfu_entry = {"mfu": round(mfu, 4)} if mfu else {}
        self.write("iter", iter=iter_num, loss=loss, lr=lr, ms=round(ms, 3), tokens_per_s=round(speed), **mfu_entry)
        self.bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)

    def write_losses(self, iter_num: int, train_loss: float, val_loss: float):
        """Print and append an evaluation. Raises UserError for a loss that is not a number."""
        self.flush()
        check_finite_loss(val_loss, iter_num)
        self.print(f"step {iter_num}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
        self.write("eval", iter=iter_num, train_loss=train_loss, val_loss=val_loss)

    def draw(self, min_seconds: float):
        """Redraw loss.png unless that was done less than so many seconds ago."""
        if time.monotonic() - self.last_draw_time > min_seconds:
            draw_loss(self.out_dir)
            self.last_draw_time = time.monotonic()

    def close(self):
        """Close the file, draw it a last time and end the wandb run."""
        if self.file is not None:
            self.file.close()
            draw_loss(self.out_dir)
        if self.wandb_run is not None:
            self.wandb_run.finish()


def start_wandb(project: str, name: str, config: dict, run_id: str | None):
    """A wandb run, that of run_id on a resume. Raises UserError if wandb is missing or refuses."""
    try:
        import wandb

        return wandb.init(project=project, name=name, config=config, id=run_id, resume="allow")
    except Exception as error:  # not installed, not logged in, no network
        problem = f"wandb could not be started ({type(error).__name__}: {error})"
        raise UserError(f"{problem}: set WANDB_MODE=offline, or wandb_log=False") from error


def import_matplotlib_figure():
    """matplotlib's Figure class, which draws into files and needs no pyplot and no backend."""
    backend = os.environ.pop("MPLBACKEND", None)  # a notebook sets it to a backend that other processes do not have
    try:
        from matplotlib.figure import Figure
    finally:
        os.environ.update({"MPLBACKEND": backend} if backend is not None else {})
    return Figure


def draw_loss(out_dir: str):
    """Redraw loss.png from log.jsonl. A failure is printed in one line and never stops a training."""
    try:
        records = read_log(out_dir)
        figure = import_matplotlib_figure()(figsize=(8, 5))
        axes = figure.add_axes((0.09, 0.1, 0.9, 0.88))  # left, bottom, width, height; tight_layout takes 0.1 s
        curves = ("iter", "loss", "training batch"), ("eval", "train_loss", "train"), ("eval", "val_loss", "validation")
        for kind, key, label in curves:
            points = [(r["iter"], r[key]) for r in records if r["kind"] == kind and r.get(key) is not None]
            line_style = dict(alpha=0.4, linewidth=0.8) if kind == "iter" else dict(marker="o", markersize=3)
            if points:
                axes.plot(*zip(*points), label=label, **line_style)
        axes.set_xlabel("iteration")
        axes.set_ylabel("loss (nats per token)")
        axes.grid(alpha=0.3)
        if axes.get_lines():
            axes.legend()
        with atomic_write(os.path.join(out_dir, LOSS_PLOT_FILE)) as file:
            figure.savefig(file, format="png", dpi=120)
    except Exception as error:  # matplotlib is missing, or broken in one of its many ways
        print(f"{LOSS_PLOT_FILE} could not be drawn: {type(error).__name__}: {error}")


def progress_bar(total: int, initial: int = 0, unit: str = "it", quiet: bool = False, **options):
    """A tqdm bar on stderr for `total` steps, `initial` of them finished; it shows nothing unless stderr is a terminal.

    With unit="B" it counts bytes: 1.5MB/2.0MB.
    """
    from tqdm import tqdm

    options |= dict(unit=unit, unit_scale=unit == "B", disable=quiet or not sys.stderr.isatty())
    return tqdm(total=total, initial=initial, dynamic_ncols=True, **options)


def format_table(rows: list[list[str]]) -> str:
    """Rows of cells as aligned text, a line each: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    aligned = [[row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:]))] for row in rows]
    return "\n".join("  ".join(cells).rstrip() for cells in aligned)
