"""What a `dataset` may be, the calibration data of a run: its check, and its parts.

The one place that knows the grammar; `pipeline.text` reads what is named here.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Set
from typing import Any

import torch


def listed(value: Any) -> list[Any] | None:
    """Returns a list of what a list, an array or a column of a table holds; None for what is none of these."""
    is_ordered = isinstance(value, Collection) and not isinstance(value, (str, bytes, Mapping, Set))
    if not is_ordered or getattr(value, "ndim", 1) != 1:
        return None
    return [str(item) if isinstance(item, str) else item for item in value]  # numpy has strings of its own


def has_samples(dataset: Any) -> bool:
    """Returns whether a `dataset` is a list of dicts of what a model's forward takes."""
    return isinstance(dataset, list) and bool(dataset) and isinstance(dataset[0], dict)


def _sample(number: int, value: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Returns what a model is given of a sample, arrays and lists of numbers as tensors."""
    sample = {}
    for key, item in value.items():
        try:
            sample[str(key)] = item if isinstance(item, torch.Tensor) else torch.as_tensor(item)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"dataset is a list of dicts, each as model(**sample) takes it, but {key!r} of sample {number} is no "
                f"tensor but {type(item).__name__} {' '.join(repr(item).split()):.60}."
            ) from None
    empty = [key for key, tensor in sample.items() if not tensor.numel() or not tensor.dim()]
    if empty or not sample:
        raise ValueError(
            f"Sample {number} of dataset has {f'no batch or nothing in {empty[0]!r}' if empty else 'nothing in it'}; "
            "give dicts of tensors, each as model(**sample) takes it."
        )
    return sample


def checked_dataset(name: str, value: Any) -> list[dict[str, torch.Tensor]] | list[str] | str | None:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if value is None or (isinstance(value, str) and value):
        return value
    items = listed(value)
    if items and all(isinstance(item, (str, os.PathLike)) for item in items):
        return [os.fspath(item) for item in items]
    if items and all(isinstance(item, Mapping) for item in items):
        return [_sample(number, item) for number, item in enumerate(items)]
    raise ValueError(
        f"{name} must be 'self', 'wikitext2', 'c4', the path of a text file, path:field of a table, a folder of sound "
        "files, a non-empty list or column of texts, a list of dicts of what the model takes, or None, "
        f"got {type(value).__name__} {' '.join(repr(value).split()):.80}."
    )


def split_field(dataset: str) -> tuple[str, str | None]:
    """Returns the path and the field of a `dataset` such as `texts.jsonl:body`, None for no field."""
    path, colon, field = dataset.rpartition(":")
    is_split = colon and field and os.path.isfile(path) and not os.path.exists(dataset)
    return (path, field) if is_split else (dataset, None)


def shareable_dataset(dataset: list[Any] | str | None) -> str | None:
    """Returns a `dataset` without the user's texts and folders: how many texts, the last component of a path."""
    if has_samples(dataset):
        return f"{len(dataset)} samples"
    if isinstance(dataset, list):
        return f"{len(dataset)} {'files' if all(map(os.path.isfile, dataset)) else 'texts'}"
    if dataset and (os.path.isabs(dataset) or os.path.exists(split_field(dataset)[0])):
        return os.path.basename(os.path.normpath(dataset))
    return dataset
