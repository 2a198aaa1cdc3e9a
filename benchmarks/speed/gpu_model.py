"""The model stage of `gpu`: decoding speed of a dense and of a quantized Llama, both of random weights."""

import gc
import statistics
import time

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from crvq_hf.modeling.linear import CRVQLinear
from crvq_hf.quantized_weight import QuantizedWeight

from ..common.rows import versions
from .layers import random_layer


def random_model(tiny: bool, device: str) -> torch.nn.Module:
    """Returns a Llama of random weights in float16: the shapes of Llama-2-7B, or a tiny one."""
    small = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    config = LlamaConfig(**small, num_hidden_layers=2) if tiny else LlamaConfig()
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float16).eval()


def quantize_randomly_(model: torch.nn.Module) -> None:
    """Replaces the linear layers of the decoder blocks by CRVQ layers of random codes."""
    blocks = model.model.layers
    for name, module in list(blocks.named_modules()):
        if type(module) is torch.nn.Linear:
            layer = random_layer(tuple(module.weight.shape), module.weight.device)
            weight = QuantizedWeight(*layer.stored, *layer.constants)
            blocks.set_submodule(name, CRVQLinear.from_quantized(weight, None).tile_())


def decode_speed(model: torch.nn.Module, new_tokens: int) -> float:
    """Returns tokens per second of greedy decoding, batch size 1, static cache: on a GPU compiled, in CUDA graphs.

    Two lengths are timed, and their difference counts: what the prompt takes is left out.
    """
    prompt = torch.ones(1, 16, dtype=torch.int64, device=model.device)

    def seconds(count: int) -> float:
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        options = {"do_sample": False, "cache_implementation": "static", "pad_token_id": 0}
        output = model.generate(prompt, max_new_tokens=count, min_new_tokens=count, **options)
        output.tolist()  # waits
        return time.perf_counter() - start

    short = new_tokens // 4
    seconds(new_tokens), seconds(short)  # compile
    differences = [seconds(new_tokens) - seconds(short) for _ in range(3)]
    return (new_tokens - short) / statistics.median(differences)


@torch.no_grad()
def time_models(tiny: bool, new_tokens: int, stamp: dict, device: str) -> list[dict]:
    """Times the dense and the quantized model; returns their rows, which begin with `stamp`."""
    model = random_model(tiny, device)
    rows = []
    for way in ("dense", "crvq"):
        if way == "crvq":
            quantize_randomly_(model)
            gc.collect()
            torch.compiler.reset()
        size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        speed = decode_speed(model, new_tokens)
        name = f"Llama, {model.config.num_hidden_layers} blocks of {model.config.hidden_size}"
        row = {"model": name, "way": way, "tokens_per_second": round(speed, 2), "weights_mb": round(size / 1e6, 1)}
        rows.append(stamp | row | {"new_tokens": new_tokens} | versions("transformers"))
        print(f"{name}, {way}: {speed:.1f} tokens/s, {size / 1e9:.2f} GB", flush=True)
    return rows
