"""GPT-2 (124M) fine-tuned on Don Quixote; settings of DI725.

    python data/don/prepare.py
    python train.py config/finetune_don.py

Expect: 124 M parameters; made for a GPU; loss not measured yet

Made for a GPU. GPT-2's weights are downloaded by the first run. An iteration has 32,768 tokens.
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
