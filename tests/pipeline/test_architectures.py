"""Whole models whose blocks take or give more than hidden states, that have no head, or of which text sees a part."""

import logging
import math
from collections import defaultdict

import pytest
import torch
import transformers
from many_models import build
from tiny import SIZES, TEXT, tiny_model, tiny_tokenizer
from whole_models import OFF, logits_of, make, quantized_layers, tokens_for

from crvq_hf.pipeline import block_loop, quantize_block

pytestmark = pytest.mark.usefixtures("precision", "quiet")

LINES = {"dataset": [TEXT] * 3, "nsamples": 8, "nbits_per_codebook": 4}


@pytest.mark.parametrize("architecture", ["per-layer inputs, AltUp", "per-layer inputs"])
def test_gemma_3n_and_gemma_4(architecture, quantize, tmp_path):
    """All of it: calibrated, tuned, saved, loaded."""
    model, original = quantize(build(architecture), nbits_per_codebook=5, e2e_nsamples=6), build(architecture)
    errors = {name: line["relative_error"] for name, line in model.crvq_report["layers"].items()}
    assert len(errors) >= 4 * 7 and 0 < sum(errors.values()) / len(errors) < 0.3 and max(errors.values()) < 0.5
    assert model.crvq_report["e2e_loss"]["last"] < 1
    model.save_pretrained(tmp_path / "quantized")
    again = type(model).from_pretrained(tmp_path / "quantized")
    tokens = tokens_for(model)
    logits, expected = logits_of(model, tokens), logits_of(original, tokens)
    assert torch.equal(logits, logits_of(again, tokens))
    assert (logits - expected).norm() < (expected - expected.mean()).norm()


@pytest.mark.parametrize(
    "architecture",
    ["per-layer inputs, AltUp", "per-layer inputs", "embeddings given to every block", "returns a pair"],
)
def test_layers_see_what_they_will_see_in_the_quantized_model(architecture, quantize, monkeypatch, small_steps):
    hessians, quantize_linear, calibration = {}, quantize_block._quantize_linear, []
    tokens_of = block_loop.calibration_tokens
    monkeypatch.setattr(
        block_loop, "calibration_tokens", lambda *a: calibration.append(tokens_of(*a)) or calibration[0]
    )

    def spy(run, index, name, hessian):
        hessians[f"{run.names[index]}.{name}"] = hessian.clone()
        quantize_linear(run, index, name, hessian)

    monkeypatch.setattr(quantize_block, "_quantize_linear", spy)
    model, inputs = quantize(build(architecture), **OFF), defaultdict(list)

    def watch(name):
        return lambda module, args: inputs[name].append(args[0].reshape(-1, args[0].shape[-1]))

    for name, layer in quantized_layers(model).items():
        layer.register_forward_pre_hook(watch(name))
    logits_of(model, calibration[0])
    assert hessians.keys() == quantized_layers(model).keys() == inputs.keys() and hessians
    for name, found in hessians.items():
        if len(inputs[name]) == 2:  # Gemma 3n's routers: what they see at the end of a block comes of later stages
            continue
        x = torch.cat(inputs[name]).double()
        wanted = x.T @ x / len(x)
        assert wanted.norm() > 0 and float((found - wanted).norm() / wanted.norm()) < 2e-2, name


def test_blocks_that_text_does_not_reach_are_quantized_on_weights_alone(quantize, caplog):
    model = quantize(build("blocks that text does not reach"))
    assert "No text reaches model.layers.1: quantized on weights alone, without calibration." in caplog.text
    unreached = [name for name in quantized_layers(model) if name.startswith("model.layers.1.cross_attn")]
    assert len(unreached) == 4 and model.crvq_report["layers"].keys() == quantized_layers(model).keys()
    assert logits_of(model, tokens_for(model)).isfinite().all()


def classifier():
    made = transformers.LlamaConfig(**SIZES | {"vocab_size": 300, "max_position_embeddings": 128, "num_labels": 3})
    return transformers.LlamaForSequenceClassification._from_config(made).eval()


@pytest.mark.parametrize("make_it", [classifier, lambda: tiny_model().model], ids=["classifier", "embedding model"])
def test_models_without_a_head_are_calibrated_block_by_block(make_it, quantize, caplog, tmp_path):
    model = quantize(make_it(), tokenizer=tiny_tokenizer(), **LINES)
    kind = type(model).__name__
    assert f"{kind} has no language model head: there is no end-to-end fine-tuning." in caplog.text
    report = model.crvq_report
    assert report["e2e_loss"] is None and report["e2e_tokens"] == 0 and report["calibration_tokens"] == 8 * 16
    model.save_pretrained(tmp_path / "quantized")
    again = type(model).from_pretrained(tmp_path / "quantized")
    tokens = tokens_for(model)
    with torch.no_grad():
        assert torch.equal(model(tokens)[0], again(tokens)[0])


def test_a_model_that_does_not_write_needs_text(quantize):
    with pytest.raises(ValueError, match="LlamaModel does not write text.* give dataset the path of a text file"):
        quantize(make("llama").model)


def test_no_warnings_for_an_ordinary_model(quantize, caplog):
    with caplog.at_level(logging.WARNING, "crvq"):
        quantize(make("llama", num_hidden_layers=1), **OFF)
    assert not caplog.messages


@pytest.mark.parametrize("architecture", ["an encoder and its decoder", "the same, positions learned"])
def test_encoder_and_decoder_are_calibrated_and_tuned(architecture, quantize, tmp_path):
    read = lambda text, **options: {"input_ids": [3 + ord(letter) % 60 for letter in text]}  # noqa: E731
    model = quantize(build(architecture), tokenizer=read, **LINES)
    parts = {name.split(".layers")[0].split(".block")[0] for name in quantized_layers(model)}
    assert len(parts) == 2 and 0 < model.crvq_report["e2e_loss"]["last"] < math.inf
    assert all(0 < line["relative_error"] < 0.5 for line in model.crvq_report["layers"].values())
    model.save_pretrained(tmp_path / "quantized")
    again = type(model).from_pretrained(tmp_path / "quantized")
    tokens = {"input_ids": tokens_for(model), "decoder_input_ids": tokens_for(model)}
    with torch.no_grad():
        assert torch.equal(model(**tokens).logits, again(**tokens).logits)


def test_sound_is_quantized_on_weights_alone(quantize):
    with pytest.raises(ValueError, match=r"it reads input_features.*use dataset=None"):
        quantize(build("sound"), "with text")
    model = quantize(build("sound"), dataset=None)
    assert len(quantized_layers(model)) == 2 * 6 + 2 * 10


def blip2():
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    former = vision | {"num_hidden_layers": 2, "encoder_hidden_size": 32, "vocab_size": 64}
    text = SIZES | {"model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.2}
    made = transformers.Blip2Config(
        vision_config=vision | {"image_size": 16, "patch_size": 8},
        qformer_config=former,
        text_config=text,
        num_query_tokens=4,
    )
    return transformers.Blip2ForConditionalGeneration._from_config(made).eval()


def test_of_a_model_that_needs_images_the_language_model_is_calibrated(quantize, tmp_path, caplog):
    model = quantize(blip2())
    assert "Blip2ForConditionalGeneration is calibrated as the OPTForCausalLM inside of it" in caplog.text
    assert all(name.startswith("language_model.model.decoder.layers.") for name in quantized_layers(model))
    assert model.crvq_report["e2e_loss"] is not None
    model.save_pretrained(tmp_path / "quantized")
    again = type(model).from_pretrained(tmp_path / "quantized")
    tokens = tokens_for(model.language_model)
    assert torch.equal(logits_of(model.language_model, tokens), logits_of(again.language_model, tokens))
