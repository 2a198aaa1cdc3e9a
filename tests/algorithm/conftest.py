"""Quiet, offline, and on one known precision: whether bfloat16 is fast here must not decide what a test sees."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test may reach for the network

import pytest
import torch
from transformers.utils import logging as transformers_logging
from whole_models import FIELDS, use_small_steps

from crvq_hf import CRVQConfig, pipeline, quantize_model


@pytest.fixture(autouse=True)
def quiet():
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


@pytest.fixture
def generator():
    """Returns a function seed -> CPU generator."""
    return lambda seed=0: torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def precision(monkeypatch):
    """Runs in fp32 wherever the tests run; returns a function to switch mixed precision on or off."""

    def switch(bfloat16: bool) -> None:
        monkeypatch.setattr(pipeline, "has_fast_bfloat16", lambda device_type: bfloat16)

    switch(False)
    return switch


@pytest.fixture
def quantize(tmp_path):
    """Returns a function (model, work folder's name, **config fields) -> model, quantized."""

    def quantize(model, work: str = "work", tokenizer=None, **fields):
        return quantize_model(model, tokenizer, CRVQConfig(**FIELDS | fields, work_dir=tmp_path / work))

    return quantize


@pytest.fixture
def small_steps(monkeypatch):
    use_small_steps(monkeypatch.setattr)
