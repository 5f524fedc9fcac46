"""The mirror with the real keeper, on a backend that sees no other host."""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pyfuse3
import pytest
import trio

from lockfs.backends.nop import NopBackend
from lockfs.keeper.keeper import Keeper
from lockfs.keeper.policy import Policy

from .conftest import ROOT, Bench, fails
from .fakes import Caller

POLICY = Policy(wait=0.0, managers=("nothing",))
CREATE = os.O_RDWR | os.O_CREAT


@pytest.fixture
async def kept(make_bench) -> AsyncIterator[Bench]:
    """A mirror whose keeper is the real one."""
    bench = make_bench(policy=POLICY)
    mirror = bench.mirror
    mirror.keeper = Keeper(
        NopBackend(), POLICY, "thishost", surroundings=mirror.surroundings, freed=mirror.freed
    )
    yield bench
    await mirror.release_all()
    mirror.close()
    assert mirror.keeper.images() == []
    assert not bench.kernel.registered


@asynccontextmanager
async def stranger() -> AsyncIterator[Caller]:
    """Another process, as a caller with our own identity."""
    async with trio.open_nursery() as nursery:
        process = await nursery.start(functools.partial(trio.run_process, check=False), ["sleep", "60"])
        yield Caller(pid=process.pid)
        nursery.cancel_scope.cancel()


async def test_one_process_writes_at_a_time(kept: Bench, expect_log) -> None:
    """A second process is EBUSY while the first writes, may read meanwhile, and writes after its release."""
    expect_log("WARNING lockfs.mirror: sleep .* was refused .* of 'image': .*python", None)
    kept.write("image", b"data")
    first = await kept.open("image", os.O_RDWR)
    again = await kept.open("image", os.O_WRONLY)
    async with stranger() as other:
        for flags in (os.O_RDWR, os.O_WRONLY, os.O_RDONLY | os.O_TRUNC):
            with fails(errno.EBUSY):
                await kept.open("image", flags, other)
        with fails(errno.EBUSY):
            await kept.setattr(await kept.number("image"), caller=other, size=0)
        with fails(errno.EBUSY):
            await kept.mirror.create(ROOT, b"image", 0o644, CREATE, other)
        await kept.mirror.release(await kept.open("image", os.O_RDONLY, other))
        await kept.mirror.release(first)
        with fails(errno.EBUSY):
            await kept.open("image", os.O_RDWR, other)
        await kept.mirror.release(again)
        await kept.mirror.release(await kept.open("image", os.O_RDWR, other))
    assert (kept.path / "image").read_bytes() == b"data"


async def test_every_way_to_change_an_image_works_alone(kept: Bench) -> None:
    """Create, truncate by handle and by path, replace and unlink, with nobody else about."""
    info, entry = await kept.mirror.create(ROOT, b"image", 0o644, CREATE, kept.me)
    assert (await kept.setattr(entry.st_ino, info.fh, size=5)).st_size == 5
    assert (await kept.setattr(entry.st_ino, size=7)).st_size == 7
    assert await kept.mirror.getxattr(entry.st_ino, b"user.lockfs.mode", kept.me) == b"exclusive"
    kept.write("other", b"other")
    await kept.mirror.rename(ROOT, b"other", ROOT, b"image", 0, kept.me)
    await kept.mirror.unlink(ROOT, b"image", kept.me)
    assert os.fstat(kept.handles.find(info.fh).descriptor).st_nlink == 0
    await kept.mirror.release(info.fh)
    with fails(errno.ENOENT):
        await kept.lookup("image")


async def test_a_race_for_one_image_has_one_winner(kept: Bench, expect_log) -> None:
    """Of two processes that open at once, many times over, never both write."""
    expect_log("WARNING lockfs.mirror: .* was refused writing of 'image'", None)
    kept.write("image")
    number = await kept.number("image")
    won: list[Caller] = []

    async def contend(caller: Caller) -> None:
        for _ in range(30):
            try:
                info = await kept.mirror.open(number, os.O_RDWR, caller)
            except pyfuse3.FUSEError as error:
                assert error.errno == errno.EBUSY
                await trio.lowlevel.checkpoint()
                continue
            won.append(caller)
            await trio.lowlevel.checkpoint()
            assert len({caller.pid for caller in won}) == 1
            won.remove(caller)
            await kept.mirror.release(info.fh)

    async with stranger() as other, trio.open_nursery() as nursery:
        nursery.start_soon(contend, kept.me)
        nursery.start_soon(contend, other)
