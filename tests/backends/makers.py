"""Makers of linked hosts for the conformance suite, one class for each backend."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio
from trio.testing import MockClock

from lockfs.backends.base import Backend, Forgetful, Image, Lease, Owner
from lockfs.backends.fcntl import FcntlBackend, FcntlOptions
from lockfs.backends.nop import NopBackend
from lockfs.backends.paxos.backend import PaxosBackend
from lockfs.backends.paxos.options import LayoutKind, PaxosOptions
from lockfs.paxos.seams import Clock
from lockfs.records import sectors
from lockfs.records.geometry import MIB, geometry

from .conformance import Offers
from .lease_io import LeaseIO, pace

LOCK_PATH = "/as/others/write/it"


@dataclass
class StoreHost:
    """A host that opens the images of a directory; `changes` collects the backend's lease events, `memory` is
    what outlives a worker of it.
    """

    backend: Backend
    owner: Owner
    store: Path
    flags: int = os.O_RDWR
    changes: list[Lease] = field(default_factory=list)
    images: dict[str, Image] = field(default_factory=dict)
    memory: Forgetful = field(default_factory=Forgetful)

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


def sweep(memory: Forgetful, opened: set[int]) -> None:
    """What the next worker does first: close what the one that was killed had opened and no value names."""
    kept: set[int] = set()
    for value in memory.items("").values():
        if isinstance(value, dict):
            kept.update(value.get("fd", []))
    for descriptor in opened - kept:
        os.close(descriptor)


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
                await host.backend.start(host.changes.append, host.memory)
            yield hosts
        finally:
            for host in hosts:
                host.close()
                await host.backend.stop()

    async def succeed(self, host: StoreHost) -> None:
        host.backend = NopBackend()
        await host.backend.start(host.changes.append, host.memory)

    async def go_on(self, host: StoreHost) -> None:
        await host.backend.settle()


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
        self._hosts: list[StoreHost] = []
        self._store_fd = -1

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
                await backend.start(hosts[-1].changes.append, hosts[-1].memory)
            self._hosts, self._store_fd = hosts, store_fd
            yield hosts
        finally:
            for host in hosts:
                host.close()
                await host.backend.stop()
            os.close(store_fd)

    async def succeed(self, host: StoreHost) -> None:
        number = self._hosts.index(host)
        former = host.backend
        assert isinstance(former, FcntlBackend)
        opened = {lease.lock_file.descriptor for lease in former._leases.values() if lease.lock_file}
        if former._lock_files is not None:
            opened.add(former._lock_files._fd)
        sweep(host.memory, opened)
        host.backend = FcntlBackend(self.options(number), self._store_fd, f"host{number}")
        await host.backend.start(host.changes.append, host.memory)

    async def go_on(self, host: StoreHost) -> None:
        await host.backend.settle()


class TrioClock:
    """The engine's clock on trio's, so that a test's clock moves the leases as well."""

    def __init__(self) -> None:
        self._clock = trio.lowlevel.current_clock()

    def now(self) -> float:
        """Trio's seconds, in any thread."""
        return self._clock.current_time()

    async def sleep(self, seconds: float) -> None:
        """As trio sleeps."""
        await trio.sleep(max(0.0, seconds))


@dataclass
class PaxosHost(StoreHost):
    """A host of a lockspace; `scope` is its life, `io` its way to the leases."""

    io: LeaseIO = field(default_factory=LeaseIO)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    running: trio.Lock = field(default_factory=trio.Lock)

    @property
    def paxos(self) -> PaxosBackend:
        assert isinstance(self.backend, PaxosBackend)
        return self.backend

    def crash(self) -> None:
        """Renew nothing and answer nobody from now on, as after a power cut."""
        self.scope.cancel()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with self.running:
            with self.scope:
                await self.backend.run(task_status=task_status)

    async def stop(self) -> None:
        """End in good order; again is no error."""
        self.io.heal()
        self.scope.cancel()
        with trio.CancelScope(shield=True):
            async with self.running:
                self.close()
                await self.backend.stop()


class PaxosMaker:
    """Hosts with the paxos backend on one directory, all with one layout.

    Under a MockClock time jumps whenever nothing happens on any of them (lease_io.pace); else it is real.
    `changes` are a host's own options, by its number; `clocks` those of hosts that have their own.
    """

    offers = Offers()
    attempt_s = 5.0
    races = 12

    def __init__(self, directory: Path, layout: LayoutKind) -> None:
        self.directory = directory
        self.store = directory / "store"
        self.store.mkdir(exist_ok=True)
        self.changes: dict[int, dict[str, object]] = {}
        self.clocks: dict[int, Clock] = {}
        self._layout = layout
        self._hosts: list[PaxosHost] = []
        self._store_fd = -1
        self._nursery: trio.Nursery | None = None

    def options(self, number: int) -> PaxosOptions:
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
        return dataclasses.replace(options, **self.changes.get(number, {}))  # type: ignore[arg-type]

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

    async def open(self, number: int) -> PaxosHost:
        """Host `number`, started, but not yet running; within `hosts`, which stops it."""
        io = LeaseIO()
        clock = self.clocks.get(number)
        if clock is None and isinstance(trio.lowlevel.current_clock(), MockClock):
            clock = TrioClock()
        backend = PaxosBackend(
            self.options(number), self._store_fd, f"host{number}", store=str(self.store), clock=clock, io=io
        )
        host = PaxosHost(backend, owner(number), self.store, io=io)
        self._hosts.append(host)
        await backend.start(host.changes.append, host.memory)
        return host

    async def kill(self, host: PaxosHost) -> None:
        """End a host's worker with nothing given back, and close the descriptors that nobody named; again is
        no error.
        """
        host.scope.cancel()
        async with host.running:
            pass
        host.scope = trio.CancelScope()
        layout, host.paxos._layout = host.paxos._layout, None
        if layout is None:
            return
        await layout.stop()
        for lease in host.paxos._leases.values():
            await lease.place.close()

    async def succeed(self, host: PaxosHost) -> None:
        await self.kill(host)
        number = self._hosts.index(host)
        clock = TrioClock() if isinstance(trio.lowlevel.current_clock(), MockClock) else None
        host.backend = PaxosBackend(
            self.options(number),
            self._store_fd,
            f"host{number}",
            store=str(self.store),
            clock=clock,
            io=host.io,
        )
        await host.backend.start(host.changes.append, host.memory)

    async def go_on(self, host: PaxosHost) -> None:
        await self.run(host)
        await host.backend.settle()

    async def add(self, number: int) -> PaxosHost:
        """Host `number`, running; within `hosts`."""
        host = await self.open(number)
        await self.run(host)
        return host

    async def run(self, host: PaxosHost) -> None:
        """Let a host that was opened run."""
        assert self._nursery is not None
        await self._nursery.start(host.run)

    @contextlib.asynccontextmanager
    async def hosts(self, count: int) -> AsyncIterator[list[PaxosHost]]:
        self.prepare()
        self._store_fd = os.open(self.store, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._hosts = []
        failure: BaseException | None = None
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                if isinstance(trio.lowlevel.current_clock(), MockClock):
                    nursery.start_soon(pace, lambda: [host.io for host in self._hosts])
                try:
                    yield [await self.add(number) for number in range(count)]
                except BaseException as error:  # noqa: BLE001  (raised below, in no group)
                    failure = error
                finally:
                    for host in self._hosts:
                        host.scope.cancel()
                    for host in self._hosts:
                        await host.stop()
                nursery.cancel_scope.cancel()
            if failure is not None:
                raise failure
        finally:
            os.close(self._store_fd)


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
