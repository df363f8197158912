"""Tokenizers: characters, words, byte pairs trained on a text, and GPT-2's byte pairs, with a common interface.

Special tokens are declared by name and have the highest ids. Plain text never produces one: encode recognizes them only
with special=True. Every checkpoint and meta.json holds its tokenizer as a plain dict (to_dict, from_dict), so preparing
a data set again never changes the meaning of an old model.
"""

import codecs
import functools
import hashlib
import re
from collections import Counter
from itertools import chain
from typing import Any, Callable, Collection, Iterable, Iterator, Literal, Sequence

import numpy as np

from configurator import UserError
from dongpt.text.template import Template

UNSUPPORTED_TOKENIZER = {"kind": "foreign"}  # describes a tokenizer that none of these classes implements
END = "<|endoftext|>"  # special token at the end of a document
UNKNOWN = "<unk>"  # special token for words outside the vocabulary
MAX_VOCAB_SIZE = 2**16  # tokens in a vocabulary, since ids are stored as uint16
MISSING_ID = MAX_VOCAB_SIZE - 1  # marks unknown characters in CharTokenizer's table
# openai/gpt-2, encoder.py
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
GPT2_VOCAB_SIZE = 50257  # entries of GPT-2's vocabulary
WORD_PATTERN, SPACED_WORD_PATTERN = r"\w+|\S|\s", r" ?\w+| ?[^\w\s]|\s"
PUNCTUATION = '.,;:!?()[]"-\u3001\u3002\uff0c\uff01\uff1f'  # not letters, digits or blanks in any version of Unicode
LONG_RUN_PATTERN = re.compile(r"\w{1000}|\s{1000}|[^\w\s]{1000}")
UnknownPolicy = Literal["error", "skip", "replace"]


class Tokenizer:
    """The interface: encode("hi") -> [5, 6]; decode([5, 6]) -> "hi"; stream([5, 6]) yields "h", "i"."""

    kind: str
    fields: dict[str, type] = {}  # attributes stored by to_dict, besides special tokens and template
    builtin_specials: tuple[str, ...] = ()  # special tokens of every tokenizer of this kind
    vocab_size: int  # number of ids, including special tokens
    start_id: int  # the model's input if the prompt is empty
    specials: dict[str, int] = {}  # the declared special tokens with their ids
    use_threads = True  # whether several threads encode faster than one
    template: Template | None = None  # the format of the conversations that the model was trained on, if any

    @property
    def end_id(self) -> int | None:
        """The id that ends a document; None if the vocabulary has none."""
        return self.specials.get(END)

    def encode(self, text: str, special: bool = False, unknown: UnknownPolicy = "error") -> list[int]:
        """The ids of text. Pieces outside the vocabulary are skipped, replaced, or reported in a UserError."""
        if not special or not self.specials:
            return self._encode(text, unknown)
        names = sorted(self.specials, key=len, reverse=True)  # the longest match wins
        pieces = re.split(f"({'|'.join(map(re.escape, names))})", text)
        ids = ([self.specials[p]] if p in self.specials else self._encode(p, unknown) for p in pieces)
        return [*chain.from_iterable(ids)]

    def _encode(self, text: str, unknown: UnknownPolicy) -> list[int]:
        raise NotImplementedError

    def encode_array(self, text: str) -> np.ndarray:
        """encode(text) as (n,) uint16, for long texts; words outside the vocabulary become <unk>."""
        return np.array(self.encode(text), dtype=np.uint16)

    def encode_texts(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text, (n,) uint16."""
        return [self.encode_array(text) for text in texts]

    def encode_parts(self, parts: list[tuple[str, bool]], end_id: int | None) -> np.ndarray:
        """The ids of [(text, whether it ends a document), ...], (n,) uint16, with end_id, if any, after documents."""
        end = np.array([] if end_id is None else [end_id], dtype=np.uint16)
        encoded = self.encode_texts([text for text, _ in parts])
        return np.concatenate([end[:0], *chain(*((ids, end[:ends]) for ids, (_, ends) in zip(encoded, parts)))])

    def missing(self, text: str) -> list[str]:
        """The pieces of text outside the vocabulary, sorted."""
        return []

    def is_lossy(self, text: str) -> bool:
        """Whether decoding cannot restore text although its pieces are in the vocabulary, e.g. after lowercasing."""
        return False

    def find_cut(self, text: str) -> int:
        """Last position at which cutting text does not change its ids, however it continues; 0 if there is none."""
        return last_break(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; invalid UTF-8 and ids outside the vocabulary become U+FFFD."""
        return "".join(self.stream(ids))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of ids in pieces; a character that spans several ids is yielded with the last of them."""
        decode = self.decoder()
        yield from filter(None, (decode(i) for i in chain(ids, [None])))

    def decoder(self) -> Callable[[int | None], str]:
        """A function that takes one id at a time and returns the text that it completes; None marks the end."""
        raise NotImplementedError

    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes of source text per id, (vocab_size,) int64; 0 for special tokens."""
        raise NotImplementedError

    def to_dict(self) -> dict:
        """A plain dict of str, int, bool and lists, from which from_dict makes the same tokenizer."""
        description = {"kind": self.kind, **{name: getattr(self, name) for name in self.fields}}
        if special := sorted({*self.specials} - {*self.builtin_specials}, key=self.specials.__getitem__):
            description["special"] = special
        if self.template:
            description["template"] = self.template.to_dict()
        return description


class LookupTokenizer(Tokenizer):
    """Splits text into pieces and looks up their ids; the common base of characters and words."""

    unit_name: str  # in messages

    def __init__(self, pieces: Sequence[str], special: Sequence[str]):
        if not pieces or len(set(pieces)) != len(pieces):
            raise UserError(f"a vocabulary needs {self.unit_name} without duplicates: prepare the data again")
        self.pieces = pieces  # text of each id, without special tokens
        self.ids = {piece: i for i, piece in enumerate(pieces)}
        self.specials = _assign_ids([*self.builtin_specials, *special], len(pieces), self.ids)
        self.vocab_size = len(pieces) + len(self.specials)
        self.unknown_id = self.specials.get(UNKNOWN, next((self.ids[c] for c in "\ufffd?_ " if c in self.ids), 0))
        self.start_id = self.specials.get(END, self.ids.get("\n", self.specials.get(UNKNOWN, 0)))

    def split(self, text: str) -> Sequence[str]:
        """The pieces of text."""
        raise NotImplementedError

    def _encode(self, text: str, unknown: UnknownPolicy) -> list[int]:
        pieces = self.split(text)
        if unknown == "replace":
            return [self.ids.get(piece, self.unknown_id) for piece in pieces]
        ids = [self.ids[piece] for piece in pieces if piece in self.ids]
        if unknown == "error" and len(ids) < len(pieces):
            missing = self.missing(text)
            names = ", ".join(map(repr, missing[:10])) + " and others" * (len(missing) > 10)
            problem = f"the text has {self.unit_name} that are not in the vocabulary of {len(self.pieces):,}: {names}"
            raise UserError(f"{problem}; write something else, or pass --unknown=skip or --unknown=replace")
        return ids

    def missing(self, text: str) -> list[str]:
        return sorted(set(self.split(text)) - set(self.ids))

    def decoder(self) -> Callable[[int | None], str]:
        texts: dict[int | None, str] = {**dict(enumerate(self.pieces)), None: ""}
        texts.update({i: name for name, i in self.specials.items()})
        return lambda i: texts.get(i, "\ufffd")

    def byte_lengths(self) -> np.ndarray:
        return np.array([len(text.encode("utf-8")) for text in self.pieces] + [0] * len(self.specials), np.int64)


class CharTokenizer(LookupTokenizer):
    """One id per character, in the given order, normally by code point."""

    kind, fields, unit_name = "char", {"characters": str}, "characters"

    def __init__(self, characters: str, special: Sequence[str] = ()):
        super().__init__(characters, special)
        self.characters = characters

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """The tokenizer whose vocabulary is every character of text, sorted by code point."""
        return cls("".join(sorted(set(text))))

    def split(self, text: str) -> str:
        return text

    def encode_array(self, text: str) -> np.ndarray:
        encoding, dtype = ("ascii", np.uint8) if text.isascii() else ("utf-32-le", np.uint32)
        ids = self._id_table.take(np.frombuffer(text.encode(encoding), dtype))
        all_known = not len(ids) or ids.max() < MISSING_ID
        return ids if all_known else super().encode_array(text)  # raises UserError for unknown characters

    def encode_parts(self, parts: list[tuple[str, bool]], end_id: int | None) -> np.ndarray:
        if end_id is None:  # many times faster if texts are short
            return self.encode_array("".join(text for text, _ in parts))
        return super().encode_parts(parts, end_id)

    @functools.cached_property
    def _id_table(self) -> np.ndarray:
        """The id of each code point, or MISSING_ID, (0x110000,) uint16."""
        table = np.full(0x110000, MISSING_ID, dtype=np.uint16)
        table[[*map(ord, self.characters)]] = np.arange(len(self.characters))
        return table

    def find_cut(self, text: str) -> int:
        return len(text)


class WordTokenizer(LookupTokenizer):
    """One id per word, punctuation mark or blank; a word includes the space before it.

    spaces_alone makes every blank a token: text is split into \\w+, \\S and \\s, as in the word notebook.
    lower converts text to lower case, which loses the capital letters.
    """

    kind, fields, unit_name = "word", {"words": list, "lower": bool, "spaces_alone": bool}, "words"
    builtin_specials = (UNKNOWN,)
    use_threads = False  # Python's regular expressions hold the GIL

    def __init__(self, words: Sequence[str], special: Sequence[str] = (), lower=False, spaces_alone=False):
        super().__init__(words, special)
        self.words, self.lower, self.spaces_alone = list(words), lower, spaces_alone
        self.pattern = WORD_PATTERN if spaces_alone else SPACED_WORD_PATTERN

    def split(self, text: str) -> list[str]:
        """The words of text, which join to the same text, in lower case if self.lower."""
        return split_words(text, self.lower, self.spaces_alone)

    def encode_array(self, text: str) -> np.ndarray:
        return np.array(self.encode(text, unknown="replace"), dtype=np.uint16)

    def find_cut(self, text: str) -> int:
        return last_word_break(text)

    def is_lossy(self, text: str) -> bool:
        return self.lower and text != text.lower()


def split_words(text: str, lower: bool = False, spaces_alone: bool = False) -> list[str]:
    """Split text into words as WordTokenizer does."""
    return re.findall(WORD_PATTERN if spaces_alone else SPACED_WORD_PATTERN, text.lower() if lower else text)


class TiktokenTokenizer(Tokenizer):
    """Byte pairs, encoded by tiktoken. Declared special tokens have the ids after <|endoftext|>."""

    builtin_specials = (END,)

    encoding: Any  # a tiktoken.Encoding of n_vocab tokens, the last of which is END

    def __init__(self, n_vocab: int, special: Sequence[str]):
        self.start_id = n_vocab - 1
        self.specials = {END: self.start_id, **_assign_ids(special, n_vocab, [END])}
        self.vocab_size = n_vocab + len(special)

    def _encode(self, text: str, unknown: UnknownPolicy) -> list[int]:
        return self.encode_array(text).tolist()

    def encode_array(self, text: str, special: Collection[str] = ()) -> np.ndarray:
        try:
            ids = self.encoding.encode_to_numpy(text, allowed_special={*special}, disallowed_special=())
            return ids.astype(np.uint16)
        except BaseException as error:  # tiktoken's PanicException is not an Exception
            if type(error).__name__ not in ("PanicException", "ValueError"):
                raise
            raise UserError("tiktoken cannot encode hundreds of thousands of consecutive blanks: remove them") from None

    def encode_texts(self, texts: list[str]) -> list[np.ndarray]:
        if not texts or any(END in text for text in texts):
            return super().encode_texts(texts)
        # one call for all texts: for short ones a call takes longer than encoding
        ids = self.encode_array(END.join(texts), special=[END])
        first_ids, *other_ids = np.split(ids, np.flatnonzero(ids == self.end_id))
        return [first_ids, *(array[1:] for array in other_ids)]

    def decoder(self) -> Callable[[int | None], str]:
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda i: utf8.decode(b"" if i is None else self._token_bytes(i), final=i is None)

    def byte_lengths(self) -> np.ndarray:
        lengths = np.array([len(self._token_bytes(i)) for i in range(self.vocab_size)], dtype=np.int64)
        lengths[[*self.specials.values()]] = 0
        return lengths

    def _token_bytes(self, i: int) -> bytes:
        """The bytes of an id; outside the vocabulary a byte that is invalid in UTF-8."""
        if 0 <= i < self.encoding.n_vocab:
            return self.encoding.decode_single_token_bytes(i)
        return next((name.encode("utf-8") for name, number in self.specials.items() if number == i), b"\xff")


class BPETokenizer(TiktokenTokenizer):
    """Byte pairs trained on a text: the 256 bytes, then pairs in the order of their merges, then <|endoftext|>.

    tokens are spelled in GPT-2's alphabet, which has a visible character for every byte. Declared special tokens have
    the ids after <|endoftext|>.
    """

    kind, fields = "bpe", {"tokens": list}

    def __init__(self, tokens: Sequence[str], special: Sequence[str] = ()):
        import tiktoken

        self.tokens = list(tokens)
        codes = {character: byte for byte, character in enumerate(byte_alphabet())}
        ranks = {bytes(codes[c] for c in token): i for i, token in enumerate(tokens) if codes.keys() >= {*token}}
        if len(ranks) < len(tokens) or b"" in ranks or any(bytes([byte]) not in ranks for byte in range(256)):
            problem = "the byte-pair vocabulary lacks a byte, or has an empty, repeated or misspelled token"
            raise UserError(f"{problem}: prepare the data again")
        end = {END: len(tokens)}
        self.encoding = tiktoken.Encoding("bpe", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=end)
        super().__init__(len(tokens) + 1, special)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, special: Sequence[str] = ()) -> "BPETokenizer":
        """Train a tokenizer of at most vocab_size tokens, including special ones, with Hugging Face's tokenizers."""
        import tokenizers

        n_special = 1 + len(special)
        if not 256 + n_special <= vocab_size <= MAX_VOCAB_SIZE:
            min_size = f"{256 + n_special} (256 bytes and the special tokens)"
            raise UserError(f"vocab_size={vocab_size} must be between {min_size} and {MAX_VOCAB_SIZE:,}")
        hf_tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        hf_tokenizer.pre_tokenizer = byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        size, alphabet = vocab_size - n_special, byte_level.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
        hf_tokenizer.train_from_iterator(chain.from_iterable(map(_split_long_runs, texts)), trainer)
        ids = hf_tokenizer.get_vocab()
        return cls(sorted(ids, key=ids.__getitem__), special)


class GPT2Tokenizer(TiktokenTokenizer):
    """GPT-2's byte pairs. <|endoftext|> is built in; further special tokens may be declared."""

    kind, fields = "gpt2", {"sha256": str}

    def __init__(self, special: Sequence[str] = (), sha256: str = "", load: bool = True):
        if load:
            self.encoding, self.sha256 = _load_gpt2()
            if sha256 not in ("", self.sha256):
                problem = "this file was made with a different GPT-2 vocabulary from the one that tiktoken loads here"
                raise UserError(f"{problem}: clear TIKTOKEN_CACHE_DIR, or prepare the data again")
        super().__init__(self.encoding.n_vocab if load else GPT2_VOCAB_SIZE, special)


def _split_long_runs(text: str) -> list[str]:
    """text, cut after every thousand characters of one kind: training time grows with the square of such a run."""
    if max(map(len, text.split()), default=0) < 1000 and not re.search(r"\s{1000}", text):
        return [text]
    bounds = [0, *(match.end() for match in LONG_RUN_PATTERN.finditer(text)), len(text)]
    return [text[a:b] for a, b in zip(bounds, bounds[1:])]


@functools.cache
def byte_alphabet() -> tuple[str, ...]:
    """GPT-2's characters for the 256 bytes: themselves if visible in Latin-1, the others in order from U+0100 on."""
    visible_bytes = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other_bytes = [byte for byte in range(256) if byte not in visible_bytes]
    return tuple(chr(byte if byte in visible_bytes else 0x100 + other_bytes.index(byte)) for byte in range(256))


def is_word_break(previous_char: str, next_char: str) -> bool:
    """Whether a word always ends between these two characters, and its lower case does not depend on what follows.

    Before a punctuation mark it does depend on that: "\u03a3" has another lower case at the end of a word.
    """
    return next_char in " \n" and not previous_char.isspace()


def is_break(previous_char: str, next_char: str) -> bool:
    """Whether every pattern above ends a piece between these two characters, however the text continues."""
    return is_word_break(previous_char, next_char) or next_char in PUNCTUATION and previous_char.isalpha()


def last_break(text: str, is_break_at: Callable[[str, str], bool] = is_break) -> int:
    """The last position in text at which is_break_at is true, 0 if there is none."""
    return next((i for i in range(len(text) - 1, 0, -1) if is_break_at(text[i - 1], text[i])), 0)


def last_word_break(text: str) -> int:
    """The last position in text at which is_word_break is true, 0 if there is none."""
    return last_break(text, is_word_break)


def _assign_ids(special: Sequence[str], first_id: int, existing: Collection[str]) -> dict[str, int]:
    """The ids of special tokens, starting at first_id. Raises UserError for names that are empty or not unique."""
    counts = Counter(special)
    if duplicates := [name for name in special if not name or name in existing or counts[name] > 1]:
        names = ", ".join(map(repr, duplicates[:10]))
        problem = "the names of special tokens must differ from each other and from all other tokens"
        raise UserError(f"{problem}: change {names}")
    return {name: first_id + i for i, name in enumerate(special)}


@functools.cache
def _load_gpt2() -> tuple[Any, str]:
    """(tiktoken's encoding, a hash of all tokens in the order of their ids).

    tiktoken downloads the vocabulary unless it is in TIKTOKEN_CACHE_DIR.
    """
    import tiktoken

    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # from requests, the file system or tiktoken's hash check
        remedy = "connect to the network once, or set TIKTOKEN_CACHE_DIR to a folder with tiktoken's copy of it"
        raise UserError(f"GPT-2's vocabulary could not be loaded ({type(error).__name__}): {remedy}") from error
    tokens = map(encoding.decode_single_token_bytes, range(encoding.n_vocab))
    return encoding, hashlib.sha256(b"".join(len(token).to_bytes(4, "little") + token for token in tokens)).hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# descriptions, from files that may hold anything

KINDS: dict[str, Any] = {cls.kind: cls for cls in (CharTokenizer, WordTokenizer, BPETokenizer, GPT2Tokenizer)}


def from_dict(description: dict, load_gpt2: bool = True, load_template: bool = True) -> Tokenizer:
    """The tokenizer that to_dict described. Raises UserError for anything that to_dict cannot have returned.

    load_gpt2=False does not load GPT-2's vocabulary, which may need a download: the tokenizer has its vocab_size and
    special tokens, but cannot encode. load_template=False ignores the template, which may be unknown to this version.
    """
    if description == UNSUPPORTED_TOKENIZER:
        problem = "donGPT does not have this model's tokenizer and cannot convert its ids to text"
        raise UserError(f"{problem}: use the library that the model came from")
    if not isinstance(description, dict):
        raise UserError("the tokenizer's description is not a dict: prepare the data again")
    kind = description.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        name = repr(kind[:40]) if isinstance(kind, str) else type(kind).__name__
        raise UserError(
            f"the tokenizer kind {name} is unknown: the file may come from a newer version, so update donGPT"
        )
    values: dict[str, Any] = {}
    for key, expected in {**KINDS[kind].fields, "special": list}.items():
        value = values[key] = description.get(key, expected())
        if type(value) is not expected or expected is list and {*map(type, value)} - {str}:
            type_name = {str: "text", bool: "True or False", list: "a list of texts"}[expected]
            raise UserError(f"the tokenizer's {key!r} is not {type_name}: prepare the data again")
        try:
            "".join([] if expected is bool else value).encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"the tokenizer's {key!r} holds half a surrogate pair: prepare the data again") from None
    too_large = (
        f"the tokenizer has more than {MAX_VOCAB_SIZE:,} entries, too many for uint16 ids: use a smaller vocabulary"
    )
    if any(type(value) is not bool and len(value) > MAX_VOCAB_SIZE for value in values.values()):
        raise UserError(too_large)  # before building it takes seconds
    tokenizer = GPT2Tokenizer(load=load_gpt2, **values) if kind == "gpt2" else KINDS[kind](**values)
    if tokenizer.vocab_size > MAX_VOCAB_SIZE:
        raise UserError(too_large)
    if load_template and "template" in description:
        tokenizer.template = Template.from_dict(description["template"])
    return tokenizer


def added_special_tokens(old_dict: dict | None, new_dict: dict | None) -> list[str] | None:
    """The special tokens that new_dict adds to those of old_dict; None if the two differ in anything else.

    A missing description counts as the same vocabulary.
    """
    if not old_dict or not new_dict:
        return []
    old_special, new_special = old_dict.get("special", []), new_dict.get("special", [])
    if old_dict.get("kind") == new_dict.get("kind") == "gpt2":  # an assumed vocabulary has no hash
        same_base = len({old_dict.get("sha256"), new_dict.get("sha256")} - {None}) <= 1
    else:
        same_base = {**old_dict, "special": [], "template": {}} == {**new_dict, "special": [], "template": {}}
    return new_special[len(old_special) :] if same_base and new_special[: len(old_special)] == old_special else None
