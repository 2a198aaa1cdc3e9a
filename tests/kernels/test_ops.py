"""`crvq::linear` and `crvq::dequantize` on a CPU: every test on every way they can run there."""

import logging
import subprocess
import sys

import pytest
import torch
from crvq_kernels import cpu, dequantize, dequantize_ref, implementation, linear, linear_ref, ops, portable, tile_codes
from formats import FORMATS

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Path:
    """One way to run: PyTorch code from stored codes, or the compiled kernel with an instruction set, from tiles."""

    def __init__(self, name):
        self.name = name
        self.error = 1.5e-4 if name == "vbmi" else 2e-6  # its tables hold 16-bit numbers

    def tensors(self, layer):
        codes, *others = layer.tensors
        return (
            codes if self.name == "torch" else tile_codes(codes, layer.constants[0], layer.codes.shape[1]),
            *others,
        )

    def args(self, layer, bias):
        return (*self.tensors(layer), layer.bias if bias else None, *layer.constants)


@pytest.fixture(params=cpu.binding.CHOICES)
def path(request, choose_cpu):
    choose_cpu(request.param)
    return Path(request.param)


@pytest.fixture(params=[2**20, 40], ids=["one-step", "many-steps"])
def steps(request, monkeypatch):
    """Runs a test with all rows in one step, and with as few as can be."""
    monkeypatch.setattr(portable, "_CODES_PER_STEP", request.param)
    monkeypatch.setattr(cpu.binding, "_WEIGHTS_PER_STEP", request.param)


@pytest.mark.parametrize("num_tokens", [1, 3, 17])
@pytest.mark.parametrize("run", [portable.lookup_linear, portable.dequantize_linear], ids=["lookup", "dequantize"])
@pytest.mark.parametrize(("in_group_size", "nbits", "num_extended", "num_critical"), FORMATS)
def test_portable_code_matches_reference(
    make_layer, relative_error, steps, in_group_size, nbits, num_extended, num_critical, run, num_tokens
):
    layer = make_layer(33, 144, in_group_size, nbits, num_extended, num_critical)
    x = torch.randn(num_tokens, 144)
    expected = linear_ref(x, *layer.linear_args(bias=False))
    assert relative_error(run(x, *layer.tensors, *layer.constants), expected) < 2e-6


@pytest.mark.parametrize("num_tokens", [1, 3, 17, 300])
@pytest.mark.parametrize(("in_group_size", "nbits", "num_extended", "num_critical"), FORMATS)
def test_linear_formats(
    make_layer, relative_error, path, steps, in_group_size, nbits, num_extended, num_critical, num_tokens
):
    layer = make_layer(133, 144, in_group_size, nbits, num_extended, num_critical)
    x = torch.randn(num_tokens, 144)
    expected = linear_ref(x, *layer.linear_args(bias=True))
    assert relative_error(linear(x, *path.args(layer, bias=True)), expected) < path.error


@pytest.mark.parametrize("num_tokens", [1, 6, 40])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_dtypes(make_layer, path, relative_error, tolerance, dtype, bias, num_tokens):
    layer = make_layer()
    layer.bias = layer.bias.to(dtype)
    x = torch.randn(num_tokens, 72).to(dtype)
    y = linear(x, *path.args(layer, bias))
    assert y.dtype == dtype
    assert relative_error(y, linear_ref(x.float(), *layer.linear_args(bias))) < max(tolerance[dtype], path.error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_takes_any_float_dtype_of_codebooks_and_scales(make_layer, path, relative_error, dtype):
    layer = make_layer(codebook_size=13, dtype=dtype)
    for num_tokens in (1, 40):
        x = torch.randn(num_tokens, 72)
        expected = linear_ref(x, *layer.linear_args(bias=True))
        assert relative_error(linear(x, *path.args(layer, bias=True)), expected) < path.error


def test_int8_codebooks_are_32nds(make_layer, path):
    """The same bits as with the numbers that they stand for, on every way."""
    layer = make_layer(dtype=torch.int8)
    codes, codebooks, *others = path.tensors(layer)
    numbers = codebooks.half() / 32
    assert codebooks.dtype == torch.int8 and torch.equal(numbers * 32, codebooks)
    for num_tokens in (1, 40):
        x = torch.randn(num_tokens, 72)
        ys = [linear(x, codes, books, *others, layer.bias, *layer.constants) for books in (codebooks, numbers)]
        assert torch.equal(*ys)
    weights = [dequantize(codes, books, *others, *layer.constants) for books in (codebooks, numbers)]
    assert torch.equal(*weights)
    stored = [dequantize_ref(layer.tensors[0], books, *others, *layer.constants) for books in (codebooks, numbers)]
    assert torch.equal(*stored) and torch.equal(stored[0], weights[0])
    inputs = [
        linear_ref(x, layer.tensors[0], books, *others, None, *layer.constants) for books in (codebooks, numbers)
    ]
    assert torch.equal(*inputs)


def test_gradients_with_int8_codebooks(make_layer, path):
    layer = make_layer(dtype=torch.int8)
    codes, codebooks, *others = path.tensors(layer)
    x = torch.randn(40, 72, requires_grad=True)
    ys = [
        linear(x, codes, books, *others, layer.bias, *layer.constants) for books in (codebooks, codebooks.half() / 32)
    ]
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in ys))


@pytest.mark.parametrize("shape", [(72,), (1, 72), (2, 1, 3, 72), (5, 7, 72)])
def test_linear_keeps_leading_axes(make_layer, path, relative_error, shape):
    layer = make_layer()
    x = torch.randn(shape)
    expected = linear_ref(x, *layer.linear_args(bias=True))
    assert relative_error(linear(x, *path.args(layer, bias=True)), expected) < path.error


@pytest.mark.parametrize("shape", [(0, 72), (3, 0, 72)])
def test_linear_takes_no_tokens(make_layer, path, shape):
    layer = make_layer()
    assert linear(torch.randn(shape), *path.args(layer, bias=True)).shape == (*shape[:-1], 100)


def test_linear_takes_strided_x(make_layer, path, relative_error):
    layer = make_layer()
    x = torch.randn(72, 3, 4).transpose(0, 2)[:, ::2]
    expected = linear_ref(x, *layer.linear_args(bias=False))
    assert relative_error(linear(x, *path.args(layer, bias=False)), expected) < path.error


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("in_group_size", "nbits", "num_extended", "num_critical"), FORMATS)
def test_dequantize_is_bit_equal_to_reference(
    make_layer, path, steps, in_group_size, nbits, num_extended, num_critical, dtype
):
    layer = make_layer(33, 144, in_group_size, nbits, num_extended, num_critical)
    weight = dequantize(*path.tensors(layer), *layer.constants, dtype)
    assert torch.equal(weight, dequantize_ref(*layer.tensors, *layer.constants, dtype))


def test_order_of_more_than_256_channels(make_layer, path, relative_error):
    layer = make_layer(9, 520)
    x = torch.randn(2, 520)
    expected = linear_ref(x, *layer.linear_args(bias=False))
    assert relative_error(linear(x, *path.args(layer, bias=False)), expected) < path.error


@pytest.mark.parametrize("num_tokens", [2, 40])
def test_gradients_of_x_and_bias(make_layer, path, relative_error, num_tokens):
    layer = make_layer()
    weight = dequantize_ref(*layer.tensors, *layer.constants)
    x = torch.randn(2, num_tokens, 72, requires_grad=True)
    layer.bias.requires_grad_()
    grad = torch.randn(2, num_tokens, 100)
    linear(x, *path.args(layer, bias=True)).backward(grad)
    assert relative_error(x.grad, grad @ weight) < path.error
    assert relative_error(layer.bias.grad, grad.sum((0, 1))) < path.error


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradient_of_a_single_half_precision_vector(make_layer, path, relative_error, tolerance, dtype):
    layer = make_layer()
    x = torch.randn(72, dtype=dtype, requires_grad=True)
    grad = torch.randn(100, dtype=dtype)
    linear(x, *path.args(layer, bias=False)).backward(grad)
    expected = grad.float() @ dequantize_ref(*layer.tensors, *layer.constants)
    assert x.grad.dtype == dtype and relative_error(x.grad, expected) < tolerance[dtype]


@pytest.mark.parametrize("position", [1, 2], ids=["codebooks", "scales"])
def test_missing_gradients_are_refused_not_dropped(make_layer, path, position):
    layer = make_layer(dtype=torch.float32)
    layer.tensors[position].requires_grad_()
    with pytest.raises(ValueError, match="gradients for x and bias only"):
        linear(torch.randn(2, 72), *path.args(layer, bias=False)).sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_opcheck_linear(make_layer, path, num_tokens, dtype):
    layer = make_layer(20, 40)
    layer.bias.requires_grad_()
    x = torch.randn(num_tokens, 40).to(dtype).requires_grad_()
    # In half precision the compiled and the eager backward may round differently.
    tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.library.opcheck(torch.ops.crvq.linear.default, (x, *path.args(layer, bias=True)), **tolerance)


def test_opcheck_dequantize(make_layer, path):
    layer = make_layer(20, 40, nbits=10)
    args = (*path.tensors(layer), *layer.constants, torch.bfloat16)
    torch.library.opcheck(torch.ops.crvq.dequantize.default, args)


def test_compiles_into_one_graph(make_layer, path, relative_error):
    layer = make_layer()
    args = path.args(layer, bias=True)

    def step(x):
        return linear(x * 2, *args) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_tokens in (2, 40):
        x = torch.randn(num_tokens, 72, requires_grad=True)
        y = compiled(x)
        expected = linear_ref(x * 2, *layer.linear_args(bias=True)) + 1
        assert relative_error(y, expected) < path.error
        (gradient,) = torch.autograd.grad(y.sum(), x)
        weight = dequantize_ref(*layer.tensors, *layer.constants)
        assert relative_error(gradient, (2 * weight.sum(0)).expand_as(x)) < path.error


def test_meta_tensors_give_shapes(make_layer, path):
    layer = make_layer()
    args = [arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in path.args(layer, bias=True)]
    y = linear(torch.empty(2, 3, 72, dtype=torch.bfloat16, device="meta"), *args)
    assert y.shape == (2, 3, 100) and y.dtype == torch.bfloat16 and y.device.type == "meta"


def test_implementation_by_device_and_tokens(monkeypatch, choose_cpu):
    tables, dense = "cpu (torch): tables", "cpu (torch): dequantize + matmul"
    for tiled in (False, True):  # codes as they are stored; tiled, but no library
        assert implementation("cpu", 1, tiled=tiled) == tables
        for size in (16, 256):
            assert implementation("cpu", 8, codebook_size=size, tiled=tiled) == tables
            assert implementation("cpu", 9, codebook_size=size, tiled=tiled) == dense
        assert implementation("cpu", 4, codebook_size=1024, tiled=tiled) == dense
        choose_cpu("torch")
    assert implementation("mps", 1) == "mps (torch): dequantize + matmul"
    monkeypatch.setattr(ops, "_has_triton", lambda: True)
    assert implementation(torch.device("cuda", 1), 1) == "triton: gemv"
    assert implementation("cuda", 4096) == "triton: dequantize + matmul"
    monkeypatch.setattr(ops, "_has_triton", lambda: False)
    assert implementation("cuda", 1) == "cuda (torch): dequantize + matmul"


def test_each_implementation_is_logged_once(make_layer, choose_cpu, caplog):
    layer = make_layer()
    choose_cpu("torch")
    ops._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="crvq"):
        for num_tokens in (1, 40, 2, 50):
            linear(torch.randn(num_tokens, 72), *layer.linear_args(bias=False))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "cpu (torch): tables" in messages[0] and "cpu (torch): dequantize + matmul" in messages[1]


BAD_ARGUMENTS = {
    "x-width": ({0: torch.randn(2, 71)}, r"x must have shape \[\.\.\., 72\] for this layer, got \[2, 71\]"),
    "x-scalar": ({0: torch.tensor(1.0)}, r"x must have shape"),
    "x-dtype": ({0: torch.randn(2, 72).double()}, "x must be float32, float16 or bfloat16, got torch.float64"),
    "x-device": ({0: torch.randn(2, 72, device="meta")}, "x is on meta but the layer is on cpu"),
    "codes-dtype": (
        {1: torch.zeros(100, 15)},
        r"codes must be a uint8 .*of shape \[100, 15\].*got torch.float32",
    ),
    "codes-width": ({1: torch.zeros(100, 14).byte()}, r"15 codes of 8 bits .*got torch.uint8 and \[100, 14\]"),
    "tiles": ({1: torch.zeros(100).byte()}, r"or, tiled, \[4096\], got torch.uint8 and \[100\]"),
    "codebooks": (
        {2: torch.zeros(256, 8)},
        r"codebooks must be a floating or int8 tensor .*got torch.float32 and \[256, 8\]",
    ),
    "codebook-size": ({2: torch.zeros(4, 257, 8)}, "at most 256"),
    "group-size": ({2: torch.zeros(4, 256, 6)}, "must be 4, 8 or 16, got 6"),
    "scales": ({3: torch.zeros(100, 1)}, r"scales must be a floating tensor of shape \[out_features\]"),
    "number-of-scales": ({3: torch.zeros(99)}, r"codes must be .*each of 99 scales.*got torch.uint8 and \[100, 15\]"),
    "order": ({4: torch.zeros(70).int()}, "multiple of 8"),
    "order-dtype": ({4: torch.zeros(72)}, "channel_order must be an integer tensor"),
    "bias": ({5: torch.zeros(99)}, r"bias must have shape \[100\], got \[99\]"),
    "nbits": ({6: 13}, "nbits must be between 4 and 12, got 13"),
    "critical": ({7: 10}, "num_critical_groups must be between 0 and 9, got 10"),
}


@pytest.mark.parametrize(("replaced", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_wrong_arguments_are_explained(make_layer, replaced, message):
    args = [torch.randn(2, 72), *make_layer().linear_args(bias=True)]
    for position, value in replaced.items():
        args[position] = value
    with pytest.raises(ValueError, match=message):
        linear(*args)


def test_dequantize_refuses_other_dtypes(make_layer, path):
    layer = make_layer()
    with pytest.raises(ValueError, match="dtype must be float32, float16 or bfloat16, got torch.int8"):
        dequantize(*path.tensors(layer), *layer.constants, torch.int8)


def test_importing_the_package_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import crvq_kernels, crvq_kernels.gpu.tuning"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_hugging_face_kernels_package_is_not_shadowed():
    kernels = pytest.importorskip("kernels")
    assert kernels.__file__ is not None and hasattr(kernels, "get_kernel")
