"""Runs pyfuse3's own passthrough example so that its data path can be compared.

The example is used as it is but for what kept it from being measured: every open is answered with direct_io
(or the kernel's cache would serve the reads) and has a descriptor of its own (the example gives every open
the first one's, whatever that was for), O_DIRECT requests go through aligned memory (the example
hands unaligned buffers to the disk and gets EINVAL), errors of reads and writes are answers (the example
ends), and fsync is served (the example has none, so that the kernel takes every fsync for done).

Arguments: path of passthroughfs.py, source, mount point.
"""

from __future__ import annotations

import errno
import importlib.util
import mmap
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import pyfuse3
import trio

T = TypeVar("T")


def _load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("passthroughfs", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _read(descriptor: int, offset: int, size: int) -> bytes:
    # As the example does it.
    os.lseek(descriptor, offset, os.SEEK_SET)
    return os.read(descriptor, size)


def _write(descriptor: int, offset: int, data: bytes) -> int:
    os.lseek(descriptor, offset, os.SEEK_SET)
    return os.write(descriptor, data)


def _served(call: Callable[..., T], *arguments: object) -> T:
    """A system call whose error is the answer to the request."""
    try:
        return call(*arguments)
    except OSError as error:
        raise pyfuse3.FUSEError(error.errno or errno.EIO) from error


def _operations(example: ModuleType) -> type[Any]:
    base: type[Any] = example.Operations

    class Direct(base):  # type: ignore[misc]
        """The example with direct_io and aligned memory."""

        def __init__(self, source: str) -> None:
            super().__init__(source)
            self._own: set[int] = set()
            self._aligned: set[int] = set()
            self._memory = mmap.mmap(-1, 4 << 20)

        async def open(self, inode: int, flags: int, ctx: object) -> Any:
            fh = _served(os.open, self._inode_to_path(inode), flags)
            self._own.add(fh)
            if flags & os.O_DIRECT:
                self._aligned.add(fh)
            info = pyfuse3.FileInfo(fh=fh)
            info.direct_io = True
            return info

        async def release(self, fh: int) -> None:
            if fh not in self._own:
                await super().release(fh)
                return
            self._own.discard(fh)
            self._aligned.discard(fh)
            os.close(fh)

        async def read(self, fh: int, off: int, size: int) -> bytes:
            if fh not in self._aligned:
                return _served(_read, fh, off, size)
            with memoryview(self._memory) as view, view[:size] as part:
                return bytes(part[: _served(os.preadv, fh, [part], off)])

        async def write(self, fh: int, off: int, buf: bytes) -> int:
            if fh not in self._aligned:
                return _served(_write, fh, off, buf)
            with memoryview(self._memory) as view, view[: len(buf)] as part:
                part[:] = buf
                return _served(os.pwritev, fh, [part], off)

        async def fsync(self, fh: int, datasync: bool) -> None:
            _served(os.fdatasync if datasync else os.fsync, fh)

    return Direct


def main() -> None:
    """Mount and serve until unmounted."""
    path, source, mountpoint = sys.argv[1:]
    example = _load(path)
    options = set(pyfuse3.default_options) | {"fsname=passthroughfs"}
    pyfuse3.init(_operations(example)(source), mountpoint, options)
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close()


if __name__ == "__main__":
    main()
