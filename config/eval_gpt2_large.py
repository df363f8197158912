"""Evaluate OpenAI's gpt2-large (36 layers, 20 heads, n_embd 1280, 774M parameters) on OpenWebText.

    python train.py config/eval_gpt2_large.py

Expect: 774 M parameters; loss 2.67 on OpenWebText according to nanoGPT

nanoGPT's README reports a training loss of 2.66 and a validation loss of 2.67, which have not been reproduced here.
To evaluate on a different dataset with GPT-2's vocabulary, add --dataset, for example --dataset=don.
"""

batch_size = 8
eval_iters = 500  # for an accurate estimate
eval_only = True
wandb_log = False
init_from = "gpt2-large"
