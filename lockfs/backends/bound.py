"""Descriptions that an NFS 4 server ties to the locks it keeps for them.

What a client reads or writes through a description that has a lock names that lock (RFC 8881, 9.1: stateids
of locks), and the server refuses it once it has dropped the lock. The client then takes the lock for lost and
lets nothing more through that description (EIO), whatever it gets back for others of the same file. So a
description that is written through gets a lock of its own, in which nobody else can have an interest: what a
host has begun to write is refused as soon as the server has given its locks away.

A lock that is asked for once more says nothing: a client that was given a delegation of the file (RFC 8881,
10.4) answers by itself, and one whose lock is lost takes it anew, if it is free by then. A read past the
caches does: it is made under the lock, or the delegation that stands for it, and both are the server's to
know.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import secrets

from lockfs.linux import ofd

_FIRST = 1 << 62
"""The first of the bytes that descriptions have for themselves: no file reaches so far."""
_BYTES = 1 << 61
_ATTEMPTS_MAX = 4
_BEHIND = 1 << 43
"""A place where images have no data, and from which every file system can be asked to read."""
_BLOCK = 4096


def bind(descriptor: int) -> None:
    """Have a description that is open for writing refused by the server once the locks of this host are gone.

    Anew if it was bound before: that a lock of long ago is lost does not count then. Nothing may be written
    through it meanwhile. It ends with the description. Blocks.

    Raises:
        OSError: the storage refused the lock.
    """
    ofd.unlock(descriptor, _FIRST, 0)
    for _ in range(_ATTEMPTS_MAX):
        if ofd.try_lock(descriptor, ofd.WRITE, _FIRST + secrets.randbelow(_BYTES)):
            return
    raise BlockingIOError(errno.EAGAIN, "somebody has locked what images do not reach")


def can_ask(descriptor: int) -> bool:
    """Whether the server can be asked through the description: not if it is for writing or appending only."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    return flags & os.O_ACCMODE != os.O_WRONLY and not flags & os.O_APPEND


def ask(descriptor: int) -> None:
    """Return if the server knows the locks of the description, by reading past the caches, which it is made
    to do from now on. Blocks.

    Raises:
        OSError: EIO if it has dropped them; others if it did not say.
    """
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    if not flags & os.O_DIRECT:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
    with mmap.mmap(-1, _BLOCK) as room:
        os.preadv(descriptor, [room], _BEHIND)
