"""Lets transformers load CRVQ checkpoints that nobody imported `crvq_hf` for.

PyTorch calls `install` at the end of `import torch`: the entry point group "torch.backends", meant for device
backends, is the one place that every program with a model passes. PyTorch is half imported then, and most programs
never meet a CRVQ model. So this file imports nothing but the standard library, and `crvq_hf` is imported when a
checkpoint asks for it. It lies outside of `crvq_hf`, whose `__init__` imports transformers.

CRVQ_AUTOLOAD=0 in the environment switches it off; TORCH_DEVICE_BACKEND_AUTOLOAD=0 does so for all such packages.
"""

import os
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder

QUANT_METHOD = "crvq"
REGISTRY = "transformers.quantizers.auto"
# Whatever builds a model imports it; needed where the registry is what imported torch first and so cannot be watched.
MODELS = "transformers.modeling_utils"

_waiting: dict[str, list[Callable[[], None]]] = {}


def install() -> None:
    """Makes transformers know "crvq" as soon as it has its registry of quantization methods; never raises."""
    if os.environ.get("CRVQ_AUTOLOAD", "1") != "0":
        when_imported(REGISTRY, announce)
        when_imported(MODELS, announce)


def when_imported(name: str, call: Callable[[], None]) -> None:
    """Calls `call` as soon as the module `name` has been executed, at once if it is there; does not import it."""
    if name in sys.modules:
        call()
        return
    if call not in _waiting.setdefault(name, []):
        _waiting[name].append(call)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())  # for good: taking it out could make another thread's import miss a finder


def announce() -> None:
    """Puts `_Config` into transformers' registry, unless that is not there yet or has an entry."""
    known = getattr(sys.modules.get(REGISTRY), "AUTO_QUANTIZATION_CONFIG_MAPPING", None)
    if isinstance(known, dict):
        known.setdefault(QUANT_METHOD, _Config)


class _Config:
    """Stands in for `CRVQConfig` until a checkpoint asks for it: `import crvq_hf` registers the real classes."""

    @staticmethod
    def from_dict(config_dict, **kwargs):
        import crvq_hf

        return crvq_hf.CRVQConfig.from_dict(config_dict, **kwargs)


class _Finder(MetaPathFinder):
    """Finds the modules that are waited for as the other finders do, and makes them tell when they were executed."""

    def find_spec(self, name, path=None, target=None):
        if name not in _waiting:
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                for call in _waiting.pop(name, []):
                    call()

            spec.loader.exec_module = exec_module
        return spec
