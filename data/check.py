"""Compares every byte of a prepared data set's ids with meta.json.

    python data/check.py --dataset=openwebtext
    python data/check.py --data_dir=texts

A training checks the sizes of all files and the ends of each shard; this reads all ids, as fast as the disk does. Of
masks only the size is checked. Nothing is written.
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from dataclasses import dataclass

import configurator
from configurator import UserError
from dongpt.program import run_program
from dongpt.text.bins import SPLITS, check_shard_ends, file_sha256, find_data_folder, ids_sha256
from dongpt.train.data import Corpus


@dataclass(frozen=True)
class CheckConfig:
    dataset: str = ""  # a folder under data/
    data_dir: str = ""  # a data folder anywhere; replaces dataset


def check(corpus: Corpus):
    """Raise UserError for ids that differ from meta.json or are beyond the vocabulary; print what was read."""
    check_shard_ends(corpus.folder, corpus.shards)  # which also says if shards are swapped
    for shard in corpus.shards:
        path = os.path.join(corpus.folder, shard["file"])
        if file_sha256(path) != shard["sha256"]:
            raise UserError(f"{path} is not what meta.json describes: copy it again, or prepare the data again")
        print(f"{shard['file']}: {shard['tokens']:,} tokens, as described", flush=True)
    if corpus.sha256 is None:
        print("there is no meta.json with a hash: only sizes and ids were checked")
    elif ids_sha256(corpus.folder, corpus.shards) != corpus.sha256:
        file_names = "val.bin is" if corpus.shards else "train.bin or val.bin is"
        raise UserError(f"{file_names} not what meta.json describes: prepare the data again")
    for split in SPLITS:
        corpus.check_every_id(split, corpus.model_vocab_size)
        print(f"{split}: {corpus.lengths[split]:,} tokens, all of the vocabulary of {corpus.vocab_size:,}")


def main(argv: list[str] | None = None):
    cfg, _ = configurator.load(CheckConfig, argv)
    check(Corpus(find_data_folder(cfg.dataset, cfg.data_dir)))


if __name__ == "__main__":
    run_program(main)
