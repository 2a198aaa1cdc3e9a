"""Phase 3 of CRVQ: codes, codebooks and row scales against the calibration Hessian.

The objective is `tr((W - Wq) H (W - Wq)^T)` (CRVQ section 3.3, AQLM eq. 2), over weights whose channels are already in
channel order. Every step keeps the *residual gradient* `R = (W - Wq) H` up to date instead of rebuilding it: changing
one group of `Wq` by `D [N, d]` changes R by `-D @ H[group]`, one thin matrix product.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from crvq_kernels.code_search import choose_codes_
from torch import Tensor

from .codebook import centroid_metrics, group_metrics, ridged

# Columns whose updates of R are kept local until the block is done (as GPTQ's lazy batches).
_BLOCK_COLUMNS = 64
_ROUNDINGS = 4.0  # a curvature of fewer roundings is none; with a damped Hessian it has hundreds of times as many


@dataclass
class LayerFit:
    """One layer being fitted. All tensors are fp32 (codes int64) and live on one device.

    Attributes:
        hessian: `[K, K]`, damped, in channel order.
        target: `[N, K]`, `W @ hessian`.
        energy: `tr(W H W^T)`, what the objective is when every weight is dropped.
        scales: `[N]`.
        codebooks: `[1 + E, C, d]`.
        codes: `[N, V]`, virtual groups: base groups, then each extended codebook's critical groups.
        num_critical_groups: Gc.
        quantized: `[N, K]`, the weight these make.
        gradient: `[N, K]`, `(W - quantized) @ hessian`.
    """

    hessian: Tensor
    target: Tensor
    energy: float
    scales: Tensor
    codebooks: Tensor
    codes: Tensor
    num_critical_groups: int
    quantized: Tensor
    gradient: Tensor

    @classmethod
    def start(
        cls,
        weight: Tensor,
        hessian: Tensor,
        scales: Tensor,
        codebooks: Tensor,
        codes: Tensor,
        num_critical_groups: int,
    ) -> "LayerFit":
        """Returns a fit of `weight` `[N, K]`, in channel order, from initial scales, codebooks and codes."""
        target = weight @ hessian
        energy = float(torch.sum(target * weight, dtype=torch.float64))
        quantized = assemble(codebooks, codes, num_critical_groups) * scales[:, None]
        gradient = target - quantized @ hessian
        return cls(hessian, target, energy, scales, codebooks, codes, num_critical_groups, quantized, gradient)

    def relative_error(self) -> float:
        """Returns the objective over `energy`: the squared relative error of the layer's output on its calibration.

        Below zero by more than rounding only if the Hessian has negative eigenvalues.
        """
        # tr(D H D^T) with D = W - Wq and D H = gradient is energy - <target + gradient, Wq>: W is not needed.
        kept = float(torch.sum((self.target + self.gradient) * self.quantized, dtype=torch.float64))
        return 1.0 - kept / self.energy if self.energy > 0 else 0.0


def assemble(codebooks: Tensor, codes: Tensor, num_critical_groups: int) -> Tensor:
    """Returns the unscaled weight `[N, K]` in channel order: base codewords plus the extended ones.

    Differentiable with respect to the codebooks.

    Args:
        codebooks: `[1 + E, C, d]`.
        codes: `[N, V]`, int64.
        num_critical_groups: Gc; `V = K/d + E * Gc`.
    """
    num_codebooks, size, d = codebooks.shape
    extended, critical, n = num_codebooks - 1, num_critical_groups, len(codes)
    num_groups = codes.shape[1] - extended * critical
    weight = F.embedding(codes[:, :num_groups], codebooks[0])
    if critical:
        offset = size * torch.arange(extended, device=codes.device)[:, None]
        index = codes[:, num_groups:].view(n, extended, critical) + offset
        refinement = F.embedding(index, codebooks[1:].reshape(-1, d)).sum(1)
        weight[:, :critical] += refinement
    return weight.reshape(n, num_groups * d)


def scatter(gradient: Tensor, codes: Tensor, shape: torch.Size, num_critical_groups: int) -> Tensor:
    """Returns `[1 + E, C, d]`: the adjoint of `assemble`, `gradient` `[N, K]` summed onto the codewords in use.

    Args:
        gradient: `[N, K]`.
        codes: `[N, V]`, int64.
        shape: that of the codebooks, `(1 + E, C, d)`.
        num_critical_groups: Gc.
    """
    num_codebooks, size, d = shape
    extended, critical, n = num_codebooks - 1, num_critical_groups, len(codes)
    num_groups = codes.shape[1] - extended * critical
    rows = gradient.reshape(n, num_groups, d)
    result = torch.zeros(num_codebooks * size, d, dtype=gradient.dtype, device=gradient.device)
    result.index_add_(0, codes[:, :num_groups].reshape(-1), rows.reshape(-1, d))
    if critical:
        rows = rows[:, :critical].reshape(-1, d)
        for book in range(extended):
            first = num_groups + book * critical
            result.index_add_(0, codes[:, first : first + critical].reshape(-1) + (book + 1) * size, rows)
    return result.view(shape)


def update_codes_(fit: LayerFit) -> None:
    """Chooses every code anew, group by group, each the best with everything else fixed (CRVQ section 3.3, beam 1).

    Gauss-Seidel over groups and, in a critical group, over its codebooks: the objective never rises. For group g with
    metric `H_gg` the error of codeword c is, up to a constant, `c H_gg c^T - 2 c . (c_old H_gg + R_g / scale)`.
    """
    num_codebooks, _, d = fit.codebooks.shape
    extended, critical = num_codebooks - 1, fit.num_critical_groups
    num_groups = fit.codes.shape[1] - extended * critical
    scale = fit.scales[:, None]
    inverse_scale = torch.where(scale != 0, 1.0 / scale, torch.zeros_like(scale))
    energies = -0.5 * torch.einsum("bcd,gde,bce->gbc", fit.codebooks, group_metrics(fit.hessian, d), fit.codebooks)
    codes = fit.codes.T.contiguous()  # a group's codes lie together
    per_block = max(1, _BLOCK_COLUMNS // d)
    for first in range(0, num_groups, per_block):
        last = min(first + per_block, num_groups)
        columns = slice(first * d, last * d)
        # In units of the row's scale: the gradient, and what the codewords of the block have changed by.
        wanted = fit.gradient[:, columns] * inverse_scale
        metric = fit.hessian[columns, columns]
        change = choose_codes_(wanted, codes, fit.codebooks, energies[first:last], metric, first, num_groups, critical)
        change *= scale
        fit.quantized[:, columns] += change
        fit.gradient.addmm_(change, fit.hessian[columns], alpha=-1)
    fit.codes = codes.T.contiguous()


def update_scales_(fit: LayerFit) -> None:
    """Sets every row's scale to its least-squares optimum; needs no matrix product.

    The factor of row n is `<W H, Wq> / <Wq H, Wq>`, and `Wq H = target - gradient`. A row whose quantized weight is
    invisible to the Hessian keeps its scale.
    """
    quantized_h = fit.target - fit.gradient
    power = (quantized_h * fit.quantized).sum(1)
    factor = (fit.target * fit.quantized).sum(1) / power
    seen = power > _curvature_rounding(fit.quantized, fit.hessian)
    factor = torch.where(seen & factor.isfinite() & (factor > 0), factor, torch.ones_like(factor))[:, None]
    fit.scales = fit.scales * factor[:, 0]
    fit.quantized *= factor
    fit.gradient = fit.target - quantized_h * factor


def update_codebooks_(fit: LayerFit) -> None:
    """Improves all codebooks jointly by one preconditioned gradient step, as long as is best (CRVQ section 3.3).

    The preconditioner is the objective's own block diagonal, one `d x d` matrix a codeword; a codeword no weight uses
    has a zero gradient and stays. None does where the Hessian does not see the step. The objective never rises.
    """
    shape, critical = fit.codebooks.shape, fit.num_critical_groups
    scale = fit.scales[:, None]
    slope = scatter(fit.gradient * scale, fit.codes, shape, critical)
    direction = torch.einsum("bcde,bce->bcd", _preconditioner(fit), slope)
    change = assemble(direction, fit.codes, critical) * scale
    change_h = change @ fit.hessian
    curvature = (change * change_h).sum()
    seen = curvature > _curvature_rounding(change, fit.hessian).sum()
    length = torch.where(seen, (slope * direction).sum() / curvature, torch.zeros_like(curvature))
    fit.codebooks = fit.codebooks + length * direction
    fit.quantized += length * change
    fit.gradient -= length * change_h


def _preconditioner(fit: LayerFit) -> Tensor:
    """Returns the inverse block diagonal of the objective in the codewords, `[1 + E, C, d, d]`."""
    num_codebooks, size, d = fit.codebooks.shape
    extended, critical = num_codebooks - 1, fit.num_critical_groups
    num_groups = fit.codes.shape[1] - extended * critical
    metrics, weight = group_metrics(fit.hessian, d), fit.scales.square()
    blocks = [centroid_metrics(fit.codes[:, :num_groups], weight, metrics, size)]
    for book in range(extended):
        first = num_groups + book * critical
        blocks.append(centroid_metrics(fit.codes[:, first : first + critical], weight, metrics[:critical], size))
    # In fp32 the inverse would be wrong by most of what it is where little is seen, and the gradient's other parts
    # would lead there.
    return torch.linalg.inv(ridged(torch.stack(blocks)).double()).float()


def _curvature_rounding(change: Tensor, hessian: Tensor) -> Tensor:
    """Returns `[N]`: what the curvature `<D, D H>` of each row D of `change` must exceed to be more than rounding.

    Where H does not see D, what comes out is about eps times `<D, D diag(H)>`, of either sign, and up to `sqrt(K)`
    times that from long sums. A step is as long as the gradient over the curvature. Above this bound the rounding of
    the gradient makes no long step, and one that raises the objective by about eps times its energy at most.
    """
    share = _ROUNDINGS * torch.finfo(change.dtype).eps * len(hessian) ** 0.5
    return share * (change.square() @ hessian.diagonal())
