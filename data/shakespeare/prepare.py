"""Tiny Shakespeare in GPT-2 byte pairs: writes train.bin, val.bin and meta.json beside this script.

python data/shakespeare/prepare.py                      # downloads the text, as nanoGPT's script does
python data/shakespeare/prepare.py --input=input.txt    # takes your copy
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from dataclasses import dataclass

import configurator
from dongpt.program import run_program
from dongpt.text import sources
from dongpt.text.documents import Texts
from dongpt.text.prepare import Vocabulary, prepare
from dongpt.text.report import report

FOLDER = os.path.dirname(os.path.abspath(__file__))


@dataclass(frozen=True)
class PrepareConfig:
    input: str = ""  # path of the text; without it input.txt beside this script, else a download


def main(argv: list[str] | None = None):
    cfg, _ = configurator.load(PrepareConfig, argv)
    path = sources.find_text(cfg.input, FOLDER, sources.TINY_SHAKESPEARE)
    text, sha256 = sources.read_text(path)
    report(prepare(FOLDER, Texts([text]), Vocabulary("gpt2"), source=os.path.basename(path), sha256=sha256))


if __name__ == "__main__":
    run_program(main)
