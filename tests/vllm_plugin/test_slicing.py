"""The parts of a weight that processes have: together they compute what the whole does."""

import crvq_kernels
import pytest
import torch

from crvq_hf.vllm.slicing import channels_of_groups, share_of_groups, share_of_rows, take_groups, take_rows


def multiply(x, weight):
    return crvq_kernels.linear(x, *weight.operands(), None, weight.nbits, weight.num_critical_groups)


@pytest.mark.parametrize(
    ("size", "fields"),
    [
        (2, {}),
        (4, {"nbits_per_codebook": 10}),
        (3, {"nbits_per_codebook": 5, "in_group_size": 4}),
        (2, {"critical_ratio": 0.0}),
        (4, {"critical_ratio": 0.03}),
        (2, {"critical_ratio": 1.0, "codebook_bits": 16}),
    ],
    ids=["2", "4, 10 bits", "3, uneven", "none critical", "one critical in all", "all critical"],
)
def test_parts_of_a_block_add_up_to_it(make_weight, size, fields):
    gate, up, down = (make_weight(*shape, **fields) for shape in ((64, 176), (64, 176), (176, 48)))
    x = torch.randn(5, 64)
    whole = multiply(torch.nn.functional.silu(multiply(x, gate)) * multiply(x, up), down)
    total, channels_seen = 0, []
    for rank in range(size):
        groups = share_of_groups(down.num_groups, rank, size)
        channels = channels_of_groups(down.channel_order, down.in_group_size, groups)
        own_gate, own_up, own_down = take_rows(gate, channels), take_rows(up, channels), take_groups(down, groups)
        for weight in (own_gate, own_up, own_down):
            weight.check()
        hidden = torch.nn.functional.silu(multiply(x, own_gate)) * multiply(x, own_up)
        total = total + multiply(hidden, own_down)
        channels_seen += channels.tolist()
    assert sorted(channels_seen) == list(range(176))
    assert torch.allclose(total, whole, atol=1e-4 * float(whole.abs().max()))


def test_critical_groups_are_shared_out(make_weight):
    down = make_weight(256, 64, critical_ratio=0.25)
    parts = [take_groups(down, share_of_groups(down.num_groups, rank, 4)) for rank in range(4)]
    assert [part.num_critical_groups for part in parts] == [2, 2, 2, 2]
    assert {part.codes.shape for part in parts} == {(64, (8 + 3 * 2))}


@pytest.mark.parametrize(("rows", "size"), [(10, 3), (8, 4), (5, 1), (2, 3)])
def test_shares_of_rows_are_all_of_them(rows, size):
    shares = [share_of_rows(rows, rank, size) for rank in range(size)]
    assert [row for share in shares for row in share] == list(range(rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
