"""Two hosts of the engine do what two sanlock daemons did, and write the same bytes in the same order.

OWN_CHOICES lists where lockfs differs on purpose; docs/paxos-choices.md has the reasons. Everything else must
be equal: number, order, place and bytes of the writes, byte for byte but for what carries no meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from lockfs.paxos.errors import EngineError
from lockfs.paxos.resource import Resource
from lockfs.records import sectors
from lockfs.records.geometry import FILE_GEOMETRY, MIB
from tests.engine.fakes import IO, Host, HostClock, World, run
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
    kind = "delta" if offset < MIB else "dblock" if offset % MIB else "leader"
    return host, offset, tuple(data[start:end] for start, end in RECORD_RANGES[kind])


def replay(step: dict[str, Any], actors: Replay) -> None:
    """Run one step at the times that its writes carry."""
    writes = [op for op in step["ops"] if op["op"] == "write"]
    if step["step"] == "renewals":
        renew_as_in(writes, actors)
        return
    host = int(step["step"][4])
    own = [op for op in writes if op["host"] == host]
    others = [op for op in writes if op["host"] != host]
    if "add_lockspace" in step["step"]:
        actors.world.now = float(stamp_of(own[0]))

        def meanwhile() -> None:
            renew_as_in(others, actors)
            actors.world.now = float(stamp_of(own[1]))

        actors.hosts[host].lockspace.clock = GivenClock(actors.world, meanwhile)
    elif "rem_lockspace" in step["step"]:
        renew_as_in(others, actors)
    else:
        for op in own:
            if op["record"] == "leader" or op["decoded"]["bal"] == op["decoded"]["mbal"]:
                move_clock(op, step, actors)
    result = 0
    try:
        run(actors.command(step["step"]))
    except EngineError as error:
        result = int(error.result)
    assert result == step["result"], step["step"]


def renew_as_in(writes: list[dict[str, Any]], actors: Replay) -> None:
    """The renewals that these writes are."""
    for op in writes:
        actors.world.now = float(stamp_of(op))
        run(actors.hosts[op["host"]].lockspace.renew())


def move_clock(op: dict[str, Any], step: dict[str, Any], actors: Replay) -> None:
    """Have the clock show what a record says before it is made: at the read before it, or now if there is
    none. A proposal is made before the first write of its ballot."""
    world, seconds = actors.world, float(stamp_of(op))
    before = step["ops"][: step["ops"].index(op)]
    reads = sum(other["op"] == "read" for other in before)
    if op["record"] == "dblock":
        reads -= 1

    def move() -> None:
        world.now = max(world.now, seconds)

    if reads > 0:
        actors.hosts[op["host"]].disk.before(move, "read", nth=reads)
    else:
        move()


def test_every_write_is_the_daemons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the results of all commands are."""
    world = start()
    actors = Replay(world, monkeypatch)
    for step in trace():
        before = len(world.io)
        replay(step, actors)
        expected = [meaningful(op) for op in step["ops"] if op["op"] == "write"]
        assert [meaningful(io) for io in world.writes(before)] == expected, step["step"]
    assert len(world.writes()) == 44


def test_every_read_is_the_daemons_or_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same places and order; but for the first probe, and for when others renew."""
    world = start()
    actors = Replay(world, monkeypatch)
    for step in trace():
        before = len(world.io)
        replay(step, actors)
        who = {1, 2} if step["step"] == "renewals" else {int(step["step"][4])}
        expected = [op for op in step["ops"] if op["op"] == "read" and op["host"] in who]
        expected = [op for op in expected if op["length"] != 4096]
        found = [io for io in world.io[before:] if io.op == "read" and io.host in who]
        places = [(op["host"], op["offset"]) for op in expected]
        assert [(io.host, io.offset) for io in found] == places, step["step"]
        for io, op in zip(found, expected, strict=True):
            assert io.length == (op["length"] if op["offset"] < MIB else min(op["length"], READ_BYTES))


def test_a_byte_too_many_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison is one: a release that forgets its mark is caught."""
    monkeypatch.setattr("lockfs.paxos.contest.released", lambda dblock: dblock)
    with pytest.raises(AssertionError, match="release"):
        test_every_write_is_the_daemons(monkeypatch)


def test_the_choices_are_documented() -> None:
    """Each of them is in the document that explains them."""
    text = (Path(__file__).parents[2] / "docs" / "paxos-choices.md").read_text(encoding="utf-8")
    for choice in OWN_CHOICES:
        assert f"| {choice} |" in text, choice
