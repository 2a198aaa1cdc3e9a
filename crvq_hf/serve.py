"""`crvq serve`: the OpenAI-compatible HTTP server of transformers, in a process that knows CRVQ."""

from __future__ import annotations

from transformers.utils.import_utils import is_serve_available


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

    app(["serve", *arguments], prog_name="crvq")
