"""A file system with one file that begins calls and answers them only when it is told to.

    python -m tests.guardian.slow_file MOUNTPOINT DIRECTORY

Each call that begins adds a line with its name to DIRECTORY/begun. It is answered once DIRECTORY/go exists;
until then the caller's thread sleeps uninterruptibly, as over a disk that is busy (fs/fuse/dev.c,
request_wait_answer). Ends when it is unmounted, or by SIGTERM.
"""

from __future__ import annotations

import errno
import signal
import stat
import sys
from pathlib import Path

import pyfuse3
import trio

NAME = b"file"
_INODE = pyfuse3.InodeT(2)
_LOOK_S = 0.005


class SlowFile(pyfuse3.Operations):
    """The file system."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory

    async def _answer_late(self, name: str) -> None:
        with open(self._directory / "begun", "a") as begun:
            begun.write(name + "\n")
        while not (self._directory / "go").exists():
            await trio.sleep(_LOOK_S)

    async def getattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext | None = None
    ) -> pyfuse3.EntryAttributes:
        """Of the root or the file."""
        attributes = pyfuse3.EntryAttributes()
        attributes.st_ino = inode
        attributes.st_mode = stat.S_IFDIR | 0o755 if inode == pyfuse3.ROOT_INODE else stat.S_IFREG | 0o644
        attributes.st_size = 0 if inode == pyfuse3.ROOT_INODE else 4096
        return attributes

    async def setattr(
        self,
        inode: pyfuse3.InodeT,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: pyfuse3.FileHandleT | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """Late, and without effect."""
        await self._answer_late("ftruncate")
        return await self.getattr(inode)

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Of the file alone."""
        if name != NAME:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(_INODE)

    async def open(
        self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        """Without the page cache: each call comes here."""
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(1), direct_io=True)

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        """Late."""
        await self._answer_late("pread")
        return bytes(size)

    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        """Late."""
        await self._answer_late("pwrite")
        return len(buf)

    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        """Late."""
        await self._answer_late("fdatasync" if datasync else "fsync")

    async def flush(self, fh: pyfuse3.FileHandleT) -> None:
        """At once."""


def main() -> None:
    """Serve."""
    mountpoint, directory = sys.argv[1:]
    pyfuse3.init(SlowFile(Path(directory)), mountpoint, {"fsname=lockfs-test-slow"})
    signal.signal(signal.SIGTERM, lambda number, frame: pyfuse3.terminate())
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close()


if __name__ == "__main__":
    main()
