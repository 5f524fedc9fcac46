"""What requests are read into is in memory before the first one comes."""

from __future__ import annotations

import ctypes

from lockfs.channel.device import MAX_WRITE, PAGE
from lockfs.channel.protocol import WRITE_HEADER_BYTES
from lockfs.channel.relay import Buffers

_libc = ctypes.CDLL(None, use_errno=True)


def _absent(room: memoryview) -> int:
    """How many pages of a piece of memory are not there (mincore(2))."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(room))
    start = address - address % PAGE
    pages = -(-(address + len(room) - start) // PAGE)
    there = (ctypes.c_ubyte * pages)()
    if _libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(pages * PAGE), there):
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(not page & 1 for page in there)


def test_all_of_it_is_there() -> None:
    """While a process is being killed the kernel makes no page for it: the request would fail with EIO."""
    buffers = Buffers()
    assert len(buffers.all) == WRITE_HEADER_BYTES + MAX_WRITE + PAGE
    assert _absent(buffers.all) == 0


def test_the_data_of_a_write_are_aligned() -> None:
    buffers = Buffers()
    assert ctypes.addressof(ctypes.c_char.from_buffer(buffers.data)) % PAGE == 0
    assert ctypes.addressof(ctypes.c_char.from_buffer(buffers.all)) % PAGE == PAGE - WRITE_HEADER_BYTES
