"""Compute the loss, perplexity and bits per byte of one or more checkpoints over a whole split.

    python evaluate.py --out_dir=out-don-char
    python evaluate.py out-a out-b/ckpt_last.pt --split=val --json

A path may be a checkpoint, an out_dir, a directory in Hugging Face format, or gpt2, gpt2-medium, gpt2-large or gpt2-xl.
Each checkpoint is evaluated on the data it was trained on, unless --dataset or --data_dir selects other data with the
same vocabulary. Compare only results that were measured on the same text; for models with different tokenizers,
compare only bits per byte. With several processes (torchrun), the work is divided and rank 0 prints the results.
"""

import json
import os
import sys
from dataclasses import dataclass
from typing import Annotated, Literal, Sequence

import configurator
from configurator import UserError
from dongpt import runtime
from dongpt.checkpoint.files import load_from_path
from dongpt.decode.quantize import quantize_linears
from dongpt.decode.ready import Quantization
from dongpt.log import format_table, progress_bar, replace_nonfinite
from dongpt.program import run_program
from dongpt.runtime import DeviceConfig
from dongpt.text.bins import find_data_folder, has_validation
from dongpt.text.tokenizers import added_special_tokens
from dongpt.train.data import Corpus
from dongpt.train.evaluation import eval_batches, evaluate, predicted_bytes


@dataclass(frozen=True)
class EvaluateConfig(DeviceConfig):
    out_dir: str = "out"  # run folder to evaluate if no CHECKPOINT is given
    init_from: str = "resume"  # resume (the run in out_dir), gpt2 (-medium, -large, -xl), hf:OWNER/NAME, or a path
    split: Literal["val", "train"] = "val"  # evaluate on the validation set or the training set
    dataset: str = ""  # name of a dataset folder in data/; default: the one used in training
    data_dir: str = ""  # path to a dataset folder anywhere; overrides dataset
    block_size: Annotated[int | None, ">=", 1] = None  # window length in tokens; None: as in training
    batch_size: Annotated[int, ">=", 1] = 12  # number of windows per batch; affects only the speed
    json: bool = False  # print the results to stdout as a JSON list
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"  # dtype of matmuls
    base: str = ""  # path of the model that a LoRA adapter was trained on, if it has moved
    quantize: Quantization = "none"  # int8: evaluate with 8-bit weights, as in sample.py --quantize=int8


LEGEND = """\
(loss: mean of -ln(probability that the model assigned to each token), lower is better; perplexity: exp(loss);
 bits/byte: loss in bits per byte of text, comparable between models with different tokenizers)"""


def measure(path: str, cfg: EvaluateConfig, rt: runtime.Runtime) -> tuple[dict, Corpus]:
    """Return a results dict (checkpoint, split, loss, perplexity, bits_per_byte, tokens) and the corpus used."""
    model, tokenizer, checkpoint = load_from_path(path, cfg.base)
    stored_config = checkpoint.get("config", {}) if not (cfg.dataset or cfg.data_dir) else {}
    dataset, data_dir = stored_config.get("dataset", cfg.dataset), stored_config.get("data_dir", cfg.data_dir)
    if not (dataset or data_dir):
        raise UserError(f"{path} does not record what data it was trained on: pass --dataset=NAME or --data_dir=DIR")
    folder = find_data_folder(dataset, data_dir, rt, out=sys.stderr)
    if stored_config and data_dir and not os.path.isdir(folder):
        raise UserError(f"{path} was trained on {data_dir}, which no longer exists: pass --data_dir=DIR")
    corpus = Corpus(folder)
    if cfg.split == "val" and not has_validation(corpus.meta):
        raise UserError(f"{corpus.name} has no validation set: pass --split=train, or other data with --data_dir=DIR")
    if added_special_tokens(corpus.tokenizer_dict, tokenizer) is None:
        reason = f"the vocabulary of {path} differs from that of {corpus.name}"
        raise UserError(f"{reason}: use --dataset or --data_dir to select data made with the model's tokenizer")
    corpus.check(1, model.transformer.wte.num_embeddings, [cfg.split])
    n_bytes = predicted_bytes(corpus, cfg.split)
    block_size = cfg.block_size or model.config.block_size
    try:
        model.check_length(block_size)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    if model.document_end_id is not None:
        rt.print(f"{path}: attention stops at <|endoftext|>, as in training (document_mask)", file=sys.stderr)
    model.to(rt.device)
    if cfg.quantize == "int8":
        quantize_linears(model)
    n_batches = -(-(corpus.lengths[cfg.split] - 1) // (block_size * cfg.batch_size * rt.world_size))
    batches = eval_batches(corpus, cfg.split, cfg.batch_size, block_size, None, rt.rank, rt.world_size)
    loss = evaluate(model, progress_bar(n_batches, unit=" batches", quiet=not rt.is_main, iterable=batches), rt)
    assert loss  # not None, because nothing can stop it
    results = dict(loss=loss.nats, perplexity=loss.perplexity, bits_per_byte=loss.bits_per_byte(n_bytes))
    return {"checkpoint": path, "split": cfg.split, **results, "tokens": loss.tokens}, corpus


def comparison_note(corpora: Sequence[Corpus], names: list[str], split: str) -> str:
    """Return a warning if the results of several checkpoints are not fully comparable, else ""."""

    def text_id(corpus: Corpus) -> tuple:
        source = corpus.meta.get("sha256") or corpus.sha256 or os.path.realpath(corpus.folder)
        return source, corpus.meta.get("bytes", {}).get(split), split in corpus.masks

    if len(set(map(text_id, corpora))) > 1:
        texts = "; ".join(f"{name} on {corpus.name}" for name, corpus in zip(names, corpora))
        return f"these results are not comparable because they were measured on different data: {texts}"
    if any(corpus.tokenizer_dict != corpora[0].tokenizer_dict for corpus in corpora):
        return "these models use different tokenizers: compare only bits/byte"
    return ""


def main(argv: list[str] | None = None):
    cfg, given, paths = configurator.load_with_paths(EvaluateConfig, argv, "[CHECKPOINT ...]")
    if paths and (keys := [key for key in ("out_dir", "init_from") if key in given]):
        raise UserError(f"{paths[0]} and --{keys[0]}={given[keys[0]]} both name a model: remove --{keys[0]}")
    rt = runtime.start(cfg.device, cfg.dtype)
    paths = paths or [cfg.out_dir if cfg.init_from == "resume" else cfg.init_from]
    results, corpora = zip(*(measure(path, cfg, rt) for path in paths))
    description = rt.description
    if "dtype" not in given:
        description = description.replace("float32 (requested)", "float32 (exact, evaluate.py's default)")
    rt.print(description, file=sys.stderr)
    if not rt.is_main:
        return
    if cfg.json:
        print(json.dumps([replace_nonfinite(result) for result in results], indent=1))
    else:
        formats = dict(loss=".4f", perplexity=".3f", bits_per_byte=".4f", tokens=",")
        rows = [[r["checkpoint"], r["split"], *(f"{r[key]:{form}}" for key, form in formats.items())] for r in results]
        print(format_table([["checkpoint", "split", "loss", "perplexity", "bits/byte", "tokens"], *rows]), flush=True)
        print(LEGEND, file=sys.stderr)
    if note := comparison_note(corpora, paths, cfg.split):
        print(note, file=sys.stderr)


if __name__ == "__main__":
    run_program(main)
