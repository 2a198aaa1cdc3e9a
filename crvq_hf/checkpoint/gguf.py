"""A GGUF file as a plain model.

transformers reads GGUF files, but what it returns counts as a quantized model: it can be neither saved nor quantized.
"""

import os
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel


def load_gguf(
    source: str | os.PathLike, gguf_file: str, dtype: torch.dtype, options: dict[str, Any] | None = None
) -> tuple[PreTrainedModel, Any]:
    """Returns a model with the dequantized weights of a GGUF file, as if from a dense checkpoint, and its tokenizer.

    Args:
        source: folder or hub repository with the file.
        gguf_file: name of the file in it.
        dtype: of the weights.
        options: of `from_pretrained`, for the model and its tokenizer.

    Raises:
        ValueError: the package `gguf` is not installed, or transformers cannot read this GGUF.
        OSError: there is no such file.
    """
    options = {"gguf_file": gguf_file, **(options or {})}
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, quantization_config=GgufConfig(dequantize=True), **options
        )
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except ImportError as error:
        raise ValueError("Reading a GGUF file needs the package gguf; pip install 'crvq-hf[gguf]'.") from error
    fields = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    with torch.device("meta"):
        model = type(loaded)(type(loaded.config)(**fields))
    model.load_state_dict(loaded.state_dict(), assign=True)
    for name, buffer in loaded.named_buffers():  # not all of them are in the state dict
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, buffer)
    model.tie_weights()
    model.config.dtype = dtype
    model.generation_config = loaded.generation_config
    return model.eval(), tokenizer
