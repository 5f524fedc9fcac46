"""A plan of I/Os (paxos/seams.py), carried out in one turn of a worker thread instead of one for each I/O.

Invariants:

* Once nobody waits for a turn any more (`give_up`), no line of its plan runs and no I/O of it begins. What is
  under way then ends by itself; its bytes, its buffer and its place in the order of writes stay as they are
  until it has.
* Each I/O has its own time, from the moment at which the plan asked for it. One that ended too late counts as
  late, whoever looks first, and nothing follows it.
"""

from __future__ import annotations

import errno
import math
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import trio

from lockfs.paxos.seams import DiskError, DiskTimeout, Plan, Step, ToRead
from lockfs.storage.buffers import Buffers
from lockfs.storage.descriptor import SharedDescriptor
from lockfs.storage.order import Order, Span
from lockfs.storage.rawio import RawIO

_T = TypeVar("_T")


@dataclass(frozen=True)
class Means:
    """What the I/Os of a disk are done with. `crowded`: whether other calls wait for a thread."""

    name: str
    writable: bool
    file: SharedDescriptor
    io: RawIO
    buffers: Buffers
    order: Order
    crowded: Callable[[], bool]


class Turn(Generic[_T]):
    """One plan under way. `step` is the one at hand, None once the plan has ended with `result`.

    On the trio thread: `begin` once; then, as long as there is a step, `enter` until it says None, and `run`
    in a worker thread; `give_up` in the end, whatever happened.
    """

    def __init__(self, plan: Plan[_T], means: Means) -> None:
        self.step: Step | None = None
        self.span = Span(0, 0, writes=False)
        self.deadline = 0.0
        self._plan = plan
        self._means = means
        self._clock = trio.lowlevel.current_clock()
        # Held while the plan runs, so that nobody gives it up meanwhile; never across an I/O.
        self._lock = threading.Lock()
        self._given_up = False
        self._result: list[_T] = []

    @property
    def result(self) -> _T:
        """What the plan returned."""
        return self._result[0]

    @property
    def left(self) -> float:
        """Seconds until the step at hand is late."""
        return self.deadline - self._clock.current_time()

    @property
    def what(self) -> str:
        """The step at hand in words."""
        if self.step is None:
            return f"Using {self._means.name}"
        doing = "Reading" if isinstance(self.step, ToRead) else "Writing"
        span = self.span
        return f"{doing} {span.end - span.start} bytes at byte {span.start} of {self._means.name}"

    def late(self, *, begun: bool) -> DiskTimeout:
        """The step at hand was not done in time."""
        within = max(self.step.timeout, 0.0) if self.step is not None else 0.0
        doing = "end" if begun else "begin"
        return DiskTimeout(errno.ETIMEDOUT, f"{self.what} did not {doing} within {within:g} s.")

    # On the trio thread

    def begin(self) -> None:
        """Run the plan to its first step."""
        self._advance(None)

    def enter(self) -> Span | None:
        """Take the place of the step at hand in the order of writes; or the write that must end before."""
        return self._means.order.enter(self.span)

    def leave(self) -> None:
        """The thread is back, or never came."""
        self._means.order.leave(self.span)

    def goes_on(self) -> float | None:
        """When its time is up: until when the step has time that is at hand by now; None if that is late."""
        with self._lock:
            if self.step is None:
                return math.inf  # the plan has ended; its thread is about to say so
            return self.deadline if self.left > 0 else None

    def give_up(self) -> None:
        """Nobody waits any more. Waits for the plan's own code, if that runs just now; it never blocks."""
        with self._lock:
            self._given_up = True
            self._plan.close()

    # In a worker thread

    def run(self) -> None:
        """Do the step at hand, which was entered, and those that follow, until the plan has ended, or one has
        to wait for an earlier write, or for other calls.

        Raises:
            DiskTimeout, DiskError, FileClosed, and what the plan raises.
        """
        with self._means.file.used() as descriptor:
            while self._do(descriptor):
                pass

    def _do(self, descriptor: int) -> bool:
        """Do one step. True: another is entered."""
        step, span, buffers = self.step, self.span, self._means.buffers
        if step is None or self._given_up:
            return False
        buffer = buffers.take(span.end - span.start)
        try:
            with memoryview(buffer)[: span.end - span.start] as view:
                try:
                    self._transfer(descriptor, step, view)
                finally:
                    self._means.order.leave(span)
                return self._go_on(view if isinstance(step, ToRead) else view[:0])
        finally:
            buffers.give_back(buffer)

    def _transfer(self, descriptor: int, step: Step, view: memoryview) -> None:
        try:
            if isinstance(step, ToRead):
                moved = self._means.io.preadv(descriptor, [view], step.offset)
            else:
                view[:] = step.data
                moved = self._means.io.pwritev(descriptor, [view], step.offset)
        except OSError as error:
            raise refusal(error, self.what) from error
        if moved != len(view):
            raise DiskError(errno.EMSGSIZE, f"{self.what} ended after {moved} bytes.")

    def _go_on(self, view: memoryview) -> bool:
        """Run the plan to its next step, if somebody still waits for that; True: it is entered."""
        with self._lock:
            if self._given_up:
                return False
            if self.left <= 0:
                raise self.late(begun=True)
            self._advance(view)
            if self.step is None or self._means.crowded():
                return False
            if self.left <= 0:
                raise self.late(begun=False)
            return self.enter() is None

    # In either; alone with the plan

    def _advance(self, seen: memoryview | None) -> None:
        try:
            step = next(self._plan) if seen is None else self._plan.send(seen)
        except StopIteration as done:
            self.step = None
            self._result.append(done.value)
            return
        is_read = isinstance(step, ToRead)
        length = step.length if isinstance(step, ToRead) else len(step.data)
        self.step = step
        self.span = Span(step.offset, step.offset + length, writes=not is_read)
        self.deadline = self._clock.current_time() + step.timeout
        if not is_read and not self._means.writable:
            raise DiskError(errno.EBADF, f"{self.what} is not possible: it was opened for reading only.")


def refusal(error: OSError, what: str) -> DiskError:
    """The kernel's answer to an I/O as an error of the disk."""
    number = error.errno or errno.EIO
    # A network file system that gave up on its server does not know what the server still does.
    family = DiskTimeout if number == errno.ETIMEDOUT else DiskError
    return family(number, f"{what} failed: {os.strerror(number)}.")
