"""GPT-2 (124M) fine-tuned to summarise; settings of DI725.

    python data/sum/prepare.py --input=YOUR_RECORDS.csv
    python train.py config/finetune_sum.py

Expect: 124 M parameters; made for a GPU; loss not measured yet

Made for a GPU. GPT-2's weights are downloaded by the first run. The data has masks, so that the loss covers only the
summaries. An iteration has 32,768 tokens, including those that are not in the loss.
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
