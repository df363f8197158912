"""Print statistics of a prepared data set, and plot them in explore.png next to the data files.

    python data/explore.py don_char           # the dataset in data/don_char; --dataset=don_char is equivalent
    python data/explore.py --data_dir=texts

The panels show frequent characters and tokens, Zipf's law, document lengths and duplicates, the compression of several
tokenizers, and the difference between the training and validation sets. Each panel has a caption that explains the
result. The program also prints the captions.
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import re
import textwrap
from collections import Counter
from dataclasses import dataclass
from typing import Annotated

import numpy as np

import configurator
from configurator import UserError
from dongpt.log import import_matplotlib_figure
from dongpt.program import run_program
from dongpt.text.bins import SPLITS, find_data_folder, has_validation
from dongpt.text.report import count_of, token_name
from dongpt.text.tokenizers import BPETokenizer, CharTokenizer, GPT2Tokenizer, Tokenizer, split_words
from dongpt.train.data import Corpus

PLOT_FILE = "explore.png"
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"  # distinguishable for color-blind readers (Okabe and Ito)
NUM_BARS = 30  # bars in each panel of frequent symbols
NUM_RARE = 8  # rarest characters listed in the caption
LABEL_CHARS = 14  # maximum length of a symbol's label in the plot
CAPTION_COLUMNS = 62  # column at which captions wrap
RARE_COUNT = 10  # tokens that occur less often are hardly learned
MIN_ZIPF_WORDS = 500  # fewer different words do not determine the slope
ZIPF_SLOPES = (-1.4, -0.7)  # range of slopes for natural language


@dataclass(frozen=True)
class ExploreConfig:
    dataset: str = ""  # name of a folder under data/
    data_dir: str = ""  # path to a data folder; overrides dataset
    most_tokens: Annotated[int, ">=", 2] = (
        3_000_000  # maximum number of tokens per split that the text statistics are based on
    )


def split_documents(ids: np.ndarray, tokenizer: Tokenizer) -> tuple[list[str], str]:
    """Split ids into documents at end tokens, or into paragraphs if there are none. Returns (texts, unit name)."""
    end_id = tokenizer.end_id
    if end_id is not None and (ids == end_id).any():
        documents = (part[part != end_id] for part in np.split(ids, np.flatnonzero(ids == end_id)))
        return [tokenizer.decode(document.tolist()) for document in documents if len(document)], "documents"
    return [text for text in tokenizer.decode(ids.tolist()).split("\n\n") if text.strip()], "paragraphs"


def join_cut_document(documents: dict[str, list[str]], last_ids: np.ndarray, tokenizer: Tokenizer):
    """If the split cut a document in two, move its second part to the training set, which ends with last_ids."""
    is_cut = last_ids[-1] != tokenizer.end_id and not tokenizer.decode(last_ids.tolist()).endswith("\n\n")
    if is_cut and documents["train"] and documents["val"]:
        documents["train"][-1] += documents["val"].pop(0)


def fit_zipf(counts: np.ndarray) -> tuple[float, float]:
    """Fit log count = intercept + slope * log rank, weighting each rank by its count. Returns (slope, intercept)."""
    counts = np.sort(counts[counts > 0])[::-1]
    if len(counts) < 2:
        return 0.0, float(np.log(counts[0]))
    slope, intercept = np.polyfit(np.log(np.arange(1, len(counts) + 1)), np.log(counts), 1, w=np.sqrt(counts))
    return float(slope), float(intercept)


def bytes_per_token(texts: dict[str, str], tokenizer: Tokenizer) -> dict[str, float]:
    """Return the bytes of validation text per token for several tokenizers. BPE is trained on the training set."""
    train, val = texts["train"], texts["val"]
    n_bytes = len(val.encode("utf-8"))
    own_name, n_own_tokens = f"this data's {tokenizer.kind}", len(tokenizer.encode_array(val))
    n_tokens = {own_name: n_own_tokens, "char": len(val), "word": len(split_words(val))}
    for size in (1024, 4096):
        bpe = BPETokenizer.train([train], size)  # a short text gives it fewer tokens than size
        n_tokens[f"bpe {bpe.vocab_size:,}"] = len(bpe.encode_array(val))
    try:
        n_tokens["gpt2"] = len(GPT2Tokenizer().encode_array(val))
    except ValueError as error:
        print(f"skipping GPT-2's tokenizer: {error}")
    same_name = f"bpe {tokenizer.vocab_size:,}" if tokenizer.kind == "bpe" else tokenizer.kind
    if tokenizer.kind == "bpe" or n_tokens.get(same_name) == n_own_tokens:  # words differ with --spaces_alone
        n_tokens.pop(same_name, None)  # the tokenizer of the first entry
    return {name: n_bytes / max(n, 1) for name, n in n_tokens.items()}


def duplicate_share(texts: list[str]) -> float:
    """Return the fraction of documents that occur more than once, ignoring leading and trailing whitespace."""
    counts = Counter(text.strip() for text in texts)
    return sum(n for n in counts.values() if n > 1) / max(len(texts), 1)


def unigram_drift(train: np.ndarray, val: np.ndarray) -> tuple[float, float, np.ndarray, np.ndarray]:
    """Return (train loss, val loss, expected counts in val, deviations from expected counts) for a unigram model.

    train and val are counts by id. The model predicts each token with its add-one smoothed frequency in train. Losses
    are in nats per token, and deviations are in standard deviations.
    """
    probabilities = (train + 1) / (train + 1).sum()
    losses = [float(-(counts * np.log(probabilities)).sum() / counts.sum()) for counts in (train, val)]
    expected = probabilities * val.sum()
    return losses[0], losses[1], expected, (val - expected) / np.sqrt(expected)


def displayable(text: str) -> str:
    """Replace characters that are missing from the plot's font with escapes, such as \\u4f60."""
    from matplotlib.font_manager import findfont, get_font

    glyphs = get_font(findfont("DejaVu Sans")).get_charmap()
    return "".join(c if ord(c) in glyphs else ascii(c)[1:-1] for c in text)


def draw_panel(axis, title: str, x_label: str, y_label: str, caption: str, **options):
    """Set a panel's title, labels and caption, and print the caption."""
    print(f"{title}: {caption}")
    axis.set_title(title, loc="left", fontweight="bold")
    axis.set_xlabel(
        f"{x_label}\n\n{textwrap.fill(displayable(caption), CAPTION_COLUMNS)}", loc="left", parse_math=False
    )
    axis.set(ylabel=y_label, **options)


def draw_bars(axis, counts: list[tuple[str, int]], total: int):
    """Draw a bar chart of the symbols' shares, with the symbols as labels."""
    names = [shorten(displayable(name)) for name, _ in counts]
    axis.bar(range(len(counts)), [100 * n / total for _, n in counts], color=BLUE)
    axis.set_xticks(range(len(counts)), names, rotation=90, fontsize=9, parse_math=False)


def shorten(name: str) -> str:
    """Truncate a long name and append an ellipsis."""
    return name if len(name) <= LABEL_CHARS else name[: LABEL_CHARS - 3] + "..."


def join_names(counts: list[tuple[str, int]], total: int) -> str:
    """List the symbols with their shares of the total: "'e' 12.3%, 't' 9.1%"."""
    return ", ".join(f"{shorten(name)} {100 * n / total:.1f}%" for name, n in counts)


def show_characters(axis, text: str):
    """Plot the most frequent characters."""
    counts = [(repr(c), n) for c, n in Counter(text).most_common()]
    n_half = 1 + int(np.searchsorted(np.cumsum([n for _, n in counts]), len(text) / 2))
    rare = ", ".join(name for name, _ in counts[: -NUM_RARE - 1 : -1])
    caption = (
        f"Half of the text consists of {n_half:,} of its {len(counts):,} distinct characters. The most frequent are "
        f"{join_names(counts[:5], len(text))}. The rarest are {rare}. "
        "Characters that do not belong in the text should be removed before training."
    )
    draw_bars(axis, counts[:NUM_BARS], len(text))
    draw_panel(axis, "Frequent characters", "character", "% of the text", caption)


def show_words(axis, words: Counter):
    """Plot the most frequent words of a data set whose tokens are characters."""
    total, n_words = max(words.total(), 1), max(len(words), 1)
    once = 100 * sum(n == 1 for n in words.values()) / n_words
    frequent = join_names([(repr(word), n) for word, n in words.most_common(5)], total)
    caption = (
        f"The text has {len(words):,} distinct words. The most frequent are "
        f"{frequent}. About {once:.0f}% of the words occur only once, which is too rare for the model to learn them."
    )
    draw_bars(axis, words.most_common(NUM_BARS), total)
    draw_panel(axis, "Frequent words", "word", "% of all words", caption)


def show_tokens(axis, counts: np.ndarray, tokenizer: Tokenizer):
    """Plot the most frequent tokens."""
    order = [i for i in np.argsort(-counts, kind="stable")[:NUM_BARS] if counts[i]]
    names = [(token_name(tokenizer, i), int(counts[i])) for i in order]
    n_used, n_rare = np.count_nonzero(counts), np.count_nonzero((counts > 0) & (counts < RARE_COUNT))
    suits = "A smaller vocabulary would suit" if n_used - n_rare < tokenizer.vocab_size / 2 else "This vocabulary suits"
    caption = (
        f"The most frequent tokens are {join_names(names[:5], int(counts.sum()))}. Of the {tokenizer.vocab_size:,} "
        f"tokens in the vocabulary, {n_used:,} occur in the text, {n_rare:,} of them fewer than {RARE_COUNT} times, "
        f"too rarely to be learned. {suits} the text."
    )
    draw_bars(axis, names, int(counts.sum()))
    draw_panel(axis, "Frequent tokens", "token", "% of all tokens", caption)


def show_zipf(axis, words: Counter):
    """Plot word counts by rank, and compare them with Zipf's law."""
    counts = np.sort(np.array([*words.values()] or [1]))[::-1]
    slope, intercept = fit_zipf(counts)
    ranks = np.arange(1, len(counts) + 1)
    axis.loglog(ranks, counts, ".", color=BLUE, label="words in this text")
    axis.loglog(ranks, np.exp(intercept + slope * np.log(ranks)), color=ORANGE, label=f"fitted line, slope {slope:.2f}")
    axis.legend()
    is_natural = ZIPF_SLOPES[0] < slope < ZIPF_SLOPES[1]
    verdict = "typical of natural language" if is_natural else "unusual for natural language"
    verdict = verdict if len(counts) >= MIN_ZIPF_WORDS else "not reliable, since the text has few different words"
    caption = (
        "In natural language, the second most frequent word occurs half as often as the first, the third one third as "
        f"often, and so on: a line with a slope of -1 (Zipf's law). The slope of this text, {slope:.2f}, is {verdict}."
    )
    draw_panel(axis, "Zipf's law", "rank of the word", "count", caption)


def show_documents(axis, documents: dict[str, list[str]], unit: str, chars_per_token: float):
    """Plot document lengths, and count duplicates."""
    all_documents = documents["train"] + documents["val"]
    lengths = [len(text) for text in all_documents] or [0]
    train_documents = {text.strip() for text in documents["train"]}
    n_shared = sum(text.strip() in train_documents for text in documents["val"])
    shared = 100 * n_shared / max(len(documents["val"]), 1)
    axis.hist(lengths, bins=np.geomspace(1, max(*lengths, 2), 40), color=BLUE)
    median = float(np.median(lengths))
    axis.axvline(max(median, 1), color=ORANGE, label=f"median, {median:,.0f} characters")
    axis.legend()
    duplicates, block_size = 100 * duplicate_share(all_documents), max(1, round(median / chars_per_token))
    advice = f"Half of the {unit} fit into a block_size of {block_size:,}. " if len(lengths) >= 20 else ""
    caption = (
        f"The text has {count_of(len(all_documents), unit[:-1])}, with {np.mean(lengths):,.0f} characters on average "
        f"and {max(lengths):,} at most. {advice}{duplicates:.3g}% of the {unit} are duplicates, "
        f"and {shared:.3g}% of the {unit} in the validation set are also in the training set"
        + (", which makes the validation loss look better than it is." if shared > 1 else ".")
    )
    draw_panel(axis, f"Length of {unit}", "characters", unit, caption, xscale="log")


def show_compression(axis, texts: dict[str, str], tokenizer: Tokenizer):
    """Plot the bytes per token of several tokenizers."""
    compression = bytes_per_token(texts, tokenizer)
    bars = axis.barh([*compression], [*compression.values()], color=[BLUE] + [GREEN] * (len(compression) - 1))
    axis.bar_label(bars, fmt="%.2f", padding=3)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    (own, own_bytes), *others = compression.items()
    best, best_bytes = max(others, key=lambda item: item[1])
    result = f"so the same block_size would cover {best_bytes / own_bytes:.1f} times as much text"
    comparison = (
        f"and {best} tokens represent {best_bytes:.2f} bytes, {result}"
        if best_bytes > own_bytes
        else "at least as many as with the other tokenizers"
    )
    caption = f"This data's tokens ({tokenizer.kind}) represent {own_bytes:.2f} bytes on average, {comparison}."
    draw_panel(axis, "Compression by tokenizer", "bytes of validation text per token", "", caption)


def show_drift(axis, train: np.ndarray, val: np.ndarray, tokenizer: Tokenizer):
    """Plot the differences in token frequencies between the training and validation sets."""
    train_loss, val_loss, expected, deviations = unigram_drift(train, val)
    i = int(np.argmax(np.abs(deviations)))
    both = (train > 0) & (val > 0)
    axis.loglog(train[both] / train.sum(), val[both] / val.sum(), ".", color=BLUE, label="tokens")
    shares = [counts[both] / counts.sum() for counts in (train, val)] if both.any() else [np.array([0.1, 1.0])]
    limits = [min(map(np.min, shares)), max(map(np.max, shares))]
    axis.loglog(limits, limits, color=ORANGE, label="equally frequent in both")
    axis.legend()
    gap = val_loss / max(train_loss, 1e-9) - 1
    verdict = "similar" if gap < 0.01 else "slightly different" if gap < 0.05 else "different kinds of text"
    unseen = 100 * val[train == 0].sum() / val.sum()
    caption = (
        f"The two sets are {verdict}: a model that knows only the token frequencies of the training set has a loss of "
        f"{train_loss:.3f} there and {val_loss:.3f} on the validation set. {unseen:.3g}% of the validation tokens "
        f"never occur in the training set. The largest difference is for {shorten(token_name(tokenizer, i))}, which "
        f"occurs {count_of(val[i], 'time')} in the validation set. At its frequency in the training set, "
        f"it would occur {expected[i]:,.0f} times."
    )
    labels = "share in the training set", "share in the validation set"
    draw_panel(axis, "Training and validation sets", *labels, caption)


def main(argv: list[str] | None = None):
    cfg, _, paths = configurator.load_with_paths(ExploreConfig, argv, "[DATASET]")
    corpus = Corpus(find_data_folder(cfg.dataset, cfg.data_dir, paths=paths))
    if not has_validation(corpus.meta):
        problem = f"{corpus.name} has no validation set to compare with the training set"
        raise UserError(f"{problem}: prepare the data with --val_fraction=0.1 and another --name")
    corpus.check(1, 2**16)
    tokenizer = corpus.tokenizer()
    counts, documents, texts = {}, {}, {}
    for split in SPLITS:
        counts[split] = corpus.tokens[split].counts(2**16)
        ids = corpus.tokens[split][: cfg.most_tokens]
        limit_note = "" if len(ids) == corpus.lengths[split] else f"; decoding only the first {len(ids):,}"
        print(f"{split}: {corpus.lengths[split]:,} tokens{limit_note}")
        documents[split], unit = split_documents(ids, tokenizer)
        texts[split] = tokenizer.decode(ids[~np.isin(ids, list(tokenizer.specials.values()))].tolist())
    if corpus.meta.get("split") == "position" and corpus.lengths["train"] <= cfg.most_tokens:
        join_cut_document(documents, corpus.tokens["train"][-8:], tokenizer)
    both = counts["train"] + counts["val"]
    n_ids = max(corpus.vocab_size, int(np.flatnonzero(both)[-1]) + 1)
    text = texts["train"] + texts["val"]
    words = Counter(re.findall(r"\w+", text))
    figure = import_matplotlib_figure()(figsize=(18, 11.5), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.2, h_pad=0.15)
    axes = figure.subplots(2, 3)
    show_characters(axes[0, 0], text)
    if tokenizer.kind == CharTokenizer.kind:  # its tokens are the characters
        show_words(axes[0, 1], words)
    else:
        show_tokens(axes[0, 1], both[:n_ids], tokenizer)
    show_zipf(axes[0, 2], words)
    n_tokens = sum(min(cfg.most_tokens, corpus.lengths[split]) for split in SPLITS)
    show_documents(axes[1, 0], documents, unit, len(text) / n_tokens)
    show_compression(axes[1, 1], texts, tokenizer)
    show_drift(axes[1, 2], counts["train"][:n_ids], counts["val"][:n_ids], tokenizer)
    title = f"{corpus.name}: {both.sum():,} tokens, vocabulary of {corpus.vocab_size:,}"
    figure.suptitle(displayable(title), fontsize="x-large", parse_math=False)
    path = os.path.join(corpus.folder, PLOT_FILE)
    figure.savefig(path, dpi=100)
    print(f"picture: {path}")


if __name__ == "__main__":
    run_program(main)
