"""The next worker of a mount with paxos leases: the membership that goes on, and when all is lost.

The kills at every step are in test_killed.py (real ones) and tests/engine/test_recall.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from lockfs.backends.base import Image, Lease, LeaseState
from lockfs.backends.paxos.backend import PaxosBackend
from lockfs.backends.paxos.options import LayoutKind
from lockfs.errors import BackendError, SetupError
from lockfs.records import sectors
from lockfs.records.geometry import MIB
from lockfs.records.sectors import Leader
from tests.conftest import ExpectLog

from .conformance import EXCLUSIVE, IMAGE, SHARED, acquire, convert, recall, refused
from .makers import PaxosHost, PaxosMaker
from .test_paxos_backend import DEAD_S, EIO, FAILS_S, leader, lease_file, taken_within

LOG = "lockfs.paxos"
COMEBACK_S = 38.0


@pytest.fixture
def maker(tmp_path: Path) -> PaxosMaker:
    """Hosts with one lease file for each image."""
    return PaxosMaker(tmp_path, LayoutKind.FILES)


@pytest.fixture(params=[LayoutKind.FILES, LayoutKind.INDEX], ids=lambda layout: layout.value)
def any_maker(request: pytest.FixtureRequest, tmp_path: Path) -> PaxosMaker:
    """Hosts of either own layout."""
    return PaxosMaker(tmp_path, request.param)


def life(host: PaxosHost) -> tuple[int, int, bytes]:
    """Host id, generation and name, as the host is known to all others."""
    epoch = host.paxos._membership.epoch
    assert epoch is not None
    return epoch.lockspace.host_id, epoch.lockspace.generation, epoch.lockspace.host_name


def delta(maker: PaxosMaker, host_id: int) -> Leader:
    """What the storage has of a host."""
    whole = (maker.store / ".lockfs" / "leases" / "lockspace").read_bytes()
    return sectors.decode_leader(whole[512 * (host_id - 1) : 512 * host_id])


def overwrite(maker: PaxosMaker, host_id: int, **changes: Any) -> None:
    """What another host does to a sector."""
    record = replace(delta(maker, host_id), **changes).summed()
    with open(maker.store / ".lockfs" / "leases" / "lockspace", "r+b") as file:
        file.seek(512 * (host_id - 1))
        file.write(sectors.encode_delta(record))


def images(host: PaxosHost) -> list[Image]:
    """Those that the host has open."""
    return list(host.images.values())


async def test_the_membership_goes_on(any_maker: PaxosMaker) -> None:
    """Under the same id, generation and name, at once, and for as long as one worker follows the other."""
    async with any_maker.hosts(2) as (one, two):
        await acquire(any_maker, one)
        before = life(one)
        for _ in range(10):
            await any_maker.succeed(one)
            began = trio.current_time()
            assert await recall(one) is not None
            await refused(any_maker, two)
            await any_maker.go_on(one)
            assert life(one) == before
            await one.paxos._ready()
            assert trio.current_time() - began < 1.0
            await trio.sleep(DEAD_S / 8)
            await refused(any_maker, two)
        assert [peer.state for peer in await two.backend.peers()] == ["live", "live"]
        assert not one.changes


async def test_nothing_is_written_before_the_first_renewal(maker: PaxosMaker) -> None:
    """A worker that starts, and recalls, and is killed again before it runs, leaves all as it was."""
    async with maker.hosts(1) as (one,):
        await acquire(maker, one)
        await maker.kill(one)
        one.io.log.clear()
        for _ in range(3):
            await maker.succeed(one)
            assert await recall(one) is not None
        assert {call for call, _, _ in one.io.log} == {"r"}
        assert sum(name == "lockspace" for _, name, _ in one.io.log) <= 3 * 3  # probe, first, own
        await maker.go_on(one)


async def test_who_waited_need_not_wait_for_the_first_renewal(maker: PaxosMaker) -> None:
    """A worker that goes on takes leases once it has looked at the other hosts, its renewal under way."""
    async with maker.hosts(2) as (one, two):
        await acquire(maker, one)
        await maker.kill(one)
        await trio.sleep(1.5)
        await maker.succeed(one)
        assert await recall(one) is not None
        held = one.io.hold("w", "lockspace", times=1)
        await maker.go_on(one)
        lockspace = (await one.paxos._ready()).lockspace
        before = lockspace.renewed_at
        await trio.sleep(0.1)
        assert lockspace.renewed_at == before
        await one.backend.release(await acquire(maker, one, name="b"))
        assert lockspace.renewed_at == before
        held.let_go()
        await trio.sleep(0.5)
        assert lockspace.renewed_at > before
        await refused(maker, two)


async def test_who_goes_on_knows_at_once_who_lives(maker: PaxosMaker) -> None:
    """Its first renewal comes right after its first look: it is not as if everybody had been silent since."""
    async with maker.hosts(2) as (one, two):
        await acquire(maker, one)
        await acquire(maker, two, name="b")
        await maker.kill(one)
        await trio.sleep(1.5)
        await maker.succeed(one)
        assert await recall(one) is not None
        slow = one.io.hold_nth(1, "lockspace")  # what comes after the first look
        await maker.go_on(one)
        lockspace = (await one.paxos._ready()).lockspace
        await trio.sleep(0.1)
        slow.let_go()
        while lockspace.clock.now() - lockspace.renewed_at > 1.0:
            await trio.sleep(0.02)
        began = trio.current_time()
        assert "host1" in await refused(maker, one, name="b")
        assert trio.current_time() - began < 0.5


@pytest.mark.parametrize("away_s", [FAILS_S - 2, FAILS_S + 2, COMEBACK_S - 2, COMEBACK_S + 2])
async def test_how_long_it_may_take(maker: PaxosMaker, away_s: float, expect_log: ExpectLog) -> None:
    """In time the lease is held; late it is in doubt, until the first renewal; too late, it is lost."""
    if away_s > COMEBACK_S:
        expect_log(LOG)
    async with maker.hosts(2) as (one, two):
        lease: Lease | None = await acquire(maker, one)
        await maker.kill(one)
        await trio.sleep(away_s)
        await maker.succeed(one)
        lease = await recall(one)
        if away_s > COMEBACK_S:
            assert lease is None
            await maker.go_on(one)
            await one.backend.release(await taken_within(maker, one, 2 * DEAD_S))
            return
        assert lease is not None
        late = away_s > FAILS_S
        assert lease.state is (LeaseState.DOUBT if late else LeaseState.HELD)
        assert lease.in_time() is not late
        await maker.go_on(one)
        await trio.sleep(2.0)
        assert (lease.state, lease.in_time()) == (LeaseState.HELD, True)
        assert one.changes == ([lease] if late else [])
        await refused(maker, two)
        await one.backend.release(lease)


async def test_a_renewal_across_the_limit_tells_of_the_doubt(maker: PaxosMaker) -> None:
    """The lease was held when it was recalled, and gates have said no before the renewal landed."""
    async with maker.hosts(1) as (one,):
        await acquire(maker, one)
        await maker.kill(one)
        await trio.sleep(FAILS_S - 2)
        await maker.succeed(one)
        lease = await recall(one)
        assert lease is not None
        states: list[LeaseState] = []
        one.paxos._on_change = lambda changed: states.append(changed.state)
        one.io.hold("w", "lockspace")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(maker.go_on, one)
            await trio.sleep(5.0)
            one.io.heal()
        await trio.sleep(2.0)
        assert states == [LeaseState.DOUBT, LeaseState.HELD]


@pytest.mark.parametrize("change", [{"owner_generation": 9}, {"timestamp": 0}], ids=["taken", "left"])
async def test_a_membership_that_is_not_ours_any_more(
    maker: PaxosMaker, change: dict[str, Any], expect_log: ExpectLog
) -> None:
    """Everything is lost, which the log says; what was held is taken by nobody but who may."""
    expect_log(LOG)
    async with maker.hosts(1) as (one,):
        await acquire(maker, one)
        host_id, *_ = life(one)
        await maker.kill(one)
        overwrite(maker, host_id, **change)
        await maker.succeed(one)
        assert await recall(one) is None
        assert one.paxos._membership.epoch is None
        await maker.go_on(one)
        await one.backend.release(await taken_within(maker, one, 2 * DEAD_S))


async def test_a_lockspace_that_was_replaced(maker: PaxosMaker, expect_log: ExpectLog) -> None:
    """A new one of the same name: nobody there knows this host."""
    expect_log(LOG, None)
    async with maker.hosts(1) as (one,):
        await acquire(maker, one)
        await maker.kill(one)
        (maker.store / ".lockfs" / "leases" / "lockspace").unlink()
        await maker.succeed(one)
        assert await recall(one) is None
        await maker.go_on(one)


async def test_a_lease_taken_by_force_is_not_recalled(maker: PaxosMaker, expect_log: ExpectLog) -> None:
    """Nor does settling it harm the one who has it."""
    expect_log(LOG)
    async with maker.hosts(2) as (one, two):
        await acquire(maker, one)
        await maker.kill(one)
        await two.backend.force(two.image(IMAGE))
        lease = await acquire(maker, two)
        await maker.succeed(one)
        assert await recall(one) is None
        await maker.go_on(one)
        await refused(maker, one)
        await two.backend.release(lease)
        await one.backend.release(await acquire(maker, one))


async def test_a_lease_that_was_removed_is_not_recalled(maker: PaxosMaker, expect_log: ExpectLog) -> None:
    """By hand: there is nothing left to settle either."""
    expect_log(LOG)
    async with maker.hosts(1) as (one,):
        inode = one.image(IMAGE).inode
        await acquire(maker, one)
        await maker.kill(one)
        lease_file(maker, inode).unlink()
        await maker.succeed(one)
        assert await recall(one) is None
        await maker.go_on(one)
        assert one.memory.items("backend:lease:") == {}
        await one.backend.release(await acquire(maker, one))


async def test_a_killed_join_goes_on(maker: PaxosMaker) -> None:
    """Under the same name: the id need not be waited for as one of a dead host."""
    maker.changes[0] = {"host_id": 3}
    async with maker.hosts(0):
        one = await maker.open(0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.run)
            while not delta(maker, 3).timestamp:
                await trio.sleep(0.1)
            # A killed worker gives nothing back, other than one that is cancelled.
            noted = one.memory.get("backend:member")
            joining = delta(maker, 3)
            await maker.kill(one)
        one.memory.set("backend:member", noted)
        overwrite(maker, 3, timestamp=joining.timestamp)
        await maker.succeed(one)
        assert await recall(one) is None
        began = trio.current_time()
        await maker.go_on(one)
        await one.backend.release(await acquire(maker, one))
        assert trio.current_time() - began < 5.0
        assert life(one) == (3, joining.owner_generation + 1, joining.resource_name)


async def test_silent_storage_at_the_start(maker: PaxosMaker) -> None:
    """Nothing is decided: the next worker that starts finds all as it was."""
    async with maker.hosts(1) as (one,):
        await acquire(maker, one)
        await maker.kill(one)
        broken = one.io.refuse("r", EIO, "lockspace")
        with pytest.raises(SetupError):
            await maker.succeed(one)
        one.io.drop(broken)
        await maker.succeed(one)
        lease_reads = one.io.refuse("r", EIO, lease_file(maker, one.image(IMAGE).inode).name)
        with pytest.raises(BackendError):
            await recall(one)
        one.io.drop(lease_reads)
        lease = await recall(one)
        assert lease is not None
        await maker.go_on(one)
        await one.backend.release(lease)


async def test_what_cannot_be_settled_at_first_is_settled_later(any_maker: PaxosMaker) -> None:
    """As soon as the storage answers; and whoever wants it here goes on with it at once."""
    async with any_maker.hosts(2) as (one, two):
        for name in ("a.img", "b.img"):
            await acquire(any_maker, one, name=name)
        await any_maker.succeed(one)
        await any_maker.run(one)
        is_index = any_maker._layout is LayoutKind.INDEX
        names = ["area"] if is_index else [lease_file(any_maker, image.inode).name for image in images(one)]
        for name in names:
            one.io.refuse("w", EIO, name, lambda offset: not is_index or offset >= MIB)
        await one.backend.settle()
        await refused(any_maker, two)
        one.io.heal()
        await two.backend.release(await taken_within(any_maker, two, 5.0))
        await one.backend.release(await acquire(any_maker, one, name="b.img"))
        assert one.memory.items("backend:lease:") == {}


async def test_what_nobody_recalled_is_had_again_as_it_is(maker: PaxosMaker) -> None:
    """An open that was being granted comes back: its lease is had as it is, and nobody else got it."""
    async with maker.hosts(2) as (one, two):
        await acquire(maker, one)
        had = leader(maker, one.image(IMAGE).inode)
        await maker.succeed(one)
        await maker.run(one)
        await refused(maker, two)
        lease = await acquire(maker, one)
        assert leader(maker, one.image(IMAGE).inode) == had
        await one.backend.settle()
        holder = await refused(maker, two)
        assert "host0" in holder
        await one.backend.release(lease)
        await two.backend.release(await acquire(maker, two))
        assert one.memory.items("backend:lease:") == {}


async def test_what_nobody_recalled_is_put_in_order_for_who_shares(any_maker: PaxosMaker) -> None:
    """A lease that was for one alone is given back before it is shared."""
    async with any_maker.hosts(2) as (one, two):
        await acquire(any_maker, one)
        await any_maker.succeed(one)
        await any_maker.run(one)
        shared = await acquire(any_maker, one, SHARED)
        also = await acquire(any_maker, two, SHARED)
        await one.backend.release(shared)
        await two.backend.release(also)
        await two.backend.release(await acquire(any_maker, two))


async def test_a_recalled_lease_can_be_lost_and_followed(maker: PaxosMaker, expect_log: ExpectLog) -> None:
    """As one that this worker took: a guest that was suspended goes on if nobody had its image since."""
    expect_log(LOG, None)
    async with maker.hosts(1) as (one,):
        await acquire(maker, one)
        await maker.succeed(one)
        lease = await recall(one)
        assert lease is not None
        await maker.go_on(one)
        one.io.hold("w", "lockspace")
        with trio.fail_after(2 * DEAD_S):
            while lease.state is not LeaseState.LOST:
                await trio.sleep(1.0)
        assert one.memory.get("backend:member") is None
        one.io.heal()
        await one.backend.release(lease)
        again = await taken_within(maker, one, 3 * DEAD_S)
        assert again.follows(lease)
        await one.backend.release(again)


async def test_a_lost_lease_is_not_recalled(maker: PaxosMaker, expect_log: ExpectLog) -> None:
    """Of a membership that the former worker had lost, or had followed by another."""
    expect_log(LOG, None)
    async with maker.hosts(1) as (one,):
        lease = await acquire(maker, one)
        one.io.hold("w", "lockspace")
        with trio.fail_after(2 * DEAD_S):
            while lease.state is not LeaseState.LOST:
                await trio.sleep(1.0)
        one.io.heal()
        await one.paxos._membership.ready()
        await maker.succeed(one)
        assert await recall(one) is None
        await maker.go_on(one)
        assert one.memory.items("backend:lease:") == {}


async def test_names_and_calls_go_on(any_maker: PaxosMaker) -> None:
    """Others are told the same of the holder, and their requests reach the next worker."""
    async with any_maker.hosts(2) as (one, two):
        await acquire(any_maker, one)
        inode = one.image(IMAGE).inode
        await any_maker.succeed(one)
        lease = await recall(one)
        assert lease is not None
        await any_maker.go_on(one)
        assert one.owner.program in await refused(any_maker, two)
        await two.backend.request(two.image(IMAGE), two.owner)
        assert await one.backend.requested([inode]) == set()  # whether it lives is not known yet
        await trio.sleep(0.2)
        await two.backend.request(two.image(IMAGE), two.owner)
        assert await one.backend.requested([inode]) == {inode}
        await convert(any_maker, one, lease, SHARED)
        await one.backend.release(lease)
        assert list((any_maker.store / ".lockfs" / "owners").glob("*.*")) == []


async def test_a_shared_lease_does_not_outlast_doubt_beside_strangers(
    maker: PaxosMaker, expect_log: ExpectLog
) -> None:
    """Hosts that do not look first go by an old pass: what is shared is lost, what is exclusive is not."""
    expect_log(LOG)
    async with maker.hosts(1) as (one,):
        await acquire(maker, one, SHARED)
        await acquire(maker, one, EXCLUSIVE, "b.img")
        await maker.kill(one)
        member = one.memory.get("backend:member")
        assert isinstance(member, dict)
        one.memory.set("backend:member", member | {"strangers": [1]})
        await trio.sleep(FAILS_S + 2)
        await maker.succeed(one)
        assert await recall(one, SHARED) is None
        lease = await recall(one, EXCLUSIVE, "b.img")
        assert lease is not None
        assert lease.state is LeaseState.DOUBT
        await maker.go_on(one)
        await trio.sleep(2.0)
        await one.backend.release(lease)


async def test_an_orderly_end_leaves_nothing_to_go_on_with(any_maker: PaxosMaker) -> None:
    """But for the mount's name."""
    async with any_maker.hosts(1) as (one,):
        await one.backend.release(await acquire(any_maker, one))
        assert isinstance(one.backend, PaxosBackend)
    assert set(one.memory.items("backend:")) == {"backend:instance"}
