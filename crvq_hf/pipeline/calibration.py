"""Calibration text to tokens, from wherever the user has text, or from the model itself."""

import os
import random
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin
from transformers.utils import logging as transformers_logging

from ..blocks.absent import any_absent
from ..checkpoint.sources import load_tokenizer
from ..config import CRVQConfig, has_samples, split_field
from ..resources import distributed
from ..resources.device import compute_device
from .sound import sound_files
from .text import check_tokens, drawn_tokens, longest_text, read_text

_HUB_DATASETS = ("wikitext2", "c4")
# Sequences of end-to-end fine-tuning over `nsamples`, where the config leaves their number open.
OPEN_E2E_FACTOR = 6
# Sequences sampled together when the model writes its own text.
_WRITING_BATCH = 32
# Of a device's free memory, for the model to write there.
_MEMORY_SHARE = 0.5


def calibration_tokens(model: nn.Module, tokenizer: Any, config: CRVQConfig) -> Tensor | None:
    """Returns the calibration tokens, `[sequences, seqlen]`, int64, on the CPU; None for `dataset=None`.

    Args:
        model: the full-precision model; it writes the text when `dataset` is `"self"`.
        tokenizer: a transformers tokenizer; not needed for `"self"` and None.
        config: its `dataset`, `seqlen`, `seed` and what `num_sequences` counts are used.

    Raises:
        ValueError: no tokenizer or another model's, no such file or dataset, too little text, sequences longer than
            the model takes, or a model that does not write text.
    """
    if config.dataset is None:
        return None
    longest = longest_text(model)
    if longest is not None and config.seqlen > longest:
        raise ValueError(f"seqlen={config.seqlen} is more than the {longest} tokens the model takes; lower seqlen.")
    if config.dataset == "self":
        if any_absent(model):
            raise ValueError(
                f"The weights of {type(model).__name__} do not fit in memory, and to write a token it would read all "
                "of them, so it cannot write its own calibration text; give dataset the path of a text file."
            )
        with moved_if_it_fits(model, compute_device(config.device)):
            return self_written_tokens(model, num_sequences(config), config.seqlen, config.seed)
    if tokenizer is None:
        raise ValueError(f"dataset={config.dataset!r:.80} is text and needs a tokenizer; pass tokenizer=...")
    if config.dataset in _HUB_DATASETS and not Path(config.dataset).exists():
        tokens = _hub_tokens(config.dataset, tokenizer, config)
    else:
        tokens = _windows(_read(config.dataset), tokenizer, config)
    check_tokens(model, tokens)
    return tokens


def tokenizer_for(model: PreTrainedModel, config: CRVQConfig, tokenizer: Any, options: dict[str, Any]) -> Any:
    """Returns the tokenizer for the calibration text, or None where there is none and none is needed.

    Args:
        model: has it by default.
        config: says whether there is a text.
        tokenizer: a tokenizer, the name of one, or None.
        options: loading options of the model.

    Raises:
        ValueError: there is none.
    """
    if has_samples(config.dataset) or (tokenizer is None and config.dataset is None):
        return None
    hears = sound_files(config.dataset) is not None
    if isinstance(tokenizer, ProcessorMixin) and not hears:
        tokenizer = tokenizer.tokenizer
    if tokenizer is not None and not isinstance(tokenizer, (str, os.PathLike)):
        return tokenizer
    name = tokenizer or model.name_or_path
    problem = None
    if name:
        try:
            return load_tokenizer(name, model.name_or_path, options)
        except (OSError, ValueError, KeyError) as error:
            problem = error
    if tokenizer is None and (hears or config.dataset == "self"):
        return None  # the model can write tokens without one
    raise ValueError(
        f"No tokenizer found at {str(name)!r} to read the calibration text; pass CRVQConfig(tokenizer=...)."
    ) from problem


def num_sequences(config: CRVQConfig, available: int | None = None) -> int:
    """Returns how many calibration sequences a run needs: as many as the step that uses most of them.

    Args:
        config: its `nsamples`, `e2e_nsamples` and `e2e_finetune_epochs` are used.
        available: how many sequences the text has; counts only where the config leaves the number open.
    """
    if not config.e2e_finetune_epochs:
        return config.nsamples
    if config.e2e_nsamples:
        return max(config.nsamples, config.e2e_nsamples)
    wanted = OPEN_E2E_FACTOR * config.nsamples
    return wanted if available is None else max(config.nsamples, min(wanted, available))


def check_dataset(dataset: Any) -> None:
    """Raises ValueError if `dataset` is the path of no file, or as `sound_files`."""
    named = dataset is None or dataset in ("self", *_HUB_DATASETS)
    if named or sound_files(dataset) or isinstance(dataset, list):
        return
    if not Path(split_field(dataset)[0]).is_file():
        raise ValueError(
            f"dataset={dataset!r} is no file; give the path of a text file (of a table: path:field), a folder of "
            "sound files, a list of texts, 'wikitext2', 'c4', 'self' (the model writes its own) or None (weights "
            "only)."
        )


def _read(dataset: str | list[str]) -> str:
    """Returns the calibration text of a path or of a list of texts.

    Raises:
        ValueError: there is no such file, it holds no text (see `read_text`), or there is nothing in it.
    """
    check_dataset(dataset)
    text = "".join(read_text(dataset))
    if not text.strip():
        raise ValueError("The calibration text is empty; give some, or dataset='self' (the model writes its own).")
    return text


def _windows(text: str, tokenizer: Any, config: CRVQConfig) -> Tensor:
    """Returns `num_sequences` non-overlapping windows of the text's tokens, drawn at random."""
    wanted = num_sequences(config)
    tokens, is_all = drawn_tokens(tokenizer, text, wanted * config.seqlen, config.seqlen, config.seed)
    available = len(tokens) // config.seqlen
    needed = num_sequences(config, available) if is_all else wanted
    if available < needed:
        field = "nsamples" if needed == config.nsamples else "e2e_nsamples"
        raise ValueError(
            f"The calibration text has {len(tokens)} tokens, but {field}={needed} of seqlen={config.seqlen} "
            f"need {needed * config.seqlen}; give more text or lower {field} or seqlen."
        )
    generator = torch.Generator().manual_seed(config.seed)
    chosen = torch.randperm(available, generator=generator, device="cpu")[:needed]
    return tokens[: available * config.seqlen].view(available, config.seqlen)[chosen]


@contextmanager
def _kept_random_state():
    """Leaves the global random states of Python, numpy and torch as they were."""
    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])


def _hub_tokens(name: str, tokenizer: Any, config: CRVQConfig) -> Tensor:
    """Returns windows of the training split of a hub dataset, through optimum's loader.

    Raises:
        ValueError: the dataset cannot be had (no network, no `datasets`).
    """
    from optimum.gptq.data import get_dataset

    try:
        with _kept_random_state():  # the loader seeds all of them
            samples = get_dataset(
                name, tokenizer, nsamples=num_sequences(config), seqlen=config.seqlen, seed=config.seed, split="train"
            )
    except Exception as error:  # whatever datasets, the hub client or the network raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"dataset={name!r} could not be loaded from the hub ({reason:.200}); "
            "give the path of a text file, or dataset='self' (the model writes its own text)."
        ) from error
    return torch.cat([sample["input_ids"] for sample in samples]).cpu()


@contextmanager
def _plain_sampling(model: nn.Module):
    """Makes `model.generate` draw from the model's own distribution, whatever its generation config says.

    Nothing ends a sequence: after an end token the model goes on with another text, as in its training data.
    """
    before = model.generation_config
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0)
    try:
        yield
    finally:
        model.generation_config = before


@contextmanager
def moved_if_it_fits(model: nn.Module, device: torch.device):
    """Has the whole model on `device` while inside, unless that has too little free memory, or the CPU has."""
    home = model.device
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if any_absent(model) or device.type == home.type or size > _MEMORY_SHARE * distributed.free_memory_bytes(device):
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to(home)


@torch.no_grad()
def self_written_tokens(model: nn.Module, nsamples: int, seqlen: int, seed: int) -> Tensor:
    """Returns `[nsamples, seqlen]` tokens that the model samples from its own distribution.

    Sequences start with the model's start token, or with a random token where it has none.

    Raises:
        ValueError: it does not write text.
    """
    if not (isinstance(model, PreTrainedModel) and model.can_generate()) or model.config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} does not write text, so not its own calibration text either; "
            "give dataset the path of a text file or a list of texts, or None (weights only)."
        )
    vocabulary = model.get_input_embeddings().num_embeddings
    first = getattr(model.config.get_text_config(), "bos_token_id", None)
    if first is not None and not 0 <= first < vocabulary:  # some configs name a token that is not there
        first = None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        shape = (nsamples, 1)
        if first is None:
            starts = torch.randint(vocabulary, shape, device="cpu")
        else:
            starts = torch.full(shape, first, dtype=torch.int64, device="cpu")
        if seqlen == 1:
            return starts
        bar = transformers_logging.tqdm(
            starts.split(_WRITING_BATCH), desc="writing calibration text", unit="batch", leave=False
        )
        with _plain_sampling(model):
            written = [
                model.generate(
                    start.to(model.device),
                    attention_mask=torch.ones_like(start).to(model.device),
                    max_new_tokens=seqlen - 1,
                ).cpu()
                for start in bar
            ]
    return torch.cat(written)
