"""Revoking what is open of files, through the kernel.

A LOOKUP answered with a node number that the kernel knows and another generation makes it give the old inode
up: every later read, write, fsync and stat through a descriptor opened before fails with EIO, also where the
kernel serves the data itself; a new open gets a new inode (fs/fuse/inode.c, fuse_iget; docs/fencing.md). The
name that is looked up need not be the file's own: it is made up for the purpose, so that files without a name
are reached as well. Memory that maps the file is not. The store is asked nothing, for it may not answer.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Callable

import trio

from lockfs.channel.handles import Handle, HandleTable
from lockfs.mirror.inodes import Inode, InodeTable

PREFIX = b".lockfs-revoke-"
REVOKE_THREADS = 4
"""How many look-ups are under way at a time; more only wait for one another."""
TOKEN_BYTES = 16


class Fences:
    """Strikes inodes by looking them up on the mount itself, from threads that may wait for the mount."""

    def __init__(self, inodes: InodeTable, handles: HandleTable) -> None:
        self._inodes = inodes
        self._handles = handles
        self._pending: dict[bytes, Inode] = {}
        self._limiter = trio.CapacityLimiter(REVOKE_THREADS)
        self.mountpoint = ""
        self.device = 0

    def target(self, parent: Inode, name: bytes) -> Inode | None:
        """The inode that a look-up of this name strikes, None for every other name."""
        if parent is not self._inodes.root or not name.startswith(PREFIX):
            return None
        return self._pending.get(name)

    async def revoke(self, numbers: frozenset[int]) -> dict[int, str]:
        """Make everything that is open of the inodes dead; see Surroundings.revoke."""
        failed: dict[int, str] = {}
        inodes = []
        for number in sorted(numbers):
            # An inode that the kernel does not know any more has nothing open.
            with contextlib.suppress(OSError):
                inodes.append(self._inodes.get(number))
        share = -(-len(inodes) // REVOKE_THREADS) or 1
        async with trio.open_nursery() as nursery:
            for start in range(0, len(inodes), share):
                nursery.start_soon(self._revoke_some, inodes[start : start + share], failed)
        return failed

    async def _revoke_some(self, inodes: list[Inode], failed: dict[int, str]) -> None:
        open_now: dict[int, list[Handle]] = {inode.number: [] for inode in inodes}
        for handle in self._handles.all():
            if handle.nodeid in open_now:
                open_now[handle.nodeid].append(handle)
        names: dict[bytes, Inode] = {}
        for inode in inodes:
            self._inodes.bump(inode)
            names[PREFIX + secrets.token_hex(TOKEN_BYTES).encode()] = inode
        self._pending |= names

        def struck(name: bytes) -> None:
            # What was opened meanwhile may be on the new inode: it does not count as dead.
            for handle in open_now[names[name].number]:
                handle.dead = True
                self._handles.changed(handle)
            self._pending.pop(name, None)

        try:
            problem = await trio.to_thread.run_sync(
                self._strike, list(names), struck, limiter=self._limiter, abandon_on_cancel=True
            )
            failed |= {inode.number: problem for name, inode in names.items() if name in self._pending}
        finally:
            for name in names:
                self._pending.pop(name, None)

    def _strike(self, names: list[bytes], struck: Callable[[bytes], None]) -> str:
        """Look the names up; tells of each that has done its work. Returns why it ended early, if it did."""
        try:
            root = self._open_root()
        except OSError as error:
            return error.strerror or str(error)
        try:
            for name in names:
                os.stat(name, dir_fd=root, follow_symlinks=False)
                struck(name)
            for name in names:  # the kernel is not to keep the inodes for the sake of names that are no more
                with contextlib.suppress(OSError):
                    os.stat(name, dir_fd=root, follow_symlinks=False)
        except OSError as error:
            return error.strerror or str(error)
        finally:
            os.close(root)
        return ""

    def _open_root(self) -> int:
        if not self.device:
            raise OSError(errno.ENOTCONN, "the mount is not known yet")
        root = os.open(self.mountpoint, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if os.fstat(root).st_dev != self.device:
                raise OSError(errno.ESTALE, f"{self.mountpoint} is covered by another mount")
        except BaseException:
            os.close(root)
            raise
        return root
