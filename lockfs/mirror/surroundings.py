"""What the keeper may ask about the mount it works for."""

from __future__ import annotations

import os

from lockfs.channel.handles import HandleTable, Kernel
from lockfs.linux import proc
from lockfs.mirror.modes import is_passed

QEMU_WRITE_BYTE = 101
"""The byte that QEMU keeps locked while a guest may write (block/file-posix.c, RAW_LOCK_PERM_BASE + 1)."""


class MirrorSurroundings:
    """Answers from /proc and from the open handles. Its methods run on worker threads.

    `device` is the mount's own st_dev, known only once it is mounted (0 before: nobody can hold anything).
    `unpassed` counts the open handles that are not in pure passthrough; the mirror keeps it.
    """

    def __init__(self, handles: HandleTable, kernel: Kernel) -> None:
        self._handles = handles
        self._kernel = kernel
        self.device = 0
        self.unpassed = 0

    @property
    def wants_taken(self) -> bool:
        """Whether `taken` may have something to drop.

        Nothing is opened with a page cache: only mappings of files that lockfs serves itself have pages,
        and each open drops those on its own.
        """
        return self.unpassed > 0

    def still_written(self, inode: int) -> bool:
        """Whether a guest on this mount holds QEMU's write byte on the image."""
        if not self.device:
            return False
        ranges = proc.locked_bytes(self.device, inode)
        return any(first <= QEMU_WRITE_BYTE <= last for first, last in ranges)

    def has_open(self, pid: int, inode: int) -> bool:
        """Whether the process holds a writable descriptor of the image, an inherited one included."""
        return bool(self.device) and proc.holds_open(pid, self.device, inode, True)

    def settle(self, inode: int) -> None:
        """Bring this host's data of the image to the storage."""
        for handle in self._handles.all():
            if handle.nodeid == inode and handle.writable:
                os.fsync(handle.descriptor)

    def taken(self, inode: int) -> None:
        """Drop the kernel's pages and attributes of an image that is open outside pure passthrough."""
        handles = (handle for handle in self._handles.all() if handle.nodeid == inode)
        if not all(is_passed(handle.open_flags) for handle in handles):
            self._kernel.invalidate(inode)
