"""Measure the speed and memory use of a training step, or the speed of decoding.

    python bench.py                                    # GPT-2 124M on a GPU, or a 0.8M-parameter model on a CPU
    python bench.py config/train_don_char.py           # a training step with this config
    python bench.py --real_data=False --compile=True --profile
    python bench.py --sweep=pos_embd                   # or dtype, compile, world_size, ..., or n_layer:2,4,8
    python bench.py --compare="--dtype=bfloat16"       # compare settings; or --compare=config/train_eds.py
    python bench.py --decode                           # GPT-2 124M, compared with Hugging Face transformers
    python bench.py --decode --dtype=bfloat16 --quantize=int8 --decode_batches=1,8,64
    torchrun --standalone --nproc_per_node=2 bench.py --gradient_accumulation_steps=2

A step is one weight update as in train.py, including the time to load the batch. The reported time is the median over
several rounds of `iters` updates each. Settings to compare are measured alternately, so that a busy machine slows all
of them equally. With --decode, bench.py reports the time to the first token, the overall speed in tokens/s, and the
fraction of memory bandwidth that later steps use to read weights, each as a median over rounds. For comparison, it runs
transformers' generate() with the same random weights and prompt (in float32 on a CPU). With --json, stdout contains
only one line of JSON.
"""

import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from statistics import median
from typing import Annotated, Any, Callable, Literal, get_args, get_origin, get_type_hints

from dongpt import runtime  # before torch, because it sets environment variables that torch reads

# isort: split
import torch

import configurator
from configurator import UserError
from dongpt.checkpoint import build_model
from dongpt.decode.ready import Quantization, prepare_for_decoding
from dongpt.log import format_table
from dongpt.program import run_program
from dongpt.runtime import Runtime, RuntimeConfig, first_line, print0, seed_everything
from dongpt.text.bins import find_data_folder
from dongpt.train.data import Corpus
from dongpt.train.measure import PROFILED_UPDATES, StepBenchmark, bytes_per_token, device_name, memory_bandwidth, timed
from dongpt.train.optim import make_optimizer
from dongpt.train.report import format_duration
from dongpt.train.step import StepConfig, TrainStep
from model import GPTConfig

# Defaults on a CPU, from nanoGPT's CPU demo. GPT-2 124M would take minutes per iteration.
CPU_SETTINGS = dict(n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12)
# Defaults of train.py for settings that a config file does not set.
CONFIG_FILE_SETTINGS = dict(dataset="openwebtext", gradient_accumulation_steps=StepConfig.gradient_accumulation_steps)
LONG_SECONDS = 30  # longer benchmarks print their expected duration
MIN_COMPARE_ROUNDS = 5  # minimum number of rounds with --compare
GPT2_VOCAB_SIZE = 50304  # padded, as in nanoGPT


@dataclass(frozen=True)
class MethodConfig:
    """Measurement settings."""

    warmup: Annotated[int, ">=", 0] = 5  # number of warm-up updates before measuring
    iters: Annotated[int, ">=", 1] = 10  # number of updates per round
    rounds: Annotated[int, ">=", 1] = 3  # number of rounds; each measures every setting once
    sweep: str = ""  # measure several values of a setting: pos_embd, n_layer:2,4,8, world_size, ...
    compare: str = ""  # compare with a config file or with quoted settings
    profile: bool = False  # print the slowest operations and write a trace file
    trace: str = "trace.json"  # file that --profile writes, in Chrome's trace format
    decode: bool = False  # measure decoding instead of training
    decode_batches: str = "1,8"  # batch sizes for decoding, separated by commas
    prompt_tokens: Annotated[int, ">=", 1] = 16  # prompt length in tokens
    max_new_tokens: Annotated[int, ">=", 2] = 200  # number of tokens to generate after the prompt
    quantize: Quantization = "none"  # int8: decode with int8 weights
    transformers: bool = True  # also measure transformers' generate() if it supports the model
    json: bool = False  # print only JSON to stdout; everything else goes to stderr


METHOD_KEYS = [f.name for f in fields(MethodConfig)]


@dataclass(frozen=True)
class BenchConfig(RuntimeConfig, StepConfig, GPTConfig, MethodConfig):
    vocab_size: int | None = None  # None: the dataset's vocabulary size, or GPT-2's 50304 for a random batch
    gradient_accumulation_steps: Annotated[int, ">=", 1] = 1  # micro-batches per update, across all processes
    bias: bool = False  # use biases in Linear and LayerNorm layers
    real_data: bool = True  # load batches from a dataset; False: use one random batch
    dataset: str = "python_docs"  # name of a dataset folder in data/, used if real_data=True
    data_dir: str = ""  # path to a data folder; overrides dataset

    def __post_init__(self):  # skips GPTConfig's checks until CPU defaults are set
        self.resolve_aliases()
        super().__post_init__()
        if not all(n.strip().isdecimal() and int(n) for n in self.decode_batches.split(",")):
            raise UserError(f"decode_batches={self.decode_batches!r}: separate numbers with commas, as in 1,8")
        modes = [name for name in ("sweep", "compare", "profile", "decode") if getattr(self, name)]
        if len(modes) > 1:
            raise UserError(f"{' and '.join(modes)} cannot be combined: choose one")


def main(argv: list[str] | None = None):
    """Run the requested measurement and print a table or JSON."""
    argv = sys.argv[1:] if argv is None else argv
    cfg = read_settings(argv)
    rt = runtime.start(cfg.device, cfg.dtype, n_embd=0 if cfg.decode else cfg.n_embd)
    with contextlib.redirect_stdout(sys.stderr) if cfg.json else contextlib.nullcontext():
        if cfg.decode:
            result = measure_decoding(cfg, rt)
        elif cfg.sweep:
            result = sweep(cfg, rt, argv)
        elif cfg.compare:
            result = compare(cfg, rt, argv)
        else:
            result = measure_step(cfg, rt)
    if cfg.json:
        rt.print(json.dumps(result))


def read_settings(argv: list[str]) -> BenchConfig:
    """Return the settings. Settings of other programs in config files are ignored, with a note on stderr.

    With a config file, the defaults are those of train.py. Without a config file, the default model on a CPU is small.
    """
    unused_keys: list[str] = []
    cfg, given_keys = configurator.load(BenchConfig, argv, unused_keys)
    if unused_keys:
        print0(f"bench.py ignores these settings in the config file: {', '.join(unused_keys)}", file=sys.stderr)
    args = configurator.join_values(BenchConfig, argv)
    if any(configurator.find_config_file(arg) for arg in args if not arg.startswith("--")):
        return replace(cfg, **{**CONFIG_FILE_SETTINGS, **given_keys})
    if not cfg.decode and torch.device(runtime.pick_device(cfg.device)[0]).type == "cpu":
        return replace(cfg, **{**CPU_SETTINGS, **given_keys})
    return cfg


def random_model(cfg: BenchConfig, vocab_size: int):
    """Return a model with random weights, initialized as for training."""
    seed_everything(cfg.seed)
    architecture = {f.name: getattr(cfg, f.name) for f in fields(GPTConfig)}
    return build_model(configurator.build_config(GPTConfig, {**architecture, "vocab_size": vocab_size}))


# ----------------------------------------------------------------------------------------------------------------------
# training steps


class RandomBatch:
    """Replacement for a Corpus that always returns the same batch of random tokens."""

    name = "one random batch"

    def __init__(self, cfg: BenchConfig, vocab_size: int):
        self.batch = list(torch.randint(vocab_size, (2, cfg.batch_size, cfg.block_size)))
        self.lengths = {"train": cfg.batch_size * cfg.block_size}

    def to_device(self, rt: Runtime, vocab_size: int):
        self.batch = rt.move(*self.batch)

    def train_batch(self, *args):
        return self.batch

    def loss_weights(self, first: int, n_batches: int, *args) -> list[float]:
        return [1.0] * n_batches


def load_data(cfg: BenchConfig, rt: Runtime) -> tuple[Any, int]:
    """Return (a Corpus or RandomBatch, the model's vocabulary size)."""
    if not cfg.real_data:
        vocab_size = cfg.vocab_size or GPT2_VOCAB_SIZE
        return RandomBatch(cfg, vocab_size), vocab_size
    folder = find_data_folder(cfg.dataset, cfg.data_dir, rt, out=sys.stdout)
    try:
        corpus = Corpus(folder)
    except UserError as error:
        raise UserError(f"{error}; or pass --real_data=False to use random tokens") from error
    vocab_size = cfg.vocab_size or corpus.model_vocab_size
    corpus.check(cfg.block_size, vocab_size)
    return corpus, vocab_size


def start_training(cfg: BenchConfig, rt: Runtime, label: str = "") -> StepBenchmark:
    """Start a benchmark with cfg's settings: build the model, compile it if requested, describe it and warm it up."""
    corpus, vocab_size = load_data(cfg, rt)
    model = random_model(cfg, vocab_size).to(rt.device)
    run = StepBenchmark(TrainStep(cfg, rt, corpus, model, make_optimizer(model, cfg, rt.device_type)))
    reason = run.compile(cfg.compile)
    compile_note = f"on ({reason}), took {run.compile_s:.1f} s" if run.compiled else f"off ({reason})"
    n_threads, sizes = torch.get_num_threads(), f"n_layer={cfg.n_layer}, n_head={cfg.n_head}, n_embd={cfg.n_embd}"
    rt.print(
        f"{label}{rt.description}, compile: {compile_note}, {n_threads} CPU thread{'s' * (n_threads > 1)}, "
        f"{rt.world_size} process{'es' * (rt.world_size > 1)}, {device_name(rt)}\n"
        f"{label}model: {model.get_num_params() / 1e6:.2f}M parameters ({sizes}), data: {corpus.name}\n"
        f"{label}iteration: one update, using {run.step.tokens_per_iter:,} tokens (batch_size={cfg.batch_size} x "
        f"block_size={cfg.block_size} x gradient_accumulation_steps={cfg.gradient_accumulation_steps})"
    )
    for i in range(cfg.warmup):
        start = time.perf_counter()
        run.update()
        seconds = (time.perf_counter() - start) * (cfg.warmup - 1 + cfg.rounds * cfg.iters)
        if i == 0 and seconds > LONG_SECONDS:
            rt.print(f"{label}expected duration: {format_duration(seconds)}; to shorten it, lower --iters or --rounds")
    return run


def run_result(run: StepBenchmark) -> dict:
    """Return all measurements of a run, with its settings."""
    return {"settings": {k: v for k, v in asdict(run.step.cfg).items() if k not in METHOD_KEYS}, **run.result()}


def measure_step(cfg: BenchConfig, rt: Runtime) -> dict:
    """Measure a training step, print the results as a table and return them; with --profile, also print a profile."""
    trace = os.path.abspath(cfg.trace)
    if cfg.profile and (os.path.isdir(trace) or not os.access(os.path.dirname(trace), os.W_OK)):
        raise UserError(f"trace={cfg.trace} cannot be written: use a file in an existing, writable folder")
    run = start_training(cfg, rt)
    for _ in range(cfg.rounds):
        run.round(cfg.iters)
    result = run_result(run)
    if cfg.profile and rt.is_main:
        order = "self_device_time_total" if rt.device_type == "cuda" else "self_cpu_time_total"
        print(run.profile.key_averages().table(sort_by=order, row_limit=20))
        run.profile.export_chrome_trace(trace)
        print(f"wrote a trace of {PROFILED_UPDATES} updates to {trace}: open it at https://ui.perfetto.dev")
        result["trace"] = trace
    rt.print(format_report(result))
    return result


def format_report(result: dict) -> str:
    """Format a result as a table of names, values and notes."""
    r, times, shares = result, result["rounds_ms"], result["shares"]
    rounds = f"{min(times):.2f} to {max(times):.2f} in {len(times)} rounds" if len(times) > 1 else "one round"
    rows = [("time per iteration", f"{r['ms']:.2f}ms", rounds), ("speed", f"{r['tokens_per_s']:,.0f} tokens/s", "")]
    speed_note = "floating-point operations per second"
    if r["mfu"] is not None:
        speed_note = f"MFU: {r['mfu']:.2%} of the GPU's peak"
    elif r["matmul_flops"]:
        matmul_speed = format_flops(r["matmul_flops"])
        speed_note = f"{r['of_matmul']:.1%} of the {matmul_speed} that one large matrix product reaches"
    rows.append(("arithmetic", format_flops(r["flops"]), speed_note))
    if shares:
        rows += [
            ("matrix products", f"{shares['matmul']:.1%}", "of the time"),
            ("attention", f"{shares['attention']:.1%}", "of the time"),
            ("everything else", f"{shares['other']:.1%}", "of the time"),
        ]
    rows += [
        ("memory, tensors", f"{r['memory_mib']:,.1f} MiB", "peak: weights, gradients, optimizer state, activations"),
        ("memory, process", f"{r['process_mib']:,.0f} MiB", "peak, including PyTorch itself"),
    ]
    if r["memory_growth_mib"] is not None:
        rows.append(("memory growth", f"{r['memory_growth_mib']:+,.1f} MiB", "from the first round to the last"))
    rows.append(("loss", format_number(r["loss"], ".4f"), "at the last update, starting from random weights"))
    name_width, value_width = (max(len(row[i]) for row in rows) for i in (0, 1))
    lines = [f"{name + ':':<{name_width + 1}} {value:<{value_width}}  {note}" for name, value, note in rows]
    return "\n".join(line.rstrip() for line in lines)


def format_number(value: float | None, format_spec: str) -> str:
    """Format value, or return "-" for None."""
    return "-" if value is None else format(value, format_spec)


def format_flops(flops: float) -> str:
    """Format FLOP/s in a suitable unit."""
    return f"{flops / 1e12:,.2f} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:,.2f} GFLOP/s"


# ----------------------------------------------------------------------------------------------------------------------
# several settings


def measure_rounds(cfg: BenchConfig, variants: dict[str, dict], rt: Runtime, rounds: int, catch_errors: bool = False):
    """Measure cfg with the settings of each variant, in the order A B, B A, A B, ...; return {name: result}.

    With catch_errors=True, the result of a variant that is invalid or runs out of GPU memory is its error message.
    """
    if rt.device_type == "cuda" or any(variant.get("compile", cfg.compile) is True for variant in variants.values()):
        from torch._dynamo import config  # slow to import

        # compile each variant for its own shapes; by default, the second one would use dynamic shapes
        config.automatic_dynamic_shapes, config.recompile_limit = False, 64
    runs: dict[str, StepBenchmark] = {}
    results: dict[str, dict | str] = {}

    def call_or_store_error(name: str, function: Callable[[], Any]):
        try:
            return function() if name not in results else None
        except (UserError, torch.OutOfMemoryError) as error:
            if not catch_errors:
                raise
            results[name] = first_line(error)

    def start_variant(name: str):
        settings = configurator.build_config(BenchConfig, {**asdict(cfg), **variants[name]})
        variant_rt = rt if rt.world_size > 1 else runtime.start(settings.device, settings.dtype, n_embd=settings.n_embd)
        runs[name] = start_training(settings, variant_rt, f"{name}: ")

    names = list(variants)
    for name in names:
        call_or_store_error(name, lambda: start_variant(name))
    for i in range(rounds):
        for name in names[:: -1 if i % 2 else 1]:
            call_or_store_error(name, lambda: runs[name].round(cfg.iters))
    return {name: call_or_store_error(name, lambda: run_result(runs[name])) or results[name] for name in names}


def format_results(results: dict) -> str:
    """Format {name: result} as a table with a legend, followed by any error messages."""
    measured = {name: result for name, result in results.items() if not isinstance(result, str)}
    has_mfu = any(result["mfu"] is not None for result in measured.values())
    key, title = ("mfu", "MFU") if has_mfu else ("of_matmul", "of matmul")
    rows = [["", "ms", "tokens/s", "FLOP/s", title, "MiB", "growth", "outside matmuls", "loss"]]
    for name, r in measured.items():
        speed = [f"{r['ms']:,.2f}", f"{r['tokens_per_s']:,.0f}", format_flops(r["flops"]), format_number(r[key], ".1%")]
        memory = [f"{r['memory_mib']:,.1f}", format_number(r["memory_growth_mib"], "+,.1f")]
        outside_matmul = format_number(r["shares"] and 1 - r["shares"]["matmul"], ".1%")
        rows.append([name, *speed, *memory, outside_matmul, format_number(r["loss"], ".4f")])
    errors = [f"{name}  {result}" for name, result in results.items() if name not in measured]
    peak = "MFU: speed relative to the GPU's peak" if has_mfu else "of matmul: speed relative to a large matrix product"
    legend = f"(ms: time per iteration; {peak}; MiB: peak memory of tensors and its growth;\n"
    legend += " outside matmuls: time not spent on matrix products; loss: at the last update)"
    return "\n".join([format_table(rows), legend, *errors])


def sweep_values(cfg: BenchConfig, rt: Runtime) -> tuple[str, list]:
    """Return the name of the setting to sweep and the values to measure."""
    name, separator, words = cfg.sweep.partition(":")
    types = {key: t for key, t in get_type_hints(BenchConfig).items() if key not in METHOD_KEYS} | {"world_size": int}
    if name not in types:
        matches = get_close_matches(name, types, n=1)
        hint = f"did you mean {matches[0]!r}?" if matches else "--help lists all settings"
        raise UserError(f"sweep={name}: unknown setting; {hint}")
    if separator:
        parsed = [configurator.parse_value(text.strip(), types[name]) for text in words.split(",")]
        values = [configurator.check_type(value, types[name], f"sweep={name}") for value in parsed]
        if name == "world_size" and min(values) < 1:
            raise UserError(f"sweep={cfg.sweep}: world_size must be at least 1")
        return name, list(dict.fromkeys(values))
    n_gpus = torch.cuda.device_count() if rt.device_type == "cuda" else 2
    defaults: dict[str, list] = {
        **{key: [getattr(cfg, key) * n for n in (1, 2, 4, 8)] for key in ("block_size", "batch_size", "n_embd")},
        "world_size": [2**i for i in range(n_gpus.bit_length())],
        "dtype": list(runtime.DTYPES),
        "pos_embd": ["default", "rope", "relative", "alibi"],
        "compile": [False, True],
    }
    choices = [False, True] if types[name] is bool else list(get_args(types[name]))
    if name not in defaults and not (choices and get_origin(types[name]) in (Literal, None)):
        raise UserError(f"sweep={name} needs values, as in --sweep={name}:{example_values(getattr(cfg, name))}")
    return name, defaults.get(name, choices)


def example_values(value) -> str:
    """Return two example values for a message, derived from a setting's current value."""
    if isinstance(value, float):
        return f"{value / 2:g},{value:g}" if value else "0.1,0.2"
    return f"{value},{2 * value}" if isinstance(value, int) and value else "1,2"


def sweep(cfg: BenchConfig, rt: Runtime, argv: list[str]) -> dict:
    """Measure several values of one setting alternately, print a table and return the results.

    If a value does not work, its result is the error message.
    """
    name, values = sweep_values(cfg, rt)
    if rt.world_size > 1:
        raise UserError("--sweep runs in one process (--sweep=world_size starts torchrun itself): do not use torchrun")
    if name == "world_size":
        results = {f"{name}={n}": run_torchrun(n, cfg, argv) for n in values}
    else:
        variants = {f"{name}={value}": {name: value} for value in values}
        if name == "n_embd":  # keep the head size if it divides n_embd
            head_size = cfg.n_embd // cfg.n_head
            for variant in variants.values():
                variant |= {"n_head": variant[name] // head_size} if variant[name] % head_size == 0 else {}
        results = measure_rounds(cfg, variants, rt, cfg.rounds, catch_errors=True)
    if all(isinstance(result, str) for result in results.values()):
        raise UserError(f"sweep={cfg.sweep}: none of the values work: {next(iter(results.values()))}")
    print(format_results(results))
    rows = [{"value": v, **({"error": r} if isinstance(r, str) else r)} for v, r in zip(values, results.values())]
    return {"sweep": name, "results": rows}


def run_torchrun(n: int, cfg: BenchConfig, argv: list[str]) -> dict | str:
    """Run bench.py in n processes that each do as much work as one process would; return the result or an error."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    command += [os.path.abspath(__file__), *argv, "--sweep=", "--json"]
    command += [f"--gradient_accumulation_steps={cfg.gradient_accumulation_steps * n}"]
    threads = max(1, torch.get_num_threads() // n)  # the processes share the cores
    print(f"world_size={n}, CPU threads per process: {threads}", flush=True)
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", env=env)
    if process.returncode == 0:
        return json.loads(process.stdout.splitlines()[-1])
    messages = [line for line in process.stderr.splitlines() if line.startswith("bench.py: ")]
    return messages[0].removeprefix("bench.py: ") if messages else f"torchrun exited with code {process.returncode}"


def compare(cfg: BenchConfig, rt: Runtime, argv: list[str]) -> dict:
    """Measure A (cfg) and B (cfg plus --compare) alternately; print and return both results and their ratio."""
    try:
        words = [cfg.compare] if configurator.find_config_file(cfg.compare) else shlex.split(cfg.compare)
        cfg_b = read_settings([*argv, *words])
    except ValueError as error:  # shlex also raises it, for a missing quotation mark
        raise UserError(f"compare: {error}") from error
    different_names = [f.name for f in fields(cfg) if getattr(cfg, f.name) != getattr(cfg_b, f.name)]
    if method_names := [name for name in different_names if name in METHOD_KEYS]:
        raise UserError(f"compare: {method_names[0]} applies to both sides: pass it outside the quotes")
    dtype = runtime.pick_dtype(cfg_b.dtype, rt.device_type, cfg_b.n_embd)[0]
    if rt.world_size > 1 and (cfg_b.device != cfg.device or rt.dtype != dtype):
        raise UserError("compare: under torchrun, A and B must have the same device and dtype: run it without torchrun")
    for name, setting in {"A": cfg, "B": cfg_b}.items():
        rt.print(f"{name}: {', '.join(f'{key}={getattr(setting, key)}' for key in different_names) or 'no changes'}")
    rounds = max(cfg.rounds, MIN_COMPARE_ROUNDS)
    results = measure_rounds(cfg, {"A": {}, "B": asdict(cfg_b)}, rt, rounds)
    speeds = [[r["tokens_per_update"] / ms for ms in r["rounds_ms"]] for r in results.values()]
    ratios = [b / a for a, b in zip(*speeds)]
    ratio, min_ratio, max_ratio = median(ratios), min(ratios), max(ratios)
    rt.print(format_results(results))
    ratio_range = f"({min_ratio:.3f} to {max_ratio:.3f} in {rounds} pairs)"
    rt.print(f"tokens/s of B divided by tokens/s of A: {ratio:.3f} {ratio_range}; a ratio above 1 means B is faster")
    return dict(compare=results, ratio=ratio, ratio_min=min_ratio, ratio_max=max_ratio, ratios=ratios)


# ----------------------------------------------------------------------------------------------------------------------
# decoding


def measure_decoding(cfg: BenchConfig, rt: Runtime) -> dict:
    """Measure the speed of decoding, print it as a table and return it."""
    model = random_model(cfg, cfg.vocab_size or GPT2_VOCAB_SIZE)
    n_params, n_threads = model.get_num_params(), torch.get_num_threads()
    prompt = torch.randint(model.config.vocab_size, (1, cfg.prompt_tokens)).tolist()
    hf_model: Any = transformers_model(model, cfg, rt) if cfg.transformers else None
    description = prepare_for_decoding(model, rt, cfg.dtype, cfg.quantize, cfg.compile)
    lengths = f"prompt of {cfg.prompt_tokens} tokens, {cfg.max_new_tokens} new tokens"
    model_text = f"{n_params / 1e6:.2f}M parameters, {lengths}, temperature 0.8, top_k 200"
    print(f"{description}, {n_threads} CPU thread{'s' * (n_threads > 1)}\n{model_text}")

    def time_dongpt(batch_size: int) -> tuple[float, float]:
        """Return the seconds until the first token and until the last token."""
        stream = model.stream(prompt * batch_size, cfg.max_new_tokens, 0.8, 200, seed=cfg.seed)
        first_s = timed(lambda: next(stream), rt)
        return first_s, first_s + timed(lambda: list(stream), rt)

    def time_transformers(batch_size: int) -> tuple[float, float]:
        idx = torch.tensor(prompt * batch_size, device=rt.device)
        options = dict(attention_mask=torch.ones_like(idx), do_sample=True, temperature=0.8, top_k=200, pad_token_id=0)

        def seconds(n: int) -> float:
            return timed(lambda: hf_model.generate(idx, max_new_tokens=n, min_new_tokens=n, **options), rt)

        return seconds(1), seconds(cfg.max_new_tokens)

    timers = {"donGPT": time_dongpt, **({"transformers": time_transformers} if hf_model else {})}
    times: dict[tuple[str, int], list] = {(p, int(n)): [] for n in cfg.decode_batches.split(",") for p in timers}
    bandwidths = []
    for i in range(-1, cfg.rounds):  # the first round warms up
        for library, batch_size in times:
            bandwidth, seconds = memory_bandwidth(rt), timers[library](batch_size)
            if i >= 0:
                bandwidths.append(bandwidth)
                times[library, batch_size].append(seconds)
    n_bytes, bandwidth = bytes_per_token(model), median(bandwidths)
    results, rows = [], [["", "batch size", "first token", "tokens/s", "of bandwidth"]]
    for (library, batch_size), rounds in times.items():
        first_s, last_s = (median(seconds) for seconds in zip(*rounds))
        speed, bandwidth_share = batch_size * cfg.max_new_tokens / last_s, ""
        result = {"program": library, "rows": batch_size, "first_token_ms": first_s * 1000, "tokens_per_s": speed}
        if library == "donGPT":
            step = median((last_s - first_s) / (cfg.max_new_tokens - 1) for first_s, last_s in rounds)
            result |= {"ms_per_step": step * 1000, "bandwidth_share": n_bytes / step / bandwidth}
            bandwidth_share = f"{result['bandwidth_share']:.0%}"
        results.append(result)
        rows.append([library, str(batch_size), f"{first_s * 1000:.0f} ms", f"{speed:,.1f}", bandwidth_share])
    speeds = f"a step reads {n_bytes / 1e6:.1f} MB of weights, and this machine reads {bandwidth / 1e9:.1f} GB/s"
    print(f"{format_table(rows)}\n(of bandwidth: {speeds}; 100% means memory-bound)")
    summary = {"decode": results, "bandwidth_gb_s": bandwidth / 1e9, "weight_mb": n_bytes / 1e6, "parameters": n_params}
    summary |= {"prompt_tokens": cfg.prompt_tokens, "new_tokens": cfg.max_new_tokens, "rounds": cfg.rounds}
    summary |= {"device": rt.device, "setup": description, "threads": n_threads, "torch": str(torch.__version__)}
    return summary


def transformers_model(model, cfg: BenchConfig, rt: Runtime):
    """Convert the model to transformers (float32 on a CPU, else rt's dtype), or return None if that is not possible."""
    try:
        if cfg.prompt_tokens + cfg.max_new_tokens > model.config.block_size:
            raise UserError("its GPT-2 cannot generate beyond block_size")
        from transformers import AutoModelForCausalLM

        from dongpt.checkpoint import architectures, export

        if architectures.find_name(model.config) == architectures.CUSTOM:
            scheme = f"pos_embd={model.config.pos_embd} and ngrams={model.config.ngrams}"
            raise UserError(f"it has no architecture with {scheme}")
        with tempfile.TemporaryDirectory() as folder:
            export.save(model, None, folder)
            hf_model: Any = AutoModelForCausalLM.from_pretrained(folder)
    except (ImportError, ValueError) as error:
        print(f"transformers is not measured: {first_line(error)}")
        return None
    dtype = "float32" if rt.device_type == "cpu" else rt.dtype
    return hf_model.to(device=rt.device, dtype=runtime.DTYPES[dtype]).eval()


if __name__ == "__main__":
    run_program(main, lists_configs=True)
