"""Checkpoints that are incomplete, damaged or contradict themselves: loading says so in one clear sentence."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from crvq_hf import CRVQConfig, quantize_model

pytestmark = pytest.mark.usefixtures("pipeline")

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture
def folder(make_model, tmp_path):
    config = CRVQConfig(dataset=None, codebook_bits=16)  # floats can be NaN
    model = quantize_model(make_model("llama", attention_bias=True), config=config)
    model.save_pretrained(tmp_path)
    return tmp_path


def change_tensors(folder, change) -> None:
    """Rewrites the checkpoint after `change` has edited its tensors in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= fields
    (folder / "config.json").write_text(json.dumps(config))


def assert_refused(folder, *words: str) -> None:
    """Loading must fail with a ValueError of one sentence that holds all `words`."""
    with pytest.raises(ValueError) as error:
        AutoModelForCausalLM.from_pretrained(folder)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and len(re.findall(r"\.( |$)", message)) == 1, message


@pytest.mark.parametrize("name", ["weight", "weight_codebooks", "weight_scale", "weight_order"])
def test_missing_tensor_is_named(folder, name):
    change_tensors(folder, lambda tensors: tensors.pop(f"{LAYER}.{name}"))
    assert_refused(folder, f"lacks the tensor {LAYER}.{name}")


def test_missing_bias_is_named(folder):
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.0.self_attn.q_proj.bias"))
    assert_refused(folder, "lacks the tensor model.layers.0.self_attn.q_proj.bias")


def test_missing_tensor_in_a_state_dict_is_named(folder):
    state_dict = load_file(folder / "model.safetensors")
    del state_dict[f"{LAYER}.weight_scale"]
    config = AutoConfig.from_pretrained(folder)
    with pytest.raises(ValueError, match=f"lacks the tensor {LAYER}.weight_scale"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state_dict)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_truncated_file(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert_refused(folder, "model.safetensors")


def test_damaged_header(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[8:16] = b"\xff" * 8
    path.write_bytes(content)
    assert_refused(folder, "model.safetensors", "header is damaged")


def test_missing_shard(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    sharded = folder / "sharded"
    model.save_pretrained(sharded, max_shard_size="10KB")
    next(sharded.glob("model-00002-of-*")).unlink()
    with pytest.raises((OSError, ValueError), match="model-00002-of-"):
        AutoModelForCausalLM.from_pretrained(sharded)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"nbits_per_codebook": 7}, "U8 [32, 8]"),
        ({"in_group_size": 4}, "U8 [32, 17]"),
        ({"num_extended_codebooks": 3}, "U8 [32, 11]"),
        ({"critical_ratio": 0.5}, "U8 [32, 12]"),
    ],
)
def test_config_that_contradicts_the_shapes(folder, fields, expected):
    change_config(folder, **fields)
    assert_refused(folder, "contradict", f"mlp.down_proj.weight is U8 [32, 9], expected {expected}")


def test_shape_of_one_tensor_contradicts_the_config(folder):
    change_tensors(folder, lambda tensors: tensors.update({f"{LAYER}.weight_scale": torch.ones(63).half()}))
    assert_refused(folder, f"{LAYER}.weight_scale is F16 [63]", "expected F16 [64]")


def test_dtype_of_one_tensor_contradicts_the_config(folder):
    change_tensors(folder, lambda tensors: tensors.update({f"{LAYER}.weight_scale": torch.ones(64)}))
    assert_refused(folder, f"{LAYER}.weight_scale is F32 [64]", "expected F16 [64]")


def test_model_config_that_contradicts_the_shapes(folder):
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] = 128
    (folder / "config.json").write_text(json.dumps(config))
    assert_refused(folder, "contradict", "mlp.down_proj.weight is U8 [32, 9], expected U8 [32, 17]")


def test_unknown_format_version(folder):
    change_config(folder, format_version=6, field_of_the_future=3)
    assert_refused(folder, "format_version 6", "only format_version 1, 2, 3, 4 and 5")


def test_unknown_field(folder):
    change_config(folder, nbits=3)
    with pytest.raises(ValueError, match="no field 'nbits', did you mean 'nbits_per_codebook'"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_code_past_the_end_of_the_codebook(folder):
    name = "model.layers.0.self_attn.k_proj"  # 16 rows of 4 groups: only 64 entries
    change_tensors(folder, lambda tensors: tensors[f"{name}.weight"][3, 2].fill_(64))
    assert_refused(folder, f"{name}.weight holds code 64", "64 entries")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["weight_codebooks", "weight_scale"])
def test_values_that_are_not_finite(folder, name, value):
    change_tensors(folder, lambda tensors: tensors[f"{LAYER}.{name}"].view(-1)[5].fill_(value))
    assert_refused(folder, f"{LAYER}.{name} holds NaN or infinite values")


@pytest.mark.parametrize("channel", [0, 32])
def test_order_that_is_no_permutation(folder, channel):
    def change(tensors):
        order = tensors[f"{LAYER}.weight_order"]
        order[(order != channel).nonzero()[0]] = channel

    change_tensors(folder, change)
    assert_refused(folder, f"{LAYER}.weight_order must hold every channel 0..31 exactly once")


def test_config_of_a_checkpoint_without_codes(make_model, tmp_path):
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = CRVQConfig().to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_refused(tmp_path, "says 'crvq'", "none of the 21 tensors")


def test_codes_for_another_model(folder):
    def change(tensors):
        for name in list(tensors):
            tensors["other." + name] = tensors.pop(name)

    change_tensors(folder, change)
    assert_refused(folder, "None of the 14 CRVQ layers", "is in LlamaForCausalLM")


def test_codes_for_something_that_is_not_linear(folder):
    def change(tensors):
        for name in [name for name in tensors if name.startswith(LAYER)]:
            tensors[name.replace(LAYER, "model.norm")] = tensors.pop(name)

    change_tensors(folder, change)
    assert_refused(folder, "CRVQ layer model.norm", "LlamaRMSNorm")


def test_pickled_checkpoint(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert_refused(folder, "safetensors files", "pytorch_model.bin")
