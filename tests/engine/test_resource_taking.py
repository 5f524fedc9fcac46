"""Exclusive acquire (sections 12.1 to 12.3 of the format): what is checked, won, lost and carried on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from lockfs.paxos.area import NUMBERS_END, Area
from lockfs.paxos.contest import SHAPES_MAX
from lockfs.paxos.errors import EngineError, LockspaceFailed, Refused
from lockfs.paxos.resource import BALLOTS_MAX, ROUNDS_MAX, Hold, Resource
from lockfs.paxos.seams import DiskError
from lockfs.records import sectors
from lockfs.records.geometry import GEOMETRIES, MIB, Geometry
from lockfs.records.results import RecordError, Result
from lockfs.records.sectors import Dblock
from tests.engine.fakes import NAME, NUM_HOSTS, Cancelled, Fate, Host, World, run, two_hosts

FOREVER = 1e9


def proposal(host_id: int, lver: int, *, mbal: int = 0, generation: int = 1) -> Dblock:
    """A dblock in which a host proposes itself."""
    number = mbal or host_id
    return Dblock(number, number, host_id, generation, 50, lver).summed()


# --- what is read, and in which order it is refused


def test_a_free_lease() -> None:
    """Three reads of the hosts' sectors, three writes."""
    world, one, _ = two_hosts()
    resource, before = one.resource(), len(world.io)
    assert (resource.hold, resource.leader) == (Hold.NONE, None)
    run(resource.acquire())
    own, prefix = world.host_offset(1), (2 + NUM_HOSTS) * 512
    found = [(io.op, io.offset, io.length) for io in world.io[before:]]
    assert found == [
        ("read", MIB, prefix), ("write", own, 512), ("read", MIB, prefix), ("write", own, 512),
        ("read", MIB, prefix), ("write", MIB, 512),
    ]  # fmt: skip
    leader = world.leader()
    assert resource.leader == leader
    assert resource.hold is Hold.EXCLUSIVE
    assert not resource.unsettled
    assert (leader.owner_id, leader.owner_generation, leader.lver) == (1, 1, 1)
    assert leader.timestamp == int(world.now)
    assert (leader.write_id, leader.write_generation, leader.write_timestamp) == (1, 1, int(world.now))
    assert (leader.flags, leader.intact) == (0x10, True)


def test_ballot_numbers_name_their_host() -> None:
    """The next one above all others that is this host's modulo max_hosts, whatever version they are of."""
    world, one, two = two_hosts()
    world.change_record(5, Dblock(mbal=6005, lver=0).summed())
    run(one.resource().acquire())
    assert world.record(1).dblock.mbal == 8001
    resource = two.resource()
    world.change_leader(replace(world.leader(), timestamp=0))
    run(resource.acquire())
    assert world.record(2).dblock.mbal == 10002
    assert world.leader().lver == 2


def bad_sector(world: World, change: dict[str, Any]) -> None:
    world.put(MIB, replace(world.leader(), **change).encode())


CHECKS: list[tuple[dict[str, Any], Result]] = [
    ({"magic": 1}, Result.LEADER_MAGIC),
    ({"version": 0x00070004}, Result.LEADER_VERSION),
    ({"space_field": bytes(48)}, Result.LEADER_SPACE_NAME),
    ({"resource_field": bytes(48)}, Result.LEADER_RESOURCE_NAME),
    ({"num_hosts": 0}, Result.LEADER_NUM_HOSTS),
    ({"checksum": 1}, Result.LEADER_CHECKSUM),
]


@pytest.mark.parametrize("first", range(len(CHECKS)))
def test_the_order_of_checks(first: int) -> None:
    """Of several things wrong the first is told; the sector is named, nothing is written."""
    world, one, _ = two_hosts()
    wrong: dict[str, Any] = {}
    for change, _ in CHECKS[first:]:
        wrong |= change
    bad_sector(world, wrong)
    before = len(world.writes())
    with pytest.raises(RecordError, match="sector 0 of /leases at byte 1048576: ") as caught:
        run(one.resource().acquire())
    assert caught.value.result is CHECKS[first][1]
    assert len(world.writes()) == before


@pytest.mark.parametrize(
    ("change", "sentence", "result"),
    [
        ({"magic": sectors.CLEARED_MAGIC}, "removed", Result.LEADER_MAGIC),
        ({"sector_size": 1024}, "1024", Result.LEADER_SECTOR_SIZE),
        ({"flags": 0x20}, "0x20", Result.BAD_GEOMETRY),
        ({"num_hosts": 2001, "max_hosts": 2001}, "2001 of 2001", Result.LEADER_INCONSISTENT),
        ({"num_hosts": 7, "max_hosts": 6}, "7 of 6", Result.LEADER_INCONSISTENT),
        ({"lver": NUMBERS_END}, "cannot be had by counting", Result.LEADER_INCONSISTENT),
        ({"timestamp": 1}, "host id 0 is stated as owner", Result.LEADER_INCONSISTENT),
        ({"timestamp": 1, "owner_id": 7}, "host id 7 is stated as owner", Result.LEADER_INCONSISTENT),
    ],
)
def test_leaders_with_a_right_checksum_that_make_no_sense(
    change: dict[str, Any], sentence: str, result: Result
) -> None:
    """They are refused as well."""
    world, one, _ = two_hosts()
    world.change_leader(replace(world.leader(), **change))
    before = len(world.writes())
    with pytest.raises(RecordError, match=f"sector 0 of /leases at byte 1048576: .*{sentence}") as caught:
        run(one.resource().acquire())
    assert caught.value.result is result
    assert len(world.writes()) == before


@pytest.mark.parametrize("change", [{"checksum": 5}, {"mbal": NUMBERS_END}, {"lver": NUMBERS_END}])
def test_one_damaged_ballot_ends_the_attempt(change: dict[str, int]) -> None:
    """Whosever; it is named. Above the number of hosts it is nothing to us."""
    world, one, _ = two_hosts()
    damaged = replace(Dblock(mbal=4, lver=1).summed(), **change)
    damaged = damaged if "checksum" in change else damaged.summed()
    world.change_record(NUM_HOSTS + 1, damaged)
    resource = one.resource()
    run(resource.acquire())
    run(resource.release())
    world.change_record(4, damaged)
    before = len(world.writes())
    with pytest.raises(RecordError, match="sector 5 of /leases at byte 1048576: ") as caught:
        run(resource.acquire())
    wanted = Result.DBLOCK_CHECKSUM if "checksum" in change else Result.LEADER_INCONSISTENT
    assert caught.value.result is wanted
    assert len(world.writes()) == before


@pytest.mark.parametrize("shape", GEOMETRIES[1:], ids=str)
@pytest.mark.parametrize("hint", [0, 6, 2000])
def test_the_geometry_is_the_leaders(shape: Geometry, hint: int) -> None:
    """Whatever was assumed: here that of a file. Nothing beyond the area is read."""
    world = World(shape=shape).make(num_hosts=9)
    one = Host(world, 1).join()
    area = Area(one.disk, shape.area_size, GEOMETRIES[0], 1)
    resource = Resource(area, one.lockspace, NAME, Random(1), hint)
    world.shape = GEOMETRIES[0]  # let the disk take sectors of 512
    run(resource.acquire())
    world.shape = shape
    assert resource.area.shape == shape
    assert world.record(1).dblock.inp == 1
    assert world.leader().owner_id == 1
    run(resource.release())
    one.crash()


def test_a_lease_for_more_or_fewer_hosts_than_assumed() -> None:
    """It is read anew as far as needed, and from then on at once."""
    world = World().make(num_hosts=100)
    one = Host(world, 70).join()
    resource, before = one.resource(hosts_hint=10), len(world.io)
    run(resource.acquire())
    assert [io.length // 512 for io in world.io[before:] if io.op == "read"] == [12, 102, 102, 102]
    world.make(num_hosts=80)
    resource, before = one.resource(hosts_hint=0), len(world.io)
    run(resource.acquire())
    assert [io.length // 512 for io in world.io[before:] if io.op == "read"] == [2002, 82, 82]


def test_a_lease_that_changes_its_size_at_every_look() -> None:
    """Nobody does that; it ends."""
    world, one, _ = two_hosts()

    def grow() -> None:
        leader = world.leader()
        world.change_leader(replace(leader, num_hosts=leader.num_hosts + 5))
        one.disk.before(grow, "read", MIB)

    grow()
    with pytest.raises(RecordError, match="another size at every look") as caught:
        run(one.resource().acquire())
    assert caught.value.result is Result.LEADER_INCONSISTENT
    assert SHAPES_MAX == 4


def test_without_a_membership() -> None:
    """No I/O at all."""
    world = World().make()
    one = Host(world, 1)
    with pytest.raises(LockspaceFailed):
        run(one.resource().acquire())
    assert not world.io


def test_twice() -> None:
    """By the same program: refused from memory."""
    world, one, _ = two_hosts()
    resource = one.resource()
    run(resource.acquire())
    before = len(world.io)
    with pytest.raises(EngineError, match="lease 'disk-1' is held already") as caught:
        run(resource.acquire(shared=True))
    assert caught.value.result is Result.GENERAL
    assert len(world.io) == before


# --- winning and losing


def between(one: Host, op: str, nth: int, action: Callable[[], object]) -> None:
    """Just before the nth read or write of the lease's first sector, or of the own."""
    offset = MIB if op != "own" else one.world.host_offset(one.host_id)
    one.disk.before(action, "write" if op == "own" else op, offset, nth=nth)


def test_another_host_wins_meanwhile() -> None:
    """Between our first look and our ballot: its version is the later one."""
    world, one, two = two_hosts()
    rival, resource = two.resource(), one.resource()
    between(one, "own", 1, lambda: run(rival.acquire()))
    with pytest.raises(Refused) as caught:
        run(resource.acquire(give_up_at=FOREVER))
    # Its number is the higher one: our ballot is lost, and then its version is committed.
    assert caught.value.result is Result.LOST_VERSION
    assert (caught.value.owner_id, caught.value.owner_generation) == (2, 1)
    assert (rival.hold, resource.hold) == (Hold.EXCLUSIVE, Hold.NONE)
    assert world.leader().owner_id == 2
    run(resource.settle())
    run(rival.release())
    run(resource.acquire())
    assert world.leader().lver == 2


@pytest.mark.parametrize("patience", [0.0, FOREVER])
def test_another_host_is_in_a_higher_ballot(patience: float) -> None:
    """Back off and try with a higher number, or give up: nothing was proposed, but our mark was dropped."""
    world, one, _ = two_hosts()
    resource = one.resource()

    def enter() -> None:
        world.change_record(5, Dblock(mbal=4005, lver=1).summed())

    between(one, "own", 1, enter)
    if not patience:
        with pytest.raises(Refused, match="other hosts contend for the lease") as caught:
            run(resource.acquire())
        assert caught.value.result is Result.DBLOCK_MBAL
        assert resource.unsettled
        run(resource.settle())
        assert world.record(1).dblock.released
        return
    world.at(world.now + 0.001, lambda: world.change_record(5, Dblock()))
    run(resource.acquire(give_up_at=FOREVER))
    assert world.record(1).dblock.mbal == 2001
    assert 0 < one.clock.slept[-1] < 1


def test_a_ballot_lost_in_phase_2_may_still_be_won_by_others() -> None:
    """So it must be settled."""
    world, one, two = two_hosts()
    resource, rival = one.resource(), two.resource()
    between(one, "read", 3, lambda: world.change_record(5, Dblock(mbal=4005, lver=1).summed()))
    with pytest.raises(Refused):
        run(resource.acquire())
    before = resource.unsettled
    run(resource.settle())
    assert (before, resource.unsettled) == (True, False)
    assert world.record(1).dblock.released
    # Another carries our proposal on and commits it; the mark frees the lease for the third try.
    world.change_record(5, Dblock())
    with pytest.raises(Refused) as caught:
        run(rival.acquire())
    assert caught.value.result is Result.COMMITTED_OTHER
    assert (world.leader().owner_id, world.leader().write_id) == (1, 2)
    assert not rival.unsettled
    run(rival.acquire())
    assert (world.leader().owner_id, world.leader().lver) == (2, 2)


def test_committed_by_another_while_still_wanted() -> None:
    """Our ballot was lost in phase 2, another host committed it: the lease is ours."""
    world, one, two = two_hosts()
    resource, rival = one.resource(), two.resource()

    def overtake() -> None:
        with pytest.raises(Refused) as caught:
            run(rival.acquire())
        assert caught.value.result is Result.COMMITTED_OTHER

    between(one, "read", 3, overtake)
    run(resource.acquire(give_up_at=FOREVER))
    leader = world.leader()
    assert (leader.owner_id, leader.write_id, leader.lver) == (1, 2, 1)
    assert (resource.hold, resource.leader) == (Hold.EXCLUSIVE, leader)
    assert not resource.unsettled
    before = len(world.writes())
    run(resource.release())
    assert [io.offset for io in world.writes(0)[before:]] == [world.host_offset(1)]
    run(rival.acquire())
    assert rival.hold is Hold.EXCLUSIVE


def test_committed_by_another_for_another() -> None:
    """Our version went to somebody else while we backed off."""
    world, one, _ = two_hosts()
    resource = one.resource()

    def lose() -> None:
        world.change_record(5, Dblock(mbal=4005, lver=1).summed())
        winner = replace(world.leader(), lver=1, owner_id=5, owner_generation=1, timestamp=7, write_id=5)
        world.at(world.now + 0.001, lambda: world.change_leader(winner))

    between(one, "own", 1, lose)
    with pytest.raises(Refused) as caught:
        run(resource.acquire(give_up_at=FOREVER))
    assert caught.value.result is Result.LOST_VERSION
    assert caught.value.owner_id == 5
    assert not resource.unsettled


def test_the_leader_goes_further_while_we_back_off() -> None:
    """Everything begins anew, with the version after that."""
    world, one, _ = two_hosts()
    resource = one.resource()

    def lose() -> None:
        world.change_record(5, Dblock(mbal=4005, lver=1).summed())
        world.at(world.now + 0.001, lambda: world.change_leader(replace(world.leader(), lver=3, owner_id=5)))

    between(one, "own", 1, lose)
    run(resource.acquire(give_up_at=FOREVER))
    assert world.leader().lver == 4


def test_the_end_of_patience_between_rounds() -> None:
    """When the leader has changed and the time is up, that is told."""
    world, one, _ = two_hosts()
    resource = one.resource()

    def lose() -> None:
        world.change_record(5, Dblock(mbal=4005, lver=1).summed())
        world.at(world.now + 0.001, lambda: world.change_leader(replace(world.leader(), lver=3, owner_id=5)))

    between(one, "own", 1, lose)
    with pytest.raises(Refused, match="other hosts are quicker") as caught:
        run(resource.acquire(give_up_at=world.now + 0.0001))
    assert caught.value.result is Result.LOST_VERSION


def test_ballots_that_never_end() -> None:
    """They do, after BALLOTS_MAX in each of ROUNDS_MAX rounds."""
    world, one, _ = two_hosts()
    resource = one.resource()
    count = 0

    def outbid() -> None:
        nonlocal count
        count += 1
        world.change_record(5, Dblock(mbal=count * 4000 + 5, lver=1).summed())
        one.disk.before(outbid, "write", world.host_offset(1))

    outbid()
    with pytest.raises(Refused, match="other hosts are quicker"):
        run(resource.acquire(give_up_at=FOREVER))
    assert count == BALLOTS_MAX * ROUNDS_MAX + 1


# --- what another host proposed


def test_another_hosts_proposal_is_committed_for_it() -> None:
    """-245; a leader that went on meanwhile is not put back."""
    world, one, _ = two_hosts()
    world.change_record(5, proposal(5, 1))
    resource = one.resource()
    with pytest.raises(Refused, match="another host has just won the lease") as caught:
        run(resource.acquire())
    assert caught.value.result is Result.COMMITTED_OTHER
    assert (caught.value.owner_id, caught.value.owner_generation) == (5, 1)
    leader = world.leader()
    assert (leader.owner_id, leader.owner_generation, leader.timestamp, leader.write_id) == (5, 1, 50, 1)
    assert leader.flags == 0x10
    assert not resource.unsettled


def test_another_hosts_proposal_that_was_committed_meanwhile() -> None:
    """By it, and released, and the lease went on: our commit would put all that back."""
    world, one, _ = two_hosts()
    world.change_record(5, proposal(5, 1))
    further = replace(world.leader(), lver=1, owner_id=5, owner_generation=1, timestamp=0, write_id=5)
    between(one, "read", 4, lambda: world.change_leader(further))
    resource = one.resource()
    run(resource.acquire())
    assert (world.leader().owner_id, world.leader().lver) == (1, 2)


# --- a leader that a late commit has put back by versions


def put_back(world: World, owner: int) -> None:
    """The leader says that `owner` has version 1, written by a third host; the second's sector is in 3."""
    world.change_leader(
        replace(world.leader(), lver=1, owner_id=owner, owner_generation=1, timestamp=5, write_id=3)
    )
    world.change_record(2, proposal(2, 3, mbal=6002))


def test_a_leader_put_back_while_its_owner_lives() -> None:
    """Refused: what other sectors say of later versions is no reason to take it from a host that is alive."""
    world, one, two = two_hosts()
    put_back(world, 2)
    world.advance(1)
    before = len(world.writes())
    with pytest.raises(Refused) as caught:
        run(one.resource().acquire())
    assert caught.value.result is Result.OWNER_ALIVE
    assert len(world.writes()) == before
    two.crash()


def test_a_leader_put_back_whose_owner_has_let_go() -> None:
    """The version decided last is committed again, for its owner; by its mark the next can be taken."""
    world, one, two = two_hosts()
    put_back(world, 2)
    world.change_record(2, replace(world.record(2).dblock, flags=sectors.RELEASED))
    world.advance(1)
    resource = one.resource()
    with pytest.raises(Refused) as caught:
        run(resource.acquire())
    assert caught.value.result is Result.COMMITTED_OTHER
    assert (world.leader().owner_id, world.leader().lver) == (2, 3)
    run(resource.acquire())
    assert (world.leader().owner_id, world.leader().lver) == (1, 4)
    two.crash()


def test_a_later_version_that_is_decided_just_then() -> None:
    """The leader was read before, the sectors after it went on: everything begins anew."""
    world, one, two = two_hosts()
    world.change_record(2, proposal(2, 2, mbal=2002))
    rightful = replace(world.leader(), lver=2, owner_id=2, owner_generation=1, timestamp=5, write_id=2)
    world.advance(1)
    one.disk.before(lambda: world.change_leader(rightful), "read", MIB, nth=2)
    with pytest.raises(Refused) as caught:
        run(one.resource().acquire())
    assert caught.value.result is Result.LOST_VERSION
    assert world.leader() == rightful.summed()
    world.change_leader(replace(rightful, lver=0, timestamp=0))
    one.disk.before(lambda: world.change_leader(rightful), "read", MIB, nth=5)
    with pytest.raises(Refused) as caught:
        run(one.resource().acquire())
    assert caught.value.result is Result.OWNER_ALIVE
    assert world.leader() == rightful.summed()
    two.crash()


# --- what this host left behind


def test_a_former_life_that_another_ballot_carries_on() -> None:
    """The version goes to that former life, which is ours to take over: with the next version."""
    world, one, _ = two_hosts()
    world.change_record(1, proposal(1, 1, generation=0))
    resource = one.resource()
    run(resource.acquire())
    leader = world.leader()
    assert (leader.owner_id, leader.owner_generation, leader.lver) == (1, 1, 2)
    assert not resource.unsettled


def test_an_own_lease_of_a_former_life() -> None:
    """Is taken at once."""
    world, one, _ = two_hosts()
    world.change_leader(replace(world.leader(), owner_id=1, owner_generation=1, timestamp=5, lver=3))
    resource = one.resource()
    run(resource.acquire())
    assert world.leader().lver == 4


def test_a_version_proposed_for_and_let_go_of_is_given_back() -> None:
    """What was let go of once is never held by that: it is won, given back, and the next is taken."""
    world, one, _ = two_hosts()
    world.change_record(1, replace(proposal(1, 1), flags=sectors.RELEASED))
    resource, before = one.resource(), len(world.io)
    run(resource.acquire())
    leaders = [sectors.decode_leader(io.data) for io in world.writes(before) if io.offset == MIB]
    assert [(leader.lver, bool(leader.timestamp)) for leader in leaders] == [(1, True), (1, False), (2, True)]
    assert resource.leader == world.leader()


def test_a_version_let_go_of_that_another_committed() -> None:
    """It is given back by the mark alone."""
    world, one, _ = two_hosts()
    world.change_record(1, replace(proposal(1, 1), flags=sectors.RELEASED))
    committed = replace(world.leader(), lver=1, owner_id=1, owner_generation=1, timestamp=50, write_id=2)
    between(one, "read", 4, lambda: world.change_leader(committed))
    resource = one.resource()
    run(resource.acquire())
    assert (world.leader().owner_id, world.leader().lver, world.leader().write_id) == (1, 2, 1)


def test_the_mark_that_frees_a_lease_is_put_back_when_a_ballot_fails() -> None:
    """Another host committed us after we had let go. Our next ballot writes over the mark, and is cancelled:
    without the mark the lease would count as held by us."""
    world, one, two = two_hosts()
    world.change_record(1, replace(proposal(1, 1), flags=sectors.RELEASED))
    committed = replace(world.leader(), lver=1, owner_id=1, owner_generation=1, timestamp=50, write_id=2)
    world.change_leader(committed)
    resource, rival = one.resource(), two.resource()
    one.disk.fail(Fate.CANCELLED_LANDED, "write", world.host_offset(1))
    with pytest.raises(Cancelled):
        run(resource.acquire())
    assert not world.record(1).dblock.released
    assert resource.unsettled
    run(resource.settle())
    assert world.record(1).dblock.released
    run(rival.acquire())
    assert rival.hold is Hold.EXCLUSIVE


# --- the membership


@pytest.mark.parametrize("writes", range(3))
def test_a_membership_in_doubt_writes_nothing(writes: int) -> None:
    """Each write looks at it first: a host that stood still meanwhile does not go on."""
    world, one, _ = two_hosts()
    resource = one.resource()
    one.disk.before(lambda: world.jump(8), "read", MIB, nth=writes + 1)
    before = len(world.writes())
    with pytest.raises(LockspaceFailed):
        run(resource.acquire())
    assert len(world.writes()) == before + writes
    assert resource.hold is Hold.NONE


def test_a_membership_in_doubt_after_the_commit() -> None:
    """The lease is not held by it."""
    world, one, _ = two_hosts()
    resource = one.resource()
    one.disk.before(lambda: world.jump(8), "write", MIB)
    with pytest.raises(LockspaceFailed):
        run(resource.acquire())
    assert world.leader().owner_id == 1
    assert resource.unsettled
    with pytest.raises(LockspaceFailed):
        run(resource.settle())
    run(one.lockspace.renew())
    run(resource.settle())
    assert world.leader().timestamp == 0


def test_an_io_error() -> None:
    """Before anything is written there is nothing to settle."""
    world, one, _ = two_hosts()
    resource = one.resource()
    for nth in (1, 2):
        one.disk.fail(Fate.REFUSED, "read", MIB, nth=nth)
        with pytest.raises(DiskError):
            run(resource.acquire())
        assert resource.unsettled is (nth == 2)
    assert world.leader().lver == 0


def test_a_cut_attempt_leaves_no_lease_taken_that_a_late_commit_brings_back() -> None:
    """Another host commits our former version over our release: only the mark RELEASED frees it then."""
    world, one, two = two_hosts()
    resource = one.resource()
    run(resource.acquire())
    held = world.leader()
    run(resource.release())
    one.disk.fail(Fate.REFUSED, "read", MIB, nth=2)
    with pytest.raises(DiskError):
        run(resource.acquire())
    world.change_leader(replace(held, write_id=2))
    run(resource.settle())
    run(two.resource().acquire())
    assert world.leader().owner_id == 2


def test_what_stood_there_before_and_stands_there_by_own_doing() -> None:
    """For whoever must tell whether somebody else had the lease in between."""
    world, one, _ = two_hosts()
    before, resource = world.leader(), one.resource()
    run(resource.acquire())
    assert resource.followed == before
    assert resource.last == resource.leader == world.leader()
    run(resource.release())
    assert resource.last == world.leader()
