"""Adam over a fixed number of steps, resumable between any two, its gradients those of all processes."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..resources import distributed


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Returns the learning rate of a step: a linear warm-up over the first twentieth, then a cosine to zero."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def shuffled(count: int, epochs: int, seed: int) -> list[int]:
    """Returns the indices 0..count-1 in a new random order for each epoch, one epoch after the other."""
    generator = torch.Generator().manual_seed(seed)
    return [int(i) for _ in range(epochs) for i in torch.randperm(count, generator=generator, device="cpu")]


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
