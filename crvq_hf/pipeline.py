"""`quantize_blocks_`: a whole model, one decoder block on the compute device at a time, resumable.

Two streams of hidden states run through the blocks: those of the full-precision model, the targets, and those of the
quantized model, the inputs that every layer is calibrated on, so that later layers can make up for earlier ones.

Of several processes (see `distributed`) each has its share of the sequences in both streams, and fits some of the
layers of a stage. All have the same blocks, those that one process alone would make; the first writes.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from . import distributed
from .block_state import dtypes_of, load_block_, restore_dtypes_, tunable_state
from .blocks import BlockRunner, find_blocks, for_each_input, kind_of, survey
from .calibration import calibration_tokens
from .config import CRVQConfig
from .device import compute_device, has_fast_bfloat16, mixed_precision, peak_memory_bytes
from .end_to_end import finetune_end_to_end_
from .finetune import finetune_block_
from .fingerprint import default_work_dir, run_fingerprint
from .hessian import HessianAccumulator
from .linear import CRVQLinear
from .quantize import fit_weight
from .quantized_weight import to_stored
from .replace import linear_size, quantizable_linears, set_quantized_
from .streams import batches, embed, share, steps
from .workfolder import WorkFolder

logger = logging.getLogger("crvq")

# Found by measurement on SmolLM2-135M (benchmarks/LOG.md).
BLOCK_LEARNING_RATE = 8e-3
E2E_LEARNING_RATE = 2e-3


@dataclass
class _Run:
    """What one run needs everywhere.

    Attributes:
        model: being quantized.
        config: how.
        device: compute device.
        bfloat16: whether blocks run in mixed precision.
        linears: names of the layers to quantize, relative to their block, by block.
        blocks_name: the name of `blocks` in the model.
        blocks: the decoder blocks.
        work: the work folder.
        runner: runs the blocks; None without calibration text.
        layers: report lines by layer name.
        seconds: time by phase, what went on before this run was killed and is kept counted.
    """

    model: nn.Module
    config: CRVQConfig
    device: torch.device
    bfloat16: bool
    linears: list[list[str]]
    blocks_name: str
    blocks: nn.ModuleList
    work: WorkFolder
    runner: BlockRunner | None = None
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def timed(self, phase: str, start: float) -> None:
        """Adds the time since `start` to a phase."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def precision(self) -> AbstractContextManager:
        """Returns the context that blocks are run and trained in."""
        return mixed_precision(self.device, self.bfloat16)

    def run_block(self, index: int, hidden: Tensor) -> Tensor:
        """Returns the output of a block that is on the compute device, fp32."""
        with self.precision():
            return self.runner.run(index, hidden.to(self.device, torch.float32), self.device).float()


def quantize_blocks_(model: nn.Module, tokenizer: Any, config: CRVQConfig) -> dict[str, Any]:
    """Quantizes the linears of a model's decoder blocks in place.

    Args:
        model: a causal language model in eval mode, on one device.
        tokenizer: for calibration text; see `calibration_tokens`.
        config: see `CRVQConfig`. Without `work_dir`, finished blocks go to a folder under the Hugging Face cache.

    Returns:
        The report, JSON-able, also left at `model.crvq_report`: `bits_per_weight` (stored bits over the quantized
        layers, order counted), `layers` (`relative_error`, `bits_per_weight`, `seconds` by name), `seconds` by phase,
        `calibration_tokens` and `e2e_tokens` (how many were used before and in end-to-end fine-tuning),
        `activation_bytes`, `peak_memory_bytes` (of several processes, of this one), `e2e_loss`.

    Raises:
        ValueError: no layer to quantize, no usable calibration text, NaN in weights or activations, a work folder of
            another run, too little memory or disk for the activations.
    """
    device = compute_device(config.device)
    blocks_name, blocks = find_blocks(model)
    linears, skipped = quantizable_linears(model, config)
    for name, reason in skipped.items():
        logger.warning("%s stays dense: %s.", name, reason)
    if not linears:
        raise ValueError(f"{type(model).__name__} has no layer to quantize; check modules_to_not_convert.")
    prefixes = [f"{blocks_name}.{i}." for i in range(len(blocks))]
    by_block = [[n.removeprefix(p) for n in linears if n.startswith(p)] for p in prefixes]
    _check_weights(linears)
    fingerprint = run_fingerprint(model, tokenizer, config)
    with WorkFolder(config.work_dir or default_work_dir(fingerprint), fingerprint) as work:
        logger.info("Finished blocks are kept in %s.", work.path)
        bfloat16 = _precision(work, device)
        run = _Run(model, config, device, bfloat16, by_block, blocks_name, blocks, work)
        start = time.perf_counter()
        tokens = _calibration(run, tokenizer)
        run.timed("calibration", start)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            report = _quantize(run, tokens)
    model.crvq_report = report
    return report


def _quantize(run: _Run, tokens: Tensor | None) -> dict[str, Any]:
    """Quantizes all blocks, then fine-tunes end to end; returns the report."""
    run.runner = None if tokens is None else BlockRunner(run.model)
    full, quantized = (None, None) if tokens is None else embed(run.runner, tokens, run.config, run.work)
    activation_bytes = sum(distributed.gather(0 if full is None else full.nbytes + quantized.nbytes))
    finished = sum(run.work.has(_block_file(index)) for index in range(len(run.blocks)))
    if finished:
        logger.info("%d of %d blocks are finished already; going on from there.", finished, len(run.blocks))
    if finished == len(run.blocks):
        quantized = None  # nothing is left to calibrate
    bar = transformers_logging.tqdm(range(len(run.blocks)), desc="quantizing", unit="block")
    for index in bar:
        _advance(run, index, full, quantized)
        if index >= finished:
            _tell(run, index)
        bar.set_postfix_str(f"{_bits(run):.3f} bits")
    del quantized
    losses, e2e_tokens = None, 0
    if tokens is not None and run.config.e2e_finetune_epochs:
        chosen = tokens[: run.config.e2e_nsamples or None]
        e2e_tokens = chosen.numel()
        own = share(chosen)
        losses = _finetune_end_to_end(run, own, full[: len(own)])
    return {
        "bits_per_weight": _bits(run),
        "layers": run.layers,
        "seconds": run.seconds,
        "calibration_tokens": 0 if tokens is None else tokens[: run.config.nsamples].numel(),
        "e2e_tokens": e2e_tokens,
        "activation_bytes": activation_bytes,
        "peak_memory_bytes": peak_memory_bytes(),
        "e2e_loss": losses,
    }


def _block_file(index: int) -> str:
    """Returns the name of a finished block in the work folder."""
    return f"block_{index:04d}"


def _tell(run: _Run, index: int) -> None:
    """Logs the relative errors of a block's layers, experts of one kind taken together, and the bits they take."""
    kinds: dict[str, list[float]] = {}
    for name in run.linears[index]:
        kinds.setdefault(kind_of(name), []).append(run.layers[f"{run.blocks_name}.{index}.{name}"]["relative_error"])
    errors = ", ".join(f"{kind.rpartition('.')[2]} {sum(e) / len(e):.3f}" for kind, e in kinds.items())
    logger.info("%s.%d: relative error %s.", run.blocks_name, index, errors or "none, no layer to quantize")


def _bits(run: _Run) -> float:
    """Returns the stored bits per weight over all layers quantized so far."""
    layers = [module for module in run.blocks.modules() if isinstance(module, CRVQLinear)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    return sum(8 * layer.quantized_weight().nbytes for layer in layers) / max(1, weights)


def _advance(run: _Run, index: int, full: Tensor | None, quantized: Tensor | None) -> None:
    """Quantizes one block, or takes it from the work folder, and moves both streams past it, in place."""
    block, name = run.blocks[index], _block_file(index)
    home = next(block.parameters()).device
    dtypes = dtypes_of(block)
    block.to(run.device, torch.float32)
    if full is not None:
        _move_stream(run, index, full)
    saved = run.work.load(name)
    if saved is None:
        _quantize_block(run, index, quantized, full if full is None else full[: len(quantized)])
        restore_dtypes_(block, dtypes)
        lines = {key: run.layers[f"{run.blocks_name}.{index}.{key}"] for key in run.linears[index]}
        run.work.save(name, tunable_state(block), {"layers": lines, "seconds": run.seconds})
    else:
        tensors, note = saved
        lines, run.seconds = note["layers"], note["seconds"]
        load_block_(block, run.linears[index], tensors, run.config, run.device)
        restore_dtypes_(block, dtypes)
        run.layers.update({f"{run.blocks_name}.{index}.{key}": line for key, line in lines.items()})
    if quantized is not None:
        block.to(run.device, torch.float32)
        _move_stream(run, index, quantized)
        restore_dtypes_(block, dtypes)
    block.to(home)


@torch.no_grad()
def _move_stream(run: _Run, index: int, stream: Tensor) -> None:
    """Overwrites hidden states before block `index` with those after it."""
    start = time.perf_counter()
    for hidden in batches(stream):
        hidden.copy_(run.run_block(index, hidden))
    _check_finite(stream, f"{run.blocks_name}.{index}", "output")
    run.timed("running blocks", start)


def _quantize_block(run: _Run, index: int, inputs: Tensor | None, targets: Tensor | None) -> None:
    """Quantizes the linears of a block stage by stage, each on what the quantized ones before it leave.

    After each stage the block is tuned: what is quantized in its codebooks, scales and norms, what is not yet in its
    weights ("error mitigation" in NanoQuant).

    Args:
        run: the run.
        index: which block.
        inputs: what the quantized blocks before it hand on, `[nsamples, seqlen, hidden_size]`; None: weights only.
        targets: the full-precision model's hidden states after it, for as many sequences.
    """
    block, names = run.blocks[index], run.linears[index]
    if inputs is None:

        def identity(name: str) -> Tensor:
            return torch.eye(linear_size(block.get_submodule(name))[0], device=run.device)

        _quantize_stage(run, index, [[name] for name in names], identity)
        return
    if not names:
        return
    stages, energies = distributed.first(lambda: survey(block, names, partial(run.run_block, index, inputs[:1])))
    for number, stage in enumerate(stages):
        if number:  # what is still dense makes up for what is not any more
            later = [name for others in stages[number:] for group in others for name in group]
            _finetune_block(run, index, inputs, targets, later)
        start = time.perf_counter()
        energy = max(energies.get(name, 0.0) for group in stage for name in group)
        hessians = _hessians(run, index, [group[0] for group in stage], inputs, energy)
        run.timed("hessians", start)
        _quantize_stage(run, index, stage, lambda name, found=hessians: found.pop(name).hessian())
    _finetune_block(run, index, inputs, targets)


def _finetune_block(run: _Run, index: int, inputs: Tensor, targets: Tensor, dense: Sequence[str] = ()) -> None:
    """Tunes what is continuous in a block, and the weights of its linears in `dense`, towards `targets`."""
    if not run.config.block_finetune_epochs:
        return
    start = time.perf_counter()
    finetune_block_(
        run.blocks[index],
        lambda hidden: run.run_block(index, hidden),
        steps(inputs),
        steps(targets),
        epochs=run.config.block_finetune_epochs,
        peak=BLOCK_LEARNING_RATE,
        seed=run.config.seed + index,
        dense=dense,
    )
    run.timed("block fine-tuning", start)


def _quantize_stage(run: _Run, index: int, stage: list[list[str]], hessian_of: Callable[[str], Tensor]) -> None:
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
        _check_finite(hessian, f"{run.blocks_name}.{index}.{group[0]}", "calibration input")
        for name in group:
            if name in mine:
                _quantize_linear(run, index, name, hessian)
    _exchange_linears(run, index, names, mine)


def _exchange_linears(run: _Run, index: int, names: list[str], mine: set[str]) -> None:
    """Gives the linears that this process has quantized to the others, and takes theirs."""
    block, found = run.blocks[index], {}
    full_names = {name: f"{run.blocks_name}.{index}.{name}" for name in names}
    fitted = {name: block.get_submodule(name).quantized_weight() for name in mine}
    tensors = {name: {key: t.cpu() for key, t in weight.tensors().items()} for name, weight in fitted.items()}
    for part in distributed.gather({name: (tensors[name], run.layers.pop(full_names[name])) for name in mine}):
        found |= part
    load_block_(
        block,
        [name for name in names if name not in mine],
        {f"{name}.{key}": t for name, (own, _) in found.items() if name not in mine for key, t in own.items()},
        run.config,
        run.device,
    )
    run.layers.update({full_names[name]: found[name][1] for name in names})


def _hessians(run: _Run, index: int, names: list[str], inputs: Tensor, energy: float) -> dict[str, HessianAccumulator]:
    """Returns the Hessians of some linears of a block, by name, over the inputs in all processes.

    Args:
        run: the run.
        index: which block.
        names: of the linears.
        inputs: see `_quantize_block`.
        energy: see `HessianAccumulator`.
    """
    block = run.blocks[index]
    sizes = {name: linear_size(block.get_submodule(name))[0] for name in names}
    hessians = {name: HessianAccumulator(size, energy, run.device) for name, size in sizes.items()}
    forwards = (partial(run.run_block, index, hidden) for hidden in batches(inputs))
    for_each_input(block, names, lambda name, x: hessians[name].add(x), forwards)
    rows = distributed.gather({name: hessian.rows for name, hessian in hessians.items()})
    for name, hessian in hessians.items():
        hessian.rows = sum(counts[name] for counts in rows)
        distributed.sum_(hessian.quanta)
        if not hessian.is_exact:
            logger.warning(
                "The inputs of %s.%d.%s grow too much to be summed exactly; the last bits of the result may depend on "
                "the number of processes.",
                *(run.blocks_name, index, name),
            )
    return hessians


def _quantize_linear(run: _Run, index: int, name: str, hessian: Tensor) -> None:
    """Replaces one linear of a block by its quantized layer and notes how well it went."""
    start = time.perf_counter()
    block, full_name = run.blocks[index], f"{run.blocks_name}.{index}.{name}"
    module = block.get_submodule(name)
    weight = module.weight.detach().to(run.device, torch.float32)
    weight = weight.T if isinstance(module, Conv1D) else weight
    shape = run.config.layer_shape(weight.shape[1], weight.shape[0])
    seed = int.from_bytes(hashlib.sha256(f"{run.config.seed}:{full_name}".encode()).digest()[:7], "big")
    fitted = fit_weight(
        weight,
        hessian,
        in_group_size=shape.in_group_size,
        codebook_size=shape.codebook_size,
        num_extended_codebooks=shape.num_codebooks - 1,
        num_critical_groups=shape.num_critical_groups,
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


def _finetune_end_to_end(run: _Run, tokens: Tensor, hidden: Tensor) -> dict[str, float]:
    """Tunes the whole model on the compute device; returns first and last loss."""
    home = next(run.model.parameters()).device
    dtypes = dtypes_of(run.model)
    for module in run.model.children():  # the model itself refuses to be cast once it is quantized
        module.to(run.device, torch.float32)
    losses, run.seconds["end-to-end fine-tuning"] = finetune_end_to_end_(
        run.runner,
        steps(tokens),
        steps(hidden),
        epochs=run.config.e2e_finetune_epochs,
        peak=E2E_LEARNING_RATE,
        seed=run.config.seed,
        precision=run.precision,
        work=run.work,
    )
    restore_dtypes_(run.model, dtypes)
    run.model.to(home)
    return losses


def _calibration(run: _Run, tokenizer: Any) -> Tensor | None:
    """Returns the calibration tokens; those of the work folder if this run has chosen them before."""
    saved = run.work.load("calibration")
    if saved is not None:
        return saved[0].get("tokens")
    tokens = distributed.first(lambda: calibration_tokens(run.model, tokenizer, run.config))
    run.work.save("calibration", {} if tokens is None else {"tokens": tokens})
    return tokens


def _precision(work: WorkFolder, device: torch.device) -> bool:
    """Returns whether to run blocks in bfloat16: as this run began, else whether it is fast here."""
    saved = work.load("precision")
    if saved is None:
        saved = {}, {"bfloat16": distributed.first(lambda: has_fast_bfloat16(device.type))}
        work.save("precision", *saved)
    return saved[1]["bfloat16"]


@torch.no_grad()
def _check_weights(linears: dict[str, nn.Module]) -> None:
    """Raises ValueError naming the first layer with NaN or infinite weights."""
    for name, module in linears.items():
        _check_finite(module.weight, name, "weight")


def _check_finite(tensor: Tensor, name: str, what: str) -> None:
    if not tensor.isfinite().all():
        raise ValueError(
            f"The {what} of {name} holds NaN or infinite values; check the model, or load it with dtype=torch.float32 "
            "if half precision overflows."
        )
