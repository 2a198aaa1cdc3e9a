"""Sound files as calibration data: read, resampled, made into what a model hears, with what is said."""

import json

import pytest
import torch
import transformers
from samples import recordings, save_whisper, tone, whisper, write_wave
from tiny import TEXT, tiny_model, tiny_tokenizer
from whole_models import OFF, quantized_layers

from crvq_hf import CRVQConfig
from crvq_hf.calibration.samples import given_samples
from crvq_hf.checkpoint.sources import load
from crvq_hf.commands.convert import convert
from crvq_hf.dataset.grammar import shareable_dataset
from crvq_hf.dataset.sound import hear, read_sound, resampled, sound_files
from crvq_hf.pipeline.fingerprint import dataset_fingerprint

pytestmark = pytest.mark.usefixtures("precision", "quiet")


@pytest.fixture(scope="module")
def hearing(tmp_path_factory):
    """Folder of a tiny Whisper, its tokenizer and its feature extractor; tests must not change it."""
    return save_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.mark.parametrize("rate", [16000, 8000, 44100])
@pytest.mark.parametrize(("channels", "width"), [(1, 2), (2, 2), (1, 1), (2, 3), (1, 4)])
def test_a_tone_is_heard_at_any_rate(rate, channels, width, tmp_path):
    write_wave(tmp_path / "a.wav", 440, rate, channels, width)
    sound, found = read_sound(tmp_path / "a.wav")
    assert found == rate and sound.dtype == torch.float32 and len(sound) == rate // 2
    here = resampled(sound, rate, 16000)
    assert len(here) == 8000
    assert (here - tone(440, 16000))[100:-100].abs().max() < (0.02 if width == 1 else 0.005)


def test_only_the_first_seconds_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("crvq_hf.dataset.sound._MOST_SECONDS", 1)
    write_wave(tmp_path / "a.wav", 440, seconds=2)
    assert len(read_sound(tmp_path / "a.wav")[0]) == 16000


def test_recordings_become_a_quantized_whisper(hearing, tmp_path):
    folder, out = recordings(tmp_path / "recordings"), tmp_path / "out"
    fields = OFF | {"nbits_per_codebook": 4, "nsamples": 3, "seqlen": 8}
    report = convert(str(hearing), out, CRVQConfig(dataset=str(folder), **fields))
    assert len(report["layers"]) == 16 and report["calibration_tokens"] > 3 * 50
    stored = json.loads((out / "config.json").read_text())
    assert stored["architectures"] == ["WhisperForConditionalGeneration"]
    assert stored["quantization_config"]["dataset"] == "recordings"
    processor = transformers.AutoProcessor.from_pretrained(out)
    heard = processor.feature_extractor(tone(300, 16000).numpy(), sampling_rate=16000, return_tensors="pt")
    model = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(out)
    assert len(quantized_layers(model)) == 16
    assert model.generate(**heard, max_new_tokens=3, decoder_input_ids=torch.tensor([[0]])).shape[0] == 1
    assert convert(str(hearing), out, CRVQConfig(dataset=str(folder), **fields)) == report
    for source in (str(hearing), str(out)):
        with pytest.raises(ValueError, match="is a WhisperForConditionalGeneration, whose decoder writes about what"):
            load(source)
    write_wave(folder / "1.wav", 700)
    with pytest.raises(ValueError, match="the calibration data changed since"):
        convert(str(hearing), out, CRVQConfig(dataset=str(folder), **fields))


def test_what_is_said_is_what_the_decoder_reads(hearing, tmp_path):
    folder = recordings(tmp_path / "recordings")
    model = transformers.WhisperForConditionalGeneration.from_pretrained(hearing)
    samples = given_samples(model, tiny_tokenizer(), CRVQConfig(dataset=folder, nsamples=3), {})
    assert [sample["input_features"].shape for sample in samples] == [(1, 8, 100)] * 3
    (said,) = (sample["decoder_input_ids"] for sample in samples if len(sample) == 2)
    tokens = tiny_tokenizer()("the quick brown fox")["input_ids"]
    assert said.tolist() == [[0, *tokens[:-1]]]
    with pytest.raises(ValueError, match="0.txt has what is said in 0.wav, and no tokenizer was found to read it"):
        given_samples(model, None, CRVQConfig(dataset=folder, nsamples=3), {})


def test_a_processor_hears_what_was_never_on_a_disk(hearing, tmp_path):
    folder = recordings(tmp_path / "recordings")
    processor = transformers.AutoProcessor.from_pretrained(hearing)
    with pytest.raises(ValueError, match="No feature extractor found at '' .*pass the model's processor as tokenizer"):
        hear(sound_files(str(folder)), whisper(), None, {})
    assert [sample.keys() for sample in hear(sound_files(str(folder)), whisper(), processor, {})] == [
        {"input_features", "labels"},
        {"input_features"},
        {"input_features"},
    ]
    with pytest.raises(ValueError, match="no tokenizer was found"):
        hear(sound_files(str(folder)), whisper(), processor.feature_extractor, {})


def test_which_files_are_sound(tmp_path):
    folder = recordings(tmp_path / "recordings")
    paths = [str(folder / f"{number}.wav") for number in range(3)]
    assert [str(path) for path in sound_files(str(folder))] == paths == [str(p) for p in sound_files(paths)]
    assert [str(path) for path in sound_files(paths[0])] == paths[:1]
    for text in (None, "self", "wikitext2", str(folder / "0.txt"), [TEXT], "a.wav\nb.wav", [{"a": 1}]):
        assert sound_files(text) is None
    assert shareable_dataset(paths) == "3 files" and shareable_dataset([TEXT]) == "1 texts"
    before = dataset_fingerprint(str(folder))
    (folder / "1.txt").write_text("jugs")
    assert dataset_fingerprint(str(folder)) != before


def test_bad_sound(hearing, tmp_path):
    folder = recordings(tmp_path / "recordings")
    (tmp_path / "empty").mkdir()
    broken, silent = tmp_path / "broken.wav", tmp_path / "silent.wav"
    broken.write_bytes(b"RIFF")
    write_wave(silent, 440, rate=1)
    packed = tmp_path / "a.mp3"
    packed.write_bytes(b"ID3")
    model = transformers.WhisperForConditionalGeneration.from_pretrained(hearing)
    sentences = {
        str(tmp_path / "empty"): "is a folder without sound files",
        str(tmp_path / "missing.wav"): "is not there; give paths of sound files alone",
        (str(folder / "0.wav"), "some text"): "'some text' is none; give paths of sound files alone",
        str(broken): "broken.wav cannot be read as sound",
        str(silent): "silent.wav is a sound of no length",
        str(packed): "a.mp3 cannot be read as sound",
    }
    for dataset, sentence in sentences.items():
        dataset = list(dataset) if isinstance(dataset, tuple) else dataset
        with pytest.raises(ValueError, match=sentence) as caught:
            given_samples(model, None, CRVQConfig(dataset=dataset), {})
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="LlamaForCausalLM reads input_ids, and dataset has sound files; give text"):
        given_samples(tiny_model(), None, CRVQConfig(dataset=str(folder)), {})
