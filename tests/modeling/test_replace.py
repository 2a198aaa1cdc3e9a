"""Which layers are chosen, and swapping them in and out."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from crvq_hf import CRVQConfig, CRVQLinear
from crvq_hf.modeling.replace import quantizable_linears, replace_with_crvq_, set_quantized_, to_dense
from crvq_hf.naming import is_named_by

LLAMA_BLOCK = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]


def test_chosen_are_the_linear_layers_of_the_blocks(make_model):
    model = make_model("llama")
    linears, skipped = quantizable_linears(model, CRVQConfig())
    attention, mlp = LLAMA_BLOCK
    expected = [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in attention]
    expected += [f"model.layers.{i}.mlp.{name}" for i in range(2) for name in mlp]
    assert sorted(linears) == sorted(expected) and skipped == {}
    assert all(model.get_submodule(name) is module for name, module in linears.items())


def test_conv1d_is_chosen(make_model):
    linears, _ = quantizable_linears(make_model("gpt2"), CRVQConfig())
    assert len(linears) == 8 and all(type(module) is Conv1D for module in linears.values())


def test_skipped_layers_and_why(make_model):
    class OddLinear(nn.Linear):
        def forward(self, input):
            return super().forward(input).relu()

    model = make_model("llama", num_hidden_layers=3)
    mlp = model.model.layers[0].mlp
    mlp.up_proj = OddLinear(32, 64)
    mlp.gate_proj = nn.Linear(36, 64)
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[2].mlp.up_proj.weight
    model.all_tied_weights_keys = {"model.layers.1.mlp.gate_proj.weight": "elsewhere.weight"}
    model._keep_in_fp32_modules_strict = {"o_proj"}
    linears, skipped = quantizable_linears(model, CRVQConfig(modules_to_not_convert=["layers.2.self_attn"]))

    reasons = {
        "model.layers.0.mlp.up_proj": "its class OddLinear",
        "model.layers.0.mlp.gate_proj": "36 input channels are no multiple of 8",
        "model.layers.1.mlp.up_proj": "shared with another module",
        "model.layers.2.mlp.up_proj": "shared with another module",
        "model.layers.1.mlp.gate_proj": "shared with another module",
        "model.layers.0.self_attn.o_proj": "keeps it in float32",
        "model.layers.1.self_attn.o_proj": "keeps it in float32",
    } | {f"model.layers.2.self_attn.{name}": "named in modules_to_not_convert" for name in LLAMA_BLOCK[0]}
    assert skipped.keys() == reasons.keys()
    assert all(reason in skipped[name] for name, reason in reasons.items())
    assert not linears.keys() & skipped.keys() and len(linears) + len(skipped) == 21


def test_layers_that_are_quantized_are_not_chosen_again(make_model, make_weight):
    model = make_model("llama")
    set_quantized_(model, "model.layers.0.mlp.up_proj", make_weight(32, 64))
    linears, skipped = quantizable_linears(model, CRVQConfig())
    assert "model.layers.0.mlp.up_proj" not in linears | skipped and len(linears) == 13


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("up_proj", True),
        ("mlp", True),
        ("layers.1", True),
        ("model.layers.1.mlp.up_proj", True),
        (r"layers\.\d+\.mlp", True),
        ("down_proj|up_proj", True),
        ("proj", False),
        ("layers.11", False),
        ("ayers.1", False),
        ("mlp.up", False),
    ],
)
def test_patterns_match_whole_components(pattern, matches):
    assert is_named_by("model.layers.1.mlp.up_proj", [pattern]) is matches
    assert is_named_by("model.layers.1.mlp.up_proj", ["lm_head", pattern]) is matches


@pytest.mark.parametrize("architecture", ["opt", "gpt2"])
def test_placeholders_on_the_meta_device(make_model, architecture):
    model = make_model(architecture, dtype=torch.bfloat16)
    config = CRVQConfig(nbits_per_codebook=5)
    linears, _ = quantizable_linears(model, config)
    replace_with_crvq_(model, linears, config)
    for name, dense in linears.items():
        layer = model.get_submodule(name)
        out_features, in_features = dense.weight.shape if architecture == "opt" else dense.weight.shape[::-1]
        assert isinstance(layer, CRVQLinear) and layer.conv1d == (architecture == "gpt2")
        assert layer.quantized_weight().shape == config.layer_shape(in_features, out_features)
        assert layer.weight.is_meta and layer.bias.is_meta and layer.bias.dtype == torch.bfloat16
        assert layer._is_hf_initialized and layer.weight._is_hf_initialized
        assert not hasattr(layer.weight_scale, "_is_hf_initialized")


def test_nothing_to_replace(make_model):
    with pytest.raises(ValueError, match="No layer of LlamaForCausalLM is to be quantized"):
        replace_with_crvq_(make_model("llama"), [], CRVQConfig())


@pytest.mark.parametrize(
    ("architecture", "name"), [("opt", "model.decoder.layers.0.fc1"), ("gpt2", "transformer.h.0.mlp.c_fc")]
)
def test_to_dense_computes_the_same(make_model, make_weight, architecture, name):
    model = make_model(architecture)
    dense = model.get_submodule(name)
    nn.init.normal_(dense.bias)
    layer = set_quantized_(model, name, make_weight(32, 64))
    assert model.get_submodule(name) is layer and layer.bias.data_ptr() == dense.bias.data_ptr()
    assert not layer.training

    back = to_dense(layer, torch.float32)
    assert type(back) is type(dense) and back.weight.shape == dense.weight.shape and not back.training
    assert back.weight.requires_grad and back.weight.is_contiguous()
    x = torch.randn(3, 32)
    torch.testing.assert_close(back(x), layer(x))
    assert to_dense(layer, torch.float16).bias.dtype == torch.float16


class Written(nn.Linear):
    """As FalconLinear."""

    def forward(self, input):
        hidden = input @ self.weight.T
        return hidden if self.bias is None else hidden + self.bias


class Clipped(nn.Linear):
    def forward(self, input):
        return super().forward(input.clamp(-10, 10))


class Scaled(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 1.01


class Two(nn.Linear):
    def forward(self, input, other):
        return super().forward(input + other)


class Buffered(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("zero", torch.zeros(()))


class Bare(nn.Linear):
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "chosen"),
    [(Written, True), (Bare, True), (Clipped, False), (Scaled, False), (Two, False), (Buffered, False)],
)
def test_subclasses_are_tested_by_running_them(make_model, kind, chosen, dtype):
    model = make_model("llama", dtype=dtype)
    model.model.layers[0].mlp.up_proj = kind(32, 64).to(dtype)
    random = torch.random.get_rng_state()
    linears, skipped = quantizable_linears(model, CRVQConfig())
    name = "model.layers.0.mlp.up_proj"
    assert (name in linears, name in skipped) == (chosen, not chosen)
    assert torch.equal(torch.random.get_rng_state(), random)


def test_falcon():
    from transformers import FalconConfig

    config = FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    linears, skipped = quantizable_linears(AutoModelForCausalLM.from_config(config), CRVQConfig())
    assert skipped == {} and [name.rpartition(".")[2] for name in linears] == [
        "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h",
    ]  # fmt: skip
