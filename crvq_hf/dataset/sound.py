"""Sound files to what a model hears: features of the sound, and what is said in it."""

from __future__ import annotations

import os
import wave
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from transformers import AutoFeatureExtractor, FeatureExtractionMixin, ProcessorMixin

SOUND = ("input_features", "input_values")  # what models that hear call what they hear
ENDS = (".wav", ".flac", ".ogg", ".mp3")
# Of each file; what speech models hear at once.
_MOST_SECONDS = 30


def sound_files(dataset: Any) -> list[Path] | None:
    """Returns the sound files of a `dataset`: of a folder, all in it, sorted; of a file or a list of them, these.

    Returns:
        None if it is something else.

    Raises:
        ValueError: a folder holds none, or sound files and texts are mixed in a list, or one of them is not there.
    """
    if isinstance(dataset, str) and os.path.isdir(dataset):
        found = sorted(path for path in Path(dataset).rglob("*") if path.suffix.lower() in ENDS)
        if not found:
            raise ValueError(
                f"dataset={dataset!r} is a folder without sound files ({', '.join(ENDS)}); give one with some, or "
                "where a model reads text the path of a text file, 'wikitext2', 'c4', 'self' or None (weights only)."
            )
        return found
    items = [dataset] if isinstance(dataset, str) else dataset
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        return None
    named = [item.lower().endswith(ENDS) and "\n" not in item for item in items]
    if not any(named):
        return None
    for item, is_sound in zip(items, named, strict=True):
        if not is_sound or not os.path.isfile(item):
            what = "is not there" if is_sound else "is none"
            raise ValueError(f"dataset has sound files, but {item!r:.80} {what}; give paths of sound files alone.")
    return [Path(item) for item in items]


def hear(files: list[Path], model: nn.Module, tokenizer: Any, options: dict[str, Any]) -> list[dict[str, Tensor]]:
    """Returns what a model is given of each sound file, the first 30 seconds of it.

    Args:
        files: of any rate and any number of channels. What is said in NAME.wav may be in NAME.txt beside it: then it
            is among the inputs as `labels`, for a model that writes.
        model: that is to hear them.
        tokenizer: its processor or its tokenizer; what is missing comes from where the model does.
        options: loading options of the model.

    Raises:
        ValueError: the model hears nothing, has no feature extractor, or a file cannot be read.
    """
    if model.main_input_name not in SOUND:
        raise ValueError(
            f"{type(model).__name__} reads {model.main_input_name}, and dataset has sound files; give text, or a list "
            "of dicts, each as model(**sample) takes it."
        )
    extractor, tokenizer = _processors(model, tokenizer, options)
    heard = []
    for file in files:
        sound = resampled(*read_sound(file), extractor.sampling_rate)
        found = extractor(sound.numpy(), sampling_rate=extractor.sampling_rate, return_tensors="pt")
        inputs = {name: value for name, value in found.items() if isinstance(value, Tensor)}
        said = file.with_suffix(".txt")
        if model.config.is_encoder_decoder and said.is_file():
            if tokenizer is None:
                raise ValueError(f"{said} has what is said in {file.name}, and no tokenizer was found to read it.")
            text = said.read_text(encoding="utf-8").strip()
            inputs["labels"] = torch.tensor([tokenizer(text)["input_ids"]])
        heard.append(inputs)
    return heard


def _processors(model: nn.Module, tokenizer: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    """Returns a model's feature extractor and its tokenizer, None if there is none.

    Raises:
        ValueError: there is no feature extractor.
    """
    if isinstance(tokenizer, ProcessorMixin):
        return tokenizer.feature_extractor, getattr(tokenizer, "tokenizer", None)
    if isinstance(tokenizer, FeatureExtractionMixin):
        return tokenizer, None
    try:
        return AutoFeatureExtractor.from_pretrained(model.name_or_path, **options), tokenizer
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"No feature extractor found at {model.name_or_path!r} to hear the sound files of dataset; pass the "
            "model's processor as tokenizer."
        ) from error


def read_sound(file: Path) -> tuple[Tensor, int]:
    """Returns the first seconds of a sound file, `[samples]`, fp32, -1 to 1, its channels' mean; and its rate in Hz.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        import soundfile
    except (ImportError, OSError):  # the library below it may be missing
        soundfile = None
    try:
        if soundfile is not None:
            rate = soundfile.info(file).samplerate
            values, _ = soundfile.read(file, frames=_MOST_SECONDS * rate, dtype="float32", always_2d=True)
        elif file.suffix.lower() == ".wav":
            values, rate = _read_wave(file)
        else:
            raise ValueError("that takes the package soundfile: pip install soundfile")
    except (OSError, EOFError, RuntimeError, ValueError, wave.Error) as error:  # whatever the readers raise
        more = " without the package soundfile" if isinstance(error, wave.Error) else ""
        raise ValueError(f"{file} cannot be read as sound{more} ({error}); repair it or take it out.") from error
    if not len(values):
        raise ValueError(f"{file} is a sound of no length; take it out.")
    return torch.from_numpy(values).mean(1), rate


def _read_wave(file: Path) -> tuple[numpy.ndarray, int]:
    """Returns the first seconds of a file of whole numbers, `[samples, channels]`, fp32; and its rate."""
    with wave.open(str(file)) as opened:
        rate, width, channels = opened.getframerate(), opened.getsampwidth(), opened.getnchannels()
        raw = numpy.frombuffer(opened.readframes(_MOST_SECONDS * rate), numpy.uint8).reshape(-1, width)
    wide = numpy.zeros((len(raw), 4), numpy.uint8)
    wide[:, 4 - width :] = raw ^ 0x80 if width == 1 else raw  # bytes alone are unsigned
    return (wide.view("<i4").reshape(-1, channels) / 2.0**31).astype(numpy.float32), rate


def resampled(sound: Tensor, rate: int, wanted: int) -> Tensor:
    """Returns a sound at another rate: its spectrum cut off, or continued by nothing.

    Args:
        sound: `[samples]`, fp32.
        rate: in Hz.
        wanted: in Hz.
    """
    if rate == wanted:
        return sound
    length = max(1, round(len(sound) * wanted / rate))
    return torch.fft.irfft(torch.fft.rfft(sound), n=length) * (length / len(sound))
