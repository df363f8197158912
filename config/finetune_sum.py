"""Fine-tune GPT-2 (124M) for summarization with DI725's settings.

    python data/sum/prepare.py --input=YOUR_RECORDS.csv
    python train.py config/finetune_sum.py

Expect: 124 M parameters; intended for a GPU; loss not measured yet

This config is intended for a GPU. The first run downloads GPT-2's weights. Loss masks ensure that only the
summaries contribute to the loss. Each iteration uses 32,768 tokens, including masked ones.
"""

import time

out_dir = "out-sum"
eval_interval = 5
eval_iters = 40

wandb_log = False
wandb_project = "sum"
wandb_run_name = "ft-" + str(time.time())

dataset = "sum"
init_from = "gpt2"

always_save_checkpoint = False  # keep the state with the lowest validation loss

batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5
decay_lr = False
