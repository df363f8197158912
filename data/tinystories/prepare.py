"""Tokenize TinyStories (Eldan and Li, arxiv.org/abs/2305.07759), and write train.bin, val.bin and meta.json.

    python data/tinystories/prepare.py                                  # downloads it, and trains BPE with 4,096 tokens
    python data/tinystories/prepare.py --tokenizer=gpt2 --name=tinystories_gpt2
    python data/tinystories/prepare.py --input=hf:./TinyStories         # reads a local folder of Parquet files

Each story is a document. The dataset's own validation split becomes val.bin. If a run is interrupted, run the same
command again to continue it.
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from dataclasses import dataclass, replace
from typing import Annotated

import configurator
from dongpt.program import run_program
from dongpt.text.bins import dataset_folder
from dongpt.text.hub import open_dataset, parse_name
from dongpt.text.prepare import TokenizerKind, Vocabulary, prepare, warn_unused_options
from dongpt.text.report import report

FOLDER = os.path.dirname(os.path.abspath(__file__))


@dataclass(frozen=True)
class PrepareConfig(Vocabulary):
    input: str = "hf:roneneldan/TinyStories"  # dataset on the Hugging Face Hub, or a folder: hf:./FOLDER
    name: str = ""  # write to data/<name>/ instead of next to this script
    field: str = "text"  # column that contains the text
    tokenizer: TokenizerKind = "bpe"  # token type: characters, words, BPE trained on this text, or GPT-2's BPE
    shard_tokens: Annotated[int, ">=", 0] = 0  # training tokens per file; 0 writes a single train.bin


def main(argv: list[str] | None = None):
    cfg, given_keys = configurator.load(PrepareConfig, argv)
    warn_unused_options(cfg, given_keys)
    folder = dataset_folder(cfg.name) if cfg.name else FOLDER
    dataset = parse_name(cfg.input)
    train, val = (replace(dataset, split=split) for split in ("train", "validation"))
    print(f"looking up {dataset}", flush=True)
    with open_dataset(train, cfg.field, folder) as documents, open_dataset(val, cfg.field, folder) as val_documents:
        options = dict(shard_tokens=cfg.shard_tokens, val_documents=val_documents)
        prepared = prepare(folder, documents, cfg, source=documents.source, **options)
    assert prepared
    report(prepared)
    name = cfg.name or "tinystories"
    print(f"next: python train.py config/quickstart.py --dataset={name} --out_dir=out-{name}")


if __name__ == "__main__":
    run_program(main)
