"""The prose of Python's documentation as characters: writes train.bin, val.bin and meta.json next to this script.

    python data/python_docs/prepare.py
    python train.py config/quickstart.py

The text comes from this Python's own files, so no network is needed: the docstrings of the standard library and the
pages that `help()` shows (pydoc_data.topics). Only whole English sentences are kept. Headings, code, grammars, tables,
markup and version notes are dropped, and a paragraph that occurs several times is kept once. The text differs slightly
between versions of Python.
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
MAX_CHARS = 500_000  # characters of docstrings, about as many as the pages of help() have, before anything is dropped
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
MIN_WORDS = 4  # in a sentence
MIN_PARAGRAPH_CHARS = 80  # shorter paragraphs are captions and descriptions of single names
MIN_CHARS = 10_000  # characters of prose that make training worthwhile


@dataclass(frozen=True)
class PrepareConfig:
    """There is nothing to set."""


def find_sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph without markup; none that contain more code than names.

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
    """The sentences of all pages in paragraphs, without repeated or short ones, wrapped at LINE_WIDTH."""
    paragraphs = (part for page in pages for part in BLANK_LINE.split(page.translate(TO_ASCII)))
    prose = (" ".join(find_sentences(part)) for part in paragraphs if not NOT_PROSE.search(part))
    unique = dict.fromkeys(part for part in prose if len(part) >= MIN_PARAGRAPH_CHARS)
    lines = (textwrap.fill(part, LINE_WIDTH, break_long_words=False, break_on_hyphens=False) for part in unique)
    return "\n\n".join(lines) + "\n"


def language_reference() -> list[str]:
    """The pages of pydoc_data.topics, sorted by name; [] if this Python lacks them."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return [topics[name] for name in sorted(topics)]


def docstrings(folder: str) -> list[str]:
    """The docstrings of the modules in folder, their classes and functions, sorted by file name."""
    texts, size = [], 0
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*.py"))):
        try:
            with open(path, encoding="utf-8") as file:
                tree = ast.parse(file.read())
        except (OSError, SyntaxError, ValueError):
            continue  # the other files have enough text
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
        remedy = "train on a text of your own, e.g. python data/prepare.py --input=PATH"
        raise UserError(f"this Python has neither docstrings nor the pages of help(): {remedy}")
    missing = [name for name, found in (("docstrings", docs), ("pydoc_data.topics", topics)) if not found]
    if missing:
        print(f"this Python has no {missing[0]}: the text is shorter than usual")
    source = "pydoc_data.topics" if not docs else "docstrings" if not topics else "docstrings and pydoc_data.topics"
    source = f"prose of {source} of Python {platform.python_version()}"
    report(prepare(FOLDER, Texts([text]), Vocabulary("char"), source=source))
    print("next: python train.py config/quickstart.py")


if __name__ == "__main__":
    run_program(main)
