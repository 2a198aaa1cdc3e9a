"""Channels of many tokens in channel order."""

import pytest
import torch

pytest.importorskip("triton")
from crvq_kernels.gpu import reorder as module
from crvq_kernels.gpu.reorder import reorder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("in_features", "order_dtype"), [(8, torch.uint8), (72, torch.int16), (1000, torch.int32)])
def test_channels_are_in_order(in_features, order_dtype, dtype, poisoned_empty):
    x = torch.randn(3, in_features).to(DEVICE, dtype)
    order = torch.randperm(in_features).to(DEVICE, order_dtype)
    assert torch.equal(reorder(x, order), x.index_select(1, order.int()))


def test_views_are_read_as_they_look():
    x = torch.randn(64, 5, device=DEVICE).T
    order = torch.randperm(64, device=DEVICE)
    assert torch.equal(reorder(x, order), x[:, order])


def test_what_shared_memory_cannot_hold_is_left_to_pytorch(monkeypatch):
    x, order = torch.randn(2, 40000, device=DEVICE).half(), torch.randperm(40000, device=DEVICE)
    monkeypatch.setattr(module, "reorder_kernel", None)
    assert torch.equal(reorder(x, order), x[:, order])
