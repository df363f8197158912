"""Rewrites a checkpoint of another trainer, or of an older age, in the current format; to and from Hugging Face's.

    python ckpt_update.py ckpt_original.pt ckpt.pt                             # nanoGPT, EDS, donGPT
    python ckpt_update.py gpt_model_small.pth.tar ckpt.pt --size=small         # nanoGPT+, which does not say n_head
    python ckpt_update.py ckpt_original.pt ckpt.pt --pos_embd=default+relative # adds a table of distances, all zero
    python ckpt_update.py ckpt.pt FOLDER --to=hf                               # for transformers
    python ckpt_update.py FOLDER ckpt.pt                                       # and back

The old file stays as it is. The new one gets its name only after it has given the same logits as the old one.
"""

import hashlib
import os
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch

import configurator
from configurator import UserError
from dongpt.checkpoint import files as checkpoints
from dongpt.checkpoint import foreign, hugging_face
from dongpt.checkpoint.foreign import NANOGPT_PLUS_SIZES
from dongpt.checkpoint.legacy import build_model
from dongpt.program import run_program
from model import GPT, RELATIVE

CONVERTED = "converted_by"  # a key of what this program writes: the hash of its command, which may write it again


@dataclass(frozen=True)
class UpdateConfig:
    n_head: int | None = None  # attention heads, where the file does not say
    size: Literal[None, "small", "medium", "large"] = None  # of a nanoGPT+ model: its n_head, and its shapes checked
    activation: Literal[None, "gelu", "gelu_tanh"] = None  # nanoGPT of May and June 2023 had gelu_tanh and did not say
    pos_embd: Literal[None, "default+relative", "relative"] = None  # add a table of distances to a default model
    to: Literal["dongpt", "hf"] = "dongpt"  # hf: a folder that transformers opens


def update_checkpoint(checkpoint: dict, model: GPT) -> dict:
    """checkpoint, of any known layout, in the current format and for model's architecture; it is left as it is.

    A table of distances that model has and the checkpoint lacks is added, all zero. The optimizer's states stay with
    their parameters. Raises UserError where the weights do not fit model.
    """
    lacks = {} if isinstance(checkpoint.get("model_args"), dict) else {"n_head": model.config.n_head}
    old = foreign.upgrade(checkpoint, "the checkpoint", **lacks)
    weights = checkpoints.clean_names(old["model"])
    new = {**old, "model": weights, "model_args": checkpoints.model_args(model.config)}
    table = model.state_dict().get(RELATIVE)
    if table is not None and RELATIVE not in weights:
        print(f"Adding {RELATIVE} to checkpoint.")
        weights[RELATIVE] = torch.zeros(table.shape)
    checkpoints.fill(build_model(model.config), weights, "the checkpoint")
    config = foreign.config_of(old["model_args"], "the checkpoint")
    had, has = asdict(config), asdict(model.config)
    free = {"dropout", "attn_dropout", *(["pos_embd"] if table is not None else [])}
    other = [f"{key}={has[key]!r}, not {had.get(key)!r}" for key in has if key not in free and has[key] != had.get(key)]
    if other:
        raise UserError(
            f"the model computes otherwise than the checkpoint's, it has {'; '.join(other)}: "
            f"give a model of the checkpoint's own architecture"
        )
    if "optimizer" in old:
        groups = foreign.parameter_groups(config, old["optimizer"])
        if not foreign.states_fit(old["optimizer"], groups, weights):
            raise UserError(
                "the checkpoint's optimizer state does not belong to its parameters: take its key 'optimizer' out"
            )
        new["optimizer"] = foreign.renumber(
            old["optimizer"], groups, foreign.parameter_groups(model.config, old["optimizer"])
        )
    return new


def fixed_batch(model: GPT) -> torch.Tensor:
    """A batch of ids that a model reads, (2, T), the same each time."""
    config = model.config
    return torch.randint(config.vocab_size, (2, min(config.block_size, 64)), generator=torch.Generator().manual_seed(0))


def logits_of(model: GPT) -> torch.Tensor:
    """What a model makes of its fixed_batch, (2, T, V)."""
    idx = fixed_batch(model)
    with torch.no_grad():
        return model.eval()(idx, idx)[0]


def check_same(old: torch.Tensor, new: torch.Tensor, tolerance: float, path: str):
    """Raise UserError unless two models gave the same logits."""
    difference = (old - new).abs().max().item()
    if not difference <= tolerance * max(1.0, old.abs().max().item()):
        raise UserError(
            f"{path} was not written, since its logits would differ by {difference:.2g} from the old "
            f"ones: this is a bug, please report it with the file's model_args"
        )


def convert(old: str, new: str, cfg: UpdateConfig):
    """Write what old holds to new."""
    given = {key: getattr(cfg, key) for key in ("n_head", "activation") if getattr(cfg, key) is not None}
    given.update(NANOGPT_PLUS_SIZES.get(cfg.size, {}))
    if checkpoints.is_hugging_face(old):
        model, tokenizer = hugging_face.load(old)
        foreign.check_given(given, asdict(model.config), old)
        checkpoint = {
            "model": model.state_dict(),
            "model_args": checkpoints.model_args(model.config),
            "tokenizer": tokenizer,
            "format_version": checkpoints.FORMAT_VERSION,
        }
    else:
        checkpoint, path = checkpoints.load_path(old, **given)
        model = checkpoints.build(checkpoint, path)
    logits = logits_of(model)
    if cfg.to == "hf":
        write_folder(model, checkpoint.get("tokenizer"), new, logits, command(old, cfg))
        return
    if cfg.pos_embd:
        if model.config.model_type != "gpt" or model.config.positions != "default":
            has = model.config.positions if model.config.model_type == "gpt" else "a bigram"
            raise UserError(f"--pos_embd={cfg.pos_embd} adds to pos_embd=default, and {old} has {has}: leave it away")
        model = build_model(replace(model.config, pos_embd="default+relative"))
    lacking = [
        name
        for name, key in (("optimizer state", "optimizer"), ("iteration", "iter_num"), ("tokenizer", "tokenizer"))
        if checkpoint.get(key) is None
    ]
    checkpoint = {**update_checkpoint(checkpoint, model), CONVERTED: command(old, cfg)}
    checkpoints.save(
        checkpoint,
        new,
        check=lambda written: check_same(
            logits, logits_of(checkpoints.build(checkpoints.load(written), written)), 1e-5, new
        ),
    )
    print(
        f"wrote {new}: {describe(model)}, the same logits as {old}"
        + (f"; it has no {', no '.join(lacking)}" if lacking else "")
    )
    if {"optimizer state", "iteration"} & set(lacking):
        print("a run that resumes from it starts those afresh")


def command(old: str, cfg: UpdateConfig) -> str:
    """A hash of what is converted and how, by which an output is known again."""
    return hashlib.sha256(f"{os.path.realpath(old)} {cfg}".encode()).hexdigest()


def write_folder(model: GPT, tokenizer: dict | None, folder: str, logits: torch.Tensor, mark: str):
    """Write model to a folder in Hugging Face's format, which gets its name last."""
    around = tempfile.mkdtemp(prefix=".ckpt_update-", dir=os.path.dirname(os.path.abspath(folder)))
    temporary = os.path.join(around, "new")  # made with the rights that new folders get here, which around is not
    try:
        os.mkdir(temporary)
        hugging_face.save(model, tokenizer, temporary, mark)
        check_same(logits, hugging_face.logits_of(temporary, fixed_batch(model)), 1e-4, folder)
        if os.path.isdir(folder):  # empty, or written by this very command: see check_new
            os.replace(folder, os.path.join(around, "old"))
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(around, ignore_errors=True)
    print(f"wrote {folder}: {describe(model)}, the same logits" + ("" if tokenizer else "; it has no tokenizer"))


def describe(model: GPT) -> str:
    """What a model is, in a few words."""
    config = model.config
    if config.model_type != "gpt":
        return f"{config.model_type}, {model.get_num_params():,} parameters"
    return (
        f"{config.n_layer} layers, {config.n_head} heads, n_embd {config.n_embd}, block_size {config.block_size}, "
        f"positions: {config.positions}"
    )


def check_new(old: str, new: str, cfg: UpdateConfig):
    """Raise UserError if writing to new could destroy something that this very command did not write."""
    parent = os.path.dirname(os.path.abspath(new))
    if not os.path.isdir(parent):
        raise UserError(f"there is no folder {parent} to write {os.path.basename(new)} to: make it first")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{parent} cannot be written: give another place for the new file")
    if cfg.to != "hf" and os.path.lexists(f"{new}.part"):  # which is what the file is called until it is whole
        raise UserError(f"{new}.part exists, and would be overwritten: move it away first")
    if not os.path.lexists(new):
        return
    inside = [os.path.join(old, name) for name in (checkpoints.BEST, checkpoints.LAST)] if os.path.isdir(old) else []
    if os.path.exists(new) and any(os.path.samefile(path, new) for path in (old, *inside) if os.path.exists(path)):
        raise UserError(
            f"{new} is the file to be rewritten, and this program never writes in place: "
            f"give another name for the new one"
        )
    if cfg.to == "hf":
        is_ours = (
            os.path.isdir(new)
            and not os.path.islink(new)
            and (not os.listdir(new) or hugging_face.mark_of(new) == command(old, cfg))
        )
    else:
        is_ours = os.path.isfile(new) and _mark_of(new) == command(old, cfg)
    if not is_ours:
        raise UserError(f"{new} exists, and this command did not write it: give another name, or move it away first")


def _mark_of(path: str) -> str | None:
    """What this program wrote into the checkpoint at path to know it again; None if it did not write it."""
    try:
        return checkpoints.load(path, mmap=True).get(CONVERTED)
    except ValueError:
        return None


def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    paths = [arg for arg in argv if not arg.startswith("-")]
    cfg, _ = configurator.load(UpdateConfig, [arg for arg in argv if arg.startswith("-")])
    if len(paths) != 2:
        raise UserError(
            f"two paths are needed, the old file and the new one, and there are {len(paths)}: "
            f"python ckpt_update.py OLD NEW"
        )
    if cfg.size and cfg.n_head not in (None, NANOGPT_PLUS_SIZES[cfg.size]["n_head"]):
        raise UserError(
            f"--size={cfg.size} means n_head={NANOGPT_PLUS_SIZES[cfg.size]['n_head']}, "
            f"and --n_head={cfg.n_head} is given: leave one away"
        )
    if cfg.to == "hf" and cfg.pos_embd:
        raise UserError(f"GPT-2's architecture has no pos_embd={cfg.pos_embd}: leave --pos_embd or --to=hf away")
    old, new = paths
    check_new(old, new, cfg)
    convert(old, new, cfg)


if __name__ == "__main__":
    run_program(main)
