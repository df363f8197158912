"""The word notebook's model on Don Quixote: 32 layers, 512 channels, 32 heads of 16, 116.1 M parameters.

    python data/don_word/prepare.py --notebook=True
    python train.py config/train_don_word_deep.py

Expect: 116 M parameters; made for a GPU; loss not measured yet

Made for a GPU and not measured here, apart from two iterations on a CPU (2026-11-22); the notebook reports no loss
either. The notebook divided its attention scores by the square root of n_embd instead of that of the head size, 16,
which made them 5.7 times too small; here they are correct. Its ReLU is replaced by a GELU, and its dropout does not
apply to attention weights. The model will memorize its 0.8 million tokens long before the end: ckpt.pt has the state
with the lowest validation loss.
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
weight_decay = 0.01  # this and beta2 are torch's defaults, since the notebook sets neither
beta2 = 0.999
grad_clip = 0.0
max_iters = 5000
