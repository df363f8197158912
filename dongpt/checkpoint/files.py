"""Read and write checkpoints (ckpt.pt and ckpt_last.pt in an out_dir), and load a model from any supported path.

A checkpoint is a dict of tensors and plain Python values that `torch.load(weights_only=True)` can read. Its keys are
nanoGPT's (model, optimizer, model_args, iter_num, best_val_loss, config) and our own (format_version, tokenizer, ...).
dongpt/checkpoint/foreign.py converts files from other trainers to this layout when they are read.

    model, tokenizer = load_model("out/ckpt.pt")        # eval mode, float32, CPU
"""

import glob
import itertools
import math
import os
import pickle
import re
import sys
import warnings
import zipfile
from dataclasses import asdict, fields
from difflib import get_close_matches
from typing import Any, Callable

import torch

from configurator import UserError
from dongpt.checkpoint import adapters, foreign, hugging_face, legacy, lora
from dongpt.checkpoint.foreign import FORMAT_VERSION as FORMAT_VERSION
from dongpt.program import atomic_write, first_line
from dongpt.runtime import DTYPES, print0
from dongpt.text.tokenizers import UNSUPPORTED_TOKENIZER, Tokenizer, from_dict
from model import GPT, GPTConfig

BEST_NAME, LAST_NAME = "ckpt.pt", "ckpt_last.pt"
LORA_KEYS = [field.name for field in fields(lora.LoraConfig)]
NANOGPT_ARG_NAMES = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")


def save(checkpoint: dict, path: str, check: Callable[[str], Any] | None = None):
    """Write checkpoint to path atomically: path always holds either the complete old file or the complete new one.

    check(temporary_path) is called first and may raise to keep the old file. Raises UserError if the write fails.
    """
    try:
        with atomic_write(path, check=check) as file:
            torch.save(checkpoint, file)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        if isinstance(error, torch.OutOfMemoryError) or "CUDA" in str(error):
            raise
        remedy = "free some disk space; the old file is unchanged"
        raise UserError(f"{path} could not be written ({first_line(error)}): {remedy}") from error


def archive_run(out_dir: str, extra_names: list[str]) -> str:
    """Move checkpoints and extra_names of an earlier run to out_dir/old-N. Return this path, or "" if there is none."""
    names = [name for name in (BEST_NAME, LAST_NAME, *extra_names) if os.path.exists(os.path.join(out_dir, name))]
    if not names:
        return ""
    places = (os.path.join(out_dir, f"old-{n}") for n in itertools.count(1))
    os.makedirs(old_dir := next(place for place in places if not os.path.exists(place)))
    for name in names:
        os.replace(os.path.join(out_dir, name), os.path.join(old_dir, name))
    return old_dir


def model_args(config: GPTConfig) -> dict:
    """Return a checkpoint's model_args: nanoGPT's seven keys, plus any of our own that differ from their defaults."""
    defaults = {**asdict(GPTConfig()), "attn_dropout": config.attn_dropout}  # a training setting, saved in config
    values = asdict(config).items()
    return {key: value for key, value in values if key in NANOGPT_ARG_NAMES or value != defaults.get(key)}


def load(path: str, mmap: bool = False, **extra_args) -> dict:
    """Load the checkpoint at path in the current layout, with tensors on the CPU (with mmap, read on first use).

    extra_args supply model_args that other trainers' files may lack. Raises UserError if the file is missing or
    damaged, has an unknown layout, or would run code.
    """
    if not os.path.isfile(path):
        raise UserError(f"there is no checkpoint at {path}{_suggest_runs(path)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about the pickle protocol before it raises
            is_zip = zipfile.is_zipfile(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_zip)
            if is_zip and not mmap and zipfile.ZipFile(path).testzip():  # torch does not verify checksums
                raise RuntimeError
    except Exception as error:  # a damaged file can raise almost any exception
        if isinstance(error, pickle.UnpicklingError) and "unsupported" in str(error).lower():  # a disallowed type
            name = "".join(re.findall(r"GLOBAL (\S+)", str(error))[:1]) or "a Python object"
            problem = f"{path} was rejected and not run: it contains {name}, which could run arbitrary code"
            raise UserError(f"{problem}; save model.state_dict() where it was created, or train again") from error
        raise UserError(f"{path} is truncated or damaged: use an older checkpoint") from error
    checkpoint = foreign.upgrade(content, path, **extra_args)
    if "format_version" not in content:
        checkpoint.setdefault("tokenizer", foreign.find_tokenizer(checkpoint, path))
    return checkpoint


def is_valid(path: str) -> bool:
    """Return True if the checkpoint at path can be loaded. Checks everything except the tensor values."""
    return _num_updates(path) < math.inf


def load_from_out_dir(out_dir: str, prefer_newest: bool = True, **extra_args) -> tuple[dict, str]:
    """Return (checkpoint, path) for the newest valid checkpoint in out_dir. prefer_newest=False prefers ckpt.pt.

    Skips damaged files and reports them on stderr. Raises UserError if there is no valid checkpoint.
    """
    names = (LAST_NAME, BEST_NAME) if prefer_newest else (BEST_NAME, LAST_NAME)
    paths = [path for name in names if os.path.exists(path := os.path.join(out_dir, name))]
    if not paths:
        raise UserError(f"{out_dir} contains no checkpoint{_suggest_runs(out_dir)}")
    if prefer_newest and len(paths) > 1:
        paths.sort(key=_num_updates, reverse=True)  # stable sort: the first name wins ties
    problems: list[str] = []
    for path in paths:
        try:
            checkpoint = load(path, **extra_args)
            for problem in problems:
                print0(f"{problem}; using {path} instead", file=sys.stderr)
            return checkpoint, path
        except UserError as error:
            problems.append(str(error))
    raise UserError("; ".join(problems))


def _suggest_runs(path: str) -> str:
    """Return the end of a message about a missing run: a likely correction, and the nearby runs, newest first."""
    run_path = os.path.dirname(path) if path.endswith(".pt") else path.rstrip(os.sep)
    if moved := glob.glob(os.path.join(glob.escape(run_path), "old-*", "ckpt*.pt")):  # see archive_run
        newest = os.path.dirname(max(moved, key=os.path.getmtime))
        return f": the previous run was moved to {newest}, so pass that path, as in --out_dir={newest}"
    if models := glob.glob(os.path.join(glob.escape(run_path), "checkpoint-*", "config.json")):
        newest = os.path.dirname(max(models, key=os.path.getmtime))
        return f": pass one of the checkpoints that Hugging Face's Trainer saved there, such as {newest}"
    if glob.glob(os.path.join(glob.escape(run_path), "*.safetensors")):
        return ", only weights without their config.json: download the whole folder"
    for folder in (os.path.dirname(run_path), ""):
        if checkpoints := glob.glob(os.path.join(glob.escape(folder), "*", BEST_NAME)):
            break
    else:
        return ": train a model first (python train.py config/quickstart.py), or pass a different path"
    runs = [os.path.dirname(checkpoint) for checkpoint in sorted(checkpoints, key=os.path.getmtime, reverse=True)]
    close_runs = get_close_matches(run_path, runs, n=1)
    hint = f", did you mean {close_runs[0]}?" if close_runs else ": pass one of the"
    more = f" and {len(runs) - 5} more" if len(runs) > 5 else ""
    return f"{hint} {'Runs' if close_runs else 'runs'} there: {', '.join(runs[:5])}{more}"


def _num_updates(path: str) -> float:
    """Return a checkpoint's number of updates, or infinity if it is invalid, so that the caller reports its problem."""
    try:
        return load(path, mmap=True).get("iter_num", 0)
    except UserError:
        return math.inf


def restore_model(checkpoint: dict, path: str, base: str = "") -> GPT:
    """Build a checkpoint's model in float32 on the CPU. Raises UserError if the weights do not match model_args.

    A LoRA adapter is added to the model that it was trained on, and merge_adapter() merges it. base is the path of that
    model if it has moved.
    """
    if "lora" in checkpoint:
        model = _restore_adapter(checkpoint, path, base)
    elif base:
        raise UserError(f"--base={base} is for LoRA adapters, and {path} is a whole model: remove --base")
    else:
        config = foreign.parse_model_args(checkpoint["model_args"], path)
        model = foreign.load_weights(config, checkpoint["model"], path)
    if checkpoint.get("config", {}).get("document_mask"):
        tokenizer = make_tokenizer(checkpoint.get("tokenizer"))
        if tokenizer is None or tokenizer.end_id is None:
            raise UserError(f"{path} has document_mask=True but no <|endoftext|> token: use another checkpoint")
        model.document_end_id = tokenizer.end_id
    return model


def _restore_adapter(checkpoint: dict, path: str, base: str) -> GPT:
    """Load the base of an adapter and add the adapter to it.

    Adds to checkpoint what a PEFT directory lacks: the base's hash, the tokenizer and model_args.
    """
    info = dict(adapters.check_info(checkpoint["lora"], path))
    location, remedy = base or info["base"], "pass the model that it was trained on with --base=PATH"
    if not (os.path.exists(location) or hugging_face.is_model(location)):
        problem = f"for {location}, which does not exist" if location else "that does not name its base"
        raise UserError(f"{path} is a LoRA adapter {problem}: {remedy}")
    places = [location, *(os.path.join(location, name) for name in (BEST_NAME, LAST_NAME))]
    if any(os.path.exists(place) and os.path.samefile(place, path) for place in places):
        raise UserError(f"{path} is a LoRA adapter for {location}, but has replaced it there: {remedy}")
    model, tokenizer, source = load_from_path(location)
    config = foreign.parse_model_args(checkpoint["model_args"], path) if "model_args" in checkpoint else model.config
    if config.block_size < model.config.block_size:
        model.crop_block_size(config.block_size)
    sha256 = source_sha256(model, source)
    if info.get("sha256", sha256) != sha256:
        raise UserError(f"{path} is a LoRA adapter for other weights than those of {location}: {remedy}")
    info |= {"sha256": sha256, "base": os.path.abspath(location) if os.path.exists(location) else location}
    if (vocab_size := config.vocab_size or 0) > model.transformer.wte.num_embeddings:
        legacy.grow_vocabulary(model, vocab_size)
    checkpoint["lora"], model.document_end_id = info, None  # restore_model sets the adapter's own
    adapters.load_adapter(model, checkpoint, path)
    checkpoint.setdefault("tokenizer", tokenizer)
    checkpoint["model"], checkpoint["model_args"] = lora.trained_weights(model), model_args(model.config)
    return model


def merged(checkpoint: dict, model: GPT) -> dict:
    """Return the checkpoint of model, into which an adapter has been merged, without what belongs to the adapter."""
    kept = {key: value for key, value in checkpoint.items() if key not in ("lora", "optimizer", "scaler")}
    settings = {key: value for key, value in kept.get("config", {}).items() if key not in LORA_KEYS}
    return {**kept, "model": model.state_dict(), "model_args": model_args(model.config), "config": settings}


def source_sha256(model: GPT, source: dict) -> str:
    """Return the hash by which an adapter recognizes its base: model, which load_from_path returned with source.

    If the base is an adapter itself, this is the hash of its tensors, since merged weights may differ in the last bits.
    """
    return source.get("adapter_sha256") or lora.weights_sha256(model.state_dict(), model.config.tie_weights)


def restore_optimizer(optimizer: torch.optim.Optimizer, checkpoint: dict, model: GPT, path: str):
    """Load a checkpoint's optimizer state into the model's optimizer, which keeps its current settings."""
    current_state = optimizer.state_dict()
    groups = list(model.parameter_groups(any(g.get("rule") == "muon" for g in current_state["param_groups"])).values())
    stored_state = foreign.remap_optimizer_state(checkpoint["optimizer"], groups, groups, model.state_dict())
    if stored_state is None:
        remedy = f"start a new run with --init_from={path}"
        raise UserError(f"{path}: the optimizer state does not match the parameters or this optimizer; {remedy}")
    optimizer.load_state_dict({**stored_state, "param_groups": current_state["param_groups"]})


def make_tokenizer(description: dict | None) -> Tokenizer | None:
    """Create the tokenizer described in a checkpoint. Returns None if the tokenizer is missing or unsupported."""
    return from_dict(description) if description and description != UNSUPPORTED_TOKENIZER else None


def load_model(path: str, device: str = "cpu", dtype: str = "float32", **model_args) -> tuple[GPT, Tokenizer | None]:
    """Load a model and its tokenizer from a checkpoint file, an out_dir, a Hugging Face directory or a gpt2* name.

    Returns (model in eval mode, tokenizer or None). Supports every layout in dongpt/checkpoint/foreign.py; model_args
    such as n_head=4 supply values that the file lacks. A LoRA adapter is merged into its base, the model at path `base`
    if that is given. Raises UserError if the model cannot be loaded.
    """
    model, description, _ = load_from_path(path, **model_args)
    return model.to(device=device, dtype=DTYPES[dtype]).eval(), make_tokenizer(description)


def load_from_path(path: str, base: str = "", **extra_args) -> tuple[GPT, dict | None, dict]:
    """Return (model, tokenizer dict or None, checkpoint without tensors) for any path that load_model accepts."""
    checkpoint, path = load_path(path, **extra_args)
    model = restore_model(checkpoint, path, base)
    metadata = {key: value for key, value in checkpoint.items() if key not in ("model", "optimizer")}
    if model.adapter:
        prefix = f"{model.adapter['alpha']} {model.adapter['sha256']}"
        metadata["adapter_sha256"] = lora.weights_sha256(checkpoint["model"], prefix=prefix)
        lora.merge_adapter(model)
    return model, checkpoint.get("tokenizer"), metadata


def load_path(path: str, **extra_args) -> tuple[dict, str]:
    """Return (checkpoint, file path) for any path that load_model accepts. In an out_dir, ckpt.pt has priority.

    The checkpoint of a LoRA adapter contains only the adapter.
    """
    is_out_dir = any(os.path.exists(os.path.join(path, name)) for name in (BEST_NAME, LAST_NAME))
    if adapters.is_peft_adapter(path) and not is_out_dir:
        return adapters.load(path), path
    if hugging_face.is_model(path) and not is_out_dir:
        return hugging_face.load(path, **extra_args), path
    if os.path.isdir(path):
        return load_from_out_dir(path, prefer_newest=False, **extra_args)
    return load(path, **extra_args), path
