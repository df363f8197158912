"""dongpt/text/tokenizers.py: text to ids and back, piece by piece, and into files."""

import json
import os
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import tiktoken
from helpers import ROOT, generated_text

from configurator import UserError
from dongpt.text import tokenizers
from dongpt.text.template import DONGPT_TEMPLATE
from dongpt.text.tokenizers import MAX_VOCAB_SIZE, CharTokenizer, GPT2Tokenizer, WordTokenizer, byte_alphabet, from_dict

pytestmark = pytest.mark.smoke

TEXTS = {
    "empty": "",
    "spanish": "En un lugar de la Mancha, de cuyo nombre no quiero acordarme: ¿quién? ¡Señor pingüino!",
    "curly quotes": "“Sancho,” he said, ‘look’ — windmills…",
    "emoji": "horse \U0001f40e, lance ⚔\ufe0f, family \U0001f468\u200d\U0001f469, flag \U0001f1ea\U0001f1f8",
    "carriage returns": "one\r\ntwo\r\n\r\nthree\rfour\n",
    "spaces": "   two\t\ttabs \n\n\n  end   ",
    "other scripts": "日本語 Ελληνικά עברית नमस्ते",
    "control": "a\x00b\x1bc\ufeffd\ufffde",
}
EMOJI = "\U0001f40e"


@pytest.fixture
def tiny_bpe() -> GPT2Tokenizer:
    """GPT2Tokenizer on a vocabulary of single bytes and a few merges, so that every clone runs its code."""
    ranks = {bytes([i]): i for i in range(256)}
    for pair in (b"th", b"the", b" a", b"\xf0\x9f", b"\xc3\xb1"):
        ranks[pair] = len(ranks)
    encoding = tiktoken.Encoding(
        "tiny", pat_str=r" ?\w+|\s+|[^\s\w]+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)}
    )
    tokenizer = GPT2Tokenizer.__new__(GPT2Tokenizer)  # as its __init__, with another vocabulary than tiktoken's
    tokenizer.encoding, tokenizer.vocab_size, tokenizer.start_id = encoding, encoding.n_vocab, encoding.eot_token
    tokenizer.specials = {"<|endoftext|>": encoding.eot_token}
    return tokenizer


@pytest.fixture(params=["char", "tiny_bpe"])
def tokenizer(request):
    """Each kind in turn, with all of TEXTS in its vocabulary."""
    if request.param == "char":
        return CharTokenizer.from_text("".join(TEXTS.values()) + generated_text(200))
    return request.getfixturevalue("tiny_bpe")


# ----------------------------------------------------------------------------------------------------------------------
# every kind


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_decode_gives_back_what_was_encoded(tokenizer, text):
    ids = tokenizer.encode(text)
    assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_stream_gives_the_text_of_decode_in_pieces(tokenizer, text):
    pieces = list(tokenizer.stream(tokenizer.encode(text)))
    assert "".join(pieces) == tokenizer.decode(tokenizer.encode(text))
    assert all(pieces)  # no empty ones
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)  # no character comes in halves


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_byte_lengths_of_the_ids_add_up_to_the_bytes_of_the_text(tokenizer, text):
    lengths = tokenizer.byte_lengths()
    assert lengths.shape == (tokenizer.vocab_size,) and lengths.dtype == np.int64
    assert sum(lengths[i] for i in tokenizer.encode(text)) == len(text.encode("utf-8"))


def test_ids_beyond_the_vocabulary_decode_to_the_replacement_character(tokenizer):
    a = tokenizer.encode("a")
    assert tokenizer.decode(a + [tokenizer.vocab_size] + a) == "a\ufffda"
    assert tokenizer.decode(a + [tokenizer.vocab_size + 46, -1]) == "a\ufffd\ufffd"


def test_decode_and_stream_take_any_iterable_of_ids(tokenizer):
    ids = tokenizer.encode("the señor")
    assert tokenizer.decode(np.array(ids, dtype=np.uint16)) == "the señor"
    assert tokenizer.decode(iter(ids)) == "the señor"


def test_stream_yields_each_piece_before_it_asks_for_the_next_id(tokenizer):
    asked = []

    def ids():
        for i in tokenizer.encode("a b c"):
            asked.append(i)
            yield i

    stream = tokenizer.stream(ids())
    first = next(stream)
    assert len(asked) == 1 and "a b c".startswith(first)


def test_start_id_is_in_the_vocabulary(tokenizer):
    assert 0 <= tokenizer.start_id < tokenizer.vocab_size


# ----------------------------------------------------------------------------------------------------------------------
# characters


def test_char_ids_follow_the_code_points():
    tokenizer = CharTokenizer.from_text("señor Sancho\n¿z?")
    assert tokenizer.characters == "".join(sorted(set("señor Sancho\n¿z?")))
    assert tokenizer.decode(range(tokenizer.vocab_size)) == tokenizer.characters
    assert tokenizer.encode("\n Sz") == [0, 1, tokenizer.characters.index("S"), tokenizer.characters.index("z")]


def test_char_vocabulary_by_hand():
    tokenizer = CharTokenizer.from_text("hello")
    assert tokenizer.vocab_size == 4  # e h l o
    assert tokenizer.encode("hello") == [1, 0, 2, 2, 3]
    assert tokenizer.to_dict() == {"kind": "char", "characters": "ehlo"}


def test_char_error_names_every_unknown_character():
    with pytest.raises(ValueError) as caught:
        CharTokenizer.from_text("abc \n").encode("a señor “b” \U0001f40e")
    missing = str(caught.value).split("; ")[0]  # before the vocabulary
    for character in "señor“”\U0001f40e":
        assert repr(character) in missing
    for character in "ab \n":
        assert repr(character) not in missing
    assert missing.count(repr("ñ")) == 1


def test_char_starts_with_a_line_end_where_it_has_one():
    assert CharTokenizer("ab\n").start_id == 2
    assert CharTokenizer.from_text("ab").start_id == 0


def test_char_has_no_special_tokens():
    tokenizer = CharTokenizer.from_text("<|endoftext|>")
    assert tokenizer.specials == {}
    assert tokenizer.decode(tokenizer.encode("<|endoftext|>", special=True)) == "<|endoftext|>"
    assert len(tokenizer.encode("<|endoftext|>", special=True)) == 13


@pytest.mark.parametrize("characters", ["", "aba"])
def test_char_vocabulary_that_is_empty_or_ambiguous_is_refused(characters):
    with pytest.raises(ValueError):
        CharTokenizer(characters)


# ----------------------------------------------------------------------------------------------------------------------
# byte pairs


def test_bpe_merges_by_hand(tiny_bpe):
    assert tiny_bpe.encode("the a") == [257, 258]  # "the", " a"
    assert tiny_bpe.encode("ht") == [ord("h"), ord("t")]
    assert tiny_bpe.byte_lengths()[[257, 258, 260, 261]].tolist() == [3, 2, 2, 0]  # <|endoftext|> is no text


def test_stream_waits_for_the_last_byte_of_an_emoji(tiny_bpe):
    ids = tiny_bpe.encode(EMOJI)
    assert len(ids) == 3  # f0 9f | 90 | 8e
    assert list(tiny_bpe.stream(ids)) == [EMOJI]
    assert list(tiny_bpe.stream(tiny_bpe.encode("a") + ids + tiny_bpe.encode("b"))) == ["a", EMOJI, "b"]


def test_cut_off_emoji_ends_in_the_replacement_character(tiny_bpe):
    ids = tiny_bpe.encode("a" + EMOJI)
    assert list(tiny_bpe.stream(ids[:-1])) == ["a", "\ufffd"]
    assert tiny_bpe.decode(ids[:-1] + tiny_bpe.encode("b")) == "a\ufffdb"
    assert tiny_bpe.decode(ids[-1:]) == "\ufffd"  # begins in the middle


def test_stream_equals_the_decoding_of_the_joined_bytes_for_random_ids(tiny_bpe):
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids = rng.integers(0, tiny_bpe.vocab_size, 40).tolist()
        whole = b"".join(tiny_bpe.encoding.decode_single_token_bytes(i) for i in ids).decode("utf-8", errors="replace")
        assert "".join(tiny_bpe.stream(ids)) == tiny_bpe.decode(ids) == whole


def test_special_token_is_recognised_only_when_asked_for(tiny_bpe):
    text, special = "a<|endoftext|>a", tiny_bpe.specials["<|endoftext|>"]
    assert tiny_bpe.encode(text, special=True) == [ord("a"), special, ord("a")]
    assert special not in tiny_bpe.encode(text) and tiny_bpe.decode(tiny_bpe.encode(text)) == text
    assert tiny_bpe.decode([special]) == "<|endoftext|>"


# ----------------------------------------------------------------------------------------------------------------------
# GPT-2's own vocabulary


def test_gpt2_ids_are_those_of_the_published_vocabulary(gpt2_vocabulary):
    tokenizer = GPT2Tokenizer()
    assert tokenizer.vocab_size == 50257
    assert tokenizer.encode("Hello world") == [15496, 995]  # as in GPT-2's own examples
    assert tokenizer.encode("a<|endoftext|>", special=True) == [64, 50256]
    assert 50256 not in tokenizer.encode("a<|endoftext|>")
    assert tokenizer.start_id == 50256 and tokenizer.specials == {"<|endoftext|>": 50256}


def test_gpt2_gives_back_every_text_and_counts_its_bytes(gpt2_vocabulary):
    tokenizer = GPT2Tokenizer()
    lengths = tokenizer.byte_lengths()
    assert lengths.shape == (50257,) and lengths[50256] == 0
    for text in TEXTS.values():
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == "".join(tokenizer.stream(ids)) == text
        assert lengths[ids].sum() == len(text.encode("utf-8"))


def test_gpt2_stream_keeps_an_emoji_whole(gpt2_vocabulary):
    tokenizer = GPT2Tokenizer()
    ids = tokenizer.encode(f"a horse {EMOJI}!")
    assert len(tokenizer.encode(EMOJI)) > 1
    assert [piece for piece in tokenizer.stream(ids) if EMOJI in piece] and tokenizer.decode(ids) == f"a horse {EMOJI}!"
    assert tokenizer.decode([50257, 50303]) == "\ufffd\ufffd"  # the padding of a vocabulary of 50304


def test_gpt2_goes_through_json_and_other_vocabularies_are_refused(gpt2_vocabulary):
    description = json.loads(json.dumps(GPT2Tokenizer().to_dict()))
    assert from_dict(description).encode("Hello world") == [15496, 995]
    assert len(json.dumps(description)) < 200  # by name and hash, not 50,257 tokens
    with pytest.raises(ValueError, match="vocabulary"):
        from_dict({**description, "sha256": "0" * 64})


@pytest.mark.slow
def test_missing_gpt2_vocabulary_is_a_sentence(tmp_path):
    code = (
        "from dongpt.text.tokenizers import GPT2Tokenizer\ntry:\n    GPT2Tokenizer()\n"
        "except ValueError as error:\n    print('sentence:', error)\n"
    )
    nowhere = "http://127.0.0.1:9"  # a proxy that is not there stands for a network that is not there
    environment = {
        **os.environ,
        "TIKTOKEN_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": ROOT,
        "https_proxy": nowhere,
        "HTTPS_PROXY": nowhere,
        "http_proxy": nowhere,
        "all_proxy": nowhere,
        "no_proxy": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", timeout=120
    )
    assert done.stdout.startswith("sentence:") and len(done.stdout.splitlines()) == 1, done.stdout + done.stderr
    assert "TIKTOKEN_CACHE_DIR" in done.stdout and done.stderr == ""
    assert os.listdir(tmp_path) == []


# ----------------------------------------------------------------------------------------------------------------------
# into files and back


def test_char_goes_through_json():
    before = CharTokenizer.from_text("".join(TEXTS.values()))
    for ensure_ascii in (True, False):
        description = json.loads(json.dumps(before.to_dict(), ensure_ascii=ensure_ascii))
        after = from_dict(description)
        assert after.kind == "char" and after.to_dict() == before.to_dict()
        assert after.encode(TEXTS["spanish"]) == before.encode(TEXTS["spanish"])


def test_char_keeps_ids_that_do_not_follow_the_code_points():
    tokenizer = from_dict({"kind": "char", "characters": "zña"})  # another program's order
    assert tokenizer.encode("añz") == [2, 1, 0]


CHAR, WORD = {"kind": "char", "characters": "ab\n"}, {"kind": "word", "words": ["a", " b"]}
BPE = {"kind": "bpe", "tokens": list(byte_alphabet())}
GPT2 = {"kind": "gpt2"}
MALFORMED = [  # (description, a part of the message)
    (None, "dict"),
    ([CHAR], "dict"),
    ("char", "dict"),
    ({}, "NoneType"),
    ({"kind": None}, "NoneType"),
    ({"kind": ["char"]}, "list"),
    ({"kind": 10**5000}, "int"),
    ({"kind": "hieroglyphs"}, "'hieroglyphs'"),
    ({"kind": "x" * 10**6}, "newer version"),
    ({"kind": "foreign"}, "library"),
    ({"kind": "foreign", "special": []}, "'foreign'"),
    ({"kind": "char"}, "has no characters"),
    ({**CHAR, "characters": ""}, "has no characters"),
    ({**CHAR, "characters": 5}, "'characters'"),
    ({**CHAR, "characters": True}, "'characters'"),
    ({**CHAR, "characters": ["a", "b"]}, "'characters'"),
    ({**CHAR, "characters": {"a": 0}}, "'characters'"),
    ({**CHAR, "characters": "aba"}, "duplicates"),
    ({**CHAR, "characters": "a\ud800"}, "surrogate"),
    ({**CHAR, "characters": "a" * (MAX_VOCAB_SIZE + 1)}, "65,536"),
    ({**CHAR, "special": "<|x|>"}, "'special'"),
    ({**CHAR, "special": None}, "'special'"),
    ({**CHAR, "special": [["<|x|>"]]}, "'special'"),
    ({**CHAR, "special": [7]}, "'special'"),
    ({**CHAR, "special": [""]}, "names"),
    ({**CHAR, "special": ["a"]}, "'a'"),
    ({**CHAR, "special": ["<|x|>", "<|x|>"]}, "'<|x|>'"),
    ({**CHAR, "special": ["\udc00"]}, "surrogate"),
    ({**CHAR, "special": [f"<{i}>" for i in range(MAX_VOCAB_SIZE)]}, "65,536"),
    ({**CHAR, "template": "dongpt"}, "template"),
    ({**CHAR, "template": {"name": "x"}}, "template"),
    ({**CHAR, "template": {**DONGPT_TEMPLATE.to_dict(), "end": "\ud800"}}, "template"),
    ({"kind": "word"}, "has no words"),
    ({**WORD, "words": "ab"}, "'words'"),
    ({**WORD, "words": {"a": 1}}, "'words'"),
    ({**WORD, "words": ["a", 1]}, "'words'"),
    ({**WORD, "words": ["a", ["b"]]}, "'words'"),
    ({**WORD, "words": ["a", "a"]}, "duplicates"),
    ({**WORD, "words": [str(i) for i in range(MAX_VOCAB_SIZE)]}, "65,536"),
    ({**WORD, "lower": "yes"}, "'lower'"),
    ({**WORD, "lower": 1}, "'lower'"),
    ({**WORD, "spaces_alone": None}, "'spaces_alone'"),
    ({**WORD, "special": ["<unk>"]}, "<unk>"),
    ({"kind": "bpe"}, "lacks a byte"),
    ({**BPE, "tokens": BPE["tokens"][:-1]}, "lacks a byte"),
    ({**BPE, "tokens": [*BPE["tokens"], "a"]}, "duplicate"),
    ({**BPE, "tokens": [*BPE["tokens"], ""]}, "empty"),
    ({**BPE, "tokens": [*BPE["tokens"], "\u4e00"]}, "invalid token"),
    ({**BPE, "tokens": [["a", "b"]]}, "'tokens'"),
    ({**BPE, "tokens": {"a": 0}}, "'tokens'"),
    ({**BPE, "tokens": ["a"] * 10**6}, "65,536"),
    ({**BPE, "special": ["<|endoftext|>"]}, "endoftext"),
    ({**GPT2, "sha256": 5}, "'sha256'"),
    ({**GPT2, "special": "x"}, "'special'"),
    ({**GPT2, "special": [f"<{i}>" for i in range(MAX_VOCAB_SIZE - 50256)]}, "65,536"),
]


@pytest.mark.parametrize("description, part", MALFORMED, ids=map(str, range(len(MALFORMED))))
def test_a_malformed_description_is_a_sentence(description, part):
    with pytest.raises(UserError) as caught:
        from_dict(description, load_gpt2=False)
    assert part in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_the_size_of_gpt2s_vocabulary_is_known_without_loading_it():
    tokenizer = from_dict({"kind": "gpt2", "special": ["<|x|>"]}, load_gpt2=False)
    assert (tokenizer.vocab_size, tokenizer.end_id, tokenizer.specials["<|x|>"]) == (50258, 50256, 50257)


def test_importing_the_tokenizers_does_not_import_tiktoken():
    code = "import sys, dongpt.text.tokenizers; print('tiktoken' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": ROOT},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert done.stdout.strip() == "False", done.stderr
    assert tokenizers.__file__.startswith(ROOT)


@pytest.mark.parametrize("lower, text, is_lossy", [(True, "a B", True), (True, "a b", False), (False, "a B", False)])
def test_only_a_vocabulary_of_small_letters_loses_capitals(lower, text, is_lossy):
    tokenizer = tokenizers.WordTokenizer(["a", " b", " B"], lower=lower)
    assert tokenizer.is_lossy(text) == is_lossy == (tokenizer.decode(tokenizer.encode(text)) != text)


# ----------------------------------------------------------------------------------------------------------------------
# prompts in another Unicode normal form

NFC, NFD = "\u00e9 \u00f1o \ud55c\uae00 \u304c", "e\u0301 n\u0303o \u1112\u1161\u11ab\u1100\u1173\u11af \u304b\u3099"


def vocabulary_of(kind: str, text: str):
    if kind == "char":
        return CharTokenizer.from_text(text)
    flags = dict(lower=kind == "word, lower", spaces_alone=kind == "word, spaces alone", keep_marks=kind != "old word")
    return tokenizers.WordTokenizer(sorted(set(tokenizers.split_words(text, **flags))), **flags)


@pytest.mark.parametrize("kind", ["char", "word", "word, lower", "word, spaces alone", "old word"])
@pytest.mark.parametrize("known, typed", [(NFC, NFD), (NFD, NFC)], ids=["composed", "decomposed"])
def test_a_prompt_in_the_other_normal_form_has_the_ids_of_the_known_one(kind, known, typed):
    tokenizer = vocabulary_of(kind, known)
    for unknown in ("error", "skip", "replace"):
        assert tokenizer.encode(typed, unknown=unknown) == tokenizer.encode(known)
        assert tokenizer.encode(typed, special=True, unknown=unknown) == tokenizer.encode(known)
    assert tokenizer.missing(typed) == [] and tokenizer.known_form(typed) == known
    assert tokenizer.known_form(known) == known


@pytest.mark.parametrize("kind", ["char", "word"])
def test_each_word_of_a_prompt_takes_the_form_that_is_known(kind):
    tokenizer = vocabulary_of(kind, "\u00e9 n\u0303 x")  # a text of mixed forms
    assert tokenizer.encode("e\u0301 \u00f1 x") == tokenizer.encode("\u00e9 n\u0303 x")
    assert tokenizer.encode(f"x {EMOJI} \u00f1", unknown="skip")[-1] == tokenizer.encode(" n\u0303")[-1]


def test_both_forms_of_one_prompt_are_told_apart_where_both_are_known():
    tokenizer = vocabulary_of("char", "\u00e9e\u0301")
    assert tokenizer.encode("\u00e9e\u0301") == [1, 0, 2]


@pytest.mark.parametrize("kind", ["char", "word"])
@pytest.mark.parametrize("letter", ["\u0958", "\ufb2a", "\u212b", "\uf900", "\u0344"])
def test_letters_that_no_normal_form_keeps_are_found(kind, letter):
    tokenizer = vocabulary_of(kind, f"{letter}x \u00e9 x{letter}")
    for form in ("NFC", "NFD", "NFKC"):
        typed = unicodedata.normalize(form, f"{letter}x \u00e9")
        assert tokenizer.decode(tokenizer.encode(typed)) == f"{letter}x \u00e9"


@pytest.mark.parametrize(
    "known", ["Vi\u00ea\u0323t x", "a\u0302\u0301y \u01a1\u0309", "d\u1eb9\u0301", "d\u00e9\u0323"]
)
def test_partly_composed_letters_are_found(known):
    """Windows-1258 has Vietnamese letters such as U+00EA and their tones such as U+0323."""
    tokenizer = vocabulary_of("char", known)
    for form in ("NFC", "NFD"):
        for typed in (unicodedata.normalize(form, known), unicodedata.normalize(form, known[:4])):
            assert known.startswith(tokenizer.decode(tokenizer.encode(typed))) and tokenizer.missing(typed) == []
    syllable = "\ud558\u11ab"  # Unicode composes the two to U+D55C
    assert vocabulary_of("char", syllable).known_form("\ud55c") == syllable
    with pytest.raises(UserError, match="'\u1ec7'"):
        vocabulary_of("char", "\u00ea x").encode("\u1ec7")


def test_what_is_unknown_in_every_form_is_refused():
    tokenizer = vocabulary_of("char", "\u00e9 x")
    with pytest.raises(UserError) as caught:
        tokenizer.encode(f"e\u0301 u\u0301{EMOJI}")
    assert repr(EMOJI) in str(caught.value) and repr("\u00fa") in str(caught.value)
    assert tokenizer.missing(f"e\u0301 \u00fa{EMOJI}") == sorted(["\u00fa", EMOJI])


def test_special_tokens_are_found_next_to_another_form():
    tokenizer = CharTokenizer("\u00e9", ["<|e\u0301|>"])
    assert tokenizer.encode("e\u0301<|e\u0301|>e\u0301", special=True) == [0, 1, 0]


def test_training_data_are_never_normalized():
    for tokenizer, expected in ((vocabulary_of("char", "\u00e9"), None), (vocabulary_of("word", "\u00e9"), [1])):
        if expected is None:
            with pytest.raises(UserError):
                tokenizer.encode_array("e\u0301")
        else:
            assert tokenizer.encode_array("e\u0301").tolist() == expected  # <unk>


@pytest.mark.parametrize("tokenizer", [CharTokenizer("abc"), WordTokenizer(["a", " b", "c"])], ids=lambda t: t.kind)
def test_ids_may_be_scalars_of_torch_or_numpy(tokenizer):
    import torch

    expected = tokenizer.decode([0, 1, 2])
    assert "\ufffd" not in expected
    assert tokenizer.decode(torch.tensor([0, 1, 2])) == tokenizer.decode(np.array([0, 1, 2])) == expected
