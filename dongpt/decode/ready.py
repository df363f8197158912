"""Prepare a trained model for decoding: load it, and convert its weights to the fastest format for the device.

    generator = load("out-quickstart")                   # or dongpt.load
    print(generator.generate("The ", max_new_tokens=100, seed=1))

On a GPU, the weights get the runtime's dtype. On a CPU, every token reads all weights once, so half the bytes take half
the time: large models get bfloat16 weights there, packed by dongpt/kernels/cpu.py, and compute in float32.
"""

from dataclasses import dataclass
from typing import Any, Iterator, Literal, Sequence

import torch

from configurator import UserError, check_setting, check_type
from dongpt.checkpoint.files import load_from_path, make_tokenizer
from dongpt.decode import decoder
from dongpt.decode.quantize import pack_model, quantize_linears
from dongpt.decode.sampling import DecodingError, Sampling
from dongpt.decode.text import Detokenizer, parse_stop_ids, parse_stop_strings
from dongpt.kernels import cpu
from dongpt.program import first_line
from dongpt.runtime import DTYPES, Runtime, RuntimeConfig, start
from dongpt.text.tokenizers import Tokenizer, UnknownPolicy
from model import GPT

BFLOAT16_MIN_PARAMS = 5e7  # number of parameters from which dtype=auto means bfloat16 weights on a CPU
Quantization = Literal["none", "int8"]


@dataclass
class Generator:
    """A model that is ready to decode, and its tokenizer."""

    model: GPT
    tokenizer: Tokenizer | None  # None if the checkpoint has none
    description: str  # device, dtype and weight format, with the reasons for each

    def generate(self, prompt: str, max_new_tokens: int = 500, **settings) -> str:
        """The text that follows prompt: the first text that sample.py prints with the same settings; see stream()."""
        return "".join(self.stream(prompt, max_new_tokens, **settings))

    def stream(
        self,
        prompt: str,
        max_new_tokens: int = 500,
        *,
        temperature: float = 0.8,
        top_k: int | None = 200,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int = 1337,
        stop: str | Sequence[str] = (),
        stop_ids: str | Sequence[int] = (),
        unknown: UnknownPolicy = "error",
        use_kv_cache: bool = True,
    ) -> Iterator[str]:
        """Yield the text that follows prompt piece by piece, as it is generated: whole characters, no empty pieces.

        The settings and their defaults are those of sample.py. Raises UserError for invalid settings, characters in the
        prompt that are not in the vocabulary, a model without a tokenizer, and non-finite logits.
        """
        ids, tokenizer = self.encode(prompt, unknown), self.require_tokenizer()
        stop = parse_stop_strings(stop) if isinstance(stop, str) else stop
        stop_ids = parse_stop_ids(stop_ids, tokenizer.vocab_size) if isinstance(stop_ids, str) else stop_ids
        detokenizer = Detokenizer(tokenizer, 1, stop, stop_ids)
        try:
            sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
            settings = sampling, seed, use_kv_cache, stop_ids, tokenizer.vocab_size
            for new_ids in decoder.stream(self.model, [ids], max_new_tokens, *settings):
                if piece := detokenizer.add(new_ids.tolist())[0]:
                    yield piece
                if detokenizer.done:
                    break
        except DecodingError as error:
            raise UserError(str(error)) from error
        if piece := detokenizer.finish()[0]:
            yield piece

    def encode(self, prompt: str, unknown: UnknownPolicy = "error") -> list[int]:
        """The ids of a prompt, in which special tokens are recognized; never empty. Raises UserError."""
        tokenizer = self.require_tokenizer()
        return tokenizer.encode(prompt, special=True, unknown=unknown) or [tokenizer.start_id]

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises UserError if the checkpoint has none."""
        if self.tokenizer is None:
            remedy = "copy the meta.pkl or meta.json of its data into the checkpoint's folder"
            raise UserError(f"this checkpoint has no tokenizer, so its output cannot be shown as text: {remedy}")
        return self.tokenizer


def load(
    path: str,
    device: str = "auto",
    dtype: str = "auto",
    quantize: Quantization = "none",
    compile: bool | Literal["auto"] = "auto",
    chat_template: bool = True,
    **model_args: Any,
) -> Generator:
    """The model at path (a checkpoint, an out_dir, a Hugging Face directory or gpt2*), ready to decode.

    The settings are those of sample.py. model_args (n_head=4) supply hyperparameters that checkpoints of other trainers
    may lack. chat_template=False drops the tokenizer's chat template, which this version may not know. Raises UserError
    if the model cannot be loaded, and for settings that cannot work here.
    """
    for key, value in dict(device=device, dtype=dtype, compile=compile).items():
        check_setting(key, value, RuntimeConfig, "load")
    check_type(quantize, Quantization, "load: quantize")
    rt = start(device, dtype)
    model, tokenizer_dict, _ = load_from_path(path, **model_args)
    if tokenizer_dict and not chat_template:
        tokenizer_dict = {key: value for key, value in tokenizer_dict.items() if key != "template"}
    tokenizer = make_tokenizer(tokenizer_dict)
    return Generator(model, tokenizer, prepare_for_decoding(model, rt, dtype, quantize, compile))


def prepare_for_decoding(
    model: GPT, rt: Runtime, dtype: str = "auto", quantize: str = "none", compile: bool | Literal["auto"] = "auto"
) -> str:
    """Move model to the device, in eval mode and in the fastest weight format; it can no longer be trained afterwards.
    Returns a description of the choices and their reasons.

    dtype is the setting. compile=True compiles the blocks; auto does not, since a few samples do not repay a minute of
    compiling. Raises UserError if torch.compile does not work.
    """
    model.to(rt.device).eval().requires_grad_(False)
    n_params, weight_format, format_reason = model.get_num_matmul_params(), rt.dtype, ""
    is_packable, compiler_problem = cpu.can_pack(model) if compile is not True else (False, "")
    if dtype == "auto" and is_packable and n_params >= BFLOAT16_MIN_PARAMS:
        weight_format, format_reason = "bfloat16", f" (auto: every token reads {n_params / 1e6:.0f}M of them)"
    if quantize == "int8":
        quantize_linears(model)
        weight_format, format_reason = "int8", " (as asked)"
    if is_packable and weight_format != "float16":
        pack_model(model, DTYPES.get(weight_format, torch.float32))
        sum_dtype_note = "" if weight_format == "float32" else ", sums in float32"
        return f"{rt.description}, weights: {weight_format}{format_reason}, packed for the CPU{sum_dtype_note}"
    model.to(DTYPES[rt.dtype])
    if compile is True:
        compile_blocks(model)
    notes = [f"weights: {weight_format}{format_reason}"] if quantize == "int8" or compiler_problem else []
    if compiler_problem:
        notes.append(f"not packed ({compiler_problem}): slower")
    elif quantize == "int8":
        notes.append("less memory, slower than without")  # weights are converted back to floats for every token
    if rt.device_type == "cuda":
        notes.append("compile: on (as asked)" if compile is True else "compile: off (a minute for a few samples)")
    return ", ".join([rt.description, *notes])


def compile_blocks(model: GPT):
    """Compile the model's blocks. Raises UserError if torch.compile does not work."""
    model.use_packed_weights = False  # they would replace the compiled layers
    for block in model.transformer.h:
        block.compile(dynamic=True)
    try:
        list(model.stream([[0, 0]], 3))
    except Exception as error:  # a missing compiler, an unsupported Python or GPU, ...: every backend has its own
        raise UserError(f"compile=True cannot work here ({first_line(error)}): use compile=False") from error
