"""Real mounts for tests: started as a user would start them, ended and checked when the test ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lockfs.linux import cloning

START_DEADLINE_S = 30.0
STOP_DEADLINE_S = 20.0
LOG_DEADLINE_S = 20.0
POLL_S = 0.01
FAMILY = {"lockfs", "lockfs-twin", "lockfs-worker", "lockfs-spare"}
"""What the processes of a mount are called: guardian, twin, worker, spare."""


def why_not_mount() -> str | None:
    """The reason why this machine cannot mount, or None."""
    if os.geteuid() != 0:
        return "mounting needs root"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "there is no /dev/fuse"
    return None


needs_mount = pytest.mark.skipif(why_not_mount() is not None, reason=why_not_mount() or "")


@dataclass
class Mount:
    """A running lockfs in the foreground, with its log."""

    source: Path
    path: Path
    process: subprocess.Popen[bytes]
    log_file: Path
    expected: list[str] = field(default_factory=list)

    def log(self) -> str:
        """What the server wrote so far; a thread of its own writes it, a little after what it tells."""
        return self.log_file.read_text(errors="replace")

    def logs(self, *words: str, times: int = 1, within: float = LOG_DEADLINE_S) -> str:
        """The log, once it has each of the words so often; fail if it does not come to that."""
        end = time.monotonic() + within
        while missing := [each for each in words if self.log().count(each) < times]:
            if time.monotonic() > end:
                pytest.fail(f"not logged within {within:.0f} s: {missing}\n{self.log()}")
            time.sleep(POLL_S)
        return self.log()

    def family(self) -> dict[str, int]:
        """The processes of this mount by their names: those of FAMILY, and "python" before they have one.

        Whoever was killed and whose place was filled is not among them.
        """
        found = {}
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
                if os.fsencode(self.path) in words and os.fsencode(self.source) in words:
                    found[Path(f"/proc/{name}/comm").read_text().strip()] = int(name)
            except OSError:
                continue
        return found

    def kill(self, *names: str) -> None:
        """End processes of the mount as a crash does, by their names, all at once; without names, all."""
        family = self.family()
        members = {pid: os.pidfd_open(pid) for pid in (family[name] for name in names or family)}
        try:
            for number in (signal.SIGSTOP, signal.SIGKILL):
                for member in members.values():
                    signal.pidfd_send_signal(member, number)
            if self.process.pid in members:
                self.process.wait()
            end = time.monotonic() + STOP_DEADLINE_S
            # With all their threads: the first alone is not enough, for the others keep files open.
            while not all(cloning.is_dead(member) for member in members.values()):
                assert time.monotonic() < end, f"{list(members)} survived a SIGKILL"
                time.sleep(POLL_S)
        finally:
            for member in members.values():
                os.close(member)

    def descriptors(self) -> int:
        """How many descriptors the server has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def settles_at(self, count: int) -> None:
        """Fail unless the server's descriptors are back at `count`; RELEASE and FORGET come late."""
        end = time.monotonic() + STOP_DEADLINE_S
        while self.descriptors() > count:
            if time.monotonic() > end:
                left = os.listdir(f"/proc/{self.process.pid}/fd")
                names = [os.readlink(f"/proc/{self.process.pid}/fd/{name}") for name in left]
                pytest.fail(f"{len(names) - count} descriptors more than before: {sorted(names)}")
            # The kernel keeps looked-up names until it is short of memory or told to let go.
            Path("/proc/sys/vm/drop_caches").write_text("2")
            time.sleep(0.05)

    def is_mounted(self) -> bool:
        """Whether the kernel shows a lockfs on the mount point."""
        with open("/proc/self/mountinfo") as table:
            return any(f" {self.path} " in line and " - fuse.lockfs " in line for line in table)

    def wait_ready(self) -> None:
        """Return once the mount answers; fail with its log if it does not come up."""
        end = time.monotonic() + START_DEADLINE_S
        while time.monotonic() < end:
            if self.process.poll() is not None:
                pytest.fail(f"lockfs ended with {self.process.returncode}:\n{self.log()}")
            if " serves " in self.log() and self.family().keys() >= FAMILY:
                return
            time.sleep(POLL_S)
        self.kill()
        pytest.fail(f"lockfs was not ready in time:\n{self.log()}")

    def stop(self) -> None:
        """Unmount and wait for the server's end; it must end by itself and well."""
        end = time.monotonic() + STOP_DEADLINE_S
        if self.is_mounted():
            while subprocess.run(["umount", str(self.path)], capture_output=True, check=False).returncode:
                if not self.is_mounted():
                    break
                if time.monotonic() > end:
                    subprocess.run(["umount", "-l", str(self.path)], check=False)
                    self.kill()
                    pytest.fail(f"{self.path} stayed busy:\n{self.log()}")
                time.sleep(0.05)
        try:
            code = self.process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"lockfs did not end after the unmount:\n{self.log()}")
        if code:
            pytest.fail(f"lockfs ended with {code}:\n{self.log()}")


def start(source: Path, path: Path, options: str = "", *, log_file: Path | None = None) -> Mount:
    """Mount `source` on `path`; both exist. The caller stops it."""
    log_file = log_file or path.parent / f"{path.name}.log"
    command = [sys.executable, "-m", "lockfs.cli.main", "-f"]
    if options:
        command += ["-o", options]
    command += [str(source), str(path)]
    with open(log_file, "wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    mount = Mount(source, path, process, log_file)
    mount.wait_ready()
    return mount


@contextlib.contextmanager
def mounted(source: Path, path: Path, options: str = "") -> Iterator[Mount]:
    """A mount for the length of a block."""
    path.mkdir(exist_ok=True)
    mount = start(source, path, options)
    try:
        yield mount
    finally:
        mount.stop()


@dataclass
class TwoMounts:
    """Two hosts' mounts of one store."""

    store: Path
    a: Mount
    b: Mount


@contextlib.contextmanager
def two_mounts(base: Path, options: str = "", *, b_options: str | None = None) -> Iterator[TwoMounts]:
    """Mounts `base/a` (host=hostA) and `base/b` (host=hostB) of the store `base/store`."""
    store = base / "store"
    store.mkdir(exist_ok=True)
    extra = f",{options}" if options else ""
    extra_b = extra if b_options is None else f",{b_options}" if b_options else ""
    with (
        mounted(store, base / "a", "host=hostA" + extra) as a,
        mounted(store, base / "b", "host=hostB" + extra_b) as b,
    ):
        yield TwoMounts(store, a, b)
