"""Convert old checkpoints and those of other trainers to the current format, or to and from Hugging Face format.

    python ckpt_update.py ckpt_original.pt ckpt.pt                             # nanoGPT, EDS, donGPT
    python ckpt_update.py gpt_model_small.pth.tar ckpt.pt --size=small         # nanoGPT+, which does not store n_head
    python ckpt_update.py ckpt_original.pt ckpt.pt --pos_embd=default+relative # adds a relative-position table
    python ckpt_update.py ckpt.pt FOLDER --to=hf                               # for the transformers library
    python ckpt_update.py FOLDER ckpt.pt                                       # and back
    python ckpt_update.py ckpt.pt model.gguf --to=gguf --weights=float16       # for llama.cpp, Ollama and LM Studio
    python ckpt_update.py out-lora merged.pt --to=merged                       # a LoRA adapter and its base in one file
    python ckpt_update.py out-lora FOLDER --to=peft                            # a LoRA adapter for the PEFT library

IN is a checkpoint file, an out_dir, a directory in the format of Hugging Face or PEFT, or gpt2, gpt2-medium, gpt2-large
or gpt2-xl.
IN is not modified. OUT is moved into place only after its model has produced the same logits as the model in IN.
"""

import contextlib
import hashlib
import os
import tempfile
from dataclasses import asdict, dataclass, replace
from typing import Any, Iterator, Literal

import torch

import configurator
from configurator import UserError
from dongpt.checkpoint import adapters, export, foreign, gguf, hugging_face, lora
from dongpt.checkpoint import files as checkpoints
from dongpt.checkpoint.foreign import NANOGPT_PLUS_SIZES, load_weights, parse_model_args
from dongpt.checkpoint.gguf import WeightType
from dongpt.checkpoint.legacy import build_model, position_scheme
from dongpt.program import LOCK_FILE, first_line, locked_directory, locked_output, run_program
from dongpt.text.bins import find_data_folder, open_data
from dongpt.text.tokenizers import UNSUPPORTED_TOKENIZER, BPETokenizer, Tokenizer, from_dict
from model import GPT, RELATIVE_TABLE

SAMPLE_TOKENS = 4096  # at the start and at the end of each split, to compare tokenizers
GENERATED_TOKENS = 64  # by the model, for the same purpose
OutputFormat = Literal["dongpt", "hf", "gguf", "merged", "peft"]
HASH_KEY = "converted_by"  # key in OUT for a hash of the command; only the same command may overwrite OUT


@dataclass(frozen=True)
class UpdateConfig:
    n_head: int | None = None  # number of attention heads, if the file does not store it
    size: Literal[None, "small", "medium", "large"] = None  # nanoGPT+ model size; sets n_head and checks the shapes
    activation: Literal[None, "gelu", "gelu_tanh"] = None  # use gelu_tanh for nanoGPT checkpoints of May and June 2023
    pos_embd: Literal[None, "default+relative", "relative"] = None  # add a relative-position table to a default model
    to: OutputFormat = "dongpt"  # hf: for transformers; gguf: for llama.cpp; merged, peft: from a LoRA adapter
    weights: WeightType = "float32"  # gguf: number format of the matrices; q8_0 takes 8.5 bits per weight
    base: str = ""  # path of the model that the LoRA adapter in IN was trained on, if it has moved


def update_checkpoint(checkpoint: dict, model: GPT) -> dict:
    """Return a copy of checkpoint converted to the current format and to model's architecture.

    checkpoint may be in any known format. If model has a relative-position table and checkpoint does not, one of zeros
    is added. Each parameter keeps its optimizer state. Raises UserError if the weights do not fit model.
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
            raise UserError("the checkpoint's optimizer state does not fit its parameters: remove its 'optimizer' key")
    return {**new, "model": weights, "model_args": checkpoints.model_args(model.config)}


def random_ids(model: GPT, n_tokens: int | None = None, n_ids: int | None = None) -> torch.Tensor:
    """Return a fixed random batch of ids (2, T) for comparing models. T is n_tokens or depends on block_size.

    The ids are below n_ids, by default the vocabulary size.
    """
    size, generator = (2, n_tokens or min(model.config.block_size, 64)), torch.Generator().manual_seed(0)
    return torch.randint(n_ids or model.transformer.wte.num_embeddings, size, generator=generator)


def model_logits(model: GPT, n_tokens: int | None = None, n_ids: int | None = None) -> torch.Tensor:
    """Return a model's logits (2, T, V) for random_ids."""
    idx = random_ids(model, n_tokens, n_ids)
    with torch.no_grad():
        return model.eval()(idx, idx)[0]


def compare_with_transformers(model: GPT, directory: str, n_ids: int | None = None) -> str:
    """Return a note for the report. Raises UserError if transformers computes other logits from directory than model.

    The two libraries add up numbers in different orders, so the logits are not bitwise equal. n_ids is the size of the
    vocabulary in directory.
    """
    reference = hugging_face.transformers_logits(directory, random_ids(model, n_ids=n_ids))
    if isinstance(reference, str):
        return f"not compared with transformers, which {reference}"
    difference = (model_logits(model, n_ids=n_ids)[..., : reference.shape[-1]] - reference).abs().max().item()
    if not difference <= 1e-4 * max(1.0, reference.abs().max().item()):
        problem = f"its logits would differ by {difference:.2g} from those of transformers for {directory}"
        raise UserError(f"nothing was written, since {problem}: this is a bug; please report it with its config.json")
    return "same logits as in transformers"


def check_same_logits(old_logits: torch.Tensor, temporary_path: str, path: str):
    """Raise UserError unless the model in temporary_path, which will be renamed to path, produces old_logits."""
    model, n_tokens = checkpoints.load_from_path(temporary_path)[0], old_logits.shape[1]
    difference = (old_logits - model_logits(model, n_tokens)).abs().max().item()
    if not difference <= 1e-5 * max(1.0, old_logits.abs().max().item()):
        problem = f"{path} was not written because its logits would differ from the old ones by {difference:.2g}"
        raise UserError(f"{problem}: this is a bug, please report it with the model_args")


def convert(source: str, target: str, cfg: UpdateConfig, settings_hash: str):
    """Convert the model at source and write it to target."""
    args: dict[str, Any] = {key: getattr(cfg, key) for key in ("n_head", "activation") if getattr(cfg, key)}
    checkpoint, path = checkpoints.load_path(source, **{**args, **(NANOGPT_PLUS_SIZES[cfg.size] if cfg.size else {})})
    model = checkpoints.restore_model(checkpoint, path, cfg.base)
    is_adapter = model.adapter is not None
    if cfg.to in ("merged", "peft") and not is_adapter:
        raise UserError(f"--to={cfg.to} is for LoRA adapters, and {source} is a whole model: remove --to={cfg.to}")
    lora.merge_adapter(model)
    if not (logits := model_logits(model)).isfinite().all():
        raise UserError(f"nothing was written, since {path} computes logits that are not finite: check its weights")
    tokenizer, note = checkpoint.get("tokenizer"), f"same logits as {source}"
    if path == source and hugging_face.is_model(source) and not is_adapter:
        note = compare_with_transformers(model, hugging_face.find_directory(source))
    if cfg.to == "peft":
        with new_directory(target) as directory:
            adapters.save(model, checkpoint, directory, settings_hash)
            check_same_logits(logits, directory, target)
        print(f"wrote {target}: LoRA adapter for {checkpoint['lora']['base']}, {note}")
        return
    if cfg.to in ("hf", "gguf"):
        for key in ("model", "optimizer"):  # memory holds the weights once
            checkpoint.pop(key, None)
        tokenizer = None if tokenizer == UNSUPPORTED_TOKENIZER else tokenizer
        if cfg.to == "hf":
            note = write_directory(model, checkpoint, target, settings_hash)
        else:
            note = write_gguf(model, checkpoint, target, cfg.weights, settings_hash)
        print(f"wrote {target}: {describe(model)}, {note}" + ("" if tokenizer else "; no tokenizer"))
        return
    if is_adapter and (cfg.to == "merged" or cfg.pos_embd):
        checkpoint = checkpoints.merged(checkpoint, model)
    if cfg.pos_embd:
        scheme = position_scheme(model.config) if model.config.model_type == "gpt" else "no"
        if scheme != "default":
            problem = f"--pos_embd adds to models with pos_embd=default, but {source} has {scheme}"
            raise UserError(f"{problem}: remove --pos_embd")
        model = build_model(replace(model.config, pos_embd="default+relative"))
    names = {"optimizer": "optimizer state", "iter_num": "iteration", "tokenizer": "tokenizer"}
    missing_parts = [name for key, name in names.items() if checkpoint.get(key) is None]
    if "lora" not in checkpoint:
        checkpoint = update_checkpoint(checkpoint, model)
    checkpoint[HASH_KEY] = settings_hash
    checkpoints.save(checkpoint, target, check=lambda part: check_same_logits(logits, part, target))
    missing_note = f"; no {', no '.join(missing_parts)}" if missing_parts else ""
    print(f"wrote {target}: {describe(model)}, {note}{missing_note}")
    if {"optimizer state", "iteration"} & set(missing_parts):
        print("a run that resumes from this checkpoint starts without them")


def write_directory(model: GPT, checkpoint: dict, directory: str, settings_hash: str) -> str:
    """Write model to a directory in Hugging Face format, which is moved into place once it is complete.

    Returns a note for the report. Raises UserError unless the directory has the same weights, its tokenizer gives the
    same ids, and transformers computes the same logits.
    """
    tokenizer = checkpoint.get("tokenizer")
    reader = from_dict(tokenizer) if tokenizer not in (None, UNSUPPORTED_TOKENIZER) else None
    with new_directory(directory) as temporary_dir:
        export.save(model, tokenizer, temporary_dir, settings_hash)
        check_same_weights(model, temporary_dir, directory)
        note = compare_with_transformers(model, temporary_dir, reader.vocab_size if reader else None)
        if reader:
            export.check_tokenizer(temporary_dir, reader, sample_texts(model, reader, checkpoint))
            note += ", same ids for sample texts"
    return note


@contextlib.contextmanager
def new_directory(directory: str) -> Iterator[str]:
    """Yield the path of an empty directory, which is moved to `directory` unless the block raises an exception.

    Raises UserError if the files cannot be written.
    """
    from safetensors import SafetensorError

    parent = os.path.dirname(os.path.abspath(directory))
    with tempfile.TemporaryDirectory(prefix=".ckpt_update-", dir=parent, ignore_cleanup_errors=True) as temporary_dir:
        new_path = os.path.join(temporary_dir, "new")  # mkdir sets the usual permissions
        os.mkdir(new_path)
        try:
            yield new_path
        except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
            reason = f"{directory} could not be written ({first_line(error)})"
            raise UserError(f"{reason}: free some disk space; nothing was changed") from error
        if os.path.isdir(directory):  # empty, or written by the same command: see check_output_path
            os.replace(directory, os.path.join(temporary_dir, "old"))
        os.replace(new_path, directory)


def write_gguf(model: GPT, checkpoint: dict, path: str, weights: gguf.WeightType, settings_hash: str) -> str:
    """Write model to a GGUF file and return a note for the report."""
    tokenizer = checkpoint.get("tokenizer")
    reader = from_dict(tokenizer) if tokenizer not in (None, UNSUPPORTED_TOKENIZER) else None
    gguf.save(model, reader, path, weights, settings_hash)
    note = f"{os.path.getsize(path) / 1e6:,.1f} MB in {weights}"
    if model.config.activation == "gelu":
        note += "; llama.cpp uses the tanh approximation of GELU, which changes the logits by up to about 1e-3"
    if isinstance(reader, BPETokenizer) and reader.keep_marks:
        note += "; it splits letters from combining marks, which gives other tokens for some scripts, such as Hindi"
    return note


def check_same_weights(model: GPT, temporary_path: str, path: str):
    """Raise UserError unless the directory temporary_path, which will be renamed to path, has the weights of model."""
    new, old = hugging_face.load(temporary_path)["model"], model.state_dict()
    if different := [key for key in old.keys() | new.keys() if key not in new or not torch.equal(old[key], new[key])]:
        problem = f"{path} was not written because {sorted(different)[0]} would differ from the checkpoint's"
        raise UserError(f"{problem}: this is a bug, please report it with the model_args")


def sample_texts(model: GPT, tokenizer: Tokenizer, checkpoint: dict) -> Iterator[str]:
    """Yield the start and the end of the training and validation text, if available, generated text, and samples."""
    run_config = checkpoint.get("config") or {}
    with contextlib.suppress(UserError):  # a model can also be exported without its data
        folder = find_data_folder(str(run_config.get("dataset", "")), str(run_config.get("data_dir", "")), quiet=True)
        meta, splits, _ = open_data(folder)
        for ids in splits.values() if meta.get("tokenizer") == tokenizer.to_dict() else ():
            for part in (ids[:SAMPLE_TOKENS], ids[-SAMPLE_TOKENS:]):
                yield tokenizer.decode(part[part < tokenizer.vocab_size - len(tokenizer.specials)].tolist())
    yield from export.generated_texts(tokenizer)
    prompt = torch.tensor([[tokenizer.start_id]])
    new_ids = model.eval().generate(prompt, GENERATED_TOKENS, seed=0, n_ids=tokenizer.vocab_size)[0].tolist()
    yield tokenizer.decode(new_ids)


def describe(model: GPT) -> str:
    """Return a one-line description of a model."""
    config = model.config
    if config.model_type != "gpt":
        return f"{config.model_type}, {model.get_num_params():,} parameters"
    sizes = f"{config.n_layer} layers, {config.n_head} heads, n_embd {config.n_embd}, block_size {config.block_size}"
    return f"{sizes}, positions: {position_scheme(config)}"


def check_output_path(source: str, target: str, cfg: UpdateConfig, settings_hash: str):
    """Raise UserError if writing to target could overwrite anything that was not written by the same command."""
    parent, name = os.path.split(os.path.abspath(target))
    if not (os.path.isdir(parent) and os.access(parent, os.W_OK)):
        raise UserError(f"{parent} is not a writable directory: create it first, or choose another one")
    sources = [source, *(os.path.join(source, name) for name in (checkpoints.BEST_NAME, checkpoints.LAST_NAME))]
    if os.path.exists(target) and any(os.path.samefile(path, target) for path in sources if os.path.exists(path)):
        raise UserError(f"{target} is the checkpoint to convert, which is never changed: choose another name for OUT")
    is_folder = os.path.isdir(target) and not os.path.islink(target)
    if not os.path.lexists(target) or cfg.to in ("hf", "peft") and is_folder and not os.listdir(target):
        return
    stored = None
    with contextlib.suppress(UserError):
        if is_folder:
            stored = hugging_face.stored_hash(target)
        elif cfg.to == "gguf":
            stored = gguf.stored_hash(target)
        else:
            stored = checkpoints.load(target, mmap=True).get(HASH_KEY)
    if stored != settings_hash:
        raise UserError(f"{target} exists and was not written by this command: move it, or choose another name for OUT")


def main(argv: list[str] | None = None):
    cfg, _, (source, target) = configurator.load_with_paths(UpdateConfig, argv, "IN OUT")
    if cfg.size and cfg.n_head not in (None, n_head := NANOGPT_PLUS_SIZES[cfg.size]["n_head"]):
        raise UserError(f"--size={cfg.size} implies n_head={n_head}, not --n_head={cfg.n_head}: remove one of them")
    if cfg.to not in ("dongpt", "merged") and cfg.pos_embd:
        raise UserError(f"--to={cfg.to} cannot add positions: remove --pos_embd={cfg.pos_embd} or --to={cfg.to}")
    if cfg.to != "gguf" and cfg.weights != "float32":
        raise UserError(f"--weights={cfg.weights} is for GGUF files: add --to=gguf, or remove it")
    settings_hash = hashlib.sha256(f"{os.path.realpath(source)} {cfg}".encode()).hexdigest()  # see check_output_path
    parent = os.path.dirname(os.path.abspath(target))
    is_out_dir = os.path.exists(os.path.join(parent, LOCK_FILE))  # a run may be writing there
    with locked_output(target), locked_directory(parent) if is_out_dir else contextlib.nullcontext():
        check_output_path(source, target, cfg, settings_hash)
        convert(source, target, cfg, settings_hash)


if __name__ == "__main__":
    run_program(main)
