"""train.py from the first line it prints to the files it leaves; resuming, several processes and bad input apart."""

import hashlib
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import threading

import fork_server
import pytest
import torch
from helpers import (
    ROOT,
    TINY_RUN,
    assert_same,
    generated_text,
    load,
    read_log,
    run,
    shorten_python_docs,
    snapshot,
    write_corpus,
    write_splits,
)

import evaluate
import train
from dongpt import runtime
from dongpt.text.tokenizers import CharTokenizer

NANOGPT_KEYS = {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"}
PNG = b"\x89PNG\r\n\x1a\n"
TEN = ["--max_iters=10", "--lr_decay_iters=10"]
pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


@pytest.fixture(scope="module")
def shown(tmp_path_factory, tiny_data):
    """Train a small model from the command line. Return (out_dir, stdout, arguments)."""
    folder = tmp_path_factory.mktemp("shown")
    args = [f"--data_dir={tiny_data}", f"--out_dir={folder / 'out'}", *TINY_RUN]
    return str(folder / "out"), run("train.py", *args, cwd=folder).stdout, args


@pytest.fixture(scope="module")
def watched_little(tmp_path_factory, tiny_data):
    """The out_dir of ten updates that were watched as little as possible."""
    out_dir = str(tmp_path_factory.mktemp("watched_little") / "out")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train.main([f"--data_dir={tiny_data}", f"--out_dir={out_dir}", *TINY_RUN, *TEN, "--eval_interval=1000"])
    torch.set_num_threads(threads)
    return out_dir


def assert_same_training(one_dir, other_dir):
    """Check that two runs ended with the same weights and optimizer state, bit for bit."""
    one, other = load(one_dir), load(other_dir)
    for key in ("iter_num", "model", "optimizer"):
        assert_same(one[key], other[key], key)


@pytest.fixture
def one_sentence(tmp_path) -> str:
    """A corpus whose train split is a single window, so that a model soon knows it by heart and val gets worse."""
    texts = {"train": "the knight rode t", "val": "to the giant. " * 12}
    folder = str(tmp_path / "one_sentence")
    return write_splits(folder, CharTokenizer.from_text("".join(texts.values())), texts)


def overfit(data_dir: str, out_dir: str, *args: str) -> int:
    return train.main(
        [
            f"--data_dir={data_dir}",
            f"--out_dir={out_dir}",
            *TINY_RUN,
            "--n_embd=32",
            "--dropout=0.0",
            "--max_iters=60",
            "--decay_lr=False",
            "--eval_interval=4",
            "--eval_iters=100",
            *args,
        ]
    )


# ----------------------------------------------------------------------------------------------------------------------
# the learning rate


def schedule(**settings) -> train.TrainConfig:
    return train.TrainConfig(**{**dict(learning_rate=1.0, min_lr=0.1, warmup_iters=10, lr_decay_iters=110), **settings})


@pytest.mark.smoke
def test_learning_rate_warms_up_from_above_zero_and_falls_as_a_cosine_to_min_lr():
    cfg = schedule()
    assert train.get_lr(0, cfg) == pytest.approx(1 / 11)  # not zero: the first update would do nothing
    rising = [train.get_lr(it, cfg) for it in range(11)]
    assert rising == sorted(rising) and len(set(rising)) == 11
    assert train.get_lr(10, cfg) == pytest.approx(1.0)
    assert train.get_lr(60, cfg) == pytest.approx(0.55)  # half-way between 1 and 0.1
    assert train.get_lr(35, cfg) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert train.get_lr(110, cfg) == train.get_lr(10**9, cfg) == 0.1


@pytest.mark.smoke
def test_learning_rate_without_room_for_the_cosine_divides_by_nothing():
    cfg = schedule(warmup_iters=10, lr_decay_iters=10)
    assert [round(train.get_lr(it, cfg), 3) for it in (9, 10, 11)] == [0.909, 0.1, 0.1]
    assert train.get_lr(0, schedule(warmup_iters=0, lr_decay_iters=0)) == 0.1
    assert train.get_lr(5, schedule(warmup_iters=20, lr_decay_iters=10)) == pytest.approx(6 / 21)


@pytest.mark.smoke
def test_constant_learning_rate_stays_constant_from_the_first_update():
    cfg = schedule(decay_lr=False)
    assert {train.get_lr(it, cfg) for it in (0, 5, 10, 110, 1000)} == {1.0}


# ----------------------------------------------------------------------------------------------------------------------
# what a run does and leaves


@pytest.mark.slow
@pytest.mark.smoke
def test_one_batch_is_overfitted(one_sentence):
    assert overfit(one_sentence, "out") == 0
    losses = [record["loss"] for record in read_log("out", "iter")]
    assert losses[0] == pytest.approx(math.log(load("out")["model_args"]["vocab_size"]), abs=0.3)
    assert losses[-1] < 0.1


def test_loss_goes_down_on_a_text(tiny_data):
    train.main(
        [
            f"--data_dir={tiny_data}",
            *TINY_RUN,
            "--max_iters=40",
            "--lr_decay_iters=40",
            "--eval_interval=40",
            "--eval_iters=20",
        ]
    )
    first, last = read_log("out", "eval")
    assert last["val_loss"] < first["val_loss"] - 0.3
    assert last["train_loss"] < first["train_loss"] - 0.3


def test_a_run_makes_exactly_max_iters_updates(shown):
    out_dir, _, _ = shown
    state = load(out_dir)
    assert state["iter_num"] == 6
    assert state["windows"] == 6 * 2 * 4
    assert [record["iter"] for record in read_log(out_dir, "iter")] == [0, 1, 2, 3, 4, 5]
    assert [record["iter"] for record in read_log(out_dir, "eval")] == [0, 3, 6]
    assert {int(s["step"]) for s in state["optimizer"]["state"].values()} == {6}


@pytest.mark.slow
@pytest.mark.smoke
def test_log_begins_with_a_header_that_says_what_was_run(shown, tiny_data):
    out_dir, _, args = shown
    header, *records = read_log(out_dir)
    assert header["kind"] == "header"
    assert header["config"]["n_embd"] == 16 and header["config"]["data_dir"] == tiny_data
    assert header["config"].keys() == {field for field in train.TrainConfig.__dataclass_fields__}
    assert header["versions"]["torch"] == torch.__version__ and {"python", "numpy"} <= header["versions"].keys()
    bins = b"".join(open(os.path.join(tiny_data, name), "rb").read() for name in ("train.bin", "val.bin"))
    assert header["data_sha256"] == hashlib.sha256(bins).hexdigest()
    assert all(arg in header["command"] for arg in args)
    assert {record["kind"] for record in records} == {"iter", "eval", "final"}
    assert all(math.isfinite(record["loss"]) and record["lr"] > 0 for record in records if record["kind"] == "iter")


@pytest.mark.smoke
def test_loss_png_is_a_picture(shown):
    with open(os.path.join(shown[0], "loss.png"), "rb") as file:
        assert file.read(8) == PNG
    assert not [name for name in os.listdir(shown[0]) if name.endswith(".part")]


@pytest.mark.smoke
def test_final_loss_is_the_one_that_evaluate_prints(shown, capsys):
    out_dir, stdout, _ = shown
    evaluate.main([f"--out_dir={out_dir}", "--json", "--device=cpu"])
    (measured,) = json.loads(capsys.readouterr().out)
    (final,) = read_log(out_dir, "final")
    assert final["val_loss"] == pytest.approx(measured["loss"], abs=1e-5)  # sums of float32 in another order
    assert final["bits_per_byte"] == pytest.approx(measured["bits_per_byte"], abs=1e-5)
    assert final["tokens"] == measured["tokens"]
    (line,) = [line for line in stdout.splitlines() if line.startswith("final: ")]
    assert f"validation set is {measured['loss']:.4f} (perplexity {measured['perplexity']:.2f})" in line


@pytest.mark.smoke
def test_checkpoint_holds_nanogpts_keys_and_ours_and_needs_no_unpickling(shown):
    out_dir, _, _ = shown
    for name in ("ckpt.pt", "ckpt_last.pt"):
        checkpoint = load(out_dir, name)  # weights_only
        assert NANOGPT_KEYS | {"format_version", "tokenizer", "windows"} <= checkpoint.keys()
        assert set(checkpoint["model_args"]) == {
            "n_layer",
            "n_head",
            "n_embd",
            "block_size",
            "bias",
            "vocab_size",
            "dropout",
        }
        assert checkpoint["tokenizer"]["kind"] == "char"
        assert {"device", "dtype", "compile", "threads"} <= checkpoint["runtime"].keys()
        assert checkpoint["runtime"]["dtype"] == "float32" and checkpoint["config"]["dtype"] == "auto"
        assert "transformer.h.1.attn.c_attn.weight" in checkpoint["model"]
        assert all(isinstance(value, (int, float, bool, str, type(None))) for value in checkpoint["config"].values())
        assert isinstance(checkpoint["best_val_loss"], float)


@pytest.mark.smoke
def test_lines_that_log_scrapers_read_keep_nanogpts_wording(shown, tiny_data):
    out_dir, stdout, _ = shown
    lines = stdout.splitlines()
    assert int(one(r"tokens per iteration will be: ([\d,]+) ", stdout)[1].replace(",", "")) == 2 * 4 * 16
    one(r"number of parameters: 0\.01M \([\d,]+ in 2 blocks, [\d,]+ in embeddings\)$", stdout)
    steps = [re.match(r"step (\d+): train loss (\d+\.\d{4}), val loss (\d+\.\d{4})$", line) for line in lines]
    assert [match[1] for match in steps if match] == ["0", "3", "6"]
    iters = [re.match(r"iter (\d+): loss (\d+\.\d{4}), time (\d+\.\d{2})ms", line) for line in lines]
    assert [match[1] for match in iters if match] == ["0", "1", "2", "3", "4", "5"]
    assert lines.count(f"saving checkpoint to {out_dir}") == 2
    one(r"device: cpu \(requested\), dtype: float32 \(.+\), compile: off \(requested\), 1 thread$", stdout)


def one(pattern: str, text: str) -> re.Match:
    """The match of pattern in the only line of text that it matches."""
    found = [match for line in text.splitlines() if (match := re.match(pattern, line))]
    assert len(found) == 1, f"{pattern!r} in\n{text}"
    return found[0]


@pytest.mark.parametrize("verbose", [False, True])
def test_nanogpts_other_lines_are_printed_only_with_verbose(verbose, tiny_data, capsys):
    assert train.main([f"--data_dir={tiny_data}", *TINY_RUN, "--max_iters=1", f"--verbose={verbose}"]) == 0
    printed = capsys.readouterr().out
    patterns = [
        r"Overriding: n_embd = 16$",
        r"Overriding: eval_interval = 3$",
        rf"found vocab_size = {load('out')['model_args']['vocab_size']} \(inside .+\)$",
        r"Initializing a new model from scratch$",
        r"num decayed parameter tensors: 10, with 6,800 parameters$",
        r"num non-decayed parameter tensors: 5, with 80 parameters$",
        r"using fused AdamW: (True|False)$",
    ]
    for pattern in patterns:
        assert len(re.findall(f"^{pattern}", printed, re.MULTILINE)) == verbose, pattern


def read_terminal(descriptor: int):
    """Yield what programs write to a pseudo-terminal, until the last of them has closed it."""
    while True:
        try:
            piece = os.read(descriptor, 4096)
        except OSError:  # Linux says so; macOS reads nothing
            return
        if not piece:
            return
        yield piece


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_scraped_lines_are_printed_above_the_progress_bar_on_a_terminal(tmp_path, tiny_data):
    import fcntl
    import termios

    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # a new one has no columns
    process = fork_server.Popen(
        [sys.executable, os.path.join(ROOT, "train.py"), f"--data_dir={tiny_data}", *TINY_RUN],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    os.close(theirs)
    shown = []
    reader = threading.Thread(target=lambda: shown.extend(read_terminal(ours)))
    reader.start()
    lines = process.communicate(timeout=120)[0].splitlines()
    reader.join(timeout=10)
    os.close(ours)
    bar = b"".join(shown).decode()
    assert process.returncode == 0
    assert "tokens/s" in bar
    assert "val loss" in re.findall(r"6/6 [^\r]*", bar)[-1]  # not the loss of a batch of long ago
    assert len([line for line in lines if re.match(r"iter \d+: loss ", line)]) == 6
    assert len([line for line in lines if re.match(r"step \d+: train loss ", line)]) == 3


# ----------------------------------------------------------------------------------------------------------------------
# best and last, early ends


def test_ckpt_is_the_lowest_validation_loss_and_ckpt_last_the_newest_state(one_sentence, capsys):
    overfit(one_sentence, "out")
    losses = {record["iter"]: record["val_loss"] for record in read_log("out", "eval") if record["iter"] > 0}
    best = min(losses, key=losses.get)
    assert best < 60  # otherwise this test shows nothing
    assert load("out", "ckpt.pt")["iter_num"] == best and load("out")["iter_num"] == 60
    assert load("out", "ckpt.pt")["best_val_loss"] == load("out")["best_val_loss"] == losses[best]
    (final,) = read_log("out", "final")
    assert final["iter"] == best
    assert final["val_loss"] == pytest.approx(losses[best], abs=1e-5)  # eval_iters covers the whole split here
    printed = capsys.readouterr().out
    assert f"the loss on the whole validation set is {final['val_loss']:.4f} (" in printed
    assert f"), measured at iteration {best} over " in printed
    assert f"overfitting: the validation loss was lowest at iteration {best} and rose to" in printed


def test_always_save_checkpoint_makes_ckpt_follow_the_newest_state(one_sentence):
    overfit(one_sentence, "out", "--always_save_checkpoint=True")
    assert_same(load("out", "ckpt.pt"), load("out"))
    assert load("out", "ckpt.pt")["iter_num"] == 60


def test_patience_ends_a_run_that_gets_no_better(one_sentence, capsys):
    assert overfit(one_sentence, "out", "--patience=2", "--max_iters=100000") == 0
    evaluations = [record for record in read_log("out", "eval") if record["iter"] > 0]
    best = min(range(len(evaluations)), key=lambda i: evaluations[i]["val_loss"])
    assert len(evaluations) - 1 - best == 2
    assert load("out")["iter_num"] == evaluations[-1]["iter"] < 100000
    assert load("out", "ckpt.pt")["iter_num"] == evaluations[best]["iter"]
    assert "validation loss did not improve in 2 evaluations" in capsys.readouterr().out
    assert len(read_log("out", "final")) == 1


def test_max_minutes_ends_a_run_in_good_order(tiny_data, capsys):
    assert (
        train.main(
            [
                f"--data_dir={tiny_data}",
                *TINY_RUN,
                "--max_iters=1000000",
                "--eval_interval=1000000",
                "--max_minutes=0.01",
            ]
        )
        == 0
    )
    state = load("out")
    assert 0 < state["iter_num"] < 1000000
    assert read_log("out", "eval")[-1]["iter"] == read_log("out", "final")[0]["iter"] == state["iter_num"]
    assert re.search(
        r"^ended after \d+ of 1000000 iterations: reached max_minutes=0.01", capsys.readouterr().out, re.MULTILINE
    )


def test_max_minutes_that_are_over_before_the_first_update_still_end_in_good_order(tiny_data):
    """The run ended with 'there is no checkpoint out/ckpt.pt' and exit code 2, since it had saved nothing yet."""
    assert train.main([f"--data_dir={tiny_data}", *TINY_RUN, "--max_minutes=1e-9"]) == 0
    assert load("out")["iter_num"] <= 1 and load("out", "ckpt.pt")["iter_num"] <= 1


def test_a_run_of_no_updates_is_refused(tiny_data, tmp_path):
    """max_iters=0 ended with 'there is no checkpoint out/ckpt.pt' after the evaluation."""
    with pytest.raises(ValueError, match="max_iters=0"):
        train.main([f"--data_dir={tiny_data}", *TINY_RUN, "--max_iters=0"])
    assert os.listdir(tmp_path) == []


# ----------------------------------------------------------------------------------------------------------------------
# watching changes nothing


@pytest.mark.parametrize(
    "settings",
    [
        ("--eval_interval=3",),
        ("--eval_interval=4", "--eval_iters=7"),
        ("--log_interval=4",),
        ("--eval_interval=3", "--always_save_checkpoint=True"),
        ("--eval_interval=5", "--patience=50"),
    ],
)
def test_evaluation_and_log_settings_change_no_weight(settings, tiny_data, watched_little):
    train.main([f"--data_dir={tiny_data}", *TINY_RUN, *TEN, *settings])
    assert_same_training(watched_little, "out")
    straight = {record["iter"]: record["loss"] for record in read_log(watched_little, "iter")}
    losses = {record["iter"]: record["loss"] for record in read_log("out", "iter")}
    assert losses.items() <= straight.items()
    assert len(losses) == (3 if "--log_interval=4" in settings else 10)


def test_sample_tokens_prints_a_sample_at_each_evaluation_and_changes_no_weight(tiny_data, watched_little, capsys):
    train.main([f"--data_dir={tiny_data}", *TINY_RUN, *TEN, "--eval_interval=5", "--sample_tokens=12"])
    assert_same_training(watched_little, "out")
    _, *evaluations = re.split(r"^step \d+: .*$", capsys.readouterr().out, flags=re.MULTILINE)
    assert len(evaluations) == 3
    logged = [(record["iter"], record["text"]) for record in read_log("out", "sample")]
    assert [it for it, _ in logged] == [0, 5, 10]
    for printed, (_, text) in zip(evaluations, logged):
        assert f"--- sample ---\n{text}\n---" in printed and len(text) >= 12


@pytest.mark.smoke
@pytest.mark.parametrize("start", ["scratch", "resume"])
def test_eval_only_touches_nothing_in_a_used_out_dir(start, tiny_run, tiny_data, tmp_path, capsys):
    shutil.copytree(tiny_run, tmp_path / "used")
    before = snapshot(tmp_path)
    settings = [] if start == "resume" else [f"--data_dir={tiny_data}", *TINY_RUN]
    assert train.main([f"--init_from={start}", "--out_dir=used", "--eval_only", *settings]) == 0
    assert snapshot(tmp_path) == before
    printed = capsys.readouterr().out
    line = re.search(r"^step (\d+): train loss \d+\.\d{4}, val loss (\d+\.\d{4})$", printed, re.MULTILINE)
    assert line[1] == ("6" if start == "resume" else "0")
    if start == "resume":
        assert line[2] == f"{read_log(tiny_run, 'eval')[-1]['val_loss']:.4f}"


def test_eval_only_does_not_make_the_out_dir(tiny_data, tmp_path):
    assert train.main([f"--data_dir={tiny_data}", *TINY_RUN, "--eval_only=True"]) == 0
    assert os.listdir(tmp_path) == []


# ----------------------------------------------------------------------------------------------------------------------
# where a run starts from


def test_fresh_runs_into_a_used_out_dir_move_the_old_files_aside_and_say_so(tiny_data, capsys):
    kept = []
    for n in range(3):
        assert train.main([f"--data_dir={tiny_data}", *TINY_RUN, "--max_iters=1", f"--seed={n}"]) == 0
        said = capsys.readouterr().out
        assert f"old-{n}" in said if n else "old-" not in said
        open("out/loss.png", "w", encoding="utf-8").write(f"picture {n}")
        kept.append(
            {
                name: open(os.path.join("out", name), "rb").read()
                for name in ("ckpt.pt", "ckpt_last.pt", "log.jsonl", "loss.png")
            }
        )
    for n in (1, 2):
        moved = {
            name: open(os.path.join("out", f"old-{n}", name), "rb").read()
            for name in os.listdir(os.path.join("out", f"old-{n}"))
        }
        assert moved == kept[n - 1]
    assert load("out")["config"]["seed"] == 2
    assert len(read_log("out", "header")) == 1


@pytest.mark.parametrize("source", ["ckpt.pt", "out_dir"])
def test_warm_start_takes_the_weights_alone_and_begins_at_iteration_0(source, tiny_run, tiny_data):
    path = tiny_run if source == "out_dir" else os.path.join(tiny_run, "ckpt.pt")
    assert (
        train.main(
            [
                f"--data_dir={tiny_data}",
                *TINY_RUN,
                f"--init_from={path}",
                "--max_iters=1",
                "--learning_rate=0",
                "--min_lr=0",
                "--dropout=0.3",
            ]
        )
        == 0
    )  # an update that changes no weight
    old, new = load(tiny_run, "ckpt.pt"), load("out")
    assert_same(old["model"], new["model"])
    assert new["iter_num"] == 1 and {int(s["step"]) for s in new["optimizer"]["state"].values()} == {1}
    assert [record["iter"] for record in read_log("out", "iter")] == [0]
    assert read_log("out", "eval")[0]["val_loss"] == pytest.approx(read_log(tiny_run, "eval")[-1]["val_loss"], abs=1e-6)
    assert new["model_args"]["dropout"] == 0.3 and new["tokenizer"] == old["tokenizer"]


def test_warm_start_can_shorten_the_context_and_write_into_its_own_source(tiny_run, tiny_data, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "out")
    args = [arg for arg in TINY_RUN if "block_size" not in arg and "n_" not in arg]
    assert train.main([f"--data_dir={tiny_data}", *args, "--init_from=out", "--block_size=8", "--max_iters=1"]) == 0
    assert load("out")["model_args"]["block_size"] == 8
    assert load("out")["model"]["transformer.wpe.weight"].shape == (8, 16)
    assert_same(load("out/old-1"), load(tiny_run))


# ----------------------------------------------------------------------------------------------------------------------
# data


def test_dataset_fraction_uses_the_first_part_of_train_alone(tmp_path):
    """Two corpora that differ in the second half of train give the same run at dataset_fraction=0.5."""
    first, one, other, val = (generated_text(300, seed)[:1500] for seed in range(4))
    tokenizer = CharTokenizer.from_text(first + one + other + val)
    for name, rest in (("a", one), ("b", other)):
        write_splits(tmp_path / name, tokenizer, {"train": first + rest, "val": val})
    for name, fraction in (("a", 0.5), ("b", 0.5), ("b", 1.0)):
        train.main(
            [
                f"--data_dir={name}",
                f"--out_dir=out-{name}-{fraction}",
                *TINY_RUN,
                "--eval_iters=1000",
                f"--dataset_fraction={fraction}",
            ]
        )
    assert_same_training("out-a-0.5", "out-b-0.5")
    assert [r["train_loss"] for r in read_log("out-a-0.5", "eval")] == [
        r["train_loss"] for r in read_log("out-b-0.5", "eval")
    ]
    assert not torch.equal(load("out-b-1.0")["model"]["lm_head.weight"], load("out-b-0.5")["model"]["lm_head.weight"])


@pytest.fixture
def fresh_copy(tmp_path):
    """A function that runs a program of a copy of the project without prepared data, in tmp_path/elsewhere."""
    names = [name for name in os.listdir(ROOT) if name.endswith(".py")]
    for name in names:
        os.makedirs(tmp_path / "copy", exist_ok=True)
        shutil.copy(os.path.join(ROOT, name), tmp_path / "copy")
    made = shutil.ignore_patterns("*.bin", "*.part", "meta.*", "input.txt", "__pycache__")
    for name in ("dongpt", "data", "config"):
        shutil.copytree(os.path.join(ROOT, name), tmp_path / "copy" / name, ignore=made)
    os.makedirs(tmp_path / "elsewhere")

    def start(program, *args):
        return fork_server.run(
            [sys.executable, os.path.join("..", "copy", program), *args],
            cwd=tmp_path / "elsewhere",
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
            encoding="utf-8",
            stdin=subprocess.DEVNULL,
        )

    return start


def test_python_docs_is_prepared_by_train_itself_from_any_working_directory(fresh_copy, tmp_path):
    small = [
        "--n_layer=1",
        "--n_head=1",
        "--n_embd=8",
        "--block_size=16",
        "--max_iters=2",
        "--eval_iters=1",
        "--device=cpu",
        "--batch_size=64",
    ]
    shorten_python_docs(tmp_path / "copy")
    done = fresh_copy("train.py", "config/quickstart.py", *small)
    assert done.returncode == 0, done.stderr
    assert "data/python_docs/prepare.py" in done.stdout
    assert sorted(os.listdir(tmp_path / "elsewhere")) == ["out-quickstart"]
    prepared = snapshot(tmp_path / "copy" / "data")
    assert any(path.endswith(os.path.join("python_docs", "train.bin")) for path in prepared)
    again = fresh_copy("train.py", "quickstart", *small, "--eval_only")  # the short name of the same file
    assert again.returncode == 0 and "prepare.py" not in again.stdout
    assert snapshot(tmp_path / "copy" / "data") == prepared


def test_data_that_come_from_a_network_are_not_prepared_but_their_command_is_named(fresh_copy, tmp_path):
    done = fresh_copy("train.py", "config/train_don_char.py", "--device=cpu")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert os.path.join("data", "don_char", "prepare.py") in done.stderr
    assert os.listdir(tmp_path / "elsewhere") == []


def test_data_dir_and_out_dir_are_relative_to_the_working_directory(tmp_path):
    write_corpus(str(tmp_path / "place" / "my data"), generated_text(800))
    run("train.py", "--data_dir=my data", "--out_dir=deep/my out", *TINY_RUN, "--max_iters=1", cwd=tmp_path / "place")
    assert load(tmp_path / "place" / "deep" / "my out")["iter_num"] == 1
    assert sorted(os.listdir(tmp_path / "place")) == ["deep", "my data"]


# ----------------------------------------------------------------------------------------------------------------------
# arithmetic and machine


def test_bfloat16_trains_on_the_cpu(tiny_data, capsys):
    train.main([f"--data_dir={tiny_data}", *TINY_RUN, "--max_iters=20", "--lr_decay_iters=20", "--dtype=bfloat16"])
    assert "dtype: bfloat16" in capsys.readouterr().out
    losses = [record["loss"] for record in read_log("out", "iter")]
    assert losses[-1] < losses[0] - 0.2
    assert load("out")["runtime"]["dtype"] == "bfloat16"
    assert load("out")["model"]["lm_head.weight"].dtype == torch.float32


def test_float16_trains_on_the_cpu(tiny_data):
    train.main([f"--data_dir={tiny_data}", *TINY_RUN, "--max_iters=20", "--lr_decay_iters=20", "--dtype=float16"])
    losses = [record["loss"] for record in read_log("out", "iter")]
    assert losses[-1] < losses[0] - 0.2


def test_gradient_accumulation_equals_the_larger_batch(tiny_data):
    for batch, accumulation in ((8, 1), (4, 2), (2, 4)):
        train.main(
            [
                f"--data_dir={tiny_data}",
                f"--out_dir=out-{batch}",
                *TINY_RUN,
                "--dropout=0.0",
                f"--batch_size={batch}",
                f"--gradient_accumulation_steps={accumulation}",
            ]
        )
    losses = {batch: [record["loss"] for record in read_log(f"out-{batch}", "iter")] for batch in (8, 4, 2)}
    assert losses[4] == pytest.approx(losses[8], abs=1e-5)  # the same windows, summed in another order
    assert losses[2] == pytest.approx(losses[8], abs=1e-5)
    for name, weight in load("out-8")["model"].items():  # AdamW divides by small numbers: rounding grows to 1e-5
        torch.testing.assert_close(load("out-2")["model"][name], weight, rtol=0, atol=1e-4)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="torch.compile needs a C++ compiler")
@pytest.mark.compile
def test_compile_works_on_the_cpu_and_leaves_no_trace_in_the_names(tiny_data, tmp_path):
    small = [*TINY_RUN, "--n_layer=1", "--max_iters=3", "--dropout=0.0", "--eval_interval=3"]
    done = run(
        "train.py",
        f"--data_dir={tiny_data}",
        *small,
        "--compile=True",
        cwd=tmp_path,
        env={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), "TMPDIR": str(tmp_path)},
    )
    assert "compile: on" in done.stdout
    train.main([f"--data_dir={tiny_data}", *small, "--out_dir=plain"])
    compiled, plain = load(tmp_path / "out"), load("plain")
    assert compiled["model"].keys() == plain["model"].keys()
    assert compiled["runtime"]["compile"] is True
    assert [r["loss"] for r in read_log("out", "iter")] == pytest.approx(
        [r["loss"] for r in read_log("plain", "iter")], abs=1e-4
    )  # fused kernels round differently


@pytest.mark.smoke
def test_mps_is_taken_by_auto_and_computes_in_float32_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert runtime.pick_device("auto")[0] == "mps" == runtime.pick_device("mps")[0]
    assert runtime.pick_dtype("auto", "mps")[0] == "float32" == runtime.pick_dtype("float32", "mps")[0]
    for dtype in ("bfloat16", "float16"):
        with pytest.raises(ValueError, match=f"{dtype}.*float32"):
            runtime.pick_dtype(dtype, "mps")


@pytest.mark.smoke
def test_mps_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="mps.*cpu"):
        runtime.pick_device("mps")


@pytest.mark.smoke
@pytest.mark.skipif(os.name != "posix", reason="the stand-in for nvidia-smi is a shell script")
def test_an_nvidia_gpu_that_torch_cannot_use_is_named_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 'NVIDIA GeForce RTX 3070'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    device, why = runtime.pick_device("auto")
    assert device == "cpu"
    assert "RTX 3070" in why and torch.__version__ in why and "install" in why
    with pytest.raises(ValueError, match="RTX 3070"):
        runtime.pick_device("cuda")
    tool.write_text("#!/bin/sh\necho 'no devices were found' >&2\nexit 6\n")
    assert runtime.pick_device("auto") == ("cpu", "no GPU found")


def test_a_run_says_how_long_it_will_take_after_ten_updates(tiny_data, capsys):
    assert (
        train.main(
            [
                f"--data_dir={tiny_data}",
                *TINY_RUN,
                "--max_iters=1000000000",
                "--eval_interval=12",
                "--decay_lr=False",
                "--learning_rate=0",
                "--patience=1",
            ]
        )
        == 0
    )  # never better, so it ends
    lines = capsys.readouterr().out.splitlines()
    (duration,) = [i for i, line in enumerate(lines) if line.startswith("expected duration: ")]
    assert re.match(r"expected duration: [\d,]+ days for 999,999,990 more iterations of \d+ ms and ", lines[duration])
    assert all(key in lines[duration] for key in ("max_iters", "n_layer", "n_embd", "block_size", "batch_size"))
    assert lines[duration - 1].startswith("iter 8:") and lines[duration + 1].startswith("iter 9:")


# ----------------------------------------------------------------------------------------------------------------------
# pictures and wandb


def test_no_training_ends_for_a_drawing(tiny_data, tmp_path):
    """A notebook sets MPLBACKEND to a backend that only it has."""
    env = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    run("train.py", f"--data_dir={tiny_data}", *TINY_RUN, "--max_iters=1", cwd=tmp_path, env=env)
    assert load("out")["iter_num"] == 1 and len(read_log("out", "final")) == 1
    assert open("out/loss.png", "rb").read(8) == PNG  # DESIGN, rule 6: Agg is chosen before the import


def test_wandb_offline_mirrors_the_run_and_writes_in_the_working_directory_alone(tiny_data, tmp_path):
    pytest.importorskip("wandb")
    there_before = os.path.exists(os.path.join(ROOT, "wandb"))
    home = tmp_path / "home"
    home.mkdir()
    here = {key: str(home) for key in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "TMPDIR")}
    done = run(
        "train.py",
        f"--data_dir={tiny_data}",
        *TINY_RUN,
        "--wandb_log=True",
        cwd=tmp_path,
        check=None,
        env={**here, "WANDB_MODE": "offline", "WANDB_SILENT": "true"},
    )
    if done.returncode == 2 and "wandb could not be started" in done.stderr:
        assert len(done.stderr.strip().splitlines()) == 1
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    assert load("out")["wandb_run_id"]
    assert [name for name in os.listdir(tmp_path / "wandb") if name.startswith("offline-run-")]
    assert os.path.exists(os.path.join(ROOT, "wandb")) == there_before
