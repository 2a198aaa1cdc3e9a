"""Embeddings and heads in fewer than 8 bits, made after the blocks: before them, the blocks come out worse."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Container, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..algorithm.hessian import damped
from ..blocks.finding import Done
from ..calibration.tokens import counted_tokens
from ..modeling.embedding import answer_dtypes_, distinct_tables, find_embeddings, set_rows_, tell_dense
from ..modeling.table import TableShape
from ..resources import distributed
from .block_state import dtypes_of, restore_dtypes_
from .run import Run, check_finite
from .streams import Samples, Stream
from .table_fit import fit_table

logger = logging.getLogger("crvq")

LEAST_TOKENS = 4096  # that the Hessian of a head is made on, but four for each channel where that is more
DAMPING = 1.0  # share of the mean diagonal of a head's Hessian; most of what tokens need is not in a calibration text
_NAME = "embeddings"


def code_embeddings_(run: Run, samples: Samples | None, tokenizer: Any, leave: Container[str]) -> None:
    """Puts the embedding and the head of a run's model into codes; `run.dense_parts` has what they were.

    Args:
        run: the run; its blocks are quantized, embedding and head still dense.
        samples: calibration samples of all processes; None: weights only.
        tokenizer: for more of a calibration text, to see which tokens are frequent.
        leave: names of parts that have to stay dense.

    Raises:
        ValueError: their weights hold NaN or infinite values, or such that float16 cannot scale.
    """
    start, bits = time.perf_counter(), run.config.embedding_bits
    found = find_embeddings(run.model, bits, leave)
    tell_dense(run.model, found, bits)
    tables = distinct_tables(run.model, found)
    saved = run.work.load(_NAME)
    tensors = distributed.first(lambda: _fit_all(run, tables, samples, tokenizer)) if saved is None else saved[0]
    if saved is None:
        run.work.save(_NAME, tensors)
    for names in tables:
        for name in names:
            run.dense_parts[name] = copy.copy(run.model.get_submodule(name))
            run.dense_parts[name]._parameters = dict(run.dense_parts[name]._parameters)  # they are taken away
        own = {key.removeprefix(f"{names[0]}."): t for key, t in tensors.items() if key.startswith(f"{names[0]}.")}
        place_table_(run.model, names, own)
    run.timed("embeddings", start)


def place_table_(model: nn.Module, names: Sequence[str], tensors: dict[str, Tensor]) -> None:
    """Puts the tensors of a table, floating ones in the dtype of the model, in the place of dense parts of a model."""
    weight = model.get_submodule(names[0]).weight
    dtypes = {key: weight.dtype if t.is_floating_point() else t.dtype for key, t in tensors.items()}
    set_rows_(model, names, {key: t.to(weight.device, dtypes[key]) for key, t in tensors.items()})
    answer_dtypes_(model)  # some cast hidden states to `lm_head.weight.dtype`, in tuning too


def _fit_all(
    run: Run, tables: dict[tuple[str, ...], Tensor], samples: Samples | None, tokenizer: Any
) -> dict[str, Tensor]:
    """Returns the tensors of all tables, each name after that of the part which stores it; on the CPU."""
    text = counted_tokens(tokenizer, run.config)
    counts, tensors = _token_counts(samples if text is None else text), {}
    for names, weight in tables.items():
        weight = weight.to(run.device, torch.float32)
        check_finite(weight, names[0], "weight")
        identity = torch.eye(weight.shape[1], device=run.device)
        heads = [name for name in names if not isinstance(run.model.get_submodule(name), nn.Embedding)]
        hessian = _head_hessian(run, heads[0], samples) if heads and samples is not None else None
        if hessian is not None:
            check_finite(hessian, heads[0], "calibration input")
        metric = identity if hessian is None else damped(hessian, DAMPING)
        shape = TableShape(*weight.shape, run.config.embedding_bits)
        seed = torch.Generator().manual_seed(run.config.seed)
        try:
            table, error = fit_table(weight, metric, counts, shape, seed)
        except ValueError as cause:
            why = str(cause).partition(";")[0].rstrip(".")
            raise ValueError(
                f"{names[0]} cannot be stored in {shape.bits:g} bits ({why}); check its weights, or leave it with "
                "embedding_bits=16."
            ) from None
        logger.info("%s in %g bits: relative error %.4f.", " and ".join(names), shape.bits, error)
        tensors |= {f"{names[0]}.{key}": tensor.cpu().contiguous() for key, tensor in table.tensors().items()}
    return tensors


def _token_counts(samples: Samples | None) -> Tensor:
    """Returns how often each token is in calibration samples, int64."""
    if samples is None:
        return torch.zeros(0, dtype=torch.int64)
    texts = samples if isinstance(samples, list) else [{"input_ids": samples}]
    tokens = [t.flatten() for inputs in texts for name, t in inputs.items() if name.endswith(("input_ids", "labels"))]
    tokens = torch.cat([torch.zeros(0, dtype=torch.int64), *(t.cpu() for t in tokens if not t.is_floating_point())])
    return torch.bincount(tokens[tokens >= 0])


@torch.no_grad()
def _head_hessian(run: Run, name: str, samples: Samples) -> Tensor | None:
    """Returns `X^T X / tokens` of the inputs that a head has behind the quantized blocks; None if it has none."""
    head, total, tokens = run.model.get_submodule(name), None, 0
    wanted = max(LEAST_TOKENS, 4 * head.weight.shape[1])

    def add(module: nn.Module, args: tuple) -> None:
        nonlocal total, tokens
        x = args[0].detach().reshape(-1, head.weight.shape[1]).to(run.device, torch.float32)
        total, tokens = x.T @ x + (0 if total is None else total), tokens + len(x)
        raise Done

    count = run.config.nsamples if isinstance(samples, list) else -(-wanted // samples.shape[1])
    stream = Stream(run.runner, samples[: min(count, run.config.nsamples)])
    for index in run.runner.order:
        block = run.blocks[index]
        home, dtypes = next(block.parameters()).device, dtypes_of(block)
        block.to(run.device, torch.float32)
        stream.move(index, partial(run.call_block, index))
        restore_dtypes_(block, dtypes)
        block.to(home)
    hook = head.register_forward_pre_hook(add)
    try:
        for state in stream.states:
            run.runner.output(state)
    finally:
        hook.remove()
    return None if total is None else total / max(1, tokens)
