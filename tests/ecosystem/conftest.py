"""A tiny CRVQ checkpoint with a chat template, and the package installed in a folder, as users have it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from made import make_quantized
from tiny import tiny_model, tiny_tokenizer

from crvq_hf import CRVQConfig, quantize_model

ROOT = Path(__file__).parents[2]
# Run with -E and -S: an install of the environment that the tests run in must not be found instead.
PACKAGES = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """Folder of a quantized Llama of two layers; tests must not change it."""
    folder = tmp_path_factory.mktemp("ecosystem") / "tiny-crvq"
    fields = {"nbits_per_codebook": 4, "block_finetune_epochs": 0, "e2e_finetune_epochs": 0}
    config = CRVQConfig(dataset=None, work_dir=tmp_path_factory.mktemp("work"), **fields)
    quantize_model(tiny_model(), config=config).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def installed(tmp_path_factory) -> Path:
    """Folder with what `pip install` makes of this repository, built without the CPU kernel, which takes time."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "crvq_autoload.py"):
        shutil.copy(ROOT / name, source)
    for name in ("crvq_hf", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-build-isolation", "--target", str(site), str(source)]
    done = subprocess.run(command, env={**os.environ, "CC": "/no/such/compiler"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return site


@pytest.fixture(scope="session")
def preamble():
    """Returns a function (folder of an install) -> Python lines that put it before the environment's packages."""
    return lambda site: f"import sys\nsys.path[:0] = [{str(site)!r}]\nsys.path += {PACKAGES!r}\n"


@pytest.fixture
def run_installed(preamble, tmp_path):
    """Returns a function (folder of an install, code, **environment) -> finished process, output in its `stdout`."""

    def run(site: Path, code: str, **environment: str) -> subprocess.CompletedProcess:
        file = tmp_path / "program.py"
        file.write_text(preamble(site) + code)
        return subprocess.run(
            [sys.executable, "-E", "-S", file],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=250,
        )

    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of a dense and of its quantized model; tests must not change them."""
    return make_quantized(tmp_path_factory.mktemp("made"))


@pytest.fixture
def out(made, tmp_path):
    """A copy of the quantized model that a test may change."""
    return shutil.copytree(made[1], tmp_path / "out")
