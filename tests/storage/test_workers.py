"""Threads of one's own: what is begun, what is waited for, and that none keeps the process from ending."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from lockfs.storage.workers import NotInTime, Workers, WorkersStopped

from .fakes import Held

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
