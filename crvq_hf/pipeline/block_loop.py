"""`quantize_blocks_`: a whole model, one decoder block on the compute device at a time, resumable.

Two streams of hidden states run through the blocks: those of the full-precision model, the targets, and those of the
quantized model, the inputs that every layer is calibrated on, so that later layers can make up for earlier ones.

Of several processes (see `distributed`) each has its share of the sequences in both streams, and fits some of the
layers of a stage. All have the same blocks, those that one process alone would make; the first writes.
"""

import logging
import time
from collections.abc import Callable, Container
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from ..blocks.absent import bring_, present
from ..blocks.finding import kind_of, named_blocks
from ..blocks.rehearsal import rehearse
from ..blocks.runner import BlockRunner, Gave, Inputs, State
from ..calibration.samples import SHORT, completed
from ..calibration.tokens import calibration_tokens
from ..config import CRVQConfig
from ..modeling.linear import CRVQLinear
from ..modeling.replace import quantizable_linears, unmatched_patterns
from ..resources import distributed
from ..resources.device import compute_device, has_fast_bfloat16, peak_memory_bytes
from ..resources.memory import give_back_freed_memory
from ..resources.workfolder import WorkFolder
from ..tuning.end_to_end import finetune_end_to_end_
from .block_state import dtypes_of, load_block_, restore_dtypes_, tunable_state
from .fingerprint import default_work_dir, run_fingerprint
from .quantize_block import quantize_block_
from .run import Run, check_finite
from .streams import Samples, Stream, num_elements, share, start_streams
from .tables import code_embeddings_

logger = logging.getLogger("crvq")

E2E_LEARNING_RATE = 2e-3  # found by measurement on SmolLM2-135M (benchmarks/LOG.md)


def quantize_blocks_(
    model: nn.Module, tokenizer: Any, config: CRVQConfig, samples: list[Inputs], dense_rows: Container[str] = ()
) -> dict[str, Any]:
    """Quantizes the linears of a model's decoder blocks in place.

    Args:
        model: a causal language model in eval mode, on one device.
        tokenizer: for calibration text; see `calibration_tokens`.
        config: see `CRVQConfig`. Without `work_dir`, finished blocks go to a folder under the Hugging Face cache.
        samples: to calibrate on instead of text, see `given_samples`; none for text.
        dense_rows: names of an embedding and a head that have to stay dense.

    Returns:
        The report, JSON-able, also left at `model.crvq_report`: `bits_per_weight` (stored bits over the quantized
        layers, order counted), `layers` (`relative_error`, `bits_per_weight`, `seconds` by name), `seconds` by phase,
        `tokens_per_second` (of text through all blocks, an epoch after the other, by phase that takes it there),
        `calibration_tokens` and `e2e_tokens` (how many were used before and in end-to-end fine-tuning; where the
        samples are no text, how many hidden states),
        `activation_bytes`, `peak_memory_bytes` (of several processes, of this one), `e2e_loss`.

    Raises:
        ValueError: no layer to quantize, no usable calibration text, NaN in weights or activations, a work folder of
            another run, too little memory or disk for the activations.
    """
    device = compute_device(config.device)
    names = list(named_blocks(model))
    linears, _ = quantizable_linears(model, config)
    for field in ("modules_to_not_convert", "overrides"):
        for pattern in unmatched_patterns(model, getattr(config, field)):
            logger.warning("%s: %r matches no module of %s.", field, pattern, type(model).__name__)
    if not linears:
        raise ValueError(f"{type(model).__name__} has no layer to quantize; check modules_to_not_convert.")
    by_block = [[n.removeprefix(f"{block}.") for n in linears if n.startswith(f"{block}.")] for block in names]
    del linears  # or dense layers would be kept, in fp32, when they have been replaced
    _check_weights(named_blocks(model), by_block)
    runner = None
    if config.dataset is not None:
        runner = rehearse(model, completed(model, samples[:3], SHORT, device))
    fingerprint = run_fingerprint(model, tokenizer, config, samples)
    if runner is not None:
        _tell_what_is_left_out(runner, names)
    with WorkFolder(config.work_dir or default_work_dir(fingerprint), fingerprint) as work:
        logger.info("Finished blocks are kept in %s.", work.path)
        bfloat16 = _precision(work, device)
        blocks = nn.ModuleList(model.get_submodule(name) for name in names)
        run = Run(model, config, device, bfloat16, by_block, names, blocks, work, runner)
        start = time.perf_counter()
        samples = _calibration(run, tokenizer, samples)
        run.timed("calibration", start)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            report = _quantize(run, samples, tokenizer, dense_rows)
        work.finish()
        if config.work_dir is None:
            logger.warning(
                "The work folder %s (%.1f MB) is kept, for the same run again; crvq doctor --clean removes it.",
                *(work.path, work.nbytes() / 1e6),
            )
    model.crvq_report = report
    return report


def _quantize(run: Run, samples: Samples | None, tokenizer: Any, dense_rows: Container[str]) -> dict[str, Any]:
    """Quantizes all blocks, then embedding and head, then fine-tunes end to end; returns the report."""
    full, quantized = (None, None) if samples is None else start_streams(run.runner, samples, run.config, run.work)
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
    if run.config.has_coded_embeddings:
        code_embeddings_(run, samples, tokenizer, dense_rows)
    losses, e2e_tokens = None, 0
    tunes = samples is not None and run.config.e2e_finetune_epochs and run.runner.has_gradients
    if tunes and run.runner.has_head:
        chosen = samples[: run.config.e2e_nsamples or None]
        e2e_tokens = _num_tokens(run, chosen)
        losses = _finetune_end_to_end(run, full.steps(len(share(chosen))))
    calibration_tokens = 0 if samples is None else _num_tokens(run, samples[: run.config.nsamples])
    passed = {
        "hessians": calibration_tokens,
        "block fine-tuning": run.config.block_finetune_epochs * calibration_tokens,
        "end-to-end fine-tuning": run.config.e2e_finetune_epochs * e2e_tokens,
    }
    return {
        "bits_per_weight": _bits(run),
        "layers": run.layers,
        "seconds": run.seconds,
        "tokens_per_second": {
            phase: tokens / run.seconds[phase] for phase, tokens in passed.items() if run.seconds.get(phase)
        },
        "calibration_tokens": calibration_tokens,
        "e2e_tokens": e2e_tokens,
        "activation_bytes": activation_bytes,
        "peak_memory_bytes": peak_memory_bytes(),
        "e2e_loss": losses,
    }


def _num_tokens(run: Run, samples: Samples) -> int:
    """Returns how many tokens samples have, or how many hidden states if they are no text."""
    return round(num_elements(samples) * (run.runner.positions if isinstance(samples, list) else 1))


def _tell_what_is_left_out(runner: BlockRunner, names: list[str]) -> None:
    """Logs which steps a model has no use for."""
    unseen = sorted({*range(len(runner.blocks))} - {*runner.order})
    if unseen:
        which = ", ".join(names[index] for index in unseen)
        logger.warning("No text reaches %s: quantized on weights alone, without calibration.", which)
    kind = type(runner.model).__name__
    if not runner.has_gradients:
        logger.warning("Autograd cannot follow the blocks of %s: there is no fine-tuning.", kind)
    elif not runner.has_head:
        logger.warning("%s has no language model head: there is no end-to-end fine-tuning.", kind)


def _block_file(index: int) -> str:
    """Returns the name of a finished block in the work folder."""
    return f"block_{index:04d}"


def _tell(run: Run, index: int) -> None:
    """Logs the relative errors of a block's layers, experts of one kind taken together, and the bits they take."""
    kinds: dict[str, list[float]] = {}
    for name in run.linears[index]:
        kinds.setdefault(kind_of(name), []).append(run.layers[f"{run.names[index]}.{name}"]["relative_error"])
    errors = ", ".join(f"{kind.rpartition('.')[2]} {sum(e) / len(e):.3f}" for kind, e in kinds.items())
    logger.info("%s: relative error %s.", run.names[index], errors or "none, no layer to quantize")


def _bits(run: Run) -> float:
    """Returns the stored bits per weight over all layers quantized so far."""
    layers = [module for module in run.blocks.modules() if isinstance(module, CRVQLinear)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    return sum(8 * layer.quantized_weight().nbytes for layer in layers) / max(1, weights)


def _advance(run: Run, index: int, full: Stream | None, quantized: Stream | None) -> None:
    """Quantizes one block, or takes it from the work folder, and moves both streams past it, in place."""
    block, name = run.blocks[index], _block_file(index)
    bring_(block)
    home = next(block.parameters()).device
    dtypes = dtypes_of(block)
    block.to(run.device, torch.float32)
    if full is not None and index not in run.runner.order:
        full = quantized = None  # text does not come here
    if full is not None:
        _move_stream(run, index, full)
    saved = run.work.load(name)
    if saved is None:
        quantize_block_(run, index, quantized, full)
        restore_dtypes_(block, dtypes)
        lines = {key: run.layers[f"{run.names[index]}.{key}"] for key in run.linears[index]}
        run.work.save(name, tunable_state(block), {"layers": lines, "seconds": run.seconds})
    else:
        tensors, note = saved
        lines, run.seconds = note["layers"], note["seconds"]
        load_block_(block, run.linears[index], tensors, run.config, run.names[index], run.device)
        restore_dtypes_(block, dtypes)
        run.layers.update({f"{run.names[index]}.{key}": line for key, line in lines.items()})
    if quantized is not None:
        block.to(run.device, torch.float32)
        _move_stream(run, index, quantized)
        restore_dtypes_(block, dtypes)
    block.to(home)
    give_back_freed_memory()


@torch.no_grad()
def _move_stream(run: Run, index: int, stream: Stream) -> None:
    """Moves a stream past block `index`."""
    start = time.perf_counter()
    call = partial(run.call_block, index)
    stream.move(index, partial(_naming_the_sample, call) if isinstance(stream.samples, list) else call)
    for state in stream.states:
        check_finite(state.hidden, f"{run.names[index]}", "output")
    run.timed("running blocks", start)


def _naming_the_sample(call: Callable[[State], Gave], state: State) -> Gave:
    """Runs a block; says which sample the model does not take. The first block is before all that takes long."""
    try:
        return call(state)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model raises
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in state.inputs.items())
        raise ValueError(
            f"A sample of dataset with {shapes} cannot be run ({type(error).__name__}: "
            f"{' '.join(str(error).split()):.200}); take it out, or make it like those that can."
        ) from error


def _finetune_end_to_end(run: Run, states: list[State]) -> dict[str, float]:
    """Tunes the whole model on the compute device; returns first and last loss."""
    home = next(run.model.parameters()).device
    dtypes = dtypes_of(run.model)
    for module in run.model.children():  # the model itself refuses to be cast once it is quantized
        module.to(run.device, torch.float32)
    for part in run.dense_parts.values():
        part.to(run.device, torch.float32)
    losses, run.seconds["end-to-end fine-tuning"] = finetune_end_to_end_(
        run.runner,
        states,
        epochs=run.config.e2e_finetune_epochs,
        peak=E2E_LEARNING_RATE,
        seed=run.config.seed,
        precision=run.precision,
        full_precision=run.full_precision,
        work=run.work,
    )
    restore_dtypes_(run.model, dtypes)
    run.model.to(home)
    return losses


def _calibration(run: Run, tokenizer: Any, samples: list[Inputs]) -> Samples | None:
    """Returns what to calibrate on; that of the work folder if this run has chosen it before."""
    saved = run.work.load("calibration")
    if samples:
        if saved is None:
            config, device = run.config, run.device
            samples = distributed.first(lambda: completed(run.model, samples, config.seqlen, device))
            flat = {f"{i}.{name}": t.clone() for i, inputs in enumerate(samples) for name, t in inputs.items()}
            run.work.save("calibration", flat)
            return samples
        for key, tensor in saved[0].items():
            number, _, name = key.partition(".")
            samples[int(number)][name] = tensor
        return samples
    if saved is not None:
        return saved[0].get("tokens")
    model = run.model if run.runner is None else run.runner.model
    tokens = distributed.first(lambda: calibration_tokens(model, tokenizer, run.config))
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
def _check_weights(blocks: dict[str, nn.Module], linears: list[list[str]]) -> None:
    """Raises ValueError naming the first layer with NaN or infinite weights."""
    for (path, block), names in zip(blocks.items(), linears, strict=True):
        with present(block):
            for name in names:
                check_finite(block.get_submodule(name).weight, f"{path}.{name}", "weight")
