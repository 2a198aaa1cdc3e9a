"""Fixtures of the kernel tests: random layers, an error measure, and poisoned allocations in every test."""

from dataclasses import dataclass

import pytest
import torch
from crvq_kernels import cpu, num_virtual_groups, pack_codes, tile_codes
from torch import Tensor


@dataclass
class Layer:
    """A random CRVQ layer; `tensors` are the leading arguments of `dequantize`, `constants` the trailing ones."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    constants: tuple[int, int]
    codes: Tensor
    bias: Tensor

    def linear_args(self, bias: bool) -> tuple:
        return (*self.tensors, self.bias if bias else None, *self.constants)

    @property
    def tiles(self) -> Tensor:
        return tile_codes(self.tensors[0], self.constants[0], self.codes.shape[1])


@pytest.fixture
def make_layer():
    def make(
        out_features: int = 100,
        in_features: int = 72,
        in_group_size: int = 8,
        nbits: int = 8,
        num_extended: int = 3,
        num_critical_groups: int = 2,
        codebook_size: int | None = None,
        dtype: torch.dtype = torch.float16,
    ) -> Layer:
        codebook_size = codebook_size or 2**nbits
        num_codebooks = 1 + num_extended
        num_critical_groups = num_critical_groups if num_extended else 0
        num_codes = num_virtual_groups(in_features, in_group_size, num_codebooks, num_critical_groups)
        floating = torch.float16 if dtype == torch.int8 else dtype
        codes = torch.randint(0, codebook_size, (out_features, num_codes))
        order_dtype = torch.uint8 if in_features <= 256 else torch.int16
        tensors = (
            pack_codes(codes, nbits),
            torch.randn(num_codebooks, codebook_size, in_group_size).mul(32 if dtype == torch.int8 else 1).to(dtype),
            torch.randn(out_features).to(floating),
            torch.randperm(in_features).to(order_dtype),
        )
        return Layer(tensors, (nbits, num_critical_groups), codes, torch.randn(out_features))

    return make


@pytest.fixture
def relative_error():
    """Root mean square of the error over the root mean square of the expected values; NaN where anything is NaN."""

    def measure(actual: Tensor, expected: Tensor) -> float:
        assert actual.shape == expected.shape
        actual, expected = actual.double(), expected.double()
        return ((actual - expected).norm() / expected.norm()).item()

    return measure


@pytest.fixture(scope="session")
def tolerance():
    """Largest accepted relative error by dtype of the result. The interpreter truncates when it stores bf16."""
    return {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 6e-3}


@pytest.fixture
def choose_cpu(monkeypatch):
    """Forces a way to run on the CPU for the rest of a test, as CRVQ_CPU does; skips what is not there."""

    def choose(name: str) -> None:
        monkeypatch.setenv("CRVQ_CPU", name)
        cpu.library.cache_clear()
        try:
            cpu.library()
        except ValueError as error:
            pytest.skip(str(error))

    yield choose
    cpu.library.cache_clear()


@pytest.fixture(autouse=True)
def _poison(poisoned_empty):
    pass


GUARD = 64


@pytest.fixture
def guarded():
    """Copies a tensor to between elements that show where they are read: NaN, or the largest integer."""

    def copy(tensor: Tensor) -> Tensor:
        poison = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
        buffer = torch.full((tensor.numel() + 2 * GUARD,), poison, dtype=tensor.dtype, device=tensor.device)
        return buffer[GUARD:-GUARD].view(tensor.shape).copy_(tensor)

    return copy


@pytest.fixture
def guarded_empty(monkeypatch):
    """Surrounds what `torch.empty` returns with elements that must not change until the end of the test."""
    allocate, buffers = torch.empty, []

    def allocate_guarded(*size, **kwargs):
        shape = torch.Size(size[0] if isinstance(size[0], tuple | list | torch.Size) else size)
        buffer = allocate(shape.numel() + 2 * GUARD, **kwargs)
        buffers.append((buffer, buffer.clone()))
        return buffer[GUARD:-GUARD].view(shape)

    monkeypatch.setattr(torch, "empty", allocate_guarded)
    yield
    assert buffers
    for buffer, before in buffers:
        for end in (slice(GUARD), slice(-GUARD, None)):
            assert torch.equal(buffer[end].view(torch.uint8), before[end].view(torch.uint8)), "written out of bounds"
