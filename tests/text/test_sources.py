"""Where texts come from: reading, Project Gutenberg's markers, downloads, and the prepare.py programs."""

import http.server
import json
import os
import re
import runpy
import shutil
import sys
import threading
import types
from dataclasses import replace

import fork_server
import numpy as np
import pytest
from helpers import ROOT, expect_sentence, generated_text, visible

from dongpt.text import sources
from dongpt.text.sources import BookConfig, TextDownload, download_text, prepare_text, read_text, strip_gutenberg
from dongpt.text.tokenizers import from_dict

smoke = pytest.mark.smoke
NO_NETWORK = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
NO_NETWORK.update(no_proxy="", NO_PROXY="")  # port 9 refuses at once


# ----------------------------------------------------------------------------------------------------------------------
# reading


@smoke
@pytest.mark.parametrize(
    "content, text",
    [
        ("señor “quoted” 😀\n".encode(), "señor “quoted” 😀\n"),
        (b"\xef\xbb\xbfwith a mark\n", "with a mark\n"),
        (b"one\r\ntwo\rthree\nfour", "one\ntwo\nthree\nfour"),
        (b"a\n\r\nb\r\rc", "a\n\nb\n\nc"),
    ],
)
def test_a_text_is_read_as_utf8_with_plain_line_ends(tmp_path, content, text):
    (tmp_path / "text.txt").write_bytes(content)
    assert read_text(str(tmp_path / "text.txt"))[0] == text


@smoke
def test_the_hash_is_that_of_the_file(tmp_path):
    import hashlib

    content = b"\xef\xbb\xbfone\r\ntwo"
    (tmp_path / "text.txt").write_bytes(content)
    assert read_text(str(tmp_path / "text.txt"))[1] == hashlib.sha256(content).hexdigest()


@smoke
@pytest.mark.parametrize(
    "content, part",
    [
        ("ab señor".encode("latin-1"), "byte 5"),
        (b"\xef\xbb\xbf", "empty"),
        (b"", "empty"),
        (b" \r\n\n", "empty"),
        (None, "cannot be read"),
    ],
)
def test_a_text_that_cannot_be_used_is_refused_by_name(tmp_path, content, part):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_text(str(path))
    assert str(path) in str(caught.value) and part in str(caught.value)


@smoke
def test_a_byte_offset_counts_the_byte_order_mark_too(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbfab\xff")
    with pytest.raises(ValueError, match="byte 5"):
        read_text(str(tmp_path / "text.txt"))


@smoke
def test_a_folder_is_no_text(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_text(str(tmp_path))


# ----------------------------------------------------------------------------------------------------------------------
# header and licence

HEADER, LICENCE = "The Project Gutenberg EBook\n\n", "\nEnd of it\n"


@smoke
@pytest.mark.parametrize(
    "marker",
    [
        "*** {} OF THE PROJECT GUTENBERG EBOOK DON QUIXOTE ***",
        "*** {} OF THIS PROJECT GUTENBERG EBOOK DON QUIXOTE ***",
        "***{} OF THE PROJECT GUTENBERG EBOOK, A LONG\nTITLE OVER TWO LINES***",
    ],
)
def test_header_and_licence_are_cut_at_the_markers(marker):
    book = "In a village\n\nof La Mancha\n"
    text = f"{HEADER}{marker.format('START')}\n\n{book}\n\n{marker.format('END')}\n{LICENCE}"
    assert strip_gutenberg(text) == (book, True)


@smoke
def test_one_marker_alone_cuts_on_its_side():
    start, end = (f"*** {word} OF THE PROJECT GUTENBERG EBOOK X ***\n" for word in ("START", "END"))
    assert strip_gutenberg(HEADER + start + "book\n") == ("book\n", True)
    assert strip_gutenberg("book\n" + end + LICENCE) == ("book\n", True)


@smoke
@pytest.mark.parametrize(
    "text",
    [
        "no markers at all\n",
        "\n\nspace around is kept\n\n",
        "*** a line of stars ***\n",
        "He wrote *** START OF THE PROJECT GUTENBERG EBOOK X *** in the margin\n",
    ],
)
def test_a_text_without_markers_is_kept_whole(text):
    assert strip_gutenberg(text) == (text, False)


def prepared_book(folder, text: str, raw: bool) -> str:
    """The text that prepare_text makes of a book."""
    (folder / "text.txt").write_text(text, encoding="utf-8")
    prepare_text(BookConfig(str(folder / "text.txt"), raw=raw), str(folder), sources.DON_QUIXOTE, "char", "quickstart")
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    ids = [i for split in ("train", "val") for i in np.fromfile(folder / f"{split}.bin", "<u2").tolist()]
    return from_dict(meta["tokenizer"]).decode(ids)


@smoke
def test_raw_keeps_the_header_and_a_text_without_markers_is_said_to_be_kept_whole(tmp_path, capsys):
    book = "In a village of La Mancha, the name of which I have no desire to recall\n"
    text = f"{HEADER}*** START OF THE PROJECT GUTENBERG EBOOK X ***\n{book}"
    assert prepared_book(tmp_path, text, raw=True) == text
    assert prepared_book(tmp_path, text, raw=False) == book
    assert "using all of it" not in capsys.readouterr().out
    assert prepared_book(tmp_path, book, raw=False) == book
    assert capsys.readouterr().out.count("using all of it") == 1


# ----------------------------------------------------------------------------------------------------------------------
# downloads, from a server on this machine

BOOK = ("The Project Gutenberg EBook of Don Quixote\n" + generated_text(800)).encode()
ANSWERS = {
    "/good.txt": (200, BOOK),
    "/marked.txt": (200, b"\xef\xbb\xbf" + BOOK),
    "/page.txt": (200, b"\n<!DOCTYPE html><title>Don Quixote</title>" + BOOK),
    "/short.txt": (200, b"Don Quixote"),
    "/empty.txt": (200, b""),
    "/long.txt": (200, BOOK * 3),
    "/other.txt": (200, BOOK.replace(b"Don Quixote", b"Moby-Dick")),
    "/missing.txt": (404, BOOK),
}
DOWNLOAD = TextDownload("Don Quixote", len(BOOK) // 2, 2 * len(BOOK), ())


class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        cut = self.path == "/cut.txt"  # the connection breaks after three quarters of what was announced
        status, content = (200, BOOK) if cut else ANSWERS[self.path]
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) * 3 // 4] if cut else content)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    """Address of a server that gives ANSWERS."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def download(server, monkeypatch):
    """A TextDownload with the addresses of these pages, asked without a proxy."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return lambda *pages: replace(DOWNLOAD, addresses=tuple(f"{server}/{page}.txt" for page in pages))


@smoke
@pytest.mark.parametrize("page", ["page", "short", "empty", "long", "other", "missing", "cut"])
def test_an_implausible_answer_is_refused_and_leaves_nothing(tmp_path, download, page):
    with pytest.raises(ValueError) as caught:
        download_text(download(page), str(tmp_path / "input.txt"))
    for part in ("Don Quixote", "127.0.0.1", "--input", "input.txt"):
        assert part in str(caught.value)
    assert not list(tmp_path.iterdir())


@smoke
def test_the_first_address_with_a_plausible_answer_wins(tmp_path, download):
    download_text(download("page", "good", "missing"), str(tmp_path / "input.txt"))
    assert (tmp_path / "input.txt").read_bytes() == BOOK
    assert os.listdir(tmp_path) == ["input.txt"]


@smoke
def test_a_download_may_begin_with_a_byte_order_mark(tmp_path, download):
    download_text(download("marked"), str(tmp_path / "input.txt"))
    assert read_text(str(tmp_path / "input.txt"))[0] == BOOK.decode()


@smoke
def test_a_failed_download_names_the_problem_of_every_address(tmp_path, download):
    with pytest.raises(ValueError) as caught:
        download_text(download("missing", "other", "page"), str(tmp_path / "input.txt"))
    for part in ("Not Found", "does not contain", "web page"):
        assert part in str(caught.value)


@smoke
def test_a_download_that_cannot_be_stored_is_a_sentence(tmp_path, download):
    with pytest.raises(ValueError):
        download_text(download("good"), str(tmp_path / "no" / "such" / "folder" / "input.txt"))


@smoke
def test_a_given_text_goes_before_a_local_one_and_that_before_a_download(tmp_path, download):
    folder, given = str(tmp_path), str(tmp_path / "given.txt")
    assert sources.find_text(given, folder, download("missing")) == given
    (tmp_path / "input.txt").write_text("local", encoding="utf-8")
    assert sources.find_text("", folder, download("missing")) == str(tmp_path / "input.txt")
    assert (tmp_path / "input.txt").read_text(encoding="utf-8") == "local"
    (tmp_path / "input.txt").unlink()
    assert read_text(sources.find_text("", folder, download("good")))[0] == BOOK.decode()


@smoke
def test_the_real_addresses_are_gutenbergs_and_a_mirrors():
    hosts = {address.split("/")[2] for address in sources.DON_QUIXOTE.addresses}
    assert "www.gutenberg.org" in hosts and len(hosts) > 1
    assert all(address.startswith("https://") for address in sources.DON_QUIXOTE.addresses)


# ----------------------------------------------------------------------------------------------------------------------
# the programs, in a copy of the tree, since they write beside themselves


@pytest.fixture
def tree(tmp_path):
    """A copy of the programs, with no data prepared."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in os.listdir(ROOT):
        if name.endswith(".py"):
            shutil.copy(os.path.join(ROOT, name), tree)
    ignored = shutil.ignore_patterns("*.bin", "meta.*", "input.txt", "*.part", "__pycache__")
    for name in ("dongpt", "data"):
        shutil.copytree(os.path.join(ROOT, name), tree / name, ignore=ignored)
    return tree


def prepare(tree, name, *args, env=None, cwd=None, check: int | None = 0):
    """Run data/name/prepare.py of a copied tree without a network; returns the CompletedProcess."""
    environment = {**os.environ, **NO_NETWORK, "OMP_NUM_THREADS": "1", **(env or {})}
    done = fork_server.run(
        [sys.executable, str(tree / "data" / name / "prepare.py"), *args],
        cwd=cwd or tree.parent,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
    )
    assert check is None or done.returncode == check, done.stdout + done.stderr
    return done


def files_of(tree, name) -> set[str]:
    return set(visible(tree / "data" / name)) - {"__pycache__"}


def ids_of(tree, name) -> list[int]:
    """All ids of a prepared folder, train and val behind each other."""
    return sum((np.fromfile(tree / "data" / name / f"{split}.bin", "<u2").tolist() for split in ("train", "val")), [])


@pytest.mark.parametrize("name", ["don", "don_char"])
def test_offline_without_a_text_the_program_names_both_remedies_and_writes_nothing(tree, name):
    before = files_of(tree, name)
    for _ in range(2):  # the second run must not find an empty corpus
        done = prepare(tree, name, check=None)
        expect_sentence(done, "--input", os.path.join("data", name, "input.txt"))
        assert files_of(tree, name) == before


@pytest.mark.parametrize("content", [None, b"", b"caf\xe9"])
def test_an_input_that_cannot_be_used_is_a_sentence_and_writes_nothing(tree, tmp_path, content):
    if content is not None:
        (tmp_path / "mine.txt").write_bytes(content)
    done = prepare(tree, "don_char", "--input=mine.txt", cwd=tmp_path, check=None)
    expect_sentence(done, "mine.txt")
    assert files_of(tree, "don_char") == {"prepare.py"}


def test_input_is_relative_to_the_working_directory(tree, tmp_path):
    text = generated_text(300)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine.txt").write_text(text, encoding="utf-8", newline="")
    done = prepare(tree, "don_char", "--input=mine.txt", cwd=tmp_path / "elsewhere")
    assert ids_of(tree, "don_char") == [sorted(set(text)).index(c) for c in text]
    assert f"{len(text):,}" in done.stdout and "using all of it" in done.stdout
    assert files_of(tree, "don_char") == {"prepare.py", "train.bin", "val.bin", "meta.json"}


def test_input_txt_beside_the_script_is_taken_and_left_as_it_is(tree):
    text = generated_text(300)
    path = tree / "data" / "don_char" / "input.txt"
    path.write_bytes(text.replace("\n", "\r\n").encode())
    prepare(tree, "don_char")
    assert ids_of(tree, "don_char") == [sorted(set(text)).index(c) for c in text]
    assert path.read_bytes() == text.replace("\n", "\r\n").encode()


def test_a_corpus_that_is_there_survives_a_failed_preparation(tree, tmp_path):
    (tmp_path / "mine.txt").write_text(generated_text(300), encoding="utf-8")
    prepare(tree, "don_char", "--input=mine.txt", cwd=tmp_path)
    before = ids_of(tree, "don_char")
    expect_sentence(prepare(tree, "don_char", check=None))
    assert ids_of(tree, "don_char") == before


def test_characters_are_printed_whatever_the_encoding_of_the_terminal(tree, tmp_path):
    (tmp_path / "mine.txt").write_text(generated_text(300) + "señor ñandú", encoding="utf-8")
    done = prepare(tree, "don_char", "--input=mine.txt", cwd=tmp_path, env={"PYTHONIOENCODING": "ascii"}, check=None)
    assert done.returncode == 0 and "for validation" in done.stdout, done.stderr


def test_don_quixote_raw_gives_the_counts_and_ids_of_nanogpt(tree, don_quixote):
    done = prepare(tree, "don_char", f"--input={don_quixote}", "--raw=True")
    for count in ("2,307,844", "vocabulary: 85 characters", "2,077,059", "230,785"):
        assert count in done.stdout
    with open(don_quixote, encoding="utf-8") as file:
        text = file.read()
    stoi = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = np.array([stoi[c] for c in text], dtype=np.uint16)
    n = int(len(text) * 0.9)
    assert (tree / "data" / "don_char" / "train.bin").read_bytes() == ids[:n].astype("<u2").tobytes()
    assert (tree / "data" / "don_char" / "val.bin").read_bytes() == ids[n:].astype("<u2").tobytes()


def test_don_quixote_loses_header_and_licence_unless_raw(don_quixote):
    raw = read_text(don_quixote)[0]
    book = strip_gutenberg(raw)[0]
    assert "Gutenberg License" in raw and "START OF THIS PROJECT" in raw
    assert book.count("Gutenberg") <= 1 < 80 < raw.count("Gutenberg")  # one line of the book names where it ends
    assert "License" not in book and "DON QUIXOTE" in book and "La Mancha" in book
    assert book in raw and 0.98 < len(book) / len(raw) < 1


def test_don_writes_the_ids_of_gpt2(tree, tmp_path, gpt2_vocabulary):
    import tiktoken

    text = generated_text(600)
    (tmp_path / "mine.txt").write_text(text, encoding="utf-8", newline="")
    prepare(tree, "don", "--input=mine.txt", cwd=tmp_path)
    n, gpt2 = int(len(text) * 0.9), tiktoken.get_encoding("gpt2")
    assert ids_of(tree, "don") == gpt2.encode_ordinary(text[:n]) + gpt2.encode_ordinary(text[n:])
    meta = json.loads((tree / "data" / "don" / "meta.json").read_text(encoding="utf-8"))
    assert meta["tokenizer"]["kind"] == "gpt2" and meta["vocab_size"] == 50257
    assert sum(meta["bytes"].values()) == len(text.encode())


def test_don_without_gpt2s_vocabulary_is_a_sentence(tree, tmp_path):
    (tmp_path / "mine.txt").write_text(generated_text(300), encoding="utf-8")
    done = prepare(
        tree, "don", "--input=mine.txt", cwd=tmp_path, check=None, env={"TIKTOKEN_CACHE_DIR": str(tmp_path / "nothing")}
    )
    expect_sentence(done, "TIKTOKEN_CACHE_DIR")
    assert files_of(tree, "don") == {"prepare.py"}


NEXT_COMMANDS = {
    "don_char": "config/best_don_char_cpu.py",
    "don_word": "config/train_don_word.py",
    "shakespeare_char": "config/quickstart.py --dataset=shakespeare_char --out_dir=out-shakespeare-char",
}


@pytest.mark.parametrize("name", NEXT_COMMANDS)
def test_the_command_that_trains_on_it_is_printed(tree, tmp_path, name):
    (tmp_path / "mine.txt").write_text(generated_text(300), encoding="utf-8")
    done = prepare(tree, name, "--input=mine.txt", cwd=tmp_path)
    assert f"\nnext: python train.py {NEXT_COMMANDS[name]}\n" in done.stdout
    config = NEXT_COMMANDS[name].split()
    with open(os.path.join(ROOT, config[0]), encoding="utf-8") as file:
        assert f"--dataset={name}" in config or f'dataset = "{name}"' in file.read()


def python_docs() -> dict:
    """data/python_docs/prepare.py as a namespace."""
    return runpy.run_path(os.path.join(ROOT, "data", "python_docs", "prepare.py"), run_name="imported")


def test_python_docs_needs_no_network_and_reports_what_it_wrote(tree):
    done = prepare(tree, "python_docs")
    meta = json.loads((tree / "data" / "python_docs" / "meta.json").read_text(encoding="utf-8"))
    ids = ids_of(tree, "python_docs")
    assert len(ids) == sum(meta["characters"].values()) > 150_000 and max(ids) == meta["vocab_size"] - 1
    assert f"{len(ids):,}" in done.stdout and "pydoc_data" in meta["source"]
    assert done.stdout.splitlines()[-1] == "next: python train.py config/quickstart.py"


def test_python_docs_takes_docstrings_where_pydoc_data_is_missing(tree, tmp_path):
    stub = tmp_path / "stub" / "pydoc_data"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("")
    done = prepare(tree, "python_docs", env={"PYTHONPATH": str(stub.parent)})
    meta = json.loads((tree / "data" / "python_docs" / "meta.json").read_text(encoding="utf-8"))
    assert "docstrings" in done.stdout and "pydoc_data" not in meta["source"] and "docstrings" in meta["source"]
    assert len(ids_of(tree, "python_docs")) > 150_000


@pytest.mark.parametrize("module", [None, types.SimpleNamespace(topics={})], ids=["missing", "empty"])
def test_pydoc_data_may_be_missing_or_empty(monkeypatch, module):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", module)
    assert python_docs()["language_reference"]() == []


PAGE = """
The "assert" statement
**********************

* Assert statements are a *convenient* way to insert debugging
  assertions into a program (see **Debugging**).  [1] The built-in variable
  "__debug__" is `True` under “normal” circumstances.

   assert_stmt ::= "assert" expression

The name "len()" stands for a built-in function, which returns the number
of items in a container. The slice "x[i:j]" is code:

   >>> import this

   if __debug__:
       raise AssertionError

+-----+------+
| The | One. |
+=====+======+

object.__new__(cls[, ...])

   Note: Called to create a new instance of that class, in Python's
   post-
   mortem debugger.

Changed in version 3.9: Classes may be decorated with any valid expression.

See also:

  **PEP 3115** - Metaclasses in Python 3000

Short one.
"""
PROSE = """\
Assert statements are a convenient way to insert debugging assertions
into a program (see Debugging). The built-in variable __debug__ is True
under normal circumstances.

The name len() stands for a built-in function, which returns the number
of items in a container.

Called to create a new instance of that class, in Python's post-mortem
debugger.
"""


@pytest.mark.smoke
def test_only_whole_sentences_without_markup_remain_of_a_page():
    assert python_docs()["extract_prose"]([PAGE, PAGE]) == PROSE  # what both pages have is there once


def test_the_text_of_the_quickstart_is_prose():
    program = python_docs()
    text = program["extract_prose"](
        program["language_reference"]() or program["docstrings"](os.path.dirname(os.__file__))
    )
    assert text == program["extract_prose"](reversed([text]))  # nothing is left to remove
    assert not re.search(r"::=|>>>|[`*+=|~^<>{}\[\]]|----", text)
    paragraphs = text.strip().split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs) > 500
    assert all(re.fullmatch(r"\(?[A-Z].*[.?!]\)?", paragraph, re.DOTALL) for paragraph in paragraphs)
    assert max(map(len, text.splitlines())) < 100
    letters = sum(c.isalpha() or c.isspace() for c in text)
    assert letters / len(text) > 0.93  # code and tables have fewer
