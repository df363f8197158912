"""Speed and memory of a training step: ms/iter, tokens/s and, on GPUs whose peak is known, MFU.

    python bench.py                                    # on a GPU GPT-2 124M, on a CPU the small model of the README
    python bench.py --real_data=False --compile=True
    python bench.py --n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --batch_size=64 --profile
"""
import sys
import time
from dataclasses import dataclass, fields, replace

import torch

import configurator
from dongpt import runtime
from dongpt.corpus import Corpus, find_folder, prepare_if_missing
from dongpt.metrics import peak_flops
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

    def __post_init__(self):  # GPTConfig's own checks wait until the defaults for a CPU are in
        for name, least in (("batch_size", 1), ("warmup_iters", 0), ("max_iters", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")


def main(argv: list[str] | None = None):
    cfg, given = configurator.load(BenchConfig, argv)
    rt = runtime.start(cfg.device, cfg.dtype)
    if rt.device_type == "cpu":
        cfg = replace(cfg, **{**CPU_DEFAULTS, **given})
    corpus = None
    if cfg.real_data:
        folder = find_folder(cfg.dataset, cfg.data_dir)
        prepare_if_missing(folder, rt)
        corpus = Corpus(folder)
    vocab_size = cfg.vocab_size or (corpus.model_vocab_size if corpus else GPTConfig.vocab_size)
    seed_everything(cfg.seed)
    settings = {f.name: getattr(cfg, f.name) for f in fields(GPTConfig)}
    model = new_model(GPTConfig(**{**settings, "vocab_size": vocab_size})).to(rt.device)
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
    runtime.run_program(main)
