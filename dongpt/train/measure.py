"""Measure the cost of training updates: time, FLOPs, memory, and time spent on each kind of operation.

    bench = StepBenchmark(step)             # a TrainStep
    bench.compile("auto")
    for _ in range(3):
        bench.round(10)                     # times ten updates
    bench.result()                          # {"ms": 51.2, "tokens_per_s": 15000.0, ...}

FLOPs are calculated by GPT.flops_per_token() in model.py, not measured.
"""

import os
import platform
import sys
import time
from itertools import accumulate
from statistics import median
from typing import Any, Callable

import torch
from torch.autograd import DeviceType

from dongpt.log import peak_flops, replace_nonfinite
from dongpt.runtime import DTYPES, Runtime
from dongpt.train.step import TrainStep

MIB = 2**20
PROFILED_UPDATES = 3
# Substrings of kernel and operation names. Attention is matched first because its kernels' names can contain CUTLASS.
ATTENTION_OPS = ("flash", "fmha", "attention", "sdpa")
MATMUL_OPS = ["gemm", "cutlass", "xmma", "nvjet", "sm90_", "sm100_", "triton_tem", "mkldnn_linear", "mkldnn::_linear"]
MATMUL_OPS += ["aten::mm", "aten::addmm", "aten::_addmm", "aten::bmm", "aten::baddbmm", "_mkl_linear"]


class StepBenchmark:
    """Benchmark of a TrainStep: seconds per update and FLOP/s of a plain matmul for each round."""

    def __init__(self, step: TrainStep):
        self.step, self.rt = step, step.rt
        self.n_updates, self.compiled = 0, False
        self.loss: torch.Tensor | None = None
        self.compile_s: float | None = None
        self.seconds: list[float] = []
        self.matmul_flops: list[float] = []
        self.peak_bytes = self.memory_growth = 0  # bytes
        has_known_peak = self.rt.device_type == "cuda" and self.rt.dtype != "float32"
        self.gpu_peak_flops = peak_flops(torch.cuda.get_device_name(self.rt.device)) if has_known_peak else None

    def compile(self, setting) -> str:
        """Compile the model according to `setting`, as for a long run; return the reason for the choice.

        compile_s includes the first update, since part of the compilation happens there.
        """
        start = time.perf_counter()
        self.compiled, reason = self.step.compile(setting, float("inf"))
        if self.compiled:
            self.update()
            self.rt.synchronize()
            self.compile_s = time.perf_counter() - start
        return reason

    def update(self):
        """Start one update of the weights."""
        self.loss = self.step(self.step.cfg.learning_rate, self.n_updates, self.n_updates * self.step.samples_per_iter)
        self.n_updates += 1

    def round(self, iters: int):
        """Time `iters` updates, and a matmul of the MLP's shape if the GPU's peak is unknown."""
        rt, cfg = self.rt, self.step.cfg
        rt.barrier()
        bytes_before = bytes_in_use(rt)
        if rt.device_type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.seconds.append(timed(lambda: [self.update() for _ in range(iters)], rt) / iters)
        if rt.device_type == "cuda":
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated() - bytes_before)
        if len(self.seconds) > 1:
            self.memory_growth += bytes_in_use(rt) - bytes_before
        if self.gpu_peak_flops is None:
            n_rows = min(cfg.batch_size * cfg.block_size, 8192)
            self.matmul_flops.append(matmul_flops(rt, n_rows, cfg.n_embd, 4 * cfg.n_embd))

    def result(self) -> dict:
        """Return all measurements as a JSON-ready dict. This profiles a few more updates and sets self.profile."""
        rt, step, seconds = self.rt, self.step, median(self.seconds)
        assert self.loss is not None, "call round() before result()"
        loss = rt.all_reduce_sum(self.loss.item())[0] / rt.world_size
        self.loss = None  # the profiler warns if a tensor created before it is freed during it
        self.profile = profile_calls(self.update, PROFILED_UPDATES, rt)
        tokens_per_s = step.tokens_per_iter / seconds  # over all processes, like flops
        flops = step.model.flops_per_token() * tokens_per_s
        matmul = median(self.matmul_flops) if self.matmul_flops else None
        result: dict[str, Any] = dict(device=rt.device, device_name=device_name(rt), dtype=rt.dtype)
        result |= dict(compile=self.compiled, compile_s=self.compile_s, threads=torch.get_num_threads())
        result |= dict(world_size=rt.world_size, torch=str(torch.__version__), data=step.corpus.name)
        result |= dict(parameters=step.model.get_num_params(), tokens_per_update=step.tokens_per_iter)
        result |= dict(ms=seconds * 1000, tokens_per_s=tokens_per_s, rounds_ms=[s * 1000 for s in self.seconds])
        result |= dict(flops=flops, mfu=flops / rt.world_size / self.gpu_peak_flops if self.gpu_peak_flops else None)
        result |= dict(matmul_flops=matmul, of_matmul=flops / rt.world_size / matmul if matmul else None)
        result |= dict(memory_mib=self._peak_tensor_bytes() / MIB, process_mib=process_peak_bytes() / MIB)
        result |= dict(memory_growth_mib=self.memory_growth / MIB if len(self.seconds) > 1 else None)
        result |= dict(shares=time_shares(seconds_by_kind(self.profile, rt), PROFILED_UPDATES * seconds, rt), loss=loss)
        return replace_nonfinite(result)

    def _peak_tensor_bytes(self) -> int:
        """Return the peak bytes used by tensors during an update, or, on MPS, the bytes that Metal has reserved."""
        if self.rt.device_type == "mps":
            return torch.mps.driver_allocated_memory()
        model, states = self.step.model, self.step.optimizer.state.values()
        arrays = [*model.parameters(), *model.buffers(), *(v for s in states for v in s.values() if torch.is_tensor(v))]
        if self.rt.world_size > 1:  # DistributedDataParallel keeps buckets for all gradients
            arrays += model.parameters()
        peak_bytes = self.peak_bytes if self.rt.device_type == "cuda" else peak_tensor_bytes(self.profile)
        return sum(tensor.nbytes for tensor in arrays) + peak_bytes


def device_name(rt: Runtime) -> str:
    """Return the name of the GPU or CPU."""
    if rt.device_type == "cuda":
        return torch.cuda.get_device_name(rt.device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or the file has no model name
        return platform.processor() or platform.machine()


def bytes_in_use(rt: Runtime) -> int:
    """Return the bytes currently in use: by tensors on a GPU, by the whole process on a CPU."""
    if rt.device_type == "cpu":
        import psutil

        return psutil.Process().memory_info().rss
    return torch.cuda.memory_allocated() if rt.device_type == "cuda" else torch.mps.current_allocated_memory()


def process_peak_bytes() -> int:
    """Return the peak memory of this process in bytes."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_tensor_bytes(profile: torch.profiler.profile) -> int:
    """Return the peak growth of tensor memory, in bytes, during a CPU profile."""
    profiler: Any = profile.profiler
    changes = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in changes), initial=0))  # nbytes is negative when memory is freed


def bytes_per_token(model: torch.nn.Module) -> int:
    """Return the bytes of weights read per decoding step, excluding embeddings because only a few rows are read."""
    modules = [m for m in model.modules() if not isinstance(m, torch.nn.Embedding)]
    tensors = [t for m in modules for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))]
    return sum({id(t): t.nbytes for t in tensors}.values())  # a tied embedding counts as the head


def profile_calls(function: Callable[[], object], times: int, rt: Runtime) -> torch.profiler.profile:
    """Call function `times` times under torch.profiler and return the profile."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # otherwise the profiler logs to stderr
    gpu = [torch.profiler.ProfilerActivity.CUDA] if rt.device_type == "cuda" else []
    activities = [torch.profiler.ProfilerActivity.CPU, *gpu]
    with torch.profiler.profile(activities=activities, profile_memory=rt.device_type == "cpu") as profile:
        for _ in range(times):
            with torch.profiler.record_function("between operations"):
                function()
        rt.synchronize()
    return profile


def seconds_by_kind(profile: torch.profiler.profile, rt: Runtime) -> dict[str, float] | None:
    """Return the seconds spent on "matmul", "attention" and "other", in GPU kernels or CPU operations. Return None on
    MPS, which the profiler does not support."""
    seconds = {"matmul": 0.0, "attention": 0.0, "other": 0.0}
    for event in profile.key_averages():
        if rt.device_type == "cpu" and event.device_type == DeviceType.CPU:
            seconds[operation_kind(event.key)] += event.self_cpu_time_total / 1e6
        elif rt.device_type != "cpu" and event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            seconds[operation_kind(event.key)] += event.self_device_time_total / 1e6
    return seconds if any(seconds.values()) else None


def time_shares(kind_seconds: dict[str, float] | None, seconds: float, rt: Runtime) -> dict[str, float] | None:
    """Return the fraction of time spent on each kind of operation; the rest is "other".

    `seconds` is how long the same work takes without the profiler. On a GPU, fractions are relative to `seconds`, which
    includes idle time. On a CPU, fractions are relative to the total because the profiler slows down operations.
    """
    if kind_seconds is None:
        return None
    total = sum(kind_seconds.values()) if rt.device_type == "cpu" else max(sum(kind_seconds.values()), seconds)
    matmul, attention = kind_seconds["matmul"] / total, kind_seconds["attention"] / total
    return {"matmul": matmul, "attention": attention, "other": 1 - matmul - attention}


def operation_kind(name: str) -> str:
    """Return the kind of a GPU kernel or CPU operation: "matmul", "attention" or "other"."""
    name = name.lower()
    is_fused = name.startswith("triton_") and not name.startswith("triton_tem")  # named after the fused operations
    if not is_fused and any(part in name for part in ATTENTION_OPS):
        return "attention"
    return "matmul" if not is_fused and any(part in name for part in MATMUL_OPS) else "other"


def timed(function: Callable[[], object], rt: Runtime) -> float:
    """Return the seconds that a call takes, including all work that it starts on the device."""
    rt.synchronize()
    start = time.perf_counter()
    function()
    rt.synchronize()
    return time.perf_counter() - start


def best_seconds(function: Callable[[], object], rt: Runtime, seconds: float) -> float:
    """Call function repeatedly for `seconds` (at least once) and return the shortest time."""
    end, best = time.perf_counter() + seconds, timed(function, rt)
    while time.perf_counter() < end:
        best = min(best, timed(function, rt))
    return best


def matmul_flops(rt: Runtime, n_rows: int, n_in: int, n_out: int, seconds: float = 0.1) -> float:
    """Return the best FLOP/s when multiplying (n_rows, n_in) by a linear layer's weight (n_out, n_in) in rt's dtype."""
    shapes = (n_rows, n_in), (n_out, n_in), (n_rows, n_out)
    x, weight, product = (torch.randn(shape, device=rt.device, dtype=DTYPES[rt.dtype]) for shape in shapes)
    return 2 * n_rows * n_in * n_out / best_seconds(lambda: torch.mm(x, weight.T, out=product), rt, seconds)


def memory_bandwidth(rt: Runtime) -> float:
    """Return the best rate, in bytes per second, at which the device reads a large tensor."""
    tensor = torch.ones(2**27 if rt.device_type == "cpu" else 2**29, device=rt.device)
    return tensor.nbytes / best_seconds(tensor.sum, rt, 0.25)
