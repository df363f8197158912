"""Read and write GPT-2 in Hugging Face format (config.json, model.safetensors), and load OpenAI's weights by name.

    checkpoint = load("gpt2")                    # has the keys model, model_args, tokenizer and format_version
    save(model, tokenizer, "directory")          # transformers can load it as GPT2LMHeadModel

Neither function imports transformers.
"""

import json
import logging
import os
from typing import Any

import torch

from configurator import UserError
from dongpt.checkpoint.foreign import (
    FORMAT_VERSION,
    clean_keys,
    infer_model_args,
    is_state_dict,
    parse_model_args,
    tie_head,
    upgrade,
)
from dongpt.checkpoint.legacy import build_meta_model, position_scheme
from dongpt.program import first_line
from dongpt.text.bins import file_sha256
from dongpt.text.template import Template
from dongpt.text.tokenizers import (
    END,
    SPACE_BEFORE,
    UNKNOWN,
    UNSUPPORTED_TOKENIZER,
    bpe_pre_tokenizer,
    byte_alphabet,
    from_dict,
    word_pattern,
)
from model import GPT

GPT2_MODEL_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # the first existing file is read; either may be sharded
ADAPTER_CONFIG_FILE = "adapter_config.json"  # written by PEFT, which saves only the weights that it adds to a model
EXPORT_RECORD_FILE = "dongpt.json"  # written by save: tokenizer, settings hash, hashes of the other files
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
# Conv1D stores transposed Linear weights. attn.c_proj is square, so its shape does not reveal the transposition.
TRANSPOSED_WEIGHTS = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
GPT2_TOKEN_IDS = {"!": 0, "\u0120the": 262, "\u0120gazed": 50255, "<|endoftext|>": 50256}  # identify its vocabulary
CONFIG_KEYS = {  # GPTConfig field: key in config.json, alternative key, default
    "block_size": ("n_positions", "max_position_embeddings", 1024),
    "vocab_size": ("vocab_size", "vocab_size", 50257),
    "n_layer": ("n_layer", "num_hidden_layers", 12),
    "n_head": ("n_head", "num_attention_heads", 12),
    "n_embd": ("n_embd", "hidden_size", 768),
    "tie_weights": ("tie_word_embeddings", "tie_word_embeddings", True),
}
FIXED_CONFIG = {  # the only values that our GPT supports
    "model_type": "gpt2",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "layer_norm_epsilon": 1e-5,
    "add_cross_attention": False,
}


def is_model(path: str) -> bool:
    """Return True if path is a directory in Hugging Face format or the name of an OpenAI GPT-2 model."""
    names = ("config.json", ADAPTER_CONFIG_FILE)
    return path in GPT2_MODEL_NAMES or any(os.path.exists(os.path.join(path, name)) for name in names)


def load(name_or_path: str, **extra_args) -> dict:
    """Load a checkpoint in our layout from a directory or one of GPT2_MODEL_NAMES. For extra_args, see upgrade."""
    directory = find_directory(name_or_path)
    hf_config = {key: value for key, value in _read(directory, "config.json").items() if value is not None}
    _check_config(hf_config, FIXED_CONFIG, name_or_path)
    activation = str(hf_config.get("activation_function", "gelu_new"))
    if activation not in ACTIVATIONS:
        raise UserError(f"{name_or_path}: activation {activation!r} is not supported; use {', '.join(ACTIVATIONS)}")
    weights, file_names = {}, {}
    for file_name, weight in clean_keys(_read_weights(directory)).items():
        key = file_name if file_name.startswith(("transformer.", "lm_head.")) else f"transformer.{file_name}"
        weight = weight.t() if key.endswith(TRANSPOSED_WEIGHTS) and weight.dim() == 2 else weight
        weights[key] = weight.float().contiguous() if weight.is_floating_point() else weight
        file_names[key] = file_name
    sizes = infer_model_args(weights)  # for settings missing in config.json
    args = {
        field: hf_config.get(key, hf_config.get(alias, sizes.get(field, default)))
        for field, (key, alias, default) in CONFIG_KEYS.items()
    }
    args |= {"bias": True, "activation": ACTIVATIONS[activation]}
    _check_config(hf_config, {"n_inner": 4 * parse_model_args(args, name_or_path).n_embd}, name_or_path)
    if args["tie_weights"]:  # like transformers, keep an output head that differs from the embedding
        tie_head(weights, args)
    _check_names(weights, file_names, args, name_or_path, hf_config)
    tokenizer = _read_tokenizer(directory, args["vocab_size"])
    checkpoint = {"model": weights, "model_args": args, "tokenizer": tokenizer, "format_version": FORMAT_VERSION}
    return upgrade(checkpoint, name_or_path, **extra_args)


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
        raise UserError(f"{path} cannot be loaded: it does not match GPT-2 ({', '.join(differences)})")


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
        remedy = "use a directory that GPT2LMHeadModel.save_pretrained() wrote"
        raise UserError(
            f"{path} is {architecture}, and its weights do not match a GPT2LMHeadModel with its config.json "
            f"({'; '.join(problems)}): {remedy}"
        )


def transformers_logits(directory: str, idx: torch.Tensor) -> torch.Tensor | str:
    """Return the logits (B, T, V) that transformers computes for idx (B, T), or a message saying why it cannot."""
    try:
        from transformers import GPT2LMHeadModel
        from transformers.utils import logging as hf_logging
    except ImportError:
        return "is not installed"
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        model = GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
        with torch.no_grad():
            return model.eval()(idx).logits
    except Exception as error:  # transformers documents none; its messages point to a report that we do not print
        return f"cannot load {directory} ({type(error).__name__})"
    finally:
        hf_logging.set_verbosity(verbosity)
        hf_logging.enable_progress_bar()


def _download(name: str) -> str:
    """Return the Hugging Face cache directory with OpenAI's weights, downloading them if necessary."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    try:
        from huggingface_hub import hf_hub_download

        logger.setLevel(logging.ERROR)  # the import resets the level; lower levels log every retry
        hf_hub_download(name, WEIGHT_FILES[0])
        return os.path.dirname(hf_hub_download(name, "config.json"))
    except Exception as error:  # the client, network and file system raise different errors
        problem = f"the Hugging Face model {name!r} could not be loaded ({first_line(error)}): check your network"
        raise UserError(f"{problem} connection, or pass a directory with config.json and weights") from error
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
    if not vocabulary:
        return {"kind": "gpt2"} if vocab_size == 50257 else None
    if not isinstance(vocabulary, dict):
        return UNSUPPORTED_TOKENIZER
    added_ids = [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    ids = [*vocabulary.values(), *added_ids, *_read(directory, "added_tokens.json").values()]
    is_gpt2 = all(vocabulary.get(token) == i for token, i in GPT2_TOKEN_IDS.items())
    has_more = any(isinstance(i, int) and i > GPT2_TOKEN_IDS[END] for i in ids)
    return {"kind": "gpt2"} if is_gpt2 and not has_more else UNSUPPORTED_TOKENIZER


def save(model: GPT, tokenizer: dict | None, directory: str, settings_hash: str = ""):
    """Write a model and its tokenizer, if any, to an empty or new directory. stored_hash reads settings_hash back."""
    from safetensors.torch import save_file

    config = model.config
    required = ("model_type", config.model_type, "gpt"), ("ngrams", config.ngrams, 1)
    for name, value, expected in (*required, ("pos_embd", position_scheme(config), "default")):
        if value != expected:
            raise UserError(f"GPT-2's architecture does not support {name}={value}: keep the model as a checkpoint")
    tokenizer = None if tokenizer == UNSUPPORTED_TOKENIZER else tokenizer
    end_id = from_dict(tokenizer).end_id if tokenizer else None
    weights = {}
    for key, weight in model.state_dict().items():
        weights[key] = (weight.t() if key.endswith(TRANSPOSED_WEIGHTS) else weight).contiguous()
        if key.startswith(("transformer.h.", "transformer.ln_f.")) and key.endswith(".weight"):
            weights.setdefault(key.removesuffix("weight") + "bias", torch.zeros(weight.shape[0]))  # GPT-2 has biases
    if config.tie_weights:
        del weights["lm_head.weight"]
    os.makedirs(directory, exist_ok=True)
    save_file(weights, os.path.join(directory, WEIGHT_FILES[0]), metadata={"format": "pt"})
    hf_config = {
        "architectures": ["GPT2LMHeadModel"],
        **{key: getattr(config, field) for field, (key, _, _) in CONFIG_KEYS.items()},
        **{**FIXED_CONFIG, "n_inner": None},
        "activation_function": "gelu_new" if config.activation == "gelu_tanh" else "gelu",
        **dict(embd_pdrop=config.dropout, resid_pdrop=config.dropout, attn_pdrop=config.attn_dropout),
        **dict(bos_token_id=end_id, eos_token_id=end_id),
    }
    _write_json(hf_config, directory, "config.json")
    if tokenizer:
        _save_tokenizer(from_dict(tokenizer), config.block_size, directory)
    _write_json(
        {"mark": settings_hash, "tokenizer": tokenizer, "files": _hash_files(directory)}, directory, EXPORT_RECORD_FILE
    )


def _write_json(content: dict, directory: str, name: str):
    with open(os.path.join(directory, name), "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)


def stored_hash(directory: str) -> str | None:
    """Return the settings_hash written by save, or None if any file in directory has been changed since then."""
    try:
        record = _read(directory, EXPORT_RECORD_FILE)
        return record.get("mark") if _hash_files(directory) == record.get("files") else None
    except (OSError, UserError):
        return None


def _hash_files(directory: str) -> dict[str, str]:
    """Return {name: hash} for all files in directory except the record written by save."""
    names = sorted(set(os.listdir(directory)) - {EXPORT_RECORD_FILE})
    return {name: file_sha256(os.path.join(directory, name)) for name in names}


def _save_tokenizer(tokenizer: Any, block_size: int, directory: str):
    """Write tokenizer.json and tokenizer_config.json so that transformers encodes and decodes as tokenizer does."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as HFTokenizer

    if tokenizer.kind in ("gpt2", "bpe"):
        vocabulary, merges = _vocab_and_merges(tokenizer.encoding._mergeable_ranks)
        hf_tokenizer = HFTokenizer(models.BPE(vocabulary, merges))
        hf_tokenizer.pre_tokenizer = bpe_pre_tokenizer(tokenizer.kind == "bpe" and tokenizer.keep_marks)
        hf_tokenizer.decoder = decoders.ByteLevel()
    else:
        is_word = tokenizer.kind == "word"  # with char, an unknown character is an error in transformers, too
        ids = {**tokenizer.ids, **({UNKNOWN: tokenizer.unknown_id} if is_word else {})}
        hf_tokenizer = HFTokenizer(models.WordLevel(ids, unk_token=UNKNOWN if is_word else None))
        if is_word and tokenizer.lower:
            hf_tokenizer.normalizer = normalizers.Lowercase()
        pattern = r"[\s\S]"
        if is_word:  # in Oniguruma, \w includes marks but not all digits, and \s lacks four control characters
            marks = r"\p{M}" if tokenizer.keep_marks else None
            prefix = "" if tokenizer.spaces_alone else SPACE_BEFORE
            pattern = word_pattern(prefix, marks, word=r"\p{L}\p{N}_", space=r"\s\x1c-\x1f")
        hf_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
        hf_tokenizer.decoder = decoders.Fuse()
    hf_tokenizer.add_special_tokens(sorted(tokenizer.specials, key=tokenizer.specials.__getitem__))
    hf_tokenizer.save(os.path.join(directory, "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size}
    settings |= {"clean_up_tokenization_spaces": False}
    if END in tokenizer.specials:
        settings |= {"bos_token": END, "eos_token": END}
    if tokenizer.template and tokenizer.template.special:
        settings |= {"eos_token": tokenizer.template.end, "chat_template": _chat_template(tokenizer.template)}
    _write_json(settings, directory, "tokenizer_config.json")


def _chat_template(template: Template) -> str:
    """Convert a template to Jinja, so that transformers' apply_chat_template produces the same prompts as chat.py."""
    affixes = {
        "system": (template.system, ""),
        "user": (template.user, template.assistant),
        "assistant": (template.gap, template.end),
    }
    branches = "".join(
        f"{{%- if message['role'] == '{role}' %}}{{{{- {before!r} + message['content'] + {after!r} }}}}{{%- endif %}}"
        for role, (before, after) in affixes.items()
    )
    return f"{{{{- {END!r} }}}}{{%- for message in messages %}}{branches}{{%- endfor %}}"


def _vocab_and_merges(ranks: dict[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Convert tiktoken ranks to (vocabulary, merges) in the format of GPT-2's files, which write bytes as characters.

    After all earlier merges, the bytes of a token form two parts; the token's own merge joins them.
    """
    byte_chars = byte_alphabet()
    names = {token: "".join(byte_chars[byte] for byte in token) for token in ranks}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((names[parts[0]], names[parts[1]]))
    return {names[token]: rank for token, rank in ranks.items()}, merges
