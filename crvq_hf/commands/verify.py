"""`crvq verify`: whether a checkpoint is as it was saved."""

import argparse

from ..checkpoint.verify import verify

HELP = "check that nothing of a checkpoint was lost or changed since saving"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("out", metavar="OUT", help="folder of a quantized model")


def run(args: argparse.Namespace) -> int:
    """Prints the problems found, or a summary; returns 1 if there are any."""
    result = verify(args.out)
    print("\n".join(result.problems or [result.summary]))
    return 1 if result.problems else 0
