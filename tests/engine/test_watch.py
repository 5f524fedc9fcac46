"""Watching other hosts (section 11 of the format)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lockfs.paxos.timing import Timing
from lockfs.paxos.watch import HostState, Watch
from lockfs.records import sectors
from lockfs.records.geometry import GEOMETRIES, Geometry
from tests.engine.fakes import SPACE, World

SELF, OTHER = 3, 7
F, D = 8, 68


class Sky:
    """A lockspace that is changed by hand, and the watch over it."""

    def __init__(self, shape: Geometry = GEOMETRIES[0], other: int = OTHER) -> None:
        self.world = World(areas=2, shape=shape).make()
        self.other = other
        self.watch = Watch(SPACE, SELF, Timing(1), shape)

    def show(self, now: float, bitmap: bytes = b"", **change: Any) -> Sky:
        """Change the other's record and let the watch look."""
        if change:
            leader = replace(self.world.delta(self.other), **change)
            self.world.change_delta(self.other, leader, bitmap)
        self.watch.observe(bytes(self.world.data[: self.world.shape.area_size]), now)
        return self

    def join(self, now: float, timestamp: int = 1, **change: Any) -> Sky:
        """The other joins."""
        name = sectors.name_field(b"other")
        return self.show(
            now, owner_id=self.other, owner_generation=4, timestamp=timestamp, resource_field=name, **change
        )

    def state(self, now: float) -> HostState:
        """Of the other."""
        return self.watch.state(self.other, now)


def test_before_the_first_pass() -> None:
    """Nothing is known, so everybody may be alive."""
    sky = Sky()
    assert sky.state(5) is HostState.UNKNOWN
    assert sky.watch.sight(OTHER) is None
    assert sky.watch.may_be_alive(OTHER, 1, 1e9)
    assert sky.watch.hosts() == {}


def test_states() -> None:
    """The whole table, in its order, at its limits."""
    sky = Sky().show(10)
    assert sky.state(10) is HostState.FREE
    sky = Sky().join(10)
    assert sky.state(10) is sky.state(10 + F) is HostState.UNKNOWN
    assert sky.state(10 + F + 0.1) is sky.state(10 + D) is HostState.FAIL
    assert sky.state(10 + D + 0.1) is HostState.DEAD
    sky.show(12, timestamp=2)
    assert sky.state(12) is sky.state(12 + F) is HostState.LIVE
    assert sky.state(12 + F + 0.1) is sky.state(12 + D) is HostState.FAIL
    assert sky.state(12 + D + 0.1) is HostState.DEAD
    sky.show(13, timestamp=0)
    assert sky.state(13) is sky.state(1e9) is HostState.FREE


def test_this_host_is_live_unless_free() -> None:
    """Its age is another matter (Lockspace.standing)."""
    sky = Sky(other=SELF)
    assert sky.show(10).state(1e9) is HostState.FREE
    assert sky.join(11).state(1e9) is HostState.LIVE


def test_a_host_that_joins_later_is_live_at_once() -> None:
    """Its sector changed from one pass to the next."""
    sky = Sky().show(10).join(11)
    assert sky.state(11) is HostState.LIVE


def test_each_host_has_its_own_times() -> None:
    """By the io_timeout that its sector states; none stated: as ours."""
    sky = Sky().join(10, io_timeout=3)
    assert sky.state(10 + 24) is HostState.UNKNOWN
    assert sky.state(10 + 24.1) is HostState.FAIL
    assert sky.state(10 + 84.1) is HostState.DEAD
    assert sky.watch.longest_io() == 3
    assert Sky().join(10, io_timeout=0).state(10 + D + 1) is HostState.DEAD


def test_an_equal_record_is_silence_whatever_else_the_sector_says() -> None:
    """Owner, generation and timestamp count, not events or bits; calls come with a new timestamp only."""
    sky = Sky().join(10)
    sky.show(12, bitmap=sectors.bitmap_with(frozenset({SELF})), write_id=5)
    assert sky.watch.sight(OTHER).last_live == 10  # type: ignore[union-attr]
    assert sky.watch.last_check == 12
    assert sky.watch.first_check == 10
    assert sky.watch.take_callers() == set()
    sky.show(13, bitmap=sectors.bitmap_with(frozenset({SELF, 9})), timestamp=2)
    sky.show(14, bitmap=sectors.bitmap_with(frozenset({9})), timestamp=3)
    assert sky.watch.take_callers() == {OTHER}
    assert sky.watch.take_callers() == set()


@pytest.mark.parametrize("change", [{"magic": 1}, {"space_field": sectors.name_field(b"x")}])
def test_a_damaged_record_is_a_sign_of_life(change: dict[str, Any]) -> None:
    """Somebody wrote it. Who it was before stays known."""
    sky = Sky().join(10, io_timeout=2).show(15, timestamp=9, owner_id=5, io_timeout=1, **change)
    sight = sky.watch.sight(OTHER)
    assert sight is not None
    assert (sight.last_live, sight.timestamp) == (15, 9)
    assert (sight.owner_id, sight.generation, sight.io_timeout, sight.name) == (OTHER, 4, 2, b"other")


def test_a_wrong_checksum_is_not_looked_at() -> None:
    """As with the daemon."""
    sky = Sky().join(10)
    sky.world.data[sky.world.delta_offset(OTHER) + 152] ^= 2
    sky.show(15)
    assert sky.watch.sight(OTHER).last_live == 15  # type: ignore[union-attr]


def test_who_may_be_alive() -> None:
    """Dead is who left, who lives another life by now, or who was silent for long enough."""
    sky = Sky().join(10)
    may = sky.watch.may_be_alive
    assert may(OTHER, 4, 10 + D)
    assert not may(OTHER, 4, 10 + D + 0.1)
    assert not may(OTHER, 3, 10)
    assert may(OTHER, 5, 10)
    sky.show(11, timestamp=0)
    assert not may(OTHER, 4, 11)
    assert may(2001, 1, 1e9)


def test_the_first_sight_is_no_proof_of_life() -> None:
    """It counts as the moment from which on the host is silent, and as fresh."""
    sky = Sky().join(10)
    sight = sky.watch.sight(OTHER)
    assert sight is not None
    assert sky.watch.fresh(sight)
    sky.show(12)
    assert not sky.watch.fresh(sight)
    assert sky.watch.silent_since(sight) == 10
    assert sky.watch.dead_at(sight) == 10 + D
    never = sky.watch.sight(9)
    assert never is not None
    assert not sky.watch.fresh(never)
    assert sky.watch.silent_since(never) == 10


@pytest.mark.parametrize("shape", GEOMETRIES, ids=str)
def test_every_sector_is_seen(shape: Geometry) -> None:
    """In any geometry, the first and the last and those at the edges of what is compared at once."""
    edge = (64 << 10) // shape.sector_size
    for host_id in (1, 2, edge, min(edge + 1, shape.hosts_max), shape.hosts_max):
        sky = Sky(shape, host_id).show(9).join(10)
        assert sky.watch.sight(host_id).last_live == 10  # type: ignore[union-attr]
        sky.show(12, timestamp=2)
        assert sky.watch.sight(host_id).last_live == 12  # type: ignore[union-attr]
        assert [host for host, sight in sky.watch.hosts().items() if sight.last_live] == [host_id]


def test_an_id_that_is_made_anew() -> None:
    """Its record is again as those that nobody has used, and it is free; it is no less seen for that."""
    sky = Sky().show(10)
    unused = sky.world.delta(OTHER)
    sky.join(12, timestamp=100)
    assert sky.state(12) is HostState.LIVE
    sky.world.change_delta(OTHER, unused)
    sky.show(14)
    assert sky.state(14) is HostState.FREE
    sight = sky.watch.sight(OTHER)
    assert sight is not None and sight.generation == 0
    sky.join(16, timestamp=100)
    assert sky.state(16) is HostState.LIVE
