"""Read the text of EPUB e-books, which are zip archives of XHTML files.

for name in reading_order(archive, path):
    for chunk in extract_text(read(name), f"{path}/{name}"): ...  # UTF-8, with a byte-order mark
"""

import codecs
import contextlib
import posixpath
import re
import urllib.parse
import xml.etree.ElementTree as ElementTree
import zipfile
from html.parser import HTMLParser
from itertools import chain
from typing import Iterable, Iterator

from configurator import UserError
from dongpt.text.compressed import HEAD_BYTES
from dongpt.text.file_kinds import looks_like_html

CONTAINER = "META-INF/container.xml"  # names the package document, whose spine is the order of the chapters
ENCRYPTION = "META-INF/encryption.xml"
MAX_PACKAGE_BYTES = 2**24  # of each of these documents
BROWSER_ENCODINGS = {"iso8859-1": "cp1252", "gb2312": "gb18030", "euc_kr": "cp949"}  # supersets that browsers use
MAX_HEAD_BYTES = 2**12  # of a chapter that may declare its encoding
XHTML_TYPES = ("application/xhtml+xml", "text/html", "text/x-oeb1-document", "application/xml", "text/xml")
CONVERT = "convert it to text with another program"
HIDDEN = ("head", "script", "style", "template")  # elements without text to read
RUBY_TEXT = ("rt", "rp", "rtc")  # the pronunciation of the text before it; the end tag is optional
# number of line ends before and after an element
LINE_ENDS = dict.fromkeys("p h1 h2 h3 h4 h5 h6 div section article blockquote pre ul ol dl table hr figure".split(), 2)
LINE_ENDS |= dict.fromkeys("li dt dd tr figcaption caption".split(), 1)
BLANKS = re.compile(r"[ \t\r\n\f]+")


def reading_order(archive: zipfile.ZipFile, path: str) -> tuple[list[str], int]:
    """Return (names of the XHTML files in reading order, number of other files in the spine of the book).

    Raises UserError if the book is damaged or encrypted.
    """
    container = _read_xml(archive, CONTAINER, path)
    package_name = next((e.get("full-path", "") for e in container.iter() if _tag(e) == "rootfile"), "")
    package = _read_xml(archive, package_name, path)
    folder = posixpath.dirname(package_name)
    items = {element.get("id"): element for element in package.iter() if _tag(element) == "item"}
    spine = [element.get("idref", "") for element in package.iter() if _tag(element) == "itemref"]
    if lost := [idref for idref in spine if idref not in items]:
        raise UserError(f"{path} is a damaged e-book (its manifest lacks {lost[0]!r}): download it again, or {CONVERT}")
    types: dict[str, str] = {}  # by name, each once
    for item in map(items.__getitem__, spine):
        name = posixpath.join(folder, urllib.parse.unquote(item.get("href", "").partition("#")[0]))
        types[posixpath.normpath(name)] = item.get("media-type", "").partition(";")[0].strip().lower()
    names = [name for name, kind in types.items() if kind in XHTML_TYPES or _is_xhtml(archive, name)]
    if not names:
        raise UserError(f"{path} is an e-book without text in its spine: {CONVERT}")
    if missing := [name for name in names if name not in archive.namelist()]:
        raise UserError(f"{path} is a damaged e-book ({missing[0]} is missing): download it again")
    if ENCRYPTION in archive.namelist():
        references = (e.get("URI", "") for e in _read_xml(archive, ENCRYPTION, path).iter())
        if encrypted := {urllib.parse.unquote(reference) for reference in references} & set(names):
            raise UserError(f"{path} is copy-protected ({min(encrypted)} is encrypted): use another text")
    return names, len(types) - len(names)


def _is_xhtml(archive: zipfile.ZipFile, name: str) -> bool:
    """Return True if a file in the book exists and starts like XHTML, whatever its media type."""
    with contextlib.suppress(KeyError), archive.open(name) as file:
        return looks_like_html(file.read(HEAD_BYTES))
    return False


def _tag(element: ElementTree.Element) -> str:
    """Return the name of an element without its namespace."""
    return str(element.tag).rpartition("}")[2]


def _read_xml(archive: zipfile.ZipFile, name: str, path: str) -> ElementTree.Element:
    try:
        with archive.open(name) as file:
            content = file.read(MAX_PACKAGE_BYTES + 1)
        if len(content) > MAX_PACKAGE_BYTES:
            raise ValueError(f"it has more than {MAX_PACKAGE_BYTES:,} bytes")
        return ElementTree.fromstring(content)
    except (KeyError, ValueError, ElementTree.ParseError, LookupError) as error:
        raise UserError(f"{path} is a damaged e-book ({name or 'its package'}: {error}): download it again") from error


def extract_text(chunks: Iterable[bytes], location: str) -> Iterator[bytes]:
    """Yield the text of an XHTML file as UTF-8 with a byte-order mark, without markup, scripts or styles."""
    decoder, parser = None, _TextParser()
    yield codecs.BOM_UTF8
    for chunk in chain(chunks, [b""]):  # which marks the end
        if decoder is None:
            decoder = codecs.getincrementaldecoder(encoding := _encoding(chunk))()
        try:
            parser.feed(decoder.decode(chunk, not chunk))
        except UnicodeError as error:
            name = encoding.removesuffix("-sig")
            raise UserError(f"{location} cannot be decoded as {name}, its encoding: {CONVERT}") from error
        yield parser.take()
    parser.close()
    yield parser.take() + b"\n"


def _encoding(head: bytes) -> str:
    """Return the encoding given by an XHTML file's byte-order mark, XML declaration or <meta> tag, or else UTF-8."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    declared = re.match(rb"""<\?xml[^>]*encoding\s*=\s*["']([\w.-]+)["']""", head[:MAX_HEAD_BYTES])
    if not declared and (head.isascii() or "\ufffd" in codecs.utf_8_decode(head, "replace")[0]):  # <meta> may be wrong
        declared = re.search(rb"""(?i)<meta\s[^>]*charset\s*=\s*["']?([\w.-]+)""", head[:MAX_HEAD_BYTES])
    with contextlib.suppress(LookupError, UnicodeError):
        name = codecs.lookup(declared[1].decode("ascii")).name if declared else "utf-8"
        if "<".encode(name) == b"<" and name != "utf-8":  # not UTF-16, which the declaration would be in, too
            return BROWSER_ENCODINGS.get(name, name)
    return "utf-8-sig"


class _TextParser(HTMLParser):
    """Collects the text with one space between words and line breaks between blocks."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.has_text = False  # whether there was any text
        self.line_ends, self.needs_blank = 0, False  # before the next text
        self.hidden_depth = self.pre_depth = 0
        self.is_ruby_text = False

    def take(self) -> bytes:
        """Return the text added since the last call, in UTF-8."""
        text, self.parts = "".join(self.parts), []
        return text.encode("utf-8", "replace")

    def handle_starttag(self, tag, attrs):
        self.hidden_depth = 0 if tag == "body" else self.hidden_depth + (tag in HIDDEN)
        self.pre_depth += tag == "pre"
        self.is_ruby_text = tag in RUBY_TEXT or self.is_ruby_text and tag not in ("ruby", "rb", *LINE_ENDS)
        self._break_line(tag)

    def handle_endtag(self, tag):
        self.hidden_depth = max(0, self.hidden_depth - (tag in HIDDEN))
        self.pre_depth = max(0, self.pre_depth - (tag == "pre"))
        self.is_ruby_text &= tag not in ("ruby", *RUBY_TEXT, *LINE_ENDS)
        if tag != "br":
            self._break_line(tag)

    def _break_line(self, tag: str):
        n_line_ends = min(2, self.line_ends + 1) if tag == "br" else LINE_ENDS.get(tag, 0)
        self.line_ends = max(self.line_ends, n_line_ends)
        self.needs_blank |= tag in ("td", "th")

    def parse_marked_section(self, i, report=1):
        try:
            return super().parse_marked_section(i, report)
        except AssertionError:  # raised for sections that HTML does not have, which browsers take for comments
            return self.parse_bogus_comment(i)

    def unknown_decl(self, data):
        if data.startswith("CDATA["):
            self.handle_data(data.removeprefix("CDATA["))

    def handle_data(self, data):
        if self.hidden_depth or self.is_ruby_text:
            return
        if not self.pre_depth:
            data = BLANKS.sub(" ", data)
            self.needs_blank |= data.startswith(" ")
            data, ends_blank = data.strip(" "), data.endswith(" ")
            if not data:
                return
        if self.has_text:
            self.parts.append("\n" * self.line_ends or " " * self.needs_blank)
        self.parts.append(data)
        self.has_text, self.line_ends, self.needs_blank = True, 0, not self.pre_depth and ends_blank
