"""Small character-level GPT on the prose of Python's own documentation.

    python train.py config/quickstart.py
    python sample.py --out_dir=out-quickstart

Expect: 6.5 M parameters, 6.3 M of them in the n-gram table; 51 s on 2 CPU cores; loss 1.20

No network access is needed: train.py prepares data/python_docs itself. The full validation loss is 1.1968 after 51 s on
2 AMD EPYC virtual CPUs (Python 3.11, torch 2.13, 2026-11-30). The text differs between Python versions. The model
learns fast because of Muon and the last four model settings; docs/speed.md shows the effect of each setting. Without
these settings, it is a small GPT-2.
"""

out_dir = "out-quickstart"
eval_interval = 100
eval_iters = 10
log_interval = 20
sample_tokens = 200  # shows how the model learns to write

dataset = "python_docs"
gradient_accumulation_steps = 1
batch_size = 16
block_size = 128

n_layer = 2
n_head = 4
n_embd = 96
pos_embd = "rope"
tie_weights = False
ngrams = 5
ngram_rows = 2**14

optimizer = "muon"
learning_rate = 1e-2
grad_clip = 0.0
max_iters = 400
lr_decay_iters = 400
warmup_iters = 10
decay = "linear"
min_lr = 0.0
