"""A small character GPT on Python's language reference, in about a minute and a half on two CPU cores.

    python train.py config/quickstart.py
    python sample.py --out_dir=out-quickstart

Needs no network: train.py prepares data/python_docs itself. The loss depends on the version of Python, whose text it is.
"""
out_dir = "out-quickstart"
eval_interval = 200
eval_iters = 20
log_interval = 20
sample_tokens = 200  # watch it learn to write

dataset = "python_docs"
gradient_accumulation_steps = 1
batch_size = 16
block_size = 128

n_layer = 4
n_head = 4
n_embd = 128

learning_rate = 2e-3
max_iters = 1000
lr_decay_iters = 1000
min_lr = 1e-4
beta2 = 0.99  # few tokens per iteration
warmup_iters = 50
