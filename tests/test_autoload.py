"""Loading without `import crvq_hf`, and that nothing else notices that the package is installed, or was."""

import json
import shutil
import sys

import pytest
from environments import PACKAGES, Environment
from transformers.quantizers import auto

import crvq_autoload
import crvq_hf
import crvq_import_hooks
from crvq_hf.config import QUANT_METHOD

USE = """
import sys
from transformers import pipeline
assert "crvq_hf" not in sys.modules
writer = pipeline("text-generation", {folder!r})
print(type(writer.model.model.layers[0].mlp.up_proj).__name__, writer("the quick", max_new_tokens=3)[0].keys())
print(sys.modules["crvq_hf"].__file__)
"""
LOAD = """
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained({folder!r}).model.layers[0].mlp.up_proj).__name__)
"""
MULTIPROCESSING = """
def load():
    from transformers import AutoModelForCausalLM
    return type(AutoModelForCausalLM.from_pretrained({folder!r}).model.layers[0].mlp.up_proj).__name__

if __name__ == "__main__":
    import multiprocessing, sys
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            print(method, pool.apply(load))
    assert "transformers" not in sys.modules
"""
IMPORTS = """
import torch
import transformers.quantizers.auto
print("all is well")
"""
OUR_MODULES = ["crvq_autoload.py", "crvq_import_hooks.py", "crvq_hf", "crvq_kernels"]


# In programs of their own, in environments where the package is installed


@pytest.mark.parametrize("first", ["import torch", "import transformers.quantizers.auto"])
def test_a_pipeline_needs_no_import(installed, checkpoint, first):
    done = installed.run("-c", first + USE.format(folder=str(checkpoint)))
    assert done.returncode == 0, done.stdout
    assert "CRVQLinear dict_keys(['generated_text'])" in done.stdout
    assert done.stdout.splitlines()[-1] == str(installed.site / "crvq_hf/__init__.py")


def test_forked_and_spawned_processes(installed, checkpoint, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(MULTIPROCESSING.format(folder=str(checkpoint)))
    done = installed.run(program)
    assert done.returncode == 0, done.stdout
    assert "fork CRVQLinear" in done.stdout and "spawn CRVQLinear" in done.stdout


def test_switched_off_loading_fails_loudly(installed, checkpoint):
    """As it does without the package: the method is named, and config.json names the package."""
    done = installed.run("-c", LOAD.format(folder=str(checkpoint)), CRVQ_AUTOLOAD="0")
    assert done.returncode == 1
    assert "Unknown quantization type, got crvq" in done.stdout
    assert "RuntimeError: You set `ignore_mismatched_sizes` to `False`" in done.stdout
    stored = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    assert stored["quantizer_package"] == "crvq-hf"


def test_one_import_is_enough_where_pth_files_are_not_read(installed, checkpoint):
    """Also a late one; and `crvq_hf` does without what the .pth file starts."""
    code = (
        f"import sys; sys.path += {[str(installed.site), *PACKAGES]!r}\nimport transformers.quantizers.auto, crvq_hf"
    )
    done = installed.run(
        "-S", "-c", code + LOAD.format(folder=str(checkpoint)) + "assert 'crvq_autoload' not in sys.modules"
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1] == "CRVQLinear"


def test_a_start_of_python_imports_nothing_else(installed, tmp_path):
    names = "import sys; print(*sys.modules)"
    with_it, without = installed.run("-c", names), Environment(tmp_path / "bare").run("-c", names)
    assert set(with_it.stdout.split()) - set(without.stdout.split()) == {"crvq_autoload", "crvq_import_hooks"}


def test_a_broken_package_breaks_nothing_but_its_models(installed, checkpoint, tmp_path):
    broken = installed.copy(tmp_path / "broken")
    (broken.site / "crvq_hf/__init__.py").write_text("raise RuntimeError('broken on purpose')")
    done = broken.run("-c", IMPORTS + LOAD.format(folder=str(checkpoint)))
    assert "all is well" in done.stdout
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == "RuntimeError: broken on purpose"


@pytest.fixture
def half_removed(installed, tmp_path):
    """Returns a function (names of files or folders) -> copy of `installed` without them; all else is there."""

    def remove(names: list[str]) -> Environment:
        environment = installed.copy(tmp_path / "-".join(names))
        for name in names:
            path = environment.site / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert (environment.site / "crvq_autoload.pth").is_file() and list(
            environment.site.glob("crvq_hf-*.dist-info")
        )
        return environment

    return remove


def test_nothing_notices_that_files_were_deleted(half_removed):
    """As by an uninstall that was cut short."""
    for name in OUR_MODULES:
        assert half_removed([name]).run("-c", "print('all is well')").stdout == "all is well\n", name
    done = half_removed(OUR_MODULES).run("-c", IMPORTS)
    assert (done.returncode, done.stdout) == (0, "all is well\n")


def test_nothing_notices_that_an_editable_install_was_moved_away(editable):
    environment, source = editable
    is_there = "import sys; print('crvq_autoload' in sys.modules)"
    assert environment.run("-c", is_there).stdout == "True\n"
    elsewhere = source.rename(source.with_name("elsewhere"))
    try:
        done = environment.run("-c", is_there + IMPORTS)
    finally:
        elsewhere.rename(source)
    assert (done.returncode, done.stdout) == (0, "False\nall is well\n")


# In this program


def test_where_a_start_of_python_has_installed_nothing(monkeypatch):
    """`install` may be called late, when transformers is there."""
    monkeypatch.setattr(auto, "AUTO_QUANTIZATION_CONFIG_MAPPING", mapping := {})
    monkeypatch.setattr(crvq_import_hooks, "_waiting", {})
    monkeypatch.delenv("CRVQ_AUTOLOAD", raising=False)
    crvq_autoload.install()
    assert mapping.keys() == {QUANT_METHOD}


@pytest.mark.parametrize(("switch", "watched"), [("0", False), ("1", True), (None, True)])
def test_the_switch(monkeypatch, switch, watched):
    monkeypatch.delenv("CRVQ_AUTOLOAD", raising=False)
    if switch is not None:
        monkeypatch.setenv("CRVQ_AUTOLOAD", switch)
    monkeypatch.setattr(crvq_import_hooks, "_waiting", waiting := {})
    monkeypatch.delitem(sys.modules, crvq_autoload.REGISTRY)
    for _ in range(2):
        crvq_autoload.install()
    assert waiting == ({crvq_autoload.REGISTRY: [crvq_autoload.announce]} if watched else {})


def test_the_stand_in_hands_on(monkeypatch):
    assert crvq_autoload.QUANT_METHOD == QUANT_METHOD
    real = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    crvq_autoload.announce()
    assert real[QUANT_METHOD] is crvq_hf.CRVQConfig  # never put in the place of the real one
    mapping = {}
    monkeypatch.setattr(auto, "AUTO_QUANTIZATION_CONFIG_MAPPING", mapping)
    crvq_autoload.announce()
    assert mapping.keys() == {QUANT_METHOD}
    config = auto.AutoQuantizationConfig.from_dict({"quant_method": QUANT_METHOD, "seed": 5})
    assert config == crvq_hf.CRVQConfig(seed=5)
