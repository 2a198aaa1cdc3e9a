"""Shared test setup: offline, Triton interpreter without a GPU, seeds, and what the tests of several rooms need.

transformers is imported by the fixtures that need it: the tests of the kernels do without.
"""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.utils._device
from environments import NO_COMPILER, Environment, build_wheel, copy_source, run

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test may reach for the network
if not torch.cuda.is_available():
    # Must be set before anything imports Triton: a kernel is bound to the interpreter when it is decorated.
    os.environ["TRITON_INTERPRET"] = "1"

from hypothesis import settings  # noqa: E402

settings.register_profile("crvq", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("crvq")


# A process of pytest-xdist takes a file at a time. These take longest: they come first, or one ends alone with them.
LONGEST = (
    "distributed popular aot autoload elsewhere hub block_loop code_paths sanitizers cli kills gemm packaging serve "
    "demo tensor_parallel command_line"
).split()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONGEST)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Fills what `torch.empty` and `Tensor.new_empty` return with NaN (integers: the largest value).

    An element that is never written then shows up.
    """
    # What `torch.device` as a context acts on is looked up once per process; it must find the functions themselves.
    torch.utils._device._device_constructors()

    def poison(allocate):
        def allocate_poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max)

        return allocate_poisoned

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


@pytest.fixture
def generator():
    """Returns a function seed -> CPU generator."""
    return lambda seed=0: torch.Generator().manual_seed(seed)


@pytest.fixture
def quiet():
    """Shows no progress bars."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture
def precision(monkeypatch):
    """Runs in fp32 wherever the tests run; returns a function to switch mixed precision on or off."""
    from crvq_hf.pipeline import block_loop

    def switch(bfloat16: bool) -> None:
        monkeypatch.setattr(block_loop, "has_fast_bfloat16", lambda device_type: bfloat16)

    switch(False)
    return switch


@pytest.fixture
def quantize(tmp_path):
    """Returns a function (model, work folder's name, **config fields) -> model, quantized."""
    from whole_models import FIELDS

    from crvq_hf import CRVQConfig, quantize_model

    def quantize(model, work: str = "work", tokenizer=None, **fields):
        return quantize_model(model, tokenizer, CRVQConfig(**FIELDS | fields, work_dir=tmp_path / work))

    return quantize


@pytest.fixture
def small_steps(monkeypatch):
    from whole_models import use_small_steps

    use_small_steps(monkeypatch.setattr)


@pytest.fixture
def pipeline(monkeypatch):
    """Puts random codes in the place of what the pipeline finds; returns the list of its calls' arguments."""
    from random_models import code_embeddings, quantize_randomly

    from crvq_hf.pipeline import quantize_model

    calls = []

    def quantize_blocks_(model, tokenizer, config, samples, dense_rows=()):
        calls.append((model, tokenizer, config))
        quantize_randomly(model, tokenizer, config)
        if config.has_coded_embeddings:
            code_embeddings(model, config.embedding_bits, dense_rows)

    monkeypatch.setattr(quantize_model, "quantize_blocks_", quantize_blocks_)
    return calls


@pytest.fixture
def make_weight():
    """Returns a function (in_features, out_features, **config fields) -> random QuantizedWeight, 4 codebooks."""
    from tiny import random_weight

    from crvq_hf import CRVQConfig

    return lambda in_features, out_features, **fields: random_weight(
        CRVQConfig(**{"num_extended_codebooks": 3} | fields).layer_shape(in_features, out_features)
    )


@pytest.fixture
def make_model():
    """Returns a function (architecture, dtype, **config changes) -> random dense causal language model."""
    from random_models import tiny_config
    from transformers import AutoModelForCausalLM

    def make(architecture: str, dtype: torch.dtype = torch.float32, **changes):
        return AutoModelForCausalLM.from_config(tiny_config(architecture, **changes), dtype=dtype).eval()

    return make


@pytest.fixture
def tokens():
    return torch.arange(3, 27).view(2, 12)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """Folder of a quantized Llama of two layers; tests must not change it."""
    from tiny import tiny_model, tiny_tokenizer

    from crvq_hf import CRVQConfig, quantize_model

    folder = tmp_path_factory.mktemp("ecosystem") / "tiny-crvq"
    fields = {"nbits_per_codebook": 4, "block_finetune_epochs": 0, "e2e_finetune_epochs": 0}
    config = CRVQConfig(dataset=None, work_dir=tmp_path_factory.mktemp("work"), **fields)
    quantize_model(tiny_model(), config=config).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sdist(tmp_path_factory) -> Path:
    """What `make wheel` builds wheels from."""
    source, folder = copy_source(tmp_path_factory.mktemp("sdist") / "source"), tmp_path_factory.mktemp("dist")
    build = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    run([sys.executable, "-c", build, folder], cwd=source)
    (file,) = folder.iterdir()
    return file


@pytest.fixture(scope="session")
def wheel(sdist, tmp_path_factory) -> Path:
    """A wheel, with the compiled CPU kernel if there is a compiler."""
    return build_wheel(sdist, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Environment:
    """A virtual environment with the wheel; tests must not change it."""
    environment = Environment(tmp_path_factory.mktemp("installed") / "environment")
    environment.pip("install", "--quiet", "--no-deps", wheel)
    return environment


@pytest.fixture(scope="session")
def editable(tmp_path_factory) -> tuple[Environment, Path]:
    """A virtual environment with an editable install, without the compiled kernel; and the sources it refers to."""
    folder = tmp_path_factory.mktemp("editable")
    source, environment = copy_source(folder / "source"), Environment(folder / "environment")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--editable"]
    environment.pip("install", *options, source, **NO_COMPILER)
    return environment, source


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Folders of a dense and of its quantized model; tests must not change them."""
    from made import make_quantized

    return make_quantized(tmp_path_factory.mktemp("made"))


@pytest.fixture
def out(made, tmp_path):
    """A copy of the quantized model that a test may change."""
    return shutil.copytree(made[1], tmp_path / "out")
