"""benchmarks/speed/gpu.py as far as it goes without a GPU: its checks, its tables."""

import re

import pytest
import torch
from crvq_kernels import linear_ref, untile_codes

from benchmarks.common.rows import RESULTS, read
from benchmarks.speed import gpu as bench
from benchmarks.speed import gpu_kernels as kernels
from benchmarks.speed.layers import random_layer

pytest.importorskip("triton")
FP16 = torch.float16


def test_dry_run_checks_every_kernel(monkeypatch, capsys):
    used = []
    for name, way in list(kernels.OURS.items()):
        run = way.run
        traced = kernels.Way(lambda x, layer, run=run, name=name: used.append(name) or run(x, layer), way.max_tokens)
        monkeypatch.setitem(kernels.OURS, name, traced)
    bench.main(["--dry-run", "--dtypes", "fp16"])
    assert capsys.readouterr().out == "72x80 d8 e8 default: ok\n72x80 d8 e8 paper: ok\n100x592 d16 e11 paper: ok\n"
    assert set(used) == {"gemv", "gemm", "dequantize + matmul"}


def test_what_a_process_finds_wrong_is_told(monkeypatch):
    monkeypatch.setattr(bench, "check", wrong_in_a_process)
    found = bench.check_in_processes(bench.TINY, [FP16, torch.bfloat16], "cpu", 2)
    assert found == [
        "((72, 80),) () [torch.float16]",
        "((72, 80),) () [torch.bfloat16]",
        "() ((16, 11),) [torch.float16, torch.bfloat16]",
    ]


def wrong_in_a_process(plan, dtypes, device):
    return [f"{plan.shapes} {plan.formats} {dtypes}"]


def wrong_values(x, layer):
    return bench_result(x, layer) * 1.01


def wrong_dtype(x, layer):
    return bench_result(x, layer).float()


def moody(x, layer, calls=[]):  # noqa: B006
    calls.append(1)
    y = bench_result(x, layer)
    y[0, 0] += len(calls) % 2 * 4e-3
    return y


def bench_result(x, layer):
    return (x.float() @ layer.dense().T).to(x.dtype)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            wrong_values,
            r"72x80 d8 e8 default, torch.float16, 1 tokens, gemm: relative error is (9.9e-03|1.0e-02), not",
        ),
        (wrong_dtype, r"result is torch.float32 of shape \[1, 72\], not torch.float16 of shape \[1, 72\]"),
        (moody, r"a second run has another result"),
    ],
)
def test_wrong_kernels_are_found(monkeypatch, run, message):
    plan = bench.Plan(shapes=((72, 80),), formats=(), format_tokens=(), checked_tokens=(1,))
    monkeypatch.setattr(kernels, "OURS", {"gemm": kernels.Way(bench_result)})
    assert bench.check(plan, [FP16], "cpu") == []
    monkeypatch.setattr(kernels, "OURS", {"gemm": kernels.Way(run)})
    (found,) = bench.check(plan, [FP16], "cpu")
    assert re.search(message, found)
    monkeypatch.setattr(bench, "TINY", plan)
    with pytest.raises(SystemExit, match="1 results are wrong; nothing is timed"):
        bench.main(["--dry-run", "--dtypes", "fp16"])


def test_random_layer_is_what_the_reference_multiplies():
    layer = random_layer((40, 64), "cpu", in_group_size=4, nbits=9)
    x = torch.randn(2, 64)
    codes = untile_codes(layer.tensors[0], 9, 40, 16 + 3)
    expected = linear_ref(x, codes, *layer.tensors[1:], None, *layer.constants)
    assert kernels.relative_error(x @ layer.dense().T, expected) < 2e-6
    assert 0.2 < expected.std() < 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("arguments", [[], ["--stage", "model"], ["--quick"], ["--device", "cpu"]], ids=str)
def test_without_a_gpu_it_says_so(arguments):
    with pytest.raises(SystemExit, match="found no GPU to use; without one there is only --dry-run"):
        bench.main(arguments)


def test_layers_are_more_than_the_cache_holds():
    assert kernels.num_layers(2_290_000) * 2_290_000 > 200e6
    assert kernels.num_layers(470_000_000) == 2
    assert kernels.num_layers(40_000) == kernels.MAX_LAYERS


def test_table():
    stamp = {"gpu": "a GPU", "commit": "abc"}
    times = {(1, "gemv"): [3e-6, 2e-6, 9e-6], (1, "dense"): [12e-6], (64, "gemm"): [5e-6], (64, "dense"): [10e-6]}
    rows = [bench.kernel_row(stamp, (8, 16), FP16, tokens, way, values) for (tokens, way), values in times.items()]
    assert rows[0] == stamp | {
        "out_features": 8,
        "in_features": 16,
        "dtype": "float16",
        "tokens": 1,
        "way": "gemv",
        "microseconds": 3.0,
        "fastest": 2.0,
        "slowest": 9.0,
    }
    lines = [line.split("  ") for line in bench.as_table(rows, {1: "gemv", 64: "gemm"}).splitlines()]
    assert [[cell.strip() for cell in line if cell] for line in lines] == [
        ["tokens", "gemv", "dense", "gemm", "chosen", "fastest", "dense / fastest"],
        ["1", "3.0", "12.0", "gemv", "gemv", "4.00"],
        ["64", "10.0", "5.0", "gemm", "gemm", "2.00"],
    ]


def test_kernels_are_timed_and_their_rows_kept(monkeypatch, tmp_path, capsys):
    layer, randn = random_layer((72, 80)), torch.randn
    ours = {name: kernels.Way(bench_result, way.max_tokens) for name, way in kernels.OURS.items()}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "randn", lambda *shape, device=None: randn(*shape))
    monkeypatch.setattr(kernels, "gpu_name", lambda: "a GPU")
    monkeypatch.setattr(kernels, "OURS", ours)
    monkeypatch.setattr(kernels, "random_layer", lambda *arguments, **options: layer)
    monkeypatch.setattr(kernels, "capture", lambda way, x, layers: len(layers))
    monkeypatch.setattr(
        kernels,
        "time_graphs",
        lambda graphs, repeats: {name: [count * 2e-6] * repeats for name, count in graphs.items()},
    )
    options = ["--quick", "--stage", "kernels", "--shapes", "72x80", "--dtypes", "fp16", "--output", str(tmp_path)]
    bench.main(options)
    rows = read(tmp_path / "gpu_kernels.csv")
    assert list(rows[0]) == list(read(RESULTS / "gpu_kernels.csv")[0])
    assert {row["microseconds"] for row in rows} == {"2.0"} and {row["way"] for row in rows} == {*ours, "dense"}
    assert [*dict.fromkeys(row["form"] for row in rows)] == ["default", "paper"]
    assert "72 x 80, default, torch.float16, microseconds" in capsys.readouterr().out
    monkeypatch.setattr(kernels, "OURS", ours | {"gemm": kernels.Way(wrong_values)})
    with pytest.raises(SystemExit, match="72x80, torch.float16, 1 tokens, gemm: relative error is"):
        bench.main(options)
    assert read(tmp_path / "gpu_kernels.csv") == rows


def test_shapes_can_be_chosen(monkeypatch):
    plans = []
    monkeypatch.setattr(bench, "check", lambda plan, dtypes, device: plans.append((plan.shapes, dtypes)) or [])
    bench.main(["--dry-run", "--shapes", "4096x11008", "8x16", "--dtypes", "bf16"])
    assert plans == [(((4096, 11008), (8, 16)), [torch.bfloat16])]


def test_models_decode():
    from benchmarks.speed import gpu_model  # here: transformers is slow to import, in each process of the checks

    rows = list(gpu_model.time_models(True, 64, {"gpu": "none"}, "cpu"))
    assert [(row["way"], row["loop"]) for row in rows] == [
        (way, loop)
        for loop in gpu_model.LOOPS
        for way in gpu_model.WAYS
        if loop == "decode" or way != "crvq of the paper"
    ]
    assert all(row["tokens_per_second"] > 0 and row["gpu"] == "none" for row in rows)
    assert all(0 <= row["same_tokens"] <= 1 for row in rows), "in fp16 rounding decides now and then"
    assert list(gpu_model.time_models(True, 24, {}, "cpu", minutes=0)) == [], "no time, no rows"
    model = gpu_model.random_model(True, "cpu")
    before = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    gpu_model.quantize_randomly_(model, gpu_model.DEFAULT)
    left = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    assert len(before) == 2 * 7 + 1 and left == ["lm_head"]
