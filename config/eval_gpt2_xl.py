"""Evaluate OpenAI's gpt2-xl (48 layers, 25 heads, n_embd 1600, 1558M parameters) on OpenWebText.

    python train.py config/eval_gpt2_xl.py

Expect: 1,558 M parameters; loss 2.54 on OpenWebText according to nanoGPT

nanoGPT's README reports a training loss of 2.56 and a validation loss of 2.54, which have not been reproduced here.
To evaluate on a different dataset with GPT-2's vocabulary, add --dataset, for example --dataset=don.
"""

batch_size = 8
eval_iters = 500  # for an accurate estimate
eval_only = True
wandb_log = False
init_from = "gpt2-xl"
