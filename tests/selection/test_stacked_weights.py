"""Parameters that hold many matrices: found by what a model does with them, quantized, saved, and whole again."""

import copy
import logging

import pytest
import torch
from shrink import tiny_model
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DbrxConfig
from whole_models import come_back_dense

from crvq_hf import CRVQConfig, CRVQLinear, quantize_model
from crvq_hf.modeling.stacks import IN_OUT, OUT_IN, StackedLinears, fuse_stacks_, unfuse_stacks_
from crvq_hf.selection.stacked_weights import find_stacks

CONFIG = CRVQConfig(dataset=None, nbits_per_codebook=4)


def by_linear(x, w):
    return sum(F.linear(x, w[i]) for i in range(4))


def by_linear_with_bias(x, w):
    return sum(F.linear(x, w[torch.tensor(i)], torch.ones(32)) for i in range(4))


def by_matmul(x, w):
    return sum(x @ w[i] for i in range(4))


def by_transposed(x, w):
    return sum(x.matmul(w[i].T) for i in range(4)) + torch.matmul(x, w.transpose(1, 2)[0])


def by_bmm(x, w):
    states = x.reshape(1, -1, 32).expand(w.shape[0], -1, -1)
    return torch.bmm(states, w).sum(0).view(x.shape)


def by_bmm_transposed(x, w):
    return torch.bmm(x.reshape(1, -1, 32).repeat(4, 1, 1), w.mT).sum(0).view(x.shape)


def by_matmul_of_all(x, w):
    return torch.matmul(x.reshape(1, -1, 32), w).sum(0).view(x.shape)


def by_view(x, w):
    return sum(F.linear(x, w.view(-1, 32, 32)[i]) for i in range(4))


def by_einsum(x, w):
    return torch.einsum("bsh,eho->bso", x, w)


def by_number(x, w):
    return by_matmul(x, w) * w.mean()


def by_both(x, w):
    return by_matmul(x, w) + by_linear(x, w)


def as_a_sum(x, w):
    return x @ w.sum(0)


FOUND = {
    by_linear: OUT_IN,
    by_linear_with_bias: OUT_IN,
    by_matmul: IN_OUT,
    by_transposed: OUT_IN,
    by_bmm: IN_OUT,
    by_bmm_transposed: OUT_IN,
    by_matmul_of_all: IN_OUT,
    by_view: OUT_IN,
    by_einsum: None,
    by_number: None,
    by_both: None,
    as_a_sum: None,
}


class Grouped(nn.Linear):
    """A linear layer that multiplies each group of channels by a matrix of its own, as DeepSeek-V4's."""

    def forward(self, x):
        groups = x.unflatten(-1, (4, -1)).flatten(0, 1).transpose(0, 1)
        out = torch.bmm(groups, self.weight.view(4, -1, 16).transpose(1, 2))
        return out.transpose(0, 1).flatten(1).unflatten(0, x.shape[:-1])


def test_a_linear_layer_of_groups(make_model, quantize, tokens):
    model = make_model("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj = Grouped(16, 32, bias=False)
    model = quantize(model, dataset="self")
    weight = model.model.layers[0].mlp.down_proj.weight
    assert isinstance(weight, StackedLinears) and weight.stack == (4, 8, 16)
    assert all(isinstance(layer, CRVQLinear) for layer in weight.layers)
    assert "model.layers.0.mlp.down_proj" not in model.config.quantization_config.modules_to_not_convert
    found = logits(model, tokens)
    torch.testing.assert_close(logits(model.dequantize(), tokens), found, rtol=1e-3, atol=1e-4)


class Stacked(nn.Module):
    def __init__(self, mlp, use):
        super().__init__()
        self.mlp, self.use = mlp, use
        self.table = nn.Parameter(torch.randn((128, 32) if use is by_view else (4, 32, 32)) / 10)

    def forward(self, x):
        return self.mlp(x) + self.use(x, self.table)


@pytest.fixture
def stacked(make_model):
    def make(use):
        model = make_model("llama")
        for layer in model.model.layers:
            layer.mlp = Stacked(layer.mlp, use)
        return model

    return make


@torch.no_grad()
def logits(model, tokens):
    return model(tokens, use_cache=False).logits


def never(name):
    return False


@pytest.mark.parametrize("use", FOUND, ids=lambda use: use.__name__)
def test_how_a_parameter_is_multiplied_by(stacked, tokens, use):
    model = stacked(use)
    expected, state = logits(model, tokens), copy.deepcopy(model.state_dict())
    found = find_stacks(model, never)
    assert list(model.state_dict()) == list(state) and torch.equal(logits(model, tokens), expected)
    names = [f"model.layers.{index}.mlp.table" for index in range(2)]
    assert found == ({name: (torch.Size([4, 32, 32]), FOUND[use]) for name in names} if FOUND[use] else {})
    unfuse_stacks_(model, found)
    torch.testing.assert_close(logits(model, tokens), expected)
    fuse_stacks_(model)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dataset", [None, "self"])
@pytest.mark.parametrize("use", [by_matmul, by_view, by_bmm_transposed, by_einsum], ids=lambda use: use.__name__)
def test_stacks_are_quantized(stacked, quantize, tokens, caplog, use, dataset):
    with caplog.at_level(logging.WARNING, "crvq"):
        model = quantize(stacked(use), dataset=dataset)
    table = model.model.layers[1].mlp.table
    assert isinstance(table, StackedLinears) == bool(FOUND[use])
    assert ("mlp.table of 2 block(s) stays dense, 30.8 %" in caplog.text) != bool(FOUND[use])
    if FOUND[use]:
        assert all(isinstance(layer, CRVQLinear) for layer in table.layers) and len(table.layers) == 4
        assert not model.hf_quantizer.is_compileable
    found = logits(model, tokens)
    dense = model.dequantize()
    assert isinstance(dense.model.layers[1].mlp.table, nn.Parameter)
    torch.testing.assert_close(logits(dense, tokens), found, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("leave", ["table", r"layers.1", r"table\.linears_transposed\.[01]"])
def test_named_ones_stay_dense(stacked, leave):
    config = CRVQConfig(dataset=None, nbits_per_codebook=4, modules_to_not_convert=[leave])
    model = quantize_model(stacked(by_matmul), config=config)
    table = model.model.layers[1].mlp.table
    assert isinstance(table, StackedLinears) == (leave not in ("table", "layers.1"))
    if isinstance(table, StackedLinears):
        assert [isinstance(layer, CRVQLinear) for layer in table.layers] == [False, False, True, True]


def dbrx():
    attention = {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}
    experts = {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32}
    config = DbrxConfig(
        vocab_size=320, d_model=32, n_heads=4, n_layers=2, max_seq_len=64, attn_config=attention, ffn_config=experts
    )
    return AutoModelForCausalLM.from_config(config).eval()


MODELS = {"dbrx": dbrx} | {
    name: lambda name=name: tiny_model(name, AutoModelForCausalLM) for name in ("llama4_text", "jetmoe")
}


@pytest.mark.parametrize("skip", [None, [r"[^.]*\.linears[^.]*\.1"]])
@pytest.mark.parametrize("architecture", MODELS)
def test_models_with_stacks_come_back(tmp_path, tokens, architecture, skip):
    model = MODELS[architecture]()
    names = model.state_dict().keys()
    expected = logits(model, tokens)
    quantize_model(model, config=CRVQConfig(dataset=None, nbits_per_codebook=4, modules_to_not_convert=skip))
    assert [module for module in model.modules() if isinstance(module, StackedLinears)]
    assert model.crvq_report["dense_share"] < (0.02 if skip is None else 0.4)
    dense = come_back_dense(model, names, tokens, tmp_path)
    dense.save_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(again, tokens), logits(dense, tokens)) and expected.shape == logits(again, tokens).shape


def test_what_is_not_supported_says_so(stacked, tokens):
    model = stacked(by_matmul)
    unfuse_stacks_(model, find_stacks(model, never))
    table = model.model.layers[0].mlp.table
    with pytest.raises(TypeError, match="sum of quantized weights is not supported; call model.dequantize"):
        torch.sum(table)
    with pytest.raises(ValueError, match="cannot be seen as"):
        table.view(8, -1)
    assert table.size(0) == 4 and table.shape == table.view(4, 32, -1).shape and table.device.type == "cpu"
