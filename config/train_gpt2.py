"""GPT-2 (124M) on OpenWebText; settings of nanoGPT, whose README reports a validation loss of about 2.85.

    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
    python train.py config/train_gpt2.py                                       # one GPU

Expect: 124 M parameters; 4 days on 8 A100 GPUs; loss about 2.85, both according to nanoGPT

nanoGPT's README reports about 4 days on 8 A100 40GB; not measured here. data/openwebtext/prepare.py prepares the text;
nanoGPT's own train.bin and val.bin also work there.
"""

wandb_log = False  # nanoGPT's is True, which needs an account
wandb_project = "owt"
wandb_run_name = "gpt2-124M"

# 30 windows x 1024 tokens x 16 micro-batches, shared by the GPUs, are 491,520 tokens per iteration, as in nanoGPT with
# its 40 micro-batches of 12; larger ones use a GPU better. Below 40 GB of memory, halve one and double the other.
batch_size = 30
block_size = 1024
gradient_accumulation_steps = 2 * 8

# about 300 billion tokens in all
max_iters = 600000
lr_decay_iters = 600000

eval_interval = 1000
eval_iters = 200
log_interval = 10

weight_decay = 1e-1
