"""`crvq eval`: perplexity on a text, agreement with another model, speed of writing, and tasks of lm_eval."""

import argparse
import dataclasses
import json
from typing import Any

from ..checkpoint.sources import load
from ..evaluation.agreement import agreement
from ..evaluation.perplexity import SEQLEN, check_text, most_tokens, perplexity, read_text_tokens, tokens_per_second
from ..evaluation.tasks import Tasks, run_tasks, table
from .options import add_model_options, loading_options

HELP = "perplexity of a model on a text, or benchmark tasks"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    add_model_options(parser)
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text, or FILE:FIELD of a table, read from its start")
    text = f"tokens per window (default: {SEQLEN}, or what the model and the text have)"
    parser.add_argument("--seqlen", type=int, metavar="N", help=text)
    parser.add_argument("--windows", type=int, default=10, help="windows at most (default: %(default)s)")
    text = "also compare with this model, the dense one say: KL divergence, and share of equal predictions"
    parser.add_argument("--against", metavar="MODEL", help=text)
    parser.add_argument("--speed", type=int, metavar="N", help="also time the writing of N tokens")
    parser.add_argument("--tasks", metavar="NAME[,NAME]", help="tasks of the lm-evaluation-harness (lm_eval)")
    parser.add_argument("--include-path", metavar="DIR", help="folder with task files of your own")
    parser.add_argument("--limit", type=int, metavar="N", help="examples per task at most")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")


def run(args: argparse.Namespace) -> None:
    """Prints what was measured."""
    if args.text is None and args.tasks is None:
        raise ValueError("Nothing to evaluate on; give --text FILE, --tasks NAME or both.")
    if args.against is not None and args.text is None:
        raise ValueError("--against compares two models on a text; give --text FILE too.")
    tasks = None if args.tasks is None else Tasks(args.tasks.split(","), args.include_path)
    if args.text is not None:
        check_text(args.text)
    model, tokenizer = load(args.model, args.device, args.dtype, options=loading_options(args))
    found: dict[str, Any] = {"device": str(model.device), "dtype": str(model.dtype)}
    lines = []
    if args.text is not None:
        tokens = read_text_tokens(tokenizer, args.text, most_tokens(args.seqlen, args.windows))
        result = perplexity(model, tokens, args.seqlen, args.windows)
        found |= dataclasses.asdict(result)
        lines.append(
            f"perplexity {result.value:.4f} over {result.tokens} tokens ({result.windows} windows of "
            f"{result.seqlen}), {result.seconds:.1f} s, {model.dtype} on {model.device}"
        )
    if args.against is not None:
        other, _ = load(args.against, args.device, args.dtype)
        compared = agreement(model, other, tokens, args.seqlen, args.windows)
        found["against"] = dataclasses.asdict(compared)
        lines.append(
            f"against {args.against}: KL divergence {compared.kl:.4f} nats per token, {compared.same:.1%} of the "
            f"predictions equal, {compared.seconds:.1f} s"
        )
        del other
    if tasks is not None:
        results = run_tasks(model, tokenizer, tasks, args.limit)
        found["tasks"] = results["results"]
        lines.append(table(results))
    found["tokens_per_second"] = None if args.speed is None else tokens_per_second(model, tokenizer, args.speed)
    if args.speed is not None:
        lines.append(f"{found['tokens_per_second']:.1f} tokens/s written, greedy, one sequence")
    print(json.dumps(found, default=str) if args.json else "\n".join(lines))
