"""data/tinystories/prepare.py: the dataset's own validation split, from folders and from a Hub."""

import json
import os

import numpy as np
import pytest
from helpers import ROOT, TINY_RUN, expect_sentence, run, run_here, visible
from hub_server import COMMIT, HubServer

from dongpt.text.bins import read_meta
from dongpt.text.tokenizers import END, from_dict

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")
STORIES = {
    "train": [f"Once upon a time there was a cat named Tom {i}.\nHe ran home." for i in range(300)],
    "validation": [f"One day, Lily {i} saw a dog.\n\nThey played." for i in range(9)],
}


def write_stories(folder, kind: str = "parquet", splits=STORIES):
    import pyarrow
    import pyarrow.parquet

    os.makedirs(os.path.join(folder, "data"), exist_ok=True)
    for split in splits:
        path = os.path.join(folder, "data", f"{split}-00000-of-00001")
        if kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": STORIES[split]}), path + ".parquet")
        else:
            with open(path + ".jsonl", "w", encoding="utf-8") as file:
                file.writelines(json.dumps({"text": story}) + "\n" for story in STORIES[split])


@pytest.fixture
def shelf():
    """The name of a folder under data/, which is removed at the end."""
    import shutil

    name = f"tinystories_test_{os.getpid()}"
    yield name
    shutil.rmtree(os.path.join(ROOT, "data", name), ignore_errors=True)


def decoded(name: str, split: str) -> list[str]:
    """The documents of a split."""
    folder = os.path.join(ROOT, "data", name)
    ids = np.fromfile(os.path.join(folder, f"{split}.bin"), "<u2")
    text = from_dict(read_meta(folder)["tokenizer"]).decode(ids.tolist())
    assert text.endswith(END)
    return text.split(END)[:-1]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("options", [["--vocab_size=400"], ["--tokenizer=char"], ["--tokenizer=word"]])
def test_the_validation_split_becomes_val_bin(tmp_path, shelf, kind, options):
    write_stories("stories", kind)
    done = run_here("data/tinystories/prepare.py", "--input=hf:./stories", f"--name={shelf}", *options, cwd=tmp_path)
    assert decoded(shelf, "train") == STORIES["train"] and decoded(shelf, "val") == STORIES["validation"]
    folder = os.path.join(ROOT, "data", shelf)
    assert visible(folder) == ["meta.json", "train.bin", "val.bin"]
    assert set(os.listdir(folder)) - set(visible(folder)) == {".dongpt.lock"}
    meta = read_meta(folder)
    assert meta["documents"] == 309 and meta["source"] == "hf:stories:default:train"
    assert f"--dataset={shelf}" in done.stdout
    if options == ["--vocab_size=400"] and kind == "parquet":
        run("train.py", f"--dataset={shelf}", *TINY_RUN, cwd=tmp_path)


def test_from_the_hub_with_gpt2s_tokens(tmp_path, shelf, gpt2_vocabulary):
    write_stories(tmp_path / "hub" / "roneneldan" / "TinyStories")
    with HubServer(tmp_path / "hub") as server:
        variables = server.environment(tmp_path / "home")
        run("data/tinystories/prepare.py", f"--name={shelf}", "--tokenizer=gpt2", cwd=tmp_path, env=variables)
    assert decoded(shelf, "train") == STORIES["train"] and decoded(shelf, "val") == STORIES["validation"]
    assert read_meta(os.path.join(ROOT, "data", shelf))["source"] == f"hf:roneneldan/TinyStories:default:train@{COMMIT}"


def test_without_a_validation_split_a_sentence_says_so(tmp_path, shelf):
    write_stories("stories", splits=["train"])
    args = "--input=hf:./stories", f"--name={shelf}"
    done = run_here("data/tinystories/prepare.py", *args, cwd=tmp_path, check=2)
    expect_sentence(done, "no split 'validation'", "one of train")
    done = run_here("data/tinystories/prepare.py", "--input=stories", cwd=tmp_path, check=2)
    expect_sentence(done, "stories", "hf:./stories")
    assert not os.path.exists(os.path.join(ROOT, "data", shelf))
