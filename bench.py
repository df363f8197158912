"""Speed and memory of a training step, ms/iter, tokens/s and, on GPUs whose peak is known, MFU; or of decoding.

    python bench.py                                    # on a GPU GPT-2 124M, on a CPU the small model of the README
    python bench.py --real_data=False --compile=True
    python bench.py --n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --batch_size=64 --profile
    python bench.py --decode                           # GPT-2 124M, random weights, beside transformers' generate
    python bench.py --decode --dtype=bfloat16 --quantize=int8 --decode_batches=1,8,64

With --decode the last line is JSON: for each number of rows the median over rounds of the time to the first token, of
tokens/s with it, and of the share of the memory's bandwidth at which weights were read behind it; and the same
of transformers' generate (float32 on a CPU) on the same weights and prompt.
"""
import json
import sys
import tempfile
import time
from dataclasses import dataclass, fields, replace

import torch

import configurator
from dongpt import runtime
from dongpt.corpus import Corpus, find_folder, prepare_if_missing
from dongpt.inference import Quantize, prepare
from dongpt.metrics import peak_flops
from dongpt.program import run_program
from dongpt.runtime import RuntimeConfig, seed_everything
from model import GPTConfig, new_model

# What a CPU measures unless told otherwise: nanoGPT's CPU demo. GPT-2 124M would take minutes per iteration.
CPU_DEFAULTS = dict(n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12)


@dataclass(frozen=True)
class BenchConfig(RuntimeConfig, GPTConfig):
    vocab_size: int | None = None  # None: of the corpus, GPT-2's 50304 on a random batch
    batch_size: int = 12  # windows per iteration
    bias: bool = False  # in Linear and LayerNorm
    real_data: bool = True  # load batches of a corpus; False computes on one random batch
    dataset: str = "python_docs"  # the corpus for real_data, a folder under data/
    data_dir: str = ""  # a data folder anywhere; replaces dataset
    warmup_iters: int = 10  # iterations before the measured ones
    max_iters: int = 20  # measured iterations
    profile: bool = False  # print the operations that take the most time, instead of the speed
    decode: bool = False  # measure decoding instead of training
    decode_batches: str = "1,8"  # how many rows at once, each in turn, divided by commas
    prompt_tokens: int = 16  # length of the prompt
    max_new_tokens: int = 200  # tokens behind it
    rounds: int = 3  # how often all is measured in turn
    quantize: Quantize = "none"  # int8: weights of one byte
    transformers: bool = True  # measure transformers' generate too, where it has the architecture

    def __post_init__(self):  # GPTConfig's own checks wait until the defaults for a CPU are in
        for name, least in (("batch_size", 1), ("warmup_iters", 0), ("max_iters", 1), ("prompt_tokens", 1),
                            ("max_new_tokens", 2), ("rounds", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if not all(n.strip().isdecimal() and int(n) for n in self.decode_batches.split(",")):
            raise ValueError(f"decode_batches={self.decode_batches!r}: list numbers with commas, as in 1,8")


def main(argv: list[str] | None = None):
    cfg, given = configurator.load(BenchConfig, argv)
    rt = runtime.start(cfg.device, cfg.dtype)
    if cfg.decode:
        measure_decoding(cfg, rt)
        return
    if rt.device_type == "cpu":
        cfg = replace(cfg, **{**CPU_DEFAULTS, **given})
    corpus = None
    if cfg.real_data:
        folder = find_folder(cfg.dataset, cfg.data_dir)
        prepare_if_missing(folder, rt)
        corpus = Corpus(folder)
    vocab_size = cfg.vocab_size or (corpus.model_vocab_size if corpus else GPTConfig.vocab_size)
    model = random_model(cfg, vocab_size).to(rt.device)
    optimizer = model.configure_optimizers(0.01, 1e-4, (0.9, 0.95), rt.device_type)
    scaler = torch.amp.GradScaler(rt.device_type, enabled=rt.dtype == "float16")
    if corpus:
        corpus.check(cfg.block_size, vocab_size)
    else:
        x = torch.randint(vocab_size, (cfg.batch_size, cfg.block_size), device=rt.device)

    def batch(i: int):
        if not corpus:
            return x, x
        return rt.move(*corpus.train_batch(i * cfg.batch_size, cfg.batch_size, cfg.block_size, cfg.seed, vocab_size))

    def trial(module):
        with rt.autocast():
            loss = module(*batch(0))[1]
        loss.backward()
        model.zero_grad(set_to_none=True)

    called, compiled, why = runtime.compile_model(model, cfg.compile, rt, float("inf"), trial)
    print(f"{rt.why}, compile: {'on' if compiled else 'off'} ({why}), {torch.get_num_threads()} CPU threads")
    print(f"{model.get_num_params() / 1e6:.2f}M parameters, {cfg.n_layer} layers, {cfg.n_head} heads, n_embd "
          f"{cfg.n_embd}, block_size {cfg.block_size}, batch_size {cfg.batch_size}, data: "
          f"{corpus.name if corpus else 'one random batch'}")

    def step(i: int):
        x, y = batch(i)
        with rt.autocast():
            loss = called(x, y)[1]
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        model.lower_last_distance()
        optimizer.zero_grad(set_to_none=True)
        return loss

    for i in range(cfg.warmup_iters):
        step(i)
    rt.synchronize()
    if cfg.profile:
        print_profile(step, cfg, rt)
        return
    if rt.device_type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    began = time.perf_counter()
    for i in range(cfg.warmup_iters, cfg.warmup_iters + cfg.max_iters):
        before = time.perf_counter()
        loss = step(i)
        times.append(time.perf_counter() - before)
    loss = loss.item()  # waits for the device
    seconds = (time.perf_counter() - began) / cfg.max_iters
    if rt.device_type == "cpu":  # on a GPU a step returns before it is done, so that only the mean means something
        seconds = sorted(times)[len(times) // 2]
    tokens_per_s = cfg.batch_size * cfg.block_size / seconds
    line = f"time per iteration: {seconds * 1000:.2f}ms, {tokens_per_s:,.0f} tokens/s"
    peak = peak_flops(torch.cuda.get_device_name()) if rt.device_type == "cuda" and rt.dtype != "float32" else None
    flops = model.flops_per_token() * tokens_per_s
    line += f", {flops / 1e12:.2f} TFLOP/s" + (f", MFU: {flops / peak * 100:.2f}%" if peak else "")
    print(f"{line}, memory: {memory(rt) / 2 ** 20:,.0f} MiB, loss: {loss:.4f}")


def random_model(cfg: BenchConfig, vocab_size: int):
    """A model with the weights that training begins with."""
    seed_everything(cfg.seed)
    settings = {f.name: getattr(cfg, f.name) for f in fields(GPTConfig)}
    return new_model(GPTConfig(**{**settings, "vocab_size": vocab_size}))


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
    model, why = prepare(model, rt, cfg.dtype, cfg.quantize, cfg.compile)
    print(f"{why}, {torch.get_num_threads()} CPU threads\n{n_params / 1e6:.2f}M parameters, prompt of "
          f"{cfg.prompt_tokens} tokens, {cfg.max_new_tokens} new ones, temperature 0.8, top_k 200")
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
            theirs.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=n, min_new_tokens=n,
                            do_sample=True, temperature=0.8, top_k=200, pad_token_id=0)
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
    print(f"memory: {bandwidth / 1e9:.1f} GB/s, weights: {n_bytes / 1e6:.1f} MB per token\n"
          f"{'':<14}{'rows':>4}{'first token':>14}{'tokens/s':>12}{'of bandwidth':>14}")
    for (name, n_rows), times in measured.items():
        first, whole = (median([time[i] for time in times]) for i in (0, 1))
        result = {"program": name, "rows": n_rows, "first_token_ms": first * 1000,
                  "tokens_per_s": n_rows * cfg.max_new_tokens / whole}
        if name == "donGPT":
            step = median([(whole - first) / (cfg.max_new_tokens - 1) for first, whole in times])
            result |= {"ms_per_step": step * 1000, "bandwidth_share": n_bytes / step / bandwidth}
        results.append(result)
        share = f"{result['bandwidth_share']:>13.0%}" if "bandwidth_share" in result else ""
        print(f"{name:<14}{n_rows:>4}{first * 1000:>11.0f} ms{result['tokens_per_s']:>12,.1f} {share}")
    print(json.dumps({"decode": results, "bandwidth_gb_s": bandwidth / 1e9, "weight_mb": n_bytes / 1e6,
                      "parameters": n_params, "prompt_tokens": cfg.prompt_tokens, "new_tokens": cfg.max_new_tokens,
                      "rounds": cfg.rounds, "device": rt.device, "setup": why, "threads": torch.get_num_threads(),
                      "torch": torch.__version__}))


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def bytes_per_token(model) -> int:
    """Bytes of weights that one step of decoding reads: matrices and biases, of the embeddings only a row."""
    tensors = {id(t): t for m in model.modules() if not isinstance(m, torch.nn.Embedding)
               for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))}  # a tied embedding is in the head
    return sum(t.nbytes for t in tensors.values())


def memory_bandwidth(rt: runtime.Runtime) -> float:
    """Bytes per second at which the device reads a large tensor, the best of a few passes."""
    block = torch.ones(2 ** 27 if rt.device_type == "cpu" else 2 ** 29, device=rt.device)
    times = []
    for _ in range(5):
        rt.synchronize()
        began = time.perf_counter()
        block.sum()
        rt.synchronize()
        times.append(time.perf_counter() - began)
    return block.nbytes / min(times)


def transformers_model(model, cfg: BenchConfig, rt: runtime.Runtime):
    """The model as transformers has it: in float32 on a CPU, in the same dtype elsewhere; None where it has no such."""
    try:
        from transformers import GPT2LMHeadModel

        from dongpt import hugging_face
        with tempfile.TemporaryDirectory() as folder:
            hugging_face.save(model, None, folder)
            theirs = GPT2LMHeadModel.from_pretrained(folder)
    except (ImportError, ValueError) as error:
        print(f"transformers is not measured: {runtime.first_line(error)}")
        return None
    dtype = "float32" if rt.device_type == "cpu" else rt.dtype
    return theirs.to(device=rt.device, dtype=runtime.DTYPES[dtype]).eval()


def memory(rt: runtime.Runtime) -> int:
    """Bytes taken at most: of the GPU's memory, else of the process."""
    if rt.device_type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def print_profile(step, cfg: BenchConfig, rt: runtime.Runtime):
    """Print a table of the operations of a few steps, the slowest first."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if rt.device_type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for i in range(cfg.max_iters):
            step(i)
        rt.synchronize()
    order = "self_cuda_time_total" if rt.device_type == "cuda" else "self_cpu_time_total"
    print(profile.key_averages().table(sort_by=order, row_limit=20))


if __name__ == "__main__":
    run_program(main)
