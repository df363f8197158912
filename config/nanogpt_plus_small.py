"""nanoGPT+'s small GPT (0.80 M parameters). Pass this config after any dataset's config.

python train.py config/train_don_char.py config/nanogpt_plus_small.py
"""

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
dropout = 0.2
activation = "gelu_tanh"
pos_embd = "default"
tie_weights = True
ngrams = 1

batch_size = 64
gradient_accumulation_steps = 1
optimizer = "adamw"
learning_rate = 3e-4
min_lr = 3e-5
beta1 = 0.9
beta2 = 0.95
weight_decay = 0.1
