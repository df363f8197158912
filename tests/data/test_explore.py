"""data/explore.py: its statistics, compared with plain loops, and the picture."""

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


LEGENDS = {"Zipf's law": 2, "Length of documents": 1, "Training and validation sets": 2}
TEXTS = {
    "a few words": "one two\nthree\n" * 10,
    "English": generated_text(3000),
    "other alphabets": "señor 你好,世界 😀 $x^2$ \x07 windmill\n\n" * 200,
    "long words": "".join(f"{'windmill' * 9}{i % 300} giant\n" for i in range(4000)),
}


@pytest.mark.parametrize(
    "kind, text", [("char", "a few words"), ("char", "long words"), ("word", "English"), ("bpe", "other alphabets")]
)
def test_no_text_of_the_picture_is_clipped_or_overlaps_another(tmp_path, explore, monkeypatch, recwarn, kind, text):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *args, **kwargs: figures.append(figure))
    prepare(str(tmp_path), Texts([TEXTS[text]]), Vocabulary(kind, vocab_size=300))
    explore.main([f"--data_dir={tmp_path}"])
    (figure,) = figures
    figure.draw_without_rendering()
    assert not [str(warning.message) for warning in recwarn if "Glyph" in str(warning.message)]
    width, height = figure.bbox.size
    for axis in figure.axes:
        labels = [axis.title, axis._left_title, axis.xaxis.label, axis.yaxis.label, figure._suptitle, *axis.texts]
        for ticks, limits in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
            inside = sorted(limits)[0], sorted(limits)[1]
            labels += [t.label1 for t in ticks.get_major_ticks() if inside[0] <= t.get_loc() <= inside[1]]
        boxes = [label.get_window_extent() for label in labels if label.get_text()]
        assert all(0 <= box.x0 and box.x1 <= width and 0 <= box.y0 and box.y1 <= height for box in boxes)
        bars = [label.get_window_extent() for label in axis.get_xticklabels() if label.get_rotation() == 90]
        assert all(left.x1 <= right.x0 + 1 for left, right in zip(bars, bars[1:]))
    captions = [axis.xaxis.label.get_window_extent() for axis in figure.axes]
    assert not any(a.overlaps(b) for i, a in enumerate(captions) for b in captions[:i])


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_panels_differ_and_have_captions_and_legends(tmp_path, explore, monkeypatch, capsys, kind):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *args, **kwargs: figures.append(figure))
    prepare(str(tmp_path), Texts(documents(60)), Vocabulary(kind, vocab_size=300))
    explore.main([f"--data_dir={tmp_path}"])
    printed = capsys.readouterr().out
    axes = {axis.get_title(loc="left"): axis for axis in figures[0].axes}
    second = "Frequent words" if kind == "char" else "Frequent tokens"
    assert [*axes][:3] == ["Frequent characters", second, "Zipf's law"] and len(axes) == 6
    bars = [[bar.get_height() for bar in axes[title].patches] for title in ("Frequent characters", second)]
    assert bars[0] != bars[1]
    for title, axis in axes.items():
        caption = " ".join(axis.get_xlabel().partition("\n\n")[2].replace("\u00a0", " ").split())
        assert caption.endswith(".") and f"{title}: " in printed
        assert caption in " ".join(printed.split())
        texts = [text.get_text() for text in axis.get_legend().get_texts()] if axis.get_legend() else []
        assert len(texts) == LEGENDS.get(title, 0)


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_it_prints(tmp_path, explore, capsys, monkeypatch, kind):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **kwargs: None)  # drawn below
    texts = documents(60)
    prepare(str(tmp_path), Texts(texts), Vocabulary(kind, vocab_size=300))
    explore.main([f"--data_dir={tmp_path}"])
    printed = capsys.readouterr().out
    lengths = [len(text) for text in texts]
    assert f"60 documents, with {np.mean(lengths):,.0f} characters on average and {max(lengths):,} at most." in printed
    assert f"{100 * 10 / 60:.3g}% of the documents are duplicates" in printed
    assert "0% of the documents in the validation set are also in the training set" in printed
    symbol, count = Counter("".join(texts)).most_common(1)[0]
    assert f"{symbol!r} {100 * count / sum(lengths):.1f}%" in printed
    assert "tokens represent" in printed or "at least as many as with the other" in printed


@pytest.mark.smoke
def test_bytes_per_token_are_those_of_validation(explore):
    texts = {"train": generated_text(3000), "val": "señor giant\n" * 20}
    found = explore.bytes_per_token(texts, CharTokenizer.from_text(texts["train"] + texts["val"]))
    assert found["this data's char"] == pytest.approx(13 / 12)  # ñ has two bytes
    assert found["word"] == pytest.approx(13 / 3) and "char" not in found
    (bpe,) = (name for name in found if name.startswith("bpe"))  # this text has too few words for 1,024 tokens
    assert found[bpe] > 2


@pytest.mark.smoke
def test_no_tokenizer_is_drawn_twice(tmp_path, explore, monkeypatch):
    """A data set of words had two bars of the same length, "this data's word" and "word"."""
    text = generated_text(3000)
    monkeypatch.setattr(explore, "GPT2Tokenizer", lambda: CharTokenizer.from_text(text))  # needs no download

    def bytes_per_token(kind: str, **settings) -> dict[str, float]:
        prepared = prepare(str(tmp_path), Texts([text]), Vocabulary(kind, **settings), quiet=True)
        return explore.bytes_per_token({"train": text, "val": text}, prepared.tokenizer)

    assert "word" not in bytes_per_token("word") | bytes_per_token("word", lower=True)
    spaced = bytes_per_token("word", spaces_alone=True)
    assert spaced["this data's word"] < spaced["word"]
    n_bpe = [sum(name.startswith("bpe") for name in bytes_per_token("bpe", vocab_size=size)) for size in (280, 4096)]
    assert n_bpe == [1, 0]  # 1,024 and 4,096 give the same tokens


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
    assert "picture: " in done.stdout and (tmp_path / "explore.png").read_bytes().startswith(b"\x89PNG")


def test_it_wants_to_know_which_data(explore):
    for args, part in (
        ([], "--dataset=NAME"),
        (["--data_dir=nowhere"], "nowhere.*train.bin"),
        (["don_chr"], "did you mean don_char"),
        (["a", "b"], "too many paths"),
        (["a", "--dataset=b"], "a and --dataset=b both name a dataset: remove one"),
    ):
        with pytest.raises(UserError, match=part):
            explore.main(args)
