"""Who owns the next version of a lease: the reading, the ballot and the commit, as plans (seams.py).

Section 12 of the format. Invariants:

* Nothing is written under a membership that is not good: that is looked at by the plan itself, just before
  each write.
* This host's sector is always written whole, and what was written last is remembered, for a release needs it.
* A version in which this host ever proposed an owner is never proposed for from scratch: the former proposal
  is carried on, and if it wins, it is given back before anything else (it was let go of in between).
* `unsettled` is set before the first write whose loss of memory could leave the lease stuck, and cleared only
  when the storage is known to be in order.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from lockfs.paxos.area import Area
from lockfs.paxos.ballot import Ballot, BallotLost, Value
from lockfs.paxos.errors import Refused
from lockfs.paxos.lockspace import Lockspace, stamp
from lockfs.paxos.seams import Plan
from lockfs.records import sectors
from lockfs.records.results import RecordError, Result
from lockfs.records.sectors import Dblock, HostRecord, Leader, ModeBlock

SHAPES_MAX = 4
"""How often one reading may find the lease to be of another size than the one before."""


@dataclass(frozen=True)
class Survey:
    """What the first reading of an attempt found: the leader, this host's own sector, the highest mbal, and
    the highest version that any host has entered.
    """

    leader: Leader
    own: HostRecord
    mbal_max: int
    lver_max: int

    @property
    def next(self) -> int:
        """The version to contend for."""
        return max(self.leader.lver + 1, self.lver_max)

    @property
    def is_behind(self) -> bool:
        """Whether a host is in a version later than the leader's next.

        If the leader still is the same afterwards, somebody's late commit has put it back. Whoever entered
        that version found the one before it free to be taken, and its ballot has kept what was decided.
        """
        return self.next > self.leader.lver + 1

    @property
    def is_stale(self) -> bool:
        """Whether the version is one that this host had proposed for, and let go of, before."""
        return self.own.dblock.lver == self.next and bool(self.own.dblock.bal)


@dataclass(frozen=True)
class Bid:
    """What a ballot is to be about: `mode` goes into this host's sector, `short` into the leader.

    `accepted` is what this host proposed for the version before, if anything (ballot.Ballot).
    """

    survey: Survey
    mode: ModeBlock
    short: bool
    mbal: int
    accepted: Dblock


class Outcome(enum.Enum):
    """WON; LOST: somebody showed a higher number, so back off and go again with the bid given; OWNED: not
    tried, for the owner must be asked for its life first; CHANGED: the leader is another by now, begin anew.
    """

    WON = "won"
    LOST = "lost"
    OWNED = "owned"
    CHANGED = "changed"


@dataclass(frozen=True)
class Go:
    """One go at a version. When WON: its leader, and who shares the lease."""

    outcome: Outcome
    bid: Bid
    leader: Leader | None = None
    sharers: frozenset[int] = frozenset()


class Contest:
    """One host's part in the contests for one lease; what it does to the storage are plans for `carry_out`.

    `last` is the leader that this object knows to have been there last by its own doing.
    """

    def __init__(self, area: Area, lockspace: Lockspace, name: bytes, hosts_hint: int) -> None:
        """`hosts_hint`: for how many hosts the lease probably is (0: all), so that one read suffices."""
        self.area = area
        self.name = name
        self.lockspace = lockspace
        self.unsettled = False
        self.written = HostRecord()
        self.last: Leader | None = None
        self._num_hosts = hosts_hint or area.shape.hosts_max
        self._own_sector = sectors.host_sector(lockspace.host_id)

    # A go at the next version

    def begin(self, mode: ModeBlock, *, short: bool) -> Plan[Go]:
        """Look, and take the next version if nobody has to be asked first.

        Raises:
            Refused: another host won it. RecordError, LockspaceFailed.
        """
        survey = yield from self.survey()
        bid = self.bid(survey, mode, short=short)
        if not self._is_free(survey.leader):
            return Go(Outcome.OWNED, bid)
        return (yield from self.go(bid, in_hand=not survey.is_behind))

    def bid(self, survey: Survey, mode: ModeBlock, *, short: bool) -> Bid:
        """The first bid for the version after the surveyed one."""
        host_id, step = self.lockspace.host_id, survey.leader.max_hosts
        mbal = host_id if survey.mbal_max == 0 else survey.mbal_max - survey.mbal_max % step + step + host_id
        own = survey.own.dblock
        return Bid(survey, mode, short, mbal, own if own.lver == survey.next else Dblock())

    def _is_free(self, cur: Leader) -> bool:
        """Whether the lease can be had without asking after its owner."""
        mine = cur.owner_id == self.lockspace.host_id
        return cur.timestamp == 0 or (mine and cur.owner_generation <= self.lockspace.generation)

    def go(self, bid: Bid, *, in_hand: bool) -> Plan[Go]:
        """One ballot for the version after the bid's leader, which was read just now if it is `in_hand`.

        The version is never computed from a later reading: another host may have committed us meanwhile.
        An owner who does not wait for this commit may have let go since, and others may be versions ahead: a
        leader that went on is not put back.

        Raises:
            Refused: another host won it. RecordError, LockspaceFailed.
        """
        survey, cur, host_id = bid.survey, bid.survey.leader, self.lockspace.host_id
        if cur.timestamp and cur.owner_id == host_id:
            # Where another host committed us, only the mark in our sector frees the lease; a ballot drops it.
            self.unsettled = True
        now = cur if in_hand else (yield from self.read_leader())
        if now.lver == survey.next:
            return Go(Outcome.WON, bid, self._committed_by_another(now), (yield from self._sharers()))
        if now != cur:
            return Go(Outcome.CHANGED, bid)
        try:
            value, sharers = yield from self._ballot(bid)
        except BallotLost:
            step = cur.max_hosts
            return Go(Outcome.LOST, replace(bid, mbal=bid.mbal + step, accepted=self.written.dblock))
        may_be_over = survey.is_stale or survey.is_behind or value.host_id != host_id
        if may_be_over and (yield from self.read_leader()) != cur:
            return Go(Outcome.CHANGED, bid)
        new = yield from self._commit(bid, value)
        if value.generation != self.lockspace.generation:
            return Go(Outcome.CHANGED, bid)  # a former life of this host's
        return Go(Outcome.WON, bid, new, frozenset(sharers))

    def keep(self, mine: Leader, mode: ModeBlock) -> Plan[Go]:
        """A go at the version after the one that this host still owns, `mine`, without letting go of it.

        Whoever took this host for dead and is about to take the lease loses that version, or has won it. A
        proposal of our own for it, of which we do not know the end, was never let go of: it counts.

        Raises:
            Refused: another host has had the lease, or won it. RecordError, LockspaceFailed.
        """
        survey = yield from self.survey()
        if survey.is_behind or not self.owns(survey.leader, mine):
            raise Refused(Result.LOST_VERSION, "another host has taken the lease", leader=survey.leader)
        return (yield from self.go(self.bid(survey, mode, short=False), in_hand=True))

    def owns(self, leader: Leader, mine: Leader) -> bool:
        """Whether the lease is still owned as in `mine`: in that version, or a later one won without letting
        go.
        """
        owner = (leader.owner_id, leader.owner_generation)
        same = owner == (self.lockspace.host_id, self.lockspace.generation)
        return bool(leader.timestamp) and same and leader.lver >= mine.lver

    def _ballot(self, bid: Bid) -> Plan[tuple[Value, set[int]]]:
        lockspace, survey = self.lockspace, bid.survey
        proposal = Value(lockspace.host_id, lockspace.generation, stamp(lockspace.clock.now()))
        ballot = Ballot(
            self.area,
            lockspace.host_id,
            survey.leader.num_hosts,
            survey.next,
            bid.mbal,
            proposal,
            bid.mode,
            bid.accepted,
        )
        return (yield from ballot.run(self))

    def _committed_by_another(self, leader: Leader) -> Leader:
        """The next version was committed by another host: for us, or not."""
        lockspace = self.lockspace
        ours = (leader.owner_id, leader.owner_generation) == (lockspace.host_id, lockspace.generation)
        self.unsettled = ours
        if ours:
            return leader
        raise Refused(Result.LOST_VERSION, "another host has just won the lease", leader=leader)

    def _commit(self, bid: Bid, value: Value) -> Plan[Leader]:
        """Write the chosen owner into the leader. Raises Refused if it is another host."""
        cur, ours = bid.survey.leader, value.host_id == self.lockspace.host_id
        flags = cur.flags
        if ours:
            flags = flags | sectors.SHORT_HOLD if bid.short else flags & ~sectors.SHORT_HOLD
        new = yield from self.write_leader(
            cur,
            flags=flags,
            lver=bid.survey.next,
            owner_id=value.host_id,
            owner_generation=value.generation,
            timestamp=value.timestamp,
        )
        if not ours:
            self.unsettled = False
            raise Refused(Result.COMMITTED_OTHER, "another host has just won the lease", leader=new)
        return new

    # Readings

    def survey(self) -> Plan[Survey]:
        """The first reading: leader and ballots. A damaged ballot of any host ends the attempt.

        Raises:
            RecordError.
        """
        leader, prefix = yield from self._read_prefix()
        own, mbal_max, lver_max = HostRecord(), 0, 0
        size = self.area.shape.sector_size
        for host_id, record in sectors.used_hosts(prefix, size, leader.num_hosts):
            self.area.check(sectors.host_sector(host_id), sectors.check_dblock, record.dblock)
            self.area.check_number(sectors.host_sector(host_id), record.dblock.mbal)
            self.area.check_number(sectors.host_sector(host_id), record.dblock.lver)
            mbal_max = max(mbal_max, record.dblock.mbal)
            lver_max = max(lver_max, record.dblock.lver)
            if host_id == self.lockspace.host_id:
                own = record
        return Survey(leader, own, mbal_max, lver_max)

    def look(self) -> Plan[tuple[Leader, HostRecord, frozenset[int]]]:
        """The leader, this host's own sector, and who shares the lease. Nobody else's ballot matters.

        Raises:
            RecordError.
        """
        leader, prefix = yield from self._read_prefix()
        records = dict(sectors.used_hosts(prefix, self.area.shape.sector_size, leader.num_hosts))
        own = records.get(self.lockspace.host_id, HostRecord())
        self.area.check(self._own_sector, sectors.check_dblock, own.dblock)
        return leader, own, frozenset(host_id for host_id, record in records.items() if record.mode.shared)

    def _read_prefix(self) -> Plan[tuple[Leader, memoryview]]:
        """The leader and all hosts' sectors, whose size and number the leader itself states."""
        for _ in range(SHAPES_MAX):
            count = sectors.host_sector(self._num_hosts) + 1
            prefix = yield from self.area.reading(sectors.LEADER_SECTOR, count)
            leader = self._checked(sectors.decode_leader(prefix))
            self.area.check_number(sectors.LEADER_SECTOR, leader.lver)
            self.area.check(sectors.LEADER_SECTOR, _check_owner, leader)
            shape, is_whole = leader.geometry, leader.num_hosts <= self._num_hosts
            self._num_hosts = leader.num_hosts
            if shape != self.area.shape:
                self.area, is_whole = self.area.shaped(shape), False
            if is_whole:
                return leader, prefix
        problem = "it states another size at every look"
        raise RecordError(Result.LEADER_INCONSISTENT, problem, self.area.name, sectors.LEADER_SECTOR)

    def _checked(self, leader: Leader) -> Leader:
        lockspace = self.lockspace
        self.area.check(
            sectors.LEADER_SECTOR, sectors.check_paxos, leader, lockspace.name, self.name, lockspace.host_id
        )
        return leader

    def read_leader(self) -> Plan[Leader]:
        """The leader as it is. Raises RecordError."""
        return self._checked(sectors.decode_leader((yield from self.area.reading(sectors.LEADER_SECTOR))))

    def read_host(self, host_id: int) -> Plan[HostRecord]:
        """One host's sector as it is, unchecked."""
        return sectors.decode_host((yield from self.area.reading(sectors.host_sector(host_id))))

    def _sharers(self) -> Plan[frozenset[int]]:
        """Who shares the lease, read anew: the ballot that decided was not ours to read."""
        count = sectors.host_sector(self._num_hosts) + 1
        prefix = yield from self.area.reading(sectors.LEADER_SECTOR, count)
        records = sectors.used_hosts(prefix, self.area.shape.sector_size, self._num_hosts)
        return frozenset(host_id for host_id, record in records if record.mode.shared)

    # Writes

    def write_leader(self, leader: Leader, **changes: int) -> Plan[Leader]:
        """Write the leader, with these numbers changed, as this host; returns what was written.

        Raises:
            LockspaceFailed.
        """
        lockspace = self.lockspace
        new = replace(
            leader,
            **changes,  # type: ignore[arg-type]
            write_id=lockspace.host_id,
            write_generation=lockspace.generation,
            write_timestamp=stamp(lockspace.clock.now()),
        ).summed()
        lockspace.require()
        yield from self.area.writing(sectors.LEADER_SECTOR, sectors.encode_leader(new))
        self.last = new
        return new

    def free_leader(self, leader: Leader) -> Plan[Leader]:
        """Write the leader without an owner. Raises LockspaceFailed."""
        return self.write_leader(leader, timestamp=0, flags=leader.flags & ~sectors.SHORT_HOLD)

    def inscribe(self, dblock: Dblock, mode: ModeBlock) -> Plan[None]:
        """Write this host's sector during a ballot (ballot.Pen). From here on all must be settled.

        Also before a proposal: the writing drops the mark RELEASED, which alone may keep the lease free if
        another host's late commit puts back a version that was ours.
        """
        self.unsettled = True
        yield from self.write_own(dblock, mode)

    def write_own(self, dblock: Dblock, mode: ModeBlock) -> Plan[None]:
        """Write this host's sector. Raises LockspaceFailed."""
        record = HostRecord(dblock, mode)
        self.lockspace.require()
        self.written = record
        yield from self.area.writing(self._own_sector, record.encode(self.area.shape.sector_size))

    def mark_released(self, mode: ModeBlock) -> Plan[None]:
        """Say in this host's sector that what it won last was let go of. Raises LockspaceFailed."""
        yield from self.write_own(released(self.written.dblock), mode)


def _check_owner(leader: Leader) -> None:
    if leader.timestamp and not 0 < leader.owner_id <= leader.num_hosts:
        raise RecordError(Result.LEADER_INCONSISTENT, f"host id {leader.owner_id} is stated as owner")


def released(dblock: Dblock) -> Dblock:
    """The ballot with the mark that its host has let go of what it won."""
    return replace(dblock, flags=dblock.flags | sectors.RELEASED)
