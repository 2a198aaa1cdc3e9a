"""What is installed: the right files, importable from anywhere, without hiding Hugging Face's package `kernels`."""

import os
import re
import shutil
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from crvq_kernels.cpu.binding import INSTRUCTIONS
from environments import FILES, FOLDERS, MODULES, NO_COMPILER, ROOT, build_wheel

COMPILER = shutil.which(os.environ.get("CC") or (sysconfig.get_config_var("CC") or "cc").split()[0])
PROGRAM = """
import crvq_hf, crvq_kernels, kernels
from transformers import LlamaForCausalLM  # fails where Hugging Face's kernels is hidden
for module in (crvq_hf, crvq_kernels, kernels):
    print(module.__file__)
"""


def files(*folders: str, suffixes: tuple[str, ...]) -> set[str]:
    """Returns the paths of all files in `folders` of the repository that end so."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in suffixes)
    return {path.relative_to(ROOT).as_posix() for path in found}


def declared_version() -> str:
    return re.search(r'^__version__ = "(.+)"$', (ROOT / "crvq_hf/__init__.py").read_text(), re.MULTILINE).group(1)


def test_sdist_holds_all_that_a_wheel_is_built_from(sdist):
    with tarfile.open(sdist) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    c_files = files(*FOLDERS, suffixes=(".c", ".h", ".cu"))  # headers too: they are no sources of the extension
    assert c_files and c_files | files(*FOLDERS, suffixes=(".py",)) | {*MODULES} | {*FILES} <= names
    assert not [name for name in names if name.startswith("tests/")]  # some of them would be of no use


def test_wheel_holds_all_modules_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    libraries = {name for name in names if name.endswith(".so")}
    modules = {name.removeprefix("kernels/") for name in files(*FOLDERS, suffixes=(".py", ".cu"))}
    assert names - libraries == modules | {*MODULES}
    assert [Path(name).name for name in libraries] == ["libcrvq_cpu.so"] * bool(COMPILER)


def test_without_a_compiler_the_wheel_has_no_library(sdist, tmp_path):
    """Nothing fails: PyTorch code does what the library would. The wheel suits all platforms then, and says so."""
    wheel = build_wheel(sdist, tmp_path, **NO_COMPILER)
    names = zipfile.ZipFile(wheel).namelist()
    assert "crvq_kernels/ops.py" in names and not any(name.endswith(".so") for name in names)
    assert wheel.name.endswith("-py3-none-any.whl")


def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as opened:
        names = [name for name in opened.namelist() if ".dist-info/" in name]
        read = {name.rpartition("/")[2]: opened.read(name).decode() for name in names}
    metadata = read["METADATA"]
    assert f"Version: {declared_version()}\n" in metadata
    assert "Requires-Dist: transformers<6,>=5.17" in metadata
    assert "Requires-Python: >=3.10" in metadata
    plugin = "[vllm.general_plugins]\ncrvq = crvq_hf.vllm:register\n"
    assert read["entry_points.txt"] == f"[console_scripts]\ncrvq = crvq_hf.commands.cli:main\n\n{plugin}"
    assert any(name.endswith("licenses/LICENSE") for name in names)
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_") if COMPILER else "any"
    assert f"Tag: py3-none-{platform}\n" in read["WHEEL"]


@pytest.mark.skipif(COMPILER is None, reason="there was no compiler to build the kernel with")
def test_the_wheel_needs_no_compiler(installed):
    done = installed.run(installed.folder / "bin/crvq", "doctor", PATH=str(installed.folder / "bin"))
    assert done.returncode == 0, done.stdout
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("cpu kernel"))
    assert line.split()[2].rstrip(":") in INSTRUCTIONS, line


def test_uninstalling_leaves_nothing(installed, tmp_path):
    environment = installed.copy(tmp_path / "environment")
    assert list(environment.site.glob("crvq*"))
    environment.pip("uninstall", "--quiet", "--yes", "crvq-hf")
    assert not list(environment.site.glob("crvq*")) and not (environment.folder / "bin/crvq").exists()


@pytest.mark.parametrize("how", ["wheel", "editable"])
def test_import_in_the_repository_root(how, installed, editable):
    """The root, where a folder `kernels` lies in the way, is the first place Python looks in."""
    environment, source = editable
    done = (installed if how == "wheel" else environment).run("-c", PROGRAM, cwd=source)
    assert done.returncode == 0, done.stdout
    crvq_hf, crvq_kernels, kernels = map(Path, done.stdout.splitlines())
    assert crvq_hf == source / "crvq_hf/__init__.py"
    where = installed.site if how == "wheel" else source / "kernels"
    assert crvq_kernels == where / "crvq_kernels/__init__.py"
    assert kernels.is_relative_to(sysconfig.get_paths()["purelib"])
