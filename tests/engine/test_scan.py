"""A whole disk, area after area: everything there is found in its place, and little else is read."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lockfs.paxos.prepare import Plan, write_plan, write_resource
from lockfs.paxos.scan import HEAD_BYTES, scan
from lockfs.records import sectors
from lockfs.records.describe import DescribedArea, IndexArea
from lockfs.records.geometry import FILE_GEOMETRY, GEOMETRIES, MIB, Geometry
from tests.engine.plain_disk import PlainDisk

SPACE = b"images"


async def disk_with(shape: Geometry, leases: dict[int, bytes], entries: dict[int, bytes]) -> PlainDisk:
    """A prepared disk with these leases, and these entries in its index, by slot."""
    plan = Plan(shape, SPACE, 10, 4)
    disk = PlainDisk(bytes(plan.size))
    await write_plan(disk, plan)
    for number, name in leases.items():
        offset = sectors.entry_area(number, shape, shape.area_size)
        await write_resource(disk, offset, sectors.new_leader(shape, SPACE, name))
    for number, name in entries.items():
        write_entry(disk, shape, number, sectors.entry_area(number, shape, shape.area_size), name)
    disk.reads.clear()
    return disk


def write_entry(disk: PlainDisk, shape: Geometry, number: int, offset: int, name: bytes) -> None:
    """An entry of the index."""
    sector, byte = sectors.entry_place(number, shape.sector_size)
    at = shape.area_size + sector * shape.sector_size + byte
    entry = sectors.IndexEntry(offset, 0, sectors.name_field(name))
    disk.data[at : at + sectors.INDEX_ENTRY_BYTES] = entry.encode()


def places(found: list[DescribedArea]) -> list[tuple[str, int]]:
    """What was found where."""
    return [(area.kind, area.offset) for area in found]


def index_damage(found: list[DescribedArea]) -> list[tuple[int, str]]:
    """What is wrong with the index."""
    (index,) = [area for area in found if isinstance(area, IndexArea)]
    return [(damage.sector, damage.problem) for damage in index.damage]


@pytest.mark.parametrize("shape", GEOMETRIES, ids=str)
async def test_a_prepared_disk(shape: Geometry) -> None:
    """In every geometry, with an empty slot between two leases."""
    names = {0: b"a", 2: b"c"}
    disk = await disk_with(shape, names, names)
    found = await scan(disk, len(disk.data))
    size = shape.area_size
    assert places(found) == [
        ("lockspace", 0),
        ("index", size),
        ("resource", 2 * size),
        ("resource", 3 * size),
        ("resource", 5 * size),
    ]
    assert not any(area.damage for area in found)
    assert not disk.writes[7:]
    empty = [(4 * size, HEAD_BYTES), (6 * size, HEAD_BYTES)]
    assert [read for read in disk.reads if read[0] in (4 * size, 6 * size)] == empty


async def test_part_of_a_disk() -> None:
    """From a byte on, up to another; an area that begins within the part is described whole."""
    disk = await disk_with(FILE_GEOMETRY, {0: b"a"}, {0: b"a"})
    size = len(disk.data)
    assert places(await scan(disk, size, start=MIB)) == [
        ("index", MIB),
        ("resource", 2 * MIB),
        ("resource", 3 * MIB),
    ]
    (first,) = await scan(disk, size, until=4096)
    assert (first.area_size, first.damage) == (MIB, ())
    assert await scan(disk, size, start=4 * MIB) == []


async def test_bytes_behind_zeros() -> None:
    """Looked for only where everything is asked for."""
    disk = PlainDisk(bytes(3 * MIB))
    disk.data[2 * MIB - 1] = 1
    assert await scan(disk, len(disk.data)) == []
    assert places(await scan(disk, len(disk.data), whole_until=MIB)) == []
    assert places(await scan(disk, len(disk.data), whole_until=MIB + 1)) == [("unknown", MIB)]


async def test_what_is_unknown_comes_as_one() -> None:
    """Neighbours join; what lies apart does not."""
    disk = PlainDisk(b"x" * (3 * MIB) + bytes(MIB) + b"y" * (MIB + 4096 + 511))
    found = await scan(disk, len(disk.data))
    assert [(area.offset, area.area_size) for area in found] == [(0, 3 * MIB), (4 * MIB, MIB + 4096)]


@pytest.mark.parametrize("size", [0, 511, 4095])
async def test_too_little(size: int) -> None:
    """Nothing is read."""
    disk = PlainDisk(b"x" * size)
    assert await scan(disk, size) == []
    assert not disk.reads


async def test_a_disk_that_ends_too_early() -> None:
    """The last area says so."""
    disk = await disk_with(FILE_GEOMETRY, {0: b"a"}, {})
    found = await scan(disk, 3 * MIB + 8192)
    assert [damage.sector for damage in found[-1].damage] == [16]


async def test_entries_without_their_leases() -> None:
    """Each is a damage of the index, in the entry's sector."""
    names = {0: b"a", 1: b"b"}
    disk = await disk_with(FILE_GEOMETRY, {**names, 2: b"c"}, {0: b"x", 1: b"b", 3: b"d"})
    assert index_damage(await scan(disk, len(disk.data))) == [
        (1, f"entry 0, 'x', names byte {3 * MIB}, where the lease is 'a' of lockspace 'images'"),
        (1, f"entry 3, 'd', names byte {6 * MIB}, where no lease is"),
    ]
    write_entry(disk, FILE_GEOMETRY, 3, 900 * MIB, b"d")
    assert (1, f"entry 3, 'd', names byte {900 * MIB}, which is behind the end") in index_damage(
        await scan(disk, len(disk.data))
    )


async def test_a_lease_that_is_just_removed() -> None:
    """The entry goes first, then the lease; a look in between may have seen the old entry: no damage."""
    disk = await disk_with(FILE_GEOMETRY, {}, {0: b"a"})
    removed = sectors.new_leader(FILE_GEOMETRY, SPACE, b"", cleared_at=5)
    await write_resource(disk, 3 * MIB, removed)
    assert index_damage(await scan(disk, len(disk.data))) == []


@pytest.mark.parametrize("change", [{"resource_field": b"other"}, {"space_field": b"other"}, {"magic": 0}])
async def test_an_index_without_its_own_lease(change: dict[str, bytes | int]) -> None:
    """Nothing guards it then."""
    disk = await disk_with(FILE_GEOMETRY, {}, {})
    guard = sectors.new_leader(FILE_GEOMETRY, SPACE, sectors.INDEX_LEASE_NAME)
    fields = {
        name: sectors.name_field(value) if isinstance(value, bytes) else value
        for name, value in change.items()
    }
    disk.data[2 * MIB : 3 * MIB] = sectors.new_resource(replace(guard, **fields).summed())  # type: ignore[arg-type]
    found = await scan(disk, len(disk.data))
    if "magic" in change:  # the request record behind it still tells that a lease was meant
        assert found[2].damage[0].sector == 0
        disk.data[2 * MIB : 3 * MIB] = bytes(MIB)
        found = await scan(disk, len(disk.data))
    assert index_damage(found) == [(0, "the lease that guards the index is not in the area behind it")]
