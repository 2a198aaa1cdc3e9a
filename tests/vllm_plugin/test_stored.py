"""Tensors of a layer while they are loaded: what does not fit, or does not come, is refused."""

import pytest
import torch
from torch import nn

from crvq_hf import CRVQConfig
from crvq_hf.vllm.stored import StoredLayer, register_placeholders, remove_placeholders


def test_a_layer_is_what_was_loaded(make_weight):
    weight = make_weight(64, 48)
    layer = StoredLayer("up_proj", CRVQConfig(num_extended_codebooks=3), 64, 48)
    for name, tensor in weight.tensors().items():
        layer.put(name, tensor.T if name == "weight" else tensor)  # as vLLM's code of GPT-2 turns it over
    loaded = layer.weight()
    assert all(loaded.tensors()[name].equal(tensor) for name, tensor in weight.tensors().items())


def test_a_shape_contradicts_the_config(make_weight):
    layer = StoredLayer("up_proj", CRVQConfig(num_extended_codebooks=3), 64, 48)
    with pytest.raises(ValueError, match=r"contradict its config: up_proj.weight is torch.uint8 \[40, .*expected"):
        layer.put("weight", make_weight(64, 40).codes)


def test_a_tensor_does_not_come(make_weight):
    layer = StoredLayer("up_proj", CRVQConfig(num_extended_codebooks=3), 64, 48)
    tensors = make_weight(64, 48).tensors()
    for name in ("weight", "weight_codebooks", "weight_order"):
        layer.put(name, tensors[name])
    with pytest.raises(ValueError, match="lacks the tensor up_proj.weight_scale; it is incomplete, save or download"):
        layer.weight()


def test_what_cannot_be_is_refused(make_weight):
    layer = StoredLayer("up_proj", CRVQConfig(num_extended_codebooks=3), 64, 48)
    for name, tensor in make_weight(64, 48).tensors().items():
        layer.put(name, torch.zeros_like(tensor) if name == "weight_order" else tensor)
    with pytest.raises(ValueError, match="up_proj.weight_order must hold every channel"):
        layer.weight()


def test_placeholders_are_small_and_hand_on_what_they_are_given():
    module, calls = nn.Module(), []
    shape = CRVQConfig().layer_shape(64, 48)
    register_placeholders(module, "w2_", shape, lambda *args, **kwargs: calls.append((args, kwargs)))
    parameter = module.w2_weight_scale
    assert parameter.numel() == 0 and parameter.dtype == torch.float16
    parameter.weight_loader(parameter, "tensor", "q", expert_id=1)
    assert calls == [(("weight_scale", parameter, "tensor", "q"), {"expert_id": 1})]
    assert remove_placeholders(module, "w2_") == torch.device("cpu")
    assert not [*module.named_parameters()]
