"""Which sectors of an area were ever written: those that are not all zero, found without copying any."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

_RUNS = (64 << 10, 4 << 10)
"""Bytes compared at once, and again in parts if they are not all zero. Multiples of every sector size."""
_ZEROS = bytes(_RUNS[0])


def used_sectors(area: bytes | memoryview, sector_size: int, first: int, end: int) -> Iterator[int]:
    """The numbers of those sectors from `first` to before `end` that have a byte which is not zero.

    Runs of zeros, the usual case, are passed over at the speed at which memory is read.

    Raises:
        ValueError: the area ends before `end`; what is not there must not be taken for unused.
    """
    view = memoryview(area)
    if first < end and view.nbytes < end * sector_size:
        raise ValueError(f"{view.nbytes} bytes are not {end} sectors of {sector_size}")
    return _used(view, sector_size, first, end, [run // sector_size for run in _RUNS])


def _used(view: memoryview, size: int, first: int, end: int, runs: Sequence[int]) -> Iterator[int]:
    run = runs[0] if runs else 1
    for sector in range(first, end, run):
        stop = min(sector + run, end)
        # `startswith` compares memory with memory; `==` of a view goes by single elements.
        if _ZEROS.startswith(view[sector * size : stop * size]):
            continue
        if runs and stop - sector > 1:
            yield from _used(view, size, sector, stop, runs[1:])
        else:
            yield sector
