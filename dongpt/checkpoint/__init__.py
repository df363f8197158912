"""Weights on disk: our checkpoints, those of other trainers, Hugging Face directories."""


def __getattr__(name: str):
    """load_model, imported when it is first asked for (PEP 562)."""
    if name == "load_model":
        from dongpt.checkpoint.files import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
