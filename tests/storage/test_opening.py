"""Opening: what is refused with which words, and which sectors the storage takes."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from lockfs.errors import SetupError
from lockfs.storage.alignment import SECTOR_SIZES, tried_alignment
from lockfs.storage.disk import DirectDisk
from lockfs.storage.rawio import Kernel

from .conftest import FILE_BYTES, all_threads_ended, sector
from .fakes import FaultyIO

TIMEOUT_S = 60.0


async def refusal(path: str | Path, **options: object) -> str:
    """What the user is told; nothing stays open and no thread stays."""
    with pytest.raises(SetupError) as caught:
        await DirectDisk.open(str(path), **options)  # type: ignore[arg-type]
    await all_threads_ended()
    return str(caught.value)


async def test_missing(tmp_path: Path) -> None:
    path = tmp_path / "none"
    expected = f"{path} does not exist; check the path, or prepare it with lockfsctl init."
    assert await refusal(path) == expected
    assert await refusal(path / "below") == expected.replace("none", "none/below")


async def test_neither_file_nor_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/null")):
        assert (await refusal(path)).startswith(f"{path} is neither a file nor a block device; ")


async def test_no_o_direct() -> None:
    path = "/proc/self/comm"
    assert (await refusal(path)).startswith(f"{path} lies on a file system without O_DIRECT, ")


@pytest.mark.parametrize(("writable", "access"), [(True, "read and write"), (False, "read")])
async def test_no_permission(lease_file: Path, writable: bool, access: str) -> None:
    lease_file.chmod(0)
    if os.geteuid() == 0:
        sentence = _as_nobody(lease_file, writable)
    else:
        sentence = await refusal(lease_file, writable=writable)
    assert sentence == (
        f"{lease_file} cannot be opened: Permission denied; let the user of lockfs {access} it."
    )


def _as_nobody(path: Path, writable: bool) -> str:
    """What an ordinary user is told: a child process, since all threads of this one are root's."""
    program = (
        "import os, sys, trio\n"
        "from lockfs.storage.disk import DirectDisk\n"
        "os.fchdir(int(sys.argv[1]))\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "async def main():\n"
        f"    await DirectDisk.open('leases', name=sys.argv[2], writable={writable})\n"
        "try: trio.run(main)\n"
        "except Exception as error: print(type(error).__name__, error, sep=':', end='')\n"
    )
    path.parent.chmod(0o755)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        done = subprocess.run(
            [sys.executable, "-c", program, str(directory), str(path)],
            pass_fds=[directory], capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
    finally:
        os.close(directory)
    kind, _, sentence = done.stdout.partition(":")
    assert kind == "SetupError", done
    return sentence


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EIO, "cannot be used for leases: Input/output error; check its storage."),
        (errno.ENXIO, "is a device that is not there; check that it is connected and active."),
        (errno.EROFS, "lies on a file system that is mounted read-only; leases must be written."),
    ],
)
async def test_a_failure_while_examining(lease_file: Path, faults: FaultyIO, number: int, words: str) -> None:
    faults.answer("alignment", None)
    faults.answer("preadv", OSError(number, os.strerror(number)))
    assert await refusal(lease_file, io=faults) == f"{lease_file} {words}"


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (1, 512),
        (512, 512),
        (1024, 4096),
        (4096, 4096),
        (0, "lies on a file system that reads and writes it through its cache in spite of O_DIRECT"),
        (16384, "lies on storage with sectors of 16384 bytes; leases need sectors of 512 or 4096 bytes"),
    ],
)
async def test_what_the_kernel_tells_decides(
    lease_file: Path, faults: FaultyIO, told: int, expected: int | str
) -> None:
    faults.answer("alignment", told)
    if isinstance(expected, str):
        assert expected in await refusal(lease_file, io=faults)
        return
    disk = await DirectDisk.open(str(lease_file), io=faults)
    assert disk.sector_size == expected
    await disk.close()


def test_alignment_by_trying_agrees_with_what_the_kernel_tells(lease_file: Path) -> None:
    descriptor = os.open(lease_file, os.O_RDONLY | os.O_DIRECT)
    try:
        told, tried = Kernel().alignment(descriptor), tried_alignment(descriptor, Kernel())
    finally:
        os.close(descriptor)
    assert tried in SECTOR_SIZES
    assert told is None or tried == max(told, 512)


async def test_where_nothing_is_told_one_sector_is_read(lease_file: Path, faults: FaultyIO) -> None:
    faults.answer("alignment", None)
    for answer, expected in ((512, 512), (OSError(errno.EINVAL, "Invalid argument"), 4096)):
        faults.answer("preadv", answer)
        disk = await DirectDisk.open(str(lease_file), io=faults)
        assert disk.sector_size == expected
        await disk.close()


def test_what_the_kernel_cannot_tell_is_unknown() -> None:
    assert Kernel().alignment(-1) is None
    pipe = os.pipe()
    try:
        assert Kernel().alignment(pipe[0]) is None
    finally:
        for end in pipe:
            os.close(end)


# --- real devices


@pytest.fixture(params=SECTOR_SIZES)
def device(request: pytest.FixtureRequest, lease_file: Path) -> Iterator[tuple[str, int]]:
    """A loop device over the lease file with sectors of a given size."""
    if os.geteuid() != 0 or shutil.which("losetup") is None or not Path("/dev/loop-control").exists():
        pytest.skip("needs root, losetup and loop devices")
    command = ["losetup", "--find", "--show", "--sector-size", str(request.param), str(lease_file)]
    made = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if made.returncode != 0:
        pytest.skip(f"no loop device can be made: {made.stderr.strip()}")
    path = made.stdout.strip()
    yield path, request.param
    subprocess.run(["losetup", "--detach", path], check=True, timeout=60)


async def test_a_device(device: tuple[str, int], lease_file: Path) -> None:
    path, size = device
    disk = await DirectDisk.open(path)
    assert disk.is_device
    assert disk.sector_size == size
    assert await disk.size(TIMEOUT_S) == FILE_BYTES
    assert (await disk.read(8192, size, TIMEOUT_S))[:512] == sector(16)
    await disk.write(size, b"\x77" * size, TIMEOUT_S)
    assert await disk.read(size, size, TIMEOUT_S) == b"\x77" * size
    await disk.close()
    with trio.fail_after(TIMEOUT_S):
        await all_threads_ended()
    assert lease_file.read_bytes()[size : 2 * size] == b"\x77" * size
