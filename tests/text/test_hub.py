"""hf: names: datasets of the Hub, from its cache and from folders; what is wrong with them; interruptions."""

import glob
import json
import os
import random
import shutil
import sys
import types

import fork_server
import numpy as np
import pytest
from helpers import ROOT, environment, expect_sentence, generated_text, refusal, run, run_here, visible
from hub_server import COMMIT, HubServer

from configurator import UserError
from dongpt.text import hub
from dongpt.text.bins import read_meta
from dongpt.text.documents import Files
from dongpt.text.hub import DatasetName, find_text, open_dataset, parse_name
from dongpt.text.tokenizers import END, from_dict

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own", "own_cache")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty cache for `datasets` in this process, which is offline."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def texts(n: int = 700, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [f"{seed} {i} {'señor ' * rng.randrange(20)}" for i in range(n)]


def write_files(folder, kind: str, n_files: int = 3, rows: int = 700) -> list[str]:
    """Write a data set of n_files files of a kind to folder; return its texts."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    os.makedirs(folder, exist_ok=True)
    parts = [texts(rows + 111 * k, k) for k in range(n_files)]
    for k, part in enumerate(parts):
        path = os.path.join(folder, f"train-{k}")
        table = pyarrow.table({"id": list(range(len(part))), "text": part, "other": part[::-1]})
        if kind == "parquet":
            pyarrow.parquet.write_table(table, path + ".parquet", row_group_size=333)
        if kind == "jsonl":
            with open(path + ".jsonl", "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in table.to_pylist())
        if kind == "json":
            with open(path + ".json", "w", encoding="utf-8") as file:
                json.dump(table.to_pylist(), file, indent=1)
        if kind == "csv":
            datasets.Dataset(table).to_csv(path + ".csv")
        if kind == "txt":
            with open(path + ".txt", "w", encoding="utf-8") as file:
                file.write("\n".join(part) + "\n")
    rows = datasets.Dataset.from_dict({"text": [text for part in parts for text in part]}, split="train")
    if kind == "saved":
        rows.save_to_disk(str(folder))
    if kind == "saved splits":
        datasets.DatasetDict({"train": rows, "test": rows.select(range(5))}).save_to_disk(str(folder))
    return [text for part in parts for text in part]


KINDS = ("parquet", "jsonl", "json", "csv", "txt", "saved", "saved splits")


def copies() -> list[str]:
    """The folders with copies in the folder out."""
    return glob.glob(os.path.join("out", f"{hub.COPY_DIR}-*"))


def read(name: str, column: str = "text", folder: str = "out", **options) -> list[str]:
    """The documents of a dataset, which is copied to folder."""
    with open_dataset(parse_name(name), column, folder, **options) as documents:
        return [text for text, _ in documents.read_documents()]


# ----------------------------------------------------------------------------------------------------------------------
# names


NAMES = {
    "hf:squad": DatasetName("squad"),
    "hf:roneneldan/TinyStories": DatasetName("roneneldan/TinyStories"),
    "hf:a/b.c-d_e:en": DatasetName("a/b.c-d_e", "en"),
    "hf:a/b:en:test": DatasetName("a/b", "en", "test"),
    "hf:a/b::test": DatasetName("a/b", "", "test"),
    "hf:a/b::": DatasetName("a/b"),
    "hf:https://huggingface.co/datasets/a/b": DatasetName("a/b"),
    "hf://datasets/a/b:en": DatasetName("a/b", "en"),
    "hf:./here": DatasetName("./here", is_local=True),
    "hf:.": DatasetName(".", is_local=True),
    "hf:../up:en:test": DatasetName("../up", "en", "test", is_local=True),
    "hf:/data/set::test": DatasetName("/data/set", "", "test", is_local=True),
    r"hf:C:\data\set:en": DatasetName(r"C:\data\set", "en", is_local=True),
    "hf:C:/data/set": DatasetName("C:/data/set", is_local=True),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_the_hub_and_of_folders(name):
    assert parse_name(name) == NAMES[name]


def test_files_that_datasets_does_not_read_are_reported(capsys):
    write_files("folder", "jsonl")
    with open("folder/other.txt", "w") as file:
        file.write("another format\n")
    read("hf:./folder")
    assert "does not read 1 of 4 files, such as ./folder/other.txt" in capsys.readouterr().out


def test_texts_of_csv_that_look_like_missing_values_are_kept():
    os.makedirs("folder")
    rows = ["NA", "None", "null", "nan", "N/A", "", "a text"]
    with open("folder/train.csv", "w", encoding="utf-8") as file:
        file.writelines(["text,n\n", *(f"{row},{i % 2 or ''}\n" for i, row in enumerate(rows))])
    expected = [row for row in rows if row]
    assert read("hf:./folder") == expected
    assert [text for text, _ in Files(["folder/train.csv"]).read_documents()] == expected


def test_text_files_are_not_divided_at_separators():
    write_files("folder", "txt")
    for option in ({"separator": "--"}, {"document": "blank"}):
        said = "whose lines become documents, so that --", "has no effect: pass the folder without the hf: prefix"
        refusal(lambda: read("hf:./folder", **option), *said)


def test_a_folder_may_have_colons_in_its_name(tmp_path):
    (tmp_path / "a:b").mkdir()
    assert parse_name(f"hf:{tmp_path}/a:b") == DatasetName(f"{tmp_path}/a:b", is_local=True)
    assert parse_name("hf:~/x").path == os.path.expanduser("~/x")


@pytest.mark.parametrize(
    "name", ["hf:", "hf::", "hf:a b", "hf:a/b/c", "hf:a/b:c:d:e", "hf:/a:b:c:d", "hf:a//b", "hf:ñ?"]
)
def test_other_names_are_a_sentence(name):
    refusal(lambda: parse_name(name), f"{name} is not the name of a dataset", "hf:[OWNER/]NAME[:CONFIG[:SPLIT]]")


# ----------------------------------------------------------------------------------------------------------------------
# folders


@pytest.mark.parametrize("kind", KINDS)
def test_folders_of_every_kind(kind, capsys):
    expected = write_files("folder", kind)
    assert read("hf:./folder") == expected
    assert ("whose lines become documents" in capsys.readouterr().out) == (kind == "txt")
    assert not copies()


@pytest.mark.parametrize("kind", ["jsonl", "csv", "saved", "saved splits", "txt"])
def test_a_copy_that_is_interrupted_again_and_again_holds_the_same_rows(monkeypatch, capsys, kind):
    expected, save, n_interruptions = write_files("folder", kind), hub.HubText._save, 0
    monkeypatch.setattr(hub, "COPY_BYTES", 20_000)
    monkeypatch.setattr(hub, "BATCH_ROWS", 64)

    def die_after_two(self, *args, **options):
        save(self, *args, **options)
        saves.append(1)
        if len(saves) == 2 and not options:
            raise KeyboardInterrupt

    monkeypatch.setattr(hub.HubText, "_save", die_after_two)
    while True:
        saves: list[int] = []
        try:
            found = read("hf:./folder")
            break
        except KeyboardInterrupt:
            n_interruptions += 1
    assert found == expected and n_interruptions >= 2
    assert capsys.readouterr().out.count("continuing to read hf:folder") == n_interruptions


def test_a_copy_of_another_text_or_a_damaged_one_is_made_again(monkeypatch, capsys):
    expected = write_files("folder", "jsonl")
    monkeypatch.setattr(hub, "COPY_BYTES", 20_000)
    monkeypatch.setattr(hub, "BATCH_ROWS", 64)
    for damage in ("other", "state", "file", "column"):
        documents = find_text(parse_name("hf:./folder"), "text", "out")
        n_saved = len(documents._files().paths)
        assert n_saved > 3
        if damage == "other":
            with open("folder/train-0.jsonl", "a", encoding="utf-8") as file:
                file.write('{"text": "one more"}\n')
            expected = [*expected[:700], "one more", *expected[700:]]
        if damage == "state":
            with open(f"{copies()[0]}/state.json", "w", encoding="utf-8") as file:
                file.write('{"key": 3')
        if damage == "file":
            os.truncate(f"{copies()[0]}/00001.parquet", 100)
        assert (
            read("hf:./folder", "other" if damage == "column" else "text") == expected if damage != "column" else True
        )
        assert ("starting over" in capsys.readouterr().out) == (damage != "column")


def test_lines_paragraphs_and_one_document():
    os.makedirs("folder")
    with open("folder/train.jsonl", "w", encoding="utf-8") as file:
        for text in ("one\n\ntwo\nthree", "", None, "  ", "four\n"):
            file.write(json.dumps({"text": text}) + "\n")
    expected = {
        "file": ["one\n\ntwo\nthree", "four\n"],
        "line": ["one\n\n", "two\n", "three", "four\n"],
        "blank": ["one\n\n", "two\nthree", "four\n"],
        "none": ["one\n\ntwo\nthree\nfour\n"],
    }
    for document, texts in expected.items():
        with open_dataset(parse_name("hf:./folder"), "text", "out", document) as documents:
            text = "".join(text + "|" * is_end for text, is_end in documents.read_documents())
        assert text == "".join(text + "|" for text in texts)


REFUSED = {
    "no folder": ("hf:./nothing", "text", "./nothing: there is no such folder"),
    "a file": ("hf:./folder/train-0.jsonl", "text", "pass a file without the hf: prefix"),
    "config": ("hf:./folder:en", "text", "no config 'en'", "hf:./folder:CONFIG", "one of default"),
    "split": ("hf:./folder::dev", "text", "no split 'dev'", "hf:./folder::SPLIT", "one of train"),
    "column": (
        "hf:./folder",
        "body",
        "no column 'body'",
        "--field=NAME, where NAME is one of 'text', 'other'",
        "'id' (not text)",
    ),
    "numbers": (
        "hf:./folder",
        "id",
        "column 'id' is not text",
        "int64",
        "--field=NAME, where NAME is one of 'text', 'other'",
    ),
    "config of a saved one": ("hf:./saved:en", "text", "save_to_disk() and has no configs", "leave out 'en'"),
    "split of a saved one": ("hf:./saved::dev", "text", "no split 'dev'", "one of train, test"),
    "column of a saved one": ("hf:./saved", "body", "no column 'body'", "one of 'text'"),
    "empty folder": ("hf:./empty", "text", "no data files", "Parquet"),
    "pictures": ("hf:./pictures", "text", "hf:./pictures", "pass --field=NAME"),
    "script": ("hf:./script", "text", "a Python script, which is never run"),
    "not in the cache": ("hf:a/b", "text", "the dataset is not in the local cache", "HF_HUB_OFFLINE", "hf:./FOLDER"),
    "a folder without ./": ("hf:folder", "text", "write hf:./folder to read the folder of that name"),
    "a reader of datasets": ("hf:json", "text", "the Hub has no such dataset"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_a_sentence_and_leaves_nothing(case, tmp_path):
    write_files("folder", "jsonl", n_files=1)
    write_files("saved", "saved splits", n_files=1)
    for name in ("empty", "script", "pictures"):
        os.makedirs(name)
    (tmp_path / "script" / "script.py").write_text("raise SystemExit('it was run')", encoding="utf-8")
    (tmp_path / "pictures" / "a.png").write_bytes(b"\x89PNG")
    name, column, *parts = REFUSED[case]
    refusal(lambda: read(name, column), *parts)
    assert not os.path.exists("out")


DAMAGED = {
    "truncated parquet": ("a.parquet", lambda content: content[: len(content) // 2]),
    "no parquet": ("a.parquet", lambda content: b"PAR1 nothing"),
    "empty parquet": ("a.parquet", lambda content: b""),
    "truncated json": ("a.jsonl", lambda content: content[: len(content) // 2]),
    "half valid json": ("a.jsonl", lambda content: content + b"no json\n"),
    "wrongly nested json": ("a.jsonl", lambda content: content + b'{"text": [1, {"a": 2}]}\n'),
    "another encoding": ("a.jsonl", lambda content: content + '{"text": "señor"}\n'.encode("cp1252")),
    "empty json": ("a.jsonl", lambda content: b""),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_a_sentence_and_leave_nothing(case, monkeypatch):
    name, damage = DAMAGED[case]
    monkeypatch.setattr(hub, "COPY_BYTES", 20_000)
    monkeypatch.setattr(hub, "BATCH_ROWS", 64)
    write_files("folder", name.partition(".")[2], n_files=1, rows=4_000)
    (path,) = (os.path.join("folder", name) for name in os.listdir("folder"))
    with open(path, "rb") as file:
        content = file.read()
    with open(path, "wb") as file:
        file.write(damage(content))
    sentence = refusal(lambda: read("hf:./folder"), "folder")
    assert len(sentence) < 500
    assert not copies()


def test_long_rows_and_binary_columns_that_hold_utf8():
    import pyarrow
    import pyarrow.parquet

    os.makedirs("folder")
    long = generated_text(20_000) * 3
    with open("folder/train.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": long}) + "\n" for _ in range(3))
    assert read("hf:./folder") == [long] * 3
    os.remove("folder/train.jsonl")
    for kind in (pyarrow.binary(), pyarrow.large_binary(), pyarrow.string(), pyarrow.large_string()):
        table = pyarrow.table({"text": ["a", "ñ", "\U0001f600"]}).cast(pyarrow.schema({"text": kind}))
        pyarrow.parquet.write_table(table, "folder/train.parquet")
        assert read("hf:./folder") == ["a", "ñ", "\U0001f600"]
    pyarrow.parquet.write_table(pyarrow.table({"text": [b"a", b"\xff"]}), "folder/train.parquet")
    refusal(lambda: read("hf:./folder"), "cannot be read", "UTF8")


def test_the_screen_stays_clean(capfd):
    write_files("folder", "jsonl")
    read("hf:./folder")
    with pytest.raises(UserError):
        read("hf:./folder", "id")
    assert capfd.readouterr() == ("", "")


def test_without_datasets_a_sentence_says_what_to_install(monkeypatch):
    write_files("folder", "parquet", n_files=1)
    monkeypatch.setitem(sys.modules, "datasets", None)
    refusal(lambda: read("hf:./folder"), "pip install datasets")


@pytest.mark.parametrize(
    "text, expected", [("a gated dataset on the Hub.", "the dataset is gated"), ("b", "`datasets`")]
)
def test_any_error_of_datasets_is_a_sentence(monkeypatch, text, expected):
    import datasets

    def fail(*args, **options):
        raise datasets.exceptions.DatasetsError(f"{text}\nand more")

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    refusal(lambda: read("hf:a/b"), "hf:a/b: ", expected)


# ----------------------------------------------------------------------------------------------------------------------
# the cache


def fill_cache(cache, name: str = "owner___name"):
    """Put a dataset into the cache of `datasets` as if it had been downloaded."""
    import datasets

    expected = write_files("source", "parquet")
    datasets.load_dataset("./source")
    os.rename(os.path.join(cache, "source"), os.path.join(cache, name))
    for folder, _, names in os.walk(os.path.join(cache, name)):
        for file in names:
            if file.startswith("source-"):
                os.rename(os.path.join(folder, file), os.path.join(folder, file.replace("source-", "name-")))
    shutil.rmtree("source")
    return expected


def test_offline_the_cache_of_datasets_is_used(tmp_path, monkeypatch, capsys):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    expected = fill_cache(tmp_path / "cache")
    assert read("hf:owner/name") == expected
    assert "using the copy in Hugging Face's cache" in capsys.readouterr().out
    refusal(lambda: read("hf:owner/name:en"), "no config 'en'", "one of default")
    refusal(lambda: read("hf:owner/name::dev"), "no split 'dev'", "one of train")


# ----------------------------------------------------------------------------------------------------------------------
# the Hub


CODE = """
import sys, time
sys.path.insert(0, {root!r})
from configurator import UserError
from dongpt.text import hub
hub.COPY_BYTES, hub.BATCH_ROWS = 20_000, 64
import datasets
datasets.config.STREAMING_READ_MAX_RETRIES = 1
time.sleep = lambda seconds: None
for name in {names!r}:
    try:
        with hub.open_dataset(hub.parse_name(name), {column!r}, "out") as documents:
            print(documents.source, [text for text, _ in documents.read_documents()])
    except UserError as error:
        print("ERROR", error)
"""


def ask(server, *names: str, column: str = "text") -> list[str]:
    """What a program prints that reads datasets from the Hub: a line for each."""
    code = CODE.format(root=ROOT, names=names, column=column)
    variables = {key: value for key, value in environment(**server.environment(os.path.abspath("home"))).items()}
    done = fork_server.run([sys.executable, "-c", code], env=variables, capture_output=True, encoding="utf-8")
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.splitlines()


def test_datasets_of_the_hub_with_their_commit(tmp_path):
    expected = write_files(tmp_path / "hub" / "a" / "b", "parquet")
    write_files(tmp_path / "hub" / "a" / "lines", "jsonl")
    with HubServer(tmp_path / "hub") as server:
        found = ask(server, "hf:a/b", "hf:a/lines", "hf:a/b:default:train")
    assert found == [f"hf:a/{name}:default:train@{COMMIT} {expected}" for name in ("b", "lines", "b")]


def test_wrong_names_on_the_hub(tmp_path):
    for config in ("en", "de"):
        write_files(tmp_path / "hub" / "a" / "two" / config, "jsonl", n_files=1)
    card = "---\nconfigs:\n- config_name: en\n  data_files: en/*\n- config_name: de\n  data_files: de/*\n---\n"
    (tmp_path / "hub" / "a" / "two" / "README.md").write_text(card, encoding="utf-8")
    (tmp_path / "hub" / "a" / "gated").mkdir()
    cases = {
        "hf:a/nothing": "the Hub has no such dataset",
        "hf:nothing/two": "the Hub has no such dataset",
        "hf:a/two": "several configs: write hf:a/two:CONFIG, where CONFIG is one of en, de",
        "hf:a/two:fr": "no config 'fr': write hf:a/two:CONFIG, where CONFIG is one of en, de",
        "hf:a/two:de:dev": "no split 'dev': write hf:a/two:de:SPLIT, where SPLIT is one of train",
        "hf:a/gated": "gated: ask for access at https://huggingface.co/datasets/a/gated",
        "hf:a/two:de": f"hf:a/two:de:train@{COMMIT}",
    }
    with HubServer(tmp_path / "hub") as server:
        server.gated.add("a/gated")
        found = ask(server, *cases)
    assert len(found) == len(cases)
    for line, part in zip(found, cases.values()):
        assert part in line, line


def test_a_dataset_with_a_script_is_read_from_its_conversion_to_parquet(tmp_path):
    for name in ("one", "two", "part", "none"):
        (tmp_path / "hub" / "a" / name).mkdir(parents=True)
        (tmp_path / "hub" / "a" / name / f"{name}.py").write_text("1 / 0", encoding="utf-8")
    expected = write_files(tmp_path / "one" / "plain_text" / "train", "parquet")
    for config in ("en", "de"):
        write_files(tmp_path / "two" / config / "train", "parquet", n_files=1 + (config == "de"))
    write_files(tmp_path / "part" / "plain_text" / "partial-train", "parquet")
    with HubServer(tmp_path / "hub") as server:
        server.revisions |= {(f"a/{name}", hub.CONVERTED): str(tmp_path / name) for name in ("one", "two", "part")}
        one, two, german, part, none = ask(server, "hf:a/one", "hf:a/two", "hf:a/two:de", "hf:a/part", "hf:a/none")
    assert one.endswith(str(expected)) and one.startswith("hf:a/one:plain_text:train@")
    assert "several configs: write hf:a/two:CONFIG, where CONFIG is one of de, en" in two
    assert german.startswith("hf:a/two:de:train@") and german.count("'") == 2 * (700 + 811)
    assert "no complete Parquet copy" in part and "hf:./FOLDER" in part
    assert none.startswith("ERROR hf:a/none")


def test_a_lost_connection_is_a_sentence_and_the_same_command_continues_without_reading_again(tmp_path):
    expected = write_files(tmp_path / "hub" / "a" / "b", "parquet", n_files=6)
    with HubServer(tmp_path / "hub") as server:
        ask(server, "hf:a/b")
        n_reads = len(server.data_reads())
    with HubServer(tmp_path / "hub") as server:
        server.max_reads = n_reads - 2
        (line,) = ask(server, "hf:a/b")
        assert line.startswith("ERROR hf:a/b:default:train@") and "run the same command again to continue" in line
        assert "cannot be read after row" in line and copies()
        server.max_reads, server.asked = 10**9, []
        continued, found = ask(server, "hf:a/b")
        assert continued.startswith("continuing to read hf:a/b:default:train@") and found.endswith(str(expected))
        assert len(server.data_reads()) < n_reads - 2
    assert visible("out") == [] and not copies()


def test_another_commit_starts_over(tmp_path):
    write_files(tmp_path / "hub" / "a" / "b", "parquet", n_files=6)
    with HubServer(tmp_path / "hub") as server:
        server.max_reads = 5
        ask(server, "hf:a/b")
    expected = write_files(tmp_path / "hub" / "a" / "b", "parquet", n_files=6, rows=650)
    with HubServer(tmp_path / "hub", commit="f" * 40) as server:
        over, found = ask(server, "hf:a/b")
    assert "starting over" in over and found == f"hf:a/b:default:train@{'f' * 40} {expected}"


def test_only_the_column_that_is_needed_is_read(tmp_path):
    write_files(tmp_path / "hub" / "a" / "b", "parquet")
    with HubServer(tmp_path / "hub") as server:
        (found,) = ask(server, "hf:a/b", column="other")
    assert found.startswith(f"hf:a/b:default:train@{COMMIT} ['0 699 ")


def test_without_a_network_a_sentence_says_so(tmp_path):
    server = types.SimpleNamespace(
        environment=lambda home: {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    )
    (line,) = ask(server, "hf:a/b")
    assert line.startswith("ERROR hf:a/b: the Hub cannot be reached") and "connect to the network" in line


# ----------------------------------------------------------------------------------------------------------------------
# data/prepare.py


def prepare_cli(*args: str, cwd, check=0):
    return run_here("data/prepare.py", *args, cwd=cwd, check=check)


def test_data_prepare_reads_a_dataset(tmp_path):
    expected = write_files("folder", "jsonl", n_files=1)
    done = run("data/prepare.py", "--input=hf:./folder", "--data_dir=data", cwd=tmp_path)
    assert f"in {len(expected)} documents" in done.stdout and done.stderr == ""
    meta = read_meta("data")
    assert meta["source"] == "hf:folder:default:train" and meta["documents"] == len(expected)
    assert sorted(os.listdir("data")) == [".dongpt.lock", "meta.json", "train.bin", "val.bin"]
    # the same as from the file itself
    prepare_cli("--input=folder/train-0.jsonl", "--data_dir=other", cwd=tmp_path)
    for name in ("train.bin", "val.bin"):
        with open(f"data/{name}", "rb") as one, open(f"other/{name}", "rb") as other:
            assert one.read() == other.read()


def test_data_prepare_writes_nothing_if_the_dataset_cannot_be_used(tmp_path):
    write_files("folder", "jsonl", n_files=1)
    os.makedirs("blank")
    with open("blank/train.jsonl", "w", encoding="utf-8") as file:
        file.write('{"text": " "}\n{"text": null}\n{"text": ""}\n')
    for name, field, part in (
        ("hf:./nothing", "text", "no such folder"),
        ("hf:./folder", "body", "no column 'body'"),
        ("hf:./folder::dev", "text", "no split 'dev'"),
        ("hf:./blank", "text", "the text is blank"),
        ("hf:", "text", "is not the name of a dataset"),
        ("hf:a/b", "text", "HF_HUB_OFFLINE"),
    ):
        done = prepare_cli(f"--input={name}", f"--field={field}", "--data_dir=data", cwd=tmp_path, check=2)
        expect_sentence(done, part)
        assert not os.path.exists("data"), name


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_null_and_blank_rows_are_left_out_with_a_count(tmp_path, kind):
    import pyarrow
    import pyarrow.parquet

    rows = [*texts(50), None, "", " \n ", *texts(50, 1)]
    os.makedirs("folder")
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": rows}), "folder/train.parquet")
    else:
        with open("folder/train.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in rows)
    done = prepare_cli("--input=hf:./folder", "--data_dir=data", cwd=tmp_path)
    assert "in 100 documents" in done.stdout and "skipped 3 " in done.stdout
    assert read_meta("data")["left_out"] == 3


def test_a_validation_split_and_a_separator(tmp_path):
    os.makedirs("folder")
    for split in ("train", "validation"):
        with open(f"folder/{split}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": f"{split} {i}\n--\nmore {i}\n"}) + "\n" for i in range(30))
    args = ["--input=hf:./folder", "--val_input=hf:./folder::validation", "--separator=--", "--data_dir=data"]
    done = prepare_cli(*args, cwd=tmp_path)
    assert "in 120 documents" in done.stdout and "a separate text" in done.stdout
    meta = read_meta("data")
    tokenizer = from_dict(meta["tokenizer"])
    for split, name in (("train", "train"), ("validation", "val")):
        text = tokenizer.decode(np.fromfile(f"data/{name}.bin", "<u2").tolist())
        assert text == "".join(f"{split} {i}\n{END}more {i}\n{END}" for i in range(30))
    done = prepare_cli(*args, "--val_fraction=0.2", cwd=tmp_path, check=2)
    expect_sentence(done, "--val_input and --val_fraction")
    done = prepare_cli(*args, "--document=line", cwd=tmp_path, check=2)
    expect_sentence(done, "--separator and --document=line")


def test_another_dataset_of_the_same_name_is_not_overwritten(tmp_path):
    name = f"hub_test_{os.getpid()}"
    write_files(name, "jsonl", n_files=1)
    try:
        for _ in range(2):  # the same one may be prepared again
            prepare_cli(f"hf:./{name}", cwd=tmp_path)
        done = prepare_cli(f"{name}/train-0.jsonl", f"--name={name}x", cwd=tmp_path)
        assert os.path.exists(os.path.join(ROOT, "data", name, "train.bin"))
        done = prepare_cli(name, cwd=tmp_path, check=2)
        expect_sentence(done, f"data/{name} contains data prepared from hf:{name}", "--name=NAME")
    finally:
        for folder in (name, name + "x"):
            shutil.rmtree(os.path.join(ROOT, "data", folder), ignore_errors=True)


@pytest.mark.parametrize("tokenizer", [pytest.param("char", marks=pytest.mark.torture), "bpe"])
def test_a_killed_preparation_continues_to_the_same_bytes(tmp_path, tokenizer):
    write_files(tmp_path / "hub" / "a" / "b", "parquet", n_files=6)
    code = """
import os, runpy, sys, time
import datasets
datasets.config.STREAMING_READ_MAX_RETRIES = 1
sys.path.insert(0, {root!r})
from dongpt.text import hub, prepare
hub.COPY_BYTES, hub.BATCH_ROWS, prepare.CHARS_PER_SAVE = 20_000, 64, 40_000
calls, at = [], {at}
def count(function):
    def call(*args, **options):
        result = function(*args, **options)
        calls.append(1)
        if len(calls) == at:
            os._exit(9)  # as if it was killed
        return result
    return call
hub.HubText._save = count(hub.HubText._save)
prepare.BinWriter.save = count(prepare.BinWriter.save)
sys.argv = ["prepare.py", *{args!r}]
runpy.run_path({program!r}, run_name="__main__")
"""
    args = ["hf:a/b", f"--tokenizer={tokenizer}", "--vocab_size=300"]
    program = os.path.join(ROOT, "data", "prepare.py")

    def start(server, at: int, folder: str):
        arguments = [*args, f"--data_dir={folder}"]
        variables = environment(**server.environment(tmp_path / "home"))
        text = code.format(root=ROOT, at=at, args=arguments, program=program)
        return fork_server.run([sys.executable, "-c", text], env=variables, capture_output=True, encoding="utf-8")

    with HubServer(tmp_path / "hub") as server:
        done = start(server, 10**9, "whole")
        assert done.returncode == 0, done.stderr
        n_reads, n_kills, server.asked = len(server.data_reads()), 0, []
        while (done := start(server, 12, "killed")).returncode == 9:
            n_kills += 1
        assert done.returncode == 0, done.stderr
        assert n_kills >= 2
        assert len(server.data_reads()) <= n_reads + 3 * n_kills  # the schema, and files that were not read to the end
    for name in ("train.bin", "val.bin", "meta.json"):
        with open(f"whole/{name}", "rb") as one, open(f"killed/{name}", "rb") as other:
            assert one.read() == other.read()
    assert sorted(os.listdir("killed")) == [".dongpt.lock", "meta.json", "train.bin", "val.bin"]
