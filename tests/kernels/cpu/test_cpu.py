"""The compiled CPU kernel: accuracy, threads, safety against bad input, and how it is found and chosen."""

import ctypes
import itertools
import os
import subprocess
import sys
import threading

import pytest
import torch
from crvq_kernels import cpu, dequantize_ref, linear, linear_ref, tile_codes
from crvq_kernels.cpu import binding
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

INSTRUCTIONS = list(cpu.INSTRUCTIONS)


@pytest.fixture(params=INSTRUCTIONS)
def instructions(request, choose_cpu):
    choose_cpu(request.param)
    return request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def tiled(layer, bias=False):
    codes, *others = layer.tensors
    tiles = tile_codes(codes, layer.constants[0], layer.codes.shape[1])
    return (tiles, *others, layer.bias if bias else None, *layer.constants)


def exact(x, layer):
    """The layer in float64."""
    double = (layer.tensors[0], *(tensor.double() for tensor in layer.tensors[1:3]), layer.tensors[3])
    return x.double() @ dequantize_ref(*double, *layer.constants).double().T


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize(("out_features", "in_features"), [(576, 576), (320, 1536), (128, 4096)])
def test_accuracy(make_layer, relative_error, instructions, out_features, in_features, outliers):
    critical = max(1, in_features // 400)
    layer = make_layer(out_features, in_features, num_critical_groups=critical)
    x = torch.randn(5, in_features)
    if outliers:
        x[:, layer.tensors[3][: critical * 8].long()] *= 20
        x[:, :4] *= 50
    assert relative_error(linear(x, *tiled(layer)), exact(x, layer)) < (2e-4 if instructions == "vbmi" else 2e-6)


@st.composite
def cases(draw):
    in_group_size = draw(st.sampled_from([4, 8, 16]))
    groups = draw(st.integers(1, 80))
    return {
        "out_features": draw(st.integers(1, 200)),
        "in_features": groups * in_group_size,
        "in_group_size": in_group_size,
        "nbits": draw(st.integers(4, 12)),
        "num_extended": draw(st.integers(0, 7)),
        "num_critical_groups": draw(st.integers(0, groups)),
        "num_tokens": draw(st.integers(1, 20)),
    }


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_any_shape(name, make_layer, relative_error, choose_cpu):
    choose_cpu(name)

    @given(cases(), st.randoms())
    def check(case, random):
        num_tokens = case.pop("num_tokens")
        layer = make_layer(**case, codebook_size=random.randint(1, 2 ** case["nbits"]))
        x = torch.randn(num_tokens, case["in_features"])
        layer.bias = torch.zeros(case["out_features"])
        # Against the size of the sums, not of what may be left of them: with one codeword all can cancel.
        size = linear_ref(x.abs(), layer.tensors[0], layer.tensors[1].abs(), *layer.linear_args(False)[2:]).norm()
        difference = (linear(x, *tiled(layer)) - linear_ref(x, *layer.linear_args(False))).norm()
        assert difference <= (2e-4 if name == "vbmi" else 2e-6) * size + 1e-6

    check()


@pytest.mark.parametrize("num_tokens", [9, 70])  # threads share a pass; each has passes of its own
def test_same_results_for_any_number_of_threads(make_layer, instructions, threads, num_tokens):
    layer = make_layer(1088, 1032, num_critical_groups=3)
    x = torch.randn(num_tokens, 1032)
    results = []
    for count in (1, 2, 3, 5):
        threads(count)
        results += [linear(x, *tiled(layer, True)) for _ in range(180 // num_tokens)]
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_token_does_not_depend_on_its_batch(make_layer, instructions):
    layer = make_layer(200, 2064, num_critical_groups=3)
    x = torch.randn(11, 2064)
    y = linear(x, *tiled(layer, True))
    assert all(torch.equal(linear(x[i : i + 1], *tiled(layer, True)), y[i : i + 1]) for i in range(11))


def test_tables_serve_prompts(choose_cpu):
    """One token, few, and a prompt of a layer of SmolLM2 and of a 7B model; dequantizing is for large codebooks."""
    choose_cpu("avx2")
    for num_tokens, out_features in itertools.product((1, 2, 16, 128, 512), (576, 4096)):
        assert cpu.uses_tables(num_tokens, out_features, 8, torch.float32)
    assert not cpu.uses_tables(512, 576, 12, torch.float32) and cpu.uses_tables(1, 576, 12, torch.float32)


def test_calls_from_several_python_threads(make_layer, instructions, threads):
    threads(2)
    layers = [make_layer(512 + 64 * i, 1024, num_critical_groups=3) for i in range(3)]
    xs = [torch.randn(8, 1024) for _ in layers]
    expected = [linear(x, *tiled(layer)) for x, layer in zip(xs, layers, strict=True)]
    wrong = []

    def work(x, layer, right):
        for _ in range(50):
            if not torch.equal(linear(x, *tiled(layer)), right):
                wrong.append(layer)

    running = [threading.Thread(target=work, args=args) for args in zip(xs, layers, expected, strict=True)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_starts_its_own_threads(make_layer, instructions, threads):
    threads(2)
    layer = make_layer(1024, 1024)
    args, x = tiled(layer), torch.randn(8, 1024)
    expected = linear(x, *args)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(linear(x, *args), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_spoils_its_token_only(make_layer, instructions, value):
    layer = make_layer()
    x = torch.randn(3, 72)
    x[1, 5] = value
    y = linear(x, *tiled(layer))
    assert y[[0, 2]].isfinite().all() and y[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_channel_order_of_any_integer_dtype(make_layer, relative_error, instructions, dtype):
    layer = make_layer()
    args = list(tiled(layer))
    args[3] = args[3].to(dtype)
    x = torch.randn(2, 72)
    assert relative_error(linear(x, *args), linear_ref(x, *layer.linear_args(False))) < 1.5e-4


@pytest.mark.parametrize("channel", [72, -1, 30000])
@pytest.mark.parametrize("num_tokens", [1, 300])
def test_channels_that_are_not_there_are_refused(make_layer, instructions, channel, num_tokens):
    args = list(tiled(make_layer(nbits=8 if num_tokens == 1 else 12)))  # tables, and dequantize + matmul
    args[3] = args[3].short()
    args[3][7] = channel
    with pytest.raises((ValueError, IndexError, RuntimeError), match="0..71|out of"):
        linear(torch.randn(num_tokens, 72), *args)


def test_codes_past_the_end_of_a_codebook_stay_within_memory(make_layer, instructions):
    for nbits in (8, 11):
        layer = make_layer(nbits=nbits, codebook_size=3)
        args = list(tiled(layer))
        args[0].fill_(255)
        assert linear(torch.randn(2, 72), *args).shape == (2, 100)


@pytest.mark.parametrize("position", [0, 1, 2, 3, 4])
def test_strided_arguments(make_layer, relative_error, instructions, position):
    layer = make_layer()
    args = list(tiled(layer, True))
    args[position] = torch.stack([args[position], args[position]], -1)[..., 0]
    assert not args[position].is_contiguous()
    x = torch.randn(2, 72)
    assert relative_error(linear(x, *args), linear_ref(x, *layer.linear_args(True))) < 1.5e-4


def test_other_dtypes_are_converted(make_layer, relative_error, instructions):
    layer = make_layer(dtype=torch.float64)
    layer.bias = layer.bias.double()
    x = torch.randn(2, 72)
    assert relative_error(linear(x, *tiled(layer, True)), linear_ref(x, *layer.linear_args(True))) < 1.5e-4


def test_nothing_is_written_outside_the_result(make_layer, instructions):
    layer = make_layer(100, 72)
    guarded = torch.full((3 * 100 + 64,), 7.0)
    args, x = tiled(layer), torch.randn(3, 72)
    numbers = (3, 0, 0, 0, cpu.library().level, 1, 0)
    call = binding._CALL.pack(x.data_ptr(), guarded[32:].data_ptr(), *numbers) + cpu.Layer(*args)._constants
    assert cpu.library().linear(call) == 0
    assert (guarded[:32] == 7).all() and (guarded[-32:] == 7).all()
    assert torch.equal(guarded[32:-32].view(3, 100), linear(x, *args))


def test_fake_and_vmapped_tensors_do_not_reach_the_kernel(make_layer, instructions):
    args = tiled(make_layer())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(torch.randn(2, 72))
        assert linear(fake, *args).shape == (2, 100)
        assert type(linear(torch.randn(2, 72), *args)) is type(fake)
    x = torch.randn(4, 2, 72)
    y = torch.func.vmap(lambda row: linear(row, *args))(x)
    torch.testing.assert_close(y, linear(x, *args), rtol=1e-3, atol=1e-3)


def test_choice_by_environment(monkeypatch):
    monkeypatch.setattr(binding, "library", binding.library.__wrapped__)
    monkeypatch.setenv("CRVQ_CPU", "fast")
    with pytest.raises(
        ValueError, match="CRVQ_CPU must be one of scalar, avx2, avx512bw, vbmi, neon, torch or unset, got 'fast'"
    ):
        binding.library()
    monkeypatch.setenv("CRVQ_CPU", " Torch ")
    assert binding.library() is None and "CRVQ_CPU" in binding.why_not_better()


def test_no_library_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(binding, "library", binding.library.__wrapped__)
    monkeypatch.setattr(binding, "FILE", tmp_path / "libcrvq_cpu.so")
    monkeypatch.delenv("CRVQ_CPU", raising=False)
    assert binding.library() is None
    assert "no compiled kernel" in binding.why_not_better() and "C compiler" in binding.why_not_better()
    monkeypatch.setenv("CRVQ_CPU", "scalar")
    with pytest.raises(ValueError, match="CRVQ_CPU asks for 'scalar', but there is no compiled kernel"):
        binding.library()


def test_a_library_of_other_sources_is_not_used(monkeypatch):
    class Other:
        def __init__(self, path):
            self.crvq_call_size = lambda: binding._CALL.size + 8

    monkeypatch.setattr(ctypes, "CDLL", Other)
    with pytest.raises(OSError, match="built from other sources"):
        binding.Library(binding.FILE)


def test_more_than_the_processor_has_is_refused(monkeypatch):
    monkeypatch.setattr(binding, "library", binding.library.__wrapped__)

    class Old:
        supported, level = [0, 1], 1

        def __init__(self, path):
            pass

    monkeypatch.setattr(binding, "Library", Old)
    monkeypatch.setenv("CRVQ_CPU", "vbmi")
    with pytest.raises(ValueError, match="asks for 'vbmi', but this processor has scalar, avx2 only"):
        binding.library()
    monkeypatch.delenv("CRVQ_CPU")
    assert binding.why_not_better() == "this processor has no AVX-512 VBMI"


def test_importing_the_package_does_not_load_the_library():
    code = "import crvq_kernels; print(crvq_kernels.cpu.library.cache_info().misses)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "0"
