"""The CUDA kernel for 1 to 16 tokens: run on a CPU by `emulator.h`, compiled where NVRTC is, launched by `ops`."""

import functools
import logging
import subprocess
from pathlib import Path
from types import SimpleNamespace

import emulation
import pytest
import torch
from crvq_kernels import implementation, linear, linear_ref, ops
from crvq_kernels.gpu import mma_gather as module
from crvq_kernels.gpu import nvrtc
from crvq_kernels.gpu.mma_gather import mma_gather
from crvq_kernels.gpu.tuning import MmaGatherBlocks, mma_gather_blocks

FP16, BF16 = torch.float16, torch.bfloat16
SMALL, LARGE = MmaGatherBlocks(16, 2, 2, 1, True), MmaGatherBlocks(128, 2, 1, 1, False)
STAGED = MmaGatherBlocks(32, 8, 1, 2, False)
needs_compiler = pytest.mark.skipif(emulation.COMPILER is None, reason="needs a C++ compiler")


@functools.cache
def emulated(macros, names):
    return emulation.load(module.SOURCE, macros, names, programs=1)


@pytest.fixture
def emulator(monkeypatch):
    """Has the launcher run on the CPU, on a GPU of 2 processors that run a program each."""

    def load(source, macros, names, device):
        return emulated(macros, names)

    monkeypatch.setattr(nvrtc, "load", load)
    monkeypatch.setattr(nvrtc, "max_shared_bytes", lambda device: emulation.SHARED_BYTES)
    monkeypatch.setattr(module, "num_processors", lambda device: 2)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))


@pytest.fixture
def int8_layer(make_layer):
    def make(*args, order_dtype=torch.int32, **kwargs):
        layer = make_layer(*args, dtype=torch.int8, **kwargs)
        codes, codebooks, scales, order = layer.tensors
        codebooks[0, :2] = torch.tensor([[-128], [127]])
        layer.tensors = (codes, codebooks, scales, order.to(order_dtype))
        return layer

    return make


def run(layer, x, blocks=None, bias=True, tiles=None, copy=lambda tensor: tensor):
    args = [x, layer.tiles if tiles is None else tiles, *layer.linear_args(bias)[1:]]
    return mma_gather(*(copy(arg) if isinstance(arg, torch.Tensor) else arg for arg in args), blocks=blocks)


@needs_compiler
@pytest.mark.usefixtures("emulator")
class TestEmulated:
    @pytest.mark.parametrize("num_tokens", [1, 2])
    @pytest.mark.parametrize(
        ("shape", "num_extended", "num_critical", "nbits"),
        [((100, 72), 1, 2, 8), ((37, 136), 0, 0, 8), ((130, 520), 3, 5, 7), ((64, 64), 2, 8, 4)],
    )
    def test_formats(
        self, int8_layer, relative_error, tolerance, shape, num_extended, num_critical, nbits, num_tokens
    ):
        """All numbers of codebooks; with two programs at a time, some do several blocks of rows."""
        layer = int8_layer(*shape, 8, nbits, num_extended, num_critical)
        x = torch.randn(num_tokens, shape[1]).half()
        y = run(layer, x, SMALL)
        assert y.dtype == x.dtype
        assert relative_error(y, linear_ref(x.float(), *layer.linear_args(True))) < tolerance[FP16]

    @pytest.mark.parametrize("num_tokens", [3, 4, 7, 9, 16])
    @pytest.mark.parametrize("blocks", [LARGE, STAGED], ids=["128-rows", "32-rows"])
    def test_more_tokens(self, int8_layer, relative_error, tolerance, num_tokens, blocks):
        layer = int8_layer(100, 200, num_extended=1, num_critical_groups=3)
        x = torch.randn(num_tokens, 200).half()
        y = run(layer, x, blocks, bias=False)
        assert relative_error(y, linear_ref(x.float(), *layer.linear_args(False))) < tolerance[FP16]

    @pytest.mark.parametrize("order_dtype", [torch.uint8, torch.int16, torch.int64], ids=str)
    def test_bfloat16_and_any_order(self, int8_layer, relative_error, tolerance, order_dtype):
        layer = int8_layer(40, 136, num_extended=1, order_dtype=order_dtype)
        layer.bias = layer.bias.bfloat16()
        x = torch.randn(1, 136).bfloat16()
        y = run(layer, x, SMALL)
        assert y.dtype == BF16
        assert relative_error(y, linear_ref(x.float(), *layer.linear_args(True))) < tolerance[BF16]

    def test_programs_with_rows_past_the_last_tile(self, int8_layer, relative_error, tolerance):
        layer = int8_layer(40, 200, num_extended=1)  # 64 rows in tiles, 128 in a program
        x = torch.randn(3, 200).half()
        assert relative_error(run(layer, x, LARGE), linear_ref(x.float(), *layer.linear_args(True))) < tolerance[FP16]

    def test_all_blocks_have_the_same_bits(self, int8_layer):
        layer = int8_layer(100, 200, num_extended=1, num_critical_groups=3)
        x = torch.randn(2, 200).half()
        expected = run(layer, x, SMALL)
        for blocks in (STAGED, MmaGatherBlocks(64, 3, 2, 1, True)):
            assert torch.equal(run(layer, x, blocks), expected)
        assert torch.equal(torch.cat([run(layer, token[None], SMALL) for token in x]), expected)

    @pytest.mark.parametrize("num_tokens", [1, 5])
    def test_an_outlier_takes_few_digits_from_the_others(self, int8_layer, relative_error, num_tokens):
        """Of a token with an element 50 times as large as the others."""
        layer = int8_layer(64, 256, num_extended=0)
        x = torch.randn(num_tokens, 256)
        x[:, 17] = 50 * x.abs().amax(1)
        x = x.half()
        expected = linear_ref(x.float(), *layer.linear_args(False))
        error = relative_error(run(layer, x, SMALL if num_tokens == 1 else STAGED, bias=False), expected)
        assert error < (5e-4 if num_tokens == 1 else 2e-3)

    @pytest.mark.parametrize(
        ("value", "dtype"), [(0.0, FP16), (6e-8, FP16), (1000.0, FP16), (0.0, BF16), (1e-33, BF16)]
    )
    def test_extreme_tokens(self, int8_layer, value, dtype):
        layer = int8_layer(64, 64, num_extended=0)
        x = torch.full((1, 64), value).to(dtype)
        expected = linear_ref(x.float(), *layer.linear_args(False)).to(dtype)
        y = run(layer, x, SMALL, bias=False)
        assert (y - expected).abs().max() <= 0.01 * expected.abs().max() + (6e-8 if dtype == FP16 else 0)

    @pytest.mark.filterwarnings("ignore:invalid value")
    @pytest.mark.parametrize("value", [float("inf"), float("nan")])
    def test_infinities_stay_in_their_token(self, int8_layer, value):
        layer = int8_layer(100, 72, num_extended=1)
        x = torch.randn(3, 72).half()
        clean = run(layer, x, STAGED)
        x[1, 5] = value
        y = run(layer, x, STAGED)
        assert not y[1].isfinite().any()
        assert torch.equal(y[::2], clean[::2])

    def test_padding_codes_do_not_count(self, int8_layer):
        layer = int8_layer(100, 72, num_extended=1, num_critical_groups=2)  # 11 groups of 32, 100 rows of 128
        tiles = layer.tiles
        filled = tiles.view(8, 32, 16).clone()
        filled[:, 11:] = 255
        filled[6, :, 4:] = 255
        filled[7:] = 255
        x = torch.randn(1, 72).half()
        assert torch.equal(run(layer, x, SMALL, tiles=filled.view(-1)), run(layer, x, SMALL))

    @pytest.mark.parametrize("num_tokens", [1, 3])
    def test_nothing_outside_the_tensors_is_used(
        self, int8_layer, relative_error, tolerance, guarded, guarded_empty, num_tokens
    ):
        layer = int8_layer(100, 200, num_extended=1, num_critical_groups=3)
        x = torch.randn(num_tokens, 200).half()
        y = run(layer, x, SMALL if num_tokens == 1 else STAGED, copy=guarded)
        assert relative_error(y, linear_ref(x.float(), *layer.linear_args(True))) < tolerance[FP16]

    def test_views_are_read_as_they_look(self, int8_layer):
        layer = int8_layer(40, 136, num_extended=1)
        x = torch.randn(1, 137).half()[:, 1:]  # at no multiple of 16 bytes
        assert x.data_ptr() % 16
        assert torch.equal(run(layer, x, SMALL), run(layer, x.clone(), SMALL))

    def test_what_fits_no_shared_memory_is_said(self, int8_layer, monkeypatch):
        layer = int8_layer(40, 136, num_extended=1)
        monkeypatch.setattr(nvrtc, "max_shared_bytes", lambda device: 48 * 1024)
        with pytest.raises(RuntimeError, match="more than the 49152 bytes of shared memory"):
            run(layer, torch.randn(1, 136).half())


@pytest.fixture
def on_cuda(monkeypatch):
    """Has `ops` choose as on an NVIDIA GPU where the CUDA kernel is switched on."""
    monkeypatch.setenv("CRVQ_MMA_GATHER", "4")
    monkeypatch.setattr(module, "_capability", lambda device: (8, 0))
    monkeypatch.setattr(module, "_failure", None)
    monkeypatch.setattr(ops, "uses_triton", lambda device: True)
    monkeypatch.setattr(nvrtc, "max_shared_bytes", lambda device: emulation.SHARED_BYTES)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    module._fits.cache_clear()
    yield
    module._fits.cache_clear()


def test_it_serves_what_it_is_written_for(on_cuda):
    def name(num_tokens=1, dtype=FP16, codebook_dtype=torch.int8, num_codebooks=2, size=256, group=8, channels=4096):
        return implementation(
            "cuda:0", num_tokens, 64, channels, size, 8, dtype, True, codebook_dtype, num_codebooks, group
        )

    assert name() == name(4) == name(dtype=BF16) == name(num_codebooks=4) == "cuda: mma_gather"
    others = [name(5), name(dtype=torch.float32), name(codebook_dtype=FP16), name(num_codebooks=5)]
    others += [name(size=512), name(group=4), name(channels=2**17)]
    assert all(other.startswith("triton: ") for other in others)


def test_a_small_shared_memory_has_room_for_two_codebooks(on_cuda, monkeypatch):
    monkeypatch.setenv("CRVQ_MMA_GATHER", "16")
    monkeypatch.setattr(nvrtc, "max_shared_bytes", lambda device: 99 * 1024)  # of compute capability 8.6 and 8.9
    for num_tokens in (1, 2, 3, 8, 9, 16):
        names = [implementation("cuda:0", num_tokens, 64, 28672, 256, 8, FP16, True, torch.int8, n) for n in (2, 3)]
        assert names[0] == "cuda: mma_gather" and names[1].startswith("triton: ")


def test_it_runs_by_itself_where_it_was_measured(on_cuda, monkeypatch):
    monkeypatch.delenv("CRVQ_MMA_GATHER")
    assert implementation("cuda:0", 1, dtype=FP16, codebook_dtype=torch.int8).startswith("triton: ")
    monkeypatch.setattr(module, "_capability", lambda device: (9, 0))

    def runs(num_tokens, in_features=4096, dtype=FP16, num_codebooks=2):
        sizes = (num_tokens, 4096, in_features, 256, 8, dtype, True, torch.int8, num_codebooks)
        return implementation("cuda:0", *sizes) == "cuda: mma_gather"

    assert runs(1) and runs(16) and runs(2, 28672) and runs(8, num_codebooks=4)
    assert not any([runs(1, 28672), runs(16, num_codebooks=4), runs(1, dtype=BF16), runs(1, num_codebooks=3)])


@pytest.mark.parametrize(
    "error", [OSError("libnvrtc.so.13: not found"), RuntimeError("CUDA_ERROR_NO_BINARY")], ids=str
)
def test_a_failure_is_logged_once_and_triton_runs(on_cuda, int8_layer, relative_error, monkeypatch, caplog, error):
    pytest.importorskip("triton")
    calls = []

    def fail(*args, **kwargs):
        calls.append(args)
        raise error

    monkeypatch.setattr(nvrtc, "load", fail)
    layer = int8_layer(100, 72, num_extended=1)
    x = torch.randn(2, 72).half()
    with caplog.at_level(logging.WARNING, "crvq"):
        for _ in range(2):
            y = linear(x, layer.tiles, *layer.linear_args(True)[1:])
            assert relative_error(y, linear_ref(x.float(), *layer.linear_args(True))) < 5e-4
    (record,) = caplog.records
    assert "mma_gather failed" in record.message and str(error) in record.message
    assert len(calls) == 1


def test_a_compiled_kernel_is_kept(monkeypatch, tmp_path):
    compiled = []

    def compile_(source, options):
        compiled.append(options)
        return b"machine code"

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(nvrtc, "_nvrtc", lambda *args: None)
    monkeypatch.setattr(nvrtc, "_compiled", compile_)
    for _ in range(2):
        assert nvrtc.cubin("source", (("WARPS", 8),), "sm_90") == b"machine code"
    assert compiled == [[b"--gpu-architecture=sm_90", b"--std=c++17", b"-DWARPS=8"]]
    nvrtc.cubin("source", (("WARPS", 8),), "sm_80")
    nvrtc.cubin("other source", (("WARPS", 8),), "sm_90")
    assert len(compiled) == 3


def resources(image: bytes, path: Path) -> list[dict[str, int]]:
    """Returns what each kernel of a cubin takes, by the names of cuobjdump."""
    tool = Path(pytest.importorskip("triton").__file__).parent / "backends/nvidia/bin/cuobjdump"
    path.write_bytes(image)
    printed = subprocess.run([tool, "-res-usage", path], check=True, capture_output=True, text=True).stdout
    lines = [line.split() for line in printed.splitlines() if "REG:" in line]
    return [{name: int(value) for name, _, value in (part.partition(":") for part in line)} for line in lines]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_it_compiles_for_gpus_without_spills(architecture, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        nvrtc._compiler()
    except OSError:
        pytest.skip("needs the NVRTC library: pip install nvidia-cuda-nvrtc")
    source = module.SOURCE.read_text(encoding="utf-8")
    for num_tokens in (1, 4, 8, 16):
        for blocks in mma_gather_blocks(num_tokens):
            macros = module.macros(blocks, num_tokens, 2, 4, FP16)
            found = resources(nvrtc.cubin(source, macros, architecture), tmp_path / "kernels.cubin")
            assert len(found) == (1 if blocks.fused else 2)
            for kernel in found:
                assert kernel["STACK"] == kernel["LOCAL"] == 0, blocks
                assert kernel["REG"] * 32 * blocks.warps * blocks.programs <= 65536, blocks
