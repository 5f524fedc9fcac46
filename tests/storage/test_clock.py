"""The clock of production."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from lockfs.paxos.seams import Clock
from lockfs.storage import clock as clocks
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


# --- the hardware's clock


def rtc(where: Path, text: str, name: str = "rtc0") -> Path:
    """A clock as sysfs shows it."""
    file = where / name / "since_epoch"
    file.parent.mkdir()
    file.write_text(text)
    return file


@pytest.fixture
def boot(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The boot clock, set by the test."""
    now = [100.0]
    monkeypatch.setattr(clocks, "boot_time", lambda: now[0])
    return now


def test_hardware_clock_is_read_again_after_a_while(tmp_path: Path, boot: list[float]) -> None:
    """Writes ask for it all the time."""
    file = rtc(tmp_path, "5000\n")
    clock = clocks.hardware_clock(tmp_path)
    assert clock is not None and clock.now() == 5000.0
    file.write_text("5007\n")
    assert clock.now() == 5000.0
    boot[0] += max(clocks.RTC_COUNTS_S, clocks.RTC_SHARE * clock.takes)
    assert clock.now() == 5007.0


@pytest.mark.parametrize("text", ["", "nonsense\n"])
def test_hardware_clock_that_cannot_be_read_any_more(tmp_path: Path, boot: list[float], text: str) -> None:
    """It goes as the boot clock does: nobody takes that for a standstill."""
    file = rtc(tmp_path, "5000\n")
    clock = clocks.hardware_clock(tmp_path)
    assert clock is not None
    file.write_text(text)
    boot[0] += 30.0
    assert clock.now() == 5030.0
    file.write_text("5031\n")
    assert clock.now() == 5031.0


def test_only_a_hardware_clock_that_is_set_counts(tmp_path: Path) -> None:
    """The first that can be read; none is no error."""
    assert clocks.hardware_clock(tmp_path) is None
    rtc(tmp_path, "", "rtc0")
    assert clocks.hardware_clock(tmp_path) is None
    rtc(tmp_path, "7\n", "rtc1")
    clock = clocks.hardware_clock(tmp_path)
    assert clock is not None and clock.now() == 7.0


@pytest.mark.parametrize("takes", [0.0001, 0.004, 0.02])
def test_a_slow_hardware_clock(
    tmp_path: Path, boot: list[float], monkeypatch: pytest.MonkeyPatch, takes: float
) -> None:
    """It is read less often; one that is too slow is not used, for writes would wait for it."""
    file = rtc(tmp_path, "5000\n")
    times = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(times) * takes)
    clock = clocks.hardware_clock(tmp_path)
    if takes > clocks.RTC_READ_MAX_S:
        assert clock is None
        return
    assert clock is not None
    counts_s = max(clocks.RTC_COUNTS_S, takes * clocks.RTC_SHARE)
    assert clock.late == pytest.approx(1.0 + counts_s)
    file.write_text("5007\n")
    boot[0] += counts_s * 0.9
    assert clock.now() == 5000.0
    boot[0] += counts_s * 0.2
    assert clock.now() == 5007.0


def test_no_descriptor_is_left(tmp_path: Path) -> None:
    """Neither of a clock that is used no more, nor of one that cannot be."""
    before = len(os.listdir("/proc/self/fd"))
    rtc(tmp_path, "", "rtc0")
    rtc(tmp_path, "7\n", "rtc1")
    clock = clocks.hardware_clock(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del clock
    assert len(os.listdir("/proc/self/fd")) == before


def test_real_time_clocks_do_not_go_back() -> None:
    """Whatever this machine has."""
    for clock in clocks.real_time_clocks():
        assert clock.now() - time.time() < 86400
        assert clock.now() <= clock.now() + clock.late
