"""Texts that data/<name>/prepare.py can download, and the function that these programs share.

A download is checked before it is saved, so an incomplete one is never mistaken for the text later.
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

TIMEOUT_SECONDS = 30  # without an answer


@dataclass(frozen=True)
class TextDownload:
    """A text to download: a phrase it must contain, plausible sizes, and addresses to try in this order."""

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
    input: str = ""  # path of the text; by default input.txt next to this script, which is downloaded if missing
    encoding: str = "utf-8"  # encoding of the text


@dataclass(frozen=True)
class BookConfig(TextConfig):
    raw: bool = False  # keep the header and licence of Project Gutenberg


def prepare_text(cfg: TextConfig, folder: str, download: TextDownload, tokenizer: TokenizerKind, next_config: str):
    """Write train.bin, val.bin and meta.json of the text that cfg names to folder, and report on them.

    next_config holds the arguments with which train.py trains on it.
    """
    path = find_text(cfg.input, folder, download)
    text, sha256 = read_text(path, cfg.encoding)
    if isinstance(cfg, BookConfig) and not cfg.raw:
        text, had_gutenberg_markers = strip_gutenberg(text)
        if not had_gutenberg_markers:
            print(f"{path} has no Project Gutenberg markers: using all of it")
    source = os.path.basename(path)
    if prepared := prepare(folder, Texts([text]), Vocabulary(tokenizer), source=source, sha256=sha256):
        report(prepared)
        print(f"next: python train.py {next_config}")


def find_text(input_path: str, folder: str, download: TextDownload) -> str:
    """The path of the text: input_path, else input.txt in folder, which is downloaded if it is missing."""
    default_path = os.path.join(folder, "input.txt")
    if not input_path and not os.path.exists(default_path):
        download_text(download, default_path)
    return input_path or default_path


def download_text(download: TextDownload, path: str):
    """Save the first plausible answer from download's addresses to path, or raise UserError."""
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
        problem = find_problem(content, download) or len(content) < content_length and "the download is incomplete"
        if not problem:
            return write_atomically(path, content)
        problems.append(f"{host}: {problem}")
    remedy = f"pass your own copy as --input=PATH, or save it as {os.path.relpath(path)}"
    raise UserError(f"{download.title} could not be downloaded ({'; '.join(problems)}): {remedy}")


def write_atomically(path: str, content: bytes):
    """Write content to path, completely or not at all. Raises UserError if it cannot be written."""
    try:
        with atomic_write(path) as file:
            file.write(content)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): free space, or change its permissions"
        ) from error


def find_problem(content: bytes, download: TextDownload) -> str:
    """The reason why content cannot be the text; '' if it can."""
    if not download.min_bytes <= len(content) <= download.max_bytes:
        return f"{len(content):,} bytes is not a plausible length"
    if content[:1000].lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "the answer is a web page"
    if download.title.lower().encode() not in content[:20_000].lower():
        return f"the answer does not contain {download.title!r}"
    return ""


def read_text(path: str, encoding: str = "utf-8") -> tuple[str, str]:
    """(text, SHA-256 of the bytes) of a file; line ends become \\n, and a byte-order mark is dropped.

    Raises UserError for an empty file, and wherever documents.Files does.
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
