#!/usr/bin/env bash
# The .xz format allows padding between two streams: zero bytes, a multiple of four (section 2.2 of its specification).
# The program xz reads such a file to its end. Python's lzma.open takes the padding for garbage after the last stream,
# ignores everything that follows it, and reports nothing. pandas, fsspec and datasets, which open .xz files with it,
# return the first part of the text as if it were all.
#
# Remedy: decompress stream by stream with lzma.LZMADecompressor, and skip zeros before the next one.
#
# Observed with Python 3.11.7, pandas 3.1.1, fsspec 2026.9.0 and datasets 5.2.0 on Linux:
#   stream by stream: one two three
#   lzma.open: one
#   pandas: one
#   fsspec: one
#   datasets: one
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check datasets==5.2.0 pandas==3.1.1 fsspec==2026.9.0
cd "$folder"
export HF_HOME="$folder/hf" HF_HUB_OFFLINE=1
"$folder/venv/bin/python" - <<'PYTHON'
import lzma
import sys

import datasets
import fsspec
import pandas

with open("padded.csv.xz", "wb") as file:
    file.write(lzma.compress(b"text\none\n") + bytes(4) + lzma.compress(b"two\nthree\n"))


def read_streams(path):
    content, text = open(path, "rb").read(), b""
    while content := content.lstrip(b"\0"):
        decompressor = lzma.LZMADecompressor()
        text += decompressor.decompress(content)
        content = decompressor.unused_data
    return text.decode().split()[1:]


datasets.disable_progress_bars()
found = {"stream by stream": read_streams("padded.csv.xz")}
with lzma.open("padded.csv.xz", "rt") as file:
    found["lzma.open"] = file.read().split()[1:]
found["pandas"] = pandas.read_csv("padded.csv.xz")["text"].tolist()
with fsspec.open("padded.csv.xz", "rt", compression="xz") as file:
    found["fsspec"] = file.read().split()[1:]
found["datasets"] = datasets.load_dataset("csv", data_files="padded.csv.xz", split="train")["text"][:]
print(f"Python {sys.version.split()[0]}, pandas {pandas.__version__}, fsspec {fsspec.__version__}, ", end="")
print(f"datasets {datasets.__version__}")
for name, words in found.items():
    print(f"{name}: {' '.join(words)}")
expected = [["one", "two", "three"]] + 4 * [["one"]]
sys.exit(0 if list(found.values()) == expected else "this has changed")
PYTHON
