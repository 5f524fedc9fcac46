"""What a host does: joins, renews, uses leases as lockfs' contract says, settles, and joins again if lost."""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from random import Random
from typing import TYPE_CHECKING, Any

from lockfs.errors import BackendError
from lockfs.paxos.area import Area
from lockfs.paxos.errors import LockspaceFailed
from lockfs.paxos.lockspace import Lockspace, Standing, free_ids, survey
from lockfs.paxos.recall import take_over
from lockfs.paxos.resource import Hold, Resource
from lockfs.paxos.timing import Timing
from lockfs.records.geometry import FILE_GEOMETRY
from lockfs.records.results import RecordError
from tests.engine.simulation.machine import Machine
from tests.engine.simulation.scheduler import Cancelled
from tests.engine.simulation.storage import HOST_IDS, LOCKSPACE_SHAPE, ProgramDisk, lease_offset

if TYPE_CHECKING:
    from tests.engine.simulation.run import World

SPACE = b"simulation"
RETRY_S = 0.5
POLL_S = 0.1
CONFIRM_S = 2.0
LONG_HOLD = 80
SUCCEEDED = 0.4
"""How often a process is killed in the middle of a use, in worlds with successors."""
PAUSES_WHILE_JOINING = 0.4


def lease_name(lease: int) -> bytes:
    """The resource name of a lease."""
    return b"lease-%d" % lease


class Session:
    """One membership of the lockspace with the leases used under it."""

    def __init__(self, program: Program, lockspace: Lockspace) -> None:
        world = program.world
        self.program = program
        self.lockspace = lockspace
        self.number = world.numbered()
        self.label = f"host {program.machine.number} as {lockspace.host_id}.{lockspace.generation}"
        self.workers = 0
        self.holders: set[int] = set()
        """Leases whose `Resource` may show a hold; the witness looks at no others."""
        self.resources = {lease: self.resource(lease) for lease in range(world.faults.leases)}
        self.pending = dict.fromkeys(self.resources, 0)
        self.looks = False
        self._busy: set[int] = set()
        self._proving = False

    def resource(self, lease: int) -> Resource:
        """A fresh object for the lease."""
        program, world = self.program, self.program.world
        return world.resource_class(
            Area(program.disk, lease_offset(lease), FILE_GEOMETRY, program.machine.io_timeout),
            self.lockspace,
            lease_name(lease),
            Random(world.scheduler.random.getrandbits(32)),
            HOST_IDS,
        )

    @asynccontextmanager
    async def turn(self, lease: int) -> AsyncIterator[None]:
        """Be the only task that works on the lease."""
        while lease in self._busy:
            await self.lockspace.clock.sleep(POLL_S)
        self._busy.add(lease)
        try:
            yield
        finally:
            self._busy.discard(lease)

    @property
    def owns_some(self) -> bool:
        """Whether it has a lease for itself."""
        return any(self.resources[lease].hold is Hold.EXCLUSIVE for lease in self.holders)

    def may_write_under(self, lease: int) -> bool:
        """Whether this host would start a write under this lease."""
        return self.may_write and self.resources[lease].proven

    # After a renewal

    def passed(self) -> None:
        """Look at the leases in hand, and confirm those in doubt, as lockfs does."""
        if self.lockspace.pace.look_due:
            self.lockspace.pace.looked()
            self.looks = True
        if (self.looks or self._unproven()) and not self._proving:
            self._proving = True
            self.program.machine.start(self._prove(), "proof")

    def _unproven(self) -> list[int]:
        held = [lease for lease, one in self.resources.items() if one.hold is not Hold.NONE]
        return [lease for lease in held if not self.resources[lease].proven]

    async def _prove(self) -> None:
        while not self.over and (self.looks or self._unproven()):
            looks, self.looks = self.looks, False
            for lease, resource in self.resources.items():
                async with self.turn(lease):
                    if looks and resource.hold is not Hold.NONE and resource.proven:
                        await self._look(lease)
                    if resource.hold is not Hold.NONE and not resource.proven:
                        await self._confirm(lease)
            if self._unproven():
                await self.lockspace.clock.sleep(RETRY_S)
        self._proving = False

    async def _look(self, lease: int) -> None:
        try:
            if await self.resources[lease].is_there():
                return
        except BackendError:
            self.resources[lease].doubt()
            return
        self.lockspace.pace.suspect("a lease is not as it was")

    async def _confirm(self, lease: int) -> None:
        note, what = self.program.machine.scheduler.note, f"{self.label} lease {lease}"
        try:
            await self.resources[lease].confirm(self.lockspace.clock.now() + CONFIRM_S)
            note(f"{what} is confirmed")
            self.program.world.witness.confirmed += 1
        except BackendError as error:
            note(f"{what} is not confirmed: {error}")

    @property
    def may_write(self) -> bool:
        """Whether this host would still start a write under a lease, looked at from outside."""
        lockspace = self.lockspace
        if self.program.disk.dead or not lockspace.joined or lockspace.why_lost:
            return False
        return lockspace.clock.now() < lockspace.write_until

    @property
    def over(self) -> bool:
        return self.lockspace.standing() is Standing.LOST


class Program:
    """lockfs on one host, from start to crash or stop."""

    def __init__(self, world: World, machine: Machine, host_id: int) -> None:
        self.world = world
        self.machine = machine
        self.clock = machine.clock
        self.random = world.scheduler.random
        self.disk = ProgramDisk(world.storage, machine)
        self.session: Session | None = None
        self.stopping = False
        self._host_id = host_id
        self.life = machine.start(self._live(), "life")

    def kill(self) -> None:
        """Crash."""
        self.machine.kill()
        self.disk.kill()

    # Membership

    async def _live(self) -> None:
        while not self.stopping:
            lockspace = await self._join()
            if lockspace is None:
                continue
            session = self.session = Session(self, lockspace)
            self.world.began(session)
            for lease in session.resources:
                session.workers += 1
                self.machine.start(self._work(session, lease), f"lease {lease}")
            await self._keep(session)
            while session.workers:
                await self.clock.sleep(POLL_S)
            self.session = None
            await self._leave(lockspace)
            self._host_id = 0 if self.random.random() < 0.5 else self._host_id
        self.machine.scheduler.note(f"host {self.machine.number} has stopped")

    async def _join(self) -> Lockspace | None:
        machine = self.machine
        area = Area(self.disk, 0, LOCKSPACE_SHAPE, machine.io_timeout)
        lockspace: Lockspace | None = None
        try:
            if not self._host_id:
                ids = free_ids(await survey(area), SPACE, HOST_IDS)
                self._host_id = self._chosen(ids)
            name = b"host-%d.%d" % (machine.number, self.world.numbered())
            timing = Timing(machine.io_timeout, self.world.faults.watchdog)
            lockspace = self.world.lockspace_class(
                area, SPACE, self._host_id, name, clock=self.clock, timing=timing
            )
            if not self.world.quiet and self.random.random() < PAUSES_WHILE_JOINING:
                length = self.random.uniform(0.0, 4.0 * timing.renewal)
                self.machine.scheduler.after(
                    self.random.uniform(0.0, self.world.faults.latency * 3), self._pause, length
                )
            await self._cancellable(lockspace.join())
            return lockspace
        except (BackendError, Cancelled) as error:
            machine.scheduler.note(f"host {machine.number} could not join {self._host_id}: {error!r}")
        if lockspace is not None:
            await self._leave(lockspace)
        self._host_id = 0
        await self.clock.sleep(RETRY_S)
        return None

    def _pause(self, length: float) -> None:
        if not self.world.quiet and not self.disk.dead and not self.machine.paused:
            self.machine.pause(length, suspended=False, frozen=False)

    def _chosen(self, ids: list[int]) -> int:
        """A free id if there is one; often the first, as others do."""
        if not ids:
            return self.random.randint(1, HOST_IDS)
        return ids[0] if self.random.random() < 0.5 else self.random.choice(ids)

    async def _keep(self, session: Session) -> None:
        """Renew until the membership is lost, or the program is told to stop and has released everything."""
        lockspace = session.lockspace
        while not session.over and not (self.stopping and not session.workers):
            now = self.clock.now()
            pause = POLL_S if self.stopping else max(RETRY_S, lockspace.timing.fails / 4)
            if now < lockspace.renewal_due:
                await self.clock.sleep(min(lockspace.renewal_due - now, pause))
                continue
            try:
                await lockspace.renew()
                if self.world.halts:
                    session.passed()
            except (LockspaceFailed, RecordError) as error:
                self.machine.scheduler.note(f"{session.label} is lost: {error}")
                return
            except BackendError:
                await self.clock.sleep(RETRY_S)

    async def _leave(self, lockspace: Lockspace) -> None:
        try:
            await lockspace.leave()
        except BackendError as error:
            self.machine.scheduler.note(f"host {self.machine.number} could not leave: {error}")

    # Use of leases

    async def _work(self, session: Session, lease: int) -> None:
        """One use after the other, as long as the faults last and the membership stands."""
        try:
            await self._use(session, lease)
        finally:
            session.workers -= 1
            session.holders.discard(lease)

    async def _use(self, session: Session, lease: int) -> None:
        faults, random, resource = self.world.faults, self.random, session.resources[lease]
        while not session.over and not self.stopping:
            await self.clock.sleep(RETRY_S if self.world.quiet else random.random() ** 2 * faults.thinking)
            if self.world.quiet or session.over or self.stopping:
                continue
            shared = random.random() < faults.shared
            patience = 2.0 * faults.dead if self.world.halts else random.choice((0.0, 1.0, 2.0 * faults.dead))
            session.holders.add(lease)
            taken = await self._try(
                session, lease, resource.acquire(shared=shared, give_up_at=self._until(patience))
            )
            if taken:
                await self._hold(session, lease)
            if self.world.successors and random.random() < SUCCEEDED:
                resource = await self._succeed(session, lease)
            await self._end_use(session, lease)
            session.holders.discard(lease)

    async def _succeed(self, session: Session, lease: int) -> Resource:
        """As if the process had been killed here: the next one goes on with what this one had begun or had.

        It has no other memory than what lies on the storage. What the killed one had written to the image has
        landed before, and so may a release have begun.
        """
        random, resource = self.random, session.resources[lease]
        await self._drain(session, lease)
        if random.random() < 0.3:
            await self._try(session, lease, resource.release())
        session.resources[lease] = resource = session.resource(lease)
        while not session.over:
            if await self._try(session, lease, take_over(resource, session.lockspace)):
                break
            await self.clock.sleep(RETRY_S)
        shared = random.random() < self.world.faults.shared
        give_up_at = self._until(random.choice((0.0, 1.0)))
        if not session.over and await self._try(
            session, lease, resource.acquire(shared=shared, give_up_at=give_up_at)
        ):
            self.world.succeeded += 1
            await self._hold(session, lease)
        return resource

    def _until(self, patience: float) -> float:
        return self.clock.now() + patience if patience else 0.0

    async def _hold(self, session: Session, lease: int) -> None:
        faults, random, resource = self.world.faults, self.random, session.resources[lease]
        if self.world.halts:
            await self._hold_long(session, lease)
        for _ in range(random.choice((1, 1, 2, 5))):
            if resource.hold is Hold.EXCLUSIVE:
                self._write(session, lease)
            if random.random() < 0.3:
                await self.clock.sleep(random.random() * faults.thinking)
            if random.random() < 0.3 and faults.shared:
                if resource.hold is Hold.EXCLUSIVE:
                    await self._drain(session, lease)
                shared = resource.hold is Hold.EXCLUSIVE
                await self._try(session, lease, resource.convert(shared=shared))

    async def _hold_long(self, session: Session, lease: int) -> None:
        """Write now and then, for long enough that it shows if a host goes on that has stood still."""
        resource = session.resources[lease]
        for _ in range(self.random.randint(0, LONG_HOLD)):
            if self.world.quiet or session.over or self.stopping:
                break
            if resource.hold is Hold.EXCLUSIVE:
                self._write(session, lease)
            await self.clock.sleep(self.random.random() * 2.0 * self.machine.io_timeout)

    def _write(self, session: Session, lease: int) -> None:
        """Start a write to the image if the rules allow it; it ends by itself."""
        lockspace, leader = session.lockspace, session.resources[lease].leader
        if lockspace.standing() in (Standing.DOUBT, Standing.LOST) or leader is None:
            return
        if self.clock.now() >= lockspace.write_until or not session.resources[lease].proven:
            return
        session.pending[lease] += 1
        self.machine.start(
            self._write_image(session, lease, leader.lver, self.machine.scheduler.now), f"image {lease}"
        )

    async def _write_image(self, session: Session, lease: int, lver: int, checked: float) -> None:
        witness, unaware = self.world.witness, self.machine.unaware
        await self.disk.write_image(
            checked, lambda: witness.image_written(session, lease, lver, checked, unaware=unaware)
        )
        session.pending[lease] -= 1

    async def _drain(self, session: Session, lease: int) -> None:
        while session.pending[lease]:
            await self.clock.sleep(POLL_S)

    async def _end_use(self, session: Session, lease: int) -> None:
        """Release and settle, whatever came before."""
        resource = session.resources[lease]
        await self._drain(session, lease)
        while not session.over:
            if resource.unsettled and (resource.hold is Hold.NONE or resource.proven):
                await self._try(session, lease, resource.settle())
            elif resource.hold is not Hold.NONE:
                await self._try(session, lease, resource.release())
            else:
                return
            if resource.unsettled:
                await self.clock.sleep(RETRY_S)

    async def _try(self, session: Session, lease: int, call: Coroutine[Any, Any, None]) -> bool:
        """One call of the engine; False if it failed in a way that is to be expected, or was cancelled."""
        try:
            async with session.turn(lease):
                await self._cancellable(call)
            return True
        except (BackendError, Cancelled) as error:
            self.machine.scheduler.note(f"{session.label} lease {lease}: {type(error).__name__} {error}")
            return False
        finally:
            call.close()

    async def _cancellable(self, call: Coroutine[Any, Any, None]) -> None:
        """Make the call, which may be cancelled at any of its awaits while faults last."""
        random, faults, running = self.random, self.world.faults, [True]
        if not self.world.quiet and random.random() < faults.cancel:
            task, latest = self.machine.running, random.choice((faults.latency * 10, 5.0))

            def strike() -> None:
                if running[0] and not self.machine.paused:
                    task.cancel()

            self.machine.scheduler.after(random.random() * latest, strike)
        try:
            await call
        finally:
            running[0] = False
