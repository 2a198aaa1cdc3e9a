"""The house has rooms and its arrows point down: a room imports only from rooms below it, and no files in a circle."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"crvq_kernels": ROOT / "kernels/crvq_kernels", "crvq_hf": ROOT / "crvq_hf"}
# From the ground up: what lies directly in a package, a folder or a file, is a room.
ROOMS = {
    "crvq_kernels": [
        "packing",
        "reference",
        "portable",
        "cpu",
        "gpu",
        "hopper",
        "code_search",
        "ops",
        "rows",
        "__init__",
    ],
    "crvq_hf": [
        "algorithm",
        "quantized_weight",
        "dataset",
        "naming",
        "config",
        "blocks",
        "modeling",
        "adapters",
        "resources",
        "tuning",
        "checkpoint",
        "selection",
        "planning",
        "calibration",
        "pipeline",
        "generation",
        "evaluation",
        "sharing",
        "quantizer",
        "vllm",
        "commands",
        "moved",
        "__init__",
        "__main__",
    ],
}
# Packages that all of a room may import beside the standard library and the rooms below; elsewhere any may be.
OUTSIDE = {"crvq_kernels": {"torch", "triton"}, "crvq_hf.algorithm": {"torch"}}
MOST_LINES_OF_A_ROOM, MOST_LINES_OF_A_FILE = 2000, 400


def module_name(file: Path, package: str) -> str:
    """Returns the dotted name of a file of `package`, a folder's `__init__` named as such."""
    return ".".join([package, *file.relative_to(PACKAGES[package]).with_suffix("").parts])


def room_of(module: str) -> str:
    """Returns the room of a dotted name; what is no room, as a name out of `__init__`, is in `__init__` itself."""
    package, _, rest = module.partition(".")
    room = rest.partition(".")[0]
    return room if room in ROOMS[package] else "__init__"


def imported(source: str, module: str) -> list[str]:
    """Returns the dotted names of all that a file imports, also inside functions, relative imports made absolute.

    Args:
        source: text of the file.
        module: its dotted name.
    """
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names += [f"{base}.{alias.name}" for alias in node.names]
    return names


def wrong_arrows(source: str, module: str) -> list[str]:
    """Returns what a file imports against the rules."""
    package, room = module.partition(".")[0], room_of(module)
    reachable = ROOMS[package][: ROOMS[package].index(room) + 1]
    outside = OUTSIDE.get(f"{package}.{room}", OUTSIDE.get(package))
    wrong = []
    for name in imported(source, module):
        top = name.partition(".")[0]
        if top == package:
            allowed = room_of(name) in reachable
        elif top in PACKAGES:
            allowed = top == "crvq_kernels"
        else:
            allowed = outside is None or top in outside or top in sys.stdlib_module_names
        if not allowed:
            wrong.append(name)
    return wrong


def circle(sources: dict[str, str]) -> list[str]:
    """Returns the dotted names along a circle of imports, none if there is none.

    Args:
        sources: text by dotted name of every file of a package.
    """
    graph = {
        module: {
            file for name in imported(source, module) for file in (name, name.rpartition(".")[0]) if file in sources
        }
        for module, source in sources.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def sources_of(package: str) -> dict[str, str]:
    files = PACKAGES[package].rglob("*.py")
    return {module_name(file, package): file.read_text(encoding="utf-8") for file in files}


SOURCES = {package: sources_of(package) for package in PACKAGES}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_room_has_its_place(package):
    assert {room_of(module) for module in SOURCES[package]} == set(ROOMS[package])
    in_init = [module for module in SOURCES[package] if room_of(module) == "__init__"]
    assert in_init == [f"{package}.__init__"], "a file or folder that is not in ROOMS"


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows_point_down(package):
    wrong = {module: wrong_arrows(source, module) for module, source in SOURCES[package].items()}
    assert {module: names for module, names in wrong.items() if names} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circles(package):
    assert circle(SOURCES[package]) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_and_files_stay_small(package):
    lines = {module: len(source.splitlines()) for module, source in SOURCES[package].items()}
    assert {module: count for module, count in lines.items() if count > MOST_LINES_OF_A_FILE} == {}
    for room in ROOMS[package]:
        assert sum(n for module, n in lines.items() if room_of(module) == room) <= MOST_LINES_OF_A_ROOM


@pytest.mark.parametrize("package", PACKAGES)
def test_every_room_says_what_it_is_for(package):
    for module, source in SOURCES[package].items():
        assert ast.get_docstring(ast.parse(source)), f"{module} has no docstring"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("crvq_kernels.packing", "import crvq_hf"),
        ("crvq_kernels.packing", "from .ops import linear"),
        ("crvq_kernels.ops", "import transformers.utils"),
        ("crvq_hf.algorithm.search", "def f():\n    from transformers import AutoModel"),
        ("crvq_hf.algorithm.hessian", "from ..config import CRVQConfig"),
        ("crvq_hf.config", "from crvq_hf import checkpoint"),
        ("crvq_hf.config", "from crvq_hf.pipeline.block_loop import quantize_blocks_"),
        ("crvq_hf.pipeline.block_loop", "from .. import quantize_model"),
        ("crvq_hf.pipeline.block_loop", "from ..commands import cli"),
        ("crvq_hf.modeling.linear", "import crvq_hf.pipeline.run as r"),
        ("crvq_hf.quantizer", "from .commands.cli import main"),
    ],
)
def test_a_wrong_arrow_is_seen(module, source):
    assert len(wrong_arrows(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("crvq_hf.algorithm.hessian", "from . import fit"),
        ("crvq_hf.algorithm.codebook", "from .search import assemble"),
        ("crvq_hf.modeling.linear", "def f():\n    import crvq_hf.modeling.replace"),
    ],
)
def test_a_circle_is_seen(module, source):
    sources = SOURCES["crvq_hf"]
    assert wrong_arrows(source, module) == [], "it is inside of a room"
    found = circle({**sources, module: f"{sources[module]}\n{source}\n"})
    assert module in found


def test_kernels_is_no_package():
    assert not (ROOT / "kernels/__init__.py").exists(), "it would hide Hugging Face's package `kernels`"
