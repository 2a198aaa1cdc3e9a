"""Perplexity with embedding and head alone in few bits, all blocks dense; appends rows to results/embeddings.csv.

    python -m benchmarks embeddings MODEL --calibration calib.txt --text wiki.test.raw

`--fit` divides bytes by these numbers (`_OF_EMBEDDINGS` in crvq_hf/selection/size.py).
"""

from functools import partial

import torch
from torch import Tensor

from ..common.commands import WINDOWS, add_inputs, command_line
from ..common.rows import append, commit, cpu_name, versions

CODED_ON, COUNTED = 8 * 512, 2**18  # tokens of the calibration text


@torch.no_grad()
def head_inputs_squared(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Returns `X^T X / tokens`, `[K, K]`, fp32, of a head's inputs for `tokens`, `[sequences, seqlen]`."""
    found = []
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda head, args: found.append(args[0].flatten(0, 1))
    )
    for row in tokens:
        model(input_ids=row[None], use_cache=False)
    hook.remove()
    inputs = torch.cat(found).float()
    return inputs.T @ inputs / len(inputs)


def main(arguments: list[str]) -> None:
    """Measures the model that the command line names."""
    from crvq_hf.algorithm.hessian import damped
    from crvq_hf.calibration.text import drawn_tokens, read_text
    from crvq_hf.checkpoint.sources import load_dense
    from crvq_hf.config import EMBEDDING_BITS
    from crvq_hf.evaluation.perplexity import most_tokens, perplexity, read_text_tokens
    from crvq_hf.modeling.embedding import distinct_tables, find_embeddings, quantize_embeddings_
    from crvq_hf.modeling.table import TableShape
    from crvq_hf.pipeline.table_fit import fit_table
    from crvq_hf.pipeline.tables import DAMPING, place_table_

    parser = command_line(__name__)
    add_inputs(parser)
    parser.add_argument("--bits", type=float, nargs="+", choices=EMBEDDING_BITS, default=EMBEDDING_BITS)
    parser.add_argument("--seqlen", type=int, help="tokens of a window (default: 2048)")
    args = parser.parse_args(arguments)
    load = partial(load_dense, args.model)
    model, tokenizer = load()
    counted, _ = drawn_tokens(tokenizer, partial(read_text, args.calibration, tokenizer), COUNTED, 512, 0)
    text = read_text_tokens(tokenizer, args.text, most_tokens(args.seqlen, WINDOWS))
    metric = damped(head_inputs_squared(model.float(), counted[:CODED_ON].view(-1, 512)), DAMPING)
    stamp = {"model": type(model).__name__, "windows": WINDOWS, "commit": commit(), "cpu": cpu_name()}
    for bits in args.bits:
        model = load()[0].float()
        if bits == 8:
            quantize_embeddings_(model)
        for names, weight in distinct_tables(model, find_embeddings(model, bits) if bits < 8 else {}).items():
            shape, seed = TableShape(*weight.shape, bits), torch.Generator().manual_seed(0)
            table, _ = fit_table(weight.float(), metric, torch.bincount(counted), shape, seed)
            place_table_(model, names, table.tensors())
        found = perplexity(model, text, args.seqlen, WINDOWS).value
        print(f"{bits:4g} bits: perplexity {found:.3f}", flush=True)
        append(
            args.output / "embeddings.csv", [stamp | {"bits": bits, "perplexity": round(found, 3)} | versions("torch")]
        )
