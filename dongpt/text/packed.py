"""Read compressed files and archives without unpacking them to disk, in memory that doesn't depend on their size.

    for member in read_members("corpus.tar.zst", lambda name: name.endswith(".txt")):
        for chunk in member.chunks: ...  # bytes

The first bytes tell the format, not the name: gz, bz2, xz and zst, also of several streams; zip and tar, which is also
recognized inside a compressed file; epub. Any other file is its own single member. Only what is read counts,
never a size in a header. Raises UserError for files that are damaged, truncated, encrypted or not text.
"""

import bz2
import contextlib
import itertools
import lzma
import os
import posixpath
import re
import stat
import sys
import tarfile
import zipfile
import zlib
from typing import Any, Callable, Iterable, Iterator, NamedTuple

from configurator import UserError

CHUNK_BYTES = 2**20  # read at a time
PACKED_BYTES = 2**16  # decompressed at a time: short streams are copied once for every stream in these bytes
HEAD_BYTES = 4096  # that tell a format
SORTED_TAR_BYTES = 2**26  # a tar with more text is read in its own order, since it cannot be sorted in memory
MAX_TAR_HEADER_BYTES = 2**20  # for a long name
COMPRESSION_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".tzst", ".epub")
HTML_SUFFIXES = (".html", ".htm", ".xhtml")
ZIP_STARTS = (b"PK\3\4", b"PK\5\6", b"PK\7\x08")
is_hidden = re.compile(r"(^|/)\.[^/]|(^|/)__MACOSX/").search
is_html = re.compile(
    rb"(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*|<!--(?:(?!-->).)*-->\s*)*(<!doctype\s+html|<html)[\s>]",
    re.IGNORECASE | re.DOTALL,
).match

# what is no text, and how to get the text out of it: (first bytes, name, remedy)
CONVERT = "save it as plain text in the program that opens it"
OTHER_KINDS: tuple[tuple[bytes, str, str], ...] = (
    (b"%PDF", "a PDF", "convert it with pdftotext FILE.pdf FILE.txt"),
    (b"{\\rtf", "an RTF document", CONVERT),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document", CONVERT),
    (b"PAR1", "a Parquet file", "rename it so that it ends in .parquet"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it, and pass the folder"),
    (b"Rar!\x1a\x07", "a rar archive", "unpack it, and pass the folder"),
    (b"\x04\x22\x4d\x18", "compressed with lz4", "unpack it"),
    (b"\x1f\x9d", "compressed with compress", "unpack it with uncompress"),
    *((start, "an image", "pass a text") for start in (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a")),
    *((start, "a program", "pass a text") for start in (b"\x7fELF", b"\xcf\xfa\xed\xfe", b"MZ\x90\0")),
    *((start, "an audio file", "pass a text") for start in (b"OggS\0", b"ID3\3", b"ID3\4", b"fLaC\0")),
    (b"SQLite format 3\0", "an SQLite database", "export its text as CSV"),
    (b"\x93NUMPY", "a NumPy array", "pass a text"),
)
OFFICE_MEMBERS = {  # of zip files
    "word/document.xml": "a Word document (.docx)",
    "xl/workbook.xml": "an Excel workbook (.xlsx)",
    "ppt/presentation.xml": "a PowerPoint presentation (.pptx)",
}
DAMAGES = (EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile, tarfile.TarError)


class Member(NamedTuple):
    """A file, or one of the files in an archive."""

    location: str  # FILE, or FILE/MEMBER, for messages
    suffix: str  # of its name in lower case, without that of a compression: ".txt"
    chunks: Iterator[bytes]  # its content


def file_suffixes(path: str) -> tuple[str, str]:
    """The suffixes for a file's format and compression: (".txt", ".gz"), (".csv", "")."""
    stem, suffix = os.path.splitext(path.lower())
    return (os.path.splitext(stem)[1], suffix) if suffix in COMPRESSION_SUFFIXES else (suffix, "")


def is_archive(path: str) -> bool:
    """Return True if a file is an archive. Raises UserError if it cannot be read."""
    with _explained(path), open(path, "rb") as file:
        head, chunks = _split_head(_read(file))
        if head.startswith(ZIP_STARTS):
            return True
        return _is_tar(_split_head(_decompress(path, head, chunks))[0])


def read_members(
    path: str,
    is_wanted: Callable[[str], bool],
    on_progress: Callable[[int], None] = lambda n: None,
    on_skip: Callable[[], None] = lambda: None,
) -> Iterator[Member]:
    """Yield the members of an archive with wanted names, sorted by name, or the file itself.

    Read a member's chunks before the next member. Calls on_progress with the number of bytes read since the last call,
    and on_skip for every other member. Raises UserError if no name is wanted.
    """
    with _explained(path), open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
        file.seek(0)
        if head.startswith(ZIP_STARTS):
            members = _read_zip(path, file, is_wanted, on_progress, on_skip)
        else:
            members = _read_stream(path, _read(file, on_progress), is_wanted, on_skip)
        yield from members


@contextlib.contextmanager
def _explained(location: str) -> Iterator[None]:
    """Convert errors of reading and unpacking to UserErrors."""
    try:
        yield
    except UserError:
        raise
    except NotImplementedError as error:  # from zipfile
        raise UserError(f"{location} cannot be decompressed ({error}): unpack it with another program") from error
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"{location} cannot be read ({error.strerror}): pass the path of a text file") from error
        if not isinstance(error, (*DAMAGES, OSError)) and type(error).__name__ != "ZstdError":
            raise
        reason = str(error) or "it ends early"
        remedy = "download it again"
        if "too much memory" in reason:  # zstd --long=28 and more
            remedy = "decompress it with zstd -d --long=31"
        raise UserError(f"{location} cannot be decompressed ({reason}): {remedy}") from error


def _read(file, on_progress: Callable[[int], None] = lambda n: None) -> Iterator[bytes]:
    """Yield the content of a binary file in chunks."""
    while chunk := file.read(CHUNK_BYTES):
        on_progress(len(chunk))
        yield chunk


def _split_head(chunks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """(the first HEAD_BYTES, all chunks including them)."""
    head = b""
    while len(head) < HEAD_BYTES and (chunk := next(chunks, b"")):
        head += chunk
    return head[:HEAD_BYTES], itertools.chain([head], chunks) if head else chunks


def _read_stream(path: str, chunks: Iterator[bytes], is_wanted, on_skip) -> Iterator[Member]:
    """Decompress a file, and yield its members if it is a tar archive, or else the file itself."""
    head, chunks = _split_head(chunks)
    head, chunks = _split_head(_decompress(path, head, chunks))
    if _is_tar(head):
        yield from _read_tar(path, chunks, is_wanted, on_skip)
        return
    suffix = file_suffixes(path)[0]
    if suffix in ARCHIVE_SUFFIXES:
        raise UserError(f"{path} is not the archive that its name says: it is damaged, or should have another name")
    reject_other_kinds(path, head, suffix)
    yield Member(path, suffix, chunks)


def reject_other_kinds(location: str, head: bytes, suffix: str = ""):
    """Raise UserError if a file that starts with head is known not to be text, or is packed twice."""
    for start, kind, remedy in OTHER_KINDS:
        if head.startswith(start):
            raise UserError(f"{location} is {kind}, not text: {remedy}")
    if head[:4] == b"RIFF" and head[8:12] in (b"WEBP", b"WAVE", b"AVI "):
        raise UserError(f"{location} is an image or a recording, not text: pass a text")
    if is_html(head) or suffix in HTML_SUFFIXES:
        remedy = "save it as text in a browser, or convert it, for example with pandoc --to=plain"
        raise UserError(f"{location} is HTML: {remedy}")
    if head.startswith(ZIP_STARTS) or _decompressor(head) or _is_tar(head):
        raise UserError(f"{location} is an archive or compressed once more: unpack it, and pass the folder")


# ----------------------------------------------------------------------------------------------------------------------
# compressed files


def _decompressor(head: bytes) -> Callable[[], Any] | None:
    """Return a function that creates a decompressor for the format that starts with head, or None."""
    if head.startswith(b"\x1f\x8b"):
        return lambda: zlib.decompressobj(wbits=31)  # gz; checks length and CRC
    if re.match(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", head):
        return bz2.BZ2Decompressor
    if head.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMADecompressor
    if head.startswith(b"\x28\xb5\x2f\xfd") or re.match(rb"[\x50-\x5f]\x2a\x4d\x18", head):  # the latter is skippable
        return _zstd_decompressor
    return None


def _zstd_decompressor():
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        try:
            from backports import zstd
        except ModuleNotFoundError:
            remedy = "pip install backports.zstd, or unpack the file with unzstd"
            raise UserError(f"reading .zst files needs the package backports.zstd: {remedy}") from None
    return zstd.ZstdDecompressor()


def _decompress(location: str, head: bytes, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the decompressed content of chunks that start with head, or the chunks if it isn't compressed.

    The modules gzip, bz2 and lzma are not used, since the latter two ignore everything after a damaged second stream.
    """
    new_decompressor = _decompressor(head)
    if not new_decompressor:
        if suffix := file_suffixes(location)[1]:
            problem = f"its first bytes are not those of a {suffix} file"
            raise UserError(f"{location} cannot be decompressed: {problem}: it is damaged, or its name is wrong")
        yield from chunks
        return
    with _explained(location):
        decompressor = None
        for chunk in chunks:
            for start in range(0, len(chunk), PACKED_BYTES):
                data = chunk[start : start + PACKED_BYTES]
                while data:
                    if decompressor is None:
                        data = data.lstrip(b"\0")  # padding between streams
                        if not data:
                            break
                        decompressor = new_decompressor()
                    if text := decompressor.decompress(data, CHUNK_BYTES):
                        yield text
                    if decompressor.eof:
                        data, decompressor = decompressor.unused_data, None
                    elif hasattr(decompressor, "unconsumed_tail"):  # zlib
                        data = decompressor.unconsumed_tail
                    else:
                        data = b""
                        while not (decompressor.needs_input or decompressor.eof):
                            yield decompressor.decompress(b"", CHUNK_BYTES)
                        if decompressor.eof:
                            data, decompressor = decompressor.unused_data, None
        if decompressor is not None:
            raise EOFError("it ends early")


# ----------------------------------------------------------------------------------------------------------------------
# archives


def _member(path: str, name: str, chunks: Iterator[bytes]) -> Member:
    """Return a member of the archive at path, decompressed."""
    location = f"{path}/" + "".join(c if c.isprintable() else "?" for c in name)
    head, chunks = _split_head(chunks)
    head, chunks = _split_head(_decompress(location, head, chunks))
    reject_other_kinds(location, head)
    return Member(location, file_suffixes(name)[0], chunks)


def _is_readable(name: str, is_wanted: Callable[[str], bool]) -> bool:
    """Return True if a member should be read: if its name is wanted and stays inside the archive."""
    name = posixpath.normpath(name)
    is_outside = name.startswith(("/", "\\", "../")) or name[1:3] in (":\\", ":/")
    return not (is_outside or is_hidden(name)) and is_wanted(name)


def _reject_empty(path: str):
    raise UserError(f"{path} holds no text that can be read from an archive: unpack it, and pass its files")


def _read_zip(path: str, file, is_wanted, on_progress, on_skip) -> Iterator[Member]:
    """Yield the texts in a zip archive, sorted by name, or those of an e-book, in reading order."""
    from dongpt.text import epub  # with its parsers, which only this needs

    size, reported = os.path.getsize(path), 0
    with zipfile.ZipFile(file) as archive:
        infos = {info.filename: info for info in archive.infolist() if not info.is_dir()}
        for name, kind in OFFICE_MEMBERS.items():
            if name in infos:
                raise UserError(f"{path} is {kind}, not text: {CONVERT}")
        mimetype = archive.open("mimetype").read(100) if "mimetype" in infos else b""
        if mimetype.startswith(b"application/vnd.oasis.opendocument"):
            raise UserError(f"{path} is an OpenDocument file (.odt), not text: {CONVERT}")
        is_book = epub.CONTAINER in infos
        if is_book:
            names = epub.reading_order(archive, path)
        else:
            names = sorted(name for name in infos if _is_readable(name, is_wanted))
        links = {name for name in names if stat.S_ISLNK(infos[name].external_attr >> 16)}
        for _ in range(0 if is_book else len(infos) - len(names) + len(links)):
            on_skip()
        for name in names:
            info = infos[name]
            if name in links:
                continue
            if info.flag_bits & 1:
                raise UserError(f"{path} is encrypted ({name}): unpack it with its password, and pass the folder")
            chunks = _read_zip_member(archive, info, path)
            if is_book:
                yield Member(f"{path}/{name}", ".txt", epub.extract_text(chunks))
            else:
                yield _member(path, name, chunks)
            n = min(info.compress_size, size - reported)
            reported += n
            on_progress(n)
        if len(links) == len(names):
            _reject_empty(path)
    on_progress(size - reported)


def _read_zip_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: str) -> Iterator[bytes]:
    """Yield the content of a member, whose CRC zipfile checks at the end."""
    with _explained(f"{path}/{info.filename}"), archive.open(info) as file:
        n_bytes = 0
        for chunk in _read(file):
            n_bytes += len(chunk)
            yield chunk
        if n_bytes != info.file_size:
            raise EOFError(f"it has {n_bytes:,} bytes where the archive says {info.file_size:,}")


class _BoundedTarInfo(tarfile.TarInfo):
    """The header of a tar's member, without names that fill memory."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        info = super().frombuf(buf, encoding, errors)
        is_header = info.type in (*tarfile.GNU_TYPES, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
        if is_header and info.type != tarfile.GNUTYPE_SPARSE and info.size > MAX_TAR_HEADER_BYTES:
            raise tarfile.ReadError(f"a name takes {info.size:,} bytes")
        return info


def _is_tar(head: bytes) -> bool:
    """Return True if head starts with a tar header whose checksum is correct."""
    try:
        tarfile.TarInfo.frombuf(head[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


class _Stream:
    """A binary file over chunks, for tarfile. It keeps the last bytes that were read."""

    def __init__(self, chunks: Iterator[bytes]):
        self.chunks, self.chunk, self.start = chunks, b"", 0
        self.position, self.recent = 0, b""  # what was read in all; the end of it

    def read(self, n: int) -> bytes:
        if self.start >= len(self.chunk):
            self.chunk, self.start = next(self.chunks, b""), 0
        data = self.chunk[self.start : self.start + n]
        self.start += len(data)
        self.position += len(data)
        self.recent = (self.recent + data)[-2 * tarfile.RECORDSIZE :]
        return data

    def has_only_zeros_after(self, position: int) -> bool:
        """Return True if only zeros follow a position, and at least one. Reads to the end."""
        rest = self.recent[len(self.recent) - (self.position - position) :]
        n_bytes = len(rest) + len(self.chunk) - self.start
        is_zero = not rest.strip(b"\0") and not self.chunk[self.start :].strip(b"\0")
        for chunk in self.chunks:
            n_bytes, is_zero = n_bytes + len(chunk), is_zero and not chunk.strip(b"\0")
        return n_bytes > 0 and is_zero


def _read_tar(path: str, chunks: Iterator[bytes], is_wanted, on_skip) -> Iterator[Member]:
    """Yield the texts in a tar archive, sorted by name, or in archive order if they exceed SORTED_TAR_BYTES."""
    sorted_texts: list[tuple[str, bytes]] | None = []
    size, n_read = 0, 0
    stream: Any = _Stream(chunks)
    with _explained(path), tarfile.open(fileobj=stream, mode="r|", tarinfo=_BoundedTarInfo) as opened:
        archive: Any = opened
        while info := archive.next():
            archive.members.clear()  # else it keeps all headers
            if not info.isreg() or not _is_readable(info.name, is_wanted):
                if not info.isdir():
                    on_skip()
                continue
            n_read, size = n_read + 1, size + tarfile.BLOCKSIZE
            text_chunks = _read(archive.extractfile(info))
            if sorted_texts is not None:
                texts = []
                for text in text_chunks:
                    texts.append(text)
                    size += len(text)
                    if size > SORTED_TAR_BYTES:
                        break
                if size <= SORTED_TAR_BYTES:
                    sorted_texts.append((info.name, b"".join(texts)))
                    continue
                yield from (_member(path, name, iter([text])) for name, text in sorted_texts)
                text_chunks, sorted_texts = itertools.chain(texts, text_chunks), None
            yield _member(path, info.name, text_chunks)
        # tarfile takes a damaged header for the end
        if not stream.has_only_zeros_after(archive.offset):
            raise EOFError("it ends early, has a damaged header, or something follows its end")
    yield from (_member(path, name, iter([text])) for name, text in sorted(sorted_texts or []))
    if not n_read:
        _reject_empty(path)
