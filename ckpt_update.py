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
import tempfile
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

import configurator
from configurator import UserError
from dongpt.checkpoint import files as checkpoints
from dongpt.checkpoint import foreign, hugging_face
from dongpt.checkpoint.foreign import NANOGPT_PLUS_SIZES, load_weights, parse_model_args
from dongpt.checkpoint.legacy import build_model, position_scheme
from dongpt.program import LOCK_FILE, locked_directory, locked_output, run_program
from model import GPT, RELATIVE_TABLE

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
    new = foreign.upgrade(checkpoint, where, **missing)
    config, weights, free = parse_model_args(new["model_args"], where), dict(new["model"]), {"dropout", "attn_dropout"}
    if model.config.has_relative and RELATIVE_TABLE not in weights:
        print(f"Adding {RELATIVE_TABLE} to checkpoint.")
        weights[RELATIVE_TABLE] = torch.zeros(model.transformer.relative.relative_embeddings.weight.shape)
        free.add("pos_embd")
    load_weights(model.config, weights, where)
    before, after = asdict(config), asdict(model.config)
    if differing := [key for key, value in after.items() if key not in free and value != before.get(key)]:
        problems = "; ".join(f"{key}={after[key]!r}, not {before.get(key)!r}" for key in differing)
        raise UserError(f"the model computes something else than the checkpoint's, it has {problems}: give one like it")
    if "optimizer" in new:
        groups, new_groups = (foreign.parameter_groups(c, new["optimizer"]) for c in (config, model.config))
        new["optimizer"] = foreign.remap_optimizer_state(new["optimizer"], groups, new_groups, weights)
        if new["optimizer"] is None:
            raise UserError("the checkpoint's optimizer state is not that of its parameters: delete its key optimizer")
    return {**new, "model": weights, "model_args": checkpoints.model_args(model.config)}


def logits_of(model: GPT) -> torch.Tensor:
    """A model's logits (2, T, V) for a batch of ids that is the same each time."""
    size, generator = (2, min(model.config.block_size, 64)), torch.Generator().manual_seed(0)
    idx = torch.randint(model.transformer.wte.num_embeddings, size, generator=generator)
    with torch.no_grad():
        return model.eval()(idx, idx)[0]


def check_same(old: torch.Tensor, written: str, path: str):
    """Raise UserError unless the model in the file `written`, which is to become path, gives the old logits."""
    difference = (old - logits_of(checkpoints.load_anything(written)[0])).abs().max().item()
    if not difference <= 1e-5 * max(1.0, old.abs().max().item()):
        reason = f"its logits would differ by {difference:.2g} from the old ones"
        raise UserError(f"{path} was not written, since {reason}: this is a bug, please report it with the model_args")


def convert(old: str, new: str, cfg: UpdateConfig, mark: str):
    """Write the model at old to new."""
    given: dict[str, Any] = {key: getattr(cfg, key) for key in ("n_head", "activation") if getattr(cfg, key)}
    checkpoint, path = checkpoints.load_path(old, **{**given, **(NANOGPT_PLUS_SIZES[cfg.size] if cfg.size else {})})
    model = checkpoints.restore_model(checkpoint, path)
    logits, tokenizer = logits_of(model), checkpoint.get("tokenizer")
    if cfg.to == "hf":
        write_directory(model, tokenizer, new, logits, mark)
        print(f"wrote {new}: {describe(model)}, the same logits" + ("" if tokenizer else "; it has no tokenizer"))
        return
    if cfg.pos_embd:
        has = position_scheme(model.config) if model.config.model_type == "gpt" else "a bigram"
        if has != "default":
            raise UserError(f"--pos_embd={cfg.pos_embd} adds to pos_embd=default, and {old} has {has}: drop it")
        model = build_model(replace(model.config, pos_embd="default+relative"))
    names = {"optimizer": "optimizer state", "iter_num": "iteration", "tokenizer": "tokenizer"}
    lacking = [name for key, name in names.items() if checkpoint.get(key) is None]
    checkpoint = {**update_checkpoint(checkpoint, model), CONVERTED: mark}
    checkpoints.save(checkpoint, new, check=lambda part: check_same(logits, part, new))
    without = f"; it has no {', no '.join(lacking)}" if lacking else ""
    print(f"wrote {new}: {describe(model)}, the same logits as {old}{without}")
    if {"optimizer state", "iteration"} & set(lacking):
        print("a run that resumes from it starts with new ones")


def write_directory(model: GPT, tokenizer: dict | None, directory: str, logits: torch.Tensor, mark: str):
    """Write model to a directory in Hugging Face's format, which gets its name once it is complete."""
    parent = os.path.dirname(os.path.abspath(directory))
    with tempfile.TemporaryDirectory(prefix=".ckpt_update-", dir=parent, ignore_cleanup_errors=True) as temporary:
        complete = os.path.join(temporary, "new")  # has the permissions of other new directories, unlike temporary
        os.mkdir(complete)
        hugging_face.save(model, tokenizer, complete, mark)
        check_same(logits, complete, directory)
        if os.path.isdir(directory):  # empty, or written by this very command: see check_new
            os.replace(directory, os.path.join(temporary, "old"))
        os.replace(complete, directory)


def describe(model: GPT) -> str:
    """A model in a few words."""
    config = model.config
    if config.model_type != "gpt":
        return f"{config.model_type}, {model.get_num_params():,} parameters"
    sizes = f"{config.n_layer} layers, {config.n_head} heads, n_embd {config.n_embd}, block_size {config.block_size}"
    return f"{sizes}, positions: {position_scheme(config)}"


def check_new(old: str, new: str, cfg: UpdateConfig, mark: str):
    """Raise UserError if writing to new could destroy something that this very command did not write."""
    parent, name = os.path.split(os.path.abspath(new))
    if not (os.path.isdir(parent) and os.access(parent, os.W_OK)):
        raise UserError(f"{parent} is no directory that can be written: create it first, or give another place")
    sources = [old, *(os.path.join(old, name) for name in (checkpoints.BEST_NAME, checkpoints.LAST_NAME))]
    if os.path.exists(new) and any(os.path.samefile(path, new) for path in sources if os.path.exists(path)):
        raise UserError(f"{new} is the file to be converted, which is never changed: give another name for the new one")
    is_folder = os.path.isdir(new) and not os.path.islink(new)
    if not os.path.lexists(new) or cfg.to == "hf" and is_folder and not os.listdir(new):
        return
    written_by = None
    with contextlib.suppress(UserError):
        written_by = hugging_face.stored_hash(new) if is_folder else checkpoints.load(new, mmap=True).get(CONVERTED)
    if written_by != mark:
        raise UserError(f"{new} exists, and this command did not write it: give another name, or move it away first")


def main(argv: list[str] | None = None):
    cfg, _, (old, new) = configurator.load_with_paths(UpdateConfig, argv, "OLD NEW")
    if cfg.size and cfg.n_head not in (None, n_head := NANOGPT_PLUS_SIZES[cfg.size]["n_head"]):
        raise UserError(f"--size={cfg.size} means n_head={n_head}, and --n_head={cfg.n_head} is given: drop one")
    if cfg.to == "hf" and cfg.pos_embd:
        raise UserError(f"GPT-2's architecture has no pos_embd={cfg.pos_embd}: drop --pos_embd or --to=hf")
    mark = hashlib.sha256(f"{os.path.realpath(old)} {cfg}".encode()).hexdigest()  # of this command, see check_new
    parent = os.path.dirname(os.path.abspath(new))
    is_out_dir = os.path.exists(os.path.join(parent, LOCK_FILE))  # a run may be writing there
    with locked_output(new), locked_directory(parent) if is_out_dir else contextlib.nullcontext():
        check_new(old, new, cfg, mark)
        convert(old, new, cfg, mark)


if __name__ == "__main__":
    run_program(main)
