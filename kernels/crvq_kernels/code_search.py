"""The search for codes: for each vector the codeword that serves it best, in the quadratic error of quantization.

The algorithm (`crvq_hf.algorithm`) says what a row wants and what codewords cost; here they are compared, which is
nearly all the work of quantizing: on a CPU by the compiled library where there is one, else in PyTorch. On a GPU,
CRVQ_GPU_SEARCH=1 in the environment takes a Triton kernel instead, which is right (tested in the interpreter) but
whose speed nobody has measured.
"""

import functools
import os

import torch
from torch import Tensor

from .cpu import code_search as compiled

# Scores of at most this many elements exist at a time: few enough for the cache of a CPU, plenty on a GPU.
_MAX_SCORES = {"cpu": 1 << 19}
_MAX_SCORES_ELSEWHERE = 1 << 26


def nearest_codes(wanted: Tensor, codebook: Tensor, energies: Tensor) -> Tensor:
    """Returns the codes `[N, G]`, int64, of codewords c with the largest `wanted . c + energy`, the first of equals.

    Args:
        wanted: `[N, G, d]`, fp32.
        codebook: `[C, d]`, fp32.
        energies: `[G, C]`, fp32.
    """
    n, num_groups, d = wanted.shape
    codes = torch.empty(num_groups, n, dtype=torch.int64, device=wanted.device)
    if compiled.can_search(wanted, d):
        flat = wanted.reshape(n, num_groups * d)
        compiled.choose_codes_(flat, codes, codebook[None], energies[:, None], None, 0, num_groups, 0)
        return codes.T.contiguous()
    factors = torch.cat([codebook.T.expand(num_groups, -1, -1), energies[:, None]], 1)  # [G, d + 1, C]
    wanted = torch.cat([wanted, wanted.new_ones(n, num_groups, 1)], 2).transpose(0, 1)
    limit = _MAX_SCORES.get(wanted.device.type, _MAX_SCORES_ELSEWHERE)
    step = max(1, limit // (n * len(codebook)))
    for start in range(0, num_groups, step):
        part = slice(start, min(start + step, num_groups))
        codes[part] = first_largest(wanted[part] @ factors[part])
    return codes.T.contiguous()


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
    """Changes the codes of some neighbouring groups to better ones, one after the other (Gauss-Seidel), for all rows.

    Group after group, and in a critical group codebook after codebook, the codeword c is chosen with the largest
    `(wanted + c_old H_gg) . c + energy`, the first of equals; then `wanted` of later groups loses `(c - c_old) H`.

    Args:
        wanted: `[N, B]`, fp32, contiguous, for B / d groups; what is left in it is of no further use.
        codes: `[V, N]`, int64, contiguous, of all groups; those of the B / d groups are changed.
        codebooks: `[1 + E, C, d]`, fp32.
        energies: `[B / d, 1 + E, C]`, fp32, minus half of `c H_gg c`.
        metric: `[B, B]`, fp32, symmetric, the part of H of these groups.
        first_group: number of the first of the groups.
        num_groups: G, base groups in all; `V = G + E * Gc`.
        num_critical_groups: Gc.

    Returns:
        `[N, B]`, fp32: what the unscaled weight has changed by.
    """
    num_codebooks, size, d = codebooks.shape
    if compiled.can_search(wanted, d):
        return compiled.choose_codes_(
            wanted, codes, codebooks, energies, metric, first_group, num_groups, num_critical_groups
        )
    if by_kernel(wanted.device):
        from .gpu.code_search import choose_codes_ as in_one_launch

        return in_one_launch(wanted, codes, codebooks, energies, metric, first_group, num_groups, num_critical_groups)
    change = torch.zeros_like(wanted)
    # A score is one product: what a row wants and a one, with a codeword and its energy.
    factors = torch.cat([codebooks.transpose(1, 2), energies[0, :, None]], 1)  # [1 + E, d + 1, C]
    vectors, scores = wanted.new_ones(len(wanted), d + 1), wanted.new_empty(len(wanted), size)
    for number, energy in enumerate(energies):
        group, here = first_group + number, slice(number * d, (number + 1) * d)
        for book in range(num_codebooks if group < num_critical_groups else 1):
            virtual = group if book == 0 else num_groups + (book - 1) * num_critical_groups + group
            codebook = codebooks[book]
            old = codebook.index_select(0, codes[virtual])
            vectors[:, :d] = torch.addmm(wanted[:, here], old, metric[here, here])
            factors[book, d] = energy[book]
            new_codes = first_largest(torch.mm(vectors, factors[book], out=scores))
            step = codebook.index_select(0, new_codes).sub_(old)
            codes[virtual] = new_codes
            change[:, here] += step
            wanted.addmm_(step, metric[here], alpha=-1)
    return change


def by_kernel(device: torch.device) -> bool:
    """Returns whether codes are chosen by the Triton kernel there: on a GPU for which CRVQ_GPU_SEARCH asks for it."""
    return device.type == "cuda" and os.environ.get("CRVQ_GPU_SEARCH", "0") not in ("", "0")


def first_largest(scores: Tensor) -> Tensor:
    """Returns the index of the largest value along the last axis, the first of several, int64.

    What `argmax` returns, in a third of its time on a CPU, where that goes through the values one by one. A row with a
    NaN has its last index.
    """
    if scores.device.type != "cpu":
        return scores.argmax(-1)
    size = scores.shape[-1]
    others = scores.sub(scores.amax(-1, keepdim=True)).ne_(0)  # 0 at the largest value, 1 elsewhere
    return torch.add(_indices(size), others, alpha=size).amin(-1).clamp_max_(size - 1).long()


@functools.cache
def _indices(size: int) -> Tensor:
    return torch.arange(size, dtype=torch.float32, device="cpu")
