"""Peak memory of quantizing a random model of few and of ten times as many blocks, beyond its weights.

    python benchmarks/bench_memory.py

Each model is quantized in a process of its own; prints a table and writes results/memory.csv.
"""

import csv
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "memory.csv"
BLOCKS = (4, 40)


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
    text = CRVQConfig(dataset="self", nsamples=16, seqlen=128, e2e_finetune_epochs=0, work_dir=sys.argv[2])
    quantize_model(model, None, text)
    return {"blocks": blocks, "weights_mb": weights / 1e6, "beyond_mb": (peak_memory_bytes() - before) / 1e6}


def main() -> None:
    """Measures both models, each in a new process."""
    import tempfile

    rows = []
    for blocks in BLOCKS:
        with tempfile.TemporaryDirectory() as work:
            command = [sys.executable, __file__, str(blocks), work]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows.append(dict(zip(("blocks", "weights_mb", "beyond_mb"), printed.split(), strict=True)))
        print(rows[-1])
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(*(round(value, 1) for value in measure(int(sys.argv[1])).values()))
    else:
        main()
