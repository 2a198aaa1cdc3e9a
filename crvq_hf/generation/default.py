"""Where the decode loop is used without being asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel

from .loop import decode

# Devices on which it was measured to be faster, by compute capability: an H100. Nothing unmeasured is a default.
# On a CPU it is slower than `generate`: no device to wait for, and attention to the room for tokens still to come.
FASTER_ON: frozenset[tuple[str, tuple[int, int] | None]] = frozenset({("cuda", (9, 0))})
# What `generate` does not hand on to a function of ours.
NOT_HANDED_ON = ("assistant_model", "assistant_tokenizer", "synced_gpus", "custom_generate")


def is_default(device: torch.device) -> bool:
    """Returns whether `crvq generate` and `crvq serve` write tokens by `loop.decode` on `device`."""
    has_capability = device.type == "cuda" and torch.version.hip is None
    return (device.type, torch.cuda.get_device_capability(device) if has_capability else None) in FASTER_ON


def generate(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Does what `model.generate` does, by the decode loop where that is the default; a streamer is served too."""
    return model.generate(*args, **_with_decode(model, kwargs))


@contextmanager
def used_by_generate() -> Iterator[None]:
    """Has `model.generate` of all models be `generate`, for programs that call it themselves."""
    original = GenerationMixin.generate

    @wraps(original)
    def replaced(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        return original(model, *args, **_with_decode(model, kwargs))

    GenerationMixin.generate = replaced
    try:
        yield
    finally:
        GenerationMixin.generate = original


def _with_decode(model: PreTrainedModel, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns arguments of `generate` with the loop among them, or as they are if it is not to be used."""
    configs = (kwargs.get("generation_config"), model.generation_config)
    by_text = kwargs.get("stop_strings") or any(getattr(config, "stop_strings", None) for config in configs)
    if not is_default(model.device) or by_text or any(kwargs.get(name) is not None for name in NOT_HANDED_ON):
        return kwargs
    return kwargs | {"custom_generate": partial(decode, streamer=kwargs.get("streamer"))}
