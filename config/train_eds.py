"""Small GPT for text in GPT-2's vocabulary, with the model and settings of EDS, the Empathetic-Dialogue-System.

    python data/don/prepare.py
    python train.py config/train_eds.py --data_dir=data/don

Expect: 3.4 M parameters; loss not measured here

EDS trains on dialogues; to do the same, pass their folder as --data_dir. Each iteration uses 20,480 tokens. EDS saves
the latest state in ckpt.pt and therefore ends with an overfitted model; here, the latest state is in ckpt_last.pt. EDS
stops after 30,100 of the 600,000 iterations in its learning-rate schedule.
"""

out_dir = "out-eds"
eval_interval = 200
eval_iters = 200
log_interval = 20

gradient_accumulation_steps = 40
batch_size = 8
block_size = 64

n_layer = 4
n_head = 4
n_embd = 64
dropout = 0.0

learning_rate = 6e-4
max_iters = 30100
lr_decay_iters = 600000
min_lr = 6e-5
warmup_iters = 2000
beta2 = 0.95
weight_decay = 0.1
