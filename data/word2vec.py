"""Vectors of words by what stands around them: trains them on a corpus of words, or reads given ones.

    python data/word2vec.py --dataset=don_word
    python data/word2vec.py --dataset=don_word --vectors=GoogleNews-vectors-negative300.bin.gz
    python train.py config/train_don_word.py --init_wte=data/don_word/word2vec.npy

Prints the nearest words of a few, and writes two files beside the bins: word2vec.npy, a row for each id, for train.py,
and word2vec.png, in which words that are used alike stand together and have a colour.

Training is skip-gram with negative samples (Mikolov et al., arxiv.org/abs/1310.4546) by gensim, on the sentences of
train; validation is never looked at. All spellings of a word, with a space before it or with a capital, count as one.
Given vectors may be in word2vec's text or binary format or in GloVe's, also packed with gzip, bz2 or xz.
Needs gensim and scikit-learn: pip install -r requirements-word2vec.txt
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import importlib
from collections import Counter
from dataclasses import dataclass
from typing import Iterator

import numpy as np

import configurator
from configurator import UserError
from dongpt.program import ROOT, run_program
from dongpt.text.tokenizers import WordTokenizer
from dongpt.train.data import Corpus, find_folder
from dongpt.train.init_wte import read_vectors, save_table, vector_table, wanted_spellings

VECTORS, PICTURE = "word2vec.npy", "word2vec.png"
MARGIN = (10, 2)  # pixels between the words of the picture
ENDS = {".", "?", "!"}  # of sentences
LONGEST = 1000  # words in a sentence that are told gensim at a time; it leaves out what comes behind 10,000
# Words that stand everywhere and mean little: the picture shows none of them.
COMMON = set(
    """
a about after again all also am an and any are as at be because been before being but by can could did do does done
for from had has hast hath have having he her here hers him his how i if in into is it its let like ll may me might
more most much must my no nor not now o of off on one only or other our out over own re s said say shall she should
so some such t than that the thee their them then there these they this those thou though thy to too under until
unto up upon us very was we well were what when where which while who whom whose why will wilt with without would ye
yet you your
""".split()
)


@dataclass(frozen=True)
class Word2VecConfig:
    dataset: str = ""  # a folder under data/
    data_dir: str = ""  # a data folder anywhere; replaces dataset
    vectors: str = ""  # a file of vectors to read; without it they are trained
    words: str = "food,horse,lady,sword,night,father,money,castle,hand,black"  # whose nearest words are printed
    near: int = 10  # how many of them
    near_count: int = 10  # only words that train has so often are named: of a rarer one a vector says little
    size: int = 96  # numbers in a vector: n_embd of the model that begins with them
    window: int = 4  # words on each side that a word is to predict
    min_count: int = 5  # rarer words have no vector
    negative: int = 10  # words that do not stand there, for each that does
    sample: float = 1e-3  # from which share of the text on a word is looked at less often
    epochs: int = 15  # times that the text is read
    learning_rate: float = 0.025  # at the start; it falls in a line
    seed: int = 1  # the same gives the same vectors
    most_words: int = 300  # in the picture, the most frequent ones
    groups: int = 24  # colours in the picture

    def __post_init__(self):
        if not (self.dataset or self.data_dir):
            raise UserError("which data? pass --dataset=NAME of a folder under data/, or --data_dir=DIR")
        least = dict(
            near=1, near_count=1, size=1, window=1, min_count=1, negative=1, epochs=1, seed=0, most_words=3, groups=1
        )
        if self.seed >= 2**32:
            raise UserError(f"seed={self.seed} must be below 2 ** 32")
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise UserError(f"{name}={getattr(self, name)} must be at least {bound}")
        if not (self.learning_rate > 0 and self.sample >= 0):
            raise UserError(f"learning_rate={self.learning_rate} must be above 0, sample={self.sample} at least 0")


def optional(module: str):
    """A library that only this program needs. Raises UserError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        requirements = os.path.relpath(os.path.join(ROOT, "requirements-word2vec.txt"))
        raise UserError(f"{error.name or module} is not installed: pip install -r {requirements}") from error


def word_tokenizer(corpus: Corpus) -> WordTokenizer:
    """The tokenizer of a corpus of words. Raises UserError for any other."""
    if corpus.tokenizer_dict["kind"] != WordTokenizer.kind:
        raise UserError(
            f"{corpus.name} is a corpus of {corpus.tokenizer_dict['kind']}: vectors are those of words, "
            f"prepare the text with data/don_word/prepare.py or data/prepare.py --tokenizer=word"
        )
    return corpus.tokenizer()


def common_names(tokenizer: WordTokenizer) -> list[str]:
    """What each id counts as, the same for all spellings of a word; "" for blanks and special tokens."""
    return [word.strip().lower() for word in tokenizer.words] + [""] * len(tokenizer.specials)


class Sentences:
    """The sentences of train as lists of words, without blanks; they can be read again and again."""

    def __init__(self, corpus: Corpus, names: list[str]):
        self.corpus, self.names = corpus, names

    def __iter__(self) -> Iterator[list[str]]:
        tokens, sentence = self.corpus.tokens("train"), []
        for start in range(0, len(tokens), 2**16):
            for i in tokens[start : start + 2**16].tolist():
                if name := self.names[i]:
                    sentence.append(name)
                if name in ENDS or len(sentence) == LONGEST:
                    yield sentence
                    sentence = []
        if sentence:
            yield sentence


def train_vectors(sentences: Sentences, cfg: Word2VecConfig) -> dict[str, np.ndarray]:
    """Skip-gram vectors of the words that occur min_count times, {word: (size,) float32}."""
    models = optional("gensim.models")
    if max(Counter(word for sentence in sentences for word in sentence).values(), default=0) < cfg.min_count:
        raise UserError(f"no word of train occurs {cfg.min_count} times: lower --min_count, or take more text")
    # one worker: with several the order of updates, and with it every number, changes from run to run
    model = models.Word2Vec(
        sentences,
        sg=1,
        vector_size=cfg.size,
        window=cfg.window,
        min_count=cfg.min_count,
        negative=cfg.negative,
        sample=cfg.sample,
        epochs=cfg.epochs,
        alpha=cfg.learning_rate,
        seed=cfg.seed,
        workers=1,
    )
    return {word: model.wv.vectors[i] for i, word in enumerate(model.wv.index_to_key)}


def counts_of(tokens: np.ndarray, names: list[str]) -> Counter:
    """How often each word occurs, all spellings together, by how often each id does."""
    counts = Counter()
    for name, n in zip(names, tokens.tolist()):
        counts[name] += n
    del counts[""]
    return counts


def directions_of(rows: np.ndarray) -> np.ndarray:
    """Where rows (n, width) point to from their mean, which all of them share: of length 1 each."""
    rows = rows - rows.mean(0)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def nearest(word: str, words: list[str], directions: np.ndarray, n: int) -> list[tuple[str, float]]:
    """The n words whose vectors point most nearly where word's does, with the cosine; directions (n words, width)."""
    cosines = directions @ directions[words.index(word)]
    order = np.argsort(-cosines, kind="stable")
    return [(words[i], float(cosines[i])) for i in order if words[i] != word][:n]


def part(centres: np.ndarray, extents: np.ndarray, rounds: int = 300) -> np.ndarray:
    """centres (n, 2) of boxes (n, 2) pushed apart, step by step, until none covers another or the rounds are over."""
    centres = centres.copy()
    for _ in range(rounds):
        apart = centres[:, None] - centres[None]  # (n, n, 2)
        overlap = (extents[:, None] + extents[None]) / 2 - np.abs(apart)
        covers = (overlap > 0).all(2) & ~np.eye(len(centres), dtype=bool)
        if not covers.any():
            break
        shorter = overlap[..., 1] * 2 < overlap[..., 0]  # rather up and down than to the side: words are wide
        axis = np.stack([~shorter, shorter], axis=2)
        way = np.where(
            apart == 0, np.sign(np.arange(len(centres))[:, None] - np.arange(len(centres)))[..., None], np.sign(apart)
        )
        centres += 0.3 * (overlap * way * axis * covers[..., None]).sum(1)
    return centres


def draw(path: str, title: str, words: list[str], directions: np.ndarray, sizes: np.ndarray, groups: int, seed: int):
    """Draw words, in letters of sizes (n,), where t-SNE puts them, groups of k-means there in colours, to a PNG."""
    manifold, cluster = optional("sklearn.manifold"), optional("sklearn.cluster")
    perplexity = max(1.0, min(15.0, (len(words) - 1) / 3))
    places = manifold.TSNE(2, perplexity=perplexity, metric="cosine", init="random", random_state=seed).fit_transform(
        directions.astype(np.float64)
    )
    group_of = cluster.KMeans(min(groups, len(words)), n_init=10, random_state=seed).fit_predict(places)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(17, 12), layout="constrained")
    colours = [colour for i in (0, 2, 1) for colour in plt.get_cmap(("Dark2", "Set2", "tab10")[i]).colors]
    axis.set(title=title, xticks=[], yticks=[])
    axis.scatter(*places.T, s=0)
    axis.margins(0.03)
    labels = [
        axis.text(
            *place, word, color=colours[group % len(colours)], size=size, ha="center", va="center", parse_math=False
        )
        for word, place, group, size in zip(words, places, group_of, sizes)
    ]
    figure.canvas.draw()  # only then texts have a size
    boxes = np.array([label.get_window_extent().get_points() for label in labels])  # (n, lower left and upper right, 2)
    centres = part(boxes.mean(1), boxes[:, 1] - boxes[:, 0] + MARGIN)
    for label, place in zip(labels, axis.transData.inverted().transform(centres)):
        label.set_position(place)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(argv: list[str] | None = None):
    cfg, given = configurator.load(Word2VecConfig, argv)
    needed = ["sklearn"] if cfg.vectors else ["gensim", "sklearn"]
    for module in needed:  # before the work that would be lost
        optional(module)
    corpus = Corpus(find_folder(cfg.dataset, cfg.data_dir))
    tokenizer = word_tokenizer(corpus)
    names = common_names(tokenizer)
    if cfg.vectors:
        found = read_vectors(cfg.vectors, wanted_spellings(tokenizer))
        width = len(next(iter(found.values())))
        if given.get("size", width) != width:
            raise UserError(
                f"{cfg.vectors} has vectors of {width} numbers: leave --size={cfg.size} away, train.py "
                f"makes them narrower by itself"
            )
    else:
        found = train_vectors(Sentences(corpus, names), cfg)
    rows = vector_table(tokenizer, found)
    if not rows.any():
        raise UserError(f"{cfg.vectors or 'training'} gives nothing but zeros: take another file of vectors")
    tokens = sum(np.bincount(ids, minlength=2**16) for ids in corpus.chunks("train"))[: len(rows)]
    has, counts = rows.any(1), counts_of(tokens, names)
    print(
        f"{has.sum():,} of {len(rows):,} entries of the vocabulary have a vector of {rows.shape[1]} numbers, "
        f"{100 * tokens[has].sum() / tokens.sum():.1f} % of train's tokens"
    )
    path = os.path.join(corpus.folder, VECTORS)
    save_table(path, rows)
    print(f"written to {path}")
    vector_of = {names[i]: rows[i] for i in np.flatnonzero(has)}
    words = sorted((word for word in vector_of if any(map(str.isalpha, word))), key=lambda word: (-counts[word], word))
    shown = [i for i, word in enumerate(words) if word not in COMMON][: cfg.most_words]
    if len(shown) < 3:
        print("fewer than 3 words of meaning have a vector: there is nothing to compare or to draw")
        return
    directions = directions_of(np.array([vector_of[word] for word in words]))
    tell_nearest(cfg, words, directions, counts)
    heights = np.array([max(counts[words[i]], 1) for i in shown]) ** 0.25
    path = os.path.join(corpus.folder, PICTURE)
    draw(
        path,
        f"{corpus.name}: its {len(shown):,} most frequent words of meaning, near those that are used alike",
        [words[i] for i in shown],
        directions[shown],
        9 + 13 * heights / heights.max(),
        cfg.groups,
        cfg.seed,
    )
    print(f"drawn to {path}")


def tell_nearest(cfg: Word2VecConfig, words: list[str], directions: np.ndarray, counts: Counter):
    """Print the nearest words of cfg.words."""
    wanted = {word.strip().lower() for word in cfg.words.split(",")}
    frequent = [i for i, word in enumerate(words) if counts[word] >= cfg.near_count or word in wanted]
    words, directions = [words[i] for i in frequent], directions[frequent]
    for word in filter(None, (word.strip().lower() for word in cfg.words.split(","))):
        if word in words:
            print(
                f"{word}:",
                ", ".join(f"{other} {cosine:.2f}" for other, cosine in nearest(word, words, directions, cfg.near)),
            )
        else:
            print(f"{word}: has no vector")


if __name__ == "__main__":
    run_program(main)
