"""The machine under a program: device, dtype, compile, seeds, several processes.

The rules are fixed and never time anything; each choice comes with its reason, which programs print in one line.
"""

import math
import os
import signal
import subprocess
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Annotated, Any, Callable, Literal

import numpy as np
import torch
import torch.distributed as dist

import configurator
from configurator import UserError
from dongpt.program import first_line

ROOT = configurator.ROOT
STOP_SECONDS, STOP_CALLS = 0.25, 50  # the most between two times that several processes agree whether to stop
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class DeviceConfig:
    """Where and how precisely to compute."""

    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps; auto takes CUDA, else MPS, else the CPU
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the arithmetic; weights train in float32


@dataclass(frozen=True)
class RuntimeConfig(DeviceConfig):
    """Settings of the machine that most programs share."""

    compile: Literal["auto", True, False] = "auto"  # torch.compile; auto: on CUDA, if the run is long enough
    seed: int = 1337  # every random draw is a function of it


# ----------------------------------------------------------------------------------------------------------------------
# device and dtype


def pick_device(asked: str) -> tuple[str, str]:
    """(device, why) for what was asked; under torchrun each process takes the GPU of its local rank.

    Raises UserError when the device that was asked for is not there.
    """
    local_rank, alone = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)) == 1
    has_mps = torch.backends.mps.is_available()
    if asked == "auto":
        if not (why_no_cuda := cuda_problem(local_rank)):
            return f"cuda:{local_rank}", torch.cuda.get_device_name(local_rank)
        return ("mps", "Apple GPU") if alone and has_mps else ("cpu", why_no_cuda)
    try:
        kind, index = torch.device(asked).type, torch.device(asked).index
    except RuntimeError:
        kind, index = "", None
    if kind not in ("cpu", "cuda", "mps"):
        raise UserError(f"device={asked!r} is not a device: use auto, cpu, cuda, cuda:N or mps")
    if kind == "cuda":
        index = local_rank if index is None or not alone else index
        if why_no_cuda := cuda_problem(index):
            raise UserError(f"device={asked!r} is not there: {why_no_cuda}; use device=cpu or device=auto")
        return f"cuda:{index}", torch.cuda.get_device_name(index)
    if kind == "mps" and not has_mps:
        raise UserError("device='mps' is not there: this torch finds no Apple GPU; use device=cpu or device=auto")
    if kind == "mps" and not alone:
        raise UserError("several processes cannot share an Apple GPU: use device=cpu, or start one process")
    return kind, "as asked"


def cuda_problem(index: int) -> str:
    """'' if CUDA works; else why not: no GPU, or an NVIDIA GPU that this torch cannot use, with the remedy."""
    other_build = "install another build of torch, as pytorch.org/get-started shows"
    if torch.cuda.is_available():
        if index >= torch.cuda.device_count():
            return f"this machine has {torch.cuda.device_count()} GPU(s), and this would be number {index + 1}"
        name = torch.cuda.get_device_name(index)
        try:
            torch.zeros(1, device=f"cuda:{index}").add_(1)
            return ""
        except RuntimeError as error:
            if "no kernel image" in str(error):
                return f"found {name}, but torch {torch.__version__} has no kernels for it: {other_build}"
            return f"found {name}, but it cannot be used now ({first_line(error)})"
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]  # the driver's own tool
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        answer = ""
    if not answer:
        return "no GPU found"
    found = f"found {answer.splitlines()[0]}, but torch {torch.__version__}"
    if torch.version.cuda is None:
        return f"{found} is built without CUDA: {other_build.replace('another', 'a CUDA')}"
    return (
        f"{found}, built for CUDA {torch.version.cuda}, cannot use it: "
        f"update the NVIDIA driver, or install a torch built for an older CUDA"
    )


# Channels from which a model trains faster in bfloat16 on a processor that multiplies it with AMX: nanoGPT's baby GPT
# (384) took 2.2 s per step instead of 9.8 on two such cores; the casts of a small one take longer than they save.
WORTH_AMX = 256


def pick_dtype(asked: str, device_type: str, n_embd: int = 0) -> tuple[str, str]:
    """(dtype, why) for what was asked, for a model of n_embd channels, 0 where exactness counts more than speed.

    Raises UserError for a dtype that the device cannot train in.
    """
    if device_type == "mps":
        if asked not in ("auto", "float32"):
            raise UserError(f"dtype={asked!r} gives wrong numbers on MPS: use dtype=float32 or dtype=auto")
        return "float32", "the only safe one on MPS"
    has_bf16 = device_type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if asked == "bfloat16" and not has_bf16:
        raise UserError("dtype='bfloat16' is not there on this GPU: use dtype=float16, float32 or auto")
    if asked != "auto":
        return asked, "as asked"
    if device_type == "cpu":
        if n_embd >= WORTH_AMX and has_amx():
            return "bfloat16", "this processor has AMX"
        return "float32", "exact, and the default on a CPU"
    return ("bfloat16", "this GPU has it") if has_bf16 else ("float16", "this GPU has no bfloat16")


def has_amx() -> bool:
    """Whether the processor multiplies bfloat16 matrices by instructions of their own, Intel's AMX."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


# ----------------------------------------------------------------------------------------------------------------------
# one process or several


@dataclass(frozen=True)
class Runtime:
    """Device and dtype, and the place of this process among all: rank 0 of 1 without torchrun."""

    device: str
    dtype: str
    why: str  # device and dtype with the reasons, for the user
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    device_type: str = field(init=False)  # cpu, cuda or mps
    is_main: bool = field(init=False)  # rank 0 prints and writes
    autocast: AbstractContextManager = field(init=False)  # of forward passes: mixed precision unless dtype is float32

    def __post_init__(self):
        kind, mixed = torch.device(self.device).type, self.dtype != "float32"
        object.__setattr__(self, "device_type", kind)  # this way because the dataclass is frozen
        object.__setattr__(self, "is_main", self.rank == 0)
        object.__setattr__(self, "autocast", torch.autocast(kind, DTYPES[self.dtype]) if mixed else nullcontext())

    def print(self, *args, **kwargs):
        """print on rank 0 only."""
        if self.is_main:
            print(*args, **kwargs, flush=True)

    def move(self, *tensors) -> list[torch.Tensor]:
        """The tensors on the device; to CUDA through pinned memory, which is copied while the GPU still computes."""
        if self.device_type != "cuda":  # elsewhere non_blocking may read memory that is freed: pytorch issue 189690
            return [tensor.to(self.device) for tensor in tensors]
        return [t if t.is_cuda else t.pin_memory().to(self.device, non_blocking=True) for t in tensors]

    def read_later(self, tensor) -> Callable[[], float]:
        """Copy a scalar to the host asynchronously; returns a function that waits for it and gives the mean over ranks.

        Work that is queued on the GPU in between is not waited for.
        """
        on_cuda = self.device_type == "cuda"
        copy = tensor.to("cpu", non_blocking=on_cuda, copy=True)
        copied = torch.cuda.current_stream().record_event() if on_cuda else None

        def wait() -> float:
            if copied:
                copied.synchronize()
            return self.sum(copy.item())[0] / self.world_size

        return wait

    def sum(self, *values: float) -> list[float]:
        """The values added up over all processes, in float64. A CPU tensor travels by gloo: no GPU is waited for."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device="cpu" if dist.is_gloo_available() else self.device)
        dist.all_reduce(total)
        return total.tolist()

    def broadcast(self, tensors):
        """Give every process the values that rank 0 has in tensors, in place."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def barrier(self):
        """Wait until every process is here."""
        self.sum(0)

    def on_main(self, function: Callable[[], Any]):
        """Call function on rank 0 only; every rank returns after it, and raises if it raised UserError."""
        problem = None
        if self.is_main:
            try:
                function()
            except UserError as error:
                problem = error
        if self.sum(problem is not None)[0]:
            raise problem or UserError("rank 0 could not go on")  # printed by rank 0 only, see run_program

    def synchronize(self):
        """Wait until the device has finished what was queued, for timings."""
        if self.device_type != "cpu":
            torch.accelerator.synchronize()


def print0(*args, **kwargs):
    """print on rank 0 only, also before the processes know each other."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*args, **kwargs, flush=True)


def start(device: str = "auto", dtype: str = "auto", backend: str = "auto", n_embd: int = 0) -> Runtime:
    """Decide on device and dtype (see pick_dtype for n_embd), and join the other processes if torchrun started several.

    Raises UserError for a device, dtype or backend that cannot work here.
    """
    defaults = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1)
    rank, local_rank, world_size = (int(os.environ.get(key, default)) for key, default in defaults.items())
    device, why_device = pick_device(device)
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.set_device(device)
    dtype, why_dtype = pick_dtype(dtype, kind, n_embd)
    if backend not in ("auto", "nccl", "gloo"):
        raise UserError(f"backend={backend!r} is not known: use auto, nccl or gloo")
    if world_size > 1:
        if backend == "nccl" and kind != "cuda":
            raise UserError(f"backend='nccl' needs CUDA, and the device is {device}: use backend=auto or gloo")
        uses_nccl = kind == "cuda" and backend != "gloo"
        both = "cpu:gloo,cuda:nccl" if dist.is_gloo_available() else "nccl"  # gloo carries what sum() adds up
        dist.init_process_group(both if uses_nccl else "gloo")
    why = f"device: {device} ({why_device}), dtype: {dtype} ({why_dtype})"
    return Runtime(device, dtype, why, rank, local_rank, world_size)


def seed_everything(*numbers: int):
    """Seed torch's generators with a function of the numbers alone, e.g. (seed, step, index of the micro-batch)."""
    mixed = 0
    for number in numbers:  # the finaliser of SplitMix64 after each, so that neighbours share nothing
        mixed = (mixed + number + 0x9E3779B97F4A7C15) % 2**64
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) % 2**64
        mixed ^= mixed >> 31
    torch.manual_seed(mixed)


def use_threads(n_threads: int):
    """Compute with n_threads CPU threads, if this machine's processes may use so many cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if n_threads != torch.get_num_threads() and n_threads * int(os.environ.get("LOCAL_WORLD_SIZE", 1)) <= cores:
        torch.set_num_threads(n_threads)


@dataclass
class Machine:
    """Whatever decides, besides settings, data and seed, how sums are rounded."""

    device: Literal["cpu", "cuda", "mps"]
    dtype: Literal["float32", "bfloat16", "float16"]
    compile: bool
    threads: Annotated[int, ">=", 1]
    world_size: Annotated[int, ">=", 1]
    torch: str
    numpy: str


def this_machine(rt: Runtime, compiled: bool) -> Machine:
    """The Machine of this process."""
    device: Any = rt.device_type
    dtype: Any = rt.dtype
    versions = str(torch.__version__), np.__version__
    return Machine(device, dtype, compiled, torch.get_num_threads(), rt.world_size, *versions)


# ----------------------------------------------------------------------------------------------------------------------
# how programs end


class Interrupts:
    """Notes Ctrl-C and SIGTERM so that a program can stop at a good moment; a second Ctrl-C stops it at once.

    code is 0, or the exit code that is due: 130 after Ctrl-C, 143 after SIGTERM.
    """

    code, first = 0, 0.0  # first: time of the first signal

    def __enter__(self):
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        if self.code and not (int(os.environ.get("WORLD_SIZE", 1)) > 1 and time.monotonic() - self.first < 5):
            os._exit(128 + number)
        if not self.code:  # torchrun passes on a Ctrl-C that its processes have already had: one press, two signals
            self.code, self.first = 128 + number, time.monotonic()


class Stop:
    """Whether all processes have to stop together: after Ctrl-C or SIGTERM in any of them, or when time is up.

        while not stop("updates"): ...

    Call it equally often on every rank. A single process answers at once. Several agree by an all-reduce, in every call
    at most and after STOP_SECONDS or STOP_CALLS at least: the time per call travels in the same all-reduce, so that all
    ranks count up to the same next one. code and time_is_up say why to stop.
    """

    def __init__(self, rt: Runtime, interrupts: Interrupts, minutes: float | None = None):
        self.rt, self.interrupts, self.code, self.time_is_up = rt, interrupts, 0, False
        self.end = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self.paces: dict[str, tuple[int, int, float]] = {}  # loop -> calls since the last all-reduce, most calls, time

    def __call__(self, loop: str) -> bool:
        """True once a signal has come. `loop` names the calling loop, since each has its own pace."""
        now, code = time.monotonic(), self.interrupts.code
        calls, most, since = self.paces.get(loop, (0, 1, now))
        calls += 1
        if calls < most and self.rt.world_size > 1:
            self.paces[loop] = calls, most, since
            return self.code != 0
        ctrl_c, term, late, seconds = self.rt.sum(code == 130, code == 143, now >= self.end, now - since)
        self.code, self.time_is_up = 130 if ctrl_c else 143 if term else 0, late > 0
        per_call = max(seconds / self.rt.world_size / calls, 1e-6)
        self.paces[loop] = (
            0,
            max(1, min(2 * most, STOP_CALLS, int(STOP_SECONDS / per_call))),
            now,
        )  # they may get slower
        return self.code != 0
