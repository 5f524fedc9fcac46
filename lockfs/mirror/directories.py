"""Open directories.

A listing is a snapshot of the names, taken when it is read from its start: names made or removed later
neither shift nor repeat the others, and a rewind sees them.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
from dataclasses import dataclass
from typing import Any

import pyfuse3

from lockfs.backends.state import STATE_DIR
from lockfs.channel.handles import TURN_NUMBERS
from lockfs.mirror.credentials import Caller
from lockfs.mirror.entries import bare_entry, entry_of
from lockfs.mirror.inodes import Found, Inode
from lockfs.mirror.store import Store

DIRECTORY = "directory:"
"""What the keys of remembered directories begin with; the handle's number follows."""
BATCH = 32
"""Names looked up in one trip to a thread; those that do not fit into the reply are looked up again."""

_VANISHED = frozenset({errno.ENOENT, errno.ESTALE})
_DOTS = (b".", b"..")


@dataclass(frozen=True)
class _Reader:
    """Who opened a directory."""

    uid: int
    gid: int
    pid: int
    umask: int
    unique: int = 0
    resent: bool = False


@dataclass(eq=False)
class _Directory:
    """An open directory; `names` is its snapshot, dot and dot-dot first, and `snapshot` the file in memory
    that keeps it for the next worker (-1: none yet). `unique`: the request, until its reply is at the kernel.
    """

    inode: Inode
    descriptor: int
    caller: Caller
    names: list[bytes] | None = None
    snapshot: int = -1
    unique: int = 0


class Directories:
    """All open directories of the mount."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._open: dict[int, _Directory] = {}
        self._numbers = itertools.count(store.turn * TURN_NUMBERS + 1)
        self._untold: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._open)

    def _get(self, number: int) -> _Directory:
        try:
            return self._open[number]
        except KeyError:
            raise OSError(errno.EBADF, "the directory is not open") from None

    async def open(self, inode: Inode, caller: Caller) -> int:
        """Open a directory; returns its handle's number."""
        known = self._untold.get(caller.unique, 0) if caller.resent else 0
        if known:
            return known
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        attempt = self._store.credentials.attempt
        descriptor = await self._store.call(attempt, caller, os.open, inode.path, flags)
        number = next(self._numbers)
        self._open[number] = directory = _Directory(inode, descriptor, caller, unique=caller.unique)
        if caller.unique:
            self._untold[caller.unique] = number
        self._remember(number, directory)
        return number

    def _remember(self, number: int, directory: _Directory) -> None:
        caller = directory.caller
        value = {
            "nodeid": directory.inode.number,
            "fd": directory.descriptor,
            "fds": [directory.snapshot],
            "caller": [caller.uid, caller.gid, caller.pid, caller.umask],
            "unique": directory.unique,
        }
        self._store.memory.set(f"{DIRECTORY}{number}", value)

    def answered(self, unique: int) -> None:
        """The reply to an open is at the kernel."""
        number = self._untold.pop(unique, 0)
        directory = self._open.get(number)
        if directory is not None:
            directory.unique = 0
            self._remember(number, directory)

    def recall(self, number: int, value: dict[str, Any], inode: Inode) -> None:
        """Know a directory that a former worker had open, with what it had told of it."""
        (snapshot,) = value["fds"]
        unique = value["unique"]
        directory = _Directory(inode, value["fd"], _Reader(*value["caller"]), None, snapshot, unique)
        if snapshot >= 0:
            size = os.fstat(snapshot).st_size
            with contextlib.suppress(OSError):  # it was not kept: then the directory cannot be read either
                directory.names = os.pread(snapshot, size, 0).split(b"\0")
        self._open[number] = directory
        if unique:
            self._untold[unique] = number

    async def release(self, number: int) -> None:
        """Close a directory."""
        directory = self._open.pop(number, None)
        if directory is not None:
            self._untold.pop(directory.unique, None)
            self._store.memory.remove(f"{DIRECTORY}{number}")
            if directory.snapshot >= 0:
                os.close(directory.snapshot)
            await self._store.surely(os.close, directory.descriptor)

    async def sync(self, number: int, data_only: bool) -> None:
        """Bring the directory to the storage."""
        directory = self._get(number)
        await self._store.call(os.fdatasync if data_only else os.fsync, directory.descriptor)

    async def read(self, number: int, start: int, token: pyfuse3.ReaddirToken) -> None:
        """Tell the entries from position `start` on until the reply is full.

        Every entry that fits counts as a lookup of its file, dot and dot-dot excepted.
        """
        directory = self._get(number)
        if start == 0:
            directory.names = None
        position = start
        while directory.names is None or position < len(directory.names):
            names, entries = await self._store.call(self._look, directory, position)
            if directory.names is None:
                self._keep(number, directory, names)
            directory.names = names
            told = await self._tell(directory, position, entries, token)
            position += told
            if told < len(entries):
                return

    def _keep(self, number: int, directory: _Directory, names: list[bytes]) -> None:
        """Keep a new snapshot where the next worker finds it: positions in it are all that the kernel has."""
        snapshot, last = os.memfd_create("lockfs-names", os.MFD_CLOEXEC), directory.snapshot
        os.write(snapshot, b"\0".join(names))
        directory.snapshot = snapshot
        if number in self._open:
            self._remember(number, directory)
            if last >= 0:
                os.close(last)

    async def _tell(
        self,
        directory: _Directory,
        position: int,
        entries: list[Found | int | None],
        token: pyfuse3.ReaddirToken,
    ) -> int:
        """Put entries into the reply; returns how many went in, the vanished ones counted."""
        names = directory.names or []
        for told, entry in enumerate(entries):
            at = position + told
            if entry is not None and not await self._put(token, names[at], entry, at + 1, directory):
                rest = [other.descriptor for other in entries[told + 1 :] if isinstance(other, Found)]
                await self._store.discard(rest)
                return told
        return len(entries)

    async def _put(
        self,
        token: pyfuse3.ReaddirToken,
        name: bytes,
        entry: Found | int,
        next_position: int,
        directory: _Directory,
    ) -> bool:
        if isinstance(entry, int):
            return pyfuse3.readdir_reply(token, name, bare_entry(entry, stat.S_IFDIR), next_position)
        inode = self._store.inodes.adopt(entry)
        attributes = entry_of(inode, entry.status)
        if pyfuse3.readdir_reply(token, name, attributes, next_position):
            return True
        await self._store.forget([(inode.number, 1)])
        return False

    def _look(self, directory: _Directory, position: int) -> tuple[list[bytes], list[Found | int | None]]:
        """Read the names if need be and look up a batch of them; worker thread.

        A number instead of a file stands for an entry that is only told to be there; None for none.
        """
        names = directory.names
        if names is None:
            # A former worker may have been killed while it read: the position outlives it.
            os.lseek(directory.descriptor, 0, os.SEEK_SET)
            listed = (os.fsencode(name) for name in os.listdir(directory.descriptor))
            names = [*_DOTS, *(name for name in listed if name != STATE_DIR)]
        entries: list[Found | int | None] = []
        batch = names[position : position + BATCH]
        for name in batch:
            entries.append(self._dot(directory, name) if name in _DOTS else self._find(directory, name))
        return names, entries

    def _find(self, directory: _Directory, name: bytes) -> Found | int | None:
        try:
            return self._store.find_for(directory.caller, directory.inode, name)
        except OSError as error:
            # Unreadable to a daemon that is not root, or another file system: the name is there.
            return None if error.errno in _VANISHED else 0

    def _dot(self, directory: _Directory, name: bytes) -> int:
        if name == b"." or directory.inode is self._store.inodes.root:
            return directory.inode.number
        status = os.stat("..", dir_fd=directory.descriptor)
        parent = self._store.inodes.find((status.st_dev, status.st_ino))
        return parent.number if parent is not None else status.st_ino

    async def release_all(self) -> None:
        """Close every directory, at the end of the mount."""
        for number in list(self._open):
            await self.release(number)
