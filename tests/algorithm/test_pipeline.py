"""Whole models: what is replaced and what is not, on which inputs layers are fitted, resuming, memory, errors."""

import gc
import json
import os
import random
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from tiny import TEXT, tiny_model, tiny_tokenizer
from torch import nn
from transformers.pytorch_utils import Conv1D

from crvq_hf import CRVQConfig, CRVQLinear, end_to_end, pipeline, quantize_model, streams
from crvq_hf.blocks import BlockRunner, find_blocks, linear_stages
from crvq_hf.calibration import calibration_tokens
from crvq_hf.experts import unfuse_experts_
from crvq_hf.fingerprint import run_fingerprint
from crvq_hf.workfolder import WorkFolder

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ARCHITECTURES = {
    "llama": COMMON | {"initializer_range": 0.2},
    "gpt2": {
        "vocab_size": 64,
        "n_embd": 32,
        "n_inner": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
    },
    "qwen3_moe": COMMON
    | {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "initializer_range": 0.2,
    },
    "gemma3_text": COMMON
    | {
        "head_dim": 8,
        "tie_word_embeddings": True,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "initializer_range": 0.2,
    },
    "opt": COMMON | {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.2},
}
FIELDS = {
    "dataset": "self",
    "nsamples": 6,
    "e2e_nsamples": 10,
    "seqlen": 16,
    "nbits_per_codebook": 4,
    "critical_ratio": 0.1,
}
OFF = {"block_finetune_epochs": 0, "e2e_finetune_epochs": 0}


def make(architecture: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa", **changes):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(architecture, **ARCHITECTURES[architecture] | changes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    return model.eval()


@pytest.fixture(autouse=True)
def precision(monkeypatch):
    """Runs in fp32 wherever the tests run; returns a function to switch mixed precision on or off."""

    def switch(bfloat16: bool) -> None:
        monkeypatch.setattr(pipeline, "has_fast_bfloat16", lambda device_type: bfloat16)

    switch(False)
    return switch


@pytest.fixture
def quantize(tmp_path):
    """Returns a function (model, work folder's name, **config fields) -> model, quantized."""

    def quantize(model, work: str = "work", tokenizer=None, **fields):
        return quantize_model(model, tokenizer, CRVQConfig(**FIELDS | fields, work_dir=tmp_path / work))

    return quantize


@pytest.fixture
def small_steps(monkeypatch):
    use_small_steps(monkeypatch.setattr)


def use_small_steps(put) -> None:
    """Lets even a tiny run have several batches and steps, of unequal sizes."""
    put(streams, "RUN_TOKENS", 64)
    put(pipeline, "BLOCK_STEP_TOKENS", 32)
    put(pipeline, "E2E_STEP_TOKENS", 32)


def quantized_layers(model) -> dict[str, CRVQLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, CRVQLinear)}


def tokens_for(model, shape=(3, 16)) -> torch.Tensor:
    vocabulary = model.get_input_embeddings().num_embeddings
    return torch.randint(3, vocabulary, shape, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits_of(model, tokens) -> torch.Tensor:
    return model(input_ids=tokens, use_cache=False).logits


def equal_state(first, second) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(
        one[key].dtype == two[key].dtype and torch.equal(one[key], two[key]) for key in one
    )


# Running blocks one at a time


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_run_one_by_one_make_the_same_logits(architecture, attention):
    model = make(architecture, attention=attention)
    tokens, runner = tokens_for(model), BlockRunner(model)
    with torch.no_grad():
        hidden = runner.embed(tokens)
        for index in range(len(runner.blocks)):
            hidden = runner.run(index, hidden, "cpu")
            # Another batch size, as the last batch may have, is no problem either.
            torch.testing.assert_close(runner.run(index, torch.randn(2, 16, 32), "cpu").shape, torch.Size([2, 16, 32]))
    expected = logits_of(model, tokens)
    assert expected.std() > 0.01
    torch.testing.assert_close(runner.logits(hidden), expected, rtol=1e-4, atol=1e-5)
    assert all("forward" not in block.__dict__ for block in runner.blocks)


def test_stages_of_a_block_follow_its_data():
    model = make("qwen3_moe", num_experts=6, num_experts_per_tok=1)
    unfuse_experts_(model)
    runner = BlockRunner(model)
    hidden = runner.embed(tokens_for(model, (1, 3)))  # reaches at most three of the six experts
    names = [n for n, m in runner.blocks[0].named_modules() if type(m) is nn.Linear]
    stages = linear_stages(runner.blocks[0], names, lambda: runner.run(0, hidden, "cpu"))
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
    seen, fit_weight = [], pipeline.fit_weight
    monkeypatch.setattr(pipeline, "fit_weight", lambda w, h, **more: seen.append(h) or fit_weight(w, h, **more))
    model, original = quantize(make("llama"), dataset=None), make("llama")
    assert len(seen) == 14 and all(torch.equal(hessian, torch.eye(len(hessian))) for hessian in seen)
    report = model.crvq_report
    assert report["calibration_tokens"] == report["activation_bytes"] == 0 and report["e2e_loss"] is None
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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_layer_is_calibrated_on_what_the_quantized_ones_before_it_leave(
    architecture, quantize, monkeypatch, small_steps
):
    hessians, tuned, lines = {}, [], []
    quantize_linear, calibration = pipeline._quantize_linear, pipeline.calibration_tokens
    tokens = []
    monkeypatch.setattr(pipeline, "calibration_tokens", lambda *args: tokens.append(calibration(*args)) or tokens[0])

    def spy(run, index, name, hessian):
        hessians[f"{run.blocks_name}.{index}.{name}"] = hessian.clone()
        quantize_linear(run, index, name, hessian)

    def no_tuning(block, run, inputs, targets, **fields):
        tuned.append([torch.cat(tuple(batches)).clone() for batches in (inputs, targets)])

    def no_tuning_end_to_end(runner, batches, hidden, **fields):
        lines.append([torch.cat(tuple(batches)), torch.cat(tuple(hidden)).clone()])
        return {"first": 0.0, "last": 0.0}

    monkeypatch.setattr(pipeline, "_quantize_linear", spy)
    monkeypatch.setattr(pipeline, "finetune_block_", no_tuning)
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
    assert len(tuned) == 2
    for index, (block_inputs, targets) in enumerate(tuned):
        assert block_inputs.shape == targets.shape == (6, 16, 32)
        if index == 0:
            torch.testing.assert_close(targets, full.hidden_states[1][:6], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(tuned[0][0], full.hidden_states[0][:6])
    assert not torch.allclose(tuned[1][0], full.hidden_states[1][:6], atol=1e-3)
    batches, hidden = lines[0]
    assert torch.equal(batches, tokens[0])
    runner = BlockRunner(make(architecture))
    runner.embed(tokens[0])
    torch.testing.assert_close(runner.logits(hidden), full.logits, rtol=1e-3, atol=1e-3)


def test_layers_that_share_an_input_share_a_hessian(quantize, monkeypatch):
    seen, fit_weight = [], pipeline.fit_weight
    monkeypatch.setattr(pipeline, "fit_weight", lambda w, h, **more: seen.append(h) or fit_weight(w, h, **more))
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


# Determinism and resuming


def test_two_runs_are_equal_and_a_third_only_reads(quantize, monkeypatch, small_steps):
    model, before = make("qwen3_moe"), (torch.get_rng_state(), random.getstate())
    first = quantize(model, "one")
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    torch.manual_seed(123)
    second = quantize(make("qwen3_moe"), "two")
    assert equal_state(first, second)
    other = quantize(make("qwen3_moe"), "three", seed=1)
    assert not equal_state(first, other)

    def never(*args, **fields):
        raise AssertionError("computed again")

    for name in ("fit_weight", "finetune_block_", "calibration_tokens", "has_fast_bfloat16"):
        monkeypatch.setattr(pipeline, name, never)
    monkeypatch.setattr(end_to_end, "distillation_loss", never)
    third = quantize(make("qwen3_moe"), "one")
    assert equal_state(first, third)
    lines = [model.crvq_report["layers"] for model in (first, third)]
    assert lines[0] == lines[1] and first.crvq_report["e2e_loss"] == third.crvq_report["e2e_loss"]
    assert first.crvq_report["bits_per_weight"] == third.crvq_report["bits_per_weight"]


def run_until_killed(work: str, name: str, count: int, calls: str) -> None:
    """Quantizes, and dies right after the `count`-th save of `name`.

    Writes a line to the file `calls` for every layer that is fitted.
    """
    use_small_steps(setattr)
    end_to_end.CHECKPOINT_SECONDS = -1.0
    pipeline.has_fast_bfloat16 = lambda device_type: False
    save, fit_weight, left = WorkFolder.save, pipeline.fit_weight, [count]

    def save_and_die(self, saved, *args):
        save(self, saved, *args)
        left[0] -= saved == name
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    def note(*args, **fields):
        with open(calls, "a") as file:
            file.write("fit\n")
        return fit_weight(*args, **fields)

    WorkFolder.save, pipeline.fit_weight = save_and_die, note
    quantize_model(killed_model(), None, CRVQConfig(**FIELDS, work_dir=work))


def killed_model():
    return make("llama", torch.bfloat16, num_hidden_layers=3)


def test_killed_and_resumed_equals_uninterrupted(tmp_path, quantize, monkeypatch, small_steps):
    plan = [("block_0000", 1), ("end_to_end", 2)]
    calls = [tmp_path / f"calls of {name}" for name, _ in plan]
    # One process imports all, which takes longer than the rest, and forks once for each run.
    script = f"import os, sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}\n"
    script += "import test_pipeline\n"
    for (name, count), file in zip(plan, calls, strict=True):
        arguments = (str(tmp_path / "killed"), name, count, str(file))
        script += f"if os.fork() == 0: test_pipeline.run_until_killed(*{arguments!r}); os._exit(1)\n"
        script += "assert os.WTERMSIG(os.wait()[1]) == 9\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # The second run fits only the layers of the two blocks that were missing.
    assert [len(file.read_text().splitlines()) for file in calls] == [7, 14]
    steps, loss = [], end_to_end.distillation_loss
    monkeypatch.setattr(end_to_end, "distillation_loss", lambda *args: steps.append(1) or loss(*args))
    whole = quantize(killed_model(), "whole")
    assert len(steps) == 5  # an epoch of five batches
    monkeypatch.setattr(pipeline, "fit_weight", None)
    run_block, ran = pipeline._Run.run_block, []
    monkeypatch.setattr(pipeline._Run, "run_block", lambda *args: ran.append(args[1]) or run_block(*args))
    resumed = quantize(killed_model(), "killed")
    assert len(steps) == 5 + 3
    assert ran == [0] * 3 + [1] * 3 + [2] * 3  # only the full-precision model, for the targets
    assert equal_state(whole, resumed)
    for key in ("e2e_loss", "bits_per_weight"):
        assert whole.crvq_report[key] == resumed.crvq_report[key]
    assert whole.crvq_report["layers"].keys() == resumed.crvq_report["layers"].keys()


def test_an_interrupt_leaves_a_run_that_can_go_on(quantize, monkeypatch, small_steps):
    """Also within a block: what had not been saved is computed again."""
    whole = quantize(make("gpt2"), "whole")
    fit_weight, left = pipeline.fit_weight, [6]

    def interrupted(*args, **fields):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return fit_weight(*args, **fields)

    monkeypatch.setattr(pipeline, "fit_weight", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(make("gpt2"), "stopped")
    assert left == [0]
    monkeypatch.setattr(pipeline, "fit_weight", fit_weight)
    assert equal_state(whole, quantize(make("gpt2"), "stopped"))


@pytest.mark.parametrize("field", ["seed", "nsamples", "in_group_size", "importance", "modules_to_not_convert"])
def test_a_changed_setting_is_refused_by_name(field, quantize):
    quantize(make("llama"), **OFF)
    changed = {"seed": 1, "nsamples": 5, "in_group_size": 4, "importance": "weight"}.get(field, ["up_proj"])
    model = make("llama")
    with pytest.raises(ValueError) as caught:
        quantize(model, **OFF | {field: changed})
    before = {**CRVQConfig(**FIELDS).to_dict()}[field]
    assert f"({field}: {before!r} then, {changed!r} now)" in str(caught.value)
    assert not quantized_layers(model)


def test_a_changed_model_or_text_is_refused_by_name(quantize, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    fields = OFF | {"dataset": str(text), "tokenizer": tiny_tokenizer()}
    quantize(tiny_model(), **fields)
    other = tiny_model()
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"another run \(weights: "):
        quantize(other, **fields)
    text.write_text(TEXT + "more", encoding="utf-8")
    with pytest.raises(ValueError, match=r"another run \(dataset: "):
        quantize(tiny_model(), **fields)
    text.write_text(TEXT, encoding="utf-8")
    quantize(tiny_model(), **fields)


def test_the_fingerprint_does_not_hold_the_text():
    config = CRVQConfig(dataset=["a secret"], tokenizer="some/where", work_dir="there", device="cpu")
    fingerprint = run_fingerprint(make("llama"), None, config)
    assert "secret" not in json.dumps(fingerprint)
    assert not {"tokenizer", "work_dir", "device"} & fingerprint.keys()
    assert fingerprint["weights"] != run_fingerprint(make("llama", torch.bfloat16), None, config)["weights"]


# Errors


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_weights_that_are_no_numbers(value, quantize, tmp_path):
    model = make("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[3, 3] = value
    with pytest.raises(ValueError, match=r"weight of model\.layers\.1\.self_attn\.k_proj holds NaN or infinite"):
        quantize(model)
    assert not quantized_layers(model) and not (tmp_path / "work").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_activations_that_are_no_numbers(value, quantize):
    model = make("llama")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = value
    with pytest.raises(ValueError, match=r"output of model\.layers\.1 holds NaN or infinite .*check the model"):
        quantize(model, dataset=[TEXT], tokenizer=tiny_tokenizer().__class__(tokenizer_object=small_vocabulary()))


def small_vocabulary():
    """Returns a tokenizer of 64 words for models with that vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = sorted(set(TEXT.replace(".", " .").split()))[:60]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def test_a_name_of_a_device_that_is_not_there(quantize):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ValueError, match="device='cuda:0' was asked for, but torch sees no CUDA device"):
        quantize(make("llama"), device="cuda:0")


def test_activations_that_do_not_fit_are_refused():
    tokens = torch.zeros(1, dtype=torch.int64).expand(10**7, 10**6)
    with pytest.raises(ValueError, match=r"10000000000000 calibration tokens need .* GB of memory.*lower nsamples"):
        streams.embed(SimpleNamespace(model=make("llama")), tokens, CRVQConfig(nsamples=10**7), None)


@pytest.mark.parametrize(("available", "fits"), [(1 << 40, True), (1 << 10, False)], ids=["enough", "too little"])
def test_memory_for_the_activations(available, fits, quantize, monkeypatch):
    """What counts is available memory: file cache is given back, and is nearly all after loading a large model."""
    monkeypatch.setattr(streams.psutil, "virtual_memory", lambda: SimpleNamespace(free=0, available=available))
    if fits:
        quantize(make("llama", num_hidden_layers=1), **OFF)
        return
    with pytest.raises(ValueError, match="lower nsamples or seqlen"):
        quantize(make("llama", num_hidden_layers=1), **OFF)


# Memory


def test_hidden_states_that_do_not_fit_in_memory_are_on_the_disk(quantize, monkeypatch, small_steps, tmp_path):
    model = quantize(make("llama"), "memory")
    scratch, found = WorkFolder.scratch, []
    monkeypatch.setattr(WorkFolder, "scratch", lambda *args: found.append(scratch(*args)) or found[-1])
    monkeypatch.setattr(streams, "MEMORY_SHARE", 0.0)
    other = quantize(make("llama"), "disk")
    assert [tensor.shape for tensor in found] == [(10, 16, 32)]
    assert equal_state(model, other)
    assert not list((tmp_path / "disk").glob("scratch*"))


@pytest.mark.parametrize("num_blocks", [1, 4])
def test_activations_are_held_twice_whatever_the_number_of_blocks(num_blocks, quantize, monkeypatch):
    nsamples, seqlen = 96, 32
    stream = nsamples * seqlen * 32 * 4
    run_block, calls, held = pipeline._Run.run_block, [], []

    def count(run, index, hidden):
        calls.append(index)
        if len(calls) % 5 == 0:
            # One storage for each tensor as large as all activations; RUN_TOKENS keeps everything else smaller.
            storages = {
                t.untyped_storage().data_ptr()
                for t in gc.get_objects()
                if type(t) is torch.Tensor and t.untyped_storage().nbytes() >= stream
            }
            held.append(len(storages))
        return run_block(run, index, hidden)

    monkeypatch.setattr(pipeline._Run, "run_block", count)
    monkeypatch.setattr(streams, "RUN_TOKENS", 1024)
    model = quantize(
        tiny_model(num_hidden_layers=num_blocks),
        dataset=[TEXT] * 20,
        tokenizer=tiny_tokenizer(),
        nsamples=nsamples,
        seqlen=seqlen,
        e2e_finetune_epochs=0,
    )
    assert len(held) >= 3 * num_blocks and set(held) == {2}
    assert model.crvq_report["activation_bytes"] == 2 * stream


def test_blocks_that_are_given_something_made_of_the_text_are_refused():
    """As Gemma 3n's are: what is recorded for one batch would be wrong for the next."""
    model = make("llama")
    embed = model.get_input_embeddings()
    embed.register_forward_hook(lambda module, args, output: setattr(module, "tokens", args[0]))
    for block in find_blocks(model)[1]:
        block.register_forward_pre_hook(lambda _, args, kw: (args, kw | {"text": embed.tokens}), with_kwargs=True)
        block.forward = lambda hidden, text, **kwargs: hidden
    runner = BlockRunner(model)
    for _ in range(2):
        runner.embed(torch.zeros(2, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="depends on the text"):
        runner.embed(torch.ones(2, 8, dtype=torch.int64))


def test_another_tokenizer_is_another_run(tmp_path):
    model, settings = make("llama"), CRVQConfig(dataset=["text " * 50], work_dir=str(tmp_path))
    one, other = (run_fingerprint(model, lambda text, n=n: {"input_ids": [n]}, settings) for n in (1, 2))
    assert {name for name in one if one[name] != other[name]} == {"tokenization"}
