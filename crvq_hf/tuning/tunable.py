"""Quantized layers in training: codebooks and row scales become fp32 parameters, codes stay as they are."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from crvq_kernels import decode_codebooks, unpack_codes
from torch import Tensor, nn

from ..algorithm.search import assemble
from ..modeling.linear import CRVQLinear
from ..quantized_weight import QuantizedWeight, normalised, order_dtype

# Groups of a codeword that are summed one after the other: on a GPU every one is a read that the next waits for.
_SUMMED_AT_ONCE = 64


class _QuantizedProduct(torch.autograd.Function):
    """`scale * (x[order] @ weight(codebooks, codes)^T)`, differentiable in `x`, codebooks and scales.

    The order is applied to `x` and the scales to the product: both are smaller than the weight. The backward sums the
    gradient in the weight over the groups that each codeword serves.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, codebooks: Tensor, scales: Tensor, codes: Tensor, order: Tensor, served: tuple[Tensor, ...]
    ) -> Tensor:
        num_codebooks, _, d = codebooks.shape
        critical = (codes.shape[1] - len(order) // d) // max(1, num_codebooks - 1)
        weight = assemble(codebooks.to(x.dtype), codes, critical)
        x = x.gather(1, order.expand(len(x), -1))  # on CPUs faster than index_select
        unscaled = x @ weight.T
        ctx.save_for_backward(x, weight, unscaled, scales, order, *served)
        ctx.shape = codebooks.shape
        return (unscaled * scales).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, unscaled, scales, order, groups, pieces, first = ctx.saved_tensors
        scale_gradient = (grad * unscaled).sum(0, dtype=scales.dtype)
        grad = (grad * scales).to(x.dtype)
        x_gradient = None
        if ctx.needs_input_grad[0]:
            ordered = grad @ weight
            x_gradient = torch.empty_like(ordered).scatter_(1, order.expand(len(x), -1), ordered)
        rows = (grad.T @ x).view(-1, ctx.shape[-1])  # summed in fp32, whatever their dtype
        sums = F.embedding_bag(groups, rows, pieces, mode="sum").to(scales.dtype)
        every = torch.arange(len(sums), dtype=first.dtype, device=first.device)
        codebooks = F.embedding_bag(every, sums, first, mode="sum").view(ctx.shape)
        return x_gradient, codebooks, scale_gradient, None, None, None


def groups_served(
    codes: Tensor, num_codebooks: int, codebook_size: int, critical: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the groups that each codeword serves, one codeword after the other, cut into pieces.

    Args:
        codes: `[N, V]`.
        num_codebooks: 1 + E.
        codebook_size: C.
        critical: Gc.

    Returns:
        Indices into the `N * K/d` groups of the weight, `[N * V]`; where among them each piece starts, which is of one
        codeword and has at most `_SUMMED_AT_ONCE`, `[pieces]`; where among the pieces those of each codeword start,
        `[(1 + E) * C]`; all int32.
    """
    n, device = len(codes), codes.device
    num_groups = codes.shape[1] - (num_codebooks - 1) * critical
    columns = [torch.arange(num_groups, device=device)] + [torch.arange(critical, device=device)] * (num_codebooks - 1)
    books = torch.arange(num_codebooks, device=device).repeat_interleave(
        torch.tensor([len(c) for c in columns], device=device)
    )
    codeword = (codes.long() + codebook_size * books).flatten()
    group = (torch.arange(n, device=device)[:, None] * num_groups + torch.cat(columns)).flatten()
    counts = torch.bincount(codeword, minlength=num_codebooks * codebook_size)
    num_pieces = -(-counts // _SUMMED_AT_ONCE)
    starts, first = counts.cumsum(0) - counts, num_pieces.cumsum(0) - num_pieces
    owner = torch.arange(len(counts), device=device).repeat_interleave(num_pieces)
    pieces = starts[owner] + _SUMMED_AT_ONCE * (torch.arange(len(owner), device=device) - first[owner])
    return group[codeword.argsort(stable=True)].int(), pieces.int(), first.int()


class TunableLinear(nn.Module):
    """A `CRVQLinear` in training: fp32 codebooks of unit size and fp32 relative scales, codes fixed.

    Codewords are divided by their root mean square, and scales by their start value, so that one learning rate suits
    every layer of every model.
    """

    def __init__(self, linear: CRVQLinear):
        super().__init__()
        stored = linear.quantized_weight()
        codebooks = decode_codebooks(stored.codebooks).float()
        size = codebooks.square().mean().sqrt().clamp_min(1e-12)
        self.nbits, self.num_critical_groups = stored.nbits, stored.num_critical_groups
        self.codebook_bits = stored.codebook_bits
        self.packed_codes = stored.codes
        self.codebooks = nn.Parameter(codebooks / size)
        self.relative_scales = nn.Parameter(torch.ones_like(stored.scales, dtype=torch.float32))
        self.register_buffer("start_scales", stored.scales.float() * size, persistent=False)
        codes = unpack_codes(stored.codes, stored.nbits, stored.num_virtual_groups)
        self.register_buffer("codes", codes.int(), persistent=False)
        self.register_buffer("channel_order", stored.channel_order.long(), persistent=False)
        served = groups_served(self.codes, *codebooks.shape[:2], stored.num_critical_groups)
        for name, tensor in zip(("groups", "pieces", "first_piece"), served, strict=True):
            self.register_buffer(name, tensor, persistent=False)
        self.bias, self.conv1d = linear.bias, linear.conv1d
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """The codes: other code may ask for their device; a layer of which it asks more is never quantized."""
        return self.codes

    def forward(self, x: Tensor) -> Tensor:
        """Returns `[..., N]` for `x` `[..., K]`, in the dtype of autocast where that is on, else in that of `x`."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        scales = self.start_scales * self.relative_scales
        served = self.groups, self.pieces, self.first_piece
        tokens = x.to(dtype).flatten(0, -2)
        y = _QuantizedProduct.apply(tokens, self.rounded(), scales, self.codes, self.channel_order, served)
        y = y.view(*x.shape[:-1], y.shape[-1])  # also where no token came by
        return y if self.bias is None else y + self.bias.to(dtype)

    def rounded(self) -> Tensor:
        """Returns the codebooks as they will be stored, with the gradient of those that are tuned (straight-through).

        What int8 takes away is then part of what is tuned, instead of an error at the end.
        """
        if self.codebook_bits == 16:
            return self.codebooks
        stored, size = normalised(self.codebooks.detach(), self.codebook_bits)
        return self.codebooks + (decode_codebooks(stored) * size - self.codebooks.detach())

    @torch.no_grad()
    def to_linear(self) -> CRVQLinear:
        """Returns the tuned layer, rounded to what is stored."""
        codebooks, size = normalised(self.codebooks.detach(), self.codebook_bits)
        scales = self.start_scales * self.relative_scales * size
        weight = QuantizedWeight(
            self.packed_codes,
            codebooks,
            scales.half(),
            self.channel_order.to(order_dtype(len(self.channel_order))),
            self.nbits,
            self.num_critical_groups,
        )
        linear = CRVQLinear.from_quantized(weight, self.bias)
        linear.conv1d = self.conv1d
        return linear.train(self.training)


@contextmanager
def tunable(module: nn.Module, dense: Sequence[str] = ()) -> Iterator[list[nn.Parameter]]:
    """Makes the quantized linears of `module` trainable while inside; yields all tunable parameters.

    These are codebooks, scales, the norms and biases (parameters of at most one dimension) of `module`, and the
    weights of its modules named in `dense`.
    """
    names = [name for name, child in module.named_modules() if isinstance(child, CRVQLinear)]
    for name in names:
        module.set_submodule(name, TunableLinear(module.get_submodule(name)))
    codebooks = {id(child.codebooks) for child in module.modules() if isinstance(child, TunableLinear)}
    weights = {id(module.get_submodule(name).weight) for name in dense}
    parameters = [p for p in module.parameters() if p.dim() <= 1 or id(p) in codebooks or id(p) in weights]
    try:
        with frozen(module):
            for parameter in parameters:
                parameter.requires_grad_(True)
            yield parameters
    finally:
        for parameter in parameters:
            parameter.grad = None
        for name in names:
            module.set_submodule(name, module.get_submodule(name).to_linear())


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Marks every parameter of `module` as not to be tuned while inside."""
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    module.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
