"""Who holds a lease, as anybody can read it (section 7 of the format)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lockfs.paxos.area import Area
from lockfs.paxos.owners import ownership
from lockfs.records import sectors
from lockfs.records.geometry import FILE_GEOMETRY, GEOMETRIES, MIB
from lockfs.records.results import RecordError, Result
from lockfs.records.sectors import Dblock, ModeBlock
from tests.engine.fakes import NAME, SPACE, HostDisk, World, run, two_hosts
from tests.records.loading import load


def who(world: World) -> tuple[bool, tuple[tuple[int, int], ...]]:
    """Whether it is shared, and by whom it is held."""
    found = run(ownership(Area(HostDisk(world, 9), MIB, FILE_GEOMETRY, 1), SPACE, NAME))
    return found.shared, found.hosts


def test_a_life() -> None:
    """Free, exclusive, free, shared, free."""
    world, one, two = two_hosts()
    mine, its = one.resource(), two.resource()
    assert who(world) == (False, ())
    run(mine.acquire())
    assert who(world) == (False, ((1, 1),))
    run(mine.release())
    assert who(world) == (False, ())
    run(its.acquire(shared=True))
    run(mine.acquire(shared=True))
    assert who(world) == (True, ((1, 1), (2, 1)))
    run(its.release())
    run(mine.release())
    assert who(world) == (False, ())


def test_an_owner_that_let_go_before_it_was_committed() -> None:
    """Is none; who shares then counts. Its mark says nothing of a leader that it wrote itself."""
    world, one, _ = two_hosts()
    run(one.resource().acquire())
    leader, dblock = world.leader(), replace(world.record(1).dblock, flags=sectors.RELEASED)
    world.change_record(1, dblock, ModeBlock(sectors.SHARED, 1))
    assert who(world) == (False, ((1, 1),))
    world.change_leader(replace(leader, write_id=2))
    assert who(world) == (True, ((1, 1),))
    world.change_record(1, dblock)
    assert who(world) == (False, ())
    world.change_record(1, Dblock())
    assert who(world) == (False, ((1, 1),))


@pytest.mark.parametrize("nth", [1, 2])
def test_a_damaged_leader(nth: int) -> None:
    """At the first look or the second."""
    world, _, _ = two_hosts()
    disk = HostDisk(world, 9)

    def damage() -> None:
        world.data[MIB + 30] ^= 1

    disk.before(damage, "read", MIB, nth=nth)
    with pytest.raises(RecordError, match="sector 0 of /leases at byte 1048576") as caught:
        run(ownership(Area(disk, MIB, FILE_GEOMETRY, 1), SPACE, NAME))
    assert caught.value.result is Result.LEADER_CHECKSUM


@pytest.mark.parametrize(
    ("name", "shared", "ids"),
    [
        ("res-init-4096-2M", False, []), ("res-ex-host1-4096-8M", False, [1]),
        ("res-released-4096-8M", False, []),
        ("res-shared-h1-h2-4096-8M", True, [1, 2]), ("res-shared-h1-h2-512-1M", True, [1, 2]),
    ],
)  # fmt: skip
def test_what_sanlock_wrote(name: str, shared: bool, ids: list[int]) -> None:
    """In any geometry, whatever was assumed."""
    vector = load(name)
    leader = sectors.decode_leader(vector.kept)
    world = World(areas=1, shape=vector.shape)
    world.put(0, vector.area())
    world.shape = FILE_GEOMETRY
    area = Area(HostDisk(world, 9), 0, GEOMETRIES[0], 1)
    found = run(ownership(area, leader.space_name, leader.resource_name))
    assert (found.shared, [host_id for host_id, _ in found.hosts]) == (shared, ids)
    assert found.leader == leader
