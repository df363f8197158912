"""Read LoRA adapters from checkpoints and PEFT directories, check them against their base, and write PEFT directories.

    checkpoint = load("directory")                      # has the keys model and lora, like an adapter's ckpt.pt
    load_adapter(model, checkpoint, "directory")        # adds it to its base
    save(model, checkpoint, "directory")                # PEFT can load it onto a GPT2LMHeadModel

None of them imports peft. PEFT's A (r, in) and B (out, r) are those of a Linear layer, although GPT-2 stores transposed
weights there (fan_in_fan_out), and c_attn is a single layer for queries, keys and values in both libraries.
"""

import math
import os
from typing import Any

import torch

from configurator import UserError
from dongpt.checkpoint import lora
from dongpt.checkpoint.foreign import FORMAT_VERSION
from dongpt.checkpoint.hugging_face import (
    ADAPTER_CONFIG_FILE,
    EXPORT_RECORD_FILE,
    WEIGHT_FILES,
    _read,
    _read_tokenizer,
    hash_files,
    write_json,
)
from dongpt.checkpoint.legacy import grow_vocabulary, position_scheme
from model import GPT

INFO_TYPES: dict[str, type] = {"alpha": float, "base": str, "sha256": str, "first_new_id": int, "blocks": list}
ADAPTER_WEIGHTS_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PEFT_PREFIX = "base_model.model."
EMBEDDINGS = ("transformer.wte.weight", "lm_head.weight")
# Keys of adapter_config.json that do not change what the weights in the file mean.
NEUTRAL_PEFT_KEYS = (
    *(
        "peft_type",
        "peft_version",
        "task_type",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "auto_mapping",
    ),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "fan_in_fan_out", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "bias", "megatron_core", "qalora_group_size"),
    *("ensure_weight_tying", "loftq_config", "init_lora_weights"),
)
NEUTRAL_INIT = (None, True, False, "gaussian", "eva", "orthogonal")  # the others also change the weights of the base


def is_peft_adapter(path: str) -> bool:
    """Return True if path is a directory that PEFT wrote."""
    return os.path.exists(os.path.join(path, ADAPTER_CONFIG_FILE))


def check_info(info: Any, path: str) -> dict:
    """Return an adapter checkpoint's "lora" dict. Raises UserError if it is damaged."""
    wrong = [key for key in INFO_TYPES if key in info and type(info[key]) is not INFO_TYPES[key]]
    missing = [key for key in ("alpha", "base") if key not in info]
    numbers = [info.get("first_new_id", 0), *info.get("blocks", [])] if not wrong else []
    if wrong or missing or not all(type(n) is int and 0 <= n < 2**31 for n in numbers) or not 0 < info["alpha"] < 1e9:
        raise UserError(f"{path} is damaged (lora: invalid {', '.join(wrong + missing) or 'values'}): use another file")
    return info


def load_adapter(model: GPT, checkpoint: dict, path: str):
    """Add the adapter in checkpoint to model, its base. Raises UserError that lists every layer that does not fit."""
    info, tensors = checkpoint["lora"], dict(checkpoint["model"])
    _convert_embeddings(model, tensors, info, path)
    layers = lora.linear_layers(model)
    ranks = {
        name.removesuffix(".lora_A"): len(a) for name, a in tensors.items() if name.endswith(".lora_A") and a.dim()
    }
    kinds = {name.split(".", 3)[3] for name in ranks.keys() & layers.keys()}  # such as attn.c_attn
    blocks = {f"transformer.h.{i}" for i in info.get("blocks", range(model.config.n_layer))}
    expected: dict[str, tuple] = {}
    for name, layer in layers.items():
        block, kind = name.rsplit(".", 2)[0], name.split(".", 3)[3]
        if kind in kinds and block in blocks:
            rank = ranks.get(name, 1)
            expected |= {f"{name}.lora_A": (rank, layer.in_features), f"{name}.lora_B": (layer.out_features, rank)}
    new_rows = tensors.get("transformer.wte.new_rows")
    first_id, n_new_ids = info.get("first_new_id", 0), 0 if new_rows is None else len(new_rows)
    if n_new_ids and first_id + n_new_ids <= model.config.vocab_size:
        names = ["transformer.wte.new_rows"] + ["lm_head.new_rows"] * (not model.config.tie_weights)
        expected |= dict.fromkeys(names, (n_new_ids, model.config.n_embd))
    problems = {
        "unexpected": tensors.keys() - expected,
        "missing": expected.keys() - tensors,
        "of another size": {name for name in expected.keys() & tensors if tensors[name].shape != expected[name]},
    }
    if not ranks or any(problems.values()) or not all(tensor.is_floating_point() for tensor in tensors.values()):
        texts = [f"{_shortened(sorted(names))} {problem}" for problem, names in problems.items() if names]
        remedy = "pass the model that it was trained on with --base=PATH"
        raise UserError(
            f"{path} is not a LoRA adapter for {info['base']} ({'; '.join(texts) or 'no low-rank matrices'}): {remedy}"
        )
    lora.add_adapter(model, ranks, info, n_new_ids)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(tensors[name])


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _convert_embeddings(model: GPT, tensors: dict, info: dict, path: str):
    """Replace the embeddings that PEFT stores for an extended vocabulary with the rows that differ from the base's."""
    stored = {name: tensors.pop(name) for name in EMBEDDINGS if name in tensors}
    if not stored:
        return
    n_old, n_rows, is_tied = (
        len(model.transformer.wte.weight),
        len(next(iter(stored.values()))),
        model.config.tie_weights,
    )
    fits = n_rows >= n_old and all(weight.shape == (n_rows, model.config.n_embd) for weight in stored.values())
    if not fits or is_tied and not (len(stored) == 2 and torch.equal(*stored.values())):
        problem = f"{path} contains {' and '.join(stored)}, which do not fit the tied or smaller ones of {info['base']}"
        raise UserError(f"{problem}: in PEFT, merge it with merge_and_unload(), and save the result")
    is_changed = [(w[:n_old].float() != model.get_parameter(name)).any(1) for name, w in stored.items()]
    changed_rows = torch.stack(is_changed).any(0).nonzero()
    info["first_new_id"] = int(changed_rows[0]) if len(changed_rows) else n_old
    if n_rows > n_old:
        grow_vocabulary(model, n_rows)
    for name in EMBEDDINGS[:1] if is_tied else stored:
        if info["first_new_id"] < n_rows:
            tensors[name.replace("weight", "new_rows")] = stored[name][info["first_new_id"] :]


def load(directory: str) -> dict:
    """Load an adapter checkpoint, without model_args, from a PEFT directory. Raises UserError if that is not LoRA."""
    info, settings = _read_peft_config(directory)
    if any(os.path.exists(os.path.join(directory, file)) for file in WEIGHT_FILES):
        remedy = "move adapter_* out of the directory to load the model, or the model to load the adapter"
        raise UserError(f"{directory} contains a model and a PEFT adapter: {remedy}")
    names = [name for name in ADAPTER_WEIGHTS_FILES if os.path.exists(os.path.join(directory, name))]
    if not names:
        remedy = f"put {ADAPTER_WEIGHTS_FILES[0]} next to {ADAPTER_CONFIG_FILE}"
        raise UserError(f"{directory} contains no adapter weights: {remedy}")
    weights = {}
    for key, weight in _read(directory, names[0]).items():
        key = key.removeprefix(PEFT_PREFIX)
        key = key if key.startswith(("transformer.", "lm_head.")) else f"transformer.{key}"
        weights[key.removesuffix(".weight") if ".lora_" in key else key] = weight
    checkpoint = {"model": weights, "lora": info, "config": settings, "format_version": FORMAT_VERSION}
    tokenizer = _read_tokenizer(directory, 0)
    return {**checkpoint, "tokenizer": tokenizer} if tokenizer else checkpoint


def _read_peft_config(directory: str) -> tuple[dict, dict]:
    """Return an adapter checkpoint's "lora" and "config". Raises UserError for variants of LoRA and other methods."""
    config: dict[str, Any] = {k: v for k, v in _read(directory, ADAPTER_CONFIG_FILE).items() if v or type(v) is int}
    kind, rank, init = config.get("peft_type"), config.get("r"), config.get("init_lora_weights")
    alpha: Any = config.get("lora_alpha")
    unsupported = [f"{key}={value!r}" for key, value in config.items() if key not in NEUTRAL_PEFT_KEYS]
    unsupported += [f"init_lora_weights={init!r}"] if init not in NEUTRAL_INIT else []
    unsupported += [f"bias={config['bias']!r}"] if config.get("bias", "none") != "none" else []
    unsupported += ["use_rslora with rank_pattern"] if "use_rslora" in config and "rank_pattern" in config else []
    unsupported += [f"peft_type={kind!r}"] if kind != "LORA" else []
    unsupported += [f"r={rank!r}, lora_alpha={alpha!r}"] if not (type(rank) is int and rank > 0 and alpha) else []
    if unsupported:
        remedy = "in PEFT, merge it with merge_and_unload(), and save the result with save_pretrained()"
        raise UserError(f"{directory} is not an adapter of plain LoRA ({', '.join(unsupported)}): {remedy}")
    if type(alpha) in (int, float):
        alpha = float(alpha * (math.sqrt(rank) if rank and "use_rslora" in config else 1))
    info = {"alpha": alpha, "base": config.get("base_model_name_or_path", "")}
    if (blocks := config.get("layers_to_transform")) is not None:
        info["blocks"] = [blocks] if type(blocks) is int else blocks
    settings = {"lora_rank": rank, "lora_alpha": alpha, "lora_dropout": config.get("lora_dropout", 0.0)}
    return check_info(info, os.path.join(directory, ADAPTER_CONFIG_FILE)), settings


def save(model: GPT, checkpoint: dict, directory: str, settings_hash: str = ""):
    """Write the adapter in checkpoint to a PEFT directory. model is its base with the adapter merged into it."""
    from safetensors.torch import save_file

    config, info = model.config, checkpoint["lora"]
    required = ("model_type", config.model_type, "gpt"), ("ngrams", config.ngrams, 1)
    for name, value, expected in (*required, ("pos_embd", position_scheme(config), "default")):
        if value != expected:
            raise UserError(f"GPT-2's architecture in PEFT has no {name}={value}: use --to=merged instead of --to=peft")
    weights = {f"{PEFT_PREFIX}{k}.weight": w.contiguous() for k, w in checkpoint["model"].items() if ".lora_" in k}
    ranks = {
        name.removeprefix(PEFT_PREFIX).rsplit(".", 2)[0]: len(w) for name, w in weights.items() if ".lora_A" in name
    }
    if "first_new_id" in info:  # as PEFT does for a vocabulary that resize_token_embeddings() has extended
        weights |= {PEFT_PREFIX + name: model.get_parameter(name).detach().clone() for name in EMBEDDINGS}
    os.makedirs(directory, exist_ok=True)
    save_file(weights, os.path.join(directory, ADAPTER_WEIGHTS_FILES[0]), metadata={"format": "pt"})
    rank = max(ranks.values())
    adapter_config = {
        **dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=info["base"], inference_mode=True),
        **dict(r=rank, lora_alpha=info["alpha"], rank_pattern={name: r for name, r in ranks.items() if r != rank}),
        "lora_dropout": checkpoint.get("config", {}).get("lora_dropout", 0.0),
        "target_modules": sorted({name.split(".", 3)[3] for name in ranks}),
        **({"layers_to_transform": info["blocks"], "layers_pattern": "h"} if "blocks" in info else {}),
        **dict(bias="none", fan_in_fan_out=True),  # GPT-2's Conv1D stores transposed weights
    }
    write_json(adapter_config, directory, ADAPTER_CONFIG_FILE)
    record = {"mark": settings_hash, "tokenizer": checkpoint.get("tokenizer"), "files": hash_files(directory)}
    write_json(record, directory, EXPORT_RECORD_FILE)
