"""Parameters of a quantized model are counted as those of the dense model."""

import copy

import pytest
from random_models import quantized_model


def counts(model) -> list[int]:
    models = (model, model.base_model)
    return [part.num_parameters(exclude_embeddings=exclude) for part in models for exclude in (False, True)]


TIED = {"tie_word_embeddings": True}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize(
    "options",
    [{}, {"embedding_bits": 16}, TIED, {"embedding_bits": 2.5}, TIED | {"embedding_bits": 2.5}],
    ids=str,
)
def test_as_many_as_the_dense_model(architecture, options):
    model = quantized_model(architecture, **options)
    found, copied = counts(model), copy.deepcopy(model)
    stored = sum(parameter.numel() for parameter in model.parameters())
    assert counts(model.dequantize()) == found and found[0] != stored
    assert counts(copied) == found


def test_trainable_ones():
    model = quantized_model("opt")
    assert model.num_parameters(only_trainable=True) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_peft_prints_the_share_of_the_dense_model(capsys):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules="all-linear", r=4)
    lines = []
    for model in (quantized_model("llama"), quantized_model("llama").dequantize()):
        for mixed in (False, True):
            adapted = peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(config), mixed=mixed)
            adapted.print_trainable_parameters()
            lines.append(capsys.readouterr().out)
    assert len(set(lines)) == 1
