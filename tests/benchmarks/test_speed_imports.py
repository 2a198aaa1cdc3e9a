"""benchmarks/speed/imports.py: each turn sees the package, or does not, as it should."""

import pytest

from benchmarks.speed.imports import milliseconds


@pytest.fixture
def folders(tmp_path):
    """Folders of the other packages and of ours, which a start of Python reads."""
    for name in ("others", "ours"):
        (tmp_path / name).mkdir()
    for module in ("crvq_autoload", "crvq_hf"):
        (tmp_path / "ours" / f"{module}.py").touch()
    (tmp_path / "ours/crvq.pth").write_text("import crvq_autoload\n")
    return tmp_path / "others", tmp_path / "ours"


def test_turns(folders):
    others, ours = folders
    for installed in ([], [ours]):
        wall, cpu = milliseconds("import json.tool", others, installed)
        assert wall > 0 and cpu >= 0


@pytest.mark.parametrize(
    ("statement", "installed"), [("pass", "others"), ("import crvq_hf", "ours")], ids=("not loaded", "used")
)
def test_a_turn_that_sees_something_else(folders, statement, installed):
    with pytest.raises(RuntimeError, match="crvq_autoload is loaded: (True|False), crvq_hf is: (True|False)"):
        milliseconds(statement, folders[0], [folders[0].parent / installed])
