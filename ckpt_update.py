"""Convert a checkpoint of another trainer, or an old one, to the current format; to and from Hugging Face's format.

    python ckpt_update.py ckpt_original.pt ckpt.pt                             # nanoGPT, EDS, donGPT
    python ckpt_update.py gpt_model_small.pth.tar ckpt.pt --size=small         # nanoGPT+, which does not say n_head
    python ckpt_update.py ckpt_original.pt ckpt.pt --pos_embd=default+relative # adds a table of distances, all zero
    python ckpt_update.py ckpt.pt FOLDER --to=hf                               # for transformers
    python ckpt_update.py FOLDER ckpt.pt                                       # and back

The old file is not changed. The new one gets its name only after it has given the same logits as the old one.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

import configurator
from configurator import UserError
from dongpt.checkpoint import files as checkpoints
from dongpt.checkpoint import foreign, hugging_face
from dongpt.checkpoint.foreign import NANOGPT_PLUS_SIZES, parse_model_args, restore_weights
from dongpt.checkpoint.legacy import build_model, position_scheme
from dongpt.program import LOCK, locked_directory, locked_output, run_program
from model import GPT, RELATIVE

CONVERTED = "converted_by"  # key in the output: a hash of the command, which may replace its own output


@dataclass(frozen=True)
class UpdateConfig:
    n_head: int | None = None  # attention heads, if the file does not say
    size: Literal[None, "small", "medium", "large"] = None  # of a nanoGPT+ model: its n_head, and its shapes checked
    activation: Literal[None, "gelu", "gelu_tanh"] = None  # nanoGPT of May and June 2023 had gelu_tanh and did not say
    pos_embd: Literal[None, "default+relative", "relative"] = None  # add a table of distances to a default model
    to: Literal["dongpt", "hf"] = "dongpt"  # hf: a directory that transformers opens


def update_checkpoint(checkpoint: dict, model: GPT) -> dict:
    """A copy of checkpoint, of any known layout, in the current format and for model's architecture.

    If model has a table of distances and the checkpoint does not, one of zeros is added. The optimizer's states stay
    with their parameters. Raises UserError if the weights do not fit model.
    """
    where = "the checkpoint"
    missing = {} if isinstance(checkpoint.get("model_args"), dict) else {"n_head": model.config.n_head}
    old = foreign.upgrade(checkpoint, where, **missing)
    weights = checkpoints.clean_names(old["model"])
    new = {**old, "model": weights, "model_args": checkpoints.model_args(model.config)}
    table = model.state_dict().get(RELATIVE)
    if table is not None and RELATIVE not in weights:
        print(f"Adding {RELATIVE} to checkpoint.")
        weights[RELATIVE] = torch.zeros(table.shape)
    restore_weights(model.config, weights, where)
    config = parse_model_args(old["model_args"], where)
    before, after = asdict(config), asdict(model.config)
    free = {"dropout", "attn_dropout", *(["pos_embd"] if table is not None else [])}
    if differing := [key for key, value in after.items() if key not in free and value != before.get(key)]:
        problems = "; ".join(f"{key}={after[key]!r}, not {before.get(key)!r}" for key in differing)
        raise UserError(f"the model computes something else than the checkpoint's, it has {problems}: give one like it")
    if "optimizer" in old:
        groups = foreign.parameter_groups(config, old["optimizer"])
        if not foreign.states_fit(old["optimizer"], groups, weights):
            raise UserError(
                "the checkpoint's optimizer state is not that of its parameters: delete its key 'optimizer'"
            )
        new_groups = foreign.parameter_groups(model.config, old["optimizer"])
        new["optimizer"] = foreign.renumber(old["optimizer"], groups, new_groups)
    return new


def logits_of(model: GPT) -> torch.Tensor:
    """A model's logits (2, T, V) for a batch of ids that is the same each time."""
    size, generator = (2, min(model.config.block_size, 64)), torch.Generator().manual_seed(0)
    idx = torch.randint(model.transformer.wte.num_embeddings, size, generator=generator)
    with torch.no_grad():
        return model.eval()(idx, idx)[0]


def check_same(old: torch.Tensor, model: GPT, path: str):
    """Raise UserError unless the model to be written to path gives the old logits."""
    difference = (old - logits_of(model)).abs().max().item()
    if not difference <= 1e-5 * max(1.0, old.abs().max().item()):
        reason = f"its logits would differ by {difference:.2g} from the old ones"
        raise UserError(f"{path} was not written, since {reason}: this is a bug, please report it with the model_args")


def convert(old: str, new: str, cfg: UpdateConfig):
    """Write the model at old to new."""
    given: dict[str, Any] = {key: getattr(cfg, key) for key in ("n_head", "activation") if getattr(cfg, key)}
    checkpoint, path = checkpoints.load_path(old, **given, **(NANOGPT_PLUS_SIZES[cfg.size] if cfg.size else {}))
    model = checkpoints.restore_model(checkpoint, path)
    logits, tokenizer = logits_of(model), checkpoint.get("tokenizer")
    if cfg.to == "hf":
        write_directory(model, tokenizer, new, logits, command(old, cfg))
        print(f"wrote {new}: {describe(model)}, the same logits" + ("" if tokenizer else "; it has no tokenizer"))
        return
    if cfg.pos_embd:
        if model.config.model_type != "gpt" or position_scheme(model.config) != "default":
            scheme = position_scheme(model.config) if model.config.model_type == "gpt" else "a bigram"
            raise UserError(f"--pos_embd={cfg.pos_embd} adds to pos_embd=default, and {old} has {scheme}: drop it")
        model = build_model(replace(model.config, pos_embd="default+relative"))
    names = {"optimizer": "optimizer state", "iter_num": "iteration", "tokenizer": "tokenizer"}
    lacking = [name for key, name in names.items() if checkpoint.get(key) is None]
    checkpoint = {**update_checkpoint(checkpoint, model), CONVERTED: command(old, cfg)}
    checkpoints.save(checkpoint, new, check=lambda part: check_same(logits, checkpoints.load_anything(part)[0], new))
    without = f"; it has no {', no '.join(lacking)}" if lacking else ""
    print(f"wrote {new}: {describe(model)}, the same logits as {old}{without}")
    if {"optimizer state", "iteration"} & set(lacking):
        print("a run that resumes from it starts with new ones")


def command(old: str, cfg: UpdateConfig) -> str:
    """A hash of the command, by which its output is recognised later."""
    return hashlib.sha256(f"{os.path.realpath(old)} {cfg}".encode()).hexdigest()


def write_directory(model: GPT, tokenizer: dict | None, directory: str, logits: torch.Tensor, mark: str):
    """Write model to a directory in Hugging Face's format, which gets its name once it is complete."""
    workplace = tempfile.mkdtemp(prefix=".ckpt_update-", dir=os.path.dirname(os.path.abspath(directory)))
    complete = os.path.join(workplace, "new")  # has the permissions of other new directories, which workplace has not
    try:
        os.mkdir(complete)
        hugging_face.save(model, tokenizer, complete, mark)
        check_same(logits, checkpoints.load_anything(complete)[0], directory)
        if os.path.isdir(directory):  # empty, or written by this very command: see check_new
            os.replace(directory, os.path.join(workplace, "old"))
        os.replace(complete, directory)
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


def describe(model: GPT) -> str:
    """A model in a few words."""
    config = model.config
    if config.model_type != "gpt":
        return f"{config.model_type}, {model.get_num_params():,} parameters"
    return (
        f"{config.n_layer} layers, {config.n_head} heads, n_embd {config.n_embd}, block_size {config.block_size}, "
        f"positions: {position_scheme(config)}"
    )


def check_new(old: str, new: str, cfg: UpdateConfig):
    """Raise UserError if writing to new could destroy something that this very command did not write."""
    parent, name = os.path.split(os.path.abspath(new))
    if not os.path.isdir(parent):
        raise UserError(f"there is no directory {parent} to write {name} to: create it first")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{parent} cannot be written: give another place for the new file")
    if not os.path.lexists(new):
        return
    sources = [old, *(os.path.join(old, name) for name in (checkpoints.BEST, checkpoints.LAST))]
    if os.path.exists(new) and any(os.path.samefile(path, new) for path in sources if os.path.exists(path)):
        raise UserError(f"{new} is the file to be converted, which is never changed: give another name for the new one")
    if cfg.to == "hf":
        is_ours = os.path.isdir(new) and not os.path.islink(new)
        is_ours = is_ours and (not os.listdir(new) or hugging_face.mark_of(new) == command(old, cfg))
    else:
        is_ours = os.path.isfile(new) and _mark_of(new) == command(old, cfg)
    if not is_ours:
        raise UserError(f"{new} exists, and this command did not write it: give another name, or move it away first")


def _mark_of(path: str) -> str | None:
    """The hash that this program wrote into the checkpoint at path; None if it did not write it."""
    try:
        return checkpoints.load(path, mmap=True).get(CONVERTED)
    except UserError:
        return None


def main(argv: list[str] | None = None):
    cfg, _, (old, new) = configurator.load_with_paths(UpdateConfig, argv, "OLD NEW")
    if cfg.size and cfg.n_head not in (None, n_head := NANOGPT_PLUS_SIZES[cfg.size]["n_head"]):
        raise UserError(f"--size={cfg.size} means n_head={n_head}, and --n_head={cfg.n_head} is given: drop one")
    if cfg.to == "hf" and cfg.pos_embd:
        raise UserError(f"GPT-2's architecture has no pos_embd={cfg.pos_embd}: drop --pos_embd or --to=hf")
    parent = os.path.dirname(os.path.abspath(new))
    is_out_dir = os.path.exists(os.path.join(parent, LOCK))  # a run may be writing there
    with locked_output(new), locked_directory(parent) if is_out_dir else contextlib.nullcontext():
        check_new(old, new, cfg)
        convert(old, new, cfg)


if __name__ == "__main__":
    run_program(main)
