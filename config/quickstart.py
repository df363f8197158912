"""A small character GPT on the prose of Python's own documentation.

    python train.py config/quickstart.py
    python sample.py --out_dir=out-quickstart

Expect: 6.5 M parameters, 6.3 M of them in the n-gram table; 51 s on 2 CPU cores; loss 1.20

Needs no network: train.py prepares data/python_docs itself. Whole-validation loss 1.1968 with the text of Python 3.11,
which differs from version to version, in 51 s on 2 virtual CPUs of an AMD EPYC, torch 2.13, 2026-11-30. It learns fast
because of Muon and the last four settings of the model; docs/speed.md shows the effect of each. Without them it is a
small GPT-2.
"""

out_dir = "out-quickstart"
eval_interval = 100
eval_iters = 10
log_interval = 20
sample_tokens = 200  # watch it learn to write

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
