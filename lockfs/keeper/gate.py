"""The gate in front of a handle's data changes.

Data threads call `enter` before and `leave` after each change of an image through a handle in guarded or
daemon mode. The keeper opens and closes gates on the trio thread. Invariant: once `set` closed the gate and
`inside` was then seen at zero, no change that entered before is still under way and none will start.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable

from lockfs.errors import LockfsError

InTime = Callable[[], bool]


class GateState(enum.Enum):
    """OPEN lets changes pass, ASK sends them to the keeper first, SHUT refuses them."""

    OPEN = "open"
    ASK = "ask"
    SHUT = "shut"


class Gate:
    """Lets data changes through while their lease is good; shared by threads, owned by the keeper."""

    __slots__ = ("_in_time", "_inside", "_lock", "refusal", "state")

    def __init__(self, state: GateState, refusal: LockfsError | None = None) -> None:
        self.state = state
        self.refusal = refusal
        self._in_time: InTime | None = None
        self._inside = 0
        self._lock = threading.Lock()

    def enter(self) -> GateState:
        """Try to pass. Only OPEN means inside, and then `leave` must follow.

        The count is raised before the state is read, under one lock, so a closer that found the gate
        empty after closing it cannot have missed anybody.
        """
        with self._lock:
            if self.state is not GateState.OPEN:
                return self.state
            if self._in_time is not None and not self._in_time():
                return GateState.ASK
            self._inside += 1
            return GateState.OPEN

    def leave(self) -> None:
        """Say that the change that entered has reached the backing file, or failed."""
        with self._lock:
            self._inside -= 1

    def set(
        self, state: GateState, refusal: LockfsError | None = None, in_time: InTime | None = None
    ) -> None:
        """Open or close the gate for everything that enters from now on.

        An open gate lets pass only while `in_time` says so: the lease's time may be over before anybody came
        to close the gate.
        """
        with self._lock:
            self.state = state
            self.refusal = refusal
            self._in_time = in_time

    @property
    def passable(self) -> bool:
        """Whether a change could enter now."""
        with self._lock:
            return self.state is GateState.OPEN and (self._in_time is None or self._in_time())

    @property
    def inside(self) -> int:
        """How many changes are under way."""
        with self._lock:
            return self._inside
