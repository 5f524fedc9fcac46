"""Conflicts within this host: whether an opener may write beside those who already do."""

from __future__ import annotations

from lockfs.keeper.grants import Kind
from lockfs.keeper.images import Record
from lockfs.keeper.openers import Opener
from lockfs.keeper.policy import Local, Policy
from lockfs.keeper.surroundings import Surroundings, Workers
from lockfs.keeper.wishes import BusyHere


class Rivals:
    """Decides who may share the host's lease."""

    def __init__(self, policy: Policy, host: str, surroundings: Surroundings, workers: Workers) -> None:
        self._policy = policy
        self._host = host
        self._surroundings = surroundings
        self._workers = workers

    def within(self, record: Record, opener: Opener) -> Opener | None:
        """A process of this host that writes the image and that is not known to be the opener's own."""
        owners = record.owners()
        if self._policy.local is Local.HOST or any(g.opener.same_process(opener) for g in owners):
            return None
        return owners[0].opener if owners else None

    async def refuse(self, record: Record, opener: Opener) -> None:
        """Refuse an opener that may not write beside the present writers; the caller has the turn.

        A process that inherited a writer's descriptor (a fork) belongs to the writers.

        Raises:
            BusyHere: naming the writer.
        """
        rival = self.within(record, opener)
        if rival is not None and not await self._inherited(record, opener):
            raise BusyHere(
                f"image '{record.image.name}' is open for writing by {rival} on this host ({self._host})"
            )

    def outlive(self, record: Record, opener: Opener) -> None:
        """The opener is about to write: who lost the lease here before, and may not write beside it, has
        lost it for good, as if another host had taken the image.
        """
        if self._policy.local is Local.HOST:
            return
        for grant in record.grants:
            if grant.kind is Kind.SUSPENDED and not grant.opener.same_process(opener):
                grant.kind = Kind.FENCED
        record.refresh_gates()

    async def _inherited(self, record: Record, opener: Opener) -> bool:
        """Whether the opener holds a descriptor of the writers.

        No proof while anybody has a writable descriptor without a lease: it may be that one.
        """
        process = opener.process
        if process.pid <= 0 or any(g.writes and g.kind is not Kind.LEASED for g in record.grants):
            return False
        try:
            return await self._workers.call(self._surroundings.has_open, process.pid, record.image.inode)
        except OSError:
            return False
