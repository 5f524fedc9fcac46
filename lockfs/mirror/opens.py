"""Opens of regular files: a lease from the keeper, a handle for the channel, and the way back.

The order matters. A lease is had before anything can be changed, truncation included; the writer's own
descriptor is opened after that, so that a network file system shows it what the last holder wrote; a
lease is given back before the description that carries its locks is closed.
"""

from __future__ import annotations

import errno
import logging
import os
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import trio

from lockfs.backends.base import Image
from lockfs.channel.handles import FOPEN_PASSTHROUGH, TURN_NUMBERS, Handle
from lockfs.errors import BackendError, ImageBusy, LeaseUnavailable
from lockfs.keeper.gate import GateState
from lockfs.keeper.grants import Access, Grant
from lockfs.keeper.openers import Opener, identify
from lockfs.mirror import syscalls
from lockfs.mirror.backings import Backing, Backings
from lockfs.mirror.credentials import Caller
from lockfs.mirror.inodes import Inode
from lockfs.mirror.modes import choose, is_passed, without_flush
from lockfs.mirror.store import Store, close_all
from lockfs.mirror.surroundings import MirrorSurroundings

CLAIM_ATTEMPTS_MAX = 8
"""How often a gate may close again between the lease's arrival and the change."""
FMODE_EXEC = 0x20
"""Linux's mark, among the flags of an open, that the file is being executed (include/linux/fs.h)."""

KEPT = (
    os.O_ACCMODE | os.O_APPEND | os.O_DIRECT | os.O_SYNC | os.O_DSYNC | os.O_NOATIME | os.O_NONBLOCK
)  # fmt: skip
"""Of an open's flags, those that its own descriptor is opened with."""

HANDLE = "handle:"
"""What the keys of remembered opens begin with; the handle's number follows."""

log = logging.getLogger("lockfs.mirror")


def writes(flags: int) -> bool:
    """Whether an open with these flags may change data."""
    return flags & os.O_ACCMODE != os.O_RDONLY or bool(flags & os.O_TRUNC)


@dataclass(eq=False)
class OpenFile:
    """An open that was granted. `entry`: its reply told the kernel of the inode as well (create). `unique`:
    the request, until its reply is at the kernel.
    """

    handle: Handle
    inode: Inode
    backing: Backing
    grant: Grant
    entry: bool
    unique: int = 0


@dataclass
class Start:
    """What an open has in hand so far; all of it goes back if the open fails. `bound`: see Keeper.bind."""

    backing: Backing
    descriptor: int = -1
    bound: bool = False
    grant: Grant | None = None
    status: os.stat_result | None = None


class Opens:
    """All open regular files of the mount."""

    def __init__(self, store: Store, backings: Backings, surroundings: MirrorSurroundings) -> None:
        self._store = store
        self._backings = backings
        self._surroundings = surroundings
        self._files: dict[int, OpenFile] = {}
        self._waiting: Counter[int] = Counter()
        self._untold: dict[int, int] = {}
        store.handles.changed = self._changed

    def __len__(self) -> int:
        return len(self._files)

    def find(self, number: int) -> OpenFile | None:
        """The open file of a handle number."""
        return self._files.get(number)

    def waits(self, tid: int) -> bool:
        """Whether a request of that thread is with the keeper now."""
        return tid in self._waiting

    # Opening

    def known(self, caller: Caller) -> OpenFile | None:
        """The open that a former worker granted to this very request, of which nobody could be told."""
        number = self._untold.get(caller.unique, 0) if caller.resent else 0
        return self._files.get(number)

    async def open(
        self, inode: Inode, flags: int, caller: Caller, *, strict: bool = False, entry: bool = False
    ) -> tuple[Handle, os.stat_result]:
        """Open a file that exists. With `strict` only the caller's own permissions count.

        Raises:
            ImageBusy, Interrupted, BackendError: no lease; logged with the holder's name if it is busy.
            OSError: the file could not be opened, or not truncated.
        """
        async with self.starting(inode) as start:
            prepared = await self._store.call(self._prepare, start, flags, caller, strict)
            return await self.finish(start, flags, caller, prepared, strict=strict, entry=entry)

    def _prepare(self, start: Start, flags: int, caller: Caller, strict: bool) -> tuple[Image, Opener]:
        """Before the lease: find out who opens, open what backs the file; a reader is then done.

        So is a writer that truncates nothing, where no other host's data could have been missed.
        """
        opener = identify(caller.pid, self._store.policy)
        executes = bool(flags & FMODE_EXEC)
        prepare = self._backings.prepare
        if not writes(flags) or (self._store.local and not flags & os.O_TRUNC):
            self._open_own(start, flags, caller, strict)
        image = prepare(start.backing, caller, write=writes(flags), register=True, executes=executes)
        return image, opener

    def _open_own(self, start: Start, flags: int, caller: Caller, strict: bool) -> None:
        """Open the handle's own descriptor, and truncate if asked.

        Bound before anything is changed through it, and after the lease was had: see Keeper.bind.
        """
        credentials, bind = self._store.credentials, self._store.bind
        run = credentials.run if strict else credentials.attempt
        path = start.backing.inode.path
        start.descriptor = run(caller, os.open, path, flags & KEPT | os.O_CLOEXEC)
        read_only = flags & os.O_ACCMODE == os.O_RDONLY
        if bind is not None and not read_only:
            bind(start.descriptor)
            start.bound = True
        if flags & os.O_TRUNC:
            if read_only:
                run(caller, syscalls.truncate, path, 0, bind)
            else:
                os.ftruncate(start.descriptor, 0)
        start.status = os.fstat(start.descriptor)

    async def finish(
        self,
        start: Start,
        flags: int,
        caller: Caller,
        asked: tuple[Image, Opener],
        *,
        strict: bool,
        entry: bool,
    ) -> tuple[Handle, os.stat_result]:
        """The rest of an open, from the lease on; `entry`: the reply tells the kernel of the inode too."""
        image, opener = asked
        access = Access.WRITE if writes(flags) else Access.READ
        with self.waiting(caller), telling(image, opener, "reading" if access is Access.READ else "writing"):
            start.grant = await self._store.keeper.open(image, opener, access)
            if start.descriptor < 0 and flags & os.O_TRUNC:
                async with self.passage(start.grant):
                    await self._store.call(self._open_own, start, flags, caller, strict)
        if start.descriptor < 0:
            await self._store.call(self._open_own, start, flags, caller, strict)
        elif flags & os.O_ACCMODE != os.O_RDONLY and not start.bound and self._store.bind is not None:
            await self._store.call(self._store.bind, start.descriptor)  # it was made before there was a lease
        return self._enter(start, flags, start.grant, entry, caller.unique)

    def _enter(
        self, start: Start, flags: int, grant: Grant, entry: bool, unique: int
    ) -> tuple[Handle, os.stat_result]:
        """Decide how the data is served and make the handle known. Nothing can fail from here on."""
        backing = start.backing
        mode = choose(
            self._store.io,
            grant.kind,
            may_yield=grant.may_yield,
            registered=bool(backing.backing_id) and self._backings.wanted,
            passing=any(not handle.dead for handle in backing.passing),
            locks_apart=backing.locks_apart,
        )
        if self._store.local:
            mode = without_flush(mode)
        backing_id = backing.backing_id if mode & FOPEN_PASSTHROUGH else 0
        gate = grant.gate if grant.writes else None
        handle = Handle(backing.inode.number, start.descriptor, flags, mode, backing_id, gate)
        self._store.handles.add(handle)
        self._add(OpenFile(handle, backing.inode, backing, grant, entry, unique))
        if unique:
            self._untold[unique] = handle.number
        self._remember(self._files[handle.number])
        return handle, start.status or os.fstat(start.descriptor)

    def _add(self, file: OpenFile) -> None:
        handle = file.handle
        self._files[handle.number] = file
        if handle.open_flags & FOPEN_PASSTHROUGH:
            file.backing.passing.append(handle)
        if not is_passed(handle.open_flags):
            self._surroundings.unpassed += 1

    # For the next worker

    def _remember(self, file: OpenFile) -> None:
        """Let the next worker know of the open as it is now."""
        handle = file.handle
        value = {
            "nodeid": handle.nodeid,
            "fd": handle.descriptor,
            "flags": handle.flags,
            "open": handle.open_flags,
            "id": handle.backing_id,
            "dead": handle.dead,
            "backing": file.backing.serial,
            "grant": file.grant.number,
            "entry": file.entry,
            "unique": file.unique,
        }
        self._store.memory.set(f"{HANDLE}{handle.number}", value)

    def _changed(self, handle: Handle) -> None:
        file = self._files.get(handle.number)
        if file is not None:
            self._remember(file)

    def answered(self, unique: int) -> None:
        """The reply to an open is at the kernel."""
        file = self._files.get(self._untold.pop(unique, 0))
        if file is not None:
            file.unique = 0
            self._remember(file)

    def recall(self, number: int, value: dict[str, Any], backing: Backing, grant: Grant) -> None:
        """Know an open that a former worker granted."""
        gate = grant.gate if grant.writes else None
        handle = Handle(
            value["nodeid"], value["fd"], value["flags"], value["open"], value["id"], gate, number
        )
        handle.dead = value["dead"]
        self._store.handles.recall(handle)
        backing.users += 1
        self._add(OpenFile(handle, backing.inode, backing, grant, value["entry"], value["unique"]))
        if value["unique"]:
            self._untold[value["unique"]] = number

    def untold(self) -> list[OpenFile]:
        """The opens whose reply has not reached the kernel, as far as is known."""
        return [self._files[number] for number in self._untold.values() if number in self._files]

    @asynccontextmanager
    async def starting(self, inode: Inode) -> AsyncIterator[Start]:
        """An open under way: whatever ends it early, nothing of it stays."""
        start = Start(self._backings.hold(inode))
        try:
            yield start
        except BaseException:
            with trio.CancelScope(shield=True):
                if start.grant is not None:
                    await self._store.keeper.close(start.grant)
                if start.descriptor >= 0:
                    await self._store.call(os.close, start.descriptor)
                await self._backings.end(start.backing)
            raise

    # Changing and closing

    @asynccontextmanager
    async def passage(self, grant: Grant) -> AsyncIterator[None]:
        """Pass the grant's gate for one change of data.

        Raises:
            LeaseUnavailable: the lease could not be had. WriteRefused: never through this grant.
        """
        for _ in range(CLAIM_ATTEMPTS_MAX):
            state = grant.gate.enter()
            if state is GateState.OPEN:
                break
            if state is GateState.SHUT:
                raise grant.gate.refusal or LeaseUnavailable("the image may not be changed now")
            await self._store.keeper.claim(grant)
        else:
            raise LeaseUnavailable(f"the lease of '{grant.image.name}' comes and goes; look at its holder")
        try:
            yield
        finally:
            grant.gate.leave()

    async def claim(self, handle: Handle) -> None:
        """Get the handle's gate opened.

        Raises:
            LeaseUnavailable: the lease could not be had.
            OSError: EBADF if the handle is closed.
        """
        file = self._files.get(handle.number)
        if file is None:
            raise OSError(errno.EBADF, "the handle is closed")
        await self._store.keeper.claim(file.grant)

    async def release(self, number: int) -> OpenFile | None:
        """End an open: the data first, then the lease, then the descriptors. Raises nothing expected."""
        file = self._files.pop(number, None)
        if file is None:
            # A former worker may have ended it before it could say so.
            level = logging.DEBUG if number < self._store.turn * TURN_NUMBERS else logging.ERROR
            log.log(level, "handle %d was released, but is not open", number)
            return None
        self._untold.pop(file.unique, None)
        try:
            if file.grant.writes and not self._store.local:
                await self._store.surely(self._settle, file)
            await self._store.keeper.close(file.grant)
        finally:
            self._store.handles.remove(number)
            self._store.memory.remove(f"{HANDLE}{number}")
            if file.handle.open_flags & FOPEN_PASSTHROUGH:
                file.backing.passing.remove(file.handle)
            if not is_passed(file.handle.open_flags):
                self._surroundings.unpassed -= 1
            spent = self._backings.leave(file.backing)
            descriptor = file.handle.descriptor
            if self._store.closes_at_once(descriptor) and not file.handle.flags & os.O_TRUNC:
                self._close(descriptor, spent)
            else:
                await self._store.surely(self._close, descriptor, spent)
        return file

    def _settle(self, file: OpenFile) -> None:
        """Bring the data to where the next holder will read it."""
        try:
            os.fsync(file.handle.descriptor)
        except OSError as error:
            name = file.grant.image.name
            log.error("'%s': data may not have reached the storage: %s", name, error.strerror)

    def _close(self, descriptor: int, spent: Backing | None) -> None:
        close_all([descriptor])
        if spent is not None:
            self._backings.close(spent)

    async def release_all(self) -> None:
        """End every open, at the end of the mount."""
        async with trio.open_nursery() as nursery:
            for number in list(self._files):
                nursery.start_soon(self.release, number)

    @contextmanager
    def waiting(self, caller: Caller) -> Iterator[None]:
        """Say that a request of the caller's thread is with the keeper."""
        self._waiting[caller.pid] += 1
        try:
            yield
        finally:
            self._waiting[caller.pid] -= 1
            if not self._waiting[caller.pid]:
                del self._waiting[caller.pid]


@contextmanager
def telling(image: Image, opener: Opener, purpose: str) -> Iterator[None]:
    """Log a refusal: the error's sentence names the holder, or says what is wrong with the storage."""
    try:
        yield
    except (ImageBusy, BackendError) as error:
        log.warning("%s was refused %s of '%s': %s", opener, purpose, image.name, error)
        raise
