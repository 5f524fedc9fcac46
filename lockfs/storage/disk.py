"""Lease storage through O_DIRECT: a regular file or a block device as the engine's `Disk`."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import trio

from lockfs.errors import SetupError
from lockfs.paxos.seams import Disk, DiskError, DiskTimeout, Plan, ToRead, ToWrite
from lockfs.storage.buffers import Buffers
from lockfs.storage.descriptor import FileClosed, SharedDescriptor
from lockfs.storage.opening import Opened, Place, open_storage
from lockfs.storage.order import Order
from lockfs.storage.rawio import Kernel, RawIO
from lockfs.storage.turn import Means, Turn, refusal
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


class DirectDisk(Disk):
    """One file or device, uncached (O_DIRECT) and stable when written (O_DSYNC).

    Made by `open`, ended by `close`. At most `places` calls are under way at once; others wait for a place
    within their own time. A call whose time is up, or that is cancelled, returns at once; its thread, its
    place, its buffer and the descriptor stay as they are until the I/O has ended. What must not wait behind
    another's stuck I/O gets a DirectDisk with threads of its own: renewals do (`RENEWAL_PLACES`). A plan
    keeps its thread from one I/O to the next (turn.py), unless other calls wait for a place.
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
        self._own_workers = crew.own
        self._name = place.name
        self._opened = opened
        self._workers = crew.workers
        self._file = file
        self._means = Means(
            place.name, place.writable, file, io, crew.buffers, Order(), lambda: crew.workers.crowded
        )

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
        what = f"Asking for the size of {self._name}"
        try:
            return await self._workers.run(self._size, timeout)
        except NotInTime as late:
            doing = "end" if late.begun else "begin"
            sentence = f"{what} did not {doing} within {max(timeout, 0.0):g} s."
            raise DiskTimeout(errno.ETIMEDOUT, sentence) from None
        except (WorkersStopped, FileClosed):
            raise _closed(what) from None
        except OSError as error:
            raise refusal(error, what) from error

    async def read(self, offset: int, length: int, timeout: float) -> bytes:
        """Exactly `length` bytes from byte `offset`, within `timeout` seconds; see Disk.read."""
        return await self.carry_out(_reading(ToRead(offset, length, timeout)))

    async def write(self, offset: int, data: bytes, timeout: float) -> None:
        """All of `data` to byte `offset`, stable on return, within `timeout` seconds; see Disk.write."""
        await self.carry_out(_writing(ToWrite(offset, bytes(data), timeout)))

    async def carry_out(self, plan: Plan[_T]) -> _T:
        """The plan's steps, one after the other; see Disk.carry_out."""
        turn = Turn(plan, self._means)
        try:
            turn.begin()
            while turn.step is not None:
                await self._after_earlier(turn)
                await self._take(turn)
            return turn.result
        finally:
            turn.give_up()

    async def _after_earlier(self, turn: Turn[_T]) -> None:
        """Wait until no earlier write of any of the bytes of the step at hand is under way."""
        while (earlier := turn.enter()) is not None:
            with trio.move_on_at(turn.deadline):
                await earlier.ended.wait()
            if not earlier.ended.is_set():
                sentence = f"{turn.what} waited in vain for an earlier write to land."
                raise DiskTimeout(errno.ETIMEDOUT, sentence)

    async def _take(self, turn: Turn[_T]) -> None:
        """Have a thread go on with the plan. No checkpoint since its step was entered: who comes next sees
        it.
        """
        run = self._workers.run
        try:
            await run(turn.run, turn.left, turn.leave, goes_on=turn.goes_on, given_up=turn.give_up)
        except NotInTime as late:
            raise turn.late(begun=late.begun) from None
        except (WorkersStopped, FileClosed):
            raise _closed(turn.what) from None
        except OSError as error:  # no descriptor was left to wait with
            raise refusal(error, turn.what) from error

    async def close(self) -> None:
        """Take no more calls and close the file: now, or with the last I/O under way. May be called again.

        Closing itself has CLOSE_TIMEOUT_S; it goes on by itself after that, or if this call is cancelled.
        """
        if self._own_workers:
            await self._workers.stop(self._file.close, CLOSE_TIMEOUT_S)
        else:
            # Nothing waits to be written to it, so this is instant, but for the last I/O, which then does it.
            self._file.close()

    # In a worker thread

    def _size(self) -> int:
        with self._file.used() as descriptor:
            if self.is_device:
                return os.lseek(descriptor, 0, os.SEEK_END)
            return os.fstat(descriptor).st_size


def _reading(step: ToRead) -> Plan[bytes]:
    return bytes((yield step))


def _writing(step: ToWrite) -> Plan[None]:
    yield step


def _closed(what: str) -> DiskError:
    return DiskError(errno.EBADF, f"{what} is not possible: it is closed.")
