"""Checkpoints: owner of ckpt.pt and ckpt_last.pt in an out_dir, and of what a path to a model means.

A checkpoint is one dict of tensors and plain Python values that `torch.load(weights_only=True)` reads: nanoGPT's keys
(model, optimizer, model_args, iter_num, best_val_loss, config) and ours (format_version, tokenizer, ...). Files of
other trainers are read as if they had been written so: dongpt/checkpoint/foreign.py.

    model, tokenizer = load_model("out/ckpt.pt")        # eval mode, float32, CPU
"""

import errno
import os
import pickle
import re
import sys
import warnings
import zipfile
from contextlib import contextmanager
from dataclasses import asdict
from typing import Callable

import torch

from configurator import UserError
from dongpt.checkpoint import foreign, hugging_face
from dongpt.checkpoint.foreign import FORMAT_VERSION as FORMAT_VERSION
from dongpt.checkpoint.foreign import clean_names
from dongpt.checkpoint.legacy import build_model
from dongpt.runtime import DTYPES, print_main
from dongpt.text import tokenizers
from model import GPT, GPTConfig

BEST, LAST = "ckpt.pt", "ckpt_last.pt"
NANOGPT_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")

# ----------------------------------------------------------------------------------------------------------------------
# files


def save(checkpoint: dict, path: str, check: Callable[[str], None] | None = None):
    """Write checkpoint to path, which at every moment holds either the old file whole or the new one.

    check is called with the path of the written file before it gets its name. Raises UserError, and leaves the old
    file, when it cannot be written; what check raises leaves it too.
    """
    temporary = path + ".part"
    try:
        with _writing(path), open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if check:
            check(temporary)
        with _writing(path):
            os.replace(temporary, path)
            if os.name == "posix":  # the new name itself lasts only once the folder is written
                _sync_folder(os.path.dirname(os.path.abspath(path)))
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


@contextmanager
def _writing(path: str):
    """Turns what a full disk or missing rights raise into a ValueError that speaks of path."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        if isinstance(error, torch.OutOfMemoryError) or "CUDA" in str(error):
            raise
        raise UserError(
            f"{path} could not be written ({error}): free space there; the file that was there before is as it was"
        ) from error


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


def load(path: str, mmap: bool = False, **given) -> dict:
    """The checkpoint at path in the current layout, its tensors on the CPU (with mmap read only when they are used).

    given are hyper-parameters that files of other trainers may lack. Raises UserError for a file that is missing,
    damaged, of a layout that is not known, or that asks to run code.
    """
    content = _read(path, mmap)
    checkpoint = foreign.upgrade(content, path, **given)
    if "format_version" not in content:
        checkpoint.setdefault("tokenizer", foreign.find_tokenizer(checkpoint, path))
    return checkpoint


def _read(path: str, mmap: bool):
    """What the file at path holds: tensors and plain values."""
    if not os.path.isfile(path):
        raise UserError(
            f"there is no checkpoint {path}: pass --out_dir=FOLDER of a run or the path of a checkpoint, or train first"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch speaks of pickle protocols before it refuses
            is_zip = zipfile.is_zipfile(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_zip)
            if is_zip and not mmap and (broken := zipfile.ZipFile(path).testzip()):  # torch checks no checksums
                raise RuntimeError(f"{broken} is damaged")
    except pickle.UnpicklingError as error:
        if "unsupported" in str(error).lower():  # a name or an instruction that is not on torch's list of harmless ones
            wants = re.search(r"GLOBAL (\S+)", str(error))
            raise UserError(
                f"{path} is refused, and was not run: it holds more than tensors and plain values"
                f"{f' ({wants[1]})' if wants else ''}, and loading that could run any code; save model.state_dict() "
                f"where it was made, or train anew if its vocabulary was not kept (a whole pickled model has none)"
            ) from error
        raise UserError(f"{path} is damaged: use an older checkpoint") from error
    except Exception as error:  # a damaged file can raise nearly anything
        raise UserError(f"{path} is truncated or damaged: use an older checkpoint") from error
    return content


def load_valid(out_dir: str, names: tuple[str, ...] = (LAST, BEST), newest: bool = True, **given) -> tuple[dict, str]:
    """(checkpoint, path) of an out_dir: the newest valid of names, or with newest=False the first valid one.

    What is passed over because it is damaged is said on stderr. Raises UserError if none is left.
    """
    there = [os.path.join(out_dir, name) for name in names if os.path.exists(os.path.join(out_dir, name))]
    if not there:
        raise UserError(f"{out_dir} has no checkpoint: train with --out_dir={out_dir} first, or give another out_dir")
    problems, ages = [], {}
    for path in there:
        try:
            ages[path] = load(path, mmap=True, **given).get("iter_num", 0)
        except ValueError as error:
            problems.append(str(error))
    for path in sorted(ages, key=lambda path: -ages[path]) if newest else ages:  # of equals the first name wins
        try:
            checkpoint = load(path, **given)
        except ValueError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            print_main(f"{problem}; going on with {path}", file=sys.stderr)
        return checkpoint, path
    raise UserError("; ".join(problems))


def check_writable(out_dir: str):
    """Raise UserError unless files can be made in out_dir, which is made if need be."""
    try:
        os.makedirs(out_dir, exist_ok=True)
        probe = os.path.join(out_dir, ".writable")
        open(probe, "wb").close()
        os.remove(probe)
    except OSError as error:
        raise UserError(f"out_dir={out_dir!r} cannot be written ({error.strerror}): give another --out_dir") from error


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


def restore_optimizer(optimizer: torch.optim.Optimizer, checkpoint: dict, model: GPT, path: str):
    """Give the optimizer of model the moments stored in checkpoint; its settings stay those of this run."""
    groups = model.parameter_groups(foreign.uses_muon(optimizer.param_groups))
    if not foreign.states_fit(checkpoint["optimizer"], groups, model.state_dict()):
        raise UserError(
            f"{path}: its optimizer state does not belong to its parameters, or is another "
            f"optimizer's; begin a new run with --init_from={path}"
        )
    stored = checkpoint["optimizer"]
    for old, new in zip(stored["param_groups"], optimizer.param_groups):
        old.update({key: value for key, value in new.items() if key != "params"})
    optimizer.load_state_dict(stored)


def model_args(config: GPTConfig) -> dict:
    """What a checkpoint says of the architecture: nanoGPT's seven keys, and ours where nanoGPT's value is another.

    attn_dropout acts in training alone and is in the checkpoint's config.
    """
    default = GPTConfig()
    return {
        name: value
        for name, value in asdict(config).items()
        if name in NANOGPT_ARGS or (name != "attn_dropout" and value != getattr(default, name, None))
    }


def build(checkpoint: dict, path: str) -> GPT:
    """The model of a checkpoint, float32 on the CPU. Raises UserError where weights and model_args disagree."""
    model = build_model(foreign.config_of(checkpoint["model_args"], path))
    fill(model, clean_names(checkpoint["model"]), path)
    if checkpoint.get("config", {}).get("document_mask"):
        model.document_end = tokenizers.from_dict(checkpoint["tokenizer"]).end_id
    return model


def fill(model: GPT, weights: dict, path: str):
    """Give model weights, of the file at path. Raises UserError that lists every name and shape that does not fit."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    problems = [
        f"{kind}: {', '.join(names)}"
        for kind, names in (
            ("missing", [name for name in wanted if name not in found]),
            ("unexpected", [name for name in found if name not in wanted]),
            (
                "of another shape",
                [
                    f"{name} is {found[name]} in the file and {wanted[name]} by the hyper-parameters"
                    for name in wanted
                    if name in found and found[name] != wanted[name]
                ],
            ),
        )
        if names
    ]
    if problems:
        raise UserError(
            f"{path}: its weights do not fit its hyper-parameters (check --n_head or --size if you gave "
            f"them); {'; '.join(problems)}"
        )
    model.load_state_dict(weights)


# ----------------------------------------------------------------------------------------------------------------------
# whatever a path means


def load_model(path: str, device: str = "cpu", dtype: str = "float32", **model_args):
    """(model in eval mode, tokenizer or None) of a checkpoint file, an out_dir, a Hugging Face folder or gpt2*.

    The file may be any that checkpoint/foreign.py knows; model_args (n_head=4) say what it lacks. Raises UserError for
    what cannot be loaded.
    """
    model, description, _ = load_anything(path, **model_args)
    known = description and description != tokenizers.FOREIGN
    tokenizer = tokenizers.from_dict(description) if known else None
    return model.to(device=device, dtype=DTYPES[dtype]).eval(), tokenizer


def load_path(path: str, **given) -> tuple[dict, str]:
    """(checkpoint, the path of its file) of a checkpoint file or of an out_dir, which means its ckpt.pt."""
    if os.path.isdir(path):
        return load_valid(path, (BEST, LAST), newest=False, **given)
    return load(path, **given), path


def is_hugging_face(path: str) -> bool:
    """Whether path means a model in Hugging Face's format: in a folder that a run has written to, the run counts."""
    return hugging_face.is_one(path) and not any(os.path.exists(os.path.join(path, name)) for name in (BEST, LAST))


def load_anything(path: str, **given) -> tuple[GPT, dict | None, dict]:
    """(model, tokenizer as a plain dict or None, checkpoint without its tensors) of what load_model takes."""
    if is_hugging_face(path):
        model, tokenizer = hugging_face.load(path)
        foreign.check_given(given, asdict(model.config), path)
        return model, tokenizer, {}
    checkpoint, path = load_path(path, **given)
    model = build(checkpoint, path)
    rest = {key: value for key, value in checkpoint.items() if key not in ("model", "optimizer")}
    return model, checkpoint.get("tokenizer"), rest
