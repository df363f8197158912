"""Train GPT-2 (124M) on OpenWebText with nanoGPT's settings.

    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
    python train.py config/train_gpt2.py                                       # uses one GPU

Expect: 124 M parameters; 4 days on 8 A100 GPUs and a loss of about 2.85 according to nanoGPT

nanoGPT's README reports a loss of about 2.85 after about 4 days on 8 A100 40GB GPUs. This was not reproduced here.
Run data/openwebtext/prepare.py to prepare the data, or copy nanoGPT's train.bin and val.bin to data/openwebtext.
"""

wandb_log = False  # nanoGPT sets this to True, which requires a wandb account
wandb_project = "owt"
wandb_run_name = "gpt2-124M"

# 30 windows x 1024 tokens x 16 micro-batches (across all GPUs) = 491,520 tokens per iteration. This equals nanoGPT's
# 40 micro-batches of 12, but larger micro-batches use a GPU better. With less than 40 GB of GPU memory, halve
# batch_size and double gradient_accumulation_steps.
batch_size = 30
block_size = 1024
gradient_accumulation_steps = 2 * 8

# about 300 billion tokens in total
max_iters = 600000
lr_decay_iters = 600000

eval_interval = 1000
eval_iters = 200
log_interval = 10

weight_decay = 1e-1
