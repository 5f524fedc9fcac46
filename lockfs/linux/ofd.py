"""Open-file-description locks (fcntl(2), "Open file description locks"), never waiting.

Used instead of POSIX locks because those vanish when any descriptor of the file is closed anywhere in
the process, and because these live as long as the open file description, in the kernel, does.
"""

from __future__ import annotations

import errno
import fcntl
import struct
from dataclasses import dataclass

F_OFD_GETLK = 36
F_OFD_SETLK = 37
READ, WRITE, UNLOCK = 0, 1, 2
_FLOCK = struct.Struct("hhqqi4x")


@dataclass(frozen=True)
class Conflict:
    """A lock in the way: its type (READ or WRITE), first byte, length (0: to the end) and pid.

    `pid` is -1 for an open-file-description lock, whose owner the kernel does not tell.
    """

    kind: int
    start: int
    length: int
    pid: int


def try_lock(fd: int, kind: int, start: int, length: int = 1) -> bool:
    """Lock or unlock a byte range; False if another description's lock is in the way.

    Raises:
        OSError: EBADF if `fd` is not open in the way `kind` needs, ENOLCK without a lock manager.
    """
    try:
        fcntl.fcntl(fd, F_OFD_SETLK, _FLOCK.pack(kind, 0, start, length, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def unlock(fd: int, start: int, length: int = 1) -> None:
    """Drop this description's locks on a byte range."""
    fcntl.fcntl(fd, F_OFD_SETLK, _FLOCK.pack(UNLOCK, 0, start, length, 0))


def conflict(fd: int, kind: int, start: int, length: int = 1) -> Conflict | None:
    """The first lock that would keep `fd` from locking the range, or None."""
    answer = fcntl.fcntl(fd, F_OFD_GETLK, _FLOCK.pack(kind, 0, start, length, 0))
    found, _, at, size, pid = _FLOCK.unpack(answer)
    return None if found == UNLOCK else Conflict(found, at, size, pid)
