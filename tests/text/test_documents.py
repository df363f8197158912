"""Own data: what is read from files of many kinds, and data/prepare.py: what it prints, splits, refuses and writes."""

import bz2
import codecs
import contextlib
import csv
import fcntl
import gzip
import importlib.util
import io
import json
import lzma
import os
import pty
import random
import re
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections import Counter

import fork_server
import numpy as np
import pytest
from helpers import ROOT, environment, expect_sentence, generated_text, run, visible
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from configurator import UserError
from dongpt.text import documents, tokenizers
from dongpt.text import prepare as preparing
from dongpt.text.bins import STAGING_DIR, read_meta
from dongpt.text.documents import Files, Texts, find_files
from dongpt.text.prepare import Vocabulary, prepare
from dongpt.text.tokenizers import END, from_dict
from dongpt.train.data import Corpus

smoke = pytest.mark.smoke
PACK = {
    "": lambda content: content,
    ".gz": lambda content: gzip.compress(content, mtime=0),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
PROGRAM = os.path.join("data", "prepare.py")
BINS = ("train.bin", "val.bin", "meta.json")
QUICK = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def gather(parts) -> list[str]:
    """The documents that parts() yields."""
    found, document = [], []
    for text, ends in parts:
        document.append(text)
        if ends:
            found.append("".join(document))
            document = []
    assert not document, "the last document never ends"
    return found


def read(path, document="file", field="text", encoding="utf-8") -> list[str]:
    return gather(Files(find_files(str(path))[0], document, field, encoding).read_documents())


def refused(action) -> str:
    """The sentence of the ValueError that action must raise in this project's own code."""
    with pytest.raises(ValueError) as caught:
        action()
    assert isinstance(caught.value, UserError), repr(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def store(path, texts: list[str]):
    """Write texts as the records of a .jsonl, .csv or .parquet file."""
    if str(path).endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(texts))), "text": texts}), str(path))
        return
    plain, ending = os.path.splitext(str(path)) if str(path).endswith((".gz", ".bz2", ".xz")) else (str(path), "")
    file = io.StringIO(newline="")
    if plain.endswith(".csv"):
        csv.writer(file).writerows([["id", "text"], *enumerate(texts)])
    else:
        file.write("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    path.write_bytes(PACK[ending](file.getvalue().encode()))


def program():
    """data/prepare.py as a module."""
    spec = importlib.util.spec_from_file_location("prepare_program", os.path.join(ROOT, PROGRAM))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def contents(folder) -> dict[str, bytes]:
    """Every file of a folder."""
    return {name: (folder / name).read_bytes() for name in visible(folder) if (folder / name).is_file()}


def decoded(folder) -> dict[str, str]:
    """The text of both splits, from the bins and meta.json alone."""
    with open(os.path.join(folder, "meta.json"), encoding="utf-8") as file:
        tokenizer = from_dict(json.load(file)["tokenizer"])
    return {
        split: tokenizer.decode(np.fromfile(os.path.join(folder, f"{split}.bin"), "<u2").tolist())
        for split in ("train", "val")
    }


def has_separators(folder) -> dict[str, list[str]]:
    """The documents of both splits, where a special token parts them."""
    texts = decoded(folder)
    assert all(text.endswith(END) for text in texts.values())
    return {split: text.split(END)[:-1] for split, text in texts.items()}


def made(folder, files, **settings_) -> dict:
    """Prepare files and return the content of meta.json."""
    fraction = settings_.pop("val_fraction", 0.1)
    return prepare(str(folder), files, Vocabulary(**settings_), fraction, quiet=True).meta


# ----------------------------------------------------------------------------------------------------------------------
# kinds of files


@smoke
@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("ending", [".txt", ".md", ".TXT"])
def test_a_text_file_is_one_document_packed_or_not(tmp_path, ending, packed):
    path = tmp_path / ("a" + ending + packed)
    path.write_bytes(PACK[packed]("uno señor\n\ndos 😀\n".encode()))
    assert read(path) == ["uno señor\n\ndos 😀\n"]


TEXTS = ["plain", 'with, comma and "quotes"', "two\nlines\n\nand more\n", "señor 😀", "  blanks kept  "]


@smoke
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet", "a.csv.gz", "a.jsonl.xz", "a.jsonl.bz2"])
def test_each_record_is_a_document(tmp_path, name):
    store(tmp_path / name, TEXTS)
    assert read(tmp_path / name) == TEXTS


@smoke
@pytest.mark.parametrize("piece", [1, 3, 7])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_records_do_not_depend_on_where_a_piece_ends(tmp_path, monkeypatch, name, piece):
    monkeypatch.setattr(documents, "CHUNK_BYTES", piece)
    store(tmp_path / name, TEXTS)
    assert read(tmp_path / name) == TEXTS


def test_many_records_come_in_order(tmp_path):
    texts = [f"record {i}\n" * (1 + i % 3) for i in range(1000)]
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        store(tmp_path / name, texts)
        assert read(tmp_path / name) == texts


@smoke
def test_the_field_is_the_one_that_is_asked_for(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "no", "body": "yes"}\n\n{"body": "again", "n": 3}')
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfbody,text\r\nyes,no\r\n\r\nagain,no")
    for name in ("a.jsonl", "a.csv"):
        assert read(tmp_path / name, field="body") == ["yes", "again"]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_line_ends_in_records_become_plain_and_empty_records_go(tmp_path, name):
    store(tmp_path / name, ["one\r\ntwo\rthree", "", " \n", "four"])
    assert read(tmp_path / name) == ["one\ntwo\nthree", "four"]


@smoke
def test_a_folder_is_read_with_all_below_it_in_order_without_hidden_and_other_files(tmp_path):
    for name in ("b.txt", "a/z.md", "a/b/c.txt", ".hidden.txt", ".git/x.txt", "a/.cache/y.txt", "a.png", "README"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    store(tmp_path / "c.jsonl.gz", ["record"])
    paths, others = find_files(str(tmp_path))
    assert paths == sorted(str(tmp_path / name) for name in ("b.txt", "a/z.md", "a/b/c.txt", "c.jsonl.gz"))
    assert others == 2
    assert sorted(read(tmp_path)) == ["a/b/c.txt", "a/z.md", "b.txt", "record"]


@smoke
def test_a_pattern_takes_what_fits_also_below(tmp_path):
    for name in ("b.txt", "a.txt", "c.log", "d/e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    assert read(tmp_path / "**" / "*.txt") == ["a.txt", "b.txt", "d/e.txt"]
    assert read(tmp_path / "c.log") == ["c.log"]


@smoke
def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    (tmp_path / "a[1].txt").write_text("brackets")
    (tmp_path / "a1.txt").write_text("one")
    assert read(tmp_path / "a[1].txt") == ["brackets"]


@smoke
@pytest.mark.parametrize("given", ["nothing.txt", "*.nothing", "empty", "only_pictures"])
def test_where_there_is_no_text_a_sentence_names_what_was_given(tmp_path, given):
    (tmp_path / "empty").mkdir()
    (tmp_path / "only_pictures").mkdir()
    (tmp_path / "only_pictures" / "a.png").write_bytes(b"x")
    sentence = refused(lambda: find_files(str(tmp_path / given)))
    assert given in sentence and "--input" in sentence


@smoke
def test_a_link_that_leads_nowhere_is_left_out(tmp_path):
    (tmp_path / "a.txt").write_text(generated_text(200))
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone.txt")
    assert find_files(str(tmp_path)) == ([str(tmp_path / "a.txt")], 0)


# ----------------------------------------------------------------------------------------------------------------------
# marks, line ends, encodings


@smoke
@pytest.mark.parametrize("piece", [4, 5, 2**20])
@pytest.mark.parametrize(
    "mark, encoding",
    [(codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")],
)
def test_a_byte_order_mark_says_the_encoding_and_goes(tmp_path, monkeypatch, mark, encoding, piece):
    monkeypatch.setattr(documents, "CHUNK_BYTES", piece)
    (tmp_path / "a.txt").write_bytes(mark + "señor\r\n😀 fin\n".encode(encoding))
    assert read(tmp_path / "a.txt") == ["señor\n😀 fin\n"]


@smoke
def test_a_mark_in_the_text_stays_and_one_in_each_file_goes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_bytes(codecs.BOM_UTF8 + f"{name}\ufeff{name}\n".encode())
    assert read(tmp_path, document="none") == ["a\ufeffa\nb\ufeffb\n"]


@smoke
@pytest.mark.parametrize("encoding", ["cp1252", "utf-16-le", "latin-1"])
def test_the_encoding_is_the_one_that_is_asked_for(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("señor\r\nñandú".encode(encoding))
    assert read(tmp_path / "a.txt", encoding=encoding) == ["señor\nñandú"]


@smoke
@pytest.mark.parametrize("mark, own", [(codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le")])
def test_in_a_folder_of_another_encoding_a_mark_still_says_what_a_file_has(tmp_path, mark, own):
    (tmp_path / "a.txt").write_bytes("señor\n".encode("cp1252"))
    (tmp_path / "b.txt").write_bytes(mark + "señor\n".encode(own))
    assert read(tmp_path, encoding="cp1252") == ["señor\n", "señor\n"]


@smoke
@pytest.mark.parametrize("piece", [1, 2, 2**20])
@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "gbk", "utf_16_le"])
def test_a_utf8_file_is_not_read_in_another_encoding(tmp_path, monkeypatch, piece, encoding):
    monkeypatch.setattr(documents, "CHUNK_BYTES", piece)
    content = "你好吗" if encoding == "gbk" else "se\u00f1or"
    (tmp_path / "b.txt").write_bytes(content.encode(encoding))
    (tmp_path / "c.txt").write_bytes("plain".encode(encoding))
    (tmp_path / "a.txt").write_bytes(("你好" if encoding == "gbk" else "Café!").encode())
    if encoding != "utf_16_le":
        sentence = refused(lambda: read(tmp_path, encoding=encoding))
        assert f"a.txt is UTF-8, not {encoding}: omit --encoding" in sentence
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + "Café".encode())
    assert read(tmp_path, encoding=encoding) == ["Café", content, "plain"]


@smoke
@pytest.mark.parametrize("name", ["UTF-8", "utf8", "utf-8-sig", "U8"])
def test_other_names_of_utf8_are_no_other_encoding(tmp_path, name):
    (tmp_path / "a.txt").write_bytes("Café".encode())
    assert read(tmp_path, encoding=name) == ["Café"]


@smoke
@pytest.mark.parametrize("piece", [4, 2**20])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "gbk"])
def test_a_file_that_ends_inside_a_character_is_said_to_be_incomplete(tmp_path, monkeypatch, piece, encoding):
    monkeypatch.setattr(documents, "CHUNK_BYTES", piece)
    (tmp_path / "a.txt").write_bytes("春眠 不觉".encode(encoding)[:-1])
    sentence = refused(lambda: read(tmp_path / "a.txt", encoding=encoding))
    assert "where it ends inside a character: get the whole file" in sentence and "cp1252" not in sentence
    (tmp_path / "a.txt").write_bytes("only this: café".encode("cp1252"))
    assert "cp1252" in refused(lambda: read(tmp_path / "a.txt"))


@smoke
@pytest.mark.parametrize("piece", [1, 2, 3, 5, 2**20])
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_line_ends_become_plain_wherever_a_piece_ends(tmp_path, monkeypatch, piece, packed):
    monkeypatch.setattr(documents, "CHUNK_BYTES", piece)
    content = b"a\r\nb\rc\r\r\nd\n\re\r\n\r\nf\r"
    (tmp_path / ("a.txt" + packed)).write_bytes(PACK[packed](content))
    assert read(tmp_path / ("a.txt" + packed)) == ["a\nb\nc\n\nd\n\ne\n\nf\n"]


@smoke
@pytest.mark.parametrize("piece", [3, 4, 7, 2**20])
@pytest.mark.parametrize(
    "content, place",
    [
        (b"caf\xe9 con leche", 3),
        ("ñandú ".encode() * 5 + b"\xff", 40),
        (codecs.BOM_UTF8 + b"ab\xff", 5),
        (b"a" * 50 + "ñ".encode()[:1], 50),  # cut in the middle of a character
        (b"ab" + "😀".encode()[:3] + b"cd", 2),
        (b"ok\n" * 9 + b"\xed\xa0\x80", 27),  # half a surrogate pair
        (b"a" + b"\xc0\x80", 1),
        (codecs.BOM_UTF16_LE + "ab".encode("utf-16-le") + b"x", 6),
    ],
)
def test_a_wrong_byte_is_named_with_its_place(tmp_path, monkeypatch, content, place, piece):
    monkeypatch.setattr(documents, "CHUNK_BYTES", piece)
    (tmp_path / "a.txt").write_bytes(content)
    sentence = refused(lambda: read(tmp_path / "a.txt"))
    assert re.search(rf"byte {place}\b", sentence) and str(tmp_path / "a.txt") in sentence and "UTF" in sentence


@smoke
@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("bad, word", [(b"\xe9!", "UTF-8"), (b"\0", "NUL")])
def test_a_wrong_byte_beyond_the_first_piece_is_named_with_its_place(tmp_path, packed, bad, word):
    start = "año ".encode() * (2**20 // 5 * 2)
    assert len(start) > documents.CHUNK_BYTES
    (tmp_path / ("a.txt" + packed)).write_bytes(PACK[packed](start + bad + b"more"))
    sentence = refused(lambda: read(tmp_path / ("a.txt" + packed)))
    assert word in sentence and f"byte {len(start):,} " in sentence.replace(":", " ")


@smoke
@pytest.mark.parametrize("piece", [3, 2**20])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_a_nul_byte_is_named_with_its_place(tmp_path, monkeypatch, mark, piece):
    monkeypatch.setattr(documents, "CHUNK_BYTES", piece)
    (tmp_path / "a.txt").write_bytes(mark + "ñandú".encode() + b"\0abc")
    sentence = refused(lambda: read(tmp_path / "a.txt"))
    assert "NUL" in sentence and f"byte {len(mark) + 7} " in sentence


@smoke
@pytest.mark.parametrize("encoding", ["utf-9", "", "hex", "rot13", "undefined", "idna"])
def test_an_encoding_that_cannot_be_used_is_a_sentence(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("señor .. ñandú".encode())
    assert "encoding" in refused(lambda: read(tmp_path / "a.txt", encoding=encoding))


@smoke
def test_utf16_without_a_mark_is_refused_with_both_byte_orders_as_remedy(tmp_path):
    (tmp_path / "a.txt").write_bytes("señor ñandú".encode("utf-16-le"))
    sentence = refused(lambda: read(tmp_path / "a.txt", encoding="utf-16"))
    assert "a.txt" in sentence and "--encoding=utf-16-le" in sentence and "--encoding=utf-16-be" in sentence


@smoke
@pytest.mark.parametrize(
    "encoding, content",
    [("utf-7", b"+2AA- is half a pair"), ("raw_unicode_escape", b"\\ud800 x"), ("unicode_escape", b"\\ud800 x")],
)
def test_half_a_surrogate_pair_from_another_encoding_is_a_sentence(tmp_path, encoding, content):
    (tmp_path / "a.txt").write_bytes(content * 20)
    refused(lambda: made(tmp_path / "out", Files([str(tmp_path / "a.txt")], encoding=encoding)))


# ----------------------------------------------------------------------------------------------------------------------
# damaged files


@smoke
@pytest.mark.parametrize("packed", [".gz", ".bz2", ".xz"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[: len(b) // 2],
        lambda b: b[: len(b) // 2] + b"\0" * 20 + b[-30:],
        lambda b: b"no such thing",
        lambda b: b[:3],
    ],
)
def test_a_damaged_packed_file_is_refused_by_name(tmp_path, packed, damage):
    content = PACK[packed](random.Random(0).randbytes(5000).hex().encode())
    (tmp_path / ("a.txt" + packed)).write_bytes(damage(content))
    assert "a.txt" in refused(lambda: read(tmp_path / ("a.txt" + packed)))


@smoke
@pytest.mark.parametrize("packed", [".gz", ".bz2", ".xz"])
def test_bytes_after_the_end_of_a_packed_file_are_refused(tmp_path, packed):
    """Python's bz2 and lzma ignore them, and with them all that follows damage at the start of a second stream."""
    (tmp_path / ("a.txt" + packed)).write_bytes(PACK[packed](b"text") + b"tail")
    assert "a.txt" in refused(lambda: read(tmp_path / ("a.txt" + packed)))


@smoke
@pytest.mark.parametrize(
    "line, parts",
    [
        ('{"text": "broken', ["line 3", "JSON"]),
        ("[1, 2]", ["line 3"]),
        ('"text"', ["line 3"]),
        ('{"body": "x"}', ["line 3", "'text'", "'body'", "--field"]),
        ("{}", ["line 3", "'text'"]),
        ('{"text": 5}', ["'text'", "5"]),
        ('{"text": ["a"]}', ["'text'"]),
        ('{"text": "a\\ud83d"}', ["surrogate", "'text'"]),
        ('{"text": "a\\u0000"}', ["NUL", "'text'"]),
        ("[" * 100_000, ["line 3", "JSON"]),
        ('{"text": ' + "9" * 10_000 + "}", ["a.jsonl"]),
    ],
)
def test_a_bad_record_of_json_lines_is_a_sentence(tmp_path, line, parts):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n\n' + line + '\n{"text": "good"}\n')
    sentence = refused(lambda: read(tmp_path / "a.jsonl"))
    assert all(part in sentence for part in ["a.jsonl", *parts]), sentence
    assert len(sentence) < 1000


@smoke
def test_a_surrogate_pair_in_json_is_one_character(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00"}')
    assert read(tmp_path / "a.jsonl") == ["😀"]


@smoke
@pytest.mark.parametrize(
    "content, parts",
    [
        ("a,b\n1,2\n", ["'text'", "'a', 'b'", "--field"]),
        ("", ["'text'"]),
        ("text,b\nx,y\nalone\n", ["line 3"]),
        ('text,b\n"x"y,z\n', ["line 2"]),
        ('text,b\n"never ends,z\n', ["CSV"]),
        ("body;b\nx;y\n", ["'text'", "'body', 'b'", "--field"]),
    ],
)
def test_a_bad_csv_file_is_a_sentence(tmp_path, content, parts):
    (tmp_path / "a.csv").write_text(content)
    sentence = refused(lambda: read(tmp_path / "a.csv"))
    assert all(part in sentence for part in ["a.csv", *parts]), sentence


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1 no parquet at all PAR1", None])
def test_a_damaged_parquet_file_is_a_sentence(tmp_path, content):
    store(tmp_path / "a.parquet", TEXTS)
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[:-20] if content is None else content)
    assert "a.parquet" in refused(lambda: read(tmp_path / "a.parquet"))


def test_parquet_without_the_field_or_without_text_in_it_is_a_sentence(tmp_path):
    store(tmp_path / "a.parquet", TEXTS)
    for field, part in (("body", "--field"), ("id", "'id'")):
        sentence = refused(lambda: read(tmp_path / "a.parquet", field=field))
        assert "a.parquet" in sentence and part in sentence


# ----------------------------------------------------------------------------------------------------------------------
# documents


def cut_by_hand(text: str, document: str) -> list[str]:
    """The documents of a text: a line, or a paragraph, with the blank lines behind it; blanks at the start are its."""
    lines, found = re.findall(r"[^\n]*\n|[^\n]+", text), []
    for i, line in enumerate(lines):
        begins = line.strip() and (document == "line" or not lines[i - 1].strip())
        if found and not (begins and "".join(found).strip()):
            found[-1] += line
        else:
            found.append(line)
    return found


@smoke
@pytest.mark.parametrize(
    "document, expected",
    [
        ("file", ["a b\nc\n\nd\n"]),
        ("line", ["a b\n", "c\n\n", "d\n"]),
        ("blank", ["a b\nc\n\n", "d\n"]),
        ("none", ["a b\nc\n\nd\n"]),
    ],
)
def test_what_a_document_is(tmp_path, document, expected):
    (tmp_path / "a.txt").write_text("a b\nc\n\nd\n")
    assert read(tmp_path / "a.txt", document) == expected
    assert document not in ("line", "blank") or cut_by_hand("a b\nc\n\nd\n", document) == expected


@smoke
@pytest.mark.parametrize(
    "document, expected",
    [
        ("file", ["a\nb", "c\n\nd\n", "e"]),
        ("line", ["a\n", "b", "c\n\n", "d\n", "e"]),
        ("blank", ["a\nb", "c\n\n", "d\n", "e"]),
        ("none", ["a\nb\nc\n\nd\ne\n"]),
    ],
)
def test_documents_end_where_files_and_records_end(tmp_path, document, expected):
    (tmp_path / "1.txt").write_text("a\nb")
    store(tmp_path / "2.jsonl", ["c\n\nd\n"])
    (tmp_path / "3.txt").write_text("")
    (tmp_path / "4.txt").write_text("e")
    assert read(tmp_path, document) == expected


@settings(QUICK, max_examples=50)
@given(
    text=st.text("ab \t\r\n", max_size=40),
    document=st.sampled_from(["file", "line", "blank", "none"]),
    piece=st.integers(1, 8),
)
@example(text="abcdefgh\nfoo\n", document="line", piece=4)  # a line longer than a piece that ends with one
def test_documents_do_not_depend_on_where_a_piece_ends_and_lose_nothing(text, document, piece):
    plain = text.replace("\r\n", "\n").replace("\r", "\n")
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "CHUNK_BYTES", piece)
        path = os.path.join(folder, "a.txt")
        with open(path, "wb") as file:
            file.write(text.encode())
        found = gather(Files([path], document).read_documents())
        if not plain.strip():
            assert found == []
        elif document in ("file", "none"):
            assert found == [plain if document == "file" or plain.endswith("\n") else plain + "\n"]
        else:
            assert "".join(found) == plain
            tail = plain[len(plain.rstrip(" \t")) :]  # a last line of blanks is tested below
            plain = plain if len(tail) == 0 else plain[: -len(tail)]
            assert [one.rstrip() for one in found if one.strip()] == [
                one.rstrip() for one in cut_by_hand(plain, document)
            ]


@smoke
@pytest.mark.parametrize("document", ["line", "blank"])
def test_blanks_at_the_end_are_no_document(tmp_path, document):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\n  ")
    assert read(tmp_path / "a.txt", document) == ["one\n\n", "two\n\n  "]


@smoke
@pytest.mark.parametrize("document, count", [("file", 3), ("line", 60), ("blank", 30), ("none", 1)])
def test_documents_are_counted(tmp_path, document, count):
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in "abc":
        text = "".join(f"{name} line {i}\n" + "\n" * (i % 2) for i in range(20))
        (texts / f"{name}.txt").write_text(text)
    meta = made(tmp_path / "out", Files(find_files(str(texts))[0], document))
    assert meta["documents"] == count
    assert sum(meta["characters"].values()) == sum(len(path.read_text()) for path in texts.iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# the split


@smoke
def test_19_documents_are_split_by_position_and_20_whole(tmp_path):
    for n, by in ((19, "position"), (20, "documents")):
        store(tmp_path / "a.jsonl", texts := [f"text number {i:02}" for i in range(n)])
        meta = made(tmp_path / f"out{n}", Files([str(tmp_path / "a.jsonl")]))
        assert (meta["split"], meta["documents"]) == (by, n)
        if by == "documents":
            parts = has_separators(tmp_path / "out20")
            assert sorted(parts["train"] + parts["val"]) == texts and len(parts["val"]) in (1, 2, 3, 4)
        else:
            assert "".join(decoded(tmp_path / "out19").values()).split(END)[:-1] == texts


@settings(QUICK, max_examples=20)
@given(
    lengths=st.lists(st.one_of(st.integers(4, 30), st.integers(4, 2000)), min_size=20, max_size=40),
    copies=st.integers(1, 3),
    fraction=st.sampled_from([0.1, 0.03, 0.5, 0.3]),
)
@example(lengths=[4] * 19 + [2000], copies=1, fraction=0.1)
@example(lengths=[4] * 19 + [500], copies=1, fraction=0.5)
def test_documents_are_split_whole_exactly_where_the_share_can_be_met(lengths, copies, fraction):
    texts = [f"{i:03}" + "x" * (n - 3) for i, n in enumerate(lengths)] * copies
    total, target = sum(map(len, texts)), fraction * sum(map(len, texts))
    reachable = 1  # bit n: some documents, each with all its copies, have n characters
    for n in lengths:
        reachable |= reachable << n * copies
    possible = any(reachable >> n & 1 for n in range(int(np.ceil(target / 2)), min(total, int(2 * target) + 1)))
    with tempfile.TemporaryDirectory() as folder:
        with open(path := os.path.join(folder, "a.jsonl"), "w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        meta = made(folder, Files([path]), val_fraction=fraction)
        assert meta["split"] == ("documents" if possible else "position")
        share = meta["characters"]["val"] / total
        if not possible:
            assert abs(share - fraction) < 2 / total
            return
        assert fraction / 2 <= share <= 2 * fraction
        parts = has_separators(folder)
        assert not set(parts["train"]) & set(parts["val"])
        assert sorted(parts["train"] + parts["val"]) == sorted(texts)
        places = {text: i for i, text in enumerate(texts)} if copies == 1 else {}
        for part in parts.values() if places else ():
            assert part == sorted(part, key=places.get)


@smoke
@pytest.mark.parametrize("document", ["line", "blank"])
def test_equal_documents_are_never_on_both_sides(tmp_path, document):
    rng, gap = random.Random(0), "\n" if document == "line" else "\n\n"
    distinct = [f"sentence number {i} of many" for i in range(60)]
    chosen = distinct * 3 + rng.choices(distinct, k=120)
    rng.shuffle(chosen)
    (tmp_path / "a.txt").write_text(gap.join(chosen) + gap)
    meta = made(tmp_path, Files([str(tmp_path / "a.txt")], document))
    sides = {split: set(filter(None, text.split("\n"))) for split, text in decoded(tmp_path).items()}
    assert meta["split"] == "documents" and meta["documents"] == 300 and all(sides.values())
    assert not sides["train"] & sides["val"] and sides["train"] | sides["val"] == set(distinct)


@smoke
@pytest.mark.parametrize("document, ends", [("line", ["\n", "\n\n", ""]), ("blank", ["\n\n", "\n\n\n", "\n"])])
def test_documents_that_differ_by_the_blank_lines_behind_them_are_equal(tmp_path, document, ends):
    distinct = [f"sentence number {i} of many" for i in range(60)]
    text = "".join(one + end for end in ends[:2] for one in distinct) + distinct[0] + ends[2]
    (tmp_path / "a.txt").write_text(text)
    meta = made(tmp_path, Files([str(tmp_path / "a.txt")], document))
    sides = {split: set(filter(None, text.split("\n"))) for split, text in decoded(tmp_path).items()}
    assert meta["split"] == "documents" and meta["documents"] == 121
    assert not sides["train"] & sides["val"]


@smoke
def test_equal_files_of_several_pieces_are_never_on_both_sides(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "CHUNK_BYTES", 2**10)
    monkeypatch.setattr(preparing, "HASHED_PREFIX_CHARS", 2**8)
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(24):
        text = f"book {i % 12}\n" + generated_text(1000, seed=i % 12)
        content = text.replace("\n", "\r\n" if i < 12 else "\n").encode()
        (texts / f"{i}.txt.gz" if i % 5 == 0 else texts / f"{i}.txt").write_bytes(
            gzip.compress(content) if i % 5 == 0 else content
        )
    meta = made(tmp_path / "out", Files(find_files(str(texts))[0]), val_fraction=0.2)
    sides = {
        split: Counter(part.split("\n")[0] for part in texts)
        for split, texts in has_separators(tmp_path / "out").items()
    }
    assert meta["split"] == "documents" and not set(sides["train"]) & set(sides["val"])
    assert set((sides["train"] + sides["val"]).values()) == {2}


def test_long_documents_that_differ_late_are_kept_whole(tmp_path):
    same = "the same beginning " * 4000
    store(tmp_path / "a.jsonl", texts := [same + str(i) for i in range(20)] + [f"{i} other {same}" for i in range(20)])
    meta = made(tmp_path / "out", Files([str(tmp_path / "a.jsonl")]), val_fraction=0.3)
    parts = has_separators(tmp_path / "out")
    assert meta["split"] == "documents" and sorted(parts["train"] + parts["val"]) == sorted(texts)


# ----------------------------------------------------------------------------------------------------------------------
# ids


@settings(QUICK, max_examples=12)
@given(
    texts=st.lists(st.text("ab C.,'é\n \u00a0ΣΑ5_-😀", min_size=1, max_size=60), min_size=1, max_size=4),
    tokenizer=st.sampled_from(["char", "bpe", "word"]),
    job=st.integers(1, 12),
    piece=st.integers(4, 9),
)
def test_ids_are_those_of_each_document_encoded_whole(texts, tokenizer, job, piece):
    texts = [text for text in texts if text.strip()] or ["a b"]
    texts = [f"{i}{text}" for i, text in enumerate(texts * 20)]  # enough for whole documents
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "CHUNK_BYTES", piece)
        patch.setattr(preparing, "CHARS_PER_JOB", job)
        patch.setattr(preparing, "_n_cores", lambda: 2)
        for i, text in enumerate(texts):
            with open(os.path.join(folder, f"{i:03}.txt"), "wb") as file:
                file.write(text.encode())
        prepared = prepare(folder, Files(find_files(folder)[0]), Vocabulary(tokenizer, 300), 0.1, quiet=True)
        assert prepared.meta["split"] == "documents"
        encode, end = prepared.tokenizer.encode, [prepared.tokenizer.specials[END]]
        ids = {split: np.fromfile(os.path.join(folder, f"{split}.bin"), "<u2").tolist() for split in ("train", "val")}
        val = set(prepared.tokenizer.decode(ids["val"]).split(END))
        expected = {"train": [], "val": []}
        for text in texts:
            expected["val" if text in val else "train"] += encode(text) + end
        assert ids == expected
        assert prepared.meta["tokens"] == {split: len(part) for split, part in ids.items()}


@smoke
def test_lowered_words_are_those_of_the_whole_document_also_where_it_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "CHARS_PER_JOB", 3)
    text = "ΑΣ.ΑΒ ΟΣ " * 40  # the small letter of the first sigma depends on what follows the point
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    prepared = prepare(str(tmp_path), Files([str(tmp_path / "a.txt")]), Vocabulary("word", lower=True), 0.1, quiet=True)
    ids = np.fromfile(tmp_path / "train.bin", "<u2").tolist()
    assert prepared.tokenizer.decode(ids) == text.lower()[: prepared.meta["characters"]["train"]]


@pytest.mark.parametrize("spaces_alone", [False, True])
def test_words_give_the_exact_text_back_wherever_the_text_is_split(tmp_path, spaces_alone):
    for n in range(90, 100):  # the place of the split moves through a word
        text = ("windmills and giants\n" * 20)[: n * 4]
        (tmp_path / "a.txt").write_text(text)
        made(tmp_path, Files([str(tmp_path / "a.txt")]), tokenizer="word", spaces_alone=spaces_alone)
        assert "".join(decoded(tmp_path).values()) == text


def test_gpt2_ids_are_those_of_each_document_encoded_whole(tmp_path, monkeypatch, gpt2_vocabulary):
    import tiktoken

    monkeypatch.setattr(documents, "CHUNK_BYTES", 50)
    monkeypatch.setattr(preparing, "CHARS_PER_JOB", 30)
    gpt2, texts = tiktoken.get_encoding("gpt2"), [f"{i} {generated_text(60, seed=i)}  \n\n don't" for i in range(25)]
    store(tmp_path / "a.jsonl", texts)
    meta = made(tmp_path, Files([str(tmp_path / "a.jsonl")]), tokenizer="gpt2")
    parts = has_separators(tmp_path)
    assert meta["split"] == "documents" and sorted(parts["train"] + parts["val"]) == sorted(texts)
    for split, part in parts.items():
        expected = sum((gpt2.encode_ordinary(text) + [50256] for text in part), [])
        assert np.fromfile(tmp_path / f"{split}.bin", "<u2").tolist() == expected


@smoke
@pytest.mark.parametrize("tokenizer", ["char", "word", "bpe"])
def test_special_tokens_are_never_made_from_plain_text(tmp_path, tokenizer):
    text = f"one <|summarize|> two {END} <unk>\n" * 30
    (tmp_path / "a.txt").write_text(text)
    prepared = prepare(
        str(tmp_path),
        Files([str(tmp_path / "a.txt")]),
        Vocabulary(tokenizer, 300, special="<|summarize|>,<|sentiment|>"),
        quiet=True,
    )
    ids = np.concatenate([np.fromfile(tmp_path / f"{split}.bin", "<u2") for split in ("train", "val")]).tolist()
    assert {"<|summarize|>", "<|sentiment|>"} <= set(prepared.tokenizer.specials)
    assert not set(ids) & set(prepared.tokenizer.specials.values())


# ----------------------------------------------------------------------------------------------------------------------
# what is refused


@pytest.mark.parametrize("content", [b"", b"\n \r\n\t", codecs.BOM_UTF8, b"a", b"ab", b"abc"])
@pytest.mark.parametrize("tokenizer", ["char", "word", "bpe"])
def test_an_empty_or_too_short_text_is_a_sentence_and_writes_nothing(tmp_path, tokenizer, content):
    (tmp_path / "a.txt").write_bytes(content)
    refused(lambda: made(tmp_path / "out", Files([str(tmp_path / "a.txt")]), tokenizer=tokenizer))
    assert visible(tmp_path / "out") == []


@smoke
@pytest.mark.parametrize("tokenizer", ["char", "word", "bpe"])
def test_a_text_of_one_line_is_prepared(tmp_path, tokenizer):
    text = "one line without an end " * 30
    (tmp_path / "a.txt").write_text(text)
    for document in ("file", "line", "blank", "none"):
        meta = made(tmp_path, Files([str(tmp_path / "a.txt")], document), tokenizer=tokenizer, vocab_size=300)
        assert meta["split"] == "position"
        assert "".join(decoded(tmp_path).values()).startswith(text[:600])


def test_a_long_line_without_blanks_trains_byte_pairs_in_short_pieces(tmp_path, monkeypatch):
    """Training takes time with the square of the longest run of characters of one kind."""
    text = "".join(random.Random(0).choices("ACGT", k=300_000))
    (tmp_path / "a.txt").write_text(text)
    lengths, shortened = [], tokenizers._split_long_runs

    def measured(text):
        pieces = shortened(text)
        lengths.extend(map(len, pieces))
        return pieces

    monkeypatch.setattr(tokenizers, "_split_long_runs", measured)
    made(tmp_path / "out", Files([str(tmp_path / "a.txt")]), tokenizer="bpe", vocab_size=300)
    assert sum(lengths) == len(text) and max(lengths) <= 1000


ARGUMENTS = [
    (["--val_fraction=-0.1"], "val_fraction"),
    (["--val_fraction=1"], "val_fraction"),
    (["--val_fraction=1e999"], ""),
    (["--tokenizer=bpe", "--vocab_size=200"], "vocab_size"),
    (["--tokenizer=bpe", "--vocab_size=65537"], "65,536"),
    (["--tokenizer=word", "--min_count=0"], "min_count"),
    (["--tokenizer=word", "--min_count=100000"], ""),
    (["--tokenizer=letters"], "tokenizer"),
    (["--document=page"], "document"),
    (["--encoding=utf-9"], "utf-9"),
    (["--name=../x"], "name"),
    (["--name=.."], "name"),
    (["--name=a/b"], "name"),
    (["--feild=x"], "field"),
    (["--special=<a>,<a>"], "<a>"),
    (["--special=w"], "'w'"),
    (["--vocab_size=many"], "vocab_size"),
]


@smoke
@pytest.mark.parametrize("arguments, part", ARGUMENTS, ids=[" ".join(arguments) for arguments, _ in ARGUMENTS])
def test_a_wrong_argument_is_a_sentence_and_leaves_the_old_data(tmp_path, monkeypatch, capsys, arguments, part):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(generated_text(300))
    program().main(["--input=a.txt", "--data_dir=."])
    before = contents(tmp_path)
    assert set(before) == {"a.txt", *BINS}
    folder = [] if any(argument.startswith("--name") for argument in arguments) else ["--data_dir=."]
    assert part in refused(lambda: program().main(["--input=a.txt", *folder, *arguments]))
    assert contents(tmp_path) == before


BAD = {
    "latin.txt": b"caf\xe9 con leche",
    "nul.txt": b"a\0b",
    "empty.txt": b"",
    "blank.txt": b" \n\n",
    "short.txt": b"a",
    "cut.txt.gz": gzip.compress(random.Random(0).randbytes(500))[:200],
    "broken.jsonl": b'{"text": "a"}\n{"text": ',
    "field.csv": b"a,b\n1,2\n",
    "no.parquet": b"PAR1",
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_text_ends_the_program_with_a_sentence_and_leaves_the_old_data(tmp_path, name):
    (tmp_path / "good.txt").write_text(generated_text(300))
    prepare(str(tmp_path), Files([str(tmp_path / "good.txt")]), Vocabulary(), quiet=True)
    (tmp_path / name).write_bytes(BAD[name])
    before = contents(tmp_path)
    done = run(PROGRAM, f"--input={name}", "--data_dir=.", cwd=tmp_path, check=None)
    expect_sentence(done, "prepare.py: ", *([] if name in ("empty.txt", "blank.txt", "short.txt") else [name]))
    assert contents(tmp_path) == before


def test_errors_beyond_the_first_megabytes_write_nothing(tmp_path):
    """The bad byte comes when much was read already."""
    (tmp_path / "a.txt").write_bytes(b"good text\n" * 300_000 + b"\xff\xfe")
    done = run(PROGRAM, "--input=a.txt", "--data_dir=.", "--tokenizer=bpe", cwd=tmp_path, check=None)
    expect_sentence(done, "a.txt", "byte 3,000,000")
    assert visible(tmp_path) == ["a.txt"]


@smoke
def test_a_vocabulary_of_more_than_65536_entries_is_refused_with_advice(tmp_path):
    (tmp_path / "a.txt").write_text(
        "".join(map(chr, [*range(0x4E00, 0x9FFF), *range(0x20000, 0x2A6D0), *range(0xAC00, 0xD7A3)]))
    )
    sentence = refused(lambda: made(tmp_path / "out", Files([str(tmp_path / "a.txt")])))
    assert "65,536" in sentence and "--tokenizer=bpe" in sentence
    (tmp_path / "a.txt").write_text(" ".join(f"w{i}" for i in range(66_000)))
    sentence = refused(lambda: made(tmp_path / "out", Files([str(tmp_path / "a.txt")]), tokenizer="word"))
    assert "65,536" in sentence and "--min_count" in sentence
    assert visible(tmp_path / "out") == []


def test_without_an_input_and_a_terminal_it_says_what_to_pass(tmp_path):
    (tmp_path / "a.txt").write_text(generated_text(300))
    expect_sentence(run(PROGRAM, cwd=tmp_path, check=None), "--input", "a folder or a quoted pattern")
    assert visible(tmp_path) == ["a.txt"]


# ----------------------------------------------------------------------------------------------------------------------
# what it prints


def printed(capsys, *arguments) -> dict[str, str]:
    """The lines that data/prepare.py prints, as {what is before the colon: what is after it}."""
    program().main([*arguments, "--data_dir=."])
    lines = capsys.readouterr().out.splitlines()
    return {line.partition(": ")[0]: line.partition(": ")[2] for line in lines}


@smoke
@pytest.mark.parametrize("tokenizer", ["char", "word", "bpe"])
def test_what_it_prints_is_true(tmp_path, monkeypatch, capsys, tokenizer):
    """A line on accents, five lines on what was found, then a model that suits it and the next command."""
    monkeypatch.chdir(tmp_path)
    text = generated_text(2000) + "ΩΩΩ ω"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    options = ["--vocab_size=300"] if tokenizer == "bpe" else []
    lines = printed(capsys, "--input=a.txt", f"--tokenizer={tokenizer}", *options)
    train, val = (np.fromfile(tmp_path / f"{split}.bin", "<u2").tolist() for split in ("train", "val"))
    tokenizer = from_dict(json.loads((tmp_path / "meta.json").read_text())["tokenizer"])
    names = [name for name in lines if not name.startswith("samples without a prompt")]
    assert names == ["Unicode", "text", "vocabulary", "tokens", "check", "written to", "suggestion", "note", "next"]
    assert lines["text"] == f"a.txt, {len(text):,} characters in 1 document"
    assert lines["vocabulary"].startswith(f"{tokenizer.vocab_size - len(tokenizer.specials):,} ")
    assert ("1 special token" in lines["vocabulary"]) == bool(tokenizer.specials)
    counts = Counter(train + val).most_common()
    frequent, rare = re.search("most frequent: (.*); rarest: (.*)", lines["vocabulary"]).groups()
    assert frequent.startswith(f"{tokenizer.decode([counts[0][0]])!r} {counts[0][1]:,}, ")
    for line, expected in ((frequent, counts[:5]), (rare, counts[:-6:-1])):
        shown = re.findall(r" (\d[\d,]*)(?:, |$)", line)
        assert [int(n.replace(",", "")) for n in shown] == [count for _, count in expected]
    assert lines["tokens"].startswith(f"{len(train):,} for training, {len(val):,} for validation (the last 10% ")
    assert lines["tokens"].endswith(f"; {len(text) / len(train + val):.2f} characters per token")
    unseen = sum(i not in set(train) for i in val) / len(val)
    assert unseen > 0 and f"; {100 * unseen:.3g}% of the validation tokens do not occur" in lines["check"]
    assert lines["check"].startswith("the tokens decode to the original text")
    assert lines["written to"] == "."
    assert "--data_dir=." in shlex.split(lines["next"])


@smoke
def test_it_says_how_documents_were_split(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("".join(f"line {i}\n" for i in range(400)))
    lines = printed(capsys, "--input=a.txt", "--document=line")
    assert lines["text"].endswith(" in 400 documents") and "of the text, in whole documents)" in lines["tokens"]
    for option in ("--document=file", "--document=none"):
        lines = printed(capsys, "--input=a.txt", option)
        assert lines["text"].endswith(" in 1 document") and "(the last 10% of the text)" in lines["tokens"]


@smoke
def test_it_says_what_a_document_is_in_files_of_records(tmp_path, monkeypatch, capsys):
    """The report of a table said neither that its rows are documents nor that its other columns are left out."""
    monkeypatch.chdir(tmp_path)
    rows = [f"{generated_text(9, seed)}\n" for seed in range(30)]
    (tmp_path / "a.csv").write_text("id,body\n" + "".join(f'{i},"{row}"\n' for i, row in enumerate(rows)))
    for options, said in (
        ([], "in 30 documents (one per row; only the column 'body' is used)"),
        (["--document=none"], "in 1 document (only the column 'body' is used)"),
    ):
        assert printed(capsys, "--input=a.csv", "--field=body", *options)["text"].endswith(said)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"body": row, "id": 1}) + "\n" for row in rows))
    lines = printed(capsys, "--input=*.[cj]*", "--field=body")
    assert lines["text"].endswith("in 60 documents (one per record; only the field 'body' is used)")
    (tmp_path / "c.txt").write_text(rows[0])
    lines = printed(capsys, "--input=*.[jt]*", "--field=body")
    assert lines["text"].endswith("in 31 documents (one per file or record; only the field 'body' is used)")


def test_it_says_when_the_text_does_not_come_back(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = "Some Capitals here\n" * 50
    (tmp_path / "a.txt").write_text(text)
    lost = "the tokens do not decode to the original text: "
    lines = printed(capsys, "--input=a.txt", "--tokenizer=word", "--lower=True")
    assert lines["check"].startswith(f"{lost}--lower removes capital letters")
    (tmp_path / "a.txt").write_text(text + "all in small letters\n" * 200)  # validation has no capital letters
    lines = printed(capsys, "--input=a.txt", "--tokenizer=word", "--lower=True")
    assert lines["check"].startswith(f"{lost}--lower removes capital letters")
    (tmp_path / "a.txt").write_text("once\n" + "many times\n" * 200)
    lines = printed(capsys, "--input=a.txt", "--tokenizer=word", "--min_count=2", "--val_fraction=0.0905")
    assert lines["check"].startswith(f"{lost}<unk> replaces 1 rare word;")


@smoke
def test_the_suggested_model_follows_the_rule():
    """About 20 tokens per parameter, and 4 passes over the text: arxiv.org/abs/2203.15556 and 2305.16264."""
    n_params = {n: program().suggest_model(n)[1] for n in (1000, 10**6, 3 * 10**6, 10**8, 10**10)}
    assert [*n_params.values()] == sorted(n_params.values()) and n_params[1000] < n_params[10**10]
    for n in (10**6, 3 * 10**6, 10**8):  # within the range of the sizes
        settings, n_parameters, n_passes = program().suggest_model(n)
        tokens_seen = settings["max_iters"] * settings["batch_size"] * settings["block_size"]
        assert 4 * n <= tokens_seen < 4.1 * n and n_passes == pytest.approx(tokens_seen / n)
        assert n_parameters == 12 * settings["n_layer"] * settings["n_embd"] ** 2
        assert 8 < tokens_seen / n_parameters < 50
        assert settings["lr_decay_iters"] == settings["max_iters"]  # the learning rate falls until the end
    assert program().suggest_model(1000)[0]["max_iters"] == 200


@smoke
def test_a_short_text_is_announced_as_one_that_is_memorized(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for n_words, is_short in ((300, True), (20_000, False)):
        (tmp_path / "a.txt").write_text(generated_text(n_words), encoding="utf-8")
        assert ("too short to learn a language from" in printed(capsys, "--input=a.txt").get("note", "")) == is_short


def test_symbols_that_cannot_be_shown_are_printed_safely(tmp_path):
    (tmp_path / "a.txt").write_text("\x1b[31m\x07\u202e\u2028 señor 😀\n" * 60, encoding="utf-8")
    for tokenizer in ("char", "bpe"):
        done = run(
            PROGRAM,
            "--input=a.txt",
            "--data_dir=.",
            f"--tokenizer={tokenizer}",
            "--vocab_size=300",
            cwd=tmp_path,
            env={"PYTHONIOENCODING": "ascii"},
        )
        assert done.stderr == "" and not set("\x1b\x07\u202e\u2028") & set(done.stdout)


def test_a_file_name_in_another_encoding_is_no_obstacle(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.txt")
    with open(path, "wb") as file:
        file.write(generated_text(300).encode())
    arguments = [b"--input=" + path, b"--data_dir=" + os.fsencode(tmp_path)]
    done = fork_server.run([sys.executable, os.path.join(ROOT, PROGRAM), *arguments], capture_output=True)
    assert done.returncode == 0 and b"next:" in done.stdout, done.stderr[-1000:]


TRAIN_SHORTLY = [
    "--max_iters=2",
    "--eval_interval=2",
    "--eval_iters=1",
    "--device=cpu",
    "--compile=False",
    "--n_embd=16",
    "--sample_tokens=0",
]


def next_words(out: str) -> list[str]:
    """The words behind `python` of the command that is printed last."""
    line = out.strip().splitlines()[-1]
    assert line.startswith("next: python ")
    words = shlex.split(line)[2:]
    assert os.path.basename(words[0]) == "train.py"
    return words


@pytest.mark.parametrize("n_words, options", [(800, []), (25, ["--document=none"])])
def test_the_next_command_trains(tmp_path, n_words, options):
    folder = tmp_path / "my texts"
    folder.mkdir()
    (folder / "a.txt").write_text(generated_text(n_words), encoding="utf-8")
    done = run(PROGRAM, "--input=my texts/a.txt", "--data_dir=my texts", *options, cwd=tmp_path)
    words = next_words(done.stdout)
    assert "--data_dir=my texts" in words and set(visible(folder)) == {"a.txt", *BINS}
    in_tree(".", *words, *TRAIN_SHORTLY, cwd=tmp_path)
    out_dir = next(word for word in words if word.startswith("--out_dir=")).partition("=")[2]
    assert (tmp_path / out_dir / "ckpt.pt").exists()


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the programs, in which data may be written under data/."""
    tree = tmp_path_factory.mktemp("copy")
    for name in os.listdir(ROOT):
        if name.endswith(".py"):
            shutil.copy(os.path.join(ROOT, name), tree)
    ignored = shutil.ignore_patterns("*.bin", "meta.*", "input.txt", "*.part", "__pycache__")
    for name in ("dongpt", "data", "config"):
        shutil.copytree(os.path.join(ROOT, name), tree / name, ignore=ignored)
    return tree


def in_tree(tree, program_, *arguments, **settings_):
    done = fork_server.run(
        [sys.executable, os.path.join(tree, program_), *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **settings_,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["mytext", "my text"])
def test_with_a_name_the_data_lie_under_data_and_the_next_command_trains(tree, tmp_path, name):
    (tmp_path / "a.txt").write_text(generated_text(800), encoding="utf-8")
    out = in_tree(tree, PROGRAM, "--input=a.txt", f"--name={name}", "--tokenizer=bpe", "--vocab_size=300", cwd=tmp_path)
    assert set(visible(tree / "data" / name)) == set(BINS) and visible(tmp_path) == ["a.txt"]
    words = next_words(out)
    assert f"--dataset={name}" in words
    in_tree(".", *words, *TRAIN_SHORTLY, cwd=tmp_path)


@pytest.mark.parametrize(
    "path, given, name",
    [
        ("my verses.txt", "my verses.txt", "my verses"),
        ("LOG.v2.TXT.gz", "LOG.v2.TXT.gz", "LOG.v2"),
        ("poems/a/1.txt", "poems/", "poems"),
        ("logs/1.txt", "logs/*.txt", "logs"),
        ("songs/1.txt", "songs/1.*", "songs"),
    ],
)
def test_without_a_name_the_data_go_to_data_and_the_name_of_the_file(tree, tmp_path, path, given, name):
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    text = generated_text(300).encode("utf-8")
    (tmp_path / path).write_bytes(gzip.compress(text) if path.endswith(".gz") else text)
    before = contents(tmp_path)
    out = in_tree(tree, PROGRAM, f"--input={given}", cwd=tmp_path)
    assert set(visible(tree / "data" / name)) == set(BINS) and contents(tmp_path) == before
    assert f"--dataset={name}" in next_words(out)
    in_tree(tree, PROGRAM, f"--input={given}", cwd=tmp_path)  # the same text again replaces it


def test_a_folder_that_was_not_named_is_never_taken_from_another_text(tree, tmp_path):
    (tmp_path / "chat.txt").write_text(generated_text(300), encoding="utf-8")
    for name in ("verses.txt", "verses.md"):
        (tmp_path / name).write_text(generated_text(300), encoding="utf-8")
    in_tree(tree, PROGRAM, "verses.txt", cwd=tmp_path)
    before = contents(tree / "data" / "verses")
    for path, parts in (("chat.txt", ["data/chat/prepare.py"]), ("verses.md", ["data/verses", "verses.txt"])):
        done = fork_server.run(
            [sys.executable, str(tree / PROGRAM), path], capture_output=True, text=True, cwd=tmp_path, env=environment()
        )
        expect_sentence(done, *parts, "--name=NAME", "--data_dir=DIR")
    assert contents(tree / "data" / "verses") == before and visible(tree / "data" / "chat") == ["prepare.py"]
    in_tree(tree, PROGRAM, "verses.md", "--name=verses", cwd=tmp_path)  # one that was named is


def test_a_text_that_cannot_be_prepared_leaves_no_folder_under_data(tree, tmp_path):
    (tmp_path / "nothing.txt").write_text(" \n")
    before = visible(tree / "data")
    done = fork_server.run(
        [sys.executable, str(tree / PROGRAM), "nothing.txt"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(),
    )
    expect_sentence(done, "the text is blank")
    assert visible(tree / "data") == before


@smoke
def test_two_folders_to_write_to_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(generated_text(300))
    sentence = refused(lambda: program().main(["a.txt", "--data_dir=.", "--name=mine"]))
    assert "--data_dir=." in sentence and "--name=mine" in sentence and visible(tmp_path) == ["a.txt"]


@smoke
@pytest.mark.parametrize("given", ["texts", "texts/*", "texts/*.txt"])
def test_a_second_run_reads_the_same_and_writes_the_same(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "texts" / name).write_text(generated_text(300))
    program().main([f"--input={given}", "--data_dir=texts"])
    before = contents(tmp_path / "texts")
    program().main([f"--input={given}", "--data_dir=texts"])
    assert contents(tmp_path / "texts") == before


# ----------------------------------------------------------------------------------------------------------------------
# at a terminal


def at_a_terminal(answer: bytes, cwd) -> tuple[int, str]:
    """(exit code, what is on the screen) of data/prepare.py --data_dir=. when answer is typed."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # the progress bar needs a width
    process = fork_server.Popen(
        [sys.executable, os.path.join(ROOT, PROGRAM), "--data_dir=."],
        cwd=str(cwd),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        env=environment(TERM="dumb"),
    )
    os.close(slave)
    screen, typed, end = b"", False, time.monotonic() + 30
    try:
        while time.monotonic() < end:
            if not select.select([master], [], [], 0.2)[0]:
                continue
            try:
                piece = os.read(master, 4096)
            except OSError:  # the other side is closed
                break
            screen += piece
            if not typed and b"Which text?" in screen:
                number = re.search(rb"(\d+)  my\.txt", screen)
                os.write(master, answer.replace(b"NUMBER", number[1] if number else b"?"))
                typed = True
        return process.wait(timeout=10), screen.decode()
    finally:
        process.kill()
        os.close(master)


@pytest.mark.parametrize("answer", [b"NUMBER\n", b"my.txt\n"])
def test_on_a_terminal_it_asks_and_offers_what_it_finds(tmp_path, answer):
    (tmp_path / "my.txt").write_text(generated_text(300), encoding="utf-8")
    code, screen = at_a_terminal(answer, tmp_path)
    assert code == 0 and "my.txt" in screen and "next: python " in screen, screen
    assert "%|" in screen  # a progress bar
    assert set(visible(tmp_path)) == {"my.txt", *BINS}


@pytest.mark.parametrize("answer", [b"\n", b"no such file\n", b"\x04", b"99999\n"])
def test_an_answer_that_is_no_text_is_a_sentence(tmp_path, answer):
    (tmp_path / "my.txt").write_text(generated_text(300), encoding="utf-8")
    code, screen = at_a_terminal(answer, tmp_path)
    assert code == 2 and "Traceback" not in screen and "prepare.py: " in screen, screen
    assert visible(tmp_path) == ["my.txt"]


# ----------------------------------------------------------------------------------------------------------------------
# all or nothing


def big_text(n_words: int, seed: int) -> str:
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(3000)]
    return "".join(word + (".\n" if i % 11 == 10 else " ") for i, word in enumerate(rng.choices(words, k=n_words)))


def loads(folder) -> bool:
    """Whether the data of a folder load and agree with their meta.json."""
    Corpus(str(folder)).tokenizer()
    meta = json.loads((folder / "meta.json").read_text())
    return all(os.path.getsize(folder / f"{split}.bin") == 2 * n for split, n in meta["tokens"].items())


@pytest.fixture
def old_data(tmp_path) -> dict[str, bytes]:
    """Files of data prepared in tmp_path before a.txt changed to a longer text."""
    (tmp_path / "a.txt").write_text(generated_text(500))
    prepare(str(tmp_path), Files([str(tmp_path / "a.txt")]), Vocabulary(), quiet=True)
    (tmp_path / "a.txt").write_text(big_text(100_000, 0))
    return {name: (tmp_path / name).read_bytes() for name in BINS}


def start_preparing(folder, tokenizer: str, **options) -> subprocess.Popen:
    command = [sys.executable, os.path.join(ROOT, PROGRAM), "a.txt", "--data_dir=.", f"--tokenizer={tokenizer}"]
    return fork_server.Popen(command, cwd=folder, start_new_session=True, env=environment(), **options)


def wait_for_ids(folder, process: subprocess.Popen):
    """Wait until process writes ids, or has ended."""
    end = time.monotonic() + 60
    while process.poll() is None and not (folder / STAGING_DIR / "train.bin").exists() and time.monotonic() < end:
        time.sleep(0.002)


@pytest.mark.parametrize("tokenizer", ["bpe", "word"])
def test_a_killed_run_leaves_the_old_data(tmp_path, old_data, tokenizer):
    rng, late, killed = random.Random(1), 0, 0
    for attempt in range(4):
        process = start_preparing(tmp_path, tokenizer, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            if attempt % 2:  # half of the kills come while it writes
                wait_for_ids(tmp_path, process)
            time.sleep(rng.random() * (0.02 if attempt % 2 else 0.4))
            late += (tmp_path / STAGING_DIR / "train.bin").exists()
            process.send_signal(signal.SIGKILL)
            code = process.wait(timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # processes that it started
        now = {name: (tmp_path / name).read_bytes() for name in BINS}
        killed += code != 0
        if code == 0 or now["meta.json"] != old_data["meta.json"]:  # all was done before
            assert loads(tmp_path)
            for name, content in old_data.items():
                (tmp_path / name).write_bytes(content)
        elif now != old_data:  # killed while the files were moved into place: nobody reads half of them
            with pytest.raises(UserError, match="run the same command again"):
                read_meta(str(tmp_path))
            shutil.rmtree(tmp_path / STAGING_DIR)
            for name, content in old_data.items():
                (tmp_path / name).write_bytes(content)
    assert killed >= 2 and late >= 1


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_the_old_data(tmp_path, old_data, signal_):
    (tmp_path / "a.txt").write_text(big_text(300_000, 0))  # which takes long enough for the signal
    process = start_preparing(tmp_path, "bpe", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for_ids(tmp_path, process)
    process.send_signal(signal_)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and b"Traceback" not in errors
    assert {name: (tmp_path / name).read_bytes() for name in BINS} == old_data
    if signal_ == signal.SIGINT:
        assert process.returncode == 130 and not (tmp_path / STAGING_DIR).exists()


KILLED_BETWEEN = """
import os, sys
sys.path.insert(0, {root!r})
from dongpt.text.documents import Texts
from dongpt.text.prepare import Vocabulary, prepare
replace, left = os.replace, [int(sys.argv[1])]
def dying(*names):
    if not left[0]:
        os.kill(os.getpid(), 9)
    left[0] -= 1
    replace(*names)
os.replace = os.rename = dying
prepare(sys.argv[2], Texts(["xyzw " * 100]), Vocabulary(), quiet=True)
"""


@pytest.mark.parametrize("n_renamed", [0, 1, 2])
def test_a_run_that_is_killed_between_two_renames_leaves_no_mixture_that_is_taken_for_good(tmp_path, n_renamed):
    """Old and new texts have the same length, so that sizes alone tell nothing."""
    prepare(str(tmp_path), Texts(["abcd " * 100]), Vocabulary(), quiet=True)
    code = KILLED_BETWEEN.format(root=ROOT)
    done = fork_server.run([sys.executable, "-c", code, str(n_renamed), str(tmp_path)], env=environment())
    assert done.returncode == -signal.SIGKILL
    if n_renamed == 2:  # one of the two files is in place
        with pytest.raises(ValueError, match="run the same command again"):
            Corpus(str(tmp_path))
        prepare(str(tmp_path), Texts(["xyzw " * 100]), Vocabulary(), quiet=True)
    assert "".join(decoded(tmp_path).values()) == ("xyzw " if n_renamed == 2 else "abcd ") * 100


@smoke
def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "a.txt").write_text(generated_text(300))
    (tmp_path / "file").write_text("in the way")
    refused(lambda: made(tmp_path / "file", Files([str(tmp_path / "a.txt")])))
    assert (tmp_path / "file").read_text() == "in the way"


@smoke
def test_a_text_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(generated_text(300))
    choose_val_buckets = preparing.choose_val_buckets

    def changed(*given_):
        (tmp_path / "a.txt").write_text(generated_text(301))
        return choose_val_buckets(*given_)

    monkeypatch.setattr(preparing, "choose_val_buckets", changed)
    assert "changed" in refused(lambda: made(tmp_path / "out", Files([str(tmp_path / "a.txt")])))
    assert not (tmp_path / "out").exists() or not visible(tmp_path / "out")


# ----------------------------------------------------------------------------------------------------------------------
# the same input gives the same bytes


@pytest.mark.parametrize("tokenizer", ["char", "word", "bpe"])
def test_the_same_input_gives_the_same_bytes_on_any_number_of_cores(tmp_path, tokenizer):
    cores = sorted(os.sched_getaffinity(0))
    text = big_text(30_000, 3) + "señor 😀 " * 100
    results = []
    for name, n in (("one", 1), ("three", 3), ("again", 3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(text, encoding="utf-8")
        code = f"""
import os, runpy, sys
import dongpt.text.prepare
dongpt.text.prepare.CHARS_PER_JOB = 2**14
os.sched_setaffinity(0, {cores[:n]})
sys.argv = [{os.path.join(ROOT, PROGRAM)!r}, "a.txt", "--data_dir=.", "--tokenizer={tokenizer}", "--document=line"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
        done = fork_server.run(
            [sys.executable, "-c", code], cwd=tmp_path / name, capture_output=True, env=environment(PYTHONPATH=ROOT)
        )
        assert done.returncode == 0 and done.stderr == b"", done.stderr
        results.append([(tmp_path / name / file).read_bytes() for file in BINS])
    assert results[0] == results[1] == results[2]
    assert json.loads(results[0][2])["split"] == "documents"


# ----------------------------------------------------------------------------------------------------------------------
# prepare never crashes, never writes half

PIECES = st.one_of(
    st.binary(max_size=40),
    st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.sampled_from(
        [
            codecs.BOM_UTF8,
            codecs.BOM_UTF16_LE,
            b"\r\n",
            b"\r",
            b"\n\n",
            b"\0",
            b"  ",
            b"text",
            b'{"text": "a b"}\n',
            b"text,b\n",
            b'"a",b\n',
            b"PAR1",
        ]
    ),
)
CONTENT = st.one_of(
    st.lists(PIECES, max_size=8).map(b"".join),
    st.text(min_size=20, max_size=300).map(str.encode),
    st.text(min_size=5, max_size=60).map(lambda text: text.encode("utf-16")),
    st.lists(st.text(max_size=30), min_size=1, max_size=25).map(
        lambda texts: "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    ),
)


@QUICK
@given(
    content=CONTENT,
    tokenizer=st.sampled_from(["char", "word", "bpe"]),
    document=st.sampled_from(["file", "line", "blank", "none"]),
    name=st.sampled_from(["a.txt"] * 4 + ["a.jsonl", "a.jsonl", "a.csv", "a.parquet", "a.txt.gz", "a.md.xz"]),
    packed=st.booleans(),
    encoding=st.sampled_from(["utf-8"] * 4 + ["cp1252", "utf-16-le"]),
    old=st.booleans(),
)
def test_prepare_never_crashes_and_never_writes_half(content, tokenizer, document, name, packed, encoding, old):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "CHUNK_BYTES", 16)
        patch.setattr(preparing, "CHARS_PER_JOB", 24)
        patch.setattr(preparing, "_n_cores", lambda: 1)
        path, out = os.path.join(folder, name), os.path.join(folder, "out")
        with open(path, "wb") as file:
            file.write(PACK[os.path.splitext(name)[1]](content) if packed and name.endswith(("gz", "xz")) else content)
        before = {}
        if old:
            prepare(out, Texts(["old text " * 9]), Vocabulary(), quiet=True)
            before = {one: open(os.path.join(out, one), "rb").read() for one in BINS}
        files = Files([path], document, encoding=encoding)
        try:
            prepared = prepare(out, files, Vocabulary(tokenizer, 300), quiet=True)
        except ValueError as error:
            assert isinstance(error, UserError), repr(error)
            after = {one: open(os.path.join(out, one), "rb").read() for one in visible(out)} if old else {}
            assert after == before and (old or not os.path.exists(out) or not visible(out))
            return
        assert visible(out) == sorted(BINS)
        Corpus(out).check(1, prepared.tokenizer.vocab_size)
        found = gather(files.read_documents())
        texts = decoded(out)
        assert prepared.meta["documents"] == len(found)
        if prepared.meta["split"] == "position" and tokenizer != "word":  # words: a test of their own
            assert "".join(texts.values()).replace(END, "") == "".join(found)
        characters = sum(prepared.meta["characters"].values())
        assert characters == sum(map(len, found))
        assert sum(prepared.meta["bytes"].values()) == sum(len(one.encode()) for one in found)


@QUICK
@given(
    text=st.text(min_size=40, max_size=200).filter(lambda text: text.strip() and "\0" not in text),
    tokenizer=st.sampled_from(["char", "bpe"]),
)
def test_any_text_comes_back_exactly(text, tokenizer):
    with tempfile.TemporaryDirectory() as folder:
        with open(path := os.path.join(folder, "a.txt"), "wb") as file:
            file.write(codecs.BOM_UTF8 + text.encode())
        meta = made(folder, Files([path]), tokenizer=tokenizer, vocab_size=260, val_fraction=0.5)
        plain = text.replace("\r\n", "\n").replace("\r", "\n")
        ids = {split: np.fromfile(os.path.join(folder, f"{split}.bin"), "<u2").tolist() for split in ("train", "val")}
        assert "".join(decoded(folder).values()) == plain
        lengths = from_dict(meta["tokenizer"]).byte_lengths()
        assert {split: int(lengths[part].sum()) for split, part in ids.items()} == meta["bytes"]
