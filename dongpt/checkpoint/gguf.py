"""Write models as GGUF files, the format of llama.cpp, Ollama and LM Studio.

    save(model, tokenizer, "model.gguf", "float16")
    settings_hash = stored_hash("model.gguf")

Models with learned positions are GPT-2 in llama.cpp, and those with RoPE are GPT-NeoX without the parallel residual.
The format is described at github.com/ggml-org/ggml/blob/master/docs/gguf.md; it is written by the package gguf.
"""

from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch

from configurator import UserError
from dongpt.checkpoint.export import chat_template, vocab_and_merges
from dongpt.checkpoint.legacy import position_scheme
from dongpt.program import atomic_write
from dongpt.text.tokenizers import END, Tokenizer, byte_alphabet
from model import GPT

WeightType = Literal["float32", "float16", "q8_0"]
ARCHITECTURES = {"default": "gpt2", "rope": "gptneox"}  # by position scheme
NAMES = {  # part of our parameter names: the same part in llama.cpp's
    "transformer.wte.": "token_embd.",
    "transformer.wpe.": "position_embd.",
    "transformer.h.": "blk.",
    "transformer.ln_f.": "output_norm.",
    "lm_head.": "output.",
    ".ln_1.": ".attn_norm.",
    ".ln_2.": ".ffn_norm.",
    ".attn.c_attn.": ".attn_qkv.",
    ".attn.c_proj.": ".attn_output.",
    ".mlp.c_fc.": ".ffn_up.",
    ".mlp.c_proj.": ".ffn_down.",
}
BLOCK_SIZE_Q8_0 = 32  # values that share a scale
HASH_KEY = "dongpt.converted_by"


def save(model: GPT, tokenizer: Tokenizer | None, path: str, weights: WeightType, settings_hash: str = ""):
    """Write a model and its tokenizer to path. Vectors and position embeddings are stored as float32.

    Matrices whose rows are not a multiple of 32 values are float16 instead of q8_0. Raises UserError if llama.cpp has
    no such model or tokenizer, or if the package gguf is missing.
    """
    check(model, tokenizer)
    package, config = _import_gguf(), model.config
    n_ids = tokenizer.vocab_size if tokenizer else model.transformer.wte.num_embeddings
    tensors = [(name, tensor, _dtype(name, tensor, weights)) for name, tensor in _tensors(model, n_ids).items()]
    with atomic_write(path) as file:
        writer = package.GGUFWriter(file.name, ARCHITECTURES[config.pos_embd])
        _add_settings(writer, package, model, weights, settings_hash, n_ids)
        if tokenizer:
            _add_tokenizer(writer, package, tokenizer)
        for name, tensor, dtype in tensors:
            sample = _convert(package, tensor[:1], dtype)
            n_bytes = sample.nbytes * len(tensor) if tensor.dim() > 1 else 4 * len(tensor)
            quantized = package.GGMLQuantizationType.Q8_0 if dtype == "q8_0" else None
            shape = (len(tensor), *sample.shape[1:]) if tensor.dim() > 1 else tuple(tensor.shape)
            writer.add_tensor_info(name, shape, sample.dtype, n_bytes, quantized)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor, dtype in tensors:  # one at a time, so that memory does not hold the model twice
            writer.write_tensor_data(_convert(package, tensor, dtype))
        writer.close()


def check(model: GPT, tokenizer: Tokenizer | None):
    """Raise UserError if llama.cpp cannot express the model or its tokenizer."""
    config, scheme = model.config, position_scheme(model.config)
    reason = f"positions of the kind {scheme}" * (scheme not in ARCHITECTURES)
    reason = reason or "n-gram embeddings" * (config.ngrams > 1) or "bigram tables" * (config.model_type != "gpt")
    if not reason and tokenizer and tokenizer.kind == "word":
        reason = "vocabularies of words"
    if reason:
        raise UserError(f"llama.cpp does not support {reason}: use --to=hf instead, or keep the model as a checkpoint")


def stored_hash(path: str) -> str | None:
    """Return the settings_hash that save stored in a GGUF file, or None if there is none."""
    try:
        field = _import_gguf().GGUFReader(path).get_field(HASH_KEY)
        return field.contents() if field else None
    except (ValueError, OSError, IndexError, KeyError):  # not a GGUF file, or a damaged one
        return None


def _import_gguf() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise UserError("GGUF files need the package gguf: run pip install 'gguf>=0.17,<1'") from error
    return gguf


def _tensors(model: GPT, n_ids: int) -> dict[str, torch.Tensor]:
    """Return the weights by llama.cpp's names, without padded rows, and with biases of zero where it needs them."""
    tensors = {}
    for key, weight in model.state_dict().items():
        if key == "lm_head.weight" and model.config.tie_weights and model.config.pos_embd == "default":
            continue  # llama.cpp shares it, but not in GPT-NeoX
        name = key
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        tensors[name] = weight[:n_ids] if key in ("transformer.wte.weight", "lm_head.weight") else weight
        if name.startswith(("blk.", "output_norm.")) and not model.config.bias:
            tensors[name.removesuffix("weight") + "bias"] = torch.zeros(len(weight))
    return tensors


def _dtype(name: str, tensor: torch.Tensor, weights: WeightType) -> str:
    if tensor.dim() == 1 or name == "position_embd.weight":
        return "float32"
    return "float16" if weights == "q8_0" and tensor.shape[1] % BLOCK_SIZE_Q8_0 else weights


def _convert(package: ModuleType, tensor: torch.Tensor, dtype: str) -> np.ndarray:
    values = tensor.detach().float().contiguous().numpy()
    if dtype == "q8_0":
        return package.quants.quantize(values, package.GGMLQuantizationType.Q8_0)
    return values.astype(dtype, copy=False)


def _add_settings(writer: Any, package: ModuleType, model: GPT, weights: str, settings_hash: str, n_ids: int):
    config = model.config
    writer.add_name("donGPT")
    writer.add_string(HASH_KEY, settings_hash)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(n_ids)
    if config.pos_embd == "rope":
        writer.add_rope_dimension_count(config.n_embd // config.n_head)
        writer.add_rope_freq_base(10000.0)
        writer.add_parallel_residual(False)
    types = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(package.LlamaFileType[types[weights]])


def _add_tokenizer(writer: Any, package: ModuleType, tokenizer: Any):
    """Write the vocabulary as byte pairs. Those of a vocabulary of characters join the bytes of each character."""
    if tokenizer.kind == "char":
        names, merges = _character_pairs(tokenizer.pieces)
    else:
        vocabulary, merges = vocab_and_merges(tokenizer.encoding._mergeable_ranks)
        names = sorted(vocabulary, key=vocabulary.__getitem__)
    specials = sorted(tokenizer.specials, key=tokenizer.specials.__getitem__)
    types = [package.TokenType.NORMAL] * len(names) + [package.TokenType.CONTROL] * len(specials)
    end = tokenizer.template.end if tokenizer.template and tokenizer.template.end in tokenizer.specials else END
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*names, *specials])
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    if END in tokenizer.specials:
        writer.add_bos_token_id(tokenizer.specials[END])
    if end in tokenizer.specials:
        writer.add_eos_token_id(tokenizer.specials[end])
    writer.add_add_bos_token(False)
    if tokenizer.template and tokenizer.template.special:
        writer.add_chat_template(chat_template(tokenizer.template))


def _character_pairs(characters: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Return each character's UTF-8 bytes in GPT-2's byte alphabet, and the pairs that join them from left to right."""
    alphabet = byte_alphabet()
    names = ["".join(alphabet[byte] for byte in character.encode("utf-8")) for character in characters]
    return names, list(dict.fromkeys((name[:i], name[i]) for name in names for i in range(1, len(name))))
