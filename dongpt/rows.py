"""Linear layers for decoding on a CPU: float32, bfloat16 or int8 weights, packed once, read at the speed of memory.

PyTorch's own kernels read the weights for one row of input at a half to three quarters of what memory gives, and for
eight rows in bfloat16 ten times slower than they could where the processor has no instructions for it. rows.c, a
hundred lines, is compiled when it is first needed, which takes a second; without a compiler all works without it.
"""
import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile

import torch
import torch.nn as nn

from dongpt.quantize import Int8Linear

SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "rows.c")
PARTS = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}  # weights in a word of 32 bits


@functools.cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """(rows.c compiled for this processor, "") or (None, why there is none)."""
    if not sys.platform.startswith("linux"):
        return None, f"not done on {sys.platform}"
    compiler = os.environ.get("CC", "gcc")
    if not shutil.which(compiler):
        return None, f"no C compiler ({compiler}) found"
    with tempfile.TemporaryDirectory() as folder:  # nothing is kept: a file from elsewhere is never run
        target = os.path.join(folder, "rows.so")
        command = [compiler, "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", SOURCE, "-o", target]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            if done.returncode:
                return None, f"{compiler} could not compile it"
            compiled = ctypes.CDLL(target)
        except (OSError, subprocess.TimeoutExpired) as error:
            return None, f"{compiler} could not compile it ({type(error).__name__})"
    pointer, number = ctypes.c_void_p, ctypes.c_long
    compiled.rows.argtypes = [pointer] * 5 + [number] * 3 + [ctypes.c_int]
    compiled.rows.restype = None
    return compiled, ""


class PackedLinear(nn.Module):
    """A Linear or Int8Linear for inference: weight in the order that rows.c reads; x and result in any float dtype."""

    def __init__(self, linear: nn.Linear | Int8Linear, dtype: torch.dtype):
        super().__init__()
        self.library, why = library()
        assert self.library, why
        int8 = isinstance(linear, Int8Linear)
        weight = linear.weight.detach() if int8 else linear.weight.detach().to(dtype)
        self.out_features, self.in_features = weight.shape
        self.parts = PARTS[weight.dtype]
        self.register_buffer("weight", pack(weight, self.library.lanes()), persistent=False)
        self.register_buffer("scale", linear.scale.float().contiguous() if int8 else None, persistent=False)
        bias = None if linear.bias is None else linear.bias.detach().float().clone()
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x):
        flat = x.detach().float().contiguous()
        y = torch.empty(*x.shape[:-1], self.out_features)
        pointers = (t if t is None else t.data_ptr() for t in (self.weight, self.scale, self.bias, flat, y))
        n_rows = flat.numel() // self.in_features
        self.library.rows(*pointers, n_rows, self.out_features, self.in_features, self.parts)
        return y.to(x.dtype)


def pack(weight, lanes: int):
    """weight (N, K) as rows.c reads it: (panels, K, lanes, parts), the last panel filled up with zeros."""
    parts = PARTS[weight.dtype]
    missing = -len(weight) % (lanes * parts)
    padded = torch.cat([weight, weight.new_zeros(missing, weight.shape[1])]) if missing else weight
    return padded.view(-1, parts, lanes, weight.shape[1]).permute(0, 3, 2, 1).contiguous()


def pack_linears(model: nn.Module, dtype: torch.dtype):
    """Replace each Linear (its weight then in dtype) and Int8Linear of model by a PackedLinear, for inference only."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, (nn.Linear, Int8Linear)):
                setattr(module, name, PackedLinear(child, dtype))
