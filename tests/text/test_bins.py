"""Shards: one text in several files. Windows, order, evaluation and programs as with one file; what is refused."""

import hashlib
import importlib.util
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    TINY_RUN,
    assert_same,
    assert_same_training,
    expect_sentence,
    generated_text,
    refusal,
    run,
    visible,
    write_corpus,
)

import evaluate
import train
from dongpt import runtime
from dongpt.text import bins
from dongpt.text.bins import BinWriter, EncodedText, TokenArray, describe, file_sha256, shard_name
from dongpt.text.documents import Texts
from dongpt.text.prepare import Vocabulary, prepare
from dongpt.text.tokenizers import CharTokenizer
from dongpt.train import data as corpora
from dongpt.train.data import Corpus
from dongpt.train.evaluation import eval_batches, predicted_bytes

smoke = pytest.mark.smoke
pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")
BLOCK = 8
SIZES = {
    "two": [100, 103],
    "tiny": [1, 2, 1, 30, 5, 5, 1, 80, 3, 75],
    "equal": [29] * 7,
    "ones": [1] * 203,
    "one": [203],
}
GERMAN = CharTokenizer("".join(map(chr, range(300, 50557))))  # as many entries as GPT-2's


@pytest.fixture(params=[0, 2**26], ids=["on_disk", "in_memory"])
def in_memory(request, monkeypatch) -> int:
    """Bytes above which files stay on disk: the test runs with both kinds of reading."""
    monkeypatch.setattr(bins, "MAX_IN_MEMORY_BYTES", request.param)
    return request.param


def numbered(folder, sizes=(), n_val: int = 50) -> str:
    """Write a corpus of 203 training tokens, each equal to its position, in shards of these sizes or in one file."""
    os.makedirs(folder, exist_ok=True)
    np.arange(n_val, dtype="<u2").tofile(os.path.join(folder, "val.bin"))
    ids = np.arange(203, dtype="<u2")
    assert not sizes or sum(sizes) == len(ids)
    places = np.cumsum([0, *sizes])
    for number, (start, stop) in enumerate(zip(places, places[1:])):
        ids[start:stop].tofile(os.path.join(folder, shard_name("train", number)))
    if not sizes:
        ids.tofile(os.path.join(folder, "train.bin"))
    return str(folder)


def cut(folder, target, sizes: list[int]) -> str:
    """A copy of a corpus in one file whose train lies in shards of these sizes, the last of which takes the rest."""
    os.makedirs(target)
    shutil.copy(os.path.join(folder, "val.bin"), target)
    ids = np.fromfile(os.path.join(folder, "train.bin"), "<u2")
    described, digest = [], hashlib.sha256()
    for number, part in enumerate(np.split(ids, np.cumsum(sizes))):
        path = os.path.join(target, shard_name("train", number))
        part.tofile(path)
        described.append(describe(path, file_sha256(path)))
        digest.update(described[-1]["sha256"].encode())
    with open(os.path.join(folder, "val.bin"), "rb") as file:
        digest.update(file.read())
    meta = read_json(folder)
    write_json(target, {**meta, "shards": {"train": described}, "ids_sha256": digest.hexdigest()})
    return str(target)


def read_json(folder) -> dict:
    with open(os.path.join(folder, "meta.json"), encoding="utf-8") as file:
        return json.load(file)


def write_json(folder, meta):
    with open(os.path.join(folder, "meta.json"), "w", encoding="utf-8") as file:
        json.dump(meta, file)


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[str, str]:
    """The same text in one train.bin, and in shards of unequal sizes. Read them, do not write to them."""
    at = tmp_path_factory.mktemp("both")
    one = write_corpus(at / "one", generated_text(1500))
    return one, cut(one, at / "shards", [700, 5, 11, 2000, 1, 800])


def program(name: str):
    """A program under data/ as a module."""
    spec = importlib.util.spec_from_file_location(name, os.path.join(ROOT, "data", f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shards(folder) -> list[str]:
    """The names of the shards in a folder, of which there are less than a thousand."""
    return sorted(name for name in os.listdir(folder) if bins.SHARD_PATTERN.fullmatch(name))


def listing(folder) -> dict[str, str]:
    """The files of a folder and the hash of each."""
    return {name: file_sha256(os.path.join(folder, name)) for name in visible(folder)}


# ----------------------------------------------------------------------------------------------------------------------
# numbers in several files


@smoke
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", ["<u2", "u1"])
def test_numbers_in_several_files_are_those_of_one(tmp_path, in_memory, sizes, kind):
    ids, start, files = np.arange(203).astype(kind), 0, []
    for i, size in enumerate(SIZES[sizes]):
        ids[start : start + size].tofile(tmp_path / str(i))
        files.append((str(tmp_path / str(i)), size))
        start += size
    for length in (203, 150):
        numbers = TokenArray(files, kind, length)
        expected = ids[:length]
        assert len(numbers) == length and numbers.in_memory == (in_memory > 0)
        for a in (0, 1, 28, 29, 30, 99, 100, 101, length - 1, length, length + 9):
            for b in (0, 1, 29, 30, 58, 102, length - 1, length, length + 50, None):
                found = numbers[a:b]
                assert found.dtype == np.dtype(kind) and found.tolist() == expected[a:b].tolist()
        assert numbers[:].tolist() == expected.tolist() == np.concatenate([*numbers.chunks(7)]).tolist()
        assert numbers[-5:].tolist() == expected[-5:].tolist()
        starts = np.array([0, 3, 90, 95, 99, 100, length - 40, 17])
        assert numbers.windows(starts, 40).tolist() == [expected[s : s + 40].tolist() for s in starts]


@smoke
def test_what_is_small_stays_in_memory(tmp_path, monkeypatch):
    for folder in (numbered(tmp_path / "a", SIZES["tiny"]), numbered(tmp_path / "b")):
        for most, in_memory in ((2**26, True), (406, True), (405, False)):  # 2 * 203: exactly as much as may be
            monkeypatch.setattr(bins, "MAX_IN_MEMORY_BYTES", most)
            assert Corpus(folder).tokens["train"].in_memory == in_memory


@smoke
@pytest.mark.parametrize("length, most", [(203, 10**6), (203, 203), (203, 150), (203, 40), (203, 5), (2, 5), (2, 1)])
def test_what_is_looked_at_is_spread_over_all_files_to_the_end(tmp_path, monkeypatch, in_memory, length, most):
    monkeypatch.setattr(corpora, "MAX_CHECKED_TOKENS", most)
    corpus, looked_at = Corpus(numbered(tmp_path, SIZES["two"]), length / 203), []
    monkeypatch.setattr(corpus, "_check_ids", lambda ids, *_: looked_at.append(ids))
    corpus.check(1, 203, ["train"])
    seen = np.concatenate(looked_at).ravel()
    assert corpus.lengths["train"] == length and seen[0] == 0 and len(seen) <= max(most, length) + looked_at[0].shape[1]
    if most >= length:
        assert set(seen.tolist()) == set(range(length))
    else:
        assert len(seen) <= most + looked_at[0].shape[1]
        assert most < 40 or np.diff(np.sort(seen)).max() <= 2 * length / most + 1 and seen[-1] == length - 1


@smoke
@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="counts the open files in /proc")
def test_no_file_stays_open(tmp_path, monkeypatch):
    monkeypatch.setattr(bins, "MAX_IN_MEMORY_BYTES", 0)
    corpus = Corpus(numbered(tmp_path, SIZES["ones"]))
    before = len(os.listdir("/proc/self/fd"))
    for first in range(30):
        x, y = corpus.train_batch(first, 2, BLOCK, 1, 50257)
        assert torch.equal(y, x + 1)
    assert len(os.listdir("/proc/self/fd")) == before


@smoke
def test_a_shard_that_becomes_shorter_while_it_is_read_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(bins, "MAX_IN_MEMORY_BYTES", 0)
    corpus = Corpus(numbered(tmp_path, SIZES["two"]))
    os.truncate(tmp_path / "train_001.bin", 20)
    refusal(lambda: [corpus.train_batch(i, 4, BLOCK, 1, 50257) for i in range(6)], "train_001.bin", "truncated")


# ----------------------------------------------------------------------------------------------------------------------
# batches, evaluation, figures


@smoke
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("fraction", [1.0, 0.6])
def test_batches_and_evaluation_are_those_of_one_file(tmp_path, monkeypatch, in_memory, sizes, fraction):
    one = Corpus(numbered(tmp_path / "one"), fraction)
    many = Corpus(numbered(tmp_path / "many", SIZES[sizes]), fraction)
    one.tokenizer_dict = many.tokenizer_dict = GERMAN.to_dict()  # GPT-2's vocabulary may need a network
    assert many.lengths == one.lengths and many.windows_per_epoch(BLOCK) == one.windows_per_epoch(BLOCK)
    for first, n in ((0, 5), (3, 60), (1000, 7)):
        x, y = many.train_batch(first, n, BLOCK, 3, 50257)
        assert torch.equal(y, x + 1) and x.dtype == torch.int64
        assert_same((x, y), one.train_batch(first, n, BLOCK, 3, 50257))
    for split in ("train", "val"):
        for n_windows in (None, 4):
            assert_same(
                [*eval_batches(many, split, 3, BLOCK, n_windows)], [*eval_batches(one, split, 3, BLOCK, n_windows)]
            )
        assert predicted_bytes(many, split) == predicted_bytes(one, split)
        assert np.concatenate([*many.tokens[split].chunks()]).tolist() == one.tokens[split][:].tolist()
    assert many.loss_weights(0, 3, 2, BLOCK, 1).tolist() == [1, 1, 1]


@smoke
@pytest.mark.parametrize("fraction", [1.0, 0.4])
def test_predicted_bytes_are_those_of_one_file(both, in_memory, fraction):
    one, many = (Corpus(folder, fraction) for folder in both)
    for split in ("train", "val"):
        assert predicted_bytes(many, split) == predicted_bytes(one, split)


@smoke
def test_shards_on_the_device_give_the_batches_of_one_file(tmp_path, in_memory):
    one, many = Corpus(numbered(tmp_path / "one")), Corpus(numbered(tmp_path / "many", SIZES["tiny"]))
    many.to_device(runtime.start("cpu"), 50257)
    for first in range(0, 80, 5):
        assert_same(
            tuple(many.train_batch(first, 5, BLOCK, 1, 50257)), tuple(one.train_batch(first, 5, BLOCK, 1, 50257))
        )
    with pytest.raises(ValueError, match="many contains the id 202,"):
        Corpus(str(tmp_path / "many")).to_device(runtime.start("cpu"), 202)


@smoke
def test_a_mask_beside_shards_counts_over_all_of_them(tmp_path, in_memory):
    folders = [numbered(tmp_path / "one"), numbered(tmp_path / "many", SIZES["tiny"])]
    for folder in folders:
        for split, n in (("train", 203), ("val", 50)):
            mask = np.random.default_rng(n).random(n) < 0.3
            mask.astype(np.uint8).tofile(os.path.join(folder, f"{split}.mask.bin"))
    one, many = map(Corpus, folders)
    for first in range(0, 60, 4):
        assert_same(
            tuple(many.train_batch(first, 4, BLOCK, 1, 50257)), tuple(one.train_batch(first, 4, BLOCK, 1, 50257))
        )
    assert_same([*eval_batches(many, "train", 3, BLOCK)], [*eval_batches(one, "train", 3, BLOCK)])
    one.tokenizer_dict = many.tokenizer_dict = GERMAN.to_dict()
    assert predicted_bytes(many, "train") == predicted_bytes(one, "train")


# ----------------------------------------------------------------------------------------------------------------------
# the order


@smoke
@pytest.mark.parametrize("wide", [False, True])
def test_the_order_is_numpys_permutation_of_disjoint_windows_from_a_random_offset(tmp_path, monkeypatch, wide):
    """The order of the first release: a change would break exact resume of every run."""
    corpus = Corpus(numbered(tmp_path, SIZES["tiny"]))
    if wide:  # more tokens than 32 bits count
        corpus.lengths["train"] = n_tokens = 2**32 + 7
        block, n = 2**28, 15
    else:
        n_tokens, block, n = 203, BLOCK, 24
    for epoch in (0, 3):
        random = np.random.Generator(np.random.Philox(key=7 + (epoch << 64)))
        offset = random.integers(0, n_tokens - n * block)
        expected = (offset + block * random.permutation(n)).tolist()
        assert corpus.window_starts(epoch * n, n, block, 7).tolist() == expected
        assert corpus.window_starts(epoch * n + 5, 3, block, 7).tolist() == expected[5:8]


# ----------------------------------------------------------------------------------------------------------------------
# programs


@pytest.mark.parametrize("mapped", [False, True], ids=["in_memory", "on_disk"])
def test_a_training_on_shards_is_that_on_one_file_and_resumes_exactly(both, monkeypatch, mapped):
    monkeypatch.setattr(bins, "MAX_IN_MEMORY_BYTES", 0 if mapped else 2**26)
    one, many = both
    assert train.main([f"--data_dir={one}", *TINY_RUN, "--out_dir=one"]) == 0
    assert train.main([f"--data_dir={many}", *TINY_RUN, "--out_dir=many"]) == 0
    assert_same_training("many", "one")
    assert train.main([f"--data_dir={many}", *TINY_RUN, "--out_dir=parts", "--max_iters=3"]) == 0
    assert train.main(["--init_from=resume", "--out_dir=parts", "--max_iters=6"]) == 0
    assert_same_training("parts", "many")


def test_more_windows_than_an_epoch_resume_exactly(both):
    """The stop is in the second epoch."""
    n = Corpus(both[1], 0.05).windows_per_epoch(16)
    assert 5 < n < 4 * 2 * 5
    args = [f"--data_dir={both[1]}", *TINY_RUN, "--dataset_fraction=0.05", "--eval_interval=9"]
    assert train.main([*args, "--out_dir=straight", "--max_iters=9"]) == 0
    assert train.main([*args, "--out_dir=parts", "--max_iters=5"]) == 0
    assert train.main(["--init_from=resume", "--out_dir=parts", "--max_iters=9"]) == 0
    assert_same_training("parts", "straight")


@pytest.mark.parametrize("split", ["train", "val"])
def test_evaluate_measures_shards_as_one_file(both, tiny_run, in_memory, capsys, tmp_path, split):
    results = []
    for folder in both:
        shutil.copytree(tiny_run, tmp_path / "run", dirs_exist_ok=True)
        assert not evaluate.main(
            [f"--out_dir={tiny_run}", f"--data_dir={folder}", f"--split={split}", "--json", "--device=cpu"]
        )
        results.append(json.loads(capsys.readouterr().out))
    assert results[0] == results[1] and results[0][0]["tokens"] == Corpus(both[0]).lengths[split] - 1


def test_explore_tells_the_same_of_shards(both, in_memory, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **kwargs: None)
    printed = []
    for folder in both:
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "data")
        program("explore").main([f"--data_dir={tmp_path / 'data'}", "--most_tokens=2500"])
        printed.append(capsys.readouterr().out)
    assert (
        printed[0] == printed[1]
        and f"train: {Corpus(both[0]).lengths['train']:,} tokens; decoding only the first 2,500" in printed[0]
    )


@smoke
@pytest.mark.parametrize("name", ["check", "explore", "word2vec"])
def test_the_dataset_needs_no_option(name, tmp_path, tiny_data, monkeypatch):
    """python data/check.py don_char reads data/don_char; a path works too, as after tab completion."""
    monkeypatch.chdir(tmp_path)
    for folder in ("don_char", "mine"):
        os.mkdir(folder)
    for path, folder in (
        ("don_char", os.path.join(ROOT, "data", "don_char")),
        ("mine", str(tmp_path / "mine")),
        (tiny_data, os.path.abspath(tiny_data)),
        ("missing", os.path.join(ROOT, "data", "missing")),
    ):
        assert bins.find_data_folder("", "", paths=[path]) == folder
    os.mkdir("empty")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "empty")) + " has no train.bin"):
        program(name).main(["empty"])
    with pytest.raises(ValueError, match="empty and --data_dir=b both name a dataset: remove one"):
        program(name).main(["empty", "--data_dir=b"])


@smoke
def test_check_reads_all_and_tells_of_each_shard(both, in_memory, capsys):
    for folder in both:
        program("check").main([f"--data_dir={folder}"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[2:5] == [
        "train_000.bin: 700 tokens, unchanged",
        "train_001.bin: 5 tokens, unchanged",
        "train_002.bin: 11 tokens, unchanged",
    ]
    assert [line.split(":")[0] for line in printed] == [
        "train",
        "val",
        *(shard_name("train", i) for i in range(7)),
        "train",
        "val",
    ]


# ----------------------------------------------------------------------------------------------------------------------
# memory


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads its memory from /proc")
def test_a_corpus_of_gigabytes_takes_little_memory_and_reads_only_what_it_needs(tmp_path):
    """40 shards of 128 MB, which are holes but for the tokens around each border."""
    described, n = [], 2**26
    ends = None
    for number in range(40):
        path = tmp_path / shard_name("train", number)
        with open(path, "wb") as file:
            file.truncate(2 * n)
            if os.stat(path).st_blocks * 512 > 2**20:
                pytest.skip("this file system keeps no holes")
            if number in (7, 8):
                file.seek(2 * (n - 2) if number == 7 else 0)
                file.write(np.array([1, 2] if number == 7 else [3, 4], "<u2").tobytes())
        if number in (0, 7, 8):
            described.append(describe(str(path), "0" * 64))
            ends = ends or described[-1]["ends_sha256"]
        else:
            described.append({"file": path.name, "tokens": n, "ends_sha256": ends, "sha256": "0" * 64})
    np.zeros(1000, "<u2").tofile(tmp_path / "val.bin")
    write_json(
        tmp_path,
        {
            "tokenizer": CharTokenizer("abcde").to_dict(),
            "vocab_size": 5,
            "tokens": {"train": 40 * n, "val": 1000},
            "shards": {"train": described},
        },
    )

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def bytes_read() -> int:
        with open("/proc/self/io") as file:
            return int(file.readline().split()[1])

    def look(corpus: Corpus) -> int:
        most = 0
        for i in range(200):
            corpus.train_batch(i * 12, 12, 512, 1337, 100)
            most = max(most, resident())
        return most

    write_corpus(tmp_path / "small", generated_text(500))
    look(Corpus(str(tmp_path / "small")))
    before, read = resident(), bytes_read()
    corpus = Corpus(str(tmp_path))
    corpus.check(512, 5)
    corpus.train_batch(0, 12, 512, 1337, 5)
    assert bytes_read() - read < 200e6  # of 5.4 GB: the ends of all files and an even sample
    most = max(resident(), look(corpus))
    assert corpus.windows_per_epoch(512) > 5 * 10**6 and most - before < 80e6  # 4 bytes per window, two while made
    assert corpus.tokens["train"][8 * n - 3 : 8 * n + 3].tolist() == [0, 1, 2, 3, 4, 0]
    starts = corpus.window_starts(5 * 10**6, 500, 512, 1337)
    assert len({start // n for start in starts.tolist()}) == 40  # windows come from the whole corpus
    read = bytes_read()
    for i in range(50):  # steps far apart: nothing in between is read
        corpus.train_batch(10**5 * i, 12, 512, 1337, 5)
    assert bytes_read() - read < 2e6


# ----------------------------------------------------------------------------------------------------------------------
# written by data/prepare.py


@smoke
@pytest.mark.parametrize("tokens", [7, 100, 1000, 10**6])
def test_shards_of_a_preparation_joined_are_the_train_bin_of_one_without(tmp_path, tokens):
    text = Texts([generated_text(300)])
    prepare(str(tmp_path / "one"), text, Vocabulary("char"))
    prepare(str(tmp_path / "many"), text, Vocabulary("char"), shard_tokens=tokens)
    names = shards(tmp_path / "many")
    contents = [(tmp_path / "many" / name).read_bytes() for name in names]
    assert b"".join(contents) == (tmp_path / "one" / "train.bin").read_bytes()
    assert {len(content) for content in contents[:-1]} <= {2 * tokens} and 0 < len(contents[-1]) <= 2 * tokens
    meta, plain = read_json(tmp_path / "many"), read_json(tmp_path / "one")
    digest = hashlib.sha256("".join(hashlib.sha256(content).hexdigest() for content in contents).encode())
    digest.update((tmp_path / "many" / "val.bin").read_bytes())
    assert meta.pop("ids_sha256") == digest.hexdigest() and "shards" not in plain
    assert meta.pop("shards") == {
        "train": [
            {
                "file": name,
                "tokens": len(content) // 2,
                "sha256": hashlib.sha256(content).hexdigest(),
                "ends_sha256": hashlib.sha256(content + content).hexdigest(),
            }
            for name, content in zip(names, contents)
        ]
    }
    del plain["ids_sha256"]
    assert meta == plain
    assert visible(tmp_path / "many") == sorted([*names, "meta.json", "val.bin"])
    program("check").main([f"--data_dir={tmp_path / 'many'}"])


def test_the_hash_of_the_ends_is_that_of_the_first_and_the_last_megabyte(tmp_path):
    content = np.random.default_rng(0).bytes(5 * 2**19)
    (tmp_path / "train_000.bin").write_bytes(content)
    assert describe(str(tmp_path / "train_000.bin"), "x") == {
        "file": "train_000.bin",
        "tokens": len(content) // 2,
        "sha256": "x",
        "ends_sha256": hashlib.sha256(content[: 2**20] + content[-(2**20) :]).hexdigest(),
    }


@smoke
def test_preparing_again_with_and_without_shards_leaves_nothing_of_the_other(tmp_path):
    texts = Texts([generated_text(300)])
    for tokens in (0, 100, 300, 0, 100):  # the second time there are fewer
        prepare(str(tmp_path), texts, Vocabulary("char"), shard_tokens=tokens)
        n = read_json(tmp_path)["tokens"]["train"]
        names = [shard_name("train", i) for i in range(-(-n // tokens))] if tokens else ["train.bin"]
        assert visible(tmp_path) == sorted([*names, "meta.json", "val.bin"])
        assert len(Corpus(str(tmp_path)).tokens["train"]) == n
    (tmp_path / "train.bin").write_bytes(b"stale")  # what meta.json does not name is not read
    program("check").main([f"--data_dir={tmp_path}"])


@smoke
@pytest.mark.parametrize("at", range(1, 12))
def test_an_interrupt_while_shards_are_moved_leaves_no_mixture(tmp_path, monkeypatch, at):
    """at: the call of replace or remove at which the process is killed."""
    old, new = "abc " * 100, "xyz " * 100
    prepare(str(tmp_path), Texts([old]), Vocabulary("char"), shard_tokens=50)  # eight shards
    calls, real = [], {"replace": os.replace, "remove": os.remove}

    def killed(name):
        def call(*paths):
            calls.append(str(paths[-1]))
            if len(calls) >= at:
                raise KeyboardInterrupt
            real[name](*paths)

        return call

    for name in real:
        monkeypatch.setattr(os, name, killed(name))
    with pytest.raises(KeyboardInterrupt):
        prepare(str(tmp_path), Texts([new]), Vocabulary("char"), shard_tokens=90)  # four
    for name in real:
        monkeypatch.setattr(os, name, real[name])
    moved = [name for name in calls[: at - 1] if os.path.basename(name) == "train_000.bin"]
    if moved:
        refusal(lambda: Corpus(str(tmp_path)), "interrupted", "run the same command again")
        prepare(str(tmp_path), Texts([new]), Vocabulary("char"), shard_tokens=90)
    corpus = Corpus(str(tmp_path))
    found = "".join(corpus.tokenizer().decode(corpus.tokens[split][:].tolist()) for split in ("train", "val"))
    assert found == (new if moved else old)
    assert len(visible(tmp_path)) == (4 if moved else 8) + 2
    program("check").main([f"--data_dir={tmp_path}"])


def test_prepare_writes_shards_and_refuses_less_than_none(tmp_path):
    (tmp_path / "text.txt").write_text(generated_text(300), encoding="utf-8")
    done = run("data/prepare.py", "--input=text.txt", "--data_dir=.", "--shard_tokens=500", cwd=tmp_path)
    n = read_json(tmp_path)["tokens"]["train"]
    assert f"tokens: {n:,} for training in {-(-n // 500)} shards, " in done.stdout
    before = listing(tmp_path)
    expect_sentence(
        run("data/prepare.py", "--input=text.txt", "--data_dir=.", "--shard_tokens=-1", cwd=tmp_path, check=None),
        "shard_tokens=-1",
    )
    assert listing(tmp_path) == before
    run("data/prepare.py", cwd=tmp_path, check=2)
    assert listing(tmp_path) == before


@smoke
def test_a_shard_may_end_within_what_is_added(tmp_path):
    ids = np.random.default_rng(0).integers(0, 50000, 1000).astype("<u2")
    with BinWriter(str(tmp_path), GERMAN, shard_tokens=37) as writer:
        for part in np.split(ids, [1, 30, 37, 74, 75, 400]):
            writer.add("train", EncodedText(part, len(part), len(part)))
        writer.add("val", EncodedText(ids[:5], 5, 5))
        writer.finish({})
    assert Corpus(str(tmp_path)).tokens["train"][:].tolist() == ids.tolist()
    program("check").main([f"--data_dir={tmp_path}"])


# ----------------------------------------------------------------------------------------------------------------------
# what is refused


@pytest.fixture
def copied(both, tmp_path) -> str:
    """A copy of the corpus in shards to do damage to."""
    return str(shutil.copytree(both[1], tmp_path / "data"))


def first_check(folder):
    """What train.py does before the first batch."""
    corpus = Corpus(str(folder))
    corpus.check(BLOCK, corpus.vocab_size)


@smoke
def test_a_missing_shard_is_named(copied):
    first_check(copied)
    os.remove(os.path.join(copied, "train_003.bin"))
    refusal(lambda: Corpus(copied), "has no train_003.bin", "copy it")


@smoke
@pytest.mark.parametrize("change", [-2, -1, 1, 2])
def test_a_shard_of_another_size_is_named_with_both_sizes(copied, change):
    path = os.path.join(copied, "train_003.bin")
    os.truncate(path, 4000 + change)
    refusal(lambda: Corpus(copied), "train_003.bin", f"{4000 + change:,} bytes", "4,000")


def same_sizes(folder) -> str:
    """Four shards of 300 tokens and one of fewer."""
    text = generated_text(300)
    prepare(str(folder), Texts([text]), Vocabulary("char"), shard_tokens=300)
    assert len(shards(folder)) >= 5
    return str(folder)


def swap(folder, one: str, other: str):
    paths = [os.path.join(folder, name) for name in (one, other)]
    os.rename(paths[0], paths[0] + ".x")
    os.rename(paths[1], paths[0])
    os.rename(paths[0] + ".x", paths[1])


@smoke
def test_swapped_shards_are_told_with_their_right_names(tmp_path):
    folder = same_sizes(tmp_path)
    swap(folder, "train_001.bin", "train_003.bin")
    for action in (lambda: first_check(folder), lambda: program("check").main([f"--data_dir={folder}"])):
        refusal(action, "train_001.bin does not match meta.json", "it is train_003.bin under a different name", "swap")


@smoke
def test_a_corpus_whose_order_in_meta_json_is_wrong_is_refused(tmp_path):
    folder = same_sizes(tmp_path)
    meta = read_json(folder)
    meta["shards"]["train"][1:3] = meta["shards"]["train"][2:0:-1]
    write_json(folder, meta)
    refusal(lambda: program("check").main([f"--data_dir={folder}"]), "changed since meta.json was written")


@smoke
@pytest.mark.parametrize("place", ["first", "end of first", "middle", "begin of last", "last"])
def test_a_changed_byte_is_found_at_the_ends_by_training_and_anywhere_by_check(tmp_path, monkeypatch, place):
    monkeypatch.setattr(bins, "HEAD_TAIL_HASH_BYTES", 64)
    folder = same_sizes(tmp_path)
    at = {"first": 0, "end of first": 62, "middle": 300, "begin of last": 600 - 64, "last": 598}[place]
    path = os.path.join(folder, "train_002.bin")
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    if place == "middle":
        first_check(folder)
    else:
        refusal(lambda: first_check(folder), "train_002.bin", "first or last megabyte", "copy it again")
    before = listing(folder)
    refusal(lambda: program("check").main([f"--data_dir={folder}"]), "train_002.bin", "does not match meta.json")
    assert listing(folder) == before


@smoke
def test_a_changed_val_is_found_by_check(copied):
    with open(os.path.join(copied, "val.bin"), "r+b") as file:
        byte = file.read(1)[0]
        file.seek(0)
        file.write(bytes([byte ^ 1]))
    refusal(lambda: program("check").main([f"--data_dir={copied}"]), "val.bin has changed since meta.json was written")


@smoke
def test_one_file_that_changed_is_found_by_check(both, tmp_path):
    folder = str(shutil.copytree(both[0], tmp_path / "data"))
    with open(os.path.join(folder, "train.bin"), "r+b") as file:
        file.seek(500)
        byte = file.read(1)[0]
        file.seek(500)
        file.write(bytes([byte ^ 1]))
    refusal(lambda: program("check").main([f"--data_dir={folder}"]), "train.bin or val.bin has changed")


@smoke
@pytest.mark.parametrize("described", [True, False])
def test_a_shard_of_a_larger_vocabulary_is_refused(copied, in_memory, described):
    path = os.path.join(copied, "train_003.bin")
    ids = np.fromfile(path, "<u2")
    ids[1000] = 5000
    ids.tofile(path)
    meta = read_json(copied)
    if described:
        meta["shards"]["train"][3] = describe(path, file_sha256(path))
        write_json(copied, meta)
        refusal(lambda: first_check(copied), "contains the id 5000", "another tokenizer")
    else:
        refusal(lambda: first_check(copied), "train_003.bin")
        refusal(lambda: program("check").main([f"--data_dir={copied}"]), "train_003.bin")


@smoke
def test_an_id_in_the_middle_is_found_by_check_and_when_it_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(bins, "MAX_IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(corpora, "MAX_CHECKED_TOKENS", 20)
    folder = numbered(tmp_path, SIZES["two"])
    ids = np.arange(100, dtype="<u2")
    ids[55] = 60000
    ids.tofile(tmp_path / "train_000.bin")
    Corpus(folder).check(BLOCK, 50304)
    refusal(lambda: Corpus(folder).train_batch(0, 24, BLOCK, 1, 50304), "train", "60000", "tokenizer")
    refusal(lambda: program("check").main([f"--data_dir={folder}"]), "60000")


BAD_SHARD = [
    ("file", "../data/train_000.bin"),
    ("file", "/etc/passwd"),
    ("file", "sub/train_000.bin"),
    ("file", 3),
    *(("file", name) for name in ("..", ".", "", "meta.json", "train_000.bin\0")),
    *(("tokens", n) for n in (0, -1, True, 701, 2048, 2**63)),
    ("tokens", "700"),
    ("tokens", 700.0),
    ("tokens", None),
    ("ends_sha256", 5),
    ("sha256", None),
]


@smoke
@pytest.mark.parametrize("key, value", BAD_SHARD)
def test_a_shard_whose_description_is_nonsense_or_a_path_is_refused(copied, key, value):
    meta = read_json(copied)
    meta["shards"]["train"][0][key] = value
    write_json(copied, meta)
    refusal(lambda: Corpus(copied), "meta.json is damaged", "prepare the data again")
    del meta["shards"]["train"][0][key]
    write_json(copied, meta)
    refusal(lambda: Corpus(copied), "meta.json is damaged", "prepare the data again")


@smoke
def test_a_shard_left_out_of_meta_json_is_told(copied):
    meta = read_json(copied)
    every = meta["shards"]["train"]
    for found in (every[:-1], every[1:]):
        write_json(copied, {**meta, "shards": {"train": found}})
        refusal(lambda: first_check(copied), "meta.json")


@smoke
def test_shards_without_meta_json_are_read_by_their_numbers_and_a_gap_is_told(tmp_path):
    folder = numbered(tmp_path, SIZES["equal"])
    assert Corpus(folder).tokens["train"][:].tolist() == list(range(203))
    os.rename(tmp_path / "train_006.bin", tmp_path / "train_007.bin")
    refusal(lambda: Corpus(folder), "has no train_006.bin", "copy it")
    os.rename(tmp_path / "train_007.bin", tmp_path / "train_006.bin")
    os.rename(tmp_path / "train_000.bin", tmp_path / "train_0.bin")
    refusal(lambda: Corpus(folder), "no train_000.bin")
    os.rename(tmp_path / "train_0.bin", tmp_path / "train_000.bin")
    (tmp_path / "train_003.bin").write_bytes(b"odd")
    refusal(lambda: Corpus(folder), "train_003.bin is damaged")


def test_more_than_a_thousand_shards_are_in_the_order_of_their_numbers(tmp_path):
    for i in range(1003):
        np.array([i], "<u2").tofile(tmp_path / shard_name("train", i))
    np.arange(9, dtype="<u2").tofile(tmp_path / "val.bin")
    assert Corpus(str(tmp_path)).tokens["train"][:].tolist() == list(range(1003))


@smoke
def test_other_files_are_no_shards(tmp_path):
    folder = numbered(tmp_path, SIZES["two"])
    for name in ("train_002.bin.part", "val_000.bin", "train_x.bin", "train_02.bin", "train_002.bin.bak"):
        (tmp_path / name).write_bytes(b"\1\0")
    assert len(Corpus(folder).tokens["train"]) == 203


@pytest.mark.parametrize("damage", ["missing", "truncated", "swapped", "changed"])
def test_train_ends_with_a_sentence_and_writes_nothing(tmp_path, damage):
    folder = same_sizes(tmp_path / "data")
    if damage == "missing":
        os.remove(tmp_path / "data" / "train_002.bin")
    if damage == "truncated":
        os.truncate(tmp_path / "data" / "train_002.bin", 300)
    if damage == "swapped":
        swap(folder, "train_002.bin", "train_000.bin")
    if damage == "changed":
        with open(tmp_path / "data" / "train_002.bin", "r+b") as file:
            file.write(b"\2\0\1\0")
    before = listing(folder)
    if damage == "changed":
        expect_sentence(run("train.py", f"--data_dir={folder}", *TINY_RUN, cwd=tmp_path, check=None), "train_002.bin")
    else:
        refusal(
            lambda: train.main([f"--data_dir={folder}", *TINY_RUN]),
            "train_000.bin" if damage == "swapped" else "train_002.bin",
        )
    assert os.listdir(tmp_path) == ["data"] and listing(folder) == before
    if damage == "missing":
        expect_sentence(run("data/check.py", f"--data_dir={folder}", cwd=tmp_path, check=None), "train_002.bin")
        expect_sentence(run("data/check.py", cwd=tmp_path, check=None), "--dataset=NAME")


# ----------------------------------------------------------------------------------------------------------------------
# a disk that fills up


class Full:
    """A file that takes so many bytes and no more; late: it says so only when it is closed."""

    def __init__(self, file, room: list[int], late: bool):
        self.file, self.room, self.late, self.name = file, room, late, file.name

    def write(self, content):
        self.room[0] -= memoryview(content).nbytes
        self.tell(self.late)
        return self.file.write(content)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        with self.file:
            self.tell(False)

    def tell(self, later: bool):
        if self.room[0] < 0 and not later:
            raise OSError(28, os.strerror(28))

    def __getattr__(self, name):
        return getattr(self.file, name)


@smoke
@pytest.mark.parametrize("shard_tokens", [0, 100])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("room", [0, 150, 500, 1500, 2900, 3100, 3300])
def test_a_disk_that_fills_up_leaves_the_earlier_data_and_says_what_to_free(
    tmp_path, monkeypatch, shard_tokens, late, room
):
    """room: bytes that fit; 2,880 are train, 320 val, the rest is meta.json."""
    texts = Texts(["abcdefgh" * 200])
    prepare(str(tmp_path), Texts(["xyz " * 100]), Vocabulary("char"), shard_tokens=90)
    before, room = listing(tmp_path), [room]

    def open_full(path, mode="r", **options):
        return Full(open(path, mode, **options), room, late) if mode == "ab" else open(path, mode, **options)

    monkeypatch.setattr(bins, "open", open_full, raising=False)
    atomic_write = bins.atomic_write

    def replaced_full(path, *args, **options):
        if room[0] < 400:  # no room for meta.json
            raise OSError(28, os.strerror(28))
        return atomic_write(path, *args, **options)

    monkeypatch.setattr(bins, "atomic_write", replaced_full)
    with pytest.raises(ValueError) as caught:
        prepare(str(tmp_path), texts, Vocabulary("char"), shard_tokens=shard_tokens)
    assert (
        re.search(
            r"No space left.*free some space on that disk.*existing data, which are unchanged, take up \d+ MB",
            str(caught.value),
        )
        and "\n" not in str(caught.value)
        and "goes on" not in str(caught.value)
    )
    assert listing(tmp_path) == before
    monkeypatch.delattr(bins, "open")
    monkeypatch.setattr(bins, "atomic_write", atomic_write)
    prepare(str(tmp_path), texts, Vocabulary("char"), shard_tokens=shard_tokens)
    program("check").main([f"--data_dir={tmp_path}"])


@smoke
@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError])
def test_a_preparation_that_ends_in_between_leaves_no_part_of_a_shard(tmp_path, kind):
    ids = np.arange(100, dtype="<u2")
    with pytest.raises(kind):
        with BinWriter(str(tmp_path), GERMAN, shard_tokens=30) as writer:
            writer.add("train", EncodedText(ids, 100, 100))
            raise kind
    assert set(os.listdir(tmp_path)) <= {".dongpt.lock"}
    with pytest.raises(ValueError, match="each needs at least 2"):
        with BinWriter(str(tmp_path), GERMAN, shard_tokens=30) as writer:
            writer.add("train", EncodedText(ids, 100, 100))
            writer.finish({})
    assert set(os.listdir(tmp_path)) <= {".dongpt.lock"}


def test_a_shard_that_cannot_be_read_is_a_sentence(tmp_path, monkeypatch):
    for i in range(2):
        np.arange(50, dtype="<u2").tofile(tmp_path / shard_name("train", i))
    np.arange(50, dtype="<u2").tofile(tmp_path / "val.bin")
    monkeypatch.setattr(bins, "MAX_IN_MEMORY_BYTES", 0)
    corpus = Corpus(str(tmp_path))
    os.remove(tmp_path / shard_name("train", 1))
    with pytest.raises(ValueError, match="train_001.bin cannot be read"):
        corpus.train_batch(0, 11, BLOCK, 1, 50257)
    os.mkdir(tmp_path / shard_name("train", 1))
    with pytest.raises(ValueError, match="has no train_001.bin"):
        Corpus(str(tmp_path))
