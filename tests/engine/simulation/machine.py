"""A host: its clock, its tasks, and its pauses."""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine
from typing import Any

from lockfs.paxos.seams import Clock
from tests.engine.simulation.faults import DRIFT
from tests.engine.simulation.scheduler import Scheduler, Task, Wait


class DriftingClock(Clock):
    """A host's CLOCK_BOOTTIME: starts anywhere, counts every pause, runs a little fast or slow."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._then = scheduler.now
        self._base = scheduler.random.uniform(100.0, 100_000.0)
        self._rate = 1.0
        self._stopped = 0.0
        self.drift()

    def now(self) -> float:
        return self._base + (self._scheduler.now - self._then) * self._rate

    def drift(self) -> None:
        """Run at another rate from now on."""
        self._base, self._then = self.now(), self._scheduler.now
        self._rate = self._scheduler.random.uniform(1.0 - DRIFT, 1.0 + DRIFT)

    def stop(self) -> None:
        """Stand still from now on."""
        self._base, self._then = self.now(), self._scheduler.now
        self._stopped, self._rate = self._rate, 0.0

    def go(self) -> None:
        """Run on from where it stopped."""
        if self._stopped:
            self._then, self._rate, self._stopped = self._scheduler.now, self._stopped, 0.0

    async def sleep(self, seconds: float) -> None:
        wait = Wait(self._scheduler.now + max(seconds, 0.0) / self._rate)
        self._scheduler.at(wait.due or 0.0, wait.finish)
        await wait


UNAWARE_IO_TIMEOUTS = 10.5
"""How long, in io_timeouts, a host that stood still with its clock may go on as if nothing had been: the 8
after which it writes no more without a pass, one until a look at a lease begins, and one for it to fail; and
what clocks drift."""


class Machine:
    """One host. While it pauses, nothing that ends reaches its tasks."""

    def __init__(self, scheduler: Scheduler, number: int, io_timeout: int) -> None:
        self.scheduler = scheduler
        self.number = number
        self.io_timeout = io_timeout
        self.longest_pause = 0.0
        self.clock = DriftingClock(scheduler)
        self.tasks: list[Task] = []
        self._running: Task | None = None
        self.paused_until = 0.0
        self.frozen = False
        self.halted = False
        self.thawed_at = -math.inf
        self.after_step: Callable[[Machine, str], None] = lambda machine, label: None
        self._suspended = False
        self._paused_at = 0.0
        self._backlog: list[tuple[Task, Wait, object, BaseException | None]] = []

    @property
    def paused(self) -> bool:
        return self.scheduler.now < self.paused_until

    @property
    def running(self) -> Task:
        """The task that is being resumed."""
        if self._running is None:
            raise RuntimeError("no task is running")
        return self._running

    def start(self, coroutine: Coroutine[Wait, Any, None], label: str) -> Task:
        """Begin a task of this host's program."""
        task = Task(self, coroutine, f"host {self.number} {label}")
        self.tasks = [other for other in self.tasks if not other.over]
        self.tasks.append(task)
        self.scheduler.after(0.0, self._first, task)
        return task

    def _first(self, task: Task) -> None:
        if self.paused:
            self.scheduler.at(self.paused_until, self._first, task)
        elif not task.over:
            self._step(task, None, None)

    def deliver(self, task: Task, wait: Wait, value: object, error: BaseException | None) -> None:
        """Have a task see the end of its wait: now, or after the pause."""
        if self.paused:
            self._backlog.append((task, wait, value, error))
        else:
            self.scheduler.after(0.0, self._resume, task, wait, value, error)

    def _resume(self, task: Task, wait: Wait, value: object, error: BaseException | None) -> None:
        if self.paused:
            self._backlog.append((task, wait, value, error))
        elif task.waits_for is wait and not task.over:
            self._step(task, value, error)

    def _step(self, task: Task, value: object, error: BaseException | None) -> None:
        self.scheduler.steps += 1
        self._running = task
        task.resume(value, error)
        self.after_step(self, task.label)

    # Faults

    def pause(self, seconds: float, *, suspended: bool, frozen: bool) -> None:
        """Stand still. A suspended host's sleeps do not count the time; a frozen one's I/O waits as well."""
        self.paused_until = self.scheduler.now + seconds
        self._paused_at = self.scheduler.now
        self._suspended, self.frozen = suspended, frozen
        self.scheduler.at(self.paused_until, self._go_on)

    def halt(self, seconds: float) -> None:
        """Stand still together with the clock."""
        self.pause(seconds, suspended=True, frozen=False)
        self.halted = True
        self.clock.stop()

    @property
    def unaware(self) -> bool:
        """Whether it stands still, or has so lately that it need not know yet."""
        known_by = self.thawed_at + UNAWARE_IO_TIMEOUTS * self.io_timeout
        return self.halted or self.scheduler.now <= known_by

    def _thaw(self) -> None:
        if self.halted:
            self.halted, self.thawed_at = False, self.scheduler.now
            self.clock.go()

    def freeze(self) -> None:
        """Stand still right now, with all I/O, and long enough that others may take over."""
        self.scheduler.note(f"host {self.number} freezes")
        self.pause(self.scheduler.random.uniform(0.2, 1.6) * self.longest_pause, suspended=False, frozen=True)

    def _go_on(self) -> None:
        if self.paused:
            return
        self.frozen = False
        self._thaw()
        self.scheduler.note(f"host {self.number} goes on")
        backlog, self._backlog = self._backlog, []
        for task, wait, value, error in backlog:
            left = max(0.0, wait.due - self._paused_at) if wait.due is not None and self._suspended else 0.0
            self.scheduler.after(left, self._resume, task, wait, value, error)

    def kill(self) -> None:
        """The program dies at once."""
        self.paused_until, self.frozen = self.scheduler.now, False
        self._thaw()
        tasks, self.tasks, self._backlog = self.tasks, [], []
        for task in tasks:
            task.kill()
