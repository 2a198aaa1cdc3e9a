"""Shared test setup: Triton interpreter without a GPU, seeds, hypothesis profile, poisoned allocations."""

import os

import pytest
import torch
import torch.utils._device

if not torch.cuda.is_available():
    # Must be set before anything imports Triton: a kernel is bound to the interpreter when it is decorated.
    os.environ["TRITON_INTERPRET"] = "1"

from hypothesis import settings  # noqa: E402

settings.register_profile("crvq", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("crvq")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Fills what `torch.empty` and `Tensor.new_empty` return with NaN (integers: the largest value).

    An element that is never written then shows up.
    """
    # What `torch.device` as a context acts on is looked up once per process; it must find the functions themselves.
    torch.utils._device._device_constructors()

    def poison(allocate):
        def allocate_poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max)

        return allocate_poisoned

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
