"""`CRVQLinear`: forward, and that moving or casting a model leaves its tensors what they are."""

import copy
import pickle

import crvq_kernels
import pytest
import torch
from crvq_kernels import cpu, linear_ref
from torch import nn

from crvq_hf import CRVQConfig, CRVQLinear
from crvq_hf.quantized_weight import TENSOR_NAMES


@pytest.fixture(params=[8, 16], ids=["int8", "fp16"])
def weight(make_weight, request):
    return make_weight(64, 24, nbits_per_codebook=6, critical_ratio=0.25, codebook_bits=request.param)


@pytest.fixture
def layer(weight):
    return CRVQLinear.from_quantized(weight, torch.randn(24))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_reference(weight, dtype, bias):
    bias = torch.randn(24) if bias else None
    x = torch.randn(2, 5, 64).to(dtype)
    y = CRVQLinear.from_quantized(weight, bias)(x)
    assert y.shape == (2, 5, 24) and y.dtype == dtype
    torch.testing.assert_close(y, linear_ref(x, *weight.operands(), bias, 6, 2))


@pytest.mark.parametrize("form", ["stored", "tiled"])
def test_float64(layer, weight, form):
    layer = layer.tile_() if form == "tiled" else layer
    layer.double()
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert y.dtype == layer.compute_dtype == torch.float64
    dense = weight.dequantize(torch.float32).double()
    torch.testing.assert_close(y, x @ dense.T + layer.bias, rtol=1e-12, atol=1e-12)
    y.sum().backward()
    torch.testing.assert_close(x.grad, dense.sum(0).expand(3, -1), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(layer(x), y)


@pytest.mark.parametrize("form", ["stored", "tiled"])
def test_output_can_be_changed_in_place(layer, form):
    layer = layer.tile_() if form == "tiled" else layer
    x = torch.randn(2, 3, 64, requires_grad=True)
    y = layer(x)
    y += 1
    y[0] *= 2
    y.sum().backward()
    expected = torch.tensor([2.0, 1.0])[:, None, None] * layer.dequantize(torch.float32).sum(0)
    torch.testing.assert_close(x.grad, expected.expand(2, 3, -1))


def test_is_a_linear_layer_without_gradients(layer, weight):
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features, layer.nbits, layer.num_critical_groups) == (64, 24, 6, 2)
    assert list(layer.state_dict()) == [*TENSOR_NAMES, "bias"]
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert layer.weight.data_ptr() == weight.codes.data_ptr()


def test_quantized_weight_comes_back(layer, weight):
    for a, b in zip(layer.quantized_weight().tensors().values(), weight.tensors().values(), strict=True):
        assert a.data_ptr() == b.data_ptr() and not isinstance(a, nn.Parameter)
    assert torch.equal(layer.dequantize(torch.float32), weight.dequantize(torch.float32))


@pytest.mark.parametrize("bias", [True, False])
def test_constructor_makes_the_shapes_of_the_config(bias):
    shape = CRVQConfig(nbits_per_codebook=10).layer_shape(64, 24)
    layer = CRVQLinear(
        64, 24, bias=bias, in_group_size=8, nbits=10, num_codebooks=shape.num_codebooks,
        codebook_size=shape.codebook_size, num_critical_groups=shape.num_critical_groups, codebook_bits=8,
        bias_dtype=torch.bfloat16, device="meta",
    )  # fmt: skip
    found = {name: (tuple(p.shape), p.dtype) for name, p in layer.named_parameters()}
    assert found == shape.tensors() | ({"bias": ((24,), torch.bfloat16)} if bias else {})
    assert all(parameter.is_meta for parameter in layer.parameters())


@pytest.mark.parametrize(
    "cast",
    [
        lambda module: module.to(torch.bfloat16),
        lambda module: module.bfloat16(),
        lambda module: module.type(torch.bfloat16),
        lambda module: nn.Sequential(module).to(torch.bfloat16)[0],
    ],
)
def test_casting_reaches_only_the_bias(layer, weight, cast):
    cast(layer)
    assert layer.bias.dtype == torch.bfloat16
    for name, tensor in weight.tensors().items():
        assert torch.equal(getattr(layer, name), tensor) and getattr(layer, name).dtype == tensor.dtype


@pytest.mark.parametrize("move", [lambda m: m.to("meta", torch.bfloat16), lambda m: m.to_empty(device="meta")])
def test_moving_reaches_everything(layer, weight, move):
    move(layer)
    assert all(parameter.is_meta for parameter in layer.parameters())
    assert {name: getattr(layer, name).dtype for name in TENSOR_NAMES} == {
        name: tensor.dtype for name, tensor in weight.tensors().items()
    }


def test_share_memory(layer):
    layer.share_memory()
    assert all(parameter.is_shared() for parameter in layer.parameters())


def test_gradients_of_the_bias_follow_it(layer):
    layer.bias.requires_grad_(True)
    layer(torch.randn(3, 64)).sum().backward()
    layer.double()
    assert layer.bias.dtype == layer.bias.grad.dtype == torch.float64


def test_gradient_reaches_the_input(layer):
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize(torch.float32).sum(0).expand(3, -1))


def test_deepcopy_and_state_dict(layer):
    other = copy.deepcopy(layer)
    other.weight_scale.data.zero_()
    x = torch.randn(3, 64)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


def test_repr_names_the_numbers(layer):
    assert "in_features=64, out_features=24, bias=True, nbits=6" in repr(layer)
    assert f"in_group_size=8, codebooks=4x64, codebook_bits={layer.codebook_bits}, num_critical_groups=2" in repr(
        layer
    )


# The layout of the codes


@pytest.fixture
def tiled(layer):
    if not crvq_kernels.prefers_tiles("cpu"):
        pytest.skip("layers are not tiled here: no compiled kernel")
    stored = layer.weight
    assert layer.tile_() is layer and layer.weight.dim() == 1 and stored.dim() == 2
    assert layer.tile_() is layer and layer.weight.dim() == 1
    return layer


def test_tiling_changes_nothing_but_the_layout(tiled, weight):
    x = torch.randn(2, 5, 64)
    expected = linear_ref(x, *weight.operands(), tiled.bias, 6, 2)
    torch.testing.assert_close(tiled(x), expected, rtol=1e-3, atol=1e-3)
    for a, b in zip(tiled.quantized_weight().tensors().values(), weight.tensors().values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(tiled.dequantize(torch.float32), weight.dequantize(torch.float32))


def test_tiled_codes_are_saved_and_loaded_as_stored(tiled, weight):
    state = tiled.state_dict()
    assert torch.equal(state["weight"], weight.codes) and torch.equal(state["weight_codebooks"], weight.codebooks)
    assert state["weight_codebooks"].dtype == weight.codebooks.dtype
    other = CRVQLinear.from_shape(weight.shape, bias=True, bias_dtype=torch.float32, device="cpu").tile_()
    assert other.load_state_dict(state) and other.weight.dim() == 1
    x = torch.randn(3, 64)
    assert torch.equal(other(x), tiled(x))


def test_without_the_kernel_codes_are_stored_ones(tiled, weight, monkeypatch):
    for module in (cpu, cpu.binding):
        monkeypatch.setattr(module, "library", lambda: None)
    x = torch.randn(3, 64)
    expected = linear_ref(x, *weight.operands(), tiled.bias, 6, 2)
    torch.testing.assert_close(tiled(x), expected)  # slower, but right
    assert torch.equal(tiled.to("cpu").weight, weight.codes)
    torch.testing.assert_close(tiled(x), expected)


def test_a_tiled_layer_is_copied_and_pickled(tiled):
    x = torch.randn(3, 64)
    y = tiled(x)
    for twin in (copy.deepcopy(tiled), pickle.loads(pickle.dumps(tiled))):
        assert torch.equal(twin(x), y) and twin.weight.data_ptr() != tiled.weight.data_ptr()


@pytest.mark.parametrize("how", ["parameter", "data", "bias", "in place"])
def test_a_changed_tensor_is_seen(tiled, weight, how):
    x = torch.randn(3, 64)
    before = tiled(x)
    if how == "parameter":
        tiled.weight_scale = nn.Parameter(tiled.weight_scale * 2, requires_grad=False)
    elif how == "data":
        tiled.weight_scale.data = tiled.weight_scale.data * 2
    elif how == "in place":
        tiled.weight_scale.mul_(2)
    else:
        tiled.bias = None
    scale = tiled.weight_scale
    tensors = [*weight.operands()[:2], scale, weight.channel_order]
    assert not torch.equal(tiled(x), before)
    torch.testing.assert_close(tiled(x), linear_ref(x, *tensors, tiled.bias, 6, 2), rtol=1e-3, atol=1e-3)


def test_gradients_and_graphs_go_through_the_operator(tiled, weight):
    x = torch.randn(3, 64, requires_grad=True)
    tiled(x).sum().backward()
    expected = weight.dequantize(torch.float32).sum(0).expand(3, -1)
    torch.testing.assert_close(x.grad, expected)
    compiled = torch.compile(tiled, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x.detach()), tiled(x.detach()))


@pytest.fixture
def like_a_gpu(monkeypatch):
    """Has layers on the CPU keep int8 codebooks, as those on a GPU do."""
    monkeypatch.setattr(crvq_kernels, "prefers_int8_codebooks", lambda device: True)
    monkeypatch.setattr(crvq_kernels, "is_plain", lambda *tensors: False)  # a shortcut that GPUs do not have


def test_int8_codebooks_stay_on_a_gpu(layer, like_a_gpu, monkeypatch):
    bits = layer.codebook_bits
    stored = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    decoded = copy.deepcopy(layer)
    with monkeypatch.context() as there:
        there.setattr(crvq_kernels, "prefers_int8_codebooks", lambda device: False)
        decoded.tile_()
    layer.tile_()
    assert decoded.weight_codebooks.dtype == torch.float16
    assert layer.weight_codebooks.dtype == (torch.int8 if bits == 8 else torch.float16)
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), decoded(x))
    assert torch.equal(layer.dequantize(torch.float32), decoded.dequantize(torch.float32))
    for other in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        saved = other.state_dict()
        assert all(torch.equal(saved[name], stored[name]) for name in stored)
        assert all(saved[name].dtype == stored[name].dtype for name in stored)
    layer.load_state_dict(stored)
    assert layer.packed.dim() == decoded.packed.dim() and torch.equal(layer(x), decoded(x))
    moved = decoded.to("cpu")  # from a CPU, which has decoded them, to a GPU
    assert moved.weight_codebooks.dtype == layer.weight_codebooks.dtype
    assert torch.equal(moved.weight_codebooks, layer.weight_codebooks)
    with monkeypatch.context() as there:
        there.setattr(crvq_kernels, "prefers_int8_codebooks", lambda device: False)
        assert layer.to("cpu").weight_codebooks.dtype == torch.float16  # and back


def test_int8_codebooks_compile(layer, like_a_gpu):
    layer.tile_()
    x = torch.randn(3, 64)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))
