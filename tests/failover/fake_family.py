"""A family of processes that looks like lockfs's and repairs itself like it, and serves nothing.

    python -m tests.failover.fake_family LIBRARY [--fault FAULT]

It stands in for lockfs where the harness itself is tested. LIBRARY is a file whose name contains "pyfuse3",
which worker and spare map, as the real ones map the library. It prints "serves" once the family is
complete. Faults: "abandons" replaces nobody; "leaks" opens a descriptor with every repair; "unburied" never
collects its dead. A SIGTERM to the eldest guardian, or to a twin that took its place, ends all.
"""

from __future__ import annotations

import argparse
import mmap
import os
import select
import signal
import struct
import sys
import threading
import time
from pathlib import Path

BEAT_S = 0.05
LIMIT_S = 1.0
_WORDS = struct.Struct("=dqqqq")  # heartbeat, worker, spare, twin, ending


class Family:
    """What all members share: one page of memory."""

    def __init__(self, library: Path, fault: str) -> None:
        self._library = library
        self._fault = fault
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)

    def _read(self) -> list[float]:
        return list(_WORDS.unpack_from(self._memory))

    def _put(self, place: int, value: float) -> None:
        struct.pack_into("=d" if place == 0 else "=q", self._memory, place * 8, value)

    def guard(self) -> None:
        """Be the guardian until the family is told to end."""
        signal.signal(signal.SIGTERM, lambda *_: self._put(4, 1))
        self._fork_twin()
        if not self._alive(int(self._read()[1])):
            self._fork_server(1)
        if not self._alive(int(self._read()[2])):
            self._fork_server(2)
        print("serves", flush=True)
        while not self._read()[4]:
            self._look()
            time.sleep(BEAT_S / 5)
        for place in (1, 2, 3):
            pid = int(self._read()[place])
            if self._alive(pid):
                os.kill(pid, signal.SIGKILL)
        self._collect()

    def _look(self) -> None:
        if self._fault != "unburied":
            self._collect()
        heartbeat, worker, spare, twin, _ = self._read()
        if self._fault == "abandons":
            return
        if time.monotonic() - heartbeat > LIMIT_S and self._alive(int(worker)):
            os.kill(int(worker), signal.SIGKILL)
        if not self._alive(int(worker)):
            if self._fault == "leaks":
                os.open("/dev/null", os.O_RDONLY)
            self._put(0, time.monotonic())
            self._put(1, spare)
            self._fork_server(2)
        if not self._alive(int(twin)):
            self._fork_twin()

    @staticmethod
    def _collect() -> None:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return

    @staticmethod
    def _alive(pid: int) -> bool:
        try:
            return pid > 0 and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        except OSError:
            return False

    def _fork_twin(self) -> None:
        guardian = os.getpid()
        pid = os.fork()
        if pid:
            self._put(3, pid)
            return
        watch = os.pidfd_open(guardian)
        select.select([watch], [], [])
        os.close(watch)
        self.guard()
        os._exit(0)

    def _fork_server(self, place: int) -> None:
        """Fork a worker (1) or a spare (2), which is one once the memory says so."""
        pid = os.fork()
        if pid:
            self._put(place, pid)
            if place == 1:
                self._put(0, time.monotonic())
            return
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with open(self._library, "rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        while int(self._read()[1]) != os.getpid():
            time.sleep(BEAT_S / 5)
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        while True:
            self._put(0, time.monotonic())
            time.sleep(BEAT_S)
            if mapping.closed:
                os._exit(1)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("library", type=Path)
    parser.add_argument("--fault", default="", choices=("", "abandons", "leaks", "unburied"))
    arguments = parser.parse_args()
    Family(arguments.library, arguments.fault).guard()
    return 0


if __name__ == "__main__":
    sys.exit(main())
