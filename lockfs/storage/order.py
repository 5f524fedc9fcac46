"""In which order the writes of one disk land."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, field

import trio


@dataclass(eq=False)
class Span:
    """The bytes of one I/O, from its entry until it has ended, or is certain not to begin."""

    start: int
    end: int
    writes: bool
    ended: trio.Event = field(default_factory=trio.Event)
    awaited: bool = False

    def overlaps(self, other: Span) -> bool:
        """Whether both touch one byte."""
        return self.start < other.end and other.start < self.end


class Order:
    """The writes that are under way, late ones too: what overlaps one of them waits until it has ended.

    So late ones do not land last, and what was read does not become untrue by one. Made within `trio.run`;
    the methods may be called in any thread. The lock is held for a few steps in memory, never across an I/O.
    """

    def __init__(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._lock = threading.Lock()
        self._writing: list[Span] = []

    def enter(self, mine: Span) -> Span | None:
        """Count `mine` as under way, unless a write that overlaps it is: then that is returned, and sets its
        `ended`, on the trio thread, when it has ended.
        """
        with self._lock:
            earlier = self._earlier(mine)
            if earlier is not None:
                earlier.awaited = True
            elif mine.writes:
                self._writing.append(mine)
            return earlier

    def _earlier(self, mine: Span) -> Span | None:
        return next((writing for writing in self._writing if writing.overlaps(mine)), None)

    def leave(self, mine: Span) -> None:
        """It has ended; once more does no harm."""
        with self._lock:
            if mine in self._writing:
                self._writing.remove(mine)
        if mine.awaited:
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(mine.ended.set)
