"""`requires_grad_(True)` for a whole quantized model."""

import pytest
import torch
from random_models import quantized_model

from crvq_hf.modeling.counting import QUANTIZED


@pytest.mark.parametrize("moved", [False, True])
def test_what_is_stored_quantized_is_passed_by(moved):
    model = quantized_model("opt")
    if moved:
        model = model.to(torch.bfloat16).to(torch.float32)
    model.requires_grad_(True)
    stored = {
        id(parameter)
        for layer in model.modules()
        for name, parameter in layer.named_parameters(recurse=False)
        if isinstance(layer, QUANTIZED) and name != "bias"
    }
    assert len(stored) == 4 * 12 + 2
    assert all(parameter.requires_grad == (id(parameter) not in stored) for parameter in model.parameters())
    tokens = torch.arange(8)[None]
    model(tokens, labels=tokens).loss.backward()
    assert model.model.decoder.layers[0].fc1.bias.grad.abs().sum() > 0
    model.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
