"""The calibration Hessian of a linear layer, accumulated batch by batch."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def _fast_products() -> Iterator[None]:
    """Lets fp32 matrix products round their factors, on devices where that is faster."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class HessianAccumulator:
    """Accumulates `X^T X / rows` over batches of a layer's inputs.

    The normalisation is by the number of rows (tokens), so that Hessians of different calibration sizes, and the
    damping relative to their diagonal, are comparable.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu"):
        self.mean = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.rows = 0

    def add(self, inputs: Tensor) -> None:
        """Adds one batch of layer inputs.

        Args:
            inputs: `[..., in_features]`, any float dtype, the layer's inputs; leading axes are tokens.
        """
        x = inputs.detach().reshape(-1, inputs.shape[-1]).to(self.mean)
        if not len(x):
            return
        total = self.rows + len(x)
        # A running mean: the sum itself would lose precision after millions of tokens. Inputs may be rounded to
        # bfloat16 in the product (accumulated in fp32): far below the damping, and up to 8 times faster.
        with _fast_products():
            self.mean.mul_(self.rows / total).addmm_(x.T, x, alpha=1.0 / total)
        self.rows = total

    def weigh_(self, rows: int) -> None:
        """Makes this a part of a mean over `rows` rows, these and others: the parts then add up to it."""
        if rows:
            self.mean.mul_(self.rows / rows)
        self.rows = rows

    def hessian(self) -> Tensor:
        """Returns `[in_features, in_features]`, fp32; the identity when no token ever reached the layer.

        A mixture-of-experts layer may see no calibration token: it is then fitted to its weights alone.
        """
        return self.mean if self.rows else torch.eye(len(self.mean), device=self.mean.device)


def damped(hessian: Tensor, damping: float) -> Tensor:
    """Returns the Hessian with `damping` times its mean diagonal added to the diagonal.

    Calibration text is finite: on held-out text the damped Hessian gives the smaller error (GPTQ section 3 uses 0.01;
    at about one bit a tenth does better). A zero Hessian (dead inputs) becomes the identity.

    Args:
        hessian: `[K, K]`, fp32.
        damping: share of the mean diagonal, 0 or more.
    """
    mean = hessian.diagonal().mean()
    if mean <= 0:
        return torch.eye(len(hessian), device=hessian.device)
    result = hessian.clone()
    result.diagonal().add_(damping * mean)
    return result
