"""Text to data files: documents, tokenizers, the preparation pipeline and the file format. Does not import torch."""
