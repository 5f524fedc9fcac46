"""Open files as the channel serves them, and the table that both it and the mirror use.

The mirror makes a Handle for each open and puts it into the table; the channel finds it there by the
number the kernel sends with each request, from several threads. A handle's descriptor stays open until
the RELEASE that ends it: the kernel sends that only after every other request of the handle ended.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from lockfs.keeper.gate import Gate

FOPEN_DIRECT_IO = 1 << 0
FOPEN_KEEP_CACHE = 1 << 1
FOPEN_NOFLUSH = 1 << 5
FOPEN_PARALLEL_DIRECT_WRITES = 1 << 6
FOPEN_PASSTHROUGH = 1 << 7


@dataclass
class Handle:
    """One open of a regular file.

    `descriptor` was opened with the caller's own flags (O_DIRECT, O_SYNC, O_DSYNC, O_APPEND), so that data
    served through it has the semantics that were asked for. `open_flags` (FOPEN_*) and `backing_id` (0: none)
    are what the kernel is told in the open's reply. `gate` stands before every change of data that comes
    through lockfs; None where the handle cannot change data. `peeks`: whether its file system can read what
    is in memory and nothing else, as far as is known. `dead`: it was revoked, the kernel fails every read and
    write through it.
    """

    nodeid: int
    descriptor: int
    flags: int
    open_flags: int
    backing_id: int
    gate: Gate | None
    number: int = 0
    peeks: bool = True
    dead: bool = False

    @property
    def writable(self) -> bool:
        """Whether the open asked for write access."""
        return self.flags & os.O_ACCMODE != os.O_RDONLY


TURN_NUMBERS = 1 << 40


class HandleTable:
    """Handles by number. Adding, finding and removing are single dictionary operations, hence atomic.

    `changed` is called when a handle that is in the table became dead.
    """

    def __init__(self, turn: int = 0) -> None:
        """`turn`: how many workers of the mount there were, each with numbers of its own."""
        self._handles: dict[int, Handle] = {}
        self._numbers = itertools.count(turn * TURN_NUMBERS + 1)
        self.changed: Callable[[Handle], None] = lambda handle: None

    def add(self, handle: Handle) -> int:
        """Number the handle and make it known; returns the number (never 0, never reused)."""
        handle.number = next(self._numbers)
        self._handles[handle.number] = handle
        return handle.number

    def recall(self, handle: Handle) -> None:
        """Make a handle known that a former worker numbered."""
        self._handles[handle.number] = handle

    def find(self, number: int) -> Handle | None:
        """The handle, or None if there is none (any more)."""
        return self._handles.get(number)

    def remove(self, number: int) -> Handle | None:
        """Forget the handle and return it; closing its descriptor is the caller's business."""
        return self._handles.pop(number, None)

    def __len__(self) -> int:
        return len(self._handles)

    def all(self) -> list[Handle]:
        """A copy of all handles, for reports."""
        return list(self._handles.values())


class Kernel(Protocol):
    """What the mirror asks of the kernel through the channel; worker threads may call it."""

    @property
    def passthrough(self) -> bool:
        """Whether backing files can be registered (negotiated, and permitted to this process)."""

    def register_backing(self, descriptor: int) -> int:
        """FUSE_DEV_IOC_BACKING_OPEN: let the kernel serve data from this file; returns the backing id.

        The calling thread's credentials are those the kernel will open the file with.
        """

    def unregister_backing(self, backing_id: int) -> None:
        """FUSE_DEV_IOC_BACKING_CLOSE: forget the id; files open through it go on."""

    def invalidate(self, nodeid: int) -> None:
        """Drop the kernel's cached pages and attributes of an inode; may block for as long as its I/O."""

    def knows(self, nodeid: int) -> bool:
        """Whether the kernel knows an inode of that number; drops its attributes. Instant."""
