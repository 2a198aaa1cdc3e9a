"""A trial run: what a model does with its layers, seen by running it on a few tokens before anything is quantized.

Three things cannot be told from a layer itself. Some models read the weight of a layer elsewhere than in its forward
(`layer.weight @ x`, `x.to(layer.weight.dtype)`), where codes would be taken for numbers. And some linear layers decide
which experts a token goes to. Both kinds have to stay dense. Last, some models change their weights when first run
(RWKV divides them): what is loaded would do so again, so these are refused.
"""

from __future__ import annotations

import copy
import inspect
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ..blocks.finding import kind_of
from ..blocks.runner import Inputs, placed, run_on

logger = logging.getLogger("crvq")

_NUM_TOKENS = 13  # a number that hardly any layer has as a multiple of its outputs
_FIRST_TOKEN = 3  # those before it begin, end and pad texts
# What a layer of codes answers like a dense one, and what quantized embeddings and heads answer beside.
_HARMLESS = {getattr(Tensor, name).__get__ for name in ("device", "is_cpu", "is_cuda", "is_meta", "requires_grad")}
_HARMLESS_OF_ROWS = _HARMLESS | {getattr(Tensor, name).__get__ for name in ("dtype", "shape", "ndim")}
_HARMLESS_OF_ROWS |= {Tensor.size, Tensor.dim, Tensor.numel, Tensor.__getitem__}
_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "_grouped_mm", "convolution", "embedding")
_CHOICES = ("topk", "sort", "argmax", "max")


@dataclass
class Findings:
    """What a trial run has shown.

    Attributes:
        read: names of the layers, embeddings and heads whose weight other code reads.
        routing: names of the layers whose outputs choose experts.
        failure: why the model could not be run; its code was read instead.
    """

    read: set[str] = field(default_factory=set)
    routing: set[str] = field(default_factory=set)
    failure: str = ""


@torch.no_grad()
def run_on_trial(model: nn.Module, sample: Inputs | None = None) -> None:
    """Runs a transformers model on a sample, or a few tokens of text."""
    home = next(model.parameters())
    run_on(model, {"input_ids": _tokens(model)} if sample is None else placed(sample, home))


def _tokens(model: nn.Module) -> Tensor:
    """Returns a few different tokens, `[1, 13]`, int64."""
    size = model.get_input_embeddings().weight.shape[0]
    tokens = torch.arange(_NUM_TOKENS) * 7 % max(1, size - _FIRST_TOKEN) + _FIRST_TOKEN
    return tokens.clamp(max=size - 1)[None].to(next(model.parameters()).device)


@torch.no_grad()
def try_out(
    model: nn.Module, linears: dict[str, nn.Module], rows: dict[str, nn.Module], sample: Inputs | None = None
) -> Findings:
    """Returns what running `model` on a few tokens shows of its layers; it is as before afterwards.

    What is found of one layer holds for all of its kind: an expert that no token reached is like its neighbours.

    Args:
        model: a transformers model in eval mode, dense.
        linears: layers that are to be quantized, by name.
        rows: embeddings and heads that are to be quantized, by name.
        sample: to be run on instead.

    Raises:
        ValueError: the model changes its weights in place when it is run.
    """
    _check_new_one(model)
    findings = Findings()
    told = {name: _HARMLESS for name in linears} | {name: _HARMLESS_OF_ROWS for name in rows}
    try:
        with _Unchanged(model), _watched(linears | rows, told, findings.read.add) as outputs:
            with _Choices(outputs, findings.routing.add):
                run_on_trial(model, sample)
    except _Change as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # whatever a model raises that cannot be given text alone
        findings.failure = f"{type(error).__name__}: {' '.join(str(error).split())}"
        findings.read.update(_read_by_their_owners(model, [*linears, *rows]))
        logger.debug("A trial run of %s failed: %s", type(model).__name__, findings.failure)
    try:
        with _watched(linears | rows, told, findings.read.add):  # with a cache, other code runs
            if not findings.failure and model.can_generate():
                model.generate(_tokens(model), max_new_tokens=2, min_new_tokens=2, do_sample=False)
    except Exception as error:  # how a model generates does not decide whether it can be quantized
        logger.debug("A trial of generating with %s failed: %s", type(model).__name__, error)
    findings.read = _with_their_kind(findings.read, [*linears, *rows])
    findings.routing = _with_their_kind(findings.routing, linears)
    return findings


def _with_their_kind(found: set[str], names: Any) -> set[str]:
    """Returns all of `names` that are of a kind with one of `found`."""
    kinds = {kind_of(name) for name in found}
    return {name for name in names if kind_of(name) in kinds}


def _read_by_their_owners(model: nn.Module, names: list[str]) -> set[str]:
    """Returns the layers whose weight is named in the code of the module that they are in: `self.wo.weight`.

    Less than what a run shows, and all there is where a model cannot be run on text.
    """
    code: dict[type, str] = {}
    found = set()
    for name in names:
        owner, _, child = name.rpartition(".")
        kind = type(model.get_submodule(owner))
        if kind not in code:
            try:
                code[kind] = inspect.getsource(kind)
            except (OSError, TypeError):  # made in a console, say
                code[kind] = ""
        if re.search(rf"\bself\.{re.escape(child)}\.weight\b", code[kind]):
            found.add(name)
    return found


class _Change(Exception):
    """A model is about to change its weights."""


class _Unchanged(TorchDispatchMode):
    """Raises `_Change` before any parameter of a model is changed in place, through whatever view of it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.kind = type(model).__name__
        self.names = {p.untyped_storage()._cdata: name for name, p in model.named_parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func._schema.is_mutable and func is not torch.ops.aten.embedding_renorm_.default:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
                    name = self.names.get(value.untyped_storage()._cdata)
                    if name is not None:
                        raise _Change(
                            f"{self.kind} changes its own weights when it is run ({name} first), and would do so "
                            "again with what is saved, so crvq does not quantize it; see whether its config can "
                            "switch that off (for RWKV: rescale_every=0)."
                        )
        return func(*args, **kwargs or {})


@torch.no_grad()
def _check_new_one(model: nn.Module) -> None:
    """Raises ValueError if a new model of the same kind changes its weights; `model` may have been run before.

    The new one is on the meta device: it has no numbers and takes no memory.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            new = type(model)(copy.deepcopy(model.config)).eval()
        with _Unchanged(new):
            run_on(new, {"input_ids": _tokens(model).to("meta")})
    except _Change as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # whatever a model raises that has no numbers
        logger.debug("A trial of a new %s failed: %s", type(model).__name__, error)


class _Told(Tensor):
    """A weight in the hands of other code than its layer's forward: tells when anything is done with it."""

    tell: Callable[[], None]
    harmless: set[Any]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, _Told) and func not in value.harmless:
                value.tell()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs or {})


@contextmanager
def _watched(
    modules: dict[str, nn.Module], harmless: dict[str, set[Any]], tell: Callable[[str], Any]
) -> Iterator[WeakIdKeyDictionary]:
    """Tells the name of each module whose weight is read outside of its own call, while inside.

    Args:
        modules: layers with a `weight`, by name.
        harmless: functions by name of the module that other code may apply to its weight.
        tell: called with a name.

    Yields:
        A dictionary that gets the outputs of all these modules: name by tensor.
    """
    classes = {name: type(module) for name, module in modules.items()}
    outputs = WeakIdKeyDictionary()
    for name, module in modules.items():
        module.__class__ = _telling(name, classes[name], harmless[name], tell, outputs)
    try:
        yield outputs
    finally:
        for name, module in modules.items():
            module.__class__ = classes[name]


def _telling(
    name: str, base: type, harmless: set[Any], tell: Callable[[str], Any], outputs: WeakIdKeyDictionary
) -> type:
    """Returns the class of a layer that tells when its weight is read outside of its own call."""
    calls = Counter()

    def during(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls["running"] += 1
            try:
                output = method(self, *args, **kwargs)
            finally:
                calls["running"] -= 1
            if isinstance(output, Tensor):
                outputs[output] = {name: output.shape[-1]}
            return output

        return call

    def weight(self: nn.Module) -> Tensor:
        parameter = self._parameters["weight"]
        if calls["running"]:
            return parameter
        told = parameter.detach().as_subclass(_Told)
        told.tell, told.harmless = lambda: tell(name), harmless
        return told

    fields = {"weight": property(weight), "forward": during(base.forward), "__call__": during(base.__call__)}
    return type(base.__name__, (base,), fields)


class _Choices(TorchDispatchMode):
    """Tells which layers' outputs something is chosen by: those that reach a top-k with a number per expert.

    Outputs are followed through everything but products, so through a softmax, a bias and a mask.
    """

    def __init__(self, outputs: WeakIdKeyDictionary, tell: Callable[[str], Any]) -> None:
        """Args: outputs: {name: out_features} by output of a layer; tell: called with the name of one that chooses."""
        super().__init__()
        self.origins, self.tell = outputs, tell

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **kwargs or {})
        name = func.overloadpacket.__name__
        if name in _PRODUCTS:
            return result
        origins = {}
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                origins |= self.origins.get(value) or {}
        if origins and name in _CHOICES and args[0].dim():
            dim = {"topk": 2, "argmax": 1, "sort": 1, "max": 1}[name]
            size = args[0].shape[args[dim] if len(args) > dim and args[dim] is not None else -1]
            for origin, out_features in origins.items():
                if size > 1 and out_features % size == 0:
                    self.tell(origin)
        if origins:
            for value in tree_leaves(result):
                if isinstance(value, Tensor):
                    self.origins[value] = origins
        return result
