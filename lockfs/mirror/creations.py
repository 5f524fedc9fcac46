"""Files made and opened in one step: O_CREAT and O_TMPFILE."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass, replace

from lockfs.backends.base import Image
from lockfs.channel.handles import Handle
from lockfs.keeper.openers import Opener, Role, identify
from lockfs.linux import calls
from lockfs.mirror.backings import Backing, Backings
from lockfs.mirror.credentials import Caller
from lockfs.mirror.inodes import Found, Inode
from lockfs.mirror.opens import KEPT, Opens, writes
from lockfs.mirror.repeats import is_absent, was_made
from lockfs.mirror.store import Store, close_all

CREATE_ATTEMPTS_MAX = 8
"""How often a create finds a name taken and, looking again, free, before it gives up."""


@dataclass(frozen=True)
class Made:
    """A file that was just made: its own descriptor, open as the caller asked but always readable and
    writable; the one to back it, and its backing id (0: none); who asked; and its inode."""

    descriptor: int
    backing_descriptor: int
    backing_id: int
    opener: Opener
    found: Found


def _author(opener: Opener) -> Opener:
    """Whoever makes a file writes it, a manager too (libvirt makes volumes)."""
    return replace(opener, role=Role.ORDINARY) if opener.role is Role.MANAGER else opener


class Creations:
    """Makes files and opens them."""

    def __init__(self, store: Store, backings: Backings, opens: Opens) -> None:
        self._store = store
        self._backings = backings
        self._opens = opens

    async def create(
        self, directory: Inode, name: bytes, mode: int, flags: int, caller: Caller
    ) -> tuple[Handle, Inode, os.stat_result]:
        """Make a file and open it, or open the one that another host has just made under that name.

        Raises:
            OSError: EEXIST with O_EXCL; ESTALE, which makes the kernel look again, if the name turns out to
                be no regular file.
        """
        known = self._opens.known(caller)
        if known is not None:
            return known.handle, known.inode, await self._store.status(known.inode)
        said = self._store.repeats.former(caller)
        place = directory.descriptor, name
        if said is not None and await self._store.call(was_made, said, *place, stat.S_IFREG, caller.uid):
            # This very request made it; its maker may open it whatever its mode says.
            return await self._open_existing(directory, name, flags, caller, strict=False)
        for _ in range(CREATE_ATTEMPTS_MAX):
            try:
                made = await self._store.call(self._make, directory, name, mode, flags, caller)
            except FileExistsError:
                if flags & os.O_EXCL:
                    raise
            else:
                return await self._open_made(made, flags, caller)
            try:
                # The kernel took the file for a new one and has checked no permission on it: strict.
                return await self._open_existing(directory, name, flags, caller, strict=True)
            except FileNotFoundError:
                continue
        raise OSError(errno.ESTALE, "the name comes and goes")

    async def _open_existing(
        self, directory: Inode, name: bytes, flags: int, caller: Caller, *, strict: bool
    ) -> tuple[Handle, Inode, os.stat_result]:
        found = await self._store.look(directory, name, caller)
        inode = self._store.inodes.adopt(found)
        try:
            if not inode.regular:
                raise OSError(errno.ESTALE, "the name is no regular file")
            handle, status = await self._opens.open(inode, flags, caller, strict=strict, entry=True)
        except BaseException:
            await self._store.forget([(inode.number, 1)])
            raise
        return handle, inode, status

    def _make(self, directory: Inode, name: bytes, mode: int, flags: int, caller: Caller) -> Made:
        how = flags & KEPT & ~os.O_ACCMODE | os.O_RDWR | os.O_CREAT | os.O_EXCL
        intent = {"absent": is_absent(directory.descriptor, name)}
        arguments = directory.descriptor, name, how, mode & 0o7777
        return self._store.repeats.doing(caller, intent, lambda: self._made(arguments, caller, caller.umask))

    def _made(self, how: tuple[int, bytes, int, int], caller: Caller, umask: int) -> Made:
        """Make a file as the caller. Its first description may write whatever the file's mode says."""
        credentials = self._store.credentials
        mine = [credentials.create(caller, umask, calls.openat2, *how, calls.RESOLVE_NO_XDEV)]
        try:
            path = f"/proc/self/fd/{mine[0]}"
            try:
                mine.append(credentials.attempt(caller, os.open, path, os.O_RDWR | os.O_CLOEXEC))
            except PermissionError:
                mine.append(os.dup(mine[0]))
            opener = _author(identify(caller.pid, self._store.policy))
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except BaseException:
            close_all(mine)
            raise
        found = Found(descriptor, os.fstat(descriptor))
        return Made(mine[0], mine[1], self._backings.register(mine[1], caller), opener, found)

    async def tmpfile(
        self, directory: Inode, mode: int, flags: int, umask: int, caller: Caller
    ) -> tuple[Handle, Inode, os.stat_result]:
        """Make a file without a name and open it.

        Raises:
            OSError: EOPNOTSUPP if the file system below has no such files.
        """
        known = self._opens.known(caller)
        if known is not None:
            return known.handle, known.inode, await self._store.status(known.inode)
        how = flags & (KEPT | os.O_EXCL) & ~os.O_ACCMODE | os.O_RDWR | os.O_TMPFILE
        arguments = (directory.descriptor, b".", how, mode & 0o7777)
        made = await self._store.call(self._made, arguments, caller, umask)
        return await self._open_made(made, flags & ~os.O_EXCL, caller)

    async def _open_made(
        self, made: Made, flags: int, caller: Caller
    ) -> tuple[Handle, Inode, os.stat_result]:
        """Open a file that was just made. Refused, it stays: whoever was faster has it now."""
        inode = self._store.inodes.adopt(made.found)
        try:
            async with self._opens.starting(inode) as start:
                start.descriptor, start.status = made.descriptor, made.found.status
                image = await self._install(start.backing, made, flags, caller)
                handle, status = await self._opens.finish(
                    start, flags & ~os.O_TRUNC, caller, (image, made.opener), strict=True, entry=True
                )
        except BaseException:
            await self._store.forget([(inode.number, 1)])
            raise
        return handle, inode, status

    async def _install(self, backing: Backing, made: Made, flags: int, caller: Caller) -> Image:
        """Let the new file's own descriptor back it, unless somebody else has opened it already."""
        if backing.users == 1 and backing.descriptor < 0:
            backing.descriptor, backing.writable = made.backing_descriptor, True
            backing.backing_id, backing.unregistrable = made.backing_id, not made.backing_id
            self._backings.remember(backing)
            return backing.image(self._store.name_of(backing.inode))
        return await self._store.surely(self._replace, backing, made, writes(flags), caller)

    def _replace(self, backing: Backing, made: Made, write: bool, caller: Caller) -> Image:
        if made.backing_id:
            self._backings.unregister(made.backing_id)
        os.close(made.backing_descriptor)
        return self._backings.prepare(backing, caller, write=write, register=True)
