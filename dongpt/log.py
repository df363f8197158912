"""What a run measured: owner of log.jsonl in an out_dir, of its picture loss.png, and of the mirror on wandb.

The first line of log.jsonl is a header (config, versions, data, command); each further line is a record:
{"kind": "iter", "iter": 7, "loss": ...} for an update, {"kind": "eval", "iter": 8, "val_loss": ...} after 8 updates.
"""

import json
import math
import os
import sys

from configurator import UserError

LOG, PICTURE = "log.jsonl", "loss.png"

# Dense bf16 (fp16 on Volta and Turing) tensor-core peak in FLOP/s as the vendor's datasheets have it, written down from
# memory and still to be checked against them; the longest name wins.
PEAK_FLOPS = {
    "V100": 125e12,
    "T4": 65e12,
    "A10": 125e12,
    "A100": 312e12,
    "A30": 165e12,
    "A40": 150e12,
    "L4": 121e12,
    "L40S": 362e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
}


def peak_flops(gpu_name: str) -> float | None:
    """Peak FLOP/s of a GPU by the name that CUDA gives it, None for one that is not in the table."""
    words = f" {gpu_name.replace('-', ' ')} "
    known = [name for name in PEAK_FLOPS if f" {name} " in words]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def read_log(out_dir: str) -> list[dict]:
    """The records of log.jsonl, [] without one; a last line that a crash cut off is left out."""
    records = []
    if os.path.exists(os.path.join(out_dir, LOG)):
        with open(os.path.join(out_dir, LOG), encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    records.append(json.loads(line))
                except ValueError:
                    break
    return records


class RunLog:
    """Appends records to log.jsonl as they come, and to wandb where a run is given."""

    def __init__(self, out_dir: str, wandb_run=None):
        self.out_dir, self.wandb_run = out_dir, wandb_run
        self.file = None

    def open(self, kept: list[dict], header: dict):
        """Write the records kept from before a resume, then a header; a killed process loses no record."""
        path = os.path.join(self.out_dir, LOG)
        with open(path + ".part", "w", encoding="utf-8", newline="\n") as file:
            for record in [*kept, {"kind": "header", **header}]:
                file.write(_line(record))
        os.replace(path + ".part", path)
        self.file = open(path, "a", encoding="utf-8", newline="\n")

    def write(self, kind: str, **record):
        """Append one record."""
        self.file.write(_line({"kind": kind, **record}))
        self.file.flush()
        if self.wandb_run is not None:
            names = {key: f"train/{key}" if kind == "iter" else key for key in record if key != "iter"}
            names.update(train_loss="train/loss_eval", val_loss="val/final" if kind == "final" else "val/loss")
            self.wandb_run.log({"iter": record["iter"], **{names[k]: v for k, v in record.items() if k != "iter"}})

    def close(self):
        """Close the file and end the wandb run."""
        if self.file is not None:
            self.file.close()
        if self.wandb_run is not None:
            self.wandb_run.finish()


def finite(value):
    """value for strict JSON: floats that are not finite, also inside dicts, become None."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(record: dict) -> str:
    """record as one line of strict JSON."""
    return json.dumps(finite(record), ensure_ascii=False) + "\n"


def records_before(records: list[dict], iter_num: int, evaluated_at: int) -> list[dict]:
    """What of a log belongs to a state of iter_num finished updates whose last evaluation was after evaluated_at."""
    bound = {"iter": iter_num - 1, "eval": evaluated_at, "final": -1}
    return [record for record in records if record.get("iter", 0) <= bound.get(record.get("kind"), iter_num)]


def start_wandb(project: str, name: str, config: dict, run_id: str | None):
    """A wandb run, the one of run_id on a resume. Raises UserError when wandb is missing or refuses."""
    try:
        import wandb

        return wandb.init(project=project, name=name, config=config, id=run_id, resume="allow")
    except Exception as error:  # not installed, not logged in, no network
        raise UserError(
            f"wandb could not be started ({type(error).__name__}: {error}): set WANDB_MODE=offline, or wandb_log=False"
        ) from error


def draw_loss(out_dir: str):
    """Redraw loss.png from log.jsonl. A failure is said in one line and nothing more: no training ends for it."""
    try:
        os.environ["MPLBACKEND"] = "Agg"  # before the import: a notebook's names a backend that scripts do not have
        from matplotlib.figure import Figure  # pyplot would take longer to import, and opens windows

        records = read_log(out_dir)
        figure = Figure(figsize=(8, 5))
        axes = figure.subplots()
        for kind, key, label, style in (
            ("iter", "loss", "training batch", dict(alpha=0.4, linewidth=0.8)),
            ("eval", "train_loss", "train", dict(marker="o", markersize=3)),
            ("eval", "val_loss", "validation", dict(marker="o", markersize=3)),
        ):
            points = [(r["iter"], r[key]) for r in records if r["kind"] == kind and r.get(key) is not None]
            if points:
                axes.plot(*zip(*points), label=label, **style)
        axes.set_xlabel("iteration")
        axes.set_ylabel("loss (nats per token)")
        axes.grid(alpha=0.3)
        if axes.get_lines():
            axes.legend()
        figure.tight_layout()
        figure.savefig(os.path.join(out_dir, PICTURE + ".part"), format="png", dpi=120)
        os.replace(os.path.join(out_dir, PICTURE + ".part"), os.path.join(out_dir, PICTURE))
    except Exception as error:  # matplotlib missing or broken in one of its many ways
        print(f"{PICTURE} could not be drawn: {type(error).__name__}: {error}")


def progress_bar(total: int, done: int = 0, unit: str = "it", quiet: bool = False, **options):
    """A tqdm bar on stderr for `total` steps, `done` of them finished; it shows nothing unless stderr is a terminal.

    It can be used in a with statement, and its update, set_postfix_str, write and close work whether it shows or not.
    With unit="B" it counts bytes: 1.5MB/2.0MB.
    """
    from tqdm import tqdm

    hidden = quiet or not sys.stderr.isatty()
    scaled = unit == "B"
    return tqdm(total=total, initial=done, unit=unit, unit_scale=scaled, dynamic_ncols=True, disable=hidden, **options)


def format_table(rows: list[list[str]]) -> str:
    """Rows of cells as aligned text, a line each: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    )
