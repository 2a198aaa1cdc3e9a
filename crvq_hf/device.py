"""Where to compute, in which precision, and how much memory it took."""

import resource
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch


def compute_device(wanted: str | torch.device | None) -> torch.device:
    """Returns the device to compute on: the one named, else CUDA where there is one, else the CPU.

    Raises:
        ValueError: a CUDA device is named where there is none.
    """
    if wanted is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={str(wanted)!r} was asked for, but torch sees no CUDA device; use device='cpu'.")
    return device


@cache
def has_fast_bfloat16(device_type: str) -> bool:
    """Whether bfloat16 matrix products pay on this device; on a CPU that is measured once, since machines differ."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu":
        return False
    single = torch.ones(512, 1024)  # no random numbers: runs must not depend on whether this has been asked
    half = single.bfloat16()
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    for _ in range(5):
        for x in (single, half):
            start = time.perf_counter()
            for _ in range(4):
                x @ x.T
            best[x.dtype] = min(best[x.dtype], time.perf_counter() - start)
    return best[torch.float32] > 1.5 * best[torch.bfloat16]


def mixed_precision(device: torch.device, bfloat16: bool) -> AbstractContextManager:
    """Returns the context for running and training blocks: bfloat16 products over fp32 weights, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if bfloat16 else nullcontext()


def peak_memory_bytes() -> int:
    """Returns the most resident memory this process has held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
