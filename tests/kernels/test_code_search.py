"""The search for codes, compiled and in PyTorch, against plain float64."""

import pytest
import torch
from crvq_kernels import code_search, cpu
from crvq_kernels.cpu.binding import CHOICES
from hypothesis import given
from hypothesis import strategies as st


def choose_kernel(choose_cpu, monkeypatch):
    """Has Triton's interpreter choose the codes for the rest of a test."""
    pytest.importorskip("triton")
    choose_cpu("torch")
    monkeypatch.setattr(code_search, "by_kernel", lambda device: True)


@pytest.fixture(params=CHOICES)
def way(request, choose_cpu):
    choose_cpu(request.param)
    return request.param


@pytest.fixture(params=[*CHOICES, "triton"])
def any_way(request, choose_cpu, monkeypatch):
    if request.param == "triton":
        choose_kernel(choose_cpu, monkeypatch)
    else:
        choose_cpu(request.param)


def make_search(rows=37, groups=6, first=2, all_groups=11, critical=4, extended=2, size=29, d=8):
    """Random arguments of `choose_codes_`, without its last three, and those three."""
    basis = torch.randn(groups * d, 2 * groups * d)
    metric = basis @ basis.T / len(basis)
    codebooks = torch.randn(1 + extended, size, d)
    blocks = metric.view(groups, d, groups, d).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    energies = -0.5 * torch.einsum("bcd,gde,bce->gbc", codebooks, blocks, codebooks)
    codes = torch.randint(size, (all_groups + extended * critical, rows))
    wanted = torch.randn(rows, groups * d) * 3
    return (wanted, codes, codebooks, energies, metric), (first, all_groups, critical)


def check_search(tensors, numbers):
    """Runs `choose_codes_` and checks every choice, in the order they are made, against float64."""
    wanted, codes, codebooks, energies, metric = (tensor.clone() for tensor in tensors)
    first, all_groups, critical = numbers
    change = code_search.choose_codes_(wanted, codes, codebooks, energies, metric, *numbers)
    d, rest = codebooks.shape[2], tensors[0].double()
    old, metric, expected_change = tensors[1], metric.double(), torch.zeros_like(rest)
    touched = torch.zeros(len(old), dtype=torch.bool)
    for number in range(len(energies)):
        group, here = first + number, slice(number * d, (number + 1) * d)
        for book in range(len(codebooks) if group < critical else 1):
            virtual = group if book == 0 else all_groups + (book - 1) * critical + group
            touched[virtual] = True
            codewords = codebooks[book].double()
            before, after = codewords[old[virtual]], codewords[codes[virtual]]
            scores = (rest[:, here] + before @ metric[here, here]) @ codewords.T + energies[number, book]
            chosen = scores.gather(1, codes[virtual][:, None])[:, 0]
            assert (chosen >= scores.amax(1) - 1e-4 * scores.abs().amax(1)).all(), "there was a better code"
            rest = rest - (after - before) @ metric[here]
            expected_change[:, here] += after - before
    assert torch.equal(codes[~touched], old[~touched]), "codes of other groups were changed"
    assert torch.allclose(change.double(), expected_change, atol=1e-5)
    return codes


@pytest.mark.parametrize("d", [4, 8, 16])
def test_each_code_is_the_best_after_those_before_it(any_way, d):
    check_search(*make_search(d=d))


def test_any_shape(way):
    @given(st.randoms(use_true_random=False))
    def check(random):
        groups, all_groups = random.randint(1, 9), random.randint(9, 20)
        check_search(
            *make_search(
                rows=random.randint(1, 70),
                groups=groups,
                first=random.randint(0, all_groups - groups),
                all_groups=all_groups,
                critical=random.randint(0, all_groups),
                extended=random.randint(0, 3),
                size=random.randint(1, 300),
                d=random.choice([4, 8, 16]),
            )
        )

    check()


def test_ways_agree(choose_cpu, monkeypatch):
    """Scores that fp32 has exactly: the same codes, and the first of equals, on every way."""
    tensors, numbers = make_search(rows=90, size=256)
    exact = [tensor if tensor.dtype == torch.int64 else (tensor * 4).round() / 4 for tensor in tensors]
    expected, ran = None, []
    for way in reversed(CHOICES):
        try:
            choose_cpu(way)
        except pytest.skip.Exception:
            continue
        codes = check_search(exact, numbers)
        expected = codes if expected is None else expected
        assert torch.equal(codes, expected), way
        ran.append(way)
    assert "torch" in ran
    choose_kernel(choose_cpu, monkeypatch)
    assert torch.equal(check_search(exact, numbers), expected)


def test_a_codebook_larger_than_a_tile(choose_cpu, monkeypatch):
    choose_kernel(choose_cpu, monkeypatch)
    check_search(*make_search(rows=5, groups=2, size=300))


def test_the_kernel_is_asked_for(monkeypatch):
    for value, chosen in ((None, False), ("0", False), ("1", True)):
        monkeypatch.delenv("CRVQ_GPU_SEARCH", raising=False) if value is None else monkeypatch.setenv(
            "CRVQ_GPU_SEARCH", value
        )
        assert code_search.by_kernel(torch.device("cuda")) == chosen
        assert not code_search.by_kernel(torch.device("cpu"))


def test_no_thread_changes_a_code(way):
    tensors, numbers = make_search(rows=203, size=256)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4, 5):
            torch.set_num_threads(threads)
            results.append(check_search(tensors, numbers))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(codes, results[0]) for codes in results)


def test_a_row_has_its_codes_whatever_is_beside_it(choose_cpu):
    """Compiled: several processes that share the rows out get the bits of one."""
    choose_cpu("scalar")
    cpu.library().level = cpu.library().supported[-1]
    (wanted, codes, *others), numbers = make_search(rows=23, size=64)
    whole = check_search((wanted, codes, *others), numbers)
    for start, end in ((0, 1), (1, 9), (9, 23)):
        part = check_search((wanted[start:end], codes[:, start:end].contiguous(), *others), numbers)
        assert torch.equal(part, whole[:, start:end])


@pytest.mark.parametrize("d", [2, 4, 8, 16])
@pytest.mark.parametrize("size", [1, 5, 256, 4096])
def test_nearest_codes(way, d, size):
    wanted, codebook, energies = torch.randn(13, 7, d), torch.randn(size, d), -torch.rand(7, size)
    codes = code_search.nearest_codes(wanted, codebook, energies)
    scores = torch.einsum("ngd,cd->ngc", wanted.double(), codebook.double()) + energies.double()
    chosen = scores.gather(2, codes[..., None])[..., 0]
    assert codes.dtype == torch.int64 and codes.is_contiguous()
    assert (chosen >= scores.amax(2) - 1e-5).all()


def test_the_first_of_equals(way):
    codebook = torch.randn(3, 8)[torch.randint(3, (50,))]
    codes = code_search.nearest_codes(torch.randn(9, 4, 8), codebook, -codebook.square().sum(1).expand(4, -1))
    assert ((codebook[codes][:, :, None] == codebook).all(3).float().argmax(2) == codes).all()


def test_what_is_not_finite_gives_a_code_all_the_same(way):
    wanted = torch.randn(6, 3, 8)
    wanted[1], wanted[2, 0, 0], wanted[3] = float("nan"), float("inf"), -float("inf")
    codes = code_search.nearest_codes(wanted, torch.randn(20, 8), torch.zeros(3, 20))
    assert ((codes >= 0) & (codes < 20)).all()


def test_the_pytorch_code_does_not_depend_on_its_parts(choose_cpu, monkeypatch):
    choose_cpu("torch")
    case = torch.randn(5, 7, 8), torch.randn(16, 8), -torch.rand(7, 16)
    whole = code_search.nearest_codes(*case)
    for limit in (1, 2 * 5 * 16, 3 * 5 * 16 + 1):
        monkeypatch.setitem(code_search._MAX_SCORES, "cpu", limit)
        assert torch.equal(code_search.nearest_codes(*case), whole)


def damage(tensors, numbers, name):
    wanted, codes, codebooks, energies, metric = tensors
    first, all_groups, critical = numbers
    match name:
        case "a code past the codebook":
            codes[2, 3] = codebooks.shape[1]
        case "a negative code":
            codes[2, 0] = -1
        case "codes int32":
            codes = codes.int()
        case "codes transposed":
            codes = codes.T.contiguous().T
        case "float64":
            wanted = wanted.double()
        case "wanted not contiguous":
            wanted = wanted.T.contiguous().T
        case "too few energies":
            energies = energies[:, :, 1:]
        case "a metric of another size":
            metric = metric[1:, 1:]
        case "groups past the last":
            first = all_groups - len(energies) + 1
        case "more critical groups than groups":
            critical = all_groups + 1
        case "a negative group":
            first = -1
    return (wanted, codes, codebooks, energies, metric), (first, all_groups, critical)


@pytest.mark.parametrize(
    "name",
    [
        "a code past the codebook",
        "a negative code",
        "codes int32",
        "codes transposed",
        "float64",
        "wanted not contiguous",
        "too few energies",
        "a metric of another size",
        "groups past the last",
        "more critical groups than groups",
        "a negative group",
    ],
)
def test_c_reads_nothing_that_is_not_there(choose_cpu, name):
    choose_cpu("scalar")
    tensors, numbers = damage(*make_search(), name)
    with pytest.raises(ValueError, match="the compiled kernel takes|codes must be|are not part of"):
        code_search.choose_codes_(*tensors, *numbers)


def test_reads_only_what_is_given(any_way, guarded):
    tensors, numbers = make_search()
    codes = check_search(tensors, numbers)
    wanted, own, *others = map(guarded, tensors)
    code_search.choose_codes_(wanted, own, *others, *numbers)
    assert torch.equal(own, codes)
