"""Fencing: what is open of an image whose lease is lost stops working, before another host may take the
image.

Order for each image: its gates are shut already; revoke every handle that is open (also those whose data
never passes lockfs); kill whoever maps the image into memory that can be written, and, where revoking failed
or the policy says so, whoever has it open for writing; wait for changes under way, and for what lies in
caches (landings.py); strike the dead opens out of the books; only then give the lease back, if there is
anything to give. As long as one of these is not done the lease is not given back.

Where every change passes a gate nothing need be revoked: the opens are suspended. Their next change asks for
the lease anew, and gets it only if nobody else has had it in between (Lease.follows).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import trio

from lockfs.backends.base import Mode
from lockfs.keeper.grants import Grant, Kind
from lockfs.keeper.images import Ledger, Record
from lockfs.keeper.landings import Landing, Landings, drained, returnable
from lockfs.keeper.leases import Leases
from lockfs.keeper.policy import OnLost, Policy
from lockfs.keeper.surroundings import Surroundings, Workers
from lockfs.linux.proc import Process

log = logging.getLogger("lockfs.keeper")

REVOKE_S = 2.5
"""How long revoking may take, seconds; after that those who can still write are killed for it."""
SCAN_S = 2.5
"""How long it may take to find out who maps images, seconds; after that all who opened them count."""
KILL_S = 2.5
"""How long killed processes may take to end, seconds, before that is reported. With the two above it leaves
of the shortest watchdog time, 10 s, what makes the whole fit."""
AGAIN_S = 1.0
"""Between two tries at an image that is not fenced yet, and between two looks at who maps a dead one."""
GIVE_BACK_MAX = 32
"""How many leases are given back at a time."""
FENCE_THREADS = 4

Identity = tuple[int, int]
Processes = dict[Identity, Process]
"""Processes by id and start time: what is known of their programs may differ from look to look."""


class Fencing:
    """Fences images, many at a time. `run` must be running.

    `workers` are for nothing else: others may all be waiting for a storage that does not answer. `unfenced`
    are images that something here may still change although their lease is lost or in doubt.
    """

    def __init__(
        self,
        ledger: Ledger,
        leases: Leases,
        surroundings: Surroundings,
        workers: Workers,
        policy: Policy,
        *,
        landings: Landings,
    ) -> None:
        self._ledger = ledger
        self._landings = landings
        self._leases = leases
        self._surroundings = surroundings
        self._workers = workers
        self._policy = policy
        self._condemned: dict[Record, trio.Event] = {}
        self._suspended: list[Record] = []
        self._doubted: list[Record] = []
        self._something = trio.Event()
        self._any_dead = trio.Event()
        self._giving_back = trio.CapacityLimiter(GIVE_BACK_MAX)
        self.unfenced: set[Record] = set()

    def lost(self, record: Record) -> None:
        """The lease is lost: shut the gates now; suspend the opens if each change passes a gate, or fence.

        Who was promised that nobody writes (a shared lease) cannot be suspended: nothing holds reads back.
        """
        bypassed = self._surroundings.bypassed(record.image.inode)
        lease = record.lease
        resumable = lease is not None and lease.resumable and lease.mode is Mode.EXCLUSIVE
        if bypassed or not resumable or self._policy.on_lost is OnLost.KILL:
            self.condemn(record)
            return
        record.lost = record.suspending = True
        record.refresh_gates()
        self.unfenced.add(record)
        self._suspended.append(record)
        self._something.set()

    def condemn(self, record: Record) -> trio.Event:
        """Shut the gates for good, and fence as soon as possible. The event comes when that is done."""
        record.lost, record.suspending = True, False
        record.refresh_gates()
        self.unfenced.add(record)
        self._something.set()
        return self._condemned.setdefault(record, trio.Event())

    def doubt(self, record: Record) -> None:
        """The lease is in doubt: gates hold writes back. What passes none is fenced, as if it were lost; and
        stores into memory cannot be held back either.
        """
        if self._surroundings.bypassed(record.image.inode):
            log.error("image '%s': not all of its writes can be held back: it is fenced", record.image.name)
            self.condemn(record)
            return
        self.unfenced.add(record)
        self._doubted.append(record)
        self._something.set()

    async def run(self) -> None:
        """Fence what is condemned until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_the_dead)
            while True:
                await self._something.wait()
                self._something = trio.Event()
                condemned, self._condemned = self._condemned, {}
                suspended, self._suspended = self._suspended, []
                doubted, self._doubted = self._doubted, []
                if condemned:
                    nursery.start_soon(self._fence_all, condemned)
                if suspended:
                    nursery.start_soon(self._suspend_all, suspended)
                if doubted:
                    nursery.start_soon(self._hold_back, doubted)

    # Images that were lost together: processes are looked through once for all

    async def _fence_all(self, condemned: dict[Record, trio.Event]) -> None:
        """Make what is open of the images dead, and then give their leases back."""
        opens = {record: list(record.grants) for record in condemned}
        live, left = set(condemned), set(condemned)
        async with trio.open_nursery() as nursery:
            while left:
                live -= await self._revoke(live)
                harmless = await self._end_writers(left, live)
                for record in harmless:
                    landing, done = self._landings.expect(record, revoked=True), condemned[record]
                    nursery.start_soon(self._end_opens, record, opens[record], landing, done)
                left -= harmless
                self.unfenced -= harmless
                if left:
                    await trio.sleep(AGAIN_S)

    async def _hold_back(self, records: list[Record]) -> None:
        """Flush the images whose lease is in doubt, and end those who map them, for as long as it is no more
        than that.
        """
        left = set(records)
        async with trio.open_nursery() as nursery:
            for record in records:
                nursery.start_soon(self._bring_in, record, self._landings.expect(record, revoked=False))
            while left:
                left -= (harmless := await self._end_mappers(left))
                self.unfenced -= {record for record in harmless if not record.lost}
                self.unfenced -= (certain := {record for record in left if record.sure})
                left -= certain | {record for record in left if record.lost}
                if left:
                    await trio.sleep(AGAIN_S)

    async def _bring_in(self, record: Record, landing: Landing) -> None:
        """Get what was begun onto the storage before the lease may be another host's."""
        await drained(record, list(record.grants), while_unsure=True)
        await self._landings.flush(landing)

    async def _suspend_all(self, records: list[Record]) -> None:
        """Take the lost leases out of the books; the opens stay."""
        opens = {record: list(record.grants) for record in records}
        left = set(records)
        async with trio.open_nursery() as nursery:
            while left:
                harmless = await self._end_mappers(left)
                for record in harmless:
                    nursery.start_soon(self._strike_out, record, opens[record], Kind.SUSPENDED, trio.Event())
                left -= harmless
                self.unfenced -= harmless
                if left:
                    await trio.sleep(AGAIN_S)

    async def _revoke(self, records: set[Record]) -> set[Record]:
        """Revoke what is open; the images of which nothing open can change data past the gates now."""
        numbers = {record.image.inode: record for record in records}
        failed: dict[int, str] = dict.fromkeys(numbers, "no answer")
        with trio.move_on_after(REVOKE_S):
            failed = await self._surroundings.revoke(frozenset(numbers))
        for number, reason in failed.items():
            log.error("image '%s': its handles cannot be revoked (%s)", numbers[number].image.name, reason)
        bypassed = {number for number in failed if self._surroundings.bypassed(number)}
        return {record for number, record in numbers.items() if number not in bypassed}

    async def _end_writers(self, records: set[Record], live: set[Record]) -> set[Record]:
        """Kill who maps the images, and the writers of those still live; the images nobody can change now."""
        writers = {record: _writers(record) for record in records}
        mapped = await self._mappers(records)
        if mapped is None:
            mapped = writers
        doomed = _union(mapped[record] for record in records)
        alive = await self._kill(doomed, "maps an image whose lease is lost, or may do so")
        if self._policy.on_lost is OnLost.KILL:
            await self._kill(_union(writers.values()), "has an image open whose lease is lost")
        stubborn = await self._kill(
            _union(writers[record] for record in live), "has an image open that cannot be revoked"
        )
        return {
            record
            for record in records
            if not alive & mapped[record].keys()
            and not (record in live and stubborn & writers[record].keys())
        }

    async def _end_mappers(self, records: Iterable[Record]) -> set[Record]:
        """Kill who maps the images; those that nobody maps now."""
        records = set(records)
        mapped = await self._mappers(records)
        if mapped is None:
            return set()
        alive = await self._kill(_union(mapped.values()), "maps an image whose lease is not sure")
        return {record for record in records if not alive & mapped[record].keys()}

    async def _mappers(self, records: set[Record]) -> dict[Record, Processes] | None:
        """Who can change the images through memory; None if that could not be found out."""
        inodes = frozenset(record.image.inode for record in records)
        found: dict[int, frozenset[Process]] | None = None
        reason = "no answer"
        try:
            with trio.move_on_after(SCAN_S):
                found = await self._workers.attempt(self._surroundings.mappers, inodes)
        except OSError as error:
            reason = str(error)
        if found is None:
            log.critical("it cannot be found out who maps images whose lease is not sure: %s", reason)
            return None
        return {record: _by_identity(found.get(record.image.inode, ())) for record in records}

    async def _kill(self, doomed: Processes, why: str) -> set[Identity]:
        """Kill processes; those that are still there."""
        if not doomed:
            return set()
        for process in doomed.values():
            log.error("%s (pid %d) is killed: it %s", process.program, process.pid, why)
        alive = set(doomed)
        with trio.move_on_after(2 * KILL_S):
            alive = await self._workers.attempt(self._surroundings.kill, frozenset(doomed), KILL_S)
        for identity in alive:
            log.critical(
                "%s (pid %d) does not end: only a reset of this machine is sure to stop it from writing",
                doomed[identity].program,
                doomed[identity].pid,
            )
        return alive

    # One image

    async def _end_opens(
        self, record: Record, grants: list[Grant], landing: Landing, done: trio.Event
    ) -> None:
        """Strike out opens that were revoked; before, if the lease can be given back, what they changed must
        have landed.
        """
        with self._ledger.use(record.image):
            await drained(record, grants)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._landings.flush, landing)
                await self._settled(record, landing)
                await self._strike_out(record, grants, Kind.FENCED, done)

    async def _strike_out(self, record: Record, grants: list[Grant], fate: Kind, done: trio.Event) -> None:
        """Take the opens off the lease, so that the image can be had anew, and give the lease back."""
        with self._ledger.use(record.image):
            await drained(record, grants)
            async with self._giving_back, record.turn:
                kept = [grant for grant in grants if grant in record.grants]
                for grant in kept:
                    if fate is Kind.FENCED:
                        grant.kind = fate
                    elif grant.kind is Kind.LEASED:
                        grant.kind, grant.lost = fate, record.lease
                    grant.active = grant.seen = grant.covered = False
                record.refresh_gates()
                await self._leases.relax(record)
                if record.lease is None:
                    record.drop()
                record.refresh_gates()
            log.error("image '%s': %d opens are %s", record.image.name, len(kept), fate.value)
            record.wake()
        self._any_dead.set()
        done.set()

    async def _settled(self, record: Record, landing: Landing) -> None:
        """While the lease can be given back nobody may get it before all data are on the storage."""
        while returnable(record) and not landing.over.is_set():
            with trio.move_on_after(AGAIN_S):
                await landing.over.wait()

    # Afterwards

    async def _watch_the_dead(self) -> None:
        """Kill who maps an image through a handle that was fenced or suspended: the kernel still lets it.

        Not while this host has the image's lease again: then whoever has it open here may map it.
        """
        while True:
            if not any(_has_dead(record) for record in self._ledger.all()):
                self._any_dead = trio.Event()
                await self._any_dead.wait()
            await trio.sleep(AGAIN_S)
            dead = {record for record in self._ledger.all() if _has_dead(record) and not record.sure}
            if dead:
                await self._end_mappers(dead)


def _writers(record: Record) -> Processes:
    return _by_identity(grant.opener.process for grant in record.grants if grant.writes)


def _has_dead(record: Record) -> bool:
    return any(grant.writes and grant.kind in (Kind.FENCED, Kind.SUSPENDED) for grant in record.grants)


def _by_identity(processes: Iterable[Process]) -> Processes:
    return {(process.pid, process.started): process for process in processes}


def _union(several: Iterable[Processes]) -> Processes:
    return {identity: process for some in several for identity, process in some.items()}
