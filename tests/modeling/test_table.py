"""What is stored of an embedding in fewer than 8 bits: exact bytes, rows, and what cannot be."""

from dataclasses import replace

import pytest
import torch

from crvq_hf.config import EMBEDDING_BITS
from crvq_hf.modeling.table import Table, TableShape, stored_bytes
from crvq_hf.pipeline.table_fit import fit_table

CODED = [bits for bits in EMBEDDING_BITS if bits < 8]


@pytest.mark.parametrize("bits", CODED)
@pytest.mark.parametrize(("rows", "channels"), [(49152, 576), (128256, 4096), (32000, 2048), (262144, 640)])
def test_the_bits_are_spent_and_never_exceeded(rows, channels, bits):
    shape = TableShape(rows, channels, bits)
    assert 0.995 * bits < 8 * stored_bytes(rows, channels, bits) / (rows * channels) <= bits
    assert 1 < shape.num_frequent <= rows


@pytest.mark.parametrize("bits", CODED)
@pytest.mark.parametrize(("rows", "channels"), [(1, 4), (7, 4), (30, 8), (300, 32), (700, 64)])
def test_tensors_are_those_that_the_shape_says(rows, channels, bits):
    shape = TableShape(rows, channels, bits)
    weight = torch.randn(rows, channels)
    table, error = fit_table(weight, torch.eye(channels), torch.arange(3), shape, torch.Generator().manual_seed(0))
    tensors = table.tensors()
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == shape.tensors()
    assert sum(tensor.nbytes for tensor in tensors.values()) == stored_bytes(rows, channels, bits)
    table.check("table")
    dense = Table.from_tensors(tensors).dequantize(torch.float32)
    assert float((dense - weight).square().sum() / weight.square().sum()) == pytest.approx(error, abs=1e-4)
    tokens = torch.randint(rows, (2, 5))
    assert torch.equal(table.lookup(tokens, torch.float32), dense[tokens])
    assert table.lookup(tokens[:0], torch.bfloat16).shape == (0, 5, channels)


def test_bytes_of_int8_rows():
    assert stored_bytes(10, 6, 8) == 10 * 6 + 10 * 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {"rows": t.rows.flip(0)}, "weight_frequent_rows must hold rising"),
        (lambda t: {"rows": t.rows + 1000}, "weight_frequent_rows must hold rising"),
        (lambda t: {"rows": t.rows - 1000}, "weight_frequent_rows must hold rising"),
        (lambda t: {"factor": t.factor * torch.inf}, "weight_row_factor holds NaN"),
        (lambda t: {"basis": t.basis * torch.nan}, "weight_row_basis holds NaN"),
        (lambda t: {"every": replace(t.every, scales=t.every.scales * torch.inf)}, "weight_scale holds NaN"),
        (lambda t: {"frequent": replace(t.frequent, channel_order=t.frequent.channel_order * 0)}, "exactly once"),
    ],
)
def test_what_cannot_be_is_named(change, words):
    shape, weight = TableShape(1000, 128, 3), torch.randn(1000, 128)
    table, _ = fit_table(weight, torch.eye(128), torch.arange(3), shape, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=words):
        replace(table, **change(table)).check("lm_head")
