"""Where to compute, in which precision, and how much memory it took."""

import sys
from contextlib import AbstractContextManager, nullcontext

import psutil
import torch
from crvq_kernels import multiplies_bfloat16


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


def has_fast_bfloat16(device_type: str) -> bool:
    """Returns whether this device computes products of bfloat16, in hardware."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device_type == "cpu" and multiplies_bfloat16()


def mixed_precision(device: torch.device, bfloat16: bool) -> AbstractContextManager:
    """Returns the context for running and training blocks: bfloat16 products over fp32 weights, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if bfloat16 else nullcontext()


def peak_memory_bytes() -> int:
    """Returns the most resident memory this process has held, in bytes."""
    try:
        import resource
    except ImportError:  # Windows, which keeps count itself
        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
