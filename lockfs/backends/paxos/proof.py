"""Leases in hand, and the proof that they still are, after this host may have stood still (paxos/pace.py).

A lease that was taken before a suspicion says no to every write (`in_time`) until it was confirmed. Where
hosts merely come or go the leases are looked at, and only what is not there any more raises a suspicion.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

import trio

from lockfs.backends.base import Lease, LeaseState, Mode
from lockfs.backends.paxos.membership import Epoch
from lockfs.backends.paxos.places import Place, was_removed
from lockfs.backends.remembered import Stage
from lockfs.errors import BackendError
from lockfs.paxos.errors import Refused
from lockfs.paxos.resource import Hold, Resource
from lockfs.records.results import Result
from lockfs.records.sectors import Leader

AGAIN_S = 1.0
"""From one try to confirm what could not be to the next."""
CONFIRM_S = 2.0
"""How long one try goes on against hosts that contend for the lease."""
TASKS = 8
"""How many leases are confirmed, or looked at, at once."""

_log = logging.getLogger("lockfs.paxos")


@dataclass
class PaxosLease(Lease):
    """A lease in hand: the engine's resource, where it lies, and the membership it was taken in.

    `followed`: the leader record that it came in place of; `last`: of a lost lease, the one that it had.
    """

    place: Place = field(kw_only=True)
    resource: Resource = field(kw_only=True)
    epoch: Epoch = field(kw_only=True)
    followed: Leader | None = None
    last: Leader | None = None

    def in_time(self) -> bool:
        """Whether a write may be started now; see Lease.in_time."""
        return self.resource.proven and self.epoch.in_time()

    @property
    def resumable(self) -> bool:
        """Whether it can be told of a later lease that it follows; see Lease."""
        return True

    def follows(self, lost: Lease) -> bool:
        """Whether the leader record in whose place this lease came, as the very next version, was the one of
        `lost`; see Lease and docs/decisions/0014.
        """
        return isinstance(lost, PaxosLease) and lost.last is not None and self.followed == lost.last


class Proof:
    """Confirms what is in hand. `worth` is told of each lease what it is worth then: HELD also if it was."""

    def __init__(
        self,
        leases: dict[int, PaxosLease],
        turn: Callable[[int], AbstractAsyncContextManager[None]],
        note: Callable[[PaxosLease, Stage], None],
        worth: Callable[[PaxosLease, LeaseState], None],
    ) -> None:
        """`leases` are those in hand, by inode; `turn`: see Unsettled."""
        self._leases = leases
        self._turn = turn
        self._note = note
        self._worth = worth
        self._wanted = trio.Event()
        self._looks: set[Epoch] = set()

    def passed(self, epoch: Epoch) -> None:
        """A renewal has landed: have done what is to be done after it."""
        if epoch.lockspace.pace.look_due:
            epoch.lockspace.pace.looked()
            self._looks.add(epoch)
        if self._looks or self._unproven():
            self._wanted.set()

    def _unproven(self) -> list[PaxosLease]:
        return [one for one in self._leases.values() if _is_held(one) and not one.resource.proven]

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            looks, self._looks = self._looks, set()
            await self._all([one for one in self._leases.values() if one.epoch in looks], self._look)
            while unproven := self._unproven():
                await self._all(unproven, self._confirm)
                if self._unproven():
                    await trio.sleep(AGAIN_S)

    async def _all(self, leases: list[PaxosLease], step: Callable[[PaxosLease], Awaitable[None]]) -> None:
        limiter = trio.CapacityLimiter(TASKS)
        async with trio.open_nursery() as nursery:
            for lease in leases:
                nursery.start_soon(self._one, lease, step, limiter)

    async def _one(
        self, lease: PaxosLease, step: Callable[[PaxosLease], Awaitable[None]], limiter: trio.CapacityLimiter
    ) -> None:
        inode = lease.image.inode
        async with limiter, self._turn(inode):
            if self._leases.get(inode) is lease and _is_held(lease):
                await step(lease)

    async def _look(self, lease: PaxosLease) -> None:
        """Look without holding anybody up; where that does not show the lease, it is in doubt."""
        try:
            if await lease.resource.is_there():
                return
        except BackendError as error:
            if not was_removed(error):
                _log.debug("%s: its lease could not be looked at: %s", lease.image.name, error)
                lease.resource.doubt()
                return
        lease.epoch.lockspace.pace.suspect(f"the lease of {lease.image.name} is not as it was")

    async def _confirm(self, lease: PaxosLease) -> None:
        """Confirm, or lose. Whoever writes past the gates is told of a doubt only if the first try fails."""
        resource = lease.resource
        if not lease.epoch.lockspace.pace.renewed:
            return  # that is due at once, and what comes after it is told by its own means
        if lease.mode is Mode.SHARED and lease.epoch.lockspace.strangers:
            # A host with the sanlock daemon goes by its last pass, in which this host may have been dead.
            self._lose(lease, "it was shared with hosts that run the sanlock daemon")
            return
        self._note(lease, Stage.CONVERTING)  # the next worker may find a later version
        try:
            await resource.confirm(lease.epoch.lockspace.clock.now() + CONFIRM_S)
        except BackendError as error:
            contended = isinstance(error, Refused) and error.result is Result.DBLOCK_MBAL
            if was_removed(error) or (isinstance(error, Refused) and not contended):
                self._lose(lease, str(error))
                return
            _log.warning("%s: its lease is not confirmed yet: %s", lease.image.name, error)
            if lease.state is not LeaseState.DOUBT:
                self._worth(lease, LeaseState.DOUBT)
            return
        self._note(lease, Stage.CONVERTING if resource.unsettled else Stage.HELD)
        self._worth(lease, lease.epoch.state)

    def _lose(self, lease: PaxosLease, why: str) -> None:
        _log.error("%s: while this host stood still its lease was lost: %s", lease.image.name, why)
        self._worth(lease, LeaseState.LOST)


def _is_held(lease: PaxosLease) -> bool:
    """Not so one that is lost, or that is being given back."""
    ended = lease.state in (LeaseState.LOST, LeaseState.RELEASED)
    return not ended and lease.resource.hold is not Hold.NONE
