"""One ballot (section 12.4 of the format): both phases, candidates, and how it is lost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lockfs.paxos.area import Area
from lockfs.paxos.ballot import Ballot, BallotLost, Value
from lockfs.paxos.seams import Plan
from lockfs.records import sectors
from lockfs.records.geometry import FILE_GEOMETRY, MIB
from lockfs.records.sectors import Dblock, HostRecord, ModeBlock
from tests.engine.fakes import NUM_HOSTS, HostDisk, World, run

ME, LVER, MBAL = 2, 5, 4002
PROPOSAL = Value(ME, 7, 99)


class Paper:
    """A pen that writes at once; `after` is called after the write of that number."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.written: list[HostRecord] = []
        self.meanwhile: dict[int, HostRecord] = {}

    def inscribe(self, dblock: Dblock, mode: ModeBlock) -> Plan[None]:
        """See Pen."""
        yield from ()
        self.written.append(HostRecord(dblock, mode))
        self.world.change_record(ME, dblock, mode)
        if (other := self.meanwhile.get(len(self.written))) is not None:
            self.world.change_record(3, other.dblock, other.mode)


class Table:
    """A lease, this host's ballot on it, and what the others show."""

    def __init__(self, accepted: Dblock | None = None, mode: ModeBlock = sectors.NOT_SHARED) -> None:
        self.world = World().make()
        self.pen = Paper(self.world)
        area = Area(HostDisk(self.world, ME), MIB, FILE_GEOMETRY, 1)
        self.ballot = Ballot(area, ME, NUM_HOSTS, LVER, MBAL, PROPOSAL, mode, accepted or Dblock())

    def show(self, host_id: int, mode: ModeBlock = sectors.NOT_SHARED, **fields: int) -> Table:
        """What another host has in its sector."""
        self.world.change_record(host_id, Dblock(**fields).summed(), mode)
        return self

    def run(self) -> tuple[Value, set[int]]:
        """The ballot."""
        return run(self.ballot.area.disk.carry_out(self.ballot.run(self.pen)))

    def lost(self, writes: int) -> None:
        """It is lost, after so many writes."""
        with pytest.raises(BallotLost):
            self.run()
        assert len(self.pen.written) == writes


def test_alone() -> None:
    """Write, read all, write the own proposal, read all."""
    table = Table()
    assert table.run() == (PROPOSAL, set())
    entered, proposed = table.pen.written
    assert entered == HostRecord(Dblock(mbal=MBAL, lver=LVER).summed())
    assert proposed == HostRecord(Dblock(MBAL, MBAL, ME, 7, 99, LVER).summed())
    assert [(io.op, io.length) for io in table.world.io] == [("read", (2 + NUM_HOSTS) * 512)] * 2


@pytest.mark.parametrize(
    "other",
    [
        {"mbal": 4001, "bal": 4001, "inp": 1, "lver": LVER - 1},
        {"mbal": 9001, "lver": LVER - 1},
        {"mbal": 4001, "lver": LVER},
        {"mbal": 4001, "bal": 2001, "lver": LVER},
        {"mbal": 4001, "inp": 1, "lver": LVER},
    ],
    ids=["old proposal", "old version", "lower", "no value", "no ballot"],
)
def test_what_does_not_count(other: dict[str, Any]) -> None:
    """Older versions whatever their numbers, lower ballots, and what is no proposal."""
    assert Table().show(1, **other).run()[0] == PROPOSAL


@pytest.mark.parametrize("other", [{"mbal": 1, "lver": LVER + 1}, {"mbal": MBAL + 1, "lver": LVER}])
def test_lost_in_either_phase(other: dict[str, Any]) -> None:
    """To a later version, or to a higher number."""
    Table().show(3, **other).lost(writes=1)
    table = Table()
    table.pen.meanwhile[1] = HostRecord(Dblock(**other).summed())
    table.lost(writes=1)
    table = Table()
    table.pen.meanwhile[2] = HostRecord(Dblock(**other).summed())
    table.lost(writes=2)


def test_a_proposal_of_others_must_be_carried_on() -> None:
    """Of several, the one of the highest ballot, not of the highest number entered."""
    table = Table()
    table.show(1, mbal=4001, bal=2001, inp=1, inp2=3, inp3=50, lver=LVER)
    table.show(4, mbal=2004, bal=2004, inp=4, inp2=6, inp3=51, lver=LVER)
    table.show(5, mbal=3005, bal=1005, inp=5, inp2=6, inp3=52, lver=LVER)
    assert table.run()[0] == Value(4, 6, 51)
    assert table.pen.written[1].dblock == Dblock(MBAL, MBAL, 4, 6, 51, LVER).summed()


def test_the_own_former_proposal_must_be_carried_on() -> None:
    """It stays visible in phase 1 already: sanlock forgets it there, and may so lose what was chosen."""
    accepted = Dblock(2002, 2002, ME, 6, 44, LVER, flags=sectors.RELEASED).summed()
    table = Table(accepted)
    assert table.run()[0] == Value(ME, 6, 44)
    assert table.pen.written[0].dblock == Dblock(MBAL, 2002, ME, 6, 44, LVER).summed()
    assert table.pen.written[1].dblock == Dblock(MBAL, MBAL, ME, 6, 44, LVER).summed()
    table = Table(accepted).show(1, mbal=2003, bal=2003, inp=1, inp2=1, inp3=45, lver=LVER)
    assert table.run()[0] == Value(1, 1, 45)


@pytest.mark.parametrize("fields", [{"mbal": 9001, "lver": LVER + 1}, {"bal": 4001, "inp": 1, "lver": LVER}])
def test_a_damaged_ballot_takes_no_part(fields: dict[str, int]) -> None:
    """But its host may still share the lease."""
    table = Table()
    damaged = replace(Dblock(**fields).summed(), checksum=1)
    table.world.change_record(1, damaged, ModeBlock(sectors.SHARED, 3))
    assert table.run() == (PROPOSAL, {1})


def test_who_shares_is_seen_in_phase_1() -> None:
    """Whatever the version of the ballot beside it; the own mode block is written as asked for."""
    mode = ModeBlock(sectors.SHARED, 7)
    table = Table(mode=mode)
    table.show(1, mode, lver=1).show(3, mode).show(4, ModeBlock(2, 7), mbal=1)
    table.pen.meanwhile[2] = HostRecord()
    assert table.run() == (PROPOSAL, {1, ME, 3})
    assert [record.mode for record in table.pen.written] == [mode, mode]


def test_hosts_beyond_the_number_of_the_lease() -> None:
    """Their sectors are another matter."""
    assert Table().show(NUM_HOSTS + 1, mbal=9000, lver=9).run()[0] == PROPOSAL
    Table().show(NUM_HOSTS, mbal=9000, lver=9).lost(writes=1)
