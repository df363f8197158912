"""Helpers shared by the tests: generated corpora, ways to run the programs, comparisons."""

import json
import os
import random
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


TINY_MODEL = [
    "--n_layer=2",
    "--n_head=2",
    "--n_embd=16",
    "--block_size=16",
    "--batch_size=4",
    "--gradient_accumulation_steps=2",
]


TINY_RUN = TINY_MODEL + [
    "--device=cpu",
    "--compile=False",
    "--max_iters=6",
    "--lr_decay_iters=6",
    "--warmup_iters=2",
    "--learning_rate=1e-2",
    "--eval_interval=3",
    "--eval_iters=2",
    "--dropout=0.1",
]


def generated_text(n_words: int = 4000, seed: int = 0) -> str:
    """English-like lines of words from a small vocabulary, the same for the same seed; with a few accents."""
    rng = random.Random(seed)
    words = ["the", "knight", "rode", "to", "La", "Mancha", "and", "said:", "windmill,", "señor", "giant.", "Sancho"]
    return "".join(rng.choice(words) + ("\n" if i % 9 == 8 else " ") for i in range(n_words))


def write_corpus(folder: str, text: str) -> str:
    """A character corpus of text in folder, as data/*/prepare.py writes it; returns folder."""
    from dongpt.text.documents import Texts
    from dongpt.text.prepare import Vocabulary, prepare

    prepare(str(folder), Texts([text]), Vocabulary("char"), source="generated", sha256="0" * 64)
    return str(folder)


def visible(folder) -> list[str]:
    """The names in a folder, sorted, without hidden ones such as the lock's."""
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def split_text(text: str) -> dict[str, str]:
    """The splits of a text where nanoGPT's scripts cut."""
    cut = int(len(text) * 0.9)
    return {"train": text[:cut], "val": text[cut:]}


def write_splits(folder: str, tokenizer, texts: dict[str, str]) -> str:
    """A corpus of these splits in folder; returns folder."""
    from dongpt.text.bins import Encoded, Writer

    with Writer(str(folder), tokenizer) as writer:
        for split, text in texts.items():
            writer.add(split, Encoded(tokenizer.encode_array(text), len(text), len(text.encode("utf-8"))))
        writer.finish({"source": "generated", "sha256": "0" * 64})
    return str(folder)


def windows(row: list[int], new: list[int], block_size: int):
    """What the model sees before each of the new ids: all, or after one token too many the newest half."""
    text, held = [], 0
    for i, token in enumerate([*row, *new]):
        if i >= len(row):
            yield text[-held:]
        text.append(token)
        held = held + 1 if held < block_size else max(1, block_size // 2)


def run(program: str, *args: str, cwd, launcher=(), env=None, timeout=300, check: int | None = 0):
    """Run a program of the repository (e.g. "train.py") in cwd as a user would; returns the CompletedProcess.

    launcher: words instead of the Python executable, e.g. torchrun's. check: the exit code that is expected, or None.
    """
    command = [*(launcher or [sys.executable]), os.path.join(ROOT, program), *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(env or {})}
    done = subprocess.run(
        command,
        cwd=str(cwd),
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        encoding="utf-8",
        stdin=subprocess.DEVNULL,
    )
    if check is not None:
        assert done.returncode == check, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def torchrun(n: int) -> list[str]:
    """The launcher words that start n processes on this machine."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]


def expect_sentence(done, *parts: str):
    """Check that a program ended as it must on bad input: exit code 2, one line on stderr with parts, no traceback."""
    assert done.returncode == 2, f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in lines[0], f"{part!r} is not in {lines[0]!r}"


def load(out_dir, name: str = "ckpt_last.pt") -> dict:
    """A checkpoint of out_dir as torch reads it without trust."""
    import torch

    return torch.load(os.path.join(out_dir, name), weights_only=True)


def read_log(out_dir, kind: str | None = None) -> list[dict]:
    """The records of log.jsonl, those of one kind if it is given."""
    with open(os.path.join(out_dir, "log.jsonl"), encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    return [record for record in records if kind in (None, record["kind"])]


def assert_same(one, other, where: str = "state"):
    """Check that two states hold bit for bit the same."""
    import torch

    assert type(one) is type(other), where
    if torch.is_tensor(one):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other)):
            assert_same(a, b, f"{where}[{i}]")
    else:
        assert one == other, where


def assert_same_training(one_dir, other_dir):
    """Check that two runs ended with the same weights and optimizer state, and that each update is logged once."""
    one, other = load(one_dir), load(other_dir)
    for key in ("iter_num", "windows", "model", "optimizer"):
        assert_same(one[key], other[key], key)
    losses = [
        [(record["iter"], record["loss"], record["lr"]) for record in read_log(d, "iter")] for d in (one_dir, other_dir)
    ]
    assert losses[0] == losses[1]


def cached_logits(model, cache, windows: list[list[int]], fresh: list[int]):
    """Logits (R, V) behind each window, of whose tokens the cache holds all but the newest fresh[i], by then all."""
    import torch

    T, starts = max(fresh), torch.tensor([len(window) - n for window, n in zip(windows, fresh)])
    idx = torch.tensor([window[-n:] + [0] * (T - n) for window, n in zip(windows, fresh)])
    positions = starts[:, None] + torch.arange(T)
    x = model._hidden(idx, positions, cache.at(positions, int(positions.max()) + 1))
    return model.lm_head(x[torch.arange(len(idx)), torch.tensor(fresh) - 1])
