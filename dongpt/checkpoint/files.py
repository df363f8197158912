"""Checkpoint files: ckpt.pt and ckpt_last.pt in an out_dir, and how a path to a model is interpreted.

A checkpoint is one dict of tensors and plain Python values that `torch.load(weights_only=True)` reads: nanoGPT's keys
(model, optimizer, model_args, iter_num, best_val_loss, config) and ours (format_version, tokenizer, ...). Files of
other trainers are read as if they had been written so: dongpt/checkpoint/foreign.py.

    model, tokenizer = load_model("out/ckpt.pt")        # eval mode, float32, CPU
"""

import math
import os
import pickle
import re
import sys
import warnings
import zipfile
from dataclasses import asdict
from typing import Any, Callable

import torch

from configurator import UserError
from dongpt.checkpoint import foreign, hugging_face
from dongpt.checkpoint.foreign import FORMAT_VERSION as FORMAT_VERSION
from dongpt.checkpoint.foreign import clean_names, parse_model_args, restore_weights
from dongpt.program import first_line, replaced_file
from dongpt.runtime import DTYPES, print0
from dongpt.text import tokenizers
from dongpt.text.tokenizers import Tokenizer
from model import GPT, GPTConfig

BEST, LAST = "ckpt.pt", "ckpt_last.pt"
NANOGPT_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")

# ----------------------------------------------------------------------------------------------------------------------
# writing


def save(checkpoint: dict, path: str, check: Callable[[str], Any] | None = None):
    """Write checkpoint to path, which at every moment holds either the complete old file or the complete new one.

    check(temporary path) may prevent the replacement by raising. Raises UserError if the file cannot be written.
    """
    try:
        with replaced_file(path, check=check) as file:
            torch.save(checkpoint, file)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        if isinstance(error, torch.OutOfMemoryError) or "CUDA" in str(error):
            raise
        reason = first_line(error)
        raise UserError(
            f"{path} could not be written ({reason}): free space there; the old file is unchanged"
        ) from error


def set_aside(out_dir: str, more_names: list[str]) -> str:
    """Move an earlier run's checkpoints, and the files in more_names, to out_dir/old-N. Returns it, or ''."""
    names = [name for name in (BEST, LAST, *more_names) if os.path.exists(os.path.join(out_dir, name))]
    if not names:
        return ""
    n = 1
    while os.path.exists(old_dir := os.path.join(out_dir, f"old-{n}")):
        n += 1
    os.makedirs(old_dir)
    for name in names:
        os.replace(os.path.join(out_dir, name), os.path.join(old_dir, name))
    return old_dir


def model_args(config: GPTConfig) -> dict:
    """The architecture in a checkpoint: nanoGPT's seven keys, and those of ours that differ from nanoGPT's model.

    attn_dropout only matters in training; it is in the checkpoint's config.
    """
    default = GPTConfig()
    return {
        name: value
        for name, value in asdict(config).items()
        if name in NANOGPT_ARGS or (name != "attn_dropout" and value != getattr(default, name, None))
    }


# ----------------------------------------------------------------------------------------------------------------------
# reading


def load(path: str, mmap: bool = False, **given) -> dict:
    """The checkpoint at path in the current layout, its tensors on the CPU (with mmap, read when they are first used).

    given are hyper-parameters that files of other trainers may lack. Raises UserError for a file that is missing,
    damaged, of an unknown layout, or that asks to run code.
    """
    content = _read(path, mmap)
    checkpoint = foreign.upgrade(content, path, **given)
    if "format_version" not in content:
        checkpoint.setdefault("tokenizer", foreign.find_tokenizer(checkpoint, path))
    return checkpoint


def _read(path: str, mmap: bool):
    """The content of the file at path: tensors and plain values."""
    if not os.path.isfile(path):
        raise UserError(f"there is no checkpoint {path}: pass a run's --out_dir or a checkpoint's path, or train first")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickle protocols before it refuses
            is_zip = zipfile.is_zipfile(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_zip)
            if is_zip and not mmap and zipfile.ZipFile(path).testzip():  # torch checks no checksums
                raise RuntimeError
        return content
    except Exception as error:  # a damaged file can raise nearly anything
        if isinstance(error, pickle.UnpicklingError) and "unsupported" in str(error).lower():  # not on torch's list
            wanted = re.search(r"GLOBAL (\S+)", str(error))
            raise UserError(
                f"{path} is refused, and was not run: it holds more than tensors and plain values"
                f"{f' ({wanted[1]})' if wanted else ''}, and loading that could run any code; save model.state_dict() "
                f"where it was made, or train again if its vocabulary was not kept (a whole pickled model has none)"
            ) from error
        raise UserError(f"{path} is truncated or damaged: use an older checkpoint") from error


def is_valid(path: str) -> bool:
    """Whether path is a checkpoint that can be loaded, judging by all but the values of its tensors."""
    return _age(path) < math.inf


def load_valid(out_dir: str, names: tuple[str, ...] = (LAST, BEST), newest: bool = True, **given) -> tuple[dict, str]:
    """(checkpoint, path) from an out_dir: the newest valid one of names, or with newest=False the first valid one.

    A damaged file that is skipped is reported on stderr. Raises UserError if none is left.
    """
    paths = [path for name in names if os.path.exists(path := os.path.join(out_dir, name))]
    if not paths:
        raise UserError(f"{out_dir} has no checkpoint: train with --out_dir={out_dir} first, or give another out_dir")
    if newest and len(paths) > 1:
        paths.sort(key=_age, reverse=True)  # stable: of equally old ones the first name wins
    problems: list[str] = []
    for path in paths:
        try:
            checkpoint = load(path, **given)
            for problem in problems:
                print0(f"{problem}; going on with {path}", file=sys.stderr)
            return checkpoint, path
        except UserError as error:
            problems.append(str(error))
    raise UserError("; ".join(problems))


def _age(path: str) -> float:
    """Number of updates before the checkpoint at path; infinite if it is invalid, so that it is tried and reported."""
    try:
        return load(path, mmap=True).get("iter_num", 0)
    except UserError:
        return math.inf


def restore_model(checkpoint: dict, path: str) -> GPT:
    """The model of a checkpoint, float32 on the CPU. Raises UserError if weights and model_args disagree."""
    model = restore_weights(parse_model_args(checkpoint["model_args"], path), clean_names(checkpoint["model"]), path)
    if checkpoint.get("config", {}).get("document_mask"):
        tokenizer = make_tokenizer(checkpoint.get("tokenizer"))
        if tokenizer is None or tokenizer.end_id is None:
            raise UserError(f"{path} has document_mask=True, but no <|endoftext|>: use another checkpoint")
        model.document_end = tokenizer.end_id
    return model


def restore_optimizer(optimizer: torch.optim.Optimizer, checkpoint: dict, model: GPT, path: str):
    """Load the moments stored in checkpoint into the optimizer of model; its settings stay those of this run."""
    stored, groups = checkpoint["optimizer"], model.parameter_groups(foreign.uses_muon(optimizer.param_groups))
    if not foreign.states_fit(stored, groups, model.state_dict()):
        raise UserError(
            f"{path}: its optimizer state does not belong to its parameters, or is another "
            f"optimizer's; start a new run with --init_from={path}"
        )
    pairs = zip(optimizer.state_dict()["param_groups"], stored["param_groups"])
    settings = [{**new, "params": old["params"]} for new, old in pairs]
    optimizer.load_state_dict({"state": stored["state"], "param_groups": settings})


def make_tokenizer(description: dict | None) -> Tokenizer | None:
    """The tokenizer of a checkpoint; None if it has none, or one that donGPT does not know."""
    return tokenizers.from_dict(description) if description and description != tokenizers.FOREIGN else None


# ----------------------------------------------------------------------------------------------------------------------
# any path


def load_model(path: str, device: str = "cpu", dtype: str = "float32", **model_args) -> tuple[GPT, Tokenizer | None]:
    """(model in eval mode, tokenizer or None) from a checkpoint file, an out_dir, a Hugging Face directory or gpt2*.

    The file may be any that dongpt/checkpoint/foreign.py knows; model_args (n_head=4) add what it lacks. Raises
    UserError for what cannot be loaded.
    """
    model, description, _ = load_anything(path, **model_args)
    return model.to(device=device, dtype=DTYPES[dtype]).eval(), make_tokenizer(description)


def load_path(path: str, **given) -> tuple[dict, str]:
    """(checkpoint, path of its file) of whatever load_model accepts; of an out_dir, its ckpt.pt if that is valid."""
    is_run = any(os.path.exists(os.path.join(path, name)) for name in (BEST, LAST))
    if hugging_face.is_model(path) and not is_run:
        checkpoint = hugging_face.load(path)
        foreign.check_given(given, checkpoint["model_args"], path)
        return checkpoint, path
    if os.path.isdir(path):
        return load_valid(path, (BEST, LAST), newest=False, **given)
    return load(path, **given), path


def load_anything(path: str, **given) -> tuple[GPT, dict | None, dict]:
    """(model, tokenizer as a plain dict or None, checkpoint without its tensors) of whatever load_model accepts."""
    checkpoint, path = load_path(path, **given)
    model, _ = restore_model(checkpoint, path), checkpoint.pop("model")
    checkpoint.pop("optimizer", None)
    return model, checkpoint.get("tokenizer"), checkpoint
