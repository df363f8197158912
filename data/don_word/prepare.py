"""Don Quixote by words: writes train.bin, val.bin and meta.json beside this script.

    python data/don_word/prepare.py                      # downloads the text from Project Gutenberg
    python data/don_word/prepare.py --input=pg996.txt    # takes your copy; any other text works too
    python data/don_word/prepare.py --notebook=True      # as the word notebook does it, licence and all

A word has the space before it, so that no place of a window goes to a blank, and keeps its capitals: ids give the text
back, prompts may have capitals, bits per byte mean what they mean by characters. What a spelling costs in common
meaning, data/word2vec.py gives back: vectors are shared by all spellings of a word.

The notebook has small letters and a token for every blank, which is nearly half of its tokens. It counted its words in
a text whose beginning it cut off by a number that fits Project Gutenberg's 996 as of 2021 alone; it splits by tokens,
nine tenths to train on, where data/*/prepare.py split by characters.
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from dataclasses import dataclass, replace

import configurator
from configurator import UserError
from dongpt.program import run_program
from dongpt.text import sources
from dongpt.text.bins import Encoded, Prepared, Writer
from dongpt.text.documents import Texts
from dongpt.text.prepare import SAMPLE_CHARS, Vocabulary, prepare
from dongpt.text.report import report
from dongpt.text.tokenizers import WordTokenizer, split_words

FOLDER = os.path.dirname(os.path.abspath(__file__))
BEGINNING = 121_506  # characters that the notebook leaves out: Gutenberg's header, the table of contents, the prefaces
TRAIN_SHARE = 0.9  # of the notebook's tokens


@dataclass(frozen=True)
class PrepareConfig:
    input: str = ""  # path of the text; without it input.txt beside this script, else a download
    raw: bool = False  # keep Project Gutenberg's header and licence
    notebook: bool = False  # the word notebook's own recipe; its licence stays in, with or without raw


def notebook_text(text: str, path: str) -> str:
    """text as the word notebook cleans it. Raises UserError if nothing is left of it."""
    text = text.replace("\n", " ").replace("  ", " ")
    if len(text) <= BEGINNING:
        raise UserError(
            f"{path} has {len(text):,} characters, and notebook=True leaves out the first {BEGINNING:,}, "
            f"as fits Project Gutenberg's 996 alone: leave --notebook away"
        )
    return text[BEGINNING:].lower()


def prepare_notebook(path: str) -> Prepared:
    """Write the bins by the notebook's recipe, and print its figures; ids follow the alphabet, where the notebook's
    change from run to run."""
    text, sha256 = sources.read_text(path)
    text = notebook_text(text, path)
    words = split_words(text, spaces_alone=True)
    tokenizer = WordTokenizer(sorted(set(words)), lower=True, spaces_alone=True)
    print(f"the text begins with {text[:60]!r} (volume i, chapter i of Project Gutenberg's 996, if it is that)")
    print(f"Unique characters: {len(set(text))}")
    print(f"Unique words and special characters: {len(tokenizer.words)}")
    print(f"tokens: {len(words):,}")
    cut = int(TRAIN_SHARE * len(words))
    with Writer(FOLDER, tokenizer) as writer:
        for split, part in (("train", words[:cut]), ("val", words[cut:])):
            text = "".join(part)
            writer.add(split, Encoded(tokenizer.encode_array(text), len(text), len(text.encode("utf-8"))))
        prepared = writer.finish(
            {"source": os.path.basename(path), "sha256": sha256, "documents": 1, "split": "position"}
        )
        return replace(prepared, sample=text[:SAMPLE_CHARS])


def main(argv: list[str] | None = None):
    cfg, _ = configurator.load(PrepareConfig, argv)
    path = sources.find_text(cfg.input, FOLDER, sources.DON_QUIXOTE)
    if cfg.notebook:
        prepared = prepare_notebook(path)
    else:
        text, sha256 = sources.read_book(path, cfg.raw)
        prepared = prepare(FOLDER, Texts([text]), Vocabulary("word"), source=os.path.basename(path), sha256=sha256)
    report(prepared)


if __name__ == "__main__":
    run_program(main)
