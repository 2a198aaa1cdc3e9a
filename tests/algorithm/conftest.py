"""Quiet, offline, and on one known precision: whether bfloat16 is fast here must not decide what a test sees."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test may reach for the network

import pytest
import torch
from transformers.utils import logging as transformers_logging


@pytest.fixture(autouse=True)
def quiet():
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


@pytest.fixture
def generator():
    """Returns a function seed -> CPU generator."""
    return lambda seed=0: torch.Generator().manual_seed(seed)
