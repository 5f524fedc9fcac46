"""System calls that only the mirror needs."""

from __future__ import annotations

import ctypes
import os

from lockfs.linux.calls import AT_FDCWD

RESOLVE_CACHED = 0x20
"""openat2(2): answer from memory or fail with EAGAIN, never wait for a disk or a server (Linux 5.12)."""
RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4
_UTIME_OMIT = (1 << 30) - 2
_NS_PER_S = 1_000_000_000
_STATFS_BYTES = 256

_EXT, _XFS, _BTRFS, _TMPFS, _F2FS = 0xEF53, 0x58465342, 0x9123683E, 0x01021994, 0xF2F52010
_ATTRIBUTES_IN_MEMORY = frozenset({_EXT, _XFS, _BTRFS, _TMPFS, _F2FS})

_libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_int64))


_libc.utimensat.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(_Timespec), ctypes.c_int]
_libc.fstatfs.argtypes = [ctypes.c_int, ctypes.c_char_p]


def _check(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def set_times(path: str, accessed: int | None, modified: int | None) -> None:
    """utimensat(2): times in nanoseconds since the epoch; None leaves one as it is."""
    times = (_Timespec * 2)()
    for slot, value in zip(times, (accessed, modified), strict=True):
        if value is None:
            slot.nanoseconds = _UTIME_OMIT
        else:
            slot.seconds, slot.nanoseconds = divmod(value, _NS_PER_S)
    _check(_libc.utimensat(AT_FDCWD, os.fsencode(path), times, 0))


def attributes_in_memory(fd: int) -> bool:
    """Whether fstat(2) of a file held open never waits for a disk or a server (fstatfs(2), f_type).

    True for the local file systems that keep an open file's whole inode in memory. Shared ones ask a
    server or take a cluster lock.
    """
    answer = ctypes.create_string_buffer(_STATFS_BYTES)
    _check(_libc.fstatfs(fd, answer))
    return ctypes.c_long.from_buffer(answer).value in _ATTRIBUTES_IN_MEMORY
