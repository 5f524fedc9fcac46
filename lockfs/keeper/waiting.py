"""Waiting for an image: in line, within a deadline, interruptible, and polite to the storage.

One line per image. Only its head tries the storage; whoever waits for this host's own lease, or arrives
while this host has it, may try besides. A conflict on this host is not polled: its end wakes the waiters. A
conflict with another host is tried again after growing, jittered delays.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from random import Random
from typing import TypeVar

import trio

from lockfs.backends.base import Backend
from lockfs.errors import BackendError, ImageBusy, Interrupted, LockfsError
from lockfs.keeper.images import Record
from lockfs.keeper.leases import CLOSE_DEADLINE_S
from lockfs.keeper.wishes import BusyHere, LeaseInDoubt, Wish

log = logging.getLogger("lockfs.keeper")

T = TypeVar("T")

RETRY_FIRST_S = 0.01
RETRY_MAX_S = 0.1
RETRY_GROWTH = 1.6
RETRY_JITTER = 0.5
"""A delay is shortened by a random part, at most this one, so that hosts do not stay in step."""


class Waiting:
    """The lines of all images, and who stands in them by thread."""

    def __init__(self, backend: Backend, random: Random) -> None:
        self._backend = backend
        self._random = random
        self._by_thread: dict[int, Wish] = {}

    def interrupt(self, tid: int) -> None:
        """End the waiting of a thread with Interrupted, unless it has been served already."""
        wish = self._by_thread.get(tid)
        if wish is not None:
            wish.scope.cancel()

    async def until(self, record: Record, wish: Wish, attempt: Callable[[], Awaitable[T]]) -> T:
        """Call `attempt`, which takes the record's turn itself, until it succeeds.

        Cancelled, interrupted or failed, the wish leaves the line and its request is withdrawn; that nothing
        is taken then is the attempt's business.

        Raises:
            ImageBusy, BackendError: the last refusal, when the deadline has passed.
            BackendError: at once, unless the wish is tolerant.
            Interrupted: `interrupt` was called for the opener's thread.
        """
        # A claim waits in some request of the channel's, not in the open of the thread that once opened.
        tid = 0 if wish.urgent else wish.opener.tid
        record.enqueue(wish)
        if tid > 0:
            self._by_thread[tid] = wish
        try:
            with wish.scope:
                return await self._persist(record, wish, attempt)
        finally:
            if self._by_thread.get(tid) is wish:
                del self._by_thread[tid]
            record.dequeue(wish)
            if wish.asked:
                await self._withdraw(record, wish)
        raise Interrupted(f"waiting for image '{record.image.name}' was interrupted by a signal")

    async def _persist(self, record: Record, wish: Wish, attempt: Callable[[], Awaitable[T]]) -> T:
        arriving = True
        delay = RETRY_FIRST_S
        while True:
            refusal: LockfsError | None = None
            if record.leads(wish) or record.covers(wish) or (arriving and record.owners()):
                try:
                    return await attempt()
                except (ImageBusy, LeaseInDoubt) as error:
                    refusal = error
                except BackendError as error:
                    if not wish.tolerant:
                        raise
                    refusal = error
            record.refusal = refusal or record.refusal
            arriving = False
            if trio.current_time() >= wish.deadline:
                raise refusal or self._crowded(record)
            polls = refusal is not None and not isinstance(refusal, BusyHere | LeaseInDoubt)
            until = wish.deadline
            if polls:
                await self._ask(record, wish)
                until = min(until, trio.current_time() + delay * (1 - RETRY_JITTER * self._random.random()))
                delay = min(delay * RETRY_GROWTH, RETRY_MAX_S)
            with trio.move_on_at(until):
                await wish.wake.wait()
            wish.wake = trio.Event()

    def _crowded(self, record: Record) -> LockfsError:
        """The refusal of one who never came to the head of the line: what the head was told last."""
        if record.refusal is not None:
            return type(record.refusal)(str(record.refusal))
        ahead = record.queue[0].opener
        return ImageBusy(f"image '{record.image.name}' is awaited by {ahead} and others on this host")

    async def _ask(self, record: Record, wish: Wish) -> None:
        """Ask the holder to let go, when it is time; that the storage does not take it is not the end."""
        if wish.ask_at is None or trio.current_time() < wish.ask_at:
            return
        wish.asked = True
        try:
            await self._backend.request(record.image, wish.owner)
        except BackendError as error:
            log.warning("image '%s': its holder could not be asked for it: %s", record.image.name, error)

    async def _withdraw(self, record: Record, wish: Wish) -> None:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_DEADLINE_S):
            try:
                await self._backend.withdraw(record.image, wish.owner)
            except BackendError as error:
                log.warning("image '%s': a request could not be taken back: %s", record.image.name, error)
