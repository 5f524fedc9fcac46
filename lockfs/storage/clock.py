"""The host's own time in production; see `Clock` and `WallClock` in paxos/seams.py."""

from __future__ import annotations

import time

import trio

from lockfs.paxos.seams import Clock, WallClock


class BootClock(Clock):
    """CLOCK_BOOTTIME, which counts the time a machine was suspended (clock_gettime(2)), and trio's sleep.

    A sleep does not count it: after a suspension the rest of the sleep still passes. Whoever sleeps until a
    moment must therefore look at `now` afterwards, and may find it long past.
    """

    def now(self) -> float:
        """Seconds since the machine started, suspensions included."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    async def sleep(self, seconds: float) -> None:
        """Let `seconds` pass, none if negative; always a cancellation point."""
        await trio.sleep(max(seconds, 0.0))


class RealTimeClock(WallClock):
    """CLOCK_REALTIME."""

    def now(self) -> float:
        """Seconds since the epoch, as the machine has been told."""
        return time.clock_gettime(time.CLOCK_REALTIME)
