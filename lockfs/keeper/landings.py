"""What was begun while a lease was sure, and may still reach the storage afterwards.

A change is under way from when it enters its gate until it leaves it. What passed no gate, and what only the
host's cache has, is awaited by flushing the image. As long as either is not over for an image whose lease is
lost or in doubt, a watchdog must not be fed: the storage may have them yet when another host has the image.

Invariant: nothing here changes an image, but for a lease that is sure (Surroundings.settle with `revoked`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import trio

from lockfs.backends.base import LeaseState
from lockfs.keeper.grants import Grant
from lockfs.keeper.images import Ledger, Record
from lockfs.keeper.surroundings import Surroundings, Workers

log = logging.getLogger("lockfs.keeper")

AGAIN_S = 1.0
"""Between two tries to flush an image, seconds."""
REPORT_S = 10.0
"""How long a change may be under way, seconds, before that is reported."""
DRAIN_POLL_FIRST_S = 0.001
DRAIN_POLL_MAX_S = 0.2
DIRECT_S = 1.0
"""How long a write that passed no gate is left to end, seconds, where there is no way to ask."""
FLUSH_THREADS = 8
"""How many images are flushed at a time. These threads may all be waiting for a storage that hangs."""
_RETURNABLE = (LeaseState.HELD, LeaseState.DOUBT)


@dataclass(eq=False)
class Landing:
    """What the host has of an image. `revoked`: its handles are dead, and may have passed no gate."""

    record: Record
    revoked: bool
    over: trio.Event = field(default_factory=trio.Event)


class Landings:
    """Follows what may still land, for all images."""

    def __init__(self, ledger: Ledger, surroundings: Surroundings, workers: Workers) -> None:
        """`workers` are for nothing else."""
        self._ledger = ledger
        self._surroundings = surroundings
        self._workers = workers
        self._due: set[Landing] = set()

    @property
    def over(self) -> bool:
        """Whether nothing may land of an image whose lease is not sure. Scans the books; instant."""
        return not any(not landing.record.sure for landing in self._due) and not any(
            grant.gate.inside for record in self._ledger.all() if not record.sure for grant in record.grants
        )

    def expect(self, record: Record, *, revoked: bool) -> Landing:
        """Count what the host has of the image as not landed from now on. When changes under way have ended,
        `flush` must be run.
        """
        landing = Landing(record, revoked)
        self._due.add(landing)
        return landing

    async def flush(self, landing: Landing) -> None:
        """Flush the image until that has succeeded. Failed is as good where the lease cannot be given back
        anyway, for then the kernel has let the data go, and where it is sure again.
        """
        complained = False
        if landing.revoked and not _certain(landing.record):
            await trio.sleep(DIRECT_S)
        while True:
            asks = landing.revoked and _certain(landing.record)
            try:
                await self._workers.attempt(self._settle, landing.record.image.inode, asks)
                break
            except OSError as error:
                if not complained:
                    name = landing.record.image.name
                    log.error("image '%s': its data cannot be flushed: %s", name, error)
                complained = True
            if landing.record.sure or not returnable(landing.record):
                break
            await trio.sleep(AGAIN_S)
        self._due.discard(landing)
        landing.over.set()

    def _settle(self, inode: int, revoked: bool) -> None:
        self._surroundings.settle(inode, revoked=revoked)


async def drained(record: Record, grants: list[Grant], *, while_unsure: bool = False) -> None:
    """Wait until no change is under way through these grants; `while_unsure`: or until the lease is sure.

    Else without a bound, for the lease must not go before they have ended.
    """
    report_at = trio.current_time() + REPORT_S
    pause = DRAIN_POLL_FIRST_S
    while any(grant.gate.inside for grant in grants) and not (while_unsure and record.sure):
        if trio.current_time() >= report_at:
            log.critical("image '%s': a write is under way and does not end", record.image.name)
            report_at = float("inf")
        await trio.sleep(pause)
        pause = min(pause * 1.5, DRAIN_POLL_MAX_S)


def returnable(record: Record) -> bool:
    """Whether the image's lease may still be given back: nobody may get it then before all data landed."""
    return record.lease is not None and record.lease.state in _RETURNABLE


def _certain(record: Record) -> bool:
    """Whether the lease is good, whatever the books say of the opens."""
    lease = record.lease
    return lease is not None and lease.state is LeaseState.HELD and lease.in_time()
