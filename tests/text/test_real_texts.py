"""Texts as people have them: data/prepare.py on CSV dialects, Parquet types, JSON, archives, separators, own splits."""

import gzip
import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import unicodedata
import zipfile

import numpy as np
import pytest
from helpers import ROOT, expect_sentence, generated_text, run

from configurator import UserError
from dongpt.text.bins import open_data, read_meta
from dongpt.text.documents import BLANK, CHUNK_BYTES, Files, find_files
from dongpt.text.survey import FULL_CHARS, Survey
from dongpt.text.tokenizers import from_dict

END = "<|endoftext|>"
TEXTS = ["First, a text.", 'with "quotes"; and\nlines', "third\tone | é"]


def read(path, **options) -> list[str]:
    """The documents of a file, folder or pattern."""
    documents, parts = [], []
    for text, is_end in Files(find_files(str(path))[0], **options).read_documents():
        parts.append(text)
        if is_end:
            documents.append("".join(parts))
            parts = []
    assert not parts
    return documents


def problem(path, **options) -> str:
    with pytest.raises(UserError) as error:
        read(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def prepare(folder, *arguments: str) -> str:
    """What data/prepare.py prints; it writes to folder/data."""
    return run("data/prepare.py", f"--data_dir={folder / 'data'}", *arguments, cwd=folder).stdout


def refuse(folder, *arguments: str) -> str:
    """The sentence with which data/prepare.py refuses, having written nothing."""
    done = run("data/prepare.py", f"--data_dir={folder / 'data'}", *arguments, cwd=folder, check=2)
    assert not os.path.exists(folder / "data")
    expect_sentence(done)
    return done.stderr


def decoded(folder) -> dict[str, str]:
    """The prepared text of each split, with names of special tokens."""
    meta, splits, _ = open_data(str(folder / "data"))
    tokenizer = from_dict(meta["tokenizer"])
    return {split: tokenizer.decode(ids[:].tolist()) for split, ids in splits.items()}


# ----------------------------------------------------------------------------------------------------------------------
# CSV


def write_csv(path, rows: list[list[str]], delimiter: str, start: str = ""):
    import csv

    with open(path, "w", newline="", encoding="utf-8") as file:
        file.write(start)
        csv.writer(file, delimiter=delimiter).writerows(rows)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("start", ["", "\ufeff", "sep=\r\n"])
def test_the_header_line_tells_the_delimiter(tmp_path, delimiter, start):
    rows = [["id", "text", "a, b"], *([str(i), text, ""] for i, text in enumerate(TEXTS))]
    write_csv(tmp_path / "a.csv", rows, delimiter, start.replace("=", f"={delimiter}"))
    assert read(tmp_path / "a.csv") == TEXTS
    assert read(tmp_path / "a.csv", field="id") == ["0", "1", "2"]


def test_a_header_that_fits_commas_is_read_with_commas(tmp_path):
    (tmp_path / "a.csv").write_text('text,"a;b;text"\nx;y,z\n')
    assert read(tmp_path / "a.csv") == ["x;y"]
    (tmp_path / "b.csv").write_text("text\none;two\nthree\n")
    assert read(tmp_path / "b.csv") == ["one;two", "three"]
    (tmp_path / "c.csv").write_text('"a\n,b";text\n"1\n2";x\n')
    assert read(tmp_path / "c.csv") == ["x"]


def test_tsv_is_read_with_tabs(tmp_path):
    write_csv(tmp_path / "a.tsv", [["id", "text"], *([str(i), text] for i, text in enumerate(TEXTS))], "\t")
    assert read(tmp_path / "a.tsv") == TEXTS
    for delimiter in ",;|":  # as in files whose name is wrong
        write_csv(tmp_path / "b.tsv", [["id", "text"], ["1", "x, y; z"]], delimiter)
        assert read(tmp_path / "b.tsv") == ["x, y; z"]
    (tmp_path / "b.tsv").write_text("id,body\n1,x\n")
    assert "has no field 'text': pass --field=NAME, where NAME is one of 'id', 'body'" in problem(tmp_path / "b.tsv")


@pytest.mark.parametrize(
    "content, words",
    [
        ("id;body\n1;x\n", "has no field 'text': pass --field=NAME, where NAME is one of 'id', 'body'"),
        ("id;text\n1;x\n2\n", "line 3 has 1 columns, but line 1 has 2"),
        ("id;text\n1;x;y\n", "line 2 has 3 columns"),
        ('id;text\n1;"x\n', "line 2 is not valid CSV"),
        ('"id;text\n1;x\n' * 40_000, "has no field"),
        ("", "has no field 'text'"),
    ],
)
def test_bad_csv_is_a_sentence_with_its_line(tmp_path, content, words):
    (tmp_path / "a.csv").write_text(content)
    assert words in problem(tmp_path / "a.csv")


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("suffix, indent", [(".jsonl", None), (".json", None), (".json", 1)])
def test_json_named_as_csv_is_a_sentence(tmp_path, name, suffix, indent):
    records = [{"text": "one, two\tthree"}, {"text": "four"}]
    content = "\n".join(map(json.dumps, records)) if suffix == ".jsonl" else json.dumps(records, indent=indent)
    (tmp_path / name).write_text(content)
    assert problem(tmp_path / name).endswith(f"{name} contains JSON, not CSV: rename it so that it ends in {suffix}")


def test_null_and_blank_fields_are_left_out_and_counted(tmp_path):
    import pyarrow
    import pyarrow.parquet

    values = ["one " * 20, None, "", "  \n", "two " * 20]
    records = [{"text": value, "n": 1} for value in values]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "a.json").write_text(json.dumps(records, indent=1))
    write_csv(tmp_path / "a.csv", [["text", "n"], *([value or "", "1"] for value in values)], ";")
    table = pyarrow.table({"text": values, "n": [1] * len(values)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet"):
        files = Files([str(tmp_path / name)])
        assert [text for text, _ in files.read_documents()] == [values[0], values[-1]], name
        assert files.n_left_out == {BLANK: 3}
        printed = prepare(tmp_path, name)
        row, column = ("row", "column") if name in ("a.csv", "a.parquet") else ("record", "field")
        which = f"one per {row}; only the {column} 'text' is used"
        assert f"in 2 documents ({which}); skipped 3 blank documents" in printed
        assert read_meta(str(tmp_path / "data"))["left_out"] == 3


# ----------------------------------------------------------------------------------------------------------------------
# Parquet


def parquet_types() -> list[str]:
    return ["string", "large_string", "string_view", "binary", "large_binary", "dictionary", "null"]


@pytest.mark.parametrize("kind", parquet_types())
def test_every_type_of_text_in_parquet_is_read(tmp_path, kind):
    import pyarrow
    import pyarrow.parquet

    texts = [*TEXTS, None]
    if kind == "dictionary":
        column = pyarrow.array(texts).dictionary_encode()
    elif kind == "null":
        column = pyarrow.nulls(4)
    elif not hasattr(pyarrow, kind):
        pytest.skip(f"this pyarrow has no {kind}")
    elif "binary" in kind:
        column = pyarrow.array([t and t.encode("utf-8") for t in texts], getattr(pyarrow, kind)())
    else:
        column = pyarrow.array(texts, getattr(pyarrow, kind)())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ([] if kind == "null" else TEXTS)


def test_binary_parquet_that_is_not_text_is_a_sentence_with_its_row(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": [b"text", b"\x89PNG\xff"]}), tmp_path / "a.parquet")
    assert "a.parquet row 2: the field 'text' is binary and not UTF-8" in problem(tmp_path / "a.parquet")


# ----------------------------------------------------------------------------------------------------------------------
# JSON


@pytest.mark.parametrize("indent", [None, 2])
def test_a_named_json_file_is_read_as_records(tmp_path, indent):
    (tmp_path / "a.json").write_text(json.dumps([{"body": text} for text in TEXTS], indent=indent))
    assert read(tmp_path / "a.json", field="body") == TEXTS
    assert "record 1" in problem(tmp_path / "a.json") and "one of 'body'" in problem(tmp_path / "a.json")


@pytest.mark.parametrize(
    "content, words",
    [
        ('{"n": "1", "data": [{"text": "x"}]}', "line 1 has no field 'text', but a list of objects, 'data': save only"),
        ('{"n": 1, "data": [{"body": "x"}]}', "line 1 has no field 'text', but a list of objects, 'data': save only"),
        (
            '{"title": "x", "tags": [{"n": 1}]}',
            "line 1 has no field 'text': pass --field=NAME, where NAME is one of 'title', 'tags'",
        ),
        ('{"data": [], "n": [1]}', "line 1 has no field 'text': pass --field=NAME, where NAME is one of 'data', 'n'"),
        ('["x", "y"]', "record 1 (line 1) is not a JSON object"),
        ('[{"text": "x"}, {"text": ["y"]}]', "record 2 (line 1): the field 'text' must be text"),
        ('[{"text": "x"}, {"text": ', "record 2 (line 1): the file was cut off before the end of its JSON"),
        ("plain text", "line 1 is not JSON"),
    ],
)
def test_json_of_another_form_is_a_sentence_and_nothing_is_written(tmp_path, content, words):
    (tmp_path / "a.json").write_text(content)
    assert words in refuse(tmp_path, "a.json")


@pytest.mark.parametrize("form", ["array", "array by lines", "indented array", "indented objects", "part of an object"])
def test_json_lines_that_are_other_json_are_a_sentence_with_a_remedy(tmp_path, form):
    records = [{"text": text} for text in TEXTS]
    content = {
        "array": json.dumps(records),
        "array by lines": "[" + ",\n".join(map(json.dumps, records)) + "]\n",
        "indented array": "\n" + json.dumps(records, indent=2),
        "indented objects": "\n".join(json.dumps(record, indent=2) for record in records),
        "part of an object": "\n".join('{"n": 1,\n' + json.dumps(record)[1:] for record in records),
    }[form]
    for name in ("a.jsonl", "a.ndjson"):
        (tmp_path / name).write_text(content)
        assert f"{name} is not one JSON object per line: rename it so that it ends in .json" in problem(tmp_path / name)
    (tmp_path / "a.jsonl").rename(tmp_path / "a.json")
    assert read(tmp_path / "a.json") == TEXTS


# ----------------------------------------------------------------------------------------------------------------------
# archives and other kinds


def test_an_archive_gives_the_same_data_as_its_folder(tmp_path):
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    (tmp_path / "texts" / "b.txt").write_text(generated_text(2000))
    (tmp_path / "texts" / "a.md").write_text(generated_text(3000))
    (tmp_path / "texts" / "deep" / "c.jsonl").write_text('{"text": "a record"}\n{"text": ""}\n')
    (tmp_path / "texts" / "picture.png").write_bytes(b"\x89PNG")
    printed = prepare(tmp_path, "texts")
    folder = (tmp_path / "data" / "train.bin").read_bytes(), (tmp_path / "data" / "val.bin").read_bytes()
    with (
        zipfile.ZipFile(tmp_path / "texts.zip", "w") as archive,
        tarfile.open(tmp_path / "texts.tar.gz", "w:gz") as tar,
    ):
        for name in ("deep/c.jsonl", "picture.png", "b.txt", "a.md"):
            archive.write(tmp_path / "texts" / name, name)
            tar.add(tmp_path / "texts" / name, name)
    for name in ("texts.zip", "texts.tar.gz"):
        printed = prepare(tmp_path, name)
        assert f"skipped 1 other file in {name}" in printed and "plain text" not in printed
        files = (tmp_path / "data" / "train.bin").read_bytes(), (tmp_path / "data" / "val.bin").read_bytes()
        assert files == folder
        assert read_meta(str(tmp_path / "data"))["documents"] == 3


def test_json_named_as_text_is_read_as_it_is_with_a_note(tmp_path):
    for content in (
        '[\n{"text": "a"}\n]',
        '{"text": "a \\" b", "n": 1}\n' * 99,
        '\ufeff {"text":' + " " * 9999 + '"a"}',
    ):
        (tmp_path / "a.txt").write_text(content, encoding="utf-8")
        printed = prepare(tmp_path, "a.txt")
        assert "a.txt is read as plain text although it looks like JSON: rename it so that it ends in .json" in printed
    (tmp_path / "a.log").write_text('{"text": "a b c"}\n' * 99)
    assert "a.log is read as plain text although it looks like JSON" in prepare(tmp_path, "a.log")
    (tmp_path / "b.txt").write_text("{x} [1] {'text': 2}\n" * 99)
    assert "JSON" not in prepare(tmp_path, "b.txt")


def test_errors_in_an_archive_name_the_member(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("deep/a.txt", b"text \xff")
        archive.writestr("b.csv", "text;n\nx\n")
    assert "a.zip/b.csv line 2 has 1 columns" in problem(tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("deep/a.txt", b"text \xff")
    assert "b.zip/deep/a.txt is not UTF-8 at byte 5" in problem(tmp_path / "b.zip")


def test_one_damaged_character_in_utf8_is_not_taken_for_another_encoding(tmp_path):
    (tmp_path / "a.txt").write_bytes("señor ".encode() + b"\x93 text")
    message = problem(tmp_path / "a.txt")
    assert "is not UTF-8 at byte 7 (0x93), although other characters in it are valid UTF-8: correct this one" in message
    (tmp_path / "a.txt").write_bytes("señor \u201c text".encode("cp1252"))
    assert "convert it to UTF-8, or pass --encoding=NAME, such as cp1252" in problem(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes("春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。".encode("gbk"))
    assert "convert it to UTF-8, or pass --encoding=NAME" in problem(tmp_path / "a.txt")


def test_a_folder_that_save_to_disk_wrote_is_named_with_the_way_to_read_it(tmp_path):
    for name in ("data-00000-of-00001.arrow", "dataset_info.json", "state.json"):
        (tmp_path / "saved" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "saved" / name).write_text("{}")
    with pytest.raises(UserError, match=re.escape(f"data/prepare.py reads it as --input=hf:{tmp_path / 'saved'}")):
        find_files(str(tmp_path / "saved"))


def test_files_of_other_kinds_are_refused_and_nothing_is_written(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n")
    assert "a.pdf is a PDF, not text: convert it with pdftotext" in refuse(tmp_path, "a.pdf")
    with zipfile.ZipFile(tmp_path / "a.docx", "w") as archive:
        archive.writestr("word/document.xml", "<w/>")
    assert "a.docx is a Word document, not text" in refuse(tmp_path, "a.docx")
    (tmp_path / "page.txt").write_text("<!doctype html><p>text")
    assert "page.txt is HTML" in refuse(tmp_path, "page.txt")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text " * 1000)[:-20])
    assert "a.txt.gz cannot be decompressed" in refuse(tmp_path, "a.txt.gz")


def test_records_in_an_archive_are_counted_for_a_seeded_split(tmp_path):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.jsonl", '{"text": "x"}\n{"text": null}\n')
        archive.writestr("b.txt", "y")
    (tmp_path / "a.zip").write_bytes(file.getvalue())
    files = Files([str(tmp_path / "a.zip")], raw=True)
    assert files.count(files.paths[0]) == 3
    assert [*files.read_file(files.paths[0])] == [("x", True), ("", True), ("y", True)]


def test_binary_files_do_not_get_advice_about_encodings_of_windows(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\x01\0\xfe\xca" * 50)
    assert "contains NULs: pass a text file" in problem(tmp_path / "a.txt")


def test_a_folder_with_only_json_says_to_name_the_file(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.json").write_text("[]")
    with pytest.raises(UserError, match="to read .*a.json, pass its path"):
        find_files(str(tmp_path / "texts"))


def test_summaries_leave_out_null_fields_with_a_count(tmp_path, monkeypatch, capsys):
    rows = [{"text": f"{i} " + generated_text(40, seed=i), "summary": f"number {i}"} for i in range(30)]
    rows += [{"text": None, "summary": "x"}, {"text": "x", "summary": " "}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    spec = importlib.util.spec_from_file_location("prepare_sum", os.path.join(ROOT, "data", "sum", "prepare.py"))
    program = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, program)  # dataclasses look there
    spec.loader.exec_module(program)
    program.FOLDER = str(tmp_path / "sum")
    program.main([f"--input={tmp_path / 'a.json'}", "--tokenizer=char"])
    printed = capsys.readouterr().out
    assert "in 30 documents; skipped 2 records with an empty field" in printed


# ----------------------------------------------------------------------------------------------------------------------
# --separator


@pytest.mark.parametrize("tail", ["", "\n", f"\n{END}", f"\n{END}\n", f"\n  {END}\t\n\n"])
def test_a_separator_line_ends_a_document_and_is_left_out(tmp_path, tail):
    (tmp_path / "a.txt").write_text(f"one\n\nmore\n{END}\n  {END} \ntwo {END} not\n\t{END}\n{END}x\nthree{tail}")
    documents = read(tmp_path / "a.txt", separator=END)
    assert [text.rstrip() for text in documents] == ["one\n\nmore", f"two {END} not", f"{END}x\nthree"]
    assert documents[0] == "one\n\nmore\n"


def test_separators_do_not_depend_on_chunks(tmp_path):
    long = "x" * (CHUNK_BYTES - len(END) // 2)
    text = f"{long}\n{END}\n{'y ' * CHUNK_BYTES}\n{END}\n{'z' * (3 * CHUNK_BYTES)}{END}\nlast"
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text(f"{END}\nb")
    (tmp_path / "c.txt").write_text("c")
    documents = read(tmp_path, separator=END)
    first, second, third = text.split(f"\n{END}\n")
    assert documents == [f"{first}\n", f"{second}\n", third, "b", "c"]


def test_a_separator_gives_end_tokens_and_its_absence_is_a_sentence(tmp_path):
    texts = [generated_text(200, seed=i).strip() for i in range(30)]
    (tmp_path / "a.txt").write_text(f"\n{END}\n".join(texts))
    printed = prepare(tmp_path, "a.txt", f"--separator={END}")
    assert "30 documents" in printed and "contains" not in printed
    both = decoded(tmp_path)
    assert both["train"].count(END) + both["val"].count(END) == 30
    os.rename(tmp_path / "data", tmp_path / "old")
    assert "no line of the text that starts in a.txt consists of '<|end|>': correct --separator" in refuse(
        tmp_path, "a.txt", "--separator=<|end|>"
    )
    assert "both divide the text" in refuse(tmp_path, "a.txt", f"--separator={END}", "--document=line")


# ----------------------------------------------------------------------------------------------------------------------
# names of special tokens in the text, and Unicode forms


def test_names_of_special_tokens_in_the_text_are_reported(tmp_path):
    (tmp_path / "a.txt").write_text(f"\n{END}\n".join([generated_text(300)] * 31) + "<|mine|>")
    printed = prepare(tmp_path, "a.txt", "--special=<|mine|>")
    assert printed.index("the text contains") < printed.index("written to")
    assert f"the text contains {END} 30 times" in printed and f"pass --separator='{END}'" in printed
    assert "the text contains <|mine|> once" in printed and "remove it from the text" in printed


def test_byte_order_marks_inside_a_file_are_reported(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeff" + "one text\n" * 50 + "\ufeffanother\n" * 2, encoding="utf-8")
    printed = prepare(tmp_path, "a.txt")
    assert "the text contains U+FEFF (a byte-order mark) 2 times elsewhere than at the start of a file" in printed
    assert printed.index("U+FEFF") < printed.index("written to")


def test_a_name_is_found_wherever_the_text_is_cut():
    text = f"a {END} b{END}{END}\n" * 5
    for size in (1, 2, 5, 12, 13, 1000):
        survey = Survey([END, "<|x|>", "a"])
        for i in range(0, len(text), size):
            survey.add(text[i : i + size], False)
            survey._flush()
        assert survey.counts == {END: 15, "<|x|>": 0, "a": 5}
    survey = Survey([END])
    for part in ("<|endof", "text|>"):  # two documents
        survey.add(part, True)
    assert survey.lines() == []


@pytest.mark.parametrize(
    "kind, words", [("NFC", ": NFC, 30 accents"), ("NFD", ": NFD, 30 accents"), ("mixed", "mixed")]
)
def test_the_unicode_form_of_a_text_is_reported(tmp_path, kind, words):
    text = "caf\u00e9 \u2019 " * 30
    text = text + unicodedata.normalize("NFD", text) if kind == "mixed" else unicodedata.normalize(kind, text)
    (tmp_path / "a.txt").write_text(text * 3, encoding="utf-8")
    printed = prepare(tmp_path, "a.txt")
    if kind == "mixed":
        words = (
            "mixed normal forms, since 90 accents are precomposed and 90 are combining: convert the text to one form"
        )
    else:
        words = f"{kind}, 90 accents {'are part of' if kind == 'NFC' else 'follow'} their letter"
    assert f"Unicode: {words}" in printed
    (tmp_path / "b.txt").write_text("plain \u2019 text" * 30, encoding="utf-8")
    assert "Unicode" not in prepare(tmp_path, "b.txt")


@pytest.mark.parametrize("char", ["\u0958", "\ufb2a", "\u212b", "\uf900"])
def test_characters_that_no_normal_form_contains_are_reported(char):
    survey = Survey([END])
    survey.add(f"caf\u00e9 {char}x " * 3, True)
    (line,) = survey.lines()
    assert f"since NFC and NFD replace 3 characters, such as U+{ord(char):04X}" in line


def test_long_texts_are_sampled_for_their_unicode_form():
    survey = Survey([END])
    for _ in range(40):
        survey.add("caf\u00e9 " * 2**16, True)
    (line,) = survey.lines()
    assert line.startswith("Unicode: NFC, ") and "in a sample" in line
    assert FULL_CHARS < survey.n_examined < 2 * FULL_CHARS + survey.n_characters / 32


# ----------------------------------------------------------------------------------------------------------------------
# the validation text


def write_folder(tmp_path) -> dict[str, str]:
    (tmp_path / "texts").mkdir()
    texts = {name: generated_text(2000, seed=i) for i, name in enumerate(("dev", "one", "two"))}
    for name, text in texts.items():
        (tmp_path / "texts" / f"{name}.txt").write_text(text)
    return texts


@pytest.mark.parametrize(
    "rows, line",
    [
        (["id\ttext", '1\t"Hello there', "2\tsecond line", '3\tthird "'], 4),
        (["text\tid", '"Hello, he said.\t1', 'How are you?"\t2', "Fine.\t3"], 3),
        (["id\ttext\tn", '1\t"Well,\t2', '3\tgood."\t4'], 3),
    ],
)
def test_quotation_marks_that_are_text_swallow_no_rows_of_tsv(tmp_path, rows, line):
    """The command in the sentence gives all rows."""
    (tmp_path / "FILE.tsv").write_text("\n".join(rows) + "\n")
    sentence = problem(tmp_path / "FILE.tsv")
    assert f"FILE.tsv line {line}: quotation marks make one row of lines that are complete rows" in sentence
    command = sentence.partition("convert the file with python")[2].rpartition(", and otherwise")[0]
    subprocess.run(shlex.quote(sys.executable) + command, shell=True, cwd=tmp_path, check=True)
    column = rows[0].split("\t").index("text")
    assert read(tmp_path / "FILE.csv") == [row.split("\t")[column] for row in rows[1:]]


def test_quoted_lines_of_tsv_may_have_tabs(tmp_path):
    pandas = pytest.importorskip("pandas")
    texts = ["My table:\nkey\tvalue\nend", 'two\nlines, "quoted"', "a\nb\tc", "last"]
    pandas.DataFrame({"id": range(4), "text": texts}).to_csv(tmp_path / "a.tsv", sep="\t", index=False)
    assert read(tmp_path / "a.tsv") == texts  # the third looks like two rows, but the first does not
    pandas.DataFrame({"id": [1], "text": texts[2]}).to_csv(tmp_path / "a.tsv", sep="\t", index=False)
    assert "and otherwise without quoting=3" in problem(tmp_path / "a.tsv")


def test_an_archive_that_holds_a_validation_text_says_so(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("dev.txt", "train.txt"):
            archive.writestr(name, generated_text(500))
    assert "a.zip/dev.txt is part of the training text" in prepare(tmp_path, "a.zip")
    (tmp_path / "b.txt").write_text(generated_text(500))
    for option in ("--val_fraction=0", "--val_input=b.txt"):
        printed = prepare(tmp_path, "a.zip", option)
        assert "a.zip/dev.txt is part of the training text" in printed and "pass a folder without that file" in printed


def test_a_validation_text_needs_no_separators(tmp_path):
    (tmp_path / "a.txt").write_text("one text\n##\nanother text\n##\n" * 30)
    (tmp_path / "b.txt").write_text("one text another text\n" * 9)
    assert "in 61 documents" in prepare(tmp_path, "a.txt", "--val_input=b.txt", "--separator=##")


def test_a_folder_that_is_split_by_position_says_so_and_names_a_validation_file(tmp_path):
    write_folder(tmp_path)
    printed = prepare(tmp_path, "texts")
    dev, two = os.path.join("texts", "dev.txt"), os.path.join("texts", "two.txt")
    assert f"{dev} is part of the input, although its name" in printed and f"pass --val_input={dev}" in printed
    assert f"sorted by name ({two} is the last one): pass --val_input=FILE" in printed
    (tmp_path / "texts" / "dev.txt").rename(tmp_path / "texts" / "devices.txt")
    assert "although its name" not in prepare(tmp_path, "texts")


def test_a_test_file_in_the_input_is_named_whatever_the_validation_text_is(tmp_path):
    write_folder(tmp_path)
    dev, test = os.path.join("texts", "dev.txt"), os.path.join("texts", "test.txt")
    (tmp_path / "texts" / "two.txt").rename(tmp_path / test)
    (tmp_path / "other.txt").write_text(generated_text(500))
    note = "is part of the input, although its name sounds like a validation or test text"
    printed = prepare(tmp_path, "texts", f"--val_input={dev}")
    assert f"{test} {note}: move it elsewhere to leave it out" in printed and f"{dev} {note}" not in printed
    for option in ("--val_fraction=0", "--val_input=other.txt"):
        printed = prepare(tmp_path, "texts", option)
        assert f"{dev} {note}" in printed and f"{test} {note}" in printed and "pass --val_input" not in printed
    assert note not in prepare(tmp_path, test, f"--val_input={dev}")


@pytest.mark.parametrize("tokenizer", ["char", "word", "bpe"])
def test_a_validation_text_of_its_own(tmp_path, tokenizer):
    texts = write_folder(tmp_path)
    arguments = [f"--tokenizer={tokenizer}", *(["--vocab_size=300"] if tokenizer == "bpe" else [])]
    printed = prepare(tmp_path, "texts", "--val_input=texts/dev.txt", *arguments)
    assert "; excluding 1 file from the training text" in printed and "although its name" not in printed
    splits = decoded(tmp_path)
    assert splits["val"].replace(END, "") == texts["dev"]
    assert splits["train"].replace(END, "") == texts["one"] + texts["two"]
    assert read_meta(str(tmp_path / "data"))["split"] == "given" and "a separate text" in printed


def test_one_training_and_one_validation_file_need_no_end_token(tmp_path):
    texts = write_folder(tmp_path)
    prepare(tmp_path, "texts/one.txt", "--val_input=texts/two.txt")
    assert decoded(tmp_path) == {"train": texts["one"], "val": texts["two"]}


def test_bad_validation_texts_are_sentences(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "blank.txt").write_text(" \n")
    assert "no text was found at none.txt" in refuse(tmp_path, "texts", "--val_input=none.txt")
    assert "pass --val_input=PATH" in refuse(tmp_path, "texts", "--val_input=none.txt")
    assert "covers the whole input" in refuse(tmp_path, "texts", "--val_input=texts")
    assert "the validation text is blank" in refuse(tmp_path, "texts", "--val_input=blank.txt")
    assert "pass only one" in refuse(tmp_path, "texts", "--val_input=texts/dev.txt", "--val_fraction=0.2")


def test_no_validation_text(tmp_path):
    """train.py measures the loss on the training text and says so; evaluate.py and explore.py say what to do."""
    (tmp_path / "a.txt").write_text(text := generated_text(2000))
    printed = prepare(tmp_path, "a.txt", "--val_fraction=0")
    assert "0 for validation (no validation set)" in printed
    assert decoded(tmp_path) == {"train": text, "val": ""}
    assert np.fromfile(tmp_path / "data" / "val.bin", "<u2").size == 0
    data = f"--data_dir={tmp_path / 'data'}"
    model = ["--n_layer=1", "--n_head=1", "--n_embd=8", "--block_size=16", "--batch_size=2", "--max_iters=2"]
    options = [*model, "--eval_interval=2", "--eval_iters=2", "--device=cpu", "--compile=False", "--out_dir=out"]
    printed = run("train.py", data, *options, cwd=tmp_path).stdout
    assert "none for validation, so val losses are measured on the training set" in printed
    assert "final: the loss on the whole training set is" in printed
    assert os.path.exists(tmp_path / "out" / "ckpt.pt")
    printed = run("data/check.py", data, cwd=tmp_path).stdout
    assert "val: the data was prepared without a validation set" in printed and "train:" in printed
    done = run("evaluate.py", "--out_dir=out", "--device=cpu", cwd=tmp_path, check=2)
    expect_sentence(done, "has no validation set: pass --split=train")
    assert "train" in run("evaluate.py", "--out_dir=out", "--split=train", "--device=cpu", cwd=tmp_path).stdout
    done = run("data/explore.py", data, cwd=tmp_path, check=2)
    expect_sentence(done, "has no validation set to compare with")


def test_a_missing_or_empty_validation_file_that_was_not_declared_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text(generated_text(2000))
    prepare(tmp_path, "a.txt")
    for damage in (lambda path: open(path, "wb").close(), os.remove):
        damage(tmp_path / "data" / "val.bin")
        with pytest.raises(UserError, match="val.bin"):
            open_data(str(tmp_path / "data"))


def test_a_repeated_column_is_a_sentence(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table([["one"], ["two"], [3]], names=["text", "text", "n"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("text,text\none,two\n", encoding="utf-8")
    for name in ("a.parquet", "a.csv"):
        with pytest.raises(UserError, match=f"{name}.* has several columns named 'text'"):
            list(Files([str(tmp_path / name)]).read_documents())
