"""Recognize files that are not plain text by their first bytes."""

import re

from configurator import UserError

HTML_SUFFIXES = (".html", ".htm", ".xhtml")
SAVE_AS_TEXT = "save it as plain text in the program that opens it"
# (first bytes, name, how to get its text)
KINDS: tuple[tuple[bytes, str, str], ...] = (
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document", SAVE_AS_TEXT),
    (b"PAR1", "a Parquet file", "rename it so that it ends in .parquet"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it, and pass the folder"),
    (b"Rar!\x1a\x07", "a rar archive", "unpack it, and pass the folder"),
    (b"\x04\x22\x4d\x18", "compressed with lz4", "decompress it with lz4 -d"),
    (b"\x1f\x9d", "compressed with compress", "decompress it with uncompress"),
    *((start, "an image", "pass a text file") for start in (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a")),
    *((start, "a program", "pass a text file") for start in (b"\x7fELF", b"\xcf\xfa\xed\xfe", b"MZ\x90\0")),
    *((start, "an audio file", "pass a text file") for start in (b"OggS\0", b"ID3\3", b"ID3\4", b"fLaC\0")),
    (b"SQLite format 3\0", "an SQLite database", "export its text as CSV"),
    (b"\x93NUMPY", "a NumPy array", "pass a text file"),
)
# markup, in any encoding and after a byte-order mark or whitespace
MARKUP_KINDS = (
    (b"%PDF-", "a PDF", "convert it with pdftotext FILE.pdf FILE.txt"),
    (b"{\\rtf", "an RTF document", SAVE_AS_TEXT),
)
BLANKS = b"\xef\xbb\xbf\xff\xfe \t\r\n\f"  # whitespace, and the bytes of byte-order marks
is_html = re.compile(
    rb"(<\?xml[^>]*>\s*|<!--(?:(?!-->).)*-->\s*)*<(!doctype\s+html|html|head|body|meta)[\s/>]",
    re.IGNORECASE | re.DOTALL,
).match
is_json = re.compile(rb'(\[\s*)?\{\s*"(?:[^"\\]|\\.)*"\s*:').match


def reject_other_kinds(location: str, head: bytes, suffix: str = ""):
    """Raise UserError if a file that starts with head is known not to be plain text."""
    markup = _without_blanks(head)
    kinds = [kind for kind in KINDS if head.startswith(kind[0])]
    kinds += [kind for kind in MARKUP_KINDS if markup.startswith(kind[0])]
    if head[:4] == b"RIFF" and head[8:12] in (b"WEBP", b"WAVE", b"AVI "):
        kinds.append((b"", "an image or a recording", "pass a text file"))
    for _, kind, remedy in kinds:
        raise UserError(f"{location} is {kind}, not text: {remedy}")
    if is_html(markup) or suffix in HTML_SUFFIXES:
        remedy = "save it as text in a browser, or convert it, for example with pandoc --to=plain"
        raise UserError(f"{location} is HTML: {remedy}")


def looks_like_json(head: bytes) -> bool:
    """Return True if a file that starts with head seems to contain JSON objects."""
    return bool(is_json(_without_blanks(head)))


def _without_blanks(head: bytes) -> bytes:
    """Return head without leading whitespace and byte-order mark. If it is ASCII in UTF-16 or UTF-32, return ASCII."""
    return head.replace(b"\0", b"").lstrip(BLANKS)
