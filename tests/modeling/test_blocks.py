"""Finding the decoder blocks."""

import pytest
import torch
import transformers
from torch import nn

from crvq_hf.modeling.blocks import find_blocks


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("llama", "model.layers"),
        ("opt", "model.decoder.layers"),
        ("gpt_neox", "gpt_neox.layers"),
        ("gpt2", "transformer.h"),
        ("mixtral", "model.layers"),
    ],
)
def test_blocks_of_known_models(make_model, architecture, name):
    model = make_model(architecture)
    found, blocks = find_blocks(model)
    assert found == name and len(blocks) == 2 and blocks is model.get_submodule(name)


def test_base_model_without_head(make_model):
    assert find_blocks(make_model("llama").model)[0] == "layers"
    assert find_blocks(make_model("gpt2").transformer)[0] == "h"


def test_unknown_model_has_its_blocks_in_the_biggest_list():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList([nn.Linear(4, 4)])
            self.trunk = nn.ModuleList([nn.Linear(8, 8), nn.ModuleList([nn.Linear(8, 8)])])
            self.empty = nn.ModuleList()

    assert find_blocks(Model())[0] == "trunk"


def test_encoder_decoder_is_refused():
    config = transformers.T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder model"):
        find_blocks(model)


def test_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="Sequential has no list of decoder blocks"):
        find_blocks(nn.Sequential(nn.Linear(8, 8)))
