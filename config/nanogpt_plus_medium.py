"""nanoGPT+'s medium GPT (10.7 M parameters). Pass this config after any dataset's config.

python train.py config/train_don_char.py config/nanogpt_plus_medium.py
"""

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
dropout = 0.2
activation = "gelu_tanh"
pos_embd = "default"
tie_weights = True
ngrams = 1

batch_size = 64
gradient_accumulation_steps = 1
optimizer = "adamw"
learning_rate = 1e-3
min_lr = 1e-4
beta1 = 0.9
beta2 = 0.99
weight_decay = 0.1
