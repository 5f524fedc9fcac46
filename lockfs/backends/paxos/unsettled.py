"""Who is at work on a lease, and leases that a failed or cancelled step left to be put in order.

The protocol tells hosts apart, not the tasks of one host: what one task frees it may free under the other's
feet. Hence the invariant: a `Resource` is used only by the task that has the turn of the image's inode.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import trio

from lockfs.backends.base import Image
from lockfs.backends.paxos.membership import Epoch
from lockfs.backends.paxos.places import Place, was_removed
from lockfs.errors import BackendError
from lockfs.paxos.errors import EngineError
from lockfs.paxos.lockspace import Standing
from lockfs.paxos.resource import Resource
from lockfs.records.results import Result

SETTLE_S = 5.0
"""How long a failed or cancelled step puts things in order before that is left for later, seconds."""
_MISMATCHES = (Result.RELEASE_LVER, Result.RELEASE_OWNER)

_log = logging.getLogger("lockfs.paxos")


@dataclass
class Hand:
    """This host's hand on one lease: where it lies, open, and the engine's part, in one membership.

    `removing`: the removal of the lease was begun and may have happened; until that is known the lease must
    neither be given back nor be taken for gone.
    """

    image: Image
    place: Place
    resource: Resource
    epoch: Epoch
    removing: bool = False


@dataclass
class _Turn:
    lock: trio.Lock = field(default_factory=trio.Lock)
    users: int = 0


def let_go_of(error: BackendError) -> bool:
    """Whether a release that failed so has nothing left to give back: the lease was no longer ours, or is
    gone.
    """
    return was_removed(error) or (isinstance(error, EngineError) and error.result in _MISMATCHES)


class Unsettled:
    """The turns of all inodes, and the hands that were left on leases, by inode."""

    def __init__(
        self,
        still: Callable[[Place, Image], Awaitable[bool]],
        settled: Callable[[int, Resource], None] = lambda inode, resource: None,
    ) -> None:
        """`still`: see Layout.still. `settled` is told of each hand that was taken off its lease."""
        self._still = still
        self._settled = settled
        self._turns: dict[int, _Turn] = {}
        self._hands: dict[int, Hand] = {}

    def __contains__(self, inode: int) -> bool:
        return inode in self._hands

    @contextlib.asynccontextmanager
    async def turn(self, inode: int) -> AsyncIterator[None]:
        """Be the only task that works on the lease of this inode."""
        turn = self._turns.setdefault(inode, _Turn())
        turn.users += 1
        try:
            async with turn.lock:
                yield
        finally:
            turn.users -= 1
            if not turn.users:
                del self._turns[inode]

    # For who has the turn

    async def take_up(self, inode: int, epoch: Epoch) -> Hand | None:
        """The hand that was left on the lease, to go on with; None if there is none of this membership.

        Raises:
            BackendError: it is not known whether the lease was removed.
        """
        await self._settle_removal(inode)
        hand = self._hands.pop(inode, None)
        if hand is not None and hand.epoch is not epoch:
            await hand.place.close()
            return None
        return hand

    async def _settle_removal(self, inode: int) -> None:
        hand = self._hands.get(inode)
        if hand is not None and hand.removing:
            await self._settle(inode)
            if self._hands.get(inode) is hand and hand.removing:
                raise BackendError("The lease is being removed, and the storage does not answer; try again.")

    def leave(self, inode: int, hand: Hand) -> None:
        """Leave a hand on the lease, to be taken up at once."""
        self._hands[inode] = hand

    async def put_back(self, inode: int, hand: Hand) -> None:
        """Give a lease up after a failure, also in a cancelled task; what does not succeed is tried later."""
        self._hands[inode] = hand
        with trio.CancelScope(shield=True, deadline=trio.current_time() + SETTLE_S):
            await self._settle(inode)

    async def _settle(self, inode: int) -> None:
        hand = self._hands.get(inode)
        if hand is None:
            return
        try:
            if hand.removing and hand.epoch.lockspace.standing() is not Standing.LOST:
                if not await self._still(hand.place, hand.image):
                    hand.resource.forget()
                hand.removing = False
            await hand.resource.release()
            await hand.resource.settle()  # in doubt, a release writes nothing, and this says so
        except BackendError as error:
            if not let_go_of(error):
                _log.debug("lease of inode %d: not settled yet: %s", inode, error)
                return
        del self._hands[inode]
        self._settled(inode, hand.resource)
        await hand.place.close()

    # For everybody else

    async def retry(self) -> None:
        """Try again what did not succeed."""
        for inode in list(self._hands):
            async with self.turn(inode):
                await self._settle(inode)

    async def close(self) -> None:
        """Close what could not be put in order."""
        for hand in self._hands.values():
            await hand.place.close()
        self._hands.clear()
