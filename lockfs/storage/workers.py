"""Threads for calls that may not come back in time, or not at all."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

import trio

from lockfs.errors import LockfsError

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class NotInTime(Exception):
    """A call's time was up. `begun`: it is under way and may end at any later moment; else it never runs."""

    def __init__(self, begun: bool) -> None:
        super().__init__("under way" if begun else "not begun")
        self.begun = begun


class WorkersStopped(Exception):
    """The call was not begun because the workers are stopped."""


@dataclass(eq=False)
class _Job:
    work: Callable[[], Any]
    ended: Callable[[], None] = lambda: None
    goes_on: Callable[[], float | None] = lambda: None
    given_up: Callable[[], None] = lambda: None
    queued: bool = False
    has_place: bool = False
    waiting: trio.lowlevel.Task | None = None
    abandoned: bool = False
    over: bool = False
    result: Any = None
    error: BaseException | None = None


class Workers:
    """A fixed number of threads, started at once and used by nobody else.

    There are as many places as threads, and a call holds its place until its thread is back, so a queued
    call always finds a free thread. The trio thread keeps the books; the threads touch nothing but the job in
    their hands and hold no lock meanwhile. They are daemon threads: one that never comes back does not keep
    the process from ending. To be made and used within one `trio.run`.
    """

    def __init__(self, name: str, places: int) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._places = trio.CapacityLimiter(places)
        self._threads = places
        self._stuck = 0
        self._in_line = 0
        self._stopped = False
        for number in range(places):
            threading.Thread(target=self._serve, name=f"{name}-{number}", daemon=True).start()

    @property
    def stuck(self) -> int:
        """How many calls are under way that nobody waits for any more."""
        return self._stuck

    @property
    def crowded(self) -> bool:
        """Whether calls wait for a place. May be asked in any thread."""
        return self._in_line > 0

    @trio.lowlevel.enable_ki_protection  # no interruption between a queued job and the wait for it
    async def run(
        self,
        work: Callable[[], _T],
        timeout: float,
        ended: Callable[[], None] = lambda: None,
        *,
        goes_on: Callable[[], float | None] = lambda: None,
        given_up: Callable[[], None] = lambda: None,
    ) -> _T:
        """What `work` returns or raises, called in a thread.

        It has `timeout` seconds, the wait for a place included; with none left it is not begun. `ended` is
        called once, on the trio thread, when the work has ended however late, or is certain never to begin.
        Work of several parts is asked, on the trio thread, when its time is up, whether it `goes_on`: until
        which moment of trio's clock, or None. `given_up` is called there before a call returns whose work is
        under way still.

        Raises:
            NotInTime, WorkersStopped.
        """
        job = _Job(work, ended, goes_on, given_up)
        try:
            return await self._run(job, timeout)  # type: ignore[no-any-return]
        finally:
            if not job.queued:
                ended()

    async def _run(self, job: _Job, timeout: float) -> Any:
        try:
            with trio.move_on_after(max(timeout, 0.0)) as scope:
                await trio.lowlevel.checkpoint_if_cancelled()
                await self._take_place(job)
                if trio.current_time() < scope.deadline and not self._stopped:
                    job.queued = True
                    self._jobs.put(job)
                    await self._ended(job)
                else:
                    self._places.release_on_behalf_of(job)
                    if self._stopped:
                        raise WorkersStopped
                    await trio.lowlevel.checkpoint()
            while job.queued and not job.over and (deadline := job.goes_on()) is not None:
                with trio.CancelScope(deadline=deadline):
                    await self._ended(job)
        finally:
            if job.queued:
                self._abandon_unless_over(job)
        if not job.over:
            raise NotInTime(begun=job.abandoned)
        if job.error is None:
            return job.result
        try:
            raise job.error
        finally:
            job.error = None  # it refers to this frame

    @trio.lowlevel.enable_ki_protection
    async def stop(self, last: Callable[[], None], timeout: float) -> None:
        """Take no more calls and run `last`; wait for its end, unless other calls are under way.

        The wait has `timeout` seconds. Calls under way go on. Each thread ends when it is back.
        """
        idle = not self._places.borrowed_tokens
        job = self.stop_soon(last)
        if job is not None and idle:
            try:
                with trio.move_on_after(timeout):
                    await self._ended(job)
            finally:
                self._abandon_unless_over(job)

    def stop_soon(self, last: Callable[[], None]) -> _Job | None:
        """As `stop`, without waiting. Returns the job of `last`; None if they were stopped before."""
        if self._stopped:
            return None
        self._stopped = True
        job = _Job(last)
        self._jobs.put(job)
        for _ in range(self._threads):
            self._jobs.put(None)
        return job

    async def _take_place(self, job: _Job) -> None:
        try:
            self._places.acquire_on_behalf_of_nowait(job)
        except trio.WouldBlock:
            self._in_line += 1
            try:
                await self._places.acquire_on_behalf_of(job)
            finally:
                self._in_line -= 1
        job.has_place = True

    async def _ended(self, job: _Job) -> None:
        """Wait for a queued job. No checkpoint follows its end."""

        def wait_no_more(_: object) -> trio.lowlevel.Abort:
            job.waiting = None
            return trio.lowlevel.Abort.SUCCEEDED

        job.waiting = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(wait_no_more)

    def _abandon_unless_over(self, job: _Job) -> None:
        """Wait for a queued job no more. No checkpoint since the wait: cancelled means abandoned."""
        if not job.over:
            job.abandoned = True
            self._stuck += 1
            job.given_up()

    def _end(self, job: _Job) -> None:
        job.over = True
        if job.has_place:
            self._places.release_on_behalf_of(job)
        job.ended()
        if job.waiting is not None:
            trio.lowlevel.reschedule(job.waiting)
            return
        if job.abandoned:
            self._stuck -= 1
        elif job.has_place:
            return  # its caller's wait is just being ended: it will see that the job is over
        if job.error is not None and not isinstance(job.error, OSError | LockfsError):
            _log.error("A call that nobody waited for any more failed.", exc_info=job.error)

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job.result = job.work()
            except BaseException as error:  # noqa: BLE001  (handed to `run`, which raises it)
                job.error = error
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._end, job)
            del job  # an idle thread keeps nothing
