"""Saving and loading quantized models of every architecture: logits must come back bit for bit."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from crvq_hf import CRVQConfig, CRVQLinear, quantize_model

pytestmark = pytest.mark.usefixtures("pipeline")

ARCHITECTURES = [
    "llama", "opt", "mistral", "qwen3", "gemma3_text", "phi3", "gpt_neox", "gpt2", "mixtral", "qwen3_moe"
]  # fmt: skip
LINEARS_PER_BLOCK = {"opt": 6, "phi3": 4, "gpt_neox": 4, "gpt2": 4, "mixtral": 4 + 4 * 3, "qwen3_moe": 4 + 4 * 3}


def crvq_layers(model) -> dict[str, CRVQLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, CRVQLinear)}


@torch.no_grad()
def logits(model, tokens):
    return model(tokens, use_cache=False).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_come_back_bit_equal(make_model, tokens, tmp_path, architecture):
    model = quantize_model(make_model(architecture), config=CRVQConfig(nbits_per_codebook=6, dataset=None))
    assert len(crvq_layers(model)) == 2 * LINEARS_PER_BLOCK.get(architecture, 7)
    expected = logits(model, tokens)

    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)

    assert list(crvq_layers(loaded)) == list(crvq_layers(model))
    assert torch.equal(logits(loaded, tokens), expected)
    assert not any(p.requires_grad for layer in crvq_layers(loaded).values() for p in layer.parameters())
    assert loaded.config.quantization_config.nbits_per_codebook == 6

    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(again), tokens), expected)


@pytest.fixture
def saved(make_model, tmp_path):
    """A quantized Llama with biases, saved in a folder; returns (model, folder)."""
    model = make_model("llama", attention_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    quantize_model(model, config=CRVQConfig(dataset=None))
    model.save_pretrained(tmp_path / "saved")
    return model, tmp_path / "saved"


def test_sharded_checkpoint(make_model, tokens, tmp_path):
    model = quantize_model(make_model("llama"), config=CRVQConfig(dataset=None))
    model.save_pretrained(tmp_path, max_shard_size="6KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files_of_one_layer = {
        file for name, file in index["weight_map"].items() if name.startswith("model.layers.0.mlp.up")
    }
    assert len(files_of_one_layer) > 1
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), tokens), logits(model, tokens))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_moves_the_model_but_not_the_codebooks(make_model, tokens, tmp_path, dtype):
    model = quantize_model(make_model("opt"), config=CRVQConfig(dataset=None))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for name, layer in crvq_layers(loaded).items():
        original = model.get_submodule(name)
        for tensor, other in zip(layer.quantized_weight().tensors().values(),
                                 original.quantized_weight().tensors().values(), strict=True):  # fmt: skip
            assert tensor.dtype == other.dtype and torch.equal(tensor, other)
        assert layer.bias.dtype == dtype
    assert logits(loaded, tokens).dtype == dtype
    assert torch.equal(logits(model.to(dtype), tokens), logits(loaded, tokens))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_auto_is_the_dtype_it_was_saved_in(make_model, tmp_path, dtype):
    model = quantize_model(make_model("opt", dtype=dtype), config=CRVQConfig(dataset=None))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    layer = loaded.model.decoder.layers[0].fc1
    assert loaded.dtype == layer.bias.dtype == dtype
    assert layer.weight_codebooks.dtype == layer.weight_scale.dtype == torch.float16


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(saved, tokens, device_map):
    model, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


def test_offloading_a_block_to_disk(saved, tokens, tmp_path):
    model, folder = saved
    device_map = {"model.layers.0": "disk", "model.layers.1": "cpu", "lm_head": "cpu"}
    device_map |= dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb"], "cpu")
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    assert loaded.model.layers[0].mlp.up_proj.weight.is_meta
    # What is on disk is not tiled, so other code runs it.
    torch.testing.assert_close(logits(loaded, tokens), logits(model, tokens), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="needs the whole model on one device"):
        loaded.dequantize()


def test_other_heads_find_the_same_layers(saved, tokens):
    model, folder = saved
    names = list(crvq_layers(model))
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert list(crvq_layers(classifier)) == names
    assert type(classifier.score) is torch.nn.Linear
    base = AutoModel.from_pretrained(folder)
    assert list(crvq_layers(base)) == [name.removeprefix("model.") for name in names]
    with torch.no_grad():
        assert torch.equal(base(tokens).last_hidden_state, model.model(tokens).last_hidden_state)


def test_base_model_loads_with_a_head(make_model, tmp_path):
    base = quantize_model(make_model("llama").model, config=CRVQConfig(dataset=None))
    base.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert list(crvq_layers(loaded)) == [f"model.{name}" for name in crvq_layers(base)]


def test_tied_embeddings_stay_tied(make_model, tmp_path):
    model = quantize_model(make_model("llama", tie_word_embeddings=True), config=CRVQConfig(dataset=None))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_state_dict_without_files(saved, tokens):
    model, folder = saved
    config = AutoConfig.from_pretrained(folder)
    loaded = type(model).from_pretrained(None, config=config, state_dict=model.state_dict())
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


def test_generate_from_a_loaded_model(saved, tokens):
    model, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    expected = model.generate(tokens, max_new_tokens=4, do_sample=False)
    assert torch.equal(loaded.generate(tokens, max_new_tokens=4, do_sample=False), expected)


def test_layers_left_dense_come_back_dense(make_model, tokens, tmp_path):
    config = CRVQConfig(dataset=None, modules_to_not_convert=["layers.0", "down_proj"])
    model = quantize_model(make_model("llama"), config=config)
    assert all(name.startswith("model.layers.1.") and "down_proj" not in name for name in crvq_layers(model))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert list(crvq_layers(loaded)) == list(crvq_layers(model))
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    skipped = loaded.config.quantization_config.modules_to_not_convert
    assert {"lm_head", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"} < set(skipped)


def test_codes_of_eleven_bits_and_one_codebook(make_model, tokens, tmp_path):
    config = CRVQConfig(dataset=None, nbits_per_codebook=11, num_extended_codebooks=0, in_group_size=4)
    model = quantize_model(make_model("llama"), config=config)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    stored = loaded.state_dict()["model.layers.0.mlp.up_proj.weight"]
    assert stored.shape == (64, 11)  # 8 codes of 11 bits
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
