import pytest
import torch
from crvq_kernels import channel_index, codebook_ids, num_virtual_groups, pack_codes, packed_width, unpack_codes
from crvq_kernels.packing import code_span
from hypothesis import given
from hypothesis import strategies as st


@st.composite
def codes_and_nbits(draw):
    nbits = draw(st.integers(4, 12))
    num_rows, num_codes = draw(st.integers(0, 4)), draw(st.integers(0, 40))
    row = st.lists(st.integers(0, 2**nbits - 1), min_size=num_codes, max_size=num_codes)
    rows = draw(st.lists(row, min_size=num_rows, max_size=num_rows))
    dtype = draw(st.sampled_from([torch.int16, torch.int32, torch.int64] + [torch.uint8] * (nbits <= 8)))
    return torch.tensor(rows, dtype=dtype).reshape(num_rows, num_codes), nbits


@given(codes_and_nbits())
def test_packed_rows_are_little_endian_bit_streams(case):
    codes, nbits = case
    packed = pack_codes(codes, nbits)
    assert packed.dtype == torch.uint8 and packed.shape == (codes.shape[0], packed_width(codes.shape[1], nbits))
    for row, stream in zip(codes.tolist(), packed.tolist(), strict=True):
        assert int.from_bytes(bytes(stream), "little") == sum(code << (v * nbits) for v, code in enumerate(row))


@given(codes_and_nbits())
def test_unpack_inverts_pack(case):
    codes, nbits = case
    unpacked = unpack_codes(pack_codes(codes, nbits), nbits, codes.shape[1])
    assert unpacked.dtype == (torch.uint8 if nbits <= 8 else torch.int16)
    assert torch.equal(unpacked.long(), codes.long())


def test_eight_bit_codes_are_stored_as_they_are():
    codes = torch.randint(0, 256, (3, 7), dtype=torch.uint8)
    assert torch.equal(pack_codes(codes, 8), codes)


def test_packing_accepts_non_contiguous_codes():
    codes = torch.randint(0, 1024, (9, 5)).T
    assert torch.equal(unpack_codes(pack_codes(codes, 10), 10, 9).long(), codes)


@pytest.mark.parametrize("nbits", range(4, 13))
def test_code_span_is_the_most_bytes_a_code_touches(nbits):
    spans = [((v + 1) * nbits - 1) // 8 - v * nbits // 8 + 1 for v in range(8)]
    assert code_span(nbits) == max(spans)


@pytest.mark.parametrize("value", [-1, 1024])
def test_pack_refuses_codes_out_of_range(value):
    with pytest.raises(ValueError, match=r"\[0, 1024\)"):
        pack_codes(torch.tensor([[0, value]]), 10)


@pytest.mark.parametrize("codes", [torch.zeros(2, 2), torch.zeros(3, dtype=torch.int64), torch.zeros(1, 1).bool()])
def test_pack_refuses_what_is_not_a_matrix_of_integers(codes):
    with pytest.raises(ValueError, match="2-D integer tensor"):
        pack_codes(codes, 8)


@pytest.mark.parametrize("nbits", [3, 13])
def test_nbits_out_of_range_is_refused(nbits):
    with pytest.raises(ValueError, match="between 4 and 12"):
        packed_width(5, nbits)


def test_unpack_names_the_expected_shape():
    with pytest.raises(ValueError, match=r"shape \[rows, 5\], got torch.uint8 and \[2, 6\]"):
        unpack_codes(torch.zeros(2, 6, dtype=torch.uint8), 10, 4)


@st.composite
def group_shapes(draw):
    in_group_size, num_groups = draw(st.sampled_from([4, 8, 16])), draw(st.integers(1, 6))
    return in_group_size, num_groups, draw(st.integers(1, 8)), draw(st.integers(0, num_groups))


@given(group_shapes(), st.integers(0, 2**31))
def test_virtual_groups_follow_their_definition(shape, seed):
    in_group_size, num_groups, num_codebooks, num_critical = shape
    in_features = num_groups * in_group_size
    order = torch.randperm(in_features, generator=torch.Generator().manual_seed(seed))
    expected_index, expected_ids = order.tolist(), [0] * num_groups
    for codebook in range(1, num_codebooks):
        for group in range(num_critical):
            expected_ids.append(codebook)
            expected_index += order[group * in_group_size : (group + 1) * in_group_size].tolist()

    ids = codebook_ids(num_groups, num_codebooks, num_critical)
    index = channel_index(order.to(torch.uint8), in_group_size, num_codebooks, num_critical)
    assert ids.dtype == index.dtype == torch.int64
    assert ids.tolist() == expected_ids and index.tolist() == expected_index
    assert num_virtual_groups(in_features, in_group_size, num_codebooks, num_critical) == len(expected_ids)
