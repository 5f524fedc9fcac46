"""A lease file on storage with O_DIRECT, disks over it that are closed, and calls that are let go."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import trio

from lockfs.storage.disk import DirectDisk

from .fakes import WAIT_S, FaultyIO

FILE_BYTES = 2 << 20

OpenDisk = Callable[..., Awaitable[DirectDisk]]


def worker_threads() -> set[threading.Thread]:
    """The threads of all disks."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("disk ")}


async def all_threads_ended() -> None:
    """Wait until the threads of all closed disks are gone, and with them their last work."""
    for thread in worker_threads():
        await trio.to_thread.run_sync(thread.join, WAIT_S)
    assert not worker_threads()


def descriptors_of(path: Path) -> int:
    """How many descriptors this process has of a file."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{name}") == str(path)
        except OSError:
            continue  # the one that listed the directory
    return found


@pytest.fixture
def lease_file(tmp_path: Path) -> Path:
    """2 MiB in which each 512 bytes hold their own number; skips where the file system has no O_DIRECT."""
    path = tmp_path / "leases"
    path.write_bytes(b"".join(number.to_bytes(4, "little") * 128 for number in range(FILE_BYTES // 512)))
    try:
        os.close(os.open(path, os.O_RDWR | os.O_DIRECT))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        pytest.skip("the file system of the temporary directory has no O_DIRECT")
    return path


@pytest.fixture
def faults() -> Iterator[FaultyIO]:
    """System calls that may fail; in the end none is held."""
    io = FaultyIO()
    yield io
    io.let_all_go()


@pytest.fixture
async def open_disk(lease_file: Path, faults: FaultyIO) -> AsyncIterator[OpenDisk]:
    """Opens the lease file with what the test says besides; closes all, and sees every thread end."""
    disks: list[DirectDisk] = []

    async def open_one(**options: object) -> DirectDisk:
        disk = await DirectDisk.open(str(lease_file), **options)  # type: ignore[arg-type]
        disks.append(disk)
        return disk

    yield open_one
    faults.let_all_go()
    for disk in disks:
        await disk.close()
    await all_threads_ended()
    assert descriptors_of(lease_file) == 0


def sector(number: int) -> bytes:
    """What the lease file has in one sector."""
    return number.to_bytes(4, "little") * 128
