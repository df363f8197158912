"""Read conversations from files, and chat with a model."""
