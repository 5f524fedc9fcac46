"""Many processes open one image for writing through several mounts, and a witness watches for two at a time.

    python -m tests.suites.contention --rounds 10000 --image NAME --witness DIRECTORY MOUNT...

The witness knows nothing of locks: who has the image creates a file with O_EXCL in the witness directory,
on the bare disk, and removes it before closing the image. Whoever finds it there already is a second writer.
Beside it, each writer stamps the image and must find its stamp unchanged a moment later. Prints JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import mmap
import os
import random
import signal
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path

PROCESSES = 64
DEADLINE_S = 600.0
HOLD_S = 0.0005
LOSER_PAUSE_S = 0.1

# Counters in memory that all processes share; each process writes its own row only.
_ROW = struct.Struct("=QQQQQQ")
_GO = struct.Struct("=Q")


@dataclass
class Row:
    """What one process counted."""

    wins: int = 0
    refusals: int = 0
    second_writers: int = 0
    foreign_stamps: int = 0
    errors: int = 0
    last_error: int = 0

    def pack(self) -> bytes:
        """The row as it lies in the shared memory."""
        return _ROW.pack(
            self.wins,
            self.refusals,
            self.second_writers,
            self.foreign_stamps,
            self.errors,
            self.last_error,
        )


class Contender:
    """One process: opens, and while it has the image, testifies."""

    def __init__(self, number: int, image: Path, witness: Path) -> None:
        self._number = number
        self._image = image
        self._witness = witness / "writer"
        self._random = random.Random(number)
        self.row = Row()

    def attempt(self) -> None:
        """Open once; count what came of it."""
        try:
            descriptor = os.open(self._image, os.O_RDWR)
        except OSError as error:
            if error.errno == errno.EBUSY:
                self.row.refusals += 1
                time.sleep(self._random.uniform(0, LOSER_PAUSE_S))
            else:
                self.row.errors += 1
                self.row.last_error = error.errno or 0
            return
        try:
            self._testify(descriptor)
            self.row.wins += 1
        finally:
            os.close(descriptor)

    def _testify(self, descriptor: int) -> None:
        try:
            os.close(os.open(self._witness, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            self.row.second_writers += 1
        stamp = struct.pack("=QQ", self._number, self.row.wins)
        os.pwrite(descriptor, stamp, 0)
        time.sleep(self._random.uniform(0, HOLD_S))
        if os.pread(descriptor, len(stamp), 0) != stamp:
            self.row.foreign_stamps += 1
        with contextlib.suppress(FileNotFoundError):
            self._witness.unlink()


def _contend(number: int, contender: Contender, memory: mmap.mmap, rounds: int) -> None:
    place = _GO.size + number * _ROW.size
    deadline = time.monotonic() + DEADLINE_S
    while not _GO.unpack_from(memory)[0]:
        time.sleep(0.001)
    while time.monotonic() < deadline and contender.row.errors == 0:
        contender.attempt()
        memory[place : place + _ROW.size] = contender.row.pack()
        if contender.row.wins + contender.row.refusals & 7 == 0 and _wins(memory) >= rounds:
            return


def _rows(memory: mmap.mmap) -> list[Row]:
    return [Row(*_ROW.unpack_from(memory, _GO.size + number * _ROW.size)) for number in range(PROCESSES)]


def _wins(memory: mmap.mmap) -> int:
    return sum(row.wins for row in _rows(memory))


def contend(mounts: list[Path], image: str, witness: Path, rounds: int) -> dict[str, object]:
    """Let PROCESSES processes, spread over the mounts, have the image `rounds` times in all."""
    memory = mmap.mmap(-1, _GO.size + PROCESSES * _ROW.size)
    children = []
    for number in range(PROCESSES):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                _contend(
                    number, Contender(number, mounts[number % len(mounts)] / image, witness), memory, rounds
                )
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    begun = time.monotonic()
    _GO.pack_into(memory, 0, 1)
    try:
        ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    except KeyboardInterrupt:
        for child in children:
            os.kill(child, signal.SIGKILL)
        raise
    rows = _rows(memory)
    by_mount = [sum(row.wins for row in rows[index :: len(mounts)]) for index in range(len(mounts))]
    return {
        "wins": sum(by_mount),
        "wins by mount": by_mount,
        "refusals": sum(row.refusals for row in rows),
        "second writers": sum(row.second_writers for row in rows),
        "foreign stamps": sum(row.foreign_stamps for row in rows),
        "errors": sorted({errno.errorcode[row.last_error] for row in rows if row.errors}),
        "crashed": sum(code != 0 for code in ends),
        "seconds": round(time.monotonic() - begun, 1),
    }


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10_000)
    parser.add_argument("--image", required=True, help="its name below each mount; it exists")
    parser.add_argument("--witness", type=Path, required=True, help="an empty directory outside the mounts")
    parser.add_argument("mounts", nargs="+", type=Path)
    arguments = parser.parse_args()
    print(json.dumps(contend(arguments.mounts, arguments.image, arguments.witness, arguments.rounds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
