"""Whether an owner lives (section 12.2 of the format): when its lease can be taken, and what is said else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lockfs.paxos.errors import Refused
from lockfs.paxos.liveness import LOOK_S, sharer_lives
from lockfs.paxos.resource import Hold
from lockfs.paxos.timing import Timing
from lockfs.records import sectors
from lockfs.records.results import RecordError, Result
from tests.engine.fakes import FAST, Fate, Host, World, run, two_hosts

FOREVER = 1e9


def held_by_two() -> tuple[World, Host, Host]:
    """The second of two hosts holds the lease."""
    world, one, two = two_hosts()
    run(two.resource().acquire())
    return world, one, two


def refused(host: Host, give_up_at: float = 0.0) -> Refused:
    """The refusal of a try; nothing was written."""
    resource = host.resource()
    before = sum(io.host == host.host_id and io.offset >= 1 << 20 for io in host.world.writes())
    with pytest.raises(Refused) as caught:
        run(resource.acquire(give_up_at=give_up_at))
    after = sum(io.host == host.host_id and io.offset >= 1 << 20 for io in host.world.writes())
    assert after == before
    assert not resource.unsettled
    return caught.value


def test_an_owner_that_renews() -> None:
    """Refused at once, by its name, however long one would wait."""
    world, one, two = held_by_two()
    world.advance(1)
    for patience in (0.0, FOREVER):
        start = world.now
        refusal = refused(one, patience)
        assert world.now == start
        assert refusal.result is Result.OWNER_ALIVE
        assert str(refusal) == "host 'host2' owns the lease and is alive (-243)"
        assert (refusal.owner_id, refusal.owner_generation, refusal.free_at) == (2, 1, None)
    two.crash()


def test_an_owner_seen_to_change_in_the_last_pass() -> None:
    """Counts as alive although it may have died since: the caller must try again."""
    world, one, two = held_by_two()
    two.crash()
    world.advance(1)
    run(one.lockspace.renew())
    sight = one.lockspace.watch.sight(2)
    assert sight is not None
    assert (sight.timestamp, sight.last_live) == (world.delta(2).timestamp, one.lockspace.watch.last_check)
    assert refused(one, FOREVER).result is Result.OWNER_ALIVE
    world.advance(2 * FAST.renewal)
    assert refused(one).result is Result.OWNER_DYING


def test_an_owner_that_died_is_waited_for() -> None:
    """Until 8 io_timeout + watchdog after it was last seen to change; the leader is looked at each second."""
    world, one, two = held_by_two()
    two.crash()
    last_seen = one.lockspace.watch.sight(2)
    assert last_seen is not None
    world.advance(2 * FAST.renewal)
    free_at = last_seen.last_live + FAST.dead
    start = world.now
    refusal = refused(one, start + 5)
    assert refusal.result is Result.OWNER_DYING
    assert refusal.free_at == free_at
    left = f"{free_at - world.now:.0f} s"
    assert f"host 'host2' owns the lease and is silent; it counts as dead in {left}" in str(refusal)
    assert start + 5 <= world.now < start + 5 + 2 * LOOK_S
    resource = one.resource()
    run(resource.acquire(give_up_at=FOREVER))
    assert free_at < world.now <= free_at + 2 * LOOK_S
    assert resource.hold is Hold.EXCLUSIVE


def test_an_owner_that_comes_back_while_it_is_waited_for() -> None:
    """It is alive."""
    world, one, two = held_by_two()
    two.crash()
    world.advance(2 * FAST.renewal)
    world.at(world.now + 30, lambda: run(two.lockspace.renew()))
    start = world.now
    assert refused(one, FOREVER).result is Result.OWNER_ALIVE
    assert world.now <= start + 30 + 2 * LOOK_S


def test_an_owner_that_renews_while_the_last_look_is_under_way() -> None:
    """The look counts from its beginning: what landed before it took D is in it."""
    world, one, two = held_by_two()
    two.crash()
    world.advance(2 * FAST.renewal + 0.5)
    sight = one.lockspace.watch.sight(2)
    assert sight is not None
    free_at, offset = sight.last_live + FAST.dead, world.delta_offset(2)
    world.at(free_at - 0.9, lambda: one.disk.slow(0.7, "read", offset))
    renewed = replace(world.delta(2), timestamp=int(world.now) + 60)
    world.at(free_at - 0.2, lambda: world.change_delta(2, renewed))
    assert refused(one, FOREVER).result is Result.OWNER_ALIVE
    assert world.now > free_at


@pytest.mark.parametrize("io_timeout", [1, 3])
def test_the_owners_own_io_timeout_counts(io_timeout: int) -> None:
    """Not the taker's."""
    world = World().make()
    one, two = Host(world, 1).join(), Host(world, 2, Timing(io_timeout)).join()
    world.advance(4 * two.timing.renewal)
    run(two.resource().acquire())
    two.crash()
    world.advance(2 * two.timing.renewal)
    sight = one.lockspace.watch.sight(2)
    assert sight is not None
    run(one.resource().acquire(give_up_at=FOREVER))
    dead_at = sight.last_live + 8 * io_timeout + 60
    assert dead_at < world.now <= dead_at + 2 * LOOK_S


def test_an_owner_that_the_watch_does_not_know() -> None:
    """Before the first pass: two looks tell life; else the full time from the first look on."""
    world, _, two = held_by_two()
    late = Host(world, 3)
    run(late.lockspace.join())
    two.crash()
    start = world.now
    assert refused(late).result is Result.OWNER_DYING
    resource = late.resource()

    def renew() -> None:
        run(late.lockspace.renew())
        world.at(late.lockspace.renewal_due, renew)

    world.at(world.now + 0.5, renew)
    run(resource.acquire(give_up_at=FOREVER))
    assert start + FAST.dead < world.now <= start + FAST.dead + 2 * LOOK_S


def test_a_first_look_that_takes_its_time() -> None:
    """A renewal may have landed at any moment until its end: from there the time counts."""
    world, _, two = held_by_two()
    late = Host(world, 3, Timing(10))
    world.change_delta(3, replace(world.delta(3), io_timeout=1))
    run(late.lockspace.join())
    two.crash()
    start = world.now
    late.disk.slow(0.75, "read", world.delta_offset(2))
    run(late.resource().acquire(give_up_at=FOREVER))
    assert start + 0.75 + FAST.dead < world.now <= start + 0.75 + FAST.dead + 2 * LOOK_S


def test_an_owner_that_the_watch_does_not_know_and_that_lives() -> None:
    """It is noticed within a renewal interval."""
    world, _, two = held_by_two()
    late = Host(world, 3)
    run(late.lockspace.join())
    start = world.now
    assert refused(late, FOREVER).result is Result.OWNER_ALIVE
    assert world.now <= start + FAST.renewal + 2 * LOOK_S
    two.crash()


def test_a_former_life_in_the_watch() -> None:
    """What was seen of another generation says nothing of this one: the time starts anew."""
    world, one, two = held_by_two()
    two.crash()
    sight = one.lockspace.watch.sight(2)
    assert sight is not None
    world.advance(20)
    sight.generation = 0
    start = world.now
    run(one.resource().acquire(give_up_at=FOREVER))
    assert start + FAST.dead < world.now <= start + FAST.dead + 2 * LOOK_S


@pytest.mark.parametrize(
    "change",
    [{"timestamp": 0}, {"owner_id": 9}, {"owner_generation": 2}],
    ids=["left", "other", "later life"],
)
def test_an_owner_that_is_gone(change: dict[str, Any]) -> None:
    """Its lease can be taken at once, even if something changes there."""
    world, one, two = held_by_two()
    two.crash()
    world.change_delta(2, replace(world.delta(2), **change))
    start = world.now
    resource = one.resource()
    run(resource.acquire())
    assert world.now == start
    assert (resource.hold, world.leader().owner_id) == (Hold.EXCLUSIVE, 1)


def test_an_owner_that_leaves_while_it_is_waited_for() -> None:
    """The lease can be taken."""
    world, one, two = held_by_two()
    two.crash()
    world.advance(4)
    world.at(world.now + 3, lambda: run(two.lockspace.leave()))
    start = world.now
    run(one.resource().acquire(give_up_at=FOREVER))
    assert world.now <= start + 3 + 2 * LOOK_S


def test_a_leader_that_changes_while_the_owner_is_waited_for() -> None:
    """Everything begins anew: here the lease was released."""
    world, one, two = held_by_two()
    two.crash()
    world.advance(4)
    world.at(world.now + 10, lambda: world.change_leader(replace(world.leader(), timestamp=0)))
    start = world.now
    run(one.resource().acquire(give_up_at=FOREVER))
    assert world.now <= start + 10 + 2 * LOOK_S


def test_an_owner_that_let_go_before_another_host_committed_it() -> None:
    """Its mark RELEASED frees the lease; while the owner wrote the leader itself, the mark means nothing."""
    world, one, two = held_by_two()
    released = replace(world.record(2).dblock, flags=sectors.RELEASED)
    world.change_record(2, released)
    world.advance(1)
    assert refused(one).result is Result.OWNER_ALIVE
    world.change_leader(replace(world.leader(), write_id=3))
    world.change_record(2, replace(released, flags=0))
    assert refused(one).result is Result.OWNER_ALIVE
    world.change_record(2, released)
    resource = one.resource()
    run(resource.acquire())
    assert (resource.hold, world.leader().lver) == (Hold.EXCLUSIVE, 2)
    two.crash()


@pytest.mark.parametrize("what", ["delta", "leader"])
def test_a_damaged_record_on_the_way(what: str) -> None:
    """It is named; nothing is written."""
    world, one, two = held_by_two()
    two.crash()
    world.advance(4)

    def damage() -> None:
        world.data[(world.delta_offset(2) if what == "delta" else 1 << 20) + 60] ^= 1

    if what == "leader":
        one.disk.before(damage, "read", 1 << 20, nth=2)
    else:
        damage()
    sector = "sector 1 of /leases: " if what == "delta" else "sector 0 of /leases at byte 1048576: "
    with pytest.raises(RecordError, match=sector):
        run(one.resource().acquire(give_up_at=FOREVER))


def test_an_io_error_on_the_way() -> None:
    """It ends the try."""
    world, one, two = held_by_two()
    two.crash()
    world.advance(4)
    one.disk.fail(Fate.REFUSED, "read", world.delta_offset(2))
    with pytest.raises(Exception, match="refused"):
        run(one.resource().acquire(give_up_at=FOREVER))


def test_a_leader_of_ours_from_a_later_life() -> None:
    """It cannot be taken over as our own; we are that owner's sign of life."""
    world, one, _ = two_hosts()
    world.change_leader(replace(world.leader(), owner_id=1, owner_generation=7, timestamp=5, lver=3))
    assert refused(one).result is Result.OWNER_DYING
    assert refused(one, FOREVER).result is Result.OWNER_ALIVE


# --- hosts that share


def silent_sharer() -> tuple[World, Host, Host]:
    """Two hosts, of which the second is silent for so long that the first one's watch counts it as dead."""
    world, one, two = two_hosts()
    two.crash()
    world.advance(FAST.dead + 3)
    assert not one.lockspace.watch.may_be_alive(2, 1, world.now)
    return world, one, two


def test_a_sharer_that_may_be_alive_by_the_watch() -> None:
    """No look is needed."""
    world, one, two = two_hosts()
    before = len(world.io)
    assert run(sharer_lives(one.lockspace, 2, 1))
    assert len(world.io) == before
    two.crash()


def test_a_sharer_that_is_dead() -> None:
    """By the watch and by a look."""
    world, one, _ = silent_sharer()
    assert not run(sharer_lives(one.lockspace, 2, 1))
    world.change_delta(2, replace(world.delta(2), timestamp=0))
    assert not run(sharer_lives(one.lockspace, 2, 1))
    world.change_delta(2, replace(world.delta(2), timestamp=9, owner_generation=2))
    assert not run(sharer_lives(one.lockspace, 2, 1))


def test_a_sharer_that_came_back_since_the_last_pass() -> None:
    """It is not taken for dead by what is old."""
    world, one, two = silent_sharer()
    world.change_delta(2, replace(world.delta(2), timestamp=int(world.now)))
    assert run(sharer_lives(one.lockspace, 2, 1))
    two.crash()


@pytest.mark.parametrize("change", [{"magic": 5}, {"space_field": bytes(48)}, {"checksum": 5}])
def test_a_sharer_whose_sector_is_damaged(change: dict[str, Any]) -> None:
    """Doubt means alive."""
    world, one, _ = silent_sharer()
    leader = replace(world.delta(2), **change)
    world.put(world.delta_offset(2), leader.encode())
    assert run(sharer_lives(one.lockspace, 2, 1))
