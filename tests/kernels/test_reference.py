import pytest
import torch
from crvq_kernels import dequantize_ref, linear_ref


def naive_weight(layer):
    """The definition, one number at a time, in double precision."""
    _, codebooks, scales, order = layer.tensors
    _, num_critical = layer.constants
    _, _, d = codebooks.shape
    num_groups = len(order) // d
    weight = torch.zeros(len(scales), len(order), dtype=torch.float64)
    for n, row in enumerate(layer.codes.tolist()):
        for v, code in enumerate(row):
            codebook = 0 if v < num_groups else 1 + (v - num_groups) // num_critical
            group = v if v < num_groups else (v - num_groups) % num_critical
            for i in range(d):
                weight[n, int(order[group * d + i])] += float(codebooks[codebook, code, i]) * float(scales[n])
    return weight


CASES = [(8, 8, 3, 2), (4, 5, 1, 3), (16, 10, 2, 3), (8, 4, 0, 0), (4, 12, 7, 12)]


@pytest.mark.parametrize(("in_group_size", "nbits", "num_extended", "num_critical"), CASES)
def test_reference_is_the_definition(make_layer, relative_error, in_group_size, nbits, num_extended, num_critical):
    layer = make_layer(5, 48, in_group_size, nbits, num_extended, num_critical)
    weight = naive_weight(layer)
    assert relative_error(dequantize_ref(*layer.tensors, *layer.constants), weight) < 1e-6

    x = torch.randn(2, 3, 48)
    assert relative_error(linear_ref(x, *layer.linear_args(bias=False)), x.double() @ weight.T) < 1e-6
    expected = x.double() @ weight.T + layer.bias.double()
    assert relative_error(linear_ref(x, *layer.linear_args(bias=True)), expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reference_rounds_once_at_the_end(make_layer, dtype):
    layer = make_layer()
    weight = dequantize_ref(*layer.tensors, *layer.constants)
    assert torch.equal(dequantize_ref(*layer.tensors, *layer.constants, dtype), weight.to(dtype))
    x = torch.randn(3, 72).to(dtype)
    expected = linear_ref(x.float(), *layer.linear_args(bias=True)).to(dtype)
    assert torch.equal(linear_ref(x, *layer.linear_args(bias=True)), expected)
