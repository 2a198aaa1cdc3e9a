"""What version 0.1 has written is read as it was: its checkpoints, its pickles, the names in its README.

`version_0_1/` was written by 0.1.0: a quantized Llama of one layer with 8-bit embeddings, and in pickled.pt three of
its layers, a `QuantizedWeight`, the config, and the model's logits.
"""

from pathlib import Path

import pytest
import torch
from crvq_kernels import dequantize_ref
from transformers import AutoModelForCausalLM

import crvq_hf
from crvq_hf.modeling.embedding import Int8Embedding, Int8Head
from crvq_hf.moved import MOVED

FOLDER = Path(__file__).parent / "version_0_1"


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def pickled():
    return torch.load(FOLDER / "pickled.pt", weights_only=False)


def test_a_checkpoint_computes_what_it_did(model, pickled, tokens):
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    # Processors round differently: the bits are those of one machine.
    assert (logits - pickled["logits"]).norm() < 1e-5 * pickled["logits"].norm()


def test_pickled_layers_are_those_of_the_checkpoint(model, pickled, tokens):
    layers = pickled["layers"]
    kinds = {"embedding": Int8Embedding, "head": Int8Head, "linear": crvq_hf.CRVQLinear}
    assert {name: type(layer) for name, layer in layers.items()} == kinds
    hidden = layers["embedding"](tokens)
    own = model.model.layers[0].mlp.up_proj
    assert torch.equal(hidden, model.model.embed_tokens(tokens))
    assert torch.equal(layers["linear"](hidden), own(hidden))
    assert torch.equal(layers["head"](hidden), model.lm_head(hidden))


def test_pickled_weight_and_config(model, pickled):
    weight, stored = pickled["weight"], model.model.layers[0].mlp.up_proj.quantized_weight()
    assert type(weight) is crvq_hf.QuantizedWeight
    assert all(torch.equal(tensor, stored.tensors()[name]) for name, tensor in weight.tensors().items())
    assert torch.isfinite(dequantize_ref(*weight.tensors().values(), weight.nbits, weight.num_critical_groups)).all()
    assert pickled["config"].to_dict() == model.config.quantization_config.to_dict()


@pytest.mark.parametrize("name", MOVED)
def test_old_modules_can_be_imported(name):
    module = __import__(name, fromlist=["x"])
    assert getattr(crvq_hf, name.rpartition(".")[2]) is module
    with pytest.raises(AttributeError):
        module.no_such_name  # noqa: B018


def test_names_of_the_old_readme():
    assert crvq_hf.distributed.together is crvq_hf.together
    assert crvq_hf.report.write_report is crvq_hf.write_report
