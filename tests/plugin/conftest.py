"""Tiny random models of many architectures, and a stand-in for the algorithm: random codes and codebooks."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test may reach for the network

import sys
import types

import pytest
import torch
import transformers
from tiny import SIZES, random_weight

from crvq_hf import CRVQConfig
from crvq_hf.replace import linear_size, quantizable_linears, set_quantized_

MOE = SIZES | {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_inner": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
ARCHITECTURES = {
    "llama": SIZES,
    "opt": SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "mistral": SIZES,
    "qwen3": SIZES | {"head_dim": 8},
    "gemma3_text": SIZES | {"head_dim": 8, "tie_word_embeddings": True},
    "phi3": SIZES,
    "gpt_neox": SIZES,
    "gpt2": GPT2 | {"bos_token_id": 1, "eos_token_id": 2},
    "mixtral": MOE,
    "qwen3_moe": MOE | {"head_dim": 8},
}


def tiny_config(architecture: str, **changes) -> transformers.PreTrainedConfig:
    """Returns the config of a model of two layers and 32 channels."""
    values = ARCHITECTURES[architecture] | changes
    return transformers.AutoConfig.for_model(architecture, **values)


def quantize_randomly(model, tokenizer, config) -> None:
    """Does what `crvq_hf.pipeline.quantize_blocks_` does, without looking at the weights."""
    linears, _ = quantizable_linears(model, config)
    for name, dense in linears.items():
        set_quantized_(model, name, random_weight(config.layer_shape(*linear_size(dense))))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def pipeline(monkeypatch):
    """Puts `quantize_randomly` in the place of the pipeline; returns the list of its calls' arguments."""
    calls = []

    def quantize_blocks_(model, tokenizer, config):
        calls.append((model, tokenizer, config))
        quantize_randomly(model, tokenizer, config)

    stand_in = types.ModuleType("crvq_hf.pipeline")
    stand_in.quantize_blocks_ = quantize_blocks_
    monkeypatch.setitem(sys.modules, "crvq_hf.pipeline", stand_in)
    return calls


@pytest.fixture
def make_weight():
    """Returns a function (in_features, out_features, **config fields) -> random QuantizedWeight, 4 codebooks."""
    return lambda in_features, out_features, **fields: random_weight(
        CRVQConfig(**{"num_extended_codebooks": 3} | fields).layer_shape(in_features, out_features)
    )


@pytest.fixture
def make_model():
    """Returns a function (architecture, **config changes) -> random dense causal language model."""

    def make(architecture: str, dtype: torch.dtype = torch.float32, **changes) -> transformers.PreTrainedModel:
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(architecture, **changes), dtype=dtype)
        return model.eval()

    return make


@pytest.fixture
def tokens():
    return torch.arange(3, 27).view(2, 12)
