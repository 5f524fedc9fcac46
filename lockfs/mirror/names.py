"""Names in directories: making, removing, moving and linking them.

All of it runs as the caller. Removing or replacing an image first makes sure that no other host holds it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from lockfs.linux import calls
from lockfs.mirror.backings import Backings
from lockfs.mirror.credentials import Caller
from lockfs.mirror.inodes import Found, Inode
from lockfs.mirror.opens import Opens, telling
from lockfs.mirror.repeats import Facts, is_absent, named, was_linked, was_made, was_moved, was_removed
from lockfs.mirror.store import Store
from lockfs.mirror.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT

_RENAME_KNOWN = RENAME_NOREPLACE | RENAME_EXCHANGE | RENAME_WHITEOUT
RMDIR_ATTEMPTS_MAX = 10
RMDIR_RETRY_S = 0.01

Entry = tuple[Inode, os.stat_result]


class Names:
    """Operations on names. Directories and files are given as inodes, names as bytes."""

    def __init__(self, store: Store, backings: Backings, opens: Opens) -> None:
        self._store = store
        self._backings = backings
        self._opens = opens

    async def lookup(self, directory: Inode, name: bytes, caller: Caller) -> Entry:
        """The file of a name, with one more lookup."""
        self._store.check_old(name)
        found = await self._store.look(directory, name, caller)
        return self._store.inodes.adopt(found), found.status

    # Making

    async def mknod(self, directory: Inode, name: bytes, mode: int, device: int, caller: Caller) -> Entry:
        """Make a special file, or an empty regular one."""

        def make() -> None:
            os.mknod(name, mode, device, dir_fd=directory.descriptor)

        return await self._make(directory, name, stat.S_IFMT(mode) or stat.S_IFREG, caller, make)

    async def mkdir(self, directory: Inode, name: bytes, mode: int, caller: Caller) -> Entry:
        """Make a directory."""

        def make() -> None:
            os.mkdir(name, mode & 0o7777, dir_fd=directory.descriptor)

        return await self._make(directory, name, stat.S_IFDIR, caller, make)

    async def symlink(self, directory: Inode, name: bytes, target: bytes, caller: Caller) -> Entry:
        """Make a symbolic link."""

        def make() -> None:
            os.symlink(target, name, dir_fd=directory.descriptor)

        return await self._make(directory, name, stat.S_IFLNK, caller, make)

    async def _make(
        self, directory: Inode, name: bytes, kind: int, caller: Caller, make: Callable[[], None]
    ) -> Entry:
        self._store.check_new(name)

        said = self._store.repeats.former(caller)

        def work() -> Found:
            place = directory.descriptor, name
            if not (said is not None and was_made(said, *place, kind, caller.uid)):
                create = self._store.credentials.create
                intent = {"absent": is_absent(*place)}
                self._store.repeats.doing(caller, intent, lambda: create(caller, caller.umask, make))
            return self._store.find_for(caller, directory, name)

        found = await self._store.call(work)
        return self._store.inodes.adopt(found), found.status

    async def link(self, inode: Inode, directory: Inode, name: bytes, caller: Caller) -> Entry:
        """Give a file, a symbolic link too, one more name."""
        self._store.check_new(name)
        source = os.fsencode(inode.path)
        target = directory.descriptor

        said = self._store.repeats.former(caller)

        def link() -> None:
            calls.linkat(calls.AT_FDCWD, source, target, name, calls.AT_SYMLINK_FOLLOW)

        def work() -> Found:
            if not (said is not None and was_linked(said, target, name)):
                self._once(caller, {"file": inode.key}, link)
            return self._store.find_for(caller, directory, name)

        found = await self._store.call(work)
        return self._store.inodes.adopt(found), found.status

    async def readlink(self, inode: Inode) -> bytes:
        """The target of a symbolic link."""
        return await self._store.call(lambda: os.readlink(b"", dir_fd=inode.descriptor))

    # Removing

    async def unlink(self, directory: Inode, name: bytes, caller: Caller) -> None:
        """Remove a name of anything but a directory.

        Raises:
            ImageBusy: another host holds the image.
        """
        self._store.check_old(name)

        def work() -> None:
            os.unlink(name, dir_fd=directory.descriptor)

        said = self._store.repeats.former(caller)
        if said is not None and await self._store.call(was_removed, said, directory.descriptor, name):
            return
        async with self._known(directory, name, caller) as inode, self._removing(inode, caller):
            await self._store.call(self._once, caller, {"file": inode.key}, work)

    def _once(self, caller: Caller, intent: Facts, work: Callable[[], None]) -> None:
        """Do it as the caller, and so that it is known to be done if the request is sent again."""
        attempt = self._store.credentials.attempt
        self._store.repeats.doing(caller, intent, lambda: attempt(caller, work))

    async def rmdir(self, directory: Inode, name: bytes, caller: Caller) -> None:
        """Remove an empty directory."""
        self._store.check_old(name)

        def work() -> None:
            os.rmdir(name, dir_fd=directory.descriptor)

        def once() -> None:
            self._once(caller, {"file": named(directory.descriptor, name).key or (0, 0)}, work)

        said = self._store.repeats.former(caller)
        if said is not None and await self._store.call(was_removed, said, directory.descriptor, name):
            return
        for attempts_left in reversed(range(RMDIR_ATTEMPTS_MAX)):
            try:
                await self._store.call(once)
            except OSError as error:
                # An NFS client keeps files that were unlinked while still known here, under a hidden name,
                # until the kernel's message that it forgot them arrives.
                if error.errno != errno.ENOTEMPTY or self._store.local or not attempts_left:
                    raise
                await trio.sleep(RMDIR_RETRY_S)
            else:
                return

    # Moving

    async def rename(
        self, old: tuple[Inode, bytes], new: tuple[Inode, bytes], flags: int, caller: Caller
    ) -> None:
        """Rename with RENAME_* flags.

        Raises:
            ImageBusy: another host holds the image that would lose its name.
        """
        self._store.check_old(old[1])
        if flags & RENAME_EXCHANGE:
            self._store.check_old(new[1])
        self._store.check_new(new[1])
        if flags & ~_RENAME_KNOWN:
            raise OSError(errno.EINVAL, "unknown rename flags")

        def work() -> None:
            calls.renameat2(old[0].descriptor, old[1], new[0].descriptor, new[1], flags)

        places = (old[0].descriptor, old[1]), (new[0].descriptor, new[1])

        def once() -> None:
            self._once(caller, {"file": named(*places[0]).key or (0, 0)}, work)

        said = self._store.repeats.former(caller)
        if said is not None and await self._store.call(was_moved, said, *places):
            return
        async with self._replaced(old, new, flags, caller) as inode, self._removing(inode, caller):
            await self._store.call(once)

    @asynccontextmanager
    async def _replaced(
        self, old: tuple[Inode, bytes], new: tuple[Inode, bytes], flags: int, caller: Caller
    ) -> AsyncIterator[Inode | None]:
        """The image that a rename takes a name from, if any."""
        if flags & RENAME_NOREPLACE:
            yield None
            return
        source = await self._store.look(*old, caller)
        await self._store.discard([source.descriptor])
        try:
            target = await self._store.look(*new, caller)
        except FileNotFoundError:
            yield None
            return
        if target.key == source.key or not stat.S_ISREG(target.status.st_mode):
            await self._store.discard([target.descriptor])
            yield None
            return
        async with self._adopted(target) as inode:
            yield inode

    @asynccontextmanager
    async def _known(self, directory: Inode, name: bytes, caller: Caller) -> AsyncIterator[Inode]:
        async with self._adopted(await self._store.look(directory, name, caller)) as inode:
            yield inode

    @asynccontextmanager
    async def _adopted(self, found: Found) -> AsyncIterator[Inode]:
        """Know a file for as long as an operation on it takes."""
        inode = self._store.inodes.adopt(found)
        try:
            yield inode
        finally:
            await self._store.forget([(inode.number, 1)])

    @asynccontextmanager
    async def _removing(self, inode: Inode | None, caller: Caller) -> AsyncIterator[None]:
        """Keep other hosts away from an image that loses a name."""
        if inode is None or not inode.regular:
            yield
            return
        async with self._backings.image_of(inode, caller) as (image, opener):
            with self._opens.waiting(caller), telling(image, opener, "removal"):
                async with self._store.keeper.removing(image, opener):
                    yield
