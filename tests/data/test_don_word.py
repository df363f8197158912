"""data/don_word/prepare.py: a book as words, and the word notebook's figures."""

import os
import re
import shutil

import numpy as np
import pytest
from helpers import ROOT, expect_sentence, run

from dongpt.text.sources import read_text, strip_gutenberg
from dongpt.train.data import Corpus


@pytest.fixture
def tree(tmp_path):
    """A copy of what data/don_word/prepare.py needs, so that it writes there."""
    for name in ("configurator.py", "dongpt", "data/don_word"):
        source = os.path.join(ROOT, name)
        if os.path.isdir(source):
            shutil.copytree(
                source,
                tmp_path / name,
                ignore=shutil.ignore_patterns("*.bin", "meta.json", "input.txt", "__pycache__", "word2vec.*"),
            )
        else:
            shutil.copy(source, tmp_path / name)
    return tmp_path


def prepared_in(tree, *args: str, check: int | None = 0):
    return run(str(tree / "data" / "don_word" / "prepare.py"), *args, cwd=tree, check=check)


def test_the_notebooks_figures(tree, don_quixote):
    done = prepared_in(tree, f"--input={don_quixote}", "--notebook=True")
    for line in ("Unique characters: 54", "Unique words and special characters: 14836", "tokens: 887,215"):
        assert line in done.stdout.splitlines()
    with open(don_quixote, encoding="utf-8") as file:  # the notebook's own lines
        text = file.read().replace("\n", " ").replace("  ", " ")[121506:].lower()
    words = re.findall(r"\w+|\S|\s", text)
    corpus = Corpus(str(tree / "data" / "don_word"))
    tokenizer = corpus.tokenizer()
    assert corpus.lengths == {"train": 798_493, "val": 88_722}
    ids = np.concatenate([corpus.tokens["train"][:], corpus.tokens["val"][:]])
    assert [tokenizer.words[i] for i in ids] == words
    assert tokenizer.words == sorted(set(words)) and tokenizer.lower and tokenizer.spaces_alone


def test_by_default_words_have_their_space_and_their_capitals(tree, don_quixote):
    prepared_in(tree, f"--input={don_quixote}")
    corpus = Corpus(str(tree / "data" / "don_word"))
    tokenizer = corpus.tokenizer()
    text = "".join(tokenizer.decode(corpus.tokens[split][:].tolist()) for split in ("train", "val"))
    assert text == strip_gutenberg(read_text(don_quixote)[0])[0]
    assert {" Quixote", " quite", "\n"} <= set(tokenizer.words) and not tokenizer.lower


@pytest.mark.parametrize("text, part", [("a knight " * 900, "has only 8,100 characters"), ("", "is empty")])
def test_a_text_that_the_notebooks_recipe_does_not_fit_is_a_sentence(tree, text, part):
    (tree / "text.txt").write_text(text)
    done = prepared_in(tree, "--input=text.txt", "--notebook=True", check=None)
    expect_sentence(done, "text.txt", part)
    assert not [name for name in os.listdir(tree / "data" / "don_word") if name.endswith((".bin", ".json", ".part"))]
