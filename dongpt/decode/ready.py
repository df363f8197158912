"""Load a trained model and convert its weights to the fastest format for decoding on the device.

    generator = load("out-quickstart")                   # or dongpt.load
    print(generator.generate("The ", max_new_tokens=100, seed=1))

On a GPU, weights use the runtime's dtype. On a CPU, decoding a token reads all weights once, so halving their size
halves the time. Large models therefore use bfloat16 weights, packed by dongpt/kernels/cpu.py, and compute in float32.
"""

import inspect
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

BFLOAT16_MIN_PARAMS = 5e7  # minimum size for dtype=auto to select bfloat16 weights on a CPU
Quantization = Literal["none", "int8"]


@dataclass
class Generator:
    """A model prepared for decoding, with its tokenizer."""

    model: GPT
    tokenizer: Tokenizer | None  # None if the checkpoint has none
    description: str  # device, dtype and weight format, with the reason for each

    def generate(self, prompt: str, max_new_tokens: int = 500, **settings) -> str:
        """Return only the new text, which is the same as in sample.py's first sample with the same settings."""
        if unknown := settings.keys() - inspect.signature(self.stream).parameters:
            raise TypeError(f"generate() got an unexpected keyword argument {min(unknown)!r}")
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
        """Yield the text generated after prompt in non-empty pieces of whole characters.

        The settings and their defaults match sample.py. Raises UserError if a setting is invalid, the prompt contains
        characters outside the vocabulary, the model has no tokenizer, or its logits are not finite.
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
        """Encode a prompt, including special tokens, as a non-empty list of ids. Raises UserError on failure."""
        tokenizer = self.require_tokenizer()
        return tokenizer.encode(prompt, special=True, unknown=unknown) or [tokenizer.start_id]

    def require_tokenizer(self) -> Tokenizer:
        """Return the tokenizer. Raises UserError if the checkpoint has no tokenizer."""
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
    base: str = "",
    **model_args: Any,
) -> Generator:
    """Load the model at path (a checkpoint, an out_dir, a Hugging Face directory or gpt2*) for decoding.

    The settings are those of sample.py. model_args, such as n_head=4, provide hyperparameters that are missing from
    other trainers' checkpoints. base is the path of the model that a LoRA adapter was trained on, if it has moved.
    chat_template=False ignores the tokenizer's chat template, which this version may not
    support. Raises UserError if the model cannot be loaded or a setting is unsupported.
    """
    for key, value in dict(device=device, dtype=dtype, compile=compile).items():
        check_setting(key, value, RuntimeConfig, "load")
    check_type(quantize, Quantization, "load: quantize")
    rt = start(device, dtype)
    model, tokenizer_dict, _ = load_from_path(path, base, **model_args)
    if tokenizer_dict and not chat_template:
        tokenizer_dict = {key: value for key, value in tokenizer_dict.items() if key != "template"}
    tokenizer = make_tokenizer(tokenizer_dict)
    return Generator(model, tokenizer, prepare_for_decoding(model, rt, dtype, quantize, compile))


def prepare_for_decoding(
    model: GPT, rt: Runtime, dtype: str = "auto", quantize: str = "none", compile: bool | Literal["auto"] = "auto"
) -> str:
    """Prepare model, which cannot be trained afterwards, for inference on the device in the fastest weight format.
    Returns a description of the choices and their reasons.

    compile=True compiles the blocks. compile="auto" does not, since compiling takes a minute and does not pay off for a
    few samples. Raises UserError if torch.compile does not work.
    """
    model.to(rt.device).eval().requires_grad_(False)
    n_params, weight_format, format_reason = model.get_num_matmul_params(), rt.dtype, ""
    is_packable, compiler_problem = cpu.can_pack(model) if compile is not True else (False, "")
    if dtype == "auto" and is_packable and n_params >= BFLOAT16_MIN_PARAMS:
        weight_format, format_reason = "bfloat16", f" (auto: each token reads {n_params / 1e6:.0f}M weights)"
    if quantize == "int8":
        quantize_linears(model)
        weight_format, format_reason = "int8", " (requested)"
    if is_packable and weight_format != "float16":
        pack_model(model, DTYPES.get(weight_format, torch.float32))
        sum_dtype_note = "" if weight_format == "float32" else ", sums in float32"
        return f"{rt.description}, weights: {weight_format}{format_reason}, packed for the CPU{sum_dtype_note}"
    model.to(DTYPES[rt.dtype])
    if compile is True:
        compile_blocks(model)
    notes = [f"weights: {weight_format}{format_reason}"] if quantize == "int8" or compiler_problem else []
    if compiler_problem:
        notes.append(f"not packed ({compiler_problem}), which is slower")
    elif quantize == "int8":
        notes.append("which saves memory but is slower")  # weights are converted back to floats for every token
    if rt.device_type == "cuda":
        notes.append("compile: on (requested)" if compile is True else "compile: off (not worth it for a few samples)")
    return ", ".join([rt.description, *notes])


def compile_blocks(model: GPT):
    """Compile the model's blocks. Raises UserError if torch.compile does not work."""
    model.use_packed_weights = False  # packed weights would replace the compiled layers
    for block in model.transformer.h:
        block.compile(dynamic=True)
    try:
        list(model.stream([[0, 0]], 3))
    except Exception as error:  # missing compiler, unsupported Python or GPU, ...: types depend on the backend
        raise UserError(f"compile=True does not work here ({first_line(error)}): use compile=False") from error
