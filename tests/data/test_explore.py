"""data/explore.py: the figures that it prints, against plain loops, and the picture."""

import importlib.util
import math
import os
from collections import Counter

import numpy as np
import pytest
from helpers import ROOT, generated_text, run

from configurator import UserError
from dongpt.text.documents import Texts
from dongpt.text.prepare import Vocabulary, prepare
from dongpt.text.tokenizers import CharTokenizer


@pytest.fixture(scope="module")
def explore():
    spec = importlib.util.spec_from_file_location("explore", os.path.join(ROOT, "data", "explore.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def documents(n: int) -> list[str]:
    return [f"{generated_text(30 + i % 7, seed=i)}number {i}.\n" for i in [*range(n - 5), *range(5)]]  # five twice


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_it_prints(tmp_path, explore, capsys, monkeypatch, kind):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **kwargs: None)  # drawn below
    texts = documents(60)
    prepare(str(tmp_path), Texts(texts), Vocabulary(kind, vocab_size=300))
    explore.main([f"--data_dir={tmp_path}"])
    printed = capsys.readouterr().out
    lengths = [len(text) for text in texts]
    assert (
        f"documents: 60, length in characters: median {np.median(lengths):,.0f}, mean {np.mean(lengths):,.0f}, "
        f"longest {max(lengths):,}" in printed
    )
    assert f"duplicates: {100 * 10 / 60:.2f} % of the documents" in printed
    assert "0.00 % of the documents of validation are in train" in printed
    assert "bpe 1,024:" in printed and "word:" in printed


@pytest.mark.smoke
def test_bytes_per_token_are_those_of_validation(explore):
    texts = {"train": generated_text(3000), "val": "señor giant\n" * 20}
    found = explore.bytes_per_token(texts, CharTokenizer.from_text(texts["train"] + texts["val"]))
    assert found["char of this data"] == pytest.approx(13 / 12)  # ñ has two bytes
    assert found["word"] == pytest.approx(13 / 3) and "char" not in found
    assert found["bpe 1,024"] > 2


@pytest.mark.smoke
def test_the_line_of_zipf_is_found(explore):
    slope, height = explore.fit_zipf(np.array([1000 / rank for rank in range(1, 200)]))
    assert slope == pytest.approx(-1, abs=1e-6) and height == pytest.approx(math.log(1000), abs=1e-6)


@pytest.mark.smoke
def test_drift_is_the_loss_of_the_frequencies(explore):
    train, val = Counter("aaabbc"), Counter("abbbb")
    counts = [np.array([side[c] for c in "abc"]) for side in (train, val)]
    at_home, away, expected, deviations = explore.unigram_drift(*counts)
    shares = {c: (train[c] + 1) / 9 for c in "abc"}
    assert at_home == pytest.approx(-sum(math.log(shares[c]) for c in train.elements()) / 6)
    assert away == pytest.approx(-sum(math.log(shares[c]) for c in val.elements()) / 5)
    assert expected[1] == pytest.approx(5 * 3 / 9)
    assert deviations[1] == pytest.approx((4 - 5 * 3 / 9) / math.sqrt(5 * 3 / 9))


def test_it_draws_whatever_backend_a_notebook_names(tmp_path):
    prepare(str(tmp_path), Texts(documents(30)), Vocabulary("char"))
    args = [f"--data_dir={tmp_path}", "--most_tokens=500"]
    done = run("data/explore.py", *args, cwd=tmp_path, env={"MPLBACKEND": "nonsense"})
    assert "drawn to" in done.stdout and (tmp_path / "explore.png").read_bytes().startswith(b"\x89PNG")


def test_it_wants_to_know_which_data(explore):
    for args, part in (([], "--dataset=NAME"), (["--data_dir=nowhere"], "nowhere.*train.bin")):
        with pytest.raises(UserError, match=part):
            explore.main(args)
