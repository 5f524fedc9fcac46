"""The next worker of a mount with file locks: what it must not believe, and what it goes on with."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lockfs.backends.base import Forgetful, Mode
from lockfs.backends.fcntl import FcntlBackend, FcntlOptions
from lockfs.backends.remembered import Ledger, Note, Stage
from lockfs.linux import ofd
from tests.conftest import ExpectLog

from .conformance import EXCLUSIVE, IMAGE, SHARED, acquire, recall
from .makers import FcntlMaker

FORMER = "lockfs.backends.former_locks"


@pytest.fixture
def maker(tmp_path: Path) -> FcntlMaker:
    """Hosts with the default options."""
    return FcntlMaker(tmp_path, [FcntlOptions()])


def test_notes() -> None:
    """A ledger tells what was noted, of what it is sure; the first worker's name stays."""
    memory = Forgetful()
    ledger = Ledger(memory)
    assert ledger.instance(b"one") == (b"one", False)
    assert Ledger(memory).instance(b"two") == (b"one", True)
    ledger.note(7, Stage.HELD, SHARED, image=3, fd=[4], name="x")
    ledger.note(8, Stage.TAKING, EXCLUSIVE)
    ledger.note(9, Stage.ENDING, EXCLUSIVE)
    ledger.forget(9)
    ledger.forget(9)
    memory.set("backend:lease:x", {"stage": "held", "mode": "shared"})
    memory.set("backend:lease:10", {"stage": "unheard of", "mode": "shared"})
    memory.set("backend:lease:11", 5)
    notes = Ledger(memory).notes()
    assert notes == {
        7: Note(Stage.HELD, SHARED, {"image": 3, "fd": [4], "name": "x"}),
        8: Note(Stage.TAKING, EXCLUSIVE, {}),
    }
    assert (notes[7].in_hand, notes[8].in_hand) == (True, False)
    assert (notes[7].number("image"), notes[7].number("name"), notes[7].text("image")) == (3, None, None)
    assert (notes[7].descriptors, notes[8].descriptors) == ([4], [])


async def test_locks_that_are_gone_are_not_recalled(maker: FcntlMaker, expect_log: ExpectLog) -> None:
    """Another host has the image by now; what the note speaks of is given back without harm to it."""
    expect_log(FORMER)
    async with maker.hosts(2) as (one, two):
        await acquire(maker, one)
        ofd.unlock(one.image(IMAGE).descriptor, 0, 0)
        lease = await acquire(maker, two)
        await maker.succeed(one)
        assert await recall(one) is None
        await maker.go_on(one)
        assert [holder.owner for holder in await one.backend.holders(one.image(IMAGE))] == [two.owner]
        await two.backend.release(lease)
        await one.backend.release(await acquire(maker, one))


@pytest.mark.parametrize("other_image", [False, True])
async def test_another_description_has_no_locks(
    other_image: bool, maker: FcntlMaker, expect_log: ExpectLog
) -> None:
    """The number that the note names is another's by now, or the image comes with another number."""
    expect_log(FORMER)
    async with maker.hosts(2) as (one, two):
        await acquire(maker, one)
        former = one.images.pop(IMAGE)
        if other_image:  # its number leads to another file, which is locked for other reasons
            other = os.open(maker.store / "b.img", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
            os.dup2(other, former.descriptor, inheritable=False)
            assert ofd.try_lock(other, ofd.WRITE, 5)
            os.close(other)
        await maker.succeed(one)
        assert await recall(one) is None
        await maker.go_on(one)
        if other_image:
            with open(maker.store / "b.img", "rb") as file:
                assert ofd.conflict(file.fileno(), ofd.WRITE, 5) is not None
        else:
            await two.backend.release(
                await acquire(maker, two)
            )  # settled, by the number that still leads there
        os.close(former.descriptor)


async def test_a_lost_lease_is_not_recalled(maker: FcntlMaker) -> None:
    """Once the keeper was told that it is lost it stays so, though the locks could be had again."""
    async with maker.hosts(1) as (one,):
        lease = await acquire(maker, one)
        backend = one.backend
        assert isinstance(backend, FcntlBackend)
        backend._note(lease, Stage.ENDING)  # type: ignore[arg-type]  (as run does when a probe fails)
        await maker.succeed(one)
        assert await recall(one) is None


async def test_the_next_worker_removes_the_records(maker: FcntlMaker) -> None:
    """Those that a former worker blanked for the next time are removed with the mount's end."""
    async with maker.hosts(1) as (one,):
        await one.backend.release(await acquire(maker, one))
        await acquire(maker, one, SHARED, "b.img")
        records = maker.store / ".lockfs" / "owners"
        (former,) = records.glob("*.*")
        await maker.succeed(one)
        await recall(one, SHARED, "b.img")
        assert len(list(records.iterdir())) == 2
        await maker.succeed(one)
        await maker.go_on(one)
        assert not former.exists()  # it has the same name of the mount in it
    assert list(records.iterdir()) == []


async def test_what_has_no_memory_begins_anew(maker: FcntlMaker) -> None:
    """Nothing is recalled then."""
    async with maker.hosts(1) as (one,):
        lease = await acquire(maker, one)
        other = FcntlBackend(FcntlOptions(), maker._store_fd, "host0")
        await other.start(lambda lease: None)
        assert await other.recall(one.image(IMAGE), Mode.EXCLUSIVE, one.owner) is None
        await other.settle()
        await other.stop()
        await one.backend.release(lease)
