"""Recognize files that are not plain text by their first bytes."""

import codecs
import contextlib
import re

from configurator import UserError

SAVE_AS_TEXT = "save it as plain text in the program that opens it"
KINDS = (  # pattern of the first bytes, name, remedy; only for files that are not text
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document", f"{SAVE_AS_TEXT}, or save tables as CSV"),
    (rb"PAR1", "a Parquet file", "rename it so that it ends in .parquet"),
    (rb"7z\xbc\xaf\x27\x1c|Rar!\x1a\x07", "a 7z or rar archive", "unpack it, and pass the folder"),
    (rb"\x04\x22\x4d\x18|\x1f\x9d", "compressed with lz4 or compress", "decompress it with lz4 -d or uncompress"),
    (rb"\x89PNG\r\n|\xff\xd8\xff|GIF8[79]a", "an image", "pass a text file"),
    (rb"\x7fELF|\xcf\xfa\xed\xfe|MZ\x90\0", "a program", "pass a text file"),
    (rb"(?s)OggS\0|ID3[\3\4]|fLaC\0|RIFF....(WEBP|WAVE|AVI )", "an image or a recording", "pass a text file"),
    (rb"SQLite format 3\0", "an SQLite database", "export its text as CSV"),
    (rb"\x93NUMPY", "a NumPy array", "pass a text file"),
    (rb"(?s)ARROW1|\xff\xff\xff\xff..\0\0", "an Arrow file", "save its data as Parquet"),
    (rb"(?s).{60}BOOKMOBI", "a Kindle book", "convert it to EPUB"),
)
CONTROL_CHARACTERS = re.compile(rb"[\x00-\x08\x0e-\x1f]")
HTML = rb"(?is)(<\?xml[^>]*>\s*|<!--(?:(?!-->).)*-->\s*)*<(!doctype\s+html|html|head|body|meta)[\s/>]"
MARKUP_KINDS = (  # in any encoding, also after a byte-order mark and blank lines
    (rb"version https://git-lfs\.github\.com/spec/", "a Git LFS pointer", "run git lfs pull"),
    (rb"%PDF-", "a PDF", "convert it with pdftotext FILE.pdf FILE.txt"),
    (rb"\{\\rtf", "an RTF document", SAVE_AS_TEXT),
    (HTML, "HTML", "save it as text in a browser, or convert it, for example with pandoc --to=plain"),
)


def reject_other_kinds(location: str, head: bytes, suffix: str = ""):
    """Raise UserError if a file that starts with head is known not to be plain text."""
    for start, kinds in ((b"" if _is_text(head) else head, KINDS), (_strip(head), MARKUP_KINDS)):
        for pattern, kind, remedy in kinds:
            if re.match(pattern, start) or kind == "HTML" and suffix in (".html", ".htm", ".xhtml"):
                raise UserError(f"{location} is {kind}, not text: {remedy}")


def _is_text(head: bytes) -> bool:
    """Return True if the start of a file is UTF-8 without control characters."""
    with contextlib.suppress(UnicodeDecodeError):
        codecs.utf_8_decode(head, "strict", False)
        return not CONTROL_CHARACTERS.search(head)
    return False


def looks_like_html(head: bytes) -> bool:
    """Return True if a file that starts with head seems to be HTML or XHTML."""
    return bool(re.match(HTML, _strip(head)))


def looks_like_json(head: bytes) -> bool:
    """Return True if a file that starts with head seems to contain JSON objects."""
    return bool(re.match(rb'(\[\s*)?\{\s*"(?:[^"\\]|\\.)*"\s*:', _strip(head)))


def _strip(head: bytes) -> bytes:
    """Strip leading whitespace and a byte-order mark from head, and convert ASCII text in UTF-16 or UTF-32 to ASCII."""
    return head.replace(b"\0", b"").lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n\f")
