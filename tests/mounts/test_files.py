"""What worked on the bare directory works on the mount, in every data mode."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lockfs.linux import calls
from tests.support.mounts import Mount, mounted
from tests.support.qemu import eventually

PUNCH_HOLE = 0x03


def test_data_is_the_stores(mount: Mount) -> None:
    """Bytes written on the mount are in the store, and the other way round, at once."""
    (mount.path / "image").write_bytes(b"from the mount")
    assert (mount.source / "image").read_bytes() == b"from the mount"
    (mount.source / "image").write_bytes(b"from below, and longer")
    assert (mount.path / "image").stat().st_size == 22
    assert (mount.path / "image").read_bytes() == b"from below, and longer"


def test_shared_mapping(mount: Mount) -> None:
    """A shared mapping's stores are read back through the file, here and below."""
    path = mount.path / "image"
    path.write_bytes(bytes(8192))
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 8192) as memory:
        memory[5:10] = b"hello"
        memory.flush()
        assert os.pread(file.fileno(), 5, 5) == b"hello"
    assert (mount.source / "image").read_bytes()[5:10] == b"hello"


def test_programs_run(mount: Mount) -> None:
    """Scripts and binaries on the mount are executed."""
    script = mount.path / "script"
    script.write_text("#!/bin/sh\necho ran\n")
    script.chmod(0o755)
    assert subprocess.run([script], capture_output=True, text=True, check=True).stdout == "ran\n"
    subprocess.run(["cp", "/bin/true", mount.path / "binary"], check=True)
    assert subprocess.run([mount.path / "binary"], check=False).returncode == 0


def test_direct_io(mount: Mount) -> None:
    """O_DIRECT reads and writes aligned blocks and refuses a misaligned length as the disk does."""
    path = mount.path / "image"
    path.write_bytes(b"a" * 65536)
    try:
        os.close(os.open(mount.source / "image", os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("the store's file system has no O_DIRECT")
    descriptor = os.open(path, os.O_RDWR | os.O_DIRECT)
    try:
        with mmap.mmap(-1, 8192) as memory:
            memory[:] = b"d" * 8192
            assert os.pwritev(descriptor, [memory], 4096) == 8192
            assert os.preadv(descriptor, [memory], 0) == 8192
            assert memory[:8192] == b"a" * 4096 + b"d" * 4096
            with memoryview(memory) as view, view[:1] as byte, pytest.raises(OSError) as caught:
                os.preadv(descriptor, [byte], 0)
            assert caught.value.errno == errno.EINVAL
    finally:
        os.close(descriptor)


def test_sparse_files(mount: Mount) -> None:
    """Sizes past 4 GiB, holes, SEEK_DATA, SEEK_HOLE, and punching them reach the store."""
    path = mount.path / "image"
    with open(path, "w+b") as file:
        fd = file.fileno()
        os.truncate(fd, 5 << 30)
        os.pwrite(fd, b"x" * 65536, 4 << 30)
        assert os.lseek(fd, 0, os.SEEK_DATA) == 4 << 30
        assert os.lseek(fd, 4 << 30, os.SEEK_HOLE) == (4 << 30) + 65536
        with pytest.raises(OSError) as caught:
            os.lseek(fd, (4 << 30) + 65536, os.SEEK_DATA)
        assert caught.value.errno == errno.ENXIO
        os.fsync(fd)
        full = (mount.source / "image").stat().st_blocks
        calls.fallocate(fd, PUNCH_HOLE, 4 << 30, 65536)
        assert (mount.source / "image").stat().st_blocks < full
        assert os.pread(fd, 4, 4 << 30) == bytes(4)
    assert (mount.source / "image").stat().st_size == 5 << 30


def test_allocation_and_copy(mount: Mount) -> None:
    """fallocate, posix_fallocate and copy_file_range do what they do below."""
    with open(mount.path / "a", "w+b") as one, open(mount.path / "b", "w+b") as two:
        os.posix_fallocate(one.fileno(), 0, 1 << 20)
        assert os.fstat(one.fileno()).st_size == 1 << 20
        os.pwrite(one.fileno(), b"copy me", 4096)
        copied = 0
        while copied < 1 << 20:
            copied += os.copy_file_range(one.fileno(), two.fileno(), (1 << 20) - copied, copied, copied)
        assert os.pread(two.fileno(), 7, 4096) == b"copy me"


def test_append(mount: Mount) -> None:
    """O_APPEND writes land at the end, also when the flag is set later."""
    path = mount.path / "log"
    path.write_bytes(b"1")
    with open(path, "ab") as file:
        file.write(b"2")
    with open(path, "r+b", buffering=0) as file:
        fcntl.fcntl(file.fileno(), fcntl.F_SETFL, os.O_APPEND)
        file.write(b"3")
    assert path.read_bytes() == b"123"


def test_unnamed_files(mount: Mount) -> None:
    """O_TMPFILE makes a file that can be written and then given a name."""
    try:
        descriptor = os.open(mount.path, os.O_TMPFILE | os.O_RDWR, 0o640)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR):
            pytest.skip("the store's file system has no O_TMPFILE")
        raise
    try:
        os.write(descriptor, b"nameless")
        link, name = f"/proc/self/fd/{descriptor}".encode(), bytes(mount.path / "named")
        calls.linkat(calls.AT_FDCWD, link, calls.AT_FDCWD, name, calls.AT_SYMLINK_FOLLOW)
    finally:
        os.close(descriptor)
    assert (mount.source / "named").read_bytes() == b"nameless"


def test_open_and_unlinked(mount: Mount) -> None:
    """An unlinked open file is read, written, stat'ed and resized as before."""
    path = mount.path / "image"
    with open(path, "w+b", buffering=0) as file:
        file.write(b"still here")
        path.unlink()
        assert os.fstat(file.fileno()).st_nlink == 0
        os.ftruncate(file.fileno(), 5)
        file.seek(0)
        assert file.read() == b"still"


def test_hidden_state(mount: Mount) -> None:
    """What lockfs keeps in the store cannot be seen, made or reached through the mount."""
    with open(mount.path / "image", "wb"):
        assert (mount.source / ".lockfs").is_dir()
        assert os.listdir(mount.path) == ["image"]
        assert not (mount.path / ".lockfs").exists()
        with pytest.raises(PermissionError):
            (mount.path / ".lockfs").mkdir()
        with pytest.raises(PermissionError):
            (mount.path / "image").rename(mount.path / ".lockfs")


def test_holder_as_attributes(mount: Mount) -> None:
    """A held image says who holds it, to those who ask by name, and nothing to those who list."""
    path = mount.path / "image"
    with open(path, "wb"):
        assert int(os.getxattr(path, "user.lockfs.pid")) == os.getpid()
        assert os.getxattr(path, "user.lockfs.mode") == b"exclusive"
        assert os.listxattr(path) == []
        with pytest.raises(PermissionError):
            os.setxattr(path, "user.lockfs.pid", b"1")

    def nobody_holds_it() -> bool:
        try:
            os.getxattr(path, "user.lockfs.pid")
        except OSError as error:
            assert error.errno == errno.ENODATA
            return True
        return False

    eventually(nobody_holds_it, "the end of the hold: the kernel tells of a close later")


def test_synchronous_opens(mount: Mount) -> None:
    """O_SYNC and O_DSYNC handles write, and flags are those of the open."""
    for flag in (os.O_SYNC, os.O_DSYNC):
        descriptor = os.open(mount.path / "image", os.O_RDWR | os.O_CREAT | flag)
        try:
            assert os.pwrite(descriptor, b"durable", 0) == 7
            os.fsync(descriptor)
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)


def test_full_disk(tmp_path: Path) -> None:
    """On a full store a write fails with ENOSPC, as it is, in both data modes."""
    store = tmp_path / "small"
    store.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", store], check=True)
    try:
        for io in ("auto", "daemon"):
            with (
                mounted(store, tmp_path / "mount", f"io={io}") as made,
                open(made.path / "f", "wb", 0) as file,
            ):
                with pytest.raises(OSError) as caught:
                    for _ in range(3):
                        file.write(bytes(1 << 19))
                        file.write(bytes(1 << 19))
                assert caught.value.errno == errno.ENOSPC
            (store / "f").unlink()
    finally:
        subprocess.run(["umount", store], check=True)


def test_many_threads(mount: Mount) -> None:
    """Sixteen threads that read and write their own parts of one image find what they wrote."""
    path = mount.path / "image"
    path.write_bytes(bytes(16 << 16))
    script = (
        "import os, sys, threading\n"
        "fd = os.open(sys.argv[1], os.O_RDWR)\n"
        "bad = []\n"
        "def work(n):\n"
        "    for i in range(50):\n"
        "        data = bytes([n + i & 255]) * 4096\n"
        "        os.pwrite(fd, data, n << 16)\n"
        "        bad.append(n) if os.pread(fd, 4096, n << 16) != data else None\n"
        "threads = [threading.Thread(target=work, args=(n,)) for n in range(16)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "sys.exit(bool(bad))\n"
    )
    assert subprocess.run([sys.executable, "-c", script, path], check=False).returncode == 0
