"""Peak memory of a run beside its plan, for random models of Llama's shapes; writes results/plan.csv.

    python -m benchmarks plan
    python -m benchmarks plan --hidden 4096 --intermediate 11008 --blocks 2
    python -m benchmarks plan --table

Each run is a process of its own, on the CPU. Rounds of the search are cut to one, which changes no peak. `--table`
runs nothing and prints the plans of large models on machines that need not be here.
"""

import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor

from ..common.commands import command_line, from_tests
from ..common.rows import replace

# What is left out of a run, so that other phases are the most expensive.
RUNS = {
    "all of it": {},
    "no end-to-end fine-tuning": {"e2e_finetune_epochs": 0},
    "no fine-tuning": {"e2e_finetune_epochs": 0, "block_finetune_epochs": 0},
    "weights alone": {"dataset": None},
    "read block by block": {"dataset": None},
}


def main(arguments: list[str]) -> None:
    """Measures the models."""
    parser = command_line(__name__)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 4], metavar="N", help="numbers of blocks")
    parser.add_argument("--hidden", type=int, default=2048, metavar="N", help="channels (default: %(default)s)")
    parser.add_argument(
        "--intermediate", type=int, default=8192, metavar="N", help="of the MLP (default: %(default)s)"
    )
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=[*RUNS], metavar="RUN", help=", ".join(RUNS))
    text = "only print what known models need on known machines, computed"
    parser.add_argument("--table", action="store_true", help=text)
    args = parser.parse_args(arguments)
    if args.table:
        return print_table()
    rows = []
    for blocks in args.blocks:
        for run in args.runs:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                rows.append(pool.submit(measure, run, blocks, args.hidden, args.intermediate).result())
            print(rows[-1], flush=True)
    replace(args.output / "plan.csv", rows)


# Shapes: hidden, intermediate, blocks, heads, heads of keys, head size, tokens, whether the embeddings are shared.
MODELS = {
    "1B (Llama 3.2)": (2048, 8192, 16, 32, 8, 64, 128256, True),
    "8B (Llama 3.1)": (4096, 14336, 32, 32, 8, 128, 128256, False),
    "32B (Qwen3)": (5120, 25600, 64, 64, 8, 128, 151936, False),
    "70B (Llama 3)": (8192, 28672, 80, 64, 8, 128, 128256, False),
}
# Device, gigabytes of a GPU and of the CPU's memory.
MACHINES = {"RTX 4090": ("cuda", 24, 64), "H100": ("cuda", 80, 256), "CPU": ("cpu", 32, 32)}


def print_table() -> None:
    """Prints, for each model and machine, what the default preset needs, without and with end-to-end fine-tuning."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from crvq_hf.checkpoint.blockwise import MEMORY_SHARE
    from crvq_hf.config import CRVQConfig
    from crvq_hf.pipeline.plan import work_of
    from crvq_hf.planning.memory import finished_bytes
    from crvq_hf.planning.plan import Machine, plan_of
    from crvq_hf.planning.sizes import sizes_of

    print("| model | machine | GPU, GB | memory, GB | disk, GB | fits |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, (hidden, inner, blocks, heads, keys, head_dim, tokens, tied) in MODELS.items():
        with torch.device("meta"):
            config = LlamaConfig(
                hidden_size=hidden,
                intermediate_size=inner,
                num_hidden_layers=blocks,
                num_attention_heads=heads,
                num_key_value_heads=keys,
                head_dim=head_dim,
                vocab_size=tokens,
                tie_word_embeddings=tied,
            )
            sizes = sizes_of(LlamaForCausalLM(config).to(torch.bfloat16), CRVQConfig())
        for title, (device, size, ram) in MACHINES.items():
            absent = sizes.dense_bytes > MEMORY_SHARE * ram * 1e9
            machine = Machine(device, round(size * 1e9), round(ram * 1e9), 10**13, loaded=False, is_absent=absent)
            cells, fits = [[], [], []], {}
            for epochs in (0, 1):
                work = work_of(CRVQConfig(dataset=["text"], e2e_finetune_epochs=epochs), device == "cuda")
                plan = plan_of(sizes, work, machine)
                disk = sum(plan.disk.values()) + finished_bytes(sizes)
                for cell, value in zip(cells, (plan.device_peak, plan.memory_peak, disk), strict=True):
                    cell.append(f"{value / 1e9:.1f}")
                fits[epochs] = not plan.missing()
            gpu, memory, disk = (" / ".join(cell) for cell in cells)
            fit = "yes" if fits[1] else "without end to end" if fits[0] else "no"
            print("|", " | ".join([name, title, gpu if device == "cuda" else "", memory, disk, fit]), "|")


def measure(run: str, blocks: int, hidden: int, intermediate: int) -> dict[str, float | str]:
    """Quantizes a random model; returns planned and measured megabytes at the peak."""
    from crvq_hf.algorithm import fit
    from crvq_hf.checkpoint import blockwise
    from crvq_hf.checkpoint.sources import load_dense
    from crvq_hf.config import CRVQConfig
    from crvq_hf.pipeline.plan import plan_of_model
    from crvq_hf.pipeline.quantize_model import quantize_model
    from crvq_hf.resources.device import peak_memory_bytes

    fit.ROUNDS = fit.KMEANS_ITERATIONS = 1
    with tempfile.TemporaryDirectory() as folder:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(save, folder, blocks, hidden, intermediate).result()
        if run == "read block by block":
            blockwise.MEMORY_SHARE = 0.0
        tiny = from_tests("tiny")
        fields = {"dataset": [20 * tiny.TEXT], "nsamples": 8, "e2e_nsamples": 8, "seqlen": 256} | RUNS[run]
        config = CRVQConfig(**fields, device="cpu", work_dir=f"{folder}/work")
        model, _ = load_dense(folder)
        plan = plan_of_model(model, config)
        quantize_model(model, tiny.tiny_tokenizer(), config)
    sizes = {"run": run, "blocks": blocks, "hidden": hidden, "intermediate": intermediate}
    dense, planned, measured = plan.model.dense_bytes, plan.memory_peak, peak_memory_bytes()
    megabytes = {"dense_mb": dense, "planned_mb": planned, "measured_mb": measured}
    return sizes | {name: round(value / 1e6) for name, value in megabytes.items()}


def save(folder: str, blocks: int, hidden: int, intermediate: int) -> None:
    """Saves a random model in bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        vocab_size=32000,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
