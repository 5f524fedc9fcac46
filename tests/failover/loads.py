"""Programs that work on a mount and notice everything that is not as it should be.

    python -m tests.failover.loads LOAD --directory D --board FILE --slot N --record FILE [--bare D]

Each load is a process of its own that works in a directory of its own, which only it changes, so that it
knows what every request must answer: a name that was made exists, is not there twice, a removed one is gone,
a file holds what was written. A request that was done twice, or not at all, shows as EEXIST, ENOENT or as a
difference. After an error a load begins anew in a fresh directory.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from tests.failover.recording import FAILED, READY, Board, Recorder, Wrong

PACE_S = 0.2
"""A load rests so long between two steps on average; all loads together must leave the machine idle time."""
ERROR_REST_S = 0.1
HELD = "held"
"""Below a load's directory: the images that it has open for writing from READY to the end."""


class Load(ABC):
    """One program. `directory` exists and is its own; `bare` is a directory outside the mounts."""

    timed: ClassVar[bool] = True
    paced: ClassVar[bool] = True
    seeds: ClassVar[int] = 0
    """How many images of `seed_bytes` it finds below HELD, made before the mount was."""
    seed_bytes: ClassVar[int] = 1 << 20

    @classmethod
    def seed(cls, directory: Path) -> list[Path]:
        """Make its directory and what it finds there, in the store; returns the images that it will hold."""
        (directory / HELD).mkdir(parents=True)
        paths = [directory / HELD / f"{number}.img" for number in range(cls.seeds)]
        for path in paths:
            with open(path, "wb") as file:
                file.truncate(cls.seed_bytes)
        return paths

    def __init__(self, directory: Path, bare: Path, recorder: Recorder) -> None:
        self.directory = directory
        self.bare = bare
        self.recorder = recorder
        self.call = recorder.call
        self.random = random.Random(type(self).__name__)
        self.turn = 0

    @abstractmethod
    def prepare(self) -> None:
        """Begin: open and make what the steps need. After an error it is called again."""

    @abstractmethod
    def step(self) -> None:
        """Do something and see that it was done."""

    def finish(self) -> None:  # noqa: B027  (most loads have nothing more to do)
        """The last checks; closes everything."""

    def abandon(self) -> None:
        """After an error: let go of everything, whatever state it is in."""
        self.turn += 1

    # --- what the loads do alike

    def place(self, name: str) -> Path:
        """A path in the directory of this turn."""
        return self.directory / f"turn{self.turn}" / name

    def make_turn(self) -> None:
        """Make the directory of this turn."""
        self.call("mkdir", os.mkdir, self.place("x").parent)

    def demand(self, condition: object, what: str) -> None:
        """Raise Wrong with `what` unless the condition holds."""
        if not condition:
            raise Wrong(what)

    def same(self, found: object, wanted: object, what: str) -> None:
        """Raise Wrong unless both are equal."""
        if found != wanted:
            raise Wrong(f"{what}: is {_short(found)}, must be {_short(wanted)}")

    def write(self, path: Path, content: bytes, flags: int) -> None:
        """Open, write at the beginning, close."""
        descriptor = self.call("open", os.open, path, os.O_WRONLY | flags, 0o644)
        with self.closing(descriptor):
            self.same(self.call("write", os.pwrite, descriptor, content, 0), len(content), "bytes written")

    def read(self, path: Path, length: int) -> bytes:
        """Open, read from the beginning, close."""
        descriptor = self.call("open", os.open, path, os.O_RDONLY)
        with self.closing(descriptor):
            return self.call("read", os.pread, descriptor, length, 0)

    @contextlib.contextmanager
    def closing(self, descriptor: int) -> Iterator[None]:
        """Close at the end of the block; a close that fails is an error too."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            raise
        self.call("close", os.close, descriptor)

    def absent(self, path: Path) -> None:
        """Demand that there is no such name."""
        try:
            self.call("stat", os.lstat, path)
        except FileNotFoundError:
            return
        raise Wrong(f"{path.name} is there")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}… ({len(text)} characters)"


def run(load: Load, board: Board) -> None:
    """Work until the board says stop, or too many errors came."""
    row = load.recorder.row
    go_on = True
    prepared = False
    while go_on and not (board.stopping and prepared):
        try:
            if not prepared:
                load.prepare()
                prepared = True
                row.state = READY
            else:
                load.step()
                if load.paced:
                    time.sleep(load.random.uniform(0, 2 * PACE_S))
        except (OSError, Wrong) as error:
            go_on = _complain(load, error) and not board.stopping
            load.abandon()
            prepared = False
            time.sleep(ERROR_REST_S)
    if prepared:
        try:
            load.finish()
        except (OSError, Wrong) as error:
            _complain(load, error)


def _complain(load: Load, error: Exception) -> bool:
    where = traceback.extract_tb(error.__traceback__)
    lines = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in where[-3:]]
    notes = "; ".join(getattr(error, "__notes__", []))
    return load.recorder.fault(f"{error!r} {notes} ({' < '.join(reversed(lines))})")


def main() -> int:
    """The command."""
    from tests.failover import catalogue

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("load", choices=sorted(catalogue.LOADS))
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--bare", type=Path, required=True)
    parser.add_argument("--board", type=Path, required=True)
    parser.add_argument("--slot", type=int, required=True)
    parser.add_argument("--record", type=Path, required=True)
    arguments = parser.parse_args()
    board = Board(arguments.board)
    kind = catalogue.LOADS[arguments.load]
    recorder = Recorder(arguments.load, board.row(arguments.slot), timed=kind.timed)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    load = kind(arguments.directory, arguments.bare, recorder)
    try:
        run(load, board)
    except SystemExit:
        load.abandon()
        raise
    except BaseException as error:
        recorder.fault(f"the load itself failed: {error!r}")
        recorder.row.state = FAILED
        raise
    finally:
        recorder.record.write(arguments.record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
