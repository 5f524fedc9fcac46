"""Going on where a former worker of the mount was killed: its opens, directories and descriptors.

The inode table knows its inodes from the start. Here the rest is put together, in two steps with the keeper's
recall between them: what backs images, then what is open. Afterwards, when the kernel has sent again what was
under way, two things may be left over that only it could have told: an open whose caller was killed before
anybody could tell it, and an inode that was counted for an answer that never arrived.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import trio

from lockfs.backends.base import Image
from lockfs.keeper.gate import Gate, GateState
from lockfs.keeper.grants import Access, Grant, Kind
from lockfs.keeper.openers import Opener, Role
from lockfs.linux.proc import NOBODY, process_of
from lockfs.mirror.backings import BACKING, Backing, Backings
from lockfs.mirror.directories import DIRECTORY, Directories
from lockfs.mirror.inodes import Inode
from lockfs.mirror.opens import HANDLE, OpenFile, Opens
from lockfs.mirror.store import Store

UNTOLD_S = 10.0
"""How long after the kernel was asked to send again an open waits for its request, seconds."""
FORGET_S = 1.0
"""Between two looks at whether the kernel still knows inodes that it may not know any more, seconds."""

log = logging.getLogger("lockfs.mirror")


class Recalling:
    """What one worker takes over from the former. All methods are for the trio thread."""

    def __init__(
        self,
        store: Store,
        backings: Backings,
        opens: Opens,
        directories: Directories,
        under_way: Callable[[int], bool],
    ) -> None:
        """`under_way` tells whether the request of that number is being worked on."""
        self._under_way = under_way
        self._store = store
        self._backings = backings
        self._opens = opens
        self._directories = directories
        self._found: dict[int, Backing] = {}
        self._values: dict[int, dict[str, Any]] = {}

    def images(self) -> dict[int, Image]:
        """The images that are open, by the number of each open's grant."""
        for key, value in self._store.memory.items(BACKING).items():
            if isinstance(value, dict):
                serial = int(key.removeprefix(BACKING))
                self._found[serial] = self._backings.recall(serial, self._inode(value["inode"]), value)
        images = {}
        for key, value in self._store.memory.items(HANDLE).items():
            if isinstance(value, dict) and value["backing"] in self._found:
                self._values[int(key.removeprefix(HANDLE))] = value
                backing = self._found[value["backing"]]
                images[value["grant"]] = backing.image(self._store.name_of(backing.inode))
        return images

    def backings(self) -> list[Backing]:
        """What backs the images, between `images` and `opens`."""
        return list(self._found.values())

    def _inode(self, number: int) -> Inode:
        """The inode of a backing; one that the kernel forgot meanwhile is there for its backing alone."""
        known = self._store.inodes.known(number)
        if known is not None:
            return known
        return Inode(number, -1, (0, number), 0, forgotten=True)

    async def opens(self, grants: dict[int, Grant]) -> None:
        """Know what is open; `grants` are those that the keeper goes on with."""
        for number, opened in sorted(self._values.items()):
            backing = self._found[opened["backing"]]
            grant = grants.get(opened["grant"])
            if grant is None:
                grant = _ended(backing.image(b""), opened["flags"])
            self._opens.recall(number, opened, backing, grant)
            if not backing.inode.forgotten:
                backing.inode.backing = backing
        for key, value in self._store.memory.items(DIRECTORY).items():
            if isinstance(value, dict):
                inode = self._store.inodes.known(value["nodeid"]) or self._inode(value["nodeid"])
                self._directories.recall(int(key.removeprefix(DIRECTORY)), value, inode)
        for backing in self._found.values():
            if not backing.users:
                backing.users = 1
                await self._backings.end(backing)
        self._found.clear()
        self._values.clear()

    async def settle(self) -> None:
        """End what nobody will ever end, from when the kernel was asked to send again on, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._end_untold, self._opens.untold(), self._store.repeats.noted())
            inodes = self._store.inodes
            inodes.doubtful = {inode: inode.lookups for inode in inodes.all()}
            while True:
                await trio.sleep(FORGET_S)
                doubtful, inodes.doubtful = inodes.doubtful, {}
                await self._forget_unknown(doubtful)

    async def _end_untold(self, files: list[OpenFile], noted: list[int]) -> None:
        """End the opens, and forget the notes, of former workers that nobody has come back to."""
        await trio.sleep(UNTOLD_S)
        for unique in noted:
            if not self._under_way(unique):
                self._store.repeats.answered(unique)
        for file in files:
            if (
                file.unique
                and not self._under_way(file.unique)
                and not await self._store.call(self._has, file)
            ):
                log.info("an open of %s was not told to anybody: it ends", file.grant.opener)
                await self._opens.release(file.handle.number)

    def _has(self, file: OpenFile) -> bool:
        """Whether the process that asked for the open still has the file open, or waits for it."""
        process = file.grant.opener.process
        if process.pid <= 0 or not process_of(process.pid).same_as(process):
            return False
        status = os.fstat(file.handle.descriptor)
        return _has_open(process.pid, status.st_ino)

    async def _forget_unknown(self, counted: dict[Inode, int]) -> None:
        """Forget inodes that the kernel does not know, if nothing was counted for them since; those that are
        still in use are looked at again.
        """
        for inode, lookups in counted.items():
            if inode.forgotten or inode.lookups != lookups or inode is self._store.inodes.root:
                continue
            if not self._store.kernel.knows(inode.number):
                if inode.backing is None:
                    await self._store.forget([(inode.number, lookups)])
                else:
                    self._store.inodes.doubtful[inode] = lookups


def _has_open(pid: int, inode: int) -> bool:
    """Whether a process has a file of this inode number open, on whatever device."""
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return False
    for name in names:
        try:
            if os.stat(f"/proc/{pid}/fd/{name}").st_ino == inode:
                return True
        except OSError:
            continue  # closed meanwhile, or dead
    return False


def _ended(image: Image, flags: int) -> Grant:
    """The grant of an open that was being closed: good for nothing but its close."""
    access = Access.READ if flags & os.O_ACCMODE == os.O_RDONLY else Access.WRITE
    gate = Gate(GateState.SHUT)
    return Grant(image, Opener(NOBODY, 0, Role.ORDINARY), access, Kind.FENCED, gate, False, 0.0)
