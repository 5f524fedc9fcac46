"""System calls that only the mirror needs."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

from lockfs.linux.calls import AT_FDCWD

RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4
_UTIME_OMIT = (1 << 30) - 2
_NS_PER_S = 1_000_000_000

_libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_int64))


_libc.utimensat.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(_Timespec), ctypes.c_int]


def _check(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def truncate(path: str, size: int, bind: Callable[[int], None] | None) -> None:
    """truncate(2), through a description of its own if there is `bind`, which is given it first."""
    if bind is None:
        os.truncate(path, size)
        return
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        bind(descriptor)
        os.ftruncate(descriptor, size)
    finally:
        os.close(descriptor)


def set_times(path: str, accessed: int | None, modified: int | None) -> None:
    """utimensat(2): times in nanoseconds since the epoch; None leaves one as it is."""
    times = (_Timespec * 2)()
    for slot, value in zip(times, (accessed, modified), strict=True):
        if value is None:
            slot.nanoseconds = _UTIME_OMIT
        else:
            slot.seconds, slot.nanoseconds = divmod(value, _NS_PER_S)
    _check(_libc.utimensat(AT_FDCWD, os.fsencode(path), times, 0))
