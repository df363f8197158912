"""Weights on disk: our checkpoints, those of other trainers, Hugging Face directories. And the one model factory.

model, tokenizer = load_model("out/ckpt.pt")     # eval mode, float32, CPU
model = build_model(GPTConfig(n_layer=2))        # new weights
"""

import importlib

_MODULES = {"load_model": "files", "build_model": "legacy"}


def __getattr__(name: str):
    """load_model or build_model, imported when first used (PEP 562)."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
