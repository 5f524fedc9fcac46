"""`lockfsctl upgrade` and SIGHUP: the next worker is of the program as installed, and nobody notices."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lockfs.cli import upgrading
from lockfs.errors import UsageError
from tests.support.mounts import Mount, mounted, needs_mount

DEADLINE_S = 30.0


def on(base: Path, options: str) -> contextlib.AbstractContextManager[Mount]:
    """A mount of a store of its own."""
    (base / "store").mkdir()
    return mounted(base / "store", base / "a", options)


def ctl(*words: str) -> subprocess.CompletedProcess[str]:
    """lockfsctl, as a user calls it."""
    command = [sys.executable, "-m", "lockfs.cli.ctl", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=2 * DEADLINE_S, check=False)


def status(mount: Mount) -> dict[str, object]:
    """What the mount says of itself."""
    mounts = json.loads(ctl("status", "--json", str(mount.path)).stdout)["mounts"]
    return next((one for one in mounts if one["mountpoint"] == str(mount.path)), {})


@dataclass
class Load:
    """Writes, reads, opens and renames on a mount until told to stop; every error is kept."""

    place: Path
    rounds: int = 0
    errors: list[BaseException] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """In a thread."""
        try:
            with open(self.place / "kept", "w+b", buffering=0) as kept:
                while not self.over.is_set():
                    self._round(kept.fileno())
                    self.rounds += 1
        except BaseException as error:  # noqa: BLE001  (told by the test)
            self.errors.append(error)

    def _round(self, kept: int) -> None:
        record = b"%08d" % self.rounds
        assert os.pwrite(kept, record, 8 * (self.rounds % 512)) == 8
        os.fsync(kept)
        assert os.pread(kept, 8, 8 * (self.rounds % 512)) == record
        new, old = self.place / "new", self.place / "old"
        new.write_bytes(record)
        new.rename(old)
        assert old.read_bytes() == record
        old.unlink()


@contextlib.contextmanager
def load(place: Path) -> Iterator[Load]:
    """A load that runs for the length of the block, and must have had no error."""
    made = Load(place)
    thread = threading.Thread(target=made.run)
    thread.start()
    try:
        yield made
    finally:
        made.over.set()
        thread.join(DEADLINE_S)
    assert not thread.is_alive()
    assert made.errors == []


def after(made: Load, rounds: int) -> None:
    """Wait for so many more rounds."""
    end, goal = time.monotonic() + DEADLINE_S, made.rounds + rounds
    while made.rounds < goal and not made.errors and time.monotonic() < end:
        time.sleep(0.01)
    assert made.rounds >= goal, made.errors


@needs_mount
@pytest.mark.parametrize("backend", ["fcntl", "paxos,io_timeout=1"])
def test_upgrade_under_load(tmp_path: Path, backend: str) -> None:
    """Twice, once with other options; the guardian keeps its process id, and everything else is new."""
    with on(tmp_path, f"backend={backend}") as mount, load(mount.path) as made:
        after(made, 5)
        before = status(mount)["family"]
        done = ctl("upgrade", str(mount.path))
        assert done.returncode == 0, done.stderr
        assert f"{mount.path} is served by lockfs" in done.stdout
        after(made, 5)
        done = ctl("upgrade", str(mount.path), "-o", "wait=0.5")
        assert done.returncode == 0, done.stderr
        after(made, 5)
        family = status(mount)["family"]
        assert isinstance(before, dict) and isinstance(family, dict)
        assert family["guardian"] == before["guardian"]
        assert family["workers"] == before["workers"] + 2
        assert family["worker"] != before["worker"]


@needs_mount
def test_a_hangup_upgrades(tmp_path: Path) -> None:
    """SIGHUP does the same."""
    with on(tmp_path, "backend=fcntl") as mount, load(mount.path) as made:
        after(made, 3)
        mount.process.send_signal(signal.SIGHUP)
        end = time.monotonic() + DEADLINE_S
        while (family := status(mount).get("family")) and isinstance(family, dict):
            if family["workers"] > 1:
                break
            assert time.monotonic() < end
        after(made, 3)


def test_which_options_can_change() -> None:
    """Those that nothing open depends on."""
    assert upgrading.changes("wait=7,log=/var/log/x") == {"policy": {"wait": 7.0}, "log": "/var/log/x"}
    for words in ("backend=nop", "io=daemon", "nonsense=1"):
        with pytest.raises(UsageError):
            upgrading.changes(words)
