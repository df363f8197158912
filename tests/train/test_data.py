"""The corpus: what the files hold, which windows a training draws, what an evaluation covers, what is refused."""

import json
import os
import pickle

import numpy as np
import pytest
import torch
from helpers import RunsACommand, generated_text, refusal, split_text, visible, write_corpus

import configurator
import train
from configurator import UserError
from dongpt.text import bins
from dongpt.text.bins import read_meta
from dongpt.text.tokenizers import CharTokenizer, added_special_tokens
from dongpt.train import data as corpora
from dongpt.train.data import Corpus
from dongpt.train.evaluation import eval_batches, predicted_bytes

pytestmark = pytest.mark.smoke

BLOCK = 8


def numbered(folder, n_train: int = 203, n_val: int = 50) -> Corpus:
    """Write a corpus whose tokens equal their positions, so that a window shows where it starts."""
    np.arange(n_train, dtype="<u2").tofile(folder / "train.bin")
    np.arange(n_val, dtype="<u2").tofile(folder / "val.bin")
    return Corpus(str(folder))


def starts_of(corpus: Corpus, first: int, count: int, seed: int = 1, block_size: int = BLOCK) -> list[int]:
    """Where the windows first ... of a numbered corpus begin."""
    return corpus.train_batch(first, count, block_size, seed, 50257)[0][:, 0].tolist()


# ----------------------------------------------------------------------------------------------------------------------
# files


def test_bins_are_what_a_script_in_the_style_of_nanogpt_writes(tmp_path):
    text = generated_text(700)
    write_corpus(tmp_path, text)
    stoi = {character: i for i, character in enumerate(sorted(set(text)))}
    n = len(text)
    parts = {"train": text[: int(n * 0.9)], "val": text[int(n * 0.9) :]}
    for split, part in parts.items():
        expected = np.array([stoi[c] for c in part], dtype=np.uint16).astype("<u2").tobytes()
        assert (tmp_path / f"{split}.bin").read_bytes() == expected


@pytest.mark.parametrize("n", [11, 20, 21, 99, 1001, 2307844])
def test_a_text_is_cut_where_nanogpt_cuts_it(tmp_path, n):
    tokens = read_meta(write_corpus(tmp_path, "x" * n))["tokens"]
    assert tokens == {"train": int(n * 0.9), "val": n - int(n * 0.9)}


@pytest.mark.parametrize("n", [1, 2, 10])
def test_a_text_too_short_for_a_loss_on_both_sides_cannot_be_split(tmp_path, n):
    with pytest.raises(ValueError, match="too short"):
        write_corpus(tmp_path, "x" * n)


def test_nothing_but_the_bins_and_meta_json_is_written(tmp_path):
    write_corpus(tmp_path / "new" / "folder", generated_text(300))
    assert visible(tmp_path / "new" / "folder") == ["meta.json", "train.bin", "val.bin"]


def test_meta_json_gives_counts_bytes_and_the_tokenizer(tmp_path):
    text = "señor ñandú\n" * 50
    meta = read_meta(write_corpus(tmp_path, text))
    cut = int(len(text) * 0.9)
    assert meta["characters"] == {"train": cut, "val": len(text) - cut} == meta["tokens"]
    assert meta["bytes"] == {"train": len(text[:cut].encode()), "val": len(text[cut:].encode())}
    assert meta["tokenizer"] == CharTokenizer.from_text(text).to_dict() and meta["vocab_size"] == len(set(text))
    assert meta["source"] == "generated" and meta["sha256"] == "0" * 64


def test_decoding_the_bins_gives_the_text_back(tmp_path):
    text = generated_text(500)
    corpus = Corpus(write_corpus(tmp_path, text))
    assert "".join(corpus.tokenizer().decode(corpus.tokens[split][:].tolist()) for split in ("train", "val")) == text


def test_a_vocabulary_that_does_not_fit_into_uint16_is_refused_and_nothing_is_written(tmp_path):
    text = "".join(map(chr, range(0x10000, 0x10000 + 2**16 + 1)))
    with pytest.raises(ValueError, match="65,537.*65,536"):
        write_corpus(tmp_path / "data", text)
    assert visible(tmp_path / "data") == []


@pytest.mark.slow
def test_the_largest_id_of_uint16_is_written_and_read(tmp_path):
    text = "".join(map(chr, range(0x10000, 0x10000 + 2**16)))
    corpus = Corpus(write_corpus(tmp_path, text))
    assert corpus.vocab_size == 65536 and corpus.tokens["val"][:][-1] == 65535


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="cannot be written"):
        write_corpus(tmp_path / "file", generated_text(300))


def test_a_write_that_fails_leaves_no_temporary_file(tmp_path):
    (tmp_path / "val.bin").mkdir()  # so that the file cannot get its name
    with pytest.raises(ValueError, match="val.bin was not written by prepare.py"):
        write_corpus(tmp_path, generated_text(300))
    assert os.listdir(tmp_path) == ["val.bin"]


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_an_interrupt_while_files_are_moved_leaves_no_mixture_and_the_next_preparation_ends_it(
    tmp_path, monkeypatch, at
):
    """The first replacement completes the new files' description, the next two move them, the last one meta.json."""
    old, new, replace, calls = "abc " * 50, "xyz " * 50, os.replace, []
    write_corpus(tmp_path, old)

    def text_in(folder) -> str:
        corpus = Corpus(str(folder))
        return "".join(corpus.tokenizer().decode(corpus.tokens[split][:].tolist()) for split in ("train", "val"))

    def interrupted(*paths):
        calls.append(paths)
        if len(calls) == at:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_corpus(tmp_path, new)
    monkeypatch.setattr(os, "replace", replace)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    if at <= 2:
        assert text_in(tmp_path) == old
    else:
        with pytest.raises(UserError, match="interrupted.*run the same command again"):
            Corpus(str(tmp_path))
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}  # reading only
    write_corpus(tmp_path, new)
    assert text_in(tmp_path) == new and visible(tmp_path) == ["meta.json", "train.bin", "val.bin"]
    assert set(os.listdir(tmp_path)) - set(visible(tmp_path)) == {".dongpt.lock"}


# ----------------------------------------------------------------------------------------------------------------------
# training windows


def test_the_target_is_the_input_one_token_later(tmp_path):
    corpus = numbered(tmp_path)
    x, y = corpus.train_batch(5, 4, BLOCK, 1, 50257)
    assert x.shape == y.shape == (4, BLOCK) and x.dtype == y.dtype == torch.int64
    assert torch.equal(y, x + 1) and torch.equal(x - x[:, :1], torch.arange(BLOCK).expand(4, -1))


@pytest.mark.parametrize("n_train", [9, 10, 15, 16, 17, 24, 25, 199, 200, 201, 207])
def test_windows_of_an_epoch_are_disjoint_and_each_comes_once(tmp_path, n_train):
    corpus = numbered(tmp_path, n_train)
    per_epoch = corpus.windows_per_epoch(BLOCK)
    assert per_epoch >= max(1, n_train // BLOCK - 2)
    for epoch in range(3):
        starts = sorted(starts_of(corpus, epoch * per_epoch, per_epoch))
        assert np.all(np.diff(starts) == BLOCK)
        assert 0 <= starts[0] and starts[-1] + BLOCK + 1 <= n_train


def test_offset_and_order_change_from_epoch_to_epoch(tmp_path):
    corpus = numbered(tmp_path)
    n = corpus.windows_per_epoch(BLOCK)
    epochs = [starts_of(corpus, epoch * n, n) for epoch in range(40)]
    assert len({min(starts) for starts in epochs}) >= BLOCK // 2
    orders = {tuple((np.array(starts) - min(starts)) // BLOCK) for starts in epochs}
    assert len(orders) == 40 and tuple(range(n)) not in orders


def test_every_token_of_train_is_reached_in_time(tmp_path):
    corpus = numbered(tmp_path)
    x, y = corpus.train_batch(0, 40 * corpus.windows_per_epoch(BLOCK), BLOCK, 1, 50257)
    assert set(x.flatten().tolist()) | set(y.flatten().tolist()) == set(range(203))


def test_a_batch_depends_on_seed_and_position_alone(tmp_path):
    corpus, other = numbered(tmp_path), Corpus(str(tmp_path))
    once = starts_of(corpus, 60, 10)
    starts_of(corpus, 7, 3)
    starts_of(corpus, 500, 3, seed=2)
    list(eval_batches(corpus, "train", 4, BLOCK))
    torch.manual_seed(99)
    np.random.seed(99)
    assert starts_of(corpus, 60, 10) == once == starts_of(other, 60, 10)
    assert starts_of(corpus, 60, 10, seed=2) != once


@pytest.mark.parametrize("batch_size", [1, 3, 7, 60])
def test_the_batch_size_changes_no_window_and_epoch_borders_neither(tmp_path, batch_size):
    corpus = numbered(tmp_path)
    n, firsts = 60, range(0, 60, batch_size)  # two and a half epochs
    assert corpus.windows_per_epoch(BLOCK) == 24
    whole = starts_of(corpus, 0, n)
    parts = [starts_of(corpus, first, min(batch_size, n - first)) for first in firsts]
    assert sum(parts, []) == whole and len(set(whole[:24])) == 24


def test_two_processes_draw_disjoint_windows_and_together_those_of_one(tmp_path):
    one, two = numbered(tmp_path), (Corpus(str(tmp_path)), Corpus(str(tmp_path)))
    drawn = [[], []]
    for micro_step in range(3):  # as train.py counts micro-batches over all ranks
        for rank in (0, 1):
            drawn[rank] += starts_of(two[rank], (micro_step * 2 + rank) * 4, 4)
    assert not set(drawn[0]) & set(drawn[1])
    assert sorted(drawn[0] + drawn[1]) == sorted(starts_of(one, 0, 24))


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**70])
def test_any_integer_is_a_seed(tmp_path, seed):
    assert len(set(starts_of(numbered(tmp_path), 0, 24, seed))) == 24


def test_a_memory_mapped_file_gives_the_same_batches(tmp_path, monkeypatch):
    in_memory = numbered(tmp_path)
    batch = in_memory.train_batch(20, 8, BLOCK, 1, 50257)
    evaluated = list(eval_batches(in_memory, "val", 4, BLOCK))
    monkeypatch.setattr(bins, "MAX_IN_MEMORY_BYTES", 0)
    mapped = Corpus(str(tmp_path))
    assert not mapped.tokens["train"].in_memory
    assert all(map(torch.equal, batch, mapped.train_batch(20, 8, BLOCK, 1, 50257)))
    for old, new in zip(evaluated, eval_batches(mapped, "val", 4, BLOCK), strict=True):
        assert torch.equal(old[0], new[0]) and torch.equal(old[1], new[1]) and old[2] == new[2]


@pytest.mark.parametrize("in_memory", [0, 2**26])
def test_dataset_fraction_is_the_first_part_of_train(tmp_path, monkeypatch, in_memory):
    monkeypatch.setattr(bins, "MAX_IN_MEMORY_BYTES", in_memory)
    numbered(tmp_path)
    corpus = Corpus(str(tmp_path), train_fraction=0.5)
    assert corpus.tokens["train"][:].tolist() == list(range(101)) and len(corpus.tokens["val"]) == 50
    x, y = corpus.train_batch(0, 500, BLOCK, 1, 50257)
    assert y.max() <= 100 and len(set(x.flatten().tolist())) > 90


@pytest.mark.parametrize("fraction", [0, -0.5, 1.5, float("nan")])
def test_a_dataset_fraction_that_means_nothing_is_refused(fraction):
    with pytest.raises(UserError, match="dataset_fraction"):
        configurator.build_config(train.TrainConfig, {"dataset_fraction": fraction})


# ----------------------------------------------------------------------------------------------------------------------
# evaluation


def predicted(batches) -> list[int]:
    """The targets of eval batches in order; checks on the way that each is the token behind its input."""
    targets = []
    for x, y, n_tokens in batches:
        there = y >= 0
        assert torch.equal(y[there], x[there] + 1) and n_tokens == int(there.sum())
        targets += y[there].tolist()
    return targets


@pytest.mark.parametrize("n_val", [2, 5, 8, 9, 10, 17, 49, 50])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_evaluation_predicts_each_token_but_the_first_once(tmp_path, n_val, batch_size):
    corpus = numbered(tmp_path, n_val=n_val)
    assert predicted(eval_batches(corpus, "val", batch_size, BLOCK)) == list(range(1, n_val))


def test_all_evaluation_batches_have_one_shape(tmp_path):
    corpus = numbered(tmp_path, n_val=50)
    shapes = {(x.shape, y.shape) for x, y, _ in eval_batches(corpus, "val", 4, BLOCK)}
    assert shapes == {((4, BLOCK), (4, BLOCK))}


def test_a_part_of_the_windows_is_evenly_spaced_and_the_same_each_time(tmp_path):
    corpus = numbered(tmp_path, n_val=8 * 100 + 1)
    first = predicted(eval_batches(corpus, "val", 4, BLOCK, n_windows=10))
    assert first == predicted(eval_batches(corpus, "val", 3, BLOCK, n_windows=10))
    assert [target - 1 for target in first[::BLOCK]] == [i * 10 * BLOCK for i in range(10)] and len(first) == 80


@pytest.mark.parametrize("n_windows", [1, 6, 7, 8, 1000])
def test_a_part_of_the_windows_is_never_more_than_one_pass(tmp_path, n_windows):
    corpus = numbered(tmp_path, n_val=50)  # six whole windows and one token
    targets = predicted(eval_batches(corpus, "val", 4, BLOCK, n_windows))
    assert len(targets) == len(set(targets)) and (n_windows < 7 or targets == list(range(1, 50)))


@pytest.mark.parametrize("world_size", [1, 2, 3, 20])
def test_processes_share_an_evaluation_without_gap_or_overlap(tmp_path, world_size):
    corpus = numbered(tmp_path)
    shares = [predicted(eval_batches(corpus, "train", 2, BLOCK, None, rank, world_size)) for rank in range(world_size)]
    assert sorted(sum(shares, [])) == list(range(1, 203))


def test_predicted_bytes_are_the_bytes_of_the_text_but_its_first_character(tmp_path):
    text = "ñandú señor ¿qué? plain words " * 40
    folder = write_corpus(tmp_path, text)
    for split, part in split_text(text).items():
        expected = len(part.encode()) - len(part[0].encode())
        assert predicted_bytes(Corpus(folder), split) == expected
    half = Corpus(folder, train_fraction=0.5)
    part = text[: half.lengths["train"]]
    assert predicted_bytes(half, "train") == len(part.encode()) - len("ñ".encode())


def test_fewer_bytes_than_the_first_token_has_are_refused(tmp_path):
    folder = write_corpus(tmp_path, "ñandú señor ¿qué? " * 40)
    meta = json.loads((tmp_path / "meta.json").read_text(encoding="utf-8"))
    del meta["characters"]
    meta["bytes"]["train"] = 1
    (tmp_path / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    refusal(
        lambda: predicted_bytes(Corpus(folder), "train"), "the train split", "has 1 bytes, fewer", "prepare the data"
    )


def test_predicted_bytes_are_counted_from_ids_where_meta_json_lacks_them(tmp_path):
    text = "ñandú señor ¿qué? " * 40
    folder = write_corpus(tmp_path, text)
    meta = json.loads((tmp_path / "meta.json").read_text(encoding="utf-8"))
    del meta["bytes"]
    (tmp_path / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    part = split_text(text)["val"]
    assert predicted_bytes(Corpus(folder), "val") == len(part.encode()) - len(part[0].encode())


# ----------------------------------------------------------------------------------------------------------------------
# what is refused


def test_a_corpus_too_short_for_a_window_is_refused_with_what_would_fit(tmp_path):
    corpus = numbered(tmp_path, n_train=8)
    refusal(lambda: corpus.check(8, 50257), "train.bin", "8 tokens", "block_size=8", "more text")
    numbered(tmp_path, n_train=9).check(8, 50257)


def test_a_validation_split_of_one_token_is_refused(tmp_path):
    refusal(lambda: numbered(tmp_path, n_val=1).check(8, 50257), "val.bin", "more text")


@pytest.mark.parametrize("split", ["train", "val"])
def test_missing_empty_and_odd_sized_bins_are_refused_with_a_remedy(tmp_path, split):
    numbered(tmp_path)
    path = tmp_path / f"{split}.bin"
    path.write_bytes(b"\x01\x00\x02")
    refusal(lambda: Corpus(str(tmp_path)), f"{split}.bin", "damaged", "prepare.py")
    path.write_bytes(b"")
    refusal(lambda: Corpus(str(tmp_path)), f"{split}.bin", "empty", "prepare.py")
    path.unlink()
    refusal(lambda: Corpus(str(tmp_path)), f"{split}.bin", "prepare.py")


def test_the_remedy_names_the_prepare_program_beside_the_bins(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "prepare.py").write_text("")
    monkeypatch.chdir(tmp_path)
    refusal(lambda: Corpus(str(tmp_path / "mine")), f"python {os.path.join('mine', 'prepare.py')}")


@pytest.mark.parametrize("split", ["train", "val"])
def test_bins_of_another_vocabulary_are_refused(tmp_path, split):
    folder = write_corpus(tmp_path, generated_text(500))
    vocab_size = Corpus(folder).vocab_size
    Corpus(folder).check(BLOCK, vocab_size)
    ids = np.fromfile(tmp_path / f"{split}.bin", dtype="<u2")
    ids[len(ids) // 2] = vocab_size
    ids.tofile(tmp_path / f"{split}.bin")
    refusal(lambda: Corpus(folder).check(BLOCK, vocab_size), f"{split}.bin", str(vocab_size), "tokenizer", "prepare.py")


def test_a_wrong_id_that_the_first_check_did_not_reach_is_refused_when_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "MAX_CHECKED_TOKENS", 64)
    corpus = numbered(tmp_path)
    with pytest.raises(ValueError, match="train.bin.*vocabulary"):
        corpus.train_batch(0, 24, BLOCK, 1, vocab_size=150)


def test_bins_that_disagree_with_meta_json_are_refused(tmp_path):
    folder = write_corpus(tmp_path, generated_text(500))
    with open(tmp_path / "train.bin", "ab") as file:
        file.write(b"\x01\x00")
    refusal(lambda: Corpus(folder), "train.bin", "meta.json", "prepare.py")


@pytest.mark.parametrize(
    "content", [b"", b'{"tokenizer": {"kind"', b"\xff\xfe\x00", b"[1, 2]", b'{"tokenizer": 3}', b'{"tokenizer": {}}']
)
def test_a_damaged_meta_json_is_refused(tmp_path, content):
    folder = write_corpus(tmp_path, generated_text(300))
    (tmp_path / "meta.json").write_bytes(content)
    refusal(lambda: Corpus(folder).tokenizer(), "meta.json", "prepare")


def test_a_folder_without_meta_is_taken_for_gpt2_as_nanogpt_does(tmp_path):
    corpus = numbered(tmp_path)
    assert corpus.tokenizer_dict["kind"] == "gpt2" and (corpus.vocab_size, corpus.model_vocab_size) == (50257, 50304)


# ----------------------------------------------------------------------------------------------------------------------
# nanoGPT's meta.pkl


def test_meta_pkl_of_nanogpt_is_read(tmp_path):
    text = generated_text(500)
    corpus = Corpus(write_corpus(tmp_path, text))
    characters = sorted(set(text))
    meta = {
        "vocab_size": len(characters),
        "itos": dict(enumerate(characters)),
        "stoi": {c: i for i, c in enumerate(characters)},
    }
    (tmp_path / "meta.json").unlink()
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    old = Corpus(str(tmp_path))
    assert added_special_tokens(old.tokenizer_dict, corpus.tokenizer_dict) == [] and old.vocab_size == len(characters)
    assert predicted_bytes(old, "val") == predicted_bytes(corpus, "val")


def test_meta_pkl_written_by_nanogpt_itself_is_read(tmp_path, fixtures_folder):
    with open(os.path.join(fixtures_folder, "meta.pkl"), "rb") as file:
        (tmp_path / "meta.pkl").write_bytes(file.read())
    meta = read_meta(str(tmp_path))
    assert meta["vocab_size"] == len(meta["tokenizer"]["characters"]) == 64


@pytest.mark.parametrize("wrap", [lambda bad: bad, lambda bad: {"vocab_size": 1, "itos": {0: bad}, "stoi": {}}])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_malicious_meta_pkl_is_refused_and_not_run(tmp_path, wrap, protocol):
    marker = tmp_path / "marker"
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(wrap(RunsACommand(marker)), protocol))
    refusal(lambda: read_meta(str(tmp_path)), "meta.pkl", "prepare")
    assert not marker.exists()
    pickle.loads((tmp_path / "meta.pkl").read_bytes())
    assert marker.exists()  # the attack is a real one


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        pickle.dumps({"vocab_size": 3, "itos": {0: "a"}}),
        pickle.dumps([1, 2]),
        pickle.dumps({"a": "b" * 100})[:20],
    ],
)
def test_a_damaged_meta_pkl_is_refused(tmp_path, content):
    (tmp_path / "meta.pkl").write_bytes(content)
    refusal(lambda: read_meta(str(tmp_path)), "meta.pkl", "prepare")


def test_added_tokens_compares_vocabularies():
    ab, ba = CharTokenizer("ab").to_dict(), CharTokenizer("ba").to_dict()
    gpt2, hashed, other = {"kind": "gpt2"}, {"kind": "gpt2", "sha256": "1"}, {"kind": "gpt2", "sha256": "2"}
    assert added_special_tokens(ab, dict(ab)) == [] and added_special_tokens(ab, ba) is None
    assert added_special_tokens(ab, gpt2) is None and added_special_tokens(hashed, other) is None
    assert (
        added_special_tokens(gpt2, hashed)
        == added_special_tokens(hashed, gpt2)
        == added_special_tokens(hashed, dict(hashed))
        == []
    )
    assert added_special_tokens(None, ab) == added_special_tokens(ab, None) == []  # an old checkpoint says nothing
    for plain, one in ((ab, CharTokenizer("ab", ["<x>"]).to_dict()), (gpt2, {**hashed, "special": ["<x>"]})):
        two = {**one, "special": ["<x>", "<y>"]}
        assert added_special_tokens(plain, one) == ["<x>"] and added_special_tokens(one, two) == ["<y>"]
        assert added_special_tokens(plain, two) == ["<x>", "<y>"] and added_special_tokens(two, one) is None
        assert added_special_tokens(one, {**one, "special": ["<y>", "<x>"]}) is None  # their ids would change meaning


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads its memory from /proc")
def test_a_mapped_file_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(bins, "MAX_IN_MEMORY_BYTES", 0)
    rng = np.random.default_rng(0)
    rng.integers(0, 100, 2**26, dtype=np.uint16).astype("<u2").tofile(tmp_path / "train.bin")  # 128 MB
    rng.integers(0, 100, 100, dtype=np.uint16).astype("<u2").tofile(tmp_path / "val.bin")

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    corpus = Corpus(str(tmp_path))
    corpus.train_batch(0, 12, 64, 1337, 100)
    before, most = resident(), 0
    for i in range(3000):
        corpus.train_batch(i * 12, 12, 64, 1337, 100)
        most = max(most, resident())
    assert most - before < 20e6
