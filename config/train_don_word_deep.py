"""The word notebook's model on Don Quixote: 32 layers, 512 channels, 32 heads of size 16, 116.1 M parameters.

    python data/don_word/prepare.py --notebook=True
    python train.py config/train_don_word_deep.py

Expect: 116 M parameters; intended for a GPU; loss not measured yet

This config is intended for a GPU. It has only been tested for two iterations on a CPU (2026-11-22), and the notebook
reports no loss. The notebook scales attention scores by the square root of n_embd instead of the head size, 16, which
makes them 5.7 times too small. This error is corrected here. In addition, GELU replaces ReLU, and dropout does not
apply to attention weights. The model memorizes its 0.8 million tokens long before training ends, so ckpt.pt has the
state with the lowest validation loss.
"""

out_dir = "out-don-word-deep"
eval_interval = 100
eval_iters = 20
log_interval = 10

dataset = "don_word"
gradient_accumulation_steps = 1
batch_size = 16
block_size = 128

n_layer = 32
n_head = 32
n_embd = 512
dropout = 0.2
bias = True
tie_weights = False

learning_rate = 3e-4
decay_lr = False
weight_decay = 0.01  # like beta2, PyTorch's default; the notebook sets neither
beta2 = 0.999
grad_clip = 0.0
max_iters = 5000
