"""Models that change their own weights when they are first run are refused, before and after that."""

import pytest
import torch
from shrink import run, tiny_config, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, RwkvForCausalLM

from crvq_hf import CRVQConfig, quantize_model

CONFIG = CRVQConfig(dataset=None, nbits_per_codebook=4)
TOKENS = torch.arange(3, 11)[None]


class Halving(LlamaForCausalLM):
    """Halves a weight when it is first run, in a way that counts as no change to autograd."""

    is_ready = False

    def forward(self, *args, **kwargs):
        if not self.is_ready:
            self.model.layers[1].mlp.up_proj.weight.data.div_(2)
            self.is_ready = True
        return super().forward(*args, **kwargs)


MODELS = {
    "RWKV": (RwkvForCausalLM, "rwkv"),
    "a class of one's own": (Halving, "llama"),
}


@pytest.mark.parametrize("was_run", [False, True], ids=["new", "run before"])
@pytest.mark.parametrize("kind, architecture", MODELS.values(), ids=MODELS.keys())
def test_changing_its_own_weights(kind, architecture, was_run):
    torch.manual_seed(0)
    model = kind(tiny_config(architecture)).eval()
    if was_run:
        run(model, TOKENS)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=f"{kind.__name__} changes its own weights when it is run .*weight first"):
        quantize_model(model, None, CONFIG)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.usefixtures("quiet")
def test_what_the_refusal_advises(tmp_path):
    config = tiny_config("rwkv")
    config.rescale_every = 0
    model = quantize_model(AutoModelForCausalLM.from_config(config).eval(), None, CONFIG)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(AutoModelForCausalLM.from_pretrained(tmp_path), TOKENS), run(model, TOKENS))


@pytest.mark.usefixtures("quiet")
def test_an_embedding_that_keeps_its_rows_short():
    model = tiny_model("llama", AutoModelForCausalLM)
    table = nn.Embedding(*model.model.embed_tokens.weight.shape, max_norm=1.0)
    model.model.set_input_embeddings(table)
    assert quantize_model(model, None, CONFIG).is_quantized
