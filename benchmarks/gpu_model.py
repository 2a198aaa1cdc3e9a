"""The model stage of bench_gpu.py: decoding speed of a dense and of a quantized Llama, both of random weights."""

import gc
import statistics
import time

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from crvq_hf.modeling.linear import CRVQLinear
from crvq_hf.quantized_weight import num_critical_groups


def random_model(tiny: bool, device: str) -> torch.nn.Module:
    """Returns a Llama of random weights: the shapes of Llama-2-7B, or a tiny one."""
    small = {
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(LlamaConfig(**small) if tiny else LlamaConfig()).eval()
    finally:
        torch.set_default_dtype(default)


def quantize_randomly_(model: torch.nn.Module) -> None:
    """Replaces the linear layers of the decoder blocks by CRVQ layers of random codes."""
    linears = [item for item in model.model.layers.named_modules() if type(item[1]) is torch.nn.Linear]
    for name, module in linears:
        layer = CRVQLinear(
            module.in_features,
            module.out_features,
            bias=False,
            in_group_size=8,
            nbits=8,
            num_codebooks=4,
            codebook_size=256,
            num_critical_groups=num_critical_groups(module.in_features, 8, 0.02, 3),
            codebook_bits=16,
            bias_dtype=module.weight.dtype,
            device=module.weight.device,
        )
        layer.weight.random_(0, 256)
        layer.weight_codebooks.normal_(std=0.02)
        layer.weight_scale.fill_(1.0)
        layer.weight_order.copy_(torch.randperm(module.in_features))
        model.model.layers.set_submodule(name, layer.tile_())


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
        rows.append(
            stamp
            | {"model": name, "way": way, "tokens_per_second": round(speed, 2), "weights_mb": round(size / 1e6, 1)}
            | {"new_tokens": new_tokens, "transformers": transformers.__version__}
        )
        print(f"{name}, {way}: {speed:.1f} tokens/s, {size / 1e9:.2f} GB", flush=True)
    return rows
