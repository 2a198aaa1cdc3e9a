"""`DenseWeight`: read as any weight, never written."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from crvq_hf.adapters.dense_weight import DenseWeight, WeightIsFrozen


@pytest.fixture
def base():
    return torch.randn(6, 4)


@pytest.fixture
def made():
    return []


@pytest.fixture
def weight(base, made):
    return DenseWeight(lambda: made.append(1) or base.clone(), torch.empty(6, 4, device="meta"), base.device)


def test_what_it_is_needs_no_numbers(weight, made):
    assert isinstance(weight, nn.Parameter) and not weight.requires_grad
    assert weight.shape == (6, 4) and weight.dtype == torch.float32 and weight.device == torch.device("cpu")
    assert weight.T.shape == (4, 6) and weight.data.float().detach()[1:, 0].stride() == (4,)
    assert "DenseWeight" in repr(weight) and not made


READERS = {
    "clone": torch.clone,
    "views": lambda w: w.data.T.reshape(-1)[3:] * 2,
    "split": lambda w: w.split(2)[1] + w.chunk(3)[0],
    "cast": lambda w: w.to(torch.float64),
    "linear": lambda w: F.linear(torch.ones(2, 4), w),
    "embedding": lambda w: F.embedding(torch.tensor([1, 5]), w),
    "svd": lambda w: torch.linalg.svd(w).S,
    "second": lambda w: torch.zeros(6, 4).add_(w),
    "numpy": lambda w: torch.from_numpy(w.numpy() * 2),
    "list": lambda w: torch.tensor(w.tolist()),
    "copy": copy.deepcopy,
    "not trained": lambda w: nn.Parameter(w.data, requires_grad=False) * 1,
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_reading_is_right(weight, base, read):
    found = read(weight)
    assert type(found) is torch.Tensor
    assert torch.equal(found, read(base))


WRITERS = {
    "in place": lambda w: w.add_(1),
    "data": lambda w: setattr(w, "data", torch.zeros(6, 4)),
    "in place, data": lambda w: w.data.mul_(2),
    "view": lambda w: w.T.zero_(),
    "item": lambda w: w.data.__setitem__((0, 0), 1.0),
    "split": lambda w: w.split(2)[1].fill_(3),
    "out": lambda w: torch.add(torch.ones(6, 4), 1, out=w),
    "list": lambda w: torch._foreach_add_([w], 1.0),
    "init": nn.init.zeros_,
    "trained": lambda w: w.requires_grad_(),
    "trained, attribute": lambda w: setattr(w, "requires_grad", True),
    "parameter": nn.Parameter,
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_writing_is_refused(weight, base, write):
    before = base.clone()
    with pytest.raises(WeightIsFrozen, match=r"can only be read.*model.dequantize\(\) first"):
        write(weight)
    assert torch.equal(base, before)


def test_gradients_pass_and_the_numbers_are_not_kept(weight, base, made):
    x = torch.randn(3, 4, requires_grad=True)
    y = F.linear(x, weight)
    assert len(made) == 1
    y.sum().backward()
    assert len(made) == 2
    torch.testing.assert_close(x.grad, base.sum(0).expand(3, 4))


@pytest.mark.parametrize("data", [False, True])
def test_data_of_another_is_no_wild_memory(weight, data):
    parameter = nn.Parameter(torch.zeros(6, 4))
    with pytest.raises(RuntimeError, match="incompatible tensor type"):
        parameter.data = weight.data if data else weight
    assert parameter.sum() == 0


def test_autocast(weight, base):
    x = torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = F.linear(x, weight), F.linear(x, base)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)
