"""lockfs is killed while an image is open: at no moment can two hosts write to it.

In passthrough the kernel goes on writing for the opener, so the lease must stay; in the other modes the
opener's writes end with lockfs, so the lease may go.
"""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from tests.mounts.test_leases import PATIENCE_S, opens_soon, refused
from tests.support.mounts import Mount, mounted, start

SIZE = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with one image."""
    made = tmp_path / "store"
    made.mkdir()
    (made / "disk").write_bytes(bytes(SIZE))
    (tmp_path / "a").mkdir()
    return made


def kill(mount: Mount) -> None:
    """End every process of the mount at once: nobody is left to go on."""
    mount.kill()


def writes(descriptor: int) -> bool:
    """Whether a write through the descriptor reaches the image."""
    try:
        return os.pwrite(descriptor, b"x" * 4096, 0) == 4096
    except OSError as error:
        if error.errno not in (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO):
            raise
        return False


def close(descriptor: int) -> None:
    """Close a descriptor of a dead mount: its FLUSH finds nobody."""
    with pytest.raises(OSError) as caught:
        os.close(descriptor)
    if caught.value.errno != errno.ENOTCONN:
        raise caught.value


@pytest.mark.parametrize("first", [os.O_RDONLY, os.O_RDWR])
def test_lease_outlives_lockfs_in_passthrough(store: Path, tmp_path: Path, first: int) -> None:
    """The killed host's opener writes on, and the other host stays out until that opener closes."""
    with mounted(store, tmp_path / "b", "host=hostB,wait=0.2") as other:
        made = start(store, tmp_path / "a", "host=hostA")
        reader = os.open(made.path / "disk", first)
        writer = os.open(made.path / "disk", os.O_RDWR)
        kill(made)
        try:
            assert writes(writer)
            assert refused(other.path / "disk")
        finally:
            # No FLUSH on a local store: the data was not lockfs's, so a close has nothing to complain of.
            os.close(writer)
            os.close(reader)
        subprocess.run(["umount", made.path], check=True)
        opens_soon(other.path / "disk")


@pytest.mark.parametrize("io", ["guarded", "daemon"])
def test_writes_end_with_lockfs_otherwise(store: Path, tmp_path: Path, io: str) -> None:
    """Where data goes through lockfs, the killed host's opener can write no more, whoever has the lease.

    A guarded image still backs the opener's mappings, so the kernel keeps its locks; a daemon's are gone.
    """
    with mounted(store, tmp_path / "b", f"host=hostB,wait=0.2,io={io}") as other:
        made = start(store, tmp_path / "a", f"host=hostA,io={io}")
        writer = os.open(made.path / "disk", os.O_RDWR)
        assert writes(writer)
        kill(made)
        try:
            assert not writes(writer)
            if io == "guarded":
                assert refused(other.path / "disk")
            else:
                opens_soon(other.path / "disk")
            assert not writes(writer)
        finally:
            close(writer)
        subprocess.run(["umount", made.path], check=True)
        opens_soon(other.path / "disk")


def test_lazy_unmount_keeps_the_lease(store: Path, tmp_path: Path) -> None:
    """After umount -l the opener writes on under its lease; the server ends when it closes."""
    with mounted(store, tmp_path / "b", "host=hostB,wait=0.2") as other:
        made = start(store, tmp_path / "a", "host=hostA")
        writer = os.open(made.path / "disk", os.O_RDWR)
        subprocess.run(["umount", "-l", made.path], check=True)
        try:
            assert writes(writer)
            assert refused(other.path / "disk")
            assert made.process.poll() is None
        finally:
            os.close(writer)
        assert made.process.wait(PATIENCE_S) == 0
        opens_soon(other.path / "disk")
