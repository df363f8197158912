#!/usr/bin/env bash
# datasets does not check the encoding of JSON Lines. A file in Latin-1 loads without an error, with the right number of
# rows and a column of strings, and is even written to Parquet. Only reading a row with an accent fails, possibly hours
# later, with an error that names neither the file nor the row. The Parquet file has a string column whose bytes are not
# UTF-8, which the format forbids.
#
# Remedy: column.validate(full=True) on the Arrow column checks UTF-8, and the encoding can be passed:
# load_dataset("json", ..., encoding="latin-1").
#
# Observed with datasets 5.2.0 and pyarrow 26.0.1 on Linux:
#   rows: 3, type: Value('string'), Parquet written: True
#   row 0: 'plain'
#   row 1: UnicodeDecodeError
#   row 2: 'last'
#   validate(full=True): ArrowInvalid
#   with encoding="latin-1", row 1: 'señor'
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1
cd "$folder"
export HF_HOME="$folder/home" HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
"$folder/venv/bin/python" - <<'PYTHON'
import json
import os
import sys

import datasets
import pyarrow

with open("rows.jsonl", "w", encoding="latin-1") as file:
    for text in ("plain", "señor", "last"):
        file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")

rows = datasets.load_dataset("json", data_files="rows.jsonl", split="train")
rows.to_parquet("rows.parquet")
print(f"datasets {datasets.__version__}, pyarrow {pyarrow.__version__}")
print(f"rows: {len(rows)}, type: {rows.features['text']}, Parquet written: {os.path.getsize('rows.parquet') > 0}")


def outcome(action):
    try:
        return repr(action())
    except (UnicodeDecodeError, pyarrow.ArrowInvalid) as error:
        return type(error).__name__


found = [outcome(lambda i=i: rows[i]["text"]) for i in range(3)]
for i, text in enumerate(found):
    print(f"row {i}: {text}")
found.append(outcome(lambda: rows.data.column("text").validate(full=True)))
print(f"validate(full=True): {found[-1]}")
right = datasets.load_dataset("json", data_files="rows.jsonl", split="train", encoding="latin-1")
found.append(outcome(lambda: right[1]["text"]))
print(f'with encoding="latin-1", row 1: {found[-1]}')
sys.exit(0 if found == ["'plain'", "UnicodeDecodeError", "'last'", "ArrowInvalid", "'señor'"] else "this has changed")
PYTHON
