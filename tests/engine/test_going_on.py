"""A membership that a later process goes on with, after the one that joined was killed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from lockfs.paxos.errors import LockspaceFailed
from lockfs.paxos.kept import Kept
from lockfs.paxos.lockspace import Lockspace, Standing, stamp
from lockfs.paxos.seams import DiskError
from lockfs.paxos.watch import HostState
from lockfs.records import sectors
from lockfs.records.results import Result
from lockfs.records.sectors import Leader
from tests.engine.fakes import FAST, SPACE, Fate, Host, run, two_hosts

COMEBACK_S = FAST.comeback(1)


def successor(host: Host, kept: Kept | None = None) -> Host:
    """The host's next process, which has gone on with the membership and renews."""
    kept = kept or host.lockspace.kept()
    host.crash()
    later = Host(host.world, host.host_id, host.timing, host.name)
    run(later.lockspace.go_on(kept))
    later.renewing = True
    later._renew()
    return later


def test_the_membership_goes_on() -> None:
    """Nothing is written but the next renewal; nobody else sees that there are two processes."""
    world, one, two = two_hosts()
    kept, before = one.lockspace.kept(), world.delta(1)
    one.crash()
    writes = len(world.writes())
    later = Host(world, 1, name=one.name)
    run(later.lockspace.go_on(kept))
    assert len(world.writes()) == writes
    assert (later.lockspace.joined, later.lockspace.generation) == (True, one.lockspace.generation)
    assert later.lockspace.renewed_at == one.lockspace.renewed_at
    assert later.lockspace.standing() is Standing.GOOD
    run(later.lockspace.renew())
    assert later.lockspace.renewed_at == world.now
    assert replace(world.delta(1), timestamp=0, checksum=0) == replace(before, timestamp=0, checksum=0)
    later.renewing = True
    later._renew()
    world.advance(3 * FAST.dead)
    assert two.lockspace.watch.state(1, world.now) is HostState.LIVE
    assert later.lockspace.watch.state(2, world.now) is HostState.LIVE
    third = successor(later)
    assert third.lockspace.kept().entered_at == kept.entered_at
    run(third.lockspace.leave())
    assert world.delta(1).timestamp == 0


def test_a_renewal_of_which_nobody_knows_counts_for_nothing() -> None:
    """It landed just before the kill: the record is ours, and yet the time runs from the one before."""
    world, one, _ = two_hosts()
    kept = one.lockspace.kept()
    world.advance(FAST.renew_every)
    assert one.lockspace.renewed_at > kept.renewed_at
    one.crash()
    later = Host(world, 1, name=one.name)
    run(later.lockspace.go_on(kept))
    assert later.lockspace.renewed_at == kept.renewed_at
    run(later.lockspace.renew())
    assert later.lockspace.renewed_at == world.now


@pytest.mark.parametrize("age", [FAST.late - 1, FAST.fails, COMEBACK_S - 1, COMEBACK_S])
def test_it_must_be_in_time(age: float) -> None:
    """By the clock, with the time that the former process had not been able to renew."""
    world, one, _ = two_hosts()
    kept = one.lockspace.kept()
    one.crash()
    world.advance(kept.renewed_at + age - world.now)
    later = Host(world, 1, name=one.name)
    if age >= COMEBACK_S:
        with pytest.raises(LockspaceFailed):
            run(later.lockspace.go_on(kept))
        assert later.lockspace.standing() is Standing.LOST
        with pytest.raises(LockspaceFailed):
            later.lockspace.kept()
        return
    run(later.lockspace.go_on(kept))
    assert later.lockspace.standing() is (Standing.DOUBT if age >= FAST.fails else Standing.GOOD)
    run(later.lockspace.renew())
    assert later.lockspace.standing() is Standing.GOOD


def test_another_hosts_long_io_counts_before_the_first_pass() -> None:
    """How late it may be depends on the slowest host that the former process had seen."""
    world, one, _ = two_hosts()
    kept = replace(one.lockspace.kept(), longest_io=40)
    one.crash()
    limit = FAST.comeback(40)
    assert limit < COMEBACK_S
    world.advance(kept.renewed_at + limit - world.now)
    with pytest.raises(LockspaceFailed):
        run(Host(world, 1, name=one.name).lockspace.go_on(kept))


def _taken(leader: Leader) -> Leader:
    return replace(leader, resource_field=sectors.name_field(b"somebody"))


def _joined_anew(leader: Leader) -> Leader:
    return replace(leader, owner_generation=leader.owner_generation + 1)


def _left(leader: Leader) -> Leader:
    return replace(leader, timestamp=0)


def _older(leader: Leader) -> Leader:
    return replace(leader, timestamp=leader.timestamp - 1)


def _of_the_future(leader: Leader) -> Leader:
    return replace(leader, timestamp=leader.timestamp + 1000)


@pytest.mark.parametrize("change", [_taken, _joined_anew, _left, _older, _of_the_future])
def test_the_record_must_be_the_former_processs(change: Callable[[Leader], Leader]) -> None:
    """Else all is lost, and stays so."""
    world, one, _ = two_hosts()
    kept = one.lockspace.kept()
    one.crash()
    world.change_delta(1, change(world.delta(1)))
    later = Host(world, 1, name=one.name)
    with pytest.raises(LockspaceFailed):
        run(later.lockspace.go_on(kept))
    assert not later.lockspace.joined
    assert later.lockspace.why_lost


def test_another_io_timeout_is_another_life() -> None:
    """The others go by what the record states."""
    world, one, _ = two_hosts()
    kept = replace(one.lockspace.kept(), io_timeout=2)
    with pytest.raises(LockspaceFailed, match="io_timeout"):
        run(Host(world, 1, name=one.name).lockspace.go_on(kept))


def test_storage_that_does_not_answer_decides_nothing() -> None:
    """It can be tried again."""
    world, one, _ = two_hosts()
    kept = one.lockspace.kept()
    one.crash()
    later = Host(world, 1, name=one.name)
    later.disk.fail(Fate.REFUSED)
    with pytest.raises(DiskError):
        run(later.lockspace.go_on(kept))
    run(later.lockspace.go_on(kept))
    assert later.lockspace.standing() is Standing.GOOD


def test_a_late_renewal_of_the_former_process() -> None:
    """On some storage it lands after the kill; it is no other host, and the next renewal repairs it."""
    world, one, two = two_hosts()
    kept = one.lockspace.kept()
    late = replace(world.delta(1), timestamp=stamp(world.now))
    world.advance(1)
    later = successor(one, kept)
    world.change_delta(1, late)
    run(later.lockspace.renew())
    assert world.delta(1).timestamp == stamp(world.now)
    assert later.lockspace.standing() is Standing.GOOD
    world.advance(1)
    world.change_delta(1, replace(late, timestamp=late.timestamp - 60))
    with pytest.raises(LockspaceFailed) as caught:
        run(later.lockspace.renew())
    assert caught.value.result is Result.RENEWAL_CHANGED
    later.crash()
    two.crash()


def test_strangers_are_remembered_until_the_first_pass() -> None:
    """Who does not look first must have seen this host join, which they had time for since it did."""
    world, one, _ = two_hosts()

    def space(host: Host) -> Lockspace:
        area = host.lockspace.area
        return Lockspace(
            area, SPACE, 1, host.name, clock=host.clock, timing=FAST, looks_first=lambda name: False
        )

    one.lockspace.watch.first_check = 0.0
    kept = replace(one.lockspace.kept(), strangers=(3,))
    one.crash()
    later = space(Host(world, 1, name=one.name))
    assert later.strangers == []
    assert later.known_at == FAST.fails  # of its own io_timeout, as long as nothing is known
    run(later.go_on(kept))
    assert later.strangers == [3]
    assert later.known_at == kept.entered_at + FAST.of(3).fails
    run(later.renew())
    assert later.strangers == [1]
    assert later.kept().strangers == (1,)


def test_there_is_nothing_to_keep_before_the_join() -> None:
    """Nor after the membership was left."""
    world, one, _ = two_hosts()
    with pytest.raises(LockspaceFailed):
        Host(world, 3).lockspace.kept()
    one.crash()
    run(one.lockspace.leave())
    with pytest.raises(LockspaceFailed):
        one.lockspace.kept()
