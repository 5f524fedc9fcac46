"""Text tables for people: columns as wide as they need be, nothing that could upset a terminal."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

_GAP = "  "


def printable(value: object) -> str:
    """The value as text; control characters, odd bytes and the like come out escaped, nothing as "-"."""
    if value is None or value == "":
        return "-"
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in str(value).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    )


def local_time(epoch_s: object) -> str:
    """A time for people in this machine's zone, to the second; "-" if it is none."""
    if not isinstance(epoch_s, int | float) or isinstance(epoch_s, bool) or epoch_s <= 0:
        return "-"
    try:
        return datetime.datetime.fromtimestamp(epoch_s).strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, ValueError, OSError):
        return "-"


def render(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines with a heading; every row has as many cells as there are headings."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    lines = []
    for row in (headings, *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append(_GAP.join(cells).rstrip())
    return "\n".join(lines)
