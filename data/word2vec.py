"""Train word vectors on a word-level data set, or load existing ones, for train.py --init_wte.

    python data/word2vec.py --dataset=don_word
    python data/word2vec.py --dataset=don_word --vectors=GoogleNews-vectors-negative300.bin.gz
    python train.py config/train_don_word.py --init_wte=data/don_word/word2vec.npy

Prints the nearest neighbors of some words, and writes two files next to the data. word2vec.npy has one vector per id.
word2vec.png is a map on which words with similar uses are close to each other and have the same color.

gensim trains skip-gram vectors with negative sampling (Mikolov et al., arxiv.org/abs/1310.4546) on the sentences of
the training set. The validation set is not used. All spellings of a word share a vector. --vectors reads files in
word2vec's text or binary format or in GloVe's format. A file may be compressed, or be the only file in an archive.
Requires gensim and scikit-learn: pip install -r requirements-word2vec.txt
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import importlib
from collections import Counter
from dataclasses import dataclass
from typing import Annotated

import numpy as np

import configurator
from configurator import UserError
from dongpt.log import import_matplotlib_figure
from dongpt.program import ROOT, run_program, shortest_path
from dongpt.text.bins import find_data_folder
from dongpt.text.tokenizers import WordTokenizer
from dongpt.train.data import Corpus
from dongpt.train.init_wte import all_spellings, read_vectors, save_table, vector_table

VECTORS_FILE, PLOT_FILE = "word2vec.npy", "word2vec.png"
LABEL_MARGIN = (10, 2)  # horizontal and vertical pixels between words on the map
SENTENCE_ENDS = {".", "?", "!"}
MAX_SENTENCE_WORDS = 1000  # gensim ignores all words after 10,000
# Frequent words with little meaning, which are excluded from the map.
STOP_WORDS = set(
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
    dataset: str = ""  # name of a folder under data/
    data_dir: str = ""  # path to a data folder; overrides dataset
    vectors: str = ""  # file of vectors to use instead of training new ones
    words: str = "food,horse,lady,sword,night,father,money,castle,hand,black"  # words whose neighbors are printed
    near: Annotated[int, ">=", 1] = 10  # neighbors to print per word
    near_count: Annotated[int, ">=", 1] = 10  # ignore neighbors that occur less often than this in the training set
    size: Annotated[int, ">=", 1] = 96  # dimensions of the vectors; use the model's n_embd
    window: Annotated[int, ">=", 1] = 4  # context words to predict on each side of a word
    min_count: Annotated[int, ">=", 1] = 5  # words that occur less often than this get no vector
    negative: Annotated[int, ">=", 1] = 10  # negative samples per predicted word
    sample: Annotated[float, ">=", 0] = 1e-3  # subsample words whose share of the text is larger than this
    epochs: Annotated[int, ">=", 1] = 15  # passes over the training set
    learning_rate: Annotated[float, ">", 0] = 0.025  # initial learning rate, which decays linearly
    seed: Annotated[int, ">=", 0, "<", 2**32] = 1  # the same seed gives the same vectors
    most_words: Annotated[int, ">=", 3] = 300  # number of words on the map, starting with the most frequent
    groups: Annotated[int, ">=", 1] = 24  # number of colors on the map


def import_optional(module: str):
    """Import a library that only this program needs. Raises UserError if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        requirements = shortest_path(os.path.join(ROOT, "requirements-word2vec.txt"))
        raise UserError(f"{error.name or module} is not installed: run pip install -r {requirements}") from error


def word_tokenizer(corpus: Corpus) -> WordTokenizer:
    """Return the tokenizer of a word-level corpus. Raises UserError for other corpora."""
    tokenizer = corpus.tokenizer() if corpus.tokenizer_dict["kind"] == WordTokenizer.kind else None
    if not isinstance(tokenizer, WordTokenizer):
        remedy = "prepare the text with data/don_word/prepare.py or data/prepare.py --tokenizer=word"
        kind = corpus.tokenizer_dict["kind"]
        raise UserError(f"{corpus.name} has {kind} tokens, but word vectors require word tokens: {remedy}")
    return tokenizer


def word_of_each_id(tokenizer: WordTokenizer) -> list[str]:
    """Return the lowercase word for each id, the same for all spellings, or "" for spaces and special tokens."""
    return [word.strip().lower() for word in tokenizer.words] + [""] * len(tokenizer.specials)


def read_sentences(corpus: Corpus, names: list[str]) -> list[list[str]]:
    """Return the sentences of the training set as lists of words, without spaces."""
    sentences: list[list[str]] = [[]]
    for name in (names[i] for ids in corpus.tokens["train"].chunks() for i in ids.tolist()):
        if name:
            sentences[-1].append(name)
        if name in SENTENCE_ENDS or len(sentences[-1]) == MAX_SENTENCE_WORDS:
            sentences.append([])
    return sentences if sentences[-1] else sentences[:-1]


def train_vectors(sentences: list[list[str]], cfg: Word2VecConfig) -> dict[str, np.ndarray]:
    """Train skip-gram vectors for words that occur at least min_count times. Returns {word: (size,) float32}."""
    models = import_optional("gensim.models")
    if max(Counter(word for sentence in sentences for word in sentence).values(), default=0) < cfg.min_count:
        raise UserError(
            f"no word occurs {cfg.min_count} times in the training set: lower --min_count, or use more text"
        )
    options = {key: getattr(cfg, key) for key in ("window", "min_count", "negative", "sample", "epochs", "seed")}
    # One worker: with several, the order of updates, and therefore the result, would differ from run to run.
    model = models.Word2Vec(sentences, sg=1, vector_size=cfg.size, alpha=cfg.learning_rate, workers=1, **options)
    return dict(zip(model.wv.index_to_key, model.wv.vectors))


def push_apart(centres: np.ndarray, sizes: np.ndarray, rounds: int = 300, limits=None) -> np.ndarray:
    """Move boxes with centers (n, 2) and sizes (n, 2) until none overlap, but at most `rounds` times.

    If given, limits = ((left, bottom), (right, top)) keeps the boxes inside a frame. Returns the new centers.
    """
    centres = centres.copy()
    for _ in range(rounds):
        offsets = centres[:, None] - centres[None]  # (n, n, 2)
        overlap = (sizes[:, None] + sizes[None]) / 2 - np.abs(offsets)
        overlaps = (overlap > 0).all(2) & ~np.eye(len(centres), dtype=bool)
        if not overlaps.any():
            break
        is_horizontal = overlap[..., 1] * 2 >= overlap[..., 0]  # prefer vertical moves, since words are wide
        axis = np.stack([is_horizontal, ~is_horizontal], axis=2)
        order = np.sign(np.arange(len(centres))[:, None] - np.arange(len(centres)))[..., None]
        push_direction = np.where(offsets == 0, order, np.sign(offsets))
        centres += 0.3 * (overlap * push_direction * axis * overlaps[..., None]).sum(1)
        if limits is not None:
            centres = np.clip(centres, limits[0] + sizes / 2, limits[1] - sizes / 2)
    return centres


def draw_map(
    path: str, title: str, words: list[str], unit_vectors: np.ndarray, sizes: np.ndarray, groups: int, seed: int
):
    """Draw words at the given font sizes (n,), using t-SNE for the positions and k-means clustering for the colors."""
    manifold, cluster = import_optional("sklearn.manifold"), import_optional("sklearn.cluster")
    perplexity = max(1.0, min(15.0, (len(words) - 1) / 3))
    tsne = manifold.TSNE(2, perplexity=perplexity, metric="cosine", init="random", random_state=seed)
    positions = tsne.fit_transform(unit_vectors.astype(np.float64))
    group_of = cluster.KMeans(min(groups, len(words)), n_init=10, random_state=seed).fit_predict(positions)
    figure = import_matplotlib_figure()(figsize=(17, 12), layout="constrained")
    from matplotlib import colormaps

    axis = figure.subplots()
    colours = [colormaps[name](i) for name in ("Dark2", "tab10", "Set2") for i in range(colormaps[name].N)]
    axis.set(title=title, xticks=[], yticks=[], xmargin=0.03, ymargin=0.03)
    similarity = unit_vectors @ unit_vectors.T - 2 * np.eye(len(words))
    first, second = divmod(int(similarity.argmax()), len(words))
    caption = (
        "Words that occur in similar contexts are close to each other and have the same color. Frequent words are "
        f"larger.\nThe two most similar words are {words[first]} and {words[second]} (cosine similarity "
        f"{similarity.max():.2f}). If most groups have no common topic, the text is too short for good vectors."
    )
    print(caption.replace("\n", " "))
    axis.set_xlabel(caption, parse_math=False)
    axis.scatter(*positions.T, s=0)
    labels = [axis.text(*xy, word, ha="center", va="center", parse_math=False) for word, xy in zip(words, positions)]
    for label, group, size in zip(labels, group_of, sizes):
        label.set(color=colours[group % len(colours)], size=size)
    figure.draw_without_rendering()  # text has no size until it is rendered
    boxes = np.array([label.get_window_extent().get_points() for label in labels])  # (n, lower left and upper right, 2)
    frame = axis.get_window_extent().get_points()
    centres = push_apart(boxes.mean(1), boxes[:, 1] - boxes[:, 0] + LABEL_MARGIN, limits=frame)
    for label, position in zip(labels, axis.transData.inverted().transform(centres)):
        label.set_position(position)
    figure.savefig(path, dpi=100)


def main(argv: list[str] | None = None):
    cfg, given, paths = configurator.load_with_paths(Word2VecConfig, argv, "[DATASET]")
    corpus = Corpus(find_data_folder(cfg.dataset, cfg.data_dir, paths=paths))
    for module in ["sklearn"] if cfg.vectors else ["gensim", "sklearn"]:  # fail before doing any work
        import_optional(module)
    tokenizer = word_tokenizer(corpus)
    names = word_of_each_id(tokenizer)
    if cfg.vectors:
        vectors = read_vectors(cfg.vectors, all_spellings(tokenizer))
        width = len(next(iter(vectors.values())))
        if given.get("size", width) != width:
            remedy = f"remove --size={cfg.size}; train.py shortens the vectors if necessary"
            raise UserError(f"{cfg.vectors} has vectors of {width} dimensions: {remedy}")
    else:
        vectors = train_vectors(read_sentences(corpus, names), cfg)
    table = vector_table(tokenizer, vectors)
    has_vector = table.any(1)
    if not has_vector.any():
        raise UserError(f"all vectors from {cfg.vectors or 'training'} are zero: use other vectors")
    id_counts = corpus.tokens["train"].counts(2**16)[: len(table)]
    counts: Counter[str] = Counter()  # sums over all spellings of a word
    for name, n in zip(names, id_counts.tolist()):
        counts[name] += n
    share = 100 * id_counts[has_vector].sum() / id_counts.sum()
    print(
        f"{has_vector.sum():,} of {len(table):,} vocabulary entries have a vector with {table.shape[1]} dimensions; "
        f"they cover {share:.1f} % of the training tokens"
    )
    path = os.path.join(corpus.folder, VECTORS_FILE)
    save_table(path, table)
    print(f"wrote {path}")
    vector_of = {names[i]: table[i] for i in np.flatnonzero(has_vector)}
    words = sorted((word for word in vector_of if any(map(str.isalpha, word))), key=lambda word: (-counts[word], word))
    shown = [i for i, word in enumerate(words) if word not in STOP_WORDS][: cfg.most_words]
    if len(shown) < 3:
        print("fewer than 3 meaningful words have a vector, which is too few for neighbors and a map")
        return
    unit_vectors = np.array([vector_of[word] for word in words])
    unit_vectors -= unit_vectors.mean(0)
    unit_vectors /= np.maximum(np.linalg.norm(unit_vectors, axis=1, keepdims=True), 1e-12)
    print_nearest(cfg, words, unit_vectors, counts)
    heights = np.array([max(counts[words[i]], 1) for i in shown]) ** 0.25
    path = os.path.join(corpus.folder, PLOT_FILE)
    title = f"{corpus.name}: the {len(shown):,} most frequent words, excluding stop words"
    sizes = 9 + 13 * heights / heights.max()
    draw_map(path, title, [words[i] for i in shown], unit_vectors[shown], sizes, cfg.groups, cfg.seed)
    print(f"picture: {path}")


def print_nearest(cfg: Word2VecConfig, words: list[str], unit_vectors: np.ndarray, counts: Counter):
    """Print the nearest neighbors of cfg.words. unit_vectors has the shape (number of words, dimensions)."""
    asked = [word for word in (word.strip().lower() for word in cfg.words.split(",")) if word]
    frequent = [i for i, word in enumerate(words) if counts[word] >= cfg.near_count or word in asked]
    words, unit_vectors = [words[i] for i in frequent], unit_vectors[frequent]
    for word in asked:
        if word in words:
            cosines = unit_vectors @ unit_vectors[words.index(word)]
            order = [i for i in np.argsort(-cosines, kind="stable") if words[i] != word][: cfg.near]
            print(f"{word}:", ", ".join(f"{words[i]} {cosines[i]:.2f}" for i in order))
        else:
            print(f"{word}: not in the training set or too rare")


if __name__ == "__main__":
    run_program(main)
