"""A product with int8 rows: every dtype and way to it, what it refuses, gradients, compiling."""

import pytest
import torch
from crvq_kernels import dequantize_rows, rows, rows_linear
from crvq_kernels.cpu import INSTRUCTIONS, library
from crvq_kernels.cpu.rows import int8_rows
from torch.nn import functional as F

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}


@pytest.fixture
def make(generator):
    """Returns a function (rows, channels) -> numbers, scales."""

    def make(size, channels):
        numbers = torch.randint(-127, 128, (size, channels), generator=generator(1), dtype=torch.int8)
        return numbers.to(DEVICE), torch.rand(size, generator=generator(2)).half().float().to(DEVICE) / 64

    return make


def error(found, x, numbers, scales):
    expected = F.linear(x.double(), numbers.double() * scales.double()[:, None])
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("tokens", [(1,), (8,), (3, 7), (0,)], ids=str)
def test_against_a_dense_product(make, dtype, tokens):
    numbers, scales = make(1500, 576)  # on a CPU several pieces, the last one short
    x = torch.randn(*tokens, 576).to(DEVICE, dtype)
    found = rows_linear(x, numbers, scales)
    assert found.dtype == dtype and found.shape == (*tokens, 1500)
    assert not found.numel() or error(found, x, numbers, scales) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("tokens", "size", "channels"), [(1, 100, 96), (17, 65, 200), (40, 64, 128), (130, 3, 8)])
def test_triton(make, dtype, tokens, size, channels, poisoned_empty):
    pytest.importorskip("triton")
    from crvq_kernels.gpu.rows import rows_gemm

    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("the interpreter has no bfloat16 products")
    numbers, scales = make(size, channels)
    x = torch.randn(channels, tokens).to(DEVICE, dtype).T  # of strides that no kernel reads
    found = rows_gemm(x, numbers, scales.to(dtype))
    assert error(found, x, numbers, scales.to(dtype)) < TOLERANCES[dtype]
    assert torch.equal(found, rows_gemm(x, numbers, scales.to(dtype)))


def test_a_gpu_reads_the_rows_where_it_was_measured(make, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(rows, "uses_triton", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    in_parts = rows.in_parts
    monkeypatch.setattr(rows, "in_parts", None)
    numbers, scales = make(70, 64)
    x = torch.randn(2, 64, device=DEVICE).half()
    assert error(rows_linear(x, numbers, scales), x, numbers, scales) < 1e-3
    monkeypatch.setattr(rows, "in_parts", in_parts)
    from crvq_kernels.gpu import rows as kernel

    monkeypatch.setattr(kernel, "rows_gemm", None)
    assert error(rows_linear(x.float(), numbers, scales), x, numbers, scales) < 1e-6
    many = torch.randn(1025, 64, device=DEVICE).half()
    assert error(rows_linear(many, numbers, scales), many, numbers, scales) < 1e-3
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert error(rows_linear(x, numbers, scales), x, numbers, scales) < 1e-3


def test_gradients(make):
    numbers, scales = make(1500, 576)
    x = torch.randn(5, 576, device=DEVICE, requires_grad=True)
    rows_linear(x, numbers, scales).square().sum().backward()
    other = x.detach().clone().requires_grad_()
    F.linear(other, dequantize_rows(numbers, scales, torch.float32)).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-5, atol=1e-5 * float(other.grad.abs().max()))


def test_operator(make):
    numbers, scales = make(30, 16)
    x = torch.randn(2, 3, 16, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.crvq.rows_linear, (x, numbers, scales))
    compiled = torch.compile(rows_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, numbers, scales), rows_linear(x, numbers, scales))
    tangent = torch.func.jvp(lambda x: rows_linear(x, numbers, scales), (x.detach(),), (x.detach(),))[1]
    torch.testing.assert_close(tangent, rows_linear(x.detach(), numbers, scales))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"weight": torch.zeros(4, 8)}, "int8"),
        ({"scales": torch.zeros(5)}, r"shape \[4\]"),
        ({"x": torch.zeros(2, 7)}, r"shape \[..., 8\]"),
        ({"x": torch.zeros(2, 8, device="meta")}, "move them together"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change, sentence):
    arguments = {"x": torch.zeros(2, 8), "weight": torch.zeros(4, 8, dtype=torch.int8), "scales": torch.zeros(4)}
    with pytest.raises(ValueError, match=sentence):
        rows_linear(**arguments | change)


@pytest.mark.skipif(library() is None, reason="no compiled kernel here")
@pytest.mark.parametrize("level", INSTRUCTIONS)
def test_compiled_kernel(make, level, monkeypatch):
    """Any number of rows, tokens and channels; an output has the same bits whatever is computed beside it."""
    own = library()
    if INSTRUCTIONS.index(level) not in own.supported:
        pytest.skip(f"this processor has no {level}")
    monkeypatch.setattr(own, "level", INSTRUCTIONS.index(level))
    for size, channels in [(1, 1), (7, 63), (8, 64), (29, 200), (100, 1000)]:
        numbers, scales = make(size, channels)
        x = torch.randn(7, channels)
        x[0] *= 1e4
        found = int8_rows(x, numbers, scales)
        expected = x.double() @ (numbers.double() * scales.double()[:, None]).T
        assert ((found - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-5
        for token in range(7):
            assert torch.equal(found[token : token + 1], int8_rows(x[token : token + 1], numbers, scales))
        assert torch.equal(found[2:5, 1:], int8_rows(x[2:5], numbers[1:], scales[1:]))
    numbers, scales = make(3001, 300)
    alone = int8_rows(x := torch.randn(3, 300), numbers, scales)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(alone, int8_rows(x, numbers, scales))
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(library() is None, reason="no compiled kernel here")
def test_the_compiled_kernel_runs_for_few_tokens(make, monkeypatch):
    monkeypatch.setattr(rows, "in_parts", None)
    numbers, scales = (tensor.cpu() for tensor in make(70, 64))
    for dtype in TOLERANCES:
        assert rows_linear(torch.randn(32, 64).to(dtype), numbers, scales.to(dtype)).dtype == dtype
    with pytest.raises(TypeError, match="NoneType"):
        rows_linear(torch.randn(33, 64), numbers, scales)
