"""Texts with their summaries, for a model that summarises: writes bins, masks and meta.json next to this script.

    python data/sum/prepare.py --input=articles.csv                              # columns text and summary
    python data/sum/prepare.py --input=articles.jsonl.gz --text=body --summary=title --tokenizer=bpe
    python train.py config/finetune_sum.py
    python sample.py --out_dir=out-sum --start='A long text ...<|summarize|>' --stop='<|endoftext|>'

A record becomes its text, <|summarize|>, its summary, <|endoftext|>, where both marks are real special tokens. Only the
summary and the end after it are in the loss: train.py and evaluate.py respect the masks that say so.
"""

import os
import shlex
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from dataclasses import dataclass
from typing import Annotated, Iterator

import configurator
from configurator import UserError
from dongpt.program import run_program
from dongpt.text.bins import dataset_folder
from dongpt.text.documents import Files, Progress, find_files
from dongpt.text.prepare import TokenizerKind, Vocabulary, document_bucket, prepare, warn_unused_options
from dongpt.text.report import report
from dongpt.text.template import Segment
from dongpt.text.tokenizers import END

FOLDER = os.path.dirname(os.path.abspath(__file__))
SUMMARIZE_TOKEN = "<|summarize|>"


@dataclass(frozen=True)
class PrepareConfig(Vocabulary):
    tokenizer: TokenizerKind = "gpt2"  # gpt2 to fine-tune GPT-2; char, word or bpe for a model of your own
    input: str = ""  # a file of records (.jsonl, .csv, .parquet), a folder or a pattern
    text: str = "text"  # the field that holds what is to be summarised
    summary: str = "summary"  # the field that holds the answer
    val_fraction: Annotated[float, ">", 0, "<", 1] = 0.1  # of the characters, for validation; records stay whole
    encoding: str = "utf-8"  # of the records
    name: str = ""  # a folder under data/ to write to; without it next to this script


@dataclass(frozen=True)
class Summaries:
    """Records of which one field is a text and another its summary. A hash of the text decides on the split."""

    files: Files
    fields: tuple[str, str]

    def read_segments(self, on_progress: Progress, digest=None) -> Iterator[tuple[int, list[Segment]]]:
        """(bucket of the text, segments) of each record; no segments unless both fields have text."""
        summarize, end = Segment(SUMMARIZE_TOKEN, is_special=True), Segment(END, is_special=True, in_loss=True)
        for _, (text, summary) in self.files.records(*self.fields, on_progress=on_progress, digest=digest):
            segments = [Segment(text), summarize, Segment(summary, in_loss=True), end]
            yield document_bucket(text), segments if text.strip() and summary.strip() else []


def main(argv: list[str] | None = None):
    cfg, given = configurator.load(PrepareConfig, argv)
    warn_unused_options(cfg, given)
    if not cfg.input:
        remedy = "pass --input=PATH of a .csv, .jsonl or .parquet file with the fields text and summary"
        raise UserError(f"no records were given: {remedy}, or name yours with --text and --summary")
    paths, _ = find_files(cfg.input)
    folder = dataset_folder(cfg.name) if cfg.name else FOLDER
    files = Files(paths, encoding=cfg.encoding, option="--text or --summary")
    summaries = Summaries(files, (cfg.text, cfg.summary))
    source = os.path.basename(os.path.normpath(cfg.input))
    report(prepare(folder, summaries, cfg, cfg.val_fraction, source, specials=[SUMMARIZE_TOKEN, END]))
    config = "config/finetune_sum.py" if cfg.tokenizer == "gpt2" else "config/quickstart.py --out_dir=out-sum"
    dataset = "" if cfg.tokenizer == "gpt2" and not cfg.name else f" --dataset={shlex.quote(cfg.name or 'sum')}"
    print(f"next: python train.py {config}{dataset}")


if __name__ == "__main__":
    run_program(main)
