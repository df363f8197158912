"""Evaluate OpenAI's gpt2 (12 layers, 12 heads, n_embd 768, 124M parameters) on OpenWebText.

    python train.py config/eval_gpt2.py

Expect: 124 M parameters; loss 3.12 on OpenWebText according to nanoGPT

nanoGPT's README reports a training loss of 3.11 and a validation loss of 3.12, which have not been reproduced here.
To evaluate on a different dataset with GPT-2's vocabulary, add --dataset, for example --dataset=don.
"""

batch_size = 8
eval_iters = 500  # for an accurate estimate
eval_only = True
wandb_log = False
init_from = "gpt2"
