"""Tokenize OpenWebText with GPT-2's BPE, and write train_000.bin, ..., val.bin and meta.json next to this script.

    python data/openwebtext/prepare.py                                   # prints the size of the download
    python data/openwebtext/prepare.py --yes                             # downloads and prepares it
    python data/openwebtext/prepare.py --files='owt/*.parquet|more.jsonl|notes/*.txt'     # uses your own files

The result matches nanoGPT's: <|endoftext|> follows every document, and the same 0.05% of the documents are held out for
validation. If a run is interrupted, run the same command again to continue it. Any corpus works: each record in a
Parquet or JSON Lines file is a document, and so is each text file.
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

import contextlib
import json
import shutil
from dataclasses import dataclass, replace
from typing import Annotated, Iterator

import configurator
from configurator import UserError
from dongpt.program import run_program
from dongpt.text.bins import dataset_folder
from dongpt.text.documents import Files, find_files
from dongpt.text.hub import HubText, open_dataset, parse_name
from dongpt.text.prepare import Vocabulary, prepare
from dongpt.text.report import count_of, report

FOLDER = os.path.dirname(os.path.abspath(__file__))
REPOSITORY = "Skylion007/openwebtext"  # on the Hugging Face Hub


@dataclass(frozen=True)
class PrepareConfig:
    files: str = ""  # paths, patterns or folders separated by |; by default, OpenWebText is downloaded
    yes: bool = False  # confirm the download
    name: str = ""  # write to data/<name>/ instead of next to this script
    field: str = "text"  # field that contains the text in .jsonl, .csv and .parquet files
    encoding: str = "utf-8"  # text encoding of the files
    val_fraction: Annotated[float, ">", 0, "<", 1] = 0.0005  # fraction of documents used for validation, as in nanoGPT
    seed: Annotated[int, ">=", 0, "<", 2**32] = 2357  # seed for selecting validation documents, as in nanoGPT
    shard_tokens: Annotated[int, ">=", 1] = 2**27  # tokens per shard; each token takes two bytes


def holds_openwebtext() -> bool:
    """Return True if this folder contains the prepared OpenWebText."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no meta.json, or a damaged one
        with open(os.path.join(FOLDER, "meta.json"), encoding="utf-8") as file:
            return REPOSITORY in (json.load(file).get("source") or "")
    return False


def free_space() -> str:
    """Return a message about the available disk space."""
    return f"{shutil.disk_usage(FOLDER).free / 1e9:,.1f} GB of disk space is available"


def open_files(cfg: PrepareConfig) -> Files:
    """Return the user's own files. Raises UserError if one is listed twice."""
    paths = [path for pattern in cfg.files.split("|") for path in find_files(pattern.strip(), "--files")[0]]
    real_paths = [os.path.realpath(path) for path in paths]
    if duplicates := sorted({path for path in real_paths if real_paths.count(path) > 1}):
        raise UserError(f"--files lists {duplicates[0]} twice: list each file only once")
    files = Files(paths, field=cfg.field, encoding=cfg.encoding, raw=True)
    print(f"{count_of(len(paths), 'file')}, {files.size / 1e6:,.1f} MB; {free_space()}")
    return files


@contextlib.contextmanager
def open_hub(cfg: PrepareConfig, folder: str) -> Iterator[HubText]:
    """Open OpenWebText on the Hub. If the download is not confirmed, raises a UserError that states its size."""
    dataset = replace(parse_name(f"hf:{REPOSITORY}"), remedy="pass your own copy with --files=PATHS")
    print(f"looking up {dataset} on the Hugging Face Hub", flush=True)
    with open_dataset(dataset, cfg.field, folder, raw=True) as documents:
        if not cfg.yes and not documents.local_paths:
            size = f"{documents.download_size() / 1e9:,.1f} GB in {count_of(len(documents.remote_paths), 'file')}"
            problem = f"{REPOSITORY} is a download of {size}; its text and shards take up about 35 GB in {folder}"
            raise UserError(f"{problem}; {free_space()}: pass --yes to download it, or {dataset.remedy}")
        yield documents


def main(argv: list[str] | None = None):
    cfg, _ = configurator.load(PrepareConfig, argv)
    folder = dataset_folder(cfg.name) if cfg.name else FOLDER
    if cfg.files and folder == FOLDER and holds_openwebtext():
        raise UserError("data/openwebtext contains OpenWebText: pass --name=NAME to write to data/NAME instead")
    with contextlib.nullcontext(open_files(cfg)) if cfg.files else open_hub(cfg, folder) as documents:
        source = documents.source if isinstance(documents, HubText) else cfg.files
        options = dict(shard_tokens=cfg.shard_tokens, seed=cfg.seed)
        prepared = prepare(folder, documents, Vocabulary("gpt2"), cfg.val_fraction, source, **options)
    if prepared:
        report(prepared)
    else:
        print(f"{folder} already contains this data: to prepare it again, delete its .bin files and meta.json")
    dataset = f" --dataset={cfg.name}" if cfg.name else ""
    print(f"next: torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py{dataset}")


if __name__ == "__main__":
    run_program(main)
