"""The Triton launchers against the reference: in the interpreter without a GPU, on the GPU with one."""

import pytest
import torch
from crvq_kernels import dequantize, dequantize_ref, linear, linear_ref, ops

pytest.importorskip("triton")
from crvq_kernels.dequant import dequantize_weight  # noqa: E402
from crvq_kernels.gemv import gemv  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# in_group_size, nbits, num_extended, num_critical_groups; 72 and 144 channels are no multiple of any block.
FORMATS = [
    pytest.param(8, 8, 3, 2, id="d8-e8-E3"),
    pytest.param(4, 5, 1, 1, id="d4-e5-E1"),
    pytest.param(16, 10, 3, 9, id="d16-e10-all-critical"),
    pytest.param(8, 4, 0, 0, id="d8-e4-E0"),
    pytest.param(8, 11, 1, 2, id="d8-e11-E1"),
    pytest.param(4, 12, 3, 3, id="d4-e12-E3"),
]


def to_device(args):
    return [arg.to(DEVICE) if isinstance(arg, torch.Tensor) else arg for arg in args]


def check_gemv(layer, x, bias, relative_error, tolerance):
    y = gemv(*to_device([x, *layer.linear_args(bias)]))
    assert y.dtype == x.dtype
    expected = linear_ref(x.float(), *layer.linear_args(bias))
    assert relative_error(y.cpu(), expected) < tolerance[x.dtype]


@pytest.mark.parametrize("num_tokens", [1, 3, 17])
@pytest.mark.parametrize(("in_group_size", "nbits", "num_extended", "num_critical"), FORMATS)
def test_gemv_matches_reference(
    make_layer, relative_error, tolerance, in_group_size, nbits, num_extended, num_critical, num_tokens
):
    layer = make_layer(100, 144, in_group_size, nbits, num_extended, num_critical)
    check_gemv(layer, torch.randn(num_tokens, 144), num_tokens != 3, relative_error, tolerance)


@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gemv_dtypes(make_layer, relative_error, tolerance, dtype, num_tokens):
    layer = make_layer(37, 600, num_critical_groups=3)
    layer.bias = layer.bias.to(dtype)
    check_gemv(layer, torch.randn(num_tokens, 600).to(dtype), True, relative_error, tolerance)


def test_gemv_takes_upcast_codebooks_and_small_codebooks(make_layer, relative_error, tolerance):
    layer = make_layer(codebook_size=13, dtype=torch.float32)
    check_gemv(layer, torch.randn(2, 72), False, relative_error, tolerance)


def test_gemv_takes_strided_arguments(make_layer, relative_error, tolerance):
    layer = make_layer()
    codes, codebooks, scales, order = layer.tensors
    layer.tensors = (codes.T.contiguous().T, codebooks.transpose(1, 2).contiguous().transpose(1, 2), scales, order)
    x = torch.randn(72, 6)[:, ::2].T
    assert not x.is_contiguous() and not layer.tensors[1].is_contiguous()
    check_gemv(layer, x, False, relative_error, tolerance)


@pytest.mark.parametrize("permuted", [False, True], ids=["original-order", "permuted"])
@pytest.mark.parametrize(("in_group_size", "nbits", "num_extended", "num_critical"), FORMATS)
def test_dequantize_is_bit_equal_to_reference(make_layer, in_group_size, nbits, num_extended, num_critical, permuted):
    layer = make_layer(100, 144, in_group_size, nbits, num_extended, num_critical)
    expected = dequantize_ref(*layer.tensors, *layer.constants, torch.float16)
    if permuted:
        expected = expected[:, layer.tensors[3].long()]
    args = to_device(layer.tensors)
    assert torch.equal(dequantize_weight(*args, *layer.constants, torch.float16, permuted).cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_dtypes(make_layer, relative_error, tolerance, dtype):
    layer = make_layer(37, 600, num_critical_groups=40)
    weight = dequantize_weight(*to_device(layer.tensors), *layer.constants, dtype, permuted=False)
    assert weight.dtype == dtype
    assert relative_error(weight.cpu(), dequantize_ref(*layer.tensors, *layer.constants)) < tolerance[dtype]


@pytest.fixture
def triton_everywhere(monkeypatch):
    """Makes the operators choose Triton for every device, as they do on CUDA."""
    monkeypatch.setattr(ops, "_uses_triton", lambda device: True)


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize(("num_tokens", "name"), [(16, "triton: gemv"), (17, "triton: dequantize + matmul")])
def test_linear_on_triton(make_layer, relative_error, tolerance, triton_everywhere, num_tokens, name, bias):
    assert ops.implementation(DEVICE, num_tokens) == name
    layer = make_layer()
    x = torch.randn(1, num_tokens, 72)
    y = linear(*to_device([x, *layer.linear_args(bias)]))
    assert relative_error(y.cpu(), linear_ref(x, *layer.linear_args(bias))) < tolerance[torch.float32]


def test_dequantize_and_gradient_on_triton(make_layer, relative_error, triton_everywhere):
    layer = make_layer(nbits=5)
    weight = dequantize_ref(*layer.tensors, *layer.constants)
    assert torch.equal(dequantize(*to_device(layer.tensors), *layer.constants).cpu(), weight)
    x = torch.randn(3, 72, device=DEVICE, requires_grad=True)
    grad = torch.randn(3, 100)
    linear(x, *to_device(layer.linear_args(bias=False))).backward(grad.to(DEVICE))
    assert relative_error(x.grad.cpu(), grad @ weight) < 2e-6


def test_kernel_files_leave_the_public_names_alone():
    """Importing a submodule sets an attribute of the package: no file may be called like a public function."""
    import crvq_kernels

    assert all(callable(getattr(crvq_kernels, name)) for name in crvq_kernels.__all__)
