"""The host's own time in production; see `Clock` and `WallClock` in paxos/seams.py."""

from __future__ import annotations

import os
import time
from pathlib import Path

import trio

from lockfs.paxos.seams import Clock, WallClock

RTC_COUNTS_S = 0.001
"""For how long a reading of the hardware's clock counts at least: writes ask for it all the time."""
RTC_SHARE = 20
"""Reading takes at most this part of the time: it is 0.1 ms on a machine, and milliseconds in slow guests."""
RTC_READ_MAX_S = 0.01
"""A hardware clock that takes longer to read would hold up writes."""
_RTC_READINGS = 3
_RTC_BYTES_MAX = 32
_RTCS = Path("/sys/class/rtc")


class BootClock(Clock):
    """CLOCK_BOOTTIME, which counts the time a machine was suspended (clock_gettime(2)), and trio's sleep.

    A sleep does not count it: after a suspension the rest of the sleep still passes. Whoever sleeps until a
    moment must therefore look at `now` afterwards, and may find it long past.
    """

    def now(self) -> float:
        """Seconds since the machine started, suspensions included."""
        return boot_time()

    async def sleep(self, seconds: float) -> None:
        """Let `seconds` pass, none if negative; always a cancellation point."""
        await trio.sleep(max(seconds, 0.0))


def boot_time() -> float:
    """CLOCK_BOOTTIME."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class RealTimeClock(WallClock):
    """CLOCK_REALTIME."""

    late = 0.0

    def now(self) -> float:
        """Seconds since the epoch, as the machine has been told."""
        return time.clock_gettime(time.CLOCK_REALTIME)


class HardwareClock(WallClock):
    """The clock that a battery keeps going, and a hypervisor while it has stopped a guest (rtc(4)).

    By /sys/class/rtc/rtc*/since_epoch (Documentation/ABI/testing/sysfs-class-rtc), which unlike /dev/rtc*
    any number of programs may have open. Its descriptor stays open for as long as the object is there.
    """

    def __init__(self, descriptor: int) -> None:
        """`descriptor` is of a since_epoch file, and the object's from now on. `takes`: how long it takes to
        read at best, seconds. Raises OSError, ValueError.
        """
        self._descriptor = descriptor
        self.takes = min(self._reading_takes() for _ in range(_RTC_READINGS))
        self._counts_s = max(RTC_COUNTS_S, RTC_SHARE * self.takes)
        self.late = 1.0 + self._counts_s
        self._read = (boot_time(), self._seconds())

    def __del__(self) -> None:
        os.close(self._descriptor)

    def now(self) -> float:
        """Seconds since the epoch. One that cannot be read any more goes as the boot clock does: no leap."""
        now = boot_time()
        then, seconds = self._read
        if now - then < self._counts_s:
            return seconds
        try:
            seconds = self._seconds()
        except (OSError, ValueError):
            return seconds + now - then
        self._read = (now, seconds)
        return seconds

    def _seconds(self) -> float:
        return float(int(os.pread(self._descriptor, _RTC_BYTES_MAX, 0)))

    def _reading_takes(self) -> float:
        began = time.perf_counter()
        self._seconds()
        return time.perf_counter() - began


def hardware_clock(where: Path = _RTCS) -> HardwareClock | None:
    """The machine's first clock that can be read, and quickly; None if there is none."""
    for file in sorted(where.glob("rtc*/since_epoch")):
        try:
            clock = HardwareClock(os.open(file, os.O_RDONLY | os.O_CLOEXEC))
            if clock.takes <= RTC_READ_MAX_S:
                return clock
        except (OSError, ValueError):  # it has none, or was never set
            continue
    return None


def real_time_clocks() -> list[WallClock]:
    """Whatever this machine has that shows how much time went by while it stood still."""
    hardware = hardware_clock()
    return [RealTimeClock(), *([hardware] if hardware is not None else [])]
