"""Compare training on 8 GB in 40 shards with training on 10 MB in one file. The results are in docs/data.md.

    python docs/large.py --folder=DIR        # DIR needs 8 GB of free space; its files are reused by later runs

The token ids are random. The page cache is not cleared between measurements.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import numpy as np

import configurator
from configurator import UserError
from dongpt.program import run_program
from dongpt.text.bins import BinWriter, EncodedText
from dongpt.text.tokenizers import CharTokenizer
from dongpt.train.data import Corpus

# nanoGPT's CPU demo
MODEL = (
    "config/train_don_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=100 --block_size=64 "
    "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=500 --eval_interval=250 "
    "--dropout=0.0"
).split()
TRAINER = """
import resource, sys
sys.path.insert(0, sys.argv.pop(1))
import train
train.main(sys.argv[1:])
print("resident", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@dataclass(frozen=True)
class LargeConfig:
    folder: str = "large"  # folder for the two corpora, which are created if necessary
    tokens: int = 4_000_000_000  # number of tokens in the large corpus
    shards: int = 40  # number of shards in the large corpus


def write(folder: str, n_tokens: int, shard_tokens: int):
    """Write a corpus of random characters."""
    tokenizer, random = CharTokenizer("".join(map(chr, range(33, 118)))), np.random.default_rng(0)
    with BinWriter(folder, tokenizer, shard_tokens) as writer:
        for start in range(0, n_tokens, 2**22):
            n = min(2**22, n_tokens - start)
            writer.add("train", EncodedText(random.integers(0, 85, n, dtype=np.uint16), n, n))
        writer.add("val", EncodedText(random.integers(0, 85, 200_000, dtype=np.uint16), 200_000, 200_000))
        writer.finish({})


def measure(folder: str) -> dict:
    """Return seconds to the first batch, milliseconds per batch and per training step, and resident memory in MiB."""
    began = time.perf_counter()
    corpus = Corpus(folder)
    corpus.check(64, 85)
    corpus.train_batch(0, 12, 64, 1337, 85)
    first, times = time.perf_counter() - began, []
    for i in range(1, 3001):
        before = time.perf_counter()
        corpus.train_batch(12 * i, 12, 64, 1337, 85)
        times.append(time.perf_counter() - before)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            TRAINER,
            ROOT,
            *MODEL,
            f"--data_dir={folder}",
            f"--out_dir={os.path.join(folder, 'out')}",
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    lines = done.stdout.splitlines()
    steps = [float(line.split("time ")[1].split("ms")[0]) for line in lines if line.startswith("iter ")]
    return {
        "first_batch_s": first,
        "batch_ms": 1000 * statistics.mean(times),
        "step_ms": statistics.median(steps),
        "resident_mib": float(lines[-1].split()[1]),
    }


def main(argv: list[str] | None = None):
    cfg, _ = configurator.load(LargeConfig, argv)
    if not 0 < cfg.shards <= cfg.tokens:
        raise UserError(f"shards={cfg.shards} must be between 1 and tokens={cfg.tokens}")
    results = {}
    for name, tokens, shard_tokens in (("small", 5_000_000, 0), ("large", cfg.tokens, -(-cfg.tokens // cfg.shards))):
        folder = os.path.abspath(os.path.join(cfg.folder, name))
        if not os.path.exists(os.path.join(folder, "meta.json")):
            write(folder, tokens, shard_tokens)
        results[name] = measure(folder)
        print(name, ", ".join(f"{key} {value:.3f}" for key, value in results[name].items()), flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    run_program(main)
