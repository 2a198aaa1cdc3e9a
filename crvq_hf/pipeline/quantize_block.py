"""One decoder block, stage by stage: Hessians, layers, and tuning of what is continuous after each stage."""

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ..algorithm.fit import fit_weight
from ..algorithm.hessian import HessianAccumulator
from ..blocks.finding import for_each_input, survey
from ..modeling.replace import linear_size, set_quantized_
from ..quantized_weight import to_stored
from ..resources import distributed
from ..resources.memory import give_back_freed_memory
from ..tuning.block import finetune_block_
from .block_state import load_block_
from .run import Run, check_finite
from .streams import Stream

logger = logging.getLogger("crvq")

LEARNING_RATE = 8e-3  # found by measurement on SmolLM2-135M (benchmarks/LOG.md)


def quantize_block_(run: Run, index: int, inputs: Stream | None, targets: Stream | None) -> None:
    """Quantizes the linears of a block stage by stage, each on what the quantized ones before it leave.

    After each stage the block is tuned: what is quantized in its codebooks, scales and norms, what is not yet in its
    weights ("error mitigation" in NanoQuant).

    Args:
        run: the run.
        index: which block.
        inputs: `nsamples` sequences past the quantized blocks before it; None: weights only.
        targets: these sequences, and maybe more, past the block in full precision.
    """
    block, names = run.blocks[index], run.linears[index]
    if inputs is None:

        def identity(name: str) -> Tensor:
            size, _ = linear_size(block.get_submodule(name))
            return torch.eye(size, dtype=torch.float32, device=run.device)

        _quantize_stage(run, index, [[name] for name in names], identity)
        return
    if not names:
        return
    stages, energies, repeated = distributed.first(
        lambda: survey(block, names, partial(run.run_block, index, inputs.part(0, 1)))
    )
    for number, stage in enumerate(stages):
        if number:  # what is still dense makes up for what is not any more
            later = [name for others in stages[number:] for group in others for name in group]
            _finetune_block(run, index, inputs, targets, later)
        start = time.perf_counter()
        energy = max(energies.get(name, 0.0) for group in stage for name in group)
        hessians = _hessians(run, index, [group[0] for group in stage], inputs, energy, repeated)
        run.timed("hessians", start)
        _quantize_stage(run, index, stage, lambda name, found=hessians: found.pop(name).hessian())
    _finetune_block(run, index, inputs, targets)


def _finetune_block(run: Run, index: int, inputs: Stream, targets: Stream, dense: Sequence[str] = ()) -> None:
    """Tunes what is continuous in a block, and the weights of its linears in `dense`, towards `targets`."""
    if not (run.config.block_finetune_epochs and run.runner.has_gradients):
        return
    give_back_freed_memory()
    start = time.perf_counter()
    finetune_block_(
        run.blocks[index],
        lambda state: run.run_block(index, state),
        inputs.steps(),
        [state.hidden if len(state) else torch.empty(0) for state in targets.steps(len(inputs))],
        epochs=run.config.block_finetune_epochs,
        peak=LEARNING_RATE,
        seed=run.config.seed + index,
        dense=dense,
    )
    run.timed("block fine-tuning", start)


def _quantize_stage(run: Run, index: int, stage: list[list[str]], hessian_of: Callable[[str], Tensor]) -> None:
    """Quantizes the linears of a stage, each in one of the processes, and puts them all in the block of each.

    Args:
        run: the run.
        index: which block.
        stage: groups of names that share a Hessian.
        hessian_of: returns it, by the first name of the group; called once for each.
    """
    block, names = run.blocks[index], [name for group in stage for name in group]
    sizes = {name: linear_size(block.get_submodule(name)) for name in names}
    mine = distributed.own({name: k * k * n for name, (k, n) in sizes.items()})
    for group in stage:
        hessian = hessian_of(group[0])
        check_finite(hessian, f"{run.names[index]}.{group[0]}", "calibration input")
        for name in group:
            if name in mine:
                _quantize_linear(run, index, name, hessian)
    _exchange_linears(run, index, names, mine)


def _exchange_linears(run: Run, index: int, names: list[str], mine: set[str]) -> None:
    """Gives the linears that this process has quantized to the others, and takes theirs."""
    block, found = run.blocks[index], {}
    full_names = {name: f"{run.names[index]}.{name}" for name in names}
    fitted = {name: block.get_submodule(name).quantized_weight() for name in mine}
    tensors = {name: {key: t.cpu() for key, t in weight.tensors().items()} for name, weight in fitted.items()}
    for part in distributed.gather({name: (tensors[name], run.layers.pop(full_names[name])) for name in mine}):
        found |= part
    load_block_(
        block,
        [name for name in names if name not in mine],
        {f"{name}.{key}": t for name, (own, _) in found.items() if name not in mine for key, t in own.items()},
        run.config,
        run.names[index],
        run.device,
    )
    run.layers.update({full_names[name]: found[name][1] for name in names})


def _hessians(
    run: Run, index: int, names: list[str], inputs: Stream, energy: float, repeated: set[str]
) -> dict[str, HessianAccumulator]:
    """Returns the Hessians of some linears of a block, by name, over the inputs in all processes.

    Args:
        run: the run.
        index: which block.
        names: of the linears.
        inputs: see `quantize_block_`.
        energy: see `HessianAccumulator`.
        repeated: see `for_each_input`.
    """
    block = run.blocks[index]
    sizes = {name: linear_size(block.get_submodule(name))[0] for name in names}
    hessians = {name: HessianAccumulator(size, energy, run.device) for name, size in sizes.items()}
    forwards = (partial(run.run_block, index, state) for state in inputs.states)
    for_each_input(block, names, lambda name, x: hessians[name].add(x), forwards, repeated)
    rows = distributed.gather({name: hessian.rows for name, hessian in hessians.items()})
    for name, hessian in hessians.items():
        hessian.rows = sum(counts[name] for counts in rows)
        distributed.sum_(hessian.quanta)
        if not hessian.is_exact:
            logger.warning(
                "The inputs of %s.%s grow too much to be summed exactly; the last bits of the result may depend on "
                "the number of processes.",
                *(run.names[index], name),
            )
    return hessians


def _quantize_linear(run: Run, index: int, name: str, hessian: Tensor) -> None:
    """Replaces one linear of a block by its quantized layer and notes how well it went."""
    give_back_freed_memory()
    start = time.perf_counter()
    block, full_name = run.blocks[index], f"{run.names[index]}.{name}"
    module = block.get_submodule(name)
    weight = module.weight.detach().to(run.device, torch.float32)
    weight = weight.T if isinstance(module, Conv1D) else weight
    shape = run.config.of_layer(full_name).layer_shape(weight.shape[1], weight.shape[0])
    seed = int.from_bytes(hashlib.sha256(f"{run.config.seed}:{full_name}".encode()).digest()[:7], "big")
    fitted = fit_weight(
        weight,
        hessian,
        **shape.fit_options,
        importance=run.config.importance,
        generator=torch.Generator().manual_seed(seed),
    )
    stored = to_stored(fitted, shape.nbits, shape.codebook_bits)
    set_quantized_(block, name, stored)
    run.timed("quantizing", start)
    run.layers[full_name] = {
        "relative_error": fitted.relative_error,
        "bits_per_weight": stored.bits_per_weight,
        "seconds": time.perf_counter() - start,
    }
