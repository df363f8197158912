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
from dongpt.log import import_figure
from dongpt.program import run_program
from dongpt.text.bins import SPLITS, find_folder
from dongpt.text.report import name_of
from dongpt.text.tokenizers import BPETokenizer, GPT2Tokenizer, Tokenizer, split_words
from dongpt.train.data import Corpus

PICTURE = "explore.png"


@dataclass(frozen=True)
class ExploreConfig:
    dataset: str = ""  # a folder under data/
    data_dir: str = ""  # a data folder anywhere; replaces dataset
    most_tokens: Annotated[int, ">=", 2] = 3_000_000  # of each split whose text is read; all of it counts frequencies


def count_tokens(corpus: Corpus, split: str) -> np.ndarray:
    """How often each id occurs in a split, (vocab_size,) int64."""
    counts = np.zeros(2**16, dtype=np.int64)
    for ids in corpus.chunks(split):
        counts += np.bincount(ids, minlength=2**16)
    return counts[: max(corpus.vocab_size, int(np.flatnonzero(counts)[-1]) + 1)]


def documents_of(ids: np.ndarray, tokenizer: Tokenizer) -> tuple[list[str], str]:
    """(texts, "documents") of ids if they have documents with ends, else (texts, "paragraphs")."""
    end = tokenizer.end_id
    if end is not None and (ids == end).any():
        parts = (part[part != end] for part in np.split(ids, np.flatnonzero(ids == end)))
        return [tokenizer.decode(part.tolist()) for part in parts if len(part)], "documents"
    return [text for text in tokenizer.decode(ids.tolist()).split("\n\n") if text.strip()], "paragraphs"


def zipf(counts: np.ndarray) -> tuple[float, float]:
    """(slope, height) of the line log count = height + slope * log rank, each rank weighted by its share."""
    counts = np.sort(counts[counts > 0])[::-1]
    if len(counts) < 2:
        return 0.0, float(np.log(counts[0]))
    slope, height = np.polyfit(np.log(np.arange(1, len(counts) + 1)), np.log(counts), 1, w=np.sqrt(counts))
    return float(slope), float(height)


def bytes_per_token(texts: dict[str, str], own: Tokenizer) -> dict[str, float]:
    """Bytes of validation text per token, for this data's tokenizer and others; byte pairs are trained on train."""
    train, val = texts["train"], texts["val"]
    n_bytes = len(val.encode("utf-8"))
    n_tokens = {f"{own.kind} of this data": len(own.encode_array(val)), "char": len(val), "word": len(split_words(val))}
    for size in (1024, 4096):
        n_tokens[f"bpe {size:,}"] = len(BPETokenizer.train([train], size).encode_array(val))
    try:
        n_tokens["gpt2"] = len(GPT2Tokenizer().encode_array(val))
    except ValueError as error:
        print(f"without gpt2: {error}")
    if own.kind in ("char", "gpt2"):
        del n_tokens[own.kind]  # the same
    return {name: n_bytes / max(n, 1) for name, n in n_tokens.items()}


def duplicates(texts: list[str]) -> float:
    """Share of texts that occur more than once, ignoring blanks around them."""
    counts = Counter(text.strip() for text in texts)
    return sum(n for n in counts.values() if n > 1) / max(len(texts), 1)


def drift(train: np.ndarray, val: np.ndarray) -> tuple[float, float, np.ndarray]:
    """(unigram loss on train, on val, in nats per token; deviation of each id's count in val from the expected one).

    The unigram model has train's frequencies, plus one for each id. Deviations are in standard deviations.
    """
    shares = (train + 1) / (train + 1).sum()
    losses = [float(-(counts * np.log(shares)).sum() / counts.sum()) for counts in (train, val)]
    expected = shares * val.sum()
    return losses[0], losses[1], (val - expected) / np.sqrt(expected)


def draw(path: str, title: str, panels: dict):
    """Draw what main found to a PNG."""
    figure = import_figure()(figsize=(17, 9), layout="constrained")
    (*frequencies, by_rank), (lengths, compression, shares) = figure.subplots(2, 3)
    for axis, (name, counts) in zip(frequencies, panels["bars"].items()):
        axis.bar(range(len(counts)), [n for _, n in counts], color="tab:blue")
        axis.set_xticks(range(len(counts)), [label for label, _ in counts], rotation=90, fontsize=8, parse_math=False)
        axis.set(title=name, yscale="log", ylabel="count")
    counts, (slope, height) = np.sort(panels["counts"][panels["counts"] > 0])[::-1], panels["zipf"]
    ranks = np.arange(1, len(counts) + 1)
    by_rank.loglog(ranks, counts, ".", label="tokens")
    by_rank.loglog(ranks, np.exp(height + slope * np.log(ranks)), label=f"Zipf's line, slope {slope:.2f}")
    by_rank.set(title="count by rank", xlabel="rank", ylabel="count")
    by_rank.legend()
    lengths.hist(panels["lengths"], bins=np.geomspace(1, max(*panels["lengths"], 2), 40))
    lengths.set(title=f"length of {panels['unit']}", xscale="log", xlabel="characters", ylabel=panels["unit"])
    compression.barh([*panels["compression"]], [*panels["compression"].values()], color="tab:green")
    compression.invert_yaxis()
    compression.set(title="bytes of validation text per token", xlabel="bytes")
    train, val = panels["shares"]
    both = (train > 0) & (val > 0)
    shares.loglog(train[both], val[both], ".")
    shares.axline((1e-3, 1e-3), (1e-2, 1e-2), color="gray", linewidth=1)
    shares.set(title="share of each token", xlabel="in training", ylabel="in validation")
    figure.suptitle(title)
    figure.savefig(path, dpi=100)


def print_counts(corpus: Corpus, counts: dict[str, np.ndarray], texts: dict[str, str], tokenizer: Tokenizer) -> dict:
    """Print frequencies and Zipf's line; returns the panels of draw that show them."""
    both, text = counts["train"] + counts["val"], texts["train"] + texts["val"]
    characters = [(repr(c), n) for c, n in Counter(text).most_common(40)]
    tokens = [(name_of(tokenizer, i), int(both[i])) for i in np.argsort(-both, kind="stable")[:40] if both[i]]
    for title, found, total in (("characters", characters, len(text)), ("tokens", tokens, both.sum())):
        print(f"{title}:", ", ".join(f"{name} {100 * n / total:.2f} %" for name, n in found[:10]))
    slope, height = zipf(both)
    print(
        f"Zipf's line: count ~ rank ** {slope:.2f}; {np.count_nonzero(both):,} of {corpus.vocab_size:,} ids occur, "
        f"{np.count_nonzero(both == 1):,} of them once"
    )
    return dict(bars={"characters": characters, "tokens": tokens}, counts=both, zipf=(slope, height))


def print_documents(documents: dict[str, list[str]], unit: str, texts: dict[str, str]) -> dict:
    """Print lengths and duplicates; returns the panels of draw that show them."""
    everything = documents["train"] + documents["val"]
    lengths = [len(text) for text in everything] or [0]
    median, mean = np.median(lengths), np.mean(lengths)
    print(
        f"{unit}: {len(everything):,}, length in characters: median {median:,.0f}, mean {mean:,.0f}, longest "
        f"{max(lengths):,}"
    )
    known = {text.strip() for text in documents["train"]}
    again = sum(text.strip() in known for text in documents["val"]) / max(len(documents["val"]), 1)
    lines = [line for text in texts.values() for line in text.split("\n") if line.strip()]
    print(
        f"duplicates: {100 * duplicates(everything):.2f} % of the {unit} and {100 * duplicates(lines):.2f} % of the "
        f"lines stand there more than once; {100 * again:.2f} % of the {unit} of validation are in train too"
    )
    return dict(lengths=lengths, unit=unit)


def print_drift(counts: dict[str, np.ndarray], tokenizer: Tokenizer) -> dict:
    """Print how much validation differs from training; returns the panels of draw that show it."""
    train, val = (counts[split] for split in SPLITS)
    train_loss, val_loss, deviations = drift(train, val)
    unseen = 100 * val[train == 0].sum() / val.sum()
    print(
        f"loss of train's token frequencies: {train_loss:.4f} nats on train, {val_loss:.4f} on validation; "
        f"{unseen:.3f} % of validation tokens never occur in train"
    )
    expected = (train + 1) / (train + 1).sum() * val.sum()
    strange = np.argsort(-np.abs(deviations), kind="stable")[:10]
    named = (f"{name_of(tokenizer, i)} {val[i]:,} where train promises {expected[i]:,.1f}" for i in strange)
    print("furthest off in validation:", ", ".join(named))
    return dict(shares=(train / train.sum(), val / val.sum()))


def main(argv: list[str] | None = None):
    cfg, _ = configurator.load(ExploreConfig, argv)
    corpus = Corpus(find_folder(cfg.dataset, cfg.data_dir))
    for split in SPLITS:
        corpus.check_split(split, 2**16)
    tokenizer = corpus.tokenizer()
    counts = {split: count_tokens(corpus, split) for split in SPLITS}
    width = max(map(len, counts.values()))
    counts = {split: np.pad(n, (0, width - len(n))) for split, n in counts.items()}
    documents, texts = {}, {}
    for split in SPLITS:
        ids = np.asarray(corpus.tokens(split)[: cfg.most_tokens])
        part = "" if len(ids) == corpus.lengths[split] else f"; of the first {len(ids):,} the text is looked at"
        print(f"{split}: {corpus.lengths[split]:,} tokens{part}")
        documents[split], unit = documents_of(ids, tokenizer)
        texts[split] = tokenizer.decode(ids[~np.isin(ids, list(tokenizer.specials.values()))].tolist())
    panels = print_counts(corpus, counts, texts, tokenizer)
    panels |= print_documents(documents, unit, texts)
    panels["compression"] = bytes_per_token(texts, tokenizer)
    print("bytes of validation text per token -", ", ".join(f"{k}: {n:.3f}" for k, n in panels["compression"].items()))
    panels |= print_drift(counts, tokenizer)
    path = os.path.join(corpus.folder, PICTURE)
    draw(path, f"{corpus.name}: {panels['counts'].sum():,} tokens, {corpus.vocab_size:,} in the vocabulary", panels)
    print(f"drawn to {path}")


if __name__ == "__main__":
    run_program(main)
