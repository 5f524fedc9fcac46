"""Extended attributes: those of the file below as they are, and lockfs' own about an image's lease.

`user.lockfs.*` of a regular file tells who holds it: `holder` (a phrase), `host`, `pid`, `program`, `since`
(seconds of the epoch) and `mode` (exclusive or shared). They cannot be set, are absent from listings,
and are ENODATA while the image is free or where the storage does not tell.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import TypeVar

from lockfs.backends.base import Holder
from lockfs.keeper.grants import HeldImage
from lockfs.mirror.backings import Backings
from lockfs.mirror.credentials import Caller
from lockfs.mirror.inodes import Inode
from lockfs.mirror.store import Store

OWN_PREFIX = b"user.lockfs."
_SYSTEM_PREFIX = b"system."

Description = dict[str, str]
T = TypeVar("T")


def describe_here(image: HeldImage, host: str) -> Description:
    """The attributes of an image whose lease this host holds; its first writer stands for all."""
    description = {"host": host, "since": str(int(image.since))}
    if image.mode is not None:
        description["mode"] = image.mode.value
    writers = [opener for opener in image.openers if opener[2] == "leased"] or list(image.openers)
    if writers:
        pid, program, _ = writers[0]
        description |= {"pid": str(pid), "program": program, "holder": f"{program} (pid {pid}) on {host}"}
    else:
        description["holder"] = f"lockfs on {host}"
    return description


def describe_there(holder: Holder) -> Description:
    """The attributes of an image that somebody else holds."""
    description = {"holder": str(holder), "mode": holder.mode.value}
    if holder.owner is not None:
        owner = holder.owner
        description |= {
            "host": owner.host,
            "pid": str(owner.pid),
            "program": owner.program,
            "since": str(int(owner.since)),
        }
    return description


class Xattrs:
    """Extended attributes of all kinds of files, by inode and name."""

    def __init__(self, store: Store, backings: Backings, host: str) -> None:
        self._store = store
        self._backings = backings
        self._host = host

    def _owns(self, inode: Inode, name: bytes) -> bool:
        return inode.regular and name.startswith(OWN_PREFIX)

    async def get(self, inode: Inode, name: bytes, caller: Caller) -> bytes:
        """An attribute's value.

        Raises:
            OSError: ENODATA if there is none of that name; EOPNOTSUPP and others as the file system says.
        """
        if self._owns(inode, name):
            description = await self.describe(inode, caller)
            value = description.get(name.removeprefix(OWN_PREFIX).decode("utf-8", "replace"))
            if value is None:
                raise OSError(errno.ENODATA, "the image is free, or the storage does not tell")
            return os.fsencode(value)
        said = self._store.repeats.former(caller)
        if said is not None and said.get("absent"):
            # pyfuse3 asks, before it sets what must not exist; this very request has made it.
            raise OSError(errno.ENODATA, "it was not there when this request was first done")
        return await self._run(name, caller, os.getxattr, inode.path, name)

    async def set(self, inode: Inode, name: bytes, value: bytes, caller: Caller) -> None:
        """Set an attribute.

        Raises:
            OSError: EPERM for lockfs' own.
        """
        if self._owns(inode, name):
            raise OSError(errno.EPERM, "lockfs' own attributes are read-only")

        def once(path: str, attribute: bytes, content: bytes) -> None:
            intent = {"absent": _is_absent(path, attribute)}
            self._store.repeats.doing(caller, intent, lambda: os.setxattr(path, attribute, content))

        await self._run(name, caller, once, inode.path, name, value)

    async def remove(self, inode: Inode, name: bytes, caller: Caller) -> None:
        """Remove an attribute.

        Raises:
            OSError: EPERM for lockfs' own.
        """
        if self._owns(inode, name):
            raise OSError(errno.EPERM, "lockfs' own attributes are read-only")
        said = self._store.repeats.former(caller)

        def remove(path: str, attribute: bytes) -> None:
            try:
                os.removexattr(path, attribute)
            except OSError as error:
                if not (said and error.errno == errno.ENODATA):
                    raise

        def once(path: str, attribute: bytes) -> None:
            self._store.repeats.doing(caller, {"done": False}, lambda: remove(path, attribute))

        await self._run(name, caller, once, inode.path, name)

    async def list(self, inode: Inode, caller: Caller) -> list[bytes]:
        """The names of all attributes but lockfs' own."""
        names = await self._store.call(self._store.credentials.attempt, caller, os.listxattr, inode.path)
        found = [os.fsencode(name) for name in names]
        return [name for name in found if not self._owns(inode, name)]

    async def _run(self, name: bytes, caller: Caller, function: Callable[..., T], *arguments: object) -> T:
        """Act on an attribute; of `system.*` the kernel leaves the permissions to whoever holds the file."""
        credentials = self._store.credentials
        run = credentials.run if name.startswith(_SYSTEM_PREFIX) else credentials.attempt
        return await self._store.call(lambda: run(caller, function, *arguments))

    async def describe(self, inode: Inode, caller: Caller) -> Description:
        """Who holds an image, for people and programs; empty if it is free."""
        keeper = self._store.keeper
        for held in keeper.images():
            if held.inode == inode.number and held.mode is not None:
                return describe_here(held, self._host)
        async with self._backings.image_of(inode, caller) as (image, _):
            holders = await keeper.others(image)
        return describe_there(holders[0]) if holders else {}


def _is_absent(path: str, name: bytes) -> bool:
    try:
        os.getxattr(path, name)
    except OSError as error:
        return error.errno == errno.ENODATA
    return False
