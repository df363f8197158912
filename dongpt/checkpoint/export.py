"""Write models in Hugging Face format (config.json, model.safetensors, tokenizer.json, README.md).

    save(model, tokenizer, "directory")          # transformers can load it
    check_tokenizer("directory", tokenizer, texts)

save() does not import transformers.
"""

import os
import random
from typing import Any, Iterable

import torch

from configurator import UserError
from dongpt.checkpoint import custom_code
from dongpt.checkpoint.architectures import CUSTOM, describe, to_transformers
from dongpt.checkpoint.files import model_args
from dongpt.checkpoint.hugging_face import EXPORT_RECORD_FILE, PADDING_FILE, WEIGHT_FILES, hash_files, write_json
from dongpt.text.template import Template
from dongpt.text.tokenizers import (
    END,
    SPACE_BEFORE,
    UNKNOWN,
    UNSUPPORTED_TOKENIZER,
    CharTokenizer,
    Tokenizer,
    bpe_pre_tokenizer,
    byte_alphabet,
    from_dict,
    word_pattern,
)
from model import GPT

UNICODE_RANGES = (  # first and last code points, assigned for so long that all libraries know them
    *((9, 13), (28, 32), (32, 32), (33, 64), (65, 90), (97, 122), (133, 133), (160, 255), (256, 383), (768, 817)),
    *((913, 929), (931, 969), (1024, 1119), (1488, 1514), (1569, 1610), (1611, 1618), (2309, 2361), (2364, 2381)),
    *((2406, 2415), (3585, 3642), (8192, 8205), (8208, 8231), (8304, 8305), (8308, 8334), (8531, 8543), (8592, 8959)),
    *((12352 + 1, 12438), (19968, 40869), (44032, 55203), (65024, 65039), (127744, 127776), (128512, 128586)),
)
CASED, CASE_IGNORABLE = r"[\p{Lu}\p{Ll}\p{Lt}]", r"[\p{M}'.:\u00b7\u2019]"
# a capital sigma that str.lower() converts to the one at the end of a word, which Lowercase does not know
FINAL_SIGMA = rf"(?<={CASED}|{CASED}{CASE_IGNORABLE}|{CASED}{CASE_IGNORABLE}{{2}})\u03a3(?!{CASE_IGNORABLE}*{CASED})"
VOCABULARY_WEIGHTS = ("transformer.wte.weight", "lm_head.weight")


def save(model: GPT, tokenizer: dict | None, directory: str, settings_hash: str = ""):
    """Write a model and its tokenizer, if any, to an empty or new directory. stored_hash reads settings_hash back.

    Rows of the embedding beyond the tokenizer's vocabulary, which other programs reject, are written to a file of
    their own. Raises UserError if the model is not a GPT.
    """
    from safetensors.torch import save_file

    config = model.config
    tokenizer = None if tokenizer == UNSUPPORTED_TOKENIZER else tokenizer
    reader = from_dict(tokenizer) if tokenizer else None
    vocab_size = reader.vocab_size if reader else model.transformer.wte.num_embeddings
    weights = to_transformers(_crop_vocabulary(model.state_dict(), vocab_size), config)
    hf_config = describe(config, vocab_size)
    args = {**model_args(config), "attn_dropout": config.attn_dropout}
    os.makedirs(directory, exist_ok=True)
    if hf_config["model_type"] == CUSTOM:
        hf_config |= {"auto_map": custom_code.AUTO_MAP, "model_args": {**args, "vocab_size": vocab_size}}
        with open(os.path.join(directory, custom_code.FILE_NAME), "w", encoding="utf-8") as file:
            file.write(custom_code.modeling_source())
    save_file(weights, os.path.join(directory, WEIGHT_FILES[0]), metadata={"format": "pt"})
    if vocab_size < model.transformer.wte.num_embeddings:
        save_file(_padding(model, vocab_size), os.path.join(directory, PADDING_FILE), metadata={"format": "pt"})
    end_id = reader.end_id if reader else None
    write_json({**hf_config, "bos_token_id": end_id, "eos_token_id": end_id}, directory, "config.json")
    if reader:
        _save_tokenizer(reader, config.block_size, directory)
    with open(os.path.join(directory, "README.md"), "w", encoding="utf-8") as file:
        file.write(_model_card(model, reader, hf_config["model_type"]))
    record = {"mark": settings_hash, "tokenizer": tokenizer, "model_args": args, "files": hash_files(directory)}
    write_json(record, directory, EXPORT_RECORD_FILE)


def _crop_vocabulary(weights: dict[str, torch.Tensor], vocab_size: int) -> dict[str, torch.Tensor]:
    return {key: weight[:vocab_size] if key in VOCABULARY_WEIGHTS else weight for key, weight in weights.items()}


def _padding(model: GPT, vocab_size: int) -> dict[str, torch.Tensor]:
    """Return the rows beyond vocab_size of the embedding and of an output head that is not tied to it."""
    names = VOCABULARY_WEIGHTS[: 1 if model.config.tie_weights else 2]
    return {name: model.state_dict()[name][vocab_size:].contiguous() for name in names}


def _model_card(model: GPT, tokenizer: Tokenizer | None, architecture: str) -> str:
    """Return the text of README.md, which the Hub shows."""
    config, is_custom = model.config, architecture == CUSTOM
    trust = ", trust_remote_code=True" if is_custom else ""
    code = f"""
This model has n-gram embeddings or positions that no architecture of transformers computes. Its code is
`{custom_code.FILE_NAME}` in this directory, and `trust_remote_code=True` runs it.
"""
    kinds = {"gpt2": "GPT-2's byte pairs", "bpe": "byte pairs", "word": "words", "char": "characters"}
    size = f"{tokenizer.vocab_size:,}" if tokenizer else ""
    vocabulary = f"{kinds.get(tokenizer.kind, tokenizer.kind)}, vocabulary size {size}" if tokenizer else "none"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- dongpt
---

# A GPT trained with donGPT
{code if is_custom else ""}
| | |
|---|---|
| parameters | {sum(p.numel() for p in model.parameters()):,} |
| layers, heads, channels | {config.n_layer}, {config.n_head}, {config.n_embd} |
| context length | {config.block_size:,} tokens |
| positions | {config.pos_embd} |
| n-gram embeddings | {f"up to {config.ngrams} tokens" if config.ngrams > 1 else "none"} |
| architecture in transformers | {architecture} |
| tokenizer | {vocabulary} |

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("DIRECTORY"{trust})
tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")
ids = tokenizer("Once", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=50, do_sample=True)[0]))
```

`python ckpt_update.py DIRECTORY ckpt.pt` converts it back.
"""


def check_tokenizer(directory: str, tokenizer: Tokenizer, texts: Iterable[str]):
    """Raise UserError unless the tokenizer in directory gives the same ids as tokenizer for texts, and restores them.

    Characters that a vocabulary of characters lacks, and the names of special tokens, are left out.
    """
    from tokenizers import Tokenizer as HFTokenizer

    theirs = HFTokenizer.from_file(os.path.join(directory, "tokenizer.json"))
    for text in texts:
        for name in tokenizer.specials:
            text = text.replace(name, "")
        if isinstance(tokenizer, CharTokenizer):
            text = "".join(character for character in text if character in tokenizer.ids)
        ids, their_ids = tokenizer.encode_array(text).tolist(), theirs.encode(text, add_special_tokens=False).ids
        if ids != their_ids:
            at = next((i for i, (a, b) in enumerate(zip(ids, their_ids)) if a != b), min(len(ids), len(their_ids)))
            around = tokenizer.decode(ids[max(0, at - 3) : at + 3])
            problem = f"the exported tokenizer would split {around!r} in another way than the checkpoint's"
            raise UserError(f"nothing was written, since {problem}: keep the model as a checkpoint")
        if theirs.decode(ids, skip_special_tokens=False) != tokenizer.decode(ids):
            problem = f"the exported tokenizer would not restore {text[:40]!r}... from its ids"
            raise UserError(f"nothing was written, since {problem}: keep the model as a checkpoint")


def generated_texts(tokenizer: Tokenizer, n: int = 1000) -> list[str]:
    """Return texts of characters from UNICODE_RANGES, and of entries of the vocabulary in lower and upper case."""
    rng = random.Random(0)
    runs = (rng.choice(UNICODE_RANGES) for _ in range(n))
    ids = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.specials.values()]
    pieces = [tokenizer.decode([i]) for i in rng.choices(ids, k=n)]
    entries = "".join(pieces) + " ".join(piece.strip() for piece in pieces)
    text = "".join(chr(rng.randint(*run)) for run in runs for _ in range(rng.randint(1, 7)))
    return [text, entries, entries.upper(), entries.lower()]


def _save_tokenizer(tokenizer: Any, block_size: int, directory: str):
    """Write tokenizer.json and tokenizer_config.json so that transformers encodes and decodes as tokenizer does."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as HFTokenizer

    if tokenizer.kind in ("gpt2", "bpe"):
        vocabulary, merges = vocab_and_merges(tokenizer.encoding._mergeable_ranks)
        hf_tokenizer = HFTokenizer(models.BPE(vocabulary, merges))
        hf_tokenizer.pre_tokenizer = bpe_pre_tokenizer(tokenizer.kind == "bpe" and tokenizer.keep_marks)
        hf_tokenizer.decoder = decoders.ByteLevel()
    else:
        is_word = tokenizer.kind == "word"  # with char, an unknown character is an error in transformers, too
        ids = {**tokenizer.ids, **({UNKNOWN: tokenizer.unknown_id} if is_word else {})}
        hf_tokenizer = HFTokenizer(models.WordLevel(ids, unk_token=UNKNOWN if is_word else None))
        if is_word and tokenizer.lower:
            sigma = normalizers.Replace(Regex(FINAL_SIGMA), "\u03c2")
            hf_tokenizer.normalizer = normalizers.Sequence([sigma, normalizers.Lowercase()])
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
    if END in tokenizer.specials and tokenizer.kind in ("gpt2", "bpe"):
        settings |= {"unk_token": END}  # never used, but CTranslate2 asks for one
    if tokenizer.kind == "word":
        settings |= {"unk_token": UNKNOWN}
    if tokenizer.template and tokenizer.template.special:
        end = tokenizer.template.end if tokenizer.template.end in tokenizer.specials else END
        settings |= {"eos_token": end, "chat_template": chat_template(tokenizer.template)}
    write_json(settings, directory, "tokenizer_config.json")


def chat_template(template: Template) -> str:
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
    start = f"{{{{- {END!r} }}}}" if template.starts_with_end else ""
    return f"{start}{{%- for message in messages %}}{branches}{{%- endfor %}}"


def vocab_and_merges(ranks: dict[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
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
