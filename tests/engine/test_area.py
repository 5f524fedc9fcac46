"""One lease area: whole sectors, in its place, each complaint with its sector; and the errors' sentences."""

from __future__ import annotations

import pytest

from lockfs.paxos.area import Area
from lockfs.paxos.errors import Refused
from lockfs.records.geometry import FILE_GEOMETRY, GEOMETRIES, MIB
from lockfs.records.results import RecordError, Result
from tests.engine.fakes import HostDisk, World, run


def area(offset: int = MIB) -> tuple[World, Area]:
    """One of two areas."""
    world = World()
    return world, Area(HostDisk(world, 1), offset, FILE_GEOMETRY, 3)


def test_sectors() -> None:
    """They are counted from the start of the area."""
    world, place = area()
    run(place.write(3, b"x" * 512))
    assert world.data[MIB + 3 * 512 : MIB + 4 * 512] == b"x" * 512
    assert run(place.read(3)) == b"x" * 512
    assert run(place.read(2, 2)) == bytes(512) + b"x" * 512
    assert run(place.probe()) == bytes(3 * 512) + b"x" * 512 + bytes(4 * 512)
    large = place.shaped(GEOMETRIES[4])
    run(large.write(0, b"y" * 4096))
    with pytest.raises(ValueError, match="512 bytes are not one sector of 4096"):
        run(large.write(0, bytes(512)))


def test_names() -> None:
    """The offset is left out where it is 0."""
    assert area()[1].name == "/leases at byte 1048576"
    assert area(0)[1].name == "/leases"


def test_an_error_is_given_its_place_once() -> None:
    """The inner one stays."""
    place = area(0)[1]

    def complain(sector: int | None) -> None:
        raise RecordError(Result.GENERAL, "it is odd", "elsewhere" if sector else "", sector)

    with pytest.raises(RecordError, match=r"^sector 4 of /leases: it is odd \(-201\)$"):
        place.check(4, complain, None)
    sentence = r"^sector 9 of elsewhere: it is odd \(-201\)$"
    with pytest.raises(RecordError, match=sentence) as caught, place.naming(4):
        place.check(5, complain, 9)
    assert (caught.value.sector, caught.value.area) == (9, "elsewhere")


def test_who_is_in_the_way() -> None:
    """As far as known."""
    assert (Refused(Result.GENERAL, "x").owner_id, Refused(Result.GENERAL, "x").owner_generation) == (0, 0)
    named = Refused(Result.GENERAL, "x", owner=(3, 4))
    assert (named.owner_id, named.owner_generation, named.result) == (3, 4, Result.GENERAL)
