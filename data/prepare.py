"""Any text for training: writes train.bin, val.bin and meta.json.

    python data/prepare.py --input=mytext.txt --name=mytext                     # by characters, to data/mytext
    python data/prepare.py --input=poems/ --name=poems --tokenizer=bpe --vocab_size=1024
    python data/prepare.py --input='logs/*.jsonl.gz' --field=message --name=logs --tokenizer=gpt2
    python data/prepare.py                                                      # asks

The input is a file, a folder with all below it, or a pattern: .txt .md .jsonl .csv .parquet, the first four also with
.gz .bz2 .xz. Without --name the files lie beside the text, for train.py --data_dir=...
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import glob
import shlex
from dataclasses import dataclass
from typing import Annotated

import configurator
from configurator import UserError
from dongpt.program import ROOT, run_program
from dongpt.text.bins import PreparedData, dataset_folder
from dongpt.text.documents import TEXT_SUFFIXES, Document, Files, file_suffixes, find_files
from dongpt.text.prepare import Vocabulary, prepare, warn_unused_options
from dongpt.text.report import report


@dataclass(frozen=True)
class PrepareConfig(Vocabulary):
    input: str = ""  # a file, a folder or a pattern; asked for where it is not given
    name: str = ""  # the folder under data/ to write to; without it beside the text
    val_fraction: float = 0.1  # of the characters, for validation
    document: Document = "file"  # file: a file or a record is a document; line or blank: cut there; none: all is one
    field: str = "text"  # of the records of .jsonl, .csv and .parquet
    encoding: str = "utf-8"  # of the text
    shard_tokens: Annotated[int, ">=", 0] = 0  # tokens per file of train; 0 puts all of them into train.bin


def texts_here() -> list[str]:
    """Files in the working directory and under data/ that look like texts to prepare."""
    paths = glob.glob("*") + glob.glob(os.path.join(ROOT, "data", "*", "*"))
    found = [os.path.relpath(p) for p in paths if os.path.isfile(p) and file_suffixes(p)[0] in TEXT_SUFFIXES]
    return sorted({path for path in found if not os.path.basename(path).startswith(("requirements", "README"))})


def ask() -> str:
    """The path that somebody at the terminal chooses."""
    if not sys.stdin.isatty():
        raise UserError("no text was given: pass --input=PATH of a file, a folder or a pattern, and --name=NAME")
    found = texts_here()[:20]
    for number, path in enumerate(found, 1):
        print(f"{number:3}  {path}")
    try:
        answer = input("Which text? " + ("A number, or a path: " if found else "A path: ")).strip()
    except EOFError:
        answer = ""
    if not answer:
        raise UserError("no text was given: pass --input=PATH, or type a path when asked")
    return found[int(answer) - 1] if answer.isdigit() and 0 < int(answer) <= len(found) else answer


def print_next(prepared: PreparedData, name: str):
    """Print the length of an epoch in iterations of config/quickstart.py, and the command that trains with it."""
    path = os.path.join(ROOT, "config", "quickstart.py")
    quick, tokens = configurator.exec_config(path), prepared.meta["tokens"]
    n = quick["batch_size"] * quick["block_size"] * quick["gradient_accumulation_steps"]
    print(
        f"one epoch is {tokens['train'] / n:,.1f} iterations with config/quickstart.py ({n:,} tokens each); its "
        f"{quick['max_iters']:,} iterations are {quick['max_iters'] * n / tokens['train']:,.1f} epochs"
    )
    where = f"--dataset={shlex.quote(name)}" if name else f"--data_dir={shlex.quote(shortest(prepared.folder))}"
    out_dir = shlex.quote("out-" + os.path.basename(os.path.abspath(prepared.folder)))
    block_size = min(tokens.values()) - 1
    shorter = f" --block_size={max(1, block_size)}" if block_size < quick["block_size"] else ""
    train, config = (shlex.quote(shortest(file)) for file in (os.path.join(ROOT, "train.py"), path))
    print(f"next: python {train} {config} {where} --out_dir={out_dir}{shorter}")


def shortest(path: str) -> str:
    """The shorter of the relative and the absolute path."""
    return min(os.path.relpath(path), os.path.abspath(path), key=len)


def main(argv: list[str] | None = None):
    cfg, given_keys, given_paths = configurator.load_with_paths(PrepareConfig, argv, "[TEXT]")
    warn_unused_options(cfg, given_keys)
    folder = dataset_folder(cfg.name) if cfg.name else ""
    if cfg.input and given_paths:
        raise UserError(f"--input={cfg.input} and {given_paths[0]} are two texts: pass one, a folder or a pattern")
    given = cfg.input or "".join(given_paths) or ask()
    paths, n_others = find_files(given)
    files = Files(paths, cfg.document, cfg.field, cfg.encoding)
    if not folder:  # the one given, or the one that all files are in
        around = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
        folder = given if os.path.isdir(given) else around
    others = f", {n_others:,} others left aside" if n_others else ""
    print((f"{given}: {len(paths):,} files" if len(paths) > 1 else paths[0]) + others)
    if plain := [path for path in paths if file_suffixes(path)[0] not in TEXT_SUFFIXES]:
        more = f" and {len(plain) - 1:,} more" if len(plain) > 1 else ""
        print(f"read as plain text, whatever it is: {os.path.basename(plain[0])}{more}")
    source = os.path.basename(os.path.normpath(given))
    prepared = prepare(folder, files, cfg, cfg.val_fraction, source, shard_tokens=cfg.shard_tokens)
    report(prepared)
    print_next(prepared, cfg.name)


if __name__ == "__main__":
    run_program(main)
