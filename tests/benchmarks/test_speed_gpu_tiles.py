"""benchmarks/speed/gpu_tiles.py as far as it goes without a GPU: which tiles, rows, and what is wrong."""

import types

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.common.rows import RESULTS, read  # noqa: E402
from benchmarks.speed import gpu_kernels as kernels  # noqa: E402
from benchmarks.speed import gpu_tiles  # noqa: E402

FP16 = torch.float16


@pytest.fixture
def tune(monkeypatch):
    properties = types.SimpleNamespace(multi_processor_count=132)
    layer = kernels.random_layer((576, 576), "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(kernels, "random_layer", lambda shape, device, **options: layer)
    monkeypatch.setattr(kernels, "num_layers", lambda nbytes: 2)
    monkeypatch.setattr(torch, "randn", lambda *shape, device=None: torch.ones(shape))
    return gpu_tiles


def test_every_tile_gets_a_row_and_one_of_them_is_chosen(tune, monkeypatch, capsys):
    seen = []

    def capture(way, x, layers):
        kernel = "gemv" if way is kernels.OURS["gemv"] else "gemm"
        seen.append(getattr(getattr(tune, f"{kernel}_module"), f"{kernel}_blocks")(len(x)))
        return seen[-1]

    monkeypatch.setattr(kernels, "wrong", lambda *args: None)
    monkeypatch.setattr(kernels, "capture", capture)
    monkeypatch.setattr(kernels, "time_graphs", lambda graphs, repeats: {name: [2e-6] for name in graphs})
    rows = tune.time_tiles((576, 576), FP16, dict.fromkeys(("gpu", "torch", "triton", "commit"), "x"))
    assert list(rows[0]) == list(read(RESULTS / "gpu_tiles.csv")[0])
    assert len(seen) == len(rows) > 40
    assert {row["kernel"] for row in rows} == {"gemv", "gemm"} and {row["microseconds"] for row in rows} == {1.0}
    chosen = [(row["tokens"], row["kernel"]) for row in rows if row["chosen"]]
    assert sorted(chosen) == [(1, "gemm"), (1, "gemv"), *((tokens, "gemm") for tokens in (2, 8, 16, 32, 64, 128))]
    # What was put in place of the choice is taken away again.
    assert tune.gemm_module.gemm_blocks(8, 576, 8, False, False).tokens == 8
    assert "  2  GemmBlocks" in capsys.readouterr().out


def test_what_is_wrong_is_named_and_not_timed(tune, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "capture", None)
    blocks = tune.GemmBlocks(8, 32, 8, 8)
    monkeypatch.setattr(kernels, "wrong", lambda *args: "relative error is 1")
    assert tune.time_tile(blocks, torch.ones(1, 576), [None], None) is None

    def too_much(*args):
        raise RuntimeError("out of resources")

    monkeypatch.setattr(kernels, "wrong", too_much)
    assert tune.time_tile(blocks, torch.ones(1, 576), [None], None) is None
    out = capsys.readouterr().out
    assert "1 tokens: relative error is 1\n" in out and "1 tokens: out of resources\n" in out


def test_without_a_gpu_it_says_so(tune, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="found no GPU to use"):
        tune.main([])
