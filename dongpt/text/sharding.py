"""From a corpus larger than memory to shards, in chapters: what is killed goes on where it stopped.

As nanoGPT prepares OpenWebText: <|endoftext|> behind every document, and for validation a share of the documents that
the seed draws. val.bin holds them in the order in which they were drawn, so that it is nanoGPT's file, byte for byte,
if the documents come in the same order. In train they stay in the order of the files: training shuffles windows.

    prepared = prepare("data/openwebtext", Files(paths), GPT2Tokenizer(), shard_tokens=2 ** 27)
"""

import contextlib
import hashlib
import json
import math
import os
from dataclasses import replace
from typing import Callable, Iterator

import numpy as np

from configurator import UserError
from dongpt.text.bins import JOURNAL, Encoded, Prepared, Writer, settle
from dongpt.text.documents import Files
from dongpt.text.prepare import SAMPLE, check_fraction, encode_all, progress_bar
from dongpt.text.tokenizers import Tokenizer

CHAPTER = 2**26  # characters, after which the state is written: what a kill costs at most
LOCK = "preparing.lock"
DRAWN = "val.ids.part"  # ids of the documents for validation in the order in which they were read


def draw(n_documents: int, val_fraction: float, seed: int) -> np.ndarray:
    """The numbers of the documents for validation, in the order in which Hugging Face's train_test_split draws them."""
    return np.random.default_rng(seed).permutation(n_documents)[: math.ceil(val_fraction * n_documents)]


def prepare(
    folder: str,
    files: Files,
    tokenizer: Tokenizer,
    val_fraction: float = 0.0005,
    seed: int = 2357,
    shard_tokens: int = 2**27,
    source: str = "",
    quiet: bool = False,
) -> Prepared | None:
    """Write train_000.bin, ..., val.bin and meta.json to folder, or go on with that where an earlier call was killed;
    None if they are there already, of the same files with the same settings.

    Raises UserError for too few documents, for what files and bins.Writer raise, and while another process prepares
    the same folder; what was done by then lasts, and so does the data that was there before, until all is done.
    """
    check_fraction(val_fraction)
    if shard_tokens < 1:
        raise UserError(f"shard_tokens={shard_tokens} must be at least 1")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed} must be at least 0 and below 2 ** 32")
    counts = [files.count(path) for path in files.paths]
    drawn = draw(sum(counts), val_fraction, seed)
    if not 0 < len(drawn) < sum(counts):
        raise UserError(
            f"{sum(counts):,} documents cannot be parted into some to train on and some for validation: "
            f"give more files or records, or take data/prepare.py, which cuts a text"
        )
    with alone(folder):
        return _prepare(
            folder,
            files,
            tokenizer,
            counts,
            drawn,
            dict(val_fraction=val_fraction, seed=seed, shard_tokens=shard_tokens),
            source,
            quiet,
        )


def _prepare(
    folder: str,
    files: Files,
    tokenizer: Tokenizer,
    counts: list[int],
    drawn: np.ndarray,
    settings: dict,
    source: str,
    quiet: bool,
) -> Prepared | None:
    """prepare, of documents that are counted and drawn."""
    journal = _Journal(
        folder,
        {
            "files": [[os.path.basename(path), *stamp] for path, stamp in zip(files.paths, files.stamp())],
            "field": files.field,
            "encoding": files.encoding,
            "tokenizer": tokenizer.to_dict(),
            **settings,
        },
    )
    if journal.is_done():
        return None
    state = journal.read()
    if state:
        print(f"going on behind document {state['documents']:,} of {sum(counts):,}, where this was stopped before")
    writer = Writer(folder, tokenizer, settings["shard_tokens"], state.get("writer"))
    with journal.removed_unless(lambda: writer.lasting), writer, progress_bar(files.size, quiet) as progress:
        chapters = _Chapters(files, counts, drawn, state.get("documents", 0), progress)
        try:
            val = _Drawn(os.path.join(folder, DRAWN), state.get("val", {}))
            while not chapters.over:
                for split, encoded in encode_all(chapters.next(), tokenizer, several=True):
                    (val if split == "val" else writer).add(split, encoded)
                journal.write({"writer": writer.state(), "val": val.state(), "documents": chapters.done})
        except OSError as error:  # of the files read an error has become a ValueError
            raise writer.cannot(error) from error
        except KeyboardInterrupt:
            if writer.lasting:
                print(f"interrupted: the same command goes on behind document {journal.documents:,}")
            raise
        for encoded in val.in_order(drawn, tokenizer.end_id):
            writer.add("val", encoded)
        prepared = writer.finish(
            {
                "source": source,
                "sha256": "",
                "documents": sum(counts),
                "split": "drawn",
                "seed": settings["seed"],
                "plan_sha256": journal.plan_sha256,
            }
        )
    journal.remove()
    return replace(prepared, sample=chapters.sample or _beginning(folder, tokenizer))


def _beginning(folder: str, tokenizer: Tokenizer) -> str:
    """The beginning of the first document in val.bin."""
    ids = np.fromfile(os.path.join(folder, "val.bin"), dtype="<u2", count=200).tolist()
    return tokenizer.decode(ids[: ids.index(tokenizer.end_id)] if tokenizer.end_id in ids else ids).rstrip("\ufffd")


@contextlib.contextmanager
def alone(folder: str):
    """Keep other processes from preparing folder; on systems without flock they are not kept. Raises UserError while
    another one does. The lock ends with the process, however that ends."""
    try:
        import fcntl

        os.makedirs(folder, exist_ok=True)
        file = open(os.path.join(folder, LOCK), "wb")
    except ImportError:
        yield
        return
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}): free space there or change its rights"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{folder} is being prepared by another process: wait for it, or end it first") from error
        try:
            yield
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(file.name)


class _Journal:
    """What a preparation has done so far, in a file that a later one with the same plan goes on from."""

    def __init__(self, folder: str, plan: dict):
        self.path, self.folder, self.plan = os.path.join(folder, JOURNAL), folder, plan
        self.plan_sha256 = hashlib.sha256(json.dumps(plan).encode("utf-8")).hexdigest()
        self.documents = 0  # that are done, by what was written or read last

    def is_done(self) -> bool:
        """Whether the data of this plan is there; then nothing else of the preparation is."""
        settle(self.folder)
        try:
            with open(os.path.join(self.folder, "meta.json"), encoding="utf-8") as file:
                meta = json.load(file)
            there = meta.get("plan_sha256") == self.plan_sha256 and all(
                os.path.getsize(os.path.join(self.folder, name)) == 2 * tokens
                for name, tokens in [
                    ("val.bin", meta["tokens"]["val"]),
                    *((shard["file"], shard["tokens"]) for shard in meta["shards"]["train"]),
                ]
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False
        if there:
            self.remove()
        return there

    def read(self) -> dict:
        """The state that was written last; {} where there is none, or its files are gone, or the plan was another."""
        try:
            with open(self.path, encoding="utf-8") as file:
                written = json.load(file)
            state = written["state"]
            shards = [(shard["file"], shard["tokens"]) for shard in state["writer"]["shards"]]
            files = [*shards, (f"train_{len(shards):03d}.bin", state["writer"]["in_current"])]
            sizes = {name + ".part": 2 * tokens for name, tokens in files if tokens}
            sizes[DRAWN] = 2 * state["val"]["tokens"]
            there = all(os.path.getsize(os.path.join(self.folder, name)) >= size for name, size in sizes.items())
            if there and written["plan"] == self.plan:
                self.documents = state["documents"]
                return state
        except (OSError, ValueError, KeyError, TypeError):
            pass  # said below, unless there is nothing
        if os.path.exists(self.path):
            print("what was begun there before was of other files or settings, or is damaged: beginning anew")
            self.remove()  # else it would be taken for the state of what is begun now
        return {}

    def write(self, state: dict):
        with open(self.path + ".part", "w", encoding="utf-8") as file:
            json.dump({"plan": self.plan, "state": state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(self.path + ".part", self.path)
        self.documents = state["documents"]

    @contextlib.contextmanager
    def removed_unless(self, lasting: Callable[[], bool]):
        """Remove everything at the end of what follows if that leaves nothing to go on with."""
        try:
            yield
        finally:
            if not lasting():
                self.remove()

    def remove(self):
        for path in (self.path, os.path.join(self.folder, DRAWN)):
            if os.path.exists(path):
                os.remove(path)


class _Chapters:
    """The documents of files from number `done` on, some at a time, and on which side each belongs."""

    def __init__(self, files: Files, counts: list[int], drawn: np.ndarray, done: int, progress):
        self.for_val = np.zeros(sum(counts), dtype=bool)
        self.for_val[drawn] = True
        self.done, self.over, self.sample = done, done == len(self.for_val), ""
        self.texts = self._texts(files, counts, progress)

    def _texts(self, files: Files, counts: list[int], progress) -> Iterator[tuple[int, str, bool]]:
        """(number of the document, a text of it, whether it ends with that)."""
        begins = 0
        for path, count in zip(files.paths, counts):
            number, before = begins, self.done
            if begins + count > before:
                for text, ends in files.texts(path, progress):
                    if number >= before:
                        yield number, text, ends
                    number += ends
                if number != begins + count:
                    raise UserError(f"{path} changed while it was read: run this again when it rests")
            begins += count

    def next(self) -> Iterator[tuple[str, str, bool]]:
        """(train or val, text, whether its document ends with it), until CHAPTER characters are full."""
        size = 0
        for number, text, ends in self.texts:
            self.sample = self.sample or text.strip()[:SAMPLE]
            yield "val" if self.for_val[number] else "train", text, ends
            size += len(text)
            if ends:
                self.done = number + 1
                if size >= CHAPTER:
                    break
        self.over = self.done == len(self.for_val)


class _Drawn:
    """Ids of the documents for validation as they are read, in a file, to be put in order at the end."""

    def __init__(self, path: str, state: dict):
        self.path = path
        self.counts = {"tokens": 0, "characters": 0, "bytes": 0, **state}
        if not state:
            open(path, "wb").close()
        self.file = open(path, "r+b")
        self.file.truncate(2 * self.counts["tokens"])
        self.file.seek(0, os.SEEK_END)

    def add(self, split: str, encoded: Encoded):
        self.file.write(encoded.ids)
        for key, n in (("tokens", len(encoded.ids)), ("characters", encoded.n_characters), ("bytes", encoded.n_bytes)):
            self.counts[key] += n

    def state(self) -> dict:
        self.file.flush()
        os.fsync(self.file.fileno())
        return dict(self.counts)

    def in_order(self, drawn: np.ndarray, end_id: int) -> Iterator[Encoded]:
        """The documents in the order of drawn; each ends with end_id, which is nowhere else."""
        self.file.close()
        if not len(drawn):
            return
        ids = np.memmap(self.path, dtype="<u2", mode="r")
        ends = np.flatnonzero(ids == end_id) + 1
        assert len(ends) == len(drawn)
        begins = np.append(0, ends[:-1])
        for i, place in enumerate(np.argsort(np.argsort(drawn))):
            # the counts are known of all together
            known = (self.counts["characters"], self.counts["bytes"]) if i == 0 else (0, 0)
            for start in range(begins[place], ends[place], 2**22):  # a document may be long
                yield Encoded(np.array(ids[start : min(start + 2**22, ends[place])]), *known)
                known = 0, 0
