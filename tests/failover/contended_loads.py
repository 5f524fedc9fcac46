"""Two hosts at one image: nobody gets what another holds, and of two that want it one at most has it."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path

from lockfs.linux import ofd
from tests.failover.loads import Load

OWN_BYTE = 0x4C4B4653
"""The byte that lockfs with backend=fcntl always locks (docs; lockfs/backends/image_locks.py)."""
TARGETS = "targets.json"
"""In the bare directory: what `Rival` reads, an object of `paths` on the second mount and `store` paths."""
REST_S = 0.01
HOLD_S = 0.05
LOSER_S = 0.1


class Contender(Load):
    """Opens one image that both hosts want. The witness lies on the bare disk and knows nothing of locks."""

    timed = False  # its opens wait for the other host
    paced = False

    def prepare(self) -> None:
        self.image = self.directory / "contended.img"
        self.witness = self.bare / "writer"
        self.wins = self.recorder.record.facts.setdefault("wins", 0)

    def step(self) -> None:
        try:
            descriptor = self.call("open", os.open, self.image, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            time.sleep(self.random.uniform(0, LOSER_S))
            return
        try:
            with self.closing(descriptor):
                self._hold(descriptor)
        finally:
            self.recorder.record.facts["wins"] = self.wins
        time.sleep(self.random.uniform(0, LOSER_S))

    def _hold(self, descriptor: int) -> None:
        try:
            os.close(os.open(self.witness, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC))
        except FileExistsError:
            self.demand(False, "both hosts write the image")
        try:
            self.wins += 1
            stamp = f"{os.getpid():16}{self.wins:16}".encode()
            self.call("write", os.pwrite, descriptor, stamp, 0)
            time.sleep(self.random.uniform(0, HOLD_S))
            self.same(self.call("read", os.pread, descriptor, 32, 0), stamp, "the stamp of the writer")
        finally:
            self.witness.unlink(missing_ok=True)


class FarContender(Contender):
    """The same on the second host."""


class Rival(Load):
    """The second host: tries to open every held image all the time, and must be refused each time.

    With backend=fcntl it looks at the locks themselves besides, far more often than it can open.
    """

    timed = False
    paced = False

    def prepare(self) -> None:
        self.locked: list[int] = []
        targets = json.loads((self.bare / TARGETS).read_text())
        self.paths = [Path(path) for path in targets["paths"]]
        self.locked = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in targets["locked"]]
        facts = self.recorder.record.facts
        self.tries, self.looks = facts.setdefault("tries", 0), facts.setdefault("looks", 0)

    def step(self) -> None:
        path = self.paths[self.tries % len(self.paths)]
        self.tries += 1
        try:
            descriptor = self.call("open", os.open, path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
        else:
            os.close(descriptor)
            image = f"{path.parent.parent.name}/{path.name}"
            self.demand(False, f"a lease was dropped: the second host opened {image}")
        end = time.monotonic() + REST_S
        while time.monotonic() < end:
            self._look()
            time.sleep(REST_S / 4)
        self._tell()

    def _look(self) -> None:
        for place, descriptor in enumerate(self.locked):
            self.looks += 1
            if ofd.conflict(descriptor, ofd.WRITE, OWN_BYTE) is None:
                self.demand(False, f"a lease was dropped: no lock is on image {place}")

    def _tell(self) -> None:
        self.recorder.record.facts.update(tries=self.tries, looks=self.looks)

    def finish(self) -> None:
        for descriptor in self.locked:
            os.close(descriptor)
        self.locked = []

    def abandon(self) -> None:
        super().abandon()
        self.finish()
