"""Tokenize the prose of Python's documentation into characters, and write the data files next to this script.

    python data/python_docs/prepare.py
    python train.py config/quickstart.py

The text comes from the Python installation, so no network is needed. It consists of the standard library's docstrings
and the pages shown by `help()` (pydoc_data.topics). Only complete English sentences are kept. Headings, code, grammars,
tables, markup, version notes and repeated paragraphs are removed. The text differs slightly between Python versions.
The data files are train.bin, val.bin and meta.json.
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

import ast
import glob
import platform
import re
import sysconfig
import textwrap
from dataclasses import dataclass
from typing import Iterable

import configurator
from configurator import UserError
from dongpt.program import run_program
from dongpt.text.documents import Texts
from dongpt.text.prepare import Vocabulary, prepare
from dongpt.text.report import report

FOLDER = os.path.dirname(os.path.abspath(__file__))
MAX_CHARS = 500_000  # characters of docstrings before filtering, about as many as on the help() pages
LINE_WIDTH = 72  # columns, as in help()

TO_ASCII = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "..."})
BLANK_LINE = re.compile(r"\n\s*\n")
# found in grammars, interactive sessions, tables, headings, references and version notes
NOT_PROSE = re.compile(
    r"::=|>>>|^\s*[|+=~^]|[-=*~+]{4}|^\s*\*\*PEP|^\s*(New|Added|Changed|Deprecated\S*|Removed) (in|since) version", re.M
)
LABELS = "Note|See also|Warning|Important|Caution|CPython implementation detail|Programmer's note"
LABEL = re.compile(rf"^([*-] |\d+\. |({LABELS}): )+")
FOOTNOTE = re.compile(r"\s*\[\d+\]")
LITERAL = re.compile(r'"([^"]*)"|`+([^`]+)`+')  # how the pages quote code
NAME = re.compile(r"[\w.]+(\(\))?")
EMPHASIS = re.compile(r"\*\*?(\w[^*]*)\*\*?")
SENTENCE_END = re.compile(r"(?<=\w[.?!]|[)'][.?!]|[.?!]\))\s+(?=\(?[A-Z])")
SENTENCE = re.compile(r"\(?[A-Z][\w ,;:()'./-]*[.?!]\)?", re.ASCII)
MIN_WORDS = 4  # per sentence
MIN_PARAGRAPH_CHARS = 80  # shorter paragraphs are captions and descriptions of single names
MIN_CHARS = 10_000  # characters of prose; less is not worth training on


@dataclass(frozen=True)
class PrepareConfig:
    """This script has no settings."""


def find_sentences(paragraph: str) -> list[str]:
    """Return a paragraph's sentences without markup. Skips sentences that contain code other than names.

    'The "len()" of *x* is  an integer. [1] Call it: "len(x)"' -> ["The len() of x is an integer."]
    """
    text = " ".join(re.sub(r"(?<=\w)-\n\s*", "-", paragraph).split())
    text = LITERAL.sub(lambda match: name if NAME.fullmatch(name := match[1] or match[2] or "") else "<code>", text)
    text = LABEL.sub("", EMPHASIS.sub(r"\1", FOOTNOTE.sub("", text)))
    return [
        sentence
        for sentence in SENTENCE_END.split(text)
        if SENTENCE.fullmatch(sentence)
        and sentence.count("(") == sentence.count(")")
        and len(sentence.split()) >= MIN_WORDS
    ]


def extract_prose(pages: Iterable[str]) -> str:
    """Return the prose of all pages, wrapped at LINE_WIDTH, without short or repeated paragraphs."""
    paragraphs = (part for page in pages for part in BLANK_LINE.split(page.translate(TO_ASCII)))
    prose = (" ".join(find_sentences(part)) for part in paragraphs if not NOT_PROSE.search(part))
    unique = dict.fromkeys(part for part in prose if len(part) >= MIN_PARAGRAPH_CHARS)
    lines = (textwrap.fill(part, LINE_WIDTH, break_long_words=False, break_on_hyphens=False) for part in unique)
    return "\n\n".join(lines) + "\n"


def language_reference() -> list[str]:
    """Return the pages of pydoc_data.topics sorted by name, or [] if this Python installation lacks them."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return [topics[name] for name in sorted(topics)]


def docstrings(folder: str) -> list[str]:
    """Return the docstrings of all modules, classes and functions in folder, sorted by file name."""
    texts, size = [], 0
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*.py"))):
        try:
            with open(path, encoding="utf-8") as file:
                tree = ast.parse(file.read())
        except (OSError, SyntaxError, ValueError):
            continue  # the other files provide enough text
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
                texts.append(text)
                size += len(text)
        if size > MAX_CHARS:
            break
    return texts


def main(argv: list[str] | None = None):
    configurator.load(PrepareConfig, argv)
    docs, topics = docstrings(sysconfig.get_paths()["stdlib"]), language_reference()
    text = extract_prose([*docs, *topics])
    if len(text) < MIN_CHARS:
        remedy = "train on your own text, e.g. python data/prepare.py --input=PATH"
        raise UserError(f"this Python installation has neither docstrings nor help() pages: {remedy}")
    missing = [name for name, found in (("docstrings", docs), ("pydoc_data.topics", topics)) if not found]
    if missing:
        print(f"this Python installation has no {missing[0]}, so the text is shorter than usual")
    source = "pydoc_data.topics" if not docs else "docstrings" if not topics else "docstrings and pydoc_data.topics"
    source = f"prose from {source} in Python {platform.python_version()}"
    report(prepare(FOLDER, Texts([text]), Vocabulary("char"), source=source))
    print("next: python train.py config/quickstart.py")


if __name__ == "__main__":
    run_program(main)
