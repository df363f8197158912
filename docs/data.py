"""Draw docs/data.png, which shows the files of a small corpus, the windows of two epochs, and the predicted tokens.

    python docs/data.py

The figure shows actual output of dongpt/ for a corpus of 123 tokens.
"""

import os
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np

from dongpt.program import run_program
from dongpt.text.bins import BinWriter, EncodedText
from dongpt.text.tokenizers import END, CharTokenizer
from dongpt.train.data import Corpus

BLOCK_SIZE, BATCH_SIZE, PROCESSES, SEED, SHARD = 8, 2, 2, 1337, 48
DOCUMENTS = (
    "in a village of la mancha",
    "there lived one of those gentlemen",
    "lean hack",
    "and a greyhound for coursing",
    "an olla of rather more",
)
ANSWER = "what is his name?|quixote"  # only the part after the bar contributes to the loss


def corpus_in(folder: str) -> Corpus:
    """Prepare DOCUMENTS as a sharded corpus."""
    tokenizer = CharTokenizer.from_text("".join((*DOCUMENTS, ANSWER)))
    tokenizer = CharTokenizer(tokenizer.characters, [END])
    with BinWriter(folder, tokenizer, shard_tokens=SHARD) as writer:
        for text in DOCUMENTS:
            ids = tokenizer.encode_parts([(text, True)], tokenizer.end_id)
            writer.add("train", EncodedText(ids, len(text), len(text)))
        writer.add("val", EncodedText(tokenizer.encode_array(ANSWER), len(ANSWER), len(ANSWER)))
        writer.finish({})
    return Corpus(folder)


def draw_files(axes, corpus: Corpus, ids: np.ndarray, colours):
    """Draw the tokens in their files, with one color per document."""
    tokenizer, document = corpus.tokenizer(), 0
    for place, i in enumerate(ids.tolist()):
        ends = i == tokenizer.end_id
        cell(
            axes,
            place,
            0,
            "E" if ends else tokenizer.decode([i]),
            "black" if ends else colours[document % len(colours)],
            "white" if ends else "black",
        )
        document += ends
    place = 0
    for shard in corpus.shards:
        axes.plot([place, place], [-0.25, 1.75], color="black", linewidth=2)
        axes.text(place + 0.4, 1.25, f"{shard['file']}: {shard['tokens']} tokens", fontsize=11)
        place += shard["tokens"]
    axes.plot([place, place], [-0.25, 1.75], color="black", linewidth=2)


def draw_epoch(axes, corpus: Corpus, epoch: int, colours):
    """Draw an epoch's windows at their positions, numbered in training order, with one color per process."""
    n = corpus.windows_per_epoch(BLOCK_SIZE)
    starts = corpus.window_starts(epoch * n, n, BLOCK_SIZE, SEED)
    for number, start in enumerate(starts.tolist()):
        process = (epoch * n + number) // BATCH_SIZE % PROCESSES
        cell(axes, start, 0, str(number), colours[process], width=BLOCK_SIZE)


def draw_batch(axes, corpus: Corpus, place: float):
    """Draw x and y for one window, and a question and answer with their mask."""
    tokenizer = corpus.tokenizer()
    question, answer = ANSWER.split("|")
    x, y = corpus.train_batch(0, 1, BLOCK_SIZE, SEED, corpus.vocab_size)
    for row, ids in ((2.4, x), (1.2, y)):
        for i, token in enumerate(ids[0].tolist()):
            cell(
                axes,
                place + i,
                row,
                "E" if token == tokenizer.end_id else tokenizer.decode([token]),
                "white" if row == 2.4 else "#ffd08a",
            )
    axes.text(place - 0.5, 2.7, "x", ha="right", fontsize=12)
    axes.text(place - 0.5, 1.5, "y", ha="right", fontsize=12)
    text, place = question + answer, place + BLOCK_SIZE + 12
    for i, letter in enumerate(text):
        cell(axes, place + i, 2.4, letter, "white")
        cell(axes, place + i, 1.2, "1" if i >= len(question) else "0", "#ffd08a" if i >= len(question) else "white")
    axes.text(place - 0.5, 2.7, "tokens", ha="right", fontsize=12)
    axes.text(place - 0.5, 1.5, "mask", ha="right", fontsize=12)


def cell(axes, left: float, bottom: float, text: str, colour, ink: str = "black", width: float = 1):
    """Draw a box with a text label."""
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((left, bottom), width, 1, facecolor=colour, edgecolor="grey", linewidth=0.5))
    axes.text(
        left + width / 2, bottom + 0.47, text, ha="center", va="center", fontsize=10, color=ink, family="monospace"
    )


def main():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    documents, processes = ("#cfe8ff", "#d8f3d0", "#ffe3cc", "#ead9ff", "#fff3b8"), ("#8ecae6", "#ffb703")
    with tempfile.TemporaryDirectory() as folder:
        corpus = corpus_in(folder)
        ids = corpus.tokens["train"][:]
        figure, rows = pyplot.subplots(4, 1, figsize=(15, 6), height_ratios=(2, 1.3, 1.3, 2.4), layout="constrained")
        draw_files(rows[0], corpus, ids, documents)
        for epoch in (0, 1):
            draw_epoch(rows[1 + epoch], corpus, epoch, processes)
        draw_batch(rows[3], corpus, 3)
    titles = ["Files: shards contain one document after another, and each document ends with <|endoftext|> (E)"]
    titles += [
        f"Epoch {epoch}: windows of block_size={BLOCK_SIZE} tokens from a random offset, numbered in training order. "
        f"Blue: process 0. Yellow: process 1. (batch_size={BATCH_SIZE})"
        for epoch in (0, 1)
    ]
    titles.append(
        "Left: in each window, the model reads x and predicts y.  Right: only tokens with mask 1 contribute to the loss"
    )
    for axes, title in zip(rows, titles):
        axes.set_title(title, loc="left", fontsize=12)
    for axes in rows:
        axes.set_xlim(-0.5, len(ids) + 0.5)
        axes.set_ylim(*(0.9, 3.6) if axes is rows[3] else (-0.3, 1.9) if axes is rows[0] else (-0.3, 1.1))
        axes.axis("off")
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data.png")
    figure.savefig(path, dpi=110)
    print(f"drew {path}")


if __name__ == "__main__":
    run_program(main)
