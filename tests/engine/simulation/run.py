"""One seed from beginning to end: a time with faults, then calm, in which all must come right again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from lockfs.errors import BackendError
from lockfs.paxos.lockspace import Lockspace
from lockfs.paxos.resource import Hold, Resource
from lockfs.records import sectors
from lockfs.records.geometry import FILE_GEOMETRY
from tests.engine.simulation.faults import Faults
from tests.engine.simulation.machine import Machine
from tests.engine.simulation.program import SPACE, Program, Session, lease_name
from tests.engine.simulation.scheduler import Scheduler
from tests.engine.simulation.storage import HOST_IDS, LOCKSPACE_SHAPE, Outage, Storage, lease_offset
from tests.engine.simulation.witness import Witness

STEPS = 1000
CALM_STEPS_MAX = 20_000
HALTS_EACH_DEATH = 2
"""How many hosts stand still in the time after which one counts as dead, on average."""
JOIN_TRIES = 4
"""In the calm a host may meet so many ids in a row that are not free before it must have joined."""


@dataclass
class Outcome:
    """What a seed showed. `violations` must be empty; `excused` is what only a watchdog could prevent."""

    seed: int
    violations: list[str]
    excused: list[str]
    trace: str
    steps: int
    seconds: float
    holds: int
    image_writes: int
    late_image_writes: int
    stale_after_halts: int
    confirmed: int
    faulted: bool
    events: list[str] = field(repr=False, default_factory=list)
    succeeded: int = 0
    kind: str = ""

    def story(self) -> str:
        """The failure for people: what, the last events before it, and how to see it again."""
        lines = [f"seed {self.seed}:", *self.violations, "", *self.events, ""]
        return "\n".join([*lines, f"python -m tests.engine.simulation {self.seed}{self.kind} -v"])


class World:
    """All that one seed consists of."""

    def __init__(
        self,
        seed: int,
        *,
        show: Callable[[str], None] | None = None,
        ordered: bool = True,
        halts: bool = False,
        successors: bool = False,
        lockspace_class: type[Lockspace] = Lockspace,
        resource_class: type[Resource] = Resource,
    ) -> None:
        self.scheduler = Scheduler(seed, show)
        self.faults = Faults.draw(self.scheduler.random)
        if halts:
            self.faults = self.faults.with_halts()
        self.storage = Storage(self.scheduler, self.faults)
        self.storage.ordered = ordered
        self.witness = Witness(self.scheduler, self.faults.bound)
        self.storage.on_beyond = self.witness.beyond
        self.lockspace_class, self.resource_class = lockspace_class, resource_class
        self.quiet = False
        self.halts = halts
        self.successors, self.succeeded = successors, 0
        self._numbers = 0
        self._satisfied: set[tuple[int, int]] = set()
        self._format()
        self.machines = [
            Machine(self.scheduler, number, self.faults.io_timeouts[number])
            for number in range(self.faults.hosts)
        ]
        self.programs: list[Program | None] = []
        for machine in self.machines:
            machine.after_step = self._after_step
            machine.longest_pause = float(self.faults.dead)
            self.programs.append(Program(self, machine, 1 if self.faults.collide else machine.number + 1))

    def numbered(self) -> int:
        """A number that nobody else has."""
        self._numbers += 1
        return self._numbers

    def began(self, session: Session) -> None:
        """A host has joined."""
        self.scheduler.note(f"{session.label} has joined")
        self.witness.sessions = [other for other in self.witness.sessions if not other.program.disk.dead]
        self.witness.joined(session)

    def _format(self) -> None:
        self.storage.load(0, sectors.new_lockspace(LOCKSPACE_SHAPE, SPACE, self.faults.io_timeouts[0]))
        for lease in range(self.faults.leases):
            leader = sectors.new_leader(FILE_GEOMETRY, SPACE, lease_name(lease), HOST_IDS)
            self.storage.load(
                lease_offset(lease), sectors.encode_leader(leader) + sectors.Request().encode(512)
            )

    def _after_step(self, machine: Machine, label: str) -> None:
        self.scheduler.note(f"step {self.scheduler.steps} {label}")
        self.witness.look()

    def end(self) -> None:
        """Nothing runs any more."""
        for machine in self.machines:
            machine.kill()

    # The time with faults

    def run(self, steps: int = STEPS) -> None:
        """Faults for so many steps, then the calm; ends at the first violation."""
        scheduler, witness = self.scheduler, self.witness
        self._plan_chaos()
        if self.halts:
            self._plan_halt()
        scheduler.run(lambda: scheduler.steps >= steps or bool(witness.violations))
        if not witness.violations:
            self._calm()

    def _plan_chaos(self) -> None:
        self.scheduler.after(self.scheduler.random.expovariate(1.0 / self.faults.chaos_every), self._chaos)

    def _chaos(self) -> None:
        if self.quiet:
            return
        self._plan_chaos()
        random, machine = self.scheduler.random, self.scheduler.random.choice(self.machines)
        what = random.choice(
            (self._trouble, self._trouble, self._pause, self._crash, self._drift, self._stop)
        )
        if not machine.paused:
            what(machine)

    def _trouble(self, machine: Machine) -> None:
        random = self.scheduler.random
        host = random.choice((machine.number, machine.number, None))
        area = random.choice((None, None, random.randint(0, self.faults.leases)))
        length = random.uniform(0.0, random.choice((2, 9, 12)) * machine.io_timeout)
        outage = Outage(
            self.scheduler.now + length, host, area, random.random() < 0.7, random.choice((0.5, 1.0))
        )
        self.storage.outages = [old for old in self.storage.outages if old.until > self.scheduler.now]
        self.storage.outages.append(outage)
        self.scheduler.note(f"{outage}")

    def _pause(self, machine: Machine) -> None:
        random = self.scheduler.random
        longest = random.choice((3.0 * machine.io_timeout, 9.0 * machine.io_timeout, 1.5 * self.faults.dead))
        seconds, suspended = random.uniform(0.0, longest), random.random() < 0.5
        self.scheduler.note(f"host {machine.number} pauses for {seconds:.3f} s")
        machine.pause(seconds, suspended=suspended, frozen=self.faults.frozen)

    def _plan_halt(self) -> None:
        every = self.faults.dead / HALTS_EACH_DEATH
        self.scheduler.after(self.scheduler.random.expovariate(1.0 / every), self._halt)

    def _halt(self) -> None:
        """Have a member stand still together with its clock; not one that is about to join (faults.py)."""
        if self.quiet:
            return
        self._plan_halt()
        random = self.scheduler.random
        members = [one for one in self.programs if one is not None and one.session is not None]
        members = [one for one in members if not one.machine.paused]
        owners = [one for one in members if one.session is not None and one.session.owns_some]
        if not members:
            return
        machine = random.choice(owners or members).machine
        seconds = random.uniform(0.0, random.choice((1.0, 3.0)) * self.faults.dead)
        self.scheduler.note(f"host {machine.number} stands still for {seconds:.3f} s, and its clock")
        machine.halt(seconds)

    def _crash(self, machine: Machine) -> None:
        program = self.programs[machine.number]
        if program is not None:
            self.scheduler.note(f"host {machine.number} crashes")
            self._replace(program)

    def _replace(self, program: Program) -> None:
        program.kill()
        random, number = self.scheduler.random, program.machine.number
        self.programs[number] = None
        delay = random.uniform(0.0, random.choice((1.0, 20.0)))
        self.scheduler.after(
            delay, self._start, number, random.choice((0, number + 1, random.randint(1, HOST_IDS)))
        )

    def _start(self, number: int, host_id: int) -> None:
        self.programs[number] = Program(self, self.machines[number], host_id)

    def _drift(self, machine: Machine) -> None:
        machine.clock.drift()

    def _stop(self, machine: Machine) -> None:
        """Stop in good order, and start again some time later."""
        program = self.programs[machine.number]
        if program is not None and not program.stopping:
            self.scheduler.note(f"host {machine.number} is told to stop")
            program.stopping = True
            self._restart_when_stopped(program)

    def _restart_when_stopped(self, program: Program) -> None:
        if self.programs[program.machine.number] is not program:
            return
        if program.life.over:
            self._replace(program)
        else:
            self.scheduler.after(1.0, self._restart_when_stopped, program)

    # The calm

    def _calm(self) -> None:
        """Faults end. Every host must join, settle, and obtain each lease, all within a bound."""
        scheduler, faults = self.scheduler, self.faults
        scheduler.note("calm")
        self.quiet = self.storage.calm = True
        self.storage.outages = []
        paused = max(0.0, *(machine.paused_until - scheduler.now for machine in self.machines))
        bound = paused + 20.0 + faults.bound + (2 + JOIN_TRIES) * (faults.dead + 30.0)
        deadline, steps = scheduler.now + bound, scheduler.steps + CALM_STEPS_MAX
        for lease in range(faults.leases):
            scheduler.after(0.0, self._ask_next, lease, 0)
        wanted = faults.leases * faults.hosts
        scheduler.run(
            lambda: (
                len(self._satisfied) == wanted
                or scheduler.now > deadline
                or scheduler.steps > steps
                or bool(self.witness.violations)
            )
        )
        if self.witness.violations or len(self._satisfied) == wanted:
            return
        missing = [
            f"host {host} lease {lease}"
            for lease in range(faults.leases)
            for host in range(faults.hosts)
            if (host, lease) not in self._satisfied
        ]
        self.witness.complain(f"{bound:.0f} s after all faults had ended, not obtained: {', '.join(missing)}")

    def _ask_next(self, lease: int, host: int) -> None:
        """Once a host is a settled member, have it ask for the lease; one host after the other."""
        if host == self.faults.hosts:
            return
        program = self.programs[host]
        session = program.session if program is not None else None
        resource = session.resources[lease] if session is not None else None
        ready = session is not None and session.may_write and not session.program.stopping
        busy = resource is None or resource.hold is not Hold.NONE or resource.unsettled
        if session is None or not ready or busy or lease in session.holders:
            self.scheduler.after(0.2, self._ask_next, lease, host)
            return
        session.holders.add(lease)
        self.machines[host].start(self._ask(session, lease, host), f"asks for lease {lease}")

    async def _ask(self, session: Session, lease: int, host: int) -> None:
        resource, clock = session.resources[lease], session.program.clock
        try:
            async with session.turn(lease):
                await resource.acquire(give_up_at=clock.now() + 2.0 * self.faults.dead)
            self._satisfied.add((host, lease))
        except BackendError as error:
            self.scheduler.note(f"{session.label} lease {lease}: {error}")
        while resource.hold is not Hold.NONE or resource.unsettled:
            try:
                async with session.turn(lease):
                    await (resource.settle() if resource.unsettled else resource.release())
            except BackendError as error:
                self.scheduler.note(f"{session.label} lease {lease}: {error}")
                await clock.sleep(0.5)
        session.holders.discard(lease)
        if (host, lease) not in self._satisfied:
            await clock.sleep(0.5)
        self.scheduler.after(0.0, self._ask_next, lease, host + ((host, lease) in self._satisfied))


def simulate(
    seed: int,
    steps: int = STEPS,
    show: Callable[[str], None] | None = None,
    make: Callable[..., World] = World,
) -> Outcome:
    """Run a seed; nothing but the seed, the steps and the code decides what happens."""
    world = partial(make, show=show)(seed)
    try:
        world.run(steps)
    finally:
        world.end()
    witness, scheduler = world.witness, world.scheduler
    return Outcome(
        seed=seed,
        violations=witness.violations,
        excused=witness.excused,
        trace=scheduler.trace,
        steps=scheduler.steps,
        seconds=scheduler.now,
        holds=witness.holds,
        image_writes=witness.image_writes,
        late_image_writes=witness.late_image_writes,
        stale_after_halts=witness.stale_after_halts,
        succeeded=world.succeeded,
        kind=" --halts" * world.halts + " --successors" * world.successors,
        confirmed=witness.confirmed,
        faulted=bool(witness.faulted),
        events=list(scheduler.events),
    )
