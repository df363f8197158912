"""Download sample texts, and prepare a single text. Shared by the data/<name>/prepare.py scripts.

Downloads are checked before they are saved, so an incomplete file is never used later.
"""

import hashlib
import http.client
import os
import re
import urllib.parse
import urllib.request
from dataclasses import dataclass

from configurator import UserError
from dongpt.program import atomic_write, shortest_path
from dongpt.text.documents import Files, Texts
from dongpt.text.prepare import TokenizerKind, Vocabulary, prepare
from dongpt.text.report import report

TIMEOUT_SECONDS = 30  # without a response from the server


@dataclass(frozen=True)
class TextDownload:
    """A text file to download: a title that it must contain, limits on its size, and URLs to try in order."""

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
    input: str = ""  # path of the text; default: input.txt next to this script, downloaded if missing
    encoding: str = "utf-8"  # encoding of the text file


@dataclass(frozen=True)
class BookConfig(TextConfig):
    raw: bool = False  # keep the Project Gutenberg header and license


def prepare_text(cfg: TextConfig, folder: str, download: TextDownload, tokenizer: TokenizerKind, next_config: str):
    """Prepare the text selected by cfg, write train.bin, val.bin and meta.json to folder, and print a summary.

    next_config is the train.py argument string to print as the next step.
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
    """Return input_path if it is given. Otherwise, return input.txt in folder and download it if it is missing."""
    default_path = os.path.join(folder, "input.txt")
    if not input_path and not os.path.exists(default_path):
        download_text(download, default_path)
    return input_path or default_path


def download_text(download: TextDownload, path: str):
    """Save the first plausible response from the URLs in download to path. Raises UserError if there is none."""
    problems = []
    for address in download.addresses:
        host = urllib.parse.urlsplit(address).netloc
        print(f"downloading {address}", flush=True)
        try:
            with urllib.request.urlopen(address, timeout=TIMEOUT_SECONDS) as answer:
                content = answer.read(download.max_bytes + 1)
                content_length = int(answer.headers.get("Content-Length") or len(content))
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
            problems.append(f"{host}: {getattr(error, 'reason', error)}")
            continue
        problem = find_problem(content, download) or len(content) < content_length and "the download is incomplete"
        if not problem:
            return write_atomically(path, content)
        problems.append(f"{host}: {problem}")
    remedy = f"pass your own copy as --input=PATH, or save it as {shortest_path(path)}"
    raise UserError(f"{download.title} could not be downloaded ({'; '.join(problems)}): {remedy}")


def write_atomically(path: str, content: bytes):
    """Write content to path, either completely or not at all. Raises UserError if it cannot be written."""
    try:
        with atomic_write(path) as file:
            file.write(content)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): free some disk space, or change its permissions"
        ) from error


def find_problem(content: bytes, download: TextDownload) -> str:
    """Return the reason why content cannot be the requested text, or an empty string if it can."""
    if not download.min_bytes <= len(content) <= download.max_bytes:
        return f"{len(content):,} bytes is not a plausible length"
    if content[:1000].lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "the response is a web page"
    if download.title.lower().encode() not in content[:20_000].lower():
        return f"the response does not contain {download.title!r}"
    return ""


def read_text(path: str, encoding: str = "utf-8") -> tuple[str, str]:
    """Read a file and return (text, SHA-256 of its bytes).

    Line endings become \\n, and a byte-order mark is removed. Raises UserError if the file is blank or is not text.
    """
    digest = hashlib.sha256()
    text = "".join(Files([path], encoding=encoding).read_chunks(path, digest=digest))
    if not text.strip():
        raise UserError(f"{path} is empty: use a file that contains text")
    return text, digest.hexdigest()


def strip_gutenberg(text: str) -> tuple[str, bool]:
    """Return (text between Project Gutenberg's START and END markers, True), or (text, False) if it has neither."""
    marker_pattern = r"(?mi)^\*\*\* ?{} OF (?:THE|THIS) PROJECT GUTENBERG EBOOK[^*]{{0,300}}\*\*\*[^\n]*\n?"
    start = re.search(marker_pattern.format("START"), text)
    body = text[start.end() :] if start else text
    end = re.search(marker_pattern.format("END"), body)
    if not start and not end:
        return text, False
    body = body[: end.start()] if end else body
    body = re.sub(r"\n\s*End of (?:the )?Project Gutenberg[^\n]*\s*$", "\n", body, flags=re.IGNORECASE)
    return body.strip("\n") + "\n", True
