"""Runtime setup: device, dtype, threads, seeds, interrupts and multiple processes.

Choices follow fixed rules instead of timing measurements, and programs print each choice and its reason.
Import this module before torch: it sets an environment variable that torch's OpenMP library reads when it is loaded.
"""

import math
import os
import signal
import subprocess
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Annotated, Any, Callable, Collection, Literal

SPIN_COUNT = 10_000  # number of iterations that an idle OpenMP thread spins before it sleeps


def limit_spinning():
    """Make idle OpenMP threads sleep sooner, unless the user's environment sets a wait policy.

    By default, idle threads spin for several milliseconds. On a busy machine, they may occupy the core that the thread
    they are waiting for needs, and a training step takes ten times as long. GNU OpenMP, which torch uses on Linux,
    reads GOMP_SPINCOUNT once, when torch is imported.
    """
    if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


limit_spinning()

# ruff: noqa: E402  (the imports below must come after the call above)
import numpy as np
import torch
import torch.distributed as dist

import configurator
from configurator import UserError
from dongpt.program import first_line

ROOT = configurator.ROOT
STOP_CHECK_SECONDS, STOP_CHECK_CALLS = 0.25, 50  # longest interval between two agreements on whether to stop
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class DeviceConfig:
    """Device and precision."""

    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps; auto prefers CUDA, then MPS, then the CPU
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # dtype of matmuls; weights are kept in float32


@dataclass(frozen=True)
class RuntimeConfig(DeviceConfig):
    """Machine settings shared by most programs."""

    compile: Literal["auto", True, False] = "auto"  # use torch.compile; auto: on CUDA, if the run is long enough
    seed: int = 1337  # random seed; the same seed gives the same result


# ----------------------------------------------------------------------------------------------------------------------
# device and dtype


def pick_device(device: str) -> tuple[str, str]:
    """Return the device to use and the reason. Under torchrun, each process uses the GPU of its local rank.

    Raises UserError if the requested device is not available.
    """
    local_rank, single_rank = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)) == 1
    has_mps = torch.backends.mps.is_available()
    if device == "auto":
        if not (cuda_error := cuda_problem(local_rank)):
            return f"cuda:{local_rank}", torch.cuda.get_device_name(local_rank)
        return ("mps", "Apple GPU") if single_rank and has_mps else ("cpu", cuda_error)
    try:
        device_type, gpu_index = torch.device(device).type, torch.device(device).index
    except RuntimeError:
        device_type, gpu_index = "", None
    if device_type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device={device!r} is unknown: use auto, cpu, cuda, cuda:N or mps")
    if device_type == "cuda":
        gpu_index = local_rank if gpu_index is None or not single_rank else gpu_index
        if cuda_error := cuda_problem(gpu_index):
            raise UserError(f"device={device!r} is not available: {cuda_error}; use device=cpu or device=auto")
        return f"cuda:{gpu_index}", torch.cuda.get_device_name(gpu_index)
    if device_type == "mps" and not has_mps:
        raise UserError("device='mps' is not available: torch cannot find an Apple GPU; use device=cpu or device=auto")
    if device_type == "mps" and not single_rank:
        raise UserError("several processes cannot share an Apple GPU: use device=cpu, or start one process")
    return device_type, "requested"


def cuda_problem(gpu_index: int) -> str:
    """Return why CUDA cannot be used (no GPU, or an NVIDIA GPU that this torch cannot use), or '' if it works."""
    remedy = "install another build of torch, as described on pytorch.org/get-started"
    if torch.cuda.is_available():
        if gpu_index >= torch.cuda.device_count():
            return f"this machine has {torch.cuda.device_count()} GPU(s), so GPU {gpu_index} does not exist"
        gpu_name = torch.cuda.get_device_name(gpu_index)
        try:
            torch.zeros(1, device=f"cuda:{gpu_index}").add_(1)
            return ""
        except RuntimeError as error:
            if "no kernel image" in str(error):
                return f"found {gpu_name}, but torch {torch.__version__} has no kernels for it: {remedy}"
            return f"found {gpu_name}, but it cannot be used at the moment ({first_line(error)})"
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]  # the driver's own tool
    try:
        gpu_names = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        gpu_names = ""
    if not gpu_names:
        return "no GPU found"
    message = f"found {gpu_names.splitlines()[0]}, but torch {torch.__version__}"
    if torch.version.cuda is None:
        return f"{message} was built without CUDA: {remedy.replace('another', 'a CUDA')}"
    return (
        f"{message}, built for CUDA {torch.version.cuda}, cannot use it: "
        f"update the NVIDIA driver, or install a build of torch for an older CUDA version"
    )


# Smallest n_embd for which bfloat16 training is faster on a CPU with AMX. On two such cores, a step of nanoGPT's baby
# GPT (n_embd=384) took 2.2 s instead of 9.8 s. In smaller models, the casts cost more than they save.
AMX_MIN_CHANNELS = 256


def pick_dtype(dtype: str, device_type: str, n_embd: int = 0) -> tuple[str, str]:
    """Return the dtype to use and the reason. Pass the model's n_embd, or 0 if accuracy matters more than speed.

    Raises UserError if the device does not support the requested dtype.
    """
    if device_type == "mps":
        if dtype not in ("auto", "float32"):
            raise UserError(f"dtype={dtype!r} gives wrong results on MPS: use dtype=float32 or dtype=auto")
        return "float32", "the only reliable dtype on MPS"
    has_bf16 = device_type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "bfloat16" and not has_bf16:
        raise UserError("dtype='bfloat16' is not supported by this GPU: use dtype=float16, float32 or auto")
    if dtype != "auto":
        return dtype, "requested"
    if device_type == "cpu":
        if n_embd >= AMX_MIN_CHANNELS and has_amx():
            return "bfloat16", "this processor has AMX"
        return "float32", "exact, and the default on a CPU"
    return ("bfloat16", "this GPU supports it") if has_bf16 else ("float16", "this GPU does not support bfloat16")


def has_amx() -> bool:
    """Return True if the processor supports Intel AMX, whose instructions multiply bfloat16 matrices."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


# ----------------------------------------------------------------------------------------------------------------------
# one process or several


@dataclass(frozen=True)
class Runtime:
    """Device, dtype and rank of this process. Without torchrun, there is only rank 0."""

    device: str
    dtype: Any  # a key of DTYPES
    description: str  # device and dtype with their reasons, for the user
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    device_type: Any = field(init=False)  # cpu, cuda or mps
    is_main: bool = field(init=False)  # rank 0 prints and writes
    autocast: AbstractContextManager = field(init=False)  # for forward passes; mixed precision unless dtype is float32

    def __post_init__(self):
        device_type, use_amp = torch.device(self.device).type, self.dtype != "float32"
        object.__setattr__(self, "device_type", device_type)  # needed because the dataclass is frozen
        object.__setattr__(self, "is_main", self.rank == 0)
        autocast = torch.autocast(device_type, DTYPES[self.dtype]) if use_amp else nullcontext()
        object.__setattr__(self, "autocast", autocast)

    def print(self, *args, **kwargs):
        """Print on rank 0 only."""
        if self.is_main:
            print(*args, **kwargs, flush=True)

    def move(self, *tensors) -> list[torch.Tensor]:
        """Copy tensors to the device. CUDA copies use pinned memory, so that they overlap with computation."""
        if self.device_type != "cuda":  # elsewhere non_blocking may read freed memory: pytorch issue 189690
            return [tensor.to(self.device) for tensor in tensors]
        return [t if t.is_cuda else t.pin_memory().to(self.device, non_blocking=True) for t in tensors]

    def item_async(self, tensor) -> Callable[[], float]:
        """Copy a scalar to the host asynchronously. Return a function that waits for the copy and averages over ranks.

        The function does not wait for work that is queued on the GPU in the meantime.
        """
        is_cuda = self.device_type == "cuda"
        host_value = tensor.to("cpu", non_blocking=is_cuda, copy=True)
        copy_event = torch.cuda.current_stream().record_event() if is_cuda else None

        def wait_for_value() -> float:
            if copy_event:
                copy_event.synchronize()
            return self.all_reduce_sum(host_value.item())[0] / self.world_size

        return wait_for_value

    def all_reduce_sum(self, *values: float) -> list[float]:
        """Return the sum of each value over all processes, in float64. Uses gloo, if available, to avoid a GPU sync."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device="cpu" if dist.is_gloo_available() else self.device)
        dist.all_reduce(total)
        return total.tolist()

    def broadcast(self, tensors):
        """Copy rank 0's values into the tensors of every process, in place."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def barrier(self):
        """Wait until every process has called this method."""
        self.all_reduce_sum(0)

    def run_on_main(self, function: Callable[[], Any]):
        """Call function on rank 0 only. All ranks wait for it, and all raise UserError if it does."""
        user_error = None
        if self.is_main:
            try:
                function()
            except UserError as error:
                user_error = error
        if self.all_reduce_sum(user_error is not None)[0]:
            raise user_error or UserError("rank 0 failed")  # printed by rank 0 only, see run_program

    def synchronize(self):
        """Wait until the device has finished all queued work, so that timings are correct."""
        if self.device_type != "cpu":
            torch.accelerator.synchronize()


def print0(*args, **kwargs):
    """Print on rank 0 only, even before torch.distributed is initialized."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*args, **kwargs, flush=True)


def start(
    device: str = "auto",
    dtype: str = "auto",
    backend: str = "auto",
    n_embd: int = 0,
    asked: Collection[str] = ("device", "dtype"),
) -> Runtime:
    """Choose device and dtype (see pick_dtype for n_embd), and connect the processes if torchrun started several.

    asked contains "device" and "dtype" if the user set them. Otherwise, explicit values are reported as coming from the
    checkpoint. Raises UserError for a device, dtype or backend that does not work on this machine.
    """
    defaults = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1)
    rank, local_rank, world_size = (int(os.environ.get(key, default)) for key, default in defaults.items())
    device, device_reason = pick_device(device)
    device_type = torch.device(device).type
    if device_type == "cuda":
        torch.cuda.set_device(device)
    dtype, dtype_reason = pick_dtype(dtype, device_type, n_embd)
    if backend not in ("auto", "nccl", "gloo"):
        raise UserError(f"backend={backend!r} is unknown: use auto, nccl or gloo")
    if world_size > 1:
        if backend == "nccl" and device_type != "cuda":
            raise UserError(f"backend='nccl' needs CUDA, but the device is {device}: use backend=auto or gloo")
        uses_nccl = device_type == "cuda" and backend != "gloo"
        backends = "cpu:gloo,cuda:nccl" if dist.is_gloo_available() else "nccl"  # gloo does all_reduce_sum()
        dist.init_process_group(backends if uses_nccl else "gloo")
    if device_reason == "requested" and "device" not in asked:
        device_reason = "from the checkpoint"
    if dtype_reason == "requested" and "dtype" not in asked:
        dtype_reason = "from the checkpoint"
    description = f"device: {device} ({device_reason}), dtype: {dtype} ({dtype_reason})"
    return Runtime(device, dtype, description, rank, local_rank, world_size)


def seed_everything(*numbers: int):
    """Seed torch's generators with a hash of the numbers, for example (seed, step, micro-batch index)."""
    hashed_seed = 0
    for number in numbers:  # SplitMix64's finalizer after each, so that the streams of adjacent numbers are unrelated
        hashed_seed = (hashed_seed + number + 0x9E3779B97F4A7C15) % 2**64
        hashed_seed = ((hashed_seed ^ (hashed_seed >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        hashed_seed = ((hashed_seed ^ (hashed_seed >> 27)) * 0x94D049BB133111EB) % 2**64
        hashed_seed ^= hashed_seed >> 31
    torch.manual_seed(hashed_seed)


def choose_threads(threads: int | None, stored_threads: int | None) -> str:
    """Set the number of CPU threads from the setting `threads`, OMP_NUM_THREADS or a checkpoint, in this order.

    Returns a note that names the user's setting, or '' if the user did not set the number.
    """
    if threads:
        torch.set_num_threads(threads)
        return f"set by --threads={threads}"
    variable = os.environ.get("OMP_NUM_THREADS", "")
    if variable and not (variable == "1" and int(os.environ.get("WORLD_SIZE", 1)) > 1):  # torchrun itself sets 1
        return f"set by OMP_NUM_THREADS={variable}"  # torch has already read it
    if stored_threads:
        set_num_threads(stored_threads)
    return ""


def load_average() -> float | None:
    """Return the 1-minute load average, or None on Windows, where it is not available."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def set_num_threads(n_threads: int):
    """Use n_threads CPU threads if there are enough cores for all processes on this machine."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if n_threads != torch.get_num_threads() and n_threads * int(os.environ.get("LOCAL_WORLD_SIZE", 1)) <= num_cores:
        torch.set_num_threads(n_threads)


@dataclass(kw_only=True)
class MachineInfo:
    """All factors besides settings, data and seed that affect rounding, and therefore the results of a run."""

    device: Literal["cpu", "cuda", "mps"]
    dtype: Literal["float32", "bfloat16", "float16"]
    compile: bool
    threads: Annotated[int, ">=", 1] = field(default_factory=torch.get_num_threads)
    world_size: Annotated[int, ">=", 1]
    torch: str = str(torch.__version__)
    numpy: str = np.__version__


# ----------------------------------------------------------------------------------------------------------------------
# stopping


class Interrupts:
    """A context manager that records Ctrl-C and SIGTERM, so that a program can stop cleanly.

    A second Ctrl-C ends the program immediately. exit_code is 0, 130 after Ctrl-C, or 143 after SIGTERM.
    """

    exit_code, signal_time = 0, 0.0  # set by the first signal

    def __enter__(self):
        self.previous_handlers = {n: signal.signal(n, self._on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number, frame):
        if not self.exit_code:
            self.exit_code, self.signal_time = 128 + number, time.monotonic()
        elif int(os.environ.get("WORLD_SIZE", 1)) == 1 or time.monotonic() - self.signal_time > 5:
            os._exit(128 + number)  # torchrun forwards a Ctrl-C that its processes also receive: one press, two signals


@dataclass
class StopCheck:
    """A check that makes all processes stop together, after a signal to any of them or after max_minutes.

        while not stop("updates"): ...

    Call it the same number of times on every rank. A single process decides immediately. Several processes synchronize
    the decision in an all-reduce, at least every STOP_CHECK_SECONDS seconds or STOP_CHECK_CALLS calls. The same
    all-reduce averages the time per call, so that all ranks agree on when the next one is due. exit_code, from the
    Interrupts of any rank, and time_is_up show the reason for stopping.
    """

    rt: Runtime
    interrupts: Interrupts
    max_minutes: float | None = None
    exit_code: int = 0
    time_is_up: bool = False
    start_time: float = field(default_factory=time.monotonic)
    # loop -> calls since the last all-reduce, calls at which the next one is due, time of the last one
    calls_by_loop: dict[str, tuple[int, int, float]] = field(default_factory=dict)

    def __call__(self, loop_name: str) -> bool:
        """Return True after a signal. Each loop passes its own loop_name because loops run at different speeds."""
        now, own_exit_code = time.monotonic(), self.interrupts.exit_code
        deadline = self.start_time + 60 * (self.max_minutes or math.inf)
        calls, max_calls, interval_start = self.calls_by_loop.get(loop_name, (0, 1, now))
        calls += 1
        if calls < max_calls and self.rt.world_size > 1:
            self.calls_by_loop[loop_name] = calls, max_calls, interval_start
            return self.exit_code != 0
        n_sigint, n_sigterm, n_timed_out, seconds = self.rt.all_reduce_sum(
            own_exit_code == 130, own_exit_code == 143, now >= deadline, now - interval_start
        )
        self.exit_code, self.time_is_up = 130 if n_sigint else 143 if n_sigterm else 0, n_timed_out > 0
        seconds_per_call = max(seconds / self.rt.world_size / calls, 1e-6)
        max_calls = max(1, min(2 * max_calls, STOP_CHECK_CALLS, int(STOP_CHECK_SECONDS / seconds_per_call)))
        self.calls_by_loop[loop_name] = 0, max_calls, now  # at most double, since calls may get slower
        return self.exit_code != 0
