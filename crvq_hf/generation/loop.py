"""`decode`: transformers' loop over tokens, with nothing in it that the host has to wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import (
    CompileConfig,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GENERATION_MODES_MAPPING

from . import graph
from .cache import GraphCache
from .fitness import unfit
from .graph import Repeated, python_state
from .sampling import next_tokens, settings, take_over_

SHORTEST_CACHE = 256
# A cache is used that is up to so many times as long as need be; attention goes through all of it.
MUCH_LONGER = 4
# How many tokens are written before the host looks whether all sequences have ended; to look is to wait.
LOOK_EVERY = {"cuda": 8}

_lock = threading.Lock()  # the tensors of a model's session are there once


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: BaseStreamer | None = None,
    inputs_tensor: Tensor | None = None,
    **model_kwargs: Any,
) -> Any:
    """Writes tokens after a prompt: `model.generate(**inputs, custom_generate=decode)`.

    On a GPU, forward, choice of the token and positions of a step are one CUDA graph, which is kept with the model for
    later calls of the same batch size and about the same length. Greedy tokens are those of `generate`, but for
    rounding where two are equally likely. What is not known here (beams, processors and criteria other than the
    usual ones, models without a static cache) transformers does, which is logged once.

    `generate` keeps a streamer to itself where it is given a function: hand it to both, as
    `custom_generate=partial(decode, streamer=streamer), streamer=streamer`. `generation_config.compile_config`, if
    there is one, has the forward compiled before it goes into the graph.

    Args:
        model: a causal language model.
        input_ids: `[B, prompt]` int64, shorter prompts padded on the left.
        logits_processor, stopping_criteria, generation_config, synced_gpus, inputs_tensor: as `generate` makes them.
        streamer: is given tokens as they are written, on a GPU in eights.
        model_kwargs: of the first forward; mask and positions among them.

    Returns:
        `[B, longest]` int64, prompts and what follows, ended sequences padded.

    Raises:
        ValueError: a mode that transformers has only on its hub.
    """
    request = (model, input_ids, logits_processor, stopping_criteria, generation_config)
    reason = "processes wait for each other" if synced_gpus else unfit(*request, model_kwargs)
    if reason is not None:
        graph.say_once(f"transformers' own loop writes the tokens: {reason}.")
        return _transformers_loop(*request, synced_gpus, streamer, inputs_tensor, model_kwargs)
    on_device = torch.cuda.device(model.device) if model.device.type == "cuda" else nullcontext()
    with _lock, on_device, model._optimize_model_for_decode():
        session = _session(*request, model_kwargs)
        return session.write(model, input_ids, stopping_criteria.max_length, streamer, model_kwargs)


def release(model: PreTrainedModel) -> None:
    """Gives back the cache and the graph that were kept with a model."""
    with _lock:
        _sessions.pop(model, None)


def uses_graph(model: PreTrainedModel) -> bool:
    """Returns whether steps with a model now come out of a CUDA graph."""
    session = _sessions.get(model)
    return session is not None and session.repeated.has_graph


def _transformers_loop(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool,
    streamer: BaseStreamer | None,
    inputs_tensor: Tensor | None,
    model_kwargs: dict[str, Any],
) -> Any:
    """Does what `generate` would have done."""
    mode = generation_config.get_generation_mode()
    method = getattr(type(model), GENERATION_MODES_MAPPING[mode], None)
    if method is None:
        raise ValueError(f"Decoding by {mode.value} is not part of transformers; leave custom_generate=decode out.")
    more = {"inputs_tensor": inputs_tensor} if "inputs_tensor" in signature(method).parameters else {}
    return method(
        model,
        input_ids,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        generation_config=generation_config,
        synced_gpus=synced_gpus,
        streamer=streamer,
        **more,
        **model_kwargs,
    )


def _session(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> Session:
    """Returns the session kept with the model if it fits the call, else a new one in its place."""
    batch, device = input_ids.shape[0], model.device
    needed = max(stopping_criteria.max_length, input_ids.shape[1] + 1)
    length = max(SHORTEST_CACHE, 1 << (needed - 1).bit_length())
    ends = [token for item in stopping_criteria for token in getattr(item, "eos_token_id", torch.tensor([])).tolist()]
    padding = generation_config._pad_token_tensor
    choice = (generation_config.do_sample, tuple(ends), None if padding is None else int(padding))
    compiling = generation_config.compile_config if device.type == "cuda" else None
    key = (
        (batch, device, model.dtype, repr(compiling), choice, settings(logits_processor)),
        (model.config._attn_implementation, getattr(model.config, "_experts_implementation", None)),
        (
            model_kwargs.get("logits_to_keep"),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled(device.type),
        ),
        python_state([model]) if graph.can_capture(device) else None,
    )
    session = _sessions.get(model)
    if session is None or session.key != key or not length <= session.length <= MUCH_LONGER * length:
        _sessions.pop(model, None)
        del session  # two caches are never there at once
        shape = {"dtype": torch.int64, "device": device}
        session = _sessions[model] = Session(
            key=key,
            cache=GraphCache(model.config.get_text_config(decoder=True), length, device),
            processors=logits_processor,
            do_sample=generation_config.do_sample,
            ends=torch.tensor(ends, **shape) if ends else None,
            padding=padding,
            compiling=compiling,
            extra={"use_cache": True, "logits_to_keep": model_kwargs.get("logits_to_keep")},
            tokens=torch.zeros(batch, length, **shape),
            mask=torch.zeros(batch, length, **shape),
            token=torch.zeros(batch, 1, **shape),
            position=torch.zeros(batch, 1, **shape),
            column=torch.zeros(1, **shape),
            written=torch.zeros(1, **shape),
            finished=torch.zeros(batch, dtype=torch.bool, device=device),
        )
        if session.extra["logits_to_keep"] is None:
            del session.extra["logits_to_keep"]
    take_over_(session.processors, logits_processor)
    return session


@dataclass(eq=False)
class Session:
    """The tensors that a step reads and writes, and the graph of it; without the model, so that it does not keep it.

    Attributes:
        key: what all of it depends on.
        cache: keys and values of `length` tokens.
        processors, do_sample: see `sampling.next_tokens`.
        ends: `[number]` int64, tokens that end a sequence, or None.
        padding: 0-dimensional or `[1]` int64, follows in ended sequences; None without `ends`.
        compiling: how to compile the forward, or None.
        extra: further arguments of the model's forward.
        tokens: `[B, length]` int64, prompts and what follows; columns still to be written repeat the prompt's last.
        mask: `[B, length]` int64, 0 at padding.
        token: `[B, 1]` int64, written last.
        position: `[B, 1]` int64, its position.
        column: `[1]` int64, where the next token goes.
        written: `[1]` int64, tokens after the prompt until all sequences had ended.
        finished: `[B]` bool, sequences that have ended.
    """

    key: tuple[Any, ...]
    cache: GraphCache
    processors: LogitsProcessorList
    do_sample: bool
    ends: Tensor | None
    padding: Tensor | None
    compiling: CompileConfig | None
    extra: dict[str, Any]
    tokens: Tensor
    mask: Tensor
    token: Tensor
    position: Tensor
    column: Tensor
    written: Tensor
    finished: Tensor
    repeated: Repeated = field(default_factory=Repeated)

    @property
    def length(self) -> int:
        """How many tokens the cache has room for."""
        return self.tokens.shape[1]

    def write(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        max_length: int,
        streamer: BaseStreamer | None,
        model_kwargs: dict[str, Any],
    ) -> Tensor:
        """Returns prompts and what follows, `[B, longest]`; see `decode`."""
        prompt = input_ids.shape[1]
        most = max(1, max_length - prompt)  # `generate` writes one in any case
        every = LOOK_EVERY.get(model.device.type, 1)
        self._read(model, input_ids, model_kwargs)
        step = partial(self._step, model, _forward(model, self.compiling))
        state = [self.token, self.position, self.column, self.written, self.finished, self.tokens, self.cache.seen]
        parts = [model, *self.cache.layers]
        shown = 0
        for done in count(1):
            looking = done == most or done % every == 0 or done == 1 and streamer is not None
            if looking and (self.ends is not None or streamer is not None):
                written, ended = torch.cat([self.written, self.finished.all().view(1)]).tolist()
                if streamer is not None:
                    for column in self.tokens[:, prompt + shown : prompt + written].cpu().unbind(1):
                        streamer.put(column)
                    shown = written
                if ended:
                    break
            if done == most:
                break
            self.repeated(step, state, parts)
        if streamer is not None:
            streamer.end()
        return self.tokens[:, : prompt + int(self.written)].clone()

    def _read(self, model: PreTrainedModel, input_ids: Tensor, model_kwargs: dict[str, Any]) -> None:
        """Reads the prompts and writes the first token."""
        batch, prompt = input_ids.shape
        mask = model_kwargs.get("attention_mask")
        self.cache.reset()
        self.tokens.copy_(input_ids[:, -1:].expand(batch, self.tokens.shape[1]))
        self.tokens[:, :prompt] = input_ids
        self.mask.fill_(1)
        if mask is not None:
            self.mask[:, :prompt] = mask
        self.position.copy_(model_kwargs["position_ids"][:, -1:])
        self.column.fill_(prompt)
        self.written.zero_()
        self.finished.zero_()
        arguments = model_kwargs | {"past_key_values": self.cache}
        inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **arguments)
        logits = model(**inputs, return_dict=True).logits
        self.cache.advance(prompt)
        self._choose(logits)

    def _step(self, model: PreTrainedModel, forward: Callable[..., Any]) -> None:
        """Reads the token written last and writes the next."""
        self.position.add_(1)
        inputs = model.prepare_inputs_for_generation(
            self.token,
            next_sequence_length=1,
            past_key_values=self.cache,
            attention_mask=self.mask,
            position_ids=self.position,
            **self.extra,
        )
        logits = forward(**_with_added_masks(inputs, self.cache), return_dict=True).logits
        self.cache.advance(1)
        self._choose(logits)

    def _choose(self, logits: Tensor) -> None:
        """Writes the token that `logits` `[B, any, vocabulary]` say; in ended sequences padding."""
        chosen = next_tokens(logits[:, -1], self.tokens, self.processors, self.do_sample)
        self.written.add_(~self.finished.all())
        if self.ends is not None:
            chosen = torch.where(self.finished, self.padding, chosen)
            self.finished.logical_or_((chosen[:, None] == self.ends).any(dim=1))
        self.token.copy_(chosen[:, None])
        self.tokens.index_copy_(1, self.column, self.token)
        self.column.add_(1)


_sessions: WeakKeyDictionary[PreTrainedModel, Session] = WeakKeyDictionary()


def _forward(model: PreTrainedModel, compiling: CompileConfig | None) -> Callable[..., Any]:
    """Returns the model's forward, compiled if that was asked for; graphs are ours, not the compiler's."""
    if compiling is None:
        return model
    without = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
    return model.get_compiled_call(replace(compiling, mode=without.get(compiling.mode, compiling.mode)))


def _with_added_masks(inputs: dict[str, Any], cache: GraphCache) -> dict[str, Any]:
    """Returns arguments of a forward, masks as what is added to scores: each layer makes that of booleans anew."""
    dtype = cache.layers[0].keys.dtype

    def added(mask: Any) -> Any:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            return mask
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))

    masks = inputs["attention_mask"]
    by_layer = {name: added(mask) for name, mask in masks.items()} if isinstance(masks, dict) else added(masks)
    return inputs | {"attention_mask": by_layer}
