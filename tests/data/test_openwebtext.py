"""data/openwebtext/prepare.py: the bins of nanoGPT from many kinds of files, kills at any moment, downloads."""

import csv
import gzip
import hashlib
import importlib.util
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time

import fork_server
import numpy as np
import pytest
from helpers import ROOT, TINY_RUN, expect_sentence, generated_text, refusal, run, visible
from hub_server import COMMIT, HubServer

import evaluate
import train
from configurator import UserError
from dongpt.program import locked_directory, run_program
from dongpt.text import bins
from dongpt.text import prepare as preparing
from dongpt.text.bins import file_sha256, shard_name
from dongpt.text.documents import Files
from dongpt.text.tokenizers import GPT2Tokenizer
from dongpt.train.data import Corpus
from dongpt.train.evaluation import predicted_bytes

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own", "gpt2_vocabulary")
SCRIPT = os.path.join(ROOT, "data", "openwebtext", "prepare.py")
END = 50256
SHARD = 1000  # tokens per shard in most tests


def load_script(path: str = SCRIPT):
    spec = importlib.util.spec_from_file_location("openwebtext_prepare", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The program, which writes to the folder data of the test."""
    module = load_script()
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(module, "FOLDER", str(tmp_path / "data"))
    return module


def documents(n: int, seed: int = 0) -> list[str]:
    """Documents of a few words to some hundreds; blank ones, one with the text of the special token, a long one."""
    rng = random.Random(seed)
    texts = [generated_text(rng.randrange(1, 40), seed=1000 * seed + i) + f"№ {i} of {seed}" for i in range(n)]
    for i, special in enumerate(
        [
            "",
            " \n",
            "a <|endoftext|> b",
            "<|endoftext|>",
            "x" * 3000,
            generated_text(900, 9),
            "señor\u2028ñ\U0001f600",
            "\n\nbegins with blanks",
            "ends with them \n",
        ]
    ):
        if i + 2 < n:
            texts[(i * 7 + 2) % n] = special
    return texts


def write_jsonl(path, texts, field: str = "text", opener=open):
    with opener(path, "wt", encoding="utf-8") as file:
        for i, text in enumerate(texts):
            file.write(json.dumps({"id": i, field: text}) + "\n")


def write_parquet(path, texts, field: str = "text"):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(texts))), field: texts}), path, row_group_size=17)


def write_csv(path, texts):
    with open(path, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "other"])
        rows.writerows([text, "o"] for text in texts)


def ids_of(text: str) -> list[int]:
    """As nanoGPT's data/openwebtext/prepare.py encodes a document."""
    import tiktoken

    enc = tiktoken.get_encoding("gpt2")
    return [*enc.encode_ordinary(text), enc.eot_token]


def as_nanogpt(texts: list[str], test_size: float = 0.0005, seed: int = 2357) -> tuple[bytes, bytes]:
    """(train in the order of the files, val.bin) as nanoGPT's script draws and writes them."""
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_dict({"text": texts, "number": list(range(len(texts)))})
    split = rows.train_test_split(test_size=test_size, seed=seed, shuffle=True)
    val = [i for text in split["test"]["text"] for i in ids_of(text)]
    train = [i for number in sorted(split["train"]["number"]) for i in ids_of(texts[number])]
    return np.array(train, "<u2").tobytes(), np.array(val, "<u2").tobytes()


def read(folder) -> tuple[bytes, bytes]:
    """(train of all shards, val.bin) of a folder, and check its files on the way."""
    with open(os.path.join(folder, "meta.json"), encoding="utf-8") as file:
        meta = json.load(file)
    names = [shard["file"] for shard in meta["shards"]["train"]]
    assert visible(folder) == sorted([*names, "val.bin", "meta.json"])
    contents = []
    for name in [*names, "val.bin"]:
        with open(os.path.join(folder, name), "rb") as file:
            contents.append(file.read())
    hashes = [hashlib.sha256(content).hexdigest() for content in contents[:-1]]
    assert [(shard["sha256"], 2 * shard["tokens"]) for shard in meta["shards"]["train"]] == [
        (sha256, len(content)) for sha256, content in zip(hashes, contents)
    ]
    assert meta["ids_sha256"] == hashlib.sha256("".join(hashes).encode() + contents[-1]).hexdigest()
    return b"".join(contents[:-1]), contents[-1]


def listing(folder) -> dict[str, str]:
    """The files of a folder and the hash of each; of meta.json without what depends on times."""
    found = {name: file_sha256(os.path.join(folder, name)) for name in visible(folder)}
    if "meta.json" in found:
        with open(os.path.join(folder, "meta.json"), encoding="utf-8") as file:
            found["meta.json"] = {key: value for key, value in json.load(file).items() if key != "plan_sha256"}
    return found


# ----------------------------------------------------------------------------------------------------------------------
# the bins


def test_all_kinds_of_files_give_nanogpts_bins(script, tmp_path, capsys):
    parts = [documents(900, 1), documents(700, 2), documents(50, 3), documents(40, 4), documents(400, 5)]
    (tmp_path / "in").mkdir()
    write_parquet(tmp_path / "in" / "b.parquet", parts[1])
    write_parquet(tmp_path / "in" / "a.parquet", parts[0])
    write_jsonl(tmp_path / "more.jsonl", parts[2])
    write_jsonl(tmp_path / "packed.jsonl.gz", parts[4], opener=gzip.open)
    write_csv(tmp_path / "rows.csv", parts[3])
    alone = ["a text\nof its own\n", "another\r\none", ""]
    (tmp_path / "notes").mkdir()
    for name, text in zip("abc", alone):
        (tmp_path / "notes" / f"{name}.txt").write_bytes(text.encode())
    script.main(["--files=in/*.parquet|more.jsonl|rows.csv | packed.jsonl.gz|notes/*.txt", f"--shard_tokens={SHARD}"])
    texts = [*parts[0], *parts[1], *parts[2], *parts[3], *parts[4], *alone]
    texts = [text.replace("\r\n", "\n") for text in texts]
    train, val = as_nanogpt(texts)
    assert read(tmp_path / "data") == (train, val)
    sizes = [os.path.getsize(tmp_path / "data" / shard_name("train", i)) for i in range(-(-len(train) // 2 // SHARD))]
    assert set(sizes[:-1]) == {2 * SHARD} and sum(sizes) == len(train)
    corpus, meta = Corpus(str(tmp_path / "data")), json.loads((tmp_path / "data" / "meta.json").read_text("utf-8"))
    assert meta["documents"] == len(texts) and meta["split"] == "drawn" and meta["seed"] == 2357
    assert meta["tokenizer"] == GPT2Tokenizer().to_dict() and corpus.model_vocab_size == 50304
    assert sum(meta["characters"].values()) == sum(map(len, texts))
    assert sum(meta["bytes"].values()) == sum(len(text.encode()) for text in texts)
    lengths = corpus.tokenizer().byte_lengths()
    for split, content in (("train", train), ("val", val)):
        ids = np.frombuffer(content, "<u2")
        assert meta["bytes"][split] == lengths[ids].sum() and meta["tokens"][split] == len(ids)
        assert predicted_bytes(corpus, split) == lengths[ids[1:]].sum()
    printed = capsys.readouterr().out
    assert (
        "8 files, " in printed
        and "GB of disk space is available" in printed
        and f"tokens: {len(train) // 2:,} for training in" in printed
    )
    assert "the tokens decode to the original text" in printed and "config/train_gpt2.py" in printed


@pytest.mark.parametrize(
    "n, val_fraction, seed",
    [(2, 0.0005, 2357), (3, 0.5, 1), (1999, 0.0005, 2357), (2001, 0.0005, 2357), (100, 0.3, 0), (100, 0.29, 12345)],
)
def test_the_documents_that_are_drawn_and_their_order_are_hugging_faces(n, val_fraction, seed):
    import datasets

    rows = datasets.Dataset.from_dict({"number": list(range(n))})
    expected = rows.train_test_split(test_size=val_fraction, seed=seed, shuffle=True)["test"]["number"]
    assert preparing.draw(n, val_fraction, seed).tolist() == list(expected)


@pytest.mark.parametrize("chapter", [1, 300, 5000])
def test_chapters_change_nothing_and_the_order_of_val_is_that_of_the_draw(script, tmp_path, monkeypatch, chapter):
    monkeypatch.setattr(preparing, "CHARS_PER_SAVE", chapter)
    texts = documents(60)
    write_parquet("in.parquet", texts)
    script.main(["--files=in.parquet", "--val_fraction=0.3", "--seed=5", "--shard_tokens=333"])
    assert read(tmp_path / "data") == as_nanogpt(texts, 0.3, 5)


def test_a_long_text_file_is_one_document(script, tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "CHARS_PER_SAVE", 1000)
    long, rest = generated_text(60_000), documents(20)
    (tmp_path / "long.txt").write_text(long, encoding="utf-8")
    write_jsonl("rest.jsonl", rest)
    script.main(["--files=rest.jsonl|long.txt", "--shard_tokens=10000"])
    assert read(tmp_path / "data") == as_nanogpt([*rest, long])


def test_shards_of_exact_size_and_the_last_one_whole(script, tmp_path):
    texts = documents(30)
    write_jsonl("in.jsonl", texts)
    train, val = as_nanogpt(texts)
    n = len(train) // 2
    for size, count in ((n, 1), (n - 1, 2), (n + 1, 1), (-(-n // 2), 2)):
        script.main(["--files=in.jsonl", f"--shard_tokens={size}"])
        assert read(tmp_path / "data") == (train, val)
        assert len(visible(tmp_path / "data")) == count + 2
    by = next(i for i in range(2, n) if n % i == 0)
    script.main(["--files=in.jsonl", f"--shard_tokens={n // by}"])
    assert read(tmp_path / "data") == (train, val) and len(visible(tmp_path / "data")) == by + 2


def test_another_field_and_encoding(script, tmp_path):
    texts = ["señor", "ñandú", "¿qué?"]
    with open("in.jsonl", "w", encoding="cp1252") as file:
        for text in texts:
            file.write(json.dumps({"body": text}, ensure_ascii=False) + "\n")
    script.main(["--files=in.jsonl", "--field=body", "--encoding=cp1252"])
    assert read(tmp_path / "data") == as_nanogpt(texts)


def test_a_name_is_a_folder_under_data(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "dataset_folder", lambda name: str(tmp_path / "shelf" / name))
    write_jsonl("in.jsonl", documents(9))
    script.main(["--files=in.jsonl", "--name=mine"])
    assert read(tmp_path / "shelf" / "mine") == as_nanogpt(documents(9)) and visible(tmp_path / "data") == []
    assert "--dataset=mine" in capsys.readouterr().out


def test_train_and_evaluation_run_on_what_was_prepared(script, tmp_path):
    write_jsonl("in.jsonl", documents(200))
    script.main(["--files=in.jsonl", "--shard_tokens=700", "--val_fraction=0.02"])
    assert train.main([f"--data_dir={tmp_path / 'data'}", *TINY_RUN]) == 0
    assert not evaluate.main(["--out_dir=out", "--device=cpu"])
    run("data/check.py", f"--data_dir={tmp_path / 'data'}", cwd=tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# what is refused


REFUSED = {
    "no such file": (["--files=nothing*.parquet"], "nothing*.parquet", "--files"),
    "twice": (["--files=in.jsonl|in.*"], "in.jsonl twice"),
    "empty": (["--files=in.jsonl|"], "--files"),
    "field": (["--files=in.jsonl", "--field=body"], "'body'", "--field"),
    "fraction": (["--files=in.jsonl", "--val_fraction=0"], "val_fraction=0"),
    "tokens": (["--files=in.jsonl", "--shard_tokens=0"], "shard_tokens=0"),
    "damaged parquet": (["--files=bad.parquet"], "bad.parquet", "Parquet"),
    "damaged jsonl": (["--files=in.jsonl|bad.jsonl"], "bad.jsonl line 2"),
    "no text": (["--files=in.jsonl|latin.txt"], "latin.txt", "--encoding"),
    "one document": (["--files=one.txt"], "1 documents cannot be split"),
    "seed": (["--files=one.txt", "--seed=-1"], "seed=-1"),
    "no document": (["--files=none.jsonl"], "0 documents cannot be split"),
    "name": (["--files=in.jsonl", "--name=a/b"], "name=a/b"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_prepared_is_a_sentence_and_the_earlier_data_stay(script, tmp_path, monkeypatch, capsys, case):
    write_jsonl("in.jsonl", documents(40))
    write_jsonl("old.jsonl", documents(30, 7))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n', encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("señor".encode("cp1252"))
    (tmp_path / "one.txt").write_text("one document", encoding="utf-8")
    (tmp_path / "none.jsonl").write_text("", encoding="utf-8")
    script.main(["--files=old.jsonl", "--shard_tokens=100"])
    before, (args, *parts) = listing(tmp_path / "data"), REFUSED[case]
    assert ends_with_two(lambda: script.main(args), monkeypatch, capsys, *parts)
    assert listing(tmp_path / "data") == before


def ends_with_two(main, monkeypatch, capsys, *parts) -> str:
    """Run main as a program; check that it ends with exit code 2 and one line of error that holds parts."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["prepare.py"])
    with pytest.raises(SystemExit) as ended:
        run_program(main)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert ended.value.code == 2 and len(lines) == 1, lines
    for part in parts:
        assert part in lines[0], lines[0]
    return lines[0]


# ----------------------------------------------------------------------------------------------------------------------
# killed


FIRST = 30  # documents in the first of two files
ARGS = ["--files=in.parquet|in.jsonl", "--val_fraction=0.1", "--seed=5", "--shard_tokens=400"]


@pytest.fixture
def texts(monkeypatch) -> list[str]:
    """Documents in two files, to be prepared in some chapters."""
    monkeypatch.setattr(preparing, "CHARS_PER_SAVE", 2000)
    texts = documents(40)
    write_parquet("in.parquet", texts[:FIRST])
    write_jsonl("in.jsonl", texts[FIRST:])
    return texts


class Killed(BaseException):
    """What a process that is killed would not get to handle."""


def kill_at(monkeypatch, owner, name: str, at: int, behind: bool = False):
    """Make the at-th call of a function the last thing that this process does; returns how many calls there were."""
    real, calls = getattr(owner, name), []

    def call(*args, **options):
        calls.append(args)
        if len(calls) == at and not behind:
            raise Killed
        result = real(*args, **options)
        if len(calls) == at:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, call)
    return calls


MOMENTS = {
    "replace": (os, "replace", False),
    "replaced": (os, "replace", True),
    "fsync": (os, "fsync", True),
    "save": (bins.BinWriter, "save", False),
    "saved": (bins.BinWriter, "save", True),
    "described": (bins, "describe", True),
    "added": (bins.BinWriter, "add", True),
    "val in order": (bins.BinWriter, "_write_val_in_order", True),
    "committed": (bins, "_commit_staged_files", True),
    "removed": (os, "remove", True),
}


def without_cleaning(monkeypatch):
    """A process that is killed cleans nothing up."""
    leave = bins.BinWriter.__exit__

    def exit_(self, *error):
        self.can_resume = self.can_resume or (bool(error) and error[0] is Killed)
        leave(self, *error)

    monkeypatch.setattr(bins.BinWriter, "__exit__", exit_)


def is_half_moved(folder) -> bool:
    """Whether some of the complete new files are in place and others are not."""
    staging = os.path.join(folder, bins.STAGING_DIR)
    if not os.path.exists(os.path.join(staging, "meta.json")):
        return False
    with open(os.path.join(staging, "meta.json"), encoding="utf-8") as file:
        meta = json.load(file)
    names = [shard["file"] for shard in meta["shards"]["train"]] + ["val.bin"]
    return not all(os.path.exists(os.path.join(staging, name)) for name in names)


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_every_moment_it_continues_to_the_same_bytes(script, tmp_path, monkeypatch, texts, moment):
    expected = as_nanogpt(texts, 0.1, 5)
    data, old, owner = tmp_path / "data", tmp_path / "old", MOMENTS[moment]
    script.main(ARGS)
    uninterrupted = listing(data)
    shutil.rmtree(data)
    data.mkdir()
    write_jsonl("earlier.jsonl", documents(12, 7))
    script.main(["--files=earlier.jsonl", "--shard_tokens=700", "--val_fraction=0.2"])
    shutil.copytree(data, old)
    before = [np.concatenate([*Corpus(str(old)).tokens[split].chunks()]).tolist() for split in ("train", "val")]
    new = [np.frombuffer(content, "<u2").tolist() for content in expected]
    found, at = {"before": 0, "half": 0, "new": 0}, 0
    while True:
        at += 1
        shutil.rmtree(data)
        shutil.copytree(old, data)
        with monkeypatch.context() as patch:
            without_cleaning(patch)
            calls = kill_at(patch, *owner[:2], at, owner[2])
            try:
                script.main(ARGS)
            except Killed:
                pass
        if len(calls) < at:
            break
        if is_half_moved(data):
            with pytest.raises(UserError, match="interrupted.*run the same command again"):
                Corpus(str(data))
            found["half"] += 1
        else:
            corpus = Corpus(str(data))
            tokens = [np.concatenate([*corpus.tokens[split].chunks()]).tolist() for split in ("train", "val")]
            found["before" if tokens == before else "new"] += 1
            assert tokens in (before, new)
        script.main(ARGS)
        assert read(data) == expected and listing(data) == uninterrupted, at
        assert at < 300
    assert at > 1 and sum(found.values()) == at - 1
    if moment.startswith("replace"):
        assert found["before"] > 2 and found["half"] > 2
    if moment == "committed":
        assert found["new"] == 1


@pytest.mark.parametrize("again", [1, 3])
def test_killed_again_and_again_it_still_arrives(script, tmp_path, monkeypatch, texts, again, capsys):
    """Each process lives for so many chapters."""
    expected, killed = as_nanogpt(texts, 0.1, 5), 0
    while True:
        with monkeypatch.context() as patch:
            without_cleaning(patch)
            kill_at(patch, bins.BinWriter, "save", again, behind=True)
            try:
                script.main(ARGS)
                break
            except Killed:
                killed += 1
    assert read(tmp_path / "data") == expected and killed >= (3 if again == 1 else 1)
    assert capsys.readouterr().out.count("continuing an interrupted preparation after document") == killed


def test_what_goes_on_does_not_read_again_what_was_done(script, tmp_path, monkeypatch, texts):
    with monkeypatch.context() as patch:
        without_cleaning(patch)
        kill_at(patch, bins.BinWriter, "save", 3, behind=True)
        with pytest.raises(Killed):
            script.main(ARGS)
    state = json.loads((tmp_path / "data" / bins.STAGING_DIR / "state.json").read_text("utf-8"))
    seen, encode_pieces = [], preparing.encode_pieces
    monkeypatch.setattr(
        preparing,
        "encode_pieces",
        lambda routed, *args, **options: encode_pieces(
            (seen.append(part) or part for part in routed), *args, **options
        ),
    )
    script.main(ARGS)
    assert 0 < state["documents"] < len(texts)
    assert [text for _, text, _ in seen] == texts[state["documents"] :]


CODE = """
import importlib.util, os, sys
sys.path.insert(0, {root!r})
spec = importlib.util.spec_from_file_location("prepare", {script!r})
module = importlib.util.module_from_spec(spec)
sys.modules["prepare"] = module
spec.loader.exec_module(module)
from dongpt.text import prepare
from configurator import UserError
from dongpt.program import locked_directory, run_program
prepare.CHARS_PER_SAVE, module.FOLDER = 20_000, {folder!r}
{more}
run_program(lambda: module.main({args!r}))
"""


def start(folder, args, more: str = "", **options) -> subprocess.Popen:
    """The program in a process of its own, with small chapters."""
    code = CODE.format(root=ROOT, script=SCRIPT, folder=str(folder), args=args, more=more)
    return fork_server.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        **{"env": {**os.environ, "OMP_NUM_THREADS": "1"}, **options},
    )


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kills as Unix does")
def test_a_process_that_is_killed_goes_on(script, tmp_path, texts):
    many = documents(1500, 3)
    write_parquet("in.parquet", many)
    expected, kills = as_nanogpt([*many, *texts[FIRST:]], 0.1, 5), 0
    args = [f"--files={tmp_path / 'in.parquet'}|{tmp_path / 'in.jsonl'}", *ARGS[1:-1], "--shard_tokens=9000"]
    rng, journal = random.Random(0), tmp_path / "data" / bins.STAGING_DIR / "state.json"
    for _ in range(3):
        process, had = start(tmp_path / "data", args), journal.stat().st_mtime_ns if journal.exists() else 0
        until = time.monotonic() + 60
        while (
            process.poll() is None
            and time.monotonic() < until
            and (journal.stat().st_mtime_ns if journal.exists() else 0) == had
        ):
            time.sleep(0.005)
        time.sleep(rng.random() * 0.15)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
    process = start(tmp_path / "data", args)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert read(tmp_path / "data") == expected and kills >= 2
    assert "continuing an interrupted preparation after document" in out or "already contains this data" in out


# ----------------------------------------------------------------------------------------------------------------------
# begun anew, or done already


def stop_in_the_middle(script, monkeypatch, args=ARGS, chapters: int = 3):
    with monkeypatch.context() as patch:
        without_cleaning(patch)
        kill_at(patch, bins.BinWriter, "save", chapters, behind=True)
        with pytest.raises(Killed):
            script.main(args)


OTHERS = {
    "seed": ["--seed=6"],
    "val_fraction": ["--val_fraction=0.2"],
    "shard_tokens": ["--shard_tokens=401"],
    "file": [],
    "order": ["--files=in.jsonl|in.parquet"],
    "fewer": ["--files=in.parquet"],
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_files_or_settings_begin_anew_and_say_so(script, tmp_path, monkeypatch, capsys, texts, other):
    stop_in_the_middle(script, monkeypatch)
    if other == "file":
        texts = [*texts[:FIRST], *texts[FIRST:-1], "another end"]
        write_jsonl("in.jsonl", texts[FIRST:])
    if other == "order":
        texts = [*texts[FIRST:], *texts[:FIRST]]
    if other == "fewer":
        texts = texts[:FIRST]
    script.main([*ARGS, *OTHERS[other]])
    assert "starting over" in capsys.readouterr().out
    assert read(tmp_path / "data") == as_nanogpt(
        texts, 0.2 if other == "val_fraction" else 0.1, 6 if other == "seed" else 5
    )


@pytest.mark.parametrize(
    "damage", ["empty", "half", "list", "no sizes", "nothing", "no part", "short part", "short val", "no val"]
)
def test_a_damaged_state_begins_anew_and_says_so(script, tmp_path, monkeypatch, capsys, texts, damage):
    stop_in_the_middle(script, monkeypatch)
    data = tmp_path / "data"
    staging = data / bins.STAGING_DIR
    content = (staging / "state.json").read_text("utf-8")
    state = json.loads(content)
    damaged = {
        "empty": "",
        "half": content[: len(content) // 2],
        "list": "[1, 2]",
        "nothing": "{}",
        "no sizes": json.dumps({key: value for key, value in state.items() if key != "sizes"}),
    }
    if damage in damaged:
        (staging / "state.json").write_text(damaged[damage], "utf-8")
    part = sorted(staging.glob("train_*"))[-1]
    if damage == "no part":
        (staging / "train_000.bin").unlink()
    if damage == "short part":
        os.truncate(part, state["sizes"][part.name] - 2)
    if damage == "short val":
        os.truncate(staging / "val.ids", state["sizes"]["val.ids"] - 2)
    if damage == "no val":
        (staging / "val.ids").unlink()
    script.main(ARGS)
    assert "starting over" in capsys.readouterr().out and read(data) == as_nanogpt(texts, 0.1, 5)


def test_the_state_of_another_preparation_is_forgotten_when_it_is_begun_anew(script, tmp_path, monkeypatch, texts):
    """Else the first one, given again, would go on with what the second one has written."""
    stop_in_the_middle(script, monkeypatch, chapters=1)
    write_jsonl("other.jsonl", documents(70, 9))
    with monkeypatch.context() as patch:
        without_cleaning(patch)
        patch.setattr(preparing, "CHARS_PER_SAVE", 10**6)
        kill_at(patch, bins.BinWriter, "finish", 1)
        with pytest.raises(Killed):
            script.main(["--files=other.jsonl", *ARGS[1:]])
    script.main(ARGS)
    assert read(tmp_path / "data") == as_nanogpt(texts, 0.1, 5)


def test_what_is_done_is_not_done_again(script, tmp_path, monkeypatch, capsys, texts):
    script.main(ARGS)
    before = {name: os.stat(tmp_path / "data" / name).st_mtime_ns for name in visible(tmp_path / "data")}
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "encode_pieces", None)
        script.main(ARGS)
    assert (
        "already contains this data: to prepare it again, delete its .bin files and meta.json"
        in capsys.readouterr().out
    )
    assert {name: os.stat(tmp_path / "data" / name).st_mtime_ns for name in visible(tmp_path / "data")} == before
    (tmp_path / "data" / "train_001.bin").unlink()  # then it is not there
    script.main(ARGS)
    assert read(tmp_path / "data") == as_nanogpt(texts, 0.1, 5)
    for name in visible(tmp_path / "data"):
        (tmp_path / "data" / name).unlink()
    script.main(ARGS)
    assert read(tmp_path / "data") == as_nanogpt(texts, 0.1, 5)


def test_a_file_that_changes_while_it_is_read_is_a_sentence(script, tmp_path, monkeypatch, texts):
    count = Files.count
    monkeypatch.setattr(Files, "count", lambda self, path: count(self, path) + path.endswith("jsonl"))
    with pytest.raises(ValueError, match="in.jsonl changed while it was being read"):
        script.main(ARGS)


# ----------------------------------------------------------------------------------------------------------------------
# a disk that fills up


def test_a_full_disk_is_a_sentence_and_it_goes_on_when_there_is_room(script, tmp_path, monkeypatch, capsys, texts):
    """Wherever it fills up: the n-th file that is written to the disk does not fit."""
    expected, data, old = as_nanogpt(texts, 0.1, 5), tmp_path / "data", tmp_path / "old"
    write_jsonl("earlier.jsonl", documents(12, 7))
    script.main(["--files=earlier.jsonl", "--shard_tokens=700", "--val_fraction=0.2"])
    shutil.copytree(data, old)
    before, at, fsync, goes_on = listing(data), 0, os.fsync, []
    while True:
        at += 1 if at < 8 else 4
        calls = []

        def full(number):
            if stat.S_ISDIR(os.fstat(number).st_mode):  # one that cannot be synced ends nothing
                return fsync(number)
            calls.append(number)
            if len(calls) == at:
                raise OSError(28, os.strerror(28))
            fsync(number)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            try:
                script.main(ARGS)
            except ValueError as error:
                assert "No space left" in str(error) and "free some space on that disk" in str(error)
                assert "the existing data, which are unchanged" in str(error)
                goes_on.append("continue where it stopped" in str(error))
        if len(calls) < at:
            break
        after = listing(data)
        assert {name: after[name] for name in before} == before
        if not goes_on[-1]:
            assert set(after) == set(before)
            assert not os.path.exists(data / bins.STAGING_DIR)
        script.main(ARGS)
        assert read(data) == expected
        shutil.rmtree(data)
        shutil.copytree(old, data)
    assert at > 10 and goes_on[0] is False and goes_on[-1] is True


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1.5 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "none", str(disk)], capture_output=True)
    except OSError:
        pytest.skip("there is no mount here")
    if done.returncode:
        pytest.skip("mounting a small disk needs the rights to")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_small_disk(small_disk, script, tmp_path, monkeypatch, capsys):
    (small_disk / "data").mkdir()
    monkeypatch.setattr(script, "FOLDER", str(small_disk / "data"))
    monkeypatch.setattr(preparing, "CHARS_PER_SAVE", 50_000)
    write_jsonl("earlier.jsonl", documents(30, 7))
    script.main(["--files=earlier.jsonl", "--shard_tokens=1000"])
    before = listing(small_disk / "data")
    many = documents(4000, 3)
    write_parquet("in.parquet", many)
    (small_disk / "ballast").write_bytes(b"x" * 1_250_000)
    line = ends_with_two(
        lambda: script.main(["--files=in.parquet", "--shard_tokens=30000"]),
        monkeypatch,
        capsys,
        "No space left",
        "free some space on that disk",
        "continue where it stopped",
    )
    assert "the new files take up 1 MB" in line
    after = listing(small_disk / "data")
    assert {name: after[name] for name in before} == before
    (small_disk / "ballast").unlink()
    script.main(["--files=in.parquet", "--shard_tokens=30000"])
    assert "continuing an interrupted preparation after document" in capsys.readouterr().out
    assert read(small_disk / "data") == as_nanogpt(many)


# ----------------------------------------------------------------------------------------------------------------------
# downloads


WHOLE = {f"plain_text/train/000{i}.parquet": documents(30, i) for i in (1, 0, 2)}
ALL_TEXTS = [text for path in sorted(WHOLE) for text in WHOLE[path]]
HUB_CODE = "import time, datasets; datasets.config.STREAMING_READ_MAX_RETRIES = 1; time.sleep = lambda seconds: None"
HUB_CODE += "; from dongpt.text import hub; hub.COPY_BYTES, hub.BATCH_ROWS = 5000, 8"


@pytest.fixture
def server(tmp_path):
    """A Hub that has OpenWebText in the files of WHOLE."""
    for path, texts in WHOLE.items():
        target = tmp_path / "hub" / "Skylion007" / "openwebtext" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        write_parquet(target, texts)
    with HubServer(tmp_path / "hub") as server:
        yield server


def download(server, folder, *args: str) -> subprocess.CompletedProcess:
    """The program in a process of its own that asks the server."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **server.environment(os.path.abspath("home"))}
    process = start(folder, list(args), HUB_CODE, env=env)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(args, process.returncode, out, err)


def test_without_a_network_a_sentence_names_files(tmp_path):
    for args in ([], ["--yes=True"]):
        done = run("data/openwebtext/prepare.py", *args, cwd=tmp_path, check=None)
        expect_sentence(done, "hf:Skylion007/openwebtext: the dataset is not in the local cache", "--files=PATHS")
    assert not os.path.exists(os.path.join(ROOT, "data", "openwebtext", "meta.json"))


def test_without_yes_it_says_the_size_and_with_it_it_downloads(script, server, tmp_path):
    done = download(server, tmp_path / "data")
    expect_sentence(done, "0.0 GB in 3 files", "GB of disk space is available", "--yes", "--files=PATHS")
    assert visible(tmp_path / "data") == []
    done = download(server, tmp_path / "data", "--yes", f"--shard_tokens={SHARD}")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert read(tmp_path / "data") == as_nanogpt(ALL_TEXTS)
    meta = json.loads((tmp_path / "data" / "meta.json").read_text("utf-8"))
    assert meta["source"] == f"hf:Skylion007/openwebtext:default:train@{COMMIT}" and meta["documents"] == 90
    server.asked = []
    done = download(server, tmp_path / "data", "--yes", f"--shard_tokens={SHARD}")
    assert "already contains this data" in done.stdout and len(server.data_reads()) <= 1  # of the schema
    write_jsonl("in.jsonl", documents(30, 8))
    refusal(lambda: script.main([f"--files={tmp_path / 'in.jsonl'}"]), "--name")


def test_a_script_on_the_hub_is_replaced_by_its_conversion_to_parquet(script, server, tmp_path):
    repository = tmp_path / "hub" / "Skylion007" / "openwebtext"
    server.revisions[("Skylion007/openwebtext", "refs/convert/parquet")] = str(tmp_path / "converted")
    shutil.move(repository, tmp_path / "converted")
    repository.mkdir()
    (repository / "openwebtext.py").write_text("1 / 0", encoding="utf-8")
    done = download(server, tmp_path / "data", "--yes")
    assert done.returncode == 0 and read(tmp_path / "data") == as_nanogpt(ALL_TEXTS), done.stderr
    os.rename(tmp_path / "converted" / "plain_text" / "train", tmp_path / "converted" / "plain_text" / "partial-train")
    done = download(server, tmp_path / "other", "--yes")
    expect_sentence(done, "no complete Parquet copy", "--files=PATHS")


def test_a_download_that_breaks_off_is_a_sentence_and_continues(script, server, tmp_path):
    args = ["--yes", "--val_fraction=0.1", "--seed=5"]
    server.max_reads = 3
    done = download(server, tmp_path / "data", *args)
    expect_sentence(done, "cannot be read after row", "run the same command again to continue")
    assert visible(tmp_path / "data") == []
    server.max_reads = 10**9
    done = download(server, tmp_path / "data", *args)
    assert done.returncode == 0 and "continuing to read hf:Skylion007/openwebtext" in done.stdout, done.stderr
    assert read(tmp_path / "data") == as_nanogpt(ALL_TEXTS, 0.1, 5)
    assert not [name for name in os.listdir(tmp_path / "data") if name.startswith(".dongpt-hub")]


@pytest.mark.parametrize("write, name", [(write_parquet, "in.parquet"), (write_jsonl, "in.jsonl")])
def test_records_are_taken_as_they_are(script, gpt2_vocabulary, write, name):
    texts = ["\0\0", "a\r\nb\r\n", "", "c\0d\re", *documents(60, 5)]
    write(name, texts)
    assert script.main([f"--files={name}", "--val_fraction=0.1"]) is None
    assert read(script.FOLDER) == as_nanogpt(texts, test_size=0.1)


def test_null_is_a_blank_document_and_half_a_pair_a_mark(script, gpt2_vocabulary):
    texts = [None, "a\ud83d b", *documents(60, 6)]
    write_jsonl("in.jsonl", texts)
    script.main(["--files=in.jsonl", "--val_fraction=0.1"])
    assert read(script.FOLDER) == as_nanogpt(["", "a\ufffd b", *texts[2:]], test_size=0.1)


def test_two_preparations_at_once_are_refused(script, gpt2_vocabulary, monkeypatch, capsys):
    write_jsonl("in.jsonl", documents(30, 7))
    with locked_directory(script.FOLDER):
        ends_with_two(lambda: script.main(["--files=in.jsonl"]), monkeypatch, capsys, "another process")
    script.main(["--files=in.jsonl"])
    assert Corpus(script.FOLDER).lengths["train"] > 100


def test_files_do_not_replace_the_download(script, gpt2_vocabulary, monkeypatch, capsys):
    write_jsonl("in.jsonl", documents(30, 8))
    with open(os.path.join(script.FOLDER, "meta.json"), "w", encoding="utf-8") as file:
        json.dump({"source": script.REPOSITORY}, file)
    ends_with_two(lambda: script.main(["--files=in.jsonl"]), monkeypatch, capsys, "--name")
