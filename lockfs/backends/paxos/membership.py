"""This mount's membership of the lockspace: joined in the background, renewed, watched, joined anew when
lost.

Renewals have a disk, and so threads, of their own. An `Epoch` is one membership from join to loss; leases
know theirs, and what one epoch lost no later one brings back.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from random import Random

import trio

from lockfs.backends.base import Forgetful, LeaseState
from lockfs.backends.paxos.hostids import HostIds
from lockfs.backends.paxos.membernotes import Joining, MemberNotes
from lockfs.backends.paxos.options import PaxosOptions
from lockfs.backends.paxos.places import HOSTS_DEFAULT
from lockfs.errors import BackendError, LockfsError
from lockfs.paxos.area import Area
from lockfs.paxos.errors import IdInUse, LockspaceFailed
from lockfs.paxos.lockspace import Lockspace, Standing, find_lockspace, free_ids, survey
from lockfs.paxos.seams import Clock, WallClock
from lockfs.records import sectors
from lockfs.records.results import RecordError
from lockfs.records.sectors import NAME_BYTES

_log = logging.getLogger("lockfs.paxos")

RETRY_S = 0.5
"""Between two tries to renew, and to join, after a failure."""
REJOIN_S = 5.0
LOOK_S = 1.0
"""The longest time, as trio's clock has it, between two looks at the standing: a suspended machine does not
count it, so the boot clock may have run on."""
JOIN_SLACK = 5
"""Of what a join may take beyond its delays, in io_timeouts: its reads and writes."""
_TOKEN_CHARS = 16
_REPLACED = "its file was removed or replaced; end every mount of the store, and mount anew"

_STATES = {
    Standing.GOOD: LeaseState.HELD,
    Standing.LATE: LeaseState.HELD,
    Standing.DOUBT: LeaseState.DOUBT,
    Standing.LOST: LeaseState.LOST,
}


class _NotInPlace(BackendError):
    """Hosts that mount now would not find the lockspace that this one has open."""


class Epoch:
    """One membership. `state` is what leases taken in it are worth at the moment."""

    def __init__(self, lockspace: Lockspace) -> None:
        self.lockspace = lockspace
        self.state = LeaseState.HELD

    def in_time(self) -> bool:
        """Whether a write may be started now; asked from any thread, for every write."""
        return self.lockspace.in_time()


def unique_name(host: str) -> bytes:
    """A name for the lockspace that no other start of any lockfs has: a random token, a dot, the host."""
    return f"{secrets.token_hex(_TOKEN_CHARS // 2)}.{shortened(host)}".encode()


def shortened(host: str) -> str:
    """As much of a host's name as a lockspace name has room for."""
    return host.encode()[: NAME_BYTES - _TOKEN_CHARS - 1].decode("utf-8", "ignore")


def host_of(name: str) -> str:
    """The host's own name in a lockspace name of `unique_name`; others come back as they are."""
    token, dot, host = name.partition(".")
    made_here = dot and len(token) == _TOKEN_CHARS and set(token) <= set("0123456789abcdef")
    return host if made_here and host else name


def made_by_lockfs(name: str) -> bool:
    """Whether a lockspace name was made by `unique_name`."""
    return host_of(name) != name


class Membership:
    """Keeps one host in the lockspace. `changed` is called when the epoch's state changed, `passed` after
    each pass over the lockspace.
    """

    def __init__(  # noqa: PLR0917  (the parts of a membership)
        self,
        options: PaxosOptions,
        host: str,
        clock: Clock,
        random: Random,
        changed: Callable[[Epoch], None],
        passed: Callable[[Epoch], None],
        walls: Sequence[WallClock] = (),
    ) -> None:
        self._options = options
        self._host = host
        self._clock = clock
        self._walls = walls
        self._random = random
        self._changed = changed
        self._passed = passed
        self._area: Area | None = None
        self._name = b""
        self._ids: HostIds | None = None
        self._in_place: Callable[[], Awaitable[bool]] | None = None
        self._ready = trio.Event()
        self._trouble: LockfsError | None = None
        self._joined = False
        self._notes = MemberNotes(Forgetful())
        self._former_join: Joining | None = None
        self.epoch: Epoch | None = None

    def start(
        self,
        area: Area,
        name: bytes,
        in_place: Callable[[], Awaitable[bool]] | None = None,
        notes: MemberNotes | None = None,
    ) -> None:
        """Say where the lockspace is; `in_place` tells whether other hosts would still find it there. The
        next worker goes on from the `notes`.
        """
        self._area, self._name, self._in_place = area, name, in_place
        self._notes = notes or self._notes
        self._ids = HostIds(self._options.state_dir, area.name, name)

    # Going on for a former worker

    async def go_on(self) -> bool:
        """After `start`: be the member that a former worker of this mount was, if it was one; whether there
        is an epoch then. `run` looks at the other hosts first of all; until then nothing can be taken in it.

        Raises:
            BackendError: the storage does not say whether the membership lasts.
        """
        area, ids = self._area, self._ids
        former, descriptor = self._notes.former()
        if area is None or ids is None or former is None:
            return False
        if isinstance(former, Joining):
            self._former_join = former
            return False
        if descriptor is not None:
            ids.adopt(former.host_id, descriptor)
        lockspace = self._lockspace(area, former.host_id, former.host_name)
        try:
            await self._check_in_place()
            await lockspace.go_on(former)
        except (LockspaceFailed, RecordError, _NotInPlace) as error:
            _log.error("lockspace %s and all its leases are lost: %s", sectors.shown(self._name), error)
            self._notes.forget()
            ids.let_go(former.host_id, keep=True)
            return False
        self.epoch = Epoch(lockspace)
        self.epoch.state = _STATES[lockspace.standing()]
        return True

    async def _check_in_place(self) -> None:
        if self._in_place is not None and not await self._in_place():
            raise _NotInPlace(_REPLACED)

    # Joining

    async def ready(self) -> Epoch:
        """The present epoch; waits for a join that is under way, within what a join may take.

        Raises:
            BackendError: not joined, with the reason as far as known.
        """
        limit = self._options.timing.dead + self._options.timing.renewal
        limit += JOIN_SLACK * self._options.io_timeout
        with trio.move_on_after(limit):
            await self._ready.wait()
        if self.epoch is None or self.epoch.state is LeaseState.LOST:
            raise self._not_joined()
        return self.epoch

    def _not_joined(self) -> BackendError:
        reason = f": {str(self._trouble).rstrip('.')}" if self._trouble is not None else ""
        return BackendError(f"Lockspace {sectors.shown(self._name)} is not joined{reason}.")

    @property
    def trouble(self) -> str:
        """Why the lockspace is not joined at the moment, as far as known; empty if it is."""
        return "" if self.epoch is not None or self._trouble is None else str(self._trouble)

    async def run(self) -> None:
        """Join, renew, and join anew after a loss, until cancelled."""
        while True:
            epoch = self.epoch
            goes_on = epoch is not None
            if epoch is None:
                epoch = await self._join()
            # Who goes on for a former worker has many waiting for it, and need not write to know the others.
            passed = await self._begin(epoch, epoch.lockspace.look if goes_on else epoch.lockspace.renew)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(self._keep_renewing, epoch, looked=goes_on and passed))
                nursery.start_soon(self._keep_in_place, epoch)
                await self._observe(epoch)
                nursery.cancel_scope.cancel()  # a renewal that hangs would hang for as long as its write may
            self.epoch = None
            self._let_go(epoch)
            await trio.sleep(RETRY_S)

    def _let_go(self, epoch: Epoch) -> None:
        """End the holding of the id. The note goes first: it names the descriptor that is closed then."""
        self._notes.forget()
        if self._ids is not None:
            self._ids.let_go(epoch.lockspace.host_id, keep=True)

    async def _join(self) -> Epoch:
        while True:
            try:
                lockspace = await self._attempt()
            except (BackendError, LockfsError) as error:
                if str(error) != str(self._trouble):
                    # Where the mount command waits, it is the one to tell.
                    level = logging.INFO if self._options.join_wait and not self._joined else logging.ERROR
                    _log.log(level, "lockspace %s cannot be joined: %s", sectors.shown(self._name), error)
                self._trouble = error
                self._wake()
                await trio.sleep(REJOIN_S)
                continue
            epoch = Epoch(lockspace)
            self._keep(epoch)
            self.epoch = epoch
            return epoch

    async def _begin(self, epoch: Epoch, first_pass: Callable[[], Awaitable[object]]) -> bool:
        """Take up an epoch, joined or a former worker's: from here on leases can be taken. Whether the pass
        succeeded.
        """
        self._trouble = None
        self._joined = True
        until = epoch.lockspace.write_until
        passed = False
        try:
            await first_pass()
            passed = True
        except BackendError as error:
            _log.warning("the first pass over lockspace %s failed: %s", sectors.shown(self._name), error)
        if self._clock.now() >= until:
            self._tell(epoch, LeaseState.DOUBT)
        self._keep(epoch)
        _log.info(
            "lockspace %s is joined with host id %d, generation %d",
            sectors.shown(self._name),
            epoch.lockspace.host_id,
            epoch.lockspace.generation,
        )
        self._wake()
        return passed

    def _keep(self, epoch: Epoch) -> None:
        """Note for the next worker what it must know of the epoch, as long as it may be gone on with."""
        lockspace = epoch.lockspace
        if self._ids is None or epoch.state is LeaseState.LOST or lockspace.why_lost:
            return
        self._notes.keep(lockspace.kept(), self._ids.descriptor(lockspace.host_id))

    def _wake(self) -> None:
        """Let those who wait look; who comes later waits for the next outcome, unless there is an epoch."""
        self._ready.set()
        if self.epoch is None:
            self._ready = trio.Event()

    async def _attempt(self) -> Lockspace:
        """Join once, with the host id given or with one of the free ones."""
        area, ids = self._area, self._ids
        if area is None or ids is None:
            raise BackendError("the lease area is not open")
        await self._check_in_place()
        lockspace = await self._where_former_joined(area, ids)
        if lockspace is not None:
            return lockspace
        if self._options.host_id is not None:
            lockspace = self._lockspace(area, self._options.host_id)
            try:
                await self._enter(lockspace)
            except IdInUse as error:
                name = error.host_name.decode("utf-8", "backslashreplace")
                raise BackendError(
                    f"host id {lockspace.host_id} is in use by host {host_of(name)}; "
                    "give another with host_id=, or leave it out"
                ) from error
            return lockspace
        for host_id in await self._candidates(area, ids):
            if not await trio.to_thread.run_sync(ids.hold, host_id):
                continue
            lockspace = self._lockspace(area, host_id)
            try:
                await self._enter(lockspace)
            except IdInUse as error:
                ids.let_go(host_id, keep=False)
                _log.info("another host was quicker: %s", error)
            except BaseException:
                ids.let_go(host_id, keep=False)
                raise
            else:
                return lockspace
        raise BackendError("no host id is free; give one with host_id=, that of a host that is gone")

    async def _where_former_joined(self, area: Area, ids: HostIds) -> Lockspace | None:
        """Go on with a join during which a former worker was killed: by its name the id is this mount's.

        With the name of another start the id would have to be waited for, as for a dead host's.
        """
        former, self._former_join = self._former_join, None
        if former is None or not await trio.to_thread.run_sync(ids.hold, former.host_id):
            return None
        lockspace = self._lockspace(area, former.host_id, former.host_name)
        try:
            await self._enter(lockspace)
        except BaseException as error:
            ids.let_go(former.host_id, keep=False)
            if isinstance(error, IdInUse):
                return None
            raise
        return lockspace

    async def _candidates(self, area: Area, ids: HostIds) -> list[int]:
        most = min(HOSTS_DEFAULT, area.shape.hosts_max)
        free = free_ids(await survey(area), self._name, most)
        if not free:
            await find_lockspace(area, self._name)  # if it is none any more, that is what to tell
        wanted = await trio.to_thread.run_sync(ids.candidates, free, self._random)
        return [host_id for host_id in wanted if 0 < host_id <= most]

    def _lockspace(self, area: Area, host_id: int, name: bytes | None = None) -> Lockspace:
        return Lockspace(
            area,
            self._name,
            host_id,
            name or unique_name(self._host),
            clock=self._clock,
            timing=self._options.timing,
            looks_first=lambda name: made_by_lockfs(name.decode("utf-8", "backslashreplace")),
            walls=self._walls,
        )

    async def _enter(self, lockspace: Lockspace) -> None:
        """Join, and give the id back if that is cut short."""
        self._notes.joining(lockspace.host_id, lockspace.host_name)
        try:
            await lockspace.join()
        except IdInUse:
            self._notes.forget()
            raise
        except BaseException:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + self._options.io_timeout):
                try:
                    await lockspace.leave()
                except BackendError as error:
                    _log.warning("host id %d could not be given back: %s", lockspace.host_id, error)
            self._notes.forget()
            raise

    # Renewing

    async def _keep_renewing(self, epoch: Epoch, *, looked: bool) -> None:
        """Renew when it is due, until the membership is lost; at once where somebody has just `looked`."""
        lockspace = epoch.lockspace
        failing, suspicions = False, lockspace.pace.suspicions
        while lockspace.standing() is not Standing.LOST:
            if not looked:
                await self._until_due(lockspace)
            has_looked, looked = looked, False
            until = lockspace.write_until
            try:
                await lockspace.renew(looked=has_looked)
            except BackendError as error:
                if lockspace.why_lost:
                    break
                if not failing:
                    _log.warning("lockspace %s could not be renewed: %s", sectors.shown(self._name), error)
                failing = True
                await trio.sleep(RETRY_S)
                continue
            if failing and lockspace.standing() is Standing.GOOD:
                _log.info("lockspace %s is renewed again", sectors.shown(self._name))
            failing = False
            if lockspace.pace.suspicions != suspicions:
                suspicions, why = lockspace.pace.suspicions, lockspace.pace.why
                _log.warning("this host may have stood still, its leases are confirmed: %s", why)
            if self._clock.now() >= until:
                # Gates have said no meanwhile, whether or not anybody had looked at the standing.
                self._tell(epoch, LeaseState.DOUBT)
            self._look(epoch)
            self._keep(epoch)
            self._passed(epoch)
        self._look(epoch)

    async def _until_due(self, lockspace: Lockspace) -> None:
        """Sleep until the next renewal; in short sleeps, so that a machine that was suspended renews soon."""
        left = lockspace.renewal_due - self._clock.now()
        while left > 0:
            await trio.sleep(min(left, LOOK_S))
            left = lockspace.renewal_due - self._clock.now()

    async def _keep_in_place(self, epoch: Epoch) -> None:
        """Give up a membership that hosts that mount now would not see: they would take what this one holds.

        Looked at every io_timeout, while a join takes two: where all hosts have the same io_timeout, this one
        has stopped before a newcomer can hold anything.
        """
        while self._in_place is not None:
            if not await self._in_place():
                epoch.lockspace.abandon(_REPLACED)
                self._look(epoch)
                return
            await trio.sleep(self._options.io_timeout)

    async def _observe(self, epoch: Epoch) -> None:
        """Tell of each change of the standing when it happens, whatever a renewal hangs on."""
        lockspace = epoch.lockspace
        while epoch.state is not LeaseState.LOST:
            lockspace.pace.look_at_walls()
            self._look(epoch)
            now = self._clock.now()
            limits = (lockspace.write_until, lockspace.renewed_at + lockspace.comeback)
            next_change = min((limit - now for limit in limits if limit > now), default=LOOK_S)
            await trio.sleep(min(LOOK_S, next_change))

    def _look(self, epoch: Epoch) -> None:
        self._tell(epoch, _STATES[epoch.lockspace.standing()])

    def _tell(self, epoch: Epoch, state: LeaseState) -> None:
        if epoch.state is state or epoch.state is LeaseState.LOST:
            return
        epoch.state = state
        if state is LeaseState.LOST:
            _log.error("lockspace %s is lost: %s", sectors.shown(self._name), epoch.lockspace.why_lost)
            self._notes.forget()
            self._ready = trio.Event()  # who comes now waits for what the next join says
        self._changed(epoch)

    # Leaving

    async def stop(self) -> None:
        """Leave the lockspace; every lease was given back before."""
        epoch, self.epoch = self.epoch, None
        if epoch is None:
            return
        try:
            await epoch.lockspace.leave()
        except BackendError as error:
            _log.warning("the lockspace could not be left, other hosts will wait for this one: %s", error)
        self._let_go(epoch)
