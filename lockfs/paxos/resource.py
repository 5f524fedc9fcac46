"""One lease as this host sees it: taken, shared, converted, given back, and put in order after a failure.

Sections 12 to 15 of the format; contest.py has what decides who owns a version, and the invariants of the
writing. Here is what waits for others, and what is held. Steps without a wait in between go to the disk as
one plan (seams.py). Invariant: before a commit counts, the membership is looked at again.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from random import Random
from typing import TypeVar

from lockfs.paxos.area import Area
from lockfs.paxos.contest import Contest, Go, Outcome
from lockfs.paxos.errors import EngineError, LockspaceFailed, Refused
from lockfs.paxos.liveness import OwnerCheck, Verdict, sharer_lives
from lockfs.paxos.lockspace import Lockspace, Standing
from lockfs.paxos.seams import Plan
from lockfs.records import sectors
from lockfs.records.results import Result
from lockfs.records.sectors import HostRecord, Leader, ModeBlock

BACK_OFF_S = 1.0
"""A lost ballot, or a shared attempt that met another, is tried again after a random part of this."""
PEEK_S = 0.1
"""How often one that backs off looks whether it has been decided meanwhile, perhaps in its own favour."""
SHARED_RETRIES_MAX = 8
ROUNDS_MAX = 64
"""How often one acquire may begin anew because the leader changed under it."""
BALLOTS_MAX = 64

_T = TypeVar("_T")


class Hold(enum.Enum):
    """How this host holds the lease."""

    NONE = "none"
    SHARED = "shared"
    EXCLUSIVE = "exclusive"


@dataclass(frozen=True)
class Begun:
    """What a former process of this host had begun to take, and had not begun to let go of.

    `won`: the version that it owns already, beside `sharers` that may be dead; None: a ballot may be under
    way, or nothing.
    """

    won: Leader | None
    sharers: frozenset[int] = frozenset()


class Resource:
    """One lease. One task at a time calls its methods.

    After any method raised, or was cancelled, `settle` is to be called until it succeeds, or the next
    `acquire` does it first; while `unsettled`, other hosts may find the lease busy.
    """

    def __init__(
        self, area: Area, lockspace: Lockspace, name: bytes, random: Random, hosts_hint: int = 0
    ) -> None:
        """`hosts_hint`: for how many hosts the lease probably is (0: all), so that one read suffices.

        `leader` is of the version in hand; `followed` is the one that the version won last came in place of.
        """
        self.hold = Hold.NONE
        self.leader: Leader | None = None
        self.followed: Leader | None = None
        self._lockspace = lockspace
        self._random = random
        self._contest = Contest(area, lockspace, name, hosts_hint)
        self._doubted = False
        self._suspicions = 0
        self._begun: Begun | None = None

    @property
    def area(self) -> Area:
        """Where the lease is, with the geometry that it was last seen to state."""
        return self._contest.area

    @property
    def name(self) -> bytes:
        """The lease's."""
        return self._contest.name

    @property
    def unsettled(self) -> bool:
        """Whether `settle` has something to put in order."""
        return self._contest.unsettled

    @property
    def last(self) -> Leader | None:
        """The leader that this object knows to have been there last by its own doing."""
        return self._contest.last

    @property
    def proven(self) -> bool:
        """Whether no suspicion that this host stood still has come since the lease began to be taken, or was
        confirmed. If one has, no I/O may be started under it. Asked from any thread.
        """
        return not self._doubted and self._suspicions == self._lockspace.pace.suspicions

    async def _carry_out(self, plan: Plan[_T]) -> _T:
        return await self.area.disk.carry_out(plan)

    # Taking

    async def acquire(self, *, shared: bool = False, give_up_at: float = 0.0) -> None:
        """Take the lease. The wait for an owner that may be dead, and for others to finish, ends at
        `give_up_at`. For itself, it goes on with what a former process had begun (`restore`).

        Raises:
            Refused: somebody else holds it, or won it.
            LockspaceFailed, RecordError, DiskError, DiskTimeout.
            EngineError: this host holds it already.
        """
        if self.hold is not Hold.NONE:
            raise EngineError(Result.GENERAL, f"lease {sectors.shown(self.name)} is held already")
        self._lockspace.require()
        begun, self._begun = self._begun, None
        if begun is None or begun.won is None or shared:
            # As of now: of what comes while it is being taken, the hold must be cleared afterwards. That a
            # version was won is known from before, so what came since must be cleared as well.
            self._suspicions, self._doubted = self._lockspace.pace.suspicions, False
        if begun is None or shared:
            await self.settle()
        if shared:
            await self._acquire_shared(give_up_at)
        else:
            await self._acquire_exclusive(give_up_at, begun)

    async def _acquire_exclusive(self, give_up_at: float, begun: Begun | None) -> None:
        if begun is not None and begun.won is not None:
            mine, sharers = begun.won, begun.sharers
        else:
            goes_on = begun is not None
            mine, sharers = await self._win(sectors.NOT_SHARED, give_up_at, short=False, goes_on=goes_on)
        others = await self._living(sharers)
        if others:
            await self._carry_out(self._give_back(mine, sectors.NOT_SHARED))
            raise _shared_elsewhere(others)
        self._lockspace.require()
        self.leader, self.hold, self._contest.unsettled = mine, Hold.EXCLUSIVE, False

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
        await self._carry_out(self._to_shared(mine))
        self._lockspace.require()
        self._contest.unsettled = False

    def _to_shared(self, mine: Leader) -> Plan[None]:
        yield from self._contest.mark_released(ModeBlock(sectors.SHARED, self._lockspace.generation))
        yield from self._release_leader(mine)

    async def _win(
        self, mode: ModeBlock, give_up_at: float, *, short: bool, goes_on: bool = False
    ) -> tuple[Leader, frozenset[int]]:
        """Become the owner of the next version; returns its leader and who shares the lease.

        `goes_on`: what this host has proposed for it so far was not let go of.
        """
        for number in range(ROUNDS_MAX):
            go = await self._go(mode, give_up_at, short=short)
            survey = go.bid.survey
            if go.leader is None:
                if self._lockspace.clock.now() >= give_up_at > 0:
                    break
                continue
            self.followed, self._contest.last = survey.leader, go.leader
            if not survey.is_stale or (goes_on and number == 0):
                return go.leader, go.sharers
            await self._carry_out(self._give_back(go.leader, mode))
        raise Refused(Result.LOST_VERSION, "other hosts are quicker", leader=survey.leader)

    async def _go(self, mode: ModeBlock, give_up_at: float, *, short: bool) -> Go:
        """Run ballots for one version until one is decided, or the leader has changed."""
        contest = self._contest
        go = await self._carry_out(contest.begin(mode, short=short))
        cur = go.bid.survey.leader
        if go.outcome is Outcome.OWNED:
            check = OwnerCheck(self._lockspace, cur, give_up_at)
            verdict = await check.verdict(self._read_leader, lambda: self._read_host(cur.owner_id))
            if verdict is Verdict.CHANGED:
                return replace(go, outcome=Outcome.CHANGED)
            go = await self._carry_out(contest.go(go.bid, in_hand=False))
        ballots = 1
        while go.outcome is Outcome.LOST:
            await self._back_off(give_up_at, cur)
            if ballots == BALLOTS_MAX:
                break
            go = await self._carry_out(contest.go(go.bid, in_hand=False))
            ballots += 1
        return go

    async def _read_leader(self) -> Leader:
        return await self._carry_out(self._contest.read_leader())

    async def _read_host(self, host_id: int) -> HostRecord:
        return await self._carry_out(self._contest.read_host(host_id))

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

    async def _living(self, sharers: frozenset[int]) -> list[tuple[int, int]]:
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
        self.hold, self.leader, self._contest.unsettled = Hold.NONE, None, True
        if self._lockspace.standing() in (Standing.DOUBT, Standing.LOST):
            self._contest.unsettled = self._lockspace.standing() is Standing.DOUBT
            return
        if not in_order:  # a conversion failed, or a confirmation: the leader may be ours, in a later version
            await self.settle()
        elif hold is Hold.EXCLUSIVE:
            await self._carry_out(self._give_back(mine, sectors.NOT_SHARED))
        else:
            await self._carry_out(self._contest.mark_released(sectors.NOT_SHARED))
            self._contest.unsettled = False

    def _give_back(self, mine: Leader, mode: ModeBlock) -> Plan[None]:
        """Release a version that this host owns (section 13): its sector first, then the leader."""
        yield from self._contest.mark_released(mode)
        yield from self._release_leader(mine)
        self._contest.unsettled = False

    def _release_leader(self, mine: Leader) -> Plan[None]:
        """Free the leader, unless another host wrote it: then our mark RELEASED frees the lease."""
        now = yield from self._contest.read_leader()
        if now.write_id != self._lockspace.host_id:
            return
        if now.lver != mine.lver:
            self._contest.unsettled = False
            raise EngineError(Result.RELEASE_LVER, f"version {mine.lver} of the lease was superseded")
        if now != mine:
            self._contest.unsettled = False
            raise EngineError(Result.RELEASE_OWNER, "the lease was no longer as this host had taken it")
        yield from self._contest.free_leader(now)

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
        self._require_proven()
        if shared and self.hold is Hold.EXCLUSIVE:
            await self._until_known(give_up_at)
            self._lockspace.require()
            self.hold, self._contest.unsettled = Hold.SHARED, True
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
            await self._carry_out(self._stay_shared(mine, still))
            raise _shared_elsewhere(others)
        written = self._contest.written.dblock
        await self._carry_out(self._contest.write_own(written, sectors.NOT_SHARED))
        self._lockspace.require()
        self.leader, self.hold, self._contest.unsettled = mine, Hold.EXCLUSIVE, False

    def _stay_shared(self, mine: Leader, still: ModeBlock) -> Plan[None]:
        if mine.write_id != self._lockspace.host_id:
            # The leader is not ours to free: only the mark in our sector frees it.
            yield from self._contest.mark_released(still)
        yield from self._release_leader(mine)
        self._contest.unsettled = False

    def forget(self) -> None:
        """The lease itself was removed while this host held it: there is nothing to give back."""
        self.hold, self.leader, self._contest.unsettled = Hold.NONE, None, False

    # After a suspicion that this host stood still (pace.py)

    def _require_proven(self) -> None:
        """To write what says that the lease is held would hide that it is not."""
        if not self.proven:
            problem = f"lease {sectors.shown(self.name)} must be confirmed first: {self._lockspace.pace.why}"
            raise LockspaceFailed(Result.LOCKSPACE_FAILED, problem)

    def doubt(self) -> None:
        """Have this lease confirmed as well."""
        self._doubted = True

    async def is_there(self) -> bool:
        """Whether the storage still has the lease as held here. It says nothing of hosts about to take it.

        Raises:
            RecordError, DiskError, DiskTimeout.
        """
        mine = self.leader
        return self.hold is not Hold.NONE and mine is not None and await self._is_there(mine)

    async def _is_there(self, mine: Leader) -> bool:
        now = await self._read_leader()
        if self._contest.owns(now, mine):
            return True  # also where a conversion to shared has only begun
        if self.hold is Hold.EXCLUSIVE:
            return False
        mode = (await self._read_host(self._lockspace.host_id)).mode
        # A new sharer owns it for a moment. Who wants it for itself owns it before it looks who shares it.
        unowned = not now.timestamp or bool(now.flags & sectors.SHORT_HOLD)
        return unowned and mode.shared and mode.generation == self._lockspace.generation

    async def confirm(self, give_up_at: float = 0.0) -> None:
        """Make certain that the lease held still is, whatever others took this host for; `proven` afterwards.

        What this host owns is renewed as the next version, so that nobody who was about to take it still can.
        Sharers are looked for after the taking, when a renewal of this host can be seen: a look is enough.
        If it fails, what was begun is `unsettled`; the hold stays, unproven.

        Raises:
            Refused: another host has had it; with DBLOCK_MBAL others contend for it, and nothing is known.
            LockspaceFailed: no renewal has landed since the suspicion. EngineError: not held.
            RecordError, DiskError, DiskTimeout.
        """
        pace, mine = self._lockspace.pace, self.leader
        suspicions = pace.suspicions
        self._lockspace.require()
        if not pace.renewed:
            raise LockspaceFailed(Result.LOCKSPACE_FAILED, f"not renewed since a suspicion: {pace.why}")
        if mine is None:
            raise EngineError(Result.GENERAL, f"lease {sectors.shown(self.name)} is not held")
        if self.hold is Hold.EXCLUSIVE or self._contest.owns(await self._read_leader(), mine):
            await self._keep(mine, give_up_at)
        elif not await self._is_there(mine):
            raise Refused(Result.LOST_VERSION, "another host has taken the lease")
        self._suspicions, self._doubted = suspicions, False

    async def _keep(self, mine: Leader, give_up_at: float) -> None:
        """Own the next version without a moment in which anybody else could."""
        mode, exclusive = sectors.NOT_SHARED, self.hold is Hold.EXCLUSIVE
        if not exclusive:
            mode = ModeBlock(sectors.SHARED, self._lockspace.generation)
        while True:
            go = await self._carry_out(self._contest.keep(mine, mode))
            if go.leader is not None:
                break
            await self._back_off(give_up_at, go.bid.survey.leader)
        self._lockspace.require()
        self.leader, self.followed = go.leader, None
        self._contest.unsettled = not exclusive  # others cannot share it before the leader is freed

    # After a failure

    def restore(
        self,
        area: Area,
        hold: Hold,
        leader: Leader | None,
        written: HostRecord,
        *,
        unsettled: bool,
        suspicions: int,
        begun: Begun | None = None,
    ) -> None:
        """Go on for a former process of this host: with what it held, and what it wrote last (recall.py).

        `suspicions`: how many there were before the lease was looked at. What it had `begun` to take can be
        gone on with by the next `acquire`, if that comes before `settle`.
        """
        self.hold, self.leader, self._begun = hold, leader, begun
        self._suspicions, self._doubted = suspicions, False
        self._contest.area, self._contest.written, self._contest.unsettled = area, written, unsettled

    def looking(self) -> Plan[tuple[Leader, HostRecord, frozenset[int]]]:
        """The leader, this host's own sector, and who shares the lease. Raises RecordError."""
        return self._contest.look()

    async def settle(self) -> None:
        """Put in order what a failed or cancelled step left: nothing of it may keep others out (section 15).

        A shared hold stays. Under a lost membership there is nothing to do.

        Raises:
            RecordError, DiskError, DiskTimeout: not yet.
            LockspaceFailed: in doubt, or a shared hold that must be confirmed first; not yet.
        """
        self._begun = None
        if not self.unsettled:
            return
        if self.hold is Hold.SHARED:
            self._require_proven()
        if self._lockspace.standing() is Standing.LOST:
            self._contest.unsettled = False
            return
        await self._carry_out(self._put_in_order())

    def _put_in_order(self) -> Plan[None]:
        mode = sectors.NOT_SHARED
        if self.hold is Hold.SHARED:
            mode = ModeBlock(sectors.SHARED, self._lockspace.generation)
        # A leader that we wrote, and that has not landed yet, would undo what others do once we have let go:
        # the reading waits for it.
        yield from self._contest.read_leader()
        yield from self._contest.mark_released(mode)
        now = yield from self._contest.read_leader()
        us = (self._lockspace.host_id, self._lockspace.generation)
        is_ours = now.write_id == us[0] and (now.owner_id, now.owner_generation) == us
        if now.timestamp and is_ours:
            self.area.check_size(sectors.LEADER_SECTOR, now)
            yield from self._contest.free_leader(now)
        self._contest.unsettled = False


def _shared_elsewhere(others: list[tuple[int, int]]) -> Refused:
    count = f"{len(others)} hosts share" if len(others) > 1 else f"host {others[0][0]} shares"
    return Refused(Result.SHARED_ELSEWHERE, f"{count} the lease", owner=others[0])


_SHORT_CONFLICTS = (Result.OWNER_ALIVE, Result.LOST_VERSION, Result.COMMITTED_OTHER)
