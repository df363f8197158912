"""Detect token files that are not raw uint16: ids of another width or byte order, headers, and other file formats.

train.bin has no header, as in nanoGPT, so a file of uint32 ids can be read as uint16 without an error. If no meta.json
gives the number of tokens, the start of the file and some samples are examined. The ids of a text look alike at even
and odd positions. When uint32 ids are read as uint16, every second value is 0, and in floats, the exponents fall in a
narrow range. Since uint16 ids of other data can look like this, too, the messages also say how to declare them.
"""

import codecs
import contextlib
import os
import re
import shlex

import numpy as np

SAMPLE_BYTES = 4096
NUM_SAMPLES = 16  # evenly spaced in the file
MIN_IDS = 16  # other than 0: fewer may be chance, except in a file that has no more
MIN_ALL_IDS = 4  # in a file without the id 0
GPT2_VOCAB_SIZE = 50304  # padded, as in nanoGPT
LARGE_VOCAB_SIZE = 2**20
LLM_C_BYTES = 1024  # of llm.c's header: 256 int32, of which the first three are magic number, version and token count
LLM_C_TYPES = {20240520: "<u2", 20240801: "<u4"}  # by magic number: GPT-2's and Llama 3's tokens
HEADER_BYTES = (4, 8, 12, 16, 24, 32, 64, 128, 256, 512, LLM_C_BYTES, SAMPLE_BYTES)  # lengths of other headers
HEADER_NUMBERS = 6  # int32 at the start of a header, of which one may be the token count
MAX_SPECIAL_IDS, MAX_SPECIAL_SHARE = 8, 0.1  # of ids from 65,536, where all others are smaller
MIN_COUNTED_IDS = 1000  # smaller counts may be ids
ARCHIVES = {b"PK\3\4": "zip", b"\x1f\x8b\x08": "gz", b"BZh": "bz2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zst"}
MAGIC = {magic: f"a .{suffix} archive" for magic, suffix in ARCHIVES.items()}
MAGIC |= {b"PAR1": "a Parquet file", b"ARROW1": "an Arrow file", b"\x89HDF": "an HDF5 file", b"%PDF": "a PDF"}
MAGIC |= {b"LITPKDS": "a packed dataset of litgpt", b"MMIDIDX": "a Megatron-LM index"}
MAGIC |= dict.fromkeys((b"\x80\x02\x8a\x0a", b"\x80\x04\x95", b"\x80\x05\x95"), "a pickle")
TYPE_NAMES = {"u1": "uint8", "<u4": "uint32", "<i8": "int64", ">u2": "big-endian uint16", ">u4": "big-endian uint32"}
TYPE_NAMES |= {">i8": "big-endian int64", "<f2": "float16", "<f4": "float32", "<f8": "float64", "<i4": "int32"}
TYPE_NAMES |= {">i4": "big-endian int32"}
# positions in each group of four uint16 values: those that hold the ids, and those that are always 0
COLUMNS = {"<i8": ([0], [1, 2, 3]), ">i8": ([3], [0, 1, 2]), "<u4": ([0, 2], [1, 3]), ">u4": ([1, 3], [0, 2])}
CONTROL_CHARACTERS = re.compile(rb"[\x00-\x08\x0b\x0e-\x1f]")
TOKENIZE_AGAIN = "tokenize its text again with at most 65,536 different tokens, and save the ids as uint16"
IF_UINT16 = "; if its ids are uint16, declare them in a meta.json (see docs/formats.md)"


def find_problem(path: str) -> str:
    """Return a sentence that says why a token file is not raw uint16 and what to do about it, or "" if it may be."""
    with open(path, "rb") as file:
        head, size = file.read(SAMPLE_BYTES), os.path.getsize(path)
    if kind := next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), ""):
        return f"{path} is {kind}, not token ids: unpack or convert it to uint16 ids without a header"
    if head.startswith(b"\x93NUMPY"):
        return f"{path} is a NumPy file (.npy): {_how_to_convert(path, 'np.load(path)')}"
    if _is_text(head):
        return f"{path} is text, not token ids: prepare it with python data/prepare.py --input={shlex.quote(path)}"
    header_bytes, dtype, reason = find_header(head, size)
    if header_bytes:
        remedy = _how_to_convert(path, f"np.fromfile(path, {dtype!r}, offset={header_bytes})") + IF_UINT16
        if dtype and max(np.fromfile(path, dtype, SAMPLE_BYTES, offset=header_bytes), default=0) >= 2**16:
            remedy = TOKENIZE_AGAIN
        problem = f"{path} seems to start with a header of {header_bytes:,} bytes ({reason})"
        return f"{problem}: {remedy if dtype else 'copy it again'}"
    positions = np.linspace(0, max(0, size - SAMPLE_BYTES), NUM_SAMPLES).astype(np.int64) // 8 * 8
    samples = [np.fromfile(path, "<u2", SAMPLE_BYTES // 2, offset=start) for start in dict.fromkeys(positions.tolist())]
    sample = np.concatenate(samples)
    sample = sample[: len(sample) // 4 * 4]
    dtype, reason = guess_type(sample)
    if not dtype:
        other_types = [dtype for dtype, _ in map(guess_type, samples) if dtype in COLUMNS]
        if len(other_types) < 2:
            return ""
        problem = f"parts of {path} seem to hold {TYPE_NAMES[other_types[0]]} ids, and other parts uint16 ids"
        return f"{problem}: write all ids as uint16{IF_UINT16}"
    problem, values = f"{path} seems to hold {TYPE_NAMES[dtype]} ids instead of uint16 ({reason})", sample.view(dtype)
    if values.min() < 0:
        return f"{problem}: save it as uint16 without the negative numbers, which are not ids"
    if (largest := int(values.max())) >= 2**16:
        return f"{problem}, up to {largest:,}: {TOKENIZE_AGAIN}{IF_UINT16}"
    return f"{problem}: {_how_to_convert(path, f'np.fromfile(path, {dtype!r})')}{IF_UINT16}"


def _how_to_convert(path: str, array: str) -> str:
    """Return a command that writes a NumPy array as uint16 next to path, without overwriting it."""
    code = f"import sys, numpy as np; path = sys.argv[1]; ids = {array}; low, high = int(ids.min()), int(ids.max())"
    code += f"; 0 <= low <= high < 65536 or sys.exit(f'{{path}} has ids from {{low}} to {{high}}: {TOKENIZE_AGAIN}')"
    code += "; ids.astype('<u2').tofile(path + '.new')"
    return f'run python -c "{code}" {shlex.quote(path)} and replace it with {path}.new'


def find_header(head: bytes, size: int) -> tuple[int, str, str]:
    """Return (length of the header or 0, NumPy type of the ids after it or "" if the file is damaged, reason)."""
    numbers = np.frombuffer(head[: len(head) // 4 * 4], "<u4")
    dtype = LLM_C_TYPES.get(int(numbers[0]), "") if len(numbers) >= 3 else ""
    if dtype:
        expected = LLM_C_BYTES + int(numbers[2]) * np.dtype(dtype).itemsize
        if size != expected:
            return LLM_C_BYTES, "", f"it is llm.c's header for a file of {expected:,} bytes instead of {size:,}"
        return LLM_C_BYTES, dtype, "it is llm.c's header"
    for n_bytes in HEADER_BYTES:
        for dtype in ("<u2", "<u4"):
            count, rest = divmod(size - n_bytes, np.dtype(dtype).itemsize)
            if not rest and count >= MIN_COUNTED_IDS and count in numbers[: min(n_bytes // 4, HEADER_NUMBERS)]:
                return n_bytes, dtype, f"it contains {count:,}, the number of ids after it"
    ids, others = np.split(np.frombuffer(head[: len(head) // 8 * 8], "<u2"), [LLM_C_BYTES // 2])
    if len(others) and ids[0] and np.count_nonzero(ids) <= MIN_IDS and np.count_nonzero(others) > 0.2 * len(others):
        return LLM_C_BYTES, guess_type(others)[0] or "<u2", "nearly all of its bytes are 0"
    return 0, "", ""


def _is_text(head: bytes) -> bool:
    """Return True if the start of a file is UTF-8 text without control characters, which uint16 ids always contain."""
    with contextlib.suppress(UnicodeDecodeError):
        codecs.utf_8_decode(head, "strict", False)
        return len(head) >= 2 * MIN_IDS and len(set(head)) >= 6 and not CONTROL_CHARACTERS.search(head)
    return False


def guess_type(ids: np.ndarray) -> tuple[str, str]:
    """Return (NumPy type, reason) for ids (n,) that do not look like uint16, or ("", "") for ids that do.

    >>> guess_type(np.tile(np.arange(1, 99, dtype="<u4"), 9).view("<u2"))
    ('<u4', 'every second uint16 is 0')
    """
    ids = ids[: len(ids) // 4 * 4]
    for dtype in ("<f8", "<f4", "<f2"):
        if is_integral(ids.view(dtype)):
            return dtype, "all values are whole numbers"
    columns = ids.reshape(-1, 4)
    for dtype, (used, zero) in COLUMNS.items():
        if not columns[:, zero].any() and is_enough(columns[:, used]):
            return dtype, "every second uint16 is 0" if len(zero) == 2 else "three out of every four uint16 are 0"
    if np.count_nonzero(ids) < MIN_IDS:
        return "", ""
    for dtype in ("<i8", ">i8", "<i4", ">i4"):
        values = ids.view(dtype)
        lower, is_id = values & 0xFFFF, (values >= 0) & (values < LARGE_VOCAB_SIZE)
        is_padding = (values == -100) | (values == -1)  # as PyTorch and Hugging Face mark it
        if is_padding.any() and (is_id | is_padding).all() and is_enough(values[is_id]):
            return dtype, f"some values are {values.min()}"
        if dtype in COLUMNS and is_id.all() and is_enough(lower):
            return dtype, "two out of every four uint16 are 0"
        # with ids of 65,536 and above; in uint16 ids of text, the upper halves would be ids like any other
        large, is_varied = values[values >= 2**16], np.mean(lower > 0) > 0.75 and len(set(values)) >= 64
        is_special = len(large) <= MAX_SPECIAL_SHARE * len(values) and len(set(large)) <= MAX_SPECIAL_IDS
        # in pairs of an id and a flag, the ids with a flag are frequent without one, too
        is_special = is_special and np.isin(values, large & 0xFFFF).sum() <= len(large) + MIN_IDS
        if is_id.all() and is_varied and (is_special or np.mean(lower >= 2**15) > 0.01):
            return dtype.replace("i4", "u4"), "every second uint16 is 0 or nearly 0"
    n_beyond = np.count_nonzero(ids >= GPT2_VOCAB_SIZE)  # a few are wrong ids, not another byte order
    many_beyond = n_beyond > max(MIN_IDS, 0.01 * len(ids)) and ids.byteswap().max() < GPT2_VOCAB_SIZE
    if many_beyond or not (ids & 255).any():
        return ">u2", "its bytes are swapped"
    if is_bytes(ids.view("u1")):
        return "u1", "even and odd bytes are alike"
    return "", ""


def is_enough(values: np.ndarray) -> bool:
    """Return True if there are enough ids other than 0 to rule out chance."""
    n_ids = int(np.count_nonzero(values))
    return n_ids >= MIN_IDS or n_ids == values.size >= MIN_ALL_IDS


def is_integral(values: np.ndarray) -> bool:
    """Return True if all floats are valid ids and there are enough of them. Every float16 above 1,024 is an integer."""
    is_float16 = values.dtype.itemsize == 2
    with np.errstate(invalid="ignore"):
        values = values.astype(np.float64)
        is_id = (values >= 0) & (values < LARGE_VOCAB_SIZE) & (values % 1 == 0)
    return bool(is_id.all() and is_enough(values[values < 1024] if is_float16 else values))


def is_bytes(values: np.ndarray) -> bool:
    """Return True if every id is a byte. In uint16 ids, the upper and lower bytes have different distributions."""
    counts = [np.bincount(values[i::2], minlength=256) for i in (0, 1)]
    n_distinct = [np.count_nonzero(count) for count in counts]
    distance = np.abs(counts[0] - counts[1]).sum() / len(values)  # between the distributions, 0 to 1
    return bool(len(values) >= 2**12 and min(n_distinct) > 1 and max(n_distinct) <= 200 and distance < 0.1)
