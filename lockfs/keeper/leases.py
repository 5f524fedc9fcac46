"""The host's lease of each image: had when it is needed, given back when it is not, watched in between.

Every method that moves a lease is called by the task that has the record's turn, unless it says that it
takes the turn itself.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable

import trio

from lockfs.backends.base import Backend, Image, Lease, LeaseState, Mode
from lockfs.errors import BackendError, LockfsError
from lockfs.keeper.images import Record
from lockfs.keeper.surroundings import Surroundings, Workers
from lockfs.keeper.wishes import BusyHere, LeaseInDoubt, Wish

log = logging.getLogger("lockfs.keeper")

ATTEMPT_S = 5.0
"""How long one attempt at the storage may take, in seconds, if its caller can wait no longer than that."""
CLOSE_DEADLINE_S = 5.0
"""How long a close waits for the storage to take a lease back before it leaves that to the keeper's loop."""


class Leases:
    """Moves leases between the records and the backend.

    `stir` is called when a record is left with more lease than it needs; `freed` when an image whose lease
    could not be given back at its last close is free at last. `lost` is called when a lease is lost for good,
    `doubt` when it cannot be relied on for the moment (see fencing), and `giving_back` before a lease is
    given back.
    """

    def __init__(  # noqa: PLR0917  (what the keeper is made of)
        self,
        backend: Backend,
        surroundings: Surroundings,
        workers: Workers,
        stir: Callable[[], None],
        freed: Callable[[Image], None],
        lost: Callable[[Record], None],
        doubt: Callable[[Record], None],
        giving_back: Callable[[Record], None] = lambda record: None,
    ) -> None:
        self._backend = backend
        self._surroundings = surroundings
        self._workers = workers
        self._stir = stir
        self._freed = freed
        self._lost = lost
        self._doubt = doubt
        self._giving_back = giving_back

    async def secure(self, record: Record, wish: Wish, *, announce: bool = True) -> None:
        """Make sure that the host certainly holds a lease at least as strong as wished, in one attempt.

        With `announce`, what is cached of an image whose lease is new is dropped before this returns. If it
        raises, the caller rolls back with `relax`.

        Raises:
            ImageBusy: somebody else holds the image (BusyHere: its end is an event of this keeper).
            BackendError: the storage did not answer (LeaseInDoubt: it has not lately).
        """
        limit = max(wish.deadline, trio.current_time() + ATTEMPT_S)
        if record.lease is not None and record.needed() is None:
            # A last close is under way, or failed. Its lease names a former owner: finish, begin anew.
            await self._give_back(record)
        lease = record.lease
        if lease is None:
            record.image = wish.image
            lease = await self._backend.acquire(wish.image, wish.mode, wish.owner, limit)
            record.take(lease)
        elif wish.mode is Mode.EXCLUSIVE and lease.mode is Mode.SHARED:
            self._check(record, lease)
            await self._backend.convert(lease, wish.mode, limit)
        if announce and not record.announced:
            await self._announce(record)
        self._check(record, lease)

    def _check(self, record: Record, lease: Lease) -> None:
        name = record.image.name
        if record.lost or lease.state in (LeaseState.LOST, LeaseState.RELEASED):
            if record.needed() is None:
                raise BackendError(f"the lease of image '{name}' was lost while being taken; try again")
            raise BusyHere(f"the lease of image '{name}' was lost; {lease.owner} must close the image first")
        if lease.state is not LeaseState.HELD or not lease.in_time():
            raise LeaseInDoubt(
                f"the lease of image '{name}' is in doubt: the storage has not answered in time; look there"
            )

    async def _announce(self, record: Record) -> None:
        if self._surroundings.wants_taken:
            try:
                await self._workers.call(self._surroundings.taken, record.image.inode)
            except OSError as error:
                raise BackendError(
                    f"what is cached of image '{record.image.name}' could not be dropped: {error.strerror}"
                ) from error
        record.announced = True

    async def bind(self, record: Record) -> None:
        """Have the storage itself refuse what the opens write that are about to, should it give the lease
        away. The caller has the lease and the turn.

        Raises:
            BackendError: the storage refused that.
        """
        if self._backend.binds:
            await self._workers.call(self._bind, record)

    def _bind(self, record: Record) -> None:
        for descriptor in self._surroundings.unwritten(record.image.inode):
            try:
                self._backend.bind(descriptor)
            except OSError as error:
                if error.errno != errno.EBADF:  # closed meanwhile
                    name = record.image.name
                    raise BackendError(f"an open of '{name}' cannot be bound: {error.strerror}") from error

    async def settle(self, record: Record) -> None:
        """Take the turn and give back what nobody needs; never raises an expected error, never cancelled.

        What the storage does not take in time is left to the keeper's loop.
        """
        with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_DEADLINE_S):
            async with record.turn:
                await self.relax(record)
        self._leave(record)

    async def relax(self, record: Record) -> None:
        """Give back what nobody needs, having the turn; never raises an expected error, never cancelled."""
        if not record.excess():
            return
        with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_DEADLINE_S) as scope:
            try:
                await self._lower(record)
            except LockfsError as error:
                log.error("image '%s': its lease could not be given back: %s", record.image.name, error)
        if scope.cancelled_caught:
            log.error("image '%s': the storage did not take its lease back in time", record.image.name)
        self._leave(record)

    async def retry(self, record: Record) -> None:
        """Try again to give back what an earlier close could not; takes the turn."""
        async with record.turn:
            had = record.lease is not None
            await self.relax(record)
            if had and record.lease is None:
                log.info("image '%s': its lease is given back at last", record.image.name)
                self._freed(record.image)

    def _leave(self, record: Record) -> None:
        if record.excess():
            self._stir()

    async def _lower(self, record: Record) -> None:
        if record.needed() is None:
            await self._give_back(record)
        elif record.lease is not None:
            await self._backend.convert(record.lease, Mode.SHARED, trio.current_time() + ATTEMPT_S)

    async def _give_back(self, record: Record) -> None:
        lease = record.lease
        if lease is None:
            return
        record.releasing = True
        self._giving_back(record)
        try:
            await self._backend.release(lease)
        except BackendError as error:
            if lease.state is not LeaseState.RELEASED:
                raise
            # The backend is done with it: what is left goes with the image's descriptor.
            log.warning("image '%s': its lease was given back, but not cleanly: %s", record.image.name, error)
        finally:
            record.releasing = False
        record.drop()
        log.debug("image '%s': lease given back", record.image.name)

    def changed(self, record: Record, lease: Lease) -> None:
        """A lease's state changed: let the gates follow. LOST is final for those who have the image open."""
        name = record.image.name
        if lease.state in (LeaseState.LOST, LeaseState.RELEASED):
            if record.releasing or record.lost:
                return
            log.error("image '%s': the lease of %s is lost; its writes are refused", name, lease.owner)
            self._lost(record)
        elif record.lost:
            log.error("image '%s': its lost lease came back; too late for those who have it open", name)
        elif lease.state is LeaseState.DOUBT:
            log.warning("image '%s': its lease is in doubt; writes wait", name)
            self._doubt(record)
        else:
            log.info("image '%s': its lease is certain again", name)
        record.refresh_gates()
        record.wake()
