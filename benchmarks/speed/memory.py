"""Peak memory beyond the weights, for a model and one of ten times the blocks; writes results/memory.csv.

    python -m benchmarks memory

Random models, each quantized in a process of its own.
"""

import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor

from ..common.commands import command_line
from ..common.rows import replace


def main(arguments: list[str]) -> None:
    """Measures the models."""
    parser = command_line(__name__)
    text = "numbers of blocks (default: %(default)s)"
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 40], metavar="N", help=text)
    args = parser.parse_args(arguments)
    rows = []
    for blocks in args.blocks:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            rows.append(pool.submit(measure, blocks).result())
        print(rows[-1], flush=True)
    replace(args.output / "memory.csv", rows)


def measure(blocks: int) -> dict[str, float]:
    """Quantizes a random Llama of that many blocks; returns megabytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from crvq_hf.config import CRVQConfig
    from crvq_hf.pipeline.quantize_model import quantize_model
    from crvq_hf.resources.device import peak_memory_bytes

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=blocks, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    weights, before = sum(p.nbytes for p in model.parameters()), peak_memory_bytes()
    with tempfile.TemporaryDirectory() as work:
        text = CRVQConfig(dataset="self", nsamples=16, seqlen=128, e2e_finetune_epochs=0, work_dir=work)
        quantize_model(model, None, text)
    megabytes = {"weights_mb": weights / 1e6, "beyond_mb": (peak_memory_bytes() - before) / 1e6}
    return {"blocks": blocks} | {name: round(value, 1) for name, value in megabytes.items()}
