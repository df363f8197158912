"""Checkpoints in the layouts of other trainers, rewritten in memory in ours.

Known are nanoGPT's (of all ages), EDS's (nanoGPT's with a pos_embd, three generations), nanoGPT+'s (a bare state dict
without hyper-parameters, GPT or bigram) and bare state dicts with nanoGPT's names. What is recognised is the layout,
by its keys and shapes, never the name of the file.
"""

import glob
import os
import pickle
import re
import sys
from dataclasses import asdict, fields

import torch

from configurator import UserError
from dongpt.checkpoint.legacy import LegacyConfig, build_model
from dongpt.runtime import print_main
from dongpt.train.data import find_folder, read_meta
from model import RELATIVE, GPTConfig

FORMAT_VERSION = 1
MACHINE = ("device", "dtype", "compile", "backend")  # settings that say what an old run's machine had
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
NANOGPT_PLUS_NAMES = (  # its names for GPT-2's, in the order in which they are replaced
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
    """checkpoint, of any known layout, in the current one; given are hyper-parameters that the file may lack.

    A checkpoint that was already of the current format is returned as it is. Raises UserError for a layout that is
    not known, for a given hyper-parameter that contradicts the file, and for one that is missing.
    """
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} is no checkpoint: it holds a {type(checkpoint).__name__}; known are {KNOWN}")
    if not (_is_state_dict(checkpoint.get("model")) and isinstance(checkpoint.get("model_args"), dict)):
        return {**_from_state_dict(checkpoint, path, given), "format_version": FORMAT_VERSION}
    if "format_version" not in checkpoint:
        return {**_from_nanogpt(checkpoint, path, given), "format_version": FORMAT_VERSION}
    if checkpoint["format_version"] not in range(FORMAT_VERSION + 1):
        raise UserError(f"{path} was written by a newer donGPT: update yours")
    check_given(given, asdict(config_of(checkpoint["model_args"], path)), path)  # ours lacks nothing
    return checkpoint


def check_given(given: dict, has: dict, path: str):
    """Raise UserError where given hyper-parameters contradict those that the file at path has."""
    if wrong := [key for key, value in given.items() if has.get(key, value) != value]:
        raise UserError(
            "; ".join(f"{key}={given[key]!r} contradicts {path}, which has {has[key]!r}" for key in wrong)
            + f": leave {', '.join(wrong)} away"
        )


def _is_state_dict(content) -> bool:
    """Whether content is a dict of tensors by their names, at least one."""
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in content.items())
    )


def clean_names(state_dict: dict) -> dict:
    """state_dict without the prefixes that torch.compile and DDP add and without old nanoGPT's mask buffers."""
    clean = {}
    for name, tensor in state_dict.items():
        while name.startswith(("module.", "_orig_mod.")):
            name = name.partition(".")[2]
        if not name.endswith((".attn.bias", ".attn.masked_bias")):
            clean[name] = tensor
    return clean


def config_of(model_args: dict, path: str) -> GPTConfig:
    """The architecture that a checkpoint's model_args describe. Raises UserError where they describe none."""
    kind = LegacyConfig if "legacy" in model_args else GPTConfig
    if unknown := sorted(model_args.keys() - {field.name for field in fields(kind)}):
        raise UserError(f"{path} has model_args that this donGPT does not know ({', '.join(unknown)}): update yours")
    try:
        config = kind(**model_args)
        if config.vocab_size is None:
            raise UserError("vocab_size is missing")
        return config
    except ValueError as error:
        raise UserError(f"{path} has model_args that make no model ({error}): {model_args}") from error
    except TypeError as error:  # a value that is not even a number
        raise UserError(f"{path} has model_args that make no model: {model_args}") from error


# ----------------------------------------------------------------------------------------------------------------------
# nanoGPT and EDS


def _from_nanogpt(checkpoint: dict, path: str, given: dict) -> dict:
    """nanoGPT's or EDS's checkpoint in our layout. EDS's is known by its pos_embd or its table of distances."""
    old = clean_names(checkpoint["model"])
    args, weights = dict(checkpoint["model_args"]), dict(old)
    scheme = args.pop("pos_embd", "default")
    if scheme not in ("default", "rope", "relative"):
        raise UserError(
            f"{path} has pos_embd={scheme!r} and no format_version: EDS, whose layout that is, knows "
            f"default, rope and relative"
        )
    if scheme != "relative":
        weights.pop(RELATIVE, None)  # there, but without effect
    if scheme != "default":
        args["legacy"] = f"eds-{scheme}"
        weights.pop("transformer.wpe.weight", None)  # the same
    check_given(given, args, path)
    _settle_head(weights, args)
    args = {**_read_off(old), **given, **args}
    _check_n_head(args, path)
    new = {key: value for key, value in checkpoint.items() if value is not None}
    new.update(
        model=weights,
        model_args=args,
        config={key: value for key, value in (new.get("config") or {}).items() if key not in (*MACHINE, "pos_embd")},
    )
    config = config_of(args, path)
    if "optimizer" in new:
        groups = _matching_groups(new["optimizer"], old, config.tie_weights)
        if groups is None:
            print_main(
                f"{path}: its optimizer state does not belong to its parameters, and is left away", file=sys.stderr
            )
            del new["optimizer"]
        else:
            new["optimizer"] = renumber(new["optimizer"], groups, parameter_groups(config, new["optimizer"]))
            if "transformer.wte.weight" not in groups[0]:  # until May 2023, and its GELU was the approximation then
                args.setdefault("activation", "gelu_tanh")
    return new


def _read_off(weights: dict) -> dict:
    """The hyper-parameters that the names and shapes of nanoGPT's weights tell: all but n_head."""
    table = weights.get("transformer.wte.weight")
    if table is None or table.dim() != 2:
        return {}
    layers = [int(found[1]) for name in weights if (found := re.match(r"transformer\.h\.(\d+)\.", name))]
    return dict(
        vocab_size=table.shape[0],
        n_embd=table.shape[1],
        n_layer=max(layers, default=-1) + 1,
        block_size=len(weights.get("transformer.wpe.weight", ())),
        dropout=0.0,
        bias=any(name.endswith(".bias") for name in weights),
    )


def _check_n_head(args: dict, path: str):
    """Raise UserError, with the remedy, where hyper-parameters lack the one that no shape tells."""
    if "n_head" not in args:
        raise UserError(
            f"{path} does not say how many attention heads it has: convert it with python ckpt_update.py "
            f"{path} NEW.pt --n_head=N (or --size=small|medium|large), or give n_head=N to load_model"
        )


def _settle_head(weights: dict, args: dict):
    """Add the head where a tied file leaves it out; note where the two matrices of a file differ."""
    table, head = weights.get("transformer.wte.weight"), weights.get("lm_head.weight")
    if head is None:
        weights.update({"lm_head.weight": table} if table is not None else {})
    elif table is not None and head.data_ptr() != table.data_ptr() and not torch.equal(head, table):
        args["tie_weights"] = False  # nanoGPT before it tied them


def parameter_groups(config: GPTConfig, optimizer: dict) -> list[list[str]]:
    """The names of a model's parameters in the order in which an optimizer, of this state, numbers them, by group."""
    with torch.device("meta"):  # names and shapes alone
        return build_model(config).parameter_groups(uses_muon(optimizer.get("param_groups", [])))


def uses_muon(groups: list[dict]) -> bool:
    """Whether an optimizer with these groups moves the blocks' matrices by Muon."""
    return any(group.get("rule") == "muon" for group in groups)


def _matching_groups(optimizer: dict, weights: dict, tied: bool) -> list[list[str]] | None:
    """The names of the parameters in an old optimizer's groups: of the orders in use, the one that its states fit."""
    names = [name for name in weights if not (tied and name == "lm_head.weight")]
    matrices = [name for name in names if weights[name].dim() >= 2]
    vectors = [name for name in names if weights[name].dim() < 2]
    linear = sorted(name for name in matrices if name.startswith(("transformer.h.", "lm_head.")))
    candidates = [
        [matrices, vectors],
        [[name for name in matrices if name != RELATIVE], vectors],  # EDS, its table added to an older file
        [linear, sorted(set(names) - set(linear))],  # nanoGPT until May 2023: embeddings do not decay
    ]
    for groups in candidates:
        if states_fit(optimizer, groups, weights):
            return groups
    return None


def states_fit(optimizer, groups: list[list[str]], weights: dict) -> bool:
    """Whether an optimizer's states have the shapes of the parameters that groups name."""
    if not (isinstance(optimizer, dict) and isinstance(optimizer.get("state"), dict)):
        return False
    numbers = [group["params"] for group in optimizer.get("param_groups", [])]
    if list(map(len, numbers)) != list(map(len, groups)):
        return False
    return all(
        tensor.shape == weights[name].shape[: tensor.dim()]  # or of its rows
        for group, names in zip(numbers, groups)
        for number, name in zip(group, names)
        for tensor in optimizer["state"].get(number, {}).values()
        if torch.is_tensor(tensor) and tensor.dim()
    )


def renumber(optimizer: dict, old: list[list[str]], new: list[list[str]]) -> dict:
    """optimizer, whose groups hold the parameters old, for groups that hold new: each state stays with its name."""
    state = {}
    for group, names in zip(optimizer["param_groups"], old):
        state.update(
            {
                name: optimizer["state"][number]
                for number, name in zip(group["params"], names)
                if number in optimizer["state"]
            }
        )
    numbers = {name: number for number, name in enumerate(sum(new, []))}
    settings = [*optimizer["param_groups"], *optimizer["param_groups"][:1]]  # a group that is added is one of matrices
    groups = [{**group, "params": [numbers[name] for name in names]} for group, names in zip(settings, new)]
    return {"state": {numbers[name]: value for name, value in state.items() if name in numbers}, "param_groups": groups}


# ----------------------------------------------------------------------------------------------------------------------
# bare state dicts


def _from_state_dict(checkpoint: dict, path: str, given: dict) -> dict:
    """A state dict with nanoGPT+'s or nanoGPT's names in our layout; hyper-parameters by the shapes and as given."""
    weights, args = clean_names(checkpoint) if _is_state_dict(checkpoint) else {}, {}
    if "token_embedding_table.weight" in weights and (
        len(weights) == 1 or any(name.startswith("transformer_blocks.") for name in weights)
    ):
        if any(".lora_" in name for name in weights):
            print_main(
                f"{path}: its LoRA matrices are left away, since nanoGPT+ saved its weights with them added",
                file=sys.stderr,
            )
        weights = {
            _our_name(name): tensor
            for name, tensor in weights.items()
            if not name.endswith(".tril") and ".lora_" not in name
        }
        args["activation"] = "gelu_tanh"
    if not (args := {**args, **_read_off(weights)}).get("n_embd"):
        found = sorted({re.sub(r"\.\d+\.", ".N.", str(key)) for key in checkpoint})
        raise UserError(
            f"{path} has a layout that is not known: it holds {', '.join(found) or 'nothing'}; known are {KNOWN}"
        )
    table = weights["transformer.wte.weight"]
    if len(weights) == 1:
        if table.shape[0] != table.shape[1]:
            raise UserError(
                f"{path} holds one table of shape {tuple(table.shape)}, and a bigram's is square: "
                f"give a file with all of the model's weights"
            )
        return {"model": weights, "model_args": {"model_type": "bigram", "vocab_size": len(table), **given}}
    if weights.get("transformer.h.0.attn.c_attn.weight", table).shape == (table.shape[1], 3 * table.shape[1]):
        raise UserError(f"{path} holds Hugging Face's weights: give the folder that it is in, with its config.json")
    args.update(given)  # where they contradict the shapes, building the model says so
    _check_n_head(args, path)
    _settle_head(weights, args)
    return {"model": weights, "model_args": args}


def _our_name(name: str) -> str:
    """nanoGPT+'s name of a parameter as nanoGPT has it."""
    for theirs, ours in NANOGPT_PLUS_NAMES:
        name = name.replace(theirs, ours)
    return name


# ----------------------------------------------------------------------------------------------------------------------
# tokenizers, which these files do not hold


def find_tokenizer(checkpoint: dict, path: str) -> dict | None:
    """The tokenizer of an upgraded checkpoint without one: of a meta file beside it or with its data, or nanoGPT+'s.

    As nanoGPT does, GPT-2's is assumed where there is none and the size of the vocabulary is GPT-2's; else None.
    """
    vocab_size, config = checkpoint["model_args"].get("vocab_size"), checkpoint.get("config", {})
    beside = os.path.dirname(os.path.abspath(path))
    folders = [beside]
    if config.get("dataset") or config.get("data_dir"):
        folders.append(find_folder(config.get("dataset", ""), config.get("data_dir", "")))
        own = config.get("data_dir") or os.path.join("data", config["dataset"])
        folders += [os.path.abspath(own), os.path.join(os.path.dirname(beside), own)]  # in the tree that it comes from
    for meta in map(read_meta, folders):
        if meta.get("vocab_size") == vocab_size:
            return meta["tokenizer"]
    if "iter_num" not in checkpoint and (characters := _nanogpt_plus_characters(path, vocab_size)):
        return {"kind": "char", "characters": characters}
    return {"kind": "gpt2"} if vocab_size in (50257, 50304) else None


def _nanogpt_plus_characters(path: str, vocab_size: int) -> str:
    """The characters of nanoGPT+'s pickled tokenizer beside a checkpoint or in tokenizers/ there; '' if none fits.

    The one that its naming gives to this checkpoint, else the only vocabulary of the right size.
    """
    folder, name = os.path.split(os.path.abspath(path))
    own = "tokenizer_" + name.partition(".")[0].replace("_model", "") + ".pkl"  # gpt_model_small -> tokenizer_gpt_small
    found = {}
    for place in (folder, os.path.join(folder, "tokenizers")):
        for file in sorted(glob.glob(os.path.join(glob.escape(place), "tokenizer*.pkl"))):
            characters = read_nanogpt_plus_tokenizer(file)
            if len(characters) == vocab_size:
                found.setdefault(os.path.basename(file), characters)
    if own in found or len(set(found.values())) == 1:
        return found.get(own) or next(iter(found.values()))
    return ""


class _CharTokenizer:
    """Stands for nanoGPT+'s class; its attributes are filled by the pickle."""


class _TokenizerUnpickler(pickle.Unpickler):
    """Reads plain values and nanoGPT+'s tokenizer; whatever else a pickle asks for is refused, and not run."""

    def find_class(self, module, name):
        if (module, name) == ("src.data.tokenizer", "CharTokenizer"):
            return _CharTokenizer
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_nanogpt_plus_tokenizer(path: str) -> str:
    """The characters of a pickled tokenizer of nanoGPT+, by id. Raises UserError for anything else in the file."""
    try:
        with open(path, "rb") as file:
            itos = vars(_TokenizerUnpickler(file).load())["itos"]
        return "".join([itos[i] for i in range(len(itos))])
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(
            f"{path} is not a plain tokenizer of nanoGPT+ ({error}): it was not run; move it away from the checkpoint"
        ) from error
