#!/usr/bin/env bash
# GPT-2's token embedding and output head are one matrix. PEFT adapts either of them as if it were alone, so with an
# adapter of wte, merge_and_unload() changes the logits: merging adds the term to the head as well. There is neither an
# error nor a warning. Loading is also silent: layers in the file that the model does not have are dropped, so an
# adapter of a deeper model loads onto a shallower one.
#
# Remedy here: dongpt/checkpoint/lora.py adapts only the layers of the blocks, and dongpt/checkpoint/adapters.py lists all
# layers of an adapter that its base lacks, and the other way around.
#
# Observed with peft 0.21.2, transformers 4.57.6, torch 2.13.0:
#   adapter of wte: the logits change by 1.2e+02 when it is merged
#   adapter of c_attn: the logits change by 7.8e-06 when it is merged
#   adapter of 3 layers loaded onto 2: no error
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check peft==0.21.2 transformers==4.57.6 torch==2.13.0
cd "$folder"
"$folder/venv/bin/python" - 2> /dev/null <<'PYTHON'
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel


def gpt2(n_layer):
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=n_layer, n_head=2, n_embd=16, n_positions=16, vocab_size=23)).eval()


idx, changes = torch.arange(16)[None], {}
for layer in ("wte", "c_attn"):
    model = get_peft_model(gpt2(3), LoraConfig(r=4, target_modules=[layer], task_type="CAUSAL_LM")).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(layer)
    with torch.no_grad():
        before = model(idx).logits
        after = model.merge_and_unload()(idx).logits
    changes[layer] = (after - before).abs().max().item()
    print(f"adapter of {layer}: the logits change by {changes[layer]:.2} when it is merged")
PeftModel.from_pretrained(gpt2(2), "c_attn")
print("adapter of 3 layers loaded onto 2: no error")
sys.exit(0 if changes["wte"] > 1 and changes["c_attn"] < 1e-3 else 1)
PYTHON
