"""Listing directories."""

from __future__ import annotations

import errno
import os
import stat

import pyfuse3
import pytest

from .conftest import ROOT, Bench, fails, mounted, needs_root, open_descriptors


class Reader:
    """Stands for the kernel's side of readdir: takes `room` entries a call."""

    def __init__(self, bench: Bench, fh: int, room: int) -> None:
        self.bench, self.fh, self.room = bench, fh, room
        self.position = 0
        self.taken: list[tuple[bytes, pyfuse3.EntryAttributes]] = []

    def reply(self, token: Reader, name: bytes, entry: pyfuse3.EntryAttributes, position: int) -> bool:
        """readdir_reply."""
        if len(self.batch) == self.room:
            return False
        self.batch.append((name, entry))
        self.position = position
        return True

    async def read(self) -> list[bytes]:
        """One READDIRPLUS; the names that came."""
        self.batch: list[tuple[bytes, pyfuse3.EntryAttributes]] = []
        await self.bench.mirror.readdir(self.fh, self.position, self)
        self.taken += self.batch
        return [name for name, _ in self.batch]

    async def read_all(self) -> list[bytes]:
        """Read to the end; all names."""
        names: list[bytes] = []
        while batch := await self.read():
            names += batch
        return names

    async def forget(self) -> None:
        """Forget what was learnt, as the kernel does for all but the dots."""
        numbers = [(e.st_ino, 1) for name, e in self.taken if name not in (b".", b"..") and e.st_ino]
        await self.bench.mirror.forget(numbers)


@pytest.fixture
def reader(bench: Bench, monkeypatch):
    """Opens a directory and gives a Reader for it."""

    async def make(number: int = ROOT, room: int = 7) -> Reader:
        made = Reader(bench, await bench.mirror.opendir(number, bench.me), room)
        monkeypatch.setattr(pyfuse3, "readdir_reply", made.reply)
        return made

    return make


async def test_every_name_comes_once_with_its_attributes(bench: Bench, reader) -> None:
    """A listing in many pieces has each name once, dots included, as a lookup would give it."""
    names = {f"file{n}" for n in range(100)} | {"sub"}
    for name in names - {"sub"}:
        bench.write(name, b"x" * 3)
    (bench.path / "sub").mkdir()
    (bench.path / ".lockfs").mkdir()
    before = open_descriptors()
    listing = await reader()
    found = await listing.read_all()
    assert sorted(found) == sorted([b".", b"..", *map(os.fsencode, names)])
    for name, entry in listing.taken[2:]:
        status = (bench.path / os.fsdecode(name)).stat()
        assert (entry.st_ino, entry.st_mode, entry.st_size) == (
            status.st_ino, status.st_mode, status.st_size
        )  # fmt: skip
    assert bench.mirror.statistics().lookups == len(names)
    await listing.forget()
    await bench.mirror.releasedir(listing.fh)
    assert open_descriptors() == before


async def test_a_listing_is_stable_under_change(bench: Bench, reader) -> None:
    """Files made and removed while it is read neither repeat nor hide others; a rewind sees the change."""
    for n in range(50):
        bench.write(f"file{n}")
    listing = await reader(room=10)
    first = await listing.read()
    removed = {path.name for path in bench.path.iterdir() if os.fsencode(path.name) not in first}
    removed = set(sorted(removed)[:5]) | {os.fsdecode(first[3])}
    for name in removed:
        (bench.path / name).unlink()
    for n in range(20):
        bench.write(f"new{n}")
    rest = await listing.read_all()
    assert len(set(first + rest)) == len(first + rest)
    assert {os.fsencode(f"file{n}") for n in range(50)} <= {*first, *rest, *map(os.fsencode, removed)}
    assert not any(name.startswith(b"new") for name in rest)
    listing.position = 0
    again = await listing.read_all()
    assert {os.fsencode(f"new{n}") for n in range(20)} <= set(again)
    assert not {os.fsencode(name) for name in removed} & set(again)
    await bench.mirror.releasedir(listing.fh)


async def test_dots_tell_numbers_and_count_no_lookup(bench: Bench, reader) -> None:
    """Dot is the directory, dot-dot its parent, the root's own being the root."""
    (bench.path / "sub").mkdir()
    for number in (ROOT, await bench.number("sub")):
        listing = await reader(number)
        await listing.read()
        (_, dot), (_, up) = listing.taken[:2]
        assert (dot.st_ino, up.st_ino) == (number, ROOT)
        assert stat.S_ISDIR(dot.st_mode)
        await listing.forget()
        await bench.mirror.releasedir(listing.fh)
    assert bench.mirror.statistics().lookups == 1


async def test_reading_from_any_position(bench: Bench, reader) -> None:
    """A position from an earlier listing may be gone to at once, one past the end is the end."""
    for n in range(10):
        bench.write(f"file{n}")
    listing = await reader(room=100)
    names = await listing.read()
    for position in (5, 0, 11, 12, 500):
        listing.position = position
        assert await listing.read() == names[position:]
    await bench.mirror.releasedir(listing.fh)


async def test_open_directories_are_closed(bench: Bench) -> None:
    """opendir wants a directory, fsyncdir works on it, and release_all closes what is left."""
    bench.write("file")
    with fails(errno.ENOTDIR):
        await bench.mirror.opendir(await bench.number("file"), bench.me)
    fh = await bench.mirror.opendir(ROOT, bench.me)
    await bench.mirror.fsyncdir(fh, True)
    await bench.mirror.fsyncdir(fh, False)
    assert bench.mirror.statistics().directories == 1
    await bench.mirror.release_all()
    with fails(errno.EBADF):
        await bench.mirror.fsyncdir(fh, False)
    await bench.mirror.releasedir(fh)


@needs_root
async def test_a_mount_in_the_store_is_listed_bare(bench: Bench, reader) -> None:
    """A name on which something is mounted is listed, with no inode behind it."""
    with mounted(bench.path):
        listing = await reader()
        assert b"mounted" in await listing.read()
        assert dict(listing.taken)[b"mounted"].st_ino == 0
        await bench.mirror.releasedir(listing.fh)
