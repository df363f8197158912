"""What a prepared corpus looks like, in words and figures."""

import numpy as np

from dongpt.text.bins import PreparedData, open_data
from dongpt.text.tokenizers import UNKNOWN, CharTokenizer, Tokenizer

NUM_SYMBOLS = 10  # printed of the most frequent and of the rarest


def token_name(tokenizer: Tokenizer, i: int) -> str:
    """How an id is shown: its text in quotes, bytes that are no text as such, or the name of a special token."""
    names = {number: name for name, number in tokenizer.specials.items()}
    if i in names:
        return names[i]
    text = tokenizer.decode([i])
    return repr(text) if "\ufffd" not in text else f"id {i}"


def report(prepared: PreparedData):
    """Print counts, the commonest and the rarest symbols, and whether the text can be read back."""
    meta, tokenizer, counts = prepared.meta, prepared.tokenizer, {}
    for split, ids in open_data(prepared.folder)[1].items():
        counts[split] = ids.counts(meta["vocab_size"])
    characters, tokens = sum(meta["characters"].values()), sum(meta["tokens"].values())
    split_methods = {
        "position": "by position: the end of the text is for validation",
        "documents": "by whole documents, equal ones on the same side",
        "drawn": f"by whole documents, drawn with seed {meta.get('seed')}",
    }
    print(f"documents: {meta['documents']:,}; split {split_methods[meta['split']]}")
    if meta.get("left_out"):
        print(f"left out: {meta['left_out']:,} records with nothing but blanks in a field")
    print(f"length of dataset in characters: {characters:,}")
    if isinstance(tokenizer, CharTokenizer):
        print(f"all the unique characters: {tokenizer.characters!r}")
    print(f"vocab size: {meta['vocab_size']:,}")
    shards = len(meta.get("shards", {}).get("train", ()))
    for split, count in meta["tokens"].items():
        print(f"{split} has {count:,} tokens" + (f" in {shards} shards" if shards and split == "train" else ""))
    share = 100 * meta["characters"]["val"] / characters
    print(f"characters per token: {characters / tokens:.2f}; for validation {share:.3g} % of the characters")
    totals = counts["train"] + counts["val"]
    order = np.argsort(-totals, kind="stable")
    order = order[: np.count_nonzero(totals)]
    print("most frequent:", ", ".join(f"{token_name(tokenizer, i)} {totals[i]:,}" for i in order[:NUM_SYMBOLS]))
    print("rarest:", ", ".join(f"{token_name(tokenizer, i)} {totals[i]:,}" for i in order[: -NUM_SYMBOLS - 1 : -1]))
    unseen_share = counts["val"][counts["train"] == 0].sum() / meta["tokens"]["val"]
    print(f"validation tokens that never occur in training: {100 * unseen_share:.3f} %")
    unknown = int(totals[tokenizer.specials[UNKNOWN]]) if UNKNOWN in tokenizer.specials else 0
    if unknown:
        print(f"{UNKNOWN} stands for {unknown:,} words")
    decoded = tokenizer.decode(tokenizer.encode_array(prepared.sample).tolist())
    print(f"a piece of it: {prepared.sample[:60]!r}")
    if decoded == prepared.sample and not unknown and not prepared.is_lossy:
        print("ids give the same text back")
    else:
        print(f"ids do not give the same text back everywhere: --lower and {UNKNOWN} lose something")
    print(f"written to {prepared.folder}")
