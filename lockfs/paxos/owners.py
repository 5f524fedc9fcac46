"""Who holds a lease, as the storage tells anybody who reads it (section 7 of the format)."""

from __future__ import annotations

from dataclasses import dataclass

from lockfs.paxos.area import Area
from lockfs.records import sectors
from lockfs.records.sectors import Leader


@dataclass(frozen=True)
class Ownership:
    """`hosts` are (host id, generation) of the owner, or of those who share; whether they live, others
    say.
    """

    leader: Leader
    shared: bool
    hosts: tuple[tuple[int, int], ...]


async def ownership(area: Area, space_name: bytes, name: bytes) -> Ownership:
    """Read the lease's leader and the sectors of its hosts.

    Raises:
        RecordError: no such lease, or a damaged leader. DiskError, DiskTimeout.
    """
    leader = sectors.decode_leader(await area.read(sectors.LEADER_SECTOR))
    area.check(sectors.LEADER_SECTOR, sectors.check_paxos, leader, space_name, name, 0)
    area = area.shaped(leader.geometry)
    prefix = await area.read(sectors.LEADER_SECTOR, sectors.host_sector(leader.num_hosts) + 1)
    records = dict(sectors.used_hosts(prefix, area.shape.sector_size, leader.num_hosts))
    leader = sectors.decode_leader(prefix)
    area.check(sectors.LEADER_SECTOR, sectors.check_paxos, leader, space_name, name, 0)
    owner = records.get(leader.owner_id)
    let_go = leader.write_id != leader.owner_id and owner is not None and owner.dblock.released
    if leader.timestamp and not let_go:
        return Ownership(leader, False, ((leader.owner_id, leader.owner_generation),))
    sharers = ((host_id, record.mode.generation) for host_id, record in records.items() if record.mode.shared)
    hosts = tuple(sharers)
    return Ownership(leader, bool(hosts), hosts)
