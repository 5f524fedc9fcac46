"""Fencing on real mounts: what was open is dead, what maps is killed, and the image goes on elsewhere."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mounts import Mount, TwoMounts, mounted, two_mounts

PATIENCE_S = 15.0
MAPPING = """
import mmap, os, sys
descriptor = os.open(sys.argv[1], os.O_RDWR)
print("open", flush=True)
sys.stdin.readline()
memory = mmap.mmap(descriptor, 4096, mmap.MAP_SHARED)
print("mapped", flush=True)
while True:
    memory[0] = (memory[0] + 1) % 256
"""


@pytest.fixture(params=["passthrough", "guarded", "daemon"])
def io(request: pytest.FixtureRequest) -> str:
    """Each data mode."""
    mode: str = request.param
    return mode


@pytest.fixture
def hosts(io: str, tmp_path: Path) -> Iterator[TwoMounts]:
    """Two hosts of one store; what they had open must be gone at the end."""
    with two_mounts(tmp_path, f"io={io},wait=0.3") as made:
        (made.store / "disk").write_bytes(bytes(1 << 20))
        before = made.a.descriptors(), made.b.descriptors()
        yield made
        made.a.settles_at(before[0])
        made.b.settles_at(before[1])


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    """A descriptor, whose close may tell that it is dead."""
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def ctl(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run lockfsctl."""
    command = [sys.executable, "-m", "lockfs.cli.ctl", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def fence(path: Path) -> None:
    """Fence an image by its path on a mount."""
    done = ctl("fence", path)
    assert done.returncode == 0, done.stderr


def assert_dead(descriptor: int) -> None:
    """Nothing works through the descriptor any more; what the kernel lets pass, the gate refuses."""
    for attempt, numbers in (
        (lambda: os.pwrite(descriptor, b"stale", 0), {errno.EIO}),
        (lambda: os.pread(descriptor, 1, 0), {errno.EIO}),
        (lambda: os.fsync(descriptor), {errno.EIO}),
        (lambda: os.ftruncate(descriptor, 0), {errno.EIO}),
        (lambda: os.posix_fallocate(descriptor, 0, 2 << 20), {errno.EIO, errno.ENOSPC}),
        (lambda: os.copy_file_range(descriptor, descriptor, 4096, 0, 8192), {errno.EIO, errno.ENOSPC}),
    ):
        with pytest.raises(OSError) as caught:
            attempt()
        assert caught.value.errno in numbers


def opens_soon(path: Path) -> int:
    """Open for writing as soon as the image is free."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            return os.open(path, os.O_RDWR)
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > end:
                raise


def test_what_was_open_is_dead_and_another_host_has_the_image(hosts: TwoMounts) -> None:
    """Readers and writers fail at once with EIO; the other mount opens for writing; nothing stale lands."""
    with opened(hosts.a.path / "disk") as writer, opened(hosts.a.path / "disk", os.O_RDONLY) as reader:
        os.pwrite(writer, b"good", 0)
        fence(hosts.a.path / "disk")
        assert_dead(writer)
        with pytest.raises(OSError):
            os.pread(reader, 1, 0)
        with open(hosts.b.path / "disk", "r+b", buffering=0) as other:
            other.write(b"other")
            with pytest.raises(OSError):
                os.pwrite(writer, b"stale", 0)
    assert (hosts.store / "disk").read_bytes()[:5] == b"other"


def test_the_same_process_goes_on_with_a_new_open(hosts: TwoMounts) -> None:
    """While its dead handle is open, the process opens the image anew, reads what it wrote, and writes."""
    with opened(hosts.a.path / "disk") as dead:
        os.pwrite(dead, b"before", 0)
        fence(hosts.a.path / "disk")
        for _ in range(3):
            with opened(hosts.a.path / "disk") as fresh:
                assert os.pread(fresh, 6, 0) == b"before"
                os.pwrite(fresh, b"before", 0)
                os.fsync(fresh)
        assert_dead(dead)
        assert (hosts.a.path / "disk").stat().st_size == 1 << 20


def test_fenced_again_and_again(hosts: TwoMounts) -> None:
    """Each fence kills what is open at its time; all the dead can be closed in any order."""
    descriptors = []
    for _ in range(5):
        descriptors.append(os.open(hosts.a.path / "disk", os.O_RDWR))
        fence(hosts.a.path / "disk")
        for descriptor in descriptors:
            assert_dead(descriptor)
    for descriptor in descriptors[::2] + descriptors[1::2]:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    os.close(opens_soon(hosts.b.path / "disk"))


def test_a_file_without_a_name(hosts: TwoMounts) -> None:
    """An image that was unlinked while open is fenced too, and its room is freed when it is closed."""
    with (
        opened(hosts.a.path / "disk") as writer,
        opened(hosts.a.path / "keep", os.O_RDWR | os.O_CREAT) as keep,
    ):
        os.pwrite(writer, b"x" * 4096, 0)
        os.link(hosts.a.path / "disk", hosts.a.path / "alias")
        fence(hosts.a.path / "alias")
        assert_dead(writer)
        (hosts.a.path / "alias").unlink()
        (hosts.a.path / "disk").unlink()
        os.pwrite(keep, b"untouched", 0)
    assert sorted(os.listdir(hosts.store)) == [".lockfs", "keep"]


def test_all_names_of_a_file(hosts: TwoMounts) -> None:
    """Fenced under one name, an image is dead under the others; a renamed one is found."""
    os.link(hosts.store / "disk", hosts.store / "alias")
    with opened(hosts.a.path / "disk") as first, opened(hosts.a.path / "alias") as second:
        (hosts.a.path / "disk").rename(hosts.a.path / "moved")
        fence(hosts.a.path / "moved")
        assert_dead(first)
        assert_dead(second)


def test_others_are_not_touched(hosts: TwoMounts) -> None:
    """Other images of the mount work on."""
    (hosts.store / "other").write_bytes(b"other")
    with opened(hosts.a.path / "disk"), opened(hosts.a.path / "other") as other:
        fence(hosts.a.path / "disk")
        assert os.pwrite(other, b"OTHER", 0) == 5
        assert os.pread(other, 5, 0) == b"OTHER"


def test_nothing_to_fence(hosts: TwoMounts) -> None:
    """An image that nobody has open for writing is left alone, and lockfsctl says so."""
    with opened(hosts.a.path / "disk", os.O_RDONLY) as reader:
        done = ctl("fence", hosts.a.path / "disk")
        assert done.returncode == 0 and "Nobody" in done.stdout
        assert os.pread(reader, 1, 0) == b"\0"
    assert ctl("fence", hosts.a.path / "nothing").returncode
    assert ctl("fence", "/proc/version").returncode


def test_what_was_written_is_on_the_storage(hosts: TwoMounts) -> None:
    """What was written before the fence is on the storage when lockfsctl returns."""
    with opened(hosts.a.path / "disk") as writer:
        for block in range(64):
            os.pwrite(writer, bytes([block]) * 4096, block * 4096)
        fence(hosts.a.path / "disk")
        data = (hosts.store / "disk").read_bytes()
    assert all(data[block * 4096] == block for block in range(64))


@pytest.mark.parametrize("late", [False, True], ids=["mapped before", "mapped through the dead handle"])
def test_a_mapper_is_killed(tmp_path: Path, late: bool) -> None:
    """A process that maps the image is killed, also one that maps it when its handle is dead already."""
    store = tmp_path / "store"
    store.mkdir()
    (store / "disk").write_bytes(bytes(4096))
    with mounted(store, tmp_path / "mount", "io=passthrough") as mount:
        process = subprocess.Popen(
            [sys.executable, "-c", MAPPING, mount.path / "disk"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "open\n"
        if late:
            fence(mount.path / "disk")
        process.stdin.write("\n")
        process.stdin.flush()
        if not late:
            assert process.stdout.readline() == "mapped\n"
            fence(mount.path / "disk")
            assert process.poll() is not None or process.wait(PATIENCE_S)
        assert process.wait(PATIENCE_S) == -9
        process.communicate()
        was = (store / "disk").read_bytes()
        time.sleep(0.05)
        assert (store / "disk").read_bytes() == was
        mount.logs("is killed")


def test_private_and_readable_maps_are_no_reason(tmp_path: Path) -> None:
    """Who only reads through memory, or has a copy of its own, is not killed."""
    store = tmp_path / "store"
    store.mkdir()
    (store / "disk").write_bytes(bytes(4096))
    with mounted(store, tmp_path / "mount", "io=passthrough") as mount:
        with opened(mount.path / "disk") as writer, opened(mount.path / "disk", os.O_RDONLY) as reader:
            private = mmap.mmap(writer, 4096, mmap.MAP_PRIVATE)
            shared = mmap.mmap(reader, 4096, mmap.MAP_SHARED, mmap.PROT_READ)
            fence(mount.path / "disk")
            private.close()
            shared.close()
        assert "is killed" not in mount.log()


def test_who_and_log_tell(hosts: TwoMounts) -> None:
    """lockfsctl who shows dead opens as such, and the log says what happened."""
    with opened(hosts.a.path / "disk"):
        fence(hosts.a.path / "disk")
        shown = json.loads(ctl("who", "--json", hosts.a.path / "disk").stdout)["images"]
        assert [image["state"] for image in shown] == ["fenced"]
        hosts.a.logs("fenced by hand")
        assert "fenced" in ctl("who", hosts.a.path / "disk").stdout


def test_unmounts_after_a_fence(tmp_path: Path, io: str) -> None:
    """Nothing of a fence keeps the mount busy."""
    store = tmp_path / "store"
    store.mkdir()
    (store / "disk").write_bytes(bytes(4096))
    with mounted(store, tmp_path / "mount", f"io={io}") as mount:
        with opened(mount.path / "disk"):
            fence(mount.path / "disk")
        assert isinstance(mount, Mount)
