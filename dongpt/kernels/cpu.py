"""Decoding on a CPU: float32, bfloat16 or int8 weights, packed once and read at the speed of memory.

PyTorch's own kernels read the weights for one row of input at a half to three quarters of what memory gives, eight rows
in bfloat16 ten times slower than they could where the processor has no instructions for it, and between them a token
waits for a few hundred small calls. rows.c is compiled when it is first needed, which takes a second; without a
compiler all works without it.
"""

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import sys
import tempfile

import torch
import torch.nn as nn

from dongpt.decode.quantize import Int8Linear, replace_modules
from model import GPT, Held, Where

SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "cpu.c")
WORTH_PACKING = 1e6  # parameters below which a token's time is not that of reading them
WORTH_COPYING = 5e8  # parameters above which a second copy of the weights may not fit
WORTH_A_COPY = 16  # tokens that repay one
PARTS = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}  # weights in a word of 32 bits


@functools.cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """(rows.c compiled for this processor, "") or (None, why there is none)."""
    if not sys.platform.startswith("linux"):
        return None, f"not done on {sys.platform}"
    compiler = shlex.split(os.environ.get("CC", "gcc")) or ["gcc"]
    if not shutil.which(compiler[0]):
        return None, f"no C compiler ({compiler[0]}) found"
    with tempfile.TemporaryDirectory() as folder:  # nothing is kept: a file from elsewhere is never run
        target = os.path.join(folder, "rows.so")
        # tuned to some processors, gcc would fuse multiply and add here and not there: rows would differ by rounding
        command = [
            *compiler,
            "-O3",
            "-march=native",
            "-mtune=generic",
            "-fopenmp",
            "-shared",
            "-fPIC",
            SOURCE,
            "-o",
            target,
        ]
        try:
            subprocess.run(command, capture_output=True, timeout=120, check=True)
            compiled = ctypes.CDLL(target)
        except (OSError, subprocess.SubprocessError) as error:
            return None, f"{compiler[0]} could not make it, or it cannot be loaded ({type(error).__name__})"
    compiled.rows.argtypes = [ctypes.POINTER(_Linear), ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long]
    compiled.blocks.argtypes = [
        ctypes.POINTER(_Token),
        ctypes.POINTER(_Layer),
        ctypes.c_long,
        *[ctypes.POINTER(ctypes.c_void_p)] * 2,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]
    compiled.rows.restype = compiled.blocks.restype = None
    return compiled, ""


def _struct(name: str, pointers: str, numbers: str, inner: str = "") -> type:
    """A struct of rows.c: its pointers, then linears, then numbers, in the order of their names there."""
    members = [(field, ctypes.c_void_p) for field in pointers.split()] + [(field, _Linear) for field in inner.split()]
    members += [(field, ctypes.c_long) for field in numbers.split()]
    return type(name, (ctypes.Structure,), {"_fields_": members})


_Linear = _struct("_Linear", "weight scale bias", "N K parts")
_Layer = _struct("_Layer", "ln_1_weight ln_1_bias ln_2_weight ln_2_bias", "", "c_attn attn_c_proj c_fc mlp_c_proj")
_Token = _struct(
    "_Token",
    "positions cos sin bias",
    "B C n_head capacity positions_differ rotations_differ bias_rows bias_heads n_held by_tanh n_threads",
)


def _at(tensor) -> int | None:
    """Where a tensor's numbers lie, for C."""
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


class PackedLinear(nn.Module):
    """A Linear or Int8Linear for inference: weight in the order that rows.c reads; x and result in any float dtype."""

    def __init__(self, linear: nn.Linear | Int8Linear, dtype: torch.dtype):
        super().__init__()
        int8 = isinstance(linear, Int8Linear)
        weight = linear.weight.detach() if int8 else linear.weight.detach().to(dtype)
        self.out_features, self.in_features = weight.shape
        self.parts = PARTS[weight.dtype]
        self.register_buffer("weight", pack(weight, library()[0].lanes()), persistent=False)
        self.register_buffer("scale", linear.scale.float().contiguous() if int8 else None, persistent=False)
        bias = None if linear.bias is None else linear.bias.detach().float().clone()
        self.register_buffer("bias", bias, persistent=False)

    def struct(self) -> ctypes.Structure:
        """This layer for C, as long as it lives."""
        return _Linear(
            _at(self.weight), _at(self.scale), _at(self.bias), self.out_features, self.in_features, self.parts
        )

    def forward(self, x):
        flat = x.detach().float().contiguous()
        y = torch.empty(*x.shape[:-1], self.out_features)
        library()[0].rows(self.struct(), _at(flat), _at(y), flat.numel() // self.in_features)
        return y.to(x.dtype)


class Packed:
    """The blocks and the head of a GPT on a CPU in float32, packed: weights in dtype, or as they are packed already."""

    def __init__(self, model: GPT, dtype: torch.dtype):
        self.config, transformer = model.config, model.transformer
        self.head = _packed(model.lm_head, dtype)
        self.linears = [
            [
                _packed(linear, dtype)
                for linear in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
            ]
            for block in transformer.h
        ]
        self.norms = [p for block in transformer.h for p in (*block.ln_1.parameters(), *block.ln_2.parameters())]
        self.layers = (_Layer * len(transformer.h))(
            *(
                _Layer(
                    _at(block.ln_1.weight),
                    _at(block.ln_1.bias),
                    _at(block.ln_2.weight),
                    _at(block.ln_2.bias),
                    *(linear.struct() for linear in linears),
                )
                for block, linears in zip(transformer.h, self.linears)
            )
        )

    def blocks(self, x, where: Where, held: list[Held]):
        """What the blocks of model.py make of x (B, 1, C), the newest token of every row; the cache is extended."""
        (B, _, C), (cos, sin), config = x.shape, where.rotation or (None, None), self.config
        positions, capacity = held[0].positions, held[0].keys.shape[2]
        bias = where.bias if where.bias is not None and where.bias.is_floating_point() else None  # else by positions
        n_threads = torch.get_num_threads()
        x, scratch = x.clone(), torch.empty(6 * B * C + n_threads * capacity)
        token = _Token(
            _at(positions),
            _at(cos),
            _at(sin),
            _at(bias),
            B,
            C,
            config.n_head,
            capacity,
            len(positions) > 1,
            cos is not None and len(cos) > 1,
            *(bias.shape[:2] if bias is not None else (1, 1)),
            held[0].n_held,
            config.activation == "gelu_tanh",
            n_threads,
        )
        pointers = ctypes.c_void_p * len(held)
        library()[0].blocks(
            token,
            self.layers,
            len(held),
            pointers(*(_at(layer.keys) for layer in held)),
            pointers(*(_at(layer.values) for layer in held)),
            _at(x),
            _at(scratch),
        )
        return x


def _packed(linear, dtype: torch.dtype) -> PackedLinear:
    return linear if isinstance(linear, PackedLinear) else PackedLinear(linear, dtype)


def pack(weight, lanes: int):
    """weight (N, K) as rows.c reads it: (panels, K, words, lanes, parts), the last panel filled up with zeros."""
    parts = PARTS[weight.dtype]
    words = 2 if parts == 1 else 1  # a panel has SUMS of rows.c times lanes channels
    missing = -len(weight) % (words * parts * lanes)
    padded = torch.cat([weight, weight.new_zeros(missing, weight.shape[1])]) if missing else weight
    return padded.view(-1, words, parts, lanes, weight.shape[1]).permute(0, 4, 1, 3, 2).contiguous()


def worth_packing(model: GPT) -> tuple[bool, str]:
    """(whether a model is large enough and can be packed here, why not if only the compiler is missing)."""
    if model.device.type != "cpu" or not model.can_cache or model.get_num_multiplied() < WORTH_PACKING:
        return False, ""
    found, why_not = library()
    return found is not None, why_not


def packer(model: GPT, n_tokens: int) -> Packed | None:
    """A packed copy of the weights of now, as model.packer of a model that stays as it is; None where it is no gain.

    The copy costs about as much time as ten tokens, and the memory of the weights.
    """
    if n_tokens < WORTH_A_COPY or model.get_num_multiplied() > WORTH_COPYING or not worth_packing(model)[0]:
        return None
    return Packed(model, torch.float32)


def packed_already(model: GPT, n_tokens: int) -> Packed:
    """model.packer of a model of pack_model."""
    return Packed(model, torch.float32)


def pack_model(model: GPT, dtype: torch.dtype):
    """Make model, on a CPU, one for inference: weights of Linears in dtype (int8 ones stay), all else in float32."""
    model.float()
    replace_modules(model, (nn.Linear, Int8Linear), lambda linear: PackedLinear(linear, dtype))
    model.packer = packed_already
