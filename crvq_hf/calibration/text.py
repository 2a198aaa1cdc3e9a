"""Text from wherever the user has it, and tokens of as much of it as is needed.

A text is a list of texts, a plain text file, a table or a dataset, of which one field holds texts. Nothing here
tokenizes more than it must: tokenizers take much time, and a hundred times the memory of the text.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..dataset.grammar import Source, split_field
from ..dataset.rows import TABLES, rows_of_dataset, rows_of_table, table_kind

_READ = 2**16  # characters read at once
_SEPARATOR = "\n\n"  # between texts
# Characters that are always tokenized whole. Of more, pieces are drawn, of so many characters per token of a sequence.
_WHOLE, _PIECE_FACTOR = 2**18, 8
_USUAL_LENGTH = 4  # characters of a token, as a first guess
# What is cut off a text changes how its last tokens are split, but not more of them than this.
_MARGIN = 64


def read_text(source: str | list[str], tokenizer: Any = None) -> Iterator[str]:
    """Yields a text piece by piece; all of them put together are the text.

    Args:
        source: texts; the path of a UTF-8 text file, or of a table (JSON, JSON lines, CSV, TSV, parquet, arrow), whose
            field is named as in `path:field`. Without, it is `text`, or the only one that holds texts.
        tokenizer: whose chat template makes a text of chat messages, where the field holds these.

    Raises:
        ValueError: the file is damaged, no UTF-8 text, or there is no such field of texts; or a table cannot be read
            because `datasets` is not installed.
    """
    if isinstance(source, list):
        yield from _joined(source)
        return
    path, field = split_field(source)
    if table_kind(path):
        yield from _joined(rows_of_table(path, field, tokenizer))
        return
    if field is not None:
        raise ValueError(
            f"{path} is no table, so it has no field {field!r}; tables end in {', '.join(TABLES)}, other files are "
            "read as plain text."
        )
    try:
        with open(path, encoding="utf-8") as file:
            while piece := file.read(_READ):
                yield piece
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {_wrong_byte(path)}).") from error


def streamed_tokens(source: Source, tokenizer: Any, most: int, seqlen: int, seed: int) -> tuple[Tensor, bool]:
    """Returns tokens of texts drawn from a dataset, `[tokens]`, int64, and whether it has no more of them.

    Rows are streamed: what is not needed is not downloaded. Of each text that is drawn, a piece is taken.

    Args:
        source: of the kind "dataset".
        tokenizer, most, seqlen: as for `drawn_tokens`.
        seed: decides which texts and which pieces.

    Raises:
        ValueError: the dataset cannot be had, has no such field of texts, or `datasets` is not installed.
    """
    generator, size = torch.Generator().manual_seed(seed), _PIECE_FACTOR * max(seqlen, 64)
    found, count = [], 0
    for text in rows_of_dataset(source, tokenizer, seed):
        pieces = _cut(text, size)
        piece = pieces[int(torch.randint(len(pieces), (), generator=generator))]
        found.append(_tokenize(tokenizer, piece if not found else _SEPARATOR + piece))
        count += len(found[-1])
        if count >= most:
            return torch.cat(found), False
    return torch.cat([torch.empty(0, dtype=torch.int64), *found]), True


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


def drawn_tokens(
    tokenizer: Any, text: str | Callable[[], Iterable[str]], most: int, seqlen: int, seed: int
) -> tuple[Tensor, bool]:
    """Returns tokens of pieces drawn from all over a text, `[tokens]`, int64, and whether that is all of the text.

    A text that is read is read some times over, and only the pieces that are drawn are kept.

    Args:
        tokenizer: a transformers tokenizer; no special tokens are added.
        text: any text, or what reads one from its start; a short one is taken whole.
        most: how many tokens are enough.
        seqlen: tokens of the sequences that they are for; pieces are longer.
        seed: decides which pieces.
    """
    read = text if callable(text) else lambda: (text,)
    start = _first_characters(read(), _WHOLE + 1)
    if len(start) <= _WHOLE:
        return _tokenize(tokenizer, start), True
    size = _PIECE_FACTOR * max(seqlen, 64)
    number = sum(1 for _ in _pieces(read(), size))
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed)).tolist()
    found: dict[int, Tensor] = {}
    count, of_a_piece = 0, size / _USUAL_LENGTH
    while count < most and len(found) < number:
        wanted = order[len(found) :][: math.ceil((most - count) / of_a_piece) + 1]
        texts = dict.fromkeys(wanted)
        texts |= {place: piece for place, piece in enumerate(_pieces(read(), size)) if place in texts}
        for place in wanted:
            found[place] = _tokenize(tokenizer, texts[place])
            count += len(found[place])
            if count >= most:
                break
        of_a_piece = max(1, count / len(found))
    return torch.cat([found[place] for place in sorted(found)]), len(found) == number


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


def _first_characters(pieces: Iterable[str], most: int) -> str:
    """Returns the first characters of a text, `most` or some more, or all that it has."""
    read, count = [], 0
    for piece in pieces:
        read.append(piece)
        count += len(piece)
        if count >= most:
            break
    return "".join(read)


def _cut(text: str, size: int) -> list[str]:
    """Returns the pieces of a text, see `_pieces`."""
    return [*_pieces((text,), size)]


def _pieces(texts: Iterable[str], size: int) -> Iterator[str]:
    """Yields pieces of at most `size` characters that end with a line, or at least a word, where there is one.

    Args:
        texts: the text, in any parts.
        size: characters.
    """
    held = ""
    for text in texts:
        held, start = held + text, 0
        while len(held) - start > size:
            line, word = held.rfind("\n", start, start + size) + 1, held.rfind(" ", start, start + size)
            end = line if line > start else word if word > start else start + size
            yield held[start:end]
            start = end
        held = held[start:]
    if held:
        yield held


def _joined(texts: Iterable[str]) -> Iterator[str]:
    for number, text in enumerate(texts):
        yield text if not number else _SEPARATOR + text


def _wrong_byte(path: str) -> int:
    """Returns where a file stops being UTF-8."""
    try:
        Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return 0
