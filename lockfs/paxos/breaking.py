"""Who has a lease and whether that host lives, as evidence for people; and taking it by force."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lockfs.paxos.area import Area
from lockfs.paxos.lockspace import Lockspace, stamp
from lockfs.paxos.owners import ownership
from lockfs.paxos.watch import HostState
from lockfs.records import sectors
from lockfs.records.sectors import Leader


@dataclass(frozen=True)
class HolderFacts:
    """One holder: its id and generation in the lease, its delta lease now, and what watching it has shown.

    `silent_s`: how long it has not changed; `dead_after_s`: how long that must last. Seconds. `outlived`: the
    host has left, or joined anew, since it took the lease.
    """

    host_id: int
    generation: int
    delta: Leader
    sector: int
    state: HostState
    silent_s: float
    dead_after_s: float

    @property
    def outlived(self) -> bool:
        """Whether the life in which the host took the lease is over."""
        return self.delta.timestamp == 0 or self.delta.owner_generation > self.generation

    @property
    def name(self) -> str:
        """The name that the host gave itself."""
        return sectors.shown(self.delta.resource_name)


async def facts(area: Area, lockspace: Lockspace, name: bytes) -> tuple[Leader, list[HolderFacts]]:
    """The lease's leader record, and everybody it names as holder. Nothing is written.

    Raises:
        RecordError, DiskError, DiskTimeout.
    """
    found = await ownership(area, lockspace.name, name)
    holders = []
    for host_id, generation in found.hosts:
        sector = sectors.delta_sector(host_id)
        delta = sectors.decode_leader(await lockspace.area.read(sector))
        now = lockspace.clock.now()
        sight = lockspace.watch.sight(host_id)
        unchanged = sight is not None and sight.timestamp == delta.timestamp
        silent = now - lockspace.watch.silent_since(sight) if sight is not None and unchanged else 0.0
        state = lockspace.watch.state(host_id, now)
        dead_after = float(lockspace.timing.of(delta.io_timeout).dead)
        holders.append(HolderFacts(host_id, generation, delta, sector, state, silent, dead_after))
    return found.leader, holders


def told(facts_found: list[HolderFacts], leader: Leader, lockspace: Lockspace) -> Iterator[str]:
    """The facts in sentences."""
    if not facts_found:
        yield f"The lease is free; its last version is {leader.lver}."
    for one in facts_found:
        who = f"host {one.name} (host id {one.host_id}, generation {one.generation})"
        yield f"Version {leader.lver} of the lease is held by {who}."
        where = f"sector {one.sector} of {lockspace.area.name}"
        if one.host_id == lockspace.host_id and one.generation == lockspace.generation:
            yield "That is this mount: lockfsctl fence frees the image."
        elif one.outlived:
            how = (
                "left"
                if one.delta.timestamp == 0
                else f"joined anew, generation {one.delta.owner_generation},"
            )
            yield f"That host has {how} since, says {where}."
        elif one.silent_s > one.dead_after_s:
            yield (
                f"Its delta lease, {where}, has not changed for {one.silent_s:.0f} s of this host's clock, "
                f"more than the {one.dead_after_s:.0f} s after which a host has stopped writing: it is dead."
            )
        elif one.state in (HostState.FAIL, HostState.DEAD):
            yield (
                f"Its delta lease, {where}, has not changed lately; it counts as dead after "
                f"{one.dead_after_s:.0f} s without a change."
            )
        else:
            yield f"Its delta lease, {where}, was changed {one.silent_s:.0f} s ago: it may be alive."


async def free_by_force(area: Area, lockspace: Lockspace, name: bytes) -> None:
    """Mark the lease free and forget who shares it, whoever lives. Two hosts may write after this.

    Raises:
        LockspaceFailed, RecordError, DiskError, DiskTimeout.
    """
    found = await ownership(area, lockspace.name, name)
    area = area.shaped(found.leader.geometry)
    lockspace.require()
    if found.shared:
        for host_id, _ in found.hosts:
            await area.write(sectors.host_sector(host_id), bytes(area.shape.sector_size))
    freed = replace(
        found.leader,
        timestamp=0,
        flags=found.leader.flags & ~sectors.SHORT_HOLD,
        write_id=lockspace.host_id,
        write_generation=lockspace.generation,
        write_timestamp=stamp(lockspace.clock.now()),
    )
    await area.write(sectors.LEADER_SECTOR, sectors.encode_leader(freed.summed()))
