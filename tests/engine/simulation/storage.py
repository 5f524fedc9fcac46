"""The disk all hosts share, and each program's path to it; faults.py says what may happen to an I/O."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from lockfs.paxos.seams import Disk, DiskError, DiskTimeout
from lockfs.records import sectors
from lockfs.records.geometry import MIB, Geometry
from tests.engine.simulation.faults import Faults
from tests.engine.simulation.machine import Machine
from tests.engine.simulation.scheduler import Scheduler, Wait

SECTOR = 512
HOST_IDS = 6
LOCKSPACE_SHAPE = Geometry(SECTOR, SECTOR * (HOST_IDS + 2), HOST_IDS, 0x10)
"""As 512/1 MiB, but cut short: nobody reads or writes what is left out."""
LANDS_ALTHOUGH_FAILED = 0.3
LANDS_LATE = 0.6
DELAYED_BY_CRASH = 0.5
FREEZES_AT_A_WRITE = 0.05
_ZERO = bytes(SECTOR)


def lease_offset(lease: int) -> int:
    """Where the area of a lease starts; the lockspace is at 0."""
    return (1 + lease) * MIB


def _described(sector: int, data: bytes) -> str:
    """What a write says, for people."""
    place = sector % (MIB // SECTOR)
    if sector >= MIB // SECTOR and place > sectors.REQUEST_SECTOR:
        record = sectors.decode_host(data)
        dblock, mode = record.dblock, record.mode
        return (
            f"dblock of {place - 1}: mbal {dblock.mbal} bal {dblock.bal} inp {dblock.inp}.{dblock.inp2} lver "
            f"{dblock.lver}{' released' * dblock.released}{' shared' * mode.shared} {mode.generation}"
        )
    leader = sectors.decode_leader(data)
    return (
        f"owner {leader.owner_id}.{leader.owner_generation} lver {leader.lver} time {leader.timestamp} flags "
        f"{leader.flags:#x} written by {leader.write_id}.{leader.write_generation}"
    )


@dataclass
class Outage:
    """A time of trouble for one host or all (None), for one area or all (None)."""

    until: float
    host: int | None
    area: int | None
    hangs: bool
    probability: float


@dataclass
class _Fate:
    """What becomes of a write: when it lands (None: never), when it is over, when the caller hears what."""

    land_at: float | None
    end_at: float
    done_at: float
    error: DiskError | None = None


@dataclass(eq=False)
class _Write:
    sector: int
    data: bytes
    called: float
    deadline: float
    wait: Wait
    next_ones: list[Wait] = field(default_factory=list)
    over: bool = False
    delayed: bool = False


class Storage:
    """The sectors, the troubles, and the fates of I/Os. `on_beyond` hears of writes beyond the bound."""

    def __init__(self, scheduler: Scheduler, faults: Faults) -> None:
        self.scheduler = scheduler
        self.faults = faults
        self.sectors: dict[int, bytes] = {}
        self.outages: list[Outage] = []
        self.calm = False
        self.ordered = True
        self.on_beyond: Callable[[str], None] = lambda what: None

    def load(self, offset: int, data: bytes) -> None:
        """Put an area there before the start."""
        for at in range(0, len(data), SECTOR):
            if data[at : at + SECTOR] != _ZERO:
                self.sectors[(offset + at) // SECTOR] = data[at : at + SECTOR]

    def trouble(self, host: int, offset: int) -> str:
        """What befalls an I/O issued now: '', 'hang' or 'error'."""
        if self.calm:
            return ""
        random, now = self.scheduler.random, self.scheduler.now
        draw = random.random()
        if draw < self.faults.late:
            return "hang"
        if draw > 1.0 - self.faults.error:
            return "error"
        for outage in self.outages:
            concerned = outage.host in (None, host) and outage.area in (None, offset // MIB)
            if now < outage.until and concerned and random.random() < outage.probability:
                return "hang" if outage.hangs else "error"
        return ""

    def latency(self, io_timeout: int) -> float:
        """How long an I/O that meets no trouble takes."""
        random = self.scheduler.random
        if not self.calm and random.random() < self.faults.slow:
            return random.uniform(0.0, 1.2 * io_timeout)
        return random.expovariate(1.0 / self.faults.latency)

    def fate(self, trouble: str, called: float, deadline: float, io_timeout: int) -> _Fate:
        """Draw a write's fate."""
        random, now = self.scheduler.random, self.scheduler.now
        latest = called + self.faults.bound
        if trouble == "hang":
            end = random.uniform(now, max(now, latest))
            return _Fate(end if random.random() < LANDS_LATE else None, end, deadline)
        end = now + self.latency(io_timeout)
        land = min(random.uniform(now, end), latest)
        if trouble == "error":
            lands = land if random.random() < LANDS_ALTHOUGH_FAILED else None
            return _Fate(lands, end, end, DiskError(errno.EIO, "the simulated disk refuses a write"))
        return _Fate(land, land, end)


class ProgramDisk(Disk):
    """One program's path to the storage."""

    def __init__(self, storage: Storage, machine: Machine) -> None:
        self._storage = storage
        self._machine = machine
        self._scheduler = storage.scheduler
        self._under_way: dict[int, deque[_Write]] = {}
        self.dead = False

    @property
    def name(self) -> str:
        return "disk"

    async def read(self, offset: int, length: int, timeout: float) -> bytes:
        scheduler, machine = self._scheduler, self._machine
        first, count, deadline = offset // SECTOR, length // SECTOR, scheduler.now + timeout
        await self._turn(first, count, deadline)
        trouble = self._storage.trouble(machine.number, offset)
        wait = Wait()
        end = scheduler.now + self._storage.latency(machine.io_timeout)
        if trouble == "error":
            scheduler.at(end, wait.finish, None, DiskError(errno.EIO, "the simulated disk refuses a read"))
        elif trouble == "hang" or end > deadline:
            scheduler.at(deadline, wait.finish, None, DiskTimeout(errno.ETIMEDOUT, "a read timed out"))
        else:
            self._sample(first, count, end, wait)
        data: bytes = await wait
        return data

    def _sample(self, first: int, count: int, end: float, wait: Wait) -> None:
        """Have each part of the read show the state of a moment until `end`."""
        scheduler, random = self._scheduler, self._scheduler.random
        found: list[bytes] = [b""] * count
        cuts = [0, count]
        if count > 1 and random.random() < self._storage.faults.torn:
            cuts = sorted({0, count, *(random.randrange(count) for _ in range(2))})

        def look(start: int, stop: int) -> None:
            sectors = self._storage.sectors
            found[start:stop] = [sectors.get(first + index, _ZERO) for index in range(start, stop)]

        for start, stop in pairwise(cuts):
            scheduler.at(random.uniform(scheduler.now, end), look, start, stop)
        scheduler.at(end, lambda: wait.finish(b"".join(found)))

    async def _turn(self, first: int, count: int, deadline: float) -> None:
        """Wait for this program's earlier writes of these sectors to be over."""
        while self._storage.ordered:
            before = [
                write
                for sector in range(first, first + count)
                if sector in self._under_way
                for write in self._under_way[sector]
            ]
            if not before:
                return
            wait = Wait()
            before[-1].next_ones.append(wait)
            error = DiskTimeout(errno.ETIMEDOUT, "an earlier write does not end")
            self._scheduler.at(deadline, wait.finish, None, error)
            await wait

    async def write(self, offset: int, data: bytes, timeout: float) -> None:
        if len(data) != SECTOR:
            raise ValueError("the engine writes single sectors")
        now = self._scheduler.now
        write = _Write(offset // SECTOR, data, now, now + timeout, Wait())
        queue = self._under_way.setdefault(write.sector, deque())
        queue.append(write)
        if len(queue) == 1 or not self._storage.ordered:
            self._begin(write)
        else:
            error = DiskTimeout(errno.ETIMEDOUT, "a write could not begin")
            self._scheduler.at(write.deadline, write.wait.finish, None, error)
        await write.wait

    def _begin(self, write: _Write) -> None:
        if write.wait.ended:
            self._end(write)  # timed out, or cancelled, before it could begin
            return
        scheduler, storage = self._scheduler, self._storage
        trouble = storage.trouble(self._machine.number, write.sector * SECTOR)
        fate = storage.fate(trouble, write.called, write.deadline, self._machine.io_timeout)
        if fate.land_at is not None:
            scheduler.at(fate.land_at, self._land, write)
        else:
            scheduler.at(fate.end_at, self._end, write)
        late = DiskTimeout(errno.ETIMEDOUT, "a write timed out")
        error = fate.error
        if fate.done_at >= write.deadline:
            fate.done_at, error = write.deadline, late
        scheduler.at(fate.done_at, self._done, write, error)

    def _done(self, write: _Write, error: DiskError | None) -> None:
        if error is None and not write.over:
            # Held up with a frozen host.
            later = max(self._scheduler.now, self._machine.paused_until) + 0.001
            self._scheduler.at(later, self._done, write, None)
        else:
            write.wait.finish(None, error)

    def _land(self, write: _Write) -> None:
        machine, scheduler = self._machine, self._scheduler
        if machine.frozen and machine.paused and not self.dead:
            scheduler.at(machine.paused_until + scheduler.random.uniform(0.0, 0.01), self._land, write)
            return
        latest = write.called + self._storage.faults.bound
        if self.dead and not write.delayed and scheduler.random.random() < DELAYED_BY_CRASH:
            write.delayed = True
            scheduler.at(scheduler.random.uniform(scheduler.now, latest), self._land, write)
            return
        if scheduler.now > latest + 1e-6:
            if self.dead:
                self._end(write)
                return
            self._storage.on_beyond(f"host {machine.number} sector {write.sector}")
        self._storage.sectors[write.sector] = write.data
        scheduler.note(f"host {machine.number} wrote sector {write.sector}")
        scheduler.explain(lambda: _described(write.sector, write.data))
        self._end(write)

    def _end(self, write: _Write) -> None:
        write.over = True
        queue = self._under_way[write.sector]
        queue.remove(write)
        for wait in write.next_ones:
            wait.finish()
        if not queue:
            del self._under_way[write.sector]
        elif self._storage.ordered:
            self._begin(queue[0])

    async def write_image(self, called: float, landed: Callable[[], None]) -> None:
        """Write to an image, which was found allowed at the time `called`; takes as long as it takes."""
        scheduler, machine, storage = self._scheduler, self._machine, self._storage
        wait, delayed = Wait(), [False]
        trouble = storage.trouble(machine.number, 0)
        fate = storage.fate(trouble, called, called + storage.faults.bound, machine.io_timeout)
        if storage.faults.frozen and not storage.calm and scheduler.random.random() < FREEZES_AT_A_WRITE:
            machine.freeze()

        def land() -> None:
            if machine.frozen and machine.paused and not self.dead:
                scheduler.at(machine.paused_until + scheduler.random.uniform(0.0, 0.01), land)
                return
            latest = called + storage.faults.bound
            if self.dead and not delayed[0] and scheduler.random.random() < DELAYED_BY_CRASH:
                delayed[0] = True
                scheduler.at(scheduler.random.uniform(scheduler.now, latest), land)
                return
            if not (self.dead and scheduler.now > latest):
                landed()
            wait.finish()

        if fate.land_at is not None:
            scheduler.at(fate.land_at, land)
        else:
            scheduler.at(fate.end_at, wait.finish)
        await wait

    def kill(self) -> None:
        """The program died: what was handed over may still land."""
        self.dead = True
