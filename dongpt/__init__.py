"""donGPT from Python.

    import dongpt
    generator = dongpt.load("out-quickstart")
    text = generator.generate("The ", max_new_tokens=100, seed=1)
"""

__version__ = "0.1.0"


def __getattr__(name: str):
    """load, imported when first used (PEP 562)."""
    if name == "load":
        from dongpt.decode.ready import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
