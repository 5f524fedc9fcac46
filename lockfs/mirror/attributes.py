"""Changing attributes: size, owner, mode and times."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pyfuse3

from lockfs.errors import NotPermitted
from lockfs.keeper.openers import Role, identify
from lockfs.mirror import syscalls
from lockfs.mirror.backings import Backings
from lockfs.mirror.credentials import Caller
from lockfs.mirror.inodes import Inode
from lockfs.mirror.opens import Opens, telling
from lockfs.mirror.store import Store


@dataclass(frozen=True)
class _Change:
    """What is to be changed, and for whom."""

    inode: Inode
    wanted: pyfuse3.EntryAttributes
    fields: pyfuse3.SetattrFields
    caller: Caller

    @property
    def labels(self) -> bool:
        """Whether it is about who may use the file."""
        return self.fields.update_mode or self.fields.update_uid or self.fields.update_gid

    def alters(self, status: os.stat_result) -> bool:
        """Whether owner, group or mode would become others than they are."""
        fields, wanted = self.fields, self.wanted
        return bool(
            (fields.update_uid and wanted.st_uid != status.st_uid)
            or (fields.update_gid and wanted.st_gid != status.st_gid)
            or (fields.update_mode and stat.S_IMODE(wanted.st_mode) != stat.S_IMODE(status.st_mode))
        )


class Attributes:
    """SETATTR: everything that the kernel changes without opening the file."""

    def __init__(self, store: Store, backings: Backings, opens: Opens) -> None:
        self._store = store
        self._backings = backings
        self._opens = opens

    async def change(
        self,
        inode: Inode,
        wanted: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        number: int | None,
        caller: Caller,
    ) -> os.stat_result:
        """Change those attributes that `fields` names; returns the attributes after that.

        `number` is the handle of an ftruncate(2), None for everything by path.

        Raises:
            LockfsError: the size may not change now, for want of a lease.
            NotPermitted: a manager would relabel an image that another host holds.
        """
        change = _Change(inode, wanted, fields, caller)
        if fields.update_size:
            async with self._resizing(inode, number, caller) as descriptor:
                return await self._store.call(self._apply, change, descriptor)
        if inode.regular and change.labels and await self._store.call(self._manages, caller):
            await self._refuse_relabelling(change)
        return await self._store.call(self._apply, change)

    @asynccontextmanager
    async def _resizing(self, inode: Inode, number: int | None, caller: Caller) -> AsyncIterator[int | None]:
        """Hold the lease while the size changes; gives the descriptor to change it through, if any."""
        if not inode.regular:
            raise OSError(errno.EISDIR if stat.S_ISDIR(inode.kind) else errno.EINVAL, "it has no size")
        file = self._opens.find(number) if number is not None else None
        if file is not None and file.grant.writes:
            async with self._opens.passage(file.grant):
                yield file.handle.descriptor if file.handle.writable else None
            return
        async with self._backings.image_of(inode, caller, write=True) as (image, opener):
            with self._opens.waiting(caller), telling(image, opener, "truncation"):
                keeper = self._store.keeper
                async with keeper.changing(image, opener) as grant, self._opens.passage(grant):
                    yield None

    def _manages(self, caller: Caller) -> bool:
        return identify(caller.pid, self._store.policy).role is Role.MANAGER

    def _apply(self, change: _Change, descriptor: int | None = None) -> os.stat_result:
        """Do it, on a worker thread; the size through `descriptor` if there is one."""
        wanted, fields, caller = change.wanted, change.fields, change.caller
        attempt = self._store.credentials.attempt
        path = change.inode.path
        if fields.update_size:
            if descriptor is not None:
                os.ftruncate(descriptor, wanted.st_size)
            else:
                attempt(caller, syscalls.truncate, path, wanted.st_size, self._store.bind)
        if fields.update_uid or fields.update_gid:
            uid = wanted.st_uid if fields.update_uid else -1
            gid = wanted.st_gid if fields.update_gid else -1
            attempt(caller, os.chown, path, uid, gid)
        if fields.update_mode:
            # After the owner, whose change clears set-id bits that a mode sent along may keep.
            attempt(caller, os.chmod, path, stat.S_IMODE(wanted.st_mode))
        if fields.update_atime or fields.update_mtime:
            accessed = wanted.st_atime_ns if fields.update_atime else None
            modified = wanted.st_mtime_ns if fields.update_mtime else None
            attempt(caller, syscalls.set_times, path, accessed, modified)
        return os.fstat(change.inode.descriptor)

    async def _refuse_relabelling(self, change: _Change) -> None:
        """Keep a manager from taking a guest's image away from the host that runs it now.

        libvirt gives images back to root when a guest has migrated away; it takes EPERM in its stride.
        """
        if not change.alters(await self._store.status(change.inode)):
            return
        async with self._backings.image_of(change.inode, change.caller) as (image, opener):
            holders = await self._store.keeper.others(image)
        if holders:
            sentence = f"image '{image.name}' is held by {holders[0]}; {opener} may not relabel it from here"
            raise NotPermitted(sentence)
