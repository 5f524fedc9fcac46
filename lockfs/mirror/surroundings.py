"""What the keeper may ask about the mount it works for."""

from __future__ import annotations

import errno
import os
import time

from lockfs.channel.handles import HandleTable, Kernel
from lockfs.keeper.gate import GateState
from lockfs.linux import calls, proc
from lockfs.linux.proc import Process
from lockfs.mirror.fences import Fences
from lockfs.mirror.modes import is_passed

QEMU_WRITE_BYTE = 101
"""The byte that QEMU keeps locked while a guest may write (block/file-posix.c, RAW_LOCK_PERM_BASE + 1)."""


WRITE_S = 1.0
_PAGE = 4096


class MirrorSurroundings:
    """Answers from /proc and from the open handles. Its methods run on worker threads.

    `device` is the mount's own st_dev, known only once it is mounted (0 before: nobody can hold anything).
    `store_device` is the store's own. `unpassed` counts the open handles that are not in pure passthrough;
    the mirror keeps it.
    """

    def __init__(self, handles: HandleTable, kernel: Kernel) -> None:
        self._handles = handles
        self._kernel = kernel
        self.fences: Fences | None = None
        self.device = 0
        self.store_device = 0
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

    def bypassed(self, inode: int) -> bool:
        """Whether a live handle that can write is served by the kernel alone."""
        handles = (handle for handle in self._handles.all() if handle.nodeid == inode and not handle.dead)
        return any(is_passed(handle.open_flags) and handle.writable for handle in handles)

    async def revoke(self, inodes: frozenset[int]) -> dict[int, str]:
        """Make everything that is open of the images dead (see Fences)."""
        if self.fences is None:
            return dict.fromkeys(inodes, "the mirror is not complete")
        return await self.fences.revoke(inodes)

    def mappers(self, inodes: frozenset[int]) -> dict[int, frozenset[Process]]:
        """Processes that map images shared and writable, under the mount's device or the store's."""
        found = proc.shared_mappers({self.device, self.store_device}, set(inodes))
        own = os.getpid()
        return {
            inode: frozenset(proc.process_of(pid) for pid in pids if pid != own)
            for inode, pids in found.items()
        }

    def has_open(self, pid: int, inode: int) -> bool:
        """Whether the process holds a writable descriptor of the image, an inherited one included."""
        return bool(self.device) and proc.holds_open(pid, self.device, inode, True)

    def kill(self, processes: frozenset[tuple[int, int]], deadline_s: float) -> set[tuple[int, int]]:
        """Kill processes and wait for their ends; those that are not gone in time."""
        return proc.kill_all(processes, deadline_s)

    def settle(self, inode: int, *, revoked: bool = False) -> None:
        """Bring this host's data of the image to the storage."""
        handles = [handle for handle in self._handles.all() if handle.nodeid == inode and handle.writable]
        if revoked and handles:
            _await_direct_writes(handles[0].descriptor)
        if handles:
            _flush(handles[0].descriptor)

    def unwritten(self, inode: int) -> list[int]:
        """See the keeper's Surroundings."""
        return [
            handle.descriptor
            for handle in self._handles.all()
            if handle.nodeid == inode and handle.writable and not handle.dead
            if handle.gate is not None and handle.gate.state is GateState.ASK
        ]

    def taken(self, inode: int) -> None:
        """Drop the kernel's pages and attributes of an image that is open outside pure passthrough."""
        handles = (handle for handle in self._handles.all() if handle.nodeid == inode)
        if not all(is_passed(handle.open_flags) for handle in handles):
            self._kernel.invalidate(inode)


def _flush(descriptor: int) -> None:
    """Bring the file's data to the storage, through an open file of its own: the kernel tells an error that
    lies behind once through each, and through its own a guest must still be told of it.
    """
    flushing = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        os.fsync(flushing)
    finally:
        os.close(flushing)


def _await_direct_writes(descriptor: int) -> None:
    """Wait until no direct write of the file is under way, whoever began it.

    File systems do that before they punch a hole (inode_dio_wait), here one behind the end, where nothing is.
    One that punches none is left the time that a write takes.
    """
    behind = os.fstat(descriptor).st_size + _PAGE & -_PAGE
    try:
        calls.fallocate(descriptor, calls.FALLOC_FL_PUNCH_HOLE | calls.FALLOC_FL_KEEP_SIZE, behind, _PAGE)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EFBIG):
            raise
        time.sleep(WRITE_S)
