"""Shared leases and conversions (section 14 of the format)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lockfs.paxos.errors import EngineError, LockspaceFailed, Refused
from lockfs.paxos.resource import SHARED_RETRIES_MAX, Hold
from lockfs.paxos.seams import DiskError
from lockfs.records import sectors
from lockfs.records.geometry import MIB
from lockfs.records.results import Result
from lockfs.records.sectors import Dblock, Leader, ModeBlock
from tests.engine.fakes import FAST, Cancelled, Fate, Host, World, run, two_hosts

FOREVER = 1e9
SHARED = ModeBlock(sectors.SHARED, 1)


def owners(world: World) -> tuple[int, list[int]]:
    """As the storage says: the exclusive owner or 0, and who shares."""
    leader = world.leader()
    let_go = leader.write_id != leader.owner_id and world.record(leader.owner_id).dblock.released
    sharers = [host.host_id for host in world.hosts if world.record(host.host_id).mode.shared]
    return (leader.owner_id if leader.timestamp and not let_go else 0), sharers


# --- sharing


def in_passing(world: World) -> Leader:
    """A leader in the midst of the second host's shared acquire."""
    leader = replace(world.leader(), owner_id=2, owner_generation=1, timestamp=5, lver=1, write_id=2)
    return replace(leader, flags=0x10 | sectors.SHORT_HOLD)


def test_several_share() -> None:
    """A version each; the leader is free again after each."""
    world, one, two = two_hosts()
    first, second = one.resource(), two.resource()
    run(first.acquire(shared=True))
    assert (first.hold, owners(world)) == (Hold.SHARED, (0, [1]))
    run(second.acquire(shared=True))
    assert (second.hold, owners(world)) == (Hold.SHARED, (0, [1, 2]))
    assert world.record(2).mode == SHARED
    assert world.record(2).dblock.released
    assert world.leader().flags == 0x10
    assert (world.leader().lver, world.leader().owner_id) == (2, 2)
    run(first.release())
    assert (first.hold, owners(world)) == (Hold.NONE, (0, [2]))
    assert world.leader().lver == 2
    assert world.record(1).dblock.released


def test_a_shared_attempt_waits_for_another() -> None:
    """Which is over in a moment: the flag in the leader says so."""
    world, one, two = two_hosts()
    short = in_passing(world)
    world.change_leader(short)
    world.advance(1)
    world.at(world.now + 2.5, lambda: world.change_leader(replace(short, timestamp=0, flags=0x10)))
    resource = one.resource()
    run(resource.acquire(shared=True, give_up_at=FOREVER))
    assert resource.hold is Hold.SHARED
    assert all(0 <= pause < 1 for pause in one.clock.slept[1:])
    two.crash()


def test_a_shared_attempt_that_is_never_over() -> None:
    """After SHARED_RETRIES_MAX retries it ends, with the owner named; without patience at once."""
    world, one, two = two_hosts()
    short = in_passing(world)
    world.change_leader(short)
    world.advance(1)
    resource, before = one.resource(), len(world.io)
    with pytest.raises(Refused) as caught:
        run(resource.acquire(shared=True, give_up_at=FOREVER))
    assert caught.value.result is Result.SHARED_RETRIES
    attempts = [io for io in world.io[before:] if io.host == 1 and io.offset == MIB and io.length > 512]
    assert (caught.value.owner_id, len(attempts)) == (2, 1 + SHARED_RETRIES_MAX)
    with pytest.raises(Refused) as caught:
        run(resource.acquire(shared=True))
    assert caught.value.result is Result.DBLOCK_MBAL
    two.crash()


@pytest.mark.parametrize("patience", [0.0, FOREVER])
def test_an_exclusive_owner_is_no_passing_matter(patience: float) -> None:
    """Its answer is given at once."""
    world, one, two = two_hosts()
    run(two.resource().acquire())
    world.advance(1)
    start = world.now
    with pytest.raises(Refused) as caught:
        run(one.resource().acquire(shared=True, give_up_at=patience))
    assert caught.value.result is Result.OWNER_ALIVE
    assert world.now == start


def test_a_lost_ballot_without_patience() -> None:
    """Is told as what it is."""
    world, one, _ = two_hosts()
    one.disk.before(
        lambda: world.change_record(5, Dblock(mbal=4005, lver=1).summed()), "write", world.host_offset(1)
    )
    with pytest.raises(Refused) as caught:
        run(one.resource().acquire(shared=True))
    assert caught.value.result is Result.DBLOCK_MBAL


def test_sharing_committed_by_another() -> None:
    """The leader is not ours to free; the mark in our sector frees it, at the same moment as we share."""
    world, one, two = two_hosts()
    resource, rival = one.resource(), two.resource()

    def overtake() -> None:
        with pytest.raises(Refused):
            run(rival.acquire())

    one.disk.before(overtake, "read", MIB, nth=3)
    run(resource.acquire(shared=True, give_up_at=FOREVER))
    assert (resource.hold, owners(world)) == (Hold.SHARED, (0, [1]))
    assert world.leader().write_id == 2
    assert not resource.unsettled


@pytest.mark.parametrize("fate", [Fate.REFUSED, Fate.REFUSED_LANDED, Fate.CANCELLED])
@pytest.mark.parametrize("what", ["mode", "leader", "read"])
def test_sharing_that_fails_at_the_end_is_no_hold(fate: Fate, what: str) -> None:
    """Whatever is there already: it is undone."""
    world, one, two = two_hosts()
    resource, rival = one.resource(), two.resource()
    places = {
        "mode": ("write", world.host_offset(1), 3),
        "leader": ("write", MIB, 2),
        "read": ("read", MIB, 4),
    }
    op, offset, nth = places[what]
    one.disk.fail(fate, op, offset, nth=nth)
    with pytest.raises((DiskError, Cancelled)):
        run(resource.acquire(shared=True))
    assert resource.hold is Hold.NONE
    assert resource.unsettled
    run(resource.settle())
    assert owners(world) == (0, [])
    run(rival.acquire())


def test_a_membership_lost_in_the_last_step_of_sharing() -> None:
    """No hold."""
    world, one, _ = two_hosts()
    resource = one.resource()
    one.disk.before(lambda: world.jump(8), "write", MIB, nth=2)
    with pytest.raises(LockspaceFailed):
        run(resource.acquire(shared=True))
    assert resource.hold is Hold.NONE
    assert resource.unsettled


# --- exclusive over hosts that share


def sharing() -> tuple[World, Host, Host]:
    """Two hosts, of which the second shares."""
    world, one, two = two_hosts()
    run(two.resource().acquire(shared=True))
    return world, one, two


def test_over_a_living_sharer() -> None:
    """Refused at once with its name, and the version that was won for it is given back."""
    world, one, two = sharing()
    start, resource = world.now, one.resource()
    with pytest.raises(Refused, match=r"host 2 shares the lease \(-11\)") as caught:
        run(resource.acquire(give_up_at=FOREVER))
    assert caught.value.result is Result.SHARED_ELSEWHERE
    assert (caught.value.owner_id, caught.value.owner_generation) == (2, 1)
    assert world.now == start
    assert owners(world) == (0, [2])
    assert (resource.hold, resource.unsettled) == (Hold.NONE, False)
    assert world.leader().lver == 2
    two.crash()


def test_over_several_sharers() -> None:
    """They are counted; the first is named."""
    world, one, _ = sharing()
    run(Host(world, 3).join().resource().acquire(shared=True))
    world.advance(4)
    with pytest.raises(Refused, match="2 hosts share the lease"):
        run(one.resource().acquire())


def test_over_a_dead_sharer() -> None:
    """Its sector is cleared, all of it."""
    world, one, two = sharing()
    two.crash()
    world.advance(FAST.dead + 3)
    resource = one.resource()
    run(resource.acquire())
    assert resource.hold is Hold.EXCLUSIVE
    assert owners(world) == (1, [])
    at = world.host_offset(2)
    assert not any(world.data[at : at + 512])


def test_over_a_sharer_that_came_back_unseen() -> None:
    """It was silent for so long that our watch counts it as dead; its sector shows that it is not."""
    world, one, two = sharing()
    two.crash()
    world.advance(FAST.dead + 3)
    world.change_delta(2, replace(world.delta(2), timestamp=int(world.now)))
    with pytest.raises(Refused, match="host 2 shares"):
        run(one.resource().acquire())
    assert world.record(2).mode == SHARED


def test_a_sharer_that_let_go_meanwhile() -> None:
    """Its sector is read anew, after the ballot; so does one without a generation not count."""
    world, one, two = sharing()
    world.change_record(3, Dblock(), ModeBlock(sectors.SHARED, 0))
    one.disk.before(lambda: world.change_record(2, world.record(2).dblock), "read", world.host_offset(2))
    resource = one.resource()
    run(resource.acquire())
    assert owners(world)[0] == 1
    assert world.record(3).mode.flags == sectors.SHARED
    two.crash()


def test_a_former_life_of_a_sharer() -> None:
    """Is dead."""
    world, one, two = two_hosts()
    two.crash()
    world.change_delta(2, replace(world.delta(2), owner_generation=5, timestamp=int(world.now) + 1))
    world.advance(3)
    world.change_record(2, Dblock(), ModeBlock(sectors.SHARED, 3))
    run(one.resource().acquire())
    assert not world.record(2).mode.shared


def test_an_own_mode_block_of_a_former_life() -> None:
    """Is dropped by the ballot."""
    world, one, _ = two_hosts()
    world.change_record(1, Dblock(), ModeBlock(sectors.SHARED, 1))
    run(one.resource().acquire())
    assert owners(world) == (1, [])


def test_no_sector_is_cleared_in_doubt() -> None:
    """Of a membership."""
    world, one, two = sharing()
    two.crash()
    world.advance(FAST.dead + 3)
    one.disk.before(lambda: world.jump(8), "read", world.delta_offset(2))
    with pytest.raises(LockspaceFailed):
        run(one.resource().acquire())
    assert world.record(2).mode.shared


# --- conversions


def test_from_shared_to_exclusive_and_back() -> None:
    """In place; the version grows by one on the way up."""
    world, one, _ = two_hosts()
    resource = one.resource()
    run(resource.acquire(shared=True))
    run(resource.convert(shared=True))
    before = len(world.io)
    run(resource.convert(shared=False))
    assert (resource.hold, owners(world)) == (Hold.EXCLUSIVE, (1, []))
    own = [sectors.decode_host(io.data) for io in world.writes(before) if io.offset == world.host_offset(1)]
    assert [record.mode for record in own] == [SHARED, SHARED, sectors.NOT_SHARED]
    assert resource.leader == world.leader()
    assert world.leader().lver == 2
    run(resource.convert(shared=False))
    run(resource.convert(shared=True))
    assert (resource.hold, owners(world)) == (Hold.SHARED, (0, [1]))
    assert world.leader().lver == 2
    assert not resource.unsettled
    run(resource.release())
    assert owners(world) == (0, [])


def test_a_conversion_of_nothing() -> None:
    """Is refused."""
    world, one, _ = two_hosts()
    before = len(world.io)
    for shared in (False, True):
        with pytest.raises(EngineError, match="lease 'disk-1' is not held"):
            run(one.resource().convert(shared=shared))
    assert len(world.io) == before


def test_to_exclusive_while_another_shares() -> None:
    """Still shared, and so is the other; with the mark where another host wrote the leader."""
    world, one, two = sharing()
    resource = one.resource()
    run(resource.acquire(shared=True))
    with pytest.raises(Refused, match="host 2 shares"):
        run(resource.convert(shared=False))
    assert (resource.hold, owners(world)) == (Hold.SHARED, (0, [1, 2]))
    assert not resource.unsettled
    two.crash()


def test_to_exclusive_while_another_shares_and_a_third_commits() -> None:
    """Only the mark RELEASED can free the leader then; sanlock leaves it owned."""
    world, one, two = sharing()
    third = Host(world, 3).join()
    world.advance(4)
    resource, rival = one.resource(), third.resource()
    run(resource.acquire(shared=True))

    def overtake() -> None:
        with pytest.raises(Refused) as caught:
            run(rival.acquire())
        assert caught.value.result is Result.COMMITTED_OTHER

    one.disk.before(overtake, "read", MIB, nth=3)
    with pytest.raises(Refused, match="host 2 shares"):
        run(resource.convert(shared=False, give_up_at=FOREVER))
    assert world.leader().write_id == 3
    assert (resource.hold, owners(world)) == (Hold.SHARED, (0, [1, 2]))
    two.crash()


def test_to_exclusive_in_contention() -> None:
    """A lost ballot leaves the hold as it was."""
    world, one, _ = two_hosts()
    resource = one.resource()
    run(resource.acquire(shared=True))
    one.disk.before(lambda: world.change_record(5, Dblock(mbal=9005, lver=2).summed()), "read", MIB, nth=3)
    with pytest.raises(Refused):
        run(resource.convert(shared=False))
    assert (resource.hold, resource.unsettled) == (Hold.SHARED, True)
    run(resource.settle())
    assert owners(world) == (0, [1])
    world.change_record(5, Dblock())
    run(resource.convert(shared=False))
    assert (resource.hold, owners(world)) == (Hold.EXCLUSIVE, (1, []))


def test_releasing_after_a_conversion_failed() -> None:
    """Upwards or downwards, the leader may be left as ours: it is freed as well."""
    for down in (False, True):
        world, one, two = two_hosts()
        resource = one.resource()
        run(resource.acquire(shared=not down))
        if down:
            one.disk.fail(Fate.REFUSED, "write", MIB)
        else:
            one.disk.fail(Fate.REFUSED_LANDED, "write", MIB)
        with pytest.raises(DiskError):
            run(resource.convert(shared=down))
        assert (resource.hold, resource.unsettled) == (Hold.SHARED, True)
        assert owners(world) == (1, [1])
        run(resource.release())
        assert owners(world) == (0, [])
        assert not resource.unsettled
        run(two.resource().acquire())


def test_down_in_doubt() -> None:
    """Not begun: the hold is exclusive still."""
    world, one, _ = two_hosts()
    resource = one.resource()
    run(resource.acquire())
    world.jump(8)
    with pytest.raises(LockspaceFailed):
        run(resource.convert(shared=True))
    assert resource.hold is Hold.EXCLUSIVE


def test_up_in_doubt() -> None:
    """In the last step: shared still."""
    world, one, _ = two_hosts()
    resource = one.resource()
    run(resource.acquire(shared=True))
    one.disk.before(lambda: world.jump(8), "write", world.host_offset(1), nth=3)
    with pytest.raises(LockspaceFailed):
        run(resource.convert(shared=False))
    assert resource.hold is Hold.SHARED
    assert resource.unsettled
