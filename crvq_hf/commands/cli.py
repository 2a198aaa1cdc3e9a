"""`crvq`: finds the command, runs it, tells in one line what went wrong. Each command is a file beside this one."""

import argparse
import logging
import os
import sys
from types import ModuleType
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from tqdm.contrib.logging import logging_redirect_tqdm

from ..resources import distributed
from . import demo, doctor, evaluate, generate, info, push, quantize, report, serve, verify
from .doctor import installed_version

# A command's file has HELP, `add_options(parser)` and `run(args)`, which returns the exit code or None for 0.
COMMANDS = {
    "quantize": quantize,
    "eval": evaluate,
    "info": info,
    "report": report,
    "push": push,
    "verify": verify,
    "generate": generate,
    "serve": serve,
    "doctor": doctor,
    "demo": demo,
}
# What can go wrong without a bug of ours: told in one line, without a traceback.
EXPECTED_ERRORS = (ValueError, OSError, ImportError, SafetensorError, MemoryError, torch.OutOfMemoryError)


class _Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviations and whose errors are one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"crvq: error: {message} (see {self.prog} --help)\n")


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments, those of the process by default.

    Returns:
        The exit code: 0, 1 if `crvq doctor` or `crvq verify` found a problem, 2 after an error, 130 after Ctrl-C.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"
    arguments = list(sys.argv[1:] if argv is None else argv)
    serves = arguments[:1] == ["serve"]  # what follows is for transformers
    args = build_parser().parse_args(arguments[:1] if serves else arguments)
    args.rest = arguments[1:]
    logger = logging.getLogger("crvq")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("crvq: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with logging_redirect_tqdm([logger]):  # lines go above the progress bar
            return args.run(args) or 0
    except KeyboardInterrupt:
        print("crvq: interrupted; the same command again continues", file=sys.stderr)
        return 130
    except distributed.EndedElsewhere:  # the process that has failed says why
        return 2
    except EXPECTED_ERRORS as error:
        if args.debug or os.environ.get("CRVQ_DEBUG") == "1":
            raise
        start = "\n" if distributed.rank() else ""  # where the first process's progress bar ends
        print(f"{start}crvq: error: {_one_line(error)}", file=sys.stderr)
        return 2
    finally:
        logger.removeHandler(handler)
        distributed.leave()


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser; `parse_args` sets `run` to the function of the command."""
    parser = _Parser(prog="crvq", description="Channel-relaxed vector quantization of language models.")
    parser.add_argument("--version", action="version", version=f"crvq-hf {installed_version('crvq-hf')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        _add(commands, name, command)
    return parser


def _add(commands: Any, name: str, command: ModuleType) -> None:
    """Adds the parser of a command."""
    parser = commands.add_parser(name, help=command.HELP, description=f"{command.HELP[0].upper()}{command.HELP[1:]}.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error (as CRVQ_DEBUG=1 does)")
    command.add_options(parser)
    parser.set_defaults(run=command.run)


def _one_line(error: BaseException, most: int = 600) -> str:
    """Returns the message of an error in one line, the errors' class if it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[:most]} ... (--debug shows all)"
