"""What is set in PyTorch around a run does not reach its result."""

from contextlib import contextmanager

import pytest
import torch
from tiny import TEXT, save_tiny
from torch import nn
from transformers import AutoModelForCausalLM
from whole_models import FIELDS, equal_state, make, tokens_for

from crvq_hf import CRVQConfig
from crvq_hf.algorithm.fit import fit_weight
from crvq_hf.resources.settings import leave_inference_mode_, own_settings

pytestmark = pytest.mark.usefixtures("precision", "quiet", "small_steps")


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SETTINGS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "another device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def now():
    kinds = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
    return *kinds, torch.get_default_dtype(), torch.get_default_device()


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
def test_settings_are_those_of_a_run_inside_and_the_same_after_it(setting, fails):
    with setting():
        before = now()
        with pytest.raises(KeyError) if fails else torch.enable_grad(), own_settings():
            assert now() == (True, False, False, torch.float32, torch.device("cpu"))
            if fails:
                raise KeyError
        assert now() == before


@pytest.fixture(scope="module")
def fields():
    return FIELDS | {"embedding_bits": 8, "nsamples": 3, "e2e_nsamples": 4}


@pytest.fixture(scope="module")
def expected(tmp_path_factory, fields):
    """The models of a run without any settings: from memory, and from a folder."""
    from crvq_hf import quantize_model
    from crvq_hf.pipeline import block_loop, streams

    folder = save_tiny(tmp_path_factory.mktemp("dense"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_loop, "has_fast_bfloat16", lambda device_type: False)
        patch.setattr(streams, "RUN_TOKENS", 64)
        patch.setattr(streams, "STEP_TOKENS", 32)
        config = CRVQConfig(**fields, work_dir=folder / "one")
        own = CRVQConfig(**fields | {"dataset": [TEXT]}, work_dir=folder / "two")
        return (
            folder,
            quantize_model(make("llama"), None, config),
            AutoModelForCausalLM.from_pretrained(folder, quantization_config=own),
        )


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_model_in_memory_comes_out_the_same(quantize, expected, fields, setting):
    model = make("llama")
    with setting():
        quantize(model, **fields)
    assert equal_state(model, expected[1])
    assert not any(tensor.is_inference() for tensor in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "another device"])
def test_a_model_from_a_folder_comes_out_the_same(expected, fields, tmp_path, name):
    config = CRVQConfig(**fields | {"dataset": [TEXT]}, work_dir=tmp_path / "work")
    with SETTINGS[name]():
        model = AutoModelForCausalLM.from_pretrained(expected[0], quantization_config=config)
    assert equal_state(model, expected[2])
    tokens = tokens_for(model)
    assert torch.equal(model(input_ids=tokens).logits, expected[2](input_ids=tokens).logits)
    model.save_pretrained(tmp_path / "out")
    assert equal_state(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), expected[2])


@pytest.mark.parametrize("importance", ["weight_activation", "weight", "random"])
@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "autocast"])
def test_the_algorithm_needs_no_settings(name, importance, generator):
    """Autocast alone it leaves to its callers: what it rounds is all that is asked for."""
    weight, x = torch.randn(24, 64), torch.randn(200, 64)
    kwargs = {"codebook_size": 16, "num_critical_groups": 2, "importance": importance}
    expected = fit_weight(weight, x.T @ x / 200, **kwargs, generator=generator())
    hessian = x.T @ x / 200
    with SETTINGS[name]():
        found = fit_weight(weight, hessian, **kwargs, generator=generator())
    for key, tensor in vars(expected).items():
        same = torch.equal(getattr(found, key), tensor) if isinstance(tensor, torch.Tensor) else None
        assert same or getattr(found, key) == tensor, key


def test_copies_of_what_inference_mode_made_stay_shared():
    with torch.inference_mode():
        first, second = nn.Linear(3, 3), nn.Linear(3, 3)
        second.weight = first.weight
        first.register_buffer("number", torch.ones(2))
        first.weight.mark = "kept"
    outside = nn.Linear(3, 3)
    model, weight = nn.ModuleList([first, second, outside]), first.weight.clone()
    before = outside.weight
    leave_inference_mode_(model)
    assert first.weight is second.weight and torch.equal(first.weight, weight) and first.weight.mark == "kept"
    assert outside.weight is before and isinstance(first.weight, nn.Parameter) and first.weight.requires_grad
    assert not any(tensor.is_inference() for tensor in [*model.parameters(), *model.buffers()])
    model[0](torch.ones(1, 3)).sum().backward()
