"""Calibration on what is not text: dicts of what a model's forward takes."""

import re

import pytest
import torch
from samples import READERS, make_reader, whisper
from tiny import TEXT, tiny_model, tiny_tokenizer
from whole_models import equal_state, quantized_layers

from crvq_hf import CRVQConfig
from crvq_hf.blocks.rehearsal import rehearse
from crvq_hf.blocks.trees import hidden_of
from crvq_hf.calibration.samples import completed, given_samples
from crvq_hf.pipeline import block_loop
from crvq_hf.pipeline.fingerprint import dataset_fingerprint
from crvq_hf.pipeline.streams import Stream, share

pytestmark = pytest.mark.usefixtures("precision", "quiet")

CHEAP = {"nsamples": 2, "e2e_nsamples": 3, "seqlen": 8, "nbits_per_codebook": 4, "tokenizer": None}


@pytest.mark.parametrize("kind", READERS)
@torch.no_grad()
def test_block_by_block_is_the_whole_model(kind):
    model, samples = make_reader(kind)
    runner = rehearse(model, samples[:2])
    assert runner.has_head == ("text" in kind) and runner.has_gradients
    stream = Stream(runner, samples)
    assert len(stream) == len(stream.states) == len(stream.steps()) == 3 and share(samples) == samples
    moved, whole = [], []
    for index in runner.order:
        stream.move(index, lambda state, index=index: runner.call(index, runner.arguments(index, state)))
        moved.append([state.hidden.clone() for state in stream.states])
    found = [runner.output(state).logits for state in stream.states]
    for block in runner.blocks:
        block.register_forward_hook(lambda module, args, output: whole.append(hidden_of(output).clone()))
    for number, sample in enumerate(samples):
        whole.clear()
        torch.testing.assert_close(found[number], model(**sample).logits, rtol=1e-4, atol=1e-5)
        for mine, theirs in zip(moved, whole, strict=True):
            torch.testing.assert_close(mine[number], theirs, rtol=1e-4, atol=1e-5)


def test_whisper_is_calibrated_and_tuned_and_a_killed_run_goes_on(quantize, monkeypatch, tmp_path):
    _, samples = make_reader("sound and text")
    given = [samples[0], {"input_features": samples[1]["input_features"]}, samples[2]]

    def make():
        return make_reader("sound and text")[0]

    model = quantize(make(), "whole", dataset=given, **CHEAP)
    report = model.crvq_report
    assert [name.split(".layers")[0] for name in report["layers"]] == 6 * ["model.encoder"] + 10 * ["model.decoder"]
    assert all(0 < line["relative_error"] < 0.4 for line in report["layers"].values())
    assert report["e2e_loss"]["last"] < 0.5 and 2 * 50 < report["calibration_tokens"] < 2 * 70
    assert model.config.quantization_config.dataset == "3 samples"
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(model(**samples[0]).logits, again(**samples[0]).logits)
        dense = make()(**samples[0]).logits
        assert (model(**samples[0]).logits - dense).norm() < 0.7 * dense.norm()

    quantize_block_ = block_loop.quantize_block_

    def killed(run, index, *args):
        if index:
            raise KeyboardInterrupt
        quantize_block_(run, index, *args)

    monkeypatch.setattr(block_loop, "quantize_block_", killed)
    with pytest.raises(KeyboardInterrupt):
        quantize(make(), "killed", dataset=given, **CHEAP)
    monkeypatch.setattr(block_loop, "quantize_block_", quantize_block_)
    with pytest.raises(ValueError, match="dataset"):  # other data
        quantize(make(), "killed", dataset=samples, **CHEAP)
    written = []
    monkeypatch.setattr(block_loop, "completed", lambda *args: written.append(args[2]) or completed(*args))
    assert equal_state(quantize(make(), "killed", dataset=given, **CHEAP), model)
    assert written == [8]  # for the rehearsal; what the decoder reads is in the work folder


def test_an_image_model_without_logits_over_words_is_quantized(quantize, caplog, tmp_path):
    model, samples = make_reader("images")
    quantize(model, dataset=samples, **CHEAP | {"block_finetune_epochs": 0})
    assert len(quantized_layers(model)) == 12 and model.crvq_report["e2e_loss"] is None
    assert "ViTForImageClassification has no language model head" in caplog.text
    assert model.crvq_report["calibration_tokens"] > 0


def test_what_a_decoder_reads(caplog):
    """Given, made of labels, or written by the model; only the latter depends on how much it may write."""
    model, samples = make_reader("sound and text")
    sound = {"input_features": samples[0]["input_features"]}
    labels = torch.tensor([[0, 7, 8, 9, 1, -100]])
    dataset = [sound, sound | {"labels": labels}, sound | {"labels": labels[:, 1:]}, samples[1] | {"labels": labels}]
    config = CRVQConfig(dataset=dataset, nsamples=9)
    found = completed(model, given_samples(model, None, config, {}), 6, torch.device("cpu"))
    assert "dataset has 4 samples, fewer than nsamples=9; all are used." in caplog.text
    read = sorted((inputs["decoder_input_ids"].tolist()[0] for inputs in found), key=len)
    assert all(inputs.keys() == {"input_features", "decoder_input_ids"} for inputs in found)
    assert read.count([0, 7, 8, 9, 1]) == 2 and samples[1]["decoder_input_ids"].tolist()[0] in read
    (written,) = (row for row in read if row[1:4] != [7, 8, 9] and len(row) != 9)
    with torch.no_grad():
        best = model(**sound, decoder_input_ids=torch.tensor([written[:-1]])).logits.argmax(-1)
    assert best.tolist()[0] == written[1:] and 2 <= len(written) <= 6


def test_labels_do_not_reach_other_models():
    config = CRVQConfig(dataset=[{"input_ids": [[3, 4]], "labels": torch.tensor([[3, 4]])}])
    (sample,) = given_samples(tiny_model(), None, config, {})
    assert sample.keys() == {"input_ids"} and sample["input_ids"].tolist() == [[3, 4]]


def test_the_seed_draws_samples():
    dataset = [{"input_ids": torch.full((1, 2), number)} for number in range(20)]
    fields = {"dataset": dataset, "nsamples": 5, "e2e_finetune_epochs": 0}
    draw = [given_samples(tiny_model(), None, CRVQConfig(**fields, seed=seed), {}) for seed in (0, 0, 1)]
    numbers = [[int(sample["input_ids"][0, 0]) for sample in drawn] for drawn in draw]
    assert numbers[0] == numbers[1] != numbers[2] and len(set(numbers[0])) == 5


def test_what_identifies_samples():
    sample = {"input_ids": torch.ones(1, 3), "pixel_values": torch.zeros(1, 2)}
    assert dataset_fingerprint([sample]) == dataset_fingerprint([dict(reversed(sample.items()))])
    others = [[sample, sample], [sample | {"pixel_values": torch.ones(1, 2)}], [{"input_ids": torch.ones(1, 3)}]]
    assert len({dataset_fingerprint(dataset) for dataset in ([sample], *others)}) == 4


def test_a_config_with_samples_can_be_printed_and_stored():
    config = CRVQConfig(dataset=({"input_ids": torch.ones(1, 3, dtype=torch.int64)},))
    assert '"dataset": "1 samples"' in repr(config) and "1 samples" == config.to_dict()["dataset"]


@pytest.mark.parametrize(
    ("dataset", "sentence"),
    [
        ([{"input_ids": "text"}], r"'input_ids' of sample 0 is no tensor but str 'text'\."),
        ([{"a": torch.ones(1, 1)}, {}], "Sample 1 of dataset has nothing in it; give dicts of tensors"),
        ([{"a": torch.ones(0, 4)}], "Sample 0 of dataset has no batch or nothing in 'a'"),
        ([{"a": torch.tensor(1)}], "Sample 0 of dataset has no batch or nothing in 'a'"),
        ([{"a": torch.ones(1, 1)}, "text"], "a list of dicts of what the model takes, or None, got list"),
    ],
    ids=["text", "empty", "no rows", "no batch", "mixed"],
)
def test_what_is_no_list_of_samples(dataset, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        CRVQConfig(dataset=dataset)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sample", "sentence"),
    [
        (
            {"input_values": torch.ones(1, 4)},
            "cannot write what its decoder is to read for a sample, a dict of input_v",
        ),
        (
            {"decoder_input_ids": torch.ones(1, 4, dtype=torch.int64)},
            r"cannot be run on the samples of dataset, which have decoder_input_ids \(.*as model\(\*\*sample\) takes",
        ),
        (
            {"input_features": torch.ones(1, 8, 7), "decoder_input_ids": torch.ones(1, 4, dtype=torch.int64)},
            "cannot be run on the samples of dataset, which have input_features, decoder_input_ids .*length 100",
        ),
        (
            {"input_features": torch.ones(1, 8, 100), "decoder_input_ids": torch.full((1, 4), 300)},
            "gives token 300, but the embedding of WhisperForConditionalGeneration has 300 rows",
        ),
    ],
    ids=["nothing of it", "half of it", "shape", "token"],
)
def test_samples_that_the_model_does_not_take_are_refused_before_the_work(sample, sentence, quantize, tmp_path):
    with pytest.raises(ValueError, match=sentence) as caught:
        quantize(whisper().eval(), dataset=[sample], **CHEAP)
    assert "\n" not in str(caught.value) and not (tmp_path / "work").exists()


def test_one_bad_sample_among_many_is_named(quantize, tmp_path):
    model, samples = make_reader("sound and text")
    bad = {"input_features": torch.ones(1, 8, 7), "decoder_input_ids": torch.ones(1, 4, dtype=torch.int64)}
    config = {**CHEAP, "nsamples": 5, "e2e_finetune_epochs": 0}
    with pytest.raises(ValueError, match=r"A sample of dataset with .*input_features \(1, 8, 7\).* cannot be run"):
        quantize(model, dataset=[*samples, samples[0], bad], seed=3, **config)
    assert not list((tmp_path / "work").glob("block*"))


@pytest.mark.parametrize(("fields", "tokenizer"), [({}, None), ({"dataset": [TEXT]}, tiny_tokenizer())])
def test_text_alone_for_a_model_that_hears_says_what_to_give(fields, tokenizer, quantize):
    sentence = (
        "it reads input_features); give dataset a folder of sound files, a list of dicts, each as model(**sample)"
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        quantize(whisper().eval(), tokenizer=tokenizer, **fields)
