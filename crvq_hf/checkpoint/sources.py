"""A model by the name a user gives: a folder, a hub id, or a GGUF file in one of them."""

import logging
import os
import re
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..resources.device import compute_device
from .gguf import load_gguf

logger = logging.getLogger("crvq")

_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def check_source(source: str) -> None:
    """Checks that `source` can be a model: a folder, or a name on the hub.

    Raises:
        ValueError: it is neither.
    """
    if os.path.isfile(source):
        raise ValueError(f"{source} is a file; give the folder it is in (for a GGUF file, and --gguf-file).")
    if not os.path.isdir(source) and not _HUB_NAME.fullmatch(source):
        raise ValueError(f"There is no folder {source}, and it is no name of a model on the hub either.")


def load_dense(source: str, gguf_file: str | None = None) -> tuple[PreTrainedModel, Any]:
    """Returns a dense model on the CPU, in the dtype it is stored in, and its tokenizer, None if it has none.

    Args:
        source: folder or hub id.
        gguf_file: name of a GGUF file in it; its weights become bfloat16.

    Raises:
        ValueError: the checkpoint is already quantized, or is no causal language model.
        OSError: there is no such model.
    """
    if gguf_file is not None:
        return load_gguf(source, gguf_file, torch.bfloat16)
    stored = getattr(AutoConfig.from_pretrained(source), "quantization_config", None)
    if stored is not None:
        method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
        raise ValueError(f"{source} is already quantized ({method}); start from the dense model.")
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    try:
        return model, AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        logger.warning("%s has no tokenizer that transformers can load: %s", source, error)
        return model, None


def load(
    source: str, device: str | None = None, dtype: str | None = None, gguf_file: str | None = None
) -> tuple[PreTrainedModel, Any]:
    """Returns a model, dense or quantized, and its tokenizer, ready to run.

    Args:
        source: folder or hub id.
        device: to run on; cuda if present, else cpu.
        dtype: name of the dtype of what is not quantized, "auto" as stored; by default float32 on a CPU, else "auto".
        gguf_file: name of a GGUF file in `source` to read instead.

    Raises:
        ValueError, OSError: there is no such model or device.
    """
    check_source(source)
    place = compute_device(device)
    dtype = dtype or ("float32" if place.type == "cpu" else "auto")
    if gguf_file is not None:
        model, tokenizer = load_dense(source, gguf_file)
        model = model if dtype == "auto" else model.to(getattr(torch, dtype))
    else:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    return model.to(place).eval(), tokenizer
