"""The paxos backend: what failed and cancelled steps leave, doubt and loss, names, requests, and collecting.

The scenarios that broken variants must fail are functions of their own, without `test_`; see
test_paxos_broken_variants.py.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import pytest
import trio

from lockfs.backends.base import Image, Lease, LeaseState, Mode
from lockfs.backends.paxos.membership import REJOIN_S
from lockfs.backends.paxos.options import LayoutKind
from lockfs.errors import BackendError, ImageBusy, SetupError
from lockfs.paxos import requests
from lockfs.paxos.area import Area
from lockfs.paxos.errors import LockspaceFailed
from lockfs.paxos.lockspace import Lockspace, find_lockspace
from lockfs.paxos.resource import Resource
from lockfs.paxos.seams import DiskTimeout
from lockfs.paxos.timing import Timing
from lockfs.records import sectors
from lockfs.records.geometry import GEOMETRIES
from lockfs.records.results import RecordError
from lockfs.storage.disk import DirectDisk
from tests.conftest import ExpectLog

from .conformance import EXCLUSIVE, IMAGE, SHARED, acquire, convert, refused
from .makers import PaxosHost, PaxosMaker, TrioClock

EIO = OSError(errno.EIO, "Input/output error")
FAILS_S, COMEBACK_S, DEAD_S = 8.0, 38.0, 68.0
TRANSFERS_MAX = 40
"""More than an acquire, with the making of its lease, or a release has."""


@pytest.fixture
def maker(tmp_path: Path) -> PaxosMaker:
    """Hosts with one lease file for each image."""
    return PaxosMaker(tmp_path, LayoutKind.FILES)


@pytest.fixture(params=[LayoutKind.FILES, LayoutKind.INDEX], ids=lambda layout: layout.value)
def any_maker(request: pytest.FixtureRequest, tmp_path: Path) -> PaxosMaker:
    """Hosts of either own layout."""
    return PaxosMaker(tmp_path, request.param)


def lease_file(maker: PaxosMaker, inode: int) -> Path:
    return maker.store / ".lockfs" / "leases" / f"i{inode:016x}"


def leader(maker: PaxosMaker, inode: int) -> sectors.Leader:
    """What the storage has of an image's lease."""
    return sectors.decode_leader(lease_file(maker, inode).read_bytes()[:512])


async def taken_within(maker: PaxosMaker, host: PaxosHost, seconds: float, mode: Mode = EXCLUSIVE) -> Lease:
    """Try, as the keeper does, until the lease is had."""
    with trio.fail_after(seconds):
        while True:
            try:
                return await acquire(maker, host, mode)
            except ImageBusy:
                await trio.sleep(0.2)


# --- what failed and cancelled steps leave


async def cancelled_takes_nothing(maker: PaxosMaker) -> None:
    """Cancelled at whichever transfer, an acquire leaves the image free as soon as that has ended."""
    async with maker.hosts(2) as (one, two):
        for number in range(TRANSFERS_MAX):
            name = f"{number}.img"
            one.io.hold_nth(number, f"i{one.image(name).inode:016x}")
            leases: list[Lease] = []
            with trio.move_on_after(0.5):
                leases.append(await acquire(maker, one, name=name))
            one.io.heal()
            for lease in leases:
                await one.backend.release(lease)
            with trio.fail_after(20.0):
                while True:
                    try:
                        lease = await acquire(maker, two, name=name)
                        break
                    except ImageBusy:
                        await trio.sleep(0.5)
            await two.backend.release(lease)
            if leases:
                return
    raise AssertionError("an acquire has more transfers than were looked at")


async def test_cancelled_takes_nothing(maker: PaxosMaker) -> None:
    await cancelled_takes_nothing(maker)


@pytest.mark.parametrize("sector", [0, 2, 3])
async def test_a_timeout_is_settled_later(maker: PaxosMaker, sector: int) -> None:
    """What an acquire left that failed because of a silent storage keeps others out only until it lands."""
    async with maker.hosts(2) as (one, two):
        await one.backend.release(await acquire(maker, one))
        stuck = one.io.hold("w", name=lease_file(maker, one.image(IMAGE).inode).name)
        stuck.where = lambda offset: offset == 512 * sector
        mine = one.paxos._membership.epoch
        assert mine is not None
        if sector and sector != 1 + mine.lockspace.host_id:
            return  # another host's sector: nothing is written there
        with pytest.raises(DiskTimeout):
            await acquire(maker, one)
        assert one.image(IMAGE).inode in one.paxos._unsettled
        await trio.sleep(5.0)
        assert one.image(IMAGE).inode in one.paxos._unsettled
        one.io.heal()
        await trio.sleep(3.0)
        assert one.image(IMAGE).inode not in one.paxos._unsettled
        await two.backend.release(await taken_within(maker, two, 5.0))


async def test_an_acquire_goes_on_where_a_failed_one_stopped(maker: PaxosMaker) -> None:
    """The same host gets the image as soon as the storage answers, and holds it alone."""
    async with maker.hosts(2) as (one, two):
        stuck = one.io.hold("w", name=lease_file(maker, one.image(IMAGE).inode).name)
        stuck.where = lambda offset: offset == 0
        with pytest.raises(DiskTimeout):
            await acquire(maker, one)
        with pytest.raises(DiskTimeout):
            await acquire(maker, one)
        one.io.heal()
        lease = await acquire(maker, one)
        await trio.sleep(10.0)  # whatever was left would be put in order by now
        await refused(maker, two)
        await one.backend.release(lease)
        await two.backend.release(await acquire(maker, two))


async def settling_frees_no_lease(maker: PaxosMaker) -> None:
    """An acquire that comes while something is put in order holds what it got, however slow that was."""
    async with maker.hosts(2) as (one, two):
        name = lease_file(maker, one.image(IMAGE).inode).name
        one.io.hold("w", name=name, where=lambda offset: offset == 0)
        with pytest.raises(DiskTimeout):
            await acquire(maker, one)
        one.io.heal()
        reading = one.io.hold("r", name=name, where=lambda offset: offset == 0, times=1)
        while not reading.met:  # by who puts it in order
            await trio.sleep(0.1)
        leases: list[Lease] = []

        async def take() -> None:
            leases.append(await acquire(maker, one))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(take)
            await trio.sleep(0.3)
            reading.let_go()
        await trio.sleep(5.0)
        await refused(maker, two)
        await one.backend.release(leases[0])


async def test_settling_frees_no_lease(maker: PaxosMaker) -> None:
    await settling_frees_no_lease(maker)


async def test_a_release_is_repeated(maker: PaxosMaker) -> None:
    """A release that timed out raises; repeated, it goes on, and succeeds when the storage answers."""
    async with maker.hosts(2) as (one, two):
        lease = await acquire(maker, one)
        one.io.hold("w", name=lease_file(maker, one.image(IMAGE).inode).name)
        for _ in range(3):
            with pytest.raises(DiskTimeout):
                await one.backend.release(lease)
            assert lease.state is LeaseState.HELD
        await refused(maker, two)
        one.io.heal()
        await one.backend.release(lease)
        assert lease.state is LeaseState.RELEASED
        await one.backend.release(lease)  # again is no error
        await two.backend.release(await acquire(maker, two))


@pytest.mark.parametrize("number", range(6))
async def test_a_cancelled_release_goes_on(maker: PaxosMaker, number: int) -> None:
    """Cancelled at any transfer, and repeated, it leaves the image free."""
    async with maker.hosts(2) as (one, two):
        lease = await acquire(maker, one)
        one.io.hold_nth(number, lease_file(maker, one.image(IMAGE).inode).name)
        with trio.move_on_after(0.5):
            await one.backend.release(lease)
        one.io.heal()
        await one.backend.release(lease)
        await two.backend.release(await acquire(maker, two))


async def test_a_conversion_that_fails_keeps_the_lease(maker: PaxosMaker) -> None:
    """Towards EXCLUSIVE it stays SHARED, and others share it again as soon as the storage answers."""
    async with maker.hosts(2) as (one, two):
        lease = await acquire(maker, one, SHARED)
        stuck = one.io.hold("w", lease_file(maker, one.image(IMAGE).inode).name, lambda offset: offset == 0)
        with pytest.raises(DiskTimeout):
            await convert(maker, one, lease, EXCLUSIVE)
        assert (lease.mode, lease.state) == (SHARED, LeaseState.HELD)
        await refused(maker, two)
        stuck.let_go()
        other = await taken_within(maker, two, 10.0, SHARED)
        with pytest.raises(ImageBusy):
            await convert(maker, one, lease, EXCLUSIVE)
        await two.backend.release(other)
        await convert(maker, one, lease, EXCLUSIVE)
        await refused(maker, two, SHARED)
        await one.backend.release(lease)


async def test_weakening_that_fails_is_weakened(maker: PaxosMaker) -> None:
    """Towards SHARED the lease is SHARED whatever happens, and others share it a little later."""
    async with maker.hosts(2) as (one, two):
        lease = await acquire(maker, one)
        stuck = one.io.hold("w", lease_file(maker, one.image(IMAGE).inode).name, lambda offset: offset == 0)
        with pytest.raises(DiskTimeout):
            await convert(maker, one, lease, SHARED)
        assert lease.mode is SHARED
        stuck.let_go()
        await two.backend.release(await taken_within(maker, two, 10.0, SHARED))
        await one.backend.release(lease)


# --- doubt and loss


async def test_a_lease_given_back_in_doubt_is_given_back(maker: PaxosMaker, expect_log: ExpectLog) -> None:
    """A release in doubt fails; it does not forget a lease that the storage shows as a living host's."""
    expect_log("WARNING .*could not be renewed", 1)
    async with maker.hosts(2) as (one, two):
        lease = await acquire(maker, one)
        one.io.hold("r", name="lockspace")
        await trio.sleep(FAILS_S + 4.0)
        assert lease.state is LeaseState.DOUBT
        with pytest.raises(LockspaceFailed):
            await one.backend.release(lease)
        with pytest.raises(BackendError):
            await acquire(maker, one, name="b.img")
        one.io.heal()
        await trio.sleep(3.0)
        await refused(maker, two)
        await one.backend.release(lease)
        await two.backend.release(await acquire(maker, two))


async def loss_ends_leases(maker: PaxosMaker) -> None:
    """When others may take them, the host has been told of each lease that it is lost, and was out of time
    long before; nobody else gets one earlier.
    """
    async with maker.hosts(2) as (one, two):
        lease = await acquire(maker, one)
        other = await acquire(maker, one, SHARED, name="b.img")
        assert lease.in_time()
        one.io.hold("rw")
        start = trio.current_time()
        while True:
            try:
                taken = await acquire(maker, two)
                break
            except ImageBusy:
                assert trio.current_time() < start + 2 * DEAD_S
                await trio.sleep(1.0)
        assert trio.current_time() > start + DEAD_S - 3.0
        assert not lease.in_time()
        assert (lease.state, other.state) == (LeaseState.LOST, LeaseState.LOST)
        assert [change.image.name for change in one.changes] == [IMAGE, "b.img", IMAGE, "b.img"]
        one.io.heal()
        await one.backend.release(lease)
        await one.backend.release(other)
        await refused(maker, one)
        await two.backend.release(taken)
        await one.backend.release(await taken_within(maker, one, 30.0))


LOSS = "WARNING .*could not be renewed|ERROR .*is lost|ERROR .*cannot be joined"


async def test_loss_ends_leases(maker: PaxosMaker, expect_log: ExpectLog) -> None:
    expect_log(LOSS, None)
    await loss_ends_leases(maker)


async def test_a_crashed_hosts_lease_is_taken_over(any_maker: PaxosMaker) -> None:
    """Not before it counts as dead; until then the refusal says when it will."""
    maker = any_maker
    async with maker.hosts(2) as (one, two):
        await acquire(maker, one)
        one.crash()
        start = trio.current_time()
        await trio.sleep(FAILS_S + 3.0)
        sentence = await refused(maker, two)
        assert "silent" in sentence
        assert "counts as dead in" in sentence
        await two.backend.release(await taken_within(maker, two, 2 * DEAD_S))
        assert trio.current_time() - start > DEAD_S - 3.0


# --- start and stop


async def test_waiting_for_the_join(maker: PaxosMaker) -> None:
    """join=wait: running has not begun before the lockspace is joined; else an acquire waits."""
    maker.changes[0] = {"join_wait": True}
    async with maker.hosts(1):
        assert trio.current_time() >= 2.0
        later = await maker.add(1)
        start = trio.current_time()
        assert later.paxos._membership.epoch is None
        await later.backend.release(await acquire(maker, later))
        assert trio.current_time() - start >= 2.0


async def test_waiting_for_a_join_that_fails(maker: PaxosMaker) -> None:
    """join=wait: the mount command is told."""
    maker.changes[0] = maker.changes[1] = {"join_wait": True, "host_id": 4}
    async with maker.hosts(1):
        second = await maker.open(1)
        with pytest.raises((SetupError, ExceptionGroup)) as caught:
            await maker.run(second)
        error: BaseException = caught.value
        while isinstance(error, BaseExceptionGroup):
            (error,) = error.exceptions
        assert isinstance(error, SetupError)
        assert "host id 4" in str(error)


async def test_a_stop_with_a_storage_that_is_silent(maker: PaxosMaker, expect_log: ExpectLog) -> None:
    """It ends in bounded time, and closes what it cannot give back."""
    expect_log("WARNING .*could not be left", 1)
    async with maker.hosts(1) as (one,):
        await acquire(maker, one)
        one.io.hold("w", name=lease_file(maker, one.image(IMAGE).inode).name)
        with contextlib.suppress(DiskTimeout):
            await acquire(maker, one, name="b.img")
        one.crash()
        one.io.hold("w")
        start = trio.current_time()
        await one.backend.stop()
        assert trio.current_time() - start < 30.0


# --- leases that are removed


async def removed_is_not_held(maker: PaxosMaker) -> None:
    """A lease that was removed between being found and being taken excludes nobody: it is not kept."""
    async with maker.hosts(2) as (one, two):
        await one.backend.release(await acquire(maker, one))
        inode = one.image(IMAGE).inode
        reading = one.io.hold("r", lease_file(maker, inode).name, times=1)
        leases: list[Lease] = []

        async def take() -> None:
            leases.append(await acquire(maker, one))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(take)
            while not reading.met:
                await trio.sleep(0.01)
            lease_file(maker, inode).unlink()  # as a host does that holds it, and dies then
            reading.let_go()
        await refused(maker, two)
        await one.backend.release(leases[0])
        await two.backend.release(await acquire(maker, two))


async def test_removed_is_not_held(maker: PaxosMaker) -> None:
    await removed_is_not_held(maker)


async def test_an_unfilled_lease_file_is_an_error(maker: PaxosMaker) -> None:
    """Nothing is written to a file that has no lease in it; the sentence names it."""
    async with maker.hosts(1) as (one,):
        inode = one.image(IMAGE).inode
        lease_file(maker, inode).write_bytes(bytes(1 << 20))
        with pytest.raises(RecordError, match=f"i{inode:016x}"):
            await acquire(maker, one)
        assert not any(lease_file(maker, inode).read_bytes())


async def test_collect_removes_what_is_gone(any_maker: PaxosMaker) -> None:
    """Leases of images that are gone go; those that anybody holds, or whose image is there, stay."""
    maker = any_maker
    async with maker.hosts(2) as (one, two):
        held = await acquire(maker, one, name="held.img")
        shared = await acquire(maker, two, SHARED, name="shared.img")
        for name in ("gone.img", "there.img"):
            await one.backend.release(await acquire(maker, one, name=name))
        inodes = {name: one.image(name).inode for name in ("held.img", "gone.img", "there.img")}
        there = {inodes["there.img"]}
        for host in (two, one):
            removed, done = await host.backend.collect(
                lambda inode: inode not in there, trio.current_time() + 60
            )
            assert (removed, done) == ([inodes["gone.img"]] if host is two else [], True)
        await refused(maker, two, name="held.img")
        await refused(maker, one, name="shared.img")
        await one.backend.release(await acquire(maker, one, name="gone.img"))
        await one.backend.release(held)
        await two.backend.release(shared)


async def test_collect_stops_at_its_deadline(maker: PaxosMaker) -> None:
    async with maker.hosts(1) as (one,):
        await one.backend.release(await acquire(maker, one))
        assert await one.backend.collect(lambda inode: True, trio.current_time()) == ([], False)


async def test_collect_leaves_damage_alone(maker: PaxosMaker, expect_log: ExpectLog) -> None:
    """A damaged lease is named, not removed, and does not keep others from being removed."""
    expect_log("WARNING .*is left alone: .*damaged", 1)
    async with maker.hosts(1) as (one,):
        for name in (IMAGE, "b.img"):
            await one.backend.release(await acquire(maker, one, name=name))
        damaged, whole = one.image(IMAGE).inode, one.image("b.img").inode
        with open(lease_file(maker, damaged), "r+b") as file:
            file.seek(160)
            file.write(b"\xff")
        assert await one.backend.collect(lambda inode: True, trio.current_time() + 60) == ([whole], True)
        assert lease_file(maker, damaged).exists()


async def collect_and_acquire_are_apart(maker: PaxosMaker) -> None:
    """A new image has the number of one that is gone, and is opened while this mount collects its lease."""
    async with maker.hosts(2) as (one, two):
        await one.backend.release(await acquire(maker, one))
        name = lease_file(maker, one.image(IMAGE).inode).name
        removing = one.io.hold("w", name=name, where=lambda offset: offset == 0, times=1)
        leases: list[Lease] = []

        async def take() -> None:
            leases.append(await acquire(maker, one))

        async def collect() -> None:
            await one.backend.collect(lambda inode: True, trio.current_time() + 60)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(collect)
            while not removing.met:  # it is about to hold the lease
                await trio.sleep(0.01)
            nursery.start_soon(take)
            await trio.sleep(0.2)
            removing.let_go()
        await refused(maker, two)
        await one.backend.release(leases[0])


async def test_collect_and_acquire_are_apart(maker: PaxosMaker) -> None:
    await collect_and_acquire_are_apart(maker)


async def test_a_removal_of_which_nothing_is_known(tmp_path: Path) -> None:
    """The write of the entry hangs: the lease is kept until it is known whether it is gone."""
    maker = PaxosMaker(tmp_path, LayoutKind.INDEX)
    async with maker.hosts(2) as (one, two):
        await one.backend.release(await acquire(maker, one))
        inode = one.image(IMAGE).inode
        entries = one.io.hold("w", where=lambda offset: offset == (1 << 20) + 512, times=1)
        with pytest.raises(BackendError):
            await one.backend.collect(lambda number: True, trio.current_time() + 60)
        assert inode in one.paxos._unsettled
        await trio.sleep(5.0)
        assert inode in one.paxos._unsettled
        with pytest.raises(BackendError, match=r"removed|earlier write"):
            await acquire(maker, one)
        entries.let_go()
        await trio.sleep(5.0)
        assert inode not in one.paxos._unsettled
        lease = await taken_within(maker, two, 5.0)
        await refused(maker, one)
        await two.backend.release(lease)


async def test_a_remembered_slot_is_looked_up_anew(tmp_path: Path) -> None:
    """Leases that another host removed, or whose slot has another image's: nobody stumbles over them."""
    maker = PaxosMaker(tmp_path, LayoutKind.INDEX)
    async with maker.hosts(2) as (one, two):
        for host in (one, two):
            await host.backend.release(await acquire(maker, host))
        removed, _ = await one.backend.collect(lambda inode: True, trio.current_time() + 60)
        assert removed == [one.image(IMAGE).inode]
        assert await two.backend.holders(two.image(IMAGE)) == []
        await one.backend.release(await acquire(maker, one, name="b.img"))
        await two.backend.release(await acquire(maker, two))


# --- other hosts, that are not lockfs


class SanlockHost:
    """A host as a sanlock daemon's, by the engine: its name is its own, it tells nothing in the store."""

    NAME = b"7b6b4a1e-0000-4000-8000-000000000000.blade7"

    def __init__(self, maker: PaxosMaker, host_id: int) -> None:
        self._maker = maker
        self._host_id = host_id
        self._disks: list[DirectDisk] = []

    async def __aenter__(self) -> SanlockHost:
        area, _ = await find_lockspace(await self._area("lockspace"), b"lockfs")
        self.lockspace = Lockspace(
            area, b"lockfs", self._host_id, self.NAME, clock=TrioClock(), timing=Timing(io_timeout=1)
        )
        await self.lockspace.join()
        await self.lockspace.renew()
        return self

    async def __aexit__(self, *_: object) -> None:
        for disk in self._disks:
            await disk.close()

    async def _area(self, name: str) -> Area:
        path = self._maker.store / ".lockfs" / "leases" / name
        self._disks.append(await DirectDisk.open(str(path)))
        return Area(self._disks[-1], 0, GEOMETRIES[0], 1.0)

    async def resource(self, image: Image) -> Resource:
        name = f"i{image.inode:016x}"
        return Resource(await self._area(name), self.lockspace, name.encode(), Random(0))

    async def ask(self, image: Image, owner: int, force_mode: int) -> None:
        """What `sanlock client request` does."""
        name = f"i{image.inode:016x}"
        await requests.request(await self._area(name), self.lockspace, name.encode(), force_mode)
        self.lockspace.call(owner)
        await self.lockspace.renew()


@pytest.fixture
async def pair(maker: PaxosMaker) -> AsyncIterator[tuple[PaxosHost, SanlockHost]]:
    """A lockfs host whose image has a lease, and a sanlock host."""
    async with maker.hosts(1) as (one,):
        await one.backend.release(await acquire(maker, one))
        async with SanlockHost(maker, 200) as other:
            yield one, other


async def test_a_sanlock_host_is_named(maker: PaxosMaker, pair: tuple[PaxosHost, SanlockHost]) -> None:
    """By its name in the lockspace and its number; what it holds is respected, until it is dead."""
    one, other = pair
    resource = await other.resource(one.image(IMAGE))
    await resource.acquire()
    await trio.sleep(3.0)
    sentence = await refused(maker, one)
    assert "sanlock on 7b6b4a1e-0000-4000-8000-000000000000.blade7 (host id 200)" in sentence
    (holder,) = await one.backend.holders(one.image(IMAGE))
    assert (holder.owner, holder.mode) == (None, EXCLUSIVE)
    await other.lockspace.renew()
    await resource.convert(shared=True)
    (holder,) = await one.backend.holders(one.image(IMAGE))
    assert holder.mode is SHARED
    await trio.sleep(FAILS_S + 3.0)
    assert "silent" in str(*await one.backend.holders(one.image(IMAGE)))
    await trio.sleep(DEAD_S)
    assert await one.backend.holders(one.image(IMAGE)) == []
    await one.backend.release(await acquire(maker, one))
    assert {peer.name for peer in await one.backend.peers()} == {"host0", other.NAME.decode()}


async def test_sanlocks_request_reaches_the_holder(
    maker: PaxosMaker, pair: tuple[PaxosHost, SanlockHost]
) -> None:
    """The record beside the lease and the bit in the lockspace: asked for, until the lease is given back."""
    one, other = pair
    image = one.image(IMAGE)
    lease = await acquire(maker, one)
    assert await one.backend.requested([image.inode]) == set()
    epoch = one.paxos._membership.epoch
    assert epoch is not None
    await other.ask(image, epoch.lockspace.host_id, sectors.FORCE_GRACEFUL)
    await trio.sleep(3.0)
    assert await one.backend.requested([image.inode]) == {image.inode}
    assert await one.backend.requested([image.inode + 1]) == set()
    await one.backend.release(lease)
    await other.lockspace.renew()
    lease = await acquire(maker, one)
    await trio.sleep(5.0)
    assert await one.backend.requested([image.inode]) == set()  # the record is of an earlier version
    await one.backend.release(lease)


async def test_a_busy_lease_stays_busy_if_nobody_can_be_named(
    maker: PaxosMaker, pair: tuple[PaxosHost, SanlockHost]
) -> None:
    """That the holder's name cannot be read does not turn a refusal into an I/O error."""
    one, other = pair
    await trio.sleep(3.0)
    await other.lockspace.renew()
    resource = await other.resource(one.image(IMAGE))
    await resource.acquire()
    await trio.sleep(3.0)
    await other.lockspace.renew()
    seen = 0

    def after_the_refusal(offset: int) -> bool:
        nonlocal seen
        seen += 1
        return seen > 2

    one.io.refuse("r", EIO, lease_file(maker, one.image(IMAGE).inode).name, after_the_refusal)
    assert "of which nothing could be read" in await refused(maker, one)


async def test_before_the_join_nobody_is_called_free(maker: PaxosMaker) -> None:
    """Who asks whether an image is held, to change its owner say, waits for the join, and is told then."""
    async with maker.hosts(1) as (one,):
        lease = await acquire(maker, one)
        late = await maker.add(1)
        with pytest.raises(BackendError, match="not joined"):
            await late.backend.peers()
        assert late.paxos._membership.epoch is None
        (holder,) = await late.backend.holders(late.image(IMAGE))
        assert holder.owner == one.owner
        await one.backend.release(lease)


async def test_without_a_lockspace_nobody_is_called_free(maker: PaxosMaker, expect_log: ExpectLog) -> None:
    """If it cannot be joined, that is the answer."""
    expect_log("ERROR .*cannot be joined: .*Input/output error", 1)
    async with maker.hosts(1) as (one,):
        lease = await acquire(maker, one)
        late = await maker.open(1)
        late.io.refuse("w", EIO, "lockspace")
        await maker.run(late)
        with pytest.raises(BackendError, match="Input/output error"):
            await late.backend.holders(late.image(IMAGE))
        await one.backend.release(lease)


async def test_a_second_lease_of_one_image_is_refused(maker: PaxosMaker) -> None:
    async with maker.hosts(1) as (one,):
        lease = await acquire(maker, one)
        with pytest.raises(BackendError, match="already leased"):
            await acquire(maker, one)
        await one.backend.release(lease)


async def test_what_an_earlier_membership_left_is_void(maker: PaxosMaker, expect_log: ExpectLog) -> None:
    """After a loss an acquire begins anew; nothing of the old one stays open."""
    expect_log(LOSS, None)
    async with maker.hosts(1) as (one,):
        name = lease_file(maker, one.image(IMAGE).inode).name
        one.io.hold("w", name, lambda offset: offset == 0)
        with pytest.raises(DiskTimeout):
            await acquire(maker, one)
        one.io.hold("rw", "lockspace")
        await trio.sleep(COMEBACK_S + 5.0)
        one.io.heal()
        await trio.sleep(2 * REJOIN_S)
        lease = await taken_within(maker, one, 3 * DEAD_S)
        assert lease.in_time()
        assert one.image(IMAGE).inode not in one.paxos._unsettled
        await one.backend.release(lease)


async def test_a_lease_that_was_replaced_is_let_go_with_a_complaint(
    tmp_path: Path, expect_log: ExpectLog
) -> None:
    """Somebody overwrote it: the host does not hang on to it, and writes nothing to what is there now."""
    expect_log("ERROR .*not as this host had left it", 1)
    maker = PaxosMaker(tmp_path, LayoutKind.INDEX)
    async with maker.hosts(1) as (one,):
        lease = await acquire(maker, one)
        area = tmp_path / "area"
        other = sectors.new_resource(sectors.new_leader(GEOMETRIES[0], b"images", b"other"))
        with open(area, "r+b") as file:
            file.seek(3 << 20)
            file.write(other)
        await one.backend.release(lease)
        assert lease.state is LeaseState.RELEASED
        content = area.read_bytes()[3 << 20 : 4 << 20]
        assert sectors.decode_leader(content) == sectors.decode_leader(other)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"lease_area": "/nonexistent/x"}, "/nonexistent/x cannot be used: No such file.*lockfsctl init"),
        ({"layout": LayoutKind.INDEX}, "layout=index needs lease_area="),
        ({"layout": LayoutKind.LIBVIRT, "lock_path": "/i"}, "layout=libvirt needs lease_area="),
        ({"layout": LayoutKind.INDEX, "lease_area": "/tmp"}, "layout=index needs a file or a block device"),
        ({"layout": LayoutKind.FILES, "lease_area": "/dev/null"}, "layout=files needs a directory"),
        ({"lockspace": "other"}, "'lockfs', not 'other'"),
        ({"host_id": 2001}, "host_id=2001"),
    ],
)
async def test_an_area_that_does_not_fit_is_refused(
    maker: PaxosMaker, changes: dict[str, object], names: str
) -> None:
    """One sentence says what is wrong and what to do; what was opened is closed."""
    maker.changes[1] = changes
    async with maker.hosts(1):
        with pytest.raises(SetupError, match=names):
            await maker.open(1)
