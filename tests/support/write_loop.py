"""A program: write IMAGE, read back what was written, and sync, until the file STOP exists.

    python3 write_loop.py IMAGE STOP

It says "open" when the image is open, and in the end how many times it wrote. Any error ends it.
"""

from __future__ import annotations

import os
import sys

RECORD = 8
RECORDS = 64
_SYNC_EVERY = 16


def main(image: str, stop: str) -> int:
    """Write until told to stop; how many times it was."""
    fd = os.open(image, os.O_RDWR)
    number = 0
    print("open", flush=True)
    while not os.path.exists(stop):
        data = b"%08d" % number
        at = RECORD * (number % RECORDS)
        written = os.pwrite(fd, data, at)
        found = os.pread(fd, RECORD, at)
        if written != RECORD or found != data:
            raise SystemExit(f"wrote {written} bytes of {data!r} at {at}, read {found!r}")
        if number % _SYNC_EVERY == 0:
            os.fsync(fd)
        number += 1
    os.close(fd)
    return number


if __name__ == "__main__":
    print(main(sys.argv[1], sys.argv[2]))
