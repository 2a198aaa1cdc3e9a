"""Unfusing mixture-of-experts layers, and putting them together again."""

import copy
import logging

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import MergeModulelist, WeightConverter, WeightRenaming

from crvq_hf import CRVQConfig, CRVQLinear, quantize_model
from crvq_hf.modeling.experts import UnfusedExperts, find_fused_experts, fuse_experts_, unfuse_experts_
from crvq_hf.quantizer import CRVQQuantizer

pytestmark = pytest.mark.usefixtures("pipeline")

MODELS = ["mixtral", "qwen3_moe"]


@torch.no_grad()
def logits(model, tokens):
    return model(tokens, use_cache=False).logits


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_unfused_experts_compute_the_same(make_model, tokens, architecture, implementation):
    model = make_model(architecture)
    model.set_experts_implementation(implementation)
    expected = logits(model, tokens)
    assert unfuse_experts_(model) == {}
    experts = model.model.layers[1].mlp.experts
    assert isinstance(experts, UnfusedExperts) and not experts.training
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_module_alone(make_model, dtype):
    fused = make_model("mixtral", dtype=dtype).model.layers[0].mlp.experts
    fused.config._experts_implementation = "eager"
    x, weights = torch.randn(5, 32).to(dtype), torch.rand(5, 2)
    choice = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [2, 1]])  # expert 3 is idle
    with torch.no_grad():
        y = UnfusedExperts(fused)(x, choice, weights)
        tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(y, fused(x, choice, weights), rtol=tolerance, atol=1e-5)
    assert y.dtype == dtype


def test_the_number_past_the_last_expert_stands_for_none(make_model):
    experts = UnfusedExperts(make_model("mixtral").model.layers[0].mlp.experts)
    x = torch.randn(2, 32)
    with torch.no_grad():
        y = experts(x, torch.tensor([[4, 4], [1, 4]]), torch.ones(2, 2))
        one = experts(x[1:], torch.tensor([[1]]), torch.ones(1, 1))
    assert y[0].abs().sum() == 0 and torch.equal(y[1:], one)


def test_weights_are_not_copied_and_parameters_not_doubled(make_model):
    model = make_model("mixtral")
    fused = model.model.layers[0].mlp.experts
    count = sum(p.numel() for p in model.parameters())
    unfuse_experts_(model)
    experts = model.model.layers[0].mlp.experts
    start = fused.gate_up_proj.data_ptr()
    assert experts.get_submodule("0.gate_proj").weight.data_ptr() == start
    assert experts.get_submodule("0.up_proj").weight.data_ptr() == start + 64 * 32 * 4
    assert experts.get_submodule("1.gate_proj").weight.data_ptr() == start + 2 * 64 * 32 * 4
    assert sum(p.numel() for p in model.parameters()) == count


def test_fusing_again_gives_the_same_model(make_model, tokens):
    model = make_model("qwen3_moe")
    state = copy.deepcopy(model.state_dict())
    unfuse_experts_(model)
    assert "model.layers.0.mlp.experts.3.down_proj.weight" in model.state_dict()
    fuse_experts_(model)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert logits(model, tokens).isfinite().all()


def test_only_named_experts_are_unfused(make_model):
    model = make_model("mixtral")
    assert list(find_fused_experts(model)[0]) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    unfuse_experts_(model, ["model.layers.1.mlp.experts"])
    assert list(find_fused_experts(model)[0]) == ["model.layers.0.mlp.experts"]


def test_unknown_layout_is_left_alone_with_a_reason(caplog):
    config = transformers.GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    before = list(model.state_dict())
    with caplog.at_level(logging.WARNING, "crvq"):
        unknown = unfuse_experts_(model)
    assert list(unknown) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert "other parameters than gate_up_proj and down_proj" in unknown["model.layers.0.mlp.experts"]
    assert "Experts model.layers.0.mlp.experts stay dense: GptOssExperts has other" in caplog.text
    assert list(model.state_dict()) == before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m, "is_transposed", True), "transposed or interleaved"),
        (lambda m: setattr(m, "is_concatenated", False), "transposed or interleaved"),
        (lambda m: setattr(m, "has_gate", False), "not a gated experts module"),
        (lambda m: setattr(m, "has_bias", True), "other parameters"),
        (lambda m: m.add_module("norm", torch.nn.LayerNorm(4)), "submodules with parameters"),
        (lambda m: setattr(m, "down_proj", torch.nn.Parameter(torch.ones(4, 32, 10))), "does not fit"),
    ],
)
def test_reasons(make_model, change, reason):
    model = make_model("mixtral", num_hidden_layers=1)
    change(model.model.layers[0].mlp.experts)
    known, unknown = find_fused_experts(model)
    assert known == {} and reason in unknown["model.layers.0.mlp.experts"]


@pytest.mark.parametrize("architecture", MODELS)
def test_from_the_original_format_and_back(make_model, tokens, tmp_path, architecture):
    """Original checkpoint -> quantized on the fly -> saved -> loaded -> dequantized -> original format."""
    make_model(architecture).save_pretrained(tmp_path / "dense")
    original_names = set(load_file(tmp_path / "dense" / "model.safetensors"))
    config = CRVQConfig(dataset=None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    experts = [module for name, module in model.named_modules() if ".experts." in name and "_proj" in name]
    assert len(experts) == 24 and all(isinstance(module, CRVQLinear) for module in experts)
    assert not model.hf_quantizer.is_compileable
    model.save_pretrained(tmp_path / "crvq")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "crvq")
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))

    loaded.dequantize().save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == original_names
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert find_fused_experts(dense)[0]
    torch.testing.assert_close(logits(dense, tokens), logits(model, tokens), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("skip", ["experts", "down_proj", r"experts\.[01]"])
def test_experts_left_dense(make_model, tokens, tmp_path, skip):
    model = make_model("mixtral")
    quantize_model(model, config=CRVQConfig(dataset=None, modules_to_not_convert=[skip]))
    assert isinstance(model.model.layers[0].mlp.experts, UnfusedExperts) == (skip != "experts")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


def test_all_layers_share_the_config_of_the_model(make_model):
    model = make_model("mixtral")
    unfuse_experts_(model)
    assert model.model.layers[1].mlp.experts.skeleton[0].config is model.config
    assert all(p.is_meta for p in model.model.layers[1].mlp.experts.skeleton[0].parameters())


@pytest.mark.parametrize("pre_quantized", [False, True])
def test_stored_tensors_are_renamed_but_never_merged(pre_quantized):
    conversions = [
        WeightRenaming("block_sparse_moe", "mlp"),
        WeightConverter(["experts.*.w1.weight"], ["experts.gate_up_proj"], operations=[MergeModulelist(dim=0)]),
    ]
    kept = CRVQQuantizer(CRVQConfig(), pre_quantized=pre_quantized).update_weight_conversions(conversions)
    assert kept == (conversions[:1] if pre_quantized else conversions)
