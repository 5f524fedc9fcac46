"""A watchdog that resets this machine if lockfs cannot keep its fences: a device of the kernel, or wdmd.

It is fed only while nothing here can change an image whose lease is lost or in doubt, nor has begun to. A
lockfs that is killed, or whose event loop stands still, feeds nobody. The interface of devices is the
kernel's (watchdog-api.rst): a write feeds it, WDIOC_SETTIMEOUT sets after how many seconds it fires, a "V"
before the close disarms it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import trio

from lockfs.errors import SetupError

WDIOC_SETTIMEOUT, WDIOC_GETTIMEOUT = 0xC0045706, 0x80045707
FEEDS_PER_TIMEOUT = 5
LOOK_S = 0.2
"""How often it is looked whether the fences hold, seconds."""
MARGIN_PART = 6
"""A device fires sooner than it must by this part of its time."""
WDMD_LIBRARY = "libwdmd.so.1"
NONE, WDMD = "none", "wdmd"
_INT = struct.Struct("i")

log = logging.getLogger("lockfs.mount")

Ioctl = Callable[[int, int, bytes], bytes]


class Watchdog(Protocol):
    """Something that resets the machine unless it is fed."""

    def feed(self) -> None:
        """Put the reset off once more; instant. Raises OSError."""

    def starve(self) -> None:
        """Let the time run from this moment on, not from the last feed's end. Raises OSError."""

    def disarm(self) -> None:
        """End without a reset. Raises nothing expected."""


@dataclass(frozen=True)
class Kept:
    """A watchdog's descriptor that outlives workers: closed without a word it would fire.

    `former` is that of a worker that was killed (-1: there is none); `opened` is told a new one before it is
    armed.
    """

    former: int = -1
    opened: Callable[[int], None] = lambda descriptor: None


class Device:
    """A watchdog device, which nobody else may have open."""

    def __init__(
        self, path: str, timeout_s: int, *, ioctl: Ioctl = fcntl.ioctl, kept: Kept | None = None
    ) -> None:
        """Arm it to fire `timeout_s` seconds after the last feed, or sooner.

        Raises:
            SetupError: it is none, is in use, or takes no such time; says what to do.
        """
        kept = kept or Kept()
        if kept.former >= 0:
            self._descriptor = kept.former
            return
        try:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:
            advice = (
                "stop wdmd or give watchdog=wdmd" if error.errno == errno.EBUSY else "give another device"
            )
            raise SetupError(f"The watchdog {path} cannot be opened ({error.strerror}): {advice}.") from error
        kept.opened(self._descriptor)
        try:
            ioctl(self._descriptor, WDIOC_SETTIMEOUT, _INT.pack(timeout_s))
            (taken,) = _INT.unpack(ioctl(self._descriptor, WDIOC_GETTIMEOUT, bytes(_INT.size)))
        except OSError as error:
            self.disarm()
            raise SetupError(f"{path} is no watchdog device ({error.strerror}): give one that is.") from error
        if not 0 < taken <= timeout_s:
            self.disarm()
            raise SetupError(
                f"The watchdog {path} fires after {taken} s, more than {timeout_s} s: use another one."
            )

    def feed(self) -> None:
        """Put the reset off."""
        os.write(self._descriptor, b"\0")

    def starve(self) -> None:
        """Nothing: the time runs since the last feed."""

    def disarm(self) -> None:
        """Say that no reset is wanted, and close."""
        try:
            os.write(self._descriptor, b"V")
        except OSError as error:
            log.critical("the watchdog cannot be disarmed: %s", error.strerror)
        finally:
            os.close(self._descriptor)


class Wdmd:
    """A connection to sanlock's watchdog daemon, through its library; times are CLOCK_MONOTONIC seconds.

    The daemon feeds the device, which fires within 60 s after that ends, while no connection has expired.
    """

    def __init__(
        self, name: str, patience_s: int, library: ctypes.CDLL | None = None, kept: Kept | None = None
    ) -> None:
        """`patience_s`: for how long one feed lasts, seconds.

        Raises:
            SetupError: there is no library, or no daemon that answers.
        """
        self._patience_s = patience_s
        try:
            self._library = library or ctypes.CDLL(WDMD_LIBRARY)
        except OSError as error:
            raise SetupError("watchdog=wdmd needs libwdmd: install the sanlock package.") from error
        kept = kept or Kept()
        self._connection = kept.former if kept.former >= 0 else int(self._library.wdmd_connect())
        if self._connection < 0:
            raise SetupError("The watchdog daemon wdmd does not answer: start it, or give watchdog=none.")
        if kept.former >= 0:
            return
        kept.opened(self._connection)
        registered = self._library.wdmd_register(self._connection, ctypes.c_char_p(name.encode()))
        if registered < 0 or self._test(patience_s) < 0:
            os.close(self._connection)
            raise SetupError("The watchdog daemon wdmd refuses this program: see its log.")

    def _test(self, patience_s: int | None) -> int:
        now = int(time.monotonic())
        until = now + patience_s if patience_s is not None else 0
        return int(
            self._library.wdmd_test_live(self._connection, ctypes.c_uint64(now), ctypes.c_uint64(until))
        )

    def feed(self) -> None:
        """Say that all is well until `patience_s` from now."""
        self._call(self._patience_s)

    def _call(self, patience_s: int) -> None:
        result = self._test(patience_s)
        if result < 0:
            raise OSError(-result, os.strerror(-result))

    def starve(self) -> None:
        """Expire now: the daemon's device fires within its 60 s."""
        self._call(0)

    def disarm(self) -> None:
        """Take the expiry back, and disconnect."""
        if self._test(None) < 0:
            log.critical("wdmd does not answer: it may reset this machine")
        os.close(self._connection)


def open_watchdog(name: str, timeout_s: int, who: str, kept: Kept | None = None) -> Watchdog | None:
    """The watchdog of an option's value: "none", "wdmd" or a device's path. `timeout_s`: after what
    time without a feed the machine must be down, seconds; with wdmd it is down 60 s after a feed's end.

    Raises:
        SetupError: it cannot be had.
    """
    if name == NONE:
        return None
    if name == WDMD:
        return Wdmd(f"lockfs {who}", max(1, timeout_s // FEEDS_PER_TIMEOUT), kept=kept)
    return Device(name, timeout_s - timeout_s // MARGIN_PART, kept=kept)


async def keep_fed(
    watchdog: Watchdog,
    timeout_s: int,
    fences_hold: Callable[[], bool],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Feed the watchdog, as long as the fences hold, until cancelled. Who armed it disarms it."""
    hungry, feed_at = False, 0.0
    task_status.started()
    while True:
        now = trio.current_time()
        try:
            if not fences_hold():
                if not hungry:
                    hungry = True
                    log.critical(
                        "an image is not fenced: the watchdog is not fed, and may reset this machine"
                    )
                    watchdog.starve()
            elif hungry or now >= feed_at:
                hungry, feed_at = False, now + timeout_s / FEEDS_PER_TIMEOUT
                watchdog.feed()
        except OSError as error:
            log.critical("the watchdog cannot be fed: %s", error.strerror)
        await trio.sleep(LOOK_S)
