"""Fine-tune GPT-2 (124M) on Don Quixote with DI725's settings.

    python data/don/prepare.py
    python train.py config/finetune_don.py

Expect: 124 M parameters; intended for a GPU; loss not measured yet

This config is intended for a GPU. The first run downloads GPT-2's weights. Each iteration uses 32,768 tokens.
"""

import time

out_dir = "out-don"
eval_interval = 5
eval_iters = 40

wandb_log = False
wandb_project = "don"
wandb_run_name = "ft-" + str(time.time())

dataset = "don"
init_from = "gpt2"

always_save_checkpoint = False  # keep the state with the lowest validation loss

batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5
decay_lr = False
