"""Calibration text to tokens, from wherever the user has text, or from the model itself."""

import os
import random
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin
from transformers.utils import logging as transformers_logging

from ..blocks.absent import any_absent
from ..checkpoint.sources import load_tokenizer
from ..config import CRVQConfig
from ..dataset.grammar import Source, has_samples, sources_of
from ..dataset.sound import sound_files
from ..resources import distributed
from ..resources.device import compute_device
from .text import check_tokens, drawn_tokens, longest_text, read_text, streamed_tokens

# Sequences of end-to-end fine-tuning over `nsamples`, where the config leaves their number open.
OPEN_E2E_FACTOR = 6
# Tokens that are looked at to see which are frequent, where the text has as many.
_COUNTED_TOKENS = 2**18
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
    sources = [None] if isinstance(config.dataset, list) else sources_of(config.dataset)
    if any_absent(model) and any(source is not None and source.kind == "self" for source in sources):
        raise ValueError(
            f"The weights of {type(model).__name__} do not fit in memory, and to write a token it would read all "
            "of them, so it cannot write its own calibration text; give dataset the path of a text file."
        )
    if tokenizer is None and any(source is None or source.kind != "self" for source in sources):
        raise ValueError(f"dataset={config.dataset!r:.80} is text and needs a tokenizer; pass tokenizer=...")
    check_dataset(config.dataset)
    order = _interleaved([1.0 if source is None else source.share for source in sources], num_sequences(config))
    found = [_sequences(model, tokenizer, config, source, order.count(index)) for index, source in enumerate(sources)]
    left, rows = [iter(sequences) for sequences, _ in found], []
    for index in order:
        row = next(left[index], None)
        if row is None:
            break
        rows.append(row)
    needed = num_sequences(config, len(rows))
    if len(rows) < needed:
        what = "The calibration text" if len(found) == 1 else sources[index].name
        field = "nsamples" if needed == config.nsamples else "e2e_nsamples"
        share = "" if len(found) == 1 else f" with a share of {sources[index].share:g}"
        raise ValueError(
            f"{what} has {found[index][1]} tokens, but {field}={needed} of seqlen={config.seqlen}{share} need "
            f"{order[:needed].count(index) * config.seqlen}; give more text or lower {field} or seqlen."
        )
    tokens = torch.stack(rows[:needed])
    check_tokens(model, tokens)
    return tokens


def counted_tokens(tokenizer: Any, config: CRVQConfig) -> Tensor | None:
    """Returns more tokens of a calibration text, int64, to see which are frequent; None where there is no text."""
    dataset = config.dataset
    is_text = isinstance(dataset, (str, list)) and not has_samples(dataset) and not sound_files(dataset)
    sources = sources_of(dataset) if is_text and isinstance(dataset, str) else [None]
    if tokenizer is None or not is_text or any(source is not None and source.kind != "file" for source in sources):
        return None
    whole = sum(1.0 if source is None else source.share for source in sources)
    found = []
    for source in sources:
        most = int(_COUNTED_TOKENS * (1.0 if source is None else source.share) / whole)
        read = partial(read_text, dataset if source is None else source.spelled, tokenizer)
        found.append(drawn_tokens(tokenizer, read, most, config.seqlen, config.seed)[0])
    return torch.cat(found)


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
    """Raises ValueError if a `dataset` names a file that is not there, as `sources_of`, or as `sound_files`.

    What lies on the hub is not asked for.
    """
    if dataset is None or sound_files(dataset) or isinstance(dataset, list):
        return
    for source in sources_of(dataset):
        if source.kind == "file" and not os.path.isfile(source.name):
            part = "" if source.name == dataset else f": {source.name!r}"
            raise ValueError(
                f"dataset={dataset!r}{part} is no file; give the path of a text file (of a table: path:field), a "
                "dataset of the hub (owner/name:config:split:field), a mixture (a.txt:0.7,b.txt:0.3), a folder of "
                "sound files, a list of texts, 'wikitext2', 'c4', 'self' (the model writes its own) or None (weights "
                "only)."
            )


def _interleaved(shares: list[float], number: int) -> list[int]:
    """Returns `number` places of sources, so many of each as its share says, also in every beginning."""
    counts, order = [0] * len(shares), []
    for taken in range(1, number + 1):
        behind = [share / sum(shares) * taken - count for share, count in zip(shares, counts, strict=True)]
        order.append(behind.index(max(behind)))
        counts[order[-1]] += 1
    return order


def _sequences(
    model: nn.Module, tokenizer: Any, config: CRVQConfig, source: Source | None, number: int
) -> tuple[Tensor, int]:
    """Returns sequences of one source, `[number, seqlen]` or fewer, and how many tokens it has, if there are fewer.

    Args:
        source: None for a list of texts.
        number: how many.
        model, tokenizer, config: as for `calibration_tokens`.

    Raises:
        ValueError: the source cannot be read, or there is nothing in it.
    """
    if not number:
        return torch.empty(0, config.seqlen, dtype=torch.int64), 0
    if source is not None and source.kind in ("self", "optimum"):
        if source.kind == "optimum":
            sequences = _hub_tokens(source.name, tokenizer, config, number)
        else:
            with moved_if_it_fits(model, compute_device(config.device)):
                sequences = self_written_tokens(model, number, config.seqlen, config.seed)
        return sequences, sequences.numel()
    limits = number * config.seqlen, config.seqlen, config.seed
    if source is not None and source.kind == "dataset":
        tokens, _ = streamed_tokens(source, tokenizer, *limits)
    else:
        read = partial(read_text, config.dataset if source is None else source.spelled, tokenizer)
        if not any(piece.strip() for piece in read()):
            raise ValueError("The calibration text is empty; give some, or dataset='self' (the model writes its own).")
        tokens, _ = drawn_tokens(tokenizer, read, *limits)
    available = len(tokens) // config.seqlen
    generator = torch.Generator().manual_seed(config.seed)
    chosen = torch.randperm(available, generator=generator, device="cpu")[:number]
    return tokens[: available * config.seqlen].view(available, config.seqlen)[chosen], len(tokens)


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


def _hub_tokens(name: str, tokenizer: Any, config: CRVQConfig, number: int) -> Tensor:
    """Returns windows of the training split of a hub dataset, through optimum's loader.

    Raises:
        ValueError: the dataset cannot be had (no network, no `datasets`).
    """
    from optimum.gptq.data import get_dataset

    try:
        with _kept_random_state():  # the loader seeds all of them
            samples = get_dataset(
                name, tokenizer, nsamples=number, seqlen=config.seqlen, seed=config.seed, split="train"
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
