"""A host that shares a lease as soon as it has joined, while the others last looked before it joined.

Hosts look at one another when they renew, every 2 io_timeout (a daemon: 0.5 to 1.5 s later than that), and a
joiner is done after 2 io_timeout. So who wants the lease exclusive may know a sharer's delta lease only as it
was before: free. That must not be taken for the sharer's death.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import pytest
import trio

from lockfs.paxos.area import Area
from lockfs.paxos.errors import Refused
from lockfs.paxos.lockspace import Lockspace
from lockfs.paxos.resource import Resource
from lockfs.paxos.timing import Timing
from lockfs.records import sectors
from lockfs.records.geometry import FILE_GEOMETRY
from lockfs.records.results import Result
from lockfs.storage.clock import BootClock
from lockfs.storage.disk import DirectDisk
from tests.support import sanlock
from tests.support.sanlock import LeaseFile, SanlockDaemon
from tests.support.sanlock_client import AGAIN, SanlockError

DEADLINE_S = 60.0
LOOK_S = 0.01
IO_TIMEOUT = 1


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory in which a daemon can work."""
    if reason := sanlock.why_not_sanlock(tmp_path):
        pytest.skip(reason)
    return tmp_path


def _is_lockfs(name: bytes) -> bool:
    return name.startswith(b"newcomer")


def _host(disk: DirectDisk, file: LeaseFile, host_id: int) -> tuple[Lockspace, Resource]:
    """An engine that has not joined yet, and the file's lease as it will see it."""
    lockspace = Lockspace(
        Area(disk, 0, FILE_GEOMETRY, float(IO_TIMEOUT)), file.lockspace.name, host_id,
        b"newcomer%d" % host_id, clock=BootClock(), timing=Timing(IO_TIMEOUT), looks_first=_is_lockfs,
    )  # fmt: skip
    area = Area(disk, sanlock.AREA, FILE_GEOMETRY, float(IO_TIMEOUT))
    return lockspace, Resource(area, lockspace, file.resources[0].name, Random(1))


@asynccontextmanager
async def _disk(file: LeaseFile) -> AsyncIterator[DirectDisk]:
    disk = await DirectDisk.open(str(file.path))
    try:
        yield disk
    finally:
        await disk.close()


async def _keep_renewing(lockspace: Lockspace) -> None:
    while True:
        await lockspace.clock.sleep(lockspace.renewal_due - lockspace.clock.now())
        await lockspace.renew()


async def _renewal(disk: DirectDisk, host_id: int) -> None:
    """Return right after a host's next renewal."""
    place = sectors.delta_sector(host_id) * FILE_GEOMETRY.sector_size
    first = await disk.read(place, FILE_GEOMETRY.sector_size, IO_TIMEOUT)
    while await disk.read(place, FILE_GEOMETRY.sector_size, IO_TIMEOUT) == first:
        await trio.sleep(LOOK_S)


async def test_lockfs_does_not_overlook_a_newcomer(directory: Path) -> None:
    """A lockfs host that has last looked before the sharer joined is refused the lease."""
    file = LeaseFile(directory / "leases", 1)
    async with SanlockDaemon(directory, "writer") as daemon, _disk(file) as disk:
        await file.init(daemon.client)
        with trio.fail_after(DEADLINE_S):
            wanting, its_lease = _host(disk, file, 2)
            await wanting.join()
            await wanting.renew()
            sharing, lease = _host(disk, file, 1)
            await sharing.join()
            await sharing.renew()
            await lease.acquire(shared=True)
            with pytest.raises(Refused) as caught:
                await its_lease.acquire()
            assert caught.value.result is Result.SHARED_ELSEWHERE


async def test_sanlock_does_not_overlook_a_lockfs_newcomer(directory: Path) -> None:
    """Lockfs shares a lease only when a daemon that renews as it should has seen the host join."""
    file = LeaseFile(directory / "leases", 1)
    async with SanlockDaemon(directory, "wanting") as daemon, _disk(file) as disk:
        await file.init(daemon.client)
        await daemon.client.add_lockspace(file.lockspace, 2, io_timeout=IO_TIMEOUT)
        with trio.fail_after(DEADLINE_S):
            sharing, lease = _host(disk, file, 1)
            await _renewal(disk, 2)
            await sharing.join()
            await sharing.renew()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_keep_renewing, sharing)
                await lease.acquire(shared=True, give_up_at=math.inf)
                nursery.cancel_scope.cancel()
            async with daemon.client.register() as wanting:
                with pytest.raises(SanlockError) as caught:
                    await wanting.acquire(file.resources[0])
                assert caught.value.code == AGAIN
            await lease.release()
            await sharing.leave()
