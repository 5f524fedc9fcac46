"""The bytes of an image that a lease locks, and the order in which it locks them.

All locks are open-file-description locks on the image's descriptor and are tried, never waited for. Each
party that must be kept out looks at bytes of its own:

======================  ==========  =========  =====================================================
byte                    EXCLUSIVE   SHARED     who is kept out
======================  ==========  =========  =====================================================
OWN_BYTE (0x4c4b4653)   write       read       lockfs on another host, whatever options it runs with
0                       write       read       virtlockd in its direct mode (POSIX lock on byte 0)
1                       free        free       libvirt's metadata lock must stay possible
100, 101, 103           read        100 only   QEMU: "I use" consistent read, write, resize
201, 203                read        201 only   QEMU: "nobody else may" write, resize
======================  ==========  =========  =====================================================

OWN_BYTE is always locked, so that two hosts of which one has the bytes of virtlockd or QEMU turned off
still exclude one another; it is below 2**31 (old lock managers), and no byte of QEMU (100 to 104, 200 to
204), libvirt (0, 1) or SQLite (2**30 to 2**30 + 511). It comes first: of two lockfs hosts one wins there,
before either can disturb the other at the QEMU bytes.

QEMU's protocol: read-lock everything, then probe the mirror byte of each with a query for a write lock, and
drop all if one is in the way. Of two racers both may fail, never both succeed.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from lockfs.backends.base import Mode
from lockfs.linux import ofd

OWN_BYTE = 0x4C4B4653
VIRTLOCKD_BYTE = 0
LOST = (errno.EIO, errno.ENOLCK, errno.ESTALE, errno.EBADF)
"""What a lock call fails with where the storage has dropped the locks of the description."""

USED_WRITE = 101
UNSHARED_WRITE = 201
_QEMU_FIRST, _QEMU_LAST = 100, 204

_Ranges = tuple[tuple[int, int], ...]
# (first byte, length); neighbours are joined because each call is a round trip on network storage.
_EXCLUSIVE_LOCKS: _Ranges = ((100, 2), (103, 1), (201, 1), (203, 1))
_SHARED_LOCKS: _Ranges = ((100, 1), (201, 1))
_EXCLUSIVE_PROBES: _Ranges = ((101, 1), (103, 1), (200, 2), (203, 1))
_SHARED_PROBES: _Ranges = ((101, 1), (200, 1))
_ONLY_EXCLUSIVE: _Ranges = ((101, 3), (203, 1))


@dataclass(frozen=True)
class Parties:
    """Who besides lockfs is kept out by locks on the image itself."""

    virtlockd: bool
    qemu: bool


def take(fd: int, mode: Mode, parties: Parties) -> bool:
    """Lock the image, or strengthen SHARED locks to EXCLUSIVE; False if somebody is in the way.

    After False or OSError some locks may be held: the caller drops or narrows them.

    Raises:
        OSError: the storage refused for another reason than a conflict.
    """
    kind = ofd.WRITE if mode is Mode.EXCLUSIVE else ofd.READ
    if not ofd.try_lock(fd, kind, OWN_BYTE):
        return False
    if parties.virtlockd and not ofd.try_lock(fd, kind, VIRTLOCKD_BYTE):
        return False
    return not parties.qemu or _take_as_qemu(fd, mode)


def still_ours(fd: int, mode: Mode) -> bool:
    """Whether the storage still takes our lock for ours, asked by locking once more what is locked already.

    Raises:
        OSError: EIO, ENOLCK or ESTALE where it knows that the lock is lost (NFS: a server that restarted and
            let nobody reclaim, or gave up on this client); others if it did not say.
    """
    return ofd.try_lock(fd, ofd.WRITE if mode is Mode.EXCLUSIVE else ofd.READ, OWN_BYTE)


def _take_as_qemu(fd: int, mode: Mode) -> bool:
    exclusive = mode is Mode.EXCLUSIVE
    locks = _EXCLUSIVE_LOCKS if exclusive else _SHARED_LOCKS
    if not all(ofd.try_lock(fd, ofd.READ, start, length) for start, length in locks):
        return False
    return not qemu_in_the_way(fd, mode)


def qemu_in_the_way(fd: int, mode: Mode) -> bool:
    """Whether somebody else's locks on QEMU's bytes forbid `mode`; our own description's never do."""
    if ofd.conflict(fd, ofd.WRITE, _QEMU_FIRST, _QEMU_LAST - _QEMU_FIRST + 1) is None:
        return False  # the common case in one query; a mere reader (byte 100) needs the closer look
    probes = _EXCLUSIVE_PROBES if mode is Mode.EXCLUSIVE else _SHARED_PROBES
    return any(ofd.conflict(fd, ofd.WRITE, start, length) is not None for start, length in probes)


def narrow(fd: int, parties: Parties) -> None:
    """Weaken EXCLUSIVE locks, or half-taken ones, to SHARED; no conflict can stop this.

    Our own byte is last: until then no other lockfs host comes in.

    Raises:
        OSError: the storage failed; which locks are held is then not known.
    """
    if parties.qemu:
        for start, length in _ONLY_EXCLUSIVE:
            ofd.unlock(fd, start, length)
    if parties.virtlockd:
        _weaken(fd, VIRTLOCKD_BYTE)
    _weaken(fd, OWN_BYTE)


def _weaken(fd: int, byte: int) -> None:
    if not ofd.try_lock(fd, ofd.READ, byte):
        raise BlockingIOError(f"byte {byte}, locked for writing, could not be relocked for reading")


def drop(fd: int) -> None:
    """Unlock every byte of the image at once: one call, so it is done wholly or not at all."""
    ofd.unlock(fd, 0, 0)
