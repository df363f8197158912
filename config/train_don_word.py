"""A word-level GPT on Don Quixote, small enough for a CPU.

    python data/don_word/prepare.py
    python train.py config/train_don_word.py
"""
out_dir = "out-don-word"
eval_interval = 250
eval_iters = 5
log_interval = 50

dataset = "don_word"
gradient_accumulation_steps = 1
batch_size = 8
block_size = 64  # words of context, as many as three hundred characters

n_layer = 2
n_head = 3
n_embd = 96
pos_embd = "rope"
tie_weights = False

optimizer = "muon"
learning_rate = 1e-2
weight_decay = 0.1
max_iters = 1000
lr_decay_iters = 1000
warmup_iters = 10
decay = "linear"
min_lr = 0.0
