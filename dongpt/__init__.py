"""donGPT's shared code, in packages named after the stages of a run."""

__version__ = "0.1.0"
