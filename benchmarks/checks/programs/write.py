"""Lets a model answer, given its id or folder; crvq_hf is not imported."""

import sys

from transformers import pipeline

name, prompt = sys.argv[1:]
assert "crvq_hf" not in sys.modules
writer = pipeline("text-generation", name)
print("layer", type(writer.model.model.layers[0].mlp.up_proj).__name__)
print("embedding", type(writer.model.get_input_embeddings()).__name__)
print("by", sys.modules["crvq_hf"].__file__)
chat = writer([{"role": "user", "content": prompt}], max_new_tokens=8, do_sample=False)
print("written", repr(chat[0]["generated_text"][-1]["content"]))
