"""nanoGPT+'s bigram model, a table of V x V logits. Pass this config after any dataset's config.

    python train.py config/train_don_char.py config/bigram.py --max_iters=8000 --lr_decay_iters=8000

This is a baseline: a model that sees more context should have a lower loss.
"""

model_type = "bigram"
pos_embd = "default"
ngrams = 1
block_size = 8  # tokens per window; the model sees only the last one

batch_size = 32
gradient_accumulation_steps = 1
optimizer = "adamw"
learning_rate = 1e-2
min_lr = 1e-3
warmup_iters = 0
beta1 = 0.9
beta2 = 0.99
weight_decay = 0.1
