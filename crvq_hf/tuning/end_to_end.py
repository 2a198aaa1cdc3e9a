"""End-to-end fine-tuning: the whole quantized model towards the full-precision logits (CRVQ section 3.4)."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.utils import logging as transformers_logging

from ..blocks.runner import BlockRunner, Inputs, State, placed, run_on
from ..blocks.trees import map_tensors
from ..modeling.row_modules import Rows
from ..resources import distributed
from ..resources.workfolder import WorkFolder
from .losses import distillation_loss
from .tables import tunable_tables
from .trainer import Trainer, shuffled
from .tunable import frozen, tunable

logger = logging.getLogger("crvq")

CHECKPOINT_SECONDS = 300.0  # the state is saved this often
MEMORY_SHARE = 0.5  # of free memory for what the backward needs of all blocks; beyond it blocks are run twice
_NAME = "end_to_end"


def finetune_end_to_end_(
    runner: BlockRunner,
    states: Sequence[State],
    *,
    epochs: int,
    peak: float,
    seed: int,
    precision: Callable[[], AbstractContextManager],
    full_precision: Callable[[], AbstractContextManager],
    work: WorkFolder,
) -> tuple[dict[str, float], float]:
    """Tunes codebooks, scales, norms and biases on KL(full precision || quantized).

    Those of all blocks, and of embedding and head where these are codes. The teacher's logits are made from its last
    hidden states, which quantizing block by block has left: the full-precision blocks are not needed any more.

    Args:
        runner: of the quantized model; the model is on the compute device, in fp32.
        states: texts past the full-precision model's last block. Of several processes each has some, and empty ones in
            place of the others'.
        epochs: passes over the batches.
        peak: learning rate.
        seed: of the order of batches.
        precision: makes the context to run the model in.
        full_precision: makes the context in which embedding and head are those of the full-precision model.
        work: where the state is kept, so that a killed run goes on from it.

    Returns:
        The mean loss in nats over the first tenth of the steps and over the last: `{"first": ..., "last": ...}`.
        The seconds that all steps took, those before a kill counted.
    """
    model = runner.model
    device = next(model.parameters()).device
    order = shuffled(len(states), epochs, seed)
    losses: list[float] = []
    with (
        frozen(model),  # dense embeddings and heads too: nobody needs their gradients
        _cast_head(model, precision),
        tunable(runner.blocks) as parameters,
        tunable_tables(model) as others,
        _saving_memory(runner, states, precision),
    ):
        trainer = Trainer([*parameters, *others], len(order), peak)
        first, spent = _resume(work, trainer, losses)
        saved_at = time.monotonic()
        start = saved_at - spent
        bar = transformers_logging.tqdm(total=len(order), initial=first, desc="end-to-end fine-tuning", unit="step")
        for number in range(first, len(order)):
            index, loss = order[number], None
            if len(states[index]):
                with precision(), full_precision():
                    teacher = runner.logits(_on(device, states[index]))
                with precision():
                    logits = run_on(model, placed(states[index].inputs, next(model.parameters()))).logits
                loss = distillation_loss(logits, teacher)
            losses.append(trainer.step(number, loss))
            bar.update()
            bar.set_postfix_str(f"KL {_mean(losses[-16:]):.3f}")
            last = number + 1 == len(order)
            if last or distributed.first(lambda since=saved_at: time.monotonic() - since > CHECKPOINT_SECONDS):
                spent = time.monotonic() - start
                work.save(_NAME, trainer.state(), {"step": number + 1, "losses": losses, "seconds": spent})
                saved_at = time.monotonic()
        bar.close()
    part = max(1, len(losses) // 10)
    return {"first": _mean(losses[:part]), "last": _mean(losses[-part:])}, spent


@contextmanager
def _cast_head(model: nn.Module, precision: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Has the head in the dtype it computes in while inside: autocast would cast it at every use."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or isinstance(head, Rows):
        yield
        return
    weight, kind = head.weight, head.weight.device.type
    with precision():
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    head.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    try:
        yield
    finally:
        head.weight = weight


def _saving_memory(
    runner: BlockRunner, states: Sequence[State], precision: Callable[[], AbstractContextManager]
) -> AbstractContextManager:
    """Returns a context in which blocks are computed again for the backward, if memory is too small without that.

    Slower by the third that a second forward is; the result is the same, bit for bit.
    """
    step = next((state.inputs for state in states if len(state)), None)
    if step is None:
        return nullcontext()
    device = next(runner.model.parameters()).device
    needed = _saved_bytes(runner, step, precision) * len(runner.blocks)
    free = distributed.free_memory_bytes(device)
    if needed <= MEMORY_SHARE * free:
        return nullcontext()
    logger.info(
        "Blocks are computed twice a step: it would keep %.1f GB, %.1f GB are free.",
        *(needed / 1e9, free / 1e9),
    )
    return runner.recomputing()


def _on(device: torch.device, state: State) -> State:
    """Returns a state on `device`, numbers in fp32."""
    return State(
        state.inputs,
        map_tensors(state.gaves, lambda t: t.to(device, torch.float32 if t.is_floating_point() else t.dtype)),
    )


def _saved_bytes(runner: BlockRunner, inputs: Inputs, precision: Callable[[], AbstractContextManager]) -> int:
    """Returns the bytes that autograd keeps of one block for the backward, the model's own tensors aside."""
    own = {t.data_ptr() for t in (*runner.model.parameters(), *runner.model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    first = runner.order[0]
    arguments = runner.arguments(first, State(inputs))
    with precision(), saved_tensors_hooks(note, lambda tensor: tensor):
        output = runner.call(first, arguments)
    del output  # alive until here, so that no two tensors share an address
    return sum(kept.values())


def _resume(work: WorkFolder, trainer: Trainer, losses: list[float]) -> tuple[int, float]:
    """Puts a saved state, if there is one, into `trainer` and `losses`; returns the next step and seconds spent."""
    saved = work.load(_NAME)
    if saved is None:
        return 0, 0.0
    tensors, note = saved
    trainer.load_state(tensors)
    losses.extend(note["losses"])
    return note["step"], note["seconds"]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
