"""GPT-2 (124M) on OpenWebText; settings of nanoGPT, whose README gives a validation loss of about 2.85.

    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
    python train.py config/train_gpt2.py                                       # one GPU

Expect: 124 M parameters; 4 days on 8 A100 GPUs; loss about 2.85, both according to nanoGPT

nanoGPT's README gives about 4 days on 8 A100 40GB; not measured here. data/openwebtext/prepare.py makes the corpus;
nanoGPT's own train.bin and val.bin, put there, are read as they are.
"""

wandb_log = False  # nanoGPT's is True, which needs an account
wandb_project = "owt"
wandb_run_name = "gpt2-124M"

# 30 windows x 1024 tokens x 16 micro-batches, shared by the GPUs, make the 491,520 tokens per iteration that the 40
# micro-batches of 12 of nanoGPT make; larger ones keep a GPU busier. Below 40 GB of memory halve one, double the other.
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
