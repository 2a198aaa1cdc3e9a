"""Whole models: what is replaced and what is not, and what layers are fitted on."""

import json
import logging
from collections import defaultdict

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D
from whole_models import ARCHITECTURES, FIELDS, OFF, equal_state, logits_of, make, quantized_layers, tokens_for

from crvq_hf import CRVQConfig, CRVQLinear
from crvq_hf.blocks.finding import find_blocks, linear_stages
from crvq_hf.blocks.rehearsal import rehearse
from crvq_hf.blocks.runner import Gave, State
from crvq_hf.calibration.tokens import calibration_tokens
from crvq_hf.modeling.experts import unfuse_experts_
from crvq_hf.pipeline import block_loop as pipeline
from crvq_hf.pipeline import quantize_block

pytestmark = pytest.mark.usefixtures("precision", "quiet")

# What shares an input


def test_stages_of_a_block_follow_its_data():
    model = make("qwen3_moe", num_experts=6, num_experts_per_tok=1)
    unfuse_experts_(model)
    runner = rehearse(model)
    three = {"input_ids": tokens_for(model, (1, 3))}  # which reach at most three of the six experts
    arguments = runner.arguments(0, State(three))
    names = [n for n, m in runner.blocks[0].named_modules() if type(m) is nn.Linear]
    stages = linear_stages(runner.blocks[0], names, lambda: runner.call(0, arguments))
    assert [set(name.split(".")[-1] for group in stage for name in group) for stage in stages] == [
        {"q_proj", "k_proj", "v_proj"},
        {"o_proj"},
        {"gate_proj", "up_proj"},
        {"down_proj"},
    ]
    assert sorted(name for stage in stages for group in stage for name in group) == sorted(names)
    assert stages[0] == [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]]
    reached = [group for group in stages[2] if len(group) == 2]
    assert 1 <= len(reached) <= 3 and all(a.replace("gate", "up") == b for a, b in reached)
    assert all(len(group) == 1 for group in stages[3])


# What becomes of a model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_linears_of_the_blocks_are_replaced_and_nothing_else(architecture, quantize):
    model, original = make(architecture), make(architecture)
    unfuse_experts_(original)
    tokens = tokens_for(model)
    quantize(model, nbits_per_codebook=6)
    _, blocks = find_blocks(model)
    dense = {n for n, m in original.named_modules() if type(m) in (nn.Linear, Conv1D)} - {"lm_head"}
    assert quantized_layers(model).keys() == dense
    assert not any(isinstance(m, (nn.Linear, Conv1D)) and not isinstance(m, CRVQLinear) for m in blocks.modules())
    block_names = {name for name, _ in model.named_parameters() if name.startswith(find_blocks(model)[0] + ".")}
    before, after = dict(original.named_parameters()), dict(model.named_parameters())
    outside = after.keys() - block_names
    assert outside and all(torch.equal(before[name], after[name]) for name in outside)
    router = [name for name in block_names if name.endswith("mlp.gate.weight")]
    assert all(torch.equal(before[name], after[name]) for name in router)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (
        original.get_output_embeddings().weight is original.get_input_embeddings().weight
    )
    for name, layer in quantized_layers(model).items():
        layer.quantized_weight().check(name)
        assert layer.conv1d == (architecture == "gpt2")
    assert not any(module._forward_pre_hooks or "forward" in module.__dict__ for module in model.modules())
    assert not any(module.training for module in model.modules())
    logits, expected = logits_of(model, tokens), logits_of(original, tokens)
    assert logits.isfinite().all()
    assert (logits - expected).norm() < 0.9 * (expected - expected.mean()).norm()


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_the_report_counts_stored_bytes(architecture, quantize):
    model = quantize(make(architecture))
    report, layers = model.crvq_report, quantized_layers(model)
    assert report["layers"].keys() == layers.keys()
    bits = weights = 0
    for name, layer in layers.items():
        own = sum(t.numel() * t.element_size() * 8 for t in layer.quantized_weight().tensors().values())
        assert report["layers"][name]["bits_per_weight"] == pytest.approx(own / layer.in_features / layer.out_features)
        assert 0 <= report["layers"][name]["relative_error"] < 1
        bits, weights = bits + own, weights + layer.in_features * layer.out_features
    assert report["bits_per_weight"] == pytest.approx(bits / weights)
    assert report["calibration_tokens"] == 96 and report["e2e_tokens"] == 160
    assert report["activation_bytes"] == (96 + 160) * 32 * 4
    passed = {phase: speed * report["seconds"][phase] for phase, speed in report["tokens_per_second"].items()}
    assert passed == pytest.approx({"hessians": 96, "block fine-tuning": 96, "end-to-end fine-tuning": 160})
    assert report["peak_memory_bytes"] > 10**7 and report["e2e_loss"].keys() == {"first", "last"}
    assert all(seconds >= 0 for seconds in report["seconds"].values())
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize("bfloat16", [False, True], ids=["fp32 products", "bf16 products"])
@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        ("llama", torch.bfloat16),
        ("llama", torch.float16),
        ("gpt2", torch.bfloat16),
        ("opt", torch.bfloat16),
        ("gemma3_text", torch.bfloat16),
    ],
    ids=str,
)
def test_a_half_precision_model_keeps_its_dtypes(architecture, dtype, bfloat16, quantize, precision):
    precision(bfloat16)
    model = quantize(make(architecture, dtype))
    original = make(architecture, dtype)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not name.endswith(("weight_codebooks", "weight_scale")):
            assert parameter.dtype == dtype, name
    for name, buffer in model.named_buffers():
        assert buffer.dtype == original.get_buffer(name).dtype, name
    assert model.dtype == dtype
    assert torch.equal(model.get_input_embeddings().weight, original.get_input_embeddings().weight)
    assert logits_of(model, tokens_for(model)).dtype == dtype


def test_buffers_of_a_block_keep_their_dtype(quantize):
    model = make("llama", torch.bfloat16)
    model.model.layers[1].register_buffer("factor", torch.full((3,), 0.5, dtype=torch.bfloat16))
    quantize(model, **OFF)
    assert model.model.layers[1].factor.dtype == torch.bfloat16


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_every_kind_of_attention_mask(architecture, attention, quantize):
    """Eager attention and sliding windows have masks of the batch's size."""
    model = quantize(make(architecture, attention=attention), nbits_per_codebook=5)
    assert logits_of(model, tokens_for(model)).isfinite().all()


@pytest.mark.parametrize(
    "fields",
    [
        {"in_group_size": 4, "nbits_per_codebook": 6},
        {"in_group_size": 16, "nbits_per_codebook": 10, "num_extended_codebooks": 1},
        {"num_extended_codebooks": 0},
        {"critical_ratio": 0.0},
        {"critical_ratio": 0.5, "num_extended_codebooks": 7},
        {"importance": "weight"},
        {"importance": "random"},
        {"dataset": None, "in_group_size": 4, "nbits_per_codebook": 10},
    ],
    ids=str,
)
def test_settings(fields, quantize):
    model = quantize(make("llama", num_hidden_layers=1), **fields)
    config = CRVQConfig(**FIELDS | fields)
    for name, layer in quantized_layers(model).items():
        layer.quantized_weight().check(name)
        assert layer.quantized_weight().shape == config.layer_shape(layer.in_features, layer.out_features)
    assert logits_of(model, tokens_for(model)).isfinite().all()


def test_without_calibration_only_weights_count(quantize, monkeypatch):
    seen, fit_weight = [], quantize_block.fit_weight
    monkeypatch.setattr(quantize_block, "fit_weight", lambda w, h, **more: seen.append(h) or fit_weight(w, h, **more))
    model, original = quantize(make("llama"), dataset=None), make("llama")
    assert len(seen) == 14 and all(torch.equal(hessian, torch.eye(len(hessian))) for hessian in seen)
    report = model.crvq_report
    assert report["calibration_tokens"] == report["activation_bytes"] == 0 and report["e2e_loss"] is None
    assert report["tokens_per_second"] == {}
    for name, layer in quantized_layers(model).items():
        weight = original.get_submodule(name).weight.detach()
        error = (layer.dequantize(torch.float32) - weight).square().sum() / weight.square().sum()
        assert float(error) == pytest.approx(report["layers"][name]["relative_error"], rel=0.01)
    assert torch.equal(model.model.layers[0].input_layernorm.weight, original.model.layers[0].input_layernorm.weight)


def test_a_block_may_stay_dense(quantize):
    model, original = quantize(make("llama"), modules_to_not_convert=["layers.0", "up_proj"]), make("llama")
    assert len(quantized_layers(model)) == 6
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, original.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, original.model.layers[1].mlp.up_proj.weight)
    again = quantize(make("llama"), modules_to_not_convert=["layers.0", "up_proj"])
    assert equal_state(model, again)


def test_nothing_to_quantize_is_refused(quantize):
    with pytest.raises(ValueError, match="has no layer to quantize; check modules_to_not_convert"):
        quantize(make("llama"), modules_to_not_convert=["layers"])


def test_a_pattern_that_matches_nothing_is_reported_once(quantize, caplog):
    with caplog.at_level(logging.WARNING, "crvq"):
        quantize(make("llama"), dataset=None, modules_to_not_convert=["lm_head", "upproj"])
    assert [message for message in caplog.messages if "matches no module" in message] == [
        "modules_to_not_convert: 'upproj' matches no module of LlamaForCausalLM."
    ]


def test_experts_without_tokens_are_fitted_to_their_weights(quantize):
    fields = {"num_experts": 16, "num_experts_per_tok": 1, "num_hidden_layers": 1}
    model = quantize(make("qwen3_moe", **fields), nsamples=1, seqlen=4, nbits_per_codebook=6)
    assert len(quantized_layers(model)) == 4 + 16 * 3
    errors = [line["relative_error"] for line in model.crvq_report["layers"].values()]
    assert max(errors) < 0.9


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_quantizing_while_loading_and_loading_the_result_give_the_same(architecture, quantize, tmp_path):
    make(architecture, torch.bfloat16).save_pretrained(tmp_path / "dense")
    config = CRVQConfig(**FIELDS, work_dir=tmp_path / "loading")
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(tmp_path / "dense", dtype=torch.bfloat16, device_map="cpu", quantization_config=config)
    assert equal_state(model, quantize(make(architecture, torch.bfloat16)))
    model.save_pretrained(tmp_path / "quantized")
    again = load(tmp_path / "quantized", dtype="auto")
    assert equal_state(model, again)
    tokens = tokens_for(model)
    assert torch.equal(logits_of(model, tokens), logits_of(again, tokens))


# What layers are fitted on


def is_to_be_quantized(module) -> bool:
    return type(module) in (nn.Linear, Conv1D)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_layer_is_calibrated_on_what_the_quantized_ones_before_it_leave(
    architecture, quantize, monkeypatch, small_steps
):
    hessians, tuned, lines, still_dense = {}, [], [], []
    quantize_linear, calibration = quantize_block._quantize_linear, pipeline.calibration_tokens
    tokens = []
    monkeypatch.setattr(pipeline, "calibration_tokens", lambda *args: tokens.append(calibration(*args)) or tokens[0])

    def spy(run, index, name, hessian):
        hessians[f"{run.names[index]}.{name}"] = hessian.clone()
        quantize_linear(run, index, name, hessian)

    def no_tuning(block, run, inputs, targets, *, dense, **fields):
        still_dense.append(set(dense))
        assert still_dense[-1] == {name for name, module in block.named_modules() if is_to_be_quantized(module)}
        if not dense:
            runner = rehearse(make(architecture))
            given = [runner.arguments(len(tuned), state)[0][0] for state in inputs]
            tuned.append([torch.cat(tuple(batches)).clone() for batches in (given, targets)])

    def no_tuning_end_to_end(runner, states, **fields):
        seen = [(state.inputs["input_ids"], state.hidden) for state in states]
        lines.append([torch.cat(tensors) for tensors in zip(*seen, strict=True)])
        return {"first": 0.0, "last": 0.0}, 0.0

    monkeypatch.setattr(quantize_block, "_quantize_linear", spy)
    monkeypatch.setattr(quantize_block, "finetune_block_", no_tuning)
    monkeypatch.setattr(pipeline, "finetune_end_to_end_", no_tuning_end_to_end)
    model = quantize(make(architecture))
    assert tokens[0].shape == (10, 16)
    first = tokens[0][:6]  # what the layers and blocks see

    inputs = defaultdict(list)

    def watch(name):
        return lambda module, args: inputs[name].append(args[0].reshape(-1, args[0].shape[-1]))

    for name, layer in quantized_layers(model).items():
        layer.register_forward_pre_hook(watch(name))
    logits_of(model, first)
    assert hessians.keys() == quantized_layers(model).keys() and inputs.keys() <= hessians.keys()
    for name, found in hessians.items():
        if name not in inputs:  # an expert without tokens
            assert torch.equal(found, torch.eye(len(found)))
            continue
        x = torch.cat(inputs[name]).double()
        wanted = x.T @ x / len(x)
        assert float((found - wanted).norm() / wanted.norm()) < 2e-2, name

    with torch.no_grad():
        full = make(architecture)(tokens[0], output_hidden_states=True, use_cache=False)
    assert len(tuned) == 2 and len(still_dense) > 4  # tuned after every stage
    for index, (block_inputs, targets) in enumerate(tuned):
        assert block_inputs.shape == targets.shape == (6, 16, 32)
        if index == 0:
            torch.testing.assert_close(targets, full.hidden_states[1][:6], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(tuned[0][0], full.hidden_states[0][:6])
    assert not torch.allclose(tuned[1][0], full.hidden_states[1][:6], atol=1e-3)
    own_tokens, hidden = lines[0]
    assert torch.equal(own_tokens, tokens[0])
    state = State({"input_ids": own_tokens}, (Gave(hidden, []),))
    torch.testing.assert_close(rehearse(make(architecture)).logits(state), full.logits, rtol=1e-3, atol=1e-3)


def test_layers_that_share_an_input_share_a_hessian(quantize, monkeypatch):
    seen, fit_weight = [], quantize_block.fit_weight
    monkeypatch.setattr(quantize_block, "fit_weight", lambda w, h, **more: seen.append(h) or fit_weight(w, h, **more))
    quantize(make("llama", num_hidden_layers=1), **OFF)
    assert len(seen) == 7 and len({h.data_ptr() for h in seen}) == 4
    assert seen[0] is seen[1] is seen[2] and seen[4] is seen[5]  # q, k, v; o; gate, up; down


def test_fine_tuning_pays(quantize, small_steps):
    held_out = calibration_tokens(make("llama"), None, CRVQConfig(nsamples=32, seqlen=16, seed=9))

    def divergence(model) -> float:
        p, q = (torch.log_softmax(logits_of(m, held_out), -1) for m in (make("llama"), model))
        return float((p.exp() * (p - q)).sum(-1).mean())

    fields = {"nsamples": 64, "e2e_nsamples": 64}
    plain = divergence(quantize(make("llama"), "plain", **fields, **OFF))
    block = divergence(quantize(make("llama"), "block", **fields, **OFF | {"block_finetune_epochs": 2}))
    model = quantize(make("llama"), "end to end", **fields, **OFF | {"e2e_finetune_epochs": 2})
    assert block < 0.9 * plain and divergence(model) < 0.95 * plain
    assert model.crvq_report["e2e_loss"]["first"] == pytest.approx(plain, rel=0.4)  # the same thing on other text
