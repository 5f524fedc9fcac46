"""True time, and the coroutines that run in it: one thread, one heap of moments, everything from one seed."""

from __future__ import annotations

import hashlib
import heapq
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from random import Random
from typing import Any

KEPT_EVENTS = 120


class Cancelled(BaseException):
    """A task was cancelled at an await."""


class Wait:
    """Something one task awaits; `finish` ends it. `due` is when a sleep ends, None for anything else."""

    __slots__ = ("due", "ended", "task")

    def __init__(self, due: float | None = None) -> None:
        self.task: Task | None = None
        self.ended = False
        self.due = due

    def __await__(self) -> Generator[Wait, Any, Any]:
        return (yield self)

    def finish(self, value: object = None, error: BaseException | None = None) -> None:
        """Let the task go on with a value, or with an error; once only."""
        if not self.ended:
            self.ended = True
            if self.task is not None:
                self.task.wake(self, value, error)


class Task:
    """A coroutine on a machine. It runs only when the scheduler resumes it, from one await to the next."""

    __slots__ = ("coroutine", "label", "machine", "over", "waits_for")

    def __init__(self, machine: Any, coroutine: Coroutine[Wait, Any, None], label: str) -> None:
        self.machine = machine
        self.coroutine = coroutine
        self.label = label
        self.waits_for: Wait | None = None
        self.over = False

    def wake(self, wait: Wait, value: object, error: BaseException | None) -> None:
        """The wait ended; the machine decides when the task sees it."""
        self.machine.deliver(self, wait, value, error)

    def cancel(self) -> None:
        """End what the task waits for with Cancelled."""
        if self.waits_for is not None and not self.over:
            self.waits_for.finish(error=Cancelled())

    def kill(self) -> None:
        """The program is gone: the coroutine never runs again."""
        self.over = True
        self.waits_for = None
        self.coroutine.close()

    def resume(self, value: object = None, error: BaseException | None = None) -> None:
        """One step: to the next await."""
        try:
            wait = self.coroutine.send(value) if error is None else self.coroutine.throw(error)
        except StopIteration:
            self.over = True
            return
        wait.task = self
        self.waits_for = wait


class Scheduler:
    """The moments to come. `trace` hashes all events; the last of them are kept for people."""

    def __init__(self, seed: int, show: Callable[[str], None] | None = None) -> None:
        self.random = Random(seed)
        self.now = 0.0
        self.steps = 0
        self.events: deque[str] = deque(maxlen=KEPT_EVENTS)
        self._show = show
        self._trace = hashlib.blake2b(digest_size=16)
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = 0

    def at(self, when: float, call: Callable[..., None], *arguments: Any) -> None:
        """Have `call` made at a moment, at once if that is past; calls of one moment are made in order."""
        self._number += 1
        heapq.heappush(self._heap, (max(when, self.now), self._number, call, arguments))

    def after(self, delay: float, call: Callable[..., None], *arguments: Any) -> None:
        """Have `call` made in `delay` seconds."""
        self.at(self.now + delay, call, *arguments)

    def note(self, event: str) -> None:
        """Record what happened."""
        line = f"{self.now:10.4f} {event}"
        self._trace.update(line.encode())
        self.events.append(line)
        if self._show is not None:
            self._show(line)

    def explain(self, what: Callable[[], str]) -> None:
        """For people only: more about the event just recorded, made if somebody looks."""
        if self._show is not None:
            self._show(f"{'':11}{what()}")

    @property
    def trace(self) -> str:
        """The hash of all events so far."""
        return self._trace.hexdigest()

    def run(self, until: Callable[[], bool]) -> bool:
        """Go on until the condition holds; False if nothing is left to happen."""
        heap = self._heap
        while not until():
            if not heap:
                return False
            self.now, _, call, arguments = heapq.heappop(heap)
            call(*arguments)
        return True
