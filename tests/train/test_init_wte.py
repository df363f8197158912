"""Word vectors: files of them, tables for a vocabulary, and models that start with them."""

import bz2
import gzip
import io
import lzma
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from helpers import TINY_RUN, assert_same_training, generated_text, load, refusal, run_ranks

import train
from configurator import UserError
from dongpt.text.documents import Texts
from dongpt.text.prepare import Vocabulary, prepare
from dongpt.text.tokenizers import WordTokenizer
from dongpt.train import init_wte as vectors
from dongpt.train.data import Corpus
from dongpt.train.init_wte import (
    all_spellings,
    fit_width,
    init_embedding,
    load_table,
    read_vectors,
    save_table,
    spellings,
    vector_table,
)
from dongpt.train.optim import make_optimizer
from model import GPT, GPTConfig

WORDS = ["the", "knight", "Mancha", "señor", "windmill"]
WIDTH = 7


def numbers(n: int = len(WORDS), width: int = WIDTH, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)


def as_text(rows, words=WORDS, header: str | None = None) -> bytes:
    """word2vec's text by hand; header="" for GloVe's."""
    header = f"{len(rows)} {len(rows[0])}\n" if header is None else header
    return (
        header + "".join(f"{word} {' '.join(map(repr, map(float, row)))}\n" for word, row in zip(words, rows))
    ).encode("utf-8")


def as_binary(rows, words=WORDS, header: str | None = None, end: bytes = b"\n") -> bytes:
    """word2vec's binary by hand, as distance.c reads it."""
    header = f"{len(rows)} {len(rows[0])}\n" if header is None else header
    return header.encode() + b"".join(
        word.encode("utf-8") + b" " + struct.pack(f"<{len(row)}f", *row) + end for word, row in zip(words, rows)
    )


@pytest.fixture
def file(tmp_path):
    """A function that writes bytes to a file and returns its path."""

    def write(content: bytes, name: str = "vectors") -> str:
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    return write


# ----------------------------------------------------------------------------------------------------------------------
# files of vectors


LAYOUTS = {
    "text": as_text,
    "text with line ends of Windows": lambda rows: as_text(rows).replace(b"\n", b"\r\n"),
    "text with spaces at line ends": lambda rows: as_text(rows).replace(b"\n", b" \n"),
    "text without the last line end": lambda rows: as_text(rows)[:-1],
    "glove": lambda rows: as_text(rows, header=""),
    "binary": as_binary,
    "binary without line ends": lambda rows: as_binary(rows, end=b""),
}


def make_zip(members: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return content.getvalue()


PACKS = {"plain": bytes, "gzip": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
PACKS |= {"zip": lambda content: make_zip({"readme.md": b"no vectors", "vectors.bin": content})}
PACKS |= {"zst": lambda content: pytest.importorskip("backports.zstd").compress(content)}


@pytest.mark.smoke
@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_vectors_that_were_written(file, layout, pack):
    """The name of the file says nothing of what is in it."""
    path = file(PACKS[pack](LAYOUTS[layout](numbers())))
    found = read_vectors(path, {*WORDS, "dragon"})
    assert set(found) == set(WORDS)
    for word, row in zip(WORDS, numbers()):
        assert found[word].dtype == np.float32 and np.array_equal(found[word], row), word


@pytest.mark.parametrize("binary", [False, True])
def test_gensims_own_files_are_read(tmp_path, binary):
    gensim = pytest.importorskip("gensim.models", reason="gensim is not installed")
    theirs = gensim.KeyedVectors(WIDTH)
    theirs.add_vectors(WORDS, numbers())
    theirs.save_word2vec_format(str(tmp_path / "theirs"), binary=binary)
    found = read_vectors(str(tmp_path / "theirs"), set(WORDS))
    again = gensim.KeyedVectors.load_word2vec_format(str(tmp_path / "theirs"), binary=binary)
    assert all(np.array_equal(found[word], again[word]) for word in WORDS) and len(found) == len(WORDS)


@pytest.mark.smoke
@pytest.mark.parametrize("write", [as_text, as_binary])
def test_only_wanted_words_are_kept_and_pieces_do_not_matter(file, write, monkeypatch):
    rows, words = numbers(500, seed=1), [f"word{i}" for i in range(500)]
    path = file(write(rows, words))
    for piece in (1, 13, vectors.CHUNK_BYTES):
        monkeypatch.setattr(vectors, "CHUNK_BYTES", piece)
        found = read_vectors(path, {"word3", "word499"})
        assert set(found) == {"word3", "word499"} and np.array_equal(found["word499"], rows[499])


def test_a_large_file_takes_no_memory_that_grows_with_it(file):
    import tracemalloc

    rows, words = numbers(20_000, 128), [f"word{i}" for i in range(20_000)]
    path = file(gzip.compress(as_binary(rows, words), 1))
    tracemalloc.start()
    read_vectors(path, {"word19999"})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < rows.nbytes  # 10 MB


def test_the_first_of_several_vectors_of_a_word_counts(file):
    found = read_vectors(file(as_text(numbers(), ["a", "b", "a", "b", "a"])), {"a", "b"})
    assert np.array_equal(found["a"], numbers()[0]) and np.array_equal(found["b"], numbers()[1])


def test_gloves_words_with_spaces_are_words(file):
    found = read_vectors(
        file(as_text(numbers(), ["the", ". . .", "at name", "knight", "x"], header="")), {"knight", ". . ."}
    )
    assert np.array_equal(found["knight"], numbers()[3]) and np.array_equal(found[". . ."], numbers()[1])


def with_number(value: float) -> np.ndarray:
    rows = numbers()
    rows[1, 2] = value
    return rows


TEXT, BINARY = as_text(numbers()), as_binary(numbers())
LINES = TEXT.split(b"\n")
DAMAGED = {
    "a row of text too few": (
        as_text(numbers(), header=f"6 {WIDTH}\n"),
        "header specifies 6 vectors, but the file has 5",
    ),
    "a row of text too many": (
        as_text(numbers(), header=f"4 {WIDTH}\n"),
        "header specifies 4 vectors, but the file has 5",
    ),
    "many rows promised": (as_text(numbers(), header=f"99999999999 {WIDTH}\n"), "but the file has 5"),
    "a binary row too few": (
        as_binary(numbers(), header=f"6 {WIDTH}\n"),
        "header specifies 6 vectors, but the file has 5",
    ),
    "a binary row too many": (
        as_binary(numbers(), header=f"4 {WIDTH}\n"),
        "header specifies 4 vectors, but the file has more",
    ),
    "binary cut in a vector": (BINARY[:-9], "vector 5 of 5 is truncated"),
    "binary cut in a word": (BINARY[: -4 * WIDTH - 5], "truncated"),
    "binary of another width": (as_binary(numbers(), header=f"5 {WIDTH + 1}\n"), ""),
    "text of greater width": (as_text(numbers(), header=f"5 {WIDTH + 1}\n"), f"vectors of {WIDTH + 1} numbers, but"),
    "text of smaller width": (as_text(numbers(), header=f"5 {WIDTH - 1}\n"), f"specifies ({WIDTH - 1})"),
    "text cut in a row": (TEXT[:-30], "vector 5 has length 6 instead of 7"),
    "sparse rows": (b"5 7\n" + b"".join(b"%s 1:0.5 7:-0.3\n" % w.encode() for w in WORDS), "such as 'the 1:0.5 7:"),
    "short rows": (b"5 7\n" + b"".join(b"%s 0.5 -0.3\n" % w.encode() for w in WORDS), "such as 'the 0.5 -0.3'"),
    "short rows of the words": (
        as_text(numbers(20), [f"word{i}" for i in range(20)], header=f"25 {WIDTH}\n")
        + b"".join(b"%s 0.5 -0.3\n" % word.encode() for word in WORDS),
        "row 21 for 'the' has length 2 instead of 7",
    ),
    "one long line": (TEXT + b"x" * (vectors.MAX_LINE_BYTES + 9), "vector 6 takes more than"),
    "numbers of another format": (as_text(numbers() * 1e6), "contains numbers beyond 10,000"),
    "binary NaN": (as_binary(with_number(np.nan)), "'knight' contains non-finite numbers"),
    "infinity": (as_binary(with_number(-np.inf)), "non-finite"),
    "no common word": (as_text(numbers(), [f"word{i}" for i in range(5)]), "no vectors for words in"),
    "header of zeros": (as_text(numbers(), header="0 0\n"), "invalid first line, '0 0'"),
    "header of a giant": (as_text(numbers(), header="5 99999999\n"), "invalid first line, '5 99999999'"),
    "prose": (b"In a village of La Mancha, the name of which\nI have no desire\n", "neither a header nor"),
    "empty": (b"", "neither a header nor"),
    "noise": (bytes(range(1, 256)) * 999, "neither a header nor"),
    "gzip cut off": (gzip.compress(TEXT)[:-40], "cannot be decompressed (it ends early)"),
    "xz cut off": (lzma.compress(TEXT)[:-40], "cannot be decompressed (it ends early)"),
    "bz2 cut off": (bz2.compress(TEXT)[:-40], "cannot be decompressed (it ends early)"),
    **{
        f"a second stream of {name} that is damaged": (pack(TEXT) + pack(TEXT)[:20], "cannot be decompressed")
        for name, pack in {"gzip": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}.items()
    },
    "bytes after bz2": (bz2.compress(TEXT) + b"more", "cannot be decompressed"),
    "a web page": (b"<!DOCTYPE html>\n<title>Not found</title>", "neither a header nor"),
    "an archive of other files": (make_zip({"photo.png": b""}), "contains no files"),
    "several files": (make_zip({"b.vec": TEXT, "a.txt": TEXT}), "several files (a.txt, b.vec): unpack it"),
    "gzip of noise": (b"\x1f\x8b" + b"noise" * 9, "cannot be decompressed"),
}


@pytest.mark.smoke
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_a_sentence(file, damage):
    content, part = DAMAGED[damage]
    with pytest.raises(ValueError) as error:
        read_vectors(path := file(content), set(WORDS))
    assert path in str(error.value) and part in str(error.value) and "\n" not in str(error.value)
    assert isinstance(error.value, UserError)


ODD_WORDS = [" ", "\t", "10 000", "No. 1", "x nan", "", "new york", "\u00a0", "a\u2028b", "</s>", "1 2", "inf"]


@pytest.mark.smoke
@pytest.mark.parametrize("first", [False, True], ids=["odd rows last", "odd rows first"])
@pytest.mark.parametrize("layout", ["text", "text with line ends of Windows", "text with spaces at line ends", "glove"])
def test_odd_rows_of_other_words_do_not_matter(file, capsys, layout, first):
    """Published files have words that are a space, or that look like numbers."""
    names = [*(ODD_WORDS if first else []), *(f"word{i}" for i in range(20)), *WORDS, *ODD_WORDS]
    rows = numbers(len(names))
    content = as_text(rows, names, header="" if layout == "glove" else None)
    content = content.replace(b"\n", {"text with line ends of Windows": b"\r\n"}.get(layout, b"\n"))
    content = content.replace(b"\n", b" \n") if "spaces" in layout else content
    found = read_vectors(file(content), {*WORDS, "new", "10", "x", "No.", "york", "nan"})
    assert set(found) == set(WORDS) and capsys.readouterr().out == ""
    assert all(np.array_equal(found[word], rows[names.index(word)]) for word in WORDS)
    assert np.array_equal(read_vectors(file(content), {"new york"})["new york"], rows[names.index("new york")])


def test_rows_separated_by_tabs_or_several_spaces_are_read(file):
    for separator in (b"\t", b"  "):
        for content in (as_text(numbers()), as_text(numbers(), header="")):
            lines = [line.split(b" ", 1) for line in content.splitlines(True)]
            for mixed in (content.replace(b" ", separator), b"".join(separator.join(line) for line in lines)):
                found = read_vectors(file(mixed), set(WORDS))
                assert all(np.array_equal(found[word], row) for word, row in zip(WORDS, numbers()))
    found = read_vectors(file(TEXT.replace(b"knight ", b"knight  ")), set(WORDS))
    assert np.array_equal(found["knight"], numbers()[1])
    for header in (None, ""):
        content = as_text(numbers(), ["new~york", *WORDS[1:]], header)
        lines = [line.replace(b" ", b"\t", b"." in line).replace(b"~", b" ") for line in content.splitlines(True)]
        assert np.array_equal(read_vectors(file(b"".join(lines)), {"new york"})["new york"], numbers()[0])


@pytest.mark.smoke
def test_bad_rows_are_not_judged_unless_their_words_are_needed_and_then_counted(file, capsys):
    lines = [*LINES[:2], b"dragon 0.5 x", b"", b"knight 0.5" + b" x" * (WIDTH - 1), b"Mancha 0.5", *LINES[3:]]
    lines[0] = b"7 %d" % WIDTH
    found = read_vectors(path := file(b"\n".join(lines)), set(WORDS))
    printed = capsys.readouterr().out
    assert set(found) == {"the", "Mancha", "señor", "windmill"} and np.array_equal(found["Mancha"], numbers()[2])
    assert printed.startswith(
        f"{path}: skipped 2 unusable rows: row 3 for 'knight' contains a value that is not a number"
    )
    assert "row 4 for 'Mancha' has length 1 instead of 7" in printed
    assert set(read_vectors(file(as_text(with_number(np.nan))), set(WORDS))) == {*WORDS} - {"knight"}
    assert "skipped 1 unusable rows: row 2 for 'knight' contains non-finite numbers" in capsys.readouterr().out


@pytest.mark.parametrize("header", [None, ""])
def test_rows_with_too_many_values_are_counted(file, capsys, header):
    lines = as_text(numbers(), header=header).splitlines()
    for addition, problem in ((b" 0.25", "has length 8 instead of 7"), (b" # note", "a value that is not a number")):
        content = b"\n".join([*lines[:-1], lines[-1] + addition, b""])
        assert set(read_vectors(file(content), {*WORDS})) == {*WORDS[:-1]}
        printed = capsys.readouterr().out
        assert "skipped 1 unusable rows" in printed and f"for 'windmill' {problem}" in printed.replace("contains ", "")


def test_a_last_row_without_a_line_end_is_counted_unless_the_header_says_that_it_is_the_last(file, capsys):
    content = as_text(numbers(), header="")[:-3]  # within the last number
    assert set(read_vectors(file(content), {*WORDS})) == {*WORDS[:-1]}
    assert "1 unusable rows: row 5 for 'windmill' has no line end, so it may be cut off" in capsys.readouterr().out
    assert set(read_vectors(file(TEXT[:-1]), {*WORDS})) == {*WORDS} and not capsys.readouterr().out


def test_a_text_file_that_is_not_utf8_is_rejected(file, capsys):
    for header in (None, ""):
        content = as_text(numbers(), header=header)
        with pytest.raises(UserError, match="of the first 1 words with characters beyond ASCII are not UTF-8"):
            read_vectors(file(content.decode().encode("cp1252")), {*WORDS})
        cut = content.replace(b"windmill", b"\xc3\xa9t\xc3")  # by a program that limits words to some bytes
        assert set(read_vectors(file(cut), {*WORDS})) == {*WORDS[:-1]}


def test_repeated_words_are_counted(file, capsys):
    read_vectors(file(as_text(numbers(), ["a", "b", "a", "c", "a"])), {"a", "b"})
    assert "skipped 2 rows that repeat a word" in capsys.readouterr().out


@pytest.mark.smoke
def test_phrases_in_a_binary_file_are_read_right_or_rejected(file):
    names = ["the", "new york", "new", "a b c d", "knight", "hot dog"]
    rows = numbers(6, 50)
    found = read_vectors(file(as_binary(rows, names)), {"new", "york", "knight", "new york", "hot"})
    assert set(found) == {"new", "knight", "new york"}
    assert all(np.array_equal(found[word], rows[names.index(word)]) for word in found)
    order = names[1:] + names[:1]
    found = read_vectors(file(as_binary(rows, order)), {*order})
    assert set(found) == {*order} and all(np.array_equal(found[word], row) for word, row in zip(order, rows))
    for words in ({"new"}, {"knight"}, {"hot"}, {"the"}):  # nothing shows where vectors end
        with pytest.raises(UserError, match="damaged"):
            read_vectors(file(as_binary(rows, names, end=b"")), words)


def test_rows_shifted_by_a_word_with_a_space_are_never_lost_silently(file):
    """Without line ends, "vitamin c" takes the place of "vitamin", and the next word may become "L=dog"."""
    names = ["w0", "w1", "w2", "vitamin c", "dog", "the", "a"]
    for seed in range(100):
        content = as_binary(numbers(7, 16, seed), names, end=b"")
        with pytest.raises(UserError, match="damaged.*text format if words contain spaces"):
            read_vectors(file(content), {"dog", "the", "a"})


@pytest.mark.parametrize("value", [2e30, -2e30, np.inf, np.nan])
@pytest.mark.parametrize("n_checked", [1, 2, 256])
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_rows_of_other_words_are_only_checked_for_signs_of_a_shift(file, monkeypatch, value, n_checked, end):
    monkeypatch.setattr(vectors, "NUM_CHECKED_ROWS", n_checked)
    path = file(as_binary(with_number(value), end=end))
    with pytest.raises(UserError, match="row 2 for 'knight' contains n"):
        read_vectors(path, {"the", "knight"})
    if end or not np.isfinite(value):
        assert set(read_vectors(path, {"the", "windmill"})) == {"the", "windmill"}
    else:
        with pytest.raises(UserError, match="row 2 for 'knight' contains n"):
            read_vectors(path, {"the", "windmill"})


@pytest.mark.smoke
@pytest.mark.parametrize("word", [b"a\x01b", b"\xff\xfe", b"a\nb", b"\xc3"])
def test_binary_words_with_control_characters_or_invalid_utf8_are_rejected(file, word):
    content = as_binary(numbers()).replace(b"windmill", word)
    with pytest.raises(UserError, match="vector 5 has control characters or is not UTF-8"):
        read_vectors(file(content), {"the"})


def test_a_long_word_that_word2vec_cut_within_a_character_is_no_error(file):
    content = as_binary(numbers()).replace(b"windmill", ("é" * 50).encode()[:-1])
    assert np.array_equal(read_vectors(file(content), {"the"})["the"], numbers()[0])


def test_a_file_that_was_shortened_says_so_and_how_to_mend_it(file):
    with pytest.raises(UserError, match="specifies 2,000,000 vectors, but the file has 5.*correct its first line"):
        read_vectors(file(as_text(numbers(), header=f"2000000 {WIDTH}\n")), set(WORDS))


@pytest.mark.smoke
def test_words_in_the_other_normal_form_are_found(file):
    for ours, theirs in (("señor", "sen\u0303or"), ("sen\u0303or", "señor")):
        tokenizer = WordTokenizer(["the", f" {ours}"])
        found = read_vectors(file(as_text(numbers(2), ["the", theirs])), all_spellings(tokenizer))
        assert np.array_equal(vector_table(tokenizer, found)[1], numbers(2)[1])
    both = {"señor": numbers()[0], "sen\u0303or": numbers()[1]}  # its own form goes first
    assert np.array_equal(vector_table(WordTokenizer(["sen\u0303or"]), both)[0], numbers()[1])


def test_a_byte_order_mark_is_no_part_of_the_first_word(file):
    for header in (None, ""):
        assert set(read_vectors(file(b"\xef\xbb\xbf" + as_text(numbers(), header=header)), {"the"})) == {"the"}


@pytest.mark.smoke
def test_a_file_that_is_not_there_or_our_own_is_a_sentence(tmp_path):
    for path in (str(tmp_path / "nowhere"), str(tmp_path), str(tmp_path / "word2vec.npy")):
        with pytest.raises(ValueError, match=os.path.basename(path)):
            read_vectors(path, {"the"})


# ----------------------------------------------------------------------------------------------------------------------
# rows for a vocabulary


@pytest.mark.smoke
def test_spellings_of_a_word_share_a_vector_and_its_own_goes_first():
    tokenizer = WordTokenizer(["\n", " ", " Food", " food", "food", " Knight", "KNIGHT", " knight", " unheard", ","])
    found = {"food": numbers()[0], "Knight": numbers()[1], "knight": numbers()[2], ",": numbers()[3]}
    rows = vector_table(tokenizer, found)
    assert rows.shape == (tokenizer.vocab_size, WIDTH) and rows.dtype == np.float32
    of = {word: rows[i] for word, i in tokenizer.ids.items()}
    for word in (" Food", " food", "food"):
        assert np.array_equal(of[word], numbers()[0])
    assert np.array_equal(of[" Knight"], numbers()[1])
    assert np.array_equal(of[" knight"], numbers()[2]) and np.array_equal(of["KNIGHT"], numbers()[2])
    assert np.array_equal(of[","], numbers()[3])
    assert not of["\n"].any() and not of[" "].any() and not of[" unheard"].any() and not rows[-1].any()  # <unk>
    assert spellings(" ") == [] and {"food", "Food", "FOOD", ","} <= all_spellings(tokenizer)


@pytest.mark.smoke
def test_fitted_vectors_keep_their_geometry_and_have_the_deviation_of_gpt2():
    rows = numbers(200, 16) * 3 + 5
    mine = fit_width(rows, 16)
    assert mine.dtype == np.float32 and mine.std() == pytest.approx(0.02, rel=1e-3)
    assert np.abs(mine.mean(0)).max() < 1e-6
    centred = rows - rows.mean(0)
    assert np.allclose(mine / mine.std(), centred / centred.std(), atol=1e-4)


def test_wider_vectors_are_projected_on_their_principal_components():
    """Rows that lie in 5 of 30 dimensions lose nothing by a projection on 5; on 3 they lose what svd says."""
    rows = numbers(300, 5) * [5, 4, 3, 2, 1] @ numbers(5, 30, seed=1)
    centred = rows - rows.mean(0)
    for width in (5, 3):
        mine = fit_width(rows, width).astype(np.float64)
        assert mine.shape == (300, width) and np.sqrt((mine**2).mean()) == pytest.approx(0.02, rel=1e-3)
        u, s, _ = np.linalg.svd(centred, full_matrices=False)
        best = (u[:, :width] * s[:width]) @ (u[:, :width] * s[:width]).T  # products between words, as near as can be
        assert np.allclose(mine @ mine.T / np.trace(mine @ mine.T), best / np.trace(best), atol=1e-6)


@pytest.mark.smoke
def test_an_embedding_begins_with_the_vectors_and_says_how_many(tmp_path):
    rows = numbers(6)
    rows[[2, 4]] = 0
    save_table(path := str(tmp_path / "w.npy"), rows)
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(9, WIDTH))  # a padded vocabulary
    before = weight.detach().clone()
    line = init_embedding(weight, path, 6)
    has = [0, 1, 3, 5]
    assert torch.equal(weight[has], torch.from_numpy(fit_width(rows[has], WIDTH)))
    rest = [2, 4, 6, 7, 8]
    assert torch.equal(weight[rest], before[rest])
    assert "4 words start from their vectors, and 2 from random values" in line and "projected" not in line
    line = init_embedding(torch.nn.Parameter(torch.zeros(6, 3)), path, 6)
    assert f"projected from {WIDTH} numbers onto their first 3 principal components" in line


def pickled_npy() -> bytes:
    import io

    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def npy(array) -> bytes:
    import io

    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def promising(shape: str) -> bytes:
    """A .npy file of 6 rows whose header speaks of another shape, by hand."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + numbers(6).tobytes()


BAD_ROWS = {
    "a pickle": (pickle.dumps([1, 2]), "not a .npy file"),
    "objects": (pickled_npy(), "not a .npy file"),
    "a text": (b"5 7\nthe 1 2 3\n", "not a .npy file"),
    "empty": (b"", "not a .npy file"),
    "cut off": (npy(numbers(6))[:-4], "not a .npy file"),
    "promises more": (promising("(60000000000, 7)"), "not a .npy file"),
    "one dimension": (npy(np.ones(6)), "one row of numbers per word"),
    "whole numbers": (npy(np.ones((6, WIDTH), np.int64)), "one row of numbers per word"),
    "no width": (npy(np.ones((6, 0))), "one row of numbers per word"),
    "other data": (npy(numbers(5)), "has 5 rows, but the vocabulary has 6"),
    "NaN": (npy(np.full((6, WIDTH), np.nan)), "non-finite"),
}


@pytest.mark.smoke
@pytest.mark.parametrize("case", BAD_ROWS)
def test_rows_that_cannot_be_used_are_a_sentence(file, case):
    content, part = BAD_ROWS[case]
    with pytest.raises(ValueError) as error:
        load_table(file(content, "rows.npy"), 6)
    assert "rows.npy" in str(error.value) and part in str(error.value) and "data/word2vec.py" in str(error.value)


@pytest.mark.smoke
def test_rows_come_back(tmp_path, file):
    save_table(path := str(tmp_path / "w.npy"), numbers(6))
    for path in (path, file(promising("(6, 7)"), "by hand.npy"), file(npy(numbers(6).astype(np.float64)), "64.npy")):
        rows = load_table(path, 6)
        assert np.array_equal(rows, numbers(6)) and rows.dtype == np.float32


@pytest.mark.smoke
def test_narrow_and_empty_vectors_are_refused(tmp_path):
    save_table(path := str(tmp_path / "w.npy"), numbers(6))
    with pytest.raises(ValueError, match=f"vectors of {WIDTH} numbers, fewer than n_embd=16.*--size=16"):
        init_embedding(torch.zeros(6, 16), path, 6)
    save_table(path, np.zeros((6, 16), np.float32))
    with pytest.raises(ValueError, match="no vectors for any words"):
        init_embedding(torch.zeros(6, 16), path, 6)
    with pytest.raises(ValueError, match="nowhere.npy was not found"):
        init_embedding(torch.zeros(6, 16), str(tmp_path / "nowhere.npy"), 6)


# ----------------------------------------------------------------------------------------------------------------------
# training


@pytest.fixture(scope="module")
def words_data(tmp_path_factory) -> str:
    """A folder with a small corpus of words, and vectors for it."""
    folder = str(tmp_path_factory.mktemp("words"))
    tokenizer = prepare(folder, Texts([generated_text()]), Vocabulary("word")).tokenizer
    known = {
        name: row
        for name, row in zip(sorted(all_spellings(tokenizer) - {"knight", "Knight", "KNIGHT"}), numbers(99, 24))
    }
    save_table(os.path.join(folder, "word2vec.npy"), vector_table(tokenizer, known))
    return folder


@pytest.fixture
def begin(words_data, in_a_folder_of_its_own):
    """A function that trains on the words, beginning with their vectors."""

    def training(*args: str) -> int:
        return train.main(
            [
                f"--data_dir={words_data}",
                *TINY_RUN,
                "--tie_weights=False",
                f"--init_wte={words_data}/word2vec.npy",
                *args,
            ]
        )

    return training


def wte(out_dir: str = "out") -> torch.Tensor:
    return load(out_dir)["model"]["transformer.wte.weight"]


def beginning(words_data: str, **settings) -> torch.Tensor:
    """The token embedding before the first update, made without train.py."""
    from dongpt.runtime import seed_everything

    seed_everything(1337)
    V = Corpus(words_data).vocab_size
    model = GPT(
        GPTConfig(
            **{
                **dict(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=V, bias=False, tie_weights=False),
                **settings,
            }
        )
    )
    rows = np.load(os.path.join(words_data, "word2vec.npy"))
    weight = model.transformer.wte.weight.detach().clone()
    weight[torch.from_numpy(rows.any(1))] = torch.from_numpy(fit_width(rows[rows.any(1)], 16))
    return weight


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": "muon", "ngrams": 3},
        {"grad_clip": 0, "weight_decay": 0.5},
        {"dtype": "bfloat16", "pos_embd": "relative"},
        {"dtype": "float16"},
        pytest.param({"compile": True}, marks=pytest.mark.compile),
    ],
)
def test_a_frozen_embedding_stays_bit_for_bit_and_moves_afterwards(begin, words_data, settings):
    args = [f"--{key}={value}" for key, value in settings.items()]
    try:
        begin("--freeze_wte=6", *args)
    except ValueError as error:
        if "float16" not in str(error):
            raise
        pytest.skip(str(error))  # not every processor has it
    frozen = wte()
    of_model = {key: value for key, value in settings.items() if key in ("ngrams", "pos_embd")}
    assert torch.equal(frozen, beginning(words_data, **of_model))
    begin("--freeze_wte=5", "--out_dir=five", *args)
    assert not torch.equal(wte("five"), frozen)


def test_the_vectors_move_at_once_unless_frozen_and_words_without_one_are_counted(begin, words_data, capsys):
    begin("--max_iters=1")
    has = np.load(os.path.join(words_data, "word2vec.npy")).any(1)
    assert 0 < has.sum() < len(has)
    assert (
        f"{has.sum():,} words start from their vectors (projected from 24 numbers onto their first 16 principal "
        f"components), and {(~has).sum():,} from random values" in capsys.readouterr().out
    )
    moved = (wte() - beginning(words_data)).abs().max()
    assert 0 < moved < 0.1


def test_freezing_takes_the_head_along_where_weights_are_tied(begin, words_data):
    begin("--freeze_wte=6", "--tie_weights=True")
    weights = load("out")["model"]
    assert torch.equal(weights["lm_head.weight"], beginning(words_data, tie_weights=True))


def test_two_processes_freeze_as_one_does(in_a_folder_of_its_own, tmp_path, words_data):
    args = [f"--data_dir={words_data}", *TINY_RUN, "--tie_weights=False", f"--init_wte={words_data}/word2vec.npy"]
    args += ["--freeze_wte=6", "--max_iters=7", "--dropout=0", "--decay_lr=False"]
    run_ranks("train.py", *args, "--out_dir=two", cwd=tmp_path)
    assert train.main([*args, "--out_dir=one"]) == 0
    moved = wte("one") - beginning(words_data)  # by the seventh update alone
    assert 0 < moved.abs().max() < 0.02 and (wte("two") - wte("one")).norm() < 0.01 * moved.norm()


def test_a_frozen_embedding_has_no_part_in_the_norm_of_the_gradient(words_data):
    """One update by hand, of a model whose embedding takes no gradient, is what TrainStep makes of it."""
    from dongpt import runtime
    from dongpt.train.step import TrainStep

    results = []
    for by_hand in (True, False):
        corpus = Corpus(words_data)
        cfg = train.TrainConfig(
            n_layer=1,
            n_head=2,
            n_embd=16,
            block_size=16,
            batch_size=4,
            tie_weights=False,
            gradient_accumulation_steps=1,
            freeze_wte=0 if by_hand else 1,
            grad_clip=1e-3,
        )
        torch.manual_seed(0)
        model = GPT(
            GPTConfig(
                n_layer=1,
                n_head=2,
                n_embd=16,
                block_size=16,
                vocab_size=corpus.vocab_size,
                bias=False,
                tie_weights=False,
            )
        )
        model.transformer.wte.weight.requires_grad = not by_hand
        step = TrainStep(cfg, runtime.start("cpu", "float32"), corpus, model, make_optimizer(model, cfg, "cpu"))
        step.compile(False, 1)
        step(1e-2, 0, 0)
        results.append({name: p.detach().clone() for name, p in model.named_parameters()})
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name


@pytest.mark.parametrize("stop, optimizer", [(3, "adamw"), (4, "muon"), (9, "adamw")])
def test_a_resume_freezes_on_needs_no_file_and_is_exact(begin, words_data, stop, optimizer):
    settings = ["--freeze_wte=7", f"--optimizer={optimizer}", "--lr_decay_iters=12", "--eval_interval=4"]
    begin("--out_dir=straight", "--max_iters=12", *settings)
    path = os.path.join(words_data, "word2vec.npy")
    begin(f"--max_iters={stop}", *settings)
    os.rename(path, path + ".away")
    try:
        assert train.main(["--init_from=resume", "--out_dir=out", "--max_iters=12"]) == 0
    finally:
        os.rename(path + ".away", path)
    assert_same_training("out", "straight")
    assert not torch.equal(wte(), beginning(words_data))


def test_a_resume_takes_the_same_words_as_the_run_and_no_others(begin, tmp_path):
    begin("--max_iters=3")
    begin("--init_from=resume", "--max_iters=4")  # the command line of the run, with init_from=resume behind it
    assert load("out")["iter_num"] == 4
    with pytest.raises(ValueError, match="other.npy is for new runs.*started with"):
        begin("--init_from=resume", "--init_wte=other.npy", "--max_iters=5")
    assert load("out")["iter_num"] == 4


@pytest.mark.parametrize(
    "args, parts",
    [
        (["--init_wte=nowhere.npy"], ["nowhere.npy was not found"]),
        (["--init_wte={data}/train.bin"], ["train.bin", "not a .npy file"]),
        (["--init_wte={data}/word2vec.npy", "--n_embd=32"], ["vectors of 24 numbers", "n_embd=32", "--size=32"]),
        (["--init_wte={data}/word2vec.npy", "--init_from=gpt2"], ["init_wte", "init_from=gpt2", "remove one"]),
        (["--init_wte={data}/word2vec.npy", "--model_type=bigram"], ["bigram", "init_wte"]),
        (["--freeze_wte=-1"], ["freeze_wte=-1 must be at least 0"]),
    ],
)
def test_settings_that_cannot_work_are_a_sentence_and_write_nothing(
    in_a_folder_of_its_own, tmp_path, words_data, args, parts
):
    args = [arg.replace("{data}", words_data) for arg in args]
    refusal(lambda: train.main([f"--data_dir={words_data}", *TINY_RUN, *args]), *parts)
    assert not os.listdir(tmp_path)


def test_rows_of_other_data_are_refused(begin, tmp_path):
    prepare(str(tmp_path / "other"), Texts([generated_text() + "\nanother word\n"]), Vocabulary("word"))
    with pytest.raises(ValueError, match="made for other data"):
        begin(f"--data_dir={tmp_path / 'other'}")
