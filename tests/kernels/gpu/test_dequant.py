"""The dequantization kernel against the reference, bit for bit."""

import pytest
import torch
from crvq_kernels import dequantize_ref
from formats import FORMATS

pytest.importorskip("triton")
from crvq_kernels.gpu.dequant import dequantize_weight  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def run(layer, dtype, permuted, copy=lambda tensor: tensor):
    args = (layer.tiles, *layer.tensors[1:])
    return dequantize_weight(*(copy(arg.to(DEVICE)) for arg in args), *layer.constants, dtype, permuted).cpu()


def expect(layer, dtype, permuted):
    weight = dequantize_ref(*layer.tensors, *layer.constants, dtype)
    return weight[:, layer.tensors[3].long()] if permuted else weight


@pytest.mark.parametrize("permuted", [False, True], ids=["original-order", "permuted"])
@pytest.mark.parametrize(("in_group_size", "nbits", "num_extended", "num_critical"), FORMATS)
def test_bit_equal_to_reference(make_layer, in_group_size, nbits, num_extended, num_critical, permuted):
    layer = make_layer(100, 144, in_group_size, nbits, num_extended, num_critical)
    assert torch.equal(run(layer, torch.float16, permuted), expect(layer, torch.float16, permuted))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(make_layer, relative_error, tolerance, dtype):
    layer = make_layer(37, 600, num_critical_groups=40)
    weight = run(layer, dtype, permuted=False)
    assert weight.dtype == dtype
    assert relative_error(weight, expect(layer, torch.float32, permuted=False)) < tolerance[dtype]


def test_several_blocks_of_groups(make_layer):
    layer = make_layer(20, 8 * 300, num_critical_groups=150)
    assert torch.equal(run(layer, torch.float32, permuted=True), expect(layer, torch.float32, permuted=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_codebook_dtypes_and_small_codebooks(make_layer, dtype):
    layer = make_layer(codebook_size=13, dtype=dtype)
    assert torch.equal(run(layer, torch.float32, permuted=False), expect(layer, torch.float32, permuted=False))


@pytest.mark.parametrize("permuted", [False, True], ids=["original-order", "permuted"])
def test_nothing_outside_the_tensors_is_used(make_layer, guarded, guarded_empty, permuted):
    layer = make_layer(50, 72, nbits=10, codebook_size=700)
    assert torch.equal(run(layer, torch.float32, permuted, copy=guarded), expect(layer, torch.float32, permuted))


def test_strided_arguments(make_layer):
    layer = make_layer()
    codes, codebooks, scales, order = layer.tensors
    layer.tensors = (codes, codebooks.transpose(1, 2).contiguous().transpose(1, 2), scales, order)
    assert not layer.tensors[1].is_contiguous()
    assert torch.equal(run(layer, torch.float16, permuted=True), expect(layer, torch.float16, permuted=True))
