"""The lease keeper: which opens need a lease, who gets one, who waits, who is refused.

It promises that at no moment two hosts, or with `local=process` two processes of this host, have an OPEN
gate on one image. It knows images, processes and a backend, and nothing of how opens arrive.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from random import Random

import trio

from lockfs.backends.base import Backend, Forgetful, Holder, Image, Lease, Memory, Mode, Owner
from lockfs.errors import ImageBusy, WriteRefused
from lockfs.keeper.fencing import FENCE_THREADS, Fencing
from lockfs.keeper.gate import Gate, GateState
from lockfs.keeper.grants import Access, Grant, HeldImage, Kind, managed, reader
from lockfs.keeper.handover import Claims, Yielding
from lockfs.keeper.images import Ledger, Record
from lockfs.keeper.landings import FLUSH_THREADS, Landings
from lockfs.keeper.leases import Leases
from lockfs.keeper.notes import Notes
from lockfs.keeper.openers import Opener, Role
from lockfs.keeper.policy import Policy, Readers
from lockfs.keeper.rivals import Rivals
from lockfs.keeper.surroundings import Surroundings, Threads, Workers
from lockfs.keeper.waiting import Waiting
from lockfs.keeper.wishes import BusyHere, LeaseInDoubt, Wish

__all__ = ["Access", "Grant", "HeldImage", "Keeper", "Kind", "Surroundings"]

log = logging.getLogger("lockfs.keeper")

REQUEST_POLL_S = 0.1
RELEASE_RETRY_S = 1.0
OPEN_ASKS_AFTER_S = 0.5
"""An incoming guest that waits in open asks the holder only after this long: most let go by themselves."""


class Keeper:
    """One keeper for each mount. Everything is called on the trio thread.

    All images of one inode that are open at a time bring the same descriptor. `freed` is called when an image
    for which `holds` was still true after its last close is free at last. `memory` is for the keeper that
    goes on should this one be killed (`recall`). `clock` tells the epoch.
    """

    def __init__(
        self,
        backend: Backend,
        policy: Policy,
        host: str,
        *,
        surroundings: Surroundings,
        freed: Callable[[Image], None] = lambda image: None,
        workers: Workers | None = None,
        memory: Memory | None = None,
        clock: Callable[[], float] = time.time,
        random: Random | None = None,
    ) -> None:
        given = workers is not None
        workers = workers or Threads()
        self._backend = backend
        self._policy = policy
        self._host = host
        self._clock = clock
        self._notes = Notes(memory or Forgetful())
        self._ledger = Ledger(self._notes.note)
        self._stirred = trio.Event()
        self._reading_only = False
        self._leases = Leases(
            backend,
            surroundings,
            workers,
            self._stir,
            freed,
            self._lost,
            self._doubt,
            lambda record: self._notes.note(record, releasing=True),
        )
        fencers = workers if given else Threads(FENCE_THREADS)
        self._landings = Landings(self._ledger, surroundings, workers if given else Threads(FLUSH_THREADS))
        self._fencing = Fencing(
            self._ledger, self._leases, surroundings, fencers, policy, landings=self._landings
        )
        self._waiting = Waiting(backend, random or Random())
        self._rivals = Rivals(policy, host, surroundings, workers)
        self._yielding = Yielding(backend, self._ledger, self._leases, surroundings, workers)
        self._claims = Claims(self._ledger, self._leases, self._waiting, self._rivals, self._yielding)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look after yielding, late releases and fencing until cancelled.

        Opens and closes work without it. Whoever runs it starts the backend before, with `lease_changed`.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._fencing.run)
            task_status.started()
            await self._look_after()

    async def _look_after(self) -> None:
        retry_at = 0.0
        while True:
            self._stirred = trio.Event()
            late = [record for record in self._ledger.all() if record.excess()]
            if not late and not self._yielding.candidates():
                await self._stirred.wait()
                continue
            await trio.sleep(REQUEST_POLL_S)
            await self._yielding.poll(self._yielding.candidates())
            if late and trio.current_time() >= retry_at:
                retry_at = trio.current_time() + RELEASE_RETRY_S
                await self._retry(late)

    async def _retry(self, late: list[Record]) -> None:
        for record in late:
            with self._ledger.use(record.image):
                await self._leases.retry(record)
            record.wake()

    async def recall(self, opens: Mapping[int, Image]) -> dict[int, Grant]:
        """Go on with grants that a former worker gave, by their numbers; those it had not noted are missing.

        After the backend's `start`, before `run`; `resume` must follow.

        Raises:
            BackendError: the storage did not answer.
        """
        grants = {number: self._notes.grant_of(number, image) for number, image in opens.items()}
        known = {number: grant for number, grant in grants.items() if grant is not None}
        for grant in known.values():
            with self._ledger.use(grant.image) as record:
                record.grants[grant] = None
        async with trio.open_nursery() as nursery:
            for record in self._ledger.all():
                nursery.start_soon(self._recall_lease, record)
        self._notes.forget_unknown(known.values())
        return known

    async def _recall_lease(self, record: Record) -> None:
        noted = self._notes.lease_of(record.image.inode)
        if record.needed() is None or noted is None:
            return
        mode, owner, lost, suspending = noted
        with self._ledger.use(record.image):
            lease = await self._backend.recall(record.image, mode, owner)
            if lease is None:
                record.lost = True
                return
            record.take(lease)
            record.lost = record.lost or lost
            record.suspending = suspending
            record.announced = True

    def resume(self, *, reading_only: bool = False) -> None:
        """The opens of recalled grants are known to the mount: open their gates, fence what was lost.

        `reading_only`: fence all that may write, and let nobody write from here on.
        """
        self._reading_only = reading_only
        for record in self._ledger.all():
            suspending, record.suspending = record.suspending, False
            if reading_only:
                if any(grant.writes and grant.kind is not Kind.FENCED for grant in record.grants):
                    self._fencing.condemn(record)
            elif record.needed() is not None and (record.lease is None or record.lost):
                log.error("image '%s': its lease did not outlive the former worker", record.image.name)
                if suspending and record.lease is not None:
                    self._fencing.lost(record)
                else:
                    self._fencing.condemn(record)
            record.refresh_gates()
            self._notes.note(record)
        self._stir()

    def lease_changed(self, lease: Lease) -> None:
        """The backend's event: the state of a lease of this host changed."""
        record = self._ledger.find(lease.image.inode)
        if record is not None and record.lease is lease:
            self._leases.changed(record, lease)
            self._stir()

    async def fence(self, inode: int | None) -> int:
        """Fence an image by hand, or all: what is open of it is dead and its lease given back when this
        returns.

        Cancelled, it goes on. Returns how many opens there were; images that nobody here can write to are
        left alone.
        """
        opens, ends = 0, []
        for record in self._ledger.all():
            live = [grant for grant in record.grants if grant.kind is not Kind.FENCED]
            if inode in (None, record.image.inode) and any(grant.writes for grant in live):
                log.error("image '%s': fenced by hand", record.image.name)
                ends.append(self._fencing.condemn(record))
                self._notes.note(record)
                opens += len(live)
        for end in ends:
            await end.wait()
        return opens

    @property
    def fences_hold(self) -> bool:
        """Whether nothing here can change an image whose lease is lost or in doubt, nor has begun to."""
        return not self._fencing.unfenced and self._landings.over

    def _lost(self, record: Record) -> None:
        self._fencing.lost(record)
        self._notes.note(record)

    def _doubt(self, record: Record) -> None:
        self._fencing.doubt(record)

    async def open(self, image: Image, opener: Opener, access: Access) -> Grant:
        """Grant an open, waiting as the policy says. Cancelled or failed, nothing stays taken.

        Raises:
            ImageBusy: somebody else holds the image; the sentence names them.
            Interrupted: `interrupt` was called for the opener's thread.
            BackendError: the storage did not answer.
        """
        if access is not Access.READ:
            self._check_writing(image)
        if access is Access.READ:
            grant = await self._open_reader(image, opener)
        elif opener.role is Role.MANAGER:
            grant = managed(image, opener, self._clock())
            with self._ledger.use(image) as record:
                record.grants[grant] = None
        else:
            grant = await self._open_writer(image, opener)
        log.debug("image '%s': %s by %s", image.name, grant.kind.value, opener)
        return grant

    async def close(self, grant: Grant) -> None:
        """End a grant. When this returns its lease is given back, if nobody else here needs it.

        Never cancelled, raises nothing; what the storage does not take in time is tried again by `run`, and
        `holds` tells. The caller has brought the data to where another host would read it. From the call
        on, nothing changes data through the grant.
        """
        record = self._ledger.find(grant.image.inode)
        if record is None or grant not in record.grants:
            log.error("image '%s': an open of %s was closed twice", grant.image.name, grant.opener)
            return
        grant.gate.set(GateState.SHUT, grant.gate.refusal)
        with self._ledger.use(grant.image):
            del record.grants[grant]
            if record.excess():
                await self._leases.settle(record)
            record.wake()

    async def claim(self, grant: Grant) -> None:
        """A gate answered ASK: return when it may be entered again.

        Raises:
            LeaseUnavailable: no lease within `handover_wait`, or it was lost for good.
            WriteRefused: a manager asked for the lease of an image that is not free.
        """
        now = trio.current_time()
        managed = grant.kind is Kind.MANAGED
        patience = self._policy.wait if managed else self._policy.handover_wait
        if grant.kind is Kind.LEASED:
            patience = max(patience, self._backend.patience)
        wish = self._wish(grant.image, grant.opener, Mode.EXCLUSIVE, now + patience)
        wish.tolerant = True
        if not managed:
            wish.urgent = True
            if grant.kind is not Kind.SUSPENDED:  # whoever has the image by now is not to be disturbed
                wish.ask_at = now
        await self._claims.claim(grant.image, grant, wish)
        self._stir()

    @asynccontextmanager
    async def changing(self, image: Image, opener: Opener) -> AsyncIterator[Grant]:
        """Hold the lease around a change by path (truncate). Waits and fails as `open` for writing does.

        A manager's change is a writer's like any other, for it names no handle of its own.
        """
        self._check_writing(image)
        grant = await self._lease(image, opener, may_yield=False)
        try:
            yield grant
        finally:
            await self.close(grant)

    @asynccontextmanager
    async def removing(self, image: Image, opener: Opener) -> AsyncIterator[None]:
        """Keep other hosts away while the image is unlinked or renamed over. Openers here are no obstacle.

        Raises:
            ImageBusy: another host holds it, at once.
            BackendError: the storage did not answer.
        """
        self._check_writing(image)
        wish = self._wish(image, opener, Mode.EXCLUSIVE, trio.current_time())
        with self._ledger.use(image) as record:
            async with record.turn:
                try:
                    await self._leases.secure(record, wish, announce=False)
                    record.removers.append(opener)
                finally:
                    await self._leases.relax(record)
            try:
                yield
            finally:
                record.removers.remove(opener)
                await self._leases.settle(record)
                record.wake()

    async def others(self, image: Image) -> list[Holder]:
        """Who else, of other hosts, holds the image."""
        return await self._backend.holders(image)

    @property
    def binds(self) -> bool:
        """Whether `bind` does anything."""
        return self._backend.binds

    def bind(self, descriptor: int) -> None:
        """Have the storage itself refuse what is written through a new description, should it give this
        host's lease of the image away. On a worker thread.

        Raises:
            OSError: the storage refused that.
        """
        self._backend.bind(descriptor)

    def interrupt(self, tid: int) -> None:
        """A signal hit a thread that waits in `open` or `changing`: its wait ends with Interrupted."""
        self._waiting.interrupt(tid)

    def holds(self, inode: int) -> bool:
        """Whether this host has a lease of the image, so that its descriptor must stay open."""
        record = self._ledger.find(inode)
        return record is not None and record.lease is not None

    def images(self) -> list[HeldImage]:
        """Every image that anybody here has open or waits for, and every lease."""
        return [record.picture() for record in self._ledger.all()]

    async def _open_reader(self, image: Image, opener: Opener) -> Grant:
        shared = self._policy.readers is Readers.SHARED and opener.role in (Role.ORDINARY, Role.GUEST)
        grant = reader(image, opener, self._clock(), covered=shared)
        with self._ledger.use(image) as record:
            if not shared:
                record.grants[grant] = None
                return grant
            wish = self._wish(image, opener, Mode.SHARED, trio.current_time() + self._policy.wait)
            return await self._waiting.until(record, wish, lambda: self._enter(record, wish, grant))

    async def _open_writer(self, image: Image, opener: Opener) -> Grant:
        record = self._ledger.find(image.inode)
        guest = opener.role in (Role.GUEST, Role.INCOMING)
        # A guest with a read-only descriptor opens for writing only while it runs, and closes to stop.
        early = guest and not (record is not None and record.reads(opener))
        may_yield = early and self._policy.yielding
        if not (early and opener.role is Role.INCOMING):
            return await self._lease(image, opener, may_yield=may_yield)
        try:
            return await self._lease(image, opener, may_yield=may_yield, patience=0.0)
        except (ImageBusy, LeaseInDoubt):
            gate = Gate(GateState.ASK)
            now = self._clock()
            grant = Grant(image, opener, Access.WRITE, Kind.PROVISIONAL, gate, may_yield=may_yield, since=now)
        with self._ledger.use(image) as record:
            record.grants[grant] = None
        return grant

    async def _lease(
        self, image: Image, opener: Opener, *, may_yield: bool, patience: float | None = None
    ) -> Grant:
        incoming = opener.role is Role.INCOMING
        now = trio.current_time()
        if patience is None:
            patience = self._policy.handover_wait if incoming else self._policy.wait
        wish = self._wish(image, opener, Mode.EXCLUSIVE, now + patience)
        if incoming and patience:
            # Refused now, a guest that takes over is lost (QEMU 10): bear with a storage that stutters.
            wish.tolerant = True
            wish.ask_at = now + OPEN_ASKS_AFTER_S
        gate = Gate(GateState.ASK)
        since = self._clock()
        grant = Grant(image, opener, Access.WRITE, Kind.LEASED, gate, may_yield=may_yield, since=since)
        # An incoming guest that may yield has not run yet; its first change will tell.
        grant.active = not (incoming and may_yield)
        with self._ledger.use(image) as record:
            await self._waiting.until(record, wish, lambda: self._enter(record, wish, grant))
        if may_yield:
            self._stir()
        return grant

    async def _enter(self, record: Record, wish: Wish, grant: Grant) -> Grant:
        """One attempt to enter a grant that needs the lease; all or nothing."""
        image = record.image
        async with record.turn:
            if grant.writes:
                await self._rivals.refuse(record, wish.opener)
            if record.lease is None and not record.leads(wish):
                raise BusyHere(f"image '{image.name}' is awaited by others on this host ({self._host})")
            if record.reserved(wish):
                raise ImageBusy(f"image '{image.name}' is being handed over to another host")
            try:
                await self._leases.secure(record, wish)
                if grant.writes:
                    self._rivals.outlive(record, grant.opener)
                record.enter(grant)
            finally:
                await self._leases.relax(record)
        return grant

    def _wish(self, image: Image, opener: Opener, mode: Mode, deadline: float) -> Wish:
        owner = Owner(self._host, opener.process.pid, opener.process.program, self._clock())
        return Wish(image, opener, owner, mode, deadline)

    def _check_writing(self, image: Image) -> None:
        if self._reading_only:
            raise WriteRefused(
                f"image '{image.name}' cannot be changed: lockfs keeps failing on this mount, see its log"
            )

    def _stir(self) -> None:
        """There may be something to look after."""
        self._stirred.set()
