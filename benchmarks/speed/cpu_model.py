"""A whole model on a CPU, prompt and generation: dense, CRVQ by every kernel, llama.cpp; rows to cpu_generation.csv.

    python -m benchmarks cpu_model QUANTIZED --gguf A.gguf B.gguf

QUANTIZED is the folder of a quantized model. Its contenders take turns in one process; a time is the median of its
repetitions, a ratio the median of the ratios within repetitions. One thread, unless --threads says more.

dense_fp32, dense_bf16: the same model, its weights made dense.
crvq_...: CRVQ in fp32, by every kernel that this processor has; `crvq_bf16` by the best one with bf16 activations.
llama.cpp: the models given as --gguf, by llama_cpp, if it is installed (pip install llama-cpp-python). They are to be
    of the same model, in formats of its own.

`prompt`: one forward of 512 random tokens, logits of the last one, with a cache. `generate`: greedy tokens after a
prompt of 32. Of the best kernel also where a generated token's time goes, in milliseconds: quantized linears, head,
norms, the rest of attention, the rest of the forward, and transformers' loop around it.
"""

import argparse
import importlib.util
import itertools
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from crvq_kernels import cpu
from torch import nn

from crvq_hf import CRVQConfig
from crvq_hf.modeling.linear import CRVQLinear

from ..common.commands import again, command_line
from ..common.rows import append, commit, cpu_name, markdown, versions
from ..common.timing import paired, ratio, short

PROMPT, START, NEW_TOKENS = 512, 32, 64
GOAL = 2.0  # times as fast as dense fp32
CORES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

Calls = tuple[Callable[[], object], Callable[[], list[int]]]  # of a prompt, and of generating


def main(arguments: list[str]) -> None:
    """Runs the benchmark with the arguments of the command line."""
    args = parse(arguments)
    if any(os.environ.get(name) != str(args.threads) for name in CORES):  # read when torch is loaded, so start again
        os.execve(sys.executable, again("cpu_model", *arguments), os.environ | dict.fromkeys(CORES, str(args.threads)))
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    rows = measure(args)
    stamp = {"commit": commit(), "cpu": cpu_name()} | versions("torch", "transformers", "llama-cpp-python")
    print(f"\n{', '.join(f'{name} {value}' for name, value in stamp.items())}\n{markdown(rows)}", flush=True)
    append(args.output / "cpu_generation.csv", [row | stamp for row in rows])
    if any(row["tokens"] == "differ" for row in rows):
        sys.exit("The kernels write other tokens than the dense weights do.")
    (own,) = [row for row in rows if row["loop_ms"] is not None]  # of the kernel that is used here
    missed = [name for name in ("prompt_over_fp32", "generate_over_fp32") if own[name] < GOAL]
    if args.check and missed:
        sys.exit(f"missed: {own['contender']} is to be {GOAL} times dense in {' and '.join(missed)}")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = command_line(__name__)
    parser.add_argument("model", help="folder of a quantized model")
    parser.add_argument("--gguf", nargs="*", default=[], metavar="FILE", help="the same model in llama.cpp's formats")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--check", action="store_true", help=f"exit 1 if CRVQ is not {GOAL} times dense fp32")
    args = parser.parse_args(arguments)
    if args.gguf and importlib.util.find_spec("llama_cpp") is None:
        parser.error("--gguf needs llama.cpp; run: pip install llama-cpp-python")
    return args


@torch.inference_mode()
def measure(args: argparse.Namespace) -> list[dict]:
    """Returns a row for each contender."""
    models = {
        "dense_fp32": load(args.model, torch.float32, dequantize=True),
        "dense_bf16": load(args.model, torch.bfloat16, dequantize=True),
        "crvq": load(args.model, torch.float32),
        "crvq_bf16": load(args.model, torch.bfloat16),
    }
    usual = cpu.library().level
    calls = {name: transformers_calls(model, usual) for name, model in models.items() if name != "crvq"}
    best = f"crvq_{cpu.INSTRUCTIONS[usual]}"
    for level in cpu.library().supported:
        calls[f"crvq_{cpu.INSTRUCTIONS[level]}"] = transformers_calls(models["crvq"], level)
    calls |= {f"llama.cpp {Path(file).stem}": llama_calls(file, args.threads) for file in args.gguf}
    tokens = {name: generate() for name, (_, generate) in calls.items()}
    prompts = paired({name: prompt for name, (prompt, _) in calls.items()}, args.repetitions)
    generations = paired({name: generate for name, (_, generate) in calls.items()}, args.repetitions)
    rows = []
    for name in calls:
        compared = name.startswith("crvq_") and name != "crvq_bf16"
        row = {"model": Path(args.model).resolve().name, "contender": name, "threads": args.threads}
        row["prompt_tokens_per_s"] = short(PROMPT / median(prompts[name]))
        row["tokens_per_s"] = short(NEW_TOKENS / median(generations[name]))
        for dense in ("fp32", "bf16"):
            row[f"prompt_over_{dense}"] = ratio(prompts, f"dense_{dense}", name)
            row[f"generate_over_{dense}"] = ratio(generations, f"dense_{dense}", name)
        row["tokens"] = ("equal" if tokens[name] == tokens["dense_fp32"] else "differ") if compared else None
        row |= parts_of_a_token(models["crvq"], calls[best][1], name == best)
        rows.append(row)
    return rows


def load(folder: str, dtype: torch.dtype, dequantize: bool = False) -> nn.Module:
    """Returns the model, or its dense form."""
    from transformers import AutoModelForCausalLM

    options = {"quantization_config": CRVQConfig(dequantize=True)} if dequantize else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()
    model.generation_config.eos_token_id = None  # all write as many tokens
    return model


def numbers(count: int, size: int) -> torch.Tensor:
    """Returns `[1, count]` random tokens, always the same."""
    return torch.randint(100, size, (1, count), generator=torch.Generator().manual_seed(0))


def transformers_calls(model: nn.Module, level: int) -> Calls:
    """Returns the two calls of a transformers model whose quantized layers run by the instruction set `level`."""
    size = model.config.get_text_config().vocab_size
    prompt, start = numbers(PROMPT, size), numbers(START, size)

    def use(call: Callable[[], object]) -> object:
        cpu.library().level = level
        return call()

    def generate() -> list[int]:
        mask = torch.ones_like(start)
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
        return model.generate(start, attention_mask=mask, **options)[0, START:].tolist()

    return lambda: use(lambda: model(prompt, use_cache=True, logits_to_keep=1)), lambda: use(generate)


def llama_calls(file: str, threads: int) -> Calls:
    """Returns the two calls of a model of llama.cpp."""
    from llama_cpp import Llama

    options = {"n_ctx": 2 * PROMPT, "n_batch": PROMPT, "n_threads": threads, "n_threads_batch": threads}
    model = Llama(file, **options, verbose=False)
    prompt, start = (numbers(count, model.n_vocab())[0].tolist() for count in (PROMPT, START))

    def read() -> None:
        model.reset()
        model.eval(prompt)

    def generate() -> list[int]:
        model.reset()
        model.eval(start)
        written = [model.sample(temp=0.0)]
        while len(written) < NEW_TOKENS:
            model.eval(written[-1:])
            written.append(model.sample(temp=0.0))
        return written

    return read, generate


def parts_of_a_token(model: nn.Module, generate: Callable[[], object], measured: bool) -> dict[str, float | None]:
    """Returns milliseconds of a generated token by part of the model; None for each if they are not to be measured.

    What a part contains of another counts for the other alone.
    """
    kinds = {
        "linears": lambda module: isinstance(module, CRVQLinear),
        "head": lambda module: module is model.get_output_embeddings(),
        "norms": lambda module: type(module).__name__.endswith("Norm"),
        "attention": lambda module: type(module).__name__.endswith("Attention"),
        "forward": lambda module: module is model,
    }
    if not measured:
        return {f"{part}_ms": None for part in (*kinds, "loop")}
    seconds, entered, handles = Counter(), [], []

    def enter(part: str) -> None:
        entered.append((part, time.perf_counter()))

    def leave() -> None:
        part, since = entered.pop()
        took = time.perf_counter() - since
        seconds[part] += took
        if entered:
            seconds[entered[-1][0]] -= took

    for module, (part, belongs) in itertools.product(model.modules(), kinds.items()):
        if belongs(module):
            handles.append(module.register_forward_pre_hook(lambda *_, part=part: enter(part)))
            handles.append(module.register_forward_hook(lambda *_: leave()))
    enter("loop")
    generate()
    leave()
    for handle in handles:
        handle.remove()
    return {f"{part}_ms": short(seconds[part] / NEW_TOKENS * 1e3) for part in (*kinds, "loop")}
