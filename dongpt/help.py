"""Output of --help (a program's settings in groups) and --list (files in config/ with size, time and loss).

Neither option runs the files that it describes: comments and docstrings are read from the source.
"""

import ast
import glob
import os
import re
import shutil
import sys
import textwrap
from dataclasses import fields
from inspect import get_annotations
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from configurator import ROOT, type_name

# Settings that --help shows first, in this order, for programs that have them.
COMMON_SETTINGS = (
    *(
        "input",
        "name",
        "out_dir",
        "init_from",
        "dataset",
        "data_dir",
        "prompt",
        "start",
        "num_samples",
        "max_new_tokens",
    ),
    *("temperature", "top_k", "seed", "max_iters", "eval_interval", "batch_size", "block_size", "n_layer", "n_head"),
    *("n_embd", "dropout", "learning_rate", "split", "device", "json"),
)
CONFIG_USAGE = "[CONFIG ...]"  # for programs that run the files in config/
FACTS_LABEL = "Expect: "  # starts the line with size, time and loss in a config's docstring
MIN_GROUPED_SETTINGS = 12  # fewer settings form a single group
MIN_WIDTH, MAX_WIDTH, TWO_COLUMN_WIDTH = 20, 110, 70  # terminal widths in columns
WRAP: Any = dict(break_long_words=False, break_on_hyphens=False)  # do not split names
NAME_WIDTH = 30  # columns for names if explanations are printed next to them


def print_help(doc: str, cls: type, usage: str, overrides: dict[str, Any]):
    """Print a program's usage, its docstring (doc), and every setting of cls with its default and comment.

    The settings in overrides, which come from config files on the command line, replace the defaults.
    """
    width = terminal_width()
    program = " ".join(filter(None, [min(sys.argv[0], os.path.relpath(sys.argv[0]), key=len), usage]))
    print(textwrap.fill(f"usage: python {program} [--key=value ...]", width, **WRAP), end="\n\n")
    for paragraph in filter(None, doc.strip("\n").split("\n\n")):
        is_example = paragraph.startswith((" ", "python ", "torchrun "))
        print(paragraph.rstrip() if is_example else textwrap.fill(paragraph, width, **WRAP), end="\n\n")
    hints = get_type_hints(cls)
    comments: dict[str, str] = {}
    for parent in reversed(cls.__mro__[:-1]):  # a subclass may change a default and its comment
        comments |= field_comments(parent)
    for title, names in setting_groups(cls).items():
        print(textwrap.fill(f"{title}:", width, **WRAP))
        for name in names:
            default = overrides.get(name, next(f.default for f in fields(cls) if f.name == name))
            is_plain = isinstance(default, str) and re.fullmatch(r"[\w./+:-]+", default)
            explanation = comments.get(name, "")
            if get_origin(hints[name]) is Literal:
                explanation += f" ({' or '.join(map(str, get_args(hints[name])))})"
            elif NoneType in get_args(hints[name]):
                explanation += f" ({type_name(hints[name])})"
            print_entry(f"  --{name}={default if is_plain else repr(default)}", [explanation.strip()], width)
        print()
    forms = "Use --key=value, --key value, or key = value in a config file. If a key is repeated, its last value wins."
    configs = "CONFIG is a file in config/ (see --list) or one of your own. " if usage == CONFIG_USAGE else ""
    print(textwrap.fill(configs + forms, width, **WRAP))


def setting_groups(cls: type) -> dict[str, list[str]]:
    """Return cls's settings by group title: common settings first, then its own, then those of each base class."""
    owners: dict[str, type] = {}  # the class that first defines each setting
    for parent in reversed(cls.__mro__[:-1]):
        owners |= {name: parent for name in get_annotations(parent) if name not in owners}
    names = [field.name for field in fields(cls)]
    common = [name for name in COMMON_SETTINGS if name in names]
    if len(names) < MIN_GROUPED_SETTINGS:
        return {"Settings": names}
    groups = {"Common settings": common} if common else {}
    for parent in cls.__mro__[:-1]:
        sentence = re.split(r"[.:;](?:\s|$)", parent.__doc__ or "", maxsplit=1)[0]
        has_title = parent is not cls and not sentence.startswith(f"{parent.__name__}(")  # @dataclass's docstring
        title = " ".join(sentence.split()) if has_title else "More settings"
        if rest := [name for name in names if owners[name] is parent and name not in common]:
            groups[title] = groups.get(title, []) + rest
    return groups


def field_comments(cls: type) -> dict[str, str]:
    """Return the comment after each field in the source of cls, or {} if the source is not available.

    inspect.getsource would parse the whole file, which would take longer than everything else that --help does.
    """
    try:
        with open(getattr(sys.modules.get(cls.__module__), "__file__", None) or "", encoding="utf-8") as file:
            source = file.read()
    except OSError:
        return {}
    pattern = rf"^( *)class {cls.__name__}\b.*?(?=^\1[^\s)#]|\Z)"
    body = re.search(pattern, source, re.MULTILINE | re.DOTALL)
    field_line = r"^ +(\w+): [^#\n]*(?:\(\n[^#\n]*)?  # (.*)$"  # the formatter may put a default on its own line
    return dict(re.findall(field_line, body[0], re.MULTILINE)) if body else {}


def print_configs():
    """Print the short name, summary, size, time and loss of every file in config/, as given in its docstring."""
    width = terminal_width()
    names = sorted(os.path.basename(path)[:-3] for path in glob.glob(os.path.join(ROOT, "config", "*.py")))
    for name in sorted(names, key=lambda name: name != "quickstart"):  # stable sort: quickstart comes first
        with open(os.path.join(ROOT, "config", f"{name}.py"), encoding="utf-8") as file:
            lines = (ast.get_docstring(ast.parse(file.read())) or "").splitlines()
        facts = [line.removeprefix(FACTS_LABEL) for line in lines if line.startswith(FACTS_LABEL)]
        print_entry(name, [*lines[:1], *facts], width)
    hint = "`python train.py config/NAME.py` starts a run. Add --help to show the settings of that config instead."
    projects = "DI725, nanoGPT+, EDS and the word notebook are earlier trainers: see docs/from.md."
    for sentence in (projects, hint):
        print("\n" + textwrap.fill(sentence, width, **WRAP))


def terminal_width() -> int:
    """Return the number of columns for printed text, which is 80 without a terminal."""
    return max(MIN_WIDTH, min(MAX_WIDTH, shutil.get_terminal_size().columns))


def print_entry(head: str, explanations: list[str], width: int):
    """Print head with explanations next to it, or below it if the terminal is narrow or head is long."""
    column = NAME_WIDTH if width >= TWO_COLUMN_WIDTH else 4
    is_beside = len(head) + 2 <= column
    text = "\n".join(
        textwrap.fill(line, width, initial_indent=" " * column, subsequent_indent=" " * column, **WRAP)
        for line in filter(None, explanations)
    )
    print(head + text[len(head) :] if is_beside and text else f"{head}\n{text}" if text else head)
