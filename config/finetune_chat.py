"""GPT-2 (124M) taught to answer.

    python data/chat/prepare.py --input=YOUR_CONVERSATIONS.jsonl --tokenizer=gpt2
    python train.py config/finetune_chat.py
    python chat.py out-chat-gpt2

Expect: 124 M parameters; made for a GPU; loss not measured yet

Made for a GPU. GPT-2's weights are downloaded at the first run. The loss is that of the answers, since the data has
masks; the marks of who speaks are new tokens, whose rows in the embedding are learned from nothing.
"""

out_dir = "out-chat-gpt2"
eval_interval = 50
eval_iters = 40
log_interval = 10

dataset = "chat"
init_from = "gpt2"

batch_size = 4
block_size = 512
gradient_accumulation_steps = 8  # 16,384 tokens, of which the answers count
max_iters = 500

learning_rate = 3e-5
warmup_iters = 20
lr_decay_iters = 500
min_lr = 3e-6
dropout = 0.1
