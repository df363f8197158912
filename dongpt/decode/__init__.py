"""Decoding: model preparation, KV cache, sampling and detokenization."""
