"""Reach the loss of nanoGPT's CPU demo on Don Quixote, 1.792 on the raw text, as fast as possible on a CPU.

    python data/don_char/prepare.py --raw=True
    python train.py config/speedrun_don_char_cpu.py

Expect: 4.3 M parameters, 4.2 M of them in the n-gram table; 7 s on 2 CPU cores; loss 1.74 on raw text

The full validation loss is 1.7447 (1.7434 to 1.7452 for seeds 1337 to 1339). The command takes 7.3 s (6.1 to 7.4) on
2 cores of an AMD EPYC (Zen 3) virtual machine, and nanoGPT's demo takes 146.9 s (torch 2.13, 2026-11-22).
"""

out_dir = "out-speedrun-don-char-cpu"
eval_interval = 1000  # only at the end
eval_iters = 1
log_interval = 10

dataset = "don_char"
gradient_accumulation_steps = 1
batch_size = 8  # many small updates
block_size = 128

n_layer = 1  # enough to reach this loss, given the n-gram table
n_head = 2
n_embd = 64
pos_embd = "rope"
tie_weights = False  # slightly better here, and the token embedding is small
ngrams = 5
ngram_rows = 2**14

optimizer = "muon"
learning_rate = 2e-2  # for embeddings and LayerNorm weights, which tolerate a higher rate than matrices
muon_lr = 5e-2
weight_decay = 0.0
grad_clip = 0.0
max_iters = 60
lr_decay_iters = 60
warmup_iters = 2
decay = "linear"
min_lr = 0.0
