"""Build models, and load and save them as checkpoints or Hugging Face directories.

model, tokenizer = load_model("out/ckpt.pt")     # eval mode, float32, CPU
model = build_model(GPTConfig(n_layer=2))        # randomly initialized
"""

from dongpt.checkpoint.files import load_model as load_model
from dongpt.checkpoint.legacy import build_model as build_model
