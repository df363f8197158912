#!/usr/bin/env bash
# Test the exports with the previous generation of transformers, and with the programs that read the files.
# This takes some minutes, mostly to install them, in an environment of its own that is deleted afterwards.
#   bash tests/exports.sh                # transformers 4.57.6, gguf, CTranslate2
#   bash tests/exports.sh llama          # also llama-cpp-python, which is compiled for half an hour
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch>=2.11,<2.14" "numpy>=2,<3" filelock psutil safetensors tqdm tiktoken regex \
    pytest pytest-xdist transformers==4.57.6 gguf==0.19.0 ctranslate2==4.8.5 peft==0.21.2
if [ "${1:-}" = llama ]; then
    "$work/venv/bin/pip" install -q llama-cpp-python==0.3.36
fi
"$work/venv/bin/python" -m pytest tests/checkpoint/test_export.py
