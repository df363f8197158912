"""Character-level GPT designed to match config/train_don_char.py's loss in 300 instead of 2,000 iterations on a GPU.

    python data/don_char/prepare.py --raw=True
    python train.py config/speedrun_don_char.py

Expect: 61 M parameters, 50 M of them in the n-gram table; intended for one GPU; loss not measured yet

This config has not been measured on a GPU yet. It is the baby GPT with the settings that helped on a CPU
(docs/speed.md).
"""

out_dir = "out-speedrun-don-char"
eval_interval = 1000  # only at the end
eval_iters = 20
log_interval = 50

dataset = "don_char"
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.1
pos_embd = "rope"
tie_weights = False
ngrams = 5

optimizer = "muon"
learning_rate = 1e-2
grad_clip = 0.0
max_iters = 300
lr_decay_iters = 300
warmup_iters = 10
decay = "linear"
min_lr = 0.0
