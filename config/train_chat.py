"""Small chat model, trained only on conversations.

    python data/chat/prepare.py --input=YOUR_CONVERSATIONS.jsonl
    python train.py config/train_chat.py
    python chat.py out-chat

Expect: about 1 M parameters; 9 minutes on 2 CPU cores; loss 3.86 on EDS's dialogues

Loss masks ensure that only the answers contribute to the loss. On the validation set of EDS, the
Empathetic-Dialogue-System, the loss is 3.857 after 8 to 9 minutes on 2 busy AMD EPYC (Zen 3) vCPUs (2026-11-21).
"""

out_dir = "out-chat"
eval_interval = 250
eval_iters = 50
log_interval = 50

dataset = "chat"
gradient_accumulation_steps = 1
batch_size = 16
block_size = 128

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.1
pos_embd = "rope"  # a turn has the same meaning anywhere in the context

learning_rate = 2e-3
max_iters = 2000
lr_decay_iters = 2000
min_lr = 1e-4
beta2 = 0.99  # few tokens per iteration
warmup_iters = 100
