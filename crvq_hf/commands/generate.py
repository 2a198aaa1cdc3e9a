"""`crvq generate`: lets a model write."""

import argparse
import math

from ..checkpoint.sources import load
from ..evaluation.samples import write
from .options import add_model_options, loading_options

HELP = "let a model write"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    add_model_options(parser)
    parser.add_argument("--prompt", required=True, help="a message to a chat model, the start of a text for others")
    parser.add_argument("--raw", action="store_true", help="take the prompt as the start of a text in any case")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="(default: %(default)s)")
    text = "draw tokens, the likelier the more often; the higher X, the more freely (default: 0, the likeliest token)"
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help=text)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Prints the continuation of a prompt."""
    if args.max_new_tokens < 1:
        raise ValueError(f"max-new-tokens must be at least 1, got {args.max_new_tokens}.")
    if not 0 <= args.temperature < math.inf:
        raise ValueError(f"temperature must be a number from 0 on, got {args.temperature}.")
    model, tokenizer = load(args.model, args.device, args.dtype, options=loading_options(args))
    print(write(model, tokenizer, args.prompt, args.raw, args.max_new_tokens, args.temperature, args.seed))
