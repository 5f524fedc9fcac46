"""One lease as this host sees it: taken, shared, converted, given back, and put in order after a failure.

Sections 12 to 15 of the format. Invariants:

* Nothing is written under a membership that is not good; before a commit counts, that is looked at again.
* This host's sector is always written whole, and what was written last is remembered, for a release needs it.
* A version in which this host ever proposed an owner is never proposed for from scratch: the former proposal
  is carried on, and if it wins, it is given back before anything else (it was let go of in between).
* `unsettled` is set before the first write whose loss of memory could leave the lease stuck, and cleared only
  when the storage is known to be in order.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from random import Random

from lockfs.paxos.area import Area
from lockfs.paxos.ballot import Ballot, BallotLost, Value
from lockfs.paxos.errors import EngineError, Refused
from lockfs.paxos.liveness import OwnerCheck, Verdict, sharer_lives
from lockfs.paxos.lockspace import Lockspace, Standing, stamp
from lockfs.records import sectors
from lockfs.records.results import RecordError, Result
from lockfs.records.sectors import Dblock, HostRecord, Leader, ModeBlock

BACK_OFF_S = 1.0
"""A lost ballot, or a shared attempt that met another, is tried again after a random part of this."""
PEEK_S = 0.1
"""How often one that backs off looks whether it has been decided meanwhile, perhaps in its own favour."""
SHARED_RETRIES_MAX = 8
ROUNDS_MAX = 64
"""How often one acquire may begin anew because the leader changed under it."""
BALLOTS_MAX = 64
SHAPES_MAX = 4
"""How often one reading may find the lease to be of another size than the one before."""


class Hold(enum.Enum):
    """How this host holds the lease."""

    NONE = "none"
    SHARED = "shared"
    EXCLUSIVE = "exclusive"


@dataclass(frozen=True)
class _Survey:
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


class Resource:
    """One lease. One task at a time calls its methods.

    After any method raised, or was cancelled, `settle` is to be called until it succeeds, or the next
    `acquire` does it first; while `unsettled`, other hosts may find the lease busy.
    """

    def __init__(
        self, area: Area, lockspace: Lockspace, name: bytes, random: Random, hosts_hint: int = 0
    ) -> None:
        """`hosts_hint`: for how many hosts the lease probably is (0: all), so that one read suffices.

        `leader` is of the version in hand; `followed` is the one that the version won last came in place of,
        `last` the one that this object knows to have been there last by its own doing.
        """
        self.area = area
        self.name = name
        self.hold = Hold.NONE
        self.unsettled = False
        self.leader: Leader | None = None
        self.followed: Leader | None = None
        self.last: Leader | None = None
        self._lockspace = lockspace
        self._random = random
        self._num_hosts = hosts_hint or area.shape.hosts_max
        self._written = HostRecord()
        self._own_sector = sectors.host_sector(lockspace.host_id)

    # Taking

    async def acquire(self, *, shared: bool = False, give_up_at: float = 0.0) -> None:
        """Take the lease. The wait for an owner that may be dead, and for others to finish, ends at
        `give_up_at`.

        Raises:
            Refused: somebody else holds it, or won it.
            LockspaceFailed, RecordError, DiskError, DiskTimeout.
            EngineError: this host holds it already.
        """
        if self.hold is not Hold.NONE:
            raise EngineError(Result.GENERAL, f"lease {sectors.shown(self.name)} is held already")
        self._lockspace.require()
        await self.settle()
        if shared:
            await self._acquire_shared(give_up_at)
        else:
            await self._acquire_exclusive(give_up_at)

    async def _acquire_exclusive(self, give_up_at: float) -> None:
        mine, sharers = await self._win(sectors.NOT_SHARED, give_up_at, short=False)
        others = await self._living(sharers)
        if others:
            await self._give_back(mine, sectors.NOT_SHARED)
            raise _shared_elsewhere(others)
        self._lockspace.require()
        self.leader, self.hold, self.unsettled = mine, Hold.EXCLUSIVE, False

    async def _acquire_shared(self, give_up_at: float) -> None:
        await self._until_known(give_up_at)
        retries = 0
        while True:
            try:
                mine, _ = await self._win(sectors.NOT_SHARED, give_up_at, short=True)
                break
            except Refused as refusal:
                short = refusal.leader is not None and refusal.leader.flags & sectors.SHORT_HOLD
                if refusal.result not in _SHORT_CONFLICTS or not short:
                    raise
                if retries == SHARED_RETRIES_MAX:
                    raise Refused(Result.SHARED_RETRIES, str(refusal), leader=refusal.leader) from refusal
            retries += 1
            await self._back_off(give_up_at)
        await self._share(mine)
        self.leader, self.hold = mine, Hold.SHARED

    async def _until_known(self, give_up_at: float) -> None:
        """Wait until no host can take this one for absent, and so what it shares for free."""
        clock, known_at = self._lockspace.clock, self._lockspace.known_at
        if clock.now() >= known_at:
            return
        if known_at > give_up_at:
            left = known_at - clock.now()
            sentence = (
                f"hosts with the sanlock daemon may not have seen this host join before {left:.0f} s from now"
            )
            raise Refused(Result.SHARED_RETRIES, sentence, free_at=known_at)
        await clock.sleep(known_at - clock.now())

    async def _share(self, mine: Leader) -> None:
        """Turn a version that is ours into a shared hold."""
        generation = self._lockspace.generation
        await self._inscribe(_released(self._written.dblock), ModeBlock(sectors.SHARED, generation))
        await self._release_leader(mine)
        self._lockspace.require()
        self.unsettled = False

    async def _win(self, mode: ModeBlock, give_up_at: float, *, short: bool) -> tuple[Leader, set[int]]:
        """Become the owner of the next version; returns its leader and who shares the lease."""
        for _ in range(ROUNDS_MAX):
            survey = await self._survey()
            won = None
            verdict, in_hand = await self._takeable(survey.leader, give_up_at)
            if verdict is Verdict.GONE:
                in_hand = in_hand and not survey.is_behind
                won = await self._contend(survey, mode, give_up_at, in_hand=in_hand, short=short)
            if won is None:
                if self._lockspace.clock.now() >= give_up_at > 0:
                    break
                continue
            self.followed, self.last = survey.leader, won[0]
            if not self._stale(survey):
                return won
            await self._give_back(won[0], mode)
        raise Refused(Result.LOST_VERSION, "other hosts are quicker", leader=survey.leader)

    def _stale(self, survey: _Survey) -> bool:
        """Whether the version that was won is one this host had proposed for, and let go of, before."""
        dblock = survey.own.dblock
        return dblock.lver == survey.next and bool(dblock.bal)

    async def _survey(self) -> _Survey:
        """The first reading: leader and ballots. A damaged ballot of any host ends the attempt."""
        leader, prefix = await self._read_prefix()
        own, mbal_max, lver_max = HostRecord(), 0, 0
        size = self.area.shape.sector_size
        for host_id, record in sectors.used_hosts(prefix, size, leader.num_hosts):
            self.area.check(sectors.host_sector(host_id), sectors.check_dblock, record.dblock)
            self.area.check_number(sectors.host_sector(host_id), record.dblock.mbal)
            self.area.check_number(sectors.host_sector(host_id), record.dblock.lver)
            mbal_max = max(mbal_max, record.dblock.mbal)
            lver_max = max(lver_max, record.dblock.lver)
            if host_id == self._lockspace.host_id:
                own = record
        return _Survey(leader, own, mbal_max, lver_max)

    async def _read_prefix(self) -> tuple[Leader, bytes]:
        """The leader and all hosts' sectors, whose size and number the leader itself states."""
        for _ in range(SHAPES_MAX):
            prefix = await self.area.read(sectors.LEADER_SECTOR, sectors.host_sector(self._num_hosts) + 1)
            leader = self._checked(sectors.decode_leader(prefix))
            self.area.check_number(sectors.LEADER_SECTOR, leader.lver)
            self.area.check(sectors.LEADER_SECTOR, _check_owner, leader)
            is_whole = leader.geometry == self.area.shape and leader.num_hosts <= self._num_hosts
            self.area, self._num_hosts = self.area.shaped(leader.geometry), leader.num_hosts
            if is_whole:
                return leader, prefix
        problem = "it states another size at every look"
        raise RecordError(Result.LEADER_INCONSISTENT, problem, self.area.name, sectors.LEADER_SECTOR)

    def _checked(self, leader: Leader) -> Leader:
        lockspace = self._lockspace
        self.area.check(
            sectors.LEADER_SECTOR, sectors.check_paxos, leader, lockspace.name, self.name, lockspace.host_id
        )
        return leader

    async def _read_leader(self) -> Leader:
        return self._checked(sectors.decode_leader(await self.area.read(sectors.LEADER_SECTOR)))

    async def _read_host(self, host_id: int) -> HostRecord:
        return sectors.decode_host(await self.area.read(sectors.host_sector(host_id)))

    async def _takeable(self, cur: Leader, give_up_at: float) -> tuple[Verdict, bool]:
        """Whether the lease can be had; True besides if `cur` may be taken as read just now."""
        mine = cur.owner_id == self._lockspace.host_id
        if cur.timestamp == 0 or (mine and cur.owner_generation <= self._lockspace.generation):
            return Verdict.GONE, True
        check = OwnerCheck(self._lockspace, cur, give_up_at)
        return await check.verdict(self._read_leader, lambda: self._read_host(cur.owner_id)), False

    async def _contend(
        self, survey: _Survey, mode: ModeBlock, give_up_at: float, *, in_hand: bool, short: bool
    ) -> tuple[Leader, set[int]] | None:
        """Run ballots for the version after `survey.leader` until one is decided; None: begin anew.

        The version is never computed from a later reading: another host may have committed us meanwhile.
        An owner who does not wait for this commit may have let go since, and others may be versions ahead: a
        leader that went on is not put back.
        """
        cur, host_id = survey.leader, self._lockspace.host_id
        if cur.timestamp and cur.owner_id == host_id:
            # Where another host committed us, only the mark in our sector frees the lease; a ballot drops it.
            self.unsettled = True
        may_be_over = self._stale(survey) or survey.is_behind
        step = cur.max_hosts
        mbal = host_id if survey.mbal_max == 0 else survey.mbal_max - survey.mbal_max % step + step + host_id
        accepted = survey.own.dblock if survey.own.dblock.lver == survey.next else Dblock()
        for _ in range(BALLOTS_MAX):
            now = cur if in_hand else await self._read_leader()
            in_hand = False
            if now.lver == survey.next:
                return self._committed_by_another(now), await self._sharers()
            if now != cur:
                return None
            try:
                value, sharers = await self._ballot(survey, mbal, mode, accepted)
            except BallotLost:
                accepted = self._written.dblock
                await self._back_off(give_up_at, cur)
                mbal += step
                continue
            if (may_be_over or value.host_id != host_id) and await self._read_leader() != cur:
                return None
            return await self._commit(survey, value, sharers, short=short)
        return None

    async def _ballot(
        self, survey: _Survey, mbal: int, mode: ModeBlock, accepted: Dblock
    ) -> tuple[Value, set[int]]:
        lockspace, num_hosts = self._lockspace, survey.leader.num_hosts
        proposal = Value(lockspace.host_id, lockspace.generation, stamp(lockspace.clock.now()))
        ballot = Ballot(self.area, lockspace.host_id, num_hosts, survey.next, mbal, proposal, mode, accepted)
        return await ballot.run(self)

    def _committed_by_another(self, leader: Leader) -> Leader:
        """The next version was committed by another host: for us, or not."""
        lockspace = self._lockspace
        ours = (leader.owner_id, leader.owner_generation) == (lockspace.host_id, lockspace.generation)
        self.unsettled = ours
        if ours:
            return leader
        raise Refused(Result.LOST_VERSION, "another host has just won the lease", leader=leader)

    async def _sharers(self) -> set[int]:
        """Who shares the lease, read anew: the ballot that decided was not ours to read."""
        prefix = await self.area.read(sectors.LEADER_SECTOR, sectors.host_sector(self._num_hosts) + 1)
        records = sectors.used_hosts(prefix, self.area.shape.sector_size, self._num_hosts)
        return {host_id for host_id, record in records if record.mode.shared}

    async def _commit(
        self, survey: _Survey, value: Value, sharers: set[int], *, short: bool
    ) -> tuple[Leader, set[int]] | None:
        """Write the chosen owner into the leader; None if it is a former life of this host."""
        lockspace, cur = self._lockspace, survey.leader
        ours = value.host_id == lockspace.host_id
        flags = cur.flags
        if ours:
            flags = flags | sectors.SHORT_HOLD if short else flags & ~sectors.SHORT_HOLD
        new = replace(
            cur,
            flags=flags,
            lver=survey.next,
            owner_id=value.host_id,
            owner_generation=value.generation,
            timestamp=value.timestamp,
        )
        new = await self._write_leader(new)
        if not ours:
            self.unsettled = False
            raise Refused(Result.COMMITTED_OTHER, "another host has just won the lease", leader=new)
        return (new, sharers) if value.generation == lockspace.generation else None

    async def _write_leader(self, leader: Leader) -> Leader:
        """Write the leader as this host; returns what was written."""
        lockspace = self._lockspace
        new = replace(
            leader,
            write_id=lockspace.host_id,
            write_generation=lockspace.generation,
            write_timestamp=stamp(lockspace.clock.now()),
        ).summed()
        lockspace.require()
        await self.area.write(sectors.LEADER_SECTOR, sectors.encode_leader(new))
        self.last = new
        return new

    async def inscribe(self, dblock: Dblock, mode: ModeBlock) -> None:
        """Write this host's sector during a ballot (ballot.Pen). From here on all must be settled.

        Also before a proposal: the writing drops the mark RELEASED, which alone may keep the lease free if
        another host's late commit puts back a version that was ours.
        """
        self.unsettled = True
        await self._inscribe(dblock, mode)

    async def _inscribe(self, dblock: Dblock, mode: ModeBlock) -> None:
        record = HostRecord(dblock, mode)
        self._lockspace.require()
        self._written = record
        await self.area.write(self._own_sector, record.encode(self.area.shape.sector_size))

    async def _back_off(self, give_up_at: float, cur: Leader | None = None) -> None:
        """Leave the field to others for a random time, but not longer than until the leader is not `cur`."""
        clock = self._lockspace.clock
        if clock.now() >= give_up_at:
            raise Refused(Result.DBLOCK_MBAL, "other hosts contend for the lease")
        pause = self._random.random() * BACK_OFF_S
        if cur is None:
            await clock.sleep(pause)
            return
        end = clock.now() + pause
        while (left := end - clock.now()) > 0:
            await clock.sleep(min(left, PEEK_S))
            if await self._read_leader() != cur:
                return

    async def _living(self, sharers: set[int]) -> list[tuple[int, int]]:
        """Those of the sharers that may be alive; the sectors of dead ones are cleared (section 14)."""
        alive = []
        for host_id in sorted(sharers - {self._lockspace.host_id}):
            mode = (await self._read_host(host_id)).mode
            if not mode.shared or not mode.generation:
                continue
            if await sharer_lives(self._lockspace, host_id, mode.generation):
                alive.append((host_id, mode.generation))
                continue
            self._lockspace.require()
            await self.area.write(sectors.host_sector(host_id), bytes(self.area.shape.sector_size))
        return alive

    # Giving back

    async def release(self) -> None:
        """Give the lease back. On return other hosts can take it. Under a lost membership nothing is written:
        the lease is void already.

        Raises:
            EngineError: RELEASE_LVER, RELEASE_OWNER: the lease on the storage was no longer ours; we let go.
            RecordError, DiskError, DiskTimeout: not given back wholly; `settle` must succeed.
        """
        hold, mine = self.hold, self.leader
        if hold is Hold.NONE or mine is None:
            return
        in_order = not self.unsettled
        self.hold, self.leader, self.unsettled = Hold.NONE, None, True
        if self._lockspace.standing() in (Standing.DOUBT, Standing.LOST):
            self.unsettled = self._lockspace.standing() is Standing.DOUBT
            return
        if hold is Hold.EXCLUSIVE:
            await self._give_back(mine, sectors.NOT_SHARED)
        elif not in_order:  # a conversion failed: the leader may be ours
            await self.settle()
        else:
            await self._inscribe(_released(self._written.dblock), sectors.NOT_SHARED)
            self.unsettled = False

    async def _give_back(self, mine: Leader, mode: ModeBlock) -> None:
        """Release a version that this host owns (section 13): its sector first, then the leader."""
        await self._inscribe(_released(self._written.dblock), mode)
        await self._release_leader(mine)
        self.unsettled = False

    async def _release_leader(self, mine: Leader) -> None:
        """Free the leader, unless another host wrote it: then our mark RELEASED frees the lease."""
        now = await self._read_leader()
        if now.write_id != self._lockspace.host_id:
            return
        if now.lver != mine.lver:
            self.unsettled = False
            raise EngineError(Result.RELEASE_LVER, f"version {mine.lver} of the lease was superseded")
        if now != mine:
            self.unsettled = False
            raise EngineError(Result.RELEASE_OWNER, "the lease was no longer as this host had taken it")
        await self._write_leader(_freed(now))

    async def convert(self, *, shared: bool, give_up_at: float = 0.0) -> None:
        """Change a hold's mode. If it fails towards EXCLUSIVE the hold stays SHARED; towards SHARED, it is
        SHARED whatever happens, but others may find the lease busy until it is settled.

        Raises:
            Refused: others share the lease, or contend for it.
            LockspaceFailed, RecordError, DiskError, DiskTimeout.
            EngineError: not held, or RELEASE_LVER, RELEASE_OWNER.
        """
        if self.hold is Hold.NONE or self.leader is None:
            raise EngineError(Result.GENERAL, f"lease {sectors.shown(self.name)} is not held")
        if shared and self.hold is Hold.EXCLUSIVE:
            await self._until_known(give_up_at)
            self._lockspace.require()
            self.hold, self.unsettled = Hold.SHARED, True
            await self._share(self.leader)
        elif not shared and self.hold is Hold.SHARED:
            await self.settle()
            await self._strengthen(give_up_at)

    async def _strengthen(self, give_up_at: float) -> None:
        """From SHARED to EXCLUSIVE; the mode block stays in every write, so that a failure keeps the hold."""
        still = ModeBlock(sectors.SHARED, self._lockspace.generation)
        mine, sharers = await self._win(still, give_up_at, short=False)
        others = await self._living(sharers)
        if others:
            await self._stay_shared(mine, still)
            raise _shared_elsewhere(others)
        await self._inscribe(self._written.dblock, sectors.NOT_SHARED)
        self._lockspace.require()
        self.leader, self.hold, self.unsettled = mine, Hold.EXCLUSIVE, False

    async def _stay_shared(self, mine: Leader, still: ModeBlock) -> None:
        if mine.write_id != self._lockspace.host_id:
            # The leader is not ours to free: only the mark in our sector frees it.
            await self._inscribe(_released(self._written.dblock), still)
        await self._release_leader(mine)
        self.unsettled = False

    def forget(self) -> None:
        """The lease itself was removed while this host held it: there is nothing to give back."""
        self.hold, self.leader, self.unsettled = Hold.NONE, None, False

    # After a failure

    def restore(self, hold: Hold, leader: Leader | None, written: HostRecord, *, unsettled: bool) -> None:
        """Go on for a former process of this host: with what it held, and what it wrote last (recall.py)."""
        self.hold, self.leader, self.unsettled = hold, leader, unsettled
        self._written = written

    async def settle(self) -> None:
        """Put in order what a failed or cancelled step left: nothing of it may keep others out (section 15).

        A shared hold stays. Under a lost membership there is nothing to do.

        Raises:
            RecordError, DiskError, DiskTimeout: not yet.
            LockspaceFailed: in doubt; not yet.
        """
        if not self.unsettled:
            return
        if self._lockspace.standing() is Standing.LOST:
            self.unsettled = False
            return
        mode = sectors.NOT_SHARED
        if self.hold is Hold.SHARED:
            mode = ModeBlock(sectors.SHARED, self._lockspace.generation)
        # A leader that we wrote, and that has not landed yet, would undo what others do once we have let go:
        # the reading waits for it.
        await self._read_leader()
        await self._inscribe(_released(self._written.dblock), mode)
        now = await self._read_leader()
        us = (self._lockspace.host_id, self._lockspace.generation)
        is_ours = now.write_id == us[0] and (now.owner_id, now.owner_generation) == us
        if now.timestamp and is_ours:
            self.area.check_size(sectors.LEADER_SECTOR, now)
            await self._write_leader(_freed(now))
        self.unsettled = False


def _check_owner(leader: Leader) -> None:
    if leader.timestamp and not 0 < leader.owner_id <= leader.num_hosts:
        raise RecordError(Result.LEADER_INCONSISTENT, f"host id {leader.owner_id} is stated as owner")


def _released(dblock: Dblock) -> Dblock:
    return replace(dblock, flags=dblock.flags | sectors.RELEASED)


def _freed(leader: Leader) -> Leader:
    return replace(leader, timestamp=0, flags=leader.flags & ~sectors.SHORT_HOLD)


def _shared_elsewhere(others: list[tuple[int, int]]) -> Refused:
    count = f"{len(others)} hosts share" if len(others) > 1 else f"host {others[0][0]} shares"
    return Refused(Result.SHARED_ELSEWHERE, f"{count} the lease", owner=others[0])


_SHORT_CONFLICTS = (Result.OWNER_ALIVE, Result.LOST_VERSION, Result.COMMITTED_OTHER)
