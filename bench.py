"""Speed and memory of a training step, or of decoding: text for people, and JSON in the last line for programs.

    python bench.py                                    # on a GPU GPT-2 124M, on a CPU nanoGPT's model for CPUs
    python bench.py config/train_don_char.py           # the step of that run
    python bench.py --real_data=False --compile=True --profile
    python bench.py --sweep=pos_embd                   # or dtype, compile, block_size, world_size, ...; n_layer:2,4,8
    python bench.py --compare="--dtype=bfloat16"       # two settings in turn; or --compare=config/train_eds.py
    python bench.py --decode                           # GPT-2 124M, random weights, beside transformers' generate
    python bench.py --decode --dtype=bfloat16 --quantize=int8 --decode_batches=1,8,64
    torchrun --standalone --nproc_per_node=2 bench.py --gradient_accumulation_steps=2

A step is one update as train.py makes it, from the batch to the optimizer. Its time is the median over rounds of
`iters` updates each; several settings take turns, so that a busy machine slows all of them alike. With --decode the
JSON has for each number of rows the median over rounds of the time to the first token, of tokens/s with it, and of the
share of the memory's bandwidth at which weights were read behind it; and the same of transformers' generate (float32 on
a CPU) on the same weights and prompt.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from statistics import median
from typing import Callable, Iterator, Literal, get_args, get_origin, get_type_hints

import torch

import configurator
from configurator import UserError
from dongpt import runtime
from dongpt.checkpoint import build_model
from dongpt.decode.ready import Quantize, to_inference
from dongpt.program import run_program
from dongpt.runtime import Runtime, RuntimeConfig, first_line, print_main, seed_everything
from dongpt.train import measure as measuring
from dongpt.train.data import Corpus, find_folder, prepare_if_missing
from dongpt.train.measure import Measured, bytes_per_token, memory_bandwidth
from dongpt.train.optim import make_optimizer
from dongpt.train.step import StepConfig, TrainStep
from model import GPTConfig

# What a CPU measures unless told otherwise: nanoGPT's CPU demo. GPT-2 124M would take minutes per iteration.
CPU_DEFAULTS = dict(n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12)
# What train.py takes where a config file leaves these out.
FILE_DEFAULTS = dict(dataset="openwebtext", gradient_accumulation_steps=StepConfig.gradient_accumulation_steps)
PAIRS = 5  # rounds that a comparison has at least


@dataclass(frozen=True)
class Method:
    """How to measure."""

    warmup: int = 5  # updates before the measured ones
    iters: int = 10  # updates in a round
    rounds: int = 3  # how often all is measured in turn
    sweep: str = ""  # a setting to vary, as in pos_embd or n_layer:2,4,8; world_size is one too
    compare: str = ""  # a second setting, measured in turn: a config file, or settings in quotes
    profile: bool = False  # print the operations that take the most time, and write a trace of them
    trace: str = "trace.json"  # the file for --profile, in Chrome's format
    decode: bool = False  # measure decoding instead of training
    decode_batches: str = "1,8"  # how many rows at once, each in turn, divided by commas
    prompt_tokens: int = 16  # length of the prompt
    max_new_tokens: int = 200  # tokens behind it
    quantize: Quantize = "none"  # int8: weights of one byte
    transformers: bool = True  # measure transformers' generate too, where it has the architecture


@dataclass(frozen=True)
class BenchConfig(RuntimeConfig, StepConfig, GPTConfig, Method):
    vocab_size: int | None = None  # None: of the corpus, GPT-2's 50304 on a random batch
    gradient_accumulation_steps: int = 1  # micro-batches per update, over all processes together
    bias: bool = False  # in Linear and LayerNorm
    real_data: bool = True  # load batches of a corpus; False computes on one random batch
    dataset: str = "python_docs"  # the corpus for real_data, a folder under data/
    data_dir: str = ""  # a data folder anywhere; replaces dataset

    def __post_init__(self):  # GPTConfig's own checks wait until the defaults for a CPU are in
        self.settle_names()
        least = dict(warmup=0, iters=1, rounds=1, prompt_tokens=1, max_new_tokens=2)
        wrong = [
            f"{name}={getattr(self, name)} must be at least {bound}"
            for name, bound in least.items()
            if getattr(self, name) < bound
        ] + self.wrong_values()
        if not all(n.strip().isdecimal() and int(n) for n in self.decode_batches.split(",")):
            wrong.append(f"decode_batches={self.decode_batches!r}: list numbers with commas, as in 1,8")
        modes = [name for name in ("sweep", "compare", "profile", "decode") if getattr(self, name)]
        if len(modes) > 1:
            wrong.append(f"{' and '.join(modes)} do not go together: give one of them")
        if wrong:
            raise UserError("; ".join(wrong))


HOW = [f.name for f in fields(Method)]


def main(argv: list[str] | None = None):
    """Measure what the arguments say, and print it."""
    argv = sys.argv[1:] if argv is None else argv
    cfg = read_settings(argv)
    if cfg.decode:
        return measure_decoding(cfg, runtime.start(cfg.device, cfg.dtype))
    rt = start(cfg)
    GPTConfig(**architecture(cfg))  # says what is wrong with it before anything is varied
    if cfg.sweep:
        return sweep(cfg, rt, argv)
    return compare(cfg, rt, argv) if cfg.compare else measure(cfg, rt)


def read_settings(argv: list[str]) -> BenchConfig:
    """The settings; names the keys of config files that only other programs have.

    With a config file the step is the one that train.py would make with it; without, a CPU gets a small model.
    """
    skipped: list[str] = []
    cfg, given = configurator.load(BenchConfig, argv, skipped)
    if skipped:
        print_main(f"not used here: {', '.join(skipped)}")
    if any(configurator.find_config(arg) for arg in argv if not arg.startswith("--")):
        return replace(cfg, **{**FILE_DEFAULTS, **given})
    if not cfg.decode and torch.device(runtime.pick_device(cfg.device)[0]).type == "cpu":
        return replace(cfg, **{**CPU_DEFAULTS, **given})
    return cfg


def start(cfg: BenchConfig) -> Runtime:
    """The device and dtype that cfg means for training."""
    return runtime.start(cfg.device, cfg.dtype, n_embd=cfg.n_embd)


def architecture(cfg: BenchConfig) -> dict:
    """The fields of GPTConfig."""
    return {f.name: getattr(cfg, f.name) for f in fields(GPTConfig)}


def random_model(cfg: BenchConfig, vocab_size: int):
    """A model with the weights that training begins with."""
    seed_everything(cfg.seed)
    return build_model(GPTConfig(**{**architecture(cfg), "vocab_size": vocab_size}))


# ----------------------------------------------------------------------------------------------------------------------
# one setting


class RandomBatch:
    """Stands in for a Corpus: every batch is the same, of random tokens."""

    name = "one random batch"

    def __init__(self, cfg: BenchConfig, vocab_size: int):
        self.batch = list(torch.randint(vocab_size, (2, cfg.batch_size, cfg.block_size)))
        self.lengths = {"train": cfg.batch_size * cfg.block_size}

    def to_device(self, rt: Runtime, vocab_size: int):
        self.batch = rt.move(*self.batch)

    def train_batch(self, *which):
        return self.batch

    def loss_weights(self, first: int, n_batches: int, *which) -> list[float]:
        return [1.0] * n_batches


def begin(cfg: BenchConfig, rt: Runtime, label: str = "") -> Measured:
    """A training as cfg says, compiled, described in print and warmed up."""
    if cfg.gradient_accumulation_steps % rt.world_size:
        raise UserError(
            f"gradient_accumulation_steps={cfg.gradient_accumulation_steps} micro-batches cannot be "
            f"shared evenly by {rt.world_size} processes: use a multiple of {rt.world_size}"
        )
    corpus = None
    if cfg.real_data:
        folder = find_folder(cfg.dataset, cfg.data_dir)
        prepare_if_missing(folder, rt)
        try:
            corpus = Corpus(folder)
        except ValueError as error:
            raise UserError(f"{error}; --real_data=False computes on random tokens") from error
    vocab_size = cfg.vocab_size or (corpus.model_vocab_size if corpus else GPTConfig.vocab_size)
    if corpus:
        corpus.check(cfg.block_size, vocab_size)
    model = random_model(cfg, vocab_size).to(rt.device)
    run = Measured(
        TrainStep(cfg, rt, corpus or RandomBatch(cfg, vocab_size), model, make_optimizer(model, cfg, rt.device_type))
    )
    why = run.compile(cfg.compile)
    compiled = f"on ({why}), took {run.compile_s:.1f} s" if run.compiled else f"off ({why})"
    rt.print(
        f"{label}{rt.why}, compile: {compiled}, {torch.get_num_threads()} CPU threads, "
        f"{rt.world_size} process{'es' if rt.world_size > 1 else ''}, {measuring.device_name(rt)}\n"
        f"{label}{model.get_num_params() / 1e6:.2f}M parameters, {cfg.n_layer} layers, {cfg.n_head} heads, n_embd "
        f"{cfg.n_embd}, block_size {cfg.block_size}, batch_size {cfg.batch_size}, micro-batches per update "
        f"{cfg.gradient_accumulation_steps}, data: {run.updates.corpus.name}"
    )
    for _ in range(cfg.warmup):
        run.update()
    return run


def result_of(run: Measured) -> dict:
    """What was measured, with the settings."""
    cfg = run.updates.cfg
    return {"settings": {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.name not in HOW}, **run.result()}


def measure(cfg: BenchConfig, rt: Runtime):
    """Measure one setting and print it; with --profile its operations too."""
    trace = os.path.abspath(cfg.trace)
    taken = os.path.exists(trace) and not os.path.isfile(trace)  # by a folder, or a device
    if cfg.profile and (taken or not os.access(os.path.dirname(trace), os.W_OK)):
        raise UserError(f"trace={cfg.trace} cannot be written: give the name of a file in a folder that is there")
    run = begin(cfg, rt)
    for _ in range(cfg.rounds):
        run.round(cfg.iters)
    result = result_of(run)
    if cfg.profile and rt.is_main:
        order = "self_device_time_total" if rt.device_type == "cuda" else "self_cpu_time_total"
        print(run.profile.key_averages().table(sort_by=order, row_limit=20))
        run.profile.export_chrome_trace(trace)
        print(f"{measuring.PROFILED} updates are in {trace}: chrome://tracing and https://ui.perfetto.dev open it")
        result["trace"] = trace
    rt.print(report(result))
    rt.print(json.dumps(result))


def report(result: dict) -> str:
    """The numbers of a result in words."""
    ms, shares = result["rounds_ms"], result["shares"]
    lines = [
        f"time per iteration: {result['ms']:.2f}ms ({min(ms):.2f} to {max(ms):.2f} in rounds: {len(ms)}), "
        f"{result['tokens_per_s']:,.0f} tokens/s",
        per_second(result["flops"]),
    ]
    if result["mfu"] is not None:
        lines[1] += f", MFU: {result['mfu']:.2%}"
    elif result["matmul_flops"]:
        lines[1] += (
            f", {result['of_matmul']:.1%} of the {per_second(result['matmul_flops'])} that a matmul of the "
            f"MLP's shape reaches here"
        )
    memory = f"memory: {result['memory_mib']:,.1f} MiB in tensors at most"
    if result["process_mib"] is not None:
        memory += f", {result['process_mib']:,.0f} MiB in the process"
    if result["memory_growth_mib"] is not None:
        memory += f", {result['memory_growth_mib']:+,.1f} MiB from the first round to the last"
    lines.append(memory)
    if shares:
        lines.append(
            f"time outside matmuls: {1 - shares['matmul']:.1%} (attention {shares['attention']:.1%}, all "
            f"else {shares['other']:.1%})"
        )
    return "\n".join([*lines, f"loss: {shown(result['loss'], '.4f')}"])


def shown(value: float | None, form: str) -> str:
    """value in a format, "-" where there is none."""
    return "-" if value is None else format(value, form)


def per_second(flops: float) -> str:
    """FLOP/s in the unit that suits them."""
    return f"{flops / 1e12:,.2f} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:,.2f} GFLOP/s"


# ----------------------------------------------------------------------------------------------------------------------
# several settings


def in_turn(runs: list, rounds: int) -> Iterator:
    """The runs in the order in which they are timed, each once in a round: A B, B A, A B, ..."""
    for i in range(rounds):
        yield from runs[::-1] if i % 2 else runs


def compile_apart():
    """Have torch.compile make code for the shapes of each setting alone, not for any shape from the second one on."""
    from torch._dynamo import config  # some seconds, which a single setting need not wait for

    config.automatic_dynamic_shapes, config.recompile_limit = False, 64


def table(results: dict) -> str:
    """results, {name: result or why there is none}, a line each."""
    known = any(not isinstance(result, str) and result["mfu"] is not None for result in results.values())
    width = max(len(str(name)) for name in results) + 2
    lines = [
        f"{'':<{width}}{'ms':>10}{'tokens/s':>12}{'FLOP/s':>17}{'MFU' if known else 'of matmul':>11}{'MiB':>11}"
        f"{'growth':>10}{'outside matmuls':>17}{'loss':>9}"
    ]
    for name, result in results.items():
        if isinstance(result, str):
            lines.append(f"{name!s:<{width}}  {result}")
            continue
        lines.append(
            f"{name!s:<{width}}{result['ms']:>10,.2f}{result['tokens_per_s']:>12,.0f}"
            f"{per_second(result['flops']):>17}{shown(result['mfu' if known else 'of_matmul'], '.1%'):>11}"
            f"{result['memory_mib']:>11,.1f}{shown(result['memory_growth_mib'], '+,.1f'):>10}"
            f"{shown(result['shares'] and 1 - result['shares']['matmul'], '.1%'):>17}"
            f"{shown(result['loss'], '.4f'):>9}"
        )
    return "\n".join(lines)


def sweep_values(cfg: BenchConfig, rt: Runtime) -> tuple[str, list]:
    """(setting, values) that cfg.sweep means."""
    name, colon, words = cfg.sweep.partition(":")
    kinds = {key: kind for key, kind in get_type_hints(BenchConfig).items() if key not in HOW} | {"world_size": int}
    if name not in kinds:
        near = get_close_matches(name, kinds, n=1)
        raise UserError(
            f"sweep={name}: unknown setting" + (f", did you mean {near[0]!r}?" if near else "; --help lists them")
        )
    kind = kinds[name]
    if colon:
        values = [
            configurator.check(configurator.parse(word.strip(), kind), kind, f"sweep={name}")
            for word in words.split(",")
        ]
        if name == "world_size" and min(values) < 1:
            raise UserError(f"sweep={cfg.sweep}: there is at least 1 process")
        return name, list(dict.fromkeys(values))
    if name in ("block_size", "batch_size", "n_embd"):
        return name, [getattr(cfg, name) * n for n in (1, 2, 4, 8)]
    if name == "world_size":
        n_gpus = torch.cuda.device_count() if rt.device_type == "cuda" else 2
        return name, [2**i for i in range(n_gpus.bit_length())]
    if name == "dtype":
        return name, [
            dtype for dtype in runtime.DTYPES if not isinstance(attempt(runtime.pick_dtype, dtype, rt.device_type), str)
        ]
    if name == "pos_embd":
        return name, ["default", "rope", "relative", "alibi"]
    if kind is bool or name == "compile":
        return name, [False, True]
    if get_origin(kind) is Literal:
        return name, list(get_args(kind))
    raise UserError(f"sweep={name} needs values, as in --sweep={name}:{getattr(cfg, name)},...")


def varied(cfg: BenchConfig, name: str, value) -> BenchConfig:
    """cfg with another value; with another n_embd the heads keep their size where that divides it."""
    head_size = cfg.n_embd // cfg.n_head
    if name == "n_embd" and value % head_size == 0:
        cfg = replace(cfg, n_head=value // head_size)
    return replace(cfg, **{name: value})


def attempt(action: Callable, *arguments):
    """What action gives, or the sentence about a value that cannot be, or is too much for the GPU's memory."""
    try:
        return action(*arguments)
    except (ValueError, torch.OutOfMemoryError) as error:
        return first_line(error)


def sweep(cfg: BenchConfig, rt: Runtime, argv: list[str]):
    """Measure the values of one setting in turn; print a table in which those that cannot be have a sentence."""
    name, values = sweep_values(cfg, rt)
    if rt.world_size > 1:
        raise UserError("sweep runs in one process, and sweep=world_size starts torchrun itself: leave torchrun away")
    if name == "world_size":
        results = {n: in_processes(n, cfg, argv) for n in values}
    else:
        results = sweep_here(cfg, rt, name, values)
    if all(isinstance(result, str) for result in results.values()):
        raise UserError(f"sweep={cfg.sweep}: nothing can be measured: {next(iter(results.values()))}")
    print(table({f"{name}={value}": result for value, result in results.items()}))
    print(
        json.dumps(
            {
                "sweep": name,
                "results": [
                    {"value": value, **({"error": result} if isinstance(result, str) else result)}
                    for value, result in results.items()
                ],
            }
        )
    )


def sweep_here(cfg: BenchConfig, rt: Runtime, name: str, values: list) -> dict:
    """{value: result or why there is none}, all values measured in turn in this process."""
    if name == "compile" or cfg.compile is True or rt.device_type == "cuda":
        compile_apart()

    def begun(value) -> Measured:
        setting = varied(cfg, name, value)
        return begin(setting, start(setting), f"{name}={value}: ")

    runs = {value: attempt(begun, value) for value in values}
    for value in in_turn(values, cfg.rounds):
        if isinstance(runs[value], Measured) and (sentence := attempt(runs[value].round, cfg.iters)):
            runs[value] = sentence
    return {value: attempt(result_of, run) if isinstance(run, Measured) else run for value, run in runs.items()}


def in_processes(n: int, cfg: BenchConfig, argv: list[str]) -> dict | str:
    """What n processes of torchrun measure, each with as much work as one has; or why they do not."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={n}",
        os.path.abspath(__file__),
        *argv,
        "--sweep=",
        f"--gradient_accumulation_steps={cfg.gradient_accumulation_steps * n}",
    ]
    threads = max(1, torch.get_num_threads() // n)  # all of them together compute with the cores that one has
    print(f"world_size={n}, {threads} CPU threads each", flush=True)
    done = subprocess.run(
        command,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    said = [line for line in done.stderr.splitlines() if line.startswith("bench.py: ")]
    return said[0].removeprefix("bench.py: ") if said else f"torchrun ended with exit code {done.returncode}"


def compare(cfg: BenchConfig, rt: Runtime, argv: list[str]):
    """Measure cfg, A, and cfg with the settings of --compare, B, in turn; print both and the ratio of their speeds."""
    try:
        words = [cfg.compare] if configurator.find_config(cfg.compare) else shlex.split(cfg.compare)
        other = read_settings([*argv, *words])
    except ValueError as error:
        raise UserError(f"compare: {error}") from error
    differ = [f.name for f in fields(cfg) if getattr(cfg, f.name) != getattr(other, f.name)]
    if how := [name for name in differ if name in HOW]:
        raise UserError(f"compare: {how[0]} says how both are measured: give it outside of the quotes")
    if rt.world_size > 1 and (
        other.device != cfg.device or rt.dtype != runtime.pick_dtype(other.dtype, rt.device_type, other.n_embd)[0]
    ):
        raise UserError("compare: several processes share one device and dtype: compare these without torchrun")
    if True in (cfg.compile, other.compile) or rt.device_type == "cuda":
        compile_apart()
    settings, rounds, runs = {"A": cfg, "B": other}, max(cfg.rounds, PAIRS), {}
    for name, setting in settings.items():
        rt.print(f"{name}: {', '.join(f'{key}={getattr(setting, key)}' for key in differ) or 'the same'}")
        runs[name] = begin(setting, start(setting) if rt.world_size == 1 else rt, f"{name}: ")
    for run in in_turn(list(runs.values()), rounds):
        run.round(cfg.iters)
    results = {name: result_of(run) for name, run in runs.items()}
    speeds = [[run.updates.tokens / seconds for seconds in run.seconds] for run in runs.values()]
    ratios = [b / a for a, b in zip(*speeds)]
    rt.print(table(results))
    rt.print(
        f"tokens/s of B / tokens/s of A: {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f} in "
        f"{rounds} pairs)"
    )
    rt.print(
        json.dumps(
            {
                "compare": results,
                "ratio": median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "ratios": ratios,
            }
        )
    )


# ----------------------------------------------------------------------------------------------------------------------
# decoding


def measure_decoding(cfg: BenchConfig, rt: runtime.Runtime):
    """Print the speed of decoding as a table, and as JSON in one line."""
    model = random_model(cfg, cfg.vocab_size or GPTConfig.vocab_size)
    batches, n_params = [int(n) for n in cfg.decode_batches.split(",")], model.get_num_params()
    prompt = torch.randint(model.config.vocab_size, (1, cfg.prompt_tokens)).tolist()
    theirs = None
    if cfg.transformers and cfg.prompt_tokens + cfg.max_new_tokens > model.config.block_size:
        print("transformers is not measured: its GPT-2 ends at block_size")
    elif cfg.transformers:
        theirs = transformers_model(model, cfg, rt)
    model, why = to_inference(model, rt, cfg.dtype, cfg.quantize, cfg.compile)
    print(
        f"{why}, {torch.get_num_threads()} CPU threads\n{n_params / 1e6:.2f}M parameters, prompt of "
        f"{cfg.prompt_tokens} tokens, {cfg.max_new_tokens} new ones, temperature 0.8, top_k 200"
    )
    n_bytes = bytes_per_token(model)

    def ours(n_rows: int) -> tuple[float, float]:
        began = time.perf_counter()
        stream = model.stream(prompt * n_rows, cfg.max_new_tokens, 0.8, 200, seed=cfg.seed)
        next(stream)
        first = time.perf_counter() - began
        for _ in stream:
            pass
        return first, time.perf_counter() - began

    def others(n_rows: int) -> tuple[float, float]:
        idx, times = torch.tensor(prompt * n_rows, device=rt.device), []
        for n in (1, cfg.max_new_tokens):
            rt.synchronize()
            began = time.perf_counter()
            theirs.generate(
                idx,
                attention_mask=torch.ones_like(idx),
                max_new_tokens=n,
                min_new_tokens=n,
                do_sample=True,
                temperature=0.8,
                top_k=200,
                pad_token_id=0,
            )
            rt.synchronize()
            times.append(time.perf_counter() - began)
        return times[0], times[1]

    measured = {(name, n_rows): [] for n_rows in batches for name in ("donGPT", *(["transformers"] if theirs else []))}
    bandwidths = []
    for i in range(-1, cfg.rounds):  # the first round warms up
        for name, n_rows in measured:
            bandwidth = memory_bandwidth(rt)
            times = (ours if name == "donGPT" else others)(n_rows)
            if i >= 0:
                bandwidths.append(bandwidth)
                measured[name, n_rows].append(times)
    bandwidth = median(bandwidths)
    results = []
    print(
        f"memory: {bandwidth / 1e9:.1f} GB/s, weights: {n_bytes / 1e6:.1f} MB per token\n"
        f"{'':<14}{'rows':>4}{'first token':>14}{'tokens/s':>12}{'of bandwidth':>14}"
    )
    for (name, n_rows), times in measured.items():
        first, whole = (median([time[i] for time in times]) for i in (0, 1))
        result = {
            "program": name,
            "rows": n_rows,
            "first_token_ms": first * 1000,
            "tokens_per_s": n_rows * cfg.max_new_tokens / whole,
        }
        if name == "donGPT":
            step = median([(whole - first) / (cfg.max_new_tokens - 1) for first, whole in times])
            result |= {"ms_per_step": step * 1000, "bandwidth_share": n_bytes / step / bandwidth}
        results.append(result)
        share = f"{result['bandwidth_share']:>13.0%}" if "bandwidth_share" in result else ""
        print(f"{name:<14}{n_rows:>4}{first * 1000:>11.0f} ms{result['tokens_per_s']:>12,.1f} {share}")
    print(
        json.dumps(
            {
                "decode": results,
                "bandwidth_gb_s": bandwidth / 1e9,
                "weight_mb": n_bytes / 1e6,
                "parameters": n_params,
                "prompt_tokens": cfg.prompt_tokens,
                "new_tokens": cfg.max_new_tokens,
                "rounds": cfg.rounds,
                "device": rt.device,
                "setup": why,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            }
        )
    )


def transformers_model(model, cfg: BenchConfig, rt: runtime.Runtime):
    """The model as transformers has it: in float32 on a CPU, in the same dtype elsewhere; None where it has no such."""
    try:
        from transformers import GPT2LMHeadModel

        from dongpt.checkpoint import hugging_face

        with tempfile.TemporaryDirectory() as folder:
            hugging_face.save(model, None, folder)
            theirs = GPT2LMHeadModel.from_pretrained(folder)
    except (ImportError, ValueError) as error:
        print(f"transformers is not measured: {runtime.first_line(error)}")
        return None
    dtype = "float32" if rt.device_type == "cpu" else rt.dtype
    return theirs.to(device=rt.device, dtype=runtime.DTYPES[dtype]).eval()


if __name__ == "__main__":
    run_program(main)
