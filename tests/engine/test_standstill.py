"""Hosts that stood still together with their clocks: suspected by others' pace, and certain again."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest

from lockfs.paxos.errors import EngineError, LockspaceFailed, Refused
from lockfs.paxos.pace import WATCHDOG_PART
from lockfs.paxos.resource import Hold, Resource
from lockfs.paxos.seams import DiskError
from lockfs.paxos.timing import Timing
from lockfs.records import sectors
from lockfs.records.results import Result
from lockfs.records.sectors import Dblock, ModeBlock
from tests.engine.fakes import FAST, NUM_HOSTS, Fate, Host, RealTime, World, run, two_hosts

LONG_S = 200.0
MARGIN_S = FAST.watchdog / WATCHDOG_PART


def held(*, shared: bool = False) -> tuple[World, Host, Host, Resource]:
    """Two hosts that know each other well; the first holds the lease."""
    world, one, two = two_hosts()
    world.advance(10 * FAST.fails)
    mine = one.resource()
    run(mine.acquire(shared=shared))
    return world, one, two, mine


def thaw(world: World, host: Host) -> None:
    """It goes on, and renews once."""
    host.thaw()
    world.advance(FAST.renew_every)


def stand_still(world: World, host: Host, seconds: float = LONG_S) -> None:
    """It did not see the time pass."""
    host.halt()
    world.advance(seconds)
    thaw(world, host)


def is_free(host: Host) -> None:
    """The host gets the lease, perhaps after having carried on what the other had proposed and let go of."""
    resource = host.resource()
    with contextlib.suppress(Refused):
        run(resource.acquire())
        return
    run(resource.acquire())


# --- suspicions


def test_others_went_on() -> None:
    """It is noticed at the first renewal; the membership itself is as good as before."""
    world, one, _, mine = held()
    one.halt()
    world.advance(LONG_S)
    assert one.lockspace.in_time() and mine.proven, "nothing can be known yet"
    thaw(world, one)
    assert not mine.proven
    assert one.lockspace.in_time() and one.lockspace.pace.renewed
    assert "host id 2" in one.lockspace.pace.why


@pytest.mark.parametrize("seconds", [0.0, 5.0, MARGIN_S])
def test_nobody_went_on_for_long(seconds: float) -> None:
    """What harms nobody raises no suspicion."""
    world, one, _, mine = held()
    stand_still(world, one, seconds)
    world.advance(LONG_S)
    assert mine.proven and not one.lockspace.pace.suspicions


def test_the_storage_was_away() -> None:
    """For both, or for the other, whose renewal lands with an old stamp: our clock has gone as well."""
    for hosts in ((0, 1), (1,)):
        world, one, two, mine = held()
        for host in (two if index else one for index in hosts):
            host.disk.slow(30.0, "write", world.delta_offset(host.host_id))
        world.advance(LONG_S)
        assert mine.proven and not one.lockspace.pace.suspicions, hosts


def test_hosts_come_and_go() -> None:
    """No pace to compare with: the leases are looked at for a while, and nothing is in doubt."""
    world, one, two, mine = held()
    pace = one.lockspace.pace
    pace.looked()
    assert not pace.look_due
    two.crash()
    run(two.lockspace.leave())
    world.advance(2.0)
    assert pace.look_due
    pace.looked()
    assert pace.look_due, "for a while"
    world.advance(2.0 * FAST.fails)
    assert not pace.look_due
    Host(world, 3).join()
    world.advance(2.0)
    assert pace.look_due and mine.proven
    world.advance(2.0 * FAST.fails)
    assert pace.look_due, "until it was done"


def test_a_host_that_was_silent_comes_back() -> None:
    """It may have stood still as we did."""
    world, one, two, mine = held()
    two.halt()
    world.advance(2.0 * FAST.fails)
    one.lockspace.pace.looked()
    assert not one.lockspace.pace.look_due
    thaw(world, two)
    world.advance(2.0)
    assert one.lockspace.pace.look_due and mine.proven


def test_a_renewal_comes_late() -> None:
    """A short standstill on top of it would be enough for others to take what is held."""
    world, one, _, mine = held()
    one.lockspace.pace.looked()
    assert not one.lockspace.pace.look_due
    one.disk.slow(FAST.late, "write", world.delta_offset(1))
    world.advance(FAST.fails + 1.0)
    assert one.lockspace.pace.look_due and mine.proven


def test_a_host_of_which_little_is_known() -> None:
    """Its first stamp may be old: one that runs ahead of it is a reason to look, and no more."""
    world = World(first_hosts=8).make()
    two, one = Host(world, 2).join(), Host(world, 1).join()
    one.lockspace.pace.looked()
    delta = world.delta(2)
    two.crash()
    world.change_delta(2, replace(delta, timestamp=delta.timestamp + 500))
    world.advance(2.0)
    assert one.lockspace.pace.look_due and not one.lockspace.pace.suspicions


def test_a_stamp_that_goes_back() -> None:
    """Nothing can be said of a host that does that."""
    world, one, two, _ = held()
    two.crash()
    one.lockspace.pace.looked()
    delta = world.delta(2)
    world.change_delta(2, replace(delta, timestamp=delta.timestamp - 100))
    world.advance(2.0)
    assert one.lockspace.pace.look_due and not one.lockspace.pace.suspicions
    world.change_delta(2, delta, sectors.bitmap_with(frozenset({5})))
    world.advance(2.0)
    world.change_delta(2, delta, sectors.bitmap_with(frozenset({6})))
    world.advance(2.0)
    assert not one.lockspace.pace.suspicions


# --- the real-time clock


def real_time() -> tuple[World, Host, RealTime, Resource]:
    """A host that knows the real time, and holds the lease."""
    world = World(first_hosts=8).make()
    wall = RealTime(world)
    one = Host(world, 1, walls=[wall]).join()
    mine = one.resource()
    run(mine.acquire())
    return world, one, wall, mine


def test_real_time_is_set_right() -> None:
    """No write starts from that moment on; a renewal is due, and then the lease is confirmed."""
    _, one, wall, mine = real_time()
    one.crash()
    assert one.lockspace.in_time()
    wall.ahead += MARGIN_S + 0.1
    assert not one.lockspace.in_time()
    one.lockspace.pace.look_at_walls()
    assert one.lockspace.in_time() and not mine.proven
    assert not one.lockspace.pace.renewed
    assert one.clock.now() < one.lockspace.renewal_due <= one.clock.now() + 1.0
    with pytest.raises(LockspaceFailed, match="not renewed since a suspicion: the real-time clock went 8 s"):
        run(mine.confirm())
    one.lockspace.pace.look_at_walls()
    assert one.lockspace.pace.suspicions == 1
    run(one.lockspace.renew())
    assert not one.lockspace.pace.renewed, "in the same second: nobody sees it"
    run(one.clock.sleep(1.0))
    run(one.lockspace.renew())
    run(mine.confirm())
    assert mine.proven
    assert one.lockspace.renewal_due > one.clock.now()


def test_a_leap_that_only_the_renewal_sees() -> None:
    """It is not taken for right by the renewal."""
    _, one, wall, mine = real_time()
    wall.ahead += 100.0
    run(one.lockspace.renew())
    assert one.lockspace.in_time() and not mine.proven


@pytest.mark.parametrize("step", [MARGIN_S - 0.1, -100.0])
def test_steps_that_tell_nothing(step: float) -> None:
    """Small ones, and those back."""
    world, one, wall, mine = real_time()
    wall.ahead += step
    world.advance(2.0)
    assert one.lockspace.in_time() and mine.proven
    wall.ahead += MARGIN_S - 0.1
    assert one.lockspace.in_time(), "counted from the last renewal"


# --- confirming


def test_what_nobody_took_goes_on() -> None:
    """As the next version, owned without a gap; it can be given back."""
    world, one, two, mine = held()
    stand_still(world, one)
    version = world.leader().lver
    run(mine.confirm())
    leader = world.leader()
    assert mine.proven and not mine.unsettled and mine.leader == leader
    assert (leader.lver, leader.owner_id, mine.hold) == (version + 1, 1, Hold.EXCLUSIVE)
    with pytest.raises(Refused):
        run(two.resource().acquire())
    run(mine.release())
    run(two.resource().acquire())


def test_what_another_has_taken_is_not_ours() -> None:
    """Also after that one has let it go. Giving it back harms nobody."""
    for let_go in (False, True):
        world, one, two, mine = held()
        one.halt()
        world.advance(LONG_S)
        theirs = two.resource()
        run(theirs.acquire(give_up_at=world.now + LONG_S))
        if let_go:
            run(theirs.release())
        thaw(world, one)
        assert not run(mine.is_there())
        with pytest.raises(Refused):
            run(mine.confirm())
        assert not mine.proven and mine.hold is Hold.EXCLUSIVE
        before = world.leader()
        run(mine.release())
        assert world.leader() == before
        assert theirs.hold is (Hold.NONE if let_go else Hold.EXCLUSIVE)


def test_who_is_about_to_take_it_does_not_get_it() -> None:
    """It had found us dead; a look would have shown the lease as ours, and both would have held it."""
    world, one, two, mine = held()
    version = world.leader().lver
    one.halt()
    world.advance(LONG_S)

    def back() -> None:
        thaw(world, one)
        assert run(mine.is_there())
        run(mine.confirm())

    two.disk.before(back, "write", world.host_offset(2))
    theirs = two.resource()
    with pytest.raises(Refused):
        run(theirs.acquire(give_up_at=world.now + LONG_S))
    assert theirs.hold is Hold.NONE
    assert mine.proven and run(mine.is_there())
    assert world.leader().lver == version + 1


def test_who_has_all_but_taken_it_gets_it() -> None:
    """Its proposal was accepted, only the leader is not written yet: then it is chosen, by us."""
    world, one, two, mine = held()
    one.halt()
    world.advance(LONG_S)

    def back() -> None:
        thaw(world, one)
        with pytest.raises(Refused) as refused:
            run(mine.confirm())
        assert refused.value.result is Result.COMMITTED_OTHER

    two.disk.before(back, "write", world.shape.area_size)
    theirs = two.resource()
    run(theirs.acquire(give_up_at=world.now + LONG_S))
    assert theirs.hold is Hold.EXCLUSIVE
    assert not mine.proven
    run(mine.release())
    assert mine.hold is Hold.NONE and world.leader().owner_id == 2


def test_another_contends() -> None:
    """Nothing is known yet; the hold stays as it is, and is confirmed later."""
    world, one, _, mine = held()
    stand_still(world, one)

    def outbid() -> None:
        mine = world.record(1).dblock
        world.change_record(2, Dblock(mbal=mine.mbal + 1, lver=mine.lver).summed())

    one.disk.before(outbid, "read", world.shape.area_size, nth=3)
    with pytest.raises(Refused) as refused:
        run(mine.confirm())
    assert refused.value.result is Result.DBLOCK_MBAL
    assert not mine.proven and mine.hold is Hold.EXCLUSIVE
    run(mine.confirm(give_up_at=one.clock.now() + 5.0))
    assert mine.proven
    one.lockspace.pace.suspect("once more")
    world.advance(FAST.renewal)
    one.disk.before(outbid, "read", world.shape.area_size, nth=3)
    run(mine.confirm(give_up_at=one.clock.now() + 5.0))
    assert mine.proven, "backed off, and tried again"


@pytest.mark.parametrize("fate", [Fate.REFUSED, Fate.REFUSED_LANDED])
@pytest.mark.parametrize("nth", [1, 2])
def test_a_confirmation_that_fails(fate: Fate, nth: int) -> None:
    """It is tried again, or given back, whatever of it has landed."""
    for again in (True, False):
        for offset in ("sector", "leader"):
            world, one, two, mine = held()
            stand_still(world, one)
            at = world.host_offset(1) if offset == "sector" else world.shape.area_size
            one.disk.fail(fate, "write", at, nth=nth if offset == "sector" else 1)
            with pytest.raises(DiskError):
                run(mine.confirm())
            assert not mine.proven and mine.unsettled and mine.hold is Hold.EXCLUSIVE
            if again:
                run(mine.confirm())
                assert mine.proven and mine.leader == world.leader()
            run(mine.release())
            assert not mine.unsettled
            is_free(two)


def test_what_another_version_is_entered_for() -> None:
    """The leader shows our version, but a later one has been decided: somebody's late commit put it back."""
    world, one, _, mine = held()
    stand_still(world, one)
    world.change_record(3, Dblock(mbal=3, lver=world.leader().lver + 2).summed())
    with pytest.raises(Refused):
        run(mine.confirm())


def test_not_without_a_hold() -> None:
    """There is nothing to confirm."""
    _, _, _, mine = held()
    run(mine.release())
    assert not run(mine.is_there())
    with pytest.raises(EngineError, match="is not held"):
        run(mine.confirm())


def test_one_lease_in_doubt() -> None:
    """A lease that could not be looked at is confirmed as well."""
    _, _, _, mine = held()
    mine.doubt()
    assert not mine.proven
    run(mine.confirm())
    assert mine.proven


def test_a_lease_that_was_being_taken() -> None:
    """What came while it was taken counts against it."""
    world, one, _, mine = held()
    run(mine.release())
    mine = one.resource()

    def suspect() -> None:
        one.lockspace.pace.suspect("meanwhile")

    one.disk.before(suspect, "write", world.shape.area_size)
    run(mine.acquire())
    assert mine.hold is Hold.EXCLUSIVE and not mine.proven
    for shared in (True, False):
        with pytest.raises(LockspaceFailed, match="must be confirmed first: meanwhile"):
            run(mine.convert(shared=shared))


# --- shared holds


def test_a_shared_hold_goes_on() -> None:
    """Nobody took it: a look suffices, and nothing is written to the lease."""
    world, one, two, mine = held(shared=True)
    stand_still(world, one)
    assert not mine.proven
    before = len(world.io)
    run(mine.confirm())
    assert mine.proven and mine.hold is Hold.SHARED
    assert not world.writes(before)
    run(two.resource().acquire(shared=True))
    assert run(mine.is_there())


def test_a_shared_hold_that_was_cleared() -> None:
    """Whoever takes the lease for itself clears the dead; also when it has let it go since."""
    for let_go in (False, True):
        world, one, two, mine = held(shared=True)
        one.halt()
        world.advance(LONG_S)
        theirs = two.resource()
        run(theirs.acquire(give_up_at=world.now + LONG_S))
        if let_go:
            run(theirs.release())
        thaw(world, one)
        with pytest.raises(Refused):
            run(mine.confirm())
        assert not mine.proven
        run(mine.release())


def test_a_sharer_comes() -> None:
    """It owns the lease for a moment, and takes nothing from those who share it."""
    world, one, _, mine = held(shared=True)
    leader = world.leader()
    short = leader.flags | sectors.SHORT_HOLD
    world.change_leader(replace(leader, flags=short, owner_id=2, owner_generation=1, timestamp=5))
    assert run(mine.is_there())
    world.change_leader(replace(leader, owner_id=2, owner_generation=1, timestamp=5))
    assert not run(mine.is_there()), "it may be about to clear us"
    world.change_leader(leader)
    world.change_record(1, Dblock(), ModeBlock(sectors.SHARED, one.lockspace.generation + 1))
    assert not run(mine.is_there())


def test_a_conversion_that_had_only_begun() -> None:
    """The hold is shared, the storage has it as exclusive still: it is owned anew, and then settled."""
    world, one, two, mine = held()
    one.disk.fail(Fate.REFUSED, "write", world.host_offset(1))
    with pytest.raises(DiskError):
        run(mine.convert(shared=True))
    assert mine.hold is Hold.SHARED and mine.unsettled
    stand_still(world, one)
    with pytest.raises(LockspaceFailed, match="must be confirmed first"):
        run(mine.settle())
    assert run(mine.is_there())
    run(mine.confirm())
    assert mine.proven and mine.unsettled
    run(mine.settle())
    assert mine.hold is Hold.SHARED and run(mine.is_there())
    run(two.resource().acquire(shared=True))


def test_hosts_with_slow_renewals() -> None:
    """Their pace counts by their own stamps, whatever their interval."""
    world = World(first_hosts=8).make()
    one, two = Host(world, 1).join(), Host(world, 2, Timing(5)).join()
    world.advance(200.0)
    mine = one.resource(NUM_HOSTS)
    run(mine.acquire())
    assert not one.lockspace.pace.suspicions
    stand_still(world, one)
    assert two.lockspace.in_time() and not mine.proven


def test_a_clock_of_whole_seconds() -> None:
    """What its steps may hide is no leap; more is one, though the other clock has not been set right."""
    world = World(first_hosts=8).make()
    walls = [RealTime(world), RealTime(world, late=1.0)]
    one = Host(world, 1, walls=walls).join()
    mine = one.resource()
    run(mine.acquire())
    one.crash()
    walls[1].ahead += MARGIN_S
    assert one.lockspace.in_time()
    walls[1].ahead += 2.1
    assert not one.lockspace.in_time()
    one.lockspace.pace.look_at_walls()
    assert one.lockspace.pace.suspicions == 1 and not mine.proven
    one.lockspace.pace.look_at_walls()
    assert one.lockspace.pace.suspicions == 1, "told once"
    walls[0].ahead += MARGIN_S + 0.1
    one.lockspace.pace.look_at_walls()
    assert one.lockspace.pace.suspicions == 2, "the other's leap is one of its own"
