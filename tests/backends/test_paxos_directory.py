"""Files of leases appear whole or not at all, once, and belong to whom the directory belongs."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockfs.backends.paxos.directory import STALE_PASSING_S, Directory

SIZE = 1 << 20
CONTENT = b"content" * 1000
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount and give files away")


def opened(path: Path) -> Directory:
    """The directory as a host opens it."""
    return Directory(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Directory]:
    """An empty directory, `tmp_path`."""
    made = opened(tmp_path)
    yield made
    made.close()
    made.close()


def test_a_published_file_is_whole(directory: Directory, tmp_path: Path) -> None:
    """It has its content and its size, and nothing passing stays behind."""
    assert not directory.there(b"lease")
    assert directory.identity(b"lease") is None
    assert directory.publish(b"lease", CONTENT, SIZE)
    assert (tmp_path / "lease").read_bytes() == CONTENT.ljust(SIZE, b"\0")
    assert os.listdir(tmp_path) == ["lease"]
    assert directory.there(b"lease")
    status = (tmp_path / "lease").stat()
    assert directory.identity(b"lease") == (status.st_dev, status.st_ino)
    assert status.st_nlink == 1
    assert status.st_blocks * 512 < SIZE  # the rest is a hole


def test_the_second_changes_nothing(directory: Directory, tmp_path: Path) -> None:
    assert directory.publish(b"lease", CONTENT, SIZE)
    before = directory.identity(b"lease")
    assert not directory.publish(b"lease", b"other", SIZE)
    assert (directory.identity(b"lease"), os.listdir(tmp_path)) == (before, ["lease"])
    assert (tmp_path / "lease").read_bytes().startswith(CONTENT)


def test_of_hosts_that_meet_one_wins(tmp_path: Path) -> None:
    """Eight hosts that publish a name at once: one succeeds, and everybody sees its file, whole."""
    hosts = [opened(tmp_path) for _ in range(8)]
    start, won, seen = threading.Barrier(8), [], []

    def meet(number: int) -> None:
        start.wait()
        if hosts[number].publish(b"lease", b"%d" % number * 4096, SIZE):
            won.append(number)
        seen.append((tmp_path / "lease").read_bytes())

    threads = [threading.Thread(target=meet, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for host in hosts:
        host.close()
    assert len(won) == 1
    assert set(seen) == {(b"%d" % won[0] * 4096).ljust(SIZE, b"\0")}
    assert os.listdir(tmp_path) == ["lease"]


def test_unfinished_files_are_no_names_and_go_when_old(directory: Directory, tmp_path: Path) -> None:
    """What a host that died left is removed after an hour; what another is at work on is not."""
    old, fresh = directory.passing(b"", 10), directory.passing(b"", 10)
    before = time.time() - STALE_PASSING_S - 10
    os.utime(tmp_path / os.fsdecode(old), (before, before))
    directory.publish(b"lease", CONTENT, SIZE)
    assert directory.names() == [b"lease"]
    assert sorted(os.listdir(tmp_path)) == sorted(["lease", os.fsdecode(fresh)])
    directory.unlink(fresh)
    directory.unlink(fresh)  # again is no error


def test_a_link_is_not_followed(directory: Directory, tmp_path: Path) -> None:
    """A link under a lease's name is an error, and what it leads to stays as it is."""
    (tmp_path / "elsewhere").write_bytes(b"x")
    os.symlink("elsewhere", tmp_path / "lease")
    with pytest.raises(OSError, match="symbolic"):
        directory.there(b"lease")
    assert not directory.publish(b"lease", CONTENT, SIZE)
    assert (tmp_path / "elsewhere").read_bytes() == b"x"


@needs_root
def test_files_belong_to_whom_the_directory_belongs(directory: Directory, tmp_path: Path) -> None:
    """Made by root in a directory of libvirt's or sanlock's user, they can be used by these."""
    os.chown(tmp_path, 12345, 23456)
    directory.publish(b"lease", CONTENT, SIZE)
    status = (tmp_path / "lease").stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (12345, 23456, 0o660)
    os.chown(tmp_path, 0, 0)
    directory.publish(b"own", CONTENT, SIZE)
    status = (tmp_path / "own").stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (0, 0, 0o600)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 64 KiB, mounted in the test's directory."""
    point = tmp_path / "small"
    point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "lockfs-test", point], check=True)
    yield point
    subprocess.run(["umount", point], check=True)


@needs_root
def test_a_full_storage_leaves_nothing(small: Path) -> None:
    """No name, whole or not, is there after ENOSPC, and what was there stays."""
    directory = opened(small)
    directory.publish(b"first", b"x" * 4096, SIZE)
    with pytest.raises(OSError, match="space") as caught:
        directory.publish(b"second", b"y" * (128 << 10), SIZE)
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(small) == ["first"]
    directory.unlink(b"first")
    assert directory.publish(b"second", b"y" * 4096, SIZE)
    directory.close()
