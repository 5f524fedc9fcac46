"""New areas are sanlock's, and nothing that somebody may need is ever overwritten by one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lockfs.paxos.prepare import (
    FIXED_AREAS,
    WRITE_TIMEOUT_S,
    AreaTaken,
    Plan,
    check_unused,
    write_index,
    write_lockspace,
    write_plan,
    write_resource,
)
from lockfs.paxos.seams import DiskError
from lockfs.records import sectors
from lockfs.records.geometry import FILE_GEOMETRY, GEOMETRIES, MIB, Geometry
from tests.engine.plain_disk import PlainDisk
from tests.records.loading import load

SPACE = b"images"
PLAN = Plan(FILE_GEOMETRY, SPACE, 10, 4)
DELTA = sectors.new_delta(FILE_GEOMETRY, SPACE, 10)


async def prepared(plan: Plan = PLAN) -> PlainDisk:
    """A disk that was prepared."""
    disk = PlainDisk(bytes(plan.size))
    await write_plan(disk, plan)
    return disk


async def taken(disk: PlainDisk, plan: Plan = PLAN) -> str | None:
    """The sentence with which it is refused, or None; either way nothing is written."""
    before = bytes(disk.data)
    written = len(disk.writes)
    try:
        await check_unused(disk, len(disk.data), plan)
    except AreaTaken as error:
        return str(error)
    finally:
        assert len(disk.writes) == written
        assert disk.data == before
    return None


def joined(host_id: int, name: bytes = b"host-b", **more: int) -> bytes:
    """The delta sector of a host that is in the lockspace."""
    leader = replace(
        DELTA,
        owner_id=host_id,
        owner_generation=3,
        timestamp=more.get("timestamp", 99),
        resource_field=sectors.name_field(name),
    )
    return sectors.encode_delta(leader.summed())


def put(disk: PlainDisk, offset: int, data: bytes) -> None:
    """Somebody else's bytes."""
    disk.data[offset : offset + len(data)] = data


# --- what is written


@pytest.mark.parametrize("name", ["ls-init-512-1M", "ls-init-4096-2M", "ls-init-4096-8M"])
async def test_a_lockspace_is_written_twice(name: str) -> None:
    """Whole without its first magic number, then its first sector: as sanlock does."""
    vector = load(name)
    leader = sectors.decode_leader(vector.kept)
    disk = PlainDisk()
    disk.writes_left = 1
    with pytest.raises(DiskError):
        await write_lockspace(disk, MIB, vector.shape, leader.space_name, leader.io_timeout)
    assert disk.data[MIB:] == sectors.uncommitted(vector.area())
    disk.writes_left = None
    await write_lockspace(disk, MIB, vector.shape, leader.space_name, leader.io_timeout)
    assert disk.data[MIB:] == vector.area()
    area = (MIB, vector.shape.area_size)
    assert disk.writes == [area, area, (MIB, vector.sector_size)]


async def test_a_resource_is_written_once() -> None:
    """Whole."""
    vector = load("res-init-numhosts16-512-1M")
    disk = PlainDisk()
    leader = sectors.decode_leader(vector.kept)
    made = sectors.new_leader(vector.shape, leader.space_name, leader.resource_name, 16)
    await write_resource(disk, 0, made)
    assert disk.data == vector.area()
    assert disk.writes == [(0, MIB)]


@pytest.mark.parametrize("shape", GEOMETRIES, ids=str)
async def test_an_index_is_written_with_its_lease(shape: Geometry) -> None:
    """Two areas, and no more."""
    disk = PlainDisk()
    size = shape.area_size
    await write_index(disk, size, shape, SPACE, 7)
    assert disk.writes == [(size, size), (2 * size, size)]
    header = sectors.decode_index(disk.data[size:])
    sectors.check_index(header, shape, SPACE, size)
    assert (header.max_resources, len(disk.data)) == (7, 3 * size)
    guard = sectors.decode_leader(disk.data[2 * size :])
    sectors.check_paxos(guard, SPACE, sectors.INDEX_LEASE_NAME, shape.hosts_max)


@pytest.mark.parametrize("count", [0, -1, 16001])
async def test_an_index_has_its_limits(count: int) -> None:
    """Those of sanlock."""
    disk = PlainDisk()
    with pytest.raises(ValueError, match="not within 1 and 16000"):
        await write_index(disk, MIB, FILE_GEOMETRY, SPACE, count)
    assert not disk.writes


async def test_the_lockspace_comes_last() -> None:
    """So that no host can join before everything is there."""
    disk = await prepared()
    assert disk.writes == [(MIB, MIB), (2 * MIB, MIB), (0, MIB), (0, 512)]
    assert WRITE_TIMEOUT_S == 60
    assert not any(disk.data[FIXED_AREAS * MIB :])
    assert PLAN.size == 7 * MIB


class ForgetfulDisk(PlainDisk):
    """Loses one byte of what is written at `spot`."""

    spot = 0

    async def write(self, offset: int, data: bytes, timeout: float) -> None:
        """And says nothing of it."""
        await super().write(offset, data, timeout)
        if offset <= self.spot < offset + len(data):
            self.data[self.spot] ^= 1


@pytest.mark.parametrize("spot", [700, MIB + 5, 3 * MIB - 1])
async def test_what_was_written_is_read_back(spot: int) -> None:
    """Storage that lies is not trusted with a lockspace."""
    disk = ForgetfulDisk(bytes(PLAN.size))
    disk.spot = spot
    with pytest.raises(DiskError, match="reads back as something else") as caught:
        await write_plan(disk, PLAN)
    assert "/dev/leases" in str(caught.value)


# --- what is refused


@pytest.mark.parametrize("size", [0, 4096, MIB, PLAN.size, PLAN.size + MIB])
async def test_zeros_are_free(size: int) -> None:
    """Of any length that an area can have."""
    assert await taken(PlainDisk(bytes(size))) is None


@pytest.mark.parametrize("shape", GEOMETRIES, ids=str)
async def test_a_host_that_joined_keeps_it(shape: Geometry) -> None:
    """The first and the last host id, whatever geometry is asked for; the sentence names the host."""
    plan = Plan(shape, SPACE, 10, 1)
    for host_id in (1, shape.hosts_max):
        disk = await prepared(plan)
        leader = replace(
            sectors.new_delta(shape, SPACE, 10), owner_id=host_id, owner_generation=1, timestamp=5,
            resource_field=sectors.name_field(b"host-b"),
        )  # fmt: skip
        put(disk, sectors.delta_sector(host_id) * shape.sector_size, sectors.encode_delta(leader.summed()))
        for wanted in (plan, PLAN, replace(plan, space_name=b"other")):
            sentence = await taken(disk, wanted)
            assert sentence is not None
            assert f"in use: host id {host_id} ('host-b') joined lockspace 'images'" in sentence


async def test_several_hosts() -> None:
    """One is named, the others are counted."""
    disk = await prepared()
    for host_id in (2, 5, 9):
        put(disk, sectors.delta_sector(host_id) * 512, joined(host_id))
    assert "host id 2 ('host-b') and 2 more joined" in str(await taken(disk))


async def test_a_lockspace_that_all_have_left() -> None:
    """It is prepared anew, in the same or another geometry, with the leases that are in it."""
    disk = await prepared()
    put(disk, sectors.delta_sector(4) * 512, joined(4, timestamp=0))
    leader = replace(sectors.new_leader(FILE_GEOMETRY, SPACE, b"disk-1"), owner_id=4, timestamp=7).summed()
    put(disk, 3 * MIB, sectors.new_resource(leader))
    put(disk, 5 * MIB, sectors.new_resource(sectors.new_leader(FILE_GEOMETRY, SPACE, b"x", cleared_at=3)))
    for shape in GEOMETRIES:
        assert await taken(disk, Plan(shape, SPACE, 10, 4)) is None
    await write_plan(disk, PLAN)
    assert disk.data[: 3 * MIB] == (await prepared()).data[: 3 * MIB]


async def test_another_lockspace() -> None:
    """Even when nobody is in it."""
    sentence = await taken(await prepared(), replace(PLAN, space_name=b"other"))
    assert sentence is not None
    assert sentence.startswith("/dev/leases has lockspace 'images' at byte 0. Nothing was changed.")


@pytest.mark.parametrize("place", [1, 4, 1999])
async def test_a_damaged_lockspace(place: int) -> None:
    """Who uses it cannot be told."""
    disk = await prepared()
    disk.data[place * 512 + 30] ^= 1
    sentence = await taken(disk)
    assert sentence is not None
    assert f"sector {place} is damaged" in sentence


async def test_a_first_host_without_its_magic_number() -> None:
    """It is not taken for an init that broke off."""
    disk = await prepared()
    put(disk, 0, joined(1))
    put(disk, 0, bytes(4))
    assert "sector 0 is damaged" in str(await taken(disk))
    put(disk, 0, joined(1, timestamp=0))
    put(disk, 0, bytes(4))
    assert "sector 0 is damaged" in str(await taken(disk))
    disk.data[300 * 512] ^= 1
    assert "sector 0 is damaged" in str(await taken(disk))


@pytest.mark.parametrize(
    "at", [0, 1024, 4095, 65536, MIB - 1, MIB, 2 * MIB + 70000, 3 * MIB - 1, 3 * MIB, 6 * MIB + 65535]
)
async def test_one_foreign_byte(at: int) -> None:
    """Anywhere in the first three areas, or in the first 64 KiB of the room for a lease."""
    disk = PlainDisk(bytes(PLAN.size))
    disk.data[at] = 0x55
    sentence = await taken(disk)
    assert sentence is not None
    assert f"no lease area, such as a file system or an image, at byte {at - at % MIB}." in sentence


async def test_foreign_bytes_behind_a_lockspace() -> None:
    """Also where a lockspace is prepared anew."""
    disk = await prepared()
    disk.data[4 * MIB + 9] = 1
    assert "at byte 4194304" in str(await taken(disk))


async def test_what_looks_like_an_init_that_broke_off() -> None:
    """With anything else in it, it is none."""
    large = Plan(GEOMETRIES[-1], SPACE, 10, 1)
    first = sectors.uncommitted(sectors.encode_delta(sectors.new_delta(GEOMETRIES[-1], SPACE, 10)))
    for at in (5, 64 << 10, MIB, 7 * MIB, 8 * MIB - 1):
        disk = PlainDisk(bytes(large.size))
        put(disk, 0, first)
        assert await taken(disk, large) is None
        disk.data[at] ^= 1
        assert await taken(disk, large) is not None
    disk = PlainDisk(bytes(PLAN.size))
    put(disk, 0, sectors.uncommitted(sectors.encode_delta(DELTA)))
    assert await taken(disk) is None
    disk.data[MIB + 5] = 1
    assert await taken(disk) is not None
    strange = replace(sectors.new_delta(GEOMETRIES[-1], SPACE, 10), flags=0x30).summed().encode()
    put(disk, 0, bytes(4) + strange[4:])
    assert await taken(disk, large) is not None
    assert await taken(PlainDisk(first), large) is None


@pytest.mark.parametrize("size", [1, 100, 512, 5000, MIB + 1])
async def test_odd_lengths(size: int) -> None:
    """A file of such a length was made by something else."""
    assert f"is {size} bytes long" in str(await taken(PlainDisk(bytes(size))))


async def test_leases_of_a_lockspace_that_lies_elsewhere() -> None:
    """They may be held, whatever this place's first area says."""
    lease = sectors.new_resource(sectors.new_leader(FILE_GEOMETRY, SPACE, b"disk-1"))
    for place in (0, 1, 3):
        disk = PlainDisk(bytes(PLAN.size))
        put(disk, place * MIB, lease)
        found = f"the lease 'disk-1' of lockspace 'images' (free) at byte {place * MIB}"
        assert found in str(await taken(disk))
    disk = await prepared()
    put(disk, 3 * MIB, sectors.new_resource(sectors.new_leader(FILE_GEOMETRY, b"other", b"disk-1")))
    assert "of lockspace 'other' (free)" in str(await taken(disk))


async def test_a_second_lockspace_or_another_index() -> None:
    """Not within the room of ours."""
    disk = await prepared()
    put(disk, 4 * MIB, sectors.new_lockspace(FILE_GEOMETRY, SPACE, 10))
    assert "lockspace 'images' at byte 4194304" in str(await taken(disk))
    disk = PlainDisk(bytes(PLAN.size))
    await write_index(disk, MIB, FILE_GEOMETRY, b"other", 4)
    assert "the resource index of lockspace 'other' at byte 1048576" in str(await taken(disk))
    disk = PlainDisk(bytes(PLAN.size))
    put(disk, 4 * MIB, sectors.new_lockspace(FILE_GEOMETRY, SPACE, 10))
    assert "lockspace 'images' at byte 4194304" in str(await taken(disk))


async def test_what_lies_behind_the_plan_is_not_looked_at() -> None:
    """A device may be larger than what is made of it; an area that reaches over the end counts."""
    disk = PlainDisk(bytes(PLAN.size) + b"data" * 1024)
    assert await taken(disk) is None
    large = await prepared(Plan(GEOMETRIES[-1], SPACE, 10, 1))
    put(large, 8 * MIB - 4096, b"\1" * 4096)  # within the lockspace's area, behind its records
    assert await taken(large) is None


@pytest.mark.parametrize("shape", GEOMETRIES[:3], ids=str)
@pytest.mark.parametrize("after", range(4))
@pytest.mark.parametrize("torn", [0, 4096, 1 << 19])
async def test_an_init_that_broke_off_can_be_repeated(shape: Geometry, after: int, torn: int) -> None:
    """After any write, and within it; nobody can join before the last."""
    plan = Plan(shape, SPACE, 10, 2)
    disk = PlainDisk(bytes(plan.size))
    disk.writes_left, disk.torn_bytes = after, torn
    with pytest.raises(DiskError):
        await write_plan(disk, plan)
    disk.writes_left = None
    assert await taken(disk, plan) is None
    assert any(disk.data) == bool(await taken(disk, replace(plan, space_name=b"other")))
    await write_plan(disk, plan)
    assert disk.data == (await prepared(plan)).data
