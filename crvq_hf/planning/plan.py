"""`Plan`: the memory and disk of a run beside what the machine has, in words, and refused where it cannot be."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..resources import distributed
from .memory import (
    Work,
    end_to_end_bytes,
    finished_bytes,
    fitting_bytes,
    hessian_bytes,
    running_bytes,
    stream_bytes,
    table_bytes,
    tuning_bytes,
)
from .sizes import ModelSizes

PROCESS_BYTES = 530_000_000  # of Python with PyTorch and transformers: measured on Linux, without a GPU
CONTEXT_BYTES = 600_000_000  # of CUDA and its libraries on a GPU: taken for granted, not measured
_CERTAIN = 1.1  # what needs less than this times what is free is tried
_END_TO_END = "end-to-end fine-tuning"


@dataclass(frozen=True)
class Machine:
    """What a run has.

    Attributes:
        device: that it computes on, as in "cpu" or "cuda".
        device_bytes: free on it; of a CPU those of its memory.
        memory_bytes: free of the CPU's memory.
        disk_bytes: free on the disk of the work folder.
        loaded: whether the dense model is in memory by now, and what it takes is not free any more.
        is_absent: whether its blocks are read one by one.
    """

    device: str
    device_bytes: int
    memory_bytes: int
    disk_bytes: int
    loaded: bool
    is_absent: bool

    @classmethod
    def here(cls, device: torch.device, folder: str | os.PathLike, loaded: bool, is_absent: bool) -> Machine:
        """Returns what this machine has by now, with a work folder that need not be there."""
        path = Path(folder).absolute()
        path = next(parent for parent in (path, *path.parents) if parent.exists())
        disk = shutil.disk_usage(path).free
        free, memory = distributed.free_memory_bytes(device), distributed.free_memory_bytes()
        return cls(device.type, free, memory, disk, loaded, is_absent)


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
        model: sizes of the model.
        work: how much there is to do.
        machine: what there is.
        phases: bytes on the compute device, by phase.
        memory: bytes of the CPU's memory by what has them; of a run on a CPU, what phases take comes on top.
        disk: bytes on the disk by what has them, the result's not counted.
        seconds: estimates by phase, None where nothing was timed.
    """

    model: ModelSizes
    work: Work
    machine: Machine
    phases: dict[str, int]
    memory: dict[str, int]
    disk: dict[str, int]
    seconds: dict[str, float] | None = field(default=None)

    @property
    def device_peak(self) -> int:
        """Bytes on a GPU at most; 0 where the CPU computes."""
        return 0 if self.machine.device == "cpu" else CONTEXT_BYTES + max(self.phases.values())

    @property
    def memory_peak(self) -> int:
        """Bytes of the CPU's memory at most, this process counted."""
        return sum(self.memory.values()) + (self._phase_peak if self.machine.device == "cpu" else 0)

    @property
    def _phase_peak(self) -> int:
        """Bytes of the most expensive phase beyond the model's own: end to end, the model itself is in fp32."""
        blocks = [nbytes for phase, nbytes in self.phases.items() if phase != _END_TO_END]
        return max(*blocks, self.phases.get(_END_TO_END, 0) - self.memory["model"])

    def missing(self) -> dict[str, tuple[int, int]]:
        """Returns (needed, free) bytes of what there is too little of, by its name."""
        there = PROCESS_BYTES + (self.memory["model"] if self.machine.loaded else 0)
        pairs = {
            f"memory of {self.machine.device}": (self.device_peak, self.machine.device_bytes),
            "memory": (self.memory_peak - there, self.machine.memory_bytes),
            "disk": (sum(self.disk.values()), self.machine.disk_bytes),
        }
        if self.machine.device == "cpu":
            del pairs["memory of cpu"]
        return {name: pair for name, pair in pairs.items() if pair[0] > _CERTAIN * pair[1]}

    def check(self) -> None:
        """Checks that there is enough of everything.

        Raises:
            ValueError: there is not; says what would help.
        """
        missing = self.missing()
        if not missing:
            return
        told = " and ".join(
            f"{_gb(needed)} of {name}, {_gb(free)} are free" for name, (needed, free) in missing.items()
        )
        raise ValueError(f"Quantizing {self.model.name} needs {told}; {self._help()}.")

    def _help(self) -> str:
        """Returns which options would make it fit."""
        ways = {"e2e_finetune_epochs=0": {"tunes_end_to_end": False, "all": self.work.first}}
        ways["e2e_finetune_epochs=0 and block_finetune_epochs=0"] = ways["e2e_finetune_epochs=0"] | {
            "tunes_blocks": False
        }
        ways["fewer nsamples or a shorter seqlen"] = {"first": self.work.batch, "all": self.work.batch}
        for way, changes in ways.items():
            if not plan_of(self.model, replace(self.work, **changes), self.machine).missing():
                return f"give {way}"
        if set(self.missing()) == {"disk"}:
            return "free some, or name a folder elsewhere with work_dir"
        if self.machine.device != "cpu":
            return "no option makes it fit this GPU; give device='cpu', or take a larger one"
        return "no option makes it fit; take a machine with more memory"

    def lines(self) -> list[str]:
        """Returns the plan in words."""
        model, machine = self.model, self.machine
        kept = "its blocks are read one at a time" if machine.is_absent else "in memory as a whole"
        lines = [
            f"{model.name}: {len(model.blocks)} blocks of up to {model.largest.weights / 1e6:.1f} million weights "
            f"to quantize; {_gb(model.dense_bytes)} dense, {kept}; {_gb(finished_bytes(model))} quantized"
        ]
        if machine.device != "cpu":
            lines.append(_line(f"memory of {machine.device}", self.device_peak, machine.device_bytes, self.phases))
        own = self.phases if machine.device == "cpu" else {}
        lines.append(_line("memory", self.memory_peak, machine.memory_bytes, self.memory, own))
        lines.append(_line("disk for the work", sum(self.disk.values()), machine.disk_bytes, self.disk))
        if self.seconds is not None:
            total = sum(self.seconds.values())
            lines.append(f"time, an estimate from short pieces timed here: {_time(total)} ({_times(self.seconds)})")
        return lines


def plan_of(model: ModelSizes, work: Work, machine: Machine, e2e_share: float = 0.5, disk_share: float = 0.25) -> Plan:
    """Returns the plan of a run.

    Args:
        model: sizes of the model.
        work: how much there is to do.
        machine: what there is.
        e2e_share: of free memory that end-to-end fine-tuning keeps for its backward at most.
        disk_share: of free memory beyond which the full-precision stream goes to the disk.
    """
    blocks, phases = model.blocks, {}
    if work.first:
        phases["running blocks"] = max(running_bytes(block, work) for block in blocks)
        phases["Hessians"] = max(hessian_bytes(block, work) for block in blocks)
    phases["fitting layers"] = max(fitting_bytes(block, work) for block in blocks)
    if work.tunes_blocks and work.first:
        phases["block fine-tuning"] = max(tuning_bytes(block, work) for block in blocks if block.layers)
    if work.codes_embeddings:
        phases["embeddings"] = table_bytes(model)
    if work.tunes_end_to_end and work.first and model.vocabulary:
        phases[_END_TO_END] = end_to_end_bytes(model, work, machine.device_bytes, e2e_share)
    few, many = stream_bytes(model, work)
    on_disk = many > disk_share * machine.memory_bytes
    held = model.itemsize * model.outside if machine.is_absent else model.dense_bytes
    codes = sum(block.nbytes for block in blocks)
    memory = {"Python": PROCESS_BYTES, "model": held, "finished blocks": codes}
    memory["hidden states"] = few + (0 if on_disk else many)
    if machine.is_absent and machine.device != "cpu":  # on a CPU it is part of a phase
        memory["a block as it is read"] = 2 * model.itemsize * (model.largest.weights + model.largest.others)
    disk = {"finished blocks": codes, "hidden states": many if on_disk else 0}
    if work.tunes_end_to_end:
        disk["state of tuning"] = (
            3
            * 4
            * sum(
                layer.num_codebooks * layer.codebook_size * layer.in_group_size + layer.out_features
                for block in blocks
                for layer in block.layers
            )
        )
    return Plan(model, work, machine, phases, memory, {name: nbytes for name, nbytes in disk.items() if nbytes})


def _gb(nbytes: float) -> str:
    """Returns bytes in gigabytes, few of them in megabytes."""
    if nbytes < 5e7:
        return f"{nbytes / 1e6:.2f} MB"
    return f"{nbytes / 1e9:.{2 if nbytes < 1e10 else 1}f} GB"


def _line(what: str, needed: int, free: int, parts: dict[str, int], most: dict[str, int] | None = None) -> str:
    """Returns a line on one thing that is needed, what has it, and of `most` that only the largest counts."""
    told = [f"{name} {_gb(nbytes)}" for name, nbytes in parts.items() if nbytes]
    if most:
        told.append("and the largest of " + ", ".join(f"{name} {_gb(nbytes)}" for name, nbytes in most.items()))
    return f"{what}: {_gb(needed)}, {_gb(free)} are free ({', '.join(told)})"


def _times(seconds: dict[str, float]) -> str:
    return ", ".join(f"{phase} {_time(value)}" for phase, value in seconds.items() if value)


def _time(seconds: float) -> str:
    """Returns a time in a unit of which there are some."""
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
