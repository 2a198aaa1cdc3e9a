"""Running a step many times: as it is, or out of a CUDA graph where it can be captured."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger("crvq")
_said: set[str] = set()
_PLAIN = (bool, int, float, str, type(None))


class GraphError(RuntimeError):
    """A step that no graph can hold."""


class Repeated:
    """Runs a step: twice as it is, while kernels are compiled and it is watched, then out of a graph.

    The first two steps do their work, capturing does none: so all steps count, and nothing need be undone.
    """

    def __init__(self) -> None:
        self._runs = 0
        self._replay: Callable[[], None] | None = None

    @property
    def has_graph(self) -> bool:
        """Whether steps come out of a graph."""
        return self._replay is not None

    def __call__(self, step: Callable[[], None], state: Iterable[Tensor], parts: Iterable[Any]) -> None:
        """Runs `step` once.

        Args:
            step: reads and writes tensors that are the same ones in each run.
            state: tensors that tell it where it is; put back should it be stopped half-way.
            parts: objects whose Python state a graph would freeze.
        """
        if self._replay is not None:
            self._replay()
            return
        if self._runs < 0 or not can_capture(next(iter(state)).device):
            step()
            return
        try:
            self._try(step, list(state), list(parts))
        except GraphError as error:
            self._runs = -1
            say_once(f"Tokens are written without a CUDA graph: {error}.")

    def _try(self, step: Callable[[], None], state: list[Tensor], parts: list[Any]) -> None:
        """Does what is next on the way to a graph, and a step."""
        self._runs += 1
        if any(has_hooks(part) for part in parts):
            step()
            raise GraphError("a module has forward hooks")
        if self._runs == 1:
            step()
        elif self._runs == 2:
            before = python_state(parts)
            watch(step, state)
            if python_state(parts) != before:
                raise GraphError("the model counts tokens in Python")
        else:
            try:
                replay = capture(step)
            except Exception as error:  # whatever the driver, a kernel or the model says
                step()
                raise GraphError(f"capturing a step failed ({_first_line(error)})") from error
            self._replay = replay
            replay()


def say_once(message: str) -> None:
    """Logs what a user may want to know, at level info, once for each process."""
    if message not in _said:
        _said.add(message)
        logger.info(message)


def can_capture(device: torch.device) -> bool:
    """Returns whether steps on `device` can be captured now."""
    return device.type == "cuda" and not torch.is_autocast_enabled(device.type)


def watch(step: Callable[[], None], state: list[Tensor]) -> None:
    """Runs a step and finds out whether the host waits for the device in it; `state` is put back and it is run anew.

    A capture that fails leaves PyTorch's allocator in disorder, so this is found out before. PyTorch's switch for it
    is one for the whole process: for the time of one step, waiting is an error in other threads too.

    Raises:
        GraphError: it does; the step has been done nevertheless.
    """
    saved = [tensor.clone() for tensor in state]
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():  # it says that it does not find all
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        _aside(step)
    except RuntimeError as error:
        torch.cuda.set_sync_debug_mode(mode)
        for tensor, value in zip(state, saved, strict=True):
            tensor.copy_(value)
        step()
        raise GraphError(f"the model waits for the device ({_first_line(error)})") from error
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def _aside(step: Callable[[], None]) -> None:
    """Runs a step on another stream, where libraries take their workspaces anew, as they will in the graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            step()
    finally:
        torch.cuda.current_stream().wait_stream(stream)


def capture(step: Callable[[], None]) -> Callable[[], None]:
    """Returns what runs `step` again without the host; nothing is run yet."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay


def python_state(parts: Iterable[Any]) -> int:
    """Returns a hash of what a graph freezes of `parts`: where their tensors lie, and their plain attributes.

    Modules count with all modules below them. What differs after a step is counted in Python: a graph would repeat the
    step it was captured in. What differs in a later call (weights moved, an adapter switched off) makes a graph stale.
    """
    found: list[Any] = []
    for part in parts:
        for owner in part.modules() if isinstance(part, nn.Module) else [part]:
            found.append(id(owner))
            for name, value in vars(owner).items():
                if name in ("_parameters", "_buffers"):
                    found += [(key, tensor.data_ptr()) for key, tensor in value.items() if tensor is not None]
                elif isinstance(value, _PLAIN):
                    found.append((name, value))
                elif isinstance(value, (list, tuple, set, dict)):
                    found.append((name, repr(value) if _is_plain(value) else len(value)))
    return hash(tuple(found))


def has_hooks(part: Any) -> bool:
    """Returns whether a module in `part` runs hooks, which may be anything, around its forward."""
    modules = part.modules() if isinstance(part, nn.Module) else []
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def _is_plain(values: Any) -> bool:
    return all(isinstance(value, _PLAIN) for value in (values.values() if isinstance(values, dict) else values))


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
