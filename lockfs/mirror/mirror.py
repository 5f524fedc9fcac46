"""The file system that pyfuse3 serves: every operation that is not on file contents.

Reads, writes and the like never come here; the channel serves them through the handles that opens put
into the table. This class is the border: it finds inodes by their numbers, hands over to the parts, and
turns their errors into numbers.
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import pyfuse3
import trio

from lockfs.backends.base import Image
from lockfs.channel.handles import Handle, HandleTable, Kernel
from lockfs.channel.requests import Caller as Requested
from lockfs.channel.requests import Context, Requests
from lockfs.errors import LockfsError, errno_of
from lockfs.keeper.keeper import Keeper
from lockfs.keeper.policy import Policy
from lockfs.mirror.attributes import Attributes
from lockfs.mirror.backings import Backings
from lockfs.mirror.creations import Creations
from lockfs.mirror.credentials import Caller
from lockfs.mirror.directories import Directories
from lockfs.mirror.entries import attributes_hold, entry_of, struck_entry, volume_of
from lockfs.mirror.fences import Fences
from lockfs.mirror.inodes import Inode
from lockfs.mirror.modes import IoMode
from lockfs.mirror.names import Names
from lockfs.mirror.opens import Opens
from lockfs.mirror.recalling import Recalling
from lockfs.mirror.store import Past, Store
from lockfs.mirror.surroundings import MirrorSurroundings
from lockfs.mirror.xattrs import Xattrs

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class MirrorStatistics:
    """What the mirror holds: known inodes and the sum of their lookups, open files, open directories,
    backed images, and open files that are not in pure passthrough."""

    inodes: int
    lookups: int
    files: int
    directories: int
    backings: int
    unpassed: int


def _answers(operation: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Turn expected errors into the number that the caller's system call fails with."""

    @functools.wraps(operation)
    async def answer(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await operation(*args, **kwargs)
        except (LockfsError, OSError) as error:
            raise pyfuse3.FUSEError(errno_of(error)) from error
        except OverflowError as error:  # a number that fits no system call's argument
            raise pyfuse3.FUSEError(errno.EINVAL) from error

    return answer


class Mirror(pyfuse3.Operations):
    """A store, served on descriptors. All methods are for the trio thread.

    Give it its `keeper` (made with `surroundings`, and `freed` as its callback of that name) before the
    first operation, and the mount's st_dev as `device` once it is known.
    """

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(
        self,
        store_fd: int,
        handles: HandleTable,
        kernel: Kernel,
        *,
        io: IoMode,
        policy: Policy,
        host: str | None = None,
        past: Past | None = None,
    ) -> None:
        """`store_fd` is the store's root directory (O_PATH suffices) and stays the caller's; `host` is this
        machine's name as other hosts see it; `past` is what former workers of the mount left."""
        super().__init__()
        self.requests = Requests()
        self._store = Store(store_fd, handles, kernel, io, policy, past)
        self.surroundings = MirrorSurroundings(handles, kernel)
        self._fences = Fences(self._store.inodes, handles)
        self.surroundings.fences = self._fences
        self.surroundings.store_device = self._store.inodes.device
        self._backings = Backings(self._store)
        self._opens = Opens(self._store, self._backings, self.surroundings)
        self._creations = Creations(self._store, self._backings, self._opens)
        self._names = Names(self._store, self._backings, self._opens)
        self._attributes = Attributes(self._store, self._backings, self._opens)
        self._directories = Directories(self._store)
        self.recalling = Recalling(
            self._store,
            self._backings,
            self._opens,
            self._directories,
            lambda unique: self.requests.find(unique) is not None,
        )
        self._xattrs = Xattrs(self._store, self._backings, host or os.uname().nodename)

    @property
    def keeper(self) -> Keeper:
        """The lease keeper of this mount."""
        return self._store.keeper

    @keeper.setter
    def keeper(self, keeper: Keeper) -> None:
        self._store.keeper = keeper

    @property
    def device(self) -> int:
        """The mount's own st_dev; 0 until it is known."""
        return self.surroundings.device

    @device.setter
    def device(self, device: int) -> None:
        self.surroundings.device = self._fences.device = device

    def mounted_at(self, mountpoint: str) -> None:
        """Say where the mount is found, so that its handles can be revoked."""
        self._fences.mountpoint = mountpoint

    def _caller(self, context: Context) -> Caller:
        """Who sent the request that pyfuse3 gives this context for."""
        return context if isinstance(context, Requested) else self.requests.caller(context)

    def _inode(self, number: int) -> Inode:
        return self._store.inodes.get(number)

    # Inodes

    @_answers
    async def lookup(self, parent_inode: int, name: bytes, ctx: Context) -> pyfuse3.EntryAttributes:
        """Find a name; the answer counts as one lookup."""
        parent = self._inode(parent_inode)
        struck = self._fences.target(parent, name)
        if struck is not None:
            self._store.inodes.count(struck)
            return struck_entry(struck)
        return entry_of(*await self._names.lookup(parent, name, self._caller(ctx)))

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Take lookups back; an inode without any is closed."""
        await self._store.forget(list(inode_list))

    @_answers
    async def getattr(self, inode: int, ctx: Context) -> pyfuse3.EntryAttributes:
        """The attributes as they are on the storage."""
        known = self._inode(inode)
        return entry_of(known, await self._store.status(known))

    def attributes(self, number: int) -> tuple[os.stat_result, int] | None:
        """What getattr answers and the seconds it holds, on any thread; None if only getattr can tell."""
        status = self._store.status_at_once(number)
        return None if status is None else (status, attributes_hold(status))

    def entry(self, parent: int, name: bytes) -> tuple[int, int, os.stat_result, int] | None:
        """What lookup answers, on any thread; None if only lookup can tell.

        The node number, its generation, the attributes and the seconds these hold.
        """
        known = self._store.known_at_once(parent, name)
        if known is None:
            return None
        inode, status = known
        return inode.number, inode.generation, status, attributes_hold(status)

    @_answers
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: Context,
    ) -> pyfuse3.EntryAttributes:
        """Change size, owner, mode or times."""
        known = self._inode(inode)
        return entry_of(known, await self._attributes.change(known, attr, fields, fh, self._caller(ctx)))

    @_answers
    async def access(self, inode: int, mode: int, ctx: Context) -> bool:
        """Whether the caller may; asked only on mounts whose kernel does not check by itself."""
        path = self._inode(inode).path
        check = functools.partial(os.access, path, mode, effective_ids=True)
        return await self._store.call(self._store.credentials.run, self._caller(ctx), check)

    @_answers
    async def statfs(self, ctx: Context) -> pyfuse3.StatvfsData:
        """The figures of the file system below."""
        return volume_of(await self._store.call(os.fstatvfs, self._store.inodes.root.descriptor))

    # Names

    @_answers
    async def readlink(self, inode: int, ctx: Context) -> bytes:
        """A symbolic link's target."""
        return await self._names.readlink(self._inode(inode))

    @_answers
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: Context
    ) -> pyfuse3.EntryAttributes:
        """Make a special file, or an empty regular one."""
        parent = self._inode(parent_inode)
        return entry_of(*await self._names.mknod(parent, name, mode, rdev, self._caller(ctx)))

    @_answers
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: Context) -> pyfuse3.EntryAttributes:
        """Make a directory."""
        return entry_of(*await self._names.mkdir(self._inode(parent_inode), name, mode, self._caller(ctx)))

    @_answers
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: Context
    ) -> pyfuse3.EntryAttributes:
        """Make a symbolic link."""
        parent = self._inode(parent_inode)
        return entry_of(*await self._names.symlink(parent, name, target, self._caller(ctx)))

    @_answers
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: Context
    ) -> pyfuse3.EntryAttributes:
        """Give a file one more name."""
        known, parent = self._inode(inode), self._inode(new_parent_inode)
        return entry_of(*await self._names.link(known, parent, new_name, self._caller(ctx)))

    @_answers
    async def unlink(self, parent_inode: int, name: bytes, ctx: Context) -> None:
        """Remove a name; EBUSY if another host holds the image."""
        await self._names.unlink(self._inode(parent_inode), name, self._caller(ctx))

    @_answers
    async def rmdir(self, parent_inode: int, name: bytes, ctx: Context) -> None:
        """Remove an empty directory."""
        await self._names.rmdir(self._inode(parent_inode), name, self._caller(ctx))

    @_answers
    async def rename(  # noqa: PLR0917  (pyfuse3 gives its arguments by position)
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: Context,
    ) -> None:
        """Rename, with RENAME_* flags; EBUSY if another host holds the image that is replaced."""
        old = (self._inode(parent_inode_old), name_old)
        new = (self._inode(parent_inode_new), name_new)
        await self._names.rename(old, new, flags, self._caller(ctx))

    # Open files

    @_answers
    async def open(self, inode: int, flags: int, ctx: Context) -> pyfuse3.FileInfo:
        """Open a regular file; EBUSY if somebody else writes to it."""
        caller = self._caller(ctx)
        known = self._opens.known(caller)
        if known is not None:
            return _info(known.handle)
        handle, _ = await self._opens.open(self._inode(inode), flags, caller)
        return _info(handle)

    @_answers
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: Context
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        """Make a regular file and open it, or open the one that is there."""
        self._store.check_new(name)
        parent = self._inode(parent_inode)
        handle, inode, status = await self._creations.create(parent, name, mode, flags, self._caller(ctx))
        return _info(handle), entry_of(inode, status)

    @_answers
    async def tmpfile(
        self, parent: int, mode: int, flags: int, umask: int, ctx: Context
    ) -> tuple[pyfuse3.EntryAttributes, pyfuse3.FileInfo]:
        """Make a regular file without a name and open it (O_TMPFILE)."""
        caller = self._caller(ctx)
        handle, inode, status = await self._creations.tmpfile(self._inode(parent), mode, flags, umask, caller)
        return entry_of(inode, status), _info(handle)

    async def release(self, fh: int) -> None:
        """End an open; its lease goes back if it was the last. Raises nothing expected."""
        await self._opens.release(fh)

    async def abandon(self, number: int) -> None:
        """Undo an open whose reply the kernel no longer wanted."""
        file = await self._opens.release(number)
        if file is not None and file.entry:
            await self._store.forget([(file.inode.number, 1)])

    def answered(self, unique: int, number: int) -> None:
        """The reply to a request is at the kernel; `number`: of the handle that it told of, or 0."""
        if number:
            self._opens.answered(unique)
        self._directories.answered(unique)
        self._store.repeats.answered(unique)

    async def claim(self, handle: Handle) -> None:
        """Get the handle's gate opened; raises the LockfsError or OSError its caller is to see."""
        await self._opens.claim(handle)

    def interrupt(self, tid: int) -> bool:
        """A signal hit thread `tid`; returns whether a request of that thread was with the keeper."""
        if not self._opens.waits(tid):
            return False
        self.keeper.interrupt(tid)
        return True

    def freed(self, image: Image) -> None:
        """The storage has taken a lease back after the last close: its descriptor may go."""
        spent = self._backings.expire(image.inode)
        if spent is not None:
            trio.lowlevel.start_thread_soon(functools.partial(self._backings.close, spent), _delivered)

    # Open directories

    @_answers
    async def opendir(self, inode: int, ctx: Context) -> int:
        """Open a directory."""
        return await self._directories.open(self._inode(inode), self._caller(ctx))

    @_answers
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """Tell a directory's entries."""
        await self._directories.read(fh, start_id, token)

    async def releasedir(self, fh: int) -> None:
        """Close a directory."""
        await self._directories.release(fh)

    @_answers
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Bring a directory to the storage."""
        await self._directories.sync(fh, datasync)

    # Extended attributes

    @_answers
    async def getxattr(self, inode: int, name: bytes, ctx: Context) -> bytes:
        """An extended attribute."""
        return await self._xattrs.get(self._inode(inode), name, self._caller(ctx))

    @_answers
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: Context) -> None:
        """Set an extended attribute."""
        await self._xattrs.set(self._inode(inode), name, value, self._caller(ctx))

    @_answers
    async def listxattr(self, inode: int, ctx: Context) -> Sequence[bytes]:
        """The names of the extended attributes."""
        return await self._xattrs.list(self._inode(inode), self._caller(ctx))

    @_answers
    async def removexattr(self, inode: int, name: bytes, ctx: Context) -> None:
        """Remove an extended attribute."""
        await self._xattrs.remove(self._inode(inode), name, self._caller(ctx))

    # The end

    async def release_all(self) -> None:
        """End every open file and directory, at the end of the mount."""
        await self._opens.release_all()
        await self._directories.release_all()

    def close(self) -> None:
        """Close the inodes' descriptors; `release_all` went before."""
        self._store.close()

    def statistics(self) -> MirrorStatistics:
        """What the mirror holds now."""
        return MirrorStatistics(
            inodes=len(self._store.inodes),
            lookups=self._store.inodes.lookups,
            files=len(self._opens),
            directories=len(self._directories),
            backings=self._backings.count,
            unpassed=self.surroundings.unpassed,
        )


def _info(handle: Handle) -> pyfuse3.FileInfo:
    """What pyfuse3 tells the kernel of an open; the channel puts the handle's own flags in its place."""
    return pyfuse3.FileInfo(fh=handle.number, keep_cache=False)


def _delivered(result: object) -> None:
    """Closing a backing reports its errors itself."""
