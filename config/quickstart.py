"""A small character GPT on Python's language reference.

    python train.py config/quickstart.py
    python sample.py --out_dir=out-quickstart

Needs no network: train.py prepares data/python_docs itself. About a minute on two CPU cores (README has the figure).
The loss depends on the version of Python, whose text it is.
"""
out_dir = "out-quickstart"
eval_interval = 500
eval_iters = 50
log_interval = 50
sample_tokens = 200  # watch it learn to write

dataset = "python_docs"
gradient_accumulation_steps = 1
batch_size = 12  # many small updates: larger windows end at a higher loss after the same time
block_size = 64

n_layer = 3
n_head = 4
n_embd = 128

learning_rate = 4e-3
max_iters = 1500
lr_decay_iters = 1500
min_lr = 1e-4
beta2 = 0.99  # few tokens per iteration
warmup_iters = 50
