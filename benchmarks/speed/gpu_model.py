"""The model stage of `gpu`: decoding speed of a dense and of quantized Llamas, all of random weights.

Every model is timed in the decode loop of `crvq_hf.generation`, as it is and with its forward compiled, and in
`generate`, as it is and with a static cache, which compiles too.
"""

import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
from transformers import AutoModelForCausalLM, CompileConfig, LlamaConfig

from crvq_hf.generation.loop import decode, release, uses_graph
from crvq_hf.modeling.linear import CRVQLinear
from crvq_hf.quantized_weight import QuantizedWeight

from ..common.rows import versions
from .layers import DEFAULT, PAPER, Form, random_layer

PROMPT = 16
# Format of the layers, None for a dense model.
WAYS = {"crvq": DEFAULT, "dense": None, "crvq of the paper": PAPER}
COMPILED = {"compile_config": CompileConfig(mode="default", dynamic=False)}
# Arguments of `generate`, and the seconds that it takes at most to find out, by a guess.
LOOPS = {
    "decode, compiled": ({"custom_generate": decode} | COMPILED, 40),
    "decode": ({"custom_generate": decode}, 15),
    "generate, compiled": ({"cache_implementation": "static"}, 40),
    "generate": ({}, 60),
}


def random_model(tiny: bool, device: str, dtype: torch.dtype = torch.float16) -> torch.nn.Module:
    """Returns a Llama of random weights: the shapes of Llama-2-7B, or a tiny one. It never ends by itself."""
    small = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    config = LlamaConfig(**small, num_hidden_layers=2) if tiny else LlamaConfig()
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.generation_config.eos_token_id = config.vocab_size  # no such token, but it is looked for
    model.generation_config.pad_token_id = 0
    return model


def quantize_randomly_(model: torch.nn.Module, form: Form) -> None:
    """Replaces the linear layers of the decoder blocks by CRVQ layers of random codes."""
    blocks = model.model.layers
    for name, module in list(blocks.named_modules()):
        if type(module) is torch.nn.Linear:
            layer = random_layer(tuple(module.weight.shape), module.weight.device, form=form)
            weight = QuantizedWeight(*layer.stored, *layer.constants)
            blocks.set_submodule(name, CRVQLinear.from_quantized(weight, None).tile_())


def prompt_of(model: torch.nn.Module, batch: int = 1) -> torch.Tensor:
    """Returns random tokens, `[batch, PROMPT]`."""
    vocabulary = model.config.vocab_size
    return torch.randint(1, vocabulary, (batch, PROMPT), generator=torch.Generator().manual_seed(0)).to(model.device)


def check_tiny(device: str) -> None:
    """Compares the loop with `generate`, in fp32: prompts of several lengths, some sequences that end.

    Raises:
        SystemExit: the tokens differ, or on a GPU no graph was used.
    """
    for way in ("crvq", "dense"):
        model, form = random_model(True, device, torch.float32), WAYS[way]
        if form is not None:
            quantize_randomly_(model, form)
        tokens = prompt_of(model, 3)
        mask = torch.ones_like(tokens)
        mask[0, :7] = mask[1, :1] = 0
        options = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False}
        free = model.generate(tokens, **options)
        for ends in ([model.config.vocab_size], free[:2, PROMPT + 20].tolist()):
            expected = model.generate(tokens, eos_token_id=ends, **options)
            for call in ("first", "second"):
                found = model.generate(tokens, eos_token_id=ends, custom_generate=decode, **options)
                if not torch.equal(found, expected):
                    sys.exit(f"tiny {way}, ends {ends}, {call} call: the loop writes other tokens than generate.")
        if device == "cuda" and not uses_graph(model):
            sys.exit(f"tiny {way}: the loop runs without a graph; the log of level info says why.")
    print(f"tiny models: the loop writes what generate writes, on {device}", flush=True)


def same_tokens(model: torch.nn.Module, new_tokens: int) -> float:
    """Returns the share of greedy tokens up to the first that differs between the loop and `generate`."""
    options = {"max_new_tokens": new_tokens, "do_sample": False}
    prompt = prompt_of(model)
    expected = model.generate(prompt, **options)[0, PROMPT:]
    found = model.generate(prompt, custom_generate=decode, **options)[0, PROMPT:]
    differ = (found != expected).nonzero()
    return 1.0 if not len(differ) else differ[0].item() / new_tokens


def decode_speed(model: torch.nn.Module, new_tokens: int, options: dict) -> float:
    """Returns tokens per second of greedy decoding, batch size 1.

    Two lengths are timed, and their difference counts: what the prompt takes is left out.

    Args:
        model: any.
        new_tokens: of the longer run.
        options: further arguments of `generate`.
    """
    prompt = prompt_of(model)

    def seconds(count: int) -> float:
        synchronize(model.device)
        start = time.perf_counter()
        model.generate(prompt, max_new_tokens=count, do_sample=False, **options).tolist()  # waits
        return time.perf_counter() - start

    short = new_tokens // 4
    seconds(new_tokens), seconds(short)  # compile
    differences = [seconds(new_tokens) - seconds(short) for _ in range(3)]
    return (new_tokens - short) / statistics.median(differences)


def seconds_of(layers: list[torch.nn.Linear], dtype: torch.dtype) -> float:
    """Returns the seconds that layers take for one token, one after another; on a GPU in a graph, without gaps."""
    device = layers[0].weight.device
    inputs = {layer.in_features: torch.randn(1, layer.in_features, device=device, dtype=dtype) for layer in layers}

    def run() -> None:
        for layer in layers:
            layer(inputs[layer.in_features])

    again = captured(run) if device.type == "cuda" else run
    again()
    times = []
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(5):
            again()
        synchronize(device)
        times.append((time.perf_counter() - start) / 5)
    return statistics.median(times)


def captured(run: Callable[[], None]) -> Callable[[], None]:
    """Returns what runs `run` again out of a CUDA graph."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def time_models(tiny: bool, new_tokens: int, stamp: dict, device: str, minutes: float = 2.0) -> Iterator[dict]:
    """Times every model in every loop; yields rows, which begin with `stamp`, as they are found.

    Args:
        tiny: whether the models are tiny.
        new_tokens: length of the longer run, the prompt counted, so that cache and graph serve both runs.
        stamp: of the machine.
        device: "cuda" or "cpu".
        minutes: what would not be done within is left out, and said.
    """
    start = time.perf_counter()
    new_tokens -= PROMPT
    logging.basicConfig()
    logging.getLogger("crvq").setLevel(logging.INFO)  # should there be no graph, it says why
    check_tiny(device)
    models, linears, shares = {}, {}, {}
    for loop, (options, needed) in LOOPS.items():
        for way, form in WAYS.items():
            if form is PAPER and loop != "decode":  # one loop says enough of it
                continue
            if time.perf_counter() - start + needed > 60 * minutes:
                print(f"{way}, {loop}: left out, the time is over", flush=True)
                continue
            if way not in models:
                model = models[way] = random_model(tiny, device)
                if form is not None:
                    quantize_randomly_(model, form)
                layers = [layer for layer in model.model.layers.modules() if isinstance(layer, torch.nn.Linear)]
                linears[way] = seconds_of(layers, model.dtype), seconds_of([model.lm_head], model.dtype)
                shares[way] = same_tokens(model, min(new_tokens, 64))
            torch.compiler.reset()
            speed = decode_speed(models[way], new_tokens, options)
            graph = uses_graph(models[way])
            release(models[way])
            yield stamp | model_row(models[way], way, loop, speed, *linears[way], shares[way], graph, new_tokens)


def model_row(
    model: torch.nn.Module,
    way: str,
    loop: str,
    speed: float,
    linears: float,
    head: float,
    same: float,
    graph: bool,
    new_tokens: int,
) -> dict:
    """Returns a row of gpu_generation.csv, and prints it.

    Args:
        model, way, loop: what was timed.
        speed: tokens per second.
        linears, head: seconds that the linear layers of the blocks, and the head, take for a token.
        same: of the loop's first tokens those that are `generate`'s, a share.
        graph: whether the steps came out of the loop's graph.
        new_tokens: length of the longer run.
    """
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    rest = 1 - (linears + head) * speed
    name = f"Llama, {model.config.num_hidden_layers} blocks of {model.config.hidden_size}"
    print(
        f"{name}, {way}, {loop}: {speed:.1f} tokens/s, {1e3 / speed:.2f} ms a token, linears {linears * 1e3:.2f}, "
        f"head {head * 1e3:.2f}, rest {rest:.0%}; {size / 1e9:.2f} GB; graph {graph}; same tokens {same:.0%}",
        flush=True,
    )
    return {
        "model": name,
        "way": way,
        "loop": loop,
        "graph": graph,
        "tokens_per_second": round(speed, 2),
        "ms_a_token": round(1e3 / speed, 3),
        "linears_ms": round(linears * 1e3, 3),
        "head_ms": round(head * 1e3, 3),
        "not_linears": round(rest, 3),
        "same_tokens": round(same, 3),
        "weights_mb": round(size / 1e6, 1),
        "new_tokens": new_tokens,
    } | versions("transformers")
