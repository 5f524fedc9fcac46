"""One lease area on a disk, read and written by whole sectors; every complaint names the sector."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NoReturn

from lockfs.paxos.seams import Disk, Plan, ToRead, ToWrite
from lockfs.records.geometry import Geometry
from lockfs.records.results import RecordError, Result
from lockfs.records.sectors import Leader

PROBE_BYTES = 4096
"""What is read to learn an area's sector size: one sector, whichever it is."""
NUMBERS_END = 1 << 63
"""No number that hosts count up gets there; fields have 64 bits."""


@dataclass(frozen=True)
class Area:
    """The area that starts at byte `offset` of the disk. `timeout` bounds each I/O, in seconds."""

    disk: Disk
    offset: int
    shape: Geometry
    timeout: float

    @property
    def name(self) -> str:
        """The area for people."""
        return f"{self.disk.name} at byte {self.offset}" if self.offset else self.disk.name

    def shaped(self, shape: Geometry) -> Area:
        """The same place taken as of another geometry."""
        return replace(self, shape=shape)

    @contextmanager
    def naming(self, sector: int) -> Iterator[None]:
        """Add this area and the sector to a RecordError that arises in the block without them."""
        try:
            yield
        except RecordError as error:
            self._name(error, sector)

    def _name(self, error: RecordError, sector: int) -> NoReturn:
        if error.sector is not None:
            raise error
        raise error.at(self.name, sector) from None

    def check(self, sector: int, check: Callable[..., None], *arguments: object) -> None:
        """Call one of the records' checks for what was read from `sector`."""
        try:
            check(*arguments)
        except RecordError as error:
            self._name(error, sector)

    def check_number(self, sector: int, number: int) -> None:
        """Refuse a version, generation or ballot number, read from `sector`, that has no successor.

        Raises:
            RecordError: LEADER_INCONSISTENT.
        """
        if number >= NUMBERS_END:
            problem = f"the number {number} cannot be had by counting"
            raise RecordError(Result.LEADER_INCONSISTENT, problem, self.name, sector)

    def check_size(self, sector: int, leader: Leader) -> None:
        """Refuse a record, read from `sector`, that states other sectors than the area is taken to have.

        Raises:
            RecordError: LEADER_SECTOR_SIZE.
        """
        if leader.sector_size != self.shape.sector_size:
            problem = f"it states sectors of {leader.sector_size}, not of {self.shape.sector_size}"
            raise RecordError(Result.LEADER_SECTOR_SIZE, problem, self.name, sector)

    async def probe(self) -> bytes:
        """The first bytes, enough for the first record whatever the sector size."""
        return await self.disk.read(self.offset, PROBE_BYTES, self.timeout)

    async def read(self, sector: int, count: int = 1) -> bytes:
        """`count` sectors from `sector` on; raises DiskError, DiskTimeout."""
        size = self.shape.sector_size
        return await self.disk.read(self.offset + sector * size, count * size, self.timeout)

    async def write(self, sector: int, data: bytes, timeout: float | None = None) -> None:
        """One sector; raises DiskError, DiskTimeout.

        Raises:
            ValueError: `data` is not one sector.
        """
        limit = self.timeout if timeout is None else timeout
        await self.disk.write(self._place(sector, data), data, limit)

    def reading(self, sector: int, count: int = 1) -> Plan[memoryview]:
        """As `read`, as a step of a plan: the bytes are the plan's until its next step."""
        size = self.shape.sector_size
        return (yield ToRead(self.offset + sector * size, count * size, self.timeout))

    def writing(self, sector: int, data: bytes) -> Plan[None]:
        """As `write`, as a step of a plan."""
        yield ToWrite(self._place(sector, data), data, self.timeout)

    def _place(self, sector: int, data: bytes) -> int:
        size = self.shape.sector_size
        if len(data) != size:
            raise ValueError(f"{len(data)} bytes are not one sector of {size}")
        return self.offset + sector * size
