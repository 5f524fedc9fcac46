"""What is asked of the kernel about an open file: the two transfers, and their alignment."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence
from typing import Protocol

_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000  # linux/stat.h, since 6.1
_STATX_BYTES = 256
_STATX_DIO_OFFSET_ALIGN = 156

_libc = ctypes.CDLL(None, use_errno=True)


class RawIO(Protocol):
    """Calls that block, for as long as the storage likes."""

    def preadv(self, descriptor: int, buffers: Sequence[memoryview], offset: int, /) -> int:
        """Read into the buffers from byte `offset`; how many bytes came. Raises OSError."""

    def pwritev(self, descriptor: int, buffers: Sequence[memoryview], offset: int, /) -> int:
        """Write the buffers to byte `offset`; how many bytes went. Raises OSError."""

    def alignment(self, descriptor: int, /) -> int | None:
        """What offsets and lengths in a file must be multiples of under O_DIRECT, in bytes, if it is told.

        0: no direct I/O is done there. None: it is not told.
        """


class Kernel(RawIO):
    """The kernel's own answers: preadv(2), pwritev(2), statx(2)."""

    def preadv(self, descriptor: int, buffers: Sequence[memoryview], offset: int, /) -> int:
        """See RawIO."""
        return os.preadv(descriptor, buffers, offset)

    def pwritev(self, descriptor: int, buffers: Sequence[memoryview], offset: int, /) -> int:
        """See RawIO."""
        return os.pwritev(descriptor, buffers, offset)

    def alignment(self, descriptor: int, /) -> int | None:
        """See RawIO; told since Linux 6.1, by some file systems."""
        result = ctypes.create_string_buffer(_STATX_BYTES)
        if _libc.statx(descriptor, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, result) != 0:
            return None  # forbidden by a container's filter
        (mask,) = struct.unpack_from("=I", result)
        if not mask & _STATX_DIOALIGN:
            return None
        return int(struct.unpack_from("=I", result, _STATX_DIO_OFFSET_ALIGN)[0])
