"""Documents, tokenizers, data preparation, and the format of the data files. Does not import torch."""
