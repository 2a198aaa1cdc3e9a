"""The matrix kernel for many tokens against the reference: in the interpreter without a GPU, on the GPU with one."""

import pytest
import torch
from crvq_kernels import encode_codebooks, linear_ref, ops

pytest.importorskip("triton")
from crvq_kernels.hopper import tuning  # noqa: E402
from crvq_kernels.hopper.tuning import _WGMMA_BLOCKS, WgmmaBlocks, wgmma_blocks  # noqa: E402
from crvq_kernels.hopper.wgmma import serves, wgmma  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP16, BF16, INT8 = torch.float16, torch.bfloat16, torch.int8
SMALL = WgmmaBlocks(rows=64, tokens=16, warps=4, quads=2, stages=2, splits=1)
SPLIT = WgmmaBlocks(rows=64, tokens=16, warps=4, quads=2, stages=2, splits=3)
# What tokens past the end hold is nowhere used.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")


def int8_layer(make_layer, *args, **kwargs):
    layer = make_layer(*args, **kwargs)
    codes, codebooks, *others = layer.tensors
    layer.tensors = (codes, encode_codebooks(codebooks.clamp(-4, 3.9)), *others)
    return layer


def run(layer, x, bias, blocks, copy=lambda tensor: tensor):
    args = [x, layer.tiles, *layer.linear_args(bias)[1:]]
    args = (copy(arg.to(DEVICE)) if isinstance(arg, torch.Tensor) else arg for arg in args)
    return wgmma(*args, blocks=blocks).cpu()


def check(layer, x, bias, relative_error, tolerance, blocks, **options):
    y = run(layer, x, bias, blocks, **options)
    assert y.dtype == x.dtype
    assert relative_error(y, linear_ref(x.float(), *layer.linear_args(bias))) < tolerance[x.dtype]


@pytest.mark.parametrize("blocks", [SMALL, SPLIT], ids=["one", "split"])
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("int8", [True, False])
@pytest.mark.parametrize(("num_extended", "num_critical"), [(0, 0), (1, 2), (3, 5)])
def test_codebooks(make_layer, relative_error, tolerance, num_extended, num_critical, int8, dtype, blocks):
    make = int8_layer if int8 else lambda make_layer, *args: make_layer(*args)
    layer = make(make_layer, 100, 200, 8, 8, num_extended, num_critical)
    check(layer, torch.randn(21, 200).to(dtype), int8, relative_error, tolerance, blocks)


@pytest.mark.parametrize("nbits", [4, 7, 10])
def test_small_codebooks_of_any_bits(make_layer, relative_error, tolerance, nbits):
    layer = int8_layer(make_layer, 70, 264, nbits=nbits, codebook_size=13)
    check(layer, torch.randn(3, 264).half(), False, relative_error, tolerance, SMALL)


TILES = {
    WgmmaBlocks(*sizes[:5], splits=2, int8=sizes[6])
    for some in _WGMMA_BLOCKS.values()
    for sizes in some
    if sizes[0] * sizes[1] <= 128 * 64  # larger ones only repeat more of the same
}


@pytest.mark.parametrize("blocks", sorted(TILES, key=str), ids=str)
def test_every_tile(make_layer, relative_error, tolerance, blocks):
    layer = int8_layer(make_layer, 90, 520, num_extended=1, num_critical_groups=3)
    check(layer, torch.randn(blocks.tokens + 3, 520).half(), True, relative_error, tolerance, blocks)


@pytest.mark.parametrize("rows", [128, 256])
def test_warps_with_rows_in_several_instructions(make_layer, relative_error, tolerance, rows):
    layer = int8_layer(make_layer, 300, 72)
    blocks = WgmmaBlocks(rows, 16, rows // 32, 1, 2, 1)
    check(layer, torch.randn(5, 72).half(), True, relative_error, tolerance, blocks)


@pytest.mark.parametrize("blocks", [SMALL, SPLIT], ids=["one", "split"])
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("int8", [True, False])
def test_nothing_outside_the_tensors_is_used(
    make_layer, relative_error, tolerance, guarded, guarded_empty, int8, dtype, blocks
):
    layer = int8_layer(make_layer, 50, 72) if int8 else make_layer(50, 72)
    check(layer, torch.randn(17, 72).to(dtype), True, relative_error, tolerance, blocks, copy=guarded)


def test_infinities_stay_in_their_token(make_layer):
    layer = int8_layer(make_layer)
    x = torch.randn(3, 72).half()
    clean = run(layer, x, True, SMALL)
    x[1, 5] = float("inf")
    y = run(layer, x, True, SMALL)
    assert not y[1].isfinite().any()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


def test_results_repeat(make_layer):
    layer, x = int8_layer(make_layer, 70, 200), torch.randn(18, 200).half()
    assert torch.equal(run(layer, x, True, SPLIT), run(layer, x, True, SPLIT))


def test_blocks_are_chosen_for_any_shape(make_layer, relative_error, tolerance):
    check(int8_layer(make_layer), torch.randn(33, 72).half(), True, relative_error, tolerance, None)
    for shape in ((32, 4096, 532), (256, 11008, 532), (2048, 28672, 8192), (17, 8, 1)):
        for blocks in wgmma_blocks(*shape, 132, True):
            programs = -(-shape[0] // blocks.tokens) * -(-shape[1] // blocks.rows)
            assert 1 <= blocks.splits <= max(1, 8 * 132 // programs)
            assert blocks.rows % (16 * blocks.warps) == 0 and blocks.warps % 4 == 0 and 8 % blocks.quads == 0


def test_what_it_serves():
    cpu, shape = torch.device("cpu"), (2, 256, 8)
    assert serves(cpu, FP16, INT8, shape) and serves(cpu, BF16, FP16, shape)
    assert not serves(cpu, torch.float32, INT8, shape) and not serves(cpu, FP16, BF16, shape)
    for other in ((5, 256, 8), (2, 512, 8), (2, 256, 4)):
        assert not serves(cpu, FP16, INT8, other)


def test_it_runs_where_the_range_says(monkeypatch):
    monkeypatch.setattr(ops, "uses_triton", lambda device: True)
    monkeypatch.setattr("crvq_kernels.hopper.wgmma.torch.cuda.get_device_capability", lambda device: (9, 0))

    def name(num_tokens, in_group_size=8):
        return ops.implementation("cuda", num_tokens, 4096, 4096, 256, 8, FP16, True, INT8, 2, in_group_size)

    assert "wgmma" not in name(64)
    monkeypatch.setattr(tuning, "WGMMA_TOKENS", range(17, 257))
    assert name(64) == name(256) == "triton: wgmma"
    assert name(64, 4) == "triton: gemm" and name(257) == "triton: dequantize + matmul"
