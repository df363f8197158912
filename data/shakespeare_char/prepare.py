"""Tokenize tiny Shakespeare into characters, and write train.bin, val.bin and meta.json next to this script.

python data/shakespeare_char/prepare.py                      # downloads the text, as nanoGPT's script does
python data/shakespeare_char/prepare.py --input=input.txt    # uses your copy
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

import configurator
from dongpt.program import run_program
from dongpt.text.sources import TINY_SHAKESPEARE, TextConfig, prepare_text


def main(argv: list[str] | None = None):
    cfg, _ = configurator.load(TextConfig, argv)
    next_config = "config/quickstart.py --dataset=shakespeare_char --out_dir=out-shakespeare-char"
    prepare_text(cfg, os.path.dirname(os.path.abspath(__file__)), TINY_SHAKESPEARE, "char", next_config)


if __name__ == "__main__":
    run_program(main)
