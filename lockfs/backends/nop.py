"""The backend that guards nothing: for a store that one host alone mounts, and for measuring the rest."""

from __future__ import annotations

from lockfs.backends.base import Backend, Holder, Image, Lease, LeaseState, Mode, Owner


class NopBackend(Backend):
    """Grants every lease at once and never touches the storage; other hosts are not excluded."""

    name = "nop"

    async def acquire(self, image: Image, mode: Mode, owner: Owner, deadline: float) -> Lease:
        """Grant the lease; nothing is recorded anywhere."""
        return Lease(image, mode, owner)

    async def recall(self, image: Image, mode: Mode, owner: Owner) -> Lease:
        """Grant the lease anew: nobody else can have been granted one that counts."""
        return Lease(image, mode, owner)

    async def convert(self, lease: Lease, mode: Mode, deadline: float) -> None:
        """Change the mode, which always succeeds."""
        lease.mode = mode

    async def release(self, lease: Lease) -> None:
        """Forget the lease."""
        lease.state = LeaseState.RELEASED

    async def holders(self, image: Image) -> list[Holder]:
        """Nobody: other hosts cannot be seen."""
        return []
