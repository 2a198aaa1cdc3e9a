"""What the loop leaves to transformers, seen before the work."""

import pytest
import torch
from random_models import tiny_config
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, StaticCache, T5Config

from crvq_hf import decode
from crvq_hf.generation import graph, loop
from crvq_hf.generation.fitness import unfit_model

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
T5 = {"d_model": 32, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
OPTIONS = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def encoder_and_decoder():
    return AutoModelForSeq2SeqLM.from_config(T5Config(**T5, vocab_size=64)).eval()


def recurrent():
    from transformers import MambaConfig

    return AutoModelForCausalLM.from_config(MambaConfig(**SIZES, state_size=4)).eval()


def llama():
    return AutoModelForCausalLM.from_config(tiny_config("llama")).eval()


def training():
    return llama().train()


def offloaded():
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(llama(), execution_device=torch.device("cpu"))


def other_attention():
    model = llama()
    model.config._attn_implementation = "flash_attention_2"
    return model


def on_two_devices():
    model = llama()
    model.lm_head.to("meta")
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (encoder_and_decoder, "the model has an encoder"),
        (recurrent, "transformers has no static cache for MambaForCausalLM"),
        (training, "the model is in training mode"),
        (offloaded, "accelerate moves the model's tensors"),
        (other_attention, "the attention is flash_attention_2, not one of sdpa, eager"),
        (on_two_devices, "the model is spread over cpu, meta"),
        (llama, None),
    ],
)
def test_models(make, reason):
    assert unfit_model(make()) == reason


@pytest.mark.parametrize("make", [encoder_and_decoder, recurrent, offloaded])
def test_these_models_write_all_the_same(make):
    model, tokens = make(), torch.randint(3, 60, (2, 6))
    assert torch.equal(model.generate(tokens, custom_generate=decode, **OPTIONS), model.generate(tokens, **OPTIONS))
    assert model not in loop._sessions


def test_other_layers_of_a_cache():
    model = llama()
    model.config.layer_types = ["full_attention", "conv"]
    assert unfit_model(model) == "layers of the cache are LinearAttentionLayers"


def given_cache(model):
    return {"past_key_values": StaticCache(config=model.config, max_cache_len=20)}


def given_embeddings(model):
    return {"inputs_embeds": torch.randn(2, 6, 32)}


@pytest.mark.parametrize(("make", "reason"), [(given_cache, "past_key_values"), (given_embeddings, "inputs_embeds")])
def test_calls(make, reason, monkeypatch):
    model, said = llama(), []
    monkeypatch.setattr(graph, "say_once", said.append)
    tokens = torch.randint(3, 60, (2, 6))
    torch.manual_seed(0)
    expected = model.generate(tokens, **OPTIONS, **make(model))
    torch.manual_seed(0)
    assert torch.equal(model.generate(tokens, custom_generate=decode, **OPTIONS, **make(model)), expected)
    assert len(said) == 1 and reason in said[0]
