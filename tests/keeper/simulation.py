"""A seeded run of several hosts whose programs and guests fight for two images while things go wrong.

Three hosts, each with ordinary programs, managers, cold guests, incoming guests, changes by path and
removals; every call to the storage takes a random time; opens are cancelled and interrupted at random times;
with `faults`, storage calls fail and leases come into doubt and are lost. After every single step of any
task no two hosts and no two processes may have an OPEN gate on one image, nor an OPEN gate without its
lease in the storage; and at no time are two of them inside a write. In the end nothing may be left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from random import Random
from unittest import mock

import trio
from trio._core import _run
from trio.testing import MockClock

from lockfs.backends.base import Image, LeaseState
from lockfs.errors import LockfsError
from lockfs.keeper.keeper import Access, Grant, Kind
from lockfs.keeper.openers import Opener, Role
from lockfs.keeper.policy import Local, Policy

from .world import DISK, OTHER, Host, World, opener

DELAY_S = 0.01
WRITE_S = 0.02
MARGIN_S = 0.5
ROUNDS = 6
SIMULATED_S_MAX = 2000.0


class Watcher(trio.abc.Instrument):
    """Checks the invariant after every step; the first breach is kept and ends the run."""

    def __init__(self, world: World, scope: trio.CancelScope, processes: bool) -> None:
        self.world = world
        self.scope = scope
        self.processes = processes
        self.breach: AssertionError | None = None

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if self.breach is None:
            try:
                self.world.check_exclusion(processes=self.processes)
            except AssertionError as breach:
                self.breach = breach
                self.scope.cancel()


class Simulation:
    """One run. `events` counts what happened, so that a test can tell a busy run from an idle one."""

    def __init__(self, seed: int, *, faults: bool, local: Local = Local.PROCESS) -> None:
        self.random = Random(seed)
        policy = Policy(wait=0.5, handover_wait=1.0, local=local)
        self.world = World("abc", policy, seed=seed, delay=DELAY_S)
        self.world.storage.resumable = seed % 4 > 1
        self.world.storage.processes = local is Local.PROCESS
        self.local = local
        self.faults = faults
        self.events: Counter[str] = Counter()

    async def run(self) -> None:
        scope = trio.CancelScope(deadline=trio.current_time() + SIMULATED_S_MAX)
        watcher = Watcher(self.world, scope, self.local is Local.PROCESS)
        trio.lowlevel.add_instrument(watcher)
        with scope:
            async with trio.open_nursery() as nursery:
                for host in self.world.hosts:
                    await nursery.start(host.keeper.run)
                    host.backend.fault_rate = 0.02 if self.faults else 0.0
                await self._actors()
                for host in self.world.hosts:
                    host.backend.fault_rate = 0.0
                await trio.sleep(60)
                nursery.cancel_scope.cancel()
        trio.lowlevel.remove_instrument(watcher)
        if watcher.breach is not None:
            raise watcher.breach
        if scope.cancelled_caught:
            raise AssertionError("the run does not end")
        if self.faults:
            self.world.storage.wanted.clear()
        self.world.check_nothing_left()

    async def _actors(self) -> None:
        pid = 0
        async with trio.open_nursery() as chaotic:
            if self.faults:
                chaotic.start_soon(self._chaos)
            async with trio.open_nursery() as nursery:
                for host in self.world.hosts:
                    for play in (self._program, self._program, self._guest, self._successor, self._path):
                        pid += 1
                        nursery.start_soon(self._act, play, host, pid)
            chaotic.cancel_scope.cancel()

    async def _act(self, play: Callable[[Host, Image, int], Awaitable[None]], host: Host, pid: int) -> None:
        for _ in range(ROUNDS):
            await trio.sleep(self.random.uniform(0, 0.2))
            image = self.random.choice((DISK, DISK, OTHER))
            try:
                await play(host, image, pid)
            except LockfsError as error:
                self.events[type(error).__name__] += 1

    async def _program(self, host: Host, image: Image, pid: int) -> None:
        """Opens once or twice, writes, closes; may be cancelled or interrupted while it waits."""
        who = opener(pid, self.random.choice((Role.ORDINARY, Role.ORDINARY, Role.MANAGER)))
        first = await self._open(host, image, who)
        if first is None:
            return
        grants = [first]
        try:
            if self.random.random() < 0.5 and (second := await self._open(host, image, who)):
                grants.append(second)
            for _ in range(self.random.randrange(4)):
                await self._write(host, self.random.choice(grants))
        finally:
            self.random.shuffle(grants)
            for grant in grants:
                await host.keeper.close(grant)

    async def _open(self, host: Host, image: Image, who: Opener) -> Grant | None:
        async with trio.open_nursery() as nursery:
            patience = self.random.uniform(0, 0.8) if self.random.random() < 0.3 else 10.0
            if self.random.random() < 0.2:
                nursery.start_soon(self._interrupt, host, who.tid)
            grant = refusal = None
            with trio.move_on_after(patience):
                try:
                    grant = await host.keeper.open(image, who, Access.WRITE)
                except LockfsError as error:
                    refusal = error
            nursery.cancel_scope.cancel()
        if refusal is not None:
            raise refusal
        self.events["opened" if grant else "cancelled"] += 1
        return grant

    async def _interrupt(self, host: Host, tid: int) -> None:
        await trio.sleep(self.random.uniform(0, 0.3))
        host.keeper.interrupt(tid)

    async def _write(self, host: Host, grant: Grant) -> None:
        before = grant.kind
        resumed = await host.write(grant, self.random.uniform(0, WRITE_S))
        self.events["resumed" if resumed else "written" if before is Kind.LEASED else "claimed"] += 1

    async def _guest(self, host: Host, image: Image, pid: int) -> None:
        """Runs from a cold start, stops now and then, and runs on if it can."""
        await self._live(host, image, opener(pid, Role.GUEST), runs=True)

    async def _successor(self, host: Host, image: Image, pid: int) -> None:
        """Has its handle early and begins to run later."""
        await self._live(host, image, opener(pid, Role.INCOMING), runs=False)

    async def _live(self, host: Host, image: Image, who: Opener, *, runs: bool) -> None:
        grant = await self._open(host, image, who)
        if grant is None:
            return
        locked = host.mount.bytes[image.inode]
        pid = who.process.pid
        try:
            for _ in range(4):
                if runs and (not locked or locked == {pid}):
                    locked.add(pid)
                    try:
                        for _ in range(self.random.randrange(5)):
                            await self._write(host, grant)
                            await trio.sleep(self.random.uniform(0, 0.1))
                    except LockfsError as error:
                        self.events[f"paused by {type(error).__name__}"] += 1
                    locked.discard(pid)
                await trio.sleep(self.random.uniform(0, 0.5))
                runs = True
        finally:
            locked.discard(pid)
            await host.keeper.close(grant)

    async def _path(self, host: Host, image: Image, pid: int) -> None:
        """Truncates or removes by path."""
        if self.random.random() < 0.5:
            async with host.keeper.changing(image, opener(pid)) as grant:
                await self._write(host, grant)
        else:
            async with host.keeper.removing(image, opener(pid)):
                await trio.sleep(self.random.uniform(0, WRITE_S))
                self.events["removed"] += 1

    async def _chaos(self) -> None:
        """Puts leases into doubt; most recover, some are lost after the margin that writes need to end."""
        while True:
            await trio.sleep(self.random.uniform(0.1, 0.5))
            host = self.random.choice(self.world.hosts)
            image = self.random.choice((DISK, OTHER))
            lease = self.world.storage.held[image.inode].get(host.name)
            if lease is None or lease.state is not LeaseState.HELD:
                continue
            host.backend.turn_to(LeaseState.DOUBT, image.inode)
            await trio.sleep(MARGIN_S)
            if self.world.storage.held[image.inode].get(host.name) is lease:
                lost = self.random.random() < 0.5
                host.backend.turn_to(LeaseState.LOST if lost else LeaseState.HELD, image.inode)
                self.events["lost" if lost else "doubted"] += 1


def simulate(seed: int, *, faults: bool, local: Local = Local.PROCESS) -> Counter[str]:
    """Run a seed to its end; raises AssertionError (or a group with one) if a promise was broken.

    The same seed is the same run: trio's own shuffling of tasks follows it too.
    """
    simulation = Simulation(seed, faults=faults, local=local)
    with mock.patch.object(_run, "_ALLOW_DETERMINISTIC_SCHEDULING", True):
        _run._r.seed(seed)
        trio.run(simulation.run, clock=MockClock(autojump_threshold=0))
    return simulation.events
