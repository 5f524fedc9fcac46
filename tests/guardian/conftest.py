"""A family started as a program of its own, watched through its events and its journal."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lockfs.guardian.words import Words
from lockfs.journal.memory import SharedMemory

ROOT = Path(__file__).parents[2]
DEADLINE_S = 20.0
SHORT = {
    "poll": 0.05,
    "heartbeat": 0.4,
    "start": 2.0,
    "loop_steady": 10.0,
    "loop_killed": 10.0,
    "fenced_retry": 0.2,
    "clone_retry": 0.1,
}


class Family:
    """A running family; what is left of it is killed when the test ends."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.process: subprocess.Popen[bytes]
        self.memory: SharedMemory | None = None
        self.seen: set[int] = set()

    def start(self, ready: bool = True, **behaviour: Any) -> None:
        """Start it; with `ready`, return once its first worker is and nobody is missing."""
        limits = {**SHORT, **behaviour.pop("limits", {})}
        (self.directory / "behaviour.json").write_text(json.dumps({"limits": limits, **behaviour}))
        command = [sys.executable, "-m", "tests.guardian.program", str(self.directory)]
        with open(self.directory / "output", "wb") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        if ready:
            self.until(lambda: self.of("on ready") and self.of("ready"), "ready")
            self.attach()
            self.complete()

    def attach(self) -> None:
        """Look into the journal from outside."""
        number = self.of("start")[0]["memory"]
        descriptor = os.open(f"/proc/{self.process.pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
        self.memory = SharedMemory.attach(descriptor)

    def events(self) -> list[dict[str, Any]]:
        """What the family has noted."""
        with contextlib.suppress(FileNotFoundError):
            lines = (self.directory / "events").read_text().splitlines()
            found = [json.loads(line) for line in lines]
            self.seen |= {event["pid"] for event in found}
            return found
        return []

    def of(self, what: str) -> list[dict[str, Any]]:
        """Events of one kind."""
        return [event for event in self.events() if event["what"] == what]

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait for something that the family brings about."""
        end = time.monotonic() + DEADLINE_S
        while not condition():
            if time.monotonic() > end:
                output = (self.directory / "output").read_text()
                pytest.fail(f"not within {DEADLINE_S} s: {what}; {self.events()}; {output}")
            time.sleep(0.005)

    @property
    def header(self) -> Any:
        """The journal's header."""
        assert self.memory is not None
        return self.memory.header

    @property
    def words(self) -> Words:
        """The family's words."""
        assert self.memory is not None
        return Words(self.memory)

    def pids(self) -> dict[str, int]:
        """Who is who."""
        names = ("guardian", "twin", "worker", "spare")
        pids = {name: int(getattr(self.header, f"{name}_pid")) for name in names}
        self.seen |= set(pids.values())
        return pids

    def complete(self, *without: int) -> dict[str, int]:
        """Wait until every place is filled, by processes that live and are none of `without`; who is who."""

        def is_so() -> bool:
            pids = self.pids().values()
            full = all(pid and pid not in without and alive(pid) for pid in pids)
            return full and bool(self.words.ready_ns) and not self.words.sweeping

        self.until(is_so, "complete")
        return self.pids()

    def turns(self, count: int) -> dict[str, Any]:
        """Wait until so many workers have got ready; the last one's event."""
        self.until(lambda: len(self.of("ready")) >= count, f"{count} turns")
        return self.of("ready")[count - 1]

    def end(self) -> dict[str, Any]:
        """End it well, and see everybody gone; the last event."""
        (self.directory / "end").touch()
        return self.ended()

    def ended(self) -> dict[str, Any]:
        """Wait for the end; the last event. Whoever returned from guard() may be another than was started."""
        self.until(lambda: self.of("ending"), "the end")
        self.process.wait(DEADLINE_S)
        self.until(lambda: not any(map(alive, self.seen - {0})), "everybody gone")
        return self.of("ending")[-1]

    def clean_up(self) -> None:
        """Leave nothing."""
        if self.memory is not None:
            self.memory.close()
        (self.directory / "end").touch()
        end = time.monotonic() + DEADLINE_S
        while (left := members(self.directory)) and time.monotonic() < end:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.poll()
        self.process.wait(DEADLINE_S)


def alive(pid: int) -> bool:
    """Whether the process is there and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def members(directory: Path) -> list[int]:
    """All processes of a test's family, by their command line; zombies have none."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.fsencode(directory) in Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0"):
                found.append(int(name))
    return found


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Family]:
    """A family that is not started yet."""
    made = Family(tmp_path)
    yield made
    made.clean_up()
