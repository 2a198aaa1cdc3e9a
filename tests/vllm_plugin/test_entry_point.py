"""vLLM finds the plugin, and nobody else loads anything of it."""

import subprocess
import sys
from importlib.metadata import entry_points


def test_vllm_finds_the_plugin():
    (entry,) = [entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "crvq"]
    assert entry.value == "crvq_hf.vllm:register"
    assert callable(entry.load())


def test_nothing_of_it_is_imported_without_vllm():
    program = "import sys, crvq_hf; print([name for name in sys.modules if 'vllm' in name.split('.')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=250, check=True)
    assert done.stdout.strip() == "[]"
