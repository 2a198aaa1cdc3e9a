"""Several processes that work on one run, each with its share of it; in one process everything here does nothing.

`torchrun` or `accelerate launch` starts them; `together` joins them. Whatever they exchange starts with a word from
each on how it is: so none waits for one that has failed, and all end with that one's sentence.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.utils import logging as transformers_logging

from .memory import available_memory_bytes

T = TypeVar("T")

# A process that dies is noticed at once. This is for one that hangs: others may wait long for the first, which alone
# lets the model write text, measures it, and saves.
TIMEOUT = timedelta(days=1)

_group: dist.ProcessGroup | None = None


class EndedElsewhere(Exception):
    """Another process of this run has failed, and says why."""


class ProcessLost(ConnectionError):
    """Another process of this run has ended without a word."""


def rank() -> int:
    """Returns the number of this process, 0 for the first, which alone writes files."""
    return 0 if _group is None else dist.get_rank(_group)


def world_size() -> int:
    """Returns how many processes there are."""
    return 1 if _group is None else dist.get_world_size(_group)


def local_size() -> int:
    """Returns how many of them share this machine."""
    return 1 if _group is None else int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def free_memory_bytes(device: torch.device | str = "cpu") -> int:
    """Returns this process's share of the memory nothing uses, in bytes: all of its GPU's, a part of the CPU's."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory_bytes() // local_size()


@contextmanager
def together(device: str | torch.device | None = None) -> Iterator[None]:
    """Joins the processes that a launcher has started, if it has, and lets them fail together.

    All must run the same code inside. Only the first of them logs and shows progress. `leave` comes after it.

    Args:
        device: that of the config. None and "cuda" become each process's own GPU.

    Raises:
        ValueError: there are fewer GPUs than processes, or `device` is one certain GPU.
        EndedElsewhere: another process has failed.
        ProcessLost: another process was killed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    _join()
    try:
        _take_device(device)
        yield
        gather(None)  # one may fail after the last exchange
    except (EndedElsewhere, ProcessLost):
        raise
    except Exception as error:
        _exchange(None, f"{type(error).__name__}: {error}")
        raise


def leave() -> None:
    """Waits for all processes to come here, or end, and closes their connections.

    A launcher ends all as soon as one has failed and ended: whatever that one has to say must be said before.
    """
    global _group
    if _group is None:
        return
    try:
        _exchange(None, "it has ended")
    except (EndedElsewhere, ProcessLost):
        pass
    dist.destroy_process_group(_group)
    _group = None


def gather(value: T) -> list[T]:
    """Returns the values of all processes, by rank; tensors in them must be on the CPU.

    Raises:
        EndedElsewhere, ProcessLost: see `together`.
    """
    return [value] if _group is None else _exchange(value, None)


def first(function: Callable[[], T]) -> T:
    """Returns what `function` returns in the first process, the only one to call it; the others wait for it."""
    return gather(function() if rank() == 0 else None)[0]


def sum_(tensor: Tensor) -> Tensor:
    """Adds up a tensor over all processes, in place, the same bits in each; returns it."""
    if _group is not None:
        gather(None)
        dist.all_reduce(tensor, group=_group)
    return tensor


def sum_gradients_(parameters: list[Tensor], loss: float) -> float:
    """Adds up the gradients over all processes; one that no process has stays None. Returns the sum of `loss`."""
    if _group is None:
        return loss
    has = [loss, *(float(p.grad is not None) for p in parameters)]
    has = torch.tensor(has, dtype=torch.float32, device=parameters[0].device)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = sum_(torch.cat([has, *(gradient.flatten() for gradient in gradients)]))
    counts, *parts = flat.split([len(has), *(p.numel() for p in parameters)])
    loss, *found = counts.tolist()
    for parameter, part, count in zip(parameters, parts, found, strict=True):
        parameter.grad = part.view_as(parameter) if count else None
    return loss


def own(costs: dict[str, float]) -> set[str]:
    """Returns the names of the tasks that this process takes: the most expensive first, to who has least to do."""
    loads = [0.0] * world_size()
    owners = {}
    for name in sorted(costs, key=costs.get, reverse=True):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += costs[name]
    return {name for name, owner in owners.items() if owner == rank()}


def _exchange(value: Any, failure: str | None) -> list[Any]:
    """Returns the values of all processes, unless one of them has a failure; a failed one comes here to say so."""
    found = [None] * world_size()
    try:
        dist.all_gather_object(found, (value, failure), group=_group)
    except RuntimeError as error:
        raise ProcessLost(
            "Another process of this run was killed, perhaps for lack of memory; what is finished is kept, "
            "the same command again continues."
        ) from error
    for number, (_, other) in enumerate(found):
        if other is not None:
            if number == rank():
                break  # the first to fail is this process: it raises its own
            raise EndedElsewhere(f"Process {number} of {len(found)} has failed: {other}")
    return [value for value, _ in found]


def _join() -> None:
    """Connects to the other processes, over gloo for what is on the CPU and NCCL for what is on GPUs."""
    global _group
    has_gpus = torch.cuda.is_available() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if has_gpus else "gloo"
    if dist.is_initialized():  # by the program that this is part of
        _group = dist.new_group(backend=backend, timeout=TIMEOUT)
    else:
        dist.init_process_group(backend, timeout=TIMEOUT)
        _group = dist.group.WORLD
    if rank():
        logging.getLogger("crvq").setLevel(logging.CRITICAL)
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()


def _take_device(wanted: str | torch.device | None) -> None:
    """Makes this process's GPU the one that "cuda" means, if GPUs are to be used."""
    device = torch.device("cuda" if wanted is None else wanted)
    if device.index is not None:
        raise ValueError(
            f"device={str(wanted)!r} is one device for {world_size()} processes; give 'cuda' (each takes its own) "
            "or 'cpu'."
        )
    if device.type == "cuda" and torch.cuda.is_available():
        if local_size() > torch.cuda.device_count():
            raise ValueError(
                f"{local_size()} processes cannot share {torch.cuda.device_count()} GPUs; start one for each GPU, or "
                "give device='cpu'."
            )
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank())))
