"""One ballot of Disk Paxos for one version of one lease (section 12.4 of the format).

A host enters with a ballot number that is its own for ever (mbal mod max_hosts names it), writes it, reads
all; then writes the value it must propose, reads all again. If nobody showed a higher number in either
reading, the value is chosen: nobody can ever choose another for this version.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from lockfs.paxos.area import Area
from lockfs.paxos.seams import Plan
from lockfs.records import sectors
from lockfs.records.sectors import Dblock, HostRecord, ModeBlock


class BallotLost(Exception):
    """Somebody showed a higher ballot number or version. Internal: never leaves the engine."""


@dataclass(frozen=True)
class Value:
    """Who is to own the version: host, generation, and the second of its clock that goes into the leader."""

    host_id: int
    generation: int
    timestamp: int


class Pen(Protocol):
    """Writes this host's sector of the resource, and remembers what stands there."""

    def inscribe(self, dblock: Dblock, mode: ModeBlock) -> Plan[None]:
        """Write both records; raises LockspaceFailed."""


@dataclass(frozen=True)
class Ballot:
    """What a ballot is about. `accepted` is the value, with its ballot, that this host proposed for this very
    version before, in a ballot of which it does not know the end: it must not be forgotten."""

    area: Area
    host_id: int
    num_hosts: int
    lver: int
    mbal: int
    proposal: Value
    mode: ModeBlock
    accepted: Dblock

    def run(self, pen: Pen) -> Plan[tuple[Value, set[int]]]:
        """Both phases: the chosen value, and the hosts whose mode blocks say SHARED.

        Raises:
            BallotLost: nothing is decided by this ballot. Its value may still be, by another host.
            LockspaceFailed: as BallotLost; and so if an I/O fails.
        """
        kept = self.accepted
        entered = Dblock(self.mbal, kept.bal, kept.inp, kept.inp2, kept.inp3, self.lver)
        yield from pen.inscribe(entered.summed(), self.mode)
        others = yield from self._read()
        self._compare(others)
        value = self._choose(others)
        proposed = Dblock(self.mbal, self.mbal, value.host_id, value.generation, value.timestamp, self.lver)
        yield from pen.inscribe(proposed.summed(), self.mode)
        self._compare((yield from self._read()))
        return value, {host_id for host_id, record in others.items() if record.mode.shared}

    def _read(self) -> Plan[dict[int, HostRecord]]:
        """Every host's sector that is not empty."""
        prefix = yield from self.area.reading(sectors.LEADER_SECTOR, sectors.host_sector(self.num_hosts) + 1)
        size = self.area.shape.sector_size
        return dict(sectors.used_hosts(prefix, size, self.num_hosts))

    def _compare(self, records: dict[int, HostRecord]) -> None:
        for dblock in _intact(records):
            if dblock.lver > self.lver or (dblock.lver == self.lver and dblock.mbal > self.mbal):
                raise BallotLost

    def _choose(self, records: dict[int, HostRecord]) -> Value:
        """The value of the highest ballot in which any was proposed, or our own."""
        candidates = [
            dblock for dblock in _intact(records) if dblock.lver == self.lver and dblock.inp and dblock.bal
        ]
        if not candidates:
            return self.proposal
        newest = max(candidates, key=lambda dblock: dblock.bal)
        return Value(newest.inp, newest.inp2, newest.inp3)


def _intact(records: dict[int, HostRecord]) -> list[Dblock]:
    """The ballots; a damaged one takes no part, though its host may still share the lease."""
    return [record.dblock for record in records.values() if record.dblock.intact]
