"""A file system with one file whose storage can be told to hang or to fail: lease areas on sick storage.

Run as a program with BACKING MOUNTPOINT MODE: the file `area` at MOUNTPOINT is BACKING. The file MODE says
how its reads and writes go: "ok"; "hang": they wait until that changes, and then are done; "eio": they fail.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

POLL_S = 0.02
START_S = 20.0
NAME = b"area"
INODE = 2


@dataclass
class FaultyStorage:
    """A running one: `area` is the path of its file."""

    area: Path
    mode: Path

    def set(self, mode: str) -> None:
        """How reads and writes go from now on."""
        passing = self.mode.with_suffix(".new")
        passing.write_text(mode)
        passing.rename(self.mode)


@contextlib.contextmanager
def faulty(backing: Path, base: Path) -> Iterator[FaultyStorage]:
    """A faulty file system at `base/faulty` over the file `backing`, "ok" at first and in the end."""
    point = base / "faulty"
    point.mkdir()
    storage = FaultyStorage(point / "area", base / "faulty.mode")
    storage.set("ok")
    with open(base / "faulty.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.faulty", str(backing), str(point), str(storage.mode)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        end = time.monotonic() + START_S
        while not storage.area.exists():
            if process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"no faulty storage: {(base / 'faulty.log').read_text()}")
            time.sleep(POLL_S)
        yield storage
    finally:
        storage.set("ok")
        subprocess.run(["umount", "-l", str(point)], check=False)
        process.send_signal(signal.SIGTERM)
        process.wait(START_S)


def _serve(backing: str, mountpoint: str, mode: str) -> None:
    import pyfuse3
    import trio

    file = os.open(backing, os.O_RDWR)

    class Files(pyfuse3.Operations):
        async def _turn(self) -> None:
            while (now := Path(mode).read_text()) == "hang":
                await trio.sleep(POLL_S)
            if now == "eio":
                raise pyfuse3.FUSEError(errno.EIO)

        async def getattr(self, inode: int, ctx: object = None) -> pyfuse3.EntryAttributes:
            entry = pyfuse3.EntryAttributes()
            entry.st_ino = inode
            entry.attr_timeout = entry.entry_timeout = 3600
            entry.st_mode = stat.S_IFREG | 0o600 if inode == INODE else stat.S_IFDIR | 0o755
            entry.st_size = os.fstat(file).st_size if inode == INODE else 0
            entry.st_blksize = 4096
            return entry

        async def lookup(self, parent: int, name: bytes, ctx: object) -> pyfuse3.EntryAttributes:
            if name != NAME:
                raise pyfuse3.FUSEError(errno.ENOENT)
            return await self.getattr(INODE)

        async def open(self, inode: int, flags: int, ctx: object) -> pyfuse3.FileInfo:
            return pyfuse3.FileInfo(fh=file, direct_io=True)

        async def read(self, fh: int, offset: int, size: int) -> bytes:
            await self._turn()
            return os.pread(file, size, offset)

        async def write(self, fh: int, offset: int, data: bytes) -> int:
            await self._turn()
            return os.pwrite(file, data, offset)

        async def fsync(self, fh: int, datasync: bool) -> None:
            await self._turn()

        async def flush(self, fh: int) -> None: ...

        async def release(self, fh: int) -> None: ...

    pyfuse3.init(Files(), mountpoint, {"fsname=faulty"})
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    trio.run(pyfuse3.main)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
