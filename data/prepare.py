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
    val_fraction: Annotated[float, ">", 0, "<", 1] = 0.1  # of the characters, for validation
    document: Document = "file"  # file: a file or a record is a document; line or blank: cut there; none: all is one
    field: str = "text"  # of the records of .jsonl, .csv and .parquet
    encoding: str = "utf-8"  # of the text
    shard_tokens: Annotated[int, ">=", 0] = 0  # tokens per file of train; 0 puts all of them into train.bin


def find_texts() -> list[str]:
    """Files in the working directory and under data/ that look like texts to prepare."""
    paths = glob.glob("*") + glob.glob(os.path.join(ROOT, "data", "*", "*"))
    texts = [os.path.relpath(p) for p in paths if os.path.isfile(p) and file_suffixes(p)[0] in TEXT_SUFFIXES]
    return sorted({path for path in texts if not os.path.basename(path).startswith(("requirements", "README"))})


def ask_path() -> str:
    """The path that somebody at the terminal chooses."""
    if not sys.stdin.isatty():
        raise UserError("no text was given: pass --input=PATH of a file, a folder or a pattern, and --name=NAME")
    paths = find_texts()[:20]
    for number, path in enumerate(paths, 1):
        print(f"{number:3}  {path}")
    try:
        answer = input("Which text? " + ("A number, or a path: " if paths else "A path: ")).strip()
    except EOFError:
        answer = ""
    if not answer:
        raise UserError("no text was given: pass --input=PATH, or type a path when asked")
    return paths[int(answer) - 1] if answer.isdigit() and 0 < int(answer) <= len(paths) else answer


def print_next(prepared: PreparedData, name: str):
    """Print the length of an epoch in iterations of config/quickstart.py, and the command that trains with it."""
    config_path = os.path.join(ROOT, "config", "quickstart.py")
    config, tokens = configurator.exec_config(config_path), prepared.meta["tokens"]
    tokens_per_iter = config["batch_size"] * config["block_size"] * config["gradient_accumulation_steps"]
    iters_per_epoch = tokens["train"] / tokens_per_iter
    print(
        f"one epoch is {iters_per_epoch:,.1f} iterations with config/quickstart.py ({tokens_per_iter:,} tokens each); "
        f"its {config['max_iters']:,} iterations are {config['max_iters'] / iters_per_epoch:,.1f} epochs"
    )
    script, config_arg = (shlex.quote(shortest(path)) for path in (os.path.join(ROOT, "train.py"), config_path))
    data = f"--dataset={shlex.quote(name)}" if name else f"--data_dir={shlex.quote(shortest(prepared.folder))}"
    out_dir = shlex.quote("out-" + os.path.basename(os.path.abspath(prepared.folder)))
    max_block_size = max(1, min(tokens.values()) - 1)
    block_size = f" --block_size={max_block_size}" if max_block_size < config["block_size"] else ""
    print(f"next: python {script} {config_arg} {data} --out_dir={out_dir}{block_size}")


def shortest(path: str) -> str:
    """The shorter of the relative and the absolute path."""
    return min(os.path.relpath(path), os.path.abspath(path), key=len)


def main(argv: list[str] | None = None):
    cfg, given_keys, given_paths = configurator.load_with_paths(PrepareConfig, argv, "[TEXT]")
    warn_unused_options(cfg, given_keys)
    folder = dataset_folder(cfg.name) if cfg.name else ""
    if cfg.input and given_paths:
        raise UserError(f"--input={cfg.input} and {given_paths[0]} are two texts: pass one, a folder or a pattern")
    input_path = cfg.input or "".join(given_paths) or ask_path()
    paths, n_skipped = find_files(input_path)
    files = Files(paths, cfg.document, cfg.field, cfg.encoding)
    if not folder:  # the one given, or the one that all files are in
        common_dir = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
        folder = input_path if os.path.isdir(input_path) else common_dir
    others = f", {n_skipped:,} others left aside" if n_skipped else ""
    print((f"{input_path}: {len(paths):,} files" if len(paths) > 1 else paths[0]) + others)
    if unknown := [os.path.basename(path) for path in paths if file_suffixes(path)[0] not in TEXT_SUFFIXES]:
        more = f" and {len(unknown) - 1:,} more" if len(unknown) > 1 else ""
        print(f"read as plain text, whatever it is: {unknown[0]}{more}")
    source = os.path.basename(os.path.normpath(input_path))
    prepared = prepare(folder, files, cfg, cfg.val_fraction, source, shard_tokens=cfg.shard_tokens)
    report(prepared)
    print_next(prepared, cfg.name)


if __name__ == "__main__":
    run_program(main)
