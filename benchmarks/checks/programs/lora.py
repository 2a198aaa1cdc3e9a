"""Trains a LoRA adapter on a quantized model ("train"), or loads the trained one ("reload"), and prints its loss."""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

how, name, text = sys.argv[1:]
torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(name)
tokens = AutoTokenizer.from_pretrained(name)(Path(text).read_text(), return_tensors="pt").input_ids[:, :128]

if how == "reload":
    model = PeftModel.from_pretrained(model, "adapter")
else:
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.print_trainable_parameters()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(8):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print("loss", loss.item())
    model.save_pretrained("adapter")

with torch.no_grad():
    print(f"{how}ed loss", model.eval()(input_ids=tokens, labels=tokens).loss.item())
