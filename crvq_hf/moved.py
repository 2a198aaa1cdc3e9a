"""Modules that version 0.1 had at other places: models pickled with it name them, and its README named two.

An alias looks its names up where they are now, when they are asked for.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

MOVED = {
    "crvq_hf.distributed": "crvq_hf.resources.distributed",
    "crvq_hf.embedding": "crvq_hf.modeling.embedding",
    "crvq_hf.experts": "crvq_hf.modeling.experts",
    "crvq_hf.linear": "crvq_hf.modeling.linear",
    "crvq_hf.report": "crvq_hf.sharing.report",
}


class _Alias(ModuleType):
    """Stands for the module at `MOVED[name]`, which is imported at the first use."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # tools that look at every module would import them all
            raise AttributeError(name)
        return getattr(import_module(MOVED[self.__name__]), name)


def alias_moved_modules() -> None:
    """Makes the old names importable."""
    package = sys.modules[__package__]
    for name in MOVED:
        alias = sys.modules.setdefault(name, _Alias(name))
        setattr(package, name.rpartition(".")[2], alias)
