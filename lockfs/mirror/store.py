"""What all parts of the mirror share: the store, the inodes known, and the threads that touch it."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import trio

from lockfs.backends.base import Forgetful, Memory
from lockfs.backends.state import STATE_DIR
from lockfs.channel.handles import HandleTable, Kernel
from lockfs.keeper.keeper import Keeper
from lockfs.keeper.policy import Policy
from lockfs.linux import calls
from lockfs.mirror.credentials import Caller, Credentials
from lockfs.mirror.inodes import Found, Inode, InodeTable, Slots
from lockfs.mirror.modes import IoMode
from lockfs.mirror.repeats import Repeats

WORKERS_MAX = 64
_LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_DELETED = b" (deleted)"

T = TypeVar("T")


@dataclass(frozen=True)
class Past:
    """What former workers of the mount left: values, inodes, and how many workers there were."""

    memory: Memory = field(default_factory=Forgetful)
    slots: Slots | None = None
    turn: int = 0


class Store:
    """The store's root, its inodes, and the worker threads of one mount.

    `local`: the file system below belongs to this machine alone and keeps an open file's inode in memory, so
    that fstat(2) and cached look-ups never wait and are done without the trip to a thread, which costs
    thirty times as much.
    """

    def __init__(  # noqa: PLR0917  (what a mount is made of)
        self,
        store_fd: int,
        handles: HandleTable,
        kernel: Kernel,
        io: IoMode,
        policy: Policy,
        past: Past | None = None,
    ) -> None:
        """`store_fd` stays the caller's."""
        past = past or Past()
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        root = calls.openat2(store_fd, b".", flags, 0, calls.RESOLVE_NO_XDEV)
        self.memory = past.memory
        self.turn = past.turn
        self.repeats = Repeats(past.memory)
        self.inodes = InodeTable(root, past.slots, past.memory, past.turn)
        self.handles = handles
        self.kernel = kernel
        self.io = io
        self.policy = policy
        self.credentials = Credentials()
        self.local = calls.in_memory(self.inodes.root.descriptor)
        self._looks_in_cache = self.local
        self._limiter = trio.CapacityLimiter(WORKERS_MAX)
        self._keeper: Keeper | None = None

    @property
    def keeper(self) -> Keeper:
        """The lease keeper, which is made after the store because it asks the mirror."""
        if self._keeper is None:
            raise RuntimeError("the mirror was used before it was given its keeper")
        return self._keeper

    @keeper.setter
    def keeper(self, keeper: Keeper) -> None:
        self._keeper = keeper

    @property
    def bind(self) -> Callable[[int], None] | None:
        """Keeper.bind, if it does anything."""
        return self.keeper.bind if self.keeper.binds else None

    async def call(self, function: Callable[..., T], *arguments: object) -> T:
        """Run a blocking function on a worker thread; cancellation waits for it to end."""
        return await trio.to_thread.run_sync(function, *arguments, limiter=self._limiter)

    async def surely(self, function: Callable[..., T], *arguments: object) -> T:
        """As `call`, also in a cancelled task: for what puts things back."""
        with trio.CancelScope(shield=True):
            result = await self.call(function, *arguments)
        return result

    def closes_at_once(self, descriptor: int) -> bool:
        """Whether closing this descriptor waits for nothing, so that it needs no trip to a thread.

        Not on a shared file system, which may write back first, and not where it may free an unlinked file.
        """
        return self.local and os.fstat(descriptor).st_nlink > 0

    # Names

    def check_new(self, name: bytes) -> None:
        """Refuse the name of what lockfs keeps in the store.

        Raises:
            OSError: EPERM.
        """
        if name == STATE_DIR:
            raise OSError(errno.EPERM, "the name is lockfs' own")

    def check_old(self, name: bytes) -> None:
        """Hide the name of what lockfs keeps in the store.

        Raises:
            OSError: ENOENT.
        """
        if name == STATE_DIR:
            raise OSError(errno.ENOENT, "no such file")

    def find(self, directory: int, name: bytes) -> Found:
        """Look a name up, on a worker thread, under the thread's current identity.

        A mount inside the store is not entered: it might be this very one (EACCES).
        """
        try:
            descriptor = calls.openat2(directory, name, _LOOK, 0, calls.RESOLVE_NO_XDEV)
        except OSError as error:
            if error.errno == errno.EXDEV:
                raise OSError(errno.EACCES, "another file system is mounted there") from error
            raise
        return self._examine(descriptor)

    def _examine(self, descriptor: int) -> Found:
        try:
            status = os.fstat(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        known = None if self.local else self.inodes.find((status.st_dev, status.st_ino))
        return Found(descriptor, status, known is not None and _gone(known.descriptor))

    def find_at_once(self, directory: int, name: bytes) -> Found | None:
        """Look a name up in what the kernel remembers; None if that does not tell.

        Raises:
            OSError: the answer is an error, for certain.
        """
        if not self._looks_in_cache:
            return None
        resolve = calls.RESOLVE_NO_XDEV | calls.RESOLVE_CACHED
        try:
            descriptor = calls.openat2(directory, name, _LOOK, 0, resolve)
        except OSError as error:
            if error.errno == errno.EINVAL:
                self._looks_in_cache = False
            if error.errno in (errno.ENOENT, errno.ENAMETOOLONG, errno.ENOTDIR):
                raise
            return None
        return Found(descriptor, os.fstat(descriptor))

    def known_at_once(self, parent: int, name: bytes) -> tuple[Inode, os.stat_result] | None:
        """Look up what both the kernel below and the one above know, with one more lookup, on any thread.

        None if that takes more: pyfuse3's way tells.
        """
        directory = self.inodes.known(parent) if self.local else None
        if directory is None or name == STATE_DIR:
            return None
        try:
            found = self.find_at_once(directory.descriptor, name)
        except OSError:
            return None
        if found is None:
            return None
        os.close(found.descriptor)
        inode = self.inodes.count_again(found.status)
        return None if inode is None else (inode, found.status)

    async def look(self, directory: Inode, name: bytes, caller: Caller) -> Found:
        """Look a name up by the shortest way."""
        found = self.find_at_once(directory.descriptor, name)
        if found is None:
            return await self.call(self.find_for, caller, directory, name)
        return found

    def find_for(self, caller: Caller, directory: Inode, name: bytes) -> Found:
        """Look a name up as the caller, on a worker thread."""
        return self.credentials.attempt(caller, self.find, directory.descriptor, name)

    # Inodes

    async def status(self, inode: Inode) -> os.stat_result:
        """The inode's attributes as they are now."""
        if self.local:
            return os.fstat(inode.descriptor)
        return await self.call(os.fstat, inode.descriptor)

    def status_at_once(self, number: int) -> os.stat_result | None:
        """The attributes of a node number, on any thread; None if they cannot be had without waiting.

        The kernel forgets no inode that it asks about, so its descriptor stays open meanwhile, but at the
        end of the mount. That the number is not another file's by then is checked.
        """
        inode = self.inodes.known(number) if self.local else None
        if inode is None:
            return None
        try:
            status = os.fstat(inode.descriptor)
        except OSError:
            return None
        return status if (status.st_dev, status.st_ino) == inode.key else None

    def name_of(self, inode: Inode) -> bytes:
        """A current path of the inode relative to the store's root, for people.

        A file too deep below the root for the kernel to spell its path out is named by its number, and so is
        one that is known to a former worker's opens alone, without a descriptor.
        """
        if inode.descriptor < 0:
            return b"(inode %d)" % inode.number
        root = os.readlink(os.fsencode(self.inodes.root.path)).rstrip(b"/")
        try:
            path = os.readlink(os.fsencode(inode.path))
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            return b"(inode %d)" % inode.number
        return path.removeprefix(root).lstrip(b"/").removesuffix(_DELETED)

    async def forget(self, forgotten: list[tuple[int, int]]) -> None:
        """Take lookups back: (node number, count) each; not cancelled."""
        descriptors = [fd for number, count in forgotten for fd in self.inodes.forget(number, count)]
        if descriptors:
            await self.discard(descriptors)

    async def discard(self, descriptors: list[int]) -> None:
        """Close O_PATH descriptors; not cancelled.

        The last one of an unlinked file frees its blocks, which takes time.
        """
        slow = []
        for descriptor in descriptors:
            if self.closes_at_once(descriptor):
                os.close(descriptor)
            else:
                slow.append(descriptor)
        if slow:
            await self.surely(close_all, slow)

    def close(self) -> None:
        """Close every inode's descriptor."""
        close_all(self.inodes.clear())


def close_all(descriptors: list[int]) -> None:
    """Close descriptors; an error of one (EIO, after it was closed) does not keep the others open."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def _gone(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError as error:
        return error.errno == errno.ESTALE
    return False
