"""`crvq::linear` and `crvq::dequantize` on Triton: that the right kernel gets the right arguments."""

import pytest
import torch
from crvq_kernels import dequantize, dequantize_ref, linear, linear_ref, ops

pytest.importorskip("triton")
NAMES = ["gemv", "gemm", "dequantize + matmul"]


@pytest.mark.parametrize("tiled", [False, True], ids=["stored", "tiled"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("name", NAMES)
def test_linear_in_the_interpreter(make_layer, relative_error, tolerance, monkeypatch, name, bias, tiled):
    monkeypatch.setattr(ops, "implementation", lambda *args: f"triton: {name}")
    layer = make_layer()
    x = torch.randn(1, 2, 72)
    _, codes, *others = (x, *layer.linear_args(bias))
    y = linear(x, layer.tiles if tiled else codes, *others)
    assert relative_error(y, linear_ref(x, *layer.linear_args(bias))) < tolerance[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("in_group_size", [4, 8, 16])
@pytest.mark.parametrize("name", NAMES)
def test_int8_codebooks_have_the_bits_of_decoded_ones(make_layer, monkeypatch, name, in_group_size, dtype):
    monkeypatch.setattr(ops, "implementation", lambda *args: f"triton: {name}")
    layer = make_layer(40, 144, in_group_size, dtype=torch.int8)
    tensors = (layer.tiles, *layer.tensors[1:])
    decoded = (layer.tiles, layer.tensors[1].half() / 32, *layer.tensors[2:])
    x = torch.randn(2, 144).to(dtype)
    ys = [linear(x, *some, layer.bias, *layer.constants) for some in (tensors, decoded)]
    assert torch.equal(*ys)


def test_dequantize_and_gradient_in_the_interpreter(make_layer, relative_error, monkeypatch):
    monkeypatch.setattr(ops, "uses_triton", lambda device: True)
    layer = make_layer(nbits=5)
    weight = dequantize_ref(*layer.tensors, *layer.constants)
    for codes in (layer.tensors[0], layer.tiles):
        tensors = (codes, *layer.tensors[1:])
        assert torch.equal(dequantize(*tensors, *layer.constants), weight)
        x = torch.randn(3, 72, requires_grad=True)
        grad = torch.randn(3, 100)
        linear(x, *tensors, None, *layer.constants).backward(grad)
        assert relative_error(x.grad, grad @ weight) < 2e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnGPU:
    @pytest.mark.parametrize("num_tokens", [1, 5, 300])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_linear(self, make_layer, relative_error, tolerance, num_tokens, dtype):
        layer = make_layer(300, 512)
        x = torch.randn(num_tokens, 512).to(dtype)
        args = [arg.cuda() if isinstance(arg, torch.Tensor) else arg for arg in (x, *layer.linear_args(True))]
        assert relative_error(linear(*args).cpu(), linear_ref(x.float(), *layer.linear_args(True))) < tolerance[dtype]

    def test_dequantize_and_gradient(self, make_layer, relative_error):
        layer = make_layer(nbits=5)
        tensors = [tensor.cuda() for tensor in layer.tensors]
        weight = dequantize_ref(*layer.tensors, *layer.constants)
        assert torch.equal(dequantize(*tensors, *layer.constants).cpu(), weight)
        x = torch.randn(3, 72, device="cuda", requires_grad=True)
        grad = torch.randn(3, 100)
        linear(x, *tensors, None, *layer.constants).backward(grad.cuda())
        assert relative_error(x.grad.cpu(), grad @ weight) < 2e-6


def test_kernel_files_leave_the_public_names_alone():
    """Importing a submodule sets an attribute of the package: no file may be called like a public function."""
    import crvq_kernels

    assert all(callable(getattr(crvq_kernels, name)) for name in crvq_kernels.__all__)
