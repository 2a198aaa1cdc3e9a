"""A loaded model in wrappers that take its tensors for what a state dict has: DDP, FSDP2, accelerate's offloading."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module, remove_hook_from_submodules
from whole_models import random_model

from crvq_hf.modeling.linear import CRVQLinear

HERE = Path(__file__).parent


@pytest.fixture
def model():
    return random_model()


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, CRVQLinear)]


def test_two_processes_share_a_model(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, HERE / "wrapped_models.py", tmp_path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == ["done", "done"]


@pytest.mark.parametrize(
    ("channels", "stored", "held"),
    [(64, torch.uint8, torch.uint8), (576, torch.int16, torch.int32), (40000, torch.int32, torch.int32)],
)
def test_what_processes_cannot_send_is_not_held(make_weight, channels, stored, held):
    """gloo and NCCL know no int16; files have the smallest dtype."""
    weight = make_weight(channels, 8, nbits_per_codebook=6)
    layer = CRVQLinear.from_quantized(weight, None).tile_()
    assert layer.weight_order.dtype == held
    assert layer.state_dict()["weight_order"].dtype == stored == weight.channel_order.dtype
    assert layer.quantized_weight().channel_order.dtype == stored
    other = CRVQLinear.from_shape(weight.shape, bias=False, bias_dtype=None, device="cpu").tile_()
    other.load_state_dict(layer.state_dict())
    assert other.weight_order.dtype == held and torch.equal(other.weight_order, layer.weight_order)


OFFLOADS = {
    "cpu_offload": lambda model, folder: cpu_offload(model, "cpu"),
    "disk_offload": lambda model, folder: disk_offload(model, folder, "cpu"),
    "dispatch_model, disk": lambda model, folder: dispatch_model(
        model,
        {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
        | {"lm_head": "disk"},
        main_device="cpu",
        offload_dir=folder,
        force_hooks=True,
    ),
    "dispatch_model, no offload": lambda model, folder: dispatch_model(model, {"": "cpu"}, force_hooks=True),
}


@pytest.mark.parametrize("embedding_bits", [16, 8, 2.5])
@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS.keys())
def test_tensors_that_are_brought_for_each_forward(tokens, tmp_path, offload, embedding_bits):
    model = random_model(embedding_bits=embedding_bits)
    expected, state = model(input_ids=tokens).logits, model.state_dict()
    state = {name: tensor.clone() for name, tensor in state.items()}
    offload(model, tmp_path / "offloaded")
    for _ in range(2):
        assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == torch.float32
        torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=1e-3, atol=1e-3)
    remove_hook_from_submodules(model)
    now = {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}
    assert all(tensor.dtype == state[name].dtype and torch.equal(tensor, state[name]) for name, tensor in now.items())


def test_layers_that_stay_where_they_are_stay_fast(model, tokens):
    before, expected = [layer.weight.dim() for layer in layers_of(model)], model(input_ids=tokens).logits
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert [layer.weight.dim() for layer in layers_of(model)] == before
    assert torch.equal(model(input_ids=tokens).logits, expected)


@pytest.mark.parametrize("weights", ["own", "given"])
def test_a_single_hook(model, weights):
    layer = layers_of(model)[0]
    x, stored = torch.randn(3, layer.in_features), copy.deepcopy(layer.state_dict())
    expected, dims = layer(x), layer.weight.dim()
    hook = AlignDevicesHook("cpu", offload=True, weights_map=stored if weights == "given" else None)
    add_hook_to_module(layer, hook)
    assert layer.weight.is_meta
    torch.testing.assert_close(layer(x), expected, rtol=1e-3, atol=1e-3)
    remove_hook_from_module(layer)
    assert layer.weight.dim() == dims and torch.equal(layer(x), expected)
