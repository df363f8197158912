"""Measure the effect of document_mask on short documents: the docstrings of Python's standard library.

    python docs/documents.py                 # takes about half an hour on two cores

For a fair comparison, the loss is measured on each validation document separately, with <|endoftext|> before it. The
last line of output is JSON.
"""

import ast
import json
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import numpy as np
import torch
from torch.nn import functional as F

import configurator
from dongpt.checkpoint.files import load_model
from dongpt.program import run_program
from dongpt.text.documents import Texts
from dongpt.text.prepare import Vocabulary, prepare
from dongpt.train.data import Corpus

SETTINGS = (
    "--n_layer=3 --n_head=4 --n_embd=128 --pos_embd=rope --tie_weights=False --optimizer=muon "
    "--learning_rate=1e-2 --warmup_iters=25 --min_lr=0 --decay=linear --gradient_accumulation_steps=1 "
    "--eval_iters=10 --eval_interval=10000 --log_interval=50"
).split()
VARIANTS = {"default": [], "document_mask": ["--document_mask"]}


@dataclass(frozen=True)
class DocumentsConfig:
    shortest: int = 40  # minimum number of characters in a document
    longest: int = 600  # maximum number of characters in a document
    updates: int = 350  # number of updates per run
    seeds: int = 3  # number of seeds, starting at 1337
    block_sizes: str = "256,64"  # comma-separated block sizes; every run uses the same number of tokens per update


def docstrings(shortest: int, longest: int) -> list[str]:
    """Return the unique docstrings of the standard library, in a random order that is the same in every run."""
    found = set()
    for folder, _, names in os.walk(sysconfig.get_paths()["stdlib"]):
        for name in names:
            if name.endswith(".py") and "site-packages" not in folder:
                try:
                    with open(os.path.join(folder, name), encoding="utf-8") as file:
                        nodes = ast.walk(ast.parse(file.read()))
                except (SyntaxError, ValueError):  # some of the library's test files are invalid on purpose
                    continue
                found |= {
                    text.strip()
                    for node in nodes
                    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
                    and (text := ast.get_docstring(node))
                }
    texts = sorted(text for text in found if shortest <= len(text) <= longest)
    random.Random(0).shuffle(texts)
    return texts


@torch.no_grad()
def loss_alone(path: str, corpus: Corpus, block_size: int) -> float:
    """Return the mean loss per token over the first block_size tokens of each validation document on its own."""
    model, tokenizer = load_model(path)
    ids, end = corpus.tokens["val"][:].astype(np.int64), tokenizer.end_id
    documents = [part for part in np.split(ids, np.flatnonzero(ids == end) + 1) if len(part)]
    nats = count = 0
    for document in documents:
        window = torch.from_numpy(np.append(end, document)[None, : block_size + 1])
        model.document_end_id = None
        logits, _ = model(window[:, :-1], window[:, 1:].contiguous())
        nats += F.cross_entropy(logits[0], window[0, 1:], reduction="sum").item()
        count += window.shape[1] - 1
    return nats / count


def train(data: str, out_dir: str, block_size: int, variant: str, seed: int, updates: int):
    """Run train.py with these settings."""
    subprocess.run(
        [
            sys.executable,
            os.path.join(ROOT, "train.py"),
            *SETTINGS,
            *VARIANTS[variant],
            f"--data_dir={data}",
            f"--out_dir={out_dir}",
            f"--block_size={block_size}",
            f"--batch_size={8 * 256 // block_size}",
            f"--seed={seed}",
            f"--max_iters={updates}",
            f"--lr_decay_iters={updates}",
        ],
        check=True,
        capture_output=True,
    )


def main(argv: list[str] | None = None):
    cfg, _ = configurator.load(DocumentsConfig, argv)
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = os.path.join(folder, "data")
        texts = docstrings(cfg.shortest, cfg.longest)
        tokens = prepare(data, Texts(texts), Vocabulary("bpe", vocab_size=1024), quiet=True).meta["tokens"]
        print(f"{len(texts):,} documents; tokens: {tokens['train']:,} train, {tokens['val']:,} val", flush=True)
        corpus = Corpus(data)
        for seed in range(1337, 1337 + cfg.seeds):
            for block_size in map(int, cfg.block_sizes.split(",")):
                for variant in VARIANTS:
                    out_dir = os.path.join(folder, f"{variant} {block_size} {seed}")
                    train(data, out_dir, block_size, variant, seed, cfg.updates)
                    loss = loss_alone(os.path.join(out_dir, "ckpt.pt"), corpus, block_size)
                    losses.setdefault(f"block_size {block_size}, {variant}", []).append(loss)
                    print(f"seed {seed}, block_size {block_size}, {variant}: {loss:.4f}", flush=True)
    for name, found in losses.items():
        print(f"{name:<32}{statistics.mean(found):.4f} ({min(found):.4f} to {max(found):.4f})")
    print(json.dumps(losses))


if __name__ == "__main__":
    run_program(main)
