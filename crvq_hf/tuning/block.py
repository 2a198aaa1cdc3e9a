"""Block fine-tuning: a quantized block towards the full-precision model's hidden states (CRVQ section 3.4)."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from .losses import relative_loss
from .trainer import Trainer, shuffled
from .tunable import tunable

# Learning rate of dense weights, relative to their root mean square, over that of codewords (benchmarks/LOG.md).
_DENSE_RATE = 2.0


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
