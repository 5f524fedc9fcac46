"""Sick lease storage under real mounts: what is written stops in time, and the next host gets the image.

Host A has its lease area on storage that can be told to hang or to fail (tests.support.faulty); host B and
the test reach the same area directly. io_timeout is 1 s and the watchdog time 10 s: A must have stopped 8 s
after its last renewal, B may take over 18 s after it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pty
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.faulty import FaultyStorage, faulty
from tests.support.mounts import Mount, mounted, start, two_mounts

PATIENCE_S = 60.0
PAXOS = "backend=paxos,io_timeout=1,watchdog_timeout=10,join=wait,wait=0.5,handover_wait=1"
BLOCK = 4096
BLOCKS = 256


@dataclass
class Rig:
    """Two hosts of one store and one lease area; A's way to the area is `storage`."""

    base: Path
    storage: FaultyStorage
    area: Path

    @contextlib.contextmanager
    def host(self, name: str, io: str, *, faulty_way: bool = False, more: str = "") -> Iterator[Mount]:
        """A mount as that host."""
        area = self.storage.area if faulty_way else self.area
        state = self.base / f"state-{name}"
        state.mkdir(exist_ok=True)
        options = f"{PAXOS},host={name},io={io},lease_area={area},state_dir={state}{more}"
        with mounted(self.base / "store", self.base / name, options) as mount:
            yield mount


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """A store with an image, and a lease area."""
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "disk").write_bytes(bytes(BLOCK * BLOCKS))
    area = tmp_path / "area"
    command = [sys.executable, "-m", "lockfs.cli.ctl", "init", str(area)]
    subprocess.run(
        [*command, "--lockspace", "images", "--leases", "8", "--io-timeout", "1"],
        check=True,
        capture_output=True,
    )
    with faulty(area, tmp_path) as storage:
        yield Rig(tmp_path, storage, area)


@dataclass
class Writer:
    """Writes numbered blocks through one descriptor, one after another, until the first error."""

    path: Path
    number: int = 0
    last_ok: float = 0.0
    longest: float = 0.0
    error: OSError | None = None
    ended: threading.Event = field(default_factory=threading.Event)
    stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_DSYNC)
        self._thread = threading.Thread(target=self._write)
        self._thread.start()

    def once(self) -> None:
        """One write."""
        at = (self.number + 1) % BLOCKS * BLOCK
        os.pwrite(self.descriptor, b"A%07d" % (self.number + 1) * (BLOCK // 8), at)
        self.number += 1

    def _write(self) -> None:
        while not self.stop.is_set():
            began = time.monotonic()
            try:
                self.once()
            except OSError as error:
                self.error = error
                break
            self.last_ok = time.monotonic()
            self.longest = max(self.longest, self.last_ok - began)
            time.sleep(0.002)
        self.ended.set()

    def end(self) -> None:
        """Stop writing and close."""
        self.stop.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            os.close(self.descriptor)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Writer]:
    """A writer for the length of a block."""
    writer = Writer(path)
    try:
        time.sleep(0.2)
        yield writer
    finally:
        writer.end()


def takes_over(path: Path) -> tuple[int, float]:
    """Open for writing as soon as that is allowed; the descriptor, and when."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            return os.open(path, os.O_RDWR), time.monotonic()
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.EIO) or time.monotonic() > end:
                raise
        time.sleep(0.05)


@pytest.mark.parametrize("fault", ["hang", "eio"])
@pytest.mark.parametrize("io", ["passthrough", "guarded"])
def test_a_host_that_cannot_renew_stops_before_the_next_one_starts(rig: Rig, io: str, fault: str) -> None:
    """Writes through old handles end before B has the image; what B wrote stays, come what may."""
    with (
        rig.host("A", io, faulty_way=True) as a,
        rig.host("B", "guarded") as b,
        writing(a.path / "disk") as writer,
    ):
        rig.storage.set(fault)
        fault_at = time.monotonic()
        descriptor, taken_at = takes_over(b.path / "disk")
        assert writer.ended.wait(0), "A writes although B has the image"
        assert writer.error is not None and writer.error.errno == (
            errno.EIO if io == "passthrough" else errno.ENOSPC
        )
        print(f"{io}, {fault}: the last write {writer.last_ok - fault_at:.1f} s after the fault, ", end="")
        print(f"B has the image after {taken_at - fault_at:.1f} s")
        assert writer.last_ok < taken_at
        os.pwrite(descriptor, b"B" * BLOCK * BLOCKS, 0)
        os.fsync(descriptor)
        rig.storage.set("ok")
        end = time.monotonic() + 4
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                writer.once()
                pytest.fail("A wrote through its old handle")
            time.sleep(0.02)
        assert set((rig.base / "store" / "disk").read_bytes()) == {ord("B")}
        os.close(descriptor)
    log = (rig.base / "A.log").read_text()
    assert "fenced" in log if io == "passthrough" else "suspended" in log


@pytest.mark.parametrize("io", ["passthrough", "guarded", "daemon"])
def test_a_glitch_of_six_io_timeouts_is_noticed_by_nobody(rig: Rig, io: str) -> None:
    """Storage that is away for 6 io_timeout: no write fails or waits."""
    with rig.host("A", io, faulty_way=True) as a, writing(a.path / "disk") as writer:
        rig.storage.set("hang")
        time.sleep(6)
        rig.storage.set("ok")
        time.sleep(5)
        assert writer.error is None
        print(f"{io}: the longest write took {writer.longest * 1000:.0f} ms")
        assert "doubt" not in a.log()


def test_the_image_can_be_opened_anew_when_the_storage_is_back(rig: Rig) -> None:
    """In passthrough: the old handle is dead, a new one works once the host has joined again."""
    with rig.host("A", "passthrough", faulty_way=True) as a, writing(a.path / "disk") as writer:
        rig.storage.set("hang")
        assert writer.ended.wait(PATIENCE_S)
        rig.storage.set("ok")
        descriptor, _ = takes_over(a.path / "disk")
        os.pwrite(descriptor, b"again", 0)
        with pytest.raises(OSError):
            writer.once()
        os.close(descriptor)


def test_break_frees_the_image_of_a_dead_host(rig: Rig) -> None:
    """lockfsctl break waits until a silent host counts as dead, says what it checked, frees the image."""
    with rig.host("B", "guarded") as b:
        a = start(rig.base / "store", _folder(rig.base / "A"), _options(rig, "A"))
        descriptor = os.open(a.path / "disk", os.O_RDWR)
        alive = _break(b.path / "disk")
        assert alive.returncode and "may be alive" in alive.stdout and "is held by" in alive.stdout
        refused = _break(b.path / "disk", "--force")
        assert refused.returncode and "beyond repair" in refused.stdout and "terminal" in refused.stderr
        assert "is alive" not in refused.stdout or "not freed" not in refused.stdout
        a.kill()
        with contextlib.suppress(OSError):
            os.close(descriptor)
        subprocess.run(["umount", "-l", str(a.path)], check=True)
        time.sleep(6)
        freed = _break(b.path / "disk")
        print(freed.stdout)
        assert freed.returncode == 0, freed.stderr
        assert "it is dead" in freed.stdout and "is free" in freed.stdout
        os.close(os.open(b.path / "disk", os.O_RDWR))
        nobody = _break(b.path / "disk")
        assert nobody.returncode == 0 and "The lease is free" in nobody.stdout


def test_break_by_force_asks(rig: Rig) -> None:
    """On a terminal --force asks; it changes nothing without a yes, and takes the lease with it."""
    with rig.host("A", "guarded") as a, rig.host("B", "guarded") as b, writing(a.path / "disk"):
        for word, code in (("no", 2), ("yes", 0)):
            master, slave = pty.openpty()
            process = subprocess.Popen(
                [sys.executable, "-m", "lockfs.cli.ctl", "break", "--force", str(b.path / "disk")],
                stdin=slave, stdout=slave, stderr=slave,
            )  # fmt: skip
            os.close(slave)
            os.write(master, f"{word}\n".encode())
            said = _read_all(master)
            assert process.wait(PATIENCE_S) == code, said
            assert "Type yes" in said
            os.close(master)
        os.close(os.open(b.path / "disk", os.O_RDWR))
        b.logs("taken by force")


def test_fcntl_says_that_it_cannot_be_broken(tmp_path: Path) -> None:
    """File locks are the storage's own affair."""
    (tmp_path / "store").mkdir()
    with two_mounts(tmp_path, "wait=0.1") as hosts:
        (hosts.store / "disk").write_bytes(b"x")
        with open(hosts.a.path / "disk", "r+b"):
            done = _break(hosts.b.path / "disk")
            assert done.returncode and "cannot be broken from here" in done.stdout
            here = _break(hosts.a.path / "disk")
            assert here.returncode and "fence" in here.stdout
        done = _break(hosts.b.path / "disk")
        assert done.returncode == 0, done.stdout


def _break(path: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lockfs.cli.ctl", "break", *more, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def _read_all(master: int) -> str:
    said = b""
    with contextlib.suppress(OSError):  # EIO once the other end is closed
        while chunk := os.read(master, 4096):
            said += chunk
    return said.decode()


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def _options(rig: Rig, name: str) -> str:
    state = rig.base / f"state-{name}"
    state.mkdir(exist_ok=True)
    return f"{PAXOS},host={name},io=guarded,lease_area={rig.area},state_dir={state}"
