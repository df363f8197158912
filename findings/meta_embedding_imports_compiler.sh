#!/usr/bin/env bash
# A model on torch's meta device is meant to be cheap: shapes without memory. nn.Linear is. The first nn.Embedding is not:
# its initialization, normal_ on a meta tensor, runs a Python decomposition that imports torch._dynamo, the compiler,
# which takes seconds and hundreds of modules. uniform_ and zero_ do not. So a program that checks a checkpoint's shapes
# on the meta device before it loads the weights starts seconds later than one that does not.
#
# Remedy: under a torch.overrides.TorchFunctionMode that answers torch.nn.init.normal_, the normal_ is never called.
#
# Observed with torch 2.13.0 on Linux, 2 vCPUs of an AMD EPYC (seconds differ, the imports do not):
#   Linear on meta: compiler imported: False
#   Embedding on meta, normal_ skipped: compiler imported: False
#   Embedding on meta: compiler imported: True
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import time

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class SkipNormal(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return None if func is nn.init.normal_ else func(*args, **(kwargs or {}))


def imports_compiler(label, make):
    start, modules = time.perf_counter(), len(sys.modules)
    with torch.device("meta"):
        make()
    seconds, modules = time.perf_counter() - start, len(sys.modules) - modules
    imported = "torch._dynamo" in sys.modules
    print(f"{label}: compiler imported: {imported} ({seconds:.2f} s, {modules} modules)")
    return imported


def embedding_without_normal():
    with SkipNormal():
        nn.Embedding(4, 4)


print(f"torch {torch.__version__}")
found = [
    imports_compiler("Linear on meta", lambda: nn.Linear(4, 4)),
    imports_compiler("Embedding on meta, normal_ skipped", embedding_without_normal),
    imports_compiler("Embedding on meta", lambda: nn.Embedding(4, 4)),
]
sys.exit(0 if found == [False, False, True] else "this has changed")
PYTHON
