"""OpenWebText in GPT-2 byte pairs: writes train_000.bin, ..., val.bin and meta.json next to this script.

    python data/openwebtext/prepare.py                                   # prints the size of the download
    python data/openwebtext/prepare.py --yes                             # downloads and prepares it
    python data/openwebtext/prepare.py --files='owt/*.parquet|more.jsonl|notes/*.txt'     # uses your own files

The result is the same as nanoGPT's: <|endoftext|> follows every document, and the same 0.05 % of the documents are kept
for validation. If a run is interrupted or killed, the same command continues it. Any corpus works: each record of a
parquet or JSON lines file is a document, and so is each text file.
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

import contextlib
import json
import shutil
from dataclasses import dataclass
from typing import Annotated

import configurator
from configurator import UserError
from dongpt.program import first_line, run_program
from dongpt.text.bins import dataset_folder
from dongpt.text.documents import Files, find_files
from dongpt.text.prepare import Vocabulary, prepare
from dongpt.text.report import count_of, report

FOLDER = os.path.dirname(os.path.abspath(__file__))
REPOSITORY = "Skylion007/openwebtext"  # on the Hugging Face Hub
REVISIONS = ("main", "refs/convert/parquet")  # the latter is Hugging Face's own conversion to parquet


@dataclass(frozen=True)
class PrepareConfig:
    files: str = ""  # paths, patterns or folders, separated by |; by default OpenWebText is downloaded
    yes: bool = False  # confirm the download
    name: str = ""  # write to data/<name>/; by default next to this script
    field: str = "text"  # the field with the text in .jsonl, .csv and .parquet files
    encoding: str = "utf-8"  # encoding of the files
    val_fraction: Annotated[float, ">", 0, "<", 1] = 0.0005  # share of the documents kept for validation; nanoGPT's
    seed: Annotated[int, ">=", 0, "<", 2**32] = 2357  # selects these documents; nanoGPT's
    shard_tokens: Annotated[int, ">=", 1] = 2**27  # tokens per shard; a token takes two bytes


def download(yes: bool) -> list[str]:
    """Paths of OpenWebText's parquet files, downloaded to Hugging Face's cache if they are not there yet.

    Raises UserError if the download fails, and, stating the size, if yes is False.
    """
    import huggingface_hub as hub

    try:
        revision, files = parquet_files(hub.HfApi())
        if yes and files:
            options = {"repo_type": "dataset", "revision": revision}
            return [hub.hf_hub_download(REPOSITORY, file.path, **options) for file in files]
    except Exception as error:  # from the hub, one of two network libraries, or the disk
        problem = f"{REPOSITORY} could not be downloaded ({first_line(error)}): run the same command again to"
        raise UserError(f"{problem} continue, or pass --files=PATHS of your own copy") from error
    if not files:
        raise UserError(f"{REPOSITORY} no longer has a complete copy in parquet: pass --files=PATHS of your own copy")
    size = f"{sum(file.size for file in files) / 1e9:,.1f} GB in {len(files)} parquet files"
    problem = f"{REPOSITORY} has {size}, stored in Hugging Face's cache (HF_HOME), and its shards take about 18 GB"
    raise UserError(f"{problem}; {free_space()}: pass --yes to download it, or --files=PATHS of your own copy")


def parquet_files(api) -> tuple[str, list]:
    """(revision, files) of the training split; no files if the repository has none in parquet."""
    for revision in REVISIONS:
        tree = api.list_repo_tree(REPOSITORY, recursive=True, revision=revision, repo_type="dataset")
        files = [file for file in tree if file.path.endswith(".parquet")]
        if complete := [file for file in files if "partial-" not in file.path]:  # others are incomplete
            return revision, sorted(complete, key=lambda file: file.path)
    return "", []


def holds_openwebtext() -> bool:
    """Whether this folder holds the prepared OpenWebText."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no meta.json, or a damaged one
        with open(os.path.join(FOLDER, "meta.json"), encoding="utf-8") as file:
            return json.load(file).get("source") == REPOSITORY
    return False


def free_space() -> str:
    """The free disk space, in words."""
    return f"{shutil.disk_usage(FOLDER).free / 1e9:,.1f} GB are free on this disk"


def main(argv: list[str] | None = None):
    cfg, _ = configurator.load(PrepareConfig, argv)
    folder = dataset_folder(cfg.name) if cfg.name else FOLDER
    if cfg.files and folder == FOLDER and holds_openwebtext():
        raise UserError("data/openwebtext holds OpenWebText: pass --name=NAME to write your files elsewhere")
    if cfg.files:
        paths = [path for pattern in cfg.files.split("|") for path in find_files(pattern.strip(), "--files")[0]]
        real_paths = [os.path.realpath(path) for path in paths]
        if duplicates := sorted({path for path in real_paths if real_paths.count(path) > 1}):
            raise UserError(f"--files names {duplicates[0]} twice: name every file only once")
    else:
        paths = download(cfg.yes)
    files = Files(paths, field=cfg.field, encoding=cfg.encoding, raw=True)
    print(f"{count_of(len(paths), 'file')}, {files.size / 1e6:,.1f} MB; {free_space()}")
    source, options = cfg.files or REPOSITORY, dict(shard_tokens=cfg.shard_tokens, seed=cfg.seed)
    if prepared := prepare(folder, files, Vocabulary("gpt2"), cfg.val_fraction, source, **options):
        report(prepared)
    else:
        print(f"{folder} already holds this data: to prepare it again, delete its .bin files and meta.json")
    dataset = f" --dataset={cfg.name}" if cfg.name else ""
    print(f"next: torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py{dataset}")


if __name__ == "__main__":
    run_program(main)
