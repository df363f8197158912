"""The architectures of the transformers library that compute the same function as our GPT.

    name = find_name(GPTConfig(pos_embd="rope"))                       # "gpt_neox"
    weights = to_transformers(model.state_dict(), model.config)        # with that architecture's names and layouts
    weights = from_transformers(weights, name, n_head=12)              # and back, bitwise

GPT-2 has learned positions. GPT-NeoX with use_parallel_residual=False and rotary_pct=1.0 is our RoPE model. MPT without
biases is our ALiBi model if the number of heads is a power of two. All other models are exported with their code, as
the architecture "dongpt" (see custom_code.py).
"""

from typing import Any

import torch

from configurator import UserError
from dongpt.checkpoint.legacy import position_scheme
from model import GPTConfig

CUSTOM = "dongpt"
CLASS_NAMES = {
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "mpt": "MptForCausalLM",
    CUSTOM: "DonGPTForCausalLM",
}
# Conv1D stores transposed Linear weights. attn.c_proj is square, so its shape does not reveal the transposition.
TRANSPOSED_WEIGHTS = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
NAMES: dict[str, dict[str, str]] = {  # part of our parameter names: the same part in theirs
    "gpt2": {},
    "gpt_neox": {
        "transformer.wte.": "gpt_neox.embed_in.",
        "transformer.h.": "gpt_neox.layers.",
        "transformer.ln_f.": "gpt_neox.final_layer_norm.",
        "lm_head.": "embed_out.",
        ".ln_1.": ".input_layernorm.",
        ".ln_2.": ".post_attention_layernorm.",
        ".attn.c_attn.": ".attention.query_key_value.",
        ".attn.c_proj.": ".attention.dense.",
        ".mlp.c_fc.": ".mlp.dense_h_to_4h.",
        ".mlp.c_proj.": ".mlp.dense_4h_to_h.",
    },
    "mpt": {
        "transformer.h.": "transformer.blocks.",
        "transformer.ln_f.": "transformer.norm_f.",
        ".ln_1.": ".norm_1.",
        ".ln_2.": ".norm_2.",
        ".attn.c_attn.": ".attn.Wqkv.",
        ".attn.c_proj.": ".attn.out_proj.",
        ".mlp.c_fc.": ".ffn.up_proj.",
        ".mlp.c_proj.": ".ffn.down_proj.",
    },
    CUSTOM: {"transformer.": "model.transformer.", "lm_head.": "model.lm_head."},
}
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
GPT2_KEYS = {  # GPTConfig field: key in config.json, alternative key, default
    "block_size": ("n_positions", "max_position_embeddings", 1024),
    "vocab_size": ("vocab_size", "vocab_size", 50257),
    "n_layer": ("n_layer", "num_hidden_layers", 12),
    "n_head": ("n_head", "num_attention_heads", 12),
    "n_embd": ("n_embd", "hidden_size", 768),
    "tie_weights": ("tie_word_embeddings", "tie_word_embeddings", True),
}
NEOX_KEYS = {
    "block_size": ("max_position_embeddings", "n_positions", 2048),
    "vocab_size": ("vocab_size", "vocab_size", 50432),
    "n_layer": ("num_hidden_layers", "n_layer", 44),
    "n_head": ("num_attention_heads", "n_head", 64),
    "n_embd": ("hidden_size", "n_embd", 6144),
    "tie_weights": ("tie_word_embeddings", "tie_word_embeddings", False),
}
MPT_KEYS = {
    "block_size": ("max_seq_len", "max_position_embeddings", 2048),
    "vocab_size": ("vocab_size", "vocab_size", 50368),
    "n_layer": ("n_layers", "num_hidden_layers", 24),
    "n_head": ("n_heads", "num_attention_heads", 16),
    "n_embd": ("d_model", "hidden_size", 2048),
    "tie_weights": ("tie_word_embeddings", "tie_word_embeddings", True),
}
CONFIG_KEYS = {"gpt2": GPT2_KEYS, "gpt_neox": NEOX_KEYS, "mpt": MPT_KEYS}
FIXED_CONFIG: dict[str, dict[str, Any]] = {  # the only values that our GPT supports
    "gpt2": {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "layer_norm_epsilon": 1e-5,
        "add_cross_attention": False,
    },
    "gpt_neox": {"use_parallel_residual": False, "layer_norm_eps": 1e-5, "attention_bias": True},
    "mpt": {"expansion_ratio": 4, "layer_norm_epsilon": 1e-5, "no_bias": True, "logit_scale": None},
    CUSTOM: {},
}
MPT_ATTENTION = {"alibi": True, "alibi_bias_max": 8, "clip_qkv": None, "softmax_scale": None, "qk_ln": False}


def find_name(config: GPTConfig) -> str:
    """Return the architecture for a model. Raises UserError if it is not a GPT, or one of EDS's models."""
    scheme = position_scheme(config)
    for key, value, expected in (("model_type", config.model_type, "gpt"), ("pos_embd", scheme, config.pos_embd)):
        if value != expected:
            raise UserError(f"models with {key}={value} cannot be exported: keep the model as a checkpoint")
    if config.ngrams > 1:
        return CUSTOM
    is_power_of_2 = config.n_head & (config.n_head - 1) == 0
    if scheme == "alibi" and is_power_of_2 and not config.bias and config.activation == "gelu":
        return "mpt"
    return {"default": "gpt2", "rope": "gpt_neox"}.get(scheme, CUSTOM)


def describe(config: GPTConfig, vocab_size: int) -> dict[str, Any]:
    """Return the contents of config.json, except ids of tokens, for a model with vocab_size tokens."""
    name = find_name(config)
    values: dict[str, Any] = {"architectures": [CLASS_NAMES[name]], "model_type": name, "vocab_size": vocab_size}
    sizes = CONFIG_KEYS.get(name, {})
    values |= {key: getattr(config, field) for field, (key, _, _) in sizes.items() if field != "vocab_size"}
    values |= FIXED_CONFIG[name]
    activation = "gelu_new" if config.activation == "gelu_tanh" else "gelu"
    if name == "gpt2":
        values |= {"activation_function": activation, "n_inner": None, "n_ctx": config.block_size}
        values |= {"embd_pdrop": config.dropout, "resid_pdrop": config.dropout, "attn_pdrop": config.attn_dropout}
    elif name == "gpt_neox":
        values |= {"hidden_act": activation, "intermediate_size": 4 * config.n_embd}
        values |= {"hidden_dropout": config.dropout, "attention_dropout": config.attn_dropout}
        values |= {"rotary_pct": 1.0, "rotary_emb_base": 10000}  # in transformers 4; 5 reads rope_parameters
        rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
        values |= {"rope_parameters": rope}
    elif name == "mpt":
        values |= {"emb_pdrop": config.dropout, "resid_pdrop": config.dropout}
        values |= {"attn_config": {**MPT_ATTENTION, "attn_pdrop": 0}}  # 5.24 accepts only integers here
    return values


def to_transformers(weights: dict[str, torch.Tensor], config: GPTConfig) -> dict[str, torch.Tensor]:
    """Return weights with the names and layouts of the architecture for config, without those that are tied."""
    name, exported = find_name(config), {}
    for key, weight in weights.items():
        if key == "lm_head.weight" and config.tie_weights:
            continue
        exported[_rename(key, NAMES[name])] = _to_layout(key, weight, name, config.n_head)
        is_normalized = key.startswith(("transformer.h.", "transformer.ln_f.")) and key.endswith(".weight")
        if is_normalized and not config.bias and name in ("gpt2", "gpt_neox"):  # which have biases
            exported[_rename(key.removesuffix("weight") + "bias", NAMES[name])] = torch.zeros(weight.shape[0])
    return exported


def from_transformers(key: str, weight: torch.Tensor, name: str, n_head: int) -> tuple[str, torch.Tensor]:
    """Return (our name, the weight in our layout) of a weight of the architecture with this name."""
    key = _rename(key, {theirs: ours for ours, theirs in NAMES[name].items()})
    key = key if key.startswith(("transformer.", "lm_head.")) else f"transformer.{key}"
    if name == "gpt2" and key.endswith(TRANSPOSED_WEIGHTS) and weight.dim() == 2:
        weight = weight.t()
    if name == "gpt_neox" and ".attn.c_attn." in key and n_head and weight.shape[0] % (3 * n_head) == 0:
        weight = weight.unflatten(0, (n_head, 3, -1)).transpose(0, 1).flatten(0, 2)
    return key, weight.contiguous()


def _rename(key: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        if old.startswith(".") and old in key:
            key = key.replace(old, new, 1)
        elif key.startswith(old):
            key = new + key.removeprefix(old)
    return key


def _to_layout(key: str, weight: torch.Tensor, name: str, n_head: int) -> torch.Tensor:
    if name == "gpt2" and key.endswith(TRANSPOSED_WEIGHTS):
        weight = weight.t()
    if name == "gpt_neox" and ".attn.c_attn." in key:  # query, key and value of one head after another
        weight = weight.unflatten(0, (3, n_head, -1)).transpose(0, 1).flatten(0, 2)
    return weight.contiguous()
