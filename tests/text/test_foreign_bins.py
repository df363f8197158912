"""Token files without meta.json that are not raw uint16 are rejected with a command that converts them."""

import json
import os
import random
import re
import shlex
import sys
import unittest.mock

import numpy as np
import pytest
from helpers import ROOT, TINY_RUN, expect_sentence, generated_text, refusal, run, write_corpus

from dongpt.text.bins import open_data
from dongpt.text.foreign_bins import LLM_C_TYPES, TYPE_NAMES, find_problem, guess_type

RNG = np.random.default_rng(0)
SCALE = 50_000  # ids in most cases


def zipf(vocab_size: int) -> np.ndarray:
    """Ids whose frequency falls like that of words."""
    return np.minimum(RNG.zipf(1.3, SCALE), vocab_size) - 1


def char_ids() -> np.ndarray:
    text = generated_text(9000)
    return np.searchsorted(sorted(set(text)), list(text))


IDS = {
    "characters": char_ids(),
    "words": zipf(50257),
    "a small vocabulary": zipf(1000),
    "digits": RNG.integers(0, 10, SCALE),
    "bases": RNG.integers(0, 4, SCALE),
    "bits": RNG.integers(0, 2, SCALE),
    "rare events": (RNG.random(SCALE) < 0.02).astype(int),
    "uniform": RNG.integers(0, 50257, SCALE),
    "one id": np.full(SCALE, 262),
    "counting": np.arange(SCALE),
    "equations": np.stack([RNG.integers(0, 97, SCALE), np.full(SCALE, 97), RNG.integers(0, 97, SCALE)], 1).ravel(),
    "the issue's": np.array([1, 2, 3] * 99),
}


@pytest.mark.parametrize("name", IDS)
def test_uint16_ids_are_never_taken_for_something_else(tmp_path, name):
    path = str(tmp_path / "train.bin")
    for ids in (IDS[name], IDS[name][1:], IDS[name][: SCALE // 100], IDS[name][:7], IDS[name][:1]):
        ids.astype("<u2").tofile(path)
        assert find_problem(path) == ""


PAIRS = {  # uint16 ids in which every second one is 0 or small
    "rare flags": RNG.random(SCALE) < 0.01,
    "frequent flags": RNG.random(SCALE) < 0.5,
    "flags of single ids": np.isin(IDS["words"], [0, 2, 4, 8, 14]),
    "counts": np.minimum(RNG.geometric(0.5, SCALE), 15) - 1,
    "small counts": np.minimum(RNG.geometric(0.95, SCALE), 15) - 1,
    "speakers": np.arange(SCALE) // 100 % 2,
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("first", [False, True])
def test_pairs_of_an_id_and_a_small_number_are_uint16(tmp_path, name, first):
    for ids in (IDS["words"] % 30_000, IDS["characters"]):
        pairs = np.stack([ids, np.resize(PAIRS[name], len(ids))][:: -1 if first else 1], 1)
        pairs.astype("<u2").tofile(tmp_path / "train.bin")
        assert find_problem(str(tmp_path / "train.bin")) == ""


def test_all_values_of_uint16_may_occur(tmp_path):
    for ids in (RNG.integers(0, 65536, SCALE), np.arange(65536), np.zeros(SCALE), np.full(SCALE, 65535)):
        assert guess_type(ids.astype("<u2"))[0] == ""


def test_single_ids_beyond_the_vocabulary_are_not_another_byte_order():
    for ids in (np.zeros(SCALE, "<u2"), IDS["characters"].astype("<u2"), IDS["words"].astype("<u2")):
        ids = ids.copy()
        ids[[100, len(ids) // 2]] = 60_000
        assert guess_type(ids)[0] == ""


def test_ids_of_real_texts_in_gpt2s_tokens(tmp_path, don_quixote, gpt2_vocabulary):
    import tiktoken

    with open(don_quixote, encoding="utf-8") as file:
        book = file.read(300_000)
    with open(np.lib.__file__, encoding="utf-8") as file:
        code = file.read()
    for text in (book, code * 9, "\n".join("0123456789") * 999, "道可道，非常道。名可名，非常名。" * 500, "a\n" * 5000):
        np.array(tiktoken.get_encoding("gpt2").encode_ordinary(text), "<u2").tofile(tmp_path / "train.bin")
        assert find_problem(str(tmp_path / "train.bin")) == ""


def convert(path) -> list[int]:
    """Run the command that find_problem() gives, and return the ids in the new file. path itself doesn't change."""
    with open(path, "rb") as file:
        before = file.read()
    command = find_problem(str(path)).partition("run ")[2].rpartition(" and replace")[0]
    python, option, code, argument = shlex.split(command)
    assert (python, option, argument) == ("python", "-c", str(path)) and not {*code} & {*"$`\\!"}
    with unittest.mock.patch.object(sys, "argv", [option, argument]):
        exec(code, {})
    with open(path, "rb") as file:
        assert file.read() == before
    assert find_problem(f"{path}.new") == ""
    return np.fromfile(f"{path}.new", "<u2").tolist()


def holds(dtype: str, ids: np.ndarray) -> bool:
    return dtype[1:] != "f2" or ids.max() <= 2048  # larger whole numbers are rounded


CASES = [
    (dtype, name)
    for name in IDS
    for dtype in TYPE_NAMES
    if dtype not in ("u1", "<i4", ">i4") and holds(dtype, IDS[name])
]


@pytest.mark.parametrize("dtype, name", CASES)
def test_other_types_are_recognised_and_the_command_converts_them(tmp_path, dtype, name):
    if (dtype, name) == (">u2", "one id"):
        pytest.skip("a single id looks the same in both byte orders")
    IDS[name].astype(dtype).tofile(path := str(tmp_path / "train.bin"))
    assert f"seems to hold {TYPE_NAMES[dtype]} ids instead of uint16" in find_problem(path)
    assert convert(path) == IDS[name].tolist()


@pytest.mark.parametrize("name", ["characters", "bases"])
def test_uint8_ids_are_recognised(tmp_path, name):
    IDS[name].astype("u1").tofile(tmp_path / "train.bin")
    assert "seems to hold uint8 ids" in find_problem(str(tmp_path / "train.bin"))


@pytest.mark.parametrize("dtype", ["<u4", "<i8"])
def test_a_vocabulary_too_large_for_uint16_is_not_converted(tmp_path, dtype):
    ids = np.concatenate([zipf(50257), RNG.integers(50257, 128_256, SCALE // 5)])
    RNG.shuffle(ids)
    ids.astype(dtype).tofile(tmp_path / "train.bin")
    problem = find_problem(str(tmp_path / "train.bin"))
    assert f"seems to hold {TYPE_NAMES[dtype]} ids" in problem and "at most 65,536 different tokens" in problem
    assert "np." not in problem


@pytest.mark.parametrize("dtype", ["<u4", "<i8", ">u4", ">i8"])
@pytest.mark.parametrize("special_ids", [(100_257,), (151_644, 151_645, 151_643)], ids=str)
def test_special_ids_may_be_the_only_large_ones(tmp_path, dtype, special_ids):
    for text in (np.arange(80_000) % 20_000, 1 + IDS["words"] % 30_000):
        for spacing in (12, 150, 200, 333, 999, 1000, 20_000):
            ids = text.copy()
            ids[::spacing] = np.resize(special_ids, len(ids[::spacing]))
            ids.astype(dtype).tofile(tmp_path / "train.bin")
            problem = find_problem(str(tmp_path / "train.bin"))
            assert f"seems to hold {TYPE_NAMES[dtype]} ids" in problem and "at most 65,536 different tokens" in problem


@pytest.mark.parametrize("dtype", ["<i8", ">i8"])
def test_two_of_four_columns_of_zeros_are_int64_whatever_the_ids(tmp_path, dtype):
    for ids in (np.arange(SCALE) % 9, IDS["characters"], np.full(SCALE, 7)):
        ids = ids.copy()
        ids[::3] = 128_009
        ids.astype(dtype).tofile(tmp_path / "train.bin")
        assert f"seems to hold {TYPE_NAMES[dtype]} ids" in find_problem(str(tmp_path / "train.bin"))


def write_llm_c(path, ids: np.ndarray, magic: int, n_ids: int | None = None):
    """A file with llm.c's header of 256 int32."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, 1, len(ids) if n_ids is None else n_ids
    path.write_bytes(header.tobytes() + ids.astype(LLM_C_TYPES[magic]).tobytes())


@pytest.mark.parametrize("magic", LLM_C_TYPES)
def test_llm_cs_header(tmp_path, magic):
    path = tmp_path / "train.bin"
    write_llm_c(path, IDS["words"], magic)
    assert "a header of 1,024 bytes (it is llm.c's header)" in find_problem(str(path))
    assert convert(path) == IDS["words"].tolist()
    write_llm_c(path, IDS["words"], magic, n_ids=SCALE + 1)
    assert "(it is llm.c's header for a file of" in find_problem(str(path)) and "copy it again" in find_problem(
        str(path)
    )


def test_ids_too_large_for_uint16_are_not_converted(tmp_path):
    path = tmp_path / "train.bin"
    ids = np.append(IDS["words"], 128_000)
    write_llm_c(path, ids[::-1], 20240801)
    assert "(it is llm.c's header): tokenize its text again with at most 65,536 different" in find_problem(str(path))
    write_llm_c(path, ids, 20240801)  # too far from the start
    with pytest.raises(SystemExit, match="has ids from 0 to 128000: tokenize its text again"):
        convert(path)
    np.save(tmp_path / "ids.npy", ids)
    os.replace(tmp_path / "ids.npy", path)
    with pytest.raises(SystemExit, match="has ids from 0 to 128000: tokenize its text again"):
        convert(path)
    assert not os.path.exists(f"{path}.new")


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize(
    "header",
    [
        np.array([SCALE], "<u8"),
        np.array([SCALE], "<u4"),
        np.array([1, 4, SCALE, 0], "<i8"),
        np.array([777, 1, SCALE] + [0] * 253, "<i4"),
        np.array([777, 1] + [0] * 254, "<i4"),
    ],
    ids=lambda header: f"{header.nbytes} bytes",
)
def test_other_headers(tmp_path, header, dtype):
    path = tmp_path / "train.bin"
    path.write_bytes(header.tobytes() + IDS["words"].astype(dtype).tobytes())
    assert f"seems to start with a header of {header.nbytes:,} bytes" in find_problem(str(path))
    assert convert(path) == IDS["words"].tolist()


@pytest.mark.parametrize("dtype", ["<i4", "<i8", ">i4", ">i8"])
@pytest.mark.parametrize("padding", [-1, -100])
def test_negative_numbers_for_padding(tmp_path, dtype, padding):
    np.where(RNG.random(SCALE) < 0.1, padding, IDS["words"]).astype(dtype).tofile(tmp_path / "train.bin")
    problem = find_problem(str(tmp_path / "train.bin"))
    assert f"seems to hold {TYPE_NAMES[dtype]} ids instead of uint16 (some values are {padding})" in problem


@pytest.mark.parametrize("types", [("<u2", "<u4"), ("<u4", "<u2"), ("<i8", "<u2")])
def test_files_joined_from_different_types(tmp_path, types):
    (tmp_path / "train.bin").write_bytes(b"".join(IDS["words"].astype(dtype).tobytes() for dtype in types))
    other = TYPE_NAMES[next(dtype for dtype in types if dtype != "<u2")]
    assert f"seem to hold {other} ids, and other parts uint16 ids: write all ids as" in find_problem(
        str(tmp_path / "train.bin")
    )


@pytest.mark.parametrize("dtype", ["<u4", "<i8", ">u4", "<f4"])
def test_short_files(tmp_path, dtype):
    for n in (4, 9, 15):
        np.arange(1, 1 + n).astype(dtype).tofile(tmp_path / "train.bin")
        assert f"seems to hold {TYPE_NAMES[dtype]} ids" in find_problem(str(tmp_path / "train.bin"))


def test_large_ids_of_other_distributions(tmp_path):
    for ids in (RNG.integers(0, 256_000, SCALE), RNG.permutation(151_936)[np.minimum(RNG.zipf(1.3, 300), 151_935)]):
        ids.astype("<u4").tofile(tmp_path / "train.bin")
        assert "seems to hold uint32 ids" in find_problem(str(tmp_path / "train.bin"))


def test_ids_whose_bytes_look_like_something_else(tmp_path):
    for i in (30_000, 8481, 0x3C00):  # whole numbers in float16, and letters
        np.full(SCALE, i).astype("<u2").tofile(tmp_path / "train.bin")
        assert find_problem(str(tmp_path / "train.bin")) == "" or i == 0x3C00


def test_numpys_header(tmp_path):
    for ids in (IDS["words"], IDS["words"].astype(np.uint16), IDS["digits"].reshape(-1, 10)):
        np.save(tmp_path / "ids.npy", ids)
        os.replace(tmp_path / "ids.npy", tmp_path / "train.bin")
        assert "is a NumPy file" in find_problem(str(tmp_path / "train.bin"))
        assert convert(tmp_path / "train.bin") == ids.ravel().tolist()


def test_files_of_another_kind(tmp_path):
    import gzip
    import pickle
    import zipfile

    path = tmp_path / "train.bin"
    text = generated_text(3000)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", text)
    assert ".zip" in find_problem(str(path))
    path.write_bytes(gzip.compress(text.encode()))
    assert ".gz" in find_problem(str(path))
    for content in (text, "señor ñandú " * 500, "道可道，非常道。" * 500, "{'a': 1}\n" * 9, text[:40]):
        path.write_text(content, encoding="utf-8")
        assert "is text, not token ids: prepare it with python data/prepare.py" in find_problem(str(path))
    path.write_bytes(pickle.dumps(["a"] * 99, protocol=4))
    assert isinstance(find_problem(str(path)), str)  # no error, whatever it says


def test_any_bytes_are_looked_at_without_an_error(tmp_path):
    rng = random.Random(0)
    for size in [*range(1, 70), 4095, 4096, 4097, 65_537]:
        (tmp_path / "train.bin").write_bytes(rng.randbytes(size))
        problem = find_problem(str(tmp_path / "train.bin"))
        assert not problem or problem.startswith(str(tmp_path / "train.bin"))


def test_commands_quote_paths_for_the_shell(tmp_path):
    folder = tmp_path / 'it\'s "my" `folder` of $HOME'
    folder.mkdir()
    IDS["words"].astype("<u4").tofile(folder / "train.bin")
    assert convert(folder / "train.bin") == IDS["words"].tolist()
    (folder / "train.bin").write_text("plain text " * 99, encoding="utf-8")
    command = find_problem(str(folder / "train.bin")).partition("prepare it with ")[2]
    assert shlex.split(command)[-1] == f"--input={folder}/train.bin"


def test_a_large_file_is_only_sampled(tmp_path, monkeypatch):
    path = tmp_path / "train.bin"
    with open(path, "wb") as file:
        file.write(IDS["words"].astype("<u2").tobytes())
        file.truncate(2**36)  # sparse: 64 GB that take no space
    assert find_problem(str(path)) == ""


# ----------------------------------------------------------------------------------------------------------------------
# every program sees it


@pytest.fixture
def folder(tmp_path) -> str:
    """The folder of the issue: uint32 ids without meta.json."""
    for split in ("train", "val"):
        np.array([1, 2, 3] * 99, dtype=np.uint32).tofile(tmp_path / f"{split}.bin")
    return str(tmp_path)


def test_training_and_check_refuse_uint32_ids_and_take_them_when_converted(folder, tmp_path):
    data = f"--data_dir={folder}"
    for program, args in (("train.py", TINY_RUN), ("data/check.py", ())):
        done = run(program, data, *args, cwd=tmp_path, check=2)
        expect_sentence(done, "train.bin seems to hold uint32 ids instead of uint16", "python -c")
    for split in ("train", "val"):
        convert(path := os.path.join(folder, f"{split}.bin"))
        os.replace(f"{path}.new", path)
    run("data/check.py", data, cwd=tmp_path)
    run("train.py", data, *TINY_RUN, cwd=tmp_path)


def test_only_val_and_shards_are_looked_at_too(folder, tmp_path):
    ids = np.array([1, 2, 3] * 99, dtype="<u2")
    ids.tofile(tmp_path / "train.bin")
    refusal(lambda: open_data(folder), "val.bin seems to hold uint32 ids")
    ids.tofile(tmp_path / "val.bin")
    os.rename(tmp_path / "train.bin", tmp_path / "train_000.bin")
    assert len(open_data(folder)[1]["train"]) == 297
    ids.astype("<u4").tofile(tmp_path / "train_001.bin")
    refusal(lambda: open_data(folder), "train_001.bin seems to hold uint32 ids")


def test_a_text_whose_every_second_character_is_a_line_end_is_trusted_with_its_meta_json(tmp_path):
    folder = write_corpus(str(tmp_path / "data"), "".join(f"{i % 10}\n" for i in range(2000)))
    ids = open_data(folder)[1]["train"][:]
    assert (ids[1::2] == 0).all() and guess_type(ids)[0] == "<u4"


def test_the_meta_json_in_the_documentation_declares_uint16_ids(tmp_path):
    with open(os.path.join(ROOT, "docs", "formats.md"), encoding="utf-8") as file:
        (meta,) = re.findall(r'^`(\{"tokenizer".*\})`', file.read(), re.MULTILINE)
    for split, n_tokens in json.loads(meta)["tokens"].items():
        np.array([5, 0] * (n_tokens // 2), "<u2").tofile(path := tmp_path / f"{split}.bin")
        assert "if its ids are uint16, declare them in a meta.json (see docs/formats.md)" in find_problem(str(path))
    (tmp_path / "meta.json").write_text(meta, encoding="utf-8")
    assert set(open_data(str(tmp_path))[1]["train"][:].tolist()) == {0, 5}
