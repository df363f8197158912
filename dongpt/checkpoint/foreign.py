"""Convert other trainers' checkpoints to our layout in memory, and validate everything that a checkpoint contains.

Supports all versions of nanoGPT, three versions of EDS (nanoGPT's layout with pos_embd), nanoGPT+ (a bare state dict of
a GPT or bigram model, without hyperparameters), and bare state dicts with nanoGPT's names. Layouts are recognized by
their keys and tensor shapes, never by file names.
"""

import glob
import os
import pickle
import re
import sys
import types
from dataclasses import asdict, fields
from typing import Any

import torch

from configurator import ROOT, UserError, build_config
from dongpt.checkpoint.legacy import LegacyConfig, build_meta_model, build_model
from dongpt.runtime import print0
from dongpt.text.bins import read_meta
from dongpt.text.tokenizers import UNSUPPORTED_TOKENIZER, from_dict
from model import GPT, RELATIVE_TABLE, GPTConfig

FORMAT_VERSION = 1
MAX_MODEL_ARG = 2**28  # larger values in model_args overflow a tensor's size in bytes
VALUE_TYPES = dict(format_version=int, iter_num=int, model_args=dict, config=dict, optimizer=dict, lora=dict)
CONFIG_TYPES = dict(dataset=str, data_dir=str, document_mask=bool)
ADAMW_STATE_KEYS = ("step", "exp_avg", "exp_avg_sq")  # keys in a parameter's optimizer state
STATE_KEYS_BY_OPTIMIZER = {"muon": ("momentum",), "rows": ("square", "count")}  # for groups with these rules
DROPPED_SETTINGS = ("device", "dtype", "compile", "backend", "pos_embd")  # machine settings; EDS's pos_embd
KNOWN_LAYOUTS = (
    "donGPT and nanoGPT (model, model_args), EDS (the same, plus pos_embd), nanoGPT+ (token_embedding_table.weight, "
    "transformer_blocks.N...), and state dicts with nanoGPT's names (transformer.wte.weight, ...)"
)
NANOGPT_PLUS_SIZES = {
    "small": dict(n_layer=4, n_head=4, n_embd=128, block_size=64),
    "medium": dict(n_layer=6, n_head=6, n_embd=384, block_size=256),
    "large": dict(n_layer=12, n_head=12, n_embd=516, block_size=384),
}
NANOGPT_PLUS_WEIGHT_NAMES = {  # nanoGPT+ name: GPT-2 name, replaced in this order
    "token_embedding_table.": "transformer.wte.",
    "positional_embedding_table.": "transformer.wpe.",
    "transformer_blocks.": "transformer.h.",
    ".self_attention.causal_self_attention.": ".attn.c_attn.",
    ".self_attention.projection.": ".attn.c_proj.",
    ".feed_forward.c_fc.": ".mlp.c_fc.",
    ".feed_forward.projection.": ".mlp.c_proj.",
    ".layer_norm_1.": ".ln_1.",
    ".layer_norm_2.": ".ln_2.",
    "layer_norm_final.": "transformer.ln_f.",
    "language_model_head.": "lm_head.",
}


def upgrade(checkpoint: dict, path: str, **extra_args) -> dict:
    """Convert a checkpoint from any supported layout to the current one and validate it.

    extra_args supply model_args that the checkpoint may lack. Raises UserError if the layout is unknown, a value is
    invalid, a hyperparameter is missing, or extra_args contradict the checkpoint.
    """
    if not isinstance(checkpoint, dict):
        problem = f"{path} contains an object of type {type(checkpoint).__name__}, not a checkpoint"
        raise UserError(f"{problem}; supported layouts are {KNOWN_LAYOUTS}")
    if is_state_dict(checkpoint.get("model")) and isinstance(checkpoint.get("model_args"), dict):
        checkpoint = {key: value for key, value in checkpoint.items() if value is not None}
        check_value_types(checkpoint, path)
        checkpoint["model"] = clean_keys(checkpoint["model"])
        if "format_version" not in checkpoint:
            checkpoint = _convert_nanogpt(checkpoint, path, extra_args)
    else:
        checkpoint = _convert_state_dict(checkpoint, path, extra_args)
    config = parse_model_args(checkpoint["model_args"], path)
    config_values = asdict(config)
    if mismatches := {key: value for key, value in extra_args.items() if config_values.get(key) != value}:
        problems = (f"{k}={v!r} contradicts {path}, which has {config_values.get(k)!r}" for k, v in mismatches.items())
        raise UserError(f"{'; '.join(problems)}: remove {', '.join(mismatches)}")
    if checkpoint.get("tokenizer", UNSUPPORTED_TOKENIZER) != UNSUPPORTED_TOKENIZER:
        try:
            n_tokens = from_dict(checkpoint["tokenizer"], load_gpt2=False, load_template=False).vocab_size
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        if n_tokens > (config.vocab_size or 0):
            problem = f"{path} has a tokenizer with {n_tokens} tokens, but a model vocabulary of {config.vocab_size}"
            raise UserError(f"{problem}: use another file")
    return {**checkpoint, "format_version": FORMAT_VERSION}


def _has_type(value: Any, type_: type) -> bool:
    """Return True if value has this type. The keys of a dict must be str, and an int must be in [0, 2**63)."""
    if type_ is int:
        return type(value) is int and 0 <= value < 2**63
    is_dict = isinstance(value, dict) and all(isinstance(key, str) for key in value)
    return is_dict if type_ is dict else type(value) is type_


def check_value_types(checkpoint: dict, path: str):
    """Raise UserError if a value needed for loading has the wrong type or is out of range.

    Weights and model_args are checked when they are used. dongpt/checkpoint/run.py checks the values for resuming.
    """
    version = checkpoint.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise UserError(f"{path} was written by a newer version of donGPT: update donGPT")

    def invalid_keys(values: dict, types: dict[str, type]) -> list[str]:
        return [key for key in types if key in values and not _has_type(values[key], types[key])]

    if keys := invalid_keys(checkpoint, VALUE_TYPES) or invalid_keys(checkpoint.get("config", {}), CONFIG_TYPES):
        raise UserError(f"{path} is damaged (invalid {', '.join(keys)}): use another checkpoint")


def parse_model_args(model_args: dict, path: str) -> GPTConfig:
    """Return the architecture described by model_args. Raises UserError if a key, type or size is invalid."""
    config_class = LegacyConfig if "legacy" in model_args else GPTConfig
    if unknown := sorted(model_args.keys() - {field.name for field in fields(config_class)}):
        raise UserError(f"{path} has unknown model_args ({', '.join(unknown)}): update donGPT, or use another file")
    if "n_head" not in model_args and model_args.get("model_type") != "bigram":  # cannot be inferred from shapes
        command = f"python ckpt_update.py {path} NEW.pt --n_head=N (or --size=small|medium|large)"
        raise UserError(f"{path} does not contain n_head: convert it with {command}, or pass n_head=N to load_model")
    try:
        config = build_config(config_class, model_args, "model_args")
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} has invalid hyperparameters ({reason}): use another file") from error
    sizes = {**asdict(config), "ngram_rows": (config.ngrams - 1) * config.ngram_rows}
    too_large = [f"{key}={size}" for key, size in sizes.items() if type(size) is int and size > MAX_MODEL_ARG]
    if too_large or config.vocab_size is None:
        raise UserError(f"{path} is damaged (model_args: {', '.join(too_large) or 'no vocab_size'}): use another file")
    return config


def load_weights(config: GPTConfig, weights: dict, path: str) -> GPT:
    """Build a model from config and load the weights read from path. Raises UserError that lists every mismatch."""
    if config.model_type == "gpt" and config.n_layer > len(weights):  # too many missing weights to list
        raise UserError(f"{path} has {len(weights)} weights, too few for n_layer={config.n_layer}: use another file")
    if names := [name for name, tensor in weights.items() if not tensor.is_floating_point()]:
        raise UserError(f"{path}: {', '.join(names)} must be floating-point tensors; use another file")
    try:
        # on the meta device, so that wrong sizes allocate no memory
        meta_weights = {name: tensor.to("meta") for name, tensor in weights.items()}
        build_meta_model(config).load_state_dict(meta_weights)
    except RuntimeError as error:
        mismatches = " ".join(str(error).partition(":")[2].split())
        problem = f"{path}: the weights do not match the hyperparameters in the file or the ones that you passed"
        raise UserError(f"{problem}: {mismatches}") from error
    model = build_model(config)
    model.load_state_dict(weights)
    return model


def is_state_dict(content) -> bool:
    """Return True if content is a non-empty dict that maps names to dense tensors."""
    return _has_type(content, dict) and 0 < len(content) == sum(
        torch.is_tensor(t) and t.layout == torch.strided and not t.is_meta for t in content.values()
    )


def clean_keys(state_dict: dict) -> dict:
    """Remove the prefixes added by torch.compile and DDP, and the mask buffers of old nanoGPT, from a state dict."""
    pattern, mask_suffixes = r"^((module|_orig_mod)\.)+", (".attn.bias", ".attn.masked_bias")
    return {re.sub(pattern, "", name): t for name, t in state_dict.items() if not name.endswith(mask_suffixes)}


def _convert_nanogpt(checkpoint: dict, path: str, extra_args: dict) -> dict:
    """Convert a nanoGPT or EDS checkpoint to our layout. EDS checkpoints have pos_embd or a table of distances."""
    old_weights, settings = checkpoint["model"], checkpoint.get("config", {})
    args, weights = dict(checkpoint["model_args"]), dict(old_weights)
    pos_scheme = args.pop("pos_embd", "default")
    if pos_scheme not in ("default", "rope", "relative"):
        raise UserError(f"{path} has EDS's layout, but EDS does not support its pos_embd: use another file")
    if pos_scheme != "relative":
        weights.pop(RELATIVE_TABLE, None)  # EDS always stores this table but uses it only for relative
    if pos_scheme != "default":
        args["legacy"] = f"eds-{pos_scheme}"
        weights.pop("transformer.wpe.weight", None)  # stored but not used
    tie_head(weights, args)
    args = {**infer_model_args(old_weights), **extra_args, **args}
    config = parse_model_args(args, path)
    settings = {key: value for key, value in settings.items() if key not in DROPPED_SETTINGS}
    new_checkpoint = {**checkpoint, "model": weights, "model_args": args, "config": settings}
    if optimizer := new_checkpoint.pop("optimizer", None):
        orders, new_groups = _known_param_orders(old_weights, config.tie_weights), parameter_groups(config, optimizer)
        matches = [(g, s) for g in orders if (s := remap_optimizer_state(optimizer, g, new_groups, old_weights))]
        if not matches:
            print0(f"{path}: ignoring the optimizer state, which does not match the parameters", file=sys.stderr)
        else:
            groups, new_checkpoint["optimizer"] = matches[0]
            if "transformer.wte.weight" not in groups[0]:  # before May 2023, when nanoGPT used the tanh approximation
                args.setdefault("activation", "gelu_tanh")
    return new_checkpoint


def infer_model_args(weights: dict) -> dict:
    """Infer all hyperparameters except n_head from the names and shapes of nanoGPT's weights."""
    table, positions = (weights.get(f"transformer.{name}.weight", torch.empty(0)) for name in ("wte", "wpe"))
    if table.dim() != 2:
        return {}
    (vocab_size, n_embd), block_size = table.shape, len(positions) if positions.dim() else 0
    n_layer = len({name.split(".")[2] for name in weights if name.startswith("transformer.h.")})
    sizes = dict(vocab_size=vocab_size, n_embd=n_embd, n_layer=n_layer, block_size=block_size)
    return {**sizes, "dropout": 0.0, "bias": any(name.endswith(".bias") for name in weights)}


def tie_head(weights: dict, args: dict):
    """Add the output head or the embedding if only one of them is stored. If they differ, set tie_weights=False."""
    table, head = weights.get("transformer.wte.weight"), weights.get("lm_head.weight")
    if table is not None and head is None:
        weights["lm_head.weight"] = table
    elif head is not None and table is None:
        weights["transformer.wte.weight"] = head
    elif table is not None and head is not None and not torch.equal(table, head):
        args["tie_weights"] = False  # from before nanoGPT tied them


def parameter_groups(config: GPTConfig, optimizer: dict) -> list[list[str]]:
    """Return the parameter names by group for an optimizer with this state_dict, which may be damaged."""
    groups = optimizer.get("param_groups")
    rules = [group.get("rule") for group in groups if isinstance(group, dict)] if isinstance(groups, list) else []
    return [*build_meta_model(config).parameter_groups("muon" in rules).values()]


def _known_param_orders(weights: dict, is_tied: bool) -> list[list[list[str]]]:
    """Return the possible orders of parameter names, by group, in nanoGPT's and EDS's optimizers."""
    names = [name for name in weights if not (is_tied and name == "lm_head.weight")]
    matrices, vectors = ([n for n in names if (weights[n].dim() >= 2) == is_matrix] for is_matrix in (True, False))
    linear = sorted(name for name in matrices if name.startswith(("transformer.h.", "lm_head.")))
    return [
        [matrices, vectors],
        [[name for name in matrices if name != RELATIVE_TABLE], vectors],  # EDS, with the table added to an older file
        [linear, sorted(set(names) - set(linear))],  # nanoGPT before May 2023: no weight decay on embeddings
    ]


def remap_optimizer_state(optimizer: dict, old_groups: list, new_groups: list, weights: dict) -> dict | None:
    """Reorder an optimizer's state_dict from old_groups of parameter names to new_groups.

    Returns None if the state_dict is damaged or does not match old_groups and the shapes of weights.
    """
    states = {}
    try:
        for group, names in zip(optimizer["param_groups"], old_groups, strict=True):
            keys = STATE_KEYS_BY_OPTIMIZER.get(str(group.get("rule")), ADAMW_STATE_KEYS)
            for i, name in zip(group["params"], names, strict=True):
                if (state := optimizer["state"].get(int(i))) is not None:
                    shape = weights[name].shape
                    shapes = {"step": (), "square": shape[:1], "count": shape[:1]}
                    if any(state[key].shape != shapes.get(key, shape) for key in keys):
                        return None
                    states[name] = state
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    new_indices = {name: i for i, name in enumerate(sum(new_groups, []))}
    settings = [*optimizer["param_groups"], *optimizer["param_groups"][:1]]  # an extra group contains matrices
    groups = [{**group, "params": [new_indices[name] for name in names]} for group, names in zip(settings, new_groups)]
    new_states = {new_indices[name]: state for name, state in states.items() if name in new_indices}
    return {"state": new_states, "param_groups": groups}


def _convert_state_dict(checkpoint: dict, path: str, extra_args: dict) -> dict:
    """Convert a nanoGPT+ or nanoGPT state dict. Hyperparameters come from tensor shapes and extra_args."""
    weights = clean_keys(checkpoint) if is_state_dict(checkpoint) else {}
    args: dict = {}
    has_blocks = any(name.startswith("transformer_blocks.") for name in weights)
    if "token_embedding_table.weight" in weights and (len(weights) == 1 or has_blocks):  # nanoGPT+'s
        if any(".lora_" in name for name in weights):
            print0(f"{path}: ignoring the LoRA matrices, which are already merged into the weights", file=sys.stderr)
        weights = {name: w for name, w in weights.items() if not (name.endswith(".tril") or ".lora_" in name)}
        for old, new in NANOGPT_PLUS_WEIGHT_NAMES.items():
            weights = {name.replace(old, new): weight for name, weight in weights.items()}
        args["activation"] = "gelu_tanh"
    args.update(infer_model_args(weights))
    if not args.get("n_embd"):
        layout = ", ".join(sorted({re.sub(r"\.\d+\.", ".N.", str(key)) for key in checkpoint})) or "nothing"
        raise UserError(f"{path} has an unknown layout: it contains {layout}; supported layouts are {KNOWN_LAYOUTS}")
    if len(weights) == 1:
        args = {"model_type": "bigram", "vocab_size": args["vocab_size"]}
    else:
        tie_head(weights, args)
        c_attn, n_embd = weights.get("transformer.h.0.attn.c_attn.weight"), args["n_embd"]
        if c_attn is not None and c_attn.shape == (n_embd, 3 * n_embd):  # transposed, as in Conv1D
            raise UserError(f"{path} contains Hugging Face weights: pass its directory, including config.json")
    return {"model": weights, "model_args": {**args, **extra_args}}  # load_weights checks the shapes


def find_tokenizer(checkpoint: dict, path: str) -> dict | None:
    """Look for a checkpoint's missing tokenizer in meta files next to it and its data, and in nanoGPT+ files.

    Otherwise, returns GPT-2's tokenizer for a vocabulary of GPT-2's size, as nanoGPT does, and None for any other size.
    """
    vocab_size, config = checkpoint["model_args"].get("vocab_size"), checkpoint.get("config", {})
    dataset, data_dir = config.get("dataset", ""), config.get("data_dir", "")
    directory, subdir = os.path.dirname(os.path.abspath(path)), data_dir or dataset and os.path.join("data", dataset)
    # the data may be in our repository or in another one
    roots = [*([] if data_dir else [ROOT]), os.getcwd(), os.path.dirname(directory)]
    for folder in [directory, *(os.path.join(root, subdir) for root in roots if subdir)]:
        if (meta := read_meta(folder)).get("vocab_size") == vocab_size:
            return meta["tokenizer"]
    if "iter_num" not in checkpoint and (characters := _nanogpt_plus_characters(path, vocab_size)):
        return {"kind": "char", "characters": characters}
    return {"kind": "gpt2"} if vocab_size in (50257, 50304) else None


def _nanogpt_plus_characters(path: str, vocab_size: int) -> str:
    """Return the characters of the pickled nanoGPT+ tokenizer for a checkpoint, or '' if there is none.

    Searches the checkpoint's directory and the directory tokenizers/ in it. Prefers the file that nanoGPT+
    names after the checkpoint, and otherwise uses the only vocabulary of the right size.
    """
    directory, name = os.path.split(os.path.abspath(path))
    tokenizer_name = "tokenizer_" + name.partition(".")[0].replace("_model", "") + ".pkl"  # tokenizer_gpt_small
    candidates: dict[str, str] = {}
    for pattern in ("tokenizer*.pkl", "tokenizers/tokenizer*.pkl"):
        for file in sorted(glob.glob(os.path.join(glob.escape(directory), pattern))):
            characters = read_nanogpt_plus_tokenizer(file)
            if len(characters) == vocab_size:
                candidates.setdefault(os.path.basename(file), characters)
    return candidates.get(tokenizer_name) or (candidates.popitem()[1] if len(set(candidates.values())) == 1 else "")


class _TokenizerUnpickler(pickle.Unpickler):
    """Unpickler for plain values and nanoGPT+'s tokenizer. It rejects everything else without running any code."""

    def find_class(self, module, name):
        if (module, name) == ("src.data.tokenizer", "CharTokenizer"):
            return types.SimpleNamespace  # the pickle sets its attributes
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def read_nanogpt_plus_tokenizer(path: str) -> str:
    """Return a pickled nanoGPT+ tokenizer's characters by id. Raises UserError if the file contains anything else."""
    try:
        with open(path, "rb") as file:
            itos = vars(_TokenizerUnpickler(file).load())["itos"]
        return "".join([itos[i] for i in range(len(itos))])
    except Exception as error:  # a damaged pickle can raise almost any exception
        reason = f"{path} is not a plain nanoGPT+ tokenizer and was not run ({error})"
        raise UserError(f"{reason}: move it to another directory") from error
