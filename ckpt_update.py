"""Convert checkpoints of other trainers and old ones to the current format, or to and from Hugging Face's format.

    python ckpt_update.py ckpt_original.pt ckpt.pt                             # nanoGPT, EDS, donGPT
    python ckpt_update.py gpt_model_small.pth.tar ckpt.pt --size=small         # nanoGPT+, which does not store n_head
    python ckpt_update.py ckpt_original.pt ckpt.pt --pos_embd=default+relative # adds a zero table of distances
    python ckpt_update.py ckpt.pt FOLDER --to=hf                               # for transformers
    python ckpt_update.py FOLDER ckpt.pt                                       # and back

IN is a checkpoint file, an out_dir, a directory in Hugging Face's format, or gpt2, gpt2-medium, gpt2-large or gpt2-xl.
It is not changed. OUT is moved into place only after its model has produced the same logits as IN's.
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

HASH_KEY = "converted_by"  # key in OUT: a hash of the command, which may overwrite its own output


@dataclass(frozen=True)
class UpdateConfig:
    n_head: int | None = None  # number of attention heads, if the file does not store it
    size: Literal[None, "small", "medium", "large"] = None  # size of a nanoGPT+ model: sets n_head, checks the shapes
    activation: Literal[None, "gelu", "gelu_tanh"] = None  # gelu_tanh for nanoGPT of May and June 2023
    pos_embd: Literal[None, "default+relative", "relative"] = None  # add a table of distances to a default model
    to: Literal["dongpt", "hf"] = "dongpt"  # hf writes a directory that transformers can load


def update_checkpoint(checkpoint: dict, model: GPT) -> dict:
    """Return a copy of checkpoint, in any known layout, converted to the current format and model's architecture.

    Adds a zero table of distances if model has one and the checkpoint does not. Optimizer states stay with their
    parameters. Raises UserError if the weights do not fit model.
    """
    path = "the checkpoint"
    missing_args = {} if isinstance(checkpoint.get("model_args"), dict) else {"n_head": model.config.n_head}
    new = foreign.upgrade(checkpoint, path, **missing_args)
    config, weights = parse_model_args(new["model_args"], path), dict(new["model"])
    free_keys = {"dropout", "attn_dropout"}
    if model.config.has_relative and RELATIVE_TABLE not in weights:
        print(f"Adding {RELATIVE_TABLE} to checkpoint.")
        weights[RELATIVE_TABLE] = torch.zeros(model.transformer.relative.relative_embeddings.weight.shape)
        free_keys.add("pos_embd")
    load_weights(model.config, weights, path)
    old_config, new_config = asdict(config), asdict(model.config)
    changed_keys = {key for key, value in new_config.items() if value != old_config.get(key)}
    if mismatches := sorted(changed_keys - free_keys):
        problems = "; ".join(f"{key}={new_config[key]!r}, not {old_config.get(key)!r}" for key in mismatches)
        raise UserError(f"the model differs from the checkpoint's ({problems}): pass a model with the same settings")
    if "optimizer" in new:
        groups, new_groups = (foreign.parameter_groups(c, new["optimizer"]) for c in (config, model.config))
        new["optimizer"] = foreign.remap_optimizer_state(new["optimizer"], groups, new_groups, weights)
        if new["optimizer"] is None:
            raise UserError("the checkpoint's optimizer state does not match its parameters: delete its key optimizer")
    return {**new, "model": weights, "model_args": checkpoints.model_args(model.config)}


def model_logits(model: GPT) -> torch.Tensor:
    """A model's logits (2, T, V) for a fixed random batch of ids."""
    size, generator = (2, min(model.config.block_size, 64)), torch.Generator().manual_seed(0)
    idx = torch.randint(model.transformer.wte.num_embeddings, size, generator=generator)
    with torch.no_grad():
        return model.eval()(idx, idx)[0]


def check_same_logits(old_logits: torch.Tensor, temporary_path: str, path: str):
    """Raise UserError unless the model in temporary_path, which will be renamed to path, gives the old logits."""
    difference = (old_logits - model_logits(checkpoints.load_from_path(temporary_path)[0])).abs().max().item()
    if not difference <= 1e-5 * max(1.0, old_logits.abs().max().item()):
        reason = f"its logits would differ by {difference:.2g} from the old ones"
        raise UserError(f"{path} was not written, since {reason}: this is a bug; please report it with the model_args")


def convert(source: str, target: str, cfg: UpdateConfig, settings_hash: str):
    """Convert the model at source and write it to target."""
    args: dict[str, Any] = {key: getattr(cfg, key) for key in ("n_head", "activation") if getattr(cfg, key)}
    checkpoint, path = checkpoints.load_path(source, **{**args, **(NANOGPT_PLUS_SIZES[cfg.size] if cfg.size else {})})
    model = checkpoints.restore_model(checkpoint, path)
    logits, tokenizer = model_logits(model), checkpoint.get("tokenizer")
    if cfg.to == "hf":
        write_directory(model, tokenizer, target, logits, settings_hash)
        print(f"wrote {target}: {describe(model)}, the same logits" + ("" if tokenizer else "; it has no tokenizer"))
        return
    if cfg.pos_embd:
        scheme = position_scheme(model.config) if model.config.model_type == "gpt" else "a bigram"
        if scheme != "default":
            raise UserError(f"--pos_embd={cfg.pos_embd} adds to pos_embd=default, and {source} has {scheme}: drop it")
        model = build_model(replace(model.config, pos_embd="default+relative"))
    names = {"optimizer": "optimizer state", "iter_num": "iteration", "tokenizer": "tokenizer"}
    missing_parts = [name for key, name in names.items() if checkpoint.get(key) is None]
    checkpoint = {**update_checkpoint(checkpoint, model), HASH_KEY: settings_hash}
    checkpoints.save(checkpoint, target, check=lambda part: check_same_logits(logits, part, target))
    missing_note = f"; it has no {', no '.join(missing_parts)}" if missing_parts else ""
    print(f"wrote {target}: {describe(model)}, the same logits as {source}{missing_note}")
    if {"optimizer state", "iteration"} & set(missing_parts):
        print("a run that resumes from it starts without them")


def write_directory(model: GPT, tokenizer: dict | None, directory: str, logits: torch.Tensor, settings_hash: str):
    """Write model to a directory in Hugging Face's format, which gets its name when it is complete."""
    parent = os.path.dirname(os.path.abspath(directory))
    with tempfile.TemporaryDirectory(prefix=".ckpt_update-", dir=parent, ignore_cleanup_errors=True) as temporary_dir:
        new_directory = os.path.join(temporary_dir, "new")  # mkdir sets the usual permissions
        os.mkdir(new_directory)
        hugging_face.save(model, tokenizer, new_directory, settings_hash)
        check_same_logits(logits, new_directory, directory)
        if os.path.isdir(directory):  # empty, or written by the same command: see check_output_path
            os.replace(directory, os.path.join(temporary_dir, "old"))
        os.replace(new_directory, directory)


def describe(model: GPT) -> str:
    """A model in a few words."""
    config = model.config
    if config.model_type != "gpt":
        return f"{config.model_type}, {model.get_num_params():,} parameters"
    sizes = f"{config.n_layer} layers, {config.n_head} heads, n_embd {config.n_embd}, block_size {config.block_size}"
    return f"{sizes}, positions: {position_scheme(config)}"


def check_output_path(source: str, target: str, cfg: UpdateConfig, settings_hash: str):
    """Raise UserError if writing to target could overwrite anything that the same command did not write."""
    parent, name = os.path.split(os.path.abspath(target))
    if not (os.path.isdir(parent) and os.access(parent, os.W_OK)):
        raise UserError(f"{parent} is not a directory in which you may write: create it first, or name another one")
    sources = [source, *(os.path.join(source, name) for name in (checkpoints.BEST_NAME, checkpoints.LAST_NAME))]
    if os.path.exists(target) and any(os.path.samefile(path, target) for path in sources if os.path.exists(path)):
        raise UserError(f"{target} is the checkpoint to convert, which is never changed: give OUT another name")
    is_folder = os.path.isdir(target) and not os.path.islink(target)
    if not os.path.lexists(target) or cfg.to == "hf" and is_folder and not os.listdir(target):
        return
    stored = None
    with contextlib.suppress(UserError):
        stored = hugging_face.stored_hash(target) if is_folder else checkpoints.load(target, mmap=True).get(HASH_KEY)
    if stored != settings_hash:
        raise UserError(f"{target} exists and was not written by this command: give OUT another name, or move it first")


def main(argv: list[str] | None = None):
    cfg, _, (source, target) = configurator.load_with_paths(UpdateConfig, argv, "IN OUT")
    if cfg.size and cfg.n_head not in (None, n_head := NANOGPT_PLUS_SIZES[cfg.size]["n_head"]):
        raise UserError(f"--size={cfg.size} means n_head={n_head}, not --n_head={cfg.n_head}: drop one of them")
    if cfg.to == "hf" and cfg.pos_embd:
        raise UserError(f"GPT-2's architecture has no pos_embd={cfg.pos_embd}: drop --pos_embd or --to=hf")
    settings_hash = hashlib.sha256(f"{os.path.realpath(source)} {cfg}".encode()).hexdigest()  # see check_output_path
    parent = os.path.dirname(os.path.abspath(target))
    is_out_dir = os.path.exists(os.path.join(parent, LOCK_FILE))  # a run may be writing there
    with locked_output(target), locked_directory(parent) if is_out_dir else contextlib.nullcontext():
        check_output_path(source, target, cfg, settings_hash)
        convert(source, target, cfg, settings_hash)


if __name__ == "__main__":
    run_program(main)
