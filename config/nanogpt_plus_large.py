"""nanoGPT+'s large GPT (38.4 M parameters). Pass this config after any dataset's config.

python train.py config/train_don_char.py config/nanogpt_plus_large.py
"""

n_layer = 12
n_head = 12
n_embd = 516
block_size = 384
dropout = 0.2
activation = "gelu_tanh"
pos_embd = "default"
tie_weights = True
ngrams = 1

batch_size = 8
gradient_accumulation_steps = 5
optimizer = "adamw"
learning_rate = 3e-4
min_lr = 3e-5
beta1 = 0.9
beta2 = 0.99
weight_decay = 0.1
