"""Where the text of a data set comes from: a file of yours, input.txt beside the script, or a download.

Downloads go to a temporary file, are checked, and only then get their name: a failed one leaves nothing behind that a
second run could take for a corpus.
"""

import hashlib
import http.client
import os
import re
import urllib.parse
import urllib.request
from dataclasses import dataclass

from configurator import UserError

TIMEOUT = 30  # seconds without an answer


@dataclass(frozen=True)
class Download:
    """A text on the network: what it must contain, how many bytes are plausible, where it lies (first one wins)."""

    title: str
    least_bytes: int
    most_bytes: int
    addresses: tuple[str, ...]


DON_QUIXOTE = Download(
    title="Don Quixote",
    least_bytes=1_500_000,
    most_bytes=4_000_000,
    addresses=(
        "https://www.gutenberg.org/cache/epub/996/pg996.txt",
        "https://www.gutenberg.org/files/996/996-0.txt",
        "https://raw.githubusercontent.com/GITenberg/Don-Quixote_996/master/996.txt",
    ),
)


TINY_SHAKESPEARE = Download(
    title="First Citizen",
    least_bytes=1_000_000,
    most_bytes=1_300_000,
    addresses=("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",),
)


def find_text(given: str, folder: str, download: Download) -> str:
    """Path of the text to prepare: the one given, else input.txt in folder, else the download, kept there as input.txt.

    Raises UserError when none can be had; nothing is written then.
    """
    if given:
        return given
    local = os.path.join(folder, "input.txt")
    if not os.path.exists(local):
        fetch(download, local)
    return local


def fetch(download: Download, path: str):
    """Write the first address of download that answers with a plausible text to path, or raise ValueError."""
    problems = []
    for address in download.addresses:
        host = urllib.parse.urlsplit(address).netloc
        print(f"downloading {address}", flush=True)
        try:
            with urllib.request.urlopen(address, timeout=TIMEOUT) as answer:
                content = answer.read(download.most_bytes + 1)
                promised = int(answer.headers.get("Content-Length") or len(content))
        except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
            problems.append(f"{host}: {getattr(error, 'reason', error)}")
            continue
        problem = implausible(content, download) or len(content) < promised and "the download broke off"
        if problem:
            problems.append(f"{host}: {problem}")
            continue
        store(path, content)
        return
    folder = os.path.relpath(os.path.dirname(path))
    raise UserError(
        f"{download.title} could not be downloaded ({'; '.join(problems)}): "
        f"pass your copy with --input=PATH, or put it at {os.path.join(folder, 'input.txt')}"
    )


def store(path: str, content: bytes):
    """Write content to path, whole or not at all. Raises UserError when it cannot be written."""
    temporary = path + ".part"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise UserError(
            f"{path} cannot be written ({error.strerror}): free space there or change its rights"
        ) from error


def implausible(content: bytes, download: Download) -> str:
    """What speaks against content being the text meant, '' if nothing does."""
    if not download.least_bytes <= len(content) <= download.most_bytes:
        return f"{len(content):,} bytes is not a plausible length"
    if content[:1000].lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "the answer is a web page"
    if download.title.lower().encode() not in content[:20_000].lower():
        return f"the answer does not contain {download.title!r}"
    return ""


def read_text(path: str) -> tuple[str, str]:
    """(text, SHA-256 of the file) of a UTF-8 file; line ends become \\n, and a byte-order mark goes.

    Raises UserError for a file that is missing, empty or not UTF-8.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give the path of a text file") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = error.start + (3 if content.startswith(b"\xef\xbb\xbf") else 0)
        raise UserError(f"{path} is not UTF-8 at byte {at}: convert it to UTF-8 first") from error
    if not text.strip():
        raise UserError(f"{path} is empty: give a file with text in it")
    return text.replace("\r\n", "\n").replace("\r", "\n"), hashlib.sha256(content).hexdigest()


def strip_gutenberg(text: str) -> tuple[str, bool]:
    """(text between Project Gutenberg's START and END markers, True), or (text, False) where it has neither."""
    marker = r"^\*\*\* ?{} OF (?:THE|THIS) PROJECT GUTENBERG EBOOK[^*]{{0,300}}\*\*\*[^\n]*\n?"
    start = re.search(marker.format("START"), text, re.MULTILINE | re.IGNORECASE)
    body = text[start.end() :] if start else text
    end = re.search(marker.format("END"), body, re.MULTILINE | re.IGNORECASE)
    if not start and not end:
        return text, False
    body = body[: end.start()] if end else body
    body = re.sub(r"\n\s*End of (?:the )?Project Gutenberg[^\n]*\s*$", "\n", body, flags=re.IGNORECASE)
    return body.strip("\n") + "\n", True


def read_book(path: str, raw: bool) -> tuple[str, str]:
    """read_text, without Project Gutenberg's header and licence unless raw."""
    text, sha256 = read_text(path)
    if raw:
        return text, sha256
    text, had_markers = strip_gutenberg(text)
    if not had_markers:
        print(f"{path} has no Project Gutenberg markers: kept whole")
    return text, sha256
