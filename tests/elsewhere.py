"""A plugin for pytest (`-p elsewhere`): our code runs in other global states of PyTorch than the tests themselves.

CRVQ_DEFAULT_DTYPE names a default dtype: numbers that a file of tests draws or makes stay float32, everything else,
ours and PyTorch's own, allocates in that one. CRVQ_GRAD names what every test runs in, "no_grad" or "inference_mode".
"""

import functools
import os
import sys
from pathlib import Path

import pytest
import torch

TESTS = str(Path(__file__).parent)
FACTORIES = ("arange", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randn", "tensor", "zeros")


def _for_tests(factory):
    """Returns `factory` with float32 for a default where a file of the tests calls it."""

    @functools.wraps(factory)
    def wrapper(*args, **kwargs):
        if kwargs.get("dtype") is not None or not sys._getframe(1).f_code.co_filename.startswith(TESTS):
            return factory(*args, **kwargs)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            return factory(*args, **kwargs)
        finally:
            torch.set_default_dtype(before)

    return wrapper


def pytest_configure():
    if name := os.environ.get("CRVQ_DEFAULT_DTYPE"):
        torch.set_default_dtype(getattr(torch, name))
        for factory in FACTORIES:
            setattr(torch, factory, _for_tests(getattr(torch, factory)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    name = os.environ.get("CRVQ_GRAD")
    with getattr(torch, name)() if name else torch.enable_grad():
        return (yield)
