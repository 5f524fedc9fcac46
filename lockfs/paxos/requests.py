"""Asking the owner of a lease to let go, through the storage (section 16 of the format).

The request lies beside the lease and is void as soon as its version is exceeded, so that nobody needs to take
it back. The owner sees it when it looks; calling its host (`Lockspace.call`) makes it look.
"""

from __future__ import annotations

from lockfs.paxos.area import Area
from lockfs.paxos.errors import EngineError
from lockfs.paxos.lockspace import Lockspace
from lockfs.records import sectors
from lockfs.records.results import Result
from lockfs.records.sectors import Request


async def request(area: Area, lockspace: Lockspace, name: bytes, force_mode: int) -> int:
    """Ask for the lease; returns the host id of the owner that was asked, 0 if the lease is free.

    A sanlock daemon that owns the lease and is called answers `force_mode` FORCE_GRACEFUL with SIGTERM to the
    process that holds it, FORCE_KILL with SIGKILL.

    Raises:
        EngineError: REQUEST_NEWER, somebody asks for a later version. RecordError, DiskError, DiskTimeout.
    """
    leader = sectors.decode_leader(await area.read(sectors.LEADER_SECTOR))
    area.check(sectors.LEADER_SECTOR, sectors.check_paxos, leader, lockspace.name, name, lockspace.host_id)
    if leader.timestamp == 0:
        return 0
    area.check_number(sectors.LEADER_SECTOR, leader.lver)
    area = area.shaped(leader.geometry)
    present = await read_request(area)
    wanted = leader.lver + 1
    if present.lver > wanted:
        raise EngineError(Result.REQUEST_NEWER, f"version {present.lver} of the lease is asked for")
    if (present.lver, present.force_mode) != (wanted, force_mode):
        lockspace.require()
        asking = Request(lver=wanted, force_mode=force_mode)
        await area.write(sectors.REQUEST_SECTOR, asking.encode(area.shape.sector_size))
    return leader.owner_id


async def read_request(area: Area) -> Request:
    """The request that lies beside a lease; raises RecordError, DiskError, DiskTimeout."""
    present = sectors.decode_request(await area.read(sectors.REQUEST_SECTOR))
    area.check(sectors.REQUEST_SECTOR, sectors.check_request, present)
    return present


def concerns(request_seen: Request, lver: int) -> bool:
    """Whether a request asks for a lease that is held in version `lver` to be let go."""
    return request_seen.lver > lver and request_seen.force_mode in (
        sectors.FORCE_KILL,
        sectors.FORCE_GRACEFUL,
    )
