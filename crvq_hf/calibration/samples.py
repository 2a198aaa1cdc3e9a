"""Calibration samples that are not text: what a model's forward takes, given or made of sound files."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin

from ..blocks.runner import Inputs, placed
from ..config import CRVQConfig
from ..dataset.grammar import has_samples
from ..dataset.sound import hear, sound_files
from .text import check_tokens, longest_text
from .tokens import moved_if_it_fits, num_sequences

logger = logging.getLogger("crvq")

SHORT = 8  # tokens that are written for a sample that is only tried
_IGNORED = -100  # a label that does not count


def given_samples(model: nn.Module, tokenizer: Any, config: CRVQConfig, options: dict[str, Any]) -> list[Inputs]:
    """Returns the samples of `config.dataset` that a run needs, drawn at random, each a batch; none if it is text.

    Labels become what the decoder of an encoder-decoder model reads, and are left out elsewhere.

    Args:
        model: that they are for.
        tokenizer: for sound files, see `hear`.
        config: its `dataset`, `seed` and what `num_sequences` counts are used.
        options: loading options of the model.

    Raises:
        ValueError: as `sound_files` and `hear`; a token that the model does not have, or too many of them.
    """
    files = sound_files(config.dataset)
    items = config.dataset if files is None else files
    if files is None and not has_samples(config.dataset):
        return []
    wanted = num_sequences(config, len(items))
    if len(items) < config.nsamples:
        logger.warning("dataset has %d samples, fewer than nsamples=%d; all are used.", len(items), config.nsamples)
    generator = torch.Generator().manual_seed(config.seed)
    chosen = [items[i] for i in torch.randperm(len(items), generator=generator, device="cpu")[:wanted].tolist()]
    samples = [
        _without_labels(model, inputs)
        for inputs in (chosen if files is None else hear(chosen, model, tokenizer, options))
    ]
    for inputs in samples:
        for name in ("input_ids", "decoder_input_ids"):
            if name in inputs:
                check_tokens(model, inputs[name])
    return samples


def _without_labels(model: nn.Module, inputs: Inputs) -> Inputs:
    """Returns inputs without `labels`, which make a model compute its loss."""
    labels = inputs.get("labels")
    kept = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    if labels is None or not model.config.is_encoder_decoder or "decoder_input_ids" in kept:
        return kept
    first, pad = _first_token(model), getattr(model.config, "pad_token_id", None) or 0
    labels = labels.masked_fill(labels == _IGNORED, pad)
    if (labels[:, 0] == first).all():  # Whisper's tokenizer puts it there
        labels = labels[:, 1:]
    starts = torch.full((len(labels), 1), first, dtype=labels.dtype)
    return kept | {"decoder_input_ids": torch.cat([starts, labels[:, :-1]], 1)}


def _first_token(model: nn.Module) -> int:
    """Returns the token that a decoder starts with."""
    configs = (getattr(model, "generation_config", None), model.config)
    tokens = [getattr(c, name, None) for name in ("decoder_start_token_id", "bos_token_id") for c in configs]
    return next((token for token in tokens if isinstance(token, int)), 0)


@torch.no_grad()
def completed(model: nn.Module, samples: list[Inputs], most: int, device: torch.device) -> list[Inputs]:
    """Returns samples with what the model itself writes for them, where it has a decoder that was given nothing.

    Args:
        model: in full precision.
        samples: see `given_samples`.
        most: tokens it writes at most, the first counted; it also stops at its end token.
        device: to write on, if the model fits there.

    Raises:
        ValueError: it cannot write anything.
    """
    if not model.config.is_encoder_decoder or not isinstance(model, GenerationMixin):
        return samples
    longest = getattr(model.config, "max_target_positions", None) or longest_text(model) or most
    end = getattr(model.generation_config, "eos_token_id", None)
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max(1, min(most, longest) - 1),
        decoder_start_token_id=_first_token(model),
        eos_token_id=end,
        pad_token_id=(end[0] if isinstance(end, list) else end) or 0,
    )

    def write(inputs: Inputs) -> Tensor:
        own = model.generation_config
        model.generation_config = settings
        try:  # Whisper's own goes through a recording in pieces, and takes settings of its own
            given = placed(inputs, next(model.parameters()))
            return GenerationMixin.generate(model, **given, generation_config=settings).cpu()
        except Exception as error:  # whatever a model raises that is not given what it reads
            raise ValueError(
                f"{type(model).__name__} cannot write what its decoder is to read for a sample, a dict of "
                f"{', '.join(inputs)} ({type(error).__name__}: {' '.join(str(error).split()):.160}); give each sample "
                "as model(**sample) takes it, decoder_input_ids too."
            ) from error
        finally:
            model.generation_config = own

    with moved_if_it_fits(model, device):
        return [
            inputs if any(name.startswith("decoder_input") for name in inputs) or inputs.keys() == {"input_ids"}
            else inputs | {"decoder_input_ids": write(inputs)}
            for inputs in samples
        ]  # fmt: skip
