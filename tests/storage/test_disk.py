"""A disk over a real file: whole transfers, errors of the kernel, and what the storage needs."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import trio

from lockfs.paxos.seams import Disk, DiskError, DiskTimeout
from lockfs.storage.disk import DirectDisk

from .conftest import FILE_BYTES, OpenDisk, descriptors_of, sector
from .fakes import FaultyIO

TIMEOUT_S = 60.0


async def test_reads_what_the_file_has(open_disk: OpenDisk, lease_file: Path) -> None:
    disk: Disk = await open_disk()
    assert disk.name == str(lease_file)
    assert await disk.read(512 * 3, 512, TIMEOUT_S) == sector(3)
    assert await disk.read(1 << 20, 1 << 20, TIMEOUT_S) == lease_file.read_bytes()[1 << 20 :]
    assert await disk.read(0, 2 << 20, TIMEOUT_S) == lease_file.read_bytes()


async def test_writes_just_these_bytes(open_disk: OpenDisk, lease_file: Path) -> None:
    before = lease_file.read_bytes()
    disk = await open_disk()
    await disk.write(1024, b"\xaa" * 512, TIMEOUT_S)
    assert lease_file.read_bytes() == before[:1024] + b"\xaa" * 512 + before[1536:]
    await disk.write(4096, b"\xbb" * (1 << 20), TIMEOUT_S)
    assert lease_file.read_bytes()[4096 : 4096 + (1 << 20)] == b"\xbb" * (1 << 20)
    assert lease_file.stat().st_size == FILE_BYTES


async def test_a_small_write_after_a_large_one_carries_nothing_of_it(
    open_disk: OpenDisk, lease_file: Path
) -> None:
    disk = await open_disk(places=1)
    await disk.write(0, b"\xcc" * 4096, TIMEOUT_S)
    await disk.write(8192, b"\xdd" * 512, TIMEOUT_S)
    assert lease_file.read_bytes()[8192 : 8192 + 1024] == b"\xdd" * 512 + sector(17)


async def test_many_at_once_each_get_their_own(open_disk: OpenDisk, lease_file: Path) -> None:
    disk = await open_disk(places=3)

    async def exchange(number: int) -> None:
        assert await disk.read(number * 512, 512, TIMEOUT_S) == sector(number)
        await disk.write(number * 512, sector(number + 7), TIMEOUT_S)
        assert await disk.read(number * 512, 512, TIMEOUT_S) == sector(number + 7)

    async with trio.open_nursery() as nursery:
        for number in range(100):
            nursery.start_soon(exchange, number)
    assert lease_file.read_bytes()[: 100 * 512] == b"".join(sector(number + 7) for number in range(100))


async def test_the_descriptor_is_uncached_stable_and_not_inherited(
    open_disk: OpenDisk, lease_file: Path
) -> None:
    await open_disk()
    flags = _open_flags(lease_file)
    assert flags & os.O_ACCMODE == os.O_RDWR
    assert flags & os.O_DIRECT
    assert flags & os.O_SYNC == os.O_DSYNC
    assert flags & os.O_CLOEXEC


def _open_flags(path: Path) -> int:
    for name in os.listdir("/proc/self/fd"):
        if os.path.realpath(f"/proc/self/fd/{name}") == str(path):
            lines = Path(f"/proc/self/fdinfo/{name}").read_text().splitlines()
            return int(dict(line.split(":", 1) for line in lines)["flags"], 8)
    raise AssertionError("not open")


async def test_sector_size_and_size(open_disk: OpenDisk, lease_file: Path) -> None:
    disk = await open_disk()
    assert disk.sector_size in (512, 4096)
    assert not disk.is_device
    assert await disk.size(TIMEOUT_S) == FILE_BYTES
    os.truncate(lease_file, 4096)
    assert await disk.size(TIMEOUT_S) == 4096


async def test_opened_below_a_directory_under_another_name(lease_file: Path) -> None:
    directory = os.open(lease_file.parent, os.O_PATH)
    try:
        disk = await DirectDisk.open("leases", directory=directory, name="/images/.leases")
    finally:
        os.close(directory)
    assert await disk.read(512, 512, TIMEOUT_S) == sector(1)
    with pytest.raises(DiskError, match=r"^Reading 512 bytes at byte 2097152 of /images/\.leases "):
        await disk.read(FILE_BYTES, 512, TIMEOUT_S)
    await disk.close()


async def test_read_only(open_disk: OpenDisk, lease_file: Path) -> None:
    disk = await open_disk(writable=False)
    assert await disk.read(0, 512, TIMEOUT_S) == sector(0)
    with pytest.raises(DiskError, match="opened for reading only") as caught:
        await disk.write(0, bytes(512), TIMEOUT_S)
    assert caught.value.number == errno.EBADF
    assert _open_flags(lease_file) & os.O_ACCMODE == os.O_RDONLY
    assert lease_file.read_bytes()[:512] == sector(0)


# --- refusals


async def test_a_read_past_the_end_is_short(open_disk: OpenDisk, lease_file: Path) -> None:
    disk = await open_disk()
    with pytest.raises(DiskError, match="ended after 4096 bytes") as caught:
        await disk.read(FILE_BYTES - 4096, 8192, TIMEOUT_S)
    assert caught.value.number == errno.EMSGSIZE
    assert str(lease_file) in str(caught.value)
    with pytest.raises(DiskError, match="ended after 0 bytes"):
        await disk.read(FILE_BYTES, 4096, TIMEOUT_S)


async def test_a_short_write_is_an_error(open_disk: OpenDisk, faults: FaultyIO) -> None:
    disk = await open_disk(io=faults)
    faults.answer("pwritev", 256)
    with pytest.raises(DiskError, match=r"^Writing 512 bytes .* ended after 256 bytes\.$") as caught:
        await disk.write(1024, bytes(512), TIMEOUT_S)
    assert caught.value.number == errno.EMSGSIZE


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.ESTALE, errno.EREMOTEIO])
@pytest.mark.parametrize("call", ["preadv", "pwritev"])
async def test_an_errno_is_passed_on_with_a_sentence(
    open_disk: OpenDisk, lease_file: Path, faults: FaultyIO, call: str, number: int
) -> None:
    disk = await open_disk(io=faults)
    faults.answer(call, OSError(number, os.strerror(number)))
    with pytest.raises(DiskError) as caught:
        await (disk.read(0, 512, TIMEOUT_S) if call == "preadv" else disk.write(0, bytes(512), TIMEOUT_S))
    doing = "Reading" if call == "preadv" else "Writing"
    assert not isinstance(caught.value, DiskTimeout)
    assert caught.value.number == number
    assert str(caught.value) == f"{doing} 512 bytes at byte 0 of {lease_file} failed: {os.strerror(number)}."
    assert disk.stuck == 0


async def test_a_server_that_was_given_up_may_still_write(open_disk: OpenDisk, faults: FaultyIO) -> None:
    disk = await open_disk(io=faults)
    faults.answer("pwritev", OSError(errno.ETIMEDOUT, "Connection timed out"))
    with pytest.raises(DiskTimeout, match="failed: Connection timed out"):
        await disk.write(0, bytes(512), TIMEOUT_S)


async def test_an_impossible_offset_is_refused_by_the_kernel(open_disk: OpenDisk) -> None:
    disk = await open_disk()
    with pytest.raises(DiskError, match="Invalid argument") as caught:
        await disk.read(-512, 512, TIMEOUT_S)
    assert caught.value.number == errno.EINVAL


async def test_after_closing_every_call_is_refused(open_disk: OpenDisk, lease_file: Path) -> None:
    disk = await open_disk()
    await disk.close()
    assert descriptors_of(lease_file) == 0
    for call in (
        disk.read(0, 512, TIMEOUT_S),
        disk.write(0, bytes(512), TIMEOUT_S),
        disk.size(TIMEOUT_S),
    ):
        with pytest.raises(DiskError, match="is not possible: it is closed") as caught:
            await call
        assert caught.value.number == errno.EBADF
    await disk.close()


async def test_a_defect_is_not_hidden(open_disk: OpenDisk) -> None:
    disk = await open_disk()
    with pytest.raises(TypeError):
        await disk.read("0", 512, TIMEOUT_S)  # type: ignore[arg-type]
    assert await disk.read(0, 512, TIMEOUT_S) == sector(0)
