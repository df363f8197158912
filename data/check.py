"""Check every token of a prepared data set against meta.json.

    python data/check.py openwebtext          # the dataset in data/openwebtext; --dataset=openwebtext is equivalent
    python data/check.py --data_dir=texts

train.py checks only the file sizes and the ends of each shard. This program reads every token, as fast as the disk
allows. For masks, it checks only the size. It does not write any files.
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from dataclasses import dataclass

import configurator
from configurator import UserError
from dongpt.program import run_program
from dongpt.text.bins import SPLITS, check_shard_ends, file_sha256, find_data_folder, has_validation, ids_sha256
from dongpt.train.data import Corpus


@dataclass(frozen=True)
class CheckConfig:
    dataset: str = ""  # name of a folder under data/
    data_dir: str = ""  # path to a data folder; overrides dataset


def check(corpus: Corpus):
    """Print each file that matches meta.json. Raises UserError if a file has changed or an id is out of range."""
    check_shard_ends(corpus.folder, corpus.shards)  # also detects swapped shards
    for shard in corpus.shards:
        path = os.path.join(corpus.folder, shard["file"])
        if file_sha256(path) != shard["sha256"]:
            raise UserError(f"{path} does not match meta.json: copy it again, or prepare the data again")
        print(f"{shard['file']}: {shard['tokens']:,} tokens, unchanged", flush=True)
    if corpus.sha256 is None:
        print("no hash found in meta.json: checking only sizes and ids")
    elif ids_sha256(corpus.folder, corpus.shards) != corpus.sha256:
        file_names = "val.bin has" if corpus.shards else "train.bin or val.bin has"
        raise UserError(f"{file_names} changed since meta.json was written: prepare the data again")
    if not has_validation(corpus.meta):
        print("val: the data was prepared without a validation set")
    for split in SPLITS if has_validation(corpus.meta) else SPLITS[:1]:
        corpus.check_every_id(split, corpus.model_vocab_size)
        print(f"{split}: {corpus.lengths[split]:,} tokens, all within the vocabulary size of {corpus.vocab_size:,}")


def main(argv: list[str] | None = None):
    cfg, _, paths = configurator.load_with_paths(CheckConfig, argv, "[DATASET]")
    check(Corpus(find_data_folder(cfg.dataset, cfg.data_dir, paths=paths)))


if __name__ == "__main__":
    run_program(main)
