"""Leases as files in a directory: lockfs' own naming by inode, and libvirt's by the path's MD5.

A file is made under a passing name, filled, and then linked to its own: hosts that meet see it whole or not
at all, and one of them wins.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import trio

from lockfs.backends.base import Image
from lockfs.backends.paxos.directory import Directory
from lockfs.backends.paxos.options import PaxosOptions
from lockfs.backends.paxos.places import BUSY_LOOK_S, HOSTS_DEFAULT, START_S, Layout, Place
from lockfs.errors import BackendError, SetupError
from lockfs.paxos.area import PROBE_BYTES, Area
from lockfs.paxos.lockspace import find_lockspace
from lockfs.paxos.seams import DiskError
from lockfs.records import sectors
from lockfs.records.geometry import GEOMETRIES, MIB, Geometry, geometry
from lockfs.records.results import RecordError, Result
from lockfs.storage.buffers import Buffers
from lockfs.storage.disk import PLACES, RENEWAL_PLACES, Crew, DirectDisk
from lockfs.storage.leftover import wait_for_writes
from lockfs.storage.opening import StorageMissing
from lockfs.storage.rawio import RawIO
from lockfs.storage.workers import NotInTime, Workers, WorkersStopped

OWN_LOCKSPACE = b"lockspace"
_OWN_PREFIX = b"i"
_OWN_DIGITS = 16
FILE_THREADS = 8

_T = TypeVar("_T")


@dataclass(frozen=True)
class Naming:
    """How files and resources of a layout are called. `few_hosts`: leases need not be for all hosts that
    fit. `whole`: whoever makes a file fills it before it has its name.
    """

    lockspace_file: bytes
    resource: Callable[[Image], bytes]
    inode_of: Callable[[bytes], int | None]
    few_hosts: bool
    whole: bool


def own_naming() -> Naming:
    """Files named by the image's inode number, which renames and hard links do not change."""

    def resource(image: Image) -> bytes:
        return _OWN_PREFIX + b"%0*x" % (_OWN_DIGITS, image.inode)

    return Naming(OWN_LOCKSPACE, resource, _inode_of, few_hosts=True, whole=True)


def _inode_of(name: bytes) -> int | None:
    digits = name.removeprefix(_OWN_PREFIX)
    if len(name) != len(_OWN_PREFIX) + _OWN_DIGITS or len(digits) != _OWN_DIGITS:
        return None
    try:
        return int(digits, 16)
    except ValueError:
        return None


def libvirt_naming(lockspace: bytes, lock_path: str) -> Naming:
    """The names libvirt's plugin gives: the lower-case MD5 of the path in the domain's XML, byte for byte."""
    prefix = os.fsencode(lock_path).rstrip(b"/") + b"/"

    def resource(image: Image) -> bytes:
        return hashlib.md5(prefix + image.path, usedforsecurity=False).hexdigest().encode()

    return Naming(lockspace, resource, lambda name: None, few_hosts=False, whole=False)


def geometry_for(options: PaxosOptions, storage_sector: int) -> Geometry:
    """The geometry of files yet to be made: as told, or the smallest area for the storage's sectors.

    Raises:
        SetupError: what was told does not go together, or not with the storage.
    """
    sector = options.sector or storage_sector
    if sector < storage_sector:
        raise SetupError(
            f"sector={sector} does not fit: the storage needs sectors of {storage_sector} bytes; "
            f"give sector={storage_sector} or leave it out."
        )
    if options.align is None:
        return next(shape for shape in GEOMETRIES if shape.sector_size == sector)
    try:
        return geometry(sector, options.align)
    except RecordError:
        fitting = ", ".join(str(s.area_size // MIB) for s in GEOMETRIES if s.sector_size == sector)
        raise SetupError(f"sector={sector} goes with align={fitting} (MiB) only.") from None


def check_geometry(options: PaxosOptions, found: Geometry, where: str) -> None:
    """Refuse options that contradict an area that is there already.

    Raises:
        SetupError: says which, and what the area has.
    """
    for option, told, has in (
        ("sector", options.sector, found.sector_size),
        ("align", options.align, found.area_size),
    ):
        if told not in (None, has):
            raise SetupError(f"{option}= does not fit: {where} has {found}; leave the option out.")
    if options.host_id is not None and options.host_id > found.hosts_max:
        raise SetupError(
            f"host_id={options.host_id} does not fit: {where} is for host ids up to {found.hosts_max}; "
            "give one of these, or leave the option out."
        )


def unusable(what: str, error: BackendError, unprepared: str = "") -> str:
    """The sentence about a lockspace that cannot be used: why, and what to do.

    `unprepared` is what to do where nobody prepared it; left out, that is nothing a user can do there.
    """
    advice = unprepared or "give another place with lease_area=, or restore the lockspace"
    if isinstance(error, RecordError) and error.result is Result.LEADER_SPACE_NAME:
        advice = "give its name with lockspace=, or another place with lease_area="
    return f"{what}: {str(error).rstrip('.')}; {advice}."


class FileLayout(Layout):
    """Lockspace and leases as files of one directory."""

    def __init__(  # noqa: PLR0917  (what a directory of leases is)
        self,
        directory: Directory,
        name: str,
        options: PaxosOptions,
        lockspace: bytes,
        naming: Naming,
        io: RawIO | None = None,
    ) -> None:
        """The directory is taken over; `name` is its path, for people. `io` reaches the files, the kernel's
        by default.
        """
        self._io = io
        self._directory = directory
        self._name = name
        self._options = options
        self._lockspace = lockspace
        self._naming = naming
        self._shape = GEOMETRIES[0]
        self._limiter = trio.CapacityLimiter(FILE_THREADS)
        self._lockspace_disk: DirectDisk | None = None
        self._crew: Crew | None = None
        self._writes_outlive = True  # until a look has shown that they do not, as on local file systems

    async def start(self) -> Area:
        """Open or make the lockspace; see Layout.start."""
        file = self._naming.lockspace_file
        if not await self._in_thread(self._directory.there, file):
            await self._make_lockspace(file)
        self._lockspace_disk = disk = await self._open(file, START_S, renewals=True)
        try:
            found = Area(disk, 0, GEOMETRIES[0], max(START_S, self._options.io_timeout))
            area, _ = await find_lockspace(found, self._lockspace)
        except BackendError as error:
            raise SetupError(unusable(f"The lockspace in {self._name} cannot be used", error)) from error
        check_geometry(self._options, area.shape, self._name)
        self._shape = area.shape
        return replace(area, timeout=self._options.io_timeout)

    async def in_place(self) -> bool:
        """Whether the lockspace's name still leads to the open file; see Layout.in_place."""
        disk, crew = self._lockspace_disk, self._crew
        if disk is None or crew is None:
            return True
        look = partial(self._directory.identity, self._naming.lockspace_file)
        try:
            return await crew.workers.run(look, self._options.io_timeout) == disk.identity
        except (OSError, NotInTime, WorkersStopped):
            return True  # whether the storage answers, renewals find out

    async def _make_lockspace(self, file: bytes) -> None:
        probe = await self._in_thread(self._directory.passing, b"", PROBE_BYTES)
        try:
            disk = await self._open(probe, START_S)
            await disk.close()
        finally:
            await self._in_thread(self._directory.unlink, probe)
        shape = geometry_for(self._options, disk.sector_size)
        whole = sectors.new_lockspace(shape, self._lockspace, self._options.io_timeout)
        await self._in_thread(self._directory.publish, file, whole, shape.area_size)

    async def _open(self, file: bytes, at_least: float = 0.0, *, renewals: bool = False) -> DirectDisk:
        """Open a file: with the threads that all leases share, or for renewals with its own.

        That may take an io_timeout, or `at_least` seconds if they are longer.
        """
        if self._crew is None:
            self._crew = Crew(Workers("leases", PLACES), Buffers())
        path = os.fsdecode(file)
        return await DirectDisk.open(
            path,
            name=f"{self._name}/{path}",
            directory=self._directory.descriptor,
            places=RENEWAL_PLACES,
            timeout=max(at_least, self._options.io_timeout),
            io=self._io,
            crew=None if renewals else self._crew,
        )

    def name_of(self, image: Image) -> bytes:
        """The name of the image's lease and of its file."""
        return self._naming.resource(image)

    async def quiet(self, name: bytes | None) -> None:
        """Wait for late writes to the lease's file, or the lockspace's; see Layout.quiet."""
        if not self._writes_outlive:
            return
        file = self._naming.lockspace_file if name is None else name
        crew = self._crew = self._crew or Crew(Workers("leases", PLACES), Buffers())
        look = partial(wait_for_writes, file, self._directory.descriptor)
        try:
            self._writes_outlive = await crew.workers.run(look, self._options.io_timeout)
        except FileNotFoundError:
            return
        except (OSError, NotInTime, WorkersStopped) as error:
            raise BackendError(f"{self._name} does not answer: {error}.") from error

    async def find_named(self, name: bytes) -> Place | None:
        """Open the file of a lease; see Layout.find_named."""
        try:
            disk = await self._open(name)
        except StorageMissing:
            return None
        except SetupError as error:
            raise BackendError(str(error)) from error
        area = Area(disk, 0, self._shape, self._options.io_timeout)
        return Place(area, name, self._hosts(), disk)

    def _hosts(self) -> int:
        """For how many hosts leases are made here."""
        few = self._naming.few_hosts and (self._options.host_id or 0) <= HOSTS_DEFAULT
        return min(HOSTS_DEFAULT, self._shape.hosts_max) if few else self._shape.hosts_max

    async def make(self, image: Image, deadline: float) -> Place:
        """Open or make the image's lease file; see Layout.make."""
        name = self._naming.resource(image)
        while True:
            place = await self.find(image)
            if place is not None:
                if self._naming.whole or await self._is_made(place) or trio.current_time() >= deadline:
                    return place
                await place.close()
                await trio.sleep(BUSY_LOOK_S)
            elif trio.current_time() < deadline:
                leader = sectors.new_leader(self._shape, self._lockspace, name, self._hosts())
                used = sectors.resource_prefix(leader)
                if not await self._in_thread(self._directory.publish, name, used, self._shape.area_size):
                    await trio.sleep(BUSY_LOOK_S)  # a name that was not there a moment ago
            else:
                raise BackendError(f"The lease of {image.name} in {self._name} could not be made in time.")

    async def _is_made(self, place: Place) -> bool:
        """Whether the file has a magic number: libvirt makes a file first and fills it then."""
        try:
            leader = sectors.decode_leader(await place.area.read(sectors.LEADER_SECTOR))
        except DiskError as error:
            if error.number == errno.EMSGSIZE:
                return False
            await place.close()
            raise
        except BaseException:
            await place.close()
            raise
        return leader.magic != 0

    async def still(self, place: Place, image: Image) -> bool:
        """Whether the name still leads to the open file; see Layout.still."""
        if place.own_disk is None:
            return False
        return await self._in_thread(self._directory.identity, place.name) == place.own_disk.identity

    async def remove(self, place: Place, image: Image) -> None:
        """Unlink the lease file; see Layout.remove."""
        await self._in_thread(self._directory.unlink, place.name)

    async def listing(self) -> list[int]:
        """Inode numbers by the files' names; see Layout.listing."""
        names = await self._in_thread(self._directory.names)
        found = (self._naming.inode_of(name) for name in names)
        return sorted(inode for inode in found if inode is not None)

    async def stop(self) -> None:
        """Close the lockspace and the directory."""
        if self._lockspace_disk is not None:
            await self._lockspace_disk.close()
        if self._crew is not None:
            self._crew.workers.stop_soon(self._directory.close)
            self._crew = None
        else:
            self._directory.close()

    async def _in_thread(self, work: Callable[..., _T], *arguments: object) -> _T:
        try:
            return await trio.to_thread.run_sync(work, *arguments, limiter=self._limiter)
        except OSError as error:
            raise BackendError(f"{self._name} cannot be used: {error.strerror}.") from error
