"""Layers with settings of their own: quantized, saved, loaded, told, resumed, and refused where they do not fit."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM
from whole_models import come_back_dense, equal_state, make, quantized_layers

from crvq_hf import CRVQConfig, quantize_model
from crvq_hf.checkpoint.verify import verify
from crvq_hf.commands.cli import main

OVERRIDES = {"layers.0": {"in_group_size": 4, "critical_ratio": 1.0}, "v_proj": {"nbits_per_codebook": 6}}

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def folder(quantize, tmp_path, small_steps):
    """A tuned checkpoint, its model beside it."""
    model = quantize(make("llama"), overrides=OVERRIDES)
    model.save_pretrained(tmp_path / "saved")
    tiny_tokenizer().save_pretrained(tmp_path / "saved")
    return model, tmp_path / "saved"


def test_saved_and_loaded(folder, tokens, capsys):
    model, saved = folder
    tensors = load_file(saved / "model.safetensors")
    shapes = {
        name: tuple(tensors[f"model.layers.{name}.weight_codebooks"].shape)
        for name in ("0.self_attn.q_proj", "0.self_attn.v_proj", "1.self_attn.q_proj", "1.self_attn.v_proj")
    }
    assert [d for _, _, d in shapes.values()] == [4, 4, 8, 8] and [
        shapes[f"{i}.self_attn.v_proj"][1] for i in (0, 1)
    ] == [64, 64]
    assert json.loads((saved / "config.json").read_text())["quantization_config"]["format_version"] == 5
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    with torch.inference_mode():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
        dense = AutoModelForCausalLM.from_pretrained(saved, quantization_config=CRVQConfig(dequantize=True))
        torch.testing.assert_close(dense(tokens).logits, model(tokens).logits, rtol=2e-3, atol=2e-3)
    assert not verify(saved).problems
    assert main(["info", str(saved)]) == 0
    assert "; layers.0: critical_ratio 1, in_group_size 4; v_proj: nbits_per_codebook 6" in capsys.readouterr().out


@pytest.mark.parametrize(("architecture", "first"), [("gpt2", "h.0"), ("qwen3_moe", "layers.0")])
def test_other_architectures(architecture, first, tokens, tmp_path):
    model = make(architecture)
    names = model.state_dict().keys()
    overrides = {first: {"nbits_per_codebook": 6, "critical_ratio": 1.0}}
    quantize_model(model, config=CRVQConfig(dataset=None, nbits_per_codebook=4, overrides=overrides))
    sizes = {name: layer.nbits for name, layer in quantized_layers(model).items()}
    assert {6, 4} == {*sizes.values()} and all((f".{first}." in name) == (size == 6) for name, size in sizes.items())
    come_back_dense(model, names, tokens, tmp_path)


def test_resumed(quantize, small_steps):
    first = quantize(make("llama"), "work", overrides=OVERRIDES)
    again = quantize(make("llama"), "work", overrides=OVERRIDES)  # reads finished blocks
    assert equal_state(first, again) and not equal_state(first, quantize(make("llama"), "other"))


@pytest.mark.parametrize("overrides", [None, {"layers.0": {"in_group_size": 4}}])
def test_other_overrides_in_the_config_are_refused(folder, overrides):
    _, saved = folder
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"]["overrides"] = overrides
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="The shapes in the checkpoint contradict its config: model.layers.0"):
        AutoModelForCausalLM.from_pretrained(saved)


def test_a_name_that_no_module_has_is_told(caplog):
    config = CRVQConfig(dataset=None, overrides={"layers.9": {"critical_ratio": 1.0}})
    quantize_model(make("llama"), config=config)
    assert "overrides: 'layers.9' matches no module" in caplog.text
