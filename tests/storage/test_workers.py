"""Threads of one's own: what is begun, what is waited for, and that none keeps the process from ending."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from lockfs.storage.workers import NotInTime, Workers, WorkersStopped, _Bell

from .conftest import all_threads_ended
from .fakes import WAIT_S, Held

TIMEOUT_S = 10.0
NAME = "disk of a test"  # so that all_threads_ended knows them


def nothing() -> None:
    """Work that is done at once."""


async def test_a_place_that_comes_with_the_deadline_begins_nothing(mock_clock: MockClock) -> None:
    workers = Workers(NAME, 1)
    earlier = object()  # a call whose thread comes back in the very step in which the time is up
    workers._places.acquire_on_behalf_of_nowait(earlier)
    begun: list[None] = []

    async def attempt() -> None:
        with pytest.raises(NotInTime) as caught:
            await workers.run(lambda: begun.append(None), TIMEOUT_S)
        assert not caught.value.begun

    async with trio.open_nursery() as nursery:
        nursery.start_soon(attempt)
        await wait_all_tasks_blocked()
        mock_clock.jump(TIMEOUT_S)
        workers._places.release_on_behalf_of(earlier)
    await workers.run(nothing, TIMEOUT_S)
    assert not begun
    await workers.stop(nothing, TIMEOUT_S)


async def test_the_threads_are_no_others() -> None:
    workers, others = Workers(NAME, 2), Workers(NAME, 1)
    mine = {await workers.run(threading.get_ident, TIMEOUT_S) for _ in range(50)}
    assert mine.isdisjoint({await others.run(threading.get_ident, TIMEOUT_S) for _ in range(50)})
    assert threading.get_ident() not in mine
    await workers.stop(nothing, TIMEOUT_S)
    await others.stop(nothing, TIMEOUT_S)


async def test_stopping_waits_for_the_last_work(mock_clock: MockClock) -> None:
    workers, last = Workers(NAME, 1), Held()
    ended: list[None] = []

    async def stop() -> None:
        await workers.stop(last.pause, TIMEOUT_S)
        ended.append(None)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop)
        await last.entered()
        await wait_all_tasks_blocked()
        assert not ended
        last.let_go()
    assert trio.current_time() == 0
    with pytest.raises(WorkersStopped):
        await workers.run(nothing, TIMEOUT_S)


async def test_stopping_has_a_deadline(mock_clock: MockClock) -> None:
    workers, last = Workers(NAME, 1), Held()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(workers.stop, last.pause, TIMEOUT_S)
        await last.entered()
        mock_clock.jump(TIMEOUT_S)
    assert workers.stuck == 1
    last.let_go()
    await last.thread_ended()


def test_a_stuck_thread_keeps_no_process_from_ending() -> None:
    program = """
import threading, trio
from lockfs.storage.workers import Workers
entered = threading.Event()
async def main():
    workers = Workers("stuck", 2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(workers.run, lambda: entered.set() or threading.Event().wait(), 1000)
        await trio.to_thread.run_sync(entered.wait)
        nursery.cancel_scope.cancel()
    print(workers.stuck)
trio.run(main)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


# --- bells


async def test_whoever_is_first_decides() -> None:
    """A bell that was rung is heard however late; one that was let go of is not rung any more."""
    bell = _Bell()
    assert bell.ring()
    await bell.rung()
    assert bell.let_go()
    bell = _Bell()
    assert not bell.let_go()
    assert not bell.ring()


async def test_a_thread_that_rings_just_now_is_waited_for() -> None:
    """The task lets go between the thread's claim and its ringing: the descriptor is closed after both."""
    bell = _Bell()
    assert bell._is_first()  # the thread's claim
    ringing = threading.Thread(target=lambda: os.eventfd_write(bell._fd, 1))
    ringing.start()
    assert bell.let_go()
    ringing.join()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(bell._fd)


async def test_an_end_that_meets_a_cancellation_is_counted_once() -> None:
    """The work has ended when its caller is cancelled: nothing is stuck, and its place is free."""
    workers, begun, go = Workers(NAME, 1), threading.Event(), threading.Event()
    ends: list[None] = []

    def work() -> None:
        begun.set()
        go.wait(WAIT_S)

    for _ in range(20):
        begun.clear()
        go.clear()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(workers.run, work, TIMEOUT_S, lambda: ends.append(None))
                await trio.to_thread.run_sync(begun.wait, WAIT_S)
                go.set()
                scope.cancel()
        await workers.run(nothing, TIMEOUT_S)
        assert workers.stuck == 0
    assert len(ends) == 20
    await workers.stop(nothing, TIMEOUT_S)
    await all_threads_ended()
