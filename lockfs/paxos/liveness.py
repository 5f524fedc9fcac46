"""Whether the owner that a leader record names still lives (section 12.2.1 of the format)."""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable

from lockfs.paxos.errors import Refused
from lockfs.paxos.lockspace import Lockspace
from lockfs.records import sectors
from lockfs.records.results import Result
from lockfs.records.sectors import HostRecord, Leader

LOOK_S = 1.0
"""From one look at a silent owner to the next, seconds; the last one is made when it counts as dead."""
LOOK_MIN_S = 0.02


class Verdict(enum.Enum):
    """GONE: the lease can be taken. CHANGED: the leader is another by now, begin anew."""

    GONE = "gone"
    CHANGED = "changed"


class OwnerCheck:
    """One inquiry after the owner of `cur`, from this host's watch and fresh looks at the owner's delta
    lease.
    """

    def __init__(self, lockspace: Lockspace, cur: Leader, give_up_at: float) -> None:
        """A silent owner is waited for until the clock says `give_up_at`."""
        self._lockspace = lockspace
        self._cur = cur
        self._give_up_at = give_up_at
        self._owner_timing = lockspace.timing
        sight = lockspace.watch.sight(cur.owner_id)
        self._start, self._seen, self._fresh = lockspace.clock.now(), 0, False
        if sight is not None:
            self._fresh = lockspace.watch.fresh(sight)
            self._owner_timing = lockspace.timing.of(sight.io_timeout)
            known = (sight.owner_id, sight.generation) == (cur.owner_id, cur.owner_generation)
            if known and sight.last_live and lockspace.watch.last_check:
                self._start, self._seen = sight.last_live, sight.timestamp

    async def verdict(
        self, read_leader: Callable[[], Awaitable[Leader]], read_owner: Callable[[], Awaitable[HostRecord]]
    ) -> Verdict:
        """Find out, waiting for a silent owner's death if need be.

        Raises:
            Refused: OWNER_ALIVE, or OWNER_DYING if it may be dead but that takes longer than we wait.
            RecordError, DiskError, DiskTimeout.
        """
        clock = self._lockspace.clock
        while True:
            looked_at = clock.now()  # a renewal that landed before that is in what we read
            delta = await self._read_delta()
            if self._has_left(delta):
                return Verdict.GONE
            if not self._seen:
                # Seen only now: a renewal may have landed at any moment until here.
                self._start, self._seen = clock.now(), delta.timestamp
            elif delta.timestamp != self._seen or self._fresh:
                return await self._alive(delta, read_owner)
            elif looked_at > self._dead_at:
                return Verdict.GONE
            if clock.now() >= self._give_up_at:
                raise self._refusal(Result.OWNER_DYING, delta)
            await clock.sleep(min(LOOK_S, max(LOOK_MIN_S, self._dead_at - clock.now())))
            if await read_leader() != self._cur:
                return Verdict.CHANGED

    @property
    def _dead_at(self) -> float:
        return self._start + self._owner_timing.dead

    async def _read_delta(self) -> Leader:
        area, sector = self._lockspace.area, sectors.delta_sector(self._cur.owner_id)
        delta = sectors.decode_leader(await area.read(sector))
        area.check(sector, sectors.check_delta, delta, self._lockspace.name)
        self._owner_timing = self._lockspace.timing.of(delta.io_timeout)
        return delta

    def _has_left(self, delta: Leader) -> bool:
        """A host id cannot be joined anew and freed sooner than its former life counts as dead."""
        return (
            delta.timestamp == 0
            or delta.owner_id != self._cur.owner_id
            or delta.owner_generation > self._cur.owner_generation
        )

    async def _alive(self, delta: Leader, read_owner: Callable[[], Awaitable[HostRecord]]) -> Verdict:
        """The owner lives. It still does not own what another host committed for it after it had let go."""
        if self._cur.write_id != self._cur.owner_id and (await read_owner()).dblock.released:
            return Verdict.GONE
        raise self._refusal(Result.OWNER_ALIVE, delta)

    def _refusal(self, result: Result, delta: Leader) -> Refused:
        name = sectors.shown(delta.resource_name)
        if result is Result.OWNER_DYING:
            left = max(0.0, self._dead_at - self._lockspace.clock.now())
            sentence = f"host {name} owns the lease and is silent; it counts as dead in {left:.0f} s"
            return Refused(result, sentence, leader=self._cur, free_at=self._dead_at)
        return Refused(result, f"host {name} owns the lease and is alive", leader=self._cur)


async def sharer_lives(lockspace: Lockspace, host_id: int, generation: int) -> bool:
    """Whether a host that shares a lease in this generation may be alive; never waits, doubt means yes.

    The last pass of the watch may be old. So nobody is declared dead by it alone, without a look that shows
    the host still as silent.

    Raises:
        DiskError, DiskTimeout.
    """
    watch = lockspace.watch
    if watch.may_be_alive(host_id, generation, lockspace.clock.now()):
        return True
    sight = watch.sight(host_id)
    delta = sectors.decode_leader(await lockspace.area.read(sectors.delta_sector(host_id)))
    if delta.magic != sectors.DELTA_MAGIC or delta.space_name != lockspace.name or not delta.intact:
        return True
    if delta.timestamp == 0 or delta.owner_generation > generation:
        return False
    return sight is None or delta.timestamp != sight.timestamp
