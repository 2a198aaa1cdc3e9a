"""CRVQ for transformers: importing this package registers the quantization method "crvq".

Nobody needs to where Python reads the .pth file beside this package, see `crvq_autoload`. The algorithm itself is
loaded when a model is quantized.

From the ground up: `algorithm` fits one layer, `quantized_weight` is what is stored of it, `config` has every knob,
`dataset` what names calibration data, of which `calibration` makes tokens.
`modeling` are the layers of a quantized model, `resources` and `tuning` what `pipeline` needs to quantize a whole one,
`planning` what that will take.
`checkpoint` reads files, `generation` writes tokens, `evaluation` measures, `sharing` tells others. `quantizer`
connects all that to transformers, `vllm` to vLLM, and `commands` to the command line. Imports go from the later to the
earlier, which tests/test_layering.py checks.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

from crvq_import_hooks import when_imported

from .adapters.peft import WRAPPED, wrap_peft
from .config import CRVQConfig
from .moved import alias_moved_modules
from .quantizer import register

__version__ = "0.2.0"
__all__ = [
    "CRVQConfig",
    "CRVQLinear",
    "QuantizedWeight",
    "decode",
    "plan",
    "quantize_model",
    "together",
    "write_report",
]

_LAZY = {
    "CRVQLinear": "crvq_hf.modeling.linear",
    "QuantizedWeight": "crvq_hf.quantized_weight",
    "decode": "crvq_hf.generation.loop",
    "plan": "crvq_hf.pipeline.plan",
    "quantize_model": "crvq_hf.pipeline.quantize_model",
    "together": "crvq_hf.resources.distributed",
    "write_report": "crvq_hf.sharing.report",
}

register()
for _name in WRAPPED:
    when_imported(_name, partial(wrap_peft, _name))
alias_moved_modules()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
