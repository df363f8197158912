"""CPU decoding with packed float32, bfloat16 or int8 weights, limited only by memory bandwidth.

For one row of input, PyTorch's kernels reach half to three quarters of the memory bandwidth. For eight rows in
bfloat16, they take ten times as long as necessary on a CPU without bfloat16 instructions. A few hundred small calls per
token add more overhead. cpu.c is compiled on first use, which takes a second. Without a C compiler, PyTorch's kernels
are used. The reference implementation is the model's own forward pass.
"""

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from typing import Any

import torch
import torch.nn as nn

C_FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "cpu.c")
PACKING_MIN_PARAMS = 1e6  # in smaller models, reading weights does not dominate the time per token
WEIGHT_COPY_MAX_PARAMS = 5e8  # in larger models, a second copy of the weights may not fit in memory
WEIGHT_COPY_MIN_TOKENS = 16  # for fewer tokens, packing takes longer than it saves
WEIGHTS_PER_INT32 = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}  # weights per 32-bit word
# -mtune=generic: when tuning for some CPUs, gcc fuses multiply and add in one loop but not in another, so that the
# rounding of a row would depend on the number of rows.
GCC_FLAGS = ["-O3", "-march=native", "-mtune=generic", "-fopenmp", "-shared", "-fPIC"]


@functools.cache
def load_library() -> tuple[ctypes.CDLL | None, str]:
    """Return (cpu.c compiled for this CPU, ""), or (None, the reason why it is not available)."""
    if not sys.platform.startswith("linux"):
        return None, f"not supported on {sys.platform}"
    compiler = shlex.split(os.environ.get("CC", "gcc")) or ["gcc"]
    if not shutil.which(compiler[0]):
        return None, f"no C compiler ({compiler[0]}) found"
    with tempfile.TemporaryDirectory() as temp_dir:  # not cached, so that no foreign library is ever loaded
        so_path = os.path.join(temp_dir, "cpu.so")
        try:
            subprocess.run([*compiler, *GCC_FLAGS, C_FILE, "-o", so_path], capture_output=True, timeout=120, check=True)
            c_library = ctypes.CDLL(so_path)
        except (OSError, subprocess.SubprocessError) as error:
            return None, f"{compiler[0]} failed to compile cpu.c, or the library did not load ({type(error).__name__})"
    pointer, pointers = ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
    step, layers, linear = (ctypes.POINTER(struct) for struct in (_CStep, _CLayer, _CLinear))
    c_library.matmul.argtypes = [linear, pointer, pointer, ctypes.c_long]
    c_library.blocks.argtypes = [step, layers, ctypes.c_long, pointers, pointers, pointer, pointer]
    c_library.matmul.restype = c_library.blocks.restype = None
    return c_library, ""


def _c_struct(name: str, pointers: str, numbers: str, linears: str = "") -> Any:
    """Return a ctypes struct that matches one in cpu.c. Its members are pointers, then linears, then numbers."""
    struct_fields: list[tuple[str, Any]] = [(field, ctypes.c_void_p) for field in pointers.split()]
    struct_fields += [(field, _CLinear) for field in linears.split()]
    struct_fields += [(field, ctypes.c_long) for field in numbers.split()]
    return type(name, (ctypes.Structure,), {"_fields_": struct_fields})


_CLinear = _c_struct("_CLinear", "weight scale bias", "N K parts")
_CLayer = _c_struct("_CLayer", "ln_1_weight ln_1_bias ln_2_weight ln_2_bias", "", "c_attn attn_c_proj c_fc mlp_c_proj")
_CStep = _c_struct(
    "_CStep",
    "positions cos sin bias",
    "B C n_head capacity positions_differ rotations_differ bias_rows bias_heads cache_len gelu_tanh n_threads",
)


def _data_ptr(tensor) -> int | None:
    """Return the address of a tensor's data for C, or None if tensor is None."""
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


class PackedLinear(nn.Module):
    """Linear layer for inference with its weight packed for cpu.c. Accepts inputs of any floating-point dtype."""

    weight: torch.Tensor
    scale: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(self, linear: Any, dtype: torch.dtype):
        super().__init__()
        weight, scale, bias = linear.weight.detach(), getattr(linear, "scale", None), linear.bias
        weight = weight.to(dtype) if scale is None else weight
        self.out_features, self.in_features = weight.shape
        self.weights_per_int32 = WEIGHTS_PER_INT32[weight.dtype]
        self.register_buffer("weight", pack_weight(weight, _c_library().lanes()), persistent=False)
        self.register_buffer("scale", None if scale is None else scale.float().contiguous(), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone(), persistent=False)

    def c_struct(self) -> Any:
        """Return this layer as a C struct, which is valid only while the layer exists."""
        data_ptrs = _data_ptr(self.weight), _data_ptr(self.scale), _data_ptr(self.bias)
        return _CLinear(*data_ptrs, self.out_features, self.in_features, self.weights_per_int32)

    def forward(self, x):
        x_float = x.detach().float().contiguous()
        y = torch.empty(*x.shape[:-1], self.out_features)
        _c_library().matmul(self.c_struct(), _data_ptr(x_float), _data_ptr(y), x_float.numel() // self.in_features)
        return y.to(x.dtype)


def _c_library() -> ctypes.CDLL:
    c_library, problem = load_library()
    assert c_library is not None, problem
    return c_library


def pack_weight(weight, lanes: int):
    """Pack weight (N, K) for cpu.c: (panels, K, words, lanes, weights per word), zero-padded at the end."""
    per_int32 = WEIGHTS_PER_INT32[weight.dtype]
    n_int32s = 2 if per_int32 == 1 else 1  # a panel has SUMS (cpu.c) times lanes channels
    n_padding = -len(weight) % (n_int32s * per_int32 * lanes)
    padded_weight = torch.cat([weight, weight.new_zeros(n_padding, weight.shape[1])]) if n_padding else weight
    return padded_weight.view(-1, n_int32s, per_int32, lanes, weight.shape[1]).permute(0, 4, 1, 3, 2).contiguous()


class PackedBlocks:
    """Blocks and output head of a GPT, with packed copies of the weights for CPU decoding in float32.

    Layers that are already packed are not copied. Later changes to the model's weights have no effect here.
    """

    def __init__(self, model: Any):
        def as_packed(linear: Any) -> PackedLinear:
            return linear if isinstance(linear, PackedLinear) else PackedLinear(linear, torch.float32)

        self.config, self.head, blocks = model.config, as_packed(model.lm_head), model.transformer.h
        layers = [(b.attn.c_attn, b.attn.c_proj, b.mlp.c_fc, b.mlp.c_proj) for b in blocks]
        self.linears = [[as_packed(linear) for linear in layer] for layer in layers]
        self.norms = [(b.ln_1.weight, b.ln_1.bias, b.ln_2.weight, b.ln_2.bias) for b in blocks]  # kept alive for C
        self.layers = (_CLayer * len(blocks))()
        for i, (norm_weights, linears) in enumerate(zip(self.norms, self.linears)):
            self.layers[i] = _CLayer(*map(_data_ptr, norm_weights), *(linear.c_struct() for linear in linears))

    def blocks(self, x, attention_inputs: Any, caches: list):
        """Run the blocks on x (B, 1, C), the newest token per sequence, and extend the caches; return the output."""
        (B, _, C), (cos, sin), bias = x.shape, attention_inputs.rotation or (None, None), attention_inputs.bias
        positions, capacity = caches[0].positions, caches[0].keys.shape[2]
        if bias is not None and not bias.is_floating_point():  # a boolean mask
            bias = torch.zeros(bias.shape).masked_fill(~bias, -torch.inf)
        n_threads = torch.get_num_threads()
        x, scratch = x.clone(), torch.empty(6 * B * C + n_threads * capacity)
        decode_step = _CStep(
            *map(_data_ptr, (positions, cos, sin, bias)),
            *(B, C, self.config.n_head, capacity),
            *(len(positions) > 1, cos is not None and len(cos) > 1),
            *(bias.shape[:2] if bias is not None else (1, 1)),
            *(caches[0].cache_len, self.config.activation == "gelu_tanh", n_threads),
        )
        pointer_array = ctypes.c_void_p * len(caches)
        keys, values = (pointer_array(*(_data_ptr(cache[i]) for cache in caches)) for i in range(2))
        _c_library().blocks(decode_step, self.layers, len(caches), keys, values, _data_ptr(x), _data_ptr(scratch))
        return x


def can_pack(model: Any) -> tuple[bool, str]:
    """Return (True if packing is possible and worthwhile, the reason if only the C library is missing)."""
    if model.device.type != "cpu" or not model.can_cache or model.get_num_matmul_params() < PACKING_MIN_PARAMS:
        return False, ""
    c_library, problem = load_library()
    return c_library is not None, problem


def make_packed_blocks(model: Any, n_tokens: int) -> PackedBlocks | None:
    """Return PackedBlocks for decoding n_tokens with a float32 model, or None if the model's forward pass is faster.

    Unless the model is already packed, its weights are copied, which takes as long as decoding about ten tokens.
    """
    if isinstance(model.lm_head, PackedLinear):
        return PackedBlocks(model)
    is_too_large = model.get_num_matmul_params() > WEIGHT_COPY_MAX_PARAMS
    if not model.use_packed_weights or n_tokens < WEIGHT_COPY_MIN_TOKENS or is_too_large:
        return None
    return PackedBlocks(model) if can_pack(model)[0] else None
