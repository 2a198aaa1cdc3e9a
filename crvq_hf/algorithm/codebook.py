"""Phase 2 of CRVQ: codebooks by k-means in the metric of the Hessian.

Vectors are kept as `[N, G, d]`: row n, group g. A group has its own metric, the `d x d` diagonal block of the
Hessian that belongs to its channels, so an assignment is one small matrix product a group and the update of all
centroids one weighted least squares problem of size d each.
"""

import torch
from crvq_kernels import code_search
from torch import Tensor

_RIDGE = 8.0  # in roundings: see `ridged`


def group_metrics(hessian: Tensor, in_group_size: int) -> Tensor:
    """Returns the diagonal blocks `[K/d, d, d]` of a Hessian `[K, K]`."""
    groups = len(hessian) // in_group_size
    blocks = hessian.view(groups, in_group_size, groups, in_group_size)
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def nearest_codes(vectors: Tensor, codebook: Tensor, metrics: Tensor) -> Tensor:
    """Returns the codes `[N, G]`, int64, nearest in the metric of each group.

    Args:
        vectors: `[N, G, d]`, fp32.
        codebook: `[C, d]`, fp32.
        metrics: `[G, d, d]`, fp32, symmetric.
    """
    # Minus half the squared distance, less what no codeword changes: v M c - 0.5 c M c.
    return code_search.nearest_codes(_projected(vectors, metrics), codebook, _energies(codebook, metrics))


def _projected(vectors: Tensor, metrics: Tensor) -> Tensor:
    return torch.einsum("ngd,gde->nge", vectors, metrics)


def _energies(codebook: Tensor, metrics: Tensor) -> Tensor:
    """Returns `[G, C]`, minus half of `c M c` for every codeword c in every group's metric M."""
    return -0.5 * torch.einsum("cd,gde,ce->gc", codebook, metrics, codebook)


def centroid_metrics(codes: Tensor, row_weight: Tensor, metrics: Tensor, codebook_size: int) -> Tensor:
    """Returns `[C, d, d]`: for every centroid the weighted sum of the metrics of the vectors it serves."""
    n, num_groups = codes.shape
    group = torch.arange(num_groups, device=codes.device)
    index = (codes * num_groups + group).reshape(-1)
    counts = metrics.new_zeros(codebook_size * num_groups)
    counts.index_add_(0, index, row_weight[:, None].expand(n, num_groups).reshape(-1))
    return (counts.view(codebook_size, num_groups) @ metrics.flatten(1)).view(codebook_size, *metrics.shape[1:])


def ridged(matrices: Tensor) -> Tensor:
    """Returns positive definite `[..., d, d]` from sums of metrics `[..., d, d]`, however little those see.

    Where they see nothing, rounding leaves eigenvalues of either sign, of about eps times the trace. The ridge is
    `_RIDGE` times that. A matrix of zeros (a codeword in no use) becomes the identity.
    """
    ridge = _RIDGE * torch.finfo(matrices.dtype).eps * matrices.diagonal(dim1=-2, dim2=-1).sum(-1)
    ridge = torch.where(ridge > 0, ridge, torch.ones_like(ridge))
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return matrices + ridge[..., None, None] * identity


def kmeans(
    vectors: Tensor,
    metrics: Tensor,
    row_weight: Tensor,
    codebook_size: int,
    iterations: int,
    generator: torch.Generator,
    max_vectors: int = 1 << 16,
) -> Tensor:
    """Returns a codebook `[C, d]`, fp32, that minimises the weighted quantization error of `vectors`.

    Lloyd iterations on at most `max_vectors` vectors (whole rows, drawn at random). A centroid that serves nothing is
    moved to a random vector.

    Args:
        vectors: `[N, G, d]`, fp32.
        metrics: `[G, d, d]`, fp32: the error of group g is measured as `e @ metrics[g] @ e`.
        row_weight: `[N]`, fp32, weight of each row's error (its squared scale).
        codebook_size: C. With fewer than C vectors some centroids are repeated vectors.
        iterations: Lloyd iterations.
        generator: source of the draws, on the CPU.
        max_vectors: vectors looked at; more cost time and gain little for 256 centroids.
    """
    n, num_groups, d = vectors.shape
    rows = max(1, max_vectors // num_groups)
    if n > rows:
        pick = torch.randperm(n, generator=generator, device="cpu")[:rows].to(vectors.device)
        vectors, row_weight = vectors[pick], row_weight[pick]
        n = rows
    flat = vectors.reshape(-1, d)

    def draw(count: int) -> Tensor:
        index = torch.randperm(len(flat), generator=generator, device="cpu")
        return flat[index.repeat(-(-count // len(flat)))[:count].to(flat.device)]

    codebook = draw(codebook_size)
    projected = _projected(vectors, metrics)
    weighted = (projected * row_weight[:, None, None]).reshape(-1, d)
    for _ in range(iterations):
        codes = code_search.nearest_codes(projected, codebook, _energies(codebook, metrics))
        sums = torch.zeros_like(codebook).index_add_(0, codes.reshape(-1), weighted)
        matrices = centroid_metrics(codes, row_weight, metrics, codebook_size)
        # As a move from where it is: the ridge then holds a centroid back, where nothing is seen, and biases none.
        codebook = codebook + torch.linalg.solve(ridged(matrices), sums - (matrices @ codebook[..., None])[..., 0])
        empty = torch.bincount(codes.reshape(-1), minlength=codebook_size) == 0
        if empty.any():
            codebook[empty] = draw(int(empty.sum()))
    return codebook
