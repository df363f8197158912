"""Text to ids and back: characters and GPT-2's byte pairs, behind one interface.

Special tokens are declared by name and get the ids behind the others. Plain text never gives one: encode recognises
them with special=True alone.
A tokenizer travels inside every checkpoint and meta.json as a plain dict (to_dict, from_dict), so that a data set that
is prepared anew never changes what an old model means.
"""
import codecs
import functools
import hashlib
import re
from itertools import chain
from typing import Callable, Iterable, Iterator, Sequence

import numpy as np


FOREIGN = {"kind": "foreign"}  # describes a tokenizer that is there, and is none of these


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

    def _encode_around_specials(self, text: str) -> list[int]:
        """The ids of text in which special tokens count, the longest name first where several fit."""
        pieces = re.split(f"({'|'.join(map(re.escape, sorted(self.specials, key=len, reverse=True)))})", text)
        return [*chain.from_iterable([self.specials[p]] if p in self.specials else self.encode(p) for p in pieces)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are no UTF-8, and ids beyond the vocabulary, become U+FFFD."""
        return "".join(self.stream(ids))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of ids piece by piece; a character that is split over ids comes whole, with its last one."""
        decode = self.decoder()
        yield from filter(None, (decode(i) for i in chain(ids, [None])))

    def decoder(self) -> Callable[[int | None], str]:
        """A function that takes one id after the other and gives the text that is whole by then; None ends it."""
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

    def __init__(self, characters: str, special: Sequence[str] = ()):
        if not characters or len(set(characters)) != len(characters):
            raise ValueError("the characters of a vocabulary must be there and differ from each other")
        self.characters = characters
        self.ids = {character: i for i, character in enumerate(characters)}
        self.specials = _number(special, len(characters), self.ids)
        self.vocab_size = len(characters) + len(special)
        self.start_id = self.ids.get("\n", 0)

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """The tokenizer whose vocabulary is every character of text, by code point."""
        return cls("".join(sorted(set(text))))

    def encode(self, text: str, special: bool = False) -> list[int]:
        if special and self.specials:
            return self._encode_around_specials(text)
        try:
            return [self.ids[character] for character in text]
        except KeyError:
            unknown = sorted(set(text) - set(self.ids))
            raise ValueError(f"the text has characters that are not in the vocabulary: "
                             f"{', '.join(map(repr, unknown))}; the vocabulary is {self.characters!r}") from None

    def decoder(self) -> Callable[[int | None], str]:
        names = dict(enumerate(self.characters)) | {i: name for name, i in self.specials.items()} | {None: ""}
        return lambda i: names.get(i, "\ufffd")

    def byte_lengths(self) -> np.ndarray:
        lengths = [len(character.encode("utf-8")) for character in self.characters] + [0] * len(self.specials)
        return np.array(lengths, dtype=np.int64)

    def to_dict(self) -> dict:
        return _with_special({"kind": self.kind, "characters": self.characters}, self.specials)


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-pair encoding by tiktoken; <|endoftext|> is its own special token, others may be declared."""
    kind = "gpt2"

    def __init__(self, special: Sequence[str] = ()):
        self.encoding = _gpt2_encoding()
        self.start_id = self.encoding.eot_token
        self.specials = {"<|endoftext|>": self.start_id}
        self.specials.update(_number(special, self.encoding.n_vocab, self.specials))
        self.vocab_size = self.encoding.n_vocab + len(special)

    def encode(self, text: str, special: bool = False) -> list[int]:
        return self._encode_around_specials(text) if special else self.encoding.encode_ordinary(text)

    def decoder(self) -> Callable[[int | None], str]:
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda i: utf8.decode(b"" if i is None else self._bytes(i), final=i is None)

    def byte_lengths(self) -> np.ndarray:
        lengths = [len(self._bytes(i)) for i in range(self.vocab_size)]
        for i in self.specials.values():
            lengths[i] = 0
        return np.array(lengths, dtype=np.int64)

    def to_dict(self) -> dict:
        declared = {name: i for name, i in self.specials.items() if i >= self.encoding.n_vocab}
        return _with_special({"kind": self.kind, "sha256": _gpt2_sha256()}, declared)

    def _bytes(self, i: int) -> bytes:
        """The bytes of one id; for one beyond the vocabulary a byte that is no UTF-8."""
        if 0 <= i < self.encoding.n_vocab:
            return self.encoding.decode_single_token_bytes(i)
        return next((name.encode("utf-8") for name, number in self.specials.items() if number == i), b"\xff")


def _number(special: Sequence[str], first: int, taken) -> dict[str, int]:
    """Declared special tokens with their ids, from first on. Raises ValueError for names that cannot be told apart."""
    if wrong := [name for i, name in enumerate(special) if not name or name in taken or name in special[:i]]:
        raise ValueError(f"special tokens must have names that differ, from each other and from all else in the "
                         f"vocabulary: change {', '.join(map(repr, wrong))}")
    return {name: first + i for i, name in enumerate(special)}


def _with_special(description: dict, declared: dict[str, int]) -> dict:
    """description, with the names of the declared special tokens if there are any."""
    return {**description, "special": sorted(declared, key=declared.get)} if declared else description


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
    kind, special = description.get("kind"), description.get("special", [])
    if kind == "char":
        return CharTokenizer(description.get("characters", ""), special)
    if kind == "gpt2":
        if description.get("sha256", _gpt2_sha256()) != _gpt2_sha256():
            raise ValueError("this file's GPT-2 vocabulary is not the one that tiktoken loads here: "
                             "clear TIKTOKEN_CACHE_DIR, or prepare the data anew")
        return GPT2Tokenizer(special)
    if description == FOREIGN:
        raise ValueError("this model's tokenizer is not one that donGPT has, so its ids cannot be shown as text: "
                         "use the library that it came from")
    raise ValueError(f"tokenizer kind {kind!r} is not known: this file was written by a newer donGPT, update yours")


def added_tokens(one: dict | None, other: dict | None) -> list[str] | None:
    """The special tokens that other declares behind those of one; None if they differ in more.

    A description that is not known is taken for the same vocabulary.
    """
    if not one or not other:
        return []
    special, others = one.get("special", []), other.get("special", [])
    if one["kind"] == other["kind"] == "gpt2":  # one that is only assumed has no hash
        same = len({one.get("sha256"), other.get("sha256")} - {None}) <= 1
    else:
        same = {**one, "special": []} == {**other, "special": []}
    return others[len(special):] if same and others[:len(special)] == special else None
