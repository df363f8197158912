"""Detect token files that are not raw uint16: ids of another width or byte order, headers, and other file formats.

train.bin has no header, as in nanoGPT, so a file of uint32 ids can be read as uint16 without an error. Where no
meta.json gives the number of tokens, the start of a file and samples of SAMPLE_BYTES decide.

In text, the ids at even and at odd positions look alike. In uint32 ids read as uint16 one position is always 0, and in
floats the exponents fall in a narrow range. A single test must hold for all samples, with MIN_IDS other than 0.
"""

import os

import numpy as np

SAMPLE_BYTES = 4096
NUM_SAMPLES = 16  # evenly spaced in the file
MIN_IDS = 16  # other than 0: fewer may be chance
GPT2_VOCAB_SIZE = 50304  # padded, as in nanoGPT
LARGE_VOCAB_SIZE = 2**20
HEADER_BYTES = 1024  # of llm.c: 256 int32, of which the first three are magic number, version and number of tokens
LLM_C_TYPES = {20240520: "<u2", 20240801: "<u4"}  # by magic number: GPT-2's and Llama 3's tokens
MAGIC = {
    b"PK\x03\x04": "a .zip or .npz archive",
    b"\x1f\x8b\x08": "a .gz archive",
    b"BZh": "a .bz2 archive",
    b"\xfd7zXZ\0": "an .xz archive",
    b"\x28\xb5\x2f\xfd": "a .zst archive",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\x89HDF": "an HDF5 file",
    b"%PDF": "a PDF",
    b"LITPKDS": "a packed dataset of litgpt",
    b"MMIDIDX": "an index of Megatron-LM",
    b"\x80\x02\x8a\x0a": "a pickle",
}
TYPE_NAMES = {"u1": "uint8", "<u4": "uint32", "<i8": "int64", ">u2": "big-endian uint16", ">u4": "big-endian uint32"}
TYPE_NAMES |= {">i8": "big-endian int64", "<f2": "float16", "<f4": "float32", "<f8": "float64"}


def find_problem(path: str) -> str:
    """Return a sentence on why a token file is not raw uint16, with a command that converts it, or "" if it may be."""
    with open(path, "rb") as file:
        head, size = file.read(SAMPLE_BYTES), os.path.getsize(path)
        if kind := next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), ""):
            return f"{path} is {kind}, not token ids: unpack or convert it to uint16 ids without a header"
        if head.startswith(b"\x93NUMPY"):
            return f"{path} is a NumPy file (.npy): drop its header with {_command(path, f'np.load({path!r})')}"
        header = np.frombuffer(head[: len(head) // 4 * 4], "<i4")[:3].tolist()
        if header and header[0] in LLM_C_TYPES:
            return _describe_llm_c(path, size, header, LLM_C_TYPES[header[0]])
        if _is_text(head):
            return f"{path} is a text, not token ids: prepare it with python data/prepare.py --input={path}"
        positions = np.linspace(0, max(0, size - SAMPLE_BYTES), NUM_SAMPLES).astype(np.int64) // 8 * 8
        samples = b"".join(_read_at(file, start) for start in dict.fromkeys(positions.tolist()))
    dtype, largest, reason = guess_type(np.frombuffer(samples, "<u2"))
    if not dtype:
        return ""
    problem = f"{path} holds {TYPE_NAMES[dtype]} ids instead of uint16 ({reason})"
    if largest >= 2**16:
        return f"{problem}, up to {largest:,}: tokenize its text again with a vocabulary of at most 65,536, as uint16"
    return f"{problem}: convert it with {_command(path, f'np.fromfile({path!r}, {dtype!r})')}"


def _read_at(file, start: int) -> bytes:
    """Return a sample that begins at start, in whole 8-byte units."""
    file.seek(start)
    sample = file.read(SAMPLE_BYTES)
    return sample[: len(sample) // 8 * 8]


def _command(path: str, array: str) -> str:
    """Return the command that writes a NumPy array to path as uint16."""
    return f"python -c \"import numpy as np; {array}.astype('<u2').tofile({path!r})\""


def _describe_llm_c(path: str, size: int, header: list[int], dtype: str) -> str:
    """Return what is wrong with a file that has an llm.c header."""
    expected = HEADER_BYTES + header[2] * np.dtype(dtype).itemsize if len(header) == 3 else 0
    problem = f"{path} has the header of llm.c"
    if size != expected:
        return f"{problem} and is damaged ({size:,} bytes, where the header says {expected:,}): copy it again"
    array = f"np.fromfile({path!r}, {dtype!r}, offset={HEADER_BYTES})"
    return f"{problem}: drop it with {_command(path, array)}" + (
        ", if all ids are below 65,536" if dtype == "<u4" else ""
    )


def _is_text(head: bytes) -> bool:
    """Return True if the start of a file is UTF-8 text without control characters, which occur in any uint16 ids."""
    try:
        text = head[: len(head) - 3].decode("utf-8") if len(head) == SAMPLE_BYTES else head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.end < len(head) - 6:
            return False
        text = head[: error.start].decode("utf-8")
    return len(text) >= 2 * MIN_IDS and not any(char < " " and char not in "\t\n\r\f" for char in text)


def guess_type(ids: np.ndarray) -> tuple[str, int, str]:
    """Return (NumPy type, largest id, reason) for data (n,) that are not uint16, or ("", 0, "") if they may be.

    >>> guess_type(np.tile(np.arange(1, 99, dtype="<u4"), 9).view("<u2"))
    ('<u4', 98, 'every second uint16 is 0')
    """
    ids = ids[: len(ids) // 4 * 4]
    if np.count_nonzero(ids) < MIN_IDS:
        return "", 0, ""
    for dtype in ("<f8", "<f4", "<f2"):
        if is_integral(values := ids.view(dtype)):
            return dtype, int(values.max()), "all numbers are whole"
    columns = ids.reshape(-1, 4)
    for dtype, low, high in (
        ("<i8", [0], [1, 2, 3]),
        (">i8", [3], [0, 1, 2]),
        ("<u4", [0, 2], [1, 3]),
        (">u4", [1, 3], [0, 2]),
    ):
        if not columns[:, high].any() and np.count_nonzero(columns[:, low]) >= MIN_IDS:
            reason = "every second uint16 is 0" if len(low) == 2 else "three of four uint16 are 0"
            return dtype, int(ids.view(dtype).max()), reason
    for dtype in ("<i8", "<u4"):  # with some ids of 65,536 and above
        if is_large_vocabulary(values := ids.view(dtype)):
            return dtype, int(values.max()), "every second uint16 is 0 or nearly 0"
    swapped = ids.byteswap()
    n_beyond = np.count_nonzero(ids >= GPT2_VOCAB_SIZE)  # a few are wrong ids, not another byte order
    if not (ids & 255).any() or n_beyond > max(MIN_IDS, 0.01 * len(ids)) and swapped.max() < GPT2_VOCAB_SIZE:
        return ">u2", int(swapped.max()), "its bytes are swapped"
    if is_bytes(ids.view("u1")):
        return "u1", int(ids.view("u1").max()), "even and odd bytes are alike"
    return "", 0, ""


def is_integral(values: np.ndarray) -> bool:
    """Return True if all floats are whole numbers that can be ids, and at least MIN_IDS of them are not 0."""
    with np.errstate(invalid="ignore"):
        values = values.astype(np.float64)
        is_id = (values >= 0) & (values < LARGE_VOCAB_SIZE) & (values % 1 == 0)
    return bool(is_id.all() and np.count_nonzero(values) >= MIN_IDS)


def is_large_vocabulary(values: np.ndarray) -> bool:
    """Return True if integers can be ids above uint16: most of them small, few of them 0, many of them distinct.

    In uint16 ids of text the upper halves of these integers would be ids like any other.
    """
    is_small = (values >= 0) & (values < LARGE_VOCAB_SIZE)
    few_zeros = np.count_nonzero(values & 0xFFFF) > 0.75 * len(values)
    mostly_uint16 = np.count_nonzero(values < 2**16) > 0.5 * len(values)
    return bool(is_small.all() and few_zeros and mostly_uint16 and len(np.unique(values)) >= 256)


def is_bytes(values: np.ndarray) -> bool:
    """Return True if each id is a byte. In uint16 ids, the upper bytes have another distribution than the lower."""
    counts = [np.bincount(values[i::2], minlength=256) for i in (0, 1)]
    n_distinct = [np.count_nonzero(count) for count in counts]
    distance = np.abs(counts[0] - counts[1]).sum() / len(values)  # between the distributions, 0 to 1
    return bool(len(values) >= 2**12 and min(n_distinct) > 1 and max(n_distinct) <= 200 and distance < 0.1)
