"""Making lease areas: a lockspace, a resource, a resource index; and the refusal to make one over another.

What is written is byte for byte what sanlock writes, in as many writes (docs/paxos-format.md, sections 6 and
18). Nothing that a host uses may ever be overwritten by it: `check_unused` tells.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, replace

from lockfs.errors import BackendError
from lockfs.paxos.scan import READ_TIMEOUT_S, UNIT, any_set, scan
from lockfs.paxos.seams import Disk, DiskError
from lockfs.records import sectors
from lockfs.records.describe import DescribedArea, IndexArea, LockspaceArea, ResourceArea, UnknownArea, text
from lockfs.records.geometry import MIB, Geometry, geometry
from lockfs.records.results import RecordError
from lockfs.records.sectors import Leader

WRITE_TIMEOUT_S = 60.0
"""For the write of an area, which may be 8 MiB."""
INDEX_AREAS = 2
"""A resource index takes its own area and that of the lease that guards it."""
FIXED_AREAS = 1 + INDEX_AREAS


class AreaTaken(BackendError):
    """There is something in the place of a new area; the sentence names it. Nothing was written."""


@dataclass(frozen=True)
class Plan:
    """A device or file of its own for one lockspace: the lockspace, the index, and room for `leases` leases.

    `io_timeout` is in seconds; it decides how long the first join of each host id takes.
    """

    shape: Geometry
    space_name: bytes
    io_timeout: int
    leases: int

    @property
    def size(self) -> int:
        """Bytes in all."""
        return (FIXED_AREAS + self.leases) * self.shape.area_size


async def write_lockspace(
    disk: Disk, offset: int, shape: Geometry, space_name: bytes, io_timeout: int
) -> None:
    """Write a new lockspace at byte `offset`, whatever is there.

    The second write, of the first sector, makes it one: nobody can join what the first has not finished.

    Raises:
        ValueError: the name is too long.
        DiskError, DiskTimeout: it is not there, or not known to be.
    """
    area = sectors.new_lockspace(shape, space_name, io_timeout)
    await disk.write(offset, sectors.uncommitted(area), WRITE_TIMEOUT_S)
    await disk.write(offset, area[: shape.sector_size], WRITE_TIMEOUT_S)


async def write_resource(disk: Disk, offset: int, leader: Leader) -> None:
    """Write a new resource with this leader (`sectors.new_leader`) at byte `offset`, whatever is there.

    Over a lease that is in use it would end the exclusion.

    Raises:
        DiskError, DiskTimeout: it is not there, or not known to be.
    """
    await disk.write(offset, sectors.new_resource(leader), WRITE_TIMEOUT_S)


async def write_index(
    disk: Disk, offset: int, shape: Geometry, space_name: bytes, max_resources: int
) -> None:
    """Write a new resource index at byte `offset` and the lease that guards it behind it, whatever is there.

    The areas of its `max_resources` resources follow; they are not touched.

    Raises:
        ValueError: the name is too long, or an index of this geometry cannot have as many resources.
        DiskError, DiskTimeout: it is not there, or not known to be.
    """
    if not 0 < max_resources <= shape.index_resources_max:
        raise ValueError(f"{max_resources} resources are not within 1 and {shape.index_resources_max}")
    header = sectors.new_index(shape, space_name, offset, max_resources).encode()
    await disk.write(offset, header.ljust(shape.area_size, b"\0"), WRITE_TIMEOUT_S)
    guard = sectors.new_leader(shape, space_name, sectors.INDEX_LEASE_NAME)
    await write_resource(disk, offset + shape.area_size, guard)


async def write_plan(disk: Disk, plan: Plan) -> None:
    """Write what `plan` says and read it back. The room for leases is not touched.

    The lockspace comes last, so that wherever a host can join there is an index. Call `check_unused`
    immediately before.

    Raises:
        ValueError: as the parts do.
        DiskError, DiskTimeout: it is not there, or not known to be, or reads back as something else.
    """
    shape = plan.shape
    await write_index(disk, shape.area_size, shape, plan.space_name, plan.leases)
    await write_lockspace(disk, 0, shape, plan.space_name, plan.io_timeout)
    wanted = sectors.new_lockspace(shape, plan.space_name, plan.io_timeout)
    wanted += sectors.new_index(shape, plan.space_name, shape.area_size, plan.leases).encode()
    wanted = wanted.ljust(INDEX_AREAS * shape.area_size, b"\0")
    wanted += sectors.new_resource(sectors.new_leader(shape, plan.space_name, sectors.INDEX_LEASE_NAME))
    for at in range(0, len(wanted), shape.area_size):
        if await disk.read(at, shape.area_size, READ_TIMEOUT_S) != wanted[at : at + shape.area_size]:
            problem = f"What was written at byte {at} of {disk.name} reads back as something else."
            raise DiskError(errno.EIO, f"{problem} Another host wrote there, or the storage is at fault.")


async def check_unused(disk: Disk, size: int, plan: Plan) -> None:
    """Refuse a disk of `size` bytes in the place of which `plan` must not be written.

    What an administrator expects of `init`: a place that holds nothing is prepared without a question. One
    that was prepared before, for the same lockspace, and that no host has joined, is prepared anew: that
    repeats an init that broke off, or changes the geometry; its leases, which nobody can hold then, are
    forgotten. Anything else is refused, and no option overrides that: a file system, an image, another
    lockspace, leases whose lockspace lies elsewhere; a lockspace that a host has joined, alive or not, for
    this cannot be told in one look; a damaged one, for its users cannot be told. Who knows better removes
    the file, or overwrites the device with zeros, with other tools and on purpose.

    The first three areas are looked at to the last byte, of the room for leases the first 64 KiB of each.

    Raises:
        AreaTaken: the sentence says what is there, and who uses it if it is a host.
        DiskError, DiskTimeout: what is there could not be read.
    """
    end = min(size, plan.size)
    if end % UNIT:
        raise AreaTaken(f"{disk.name} is {size} bytes long: it is no lease area, and it is not empty.")
    areas = await scan(disk, size, until=end, whole_until=FIXED_AREAS * plan.shape.area_size)
    name = text(plan.space_name)
    is_unused = False
    base = areas[0] if areas and areas[0].offset == 0 else None
    if base is not None and await _is_unfinished(disk, base, size, plan.space_name):
        areas = areas[1:]
    elif isinstance(base, LockspaceArea):
        _check_lockspace(disk, base, name)
        areas, is_unused = areas[1:], True
    for area in areas:
        if not _is_ours(area, name, is_unused):
            raise AreaTaken(f"{_what(disk, area)}. {_ADVICE}")


_ADVICE = (
    "Nothing was changed. If nobody needs it, overwrite it with zeros (or remove the file) and try again."
)


async def _is_unfinished(disk: Disk, area: DescribedArea, size: int, space_name: bytes) -> bool:
    """Whether it is what an init leaves that broke off: never joined, the first sector not yet valid.

    Of the first of the two writes any sectors may have landed, but of the first and the second sector one.
    """
    if isinstance(area, LockspaceArea):
        shape = geometry(area.sector_size, area.area_size)
    else:
        first = _with_magic(await disk.read(0, UNIT, READ_TIMEOUT_S))
        try:
            sectors.check_delta(first, space_name)
            shape = first.geometry
        except RecordError:
            return False
        if area.area_size > MIB:
            return False
    data = await disk.read(0, min(shape.area_size, size - size % UNIT), READ_TIMEOUT_S)
    if any_set(data[:4]):
        return False
    return all(
        _is_new(data[at : at + shape.sector_size], space_name, is_first=at == 0)
        for at in range(0, len(data), shape.sector_size)
    )


def _with_magic(sector: bytes) -> Leader:
    return replace(sectors.decode_leader(sector), magic=sectors.DELTA_MAGIC)


def _is_new(sector: bytes, space_name: bytes, *, is_first: bool) -> bool:
    """Whether a sector of a lockspace is still zero, or a delta lease that nobody ever had."""
    if not any_set(sector):
        return True
    leader = _with_magic(sector) if is_first else sectors.decode_leader(sector)
    try:
        sectors.check_delta(leader, space_name)
    except RecordError:
        return False
    return not (leader.timestamp or leader.owner_id or leader.owner_generation)


def _check_lockspace(disk: Disk, area: LockspaceArea, name: str) -> None:
    users = [host for host in area.hosts if host.timestamp]
    if users:
        first = f"host id {users[0].host_id} ({users[0].name!r})"
        more = f" and {len(users) - 1} more" if users[1:] else ""
        raise AreaTaken(
            f"{disk.name} is in use: {first}{more} joined lockspace {area.lockspace!r} there and did not "
            "leave. Nothing was changed. Unmount there first; if the host is gone for good, see that no "
            "other uses the area, overwrite it with zeros (or remove the file) and try again."
        )
    if area.lockspace != name:
        raise AreaTaken(f"{_what(disk, area)}. {_ADVICE}")
    if area.damage:
        raise AreaTaken(
            f"{disk.name} has lockspace {name!r}, whose sector {area.damage[0].sector} is damaged, so that "
            f"its users cannot be told: {area.damage[0].problem}. {_ADVICE}"
        )


def _is_ours(area: DescribedArea, name: str, is_unused: bool) -> bool:
    """Whether it belongs to the lockspace that is prepared anew and, `is_unused`, nobody can have joined.

    With no lockspace in front, leases may be in use through one that lies elsewhere.
    """
    if isinstance(area, IndexArea):
        return area.lockspace == name
    if isinstance(area, ResourceArea) and area.lockspace == name:
        untouched = area.state == "free" and not area.lver and area.name == text(sectors.INDEX_LEASE_NAME)
        return is_unused or untouched
    return False


def _what(disk: Disk, area: DescribedArea) -> str:
    """What is there, as the beginning of a sentence."""
    if isinstance(area, UnknownArea):
        what = "something that is no lease area, such as a file system or an image,"
    elif isinstance(area, ResourceArea):
        what = f"the lease {area.name!r} of lockspace {area.lockspace!r} ({area.state})"
    else:
        kind = "lockspace" if isinstance(area, LockspaceArea) else "the resource index of lockspace"
        what = f"{kind} {area.lockspace!r}"
    return f"{disk.name} has {what} at byte {area.offset}"
