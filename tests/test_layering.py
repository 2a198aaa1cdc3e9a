"""The rooms of the house and the direction of its arrows: a file may import only files that come before it."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"crvq_kernels": ROOT / "kernels/crvq_kernels", "crvq_hf": ROOT / "crvq_hf"}

# In each package, every file, from the ground up; a folder stands for its `__init__`.
ORDER = {
    "crvq_kernels": [
        "packing",
        "reference",
        "portable",
        "cpu.binding",
        "cpu",
        "gpu",
        "gpu.tuning",
        "gpu.decode",
        "gpu.gemv",
        "gpu.gemm",
        "gpu.dequant",
        "gpu.reorder",
        "ops",
        "__init__",
    ],
    "crvq_hf": [
        "hessian",
        "importance",
        "codebook",
        "search",
        "quantize",
        "device",
        "distributed",
        "quantized_weight",
        "linear",
        "config",
        "budget",
        "blocks",
        "experts",
        "replace",
        "block_state",
        "embedding",
        "checkpoint",
        "calibration",
        "finetune",
        "workfolder",
        "streams",
        "fingerprint",
        "end_to_end",
        "run",
        "quantize_block",
        "pipeline",
        "info",
        "breakdown",
        "figures",
        "report",
        "card",
        "hub",
        "quantizer",
        "adapters",
        "evaluate",
        "harness",
        "gguf_model",
        "convert",
        "verify",
        "measure",
        "doctor",
        "demo",
        "serve",
        "cli",
        "__init__",
        "__main__",
    ],
}
ALGORITHM = ["hessian", "importance", "codebook", "search", "quantize"]
# Packages from outside that a file may import beside the standard library.
KERNEL_PACKAGES = {"torch", "triton"}
ALGORITHM_PACKAGES = {"torch"}


def file_of(package: str, room: str) -> Path:
    path = FOLDERS[package] / room.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imported(source: str, folder: str) -> list[str]:
    """Returns the dotted names of all that a file imports, also inside functions, relative imports made absolute.

    Args:
        source: text of the file.
        folder: the package that it is in.
    """
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = folder.split(".")[: folder.count(".") + 2 - node.level] if node.level else []
            assert above or not node.level, "a relative import that leaves its package"
            base = ".".join([*above, *filter(None, [node.module])])
            names += [f"{base}.{alias.name}" for alias in node.names]
    return names


def violations(source: str, package: str, room: str) -> list[str]:
    """Returns what a file imports against the rules."""
    wrong = []
    before = set(ORDER[package][: ORDER[package].index(room)])
    path = file_of(package, room).parent.relative_to(FOLDERS[package])
    for name in imported(source, ".".join([package, *path.parts])):
        top, *rest = name.split(".")
        if top == package:
            # What is no room is a name out of one: the longest beginning that is one, or `__init__` itself.
            beginnings = [".".join(rest[:length]) for length in range(len(rest), 0, -1)]
            allowed = next((part for part in beginnings if part in ORDER[package]), "__init__") in before
        elif top == "crvq_kernels":
            allowed = True
        elif top in sys.stdlib_module_names:
            allowed = True
        elif package == "crvq_kernels":
            allowed = top in KERNEL_PACKAGES
        elif room in ALGORITHM:
            allowed = top in ALGORITHM_PACKAGES
        else:
            allowed = top != "crvq_hf"
        if not allowed:
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("package", FOLDERS)
def test_every_file_has_its_place(package):
    assert sorted(FOLDERS[package].rglob("*.py")) == sorted(file_of(package, room) for room in ORDER[package])


@pytest.mark.parametrize(("package", "room"), [(package, room) for package in ORDER for room in ORDER[package]])
def test_arrows_point_down(package, room):
    source = file_of(package, room).read_text(encoding="utf-8")
    assert violations(source, package, room) == []


@pytest.mark.parametrize(
    ("package", "room", "source"),
    [
        ("crvq_kernels", "packing", "import crvq_hf"),
        ("crvq_kernels", "packing", "from .ops import linear"),
        ("crvq_kernels", "ops", "import transformers.utils"),
        ("crvq_kernels", "cpu.binding", "from ..gpu.tuning import kernel_for"),
        ("crvq_kernels", "cpu.binding", "from . import library"),
        ("crvq_kernels", "gpu.decode", "from .. import ops"),
        ("crvq_kernels", "portable", "import crvq_kernels.cpu.binding"),
        ("crvq_hf", "search", "def f():\n    from transformers import AutoModel"),
        ("crvq_hf", "hessian", "from . import search"),
        ("crvq_hf", "config", "from crvq_hf import checkpoint"),
        ("crvq_hf", "config", "from crvq_hf.pipeline import quantize_blocks_"),
        ("crvq_hf", "pipeline", "from . import quantize_model"),
        ("crvq_hf", "linear", "import crvq_hf.replace as r"),
    ],
)
def test_a_wrong_arrow_is_seen(package, room, source):
    assert len(violations(source, package, room)) == 1


def test_kernels_is_no_package():
    assert not (ROOT / "kernels/__init__.py").exists(), "it would hide Hugging Face's package `kernels`"
