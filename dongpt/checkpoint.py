"""Checkpoints: owner of ckpt.pt and ckpt_last.pt in an out_dir, and of what comes from Hugging Face.

A checkpoint is one dict of tensors and plain Python values that `torch.load(weights_only=True)` reads: nanoGPT's keys
(model, optimizer, model_args, iter_num, best_val_loss, config) and ours (format_version, tokenizer, ...).

    model, tokenizer = load_model("out/ckpt.pt")        # eval mode, float32, CPU
"""
import errno
import os
import pickle
import sys
import warnings
import zipfile
from dataclasses import asdict, fields

import torch

import dongpt.tokenizers
from dongpt.corpus import find_folder, read_meta
from dongpt.runtime import DTYPES, print_main
from model import GPT, GPTConfig

FORMAT_VERSION = 1
BEST, LAST = "ckpt.pt", "ckpt_last.pt"
NANOGPT_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")

# ----------------------------------------------------------------------------------------------------------------------
# files


def save(checkpoint: dict, path: str):
    """Write checkpoint to path, which at every moment holds either the old file whole or the new one.

    Raises ValueError, and leaves the old file, when it cannot be written.
    """
    temporary = path + ".part"
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # the new name itself lasts only once the folder is written
            _sync_folder(os.path.dirname(os.path.abspath(path)))
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        if isinstance(error, torch.OutOfMemoryError) or "CUDA" in str(error):
            raise
        if os.path.exists(temporary):
            os.remove(temporary)
        raise ValueError(f"{path} could not be written ({error}): free space there; "
                         f"the file that was there before is as it was") from error


def _sync_folder(folder: str):
    """Have the names of the files in a folder last, where its file system can do that."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems answer this; the file itself is whole
            raise
    finally:
        os.close(handle)


def is_valid(path: str) -> bool:
    """Whether path is a checkpoint that is not cut off; reads its index alone."""
    try:
        load(path, mmap=True)
        return True
    except ValueError:
        return False


def load(path: str, mmap: bool = False) -> dict:
    """The checkpoint at path, its tensors on the CPU (with mmap read only when they are used).

    Raises ValueError for a file that is missing, damaged, no checkpoint, or that asks to run code.
    """
    if not os.path.isfile(path):
        raise ValueError(f"there is no checkpoint {path}: give the path of one, or train with --out_dir first")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch speaks of pickle protocols before it refuses
            is_zip = zipfile.is_zipfile(path)
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_zip)
            if is_zip and not mmap and (broken := zipfile.ZipFile(path).testzip()):  # torch checks no checksums
                raise RuntimeError(f"{broken} is damaged")
    except pickle.UnpicklingError as error:
        if "unsupported" in str(error).lower():  # a name or an instruction that is not on torch's list of harmless ones
            raise ValueError(f"{path} is refused, and was not run: it holds more than tensors and plain values, "
                             f"and loading that could run any code; save its state dict instead") from error
        raise ValueError(f"{path} is damaged: use an older checkpoint") from error
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(f"{path} is truncated or damaged: use an older checkpoint") from error
    if not (isinstance(checkpoint, dict) and isinstance(checkpoint.get("model"), dict)
            and isinstance(checkpoint.get("model_args"), dict)):
        raise ValueError(f"{path} is not a checkpoint of donGPT or nanoGPT: it has no model and model_args")
    if checkpoint.get("format_version", 0) not in range(FORMAT_VERSION + 1):
        raise ValueError(f"{path} was written by a newer donGPT: update yours")
    return checkpoint


def load_valid(out_dir: str, names: tuple[str, ...] = (LAST, BEST), newest: bool = True) -> tuple[dict, str]:
    """(checkpoint, path) of an out_dir: the newest valid of names, or with newest=False the first valid one.

    What is passed over because it is damaged is said on stderr. Raises ValueError if none is left.
    """
    there = [os.path.join(out_dir, name) for name in names if os.path.exists(os.path.join(out_dir, name))]
    if not there:
        raise ValueError(f"{out_dir} has no checkpoint: train with --out_dir={out_dir} first, or give another out_dir")
    problems, ages = [], {}
    for path in there:
        try:
            ages[path] = load(path, mmap=True).get("iter_num", 0)
        except ValueError as error:
            problems.append(str(error))
    for path in sorted(ages, key=lambda path: -ages[path]) if newest else ages:  # of equals the first name wins
        try:
            checkpoint = load(path)
        except ValueError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            print_main(f"{problem}; going on with {path}", file=sys.stderr)
        return checkpoint, path
    raise ValueError("; ".join(problems))


def check_writable(out_dir: str):
    """Raise ValueError unless files can be made in out_dir, which is made if need be."""
    try:
        os.makedirs(out_dir, exist_ok=True)
        probe = os.path.join(out_dir, ".writable")
        open(probe, "wb").close()
        os.remove(probe)
    except OSError as error:
        raise ValueError(f"out_dir={out_dir!r} cannot be written ({error.strerror}): give another --out_dir") from error


def set_aside(out_dir: str, more_names: list[str]) -> str:
    """Move the checkpoints of an earlier run, and the files of more_names, to out_dir/old-N; returns it, '' if none."""
    there = [name for name in (BEST, LAST, *more_names) if os.path.exists(os.path.join(out_dir, name))]
    if not there:
        return ""
    n = 1
    while os.path.exists(old := os.path.join(out_dir, f"old-{n}")):
        n += 1
    os.makedirs(old)
    for name in there:
        os.replace(os.path.join(out_dir, name), os.path.join(old, name))
    return old


def restore_optimizer(optimizer: torch.optim.Optimizer, checkpoint: dict, path: str):
    """Give optimizer the moments stored in checkpoint; its settings stay those of this run."""
    if "optimizer" not in checkpoint:
        raise ValueError(f"{path} has no optimizer state to resume from: use --init_from={path} for its weights alone")
    stored = checkpoint["optimizer"]
    for old, new in zip(stored["param_groups"], optimizer.param_groups):
        old.update({key: value for key, value in new.items() if key != "params"})
    optimizer.load_state_dict(stored)


def model_args(config: GPTConfig) -> dict:
    """What a checkpoint says of the architecture: nanoGPT's seven keys, and ours where nanoGPT's value is another.

    attn_dropout acts in training alone and is in the checkpoint's config.
    """
    default = GPTConfig()
    return {name: value for name, value in asdict(config).items() if name in NANOGPT_ARGS
            or (name != "attn_dropout" and value != getattr(default, name))}


def clean_names(state_dict: dict) -> dict:
    """state_dict without the prefixes that torch.compile and DDP add and without old nanoGPT's mask buffers."""
    clean = {}
    for name, tensor in state_dict.items():
        while name.startswith(("module.", "_orig_mod.")):
            name = name.partition(".")[2]
        if not name.endswith((".attn.bias", ".attn.masked_bias")):
            clean[name] = tensor
    return clean


def build(checkpoint: dict, path: str, **overrides) -> GPT:
    """The model of a checkpoint, float32 on the CPU. Raises ValueError where weights and model_args disagree."""
    known = {field.name for field in fields(GPTConfig)}
    args = {**overrides, **checkpoint["model_args"]}
    if unknown := sorted(args.keys() - known):
        raise ValueError(f"{path} has model_args that this donGPT does not know: {', '.join(unknown)}")
    try:
        model = GPT(GPTConfig(**args))
    except (TypeError, AssertionError) as error:
        raise ValueError(f"{path} has model_args that make no model ({error}): {args}") from error
    try:
        model.load_state_dict(clean_names(checkpoint["model"]))
    except RuntimeError as error:
        raise ValueError(f"{path}: its weights do not fit its model_args "
                         f"({' '.join(str(error).split())[:300]})") from error
    return model


# ----------------------------------------------------------------------------------------------------------------------
# whatever a path means


def load_model(path: str, device: str = "cpu", dtype: str = "float32", **model_args):
    """(model in eval mode, tokenizer or None) of a checkpoint file, an out_dir, a Hugging Face folder or gpt2*.

    model_args are added where the file lacks them. Raises ValueError for what cannot be loaded.
    """
    model, description, _ = load_anything(path, **model_args)
    tokenizer = dongpt.tokenizers.from_dict(description) if description else None
    return model.to(device=device, dtype=DTYPES[dtype]).eval(), tokenizer


def load_anything(path: str, **overrides) -> tuple[GPT, dict | None, dict]:
    """(model, tokenizer as a plain dict or None, checkpoint without its tensors) of what load_model takes."""
    if path in GPT2_NAMES or os.path.exists(os.path.join(path, "config.json")):
        model = from_hugging_face(path)
        return model, {"kind": "gpt2"} if model.config.vocab_size == 50257 else None, {}
    checkpoint, path = load_valid(path, (BEST, LAST), newest=False) if os.path.isdir(path) else (load(path), path)
    model = build(checkpoint, path, **overrides)
    rest = {key: value for key, value in checkpoint.items() if key not in ("model", "optimizer")}
    return model, checkpoint.get("tokenizer") or foreign_tokenizer(checkpoint, path), rest


def foreign_tokenizer(checkpoint: dict, path: str) -> dict | None:
    """The tokenizer of nanoGPT's checkpoint, which is not in the file: of a meta file beside it or with its data.

    As nanoGPT does, GPT-2's is assumed where there is none and the size of the vocabulary is GPT-2's; else None.
    """
    vocab_size, config = checkpoint["model_args"].get("vocab_size"), checkpoint.get("config", {})
    folders = [os.path.dirname(os.path.abspath(path))]
    if config.get("dataset") or config.get("data_dir"):
        folders.append(find_folder(config.get("dataset", ""), config.get("data_dir", "")))
    for meta in map(read_meta, folders):
        if meta.get("vocab_size") == vocab_size:
            return meta["tokenizer"]
    return {"kind": "gpt2"} if vocab_size in (50257, 50304) else None


def from_hugging_face(name: str) -> GPT:
    """GPT with the weights of a Hugging Face GPT-2: one of GPT2_NAMES, which are downloaded, or a folder."""
    from transformers import GPT2LMHeadModel
    from transformers.utils import logging
    logging.disable_progress_bar()
    try:
        theirs = GPT2LMHeadModel.from_pretrained(name)
    except Exception as error:  # the hub's client, the network and the file formats each have errors of their own
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"the Hugging Face model {name!r} could not be loaded ({reason}): connect to a network, "
                         f"or give a folder that holds config.json and model.safetensors") from error
    config = theirs.config
    activations = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
    if config.activation_function not in activations:
        raise ValueError(f"{name}: activation {config.activation_function!r} is not one of {', '.join(activations)}")
    ours = dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, layer_norm_epsilon=1e-5,
                add_cross_attention=False, n_inner=None)
    if config.n_inner == 4 * config.n_embd:
        config.n_inner = None
    if other := [f"{key}={getattr(config, key)}" for key, value in ours.items() if getattr(config, key) != value]:
        raise ValueError(f"{name} is not GPT-2's architecture ({', '.join(other)}): it cannot be loaded")
    model = GPT(GPTConfig(
        block_size=config.n_positions, vocab_size=config.vocab_size, n_layer=config.n_layer, n_head=config.n_head,
        n_embd=config.n_embd, bias=True, activation=activations[config.activation_function],
        tie_weights=config.tie_word_embeddings))
    weights = clean_names(theirs.state_dict())
    for key in weights:  # their Conv1D keeps its weight the other way round; c_proj is square, so no shape would tell
        if key.endswith(("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")):
            weights[key] = weights[key].t()
    model.load_state_dict(weights)
    return model
