"""The streaming detokenizer: whole characters, stop strings and stop ids."""

import codecs
import random
import re

import pytest

from dongpt.decode.text import Detokenizer, parse_stop_ids, parse_stop_strings
from dongpt.text.tokenizers import CharTokenizer, GPT2Tokenizer

smoke = pytest.mark.smoke
SEPARATOR = "---------------"  # nanoGPT's
SPEED = re.compile(r"([\d,]+) tokens in \d+\.\d s \([\d,]+ tokens/s\), first token after \d+ ms(, interrupted)?")
LETTERS = CharTokenizer("\nabcdexyz")
PIECES = ["a", "b", "ab", "é", "ğ", "日本", "🙂", "👩‍👩‍👧", "\n", " the", "日", "本語", "�", "#", "##"]


# ----------------------------------------------------------------------------------------------------------------------
# Detokenizer


def write(tokenizer, ids, stop=(), stop_ids=()) -> tuple[Detokenizer, list[str]]:
    """(the finished Detokenizer of one row that was given ids, what it said at each of them and in the end)."""
    texts = Detokenizer(tokenizer, 1, stop, stop_ids)
    pieces = [texts.add([i])[0] for i in ids]
    return texts, pieces + texts.finish()


def whole(tokenizer, ids, final: bool = False) -> str:
    """The characters of ids that are complete, of one decoding; with final also what is broken at the end."""
    if tokenizer.kind == "char":
        return "".join(tokenizer.characters[i] for i in ids)
    return codecs.utf_8_decode(b"".join(map(tokenizer.encoding.decode_single_token_bytes, ids)), "replace", final)[0]


def slowly(tokenizer, ids, stop=(), stop_ids=()) -> tuple[str, str, int]:
    """(text, end, tokens): decode all anew after each id, and cut at the first stop string as soon as there is one."""
    end, n = "length", len(ids)
    if stops := [at for at, i in enumerate(ids) if i in stop_ids]:
        end, n = "stop", stops[0]
    for size, final in [*((size, False) for size in range(1, n + 1)), (n, True)]:
        text = whole(tokenizer, ids[:size], final)
        if found := [text.index(s) for s in stop if s in text]:
            return text[: min(found)], "stop", size
    return text, end, n


def assert_written_as_slowly(tokenizer, ids, stop, stop_ids=()):
    """Check text, end, count and pieces of one row against slowly()."""
    texts, pieces = write(tokenizer, ids, stop, stop_ids)
    found = texts.texts[0], texts.end_reasons[0], texts.n_tokens[0]
    assert found == slowly(tokenizer, ids, stop, stop_ids), (ids, stop, stop_ids)
    assert "".join(pieces) == texts.texts[0] and texts.done


@smoke
@pytest.mark.parametrize(
    "text, stop, pieces",
    [
        ("abc", [], ["a", "b", "c", ""]),
        ("xyz", ["abc"], ["x", "y", "z", ""]),
        ("xabcy", ["abc"], ["x", "", "", "", "", ""]),
        ("xababd", ["abc"], ["x", "", "", "ab", "", "abd", ""]),  # what looked like a stop string is said, not its end
        ("aabaac", ["aabaax"], ["", "", "", "", "", "aabaac", ""]),
        ("xab", ["abc"], ["x", "", "", "ab"]),  # the beginning of a stop string at the end
        ("aax", ["a"], ["", "", "", ""]),  # in the very first token
        ("xab", ["abc", "ab"], ["x", "", "", ""]),  # a prefix of another: the shorter comes first
        ("xab", ["b", "ab"], ["x", "", "", ""]),  # two that are complete at once: what begins first
        ("xabcd", ["bc", "abcd"], ["x", "", "", "a", "", ""]),  # inside another: it is complete first
        ("xabd", ["abc", "bd"], ["x", "", "", "a", ""]),  # the end of what another held back
        ("xaby", ["abc", "bd"], ["x", "", "", "aby", ""]),
        ("\n\nx", ["\n\n"], ["", "", "", ""]),
        ("\nx\n", ["\n\n"], ["", "\nx", "", "\n"]),
    ],
)
def test_a_text_says_at_each_id_what_cannot_belong_to_a_stop_string(text, stop, pieces):
    assert write(LETTERS, LETTERS.encode(text), stop)[1] == pieces


@smoke
@pytest.mark.parametrize("seed", range(4))
def test_random_texts_stop_where_decoding_all_of_them_would(seed):
    rng = random.Random(seed)
    for _ in range(400):
        ids = [rng.randrange(3) for _ in range(rng.randrange(14))]
        stop = ["".join(rng.choice("\nab") for _ in range(rng.randint(1, 4))) for _ in range(rng.randrange(4))]
        assert_written_as_slowly(LETTERS, ids, stop, rng.choice([[], [], [2]]))


@pytest.mark.parametrize("seed", range(3))
def test_random_texts_of_byte_pairs_stop_where_decoding_all_of_them_would(gpt2_vocabulary, seed):
    rng, tokenizer = random.Random(seed), GPT2Tokenizer()
    for n in range(300):
        text = "".join(rng.choices(PIECES, k=rng.randrange(12)))
        ids = tokenizer.encode(text)
        if n % 2:  # broken characters
            ids = [rng.choice([i, rng.randrange(256), rng.randrange(50257)]) for i in ids]
        stop = ["".join(rng.choices(PIECES, k=rng.randint(1, 3))) for _ in range(rng.randrange(4))]
        assert_written_as_slowly(tokenizer, ids, stop, rng.sample(ids, min(len(ids), rng.randrange(2))))


@pytest.mark.parametrize("text", ["🙂", "Kadıköy'de çğşİ", "太阳能龘", "👩‍👩‍👧 ok"])
def test_a_character_that_is_split_over_ids_comes_whole_with_its_last_one(gpt2_vocabulary, text):
    tokenizer = GPT2Tokenizer()
    ids = tokenizer.encode(text)
    texts, pieces = write(tokenizer, ids)
    assert texts.texts == [text] and "\ufffd" not in "".join(pieces) and texts.n_tokens == [len(ids)]
    if text == "🙂":
        assert len(ids) > 1 and pieces == [""] * (len(ids) - 1) + ["🙂", ""]


def test_rows_do_not_share_what_is_left_of_a_character(gpt2_vocabulary):
    tokenizer, texts = GPT2Tokenizer(), Detokenizer(GPT2Tokenizer(), 2)
    for ids in zip(tokenizer.encode("🙂a"), tokenizer.encode("a🙂")):
        texts.add(ids)
    assert texts.texts == ["🙂a", "a🙂"]


def test_a_stop_string_may_be_split_inside_a_character(gpt2_vocabulary):
    tokenizer = GPT2Tokenizer()
    ids = tokenizer.encode("ab 🙂🙂 c")
    texts, pieces = write(tokenizer, ids, ["🙂🙂"])
    assert texts.texts == ["ab "] and texts.end_reasons == ["stop"] and texts.n_tokens[0] < len(ids)


def test_a_stop_string_in_the_middle_of_an_id_cuts_it(gpt2_vocabulary):
    tokenizer = GPT2Tokenizer()
    ids = tokenizer.encode(" windmill")
    assert write(tokenizer, ids, ["mill"])[0].texts == [" wind"] and write(tokenizer, ids, [" "])[0].texts == [""]


@pytest.mark.parametrize("stop_id", [False, True])
def test_a_character_that_is_broken_at_the_end_becomes_a_replacement_character(gpt2_vocabulary, stop_id):
    tokenizer = GPT2Tokenizer()
    ids = tokenizer.encode("a🙂")[:-1] + [tokenizer.start_id] * stop_id
    texts, pieces = write(tokenizer, ids, stop_ids=[tokenizer.start_id])
    assert texts.texts == ["a\ufffd"] and pieces.count("\ufffd") == 1
    assert texts.end_reasons == ["stop" if stop_id else "length"] and texts.n_tokens == [len(ids) - stop_id]


@smoke
def test_a_text_ends_before_a_stop_id_and_what_was_held_back_is_said():
    texts, pieces = write(LETTERS, LETTERS.encode("xaby"), ["abc"], LETTERS.encode("yz"))
    assert pieces == ["x", "", "", "ab", ""] and texts.end_reasons == ["stop"] and texts.n_tokens == [3]
    assert write(LETTERS, LETTERS.encode("y"), stop_ids=LETTERS.encode("y"))[0].texts == [""]


@smoke
def test_a_special_token_is_a_stop_string_by_its_name():
    tokenizer = CharTokenizer("\nabc", ["<end>"])
    ids = tokenizer.encode("ab<end>c", special=True)
    assert write(tokenizer, ids)[0].texts == ["ab<end>c"] and write(tokenizer, ids, ["<end>"])[0].texts == ["ab"]


@smoke
def test_rows_end_on_their_own_and_hear_nothing_after_that():
    texts, said = Detokenizer(LETTERS, 3, ["b"], [4]), ["", "", ""]  # 4 is d
    for ids in (LETTERS.encode(column) for column in ("aax", "byd", "cya", "acb")):
        said = [before + piece for before, piece in zip(said, texts.add(ids))]
        assert texts.texts == said and texts.done == all(texts.end_reasons)
    assert said == ["a", "ayyc", "x"] and texts.end_reasons == ["stop", "", "stop"] and texts.n_tokens == [2, 4, 1]
    assert texts.add([-1, LETTERS.ids["x"], -1]) == ["", "x", ""] and not texts.done  # as a stream has finished rows
    assert texts.finish("interrupted") == ["", "", ""] and texts.end_reasons == ["stop", "interrupted", "stop"]
    assert texts.done and texts.finish() == ["", "", ""] and texts.end_reasons[1] == "interrupted"


@smoke
@pytest.mark.parametrize(
    "setting, stop",
    [
        ("", []),
        ("###", ["###"]),
        ("[", ["["]),
        ("[Sancho]", ["[Sancho]"]),
        ("a,b", ["a,b"]),
        (" ", [" "]),
        ('["a", "b"]', ["a", "b"]),
        ('["\\n\\n"]', ["\n\n"]),
        ('["\n"]', ["\n"]),
        ('["ğ🙂"]', ["ğ🙂"]),
        ("{", ["{"]),
    ],
)
def test_stop_is_one_string_or_a_json_list(setting, stop):
    assert parse_stop_strings(setting) == stop


@smoke
@pytest.mark.parametrize("setting", ["[]", '[""]', '["a", ""]', "[1]", '["a", null]', '[["a"]]'])
def test_a_list_of_what_cannot_be_a_stop_string_is_refused(setting):
    with pytest.raises(ValueError, match="--stop=.*JSON list"):
        parse_stop_strings(setting)


@smoke
def test_stop_ids_are_divided_by_commas():
    assert [parse_stop_ids(ids, 9) for ids in ("", " ", "0", "8", " 1 , 2 ")] == [[], [], [0], [8], [1, 2]]


@smoke
@pytest.mark.parametrize(
    "setting, wrong",
    [
        ("9", "'9'"),
        ("-1", "'-1'"),
        ("a", "'a'"),
        ("1,,2", "''"),
        ("1;2", "'1;2'"),
        ("1.0", "'1.0'"),
        ("0,10,x", "'10', 'x'"),
        ("²", "'²'"),
        (",", "''"),
    ],
)
def test_a_stop_id_that_is_none_is_refused_by_name(setting, wrong):
    with pytest.raises(ValueError, match="--stop_ids: ") as caught:
        parse_stop_ids(setting, 9)
    assert f"got {wrong}" in str(caught.value) and "0 to 8" in str(caught.value)
