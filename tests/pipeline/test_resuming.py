"""Runs of the same settings are equal, killed ones go on where they were, those of other settings are refused."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import TEXT, tiny_model, tiny_tokenizer
from whole_models import FIELDS, OFF, equal_state, make, quantized_layers, use_small_steps

from crvq_hf import CRVQConfig, quantize_model
from crvq_hf.pipeline import block_loop as pipeline
from crvq_hf.pipeline import quantize_block, tables
from crvq_hf.pipeline.fingerprint import run_fingerprint
from crvq_hf.pipeline.run import Run
from crvq_hf.resources.workfolder import WorkFolder
from crvq_hf.tuning import end_to_end

pytestmark = pytest.mark.usefixtures("precision", "quiet")


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

    for name in ("fit_weight", "finetune_block_"):
        monkeypatch.setattr(quantize_block, name, never)
    for name in ("calibration_tokens", "has_fast_bfloat16"):
        monkeypatch.setattr(pipeline, name, never)
    monkeypatch.setattr(end_to_end, "distillation_loss", never)
    third = quantize(make("qwen3_moe"), "one")
    assert equal_state(first, third)
    lines = [model.crvq_report["layers"] for model in (first, third)]
    tuning = [model.crvq_report["seconds"]["end-to-end fine-tuning"] for model in (first, third)]
    assert lines[0] == lines[1] and tuning[0] == tuning[1]
    assert first.crvq_report["e2e_loss"] == third.crvq_report["e2e_loss"]
    assert first.crvq_report["bits_per_weight"] == third.crvq_report["bits_per_weight"]


def run_until_killed(work: str, name: str, count: int, calls: str) -> None:
    """Quantizes, and dies right after the `count`-th save of `name`.

    Writes a line to the file `calls` for every layer that is fitted.
    """
    use_small_steps(setattr)
    end_to_end.CHECKPOINT_SECONDS = -1.0
    pipeline.has_fast_bfloat16 = lambda device_type: False
    save, fit_weight, left = WorkFolder.save, quantize_block.fit_weight, [count]

    def save_and_die(self, saved, *args):
        save(self, saved, *args)
        left[0] -= saved == name
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    def note(*args, **fields):
        with open(calls, "a") as file:
            file.write("fit\n")
        return fit_weight(*args, **fields)

    WorkFolder.save, quantize_block.fit_weight = save_and_die, note
    quantize_model(killed_model(), None, CRVQConfig(**FIELDS, embedding_bits=2.5, work_dir=work))


def killed_model():
    return make("llama", torch.bfloat16, num_hidden_layers=3)


def test_killed_and_resumed_equals_uninterrupted(tmp_path, quantize, monkeypatch, small_steps):
    plan = [("block_0000", 1), ("end_to_end", 2)]
    calls = [tmp_path / f"calls of {name}" for name, _ in plan]
    # One process imports all, which takes longer than the rest, and forks once for each run.
    script = f"import os, sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}\n"
    script += "import test_resuming\n"
    for (name, count), file in zip(plan, calls, strict=True):
        arguments = (str(tmp_path / "killed"), name, count, str(file))
        script += f"if os.fork() == 0: test_resuming.run_until_killed(*{arguments!r}); os._exit(1)\n"
        script += "assert os.WTERMSIG(os.wait()[1]) == 9\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # The second run fits only the layers of the two blocks that were missing.
    assert [len(file.read_text().splitlines()) for file in calls] == [7, 14]
    steps, loss = [], end_to_end.distillation_loss
    monkeypatch.setattr(end_to_end, "distillation_loss", lambda *args: steps.append(1) or loss(*args))
    whole = quantize(killed_model(), "whole", embedding_bits=2.5)
    assert len(steps) == 5  # an epoch of five batches
    monkeypatch.setattr(quantize_block, "fit_weight", None)
    monkeypatch.setattr(tables, "fit_table", None)
    call_block, ran = Run.call_block, []
    monkeypatch.setattr(Run, "call_block", lambda *args: ran.append(args[1]) or call_block(*args))
    resumed = quantize(killed_model(), "killed", embedding_bits=2.5)
    assert len(steps) == 5 + 3
    assert ran == [0] * 3 + [1] * 3 + [2] * 3  # only the full-precision model, for the targets
    assert equal_state(whole, resumed)
    for key in ("e2e_loss", "bits_per_weight"):
        assert whole.crvq_report[key] == resumed.crvq_report[key]
    assert whole.crvq_report["layers"].keys() == resumed.crvq_report["layers"].keys()
    seconds = resumed.crvq_report["seconds"]  # also of what this process did not do again
    assert seconds.keys() == whole.crvq_report["seconds"].keys()


def test_an_interrupt_leaves_a_run_that_can_go_on(quantize, monkeypatch, small_steps):
    """Also within a block: what had not been saved is computed again."""
    whole = quantize(make("gpt2"), "whole")
    fit_weight, left = quantize_block.fit_weight, [6]

    def interrupted(*args, **fields):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return fit_weight(*args, **fields)

    monkeypatch.setattr(quantize_block, "fit_weight", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(make("gpt2"), "stopped")
    assert left == [0]
    monkeypatch.setattr(quantize_block, "fit_weight", fit_weight)
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


def test_whatever_decides_the_result_is_in_the_fingerprint(quantize):
    """Any weight, any saved buffer, the model's config and the tokenizer's vocabulary."""
    fields = OFF | {"dataset": [TEXT]}
    quantize(tiny_model(), tokenizer=tiny_tokenizer(), **fields)
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[31, 63] += 1e-3
    with pytest.raises(ValueError, match=r"another run \(weights: "):
        quantize(model, tokenizer=tiny_tokenizer(), **fields)
    model = tiny_model(rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    with pytest.raises(ValueError, match=r"another run \(model\.config\.rope_parameters: .* 10000.* then, .* 100\."):
        quantize(model, tokenizer=tiny_tokenizer(), **fields)
    model = tiny_model()
    model.register_buffer("router_bias", torch.ones(3))
    with pytest.raises(ValueError, match=r"another run \(weights: "):
        quantize(model, tokenizer=tiny_tokenizer(), **fields)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["wizards"])
    with pytest.raises(ValueError, match=r"another run \(vocabulary: "):
        quantize(tiny_model(), tokenizer=tokenizer, **fields)


def test_what_decides_nothing_is_not_in_the_fingerprint():
    """Where a model came from, by which path it is quantized, numbers that are none."""
    config = CRVQConfig(dataset=None)
    model = tiny_model()
    before = run_fingerprint(model, None, config)
    model.config.name_or_path, model.config.transformers_version = "elsewhere", "5.0"
    model.config.quantization_config, model.config._is_quantized = config, True
    assert run_fingerprint(model, None, config) == before
    model.config.odd = [float("nan"), object()]
    first, again = (json.dumps(run_fingerprint(model, None, config)) for _ in range(2))
    assert first == again and "0x" not in first and "NaN" not in first


def test_the_fingerprint_does_not_hold_the_text():
    config = CRVQConfig(dataset=["a secret"], tokenizer="some/where", work_dir="there", device="cpu")
    fingerprint = run_fingerprint(make("llama"), None, config)
    assert "secret" not in json.dumps(fingerprint)
    assert not {"tokenizer", "work_dir", "device"} & fingerprint.keys()
    assert fingerprint["weights"] != run_fingerprint(make("llama", torch.bfloat16), None, config)["weights"]
