"""A loaded model made ready to write: its weights in the form that the device reads fastest, by a fixed rule.

    model, why = prepare(model, rt, cfg.dtype, cfg.quantize, cfg.compile)

A GPU takes them in the runtime's dtype. On a CPU a token costs reading every weight once, so that half the bytes are
half the time: there large models keep bfloat16 weights (packed by dongpt/kernels/cpu.py) and compute in float32.
"""

from typing import Literal

import torch

from configurator import UserError
from dongpt.decode import quantize
from dongpt.kernels import cpu as rows
from dongpt.program import first_line
from dongpt.runtime import DTYPES, Runtime
from model import GPT

WORTH_ROUNDING = 5e7  # parameters from which dtype=auto takes bfloat16 weights on a CPU
Quantize = Literal["none", "int8"]


def prepare(
    model: GPT, rt: Runtime, dtype: str = "auto", quantized: Quantize = "none", compiled="auto"
) -> tuple[GPT, str]:
    """(model on the device, in eval mode, for inference only; what was chosen and why). dtype is what was asked for.

    compiled=True compiles the blocks; auto leaves them, since a few samples do not repay a minute of compiling. Raises
    ValueError where torch.compile does not work.
    """
    size, weights, why = model.get_num_multiplied(), rt.dtype, ""
    model.to(rt.device).eval().requires_grad_(False)
    if rt.device_type == "cpu" and size < rows.WORTH_PACKING:
        torch.set_num_threads(1)  # more would wait for each other longer than they compute, above all on a busy machine
    packs, why_not = rows.worth_packing(model) if compiled is not True else (False, "")
    if dtype == "auto" and packs and size >= WORTH_ROUNDING:
        weights, why = "bfloat16", f" (auto: {size / 1e6:.0f}M of them are read for every token)"
    if quantized == "int8":
        quantize.quantize_linears(model)
        weights, why = "int8", " (as asked)"
    if packs and weights != "float16":
        rows.pack_model(model, DTYPES.get(weights))
        return model, f"{rt.why}, weights: {weights}{why}, packed, sums in float32"
    model.to(DTYPES[rt.dtype])
    if compiled is True:
        compile_blocks(model)
    notes = [f"weights: {weights}{why}"] if quantized == "int8" or why_not else []
    if why_not:
        notes.append(f"not packed ({why_not}): slower")
    elif quantized == "int8":
        notes.append("less memory, slower than without")  # they are made floats anew for every token
    if rt.device_type == "cuda":
        notes.append("compile: on (as asked)" if compiled is True else "compile: off (a minute for a few samples)")
    return model, ", ".join([rt.why, *notes])


def compile_blocks(model: GPT):
    """Have the model's blocks compiled; raises ValueError where torch.compile does not work."""
    for block in model.transformer.h:
        block.compile(dynamic=True)
    try:
        list(model.stream([[0, 0]], 3))
    except Exception as error:  # a missing compiler, an unsupported Python or GPU, ...: every backend has its own
        raise UserError(f"compile=True cannot work here ({first_line(error)}): use compile=False") from error
