"""The matrix kernel against the reference: in the interpreter without a GPU, on the GPU with one."""

import pytest
import torch
from crvq_kernels import linear_ref
from formats import FORMATS

pytest.importorskip("triton")
from crvq_kernels.gpu import gemm as gemm_module  # noqa: E402
from crvq_kernels.gpu import tuning  # noqa: E402
from crvq_kernels.gpu.gemm import gemm  # noqa: E402
from crvq_kernels.gpu.tuning import gemm_blocks, kernel_for  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


def run(layer, x, bias, copy=lambda tensor: tensor):
    args = [x, layer.tiles, *layer.linear_args(bias)[1:]]
    return gemm(*(copy(arg.to(DEVICE)) if isinstance(arg, torch.Tensor) else arg for arg in args)).cpu()


def check(layer, x, bias, relative_error, tolerance, **options):
    y = run(layer, x, bias, **options)
    assert y.dtype == x.dtype
    assert relative_error(y, linear_ref(x.float(), *layer.linear_args(bias))) < tolerance[x.dtype]


@pytest.mark.parametrize("num_tokens", [1, 17])
@pytest.mark.parametrize(("in_group_size", "nbits", "num_extended", "num_critical"), FORMATS)
def test_formats(make_layer, relative_error, tolerance, in_group_size, nbits, num_extended, num_critical, num_tokens):
    layer = make_layer(100, 144, in_group_size, nbits, num_extended, num_critical)
    check(layer, torch.randn(num_tokens, 144).half(), num_tokens == 1, relative_error, tolerance)


@pytest.mark.parametrize("num_tokens", [1, 3, 16, 17, 40])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_dtypes(make_layer, relative_error, tolerance, dtype, num_tokens):
    layer = make_layer(37, 600, num_critical_groups=3)
    layer.bias = layer.bias.to(dtype)
    check(layer, torch.randn(num_tokens, 600).to(dtype), True, relative_error, tolerance)


@pytest.mark.parametrize("x_dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("in_group_size", [4, 16])
def test_dtypes_with_other_group_sizes(make_layer, relative_error, tolerance, in_group_size, x_dtype):
    layer = make_layer(40, 144, in_group_size, nbits=10)
    check(layer, torch.randn(5, 144).to(x_dtype), False, relative_error, tolerance)


def all_blocks():
    """Every tile that `gemm_blocks` can choose."""
    shapes = [(tokens, rows) for tokens in (8, 16, 32, 64, 2048) for rows in (576, 4096, 11008, 28672)]
    options = [(8, exact, hip) for exact in (False, True) for hip in (False, True)]
    return list(dict.fromkeys(gemm_blocks(*shape, *option) for shape in shapes for option in options))


@pytest.mark.parametrize("blocks", all_blocks(), ids=str)
def test_every_tile(make_layer, relative_error, tolerance, monkeypatch, blocks):
    monkeypatch.setattr(gemm_module, "gemm_blocks", lambda *args: blocks)
    layer = make_layer(70, 1200, nbits=9, num_critical_groups=5)  # several steps of the loop
    check(layer, torch.randn(blocks.tokens - 3, 1200).half(), True, relative_error, tolerance)


@pytest.mark.parametrize("in_features", [8, 256, 264])
def test_one_group_and_whole_tiles(make_layer, relative_error, tolerance, in_features):
    layer = make_layer(64, in_features, num_extended=0)
    check(layer, torch.randn(2, in_features).half(), False, relative_error, tolerance)


@pytest.mark.parametrize("codebook_dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("x_dtype", [FP32, FP16, BF16], ids=str)
def test_other_codebook_dtypes_and_small_codebooks(make_layer, relative_error, tolerance, x_dtype, codebook_dtype):
    layer = make_layer(codebook_size=13, dtype=codebook_dtype)
    check(layer, torch.randn(2, 72).to(x_dtype), False, relative_error, tolerance)


def test_bfloat16_of_any_magnitude(make_layer, relative_error):
    """Tokens are scaled one by one, so that values far outside the range of fp16 lose nothing."""
    layer = make_layer(48, 144)
    x = torch.randn(6, 144) * torch.tensor([0.0, 1e-34, 1e-20, 1.0, 1e20, 1e30])[:, None]
    x[3, ::7] *= 2.0**-20  # magnitudes a million apart within a token
    x = x.to(BF16)
    y, expected = run(layer, x, False), linear_ref(x.float(), *layer.linear_args(False))
    assert not y[0].any()
    for row in range(1, 6):
        assert relative_error(y[row], expected[row]) < 6e-3


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_infinities_stay_in_their_token(make_layer, dtype, value):
    layer = make_layer()
    x = torch.randn(3, 72).to(dtype)
    clean = run(layer, x, True)
    x[1, 5] = value
    y = run(layer, x, True)
    assert not y[1].isfinite().any()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


def test_strided_arguments(make_layer, relative_error, tolerance):
    layer = make_layer()
    codes, codebooks, scales, order = layer.tensors
    layer.tensors = (
        codes,
        codebooks.transpose(1, 2).contiguous().transpose(1, 2),
        scales[::2].repeat_interleave(2),
        order,
    )
    x = torch.randn(72, 6).half()[:, ::2].T
    assert not x.is_contiguous() and not layer.tensors[1].is_contiguous()
    check(layer, x, False, relative_error, tolerance)


@pytest.mark.parametrize("num_tokens", [3, 17])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_nothing_outside_the_tensors_is_used(
    make_layer, relative_error, tolerance, guarded, guarded_empty, dtype, num_tokens
):
    layer = make_layer(50, 72, nbits=10, codebook_size=700)
    check(layer, torch.randn(num_tokens, 72).to(dtype), True, relative_error, tolerance, copy=guarded)


def test_results_repeat(make_layer):
    layer, x = make_layer(), torch.randn(5, 72).half()
    assert torch.equal(run(layer, x, True), run(layer, x, True))


def test_tiles_fit_the_kernel():
    for blocks in all_blocks():
        assert blocks.tokens % 8 == 0 and blocks.rows in (32, 64), "sizes that the kernel's index arithmetic needs"
        assert blocks.warps * blocks.rows * blocks.tokens * 4 <= 64 * 1024, "shared memory of the last sum"


def test_kernel_for():
    assert kernel_for(1, 4096, 4096, 256) == kernel_for(2, 4096, 4096, 256) == "gemv"
    assert kernel_for(1, 255, 4096, 256) == kernel_for(1, 4096, 2048, 256) == kernel_for(1, 4096, 4096, 512) == "gemm"
    assert kernel_for(3, 4096, 4096, 256) == kernel_for(128, 576, 576, 4096) == "gemm"
    assert kernel_for(129, 4096, 4096, 256) == "dequantize + matmul"
    assert kernel_for(tuning._GEMM_MAX_TOKENS + 1, 4096, 4096, 4096) == "dequantize + matmul"


@pytest.mark.parametrize(
    ("tokens", "rows", "expected"),
    [
        (8, 4096, (8, 32, 16)),
        (8, 11008, (8, 32, 8)),
        (8, 14336, (8, 64, 8)),
        (16, 8192, (16, 32, 16)),
        (32, 4096, (32, 32, 8)),
        (32, 14336, (32, 64, 4)),
        (64, 2048, (32, 32, 8)),
        (64, 4096, (64, 32, 8)),
        (64, 14336, (64, 64, 4)),
        (128, 4096, (32, 64, 4)),
        (128, 8192, (64, 64, 4)),
    ],
)
def test_blocks_are_those_that_were_fastest(tokens, rows, expected):
    blocks = gemm_blocks(tokens, rows, 8, exact=False, hip=False)
    assert (blocks.tokens, blocks.rows, blocks.warps) == expected and blocks.num_warps == blocks.warps


def test_codewords_of_16_leave_no_room_for_64_rows_of_64_tokens():
    assert gemm_blocks(64, 14336, 16, exact=False, hip=False) == gemm_blocks(32, 14336, 8, exact=False, hip=False)
