"""Checkpoints in the classes they are loaded into: other names for the same layers, experts that are fused there."""

import logging

import pytest
import torch
from shrink import run, tiny_model
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from crvq_hf import CRVQConfig, CRVQLinear, quantize_model

CONFIG = {"dataset": None, "nbits_per_codebook": 4}


@pytest.fixture
def quantized(pipeline):
    """Returns a function (architecture, **config fields) -> quantized vision-language model."""

    def make(architecture, **fields):
        model = tiny_model(architecture, AutoModelForImageTextToText)
        return quantize_model(model, config=CRVQConfig(**CONFIG | fields))

    return make


@pytest.mark.parametrize("bits", [2.5, 8, 16])
@pytest.mark.parametrize("architecture", ["qwen3_5", "qwen3_5_moe"])
def test_a_vision_language_model_loads_as_its_text_model(quantized, tokens, tmp_path, caplog, architecture, bits):
    model = quantized(architecture, embedding_bits=bits)
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "crvq"):
        text = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "The checkpoint has a CRVQ layer" not in caplog.text and "ForCausalLM" in type(text).__name__
    count = {len([m for m in one.modules() if isinstance(m, CRVQLinear)]) for one in (model, text)}
    assert len(count) == 1 and count != {0}
    assert torch.equal(run(text, tokens), run(model, tokens))
    text.save_pretrained(tmp_path / "text")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    assert torch.equal(run(again, tokens), run(model, tokens))
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base).__name__ == type(model.model).__name__
    dense = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=CRVQConfig(dequantize=True))
    torch.testing.assert_close(run(dense, tokens), run(model, tokens), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("bits", [2.5, 8])
@pytest.mark.parametrize("architecture", ["qwen3_omni_moe_thinker", "qwen3_vl_moe", "deepseek_ocr2"])
def test_models_that_initialize_or_rename_what_is_right(quantized, tokens, tmp_path, architecture, bits):
    model = quantized(architecture, embedding_bits=bits)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(run(loaded, tokens), run(model, tokens))


@pytest.mark.parametrize(("bits", "kind"), [(2.5, "CodedEmbedding"), (8, "Int8Embedding")])
@pytest.mark.parametrize("architecture", ["qwen3_vl", "glm4v", "gemma4"])
def test_embeddings_of_models_with_a_vision_tower(quantized, tokens, tmp_path, architecture, bits, kind):
    model = quantized(architecture, embedding_bits=bits)
    assert type(model.get_input_embeddings()).__name__ == kind
    with pytest.raises(ValueError, match="cannot be resized"):
        model.resize_token_embeddings(999)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(run(loaded, tokens), run(model, tokens))
