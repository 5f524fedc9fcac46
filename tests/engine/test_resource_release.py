"""Giving a lease back, and putting in order what was left (sections 13 and 15 of the format)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lockfs.paxos.errors import EngineError, LockspaceFailed
from lockfs.paxos.resource import Hold, Resource
from lockfs.paxos.seams import DiskError, DiskTimeout
from lockfs.records import sectors
from lockfs.records.geometry import MIB
from lockfs.records.results import RecordError, Result
from lockfs.records.sectors import Dblock
from tests.engine.fakes import Fate, Host, World, run, two_hosts


def held(*, shared: bool = False) -> tuple[World, Host, Resource]:
    """A lease held by the first of two hosts."""
    world, one, _ = two_hosts()
    resource = one.resource()
    run(resource.acquire(shared=shared))
    return world, one, resource


def test_order_and_content() -> None:
    """The own sector with the mark, then a look at the leader, then the leader."""
    world, one, resource = held()
    leader, kept = world.leader(), world.record(1).dblock
    world.advance(1.5)
    before = len(world.io)
    run(resource.release())
    found = [(io.op, io.offset) for io in world.io[before:]]
    assert found == [("write", world.host_offset(1)), ("read", MIB), ("write", MIB)]
    assert world.record(1).dblock == replace(kept, flags=sectors.RELEASED)
    freed = replace(leader, timestamp=0, write_timestamp=int(world.now)).summed()
    assert world.leader() == freed
    assert (resource.hold, resource.leader, resource.unsettled) == (Hold.NONE, None, False)
    before = len(world.io)
    run(resource.release())
    run(resource.settle())
    assert len(world.io) == before
    run(one.resource().acquire())


def test_a_leader_that_another_host_wrote() -> None:
    """Is not touched; the mark is enough."""
    world, _, resource = held()
    world.change_leader(replace(world.leader(), write_id=2))
    before = len(world.writes())
    run(resource.release())
    assert len(world.writes()) == before + 1
    assert not resource.unsettled


@pytest.mark.parametrize(
    ("change", "result"),
    [
        ({"lver": 7}, Result.RELEASE_LVER),
        ({"timestamp": 0}, Result.RELEASE_OWNER),
        ({"owner_id": 2}, Result.RELEASE_OWNER),
        ({"owner_generation": 2}, Result.RELEASE_OWNER),
        ({"unused1": 2}, Result.RELEASE_OWNER),
    ],
)
def test_a_leader_that_is_no_longer_as_we_took_it(change: dict[str, Any], result: Result) -> None:
    """It is told, and nothing is written there; there is nothing left to settle."""
    world, _, resource = held()
    world.change_leader(replace(world.leader(), **change))
    leader = world.leader()
    with pytest.raises(EngineError) as caught:
        run(resource.release())
    assert caught.value.result is result
    assert world.leader() == leader
    assert (resource.hold, resource.unsettled) == (Hold.NONE, False)


def test_a_ballot_for_another_host_is_kept() -> None:
    """What another host may have been chosen by is never forgotten; the model finds two owners if it is."""
    world, _, resource = held()
    kept = Dblock(1, 1, 5, 1, 1, 1).summed()
    resource._contest.written = replace(resource._contest.written, dblock=kept)
    run(resource.release())
    assert world.record(1).dblock == replace(kept, flags=sectors.RELEASED)
    assert world.leader().timestamp == 0


@pytest.mark.parametrize("shared", [False, True])
def test_under_a_lost_membership(shared: bool) -> None:
    """Nothing is read or written: the lease is void."""
    world, one, resource = held(shared=shared)
    one.crash()
    world.jump(40)
    before = len(world.io)
    run(resource.release())
    assert len(world.io) == before
    assert (resource.hold, resource.unsettled) == (Hold.NONE, False)


@pytest.mark.parametrize("shared", [False, True])
def test_in_doubt(shared: bool) -> None:
    """Nothing is written until it is known whether the membership is lost."""
    world, one, resource = held(shared=shared)
    one.crash()
    world.jump(10)
    before = len(world.io)
    run(resource.release())
    assert len(world.io) == before
    assert (resource.hold, resource.unsettled) == (Hold.NONE, True)
    with pytest.raises(LockspaceFailed, match="not renewed"):
        run(resource.settle())
    assert not world.writes(before)
    run(one.lockspace.renew())
    run(resource.settle())
    assert not resource.unsettled
    assert world.leader().timestamp == 0
    assert not world.record(1).mode.shared


def test_settling_after_the_loss() -> None:
    """There is nothing to do."""
    world, one, resource = held()
    one.disk.fail(Fate.REFUSED, "write", MIB)
    with pytest.raises(DiskError):
        run(resource.release())
    one.crash()
    world.jump(40)
    before = len(world.io)
    run(resource.settle())
    assert len(world.io) == before
    assert not resource.unsettled


def test_a_damaged_leader() -> None:
    """It is named and not overwritten; settling looks before it writes anything."""
    world, _, resource = held()
    world.data[MIB + 40] ^= 1
    leader = bytes(world.data[MIB : MIB + 512])
    with pytest.raises(RecordError, match="sector 0 of /leases at byte 1048576"):
        run(resource.release())
    assert resource.unsettled
    before = len(world.writes())
    with pytest.raises(RecordError, match="sector 0 of /leases at byte 1048576"):
        run(resource.settle())
    assert len(world.writes()) == before
    assert world.data[MIB : MIB + 512] == leader


def test_a_leader_of_other_sectors() -> None:
    """Somebody made the lease anew: nothing of the size that was is written over it."""
    world, one, resource = held()
    one.disk.fail(Fate.REFUSED, "write", MIB)
    with pytest.raises(DiskError):
        run(resource.release())
    world.change_leader(replace(world.leader(), sector_size=4096, flags=0x80))
    with pytest.raises(RecordError, match="states sectors of 4096, not of 512"):
        run(resource.settle())


def test_a_commit_that_lands_late_is_waited_for() -> None:
    """Before the mark lets others go on: it would put the leader back over what they do."""
    world, one, resource = held()
    run(resource.release())
    one.disk.fail(Fate.LATE, "write", MIB, after=2.5)
    with pytest.raises(DiskTimeout):
        run(resource.acquire())
    before = len(world.io)
    for _ in range(2):
        with pytest.raises(DiskTimeout):
            run(resource.settle())
    assert not [io for io in world.writes(before) if io.offset >= MIB]
    run(resource.settle())
    assert not resource.unsettled
    assert (world.leader().timestamp, world.leader().lver) == (0, 2)


def test_acquiring_settles_first() -> None:
    """Whoever tries again need not call it."""
    world, one, resource = held()
    one.disk.fail(Fate.REFUSED, "write", MIB)
    with pytest.raises(DiskError):
        run(resource.release())
    assert resource.unsettled
    run(resource.acquire())
    assert resource.hold is Hold.EXCLUSIVE
    assert world.leader().lver == 2


def test_forgetting() -> None:
    """A lease that was removed while it was held."""
    world, _, resource = held()
    before = len(world.io)
    resource.forget()
    run(resource.release())
    run(resource.settle())
    assert len(world.io) == before
    assert (resource.hold, resource.leader, resource.unsettled) == (Hold.NONE, None, False)
