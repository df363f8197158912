"""Read models in Hugging Face format (config.json, model.safetensors), and load OpenAI's weights by name.

    checkpoint = load("gpt2")                    # has the keys model, model_args, tokenizer and format_version
    checkpoint = load("hf:microsoft/DialoGPT-small")

architectures.py lists the architectures that are read. export.py writes this format. Loading does not import
transformers.
"""

import json
import logging
import os
from typing import Any

import torch

from configurator import UserError
from dongpt.checkpoint import custom_code
from dongpt.checkpoint.architectures import (
    ACTIVATIONS,
    CLASS_NAMES,
    CONFIG_KEYS,
    CUSTOM,
    FIXED_CONFIG,
    MPT_ATTENTION,
    from_transformers,
)
from dongpt.checkpoint.foreign import (
    FORMAT_VERSION,
    clean_keys,
    infer_model_args,
    is_state_dict,
    parse_model_args,
    tie_head,
    upgrade,
)
from dongpt.checkpoint.jinja_templates import read_template
from dongpt.checkpoint.legacy import build_meta_model
from dongpt.program import first_line
from dongpt.text.bins import file_sha256
from dongpt.text.template import Template
from dongpt.text.tokenizers import END, UNSUPPORTED_TOKENIZER

GPT2_MODEL_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")
HUB_PREFIX = "hf:"  # before the name of any other model on the Hub, OWNER/NAME
HUB_FILES = ("config.json", "tokenizer*", "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # the first existing file is read; either may be sharded
ADAPTER_CONFIG_FILE = "adapter_config.json"  # written by PEFT, which saves only the weights that it adds to a model
EXPORT_RECORD_FILE = "dongpt.json"  # written by export.py: tokenizer, model_args, settings hash, hashes of the files
PADDING_FILE = "padding.safetensors"  # written by export.py: rows of the embedding beyond the vocabulary
GPT2_TOKEN_IDS = {"!": 0, "\u0120the": 262, "\u0120gazed": 50255, "<|endoftext|>": 50256}  # identify its vocabulary


def is_model(path: str) -> bool:
    """Return True if path is a directory in Hugging Face format or the name of a model on the Hub."""
    names = ("config.json", ADAPTER_CONFIG_FILE)
    is_name = path in GPT2_MODEL_NAMES or path.startswith(HUB_PREFIX)
    return is_name or any(os.path.exists(os.path.join(path, name)) for name in names)


def load(name_or_path: str, **extra_args) -> dict:
    """Load a checkpoint in our layout from a directory or one of GPT2_MODEL_NAMES. For extra_args, see upgrade."""
    directory = find_directory(name_or_path)
    hf_config = {key: value for key, value in _read(directory, "config.json").items() if value is not None}
    name = hf_config.get("model_type", "gpt2")
    if not isinstance(name, str) or name not in FIXED_CONFIG:
        known = ", ".join(FIXED_CONFIG)
        raise UserError(f"{name_or_path} cannot be loaded: its model_type is {name!r}, not one of {known}")
    _check_config(hf_config, FIXED_CONFIG[name], name_or_path)
    record = _read(directory, EXPORT_RECORD_FILE)
    weights, file_names = {}, {}
    for file_name, weight in clean_keys(_read_weights(directory)).items():
        key, weight = from_transformers(file_name, weight, name, _n_head(name, hf_config))
        weights[key] = weight.float() if weight.is_floating_point() else weight
        file_names[key] = file_name
    args = _read_args(hf_config, name, name_or_path, infer_model_args(weights))
    _restore_source(weights, args, record, directory)
    if args["tie_weights"]:  # like transformers, keep an output head that differs from the embedding
        tie_head(weights, args)
    _check_names(weights, file_names, args, name_or_path, hf_config)
    tokenizer = _read_tokenizer(directory, args["vocab_size"])
    checkpoint = {"model": weights, "model_args": args, "tokenizer": tokenizer, "format_version": FORMAT_VERSION}
    return upgrade(checkpoint, name_or_path, **extra_args)


def _n_head(name: str, hf_config: dict) -> int:
    key, alias, default = CONFIG_KEYS[name]["n_head"] if name in CONFIG_KEYS else ("n_head", "n_head", 0)
    n_head = hf_config.get(key, hf_config.get(alias, default))
    return n_head if type(n_head) is int and n_head > 0 else 0


def _read_args(hf_config: dict, name: str, path: str, sizes: dict) -> dict[str, Any]:
    """Return the model_args for a config.json. sizes are used for settings that are missing there."""
    if name == CUSTOM:
        args = hf_config.get("model_args")
        if not isinstance(args, dict):
            raise UserError(f"{path}/config.json has no model_args: export the model again")
        config = parse_model_args(args, path)
        return {"tie_weights": config.tie_weights, "bias": config.bias, "vocab_size": config.vocab_size, **args}
    args = {
        field: hf_config.get(key, hf_config.get(alias, sizes.get(field, default)))
        for field, (key, alias, default) in CONFIG_KEYS[name].items()
    }
    key, default = ("activation_function", "gelu_new") if name == "gpt2" else ("hidden_act", "gelu")
    activation = str(hf_config.get(key, default))
    if activation not in ACTIVATIONS:
        raise UserError(f"{path}: activation {activation!r} is not supported; use {', '.join(ACTIVATIONS)}")
    args |= {"bias": name != "mpt", "activation": ACTIVATIONS[activation]}
    args |= {"gpt_neox": {"pos_embd": "rope"}, "mpt": {"pos_embd": "alibi"}}.get(name, {})
    width = 4 * parse_model_args(args, path).n_embd
    if name == "gpt2":
        _check_config(hf_config, {"n_inner": width}, path)
    elif name == "gpt_neox":
        _check_config({"intermediate_size": 24576, **hf_config}, {"intermediate_size": width}, path)
        rope = hf_config.get("rope_parameters")
        if not isinstance(rope, dict):  # transformers 4
            rope = {"rope_type": "default" if hf_config.get("rope_scaling") is None else "scaled"}
            rope |= {"rope_theta": hf_config.get("rotary_emb_base", hf_config.get("rope_theta", 10000))}
            rope |= {"partial_rotary_factor": hf_config.get("rotary_pct", 0.25)}
        expected = {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 1}
        _check_config({"partial_rotary_factor": 0.25, **rope}, expected, path)
    else:
        attention = hf_config.get("attn_config")
        _check_config(attention if isinstance(attention, dict) else {}, MPT_ATTENTION, path)
        if args["n_head"] & (args["n_head"] - 1):
            raise UserError(f"{path} cannot be loaded: its ALiBi slopes for {args['n_head']} heads differ from ours")
    return args


def _restore_source(weights: dict, args: dict, record: dict, directory: str):
    """Undo what export.py had to change: padded vocabulary rows that it left out, and biases of zero that it added."""
    source_args = record.get("model_args")
    if not isinstance(source_args, dict):
        return
    if os.path.exists(os.path.join(directory, PADDING_FILE)):
        for key, rows in _read(directory, PADDING_FILE).items():
            if key in weights and weights[key].shape[1:] == rows.shape[1:]:
                weights[key] = torch.cat([weights[key], rows])
        args["vocab_size"] = len(weights.get("transformer.wte.weight", ()))
    biases = [key for key in weights if key.endswith(".bias")]
    if source_args.get("bias") is False and args["bias"] and not any(weights[key].any() for key in biases):
        args["bias"] = False
        for key in biases:
            del weights[key]


def find_directory(name_or_path: str) -> str:
    """Return the directory with a model's files. Raises UserError for a failed download."""
    is_directory = os.path.exists(os.path.join(name_or_path, "config.json"))
    return name_or_path if is_directory else _download(name_or_path)


def _check_config(hf_config: dict, expected: dict, path: str):
    """Raise UserError if hf_config has unexpected values."""
    differences = [
        f"{key}={hf_config[key]!r}" for key in expected if hf_config.get(key, expected[key]) != expected[key]
    ]
    if differences:
        raise UserError(f"{path} cannot be loaded: it does not match donGPT's models ({', '.join(differences)})")


def _check_names(weights: dict, file_names: dict[str, str], args: dict, path: str, hf_config: dict):
    """Raise UserError that lists all missing and unexpected weights, by their names in the file."""
    config = parse_model_args(args, path)
    if config.n_layer > len(weights):  # too many missing weights to list: load_weights says so
        return
    expected = build_meta_model(config).state_dict().keys()
    unexpected, missing = (
        sorted(file_names[key] for key in weights.keys() - expected),
        sorted(expected - weights.keys()),
    )
    problems = [f"unexpected: {', '.join(unexpected)}"] * bool(unexpected)
    problems += [f"missing: {', '.join(missing)}"] * bool(missing)
    if problems:
        names = hf_config.get("architectures")
        architecture = ", ".join(map(str, names)) if isinstance(names, list) and names else "of an unknown kind"
        class_name = CLASS_NAMES[hf_config.get("model_type", "gpt2")]
        remedy = f"use a directory that {class_name}.save_pretrained() wrote"
        raise UserError(
            f"{path} is {architecture}, and its weights do not match its config.json ({'; '.join(problems)}): {remedy}"
        )


def transformers_logits(directory: str, idx: torch.Tensor) -> torch.Tensor | str:
    """Return the logits (B, T, V) that transformers computes for idx (B, T), or a message saying why it cannot."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging as hf_logging
    except ImportError:
        return "is not installed"
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        # only code that is ours, whatever else the directory may contain
        options = {"dtype": torch.float32, "local_files_only": True, "trust_remote_code": _has_our_code(directory)}
        model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **options)
        if info["missing_keys"]:  # transformers initializes these randomly
            return f"did not find {len(info['missing_keys'])} weights in {directory}"
        with torch.no_grad():
            return model.eval()(idx).logits
    except Exception as error:  # transformers documents none; its messages point to a report that we do not print
        return f"cannot load {directory} ({type(error).__name__})"
    finally:
        hf_logging.set_verbosity(verbosity)
        hf_logging.enable_progress_bar()


def _has_our_code(directory: str) -> bool:
    """Return True if a directory has the code that export.py writes, and no other."""
    names = [name for name in os.listdir(directory) if name.endswith(".py")]
    if names != [custom_code.FILE_NAME]:
        return False
    with open(os.path.join(directory, names[0]), encoding="utf-8", errors="replace") as file:
        return file.read() == custom_code.modeling_source()


def _download(name: str) -> str:
    """Return the Hugging Face cache directory with a model's files, downloading them if necessary."""
    logger = logging.getLogger("huggingface_hub")
    level, repository = logger.level, name.removeprefix(HUB_PREFIX)
    try:
        from huggingface_hub import hf_hub_download, snapshot_download

        logger.setLevel(logging.ERROR)  # the import resets the level; lower levels log every retry
        if repository in GPT2_MODEL_NAMES:
            hf_hub_download(repository, WEIGHT_FILES[0])
            return os.path.dirname(hf_hub_download(repository, "config.json"))
        for weights in (f"{name}*" for name in WEIGHT_FILES):
            directory = snapshot_download(repository, allow_patterns=[*HUB_FILES, weights, weights.replace("*", "-*")])
            if any(entry.startswith(weights[:-1]) for entry in os.listdir(directory)):
                break
        return directory
    except Exception as error:  # the client, network and file system raise different errors
        problem = f"the Hugging Face model {repository!r} could not be loaded ({first_line(error)}): check its name and"
        remedy = "your network connection, or pass a directory with config.json and weights"
        raise UserError(f"{problem} {remedy}") from error
    finally:
        logger.setLevel(level)


def _read_weights(directory: str) -> dict[str, torch.Tensor]:
    """Read all weights in a directory, from one file or several shards, into a dict by name."""
    for name in WEIGHT_FILES:
        shards = _read(directory, f"{name}.index.json").get("weight_map")
        files = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
        files = [name] if os.path.exists(os.path.join(directory, name)) else files
        if files:
            return {key: weight for file in files for key, weight in _read(directory, file).items()}
    raise UserError(f"{directory} contains no weights: put {' or '.join(WEIGHT_FILES)} next to config.json")


def _read(directory: str, name: str) -> dict[str, Any]:
    """Read a JSON file ({} if missing) or a weights file into a dict. Raises UserError if the file is damaged."""
    path = os.path.join(directory, name)
    if name.endswith(".json") and not os.path.exists(path):
        return {}
    try:
        if os.path.basename(name) != name:
            raise ValueError("it is outside the directory")
        if name.endswith(".json"):
            with open(path, encoding="utf-8") as file:
                content = json.load(file)
        elif name.endswith(".safetensors"):
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
        if not (isinstance(content, dict) if name.endswith(".json") else is_state_dict(content)):
            raise ValueError("its contents have the wrong type")
        return content
    except Exception as error:  # a damaged file can raise almost any exception
        reason = f"{path} could not be read, and no code in it was run ({first_line(error)})"
        raise UserError(f"{reason}: download or export the directory again") from error


def _read_tokenizer(directory: str, vocab_size: int) -> dict | None:
    """Return a directory's tokenizer: the one written by save, GPT-2's, UNSUPPORTED_TOKENIZER, or None if missing."""
    if record := _read(directory, EXPORT_RECORD_FILE):
        return record.get("tokenizer")
    hf_tokenizer = _read(directory, "tokenizer.json")
    hf_model, added = hf_tokenizer.get("model"), hf_tokenizer.get("added_tokens")
    vocabulary = _read(directory, "vocab.json") or (hf_model.get("vocab") if isinstance(hf_model, dict) else None)
    if not isinstance(vocabulary, dict) and vocabulary:
        return UNSUPPORTED_TOKENIZER
    if vocabulary:
        added_ids = [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
        ids = [*vocabulary.values(), *added_ids, *_read(directory, "added_tokens.json").values()]
        is_gpt2 = all(vocabulary.get(token) == i for token, i in GPT2_TOKEN_IDS.items())
        if not is_gpt2 or any(isinstance(i, int) and i > GPT2_TOKEN_IDS[END] for i in ids):
            return UNSUPPORTED_TOKENIZER
    elif vocab_size != 50257:
        return None
    template = _read_template(directory)
    return {"kind": "gpt2", **({"template": template.to_dict()} if template else {})}


def _read_template(directory: str) -> Template | None:
    """Return the chat template of a directory, or that of DialoGPT, whose older versions have none."""
    if template := read_template(directory, END):
        return template
    tasks = _read(directory, "config.json").get("task_specific_params")
    is_conversational = isinstance(tasks, dict) and "conversational" in tasks
    return Template("dialogpt", user="", assistant=END, end=END, starts_with_end=False) if is_conversational else None


def write_json(content: dict, directory: str, name: str):
    """Write a JSON file."""
    with open(os.path.join(directory, name), "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)


def stored_hash(directory: str) -> str | None:
    """Return the settings_hash written by save, or None if any file in directory has been changed since then."""
    try:
        record = _read(directory, EXPORT_RECORD_FILE)
        return record.get("mark") if hash_files(directory) == record.get("files") else None
    except (OSError, UserError):
        return None


def hash_files(directory: str) -> dict[str, str]:
    """Return {name: hash} for all files in directory except the record written by save."""
    names = sorted(set(os.listdir(directory)) - {EXPORT_RECORD_FILE})
    return {name: file_sha256(os.path.join(directory, name)) for name in names}
