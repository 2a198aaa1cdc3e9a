"""Calls functions once a module has been imported, without importing it.

`crvq_autoload` imports this at every start of Python. So it imports nothing, and it lies outside of `crvq_hf`, whose
`__init__` imports transformers.
"""

import sys

_waiting = {}  # name of a module: functions to call


def when_imported(name: str, call) -> None:
    """Calls `call()` each time the module `name` has been executed, and at once if it has been; does not import it.

    Not seen are a module that a program makes from a file by itself, and one found by a finder before ours.

    Args:
        name: dotted name of the module.
        call: function without arguments that bears to be called again; what it raises, the import raises.
    """
    calls = _waiting.setdefault(name, [])
    if call not in calls:
        calls.append(call)
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)  # for good: taking it out could make another thread's import miss a finder
    if sys.modules.get(name) is not None:
        from importlib import import_module

        import_module(name)  # waits for another thread that may be executing it
        call()


class _Finder:
    """Finds the modules that are waited for as the finders behind it do, and has them tell that they were executed."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name not in _waiting:
            return None
        behind = sys.meta_path[sys.meta_path.index(cls) + 1 :]  # those before it were asked already
        finders = [finder for finder in behind if finder is not cls and hasattr(finder, "find_spec")]
        spec = next((spec for finder in finders if (spec := finder.find_spec(name, path, target)) is not None), None)
        if hasattr(getattr(spec, "loader", None), "exec_module"):
            spec.loader = _Loader(spec)
        return spec


class _Loader:
    """Stands in for the loader of `spec` until that executes the module, then calls what waits for it."""

    def __init__(self, spec):
        self.spec, self.loader = spec, spec.loader

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def exec_module(self, module):
        module.__loader__ = self.spec.loader = self.loader
        self.loader.exec_module(module)
        for call in list(_waiting[self.spec.name]):
            call()
