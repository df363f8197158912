"""What the updates of a training cost: time, FLOPs, memory, and the kinds of operations that take the time; and what
the machine could reach.

    run = Measured(updates)                 # of dongpt/train/step.py
    run.compile("auto")
    for _ in range(3):
        run.round(10)                       # times ten updates
    run.result()                            # {"ms": 51.2, "tokens_per_s": 15000.0, ...}

FLOPs are counted, not measured: GPT.flops_per_token in model.py.
"""

import os
import platform
import sys
import time
from statistics import median
from typing import Callable

import torch
from torch.autograd import DeviceType

from dongpt.log import finite, peak_flops
from dongpt.runtime import DTYPES, Runtime
from dongpt.train.step import TrainStep

MIB = 2**20
PROFILED = 3  # updates under the profiler, which slows them
MATMULS = {
    "aten::mm",
    "aten::addmm",
    "aten::_addmm_activation",
    "aten::bmm",
    "aten::baddbmm",
    "aten::mkldnn_linear",
    "mkl::_mkl_linear",
    "mkldnn::_linear_pointwise",
}  # operations on a CPU that multiply matrices themselves
# Parts of the names that the kernels of cuBLAS, cuDNN, CUTLASS and PyTorch have on a GPU. Attention's come first: they
# are built of CUTLASS's pieces, and named after them too.
ATTENTION = ("flash", "fmha", "attention", "sdpa")
GEMM = ("gemm", "cutlass", "xmma", "nvjet", "sm90_", "sm100_")


class Measured:
    """Updates under measurement, and what their rounds took: seconds per update and FLOP/s of a plain product of
    matrices, a number for each round."""

    def __init__(self, updates: TrainStep):
        self.updates, self.rt = updates, updates.rt
        self.n_updates, self.loss, self.compiled, self.compile_s = 0, None, False, None
        self.seconds: list[float] = []
        self.matmul_flops: list[float] = []
        self.peak = self.growth = 0  # bytes
        on_gpu = self.rt.device_type == "cuda" and self.rt.dtype != "float32"
        self.maker_flops = peak_flops(torch.cuda.get_device_name(self.rt.device)) if on_gpu else None

    def compile(self, asked) -> str:
        """Compile the model where asked says so, as for a long run; returns why or why not.

        compile_s are the seconds until the first update is done, since some of the work may wait for that.
        """
        began = time.perf_counter()
        self.compiled, why = self.updates.compile(asked, float("inf"))
        if self.compiled:
            self.update()
            self.rt.synchronize()
            self.compile_s = time.perf_counter() - began
        return why

    def update(self):
        """One update of the weights, which is not waited for."""
        first_window = self.n_updates * self.updates.samples
        self.loss = self.updates(self.updates.cfg.learning_rate, self.n_updates, first_window)
        self.n_updates += 1

    def round(self, iters: int):
        """Time so many updates; where the device's peak is not known, a product of the shape of the MLP's too."""
        rt, cfg = self.rt, self.updates.cfg
        rt.barrier()
        rt.synchronize()
        before = bytes_in_use(rt)
        if rt.device_type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        for _ in range(iters):
            self.update()
        rt.synchronize()
        self.seconds.append((time.perf_counter() - began) / iters)
        if rt.device_type == "cuda":
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() - before)
        if len(self.seconds) > 1 and before is not None:
            self.growth += bytes_in_use(rt) - before
        if self.maker_flops is None:
            self.matmul_flops.append(
                matmul_flops(rt, min(cfg.batch_size * cfg.block_size, 8192), cfg.n_embd, 4 * cfg.n_embd)
            )

    def result(self) -> dict:
        """All that was measured, for JSON; makes a few updates more under the profiler and keeps self.profile."""
        rt, updates = self.rt, self.updates
        loss, self.loss = rt.sum(self.loss.item())[0] / rt.world_size, None
        self.profile = profiled(self.update, PROFILED, rt)
        seconds = median(self.seconds)
        tokens_per_s = updates.tokens / seconds  # of all processes, as flops
        flops = updates.model.flops_per_token() * tokens_per_s
        matmul = median(self.matmul_flops) if self.matmul_flops else None
        peak = process_peak()
        return finite(
            dict(
                device=rt.device,
                device_name=device_name(rt),
                dtype=rt.dtype,
                compile=self.compiled,
                compile_s=self.compile_s,
                threads=torch.get_num_threads(),
                world_size=rt.world_size,
                torch=str(torch.__version__),
                data=updates.corpus.name,
                parameters=updates.model.get_num_params(),
                tokens_per_update=updates.tokens,
                ms=seconds * 1000,
                tokens_per_s=tokens_per_s,
                rounds_ms=[each * 1000 for each in self.seconds],
                flops=flops,
                mfu=flops / rt.world_size / self.maker_flops if self.maker_flops else None,
                matmul_flops=matmul,
                of_matmul=flops / rt.world_size / matmul if matmul else None,
                memory_mib=self._memory() / MIB,
                process_mib=peak / MIB if peak else None,
                memory_growth_mib=self.growth / MIB if len(self.seconds) > 1 else None,
                shares=shares(seconds_by_kind(self.profile, rt), PROFILED * seconds, rt),
                loss=loss,
            )
        )

    def _memory(self) -> int:
        """Bytes that tensors take at most in an update; on MPS what Metal has set aside for the process."""
        updates = self.updates
        if self.rt.device_type == "mps":
            return torch.mps.driver_allocated_memory()
        held = bytes_of_training(updates.model, updates.optimizer)
        if self.rt.world_size > 1:  # DistributedDataParallel keeps room for all gradients
            held += sum(p.nbytes for p in updates.model.parameters())
        return held + (self.peak if self.rt.device_type == "cuda" else peak_of_tensors(self.profile))


def device_name(rt: Runtime) -> str:
    """The name of the GPU or the processor, as it calls itself."""
    if rt.device_type == "cuda":
        return torch.cuda.get_device_name(rt.device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or a processor that is not named there
        return platform.processor() or platform.machine()


# ----------------------------------------------------------------------------------------------------------------------
# memory


def bytes_in_use(rt: Runtime) -> int | None:
    """Bytes that are taken now: of a GPU by tensors, else by the process; None where that cannot be read."""
    if rt.device_type == "cuda":
        return torch.cuda.memory_allocated(rt.device)
    if rt.device_type == "mps":
        return torch.mps.current_allocated_memory()
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux
        return None


def process_peak() -> int | None:
    """Bytes of memory that the process took at most since it began, None where that cannot be read."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def bytes_of_training(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of what stays between two updates: weights, buffers and the optimizer's state."""
    state = [tensor for values in optimizer.state.values() for tensor in values.values() if torch.is_tensor(tensor)]
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), *state))


# ----------------------------------------------------------------------------------------------------------------------
# time


def profiled(work: Callable[[], object], times: int, rt: Runtime) -> torch.profiler.profile:
    """torch's profile of work, done so many times."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it reports its own start and end on stderr
    activities = [torch.profiler.ProfilerActivity.CPU]
    if rt.device_type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, profile_memory=rt.device_type == "cpu") as profile:
        for _ in range(times):
            with torch.profiler.record_function("all between the operations"):
                work()
        rt.synchronize()
    return profile


def seconds_by_kind(profile: torch.profiler.profile, rt: Runtime) -> dict[str, float] | None:
    """Seconds in "matmul", "attention" and "other": of a GPU's kernels, on a CPU of all that was done; None where the
    profiler sees nothing of the device, as on MPS."""
    seconds, on_gpu = {"matmul": 0.0, "attention": 0.0, "other": 0.0}, rt.device_type != "cpu"
    for event in profile.key_averages():
        if on_gpu and event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            seconds[kind_of_kernel(event.key)] += event.self_device_time_total / 1e6
        elif not on_gpu and event.device_type == DeviceType.CPU:
            seconds[kind_of_operation(event.key)] += event.self_cpu_time_total / 1e6
    return seconds if any(seconds.values()) else None


def shares(spent: dict[str, float] | None, seconds: float, rt: Runtime) -> dict[str, float] | None:
    """The shares that seconds_by_kind are of the time of the same work; what is left over is "other".

    seconds is what the work takes without the profiler. A GPU's kernels are shares of that: when none runs, it waits
    for the CPU. On a CPU the profiler slows the operations themselves, and the time is theirs in all.
    """
    if spent is None:
        return None
    whole = sum(spent.values())
    if rt.device_type != "cpu":
        whole = max(whole, seconds)
    matmul, attention = spent["matmul"] / whole, spent["attention"] / whole
    return {"matmul": matmul, "attention": attention, "other": 1 - matmul - attention}


def kind_of_operation(name: str) -> str:
    """What one of PyTorch's operations does: "matmul", "attention" or "other"."""
    if "scaled_dot_product" in name or "flash_attention" in name:
        return "attention"
    return "matmul" if name in MATMULS else "other"


def kind_of_kernel(name: str) -> str:
    """What a kernel of a GPU does: "matmul", "attention" or "other"."""
    name = name.lower()
    if name.startswith("triton_"):  # of torch.compile, named after what was fused: tem is the template of a product
        return "matmul" if name.startswith("triton_tem") else "other"
    if any(part in name for part in ATTENTION):
        return "attention"
    return "matmul" if any(part in name for part in GEMM) else "other"


def peak_of_tensors(profile: torch.profiler.profile) -> int:
    """Bytes by which the memory of tensors rose at most above where it was when a profile on a CPU began."""
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = highest = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        total += event.nbytes()  # below 0 where memory is given back
        highest = max(highest, total)
    return highest


def matmul_flops(rt: Runtime, n_rows: int, n_in: int, n_out: int, seconds: float = 0.1) -> float:
    """FLOP/s at which a layer's weights (n_out, n_in) multiply (n_rows, n_in), in the runtime's dtype; the best that
    is seen within some seconds."""
    x, weight, product = (
        torch.randn(shape, device=rt.device, dtype=DTYPES[rt.dtype])
        for shape in ((n_rows, n_in), (n_out, n_in), (n_rows, n_out))
    )
    best, began = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - began < seconds:
        rt.synchronize()
        before = time.perf_counter()
        torch.mm(x, weight.T, out=product)
        rt.synchronize()
        best = min(best, time.perf_counter() - before)
    return 2 * n_rows * n_in * n_out / best


def memory_bandwidth(rt: Runtime) -> float:
    """Bytes per second at which the device reads a large tensor, the best of a few passes."""
    block = torch.ones(2**27 if rt.device_type == "cpu" else 2**29, device=rt.device)
    times = []
    for _ in range(5):
        rt.synchronize()
        began = time.perf_counter()
        block.sum()
        rt.synchronize()
        times.append(time.perf_counter() - began)
    return block.nbytes / min(times)


def bytes_per_token(model) -> int:
    """Bytes of weights that one step of decoding reads: matrices and biases, of the embeddings only a row."""
    tensors = {
        id(t): t
        for m in model.modules()
        if not isinstance(m, torch.nn.Embedding)
        for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))
    }  # a tied embedding is in the head
    return sum(t.nbytes for t in tensors.values())
