"""A family whose workers serve nothing: they note what happens to them and do what the test asks for.

    python -m tests.guardian.program DIRECTORY       (or: --resume FD DIRECTORY, --can-resume FD)

DIRECTORY has behaviour.json: how the worker of each turn behaves ("serve" where it says nothing), and the
limits. Every event goes to events, a line of JSON each. A file named `end` ends the worker well.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lockfs.guardian import upgrade
from lockfs.guardian.family import EXIT_HOPELESS, Plan, guard
from lockfs.guardian.turn import Turn
from lockfs.guardian.words import Limits
from lockfs.journal.memory import SharedMemory

BEAT_S = 0.01
UPGRADED = "LOCKFS_TEST_UPGRADED"


class Program:
    """One run, in whichever process."""

    def __init__(self, directory: Path, memory: SharedMemory) -> None:
        self._directory = directory
        self._memory = memory
        self._behaviour: dict[str, Any] = json.loads((directory / "behaviour.json").read_text())

    def note(self, what: str, **more: object) -> None:
        """Write an event."""
        line = json.dumps({"what": what, "pid": os.getpid(), "parent": os.getppid(), **more}) + "\n"
        descriptor = os.open(self._directory / "events", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(descriptor, line.encode())
        os.close(descriptor)

    def prepare(self) -> None:
        """Import what a real worker does, if the test asks for it."""
        if self._behaviour.get("imports"):
            import lockfs.mount.serve  # noqa: F401

    def serve(self, turn: Turn) -> int:
        """One worker's turn."""
        how = self._behaviour.get(str(turn.number), self._behaviour.get("others", "serve"))
        turn.beat()
        self.note("turn", number=turn.number, first=turn.first, fenced=turn.fenced, died=turn.died)
        if how == "fail":
            turn.failed(32, "It cannot be: " + "ä" * 1000)
            return 32
        if how == "die early":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hopeless":
            return EXIT_HOPELESS
        if turn.first:
            (self._directory / "held").write_text("kept")
            held = os.open(self._directory / "held", os.O_RDONLY)
            self._memory.facts.set("held", {"fd": held})
        lost = os.open(self._directory / "behaviour.json", os.O_RDONLY)
        fact = self._memory.facts.get("held")
        assert isinstance(fact, dict)
        if stuck := self._behaviour.get("stuck", {}).get(str(turn.number)):
            self._get_stuck(**stuck)
        signal.signal(signal.SIGTERM, lambda number, frame: self._asked_to_end(number))
        turn.listening()
        turn.ready()
        content = os.pread(fact["fd"], 4, 0).decode()
        self.note("ready", held=fact["fd"], content=content, lost=lost, session=os.getsid(0))
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exit":
            return 3
        while not (self._directory / "end").exists():
            if not (self._directory / "hang").exists():
                turn.beat()
            turn.look_around()
            time.sleep(BEAT_S)
        return 0

    def _get_stuck(self, call: str, path: str) -> None:
        """Have a thread in a call to a file that does not answer."""
        calls: dict[str, Callable[[int], object]] = {
            "fsync": os.fsync,
            "fdatasync": os.fdatasync,
            "pread": lambda descriptor: os.pread(descriptor, 1, 0),
            "pwrite": lambda descriptor: os.pwrite(descriptor, b"x", 0),
            "ftruncate": lambda descriptor: os.ftruncate(descriptor, 1),
        }
        descriptor = os.open(path, os.O_RDWR)
        threading.Thread(target=calls[call], args=(descriptor,), daemon=True).start()

    def _asked_to_end(self, number: int) -> None:
        self.note("signal", number=number)
        (self._directory / "end").touch()

    def run(self, kept: set[int]) -> int:
        """Be the family."""
        self.note("start", memory=self._memory.descriptor, upgraded=os.environ.get(UPGRADED, ""))
        plan = Plan(
            self.serve,
            self.prepare,
            self._memory,
            kept,
            lambda: self.note("on ready"),
            (self._directory / "over").exists,
            upgrade.Program(
                (sys.executable, "-m", self._behaviour.get("program", "tests.guardian.program")),
                (str(self._directory),),
            ),
            Limits(**self._behaviour.get("limits", {})),
        )
        os.environ[UPGRADED] = str(os.getpid())
        ending = guard(plan)
        modules = sorted(name for name in ("trio", "pyfuse3") if name in sys.modules)
        self.note(
            "ending",
            code=ending.code,
            ready=ending.ready,
            sentence=ending.sentence,
            number=ending.number,
            modules=modules,
            open=sorted(map(int, os.listdir("/proc/self/fd"))),
        )
        return ending.code


def main() -> int:
    """As the docstring of the module has it."""
    if sys.argv[1] == upgrade.CAN_RESUME:
        SharedMemory.attach(int(sys.argv[2]))
        return 0
    if sys.argv[1] == upgrade.RESUME:
        memory = SharedMemory.attach(int(sys.argv[2]))
        kept = memory.facts.get("kept")
        assert isinstance(kept, dict)
        upgrade.inherit({memory.descriptor, *kept["fds"], *memory.named_descriptors()}, False)
        return Program(Path(sys.argv[3]), memory).run(set(kept["fds"]))
    memory = SharedMemory.create()
    kept_fd = os.open("/dev/null", os.O_RDONLY)
    memory.facts.set("kept", {"fds": [kept_fd]})
    return Program(Path(sys.argv[1]), memory).run({kept_fd})


if __name__ == "__main__":
    sys.exit(main())
