"""The calibration Hessian of a linear layer, accumulated batch by batch."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_STRIP = 256  # rows of a Hessian that are computed at once


@contextmanager
def _fast_products(device_type: str) -> Iterator[None]:
    """Lets fp32 matrix products round their factors where that is faster, but never their results.

    Layers run under autocast, which would round the results to bfloat16 too: the Hessian would not be positive
    definite any more.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


class HessianAccumulator:
    """Accumulates `X^T X / rows` over batches of a layer's inputs: the same bits in any order, in any partial sums.

    The fp32 product of each batch is rounded to a whole number of quanta, and whole numbers below 2**53 are added in
    float64 without error (pre-rounding: Demmel and Nguyen, Fast Reproducible Floating-Point Summation, ARITH 2013).

    The normalisation is by the number of rows (tokens), so that Hessians of different calibration sizes, and the
    damping relative to their diagonal, are comparable.

    Attributes:
        quanta: `[in_features, in_features]`, float64, whole numbers, the upper triangle in strips; others' may be
            added.
        rows: number of tokens; theirs may be added.
    """

    def __init__(self, in_features: int, energy: float, device: torch.device | str = "cpu"):
        """Starts at zero.

        Args:
            in_features: K.
            energy: about the largest sum of squares of a channel over a sequence, the same wherever sums are to be.
                A quantum is 2**-32 of it, far below the damping, which leaves room for 2**21 such sequences.
            device: to compute on.
        """
        self.quantum = 2.0 ** (max(math.frexp(energy)[1], -64) - 32)  # its inverse is an fp32 number
        self.quanta = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        self.rows = 0

    def add(self, inputs: Tensor) -> None:
        """Adds one batch of layer inputs.

        Args:
            inputs: `[..., in_features]`, any float dtype, the layer's inputs; leading axes are tokens.
        """
        x = inputs.detach().reshape(-1, inputs.shape[-1]).to(self.quanta.device, torch.float32)
        if not len(x):
            return
        # Inputs may be rounded to bfloat16 in the product (accumulated in fp32): far below the damping, and up to 8
        # times faster. Strips spare half of a symmetric product, and memory.
        with _fast_products(x.device.type):
            for start in range(0, len(self.quanta), _STRIP):
                product = x[:, start : start + _STRIP].T @ x[:, start:]
                self.quanta[start : start + _STRIP, start:] += product.mul_(1 / self.quantum).round_()
        self.rows += len(x)

    @property
    def is_exact(self) -> bool:
        """Whether no sum has outgrown the quanta; else they are rounded as any float64 sums, right but order-bound."""
        return not self.quanta.diagonal().max() > 2**53

    def hessian(self) -> Tensor:
        """Returns `[in_features, in_features]`, fp32; the identity when no token ever reached the layer.

        A mixture-of-experts layer may see no calibration token: it is then fitted to its weights alone.
        """
        size, device = len(self.quanta), self.quanta.device
        if not self.rows:
            return torch.eye(size, dtype=torch.float32, device=device)
        result = torch.empty(size, size, dtype=torch.float32, device=device)
        for start in range(0, size, _STRIP):
            strip = self.quanta[start : start + _STRIP, start:] * (self.quantum / self.rows)
            result[start : start + _STRIP, start:] = strip
            result[start:, start : start + _STRIP] = strip.T
        return result


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
        return torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    result = hessian.clone()
    result.diagonal().add_(damping * mean)
    return result
