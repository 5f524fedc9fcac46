"""The witness itself: it sees each kind of write that must not be there."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.cluster import witness
from tests.cluster.witness import Record


def _image(path: Path, records: Iterable[Record]) -> str:
    with open(path, "wb") as file:
        file.truncate(witness.IMAGE_BYTES)
        for record in records:
            file.seek(witness.place(record.term, record.number))
            file.write(witness.encode(record))
    return str(path)


def _term(host: str, term: int, last: int, seen: int = 0) -> list[Record]:
    return [Record(host, term, number, seen, 1.5) for number in range(1, last + 1)]


def test_a_clean_change_of_hands(tmp_path: Path) -> None:
    """What the next owner saw is all there is."""
    path = _image(tmp_path / "disk", [*_term("A", 1, 700), *_term("B", 2, 3, 700)])
    first, second = witness.examine(path)
    assert (first.host, first.landed, first.stale, first.holes) == ("A", 700, (), ())
    assert (second.host, second.landed, second.seen_before, second.stale) == ("B", 3, 700, ())


@pytest.mark.parametrize("late", [[6], [6, 7, 8], [900]])
def test_a_late_write_is_stale(tmp_path: Path, late: list[int]) -> None:
    """Also far behind the last one that the next owner saw."""
    stale = [Record("A", 1, number, 0, 9.0) for number in late]
    path = _image(tmp_path / "disk", [*_term("A", 1, 5), *_term("B", 2, 3, 5), *stale])
    assert witness.examine(path)[0].stale == tuple(late)


def test_a_write_that_is_missing_or_torn_is_a_hole(tmp_path: Path) -> None:
    """Somebody overwrote it, or half of it."""
    path = _image(tmp_path / "disk", [record for record in _term("A", 1, 9) if record.number != 4])
    descriptor = os.open(path, os.O_RDWR)
    os.pwrite(descriptor, b"B" * 512, witness.place(1, 7) + 512)
    os.close(descriptor)
    assert witness.examine(path)[0].holes == (4, 7)
