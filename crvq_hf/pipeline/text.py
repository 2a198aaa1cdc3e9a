"""Text from wherever the user has it, and tokens of as much of it as is needed.

A text is a list of texts, a plain text file, or a table, of which one field holds texts. Nothing here tokenizes more
than it must: tokenizers take much time, and a hundred times the memory of the text.
"""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..dataset import split_field

# Tables by the end of their name, packed ones too: the builder of `datasets` that reads them, and its options.
_TABLES = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"delimiter": "\t"}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
}
_PACKED = (".gz", ".bz2", ".xz", ".zst")
_READ = 2**16  # characters read at once
_SEPARATOR = "\n\n"  # between texts
# Characters that are always tokenized whole. Of more, pieces are drawn, of so many characters per token of a sequence.
_WHOLE, _PIECE_FACTOR = 2**18, 8
# What is cut off a text changes how its last tokens are split, but not more of them than this.
_MARGIN = 64


def read_text(source: str | list[str]) -> Iterator[str]:
    """Yields a text piece by piece; all of them put together are the text.

    Args:
        source: texts; the path of a UTF-8 text file, or of a table (JSON, JSON lines, CSV, TSV, parquet, arrow), whose
            field is named as in `path:field`. Without, it is `text`, or the only one that holds texts.

    Raises:
        ValueError: the file is damaged, no UTF-8 text, or there is no such field of texts; or a table cannot be read
            because `datasets` is not installed.
    """
    if isinstance(source, list):
        yield from _joined(source)
        return
    path, field = split_field(source)
    if kind := _table_kind(path):
        yield from _joined(_rows(path, field, *kind))
        return
    if field is not None:
        raise ValueError(
            f"{path} is no table, so it has no field {field!r}; tables end in {', '.join(_TABLES)}, other files are "
            "read as plain text."
        )
    try:
        with open(path, encoding="utf-8") as file:
            while piece := file.read(_READ):
                yield piece
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {_wrong_byte(path)}).") from error


def first_tokens(tokenizer: Any, pieces: Iterable[str], most: int | None) -> Tensor:
    """Returns the first tokens of a text, `[tokens]`, int64, as if it had been tokenized whole.

    Args:
        tokenizer: a transformers tokenizer; no special tokens are added.
        pieces: the text.
        most: how many tokens; None for all. There may be more, if the text ends soon, or fewer, none if it is blank.
    """
    pieces, text, wanted = iter(pieces), "", 0
    while True:
        wanted = max(2 * wanted, 4 * ((most or 0) + _MARGIN))
        read, length, piece = [text], len(text), ""
        while piece is not None and (most is None or length < wanted):
            piece = next(pieces, None)
            read.append(piece or "")
            length += len(read[-1])
        text = "".join(read)
        if piece is None:
            return _tokenize(tokenizer, text if text.strip() else "")
        tokens = _tokenize(tokenizer, text[:wanted])
        if len(tokens) >= most + _MARGIN:
            return tokens[:most]


def drawn_tokens(tokenizer: Any, text: str, most: int, seqlen: int, seed: int) -> tuple[Tensor, bool]:
    """Returns tokens of pieces drawn from all over a text, `[tokens]`, int64, and whether that is all of the text.

    Args:
        tokenizer: a transformers tokenizer; no special tokens are added.
        text: any text; a short one is taken whole.
        most: how many tokens are enough.
        seqlen: tokens of the sequences that they are for; pieces are longer.
        seed: decides which pieces.
    """
    pieces = [text] if len(text) <= _WHOLE else _cut(text, _PIECE_FACTOR * max(seqlen, 64))
    found: dict[int, Tensor] = {}
    count = 0
    for place in torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed)).tolist():
        found[place] = _tokenize(tokenizer, pieces[place])
        count += len(found[place])
        if count >= most:
            break
    return torch.cat([found[place] for place in sorted(found)]), len(found) == len(pieces)


def longest_text(model: nn.Module) -> int | None:
    """Returns how many tokens a model takes at once, None if any number (XLNet says -1)."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return longest if longest and longest > 0 else None


def check_tokens(model: nn.Module, tokens: Tensor) -> None:
    """Raises ValueError if there are tokens that the model's embedding has no row for."""
    try:
        rows = model.get_input_embeddings().weight.shape[0]
    except (AttributeError, NotImplementedError):  # no embedding that could be asked
        return
    if tokens.numel() and tokens.max() >= rows:
        raise ValueError(
            f"The tokenizer gives token {int(tokens.max())}, but the embedding of {type(model).__name__} has {rows} "
            "rows; take the tokenizer that belongs to the model, or resize_token_embeddings and train it first."
        )


def _tokenize(tokenizer: Any, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)


def _cut(text: str, size: int) -> list[str]:
    """Returns pieces of at most `size` characters that end with a line, or at least a word, where there is one."""
    pieces, start = [], 0
    while start < len(text):
        end = start + size
        if end < len(text):
            line, word = text.rfind("\n", start, end) + 1, text.rfind(" ", start, end)
            end = line if line > start else word if word > start else end
        pieces.append(text[start:end])
        start = end
    return pieces


def _joined(texts: Iterable[str]) -> Iterator[str]:
    for number, text in enumerate(texts):
        yield text if not number else _SEPARATOR + text


def _table_kind(path: str) -> tuple[str, dict[str, Any]] | None:
    """Returns how `datasets` reads a file, None for what is no table."""
    name = path.lower()
    for end in _PACKED:
        name = name.removesuffix(end)
    return _TABLES.get(Path(name).suffix)


def _rows(path: str, field: str | None, builder: str, options: dict[str, Any]) -> Iterator[str]:
    """Yields the texts of a table's field; rows without a text in it are left out."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"Reading {path} needs the package datasets; install it with pip install 'crvq-hf[datasets]', or give a "
            "plain text file."
        ) from error
    with tempfile.TemporaryDirectory() as cache:
        source = {"data_files": _plainly_named(path, cache), "split": "train", "streaming": True, "cache_dir": cache}
        number = 0
        try:
            for number, row in enumerate(datasets.load_dataset(builder, **source, **options), 1):
                field = _field_of(row, path) if field is None else field
                if text := _text_in(row, field, number, path):
                    yield text
        except _NoText:
            raise
        except Exception as error:  # whatever datasets and the libraries below it raise
            if os.path.getsize(path) == 0:
                return
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(
                f"{path} cannot be read as {builder} after row {number} ({reason:.200}); repair it, or rename it to "
                ".txt if it is plain text."
            ) from error


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


def _text_in(row: dict[str, Any], field: str, number: int, path: str) -> str | None:
    """Returns the text in a row of a table, None if there is none."""
    if field not in row:
        raise _NoText(f"{path} has no field {field!r}; it has {', '.join(map(repr, row))}.")
    if not isinstance(row[field], str | None):
        raise _NoText(
            f"The field {field!r} of {path} holds no text but {type(row[field]).__name__} in row {number}; name one "
            f"that does, as in {path}:FIELD."
        )
    return row[field]


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


def _wrong_byte(path: str) -> int:
    """Returns where a file stops being UTF-8."""
    try:
        Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return 0
