"""Lets transformers load CRVQ checkpoints that nobody imported `crvq_hf` for.

`crvq_autoload.pth`, installed beside this file, calls `install` at every start of Python, before anything of PyTorch.
Most programs never meet a CRVQ model. So nothing is imported here that Python has not loaded by then, and `crvq_hf` is
imported when a checkpoint asks for it.

Python reads .pth files in the folders of its environment only. Where packages lie in another folder (`pip install
--target` and PYTHONPATH), a program has to `import crvq_hf`. CRVQ_AUTOLOAD=0 in the environment does the same.
"""

import os
import sys

from crvq_import_hooks import when_imported

QUANT_METHOD = "crvq"
REGISTRY = "transformers.quantizers.auto"


def install() -> None:
    """Makes transformers know "crvq" as soon as it has its registry of quantization methods; never raises."""
    if os.environ.get("CRVQ_AUTOLOAD", "1") != "0":
        when_imported(REGISTRY, announce)


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
