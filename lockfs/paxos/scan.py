"""What lies on a whole disk, area after area; nothing is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from lockfs.paxos.seams import Disk
from lockfs.records import sectors
from lockfs.records.describe import (
    Damage,
    DescribedArea,
    EntryInfo,
    IndexArea,
    ResourceArea,
    UnknownArea,
    describe_area,
    kind_of,
    text,
)
from lockfs.records.geometry import MIB, Geometry

UNIT = 4096
"""Bytes; what an area and every part of it that is read is a multiple of."""
HEAD_BYTES = 64 << 10
READ_TIMEOUT_S = 60.0


async def scan(
    disk: Disk, size: int, *, start: int = 0, until: int | None = None, whole_until: int = 0
) -> list[DescribedArea]:
    """Describe the areas that begin at or after byte `start` and before `until` of a disk of `size` bytes.

    Areas follow one another; the size of each is what it states, and that of an empty one its predecessor's
    (1 MiB before any). One that begins with 64 KiB of zeros counts as empty without more of it being read,
    unless it begins before `whole_until`. A last piece of the disk shorter than 4 KiB is left out. Other
    hosts may write meanwhile: the areas need not be of one moment, but a single sector always is.

    Raises:
        DiskError, DiskTimeout: a read failed, or took more than READ_TIMEOUT_S.
    """
    end = size - size % UNIT
    limit = end if until is None else min(until, end)
    shape: Geometry | None = None
    found: list[DescribedArea] = []
    at = start
    while at < limit:
        step = shape.area_size if shape else MIB
        head = await disk.read(at, min(HEAD_BYTES, end - at), READ_TIMEOUT_S)
        if at < whole_until or any_set(head):
            kind = kind_of(head, shape)
            if kind is not None:
                shape, step = kind.shape, kind.shape.area_size
            data = await disk.read(at, min(step, end - at), READ_TIMEOUT_S)
            _add(found, describe_area(data, at, shape))
        at += step
    return list(_checked_against_each_other(found, end))


def any_set(data: bytes) -> bool:
    """Whether a byte is not zero."""
    return data.count(0) != len(data)


def _add(found: list[DescribedArea], area: DescribedArea | None) -> None:
    """Append it; what is unknown joins with what is unknown before it."""
    if area is None:
        return
    last = found[-1] if found else None
    if (
        isinstance(area, UnknownArea)
        and isinstance(last, UnknownArea)
        and last.offset + last.area_size == area.offset
    ):
        found[-1] = replace(last, area_size=last.area_size + area.area_size)
    else:
        found.append(area)


def _checked_against_each_other(found: Sequence[DescribedArea], end: int) -> Iterator[DescribedArea]:
    """The areas, with what an index says and the leases do not bear out added to the index's damage."""
    leases = {area.offset: area for area in found if isinstance(area, ResourceArea)}
    for area in found:
        if isinstance(area, IndexArea):
            yield replace(area, damage=(*area.damage, *_contradictions(area, leases, end)))
        else:
            yield area


def _contradictions(index: IndexArea, leases: dict[int, ResourceArea], end: int) -> Iterator[Damage]:
    """A lease that was removed since the index was read is no contradiction: the entry goes first."""
    own = leases.get(index.offset + index.area_size)
    if own is None or own.name != text(sectors.INDEX_LEASE_NAME) or own.lockspace != index.lockspace:
        yield Damage(0, "the lease that guards the index is not in the area behind it")
    for entry in index.entries:
        problem = _contradiction(index, entry, leases.get(entry.offset), end)
        if problem:
            yield Damage(sectors.entry_place(entry.number, index.sector_size)[0], problem)


def _contradiction(index: IndexArea, entry: EntryInfo, lease: ResourceArea | None, end: int) -> str:
    says = f"entry {entry.number}, {entry.name!r}, names byte {entry.offset}, "
    if entry.offset >= end:
        return f"{says}which is behind the end"
    if lease is None:
        return f"{says}where no lease is"
    if lease.state != "removed" and (lease.name, lease.lockspace) != (entry.name, index.lockspace):
        return f"{says}where the lease is {lease.name!r} of lockspace {lease.lockspace!r}"
    return ""
