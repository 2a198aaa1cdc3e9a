"""What is installed: the right files, importable from anywhere, without hiding Hugging Face's package `kernels`."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which(os.environ.get("CC") or (sysconfig.get_config_var("CC") or "cc").split()[0])
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
# Run with -E and -S: the editable install of the environment that the tests run in would be found as well. For the
# same reason the target comes first: both have a finder of the same name.
PROGRAM = """
import site, sys
site.addsitedir({target!r})
sys.path.append({packages!r})
import crvq_hf, crvq_kernels, kernels
from transformers import LlamaForCausalLM  # fails where Hugging Face's kernels is hidden
for module in (crvq_hf, crvq_kernels, kernels):
    print(module.__file__)
"""


def run(command: list[str], **options) -> str:
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what the package is built from, so that building leaves nothing in the repository."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "crvq_autoload.py"):
        shutil.copy(ROOT / name, copy)
    for name in ("crvq_hf", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run([*PIP, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)], cwd=source)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def sites(wheel, source, tmp_path_factory) -> dict[str, Path]:
    """Folders with the wheel and with an editable install."""
    found = {}
    for how, what in (("wheel", [str(wheel)]), ("editable", ["--editable", str(source)])):
        found[how] = tmp_path_factory.mktemp(how)
        options = ["--quiet", "--no-deps", "--no-build-isolation", "--target", str(found[how])]
        run([*PIP, "install", *options, *what], cwd=source)
    return found


def declared_version() -> str:
    return re.search(r'^__version__ = "(.+)"$', (ROOT / "crvq_hf/__init__.py").read_text(), re.MULTILINE).group(1)


def test_wheel_holds_all_modules_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {f"crvq_hf/{path.name}" for path in (ROOT / "crvq_hf").glob("*.py")}
    modules |= {path.relative_to(ROOT / "kernels").as_posix() for path in (ROOT / "kernels").rglob("*.py")}
    library = {"crvq_kernels/cpu/libcrvq_cpu.so"} if COMPILER else set()
    assert {name for name in names if ".dist-info/" not in name} == modules | library | {"crvq_autoload.py"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_without_a_compiler_the_wheel_has_no_library(source, tmp_path):
    """Nothing fails: PyTorch code does what the library would."""
    (source / "build").is_dir() and shutil.rmtree(source / "build")
    environment = {**os.environ, "CC": "/no/such/compiler"}
    command = [*PIP, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)]
    run(command, cwd=source, env=environment)
    (file,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(file).namelist()
    assert "crvq_kernels/cpu/binding.py" in names and not any(name.endswith(".so") for name in names)


def test_sdist_holds_the_c_files(source, tmp_path):
    """Headers too: they are no sources of the extension, which depends on them."""
    run([sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)], cwd=source)
    (file,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(file) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    c_files = {path.relative_to(source).as_posix() for path in (source / "kernels").rglob("*.[ch]")}
    assert c_files and c_files <= names


def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as opened:
        names = [name for name in opened.namelist() if ".dist-info/" in name]
        read = {name.rpartition("/")[2]: opened.read(name).decode() for name in names}
    metadata = read["METADATA"]
    assert f"Version: {declared_version()}\n" in metadata
    assert "Requires-Dist: transformers<6,>=5.17" in metadata
    assert "Requires-Python: >=3.10" in metadata
    assert "crvq = crvq_hf.commands.cli:main" in read["entry_points.txt"]
    assert "[torch.backends]\ncrvq = crvq_autoload:install" in read["entry_points.txt"]


@pytest.mark.parametrize("how", ["wheel", "editable"])
def test_import_in_the_repository_root(how, sites, source):
    """The root, where a folder `kernels` lies in the way, is the first place Python looks in."""
    packages = sysconfig.get_paths()["purelib"]
    program = PROGRAM.format(packages=packages, target=str(sites[how]))
    printed = run([sys.executable, "-E", "-S", "-c", program], cwd=source).splitlines()
    crvq_hf, crvq_kernels, kernels = map(Path, printed)
    assert crvq_hf == source / "crvq_hf/__init__.py"
    installed = sites["wheel"] / "crvq_kernels" if how == "wheel" else source / "kernels/crvq_kernels"
    assert crvq_kernels == installed / "__init__.py"
    assert kernels.is_relative_to(packages)
