"""Data folders: files of the user's own are never touched, one preparation at a time, malformed ones are sentences."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time

import fork_server
import numpy as np
import pytest
from helpers import ROOT, TINY_RUN, expect_sentence, generated_text, run, visible, write_corpus

import evaluate
import train
from configurator import UserError
from dongpt.program import locked_directory
from dongpt.text import bins
from dongpt.text.bins import BinWriter, read_meta
from dongpt.text.documents import Texts
from dongpt.text.prepare import Vocabulary, prepare
from dongpt.text.tokenizers import BPETokenizer, CharTokenizer, WordTokenizer, byte_alphabet
from dongpt.train.data import Corpus

smoke = pytest.mark.smoke
pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")
TEXT = generated_text(300)


def contents(folder) -> dict[str, bytes]:
    """Every file below folder."""
    paths = [os.path.join(at, name) for at, _, names in os.walk(folder) for name in names]
    found = {}
    for path in filter(os.path.isfile, paths):
        with open(path, "rb") as file:
            found[os.path.relpath(path, folder)] = file.read()
    return found


# ----------------------------------------------------------------------------------------------------------------------
# whose files they are


@smoke
@pytest.mark.parametrize(
    "name", ["train.bin", "val.bin", "train_000.bin", "train_1234.bin", "train.mask.bin", "val.mask.bin", "meta.json"]
)
@pytest.mark.parametrize("ours", [False, True], ids=["alone", "beside ours"])
def test_a_preparation_refuses_a_folder_with_data_files_that_it_did_not_write(tmp_path, name, ours):
    if ours:
        write_corpus(tmp_path, TEXT)
        if name in visible(tmp_path):
            pytest.skip("meta.json says that this one is ours")
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / name).write_bytes(b'{"name": "my project"}')
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"{re.escape(name)} was not written by prepare.py.*move it elsewhere"):
        prepare(str(tmp_path), Texts([TEXT]), Vocabulary(), quiet=True)
    with pytest.raises(UserError, match="was not written by prepare.py"):
        with BinWriter(str(tmp_path), CharTokenizer("ab")):
            pass
    assert contents(tmp_path) == before


def test_the_program_refuses_them_in_one_sentence_and_touches_nothing(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(TEXT, encoding="utf-8")
    for name in ("train.bin", "train_000.bin", "train.mask.bin", "meta.pkl", "train.bin.part", "meta.json.new"):
        (tmp_path / "texts" / name).write_bytes(b"mine")
    before = contents(tmp_path)
    done = run("data/prepare.py", "--input=texts/", "--data_dir=texts", cwd=tmp_path, check=None)
    expect_sentence(done, "train.bin was not written by prepare.py", "move it elsewhere")
    assert contents(tmp_path) == before


@smoke
@pytest.mark.parametrize("name", ["train.bin.part", "val.bin.part", "meta.json.new", "meta.pkl", "preparing.json"])
def test_other_names_of_the_user_are_left_alone(tmp_path, name):
    (tmp_path / name).write_bytes(b"mine")
    write_corpus(tmp_path, TEXT)
    write_corpus(tmp_path, TEXT)
    assert (tmp_path / name).read_bytes() == b"mine"
    assert visible(tmp_path) == sorted(["meta.json", name, "train.bin", "val.bin"])


@smoke
def test_a_file_that_appears_during_the_preparation_is_not_replaced(tmp_path):
    with pytest.raises(UserError, match="train.bin was not written by prepare.py"):
        with BinWriter(str(tmp_path), CharTokenizer("ab")) as writer:
            for split in ("train", "val"):
                writer.add(split, bins.EncodedText(np.zeros(9, np.uint16), 9, 9))
            (tmp_path / "train.bin").write_bytes(b"mine")
            writer.finish({})
    assert (tmp_path / "train.bin").read_bytes() == b"mine"


@smoke
@pytest.mark.parametrize("keys", [("ids_sha256",), ("ids_sha256", "characters", "bytes"), ()])
def test_data_of_an_older_version_is_ours(tmp_path, keys):
    write_corpus(tmp_path, TEXT)
    meta = json.loads((tmp_path / "meta.json").read_text("utf-8"))
    (tmp_path / "meta.json").write_text(json.dumps({k: v for k, v in meta.items() if k not in keys}), "utf-8")
    (tmp_path / "train.bin").write_bytes(b"damaged")  # its size does not decide
    write_corpus(tmp_path, TEXT)
    assert json.loads((tmp_path / "meta.json").read_text("utf-8")) == meta


# ----------------------------------------------------------------------------------------------------------------------
# one preparation at a time


@smoke
def test_a_second_preparation_is_refused_and_reading_needs_no_lock(tmp_path):
    write_corpus(tmp_path, TEXT)
    before = contents(tmp_path)
    with locked_directory(str(tmp_path)):
        with pytest.raises(UserError, match="is being written by another process"):
            write_corpus(tmp_path, TEXT)
        assert len(Corpus(str(tmp_path)).tokens["val"]) > 0
    assert contents(tmp_path) == before
    write_corpus(tmp_path, TEXT)


HOLDS_THE_LOCK = """
import sys, time
sys.path.insert(0, {root!r})
from dongpt.text.bins import BinWriter
from dongpt.text.tokenizers import CharTokenizer
with BinWriter(sys.argv[1], CharTokenizer("ab")):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_process_that_was_killed_blocks_nobody(tmp_path):
    process = fork_server.Popen(
        [sys.executable, "-c", HOLDS_THE_LOCK.format(root=ROOT), str(tmp_path)], stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"locked\n"
    with pytest.raises(UserError, match="is being written by another process"):
        write_corpus(tmp_path, TEXT)
    process.kill()
    process.wait()
    process.stdout.close()
    write_corpus(tmp_path, TEXT)
    assert len(Corpus(str(tmp_path)).tokens["val"]) > 0 and bins.STAGING_DIR not in os.listdir(tmp_path)


STARTS_WORKERS = """
import os, sys, time
sys.path.insert(0, {root!r})
from dongpt.text import prepare
def jobs():
    yield [("train", "one two", True)]
    yield [("val", "one two", True)]
    print("started", flush=True)
    time.sleep(600)
if __name__ == "__main__":
    prepare._n_cores = lambda: 2
    for _ in prepare._map_in_order(prepare.functools.partial(prepare._count_words, False, False), jobs(), False):
        pass
"""


@pytest.mark.skipif(not os.path.exists("/proc"), reason="looks for processes in /proc")
def test_processes_that_count_words_end_with_a_killed_parent(tmp_path):
    (tmp_path / "starts.py").write_text(STARTS_WORKERS.format(root=ROOT))
    process = fork_server.Popen([sys.executable, "starts.py"], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"started\n"
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        children = file.read().split()
    assert children
    process.kill()
    process.wait()
    process.stdout.close()
    until = time.monotonic() + 60
    while any(map(is_running, children)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(is_running, children))


def is_running(pid: str) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ----------------------------------------------------------------------------------------------------------------------
# malformed folders


DEEP = "[" * 100_000 + "]" * 100_000
CHAR = {"kind": "char", "characters": "ab"}
BAD_VALUES = {
    "tokens": [[1, 2], 5, None, "x", {"train": 5}, {"train": "5", "val": 1}, {"train": -1, "val": 2}, {"other": 1},
               {"train": True, "val": True}, {"train": 10**400, "val": 1}, {"train": 1.0, "val": 2.0}],
    "bytes": [0, [1], None, {"train": 0, "val": 0}, {"train": 5, "val": -1}, {"train": 10**400, "val": 9},
              {"val": 10**9}, {"val": 1.5}, {"val": None}, {"other": 4}, {"train": 1, "val": 1}],
    "predicted_bytes": [5, [1], None, {"val": 10**6}, {"val": -5}, {"train": "x"}, {"val": 10**400}, {"other": 1}],
    "vocab_size": [True, 10**12, 0, -1, 1, 2.0, "12", None, [], 10**400],
    "characters": [5, "abc", {"val": "x"}, {"val": -1}, {"val": 10**30}, [1]],
    "ids_sha256": [5, [], {}], "sha256": [5], "source": [[1]], "split": [3], "documents": ["x", -1], "seed": [1.5],
    "tokenizer": [3, None, [], {}, "char", {"kind": 5}, {"kind": "unknown"}, {"kind": "char"}, {"kind": "foreign"},
                  {"kind": "char", "characters": 5}, {"kind": "char", "characters": ""},
                  {"kind": "char", "characters": "aa"}, {"kind": "char", "characters": ["a", "b"]},
                  {"kind": "char", "characters": "a\ud800"}, {"kind": "char", "characters": "ab", "special": "xy"},
                  {"kind": "char", "characters": "ab", "special": ["a"]}, {"kind": "word"},
                  {"kind": "word", "words": "ab"}, {"kind": "word", "words": [1, 2]},
                  {"kind": "word", "words": ["a"], "lower": 1}, {"kind": "bpe"}, {"kind": "bpe", "tokens": ["a"]},
                  {"kind": "bpe", "tokens": [["a"]]}, {"kind": "gpt2", "special": [""]},
                  {"kind": "gpt2", "special": "abc"}, {"kind": "gpt2", "sha256": 5}, {"kind": "gpt2", "template": 5},
                  {**CHAR, "template": {"name": 3}}, {**CHAR, "template": []}],
    "shards": [5, [1], None, "abc", {"train": []}, {"train": 5}, {"train": [1]},
               {"train": None}, {"train": [[1]]}, {"train": ["train_000.bin"]},
               {"train": [{"file": "../train_000.bin", "tokens": 1, "sha256": "", "ends_sha256": ""}]},
               {"train": [{"file": "/etc/passwd", "tokens": 1, "sha256": "", "ends_sha256": ""}]},
               {"train": [{"file": "val.bin", "tokens": 1, "sha256": "", "ends_sha256": ""}]},
               {"train": [{"file": "train_000.bin", "tokens": 10**30, "sha256": "", "ends_sha256": ""}]}],
}  # fmt: skip
BAD_CONTENTS = {
    "empty": b"", "half": b'{"tokenizer": {"kind"', "utf-16": b"\xff\xfe\x00", "list": b"[1, 2]", "null": b"null",
    "number": b"5", "deep": DEEP.encode(), "deep value": f'{{"tokens": {DEEP}}}'.encode(), "NaN": b"NaN",
    "long number": b'{"vocab_size": ' + b"1" * 5000 + b"}", "nul": b"\0\0\0",
}  # fmt: skip
CASES = [
    *((f"{key}={str(value)[:60]}", key, value) for key, values in BAD_VALUES.items() for value in values),
    *((f"content {name}", "content", content) for name, content in BAD_CONTENTS.items()),
    ("meta.json is a folder", "folder", None),
    ("meta.json is a dangling link", "link", None),
    ("meta.json is a fifo", "fifo", None),
]
BAD_PICKLES = [
    pickle.dumps(value)
    for value in (
        5, [], None, {}, {"vocab_size": 10**12, "itos": {}}, {"vocab_size": True, "itos": {0: "a"}, "stoi": {}},
        {"vocab_size": 2, "itos": {0: "a", 1: 5}}, {"vocab_size": 2, "itos": {0: "a", 1: "a"}},
        {"vocab_size": 1, "itos": {0: "ab"}}, {"vocab_size": -1, "itos": {}}, {"vocab_size": "2", "itos": "ab"},
        {"vocab_size": 1, "itos": {0: "\ud800"}}, {"vocab_size": 0, "itos": {}},
    )
] + [b"", b"garbage", pickle.dumps(os.system), pickle.dumps({"vocab_size": 1})[:9]]  # fmt: skip


def check_program():
    import importlib.util

    spec = importlib.util.spec_from_file_location("check", os.path.join(ROOT, "data", "check.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_refused_by_every_program(folder: str, tiny_run: str, tmp_path):
    """Every program that opens the folder ends with one sentence before any work, and changes nothing."""
    before, at = contents(folder), os.listdir(tmp_path)
    for program in (
        lambda: read_meta(folder),
        lambda: Corpus(folder),
        lambda: train.main([f"--data_dir={folder}", *TINY_RUN]),
        lambda: evaluate.main([f"--out_dir={tiny_run}", f"--data_dir={folder}", "--device=cpu"]),
        lambda: check_program().main([f"--data_dir={folder}"]),
    ):
        with pytest.raises(UserError) as caught:
            program()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
        assert re.search(r"prepare|pass|copy|write it|use|update", str(caught.value)), caught.value
    assert contents(folder) == before and os.listdir(tmp_path) == at


@smoke
@pytest.mark.parametrize("key, value", [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_malformed_meta_json_is_one_sentence_in_every_program(tmp_path, tiny_data, tiny_run, key, value):
    folder = str(shutil.copytree(tiny_data, tmp_path / "data"))
    path = os.path.join(folder, "meta.json")
    if key == "fifo" and not hasattr(os, "mkfifo"):
        pytest.skip("no FIFOs here")
    with open(path, encoding="utf-8") as file:
        meta = json.load(file)
    os.remove(path)
    if key == "folder":
        os.mkdir(path)
    elif key == "link":
        os.symlink("nowhere", path)
    elif key == "fifo":
        os.mkfifo(path)
        with pytest.raises(UserError, match="it is not a file"):  # opening it would wait forever
            read_meta(folder)
        return
    else:
        with open(path, "wb") as file:
            file.write(value if key == "content" else json.dumps({**meta, key: value}).encode())
    assert_refused_by_every_program(folder, tiny_run, tmp_path)


@smoke
@pytest.mark.parametrize("number", range(len(BAD_PICKLES)))
def test_a_malformed_meta_pkl_is_one_sentence_in_every_program(tmp_path, tiny_data, tiny_run, number):
    folder = str(shutil.copytree(tiny_data, tmp_path / "data"))
    os.remove(os.path.join(folder, "meta.json"))
    with open(os.path.join(folder, "meta.pkl"), "wb") as file:
        file.write(BAD_PICKLES[number])
    assert_refused_by_every_program(folder, tiny_run, tmp_path)


@smoke
@pytest.mark.parametrize(
    "content", [b"", b"{}", b"null", json.dumps({"shards": {"train": [{"file": "../x"}]}}).encode()]
)
@pytest.mark.parametrize("place", ["meta.json.new", os.path.join(bins.STAGING_DIR, "meta.json")])
def test_a_leftover_description_that_no_preparation_wrote_changes_nothing(tmp_path, tiny_data, content, place):
    folder = tmp_path / "data"
    shutil.copytree(tiny_data, folder)
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / place).write_bytes(content)
    before = contents(tmp_path)
    assert read_meta(str(folder)) == read_meta(tiny_data)
    check_program().main([f"--data_dir={folder}"])
    assert contents(tmp_path) == before


@smoke
def test_good_descriptions_of_every_tokenizer_are_read(tmp_path):
    for tokenizer in (
        CharTokenizer("abc", ["<x>"]),
        WordTokenizer(["a", " b"], lower=True),
        BPETokenizer(byte_alphabet(), ["<x>"]),
    ):
        with BinWriter(str(tmp_path), tokenizer) as writer:
            for split in ("train", "val"):
                writer.add(split, bins.EncodedText(np.zeros(9, np.uint16), 9, 9))
            writer.finish({})
        assert read_meta(str(tmp_path))["tokenizer"] == tokenizer.to_dict()
    (tmp_path / "meta.json").write_text(json.dumps({"tokenizer": {"kind": "gpt2"}, "vocab_size": 50257}))
    assert Corpus(str(tmp_path)).model_vocab_size == 50304  # without loading GPT-2's vocabulary
