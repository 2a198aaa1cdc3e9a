"""Attention of small products against PyTorch's, and everything that it must leave to PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from crvq_hf import blocks
from crvq_hf.blocks import FastAttention


def attend(query, key, value, fast: bool, **fields):
    """Returns output and gradients under bfloat16 autocast."""
    heads = query.shape[1] // key.shape[1]
    if not fast:
        key, value = (t.repeat_interleave(heads, 1) for t in (key, value))
    with torch.autocast("cpu", torch.bfloat16):
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=fast, **fields)
    return output


@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 300])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_fast_attention_is_attention(length, heads, key_heads, scale):
    shapes = (2, heads, length, 16), (2, key_heads, length, 16), (2, key_heads, length, 16)
    inputs = [torch.randn(*shape).requires_grad_(True) for shape in shapes]
    upstream = torch.randn(2, heads, length, 16)
    results = []
    for fast in (True, False):
        if fast:
            with FastAttention():
                output = attend(*inputs, fast, scale=scale)
        else:
            output = attend(*inputs, fast, scale=scale)
        assert output.dtype == torch.bfloat16 and output.shape == (2, heads, length, 16)
        results.append([output.detach(), *torch.autograd.grad((output.float() * upstream).sum(), inputs)])
    for found, wanted in zip(*results, strict=True):
        assert found.dtype == wanted.dtype
        assert (found - wanted).float().norm() <= 2e-2 * wanted.float().norm() + 1e-3 * length**0.5


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_mask": torch.ones(8, 8, dtype=torch.bool)},
        {"is_causal": False},
        {"value": torch.randn(1, 2, 8, 4)},
        {"key": torch.randn(1, 2, 9, 16), "value": torch.randn(1, 2, 9, 16)},
        {"autocast": False},
    ],
    ids=["mask", "not causal", "other value size", "other length", "fp32"],
)
def test_everything_else_is_left_to_pytorch(changes, monkeypatch):
    arguments = {name: torch.randn(1, 2, 8, 16) for name in ("query", "key", "value")} | {"is_causal": True} | changes
    if "attn_mask" in changes:
        arguments["is_causal"] = False
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=arguments.pop("autocast", True))
    monkeypatch.setattr(blocks._CausalAttention, "apply", None)
    with autocast:
        wanted = F.scaled_dot_product_attention(**arguments)
    with autocast, FastAttention():
        assert torch.equal(F.scaled_dot_product_attention(**arguments), wanted)


def test_it_ends_with_its_context(monkeypatch):
    with FastAttention():
        pass
    monkeypatch.setattr(blocks._CausalAttention, "apply", None)
    attend(*torch.randn(3, 1, 2, 8, 16), fast=False)
