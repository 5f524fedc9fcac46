"""The gate in front of a handle's data changes.

Data threads call `enter` before and `leave` after each change of an image through a handle in guarded or
daemon mode. The keeper opens and closes gates on the trio thread. Invariant: once `set` closed the gate and
`inside` was then seen at zero, no change that entered before is still under way and none will start.
"""

from __future__ import annotations

import enum
import threading

from lockfs.errors import LockfsError


class GateState(enum.Enum):
    """OPEN lets changes pass, ASK sends them to the keeper first, SHUT refuses them."""

    OPEN = "open"
    ASK = "ask"
    SHUT = "shut"


class Gate:
    """Lets data changes through while their lease is good; shared by threads, owned by the keeper."""

    __slots__ = ("_inside", "_lock", "refusal", "state")

    def __init__(self, state: GateState, refusal: LockfsError | None = None) -> None:
        self.state = state
        self.refusal = refusal
        self._inside = 0
        self._lock = threading.Lock()

    def enter(self) -> GateState:
        """Try to pass. Only OPEN means inside, and then `leave` must follow.

        The count is raised before the state is read, under one lock, so a closer that found the gate
        empty after closing it cannot have missed anybody.
        """
        with self._lock:
            if self.state is GateState.OPEN:
                self._inside += 1
            return self.state

    def leave(self) -> None:
        """Say that the change that entered has reached the backing file, or failed."""
        with self._lock:
            self._inside -= 1

    def set(self, state: GateState, refusal: LockfsError | None = None) -> None:
        """Open or close the gate for everything that enters from now on."""
        with self._lock:
            self.state = state
            self.refusal = refusal

    @property
    def inside(self) -> int:
        """How many changes are under way."""
        with self._lock:
            return self._inside
