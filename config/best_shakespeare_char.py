"""Character-level GPT on tiny Shakespeare, tuned for the lowest loss in five minutes on one GPU.

    python data/shakespeare_char/prepare.py
    python train.py config/best_shakespeare_char.py

Expect: 10.7 M parameters; 5 minutes on one GPU; loss not measured yet

This config has not been measured on a GPU yet. It is the baby GPT with the settings that helped on a CPU
(docs/speed.md), plus dropout, since it trains for many epochs. It has no n-gram tables, which would memorize the
training set.
"""

out_dir = "out-best-shakespeare-char"
eval_interval = 250
eval_iters = 100
log_interval = 50

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.35
pos_embd = "rope"
tie_weights = False

optimizer = "muon"
learning_rate = 3e-3
muon_lr = 2e-2
max_iters = 2000
lr_decay_iters = 2000
max_minutes = 5.0
warmup_iters = 50
decay = "linear"
min_lr = 0.0
