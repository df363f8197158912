"""Text to ids and back: characters, words, byte pairs trained on a text, GPT-2's byte pairs, behind one interface.

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
from typing import Callable, Iterable, Iterator, Literal, Sequence

import numpy as np

from configurator import UserError
from dongpt.text.template import Template

FOREIGN = {"kind": "foreign"}  # describes a tokenizer that is there, and is none of these
END = "<|endoftext|>"  # the special token behind each of several documents
UNKNOWN = "<unk>"  # the special token for a word that the vocabulary does not hold
MAX_VOCAB = 2**16  # entries of a vocabulary: ids are stored as uint16
NO_ID = MAX_VOCAB - 1  # in a table of the ids of a smaller vocabulary
# openai/gpt-2, encoder.py
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
Unknown = Literal["error", "skip", "replace"]


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
    in_threads = True  # several threads encode faster than one
    template: Template | None = None  # how conversations were written for the model, if it was trained on any

    @property
    def end_id(self) -> int | None:
        """The id behind each of several documents; None where documents follow each other without one."""
        return self.specials.get(END)

    def encode(self, text: str, special: bool = False, unknown: Unknown = "error") -> list[int]:
        """The ids of text. What the vocabulary does not hold is left out, or replaced, or is a ValueError naming it."""
        if special and self.specials:
            return self._encode_around_specials(text, unknown)
        return self._encode(text, unknown)

    def _encode(self, text: str, unknown: Unknown) -> list[int]:
        raise NotImplementedError

    def _encode_around_specials(self, text: str, unknown: Unknown) -> list[int]:
        """The ids of text in which special tokens count, the longest name first where several fit."""
        pieces = re.split(f"({'|'.join(map(re.escape, sorted(self.specials, key=len, reverse=True)))})", text)
        return [
            *chain.from_iterable([self.specials[p]] if p in self.specials else self._encode(p, unknown) for p in pieces)
        ]

    def encode_array(self, text: str) -> np.ndarray:
        """encode(text) as (n,) uint16, for long texts."""
        return np.array(self.encode(text), dtype=np.uint16)

    def encode_texts(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each of texts, (n,) uint16."""
        return [self.encode_array(text) for text in texts]

    def encode_parts(self, parts: list[tuple[str, bool]], end_id: int | None) -> np.ndarray:
        """The ids of texts one by one, (n,) uint16, each followed by end_id, if there is one, where its flag is set."""
        end = np.array([] if end_id is None else [end_id], dtype=np.uint16)
        arrays = [array for text, ends in parts for array in (self.encode_array(text), *([end] if ends else []))]
        return np.concatenate(arrays) if arrays else end[:0]

    def missing(self, text: str) -> list[str]:
        """What of text the vocabulary does not hold, sorted."""
        return []

    def is_lossy(self, text: str) -> bool:
        """Whether ids cannot give text back, for another reason than that a vocabulary lacks something."""
        return False

    def cut(self, text: str) -> int:
        """The last place at which text, and whatever follows it, may be cut: the parts give the ids of the whole.

        0 where there is none.
        """
        return last_break(text)

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
        """A plain dict of str, int, bool and lists of them from which from_dict makes the same tokenizer."""
        raise NotImplementedError

    def _described(self, description: dict, declared: dict[str, int]) -> dict:
        """description, with the names of the declared special tokens and the template, where there are any."""
        special = {"special": sorted(declared, key=declared.get)} if declared else {}
        return {**description, **special, **({"template": self.template.to_dict()} if self.template else {})}


class CharTokenizer(Tokenizer):
    """One id per character; the ids follow the order of the characters given, by custom their code points."""

    kind = "char"

    def __init__(self, characters: str, special: Sequence[str] = ()):
        if not characters or len(set(characters)) != len(characters):
            raise UserError("the characters of a vocabulary must be there and differ from each other")
        self.characters = characters
        self.ids = {character: i for i, character in enumerate(characters)}
        self.specials = _number(special, len(characters), self.ids)
        self.vocab_size = len(characters) + len(special)
        self.start_id = self.specials.get(END, self.ids.get("\n", 0))

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """The tokenizer whose vocabulary is every character of text, by code point."""
        return cls("".join(sorted(set(text))))

    def _encode(self, text: str, unknown: Unknown) -> list[int]:
        if unknown == "error":
            try:
                return [self.ids[character] for character in text]
            except KeyError:
                raise UserError(
                    f"the text has characters that are not in the vocabulary: "
                    f"{', '.join(map(repr, self.missing(text)))}; the vocabulary is "
                    f"{self.characters!r}; pass --unknown=skip or --unknown=replace to go on without "
                    f"them"
                ) from None
        known = next((c for c in "\ufffd?_ " if c in self.ids), self.characters[0]) if unknown == "replace" else None
        ids = (self.ids.get(c, self.ids.get(known)) for c in text)
        return [i for i in ids if i is not None]

    def missing(self, text: str) -> list[str]:
        return sorted(set(text) - set(self.ids))

    def encode_array(self, text: str) -> np.ndarray:
        if text.isascii() and self.vocab_size <= NO_ID:
            ids = self._ascii_table.take(np.frombuffer(text.encode("ascii"), np.uint8))
            known = not len(ids) or ids.max() < NO_ID
        else:
            ids = self._table[np.frombuffer(text.encode("utf-32-le"), np.uint32)]
            known = not len(ids) or ids.min() >= 0
        return ids.astype(np.uint16, copy=False) if known else np.array(self.encode(text), dtype=np.uint16)  # raises

    def encode_parts(self, parts: list[tuple[str, bool]], end_id: int | None) -> np.ndarray:
        if end_id is None:
            return self.encode_array("".join(text for text, _ in parts))
        return super().encode_parts(parts, end_id)

    @functools.cached_property
    def _ascii_table(self) -> np.ndarray:
        """The id of each ASCII character, NO_ID for none, (128,) uint16."""
        return np.array([self.ids.get(chr(code), NO_ID) for code in range(128)], dtype=np.uint16)

    @functools.cached_property
    def _table(self) -> np.ndarray:
        """The id of each code point, -1 for none, (0x110000,) int32."""
        table = np.full(0x110000, -1, dtype=np.int32)
        table[[*map(ord, self.characters)]] = np.arange(len(self.characters))
        return table

    def cut(self, text: str) -> int:
        return len(text)

    def decoder(self) -> Callable[[int | None], str]:
        names = dict(enumerate(self.characters)) | {i: name for name, i in self.specials.items()} | {None: ""}
        return lambda i: names.get(i, "\ufffd")

    def byte_lengths(self) -> np.ndarray:
        lengths = [len(character.encode("utf-8")) for character in self.characters] + [0] * len(self.specials)
        return np.array(lengths, dtype=np.int64)

    def to_dict(self) -> dict:
        return self._described({"kind": self.kind, "characters": self.characters}, self.specials)


class WordTokenizer(Tokenizer):
    """One id per word, punctuation mark or blank; a space belongs to what follows it unless spaces_alone.

    With spaces_alone a text falls into \\w+, \\S and \\s, as in the word notebook. lower: capitals are lost.
    """

    kind = "word"
    in_threads = False  # Python's regular expressions run in one thread at a time

    def __init__(
        self, words: Sequence[str], special: Sequence[str] = (), lower: bool = False, spaces_alone: bool = False
    ):
        if not words or len(set(words)) != len(words) or UNKNOWN in special:
            raise UserError(
                f"the words of a vocabulary must be there and differ from each other, and {UNKNOWN} is "
                f"declared anyway: leave it out of --special"
            )
        self.words, self.lower, self.spaces_alone = list(words), lower, spaces_alone
        self.ids = {word: i for i, word in enumerate(words)}
        self.specials = _number([UNKNOWN, *special], len(words), self.ids)
        self.unknown_id = self.specials[UNKNOWN]
        self.vocab_size = len(words) + len(self.specials)
        self.start_id = self.specials.get(END, self.ids.get("\n", self.unknown_id))

    @property
    def pattern(self) -> str:
        """The regular expression that fits a word."""
        return WORDS if self.spaces_alone else WORDS_WITH_SPACES

    def split(self, text: str) -> list[str]:
        """The words of text, the same text when joined, in small letters if lower."""
        return split_words(text, self.lower, self.spaces_alone)

    def _encode(self, text: str, unknown: Unknown) -> list[int]:
        words = self.split(text)
        if unknown == "error" and (missing := self.missing(text)):
            raise UserError(
                f"the text has words that are not in the vocabulary of {len(self.words):,}: "
                f"{', '.join(map(repr, missing[:10]))}{' and others' * (len(missing) > 10)}; write "
                f"something else, or pass --unknown=skip or --unknown=replace"
            )
        ids = (self.ids.get(word, self.unknown_id) for word in words)
        return [i for i in ids if i != self.unknown_id] if unknown == "skip" else [*ids]

    def missing(self, text: str) -> list[str]:
        return sorted(set(self.split(text)) - set(self.ids))

    def encode_array(self, text: str) -> np.ndarray:
        """As encode; words that are too rare for the vocabulary become <unk>."""
        return np.array(self.encode(text, unknown="replace"), dtype=np.uint16)

    def cut(self, text: str) -> int:
        return last_word_break(text)

    def is_lossy(self, text: str) -> bool:
        return self.lower and text != text.lower()

    def decoder(self) -> Callable[[int | None], str]:
        names = dict(enumerate(self.words)) | {i: name for name, i in self.specials.items()} | {None: ""}
        return lambda i: names.get(i, "\ufffd")

    def byte_lengths(self) -> np.ndarray:
        return np.array([len(word.encode("utf-8")) for word in self.words] + [0] * len(self.specials), dtype=np.int64)

    def to_dict(self) -> dict:
        declared = {name: i for name, i in self.specials.items() if name != UNKNOWN}
        return self._described(
            {"kind": self.kind, "words": self.words, "lower": self.lower, "spaces_alone": self.spaces_alone}, declared
        )


WORDS, WORDS_WITH_SPACES = r"\w+|\S|\s", r" ?\w+| ?[^\w\s]|\s"


def split_words(text: str, lower: bool = False, spaces_alone: bool = False) -> list[str]:
    """The words of text as WordTokenizer has them."""
    return re.findall(WORDS if spaces_alone else WORDS_WITH_SPACES, text.lower() if lower else text)


class BytePairs(Tokenizer):
    """Byte pairs by tiktoken: encoding (a tiktoken.Encoding that has END), and special tokens behind it."""

    encoding = None

    def _encode(self, text: str, unknown: Unknown) -> list[int]:
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        return self._encode_with(text, set())

    def encode_texts(self, texts: list[str]) -> list[np.ndarray]:
        if not texts or any(END in text for text in texts):
            return super().encode_texts(texts)
        ids = self._encode_with(END.join(texts), {END})  # one call, as in encode_parts
        first, *others = np.split(ids, np.flatnonzero(ids == self.end_id))
        return [first, *(piece[1:] for piece in others)]

    def encode_parts(self, parts: list[tuple[str, bool]], end_id: int | None) -> np.ndarray:
        if end_id != self.end_id or any(END in text for text, _ in parts):
            return super().encode_parts(parts, end_id)
        # one call for all: many short texts would take longer to hand over than to encode
        return self._encode_with("".join(text + END if ends else text for text, ends in parts), {END})

    def _encode_with(self, text: str, special: set[str]) -> np.ndarray:
        try:
            ids = self.encoding.encode_to_numpy(text, allowed_special=special, disallowed_special=())
            return ids.astype(np.uint16)
        except BaseException as error:  # tiktoken's own code gives up with a PanicException, which is no Exception
            if type(error).__name__ not in ("PanicException", "ValueError"):
                raise
            raise UserError(
                "the text has a stretch of hundreds of thousands of blanks, which tiktoken cannot split: take them out"
            ) from None

    def decoder(self) -> Callable[[int | None], str]:
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda i: utf8.decode(b"" if i is None else self._bytes(i), final=i is None)

    def byte_lengths(self) -> np.ndarray:
        lengths = [len(self._bytes(i)) for i in range(self.vocab_size)]
        for i in self.specials.values():
            lengths[i] = 0
        return np.array(lengths, dtype=np.int64)

    def _bytes(self, i: int) -> bytes:
        """The bytes of one id; for one beyond the vocabulary a byte that is no UTF-8."""
        if 0 <= i < self.encoding.n_vocab:
            return self.encoding.decode_single_token_bytes(i)
        return next((name.encode("utf-8") for name, number in self.specials.items() if number == i), b"\xff")


class BPETokenizer(BytePairs):
    """Byte pairs trained on a text: the first 256 ids are the bytes, the others in the order in which they were joined.

    tokens are spelled in GPT-2's alphabet, in which every byte is a visible character. <|endoftext|> follows, then the
    special tokens that are declared.
    """

    kind = "bpe"

    def __init__(self, tokens: Sequence[str], special: Sequence[str] = ()):
        import tiktoken

        self.tokens = list(tokens)
        codes = {character: byte for byte, character in enumerate(byte_alphabet())}
        try:
            ranks = {bytes(codes[character] for character in token): i for i, token in enumerate(tokens)}
        except KeyError as error:
            raise UserError(
                f"the vocabulary of byte pairs has {error}, which stands for no byte: prepare the data anew"
            ) from None
        if len(ranks) != len(tokens) or any(bytes([byte]) not in ranks for byte in range(256)):
            raise UserError("the vocabulary of byte pairs lacks a byte or has a token twice: prepare the data anew")
        self.encoding = tiktoken.Encoding(
            "bpe", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END: len(tokens)}
        )
        self.specials = _number([END, *special], len(tokens), ())
        self.vocab_size = len(tokens) + len(self.specials)
        self.start_id = self.specials[END]

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, special: Sequence[str] = ()) -> "BPETokenizer":
        """The tokenizer of at most vocab_size entries, special tokens included, trained on texts by Hugging Face."""
        import tokenizers

        n_special = 1 + len(special)
        if not 256 + n_special <= vocab_size <= MAX_VOCAB:
            raise UserError(
                f"vocab_size={vocab_size} must be from {256 + n_special} (the bytes and the special tokens) to {MAX_VOCAB:,}"
            )
        learner = tokenizers.Tokenizer(tokenizers.models.BPE())
        learner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        learner.train_from_iterator(
            chain.from_iterable(map(_shortened, texts)),
            tokenizers.trainers.BpeTrainer(
                vocab_size=vocab_size - n_special,
                initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
        ids = learner.get_vocab()
        return cls(sorted(ids, key=ids.get), special)

    def to_dict(self) -> dict:
        return self._described(
            {"kind": self.kind, "tokens": self.tokens}, {name: i for name, i in self.specials.items() if name != END}
        )


class GPT2Tokenizer(BytePairs):
    """GPT-2's byte-pair encoding by tiktoken; <|endoftext|> is its own special token, others may be declared."""

    kind = "gpt2"

    def __init__(self, special: Sequence[str] = ()):
        self.encoding = _gpt2_encoding()
        self.start_id = self.encoding.eot_token
        self.specials = {END: self.start_id}
        self.specials.update(_number(special, self.encoding.n_vocab, self.specials))
        self.vocab_size = self.encoding.n_vocab + len(special)

    def to_dict(self) -> dict:
        declared = {name: i for name, i in self.specials.items() if i >= self.encoding.n_vocab}
        return self._described({"kind": self.kind, "sha256": _gpt2_sha256()}, declared)


LONG_RUN = re.compile(r"\w{1000}|\s{1000}|[^\w\s]{1000}")


def _shortened(text: str) -> list[str]:
    """text cut behind every thousand characters of one kind, of which training takes time by the square."""
    if max(map(len, text.split()), default=0) < 1000 and not re.search(r"\s{1000}", text):
        return [text]
    places = [0, *(match.end() for match in LONG_RUN.finditer(text)), len(text)]
    return [text[a:b] for a, b in zip(places, places[1:])]


@functools.cache
def byte_alphabet() -> tuple[str, ...]:
    """The character that GPT-2 writes for each of the 256 bytes: itself if it is visible Latin-1, else one of the
    characters from U+0100 on, in order."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return tuple(chr(byte if byte in visible else 0x100 + others.index(byte)) for byte in range(256))


def last_break(text: str) -> int:
    """The last place in text at which one of the patterns of words above always ends a piece, whatever follows.

    That is before a blank behind what is none, and before a mark behind a letter: no piece goes on there.
    """
    return next(
        (
            place
            for place in range(len(text) - 1, 0, -1)
            if is_word_break(text[place - 1], text[place]) or text[place] in MARKS and text[place - 1].isalpha()
        ),
        0,
    )


def is_word_break(before: str, here: str) -> bool:
    """Whether a word always ends between these two characters, and small letters do not depend on what is beyond.

    (Before a mark they do: the sigma in capitals' "\u03a3." is another letter at the end of a word.)
    """
    return here in " \n" and not before.isspace()


def last_word_break(text: str) -> int:
    """The last place in text that is_word_break, 0 if there is none."""
    return next((place for place in range(len(text) - 1, 0, -1) if is_word_break(text[place - 1], text[place])), 0)


MARKS = '.,;:!?()[]"-\u3001\u3002\uff0c\uff01\uff1f'  # neither letters nor digits nor blanks in any Unicode


def _number(special: Sequence[str], first: int, taken) -> dict[str, int]:
    """Declared special tokens with their ids, from first on. Raises UserError for names that cannot be told apart."""
    if wrong := [name for i, name in enumerate(special) if not name or name in taken or name in special[:i]]:
        raise UserError(
            f"special tokens must have names that differ, from each other and from all else in the "
            f"vocabulary: change {', '.join(map(repr, wrong))}"
        )
    return {name: first + i for i, name in enumerate(special)}


@functools.cache
def _gpt2_encoding():
    """tiktoken's encoding; it takes the vocabulary from TIKTOKEN_CACHE_DIR if it is there, else it downloads it."""
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # tiktoken hands on whatever requests, the file system or its hash check raise
        raise UserError(
            f"GPT-2's vocabulary could not be loaded ({type(error).__name__}): connect to a network once, "
            f"or set TIKTOKEN_CACHE_DIR to a folder that holds tiktoken's copy of it"
        ) from error


@functools.cache
def _gpt2_sha256() -> str:
    """A hash of all tokens in the order of their ids."""
    encoding, digest = _gpt2_encoding(), hashlib.sha256()
    for i in range(encoding.n_vocab):
        token = encoding.decode_single_token_bytes(i)
        digest.update(len(token).to_bytes(4, "little") + token)
    return digest.hexdigest()


def from_dict(description: dict) -> Tokenizer:
    """The tokenizer that to_dict described. Raises UserError for a kind or a vocabulary that is not known here."""
    tokenizer = _without_template(description)
    if "template" in description:
        tokenizer.template = Template.from_dict(description["template"])
    return tokenizer


def _without_template(description: dict) -> Tokenizer:
    kind, special = description.get("kind"), description.get("special", [])
    if kind == "char":
        return CharTokenizer(description.get("characters", ""), special)
    if kind == "word":
        return WordTokenizer(
            description.get("words", ()),
            special,
            description.get("lower", False),
            description.get("spaces_alone", False),
        )
    if kind == "bpe":
        return BPETokenizer(description.get("tokens", ()), special)
    if kind == "gpt2":
        if description.get("sha256", _gpt2_sha256()) != _gpt2_sha256():
            raise UserError(
                "this file's GPT-2 vocabulary is not the one that tiktoken loads here: "
                "clear TIKTOKEN_CACHE_DIR, or prepare the data anew"
            )
        return GPT2Tokenizer(special)
    if description == FOREIGN:
        raise UserError(
            "this model's tokenizer is not one that donGPT has, so its ids cannot be shown as text: "
            "use the library that it came from"
        )
    raise UserError(f"tokenizer kind {kind!r} is not known: this file was written by a newer donGPT, update yours")


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
        same = {**one, "special": [], "template": {}} == {**other, "special": [], "template": {}}
    return others[len(special) :] if same and others[: len(special)] == special else None
