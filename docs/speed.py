"""Measure the results in docs/speed.md by running donGPT and a nanoGPT checkout alternately on the same machine.

    python docs/speed.py --nanogpt=PATH --rows=demo,baby,lowest,start        # on a CPU
    python docs/speed.py --nanogpt=PATH --rows=gpu_speedrun,gpu_best,gpu_shakespeare,gpu_gpt2   # on a GPU
    python docs/speed.py --rows=options                                      # measures each option
    taskset -c 0,1 python docs/speed.py ...                                  # uses two cores

PATH is a nanoGPT checkout with DI725's config/train_don_char.py and data/don_char/{train,val}.bin. These files must
contain the ids that `python data/don_char/prepare.py --raw=True` writes here. The last line of output is JSON.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import numpy as np

import configurator
from configurator import UserError
from dongpt.program import run_program

DEMO = (
    "config/train_don_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 "
    "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)
STEPS = "config/train_don_char.py --eval_iters=1 --eval_interval=1000 --log_interval=1 --max_iters=6"
BENCH = "bench.py --warmup=2 --iters=4 --rounds=1"

# Runs to compare in each row: (name, "theirs" or "ours", arguments of train.py or of another program).
ROWS = {
    "demo": [("nanoGPT", "theirs", DEMO), ("donGPT", "ours", "config/speedrun_don_char_cpu.py")],
    "lowest": [("donGPT", "ours", "config/best_don_char_cpu.py")],
    "baby": [
        ("nanoGPT", "theirs", f"{STEPS} --device=cpu --compile=False"),
        ("nanoGPT, compiled", "theirs", f"{STEPS} --device=cpu --compile=True"),
        ("donGPT", "ours", f"{BENCH} config/train_don_char.py --device=cpu --compile=False"),
        ("donGPT, compiled", "ours", f"{BENCH} config/train_don_char.py --device=cpu --compile=True"),
    ],
    "start": [("donGPT", "ours", "config/quickstart.py --max_iters=1")],
    "gpu_speedrun": [
        ("nanoGPT", "theirs", "config/train_don_char.py"),
        ("donGPT", "ours", "config/speedrun_don_char.py"),
    ],
    "gpu_best": [("nanoGPT", "theirs", "config/train_don_char.py"), ("donGPT", "ours", "config/best_don_char.py")],
    "gpu_shakespeare": [
        ("nanoGPT", "theirs", "config/train_shakespeare_char.py"),
        ("donGPT", "ours", "config/best_shakespeare_char.py"),
    ],
    "gpu_gpt2": [
        ("nanoGPT", "theirs", "bench.py --real_data=False --batch_size=30"),
        ("donGPT", "ours", "bench.py config/train_gpt2.py --real_data=False --gradient_accumulation_steps=1"),
    ],
}

# Changes to config/best_don_char_cpu.py that show the effect of each of its options in 200 iterations. The loss is
# measured on the last tenth of train.bin, which is held out of training; val.bin is not used.
OPTIONS = [
    "",
    "--ngrams=1",
    "--ngrams=3",
    "--ngrams=5",
    "--ngrams=7",
    "--optimizer=adamw --learning_rate=3e-3",
    "--optimizer=adamw --learning_rate=6e-3",
    "--pos_embd=default",
    "--pos_embd=relative",
    "--decay=cosine",
    "--tie_weights=True",
    "--dropout=0.1",
    "--weight_decay=0.1",
    "--weight_decay=0.5",
    "--grad_clip=1",
    "--ngrams=1 --optimizer=adamw --learning_rate=3e-3 --pos_embd=default --decay=cosine",
]
SHORT = "config/best_don_char_cpu.py --max_iters=200 --lr_decay_iters=200 --eval_interval=1000 --eval_iters=1"


THEIR_PEAK, OUR_PEAK = 312e12, 989e12  # peak FLOP/s for mfu: nanoGPT always assumes an A100, we an H100 or H200


@dataclass(frozen=True)
class SpeedConfig:
    nanogpt: str = ""  # path to a nanoGPT checkout; if empty, only donGPT is measured
    rows: str = "demo,baby,lowest,start"  # rows of the table to measure, separated by commas
    rounds: int = 3  # number of times to repeat each run, alternating with the other runs in its row

    def __post_init__(self):
        if self.rounds < 1:
            raise UserError(f"rounds={self.rounds} must be at least 1")
        if self.nanogpt and not os.path.exists(os.path.join(self.nanogpt, "train.py")):
            raise UserError(f"nanogpt={self.nanogpt} has no train.py: pass the path to a nanoGPT checkout")
        if unknown := [row for row in self.rows.split(",") if row not in (*ROWS, "options")]:
            raise UserError(f"unknown rows={unknown[0]!r}: choose from {','.join(ROWS)}, or pass --rows=options")


def measure(name: str, whose: str, arguments: str, cfg: SpeedConfig, out_dir: str, seed: int) -> dict:
    """Measure one run: its total seconds, seconds to the first iteration, median milliseconds per iteration, mfu in
    percent, and loss on the whole validation set. Values that do not apply are None."""
    words = arguments.split()
    program = words.pop(0) if words[0].endswith("bench.py") else "train.py"
    folder = ROOT if whose == "ours" else cfg.nanogpt
    if program == "train.py":
        words.append(f"--out_dir={out_dir}")
        words += [f"--seed={seed}"] if whose == "ours" else []  # nanoGPT's seed is hardcoded
    began, first, lines = time.perf_counter(), None, []
    with subprocess.Popen(
        [sys.executable, "-u", program, *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    ) as process:
        for line in process.stdout:
            lines.append(line)
            if first is None and line.startswith("iter 0"):
                first = time.perf_counter() - began
    seconds = time.perf_counter() - began
    if process.returncode:
        raise UserError(f"{name}: {program} {' '.join(words)} failed with {process.returncode}: {''.join(lines[-3:])}")
    times = [float(found) for found in re.findall(r"time(?: per iteration)?:? ([\d.]+)ms", "".join(lines))]
    mfu = re.findall(r"(?i)mfu:? ([\d.]+)%", "".join(lines))
    return {
        "name": name,
        "seconds": seconds,
        "first_iteration_s": first,
        "loss": whole_loss(out_dir),
        "ms": statistics.median(times[2:] or times) if times else None,
        "mfu": float(mfu[-1]) * (THEIR_PEAK / OUR_PEAK if whose == "theirs" else 1) if mfu else None,
    }


def whole_loss(out_dir: str) -> float | None:
    """Return the loss of out_dir/ckpt.pt on the whole validation set, or None if there is no checkpoint."""
    path = os.path.join(out_dir, "ckpt.pt")
    if not os.path.exists(path):
        return None
    done = subprocess.run(
        [sys.executable, "evaluate.py", path, "--json"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)[0]["loss"]


def hold_out(folder: str):
    """Write don_char's training set to folder as a new corpus, with the last tenth as its validation set."""
    source = os.path.join(ROOT, "data", "don_char")
    if not os.path.exists(os.path.join(source, "meta.json")):
        raise UserError("data/don_char is not prepared: run python data/don_char/prepare.py --raw=True first")
    tokens = np.fromfile(os.path.join(source, "train.bin"), dtype="<u2")
    splits = {"train": tokens[: len(tokens) * 9 // 10], "val": tokens[len(tokens) * 9 // 10 :]}
    with open(os.path.join(source, "meta.json"), encoding="utf-8") as file:
        meta = json.load(file)
    with open(os.path.join(folder, "meta.json"), "w", encoding="utf-8") as file:
        json.dump(
            {
                "tokenizer": meta["tokenizer"],
                "vocab_size": meta["vocab_size"],
                "tokens": {split: len(part) for split, part in splits.items()},
            },
            file,
        )
    for split, part in splits.items():
        part.tofile(os.path.join(folder, f"{split}.bin"))


def measure_options(cfg: SpeedConfig):
    """Print each option's mean loss over the seeds, its range, and its difference from the loss without options."""
    losses: dict[str, list[float]] = {option: [] for option in OPTIONS}
    with tempfile.TemporaryDirectory() as data:
        hold_out(data)
        for i in range(cfg.rounds):
            for option in OPTIONS:
                with tempfile.TemporaryDirectory() as folder:
                    result = measure(
                        option,
                        "ours",
                        f"{SHORT} --data_dir={data} {option}",
                        cfg,
                        os.path.join(folder, "out"),
                        1337 + i,
                    )
                losses[option].append(result["loss"])
                print(f"seed {1337 + i}: {result['loss']:.4f}, {result['ms']:.0f} ms  {option}", flush=True)
    for option, found in losses.items():
        apart = statistics.mean(found) - statistics.mean(losses[""])
        print(
            f"{statistics.mean(found):.4f} ({min(found):.4f} to {max(found):.4f}) {apart:+.4f}  {option or 'default'}"
        )
    print(json.dumps(losses))


def main(argv: list[str] | None = None):
    cfg, _ = configurator.load(SpeedConfig, argv)
    if "options" in cfg.rows.split(","):
        measure_options(cfg)
        return
    results = []
    for row in cfg.rows.split(","):
        runs = [run for run in ROWS[row] if run[1] == "ours" or cfg.nanogpt]
        for i in range(cfg.rounds):
            for run in runs:
                with tempfile.TemporaryDirectory() as folder:
                    result = {"row": row, "round": i, **measure(*run, cfg, os.path.join(folder, "out"), 1337 + i)}
                results.append(result)
                print(
                    ", ".join(
                        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                        for key, value in result.items()
                        if value is not None
                    ),
                    flush=True,
                )
        for name, *_ in runs:
            mine = [result for result in results if result["row"] == row and result["name"] == name]
            for key in ("seconds", "first_iteration_s", "ms", "mfu", "loss"):
                values = [result[key] for result in mine if result[key] is not None]
                if values:
                    print(
                        f"{row:<14}{name:<20}{key:<20}{statistics.median(values):>10.4f}   "
                        f"({min(values):.4f} to {max(values):.4f}, {len(values)} runs)",
                        flush=True,
                    )
    print(json.dumps(results))


if __name__ == "__main__":
    run_program(main)
