"""Weights on disk: our checkpoints, those of other trainers, and Hugging Face directories. Also the model factory.

model, tokenizer = load_model("out/ckpt.pt")     # eval mode, float32, CPU
model = build_model(GPTConfig(n_layer=2))        # new weights
"""

from dongpt.checkpoint.files import load_model as load_model
from dongpt.checkpoint.legacy import build_model as build_model
