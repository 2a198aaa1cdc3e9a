"""Texts of tables (JSON, CSV, parquet and so on), of datasets of the hub, and of chats in them, through `datasets`."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from .grammar import Source

# Tables by the end of their name, packed ones too: the builder of `datasets` that reads them, and its options.
TABLES = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"delimiter": "\t"}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
}
_PACKED = (".gz", ".bz2", ".xz", ".zst")
_MIXED_ROWS = 1000  # rows of a dataset that are held at a time, to draw from


def table_kind(path: str) -> tuple[str, dict[str, Any]] | None:
    """Returns how `datasets` reads a file, None for what is no table."""
    name = path.lower()
    for end in _PACKED:
        name = name.removesuffix(end)
    return TABLES.get(Path(name).suffix)


def rows_of_table(path: str, field: str | None, tokenizer: Any) -> Iterator[str]:
    """Yields the texts of a table's field; rows without a text in it are left out.

    Args:
        path: of a file that `table_kind` knows.
        field: None for `text`, or the only one that holds texts.
        tokenizer: see `_chat`; may be None.

    Raises:
        ValueError: the file is damaged, there is no such field of texts, or `datasets` is not installed.
    """
    datasets, (builder, options) = _datasets(path), table_kind(path)
    with tempfile.TemporaryDirectory() as cache:
        source = {"data_files": _plainly_named(path, cache), "split": "train", "streaming": True, "cache_dir": cache}
        read = _Counted(lambda: datasets.load_dataset(builder, **source, **options))
        try:
            yield from _texts(read, path, field, tokenizer)
        except _NoText:
            raise
        except Exception as error:  # whatever datasets and the libraries below it raise
            if os.path.getsize(path) == 0:
                return
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(
                f"{path} cannot be read as {builder} after row {read.number} ({reason:.200}); repair it, or rename it "
                "to .txt if it is plain text."
            ) from error


def rows_of_dataset(source: Source, tokenizer: Any, seed: int) -> Iterator[str]:
    """Yields the texts of a dataset, streamed: files in an order that the seed decides, rows mixed some at a time.

    Args:
        source: of the kind "dataset".
        tokenizer: see `_chat`; may be None.
        seed: decides the order.

    Raises:
        ValueError: the dataset cannot be had, has no such field of texts, or `datasets` is not installed.
    """
    datasets = _datasets(source.name)
    split = source.split or "train"

    def load() -> Iterable[dict[str, Any]]:
        rows = datasets.load_dataset(source.name, source.config, split=split, streaming=True)
        return rows.shuffle(seed=seed, buffer_size=_MIXED_ROWS)

    read = _Counted(load)
    try:
        yield from _texts(read, source.name, source.field, tokenizer)
    except _NoText:
        raise
    except Exception as error:  # whatever datasets, the hub client or the network raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        which = f"configuration {source.config or 'default'}, split {split}"
        raise ValueError(
            f"The dataset {source.name} ({which}) cannot be read after row {read.number} ({reason:.300}); give "
            "owner/name:config:split:field of one on the hub, or the path of a file."
        ) from error


def _datasets(name: str) -> Any:
    """Returns the package that reads tables and datasets of the hub."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"Reading {name} needs the package datasets; install it with pip install 'crvq-hf[datasets]', or give a "
            "plain text file."
        ) from error
    return datasets


class _Counted:
    """Rows that are loaded once they are asked for; `number` says how many have been."""

    def __init__(self, load: Callable[[], Iterable[dict[str, Any]]]) -> None:
        self.load, self.number = load, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in self.load():
            self.number += 1
            yield row


def _texts(rows: _Counted, name: str, field: str | None, tokenizer: Any) -> Iterator[str]:
    """Yields the texts of a field of rows; those without a text in it are left out."""
    for row in rows:
        field = _field_of(row, name) if field is None else field
        if text := _text_in(row, field, rows.number, name, tokenizer):
            yield text


def _plainly_named(path: str, folder: str) -> str:
    """Returns another path of a file, by a link in `folder`: `datasets` takes names for patterns, and URLs."""
    link = Path(folder, f"table{''.join(Path(path).suffixes[-2:])}")
    try:
        link.symlink_to(os.path.abspath(path))
    except OSError:  # Windows lets not everyone make links
        shutil.copyfile(path, link)
    return str(link)


class _NoText(ValueError):
    """A table is in order, but has no such field of texts."""


def _text_in(row: dict[str, Any], field: str, number: int, name: str, tokenizer: Any) -> str | None:
    """Returns the text in a row, None if there is none; of chat messages, what the tokenizer's template makes."""
    if field not in row:
        raise _NoText(f"{name} has no field {field!r}; it has {', '.join(map(repr, row))}.")
    value = row[field]
    if _is_chat(value):
        return _chat(value, f"row {number} of {name}", tokenizer)
    if not isinstance(value, str | None):
        raise _NoText(
            f"The field {field!r} of {name} holds no text but {type(value).__name__} in row {number}; name one "
            f"that does, as in {name}:FIELD."
        )
    return value


def _is_chat(value: Any) -> bool:
    """Returns whether a value is a list of messages."""
    is_list = isinstance(value, list) and bool(value)
    return is_list and all(isinstance(item, dict) and {"role", "content"} <= item.keys() for item in value)


def _chat(messages: list[dict[str, Any]], where: str, tokenizer: Any) -> str:
    """Returns a conversation as the model reads it."""
    if not getattr(tokenizer, "chat_template", None):
        raise _NoText(
            f"There are chat messages in {where}, but the tokenizer has no chat template that would make a text of "
            "them; give a field of texts, or the tokenizer of a chat model."
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # whatever a template raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise _NoText(
            f"The chat template of the tokenizer does not take the messages in {where} ({reason:.160}); leave it out."
        ) from error


def _field_of(row: dict[str, Any], path: str) -> str:
    """Returns which field of a table holds its texts."""
    texts = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in row:
        return "text"
    if len(texts) == 1:
        return texts[0]
    raise _NoText(
        f"{path} has the fields {', '.join(map(repr, row))}; say which of them holds the text, as in {path}:FIELD."
    )
