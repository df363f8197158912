"""Text to ids and back: characters, words, byte pairs trained on a text, GPT-2's byte pairs, behind one interface.

Special tokens are declared by name and get the ids after all others. Plain text never produces one: encode recognises
them only with special=True.
A tokenizer travels inside every checkpoint and meta.json as a plain dict (to_dict, from_dict), so preparing a data set
again never changes the meaning of an old model.
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

UNSUPPORTED_TOKENIZER = {"kind": "foreign"}  # describes a tokenizer that exists but is none of these
END = "<|endoftext|>"  # the special token after each of several documents
UNKNOWN = "<unk>"  # the special token for a word that is not in the vocabulary
MAX_VOCAB_SIZE = 2**16  # entries of a vocabulary: ids are stored as uint16
MISSING_ID = MAX_VOCAB_SIZE - 1  # marks unknown characters in CharTokenizer's table
# openai/gpt-2, encoder.py
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
GPT2_VOCAB_SIZE = 50257  # entries of GPT-2's vocabulary
WORD_PATTERN, SPACED_WORD_PATTERN = r"\w+|\S|\s", r" ?\w+| ?[^\w\s]|\s"
PUNCTUATION = '.,;:!?()[]"-\u3001\u3002\uff0c\uff01\uff1f'  # neither letters nor digits nor blanks in any Unicode
LONG_RUN_PATTERN = re.compile(r"\w{1000}|\s{1000}|[^\w\s]{1000}")
UnknownPolicy = Literal["error", "skip", "replace"]


class Tokenizer:
    """The interface: encode("hi") -> [5, 6]; decode([5, 6]) -> "hi"; stream([5, 6]) yields "h", "i"."""

    kind: str
    fields: dict[str, type] = {}  # attributes that to_dict holds, besides the special tokens and the template
    builtin_specials: tuple[str, ...] = ()  # special tokens of every tokenizer of this kind
    vocab_size: int  # number of ids, special tokens included
    start_id: int  # the model's input for an empty prompt
    specials: dict[str, int] = {}  # the declared special tokens with their ids
    use_threads = True  # several threads encode faster than one
    template: Template | None = None  # how conversations were written for the model, if it was trained on any

    @property
    def end_id(self) -> int | None:
        """The id after each of several documents; None if documents follow each other without one."""
        return self.specials.get(END)

    def encode(self, text: str, special: bool = False, unknown: UnknownPolicy = "error") -> list[int]:
        """The ids of text. Whatever is not in the vocabulary is skipped, replaced, or named in a UserError."""
        if not special or not self.specials:
            return self._encode(text, unknown)
        names = sorted(self.specials, key=len, reverse=True)  # where several match, the longest counts
        pieces = re.split(f"({'|'.join(map(re.escape, names))})", text)
        ids = ([self.specials[p]] if p in self.specials else self._encode(p, unknown) for p in pieces)
        return [*chain.from_iterable(ids)]

    def _encode(self, text: str, unknown: UnknownPolicy) -> list[int]:
        raise NotImplementedError

    def encode_array(self, text: str) -> np.ndarray:
        """encode(text) as (n,) uint16, for long texts; words that are too rare for the vocabulary become <unk>."""
        return np.array(self.encode(text), dtype=np.uint16)

    def encode_texts(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each of texts, (n,) uint16."""
        return [self.encode_array(text) for text in texts]

    def encode_parts(self, parts: list[tuple[str, bool]], end_id: int | None) -> np.ndarray:
        """The ids of texts one by one, (n,) uint16, each followed by end_id, if there is one, where its flag is set."""
        end = np.array([] if end_id is None else [end_id], dtype=np.uint16)
        encoded = self.encode_texts([text for text, _ in parts])
        return np.concatenate([end[:0], *chain(*((ids, end[:ends]) for ids, (_, ends) in zip(encoded, parts)))])

    def missing(self, text: str) -> list[str]:
        """The pieces of text that are not in the vocabulary, sorted."""
        return []

    def is_lossy(self, text: str) -> bool:
        """Whether ids cannot give text back for another reason than missing vocabulary, such as lowered letters."""
        return False

    def find_cut(self, text: str) -> int:
        """Last place where text, however it continues, may be cut so that its parts give the ids of the whole; or 0."""
        return last_break(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are not UTF-8, and ids outside the vocabulary, become U+FFFD."""
        return "".join(self.stream(ids))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of ids in pieces; a character that is split over ids comes complete, with its last one."""
        decode = self.decoder()
        yield from filter(None, (decode(i) for i in chain(ids, [None])))

    def decoder(self) -> Callable[[int | None], str]:
        """A function that takes one id at a time and returns the text completed by it; None ends the text."""
        raise NotImplementedError

    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes of source text per id, (vocab_size,) int64; 0 for special tokens."""
        raise NotImplementedError

    def to_dict(self) -> dict:
        """A plain dict of str, int, bool and lists of them from which from_dict makes the same tokenizer."""
        description = {"kind": self.kind, **{name: getattr(self, name) for name in self.fields}}
        if special := sorted({*self.specials} - {*self.builtin_specials}, key=self.specials.__getitem__):
            description["special"] = special
        if self.template:
            description["template"] = self.template.to_dict()
        return description


class LookupTokenizer(Tokenizer):
    """Splits text into pieces and looks them up in a list: what characters and words have in common."""

    unit_name: str  # in messages

    def __init__(self, pieces: Sequence[str], special: Sequence[str]):
        if not pieces or len(set(pieces)) != len(pieces):
            raise UserError(f"a vocabulary needs {self.unit_name}, all of them different: prepare the data again")
        self.pieces = pieces  # text of each id, special tokens excluded
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
    """One id per character, in the order of the characters given, by convention that of their code points."""

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
        return ids if all_known else super().encode_array(text)  # raises UserError for what is unknown

    def encode_parts(self, parts: list[tuple[str, bool]], end_id: int | None) -> np.ndarray:
        if end_id is None:  # many times faster for short texts
            return self.encode_array("".join(text for text, _ in parts))
        return super().encode_parts(parts, end_id)

    @functools.cached_property
    def _id_table(self) -> np.ndarray:
        """The id of each code point, MISSING_ID if it has none, (0x110000,) uint16."""
        table = np.full(0x110000, MISSING_ID, dtype=np.uint16)
        table[[*map(ord, self.characters)]] = np.arange(len(self.characters))
        return table

    def find_cut(self, text: str) -> int:
        return len(text)


class WordTokenizer(LookupTokenizer):
    """One id per word, punctuation mark or blank; a space belongs to the word after it unless spaces_alone.

    With spaces_alone a text is split into \\w+, \\S and \\s, as in the word notebook. lower: capitals are lost.
    """

    kind, fields, unit_name = "word", {"words": list, "lower": bool, "spaces_alone": bool}, "words"
    builtin_specials = (UNKNOWN,)
    use_threads = False  # Python's regular expressions run in one thread at a time

    def __init__(self, words: Sequence[str], special: Sequence[str] = (), lower=False, spaces_alone=False):
        super().__init__(words, special)
        self.words, self.lower, self.spaces_alone = list(words), lower, spaces_alone
        self.pattern = WORD_PATTERN if spaces_alone else SPACED_WORD_PATTERN

    def split(self, text: str) -> list[str]:
        """The words of text, the same text when joined, in small letters if lower."""
        return split_words(text, self.lower, self.spaces_alone)

    def encode_array(self, text: str) -> np.ndarray:
        return np.array(self.encode(text, unknown="replace"), dtype=np.uint16)

    def find_cut(self, text: str) -> int:
        return last_word_break(text)

    def is_lossy(self, text: str) -> bool:
        return self.lower and text != text.lower()


def split_words(text: str, lower: bool = False, spaces_alone: bool = False) -> list[str]:
    """The words of text, as WordTokenizer splits it."""
    return re.findall(WORD_PATTERN if spaces_alone else SPACED_WORD_PATTERN, text.lower() if lower else text)


class TiktokenTokenizer(Tokenizer):
    """Byte pairs by tiktoken. Special tokens that are declared follow the encoding's own."""

    builtin_specials = (END,)

    encoding: Any  # a tiktoken.Encoding of n_vocab entries, of which END is the last

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
        except BaseException as error:  # tiktoken's PanicException is no Exception
            if type(error).__name__ not in ("PanicException", "ValueError"):
                raise
            raise UserError("tiktoken cannot split hundreds of thousands of blanks in a row: take them out") from None

    def encode_texts(self, texts: list[str]) -> list[np.ndarray]:
        if not texts or any(END in text for text in texts):
            return super().encode_texts(texts)
        # one call for all: many short texts would take longer to hand over than to encode
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
        """The bytes of one id; outside the vocabulary a byte that is not UTF-8."""
        if 0 <= i < self.encoding.n_vocab:
            return self.encoding.decode_single_token_bytes(i)
        return next((name.encode("utf-8") for name, number in self.specials.items() if number == i), b"\xff")


class BPETokenizer(TiktokenTokenizer):
    """Byte pairs trained on a text: ids of the 256 bytes, then of pairs in the order in which they were merged.

    tokens are spelled in GPT-2's alphabet, in which every byte is a visible character. <|endoftext|> follows, then the
    special tokens that are declared.
    """

    kind, fields = "bpe", {"tokens": list}

    def __init__(self, tokens: Sequence[str], special: Sequence[str] = ()):
        import tiktoken

        self.tokens = list(tokens)
        codes = {character: byte for byte, character in enumerate(byte_alphabet())}
        ranks = {bytes(codes[c] for c in token): i for i, token in enumerate(tokens) if codes.keys() >= {*token}}
        if len(ranks) < len(tokens) or b"" in ranks or any(bytes([byte]) not in ranks for byte in range(256)):
            problem = "the vocabulary of byte pairs lacks a byte, or has a token that is empty, there twice or no bytes"
            raise UserError(f"{problem}: prepare the data again")
        end = {END: len(tokens)}
        self.encoding = tiktoken.Encoding("bpe", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=end)
        super().__init__(len(tokens) + 1, special)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, special: Sequence[str] = ()) -> "BPETokenizer":
        """The tokenizer of at most vocab_size entries, special tokens included, trained on texts by Hugging Face."""
        import tokenizers

        n_special = 1 + len(special)
        if not 256 + n_special <= vocab_size <= MAX_VOCAB_SIZE:
            min_size = f"{256 + n_special} (the bytes and the special tokens)"
            raise UserError(f"vocab_size={vocab_size} must be from {min_size} to {MAX_VOCAB_SIZE:,}")
        hf_tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        hf_tokenizer.pre_tokenizer = byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        size, alphabet = vocab_size - n_special, byte_level.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
        hf_tokenizer.train_from_iterator(chain.from_iterable(map(_split_long_runs, texts)), trainer)
        ids = hf_tokenizer.get_vocab()
        return cls(sorted(ids, key=ids.__getitem__), special)


class GPT2Tokenizer(TiktokenTokenizer):
    """GPT-2's byte-pair encoding by tiktoken; <|endoftext|> is its own special token, others may be declared."""

    kind, fields = "gpt2", {"sha256": str}

    def __init__(self, special: Sequence[str] = (), sha256: str = "", load: bool = True):
        if load:
            self.encoding, self.sha256 = _load_gpt2()
            if sha256 not in ("", self.sha256):
                problem = "this file's GPT-2 vocabulary is not the one that tiktoken loads here"
                raise UserError(f"{problem}: clear TIKTOKEN_CACHE_DIR, or prepare the data again")
        super().__init__(self.encoding.n_vocab if load else GPT2_VOCAB_SIZE, special)


def _split_long_runs(text: str) -> list[str]:
    """text cut after every thousand characters of one kind, since the time of training grows with their square."""
    if max(map(len, text.split()), default=0) < 1000 and not re.search(r"\s{1000}", text):
        return [text]
    bounds = [0, *(match.end() for match in LONG_RUN_PATTERN.finditer(text)), len(text)]
    return [text[a:b] for a, b in zip(bounds, bounds[1:])]


@functools.cache
def byte_alphabet() -> tuple[str, ...]:
    """The character that GPT-2 writes for each of the 256 bytes: itself if it is visible Latin-1, else one of the
    characters from U+0100 on, in order."""
    visible_bytes = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other_bytes = [byte for byte in range(256) if byte not in visible_bytes]
    return tuple(chr(byte if byte in visible_bytes else 0x100 + other_bytes.index(byte)) for byte in range(256))


def is_word_break(previous_char: str, next_char: str) -> bool:
    """Whether a word always ends between these two characters, and lowering it does not depend on what follows.

    (Before a mark it does: the capital sigma in "\u03a3." becomes another letter at the end of a word.)
    """
    return next_char in " \n" and not previous_char.isspace()


def is_break(previous_char: str, next_char: str) -> bool:
    """Whether all patterns above end a piece between these two characters, however the text continues."""
    return is_word_break(previous_char, next_char) or next_char in PUNCTUATION and previous_char.isalpha()


def last_break(text: str, is_break_at: Callable[[str, str], bool] = is_break) -> int:
    """The last position in text where is_break_at, 0 if there is none."""
    return next((i for i in range(len(text) - 1, 0, -1) if is_break_at(text[i - 1], text[i])), 0)


def last_word_break(text: str) -> int:
    """The last place in text that is_word_break, 0 if there is none."""
    return last_break(text, is_word_break)


def _assign_ids(special: Sequence[str], first_id: int, existing: Collection[str]) -> dict[str, int]:
    """Special tokens with their ids, from first_id on. Raises UserError for names that cannot be told apart."""
    counts = Counter(special)
    if duplicates := [name for name in special if not name or name in existing or counts[name] > 1]:
        names = ", ".join(map(repr, duplicates[:10]))
        problem = "special tokens must have names that differ, from each other and from all else in the vocabulary"
        raise UserError(f"{problem}: change {names}")
    return {name: first_id + i for i, name in enumerate(special)}


@functools.cache
def _load_gpt2() -> tuple[Any, str]:
    """(tiktoken's encoding, a hash of all tokens in the order of their ids).

    tiktoken takes the vocabulary from TIKTOKEN_CACHE_DIR if it is there, else it downloads it.
    """
    import tiktoken

    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # tiktoken hands on whatever requests, the file system or its hash check raise
        remedy = "connect to a network once, or set TIKTOKEN_CACHE_DIR to a folder that holds tiktoken's copy of it"
        raise UserError(f"GPT-2's vocabulary could not be loaded ({type(error).__name__}): {remedy}") from error
    tokens = map(encoding.decode_single_token_bytes, range(encoding.n_vocab))
    return encoding, hashlib.sha256(b"".join(len(token).to_bytes(4, "little") + token for token in tokens)).hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# descriptions, from files that may hold anything

KINDS: dict[str, Any] = {cls.kind: cls for cls in (CharTokenizer, WordTokenizer, BPETokenizer, GPT2Tokenizer)}


def from_dict(description: dict, load_gpt2: bool = True, load_template: bool = True) -> Tokenizer:
    """The tokenizer that to_dict described. Raises UserError for anything that to_dict cannot have returned.

    load_gpt2=False spares loading GPT-2's vocabulary, which may have to be downloaded: its tokenizer then knows its
    vocab_size and special tokens, but cannot encode. load_template=False ignores a template, which may be a newer one.
    """
    if description == UNSUPPORTED_TOKENIZER:
        problem = "this model's tokenizer is not one that donGPT has, so its ids cannot be shown as text"
        raise UserError(f"{problem}: use the library that it came from")
    if not isinstance(description, dict):
        raise UserError("the tokenizer's description is not a dict: prepare the data again")
    kind = description.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        name = repr(kind[:40]) if isinstance(kind, str) else type(kind).__name__
        raise UserError(f"tokenizer kind {name} is not known: this file was written by a newer donGPT, update yours")
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
    too_large = f"the tokenizer has more than {MAX_VOCAB_SIZE:,} entries, too many for uint16 ids: use another"
    if any(type(value) is not bool and len(value) > MAX_VOCAB_SIZE for value in values.values()):
        raise UserError(too_large)  # before seconds are spent on it
    tokenizer = GPT2Tokenizer(load=load_gpt2, **values) if kind == "gpt2" else KINDS[kind](**values)
    if tokenizer.vocab_size > MAX_VOCAB_SIZE:
        raise UserError(too_large)
    if load_template and "template" in description:
        tokenizer.template = Template.from_dict(description["template"])
    return tokenizer


def added_special_tokens(old_dict: dict | None, new_dict: dict | None) -> list[str] | None:
    """The special tokens that new_dict declares in addition to those of old_dict; None if they differ in more.

    A description that is missing is taken for the same vocabulary.
    """
    if not old_dict or not new_dict:
        return []
    old_special, new_special = old_dict.get("special", []), new_dict.get("special", [])
    if old_dict.get("kind") == new_dict.get("kind") == "gpt2":  # one that is only assumed has no hash
        same_base = len({old_dict.get("sha256"), new_dict.get("sha256")} - {None}) <= 1
    else:
        same_base = {**old_dict, "special": [], "template": {}} == {**new_dict, "special": [], "template": {}}
    return new_special[len(old_special) :] if same_base and new_special[: len(old_special)] == old_special else None
