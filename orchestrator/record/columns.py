"""Tables for a terminal. Light: whoever only lists studies loads no pandas for it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

WIDE = 110  # columns of a terminal that a table stays within, where its words can be broken
NARROWEST = 24  # letters that words are broken to at most


def broken(cells: Sequence[Sequence[str]], words: Sequence[bool]) -> list[list[str]]:
    """The rows with the cells that `words` marks broken into several lines where all would be wider than `WIDE`.

    What does not fit goes on in rows below, indented; the widest column of words is broken first.
    """
    rows = [list(row) for row in cells]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    over = sum(widths) + 2 * (len(widths) - 1) - WIDE
    for column in sorted((at for at, told in enumerate(words) if told), key=lambda at: -widths[at]):
        if over > 0 and widths[column] > NARROWEST:
            least = max(NARROWEST, widths[column] - over)
            over -= widths[column] - least
            rows = [line for row in rows for line in _lines(row, column, least)]
    return rows


def _lines(row: list[str], column: int, width: int) -> list[list[str]]:
    first, *others = textwrap.wrap(row[column], width, subsequent_indent="  ", break_on_hyphens=False) or [""]
    empty = [""] * len(row)
    return [
        [*row[:column], first, *row[column + 1 :]],
        *([*empty[:column], text, *empty[column + 1 :]] for text in others),
    ]


def aligned(cells: Sequence[Sequence[str]], left: Sequence[bool]) -> str:
    """Rows of cells under the first one and a rule: columns that `left` marks to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if first else cell.rjust(width)
            for cell, width, first in zip(row, widths, left, strict=True)
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])
