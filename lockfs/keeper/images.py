"""The books: one record for each image that anybody here has open, waits for or holds a lease of.

A record's `turn` is the one lock of an image. Invariants:

* The lease changes, and grants are added or change their kind, only by the task that has the turn. A
  grant is removed without it, at once, by its close.
* Gates follow from the record alone (`refresh_gates`): a gate is OPEN only for an active LEASED grant
  under a lease that is HELD, was never lost, and is not being yielded.
* A lease that is more than the grants need (`excess`) is being given back, or the keeper's loop was told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

import trio

from lockfs.backends.base import Image, Lease, LeaseState, Mode
from lockfs.errors import LeaseUnavailable, LockfsError
from lockfs.keeper.gate import GateState
from lockfs.keeper.grants import Grant, HeldImage, Kind
from lockfs.keeper.openers import Opener
from lockfs.keeper.wishes import Claim, Wish


class Turn:
    """A fair lock that costs no pass through the scheduler when it is free."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = trio.Lock()

    async def __aenter__(self) -> None:
        try:
            self._lock.acquire_nowait()
        except trio.WouldBlock:
            await self._lock.acquire()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()


class Record:
    """What the keeper knows of one image.

    `users` counts the operations under way on it. `lost`: the lease is no more than an entry in the books;
    `suspending`: its opens will be SUSPENDED in a moment. Until trio time `reserved_until` a free lease is
    left to the host it was yielded to. `look_at` and `look_gap_s` pace the looks for QEMU's write byte.
    """

    def __init__(self, image: Image) -> None:
        self.image = image
        self.turn = Turn()
        self.users = 0
        self.lease: Lease | None = None
        self.lost = False
        self.suspending = False
        self.announced = False
        self.yielding = False
        self.releasing = False
        self.grants: dict[Grant, None] = {}
        self.removers: list[Opener] = []
        self.queue: list[Wish] = []
        self.claims: dict[object, Claim] = {}
        self.refusal: LockfsError | None = None
        self.reserved_until = 0.0
        self.look_at = 0.0
        self.look_gap_s = 0.0

    def take(self, lease: Lease) -> None:
        """Enter a lease that was just acquired."""
        self.lease = lease
        self.lost = lease.state in (LeaseState.LOST, LeaseState.RELEASED)
        self.suspending = False
        self.announced = False

    def drop(self) -> None:
        """Strike out a lease that was given back."""
        self.lease = None
        self.lost = self.suspending = False
        self.announced = False

    def enter(self, grant: Grant) -> None:
        """Enter a grant whose lease is in hand.

        A process that was seen to hold its write byte has been seen for all its handles.
        """
        grant.seen = grant.active and any(
            other.seen and other.opener.same_process(grant.opener) for other in self.owners()
        )
        self.grants[grant] = None
        self.look_at = self.look_gap_s = 0.0
        self.refresh_gates()

    @property
    def sure(self) -> bool:
        """Whether this host certainly holds a lease now."""
        lease = self.lease
        return lease is not None and not self.lost and lease.state is LeaseState.HELD and lease.in_time()

    def owners(self) -> list[Grant]:
        """The grants that write under the host's lease."""
        return [grant for grant in self.grants if grant.kind is Kind.LEASED]

    def owned_by(self, opener: Opener) -> bool:
        """Whether the opener's process already writes under the host's lease."""
        return any(grant.opener.same_process(opener) for grant in self.owners())

    def reads(self, opener: Opener) -> bool:
        """Whether the opener's process has the image open for reading only."""
        return any(g.kind is Kind.READER and g.opener.same_process(opener) for g in self.grants)

    def needed(self) -> Mode | None:
        """The weakest lease that covers every grant and every removal under way."""
        if self.removers or any(grant.kind is Kind.LEASED for grant in self.grants):
            return Mode.EXCLUSIVE
        if any(grant.covered for grant in self.grants):
            return Mode.SHARED
        return None

    def excess(self) -> bool:
        """Whether the host's lease is more than is needed."""
        if self.lease is None:
            return False
        need = self.needed()
        return need is None or (need is Mode.SHARED and self.lease.mode is Mode.EXCLUSIVE and not self.lost)

    def idle(self) -> bool:
        """Whether the record says nothing any more."""
        return not (self.users or self.grants or self.queue or self.removers or self.lease)

    def refresh_gates(self) -> None:
        """Make every writing grant's gate follow from the lease. Nobody else opens a gate."""
        for grant in self.grants:
            if grant.kind in (Kind.PROVISIONAL, Kind.MANAGED, Kind.SUSPENDED):
                grant.gate.set(GateState.ASK)
            elif grant.kind is Kind.FENCED:
                grant.gate.set(GateState.SHUT, self._loss(grant))
            elif grant.kind is Kind.LEASED:
                self._set_leased(grant)

    def _set_leased(self, grant: Grant) -> None:
        if self.suspending:
            grant.gate.set(GateState.ASK)
        elif self.lost or self.lease is None:
            grant.gate.set(GateState.SHUT, self._loss(grant))
        elif self.sure and grant.active and not self.yielding:
            grant.gate.set(GateState.OPEN, in_time=self.lease.in_time)
        else:
            grant.gate.set(GateState.ASK)

    def _loss(self, grant: Grant) -> LeaseUnavailable:
        return LeaseUnavailable(
            f"the lease of image '{self.image.name}' was lost, another host may hold it: "
            f"{grant.opener} must close it and open it again"
        )

    def enqueue(self, wish: Wish) -> None:
        """Line up: urgent wishes before the others, each group in order of arrival."""
        at = len(self.queue)
        while wish.urgent and at and not self.queue[at - 1].urgent:
            at -= 1
        self.queue.insert(at, wish)

    def dequeue(self, wish: Wish) -> None:
        """Leave the line and let the next one try."""
        self.queue.remove(wish)
        if not self.queue:
            self.refusal = None
        self.wake()

    def leads(self, wish: Wish) -> bool:
        """Whether it is this wish's turn to try the storage."""
        return self.queue[0] is wish

    def reserved(self, wish: Wish) -> bool:
        """Whether the wish must leave the image to the host that the lease was yielded to."""
        return self.lease is None and not wish.urgent and trio.current_time() < self.reserved_until

    def covers(self, wish: Wish) -> bool:
        """Whether the wish waits for nothing but this host's own lease: then it need not stand in line."""
        if self.lease is None:
            return False
        return wish.mode is Mode.SHARED or self.owned_by(wish.opener)

    def wake(self) -> None:
        """Something changed: let those try again whom it can help."""
        for position, wish in enumerate(self.queue):
            if position == 0 or self.covers(wish):
                wish.wake.set()

    def picture(self) -> HeldImage:
        """The record for reports."""
        openers = [(g.opener.process.pid, g.opener.process.program, g.kind.value) for g in self.grants]
        openers += [(o.process.pid, o.process.program, "removing") for o in self.removers]
        waiting = tuple((w.opener.process.pid, w.opener.process.program) for w in self.queue)
        oldest = min((grant.since for grant in self.grants), default=0.0)
        return HeldImage(
            inode=self.image.inode,
            name=self.image.name,
            state=self._state(),
            mode=self.lease.mode if self.lease else None,
            since=self.lease.owner.since if self.lease else oldest,
            openers=tuple(openers),
            waiting=waiting,
        )

    def _state(self) -> str:
        if self.lease is not None:
            if self.yielding:
                return "yielding"
            if self.needed() is None:
                return "releasing"
            state: LeaseState = LeaseState.LOST if self.lost else self.lease.state
            return str(state.value)
        kinds = {grant.kind for grant in self.grants}
        for kind in (Kind.PROVISIONAL, Kind.MANAGED, Kind.SUSPENDED, Kind.FENCED):
            if kind in kinds:
                return str(kind.value)
        return "reading" if kinds else "waiting"


class Ledger:
    """All records, by inode. A record exists exactly as long as it says something."""

    def __init__(self, note: Callable[[Record], None] = lambda record: None) -> None:
        """`note` is called whenever an operation on a record has ended."""
        self._note = note
        self._records: dict[int, Record] = {}

    def __len__(self) -> int:
        return len(self._records)

    def find(self, inode: int) -> Record | None:
        """The record of an inode, if there is one."""
        return self._records.get(inode)

    def all(self) -> list[Record]:
        """A copy of all records."""
        return list(self._records.values())

    @contextmanager
    def use(self, image: Image) -> Iterator[Record]:
        """The image's record, made if need be, kept during the block."""
        record = self._records.get(image.inode)
        if record is None:
            record = self._records[image.inode] = Record(image)
        elif record.lease is None:
            record.image = image
        record.users += 1
        try:
            yield record
        finally:
            record.users -= 1
            self._note(record)
            self.sweep(record)

    def sweep(self, record: Record) -> None:
        """Forget the record if it says nothing any more."""
        if record.idle() and self._records.get(record.image.inode) is record:
            del self._records[record.image.inode]
