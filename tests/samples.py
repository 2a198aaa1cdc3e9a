"""Tiny random models that read something else than text, and samples for them."""

import math
import wave
from pathlib import Path

import torch
import transformers
from many_models import TWICE
from tiny import SIZES, tiny_tokenizer

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
    "initializer_range": 0.2,
}
WAVES = VISION | {
    "vocab_size": 32,
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
FRAMES = 100  # of a second


def whisper(**changes):
    fields = {"vocab_size": 300, "num_mel_bins": 8, "max_source_positions": FRAMES // 2, "max_target_positions": 64}
    fields |= {"encoder_layers": 1, "decoder_layers": 1, "init_std": 0.2}
    fields |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**TWICE | fields | changes))


def llava():
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION, projection_dim=32),
        text_config=transformers.LlamaConfig(**SIZES | {"initializer_range": 0.2}),
        image_token_index=63,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config)


def wav2vec2():
    return transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**WAVES))


def vit():
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VISION))


def _random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _tokens(length: int) -> torch.Tensor:
    return torch.randint(5, 60, (1, length), generator=torch.Generator().manual_seed(length))


def _with_image(length: int) -> dict[str, torch.Tensor]:
    tokens = _tokens(length)
    tokens[0, 1:5] = 63
    return {"input_ids": tokens, "pixel_values": _random(1, 3, 16, 16)}


# Models, and samples of different lengths where they take such.
READERS = {
    "sound and text": (
        whisper,
        [{"input_features": _random(1, 8, FRAMES), "decoder_input_ids": _tokens(n)} for n in (5, 9, 9)],
    ),
    "sound": (wav2vec2, [{"input_values": _random(1, n)} for n in (400, 700, 500)]),
    "images": (vit, [{"pixel_values": _random(n, 3, 16, 16)} for n in (2, 1, 2)]),
    "images and text": (llava, [_with_image(n) for n in (7, 12, 9)]),
}


def make_reader(kind: str):
    """Returns a model of `READERS` and its samples."""
    torch.manual_seed(0)
    model, samples = READERS[kind]
    return model().eval(), samples


def save_whisper(folder: Path) -> Path:
    """Saves a model, its tokenizer and its feature extractor in `folder`; returns that."""
    torch.manual_seed(0)
    whisper().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(folder)
    return folder


def tone(hertz: float, rate: int, seconds: float = 0.5) -> torch.Tensor:
    return 0.5 * torch.sin(2 * math.pi * hertz * torch.arange(int(seconds * rate)) / rate)


def write_wave(path: Path, hertz: float, rate: int = 16000, channels: int = 1, width: int = 2, seconds=0.5) -> None:
    """Writes a tone, of whole numbers of `width` bytes."""
    most = 2 ** (8 * width - 1) - 1
    numbers = (tone(hertz, rate, seconds).double() * most).round().long().repeat_interleave(channels).tolist()
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        raw = (bytes([n + 128]) if width == 1 else n.to_bytes(width, "little", signed=True) for n in numbers)
        file.writeframes(b"".join(raw))


def recordings(folder: Path) -> Path:
    """Makes a folder of three recordings, of the first of which is known what is said; returns it."""
    folder.mkdir()
    for number in range(3):
        write_wave(folder / f"{number}.wav", 300 * (number + 1))
    (folder / "0.txt").write_text("the quick brown fox\n", encoding="utf-8")
    return folder
