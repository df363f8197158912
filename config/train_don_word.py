"""Word-level GPT on Don Quixote, small enough for a CPU.

    python data/don_word/prepare.py
    python train.py config/train_don_word.py

Expect: 4.6 M parameters; 7 minutes on one CPU core; loss 4.81 per word

The full validation loss is 4.8089 nats per word, or 1.6443 bits per byte (seed 1337). Training takes 7 minutes of CPU
time on one thread of a busy 4-core AMD EPYC (Zen 3) virtual machine (torch 2.13, 2026-11-22). With max_iters
and lr_decay_iters set to 250, the loss is 5.1875 (5.1857 to 5.1898 for seeds 1337 to 1339). With vectors from
data/word2vec.py (--init_wte=data/don_word/word2vec.npy), it is 5.1598 (5.1506 to 5.1688).
"""

out_dir = "out-don-word"
eval_interval = 250
eval_iters = 5
log_interval = 50

dataset = "don_word"
gradient_accumulation_steps = 1
batch_size = 8
block_size = 64  # words of context, about 300 characters

n_layer = 2
n_head = 3
n_embd = 96
pos_embd = "rope"
tie_weights = False  # lets the head learn while the embedding is frozen (--freeze_wte)

optimizer = "muon"
learning_rate = 1e-2
weight_decay = 0.1
max_iters = 1000
lr_decay_iters = 1000
warmup_iters = 10
decay = "linear"
min_lr = 0.0
