"""Revoking without a mount: which names strike which inode, what the kernel is told, what counts as dead."""

from __future__ import annotations

import os

import pyfuse3
import pytest
import trio

from lockfs.mirror import fences
from lockfs.mirror.fences import PREFIX, Fences

from .conftest import ROOT, Bench, fails


class Mountless(Fences):
    """Looks up through the mirror itself what threads would look up on the mount.

    Fault model: from the look-up number `fails_at` on the mount does not answer.
    """

    def use(self, bench: Bench, token: trio.lowlevel.TrioToken, fails_at: int = 1 << 30) -> None:
        self.bench, self.token, self.left = bench, token, fails_at
        self.seen: list[pyfuse3.EntryAttributes] = []

    def _open_root(self) -> int:
        return os.open(self.bench.path, os.O_PATH)

    def look(self, name: bytes, *, dir_fd: int, follow_symlinks: bool) -> None:
        assert not follow_symlinks
        self.left -= 1
        if self.left < 0:
            raise OSError(107, "Transport endpoint is not connected")

        async def lookup() -> None:
            self.seen.append(await self.bench.mirror.lookup(ROOT, name, self.bench.me))

        try:
            trio.from_thread.run(lookup, trio_token=self.token)
        except pyfuse3.FUSEError as error:
            raise OSError(error.errno, "") from error


@pytest.fixture
def mountless(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Mountless:
    """Fences of the bench's mirror."""
    made = Mountless(bench.mirror._store.inodes, bench.handles)
    bench.mirror._fences = bench.mirror.surroundings.fences = made

    class Calls:
        """os, with a stat of our own."""

        def __getattr__(self, name: str) -> object:
            return made.look if name == "stat" else getattr(os, name)

    monkeypatch.setattr(fences, "os", Calls())
    return made


async def test_a_struck_inode_has_a_new_generation(bench: Bench, mountless: Mountless) -> None:
    """The kernel is told the same node with another generation; its lookups are counted; handles are dead."""
    mountless.use(bench, trio.lowlevel.current_trio_token())
    bench.write("image", b"data")
    before = await bench.lookup("image")
    number = before.st_ino
    info = await bench.mirror.open(number, os.O_RDWR, bench.me)
    lookups = bench.mirror.statistics().lookups
    assert await bench.mirror.surroundings.revoke(frozenset({number})) == {}
    (told,) = mountless.seen
    assert (told.st_ino, told.generation) == (number, before.generation + 1)
    assert told.st_mode == 0o100000 and told.entry_timeout == told.attr_timeout == 0
    assert bench.mirror.statistics().lookups == lookups + 1
    assert bench.handles.find(info.fh).dead
    assert (await bench.lookup("image")).generation == told.generation
    assert not mountless._pending


async def test_what_is_open_past_its_gate(bench: Bench, mountless: Mountless) -> None:
    """A writer in passthrough bypasses until it is revoked; a reader never does; a new writer does again."""
    mountless.use(bench, trio.lowlevel.current_trio_token())
    bench.write("image")
    number = await bench.number("image")
    await bench.mirror.open(number, os.O_RDONLY, bench.me)
    assert not bench.mirror.surroundings.bypassed(number)
    await bench.mirror.open(number, os.O_RDWR, bench.me)
    assert bench.mirror.surroundings.bypassed(number)
    await bench.mirror.surroundings.revoke(frozenset({number}))
    assert not bench.mirror.surroundings.bypassed(number)
    await bench.mirror.open(number, os.O_RDWR, bench.me)
    assert bench.mirror.surroundings.bypassed(number)


async def test_a_mount_that_does_not_answer(bench: Bench, mountless: Mountless) -> None:
    """Those that could not be struck are named, and their handles are not taken for dead."""
    mountless.use(bench, trio.lowlevel.current_trio_token(), fails_at=0)
    bench.write("image")
    number = await bench.number("image")
    await bench.mirror.open(number, os.O_RDWR, bench.me)
    failed = await bench.mirror.surroundings.revoke(frozenset({number, 987654321}))
    assert failed == {number: "Transport endpoint is not connected"}
    assert bench.mirror.surroundings.bypassed(number)
    assert not mountless._pending


async def test_many_are_struck_by_few_threads(bench: Bench, mountless: Mountless) -> None:
    """Hundreds of inodes in one call."""
    mountless.use(bench, trio.lowlevel.current_trio_token())
    numbers = set()
    for index in range(200):
        bench.write(f"image{index}")
        numbers.add(await bench.number(f"image{index}"))
    assert await bench.mirror.surroundings.revoke(frozenset(numbers)) == {}
    assert {told.st_ino for told in mountless.seen} == numbers


async def test_the_names_are_nobodys(bench: Bench) -> None:
    """Without a fence under way such a name is one like any other."""
    with fails(2):
        await bench.lookup(PREFIX + b"0" * 32)
    bench.write((PREFIX + b"1" * 32).decode(), b"a file of somebody's")
    assert (await bench.lookup(PREFIX + b"1" * 32)).st_size == 20
