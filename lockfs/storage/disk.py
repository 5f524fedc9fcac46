"""Lease storage through O_DIRECT: a regular file or a block device as the engine's `Disk`."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import trio

from lockfs.errors import SetupError
from lockfs.paxos.seams import Disk, DiskError, DiskTimeout
from lockfs.storage.buffers import Buffers
from lockfs.storage.descriptor import FileClosed, SharedDescriptor
from lockfs.storage.opening import Opened, Place, open_storage
from lockfs.storage.rawio import Kernel, RawIO
from lockfs.storage.workers import NotInTime, Workers, WorkersStopped

PLACES = 8
RENEWAL_PLACES = 4
OPEN_TIMEOUT_S = 30.0
CLOSE_TIMEOUT_S = 10.0

_T = TypeVar("_T")


@dataclass(frozen=True)
class Crew:
    """Threads and buffers that a disk works with. `own`: they are one disk's and end with it."""

    workers: Workers
    buffers: Buffers
    own: bool = False

    def dismiss(self, file: SharedDescriptor) -> None:
        """Close a file that could not be opened in time as soon as that has ended, and end own threads."""
        if self.own:
            self.workers.stop_soon(file.close)
        else:
            file.close()


@dataclass(eq=False)
class _Writing:
    """A write from its call until it has landed, or is certain not to."""

    start: int
    end: int
    ended: trio.Event = field(default_factory=trio.Event)

    def overlaps(self, other: _Writing) -> bool:
        """Whether both touch one byte."""
        return self.start < other.end and other.start < self.end


class DirectDisk(Disk):
    """One file or device, uncached (O_DIRECT) and stable when written (O_DSYNC).

    Made by `open`, ended by `close`. At most `places` calls are under way at once; others wait for a place
    within their own time. A call whose time is up, or that is cancelled, returns at once; its thread, its
    place, its buffer and the descriptor stay as they are until the I/O has ended. What must not wait behind
    another's stuck I/O gets a DirectDisk with threads of its own: renewals do (`RENEWAL_PLACES`).
    """

    def __init__(
        self,
        place: Place,
        opened: Opened,
        crew: Crew,
        *,
        file: SharedDescriptor,
        io: RawIO,
    ) -> None:
        """Use `open`."""
        workers, buffers = crew.workers, crew.buffers
        self._own_workers = crew.own
        self._writing: list[_Writing] = []
        self._name = place.name
        self._writable = place.writable
        self._opened = opened
        self._workers = workers
        self._file = file
        self._io = io
        self._buffers = buffers

    @classmethod
    async def open(
        cls,
        path: str,
        *,
        name: str | None = None,
        directory: int | None = None,
        writable: bool = True,
        places: int = PLACES,
        timeout: float = OPEN_TIMEOUT_S,
        io: RawIO | None = None,
        buffers: Buffers | None = None,
        crew: Crew | None = None,
    ) -> DirectDisk:
        """Open `path`, relative to the descriptor `directory` if given. `timeout` is in seconds.

        `name` is what people call it (default: `path`); `io` is the kernel's by default, `buffers` its own.
        With a `crew`, which other disks share, it has no threads of its own, and `places` mean nothing.
        An opening that is late still uses `directory`, so that stays open for longer than any disk.

        Raises:
            SetupError: no such file, no permission, no O_DIRECT, unfit sectors, or no answer in time.
        """
        name = path if name is None else name
        place, io = Place(path, name, directory, writable), io or Kernel()
        file = SharedDescriptor()
        if crew is None:
            workers = Workers(f"disk {os.path.basename(name)}", places)
            crew = Crew(workers, buffers or Buffers(), own=True)
        try:
            opened = await crew.workers.run(partial(open_storage, file, place, io), timeout)
        except NotInTime:
            crew.dismiss(file)
            raise SetupError(
                f"{name} could not be opened within {timeout:g} s; check that its storage can be reached."
            ) from None
        except BaseException:
            crew.dismiss(file)
            raise
        return cls(place, opened, crew, file=file, io=io)

    @property
    def name(self) -> str:
        """What people call it: a path."""
        return self._name

    @property
    def sector_size(self) -> int:
        """The smallest sectors, in bytes, that the storage takes: 512 or 4096 (alignment.sector_size_of)."""
        return self._opened.sector_size

    @property
    def is_device(self) -> bool:
        """Whether it is a block device, not a regular file."""
        return self._opened.is_device

    @property
    def identity(self) -> tuple[int, int]:
        """Which file it is: st_dev and st_ino of stat(2), as found at the opening."""
        return self._opened.identity

    @property
    def stuck(self) -> int:
        """How many I/Os are under way whose callers were timed out or cancelled."""
        return self._workers.stuck

    async def size(self, timeout: float) -> int:
        """The file's or device's present size in bytes.

        Raises:
            DiskTimeout, DiskError.
        """
        return await self._call(self._size, timeout, f"Asking for the size of {self._name}")

    async def read(self, offset: int, length: int, timeout: float) -> bytes:
        """Exactly `length` bytes from byte `offset`, within `timeout` seconds; see Disk.read."""
        what = f"Reading {length} bytes at byte {offset} of {self._name}"
        end = trio.current_time() + timeout
        await self._after_earlier(_Writing(offset, offset + length), end, what)
        return await self._call(partial(self._read, offset, length), end - trio.current_time(), what)

    async def write(self, offset: int, data: bytes, timeout: float) -> None:
        """All of `data` to byte `offset`, stable on return, within `timeout` seconds; see Disk.write."""
        what = f"Writing {len(data)} bytes at byte {offset} of {self._name}"
        if not self._writable:
            raise DiskError(errno.EBADF, f"{what} is not possible: it was opened for reading only.")
        end = trio.current_time() + timeout
        mine = _Writing(offset, offset + len(data))
        await self._after_earlier(mine, end, what)
        # No checkpoint in between: whoever comes next sees this one.
        self._writing.append(mine)

        def ended() -> None:
            self._writing.remove(mine)
            mine.ended.set()

        await self._call(partial(self._write, offset, bytes(data)), end - trio.current_time(), what, ended)

    async def _after_earlier(self, mine: _Writing, end: float, what: str) -> None:
        """Wait until no earlier write of any of these bytes is under way: late ones must not land last, and
        what was read must not become untrue by one.
        """
        while (earlier := next((w for w in self._writing if w.overlaps(mine)), None)) is not None:
            with trio.move_on_at(end):
                await earlier.ended.wait()
            if not earlier.ended.is_set():
                raise DiskTimeout(errno.ETIMEDOUT, f"{what} waited in vain for an earlier write to land.")

    async def close(self) -> None:
        """Take no more calls and close the file: now, or with the last I/O under way. May be called again.

        Closing itself has CLOSE_TIMEOUT_S; it goes on by itself after that, or if this call is cancelled.
        """
        if self._own_workers:
            await self._workers.stop(self._file.close, CLOSE_TIMEOUT_S)
        else:
            # Nothing waits to be written to it, so this is instant, but for the last I/O, which then does it.
            self._file.close()

    async def _call(
        self, work: Callable[[], _T], timeout: float, what: str, ended: Callable[[], None] = lambda: None
    ) -> _T:
        try:
            return await self._workers.run(work, timeout, ended)
        except NotInTime as late:
            doing = "end" if late.begun else "begin"
            sentence = f"{what} did not {doing} within {max(timeout, 0.0):g} s."
            raise DiskTimeout(errno.ETIMEDOUT, sentence) from None
        except (WorkersStopped, FileClosed):
            raise DiskError(errno.EBADF, f"{what} is not possible: it is closed.") from None
        except OSError as error:
            number = error.errno or errno.EIO
            # A network file system that gave up on its server does not know what the server still does.
            family = DiskTimeout if number == errno.ETIMEDOUT else DiskError
            raise family(number, f"{what} failed: {os.strerror(number)}.") from error
        except _Short as short:
            raise DiskError(errno.EMSGSIZE, f"{what} ended after {short.moved} bytes.") from None

    # In a worker thread. A buffer is lent to exactly this stack frame, which lives until the I/O has ended.

    def _read(self, offset: int, length: int) -> bytes:
        buffer = self._buffers.take(length)
        try:
            with self._file.used() as descriptor:
                _check(self._io.preadv(descriptor, [memoryview(buffer)[:length]], offset), length)
            return buffer[:length]
        finally:
            self._buffers.give_back(buffer)

    def _write(self, offset: int, data: bytes) -> None:
        length = len(data)
        buffer = self._buffers.take(length)
        try:
            buffer[:length] = data
            with self._file.used() as descriptor:
                _check(self._io.pwritev(descriptor, [memoryview(buffer)[:length]], offset), length)
        finally:
            self._buffers.give_back(buffer)

    def _size(self) -> int:
        with self._file.used() as descriptor:
            if self.is_device:
                return os.lseek(descriptor, 0, os.SEEK_END)
            return os.fstat(descriptor).st_size


class _Short(Exception):
    def __init__(self, moved: int) -> None:
        super().__init__(moved)
        self.moved = moved


def _check(moved: int, length: int) -> None:
    if moved != length:
        raise _Short(moved)
