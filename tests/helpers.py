"""Shared test helpers: generated corpora, random models, running programs, comparisons."""

import contextlib
import io
import json
import os
import random
import runpy
import socket
import subprocess
import sys

import fork_server
import pytest

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
    """Return lines of random words. The vocabulary is small and includes an accented letter."""
    rng = random.Random(seed)
    words = ["the", "knight", "rode", "to", "La", "Mancha", "and", "said:", "windmill,", "señor", "giant.", "Sancho"]
    return "".join(rng.choice(words) + ("\n" if i % 9 == 8 else " ") for i in range(n_words))


def write_corpus(folder: str, text: str) -> str:
    """Prepare a character corpus in folder, as data/*/prepare.py does, and return folder."""
    from dongpt.text.documents import Texts
    from dongpt.text.prepare import Vocabulary, prepare

    prepare(str(folder), Texts([text]), Vocabulary("char"), source="generated", sha256="0" * 64, quiet=True)
    return str(folder)


def shorten_python_docs(clone):
    """Make data/python_docs/prepare.py in a copy of the repository write a text that takes a tenth of the time."""
    path = os.path.join(clone, "data", "python_docs", "prepare.py")
    with open(path, encoding="utf-8") as file:
        code = file.read()
    assert "MAX_CHARS = 500_000" in code and "from pydoc_data.topics import" in code
    with open(path, "w", encoding="utf-8") as file:
        file.write(code.replace("500_000", "50_000").replace("pydoc_data.topics", "missing_pages"))


def visible(folder) -> list[str]:
    """Return the sorted names in a folder that may not exist, without hidden files such as locks."""
    if not os.path.exists(folder):
        return []
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def split_text(text: str) -> dict[str, str]:
    """Split text 9:1 into training and validation, as nanoGPT's scripts do."""
    cut = int(len(text) * 0.9)
    return {"train": text[:cut], "val": text[cut:]}


def write_splits(folder: str, tokenizer, texts: dict[str, str]) -> str:
    """Encode each split, write a prepared data folder, and return folder."""
    from dongpt.text.bins import BinWriter, EncodedText

    with BinWriter(str(folder), tokenizer) as writer:
        for split, text in texts.items():
            writer.add(split, EncodedText(tokenizer.encode_array(text), len(text), len(text.encode("utf-8"))))
        writer.finish({"source": "generated", "sha256": "0" * 64})
    return str(folder)


def windows(row: list[int], new: list[int], block_size: int):
    """Yield the context that predicts each new id. When it reaches block_size tokens, only the newer half is kept."""
    text, held = [], 0
    for i, token in enumerate([*row, *new]):
        if i >= len(row):
            yield text[-held:]
        text.append(token)
        held = held + 1 if held < block_size else max(1, block_size // 2)


def read_ids(folder, split: str) -> list[int]:
    """Return the token ids of a split that is stored in one file."""
    import numpy as np

    return np.fromfile(os.path.join(folder, f"{split}.bin"), "<u2").tolist()


def read_mask(folder, split: str) -> list[int]:
    """Return the loss mask, 0 or 1 per token, of a split that is stored in one file."""
    import numpy as np

    return np.fromfile(os.path.join(folder, f"{split}.mask.bin"), np.uint8).tolist()


def snapshot(folder) -> dict:
    """Return {relative path: (modification time, content)} for everything in folder, to detect any change."""
    found = {}
    for parent, _, files in os.walk(folder):
        for name in [".", *files]:
            path = os.path.join(parent, name)
            content = b""
            if name != ".":
                with open(path, "rb") as file:
                    content = file.read()
            found[os.path.relpath(path, folder)] = os.stat(path).st_mtime_ns, content
    return found


class RunsACommand:
    """An object whose pickle runs a shell command when it is loaded. The command creates the file `marker`."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f'echo broken > "{self.marker}"',)


def random_ids(*shape: int, seed: int = 0, vocab_size: int = 23):
    """Return uniformly random token ids of the given shape."""
    import torch

    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def random_prompts(lengths, vocab_size: int = 61) -> list[list[int]]:
    """Return one random prompt for each length."""
    return [random_ids(n, seed=n, vocab_size=vocab_size).tolist() for n in lengths]


def randn(*shape: int, seed: int = 0):
    """Return a standard normal tensor of the given shape."""
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomise(model, seed: int = 0, std: float | None = None):
    """Initialize every parameter of model randomly and return the model in eval mode. LayerNorm weights vary around 1.

    std: standard deviation of all parameters. By default, biases are small and attention projections are large, so that
    generated text is varied and depends on the context.
    """
    import torch

    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")) else 0.0
            default = 0.03 if name.endswith("bias") else 0.9 if name.endswith("attn.c_proj.weight") else 0.3
            parameter.copy_(torch.randn(parameter.shape) * (default if std is None else std) + mean)
    return model.eval()


def all_logits(model, idx):
    """Return the logits (B, T, V) at every position of idx (B, T), computed without a cache."""
    import torch

    idx = torch.as_tensor(idx)
    with torch.no_grad():
        return model(idx, torch.zeros_like(idx))[0]


def generated_ids(model, prompts, n: int, **settings) -> list[list[int]]:
    """Generate n new ids for each prompt."""
    import torch

    return torch.stack(list(model.stream(prompts, n, **settings))).T.tolist()


def printed(main, *args: str) -> str:
    """Call a program's main, check that it succeeds, and return its stdout."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert not main(list(args))
    return out.getvalue()


def refusal(action, *parts: str, error: type[Exception] | None = None) -> str:
    """Check that action raises a UserError whose message is one line and contains all parts. Return the message.

    error: another exception to expect, e.g. ValueError from model.py, which does not use UserError.
    """
    from configurator import UserError

    with pytest.raises(error or UserError) as caught:
        action()
    sentence = str(caught.value)
    assert "\n" not in sentence
    for part in parts:
        assert part in sentence, f"{part!r} is not in {sentence!r}"
    return sentence


def environment(**changes) -> dict:
    """Return the environment for a program with one thread and no network."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **changes}


def run(program: str, *args: str, cwd, launcher=(), env=None, timeout=300, check: int | None = 0):
    """Run a program of the repository, e.g. "train.py", in cwd as a user would. Return the CompletedProcess.

    launcher: command that replaces the Python executable, e.g. torchrun's. check: expected exit code, or None for any.
    """
    command = [*(launcher or [sys.executable]), os.path.join(ROOT, program), *args]
    done = fork_server.run(
        command,
        cwd=str(cwd),
        env=environment(**(env or {})),
        capture_output=True,
        timeout=timeout,
        encoding="utf-8",
        stdin=subprocess.DEVNULL,
    )
    if check is not None:
        assert done.returncode == check, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def run_here(program: str, *args: str, cwd, check: int | None = 0) -> subprocess.CompletedProcess:
    """Run a program of the repository like run(), but in this process, which has imported the libraries it needs."""
    old_argv, old_path, old_cwd, code = sys.argv, [*sys.path], os.getcwd(), 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            sys.argv = [os.path.join(ROOT, program), *args]
            os.chdir(cwd)
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        finally:
            sys.argv, sys.path[:] = old_argv, old_path
            os.chdir(old_cwd)
    done = subprocess.CompletedProcess([program, *args], code, out.getvalue(), err.getvalue())
    assert check in (None, code), f"{done.args}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def torchrun(n: int) -> list[str]:
    """Return the launcher command for n processes on this machine."""
    code = (
        f"import sys; sys.path.append({os.path.dirname(os.path.abspath(__file__))!r}); import fork_server, subprocess; "
        "subprocess.Popen = fork_server.Popen; "  # the ranks are forked from the server, too
        "from torch.distributed.run import main; main()"  # same as -m, but can be forked
    )
    return [sys.executable, "-c", code, "--standalone", f"--nproc_per_node={n}"]


def start_ranks(program: str, *args: str, cwd, n: int = 2) -> list[fork_server.Popen]:
    """Start a program on n ranks with torchrun's environment variables. torchrun itself takes seconds to start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return [
        fork_server.Popen(
            [sys.executable, os.path.join(ROOT, program), *args],
            cwd=str(cwd),
            env=environment(**shared, RANK=str(i), LOCAL_RANK=str(i), WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        for i in range(n)
    ]


def end_ranks(ranks: list[fork_server.Popen], timeout: float = 120) -> subprocess.CompletedProcess:
    """Wait for all ranks. Return the first rank's exit code with the output of all ranks."""
    try:
        ends = [rank.communicate(timeout=timeout) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return subprocess.CompletedProcess(ranks[0].args, ranks[0].returncode, *map("".join, zip(*ends)))


def run_ranks(program: str, *args: str, cwd, check: int | None = 0) -> subprocess.CompletedProcess:
    """Run a program on two ranks. check: expected exit code of both, or None for any."""
    done = end_ranks(ranks := start_ranks(program, *args, cwd=cwd))
    assert check is None or {rank.returncode for rank in ranks} == {check}, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def expect_sentence(done, *parts: str):
    """Check that a program exited with code 2 and printed one line on stderr that contains all parts."""
    assert done.returncode == 2, f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in lines[0], f"{part!r} is not in {lines[0]!r}"


def load(out_dir, name: str = "ckpt_last.pt") -> dict:
    """Load a checkpoint from out_dir with weights_only=True."""
    import torch

    return torch.load(os.path.join(out_dir, name), weights_only=True)


def read_log(out_dir, kind: str | None = None) -> list[dict]:
    """Return the records of log.jsonl, optionally only those of one kind."""
    with open(os.path.join(out_dir, "log.jsonl"), encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    return [record for record in records if kind in (None, record["kind"])]


def assert_same(one, other, where: str = "state"):
    """Check that two nested states are bitwise equal."""
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
    """Check that two runs ended with the same weights and optimizer state and logged the same updates."""
    one, other = load(one_dir), load(other_dir)
    for key in ("iter_num", "windows", "model", "optimizer"):
        assert_same(one[key], other[key], key)
    losses = [
        [(record["iter"], record["loss"], record["lr"]) for record in read_log(d, "iter")] for d in (one_dir, other_dir)
    ]
    assert losses[0] == losses[1]


def cached_logits(model, cache, windows: list[list[int]], fresh: list[int]):
    """Return the logits (B, V) after each window. Add the last fresh[i] tokens of window i to the cache first."""
    import torch

    T, starts = max(fresh), torch.tensor([len(window) - n for window, n in zip(windows, fresh)])
    idx = torch.tensor([window[-n:] + [0] * (T - n) for window, n in zip(windows, fresh)])
    positions = starts[:, None] + torch.arange(T)
    x = model.hidden_states(idx, positions, cache.layer_caches(positions, int(positions.max()) + 1))
    return model.lm_head(x[torch.arange(len(idx)), torch.tensor(fresh) - 1])
