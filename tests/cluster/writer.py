"""Runs in a guest: opens an image for writing as soon as it is allowed, and writes its term's records.

    writer.py IMAGE HOST TERM STATUS

It keeps the one handle for ever and repeats a write that fails, like a guest that is continued again and
again and never learns. STATUS is a file with what it did so far, as JSON; the file STATUS.stop ends it.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import time
from typing import Any

import witness

RETRY_S = 0.1
PAUSE_S = 0.002
_STATUS_BYTES = 512


def _boot() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Status:
    """What is told to the test. Rewritten in place: one write, always of one length."""

    def __init__(self, path: str) -> None:
        self.values: dict[str, Any] = {"state": "waiting", "number": 0, "errors": {}}
        self.stop = path + ".stop"
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self.tell()

    def tell(self, **values: Any) -> None:
        """Change some values."""
        self.values |= values
        os.pwrite(self._descriptor, json.dumps(self.values).encode().ljust(_STATUS_BYTES), 0)

    def failed(self, error: OSError, during: str) -> None:
        """Count an error."""
        name = f"{during} {error.errno}"
        errors = self.values["errors"]
        self.tell(errors={**errors, name: errors.get(name, 0) + 1}, failed_at=_boot())

    def stopped(self) -> bool:
        """Whether the test wants no more."""
        return os.path.exists(self.stop)


def open_image(path: str, status: Status) -> int | None:
    """Open for writing; None when told to stop."""
    while not status.stopped():
        try:
            return os.open(path, os.O_RDWR | os.O_DIRECT | os.O_DSYNC)
        except OSError as error:
            status.failed(error, "open")
        time.sleep(RETRY_S)
    return None


def seen_before(path: str, term: int) -> int:
    """How many records of the term before have landed."""
    if term == 1:
        return 0
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return max(witness.records(descriptor, term - 1), default=0)
    finally:
        os.close(descriptor)


def write(descriptor: int, host: str, term: int, seen: int, status: Status) -> None:
    """Write records until told to stop, or until the region is full."""
    buffer = mmap.mmap(-1, witness.BLOCK)
    number = 1
    while number <= witness.REGION_BLOCKS and not status.stopped():
        buffer[:] = witness.encode(witness.Record(host, term, number, seen, _boot()))
        try:
            os.pwritev(descriptor, [buffer], witness.place(term, number))
        except OSError as error:
            status.failed(error, "write")
            status.tell(failing=True)
            time.sleep(RETRY_S)
            continue
        status.tell(number=number, acknowledged_at=_boot(), failing=False)
        number += 1
        time.sleep(PAUSE_S)


def main() -> None:
    """Run as the module says."""
    path, host, term, status = sys.argv[1], sys.argv[2], int(sys.argv[3]), Status(sys.argv[4])
    descriptor = open_image(path, status)
    if descriptor is None:
        status.tell(state="ended")
        return
    opened_at = _boot()
    seen = seen_before(path, term)
    status.tell(state="writing", opened_at=opened_at, seen_before=seen)
    write(descriptor, host, term, seen, status)
    status.tell(state="ended")
    os.close(descriptor)


if __name__ == "__main__":
    main()
