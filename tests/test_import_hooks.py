"""Functions that are called when a module has been imported, whatever else the import system does."""

import importlib
import importlib.util
import sys
import threading
import zipfile

import pytest

import crvq_import_hooks
from crvq_import_hooks import when_imported

NAME = "imported_late"
FINDER = crvq_import_hooks._Finder


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Hooks that nobody has used, and an import system that is put back afterwards."""
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if finder is not FINDER])
    monkeypatch.setattr(crvq_import_hooks, "_waiting", {})


@pytest.fixture
def module(tmp_path, monkeypatch):
    """File of a module that can be imported, and was not."""
    file = tmp_path / f"{NAME}.py"
    file.write_text("value = 1; loader_inside = __loader__")
    monkeypatch.syspath_prepend(tmp_path)
    yield file
    sys.modules.pop(NAME, None)


@pytest.fixture
def seen(module):
    """Grows by the value in the module whenever it has been executed."""
    values = []

    def call():
        values.append(sys.modules[NAME].value)

    for _ in range(2):  # asked for twice, called once
        when_imported(NAME, call)
    assert values == [] and NAME not in sys.modules
    return values


def test_it_is_called_after_the_import(seen):
    imported = importlib.import_module(NAME)
    assert seen == [1]
    when_imported(NAME, lambda: seen.append("at once"))
    assert seen == [1, "at once"]
    assert sys.meta_path.count(FINDER) == 1
    # The module looks as it would without us, from inside too.
    assert imported.__spec__.origin == imported.__file__
    assert imported.__spec__.loader is imported.__loader__ is imported.loader_inside
    assert type(imported.__loader__) is importlib.machinery.SourceFileLoader


def test_it_is_called_after_a_reload(seen):
    imported = importlib.import_module(NAME)
    importlib.reload(imported)
    del sys.modules[NAME]
    importlib.import_module(NAME)
    assert seen == [1, 1, 1]


def test_a_failing_import_can_be_repeated(seen, module):
    text = module.read_text()
    module.write_text("raise RuntimeError('not yet')")
    with pytest.raises(RuntimeError, match="not yet"):
        importlib.import_module(NAME)
    assert seen == []
    module.write_text(text)
    importlib.import_module(NAME)
    assert seen == [1]


def test_looking_for_it_is_no_import(seen, module):
    spec = importlib.util.find_spec(NAME)
    assert spec.loader.get_filename(NAME) == str(module) and spec.loader.get_source(NAME) == module.read_text()
    assert seen == [] and NAME not in sys.modules


def test_another_thread_is_waited_for(module, monkeypatch):
    begun, end = threading.Event(), threading.Event()
    monkeypatch.setattr(threading, "events", (begun, end), raising=False)
    module.write_text("import threading; begun, end = threading.events; begun.set(); end.wait(60); value = 1")
    seen = []
    importer = threading.Thread(target=importlib.import_module, args=(NAME,))
    waiter = threading.Thread(target=when_imported, args=(NAME, lambda: seen.append(sys.modules[NAME].value)))
    importer.start()
    assert begun.wait(60)
    waiter.start()
    waiter.join(0.2)
    assert waiter.is_alive() and seen == []
    end.set()
    importer.join(60)
    waiter.join(60)
    assert seen == [1]


def test_other_finders(seen, module):
    """One that comes later, before ours or behind it, and one of the kind that asks all others."""

    class Nosy:
        asking = False

        def find_spec(self, name, path=None, target=None):
            if self.asking:
                return None
            self.asking = True
            try:
                return importlib.util.find_spec(name)
            finally:
                self.asking = False

    for place in (0, len(sys.meta_path)):
        sys.meta_path.insert(place, Nosy())
    sys.meta_path.append(object())  # knows no find_spec
    importlib.import_module(NAME)
    assert set(seen) == {1}


def test_a_module_in_an_archive(tmp_path, monkeypatch):
    """All modules of an archive have the same loader."""
    with zipfile.ZipFile(tmp_path / "modules.zip", "w") as archive:
        archive.writestr(f"{NAME}.py", "import its_neighbour\nvalue = 1")
        archive.writestr("its_neighbour.py", "")
    monkeypatch.syspath_prepend(tmp_path / "modules.zip")
    seen = []
    when_imported(NAME, lambda: seen.append(sys.modules[NAME].value))
    try:
        importlib.import_module(NAME)
        assert seen == [1]
    finally:
        for name in (NAME, "its_neighbour"):
            sys.modules.pop(name, None)


def test_loaders_of_the_old_kind_are_left_alone():
    """They have no `exec_module`: what is not seen is imported all the same."""

    class Old:
        def find_spec(self, name, path=None, target=None):
            return importlib.machinery.ModuleSpec(name, self)

    when_imported(NAME, lambda: None)
    sys.meta_path.insert(1, Old())
    assert type(FINDER.find_spec(NAME).loader) is Old


def test_a_module_that_is_not_there_stays_so():
    when_imported("there_is_no_such_module", lambda: None)
    assert importlib.util.find_spec("there_is_no_such_module") is None
    with pytest.raises(ModuleNotFoundError, match="there_is_no_such_module"):
        importlib.import_module("there_is_no_such_module")


def test_a_module_that_is_blocked_stays_so(seen, monkeypatch):
    monkeypatch.setitem(sys.modules, NAME, None)
    when_imported(NAME, lambda: seen.append("called"))
    with pytest.raises(ModuleNotFoundError, match=NAME):
        importlib.import_module(NAME)
    assert seen == []


def test_what_a_function_raises_the_import_raises(module):
    def fail():
        raise ValueError("on purpose")

    when_imported(NAME, fail)
    with pytest.raises(ValueError, match="on purpose"):
        importlib.import_module(NAME)
    assert NAME not in sys.modules
