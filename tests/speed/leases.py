"""How quickly a free lease is acquired and a lockspace joined: lockfs's engine against the sanlock daemon.

    python -m tests.speed.leases [--rounds N] [--json FILE] DIRECTORY

Both work on one file in DIRECTORY, which lies on the storage to measure and takes O_DIRECT, in one run and by
turns, each time on a lease that nobody holds. The engine runs in this process, on threads of its own; the
daemon is called through its socket. Ends with 1 if a bar was missed, with 2 if nothing can be measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import trio

from lockfs.backends.paxos.places import HOSTS_DEFAULT
from lockfs.paxos.area import Area
from lockfs.paxos.lockspace import Lockspace
from lockfs.paxos.resource import Resource
from lockfs.paxos.timing import Timing
from lockfs.records.geometry import FILE_GEOMETRY
from lockfs.storage.clock import BootClock
from lockfs.storage.disk import RENEWAL_PLACES, DirectDisk
from tests.support import sanlock
from tests.support.sanlock import LeaseFile, SanlockDaemon
from tests.support.sanlock_client import Registration

ROUNDS = 200
WARM_UP = 10  # rounds that do not count
JOINS = 3
HOSTS = (FILE_GEOMETRY.hosts_max, HOSTS_DEFAULT, 64)
IO_TIMEOUT = 1
DAEMON_ID, ENGINE_ID, FIRST_JOINER = 1, 2, 10
ACQUIRE_BAR = 0.5  # of the daemon's time
JOIN_BAR_S = 2.5
REST_S = 0.002  # between two turns, so that what the one left to do in the background is done
ALL_S = 600.0


@dataclass
class Times:
    """Seconds that one thing took, for each side."""

    what: str
    engine: list[float] = field(default_factory=list)
    daemon: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """The engine's median as a part of the daemon's."""
        return statistics.median(self.engine) / statistics.median(self.daemon)

    def line(self) -> str:
        """The row of the table."""
        columns = [
            f"{statistics.median(times) * 1e3:9.2f} {_late(times) * 1e3:9.2f}" for times in self._sides
        ]
        return f"{self.what:28} {columns[0]}   {columns[1]}   {self.ratio:6.2f}"

    @property
    def _sides(self) -> tuple[Sequence[float], Sequence[float]]:
        return self.engine, self.daemon


_HEAD = f"{'milliseconds':28} {'lockfs':>9} {'p95':>9}   {'sanlock':>9} {'p95':>9}   {'ratio':>6}"


def _late(times: Sequence[float]) -> float:
    """The 95th percentile."""
    return sorted(times)[min(len(times) - 1, len(times) * 95 // 100)]


async def _timed(act: Callable[[], Awaitable[object]]) -> float:
    begun = time.perf_counter()
    await act()
    return time.perf_counter() - begun


def _lockspace(disk: DirectDisk, file: LeaseFile, host_id: int) -> Lockspace:
    area = Area(disk, 0, FILE_GEOMETRY, float(IO_TIMEOUT))
    name = b"bench-%d" % host_id
    return Lockspace(area, file.lockspace.name, host_id, name, clock=BootClock(), timing=Timing(IO_TIMEOUT))


@asynccontextmanager
async def _disk(file: LeaseFile, places: int) -> AsyncIterator[DirectDisk]:
    disk = await DirectDisk.open(str(file.path), places=places)
    try:
        yield disk
    finally:
        await disk.close()


async def _renew(lockspace: Lockspace) -> None:
    while True:
        await lockspace.clock.sleep(lockspace.renewal_due - lockspace.clock.now())
        await lockspace.renew()


async def _acquires(
    file: LeaseFile, number: int, registration: Registration, engine: Resource, rounds: int, hosts: int
) -> tuple[Times, Times]:
    """Both sides' times to acquire and to release one lease, by turns."""
    lease = file.resources[number]
    acquire, release = Times(f"acquire, {hosts} hosts"), Times(f"release, {hosts} hosts")
    for turn in range(WARM_UP + rounds):
        daemon = [await _timed(lambda: registration.acquire(lease))]
        daemon.append(await _timed(lambda: registration.release(lease)))
        await trio.sleep(REST_S)
        ours = [await _timed(engine.acquire), await _timed(engine.release)]
        await trio.sleep(REST_S)
        if turn >= WARM_UP:
            acquire.daemon.append(daemon[0])
            release.daemon.append(daemon[1])
            acquire.engine.append(ours[0])
            release.engine.append(ours[1])
    return acquire, release


async def _join_once(file: LeaseFile, host_id: int) -> None:
    """Open the storage and join, as a mount does."""
    async with _disk(file, RENEWAL_PLACES) as disk:
        lockspace = _lockspace(disk, file, host_id)
        await lockspace.join()
        await lockspace.leave()


async def _joins(directory: Path, daemon: SanlockDaemon) -> Times:
    """Both sides' times to join a lockspace with a free id; the engine's include opening and leaving."""
    joins = Times("join, io_timeout 1")
    for turn in range(JOINS):
        file = LeaseFile(directory / f"join{turn}", 0, b"join%d" % turn)
        await file.init(daemon.client, io_timeout=IO_TIMEOUT)

        async def join(file: LeaseFile = file) -> None:
            await daemon.client.add_lockspace(file.lockspace, DAEMON_ID, io_timeout=IO_TIMEOUT)

        joins.daemon.append(await _timed(join))
        joins.engine.append(await _timed(lambda file=file: _join_once(file, ENGINE_ID)))  # type: ignore[misc]
    return joins


async def measure(directory: Path, rounds: int) -> tuple[list[Times], Times]:
    """Everything: the times of acquiring and releasing, and those of joining."""
    file = LeaseFile(directory / "leases", len(HOSTS))
    found: list[Times] = []
    with trio.fail_after(ALL_S):
        async with SanlockDaemon(directory, "bench") as daemon:
            client = daemon.client
            await file.init(client, io_timeout=IO_TIMEOUT)
            for number, hosts in enumerate(HOSTS):
                await client.init_resource(file.resources[number], num_hosts=hosts)
            await client.add_lockspace(file.lockspace, DAEMON_ID, io_timeout=IO_TIMEOUT)
            async with _disk(file, RENEWAL_PLACES) as renewals, _disk(file, 1) as leases:
                lockspace = _lockspace(renewals, file, ENGINE_ID)
                await lockspace.join()
                async with trio.open_nursery() as nursery, client.register() as registration:
                    nursery.start_soon(_renew, lockspace)
                    for number, hosts in enumerate(HOSTS):
                        area = Area(leases, sanlock.AREA * (1 + number), FILE_GEOMETRY, float(IO_TIMEOUT))
                        name = file.resources[number].name
                        engine = Resource(area, lockspace, name, Random(1), hosts)
                        found += await _acquires(file, number, registration, engine, rounds, hosts)
                    nursery.cancel_scope.cancel()
                await lockspace.leave()
            joins = await _joins(directory, daemon)
    return found, joins


def _verdicts(found: Sequence[Times], joins: Times) -> list[tuple[str, bool]]:
    """Each bar in words, and whether it was met."""
    acquires = [times for times in found if times.what.startswith("acquire")]
    verdicts = [
        (
            f"{times.what}: {times.ratio:.2f} of the daemon's time, at most {ACQUIRE_BAR}",
            times.ratio <= ACQUIRE_BAR,
        )
        for times in acquires
    ]
    slowest = max(joins.engine)
    return [*verdicts, (f"{joins.what}: {slowest:.2f} s, under {JOIN_BAR_S} s", slowest < JOIN_BAR_S)]


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="leases", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every time, in seconds, there")
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args(argv)
    if reason := sanlock.why_not_sanlock(arguments.directory):
        print(reason, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="bench-leases-", dir=arguments.directory) as scratch:
        found, joins = trio.run(measure, Path(scratch), arguments.rounds)
    print(_HEAD, *(times.line() for times in [*found, joins]), sep="\n")
    verdicts = _verdicts(found, joins)
    for words, met in verdicts:
        print(f"{'met' if met else 'MISSED':7}{words}")
    if arguments.json:
        times = {each.what: {"lockfs": each.engine, "sanlock": each.daemon} for each in [*found, joins]}
        arguments.json.write_text(json.dumps(times, indent=1))
    return 0 if all(met for _, met in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
