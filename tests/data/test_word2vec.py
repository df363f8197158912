"""data/word2vec.py: word vectors are trained or read, compared and drawn."""

import gzip
import importlib.util
import os
import sys

import numpy as np
import pytest
from helpers import ROOT, expect_sentence, run, run_here

from configurator import UserError
from dongpt.text.documents import Texts
from dongpt.text.prepare import Vocabulary, prepare
from dongpt.train.data import Corpus


@pytest.fixture(scope="module")
def word2vec():
    spec = importlib.util.spec_from_file_location("word2vec", os.path.join(ROOT, "data", "word2vec.py"))
    module = sys.modules["word2vec"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NAMES = {"animal": ["horse", "ass", "dog", "hen"], "metal": ["sword", "lance", "shield", "spur"]}


def two_topics(n: int = 800) -> str:
    """Sentences that speak of animals or of arms, each word by itself in the middle of words of its topic."""
    rng = np.random.default_rng(0)
    around = {"animal": ["eats", "oats", "sleeps", "stable", "hay"], "metal": ["shines", "steel", "strikes", "iron"]}
    sentences = []
    for _ in range(n):
        topic = rng.choice(list(NAMES))
        words = [str(rng.choice(NAMES[topic])), *map(str, rng.choice(around[topic], 4))]
        rng.shuffle(words)
        sentences.append(" ".join(words).capitalize() + rng.choice([".", "!", "?"]))
    return "\n".join(sentences) + "\n"


@pytest.fixture(scope="module")
def topics(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("topics"))
    prepare(folder, Texts([two_topics()]), Vocabulary("word"))
    return folder


@pytest.mark.smoke
def test_sentences_are_those_of_train_without_blanks(tmp_path, word2vec):
    text = "The knight rode.\nHe  said: Who? Me!\n" * 30
    prepare(str(tmp_path), Texts([text]), Vocabulary("word"), val_fraction=0.5)
    corpus = Corpus(str(tmp_path))
    sentences = word2vec.read_sentences(corpus, word2vec.word_of_each_id(corpus.tokenizer()))
    expected = [["the", "knight", "rode", "."], ["he", "said", ":", "who", "?"], ["me", "!"]] * 15
    assert sentences == expected[:-1]  # the cut is a word early


def test_words_that_are_used_alike_are_near(topics, word2vec, tmp_path, monkeypatch):
    pytest.importorskip("gensim", reason="gensim is not installed")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    command = [
        "data/word2vec.py",
        f"--data_dir={topics}",
        "--size=16",
        "--words=horse,sword,unicorn",
        "--near=3",
        "--epochs=5",
        "--sample=0",
        "--near_count=1",
    ]
    done = run_here(*command, cwd=tmp_path)
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    for word, topic in (("horse", "animal"), ("sword", "metal")):
        assert {other.split()[0] for other in lines[word].split(", ")} == set(NAMES[topic]) - {word}, done.stdout
    assert lines["unicorn"] == "not in the training set or too rare"
    with open(os.path.join(topics, "word2vec.png"), "rb") as picture:
        assert picture.read(4) == b"\x89PNG"
    corpus = Corpus(topics)
    rows, ids = np.load(os.path.join(topics, "word2vec.npy")), corpus.tokenizer().ids
    assert rows.shape == (corpus.vocab_size, 16) and rows.dtype == np.float32
    assert np.array_equal(rows[ids["Horse"]], rows[ids[" horse"]]) and rows[ids[" horse"]].any()
    assert not rows[ids["\n"]].any() and not rows[-1].any()
    run(*command, cwd=tmp_path)  # Python's hashes of the words are others there
    assert np.array_equal(np.load(os.path.join(topics, "word2vec.npy")), rows)  # the same seed, the same vectors


def test_given_vectors_are_taken(topics, tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    words = [*NAMES["animal"], *NAMES["metal"], "Quixote"]
    vectors = np.random.default_rng(0).normal(size=(9, 7)).astype(np.float32)
    lines = "".join(f"{word} {' '.join(map(repr, map(float, row)))}\n" for word, row in zip(words, vectors))
    path = tmp_path / "vectors"
    path.write_bytes(gzip.compress(lines.encode()))
    done = run("data/word2vec.py", f"--data_dir={topics}", f"--vectors={path}", "--words=horse", cwd=tmp_path)
    rows, ids = np.load(os.path.join(topics, "word2vec.npy")), Corpus(topics).tokenizer().ids
    assert np.array_equal(rows[ids[" ass"]], vectors[1]) and np.array_equal(rows[ids["Ass"]], vectors[1])
    assert f"{rows.any(1).sum()} of {len(rows)} vocabulary entries" in done.stdout and 8 <= rows.any(1).sum() <= 16
    done = run("data/word2vec.py", f"--data_dir={topics}", f"--vectors={path}", "--size=300", cwd=tmp_path, check=None)
    expect_sentence(done, "vectors of 7 dimensions", "remove --size=300")


class FakeSklearn:
    """Places and groups as sklearn's classes return them, for a test of the drawing."""

    def __init__(self, *args, **options):
        pass

    def fit_transform(self, vectors):
        return vectors[:, :2]

    def fit_predict(self, places):
        return np.arange(len(places)) % 30

    TSNE = KMeans = property(lambda self: FakeSklearn)


def test_words_are_drawn_whatever_backend_a_notebook_names(word2vec, monkeypatch, tmp_path):
    monkeypatch.setenv("MPLBACKEND", "module://nowhere")
    loaded = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "matplotlib"}
    for name in loaded:
        del sys.modules[name]  # it reads MPLBACKEND when it is imported
    monkeypatch.setattr(word2vec, "import_optional", lambda module: FakeSklearn())
    words, directions = [f"word{i}$" for i in range(40)], np.random.default_rng(0).normal(size=(40, 7))
    try:
        word2vec.draw_map(str(tmp_path / "a.png"), "title", words, directions, np.linspace(9, 22, 40), 30, 1)
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
            del sys.modules[name]
        sys.modules.update(loaded)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG") and os.environ["MPLBACKEND"] == "module://nowhere"


@pytest.mark.parametrize("absent", ["gensim", "sklearn"])
def test_without_the_libraries_a_sentence_names_what_to_install(topics, tmp_path, absent):
    (tmp_path / absent).mkdir()
    (tmp_path / absent / "__init__.py").write_text(
        f"raise ModuleNotFoundError('no', name={absent!r})", encoding="utf-8"
    )
    others = {"gensim": "", "sklearn": "" if importlib.util.find_spec("gensim") else "skip"}
    if others[absent]:
        pytest.skip("gensim is not installed, and would be missed first")
    done = run("data/word2vec.py", f"--data_dir={topics}", cwd=tmp_path, check=None, env={"PYTHONPATH": str(tmp_path)})
    expect_sentence(done, f"{absent} is not installed", "requirements-word2vec.txt")


def test_a_corpus_that_is_not_of_words_is_a_sentence(tiny_data, word2vec):
    with pytest.raises(ValueError, match="has char tokens.*--tokenizer=word"):
        word2vec.word_tokenizer(Corpus(tiny_data))
    with pytest.raises(UserError, match="--dataset=NAME"):
        word2vec.main([])


def test_pushed_apart_no_box_covers_another(word2vec):
    rng = np.random.default_rng(0)
    centres, extents = rng.uniform(0, 300, (60, 2)), rng.uniform([10, 5], [40, 12], (60, 2))
    centres[1] = centres[0]

    def n_covered(places):
        apart = np.abs(places[:, None] - places[None])
        covers = (apart < (extents[:, None] + extents[None]) / 2 - 1e-9).all(2)
        return (covers.sum() - len(places)) // 2

    assert n_covered(centres) > 10 and n_covered(word2vec.push_apart(centres, extents, 1000)) == 0
    limits = np.array([[-20, -20], [320, 320]])
    places = word2vec.push_apart(centres, extents, 1000, limits=limits)
    assert n_covered(places) == 0 and (places - extents / 2 >= -20).all() and (places + extents / 2 <= 320).all()
