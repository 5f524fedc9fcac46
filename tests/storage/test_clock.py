"""The clock of production."""

from __future__ import annotations

import time

import pytest
import trio
from trio.testing import MockClock

from lockfs.paxos.seams import Clock
from lockfs.storage.clock import BootClock


def test_now_is_the_boot_clock() -> None:
    clock: Clock = BootClock()
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    now = clock.now()
    assert before <= now <= clock.now() <= time.clock_gettime(time.CLOCK_BOOTTIME)


@pytest.mark.parametrize(("asked", "passes"), [(3.5, 3.5), (0.0, 0.0), (-2.0, 0.0)])
async def test_sleep(autojump_clock: MockClock, asked: float, passes: float) -> None:
    start = trio.current_time()
    await BootClock().sleep(asked)
    assert trio.current_time() == start + passes


@pytest.mark.parametrize("seconds", [5.0, 0.0, -1.0])
async def test_sleep_can_be_cancelled(seconds: float) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await BootClock().sleep(seconds)
    assert scope.cancelled_caught
