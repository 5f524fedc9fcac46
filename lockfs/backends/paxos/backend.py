"""The paxos backend: one lease per image, taken by the engine from wherever the layout has it.

What other hosts are told besides (who holds, who asks) lies in the store's state directory, as with fcntl; it
never decides anything.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from random import Random, SystemRandom
from typing import TypeVar

import trio

from lockfs.backends.base import (
    Backend,
    Evidence,
    Forgetful,
    Holder,
    Image,
    Lease,
    LeaseEvent,
    LeaseState,
    Memory,
    Mode,
    Owner,
    Peer,
)
from lockfs.backends.owners import OwnerRecords
from lockfs.backends.paxos.calls import Calls
from lockfs.backends.paxos.former import FormerLeases, LeaseNotes, is_of
from lockfs.backends.paxos.index import IndexLayout
from lockfs.backends.paxos.membernotes import MemberNotes
from lockfs.backends.paxos.membership import Epoch, Membership
from lockfs.backends.paxos.opening import open_layout
from lockfs.backends.paxos.options import PaxosOptions
from lockfs.backends.paxos.places import Layout, was_removed
from lockfs.backends.paxos.proof import PaxosLease, Proof
from lockfs.backends.paxos.telling import Telling
from lockfs.backends.paxos.unsettled import SETTLE_S, Hand, Unsettled, let_go_of
from lockfs.backends.remembered import Ledger, Stage
from lockfs.backends.requests import Requests
from lockfs.backends.state import StateDirectory
from lockfs.errors import BackendError, SetupError
from lockfs.linux import calls
from lockfs.paxos import breaking
from lockfs.paxos.errors import Refused
from lockfs.paxos.resource import Hold, Resource
from lockfs.paxos.seams import Clock, WallClock
from lockfs.records.results import RecordError
from lockfs.records.sectors import Leader
from lockfs.storage.clock import BootClock, real_time_clocks
from lockfs.storage.rawio import RawIO

STATE_THREADS = 8
CONTEND_S = 2.0
"""How long one attempt goes on against hosts that contend for the lease, seconds; the keeper then tries
anew.
"""
SETTLE_RETRY_S = 1.0
SETTLE_TASKS = 8
"""How many leases of a former worker are given back at once."""
ATTEMPT_S = 5.0
"""How long an attempt may take at least once the lockspace is joined, seconds."""
MOVED_TRIES = 8
"""How often a lease may be removed between being found and being taken."""

_T = TypeVar("_T")
_log = logging.getLogger("lockfs.paxos")


class PaxosBackend(Backend):
    """Leases by Disk Paxos. `run` must be running from `start` to `stop`."""

    name = "paxos"

    def __init__(
        self,
        options: PaxosOptions,
        store_fd: int,
        host: str,
        *,
        store: str = "the store",
        clock: Clock | None = None,
        walls: Sequence[WallClock] = (),
        random: Random | None = None,
        io: RawIO | None = None,
    ) -> None:
        """`store_fd` is the store's root (O_PATH suffices), kept open by the caller until after `stop`.

        `store` is its path: people read it, and host ids are kept by it. `io` reaches the lease area, the
        kernel's by default. `clock` and `walls` are the machine's own by default, together.
        """
        self._io = io
        self._options = options
        self._store_fd = store_fd
        self._store = store
        self._local = calls.in_memory(store_fd)
        self._clock = clock or BootClock()
        self._random = random or SystemRandom()
        instance = re.sub(r"[^A-Za-z0-9-]", "_", host)[:64] + "-" + secrets.token_hex(6)
        self._name_files(instance.encode())
        self._limiter = trio.CapacityLimiter(STATE_THREADS)
        self._membership = Membership(
            options,
            host,
            self._clock,
            self._random,
            self._epoch_changed,
            self._epoch_passed,
            real_time_clocks() if clock is None else walls,
        )
        self._layout: Layout | None = None
        self._leases: dict[int, PaxosLease] = {}
        self._unsettled = Unsettled(lambda place, image: self._opened().still(place, image), self._settled)
        self._notes = LeaseNotes(Ledger(Forgetful()))
        self._former = FormerLeases(self._notes, self._random, {})
        self._succeeds = False
        self._settling = False
        self._links: dict[int, tuple[Leader | None, Leader]] = {}
        self._telling = Telling(
            self._membership,
            self._leases,
            lambda: self._records,
            self._opened,
            self._ready,
            self._in_thread,
            self._clock,
        )
        self._calls = Calls(self._leases, lambda: self._requests, self._in_thread)
        self._proof = Proof(self._leases, self._unsettled.turn, self._note, self._worth)
        self._on_change: LeaseEvent = lambda lease: None

    # From start to stop

    async def start(self, on_change: LeaseEvent, memory: Memory | None = None) -> None:
        """Open the lease area, making it where that is the layout's habit; raises SetupError.

        See Backend.start. A former worker's membership is gone on with, not joined anew.
        """
        self._on_change = on_change
        memory = Forgetful() if memory is None else memory
        ledger = Ledger(memory)
        self._notes = LeaseNotes(ledger)
        instance, self._succeeds = ledger.instance(self._instance)
        self._name_files(instance)
        layout, name = await open_layout(self._options, self._store_fd, self._store, self._random, self._io)
        self._layout = layout
        try:
            area = await layout.start()
            name = layout.name if isinstance(layout, IndexLayout) else name
            self._membership.start(area, name, layout.in_place, MemberNotes(memory))
            if self._succeeds:
                await layout.quiet(None)
            goes_on = await self._membership.go_on()
        except BackendError as error:
            raise SetupError(str(error)) from error
        self._former = FormerLeases(self._notes, self._random, ledger.notes())
        if isinstance(layout, IndexLayout):
            layout.changing = self._notes.changing_index
            layout.left_changing = goes_on and self._notes.index_was_changing
        if not goes_on:
            self._former.void()

    def _name_files(self, instance: bytes) -> None:
        self._instance = instance
        state = StateDirectory(self._store_fd)
        self._records = OwnerRecords(state, instance)
        self._requests = Requests(state, instance)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Join and keep the lockspace, and put in order what failed steps left; see Backend.run."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._membership.run)
            nursery.start_soon(self._settle_late)
            nursery.start_soon(self._calls.run)
            nursery.start_soon(self._proof.run)
            if self._options.join_wait and self._membership.epoch is None:
                try:
                    await self._membership.ready()
                except BackendError as error:
                    raise SetupError(str(error)) from error
            task_status.started()

    async def stop(self) -> None:
        """Settle what can be, leave the lockspace, close everything."""
        with trio.move_on_after(SETTLE_S):  # leaving the lockspace frees what remains
            await self._unsettled.retry()
        for lease in list(self._leases.values()):  # the keeper could not give them back
            await lease.place.close()
        self._leases.clear()
        await self._unsettled.close()
        await self._membership.stop()
        if self._succeeds:
            await self._in_thread(self._records.adopt)
        await self._in_thread(self._records.clear)
        if self._layout is not None:
            await self._layout.stop()
            self._layout = None

    def _epoch_changed(self, epoch: Epoch) -> None:
        """Tell the keeper of every lease of the epoch what it is worth now.

        A shared lease in doubt is as good as lost where hosts with the sanlock daemon are: one that wants the
        image exclusively goes by its last pass, and may not see a renewal that comes late.
        """
        final = epoch.state is LeaseState.DOUBT and bool(epoch.lockspace.strangers)
        for lease in list(self._leases.values()):
            state = LeaseState.LOST if final and lease.mode is Mode.SHARED else epoch.state
            if lease.epoch is epoch and lease.state is not state:
                self._worth(lease, state)

    def _worth(self, lease: PaxosLease, state: LeaseState) -> None:
        """Tell the keeper what a lease is worth now. What is lost, or given back, stays so."""
        if lease.state in (LeaseState.RELEASED, LeaseState.LOST):
            return
        lease.state = state
        if state is LeaseState.LOST:
            lease.last = lease.resource.leader
            self._note(lease, Stage.ENDING)
        self._on_change(lease)

    # Taking

    async def acquire(self, image: Image, mode: Mode, owner: Owner, deadline: float) -> PaxosLease:
        """Take the lease in one attempt; see Backend.acquire. Waits for a join that is under way."""
        epoch = await self._ready()
        # Whoever waited for the join still has an attempt.
        deadline = max(deadline, trio.current_time() + ATTEMPT_S)
        async with self._unsettled.turn(image.inode):
            if image.inode in self._leases:
                raise BackendError(f"{image.name} is already leased by this mount.")
            await self._go_on(image.inode, epoch)
            hand = await self._taken_hand(image, mode, epoch, deadline)
            place, resource = hand.place, hand.resource
            lease = PaxosLease(image, mode, owner, epoch.state, place=place, resource=resource, epoch=epoch)
            lease.followed = self._origin(image.inode, resource)
            self._links.pop(image.inode, None)
            self._leases[image.inode] = lease
            self._note(lease, Stage.HELD)
            await self._record(lease)
            return lease

    async def _record(self, lease: PaxosLease) -> None:
        """Tell who has the lease."""
        image, owner = lease.image, lease.owner
        exclusive = lease.mode is Mode.EXCLUSIVE
        if exclusive and self._local and self._records.write_at_once(image.inode, owner, image.path):
            return
        with trio.CancelScope(shield=True):  # whoever reads it is told no wrong name
            await self._in_thread(self._records.write, image.inode, lease.mode, owner, image.path)

    async def _taken_hand(self, image: Image, mode: Mode, epoch: Epoch, deadline: float) -> Hand:
        """A hand that holds the lease. Whatever it had begun to take when it fails is noted, and settled."""
        inode = image.inode
        try:
            for _ in range(MOVED_TRIES):
                self._notes.taking(inode, mode, self._opened().name_of(image), epoch)
                hand = await self._hand(image, epoch, deadline)
                if await self._take(hand, image, mode):
                    return hand
        except BaseException:
            if inode not in self._unsettled:
                self._notes.forget(inode)
            raise
        raise BackendError(f"The lease of {image.name} is being removed again and again.")

    def _note(self, lease: PaxosLease, stage: Stage) -> None:
        """Note how far a lease has come; one that is lost is not the next worker's to have."""
        lost = lease.state is LeaseState.LOST
        self._notes.held(
            lease.image.inode,
            Stage.ENDING if lost else stage,
            lease.mode,
            name=lease.place.name,
            leader=lease.resource.leader,
            epoch=lease.epoch,
        )

    async def _ready(self) -> Epoch:
        epoch = await self._membership.ready()
        if isinstance(self._layout, IndexLayout):
            self._layout.lockspace = epoch.lockspace
        return epoch

    async def _hand(self, image: Image, epoch: Epoch, deadline: float) -> Hand:
        """A hand on the image's lease: the one that a failed step left, or as the layout finds or makes
        the lease.
        """
        hand = await self._unsettled.take_up(image.inode, epoch)
        if hand is None:
            place = await self._opened().make(image, deadline)
            resource = Resource(place.area, epoch.lockspace, place.name, self._random, place.hosts)
            hand = Hand(image, place, resource, epoch)
        return hand

    async def _take(self, hand: Hand, image: Image, mode: Mode) -> bool:
        """Acquire; False if the lease was removed in between. On failure nothing stays open or taken."""
        kept = False
        try:
            patience = self._clock.now() + CONTEND_S
            await hand.resource.acquire(shared=mode is Mode.SHARED, give_up_at=patience)
            kept = await self._opened().still(hand.place, image)
            return kept
        except Refused as refusal:
            raise await self._telling.busy(image, hand.place, refusal) from refusal
        except RecordError as error:
            if not was_removed(error) or await self._opened().still(hand.place, image):
                raise
            return False
        finally:
            if not kept:
                await self._unsettled.put_back(image.inode, hand)

    def _settled(self, inode: int, resource: Resource) -> None:
        """A hand was taken off its lease: the next worker need not know of it. If it had won a version, that
        was given back without being used: nobody had the image in between.
        """
        self._notes.forget(inode)
        if resource.last is not None and not resource.unsettled:
            self._links[inode] = (self._origin(inode, resource), resource.last)

    def _origin(self, inode: int, resource: Resource) -> Leader | None:
        """The leader record in place of which a version came, own ones that were not used passed over.

        None where versions lie between: a record can be there again that a late write has put back.
        """
        followed, last = resource.followed, resource.last
        if followed is None or last is None or last.lver != followed.lver + 1:
            return None
        link = self._links.get(inode)
        return link[0] if link is not None and link[1] == followed else followed

    async def _settle_late(self) -> None:
        """Try again, for as long as it takes, what failed steps could not put in order."""
        while True:
            await trio.sleep(SETTLE_RETRY_S)
            await self._unsettled.retry()
            await self._settle_conversions()
            epoch = self._membership.epoch
            if self._settling and epoch is not None and epoch.state is LeaseState.HELD:
                await self._settle_all(epoch)
            await self._opened().settle()

    async def _settle_conversions(self) -> None:
        for inode, lease in list(self._leases.items()):
            if lease.resource.unsettled:
                async with self._unsettled.turn(inode):
                    await self._settle_shared(lease.resource)

    async def convert(self, lease: Lease, mode: Mode, deadline: float) -> None:
        """Change the mode; see Backend.convert. A lease that could not wholly be weakened is SHARED."""
        held = _ours(lease)
        async with self._unsettled.turn(held.image.inode):
            if held.mode is not mode:
                await self._convert(held, mode)

    async def _convert(self, held: PaxosLease, mode: Mode) -> None:
        old, resource = held.mode, held.resource
        self._note(held, Stage.CONVERTING)
        try:
            patience = self._clock.now() + CONTEND_S
            await resource.convert(shared=mode is Mode.SHARED, give_up_at=patience)
        except Refused as refusal:
            raise await self._telling.busy(held.image, held.place, refusal) from refusal
        finally:
            if resource.hold is Hold.SHARED:
                held.mode = Mode.SHARED
                await self._settle_shared(resource)
            elif resource.hold is Hold.EXCLUSIVE:
                held.mode = Mode.EXCLUSIVE
            self._note(held, Stage.CONVERTING if resource.unsettled else Stage.HELD)
        held.mode = mode
        await self._record(held)
        with trio.CancelScope(shield=True):
            await self._in_thread(self._records.remove, held.image.inode, old)

    async def _settle_shared(self, resource: Resource) -> None:
        """Put in order what a conversion left; a lease whose release failed is its releaser's business."""
        if not resource.unsettled or resource.hold is not Hold.SHARED:
            return
        with trio.CancelScope(shield=True, deadline=trio.current_time() + SETTLE_S):
            try:
                await resource.settle()
            except BackendError as error:
                _log.debug("a conversion is not settled yet: %s", error)

    # Giving back

    async def release(self, lease: Lease) -> None:
        """Give the lease back; see Backend.release. Repeated after a failure, it goes on.

        In doubt it fails: whether the lease is void, or must be given back, is not known before the doubt
        ends.
        """
        held = _ours(lease)
        inode = held.image.inode
        async with self._unsettled.turn(inode):
            if held.state is not LeaseState.RELEASED:
                self._note(held, Stage.ENDING)
                await self._tell_no_more(inode, held.mode)
                await self._release(held, inode)

    async def _tell_no_more(self, inode: int, mode: Mode) -> None:
        """Take back what was told of who has a lease."""
        exclusive = mode is Mode.EXCLUSIVE
        if not (exclusive and self._local and self._records.remove_at_once(inode)):
            await self._in_thread(self._records.remove, inode, mode)

    async def _release(self, held: PaxosLease, inode: int) -> None:
        try:
            await held.resource.release()
            await held.resource.settle()  # also where a former release, or this one in doubt, has not ended
        except BackendError as error:
            if not let_go_of(error):
                raise
            _log.error("%s: its lease was not as this host had left it: %s", held.image.name, error)
        held.state = LeaseState.RELEASED
        self._calls.given_back(inode)
        self._leases.pop(inode, None)
        self._notes.forget(inode)
        await held.place.close()

    # What a former worker left

    async def recall(self, image: Image, mode: Mode, owner: Owner) -> PaxosLease | None:
        """The lease as the storage has it, in the membership that goes on; see Backend.recall.

        What is not recalled after a loss cannot be resumed (Lease.resumable): its former record is not kept.
        """
        epoch = self._membership.epoch
        if epoch is None or epoch.state is LeaseState.LOST:
            return None
        found = await self._former.find_again(image.inode, epoch, self._opened())
        if found is None:
            return None
        place, resource = found
        now = Mode.SHARED if resource.hold is Hold.SHARED else Mode.EXCLUSIVE
        lease = PaxosLease(image, now, owner, epoch.state, place=place, resource=resource, epoch=epoch)
        self._leases[image.inode] = lease
        self._note(lease, Stage.CONVERTING if resource.unsettled else Stage.HELD)
        return lease

    async def settle(self) -> None:
        """Give back what nobody recalled; see Backend.settle. What fails is tried again for as long as it
        takes.
        """
        self._settling = True
        await self._settle_conversions()
        if not self._former.inodes():
            return
        try:
            epoch = await self._ready()
        except BackendError as error:
            _log.warning("what a former worker had leased is given back later: %s", error)
            return
        await self._settle_all(epoch)

    async def _settle_all(self, epoch: Epoch) -> None:
        limiter = trio.CapacityLimiter(SETTLE_TASKS)
        async with trio.open_nursery() as nursery:
            for inode in self._former.inodes():
                nursery.start_soon(self._settle_one, inode, epoch, limiter)

    async def _settle_one(self, inode: int, epoch: Epoch, limiter: trio.CapacityLimiter) -> None:
        async with limiter, self._unsettled.turn(inode):
            try:
                await self._settle_former(inode, epoch)
            except BackendError as error:
                _log.debug("lease of inode %d: not settled yet: %s", inode, error)

    async def _settle_former(self, inode: int, epoch: Epoch) -> None:
        """For who has the turn: put in order what a former worker left of the lease of the inode."""
        await self._go_on(inode, epoch)
        hand = await self._unsettled.take_up(inode, epoch)
        if hand is not None:
            await self._unsettled.put_back(inode, hand)

    async def _go_on(self, inode: int, epoch: Epoch) -> None:
        """For who has the turn: take up what a former worker left of the lease of the inode."""
        note = self._former.note(inode)
        if note is None:
            return
        if note.in_hand and is_of(note, epoch):  # only then is the record there, and ours for certain
            for mode in Mode if note.stage is Stage.CONVERTING else (note.mode,):
                await self._tell_no_more(inode, mode)
        hand = await self._former.take_over(inode, epoch, self._opened())
        if hand is not None:
            self._unsettled.leave(inode, hand)

    # Telling, asking

    async def holders(self, image: Image) -> list[Holder]:
        """Everybody else who holds the image; see Backend.holders."""
        return await self._telling.holders(image)

    async def evidence(self, image: Image) -> Evidence:
        """What lies on the storage of the image's holder, and what watching it has shown; see Backend."""
        return await self._telling.evidence(image)

    async def known_paths(self) -> list[bytes]:
        """Paths from the owner records of all hosts."""
        return await self._telling.known_paths()

    async def peers(self) -> list[Peer]:
        """The hosts of the lockspace; see Backend.peers."""
        return await self._telling.peers()

    async def request(self, image: Image, owner: Owner) -> None:
        """Ask other hosts for the image; see Calls.request."""
        await self._calls.request(image, owner)

    async def withdraw(self, image: Image, owner: Owner) -> None:
        """Take the request back."""
        await self._calls.withdraw(image)

    async def requested(self, held: Iterable[int]) -> set[int]:
        """Those of the inodes `held` that another host asks for."""
        return await self._calls.requested(held)

    def _epoch_passed(self, epoch: Epoch) -> None:
        """After a pass over the lockspace: must leases be confirmed? Has anybody called us?"""
        self._proof.passed(epoch)
        self._calls.passed(epoch)

    # Removing leases of images that are gone

    async def force(self, image: Image) -> None:
        """Mark the lease free, whoever has it; see Backend.force."""
        if self._at_work_on(image.inode):
            raise BackendError(f"{image.name} is held by this mount: lockfsctl fence frees it.")
        epoch = await self._ready()
        place = await self._opened().find(image)
        if place is None:
            return
        try:
            await breaking.free_by_force(place.area, epoch.lockspace, place.name)
        finally:
            with trio.CancelScope(shield=True):
                await place.close()

    async def collect(self, gone: Callable[[int], bool], deadline: float) -> tuple[list[int], bool]:
        """Remove leases of images that are gone; see Backend.collect.

        Whoever opens an image just then, also a new one with the same number, finds the lease held, or finds
        it gone and makes another: so it does not matter how old the answer of `gone` is.
        """
        epoch = await self._ready()
        removed: list[int] = []
        for inode in await self._opened().listing():
            if not gone(inode):
                continue
            if trio.current_time() >= deadline:
                return removed, False
            async with self._unsettled.turn(inode):
                if await self._collect(Image(inode, b"inode %d" % inode, -1), epoch):
                    removed.append(inode)
        return removed, True

    def _at_work_on(self, inode: int) -> bool:
        return inode in self._leases or inode in self._unsettled or self._former.note(inode) is not None

    async def _collect(self, image: Image, epoch: Epoch) -> bool:
        """Remove one lease while holding it; False if it is held, damaged, or was removed by another."""
        if self._at_work_on(image.inode):
            return False
        place = await self._opened().find(image)
        if place is None:
            return False
        resource = Resource(place.area, epoch.lockspace, place.name, self._random, place.hosts)
        hand = Hand(image, place, resource, epoch)
        self._notes.taking(image.inode, Mode.EXCLUSIVE, place.name, epoch)
        try:
            await resource.acquire()
            if not await self._opened().still(place, image) or not resource.proven:
                return False
            epoch.lockspace.require()  # a name that we no longer hold may be another's by now
            hand.removing = True
            with trio.CancelScope(shield=True):
                await self._opened().remove(place, image)
                hand.removing = False
                resource.forget()
            return True
        except Refused:
            return False
        except RecordError as error:
            if not was_removed(error) or await self._opened().still(place, image):
                _log.warning("the lease of %s is left alone: %s", image.name, error)
            return False
        finally:
            await self._unsettled.put_back(image.inode, hand)

    def _opened(self) -> Layout:
        if self._layout is None:
            raise BackendError("The lease area is not open.")
        return self._layout

    async def _in_thread(self, work: Callable[..., _T], *arguments: object) -> _T:
        return await trio.to_thread.run_sync(work, *arguments, limiter=self._limiter)


def _ours(lease: Lease) -> PaxosLease:
    if not isinstance(lease, PaxosLease):
        raise TypeError("the lease was granted by another backend")
    return lease
