"""Asking the owner of a lease to let go (section 16 of the format)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lockfs.paxos.area import NUMBERS_END, Area
from lockfs.paxos.errors import EngineError, LockspaceFailed
from lockfs.paxos.requests import concerns, read_request, request
from lockfs.records import sectors
from lockfs.records.geometry import FILE_GEOMETRY, GEOMETRIES, MIB
from lockfs.records.results import RecordError, Result
from lockfs.records.sectors import FORCE_GRACEFUL, FORCE_KILL, Request
from tests.engine.fakes import NAME, Host, World, run, two_hosts


def area_of(host: Host) -> Area:
    """The lease's."""
    return Area(host.disk, MIB, FILE_GEOMETRY, 1)


def held_by_two() -> tuple[World, Host, Host]:
    """The second of two hosts holds the lease."""
    world, one, two = two_hosts()
    run(two.resource().acquire())
    return world, one, two


def present(world: World) -> Request:
    """What is asked for."""
    return sectors.decode_request(world.sector(MIB + 512))


@pytest.mark.parametrize("mode", [FORCE_KILL, FORCE_GRACEFUL])
def test_asking(mode: int) -> None:
    """For the next version; the owner is told in the next renewals and sees it."""
    world, one, two = held_by_two()
    assert run(request(area_of(one), one.lockspace, NAME, mode)) == 2
    assert present(world) == Request(lver=2, force_mode=mode)
    one.lockspace.call(2)
    world.advance(4)
    assert two.lockspace.watch.take_callers() == {1}
    assert one.lockspace.watch.take_callers() == set()
    seen = run(read_request(area_of(two)))
    assert concerns(seen, 1)
    assert not concerns(seen, 2)


def test_asking_again() -> None:
    """Is nothing new, unless it asks for more."""
    world, one, _ = held_by_two()
    run(request(area_of(one), one.lockspace, NAME, FORCE_GRACEFUL))
    before = len(world.writes())
    run(request(area_of(one), one.lockspace, NAME, FORCE_GRACEFUL))
    assert len(world.writes()) == before
    run(request(area_of(one), one.lockspace, NAME, FORCE_KILL))
    assert present(world).force_mode == FORCE_KILL


def test_a_free_lease() -> None:
    """There is nobody to ask."""
    world, one, _ = two_hosts()
    before = len(world.io)
    assert run(request(area_of(one), one.lockspace, NAME, FORCE_GRACEFUL)) == 0
    assert len(world.io) == before + 1


def test_a_newer_request() -> None:
    """Somebody who knows more asks."""
    world, one, _ = held_by_two()
    world.put(MIB + 512, Request(lver=3).encode(512))
    with pytest.raises(EngineError, match="version 3 of the lease is asked for") as caught:
        run(request(area_of(one), one.lockspace, NAME, FORCE_KILL))
    assert caught.value.result is Result.REQUEST_NEWER
    assert present(world).lver == 3


@pytest.mark.parametrize(
    ("change", "result"),
    [({"magic": 1}, Result.REQUEST_MAGIC), ({"version": 0x20001}, Result.REQUEST_VERSION)],
)
def test_a_damaged_request(change: dict[str, int], result: Result) -> None:
    """Is named and left alone."""
    world, one, _ = held_by_two()
    world.put(MIB + 512, replace(Request(), **change).encode(512))
    before = len(world.writes())
    with pytest.raises(RecordError, match="sector 1 of /leases at byte 1048576") as caught:
        run(request(area_of(one), one.lockspace, NAME, FORCE_KILL))
    assert caught.value.result is result
    assert len(world.writes()) == before


def test_a_version_without_a_next() -> None:
    """Cannot be asked for."""
    world, one, _ = held_by_two()
    world.change_leader(replace(world.leader(), lver=NUMBERS_END))
    with pytest.raises(RecordError, match="cannot be had by counting"):
        run(request(area_of(one), one.lockspace, NAME, FORCE_KILL))


def test_in_doubt() -> None:
    """Nothing is written."""
    world, one, _ = held_by_two()
    world.jump(8)
    before = len(world.writes())
    with pytest.raises(LockspaceFailed):
        run(request(area_of(one), one.lockspace, NAME, FORCE_KILL))
    assert len(world.writes()) == before


def test_a_lease_of_another_geometry() -> None:
    """The record lies where the leader says."""
    shape = GEOMETRIES[4]
    world = World(shape=shape).make()
    one, two = Host(world, 1).join(), Host(world, 2).join()
    run(two.resource().acquire())
    world.shape = FILE_GEOMETRY  # let the disk take sectors of 512
    area = Area(one.disk, shape.area_size, FILE_GEOMETRY, 1)
    assert run(request(area, one.lockspace, NAME, FORCE_KILL)) == 2
    assert sectors.decode_request(world.sector(shape.area_size + 4096)).lver == 2


def test_what_concerns_nobody() -> None:
    """A record that was never used, or one of an unknown mode."""
    assert not concerns(Request(), 0)
    assert not concerns(Request(lver=5, force_mode=3), 1)
