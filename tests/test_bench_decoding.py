"""bench.py --decode."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import all_logits
from test_decoder import ids

import bench
from dongpt import runtime
from dongpt.kernels import cpu
from dongpt.train import measure

pytestmark = pytest.mark.usefixtures("one_thread")
smoke = pytest.mark.smoke
needs_compiler = pytest.mark.skipif(not shutil.which(os.environ.get("CC", "gcc")), reason="no C compiler for cpu.c")

BENCH = [
    "--decode",
    "--device=cpu",
    "--n_layer=1",
    "--n_embd=16",
    "--n_head=2",
    "--vocab_size=50",
    "--block_size=32",
    "--decode_batches=1,3",
    "--rounds=1",
    "--max_new_tokens=5",
    "--bias=True",
]
LINEAR, OTHER = 50 * 16 + 12 * 16 * 16, 9 * 16 + 6 * 16  # weights of the head and the layer; biases and norms


@pytest.fixture
def measured(monkeypatch, capsys):
    """A function that gives the JSON that bench.py --decode prints, and all else; memory reads 1e6 bytes a second."""
    monkeypatch.setattr(bench, "memory_bandwidth", lambda rt: 1e6)

    def measure(*args: str) -> tuple[dict, str]:
        bench.main([*BENCH, "--json", *args])
        out, err = capsys.readouterr()
        return json.loads(out), err

    return measure


def test_the_bench_of_decoding_computes_its_numbers_from_the_times(measured, monkeypatch, transformers):
    seconds = iter(range(10**6))
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))  # a second each
    found, printed = measured()
    assert [(result["program"], result["rows"]) for result in found["decode"]] == [
        ("donGPT", 1),
        ("transformers", 1),
        ("donGPT", 3),
        ("transformers", 3),
    ]
    for result in found["decode"]:
        ours = result["program"] == "donGPT"
        assert result["first_token_ms"] == 1000
        assert result["tokens_per_s"] == pytest.approx(result["rows"] * 5 / (2 if ours else 1))
        assert ("bandwidth_share" in result) == ours
        if ours:  # four steps behind the first took a second
            assert result["ms_per_step"] == pytest.approx(250)
            assert result["bandwidth_share"] == pytest.approx(4 * (LINEAR + OTHER) / 0.25 / 1e6)
    assert found["weight_mb"] == pytest.approx(4 * (LINEAR + OTHER) / 1e6) and found["bandwidth_gb_s"] == 1e-3
    assert found["parameters"] == LINEAR + OTHER and found["prompt_tokens"] == 16 and found["new_tokens"] == 5
    assert found["rounds"] == 1 and found["device"] == "cpu" and found["setup"] in printed
    assert found["threads"] == torch.get_num_threads()


@smoke
def test_the_bench_of_decoding_takes_the_median_and_leaves_out_the_first_round(measured, monkeypatch):
    class Clock:
        def __init__(self):
            self.now, self.looks = 0.0, 0

        def perf_counter(self) -> float:
            self.looks += 1
            self.now += {0: 1000.0, 1: 1.0, 2: 50.0, 3: 3.0}[(self.looks - 1) // 4]  # four looks a round
            return self.now

    monkeypatch.setattr(measure, "time", Clock())
    found, _ = measured("--transformers=False", "--decode_batches=2", "--rounds=3")
    (result,) = found["decode"]
    assert result["first_token_ms"] == 3000 and result["tokens_per_s"] == pytest.approx(2 * 5 / 6)
    assert result["ms_per_step"] == pytest.approx(3000 / 4)


@needs_compiler
@pytest.mark.parametrize(
    "args, worth, weights, parts",
    [
        ([], 10**9, None, 0),
        ([], 1, "float32", 1),
        (["--dtype=bfloat16"], 1, "bfloat16", 2),
        (["--quantize=int8"], 1, "int8", 4),
        (["--quantize=int8"], 10**9, "int8", 0),
        (["--tie_weights=False"], 10**9, None, 0),
        (["--tie_weights=False"], 1, "float32", 1),
    ],
)
def test_the_bench_of_decoding_counts_the_bytes_that_a_token_reads(measured, monkeypatch, args, worth, weights, parts):
    monkeypatch.setattr(cpu, "PACKING_MIN_PARAMS", worth)
    found, _ = measured("--transformers=False", *args)
    n_bytes, panel = 4 * OTHER, max(parts, 2) * cpu.load_library()[0].lanes() if parts else 1
    for N, K in ((50, 16), (48, 16), (16, 16), (64, 16), (16, 64)):
        n_bytes += -(-N // panel) * panel * K * (1 if weights == "int8" else 4 // (parts or 1))
        n_bytes += 4 * N * (weights == "int8")  # scales
    assert found["weight_mb"] * 1e6 == pytest.approx(n_bytes)
    assert (f"weights: {weights}" in found["setup"]) == (weights is not None)
    for result in found["decode"]:
        assert result["program"] == "donGPT" and 0 < result["bandwidth_share"] < 1e3
        assert 0 < result["tokens_per_s"] < 1e6 and 0 < result["first_token_ms"] < 1e4


@smoke
def test_transformers_computes_with_the_same_weights(transformers):
    cfg, _ = bench.configurator.load(bench.BenchConfig, BENCH)
    model, rt = bench.random_model(cfg, 50).eval(), runtime.start("cpu")
    theirs, idx = bench.transformers_model(model, cfg, rt), ids(2, 9, vocab_size=50)
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, all_logits(model, idx), atol=1e-5, rtol=1e-5)
    assert not theirs.training


@smoke
def test_the_bench_of_decoding_says_where_transformers_has_no_such_model(measured, transformers):
    found, _ = measured("--pos_embd=rope")
    assert {result["program"] for result in found["decode"]} == {"donGPT", "transformers"}  # as GPT-NeoX
    found, printed = measured("--pos_embd=relative")
    assert {result["program"] for result in found["decode"]} == {"donGPT"}
    (line,) = [line for line in printed.splitlines() if "transformers is not measured" in line]
    assert "relative" in line


@pytest.mark.parametrize("with_transformers", [False, True])
@pytest.mark.parametrize("args", [["--max_new_tokens=40"], ["--prompt_tokens=40"]])
def test_the_bench_of_decoding_goes_past_the_context(measured, args, with_transformers, transformers):
    found, printed = measured(*args, f"--transformers={with_transformers}")
    assert [result["rows"] for result in found["decode"] if result["program"] == "donGPT"] == [1, 3]
    if with_transformers:
        assert "transformers is not measured" in printed


@smoke
@pytest.mark.parametrize(
    "setting",
    [
        "decode_batches=",
        "decode_batches=0",
        "decode_batches=1,,3",
        "decode_batches=1;3",
        "decode_batches=-1",
        "decode_batches=1.5",
        "prompt_tokens=0",
        "max_new_tokens=1",
        "rounds=0",
        "quantize=int4",
        "dtype=int8",
    ],
)
def test_the_bench_of_decoding_refuses_what_cannot_be_measured(setting):
    with pytest.raises(ValueError, match=setting.partition("=")[0]) as caught:
        bench.main([*BENCH, f"--{setting}"])
    assert "\n" not in str(caught.value)
