"""Giving a lease to the guest that takes over: claims on one side, yielding on the other.

A grant is yielded only by a guest that has surely stopped: it never changed anything yet, or QEMU's write
byte was seen held while it could, and is held no more. Order of a yield, which keeps two writers apart:
gates to ASK, wait until no change is under way, look at the byte again, bring all data to the storage, call
the grants PROVISIONAL, and only then give the lease away. Until the last but one step it can be undone.
"""

from __future__ import annotations

import logging

import trio

from lockfs.backends.base import Backend, Image
from lockfs.errors import BackendError, ImageBusy, LeaseUnavailable, WriteRefused
from lockfs.keeper.gate import GateState
from lockfs.keeper.grants import Grant, Kind
from lockfs.keeper.images import Ledger, Record
from lockfs.keeper.leases import Leases
from lockfs.keeper.rivals import Rivals
from lockfs.keeper.surroundings import Surroundings, Workers
from lockfs.keeper.waiting import Waiting
from lockfs.keeper.wishes import Claim, LeaseInDoubt, Wish

log = logging.getLogger("lockfs.keeper")

DRAIN_S = 2.0
"""How long a yield waits, in seconds, for changes under way; after that the gates open again."""
DRAIN_POLL_FIRST_S = 0.0005
DRAIN_POLL_MAX_S = 0.02
RESERVED_S = 0.5
"""How long, in seconds, waiting opens of this host leave a yielded lease to the host that asked for it."""
LOOK_FIRST_S = 0.1
LOOK_MAX_S = 2.0
"""The longest pause between two looks at whether a guest holds its write byte, until it was seen once."""


class Yielding:
    """The holder's side: takes the lease from stopped guests."""

    def __init__(
        self, backend: Backend, ledger: Ledger, leases: Leases, surroundings: Surroundings, workers: Workers
    ) -> None:
        self._backend = backend
        self._ledger = ledger
        self._leases = leases
        self._surroundings = surroundings
        self._workers = workers
        self._deaf = False

    def candidates(self) -> list[Record]:
        """The images that might be yielded one day, so that requests must be looked for."""
        return [record for record in self._ledger.all() if self._could_yield(record)]

    async def poll(self, candidates: list[Record]) -> None:
        """Look once at the write bytes and the requests, and yield what is asked for and can be."""
        for record in candidates:
            await self._look(record)
        ready = {record.image.inode for record in candidates if self._ready(record)}
        if not ready:
            return
        try:
            asked = await self._backend.requested(ready)
        except BackendError as error:
            if not self._deaf:
                log.warning("requests of other hosts cannot be read: %s", error)
            self._deaf = True
            return
        self._deaf = False
        async with trio.open_nursery() as nursery:
            for record in candidates:
                if record.image.inode in asked & ready:
                    nursery.start_soon(self._yield_away, record)

    async def _yield_away(self, record: Record) -> None:
        with self._ledger.use(record.image):
            async with record.turn:
                # Readers under the same lease would keep the asking host out all the same.
                if any(grant.covered for grant in record.grants):
                    return
                if not await self.demote(record, settle=True):
                    return
                record.reserved_until = trio.current_time() + RESERVED_S
                await self._leases.relax(record)
            log.info("image '%s': yielded to the host that asked for it", record.image.name)
            record.wake()

    async def demote(self, record: Record, *, settle: bool) -> bool:
        """Make every LEASED grant PROVISIONAL if their guests have stopped; the caller has the turn.

        True: the lease is still this host's, and the caller passes it on. False: nothing has changed.
        """
        if not self._ready(record) or await self._written(record):
            return False
        record.yielding = True
        record.refresh_gates()
        try:
            if not await self._drained(record) or await self._written(record):
                return False
            if settle and not await self._settled(record):
                return False
            if not self._ready(record):
                return False
            for grant in record.owners():
                grant.kind = Kind.PROVISIONAL
                grant.active = grant.seen = False
            return True
        finally:
            record.yielding = False
            record.refresh_gates()

    def _could_yield(self, record: Record) -> bool:
        owners = record.owners()
        return bool(owners) and record.sure and all(grant.may_yield for grant in owners)

    def _ready(self, record: Record) -> bool:
        """Whether the byte's absence would mean that every writer here has stopped."""
        if not self._could_yield(record) or record.removers:
            return False
        return all(grant.seen or not grant.active for grant in record.owners())

    async def _look(self, record: Record) -> None:
        """See whether guests that can write hold their byte, ever more seldom until they were seen to.

        Only where no other guest could be the one that holds it.
        """
        now = trio.current_time()
        if now < record.look_at or not _blind(record) or not _one_writer(record):
            return
        record.look_gap_s = min(max(LOOK_FIRST_S, record.look_gap_s * 2), LOOK_MAX_S)
        record.look_at = now + record.look_gap_s
        try:
            written = await self._workers.call(self._surroundings.still_written, record.image.inode)
        except OSError as error:
            log.warning("image '%s': locks cannot be read: %s", record.image.name, error)
            return
        if written and _one_writer(record):
            for grant in _blind(record):
                grant.seen = True

    async def _written(self, record: Record) -> bool:
        """Whether a guest may be writing; also if that cannot be known."""
        try:
            return await self._workers.call(self._surroundings.still_written, record.image.inode)
        except OSError as error:
            log.warning("image '%s': locks cannot be read: %s", record.image.name, error)
            return True

    async def _drained(self, record: Record) -> bool:
        """Wait, boundedly, until no change is under way through any grant that had the lease."""
        gates = [grant.gate for grant in record.owners()]
        end = trio.current_time() + DRAIN_S
        pause = DRAIN_POLL_FIRST_S
        while any(gate.inside for gate in gates):
            if trio.current_time() >= end:
                log.warning("image '%s': not yielded, a write is under way for long", record.image.name)
                return False
            await trio.sleep(pause)
            pause = min(pause * 1.5, DRAIN_POLL_MAX_S)
        return True

    async def _settled(self, record: Record) -> bool:
        try:
            await self._workers.call(self._surroundings.settle, record.image.inode)
        except OSError as error:
            log.error("image '%s': not yielded, its data cannot be flushed: %s", record.image.name, error)
            return False
        return True


class Claims:
    """The successor's side: gets the lease for a grant whose gate said ASK."""

    def __init__(
        self, ledger: Ledger, leases: Leases, waiting: Waiting, rivals: Rivals, yielding: Yielding
    ) -> None:
        self._ledger = ledger
        self._leases = leases
        self._waiting = waiting
        self._rivals = rivals
        self._yielding = yielding

    async def claim(self, image: Image, grant: Grant, wish: Wish) -> None:
        """Wait until the grant may change data; claims of one process for one image join.

        Raises:
            LeaseUnavailable: not in time, or never again.
            LockfsError: the gate's own refusal, where the grant may change nothing.
        """
        with self._ledger.use(image) as record:
            while not self._allowed(record, grant):
                ongoing = record.claims.get(key := _process_key(grant))
                if ongoing is None:
                    await self._lead(record, grant, wish, key)
                    return
                await ongoing.done.wait()
                if ongoing.failure is not None:
                    raise LeaseUnavailable(str(ongoing.failure))

    def _allowed(self, record: Record, grant: Grant) -> bool:
        if grant.gate.state is GateState.SHUT or grant not in record.grants:
            raise grant.gate.refusal or LeaseUnavailable(f"this open of '{record.image.name}' has ended")
        return grant.gate.passable

    async def _lead(self, record: Record, grant: Grant, wish: Wish, key: object) -> None:
        claim = record.claims[key] = Claim()

        async def attempt() -> None:
            await self._attempt(record, grant, wish)

        try:
            await self._waiting.until(record, wish, attempt)
        except LeaseUnavailable as error:
            claim.failure = error
            raise
        except (ImageBusy, BackendError) as error:
            if grant.kind is Kind.MANAGED:
                claim.failure = WriteRefused(f"{grant.opener} may not write without the lease: {error}")
                raise claim.failure from error
            claim.failure = LeaseUnavailable(f"no lease to write with, in time: {error}")
            raise claim.failure from error
        finally:
            del record.claims[key]
            claim.done.set()

    async def _attempt(self, record: Record, grant: Grant, wish: Wish) -> None:
        async with record.turn:
            try:
                if self._allowed(record, grant):
                    return
                if grant.kind in (Kind.PROVISIONAL, Kind.MANAGED, Kind.SUSPENDED):
                    await self._become_writer(record, grant, wish)
                elif not record.sure:
                    raise LeaseInDoubt(f"the lease of image '{record.image.name}' is in doubt")
                self._allowed(record, grant)
                self._activate(record, grant)
            finally:
                await self._leases.relax(record)

    async def _become_writer(self, record: Record, grant: Grant, wish: Wish) -> None:
        rival = self._rivals.within(record, grant.opener)
        if rival is None:
            await self._leases.secure(record, wish)
        elif grant.kind is not Kind.MANAGED and await self._yielding.demote(record, settle=False):
            log.info("image '%s': handed over by %s to %s", record.image.name, rival, grant.opener)
        else:
            # Polled, although on this host: that a guest stops is no event here.
            raise ImageBusy(f"image '{record.image.name}' is being written by {rival} on this host")
        if grant.kind is Kind.SUSPENDED:
            self._check_lineage(record, grant)
        await self._leases.bind(record)

    def _check_lineage(self, record: Record, grant: Grant) -> None:
        """Refuse, for good, a grant whose lease somebody else has had since it was lost.

        Raises:
            LeaseUnavailable: the image may be another by now than the one that the grant's guest knows.
        """
        if record.lease is not None and grant.lost is not None and record.lease.follows(grant.lost):
            return
        log.error(
            "image '%s': somebody else has had it since %s lost its lease; it must be opened again",
            record.image.name,
            grant.opener,
        )
        grant.kind = Kind.FENCED
        record.refresh_gates()
        raise grant.gate.refusal or LeaseUnavailable(f"the lease of '{record.image.name}' was lost for good")

    def _activate(self, record: Record, grant: Grant) -> None:
        """Let the grant's whole process write under the lease."""
        self._rivals.outlive(record, grant.opener)
        for other in record.grants:
            if other is grant or other.opener.same_process(grant.opener):
                if other.kind in (Kind.PROVISIONAL, Kind.SUSPENDED) or other is grant:
                    other.kind, other.lost = Kind.LEASED, None
                if other.kind is Kind.LEASED:
                    other.active = True
        record.look_at = record.look_gap_s = 0.0
        record.refresh_gates()
        log.debug("image '%s': claimed by %s", record.image.name, grant.opener)


def _blind(record: Record) -> list[Grant]:
    """The grants that may have changed data and whose guest was not seen to hold its byte."""
    return [grant for grant in record.owners() if grant.active and not grant.seen]


def _one_writer(record: Record) -> bool:
    """Whether only one process here has the image open so that it could hold the byte."""
    return len({_process_key(grant) for grant in record.grants if grant.writes}) == 1


def _process_key(grant: Grant) -> object:
    """What claims join by: the process, or the grant alone where the process is not known for sure."""
    process = grant.opener.process
    return (process.pid, process.started) if process.pid > 0 and process.started > 0 else grant
