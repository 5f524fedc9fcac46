"""Makers of linked hosts for the conformance suite, one class for each backend."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio

from lockfs.backends.base import Backend, Image, Lease, Owner
from lockfs.backends.fcntl import FcntlBackend, FcntlOptions
from lockfs.backends.nop import NopBackend
from lockfs.backends.paxos.backend import PaxosBackend
from lockfs.backends.paxos.options import LayoutKind, PaxosOptions
from lockfs.records import sectors
from lockfs.records.geometry import MIB, geometry

from .conformance import Offers

LOCK_PATH = "/as/others/write/it"


@dataclass
class StoreHost:
    """A host that opens the images of a directory; `changes` collects the backend's lease events."""

    backend: Backend
    owner: Owner
    store: Path
    flags: int = os.O_RDWR
    changes: list[Lease] = field(default_factory=list)
    images: dict[str, Image] = field(default_factory=dict)

    def image(self, name: str) -> Image:
        if name not in self.images:
            descriptor = os.open(self.store / name, self.flags | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self.images[name] = Image(os.fstat(descriptor).st_ino, name.encode(), descriptor)
        return self.images[name]

    def close(self) -> None:
        """What the death of the host's process does: every descriptor is closed, nothing is released."""
        for image in self.images.values():
            os.close(image.descriptor)
        self.images.clear()


def owner(number: int) -> Owner:
    """Somebody on host `number`."""
    return Owner(f"host{number}", 1000 + number, f"qemu-{number}", 1700000000.5 + number)


class NopMaker:
    """Hosts that do not know of one another."""

    offers = Offers(exclusion=False, requests=False)
    attempt_s = 5.0
    races = 50

    def __init__(self, directory: Path) -> None:
        self.store = directory

    def link(self, old: str, new: str) -> None:
        os.link(self.store / old, self.store / new)

    def contender(self, number: int) -> dict[str, object]:
        raise NotImplementedError

    @contextlib.asynccontextmanager
    async def hosts(self, count: int) -> AsyncIterator[list[StoreHost]]:
        hosts = [StoreHost(NopBackend(), owner(number), self.store) for number in range(count)]
        try:
            for host in hosts:
                await host.backend.start(host.changes.append)
            yield hosts
        finally:
            for host in hosts:
                host.close()
                await host.backend.stop()


class FcntlMaker:
    """Hosts with the fcntl backend on one directory, one set of options each, in turn."""

    offers = Offers()
    attempt_s = 5.0
    races = 50

    def __init__(self, directory: Path, options: Sequence[FcntlOptions]) -> None:
        self.store = directory / "store"
        self.lock_dir = directory / "locks"
        self.store.mkdir(exist_ok=True)
        self.lock_dir.mkdir(exist_ok=True)
        self._options = options

    def options(self, number: int) -> FcntlOptions:
        """Host `number`'s options; a lock_dir of any name becomes the directory of this store."""
        chosen = self._options[number % len(self._options)]
        if chosen.lock_dir is None:
            return chosen
        return dataclasses.replace(chosen, lock_dir=str(self.lock_dir), lock_path=LOCK_PATH)

    def link(self, old: str, new: str) -> None:
        os.link(self.store / old, self.store / new)

    def contender(self, number: int) -> dict[str, object]:
        (self.store / "a.img").touch()
        options = dataclasses.asdict(self.options(number))
        return {"backend": "fcntl", "store": str(self.store), "host": f"host{number}", "options": options}

    @contextlib.asynccontextmanager
    async def hosts(self, count: int) -> AsyncIterator[list[StoreHost]]:
        store_fd = os.open(self.store, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        hosts = []
        try:
            for number in range(count):
                backend = FcntlBackend(self.options(number), store_fd, f"host{number}")
                hosts.append(StoreHost(backend, owner(number), self.store))
                await backend.start(hosts[-1].changes.append)
            yield hosts
        finally:
            for host in hosts:
                host.close()
                await host.backend.stop()
            os.close(store_fd)


class TrioClock:
    """The engine's clock on trio's, so that a test's clock moves the leases as well."""

    def now(self) -> float:
        """Trio's seconds."""
        return trio.current_time()

    async def sleep(self, seconds: float) -> None:
        """As trio sleeps."""
        await trio.sleep(max(0.0, seconds))


class PaxosMaker:
    """Hosts with the paxos backend on one directory, all with one layout."""

    offers = Offers()
    attempt_s = 5.0
    races = 12

    def __init__(self, directory: Path, layout: LayoutKind, *, real_time: bool = False) -> None:
        self.directory = directory
        self.store = directory / "store"
        self.store.mkdir(exist_ok=True)
        self._layout = layout
        self._real_time = real_time

    def options(self, number: int, **changes: object) -> PaxosOptions:
        """Host `number`'s options; its state directory is its own, as on a machine of its own."""
        options = PaxosOptions(
            io_timeout=1, state_dir=str(self.directory / f"state{number}"), layout=self._layout
        )
        if self._layout is LayoutKind.INDEX:
            options = dataclasses.replace(options, lease_area=str(self.directory / "area"))
        if self._layout is LayoutKind.LIBVIRT:
            leases = self.directory / "leases"
            leases.mkdir(exist_ok=True)
            options = dataclasses.replace(options, lease_area=str(leases), lock_path=LOCK_PATH)
        return dataclasses.replace(options, **changes)  # type: ignore[arg-type]

    def link(self, old: str, new: str) -> None:
        os.link(self.store / old, self.store / new)

    def contender(self, number: int) -> dict[str, object]:
        (self.store / "a.img").touch()
        self.prepare()
        options = dataclasses.asdict(self.options(number)) | {"layout": self._layout.value}
        return {"backend": "paxos", "store": str(self.store), "host": f"host{number}", "options": options}

    def prepare(self) -> None:
        """Make the area that an administrator makes."""
        area = self.directory / "area"
        if self._layout is LayoutKind.INDEX and not area.exists():
            make_index_area(area)

    @contextlib.asynccontextmanager
    async def hosts(self, count: int) -> AsyncIterator[list[StoreHost]]:
        self.prepare()
        store_fd = os.open(self.store, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        clock = None if self._real_time else TrioClock()
        hosts: list[StoreHost] = []
        try:
            async with trio.open_nursery() as nursery:
                for number in range(count):
                    backend = PaxosBackend(self.options(number), store_fd, f"host{number}", clock=clock)
                    hosts.append(StoreHost(backend, owner(number), self.store))
                    await backend.start(hosts[-1].changes.append)
                for host in hosts:
                    await nursery.start(host.backend.run)
                yield hosts
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                for host in hosts:
                    host.close()
                    await host.backend.stop()
            os.close(store_fd)


AREA_LEASES = 32


def make_index_area(path: Path) -> None:
    """A file with a lockspace, an index and room for AREA_LEASES leases."""
    shape = geometry(512, MIB)
    header = sectors.new_index(shape, b"images", MIB, AREA_LEASES)
    own_lease = sectors.new_resource(sectors.new_leader(shape, b"images", sectors.INDEX_LEASE_NAME))
    with open(path, "wb") as file:
        file.write(sectors.new_lockspace(shape, b"images", 1))
        file.write(header.encode().ljust(MIB, b"\0"))
        file.write(own_lease)
        file.truncate((3 + AREA_LEASES) * MIB)
