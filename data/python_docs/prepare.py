"""English prose of every CPython, by characters: writes train.bin, val.bin and meta.json next to this script.

    python data/python_docs/prepare.py

The text is the language reference in pydoc_data.topics, which `help()` shows; if a stripped Python lacks it, the
docstrings of the standard library. It needs no network. Its size differs between versions of Python.
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

import ast
import glob
import platform
import sysconfig
from dataclasses import dataclass

import configurator
from configurator import UserError
from dongpt.program import run_program
from dongpt.text.documents import Texts
from dongpt.text.prepare import Vocabulary, prepare
from dongpt.text.report import report

FOLDER = os.path.dirname(os.path.abspath(__file__))
MAX_CHARS = 500_000  # of docstrings, about what the language reference has


@dataclass(frozen=True)
class PrepareConfig:
    """There is nothing to set."""


def language_reference() -> str:
    """The topics of pydoc, sorted by name; '' if this Python lacks them."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return ""
    return "\n\n".join(topics[name].strip() for name in sorted(topics)) + "\n" if topics else ""


def docstrings(folder: str) -> str:
    """Docstrings of the modules in folder, their classes and functions, in the order of the files' names."""
    texts, size = [], 0
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*.py"))):
        try:
            with open(path, encoding="utf-8") as file:
                tree = ast.parse(file.read())
        except (OSError, SyntaxError, ValueError):
            continue  # there are enough others
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
                texts.append(text)
                size += len(text)
        if size > MAX_CHARS:
            break
    return "\n\n".join(texts) + "\n"


def main(argv: list[str] | None = None):
    configurator.load(PrepareConfig, argv)
    text, source = language_reference(), "pydoc_data.topics"
    if not text:
        text, source = docstrings(sysconfig.get_paths()["stdlib"]), "docstrings of the standard library"
        print("this Python has no pydoc_data.topics: taking the docstrings of the standard library")
    if len(text) < 10_000:
        remedy = "train on a text of yours, e.g. python data/don_char/prepare.py --input=PATH"
        raise UserError(f"this Python has neither its language reference nor docstrings: {remedy}")
    source = f"{source} of Python {platform.python_version()}"
    report(prepare(FOLDER, Texts([text]), Vocabulary("char"), source=source))


if __name__ == "__main__":
    run_program(main)
