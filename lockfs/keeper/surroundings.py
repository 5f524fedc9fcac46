"""What the keeper asks of the mount around it, and the threads it asks on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import trio

T = TypeVar("T")

WORKERS_MAX = 8


class Surroundings(Protocol):
    """The mount as the keeper sees it. Its methods are called on worker threads and may raise OSError."""

    @property
    def wants_taken(self) -> bool:
        """Whether `taken` does anything; if not, opens are spared the trip to a worker thread."""

    def still_written(self, inode: int) -> bool:
        """Whether a guest of this mount holds QEMU's write byte (101) on the image."""

    def has_open(self, pid: int, inode: int) -> bool:
        """Whether that process holds a writable descriptor of the image, an inherited one included."""

    def settle(self, inode: int) -> None:
        """Bring all data of the image that this host holds to the storage (fsync)."""

    def taken(self, inode: int) -> None:
        """The lease was just taken: drop what is cached of the image, another host may have changed it."""


class Workers(Protocol):
    """Runs a blocking function elsewhere. A dependency, so that tests decide when it ends."""

    async def call(self, function: Callable[..., T], *arguments: object) -> T:
        """The function's result; cancellation waits for the function to end."""


class Threads:
    """Workers on trio's threads, a bounded number at a time."""

    def __init__(self, limit: int = WORKERS_MAX) -> None:
        self._limiter = trio.CapacityLimiter(limit)

    async def call(self, function: Callable[..., T], *arguments: object) -> T:
        """Run the function on a thread."""
        return await trio.to_thread.run_sync(function, *arguments, limiter=self._limiter)
