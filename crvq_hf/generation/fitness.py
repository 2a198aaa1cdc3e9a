"""What the decode loop cannot do, in words; transformers' own loop does it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import GenerationMode

from .cache import GraphCache
from .sampling import KNOWN

# What `generate` hands to every forward of a plain language model.
KWARGS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
ATTENTION = ("sdpa", "eager")
CRITERIA = (EosTokenCriteria, MaxLengthCriteria)


def unfit_model(model: PreTrainedModel) -> str | None:
    """Returns what of the model the loop cannot do."""
    if model.config.is_encoder_decoder:
        return "the model has an encoder"
    if model._is_stateful or not model._can_compile_fullgraph:
        return f"transformers has no static cache for {type(model).__name__}"
    text = model.config.get_text_config(decoder=True)
    if text._attn_implementation not in ATTENTION:
        return f"the attention is {text._attn_implementation}, not one of {', '.join(ATTENTION)}"
    if model.training:
        return "the model is in training mode"
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return "accelerate moves the model's tensors"
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        return f"the model is spread over {', '.join(sorted(map(str, devices)))}"
    try:
        GraphCache(text, 1)
    except ValueError as error:
        return str(error)
    return None


def unfit(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> str | None:
    """Returns why the loop cannot do what `generate` was asked for, None if it can.

    Args: as `generate` hands them to a decoding method.
    """
    reason = unfit_model(model)
    if reason is not None:
        return reason
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return f"{mode.value} keeps more than one sequence or takes more than one token at a time"
    if generation_config.return_dict_in_generate:
        return "return_dict_in_generate asks for more than tokens"
    if generation_config.prefill_chunk_size is not None:
        return "prefill_chunk_size asks for the prompt in pieces"
    if not generation_config.use_cache:
        return "use_cache is False"
    if getattr(model_kwargs.get("past_key_values"), "_is_user_defined", False):
        return "past_key_values were given"
    if input_ids.device != model.device:
        return f"the tokens are on {input_ids.device}, the model is on {model.device}"
    others = [name for name, value in model_kwargs.items() if name not in KWARGS and value is not None]
    if others:
        return f"the model is given {', '.join(sorted(others))}"
    positions, mask = model_kwargs.get("position_ids"), model_kwargs.get("attention_mask")
    if positions is None or positions.shape != input_ids.shape or mask is not None and mask.shape != input_ids.shape:
        return "positions or mask are not one number for each token"
    unknown = {type(item).__name__ for item in logits_processor if type(item) not in KNOWN}
    unknown |= {type(item).__name__ for item in stopping_criteria if not isinstance(item, CRITERIA)}
    if unknown:
        return f"it does not know {', '.join(sorted(unknown))}"
    if stopping_criteria.max_length is None:
        return "there is no largest length"
    return None
