"""Commands with the stub server in the place of the real one, and mounts that end with their test."""

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

from lockfs.mount import table

ROOT = Path(__file__).parents[2]
DEADLINE_S = 20.0
FAMILY = 4


def until(condition: object, what: str) -> None:
    """Wait for a condition that another process brings about."""
    assert callable(condition)
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, f"not within {DEADLINE_S} s: {what}"
        time.sleep(0.01)


@dataclass
class Stub:
    """Runs lockfs with the stub server; `source` and `point` are two directories."""

    source: Path
    point: Path
    log: Path
    running: list[subprocess.Popen[str]] = field(default_factory=list)

    def environment(self, how: str, deadline_s: float) -> dict[str, str]:
        """The environment that makes the stub behave."""
        return {
            **os.environ,
            "LOCKFS_STUB": how,
            "LOCKFS_STUB_DEADLINE": str(deadline_s),
            "PYTHONPATH": str(ROOT),
        }

    def command(self, *arguments: str) -> list[str]:
        """A command line with the test's two directories and log."""
        words = [sys.executable, "-m", "tests.cli.responder", "-o", f"log={self.log}", *arguments]
        return [*words, str(self.source), str(self.point)]

    def run(
        self, *arguments: str, how: str = "serve", deadline_s: float = 20
    ) -> subprocess.CompletedProcess[str]:
        """Start in the background and return when the command does."""
        return subprocess.run(
            self.command(*arguments),
            env=self.environment(how, deadline_s),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )

    def start(self, *arguments: str, how: str = "serve") -> subprocess.Popen[str]:
        """Start in the foreground and wait until the mount is there."""
        process = subprocess.Popen(
            self.command("-f", *arguments),
            env=self.environment(how, 20),
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.running.append(process)
        until(lambda: self.is_mounted() or process.poll() is not None, "mounted")
        return process

    def logs(self, *words: str) -> None:
        """Return once the log has the words; a thread of its own writes it, a little after what it tells."""
        for each in words:
            until(lambda each=each: each in self.log.read_text(), f"{each!r} is in the log")

    def is_mounted(self) -> bool:
        """Whether the mount table has a lockfs there."""
        mount = table.at(str(self.point), table.read())
        return mount is not None and mount.is_lockfs

    def servers(self) -> list[int]:
        """The processes that serve this mount."""
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                line = Path(f"/proc/{name}/cmdline").read_bytes()
            except OSError:
                continue
            if os.fsencode(self.point) in line.split(b"\0"):
                found.append(int(name))
        return found

    def family(self) -> list[int]:
        """The processes that serve this mount, once all four are there: guardian, twin, worker, spare."""
        until(lambda: len(self.servers()) == FAMILY, "the family is complete")
        return self.servers()

    def named(self, name: str) -> int:
        """The process of the family with that name, once everybody has one."""
        found: dict[str, int] = {}

        def is_there() -> bool:
            found.clear()
            for pid in self.servers():
                with contextlib.suppress(OSError):
                    found[Path(f"/proc/{pid}/comm").read_text().strip()] = pid
            return len(found) == FAMILY and name in found

        until(is_there, f"there is a {name}")
        return found[name]

    def end(self) -> None:
        """Unmount, and see every server end."""
        while self.is_mounted():
            subprocess.run(["umount", "-l", self.point], check=True)
        try:
            for process in self.running:
                process.wait(DEADLINE_S)
            until(lambda: not self.servers(), "no server left")
        finally:
            end = time.monotonic() + DEADLINE_S
            while (left := self.servers()) and time.monotonic() < end:
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            for process in self.running:
                process.communicate(timeout=DEADLINE_S)


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[Stub]:
    """The stub on two new directories; what it mounted is gone afterwards."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    made = Stub(tmp_path / "source", tmp_path / "point", tmp_path / "log")
    made.source.mkdir()
    made.point.mkdir()
    try:
        yield made
    finally:
        made.end()
