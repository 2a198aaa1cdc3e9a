"""The plan of a run: of a model in memory before it is quantized, or of a folder without loading it."""

from __future__ import annotations

import copy
import logging
import os
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ..blocks.absent import any_absent
from ..calibration.tokens import num_sequences
from ..checkpoint import blockwise
from ..checkpoint.sources import empty_dense
from ..config import CRVQConfig, has_samples
from ..planning.estimate import estimate
from ..planning.memory import Work
from ..planning.plan import Machine, Plan, plan_of
from ..planning.sizes import sizes_of
from ..resources import distributed
from ..resources.device import compute_device, has_fast_bfloat16
from ..tuning import end_to_end
from . import streams
from .fingerprint import WORK_FOLDERS

logger = logging.getLogger("crvq")


def plan(
    model: PreTrainedModel | str | os.PathLike, config: CRVQConfig | None = None, options: dict[str, Any] | None = None
) -> Plan:
    """Returns what quantizing a model would need, with an estimate of the time; nothing is loaded or quantized.

    Args:
        model: folder or hub id of a dense model, or one in memory.
        config: how to quantize, the defaults of `CRVQConfig` if None.
        options: loading options, as `revision`, `subfolder`, `trust_remote_code`.

    Returns:
        Bytes by phase; `lines()` has it in words, `check()` raises ValueError if something does not fit.

    Raises:
        ValueError, OSError: there is no such model, or it cannot be quantized.
    """
    config = CRVQConfig() if config is None else config
    if isinstance(model, PreTrainedModel):
        found = plan_of_model(model, config)
    else:
        empty = empty_dense(os.fspath(model), options)
        size = sum(parameter.nbytes for parameter in empty.parameters())
        is_absent = size > blockwise.MEMORY_SHARE * distributed.free_memory_bytes()
        found = _plan(empty, config, loaded=False, is_absent=is_absent)
    return replace(found, seconds=estimate(found.model, found.work, compute_device(config.device), config))


def plan_of_model(model: PreTrainedModel, config: CRVQConfig) -> Plan:
    """Returns what quantizing a model in memory will need, without the time."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        empty = type(model)(copy.deepcopy(model.config)).to(model.dtype).eval()
    return _plan(empty, config, loaded=True, is_absent=any_absent(model))


def check_plan(model: PreTrainedModel, config: CRVQConfig) -> None:
    """Logs the plan of a run that is about to begin; none is made of a model that is not built without numbers.

    Raises:
        ValueError: it does not fit.
    """
    try:
        found = plan_of_model(model, config)
    except Exception as error:  # whatever a model's own code raises on the meta device
        logger.info("What it will need is not known: there is no plan for %s (%s).", type(model).__name__, error)
        return
    for line in found.lines():
        logger.info("Plan: %s.", line)
    found.check()


def _plan(empty: PreTrainedModel, config: CRVQConfig, loaded: bool, is_absent: bool) -> Plan:
    """Returns the plan for a model on the meta device."""
    device = compute_device(config.device)
    sizes = sizes_of(empty, config)
    machine = Machine.here(device, config.work_dir or WORK_FOLDERS, loaded, is_absent)
    work = work_of(config, has_fast_bfloat16(device.type))
    return plan_of(sizes, work, machine, end_to_end.MEMORY_SHARE, streams.MEMORY_SHARE)


def work_of(config: CRVQConfig, bfloat16: bool) -> Work:
    """Returns how much a run is to do; of samples that are not text, as if each had `seqlen` tokens."""
    first = 0 if config.dataset is None else config.nsamples * config.seqlen
    step = config.seqlen * max(1, streams.STEP_TOKENS // config.seqlen)
    batch = step if has_samples(config.dataset) else step * max(1, streams.RUN_TOKENS // step)
    many = num_sequences(config) * config.seqlen if first else 0
    return Work(
        first=first,
        all=many,
        batch=min(batch, max(first, 1)),
        step=min(step, max(first, 1)),
        tunes_blocks=config.block_finetune_epochs > 0,
        tunes_end_to_end=config.e2e_finetune_epochs > 0,
        bfloat16=bfloat16,
        codes_embeddings=config.has_coded_embeddings,
    )
