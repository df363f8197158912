#!/usr/bin/env bash
# A Parquet file with a list column, such as the `messages` of a chat data set, that goes through pandas into CSV loses
# its content without a warning: read_parquet returns the lists as NumPy arrays, and to_csv writes what NumPy prints.
# There are no commas between the messages, so neither JSON nor Python reads the cell, and of more than 1,000 messages
# only the first and the last three remain, with "..." between them. Lists that never were arrays are written whole.
#
# Remedy: keep the Parquet file, or write JSON lines (to_json with orient="records", lines=True). data/chat/prepare.py
# rejects such cells.
#
# Observed with pandas 3.1.1 and pyarrow 26.0.1 on Linux:
#   1200 messages in Parquet, 6 in the CSV file; "..." in it: True
#   a conversation of 2 messages: [{'role': 'user', 'content': 'q'} {'role': 'assistant', 'content': 'a'}]
#   without Parquet: 1200 messages in the CSV file; to_json: 1200
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check pandas==3.1.1 pyarrow==26.0.1
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import csv
import sys

import pandas
import pyarrow

csv.field_size_limit(10**9)
pair = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
frame = pandas.DataFrame({"messages": [pair * 600, pair]})
frame.to_parquet("chats.parquet")


def cells(frame):
    frame.to_csv("chats.csv", index=False)
    with open("chats.csv", newline="") as file:
        return [row[0] for row in list(csv.reader(file))[1:]]


print(f"pandas {pandas.__version__}, pyarrow {pyarrow.__version__}")
from_parquet = pandas.read_parquet("chats.parquet")
long, short = cells(from_parquet)
print(f"1200 messages in Parquet, {long.count('role')} in the CSV file; \"...\" in it: {'...' in long}")
print(f"a conversation of 2 messages: {short}")
whole = cells(frame)[0].count("role")
as_json = from_parquet.to_json(orient="records", lines=True).splitlines()[0].count('"role"')
print(f"without Parquet: {whole} messages in the CSV file; to_json: {as_json}")
found = [long.count("role"), "..." in long, "}, {" in short, whole, as_json]
sys.exit(0 if found == [6, True, False, 1200, 1200] else "this has changed")
PYTHON
