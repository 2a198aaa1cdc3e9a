"""The lookup-table kernel against the reference: in the interpreter without a GPU, on the GPU with one."""

import pytest
import torch
from crvq_kernels import linear_ref

pytest.importorskip("triton")
from crvq_kernels.gpu import gemv as gemv_module  # noqa: E402
from crvq_kernels.gpu.gemv import dot_factors, gemv  # noqa: E402
from crvq_kernels.gpu.tuning import GemvBlocks, gemv_blocks  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# in_group_size, nbits, num_extended, num_critical_groups; 144 channels are 36, 18 or 9 base groups.
FORMATS = [
    pytest.param(8, 8, 3, 2, id="one-slice-of-all-codebooks"),
    pytest.param(8, 8, 3, 18, id="all-critical"),
    pytest.param(8, 7, 2, 7, id="32-groups-exactly"),
    pytest.param(8, 8, 1, 15, id="one-group-past-a-slice"),
    pytest.param(8, 4, 0, 0, id="no-extended-codebooks"),
    pytest.param(8, 5, 9, 6, id="many-small-codebooks"),
    pytest.param(4, 8, 3, 3, id="d4"),
    pytest.param(4, 6, 1, 36, id="d4-all-critical"),
    pytest.param(16, 8, 3, 9, id="d16-all-critical"),
    pytest.param(16, 5, 0, 0, id="d16-no-extended-codebooks"),
]


def run(layer, x, bias=True, copy=lambda tensor: tensor, tiles=None):
    args = [x, layer.tiles if tiles is None else tiles, *layer.linear_args(bias)[1:]]
    return gemv(*(copy(arg.to(DEVICE)) if isinstance(arg, torch.Tensor) else arg for arg in args)).cpu()


def check(layer, x, relative_error, tolerance, bias=True, **options):
    y = run(layer, x, bias, **options)
    assert y.dtype == x.dtype
    assert relative_error(y, linear_ref(x.float(), *layer.linear_args(bias))) < tolerance[x.dtype]


@pytest.fixture
def force_blocks(monkeypatch):
    """Makes the launcher use the given rows and splits, whatever `gemv_blocks` says."""

    def force(rows, splits=1):
        def blocks(num_tokens, out_features, num_slices, num_processors, factors):
            slices = -(-num_slices // splits)
            assert -(-num_slices // slices) == splits
            return GemvBlocks(rows, splits, slices, num_warps=8)

        monkeypatch.setattr(gemv_module, "gemv_blocks", blocks)

    return force


@pytest.mark.parametrize("num_tokens", [1, 2])
@pytest.mark.parametrize(("in_group_size", "nbits", "num_extended", "num_critical"), FORMATS)
def test_formats(make_layer, relative_error, tolerance, in_group_size, nbits, num_extended, num_critical, num_tokens):
    layer = make_layer(100, 144, in_group_size, nbits, num_extended, num_critical)
    x = torch.randn(num_tokens, 144)
    check(layer, x, relative_error, tolerance, bias=num_tokens != 2)


@pytest.mark.parametrize("codebook_dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 2])
def test_dtypes(make_layer, relative_error, tolerance, num_tokens, dtype, codebook_dtype):
    layer = make_layer(37, 304, num_critical_groups=5, dtype=codebook_dtype)
    layer.bias = layer.bias.to(dtype)
    check(layer, torch.randn(num_tokens, 304).to(dtype), relative_error, tolerance)


@pytest.mark.parametrize("num_tokens", [1, 2])
@pytest.mark.parametrize("splits", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [128, 256, 512])
def test_blocks(make_layer, relative_error, tolerance, force_blocks, rows, splits, num_tokens):
    layer = make_layer(rows + 33, 1024, num_critical_groups=5)  # 143 groups in 5 slices, so splits of 2 are uneven
    force_blocks(rows, splits)
    check(layer, torch.randn(num_tokens, 1024), relative_error, tolerance)


@pytest.mark.parametrize("splits", [1, 3])
def test_result_is_the_same_every_time_and_for_every_token(make_layer, force_blocks, splits):
    layer = make_layer(70, 640, num_critical_groups=4)
    force_blocks(128, splits)
    x = torch.randn(3, 640).half()
    y = run(layer, x)
    assert torch.equal(y, run(layer, x))
    assert torch.equal(y, torch.cat([run(layer, token[None]) for token in x]))


@pytest.mark.parametrize("in_group_size", [4, 8, 16])
@pytest.mark.parametrize("codebook_size", [1, 13, 100])
def test_codebooks_smaller_than_their_codes_allow(
    make_layer, relative_error, tolerance, guarded, in_group_size, codebook_size
):
    layer = make_layer(in_group_size=in_group_size, in_features=144, codebook_size=codebook_size)
    check(layer, torch.randn(2, 144), relative_error, tolerance, copy=guarded)


def test_codes_of_more_bits_than_a_small_codebook_needs(make_layer, relative_error, tolerance, guarded):
    layer = make_layer(nbits=10, codebook_size=256)
    check(layer, torch.randn(1, 72), relative_error, tolerance, copy=guarded)


def test_padding_codes_do_not_count(make_layer):
    """Rows and groups that only fill up a tile may hold any code."""
    layer = make_layer(100, 72, num_critical_groups=2)  # 15 groups of 32, 100 rows of 128
    tiles = layer.tiles
    filled = tiles.view(8, 32, 16).clone()
    filled[:, 15:] = 255
    filled[6, :, 4:] = 255
    filled[7:] = 255
    assert (filled.view(-1) != tiles).sum() > tiles.numel() // 2
    x = torch.randn(2, 72)
    assert torch.equal(run(layer, x, tiles=filled.view(-1)), run(layer, x))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_nothing_outside_the_tensors_is_used(
    make_layer, relative_error, tolerance, force_blocks, guarded, guarded_empty, num_tokens, splits
):
    layer = make_layer(100, 640, num_critical_groups=3)
    force_blocks(256, splits)  # more rows than the tiles have
    check(layer, torch.randn(num_tokens, 640), relative_error, tolerance, copy=guarded)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_infinities_stay_in_their_token(make_layer, value):
    layer = make_layer()
    x = torch.randn(2, 72).half()
    clean = run(layer, x)
    x[1, 5] = value
    y = run(layer, x)
    assert not y[1].isfinite().any()
    assert torch.equal(y[0], clean[0])


def test_strided_arguments(make_layer, relative_error, tolerance):
    layer = make_layer()
    codes, codebooks, scales, order = layer.tensors
    layer.tensors = (codes, codebooks.transpose(1, 2).contiguous().transpose(1, 2), scales, order)
    x = torch.randn(72, 4)[:, ::2].T
    assert not x.is_contiguous() and not layer.tensors[1].is_contiguous()
    check(layer, x, relative_error, tolerance)


def test_factors_hold_both_types(monkeypatch):
    """In the interpreter nothing is multiplied in bf16; on a GPU, neither type is widened for bf16 tokens."""
    monkeypatch.setattr(gemv_module.triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.version, "hip", None)
    assert [dot_factors(dtype, dtype) for dtype in (FP16, BF16, FP32)] == ["fp16", "bf16", "fp32"]
    assert (dot_factors(BF16, FP16), dot_factors(FP16, BF16)) == ("bf16x2", "tf32")
    assert dot_factors(FP16, FP32) == dot_factors(FP32, FP16) == "fp32"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert dot_factors(BF16, FP16) == "fp32" and dot_factors(BF16, BF16) == "bf16"
    monkeypatch.setattr(gemv_module.triton.knobs.runtime, "interpret", True)
    assert dot_factors(BF16, BF16) == "fp32"


def test_two_bfloat16_numbers_hold_one_of_fp16():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(FP16)
    every = every[every.isfinite()].float()
    first = every.bfloat16().float()
    assert torch.equal(first + (every - first).bfloat16().float(), every)


@pytest.mark.parametrize("factors", ["fp16", "bf16", "bf16x2", "tf32", "fp32"])
@pytest.mark.parametrize("num_tokens", [1, 2, 5])
def test_blocks_cover_every_slice_once(num_tokens, factors):
    for out_features in (1, 576, 1536, 4096, 11008, 128256):
        for num_slices in (1, 3, 7, 17, 46, 119):
            for num_processors in (20, 108, 132, 304):
                blocks = gemv_blocks(num_tokens, out_features, num_slices, num_processors, factors)
                assert (blocks.splits - 1) * blocks.slices_per_program < num_slices
                assert blocks.splits * blocks.slices_per_program >= num_slices
                assert blocks.rows <= (512 if factors != "fp32" else 256)


@pytest.mark.parametrize(("out_features", "num_slices"), [(576, 7), (4096, 17), (4096, 46), (8192, 119)])
def test_splits_keep_half_of_a_large_gpu_busy(out_features, num_slices):
    """A layer of few rows has few programs of a row block each; as many slices as it has are shared out."""
    blocks = gemv_blocks(1, out_features, num_slices, 132)
    programs = -(-out_features // blocks.rows) * blocks.splits
    assert programs >= min(132 // 2, -(-out_features // blocks.rows) * num_slices)
