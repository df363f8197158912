"""Read text files, including compressed ones and those in zip and tar archives, without extracting them to disk.

    for member in read_members("corpus.tar.zst", lambda name: name.endswith(".txt")):
        for chunk in member.chunks: ...  # bytes

Archives are recognized by their first bytes, not by their name. A tar archive may be compressed, and an EPUB is a zip
archive. Any other file counts as a single member. Memory use doesn't depend on the size of a file or on the
sizes in headers. Raises UserError for files that are damaged, truncated, encrypted or not text.
"""

import contextlib
import io
import itertools
import operator
import os
import posixpath
import re
import stat
import tarfile
import zipfile
from typing import IO, Any, Callable, Iterator, NamedTuple

from configurator import UserError
from dongpt.text.compressed import (
    CHUNK_BYTES,
    ChunkReader,
    decompress,
    decompressor_for,
    explain_errors,
    file_suffixes,
    read_chunks,
)
from dongpt.text.file_kinds import SAVE_AS_TEXT, reject_other_kinds

SORTED_TAR_BYTES = 2**26  # a tar archive with more text is read in archive order, since sorting happens in memory
MAX_TAR_HEADER_BYTES = 2**20  # for a long name
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".tzst", ".epub")
ZIP_STARTS = (b"PK\3\4", b"PK\5\6", b"PK\7\x08")
OFFICE_KINDS = {"word": "a Word document", "xl": "an Excel workbook", "ppt": "a PowerPoint presentation"}
is_office = re.compile(r"(word|xl|ppt)/(document|workbook|presentation)\d*\.xml").fullmatch
NO_MEMBERS = "contains no files that can be read from an archive: unpack it, and pass its files"
is_hidden = re.compile(r"(^|/)\.[^/]|(^|/)__MACOSX/").search


class Member(NamedTuple):
    """A file, or one of the files in an archive."""

    location: str  # FILE or FILE/MEMBER, for error messages
    suffix: str  # lowercase file extension without any compression extension, such as ".txt"
    chunks: Iterator[bytes]  # its content in chunks


def is_archive(path: str) -> bool:
    """Return True if a file is an archive. Raises UserError if it cannot be read."""
    return _is_packed(read_head(path))


def read_head(path: str) -> bytes:
    """Return the start of a file, decompressing it if necessary."""
    with explain_errors(path), open(path, "rb") as file:
        return decompress(path, read_chunks(path, file))[0]


@contextlib.contextmanager
def open_file(path: str, is_wanted: Callable[[str], bool]) -> Iterator["io.BufferedReader[Any]"]:
    """Open a file for reading, decompressing it if necessary.

    In an archive, opens the only member whose name is wanted. Raises UserError if there are several such members.
    """
    with explain_errors(path), io.BufferedReader(io.FileIO(path), CHUNK_BYTES) as file:
        if not _is_packed(file.peek()):
            yield file  # itself, which is faster, whatever its name
            return
    names = [member.location[len(path) + 1 :] for member in read_members(path, is_wanted)]
    if len(names) > 1:
        raise UserError(f"{path} contains several files ({', '.join(names[:5])}): unpack it, and pass one of them")
    for member in read_members(path, is_wanted):
        yield io.BufferedReader(ChunkReader(member.chunks), CHUNK_BYTES)


def read_members(
    path: str, is_wanted: Callable[[str], bool], on_progress=lambda n: None, on_skip=lambda: None
) -> Iterator[Member]:
    """Yield the members of an archive whose names are wanted, sorted by name, or the file itself if it isn't one.

    Read each member's chunks before requesting the next member. Calls on_progress with the number of bytes read since
    the last call, and on_skip for every member that is skipped. Raises UserError if no member has a wanted name.
    """
    with explain_errors(path), open(path, "rb") as file:
        if file.peek(4).startswith(ZIP_STARTS):
            yield from _read_zip(path, file, is_wanted, on_progress, on_skip)
            return
        head, chunks = decompress(path, read_chunks(path, file, on_progress))
        suffix = file_suffixes(path)[0]
        if _is_tar(head):
            yield from _read_tar(path, chunks, is_wanted, on_skip)
        elif suffix in ARCHIVE_SUFFIXES:
            raise UserError(f"{path} is not the kind of archive that its name suggests: it is damaged or misnamed")
        else:
            yield _member(path, suffix, head, chunks)


def _member(location: str, suffix: str, head: bytes, chunks: Iterator[bytes]) -> Member:
    """Return a member whose content starts with head. Raises UserError if it is not text."""
    reject_other_kinds(location, head, suffix)
    if _is_packed(head):
        raise UserError(f"{location} contains another archive or compressed file: unpack it, and pass the folder")
    return Member(location, suffix, chunks)


def _is_packed(head: bytes) -> bool:
    """Return True if a file that starts with head is an archive or compressed."""
    return head.startswith(ZIP_STARTS) or bool(decompressor_for(head)) or _is_tar(head)


def _member_location(path: str, name: str) -> str:
    return f"{path}/" + "".join(c if c.isprintable() else "?" for c in name)


def _archive_member(path: str, name: str, chunks: Iterator[bytes]) -> Member:
    """Return a member of the archive at path, decompressed."""
    location = _member_location(path, name)
    return _member(location, file_suffixes(name)[0], *decompress(location, chunks))


def _is_readable(name: str, is_wanted: Callable[[str], bool]) -> bool:
    """Return True if a member should be read, that is, if its name is wanted and its path stays inside the archive."""
    name = posixpath.normpath(name)
    is_outside = name.startswith(("/", "\\", "../")) or name[1:3] in (":\\", ":/")
    return not (is_outside or is_hidden(name)) and is_wanted(name)


def _add_name(path: str, name: str, known: set[int]):
    """Add the hash of a member's name to those known so far. Raises UserError if another member has the same name."""
    if (key := hash(posixpath.normpath(name))) in known:
        problem = f"{_member_location(path, name)} occurs more than once, as after tar -r or tar -u"
        raise UserError(f"{problem}: unpack the archive, which keeps the last one, and pass the folder")
    known.add(key)


def _read_zip(path: str, file: IO[bytes], is_wanted, on_progress, on_skip) -> Iterator[Member]:
    """Yield the texts in a zip archive sorted by name, or the chapters of an e-book in reading order."""
    from dongpt.text import epub  # with its parsers, which only this needs

    size, n_reported = os.path.getsize(path), 0
    with zipfile.ZipFile(file) as archive:
        infos = [info for info in archive.infolist() if not info.is_dir()]
        names = {info.filename: info for info in infos}
        mimetype = archive.open("mimetype").read(100) if "mimetype" in names else b""
        kind = next((OFFICE_KINDS[match[1]] for match in map(is_office, names) if match), "")
        if kind or mimetype.startswith(b"application/vnd.oasis.opendocument"):
            kind = kind or "an OpenDocument file"
            raise UserError(f"{path} is {kind}, not text: {SAVE_AS_TEXT}, or save tables as CSV")
        is_book = epub.CONTAINER in names or mimetype.startswith(b"application/epub+zip")
        if is_book:
            chapters, n_skipped = epub.reading_order(archive, path)
            texts = [names[name] for name in chapters]
        else:
            texts = [
                i for i in infos if not stat.S_ISLNK(i.external_attr >> 16) and _is_readable(i.filename, is_wanted)
            ]
            texts.sort(key=operator.attrgetter("filename"))
            n_skipped = len(infos) - len(texts)
            known: set[int] = set()
            for info in texts:
                _add_name(path, info.filename, known)
        for _ in range(n_skipped):
            on_skip()
        for info in texts:
            chunks = _read_zip_member(archive, info, path)
            if is_book:
                yield Member(name := _member_location(path, info.filename), ".txt", epub.extract_text(chunks, name))
            else:
                yield _archive_member(path, info.filename, chunks)
            n_reported += info.compress_size
            on_progress(info.compress_size)
        if not texts:
            raise UserError(f"{path} {NO_MEMBERS}")
    on_progress(size - n_reported)


def _read_zip_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: str) -> Iterator[bytes]:
    """Yield the content of a member. zipfile checks its CRC at the end."""
    location, n_bytes = _member_location(path, info.filename), 0
    if info.flag_bits & 1:
        raise UserError(f"{location} is encrypted: unpack the archive with its password, and pass the folder")
    with explain_errors(location), archive.open(info) as file:
        for chunk in read_chunks(location, file):
            n_bytes += len(chunk)
            yield chunk
        if n_bytes != info.file_size:
            raise EOFError(f"it has {n_bytes:,} bytes, but the archive says {info.file_size:,}")


class _StrictTarInfo(tarfile.TarInfo):
    """Tar header that rejects names long enough to exhaust memory and treats damage as an error, not as the end."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        try:
            info = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if not buf or buf.strip(b"\0"):  # only zeros are the end
                raise tarfile.ReadError("it ends early or has a damaged header") from error
            raise
        is_header = info.type in (*tarfile.GNU_TYPES, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
        if is_header and info.type != tarfile.GNUTYPE_SPARSE and info.size > MAX_TAR_HEADER_BYTES:
            raise tarfile.ReadError(f"a file name is {info.size:,} bytes long")
        return info


def _is_tar(head: bytes) -> bool:
    """Return True if head starts with a tar header whose checksum is correct."""
    with contextlib.suppress(tarfile.HeaderError):
        return bool(tarfile.TarInfo.frombuf(head[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape"))
    return False


def _read_tar(path: str, chunks: Iterator[bytes], is_wanted, on_skip) -> Iterator[Member]:
    """Yield the texts in a tar archive, sorted by name, or in archive order if they exceed SORTED_TAR_BYTES."""
    texts: list[tuple[str, bytes, Iterator[bytes]]] = []  # not yet yielded: (name, start of the content, rest of it)
    file: Any = io.BufferedReader(ChunkReader(chunks), CHUNK_BYTES)
    size, known = 0, set[int]()
    with explain_errors(path), tarfile.open(fileobj=file, mode="r|", tarinfo=_StrictTarInfo) as opened:
        archive: Any = opened
        while info := archive.next():
            archive.members.clear()  # else it keeps all headers
            if not info.isreg() or not _is_readable(info.name, is_wanted):
                if not info.isdir():
                    on_skip()
                continue
            _add_name(path, info.name, known)
            content, parts = read_chunks(_member_location(path, info.name), archive.extractfile(info)), []
            size += tarfile.BLOCKSIZE
            while size <= SORTED_TAR_BYTES and (part := next(content, b"")):
                parts.append(part)
                size += len(part)
            texts.append((info.name, b"".join(parts), content))
            if size > SORTED_TAR_BYTES:
                yield from (_archive_member(path, name, itertools.chain([start], rest)) for name, start, rest in texts)
                texts.clear()
        while data := archive.fileobj.read(CHUNK_BYTES):
            if data.strip(b"\0"):
                raise tarfile.ReadError("there is data after the end of the archive")
    texts.sort(key=operator.itemgetter(0, 1))
    yield from (_archive_member(path, name, iter([text])) for name, text, _ in texts)
    if not size:
        raise UserError(f"{path} {NO_MEMBERS}")
