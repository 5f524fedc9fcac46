"""Makers of linked hosts for the conformance suite, one class for each backend."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lockfs.backends.base import Backend, Image, Lease, Owner
from lockfs.backends.fcntl import FcntlBackend, FcntlOptions
from lockfs.backends.nop import NopBackend

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
