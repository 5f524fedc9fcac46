"""Lookups, forgets, node numbers."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lockfs.mirror.inodes import SYNTHETIC_FIRST, Found, InodeTable

from .conftest import ROOT, Bench, fails, mounted, needs_root, open_descriptors


async def test_lookup_gives_the_attributes_of_the_file_below(bench: Bench) -> None:
    """Number, size, mode, owner and nanosecond times are those of the file, and never to be cached."""
    path = bench.write("image", b"x" * 1000, 0o640)
    os.utime(path, ns=(1_000_000_001, 2_000_000_003))
    entry, status = await bench.lookup("image"), path.stat()
    assert entry.st_ino == status.st_ino
    assert (entry.st_size, entry.st_mode, entry.st_nlink) == (1000, status.st_mode, 1)
    assert (entry.st_uid, entry.st_gid) == (status.st_uid, status.st_gid)
    assert (entry.st_atime_ns, entry.st_mtime_ns) == (1_000_000_001, 2_000_000_003)
    assert entry.st_ctime_ns == status.st_ctime_ns
    assert (entry.entry_timeout, entry.attr_timeout, entry.generation) == (0, 0, 0)


async def test_a_missing_name_is_enoent(bench: Bench) -> None:
    """A name that is not there is ENOENT, at once and after it was removed; too long is ENAMETOOLONG."""
    with fails(errno.ENOENT):
        await bench.lookup("nothing")
    with fails(errno.ENAMETOOLONG):
        await bench.lookup("x" * 256)
    bench.write("file").unlink()
    with fails(errno.ENOENT):
        await bench.lookup("file")


async def test_forgets_close_what_lookups_opened(bench: Bench) -> None:
    """An inode lives for exactly as many forgets as it had lookups, and then its descriptor is closed."""
    bench.write("file")
    before = open_descriptors()
    number = 0
    for _ in range(5):
        number = await bench.number("file")
    assert len(open_descriptors()) == len(before) + 1
    assert bench.mirror.statistics().lookups == 5
    await bench.mirror.forget([(number, 3), (number, 1)])
    await bench.mirror.getattr(number, bench.me)
    await bench.mirror.forget([(number, 1)])
    assert open_descriptors() == before
    with fails(errno.ESTALE):
        await bench.mirror.getattr(number, bench.me)
    await bench.mirror.forget([(number, 1), (4, 1)])


async def test_the_root_is_never_forgotten(bench: Bench) -> None:
    """Forgetting the root leaves it usable."""
    await bench.mirror.forget([(ROOT, 10)])
    assert (await bench.mirror.getattr(ROOT, bench.me)).st_ino == ROOT


async def test_hard_links_are_one_inode(bench: Bench) -> None:
    """Two names of one file lead to the same number."""
    bench.write("one")
    os.link(bench.path / "one", bench.path / "two")
    assert await bench.number("one") == await bench.number("two")
    assert (await bench.lookup("one")).st_nlink == 2


async def test_an_inode_follows_its_file(bench: Bench) -> None:
    """A known inode stays the same file through a rename below, and when it is unlinked below."""
    path = bench.write("file", b"abc")
    number = await bench.number("file")
    path.rename(bench.path / "other")
    bench.write("file", b"abcdef")
    assert (await bench.mirror.getattr(number, bench.me)).st_size == 3
    (bench.path / "other").unlink()
    entry = await bench.mirror.getattr(number, bench.me)
    assert (entry.st_size, entry.st_nlink) == (3, 0)
    assert await bench.number("file") != number


async def test_an_odd_name_is_as_good_as_any(bench: Bench) -> None:
    """Names are bytes: not UTF-8, control characters, blanks."""
    name = b"\xff\xfe \n\t'\"%"
    os.mknod(os.fsencode(bench.path) + b"/" + name)
    assert await bench.number(name)


@pytest.mark.parametrize("kind", [b".lockfs"])
async def test_what_lockfs_keeps_in_the_store_is_hidden(bench: Bench, kind: bytes) -> None:
    """`.lockfs` cannot be found, made, removed or moved, in the root or below it."""
    mirror, me = bench.mirror, bench.me
    (bench.path / ".lockfs").mkdir()
    (bench.path / "sub" / ".lockfs").mkdir(parents=True)
    bench.write("file")
    number = await bench.number("file")
    for parent in (ROOT, await bench.number("sub")):
        for operation in (mirror.lookup, mirror.unlink, mirror.rmdir):
            with fails(errno.ENOENT):
                await operation(parent, kind, me)
        with fails(errno.ENOENT):
            await mirror.rename(parent, kind, ROOT, b"new", 0, me)
        with fails(errno.EPERM):
            await mirror.rename(ROOT, b"file", parent, kind, 0, me)
        with fails(errno.ENOENT):
            await mirror.rename(ROOT, b"file", parent, kind, 2, me)
        with fails(errno.EPERM):
            await mirror.mkdir(parent, kind, 0o755, me)
        with fails(errno.EPERM):
            await mirror.mknod(parent, kind, 0o100644, 0, me)
        with fails(errno.EPERM):
            await mirror.symlink(parent, kind, b"x", me)
        with fails(errno.EPERM):
            await mirror.link(number, parent, kind, me)
        with fails(errno.EPERM):
            await mirror.create(parent, kind, 0o644, os.O_RDWR | os.O_CREAT, me)


@needs_root
async def test_a_mount_inside_the_store_is_not_entered(bench: Bench) -> None:
    """A name on which something is mounted is EACCES, and is listed all the same."""
    with mounted(bench.path), fails(errno.EACCES):
        await bench.lookup("mounted")


def test_numbers_that_are_taken_get_a_synthetic_one(tmp_path) -> None:
    """Files of another device, and numbers the table cannot use, get numbers from 2**62 up."""
    table = InodeTable(os.open(tmp_path, os.O_PATH))

    def found(device: int, number: int) -> Found:
        status = list(os.stat(tmp_path))
        status[1], status[2] = number, device
        return Found(os.open(tmp_path, os.O_PATH), os.stat_result(status))

    try:
        first = table.adopt(found(table.device, 77))
        other = table.adopt(found(table.device + 1, 77))
        one = table.adopt(found(table.device, 1))
        assert first.number == 77
        assert other.number >= SYNTHETIC_FIRST
        assert one.number >= SYNTHETIC_FIRST
        assert len({first.number, other.number, one.number}) == 3
        assert table.adopt(found(table.device + 1, 77)) is other
    finally:
        for descriptor in table.clear():
            os.close(descriptor)


def test_a_number_used_again_gets_a_new_generation(tmp_path) -> None:
    """Where the known file is gone from the server, the next one of its number is another generation."""
    table = InodeTable(os.open(tmp_path, os.O_PATH))
    before = len(open_descriptors())
    status = os.stat_result([0o100644, 77, table.device, 1, 0, 0, 0, 0, 0, 0])
    for stale in (False, False, True):
        inode = table.adopt(Found(os.open(tmp_path, os.O_PATH), status, stale))
    assert (inode.number, inode.generation, inode.lookups) == (77, 1, 3)
    assert len(open_descriptors()) == before + 2
    for descriptor in table.forget(77, 3):
        os.close(descriptor)
    assert len(open_descriptors()) == before
    for descriptor in table.clear():
        os.close(descriptor)


def test_lookup_counted_on_another_thread_keeps_the_inode(store: Path) -> None:
    """What a reader counts by itself is a lookup as any other, and can only be of what is known."""
    table = InodeTable(os.open(store, os.O_PATH))
    (store / "a").write_bytes(b"")
    found = Found(os.open(store / "a", os.O_PATH), os.stat(store / "a"))
    assert table.count_again(found.status) is None
    inode = table.adopt(found)
    assert table.count_again(found.status) is inode
    assert table.count_again(os.stat(store)) is table.root
    assert table.forget(inode.number, 1) == []
    assert inode.lookups == 1
    for descriptor in [*table.forget(inode.number, 1), *table.clear()]:
        os.close(descriptor)
    assert table.count_again(found.status) is None
