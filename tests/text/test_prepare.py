"""Vocabularies made from a text: words, byte pairs, special tokens; and bins with the ids of whole documents."""

import functools
import hashlib
import io
import itertools
import json
import os
import re
import sys
import tempfile
import unicodedata
from collections import Counter

import fork_server
import numpy as np
import pytest
import tiktoken
import tokenizers as hugging_face
import torch
from helpers import ROOT, TINY_RUN, generated_text, read_ids, visible
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import configurator
import sample
import train
from dongpt.text import documents, tokenizers
from dongpt.text import prepare as preparing
from dongpt.text.documents import Files
from dongpt.text.prepare import Vocabulary, prepare
from dongpt.text.tokenizers import (
    GPT2_PATTERN,
    BPETokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    WordTokenizer,
    added_special_tokens,
    byte_alphabet,
    from_dict,
    split_words,
)

pytestmark = pytest.mark.smoke

END = "<|endoftext|>"
TASKS = ["<|summarize|>", "<|sentiment|>"]
CODE = "def f(x):\n    if x >= 10:\n\t\treturn {'a': x[0]}  # it's\n\n\nprint(f(12) != \"don't\")\n"
TEXTS = {
    "english": "The knight's horse didn't run; \"we'll see,\" said Sancho (he'd seen it) -- I'VE 3 of them. They're "
    "what you're after, we're sure, I've it, I'm he, you'll see, 're 've 'll\n" * 3,
    "code": CODE * 3,
    "languages": "Señor, ¿quién? 日本語。テスト、你好 Ελληνικά σοφός ΟΔΟΣ עברית नमस्ते "
    "мир ไทย 한국어 İstanbul Straße\u0301\n" * 2,
    "digits": "3.14159 10,000 2024-01-02 007 1000000007 ½ ² ٣٤ x1y22z333 12 12 12 123 1234\n" * 2,
    "repeated letters": "a aa aaa aaaa aaaaa aaaaaaaaaaaa bababab abab ababa baaab hahaha !!!!! ??!!\n",
    "blanks": "  two\t\ttabs \n\n\n  end   \u00a0\u3000x\u2028y\x1c z\x85w \r\n a  b   c    \n",
    "marks": "हिन्दी में लिखा है। สวัสดีครับ ผม مَرْحَبًا שָׁלוֹם cafe\u0301 n\u0303andu\u0301! ශ්\u200dරී می\u200cخواهم "
    "1\ufe0f\u20e3 5\u0332 !\u0301a \u0301b\n\u0301c \u200d d\u200d ❤\ufe0fx I\u0307 \U00011013\U00011001\n" * 2,
    "emoji": "horse \U0001f40e, lance ⚔\ufe0f, \U0001f468\u200d\U0001f469, \U0001f1ea\U0001f1f8 \U0001f40e\U0001f40e\n",
}
# what tokenizers cut at, and letters whose small form is longer or depends on what is around them
TRICKY = (
    "aAbst 01.,;:!?'\"-()[]\n\n\t  "
    "ΑΣσςİıßé_\u0301\u0307\u093f\u200c\u200d\ufe0f\u00ad\u00b7\u2019\u00a0\u3000\x1c\x85\u2028、。，日\U0001f40e<|>½٣"
)
WILD = st.one_of(st.text(max_size=40), st.text(alphabet=TRICKY, max_size=40))
TAME = st.text(alphabet=st.characters(exclude_categories=("Cs",), exclude_characters="Σ"), max_size=40)


def many(n: int):
    """Hypothesis settings: n examples, the same each time."""
    return settings(
        max_examples=n,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def notebook_split(text: str) -> list[str]:
    """Words, marks and blanks as in the word notebook."""
    return re.findall(r"\w+|\S|\s", text)


def joined_split(text: str) -> list[str]:
    """Words and symbols with their marks, blanks; a space joins what follows it unless that is a blank too."""
    words, kind = [], "blank"  # of the last one
    for c in text:
        is_word, is_mark = c.isalnum() or c == "_", unicodedata.category(c)[0] == "M"
        if (
            is_word
            and kind == "word"
            or is_mark
            and kind in ("word", "symbol")
            or c in "\u200c\u200d"
            and kind == "word"
        ):
            words[-1] += c
            continue
        new_kind = ("space" if c == " " else "blank") if c.isspace() else "word" if is_word else "symbol"
        if kind == "space" and new_kind in ("word", "symbol"):
            words[-1] += c
        else:
            words.append(c)
        kind = new_kind
    return words


def old_split(text: str) -> list[str]:
    """Words as they were split before they kept their marks."""
    return re.findall(r" ?\w+| ?[^\w\s]|\s", text)


# GPT-2's, in which a letter keeps its marks
BPE_PATTERN = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}(?:\p{L}|\p{M}|\x{200C}|\x{200D})*| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)


def train_hugging_face(texts: list[str], n_tokens: int, pattern: str = BPE_PATTERN):
    """Hugging Face's byte-level BPE with n_tokens entries, trained on texts, without special tokens; "" is GPT-2."""
    bpe = hugging_face.Tokenizer(hugging_face.models.BPE())
    pre_tokenizers = hugging_face.pre_tokenizers
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern:
        split = pre_tokenizers.Split(hugging_face.Regex(pattern), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        bpe.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    bpe.train_from_iterator(
        texts,
        hugging_face.trainers.BpeTrainer(
            vocab_size=n_tokens, show_progress=False, initial_alphabet=hugging_face.pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    return bpe


def gpt2_or_skip() -> GPT2Tokenizer:
    if not os.path.isdir(os.environ.get("TIKTOKEN_CACHE_DIR", "")):
        pytest.skip("TIKTOKEN_CACHE_DIR is not set: this test needs a file that is not part of the repository")
    return GPT2Tokenizer()


@functools.cache
def lengths_of_gpt2() -> np.ndarray:
    return gpt2_or_skip().byte_lengths()


def words_of(*texts: str, lower: bool = False, spaces_alone: bool = False, special=()) -> WordTokenizer:
    """The tokenizer whose vocabulary is every word of texts."""
    split = notebook_split if spaces_alone else joined_split
    return WordTokenizer(
        sorted({word for text in texts for word in split(text.lower() if lower else text)} or {"a"}),
        special,
        lower,
        spaces_alone,
    )


def through_files(description: dict, how: str) -> dict:
    """A description as it comes back from meta.json or from a checkpoint."""
    if how == "json":
        return json.loads(json.dumps(description))
    buffer = io.BytesIO()
    torch.save({"tokenizer": description}, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)["tokenizer"]


def write(path, text: str) -> str:
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(text)
    return str(path)


# ----------------------------------------------------------------------------------------------------------------------
# words


def test_words_by_hand():
    text = "Don't stop,  Sancho_2 (now)!\n\tGo."
    assert WordTokenizer(["a"]).split(text) == [
        "Don",
        "'",
        "t",
        " stop",
        ",",
        " ",
        " Sancho_2",
        " (",
        "now",
        ")",
        "!",
        "\n",
        "\t",
        "Go",
        ".",
    ]
    assert WordTokenizer(["a"], spaces_alone=True).split(text) == [
        "Don",
        "'",
        "t",
        " ",
        "stop",
        ",",
        " ",
        " ",
        "Sancho_2",
        " ",
        "(",
        "now",
        ")",
        "!",
        "\n",
        "\t",
        "Go",
        ".",
    ]


@given(WILD)
@many(100)
def test_both_splits_are_as_the_issue_has_them_and_lose_nothing(text):
    joined, alone = WordTokenizer(["a"]).split(text), WordTokenizer(["a"], spaces_alone=True).split(text)
    assert alone == notebook_split(text) and joined == joined_split(text)
    assert "".join(joined) == "".join(alone) == text


@pytest.mark.parametrize("spaces_alone", [False, True])
@given(text=WILD)
@many(100)
def test_words_give_exactly_the_text_back_where_nothing_is_unknown_or_lowered(spaces_alone, text):
    tokenizer = words_of(text, spaces_alone=spaces_alone)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == "".join(tokenizer.stream(ids)) == text
    assert tokenizer.unknown_id not in ids
    assert sum(tokenizer.byte_lengths()[ids]) == len(text.encode("utf-8"))


SCRIPTS = {
    "हिन्दी में लिखा है।": ["हिन्दी", " में", " लिखा", " है", "।"],
    "สวัสดีครับ ผม": ["สวัสดีครับ", " ผม"],
    "مَرْحَبًا بِكُمْ": ["مَرْحَبًا", " بِكُمْ"],
    "שָׁלוֹם, ע": ["שָׁלוֹם", ",", " ע"],
    "un cafe\u0301!": ["un", " cafe\u0301", "!"],
    "Straße": ["Straße"],
    "ශ්\u200dරී می\u200cخواهم": ["ශ්\u200dරී", " می\u200cخواهم"],  # joiners
    "a\U0001f468\u200d\U0001f469": ["a", "\U0001f468", "\u200d", "\U0001f469"],
    "I ❤\ufe0fyou": ["I", " ❤\ufe0f", "you"],
    "1\ufe0f\u20e3 2": ["1\ufe0f\u20e3", " 2"],
    "\u0301a \u0301b\n\u0301c": ["\u0301", "a", " \u0301", "b", "\n", "\u0301", "c"],
    "(\u0301a)\u0301": ["(\u0301", "a", ")\u0301"],
    "\u0301": ["\u0301"],
    "\U00011013\U00011001 x": ["\U00011013\U00011001", " x"],  # beyond the first 65,536 code points
}


@pytest.mark.parametrize("text", SCRIPTS)
def test_a_word_of_any_script_keeps_its_marks(text):
    assert WordTokenizer(["a"]).split(text) == split_words(text) == SCRIPTS[text] == joined_split(text)
    for keep_marks, spaces_alone, split in ((False, False, old_split), (True, True, notebook_split)):
        assert WordTokenizer(["a"], spaces_alone=spaces_alone, keep_marks=keep_marks).split(text) == split(text)


@given(
    st.lists(
        st.tuples(st.sampled_from([0, 1, 5, 1500]), st.sampled_from(["\u0301", "\u093f", "\u200d", "", "\n"])),
        max_size=9,
    )
)
@many(60)
def test_marks_may_be_anywhere_in_a_long_text(parts):
    text = "".join("words, and\n more "[: 3 + n % 15] * (n // 9 + 1) + mark for n, mark in parts)
    assert split_words(text) == joined_split(text)


def test_trained_byte_pairs_keep_marks():
    text = " ".join(SCRIPTS) * 5
    tokenizer, old = BPETokenizer.train([text], 700), BPETokenizer(list(byte_alphabet()), keep_marks=False)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("हिन्दी में")] == ["हिन्दी", " में"]
    assert tokenizer.encode(text) == train_hugging_face([text], 699).encode(text).ids
    assert old.encoding._pat_str == GPT2_PATTERN and old.to_dict() == {"kind": "bpe", "tokens": list(byte_alphabet())}


def test_byte_pairs_are_not_trained_on_long_runs_of_letters_and_marks():
    thai = "สวัสดีครับ" * 3000
    pieces = tokenizers._split_long_runs(thai)
    assert max(map(len, pieces)) == 1000 and "".join(pieces) == thai


@pytest.mark.parametrize("kind", ["word", "word lower", "bpe"])
def test_old_vocabularies_split_text_as_they_did(kind):
    text = " ".join(SCRIPTS)
    if kind == "bpe":
        theirs = train_hugging_face([text], 400, pattern="")
        ids = theirs.get_vocab()
        description = {"kind": "bpe", "tokens": sorted(ids, key=ids.__getitem__)}
        expected, new = theirs.encode(text).ids, BPETokenizer(description["tokens"])
    else:
        pieces = old_split(text.lower() if "lower" in kind else text)
        words = sorted(set(pieces))
        description = {"kind": "word", "words": words, "lower": "lower" in kind, "spaces_alone": False}
        expected, new = [words.index(piece) for piece in pieces], WordTokenizer(words, lower="lower" in kind)
    tokenizer = from_dict(description)
    assert tokenizer.encode(text) == tokenizer.encode_array(text).tolist() == expected
    assert tokenizer.to_dict() == description  # nothing is added
    assert new.to_dict() == {**description, "keep_marks": True} and new.encode(text, unknown="replace") != expected
    assert added_special_tokens(description, new.to_dict()) == []  # the ids have the same meaning


@pytest.mark.parametrize("kind", ["word", "word lower", "word alone", "bpe"])
def test_text_without_marks_has_the_ids_that_it_had(tmp_path, kind):
    text = unicodedata.normalize("NFC", (TEXTS["english"] + "El señor Núñez, ¿qué pingüino? ½ 日本語 ⚔ été\n" * 9) * 5)
    prepared = prepare(str(tmp_path / "out"), Files([write(tmp_path / "a.txt", text)]), vocabulary_of(kind), quiet=True)
    ids = [*read_ids(tmp_path / "out", "train"), *read_ids(tmp_path / "out", "val")]
    if kind == "bpe":
        theirs, n = train_hugging_face([text], 399, pattern=""), prepared.meta["characters"]["train"]
        expected = theirs.encode(text[:n]).ids + theirs.encode(text[n:]).ids
    else:
        pieces = (notebook_split if "alone" in kind else old_split)(text.lower() if "lower" in kind else text)
        words = sorted(set(pieces))
        expected = [words.index(piece) for piece in pieces]
    assert ids == expected
    assert prepared.meta["tokenizer"].get("keep_marks", False) == ("alone" not in kind)


def test_half_the_context_is_no_blanks_by_default():
    text = generated_text(500)
    joined, alone = words_of(text).encode(text), words_of(text, spaces_alone=True).encode(text)
    assert len(joined) < 0.65 * len(alone)


def test_lower_case_is_stored_and_gives_small_letters_back():
    tokenizer = words_of("the señor Ñ. End", lower=True)
    after = from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert after.lower and after.decode(after.encode("THE Señor ñ. end")) == "the señor ñ. end"
    assert not WordTokenizer(["a"]).lower  # off by default
    assert from_dict(WordTokenizer(["a"]).to_dict()).lower is False


WORD_TEXT = "the Knight rode. The knight RODE, the knight fell\n" * 4 + "once upon Zebra\n" + "twice twice!\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings_of",
    [{}, {"lower": True}, {"spaces_alone": True}, {"min_count": 2}, {"min_count": 5, "lower": True}],
    ids=str,
)
def test_prepared_words_are_those_that_are_frequent_enough_sorted(tmp_path, settings_of):
    path = write(tmp_path / "a.txt", WORD_TEXT)
    prepared = prepare(str(tmp_path / "out"), Files([path]), Vocabulary("word", **settings_of), quiet=True)
    text = WORD_TEXT.lower() if settings_of.get("lower") else WORD_TEXT
    counts = Counter((notebook_split if settings_of.get("spaces_alone") else joined_split)(text))
    expected = sorted(word for word, count in counts.items() if count >= settings_of.get("min_count", 1))
    with open(tmp_path / "out" / "meta.json", encoding="utf-8") as file:
        meta = json.load(file)
    assert meta["tokenizer"]["words"] == expected == prepared.tokenizer.words
    assert meta["vocab_size"] == len(expected) + 1 == prepared.tokenizer.vocab_size  # <unk>
    tokenizer = from_dict(meta["tokenizer"])
    assert tokenizer.lower == settings_of.get("lower", False)
    assert tokenizer.spaces_alone == settings_of.get("spaces_alone", False)
    if settings_of.get("min_count") == 2:
        assert "<unk>" in tokenizer.decode(read_ids(tmp_path / "out", "val"))


def test_a_minimum_count_below_one_is_refused():
    with pytest.raises(ValueError, match="min_count=0"):
        configurator.build_config(Vocabulary, {"tokenizer": "word", "min_count": 0})


@pytest.mark.parametrize(
    "words,special",
    [([], ()), (["a", "a"], ()), (["a"], ["a"]), (["a"], ["<x>", "<x>"]), (["a"], [""]), (["a"], ["<unk>"])],
)
def test_word_vocabularies_that_are_empty_or_ambiguous_are_refused(words, special):
    with pytest.raises(ValueError):
        WordTokenizer(words, special)


PREPARE_CODE = """
import sys
from dongpt.text.documents import Files
from dongpt.text.prepare import Vocabulary, prepare
folder, path, kind = sys.argv[1:]
prepare(folder, Files([path], "line"), Vocabulary(kind, vocab_size=400, special="<|x|>,<|y|>"), quiet=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["word", "bpe", "char"])
def test_every_process_writes_the_same_bytes(tmp_path, kind):
    path = write(tmp_path / "a.txt", generated_text(2000) + "".join(TEXTS.values()).replace("\r", ""))
    done = []
    for seed in ("0", "1"):
        folder = tmp_path / seed
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": ROOT}
        fork_server.run(
            [sys.executable, "-c", PREPARE_CODE, str(folder), path, kind], env=environment, check=True, timeout=120
        )
        assert visible(folder) == ["meta.json", "train.bin", "val.bin"]
        done.append([(folder / name).read_bytes() for name in visible(folder)])
    assert done[0] == done[1]
    if kind == "word":
        words = json.loads(done[0][0])["tokenizer"]["words"]
        assert words == sorted(words) and len(words) > 100


# ----------------------------------------------------------------------------------------------------------------------
# what the vocabulary does not hold


def test_words_that_are_unknown_are_named_or_left_out_or_replaced():
    tokenizer = words_of("the knight rode\n")
    with pytest.raises(ValueError) as caught:
        tokenizer.encode("the windmill rode")
    assert "windmill" in str(caught.value) and "knight" not in str(caught.value) and "\n" not in str(caught.value)
    the, rode = tokenizer.ids["the"], tokenizer.ids[" rode"]
    assert tokenizer.encode("the windmill rode", unknown="skip") == [the, rode]
    assert tokenizer.encode("the windmill rode", unknown="replace") == [the, tokenizer.unknown_id, rode]
    assert tokenizer.unknown_id == tokenizer.specials["<unk>"] and tokenizer.unknown_id not in (the, rode)


@pytest.mark.parametrize("how", ["skip", "replace"])
@given(known=st.text(min_size=1, max_size=20), text=st.text(max_size=30), mixed=WILD)
@many(60)
def test_characters_that_are_unknown_are_left_out_or_replaced(how, known, text, mixed):
    tokenizer = CharTokenizer("".join(sorted(set(known))))
    text = text + known + mixed
    ids = tokenizer.encode(text, unknown=how)
    assert all(0 <= i < len(set(known)) for i in ids)
    if how == "skip":
        assert tokenizer.decode(ids) == "".join(c for c in text if c in known)
    else:
        assert len(ids) == len(text)  # one for one
        assert all(tokenizer.decode([i]) == c for i, c in zip(ids, text) if c in known)
        assert len({i for i, c in zip(ids, text) if c not in known}) <= 1


def test_characters_that_are_unknown_are_an_error_by_default():
    tokenizer = CharTokenizer("abc")
    for encode in (tokenizer.encode, tokenizer.encode_array, lambda t: tokenizer.encode(t, unknown="error")):
        for text in ("abz", "ab\u00e9"):
            with pytest.raises(ValueError, match=repr(text[-1])):
                encode(text)


@pytest.fixture(scope="module")
def word_run(tmp_path_factory) -> str:
    """The out_dir of a small run on words."""
    folder = tmp_path_factory.mktemp("words")
    path = write(folder / "a.txt", generated_text(1500))
    prepare(str(folder / "data"), Files([path]), Vocabulary("word"), quiet=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert train.main([f"--data_dir={folder / 'data'}", f"--out_dir={folder / 'out'}", *TINY_RUN]) == 0
    torch.set_num_threads(threads)
    return str(folder / "out")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["char", "word"])
def test_sample_leaves_out_or_replaces_what_a_prompt_has_and_the_vocabulary_has_not(tmp_path, tiny_run, word_run, kind):
    tokenizer = from_dict(
        torch.load(os.path.join(tiny_run if kind == "char" else word_run, "ckpt_last.pt"), weights_only=True)[
            "tokenizer"
        ]
    )
    assert tokenizer.kind == kind

    def text_after(start: str, *args: str) -> str:
        path = tmp_path / "out.jsonl"
        sample.main(
            [
                f"--out_dir={tiny_run if kind == 'char' else word_run}",
                "--device=cpu",
                f"--start={start}",
                "--num_samples=1",
                "--max_new_tokens=20",
                "--dtype=float32",
                f"--output={path}",
                *args,
            ]
        )
        return json.loads(path.read_text(encoding="utf-8"))["text"]

    prompt, without = ("the kni\u2603ght ro", "the knight ro") if kind == "char" else ("the xyzzy knight", "the knight")
    assert text_after(prompt, "--unknown=skip") == text_after(without)
    assert text_after(prompt, "--unknown=replace")
    for args in ([], ["--unknown=error"]):
        with pytest.raises(ValueError, match="\u2603" if kind == "char" else "xyzzy"):
            text_after(prompt, *args)
    with pytest.raises(ValueError, match="unknown"):
        text_after(prompt, "--unknown=ignore")


# ----------------------------------------------------------------------------------------------------------------------
# trained byte pairs


@pytest.mark.parametrize("n_tokens", [256, 300, 420, 1000])
@pytest.mark.parametrize("kind", TEXTS)
def test_trained_byte_pairs_give_the_ids_of_hugging_face(kind, n_tokens):
    texts = [TEXTS[kind], generated_text(300)]
    theirs, ours = train_hugging_face(texts, n_tokens), BPETokenizer.train(texts, n_tokens + 1)
    assert ours.vocab_size == theirs.get_vocab_size() + 1 == ours.specials[END] + 1
    assert ours.tokens == [theirs.id_to_token(i) for i in range(theirs.get_vocab_size())]
    for text in [*TEXTS.values(), "".join(TEXTS.values()), "".join(TEXTS.values())[::-1]]:  # those not trained on too
        assert ours.encode(text) == theirs.encode(text).ids
        assert ours.decode(ours.encode(text)) == text


@given(text=WILD, more=WILD)
@many(50)
def test_trained_byte_pairs_give_the_ids_of_hugging_face_for_any_text(text, more):
    theirs, ours = train_hugging_face([text], 330), BPETokenizer.train([text], 331)
    for encoded in (text, more, text + more, more + text):
        assert ours.encode(encoded) == theirs.encode(encoded).ids
        assert ours.decode(ours.encode(encoded)) == encoded


@given(st.lists(st.text(alphabet="ab", min_size=1, max_size=14), min_size=1, max_size=20), st.integers(257, 320))
@many(50)
def test_trained_byte_pairs_give_the_ids_of_hugging_face_where_letters_repeat(words, n_tokens):
    text = " ".join(words)
    theirs, ours = train_hugging_face([text], n_tokens), BPETokenizer.train([text], n_tokens + 1)
    for encoded in (text, "".join(words), "".join(words)[::-1]):
        assert ours.encode(encoded) == theirs.encode(encoded).ids


def test_don_quixote_gives_the_ids_of_hugging_face(don_quixote):
    with open(don_quixote, encoding="utf-8") as file:
        text = file.read()[:300_000]
    theirs, ours = train_hugging_face([text], 1023), BPETokenizer.train([text], 1024)
    assert ours.vocab_size == 1024 and ours.encode(text) == theirs.encode(text).ids


@pytest.mark.parametrize(
    "special,size,fits",
    [
        ((), 256, False),
        ((), 257, True),
        (TASKS, 258, False),
        (TASKS, 259, True),
        ((), 65536, True),
        ((), 65537, False),
        ((), 0, False),
        ((), -1, False),
    ],
)
def test_byte_pairs_take_257_to_65536_entries(special, size, fits):
    if not fits:
        with pytest.raises(ValueError, match=f"vocab_size={size} ") as caught:
            BPETokenizer.train(["the knight"], size, special)
        assert "65,536" in str(caught.value) and "\n" not in str(caught.value)
    else:
        assert 257 <= BPETokenizer.train(["the knight"], size, special).vocab_size <= size


def test_prepare_refuses_sizes_of_byte_pairs_with_a_sentence(tmp_path):
    path = write(tmp_path / "a.txt", generated_text(200))
    for size in (100, 65537):
        with pytest.raises(ValueError, match=f"vocab_size={size} "):
            prepare(str(tmp_path / "out"), Files([path]), Vocabulary("bpe", vocab_size=size), quiet=True)
        assert not os.path.exists(tmp_path / "out") or visible(tmp_path / "out") == []


def test_training_twice_gives_the_same_byte_pairs():
    texts = list(TEXTS.values())
    one, other = BPETokenizer.train(texts, 500), BPETokenizer.train(texts, 500)
    assert one.to_dict() == other.to_dict() and one.vocab_size == 500


def test_broken_vocabularies_of_byte_pairs_are_refused():
    tokens = BPETokenizer.train(["the knight"], 260).tokens
    for broken in (tokens[1:], tokens + tokens[-1:], tokens + ["\u2603"], []):
        with pytest.raises(ValueError, match="byte"):
            from_dict({"kind": "bpe", "tokens": broken})


# ----------------------------------------------------------------------------------------------------------------------
# every kind: files, special tokens, cuts


KINDS = ["char", "word", "word alone", "word lower", "word alone lower", "bpe", "gpt2"]


@pytest.fixture(scope="module")
def trained() -> list[str]:
    """The tokens of byte pairs trained on all of TEXTS."""
    return BPETokenizer.train([*TEXTS.values(), generated_text(300)], 800).tokens


def make(kind: str, trained, *texts: str, special=()):
    """A tokenizer of a kind whose vocabulary holds texts."""
    if kind == "char":
        return CharTokenizer("".join(sorted(set("".join(texts)) or {"a"})), special)
    if kind == "bpe":
        return BPETokenizer(trained, special)
    if kind == "gpt2":
        gpt2_or_skip()
        return GPT2Tokenizer(special)
    return words_of(*texts, lower="lower" in kind, spaces_alone="alone" in kind, special=special)


@pytest.mark.parametrize("how", ["json", "torch"])
@pytest.mark.parametrize("special", [(), TASKS], ids=["plain", "special"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_goes_through_files(kind, special, how, trained):
    text = "".join(TEXTS.values()) + "".join(TASKS) + END
    before = make(kind, trained, text, special=special)
    after = from_dict(through_files(before.to_dict(), how))
    assert type(after) is type(before) and after.to_dict() == before.to_dict()
    assert (after.vocab_size, after.start_id, after.specials, after.end_id) == (
        before.vocab_size,
        before.start_id,
        before.specials,
        before.end_id,
    )
    for recognised in (False, True):
        assert after.encode(text, special=recognised) == before.encode(text, special=recognised)
    assert after.decode(range(after.vocab_size)) == before.decode(range(after.vocab_size))


@pytest.mark.parametrize("kind", KINDS)
@given(parts=st.lists(st.one_of(st.sampled_from([*TASKS, END, "<unk>", "<|x|>", "<|x|><"]), WILD), max_size=6))
@many(50)
def test_special_tokens_come_from_plain_text_never_and_else_where_asked_for(kind, parts, trained):
    text = "".join(parts)
    declared = [*TASKS, "<|x|>", "<|x|><"]
    declared += [] if kind in ("bpe", "gpt2") else [END]  # which have it anyway
    tokenizer = make(kind, trained, text, *re.split("<[^>]*>", text), "<", special=declared)
    names = {*declared, END} | ({"<unk>"} if "word" in kind else set())
    assert set(tokenizer.specials) == names and len(set(tokenizer.specials.values())) == len(names)
    assert max(tokenizer.specials.values()) == tokenizer.vocab_size - 1
    plain = tokenizer.encode(text)
    assert not set(plain) & set(tokenizer.specials.values())
    assert not set(tokenizer.encode_array(text).tolist()) & set(tokenizer.specials.values())
    assert tokenizer.decode(plain) == (text.lower() if "lower" in kind else text)
    expected = []
    for piece in re.split(f"({'|'.join(map(re.escape, sorted(names, key=len)[::-1]))})", text):  # the longest first
        expected += [tokenizer.specials[piece]] if piece in names else tokenizer.encode(piece, unknown="replace")
    assert tokenizer.encode(text, special=True, unknown="replace") == expected


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_decode_to_their_names_and_stand_for_no_bytes(kind, trained):
    tokenizer = make(kind, trained, "a b" + "".join(TASKS), special=TASKS)
    ids = tokenizer.encode(f"a{TASKS[1]} b{TASKS[0]}", special=True)
    assert ids == [
        *tokenizer.encode("a"),
        tokenizer.specials[TASKS[1]],
        *tokenizer.encode(" b"),
        tokenizer.specials[TASKS[0]],
    ]
    assert tokenizer.specials[TASKS[1]] == tokenizer.specials[TASKS[0]] + 1  # in the order in which they are declared
    assert tokenizer.decode(ids) == f"a{TASKS[1]} b{TASKS[0]}"
    assert not tokenizer.byte_lengths()[list(tokenizer.specials.values())].any()


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_that_cannot_be_told_apart_are_refused(kind, trained):
    for special in (["<x>", "<x>"], [""], *([[END]] if kind in ("bpe", "gpt2") else [["a"]])):
        with pytest.raises(ValueError, match="special"):
            make(kind, trained, "a b", special=special)


@pytest.mark.parametrize("kind", KINDS)
@given(text=WILD, more=WILD)
@example(text="ΟΔΟΣ.", more="Α")  # a sigma is final unless a letter comes behind the mark
@example(text="Α.", more="Σ")
@example(text="ΑΣ:", more=" Β")
@example(text="ab  ", more="  c")
@example(text="a\n", more="\n b")
@example(text="x\u00a0 ", more="y")
@example(text="don't", more="ll")
@example(text="2.", more="5")
@many(50)
def test_a_text_may_be_cut_where_the_tokenizer_says(kind, text, more, trained):
    probe = make(kind, trained, text + more)
    place = probe.find_cut(text)
    assert 0 <= place <= len(text)
    tokenizer = make(kind, trained, text + more, text[:place], text[place:] + more)  # in which no word is unknown
    assert tokenizer.find_cut(text) == place
    assert tokenizer.encode(text[:place]) + tokenizer.encode(text[place:] + more) == tokenizer.encode(text + more)


@pytest.mark.parametrize("kind", KINDS)
def test_ordinary_text_has_places_to_cut(kind, trained):
    text = generated_text(50)
    assert make(kind, trained, text).find_cut(text) > len(text) - 20


@pytest.mark.parametrize("texts", [["a", "ab\x7f", "", "ba"], ["\u00e9a", "a\U0001f600\uffff", "z"], []])
def test_distinct_characters_are_those_of_all_texts(texts):
    assert preparing.distinct_characters(texts) == set("".join(texts))


@pytest.mark.parametrize("kind", KINDS)
@given(text=WILD)
@many(60)
def test_an_array_holds_the_ids_of_encode(kind, text, trained):
    tokenizer = make(kind, trained, text, "ab")
    for encoded in (text, "ab"):
        array = tokenizer.encode_array(encoded)
        assert array.dtype == np.uint16 and array.ndim == 1
        assert array.tolist() == tokenizer.encode(encoded)


@pytest.mark.parametrize("n", [1, 100, 127, 128, 254, 255, 256, 257, 300, 1000])
def test_an_array_holds_the_ids_of_encode_whatever_the_order_of_the_characters(n):
    others = "".join(map(chr, range(0x4E00, 0x4E00 + n)))
    tokenizer = CharTokenizer(others + "ab\n")  # so that the ids of ASCII are around and beyond a byte
    for text in ("abba\n", "a" + others[:5] + "b", others):
        assert tokenizer.encode_array(text).tolist() == tokenizer.encode(text)
    assert tokenizer.encode("a") == [n]
    for text in ("a b", others[0] + "\u00e9"):
        with pytest.raises(ValueError, match="not in the vocabulary"):
            tokenizer.encode_array(text)


def test_an_array_of_words_has_unk_for_rare_ones():
    tokenizer = words_of("the knight")
    assert tokenizer.encode_array("the windmill").tolist() == [tokenizer.ids["the"], tokenizer.unknown_id]


@pytest.mark.parametrize("kind", ["char", "bpe", "gpt2"])
@given(text=WILD)
@many(50)
def test_any_text_comes_back(kind, text, trained):
    tokenizer = make(kind, trained, text)
    ids = tokenizer.encode(text)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode(ids) == "".join(tokenizer.stream(ids)) == text
    lengths = lengths_of_gpt2() if kind == "gpt2" else tokenizer.byte_lengths()
    assert sum(lengths[ids]) == len(text.encode("utf-8"))


# ----------------------------------------------------------------------------------------------------------------------
# prepare: the ids of whole documents


def lines_and_blanks(text: str, mode: str) -> list[str]:
    """Split a text into documents at blank lines, or at every line (blank lines belong to the line before them)."""
    found, blank_before = [""], False
    for line in re.findall(r"[^\n]*\n|[^\n]+", text):
        blank = not line.strip(" \t\n")
        if not blank and found[-1].strip() and (mode == "line" or blank_before):
            found.append("")
        found[-1] += line
        blank_before = blank
    return found


def reference_encoder(kind: str, texts: list[str], n_tokens: int):
    """(encode, id of <|endoftext|>) made here from whole documents; the id is None for kinds that lack it."""
    if kind == "char":
        characters = sorted(set("".join(texts)))
        return lambda text: [characters.index(c) for c in text], None
    if kind == "bpe":
        theirs = train_hugging_face(texts, n_tokens - 1)
        return lambda text: theirs.encode(text).ids, theirs.get_vocab_size()
    if kind == "gpt2":
        gpt2_or_skip()
        return tiktoken.get_encoding("gpt2").encode_ordinary, 50256
    split = notebook_split if "alone" in kind else joined_split
    change = str.lower if "lower" in kind else str
    words = sorted({word for text in texts for word in split(change(text))})
    ids = {word: i for i, word in enumerate(words)}
    return lambda text: [ids.get(word, len(ids)) for word in split(change(text))], None


def vocabulary_of(kind: str, **more) -> Vocabulary:
    return Vocabulary(kind.split()[0], vocab_size=400, lower="lower" in kind, spaces_alone="alone" in kind, **more)


def check_prepared(folder, kind: str, texts: list[str], ends: bool, exact: bool = True):
    """Check bins and meta.json against a plain loop over whole documents; ends: of files, <|endoftext|> parts them."""
    with open(os.path.join(folder, "meta.json"), encoding="utf-8") as file:
        meta = json.load(file)
    encode, end_id = reference_encoder(kind, texts, 400)
    if end_id is None and ends:
        end_id = meta["vocab_size"] - 1  # declared for lack of anything else that parts documents
    end = [end_id] if end_id is not None and len(texts) > 1 else []
    expected = {"train": [], "val": []}
    sides = {"train": "", "val": ""}
    if meta["split"] == "position":
        cut, place = meta["characters"]["train"], 0
        n = sum(map(len, texts))
        assert cut == int(n * 0.9) or abs(cut - 0.9 * n) < 40 and kind != "char"
        for text in texts:
            here = min(max(cut - place, 0), len(text))
            place += len(text)
            for side, part, whole in (("train", text[:here], here == len(text)), ("val", text[here:], True)):
                if part:
                    expected[side] += encode(part) + (end if whole else [])
                    sides[side] += part
    else:
        bins = {side: read_ids(folder, side) for side in expected}
        for text in texts:  # each begins with another word, so one side alone goes on with it
            ids = encode(text) + end
            fits = [side for side in bins if bins[side][len(expected[side]) :][: len(ids)] == ids]
            assert len(fits) == 1, (fits, text)
            expected[fits[0]] += ids
            sides[fits[0]] += text
        assert 0.05 <= len(sides["val"]) / sum(map(len, texts)) <= 0.2
    for side in expected:
        assert read_ids(folder, side) == expected[side], side
        assert meta["tokens"][side] == len(expected[side])
        assert meta["characters"][side] == len(sides[side])
        assert meta["bytes"][side] == len(sides[side].encode("utf-8"))
    assert meta["documents"] == len(texts)
    both = b"".join(np.array(expected[side], dtype="<u2").tobytes() for side in ("train", "val"))
    assert meta["ids_sha256"] == hashlib.sha256(both).hexdigest()
    return meta


def documents_with_everything(n: int) -> list[str]:
    """n texts of some sixty characters that begin differently, made of pieces of TEXTS."""
    everything = "".join(TEXTS.values()).replace("Σ", "S").replace("\r", "").replace("\n", " ") + "x" * 40 + " "
    return [f"{i:03} " + everything[i * 41 % 700 :][: 50 + i % 23] + "y" for i in range(n)]


@pytest.fixture
def tiny_pieces(monkeypatch):
    """Files are read and jobs are cut so small that every document is cut many times."""
    monkeypatch.setattr(preparing, "CHARS_PER_JOB", 16)
    monkeypatch.setattr(documents, "CHUNK_BYTES", 250)


@pytest.mark.parametrize(
    "kind, mode, n",
    [
        *itertools.product(["char", "word", "bpe", "gpt2"], ["file", "line", "blank", "none"], [1, 60]),
        *itertools.product(["word alone", "word lower"], ["file"], [1, 60]),
    ],
)
def test_the_bins_hold_the_ids_of_whole_documents(tmp_path, tiny_pieces, kind, mode, n):
    if kind == "gpt2":
        gpt2_or_skip()
    texts = documents_with_everything(n) if n > 1 else [" ".join(documents_with_everything(9))]
    if mode == "file":
        paths = [write(tmp_path / f"{i:03}.txt", text) for i, text in enumerate(texts)]
    elif mode == "none":
        texts = [text + "\n" for text in texts]
        paths = [write(tmp_path / f"{i:03}.txt", text) for i, text in enumerate(texts)]
        texts = ["".join(texts)]
    else:
        ends = ["\n"] * 3 + ["\n\n", "\n \t\n", "\n\n\n"] if mode == "line" else ["\n\n", "\n \t\n", "\n\n\n"]
        text = "".join(text + ends[i % len(ends)] for i, text in enumerate(texts))
        texts = lines_and_blanks(text, mode)
        assert len(texts) == n
        paths = [write(tmp_path / "a.txt", text)]
    prepare(str(tmp_path / "out"), Files(paths, mode), vocabulary_of(kind), quiet=True)
    meta = check_prepared(tmp_path / "out", kind, texts, mode == "file" and len(texts) > 1)
    assert meta["split"] == ("documents" if len(texts) >= 20 else "position")


@pytest.mark.parametrize(
    "kind, mode", [("word", "file"), *itertools.product(["char", "bpe", "gpt2"], ["file", "line", "blank"])]
)
@pytest.mark.slow
def test_documents_longer_than_a_piece_end_where_they_end(tmp_path, monkeypatch, kind, mode):
    if kind == "gpt2":
        gpt2_or_skip()
    monkeypatch.setattr(preparing, "CHARS_PER_JOB", 16)
    texts = documents_with_everything(40)
    for piece in (7, 64):  # bytes: ends come at the end of a piece, at its beginning and across
        monkeypatch.setattr(documents, "CHUNK_BYTES", piece)
        folder = tmp_path / str(piece)
        os.makedirs(folder)
        if mode == "file":
            paths, expected = [write(folder / f"{i:03}.txt", text) for i, text in enumerate(texts)], texts
        else:
            end = "\n" if mode == "line" else "\n\n"
            paths, expected = [write(folder / "a.txt", end.join(texts) + end)], [text + end for text in texts]
        prepare(str(folder / "out"), Files(paths, mode), vocabulary_of(kind), quiet=True)
        check_prepared(folder / "out", kind, expected, mode == "file")


@pytest.mark.slow
def test_small_letters_do_not_depend_on_where_a_text_is_cut(tmp_path, monkeypatch):
    text = "ΟΔΟΣ.Α ΟΔΟΣ. Α.Σ ΑΣ:Β καὶ " * 30  # the small form of a sigma depends on the letters around it
    path = write(tmp_path / "a.txt", text)
    prepare(str(tmp_path / "whole"), Files([path]), Vocabulary("word", lower=True), quiet=True)
    assert check_prepared(tmp_path / "whole", "word lower", [text], False)
    monkeypatch.setattr(preparing, "CHARS_PER_JOB", 8)
    prepare(str(tmp_path / "cut"), Files([path]), Vocabulary("word", lower=True), quiet=True)
    for name in ("meta.json", "train.bin", "val.bin"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("spaces_alone", [False, True])
def test_no_word_of_a_prepared_text_is_unknown_without_a_minimum_count(tmp_path, spaces_alone):
    text = "hello wonderful " * 5 + "world.\n"  # nine tenths of it end within a word
    path = write(tmp_path / "a.txt", text)
    prepared = prepare(str(tmp_path / "out"), Files([path]), Vocabulary("word", spaces_alone=spaces_alone), quiet=True)
    ids = read_ids(tmp_path / "out", "train") + read_ids(tmp_path / "out", "val")
    assert prepared.tokenizer.decode(ids) == text
    assert prepared.tokenizer.unknown_id not in ids


def test_no_word_in_small_letters_is_unknown_where_the_text_is_split(tmp_path):
    text = "abc " * 20 + "ΟΔΟΣ.ΑΒΓ x y"  # nine tenths of it end before a sigma that is final if the text ends there
    path = write(tmp_path / "a.txt", text)
    prepared = prepare(str(tmp_path / "out"), Files([path]), Vocabulary("word", lower=True), quiet=True)
    ids = read_ids(tmp_path / "out", "train") + read_ids(tmp_path / "out", "val")
    assert prepared.tokenizer.decode(ids) == text.lower()


def test_a_text_is_split_even_if_its_last_tenth_is_one_word(tmp_path):
    for i, text in enumerate(("word " * 50 + "x" * 200, "\u77e5\u8005\u4e0d\u60d1" * 50)):  # or has no blanks at all
        path = write(tmp_path / f"{i}.txt", text)
        try:
            prepared = prepare(str(tmp_path / "out"), Files([path]), Vocabulary("word"), quiet=True)
        except ValueError as error:  # that this is no text for words is said, and no cure is named that does not help
            assert i == 1 and "--tokenizer" in str(error)
            continue
        assert min(prepared.meta["tokens"].values()) >= 2


@pytest.mark.parametrize("kind", ["char", "word", "bpe", "gpt2"])
def test_declared_special_tokens_are_stored_and_no_text_gives_them(tmp_path, tiny_pieces, kind):
    if kind == "gpt2":
        gpt2_or_skip()
    texts = [f"{i:03} a {TASKS[i % 2]} b {END} <unk> c" for i in range(30)]
    paths = [write(tmp_path / f"{i:03}.txt", text) for i, text in enumerate(texts)]
    prepare(str(tmp_path / "out"), Files(paths), vocabulary_of(kind, special=", ".join(TASKS)), quiet=True)
    with open(tmp_path / "out" / "meta.json", encoding="utf-8") as file:
        meta = json.load(file)
    tokenizer = from_dict(meta["tokenizer"])
    assert meta["vocab_size"] == tokenizer.vocab_size and {*TASKS, END} <= set(tokenizer.specials)
    ids = read_ids(tmp_path / "out", "train") + read_ids(tmp_path / "out", "val")
    used = Counter(ids)
    assert {name: used[i] for name, i in tokenizer.specials.items() if used[i]} == {END: len(texts)}
    documents_back = sorted(filter(None, re.split(f"{re.escape(END)}(?=\\d|$)", tokenizer.decode(ids))))
    assert documents_back == texts


@pytest.mark.parametrize("kind", ["char", "bpe", "gpt2"])
@given(text=WILD, piece=st.integers(2, 30), job=st.integers(1, 20))
@many(50)
def test_any_prepared_text_comes_back_or_is_refused_with_a_sentence(kind, text, piece, job):
    if kind == "gpt2":
        gpt2_or_skip()
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(preparing, "CHARS_PER_JOB", job)
        patch.setattr(documents, "CHUNK_BYTES", piece)
        path, out = write(os.path.join(folder, "a.txt"), text), os.path.join(folder, "out")
        expected = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        try:
            prepared = prepare(out, Files([path]), vocabulary_of(kind), val_fraction=0.5, quiet=True)
        except ValueError as error:
            assert str(error) and "\n" not in str(error)
            assert not os.path.exists(out) or visible(out) == []
            sides = expected[: len(expected) // 2], expected[len(expected) // 2 :]
            few = (
                len(expected) < 4
                or kind == "bpe"
                or kind == "gpt2"
                and min(len(GPT2Tokenizer().encode(side)) for side in sides) < 2
            )
            assert "\0" in text or not expected.strip() or few, "this text should have been taken"
            return
        assert visible(out) == ["meta.json", "train.bin", "val.bin"]
        sides = [prepared.tokenizer.decode(read_ids(out, side)) for side in ("train", "val")]
        assert "".join(sides) == expected
        assert list(prepared.meta["characters"].values()) == [*map(len, sides)]
        assert list(prepared.meta["bytes"].values()) == [len(side.encode("utf-8")) for side in sides]


@given(texts=st.lists(TAME, min_size=2, max_size=6), job=st.integers(1, 20))
@many(4)
def test_any_prepared_words_are_those_of_whole_documents(texts, job):
    texts = ["start " + text.replace("\0", "").replace("\r", "") + " end" for text in texts]
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(preparing, "CHARS_PER_JOB", job)
        patch.setattr(documents, "CHUNK_BYTES", 20)
        paths = [write(os.path.join(folder, f"{i}.txt"), text) for i, text in enumerate(texts)]
        prepared = prepare(os.path.join(folder, "out"), Files(paths), Vocabulary("word"), val_fraction=0.3, quiet=True)
        words = sorted({word for text in texts for word in joined_split(text)})
        assert prepared.tokenizer.words == words
        end_id, cut, place = len(words) + 1, prepared.meta["characters"]["train"], 0
        expected = {"train": [], "val": []}
        for text in texts:
            here = min(max(cut - place, 0), len(text))
            place += len(text)
            for side, part, whole in (("train", text[:here], here == len(text)), ("val", text[here:], True)):
                ids = [words.index(w) if w in words else len(words) for w in joined_split(part)]
                expected[side] += ids + [end_id] * whole if part else []
        assert {side: read_ids(os.path.join(folder, "out"), side) for side in expected} == expected


# ----------------------------------------------------------------------------------------------------------------------
# too many entries


def characters(n: int) -> str:
    """n different characters that a text may have."""
    return "".join(chr(c) for c in range(0x21, 0x21 + n + 4000) if not 0xD800 <= c < 0xE000 and c != 0xFEFF)[:n]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind,n,fits",
    [
        ("char", 65536, True),
        ("char", 65537, False),
        ("word", 65534, True),
        ("word", 65535, False),
        ("word", 65536, False),
    ],
)
def test_vocabularies_above_65536_entries_are_refused_with_the_advice(tmp_path, kind, n, fits):
    text = characters(n) if kind == "char" else "\n".join(f"w{i}" for i in range(n))  # + the line end and <unk>
    files = Files([write(tmp_path / "a.txt", text)])
    if fits:
        prepared = prepare(str(tmp_path / "out"), files, Vocabulary(kind), quiet=True)
        assert prepared.meta["vocab_size"] == 65536
        ids = read_ids(tmp_path / "out", "train") + read_ids(tmp_path / "out", "val")
        if kind == "char":
            assert ids == [*range(65536)]
        else:
            assert max(ids) >= 65534 and len(ids) >= 2 * n - 1
        return
    with pytest.raises(ValueError) as caught:
        prepare(str(tmp_path / "out"), files, Vocabulary(kind), quiet=True)
    message = str(caught.value)
    assert "65,536" in message and "--tokenizer=bpe" in message and "\n" not in message
    assert kind == "char" or "--min_count" in message
    assert not os.path.exists(tmp_path / "out") or visible(tmp_path / "out") == []


def test_a_larger_minimum_count_makes_a_vocabulary_fit(tmp_path):
    text = "\n".join(f"w{i}" for i in range(66000)) + "\nthe the the\n" * 10
    prepared = prepare(
        str(tmp_path / "out"), Files([write(tmp_path / "a.txt", text)]), Vocabulary("word", min_count=2), quiet=True
    )
    assert prepared.tokenizer.words == ["\n", " the", "the"]
