"""Joining, renewing and leaving a lockspace (sections 9 and 10 of the format)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lockfs.paxos.area import NUMBERS_END, Area
from lockfs.paxos.errors import EngineError, IdInUse, LockspaceFailed
from lockfs.paxos.lockspace import CONFLICT_LOOK_S, Standing, find_lockspace, free_ids, stamp, survey
from lockfs.paxos.seams import DiskError, DiskTimeout
from lockfs.paxos.timing import SAFETY_S, Timing
from lockfs.paxos.watch import HostState
from lockfs.records import sectors
from lockfs.records.geometry import GEOMETRIES, Geometry
from lockfs.records.results import RecordError, Result
from lockfs.records.sectors import Leader
from tests.engine.fakes import FAST, SPACE, START_S, Cancelled, Fate, Host, World, run

TEN = Timing(10)


def owned(world: World, host_id: int = 1, name: bytes = b"other", generation: int = 5) -> Leader:
    """Have another host's record there."""
    leader = replace(
        world.delta(host_id),
        timestamp=77,
        owner_id=host_id,
        owner_generation=generation,
        resource_field=sectors.name_field(name),
    ).summed()
    world.change_delta(host_id, leader)
    return leader


def keep_changing(world: World, host_id: int, every: float) -> None:
    """Another host, alive."""

    def renew() -> None:
        leader = world.delta(host_id)
        world.change_delta(host_id, replace(leader, timestamp=leader.timestamp + 1))
        world.at(world.now + every, renew)

    world.at(world.now + every, renew)


# --- joining


@pytest.mark.parametrize("shape", GEOMETRIES, ids=str)
def test_a_free_id(shape: Geometry) -> None:
    """After the short delay, and with the first renewal due at once."""
    world = World(shape=shape).make()
    host = Host(world, shape.hosts_max)
    assert (host.lockspace.joined, host.lockspace.generation) == (False, 0)
    run(host.lockspace.join())
    assert world.now == START_S + 2
    assert (host.lockspace.joined, host.lockspace.generation) == (True, 1)
    found = world.delta(shape.hosts_max)
    assert (found.owner_id, found.owner_generation, found.timestamp) == (shape.hosts_max, 1, int(START_S))
    assert (found.io_timeout, found.resource_name, found.intact) == (1, host.name, True)
    assert host.lockspace.renewed_at == START_S
    assert host.lockspace.renewal_due <= world.now
    assert [io.length for io in world.io] == [shape.sector_size] * 3


def test_the_delay_is_that_of_the_sector() -> None:
    """Not the joiner's own; the next joiner finds the joiner's."""
    world = World().make(io_timeout=10)
    host = Host(world, 1)
    run(host.lockspace.join())
    assert world.now == START_S + 20
    assert world.delta(1).io_timeout == 1
    run(host.lockspace.renew())
    assert host.lockspace.standing() is Standing.GOOD


def test_a_sector_without_io_timeout() -> None:
    """The joiner's own counts."""
    world = World().make()
    world.change_delta(1, replace(world.delta(1), io_timeout=0))
    run(Host(world, 1, Timing(3)).lockspace.join())
    assert world.now == START_S + 6


def test_a_delay_longer_than_a_membership_lasts() -> None:
    """It is joined once more, with the delay of its own: else it would be lost as soon as joined."""
    world = World().make(io_timeout=60)
    host = Host(world, 1)
    run(host.lockspace.join())
    assert world.now == START_S + 2 * 60 + 2
    assert (host.lockspace.generation, world.delta(1).owner_generation) == (2, 2)
    assert host.lockspace.standing() is Standing.GOOD


def test_its_own_name_is_no_conflict() -> None:
    """Of a former start, if it has a lasting name: no long delay. What a longer name left stays behind it."""
    world = World().make()
    owned(world, name=b"host1")
    host = Host(world, 1)
    run(host.lockspace.join())
    assert world.now == START_S + 2
    assert host.lockspace.generation == 6
    world = World().make()
    owned(world, name=b"a-longer-name")
    run(Host(world, 1).lockspace.join())
    assert world.delta(1).resource_field == b"host1\0er-name".ljust(48, b"\0")


def test_a_silent_owner_is_waited_for() -> None:
    """For 8 io_timeout + watchdog of its own, looking all the time."""
    world = World().make()
    world.change_delta(1, replace(owned(world), io_timeout=3))
    host = Host(world, 1)
    run(host.lockspace.join())
    assert world.now == START_S + 8 * 3 + 60 + 2 * 3
    assert host.lockspace.generation == 6
    assert max(host.clock.slept[:-1]) <= CONFLICT_LOOK_S


def test_an_owner_that_is_alive_is_noticed_early() -> None:
    """With its name, without a write, and without waiting for the end of the delay."""
    world = World().make(io_timeout=10)
    owned(world)
    keep_changing(world, 1, 7)
    host = Host(world, 1)
    sentence = r"host id 1 of lockspace 'images' is in use by host 'other' \(-262\)"
    with pytest.raises(IdInUse, match=sentence) as caught:
        run(host.lockspace.join())
    error = caught.value
    assert (error.result, error.host_id, error.host_name) == (Result.ID_IN_USE, 1, b"other")
    assert world.now <= START_S + 7 + CONFLICT_LOOK_S
    assert not world.writes()
    assert not host.lockspace.joined


def test_an_owner_that_leaves_meanwhile() -> None:
    """It is not waited for any longer."""
    world = World().make()
    leader = owned(world)
    world.at(START_S + 5, lambda: world.change_delta(1, replace(leader, timestamp=0)))
    host = Host(world, 1)
    run(host.lockspace.join())
    assert world.now <= START_S + 5 + CONFLICT_LOOK_S + 2
    assert host.lockspace.generation == 6


def test_an_owner_whose_place_is_taken_and_left_meanwhile() -> None:
    """Another was quicker: its generation must not be given twice."""
    world = World().make()
    leader = owned(world)
    world.at(START_S + 5, lambda: world.change_delta(1, replace(leader, timestamp=0, owner_generation=6)))
    with pytest.raises(IdInUse):
        run(Host(world, 1).lockspace.join())
    assert not world.writes()


def test_a_renewal_that_lands_while_the_last_look_is_under_way() -> None:
    """The look counts from its beginning."""
    world = World().make()
    leader = owned(world)
    host = Host(world, 1)
    end = START_S + FAST.dead
    world.at(end - 2.5, lambda: host.disk.slow(3.0, "read", 0))
    world.at(end - 1, lambda: world.change_delta(1, replace(leader, timestamp=78)))
    with pytest.raises(IdInUse):
        run(host.lockspace.join())
    assert world.now > end


@pytest.mark.parametrize(
    ("change", "result"),
    [
        ({"magic": 1}, Result.LEADER_MAGIC),
        ({"version": 0x00040000}, Result.LEADER_VERSION),
        ({"space_field": sectors.name_field(b"x")}, Result.LEADER_SPACE_NAME),
        ({"sector_size": 4096}, Result.LEADER_SECTOR_SIZE),
        ({"owner_generation": NUMBERS_END}, Result.LEADER_INCONSISTENT),
    ],
)
def test_a_record_that_is_none(change: dict[str, Any], result: Result) -> None:
    """It is named by its sector, and nothing is written; a renewal that finds it is the last."""
    world = World().make()
    host, other = Host(world, 3), Host(world, 2).join()
    before = len(world.writes())
    for host_id, call in ((3, host.lockspace.join), (2, other.lockspace.renew)):
        world.change_delta(host_id, replace(world.delta(host_id), **change))
        with pytest.raises(RecordError, match=f"sector {host_id - 1} of /leases") as caught:
            run(call())
        assert caught.value.result is result
    assert len(world.writes()) == before
    assert other.lockspace.standing() is Standing.LOST
    assert f"sector 1 of /leases: {caught.value.problem}" in other.lockspace.why_lost


def test_a_damaged_record() -> None:
    """As the above."""
    world = World().make()
    world.data[30] ^= 1
    with pytest.raises(RecordError, match="sector 0 of /leases: the record is damaged") as caught:
        run(Host(world, 1).lockspace.join())
    assert caught.value.result is Result.LEADER_CHECKSUM
    assert not world.writes()


def test_another_joiner_in_the_short_delay() -> None:
    """The later writer has the id."""
    world = World().make()
    host = Host(world, 1)
    world.at(START_S + 1, lambda: owned(world))
    with pytest.raises(IdInUse, match="'other'"):
        run(host.lockspace.join())
    assert not host.lockspace.joined
    before = len(world.io)
    run(host.lockspace.leave())
    assert len(world.io) == before


@pytest.mark.parametrize("host_id", [0, -1, 251])
def test_an_id_that_no_sector_is_for(host_id: int) -> None:
    """Refused before any I/O."""
    world = World(shape=GEOMETRIES[1]).make()
    with pytest.raises(EngineError, match=f"host id {host_id} is not within 1 and 250") as caught:
        run(Host(world, host_id, name=b"h").lockspace.join())
    assert caught.value.result is Result.HOST_ID_TOO_LARGE
    assert not world.io


def test_a_join_on_storage_that_is_too_slow() -> None:
    """From the look to the end of the write no more than the short delay may pass: else another host may have
    looked, written, waited and joined in between, with the same generation. Its record is not freed then."""
    world = World().make()
    host = Host(world, 1, TEN)
    host.disk.before(lambda: world.advance(2.0), "write")
    with pytest.raises(EngineError, match="too slow to join with host id 1") as caught:
        run(host.lockspace.join())
    assert caught.value.result is Result.GENERAL
    before = len(world.io)
    run(host.lockspace.leave())
    assert len(world.io) == before


def test_a_sector_that_stays_silent_after_a_long_delay_is_looked_at_again() -> None:
    """The time to write counts from the last look, not from the first."""
    world = World().make()
    owned(world)
    host = Host(world, 1)
    host.disk.before(lambda: world.advance(1.9), "write")
    run(host.lockspace.join())
    assert host.lockspace.joined


# --- renewing


def joined(timing: Timing = FAST, host_id: int = 1) -> tuple[World, Host]:
    """A host that has joined and does not renew by itself."""
    world = World().make(io_timeout=timing.io_timeout)
    host = Host(world, host_id, timing)
    run(host.lockspace.join())
    run(host.lockspace.renew())
    return world, host


def test_a_renewal() -> None:
    """One read of the whole area, one write: timestamp, event and bitmap."""
    world, host = joined()
    lockspace = host.lockspace
    lockspace.event = (4, 5, 6)
    lockspace.call(9)
    world.advance(2.5)
    before = len(world.io)
    run(lockspace.renew())
    assert [(io.op, io.length) for io in world.io[before:]] == [("read", 1 << 20), ("write", 512)]
    record = world.delta(1)
    assert (record.timestamp, record.intact) == (int(world.now), True)
    assert (record.write_id, record.write_generation, record.write_timestamp) == (4, 5, 6)
    assert sectors.bitmap_of(world.sector(0)) == sectors.bitmap_with(frozenset({9}))
    assert lockspace.renewed_at == world.now
    assert lockspace.write_until == world.now + 8
    assert lockspace.taken_from == world.now + 68
    world.advance(5.9)
    run(lockspace.renew())
    assert sectors.in_bitmap(sectors.bitmap_of(world.sector(0)), 9) is False  # 6 io_timeout after the call


def test_a_renewal_has_as_long_as_it_could_matter() -> None:
    """Its write has 8 io_timeout + watchdog, its read one io_timeout."""
    world, host = joined()
    host.disk.fail(Fate.LOST, "read")
    start = world.now
    with pytest.raises(DiskTimeout):
        run(host.lockspace.renew())
    assert world.now == start + 1
    host.disk.fail(Fate.LOST, "write")
    with pytest.raises(DiskTimeout):
        run(host.lockspace.renew())
    assert world.now == start + 1 + 68
    assert host.lockspace.standing() is Standing.LOST


def test_not_joined() -> None:
    """Nothing to renew, nothing may be done."""
    host = Host(World().make(), 1)
    for call in (host.lockspace.renew, host.lockspace.leave):
        if call == host.lockspace.renew:
            with pytest.raises(LockspaceFailed) as caught:
                run(call())
            assert caught.value.result is Result.LOCKSPACE_NOT_JOINED
            with pytest.raises(LockspaceFailed, match=r"cannot be used now: it is not joined \(-28\)"):
                host.lockspace.require()
        else:
            run(call())
    assert not host.world.io


@pytest.mark.parametrize(
    "change",
    [{"owner_id": 2}, {"owner_generation": 2}, {"resource_field": sectors.name_field(b"thief")},
     {"resource_field": b"host1\0x".ljust(48, b"\0")}],
)  # fmt: skip
@pytest.mark.parametrize("after_failure", [False, True])
def test_an_id_that_was_taken(change: dict[str, Any], after_failure: bool) -> None:
    """The host stops at once, for good, and writes nothing any more; leaving neither."""
    world, host = joined()
    if after_failure:
        host.disk.fail(Fate.REFUSED, "write")
        with pytest.raises(DiskError):
            run(host.lockspace.renew())
    world.change_delta(1, replace(world.delta(1), **change))
    before = len(world.writes())
    with pytest.raises(LockspaceFailed) as caught:
        run(host.lockspace.renew())
    assert caught.value.result is Result.RENEWAL_OWNER
    assert host.lockspace.standing() is Standing.LOST
    assert "host id 1 was taken by host" in host.lockspace.why_lost
    with pytest.raises(LockspaceFailed, match="was taken by host"):
        host.lockspace.require()
    run(host.lockspace.leave())
    assert len(world.writes()) == before


def test_a_record_that_was_changed() -> None:
    """After a good renewal every byte counts; after a failed one only the ownership does."""
    world, host = joined()
    changed = replace(world.delta(1), timestamp=3)
    host.disk.fail(Fate.REFUSED, "write")
    with pytest.raises(DiskError):
        run(host.lockspace.renew())
    world.change_delta(1, changed)
    run(host.lockspace.renew())
    world.change_delta(1, changed)
    with pytest.raises(LockspaceFailed, match="the lease of host id 1 was changed") as caught:
        run(host.lockspace.renew())
    assert caught.value.result is Result.RENEWAL_CHANGED


@pytest.mark.parametrize("fate", [Fate.REFUSED, Fate.REFUSED_LANDED, Fate.CANCELLED, Fate.CANCELLED_LATE])
def test_a_renewal_after_one_that_failed(fate: Fate) -> None:
    """Whichever of the two records is there."""
    world, host = joined()
    world.advance(2)
    host.disk.fail(fate, "write", after=0.5)
    renewed_at = host.lockspace.renewed_at
    with pytest.raises((DiskError, Cancelled)):
        run(host.lockspace.renew())
    assert host.lockspace.renewed_at == renewed_at
    for _ in range(2):
        world.advance(1)
        run(host.lockspace.renew())
    assert host.lockspace.renewed_at == world.now
    assert world.delta(1).timestamp == int(world.now)


# --- standing


def test_the_standing_follows_the_age() -> None:
    """GOOD, LATE from 6, DOUBT from 8 io_timeout, LOST from `comeback`, all of the last good renewal."""
    world, host = joined(TEN)
    lockspace, start = host.lockspace, host.lockspace.renewed_at
    comeback = 8 * 10 + 60 - 30
    assert lockspace.comeback == comeback
    for age, standing in (
        (59.9, Standing.GOOD), (60, Standing.LATE), (79.9, Standing.LATE), (80, Standing.DOUBT),
        (comeback - 0.1, Standing.DOUBT),
    ):  # fmt: skip
        world.now = start + age
        assert lockspace.standing() is standing
        if standing is Standing.DOUBT:
            with pytest.raises(LockspaceFailed, match="its lease is not renewed"):
                lockspace.require()
        else:
            lockspace.require()
    world.now = start + comeback
    assert lockspace.standing() is Standing.LOST
    assert lockspace.why_lost == f"no renewal for {comeback} s"
    world.now = start
    assert lockspace.standing() is Standing.LOST


def test_a_late_renewal_in_time() -> None:
    """From DOUBT back to GOOD."""
    world, host = joined(TEN)
    world.jump(109)
    assert host.lockspace.standing() is Standing.DOUBT
    run(host.lockspace.renew())
    assert host.lockspace.standing() is Standing.GOOD
    assert host.lockspace.renewed_at == world.now


def test_a_late_renewal_that_lands_too_late() -> None:
    """It was begun in time: that is not enough."""
    world, host = joined(TEN)
    world.jump(105)
    host.disk.before(lambda: world.advance(5), "write")
    run(host.lockspace.renew())
    assert host.lockspace.standing() is Standing.LOST
    assert "a renewal came only after 110 s" in host.lockspace.why_lost


def test_nothing_is_written_after_the_loss() -> None:
    """Neither by a renewal whose pass still succeeds, nor by leaving."""
    world, host = joined(TEN)
    world.jump(110)
    before = len(world.writes())
    with pytest.raises(LockspaceFailed, match="no renewal for 110 s") as caught:
        run(host.lockspace.renew())
    assert caught.value.result is Result.LOCKSPACE_FAILED
    run(host.lockspace.leave())
    assert len(world.writes()) == before
    assert not host.lockspace.joined


def test_a_host_suspended_between_pass_and_write() -> None:
    """It sees that it is lost before it writes."""
    world, host = joined(TEN)
    host.disk.before(lambda: world.jump(200), "read")
    before = len(world.writes())
    with pytest.raises(LockspaceFailed):
        run(host.lockspace.renew())
    assert len(world.writes()) == before


@pytest.mark.parametrize(
    ("own", "other", "watchdog", "comeback"),
    [
        (1, 1, 60, 38),
        (1, 40, 60, 68 - 45),
        (1, 60, 60, 8),
        (10, 10, 10, 80),
        (10, 10, 60, 110),
        (20, 20, 60, 190),
    ],
)
def test_how_late_is_too_late(own: int, other: int, watchdog: int, comeback: float) -> None:
    """Half the watchdog time before others may take over, or the longest I/O of any host and some seconds;
    but never less than 8 io_timeout."""
    timing = Timing(own, watchdog)
    assert max(timing.fails, timing.comeback(max(own, other))) == comeback
    assert SAFETY_S == 5
    world, host = joined(timing)
    world.change_delta(5, replace(owned(world, 5), io_timeout=other))
    run(host.lockspace.renew())
    assert host.lockspace.comeback == comeback
    world.change_delta(5, replace(owned(world, 5), io_timeout=other, timestamp=0))
    run(host.lockspace.renew())
    assert host.lockspace.comeback == max(timing.fails, timing.comeback(own))


# --- leaving


def test_leaving() -> None:
    """One write, without a look: everything stays but the timestamp."""
    world, host = joined()
    before, last = len(world.io), world.delta(1)
    run(host.lockspace.leave())
    assert [io.op for io in world.io[before:]] == ["write"]
    assert world.delta(1) == replace(last, timestamp=0).summed()
    assert not host.lockspace.joined
    assert host.lockspace.standing() is Standing.LOST
    assert host.lockspace.why_lost == "this host has left"
    run(host.lockspace.leave())
    assert len(world.io) == before + 1


@pytest.mark.parametrize("landed", [False, True])
def test_leaving_again_after_a_failure(landed: bool) -> None:
    """The second try looks first."""
    world, host = joined()
    host.disk.fail(Fate.REFUSED_LANDED if landed else Fate.REFUSED, "write")
    with pytest.raises(DiskError):
        run(host.lockspace.leave())
    assert not host.lockspace.joined
    assert not host.lockspace.generation
    before = len(world.writes())
    run(host.lockspace.leave())
    assert world.delta(1).timestamp == 0
    assert len(world.writes()) == before + (not landed)


def test_leaving_after_a_join_was_cut_short() -> None:
    """The id is free at once for the next."""
    world = World().make()
    host = Host(world, 1)
    host.clock.cancel_at = 1
    with pytest.raises(Cancelled):
        run(host.lockspace.join())
    assert world.delta(1).timestamp
    run(host.lockspace.leave())
    assert world.delta(1).timestamp == 0
    other = Host(world, 1, name=b"other")
    start = world.now
    run(other.lockspace.join())
    assert world.now == start + 2


def test_leaving_long_after_a_join_was_cut_short() -> None:
    """Others may be waiting it out: nothing is written."""
    world = World().make()
    host = Host(world, 1)
    host.clock.cancel_at = 1
    with pytest.raises(Cancelled):
        run(host.lockspace.join())
    world.advance(FAST.fails)
    before = len(world.writes())
    run(host.lockspace.leave())
    assert len(world.writes()) == before


def test_leaving_after_a_join_that_another_overwrote() -> None:
    """The id is the other's."""
    world = World().make()
    host = Host(world, 1)
    host.clock.cancel_at = 1
    with pytest.raises(Cancelled):
        run(host.lockspace.join())
    leader = owned(world)
    run(host.lockspace.leave())
    assert world.delta(1) == leader


@pytest.mark.parametrize(("after", "freed"), [(0.5, True), (2.5, False)])
def test_leaving_after_a_join_whose_write_was_late(after: float, freed: bool) -> None:
    """A record that landed long after the look may lie over that of a host that has joined since, whose
    generation is the same: its leases would be free with it."""
    world = World().make()
    host = Host(world, 1, TEN)
    host.disk.fail(Fate.CANCELLED_LATE, "write", after=after)
    with pytest.raises(Cancelled):
        run(host.lockspace.join())
    run(host.lockspace.leave())
    assert (world.delta(1).timestamp == 0) == freed
    assert world.delta(1).resource_name == host.name


def test_two_joiners_of_which_one_stands_still() -> None:
    """Between its look and its write the other joins: it must not get the id, nor free it."""
    world = World().make()
    slow, quick = Host(world, 1, TEN), Host(world, 1, name=b"quick")
    slow.disk.before(lambda: run(quick.lockspace.join()), "write")
    with pytest.raises(EngineError, match="too slow"):
        run(slow.lockspace.join())
    run(slow.lockspace.leave())
    assert world.delta(1).timestamp != 0
    with pytest.raises(LockspaceFailed):
        run(quick.lockspace.renew())


# --- reports and searching


def test_abandoning() -> None:
    """A membership that was given up is lost for good, and nothing is written under it any more."""
    world = World().make()
    host = Host(world, 1)
    run(host.lockspace.join())
    run(host.lockspace.renew())
    host.lockspace.abandon("the area was replaced")
    assert (host.lockspace.standing(), host.lockspace.why_lost) == (Standing.LOST, "the area was replaced")
    before = world.delta(1)
    with pytest.raises(LockspaceFailed):
        run(host.lockspace.renew())
    run(host.lockspace.leave())
    assert world.delta(1) == before


def test_hosts() -> None:
    """Every id that was ever used, in order."""
    world, host = joined()
    other = Host(world, 7, name=b"n\xff").join()
    world.change_delta(5, replace(owned(world, 5, b"gone"), timestamp=0))
    world.advance(3)
    run(host.lockspace.renew())
    world.advance(0.5)
    found = list(host.lockspace.hosts())
    assert [(one.host_id, one.name, one.generation, one.state) for one in found] == [
        (1, "host1", 1, HostState.LIVE),
        (5, "gone", 5, HostState.FREE),
        (7, "n\\xff", 1, HostState.LIVE),
    ]
    assert [one.io_timeout for one in found] == [1, 1, 1]
    assert found[2].silent_s == 0.5
    other.crash()


def test_a_stamp_is_never_zero() -> None:
    """Zero would say free."""
    assert [stamp(now) for now in (0.0, 0.9, 1.0, 7.9)] == [1, 1, 1, 7]


@pytest.mark.parametrize("shape", GEOMETRIES, ids=str)
def test_finding_a_lockspace(shape: Geometry) -> None:
    """Its geometry is what it states."""
    world = World(shape=shape).make()
    area = Area(Host(world, 1).disk, 0, GEOMETRIES[0], 1)
    for name in (None, SPACE):
        found, first = run(find_lockspace(area, name))
        assert (found.shape, first.space_name) == (shape, SPACE)
    with pytest.raises(RecordError, match="sector 0 of /leases: it belongs to lockspace 'images', not 'x'"):
        run(find_lockspace(area, b"x"))
    leader = replace(world.delta(1), sector_size=1024)
    world.put(0, leader.summed().encode())
    with pytest.raises(RecordError, match="sector 0 of /leases: a sector size of 1024 is stated") as caught:
        run(find_lockspace(area))
    assert caught.value.result is Result.LEADER_SECTOR_SIZE


def test_free_ids() -> None:
    """Those that are free, intact and within reach."""
    world = World().make()
    owned(world, 2)
    world.put(world.delta_offset(3), b"\0")
    world.change_delta(4, replace(world.delta(4), space_field=sectors.name_field(b"x")))
    leases = run(survey(Host(world, 1).lockspace.area))
    assert len(leases) == 2000
    assert free_ids(leases, SPACE, 6) == [1, 5, 6]


def test_a_renewal_right_after_a_look() -> None:
    """It takes no pass of its own: another host that the look saw change still counts as seen to live."""
    world = World().make()
    host = Host(world, 1)
    run(host.lockspace.join())
    keep_changing(world, 2, 0.5)
    run(host.lockspace.renew())
    world.now += 1.0
    world.io.clear()
    run(host.lockspace.look())
    run(host.lockspace.renew(looked=True))
    assert [io.length for io in world.io] == [world.shape.area_size, world.shape.sector_size]
    assert host.lockspace.renewed_at == world.now


def test_what_was_lost_since_the_look_is_not_renewed() -> None:
    """Nothing is written for it."""
    world = World().make()
    host = Host(world, 1)
    run(host.lockspace.join())
    run(host.lockspace.look())
    host.lockspace.abandon("for a reason")
    writes = len(world.writes())
    with pytest.raises(LockspaceFailed, match="for a reason"):
        run(host.lockspace.renew(looked=True))
    assert len(world.writes()) == writes
