"""Threads for calls that may not come back in time, or not at all."""

from __future__ import annotations

import contextlib
import logging
import os
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


class _Bell:
    """By which a thread wakes the one task that waits for it.

    Straight, not by way of trio's queue of calls, which goes three rounds of the loop and takes a tenth of a
    millisecond more. Either the thread rings, once, or the task lets go before: `list.pop` lets one be first.
    """

    def __init__(self) -> None:
        """Raises OSError: no descriptors are left."""
        self._fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._first: list[None] = [None]

    def ring(self) -> bool:
        """In the thread, when its work has ended: whether the task still waits, and is woken."""
        if not self._is_first():
            return False
        os.eventfd_write(self._fd, 1)
        return True

    async def rung(self) -> None:
        """Wait for that. No checkpoint follows it."""
        await trio.lowlevel.wait_readable(self._fd)

    def let_go(self) -> bool:
        """Wait no more, in the end, once; whether it was rung, which may be just now."""
        has_rung = not self._is_first()
        if has_rung:
            os.eventfd_read(self._fd)  # the thread does not use it any more after that
        os.close(self._fd)
        return has_rung

    def _is_first(self) -> bool:
        try:
            self._first.pop()
        except IndexError:
            return False
        return True


@dataclass(eq=False)
class _Job:
    work: Callable[[], Any]
    ended: Callable[[], None] = lambda: None
    goes_on: Callable[[], float | None] = lambda: None
    given_up: Callable[[], None] = lambda: None
    bell: _Bell | None = None
    has_place: bool = False
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
            NotInTime, WorkersStopped. OSError: also if no descriptor was left to wait with.
        """
        job = _Job(work, ended, goes_on, given_up)
        try:
            return await self._run(job, timeout)  # type: ignore[no-any-return]
        finally:
            if job.bell is None:
                ended()

    async def _run(self, job: _Job, timeout: float) -> Any:
        bell = _Bell()
        try:
            with trio.move_on_after(max(timeout, 0.0)) as scope:
                await trio.lowlevel.checkpoint_if_cancelled()
                await self._take_place(job)
                if trio.current_time() < scope.deadline and not self._stopped:
                    job.bell = bell
                    self._jobs.put(job)
                    await self._ended(job)
                else:
                    self._places.release_on_behalf_of(job)
                    if self._stopped:
                        raise WorkersStopped
                    await trio.lowlevel.checkpoint()
            while scope.cancelled_caught and job.bell is not None and (until := job.goes_on()) is not None:
                with trio.CancelScope(deadline=until) as scope:
                    await self._ended(job)
        finally:
            self._wait_no_more(job, bell)
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
        if self._stopped or self._places.borrowed_tokens:
            self.stop_soon(last)
            return
        try:
            bell = _Bell()
        except OSError:  # no descriptor is left to wait with
            self.stop_soon(last)
            return
        job = self._stop(last, bell)
        try:
            with trio.move_on_after(timeout):
                await self._ended(job)
        finally:
            self._wait_no_more(job, bell)

    def stop_soon(self, last: Callable[[], None]) -> None:
        """As `stop`, without waiting."""
        if not self._stopped:
            self._stop(last, None)

    def _stop(self, last: Callable[[], None], bell: _Bell | None) -> _Job:
        self._stopped = True
        job = _Job(last, bell=bell)
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
        """Wait for a queued job."""
        if job.bell is not None:
            await job.bell.rung()

    def _wait_no_more(self, job: _Job, bell: _Bell) -> None:
        """The wait is over, one way or the other. No checkpoint since: cancelled means abandoned."""
        if bell.let_go():
            self._end(job)
        elif job.bell is bell:
            job.abandoned = True
            self._stuck += 1
            job.given_up()

    def _end(self, job: _Job) -> None:
        job.over = True
        if job.has_place:
            self._places.release_on_behalf_of(job)
        job.ended()
        if job.abandoned:
            self._stuck -= 1
        elif job.bell is not None:
            return  # whoever waits sees the error
        if job.error is not None and not isinstance(job.error, OSError | LockfsError):
            _log.error("A call that nobody waited for any more failed.", exc_info=job.error)

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job.result = job.work()
            except BaseException as error:  # noqa: BLE001  (handed to `run`, which raises it)
                job.error = error
            if job.bell is None or not job.bell.ring():
                with contextlib.suppress(trio.RunFinishedError):
                    self._token.run_sync_soon(self._end, job)
            del job  # an idle thread keeps nothing
