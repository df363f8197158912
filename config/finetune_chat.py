"""Fine-tune GPT-2 (124M) for chat.

    python data/chat/prepare.py --input=YOUR_CONVERSATIONS.jsonl --tokenizer=gpt2
    python train.py config/finetune_chat.py
    python chat.py out-chat-gpt2

Expect: 124 M parameters; intended for a GPU; loss not measured yet

This config is intended for a GPU. The first run downloads GPT-2's weights. Loss masks ensure that only the answers
contribute to the loss. The tokens that mark the speakers are new, and their embeddings are learned from scratch.
"""

out_dir = "out-chat-gpt2"
eval_interval = 50
eval_iters = 40
log_interval = 10

dataset = "chat"
init_from = "gpt2"

batch_size = 4
block_size = 512
gradient_accumulation_steps = 8  # 16,384 tokens per iteration; only answer tokens contribute to the loss
max_iters = 500

learning_rate = 3e-5
warmup_iters = 20
lr_decay_iters = 500
min_lr = 3e-6
dropout = 0.1
