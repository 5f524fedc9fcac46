"""Memory for O_DIRECT transfers: page-aligned, and never lent twice at a time."""

from __future__ import annotations

import contextlib
import mmap

KEPT_BUFFERS_MAX = 4
AREA_BUFFER_BYTES = 2 << 20


class Buffers:
    """A few mappings kept for the next transfer, so that a sector's I/O costs no mapping of its own.

    A buffer belongs to the thread that took it until that thread, back from the kernel, gives it back; a
    caller that no longer waits changes nothing about that. Single list operations only, which are atomic:
    there is no lock for a stuck thread to hold. Of each of two sizes, a page and AREA_BUFFER_BYTES,
    KEPT_BUFFERS_MAX are kept, and one more for each thread that gives one back in the same moment; of larger
    ones none.
    """

    def __init__(self) -> None:
        self._pages: list[mmap.mmap] = []
        self._areas: list[mmap.mmap] = []

    def take(self, length: int) -> mmap.mmap:
        """A buffer of at least `length` bytes, for the caller alone; what it holds is arbitrary."""
        size = mmap.PAGESIZE if length <= mmap.PAGESIZE else max(length, AREA_BUFFER_BYTES)
        try:
            return self._kept(size).pop()
        except IndexError:
            return _mapping(size)

    def give_back(self, buffer: mmap.mmap) -> None:
        """End the use of a buffer that no I/O touches any more."""
        kept = self._kept(len(buffer))
        if len(kept) < KEPT_BUFFERS_MAX:
            kept.append(buffer)

    def _kept(self, size: int) -> list[mmap.mmap]:
        """Those that are kept of exactly this size; a list for the bin, if none are."""
        return {mmap.PAGESIZE: self._pages, AREA_BUFFER_BYTES: self._areas}.get(size, [])


def _mapping(size: int) -> mmap.mmap:
    """Private memory that a fork leaves out: a copy made while a device writes to it would split the two.

    See the notes on O_DIRECT and fork(2) in open(2). Large ones are asked for in huge pages, where the kernel
    has them: a device writes to these in few pieces, which can more than halve the time of an area's read.
    """
    buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer.madvise(mmap.MADV_DONTFORK)
    if size >= AREA_BUFFER_BYTES:
        with contextlib.suppress(OSError):
            buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer
