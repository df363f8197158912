"""Print statistics of a prepared data set, and draw them next to its data files as explore.png.

    python data/explore.py --dataset=don_char
    python data/explore.py --data_dir=texts

Frequencies of characters and tokens, Zipf's law, lengths of documents, bytes per token of several tokenizers on the
same text, duplicates, and how much validation differs from training.
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from collections import Counter
from dataclasses import dataclass
from typing import Annotated

import numpy as np

import configurator
from dongpt.log import import_matplotlib_figure
from dongpt.program import run_program
from dongpt.text.bins import SPLITS, find_data_folder
from dongpt.text.report import token_name
from dongpt.text.tokenizers import BPETokenizer, GPT2Tokenizer, Tokenizer, split_words
from dongpt.train.data import Corpus

PLOT_FILE = "explore.png"


@dataclass(frozen=True)
class ExploreConfig:
    dataset: str = ""  # a folder under data/
    data_dir: str = ""  # a data folder anywhere; replaces dataset
    most_tokens: Annotated[int, ">=", 2] = 3_000_000  # of each split whose text is read; all of it counts frequencies


def split_documents(ids: np.ndarray, tokenizer: Tokenizer) -> tuple[list[str], str]:
    """(texts, "documents") of ids if they have documents with ends, else (texts, "paragraphs")."""
    end_id = tokenizer.end_id
    if end_id is not None and (ids == end_id).any():
        documents = (part[part != end_id] for part in np.split(ids, np.flatnonzero(ids == end_id)))
        return [tokenizer.decode(document.tolist()) for document in documents if len(document)], "documents"
    return [text for text in tokenizer.decode(ids.tolist()).split("\n\n") if text.strip()], "paragraphs"


def fit_zipf(counts: np.ndarray) -> tuple[float, float]:
    """(slope, intercept) of the line log count = intercept + slope * log rank, each rank weighted by its share."""
    counts = np.sort(counts[counts > 0])[::-1]
    if len(counts) < 2:
        return 0.0, float(np.log(counts[0]))
    slope, intercept = np.polyfit(np.log(np.arange(1, len(counts) + 1)), np.log(counts), 1, w=np.sqrt(counts))
    return float(slope), float(intercept)


def bytes_per_token(texts: dict[str, str], tokenizer: Tokenizer) -> dict[str, float]:
    """Bytes of validation text per token, for this data's tokenizer and others; byte pairs are trained on train."""
    train, val = texts["train"], texts["val"]
    n_bytes = len(val.encode("utf-8"))
    own_name, n_own_tokens = f"{tokenizer.kind} of this data", len(tokenizer.encode_array(val))
    n_tokens = {own_name: n_own_tokens, "char": len(val), "word": len(split_words(val))}
    for size in (1024, 4096):
        n_tokens[f"bpe {size:,}"] = len(BPETokenizer.train([train], size).encode_array(val))
    try:
        n_tokens["gpt2"] = len(GPT2Tokenizer().encode_array(val))
    except ValueError as error:
        print(f"without gpt2: {error}")
    if tokenizer.kind in ("char", "gpt2"):
        del n_tokens[tokenizer.kind]  # the same
    return {name: n_bytes / max(n, 1) for name, n in n_tokens.items()}


def duplicate_share(texts: list[str]) -> float:
    """Share of texts that occur more than once, ignoring blanks around them."""
    counts = Counter(text.strip() for text in texts)
    return sum(n for n in counts.values() if n > 1) / max(len(texts), 1)


def unigram_drift(train: np.ndarray, val: np.ndarray) -> tuple[float, float, np.ndarray, np.ndarray]:
    """(loss on train, on val, in nats per token; expected count of each id in val; deviation from it) of counts.

    The unigram model has train's frequencies, plus one for each id. Deviations are in standard deviations.
    """
    probabilities = (train + 1) / (train + 1).sum()
    losses = [float(-(counts * np.log(probabilities)).sum() / counts.sum()) for counts in (train, val)]
    expected = probabilities * val.sum()
    return losses[0], losses[1], expected, (val - expected) / np.sqrt(expected)


def show_frequencies(axes, counts: np.ndarray, text: str, tokenizer: Tokenizer, vocab_size: int):
    """Print and draw how often characters and tokens occur, and Zipf's line."""
    characters = [(repr(c), n) for c, n in Counter(text).most_common(40)]
    tokens = [(token_name(tokenizer, i), int(counts[i])) for i in np.argsort(-counts, kind="stable")[:40] if counts[i]]
    panels = (("characters", characters, len(text)), ("tokens", tokens, counts.sum()))
    for axis, (title, symbols, total) in zip(axes, panels):
        print(f"{title}:", ", ".join(f"{name} {100 * n / total:.2f} %" for name, n in symbols[:10]))
        axis.bar(range(len(symbols)), [n for _, n in symbols], color="tab:blue")
        axis.set_xticks(range(len(symbols)), [name for name, _ in symbols], rotation=90, fontsize=8, parse_math=False)
        axis.set(title=title, yscale="log", ylabel="count")
    slope, intercept = fit_zipf(counts)
    print(
        f"Zipf's line: count ~ rank ** {slope:.2f}; {np.count_nonzero(counts):,} of {vocab_size:,} ids occur, "
        f"{np.count_nonzero(counts == 1):,} of them once"
    )
    counts = np.sort(counts[counts > 0])[::-1]
    ranks = np.arange(1, len(counts) + 1)
    axes[2].loglog(ranks, counts, ".", label="tokens")
    axes[2].loglog(ranks, np.exp(intercept + slope * np.log(ranks)), label=f"Zipf's line, slope {slope:.2f}")
    axes[2].set(title="count by rank", xlabel="rank", ylabel="count")
    axes[2].legend()


def show_documents(axis, documents: dict[str, list[str]], unit: str, texts: dict[str, str]):
    """Print and draw the lengths of documents; print how many are duplicates."""
    all_documents = documents["train"] + documents["val"]
    lengths = [len(text) for text in all_documents] or [0]
    averages = f"median {np.median(lengths):,.0f}, mean {np.mean(lengths):,.0f}"
    print(f"{unit}: {len(all_documents):,}, length in characters: {averages}, longest {max(lengths):,}")
    train_documents = {text.strip() for text in documents["train"]}
    shared = sum(text.strip() in train_documents for text in documents["val"]) / max(len(documents["val"]), 1)
    lines = [line for text in texts.values() for line in text.split("\n") if line.strip()]
    print(
        f"duplicates: {100 * duplicate_share(all_documents):.2f} % of the {unit} and "
        f"{100 * duplicate_share(lines):.2f} % of the lines stand there more than once; "
        f"{100 * shared:.2f} % of the {unit} of validation are in train too"
    )
    axis.hist(lengths, bins=np.geomspace(1, max(*lengths, 2), 40))
    axis.set(title=f"length of {unit}", xscale="log", xlabel="characters", ylabel=unit)


def show_compression(axis, texts: dict[str, str], tokenizer: Tokenizer):
    """Print and draw the bytes per token of several tokenizers."""
    compression = bytes_per_token(texts, tokenizer)
    print("bytes of validation text per token -", ", ".join(f"{name}: {n:.3f}" for name, n in compression.items()))
    axis.barh([*compression], [*compression.values()], color="tab:green")
    axis.invert_yaxis()
    axis.set(title="bytes of validation text per token", xlabel="bytes")


def show_drift(axis, train: np.ndarray, val: np.ndarray, tokenizer: Tokenizer):
    """Print and draw how much the counts of validation differ from those of training."""
    train_loss, val_loss, expected, deviations = unigram_drift(train, val)
    unseen = 100 * val[train == 0].sum() / val.sum()
    print(
        f"loss of train's token frequencies: {train_loss:.4f} nats on train, {val_loss:.4f} on validation; "
        f"{unseen:.3f} % of validation tokens never occur in train"
    )
    outliers = np.argsort(-np.abs(deviations), kind="stable")[:10]
    names = (f"{token_name(tokenizer, i)} {val[i]:,} where train promises {expected[i]:,.1f}" for i in outliers)
    print("furthest off in validation:", ", ".join(names))
    both = (train > 0) & (val > 0)
    axis.loglog(train[both] / train.sum(), val[both] / val.sum(), ".")
    axis.axline((1e-3, 1e-3), (1e-2, 1e-2), color="gray", linewidth=1)
    axis.set(title="share of each token", xlabel="in training", ylabel="in validation")


def main(argv: list[str] | None = None):
    cfg, _ = configurator.load(ExploreConfig, argv)
    corpus = Corpus(find_data_folder(cfg.dataset, cfg.data_dir))
    corpus.check(1, 2**16)
    tokenizer = corpus.tokenizer()
    counts, documents, texts = {}, {}, {}
    for split in SPLITS:
        counts[split] = corpus.tokens[split].counts(2**16)
        ids = corpus.tokens[split][: cfg.most_tokens]
        limit_note = "" if len(ids) == corpus.lengths[split] else f"; of the first {len(ids):,} the text is looked at"
        print(f"{split}: {corpus.lengths[split]:,} tokens{limit_note}")
        documents[split], unit = split_documents(ids, tokenizer)
        texts[split] = tokenizer.decode(ids[~np.isin(ids, list(tokenizer.specials.values()))].tolist())
    both = counts["train"] + counts["val"]
    n_ids = max(corpus.vocab_size, int(np.flatnonzero(both)[-1]) + 1)
    figure = import_matplotlib_figure()(figsize=(17, 9), layout="constrained")
    axes = figure.subplots(2, 3)
    show_frequencies(axes[0], both[:n_ids], texts["train"] + texts["val"], tokenizer, corpus.vocab_size)
    show_documents(axes[1, 0], documents, unit, texts)
    show_compression(axes[1, 1], texts, tokenizer)
    show_drift(axes[1, 2], counts["train"][:n_ids], counts["val"][:n_ids], tokenizer)
    figure.suptitle(f"{corpus.name}: {both.sum():,} tokens, {corpus.vocab_size:,} in the vocabulary")
    path = os.path.join(corpus.folder, PLOT_FILE)
    figure.savefig(path, dpi=100)
    print(f"drawn to {path}")


if __name__ == "__main__":
    run_program(main)
