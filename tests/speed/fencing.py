"""How long fencing takes: one open image, and a thousand at once, until nothing works through any handle.

Run as `python -m tests.speed.fencing [IMAGES]` as root. A process opens the images in passthrough and asks
the mount to fence; measured is from there until every handle was seen to fail. Prints milliseconds.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

from lockfs.mount import control
from tests.support.mounts import Mount, mounted

ROUNDS = 5
IMAGES = 1000


def _socket(mount: Mount) -> Path:
    return next(path for path in control.find_sockets() if path.name.endswith(f"-{mount.process.pid}.sock"))


def _until_dead(descriptor: int, value: bytes) -> None:
    while True:
        try:
            os.pwrite(descriptor, value, 0)
        except OSError:
            return


def fence(mount: Mount, names: list[str], question: control.Message) -> tuple[float, float]:
    """Seconds until every handle is dead, and until the leases are given back as well."""
    descriptors = [os.open(mount.path / name, os.O_RDWR) for name in names]
    answered: list[float] = []

    def ask() -> None:
        while not control.request(_socket(mount), question, 60).get("done"):
            pass
        answered.append(time.monotonic())

    asking = threading.Thread(target=ask)
    began = time.monotonic()
    asking.start()
    for descriptor in reversed(descriptors):
        _until_dead(descriptor, b"written")
    dead = time.monotonic()
    asking.join()
    for descriptor in descriptors:
        try:
            os.pread(descriptor, 1, 0)
        except OSError:
            pass
        else:
            raise AssertionError("a handle lives")
        try:
            os.close(descriptor)
        except OSError:
            continue
    return dead - began, answered[0] - began


def main(images: int) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory(prefix="lockfs-speed-") as base:
        store = Path(base) / "store"
        store.mkdir()
        names = [f"disk{number}" for number in range(images)]
        for name in names:
            (store / name).write_bytes(bytes(4096))
        with mounted(store, Path(base) / "mount", "io=passthrough") as mount:
            for label, some, question in (
                ("one image", names[:1], {"op": "fence", "path": names[0]}),
                (f"{images} images", names, {"op": "fence"}),
            ):
                times = [fence(mount, some, question) for _ in range(ROUNDS)]
                dead, given = zip(*times, strict=True)
                print(
                    f"{label}: dead after {1000 * statistics.median(dead):.0f} ms (at most "
                    f"{1000 * max(dead):.0f}), leases back after {1000 * statistics.median(given):.0f} ms"
                )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else IMAGES)
