"""Loading without `import crvq_hf`, and that nothing else notices that the package is installed."""

import json
import shutil
import subprocess
import sys

import pytest
from transformers.quantizers import auto

import crvq_autoload
import crvq_hf
from crvq_hf.config import QUANT_METHOD

USE = """
from transformers import pipeline
assert "crvq_hf" not in sys.modules
writer = pipeline("text-generation", {folder!r})
print(type(writer.model.model.layers[0].mlp.up_proj).__name__, writer("the quick", max_new_tokens=3)[0].keys())
print(sys.modules["crvq_hf"].__file__)
"""
LOAD = """
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained({folder!r})
"""
MULTIPROCESSING = """
def load():
    from transformers import AutoModelForCausalLM
    return type(AutoModelForCausalLM.from_pretrained({folder!r}).model.layers[0].mlp.up_proj).__name__

if __name__ == "__main__":
    import multiprocessing, torch
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            print(method, pool.apply(load))
    assert "transformers" not in sys.modules
"""


# In programs of their own


@pytest.mark.parametrize("first", ["import torch", "import transformers.quantizers.auto"])
def test_a_pipeline_needs_no_import(installed, run_installed, checkpoint, first):
    """Also where transformers' registry of methods is what imports torch first."""
    done = run_installed(installed, first + USE.format(folder=str(checkpoint)))
    assert done.returncode == 0, done.stdout
    assert "CRVQLinear dict_keys(['generated_text'])" in done.stdout
    assert done.stdout.splitlines()[-1] == str(installed / "crvq_hf/__init__.py")


def test_forked_and_spawned_processes(installed, run_installed, checkpoint):
    done = run_installed(installed, MULTIPROCESSING.format(folder=str(checkpoint)))
    assert done.returncode == 0, done.stdout
    assert "fork CRVQLinear" in done.stdout and "spawn CRVQLinear" in done.stdout


def test_switched_off_loading_fails_loudly(installed, run_installed, checkpoint):
    """As it does without the package: the method is named, and config.json names the package."""
    done = run_installed(installed, LOAD.format(folder=str(checkpoint)), CRVQ_AUTOLOAD="0")
    assert done.returncode == 1
    assert "Unknown quantization type, got crvq" in done.stdout
    assert "RuntimeError: You set `ignore_mismatched_sizes` to `False`" in done.stdout
    stored = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    assert stored["quantizer_package"] == "crvq-hf"


def test_a_broken_package_breaks_nothing_but_its_models(installed, run_installed, checkpoint, tmp_path):
    broken = shutil.copytree(installed, tmp_path / "broken")
    (broken / "crvq_hf/__init__.py").write_text("raise RuntimeError('broken on purpose')")
    code = "import torch\nimport transformers.modeling_utils\nprint('all is well')\n"
    done = run_installed(broken, code + LOAD.format(folder=str(checkpoint)))
    assert "all is well" in done.stdout
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == "RuntimeError: broken on purpose"


def test_nothing_but_the_standard_library_is_imported(installed):
    code = f"""
import sys
sys.path.insert(0, {str(installed)!r})
import crvq_autoload
crvq_autoload.install()
print({{name.partition(".")[0] for name in sys.modules}} - set(sys.stdlib_module_names) - {{"crvq_autoload"}})
"""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() in ("set()", "{'__main__'}"), done.stdout + done.stderr


# In this program


@pytest.fixture
def undone(monkeypatch):
    """Takes back what a test does to the import system."""
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if type(f).__module__ != "crvq_autoload"])
    monkeypatch.setattr(crvq_autoload, "_waiting", {})


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Name of a module that can be imported, and was not."""
    (tmp_path / "imported_late.py").write_text("value = 1")
    monkeypatch.syspath_prepend(tmp_path)
    yield "imported_late"
    sys.modules.pop("imported_late", None)


def test_waiting_for_a_module(undone, module):
    seen = []

    def call():
        seen.append(sys.modules[module].value)

    for _ in range(2):  # asked for twice, called once
        crvq_autoload.when_imported(module, call)
    assert seen == [] and module not in sys.modules
    imported = __import__(module)
    assert seen == [1]
    assert imported.__spec__.origin == imported.__file__ and imported.__spec__.loader is imported.__loader__
    crvq_autoload.when_imported(module, call)
    assert seen == [1, 1]


def test_a_module_that_is_not_there_stays_so(undone):
    crvq_autoload.when_imported("there_is_no_such_module", lambda: None)
    with pytest.raises(ModuleNotFoundError, match="there_is_no_such_module"):
        __import__("there_is_no_such_module")


@pytest.mark.parametrize(("switch", "finders"), [("0", 0), ("1", 1), (None, 1)])
def test_the_switch(undone, monkeypatch, switch, finders):
    monkeypatch.delenv("CRVQ_AUTOLOAD", raising=False)
    if switch is not None:
        monkeypatch.setenv("CRVQ_AUTOLOAD", switch)
    for name in (crvq_autoload.REGISTRY, crvq_autoload.MODELS):
        monkeypatch.delitem(sys.modules, name, raising=False)
    before = len(sys.meta_path)
    for _ in range(2):
        crvq_autoload.install()
    assert len(sys.meta_path) - before == finders


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
