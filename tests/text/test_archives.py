"""Compressed files and archives are read directly, recognized by their first bytes, and verified to the end."""

import bz2
import gzip
import io
import lzma
import os
import random
import stat
import struct
import tarfile
import tracemalloc
import zipfile

import pytest

from configurator import UserError
from dongpt.text import archives, epub
from dongpt.text.archives import is_archive, read_members


def zstd():
    return pytest.importorskip("backports.zstd")


def compress_zstd(content: bytes) -> bytes:
    """A frame with a checksum, as the program zstd writes it."""
    zstandard = zstd()
    return zstandard.compress(content, options={zstandard.CompressionParameter.checksum_flag: 1})


COMPRESSORS = {
    ".gz": lambda content: gzip.compress(content, mtime=0),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: compress_zstd(content),
}
TEXT = "".join(random.Random(1).choices("abcdefgh \n\u00e9", k=300_000)).encode("utf-8")
POEMS = {"b.txt": b"second\n", "a.txt": b"first\n", "deep/c.md": b"third\n"}
SORTED_POEMS = [("a.txt", b"first\n"), ("b.txt", b"second\n"), ("deep/c.md", b"third\n")]


def is_wanted(name: str) -> bool:
    return name.endswith((".txt", ".md", ".txt.gz"))


def write(path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def read(path: str) -> bytes:
    ((location, content),) = [(m.location, b"".join(m.chunks)) for m in read_members(path, is_wanted)]
    assert location == path
    return content


def read_all(path: str) -> list[tuple[str, bytes]]:
    """Names and contents of an archive's members."""
    members = [(member.location, b"".join(member.chunks)) for member in read_members(path, is_wanted)]
    assert all(location.startswith(f"{path}/") for location, _ in members)
    return [(location[len(path) + 1 :], content) for location, content in members]


def problem(path: str) -> str:
    with pytest.raises(UserError) as error:
        for member in read_members(path, is_wanted):
            for _ in member.chunks:
                pass
    message = str(error.value)
    assert message.startswith(path) and ": " in message and "\n" not in message
    return message


def sizes_and_peak_memory(path: str) -> tuple[list[int], int]:
    """The sizes of the members, and the memory in bytes that reading them takes."""
    tracemalloc.start()
    try:
        sizes = [sum(map(len, member.chunks)) for member in read_members(path, is_wanted)]
        return sizes, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def make_zip(members: dict[str, bytes], compression=zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def make_tar(members: dict[str, bytes], tar_format=tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tar_format) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


# ----------------------------------------------------------------------------------------------------------------------
# compressed files


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_first_bytes_tell_the_compression_and_the_name_does_not_matter(tmp_path, suffix):
    content = COMPRESSORS[suffix](TEXT)
    for name in ("text" + suffix, "text.txt", "text"):
        assert read(write(tmp_path / name, content)) == TEXT
    (member,) = read_members(write(tmp_path / ("records.jsonl" + suffix), content), is_wanted)
    assert member.suffix == ".jsonl"


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_all_streams_of_a_file_are_read(tmp_path, suffix):
    compress = COMPRESSORS[suffix]
    parts = [TEXT[i : i + 40_000] for i in range(0, len(TEXT), 40_000)]
    assert read(write(tmp_path / "a", b"".join(map(compress, parts)))) == TEXT
    assert read(write(tmp_path / "b", compress(b"") + compress(TEXT) + compress(b""))) == TEXT
    assert read(write(tmp_path / "c", compress(TEXT) + b"\0" * 512)) == TEXT  # padding
    assert read(write(tmp_path / "c", compress(TEXT) + b"\0" * 8 + compress(TEXT))) == 2 * TEXT
    assert read(write(tmp_path / "d", b"".join(compress(bytes([c])) for c in TEXT[:300]))) == TEXT[:300]
    assert read(write(tmp_path / "e", compress(b""))) == b""


def test_skippable_frames_are_skipped(tmp_path):
    def skippable(content: bytes) -> bytes:
        return b"\x5a\x2a\x4d\x18" + struct.pack("<I", len(content)) + content

    compress = zstd().compress
    content = skippable(b"first") + compress(TEXT[:999]) + skippable(b"") + skippable(b"x" * 99_999)
    content += compress(TEXT[999:]) + skippable(b"last")
    assert read(write(tmp_path / "text.zst", content)) == TEXT


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_a_file_that_ends_early_is_an_error_wherever_it_ends(tmp_path, suffix):
    compress = COMPRESSORS[suffix]
    first, second = compress(TEXT[:5000]), compress(TEXT[5000:9000])
    content = first + second
    ends = {*range(0, 30), len(first) // 2, *range(len(first) + 1, len(first) + 20), len(content) - 1}
    for end in ends - {len(first)}:
        assert "cannot be decompressed" in problem(write(tmp_path / f"text.txt{suffix}", content[:end]))


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_damage_is_an_error_in_every_stream(tmp_path, suffix):
    compress = COMPRESSORS[suffix]
    first, second = compress(TEXT[:5000]), compress(TEXT[5000:9000])
    assert read(write(tmp_path / "whole", first + second)) == TEXT[:9000]
    for start in (len(first), len(first) + len(second) // 2):  # the header of the second stream, and its content
        content = bytearray(first + second)
        content[start : start + 3] = b"\xff\xff\xff"
        assert "cannot be decompressed" in problem(write(tmp_path / f"text.txt{suffix}", bytes(content)))
    assert "cannot be decompressed" in problem(write(tmp_path / f"text.txt{suffix}", first + b"garbage"))


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_a_name_that_promises_a_compression_is_not_believed(tmp_path, suffix):
    for content in (b"plain text", b""):
        message = problem(write(tmp_path / f"text{suffix}", content))
        assert f"its first bytes are not those of a {suffix} file" in message


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_memory_is_bounded_however_much_a_file_unpacks_to(tmp_path, suffix):
    block = COMPRESSORS[suffix](bytes(2**26))  # 64 MB of zeros
    path = write(tmp_path / "bomb", block * 4)
    sizes, peak = sizes_and_peak_memory(path)
    assert sizes == [2**28] and peak < 16e6


def test_a_frame_that_needs_gigabytes_is_refused_with_a_remedy(tmp_path):
    zstandard = zstd()
    parameter = zstandard.CompressionParameter
    options = {parameter.window_log: 30, parameter.enable_long_distance_matching: 1}
    compressor = zstandard.ZstdCompressor(options=options)
    path = write(tmp_path / "a.zst", compressor.compress(TEXT) + compressor.flush())
    assert "decompress it with zstd -d --long=31" in problem(path)


def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch):
    path = write(tmp_path / "text.zst", zstd().compress(TEXT))
    monkeypatch.setitem(__import__("sys").modules, "backports", None)
    with pytest.raises(
        UserError, match="requires the package backports.zstd: run pip install backports.zstd, or unpack"
    ):
        list(read_members(path, is_wanted))


# ----------------------------------------------------------------------------------------------------------------------
# archives


@pytest.mark.parametrize("kind", ["zip", "zip stored", "zip bz2", "zip xz", "tar", "tar gnu", "tar v7", *COMPRESSORS])
def test_members_come_in_the_order_of_their_names(tmp_path, kind):
    zip_methods = {"zip": 8, "zip stored": 0, "zip bz2": 12, "zip xz": 14}
    if kind in zip_methods:
        content = make_zip(POEMS, zip_methods[kind])
    else:
        content = make_tar(POEMS, tarfile.GNU_FORMAT if kind == "tar gnu" else tarfile.USTAR_FORMAT)
        content = COMPRESSORS.get(kind, bytes)(content)
    for name in ("poems", "poems.txt", f"poems{kind}" if kind in COMPRESSORS else f"poems.{kind[:3]}"):
        path = write(tmp_path / name, content)
        assert is_archive(path) and read_all(path) == SORTED_POEMS


def test_a_plain_file_is_no_archive(tmp_path):
    assert not is_archive(write(tmp_path / "a.txt", TEXT)) and not is_archive(write(tmp_path / "b", b""))
    assert not is_archive(write(tmp_path / "c", gzip.compress(TEXT)))


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_other_members_are_skipped_and_counted(tmp_path, make):
    others = [".hidden.txt", "__MACOSX/._a.txt", "deep/.git/x.txt", "image.png", "/etc/absolute.txt", "../outside.txt"]
    path = write(tmp_path / "poems", make({**dict.fromkeys(others, b"no"), "./x/../a.txt": b"yes", "b..txt": b"yes"}))
    n_skipped = []
    members = [
        (m.location, b"".join(m.chunks)) for m in read_members(path, is_wanted, on_skip=lambda: n_skipped.append(1))
    ]
    assert members == [(f"{path}/./x/../a.txt", b"yes"), (f"{path}/b..txt", b"yes")]
    assert len(n_skipped) == len(others)


@pytest.mark.parametrize("make", ["zip", "tar"])
def test_members_of_the_same_name_are_refused(tmp_path, make):
    file = io.BytesIO()
    texts = [("b.txt", b"y"), ("a.txt", b"x"), ("b.txt", b"z"), ("no.png", b""), ("no.png", b"")]
    if make == "zip":
        with zipfile.ZipFile(file, "w") as archive, pytest.warns(UserWarning, match="Duplicate name"):
            for name, content in texts:
                archive.writestr(name, content)
    else:
        with tarfile.open(fileobj=file, mode="w") as archive:
            for name, content in texts:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    path = write(tmp_path / "twice", file.getvalue())
    assert "twice/b.txt occurs more than once" in problem(path) and "unpack the archive" in problem(path)


def test_links_and_devices_are_skipped(tmp_path):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, kind in (("a.txt", tarfile.SYMTYPE), ("b.txt", tarfile.LNKTYPE), ("c.txt", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/hostname"
            archive.addfile(info)
        info = tarfile.TarInfo("d.txt")
        info.size = 4
        archive.addfile(info, io.BytesIO(b"text"))
    assert read_all(write(tmp_path / "links.tar", file.getvalue())) == [("d.txt", b"text")]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        link = zipfile.ZipInfo("a.txt")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/hostname")
        archive.writestr("d.txt", "text")
    assert read_all(write(tmp_path / "links.zip", file.getvalue())) == [("d.txt", b"text")]


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_compressed_members_are_read_and_archives_in_archives_are_not(tmp_path, make):
    assert read_all(write(tmp_path / "a", make({"a.txt.gz": gzip.compress(TEXT)}))) == [("a.txt.gz", TEXT)]
    for content in (make_zip(POEMS), make_tar(POEMS), gzip.compress(gzip.compress(TEXT))):
        assert "unpack it, and pass the folder" in problem(write(tmp_path / "b", make({"a.txt": content})))
    assert "contains no files" in problem(write(tmp_path / "c", make({"inner.zip": make_zip(POEMS)})))
    assert "contains no files" in problem(write(tmp_path / "d", make({"image.png": b""})))
    assert "not text" in problem(write(tmp_path / "e", make({"a.txt": b"%PDF-1.7 ..."})))


def test_an_archive_in_a_compression_or_compressed_twice_is_refused(tmp_path):
    for content in (gzip.compress(make_zip(POEMS)), gzip.compress(bz2.compress(TEXT))):
        assert "contains another archive or compressed file: unpack it" in problem(write(tmp_path / "a.gz", content))


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_a_tar_that_ends_early_is_an_error_wherever_it_ends(tmp_path, suffix):
    """Also between two members, where tarfile itself stops without an error."""
    members = {f"{i}.txt": b"text " * 300 for i in range(5)}
    content = make_tar(members)[: 5 * (512 + 1536) + 1024]
    assert len(read_all(write(tmp_path / "whole", content))) == 5
    compress = COMPRESSORS.get(suffix, bytes)
    for end in range(512, len(content) - 1024 + 1, 512):
        assert "cannot be decompressed" in problem(write(tmp_path / "a.tar", compress(content[:end])))
    for end in (100, 700, 2500, 5000):
        problem(write(tmp_path / "a.tar", content[:end]))


def test_what_follows_the_end_of_a_tar_or_a_damaged_header_is_not_ignored(tmp_path):
    content = make_tar(POEMS)
    assert "there is data after the end of the archive" in problem(
        write(tmp_path / "two.tar", content + make_tar({"d.txt": b"x"}))
    )
    damaged = bytearray(content)
    damaged[1024 + 20] ^= 1  # in the name of the second member
    assert "damaged header" in problem(write(tmp_path / "damaged.tar", bytes(damaged)))


def test_a_large_tar_is_read_in_its_own_order_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "SORTED_TAR_BYTES", 2**20)
    members = {f"{9 - i}.txt": bytes([65 + i]) * 400_000 for i in range(10)}
    path = write(tmp_path / "a.tar.gz", gzip.compress(make_tar(members)))
    assert read_all(path) == list(members.items())
    packed = {f"{9 - i}.txt.gz": gzip.compress(random.Random(i).randbytes(400_000)) for i in range(5)}
    members = [(name, gzip.decompress(content)) for name, content in packed.items()]
    assert read_all(write(tmp_path / "c.tar", make_tar(packed))) == members
    path = write(tmp_path / "b.tar.gz", gzip.compress(make_tar({"b.txt": bytes(2**27), "a.txt": b"x"})))
    sizes, peak = sizes_and_peak_memory(path)
    assert sizes == [2**27, 1] and peak < 20e6


def test_a_long_name_does_not_fill_memory(tmp_path):
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**33
    path = write(tmp_path / "a.tar", info.tobuf(tarfile.GNU_FORMAT) + bytes(20_000))
    assert "cannot be decompressed" in problem(path)
    long = make_tar({"long/" * 100 + "name.txt": b"text"}, tarfile.GNU_FORMAT)
    assert read_all(write(tmp_path / "b.tar", long)) == [("long/" * 100 + "name.txt", b"text")]


def test_damaged_zips_are_errors(tmp_path):
    content = make_zip({"a.txt": TEXT, "b.txt": b"more"})
    for end in (4, 100, len(content) // 2, len(content) - 1):
        assert "cannot be decompressed" in problem(write(tmp_path / "a.zip", content[:end]))
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 255
    assert "cannot be decompressed" in problem(write(tmp_path / "b.zip", bytes(damaged)))
    for wrong_size in (len(TEXT) - 1, len(TEXT) + 1):  # in the directory of the archive
        sized = bytearray(content)
        at = content.index(b"PK\1\2") + 24
        sized[at : at + 4] = struct.pack("<I", wrong_size)
        assert "cannot be decompressed" in problem(write(tmp_path / "c.zip", bytes(sized)))
    encrypted = bytearray(content)
    encrypted[content.index(b"PK\1\2") + 8] |= 1
    assert "a.txt is encrypted: unpack the archive with its password" in problem(
        write(tmp_path / "d.zip", bytes(encrypted))
    )
    encrypted = bytearray(make_zip({"mimetype": b"text", "a.txt": TEXT}))
    encrypted[encrypted.index(b"PK\1\2") + 8] |= 1
    assert "is encrypted, password required" in problem(write(tmp_path / "d.zip", bytes(encrypted)))
    unknown = bytearray(content)
    unknown[content.index(b"PK\1\2") + 10] = 97
    assert "unpack it with another program" in problem(write(tmp_path / "e.zip", bytes(unknown)))


def test_what_a_name_promises_is_checked(tmp_path):
    for name in ("a.zip", "a.tar", "a.tar.gz", "a.epub", "a.tgz"):
        content = gzip.compress(b"plain text") if name.endswith("gz") else b"plain text"
        assert "is not the kind of archive that its name suggests" in problem(write(tmp_path / name, content))


def test_progress_is_reported_in_bytes_of_the_file(tmp_path):
    for name, content in {
        "a.txt": TEXT,
        "a.gz": gzip.compress(TEXT),
        "a.tar.gz": gzip.compress(make_tar(POEMS)),
        "a.zip": make_zip(POEMS),
    }.items():
        path, reported = write(tmp_path / name, content), []
        for member in read_members(path, is_wanted, reported.append):
            list(member.chunks)
        assert sum(reported) == os.path.getsize(path), name


# ----------------------------------------------------------------------------------------------------------------------
# files that are no text


@pytest.mark.parametrize(
    "content, words",
    [
        (b"%PDF-1.4\n%\xe2\xe3", "is a PDF, not text: convert it with pdftotext"),
        (make_zip({"[Content_Types].xml": b"", "word/document.xml": b""}), "Word document, not text: save it"),
        (make_zip({"xl/workbook2.xml": b""}), "Excel workbook"),
        (make_zip({"mimetype": b"application/vnd.oasis.opendocument.text"}), "OpenDocument file, not text"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(100), "old Office document"),
        (b"{\\rtf1\\ansi text}", "an RTF document"),
        (b"<!DOCTYPE html>\n<p>text", "is HTML, not text: save it as text"),
        (b"<html><body>text", "is HTML"),
        (b"\xef\xbb\xbf\n<?xml version='1.0'?>\n<!-- <p> -->\n<html xmlns='x'>", "is HTML"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "an image, not text"),
        (b"\xff\xd8\xff\xe0" + bytes(50), "an image, not text"),
        (b"\x7fELF" + bytes(50), "a program, not text"),
        (b"RIFF\1\2\3\4WAVEfmt ", "an image or a recording"),
        (b"PAR1" + bytes(50), "a Parquet file, not text: rename it so that it ends in .parquet"),
        (b"7z\xbc\xaf\x27\x1c\0\4", "a 7z or rar archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer"),
        (b"ARROW1\0\0", "an Arrow file"),
        (b"\xff\xff\xff\xff\x0a\1\0\0\x10", "an Arrow file"),  # its stream format, which datasets writes
        (b"A book".ljust(60, b"\0") + b"BOOKMOBI", "a Kindle book"),
    ],
)
def test_other_kinds_are_named_with_a_remedy(tmp_path, content, words):
    for name in ("a.txt", "a"):
        assert words in problem(write(tmp_path / name, content))
        if not content.startswith(b"PK"):
            assert words in problem(write(tmp_path / f"{name}.gz", gzip.compress(content)))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize(
    "start, words",
    [
        ("%PDF-1.4", "a PDF"),
        ("{\\rtf1", "an RTF document"),
        ("<!doctype html>", "HTML"),
        ("<head><title>", "HTML"),
        ("<BODY>", "HTML"),
        ("<meta charset='utf-8'>", "HTML"),
    ],
)
def test_markup_is_named_in_any_encoding_and_after_blank_lines(tmp_path, start, words, encoding):
    for blanks in ("", "\r\n \n"):
        assert f"is {words}" in problem(write(tmp_path / "a.txt", f"{blanks}{start} text".encode(encoding)))


def test_html_is_also_known_by_its_name(tmp_path):
    assert "a.html is HTML" in problem(write(tmp_path / "a.html", b"<p>text"))


TEXT_STARTS = ("PAR1 is how it starts", "GIF89a or GIF87a", "ARROW1", "RIFF1986WAVE", "e-book".rjust(60) + "BOOKMOBI")


@pytest.mark.parametrize(
    "text",
    ["<htmlx>", "PDF", "<header>", "<!doctype xml>", "<p>a</p>", "x <html>", "RIFF", "MZ", "BZh9 x", *TEXT_STARTS],
)
def test_texts_that_only_look_similar_are_texts(tmp_path, text):
    assert read(write(tmp_path / "a.txt", text.encode())) == text.encode()


def test_many_comments_do_not_take_forever(tmp_path):
    content = b"<!-- -->" * 500 + b"text"
    assert read(write(tmp_path / "a.txt", content)) == content


# ----------------------------------------------------------------------------------------------------------------------
# e-books

CONTAINER = b"""<?xml version="1.0"?>
<container version="1.0" xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>
<rootfile full-path="OEBPS/content.opf" media-type="application/oebps-package+xml"/></rootfiles></container>"""
PACKAGE = b"""<?xml version="1.0"?>
<package xmlns="http://www.idpf.org/2007/opf" version="3.0"><manifest>
<item id="one" href="one.xhtml" media-type="application/xhtml+xml"/>
<item id="two" href="text/two%20more.xhtml" media-type="application/xhtml+xml"/>
<item id="css" href="style.css" media-type="text/css"/><item id="p" href="p.svg" media-type="image/svg+xml"/>
</manifest><spine><itemref idref="two"/><itemref idref="p"/><itemref idref="one"/></spine></package>"""
ONE = """<?xml version="1.0" encoding="utf-8"?><!DOCTYPE html>
<html xmlns="http://www.w3.org/1999/xhtml"><head><title>Title</title><style>p { color: red }</style></head><body>
<h1>Chapter  <em>One</em></h1><p>It was a
   <b>dark</b>, dark &amp; stormy&#160;night &#8212; caf\u00e9.</p><script>var x = "<p>no</p>";</script>
<p>Two<br/>lines</p><ul><li>a</li><li>b</li></ul><pre>  kept
    as is</pre><p><![CDATA[raw <text>]]></p><!-- no --></body></html>"""
TWO = """<html xmlns="http://www.w3.org/1999/xhtml"><head/><body><p>First in the spine.</p></body></html>"""


def make_epub(**changes) -> bytes:
    members = {
        "mimetype": b"application/epub+zip",
        "META-INF/container.xml": CONTAINER,
        "OEBPS/content.opf": PACKAGE,
        "OEBPS/one.xhtml": ONE.encode(),
        "OEBPS/text/two more.xhtml": TWO.encode(),
        "OEBPS/style.css": b"p {}",
        **changes,
    }
    return make_zip({name: content for name, content in members.items() if content is not None})


def test_an_e_book_gives_its_chapters_in_the_order_of_the_spine_without_markup(tmp_path):
    path = write(tmp_path / "book.epub", make_epub())
    assert is_archive(path)
    (name_two, two), (name_one, one) = read_all(path)
    assert (name_two, name_one) == ("OEBPS/text/two more.xhtml", "OEBPS/one.xhtml")
    assert two.decode("utf-8-sig") == "First in the spine.\n"
    assert one.decode("utf-8-sig") == (
        "Chapter One\n\nIt was a dark, dark & stormy\u00a0night \u2014 caf\u00e9.\n\nTwo\nlines\n\na\nb\n\n"
        "  kept\n    as is\n\nraw <text>\n"
    )
    assert [member.suffix for member in read_members(path, is_wanted)] == [".txt", ".txt"]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_text_of_a_chapter_does_not_depend_on_the_chunks(size):
    content = ONE.encode()
    chunks = [content[i : i + size] for i in range(0, len(content), size)] if size > 1 else [content[:60]]
    chunks += [content[60 + i : 61 + i] for i in range(len(content) - 60)] if size == 1 else []
    assert b"".join(epub.extract_text(chunks, "book")) == b"".join(epub.extract_text([content], "book"))


def chapter_text(content: bytes) -> str:
    return b"".join(epub.extract_text([content], "b.epub/one.xhtml")).decode("utf-8-sig").strip()


@pytest.mark.parametrize(
    "head, text, encoding",
    [
        ("<meta charset='ISO-8859-1'/>", "caf\u00e9", "latin-1"),
        ('<META http-equiv="Content-Type" content="text/html; charset=windows-1251">', "\u0434\u0430", "cp1251"),
        ("<meta charset=iso-8859-1>", "\u201cso\u201d", "cp1252"),  # as browsers read it
        ("<meta charset=utf-16>", "caf\u00e9", "utf-8"),  # cannot be true
        ("<meta charset=iso-8859-1>", "caf\u00e9", "utf-8"),  # XML without a declaration is UTF-8
        ("<meta charset=hex>", "caf\u00e9", "utf-8"),
        ("<meta charset=iso-8859-1>", "caf\u00e9", "utf-8-sig"),
    ],
)
def test_encodings_declared_in_a_meta_element(head, text, encoding):
    assert chapter_text(f"<html><head>{head}</head><p>{text}</p></html>".encode(encoding)) == text


@pytest.mark.parametrize(
    "content, name",
    [
        (b"<p>caf\xe9</p>", "utf-8"),
        (b"<meta charset=us-ascii><p>caf\xe9</p>", "ascii"),
        (b"<?xml version='1.0' encoding='utf-8'?><p>caf\xe9</p>", "utf-8"),
        (b"<?xml version='1.0' encoding='rot13'?><p>caf\xe9</p>", "utf-8"),
        (b"<p>caf\xc3", "utf-8"),
    ],
)
def test_a_chapter_that_cannot_be_decoded_is_named(content, name):
    with pytest.raises(UserError, match=f"b.epub/one.xhtml cannot be decoded as {name}, its encoding: convert"):
        chapter_text(content)


def test_marked_sections_that_the_parser_does_not_know_are_left_out(monkeypatch):
    def fail(*args):
        raise AssertionError("unknown status keyword")

    monkeypatch.setattr(epub.HTMLParser, "parse_marked_section", fail)
    text = chapter_text(b"<p>one <![if x]>two <![endif]>three</p>")
    assert text == "one two three"


@pytest.mark.parametrize("media_type", ["text/html; charset=utf-8", "text/x-oeb1-document", "application/xml"])
def test_other_media_types_of_chapters(tmp_path, media_type):
    package = PACKAGE.replace(b"application/xhtml+xml", media_type.encode())
    assert len(read_all(write(tmp_path / "book.epub", make_epub(**{"OEBPS/content.opf": package})))) == 2


@pytest.mark.parametrize("media_type", [b"", b"text/plain", b"application/xhtml"])
def test_chapters_with_a_wrong_media_type_are_read_and_other_files_in_the_spine_counted(tmp_path, media_type):
    package = PACKAGE.replace(b"application/xhtml+xml", media_type)
    for svg in (None, b"<svg xmlns='http://www.w3.org/2000/svg'/>"):
        path = write(tmp_path / "book.epub", make_epub(**{"OEBPS/content.opf": package, "OEBPS/p.svg": svg}))
        n_skipped = []
        members = [m.location for m in read_members(path, is_wanted, on_skip=lambda: n_skipped.append(1))]
        assert len(members) == 2 and len(n_skipped) == 1


@pytest.mark.parametrize(
    "ruby",
    [
        "<ruby>\u6f22<rp>(</rp><rt>kan</rt><rp>)</rp>\u5b57<rt>ji</rt></ruby>",
        "<ruby><rb>\u6f22</rb><rt>kan</rt><rb>\u5b57</rb><rt>ji</rt></ruby>",
        "<ruby>\u6f22<rt>kan<rb>\u5b57<rt>ji</ruby>",  # without end tags, as in HTML
        "<ruby>\u6f22\u5b57<rtc><rt>kan</rt><rt>ji</rt></rtc></ruby>",
        "<ruby>\u6f22\u5b57<rt><b>kan</b>ji</rt></ruby>",
    ],
)
def test_the_pronunciation_of_characters_is_left_out(ruby):
    assert chapter_text(f"<p>a{ruby}b</p><p>c</p>".encode()) == "a\u6f22\u5b57b\n\nc"
    assert chapter_text(f"<p>a{ruby.removesuffix('</ruby>')}</p><p>c</p>".encode()) == "a\u6f22\u5b57\n\nc"


def test_other_encodings_of_chapters(tmp_path):
    latin = ONE.replace("utf-8", "iso-8859-1").replace("caf\u00e9", "\u00fcber").encode("iso-8859-1")
    utf16 = ONE.replace("utf-8", "utf-16").encode("utf-16")
    for content, word in ((latin, "\u00fcber"), (utf16, "caf\u00e9")):
        path = write(tmp_path / "book.epub", make_epub(**{"OEBPS/one.xhtml": content}))
        assert word in read_all(path)[1][1].decode("utf-8-sig")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"META-INF/container.xml": None, "a.txt": b"text"}, "is a damaged e-book (META-INF/container.xml"),
        ({"OEBPS/one.xhtml": None}, "is a damaged e-book (OEBPS/one.xhtml is missing)"),
        ({"OEBPS/content.opf": None}, "is a damaged e-book (OEBPS/content.opf"),
        ({"OEBPS/content.opf": PACKAGE[:200]}, "is a damaged e-book (OEBPS/content.opf"),
        ({"META-INF/container.xml": b"<container/>"}, "is a damaged e-book (its package"),
        ({"OEBPS/content.opf": PACKAGE.replace(b"itemref", b"other")}, "without text in its spine"),
        ({"OEBPS/content.opf": PACKAGE.replace(b'idref="one"', b'idref="eno"')}, "(its manifest lacks 'eno')"),
        ({"OEBPS/one.xhtml": b"<p>caf\xe9</p>"}, "book.epub/OEBPS/one.xhtml cannot be decoded as utf-8"),
        (
            {"META-INF/encryption.xml": b"<e><CipherReference URI='OEBPS/one.xhtml'/></e>"},
            "is copy-protected (OEBPS/one.xhtml is encrypted)",
        ),
    ],
)
def test_damaged_and_protected_e_books_are_refused(tmp_path, changes, words):
    assert words in problem(write(tmp_path / "book.epub", make_epub(**changes)))


# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "epub", *COMPRESSORS])
def test_random_damage_never_ends_in_a_traceback(tmp_path, kind):
    content = {
        "zip": lambda: make_zip(POEMS),
        "tar": lambda: make_tar(POEMS),
        "tar.gz": lambda: gzip.compress(make_tar(POEMS), mtime=0),
        "epub": make_epub,
    }.get(kind, lambda: COMPRESSORS[kind](TEXT[:2000]))()
    draw = random.Random(1)
    for _ in range(400):
        damaged = bytearray(content)
        for _ in range(draw.randrange(1, 6)):
            damaged[draw.randrange(min(len(damaged), 4000))] = draw.randrange(256)
        path = write(tmp_path / "a", bytes(damaged[: draw.choice([None, draw.randrange(len(damaged))])]))
        try:
            for member in read_members(path, is_wanted):
                list(member.chunks)
        except UserError as error:
            assert "\n" not in str(error)
