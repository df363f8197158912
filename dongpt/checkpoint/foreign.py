"""Checkpoints of other trainers, converted in memory to our layout; checks on everything that a checkpoint holds.

Known are nanoGPT's (of all ages), EDS's (nanoGPT's with a pos_embd, three generations), nanoGPT+'s (a bare state dict
without hyper-parameters, GPT or bigram) and bare state dicts with nanoGPT's names. A layout is recognised by its keys
and shapes, never by the name of the file.
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

from configurator import ROOT, UserError, build
from dongpt.checkpoint.legacy import LegacyConfig, build_model
from dongpt.runtime import print0
from dongpt.text.bins import read_meta
from dongpt.text.tokenizers import FOREIGN, check_dict
from model import GPT, RELATIVE, GPTConfig

FORMAT_VERSION = 1
MAX_SIZE = 2**28  # for numbers in model_args: larger ones overflow a tensor's number of bytes
KINDS = {"format_version": int, "iter_num": int, "model_args": dict, "config": dict, "optimizer": dict}
CONFIG_KINDS = {"dataset": str, "data_dir": str, "document_mask": bool}
MACHINE_KEYS = ("device", "dtype", "compile", "backend")  # settings that describe the machine of an old run
KNOWN = (
    "donGPT's and nanoGPT's (model, model_args), EDS's (the same with pos_embd), nanoGPT+'s "
    "(token_embedding_table.weight, transformer_blocks.N...), and state dicts with nanoGPT's names "
    "(transformer.wte.weight, ...)"
)
NANOGPT_PLUS_SIZES = {
    "small": dict(n_layer=4, n_head=4, n_embd=128, block_size=64),
    "medium": dict(n_layer=6, n_head=6, n_embd=384, block_size=256),
    "large": dict(n_layer=12, n_head=12, n_embd=516, block_size=384),
}
NANOGPT_PLUS_NAMES = (  # its names and GPT-2's, in the order in which they are replaced
    ("token_embedding_table.", "transformer.wte."),
    ("positional_embedding_table.", "transformer.wpe."),
    ("transformer_blocks.", "transformer.h."),
    (".self_attention.causal_self_attention.", ".attn.c_attn."),
    (".self_attention.projection.", ".attn.c_proj."),
    (".feed_forward.c_fc.", ".mlp.c_fc."),
    (".feed_forward.projection.", ".mlp.c_proj."),
    (".layer_norm_1.", ".ln_1."),
    (".layer_norm_2.", ".ln_2."),
    ("layer_norm_final.", "transformer.ln_f."),
    ("language_model_head.", "lm_head."),
)


def upgrade(checkpoint: dict, path: str, **given) -> dict:
    """A checkpoint of any known layout in the current one, checked; given are hyper-parameters that it may lack.

    A checkpoint that is in the current format already is returned as it is. Raises UserError for an unknown layout, for
    values that cannot be right, and for a given hyper-parameter that is missing or contradicts the file.
    """
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} is no checkpoint: it holds a {type(checkpoint).__name__}; known are {KNOWN}")
    if not (is_state_dict(checkpoint.get("model")) and isinstance(checkpoint.get("model_args"), dict)):
        return {**_from_state_dict(checkpoint, path, given), "format_version": FORMAT_VERSION}
    if "format_version" not in checkpoint:
        checkpoint = {key: value for key, value in checkpoint.items() if value is not None}
        check_values(checkpoint, path)
        return {**_from_nanogpt(checkpoint, path, given), "format_version": FORMAT_VERSION}
    check_values(checkpoint, path)
    config = parse_model_args(checkpoint["model_args"], path)
    check_tokenizer(checkpoint.get("tokenizer"), config.vocab_size or 0, path)
    check_given(given, asdict(config), path)
    return checkpoint


# ----------------------------------------------------------------------------------------------------------------------
# checks of what a file says


def _is_dict(value) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _is_kind(value: Any, kind: type) -> bool:
    """Whether a value is of this type: a dict with str keys, an int that is not negative."""
    if kind is int:
        return type(value) is int and 0 <= value < 2**63
    return _is_dict(value) if kind is dict else type(value) is kind


def check_values(checkpoint: dict, path: str):
    """Raise UserError if a value that loading reads has an impossible type or size.

    Weights and model_args are checked when they are used; what only a resumed run reads, by dongpt/checkpoint/run.py.
    """
    version: Any = checkpoint.get("format_version", FORMAT_VERSION)
    config: Any = checkpoint.get("config")
    if type(version) is int and version > FORMAT_VERSION:
        raise UserError(f"{path} was written by a newer donGPT, in format {_show(version)}: update donGPT")
    places: Any = ((checkpoint, KINDS), (config if _is_dict(config) else {}, CONFIG_KINDS))
    problems = [
        f"{key} is {_show(place[key])}"
        for place, kinds in places
        for key, kind in kinds.items()
        if key in place and not _is_kind(place[key], kind)
    ]
    if problems:
        raise UserError(f"{path} is damaged ({', '.join(problems)}): use another checkpoint")


def check_tokenizer(description: dict | None, vocab_size: int, path: str):
    """Raise UserError unless a file's tokenizer is one that a model with vocab_size ids can have."""
    if description is None or description == FOREIGN:
        return
    try:
        n_tokens = check_dict(description)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if n_tokens > vocab_size:
        raise UserError(f"{path} has a tokenizer of {n_tokens} tokens, and a model of {vocab_size}: use another file")


def _show(value) -> str:
    """A short value as it is, the type of any other."""
    is_short = isinstance(value, float) or isinstance(value, int) and abs(value) < 2**63
    return repr(value) if is_short or isinstance(value, str) and len(value) < 50 else f"a {type(value).__name__}"


def check_given(given: dict, has: dict, path: str):
    """Raise UserError if given hyper-parameters contradict those that the file at path has."""
    if wrong := [key for key, value in given.items() if has.get(key, value) != value]:
        problems = "; ".join(f"{key}={given[key]!r} contradicts {path}, which has {has[key]!r}" for key in wrong)
        raise UserError(f"{problems}: drop {', '.join(wrong)}")


def parse_model_args(model_args: dict, path: str) -> GPTConfig:
    """The architecture that model_args describe, every type and size checked. Raises UserError if there is none."""
    kind = LegacyConfig if "legacy" in model_args else GPTConfig
    if unknown := sorted(model_args.keys() - {field.name for field in fields(kind)}):
        raise UserError(f"{path} has model_args that this donGPT does not know ({', '.join(unknown)}): update donGPT")
    try:
        config = build(kind, model_args, "model_args")
        if config.vocab_size is None:
            raise UserError("vocab_size is missing")
        sizes = {**asdict(config), "ngram_rows": (config.ngrams - 1) * config.ngram_rows}
        if large := [f"{key}={size}" for key, size in sizes.items() if type(size) is int and size > MAX_SIZE]:
            raise UserError(f"{', '.join(large)} is above {MAX_SIZE:,}")
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} has hyper-parameters that make no model ({reason}): use another file") from error
    return config


def restore_weights(config: GPTConfig, weights: dict, path: str) -> GPT:
    """The model of config with the weights of the file at path. Raises UserError listing all that does not fit."""
    if config.model_type == "gpt" and config.n_layer > len(weights):  # too many to list, perhaps to build
        raise UserError(f"{path}: it has {len(weights)} weights, too few for n_layer={config.n_layer}")
    with torch.device("meta"):  # only names and shapes, so that a wrong size costs no memory
        expected = {name: tuple(tensor.shape) for name, tensor in build_model(config).state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    lists = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} is {found[name]} in the file and {shape} by the hyper-parameters"
            for name, shape in expected.items()
            if found.get(name, shape) != shape
        ],
        "not floating-point numbers": [name for name, tensor in weights.items() if not tensor.is_floating_point()],
    }
    if problems := "; ".join(f"{kind}: {', '.join(names)}" for kind, names in lists.items() if names):
        raise UserError(f"{path}: its weights do not fit its hyper-parameters, or those that you gave; {problems}")
    model = build_model(config)
    model.load_state_dict(weights)
    return model


def is_state_dict(content) -> bool:
    """Whether content is a dict of dense tensors by name, with at least one."""
    return (
        _is_dict(content)
        and bool(content)
        and all(torch.is_tensor(t) and t.layout == torch.strided and not t.is_meta for t in content.values())
    )


def clean_names(state_dict: dict) -> dict:
    """state_dict without the prefixes that torch.compile and DDP add, and without old nanoGPT's mask buffers."""
    return {
        re.sub(r"^((module|_orig_mod)\.)+", "", name): tensor
        for name, tensor in state_dict.items()
        if not name.endswith((".attn.bias", ".attn.masked_bias"))
    }


# ----------------------------------------------------------------------------------------------------------------------
# nanoGPT and EDS


def _from_nanogpt(checkpoint: dict, path: str, given: dict) -> dict:
    """nanoGPT's or EDS's checkpoint in our layout. EDS's is known by its pos_embd or its table of distances."""
    old = clean_names(checkpoint["model"])
    args, weights = dict(checkpoint["model_args"]), dict(old)
    scheme = args.pop("pos_embd", "default")
    if scheme not in ("default", "rope", "relative"):
        raise UserError(f"{path} has pos_embd={_show(scheme)}: EDS, whose layout it has, knows default, rope, relative")
    if scheme != "relative":
        weights.pop(RELATIVE, None)  # EDS stores it always, and uses it only here
    if scheme != "default":
        args["legacy"] = f"eds-{scheme}"
        weights.pop("transformer.wpe.weight", None)  # likewise
    check_given(given, args, path)
    add_head(weights, args)
    args = {**_infer_args(old), **given, **args}
    _check_n_head(args, path)
    settings = checkpoint.get("config", {})
    settings = {key: settings[key] for key in settings if key not in (*MACHINE_KEYS, "pos_embd")}
    new = {**checkpoint, "model": weights, "model_args": args, "config": settings}
    config = parse_model_args(args, path)
    if "optimizer" in new:
        groups = _matching_groups(new["optimizer"], old, config.tie_weights)
        if groups is None:
            print0(f"{path}: its optimizer state does not belong to its parameters, and is left out", file=sys.stderr)
            del new["optimizer"]
        else:
            new["optimizer"] = renumber(new["optimizer"], groups, parameter_groups(config, new["optimizer"]))
            if "transformer.wte.weight" not in groups[0]:  # until May 2023, when nanoGPT's GELU was the approximation
                args.setdefault("activation", "gelu_tanh")
    return new


def _infer_args(weights: dict) -> dict:
    """The hyper-parameters that the names and shapes of nanoGPT's weights tell: all except n_head."""
    none = torch.empty(0)
    table, positions = weights.get("transformer.wte.weight", none), weights.get("transformer.wpe.weight", none)
    if table.dim() != 2:
        return {}
    layers = [int(found[1]) for name in weights if (found := re.match(r"transformer\.h\.(\d{1,9})\.", name))]
    return dict(
        vocab_size=table.shape[0],
        n_embd=table.shape[1],
        n_layer=max(layers, default=-1) + 1,
        block_size=positions.shape[0] if positions.dim() else 0,
        dropout=0.0,
        bias=any(name.endswith(".bias") for name in weights),
    )


def _check_n_head(args: dict, path: str):
    """Raise UserError if hyper-parameters lack the one that no shape tells."""
    if "n_head" not in args:
        convert = f"python ckpt_update.py {path} NEW.pt --n_head=N (or --size=small|medium|large)"
        raise UserError(f"{path} does not say its n_head: convert it by {convert}, or give n_head=N to load_model")


def add_head(weights: dict, args: dict):
    """Add the output head or the embedding that a file leaves out because they are tied; note if they differ."""
    table, head = weights.get("transformer.wte.weight"), weights.get("lm_head.weight")
    if table is not None and head is None:
        weights["lm_head.weight"] = table
    elif head is not None and table is None:
        weights["transformer.wte.weight"] = head
    elif table is not None and head is not None and (table.shape != head.shape or not bool((table == head).all())):
        args["tie_weights"] = False  # nanoGPT before it tied them


def parameter_groups(config: GPTConfig, optimizer: dict) -> list[list[str]]:
    """Names of the parameters of a model, by group of an optimizer with this state, in the optimizer's order."""
    with torch.device("meta"):  # only names and shapes
        return build_model(config).parameter_groups(uses_muon(optimizer.get("param_groups")))


def uses_muon(groups) -> bool:
    """Whether an optimizer with these groups updates the blocks' matrices by Muon."""
    return isinstance(groups, list) and any(_is_dict(group) and group.get("rule") == "muon" for group in groups)


def _matching_groups(optimizer: dict, weights: dict, tied: bool) -> list[list[str]] | None:
    """The names of the parameters in an old optimizer's groups: of the known orders, the one that its states fit."""
    names = [name for name in weights if not (tied and name == "lm_head.weight")]
    matrices = [name for name in names if weights[name].dim() >= 2]
    vectors = [name for name in names if weights[name].dim() < 2]
    linear = sorted(name for name in matrices if name.startswith(("transformer.h.", "lm_head.")))
    candidates = [
        [matrices, vectors],
        [[name for name in matrices if name != RELATIVE], vectors],  # EDS, its table added to an older file
        [linear, sorted(set(names) - set(linear))],  # nanoGPT until May 2023: embeddings do not decay
    ]
    return next((groups for groups in candidates if states_fit(optimizer, groups, weights)), None)


STATE_KEYS = {"muon": ["momentum"], "rows": ["square", "count"]}  # of a parameter in a group with that rule
ADAMW_KEYS = ["step", "exp_avg", "exp_avg_sq"]  # of any other


def states_fit(optimizer: dict, groups: list[list[str]], weights: dict) -> bool:
    """Whether an optimizer's state_dict has groups of these parameters, with states of their shapes."""
    states, stored = optimizer.get("state"), optimizer.get("param_groups")
    if not (isinstance(states, dict) and isinstance(stored, list) and all(map(_is_dict, stored))):
        return False
    numbers = [group.get("params") for group in stored]
    if not all(isinstance(of_group, list) and all(type(n) is int for n in of_group) for of_group in numbers):
        return False
    return list(map(len, numbers)) == list(map(len, groups)) and all(
        _state_fits(states[number], str(group.get("rule")), weights[name].shape)
        for group, names in zip(stored, groups)
        for number, name in zip(group["params"], names)
        if number in states
    )


def _state_fits(state, rule: str, shape: torch.Size) -> bool:
    """Whether a parameter's state has what its rule needs: tensors of its shape, or of one number for each row."""
    return (
        _is_dict(state)
        and all(torch.is_tensor(state.get(key)) for key in STATE_KEYS.get(rule, ADAMW_KEYS))
        and all(
            value.shape == (shape[:1] if rule == "rows" else () if key == "step" else shape)
            for key, value in state.items()
            if torch.is_tensor(value)
        )
    )


def renumber(optimizer: dict, old: list[list[str]], new: list[list[str]]) -> dict:
    """optimizer, whose groups hold the parameters old, for groups that hold new: each state stays with its name."""
    new_numbers = {name: number for number, name in enumerate(sum(new, []))}
    old_numbers: list[int] = sum((group["params"] for group in optimizer["param_groups"]), [])
    new_of_old = {number: new_numbers.get(name) for number, name in zip(old_numbers, sum(old, []))}
    states = {new_of_old.get(number): state for number, state in optimizer["state"].items()}
    settings = [*optimizer["param_groups"], *optimizer["param_groups"][:1]]  # a group that is added holds matrices
    return {
        "state": {number: state for number, state in states.items() if number is not None},
        "param_groups": [
            {**group, "params": [new_numbers[name] for name in names]} for group, names in zip(settings, new)
        ],
    }


# ----------------------------------------------------------------------------------------------------------------------
# bare state dicts


def _from_state_dict(checkpoint: dict, path: str, given: dict) -> dict:
    """A state dict with nanoGPT+'s or nanoGPT's names in our layout; hyper-parameters from shapes and from given."""
    weights = clean_names(checkpoint) if is_state_dict(checkpoint) else {}
    args: dict = {}
    if "token_embedding_table.weight" in weights and (
        len(weights) == 1 or any(name.startswith("transformer_blocks.") for name in weights)
    ):
        if any(".lora_" in name for name in weights):
            print0(f"{path}: its LoRA matrices are dropped: the weights already contain them", file=sys.stderr)
        kept = [name for name in weights if not name.endswith(".tril") and ".lora_" not in name]
        weights = {_gpt2_name(name): weights[name] for name in kept}
        args["activation"] = "gelu_tanh"
    args.update(_infer_args(weights))
    if not args.get("n_embd"):
        found = ", ".join(sorted({re.sub(r"\.\d+\.", ".N.", str(key)) for key in checkpoint})) or "nothing"
        raise UserError(f"{path} has a layout that is not known: it holds {found}; known are {KNOWN}")
    table = weights["transformer.wte.weight"]
    if len(weights) == 1:
        if table.shape[0] != table.shape[1]:
            found = f"one table of shape {tuple(table.shape)}, and a bigram's is square"
            raise UserError(f"{path} holds {found}: give a file with all of the model's weights")
        return {"model": weights, "model_args": {"model_type": "bigram", "vocab_size": len(table), **given}}
    if weights.get("transformer.h.0.attn.c_attn.weight", table).shape == (table.shape[1], 3 * table.shape[1]):
        raise UserError(f"{path} holds Hugging Face's weights: give the directory it is in, with its config.json")
    args.update(given)  # if they contradict the shapes, restore_weights says so
    _check_n_head(args, path)
    add_head(weights, args)
    return {"model": weights, "model_args": args}


def _gpt2_name(name: str) -> str:
    """GPT-2's name for a parameter of nanoGPT+."""
    for plus_name, gpt2_name in NANOGPT_PLUS_NAMES:
        name = name.replace(plus_name, gpt2_name)
    return name


# ----------------------------------------------------------------------------------------------------------------------
# tokenizers, which these files do not hold


def find_tokenizer(checkpoint: dict, path: str) -> dict | None:
    """The tokenizer of an upgraded checkpoint without one: of a meta file near it or with its data, or nanoGPT+'s.

    As in nanoGPT, GPT-2's is assumed if there is none and the vocabulary has GPT-2's size; else None.
    """
    vocab_size, config = checkpoint["model_args"].get("vocab_size"), checkpoint.get("config", {})
    dataset, data_dir = config.get("dataset", ""), config.get("data_dir", "")
    directory = os.path.dirname(os.path.abspath(path))
    candidates = [directory]
    if dataset or data_dir:
        own = data_dir or os.path.join("data", dataset)  # relative to our tree, to the working directory, or to its own
        candidates += [os.path.abspath(own), os.path.join(os.path.dirname(directory), own)]
        candidates[1:1] = [] if data_dir else [os.path.join(ROOT, own)]
    for meta in map(read_meta, candidates):
        if meta.get("vocab_size") == vocab_size:
            return meta["tokenizer"]
    if "iter_num" not in checkpoint and (characters := _nanogpt_plus_characters(path, vocab_size)):
        return {"kind": "char", "characters": characters}
    return {"kind": "gpt2"} if vocab_size in (50257, 50304) else None


def _nanogpt_plus_characters(path: str, vocab_size: int) -> str:
    """The characters of nanoGPT+'s pickled tokenizer next to a checkpoint or in tokenizers/ there; '' if none fits.

    It is the one that nanoGPT+ names after this checkpoint, else the only vocabulary of the right size.
    """
    directory, name = os.path.split(os.path.abspath(path))
    own = "tokenizer_" + name.partition(".")[0].replace("_model", "") + ".pkl"  # gpt_model_small -> tokenizer_gpt_small
    found: dict[str, str] = {}
    for place in (directory, os.path.join(directory, "tokenizers")):
        for file in sorted(glob.glob(os.path.join(glob.escape(place), "tokenizer*.pkl"))):
            characters = read_nanogpt_plus_tokenizer(file)
            if len(characters) == vocab_size:
                found.setdefault(os.path.basename(file), characters)
    if own in found or len(set(found.values())) == 1:
        return found.get(own) or next(iter(found.values()))
    return ""


class _TokenizerUnpickler(pickle.Unpickler):
    """Reads plain values and nanoGPT+'s tokenizer; refuses whatever else a pickle asks for, without running it."""

    def find_class(self, module, name):
        if (module, name) == ("src.data.tokenizer", "CharTokenizer"):
            return types.SimpleNamespace  # which the pickle fills
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_nanogpt_plus_tokenizer(path: str) -> str:
    """The characters of a pickled tokenizer of nanoGPT+, by id. Raises UserError for anything else in the file."""
    try:
        with open(path, "rb") as file:
            itos = vars(_TokenizerUnpickler(file).load())["itos"]
        return "".join([itos[i] for i in range(len(itos))])
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = f"{path} is not a plain tokenizer of nanoGPT+ ({error})"
        raise UserError(f"{reason}: it was not run; move it away from the checkpoint") from error
