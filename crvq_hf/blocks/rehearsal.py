"""`rehearse`: whether the blocks of a model, run one at a time, give what they give in the model itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..dataset.sound import SOUND
from .absent import present
from .finding import find_block_lists, named_blocks
from .runner import Arguments, BlockRunner, Inputs, Leaf, State, placed, replaced_forwards, run_on
from .trees import hidden_of, map_tensors, tensors_of

logger = logging.getLogger("crvq")

_SEQLEN = 8
_TOLERANCE = 1e-2  # relative; the same operations on the same numbers, so what differs at all differs by far more


class _Record(NamedTuple):
    """What a run of a whole model has shown: the blocks it runs, their hidden states, its output."""

    inputs: Inputs
    order: list[int]
    outputs: list[Tensor]
    output: Any


@torch.no_grad()
def rehearse(model: nn.Module, samples: Sequence[Inputs] = ()) -> BlockRunner:
    """Returns a runner of a model's blocks, after it has given what the model gives on three batches of a few tokens.

    Two of them are different texts of one shape, the third has more texts.

    Args:
        model: in evaluation mode; it is run as it is, where it is.
        samples: what the whole model is to be run on instead of text. They may be of any shapes, and are never cut.

    Raises:
        ValueError: the model cannot be run on text alone, or on `samples`, runs a block more than once, or hands on
            something from block to block that cannot be kept.
    """
    kind, lists = type(model).__name__, find_block_lists(model)
    named = named_blocks(model)
    names, blocks = list(named), nn.ModuleList(named.values())
    run, records = _records(model, list(lists)[-1], blocks, samples)
    order = records[0].order
    if any(record.order != order for record in records) or order != sorted(set(order)):
        again = next((index for position, index in enumerate(order) if index in order[:position]), None)
        how = "does not run them one after the other" if again is None else f"runs {names[again]} more than once"
        raise ValueError(
            f"The blocks of {kind} cannot be calibrated one by one, it {how} in one pass; "
            "use dataset=None (weights only)."
        )
    which = [number for number, blocks in enumerate(lists.values()) for _ in blocks]
    names = [f"{kind}: {name}" for name in names]
    is_text = not samples
    try:
        return _rehearsed(BlockRunner(run, blocks, which, order, keeps_all=False), records, names, is_text)
    except ValueError:  # later blocks do need what it did not keep
        return _rehearsed(BlockRunner(run, blocks, which, order, keeps_all=True), records, names, is_text)


def _rehearsed(runner: BlockRunner, records: list[_Record], names: list[str], is_text: bool) -> BlockRunner:
    """Returns `runner` with what running its blocks one by one tells about them, compared with `records`."""
    states = [State(record.inputs) for record in records]
    for number, index in enumerate(runner.order):
        with present(runner.blocks[index]):
            arguments = _step(runner, number, states, records, names[index])
            runner.has_gradients &= _has_gradient(runner, index, arguments)
        with _refusing(names[index]):
            runner.leaves[index] = _leaves(states[0], states[-1]) if is_text else _whole_leaves(states)
            for state in states:
                _count_bytes(runner, state)
    for record, state in zip(records, states, strict=True):
        with _refusing(f"{names[0]} and the rest of it"):
            _compare(hidden_of(runner.output(state)), hidden_of(record.output))
    logits = getattr(records[0].output, "logits", None)
    head = runner.model.get_output_embeddings() if isinstance(runner.model, PreTrainedModel) else None
    inputs = records[0].inputs
    tokens = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    is_by_position = logits is not None and logits.dim() == 3 and (tokens is None or logits.shape[:2] == tokens.shape)
    runner.has_head = head is not None and is_by_position
    hidden = [hidden_of(gave.output) for gave in states[0].gaves]
    runner.positions = sum(h.numel() / h.shape[-1] for h in hidden) / _elements(states[0])
    return runner


def _step(runner: BlockRunner, number: int, states: list[State], records: list[_Record], name: str) -> Arguments:
    """Moves all states past the block that is run as the `number`-th, in place; returns what it was given last."""
    index = runner.order[number]
    for which, record in enumerate(records):
        with _refusing(name):
            arguments = runner.arguments(index, states[which])
            if record is records[-1]:
                runner.call(index, arguments)  # as it will be called more than once: that must change nothing
            gave = runner.call(index, arguments)
            _compare(hidden_of(gave.output), record.outputs[number])
            states[which] = states[which].then(gave, runner.lists[index])
    return arguments


def _records(
    model: nn.Module, name: str, blocks: nn.ModuleList, samples: Sequence[Inputs]
) -> tuple[nn.Module, list[_Record]]:
    """Returns what is run (on text the outermost model around the blocks that takes it), and what runs have shown.

    Raises:
        ValueError: there is none, or the model cannot be run on `samples`.
    """
    parts = name.split(".")
    around = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
    if samples or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        around = [model]  # a decoder without its encoder sees something else
    problem: Exception | None = None
    for candidate in around:
        if candidate is not model and not isinstance(candidate, PreTrainedModel):
            continue
        try:
            records = [_record(candidate, blocks, inputs) for inputs in samples or _probes(candidate)]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model raises that misses its images, say
            problem = problem or error
            continue
        if records[0].order:
            if problem is not None:
                logger.warning(
                    "%s is calibrated as the %s inside of it: it cannot be run on text alone (%s).",
                    *(type(model).__name__, type(candidate).__name__, _words(problem)),
                )
            return candidate, records
    if samples:
        why = f"they do not reach {name}" if problem is None else _words(problem)
        raise ValueError(
            f"{type(model).__name__} cannot be run on the samples of dataset, which have {', '.join(samples[0])} "
            f"({why}); give each as model(**sample) takes it, or use dataset=None (weights only)."
        ) from problem
    reads = getattr(model, "main_input_name", "input_ids")
    if reads != "input_ids":
        why = f"it reads {reads}"
    else:
        why = f"its text does not reach {name}" if problem is None else _words(problem)
    sound = "a folder of sound files, " if reads in SOUND else ""
    raise ValueError(
        f"{type(model).__name__} cannot be calibrated on text alone ({why}); give dataset {sound}a list of dicts, "
        "each as model(**sample) takes it, or use dataset=None (weights only)."
    ) from problem


def _probes(model: nn.Module) -> list[Inputs]:
    """Returns three batches of tokens: two of one shape, one with more texts; at the end of one text is padding."""
    config = model.config.get_text_config()
    named = [*config.to_dict().items(), *model.config.to_dict().items()]
    values = [value for name, value in named if "_token_id" in name or "_token_index" in name]
    ids = {token for value in values for token in (value if isinstance(value, list) else [value])}
    vocabulary = getattr(config, "vocab_size", None) or model.get_input_embeddings().num_embeddings
    tokens = torch.randint(vocabulary, (1024,), generator=torch.Generator().manual_seed(0)).tolist()
    plain = [token for token in tokens if token not in ids] or tokens  # not the place of an image, say
    sizes = [2 * _SEQLEN, 2 * _SEQLEN, 3 * _SEQLEN]
    texts = torch.tensor((plain * sum(sizes))[: sum(sizes)]).split(sizes)
    batches = [text.view(-1, _SEQLEN) for text in texts]
    pad = getattr(config, "pad_token_id", None)
    if isinstance(pad, int) and 0 <= pad < vocabulary:
        batches[1][0, -1] = pad
    return [{"input_ids": batch} for batch in batches]


def _record(model: nn.Module, blocks: nn.ModuleList, inputs: Inputs) -> _Record:
    """Runs a whole model on `inputs` and notes what its blocks give."""
    order, outputs = [], []

    def noting(index: int) -> Callable[..., Any]:
        block_forward = blocks[index].forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = block_forward(*args, **kwargs)
            order.append(index)
            outputs.append(hidden_of(output).clone())  # as it is now: the model may go on in place
            return output

        return forward

    with replaced_forwards(blocks, {index: noting(index) for index in range(len(blocks))}):
        output = run_on(model, placed(inputs, next(model.parameters())))
    return _Record(inputs, order, outputs, output)


@torch.enable_grad()
def _has_gradient(runner: BlockRunner, index: int, arguments: Arguments) -> bool:
    """Returns whether what a block gives has a gradient; Reformer's have none, going backwards is its own affair."""
    hidden = hidden_of(arguments)
    leaf = hidden.detach().requires_grad_()
    followed = map_tensors(arguments, lambda tensor: leaf.clone() if tensor is hidden else tensor)
    try:
        return hidden_of(runner.call(index, followed).output).requires_grad
    except Exception as error:  # in other precision, or on another device, it may be all right
        logger.debug("A run of block %d with gradients failed: %s", index, error)
        return True


@contextmanager
def _refusing(where: str) -> Iterator[None]:
    """Makes whatever goes wrong inside a refusal that names the place."""
    try:
        yield
    except Exception as error:  # whatever a model raises that is not run as it is meant to
        raise ValueError(
            f"{where}, run block by block, does not give what it gives in the whole model ({_words(error)}), so it "
            "cannot be calibrated; use dataset=None (weights only)."
        ) from error


def _words(error: Exception) -> str:
    """Returns an error in one line."""
    text = " ".join(str(error).split()).rstrip(".")
    return f"{text:.160}" if isinstance(error, _Differs) else f"{type(error).__name__}: {text:.160}"


class _Differs(Exception):
    """What was found is not what was wanted."""


def _compare(found: Tensor, wanted: Tensor) -> None:
    """Raises `_Differs` if two tensors differ."""
    if found.shape != wanted.shape:
        raise _Differs(f"shape {tuple(found.shape)} instead of {tuple(wanted.shape)}")
    found, wanted = (tensor.double().nan_to_num() for tensor in (found, wanted))
    error = float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))
    if error > _TOLERANCE:
        raise _Differs(f"it is off by {error:.2g} of its size")


def _leaves(two: State, three: State) -> list[Leaf]:
    """Returns the leaves of what a block gives, from what it gave for two and for three texts."""
    leaves = []
    for one, other in zip(tensors_of(two.gaves), tensors_of(three.gaves), strict=True):
        differing = [dim for dim in range(one.dim()) if one.shape[dim] != other.shape[dim]]
        if one.dim() != other.dim() or len(differing) > 1:
            raise _Differs(f"shapes {tuple(one.shape)} and {tuple(other.shape)} for 2 and for 3 texts")
        if differing and one.shape[differing[0]] * len(three) != other.shape[differing[0]] * len(two):
            raise _Differs(f"shapes {tuple(one.shape)} and {tuple(other.shape)} for 2 and for 3 texts")
        leaves.append(Leaf(one.dtype, differing[0] if differing else None))
    return leaves


def _whole_leaves(states: list[State]) -> list[Leaf]:
    """Returns the leaves of what a block gives for samples that are never cut."""
    kinds = [[tensor.dtype for tensor in tensors_of(state.gaves)] for state in states]
    if any(kind != kinds[0] for kind in kinds):
        raise _Differs(
            f"tensors of dtypes {kinds[0]} for one sample, {next(k for k in kinds if k != kinds[0])} for another"
        )
    return [Leaf(dtype, None) for dtype in kinds[0]]


def _elements(state: State) -> int:
    """Returns how many numbers a model is given; of text, how many tokens."""
    return sum(tensor.numel() for tensor in state.inputs.values())


def _count_bytes(runner: BlockRunner, state: State) -> None:
    """Notes how many bytes per element of its inputs a block gives."""
    total = sum(tensor.nbytes for tensor in tensors_of(state.gaves)) / _elements(state)
    hidden = state.hidden.nbytes / _elements(state)
    runner.hidden_bytes = max(runner.hidden_bytes, hidden)
    runner.other_bytes = max(runner.other_bytes, total - hidden)
