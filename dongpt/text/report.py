"""Print a summary of a prepared data folder: five lines about the text, its tokens and its two splits."""

import numpy as np

from dongpt.program import shortest_path
from dongpt.text.bins import PreparedData, open_data
from dongpt.text.compressed import file_suffixes
from dongpt.text.documents import CSV_DELIMITERS, RECORD_SUFFIXES, Files
from dongpt.text.hub import HubText
from dongpt.text.tokenizers import UNKNOWN, CharTokenizer, Tokenizer, WordTokenizer

NUM_SYMBOLS = 5  # how many of the most frequent and of the rarest tokens to print


def token_name(tokenizer: Tokenizer, i: int) -> str:
    """Return a token's text in quotes, the name of a special token, or "id 200" for bytes that are not valid UTF-8."""
    names = {number: name for name, number in tokenizer.specials.items()}
    if i in names:
        return names[i]
    text = tokenizer.decode([i])
    return repr(text) if "\ufffd" not in text else f"id {i}"


def count_of(n: int, noun: str) -> str:
    """Return a number with its noun, such as "1 file" or "1,234 files"."""
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def describe_records(documents: Files | HubText) -> str:
    """Describe in parentheses how documents relate to the files' rows or records. Returns "" if there are none."""
    suffixes = {".parquet"} if isinstance(documents, HubText) else {file_suffixes(p)[0] for p in documents.paths}
    if not suffixes & {*RECORD_SUFFIXES}:
        return ""
    is_table = suffixes <= {".parquet", *CSV_DELIMITERS}
    row, column = ("row", "column") if is_table else ("record", "field")
    row = row if suffixes <= {*RECORD_SUFFIXES} else f"file or {row}"
    is_document = documents.document == "file" and not documents.separator
    return f" ({f'one per {row}; ' * is_document}only the {column} {documents.field!r} is used)"


def report(prepared: PreparedData, documents: Files | HubText | None = None):
    """Print the source, vocabulary and splits, the folder, and whether the tokens decode to the original text.

    If the documents are given, the first line also says which part of each row or record they contain.
    """
    meta, tokenizer, counts = prepared.meta, prepared.tokenizer, {}
    for split, ids in open_data(prepared.folder)[1].items():
        counts[split] = ids.counts(meta["vocab_size"])
    characters, tokens = sum(meta["characters"].values()), meta["tokens"]
    skipped = ""
    if n_skipped := meta.get("left_out"):
        records = f"{count_of(n_skipped, 'record')} with an empty field"
        records = count_of(n_skipped, "broken record") if "template" in meta["tokenizer"] else records
        skipped = "; skipped " + (records if "predicted_bytes" in meta else count_of(n_skipped, "blank document"))
    n_documents = count_of(meta["documents"], "document") + (describe_records(documents) if documents else "")
    print(f"text: {meta.get('source') or 'unnamed'}, {count_of(characters, 'character')} in {n_documents}{skipped}")

    totals = counts["train"] + counts["val"]
    order = np.argsort(-totals, kind="stable")
    order = order[: np.count_nonzero(totals)]
    frequent, rare = (
        ", ".join(f"{token_name(tokenizer, i)} {totals[i]:,}" for i in ids)
        for ids in (order[:NUM_SYMBOLS], order[: -NUM_SYMBOLS - 1 : -1])
    )
    unit = {CharTokenizer.kind: "character", WordTokenizer.kind: "word"}.get(tokenizer.kind, "BPE token")
    n_special = len(tokenizer.specials)
    names = ", ".join([*tokenizer.specials][:NUM_SYMBOLS])
    special = f" and {count_of(n_special, 'special token')} ({names})" if n_special else ""
    entries = count_of(meta["vocab_size"] - n_special, unit) + special
    print(f"vocabulary: {entries}; most frequent: {frequent}; rarest: {rare}")

    n_shards = len(meta.get("shards", {}).get("train", ()))
    shards = f" in {count_of(n_shards, 'shard')}" if n_shards else ""
    share = f"{100 * meta['characters']['val'] / characters:.3g}% of the text"
    split_method = {
        "position": f"the last {share}",
        "none": "no validation set",
        "given": f"{share}, from a separate text",
        "documents": f"{share}, in whole documents",
        "drawn": f"{share}, in whole documents drawn with seed {meta.get('seed')}",
    }[meta["split"]]
    print(
        f"tokens: {tokens['train']:,} for training{shards}, {tokens['val']:,} for validation ({split_method}); "
        f"{characters / sum(tokens.values()):.2f} characters per token"
    )

    if tokenizer.has_own_start:
        start = token_name(tokenizer, tokenizer.start_id)
        print(f"samples without a prompt start after {start}, since no text follows <|endoftext|> in this training set")

    unknown = int(totals[tokenizer.specials[UNKNOWN]]) if UNKNOWN in tokenizer.specials else 0
    sample = prepared.sample[: tokenizer.find_cut(prepared.sample) or None]  # without a truncated word at the end
    decoded = tokenizer.decode(tokenizer.encode_array(sample).tolist())
    if decoded == sample and not unknown and not prepared.is_lossy:
        result = "the tokens decode to the original text"
    elif unknown:
        result = f"the tokens do not decode to the original text: {UNKNOWN} replaces {count_of(unknown, 'rare word')}"
    else:
        result = "the tokens do not decode to the original text: --lower removes capital letters"
    if tokens["val"]:
        unseen_share = counts["val"][counts["train"] == 0].sum() / tokens["val"]
        unseen = f"{100 * unseen_share:.3g}% of the validation tokens do not occur in the training set"
        result += f"; {unseen if unseen_share else 'all validation tokens occur in the training set'}"
    print(f"check: {result}")
    print(f"written to: {shortest_path(prepared.folder)}")
