"""Names of modules, and patterns that mean some of them: names, parts of names, or regexes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .dataset.grammar import listed


def is_named_by(name: str, patterns: Iterable[str]) -> bool:
    """Returns whether a pattern, a name or a regex, matches one or more whole components of the dotted `name`."""
    return any(re.search(rf"(?:^|\.)(?:{pattern})(?:\.|$)", name) for pattern in patterns)


def first_block(names: Iterable[str]) -> str | None:
    """Returns what names the first of the blocks that have the modules `names`, `layers.0` say; None if none has.

    These are the last two parts of its name. Other programs name what comes before in other ways.
    """
    matches = (re.match(r"(?:\w*[^.\d]\w*\.)*?(\w*[^.\d]\w*\.0)\.", name) for name in names)
    return next((match[1] for match in matches if match), None)


def checked_patterns(name: str, value: Any) -> list[str] | None:
    """Returns a list of patterns, or None; raises ValueError for what is neither."""
    if value is None:
        return None
    names = listed(value)
    if names is None or not all(isinstance(item, str) and item for item in names):
        raise ValueError(f"{name} must be a list of module names or None, got {value!r}.")
    for item in names:
        try:
            re.compile(item)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(
                f"{name} must hold names or regular expressions, but {item!r:.80} is neither: {error}."
            ) from None
    return names


def checked_overrides(
    name: str, value: Any, checks: Mapping[str, Callable[[str, Any], Any]]
) -> dict[str, dict[str, Any]] | None:
    """Returns settings of some layers by pattern, each checked; None for None or none.

    Args:
        name: of the field.
        value: settings by pattern, or this as JSON.
        checks: by what can be set: return the value, or raise ValueError.

    Raises:
        ValueError: it is no such thing.
    """
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        value = [value]
    if value is None or value == {}:
        return None
    if not isinstance(value, Mapping) or not all(isinstance(own, Mapping) and own for own in value.values()):
        example = '{"layers.0": {"critical_ratio": 1.0}}'
        raise ValueError(f"{name} must be settings by names of modules ({example}) or None, got {value!r:.80}.")
    checked_patterns(name, list(value))
    unknown = next((key for own in value.values() for key in own if key not in checks), None)
    if unknown is not None:
        raise ValueError(f"{name} cannot set {unknown!r:.80}, only {', '.join(checks)}.")
    return {
        pattern: {key: checks[key](f"{key} in {name}", one) for key, one in own.items()}
        for pattern, own in value.items()
    }


def told_overrides(overrides: Mapping[str, Mapping[str, Any]] | None) -> str:
    """Returns what to add to a line on the settings of all other layers, nothing for None."""
    each = (
        f"; {pattern}: " + ", ".join(f"{key} {value:g}" for key, value in own.items())
        for pattern, own in (overrides or {}).items()
    )
    return "".join(each)
