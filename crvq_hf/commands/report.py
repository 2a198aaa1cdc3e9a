"""`crvq report`: draws the report of a quantized model again."""

import argparse

from ..sharing.report import draw_report

HELP = "draw report.html and report.png of a quantized model again"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("out", metavar="OUT", help="output folder of crvq quantize")


def run(args: argparse.Namespace) -> None:
    """Draws, then prints the paths of the files."""
    print("\n".join(map(str, draw_report(args.out))))
