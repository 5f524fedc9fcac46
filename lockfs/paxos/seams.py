"""What the engine asks of the world: sectors to read and write, and the time.

Everything here may be awaited under any event loop. An engine call that is cancelled at an await leaves its
object in a state from which the same object's `settle` can put the storage in order.

I/Os that follow one another without a wait in between are handed over as a plan: a generator that yields
`ToRead` and `ToWrite` one at a time. For a read it is sent the bytes, which are its own until its next step;
for a write that is on stable storage, nothing. It is closed where it stands when an I/O fails, or is late, or
the caller is cancelled, so it lets go of nothing in a `finally`. It never blocks; it may run in any thread,
but never while its caller, or anybody else with its turn, does.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar

from lockfs.errors import BackendError

_T = TypeVar("_T")


@dataclass(frozen=True)
class ToRead:
    """A step of a plan: exactly `length` bytes from byte `offset`, within `timeout` seconds."""

    offset: int
    length: int
    timeout: float


@dataclass(frozen=True)
class ToWrite:
    """A step of a plan: all of `data` to byte `offset`, within `timeout` seconds."""

    offset: int
    data: bytes
    timeout: float


Step: TypeAlias = ToRead | ToWrite
Plan: TypeAlias = Generator[Step, memoryview, _T]


class DiskError(BackendError):
    """The storage refused an I/O. `number` is its errno. A refused write changed nothing, or so it says."""

    def __init__(self, number: int, sentence: str) -> None:
        super().__init__(sentence)
        self.number = number


class DiskTimeout(DiskError):
    """An I/O did not end in time. A write may still land at any later moment."""


class Disk(Protocol):
    """One file or device that holds lease areas, through one coherent path (no cache, no mirror).

    Transfers are whole sectors at sector-aligned offsets. The write of one sector is atomic: a reader sees
    the old or the new one. Several calls may be under way at once; each is bounded by its own `timeout`
    (seconds). A cancelled write is as one that timed out. Writes of one program to one sector land in the
    order in which they were called, and what it reads shows them: a read or write waits, within its timeout,
    for earlier writes that overlap it and have timed out, until they have landed or never will.
    """

    @property
    def name(self) -> str:
        """What people call it: a path."""

    async def read(self, offset: int, length: int, timeout: float) -> bytes:
        """Exactly `length` bytes from byte `offset`.

        Raises:
            DiskTimeout, DiskError: nothing was read (EMSGSIZE: the file is too short).
        """

    async def write(self, offset: int, data: bytes, timeout: float) -> None:
        """All of `data` to byte `offset`; on return it is on stable storage.

        Raises:
            DiskTimeout: it may land later. DiskError: refused.
        """

    async def carry_out(self, plan: Plan[_T]) -> _T:
        """Do the plan's steps one after the other, each by the rules of `read` and `write`; its result.

        Once this has returned, however, nothing of the plan runs and none of its I/Os begins. One that is
        under way then may still land. This is the plain way to do it; a disk may have a quicker one.

        Raises:
            DiskTimeout, DiskError: of the step that failed; the plan was closed. Whatever the plan raises.
        """
        try:
            step = next(plan)
            while True:
                if isinstance(step, ToRead):
                    seen = memoryview(await self.read(step.offset, step.length, step.timeout))
                else:
                    await self.write(step.offset, step.data, step.timeout)
                    seen = memoryview(b"")
                with seen:
                    step = plan.send(seen)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
        finally:
            plan.close()


class Clock(Protocol):
    """This host's time. Never compared with another host's."""

    def now(self) -> float:
        """Seconds since some moment before the program started; never steps back, and counts suspend time.

        CLOCK_BOOTTIME in production. May be called in any thread: plans do.
        """

    async def sleep(self, seconds: float) -> None:
        """Let `seconds` pass; a cancellation point."""


class WallClock(Protocol):
    """The real time, as far as this host knows it. Compared with `Clock` alone, never with another host's."""

    late: float
    """By how much less than that it may show, seconds: the length of its steps."""

    def now(self) -> float:
        """Seconds since the epoch; may be set, forward and back. Any thread.

        In production CLOCK_REALTIME, and the clock that a battery keeps going.
        """
