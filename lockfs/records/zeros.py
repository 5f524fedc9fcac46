"""Which sectors of an area were ever written: those that are not all zero, found without copying any."""

from __future__ import annotations

from collections.abc import Iterator

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
    return _used(view, sector_size, first, end)


def _used(view: memoryview, size: int, first: int, end: int) -> Iterator[int]:
    # `startswith` compares memory with memory; `==` of a view goes by single elements.
    is_zero = _ZEROS.startswith
    many, few = (run // size for run in _RUNS)
    for start in range(first, end, many):
        stop = min(start + many, end)
        if is_zero(view[start * size : stop * size]):
            continue
        for part in range(start, stop, few):
            part_end = min(part + few, stop)
            if is_zero(view[part * size : part_end * size]):
                continue
            for sector in range(part, part_end):
                if not is_zero(view[sector * size : (sector + 1) * size]):
                    yield sector
