"""What leases cost the storage, counted: the real engine on a disk that counts, in simulated time.

`python -m tests.engine.simulation.costs JSON SVG` makes the figures and the chart of docs/paxos-costs.md.
Every I/O takes LATENCY_S; nothing fails. The lockspace is sanlock's for files (512 bytes, 1 MiB, 2,000
hosts)."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from lockfs.paxos.area import Area
from lockfs.paxos.errors import Refused
from lockfs.paxos.lockspace import Lockspace
from lockfs.paxos.resource import Resource
from lockfs.paxos.seams import Clock, Disk
from lockfs.paxos.timing import Timing
from lockfs.records import sectors
from lockfs.records.geometry import FILE_GEOMETRY, MIB
from tests.engine.simulation.chart import draw
from tests.engine.simulation.machine import Machine
from tests.engine.simulation.scheduler import Scheduler, Wait

LATENCY_S = 0.001
SPACE = b"costs"
HOSTS = (2, 10, 50, 200, 500, 2000)
NUM_HOSTS = (64, 250, 2000)
INTERVALS = 1
TIMING = Timing()


class Bench:
    """Hosts without faults on one counted disk."""

    def __init__(self) -> None:
        self.scheduler = Scheduler(0)
        self.lockspace = bytearray(sectors.new_lockspace(FILE_GEOMETRY, SPACE, TIMING.io_timeout))
        self.leases: dict[int, bytes] = {}
        self.count: Counter[str] = Counter()
        self.machine = Machine(self.scheduler, 0, TIMING.io_timeout)

    def new_lease(self, number: int, num_hosts: int) -> Area:
        """A lease area at a place of its own."""
        offset = (1 + number) * MIB
        leader = sectors.new_leader(FILE_GEOMETRY, SPACE, b"lease-%d" % number, num_hosts)
        for index, data in enumerate((sectors.encode_leader(leader), sectors.Request().encode(512))):
            self.leases[offset // 512 + index] = data
        return Area(CountingDisk(self), offset, FILE_GEOMETRY, TIMING.io_timeout)

    def run(self, *tasks: Coroutine[Any, Any, None]) -> None:
        """Run the tasks to their ends."""
        started = [self.machine.start(task, "bench") for task in tasks]
        self.scheduler.run(lambda: all(task.over for task in started))

    def run_until(self, moment: float, *tasks: Coroutine[Any, Any, None]) -> None:
        """Run the tasks until a moment."""
        for task in tasks:
            self.machine.start(task, "bench")
        self.scheduler.run(lambda: self.scheduler.now >= moment)

    def end(self) -> None:
        self.machine.kill()


class CountingDisk(Disk):
    """Counts reads and writes, and their bytes."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    @property
    def name(self) -> str:
        return "disk"

    async def _pass(self, kind: str, length: int) -> None:
        self._bench.count[kind] += 1
        self._bench.count[f"{kind} bytes"] += length
        wait = Wait()
        self._bench.scheduler.after(LATENCY_S, wait.finish)
        await wait

    async def read(self, offset: int, length: int, timeout: float) -> bytes:
        await self._pass("reads", length)
        if offset < MIB:
            return bytes(self._bench.lockspace[offset : offset + length])
        first, leases = offset // 512, self._bench.leases
        found = {at: leases[at] for at in range(first, first + length // 512) if at in leases}
        whole = bytearray(length)
        for at, data in found.items():
            whole[(at - first) * 512 : (at - first + 1) * 512] = data
        return bytes(whole)

    async def write(self, offset: int, data: bytes, timeout: float) -> None:
        await self._pass("writes", len(data))
        if offset < MIB:
            self._bench.lockspace[offset : offset + len(data)] = data
        else:
            self._bench.leases[offset // 512] = data


class BenchClock(Clock):
    """True time; each host's own, for hosts do not start at one moment."""

    def __init__(self, scheduler: Scheduler, base: float) -> None:
        self._scheduler = scheduler
        self._base = base

    def now(self) -> float:
        return self._base + self._scheduler.now

    async def sleep(self, seconds: float) -> None:
        wait = Wait()
        self._scheduler.after(max(seconds, 0.0), wait.finish)
        await wait


def member(bench: Bench, host_id: int, life: int = 0) -> Lockspace:
    """A host that has not joined yet."""
    area = Area(CountingDisk(bench), 0, FILE_GEOMETRY, TIMING.io_timeout)
    clock = BenchClock(bench.scheduler, 1000.0 + 7 * host_id)
    name = b"host-%d.%d" % (host_id, life)
    return Lockspace(area, SPACE, host_id, name, clock=clock, timing=TIMING)


async def _keep(lockspace: Lockspace, delay: float) -> None:
    await lockspace.clock.sleep(delay)
    await lockspace.join()
    while True:
        await lockspace.renew()
        await lockspace.clock.sleep(lockspace.renewal_due - lockspace.clock.now())


def membership(hosts: int) -> dict[str, float]:
    """The I/O of so many joined hosts in a second, over some renewal intervals."""
    bench = Bench()
    members = [member(bench, host_id) for host_id in range(1, hosts + 1)]
    spread = TIMING.renewal / hosts
    begin = time.process_time()
    bench.run_until(
        2.5 * TIMING.renewal, *(_keep(host, index * spread) for index, host in enumerate(members))
    )
    joining = bench.count.copy()
    length = INTERVALS * TIMING.renewal
    bench.run_until(bench.scheduler.now + length)
    bench.end()
    spent = bench.count - joining
    rates = {kind: spent[kind] / length for kind in ("reads", "writes", "reads bytes", "writes bytes")}
    return {"hosts": hosts, **rates, "cpu seconds": round(time.process_time() - begin, 1)}


@dataclass
class _Use:
    """One lease in the hands of one host."""

    bench: Bench
    lockspace: Lockspace
    area: Area
    num_hosts: int

    def resource(self) -> Resource:
        name = b"lease-%d" % (self.area.offset // MIB - 1)
        return Resource(self.area, self.lockspace, name, Random(0), self.num_hosts)


def _spent(bench: Bench, call: Coroutine[Any, Any, None]) -> dict[str, int]:
    before = bench.count.copy()
    bench.run(call)
    return dict(bench.count - before)


def one_lease(num_hosts: int) -> dict[str, dict[str, int]]:
    """The I/O of each operation on a lease that nobody contends for."""
    bench = Bench()
    host, other = member(bench, 1), member(bench, 2)
    bench.run(host.join(), other.join())
    bench.run(host.renew(), other.renew())
    area = bench.new_lease(0, num_hosts)
    mine = _Use(bench, host, area, num_hosts).resource()
    theirs = _Use(bench, other, area, num_hosts).resource()
    costs = {"acquire": _spent(bench, mine.acquire())}
    bench.run(host.renew(), other.renew())
    costs["refused, the owner lives"] = _spent(bench, _refused(theirs))
    costs["to shared"] = _spent(bench, mine.convert(shared=True))
    costs["to exclusive"] = _spent(bench, mine.convert(shared=False))
    costs["release"] = _spent(bench, mine.release())
    costs["acquire shared"] = _spent(bench, mine.acquire(shared=True))
    costs["release shared"] = _spent(bench, mine.release())
    bench.end()
    return costs


async def _refused(resource: Resource) -> None:
    try:
        await resource.acquire()
    except Refused:
        return
    raise RuntimeError("the lease was had")


def waiting(num_hosts: int) -> dict[str, float]:
    """The I/O in a second of one who waits for a dead owner's lease, and how long that takes."""
    bench = Bench()
    owner, other = member(bench, 1), member(bench, 2)
    bench.run(owner.join(), other.join())
    area = bench.new_lease(0, num_hosts)
    bench.run(_Use(bench, owner, area, num_hosts).resource().acquire())
    began = bench.scheduler.now
    keeper = bench.machine.start(_renewals(other), "renewals")
    before = bench.count.copy()
    late = 2.0 * TIMING.dead + other.clock.now()
    bench.run(_patient(_Use(bench, other, area, num_hosts).resource(), late, other))
    length = bench.scheduler.now - began
    spent = bench.count - before
    keeper.kill()
    renewals = length / TIMING.renewal
    bench.end()
    return {
        "seconds": round(length, 1),
        "reads": round((spent["reads"] - renewals) / length, 2),
        "reads bytes": round((spent["reads bytes"] - renewals * MIB) / length),
    }


async def _renewals(lockspace: Lockspace) -> None:
    while True:
        await lockspace.renew()
        await lockspace.clock.sleep(lockspace.renewal_due - lockspace.clock.now())


async def _patient(resource: Resource, give_up_at: float, lockspace: Lockspace) -> None:
    while True:
        try:
            return await resource.acquire(give_up_at=give_up_at)
        except Refused:
            await lockspace.clock.sleep(1.0)


def space(num_hosts: int) -> dict[str, int]:
    """What a lease file takes on this machine's file system: new, after 8 hosts, after all."""
    leader = sectors.new_leader(FILE_GEOMETRY, SPACE, b"lease", num_hosts)
    found = {}
    with tempfile.NamedTemporaryFile(dir=os.environ.get("LOCKFS_COSTS_DIR")) as file:
        os.truncate(file.fileno(), FILE_GEOMETRY.area_size)
        os.pwrite(file.fileno(), sectors.encode_leader(leader) + sectors.Request().encode(512), 0)
        for name, hosts in (("new", 0), ("8 hosts", 8), ("all hosts", num_hosts)):
            for host_id in range(1, hosts + 1):
                os.pwrite(file.fileno(), b"\1" * 512, sectors.host_sector(host_id) * 512)
            os.fsync(file.fileno())
            found[name] = os.fstat(file.fileno()).st_blocks * 512
    return found


def main() -> None:
    document = {
        "io_timeout": TIMING.io_timeout,
        "membership": [membership(hosts) for hosts in HOSTS],
        "lease": {str(count): one_lease(count) for count in NUM_HOSTS},
        "waiting": waiting(250),
        "space": {str(count): space(count) for count in NUM_HOSTS},
    }
    Path(sys.argv[1]).write_text(json.dumps(document, indent=1) + "\n")
    Path(sys.argv[2]).write_text(draw(document))


if __name__ == "__main__":
    main()
