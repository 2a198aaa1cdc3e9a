"""`QuantizedWeight`: its checks, its bytes, its dequantization."""

import dataclasses

import pytest
import torch
from crvq_kernels import dequantize_ref, pack_codes, unpack_codes

from crvq_hf.quantized_weight import (
    TENSOR_NAMES,
    LayerShape,
    QuantizedWeight,
    decode_codebooks,
    encode_codebooks,
    normalised,
    num_critical_groups,
    order_dtype,
)


@pytest.mark.parametrize(
    ("in_features", "dtype"),
    [(256, torch.uint8), (257, torch.int16), (32768, torch.int16), (32769, torch.int32)],
)
def test_order_dtype_is_the_smallest_that_fits(in_features, dtype):
    assert order_dtype(in_features) == dtype
    assert torch.iinfo(dtype).max >= in_features - 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((4096, 8, 0.02, 3), 10),
        ((64, 8, 0.02, 3), 1),
        ((64, 8, 0.0, 3), 0),
        ((64, 8, 0.5, 0), 0),
        ((64, 8, 0.5, 1), 4),
    ],
)
def test_num_critical_groups(arguments, expected):
    assert num_critical_groups(*arguments) == expected


@pytest.mark.parametrize("nbits", [4, 8, 11])
@pytest.mark.parametrize("codebook_bits", [8, 16])
def test_shape_and_bytes(make_weight, nbits, codebook_bits):
    weight = make_weight(64, 48, nbits_per_codebook=nbits, critical_ratio=0.25, codebook_bits=codebook_bits)
    weight.check()
    # 8 base groups, 3 extended codebooks for 2 critical groups
    assert (weight.out_features, weight.in_features, weight.in_group_size) == (48, 64, 8)
    assert (weight.num_codebooks, weight.num_groups, weight.num_virtual_groups) == (4, 8, 14)
    codebook_size = min(2**nbits, 48 * 8)
    by_hand = 48 * -(-14 * nbits // 8) + 4 * codebook_size * codebook_bits + 48 * 2 + 64
    assert weight.nbytes == weight.shape.nbytes == by_hand
    assert weight.bits_per_weight == weight.shape.bits_per_weight == by_hand * 8 / (48 * 64)


def test_tensors_round_trip(make_weight):
    weight = make_weight(32, 16)
    assert tuple(weight.tensors()) == TENSOR_NAMES
    again = QuantizedWeight.from_tensors(weight.tensors() | {"bias": torch.ones(1)}, 8, weight.num_critical_groups)
    assert all(a is b for a, b in zip(again.tensors().values(), weight.tensors().values(), strict=True))
    with pytest.raises(ValueError, match=r"\['weight_scale'\] are missing"):
        QuantizedWeight.from_tensors({k: v for k, v in weight.tensors().items() if k != "weight_scale"}, 8, 1)


def test_dequantize_is_the_reference(make_weight):
    weight = make_weight(64, 24, nbits_per_codebook=5, critical_ratio=0.25)
    expected = dequantize_ref(*weight.operands(), 5, 2, torch.float32)
    torch.testing.assert_close(weight.dequantize(torch.float32), expected)
    assert weight.dequantize(torch.bfloat16).dtype == torch.bfloat16


def damaged(weight: QuantizedWeight, **changes) -> QuantizedWeight:
    """Returns a copy of `weight` with fields replaced by what the functions in `changes` make of their clones."""
    return dataclasses.replace(
        weight, **{name: f(getattr(weight, name).clone() if name != "nbits" else 0) for name, f in changes.items()}
    )


def fill(index, value):
    def change(tensor):
        tensor.view(-1)[index] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": lambda t: t[:, :-1]}, r"layer\.weight must be torch.uint8 of shape \[16, 7\], found .*\[16, 6\]"),
        ({"codes": lambda t: t[:-1]}, r"layer\.weight must be .*\[16, 7\], found .*\[15, 7\]"),
        ({"codes": lambda t: t.char()}, r"layer\.weight must be torch.uint8 .* found torch.int8"),
        ({"codes": lambda t: t[0]}, r"layer\.weight must be a non-empty tensor of 2 dimensions"),
        ({"codebooks": lambda t: t.float()}, r"layer\.weight_codebooks must be torch.float16 .* found torch.float32"),
        ({"codebooks": lambda t: t.flatten(1)}, r"layer\.weight_codebooks must be a non-empty tensor of 3 dimensions"),
        ({"codebooks": lambda t: t[:, :0]}, r"layer\.weight_codebooks must be a non-empty"),
        ({"codebooks": lambda t: t[:3]}, r"layer\.weight must be .*\[16, 6\]"),
        ({"codebooks": lambda t: t.repeat(1, 5, 1)}, r"320 entries per codebook, but codes of 8 bits reach only 256"),
        ({"codebooks": lambda t: torch.cat([t, t], 2)[..., :12]}, r"32 channels .* cannot be cut into groups of 12"),
        ({"scales": lambda t: t.bfloat16()}, r"layer\.weight_scale must be torch.float16"),
        ({"scales": lambda t: t[:, None]}, r"layer\.weight_scale must be a non-empty tensor of 1 dimensions"),
        ({"channel_order": lambda t: t.long()}, r"layer\.weight_order must be torch.uint8"),
        ({"codebooks": fill(3, float("nan"))}, r"layer\.weight_codebooks holds NaN or infinite"),
        ({"scales": fill(3, float("-inf"))}, r"layer\.weight_scale holds NaN or infinite"),
        ({"channel_order": fill(3, 32)}, r"layer\.weight_order must hold every channel 0\.\.31 exactly once"),
        ({"channel_order": fill(slice(None), 1)}, r"layer\.weight_order must hold every channel"),
        ({"codes": fill(3, 64)}, r"layer\.weight holds code 64, but its codebooks have only 64 entries"),
    ],
)
def test_check_refuses(make_weight, changes, message):
    weight = make_weight(32, 16, codebook_bits=16)  # 4 + 3 groups, codebooks of 64 entries
    weight.check("layer")
    with pytest.raises(ValueError, match=message):
        damaged(weight, **changes).check("layer")


def test_int8_codebooks():
    codebooks = torch.randn(3, 64, 8) * torch.tensor([30.0, 3.0, 0.3])[:, None, None]
    stored, size = normalised(codebooks, 8)
    assert stored.dtype == torch.int8 and int(stored.int().abs().max()) == 127
    assert torch.equal(encode_codebooks(decode_codebooks(stored)), stored)
    step = codebooks.abs().max() / 127
    assert (decode_codebooks(stored).float() * size - codebooks).abs().max() <= 0.5001 * step
    every = torch.arange(-128, 128, dtype=torch.int8)
    assert torch.equal(encode_codebooks(decode_codebooks(every)), every)
    assert torch.equal(normalised(torch.zeros(1, 2, 4), 8)[0], torch.zeros(1, 2, 4, dtype=torch.int8))


@pytest.mark.parametrize("count", [-1, 5])
def test_check_refuses_critical_groups(make_weight, count):
    weight = dataclasses.replace(make_weight(32, 16), num_critical_groups=count)
    with pytest.raises(ValueError, match=f"num_critical_groups must be between 0 and 4, found {count}"):
        weight.check()


def test_check_of_packed_codes_sees_every_code(make_weight):
    weight = make_weight(32, 16, nbits_per_codebook=11)  # 64 entries, codes of 11 bits
    codes = unpack_codes(weight.codes, 11, weight.num_virtual_groups)
    codes[15, -1] = 64
    with pytest.raises(ValueError, match="holds code 64"):
        dataclasses.replace(weight, codes=pack_codes(codes, 11)).check()


def test_full_codebooks_need_no_check_of_codes():
    shape = LayerShape(64, 64, 8, 8, 1, 256, 0, 16)
    weight = QuantizedWeight(
        torch.full((64, 8), 255, dtype=torch.uint8), torch.ones(1, 256, 8).half(), torch.ones(64).half(),
        torch.arange(64, dtype=torch.uint8), 8, 0,
    )  # fmt: skip
    weight.check()
    assert weight.shape == shape
