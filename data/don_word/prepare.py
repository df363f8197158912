"""Don Quixote by words: writes train.bin, val.bin and meta.json next to this script.

    python data/don_word/prepare.py                      # downloads the text from Project Gutenberg
    python data/don_word/prepare.py --input=pg996.txt    # uses your copy; any other text works too
    python data/don_word/prepare.py --notebook=True      # as the word notebook prepares it, licence included

A word includes the space before it, so a window spends no positions on spaces, and keeps its capital letters. The ids
therefore decode to the same text, prompts may contain capitals, and bits per byte can be compared with those of a
character model. Different spellings of a word have different embeddings; data/word2vec.py gives them the same vector.

The notebook converts the text to lower case and makes every blank a token, nearly half of all tokens. It drops the
start of the text, up to a position that is right only for Project Gutenberg's 996 as of 2021, and trains on the first
nine tenths of the tokens, where data/*/prepare.py split by characters.
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
NUM_SKIPPED_CHARS = 121_506  # dropped by the notebook: Gutenberg's header, the table of contents, the prefaces
TRAIN_FRACTION = 0.9  # of the tokens


@dataclass(frozen=True)
class PrepareConfig(BookConfig):
    notebook: bool = False  # prepare the text as the word notebook does; always keeps the licence


def prepare_notebook(path: str, encoding: str) -> PreparedData:
    """Prepare the text as the notebook does, and print the same statistics. The ids, unlike there, never vary.

    Raises UserError for a text that is too short.
    """
    text, sha256 = read_text(path, encoding)
    text = text.replace("\n", " ").replace("  ", " ")
    if len(text) <= NUM_SKIPPED_CHARS:
        problem = f"{path} has only {len(text):,} characters, and --notebook drops the first {NUM_SKIPPED_CHARS:,}"
        raise UserError(f"{problem}, which fits only Project Gutenberg's 996: drop --notebook")
    text = text[NUM_SKIPPED_CHARS:].lower()
    words = split_words(text, spaces_alone=True)
    tokenizer = WordTokenizer(sorted(set(words)), lower=True, spaces_alone=True)
    print(f"the text begins with {text[:60]!r} (Project Gutenberg's 996: volume i, chapter i)")
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
