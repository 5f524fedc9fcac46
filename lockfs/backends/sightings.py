"""Who else has locks on an image, as far as its bytes, its lock file and the owner records tell.

A lock in the way has at most a process id (a POSIX lock of this machine); open-file-description locks, and
on network storage all locks, are anonymous. So the party is told by the byte it locks: see image_locks.
"""

from __future__ import annotations

from lockfs.backends import image_locks
from lockfs.backends.base import Holder, Mode, Owner
from lockfs.backends.image_locks import OWN_BYTE, VIRTLOCKD_BYTE, Parties
from lockfs.backends.owners import OwnerRecords
from lockfs.linux import ofd, proc

LOCKFS = "lockfs"
VIRTLOCKD = "virtlockd"
QEMU = "QEMU without lockfs"
ANOTHER = "another program"

_VIRTLOCKD_PROGRAM = "virtlockd"
SINCE_UNKNOWN = 0.0


def _mode(conflict: ofd.Conflict) -> Mode:
    return Mode.EXCLUSIVE if conflict.kind == ofd.WRITE else Mode.SHARED


def _owner(conflict: ofd.Conflict, host: str) -> Owner | None:
    """The local process of a POSIX lock; `host` is this host's name."""
    if conflict.pid <= 0:
        return None
    return Owner(host, conflict.pid, proc.process_of(conflict.pid).program, SINCE_UNKNOWN)


def on_lock_byte(conflict: ofd.Conflict, host: str) -> Holder:
    """Who has a lock on virtlockd's byte of an image or lock file, lockfs being ruled out.

    A remote virtlockd has no process id here, and a local one may not be told from another program but by
    its name; a lock on more than the byte is never virtlockd's.
    """
    owner = _owner(conflict, host)
    exact = conflict.start == VIRTLOCKD_BYTE and conflict.length == 1
    known = owner is None or owner.program == _VIRTLOCKD_PROGRAM
    return Holder(_mode(conflict), VIRTLOCKD if exact and known else ANOTHER, owner)


def lockfs_holders(fd: int, inode: int, records: OwnerRecords, host: str) -> list[Holder]:
    """The lockfs hosts that hold the image, or whoever else locks their byte; empty if nobody does."""
    conflict = ofd.conflict(fd, ofd.WRITE, OWN_BYTE)
    if conflict is None:
        return []
    mode = _mode(conflict)
    if conflict.start != OWN_BYTE or conflict.length != 1 or conflict.pid > 0:
        return [Holder(mode, ANOTHER, _owner(conflict, host))]
    owners = records.read(inode, mode)
    return [Holder(mode, LOCKFS, owner) for owner in owners] or [Holder(mode, LOCKFS)]


def qemu_holders(fd: int, host: str) -> list[Holder]:
    """A QEMU that writes the image (byte 101 or another that only writers lock) or wants it unchanged."""
    if not image_locks.qemu_in_the_way(fd, Mode.EXCLUSIVE):
        return []
    writes = image_locks.qemu_in_the_way(fd, Mode.SHARED)
    byte = image_locks.USED_WRITE if writes else image_locks.UNSHARED_WRITE
    conflict = ofd.conflict(fd, ofd.WRITE, byte)
    if conflict is not None and (conflict.kind == ofd.WRITE or conflict.pid > 0):
        return [Holder(_mode(conflict), ANOTHER, _owner(conflict, host))]
    return [Holder(Mode.EXCLUSIVE if writes else Mode.SHARED, QEMU)]


def parties_on_bytes(fd: int, parties: Parties, host: str) -> list[Holder]:
    """Who, lockfs being ruled out, locks bytes of the image that lockfs would lock too."""
    found = []
    if parties.virtlockd:
        conflict = ofd.conflict(fd, ofd.WRITE, VIRTLOCKD_BYTE)
        if conflict is not None:
            found.append(on_lock_byte(conflict, host))
    if parties.qemu:
        found += qemu_holders(fd, host)
    return found
