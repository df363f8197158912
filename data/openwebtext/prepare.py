"""OpenWebText in GPT-2 byte pairs, in shards: writes train_000.bin, ..., val.bin and meta.json beside this script.

    python data/openwebtext/prepare.py                                   # says what there is to download
    python data/openwebtext/prepare.py --yes                             # downloads it, and prepares it
    python data/openwebtext/prepare.py --files='owt/*.parquet|more.jsonl|notes/*.txt'     # from files of yours

As nanoGPT does it: <|endoftext|> after every document, 0.05 % of the documents for validation, the same ones. A run
that was interrupted or killed continues where it stopped when the same command is given again. Any corpus will do: a
record of parquet or JSON lines is a document, and so is a text file.
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
from dongpt.text.report import report

FOLDER = os.path.dirname(os.path.abspath(__file__))
REPOSITORY = "Skylion007/openwebtext"  # on Hugging Face
REVISIONS = ("main", "refs/convert/parquet")  # the latter is what Hugging Face makes of data sets in other formats


@dataclass(frozen=True)
class PrepareConfig:
    files: str = ""  # paths, patterns or folders with | between; without them OpenWebText is downloaded
    yes: bool = False  # download
    name: str = ""  # the folder under data/ to write to; without it the one of this script
    field: str = "text"  # of the records
    encoding: str = "utf-8"  # of the files
    val_fraction: Annotated[float, ">", 0, "<", 1] = 0.0005  # of the documents, for validation; nanoGPT's
    seed: Annotated[int, ">=", 0, "<", 2**32] = 2357  # draws them; nanoGPT's
    shard_tokens: Annotated[int, ">=", 1] = 2**27  # tokens per shard, of two bytes each


def download(yes: bool) -> list[str]:
    """Paths of OpenWebText's parquet files, downloaded to Hugging Face's cache unless they are there already.

    Raises UserError where they cannot be had, and, with the size, unless yes.
    """
    import huggingface_hub as hub

    try:
        revision, files = parquet_files(hub.HfApi())
        if yes and files:
            options = {"repo_type": "dataset", "revision": revision}
            return [hub.hf_hub_download(REPOSITORY, file.path, **options) for file in files]
    except Exception as error:  # of the hub, of two libraries for the network, or of the disk
        problem = f"{REPOSITORY} could not be downloaded ({first_line(error)}): the same command goes on where it"
        raise UserError(f"{problem} stopped, or pass --files=PATHS of your copy") from error
    if not files:
        raise UserError(f"{REPOSITORY} has no whole copy in parquet any more: pass --files=PATHS of yours")
    size = f"{sum(file.size for file in files) / 1e9:,.1f} GB in {len(files)} parquet files"
    problem = f"{REPOSITORY} is {size}, which go to Hugging Face's cache (HF_HOME), its shards take about 18 GB"
    raise UserError(f"{problem}, and {free_space()}: pass --yes to download it, or --files=PATHS of your copy")


def parquet_files(api) -> tuple[str, list]:
    """(revision, files) of the training split; no files where the repository has none in parquet."""
    for revision in REVISIONS:
        tree = api.list_repo_tree(REPOSITORY, recursive=True, revision=revision, repo_type="dataset")
        files = [file for file in tree if file.path.endswith(".parquet")]
        if complete := [file for file in files if "partial-" not in file.path]:  # those hold the first gigabytes
            return revision, sorted(complete, key=lambda file: file.path)
    return "", []


def holds_openwebtext() -> bool:
    """Whether the download has been prepared in this folder."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # there is no meta.json, or it is no description
        with open(os.path.join(FOLDER, "meta.json"), encoding="utf-8") as file:
            return json.load(file).get("source") == REPOSITORY
    return False


def free_space() -> str:
    """The free space on the disk of this folder, in words."""
    return f"{shutil.disk_usage(FOLDER).free / 1e9:,.1f} GB are free here"


def main(argv: list[str] | None = None):
    cfg, _ = configurator.load(PrepareConfig, argv)
    folder = dataset_folder(cfg.name) if cfg.name else FOLDER
    if cfg.files and folder == FOLDER and holds_openwebtext():
        raise UserError("data/openwebtext holds OpenWebText: pass --name=NAME to write your files elsewhere")
    if cfg.files:
        paths = [path for pattern in cfg.files.split("|") for path in find_files(pattern.strip(), "--files")[0]]
        real_paths = [os.path.realpath(path) for path in paths]
        if duplicates := sorted({path for path in real_paths if real_paths.count(path) > 1}):
            raise UserError(f"--files names {duplicates[0]} twice: name each file once")
    else:
        paths = download(cfg.yes)
    files = Files(paths, field=cfg.field, encoding=cfg.encoding, raw=True)
    print(f"{len(paths):,} files, {files.size / 1e6:,.1f} MB; {free_space()}")
    source, options = cfg.files or REPOSITORY, dict(shard_tokens=cfg.shard_tokens, seed=cfg.seed)
    if prepared := prepare(folder, files, Vocabulary("gpt2"), cfg.val_fraction, source, **options):
        report(prepared)
    else:
        print(f"{folder} holds all of it already: to prepare it again, delete its .bin files and meta.json")
    dataset = f" --dataset={cfg.name}" if cfg.name else ""
    print(f"next: torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py{dataset}")


if __name__ == "__main__":
    run_program(main)
