"""A QEMU whose guest numbers its writes and reads each back; neither guest nor QEMU may see an error.

The guest's clock is not ours: how long one of its requests took is told by how long its count of
acknowledged writes stood still, looked at every POLL_S, which adds up to POLL_S and the guest's own rest.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from tests.failover.loads import HELD, Load
from tests.failover.recording import Request, Wrong
from tests.support import guest
from tests.support.qemu import Fleet, Qemu, QemuRefused, QmpClosed, QmpError, disk, installed

POLL_S = 0.02
STUCK_S = 60.0
NICE = 5
"""The BIOS waits for its disk in a loop: the guest must not take the processors from the others."""
ERROR_CHARS_MAX = 600
STATUS_EVERY = 50
_BAD_EVENTS = ("BLOCK_IO_ERROR", "STOP", "SHUTDOWN", "GUEST_PANICKED")


class Guest(Load):
    """One QEMU under TCG with a raw image and O_DIRECT."""

    paced = False

    @classmethod
    def seed(cls, directory: Path) -> list[Path]:
        super().seed(directory)
        return [guest.make_image(directory / HELD / "0.img", "raw")]

    def prepare(self) -> None:
        build = installed()
        self.fleet = Fleet()
        self.looks = 0
        if build is None:
            raise FileNotFoundError("qemu-system-x86_64 is not installed")
        arguments = disk("auto", "raw", self.directory / HELD / "0.img", direct=True)
        os.setpriority(os.PRIO_PROCESS, 0, NICE)  # QEMU inherits it
        with self._told():
            self.machine: Qemu = self.fleet.start(build, arguments)
            self.machine.wait_written(10)
            self.last, self.since = self.machine.written(), time.monotonic_ns()

    def step(self) -> None:
        time.sleep(POLL_S)
        self.looks += 1
        with self._told():
            count, now = self.machine.written(), time.monotonic_ns()
        row, record = self.recorder.row, self.recorder.record
        if count != self.last:
            record.requests.append(Request(record.load, "guest write", self.since, now))
            row.leave(self.since)
            self.last, self.since = count, now
        self.demand(now - self.since < STUCK_S * 1e9, f"the guest stands at write {count}")
        if self.looks % STATUS_EVERY == 0:
            self._look()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Whatever goes wrong with QEMU is an error like any other."""
        try:
            yield
        except (AssertionError, QemuRefused, QmpClosed, QmpError) as error:
            raise Wrong(f"{error!r}"[:ERROR_CHARS_MAX]) from error

    def _look(self) -> None:
        with self._told():
            self.same(self.machine.status(), "running", "QEMU's state")
        bad = [event for event in self.machine.qmp.events if event["event"] in _BAD_EVENTS]
        self.demand(not bad, f"QEMU reports {bad[:2]}")
        self.recorder.record.facts["writes"] = self.last

    def finish(self) -> None:
        self._look()
        with self._told():
            acknowledged = self.machine.halt()
            self.same(self.machine.quit(), 0, "QEMU's exit code")
            guest.check(guest.read_record(self.directory / HELD / "0.img", "raw"), acknowledged)
        self.fleet.end()

    def abandon(self) -> None:
        super().abandon()
        self.fleet.end()
