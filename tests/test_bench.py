"""bench.py: a training step's time, speed and memory, sweeps, comparisons, profiles."""

import functools
import json
import mmap
import os
import re
import subprocess
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY_MODEL, expect_sentence, read_log, run, run_ranks, write_corpus

import bench
import configurator
import train
from dongpt import runtime
from dongpt.train import measure as measuring
from dongpt.train.step import TrainStep

smoke = pytest.mark.smoke
MODEL = [
    "--device=cpu",
    "--compile=False",
    "--n_layer=1",
    "--n_head=2",
    "--n_embd=16",
    "--block_size=16",
    "--batch_size=2",
]
SMALL = [*MODEL, "--real_data=False", "--vocab_size=50", "--warmup=0", "--iters=1", "--rounds=2"]
FLOPS_PER_TOKEN = 6 * (50 * 16 + 12 * 16 * 16 + 3 * 16) + 12 * 16 * 16  # of SMALL: weights and norms, then attention


@pytest.fixture
def measured(capsys, monkeypatch):
    """A function that runs bench.py --json on SMALL and returns its JSON, strictly read, and the text on stderr."""
    monkeypatch.setattr(measuring, "PROFILED_UPDATES", 1)
    monkeypatch.setattr(measuring, "matmul_flops", functools.partial(measuring.matmul_flops, seconds=0.01))

    def measure(*args: str) -> tuple[dict, str]:
        capsys.readouterr()
        bench.main([*SMALL, "--json", *args])
        out, err = capsys.readouterr()
        return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")), err

    return measure


@pytest.fixture
def updates(monkeypatch):
    """A clock that only updates move: updates.seconds(cfg) says how far; updates.made lists the settings of each."""
    state = SimpleNamespace(now=0.0, seconds=lambda cfg: 1.0, made=[])
    call = TrainStep.__call__

    def timed(self, *args):
        state.made.append(self.cfg)
        state.now += state.seconds(self.cfg)
        return call(self, *args)

    monkeypatch.setattr(TrainStep, "__call__", timed)
    monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=lambda: state.now))
    monkeypatch.setattr(measuring, "matmul_flops", lambda *shape: 5e6)
    return state


def settings(*args: str) -> bench.BenchConfig:
    return bench.read_settings([*SMALL, *args])


# ----------------------------------------------------------------------------------------------------------------------
# one setting


def test_numbers_come_from_the_median_round_and_neither_from_the_warm_up_nor_the_profiler(measured, updates):
    seconds = iter([100, 50, 1, 3, 3, 5, 9, 9, 70])  # two to warm up, three rounds of two, the profiled one
    updates.seconds = lambda cfg: next(seconds)
    found, printed = measured("--warmup=2", "--iters=2", "--rounds=3")
    assert next(seconds, None) is None
    assert found["rounds_ms"] == [2000, 4000, 9000] and found["ms"] == 4000
    assert found["tokens_per_update"] == 32 and found["tokens_per_s"] == 8
    assert found["flops"] == pytest.approx(8 * FLOPS_PER_TOKEN)
    assert found["of_matmul"] == pytest.approx(8 * FLOPS_PER_TOKEN / 5e6) and found["mfu"] is None
    assert re.search(r"time per iteration: 4000.00ms +2000.00 to 9000.00 in 3 rounds\n", printed)
    assert re.search(r"speed: +8 tokens/s\n", printed)


@smoke
def test_text_and_json_agree_on_a_real_run(measured):
    found, printed = measured("--iters=3", "--rounds=3")
    shown = {
        key: float(re.search(pattern, printed)[1].replace(",", ""))
        for key, pattern in dict(
            ms=r"time per iteration: ([\d.]+)ms",
            tokens_per_s=r"([\d,]+) tokens/s",
            gflops=r"arithmetic: +([\d.]+) GFLOP/s",
            share=r"([\d.]+)% of the",
            matmul=r"of the ([\d.]+) GFLOP/s",
            memory=r"memory, tensors: +([\d.,]+) MiB",
            in_matmuls=r"matrix products: +([\d.]+)%",
            loss=r"loss: +([\d.]+)",
        ).items()
    }
    assert shown == dict(
        ms=round(found["ms"], 2),
        tokens_per_s=round(found["tokens_per_s"]),
        gflops=round(found["flops"] / 1e9, 2),
        share=round(100 * found["of_matmul"], 1),
        matmul=round(found["matmul_flops"] / 1e9, 2),
        memory=round(found["memory_mib"], 1),
        in_matmuls=round(100 * found["shares"]["matmul"], 1),
        loss=round(found["loss"], 4),
    )
    assert "MFU" not in printed  # a CPU's peak is not known
    assert found["tokens_per_s"] == pytest.approx(32 / found["ms"] * 1000)
    assert found["device"] == "cpu" and found["dtype"] == "float32" and found["compile"] is False
    assert found["threads"] == torch.get_num_threads() and found["torch"] == torch.__version__
    assert found["device_name"] and found["device_name"] in printed
    assert found["settings"]["n_embd"] == 16 and "iters" not in found["settings"]
    assert found["parameters"] == 50 * 16 + 12 * 16 * 16 + 3 * 16
    assert 3.5 < found["loss"] < 4.5  # ln 50 is 3.9


def test_the_step_is_the_one_of_training(tiny_data, tmp_path, measured):
    args = [f"--data_dir={tiny_data}", *TINY_MODEL, "--learning_rate=1e-2", "--dropout=0.1", "--optimizer=muon"]
    train.main(
        [
            *args,
            "--device=cpu",
            "--compile=False",
            f"--out_dir={tmp_path}",
            "--max_iters=4",
            "--decay_lr=False",
            "--eval_iters=1",
        ]
    )
    found, _ = measured(*args, "--real_data=True", "--vocab_size=None", "--warmup=1", "--iters=1", "--rounds=3")
    assert found["loss"] == [record["loss"] for record in read_log(tmp_path, "iter")][3]


@smoke
def test_a_peak_that_is_known_gives_mfu(measured):
    found, _ = measured()
    found["mfu"] = 0.25
    assert (
        "MFU: 25.00%" in bench.format_report(found)
        and "matrix product" not in (bench.format_report(found).partition("matrix products:")[0])
    )
    header, row, *legend = bench.format_results({"x": found}).splitlines()
    assert "MFU" in header and "25.0%" in row and "of matmul" not in header + " ".join(legend)


def test_a_loss_that_is_no_number_is_null_in_json(measured):
    found, printed = measured("--learning_rate=1e30", "--grad_clip=0", "--iters=9")
    assert found["loss"] is None and re.search("loss: +- ", printed)


def test_compiling_is_timed_apart_from_the_rounds(measured, updates, monkeypatch):
    def compiled(model):
        updates.now += 7
        return model

    monkeypatch.setattr(torch, "compile", compiled)
    found, printed = measured("--compile=True")
    assert found["compile"] is True and found["compile_s"] == 8 and "took 8.0 s" in printed  # with the first update
    assert found["rounds_ms"] == [1000, 1000]
    assert measured("--compile=False")[0]["compile_s"] is None


@pytest.mark.parametrize("n_micro_batches", [1, 3])
def test_random_data_needs_no_corpus(measured, updates, n_micro_batches):
    found, printed = measured(f"--gradient_accumulation_steps={n_micro_batches}", "--vocab_size=None")
    assert found["data"] == "one random batch" and "one random batch" in printed
    assert found["tokens_per_update"] == n_micro_batches * 32 == found["tokens_per_s"]
    assert 10.3 < found["loss"] < 11.3  # ln 50304 is 10.8


def test_data_of_any_vocabulary_is_taken(tmp_path, measured):
    folder = write_corpus(tmp_path, "".join(map(chr, range(32, 400))) * 3)
    found, _ = measured("--real_data=True", "--vocab_size=None", f"--data_dir={folder}")
    assert found["parameters"] == 368 * 16 + 12 * 16 * 16 + 3 * 16  # that many characters


# ----------------------------------------------------------------------------------------------------------------------
# memory


def test_memory_is_that_of_weights_optimizer_and_one_update(measured):
    n_bytes = {n: measured(f"--batch_size={n}")[0]["memory_mib"] * 2**20 for n in (2, 4, 8)}
    weights = 4 * (50 * 16 + 12 * 16 * 16 + 3 * 16 + 16 * 16)  # with those of the positions
    assert n_bytes[2] > 4 * weights  # gradients, and AdamW's two moments
    per_window = (n_bytes[8] - n_bytes[4]) / 4
    assert per_window > 16 * 4 * (2 * 50 + 16 * 16)  # logits and their gradient, and what a block keeps per token
    assert n_bytes[4] - n_bytes[2] == pytest.approx(2 * per_window, rel=0.1)


def test_growth_counts_the_rounds_after_the_first(measured, updates, monkeypatch):
    monkeypatch.setattr(measuring, "bytes_in_use", lambda rt: len(updates.made) * 2**20)  # each update takes one MiB
    assert measured("--iters=2", "--rounds=3")[0]["memory_growth_mib"] == 4
    found, printed = measured("--rounds=1")
    assert found["memory_growth_mib"] is None and "first round" not in printed


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="the resident memory cannot be read here")
def test_memory_does_not_grow_with_the_number_of_updates(measured):
    rt = runtime.start("cpu")
    before = measuring.bytes_in_use(rt)
    with mmap.mmap(-1, 2**26) as held:
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
        assert measuring.bytes_in_use(rt) - before == pytest.approx(2**26, rel=0.05)  # it is what it claims to be
    assert measured("--iters=40", "--rounds=2")[0]["memory_growth_mib"] < 4
    assert measuring.process_peak_bytes() >= measuring.bytes_in_use(rt)


# ----------------------------------------------------------------------------------------------------------------------
# config files


def test_a_config_file_of_train_py_is_taken(tmp_path, measured, tiny_data):
    file = tmp_path / "mine.py"
    file.write_text(
        f"out_dir = 'out-mine'\nn_layer = 2\nmax_iters = 2000\ndata_dir = {str(tiny_data)!r}\n", encoding="utf-8"
    )
    found, printed = measured(str(file), "--real_data=True", "--vocab_size=None", "--gradient_accumulation_steps=1")
    assert "bench.py ignores these settings in the config file: out_dir, max_iters\n" in printed
    assert found["settings"]["n_layer"] == 2 and found["data"] == str(tiny_data)


@smoke
def test_settings_without_a_file_are_a_cpus_and_with_one_they_are_those_of_train_py(tmp_path):
    (tmp_path / "mine.py").write_text("n_layer = 5\n", encoding="utf-8")
    ours, files = (
        bench.read_settings(["--device=cpu", "--n_layer=5"]),
        bench.read_settings(["--device=cpu", str(tmp_path / "mine.py")]),
    )
    assert (ours.n_layer, ours.n_embd, ours.block_size, ours.gradient_accumulation_steps) == (5, 128, 64, 1)
    for name in ("n_layer", "n_embd", "block_size", "batch_size", "gradient_accumulation_steps", "dataset", "bias"):
        assert getattr(files, name) == (5 if name == "n_layer" else getattr(train.TrainConfig(), name)), name


@smoke
def test_only_keys_of_files_are_skipped_and_only_where_asked_for(tmp_path):
    (tmp_path / "mine.py").write_text("seed = 3\nout_dir = 'x'\nrate = 1\n", encoding="utf-8")
    (tmp_path / "wrong.py").write_text("seed = 'three'\n", encoding="utf-8")
    skipped = []
    cfg, given = configurator.load(runtime.RuntimeConfig, [str(tmp_path / "mine.py")], skipped)
    assert cfg.seed == 3 and given == {"seed": 3} and skipped == ["out_dir", "rate"]
    for argument, skipped, part in (
        (str(tmp_path / "mine.py"), None, "out_dir"),
        ("--out_dir=x", [], "out_dir"),
        (str(tmp_path / "wrong.py"), [], "seed: expected int"),
    ):
        with pytest.raises(ValueError, match=part):
            configurator.load(runtime.RuntimeConfig, [argument], skipped)


# ----------------------------------------------------------------------------------------------------------------------
# sweeps


def test_a_sweep_times_its_values_in_turn(measured, updates):
    updates.seconds = lambda cfg: cfg.n_layer * 2.0
    found, printed = measured("--sweep=n_layer:1,2,3", "--rounds=3")
    assert [cfg.n_layer for cfg in updates.made[:9]] == [1, 2, 3, 3, 2, 1, 1, 2, 3]
    assert found["sweep"] == "n_layer"
    assert [(row["value"], row["settings"]["n_layer"], row["ms"]) for row in found["results"]] == [
        (1, 1, 2000),
        (2, 2, 4000),
        (3, 3, 6000),
    ]
    rows = [line.split() for line in printed.splitlines() if line.startswith("n_layer=") and "model:" not in line][-3:]
    assert [row[:3] for row in rows] == [
        ["n_layer=1", "2,000.00", "16"],
        ["n_layer=2", "4,000.00", "8"],
        ["n_layer=3", "6,000.00", "5"],
    ]


@smoke
@pytest.mark.parametrize(
    "field, values",
    [
        ("pos_embd", ["default", "rope", "relative", "alibi"]),
        ("dtype", ["float32", "bfloat16", "float16"]),
        ("compile", [False, True]),
        ("block_size", [16, 32, 64, 128]),
        ("batch_size", [2, 4, 8, 16]),
        ("n_embd", [16, 32, 64, 128]),
        ("optimizer", ["adamw", "muon"]),
        ("world_size", [1, 2]),
        ("bias", [False, True]),
        ("activation", ["gelu", "gelu_tanh"]),
        ("n_layer: 2, 3 ,2", [2, 3]),
        ("dropout:0,0.5", [0.0, 0.5]),
        ("compile:True", [True]),
        ("data_dir:a,b", ["a", "b"]),
    ],
)
def test_values_of_a_sweep(field, values):
    found = bench.sweep_values(settings(f"--sweep={field}"), runtime.start("cpu"))
    assert found == (field.partition(":")[0], values)
    assert [type(value) for value in found[1]] == [type(value) for value in values]


def test_a_wider_model_has_more_heads_of_the_same_size(measured):
    found, _ = measured("--sweep=n_embd:16,32,36")
    assert [(row["settings"]["n_embd"], row["settings"]["n_head"]) for row in found["results"]] == [
        (16, 2),
        (32, 4),
        (36, 2),
    ]


def test_what_cannot_be_built_or_run_is_a_row_with_its_sentence(measured, monkeypatch):
    call = TrainStep.__call__

    def full(self, lr, iter_num, *args):
        if self.cfg.n_head == 8 and iter_num == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.\nMore of it.")
        return call(self, lr, iter_num, *args)

    monkeypatch.setattr(TrainStep, "__call__", full)
    found, printed = measured("--sweep=n_head:2,3,8,4")
    assert [(row["value"], row.get("error")) for row in found["results"]] == [
        (2, None),
        (3, "n_embd=16 is not a multiple of n_head=3: use n_embd=15"),
        (8, "CUDA out of memory."),
        (4, None),
    ]
    assert re.search(r"n_head=3 +n_embd=16 is not a multiple", printed) and len(found["results"][3]["rounds_ms"]) == 2


def test_every_scheme_of_positions_is_measured(measured):
    found, _ = measured("--sweep=pos_embd")
    assert all(row["ms"] > 0 and row["settings"]["pos_embd"] == row["value"] for row in found["results"])
    assert len({row["loss"] for row in found["results"]}) == 4


@smoke
def test_a_sweep_of_world_size_starts_processes_with_the_same_work(measured, monkeypatch):
    started = []

    def run_command(command, env, **how):
        n = int(re.search(r"--nproc_per_node=(\d+)", " ".join(command))[1])
        started.append((n, command, env["OMP_NUM_THREADS"]))
        row = {
            "ms": 2.0,
            "tokens_per_s": 7.0 * n,
            "flops": 5e9,
            "mfu": None,
            "of_matmul": 0.5,
            "memory_mib": 3.0,
            "memory_growth_mib": None,
            "shares": None,
            "loss": 1.5,
        }
        return SimpleNamespace(
            returncode=2 * (n == 4),
            stdout=f"a line\n{json.dumps(row)}\n",
            stderr="W1122 torch\nbench.py: no room\nE1122 torch\n" if n == 4 else "",
        )

    monkeypatch.setattr(subprocess, "run", run_command)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    found, printed = measured("--sweep=world_size:1,2,4", "--gradient_accumulation_steps=3")
    assert [(n, threads) for n, _, threads in started] == [(1, "6"), (2, "3"), (4, "1")]
    for n, command, _ in started:
        given = bench.read_settings(command[command.index(bench.__file__) + 1 :])
        assert given.gradient_accumulation_steps == 3 * n and given.sweep == "" and given.n_embd == 16
    assert [(row["value"], row.get("tokens_per_s"), row.get("error")) for row in found["results"]] == [
        (1, 7.0, None),
        (2, 14.0, None),
        (4, None, "no room"),
    ]
    assert re.search(r"world_size=4 +no room", printed)


# ----------------------------------------------------------------------------------------------------------------------
# comparisons


def test_a_comparison_pairs_the_rounds(measured, updates):
    seconds = {1: iter([1, 2, 1, 1, 1, 9, 9, 9]), 2: iter([2, 1, 4, 0.5, 1, 9, 9, 9])}
    updates.seconds = lambda cfg: next(seconds[cfg.n_layer])
    found, printed = measured("--compare=--n_layer=2 --batch_size=4", "--rounds=2")
    assert "".join("AB"[cfg.n_layer - 1] for cfg in updates.made[:10]) == "ABBAABBAAB"
    assert found["ratios"] == [1, 4, 0.5, 4, 2]  # B does twice the work in an update
    assert (found["ratio"], found["ratio_min"], found["ratio_max"]) == (2, 0.5, 4)
    assert "2.000 (0.500 to 4.000 in 5 pairs)" in printed
    assert [found["compare"][name]["ms"] for name in "AB"] == [1000, 1000]
    assert {"A: n_layer=1, batch_size=2", "B: n_layer=2, batch_size=4"} <= set(printed.splitlines())


def test_a_comparison_takes_a_config_file(measured, updates, tmp_path):
    text = "n_layer = 2\nout_dir = 'x'\ngradient_accumulation_steps = 1\n"
    (tmp_path / "other.py").write_text(text, encoding="utf-8")
    found, printed = measured(f"--compare={tmp_path / 'other.py'}", "--rounds=6")
    assert [found["compare"][name]["settings"]["n_layer"] for name in "AB"] == [1, 2]
    assert found["ratios"] == [1] * 6 and "bench.py ignores these settings in the config file: out_dir" in printed


# ----------------------------------------------------------------------------------------------------------------------
# profile


def test_a_profile_writes_a_trace_and_nothing_else(measured, in_a_folder_of_its_own, tmp_path):
    found, printed = measured("--profile", "--trace=mine.json")
    assert "Self CPU" in printed and "aten::mm" in printed and str(tmp_path / "mine.json") in printed
    assert os.listdir(tmp_path) == ["mine.json"] and found["trace"] == str(tmp_path / "mine.json")
    with open("mine.json", encoding="utf-8") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("Optimizer.step#Optimizer.step") == measuring.PROFILED_UPDATES
    assert "aten::mm" in names and found["ms"] > 0


# ----------------------------------------------------------------------------------------------------------------------
# programs


def test_it_runs_as_a_program_and_writes_nothing(tmp_path, tiny_data):
    done = run("bench.py", *MODEL, f"--data_dir={tiny_data}", "--warmup=1", "--iters=2", "--rounds=2", cwd=tmp_path)
    assert "time per iteration: " in done.stdout and str(tiny_data) in done.stdout and "{" not in done.stdout
    assert done.stderr == "" and not list(tmp_path.iterdir())


def test_json_is_all_that_goes_to_stdout(tmp_path, tiny_data):
    sizes = ["--warmup=0", "--iters=1", "--rounds=1"]
    done = run("bench.py", *MODEL, f"--data_dir={tiny_data}", *sizes, "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["data"] == str(tiny_data) and "time per iteration: " in done.stderr


@pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="this torch has no gloo"
)
def test_two_processes_print_once_and_count_together(tmp_path):
    done = run_ranks("bench.py", *SMALL, "--gradient_accumulation_steps=2", "--json", cwd=tmp_path)
    found, lines = json.loads(done.stdout), done.stderr.splitlines()
    assert found["world_size"] == 2 and found["tokens_per_update"] == 64
    assert found["tokens_per_s"] == pytest.approx(64 / found["ms"] * 1000)
    assert [sum(line.startswith(start) for line in lines) for start in ("device:", "time per", "loss:")] == [1, 1, 1]
    assert any("2 processes" in line for line in lines if line.startswith("device:")) and not list(tmp_path.iterdir())


@smoke
@pytest.mark.parametrize(
    "args, part",
    [
        (["--real_data=True", "--data_dir=nothing"], "--real_data=False"),
        (["--batch_size=0"], "batch_size=0"),
        (["--iters=0"], "iters=0"),
        (["--warmup=-1"], "warmup=-1"),
        (["--rounds=0"], "rounds=0"),
        (["--n_embd=15"], "n_head=2"),
        (["--device=tpu"], "device='tpu'"),
        (["--out_dir=x"], "unknown key 'out_dir'"),
        (["--sweep=pos_emb"], "did you mean 'pos_embd'"),
        (["--sweep=rounds"], "unknown setting"),
        (["--sweep=dropout"], "dropout needs values"),
        (["--sweep=n_layer:1,x"], "expected int, got 'x'"),
        (["--sweep=pos_embd:ropee"], "'ropee'"),
        (["--sweep=world_size:2,0"], "world_size:2,0"),
        (["--sweep=n_head:3,5"], "n_head=3"),
        (["--compare=nothing.py"], "'nothing.py'"),
        (["--compare=--n_layers=2"], "did you mean 'n_layer'"),
        (['--compare="--n_layer=2'], "quotation"),
        (["--compare=--iters=3"], "iters"),
        (["--compare=--n_layer=0"], "n_layer=0"),
        (["--compare=--n_layer=2", "--sweep=n_layer"], "sweep and compare"),
        (["--decode", "--profile"], "profile and"),
        (["--profile", "--trace=nowhere/trace.json"], "nowhere/trace.json"),
        (["--profile", "--trace=."], "trace=."),
        (["--gradient_accumulation_steps=0"], "gradient_accumulation_steps=0"),
        (["--learning_rate=-1"], "learning_rate"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(in_a_folder_of_its_own, tmp_path, capsys, args, part):
    with pytest.raises(ValueError) as caught:
        bench.main([*SMALL, *args])
    assert part in str(caught.value) and "\n" not in str(caught.value) and not list(tmp_path.iterdir())
    assert "{" not in capsys.readouterr().out  # no JSON


def test_a_wrong_sweep_ends_the_program_with_a_sentence(tmp_path):
    expect_sentence(run("bench.py", *SMALL, "--sweep=optimiser", cwd=tmp_path, check=None), "did you mean 'optimizer'")
