"""Numbers and tables in words."""

from collections.abc import Iterable


def megabytes(nbytes: int) -> str:
    """Returns a size in MB (10**6 bytes), with as many digits as are of interest."""
    return f"{nbytes / 1e6:,.{1 if nbytes >= 1e6 else 3}f} MB"


def format_table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Returns lines with the columns of `rows` aligned: the first to the left, the others to the right."""
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return lines
