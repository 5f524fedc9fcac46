"""A storage in memory, a time that only tests move, and hosts that run the real engine on them.

Fault model. Everything happens at one moment after the other: an I/O takes no time and shows or changes the
sectors as they are at its call, unless a rule says otherwise; while a host sleeps, or waits for an I/O to
time out, whatever was put on the calendar (`World.at`) happens. A rule (`HostDisk.fail`) names the n-th I/O
of one host, of all or of one kind at one place, and its fate: REFUSED (EIO, nothing changed), REFUSED_LANDED
(EIO, and yet it landed), LOST (timed out, never lands), LATE (timed out, lands `after` seconds after that),
CANCELLED (the caller is cancelled before the I/O is issued), CANCELLED_LANDED (just after it landed),
CANCELLED_LATE (lands `after` seconds later). As the contract of `Disk` says, an I/O waits for this host's
late writes that it overlaps. `HostDisk.before` has something happen just before such an I/O: the steps of
another host, in between. Storage that invents, duplicates or tears sectors is not modelled; `World.put` is
for that.
"""

from __future__ import annotations

import enum
import errno
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, TypeVar

from lockfs.paxos.area import Area
from lockfs.paxos.lockspace import Lockspace
from lockfs.paxos.resource import Resource
from lockfs.paxos.seams import Clock, Disk, DiskError, DiskTimeout, WallClock
from lockfs.paxos.timing import Timing
from lockfs.records import sectors
from lockfs.records.geometry import FILE_GEOMETRY, MIB, Geometry
from lockfs.records.sectors import Dblock, HostRecord, Leader, ModeBlock

SPACE = b"images"
NAME = b"disk-1"
NUM_HOSTS = 6
LEASE = MIB
"""Where the lease's area begins; the lockspace is at 0."""
START_S = 1000.0
FAST = Timing(1)

_T = TypeVar("_T")


class Cancelled(BaseException):
    """What a cancelled await raises."""


def run(call: Coroutine[Any, Any, _T]) -> _T:
    """The result of an engine's call, which never waits for anything but these fakes."""
    try:
        call.send(None)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]
    raise AssertionError("the engine awaits something besides its disk and its clock")


class Fate(enum.Enum):
    """What becomes of an I/O."""

    REFUSED = "refused"
    REFUSED_LANDED = "refused, landed"
    LOST = "lost"
    LATE = "late"
    CANCELLED = "cancelled"
    CANCELLED_LANDED = "cancelled, landed"
    CANCELLED_LATE = "cancelled, late"


@dataclass(frozen=True)
class IO:
    """An I/O that was asked for; `data` of a write."""

    host: int
    op: str
    offset: int
    length: int
    data: bytes = b""

    @property
    def sector(self) -> int:
        """Counted over the whole storage."""
        return self.offset // 512


@dataclass
class _Rule:
    op: str
    offset: int | None
    left: int
    fate: Fate | None = None
    after: float = 0.0
    action: Callable[[], object] = lambda: None
    slow: float = 0.0


@dataclass(eq=False)
class _Pending:
    offset: int
    data: bytes
    land_at: float
    landed: bool = False


class World:
    """The storage and the time, both seen by everybody."""

    def __init__(self, areas: int = 2, shape: Geometry = FILE_GEOMETRY, *, first_hosts: int = 0) -> None:
        """`first_hosts`: so many hosts the passes over the lockspace look at, 0 for all; it saves time."""
        self.shape = self.lockspace_shape = shape
        if first_hosts:
            size = first_hosts * shape.sector_size
            self.lockspace_shape = replace(shape, area_size=size, hosts_max=first_hosts)
        self.now = START_S
        self.data = bytearray(areas * shape.area_size)
        self.io: list[IO] = []
        self.hosts: list[Host] = []
        self._calendar: list[tuple[float, int, Callable[[], object]]] = []
        self._entries = 0

    # The storage

    def put(self, offset: int, data: bytes) -> None:
        """Have these bytes there."""
        self.data[offset : offset + len(data)] = data

    def sector(self, offset: int) -> bytes:
        """The first 512 bytes of one."""
        return bytes(self.data[offset : offset + 512])

    def make(self, *, num_hosts: int = NUM_HOSTS, io_timeout: int = 1) -> World:
        """Initialise a lockspace and a lease."""
        self.put(0, sectors.new_lockspace(self.shape, SPACE, io_timeout))
        leader = sectors.new_leader(self.shape, SPACE, NAME, num_hosts)
        self.put(self.shape.area_size, sectors.new_resource(leader))
        return self

    def leader(self) -> Leader:
        """The lease's."""
        return sectors.decode_leader(self.sector(self.shape.area_size))

    def change_leader(self, leader: Leader) -> None:
        """Have another, with a right checksum."""
        self.put(self.shape.area_size, leader.summed().encode())

    def record(self, host_id: int) -> HostRecord:
        """A host's sector in the lease."""
        return sectors.decode_host(self.sector(self.host_offset(host_id)))

    def host_offset(self, host_id: int) -> int:
        """Where that is."""
        return self.shape.area_size + sectors.host_sector(host_id) * self.shape.sector_size

    def change_record(self, host_id: int, dblock: Dblock, mode: ModeBlock = sectors.NOT_SHARED) -> None:
        """Have another."""
        self.put(self.host_offset(host_id), HostRecord(dblock, mode).encode(self.shape.sector_size))

    def delta(self, host_id: int) -> Leader:
        """A host's delta lease."""
        return sectors.decode_leader(self.sector(self.delta_offset(host_id)))

    def delta_offset(self, host_id: int) -> int:
        """Where that is."""
        return sectors.delta_sector(host_id) * self.shape.sector_size

    def change_delta(self, host_id: int, leader: Leader, bitmap: bytes = b"") -> None:
        """Have another."""
        self.put(self.delta_offset(host_id), sectors.encode_delta(leader.summed(), bitmap))

    def writes(self, since: int = 0) -> list[IO]:
        """The writes among the I/Os from number `since` on."""
        return [io for io in self.io[since:] if io.op == "write"]

    # Time

    def at(self, when: float, action: Callable[[], object]) -> None:
        """Have something happen at that time, or now if that is past."""
        self._entries += 1
        self._calendar.append((when, self._entries, action))
        self._calendar.sort(key=lambda entry: entry[:2])

    def advance(self, seconds: float) -> None:
        """Let time pass, with what is due meanwhile."""
        end = self.now + seconds
        while self._calendar and self._calendar[0][0] <= end:
            when, _, action = self._calendar.pop(0)
            self.now = max(self.now, when)
            action()
        self.now = max(self.now, end)

    def jump(self, seconds: float) -> None:
        """Let time pass with nothing happening: a machine that sleeps."""
        self.now += seconds


class HostDisk(Disk):
    """One host's path to the storage."""

    def __init__(self, world: World, host: int) -> None:
        self._world = world
        self._host = host
        self._rules: list[_Rule] = []
        self._pending: list[_Pending] = []
        self._slow = 0.0

    @property
    def name(self) -> str:
        """For sentences."""
        return "/leases"

    def fail(
        self, fate: Fate, op: str = "", offset: int | None = None, *, nth: int = 1, after: float = 0.0
    ) -> None:
        """The n-th I/O from now on, of this kind and at this offset if given, meets this fate."""
        self._rules.append(_Rule(op, offset, nth, fate, after))

    def before(
        self, action: Callable[[], object], op: str = "", offset: int | None = None, *, nth: int = 1
    ) -> None:
        """`action` happens just before the n-th such I/O."""
        self._rules.append(_Rule(op, offset, nth, None, 0.0, action))

    def slow(self, seconds: float, op: str = "", offset: int | None = None, *, nth: int = 1) -> None:
        """The n-th such I/O does what it does at its call, and returns so much later."""
        self._rules.append(_Rule(op, offset, nth, slow=seconds))

    def no_more_faults(self) -> None:
        """Forget rules that have not come true."""
        self._rules.clear()

    async def read(self, offset: int, length: int, timeout: float) -> bytes:
        """See Disk.read."""
        fate, _ = self._begin(IO(self._host, "read", offset, length), timeout)
        data = bytes(self._world.data[offset : offset + length])
        self._end(fate, timeout)
        if offset < 0 or len(data) != length:
            raise DiskError(errno.EMSGSIZE, f"only {len(data)} bytes at {offset}")
        return data

    async def write(self, offset: int, data: bytes, timeout: float) -> None:
        """See Disk.write."""
        fate, after = self._begin(IO(self._host, "write", offset, len(data), data), timeout)
        if fate in (None, Fate.REFUSED_LANDED, Fate.CANCELLED_LANDED):
            self._world.put(offset, data)
        elif fate in (Fate.LATE, Fate.CANCELLED_LATE):
            wait = timeout if fate is Fate.LATE else 0.0
            self._land_later(_Pending(offset, data, self._world.now + wait + after))
        self._end(fate, timeout)

    def _begin(self, io: IO, timeout: float) -> tuple[Fate | None, float]:
        assert timeout > 0
        assert not io.length % self._world.shape.sector_size
        fate, after = None, 0.0
        for rule in list(self._rules):
            if rule.op in ("", io.op) and rule.offset in (None, io.offset):
                rule.left -= 1
                if not rule.left:
                    self._rules.remove(rule)
                    rule.action()
                    fate, after, self._slow = rule.fate or fate, rule.after, rule.slow
        self._wait_for_late_ones(io, timeout)
        self._world.io.append(io)
        return fate, after

    def _wait_for_late_ones(self, io: IO, timeout: float) -> None:
        end = self._world.now + timeout
        for write in list(self._pending):
            if write.offset < io.offset + io.length and io.offset < write.offset + len(write.data):
                self._world.advance(max(0.0, min(end, write.land_at) - self._world.now))
                if not write.landed:
                    raise DiskTimeout(errno.ETIMEDOUT, "an earlier write is still under way")

    def _land_later(self, write: _Pending) -> None:
        def land() -> None:
            self._world.put(write.offset, write.data)
            write.landed = True
            self._pending.remove(write)

        self._pending.append(write)
        self._world.at(write.land_at, land)

    def _end(self, fate: Fate | None, timeout: float) -> None:
        if self._slow:
            slow, self._slow = self._slow, 0.0
            self._world.advance(slow)
        if fate in (Fate.REFUSED, Fate.REFUSED_LANDED):
            raise DiskError(errno.EIO, "refused")
        if fate in (Fate.LOST, Fate.LATE):
            self._world.advance(timeout)
            raise DiskTimeout(errno.ETIMEDOUT, "timed out")
        if fate is not None:
            raise Cancelled


class RealTime(WallClock):
    """A real-time clock: the world's time, `ahead` of it by what it was set, and up to `late` behind."""

    def __init__(self, world: World, late: float = 0.0) -> None:
        self._world = world
        self.ahead = 1e9
        self.late = late

    def now(self) -> float:
        """The time, in steps of `late`."""
        now = self._world.now + self.ahead
        return now - now % self.late if self.late else now


class HostClock(Clock):
    """One host's clock: the world's time, but for what it was stopped. `cancel_at`: the so manieth sleep from
    now on is cancelled.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._behind = 0.0
        self._stopped_at: float | None = None
        self.cancel_at = 0
        self.slept: list[float] = []

    def now(self) -> float:
        """The time."""
        now = self._world.now if self._stopped_at is None else self._stopped_at
        return now - self._behind

    def stop(self) -> None:
        """Stand still."""
        self._stopped_at = self._world.now

    def go(self) -> None:
        """Go on from there."""
        if self._stopped_at is not None:
            self._behind += self._world.now - self._stopped_at
            self._stopped_at = None

    async def sleep(self, seconds: float) -> None:
        """Let it pass."""
        assert seconds >= 0
        self.slept.append(seconds)
        if self.cancel_at:
            self.cancel_at -= 1
            if not self.cancel_at:
                raise Cancelled
        self._world.advance(seconds)


@dataclass
class Host:
    """One host: its engine, and its renewals on the calendar from `join` on until `crash`."""

    world: World
    host_id: int
    timing: Timing = FAST
    name: bytes = b""
    renewing: bool = field(init=False, default=False)
    walls: Sequence[WallClock] = ()

    def __post_init__(self) -> None:
        self.disk = HostDisk(self.world, self.host_id)
        self.clock = HostClock(self.world)
        self.name = self.name or b"host%d" % self.host_id
        area = Area(self.disk, 0, self.world.lockspace_shape, self.timing.io_timeout)
        self.lockspace = Lockspace(
            area, SPACE, self.host_id, self.name, clock=self.clock, timing=self.timing, walls=self.walls
        )
        self._halted = False
        self.world.hosts.append(self)

    def join(self) -> Host:
        """Be in the lockspace, renew at once and from then on."""
        run(self.lockspace.join())
        self.renewing = True
        self._renew()
        return self

    def _renew(self) -> None:
        if self.renewing and not self._halted:
            run(self.lockspace.renew())
            due_in = self.lockspace.renewal_due - self.clock.now()
            self.world.at(self.world.now + due_in, self._renew)

    def halt(self) -> None:
        """Stand still, with the clock."""
        self.clock.stop()
        self._halted = True

    def thaw(self) -> None:
        """Go on; the next renewal comes when it is due by the clock that stood still."""
        self.clock.go()
        self._halted = False
        due_in = max(0.0, self.lockspace.renewal_due - self.clock.now())
        self.world.at(self.world.now + due_in, self._renew)

    def crash(self) -> None:
        """Do nothing any more."""
        self.renewing = False

    def resource(self, hosts_hint: int = NUM_HOSTS) -> Resource:
        """The lease, as this host sees it."""
        area = Area(self.disk, self.world.shape.area_size, self.world.shape, self.timing.io_timeout)
        return Resource(area, self.lockspace, NAME, Random(self.host_id), hosts_hint)


def two_hosts() -> tuple[World, Host, Host]:
    """A world with two hosts in it that have seen each other renew."""
    world = World(first_hosts=8).make()
    one, two = Host(world, 1).join(), Host(world, 2).join()
    world.advance(4 * FAST.renewal)
    return world, one, two
