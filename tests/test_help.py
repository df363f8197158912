"""dongpt/help.py: what --help and --list print, in every program, on narrow terminals and without UTF-8."""

import glob
import os
import runpy
import subprocess
import sys
from dataclasses import dataclass, fields
from typing import Literal

import fork_server
import pytest
from helpers import ROOT, expect_sentence, run

from dongpt import help
from dongpt.help import COMMON_SETTINGS, field_comments, print_configs, print_help, setting_groups
from train import TrainConfig

pytestmark = pytest.mark.smoke
PROGRAMS = ("train", "sample", "chat", "evaluate", "bench", "ckpt_update")
CONFIGS = sorted(os.path.basename(path)[:-3] for path in glob.glob(os.path.join(ROOT, "config", "*.py")))


@dataclass(frozen=True)
class Base:
    """How to count. Nothing else."""

    seed: int = 7  # replaced below
    first: int = 1  # the first
    # fmt: off
    second: int = (
        2  # the second
    )
    # fmt: on


@dataclass(frozen=True)
class Undocumented(Base):
    mode: Literal["auto", True] = "auto"  # words or a switch
    limit: int | None = None  # a number or nothing
    prompt: str = "\n"  # any text
    seed: int = 8  # of every draw
    silent: bool = False


@pytest.fixture
def columns(monkeypatch):
    """A function that sets the width of the terminal."""
    return lambda n: monkeypatch.setenv("COLUMNS", str(n))


@pytest.fixture
def help_of(monkeypatch, capsys):
    """A function that returns what a program prints for its arguments, run as a user does, but in this process."""
    monkeypatch.setattr(sys, "path", [*sys.path])

    def output(path: str, *args: str) -> str:
        monkeypatch.setattr(sys, "argv", [path, *args])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(os.path.join(ROOT, path), run_name="__main__")
        out, err = capsys.readouterr()
        assert caught.value.code == 0 and err == ""
        return out

    return output


def entries(page: str) -> dict[str, str]:
    """The setting and all that is printed for it, in the order of the page, with single spaces."""
    blocks = page.replace("\n  --", "\n\n  --").split("\n\n")
    settings = [" ".join(block.split()) for block in blocks if block.startswith("  --")]
    return {text[2:].partition("=")[0]: text for text in settings}


# ----------------------------------------------------------------------------------------------------------------------
# one config class


def test_entry_has_default_comment_and_choices(columns, capsys):
    columns(80)
    print_help("Counts.\n", Undocumented, "", {})
    assert entries(capsys.readouterr().out) == {
        "mode": "--mode=auto words or a switch (auto or True)",
        "limit": "--limit=None a number or nothing (int or None)",
        "prompt": r"--prompt='\n' any text",
        "seed": "--seed=8 of every draw",
        "silent": "--silent=False",
        "first": "--first=1 the first",
        "second": "--second=2 the second",
    }


def test_comment_of_the_class_that_sets_the_default_is_shown():
    assert field_comments(Base)["seed"] == "replaced below" and field_comments(Undocumented)["seed"] == "of every draw"


def test_class_without_its_source_has_no_comments(capsys):
    namespace = {"__name__": "nowhere", "dataclass": dataclass}
    exec("@dataclass\nclass Interactive:\n    count: int = 3  # unseen", namespace)
    assert field_comments(namespace["Interactive"]) == {}
    print_help("", namespace["Interactive"], "", {})
    assert "--count=3" in capsys.readouterr().out


def test_groups_are_common_settings_then_those_of_each_class(monkeypatch):
    monkeypatch.setattr(help, "MIN_GROUPED_SETTINGS", 1)
    assert setting_groups(Undocumented) == {
        "Common settings": ["prompt", "seed"],
        "More settings": ["mode", "limit", "silent"],
        "How to count": ["first", "second"],
    }


def test_few_settings_are_one_group():
    assert [*setting_groups(Undocumented)] == ["Settings"]


def test_usage_names_the_positional_arguments_and_the_docstring_follows(columns, capsys, monkeypatch):
    columns(40)
    monkeypatch.setattr(sys, "argv", ["data/count.py", "-h"])
    doc = "Counts everything that can be counted, and more.\n\n    python count.py IN OUT   # an example\n\nThe end.\n"
    print_help(doc, Undocumented, "IN OUT", {})
    assert capsys.readouterr().out.startswith(
        "usage: python data/count.py IN OUT\n[--key=value ...]\n\n"
        "Counts everything that can be counted,\nand more.\n\n"
        "    python count.py IN OUT   # an example\n\nThe end.\n\nSettings:\n"
    )


def test_defaults_are_those_of_the_named_config(capsys):
    print_help("", Undocumented, "", {"second": 5, "prompt": "a b", "another": 1})
    page = entries(capsys.readouterr().out)
    assert page["second"].startswith("--second=5 ") and page["prompt"].startswith("--prompt='a b'")
    assert page["first"].startswith("--first=1 ") and "another" not in page


@pytest.mark.parametrize("width", [1, 20, 40, 69, 70, 80, 110, 300])
def test_lines_fit_into_the_terminal_where_their_words_do(width, columns, capsys):
    columns(width)
    print_help("A sentence of several words that is longer than a narrow line.\n", TrainConfig, "", {})
    print_configs()
    limit = min(max(width, help.MIN_WIDTH), help.MAX_WIDTH)
    for line in capsys.readouterr().out.splitlines():
        assert len(line) <= limit or len(line.split()) == 1, line


# ----------------------------------------------------------------------------------------------------------------------
# our programs


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_explains_every_setting_of_every_program(name, help_of):
    cls = next(value for value in runpy.run_path(os.path.join(ROOT, f"{name}.py")).values() if is_config(value, name))
    page = entries(help_of(f"{name}.py", "--help"))
    assert page.keys() == {field.name for field in fields(cls)}
    for text in page.values():
        explanation = text.partition(" ")[2].partition("(")[0]
        assert len(explanation) > 4, text


def is_config(value, name: str) -> bool:
    """Whether value is the config class of the program called name."""
    special = {"ckpt_update": "UpdateConfig", "data/prepare": "PrepareConfig"}
    return getattr(value, "__name__", "") == special.get(name, f"{name.capitalize()}Config")


@pytest.mark.parametrize(
    "name, usage",
    [
        ("train", "[CONFIG ...]"),
        ("sample", ""),
        ("chat", "[CHECKPOINT]"),
        ("evaluate", "[CHECKPOINT ...]"),
        ("bench", "[CONFIG ...]"),
        ("ckpt_update", "IN OUT"),
    ],
)
def test_help_starts_with_the_programs_own_usage_and_has_an_example(name, usage, help_of):
    lines = help_of(f"{name}.py", "-h").splitlines()
    assert lines[0] == " ".join(f"usage: python {name}.py {usage} [--key=value ...]".split())
    assert any(line.strip().startswith(f"python {name}.py ") for line in lines[1:])
    assert ("--list" in "".join(lines[-3:])) == (usage == "[CONFIG ...]")


def test_help_of_train_starts_with_the_common_settings_as_the_named_config_sets_them(help_of):
    plain, page = help_of("train.py", "--help"), help_of("train.py", "config/quickstart.py", "--help")
    assert entries(plain)["max_iters"].startswith("--max_iters=600000")
    assert entries(page)["max_iters"].startswith("--max_iters=400")
    assert entries(page)["out_dir"].startswith("--out_dir=out-quickstart")
    titles = [line for line in page.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles[0] == "Common settings:" and len(titles) > 4
    assert "--max_iters" in page.split(titles[1])[0] and "--beta2" not in page.split(titles[1])[0]


def test_common_settings_are_settings_of_some_program():
    """One that is renamed would silently move to the end of the page."""
    programs = [*PROGRAMS, "data/prepare"]
    pages = [runpy.run_path(os.path.join(ROOT, f"{name}.py")) for name in programs]
    configs = [value for page, name in zip(pages, programs) for value in page.values() if is_config(value, name)]
    assert set(COMMON_SETTINGS) <= {field.name for cls in configs for field in fields(cls)}


def test_list_shows_every_config_with_purpose_size_time_and_loss(help_of, columns):
    columns(300)
    page = help_of("train.py", "--list")
    names = [line.split()[0] for line in page.splitlines() if line.split() and line.split()[0] in CONFIGS]
    assert sorted(names) == CONFIGS and names[0] == "quickstart"
    assert "Small character-level GPT" in page and "M parameters" in page and "; loss 4.81 per word" in page
    assert "train.py" in page.splitlines()[-1]


@pytest.mark.parametrize("name", CONFIGS)
def test_docstring_of_a_config_has_a_purpose_and_what_to_expect(name):
    with open(os.path.join(ROOT, "config", f"{name}.py"), encoding="utf-8") as file:
        lines = file.read().split('"""')[1].splitlines()
    assert lines[0].endswith(".") and len(lines[0]) > 20
    facts = [line for line in lines if line.startswith(help.FACTS_LABEL)]
    is_addition = name == "bigram" or name.startswith("nanogpt_plus")  # named after another config
    assert len(facts) == (0 if is_addition else 1)
    assert all("parameters" in line and "loss" in line for line in facts)


def test_list_runs_no_config_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "mine.py").write_text(
        '"""Mine.\n\nExpect: much\n"""\nraise SystemExit("run")\n', encoding="utf-8"
    )
    (tmp_path / "config" / "bare.py").write_text("batch_size = 1\n", encoding="utf-8")
    monkeypatch.setattr(help, "ROOT", str(tmp_path))
    print_configs()
    assert [line.split() for line in capsys.readouterr().out.splitlines()[:3]] == [
        ["bare"],
        ["mine", "Mine."],
        ["much"],
    ]


def test_list_is_an_unknown_key_in_programs_without_configs(tmp_path):
    expect_sentence(run("sample.py", "--list", cwd=tmp_path, check=None), "sample.py: ", "unknown key 'list'")


# One interpreter, whose start takes seconds, forks for each setting.
HELP_AND_TYPO = """
import os, runpy, sys
import torch
sys.path.insert(0, sys.argv[1])
codes = []
for setting in sys.argv[2:]:
    if os.fork():
        codes.append(os.waitstatus_to_exitcode(os.wait()[1]))
        continue
    sys.argv = [os.path.join(sys.path[0], "train.py"), setting]
    runpy.run_path(sys.argv[0], run_name="__main__")
sys.exit(codes != [0, 2])
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_locale_without_utf_8_changes_nothing():
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "", "COLUMNS": "20"}
    command = [sys.executable, "-c", HELP_AND_TYPO, ROOT, "--help", "--bäch_size=1"]
    plain = fork_server.run(command, env={**os.environ, "COLUMNS": "20"}, capture_output=True, check=True)
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, check=True)
    assert done.stdout == plain.stdout and len(done.stdout) > 1000
    assert len(done.stderr.splitlines()) == len(plain.stderr.splitlines()) and b"Traceback" not in done.stderr


@pytest.mark.slow
def test_help_that_nobody_reads_to_its_end_has_no_traceback():
    command = [sys.executable, os.path.join(ROOT, "train.py"), "--help"]
    process = fork_server.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.wait(timeout=120) == 141 and process.stderr.read() == b""


# ----------------------------------------------------------------------------------------------------------------------
# what is imported before a mistake is answered

# One interpreter, whose start takes seconds, forks for each program.
COUNT_IMPORTS = """
import os, runpy, sys
import torch
root = sys.argv[1]
sys.path.insert(0, root)
before = set(sys.modules)
for name in sys.argv[2:]:
    for arg in ("--help", "--bach_size=1"):
        if os.fork():
            os.wait()
            continue
        sys.argv, sys.stdout, sys.stderr = [name, arg], open(os.devnull, "w"), open(os.devnull, "w")
        try:
            runpy.run_path(os.path.join(root, name + ".py"), run_name="__main__")
        except SystemExit as end:
            print(name, arg, end.code, *sorted(set(sys.modules) - before), file=sys.__stdout__, flush=True)
        os._exit(0)
"""
OURS = ("configurator", "model", "dongpt")
# What a program may import of others after torch. Sampling needs numpy.random, and chat.py has it ready.
SMALL_MODULES = {"shlex", "statistics", "_statistics", "decimal", "_decimal", "fractions", "_cython", "cython_runtime"}
SMALL_MODULES |= {"numpy.random", "secrets", "hmac"}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_before_help_and_the_message_for_a_typo_only_our_modules_are_imported_after_torch():
    """Importing is what takes the time; a clock would measure whatever else the machine does."""
    env = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COUNT_IMPORTS, ROOT, *PROGRAMS]
    done = subprocess.run(command, env=env, capture_output=True, encoding="utf-8", timeout=120, check=True)
    answers = [line.split() for line in done.stdout.splitlines()]
    assert [words[:3] for words in answers] == [
        [name, *answer] for name in PROGRAMS for answer in (["--help", "0"], ["--bach_size=1", "2"])
    ]
    for name, arg, _, *modules in answers:
        others = {module for module in modules if module.split(".")[0] not in OURS}
        others = {module for module in others if not module.startswith(tuple(SMALL_MODULES))}
        assert not others, (name, arg, others)
        assert "dongpt.help" in modules and len(modules) <= 60, (name, arg, modules)
