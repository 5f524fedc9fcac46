"""A lease whose holder's process was killed, found again or put in order by the next one.

The kill may be at every I/O of every step, before it or just after it landed; the step's memory of what it
was about to do is all that is left, as the backend notes it. Another host tries for the lease before every
I/O of the next process, too.
"""

from __future__ import annotations

import enum
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import pytest

from lockfs.paxos.errors import Refused
from lockfs.paxos.recall import recall, take_over
from lockfs.paxos.resource import Hold, Resource
from lockfs.paxos.seams import DiskError
from lockfs.records import sectors
from lockfs.records.results import RecordError
from lockfs.records.sectors import Leader
from tests.engine.fakes import Cancelled, Fate, Host, World, run, two_hosts
from tests.engine.test_going_on import successor

FOREVER = 1e9
IOS_MAX = 60
"""More than any step has."""


class Kill(enum.Enum):
    """Just before the I/O, or just after it landed."""

    BEFORE = Fate.CANCELLED
    AFTER = Fate.CANCELLED_LANDED


class Rival:
    """A second host that tries for the lease whenever it is told to; `won` counts."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.resource = host.resource()
        self.won = 0

    def tries(self) -> bool:
        """Try once, without patience, and give back what it got."""
        try:
            run(self.resource.acquire())
        except Refused:
            return False
        run(self.resource.release())
        self.won += 1
        return True

    def watches(self, host: Host) -> None:
        """Try before every I/O of a host from now on."""
        for nth in range(1, IOS_MAX):
            host.disk.before(self.tries, nth=nth)


def killed(host: Host, step: Coroutine[Any, Any, None], nth: int, kill: Kill) -> bool:
    """Whether a step of the host was cut short at its nth I/O."""
    host.disk.fail(kill.value, nth=nth)
    try:
        run(step)
    except Cancelled:
        return True
    finally:
        host.disk.no_more_faults()
    return False


def known(resource: Resource) -> tuple[Hold, Leader]:
    """What is noted of a lease in hand."""
    assert resource.leader is not None
    return resource.hold, resource.leader


async def acquire(resource: Resource, *, shared: bool) -> None:
    await resource.acquire(shared=shared, give_up_at=FOREVER)


async def convert(resource: Resource, *, shared: bool) -> None:
    await resource.convert(shared=shared, give_up_at=FOREVER)


KILLS = pytest.mark.parametrize("kill", list(Kill))
MODES = pytest.mark.parametrize("shared", [False, True], ids=["exclusive", "shared"])


@MODES
def test_a_lease_in_hand_is_recalled(shared: bool) -> None:
    """By one process after the other; the rival gets it when the last one has released it, not before."""
    _, one, two = two_hosts()
    rival, resource = Rival(two), one.resource()
    run(acquire(resource, shared=shared))
    for _ in range(3):
        hold, leader = known(resource)
        one = successor(one)
        resource = one.resource()
        rival.watches(one)
        assert run(recall(resource, one.lockspace, hold, leader, converting=False))
        assert known(resource) == (hold, leader)
        assert not resource.unsettled
        one.disk.no_more_faults()
    assert not rival.won
    run(convert(resource, shared=not shared))
    assert not rival.tries()
    run(resource.release())
    assert rival.tries()


@KILLS
@MODES
def test_a_kill_while_it_is_taken(shared: bool, kill: Kill) -> None:
    """At every I/O: nobody was told, so it is put in order, and free."""
    for nth in range(1, IOS_MAX):
        world, one, two = two_hosts()
        rival = Rival(two)
        rival.tries()
        if not killed(one, acquire(one.resource(), shared=shared), nth, kill):
            break
        one = successor(one)
        resource = one.resource()
        rival.watches(one)
        proposed = world.record(1).dblock
        run(take_over(resource, one.lockspace))
        run(resource.settle())
        one.disk.no_more_faults()
        # What was proposed may have been chosen: it must not be forgotten.
        assert world.record(1).dblock == replace(proposed, flags=sectors.RELEASED)
        assert (resource.hold, resource.unsettled) == (Hold.NONE, False)
        assert rival.tries()
        run(acquire(resource, shared=shared))
        assert not rival.tries()
        run(resource.release())
        assert rival.tries()
    else:
        raise AssertionError("an acquire has more I/Os than were looked at")


@KILLS
@MODES
def test_a_kill_while_it_is_released(shared: bool, kill: Kill) -> None:
    """At every I/O: it is put in order, and free."""
    for nth in range(1, IOS_MAX):
        _, one, two = two_hosts()
        rival, resource = Rival(two), one.resource()
        run(acquire(resource, shared=shared))
        if not killed(one, resource.release(), nth, kill):
            break
        one = successor(one)
        resource = one.resource()
        rival.watches(one)
        run(take_over(resource, one.lockspace))
        run(resource.settle())
        assert rival.tries()
    else:
        raise AssertionError("a release has more I/Os than were looked at")


async def take_and_release(resource: Resource) -> None:
    await resource.acquire(give_up_at=FOREVER)
    await resource.release()


@KILLS
@pytest.mark.parametrize("watched", [False, True], ids=["alone", "watched"])
@pytest.mark.parametrize("before", [False, True], ids=["new", "had before"])
def test_what_was_begun_is_gone_on_with(before: bool, watched: bool, kill: Kill) -> None:
    """A kill at every I/O of a taking and a release, and the next process wants the lease. Once it was won,
    and until it was let go of, nothing is written for that, and the rival never gets it.
    """
    kept = carried_on = 0
    for nth in range(1, IOS_MAX):
        world, one, two = two_hosts()
        rival, resource = Rival(two), one.resource()
        if before:
            run(take_and_release(resource))
        if not killed(one, take_and_release(resource), nth, kill):
            break
        owned, record = world.leader(), world.record(1)
        in_hand = bool(owned.timestamp) and not record.dblock.released
        one = successor(one)
        resource = one.resource()
        if watched:
            rival.watches(one)
        run(take_over(resource, one.lockspace))
        began = len(world.io)
        run(acquire(resource, shared=False))
        one.disk.no_more_faults()
        if in_hand:
            written = [io for io in world.writes(began) if io.host == one.host_id]
            assert (written, rival.won, resource.leader) == ([], 0, owned)
            kept += 1
        elif record.dblock.bal and not record.dblock.released and not rival.won:
            written = [io for io in world.writes(began) if io.host == one.host_id]
            # The rival may have decided it for us meanwhile.
            assert len(written) in ((0, 3) if watched else (3,)), "more than one ballot and its commit"
            carried_on += 1
        assert (resource.hold, resource.unsettled) == (Hold.EXCLUSIVE, False)
        won = rival.won
        assert not rival.tries()
        run(resource.release())
        assert rival.tries() and rival.won == won + 1
    else:
        raise AssertionError("a taking and a release have more I/Os than were looked at")
    assert kept and carried_on


def test_what_was_won_is_not_had_beside_a_sharer() -> None:
    """The kill came before it was looked who shares the lease."""
    world, one, two = two_hosts()
    sharer = two.resource()
    run(acquire(sharer, shared=True))
    for nth in range(1, IOS_MAX):
        one.disk.fail(Kill.AFTER.value, nth=nth)
        try:
            run(acquire(one.resource(), shared=False))
        except Cancelled:
            pass
        except Refused:
            break
        one.disk.no_more_faults()
        owner = world.leader()
        one = successor(one)
        resource = one.resource()
        run(take_over(resource, one.lockspace))
        with pytest.raises(Refused):
            run(acquire(resource, shared=False))
        assert resource.hold is Hold.NONE
        assert not world.leader().timestamp, owner


def test_an_old_version_that_came_back_is_not_gone_on_with() -> None:
    """It was let go of, and a late commit has put it back; the ballot for the next one dropped the mark."""
    world, one, two = two_hosts()
    run(take_and_release(resource := one.resource()))
    old = replace(
        world.leader(), timestamp=5, owner_id=1, owner_generation=one.lockspace.generation, write_id=2
    )
    for nth in range(1, IOS_MAX):
        if not killed(one, acquire(resource, shared=False), nth, Kill.AFTER):
            raise AssertionError("no kill came between the two phases")
        if world.record(1).dblock.lver == old.lver + 1:
            break
        one = successor(one)
        resource = one.resource()
        run(take_over(resource, one.lockspace))
        run(resource.settle())
    other = two.resource()
    run(acquire(other, shared=False))
    world.change_leader(old)
    one = successor(one)
    resource = one.resource()
    run(take_over(resource, one.lockspace))
    with pytest.raises(Refused):
        run(acquire(resource, shared=False))


def test_what_was_being_let_go_of_is_not_gone_on_with() -> None:
    """The mark stands in our sector. A late commit of the version by another host would make it count."""
    world, one, two = two_hosts()
    run(acquire(resource := one.resource(), shared=False))
    assert killed(one, resource.release(), 1, Kill.AFTER) and world.record(1).dblock.released
    one = successor(one)
    resource, late = one.resource(), replace(world.leader(), write_id=2)
    run(take_over(resource, one.lockspace))
    run(acquire(resource, shared=False))
    if world.leader().lver == late.lver:
        world.change_leader(late)
    assert not Rival(two).tries()


@pytest.mark.parametrize("during", [True, False], ids=["during the look", "after the look"])
def test_what_was_won_must_be_confirmed_after_a_suspicion(during: bool) -> None:
    """A host that stood still after it had looked may have been taken for dead."""
    _, one, _ = two_hosts()
    run(acquire(one.resource(), shared=False))
    one = successor(one)
    resource, pace = one.resource(), one.lockspace.pace
    if during:
        one.disk.before(lambda: pace.suspect("just now"), "read")
    run(take_over(resource, one.lockspace))
    if not during:
        pace.suspect("just now")
    run(acquire(resource, shared=False))
    assert resource.hold is Hold.EXCLUSIVE and not resource.proven


def test_a_recalled_lease_must_be_confirmed_after_a_suspicion() -> None:
    """Also one that came during the look."""
    _, one, _ = two_hosts()
    run(acquire(first := one.resource(), shared=False))
    hold, record = known(first)
    one = successor(one)
    resource = one.resource()
    one.disk.before(lambda: one.lockspace.pace.suspect("just now"), "read")
    assert run(recall(resource, one.lockspace, hold, record, converting=False))
    assert not resource.proven


def test_a_conversion_is_not_gone_on_with() -> None:
    """Whoever has it for itself must not be told as one of those who share it."""
    for nth in range(1, IOS_MAX):
        world, one, _ = two_hosts()
        run(acquire(resource := one.resource(), shared=True))
        if not killed(one, convert(resource, shared=False), nth, Kill.AFTER):
            break
        one = successor(one)
        resource = one.resource()
        run(take_over(resource, one.lockspace))
        run(acquire(resource, shared=False))
        assert not world.record(1).mode.shared


def test_to_share_it_what_was_begun_is_put_in_order_first() -> None:
    """Only who wants it alone goes on."""
    _, one, two = two_hosts()
    run(acquire(one.resource(), shared=False))
    one = successor(one)
    resource = one.resource()
    run(take_over(resource, one.lockspace))
    run(acquire(resource, shared=True))
    run(acquire(two.resource(), shared=True))
    assert resource.hold is Hold.SHARED


@KILLS
@MODES
@pytest.mark.parametrize("again", [True, False], ids=["converted again", "released"])
def test_a_kill_while_it_is_converted(shared: bool, kill: Kill, again: bool) -> None:
    """At every I/O: it is recalled in one of the two modes, and the rival got it at no moment."""
    modes = set()
    for nth in range(1, IOS_MAX):
        _, one, two = two_hosts()
        rival, resource = Rival(two), one.resource()
        run(acquire(resource, shared=not shared))
        hold, leader = known(resource)
        one.disk.before(rival.tries, nth=nth)
        if not killed(one, convert(resource, shared=shared), nth, kill):
            break
        one = successor(one)
        resource = one.resource()
        rival.watches(one)
        assert run(recall(resource, one.lockspace, hold, leader, converting=True))
        one.disk.no_more_faults()
        assert not rival.tries()
        assert not rival.won
        modes.add(resource.hold)
        if again:
            run(convert(resource, shared=resource.hold is Hold.EXCLUSIVE))
            assert not rival.tries()
        run(resource.release())
        assert rival.tries()
    else:
        raise AssertionError("a conversion has more I/Os than were looked at")
    assert Hold.SHARED in modes


def _forced(world: World) -> None:
    world.change_leader(replace(world.leader(), timestamp=0))


def _won_by_another(world: World) -> None:
    leader = world.leader()
    world.change_leader(replace(leader, lver=leader.lver + 1, owner_id=2, write_id=2))


def _had_and_won_again(world: World) -> None:
    leader = world.leader()
    world.change_leader(replace(leader, lver=leader.lver + 2))


def _let_go_of(world: World) -> None:
    """Another host committed it for us, and we have said that we let go."""
    world.change_leader(replace(world.leader(), write_id=2))
    dblock = world.record(1).dblock
    world.change_record(1, replace(dblock, flags=dblock.flags | sectors.RELEASED))


@pytest.mark.parametrize("loss", [_forced, _won_by_another, _had_and_won_again, _let_go_of])
def test_a_lost_lease_is_not_recalled(loss: Any) -> None:
    """What is left of it is put in order, whatever it is."""
    world, one, two = two_hosts()
    resource = one.resource()
    run(acquire(resource, shared=False))
    hold, leader = known(resource)
    loss(world)
    one = successor(one)
    resource = one.resource()
    assert not run(recall(resource, one.lockspace, hold, leader, converting=False))
    assert (resource.hold, resource.unsettled) == (Hold.NONE, True)
    run(resource.settle())
    if loss is not _won_by_another:
        assert Rival(two).tries()


def test_a_shared_lease_that_was_cleared_is_not_recalled() -> None:
    """By a host that took this one for dead."""
    world, one, _ = two_hosts()
    resource = one.resource()
    run(acquire(resource, shared=True))
    hold, leader = known(resource)
    mine = world.record(1)
    one = successor(one)
    world.put(world.host_offset(1), bytes(512))
    assert not run(recall(one.resource(), one.lockspace, hold, leader, converting=False))
    world.change_record(1, mine.dblock, replace(mine.mode, generation=mine.mode.generation + 1))
    assert not run(recall(one.resource(), one.lockspace, hold, leader, converting=False))
    world.change_record(1, mine.dblock, mine.mode)
    assert run(recall(one.resource(), one.lockspace, hold, leader, converting=False))


def test_a_lease_won_for_us_by_another_is_recalled() -> None:
    """Its leader has another writer, and our sector does not say that we let go."""
    world, one, _ = two_hosts()
    resource = one.resource()
    run(acquire(resource, shared=False))
    world.change_leader(replace(world.leader(), write_id=2))
    hold, leader = known(resource)
    one = successor(one)
    resource = one.resource()
    assert run(recall(resource, one.lockspace, hold, leader, converting=False))
    run(resource.release())
    assert world.record(1).dblock.released


def test_what_cannot_be_read_is_not_known() -> None:
    """It can be asked again; a damaged sector is told."""
    world, one, _ = two_hosts()
    resource = one.resource()
    run(acquire(resource, shared=False))
    hold, leader = known(resource)
    one = successor(one)
    resource = one.resource()
    one.disk.fail(Fate.REFUSED)
    with pytest.raises(DiskError):
        run(recall(resource, one.lockspace, hold, leader, converting=False))
    assert run(recall(resource, one.lockspace, hold, leader, converting=False))
    world.change_record(1, replace(world.record(1).dblock, checksum=1))
    with pytest.raises(RecordError):
        run(recall(one.resource(), one.lockspace, hold, leader, converting=False))
