"""Character-level GPT on Don Quixote, with DI725's model and settings (nanoGPT's baby GPT, 10.7 M parameters).

    python data/don_char/prepare.py
    python train.py config/train_don_char.py

Expect: 10.7 M parameters; intended for a GPU, 10.7 s per iteration on 2 CPU cores; loss not measured yet

This config is intended for a GPU but has not been measured on one yet. On a CPU, use best_don_char_cpu.py instead. This
config takes 10.7 s per iteration on 2 cores of an AMD EPYC (Zen 3) virtual machine (torch 2.13, 2026-11-22).
"""

out_dir = "out-don-char"
eval_interval = 250  # frequent, since the model will overfit
eval_iters = 200
log_interval = 50

always_save_checkpoint = False  # keep the state with the lowest validation loss

wandb_log = False
wandb_project = "don-char"
wandb_run_name = "mini-gpt"

dataset = "don_char"
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256  # characters of context

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3  # small models tolerate a higher rate
max_iters = 2000
lr_decay_iters = 2000
min_lr = 1e-4
beta2 = 0.99  # few tokens per iteration
warmup_iters = 100
