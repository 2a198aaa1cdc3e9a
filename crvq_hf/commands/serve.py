"""`crvq serve`: the OpenAI-compatible HTTP server of transformers, in a process that knows CRVQ."""

from __future__ import annotations

import argparse

from transformers.utils.import_utils import is_serve_available

HELP = "answer OpenAI-style requests: takes what `transformers serve` takes"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds nothing: what follows the command is for transformers, see `cli.main`."""


def run(args: argparse.Namespace) -> None:
    """Serves until it is interrupted."""
    serve(args.rest)


def serve(arguments: list[str]) -> None:
    """Runs `transformers serve` until it is interrupted.

    Args:
        arguments: the arguments of `transformers serve`, such as `["folder", "--port", "8000"]`.

    Raises:
        ImportError: a package that serving needs is missing.
        SystemExit: the arguments are wrong, or ask for help; said by `transformers serve`.
    """
    if not is_serve_available():
        raise ImportError("Serving needs fastapi, uvicorn and openai; install them with pip install 'crvq-hf[serve]'.")
    from transformers.cli.transformers import app

    from ..generation.default import used_by_generate

    with used_by_generate():
        app(["serve", *arguments], prog_name="crvq")
