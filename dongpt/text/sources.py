"""Texts that data/<name>/prepare.py can download, and the one function behind these programs.

A download is checked before it is kept, so that a failed one leaves nothing that a second run could take for the text.
"""

import hashlib
import http.client
import os
import re
import urllib.parse
import urllib.request
from dataclasses import dataclass

from configurator import UserError
from dongpt.program import atomic_write
from dongpt.text.documents import Files, Texts
from dongpt.text.prepare import TokenizerKind, Vocabulary, prepare
from dongpt.text.report import report

TIMEOUT_SECONDS = 30  # seconds without an answer


@dataclass(frozen=True)
class TextDownload:
    """A text on the network: a phrase it must contain, plausible sizes, and addresses that are tried in order."""

    title: str
    min_bytes: int
    max_bytes: int
    addresses: tuple[str, ...]


GUTENBERG, GITHUB = "https://www.gutenberg.org", "https://raw.githubusercontent.com"
DON_QUIXOTE = TextDownload(
    "Don Quixote",
    1_500_000,
    4_000_000,
    (
        f"{GUTENBERG}/cache/epub/996/pg996.txt",
        f"{GUTENBERG}/files/996/996-0.txt",
        f"{GITHUB}/GITenberg/Don-Quixote_996/master/996.txt",
    ),
)
TINY_SHAKESPEARE = TextDownload(
    "First Citizen", 1_000_000, 1_300_000, (f"{GITHUB}/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",)
)


@dataclass(frozen=True)
class TextConfig:
    input: str = ""  # path of the text; without it input.txt next to this script, else a download
    encoding: str = "utf-8"  # of the text


@dataclass(frozen=True)
class BookConfig(TextConfig):
    raw: bool = False  # keep Project Gutenberg's header and licence


def prepare_text(cfg: TextConfig, folder: str, download: TextDownload, tokenizer: TokenizerKind):
    """Write train.bin, val.bin and meta.json of the text that cfg asks for to folder, and report on them."""
    path = find_text(cfg.input, folder, download)
    text, sha256 = read_text(path, cfg.encoding)
    if isinstance(cfg, BookConfig) and not cfg.raw:
        text, had_gutenberg_markers = strip_gutenberg(text)
        if not had_gutenberg_markers:
            print(f"{path} has no Project Gutenberg markers: kept whole")
    source = os.path.basename(path)
    if prepared := prepare(folder, Texts([text]), Vocabulary(tokenizer), source=source, sha256=sha256):
        report(prepared)


def find_text(input_path: str, folder: str, download: TextDownload) -> str:
    """Path of the text to prepare: the one given, else input.txt in folder, which is downloaded if it is not there."""
    default_path = os.path.join(folder, "input.txt")
    if not input_path and not os.path.exists(default_path):
        download_text(download, default_path)
    return input_path or default_path


def download_text(download: TextDownload, path: str):
    """Write the first plausible answer of download's addresses to path, or raise UserError."""
    problems = []
    for address in download.addresses:
        host = urllib.parse.urlsplit(address).netloc
        print(f"downloading {address}", flush=True)
        try:
            with urllib.request.urlopen(address, timeout=TIMEOUT_SECONDS) as answer:
                content = answer.read(download.max_bytes + 1)
                content_length = int(answer.headers.get("Content-Length") or len(content))
        except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
            problems.append(f"{host}: {getattr(error, 'reason', error)}")
            continue
        problem = find_problem(content, download) or len(content) < content_length and "the download broke off"
        if not problem:
            return write_atomically(path, content)
        problems.append(f"{host}: {problem}")
    remedy = f"pass your copy with --input=PATH, or put it at {os.path.relpath(path)}"
    raise UserError(f"{download.title} could not be downloaded ({'; '.join(problems)}): {remedy}")


def write_atomically(path: str, content: bytes):
    """Write content to path, completely or not at all. Raises UserError if it cannot be written."""
    try:
        with atomic_write(path) as file:
            file.write(content)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): free space or change its rights") from error


def find_problem(content: bytes, download: TextDownload) -> str:
    """Why content cannot be the text, '' if it can."""
    if not download.min_bytes <= len(content) <= download.max_bytes:
        return f"{len(content):,} bytes is not a plausible length"
    if content[:1000].lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "the answer is a web page"
    if download.title.lower().encode() not in content[:20_000].lower():
        return f"the answer does not contain {download.title!r}"
    return ""


def read_text(path: str, encoding: str = "utf-8") -> tuple[str, str]:
    """(text, SHA-256 of the bytes) of a file; line ends become \\n, and a byte-order mark is dropped.

    Raises UserError as documents.Files does, and for a file that is empty.
    """
    digest = hashlib.sha256()
    text = "".join(Files([path], encoding=encoding).read_chunks(path, digest=digest))
    if not text.strip():
        raise UserError(f"{path} is empty: give a file with text in it")
    return text, digest.hexdigest()


def strip_gutenberg(text: str) -> tuple[str, bool]:
    """(text between Project Gutenberg's START and END markers, True), or (text, False) if it has neither."""
    marker_pattern = r"(?mi)^\*\*\* ?{} OF (?:THE|THIS) PROJECT GUTENBERG EBOOK[^*]{{0,300}}\*\*\*[^\n]*\n?"
    start = re.search(marker_pattern.format("START"), text)
    body = text[start.end() :] if start else text
    end = re.search(marker_pattern.format("END"), body)
    if not start and not end:
        return text, False
    body = body[: end.start()] if end else body
    body = re.sub(r"\n\s*End of (?:the )?Project Gutenberg[^\n]*\s*$", "\n", body, flags=re.IGNORECASE)
    return body.strip("\n") + "\n", True
