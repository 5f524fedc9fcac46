"""Two hosts of the engine do what two sanlock daemons did, and write the same bytes in the same order.

OWN_CHOICES lists where lockfs differs on purpose; docs/paxos-choices.md has the reasons. Everything else must
be equal: number, order, place and bytes of the writes, byte for byte but for what carries no meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from lockfs.paxos.errors import EngineError
from lockfs.paxos.resource import Resource
from lockfs.records import sectors
from lockfs.records.geometry import FILE_GEOMETRY, MIB
from tests.engine.fakes import IO, Host, HostClock, HostDisk, World, run
from tests.records.loading import RECORD_RANGES, trace

OWN_CHOICES = {
    "area reads": "of a resource only the sectors of its hosts are read, not the whole area",
    "first probe": "the 4096 bytes that tell the geometry are read once for an area, not at each join",
    "renewals": "which renewal falls into which command is the daemon's timing: they are given by the trace",
    "stale memory": "what the daemon leaves behind the records of its sectors is written as zeros",
}
SPACE, HOSTS = b"trspace", (1, 2)
READ_BYTES = (2 + FILE_GEOMETRY.hosts_max) * 512


def start() -> World:
    """The area as it was initialised: a lockspace and two leases."""
    world = World(areas=3)
    world.put(0, sectors.new_lockspace(FILE_GEOMETRY, SPACE, 1))
    for number, name in enumerate((b"resA", b"resB"), 1):
        world.put(number * MIB, sectors.new_resource(sectors.new_leader(FILE_GEOMETRY, SPACE, name)))
    return world


class Replay:
    """Both hosts, driven by the trace's commands at the trace's times."""

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tests.engine.fakes.SPACE", SPACE)
        self.world = world
        self.hosts = {number: Host(world, number) for number in HOSTS}
        self.resources: dict[tuple[int, bytes], Resource] = {}

    def resource(self, host: int, name: bytes, offset: int) -> Resource:
        """One host's view of a lease."""
        from dataclasses import replace
        from random import Random

        if (host, name) not in self.resources:
            lockspace = self.hosts[host].lockspace
            area = replace(lockspace.area, offset=offset)
            self.resources[host, name] = Resource(area, lockspace, name, Random(0))
        return self.resources[host, name]

    def command(self, words: str) -> Coroutine[Any, Any, None]:
        """What a step's command is for the engine."""
        host, _, rest = words.partition(": ")
        number, (verb, _, place) = int(host[-1]), rest.split(" ")[:3]
        if verb.endswith("_lockspace"):
            lockspace = self.hosts[number].lockspace
            return self.joined(number) if verb.startswith("add") else lockspace.leave()
        _, name, _, offset, *shared = place.split(":")
        resource = self.resource(number, name.encode(), int(offset[:-1]) * MIB)
        if verb == "release":
            return resource.release()
        act: Callable[..., Coroutine[Any, Any, None]] = (
            resource.acquire if verb == "acquire" else resource.convert
        )
        return act(shared=bool(shared))

    async def joined(self, host: int) -> None:
        """Join, and renew at once as the daemon does."""
        await self.hosts[host].lockspace.join()
        await self.hosts[host].lockspace.renew()


class GivenClock(HostClock):
    """Sleeps as long as the trace has it, with the other host's renewals meanwhile."""

    def __init__(self, world: World, meanwhile: Callable[[], None]) -> None:
        super().__init__(world)
        self._meanwhile = meanwhile

    async def sleep(self, seconds: float) -> None:
        """Only a join sleeps in the trace."""
        self.slept.append(seconds)
        self._meanwhile()


def stamp_of(op: dict[str, Any]) -> int:
    """The writer's clock when it made the record."""
    decoded = op["decoded"]
    stamps = {"delta": "timestamp", "leader": "write_timestamp", "dblock": "inp3"}
    return int(decoded[stamps[op["record"]]])


def meaningful(io: IO | dict[str, Any]) -> tuple[int, int, tuple[bytes, ...]]:
    """Who wrote where, and the bytes that carry meaning."""
    if isinstance(io, IO):
        host, offset, data = io.host, io.offset, io.data
    else:
        host, offset = io["host"], io["offset"]
        data = bytes.fromhex(io["data_hex"]).ljust(io["length"], b"\0")
    if offset < MIB:
        kind = "delta"
    else:
        kind = "dblock" if offset % MIB else "leader"
    return host, offset, tuple(data[start:end] for start, end in RECORD_RANGES[kind])


def replay(step: dict[str, Any], actors: Replay) -> None:
    """Run one step at the times that its writes carry."""
    world, writes = actors.world, [op for op in step["ops"] if op["op"] == "write"]
    if step["step"] == "renewals":
        for op in writes:
            world.now = float(stamp_of(op))
            run(actors.hosts[op["host"]].lockspace.renew())
        return
    host = int(step["step"][4])
    own = [op for op in writes if op["host"] == host]
    others = [op for op in writes if op["host"] != host]

    def other_renews() -> None:
        for op in others:
            world.now = float(stamp_of(op))
            run(actors.hosts[op["host"]].lockspace.renew())
        if own[1:]:
            world.now = max(world.now, float(stamp_of(own[1])))

    stamps = [stamp_of(op) for op in own if op["record"] != "dblock" or op["decoded"]["inp3"]]
    if "_lockspace" in step["step"]:
        stamps = [stamp_of(own[0])] if own[1:] else []
        actors.hosts[host].lockspace.clock = GivenClock(world, other_renews)
        if not own[1:]:
            other_renews()
    elif "acquire" in step["step"] or "convert" in step["step"]:
        stamps = stamps[:1]
    else:
        stamps = stamps[-1:]
    world.now = max(world.now, *map(float, stamps), 0.0)
    later_leader(step, actors, host)
    result = 0
    try:
        run(actors.command(step["step"]))
    except EngineError as error:
        result = int(error.result)
    assert result == step["result"], step["step"]


def later_leader(step: dict[str, Any], actors: Replay, host: int) -> None:
    """A leader that was written a second after the ballot: have the clock move in between."""
    leaders = [op for op in step["ops"] if op.get("record") == "leader"]
    for number, op in enumerate(leaders, 1):
        seconds = float(stamp_of(op))
        world, disk = actors.world, actors.hosts[host].disk
        # Before the read that precedes it, for the record is made before the write is called.
        reads_before = [o for o in step["ops"][: step["ops"].index(op)] if o["op"] == "read"]
        disk.before(
            lambda seconds=seconds: setattr(world, "now", max(world.now, seconds)), "read", nth=len(reads_before)
        )
        del number


def test_every_write_is_the_daemons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the results of all commands are."""
    world = start()
    actors = Replay(world, monkeypatch)
    for step in trace():
        before = len(world.io)
        replay(step, actors)
        expected = [meaningful(op) for op in step["ops"] if op["op"] == "write"]
        assert [meaningful(io) for io in world.writes(before)] == expected, step["step"]


def test_every_read_is_the_daemons_or_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """And between the same writes, but for the first probe."""
    world = start()
    actors = Replay(world, monkeypatch)
    for step in trace():
        before = len(world.io)
        replay(step, actors)
        expected = [op for op in step["ops"] if op["op"] == "read" and op["length"] != 4096]
        expected = [op for op in expected if "renewals" in step["step"] or op["host"] == int(step["step"][4])]
        found = [io for io in world.io[before:] if io.op == "read"]
        if "renewals" not in step["step"]:
            found = [io for io in found if io.host == int(step["step"][4])]
        places = [(io.host, io.offset) for io in found]
        assert places == [(op["host"], op["offset"]) for op in expected], step["step"]
        for io, op in zip(found, expected, strict=True):
            limit = min(op["length"], READ_BYTES) if op["offset"] >= MIB else op["length"]
            assert io.length == limit


def test_the_choices_are_documented() -> None:
    """Each of them is in the document that explains them."""
    from pathlib import Path

    text = (Path(__file__).parents[2] / "docs" / "paxos-choices.md").read_text(encoding="utf-8")
    for choice in OWN_CHOICES:
        assert f"**{choice.capitalize()}" in text, choice
    assert HostDisk.__mro__[1].__name__ == "Disk"
