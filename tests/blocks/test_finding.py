"""Finding the decoder blocks."""

import pytest
import torch
import transformers
from many_models import build
from shrink import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from crvq_hf import CRVQConfig, quantize_model
from crvq_hf.blocks.finding import find_block_lists, find_blocks, for_each_input, named_blocks, survey


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


def git():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    vision = sizes | {"num_hidden_layers": 6, "image_size": 16, "patch_size": 8}
    return transformers.GitForCausalLM(
        transformers.GitConfig(vision_config=vision, vocab_size=64, num_hidden_layers=2, **sizes)
    )


def clip():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=sizes
            | {"model_type": "clip_vision_model", "num_hidden_layers": 6, "image_size": 16, "patch_size": 8},
            text_config=sizes | {"model_type": "gpt_neox", "vocab_size": 64, "num_hidden_layers": 2},
            image_token_index=60,
        )
    )


@pytest.mark.parametrize(("make", "name"), [(git, "git.encoder.layer"), (clip, "model.language_model.layers")])
def test_blocks_are_those_of_the_text_not_of_a_larger_vision_tower(make, name):
    assert find_blocks(make())[0] == name


class UsesOneTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.up, self.down = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return self.router(self.down(self.up(x) + self.router(x)))


@torch.no_grad()
def test_every_use_of_a_layer_counts():
    """As Gemma 3n uses its routers: before its layers and after them."""
    block, x, seen = UsesOneTwice(), torch.randn(1, 5, 8), []
    stages, energies, repeated = survey(block, ["router", "up", "down"], lambda: block(x))
    assert repeated == {"router"} and [["router"], ["up"]] == sorted(group for group in stages[0] + stages[1])
    last = block.down(block.up(x) + block.router(x))
    largest = max(float(inputs.square().sum((0, 1)).max()) for inputs in (x, last))
    assert energies["router"] == pytest.approx(largest)
    forwards = [lambda: block(x)] * 2
    for_each_input(block, ["router"], lambda name, inputs: seen.append(inputs), iter(forwards), repeated)
    assert len(seen) == 4 and torch.equal(seen[1], last)
    seen.clear()
    for_each_input(block, ["up"], lambda name, inputs: seen.append(inputs), iter(forwards), repeated)
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("architecture", "names"),
    [
        ("an encoder and its decoder", ["encoder.block", "decoder.block"]),
        ("the same, positions learned", ["model.encoder.layers", "model.decoder.layers"]),
        ("sound", ["model.encoder.layers", "model.decoder.layers"]),
        ("an encoder", ["bert.encoder.layer"]),
    ],
)
def test_an_encoder_comes_before_its_decoder(architecture, names):
    model = build(architecture)
    lists = find_block_lists(model)
    assert list(lists) == names and [len(blocks) for blocks in lists.values()] == [2] * len(names)
    assert list(named_blocks(model)) == [f"{name}.{index}" for name in names for index in range(2)]


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("architecture", ["t5gemma2", "blt"])
def test_the_blocks_are_the_same_ones_once_quantized(architecture):
    """The encoder of T5Gemma 2 has a vision tower in it, BLT has three lists of blocks."""
    kind = AutoModelForCausalLM if architecture == "blt" else AutoModelForImageTextToText
    model = tiny_model(architecture, kind)
    before = list(named_blocks(model))
    quantize_model(model, None, CRVQConfig(dataset=None, nbits_per_codebook=4))
    assert list(named_blocks(model)) == before
    assert not any("vision" in name for name in before)
    assert model.crvq_report["dense_share"] < 0.01


def test_an_encoder_decoder_without_lists_is_refused():
    config = transformers.T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(config)
    model.encoder.block = nn.Sequential()
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder model whose lists"):
        find_block_lists(model)


def test_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="Sequential has no list of decoder blocks"):
        find_blocks(nn.Sequential(nn.Linear(8, 8)))
