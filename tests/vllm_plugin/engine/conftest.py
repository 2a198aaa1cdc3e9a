"""What the tests share that run vLLM: `make test-vllm` runs them, in an environment of vLLM's own.

SmolLM2 is quantized by `make test-vllm` before them; CRVQ_SMOLLM2 says where it is.
"""

import os
from pathlib import Path

import pytest

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",  # GB
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
)
if "CRVQ_SMOLLM2" in os.environ:
    import vllm.config  # noqa: F401  # where it has to be installed, no test may be skipped for want of it


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Returns a function: name of a tiny checkpoint -> its folder."""
    import checkpoints

    folder, done = tmp_path_factory.mktemp("checkpoints"), {}

    def make(name):
        if name not in done:
            done[name] = checkpoints.make(name, folder)
        return done[name]

    return make


@pytest.fixture(scope="session")
def smollm2():
    """Folder of SmolLM2 in CRVQ."""
    if not os.environ.get("CRVQ_SMOLLM2"):
        pytest.skip("CRVQ_SMOLLM2 does not say where SmolLM2 in CRVQ is")
    return Path(os.environ["CRVQ_SMOLLM2"])
