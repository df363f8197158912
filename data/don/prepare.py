"""Tokenize Don Quixote with GPT-2's BPE, and write train.bin, val.bin and meta.json next to this script.

python data/don/prepare.py                      # downloads the text from Project Gutenberg
python data/don/prepare.py --input=pg996.txt    # uses your copy or any other text
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

import configurator
from dongpt.program import run_program
from dongpt.text.sources import DON_QUIXOTE, BookConfig, prepare_text


def main(argv: list[str] | None = None):
    cfg, _ = configurator.load(BookConfig, argv)
    prepare_text(cfg, os.path.dirname(os.path.abspath(__file__)), DON_QUIXOTE, "gpt2", "config/finetune_don.py")


if __name__ == "__main__":
    run_program(main)
