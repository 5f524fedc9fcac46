"""This host's membership of a lockspace: the delta lease that stands for its life (section 10 of the format).

The promise that a holder must keep: with `renewed_at` the clock's reading before the last renewal that
landed, no I/O under any lease of the lockspace starts after `renewed_at` + 8 io_timeout, and none can reach
the storage at `renewed_at` + 8 io_timeout + watchdog. `standing` says where in that time the host is.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from lockfs.paxos.area import Area
from lockfs.paxos.errors import EngineError, IdInUse, LockspaceFailed
from lockfs.paxos.kept import Kept
from lockfs.paxos.pace import Pace
from lockfs.paxos.seams import Clock, WallClock
from lockfs.paxos.timing import Timing
from lockfs.paxos.watch import HostState, Watch
from lockfs.records import sectors
from lockfs.records.results import RecordError, Result
from lockfs.records.sectors import Leader

CONFLICT_LOOK_S = 2.0
"""How often a joiner that waits for a silent host looks whether it is silent."""
_HOST_EVENT_NONE = (0, 0, 0)


class Standing(enum.Enum):
    """GOOD; LATE: renewals fail, no harm yet; DOUBT: nothing may be written until a renewal lands in time;
    LOST: for good, the host must leave and join again."""

    GOOD = "good"
    LATE = "late"
    DOUBT = "doubt"
    LOST = "lost"


@dataclass(frozen=True)
class Host:
    """One host of the lockspace, for reports. `silent_s` is how long it has not been seen to change,
    seconds.
    """

    host_id: int
    name: str
    generation: int
    state: HostState
    io_timeout: int
    silent_s: float


class Lockspace:
    """One host's membership, from `join` to `leave`. `renew` is to be called when `renewal_due` says so.

    One task at a time calls join, renew and leave. `host_name` must be unique to this start of the program:
    the protocol takes over a live id from a host of the same name (pitfall 1).
    """

    def __init__(
        self,
        area: Area,
        name: bytes,
        host_id: int,
        host_name: bytes,
        *,
        clock: Clock,
        timing: Timing,
        looks_first: Callable[[bytes], bool] | None = None,
        walls: Sequence[WallClock] = (),
    ) -> None:
        """`looks_first` tells of a host's name whether it looks at the storage before it counts a sharer as
        dead, as lockfs does; the sanlock daemon goes by its last pass. None: all hosts do. `walls`: see Pace.
        """
        self.area = area
        self.name = name
        self.host_id = host_id
        self.host_name = host_name
        self.clock = clock
        self.timing = timing
        self.watch = Watch(name, host_id, timing, area.shape)
        self.pace = Pace(timing, clock, walls)
        self.renewed_at = 0.0
        self.event = _HOST_EVENT_NONE
        self._sector = sectors.delta_sector(host_id)
        self._last: Leader | None = None
        self._joined = False
        self._looks_first = looks_first
        self._entered_at = 0.0
        self._landed = False
        self._overlaps_until = 0.0
        self._sure = True
        self._lost = ""
        self._called: dict[int, float] = {}
        self._former: Kept | None = None
        self._former_until = 0

    # Where this host stands

    @property
    def joined(self) -> bool:
        """Whether the id is this host's; also while it is LOST, until `leave`."""
        return self._joined

    @property
    def generation(self) -> int:
        """The generation this host joined with, 0 before."""
        last = self._last  # looked at once: a plan may ask in its thread
        return last.owner_generation if last is not None and self._joined else 0

    def standing(self) -> Standing:
        """Where the host stands now. LOST is latched."""
        if self._lost or not self._joined:
            return Standing.LOST
        age = self.clock.now() - self.renewed_at
        if age >= self.timing.fails:
            if age >= self.comeback:
                self._lose(f"no renewal for {age:.0f} s")
                return Standing.LOST
            return Standing.DOUBT
        return Standing.LATE if age >= self.timing.late else Standing.GOOD

    def in_time(self) -> bool:
        """Whether an I/O may be started now, as far as this host's clocks tell; asked from any thread.

        A lease must have been confirmed since the last suspicion besides (Resource.proven).
        """
        return not self._lost and self.pace.is_kept() and self.clock.now() < self.write_until

    @property
    def why_lost(self) -> str:
        """What ended the membership, empty while it lasts."""
        return self._lost

    @property
    def comeback(self) -> float:
        """The age up to which a late renewal still counts."""
        longest = self.watch.longest_io()
        if self._former is not None and not self.watch.first_check:
            longest = max(longest, self._former.longest_io)
        return max(float(self.timing.fails), self.timing.comeback(longest))

    @property
    def write_until(self) -> float:
        """The clock time from which on nothing may be written under a lease of this lockspace."""
        return self.renewed_at + self.timing.fails

    @property
    def taken_from(self) -> float:
        """The clock time from which on other hosts may take this host's leases."""
        return self.renewed_at + self.timing.dead

    @property
    def renewal_due(self) -> float:
        """The clock time of the next renewal: after a suspicion, when it can be told from the last."""
        if self._last is not None and not self.pace.renewed:
            return float(self._last.timestamp + 1)
        return self.renewed_at + self.timing.renew_every

    @property
    def strangers(self) -> list[int]:
        """The io_timeouts of hosts that have joined and do not look first, as far as they have been seen."""
        if self._looks_first is None:
            return []
        if self._former is not None and not self.watch.first_check:
            return list(self._former.strangers)
        return [
            sight.io_timeout or self.timing.io_timeout
            for host_id, sight in self.watch.hosts().items()
            if host_id != self.host_id and sight.timestamp and not self._looks_first(sight.name)
        ]

    @property
    def known_at(self) -> float:
        """The clock time by which every host that acts must have seen this one join: before that, one that
        does not look first takes it for absent, and a lease that it shares for free.

        A host that has made no pass for 8 of its io_timeouts takes nothing.
        """
        slow = self.strangers
        if self._looks_first is not None and not self.watch.first_check and self._former is None:
            slow = [self.timing.io_timeout]
        return self._entered_at + self.timing.of(max(slow)).fails if slow else 0.0

    def abandon(self, reason: str) -> None:
        """Count the membership as LOST from now on, for a reason that the sectors do not show."""
        self._lose(reason)

    def require(self) -> None:
        """Refuse to act under a membership that is not good.

        Raises:
            LockspaceFailed: in doubt, lost, or never joined.
        """
        if self.standing() in (Standing.DOUBT, Standing.LOST):
            raise self._failure()

    def _failure(self) -> LockspaceFailed:
        reason = self._lost or ("its lease is not renewed" if self._joined else "it is not joined")
        return LockspaceFailed(
            Result.LOCKSPACE_FAILED, f"lockspace {sectors.shown(self.name)} cannot be used now: {reason}"
        )

    def _lose(self, reason: str) -> None:
        self._lost = self._lost or reason

    # Joining

    async def join(self) -> None:
        """Take the host id; returns when it is certainly ours, at the earliest after 2 io_timeout.

        An id whose last owner did not leave is waited for, 8 io_timeout + watchdog.

        Raises:
            IdInUse: the owner is alive, or another host was quicker.
            EngineError: HOST_ID_TOO_LARGE, or GENERAL: the storage was too slow for us to be sure.
            RecordError, DiskError, DiskTimeout.
        """
        most = self.area.shape.hosts_max
        if not 0 < self.host_id <= most:
            problem = f"host id {self.host_id} is not within 1 and {most}, as many as {self.area.name} has"
            raise EngineError(Result.HOST_ID_TOO_LARGE, problem)
        written_at = await self._enter()
        if self.clock.now() - written_at >= self.comeback:
            # The delay that the sector asked for was longer than a membership lasts: once more, with our own.
            written_at = await self._enter()
        self.renewed_at = self._entered_at = written_at
        self._joined = True

    async def _enter(self) -> float:
        """Write our record and see it stay as long as another joiner may take; returns when it was written.

        What makes that enough: whoever else read the id as free, or as dead, before our record landed, writes
        within 2 io_timeout of its reading, or does not join. So does this host.
        """
        looked_at = self.clock.now()
        found = await self._read_own()
        before = self.timing.of(found.io_timeout)
        if found.timestamp and found.resource_name != self.host_name:
            looked_at = await self._outwait(found, before)
        written_at = self.clock.now()
        mine = replace(
            found,
            timestamp=stamp(written_at),
            io_timeout=self.timing.io_timeout,
            owner_id=self.host_id,
            owner_generation=found.owner_generation + 1,
            resource_field=sectors.name_field(self.host_name, found.resource_field),
        ).summed()
        self._overlaps_until = looked_at + before.renewal
        # Before it as well: a record from an old look would put back the generation of one who joined since.
        self._check_pace()
        self._last, self._landed = mine, False
        await self.area.write(self._sector, sectors.encode_delta(mine))
        self._check_pace()
        self._landed = True
        await self.clock.sleep(before.renewal)
        again = await self._read_own()
        if again != mine:
            self._last = None
            raise IdInUse(self.host_id, again)
        return written_at

    def _check_pace(self) -> None:
        if self.clock.now() >= self._overlaps_until:
            self._last = None
            raise EngineError(Result.GENERAL, f"the storage is too slow to join with host id {self.host_id}")

    async def _outwait(self, found: Leader, before: Timing) -> float:
        """Wait until the owner of `found` counts as dead, or has left; returns when the last look began."""
        end = self.clock.now() + before.dead
        while True:
            await self.clock.sleep(min(CONFLICT_LOOK_S, max(0.0, end - self.clock.now())))
            looked_at = self.clock.now()
            again = await self._read_own()
            left = again.timestamp == 0 and again.owner_generation == found.owner_generation
            if not left and again != found:
                raise IdInUse(self.host_id, again)
            if left or looked_at >= end:
                return looked_at

    async def _read_own(self) -> Leader:
        leader = sectors.decode_leader(await self.area.read(self._sector))
        self._check(leader)
        return leader

    def _check(self, leader: Leader) -> None:
        self.area.check(self._sector, sectors.check_delta, leader, self.name)
        self.area.check_size(self._sector, leader)
        self.area.check_number(self._sector, leader.owner_generation)

    # Going on for a former process

    def kept(self) -> Kept:
        """What a later process must know to go on with this membership.

        Raises:
            LockspaceFailed: there is none.
        """
        last = self._last
        if last is None or not self._joined or self._lost:
            raise self._failure()
        return Kept(
            host_id=self.host_id,
            host_name=self.host_name,
            generation=last.owner_generation,
            io_timeout=self.timing.io_timeout,
            timestamp=stamp(self.renewed_at),
            renewed_at=self.renewed_at,
            entered_at=self._entered_at,
            longest_io=self.watch.longest_io(),
            strangers=tuple(self.strangers),
        )

    async def go_on(self, kept: Kept) -> None:
        """Be the member that a former process was, in place of `join`. Nothing is written: the next `renew`
        does that, and is due.

        What the former process wrote last may be a renewal of which it did not learn that it landed; that one
        counts for nothing. On storage that lets go of a killed process before its write has ended, it may
        even land later: it is then known for what it is.

        Raises:
            LockspaceFailed: it is too late, or the id is not as the former process left it; LOST from now on.
            RecordError; DiskError, DiskTimeout: not known, may be tried again.
        """
        self._former, self.renewed_at, self._entered_at = kept, kept.renewed_at, kept.entered_at
        seen = await self._read_own()
        now = self.clock.now()
        self._former_until = stamp(now)
        if kept.io_timeout != self.timing.io_timeout:
            self._lose(f"io_timeout was {kept.io_timeout} s")
        elif not kept.matches(seen, self._former_until):
            self._lose(f"host id {self.host_id} is not as a former process of this host has left it")
        elif not 0.0 <= now - kept.renewed_at < self.comeback:
            self._lose(f"no renewal for {now - kept.renewed_at:.0f} s")
        if self._lost:
            raise self._failure()
        self._last, self._joined, self._landed = seen, True, True

    def _is_formers(self, seen: Leader) -> bool:
        """Whether a record of ours is a late one of the former process."""
        return self._former is not None and self._former.matches(seen, self._former_until)

    # Renewing

    async def renew(self, *, looked: bool = False) -> None:
        """Renew once, and take a pass at watching the others, unless `look` has just done so: two passes one
        right after the other would show everybody as silent.

        Raises:
            LockspaceFailed: the lease was overwritten, or is LOST; the host must stop at once.
            DiskError, DiskTimeout: not renewed; try again, not sooner than half a second later.
        """
        if not looked:
            await self.look()
        last = self._last
        if last is None or self.standing() is Standing.LOST:
            raise self._failure()
        paced = self.pace.renewing()
        now = self.clock.now()
        renewed = replace(
            last,
            timestamp=stamp(now),
            write_id=self.event[0],
            write_generation=self.event[1],
            write_timestamp=self.event[2],
        ).summed()
        self._sure = False
        is_seen = renewed.timestamp != last.timestamp  # whole seconds: others see nothing else
        try:
            await self.area.write(
                self._sector, sectors.encode_delta(renewed, self._bitmap(now)), self.timing.dead
            )
        finally:
            # Landed or not, what is there now is the old record or this one.
            self._last = renewed
        self._sure = True
        if is_seen:
            self.pace.landed(paced, self.clock.now() - self.renewed_at)
        self._settle_renewal(now)

    async def look(self) -> None:
        """Take a pass at watching the others without renewing.

        Raises:
            LockspaceFailed: it was overwritten, or the membership is LOST; the host must stop at once.
            DiskError, DiskTimeout: nothing was seen.
        """
        last = self._last
        if last is None or not self._joined:
            raise LockspaceFailed(Result.LOCKSPACE_NOT_JOINED, "the lockspace is not joined")
        try:
            self._check_ours(await self._pass(), last)
            if self.standing() is Standing.LOST:
                raise self._failure()
        except (RecordError, LockspaceFailed) as error:
            self._lose(str(error))
            raise

    def _settle_renewal(self, written_at: float) -> None:
        """Count a renewal that landed, unless it landed too late to be sure that nobody gave us up."""
        age = self.clock.now() - self.renewed_at
        if not self._lost and age < self.comeback:
            self.renewed_at = written_at
        else:
            self._lose(f"a renewal came only after {age:.0f} s")

    async def _pass(self) -> Leader:
        began = self.clock.now()
        whole = await self.area.read(0, self.area.shape.area_size // self.area.shape.sector_size)
        now = self.clock.now()
        changed = self.watch.observe(whole, now)
        self.pace.observe(began, now, (sight for sight in changed if sight[0] != self.host_id))
        at = self._sector * self.area.shape.sector_size
        return sectors.decode_leader(whole[at : at + self.area.shape.sector_size])

    def _check_ours(self, seen: Leader, last: Leader) -> None:
        self._check(seen)
        if (seen.owner_id, seen.owner_generation) != (last.owner_id, last.owner_generation) or (
            seen.resource_field != last.resource_field
        ):
            raise LockspaceFailed(
                Result.RENEWAL_OWNER,
                f"host id {self.host_id} was taken by host {sectors.shown(seen.resource_name)}",
            )
        if self._sure and seen != last and not self._is_formers(seen):
            raise LockspaceFailed(Result.RENEWAL_CHANGED, f"the lease of host id {self.host_id} was changed")

    # Leaving

    async def leave(self) -> None:
        """Give the host id back. Every lease of the lockspace must have been released, or all I/O have ended.

        After a join that was cut short the id is given back only if it is still as we wrote it; after a
        membership in DOUBT or LOST it is not, and others will wait for it as for a dead host's.

        Raises:
            DiskError, DiskTimeout: not given back; others will wait for it as for a dead host's.
        """
        last, joined = self._last, self._joined
        if last is None or (joined and self.standing() in (Standing.DOUBT, Standing.LOST)):
            # Others may have given us up by the time the write lands: the sector would be somebody else's.
            self._forget()
            return
        if not joined and not await self._still_joining(last):
            self._forget()
            return
        self._joined = False
        await self.area.write(self._sector, sectors.encode_delta(replace(last, timestamp=0).summed()))
        self._forget()

    async def _still_joining(self, last: Leader) -> bool:
        """Whether a join that was cut short left its record, and nobody can have waited it out.

        A record that landed too late may lie over that of a host that has joined, of the same generation: to
        free that would give away what the other holds.
        """
        is_there = await self._read_own() == last
        now = self.clock.now()
        in_time = now - last.timestamp < self.timing.fails
        return is_there and in_time and (self._landed or now < self._overlaps_until)

    def _forget(self) -> None:
        self._joined = False
        self._last = None
        self._lose("this host has left")

    # Calling others

    def call(self, host_id: int) -> None:
        """Tell a host, in the renewals of the next 6 io_timeout, to look at the requests."""
        self._called[host_id] = self.clock.now() + self.timing.late

    def _bitmap(self, now: float) -> bytes:
        self._called = {host_id: until for host_id, until in self._called.items() if until > now}
        return sectors.bitmap_with(frozenset(self._called))

    # Reports

    def hosts(self) -> Iterator[Host]:
        """Every host that has ever joined, in order of ids, as last seen."""
        now = self.clock.now()
        for host_id, sight in sorted(self.watch.hosts().items()):
            if sight.owner_id == 0 and sight.timestamp == 0:
                continue
            yield Host(
                host_id,
                sight.name.decode("utf-8", "backslashreplace"),
                sight.generation,
                self.watch.state(host_id, now),
                sight.io_timeout,
                now - self.watch.silent_since(sight),
            )


def stamp(now: float) -> int:
    """A clock reading as it is written on the storage: whole seconds, never 0, which means free."""
    return max(1, int(now))


async def find_lockspace(area: Area, name: bytes | None = None) -> tuple[Area, Leader]:
    """The area with the geometry that the lockspace there states, and its first record.

    Raises:
        RecordError: no lockspace is there, or one of another name or of an unknown format.
        DiskError, DiskTimeout.
    """
    first = sectors.decode_leader(await area.probe())
    with area.naming(0):
        sectors.check_delta(first, first.space_name if name is None else name)
        return area.shaped(first.geometry), first


async def survey(area: Area) -> dict[int, Leader]:
    """The delta leases of all hosts, unchecked, by host id, in one read."""
    shape = area.shape
    whole = await area.read(0, shape.area_size // shape.sector_size)
    return {
        host_id: sectors.decode_leader(whole[at : at + shape.sector_size])
        for host_id in range(1, shape.hosts_max + 1)
        for at in (sectors.delta_sector(host_id) * shape.sector_size,)
    }


def free_ids(leases: dict[int, Leader], name: bytes, most: int) -> list[int]:
    """Host ids up to `most` that can be joined without waiting for anybody."""
    return [
        host_id
        for host_id, leader in leases.items()
        if host_id <= most and leader.timestamp == 0 and leader.magic == sectors.DELTA_MAGIC
        and leader.space_name == name
    ]  # fmt: skip
