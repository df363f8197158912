"""Weights to text: KV cache, sampling, detokenizing, making a model ready."""
