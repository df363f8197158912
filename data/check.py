"""Whether the ids of a prepared data set are what meta.json says, every byte of them.

    python data/check.py --dataset=openwebtext
    python data/check.py --data_dir=texts

A training checks the sizes of all files and the ends of each shard; this reads all ids, as fast as the disk does. Of
masks the size is checked.
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import hashlib
from dataclasses import dataclass

import configurator
from configurator import UserError
from dongpt.program import run_program
from dongpt.text.shards import check_ends, whole_sha256
from dongpt.train.data import SPLITS, Corpus, find_folder


@dataclass(frozen=True)
class CheckConfig:
    dataset: str = ""  # a folder under data/
    data_dir: str = ""  # a data folder anywhere; replaces dataset

    def __post_init__(self):
        if not (self.dataset or self.data_dir):
            raise UserError("which data? pass --dataset=NAME of a folder under data/, or --data_dir=DIR")


def check(corpus: Corpus):
    """Raise UserError for ids that are not those of meta.json, or beyond the vocabulary; print what was read."""
    check_ends(corpus.folder, corpus.shards)  # which also says where shards are swapped
    ids = hashlib.sha256()
    for shard in corpus.shards:
        path = os.path.join(corpus.folder, shard["file"])
        if whole_sha256(path) != shard["sha256"]:
            raise UserError(f"{path} is not what meta.json describes: copy it anew, or prepare the data anew")
        print(f"{shard['file']}: {shard['tokens']:,} tokens, as described", flush=True)
        ids.update(shard["sha256"].encode("ascii"))
    for split in SPLITS:
        if split == "val" or not corpus.shards:
            for piece in corpus.pieces(split):
                ids.update(piece)
    if corpus.sha256 is None:
        print("no meta.json tells what they should be: only sizes and ids were checked")
    elif ids.hexdigest() != corpus.sha256:
        what = "val.bin is" if corpus.shards else "train.bin or val.bin is"
        raise UserError(f"{what} not what meta.json describes: prepare the data anew")
    for split in SPLITS:
        corpus.check_every_id(split, corpus.model_vocab_size)
        print(f"{split}: {corpus.lengths[split]:,} tokens, all of the vocabulary of {corpus.vocab_size:,}")


def main(argv: list[str] | None = None):
    cfg, _ = configurator.load(CheckConfig, argv)
    check(Corpus(find_folder(cfg.dataset, cfg.data_dir)))


if __name__ == "__main__":
    run_program(main)
