"""What a `dataset` may be, the calibration data of a run: its check, and its parts.

The one place that knows the grammar of one that is a string; `rows` and `calibration.text` read what is named:

    dataset = source
            | source ":" share "," source ":" share ...    a mixture by shares of sequences: a.txt:0.7,b.txt:0.3
    source  = "self" | "wikitext2" | "c4"                  what the model writes; what optimum loads
            | FILE | FILE ":" field                        a text file; a table, and its field of texts or chats
            | NAME [":" field]                             a dataset on the hub, owner/name, or a folder of one,
            | NAME ":" config [":" split] ":" field        streamed; its configuration, split ("train") and field

What exists by the exact name of a source, or of the whole, is that: colons and commas may be in the names of files. A
configuration or split that is empty is as if it were not there.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass, replace
from typing import Any

import torch

OF_OPTIMUM = ("wikitext2", "c4")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_FILE_NAME = re.compile(r".*\.(txt|text|md|json|jsonl|ndjson|csv|tsv|parquet|arrow|gz|bz2|xz|zst)", re.IGNORECASE)
_SHARE = re.compile(r":([0-9]+\.?[0-9]*|\.[0-9]+)\s*(?:,|$)")


@dataclass(frozen=True)
class Source:
    """A text to calibrate on.

    Attributes:
        kind: "self", "optimum", "file" or "dataset".
        name: as it is found: of a file, a folder, on the hub, or a name with a meaning of its own.
        field: of a table or dataset: which field has the texts, None if that is to be found.
        config: of a dataset, None for its only or default one.
        split: of a dataset, None for "train".
        share: of the sequences of a mixture, any positive number; they are divided by their sum.
    """

    kind: str
    name: str
    field: str | None = None
    config: str | None = None
    split: str | None = None
    share: float = 1.0

    @property
    def spelled(self) -> str:
        """What it is in a `dataset`, without its share."""
        parts = (self.config or "", self.split or "", self.field or "") if self.kind == "dataset" else (self.field,)
        return ":".join([self.name, *(part for part in parts if part is not None)])

    @property
    def is_local(self) -> bool:
        """Whether it lies on this machine's disk."""
        return self.kind in ("file", "dataset") and os.path.exists(self.name)


def sources_of(dataset: str) -> list[Source]:
    """Returns the sources of a `dataset` that is a string, one unless it is a mixture.

    Raises:
        ValueError: a share of a mixture is no positive number.
    """
    parts = [] if os.path.exists(dataset) else _mixture(dataset)
    if len(parts) < 2:
        return [_source(dataset)]
    if not all(0 < share < math.inf for _, share in parts):
        raise ValueError(f"dataset={dataset!r:.200} has shares that are not greater than 0; give such as 0.7 and 0.3.")
    return [replace(_source(text), share=share) for text, share in parts]


def _mixture(text: str) -> list[tuple[str, float]]:
    """Returns the sources and shares that a text lists, none if it does not."""
    found, start = [], 0
    while start < len(text):
        ends = [match for match in _SHARE.finditer(text, start) if match.start() > start]
        if not ends:
            return []
        exact = (match for match in ends if os.path.exists(split_field(text[start : match.start()].strip())[0]))
        end = next(exact, ends[0])
        found.append((text[start : end.start()].strip(), float(end[1])))
        start = end.end()
    return found


def _source(text: str) -> Source:
    if not os.path.exists(text) and text in ("self", *OF_OPTIMUM):
        return Source("self" if text == "self" else "optimum", text)
    path, field = split_field(text)
    if not os.path.exists(path):
        for most in range(4):
            name, *parts = text.rsplit(":", most)
            on_hub = _HUB_NAME.fullmatch(name) and not _FILE_NAME.fullmatch(name)
            if on_hub or (parts and os.path.isdir(name)):
                config, split, field = [[None] * 3, [None, None, *parts], [*parts[:1], None, *parts[1:]], parts][most]
                return Source("dataset", name, field or None, config or None, split or None)
    return Source("file", path, field)


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
        f"{name} must be 'self', 'wikitext2', 'c4', the path of a text file, path:field of a table, "
        "owner/name:config:split:field of the hub, a mixture such as a.txt:0.7,b.txt:0.3, a folder of sound files, a "
        "non-empty list or column of texts, a list of dicts of what the model takes, or None, "
        f"got {type(value).__name__} {' '.join(repr(value).split()):.80}."
    )


def split_field(dataset: str) -> tuple[str, str | None]:
    """Returns the path and the field of a file such as `texts.jsonl:body`, None for no field."""
    path, colon, field = dataset.rpartition(":")
    is_split = colon and field and os.path.isfile(path) and not os.path.exists(dataset)
    return (path, field) if is_split else (dataset, None)


def shareable_dataset(dataset: list[Any] | str | None) -> str | None:
    """Returns a `dataset` without the user's texts and folders: how many texts, the last component of a path."""
    if has_samples(dataset):
        return f"{len(dataset)} samples"
    if isinstance(dataset, list):
        return f"{len(dataset)} {'files' if all(map(os.path.isfile, dataset)) else 'texts'}"
    if dataset and not os.path.exists(dataset) and len(parts := _mixture(dataset)) > 1:
        return ",".join(f"{shareable_dataset(text)}:{share:g}" for text, share in parts)
    if dataset and (os.path.isabs(dataset) or os.path.exists(split_field(dataset)[0]) or _source(dataset).is_local):
        return os.path.basename(os.path.normpath(dataset))
    return dataset
