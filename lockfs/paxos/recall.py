"""A lease that a former process of this host held, or was at work on, in the membership that goes on.

The lease is recalled as the storage has it. What lies there was written by this host alone for as long as it
held the lease: the leader, if it is the owner; its own sector in any case.
"""

from __future__ import annotations

from lockfs.paxos.lockspace import Lockspace
from lockfs.paxos.resource import Begun, Hold, Resource
from lockfs.records import sectors
from lockfs.records.sectors import HostRecord, Leader


async def recall(
    resource: Resource, lockspace: Lockspace, hold: Hold, leader: Leader, *, converting: bool
) -> bool:
    """Let a fresh resource hold what the former process held; False if the storage does not bear it out.

    `hold` and `leader` are the former resource's. While it was `converting` either mode may be there; what a
    conversion had begun is left `unsettled`.

    Raises:
        RecordError, DiskError, DiskTimeout.
    """
    suspicions = lockspace.pace.suspicions
    now, own, _ = await resource.area.disk.carry_out(resource.looking())
    area = resource.area
    here = (lockspace.host_id, lockspace.generation)
    let_go = now.write_id != lockspace.host_id and own.dblock.released
    owns = bool(now.timestamp) and (now.owner_id, now.owner_generation) == here and not let_go
    shares = own.mode.shared and own.mode.generation == lockspace.generation
    if shares and (converting or hold is Hold.SHARED):
        resource.restore(area, Hold.SHARED, leader, own, unsettled=converting or owns, suspicions=suspicions)
        return True
    same = converting or (hold is Hold.EXCLUSIVE and now.lver == leader.lver)
    if owns and same and not shares:
        resource.restore(area, Hold.EXCLUSIVE, now, own, unsettled=False, suspicions=suspicions)
        return True
    resource.restore(area, Hold.NONE, None, own, unsettled=True, suspicions=suspicions)
    return False


async def take_over(resource: Resource, lockspace: Lockspace) -> None:
    """Let a fresh resource, which holds nothing, settle whatever the former process had begun, or go on with
    it.

    Raises:
        RecordError, DiskError, DiskTimeout.
    """
    suspicions = lockspace.pace.suspicions
    now, own, sharers = await resource.area.disk.carry_out(resource.looking())
    begun = _begun(lockspace, now, own, sharers)
    resource.restore(resource.area, Hold.NONE, None, own, unsettled=True, suspicions=suspicions, begun=begun)


def _begun(lockspace: Lockspace, now: Leader, own: HostRecord, sharers: frozenset[int]) -> Begun | None:
    """What had been begun and not been let go of: the mark RELEASED is the first thing that a release writes.

    A version is in hand only if our sector has our ballot for it. An older one, which we let go of, can be
    there again, put back by another host's late commit, and our next ballot has dropped the mark.
    """
    if own.dblock.released or own.mode.shared:
        return None
    us = (lockspace.host_id, lockspace.generation)
    owns = bool(now.timestamp) and (now.owner_id, now.owner_generation) == us
    current = own.dblock.lver == now.lver and bool(own.dblock.bal)
    if owns and current and not now.flags & sectors.SHORT_HOLD:
        return Begun(now, sharers)
    return Begun(None)
