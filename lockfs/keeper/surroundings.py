"""What the keeper asks of the mount around it, and the threads it asks on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import trio

from lockfs.linux.proc import Process

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

    def bypassed(self, inode: int) -> bool:
        """Whether a handle that is not revoked can change the image without passing a gate, the kernel doing
        the writing. Called on the trio thread; it is instant.
        """

    async def revoke(self, inodes: frozenset[int]) -> dict[int, str]:
        """Make every later read and write through what is open of images now fail, memory maps aside.

        Called on the trio thread. Returns those of which that is not sure, with the reason. Cancelled, it may
        happen later.
        """

    def mappers(self, inodes: frozenset[int]) -> dict[int, frozenset[Process]]:
        """Processes that can change images through memory that maps them, by inode."""

    def kill(self, processes: frozenset[tuple[int, int]], deadline_s: float) -> set[tuple[int, int]]:
        """SIGKILL processes, given by id and start time; those that are not gone within `deadline_s`."""

    def settle(self, inode: int, *, revoked: bool = False) -> None:
        """Bring all data of the image that this host holds to the storage (fsync).

        With `revoked`, also wait for writes under way that passed no gate: this may change the file where it
        has no data, so only for a lease that is good.
        """

    def unwritten(self, inode: int) -> list[int]:
        """The descriptors of the image's opens whose gates ask, so that nothing can be changed through them
        at this moment. Not of those whose gates are shut: what was begun there must stay refused.
        """

    def taken(self, inode: int) -> None:
        """The lease was just taken: drop what is cached of the image, another host may have changed it."""


class Workers(Protocol):
    """Runs a blocking function elsewhere. A dependency, so that tests decide when it ends."""

    async def call(self, function: Callable[..., T], *arguments: object) -> T:
        """The function's result; cancellation waits for the function to end."""

    async def attempt(self, function: Callable[..., T], *arguments: object) -> T:
        """As `call`, but cancelled it leaves the function to itself."""


class Threads:
    """Workers on trio's threads, a bounded number at a time."""

    def __init__(self, limit: int = WORKERS_MAX) -> None:
        self._limiter = trio.CapacityLimiter(limit)

    async def call(self, function: Callable[..., T], *arguments: object) -> T:
        """Run the function on a thread."""
        return await trio.to_thread.run_sync(function, *arguments, limiter=self._limiter)

    async def attempt(self, function: Callable[..., T], *arguments: object) -> T:
        """Run the function on a thread that is given up if this is cancelled."""
        return await trio.to_thread.run_sync(
            function, *arguments, limiter=self._limiter, abandon_on_cancel=True
        )
