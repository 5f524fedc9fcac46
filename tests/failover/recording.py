"""What a load records while it works: every request's times, what went wrong, and whether it is alive.

Loads are processes of their own. What must be known of them at any moment lies in memory that they share
with the harness (`Board`); what is only evaluated at the end is written to files (`Record`). All times are
CLOCK_MONOTONIC in nanoseconds, which is one clock for all processes of a machine.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

ERRORS_MAX = 50
"""A load that met so many errors ends."""
SLOTS_MAX = 64
_WORDS = 6
_WORD = struct.Struct("=Q")
_STATE, _BEGUN, _SERVED, _COUNT, _ERRORS = range(5)
STARTING, READY, FAILED = 0, 1, 2

P = ParamSpec("P")
R = TypeVar("R")


class Wrong(Exception):
    """What a load read is not what it wrote; the text says what differs."""


class Board:
    """Words shared by the harness and its loads: one to stop all, and a row for each load.

    Each word is written by one process, whole.
    """

    def __init__(self, path: Path, *, create: bool = False) -> None:
        """Map the file; `create` makes it."""
        size = (1 + SLOTS_MAX * _WORDS) * _WORD.size
        making = os.O_CREAT | os.O_EXCL if create else 0
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | making, 0o600)
        try:
            if create:
                os.ftruncate(descriptor, size)
            self._memory = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Unmap."""
        self._memory.close()

    def _get(self, word: int) -> int:
        return int(_WORD.unpack_from(self._memory, word * _WORD.size)[0])

    def _set(self, word: int, value: int) -> None:
        _WORD.pack_into(self._memory, word * _WORD.size, value)

    @property
    def stopping(self) -> bool:
        """Whether the loads shall end."""
        return self._get(0) != 0

    def stop(self) -> None:
        """Tell the loads to end."""
        self._set(0, 1)

    def row(self, slot: int) -> Row:
        """A load's row."""
        return Row(self, 1 + slot * _WORDS)


class Row:
    """One load's words."""

    def __init__(self, board: Board, first: int) -> None:
        self._board = board
        self._first = first

    def _word(self, which: int) -> int:
        return self._board._get(self._first + which)

    def _put(self, which: int, value: int) -> None:
        self._board._set(self._first + which, value)

    @property
    def state(self) -> int:
        """STARTING, READY or FAILED."""
        return self._word(_STATE)

    @state.setter
    def state(self, value: int) -> None:
        self._put(_STATE, value)

    @property
    def begun(self) -> int:
        """When the request that is under way began; 0: none is."""
        return self._word(_BEGUN)

    @property
    def served(self) -> int:
        """When the youngest request that was answered had begun."""
        return self._word(_SERVED)

    @property
    def count(self) -> int:
        """How many requests were answered."""
        return self._word(_COUNT)

    @property
    def errors(self) -> int:
        """How many errors the load has met."""
        return self._word(_ERRORS)

    def enter(self, now: int) -> None:
        """A request begins."""
        self._put(_BEGUN, now)

    def leave(self, begun: int) -> None:
        """It was answered."""
        self._put(_BEGUN, 0)
        self._put(_SERVED, begun)
        self._put(_COUNT, self.count + 1)

    def wrong(self) -> None:
        """One more error."""
        self._put(_BEGUN, 0)
        self._put(_ERRORS, self.errors + 1)


@dataclass(frozen=True)
class Request:
    """One request of a client: what it did, when it asked and when it had its answer."""

    load: str
    what: str
    begun: int
    ended: int

    @property
    def ms(self) -> float:
        """How long it took, in milliseconds."""
        return (self.ended - self.begun) / 1e6


@dataclass(frozen=True)
class Fault:
    """Something that a client must never see."""

    load: str
    at: int
    what: str


@dataclass
class Record:
    """Everything one load did. Written by the load, read by the harness."""

    load: str
    requests: list[Request] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write it to `path` and, the requests, beside it; whole or not at all."""
        kinds = sorted({request.what for request in self.requests})
        places = {what: place for place, what in enumerate(kinds)}
        numbers = array("Q")
        for request in self.requests:
            numbers.extend((places[request.what], request.begun, request.ended))
        path.with_suffix(".requests").write_bytes(numbers.tobytes())
        faults = [(fault.at, fault.what) for fault in self.faults]
        made = json.dumps({"load": self.load, "kinds": kinds, "faults": faults, "facts": self.facts})
        scratch = path.with_suffix(".new")
        scratch.write_text(made)
        scratch.replace(path)

    @classmethod
    def read(cls, path: Path) -> Record:
        """Read what `write` wrote. Raises FileNotFoundError if the load never came to its end."""
        made = json.loads(path.read_text())
        numbers = array("Q")
        numbers.frombytes(path.with_suffix(".requests").read_bytes())
        load, kinds = made["load"], made["kinds"]
        requests = [
            Request(load, kinds[numbers[at]], numbers[at + 1], numbers[at + 2])
            for at in range(0, len(numbers), 3)
        ]
        return cls(load, requests, [Fault(load, at, what) for at, what in made["faults"]], made["facts"])


class Recorder:
    """Times a load's requests. One thread uses it."""

    def __init__(self, load: str, row: Row, *, timed: bool = True) -> None:
        self.row = row
        self.record = Record(load)
        self._timed = timed

    def call(self, what: str, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Do one request; its time counts whether or not it fails."""
        begun = time.monotonic_ns()
        self.row.enter(begun)
        try:
            result = function(*args, **kwargs)
        except OSError as error:
            self._add(what, begun)
            self.row.enter(0)
            error.add_note(f"in {what} that began at {begun} and took {_ms_since(begun):.1f} ms")
            raise
        self._add(what, begun)
        self.row.leave(begun)
        return result

    def _add(self, what: str, begun: int) -> None:
        if self._timed:
            self.record.requests.append(Request(self.record.load, what, begun, time.monotonic_ns()))

    def fault(self, what: str) -> bool:
        """Count an error; False: it was the last one that the load may meet."""
        self.record.faults.append(Fault(self.record.load, time.monotonic_ns(), what))
        self.row.wrong()
        return len(self.record.faults) < ERRORS_MAX


def _ms_since(begun: int) -> float:
    return (time.monotonic_ns() - begun) / 1e6
