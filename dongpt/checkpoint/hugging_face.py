"""GPT-2 in Hugging Face's format: a folder with config.json and model.safetensors, or one of OpenAI's by its name.

model, tokenizer = load("gpt2")          # tokenizer as a plain dict, or None
save(model, tokenizer, "folder")         # what transformers opens as GPT2LMHeadModel
"""

import hashlib
import json
import logging
import os

import torch

from configurator import UserError
from dongpt.text.template import Template
from dongpt.text.tokenizers import END, FOREIGN, UNKNOWN, byte_alphabet, from_dict
from model import GPT, GPTConfig

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
OURS = "dongpt.json"  # in a folder that save wrote: the tokenizer as a plain dict, the mark, the hashes of the files
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
# Their Conv1D keeps its weight the other way round than Linear. c_proj is square: no shape would tell.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
GPT2_IDS = {"!": 0, "\u0120the": 262, "\u0120gazed": 50255, "<|endoftext|>": 50256}  # by these its vocabulary is known


def is_one(path: str) -> bool:
    """Whether path names OpenAI's weights or is a folder in this format."""
    return path in GPT2_NAMES or os.path.exists(os.path.join(path, "config.json"))


def load(name: str) -> tuple[GPT, dict | None]:
    """(GPT with its weights, its tokenizer as a plain dict or None). name: a folder, or one of GPT2_NAMES to download.

    Raises UserError for a folder or a download that fails, and for models that are not GPT-2's architecture.
    """
    if os.path.isdir(name):
        _check_model_type(name)
    theirs = _load_theirs(name)
    config = theirs.config
    if config.activation_function not in ACTIVATIONS:
        raise UserError(f"{name}: activation {config.activation_function!r} is not one of {', '.join(ACTIVATIONS)}")
    ours = dict(
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        layer_norm_epsilon=1e-5,
        add_cross_attention=False,
        n_inner=None,
    )
    if config.n_inner == 4 * config.n_embd:
        config.n_inner = None
    if other := [f"{key}={getattr(config, key)}" for key, value in ours.items() if getattr(config, key) != value]:
        raise UserError(f"{name} is not GPT-2's architecture ({', '.join(other)}): it cannot be loaded")
    model = GPT(
        GPTConfig(
            block_size=config.n_positions,
            vocab_size=config.vocab_size,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            bias=True,
            activation=ACTIVATIONS[config.activation_function],
            tie_weights=config.tie_word_embeddings,
        )
    )
    model.load_state_dict(
        {
            key: weight.t() if key.endswith(TRANSPOSED) else weight
            for key, weight in theirs.state_dict().items()
            if not key.endswith((".attn.bias", ".attn.masked_bias"))
        }
    )
    return model, _tokenizer_of(name, config.vocab_size)


def _check_model_type(folder: str):
    """Raise UserError unless config.json says GPT-2, or says nothing."""
    kind = _read_json(folder, "config.json").get("model_type", "gpt2")
    if kind != "gpt2":
        raise UserError(f"{folder} holds a model of type {kind!r}: only 'gpt2' can be loaded")


def _read_json(folder: str, name: str) -> dict:
    """The content of a file in folder, {} if there is no such file. Raises UserError for one that holds no dict."""
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): fetch or write the folder anew") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: fetch or write the folder anew")
    return content


def _load_theirs(name: str):
    """transformers' model, every weight of it from the files."""
    from transformers import GPT2LMHeadModel
    from transformers.utils import logging as reports

    reports.disable_progress_bar()
    verbosity = reports.get_verbosity()
    reports.set_verbosity_error()  # what it reports of missing weights is said below
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every retry
    try:
        theirs, report = GPT2LMHeadModel.from_pretrained(name, output_loading_info=True)
    except Exception as error:  # the hub's client, the network and the file formats each have errors of their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the Hugging Face model {name!r} could not be loaded ({reason}): connect to a network, "
            f"or give a folder that holds config.json and model.safetensors"
        ) from error
    finally:
        reports.set_verbosity(verbosity)
    missing = sorted(key for key in report["missing_keys"] if not key.endswith((".attn.bias", ".attn.masked_bias")))
    if missing:
        raise UserError(f"{name} lacks weights: {', '.join(missing)}; it holds no GPT-2 with a language model head")
    return theirs


def _tokenizer_of(name: str, vocab_size: int) -> dict | None:
    """The tokenizer of a model: as save wrote it, GPT-2's where the files are GPT-2's, FOREIGN for any other."""
    if ours := _read_json(name, OURS):
        return ours.get("tokenizer")
    vocabulary = _read_json(name, "vocab.json") or _read_json(name, "tokenizer.json").get("model", {}).get("vocab")
    if isinstance(vocabulary, list):  # of a unigram model, pieces with their scores
        return FOREIGN
    if vocabulary:
        return {"kind": "gpt2"} if all(vocabulary.get(token) == i for token, i in GPT2_IDS.items()) else FOREIGN
    return {"kind": "gpt2"} if vocab_size == 50257 else None


# ----------------------------------------------------------------------------------------------------------------------
# writing


def save(model: GPT, tokenizer: dict | None, folder: str, mark: str = ""):
    """Write model, and its tokenizer if there is one, to folder, which must be empty or new; mark_of gives mark back.

    Raises UserError where GPT-2's architecture cannot express the model.
    """
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging as reports

    reports.disable_progress_bar()
    config = model.config
    if reason := _why_not_gpt2(config):
        raise UserError(f"GPT-2's architecture cannot express this model, which has {reason}: keep it as a checkpoint")
    tokenizer = None if tokenizer == FOREIGN else tokenizer
    end_of_text = from_dict(tokenizer).end_id if tokenizer else None
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.block_size,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            activation_function="gelu_new" if config.activation == "gelu_tanh" else "gelu",
            tie_word_embeddings=config.tie_weights,
            embd_pdrop=config.dropout,
            resid_pdrop=config.dropout,
            attn_pdrop=config.attn_dropout,
            bos_token_id=end_of_text,
            eos_token_id=end_of_text,
        )
    )
    weights = model.state_dict()
    for key, weight in theirs.state_dict().items():
        if key not in weights:  # biases, which a model without them does not have
            assert key.endswith(".bias"), key
            weight.zero_()
        else:
            weight.copy_(weights[key].t() if key.endswith(TRANSPOSED) else weights[key])
    theirs.save_pretrained(folder)
    if tokenizer:
        _save_tokenizer(tokenizer, config.block_size, folder)
    with open(os.path.join(folder, OURS), "w", encoding="utf-8") as file:
        json.dump({"mark": mark, "tokenizer": tokenizer, "files": _hashes(folder)}, file)


def mark_of(folder: str) -> str | None:
    """The mark that save wrote, if what is in folder is what it wrote and no more; else None."""
    try:
        ours = _read_json(folder, OURS)
        return ours.get("mark") if _hashes(folder) == ours.get("files") else None
    except (OSError, ValueError):
        return None


def _hashes(folder: str) -> dict[str, str]:
    """The hash of each file in folder, the record of save left out."""
    hashes = {}
    for name in sorted(set(os.listdir(folder)) - {OURS}):
        digest = hashlib.sha256()
        with open(os.path.join(folder, name), "rb") as file:
            while piece := file.read(2**20):
                digest.update(piece)
        hashes[name] = digest.hexdigest()
    return hashes


def logits_of(folder: str, idx) -> torch.Tensor:
    """What transformers' own model in folder makes of ids (B, T): (B, T, V), float32."""
    with torch.no_grad():
        return _load_theirs(folder).float().eval()(idx).logits


def _why_not_gpt2(config: GPTConfig) -> str:
    """What GPT-2 does not have of an architecture; '' if nothing."""
    if config.model_type != "gpt":
        return f"model_type={config.model_type}"
    if config.ngrams > 1:
        return f"ngrams={config.ngrams}"
    return "" if config.positions == "default" else f"{config.positions} positions"


def _save_tokenizer(description: dict, block_size: int, folder: str):
    """Write tokenizer.json, by which transformers encodes and decodes as ours does."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = from_dict(description)
    if tokenizer.kind in ("gpt2", "bpe"):
        vocabulary, merges = _byte_pairs(tokenizer.encoding._mergeable_ranks)
        theirs = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
        theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        theirs.decoder = decoders.ByteLevel()
    elif tokenizer.kind == "word":
        ids = {**tokenizer.ids, UNKNOWN: tokenizer.unknown_id}
        theirs = tokenizers.Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
        theirs.normalizer = normalizers.Lowercase() if tokenizer.lower else None
        theirs.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(tokenizer.pattern), "isolated")
        theirs.decoder = decoders.Fuse()
    else:
        theirs = tokenizers.Tokenizer(models.WordLevel(tokenizer.ids))  # an unknown character is an error there too
        theirs.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        theirs.decoder = decoders.Fuse()
    theirs.add_special_tokens(sorted(tokenizer.specials, key=tokenizer.specials.get))
    more = dict(bos_token=END, eos_token=END) if END in tokenizer.specials else {}
    if tokenizer.template and tokenizer.template.special:
        more.update(eos_token=tokenizer.template.end, chat_template=_chat_template(tokenizer.template))
    PreTrainedTokenizerFast(
        tokenizer_object=theirs, model_max_length=block_size, clean_up_tokenization_spaces=False, **more
    ).save_pretrained(folder)


def _chat_template(template: Template) -> str:
    """The template in Jinja, as transformers' apply_chat_template wants it: what conversation.py asks a model."""
    said = {
        "system": (template.system, ""),
        "user": (template.user, template.assistant),
        "assistant": (template.gap, template.end),
    }
    cases = "".join(
        f"{{%- if message['role'] == '{role}' %}}{{{{- {before!r} + message['content'] + {after!r} }}}}{{%- endif %}}"
        for role, (before, after) in said.items()
    )
    return f"{{{{- {END!r} }}}}{{%- for message in messages %}}{cases}{{%- endfor %}}"


def _byte_pairs(ranks: dict[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """tiktoken's ranks as the vocabulary and the merges of GPT-2's own files, which write bytes as characters.

    A token is the merge of the two parts that the merges before it leave of its bytes.
    """
    letters = byte_alphabet()

    def write(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            i = pairs.index(min(pairs))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((write(parts[0]), write(parts[1])))
    return {write(token): rank for token, rank in ranks.items()}, merges
