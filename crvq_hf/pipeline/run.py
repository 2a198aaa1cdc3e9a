"""What the parts of one quantizing run share: the model, how and where to compute, and what is known so far."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..blocks.runner import BlockRunner, Gave, State
from ..blocks.trees import hidden_of, map_tensors
from ..config import CRVQConfig
from ..resources.device import mixed_precision
from ..resources.workfolder import WorkFolder


@dataclass
class Run:
    """What one run needs everywhere.

    Attributes:
        model: being quantized.
        config: how.
        device: compute device.
        bfloat16: whether blocks run in mixed precision.
        linears: names of the layers to quantize, relative to their block, by block.
        names: of the blocks in the model.
        blocks: in the order in which they are quantized.
        work: the work folder.
        runner: runs the blocks; None without calibration text.
        dense_parts: embedding and head, by name, as they are in the full-precision model where they are coded first.
        layers: report lines by layer name.
        seconds: time by phase, what went on before this run was killed and is kept counted.
    """

    model: nn.Module
    config: CRVQConfig
    device: torch.device
    bfloat16: bool
    linears: list[list[str]]
    names: list[str]
    blocks: nn.ModuleList
    work: WorkFolder
    runner: BlockRunner | None = None
    dense_parts: dict[str, nn.Module] = field(default_factory=dict)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def timed(self, phase: str, start: float) -> None:
        """Adds the time since `start` to a phase."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Has the model's own embedding and head in the place of coded ones while inside."""
        coded = {name: self.model.get_submodule(name) for name in self.dense_parts}
        try:
            for name, part in self.dense_parts.items():
                self.model.set_submodule(name, part)
            yield
        finally:
            for name, part in coded.items():
                self.model.set_submodule(name, part)

    def precision(self) -> AbstractContextManager:
        """Returns the context that blocks are run and trained in."""
        return mixed_precision(self.device, self.bfloat16)

    def call_block(self, index: int, state: State) -> Gave:
        """Returns what a block that is on the compute device, in fp32, gives for some texts."""
        arguments = self.runner.arguments(index, state)
        hidden = hidden_of(arguments)

        def take(tensor: Tensor) -> Tensor:
            if tensor is hidden or (tensor.is_floating_point() and not self.bfloat16):
                return tensor.to(self.device, torch.float32)
            return tensor.to(self.device)

        with self.precision():
            return self.runner.call(index, map_tensors(arguments, take))

    def run_block(self, index: int, state: State) -> Tensor:
        """Returns the hidden states that a block on the compute device gives, fp32."""
        return hidden_of(self.call_block(index, state).output).float()


def check_finite(tensor: Tensor, name: str, what: str) -> None:
    """Raises ValueError if `what` of the module `name` holds NaN or infinite values."""
    if not tensor.isfinite().all():
        raise ValueError(
            f"The {what} of {name} holds NaN or infinite values; check the model, or load it with dtype=torch.float32 "
            "if half precision overflows."
        )
