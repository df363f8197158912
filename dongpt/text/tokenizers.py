"""Tokenizers with a common interface: characters, words, BPE trained on your text, and GPT-2's BPE.

Special tokens are declared by name and have the highest ids. Plain text never produces them, because encode recognizes
them only with special=True. Every checkpoint and meta.json stores its tokenizer as a plain dict (to_dict, from_dict).
Preparing a dataset again therefore does not affect existing checkpoints.
"""

import codecs
import functools
import hashlib
import re
import unicodedata
from collections import Counter
from itertools import chain, combinations
from typing import Any, Callable, Collection, Iterable, Iterator, Literal, Sequence

import numpy as np

from configurator import UserError
from dongpt.text.template import Template

UNSUPPORTED_TOKENIZER = {"kind": "foreign"}  # stands for a tokenizer that none of these classes implements
END = "<|endoftext|>"  # special token at the end of a document
UNKNOWN = "<unk>"  # special token for words outside the vocabulary
FIRST_MARK = 0x300  # code point of the first combining mark
MAX_LETTER_CHARS = 8  # longer letters with their marks are only looked up in NFC and NFD
MARK_GROUP_CHARS = 1000  # marks at most this far apart are split from the rest of the text together
MAX_VOCAB_SIZE = 2**16  # tokens in a vocabulary, since ids are stored as uint16
MISSING_ID = MAX_VOCAB_SIZE - 1  # marks unknown characters in CharTokenizer's table
# openai/gpt-2, encoder.py
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
GPT2_VOCAB_SIZE = 50257  # entries of GPT-2's vocabulary
SPACE_BEFORE = " ?"  # prefix of word_pattern: words and symbols include a preceding space
JOINERS = "\u200c\u200d"  # invisible; they shape the letters of words in Persian and in the scripts of India
# GPT-2's pattern, but letters keep their combining marks and joiners
MARKED_BPE_PATTERN = GPT2_PATTERN.replace(r"\p{L}+", rf"\p{{L}}[\p{{L}}\p{{M}}{JOINERS}]*", 1)
PUNCTUATION = '.,;:!?()[]"-\u3001\u3002\uff0c\uff01\uff1f'  # not letters, digits or spaces in any version of Unicode
BPE_TRAIN_WORDS = 2**18  # distinct words that a BPE tokenizer is trained on, since each takes nearly a kilobyte
UnknownPolicy = Literal["error", "skip", "replace"]


class Tokenizer:
    """Base class. encode("hi") returns ids such as [5, 6], and decode([5, 6]) returns "hi"."""

    kind: str
    fields: dict[str, type] = {}  # attributes stored by to_dict, in addition to special tokens and template
    builtin_specials: tuple[str, ...] = ()  # special tokens that every tokenizer of this kind has
    vocab_size: int  # number of ids, including special tokens
    start_id: int  # the input to the model if the prompt is empty
    specials: dict[str, int] = {}  # ids of the special tokens by name
    use_threads = True  # whether multiple threads encode faster than one
    template: Template | None = None  # chat format that the model was trained on, if any
    has_own_start = False  # whether start_id was set for this data, in which <|endoftext|> never occurs

    @property
    def end_id(self) -> int | None:
        """The id of <|endoftext|>, which ends a document, or None if it is not in the vocabulary."""
        return self.specials.get(END)

    def set_start(self, start_id: int):
        """Set the model's first input for empty prompts, for data in which <|endoftext|> never occurs."""
        self.start_id, self.has_own_start = start_id, True

    def encode(self, text: str, special: bool = False, unknown: UnknownPolicy = "error") -> list[int]:
        """Convert text to ids. Pieces outside the vocabulary are skipped, replaced, or reported in a UserError.

        A piece is outside the vocabulary if the vocabulary has none of its Unicode normal forms (see known_form).
        """
        if not special or not self.specials:
            return self._encode(self.known_form(text), unknown)
        names = sorted(self.specials, key=len, reverse=True)  # the longest match wins
        pieces = re.split(f"({'|'.join(map(re.escape, names))})", text)
        ids = ([self.specials[p]] if p in self.specials else self._encode(self.known_form(p), unknown) for p in pieces)
        return [*chain.from_iterable(ids)]

    def _encode(self, text: str, unknown: UnknownPolicy) -> list[int]:
        raise NotImplementedError

    def encode_array(self, text: str) -> np.ndarray:
        """Convert a long text to ids, (n,) uint16, without normalizing it. Unknown words become <unk>."""
        return np.array(self._encode(text, "error"), dtype=np.uint16)

    def encode_texts(self, texts: list[str]) -> list[np.ndarray]:
        """Convert each text to ids, (n,) uint16."""
        return [self.encode_array(text) for text in texts]

    def encode_parts(self, parts: list[tuple[str, bool]], end_id: int | None) -> np.ndarray:
        """Convert [(text, whether a document ends), ...] to ids, (n,) uint16. end_id, if any, follows each document."""
        end = np.array([] if end_id is None else [end_id], dtype=np.uint16)
        encoded = self.encode_texts([text for text, _ in parts])
        return np.concatenate([end[:0], *chain(*((ids, end[:ends]) for ids, (_, ends) in zip(encoded, parts)))])

    def missing(self, text: str) -> list[str]:
        """Return a sorted list of the pieces of text that encode() cannot convert to ids."""
        return []

    def known_form(self, text: str) -> str:
        """Return text with each word in the Unicode normal form, NFC or NFD, that the vocabulary contains."""
        return text

    def is_lossy(self, text: str) -> bool:
        """Return True if encoding loses information other than unknown pieces, for example by lowercasing."""
        return False

    def find_cut(self, text: str) -> int:
        """Return the last position where a cut cannot change the ids, whatever text follows, or 0 if there is none."""
        return last_break(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Convert ids to text. Invalid UTF-8 and ids outside the vocabulary become U+FFFD."""
        return "".join(self.stream(ids))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of ids in pieces. A character that spans several ids is yielded with the last of these ids."""
        decode = self.decoder()
        yield from filter(None, (decode(i) for i in chain(ids, [None])))

    def decoder(self) -> Callable[[int | None], str]:
        """Return a function that maps one id at a time, or None at the end, to the text that it completes."""
        raise NotImplementedError

    def byte_lengths(self) -> np.ndarray:
        """Return the number of UTF-8 bytes per id, (vocab_size,) int64. It is 0 for special tokens."""
        raise NotImplementedError

    def to_dict(self) -> dict:
        """Return a dict of plain Python types from which from_dict can recreate the tokenizer."""
        description = {"kind": self.kind, **{name: getattr(self, name) for name in self.fields}}
        if not description.get("keep_marks", True):  # as in descriptions from before it existed
            del description["keep_marks"]
        if special := sorted({*self.specials} - {*self.builtin_specials}, key=self.specials.__getitem__):
            description["special"] = special
        if self.has_own_start:
            description["start_id"] = self.start_id
        if self.template:
            description["template"] = self.template.to_dict()
        return description


class LookupTokenizer(Tokenizer):
    """Tokenizer that splits text into pieces and looks up their ids. Base class for characters and words."""

    unit_name: str  # what error messages call the pieces

    def __init__(self, pieces: Sequence[str], special: Sequence[str]):
        if not pieces or len(set(pieces)) != len(pieces):
            raise UserError(f"the vocabulary has no {self.unit_name}, or has duplicates: prepare the data again")
        self.pieces = pieces  # text of each id, without special tokens
        self.ids = {piece: i for i, piece in enumerate(pieces)}
        self.specials = _assign_ids([*self.builtin_specials, *special], len(pieces), self.ids)
        self.vocab_size = len(pieces) + len(self.specials)
        self.unknown_id = self.specials.get(UNKNOWN, next((self.ids[c] for c in "\ufffd?_ " if c in self.ids), 0))
        self.start_id = self.specials.get(END, self.ids.get("\n", self.specials.get(UNKNOWN, 0)))

    def split(self, text: str) -> Sequence[str]:
        """Split text into pieces."""
        raise NotImplementedError

    def _encode(self, text: str, unknown: UnknownPolicy) -> list[int]:
        pieces = self.split(text)
        if unknown == "replace":
            return [self.ids.get(piece, self.unknown_id) for piece in pieces]
        ids = [self.ids[piece] for piece in pieces if piece in self.ids]
        if unknown == "error" and len(ids) < len(pieces):
            missing = self._unknown_pieces(text)
            names = ", ".join(map(repr, missing[:10])) + " and others" * (len(missing) > 10)
            vocabulary = f"the vocabulary of {len(self.pieces):,} {self.unit_name}"
            problem = f"the text has {self.unit_name} that are not in {vocabulary}: {names}"
            raise UserError(f"{problem}; use a different text, or pass --unknown=skip or --unknown=replace")
        return ids

    def _unknown_pieces(self, text: str) -> list[str]:
        return sorted(set(self.split(text)) - self.ids.keys())

    def missing(self, text: str) -> list[str]:
        return self._unknown_pieces(self.known_form(text))

    def known_form(self, text: str) -> str:
        if text.isascii() or not self._unknown_pieces(text):  # ASCII has one form
            return text
        words = map(self._best_form, re.findall(r" ?\S+|\s", text))
        return "".join(self._best_form(piece) for word in words for piece in self.split(word))

    def _best_form(self, text: str) -> str:
        """Return text in the form with the fewest unknown pieces: as given, NFC, NFD, or with pieces NFC changes."""
        composed = unicodedata.normalize("NFC", text)
        forms = [text, composed, unicodedata.normalize("NFD", text)]
        if all(map(self._unknown_pieces, forms)):
            forms.append(functools.reduce(lambda form, pair: form.replace(*pair), self._changed_by_nfc, composed))
        return min(forms, key=lambda form: len(self._unknown_pieces(form)))

    @functools.cached_property
    def _changed_by_nfc(self) -> list[tuple[str, str]]:
        """The pieces that NFC changes, such as U+212B, as a list [(NFC, piece), ...] with the longest first."""
        pairs = [(unicodedata.normalize("NFC", piece), piece) for piece in self.pieces if not piece.isascii()]
        return sorted((pair for pair in pairs if pair[0] != pair[1]), key=lambda pair: -len(pair[0]))

    def decoder(self) -> Callable[[int | None], str]:
        texts = self._texts
        return lambda i: texts.get(None if i is None else int(i), "\ufffd")  # ids may be scalars of torch or NumPy

    @functools.cached_property
    def _texts(self) -> dict[int | None, str]:
        """The text of each id, and "" for None."""
        texts: dict[int | None, str] = {**dict(enumerate(self.pieces)), None: ""}
        return texts | {i: name for name, i in self.specials.items()}

    def byte_lengths(self) -> np.ndarray:
        return np.array([len(text.encode("utf-8")) for text in self.pieces] + [0] * len(self.specials), np.int64)


class CharTokenizer(LookupTokenizer):
    """Tokenizer with one id per character, in the given order."""

    kind, fields, unit_name = "char", {"characters": str}, "characters"

    def __init__(self, characters: str, special: Sequence[str] = ()):
        super().__init__(characters, special)
        self.characters = characters

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """Create a tokenizer whose vocabulary is the characters in text, sorted by code point."""
        return cls("".join(sorted(set(text))))

    def split(self, text: str) -> str:
        return text

    def encode_array(self, text: str) -> np.ndarray:
        encoding, dtype = ("ascii", np.uint8) if text.isascii() else ("utf-32-le", np.uint32)
        ids = self._id_table.take(np.frombuffer(text.encode(encoding), dtype))
        all_known = not len(ids) or ids.max() < MISSING_ID
        return ids if all_known else super().encode_array(text)  # raises UserError for unknown characters

    def encode_parts(self, parts: list[tuple[str, bool]], end_id: int | None) -> np.ndarray:
        if end_id is None:  # much faster if the texts are short
            return self.encode_array("".join(text for text, _ in parts))
        return super().encode_parts(parts, end_id)

    @functools.cached_property
    def _id_table(self) -> np.ndarray:
        """Array (0x110000,) uint16 that maps each code point to its id, or to MISSING_ID if it has none."""
        table = np.full(0x110000, MISSING_ID, dtype=np.uint16)
        table[[*map(ord, self.characters)]] = np.arange(len(self.characters))
        return table

    def find_cut(self, text: str) -> int:
        return len(text)

    def _best_form(self, text: str) -> str:
        form = super()._best_form(text)
        starts = [i for i, c in enumerate(form) if not (i and unicodedata.combining(c))]
        return "".join(self._known_letter(form[a:b]) for a, b in zip(starts, [*starts[1:], len(form)]))

    def _known_letter(self, letter: str) -> str:
        """Return a letter in a form whose characters are known, such as U+00EA U+0323 for U+1EC7, or else unchanged."""
        nfd = unicodedata.normalize("NFD", letter)
        if not self._unknown_pieces(letter) or len(nfd) > MAX_LETTER_CHARS:
            return letter
        parts = ["".join(marks) for n in (3, 2, 1, 0) for marks in combinations(nfd[1:], n)]
        forms = [unicodedata.normalize("NFC", nfd[0] + p) + "".join(c for c in nfd[1:] if c not in p) for p in parts]
        known = [form for form in forms if unicodedata.normalize("NFD", form) == nfd and not self._unknown_pieces(form)]
        return known[0] if known else letter


class WordTokenizer(LookupTokenizer):
    """Tokenizer with one id per word, punctuation mark or whitespace character. Words include a preceding space.

    Letters and symbols keep their combining marks, except in older vocabularies, which do not store keep_marks.
    With spaces_alone=True, spaces and combining marks are separate tokens: as in the word notebook, text is split by
    the regex \\w+|\\S|\\s. With lower=True, text is converted to lowercase, so capital letters cannot be restored.
    """

    kind, unit_name = "word", "words"
    fields = {"words": list, "lower": bool, "spaces_alone": bool, "keep_marks": bool}
    builtin_specials = (UNKNOWN,)
    use_threads = False  # Python's regular expressions hold the GIL

    def __init__(
        self, words: Sequence[str], special: Sequence[str] = (), lower=False, spaces_alone=False, keep_marks=True
    ):
        super().__init__(words, special)
        self.words, self.lower, self.spaces_alone = list(words), lower, spaces_alone
        self.keep_marks = keep_marks and not spaces_alone

    def split(self, text: str) -> list[str]:
        """Split text into words. Joining them restores the text, or its lowercase form if self.lower is True."""
        return split_words(text, self.lower, self.spaces_alone, self.keep_marks)

    def encode_array(self, text: str) -> np.ndarray:
        return np.array(self._encode(text, "replace"), dtype=np.uint16)

    def find_cut(self, text: str) -> int:
        return last_word_break(text)

    def is_lossy(self, text: str) -> bool:
        return self.lower and text != text.lower()


def word_pattern(prefix: str, marks: str | None = None, word: str = r"\w", space: str = r"\s") -> str:
    """Return the regex that splits text into words. Unless marks is None, marks belong to the character before them.

    marks, word and space are the contents of character classes, which differ between regex engines.
    """
    more, symbol_more = "+", ""
    if marks is not None:
        more, symbol_more = f"[{word}{marks}{JOINERS}]*", marks and f"[{marks}]*"
    return f"{prefix}[{word}]{more}|{prefix}[^{word}{space}]{symbol_more}|[{space}]"


def split_words(text: str, lower: bool = False, spaces_alone: bool = False, keep_marks: bool = True) -> list[str]:
    """Split text into words in the same way as WordTokenizer."""
    text, words, start = text.lower() if lower else text, [], 0
    if spaces_alone:
        return re.findall(word_pattern(""), text)
    plain = re.compile(word_pattern(SPACE_BEFORE))
    marks = _marks_in(text) if keep_marks else ""
    if not marks:
        return plain.findall(text)
    marked = re.compile(word_pattern(SPACE_BEFORE, re.sub(f"[{JOINERS}]", "", marks)))
    if len(text) <= MARK_GROUP_CHARS:
        return marked.findall(text)
    # the longer pattern takes twice as long, so it is used only for lines near a mark
    positions = np.flatnonzero(np.isin(_code_points(text), [*map(ord, marks)]))
    for group in np.split(positions, np.flatnonzero(np.diff(positions) > MARK_GROUP_CHARS) + 1):
        line_start = max(start, text.rfind("\n", start, group[0]) + 1)
        line_end = text.find("\n", max(start, group[-1]))
        line_end = len(text) if line_end < 0 else line_end
        words += plain.findall(text, start, line_start) + marked.findall(text, line_start, line_end)
        start = line_end
    return words + plain.findall(text, start)


def _marks_in(text: str) -> str:
    """Return the different combining marks and joiners in text."""
    if text.isascii():
        return ""
    codes = _code_points(text if len(text) > MARK_GROUP_CHARS else "")  # much faster than a set for long texts
    characters = {*map(chr, np.unique(codes[codes >= FIRST_MARK]))} if len(codes) else {*text}
    return "".join(c for c in sorted(characters) if c in JOINERS or unicodedata.category(c)[0] == "M")


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


class TiktokenTokenizer(Tokenizer):
    """BPE tokenizer that encodes with tiktoken. Other special tokens have the ids after <|endoftext|>."""

    builtin_specials = (END,)

    encoding: Any  # a tiktoken.Encoding of n_vocab tokens, the last of which is END
    newline_id: int

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
            raise UserError("tiktoken cannot encode hundreds of thousands of consecutive spaces: remove them") from None

    def encode_texts(self, texts: list[str]) -> list[np.ndarray]:
        if not texts or any(END in text for text in texts):
            return super().encode_texts(texts)
        # one call for all texts, because for short texts the call takes longer than the encoding
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
        """Return the bytes of an id. If it is outside the vocabulary, return a byte that is not valid in UTF-8."""
        if 0 <= i < self.encoding.n_vocab:
            return self.encoding.decode_single_token_bytes(i)
        return next((name.encode("utf-8") for name, number in self.specials.items() if number == i), b"\xff")


class BPETokenizer(TiktokenTokenizer):
    """BPE tokenizer trained on a text. The vocabulary consists of the 256 bytes, the learned merges and <|endoftext|>.

    tokens uses GPT-2's alphabet, which represents every byte by a visible character. Other special tokens have the ids
    after <|endoftext|>. Letters keep their combining marks, except in older vocabularies, which do not store keep_marks
    and split text in the same way as GPT-2.
    """

    kind, fields = "bpe", {"tokens": list, "keep_marks": bool}

    def __init__(self, tokens: Sequence[str], special: Sequence[str] = (), keep_marks=True):
        import tiktoken

        self.tokens, self.keep_marks = list(tokens), keep_marks
        pattern = MARKED_BPE_PATTERN if keep_marks else GPT2_PATTERN
        codes = {character: byte for byte, character in enumerate(byte_alphabet())}
        ranks = {bytes(codes[c] for c in token): i for i, token in enumerate(tokens) if codes.keys() >= {*token}}
        if len(ranks) < len(tokens) or b"" in ranks or any(bytes([byte]) not in ranks for byte in range(256)):
            problem = "the BPE vocabulary lacks a byte, or has an empty, duplicate or invalid token"
            raise UserError(f"{problem}: prepare the data again")
        end = {END: len(tokens)}
        self.encoding = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=end)
        self.newline_id = ranks[b"\n"]
        super().__init__(len(tokens) + 1, special)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, special: Sequence[str] = ()) -> "BPETokenizer":
        """Train a tokenizer with Hugging Face's tokenizers. vocab_size is a maximum that includes special tokens.

        Reading stops after about BPE_TRAIN_WORDS distinct words.
        """
        import tokenizers

        n_special = 1 + len(special)
        if not 256 + n_special <= vocab_size <= MAX_VOCAB_SIZE:
            min_size = f"{256 + n_special} (256 bytes and the special tokens)"
            raise UserError(f"vocab_size={vocab_size} must be between {min_size} and {MAX_VOCAB_SIZE:,}")
        hf_tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        hf_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.CharDelimiterSplit("\n")
        size, alphabet = vocab_size - n_special, list(byte_alphabet())
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
        hf_tokenizer.train_from_iterator(_delimit_words(texts), trainer)
        ids = hf_tokenizer.get_vocab()
        return cls(sorted(ids, key=ids.__getitem__), special)


class GPT2Tokenizer(TiktokenTokenizer):
    """GPT-2's BPE tokenizer. <|endoftext|> is built in, and other special tokens can be added."""

    kind, fields = "gpt2", {"sha256": str}
    newline_id = 198

    def __init__(self, special: Sequence[str] = (), sha256: str = "", load: bool = True):
        if load:
            self.encoding, self.sha256 = _load_gpt2()
            if sha256 not in ("", self.sha256):
                problem = "this file was made with a different GPT-2 vocabulary than the one that tiktoken loads here"
                raise UserError(f"{problem}: clear TIKTOKEN_CACHE_DIR, or prepare the data again")
        super().__init__(self.encoding.n_vocab if load else GPT2_VOCAB_SIZE, special)


def bpe_pre_tokenizer(keep_marks: bool) -> Any:
    """Return a Hugging Face pre-tokenizer that splits text like BPETokenizer with this keep_marks."""
    from tokenizers import Regex, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not keep_marks)  # its regex is GPT-2's
    split = pre_tokenizers.Split(Regex(MARKED_BPE_PATTERN), "isolated")
    return pre_tokenizers.Sequence([split, byte_level]) if keep_marks else byte_level


def _delimit_words(texts: Iterable[str]) -> Iterator[str]:
    """Yield texts in GPT-2's alphabet with \\n between the words, up to about BPE_TRAIN_WORDS distinct words.

    Python splits and converts them faster than the pre-tokenizers in Hugging Face's tokenizers do.
    """
    import regex

    split, bytes_to_text = regex.compile(MARKED_BPE_PATTERN).findall, "".join(byte_alphabet()[:255]) + "\n"
    distinct_words: set[str] = set()
    for text in texts:
        words = list(chain.from_iterable(map(split, _split_long_runs(text))))
        # the delimiter is encoded as byte 255, which UTF-8 does not contain
        encoded = "\udcff".join(words).encode("utf-8", "surrogateescape")
        yield codecs.charmap_decode(encoded, "strict", bytes_to_text)[0]
        distinct_words.update(filter(re.compile(r"\w").match, (word.lstrip(" ") for word in {*words})))
        if len(distinct_words) > BPE_TRAIN_WORDS:
            return


def _split_long_runs(text: str) -> list[str]:
    """Split long runs of one kind of character, because BPE training takes quadratic time in their length."""
    if max(map(len, text.split()), default=0) < 1000 and not re.search(r"\s{1000}", text):
        return [text]
    long_runs = re.finditer(rf"[\w{_marks_in(text)}]{{1000}}|\s{{1000}}|[^\w\s]{{1000}}", text)
    bounds = [0, *(match.end() for match in long_runs), len(text)]
    return [text[a:b] for a, b in zip(bounds, bounds[1:])]


@functools.cache
def byte_alphabet() -> tuple[str, ...]:
    """Return GPT-2's characters for the 256 bytes. Bytes that are invisible in Latin-1 are mapped to U+0100 and up."""
    visible_bytes = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other_bytes = [byte for byte in range(256) if byte not in visible_bytes]
    return tuple(chr(byte if byte in visible_bytes else 0x100 + other_bytes.index(byte)) for byte in range(256))


def is_word_break(previous_char: str, next_char: str) -> bool:
    """Return True if a word ends between these characters and its lowercase form does not depend on later text.

    Before punctuation, it can depend on later text, since "\u03a3" has another lowercase form at the end of a word.
    """
    return next_char in " \n" and not previous_char.isspace()


def is_break(previous_char: str, next_char: str) -> bool:
    """Return True if all patterns above split the text between these two characters, regardless of later text."""
    return is_word_break(previous_char, next_char) or next_char in PUNCTUATION and previous_char.isalpha()


def last_break(text: str, is_break_at: Callable[[str, str], bool] = is_break) -> int:
    """Return the last position in text where is_break_at is True, or 0 if there is none."""
    return next((i for i in range(len(text) - 1, 0, -1) if is_break_at(text[i - 1], text[i])), 0)


def last_word_break(text: str) -> int:
    """Return the last position in text where is_word_break is True, or 0 if there is none."""
    return last_break(text, is_word_break)


def _assign_ids(special: Sequence[str], first_id: int, existing: Collection[str]) -> dict[str, int]:
    """Assign ids to special tokens, starting at first_id. Raises UserError if a name is empty or not unique."""
    counts = Counter(special)
    if duplicates := [name for name in special if not name or name in existing or counts[name] > 1]:
        names = ", ".join(map(repr, duplicates[:10]))
        problem = "the names of special tokens must differ from each other and from all other tokens"
        raise UserError(f"{problem}: rename {names}")
    return {name: first_id + i for i, name in enumerate(special)}


@functools.cache
def _load_gpt2() -> tuple[Any, str]:
    """Return (tiktoken's GPT-2 encoding, a hash of its vocabulary).

    tiktoken downloads the vocabulary unless it is in TIKTOKEN_CACHE_DIR.
    """
    import tiktoken

    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # raised by requests, the file system or tiktoken's hash check
        remedy = "connect to the internet, or set TIKTOKEN_CACHE_DIR to a folder that contains tiktoken's cached copy"
        raise UserError(f"GPT-2's vocabulary could not be loaded ({type(error).__name__}): {remedy}") from error
    tokens = map(encoding.decode_single_token_bytes, range(encoding.n_vocab))
    return encoding, hashlib.sha256(b"".join(len(token).to_bytes(4, "little") + token for token in tokens)).hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# descriptions, which come from untrusted files

KINDS: dict[str, Any] = {cls.kind: cls for cls in (CharTokenizer, WordTokenizer, BPETokenizer, GPT2Tokenizer)}


def from_dict(description: dict, load_gpt2: bool = True, load_template: bool = True) -> Tokenizer:
    """Create the tokenizer that to_dict described. Raises UserError if the description is not valid.

    load_gpt2=False skips loading GPT-2's vocabulary, which may require a download. The tokenizer then has a vocab_size
    and special tokens but cannot encode. load_template=False ignores the template, which this version may not support.
    """
    if description == UNSUPPORTED_TOKENIZER:
        problem = "donGPT does not support this model's tokenizer and cannot convert its ids to text"
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
            type_name = {str: "text", bool: "True or False", list: "a list of strings"}[expected]
            raise UserError(f"the tokenizer's {key!r} is not {type_name}: prepare the data again")
        try:
            "".join([] if expected is bool else value).encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"the tokenizer's {key!r} contains an unpaired surrogate: prepare the data again") from None
    too_large = (
        f"the tokenizer has more than {MAX_VOCAB_SIZE:,} entries, too many for uint16 ids: use a smaller vocabulary"
    )
    if any(type(value) is not bool and len(value) > MAX_VOCAB_SIZE for value in values.values()):
        raise UserError(too_large)  # checked first, because building it would take seconds
    tokenizer = GPT2Tokenizer(load=load_gpt2, **values) if kind == "gpt2" else KINDS[kind](**values)
    if tokenizer.vocab_size > MAX_VOCAB_SIZE:
        raise UserError(too_large)
    if (start_id := description.get("start_id")) is not None:
        if type(start_id) is not int or not 0 <= start_id < tokenizer.vocab_size:
            raise UserError("the tokenizer's 'start_id' is not an id in its vocabulary: prepare the data again")
        tokenizer.set_start(start_id)
    if load_template and "template" in description:
        tokenizer.template = Template.from_dict(description["template"])
    return tokenizer


def added_special_tokens(old_dict: dict | None, new_dict: dict | None) -> list[str] | None:
    """Return the special tokens in new_dict that are not in old_dict, or None if anything else differs.

    If either description is missing, the vocabularies are assumed to be equal.
    """
    if not old_dict or not new_dict:
        return []
    old_special, new_special = old_dict.get("special", []), new_dict.get("special", [])
    if old_dict.get("kind") == new_dict.get("kind") == "gpt2":  # the hash is missing if the vocabulary is assumed
        same_base = len({old_dict.get("sha256"), new_dict.get("sha256")} - {None}) <= 1
    else:
        others = {"special": [], "template": {}, "start_id": 0, "keep_marks": True}  # other ids mean the same without
        same_base = {**old_dict, **others} == {**new_dict, **others}
    return new_special[len(old_special) :] if same_base and new_special[: len(old_special)] == old_special else None
