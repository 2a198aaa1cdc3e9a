"""What tests of the decode loop share: models whose next token is known, and the double of a CUDA graph."""

import pytest
import recorded
import torch

from crvq_hf.generation import graph


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(graph, "_said", set())


@pytest.fixture
def graphs(monkeypatch):
    """Has steps captured and replayed on a CPU as on a GPU."""
    monkeypatch.setattr(graph, "can_capture", lambda device: True)
    monkeypatch.setattr(graph, "watch", recorded.watch)
    monkeypatch.setattr(graph, "capture", recorded.capture)


@pytest.fixture
def counting(make_model):
    """A Llama of 64 tokens that writes n + 1 after n."""
    model = make_model("llama", num_hidden_layers=1, tie_word_embeddings=False)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    rows = torch.nn.functional.normalize(torch.randn_like(model.lm_head.weight))
    model.model.embed_tokens.weight.data.copy_(rows)
    model.lm_head.weight.data.copy_(rows.roll(1, 0))
    return model
