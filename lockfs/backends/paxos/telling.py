"""What the paxos backend tells of leases and hosts; it decides nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio

from lockfs.backends.base import Evidence, Holder, Image, Peer
from lockfs.backends.owners import OwnerRecords
from lockfs.backends.paxos.holders import Holders
from lockfs.backends.paxos.membership import Epoch, Membership, host_of
from lockfs.backends.paxos.places import Layout, Place, was_removed
from lockfs.backends.paxos.proof import PaxosLease
from lockfs.errors import BackendError, ImageBusy
from lockfs.paxos import breaking
from lockfs.paxos.errors import Refused
from lockfs.paxos.owners import ownership
from lockfs.paxos.seams import Clock
from lockfs.records.results import RecordError

COUNT_S = 4.0
"""How long a report may read leases to count who holds how many, seconds."""
SILENT_PART = 4
"""A host that is silent for this part of the time after which it counts as dead is waited for."""
LOOKS = 8
"""How often a lease may be removed between being found and being read."""


class Telling:
    """Reads leases and the lockspace for reports and messages."""

    def __init__(  # noqa: PLR0917  (what the backend has)
        self,
        membership: Membership,
        leases: Mapping[int, PaxosLease],
        records: Callable[[], OwnerRecords],
        opened: Callable[[], Layout],
        ready: Callable[[], Awaitable[Epoch]],
        in_thread: Callable[..., Awaitable[Any]],
        clock: Clock,
    ) -> None:
        """`leases` are those in hand, by inode; `opened` raises BackendError before the layout is open;
        `ready` waits for a join that is under way.
        """
        self._membership = membership
        self._leases = leases
        self._records = records
        self._opened = opened
        self._ready = ready
        self._in_thread = in_thread
        self._clock = clock

    async def holders(self, image: Image) -> list[Holder]:
        """Everybody else who holds the image; see Backend.holders. Waits for a join that is under way: before
        it nobody is known to be dead or alive, and who asks may be about to change an image that is held.
        """
        lease = self._leases.get(image.inode)
        if lease is not None:
            return await self._holders().of(image, lease.place)
        for _ in range(LOOKS):
            place = await self._opened().find(image)
            if place is None:
                return []
            try:
                await self._membership.ready()
                return await self._holders().of(image, place)
            except RecordError as error:
                if not was_removed(error) or await self._opened().still(place, image):
                    raise
            finally:
                await place.close()
        return []

    async def evidence(self, image: Image) -> Evidence:
        """What lies on the storage of the image's holder, and what watching it has shown; see Backend."""
        epoch = await self._ready()
        place = await self._opened().find(image)
        if place is None:
            return Evidence(("No host ever had a lease of the image.",), free=True)
        try:
            leader, holders = await breaking.facts(place.area, epoch.lockspace, place.name)
        finally:
            with trio.CancelScope(shield=True):
                await place.close()
        here = (epoch.lockspace.host_id, epoch.lockspace.generation)
        others = [one for one in holders if (one.host_id, one.generation) != here and not one.outlived]
        waits = [
            one.dead_after_s - one.silent_s for one in others if one.silent_s > one.dead_after_s / SILENT_PART
        ]
        return Evidence(
            tuple(breaking.told(holders, leader, epoch.lockspace)),
            dead_in_s=max(0.0, *waits, 0.0) if waits and len(waits) == len(others) else None,
            forcible=bool(others),
        )

    async def busy(self, image: Image, place: Place, refusal: Refused) -> ImageBusy:
        """The error of whoever found the lease taken; it names the holders if they can be read."""
        try:
            found = await self._holders().of(image, place)
            names = ", ".join(str(holder) for holder in found) or "another host, which let go meanwhile"
        except BackendError as error:  # that it is held is certain all the same
            names = f"another host, of which nothing could be read: {str(error).rstrip('.')}"
        sentence = f"{image.name} is held by {names}"
        if refusal.free_at is not None:
            left = max(0.0, refusal.free_at - self._clock.now())
            sentence += f", a host that is silent and counts as dead in {left:.0f} s"
        return ImageBusy(sentence + ".")

    async def known_paths(self) -> list[bytes]:
        """Paths from the owner records of all hosts."""
        found: list[bytes] = await self._in_thread(self._records().paths)
        return found

    async def peers(self) -> list[Peer]:
        """The hosts of the lockspace; see Backend.peers."""
        epoch = self._membership.epoch
        if epoch is None:
            raise BackendError(f"The lockspace is not joined: {self._membership.trouble or 'not yet'}")
        own = epoch.lockspace.host_id
        counts = await self._count_leases(epoch)
        return [
            Peer(
                host_id=host.host_id,
                name=host_of(host.name),
                generation=host.generation,
                state=host.state.value,
                silent_s=host.silent_s,
                io_timeout=host.io_timeout,
                leases=counts[host.host_id] if counts is not None else None,
                own=host.host_id == own,
            )
            for host in epoch.lockspace.hosts()
        ]

    async def _count_leases(self, epoch: Epoch) -> Counter[int] | None:
        """How many leases each host holds; None if they are too many to be read in COUNT_S."""
        counts: Counter[int] = Counter()
        with trio.move_on_after(COUNT_S):
            for inode in await self._opened().listing():
                place = await self._opened().find(Image(inode, b"", -1))
                if place is None:
                    continue
                try:
                    found = await ownership(place.area, epoch.lockspace.name, place.name)
                except RecordError:  # removed meanwhile, or damaged: `lockfsctl dump` tells
                    continue
                finally:
                    with trio.CancelScope(shield=True):
                        await place.close()
                now = self._clock.now()
                for host_id, generation in found.hosts:
                    if epoch.lockspace.watch.may_be_alive(host_id, generation, now):
                        counts[host_id] += 1
            return counts
        return None

    def _holders(self) -> Holders:
        return Holders(self._membership.epoch, self._records(), self._in_thread)
