"""configurator.py: what is accepted, what is refused, and in which words; every row of STYLE.md's behaviour table."""

import glob
import os
import re
import sys
import warnings
import zipfile
from dataclasses import dataclass, fields
from typing import Annotated, Literal, get_args, get_type_hints

import pytest
from helpers import ROOT

import configurator
from configurator import build_config, load, load_with_paths
from train import TrainConfig

pytestmark = pytest.mark.smoke


@dataclass(frozen=True)
class Small:
    """One field of every type that a configuration may have."""

    count: int = 1  # a whole number
    rate: float = 0.5  # a number
    on: bool = False  # a switch
    name: str = "x"  # any text
    mode: Literal["auto", True, False] = "auto"  # words or a switch
    limit: int | None = None  # a number or nothing
    minutes: float | None = None  # a time or nothing


def refused(*argv: str, cls=TrainConfig) -> str:
    """The sentence with which argv is refused: one line."""
    with pytest.raises(ValueError) as caught:
        load(cls, list(argv))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def config_file(folder, text: str, name: str = "settings.py") -> str:
    """Path of a config file in folder that holds text."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


# ----------------------------------------------------------------------------------------------------------------------
# the command line


def test_without_arguments_all_is_default_and_nothing_is_given():
    cfg, given = load(TrainConfig, [])
    assert cfg == TrainConfig() and given == {}


def test_arguments_come_from_the_command_line_by_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--batch_size=3"])
    assert load(TrainConfig)[1] == {"batch_size": 3}


@pytest.mark.parametrize(
    "argument, key, value",
    [
        ("--rate=0", "rate", 0.0),
        ("--rate=1e-3", "rate", 1e-3),
        ("--count=-5", "count", -5),
        ("--count=1_000", "count", 1000),
        ("--name=123", "name", "123"),
        ("--name=a=b", "name", "a=b"),
        ("--name=", "name", ""),
        ("--name=--on=True x.py", "name", "--on=True x.py"),
        ("--name=None", "name", "None"),
        ("--name=señor “Quijano” \U0001f40e", "name", "señor “Quijano” \U0001f40e"),
        ("--on=false", "on", False),
        ("--on=true", "on", True),
        ("--on=False", "on", False),
        ("--on=True", "on", True),
        ("--on=yes", "on", True),
        ("--on=On", "on", True),
        ("--on=NO", "on", False),
        ("--on=off", "on", False),
        ("--on=FALSE", "on", False),
        ("--count=1e3", "count", 1000),
        ("--count=-2.0", "count", -2),
        ("--count=1.5e1", "count", 15),
        ("--limit=2e2", "limit", 200),
        ("--minutes=2e2", "minutes", 200.0),
        ("--name=yes", "name", "yes"),
        ("--mode=auto", "mode", "auto"),
        ("--mode=false", "mode", False),
        ("--mode=Yes", "mode", True),
        ("--limit=None", "limit", None),
        ("--limit=7", "limit", 7),
        ("--minutes=5", "minutes", 5.0),
        ("--minutes=None", "minutes", None),
    ],
)
def test_value_on_the_command_line_gets_the_type_of_its_field(argument, key, value):
    cfg, given = load(Small, [argument])
    assert given == {key: value} and type(given[key]) is type(value)
    assert getattr(cfg, key) == value and type(getattr(cfg, key)) is type(value)


@pytest.mark.parametrize(
    "argument, expected, got",
    [
        ("--count=1e-3", "int", "0.001"),
        ("--count=2.5", "int", "2.5"),
        ("--count=1e999", "int", "inf"),
        ("--count=yes", "int", "'yes'"),
        ("--count=True", "int", "True"),
        ("--count=many", "int", "'many'"),
        ("--count=", "int", "''"),
        ("--count=None", "int", "None"),
        ("--count=[1]", "int", "[1]"),
        ("--count=__import__('os')", "int", "__import__"),
        ("--rate=True", "float", "True"),
        ("--rate=high", "float", "'high'"),
        ("--on=1", "bool", "1"),
        ("--on=maybe", "bool", "'maybe'"),
        ("--mode=1", "'auto' or True or False", "1"),
        ("--mode=maybe", "'auto' or True or False", "'maybe'"),
        ("--limit=2.5", "int or None", "2.5"),
        ("--limit=True", "int or None", "True"),
        ("--minutes=soon", "float or None", "'soon'"),
    ],
)
def test_value_of_another_type_is_refused(argument, expected, got):
    message = refused(argument, cls=Small)
    key = argument[2:].partition("=")[0]
    assert message.startswith(f"command line: {key}: expected {expected}, got") and got in message


def test_table_dropout_0_means_a_float():
    assert repr(load(TrainConfig, ["--dropout=0"])[0].dropout) == "0.0"


def test_table_max_iters_1e3_is_1000_and_1e_minus_3_is_refused():
    assert repr(load(TrainConfig, ["--max_iters=1e3"])[0].max_iters) == "1000"
    assert refused("--max_iters=1e-3") == "command line: max_iters: expected int, got 0.001"


def test_table_start_keeps_what_was_typed():
    from sample import SampleConfig

    assert load(SampleConfig, ["--start=123"])[0].start == "123"
    assert load(SampleConfig, ["--start=a=b"])[0].start == "a=b"
    assert load(SampleConfig, ["--start="])[0].start == ""


def test_table_compile_false_is_a_bool():
    assert load(TrainConfig, ["--compile=false"])[0].compile is False


def test_table_misspelt_key_on_the_command_line():
    assert refused("--bach_size=1").endswith("unknown key 'bach_size', did you mean 'batch_size'?")


def test_table_misspelt_key_in_a_file_names_the_file(tmp_path):
    path = config_file(tmp_path, "bach_size = 99\n")
    assert refused(path) == f"{path}: unknown key 'bach_size', did you mean 'batch_size'?"


def test_table_text_for_a_number_in_a_file(tmp_path):
    path = config_file(tmp_path, 'batch_size = "64"\n')
    message = refused(path)
    assert message == f"{path}: batch_size: expected int, got '64'"


def test_table_batch_size_True():
    assert refused("--batch_size=True").endswith("expected int, got True")


def test_table_pos_embd_lists_its_choices():
    message = refused("--pos_embd=ropee")
    for choice in ("default", "absolute", "rope", "relative", "alibi", "default+relative"):
        assert f"'{choice}'" in message
    assert "expected" in message and message.endswith("got 'ropee'")


def test_table_n_embd_is_refused_before_anything_starts():
    message = refused("--n_embd=770")
    assert "n_embd=770" in message and "n_head=12" in message and "multiple" in message


def test_table_imports_arithmetic_and_functions_work_in_a_file(tmp_path):
    path = config_file(
        tmp_path,
        "import time\ndef double(x):\n    return 2 * x\n_scratch = 3\n"
        "batch_size = 5 * 8\nmax_iters = double(_scratch)\n",
    )
    assert load(TrainConfig, [path])[1] == {"batch_size": 40, "max_iters": 6}


@pytest.mark.parametrize("pos_embd", ["default", "rope", "relative", "alibi"])
@pytest.mark.slow
def test_advice_on_n_embd_is_accepted(pos_embd):
    """--n_embd=96 --n_head=5 used to get the advice n_embd=95, which rope then refused, since its heads were odd."""
    n_refused = 0
    for n_head in range(1, 8):
        for n_embd in range(1, 50):
            try:
                TrainConfig(pos_embd=pos_embd, n_head=n_head, n_embd=n_embd)
            except ValueError as error:
                n_refused += 1
                key, value = str(error).partition(": use ")[2].split("=")
                cfg = TrainConfig(**{"pos_embd": pos_embd, "n_head": n_head, "n_embd": n_embd, key: int(value)})
                assert abs(cfg.n_embd - n_embd) <= max(n_head, 2 * n_head - n_embd), error  # and it is near
    assert n_refused > 100


def test_advice_on_n_embd_gives_a_model_that_computes():
    import torch

    from model import GPT, GPTConfig

    sizes = dict(n_layer=1, n_head=5, block_size=4, vocab_size=7, pos_embd="rope")
    with pytest.raises(ValueError, match="n_embd=96 is not a multiple of n_head=5: use n_embd=100"):
        GPTConfig(n_embd=96, **sizes)
    with pytest.raises(ValueError, match="rope needs an even head size, not n_embd=95 / n_head=5: use n_embd=100"):
        GPTConfig(n_embd=95, **sizes)
    assert GPT(GPTConfig(n_embd=100, **sizes))(torch.zeros(1, 4, dtype=torch.int64))[0].shape == (1, 1, 7)


@pytest.mark.parametrize("key", [field.name for field in fields(TrainConfig)])
def test_suggested_key_is_accepted(key):
    for typo in (key[:-1] + "x", key + "s", key.replace("_", "", 1)):
        if typo not in get_type_hints(TrainConfig):
            suggestion = refused(f"--{typo}=1").split("did you mean ")[1].strip("?'")
            cfg, given = load(TrainConfig, [f"--{suggestion}={getattr(TrainConfig, suggestion)}"])
            assert given == {suggestion: getattr(cfg, suggestion)}


@pytest.mark.parametrize("name", ["default", "absolute", "rope", "relative", "alibi", "default+relative"])
def test_every_pos_embd_of_the_design_is_a_choice(name):
    kind = get_type_hints(TrainConfig)["pos_embd"]
    assert configurator.check_type(configurator.parse_value(name, kind), kind, "here") == name
    assert len(get_args(kind)) == 6
    try:
        cfg, _ = load(TrainConfig, [f"--pos_embd={name}"])
    except ValueError as error:  # a scheme that is still to be built is refused by its name
        assert name in str(error) and "pos_embd" in str(error)
    else:
        assert cfg.pos_embd == ("default" if name == "absolute" else name)


def test_bare_key_of_a_bool_means_true():
    assert load(Small, ["--on"])[1] == {"on": True}
    assert load(Small, ["--mode"])[1] == {"mode": True}
    assert load(TrainConfig, ["--eval_only", "--batch_size=2"])[1] == {"eval_only": True, "batch_size": 2}


@pytest.mark.parametrize("key", ["count", "rate", "name", "limit"])
@pytest.mark.parametrize("following", [[], ["--on"], ["--count=2"]])
def test_key_without_its_value_is_refused_in_a_sentence(key, following):
    message = refused(f"--{key}", *following, cls=Small)
    assert message.startswith(f"command line: --{key} needs a value") and f"--{key}=" in message


@pytest.mark.parametrize(
    "argv, given",
    [
        (["--count", "5"], {"count": 5}),
        (["--count", "-5"], {"count": -5}),
        (["--count", "1e3", "--rate", "0"], {"count": 1000, "rate": 0.0}),
        (["--name", "a=b"], {"name": "a=b"}),
        (["--name", ""], {"name": ""}),
        (["--name", "-"], {"name": "-"}),
        (["--name", "quickstart"], {"name": "quickstart"}),
        (["--limit", "None", "--on", "--count", "2"], {"limit": None, "on": True, "count": 2}),
    ],
)
def test_value_may_follow_its_key_after_a_space(argv, given):
    assert load(Small, argv)[1] == given
    assert all(type(load(Small, argv)[1][key]) is type(value) for key, value in given.items())


def test_value_after_a_space_is_neither_a_path_nor_a_config(tmp_path, monkeypatch):
    config_file(tmp_path, "count = 2\n", "name.py")
    monkeypatch.chdir(tmp_path)
    _, given, paths = load_with_paths(Small, ["--name", "name.py", "run", "--count", "3"], "[PATH ...]")
    assert given == {"name": "name.py", "count": 3} and paths == ["run"]


def test_value_that_starts_with_two_dashes_needs_the_equals_sign():
    assert "--name needs a value" in refused("--name", "--x", cls=Small)
    assert load(Small, ["--name=--x"])[1] == {"name": "--x"}


@pytest.mark.parametrize("argv", [["--max-iters=9"], ["--max-iters", "9"], ["--max_iters", "9"]])
def test_dashes_in_a_key_stand_for_underscores(argv):
    assert load(TrainConfig, argv)[1] == {"max_iters": 9}


def test_dashes_in_a_value_stay():
    assert load(Small, ["--name=a-b"])[1] == load(Small, ["--name", "a-b"])[1] == {"name": "a-b"}
    assert load(TrainConfig, ["--out-dir", "out-a-b"])[1] == {"out_dir": "out-a-b"}


def test_misspelt_key_with_dashes_gets_a_suggestion():
    assert refused("--bach-size", "1").endswith("unknown key 'bach_size', did you mean 'batch_size'?")


@pytest.mark.parametrize("key, word", [("on", "False"), ("on", "no"), ("mode", "auto"), ("mode", "OFF")])
def test_value_after_a_switch_is_refused_with_advice_that_works(key, word):
    """The word would be taken for a path in chat.py, and the switch for True."""
    with pytest.raises(configurator.UserError) as caught:
        load_with_paths(Small, [f"--{key}", word], "[PATH]")
    advice = str(caught.value).split(": use ")[-1]
    assert advice == f"--{key}={word}" and load(Small, [advice])[1][key] in (False, "auto")


def test_directory_named_like_a_truth_value_is_a_path_after_a_switch(tmp_path, monkeypatch):
    (tmp_path / "on").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_with_paths(Small, ["--on", "on"], "[PATH]")[1:] == ({"on": True}, ["on"])


def test_join_values_writes_every_setting_with_an_equals_sign():
    argv = ["a", "--max-iters", "9", "--eval_only", "--out-dir=o-o", "b", "--compile"]
    joined = ["a", "--max_iters=9", "--eval_only=True", "--out_dir=o-o", "b", "--compile=True"]
    assert configurator.join_values(TrainConfig, argv) == joined
    assert configurator.join_values(TrainConfig, joined) == joined


def test_bare_misspelt_key_gets_a_suggestion():
    assert "did you mean 'eval_only'?" in refused("--eval_onli")


@pytest.mark.parametrize("flag", ["list", "help", "version"])
def test_misspelt_flag_that_is_no_setting_gets_a_suggestion(flag, tmp_path):
    for typo in (flag[:-1], flag[:-2] + flag[-1] + flag[-2]):  # --lis, --lits
        assert refused(f"--{typo}").endswith(f"unknown key '{typo}', did you mean --{flag}?")
        assert f"mean --{flag}" not in refused(config_file(tmp_path, f"{typo} = 1\n"))  # a file cannot set it
    assert "did you mean --list?" not in refused("--lits", cls=Small)  # only train.py and bench.py have it


@pytest.mark.parametrize("argv", [["--name=The", "old", "house"], ["--name", "The", "old"]])
def test_word_after_a_text_asks_for_quotes(argv):
    """The shell splits `--prompt=The old house` at the spaces."""
    assert refused(*argv, cls=Small).endswith('; if it is part of --name, put the whole text in quotes: --name="..."')
    assert load(Small, ["--name=The old house"])[1] == {"name": "The old house"}


def test_word_after_anything_but_a_text_does_not_ask_for_quotes():
    for argv in (["--count=2", "house"], ["house"], ["--on", "house"]):
        assert "quotes" not in refused(*argv, cls=Small)
    assert "did you mean config/quickstart.py?" in refused("--out_dir=runs", "quikstart")


def test_whole_number_that_is_too_large_for_a_float_is_refused_in_a_sentence():
    assert "rate" in refused("--rate=1" + "0" * 400, cls=Small)


@pytest.mark.parametrize("dashes", ["", "-", "\N{EN DASH}", "\N{EM DASH}"])  # the last two are pasted from web pages
def test_key_without_two_dashes_is_refused_with_advice_that_works(dashes):
    advice = refused(f"{dashes}batch_size=8").split()[-1]
    assert load(TrainConfig, [advice])[1] == {"batch_size": 8}


def test_key_that_resembles_nothing_points_to_the_help():
    message = refused("--zzzzzz=1")
    assert "'zzzzzz'" in message and "--help" in message


@pytest.mark.parametrize(
    "text",
    ["{[]:1}", "{{}}", "(" * 3000, "-" * 3000 + "1", "9" * 5000, "\x00", "lambda: 1", "1+"],
    ids=[
        "unhashable list",
        "unhashable set",
        "parentheses",
        "minus signs",
        "digits",
        "zero byte",
        "code",
        "half a sum",
    ],
)
def test_strange_text_for_a_number_is_refused_in_a_sentence(text):
    assert "count: expected int" in refused(f"--count={text}", cls=Small)


@pytest.mark.parametrize("text", ["5or", "0x5if", r"'\d'"])
def test_strange_text_prints_no_warning_of_python(text):
    with warnings.catch_warnings(record=True) as caught:  # a second line on stderr
        warnings.simplefilter("always")
        assert "count: expected int" in refused(f"--count={text}", cls=Small)
    assert not caught


# ----------------------------------------------------------------------------------------------------------------------
# bounds


@dataclass(frozen=True)
class Bounded:
    size: Annotated[int, ">=", 1] = 4  # a size
    share: Annotated[float, ">=", 0, "<", 1] = 0.1  # a share
    part: Annotated[float | None, ">", 0, "<=", 1] = None  # a part or nothing

    def __post_init__(self):
        if self.size == 7:
            raise ValueError("size=7 is taken: use 8")


@pytest.mark.parametrize(
    "argument, sentence",
    [
        ("--size=0", "size=0 must be at least 1"),
        ("--share=-0.5", "share=-0.5 must be at least 0 and below 1"),
        ("--share=1", "share=1.0 must be at least 0 and below 1"),
        ("--part=0", "part=0.0 must be above 0 and at most 1"),
        ("--part=1.5", "part=1.5 must be above 0 and at most 1"),
        ("--share=1e999", "share=inf must be at least 0 and below 1"),
    ],
)
def test_value_out_of_bounds_is_refused_with_its_bounds(argument, sentence):
    assert refused(argument, cls=Bounded) == sentence


@pytest.mark.parametrize("key, value", [("size", 1), ("share", 0), ("share", 0.999), ("part", 1), ("part", None)])
def test_values_at_their_bounds_are_accepted(key, value):
    assert load(Bounded, [f"--{key}={value}"])[1] == {key: value}


def test_all_values_out_of_bounds_are_reported_at_once():
    message = refused("--share=2", "--size=0", cls=Bounded)
    assert message == "size=0 must be at least 1; share=2.0 must be at least 0 and below 1"


def test_not_a_number_is_out_of_every_bound():
    with pytest.raises(configurator.UserError, match="share=nan must be"):
        build_config(Bounded, {"share": float("nan")})


def test_only_the_last_of_several_values_must_keep_its_bounds():
    assert load(Bounded, ["--size=0", "--size=3"])[0].size == 3


def test_bounds_of_a_subclass_replace_the_inherited_ones():
    @dataclass(frozen=True)
    class Narrow(Bounded):
        size: Annotated[int, ">=", 10] = 10

    assert refused("--size=9", cls=Narrow) == "size=9 must be at least 10"


def test_type_of_a_bounded_field_is_named_without_its_bounds():
    assert refused("--size=x", cls=Bounded) == "command line: size: expected int, got 'x'"
    assert refused("--part=x", cls=Bounded) == "command line: part: expected float or None, got 'x'"


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({"size": "4"}, "ckpt.pt: size: expected int, got '4'"),
        ({"sise": 4}, "ckpt.pt: unknown key 'sise', did you mean 'size'?"),
        ({"size": 0, "share": 3.0}, "size=0 must be at least 1; share=3.0 must be at least 0 and below 1"),
        ({"size": 7}, "size=7 is taken: use 8"),
    ],
)
def test_values_from_a_checkpoint_are_checked_like_the_command_line(values, sentence):
    with pytest.raises(configurator.UserError) as caught:
        build_config(Bounded, values, "ckpt.pt")
    assert str(caught.value) == sentence


def test_build_converts_whole_numbers_for_float_fields():
    assert repr(build_config(Bounded, {"share": 0, "size": 2})) == "Bounded(size=2, share=0.0, part=None)"


# ----------------------------------------------------------------------------------------------------------------------
# positional paths


def paths_of(*argv: str, usage: str = "[PATH ...]", cls=Small) -> list[str]:
    """The positional paths in argv."""
    return load_with_paths(cls, list(argv), usage)[2]


def refused_paths(*argv: str, usage: str = "[PATH ...]", cls=Small) -> str:
    with pytest.raises(configurator.UserError) as caught:
        paths_of(*argv, usage=usage, cls=cls)
    return str(caught.value)


def test_words_without_dashes_are_paths_in_order_and_settings_stay_settings(tmp_path):
    path = config_file(tmp_path, "rate = 0.25\n")
    cfg, given, paths = load_with_paths(Small, ["out-a", path, "--count=3", "gpt2"], "[PATH ...]")
    assert paths == ["out-a", "gpt2"] and given == {"rate": 0.25, "count": 3} and cfg.count == 3


@pytest.mark.parametrize("name", ["quickstart", "bigram", "a b", "block_size=64/ckpt.pt", "logs/*.txt", "ñandú", "."])
def test_every_other_word_is_a_path_even_one_named_like_a_config(name):
    assert paths_of(name) == [name]


def test_run_directory_named_like_a_config_is_a_path(tmp_path, monkeypatch):
    (tmp_path / "quickstart").mkdir()
    monkeypatch.chdir(tmp_path)
    assert paths_of("quickstart") == ["quickstart"]
    assert load(TrainConfig, ["quickstart"])[0].out_dir == "out-quickstart"  # which takes no paths


def test_directory_whose_name_ends_in_py_is_a_path(tmp_path):
    (tmp_path / "run.py").mkdir()
    assert paths_of(str(tmp_path / "run.py")) == [str(tmp_path / "run.py")]


def test_py_file_stays_a_config_file_in_a_program_that_takes_paths(tmp_path):
    assert paths_of(config_file(tmp_path, "count = 2\n")) == []
    assert "did you mean config/quickstart.py?" in refused_paths("config/quickstat.py", cls=TrainConfig)


@pytest.mark.parametrize(
    "usage, argv, part",
    [
        ("OLD NEW", [], "expected 2 paths, got 0: "),
        ("OLD NEW", ["a"], "expected 2 paths, got 1: "),
        ("OLD NEW", ["a", "b", "c"], "too many paths (a, b, c)"),
        ("[PATH]", ["a", "b"], "too many paths (a, b)"),
        ("FILE [MODEL ...]", [], "expected 1 path, got 0: "),
    ],
)
def test_too_few_and_too_many_paths_are_refused_with_the_usage(monkeypatch, usage, argv, part):
    monkeypatch.setattr(sys, "argv", ["/somewhere/program.py"])
    message = refused_paths(*argv, usage=usage)
    assert message.startswith(part) and f"python program.py {usage}" in message
    assert ("quotes" in message) == ("too many" in message)  # as in chat.py out --prompt=The house


@pytest.mark.parametrize(
    "usage, argv", [("OLD NEW", ["a", "b"]), ("[PATH]", []), ("[PATH]", ["a"]), ("FILE [MODEL ...]", ["a", "b", "c"])]
)
def test_numbers_of_paths_that_the_usage_allows(usage, argv):
    assert paths_of(*argv, usage=usage) == argv


def test_setting_without_dashes_is_no_path_unless_it_exists(tmp_path, monkeypatch):
    assert "--count=3" in refused_paths("count=3") and "--count=3" in refused_paths("-count=3")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "count=3").mkdir()
    assert paths_of("count=3") == ["count=3"]


def test_path_that_starts_with_a_dash_is_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-run").mkdir()
    assert "./-run" in refused_paths("-run") and paths_of("./-run") == ["./-run"]


def test_empty_argument_is_no_path():
    assert refused_paths("").startswith("''")


# ----------------------------------------------------------------------------------------------------------------------
# order


def test_arguments_apply_from_left_to_right(tmp_path):
    path = config_file(tmp_path, "count = 2\nrate = 0.2\n")
    assert load(Small, ["--count=3", path])[0].count == 2
    assert load(Small, [path, "--count=3"])[0].count == 3
    assert load(Small, ["--count=3", path, "--count=4", "--count=5"])[1] == {"count": 5, "rate": 0.2}


def test_second_file_wins_over_the_first(tmp_path):
    first = config_file(tmp_path, "count = 2\nrate = 0.2\n", "first.py")
    second = config_file(tmp_path, "count = 3\n", "second.py")
    assert load(Small, [first, second])[1] == {"count": 3, "rate": 0.2}
    assert load(Small, [second, first])[1] == {"count": 2, "rate": 0.2}


def test_file_that_replaces_earlier_values_says_which(tmp_path, capsys):
    first = config_file(tmp_path, "count = 2\nrate = 0.2\nlimit = 1\n", "first.py")
    second = config_file(tmp_path, "count = 3\nrate = 0.2\nname = 'y'\n", "second.py")
    load(Small, [first, second, "--name=z"])
    assert capsys.readouterr() == ("", f"{second} replaces earlier values: count=3\n")
    load(Small, ["--count=5", "--rate=1", first])
    assert capsys.readouterr().err == f"{first} replaces earlier values: count=2, rate=0.2\n"
    load(Small, [first, "--count=5"])  # what one expects is not worth a line
    assert capsys.readouterr().err == ""


def test_given_holds_what_the_user_set_even_if_it_is_the_default():
    assert load(Small, ["--count=1"])[1] == {"count": 1}


# ----------------------------------------------------------------------------------------------------------------------
# config files


def test_file_of_nanogpts_training_shape_loads(tmp_path):
    path = config_file(
        tmp_path,
        """# config for training a small model on one node of 8 GPUs
# launch as the following (e.g. in a screen session):
# $ torchrun --standalone --nproc_per_node=8 train.py config/example.py

wandb_log = True
wandb_project = 'owt'
wandb_run_name='gpt2-124M'

# 12 batch size * 1024 block size * 5 gradaccum * 8 GPUs = 491,520
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

max_iters = 600000
lr_decay_iters = 600000
eval_interval = 1000
eval_iters = 200
log_interval = 10
weight_decay = 1e-1
""",
    )
    cfg, given = load(TrainConfig, [path, "--device=cpu"])
    assert cfg.gradient_accumulation_steps == 40 and cfg.weight_decay == 0.1 and cfg.wandb_log is True
    assert len(given) == 13


def test_file_of_nanogpts_finetuning_shape_loads(tmp_path):
    path = config_file(
        tmp_path,
        """import time

out_dir = 'out-finetuned'
eval_interval = 5
eval_iters = 40
wandb_log = False # feel free to turn on
wandb_project = 'finetuned'
wandb_run_name = 'ft-' + str(time.time())

dataset = 'example'
init_from = 'gpt2-xl' # the largest GPT-2

# only save checkpoints if the validation loss improves
always_save_checkpoint = False

batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

# finetune at constant LR
learning_rate = 3e-5
decay_lr = False
# device = 'cpu'
# compile = False
""",
    )
    cfg, given = load(TrainConfig, [path])
    assert cfg.wandb_run_name.startswith("ft-1") and cfg.decay_lr is False and cfg.init_from == "gpt2-xl"
    assert "time" not in given and "device" not in given


def test_file_of_nanogpts_evaluation_shape_loads(tmp_path):
    path = config_file(
        tmp_path,
        "batch_size = 8\neval_iters = 500 # use more iterations to get good estimate\n"
        "eval_only = True\nwandb_log = False\ninit_from = 'gpt2-medium'\n",
    )
    assert load(TrainConfig, [path])[0].eval_only is True


def test_every_key_of_nanogpts_train_program_is_known(tmp_path):
    path = config_file(
        tmp_path,
        """
out_dir = 'out'; eval_interval = 2000; log_interval = 1; eval_iters = 200; eval_only = False
always_save_checkpoint = True; init_from = 'scratch'; wandb_log = False; wandb_project = 'owt'
wandb_run_name = 'gpt2'; dataset = 'openwebtext'; gradient_accumulation_steps = 5 * 8; batch_size = 12
block_size = 1024; n_layer = 12; n_head = 12; n_embd = 768; dropout = 0.0; bias = False; learning_rate = 6e-4
max_iters = 600000; weight_decay = 1e-1; beta1 = 0.9; beta2 = 0.95; grad_clip = 1.0; decay_lr = True
warmup_iters = 2000; lr_decay_iters = 600000; min_lr = 6e-5; backend = 'nccl'; device = 'cuda'
dtype = 'bfloat16'; compile = True
""",
    )
    assert len(load(TrainConfig, [path])[1]) == 33


def test_scratch_names_functions_classes_and_imports_of_a_file_are_its_own(tmp_path):
    path = config_file(
        tmp_path,
        '''"""A docstring."""
import math, os.path as _p, time
from dataclasses import dataclass, fields
from functools import partial

class Plan:
    layers = 3

def halve(n: int) -> int:
    return n // 2

twice = lambda n: 2 * n
plus_one = partial(int.__add__, 1)
_scale = math.sqrt(16)
for _i in range(3):
    pass
count = halve(int(_scale)) + twice(Plan.layers) + plus_one(0)
name = f"run-{count:03d}-{_scale:.1f}"
rate = 1 / 8 if count else 0
limit = None
''',
    )
    assert load(Small, [path])[1] == {"count": 9, "name": "run-009-4.0", "rate": 0.125, "limit": None}


def test_a_future_import_in_a_file_is_not_taken_for_a_key(tmp_path):
    path = config_file(tmp_path, "from __future__ import annotations\ncount: int = 4\n")
    assert load(Small, [path])[1] == {"count": 4}


def test_function_in_place_of_a_value_is_not_dropped_silently(tmp_path):
    path = config_file(tmp_path, "def rate_for_today():\n    return 0.1\nrate = rate_for_today\n")  # () forgotten
    message = refused(path, cls=Small)
    assert path in message and "rate: expected float" in message


def test_an_int_for_a_float_is_converted_in_a_file_too(tmp_path):
    given = load(Small, [config_file(tmp_path, "rate = 1\n")])[1]
    assert given == {"rate": 1.0} and type(given["rate"]) is float


@pytest.mark.parametrize(
    "line",
    ["count = 2.0", "count = True", "on = 1", "rate = '0.1'", "name = 5", "limit = 'a'", "mode = 1", "name = None"],
)
def test_value_of_another_type_in_a_file_is_refused_with_its_name(tmp_path, line):
    path = config_file(tmp_path, line + "\n")
    message = refused(path, cls=Small)
    assert message.startswith(f"{path}: {line.split()[0]}: expected")


def test_file_with_non_ascii_text_and_a_byte_order_mark_loads(tmp_path):
    path = tmp_path / "bom.py"
    path.write_bytes("\ufeffname = 'señor'\r\ncount = 2\r\n".encode("utf-8"))
    assert load(Small, [str(path)])[1] == {"name": "señor", "count": 2}


def test_empty_file_sets_nothing(tmp_path):
    assert load(Small, [config_file(tmp_path, "")])[1] == {}


def test_file_runs_in_a_namespace_of_its_own(tmp_path):
    path = config_file(tmp_path, "count = 7\nload = 3\nsys = 4\n")
    assert "unknown key 'load'" in refused(path, cls=Small)
    assert callable(configurator.load) and configurator.sys is sys
    assert "is not defined" in refused(config_file(tmp_path, "count = argv\n"), cls=Small)


@pytest.mark.parametrize(
    "text, line, what",
    [
        ("count = 1\nrate = (\n", 2, "SyntaxError"),
        ("count = 1\n\n  rate = 2\n", 3, "IndentationError"),
        ("count = 1\n\nrate = undefined_name\n", 3, "undefined_name"),
        ("count = 1\nrate = 1 / 0\n", 2, "ZeroDivisionError"),
        ("import a_module_that_is_not_there\n", 1, "a_module_that_is_not_there"),
        ("def f():\n    return {}['key']\n\nrate = f()\n", 2, "KeyError"),
        ("import json\n\nrate = json.loads('{')\n", 3, "JSONDecodeError"),
        ("assert 1 == 2, 'not today'\n", 1, "not today"),
    ],
)
def test_error_inside_a_file_names_file_and_line(tmp_path, text, line, what):
    path = config_file(tmp_path, text)
    message = refused(path, cls=Small)
    assert message.startswith(path) and re.search(rf"\bline {line}\b", message) and what in message


def test_syntax_error_in_an_imported_module_names_the_line_of_the_import(tmp_path, monkeypatch):
    config_file(tmp_path, "\n\n\n\nx = (\n", "a_broken_module.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    message = refused(config_file(tmp_path, "count = 1\nimport a_broken_module\n"), cls=Small)
    assert re.search(r"settings\.py, line 2\b", message) and "SyntaxError" in message


def test_file_that_is_not_text_is_refused_in_a_sentence(tmp_path):
    path = tmp_path / "settings.py"
    for content in (b"count = 1\nname = '\xff'\n", b"count = 1\nname = '\x00'\n"):
        path.write_bytes(content)
        message = refused(str(path), cls=Small)
        assert message.startswith(str(path)) and "None" not in message


def test_file_that_calls_exit_does_not_end_the_program_silently(tmp_path):
    path = config_file(tmp_path, "import sys\ncount = 1\nsys.exit(0)\n")
    message = refused(path, cls=Small)
    assert path in message and "line 3" in message


# ----------------------------------------------------------------------------------------------------------------------
# which file is run


def test_short_name_means_the_file_in_config():
    short, full = load(TrainConfig, ["quickstart"]), load(TrainConfig, [os.path.join(ROOT, "config", "quickstart.py")])
    assert short == full and short[1]


def test_config_path_works_from_any_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load(TrainConfig, ["config/quickstart.py"]) == load(TrainConfig, ["quickstart"])


def test_file_in_the_working_directory_wins_over_ours(tmp_path, monkeypatch):
    (tmp_path / "config").mkdir()
    config_file(tmp_path / "config", "batch_size = 77\n", "quickstart.py")
    monkeypatch.chdir(tmp_path)
    assert load(TrainConfig, ["config/quickstart.py"])[1] == {"batch_size": 77}


def test_missing_file_is_named_with_the_nearest_one():
    for name in ("config/quickstat.py", "quickstat"):
        message = refused(name)
        assert repr(name) in message and "config/quickstart.py" in message


def test_config_of_training_is_not_suggested_to_a_program_that_cannot_use_it():
    from sample import SampleConfig

    message = refused("quickstat", cls=SampleConfig)
    assert "config/" not in message and "--help" in message


def test_missing_file_that_resembles_nothing_lists_config():
    message = refused("zzzz.py")
    assert "'zzzz.py'" in message and "quickstart" in message and "train_don_char" in message


def marked(folder) -> tuple[str, object]:
    """(code that leaves a file behind when it is run, the path of that file)."""
    mark = folder / "it_ran"
    return f"open({str(mark)!r}, 'w').close()\nbatch_size = 3\n", mark


@pytest.mark.parametrize("name", ["settings.txt", "settings", "settings.pyc", "settings.py.bak", "settings.PYX"])
def test_only_py_files_are_run(tmp_path, monkeypatch, name):
    code, mark = marked(tmp_path)
    path = config_file(tmp_path, code, name)
    monkeypatch.chdir(tmp_path)
    for argument in (path, name, "./" + name):
        assert "neither a config file" in refused(argument)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["bundle.zip", "bundle", "bundle.pyz", "bundle.py"])
def test_zip_with_a_main_program_is_not_run(tmp_path, name):
    code, mark = marked(tmp_path)
    with zipfile.ZipFile(tmp_path / name, "w") as bundle:
        bundle.writestr("__main__.py", code)
    assert name in refused(str(tmp_path / name))
    assert not mark.exists()


@pytest.mark.parametrize("name", ["folder", "folder.py"])
def test_folder_with_a_main_program_is_not_run(tmp_path, name):
    code, mark = marked(tmp_path)
    (tmp_path / name).mkdir()
    config_file(tmp_path / name, code, "__main__.py")
    assert "neither a config file" in refused(str(tmp_path / name), cls=Small)
    assert not mark.exists()


def test_directory_in_a_program_without_paths_is_refused_with_advice_that_works(tmp_path):
    """As in `python sample.py out-quickstart`."""
    advice = refused(str(tmp_path)).split()[-1]
    assert load(TrainConfig, [advice])[0].out_dir == str(tmp_path)


def test_path_without_py_does_not_run_the_py_file_beside_it(tmp_path, monkeypatch):
    code, mark = marked(tmp_path)  # evaluate.py takes paths of checkpoints: out/run must not mean out/run.py
    config_file(tmp_path, code, "run.py")
    monkeypatch.chdir(tmp_path)
    for argument in (str(tmp_path / "run"), "./run", os.path.relpath(tmp_path / "run", os.path.join(ROOT, "config"))):
        assert configurator.find_config_file(argument) is None
        assert "neither a config file" in refused(argument)
    assert not mark.exists()


def test_short_name_does_not_reach_outside_config():
    for argument in ("../train", "../model", os.path.join(ROOT, "train")):
        assert configurator.find_config_file(argument) is None


# ----------------------------------------------------------------------------------------------------------------------
# --help: tests/test_help.py checks what is printed


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--count=nonsense", "--help"], ["--nonsense", "-h", "x"]])
def test_help_wins_over_mistakes(argv):
    with pytest.raises(configurator.HelpRequest) as caught:
        load_with_paths(Small, argv, "[PATH]")
    assert caught.value.args == (Small, "[PATH]", {})


def test_help_knows_the_settings_of_config_files_next_to_it(tmp_path):
    path = config_file(tmp_path, "count = 2\nother = 3\n")
    for usage in ("", "[PATH]"):
        with pytest.raises(configurator.HelpRequest) as caught:
            load_with_paths(Small, ["run", path, "--help"], usage)
        assert caught.value.args == (Small, usage, {"count": 2, "other": 3})


def test_help_on_a_broken_config_file_reports_it(tmp_path):
    assert "line 1" in refused(config_file(tmp_path, "count = (\n"), "--help", cls=Small)


# ----------------------------------------------------------------------------------------------------------------------
# our own files and programs


@pytest.mark.parametrize("path", sorted(glob.glob(os.path.join(ROOT, "config", "*.py"))), ids=os.path.basename)
def test_every_config_of_ours_loads(path):
    cfg, given = load(TrainConfig, [path])
    assert given and all(getattr(cfg, key) == value for key, value in given.items())


@pytest.mark.parametrize("path", sorted(glob.glob(os.path.join(ROOT, "config", "*.py"))), ids=os.path.basename)
def test_every_config_of_ours_begins_with_its_command(path):
    with open(path, encoding="utf-8") as file:
        text = file.read()
    assert text.startswith('"""') and f"config/{os.path.basename(path)}" in text.split('"""')[1]
