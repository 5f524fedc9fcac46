"""The watchdog: armed as asked, fed only while the fences hold, disarmed by an orderly end alone."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from lockfs.errors import SetupError
from lockfs.mount.watchdog import (
    WDIOC_GETTIMEOUT,
    WDIOC_SETTIMEOUT,
    Device,
    Kept,
    Wdmd,
    keep_fed,
    open_watchdog,
)
from tests.conftest import ExpectLog

TIMEOUT_S = 60


class FakeDevice:
    """A watchdog device made of a FIFO: `takes` is the time that it can do, None if it is no watchdog."""

    def __init__(self, path: Path, takes: int | None = TIMEOUT_S) -> None:
        os.mkfifo(path)
        self.path = path
        self.takes = takes
        self.asked: list[int] = []
        self._reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def ioctl(self, descriptor: int, request: int, argument: bytes) -> bytes:
        if self.takes is None:
            raise OSError(errno.ENOTTY, "Inappropriate ioctl for device")
        if request == WDIOC_SETTIMEOUT:
            self.asked += struct.unpack("i", argument)
        assert request in (WDIOC_SETTIMEOUT, WDIOC_GETTIMEOUT)
        return struct.pack("i", self.takes)

    def fed(self) -> bytes:
        """What was written since the last look."""
        try:
            return os.read(self._reader, 4096)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        os.close(self._reader)


@pytest.fixture
def device(tmp_path: Path) -> Any:
    """A fake device."""
    made = FakeDevice(tmp_path / "watchdog")
    yield made
    made.close()


async def test_fed_while_the_fences_hold(
    device: FakeDevice, autojump_clock: trio.testing.MockClock, expect_log: ExpectLog
) -> None:
    """Five feeds in the time after which it fires; none while something is not fenced; then again."""
    expect_log("CRITICAL.*not fenced: the watchdog is not fed", 1)
    watchdog = Device(str(device.path), TIMEOUT_S, ioctl=device.ioctl)
    assert device.asked == [TIMEOUT_S]
    holds = True
    async with trio.open_nursery() as nursery:
        await nursery.start(keep_fed, watchdog, TIMEOUT_S, lambda: holds)
        await trio.sleep(TIMEOUT_S - 1)
        assert len(device.fed()) in (5, 6)
        holds = False
        await trio.sleep(TIMEOUT_S)
        assert device.fed() == b""
        holds = True
        await trio.sleep(TIMEOUT_S)
        assert len(device.fed()) in (5, 6)
        nursery.cancel_scope.cancel()
    assert device.fed() == b"", "a cancelled task does not disarm"
    watchdog.disarm()
    assert device.fed() == b"V"


@pytest.mark.parametrize(("takes", "says"), [(None, "no watchdog device"), (90, "more than 60 s")])
def test_a_device_that_does_not_do_is_refused(tmp_path: Path, takes: int | None, says: str) -> None:
    """No watchdog, or one that would fire too late, is refused and disarmed."""
    fake = FakeDevice(tmp_path / "dog", takes)
    with pytest.raises(SetupError, match=says):
        Device(str(fake.path), TIMEOUT_S, ioctl=fake.ioctl)
    assert fake.fed() == b"V"
    fake.close()


def test_no_device() -> None:
    """A path where nothing is, and the word none."""
    with pytest.raises(SetupError, match="cannot be opened"):
        open_watchdog("/nonexistent/watchdog", TIMEOUT_S, "here")
    assert open_watchdog("none", TIMEOUT_S, "here") is None


class FakeLibrary:
    """libwdmd as far as it is used: `answers` are what the calls return."""

    def __init__(self, connection: int, answers: dict[str, int] | None = None) -> None:
        self.connection = connection
        self.answers = answers or {}
        self.expiries: list[int] = []

    def wdmd_connect(self) -> int:
        return self.connection

    def wdmd_register(self, connection: int, name: ctypes.c_char_p) -> int:
        assert name.value == b"lockfs here"
        return self.answers.get("register", 0)

    def wdmd_test_live(self, connection: int, renewed: ctypes.c_uint64, expires: ctypes.c_uint64) -> int:
        self.expiries.append(expires.value - renewed.value if expires.value else 0)
        return self.answers.get("test_live", 0)


def test_wdmd_is_told_when_to_expect_the_worst() -> None:
    """Each feed lasts for its time; at the end the expiry is taken back."""
    library: Any = FakeLibrary(os.open("/dev/null", os.O_RDONLY))
    watchdog = Wdmd("lockfs here", 12, library)
    watchdog.feed()
    watchdog.starve()
    watchdog.disarm()
    assert library.expiries == [12, 12, 0, 0]


@pytest.mark.parametrize("answers", [{"register": -1}, {"test_live": -1}])
def test_wdmd_that_refuses(answers: dict[str, int]) -> None:
    """A daemon that refuses is a failed start, with nothing left open."""
    library: Any = FakeLibrary(os.open("/dev/null", os.O_RDONLY), answers)
    with pytest.raises(SetupError, match="refuses"):
        Wdmd("lockfs here", 12, library)
    library = FakeLibrary(-1)
    with pytest.raises(SetupError, match="does not answer"):
        Wdmd("lockfs here", 12, library)


def test_the_next_worker_goes_on_with_the_same_descriptor(device: FakeDevice) -> None:
    """A watchdog that is closed without a word fires: the descriptor is told before it is armed, and kept."""
    told: list[int] = []
    first = Device(str(device.path), TIMEOUT_S, ioctl=device.ioctl, kept=Kept(opened=told.append))
    first.feed()
    (descriptor,) = told
    again = Device(str(device.path), TIMEOUT_S, ioctl=device.ioctl, kept=Kept(descriptor, told.append))
    again.feed()
    assert device.asked == [TIMEOUT_S] and told == [descriptor]
    again.disarm()
    assert device.fed() == b"\0\0V"


def test_the_next_worker_goes_on_with_the_same_connection() -> None:
    """wdmd has a connection that ended with an expiry for a dead program's."""
    connection = os.open("/dev/null", os.O_RDONLY)
    library: Any = FakeLibrary(connection)
    told: list[int] = []
    Wdmd("lockfs here", 12, library, Kept(opened=told.append))
    assert told == [connection]
    other: Any = FakeLibrary(-1)  # a second connection cannot be had
    again = Wdmd("lockfs here", 12, other, Kept(connection, told.append))
    again.feed()
    assert told == [connection]
    again.disarm()
