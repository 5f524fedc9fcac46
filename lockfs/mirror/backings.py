"""The open file descriptions that lockfs keeps of an image while anybody has it open.

One description per inode backs all its passthrough handles and carries the lease's locks, so that the
locks live as long as the data path does, also when lockfs does not. It is opened for reading and writing
by the first open, even a read-only one: there is no second chance once it backs something.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from lockfs.backends.base import Image
from lockfs.channel.handles import TURN_NUMBERS, Handle
from lockfs.keeper.openers import Opener, identify
from lockfs.mirror.credentials import Caller
from lockfs.mirror.inodes import Inode
from lockfs.mirror.modes import IoMode
from lockfs.mirror.store import Store, close_all

_NOT_WRITABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ETXTBSY})
_BASE = os.O_CLOEXEC | os.O_NONBLOCK

BACKING = "backing:"
"""What the keys of remembered backings begin with; the serial number follows."""

log = logging.getLogger("lockfs.mirror")


class Backing:
    """One inode's descriptions. `mutex` covers what worker threads change; the rest is the trio thread's.

    `users`: opens and operations that need it. `descriptor`: the registered description, -1 before the first
    user opened it. `lock_descriptor`: a second one for the lease's locks, where the first could be opened for
    reading only; -1 otherwise. `passing`: the handles that are open with passthrough. `leftover`: the
    descriptors of an inode that the kernel forgot meanwhile. `serial`: which one it is; `remembered`: what
    the next worker is told.
    """

    def __init__(self, inode: Inode, serial: int) -> None:
        self.inode = inode
        self.serial = serial
        self.mutex = threading.Lock()
        self.users = 0
        self.descriptor = -1
        self.writable = False
        self.lock_descriptor = -1
        self.backing_id = 0
        self.unregistrable = False
        self.passing: list[Handle] = []
        self.leftover: list[int] = []
        self.remembered: dict[str, object] | None = None

    @property
    def locks_apart(self) -> bool:
        """Whether the lease's locks are not on the registered description."""
        return self.lock_descriptor >= 0

    def image(self, name: bytes) -> Image:
        """The image as the keeper and the backend see it."""
        descriptor = self.lock_descriptor if self.locks_apart else self.descriptor
        return Image(self.inode.number, name, descriptor)


class Backings:
    """Makes and ends the backings of all inodes."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._memory = store.memory
        self._serials = itertools.count(store.turn * TURN_NUMBERS + 1)
        self._told: set[int] = set()
        self._lingering: dict[int, Backing] = {}
        self.count = 0

    def hold(self, inode: Inode) -> Backing:
        """The inode's backing with one more user; `prepare` makes it usable, `end` must follow."""
        lingering = self._lingering.pop(inode.number, None)
        if inode.backing is None:
            inode.backing = self._revive(lingering, inode) if lingering else self._new(inode)
        inode.backing.users += 1
        return inode.backing

    def _new(self, inode: Inode) -> Backing:
        self.count += 1
        return Backing(inode, next(self._serials))

    def _revive(self, backing: Backing, inode: Inode) -> Backing:
        """Give a lingering backing to an inode that the kernel forgot and learned anew."""
        backing.leftover += backing.inode.take_descriptors()
        backing.inode = inode
        return backing

    def prepare(
        self, backing: Backing, caller: Caller, *, write: bool, register: bool, executes: bool = False
    ) -> Image:
        """Open what is not open yet, on a worker thread.

        Raises:
            OSError: the file cannot be opened at all, or not for writing though `write`.
        """
        with backing.mutex:
            if backing.descriptor < 0:
                backing.descriptor, backing.writable = self._open_widest(backing.inode, caller, executes)
            if write and not backing.writable and not backing.locks_apart:
                modes = (os.O_RDWR, os.O_RDWR | os.O_APPEND, os.O_WRONLY)
                backing.lock_descriptor = self._open_first(backing.inode, caller, modes)[0]
            if register and not backing.backing_id and not backing.unregistrable:
                backing.backing_id = self.register(backing.descriptor, caller)
                backing.unregistrable = not backing.backing_id
            self.remember(backing)
        return backing.image(self._store.name_of(backing.inode))

    def remember(self, backing: Backing) -> None:
        """Let the next worker know of it, if it is not known as it is; any thread that may change it."""
        value: dict[str, object] = {
            "inode": backing.inode.number,
            "fd": backing.descriptor,
            "fds": [backing.lock_descriptor, *backing.leftover],
            "writable": backing.writable,
            "id": backing.backing_id,
            "apart": backing.locks_apart,
            "unregistrable": backing.unregistrable,
        }
        if value != backing.remembered:
            self._memory.set(f"{BACKING}{backing.serial}", value)
            backing.remembered = value

    def recall(self, serial: int, inode: Inode, value: dict[str, Any]) -> Backing:
        """The backing of that number that a former worker had of an inode, without users."""
        backing = Backing(inode, serial)
        backing.descriptor, backing.writable = value["fd"], value["writable"]
        backing.backing_id, backing.unregistrable = value["id"], value["unregistrable"]
        lock, *backing.leftover = value["fds"]
        backing.lock_descriptor = lock if value["apart"] else -1
        backing.remembered = value
        self.count += 1
        return backing

    def register(self, descriptor: int, caller: Caller) -> int:
        """Make a description known to the kernel, as the caller: that is who a server will see.

        Returns the backing id, 0 if there is none to be had; worker thread.
        """
        if not self.wanted:
            return 0
        try:
            return self._store.credentials.attempt(caller, self._store.kernel.register_backing, descriptor)
        except OSError as error:
            if error.errno not in self._told:
                self._told.add(error.errno or 0)
                log.warning(
                    "The kernel does not take '%s' as a backing file (%s): lockfs serves such files itself.",
                    os.readlink(f"/proc/self/fd/{descriptor}"),
                    error.strerror,
                )
            return 0

    def unregister(self, backing_id: int) -> None:
        """Give a backing id back; worker thread."""
        try:
            self._store.kernel.unregister_backing(backing_id)
        except OSError as error:
            if error.errno == errno.ENOENT and self._store.turn:
                return  # a former worker gave it back with its last breath
            log.warning("backing id %d could not be given back: %s", backing_id, error.strerror)

    @property
    def wanted(self) -> bool:
        """Whether this mount uses passthrough."""
        return self._store.io is not IoMode.DAEMON and self._store.kernel.passthrough

    def _open_widest(self, inode: Inode, caller: Caller, executes: bool) -> tuple[int, bool]:
        """Open for as much as can be had. An executing open reads only: a writer elsewhere would bar it."""
        modes: tuple[int, ...] = (os.O_RDONLY, os.O_WRONLY)
        if not executes:
            modes = (os.O_RDWR, os.O_RDWR | os.O_APPEND, *modes)
        descriptor, mode = self._open_first(inode, caller, modes)
        return descriptor, mode & os.O_ACCMODE != os.O_RDONLY

    def _open_first(self, inode: Inode, caller: Caller, modes: tuple[int, ...]) -> tuple[int, int]:
        refusal: OSError | None = None
        for mode in modes:
            try:
                return self._store.credentials.attempt(caller, os.open, inode.path, mode | _BASE), mode
            except OSError as error:
                if error.errno not in _NOT_WRITABLE:
                    raise
                refusal = refusal or error
        raise refusal or OSError(errno.EACCES, "there is no way to open the file")

    def leave(self, backing: Backing) -> Backing | None:
        """One user less; returns the backing if it was the last, detached, to be closed on a worker thread.

        It lingers, unused, while the keeper holds the image: the storage has not taken the lease back yet.
        """
        backing.users -= 1
        if backing.users:
            return None
        if self._store.keeper.holds(backing.inode.number):
            self._lingering[backing.inode.number] = backing
            return None
        return self._detach(backing)

    def expire(self, number: int) -> Backing | None:
        """The lingering backing of a node number, detached to be closed; None if it was taken up again."""
        backing = self._lingering.pop(number, None)
        return self._detach(backing) if backing is not None else None

    def _detach(self, backing: Backing) -> Backing:
        inode = backing.inode
        self.count -= 1
        if inode.backing is backing:
            inode.backing = None
            if inode.forgotten:
                backing.leftover += inode.take_descriptors()
        return backing

    def close(self, backing: Backing) -> None:
        """Close a detached backing, on a worker thread.

        Forgotten before it is closed: a descriptor that is named must be open.
        """
        if backing.backing_id:
            self.unregister(backing.backing_id)
        if backing.remembered is not None:
            self._memory.remove(f"{BACKING}{backing.serial}")
        close_all([fd for fd in (backing.descriptor, backing.lock_descriptor) if fd >= 0] + backing.leftover)

    @asynccontextmanager
    async def image_of(
        self, inode: Inode, caller: Caller, *, write: bool = False
    ) -> AsyncIterator[tuple[Image, Opener]]:
        """The image and its opener for an operation that is not an open."""
        backing = self.hold(inode)
        try:
            yield await self._store.call(self._prepare_image, backing, caller, write)
        finally:
            await self.end(backing)

    def _prepare_image(self, backing: Backing, caller: Caller, write: bool) -> tuple[Image, Opener]:
        image = self.prepare(backing, caller, write=write, register=False)
        return image, identify(caller.pid, self._store.policy)

    async def end(self, backing: Backing) -> None:
        """Leave the backing and close it if that was its last user; not cancelled."""
        spent = self.leave(backing)
        if spent is not None:
            await self._store.surely(self.close, spent)
