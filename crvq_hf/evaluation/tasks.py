"""Tasks of the lm-evaluation-harness (package lm_eval) on a model that is in memory."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any


class Tasks:
    """Tasks by name, found before a model is loaded.

    Attributes:
        names: tasks and groups, as lm_eval names them.
        manager: lm_eval's `TaskManager` that knows them.
    """

    def __init__(self, names: list[str], include_path: str | os.PathLike | None = None) -> None:
        """Finds the tasks.

        Args:
            names: names of tasks or groups; lm_eval's wildcards are allowed.
            include_path: a folder with task files (YAML) of the user's own, which come before lm_eval's.

        Raises:
            ImportError: lm_eval is not installed.
            ValueError: there is no such task or folder.
        """
        if find_spec("lm_eval") is None:
            raise ImportError("Tasks need the package lm_eval; install it with pip install 'crvq-hf[eval]'.")
        if include_path is not None and not os.path.isdir(include_path):
            raise ValueError(f"The task folder {os.fspath(include_path)} is no folder; give one with YAML task files.")
        from lm_eval.tasks import TaskManager

        if include_path is not None:  # first alone: reading lm_eval's thousands of files takes half a minute
            self.manager = TaskManager(include_path=include_path, include_defaults=False)
        if include_path is None or self._missing(names):
            self.manager = TaskManager(include_path=include_path)
        if missing := self._missing(names):
            raise ValueError(f"lm_eval has no task {missing[0]!r}; `lm_eval ls tasks` lists those it has.")
        self.names = self.manager.match_tasks(names)

    def _missing(self, names: list[str]) -> list[str]:
        return [name for name in names if not self.manager.match_tasks([name])]


def run_tasks(model: Any, tokenizer: Any, tasks: Tasks, limit: int | None = None) -> dict[str, Any]:
    """Returns what `lm_eval.simple_evaluate` returns, without the samples.

    Args:
        model: a causal language model, on any device.
        tokenizer: its tokenizer.
        tasks: what to run.
        limit: examples per task at most, None for all.

    Raises:
        ValueError: `limit` is less than 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}.")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    return simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1),
        tasks=tasks.names,
        task_manager=tasks.manager,
        limit=limit,
        log_samples=False,
    )


def table(results: dict[str, Any]) -> str:
    """Returns lm_eval's table of what `run_tasks` returned, groups below it if there are any."""
    from lm_eval.utils import make_table

    columns = ["results", *(["groups"] if results.get("groups") else [])]
    return "\n".join(make_table(results, column).rstrip("\n") for column in columns)
