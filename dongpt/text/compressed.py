"""Read files compressed with gz, bz2, xz or zst. Memory use doesn't depend on their size.

    with open(path, "rb") as file:
        head, chunks = decompress(path, read_chunks(path, file))

Formats are recognized by the first bytes, not by the name. A file may consist of several streams. Uncompressed files
are read unchanged. Raises UserError for files that are damaged or truncated, or that have other data after a stream.
"""

import bz2
import contextlib
import io
import itertools
import lzma
import os
import re
import sys
import tarfile
import zipfile
import zlib
from typing import IO, Any, Callable, Iterator

from configurator import UserError

CHUNK_BYTES = 2**20  # read at a time
COMPRESSED_BYTES = 2**16  # decompressed at a time; they are copied once per stream, and streams may be short
HEAD_BYTES = 4096  # enough to recognize a format
COMPRESSION_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
ERRORS = (EOFError, OSError, RuntimeError, lzma.LZMAError, zlib.error, zipfile.BadZipFile, tarfile.TarError)


def file_suffixes(path: str) -> tuple[str, str]:
    """Return the lowercase suffixes for a file's format and compression, such as (".txt", ".gz") or (".csv", "")."""
    stem, suffix = os.path.splitext(path.lower())
    return (os.path.splitext(stem)[1], suffix) if suffix in COMPRESSION_SUFFIXES else (suffix, "")


@contextlib.contextmanager
def explain_errors(location: str) -> Iterator[None]:
    """Convert errors raised while reading, decompressing or unpacking to UserErrors."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"{location} cannot be read ({error.strerror}): check its path and permissions") from error
        if not isinstance(error, ERRORS) and type(error).__name__ != "ZstdError":
            raise
        reason, remedy = str(error) or "it ends early", "download it again"
        if isinstance(error, RuntimeError):  # from zipfile, for encryption and for unknown compressions
            remedy = "unpack it with another program"
        elif "too much memory" in reason:  # zstd --long=28 and more
            remedy = "decompress it with zstd -d --long=31"
        raise UserError(f"{location} cannot be decompressed ({reason}): {remedy}") from error


def read_chunks(location: str, file: IO[bytes], on_progress: Callable[[int], None] = lambda n: None) -> Iterator[bytes]:
    """Yield the content of a file in chunks, and call on_progress with their sizes."""
    with explain_errors(location):
        while chunk := file.read(CHUNK_BYTES):
            on_progress(len(chunk))
            yield chunk


def _split_head(chunks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """Return (the first HEAD_BYTES, all chunks including them)."""
    head = b""
    while len(head) < HEAD_BYTES and (chunk := next(chunks, b"")):
        head += chunk
    return head[:HEAD_BYTES], itertools.chain([head], chunks) if head else chunks


def _zstd_decompressor():
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ModuleNotFoundError:
        remedy = "run pip install backports.zstd, or unpack the file with unzstd"
        raise UserError(f"reading .zst files requires the package backports.zstd: {remedy}") from None
    return zstd.ZstdDecompressor()


# The modules gzip, bz2 and lzma are not used, since the latter two ignore everything after a damaged second stream.
DECOMPRESSORS: tuple[tuple[bytes, Callable[[], Any]], ...] = (  # pattern of the first bytes, constructor
    (rb"\x1f\x8b", lambda: zlib.decompressobj(wbits=31)),  # gz; checks length and CRC
    (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", bz2.BZ2Decompressor),
    (rb"\xfd7zXZ\0", lzma.LZMADecompressor),
    (rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", _zstd_decompressor),  # the latter starts a skippable frame
)


def decompressor_for(head: bytes) -> Callable[[], Any] | None:
    """Return a function that creates a decompressor for a file that starts with head, or None if it is uncompressed."""
    return next((new for pattern, new in DECOMPRESSORS if re.match(pattern, head)), None)


def decompress(location: str, chunks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """Return (the first HEAD_BYTES, all chunks) of a file's content, decompressing it if necessary."""
    return _split_head(_decompress(location, *_split_head(filter(None, chunks))))


def _decompress(location: str, head: bytes, chunks: Iterator[bytes]) -> Iterator[bytes]:
    new_decompressor = decompressor_for(head)
    if not new_decompressor:
        if suffix := file_suffixes(location)[1]:
            problem = f"its first bytes are not those of a {suffix} file"
            raise UserError(f"{location} cannot be decompressed: {problem}: it is damaged, or its name is wrong")
        yield from chunks
        return
    parts = (chunk[i : i + COMPRESSED_BYTES] for chunk in chunks for i in range(0, len(chunk), COMPRESSED_BYTES))
    decompressor = None
    with explain_errors(location):
        for data in parts:
            while data or not getattr(decompressor, "needs_input", True):  # zlib has unconsumed_tail instead
                if decompressor is None:
                    if not (data := data.lstrip(b"\0")):  # padding between streams
                        break
                    decompressor = new_decompressor()
                if content := decompressor.decompress(data, CHUNK_BYTES):
                    yield content
                data = getattr(decompressor, "unconsumed_tail", b"")
                if decompressor.eof:
                    data, decompressor = decompressor.unused_data, None
        if decompressor is not None:
            raise EOFError("it ends early")


class ChunkReader(io.RawIOBase):
    """A raw stream for io.BufferedReader that reads from an iterator of chunks."""

    def __init__(self, chunks: Iterator[bytes]):
        self.chunks, self.rest = chunks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        """Read into buffer until it is full or the file ends, and return the number of bytes read."""
        parts, size = [self.rest], len(self.rest)
        while size < len(buffer) and (chunk := next(self.chunks, b"")):
            parts.append(chunk)
            size += len(chunk)
        content, n = b"".join(parts), min(size, len(buffer))
        buffer[:n], self.rest = content[:n], content[n:]
        return n
