"""Triton kernel for the search for codes: all groups of a block of columns in one launch, a few rows a program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tuning import SEARCH_BLOCKS


@triton.jit(do_not_specialize=["first_group", "all_groups", "critical"])
def search_kernel(
    wanted_ptr,
    codes_ptr,
    books_ptr,
    energies_ptr,
    metric_ptr,
    change_ptr,
    N,
    first_group,
    all_groups,
    critical,
    C,
    B,
    D: tl.constexpr,
    BOOKS: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BB: tl.constexpr,
    BD: tl.constexpr,
):
    """Chooses the codes of `B / D` groups one after the other, for BN rows: they depend on no others.

    What the tensors hold is said at `choose_codes_`. Tiles are as wide as products must be: BB is at least B, BD at
    least D. What a row still wants is handed from thread to thread through memory; it stays in the cache.
    """
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    codeword, column, channel = tl.arange(0, BC), tl.arange(0, BB), tl.arange(0, BD)
    is_row, is_channel = (row < N)[:, None], channel < D
    wanted = wanted_ptr + row.to(tl.int64)[:, None] * B
    for here in range(0, B, D):
        group = first_group + here // D
        books = 1
        if group < critical:
            books = BOOKS
        total = tl.zeros((BN, BD), dtype=tl.float32)
        part = metric_ptr + (here + channel)[:, None] * B  # of the metric, the rows of this group
        own = tl.load(part + here + channel[None, :], mask=is_channel[:, None] & is_channel[None, :], other=0.0)
        others = tl.load(part + column[None, :], mask=is_channel[:, None] & (column < B)[None, :], other=0.0)
        for book in range(0, books):
            virtual = group
            if book > 0:
                virtual = all_groups + (book - 1) * critical + group
            place = codes_ptr + virtual.to(tl.int64) * N + row
            words = books_ptr + book * C * D + channel[None, :]
            old_code = tl.load(place, mask=row < N, other=0).to(tl.int32)
            old = tl.load(words + old_code[:, None] * D, mask=is_channel[None, :], other=0.0)
            value = tl.load(wanted + here + channel[None, :], mask=is_row & is_channel[None, :], other=0.0)
            value = tl.dot(old, own, value, input_precision="ieee")  # if the old codeword were taken away
            best = tl.full((BN,), float("-inf"), dtype=tl.float32)
            code = tl.zeros((BN,), dtype=tl.int32)
            for start in range(0, C, BC):
                some = start + codeword < C
                energies = energies_ptr + (here // D * BOOKS + book) * C + start + codeword
                energy = tl.load(energies, mask=some, other=float("-inf"))
                entries = words + (start + codeword)[:, None] * D
                entries = tl.load(entries, mask=some[:, None] & is_channel[None, :], other=0.0)
                scores = tl.dot(value, tl.trans(entries), input_precision="ieee") + energy[None, :]
                largest, index = tl.max(scores, axis=1, return_indices=True, return_indices_tie_break_left=True)
                better = largest > best  # of equals the first; never what is not a number
                best = tl.where(better, largest, best)
                code = tl.where(better, start + index, code)
            step = tl.load(words + code[:, None] * D, mask=is_channel[None, :], other=0.0) - old
            total += step
            later = is_row & (column >= here)[None, :] & (column < B)[None, :]
            rest = tl.load(wanted + column[None, :], mask=later, other=0.0)
            rest -= tl.dot(step, others, input_precision="ieee")
            tl.store(place, code.to(tl.int64), mask=row < N)
            tl.debug_barrier()  # all have read what is written now
            tl.store(wanted + column[None, :], rest, mask=later)
            tl.debug_barrier()  # and all are to read it
        change = change_ptr + row.to(tl.int64)[:, None] * B + here + channel[None, :]
        tl.store(change, total, mask=is_row & is_channel[None, :])


def choose_codes_(
    wanted: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    energies: Tensor,
    metric: Tensor,
    first_group: int,
    num_groups: int,
    num_critical_groups: int,
) -> Tensor:
    """Does what `crvq_kernels.code_search.choose_codes_` says, in one launch."""
    num_codebooks, size, d = codebooks.shape
    num_rows, columns = wanted.shape
    change = torch.empty_like(wanted)
    blocks = SEARCH_BLOCKS
    search_kernel[(triton.cdiv(num_rows, blocks.rows),)](
        wanted,
        codes,
        codebooks.contiguous(),
        energies.contiguous(),
        metric.contiguous(),
        change,
        num_rows,
        first_group,
        num_groups,
        num_critical_groups,
        size,
        columns,
        D=d,
        BOOKS=num_codebooks,
        BN=blocks.rows,
        BC=min(blocks.codewords, max(16, triton.next_power_of_2(size))),
        BB=max(16, triton.next_power_of_2(columns)),
        BD=max(8, d),
        num_warps=blocks.num_warps,
        num_stages=1,
    )
    return change
