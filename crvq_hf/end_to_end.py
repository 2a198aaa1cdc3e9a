"""End-to-end fine-tuning: the whole quantized model towards the full-precision logits (CRVQ section 3.4)."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from . import distributed
from .blocks import BlockRunner
from .finetune import Trainer, distillation_loss, shuffled, tunable
from .workfolder import WorkFolder

CHECKPOINT_SECONDS = 300.0  # the state is saved this often
_NAME = "end_to_end"


def finetune_end_to_end_(
    runner: BlockRunner,
    batches: Sequence[Tensor],
    hidden: Sequence[Tensor],
    *,
    epochs: int,
    peak: float,
    seed: int,
    precision: Callable[[], AbstractContextManager],
    work: WorkFolder,
) -> tuple[dict[str, float], float]:
    """Tunes codebooks, scales, norms and biases of all blocks on KL(full precision || quantized).

    The teacher's logits are made from its last hidden states, which quantizing block by block has left: the
    full-precision weights are not needed any more.

    Args:
        runner: of the quantized model; the model is on the compute device, in fp32.
        batches: tokens, `[batch, seqlen]` each. Of several processes each has some, and empty ones in place of the
            others'.
        hidden: the full-precision model's last hidden states, `[batch, seqlen, hidden_size]` each.
        epochs: passes over the batches.
        peak: learning rate.
        seed: of the order of batches.
        precision: makes the context to run the model in.
        work: where the state is kept, so that a killed run goes on from it.

    Returns:
        The mean loss in nats over the first tenth of the steps and over the last: `{"first": ..., "last": ...}`.
        The seconds that all steps took, those before a kill counted.
    """
    model = runner.model
    device = next(model.parameters()).device
    order = shuffled(len(batches), epochs, seed)
    losses: list[float] = []
    with tunable(runner.blocks) as parameters:
        trainer = Trainer(parameters, len(order), peak)
        first, spent = _resume(work, trainer, losses)
        saved_at = time.monotonic()
        start = saved_at - spent
        bar = transformers_logging.tqdm(total=len(order), initial=first, desc="end-to-end fine-tuning", unit="step")
        for number in range(first, len(order)):
            index, loss = order[number], None
            if len(batches[index]):
                with precision():
                    teacher = runner.logits(hidden[index].to(device, torch.float32))
                    logits = model(input_ids=batches[index].to(device), use_cache=False).logits
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
