"""Leases found through sanlock's resource index: made once, removed, their slots used again; and what a
failing storage leaves of a change.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest
import trio

from lockfs.backends.base import Image
from lockfs.backends.paxos.index import IndexLayout
from lockfs.backends.paxos.options import PaxosOptions
from lockfs.backends.paxos.places import Place
from lockfs.errors import BackendError, SetupError
from lockfs.paxos.errors import LockspaceFailed
from lockfs.paxos.lockspace import Lockspace
from lockfs.paxos.resource import Resource
from lockfs.paxos.seams import DiskError, DiskTimeout
from lockfs.records import sectors
from lockfs.records.geometry import MIB, geometry
from lockfs.records.results import RecordError

from .lease_io import LeaseIO, pace
from .makers import AREA_LEASES, TrioClock, make_index_area

EIO = OSError(errno.EIO, "Input/output error")
INDEX = MIB
ENTRIES = INDEX + 512
FIRST_SLOT = 3 * MIB


def image(number: int) -> Image:
    return Image(number, b"disk%d.img" % number, -1)


def name_of(number: int) -> bytes:
    return b"i%016x" % number


def soon() -> float:
    return trio.current_time() + 5.0


@dataclass
class Host:
    """One host's layout over the shared area, joined."""

    layout: IndexLayout
    io: LeaseIO
    lockspace: Lockspace
    random: Random
    renewing: trio.CancelScope = field(default_factory=trio.CancelScope)

    async def renew(self) -> None:
        """Stay a member, until `renewing` is cancelled."""
        with self.renewing:
            while True:
                await trio.sleep(max(0.0, self.lockspace.renewal_due - trio.current_time()))
                await self.lockspace.renew()

    async def make(self, number: int) -> Place:
        return await self.layout.make(image(number), soon())

    async def take(self, place: Place) -> Resource:
        """Acquire a lease."""
        resource = Resource(place.area, self.lockspace, place.name, self.random)
        await resource.acquire()
        return resource


class Hosts:
    """Hosts 1, 2, ... of one area."""

    def __init__(self, area: Path, nursery: trio.Nursery) -> None:
        self.area = area
        self._nursery = nursery
        self.made: list[Host] = []

    async def add(self) -> Host:
        number = len(self.made) + 1
        io, random = LeaseIO(), Random(number)
        options = PaxosOptions(io_timeout=1, lease_area=str(self.area))
        layout = IndexLayout(str(self.area), options, None, random, io)
        lockspace_area = await layout.start()
        lockspace = Lockspace(
            lockspace_area, layout.name, number, b"host%d" % number, clock=TrioClock(), timing=options.timing
        )
        host = Host(layout, io, lockspace, random)
        self.made.append(host)
        await lockspace.join()
        await lockspace.renew()
        layout.lockspace = lockspace
        self._nursery.start_soon(host.renew)
        return host


@pytest.fixture
async def hosts(tmp_path: Path) -> AsyncIterator[Hosts]:
    """An area with room for 32 leases, and no host yet."""
    make_index_area(tmp_path / "area")
    async with trio.open_nursery() as nursery:
        made = Hosts(tmp_path / "area", nursery)
        nursery.start_soon(pace, lambda: [host.io for host in made.made])
        try:
            yield made
        finally:
            with trio.CancelScope(shield=True):
                for host in made.made:
                    host.io.heal()
                    host.renewing.cancel()
                    await host.layout.stop()
        nursery.cancel_scope.cancel()


def entry(area: Path, number: int) -> sectors.IndexEntry:
    """What the file has."""
    with open(area, "rb") as file:
        file.seek(ENTRIES + 64 * number)
        return sectors.decode_entry(file.read(64), 0)


def leader_at(area: Path, offset: int) -> sectors.Leader:
    with open(area, "rb") as file:
        file.seek(offset)
        return sectors.decode_leader(file.read(512))


async def index_is_free(host: Host) -> bool:
    """Whether a host can change the index, if it tries for a while."""
    try:
        await host.layout._lock_index(soon())
    except BackendError:
        return False
    await host.layout._unlock_index()
    return True


# --- find and make


async def test_found_is_what_was_made(hosts: Hosts) -> None:
    """The first free slot; the entry, and the lease, as sanlock makes them; other hosts find it."""
    one, other = await hosts.add(), await hosts.add()
    assert await other.layout.find(image(1)) is None
    first, second = await one.make(1), await one.make(2)
    assert (first.area.offset, second.area.offset) == (FIRST_SLOT, FIRST_SLOT + MIB)
    assert entry(hosts.area, 0) == sectors.IndexEntry(FIRST_SLOT, 0, sectors.name_field(name_of(1)))
    expected = sectors.new_leader(geometry(512, MIB), b"images", name_of(1), 250)
    with open(hosts.area, "rb") as file:
        file.seek(FIRST_SLOT)
        assert file.read(MIB) == sectors.new_resource(expected)
    found = await other.layout.find(image(2))
    assert found is not None
    assert found.area.offset == second.area.offset
    assert await other.layout.still(found, image(2))
    assert sorted(await other.layout.listing()) == [1, 2]
    assert await index_is_free(other)


async def test_hosts_that_meet_make_one_lease(hosts: Hosts) -> None:
    """Each image has one entry, whoever was quicker, and all hosts go to the same place."""
    several = [await hosts.add() for _ in range(3)]
    found: dict[int, set[int]] = {1: set(), 2: set()}

    async def make(host: Host, number: int) -> None:
        found[number].add((await host.make(number)).area.offset)

    async with trio.open_nursery() as nursery:
        for host in several:
            for number in found:
                nursery.start_soon(make, host, number)
    assert all(len(places) == 1 for places in found.values())
    names = [entry(hosts.area, number).name for number in range(AREA_LEASES)]
    assert sorted(filter(None, names)) == [name_of(1), name_of(2)]


async def test_a_full_index_says_what_to_do(hosts: Hosts) -> None:
    """One image more than there is room for is refused, and nothing is overwritten."""
    host = await hosts.add()
    for number in range(1, AREA_LEASES + 1):
        await host.make(number)
    before = hosts.area.read_bytes()[INDEX : 2 * INDEX]
    with pytest.raises(BackendError, match=r"All 32 leases of .* are taken.*lockfsctl gc"):
        await host.make(99)
    assert hosts.area.read_bytes()[INDEX : 2 * INDEX] == before
    assert await index_is_free(host)


async def test_an_index_in_use_is_waited_for_until_the_deadline(hosts: Hosts) -> None:
    """Another host that has the index's lease is named by the refusal; when it lets go, all goes on."""
    one, other = await hosts.add(), await hosts.add()
    await one.layout._lock_index(soon())
    start = trio.current_time()
    with pytest.raises(BackendError, match="is being changed"):
        await other.make(1)
    assert trio.current_time() - start < 10.0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(other.make, 1)
        await trio.sleep(1.0)
        await one.layout._unlock_index()
    assert entry(hosts.area, 0).name == name_of(1)


async def test_an_area_that_nobody_prepared(hosts: Hosts, tmp_path: Path) -> None:
    """It is refused with the command that prepares one, and stays as it is."""
    (tmp_path / "empty").write_bytes(bytes(4 * MIB))
    layout = IndexLayout(str(tmp_path / "empty"), PaxosOptions(io_timeout=1), None, Random(0))
    with pytest.raises(SetupError, match="lockfsctl init"):
        await layout.start()
    await layout.stop()
    assert not any((tmp_path / "empty").read_bytes())


async def test_a_damaged_index_is_refused(hosts: Hosts) -> None:
    """A header that states what cannot be is an error that says so, before anything is read by it."""
    host = await hosts.add()
    header = sectors.new_index(geometry(512, MIB), b"images", INDEX, 1 << 31)
    with open(hosts.area, "r+b") as file:
        file.seek(INDEX)
        file.write(header.encode())
    with pytest.raises(RecordError, match="resources"):
        await host.make(1)


async def test_of_a_name_that_is_there_twice_the_first_counts(hosts: Hosts) -> None:
    """As with sanlock, so that both go to one place."""
    one, other = await hosts.add(), await hosts.add()
    first = await one.make(1)
    with open(hosts.area, "r+b") as file:
        file.seek(ENTRIES + 64 * 5)
        file.write(sectors.IndexEntry(FIRST_SLOT + 5 * MIB, 0, sectors.name_field(name_of(1))).encode())
    assert (await other.make(1)).area.offset == first.area.offset


# --- remove


async def test_a_removed_lease_is_gone_for_all(hosts: Hosts) -> None:
    """The entry is cleared, the lease marked, and who still knows the place is told."""
    one, other = await hosts.add(), await hosts.add()
    place = await one.make(1)
    stale = await other.make(1)
    resource = await one.take(place)
    await one.layout.remove(place, image(1))
    resource.forget()
    assert entry(hosts.area, 0) == sectors.FREE_ENTRY
    assert leader_at(hosts.area, FIRST_SLOT).magic == sectors.CLEARED_MAGIC
    with pytest.raises(RecordError, match="removed"):
        await other.take(stale)
    assert not await other.layout.still(stale, image(1))
    assert await other.layout.find(image(1)) is None
    assert await other.layout.listing() == []


async def test_a_slot_is_used_again(hosts: Hosts) -> None:
    """Whoever remembers it for another image finds another name there, and looks anew."""
    one, other = await hosts.add(), await hosts.add()
    place, stale = await one.make(1), await other.make(1)
    resource = await one.take(place)
    await one.layout.remove(place, image(1))
    resource.forget()
    new = await one.make(2)
    assert new.area.offset == stale.area.offset
    with pytest.raises(RecordError, match="not of"):
        await other.take(stale)
    assert not await other.layout.still(stale, image(1))
    again = await other.make(1)
    assert again.area.offset == FIRST_SLOT + MIB
    await (await other.take(again)).release()


# --- a storage that fails


async def test_a_slow_write_keeps_the_index(hosts: Hosts) -> None:
    """While the area of a new lease may still land, nobody else gets its slot, to have it emptied while
    held.
    """
    one, other = await hosts.add(), await hosts.add()
    stuck = one.io.hold("w", where=lambda offset: offset == FIRST_SLOT)
    with trio.move_on_after(2.0):
        await one.make(1)
    assert entry(hosts.area, 0) == sectors.FREE_ENTRY
    for _ in range(3):
        await one.layout.settle()
        with pytest.raises(BackendError, match="is being changed"):
            await other.make(2)
    one.io.drop(stuck)
    stuck.let_go()
    await one.layout.settle()
    place = await other.make(2)
    assert place.area.offset == FIRST_SLOT
    resource = await other.take(place)
    assert leader_at(hosts.area, FIRST_SLOT).owner_id == 2
    await resource.release()


async def test_a_slow_entry_keeps_the_index(hosts: Hosts) -> None:
    """A sector of entries that may still land would undo what others enter meanwhile."""
    one, other = await hosts.add(), await hosts.add()
    stuck = one.io.hold("w", where=lambda offset: offset == ENTRIES, times=1)
    with pytest.raises(DiskTimeout):
        await one.make(1)
    assert not await index_is_free(other)
    with pytest.raises(BackendError, match="earlier write"):
        await one.make(3)
    stuck.let_go()
    await one.layout.settle()
    assert await index_is_free(other)
    assert {(await other.make(number)).area.offset for number in (1, 2)} == {FIRST_SLOT, FIRST_SLOT + MIB}
    assert [entry(hosts.area, number).name for number in (0, 1)] == [name_of(1), name_of(2)]


async def test_a_refused_entry_leaves_the_slot_free(hosts: Hosts) -> None:
    """A write that is refused is an error; the index is free again, the next attempt succeeds."""
    one, other = await hosts.add(), await hosts.add()
    one.io.refuse("w", EIO, where=lambda offset: offset == ENTRIES, times=1)
    with pytest.raises(DiskError):
        await one.make(1)
    assert await index_is_free(other)
    assert (await one.make(1)).area.offset == FIRST_SLOT


async def test_the_index_is_given_back_later(hosts: Hosts) -> None:
    """That the index's lease could not be given back at once does not keep others out for good."""
    one, other = await hosts.add(), await hosts.add()
    guard = 2 * MIB
    failing = one.io.refuse("w", EIO, where=lambda offset: offset == guard)  # its leader
    with pytest.raises(BackendError):
        await one.make(1)
    assert not await index_is_free(one)
    one.io.drop(failing)
    await one.layout.settle()
    assert await index_is_free(other)
    assert (await one.make(1)).area.offset == FIRST_SLOT


async def test_nothing_is_changed_in_doubt(hosts: Hosts) -> None:
    """A host that was stopped with the index's lease in hand writes nothing when it goes on: by then another
    may have the index, and hold what is in the slot.
    """
    one, other = await hosts.add(), await hosts.add()
    await one.layout._lock_index(soon())
    one.renewing.cancel()
    await trio.sleep(one.lockspace.timing.fails + 1.0)
    with pytest.raises(LockspaceFailed, match="cannot be used now"):
        await one.layout._add(name_of(1))
    await trio.sleep(one.lockspace.timing.dead)
    place = await other.make(2)
    resource = await other.take(place)
    with pytest.raises(LockspaceFailed):
        await one.layout._add(name_of(1))
    await one.layout._unlock_index()
    assert leader_at(hosts.area, FIRST_SLOT).owner_id == 2
    assert entry(hosts.area, 0).name == name_of(2)
    await resource.release()
