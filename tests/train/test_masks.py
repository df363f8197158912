"""Masks: a loss of some tokens alone, from the files beside the bins over the gradient to evaluate.py; data/sum."""

import csv
import gzip
import importlib.util
import json
import math
import os
import sys

import helpers
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
    load,
    read_log,
    run,
    run_ranks,
    visible,
    write_corpus,
)
from torch.optim.optimizer import register_optimizer_step_pre_hook

import evaluate
import sample
import train
from configurator import UserError
from dongpt.checkpoint.files import load_model, model_args, save
from dongpt.text import bins
from dongpt.text.bins import read_meta
from dongpt.text.tokenizers import CharTokenizer, WordTokenizer, from_dict
from dongpt.train.data import Corpus
from dongpt.train.evaluation import eval_batches, predicted_bytes
from model import GPT, GPTConfig

smoke = pytest.mark.smoke
pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")
SPLITS = ("train", "val")
BLOCK, SEED = 8, 1337  # the seed is train.py's default
PLAIN_TEMPLATE = [*TINY_RUN, "--dropout=0.0"]
EIGHT = [
    *TINY_RUN,
    "--batch_size=2",
    "--gradient_accumulation_steps=4",
    "--max_iters=8",
    "--lr_decay_iters=8",
    "--eval_interval=4",
    "--eval_iters=7",
]
needs_gloo = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="this torch has no gloo"
)


def write_masks(folder, share: float = 0.3, seed: int = 5, splits=SPLITS) -> dict[str, np.ndarray]:
    """Write masks beside the bins of folder with stretches of ones and zeros, about share of ones; returns them."""
    rng, masks = np.random.default_rng(seed), {}
    for split in splits:
        n = os.path.getsize(os.path.join(folder, f"{split}.bin")) // 2
        masks[split] = np.repeat(rng.random(n // 7 + 1) < share, 7)[:n].astype(np.uint8)
        masks[split].tofile(os.path.join(folder, f"{split}.mask.bin"))
    return masks


def masked_corpus(folder, n_train: int = 203, n_val: int = 50, **options) -> tuple[Corpus, dict[str, np.ndarray]]:
    """Write a corpus without meta.json, as nanoGPT does, whose tokens equal their positions, and masks for it."""
    np.arange(n_train, dtype="<u2").tofile(folder / "train.bin")
    np.arange(n_val, dtype="<u2").tofile(folder / "val.bin")
    masks = write_masks(folder, **options)
    return Corpus(str(folder)), masks


@pytest.fixture(params=[0, 2**26], ids=["mapped", "in_memory"])
def in_memory(request, monkeypatch) -> int:
    """Bytes above which files are mapped: the test runs with both kinds of reading."""
    monkeypatch.setattr(bins, "MAX_IN_MEMORY_BYTES", request.param)
    return request.param


@pytest.fixture(scope="module")
def masked(tmp_path_factory) -> str:
    """A folder with a small character corpus and masks of about 30 % of its tokens. Read it, do not write to it."""
    folder = write_corpus(tmp_path_factory.mktemp("masked"), generated_text(1500))
    write_masks(folder)
    return folder


def ids_of(folder, split: str) -> np.ndarray:
    return np.fromfile(os.path.join(folder, f"{split}.bin"), "<u2").astype(np.int64)


def mask_of(folder, split: str) -> np.ndarray:
    return np.fromfile(os.path.join(folder, f"{split}.mask.bin"), np.uint8)


# ----------------------------------------------------------------------------------------------------------------------
# the corpus


@smoke
@pytest.mark.parametrize("batch_size", [1, 4])
def test_masked_targets_of_a_training_batch_are_minus_one_and_the_inputs_as_without_a_mask(
    tmp_path, in_memory, batch_size
):
    corpus, masks = masked_corpus(tmp_path)
    assert isinstance(corpus.masks.get("train"), np.memmap) == (in_memory == 0)
    seen = set()
    for first in range(0, 60, batch_size):  # over two epochs
        x, y = corpus.train_batch(first, batch_size, BLOCK, SEED, 50257)
        starts = torch.from_numpy(corpus.window_starts(first, batch_size, BLOCK, SEED))
        assert torch.equal(x, starts[:, None] + torch.arange(BLOCK)) and y.dtype == torch.int64
        wanted = torch.from_numpy(masks["train"])[x + 1] == 1  # a token is its own position
        if wanted.any():
            assert torch.equal(y, torch.where(wanted, x + 1, -1))
        seen |= set(y[y >= 0].tolist())
    assert seen >= set(np.flatnonzero(masks["train"])[5:-BLOCK].tolist())  # what is wanted is reached


@smoke
@pytest.mark.parametrize("share", [0.03, 0.3])
def test_shares_weigh_each_batch_by_its_predicted_tokens(tmp_path, in_memory, share):
    corpus, masks = masked_corpus(tmp_path, share=share)
    for first in (0, 5, 23, 40):
        starts = [corpus.window_starts(first + 3 * i, 3, BLOCK, SEED) for i in range(6)]
        counts = [sum(int(masks["train"][s + 1 : s + BLOCK + 1].sum()) for s in group) for group in starts]
        shares = corpus.loss_weights(first, 6, 3, BLOCK, SEED)
        assert len(shares) == 6 and np.isfinite(shares).all()
        if sum(counts):
            assert shares == pytest.approx([6 * count / sum(counts) for count in counts])


@smoke
def test_a_few_predicted_tokens_are_in_every_batch_and_its_loss_is_a_number(tmp_path, in_memory):
    corpus, _ = masked_corpus(tmp_path)
    mask = np.zeros(203, np.uint8)
    mask[100:104] = 1
    mask.tofile(tmp_path / "train.mask.bin")
    corpus = Corpus(str(tmp_path))
    model = GPT(GPTConfig(block_size=BLOCK, vocab_size=203, n_layer=1, n_head=1, n_embd=8))
    shares = corpus.loss_weights(0, 12, 2, BLOCK, SEED)
    starts = corpus.window_starts(0, 24, BLOCK, SEED).reshape(12, 2)
    empty = [i for i in range(12) if not any(mask[start + 1 : start + BLOCK + 1].any() for start in starts[i])]
    assert [i for i in range(12) if shares[i] == 0] == empty == [] and shares.mean() == pytest.approx(1)
    for i in range(12):
        assert math.isfinite(model(*corpus.train_batch(2 * i, 2, BLOCK, SEED, 203))[1].item())


@smoke
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("batch_size, world_size", [(1, 1), (3, 1), (2, 3)])
def test_evaluation_predicts_each_token_of_the_mask_but_the_first_once(
    tmp_path, in_memory, split, batch_size, world_size
):
    corpus, masks = masked_corpus(tmp_path)
    masks[split][0] = 1  # nothing comes before it
    masks[split].tofile(tmp_path / f"{split}.mask.bin")
    corpus, targets = Corpus(str(tmp_path)), []
    for rank in range(world_size):
        for x, y, n_tokens in eval_batches(corpus, split, batch_size, BLOCK, None, rank, world_size):
            there = y >= 0
            assert x.shape == y.shape == (batch_size, BLOCK) and torch.equal(y[there], x[there] + 1)
            assert n_tokens == int(there.sum()) and (y[~there] == -1).all()
            targets += y[there].tolist()
    assert sorted(targets) == [i for i in np.flatnonzero(masks[split]).tolist() if i > 0]


@smoke
def test_a_mask_of_one_split_alone_leaves_the_other_as_it_is(tmp_path, in_memory):
    for split, other in (SPLITS, SPLITS[::-1]):
        folder = tmp_path / split
        folder.mkdir()
        corpus, masks = masked_corpus(folder, splits=[split])
        assert corpus.masks.get(other) is None and np.array_equal(corpus.masks.get(split), masks[split])
        assert sum(n for _, _, n in eval_batches(corpus, other, 2, BLOCK)) == corpus.lengths[other] - 1
        assert sum(n for _, _, n in eval_batches(corpus, split, 2, BLOCK)) == masks[split][1:].sum()
        assert (corpus.loss_weights(3, 4, 2, BLOCK, SEED) == 1).all() == (split == "val")
        assert bool((corpus.train_batch(0, 24, BLOCK, SEED, 50257)[1] < 0).any()) == (split == "train")


@smoke
def test_any_value_but_zero_is_to_be_predicted(tmp_path):
    _, masks = masked_corpus(tmp_path)
    (masks["train"] * 255).tofile(tmp_path / "train.mask.bin")
    once = Corpus(str(tmp_path)).train_batch(0, 20, BLOCK, SEED, 50257)
    shares = Corpus(str(tmp_path)).loss_weights(0, 20, 1, BLOCK, SEED)
    masks["train"].tofile(tmp_path / "train.mask.bin")
    corpus = Corpus(str(tmp_path))
    assert all(map(torch.equal, once, corpus.train_batch(0, 20, BLOCK, SEED, 50257)))
    assert shares == pytest.approx(corpus.loss_weights(0, 20, 1, BLOCK, SEED))


@smoke
def test_masks_without_a_token_to_hide_change_nothing(tmp_path, in_memory):
    corpus, _ = masked_corpus(tmp_path, splits=[])
    folder = tmp_path / "ones"
    folder.mkdir()
    ones, _ = masked_corpus(folder, share=1)
    assert all(
        map(torch.equal, corpus.train_batch(7, 30, BLOCK, SEED, 50257), ones.train_batch(7, 30, BLOCK, SEED, 50257))
    )
    assert (ones.loss_weights(7, 5, 6, BLOCK, SEED) == 1).all() and (
        corpus.loss_weights(7, 5, 6, BLOCK, SEED) == 1
    ).all()
    for one, other in zip(eval_batches(corpus, "val", 4, BLOCK), eval_batches(ones, "val", 4, BLOCK), strict=True):
        assert_same(list(one), list(other))


@smoke
def test_dataset_fraction_takes_the_first_part_of_the_mask(tmp_path, in_memory):
    _, masks = masked_corpus(tmp_path)
    half = Corpus(str(tmp_path), train_fraction=0.5)
    assert np.array_equal(half.masks.get("train"), masks["train"][:101]) and len(half.masks.get("val")) == 50
    assert sum(n for _, _, n in eval_batches(half, "train", 3, BLOCK)) == masks["train"][1:101].sum()
    y = half.train_batch(0, 200, BLOCK, SEED, 50257)[1]
    assert set(y[y >= 0].tolist()) <= set(np.flatnonzero(masks["train"][:101]).tolist())


@smoke
def test_predicted_bytes_are_those_of_the_tokens_in_the_mask(tmp_path, in_memory):
    folder = write_corpus(tmp_path, "ñandú señor ¿qué? plain 😀 words " * 40)
    masks = write_masks(folder)
    for split in SPLITS:
        masks[split][0] = 1  # it is never predicted
        masks[split].tofile(tmp_path / f"{split}.mask.bin")
        characters = read_meta(folder)["tokenizer"]["characters"]
        chosen = ids_of(folder, split)[1:][masks[split][1:] == 1]
        assert predicted_bytes(Corpus(folder), split) == len("".join(characters[i] for i in chosen).encode())


@smoke
def test_predicted_bytes_of_gpt2s_vocabulary_without_meta_json(tmp_path, gpt2_vocabulary):
    tokenizer = from_dict({"kind": "gpt2"})
    for split in SPLITS:
        np.array(tokenizer.encode(generated_text(200)), dtype="<u2").tofile(tmp_path / f"{split}.bin")
    mask = write_masks(tmp_path)["val"]
    pieces = [tokenizer.encoding.decode_single_token_bytes(int(i)) for i in ids_of(tmp_path, "val")]
    expected = sum(len(piece) for piece, wanted in zip(pieces[1:], mask[1:]) if wanted)
    assert predicted_bytes(Corpus(str(tmp_path)), "val") == expected > 0


@smoke
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("change", [1, -1])
def test_a_mask_of_another_length_is_refused(tmp_path, split, change):
    _, masks = masked_corpus(tmp_path)
    np.ones(len(masks[split]) + change, np.uint8).tofile(tmp_path / f"{split}.mask.bin")
    with pytest.raises(ValueError) as caught:
        Corpus(str(tmp_path))
    assert f"{split}.mask.bin" in str(caught.value) and "\n" not in str(caught.value)


@smoke
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("first", [0, 1])
def test_a_mask_that_leaves_nothing_to_predict_is_refused(tmp_path, split, first, in_memory):
    _, masks = masked_corpus(tmp_path)
    masks[split][:] = 0
    masks[split][0] = first  # nothing predicts the first token
    masks[split].tofile(tmp_path / f"{split}.mask.bin")
    with pytest.raises(ValueError) as caught:
        Corpus(str(tmp_path)).check(BLOCK, 50257)
    assert f"{split}.mask.bin" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("mask", [np.zeros(10, np.uint8), None], ids=["wrong length", "all zero"])
def test_bad_masks_end_train_py_and_evaluate_py_with_one_sentence(masked, tmp_path, mask):
    folder = write_corpus(tmp_path / "data", generated_text(1500))
    (np.zeros(len(ids_of(folder, "val")), np.uint8) if mask is None else mask).tofile(f"{folder}/val.mask.bin")
    helpers.refusal(lambda: train.main([f"--data_dir={folder}", *PLAIN_TEMPLATE]), "val.mask.bin")
    assert not (tmp_path / "out" / "ckpt_last.pt").exists()
    given_weights(tmp_path / "ckpt.pt", masked)
    helpers.refusal(lambda: evaluate.main(["ckpt.pt", f"--data_dir={folder}", "--device=cpu"]), "val.mask.bin")


# ----------------------------------------------------------------------------------------------------------------------
# training


def given_weights(path, folder: str, **more) -> GPT:
    """Write a checkpoint of a small random model for the corpus of folder; returns the model."""
    meta = read_meta(folder)
    torch.manual_seed(3)
    model = GPT(
        GPTConfig(
            **{
                **dict(
                    block_size=16,
                    vocab_size=meta["vocab_size"],
                    n_layer=2,
                    n_head=2,
                    n_embd=16,
                    bias=False,
                    dropout=0.0,
                ),
                **more,
            }
        )
    )
    save(
        {
            "model": model.state_dict(),
            "model_args": model_args(model.config),
            "tokenizer": meta["tokenizer"],
            "config": {"data_dir": folder},
        },
        str(path),
    )
    return model.train()


@pytest.fixture
def gradients():
    """What every optimizer was given at its steps: a list of lists of gradients."""
    kept = []

    def keep(optimizer, args, kwargs):
        kept.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])

    handle = register_optimizer_step_pre_hook(keep)
    yield kept
    handle.remove()


def reference(model: GPT, folder: str, n_iters: int, n_windows: int):
    """(gradients, losses) of n_iters iterations that change no weights, each one big batch with a mean by hand."""
    ids, mask, corpus = ids_of(folder, "train"), mask_of(folder, "train"), Corpus(folder)
    groups = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu").param_groups
    parameters, all_gradients, losses = [p for group in groups for p in group["params"]], [], []
    for i in range(n_iters):
        places = corpus.window_starts(i * n_windows, n_windows, 16, SEED)[:, None] + np.arange(17)
        x, y, wanted = ids[places[:, :-1]], ids[places[:, 1:]], mask[places[:, 1:]] == 1
        logits = model(torch.from_numpy(x), torch.from_numpy(y))[0]
        picked = torch.log_softmax(logits, -1)[torch.from_numpy(wanted)]
        loss = -picked[torch.arange(len(picked)), torch.from_numpy(y[wanted])].mean()
        all_gradients.append(torch.autograd.grad(loss, parameters, allow_unused=True))
        losses.append(loss.item())
    return all_gradients, losses


@pytest.mark.parametrize("batch_size, accumulation, share", [(8, 1, 0.06), (4, 2, 0.3), (1, 8, 0.06)])
def test_the_gradient_is_that_of_the_mean_over_all_predicted_tokens_of_an_iteration(
    tmp_path, gradients, batch_size, accumulation, share
):
    folder = write_corpus(tmp_path / "data", generated_text(1500))
    masks = write_masks(folder, share)
    model = given_weights("ckpt.pt", folder)
    starts = Corpus(folder).window_starts(0, 32, 16, SEED)
    counts = [int(masks["train"][s + 1 : s + 17].sum()) for s in starts]
    assert len(set(counts)) > 3 and 0 not in counts  # or a mean of means would do
    train.main(
        [
            f"--data_dir={folder}",
            "--init_from=ckpt.pt",
            *PLAIN_TEMPLATE,
            "--learning_rate=0",
            "--min_lr=0",
            "--weight_decay=0",
            "--grad_clip=0",
            "--max_iters=4",
            f"--batch_size={batch_size}",
            f"--gradient_accumulation_steps={accumulation}",
        ]
    )
    expected, losses = reference(model, folder, 4, 8)
    assert len(gradients) == 4
    for got, wanted in zip(gradients, expected):
        assert len(got) == len(wanted)
        for one, other in zip(got, wanted):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert [record["loss"] for record in read_log("out", "iter")] == pytest.approx(losses, abs=1e-5)


def test_the_weights_do_not_depend_on_gradient_accumulation(masked):
    for batch, accumulation in ((8, 1), (2, 4)):
        train.main(
            [
                f"--data_dir={masked}",
                f"--out_dir=out-{batch}",
                *PLAIN_TEMPLATE,
                f"--batch_size={batch}",
                f"--gradient_accumulation_steps={accumulation}",
            ]
        )
    losses = {batch: [record["loss"] for record in read_log(f"out-{batch}", "iter")] for batch in (8, 2)}
    assert losses[2] == pytest.approx(losses[8], abs=1e-5)
    assert losses[8][-1] < losses[8][0]
    for name, weight in load("out-8")["model"].items():  # AdamW divides by small numbers: rounding grows
        torch.testing.assert_close(load("out-2")["model"][name], weight, rtol=0, atol=1e-4)


def test_a_model_learns_the_tokens_of_the_mask_and_no_others(tmp_path):
    folder = write_corpus(tmp_path / "data", "abcdefgh" * 100)
    for split in SPLITS:
        np.fromiter((i % 8 == 0 for i in range(len(ids_of(folder, split)))), np.uint8).tofile(
            f"{folder}/{split}.mask.bin"
        )  # of "a" alone, which always follows "h"
    train.main([f"--data_dir={folder}", *PLAIN_TEMPLATE, "--max_iters=60", "--lr_decay_iters=60", "--eval_interval=60"])
    model, tokenizer = load_model("out")
    logits = model(torch.tensor([tokenizer.encode("abcdefghabcdefgh")]))[0][0, -1]
    assert logits.argmax() == tokenizer.encode("a")[0]
    others = model(torch.tensor([tokenizer.encode("abcdefg")]))[0][0, -1]
    assert others.argmax() == tokenizer.encode("a")[0]  # it has seen no other answer than "a"


def test_iterations_and_evaluations_with_few_predicted_tokens_are_finite(tmp_path):
    folder = write_corpus(tmp_path / "data", generated_text(1500))
    mask = np.zeros(len(ids_of(folder, "train")), np.uint8)
    mask[500:510] = 1  # most iterations have none
    mask.tofile(f"{folder}/train.mask.bin")
    assert train.main([f"--data_dir={folder}", *PLAIN_TEMPLATE, "--batch_size=2", "--eval_iters=10000"]) == 0
    records = read_log("out")
    values = [value for record in records for key, value in record.items() if "loss" in key]
    assert len(values) >= 6 + 2 * 3 and all(isinstance(value, float) and math.isfinite(value) for value in values)
    assert all(torch.isfinite(weight).all() for weight in load("out")["model"].values())


@pytest.mark.parametrize("split", SPLITS)
def test_a_part_of_the_windows_in_which_nothing_is_predicted_ends_no_run(tmp_path, split):
    """eval_iters takes a part of a split's windows; that the mask has nothing in just these is no divergence."""
    folder = write_corpus(tmp_path / "data", generated_text(1500))
    mask = np.zeros(len(ids_of(folder, split)), np.uint8)
    mask[-20:-10] = 1
    mask.tofile(f"{folder}/{split}.mask.bin")
    assert train.main([f"--data_dir={folder}", *PLAIN_TEMPLATE, "--batch_size=2", "--eval_iters=1"]) == 0
    for record in read_log("out", "eval"):
        assert all(record[key] is not None and math.isfinite(record[key]) for key in ("train_loss", "val_loss"))


def test_without_masks_and_with_masks_of_ones_the_same_is_trained(masked, tmp_path):
    for name in ("plain", "ones"):
        write_corpus(tmp_path / name, generated_text(1500))
    write_masks(tmp_path / "ones", share=1)
    for name in ("plain", "ones"):
        train.main([f"--data_dir={tmp_path / name}", f"--out_dir=out-{name}", *TINY_RUN])
    train.main([f"--data_dir={masked}", "--out_dir=out-masked", *TINY_RUN])
    assert_same_training("out-plain", "out-ones")
    for kind in ("eval", "final"):
        one, other = (
            [{k: v for k, v in r.items() if "loss" in k or k == "tokens"} for r in read_log(out, kind)]
            for out in ("out-plain", "out-ones")
        )
        assert one == other
    assert load("out-masked")["windows"] == load("out-plain")["windows"]
    assert read_log("out-masked", "iter")[0]["loss"] != read_log("out-plain", "iter")[0]["loss"]


@pytest.fixture(scope="module")
def eight(tmp_path_factory, masked) -> str:
    """The out_dir of eight updates on the masked corpus, dropout on."""
    out_dir = str(tmp_path_factory.mktemp("eight") / "out")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train.main([f"--data_dir={masked}", f"--out_dir={out_dir}", *EIGHT])
    torch.set_num_threads(threads)
    return out_dir


@needs_gloo
def test_two_processes_give_the_losses_of_one(masked, tmp_path, eight):
    run_ranks("train.py", f"--data_dir={masked}", *EIGHT, cwd=tmp_path)
    for kind, keys in (("iter", ["loss"]), ("eval", ["train_loss", "val_loss"]), ("final", ["val_loss", "tokens"])):
        one, two = (
            [record[key] for record in read_log(out, kind) for key in keys] for out in (eight, tmp_path / "out")
        )
        assert len(one) and one == pytest.approx(two, abs=1e-5, rel=0)
    for name, weight in load(eight)["model"].items():
        torch.testing.assert_close(load(tmp_path / "out")["model"][name], weight, rtol=0, atol=1e-4)


def test_a_resumed_run_is_the_one_that_was_never_stopped_bit_for_bit(masked, eight):
    assert train.main([f"--data_dir={masked}", *EIGHT, "--max_iters=4"]) == 0
    assert train.main(["--init_from=resume", "--max_iters=8"]) == 0
    assert_same_training("out", eight)


def test_the_last_line_of_a_run_counts_the_predicted_tokens_alone(masked, eight):
    (final,) = read_log(eight, "final")
    mask, ids = mask_of(masked, "val"), ids_of(masked, "val")
    assert final["tokens"] == int(mask[1:].sum())
    text = from_dict(read_meta(masked)["tokenizer"]).decode(ids[1:][mask[1:] == 1].tolist())
    bits = final["val_loss"] * final["tokens"] / math.log(2) / len(text.encode())
    assert final["bits_per_byte"] == pytest.approx(bits, rel=1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# evaluate.py


def loss_by_hand(model: GPT, ids: np.ndarray, mask: np.ndarray, block_size: int) -> tuple[float, int]:
    """(mean loss, number) of the tokens of the mask, window by window."""
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, block_size):
        window = torch.from_numpy(ids[start : start + block_size + 1])
        with torch.no_grad():
            logits = model(window[None, :-1], window[None, 1:])[0][0].double()
        losses = -torch.log_softmax(logits, -1)[torch.arange(len(window) - 1), window[1:]].numpy()
        wanted = mask[start + 1 : start + len(window)] == 1
        total, count = total + losses[wanted].sum(), count + int(wanted.sum())
    return total / count, count


@pytest.mark.parametrize("split, block_size, batch_size", [("train", 16, 5), ("val", 16, 5), ("val", 7, 1)])
def test_evaluate_measures_the_predicted_tokens_alone(masked, capsys, split, block_size, batch_size):
    model = given_weights("ckpt.pt", masked).eval()
    for weight in model.parameters():
        weight.data *= 5  # far from uniform, so that tokens differ
    save(
        {
            "model": model.state_dict(),
            "model_args": model_args(model.config),
            "tokenizer": read_meta(masked)["tokenizer"],
            "config": {"data_dir": masked},
        },
        "ckpt.pt",
    )
    evaluate.main(
        [
            "ckpt.pt",
            f"--split={split}",
            "--json",
            f"--block_size={block_size}",
            "--device=cpu",
            f"--batch_size={batch_size}",
        ]
    )
    (result,) = json.loads(capsys.readouterr().out)
    ids, mask = ids_of(masked, split), mask_of(masked, split)
    nats, count = loss_by_hand(model, ids, mask, block_size)
    assert result["tokens"] == count == int(mask[1:].sum())
    assert result["loss"] == pytest.approx(nats, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(nats), rel=1e-4)
    text = from_dict(read_meta(masked)["tokenizer"]).decode(ids[1:][mask[1:] == 1].tolist())
    assert result["bits_per_byte"] == pytest.approx(nats * count / math.log(2) / len(text.encode()), rel=1e-5)
    assert abs(loss_by_hand(model, ids, np.ones_like(mask), block_size)[0] - nats) > 1e-3  # the mask matters


@pytest.mark.parametrize("program", ["train", "evaluate"])
def test_predicted_tokens_that_stand_for_no_text_end_no_program_with_a_traceback(tmp_path, capsys, program):
    """A mask of the end token alone: there are no bytes that the bits could be divided by."""
    records = [(f"question {i}", f"answer {i}") for i in range(40)]
    folder = prepare_sum(tmp_path, write_records(tmp_path, ".jsonl", records), "--tokenizer=char")
    end = from_dict(read_meta(folder)["tokenizer"]).specials["<|endoftext|>"]
    for split in SPLITS:
        (ids_of(folder, split) == end).astype(np.uint8).tofile(f"{folder}/{split}.mask.bin")
    if program == "train":
        assert train.main([f"--data_dir={folder}", *PLAIN_TEMPLATE]) == 0
        tokens = read_log("out", "final")[0]["tokens"]
    else:
        given_weights("ckpt.pt", folder)
        capsys.readouterr()
        evaluate.main(["ckpt.pt", "--json", "--device=cpu"])
        tokens = json.loads(capsys.readouterr().out)[0]["tokens"]
    assert tokens == int((ids_of(folder, "val")[1:] == end).sum())


# ----------------------------------------------------------------------------------------------------------------------
# data/sum/prepare.py


MARK, END = "<|summarize|>", "<|endoftext|>"
LITERAL = "It says <|summarize|> and <|endoftext|> here."
CYCLE = [
    "the knight rode to La Mancha",
    "Sancho saw a giant, señor",
    "windmills turned slowly 😀",
    LITERAL,
    'a "quoted", text\nof two lines',
]


def some_records(n: int = 60) -> list[tuple[str, str]]:
    """Questions and answers that all differ, with quotes, commas, line ends, accents, and names of special tokens."""
    return [(f"{CYCLE[i % 5]} {i}. {CYCLE[(i + 1) % 5]}", f"{CYCLE[(i + 2) % 5]}, answer {i}") for i in range(n)]


def write_records(folder, ending: str, records, fields=("text", "summary")) -> str:
    """A file of records with an id field before the others; returns its path."""
    path = os.path.join(folder, "records" + ending)
    rows = [dict(zip(("id", *fields), (i, *record))) for i, record in enumerate(records)]
    if ending == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    with (gzip.open if ending.endswith(".gz") else open)(path, "wt", encoding="utf-8", newline="") as file:
        if ending.startswith(".csv"):
            writer = csv.DictWriter(file, ["id", *fields])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def prepare_program():
    """data/sum/prepare.py as a module."""
    spec = importlib.util.spec_from_file_location("prepare_sum", os.path.join(ROOT, "data", "sum", "prepare.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


def prepare_sum(tmp_path, path: str, *args: str) -> str:
    """Run data/sum/prepare.py for a folder of the test's; returns the folder."""
    module = prepare_program()
    module.FOLDER = str(tmp_path / "data" / "sum")
    module.main([f"--input={path}", *args])
    return str(tmp_path / "data" / "sum")


def tasks_of(folder: str, split: str) -> list[tuple[str, str]]:
    """The records of a split read back, cut at the end tokens; checks ids and masks on the way."""
    tokenizer = from_dict(read_meta(folder)["tokenizer"])
    ids, mask = ids_of(folder, split).tolist(), mask_of(folder, split).tolist()
    mark, end = tokenizer.specials[MARK], tokenizer.specials[END]
    assert len(ids) == len(mask) and ids[-1] == end
    tasks, start = [], 0
    while start < len(ids):
        stop = ids.index(end, start)
        record, at = ids[start : stop + 1], ids.index(mark, start) - start
        assert record.count(mark) == 1
        assert mask[start : stop + 1] == [0] * (at + 1) + [1] * (len(record) - at - 1)  # the answer and the end
        tasks.append((tokenizer.decode(record[:at]), tokenizer.decode(record[at + 1 : -1])))
        start = stop + 1
    return tasks


@pytest.mark.parametrize(
    "ending, fields, tokenizer",
    [
        (".jsonl", ("text", "summary"), "char"),
        (".jsonl", ("text", "summary"), "word"),
        (".csv", ("a long body", "title"), "bpe"),
        (".csv", ("a long body", "title"), "char"),
        (".parquet", ("frage", "antwort"), "char"),
        (".csv.gz", ("text", "summary"), "char"),
        (".jsonl.gz", ("summary", "text"), "word"),
    ],
)
def test_records_become_questions_marks_answers_and_ends(tmp_path, ending, fields, tokenizer):
    records = some_records()
    path = write_records(tmp_path, ending, records, fields)
    names = [f"--text={fields[0]}", f"--summary={fields[1]}"] if fields != ("text", "summary") else []
    folder = prepare_sum(tmp_path, path, *names, f"--tokenizer={tokenizer}", "--vocab_size=300")
    assert visible(folder) == ["meta.json", "train.bin", "train.mask.bin", "val.bin", "val.mask.bin"]
    tasks = {split: tasks_of(folder, split) for split in SPLITS}
    assert sorted(tasks["train"] + tasks["val"]) == sorted(records)  # whole, all, each once
    assert [task for task in records if task in set(tasks["train"])] == tasks["train"]  # in their order
    share = sum(len(q + a) for q, a in tasks["val"]) / sum(len(q + a) for q, a in records)
    assert 0.05 <= share <= 0.2
    meta = read_meta(folder)
    for split in SPLITS:
        assert meta["tokens"][split] == len(ids_of(folder, split))
        assert meta["characters"][split] == sum(len(q + a) for q, a in tasks[split])
        assert predicted_bytes(Corpus(folder), split) == sum(len(a.encode()) for _, a in tasks[split])


@smoke
def test_special_tokens_are_no_text_of_any_record(tmp_path):
    """Only the program writes the ids of special tokens, and they decode to their names."""
    folder = prepare_sum(
        tmp_path,
        write_records(tmp_path, ".jsonl", [(f"{LITERAL} {i}", LITERAL) for i in range(40)]),
        "--tokenizer=char",
    )
    tokenizer = from_dict(read_meta(folder)["tokenizer"])
    plain = CharTokenizer.from_text("".join(f"{LITERAL} {i}" for i in range(40)))
    assert tokenizer.vocab_size == plain.vocab_size + 2  # not in pieces, not as characters
    for split in SPLITS:
        ids = ids_of(folder, split).tolist()
        n = len(tasks_of(folder, split))
        assert ids.count(tokenizer.specials[MARK]) == ids.count(tokenizer.specials[END]) == n
    assert tokenizer.decode([tokenizer.specials[MARK]]) == MARK


@smoke
def test_the_special_tokens_that_are_given_too_are_declared(tmp_path):
    path = write_records(tmp_path, ".jsonl", some_records())
    folder = prepare_sum(tmp_path, path, "--tokenizer=bpe", "--vocab_size=300", "--special=<|x|>,<|summarize|>")
    assert set(from_dict(read_meta(folder)["tokenizer"]).specials) == {MARK, END, "<|x|>"}
    assert read_meta(folder)["vocab_size"] <= 300


@smoke
@pytest.mark.parametrize("tokenizer", ["char", "word"])
def test_the_same_question_is_never_on_both_sides(tmp_path, tokenizer):
    records = [(f"the question number {i % 25}", f"answer {i}") for i in range(100)]
    folder = prepare_sum(tmp_path, write_records(tmp_path, ".csv", records), f"--tokenizer={tokenizer}")
    asked = {split: {question for question, _ in tasks_of(folder, split)} for split in SPLITS}
    assert asked["train"] and asked["val"] and not asked["train"] & asked["val"]
    assert len(asked["train"] | asked["val"]) == 25


@smoke
def test_records_with_an_empty_field_are_left_away(tmp_path):
    records = some_records(50)
    path = write_records(tmp_path, ".jsonl", [("", "a"), *records, ("q", " \n"), ("  ", "")])
    folder = prepare_sum(tmp_path, path, "--tokenizer=char")
    assert sorted(tasks_of(folder, "train") + tasks_of(folder, "val")) == sorted(records)


@smoke
@pytest.mark.parametrize("tokenizer", ["char", "word", "bpe"])
def test_the_same_records_give_the_same_files(tmp_path, tokenizer):
    path, written = write_records(tmp_path, ".jsonl", some_records()), []
    for _ in range(2):
        folder = prepare_sum(tmp_path, path, f"--tokenizer={tokenizer}", "--vocab_size=300")
        written.append({name: open(os.path.join(folder, name), "rb").read() for name in visible(folder)})
    assert written[0] == written[1] and len(written[0]) == 5


@pytest.mark.parametrize("options", [["--min_count=2"], ["--lower=True"]])
def test_bits_per_byte_count_the_source_text_of_words_that_the_vocabulary_lacks(tmp_path, options):
    """DESIGN: nats / ln 2 / bytes of source text of the predicted tokens, whatever id they got."""
    records = [(f"question {i} of the knight", f"İ answer rare{i:02}word") for i in range(60)]
    path = write_records(tmp_path, ".jsonl", records)
    folder = prepare_sum(tmp_path, path, "--tokenizer=word", *options)
    tokenizer = from_dict(read_meta(folder)["tokenizer"])
    assert isinstance(tokenizer, WordTokenizer)
    n_val = int((ids_of(folder, "val") == tokenizer.specials[END]).sum())
    assert predicted_bytes(Corpus(folder), "val") == n_val * len("İ answer rare00word".encode())


@smoke
def test_name_is_a_folder_beside_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(bins, "ROOT", str(tmp_path))
    path = write_records(tmp_path, ".jsonl", some_records())
    prepare_sum(tmp_path, path, "--tokenizer=char", "--name=mine")
    assert sorted(os.listdir(tmp_path / "data")) == ["mine"] and len(visible(tmp_path / "data" / "mine")) == 5


@smoke
@pytest.mark.parametrize("name", ["mine/", "..", ".", "a/b"])
def test_a_name_that_is_no_plain_folder_name_is_refused(tmp_path, name):
    path = write_records(tmp_path, ".jsonl", some_records())
    with pytest.raises(UserError, match="must be the name of a folder under data/"):
        prepare_sum(tmp_path, path, "--tokenizer=char", f"--name={name}")
    assert os.listdir(tmp_path) == ["records.jsonl"]


def refusal(tmp_path, path: str, *args: str) -> str:
    """The sentence with which data/sum/prepare.py refuses; nothing was written."""
    with pytest.raises(ValueError) as caught:
        prepare_sum(tmp_path, path, *args)
    assert "\n" not in str(caught.value)
    left = tmp_path / "data" / "sum"
    assert not left.exists() or not visible(left)
    return str(caught.value)


@smoke
@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("option", ["text", "summary"])
def test_a_missing_field_is_a_sentence_that_names_it_and_the_option(tmp_path, ending, option):
    path = write_records(tmp_path, ending, some_records())
    said = refusal(tmp_path, path, "--tokenizer=char", f"--{option}=nonsense")
    assert "nonsense" in said and path in said and "'summary'" in said  # what is there is listed
    assert f"--{option}" in said  # the option that this program has


@smoke
@pytest.mark.parametrize(
    "records",
    [
        [("question", "answer")],
        [("same question", f"answer {i}") for i in range(50)],
        [],
        [("", "")] * 40,
        [("q" * 1000, "a"), ("r", "b")],
    ],
)
def test_records_that_cannot_be_split_are_a_sentence(tmp_path, records):
    assert refusal(tmp_path, write_records(tmp_path, ".jsonl", records), "--tokenizer=char")


@smoke
@pytest.mark.parametrize(
    "content, ending, part",
    [
        ('{"text": "a", "summary": 3}\n', ".jsonl", "summary"),
        ('{"text": "a"', ".jsonl", "line 1"),
        ("text,summary\na\n", ".csv", "line 2"),
        ("plain", ".txt", ".txt"),
        ('["text"]\n', ".jsonl", "line 1"),
        ('{"text": null, "summary": "b"}\n', ".jsonl", "text"),
    ],
)
def test_damaged_records_are_a_sentence(tmp_path, content, ending, part):
    (tmp_path / f"records{ending}").write_text(content, encoding="utf-8")
    assert part in refusal(tmp_path, str(tmp_path / f"records{ending}"), "--tokenizer=char")


@smoke
@pytest.mark.parametrize("fraction", [0, 1, -0.1, 2])
def test_a_val_fraction_that_means_nothing_is_refused_by_name(tmp_path, fraction):
    path = write_records(tmp_path, ".jsonl", some_records())
    assert "val_fraction" in refusal(tmp_path, path, "--tokenizer=char", f"--val_fraction={fraction}")


def test_the_program_says_what_is_missing_and_touches_nothing(tmp_path):
    before = visible(os.path.join(ROOT, "data", "sum"))
    expect_sentence(run("data/sum/prepare.py", cwd=tmp_path, check=None), "--input")
    expect_sentence(run("data/sum/prepare.py", "--input=nowhere.csv", cwd=tmp_path, check=None), "nowhere.csv")
    path = write_records(tmp_path, ".csv", some_records())
    expect_sentence(
        run(
            "data/sum/prepare.py", f"--input={path}", "--summary=nonsense", "--tokenizer=char", cwd=tmp_path, check=None
        ),
        "nonsense",
        "--summary",
    )
    assert visible(os.path.join(ROOT, "data", "sum")) == before


@smoke
@pytest.mark.parametrize("again", ["text", "sum"])
def test_preparing_a_folder_anew_takes_the_old_masks_away(tmp_path, again):
    folder = prepare_sum(tmp_path, write_records(tmp_path, ".jsonl", some_records()), "--tokenizer=char")
    old = {split: mask_of(folder, split) for split in SPLITS}
    if again == "text":
        write_corpus(folder, generated_text(1500))
        assert visible(folder) == ["meta.json", "train.bin", "val.bin"]
        assert Corpus(folder).masks.get("train") is None and Corpus(folder).masks.get("val") is None
    else:
        prepare_sum(tmp_path, write_records(tmp_path, ".jsonl", some_records(90)), "--tokenizer=char")
        assert all(len(mask_of(folder, split)) == len(ids_of(folder, split)) for split in SPLITS)
        assert len(mask_of(folder, "train")) > len(old["train"])


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_a_small_model_learns_to_answer(tmp_path, tokenizer, capsys):
    """Three answers that the question's last word decides; the sample ends with the end token."""
    answers = {"red": "stop", "green": "go", "blue": "swim"}
    records = [(f"{i} {colour}", answers[colour]) for i in range(40) for colour in answers]
    folder = prepare_sum(
        tmp_path, write_records(tmp_path, ".csv", records), f"--tokenizer={tokenizer}", "--vocab_size=300"
    )
    train.main(
        [
            f"--data_dir={folder}",
            *PLAIN_TEMPLATE,
            "--max_iters=200",
            "--lr_decay_iters=200",
            "--eval_interval=200",
            "--block_size=32",
            "--n_embd=32",
            "--batch_size=8",
            "--gradient_accumulation_steps=1",
        ]
    )
    mean = np.mean([record["loss"] for record in read_log("out", "iter")[-10:]])
    assert mean < 0.3  # with the numbers in the questions it would be more
    capsys.readouterr()
    for colour, answer in answers.items():
        sample.main(
            [
                f"--start=7 {colour}{MARK}",
                "--out_dir=out",
                "--device=cpu",
                "--num_samples=1",
                "--top_k=1",
                "--max_new_tokens=12",
                f"--stop={END}",
            ]
        )
        out = capsys.readouterr().out
        assert out.startswith(f"7 {colour}{MARK}{answer}") and END not in out, out


# ----------------------------------------------------------------------------------------------------------------------
# GPT-2


def test_gpt2s_vocabulary_gets_the_mark_behind_its_own_ids(tmp_path, gpt2_vocabulary):
    records = some_records()
    folder = prepare_sum(tmp_path, write_records(tmp_path, ".jsonl", records))  # gpt2 is the default
    meta, plain = read_meta(folder), from_dict({"kind": "gpt2"})
    tokenizer = from_dict(meta["tokenizer"])
    assert meta["tokenizer"]["kind"] == "gpt2" and meta["vocab_size"] == 50258
    assert (tokenizer.specials[END], tokenizer.specials[MARK]) == (50256, 50257)
    tasks = {split: tasks_of(folder, split) for split in SPLITS}
    assert sorted(tasks["train"] + tasks["val"]) == sorted(records)
    expected = [i for q, a in tasks["val"] for i in [*plain.encode(q), 50257, *plain.encode(a), 50256]]
    assert ids_of(folder, "val").tolist() == expected


def test_gpt2_in_hugging_faces_format_is_fine_tuned_on_the_answers(tmp_path, gpt2_vocabulary, transformers, capsys):
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50257, n_embd=8, n_layer=1, n_head=2, n_positions=32)
    )
    theirs.save_pretrained(tmp_path / "hf")
    folder = prepare_sum(tmp_path, write_records(tmp_path, ".csv", some_records()))
    capsys.readouterr()
    settings = [
        f"--data_dir={folder}",
        f"--init_from={tmp_path / 'hf'}",
        "--device=cpu",
        "--compile=False",
        "--gradient_accumulation_steps=1",
        "--eval_iters=2",
        "--dropout=0.0",
    ]
    train.main(
        [
            "config/finetune_sum.py",
            *settings,
            "--max_iters=1",
            "--eval_interval=1",
            "--out_dir=out-0",
            "--learning_rate=0",
        ]
    )
    assert "50257 to 50258" in capsys.readouterr().out
    train.main(["config/finetune_sum.py", *settings, "--max_iters=4", "--eval_interval=4", "--learning_rate=1e-2"])
    first, last = load("out-0"), load("out-sum")
    old = theirs.transformer.wte.weight.detach()
    assert first["model"]["transformer.wte.weight"].shape == (50258, 8) and first["model_args"]["vocab_size"] == 50258
    assert torch.equal(first["model"]["transformer.wte.weight"][:50257], old)  # what it knew stays
    assert not torch.equal(last["model"]["transformer.wte.weight"][50257], first["model"]["transformer.wte.weight"][-1])
    losses = [record["loss"] for record in read_log("out-sum", "iter")]
    assert len(losses) == 4 and all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    assert train.main(["--init_from=resume", "--out_dir=out-sum", "--max_iters=5"]) == 0  # with what it has grown to

    capsys.readouterr()
    evaluate.main(["out-sum", "--json", "--device=cpu"])
    (result,) = json.loads(capsys.readouterr().out)
    answers = [answer for _, answer in tasks_of(folder, "val")]
    assert result["tokens"] == sum(len(from_dict({"kind": "gpt2"}).encode(a)) + 1 for a in answers)
    assert result["bits_per_byte"] == pytest.approx(
        result["loss"] * result["tokens"] / math.log(2) / sum(len(a.encode()) for a in answers)
    )
    sample.main(
        [f"--start=A text.{MARK}", "--out_dir=out-sum", "--device=cpu", "--num_samples=1", "--max_new_tokens=5"]
    )
    assert f"A text.{MARK}" in capsys.readouterr().out


@smoke
def test_each_epoch_visits_the_windows_with_something_to_predict_and_no_others(tmp_path, in_memory):
    n, rng = 1003, np.random.default_rng(5)
    mask = np.repeat(rng.random(n // 17 + 1) < 0.2, 17)[:n].astype(np.uint8)  # in stretches, as answers lie
    for split in SPLITS:
        np.arange(n, dtype="<u2").tofile(tmp_path / f"{split}.bin")
        mask.tofile(tmp_path / f"{split}.mask.bin")
    corpus = Corpus(str(tmp_path))
    per_epoch = corpus.windows_per_epoch(BLOCK)
    assert 10 < per_epoch < 0.6 * (n // BLOCK)
    for epoch in range(6):
        starts = corpus.window_starts(epoch * per_epoch, per_epoch, BLOCK, SEED)
        (offset,) = set(starts % BLOCK)
        every = range(offset, n - BLOCK, BLOCK)
        wanted = {start for start in every if mask[start + 1 : start + BLOCK + 1].any()}
        fit = {start for start in wanted if start < offset + (n - BLOCK) // BLOCK * BLOCK}  # the last may not fit
        assert set(starts) <= fit and len(set(starts)) == min(per_epoch, len(fit))
    assert len(corpus.window_starts(0, 5 * per_epoch, BLOCK, SEED)) == 5 * per_epoch


@smoke
def test_a_mask_that_no_window_reaches_trains_on_all_of_them(tmp_path, in_memory):
    corpus, _ = masked_corpus(tmp_path)
    mask = np.zeros(203, np.uint8)
    mask[0] = 1  # the first token is never predicted
    mask.tofile(tmp_path / "train.mask.bin")
    corpus = Corpus(str(tmp_path))
    assert corpus.windows_per_epoch(BLOCK) == (203 - BLOCK) // BLOCK
    assert np.isfinite(corpus.loss_weights(0, 4, 2, BLOCK, SEED)).all()


@smoke
def test_what_is_left_out_and_what_comes_next_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bins, "ROOT", str(tmp_path))
    rows = [f"text number {i},sum {i}" for i in range(30)] + ["a text,", " ,a sum", ",", "b, "]
    (tmp_path / "records.csv").write_text("text,summary\n" + "\n".join(rows) + "\n", encoding="utf-8")
    prepare_sum(tmp_path, tmp_path / "records.csv", "--name=mine", "--tokenizer=char")
    out = capsys.readouterr().out
    assert "in 30 documents; skipped 4 records with an empty field" in out
    assert "next: python train.py config/quickstart.py --out_dir=out-sum --dataset=mine" in out


@smoke
@pytest.mark.parametrize(
    "options",
    [
        "--tokenizer=char --vocab_size=300",
        "--tokenizer=word --vocab_size=300",
        "--tokenizer=bpe --vocab_size=300 --lower",
        "--tokenizer=char --min_count=2",
    ],
)
def test_a_setting_of_another_tokenizer_is_said_to_change_nothing(tmp_path, options, capsys):
    prepare_sum(tmp_path, write_records(tmp_path, ".csv", some_records()), *options.split())
    assert f"{options.split()[-1].split('=')[0]} has no effect" in capsys.readouterr().out
