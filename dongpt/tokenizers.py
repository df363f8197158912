"""Text to ids and back: characters and GPT-2's byte pairs, behind one interface.

A tokenizer travels inside every checkpoint and meta.json as a plain dict (to_dict, from_dict), so that a data set that
is prepared anew never changes what an old model means.
"""
import codecs
import functools
import hashlib
from typing import Iterable, Iterator

import numpy as np


class Tokenizer:
    """The interface.

    encode("hi") -> [5, 6]; decode([5, 6]) -> "hi"; stream([5, 6]) yields "h", "i".
    vocab_size counts the ids, special tokens included. start_id is what a model is given before an empty prompt.
    specials maps the declared special tokens to their ids; encode knows them only when special=True.
    """
    kind: str
    vocab_size: int
    start_id: int
    specials: dict[str, int] = {}

    def encode(self, text: str, special: bool = False) -> list[int]:
        """The ids of text. Raises ValueError naming what the vocabulary does not hold."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are no UTF-8, and ids beyond the vocabulary, become U+FFFD."""
        return "".join(self.stream(ids))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of ids piece by piece; a character that is split over ids comes whole, with its last one."""
        raise NotImplementedError

    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes of source text per id, (vocab_size,) int64; 0 for special tokens."""
        raise NotImplementedError

    def to_dict(self) -> dict:
        """A plain dict of str and int from which from_dict makes the same tokenizer."""
        raise NotImplementedError


class CharTokenizer(Tokenizer):
    """One id per character; the ids follow the order of the characters given, by custom their code points."""
    kind = "char"

    def __init__(self, characters: str):
        if not characters or len(set(characters)) != len(characters):
            raise ValueError("the characters of a vocabulary must be there and differ from each other")
        self.characters = characters
        self.vocab_size = len(characters)
        self.ids = {character: i for i, character in enumerate(characters)}
        self.start_id = self.ids.get("\n", 0)

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """The tokenizer whose vocabulary is every character of text, by code point."""
        return cls("".join(sorted(set(text))))

    def encode(self, text: str, special: bool = False) -> list[int]:
        try:
            return [self.ids[character] for character in text]
        except KeyError:
            unknown = sorted(set(text) - set(self.ids))
            raise ValueError(f"the text has characters that are not in the vocabulary: "
                             f"{', '.join(map(repr, unknown))}; the vocabulary is {self.characters!r}") from None

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        for i in ids:
            yield self.characters[i] if 0 <= i < self.vocab_size else "\ufffd"

    def byte_lengths(self) -> np.ndarray:
        return np.array([len(character.encode("utf-8")) for character in self.characters], dtype=np.int64)

    def to_dict(self) -> dict:
        return {"kind": self.kind, "characters": self.characters}


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-pair encoding by tiktoken; <|endoftext|> is its one special token."""
    kind = "gpt2"

    def __init__(self):
        self.encoding = _gpt2_encoding()
        self.vocab_size = self.encoding.n_vocab
        self.start_id = self.encoding.eot_token
        self.specials = {"<|endoftext|>": self.encoding.eot_token}

    def encode(self, text: str, special: bool = False) -> list[int]:
        if special:
            return self.encoding.encode(text, allowed_special=set(self.specials), disallowed_special=())
        return self.encoding.encode_ordinary(text)

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            known = 0 <= i < self.vocab_size
            if piece := decoder.decode(self.encoding.decode_single_token_bytes(i) if known else b"\xff"):
                yield piece
        if rest := decoder.decode(b"", final=True):
            yield rest

    def byte_lengths(self) -> np.ndarray:
        lengths = [len(self.encoding.decode_single_token_bytes(i)) for i in range(self.vocab_size)]
        lengths[self.encoding.eot_token] = 0
        return np.array(lengths, dtype=np.int64)

    def to_dict(self) -> dict:
        return {"kind": self.kind, "sha256": _gpt2_sha256()}


@functools.cache
def _gpt2_encoding():
    """tiktoken's encoding; it takes the vocabulary from TIKTOKEN_CACHE_DIR if it is there, else it downloads it."""
    import tiktoken
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # tiktoken hands on whatever requests, the file system or its hash check raise
        raise ValueError(f"GPT-2's vocabulary could not be loaded ({type(error).__name__}): connect to a network once, "
                         f"or set TIKTOKEN_CACHE_DIR to a folder that holds tiktoken's copy of it") from error


@functools.cache
def _gpt2_sha256() -> str:
    """A hash of all tokens in the order of their ids."""
    encoding, digest = _gpt2_encoding(), hashlib.sha256()
    for i in range(encoding.n_vocab):
        token = encoding.decode_single_token_bytes(i)
        digest.update(len(token).to_bytes(4, "little") + token)
    return digest.hexdigest()


def from_dict(description: dict) -> Tokenizer:
    """The tokenizer that to_dict described. Raises ValueError for a kind or a vocabulary that is not known here."""
    kind = description.get("kind")
    if kind == "char":
        return CharTokenizer(description.get("characters", ""))
    if kind == "gpt2":
        if description.get("sha256", _gpt2_sha256()) != _gpt2_sha256():
            raise ValueError("this file's GPT-2 vocabulary is not the one that tiktoken loads here: "
                             "clear TIKTOKEN_CACHE_DIR, or prepare the data anew")
        return GPT2Tokenizer()
    raise ValueError(f"tokenizer kind {kind!r} is not known: this file was written by a newer donGPT, update yours")
