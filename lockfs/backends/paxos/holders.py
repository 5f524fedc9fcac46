"""Who holds a lease, in words for people: the lockspace's names, and what lockfs hosts tell of themselves."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from lockfs.backends.base import Holder, Image, Mode, Owner
from lockfs.backends.owners import OwnerRecords
from lockfs.backends.paxos.membership import Epoch, host_of, made_by_lockfs, shortened
from lockfs.backends.paxos.places import Place
from lockfs.backends.sightings import LOCKFS
from lockfs.errors import BackendError
from lockfs.paxos.owners import Ownership, ownership
from lockfs.paxos.watch import HostState

SANLOCK = "sanlock"


class Holders:
    """Looks one lease up. What a record says of a holder is believed only of a host that the lease names."""

    def __init__(
        self, epoch: Epoch | None, records: OwnerRecords, in_thread: Callable[..., Awaitable[Any]]
    ) -> None:
        self._epoch = epoch
        self._records = records
        self._in_thread = in_thread

    async def of(self, image: Image, place: Place) -> list[Holder]:
        """Everybody else who holds the lease now and is not known to be dead.

        Raises:
            RecordError, DiskError, DiskTimeout: it cannot be read; BackendError: the lockspace is not joined.
        """
        if self._epoch is None:
            raise BackendError(f"Who holds {image.name} is not known: the lockspace is not joined.")
        found = await ownership(place.area, self._epoch.lockspace.name, place.name)
        hosts = [host for host in found.hosts if self._counts(*host)]
        if not hosts:
            return []
        mode = Mode.SHARED if found.shared else Mode.EXCLUSIVE
        told: list[Owner] = await self._in_thread(self._records.read, image.inode, mode)
        return [self._holder(host_id, mode, told, found) for host_id, _ in hosts]

    def _counts(self, host_id: int, generation: int) -> bool:
        epoch = self._epoch
        if epoch is None or host_id == epoch.lockspace.host_id:
            return False
        return epoch.lockspace.watch.may_be_alive(host_id, generation, epoch.lockspace.clock.now())

    def _holder(self, host_id: int, mode: Mode, told: list[Owner], found: Ownership) -> Holder:
        name, state = self._name(host_id), self._state(host_id)
        how = LOCKFS if made_by_lockfs(name) else SANLOCK
        silent = ", silent" if state in (HostState.FAIL, HostState.DEAD) else ""
        host = host_of(name)
        for owner in told:
            if shortened(owner.host) == host:
                told.remove(owner)
                return Holder(mode, how + silent, owner)
        return Holder(mode, f"{how} on {host or 'host id'} (host id {host_id}){silent}")

    def _name(self, host_id: int) -> str:
        sight = self._epoch.lockspace.watch.sight(host_id) if self._epoch is not None else None
        return sight.name.decode("utf-8", "backslashreplace") if sight is not None else ""

    def _state(self, host_id: int) -> HostState:
        if self._epoch is None:
            return HostState.UNKNOWN
        return self._epoch.lockspace.watch.state(host_id, self._epoch.lockspace.clock.now())
