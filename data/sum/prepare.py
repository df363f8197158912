"""Prepare texts and summaries for training a summarization model: write train.bin, val.bin, loss masks and meta.json.

    python data/sum/prepare.py --input=articles.csv                              # columns text and summary
    python data/sum/prepare.py --input=articles.jsonl.gz --text=body --summary=title --tokenizer=bpe
    python train.py config/finetune_sum.py
    python sample.py --out_dir=out-sum --start='A long text ...<|summarize|>' --stop='<|endoftext|>'

Each record becomes its text, <|summarize|>, its summary and <|endoftext|>. Both markers are special tokens. Only the
summary and <|endoftext|> count toward the loss, because train.py and evaluate.py apply the loss masks. The files are
written next to this script, or to data/<name>/ with --name.
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
    tokenizer: TokenizerKind = "gpt2"  # gpt2 to fine-tune GPT-2; bpe, char or word to train from scratch
    input: str = ""  # file with records (.jsonl, .csv, .parquet), folder or glob pattern
    text: str = "text"  # name of the field with the text
    summary: str = "summary"  # name of the field with the summary
    val_fraction: Annotated[float, ">", 0, "<", 1] = 0.1  # fraction of the characters used for validation
    encoding: str = "utf-8"  # encoding of the input files
    name: str = ""  # write to data/<name>/; default: next to this script


@dataclass(frozen=True)
class Summaries:
    """Records with a text and its summary. A hash of the text determines the split of each record."""

    files: Files
    fields: tuple[str, str]

    def read_segments(self, on_progress: Progress, digest=None) -> Iterator[tuple[int, list[Segment]]]:
        """Yield (bucket of the text, segments) for each record. The segments are empty if a field is blank."""
        separator, end = Segment(SUMMARIZE_TOKEN, is_special=True), Segment(END, is_special=True, in_loss=True)
        for _, (text, summary) in self.files.records(*self.fields, on_progress=on_progress, digest=digest):
            segments = [Segment(text), separator, Segment(summary, in_loss=True), end]
            yield document_bucket(text), segments if text.strip() and summary.strip() else []


def main(argv: list[str] | None = None):
    cfg, given = configurator.load(PrepareConfig, argv)
    warn_unused_options(cfg, given)
    if not cfg.input:
        remedy = "pass --input=PATH to read a .csv, .jsonl or .parquet file with the fields text and summary"
        raise UserError(f"no records were given: {remedy}, or set other field names with --text and --summary")
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
