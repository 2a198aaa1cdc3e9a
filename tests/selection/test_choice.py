"""What stays dense because of what the rest of the model does, or because codes would take too much; and saying so."""

import logging

import pytest
import torch
from shrink import tiny_model
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from crvq_hf import CRVQConfig, CRVQLinear, quantize_model
from crvq_hf.selection.choice import choose_layers, dense_share
from crvq_hf.selection.trial import try_out

CONFIG = CRVQConfig(dataset=None, nbits_per_codebook=4)
FIRST = "model.layers.0.mlp.up_proj"


class Reading(nn.Module):
    """An MLP that does `use` with its own layers' weights."""

    def __init__(self, mlp, use):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.use = use

    def forward(self, x):
        return self.down_proj(self.use(self, x))


def dtype_of(mlp, x):
    return mlp.up_proj(x.to(mlp.up_proj.weight.dtype))


def linear_of(mlp, x):
    return F.linear(x, mlp.up_proj.weight)


def times(mlp, x):
    return (mlp.up_proj.weight @ x.mT).mT


def shape_of(mlp, x):
    return mlp.up_proj(x)[..., : mlp.up_proj.weight.shape[0]]


def device_of(mlp, x):
    return mlp.up_proj(x.to(mlp.up_proj.weight.device))


def by_forward(mlp, x):
    return mlp.up_proj.forward(x)


def with_cache_only(mlp, x):
    return linear_of(mlp, x) if x.shape[1] == 1 else mlp.up_proj(x)


USES = {dtype_of: True, linear_of: True, times: True, shape_of: True, with_cache_only: True}
USES |= {device_of: False, by_forward: False}


@pytest.fixture
def reading(make_model):
    def make(use, dtype=torch.float32):
        model = make_model("llama", dtype=dtype)
        model.model.layers[0].mlp = Reading(model.model.layers[0].mlp, use)
        return model

    return make


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_weights_read_by_other_code(reading, caplog, use):
    model = reading(use)
    classes = [type(module) for module in model.modules()]
    with caplog.at_level(logging.WARNING, "crvq"):
        config, rows = choose_layers(model, CONFIG)
    assert [type(module) for module in model.modules()] == classes and rows == set()
    # All of a kind stay dense, also in blocks where nothing reads them.
    expected = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"] if USES[use] else []
    assert (config.modules_to_not_convert or []) == expected
    assert ("mlp.up_proj of 2 block(s) stays dense, 22.2 % of the weights" in caplog.text) == USES[use]
    assert CONFIG.modules_to_not_convert is None


@pytest.mark.parametrize("dataset", [None, "self"])
@pytest.mark.parametrize("use", [linear_of, device_of], ids=lambda use: use.__name__)
def test_such_models_are_quantized_and_come_back(reading, quantize, tokens, use, dataset):
    model = quantize(reading(use), dataset=dataset)
    assert isinstance(model.get_submodule(FIRST), CRVQLinear) == (use is device_of)
    assert isinstance(model.model.layers[0].mlp.down_proj, CRVQLinear)
    with torch.no_grad():
        found = model(tokens, use_cache=False).logits
        dense = model.dequantize()(tokens, use_cache=False).logits
    torch.testing.assert_close(found, dense, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("use", "kept"),
    [(lambda w: w.dtype, False), (lambda w: w.shape, False), (lambda w: w[1], False), (lambda w: w * 1, True)],
)
@pytest.mark.parametrize(("bits", "kind"), [(8, "Int8"), (2.5, "Coded")])
def test_heads_and_embeddings(make_model, caplog, use, kept, bits, kind):
    """Their dtype is answered; if their numbers are read, they stay as they are."""
    model = make_model("llama", tie_word_embeddings=False)
    model.lm_head.register_forward_pre_hook(lambda module, args: None)
    forward = model.forward
    model.forward = lambda *args, **kwargs: (use(model.lm_head.weight), forward(*args, **kwargs))[1]
    rows = {"lm_head": model.lm_head, "model.embed_tokens": model.model.embed_tokens}
    assert try_out(model, {}, rows).read == ({"lm_head"} if kept else set())
    quantize_model(model, config=CRVQConfig(dataset=None, nbits_per_codebook=4, embedding_bits=bits))
    assert (type(model.lm_head) is nn.Linear) == kept
    assert type(model.model.embed_tokens).__name__ == f"{kind}Embedding"


@pytest.mark.parametrize(("bits", "kind"), [(8, "Int8Head"), (2.5, "CodedHead")])
@pytest.mark.parametrize("architecture", ["mamba2", "xlstm", "hy_v4"])
def test_logits_of_models_that_ask_their_head_for_its_dtype(pipeline, tokens, architecture, bits, kind):
    model = tiny_model(architecture, AutoModelForCausalLM)
    quantize_model(model, config=CRVQConfig(dataset=None, nbits_per_codebook=4, embedding_bits=bits))
    assert type(model.lm_head).__name__ == kind
    with torch.no_grad():
        found = model(tokens, use_cache=False).logits
        dense = model.dequantize()(tokens, use_cache=False).logits
    assert found.abs().max() > 0
    torch.testing.assert_close(found, dense, rtol=1e-2, atol=1e-3 * float(dense.abs().max()))


class Routed(nn.Module):
    """A mixture of experts with a router of plain linears and a gate of one output."""

    def __init__(self, mlp, choose):
        super().__init__()
        self.choice = nn.Linear(32, 8, bias=False)
        self.shared_gate = nn.Linear(32, 1, bias=False)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(8))
        self.dense = mlp
        self.choose = choose

    def forward(self, x):
        scores = self.choose(self.choice(x))
        out = torch.stack([expert(x) for expert in self.experts], -2)
        return (out * scores[..., None]).sum(-2) + self.dense(x) * self.shared_gate(x).sigmoid()


def top_k(logits):
    probabilities = (logits.softmax(-1) + 0.1) * 2
    return torch.zeros_like(logits).scatter(-1, probabilities.topk(2).indices, 1)


def grouped(logits):
    best = logits.view(*logits.shape[:-1], 2, 4).sigmoid().sort(-1, descending=True).indices[..., :1]
    return torch.zeros(*logits.shape[:-1], 2, 4).scatter(-1, best, 1).flatten(-2)


def switch(logits):
    return F.one_hot(logits.argmax(-1), 8).float()


@pytest.mark.parametrize("choose", [top_k, grouped, switch, torch.sigmoid], ids=lambda choose: choose.__name__)
def test_what_chooses_experts_stays_dense(make_model, quantize, caplog, choose):
    model = make_model("llama")
    model.model.layers[1].mlp = Routed(model.model.layers[1].mlp, choose)
    with caplog.at_level(logging.WARNING, "crvq"):
        quantize(model, dataset=None)
    mlp = model.model.layers[1].mlp
    assert type(mlp.shared_gate) is nn.Linear and "would take more than 4 bits per weight" in caplog.text
    assert (type(mlp.choice) is nn.Linear) == (choose is not torch.sigmoid)
    assert all(isinstance(expert, CRVQLinear) for expert in mlp.experts)
    assert caplog.text.count("it chooses experts") == (choose is not torch.sigmoid)
    recorded = model.config.quantization_config.modules_to_not_convert
    assert "model.layers.1.mlp.shared_gate" in recorded
    assert ("model.layers.1.mlp.choice" in recorded) == (choose is not torch.sigmoid)


def test_costly_layers_count_their_codebooks_but_in_toys(make_model):
    large = make_model("llama", hidden_size=512, intermediate_size=1024, num_hidden_layers=1)
    large.model.layers[0].mlp.narrow = nn.Linear(512, 8)  # 4 kB of codebooks for 4096 weights
    config, _ = choose_layers(large, CRVQConfig(dataset=None))
    assert config.modules_to_not_convert == ["model.layers.0.mlp.narrow"]
    toy, _ = choose_layers(make_model("llama"), CRVQConfig(dataset=None))
    assert toy.modules_to_not_convert is None


def test_a_budget_is_spent_on_what_is_quantized(make_model):
    model = make_model("llama", hidden_size=512, intermediate_size=1024, num_hidden_layers=1)
    model.model.layers[0].mlp.narrow = nn.Linear(512, 2)
    config, _ = choose_layers(model, CRVQConfig(dataset=None, bits=2.5))
    assert config.bits is None and config.modules_to_not_convert == ["model.layers.0.mlp.narrow"]


class Strange(nn.Module):
    def __init__(self, mlp, sizes):
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(32, size) / 100) for size in sizes)
        self.mlp = mlp

    def forward(self, x):
        return self.mlp(x) + sum((x @ weight).sum(-1, keepdim=True) for weight in self.weights)


@pytest.mark.parametrize(("sizes", "said"), [([64], True), ([3, 3, 3], True), ([3], False)])
def test_parameters_that_stay_dense_are_named_with_their_share(make_model, quantize, caplog, sizes, said):
    model = make_model("llama")
    for layer in model.model.layers:
        layer.mlp = Strange(layer.mlp, sizes)
    with caplog.at_level(logging.WARNING, "crvq"):
        quantize(model, dataset=None)
    share = 32 * sum(sizes) / (32 * sum(sizes) + 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64)
    lines = [record.message for record in caplog.records if "mlp.weights" in record.message]
    assert len(lines) == said and model.crvq_report["dense_share"] == pytest.approx(share)
    if said:
        assert lines[0].startswith("mlp.weights of 2 block(s) stays dense") and "ParameterList" in lines[0]


def test_share_before_and_after(make_model, quantize):
    model = make_model("llama")
    before = dense_share(model, [m for n, m in model.named_modules() if n.endswith("_proj") and "self_attn" not in n])
    assert before == pytest.approx(1 / 3)
    assert quantize(model, dataset=None, modules_to_not_convert=["self_attn"]).crvq_report["dense_share"] == before


def test_a_model_that_cannot_be_run_is_said_to_be_untried(make_model, caplog):
    model = make_model("llama")

    def forward(*args, **kwargs):
        raise TypeError("pixel_values are missing")

    model.forward = forward
    with caplog.at_level(logging.WARNING, "crvq"):
        config, _ = choose_layers(model, CONFIG)
    assert "could not be run on a few tokens (TypeError: pixel_values are missing)" in caplog.text
    assert config.modules_to_not_convert is None


def test_nothing_to_quantize_names_the_reasons(make_model):
    with pytest.raises(ValueError, match="no layer to quantize; .*no multiple of 16.* in_group_size"):
        choose_layers(make_model("llama", hidden_size=40, intermediate_size=40), CRVQConfig(in_group_size=16))


def test_a_failed_run_leaves_no_flag(make_model):
    model = make_model("llama")
    with pytest.raises(ValueError, match="no layer to quantize"):
        quantize_model(model, config=CRVQConfig(dataset=None, modules_to_not_convert=["model"]))
    assert not model.config._is_quantized and model.float() is model


def test_the_code_is_read_where_a_model_cannot_be_run_on_text():
    """The encoder of Pix2Struct casts to `self.wo.weight.dtype`, and takes pictures alone."""
    model = tiny_model("pix2struct", AutoModelForImageTextToText)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = try_out(model, linears, {})
    assert found.failure
    assert {name.rpartition(".")[2] for name in found.read} == {"wo"}
