"""Leases in one file or device that was prepared by hand, found through sanlock's resource index.

The lockspace lies at the start, the index behind it, then the index's own lease, then the resources (section
18 of the format). The index is changed only by whoever holds its lease; a look-up needs no lease, for an
entry is written after its resource and cleared before it.

Invariant: the index's lease is not given back while a write of ours, to the index or to a free slot, may
still land. Behind the back of the next one who changes the index it would empty a lease that is held.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from random import Random

import trio

from lockfs.backends.base import Image
from lockfs.backends.paxos.files import check_geometry, unusable
from lockfs.backends.paxos.options import PaxosOptions
from lockfs.backends.paxos.places import BUSY_LOOK_S, HOSTS_DEFAULT, START_S, Layout, Place
from lockfs.errors import BackendError, SetupError
from lockfs.paxos.area import Area
from lockfs.paxos.errors import Refused
from lockfs.paxos.lockspace import Lockspace, find_lockspace, stamp
from lockfs.paxos.recall import take_over
from lockfs.paxos.resource import Hold, Resource
from lockfs.records import sectors
from lockfs.records.geometry import GEOMETRIES
from lockfs.records.sectors import IndexEntry, IndexHeader
from lockfs.storage.disk import RENEWAL_PLACES, DirectDisk
from lockfs.storage.leftover import wait_for_writes
from lockfs.storage.rawio import RawIO

AREA_WRITE_S = 60.0
"""How long writing one whole area may take, seconds; as sanlock has it."""
SETTLE_S = 5.0
"""How long giving the index's lease back may take before that is left for later, seconds."""
CONTEND_S = 1.0
"""How long one attempt at the index's lease goes on against hosts that contend for it, seconds."""
_NAME = b"i%016x"

_log = logging.getLogger("lockfs.paxos")


class IndexLayout(Layout):
    """Lockspace, index and leases in one file or device."""

    def __init__(
        self,
        path: str,
        options: PaxosOptions,
        lockspace: bytes | None,
        random: Random,
        io: RawIO | None = None,
    ) -> None:
        """`lockspace` None: whichever lies there. `io` reaches the area, the kernel's by default.

        `changing` is told before the index's lease is taken, and when it was given back. `left_changing`: a
        former process of this membership may have left it taken.
        """
        self._io = io
        self._path = path
        self._options = options
        self._name = lockspace
        self._random = random
        self._renewals: DirectDisk | None = None
        self._disk: DirectDisk | None = None
        self._index: Area | None = None
        self._slots: dict[bytes, int] = {}
        self._changing = trio.Lock()
        self._guard: Resource | None = None
        self._guarded: Lockspace | None = None
        self._under_way: set[int] = set()
        self.lockspace: Lockspace | None = None
        self.changing: Callable[[bool], None] = lambda begins: None
        self.left_changing = False

    @property
    def name(self) -> bytes:
        """The lockspace's name, known after `start` at the latest."""
        return self._name or b""

    async def start(self) -> Area:
        """Open the area and check its index; see Layout.start. Nothing is made: that is `lockfsctl init`."""
        timeout = self._options.io_timeout
        self._renewals = await DirectDisk.open(self._path, places=RENEWAL_PLACES, io=self._io)
        self._disk = await DirectDisk.open(self._path, io=self._io)
        try:
            found = Area(self._renewals, 0, GEOMETRIES[0], max(START_S, timeout))
            area, first = await find_lockspace(found, self._name)
            self._name = first.space_name
            area = replace(area, timeout=timeout)
            self._index = Area(self._disk, area.shape.area_size, area.shape, timeout)
            await self._header(self._index)
        except BackendError as error:
            prepare = f"prepare one with `lockfsctl init {self._path} --lockspace NAME`"
            raise SetupError(
                unusable(f"{self._path} cannot be used as a lease area", error, prepare)
            ) from error
        check_geometry(self._options, area.shape, self._path)
        return area

    async def in_place(self) -> bool:
        """Whether the path still leads to the open file; a device may get a new name. See Layout.in_place."""
        disk = self._renewals
        if disk is None or disk.is_device:
            return True
        with trio.move_on_after(self._options.io_timeout):
            try:
                status = await trio.to_thread.run_sync(os.stat, self._path, abandon_on_cancel=True)
            except FileNotFoundError:
                return False
            except OSError:
                return True  # whether the storage answers, renewals find out
            return (status.st_dev, status.st_ino) == disk.identity
        return True

    async def _header(self, index: Area) -> IndexHeader:
        header = sectors.decode_index(await index.read(0))
        index.check(0, sectors.check_index, header, index.shape, self.name, index.offset)
        return header

    def name_of(self, image: Image) -> bytes:
        """The name of the image's lease."""
        return _NAME % image.inode

    async def quiet(self, name: bytes | None) -> None:
        """Wait for late writes to the area, which has the lockspace and all leases; see Layout.quiet."""
        look = partial(wait_for_writes, self._path)
        with trio.move_on_after(self._options.io_timeout) as limit:
            try:
                await trio.to_thread.run_sync(look, abandon_on_cancel=True)
            except OSError as error:
                raise BackendError(f"{self._path} cannot be used: {error.strerror}.") from error
        if limit.cancelled_caught:
            raise BackendError(f"{self._path} does not answer.")

    async def find_named(self, name: bytes) -> Place | None:
        """Find the lease's slot, remembered or by a look at the index; see Layout.find_named."""
        if name not in self._slots and await self._look_up(name) is None:
            return None
        return self._place(name)

    def _place(self, name: bytes) -> Place:
        index = self._started()
        area = Area(index.disk, self._slots[name], index.shape, index.timeout)
        return Place(area, name, index.shape.hosts_max)

    async def _look_up(self, name: bytes) -> int | None:
        """Read the index and remember its entries; the place of the lease, None if it is not there.

        Should a name be there twice, the first counts, as with sanlock.
        """
        entries = await self._entries()
        self._slots = {entry.name: entry.offset for entry in reversed(entries) if entry.offset}
        return self._slots.get(name)

    async def _entries(self) -> list[IndexEntry]:
        index = self._started()
        header = await self._header(index)
        size = index.shape.sector_size
        last, _ = sectors.entry_place(header.max_resources - 1, size)
        table = await index.read(0, last + 1)
        places = (sectors.entry_place(number, size) for number in range(header.max_resources))
        return [sectors.decode_entry(table, sector * size + at) for sector, at in places]

    async def make(self, image: Image, deadline: float) -> Place:
        """Find or make the image's lease; see Layout.make. Made under the index's lease."""
        name = self.name_of(image)
        place = await self.find(image)
        if place is not None:
            return place
        async with self._changing:
            await self._lock_index(deadline)
            try:
                if await self._look_up(name) is None:
                    self._slots[name] = await self._add(name)
            finally:
                await self._unlock_index()
        return self._place(name)

    async def _lock_index(self, deadline: float) -> None:
        """Hold the index's own lease; raises BackendError if that takes longer than the deadline."""
        lockspace = self.lockspace
        if lockspace is None:
            raise BackendError(f"The lockspace of {self._path} is not joined.")
        guard = self._guard_in(lockspace)
        await self._unlock_index()
        if self.left_changing:
            raise BackendError(f"The index of {self._path} cannot be changed: it is being put in order.")
        if guard.hold is not Hold.NONE:
            raise BackendError(f"The index of {self._path} cannot be changed: a former change has not ended.")
        while True:
            self.changing(True)
            try:
                await guard.acquire(give_up_at=lockspace.clock.now() + CONTEND_S)
                return
            except Refused as refusal:
                await self._unlock_index()
                if trio.current_time() >= deadline:
                    raise BackendError(f"The index of {self._path} is being changed: {refusal}") from refusal
                await trio.sleep(BUSY_LOOK_S * (0.5 + self._random.random()))
            except BaseException:
                await self._unlock_index()
                raise

    def _guard_in(self, lockspace: Lockspace) -> Resource:
        """The index's lease; one of a former membership is void."""
        index = self._started()
        if self._guard is None or self._guarded is not lockspace:
            area = Area(index.disk, index.offset + index.shape.area_size, index.shape, index.timeout)
            self._guard = Resource(area, lockspace, sectors.INDEX_LEASE_NAME, self._random)
            self._guarded = lockspace
        return self._guard

    async def _unlock_index(self) -> None:
        """Give the index's lease back, also in a cancelled task; what does not succeed is tried later."""
        guard = self._guard
        if guard is None:
            return
        with trio.CancelScope(shield=True, deadline=trio.current_time() + SETTLE_S):
            try:
                for offset in sorted(self._under_way):
                    await self._wait_for_write(offset)
                if self.left_changing and self._guarded is not None:
                    await take_over(guard, self._guarded)
                await guard.release()
                await guard.settle()
                self.left_changing = False
                self.changing(False)
            except BackendError as error:
                _log.debug("the index of %s is not given back yet: %s", self._path, error)

    async def _wait_for_write(self, offset: int) -> None:
        """Be sure that the write to `offset` that failed or was cancelled has landed or never will."""
        index = self._started()
        await index.disk.read(offset, index.shape.sector_size, index.timeout)
        self._under_way.discard(offset)

    async def settle(self) -> None:
        """Give back the index's lease if that failed before; see Layout.settle."""
        if self.left_changing and self.lockspace is not None:
            self._guard_in(self.lockspace)
        guard = self._guard
        if guard is None or self._changing.locked():
            return
        if self.left_changing or self._under_way or guard.unsettled or guard.hold is not Hold.NONE:
            async with self._changing:
                await self._unlock_index()

    async def _add(self, name: bytes) -> int:
        """Take the first free entry, the caller having the index's lease; returns the resource's offset."""
        index = self._started()
        entries = await self._entries()
        number = next((number for number, entry in enumerate(entries) if not entry.offset), None)
        if number is None:
            raise BackendError(f"All {len(entries)} leases of {self._path} are taken; run `lockfsctl gc`.")
        offset = sectors.entry_area(number, index.shape, index.offset)
        leader = sectors.new_leader(index.shape, self.name, name, self._hosts())
        await self._write(offset, sectors.new_resource(leader), AREA_WRITE_S)
        await self._write_entry(number, IndexEntry(offset, 0, sectors.name_field(name)))
        return offset

    def _hosts(self) -> int:
        """For how many hosts a lease is made; 0: all that fit."""
        shape = self._started().shape
        return min(HOSTS_DEFAULT, shape.hosts_max) if (self._options.host_id or 0) <= HOSTS_DEFAULT else 0

    async def _write_entry(self, number: int, entry: IndexEntry) -> None:
        """Change one entry: its sector is read and written whole, under the index's lease."""
        index = self._started()
        sector, at = sectors.entry_place(number, index.shape.sector_size)
        old = await index.read(sector)
        packed = entry.encode()
        changed = old[:at] + packed + old[at + len(packed) :]
        await self._write(index.offset + sector * index.shape.sector_size, changed, index.timeout)

    async def _write(self, offset: int, data: bytes, timeout: float) -> None:
        """Write to byte `offset` of the device, for as long as the index's lease is certainly ours."""
        lockspace = self.lockspace
        if lockspace is None or lockspace is not self._guarded:
            raise BackendError(f"The index of {self._path} is no longer this host's to change.")
        lockspace.require()
        self._under_way.add(offset)
        await self._started().disk.write(offset, data, timeout)
        self._under_way.discard(offset)

    async def still(self, place: Place, image: Image) -> bool:
        """Whether the index still has the lease at this place; see Layout.still."""
        return await self._look_up(place.name) == place.area.offset

    async def remove(self, place: Place, image: Image) -> None:
        """Clear the entry, then mark the lease as removed; see Layout.remove."""
        async with self._changing:
            await self._lock_index(trio.current_time() + SETTLE_S)
            try:
                entries = await self._entries()
                for number, entry in enumerate(entries):
                    if (entry.offset, entry.name) == (place.area.offset, place.name):
                        await self._clear(number, place)
            finally:
                await self._unlock_index()

    async def _clear(self, number: int, place: Place) -> None:
        """Whoever still knows the place finds the mark there, and whoever looks it up finds nothing."""
        await self._write_entry(number, sectors.FREE_ENTRY)
        self._slots.pop(place.name, None)
        now = self.lockspace.clock.now() if self.lockspace is not None else 0.0
        mark = sectors.new_leader(place.area.shape, self.name, place.name, cleared_at=stamp(now))
        sector = place.area.offset + sectors.LEADER_SECTOR * place.area.shape.sector_size
        await self._write(sector, sectors.encode_leader(mark), place.area.timeout)

    async def listing(self) -> list[int]:
        """Inode numbers by the entries' names; see Layout.listing."""
        found = []
        for entry in await self._entries():
            digits = entry.name[1:]
            if entry.offset and entry.name[:1] == b"i" and len(digits) == 16:
                try:
                    found.append(int(digits, 16))
                except ValueError:
                    continue
        return sorted(found)

    def _started(self) -> Area:
        if self._index is None:
            raise BackendError(f"The lease area {self._path} is not open.")
        return self._index

    async def stop(self) -> None:
        """Close the area."""
        for disk in (self._disk, self._renewals):
            if disk is not None:
                await disk.close()
        self._disk = self._renewals = self._index = None
