"""Turning a CRVQ model back into a dense one, in memory and while loading."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from crvq_hf import CRVQConfig, CRVQLinear, quantize_model

pytestmark = [
    pytest.mark.usefixtures("pipeline"),
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`"),
]


@torch.no_grad()
def logits(model, tokens):
    return model(tokens, use_cache=False).logits


@pytest.fixture(params=["llama", "gpt2", "phi3", "qwen3_moe"])
def saved(request, make_model, tmp_path):
    model = quantize_model(make_model(request.param), config=CRVQConfig(dataset=None))
    model.save_pretrained(tmp_path / "crvq")
    return model, tmp_path / "crvq"


def assert_dense(model) -> None:
    assert not any(isinstance(module, CRVQLinear) for module in model.modules())
    assert not hasattr(model, "hf_quantizer") and not hasattr(model.config, "quantization_config")
    assert not model.is_quantized and not model.config._is_quantized
    assert "crvq" not in model.model_tags


def assert_saves_as_dense(model, tokens, folder) -> None:
    expected = logits(model, tokens)
    model.save_pretrained(folder)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits(loaded, tokens), expected)


@pytest.mark.parametrize("load_first", [False, True])
def test_dequantize_in_memory(saved, tokens, tmp_path, load_first):
    model, folder = saved
    expected = logits(model, tokens)
    if load_first:
        model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dequantize() is model
    assert_dense(model)
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-3, atol=3e-4)
    assert_saves_as_dense(model, tokens, tmp_path / "dense")


def test_dequantize_while_loading(saved, tokens, tmp_path):
    model, folder = saved
    dense = AutoModelForCausalLM.from_pretrained(folder, quantization_config=CRVQConfig(dequantize=True))
    assert_dense(dense)
    torch.testing.assert_close(logits(dense, tokens), logits(model, tokens), rtol=1e-3, atol=3e-4)
    assert_saves_as_dense(dense, tokens, tmp_path / "dense")


def test_layers_are_of_the_original_class(saved):
    model, _ = saved
    conv1d = [layer.conv1d for layer in model.modules() if isinstance(layer, CRVQLinear)]
    model.dequantize()
    kind = Conv1D if all(conv1d) else nn.Linear
    assert sum(type(module) is kind for module in model.modules()) >= 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", torch.float16])
def test_dtype_can_be_chosen(make_model, dtype):
    model = quantize_model(make_model("opt"), config=CRVQConfig(dataset=None)).dequantize(dtype)
    layer = model.model.decoder.layers[0].fc1
    expected = torch.bfloat16 if dtype == "bfloat16" else dtype
    assert layer.weight.dtype == layer.bias.dtype == expected
    assert layer.weight.requires_grad


def test_dtype_is_that_of_the_model_by_default(make_model, tmp_path):
    model = quantize_model(make_model("llama", dtype=torch.bfloat16), config=CRVQConfig(dataset=None))
    model.save_pretrained(tmp_path)  # which leaves a string in config.dtype
    assert model.dequantize().model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    options = {"quantization_config": CRVQConfig(dequantize=True), "dtype": torch.float16}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    assert loaded.model.layers[0].mlp.up_proj.weight.dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_is_that_the_model_has_by_now(make_model, tokens, dtype):
    model = quantize_model(make_model("llama"), config=CRVQConfig(dataset=None, embedding_bits=8)).to(dtype)
    expected = logits(model, tokens)
    assert {parameter.dtype for parameter in model.dequantize().parameters()} == {dtype}
    torch.testing.assert_close(logits(model, tokens), expected, rtol=0.02, atol=0.02)


def test_dequantized_model_can_be_quantized_again(make_model):
    config = CRVQConfig(dataset=None)
    model = quantize_model(make_model("llama"), config=config).dequantize()
    assert isinstance(quantize_model(model, config=config).model.layers[0].mlp.up_proj, CRVQLinear)
    assert model.is_quantized


def test_dequantize_while_loading_refuses_to_spread(make_model, tmp_path):
    quantize_model(make_model("llama"), config=CRVQConfig(dataset=None)).save_pretrained(tmp_path)
    device_map = {"model": "disk", "lm_head": "cpu"}
    with pytest.raises(ValueError, match=r"To dequantize a model while loading.*\['cpu', 'disk'\]"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=CRVQConfig(dequantize=True), device_map=device_map, offload_folder=tmp_path
        )
