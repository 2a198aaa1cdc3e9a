"""CRVQ for transformers: importing this package registers the quantization method "crvq".

Where it is installed nobody needs to, see `crvq_autoload`. The algorithm itself is loaded when a model is quantized.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from crvq_autoload import when_imported

from .adapters import PEFT_TUNERS, refuse_merging
from .config import CRVQConfig
from .quantizer import register

__version__ = "0.1.0"
__all__ = ["CRVQConfig", "CRVQLinear", "QuantizedWeight", "quantize_model"]

_LAZY = {
    "CRVQLinear": "crvq_hf.linear",
    "QuantizedWeight": "crvq_hf.quantized_weight",
    "quantize_model": "crvq_hf.quantizer",
}

register()
when_imported(PEFT_TUNERS, refuse_merging)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
