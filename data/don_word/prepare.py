"""Tokenize Don Quixote into words, and write train.bin, val.bin and meta.json next to this script.

    python data/don_word/prepare.py                      # downloads the text from Project Gutenberg
    python data/don_word/prepare.py --input=pg996.txt    # uses your copy or any other text
    python data/don_word/prepare.py --notebook=True      # prepares the text as the word notebook does

A word includes the preceding space and keeps its capital letters, so spaces take up no positions and the ids decode to
the original text. Prompts may contain capital letters, and bits per byte are comparable with a character-level model's.
Different spellings of a word have different embeddings; data/word2vec.py gives them the same vector.

The notebook converts the text to lowercase and makes each space a token, so nearly half of all tokens are spaces. It
removes the text before a fixed position, which is correct only for the 2021 version of Project Gutenberg's e-book 996.
It trains on the first 90% of the tokens, whereas data/*/prepare.py split the text by characters.
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from dataclasses import dataclass, replace

import configurator
from configurator import UserError
from dongpt.program import run_program
from dongpt.text.bins import BinWriter, EncodedText, PreparedData
from dongpt.text.prepare import SAMPLE_CHARS
from dongpt.text.report import report
from dongpt.text.sources import DON_QUIXOTE, BookConfig, find_text, prepare_text, read_text
from dongpt.text.tokenizers import WordTokenizer, split_words

FOLDER = os.path.dirname(os.path.abspath(__file__))
NUM_SKIPPED_CHARS = 121_506  # removed by the notebook: Gutenberg's header, the table of contents, the prefaces
TRAIN_FRACTION = 0.9  # share of the tokens used for training


@dataclass(frozen=True)
class PrepareConfig(BookConfig):
    notebook: bool = False  # prepare the text as the word notebook does, including the license


def prepare_notebook(path: str, encoding: str) -> PreparedData:
    """Prepare the text as the notebook does, with the same statistics, but with ids that are the same in every run.

    Raises UserError if the text is too short.
    """
    text, sha256 = read_text(path, encoding)
    text = text.replace("\n", " ").replace("  ", " ")
    if len(text) <= NUM_SKIPPED_CHARS:
        problem = f"{path} has only {len(text):,} characters, but --notebook skips the first {NUM_SKIPPED_CHARS:,}"
        raise UserError(f"{problem}, as expected for Project Gutenberg's e-book 996: remove --notebook")
    text = text[NUM_SKIPPED_CHARS:].lower()
    words = split_words(text, spaces_alone=True)
    tokenizer = WordTokenizer(sorted(set(words)), lower=True, spaces_alone=True)
    print(f"the text begins with {text[:60]!r} (expected from e-book 996: volume i, chapter i)")
    print(f"Unique characters: {len(set(text))}")
    print(f"Unique words and special characters: {len(tokenizer.words)}")
    print(f"tokens: {len(words):,}")
    n_train_words = int(TRAIN_FRACTION * len(words))
    with BinWriter(FOLDER, tokenizer) as writer:
        for split, part in (("train", words[:n_train_words]), ("val", words[n_train_words:])):
            text = "".join(part)
            writer.add(split, EncodedText(tokenizer.encode_array(text), len(text), len(text.encode("utf-8"))))
        meta = {"source": os.path.basename(path), "sha256": sha256, "documents": 1, "split": "position"}
        return replace(writer.finish(meta), sample=text[:SAMPLE_CHARS])


def main(argv: list[str] | None = None):
    cfg, _ = configurator.load(PrepareConfig, argv)
    if cfg.notebook:
        report(prepare_notebook(find_text(cfg.input, FOLDER, DON_QUIXOTE), cfg.encoding))
    else:
        prepare_text(cfg, FOLDER, DON_QUIXOTE, "word", "config/train_don_word.py")


if __name__ == "__main__":
    run_program(main)
