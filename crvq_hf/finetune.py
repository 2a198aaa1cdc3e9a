"""Fine-tuning of what is continuous in a quantized model: codebooks, row scales, norms and biases.

Block fine-tuning fits a block to the full-precision block's output, end-to-end fine-tuning the whole model to the
full-precision logits (CRVQ section 3.4). Codes stay as the search chose them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from crvq_kernels import unpack_codes
from torch import Tensor, nn

from . import distributed
from .linear import CRVQLinear
from .quantized_weight import QuantizedWeight, decode_codebooks, normalised, order_dtype
from .search import assemble

# Tokens whose distributions over the vocabulary exist at a time.
_DIVERGENCE_TOKENS = 64
# Groups of a codeword that are summed one after the other: on a GPU every one is a read that the next waits for.
_SUMMED_AT_ONCE = 64
# Learning rate of dense weights, relative to their root mean square, over that of codewords (benchmarks/LOG.md).
_DENSE_RATE = 2.0


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


class _Divergence(torch.autograd.Function):
    """Mean KL(teacher || student) over tokens; makes its gradient at once, a few tokens at a time.

    With vocabularies of 50 to 250 thousand, autograd would keep half a dozen tensors of the size of the logits.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = logits.flatten(0, -2), teacher.flatten(0, -2)
        gradient, total = torch.empty_like(student), torch.zeros((), device=logits.device)
        for start in range(0, len(student), _DIVERGENCE_TOKENS):
            part = slice(start, start + _DIVERGENCE_TOKENS)
            log_q = F.log_softmax(student[part].float(), -1)
            log_p = F.log_softmax(teacher[part].float(), -1)
            p = log_p.exp()
            gradient[part] = (log_q.exp() - p) / len(student)
            total += torch.dot(p.view(-1), log_p.sub_(log_q).view(-1))
        ctx.save_for_backward(gradient.view_as(logits))
        return total / len(student)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None


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
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Returns `[..., N]` for `x` `[..., K]`, in the dtype of autocast where that is on, else in that of `x`."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        scales = self.start_scales * self.relative_scales
        served = self.groups, self.pieces, self.first_piece
        tokens = x.to(dtype).flatten(0, -2)
        y = _QuantizedProduct.apply(tokens, self._rounded(), scales, self.codes, self.channel_order, served)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias.to(dtype)

    def _rounded(self) -> Tensor:
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


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Returns the learning rate of a step: a linear warm-up over the first twentieth, then a cosine to zero."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def relative_loss(output: Tensor, target: Tensor) -> Tensor:
    """Returns the mean over tokens of the error's energy over the target's.

    A plain mean squared error would be that of the few tokens with massive activations. The logarithm keeps tokens
    beyond repair from pulling at all the others.

    Args:
        output: `[batch, seqlen, hidden_size]`.
        target: the same, from the full-precision model.
    """
    error = (output.float() - target).square().sum(-1)
    return torch.log1p(error / target.square().sum(-1).clamp_min(1e-12)).mean()


def distillation_loss(logits: Tensor, teacher: Tensor) -> Tensor:
    """Returns the mean over tokens of KL(teacher || student), in nats.

    Args:
        logits: `[batch, seqlen, vocab_size]`.
        teacher: the same, of the full-precision model.
    """
    return _Divergence.apply(logits, teacher)


class Trainer:
    """Adam over a fixed number of steps, with a state that can be saved between any two of them."""

    def __init__(self, parameters: list[nn.Parameter], steps: int, peak: float, rates: Sequence[float] | None = None):
        """Makes the optimizer.

        Args:
            parameters: what to tune.
            steps: how many there will be.
            peak: highest learning rate.
            rates: factor of each parameter's learning rate; None: 1.
        """
        self.parameters, self.steps, self.peak = parameters, steps, peak
        rates = [1.0] * len(parameters) if rates is None else rates
        by_rate: dict[float, list[nn.Parameter]] = {}  # Adam runs kernels for each of its groups
        for parameter, rate in zip(parameters, rates, strict=True):
            by_rate.setdefault(rate, []).append(parameter)
        groups = [{"params": params, "rate": rate} for rate, params in by_rate.items()]
        self.optimizer = torch.optim.Adam(groups, lr=peak, betas=(0.9, 0.95))

    def step(self, number: int, loss: Tensor | None) -> float:
        """Takes step `number` down the gradient of the loss; returns it.

        Args:
            number: of the step.
            loss: mean over the batch; None if another process has the batch.

        Raises:
            ValueError: the loss is not finite.
        """
        self.optimizer.zero_grad(set_to_none=True)
        if loss is not None:
            loss.backward()
        value = distributed.sum_gradients_(self.parameters, 0.0 if loss is None else float(loss.detach()))
        if not math.isfinite(value):
            raise ValueError(f"Fine-tuning met a loss of {value} at step {number}; try a smaller learning rate.")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(number, self.steps, self.peak) * group["rate"]
        self.optimizer.step()
        return value

    def state(self) -> dict[str, Tensor]:
        """Returns parameters and moments by name, enough to go on from here exactly."""
        tensors = {}
        for number, parameter in enumerate(self.parameters):
            tensors[f"{number}.value"] = parameter.detach()
            tensors.update({f"{number}.{key}": value for key, value in self.optimizer.state[parameter].items()})
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Takes up the state that `state` returned."""
        for number, parameter in enumerate(self.parameters):
            own = {key.partition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{number}.")}
            parameter.copy_(own.pop("value"))
            # The step count stays on the CPU, as Adam has it; moments belong with their parameter.
            self.optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in own.items()
            }


def shuffled(count: int, epochs: int, seed: int) -> list[int]:
    """Returns the indices 0..count-1 in a new random order for each epoch, one epoch after the other."""
    generator = torch.Generator().manual_seed(seed)
    return [int(i) for _ in range(epochs) for i in torch.randperm(count, generator=generator)]


def finetune_block_(
    block: nn.Module,
    run: Callable[[Tensor], Tensor],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    *,
    epochs: int,
    peak: float,
    seed: int,
    dense: Sequence[str] = (),
) -> tuple[float, float]:
    """Fits a quantized block to the full-precision model's hidden states after it.

    Args:
        block: the block, its linears quantized, fp32, on the compute device.
        run: maps a batch of inputs to the block's output.
        inputs: batches `[batch, seqlen, hidden_size]`: what the quantized model hands to the block. Of several
            processes each has some, and empty ones in place of the others'.
        targets: as many batches: what the full-precision model has after it.
        epochs: passes over the batches.
        peak: learning rate.
        seed: of the order of batches.
        dense: names of linears in the block that are yet to be quantized. Their weights are tuned too, and so take
            up the error of those that are.

    Returns:
        The mean loss over the first and over the last tenth of the steps.
    """
    order = shuffled(len(inputs), epochs, seed)
    losses = []
    with tunable(block, dense) as parameters:
        weights = {id(block.get_submodule(name).weight) for name in dense}
        # Dense weights, unlike codewords, are of any size.
        rates = [
            _DENSE_RATE * float(p.detach().square().mean().sqrt()) if id(p) in weights else 1.0 for p in parameters
        ]
        trainer = Trainer(parameters, len(order), peak, rates)
        for number, index in enumerate(order):
            loss = None
            if len(inputs[index]):
                output = run(inputs[index])
                loss = relative_loss(output, targets[index].to(output.device).float())
            losses.append(trainer.step(number, loss))
    part = max(1, len(losses) // 10)
    return sum(losses[:part]) / part, sum(losses[-part:]) / part
