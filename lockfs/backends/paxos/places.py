"""Where a lease lies: the protocol between the backend and the ways to lay leases out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from lockfs.backends.base import Image
from lockfs.errors import BackendError
from lockfs.paxos.area import Area
from lockfs.records.results import RecordError, Result
from lockfs.storage.disk import DirectDisk

HOSTS_DEFAULT = 250
"""For how many hosts leases and lockspaces are made that lockfs makes by itself: a ballot then reads 126 KiB
and not 1 MiB. A host with a higher id cannot use such a lease."""
START_S = 10.0
"""How long opening a lockspace and first reading it may take at least, seconds: only the mounting waits for
that, so a storage that is busy for a moment need not end it.
"""
BUSY_LOOK_S = 0.2
"""How often something is looked at that another host is just making, seconds."""


@dataclass(frozen=True)
class Place:
    """An open lease: its area, its name, and the disk to close when it is no longer needed (None: shared)."""

    area: Area
    name: bytes
    hosts: int
    own_disk: DirectDisk | None = None

    async def close(self) -> None:
        """Close what is this place's own."""
        if self.own_disk is not None:
            await self.own_disk.close()


class Layout(ABC):
    """One way to lay out a lockspace and its leases. Deadlines are trio times.

    Every method may raise BackendError (RecordError, DiskError, DiskTimeout among them).
    """

    @abstractmethod
    async def start(self) -> Area:
        """Open the lockspace, making it if that is this layout's habit; its area has a disk of its own.

        Raises:
            SetupError: it cannot be used; says what to do.
        """

    @abstractmethod
    async def in_place(self) -> bool:
        """Whether a host that mounts now finds the lockspace that this one has open; also True if the storage
        does not say.
        """

    async def find(self, image: Image) -> Place | None:
        """The image's lease, opened; None if it was never made."""
        return await self.find_named(self.name_of(image))

    @abstractmethod
    def name_of(self, image: Image) -> bytes:
        """The name of the image's lease."""

    @abstractmethod
    async def find_named(self, name: bytes) -> Place | None:
        """The lease of that name, opened; None if it was never made."""

    @abstractmethod
    async def quiet(self, name: bytes | None) -> None:
        """Return when nothing is under way any more that a killed process of this machine had begun to write
        to a lease, or (None) to the lockspace.
        """

    @abstractmethod
    async def make(self, image: Image, deadline: float) -> Place:
        """The image's lease, opened; made first if need be, once only however many hosts try."""

    @abstractmethod
    async def still(self, place: Place, image: Image) -> bool:
        """Whether the place is still where the image's lease is to be found: asked with the lease in hand,
        for a lease that was removed before it was taken excludes nobody."""

    @abstractmethod
    async def remove(self, place: Place, image: Image) -> None:
        """Remove a lease that the caller holds exclusively, and forgets instead of releasing it. After a
        failure `still` tells whether it was removed, when it answers.
        """

    @abstractmethod
    async def listing(self) -> list[int]:
        """The inode numbers of all images that have a lease here."""

    async def settle(self) -> None:  # noqa: B027  (optional)
        """Put in order what a failed step left; called now and then, and raises nothing."""

    @abstractmethod
    async def stop(self) -> None:
        """Close everything."""


_REMOVED = (Result.LEADER_MAGIC, Result.LEADER_RESOURCE_NAME)


def was_removed(error: BackendError) -> bool:
    """Whether it says that no lease of the name is at the place (any more)."""
    return isinstance(error, RecordError) and error.result in _REMOVED
