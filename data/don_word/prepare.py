"""Don Quixote by words: writes train.bin, val.bin and meta.json next to this script.

    python data/don_word/prepare.py                      # downloads the text from Project Gutenberg
    python data/don_word/prepare.py --input=pg996.txt    # takes your copy; any other text works too
    python data/don_word/prepare.py --notebook=True      # as the word notebook does it, licence and all

A word includes the space before it, so that no position of a window is spent on a space, and keeps its capitals: ids
give the text back, prompts may have capitals, and bits per byte compare with those by characters. The spellings of a
word then share no embedding, which data/word2vec.py makes up for: it gives them the same vector.

The notebook lowers all letters and has a token for every blank, nearly half of its tokens. It cuts off the start of the
text at a position that fits only Project Gutenberg's 996 as of 2021, and splits by tokens, nine tenths to train on,
where data/*/prepare.py split by characters.
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
NUM_SKIPPED_CHARS = (
    121_506  # at the start, which the notebook leaves out: Gutenberg's header, the table of contents, the prefaces
)
TRAIN_FRACTION = 0.9  # of the notebook's tokens


@dataclass(frozen=True)
class PrepareConfig(BookConfig):
    notebook: bool = False  # the word notebook's own recipe; its licence stays in, with or without raw


def prepare_notebook(path: str, encoding: str) -> PreparedData:
    """Write the data by the notebook's recipe, and print its figures; ids are sorted, where the notebook's change from
    run to run. Raises UserError for a text that is too short for it."""
    text, sha256 = read_text(path, encoding)
    text = text.replace("\n", " ").replace("  ", " ")
    if len(text) <= NUM_SKIPPED_CHARS:
        problem = f"{path} has {len(text):,} characters, and notebook=True leaves out the first {NUM_SKIPPED_CHARS:,}"
        raise UserError(f"{problem}, which fits only Project Gutenberg's 996: drop --notebook")
    text = text[NUM_SKIPPED_CHARS:].lower()
    words = split_words(text, spaces_alone=True)
    tokenizer = WordTokenizer(sorted(set(words)), lower=True, spaces_alone=True)
    print(f"the text begins with {text[:60]!r} (volume i, chapter i of Project Gutenberg's 996, if it is that)")
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
        prepare_text(cfg, FOLDER, DON_QUIXOTE, "word")


if __name__ == "__main__":
    run_program(main)
