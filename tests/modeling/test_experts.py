"""Unfusing mixture-of-experts layers, and putting them together again."""

import copy
import itertools
import logging
from inspect import signature

import pytest
import torch
from safetensors.torch import load_file
from shrink import tiny_model
from transformers import AutoModelForCausalLM, MixtralConfig
from transformers.core_model_loading import MergeModulelist, WeightConverter, WeightRenaming
from transformers.initialization import normal_
from transformers.integrations.moe import use_experts_implementation
from whole_models import come_back_dense

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


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m, "is_transposed", True), "does not fit"),
        (lambda m: setattr(m, "has_gate", False), "other parameters"),
        (lambda m: setattr(m, "has_bias", True), "other parameters"),
        (lambda m: m.add_module("norm", torch.nn.LayerNorm(4)), "submodules with parameters"),
        (lambda m: setattr(m, "down_proj", torch.nn.Parameter(torch.ones(4, 32, 10))), "does not fit"),
    ],
)
def test_unknown_layouts_are_left_alone_with_a_reason(make_model, caplog, change, reason):
    model = make_model("mixtral")
    for layer in model.model.layers:
        change(layer.mlp.experts)
    before = list(model.state_dict())
    assert find_fused_experts(model)[0] == {}
    with caplog.at_level(logging.WARNING, "crvq"):
        unknown = unfuse_experts_(model)
    assert reason in unknown["model.layers.0.mlp.experts"] and len(unknown) == 2
    assert caplog.text.count("Experts model.layers.mlp.experts stay dense: ") == 1
    assert list(model.state_dict()) == before


def test_experts_that_two_modules_share_stay_fused(make_model, tokens):
    """DiffusionGemma's encoder and decoder have the same weights."""
    model = make_model("mixtral")
    first, second = (layer.mlp.experts for layer in model.model.layers)
    second.down_proj = first.down_proj
    known, unknown = find_fused_experts(model)
    assert known == {} and "shared with another module" in unknown["model.layers.1.mlp.experts"]
    meta = make_model("mixtral")
    meta.all_tied_weights_keys = {"model.layers.0.mlp.experts.down_proj": "elsewhere.down_proj"}
    assert list(find_fused_experts(meta)[0]) == ["model.layers.1.mlp.experts"]


LAYOUTS = list(itertools.product([False, True], repeat=5))


@pytest.mark.parametrize(("transposed", "interleaved", "bias", "gate", "norm"), LAYOUTS)
def test_every_layout_computes_the_same_and_comes_back(transposed, interleaved, bias, gate, norm):
    """All that the decorator of transformers' experts can say about them."""

    class Experts(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            rows = 2 * 24 if gate else 24
            shapes = {("gate_up_proj" if gate else "up_proj"): (rows, 32), "down_proj": (32, 24)}
            for name, (out, size) in shapes.items():
                shape = (4, size, out) if transposed else (4, out, size)
                self.register_parameter(name, torch.nn.Parameter(torch.randn(shape) / 5))
                if bias:
                    self.register_parameter(f"{name}_bias", torch.nn.Parameter(torch.randn(4, out)))
            self.act_fn = torch.nn.SiLU()
            self.num_experts = 4
            if norm:
                self.post_expert_norm = torch.nn.LayerNorm(32)

        if interleaved:

            def _apply_gate(self, gate_up):
                return self.act_fn(gate_up[..., ::2]) * (gate_up[..., 1::2] + 1)

        def forward(self, hidden_states, top_k_index, top_k_weights):
            raise AssertionError("only transformers' own implementations are run")

    options = {"has_post_expert_norm": norm} if norm else {}
    if norm and "has_post_expert_norm" not in signature(use_experts_implementation).parameters:
        pytest.skip("this transformers knows no experts that end in a norm")
    decorate = use_experts_implementation(
        is_transposed=transposed, is_concatenated=not interleaved, has_bias=bias, has_gate=gate, **options
    )
    config = MixtralConfig()
    config._experts_implementation = "batched_mm"
    holder = torch.nn.Module()
    holder.experts = decorate(Experts)(config)
    x, weights = torch.randn(5, 32), torch.rand(5, 2)
    choice = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [2, 1]])
    state = copy.deepcopy(holder.state_dict())
    with torch.no_grad():
        expected = holder.experts(x, choice, weights)
        assert unfuse_experts_(holder) == {}
        layers = [module for module in holder.modules() if isinstance(module, torch.nn.Linear)]
        assert len(layers) == 4 * (3 if gate else 2) and all((layer.bias is not None) == bias for layer in layers)
        torch.testing.assert_close(holder.experts(x, choice, weights), expected, rtol=1e-4, atol=1e-5)
        fuse_experts_(holder)
        assert torch.equal(holder.experts(x, choice, weights), expected)
    assert holder.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in holder.state_dict().items())


def test_what_is_asked_of_the_fused_module_is_answered(make_model):
    """Qwen3-Omni's `_init_weights` draws numbers into `experts.gate_up_proj`."""
    model = make_model("mixtral")
    shape = model.model.layers[0].mlp.experts.gate_up_proj.shape
    unfuse_experts_(model)
    experts = model.model.layers[0].mlp.experts
    assert experts.gate_up_proj.is_meta and experts.gate_up_proj.shape == shape
    normal_(experts.gate_up_proj)
    assert not hasattr(experts, "nothing") and copy.deepcopy(experts).num_experts == 4


@pytest.mark.parametrize("architecture", ["gpt_oss", "aria_text", "nemotron_h"])
def test_models_whose_experts_lie_otherwise(tmp_path, tokens, architecture):
    model = tiny_model(architecture, AutoModelForCausalLM)
    names = model.state_dict().keys()
    quantize_model(model, config=CRVQConfig(dataset=None, nbits_per_codebook=4))
    assert find_fused_experts(model)[0] == {} and model.crvq_report["dense_share"] < 0.1
    experts = next(module for module in model.modules() if isinstance(module, UnfusedExperts))
    assert all(isinstance(layer, CRVQLinear) for layer in experts.get_submodule("0").children())
    come_back_dense(model, names, tokens, tmp_path)


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
