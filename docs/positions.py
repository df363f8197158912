"""Draw docs/positions.png, which shows the effect of each position scheme on attention as computed by model.py.

    python docs/positions.py

Trains one small model per scheme on data/python_docs (no download), and computes the attention scores of its first
layer for identical tokens, so that the scores depend only on position. This takes about two minutes.
"""

import math
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

from dongpt import runtime
from dongpt.program import run_program
from dongpt.text.bins import find_data_folder
from dongpt.train.data import Corpus
from dongpt.train.optim import OptimConfig, lower_farthest_bias, make_optimizer, set_learning_rate
from model import GPT, GPTConfig, rotate

SCHEMES = ("default", "rope", "relative", "alibi", "default+relative")
BLOCK_SIZE, BATCH_SIZE, STEPS, LEARNING_RATE, SEED = 64, 16, 800, 3e-3, 1337
DEEPEST = -6.0  # nats relative to a query's best score; lower scores are clipped to this value
HEAD_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito's palette for color-blind readers


def trained(scheme: str, corpus: Corpus) -> GPT:
    """Train a small model with pos_embd=scheme for STEPS updates."""
    runtime.seed_everything(SEED)
    model = GPT(
        GPTConfig(
            block_size=BLOCK_SIZE,
            vocab_size=corpus.model_vocab_size,
            n_layer=2,
            n_head=4,
            n_embd=64,
            bias=False,
            pos_embd=scheme,
        )
    )
    optimizer = make_optimizer(model, OptimConfig(learning_rate=LEARNING_RATE, beta2=0.99), "cpu")
    for step in range(STEPS):
        set_learning_rate(optimizer, LEARNING_RATE * (1 - step / STEPS))  # to 0, so that the last updates add no noise
        x, y = corpus.train_batch(step * BATCH_SIZE, BATCH_SIZE, BLOCK_SIZE, SEED, corpus.model_vocab_size)
        loss = model(x, y)[1]
        loss.backward()
        optimizer.step()
        if scheme == "relative":
            lower_farthest_bias(model)
        optimizer.zero_grad()
    print(f"{scheme}: loss {loss.item():.3f} after {STEPS} updates")
    return model.eval()


@torch.no_grad()
def scores_by_position(model: GPT, corpus: Corpus) -> torch.Tensor:
    """Return the first layer's attention scores (nh, T, T) for T copies of the average token. Masked scores are -inf.

    T is twice block_size, or block_size for schemes without positions beyond it. Each query's best score is 0.
    """
    config = model.config
    T = BLOCK_SIZE if config.has_wpe else 2 * BLOCK_SIZE
    positions, head_size = torch.arange(T), config.n_embd // config.n_head
    tokens = torch.from_numpy(corpus.tokens["val"][: 2**14].astype("int64"))
    x = model.transformer.wte(tokens).mean(0).expand(1, T, -1)
    if config.has_wpe:
        x = x + model.transformer.wpe(positions)
    block, where = model.transformer.h[0], model.attention_inputs(positions)
    q, k, _ = (t.view(1, T, config.n_head, head_size) for t in block.attn.c_attn(block.ln_1(x)).split(config.n_embd, 2))
    if where.rotation is not None:
        q, k = rotate(q, k, *where.rotation)
    scores = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1))[0] / math.sqrt(head_size)
    if where.bias is not None:
        scores = scores + where.bias[0]
    scores = scores.masked_fill(positions[:, None] < positions, -math.inf)
    return scores - scores.amax(-1, keepdim=True)


def draw(scores: dict[str, torch.Tensor], path: str):
    """Draw one head's scores as a heat map above a plot of all heads by distance, and save the figure to path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2, len(scores), figsize=(3.2 * len(scores), 6.4), height_ratios=(3, 2), layout="constrained"
    )
    for column, (scheme, heads) in enumerate(scores.items()):
        T = heads.shape[-1]
        last = heads[:, -1].flip(-1)  # (nh, T): scores of the last token, by distance
        head = last.clamp(min=DEEPEST).std(-1).argmax()  # the head that depends most on position
        image = axes[0, column].imshow(
            heads[head].clamp(min=DEEPEST).where(heads[head].isfinite(), math.nan),
            vmin=DEEPEST,
            vmax=0,
            extent=(0, T, T, 0),
        )
        axes[0, column].set(title=scheme, xlim=(0, 2 * BLOCK_SIZE), ylim=(2 * BLOCK_SIZE, 0), xlabel="key")
        for number, (line, colour) in enumerate(zip(last.clamp(min=DEEPEST), HEAD_COLOURS)):
            axes[1, column].plot(line, color=colour, linewidth=1.5, label=f"head {number}")
        axes[1, column].set(xlim=(0, 2 * BLOCK_SIZE), ylim=(DEEPEST * 1.05, 0.3), xlabel="distance")
        if T == BLOCK_SIZE:
            axes[0, column].text(
                1.5 * BLOCK_SIZE,
                1.5 * BLOCK_SIZE,
                "no positions\nbeyond\nblock_size",
                ha="center",
                va="center",
                fontsize=9,
            )
        for row in (0, 1):
            axes[row, column].axvline(BLOCK_SIZE, color="grey", linestyle=":", linewidth=1)
        axes[0, column].axhline(BLOCK_SIZE, color="grey", linestyle=":", linewidth=1)
    axes[1, -1].legend(fontsize=9, loc="upper right")
    figure.suptitle(
        f"Attention scores by position. Top: one head, all queries and keys. Bottom: all heads, the last query. "
        f"Dotted: block_size={BLOCK_SIZE}"
    )
    axes[0, 0].set_ylabel("query")
    axes[1, 0].set_ylabel("score below the best (nats)")
    figure.colorbar(image, ax=axes[0, -1], label="score below the best (nats)")
    figure.savefig(path, dpi=80)


def main():
    rt = runtime.start("cpu", "float32")
    corpus = Corpus(find_data_folder("python_docs", "", rt))
    path = os.path.join(runtime.ROOT, "docs", "positions.png")
    draw({scheme: scores_by_position(trained(scheme, corpus), corpus) for scheme in SCHEMES}, path)
    print(f"drew {path}")


if __name__ == "__main__":
    run_program(main)
