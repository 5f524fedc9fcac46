"""What the engine asks of the world: sectors to read and write, and the time.

Everything here may be awaited under any event loop. An engine call that is cancelled at an await leaves its
object in a state from which the same object's `settle` can put the storage in order.
"""

from __future__ import annotations

from typing import Protocol

from lockfs.errors import BackendError


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


class Clock(Protocol):
    """This host's time. Never compared with another host's."""

    def now(self) -> float:
        """Seconds since some moment before the program started; never steps back, and counts suspend time.

        CLOCK_BOOTTIME in production.
        """

    async def sleep(self, seconds: float) -> None:
        """Let `seconds` pass; a cancellation point."""
